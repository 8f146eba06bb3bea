//! The same program inside a guest, as `port-meter`: how long accesses to a fast port take while another processor is on a
//! slow one.
//!
//! `port-meter FAST SLOW MS`: the first CPU reads port FAST all the time. Three things are compared, in turns of half a
//! second, each turn as often as the others:
//!
//! | name | the second CPU meanwhile |
//! |---|---|
//! | `alone` | has nothing to do |
//! | `sleeper` | sleeps for MS, reads FAST, and again: as busy as with the slow port, with no slow port |
//! | `slow` | reads SLOW, whose handler takes MS, again and again |
//!
//! Everything is measured here, in the guest: a line of figures for each, and at the end whether the slow port held FAST up.
//! It did if the first CPU spent most of its time in accesses that took half of MS or longer, and did not when alone. (Their
//! number says less: a lock that is not fair lets one access wait for many of the slow ones.) The port instructions are executed in user mode (`ioperm`;
//! Debian's cloud kernel has no /dev/port), so that an access is an exit and little else.

use std::arch::asm;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::figures::Spread;

/// How long each turn is, and how many each has.
const TURN: Duration = Duration::from_millis(500);
const ROUNDS: usize = 4;
/// So many accesses to the slow port there must have been, or nothing was shown.
const LEAST_SLOW: u32 = 50;

#[derive(Clone, Copy, PartialEq)]
enum Other {
    Idle,
    Sleeper,
    Slow,
}

pub fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [fast, slow, ms] = args.as_slice() else {
        bail!("port-meter FAST SLOW MS");
    };
    let (fast, slow) = (Port::parse(fast)?, Port::parse(slow)?);
    let ms = Duration::from_millis(ms.parse().context("MS is a number of milliseconds")?);
    stay_on(0)?;
    fast.permit()?;
    let parts = [
        ("alone", Other::Idle),
        ("sleeper", Other::Sleeper),
        ("slow", Other::Slow),
    ];
    // A guest that has just booted has things to do in the background.
    turn(Other::Idle, fast, slow, ms, &mut Vec::new())?;
    let mut times = [const { Vec::new() }; 3];
    let mut slow_accesses = 0;
    for _ in 0..ROUNDS {
        for ((_, other), times) in parts.iter().zip(&mut times) {
            slow_accesses += turn(*other, fast, slow, ms, times)?;
        }
    }
    let limit = ms.as_nanos() as u64 / 2;
    let mut waited = [0.0; 3];
    for (((name, _), times), waited) in parts.iter().zip(&mut times).zip(&mut waited) {
        println!("figure: {}", Spread::of(name, times));
        let long: u64 = times.iter().filter(|&&nanos| nanos >= limit).sum();
        *waited = long as f64 / times.iter().sum::<u64>() as f64;
    }
    ensure!(
        slow_accesses >= LEAST_SLOW,
        "only {slow_accesses} accesses to the slow port"
    );
    let [alone, _, slow] = waited;
    // On a busy machine some of the time is lost in any case; half of what is left is the border.
    let verdict = if slow >= (1.0 + alone) / 2.0 {
        "held up"
    } else {
        "not held up"
    };
    println!(
        "figure: {:.0} % of the time held up, alone {:.0} %; {slow_accesses} slow accesses",
        slow * 100.0,
        alone * 100.0
    );
    println!("fact: the fast device is {verdict}");
    Ok(())
}

/// Adds what one turn gave, in nanoseconds; returns how often the slow port was read.
fn turn(other: Other, fast: Port, slow: Port, ms: Duration, times: &mut Vec<u64>) -> Result<u32> {
    let (begun, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let count = Arc::new(AtomicU32::new(0));
    let second = (other != Other::Idle).then(|| {
        let (begun, over, count) = (begun.clone(), over.clone(), count.clone());
        thread::spawn(move || -> Result<()> {
            stay_on(1)?;
            fast.permit()?;
            slow.permit()?;
            begun.store(true, Ordering::Relaxed);
            while !over.load(Ordering::Relaxed) {
                if other == Other::Slow {
                    slow.read();
                    count.fetch_add(1, Ordering::Relaxed);
                } else {
                    thread::sleep(ms);
                    fast.read();
                }
            }
            Ok(())
        })
    });
    while second.as_ref().is_some_and(|thread| !thread.is_finished()) && !begun.load(Ordering::Relaxed) {
        thread::yield_now();
    }
    let begin = Instant::now();
    let mut last = begin;
    while last.duration_since(begin) < TURN {
        let start = Instant::now();
        fast.read();
        last = Instant::now();
        times.push(last.duration_since(start).as_nanos() as u64);
    }
    over.store(true, Ordering::Relaxed);
    if let Some(second) = second {
        second.join().expect("it does not panic")?;
    }
    Ok(count.load(Ordering::Relaxed))
}

#[derive(Clone, Copy)]
struct Port(u16);

impl Port {
    fn parse(text: &str) -> Result<Port> {
        let digits = text.trim_start_matches("0x");
        let number = u16::from_str_radix(digits, 16).with_context(|| format!("{text} is not a port"))?;
        Ok(Port(number))
    }

    /// Lets this thread use it.
    fn permit(self) -> Result<()> {
        // SAFETY: three numbers; reading this port disturbs nothing but the device that is measured.
        let done = unsafe { libc::ioperm(self.0.into(), 1, 1) };
        ensure!(
            done == 0,
            "port {:#x} is not ours to use: {}",
            self.0,
            std::io::Error::last_os_error()
        );
        Ok(())
    }

    fn read(self) {
        // SAFETY: a byte out of a port that this thread may use (`permit`; a signal ends the program otherwise).
        unsafe { asm!("in al, dx", in("dx") self.0, out("al") _, options(nomem, nostack, preserves_flags)) }
    }
}

/// Binds this thread to a CPU.
pub fn stay_on(cpu: usize) -> Result<()> {
    // SAFETY: all zeroes is an empty set; CPU_SET writes inside it, as the number is below 1024; the call reads it.
    let done = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, mem::size_of_val(&set), &set)
    };
    ensure!(
        done == 0,
        "cannot stay on CPU {cpu}: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}
