//! `cargo xtask symbols`: a symbol file for gdb, from a guest's `/proc/kallsyms`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use harness::symbols;

#[derive(clap::Args)]
pub struct Args {
    /// What the guest's /proc/kallsyms has, read as root
    pub list: PathBuf,
    /// The ELF file to write, for `gdb FILE`
    pub file: PathBuf,
}

pub fn run(args: &Args) -> Result<bool> {
    let bytes = fs::read(&args.list).with_context(|| format!("cannot read {}", args.list.display()))?;
    let file = symbols::elf(&String::from_utf8_lossy(&bytes))
        .with_context(|| format!("{} is not what /proc/kallsyms has", args.list.display()))?;
    fs::write(&args.file, file).with_context(|| format!("cannot write {}", args.file.display()))?;
    Ok(true)
}
