//! `cargo xtask image`: a disk with a small Debian system on it, and the initial RAM disk that mounts it.
//!
//! Everything on it comes out of Debian's packages: busybox is the shell, init, login and network; fio, with the shared
//! libraries that it needs, is the one thing more. Packages are unpacked and not installed, so programs that an
//! installation would run are not there.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use harness::cpio::Archive;

use crate::kernel::{self, Kernel};
use crate::package::Unpacked;
use crate::{initramfs, paths, process, setup};

const PLACE: &str = "system";
const PROGRAM: &str = "fio";
/// Sparse on the host: what the guest has not written takes no space.
const SIZE: &str = "1G";
/// The modules for a disk and a network, whichever transport the machine has.
const MODULES: [&str; 4] = ["virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net"];

#[derive(clap::Args)]
pub struct Args {
    /// Build it anew, and lose what is on it
    #[arg(long)]
    pub fresh: bool,
}

/// What a machine is made of.
pub struct System {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub disk: PathBuf,
}

pub fn run(args: &Args) -> Result<()> {
    setup::run(&setup::Args::default())?;
    let system = ensure(args.fresh)?;
    let show = |path: &Path| {
        path.strip_prefix(paths::root())
            .unwrap_or(path)
            .display()
            .to_string()
    };
    println!(
        "image: a small Debian system; log in as root, there is no password, and leave with poweroff:\n\
         target/release/actor-vmm run --kernel {} --initrd {} --disk path={} --net user",
        show(&system.kernel),
        show(&system.initrd),
        show(&system.disk)
    );
    Ok(())
}

/// Finds the disk in the cache, or builds it. It belongs to a kernel, whose modules are in its initial RAM disk.
pub fn ensure(fresh: bool) -> Result<System> {
    let kernel = kernel::ensure(false)?;
    let dir = paths::cache().join(PLACE);
    let system = System {
        kernel: kernel.bzimage.clone(),
        initrd: dir.join("initrd.img"),
        disk: dir.join("root.img"),
    };
    if fresh || !system.disk.exists() {
        build_disk()?;
    }
    // Cheap, and so never old.
    fs::write(&system.initrd, initrd(&kernel)?)
        .with_context(|| format!("cannot write {}", system.initrd.display()))?;
    Ok(system)
}

/// The guest's archive with a script that mounts the disk, which process 1 then hands over to.
fn initrd(kernel: &Kernel) -> Result<Vec<u8>> {
    let mut script = String::new();
    for module in kernel.modules(&MODULES)? {
        script.push_str(&format!("insmod /modules/{}.ko\n", module.name));
    }
    script.push_str("mount -t ext4 /dev/vda /root\n");
    let mut archive = Archive::new();
    archive.file("script", 0o755, script.as_bytes());
    let mut whole = initramfs::guest(kernel)?;
    whole.extend_from_slice(&archive.finish());
    Ok(whole)
}

fn build_disk() -> Result<()> {
    let unpacked = Unpacked::fetch_all(PLACE, closure)?;
    let tree = unpacked.dir.join("tree");
    fs::create_dir(&tree)?;
    for entry in fs::read_dir(&unpacked.dir)?.collect::<Result<Vec<_>, _>>()? {
        if entry.path() != tree {
            fs::rename(entry.path(), tree.join(entry.file_name()))?;
        }
    }
    furnish(&tree)?;
    let disk = unpacked.dir.join("root.img");
    eprintln!("image: making a file system of {SIZE}");
    process::output(
        Command::new("/sbin/mke2fs")
            .args(["-q", "-t", "ext4", "-E", "root_owner=0:0", "-L", "root", "-d"])
            .arg(&tree)
            .arg(&disk)
            .arg(SIZE),
    )?;
    fs::remove_dir_all(&tree)?;
    unpacked.keep()
}

/// fio and the packages of the shared libraries that it needs.
fn closure() -> Result<Vec<String>> {
    let mut all = BTreeSet::from([PROGRAM.to_owned()]);
    let mut new = vec![PROGRAM.to_owned()];
    while !new.is_empty() {
        let needed = depends(&apt_cache(&["depends", "--important"], &new)?);
        let unknown: Vec<String> = needed.into_iter().filter(|name| !all.contains(name)).collect();
        if unknown.is_empty() {
            break;
        }
        new = libraries(&apt_cache(&["show", "--no-all-versions"], &unknown)?);
        all.extend(new.iter().cloned());
    }
    Ok(all.into_iter().collect())
}

