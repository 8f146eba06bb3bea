//! What is inside the emulated host, and what is inside its guests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use harness::cpio::Archive;

use crate::kernel::Kernel;
use crate::{process, setup};

pub const BUSYBOX: &str = "/bin/busybox";
/// What a guest may load: panics are told to the VMM through pvpanic; virtio's transports and devices.
const GUEST_MODULES: [&str; 10] = [
    "pvpanic_mmio",
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_rng",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_balloon",
    "virtio_console",
    "virtiofs",
];
/// KVM for AMD processors, which is what QEMU can emulate; taps, and an interface that leads nowhere; a disk.
const HOST_MODULES: [&str; 5] = ["kvm_amd", "tun", "dummy", "virtio_pci", "virtio_blk"];
/// passt gives up its rights for those of nobody.
const USERS: &str = "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
/// What QEMU's microvm reads at start.
const QEMU_DATA: [&str; 7] = [
    "qemu/bios-microvm.bin",
    "seabios/bios-microvm.bin",
    "qemu/qboot.rom",
    "qemu/linuxboot_dma.bin",
    "qemu/linuxboot.bin",
    "qemu/pvh.bin",
    "qemu/kvmvapic.bin",
];

/// The guest's process 1. `script` is the scenario's; it may power off itself, or mount a system on /root to go on with.
const GUEST_INIT: &str = "\
#!/bin/busybox sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
sh /script
if [ -x /root/sbin/init ]; then
    for dir in proc sys dev; do mount --move /$dir /root/$dir; done
    exec switch_root /root /sbin/init
fi
poweroff -f
";

/// Everything that all guests share. A second archive behind it brings /script.
pub fn guest(kernel: &Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    busybox(&mut archive)?;
    for dir in ["proc", "sys", "dev", "tmp", "run", "root"] {
        archive.dir(dir);
    }
    archive.char_device("dev/console", 5, 1);
    for module in kernel.modules(&GUEST_MODULES)? {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.content);
    }
    archive.file("init", 0o755, GUEST_INIT.as_bytes());
    Ok(archive.finish())
}

/// The part of the emulated host that changes with the kernel only.
pub fn host(kernel: &Kernel, with_qemu: bool) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    busybox(&mut archive)?;
    for dir in ["proc", "sys", "dev", "tmp", "run"] {
        archive.dir(dir);
    }
    archive.char_device("dev/console", 5, 1);
    let mut order = String::new();
    for module in kernel.modules(&HOST_MODULES)? {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.content);
        order.push_str(&format!("{}.ko\n", module.name));
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.file("guest/bzImage", 0o644, &read(&kernel.bzimage)?);
    archive.file("guest/vmlinux", 0o644, &read(&kernel.vmlinux)?);
    archive.file("guest/base.cpio", 0o644, &guest(kernel)?);
    archive.file("etc/passwd", 0o644, USERS.as_bytes());
    // The agent, by another name.
    archive.symlink("bin/vsock-peer", "../init");
    let passt = Path::new("/usr/bin/passt");
    with_libraries(&mut archive, passt, &inside(passt))?;
    // A release of Debian has one of the two.
    let daemons = setup::VIRTIOFSD.map(Path::new).into_iter();
    for daemon in daemons.filter(|path| path.exists()) {
        with_libraries(&mut archive, daemon, &inside(daemon))?;
    }
    if with_qemu {
        qemu(&mut archive)?;
    }
    Ok(archive.finish())
}

fn busybox(archive: &mut Archive) -> Result<()> {
    archive.file("bin/busybox", 0o755, &read(Path::new(BUSYBOX))?);
    let applets = process::output(Command::new(BUSYBOX).arg("--list"))?;
    for applet in String::from_utf8_lossy(&applets)
        .split_whitespace()
        .filter(|a| *a != "busybox")
    {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    // What is dynamically linked would not run: the packages busybox and busybox-static share the path.
    let kind = process::output(Command::new("ldd").arg(BUSYBOX));
    ensure!(
        kind.is_err(),
        "{BUSYBOX} is not static; run: apt-get install busybox-static"
    );
    Ok(())
}

/// QEMU with its libraries and its firmware, at the paths where Debian has them.
fn qemu(archive: &mut Archive) -> Result<()> {
    let program = Path::new("/usr/bin/qemu-system-x86_64");
    with_libraries(archive, program, &inside(program))?;
    for name in QEMU_DATA {
        let path = Path::new("/usr/share").join(name);
        // A release of Debian has each of these at one of two places.
        if path.exists() {
            archive.file(&inside(&path), 0o644, &read(&path)?);
        }
    }
    Ok(())
}

/// A program at `place`, and its libraries where Debian has them.
pub fn with_libraries(archive: &mut Archive, program: &Path, place: &str) -> Result<()> {
    archive.file(place, 0o755, &read(program)?);
    for library in libraries(program)? {
        archive.file(&inside(&library), 0o755, &read(&library)?);
    }
    Ok(())
}

/// The files that `ldd` names, the dynamic linker among them.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let text = process::output(Command::new("ldd").arg(program))?;
    let mut found = BTreeSet::new();
    for line in String::from_utf8_lossy(&text).lines() {
        if let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) {
            found.insert(PathBuf::from(path));
        }
    }
    Ok(found)
}

fn inside(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
