//! Debian's cloud kernel: fetched, taken apart, kept in the cache; never installed.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::package::{Unpacked, only_file};
use crate::{paths, process, setup};

/// Always depends on the current kernel package.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// In the cache.
const PLACE: &str = "kernel";

#[derive(Clone, Debug)]
pub struct Kernel {
    /// Such as 6.1.0-41-cloud-amd64.
    pub release: String,
    pub bzimage: PathBuf,
    pub vmlinux: PathBuf,
    pub modules: PathBuf,
}

/// Finds the kernel in the cache, or fetches it.
pub fn ensure(refresh: bool) -> Result<Kernel> {
    if !refresh && let Some(kernel) = cached() {
        return Ok(kernel);
    }
    if !setup::known(META_PACKAGE) || refresh {
        setup::update_lists()?;
    }
    let unpacked = Unpacked::fetch(PLACE, || {
        let (package, version) = current_package()?;
        Ok(format!("{package}={version}"))
    })?;
    let dir = &unpacked.dir;
    let bzimage = only_file(&dir.join("boot"), |path| {
        path.file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-"))
    })?;
    let name = bzimage.file_name().unwrap_or_default().to_string_lossy();
    let release = name.trim_start_matches("vmlinuz-").to_owned();
    let image = fs::read(&bzimage)?;
    fs::write(dir.join("vmlinux"), vmlinux(&image)?)?;
    fs::rename(&bzimage, dir.join("bzImage"))?;
    fs::write(dir.join("release"), &release)?;
    unpacked.keep()?;
    cached()
        .with_context(|| format!("the package of {release} does not contain what a kernel package should"))
}

fn cached() -> Option<Kernel> {
    let dir = paths::cache().join(PLACE);
    let release = fs::read_to_string(dir.join("release")).ok()?.trim().to_owned();
    let lib = if dir.join("usr/lib/modules").exists() {
        "usr/lib/modules"
    } else {
        "lib/modules"
    };
    let kernel = Kernel {
        bzimage: dir.join("bzImage"),
        vmlinux: dir.join("vmlinux"),
        modules: dir.join(lib).join(&release),
        release,
    };
    let complete = kernel.bzimage.exists() && kernel.vmlinux.exists() && kernel.modules.exists();
    complete.then_some(kernel)
}

/// The name and the version of the package that the meta package asks for.
fn current_package() -> Result<(String, String)> {
    let show = process::output(Command::new("apt-cache").args(["show", "--no-all-versions", META_PACKAGE]))
        .with_context(|| format!("apt does not know {META_PACKAGE}; is this Debian?"))?;
    let show = String::from_utf8_lossy(&show);
    parse_depends(&show).with_context(|| format!("{META_PACKAGE} does not say which kernel it means"))
}

fn parse_depends(show: &str) -> Option<(String, String)> {
    let depends = show.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let wanted = depends
        .split([',', '|'])
        .map(str::trim)
        .find(|d| d.starts_with("linux-image-"))?;
    let (name, rest) = wanted.split_once(' ')?;
    let version = rest.trim_start_matches("(=").trim_end_matches(')').trim();
    Some((name.to_owned(), version.to_owned()))
}

/// The ELF file inside a bzImage.
fn vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        image.len() > 0x250 && &image[0x202..0x206] == b"HdrS",
        "the kernel image is not a bzImage"
    );
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes")) as usize;
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        count => usize::from(count),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248);
    // The build appends the unpacked size; tools other than the kernel's own take it for damage.
    let end = start + word(0x24c) - 4;
    let payload = image.get(start..end).context("the kernel image is cut short")?;
    let (tool, package) = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", "lz4"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ("xz", "xz-utils"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", "zstd"),
        [0x1f, 0x8b, ..] => ("gzip", "gzip"),
        _ => bail!("the kernel image is packed in a way that is not known here"),
    };
    let elf = filter(tool, payload).with_context(|| format!("is the package {package} installed?"))?;
    ensure!(
        elf.starts_with(b"\x7fELF"),
        "the kernel image does not hold an ELF file"
    );
    Ok(elf)
}

/// Unpacks by `tool -dc`.
fn filter(tool: &str, packed: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(tool)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {tool}"))?;
    let mut stdin = child.stdin.take().context("stdin is a pipe")?;
    let packed = packed.to_vec();
    let writer = thread::spawn(move || stdin.write_all(&packed));
    let output = child.wait_with_output()?;
    // A tool that stops reading has an exit status that says why.
    let _ = writer.join();
    ensure!(output.status.success(), "`{tool} -dc` failed ({})", output.status);
    Ok(output.stdout)
}

impl Kernel {
    /// The modules that are needed to load `names`, each after those that it needs; what is built in is left out.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut all = Vec::new();
        index(&self.modules, &mut all)?;
        let mut chosen = Vec::new();
        for name in names {
            self.choose(name, &all, &mut chosen)?;
        }
        Ok(chosen)
    }

    fn choose(&self, name: &str, all: &[PathBuf], chosen: &mut Vec<Module>) -> Result<()> {
        if chosen.iter().any(|m| m.name == name) {
            return Ok(());
        }
        let Some(path) = all.iter().find(|path| module_name(path) == name) else {
            let built_in = fs::read_to_string(self.modules.join("modules.builtin")).unwrap_or_default();
            ensure!(
                built_in.lines().any(|line| module_name(Path::new(line)) == name),
                "the kernel {} has no module {name}",
                self.release
            );
            return Ok(());
        };
        let mut content = fs::read(path)?;
        if path.extension().is_some_and(|e| e == "xz") {
            content = filter("xz", &content)?;
        }
        for needed in depends(&content) {
            self.choose(&needed, all, chosen)?;
        }
        chosen.push(Module {
            name: name.to_owned(),
            content,
        });
        Ok(())
    }
}

pub struct Module {
    /// With underscores, as modules call each other.
    pub name: String,
    pub content: Vec<u8>,
}

fn index(dir: &Path, all: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            index(&entry.path(), all)?;
        } else if entry.file_name().to_string_lossy().contains(".ko") {
            all.push(entry.path());
        }
    }
    Ok(())
}

fn module_name(path: &Path) -> String {
    let file = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    file.split(".ko").next().unwrap_or("").replace('-', "_")
}

/// A module says in its section .modinfo what it needs; the package has no modules.dep before it is installed.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let rest = &module[at + KEY.len()..];
    let end = rest.iter().position(|&b| b == 0).unwrap_or(rest.len());
    let list = String::from_utf8_lossy(&rest[..end]);
    list.split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_meta_package_names_the_kernel() {
        let show =
            "Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
        let expected = (
            "linux-image-6.1.0-56-cloud-amd64".to_owned(),
            "6.1.192-2".to_owned(),
        );
        assert_eq!(parse_depends(show), Some(expected));
        assert_eq!(parse_depends("Package: x\n"), None);
    }

    #[test]
    fn modules_say_what_they_need() {
        assert_eq!(
            depends(b"license=GPL\0depends=kvm,cc-p\0retpoline=Y\0"),
            ["kvm", "cc_p"]
        );
        assert_eq!(depends(b"license=GPL\0depends=\0x"), Vec::<String>::new());
        assert_eq!(
            module_name(Path::new("kernel/arch/x86/kvm/kvm-amd.ko.xz")),
            "kvm_amd"
        );
    }

    #[test]
    fn what_is_no_bzimage_is_said_to_be_none() {
        assert!(
            vmlinux(&[0; 4096])
                .unwrap_err()
                .to_string()
                .contains("not a bzImage")
        );
    }
}
