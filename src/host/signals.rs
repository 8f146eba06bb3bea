//! Signals: which end the machine, which ask it something, and what a second one does.
//!
//! | signal | what |
//! |---|---|
//! | INT, TERM, HUP, QUIT | the machine ends in order; a second one ends the program at once |
//! | USR1 | what every actor does, into the log |
//! | TSTP, CONT | the terminal is given back and taken again; see [`super::terminal`] |
//! | WINCH | a virtio console is told how large the terminal is now; a serial line has no size |
//! | PIPE | ignored, as Rust's runtime sets it: a reader that is gone is an error of the write |
//! | BUS | see [`super::bus`] |
//!
//! They arrive at the control thread, which waits for nobody; so they are heard whatever is stuck.

use super::terminal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGWINCH};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The signals that end the machine.
const ENDING: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

/// Where signals arrive.
pub type Signals = SignalDelivery<UnixStream, SignalOnly>;

/// One of [`ENDING`] has come.
static ENDS: AtomicBool = AtomicBool::new(false);

/// Starts to collect signals. Before any thread is started that could be killed by one. A hang-up that whoever started
/// us ignores (nohup) stays ignored.
///
/// # Errors
/// What the host says.
pub fn collect() -> std::io::Result<Signals> {
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    let ending = || {
        ENDING
            .into_iter()
            .filter(|signal| *signal != SIGHUP || !is_ignored(SIGHUP))
    };
    let wanted: Vec<i32> = ending().chain([SIGUSR1, SIGWINCH]).collect();
    unblock(&wanted)?;
    // First the pipe, then the second signal's handler: one that comes in between must be heard, not only counted.
    let signals = SignalDelivery::with_pipe(read, write, SignalOnly, &wanted)?;
    ENDS.store(false, Ordering::SeqCst);
    static SECOND: OnceLock<()> = OnceLock::new();
    if SECOND.set(()).is_ok() {
        for signal in ending() {
            // SAFETY: the handler swaps an atomic, and restores the terminal and ends the process by async-signal-safe
            // calls; it takes no lock and allocates nothing.
            unsafe { signal_hook::low_level::register(signal, move || again(signal)) }?;
        }
    }
    Ok(signals)
}

/// For a program that runs machines and is none, such as a bench: all that a machine would take over is left as it is now,
/// for ever.
///
/// # Errors
/// What the host says.
pub fn keep_as_they_are() -> std::io::Result<()> {
    static ONCE: OnceLock<()> = OnceLock::new();
    if ONCE.set(()).is_err() {
        return Ok(());
    }
    let all = || ENDING.into_iter().chain([SIGUSR1, SIGWINCH]);
    let before: Vec<_> = all().map(|signal| (signal, action(signal))).collect();
    // signal-hook installs a handler once in the life of a program.
    drop(collect()?);
    for (signal, action) in before {
        let Some(action) = action else { continue };
        // SAFETY: an action that the system gave, and nothing to write.
        unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    }
    Ok(())
}

/// What a signal does now.
fn action(signal: i32) -> Option<libc::sigaction> {
    // SAFETY: with a null new action this only fills `now`, which is plain data.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(signal, std::ptr::null(), &mut now) == 0).then_some(now)
    }
}

/// Whether a signal ends the machine.
pub fn ends(signal: i32) -> bool {
    ENDING.contains(&signal)
}

/// Whether a signal that ends the machine has come, be it heard or not.
pub fn end_is_wanted() -> bool {
    ENDS.load(Ordering::SeqCst)
}

/// The first ends the machine by way of its actors; whoever sends another has waited long enough.
fn again(signal: i32) {
    if ENDS.swap(true, Ordering::SeqCst) {
        terminal::restore();
        signal_hook::low_level::exit(128 + signal);
    }
}

/// Lets signals through on this thread, and on those that it starts. A program inherits its mask.
///
/// # Errors
/// What the host says.
pub fn unblock(signals: &[i32]) -> std::io::Result<()> {
    // SAFETY: an all-zero set is valid for sigemptyset to overwrite, and each call gets a pointer to it alone.
    let failed = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(std::io::Error::from_raw_os_error(failed))
    }
}

fn is_ignored(signal: i32) -> bool {
    action(signal).is_some_and(|action| action.sa_sigaction == libc::SIG_IGN)
}
