//! How a machine ends, and the exit status that says so.

use super::state::State;
use crate::vcpu::Diagnosis;
use std::fmt;

/// How a machine ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest switched itself off.
    PoweredOff,
    /// The guest gave a status through the debug-exit port.
    GuestExit(u8),
    /// The guest asked to be reset.
    Reset,
    /// The guest's kernel panicked and said so (pvpanic).
    GuestPanic,
    /// A triple fault.
    TripleFault,
    /// Neither the guest nor we could go on. Printed by the machine when it happened.
    InternalError(Box<Diagnosis>),
    /// The machine was to be reset in place and could not be. Why.
    ResetFailed(String),
    /// Whoever controls the machine stopped it, such as a gdb by `kill`.
    Stopped,
    /// The host could not provide guest memory that one of our threads touched. The guest physical address.
    MemoryGone(u64),
    /// The event loop or the control thread panicked: nobody would hear signals or the console any more.
    EventLoopDied,
    /// `--timeout` was over. With the state the machine was in.
    TimedOut(State),
    /// A signal ended it.
    Signal(i32),
    /// Somebody typed Ctrl-A x.
    Quit,
}

/// Exit statuses, for `--help` and the README as well.
pub mod status {
    /// The guest powered itself off.
    pub const POWERED_OFF: u8 = 0;
    /// Bad usage, or an input file that cannot be used.
    pub const BAD_INPUT: u8 = 2;
    /// The guest asked for a reset.
    pub const RESET: u8 = 10;
    /// The guest's kernel panicked, or a triple fault.
    pub const GUEST_PANIC: u8 = 12;
    /// Internal error.
    pub const INTERNAL_ERROR: u8 = 14;
    /// `--timeout` was over.
    pub const TIMED_OUT: u8 = 16;
    /// The host could not provide what the machine needs.
    pub const HOST_TROUBLE: u8 = 18;
    /// Whoever controls the machine stopped it, such as a gdb by `kill`.
    pub const STOPPED: u8 = 20;
    /// Signals: 128 and the signal's number. Ctrl-A x counts as an interrupt.
    pub const SIGNAL: u8 = 128;
    /// The text of the table, for `--help`.
    pub const TABLE: &str = "\
Exit status:
  0        the guest powered itself off
  2        bad usage, a kernel, initrd or command line that cannot be used, or a path
  10       the guest asked for a reset
  12       the guest's kernel panicked (told by pvpanic), or a triple fault
  14       internal error: neither the guest nor actor-vmm could go on
  16       --timeout was over
  18       the host could not provide what the machine needs
  20       stopped by whoever controls the machine (gdb's kill, for one)
  1 to 127, odd
           the guest wrote v to the debug-exit port (0xf4): 2 * v + 1, with v at most 63
  128 + n  ended by signal n: 129 HUP, 130 INT (also Ctrl-A x), 131 QUIT, 143 TERM";
}

impl Outcome {
    /// The program's exit status.
    pub fn status(&self) -> u8 {
        match self {
            Outcome::PoweredOff => status::POWERED_OFF,
            // Odd, so that no status of ours can be meant; as QEMU's isa-debug-exit has it.
            Outcome::GuestExit(value) => (*value).min(63) << 1 | 1,
            Outcome::Reset => status::RESET,
            Outcome::GuestPanic | Outcome::TripleFault => status::GUEST_PANIC,
            Outcome::InternalError(_)
            | Outcome::EventLoopDied
            | Outcome::ResetFailed(_)
            | Outcome::MemoryGone(_) => status::INTERNAL_ERROR,
            Outcome::Stopped => status::STOPPED,
            Outcome::TimedOut(_) => status::TIMED_OUT,
            Outcome::Signal(signal) => status::SIGNAL.wrapping_add(*signal as u8),
            Outcome::Quit => status::SIGNAL + libc::SIGINT as u8,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::PoweredOff => f.write_str("the guest powered off"),
            Outcome::GuestExit(value) => write!(f, "the guest gave exit status {value}"),
            Outcome::Reset => f.write_str("the guest asked for a reset"),
            Outcome::GuestPanic => f.write_str("the guest's kernel panicked"),
            Outcome::TripleFault => f.write_str("the guest ended in a triple fault"),
            Outcome::InternalError(_) => f.write_str("internal error"),
            Outcome::ResetFailed(why) => write!(f, "internal error: the machine cannot be reset: {why}"),
            Outcome::MemoryGone(address) => write!(
                f,
                "internal error: the host could not provide guest memory at guest physical address {address:#x} \
                 (SIGBUS); is it out of memory or huge pages? Try a smaller --memory"
            ),
            Outcome::Stopped => f.write_str("stopped by whoever controls the machine"),
            Outcome::EventLoopDied => f.write_str(
                "internal error: the event loop or the control thread died; this is a bug in actor-vmm, please report it",
            ),
            Outcome::TimedOut(state) => write!(f, "--timeout was over; the machine was {state}"),
            Outcome::Signal(signal) => {
                let name =
                    nix::sys::signal::Signal::try_from(*signal).map_or("a signal", |signal| signal.as_str());
                write!(f, "ended by {name}")
            }
            Outcome::Quit => f.write_str("ended from the console"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_distinct_and_guest_statuses_are_odd() {
        let ours = [
            Outcome::PoweredOff,
            Outcome::Reset,
            Outcome::TripleFault,
            Outcome::TimedOut(State::Running),
            Outcome::Signal(15),
            Outcome::Signal(2),
        ]
        .map(|outcome| outcome.status());
        assert_eq!(ours, [0, 10, 12, 16, 143, 130]);
        assert_eq!(
            [0, 1, 16, 63, 64, 255].map(|v| Outcome::GuestExit(v).status()),
            [1, 3, 33, 127, 127, 127]
        );
    }
}
