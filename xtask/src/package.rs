//! Debian packages that are fetched and unpacked into the cache, and never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{paths, process, setup};

/// A package that has been unpacked, but is not in its place yet: what is not complete is as good as not there, so an
/// interrupted set-up is simply done again.
pub struct Unpacked {
    pub dir: PathBuf,
    place: PathBuf,
}

impl Unpacked {
    /// Fetches what `wanted` (asked again should apt's lists be too old) calls a package and its version, for the
    /// cache's directory `place`.
    pub fn fetch(place: &str, wanted: impl Fn() -> Result<String>) -> Result<Self> {
        Self::fetch_all(place, || Ok(vec![wanted()?]))
    }

    /// The same with several packages, one over the other.
    pub fn fetch_all(place: &str, wanted: impl Fn() -> Result<Vec<String>>) -> Result<Self> {
        let dir = paths::cache().join(format!("{place}.incomplete"));
        remove(&dir)?;
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let packages = wanted()?;
        match packages.as_slice() {
            [package] => eprintln!("setup: fetching {package} (it is not installed)"),
            all => eprintln!("setup: fetching {} packages (they are not installed)", all.len()),
        }
        if let Err(first) = download(&packages, &dir) {
            // The archive drops old versions; lists that still name one have to be renewed.
            setup::update_lists()?;
            download(&wanted()?, &dir).context(first)?;
        }
        let is_package = |path: &Path| path.extension().is_some_and(|e| e == "deb");
        while let Ok(deb) = only_file(&dir, is_package) {
            process::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&dir))?;
            fs::remove_file(&deb)?;
        }
        let place = paths::cache().join(place);
        Ok(Self { dir, place })
    }

    /// It is complete.
    pub fn keep(self) -> Result<()> {
        remove(&self.place)?;
        fs::rename(&self.dir, &self.place)?;
        Ok(())
    }
}

/// Each is `package`, or `package=version`.
fn download(packages: &[String], dir: &Path) -> Result<()> {
    let mut command = Command::new("apt-get");
    // apt as root would drop its rights and then complain that it may not write here.
    command.args(["-o", "APT::Sandbox::User=root", "--quiet=2", "download"]);
    process::output(command.args(packages).current_dir(dir))?;
    Ok(())
}

pub fn only_file(dir: &Path, wanted: impl Fn(&Path) -> bool) -> Result<PathBuf> {
    let mut found = fs::read_dir(dir)
        .with_context(|| format!("the package has no {}", dir.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| wanted(path));
    found
        .next()
        .with_context(|| format!("nothing useful in {}", dir.display()))
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
