//! The same program inside a guest, as `witness`: keeps every CPU busy with I/O, and says whether anything of it, or the
//! clock, was ever wrong. What a guest would notice of being paused, it notices.
//!
//! `witness DISK CPUS`: on each of so many CPUs a thread goes round and round until a line comes on stdin:
//!
//! * It reads the first half of DISK past the page cache, and compares it with what was there at first. It writes a place
//!   of its own in the second half, and reads it back. (O_DIRECT: each of these is a request to the device.)
//! * It does accesses whose answers are known, of every class: CPU 0 the UART's scratch register, written and read back;
//!   CPU 1 CONFIG_ADDRESS at 0xcf8, four bytes; CPU 2 the PM timer, a published word, which has to have gone on by what the
//!   clock has; the others the RTC, through the kernel's driver, which may not go back.
//! * Between any two of these the clock is read, and compared with the latest that any CPU has read.
//! * It says a line on the console.
//!
//! At the end: how many rounds each had, how far the clock went, and by how much more than the PM timer, which is the machine's
//! own time, to the microsecond. What is wrong is a line that begins with "complaint:".

use std::arch::asm;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::port_meter::stay_on;

/// How much of the disk is read at once; a block device wants a multiple of 512.
const PIECE: usize = 32 << 10;
/// Accesses to ports a round.
const ACCESSES: u32 = 20;
const SCRATCH: u16 = 0x3ff;
const CONFIG_ADDRESS: u16 = 0xcf8;
const PM_TIMER: u16 = 0x608;
/// The PM timer's frequency in Hz, and its bits [ACPI 6.5 §4.8.3.3].
const PM_TIMER_HZ: f64 = 3_579_545.0;
const PM_TIMER_MASK: u32 = 0xff_ffff;
/// By so much the PM timer and the kernel's clock may disagree over a round, in seconds: NTP slews neither, but the
/// clock's rate is found by measuring, and the two are not read at once.
const DRIFT: f64 = 0.02;

/// A block as O_DIRECT wants it.
#[repr(align(4096))]
struct Block([u8; PIECE]);

impl Block {
    fn new() -> Box<Block> {
        Box::new(Block([0; PIECE]))
    }
}

/// The latest time that anybody has seen, in nanoseconds.
struct Clock(AtomicI64);

impl Clock {
    /// Now, which is not before what any CPU has seen before this began.
    fn now(&self) -> i64 {
        let latest = self.0.load(Ordering::SeqCst);
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // By the vDSO, which reads the boot processor's page of kvm-clock on every CPU; a system call reads the CPU's own, and
        // sees nothing of one that is late.
        // SAFETY: `time` may be written.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
        let now = time.tv_sec * 1_000_000_000 + time.tv_nsec;
        if now < latest {
            println!("complaint: the clock went back by {} ns", latest - now);
        }
        self.0.fetch_max(now, Ordering::SeqCst);
        now
    }
}

/// What all CPUs share.
struct Common {
    disk: File,
    /// What the first half of it has to be.
    sealed: Vec<u8>,
    clock: Clock,
    over: AtomicBool,
}

pub fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [disk, cpus] = args.as_slice() else {
        bail!("witness DISK CPUS");
    };
    let cpus: usize = cpus.parse().context("CPUS is a number")?;
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(disk)
        .with_context(|| format!("cannot open {disk}"))?;
    let mut sealed = Vec::new();
    let mut block = Block::new();
    // The kernel knows the size of a block device by its end.
    let half = (&disk).seek(SeekFrom::End(0))? as usize / 2;
    ensure!(
        half > 0 && half.is_multiple_of(PIECE) && half / PIECE >= cpus,
        "the disk has the wrong size"
    );
    while sealed.len() < half {
        disk.read_exact_at(&mut block.0, sealed.len() as u64)?;
        sealed.extend_from_slice(&block.0);
    }
    let common = Common {
        disk,
        sealed,
        clock: Clock(AtomicI64::new(0)),
        over: AtomicBool::new(false),
    };
    let (begin, rtc_begin) = (PmTimer::ask(&common)?, rtc_s()?);
    println!("witness: begin");
    thread::scope(|scope| {
        let common = &common;
        let threads: Vec<_> = (0..cpus)
            .map(|cpu| scope.spawn(move || witness(common, cpu)))
            .collect();
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        common.over.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().expect("it does not panic")?;
        }
        anyhow::Ok(())
    })?;
    let end = PmTimer::ask(&common)?;
    println!(
        "witness: clock {:.2} rtc {} ahead {:.0} us",
        (end.at - begin.at) / 1e9,
        rtc_s()? - rtc_begin,
        end.clock_ahead_of(&begin) * 1e6,
    );
    println!("witness: end");
    Ok(())
}

