//! gdb inside the emulated host: Debian's gdb-minimal, which needs no Python and so a tenth of the files of the other
//! one. The two cannot be installed together, hence it is fetched, and never installed; its libraries are also those of
//! the gdb that the tests on this machine use.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::package::Unpacked;
use crate::paths;

const PACKAGE: &str = "gdb-minimal";
const PLACE: &str = "gdb";

/// Finds the program in the cache, or fetches it.
pub fn ensure() -> Result<PathBuf> {
    let program = paths::cache().join(PLACE).join("usr/bin/gdb");
    if !program.exists() {
        Unpacked::fetch(PLACE, || Ok(PACKAGE.to_owned()))?.keep()?;
    }
    program
        .exists()
        .then_some(program)
        .with_context(|| format!("{PACKAGE} does not contain what it should"))
}
