//! What the emulated host is made of: Debian's QEMU, busybox and cloud kernel; and a C++ compiler for libFuzzer.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::{debugger, kernel, process};

#[derive(clap::Args, Default)]
pub struct Args {
    /// Look for a newer kernel package even when one is there
    #[arg(long)]
    pub refresh: bool,
}

/// A file that only the package brings, and the package.
const NEEDED: [(&str, &str); 10] = [
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/share/doc/busybox-static", "busybox-static"),
    ("/usr/bin/qemu-img", "qemu-utils"),
    ("/usr/bin/g++", "g++"),
    ("/usr/bin/lz4", "lz4"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/gdb", "gdb"),
    ("/usr/bin/passt", "passt"),
    ("/sbin/ip", "iproute2"),
    ("/sbin/mke2fs", "e2fsprogs"),
];

/// Where virtiofsd is: a part of QEMU until Debian 12, and a program of its own since.
pub const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];
const VIRTIOFSD_PACKAGES: [&str; 2] = ["qemu-system-common", "virtiofsd"];

const APT_LIMIT: Duration = Duration::from_secs(600);

pub fn run(args: &Args) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "this needs an x86-64 machine");
    let mut missing: Vec<_> = NEEDED
        .iter()
        .filter(|(file, _)| !Path::new(file).exists())
        .map(|(_, p)| *p)
        .collect();
    if !VIRTIOFSD.iter().any(|file| Path::new(file).exists()) {
        let its_own = known(VIRTIOFSD_PACKAGES[1]);
        missing.push(VIRTIOFSD_PACKAGES[usize::from(its_own)]);
    }
    if !missing.is_empty() {
        install(&missing)?;
    }
    let kernel = kernel::ensure(args.refresh)?;
    debugger::ensure()?;
    eprintln!("setup: ready, with Debian's kernel {}", kernel.release);
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "this machine has no apt-get; install what Debian calls {list} by hand"
    );
    // SAFETY: geteuid cannot fail and touches no memory.
    if unsafe { libc::geteuid() } != 0 {
        bail!("some packages are missing; run: sudo apt-get install --no-install-recommends {list}");
    }
    eprintln!("setup: installing {list}");
    if !packages.iter().all(|package| known(package)) {
        update_lists()?;
    }
    if let Err(first) = apt(&["install", "--yes", "--no-install-recommends"], packages) {
        // The lists may be older than the archive.
        update_lists()?;
        apt(&["install", "--yes", "--no-install-recommends"], packages).context(first)?;
    }
    Ok(())
}

/// Whether apt's lists have the package at all; they are empty on a fresh machine.
pub fn known(package: &str) -> bool {
    let found = process::output(Command::new("apt-cache").args(["show", "--no-all-versions", package]));
    found.is_ok_and(|text| !text.is_empty())
}

pub fn update_lists() -> Result<()> {
    // SAFETY: geteuid cannot fail and touches no memory.
    if unsafe { libc::geteuid() } != 0 {
        bail!("apt's package lists are missing or old; run: sudo apt-get update");
    }
    eprintln!("setup: apt-get update");
    apt(&["update"], &[])
}

fn apt(words: &[&str], packages: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.arg("--quiet=2").args(words).args(packages);
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(Stdio::null());
    let status = process::run_limited(&mut command, APT_LIMIT)?;
    ensure!(status.success(), "`{}` failed", process::describe(&command));
    Ok(())
}
