//! What a vCPU actor needs of whatever runs the guest: KVM, or a script.

use super::debug::CpuState;
use super::exit::{AccessExit, Exit};
use super::registers::Registers;
use crate::boot::EntryPoint;
use nix::errno::Errno;

/// Why the guest could not be run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RunError {
    /// EINTR: a signal or `immediate_exit`. Look into the mailbox and go on.
    Interrupted,
    /// EAGAIN: an application processor got its INIT or SIPI. Go on.
    Again,
    /// Anything else: the host cannot run this guest.
    Failed(Errno),
}

/// A vCPU cannot be put back to the state after power-on.
#[derive(Debug, thiserror::Error)]
#[error("{what} fails, which a reset needs; the host's kernel log (dmesg) may tell why")]
pub struct ResetError {
    /// The ioctl.
    pub what: &'static str,
    /// Why.
    pub source: kvm_ioctls::Error,
}

/// Runs a guest's processor until it needs something. Used by one thread only, its vCPU's.
pub trait Backend {
    /// Runs the guest until an exit, which [`Backend::exit`] then tells. Whatever the last exit asked for (data of a port or memory read) must have been
    /// filled in.
    ///
    /// # Errors
    /// See [`RunError`].
    fn run(&mut self) -> Result<(), RunError>;

    /// The exit that ended the last run. Apart from [`Backend::run`], so that a discipline that takes a lock when the
    /// guest is left takes it before the exit is looked at.
    fn exit(&mut self) -> Exit;

    /// The same, if it was an access: the short way, for the exits that are to be quick.
    #[inline]
    fn access(&mut self) -> Option<AccessExit> {
        match self.exit() {
            Exit::Pio(pio) => Some(AccessExit::Pio(pio)),
            Exit::Mmio(mmio) => Some(AccessExit::Mmio(mmio)),
            _ => None,
        }
    }

    /// The data of the last exit, which was a port access of `length` bytes in all at `offset`. `None` when that is
    /// not inside the mapping.
    fn pio_data(&mut self, offset: u64, length: usize) -> Option<&mut [u8]>;

    /// Where the answer to the last exit, a memory read, goes.
    fn mmio_data(&mut self) -> &mut [u8; 8];

    /// The byte that makes [`Backend::run`] return at once with [`RunError::Interrupted`] when it is not 0.
    fn immediate_exit(&mut self) -> *mut u8;

    /// The registers, for a report.
    fn registers(&mut self) -> Option<Registers>;

    /// Up to 16 bytes of code from a linear address, for a report.
    fn code_at(&mut self, linear: u64) -> Option<Vec<u8>>;

    /// Whether the guest's halts are the backend's business (in-kernel interrupt controller). If not, a vCPU that
    /// halts sleeps on its mailbox.
    fn wakes_from_halt(&self) -> bool;

    /// The vCPU stands still from now on, for some time: the guest's own watchdogs shall not take that for a lock-up.
    fn paused(&mut self) {}

    /// Guest time goes on after a pause, and other vCPUs will look at this one's clock before it runs.
    fn take_time(&mut self) {}

    /// Back to the state after power-on; with an entry, that of the boot processor of a guest that starts there.
    ///
    /// # Errors
    /// See [`ResetError`].
    fn reset(&mut self, entry: Option<&EntryPoint>) -> Result<(), ResetError>;

    /// The whole state, for a debugger.
    fn cpu_state(&mut self) -> Option<Box<CpuState>> {
        None
    }

    /// Takes a state from a debugger, but for the activity. `false`: it is refused, perhaps with a part of it taken.
    fn set_cpu_state(&mut self, _cpu: &CpuState) -> bool {
        false
    }

    /// How a debugger wants the guest to be stopped; `None`: not at all.
    ///
    /// # Errors
    /// What the host says.
    fn set_debug(&mut self, _debug: Option<&kvm_bindings::kvm_guest_debug>) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }
}
