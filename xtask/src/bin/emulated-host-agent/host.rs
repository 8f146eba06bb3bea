//! What process 1 does for its host: mounts, modules, the VM that is never run, and the end.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use std::{io, ptr, thread};

use anyhow::{Context, Result, bail};

const CLOCKSOURCES: &str = "/sys/devices/system/clocksource/clocksource0/available_clocksource";
/// It tries once a second, and on a busy machine not every try is good enough.
const TSC_LIMIT: Duration = Duration::from_secs(120);
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_CREATE_VM: libc::c_ulong = 0xae01;

pub fn prepare() -> Result<()> {
    leave_rootfs()?;
    mount("proc", "/proc", "proc")?;
    mount("sysfs", "/sys", "sysfs")?;
    mount("devtmpfs", "/dev", "devtmpfs")?;
    for (kind, path) in [
        ("devpts", "/dev/pts"),
        ("tmpfs", "/dev/shm"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
    ] {
        mount(kind, path, kind)?;
    }
    // SAFETY: process 1 has one thread at this point, so nobody reads the environment meanwhile.
    unsafe {
        std::env::set_var("PATH", "/bin:/usr/bin");
        std::env::set_var("HOME", "/");
    }
    Ok(())
}

/// The kernel's first file system cannot be left by pivot_root, which programs do that lock themselves in (passt). So it is
/// mounted over itself, and what is on top can.
fn leave_rootfs() -> Result<()> {
    // SAFETY: C strings that outlive the calls, and no data.
    let done = unsafe {
        libc::mount(
            c"/".as_ptr(),
            c"/run".as_ptr(),
            ptr::null(),
            libc::MS_BIND,
            ptr::null(),
        ) == 0
            && libc::chdir(c"/run".as_ptr()) == 0
            && libc::mount(
                c".".as_ptr(),
                c"/".as_ptr(),
                ptr::null(),
                libc::MS_MOVE,
                ptr::null(),
            ) == 0
            && libc::chroot(c".".as_ptr()) == 0
            && libc::chdir(c"/".as_ptr()) == 0
    };
    if !done {
        bail!("cannot mount / over itself: {}", io::Error::last_os_error());
    }
    Ok(())
}

fn mount(source: &str, target: &str, kind: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("cannot make {target}"))?;
    let (source, path, fstype) = (CString::new(source)?, CString::new(target)?, CString::new(kind)?);
    // SAFETY: three C strings that outlive the call, and no data.
    let result = unsafe { libc::mount(source.as_ptr(), path.as_ptr(), fstype.as_ptr(), 0, ptr::null()) };
    if result != 0 {
        bail!("cannot mount {kind} on {target}: {}", io::Error::last_os_error());
    }
    Ok(())
}

/// Waits until the kernel has measured its TSC for good, some two seconds after its start.
///
/// KVM keeps the rate that it finds when it is loaded, and gives it to each vCPU. Early in the boot that is a first guess,
/// which is off by 0.06 percent now and then; if a vCPU is made after the kernel has found the better rate, KVM takes the
/// old one for a wish to run slower than the processor, refuses ("user requested TSC rate below hardware speed" in the
/// kernel's log), and leaves the vCPU with a TSC whose timers come ever later.
pub fn wait_for_tsc() -> Result<()> {
    let deadline = Instant::now() + TSC_LIMIT;
    // Until then it is `tsc-early`.
    while !fs::read_to_string(CLOCKSOURCES)?
        .split_whitespace()
        .any(|name| name == "tsc")
    {
        if Instant::now() > deadline {
            bail!("the emulated host's kernel has not calibrated its TSC within {TSC_LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Loads what `/modules/order` lists, in that order.
pub fn load_modules() -> Result<()> {
    let order = fs::read_to_string("/modules/order").context("the emulated host has no /modules/order")?;
    for name in order.split_whitespace() {
        let file = File::open(format!("/modules/{name}")).with_context(|| format!("no module {name}"))?;
        // SAFETY: a descriptor that is open, an empty C string, no flags.
        let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if result != 0 {
            bail!(
                "the emulated host cannot load {name}: {}",
                io::Error::last_os_error()
            );
        }
    }
    Ok(())
}

/// An empty VM; KVM stays enabled while its descriptor is open.
pub fn hold_a_vm() -> Result<OwnedFd> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("the emulated host has no /dev/kvm")?;
    // SAFETY: KVM_CREATE_VM takes a number, touches no memory of ours and returns a new descriptor.
    let fd = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
    if fd < 0 {
        bail!(
            "the emulated host cannot create a VM: {}",
            io::Error::last_os_error()
        );
    }
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn describe() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let kvm = File::open("/dev/kvm")?;
    // SAFETY: KVM_GET_API_VERSION touches no memory.
    let version = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) };
    let uptime = fs::read_to_string("/proc/uptime")?;
    let uptime = uptime.split('.').next().unwrap_or("?");
    Ok(format!(
        "Linux {}, KVM API {version}, up in {uptime} s",
        release.trim()
    ))
}

/// The processes of userland, by id. Kernel threads are left out: KVM makes and ends its own.
pub fn user_processes() -> Vec<(i32, String)> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        // pid (comm) state ppid …; comm may contain anything, so the last parenthesis counts.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else {
            continue;
        };
        let mut fields = stat[close + 1..].split_whitespace();
        let (state, parent) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        let name = stat[open + 1..close].to_owned();
        if parent != "2" && pid != 2 && state != "Z" {
            all.push((pid, name));
        }
    }
    all
}

/// Process 1 inherits what others leave behind.
pub fn reap_orphans() {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

pub fn power_off() -> ! {
    // SAFETY: neither call touches memory.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    loop {
        std::thread::park();
    }
}