fn apt_cache(words: &[&str], packages: &[String]) -> Result<String> {
    let text = process::output(Command::new("apt-cache").args(words).args(packages))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// What packages depend on: of alternatives the first, and nothing that is only a name for others.
fn depends(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut decided = false;
    for line in text.lines() {
        let line = line.trim_start();
        let (more, line) = match line.strip_prefix('|') {
            Some(rest) => (true, rest),
            None => (false, line),
        };
        let name = ["Depends: ", "PreDepends: "]
            .iter()
            .find_map(|key| line.strip_prefix(key));
        if let Some(name) = name {
            if !decided && !name.starts_with('<') {
                found.insert(name.trim().to_owned());
            }
            decided = more;
        }
    }
    found
}

/// The packages of shared libraries among those that are shown.
fn libraries(show: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut package = "";
    for line in show.lines() {
        if let Some(name) = line.strip_prefix("Package: ") {
            package = name;
        } else if line == "Section: libs" {
            found.push(package.to_owned());
        }
    }
    found
}

const PASSWD: &str = "root::0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const INITTAB: &str = "\
::sysinit:/etc/rc
ttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
";
const RC: &str = "\
#!/bin/sh
mount -t devpts devpts /dev/pts 2>/dev/null || { mkdir -p /dev/pts; mount -t devpts devpts /dev/pts; }
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
hostname debian
ip link set lo up
for net in /sys/class/net/eth*; do
    [ -e \"$net\" ] || continue
    ip link set \"${net##*/}\" up
    udhcpc -i \"${net##*/}\" -s /etc/udhcpc -b -q -S > /dev/null 2>&1 &
done
";
/// What udhcpc does with what it gets.
const UDHCPC: &str = "\
#!/bin/sh
case \"$1\" in
deconfig) ip addr flush dev \"$interface\" ;;
bound | renew)
    ip addr replace \"$ip/${mask:-24}\" dev \"$interface\"
    [ -n \"$router\" ] && ip route replace default via \"${router%% *}\" dev \"$interface\"
    : > /run/resolv.conf
    for server in $dns; do echo \"nameserver $server\" >> /run/resolv.conf; done
    ;;
esac
";

/// What makes a system of unpacked packages.
fn furnish(tree: &Path) -> Result<()> {
    let at = |path: &str| tree.join(path);
    for dir in [
        "bin", "sbin", "etc", "proc", "sys", "dev", "tmp", "run", "root", "usr/bin", "lib64",
    ] {
        fs::create_dir_all(at(dir))?;
    }
    fs::copy(initramfs::BUSYBOX, at("bin/busybox")).context("cannot copy busybox")?;
    let applets = process::output(Command::new(initramfs::BUSYBOX).arg("--list-full"))?;
    for applet in String::from_utf8_lossy(&applets).lines() {
        let place = at(applet);
        if place.symlink_metadata().is_err() {
            fs::create_dir_all(place.parent().unwrap_or(tree))?;
            symlink("/bin/busybox", place)?;
        }
    }
    for (path, text, mode) in [
        ("etc/passwd", PASSWD, 0o644),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n", 0o644),
        ("etc/securetty", "ttyS0\n", 0o644),
        ("etc/hostname", "debian\n", 0o644),
        ("etc/inittab", INITTAB, 0o644),
        ("etc/rc", RC, 0o755),
        ("etc/udhcpc", UDHCPC, 0o755),
    ] {
        fs::write(at(path), text)?;
        fs::set_permissions(at(path), fs::Permissions::from_mode(mode))?;
    }
    symlink("/run/resolv.conf", at("etc/resolv.conf"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{depends, libraries};

    #[test]
    fn of_alternatives_the_first_counts() {
        let text = "fio\n  Depends: libaio1\n |Depends: libold\n  Depends: libnew\n  PreDepends: libc6\n  Depends: python3\n\
                    \x20Depends: <libvirtual>\n |Depends: tool\n  Depends: libtool\nlibaio1\n  Depends: libc6\n";
        let found: Vec<String> = depends(text).into_iter().collect();
        assert_eq!(found, ["libaio1", "libc6", "libold", "python3", "tool"]);
    }

    #[test]
    fn libraries_are_a_section_of_the_archive() {
        let show = "Package: zlib1g\nSection: libs\n\nPackage: python3\nSection: python\n\nPackage: libc6\nSection: libs\n";
        assert_eq!(libraries(show), ["zlib1g", "libc6"]);
    }
}
