//! Building programs that run where no library is: static, in a target directory of their own.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{paths, process};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const LIMIT: Duration = Duration::from_secs(1200);

/// Builds `bin` of `package` in release for the emulated host.
pub fn static_binary(package: &str, bin: &str) -> Result<PathBuf> {
    let target_dir = paths::root().join("target/static");
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(paths::root())
        .args(["build", "--quiet", "--release", "--locked"]);
    command
        .args(["--package", package, "--bin", bin, "--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir);
    command.env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    let status = process::run_limited(&mut command, LIMIT)?;
    ensure!(status.success(), "{bin} does not build");
    Ok(target_dir.join(TARGET).join("release").join(bin))
}

/// Builds actor-vmm as a user would.
pub fn release() -> Result<PathBuf> {
    // Named, since the user's settings may send it elsewhere.
    let target_dir = paths::root().join("target");
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(paths::root())
        .args(["build", "--release", "--locked", "--bin", "actor-vmm"])
        .arg("--target-dir")
        .arg(&target_dir);
    let status = process::run_limited(&mut command, LIMIT)?;
    ensure!(status.success(), "actor-vmm does not build");
    Ok(target_dir.join("release/actor-vmm"))
}
