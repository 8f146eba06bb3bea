//! SIGBUS: the host could not provide a page of guest memory that one of our threads has touched (a huge page that is
//! not there, a page that the hardware has lost). The instruction cannot go on, and returning from the handler would run
//! it again; so the thread is stopped for good, and the machine ends as an internal error that names the guest's address.
//!
//! A vCPU's thread is left behind in the handler, and the control thread hears of it. Any other thread (one that loads
//! the guest) has nobody to hear it: there the handler itself says what happened, and ends the program.
//!
//! When it is the guest that touches such a page, KVM_RUN fails with EFAULT instead, which `vcpu/mod.rs` reports.

use super::terminal;
use crate::machine::outcome::status;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Regions of guest memory that are watched at once: two a machine, and a process has one machine but in tests.
const REGIONS: usize = 16;
/// No fault, and no waker.
const NONE: u64 = u64::MAX;

/// A region, as a signal handler can read it. `start` 0: it is free.
struct Region {
    start: AtomicUsize,
    length: AtomicUsize,
    guest: AtomicU64,
    /// The descriptor of an eventfd, or -1.
    waker: AtomicI32,
    /// The guest address that was touched in vain.
    fault: AtomicU64,
}

static WATCHED: [Region; REGIONS] = [const {
    Region {
        start: AtomicUsize::new(0),
        length: AtomicUsize::new(0),
        guest: AtomicU64::new(0),
        waker: AtomicI32::new(-1),
        fault: AtomicU64::new(NONE),
    }
}; REGIONS];

/// While this lives a SIGBUS in this memory is named.
pub struct MemoryWatch(Vec<usize>);

impl MemoryWatch {
    /// Watches guest memory. Beyond so many regions at once those that come last are not: a SIGBUS there kills.
    ///
    /// # Errors
    /// What sigaction says.
    pub fn new(memory: &GuestMemoryMmap) -> std::io::Result<MemoryWatch> {
        install()?;
        let mut watch = MemoryWatch(Vec::new());
        for region in memory.iter() {
            let start = region.as_ptr().addr();
            let free = WATCHED.iter().position(|slot| {
                slot.start
                    .compare_exchange(0, usize::MAX, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            });
            let Some(index) = free else { break };
            let slot = &WATCHED[index];
            slot.length.store(region.len() as usize, Ordering::Relaxed);
            slot.guest
                .store(region.start_addr().raw_value(), Ordering::Relaxed);
            slot.fault.store(NONE, Ordering::Relaxed);
            // Release: a handler that sees the start sees the rest.
            slot.start.store(start, Ordering::Release);
            watch.0.push(index);
        }
        Ok(watch)
    }

    /// Whom to wake when a vCPU's thread is stopped: an eventfd that outlives this.
    pub fn wake(&self, eventfd: i32) {
        for index in &self.0 {
            WATCHED[*index].waker.store(eventfd, Ordering::Release);
        }
    }

    /// The guest physical address that was touched in vain, if one was.
    pub fn fault(&self) -> Option<u64> {
        let faults = self
            .0
            .iter()
            .map(|index| WATCHED[*index].fault.load(Ordering::Acquire));
        faults.filter(|fault| *fault != NONE).min()
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        for index in &self.0 {
            WATCHED[*index].waker.store(-1, Ordering::Relaxed);
            WATCHED[*index].start.store(0, Ordering::Release);
        }
    }
}

/// What SIGBUS did before: Rust's runtime looks for stack overflows there.
static BEFORE_US: OnceLock<SigAction> = OnceLock::new();

/// By sigaction itself: this handler stays inside for good, and signal-hook's registry waits for all handlers to have
/// returned whenever one of any signal is taken away.
fn install() -> nix::Result<()> {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    if INSTALLED.set(()).is_ok() {
        // On the alternate stack, as the one before: that of the thread may be what is missing.
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(on_bus_error), flags, SigSet::empty());
        // SAFETY: the handler reads and writes atomics and makes async-signal-safe calls only (write, pause, _exit,
        // tcsetattr, sigaction, raise); it takes no lock and allocates nothing.
        let before = unsafe { sigaction(Signal::SIGBUS, &action) }?;
        let _ = BEFORE_US.set(before);
    }
    Ok(())
}

extern "C" fn on_bus_error(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: SA_SIGINFO: the kernel passes one that lives as long as the handler.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS fills si_addr where the kernel sends it (si_code above 0); otherwise it is not used.
    let address = unsafe { info.si_addr() }.addr();
    let region = WATCHED.iter().find(|region| {
        let start = region.start.load(Ordering::Acquire);
        start != 0
            && start != usize::MAX
            && (start..start + region.length.load(Ordering::Relaxed)).contains(&address)
    });
    // Somebody's kill, or memory that is not the guest's: as if we were not here.
    let Some(region) = region.filter(|_| info.si_code > 0) else {
        terminal::restore();
        match BEFORE_US.get().filter(|_| info.si_code > 0) {
            // SAFETY: puts back what was there. The access is made again then, and that handler sees it.
            Some(before) => drop(unsafe { sigaction(Signal::SIGBUS, before) }),
            None => drop(signal_hook::low_level::emulate_default_handler(libc::SIGBUS)),
        }
        return;
    };
    let guest =
        region.guest.load(Ordering::Relaxed) + (address - region.start.load(Ordering::Relaxed)) as u64;
    let waker = region.waker.load(Ordering::Acquire);
    if waker < 0 || !crate::vcpu::kick::is_vcpu_thread() {
        tell_and_exit(guest);
    }
    region.fault.store(guest, Ordering::Release);
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes eight bytes of our own; the descriptor is open as long as the watch is (`MemoryWatch::wake`).
    unsafe { libc::write(waker, one.as_ptr().cast(), one.len()) };
    loop {
        // SAFETY: waits for a signal, whose handler returns here.
        unsafe { libc::pause() };
    }
}

/// What a person reads, without the allocator: the address is put into the middle.
const BEFORE: &[u8] =
    b"actor-vmm: internal error: the host could not provide guest memory at guest physical address 0x";
const AFTER: &[u8] = b" (SIGBUS); is it out of memory or huge pages? Try a smaller --memory\n";

fn tell_and_exit(guest: u64) -> ! {
    terminal::restore();
    let mut digits = [0; 16];
    for (place, digit) in digits.iter_mut().rev().enumerate() {
        *digit = b"0123456789abcdef"[(guest >> (4 * place) & 0xf) as usize];
    }
    for part in [BEFORE, &digits, AFTER] {
        // SAFETY: writes bytes of our own.
        unsafe { libc::write(2, part.as_ptr().cast(), part.len()) };
    }
    signal_hook::low_level::exit(status::INTERNAL_ERROR.into());
}
