//! Where things are.

use std::path::{Path, PathBuf};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the repository")
}

pub fn scenarios() -> PathBuf {
    root().join("tests/emulated")
}

/// Survives `cargo clean`; git ignores it.
pub fn cache() -> PathBuf {
    root().join(".cache/emulated-host")
}

/// Logs and other things of one run.
pub fn scratch() -> PathBuf {
    root().join("target/emulated-host")
}
