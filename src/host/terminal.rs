//! The terminal's raw mode, and its end on every way out.
//!
//! Whatever ends the program (a return, an error, a panic, a signal that we handle) goes through [`restore`]. Only
//! SIGKILL cannot be answered.

use nix::sys::termios::{self, SetArg, Termios};
use std::io::IsTerminal;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// How the terminal was before; set once.
static BEFORE: OnceLock<Termios2> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// The C structure, which unlike nix's wrapper (a `RefCell`) can be shared.
struct Termios2(libc::termios);

fn stdin() -> BorrowedFd<'static> {
    // SAFETY: descriptor 0 is never closed by this program.
    unsafe { BorrowedFd::borrow_raw(0) }
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
        let _ = BEFORE.set(Termios2(before.clone().into()));
        let mut raw = before;
        termios::cfmakeraw(&mut raw);
        // Set before the change, so that a panic in between restores.
        RAW.store(true, Ordering::SeqCst);
        if termios::tcsetattr(stdin(), SetArg::TCSANOW, &raw).is_err() {
            RAW.store(false, Ordering::SeqCst);
            return None;
        }
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