/// What one CPU does.
fn witness(common: &Common, cpu: usize) -> Result<()> {
    stay_on(cpu)?;
    let mut device = Device::of(cpu)?;
    let mut block = Block::new();
    let own = (common.sealed.len() + cpu * PIECE) as u64;
    let mut round = 0_u64;
    while !common.over.load(Ordering::Relaxed) {
        round += 1;
        for (n, expected) in common.sealed.chunks(PIECE).enumerate() {
            common.disk.read_exact_at(&mut block.0, (n * PIECE) as u64)?;
            if block.0 != expected {
                println!("complaint: CPU {cpu} read something else at {}", n * PIECE);
            }
            common.clock.now();
            device.check(common, cpu)?;
        }
        let mark = (round << 8 | cpu as u64).to_le_bytes();
        for bytes in block.0.chunks_mut(mark.len()) {
            bytes.copy_from_slice(&mark);
        }
        common.disk.write_all_at(&block.0, own)?;
        block.0.fill(0);
        common.disk.read_exact_at(&mut block.0, own)?;
        if block.0.chunks(mark.len()).any(|bytes| bytes != mark) {
            println!("complaint: CPU {cpu} did not read what it wrote in round {round}");
        }
        println!("cpu {cpu} round {round}");
    }
    println!("figure: CPU {cpu}: {round} rounds");
    Ok(())
}

/// The PM timer at a moment of the clock.
struct PmTimer {
    ticks: u32,
    /// In nanoseconds.
    at: f64,
}

impl PmTimer {
    /// Looks many times, and takes the look that was over soonest: in its middle the timer was read.
    fn ask(common: &Common) -> Result<PmTimer> {
        allow(PM_TIMER, 4)?;
        let mut best = (i64::MAX, PmTimer { ticks: 0, at: 0.0 });
        for _ in 0..100 {
            let before = common.clock.now();
            // SAFETY: `allow` above; reading it changes nothing.
            let ticks = unsafe { read_pm_timer() };
            let took = common.clock.now() - before;
            if took < best.0 {
                let at = before as f64 + took as f64 / 2.0;
                best = (took, PmTimer { ticks, at });
            }
        }
        Ok(best.1)
    }

    /// By how many seconds the clock has gone further than the timer since then. The timer goes around every 4.7 s, so this is
    /// known only up to that, and is taken to be the least.
    fn clock_ahead_of(&self, then: &PmTimer) -> f64 {
        let around = f64::from(PM_TIMER_MASK + 1) / PM_TIMER_HZ;
        let ticks = self.ticks.wrapping_sub(then.ticks) & PM_TIMER_MASK;
        let ahead = (self.at - then.at) / 1e9 - f64::from(ticks) / PM_TIMER_HZ;
        ahead - (ahead / around).round() * around
    }
}

/// # Safety
/// The port has to be allowed to this thread.
unsafe fn read_pm_timer() -> u32 {
    let read: u32;
    // SAFETY: as above; the register is 4 bytes wide.
    unsafe {
        asm!("in eax, dx", in("dx") PM_TIMER, out("eax") read, options(nomem, nostack, preserves_flags))
    };
    read
}

