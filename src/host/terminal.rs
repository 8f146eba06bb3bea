//! The terminal's raw mode, and its end on every way out.
//!
//! Whatever ends the program goes through [`restore`]: a return, an error, a panic, a signal that the machine answers,
//! and one that would end or stop the program by default, whose handler restores and then does what the default is.
//! SIGKILL and SIGSTOP cannot be answered; SIGSEGV, SIGILL and SIGFPE, bugs of ours, are not.

use nix::sys::termios::{self, SetArg, Termios};
use std::io::IsTerminal;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// How the terminal was before; set once.
static BEFORE: OnceLock<Settings> = OnceLock::new();
/// How it is while it is raw; set once.
static RAW_SETTINGS: OnceLock<Settings> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// The C structure, which unlike nix's wrapper (a `RefCell`) can be shared.
struct Settings(libc::termios);

fn stdin() -> BorrowedFd<'static> {
    // SAFETY: descriptor 0 is never closed by this program.
    unsafe { BorrowedFd::borrow_raw(0) }
}

/// Columns and rows of the terminal on stdout, or on stdin; 0 and 0 if it does not know. `None`: neither is one.
pub fn size() -> Option<(u16, u16)> {
    [libc::STDOUT_FILENO, libc::STDIN_FILENO]
        .into_iter()
        .find_map(|fd| {
            // SAFETY: all-zero is a valid winsize.
            let mut size: libc::winsize = unsafe { std::mem::zeroed() };
            // SAFETY: TIOCGWINSZ writes a winsize to where it is told, which lives meanwhile.
            let done = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &mut size) };
            (done == 0).then_some((size.ws_col, size.ws_row))
        })
}

/// While this lives the terminal is raw.
pub struct Raw(());

impl Raw {
    /// Makes the terminal on stdin raw: every key goes to the guest, nothing is echoed. `None` if stdin is no
    /// terminal, or not ours (a background job).
    pub fn enter() -> Option<Raw> {
        if !std::io::stdin().is_terminal() {
            return None;
        }
        // A background job that changed the terminal would be stopped (SIGTTOU).
        if nix::unistd::tcgetpgrp(stdin()) != Ok(nix::unistd::getpgrp()) {
            return None;
        }
        let before = termios::tcgetattr(stdin()).ok()?;
        let _ = BEFORE.set(Settings(before.clone().into()));
        let mut raw = before;
        termios::cfmakeraw(&mut raw);
        // Set before the change, so that a panic in between restores.
        RAW.store(true, Ordering::SeqCst);
        if termios::tcsetattr(stdin(), SetArg::TCSANOW, &raw).is_err() {
            RAW.store(false, Ordering::SeqCst);
            return None;
        }
        let _ = RAW_SETTINGS.set(Settings(raw.into()));
        restore_on_default_ends();
        Some(Raw(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether the terminal is raw now: lines for a person then need a carriage return.
pub fn is_raw() -> bool {
    RAW.load(Ordering::Relaxed)
}

/// Back to how the terminal was. Does nothing if it is not raw.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(before) = BEFORE.get()
    {
        let before = Termios::from(before.0);
        let _ = termios::tcsetattr(stdin(), SetArg::TCSANOW, &before);
    }
}

/// Signals that end a program by default, but for those that the machine answers and those that cannot be answered.
/// The kick has SIGRTMIN and SIGSTKFLT, and SIGXFSZ is ignored.
const ENDS: [i32; 10] = [
    libc::SIGABRT,
    libc::SIGALRM,
    libc::SIGIO,
    libc::SIGPROF,
    libc::SIGPWR,
    libc::SIGSYS,
    libc::SIGTRAP,
    libc::SIGUSR2,
    libc::SIGVTALRM,
    libc::SIGXCPU,
];

fn restore_on_default_ends() {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::SeqCst) {
        return;
    }
    let real_time = libc::SIGRTMIN() + 1..=libc::SIGRTMAX();
    for signal in ENDS.into_iter().chain([libc::SIGTSTP]).chain(real_time) {
        // SAFETY: the handler calls tcsetattr and what emulates the default action, both async-signal-safe, and reads
        // cells that were set before; it takes no lock and allocates nothing. A signal that cannot be answered stays
        // as it is.
        let _ = unsafe { signal_hook::low_level::register(signal, move || default_end(signal)) };
    }
    // SAFETY: as above: an atomic, a cell that was set before, and two async-signal-safe calls.
    let _ = unsafe { signal_hook::low_level::register(libc::SIGCONT, take_again) };
}

/// Continued after a SIGSTOP, which nobody can answer: a shell has its own settings on the terminal by now. After a
/// SIGTSTP the handler of that does this, since the terminal was given back.
fn take_again() {
    if is_raw()
        && nix::unistd::tcgetpgrp(stdin()) == Ok(nix::unistd::getpgrp())
        && let Some(raw) = RAW_SETTINGS.get()
    {
        let _ = termios::tcsetattr(stdin(), SetArg::TCSANOW, &Termios::from(raw.0));
    }
}

/// What the signal does by default. Not by signal-hook's emulation, which does not know all of [`ENDS`] and no real-time
/// signal.
fn die_of(signal: i32) {
    // SAFETY: two async-signal-safe calls. The signal is blocked while its handler runs, so it takes effect below.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
    let _ = super::signals::unblock(&[signal]);
}

fn default_end(signal: i32) {
    let was_raw = is_raw();
    restore();
    if signal == libc::SIGTSTP {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    } else {
        die_of(signal);
    }
    // Stopped, and continued. A shell that continued us in the background would stop us again (SIGTTOU): it gave us
    // the terminal if it brought us back to the foreground, and only then is it ours to change.
    if was_raw
        && nix::unistd::tcgetpgrp(stdin()) == Ok(nix::unistd::getpgrp())
        && let Some(raw) = RAW_SETTINGS.get()
    {
        RAW.store(true, Ordering::SeqCst);
        let _ = termios::tcsetattr(stdin(), SetArg::TCSANOW, &Termios::from(raw.0));
    }
}