/// Lets this thread at ports.
fn allow(port: u16, count: u64) -> Result<()> {
    // SAFETY: three numbers. The registers that are asked for here are nobody else's: Linux uses no scratch register, and
    // without a PCI bus no CONFIG_ADDRESS; reading the PM timer changes nothing.
    let done = unsafe { libc::ioperm(port.into(), count, 1) };
    ensure!(
        done == 0,
        "port {port:#x} is not ours to use: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// A register, and what is known of it.
enum Device {
    Scratch,
    ConfigAddress,
    /// Its last value, and between which times it was read, which are far apart if others had the processor meanwhile.
    PmTimer(u32, [i64; 2]),
    /// The last second that it showed.
    Rtc(i64),
}

impl Device {
    fn of(cpu: usize) -> Result<Device> {
        let (device, port, length) = match cpu {
            0 => (Device::Scratch, SCRATCH, 1),
            1 => (Device::ConfigAddress, CONFIG_ADDRESS, 4),
            2 => (Device::PmTimer(0, [i64::MIN; 2]), PM_TIMER, 4),
            _ => return Ok(Device::Rtc(0)),
        };
        allow(port, length)?;
        Ok(device)
    }

    fn check(&mut self, common: &Common, cpu: usize) -> Result<()> {
        match self {
            Device::Scratch => {
                for n in 0..ACCESSES {
                    let (value, read): (u8, u8) = (n as u8 ^ 0x5a, 0);
                    // SAFETY: `allow` above; these two are this thread's.
                    let read = unsafe {
                        asm!("out dx, al", in("dx") SCRATCH, in("al") value, options(nomem, nostack, preserves_flags));
                        let mut read = read;
                        asm!("in al, dx", in("dx") SCRATCH, inout("al") read, options(nomem, nostack, preserves_flags));
                        read
                    };
                    if read != value {
                        println!("complaint: the scratch register has {read:#x}, not {value:#x}");
                    }
                    common.clock.now();
                }
            }
            Device::ConfigAddress => {
                for n in 0..ACCESSES {
                    let value = n << 11 | 0x44;
                    let mut read: u32 = 0;
                    // SAFETY: as above.
                    unsafe {
                        asm!("out dx, eax", in("dx") CONFIG_ADDRESS, in("eax") value, options(nomem, nostack, preserves_flags));
                        asm!("in eax, dx", in("dx") CONFIG_ADDRESS, inout("eax") read, options(nomem, nostack, preserves_flags));
                    }
                    if read != value {
                        println!("complaint: CONFIG_ADDRESS has {read:#x}, not {value:#x}");
                    }
                    common.clock.now();
                }
            }
            Device::PmTimer(last, at) => {
                let before = common.clock.now();
                // SAFETY: as above.
                let read = unsafe { read_pm_timer() };
                let now = common.clock.now();
                if at[0] != i64::MIN {
                    // Within a round, so less than once around.
                    let ticks = read.wrapping_sub(*last) & PM_TIMER_MASK;
                    let timer = f64::from(ticks) / PM_TIMER_HZ;
                    let (least, most) = ((before - at[1]) as f64 / 1e9, (now - at[0]) as f64 / 1e9);
                    let around = f64::from(PM_TIMER_MASK) / PM_TIMER_HZ;
                    if most < around / 2.0 && !(least - DRIFT..=most + DRIFT).contains(&timer) {
                        println!(
                            "complaint: the PM timer went on by {timer:.6} s, the clock by {least:.6} to {most:.6}"
                        );
                    }
                }
                (*last, *at) = (read, [before, now]);
            }
            Device::Rtc(last) => {
                let now = rtc_s()?;
                if now < *last {
                    println!("complaint: CPU {cpu} saw the RTC go back by {} s", *last - now);
                }
                *last = now;
            }
        }
        Ok(())
    }
}

/// What the RTC shows, in seconds from its epoch.
fn rtc_s() -> Result<i64> {
    let path = "/sys/class/rtc/rtc0/since_epoch";
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    Ok(text.trim().parse()?)
}
