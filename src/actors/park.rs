//! Sleep until a 32-bit word changes, without a lost wake-up; and how long to spin before.
//!
//! The futex compares the word under the kernel's own lock before it sleeps, so a change made before the wake is
//! never missed: either the sleeper sees the new value and does not sleep, or the waker finds it asleep.

use super::sync::{AtomicU32, Ordering, spin_loop};
use std::time::{Duration, Instant};

/// A word to wait on.
pub(crate) struct Futex {
    word: AtomicU32,
    #[cfg(loom)]
    kernel: (loom::sync::Mutex<()>, loom::sync::Condvar),
}

impl Futex {
    pub(crate) fn new(value: u32) -> Futex {
        Futex {
            word: AtomicU32::new(value),
            #[cfg(loom)]
            kernel: (loom::sync::Mutex::new(()), loom::sync::Condvar::new()),
        }
    }

    #[inline]
    pub(crate) fn load(&self, order: Ordering) -> u32 {
        self.word.load(order)
    }

    #[inline]
    pub(crate) fn store(&self, value: u32, order: Ordering) {
        self.word.store(value, order);
    }

    #[inline]
    pub(crate) fn swap(&self, value: u32, order: Ordering) -> u32 {
        self.word.swap(value, order)
    }

    #[inline]
    pub(crate) fn compare_exchange(
        &self,
        old: u32,
        new: u32,
        ok: Ordering,
        err: Ordering,
    ) -> Result<u32, u32> {
        self.word.compare_exchange(old, new, ok, err)
    }

    /// The word's first byte in memory (on x86 its lowest), for a signal handler to set.
    #[cfg(not(loom))]
    pub(crate) fn as_byte_ptr(&self) -> *mut u8 {
        self.word.as_ptr().cast()
    }

    #[cfg(loom)]
    pub(crate) fn as_byte_ptr(&self) -> *mut u8 {
        unreachable!("models deliver signals by other means")
    }

    /// Sleeps unless the word differs from `value`. May return for no reason; the caller looks again.
    #[cfg(not(loom))]
    pub(crate) fn wait(&self, value: u32) {
        if crate::simulation::waited(|| self.word.load(Ordering::Relaxed) != value) {
            return;
        }
        // SAFETY: FUTEX_WAIT reads one aligned 32-bit word, which `&self` keeps alive, and a null timeout means
        // "none". A failure (EAGAIN, EINTR) means only that the caller must look again, which it does anyway.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                value,
                std::ptr::null::<libc::timespec>(),
            );
        }
    }

    /// Wakes whoever sleeps on the word. To be called after the word was changed.
    #[cfg(not(loom))]
    pub(crate) fn wake(&self) {
        // SAFETY: FUTEX_WAKE uses the address as a key only and does not touch the memory behind it.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                1,
            );
        }
    }

    /// The kernel's futex in loom's terms: compare and sleep are one step for the waker.
    #[cfg(loom)]
    pub(crate) fn wait(&self, value: u32) {
        let guard = self.kernel.0.lock().unwrap();
        if self.word.load(Ordering::SeqCst) == value {
            drop(self.kernel.1.wait(guard).unwrap());
        }
    }

    #[cfg(loom)]
    pub(crate) fn wake(&self) {
        let _guard = self.kernel.0.lock().unwrap();
        self.kernel.1.notify_all();
    }
}

/// How many times to look before doing something else. A look costs a `pause` (about 40 to 140 cycles on current
/// machines), so this is a few microseconds: what a turn takes, and less than a sleep and a wake-up. On a machine
/// with one processor nobody else can make progress while we look, so there it is 0.
fn spin_limit() -> u32 {
    static LIMIT: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *LIMIT.get_or_init(|| match std::thread::available_parallelism() {
        Ok(n) if n.get() > 1 => 200,
        _ => 0,
    })
}

#[cfg(loom)]
thread_local! {
    /// How often the threads of a model look (they are coroutines on one thread). Each look is a switch to another
    /// thread, which hides more than it shows: without any, threads are still held up at every step.
    pub(super) static LOOKS: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// How often to let others run before going to sleep. Whoever waits for longer than a spin most likely waits for a
/// thread that has no processor, since there are more threads than processors. A yield gives it ours, and nobody has to
/// be woken afterwards, which would cost more and keep others from running.
#[cfg(not(loom))]
const YIELDS: u32 = 16;

/// Looks at `ready` up to so many times, and says how often it had to.
#[inline]
pub(crate) fn look(times: u32, mut ready: impl FnMut() -> bool) -> Option<u32> {
    #[cfg(loom)]
    let times = times.min(LOOKS.get());
    for looks in 0..times {
        if ready() {
            return Some(looks);
        }
        spin_loop();
    }
    ready().then_some(times)
}

/// Looks at `ready` for a few microseconds. `true` as soon as it is.
#[inline]
pub(crate) fn spin_until(ready: impl FnMut() -> bool) -> bool {
    look(spin_limit(), ready).is_some()
}

/// Lets others run for a while, looking at `ready` in between. `true` as soon as it is.
pub(crate) fn yield_until(mut ready: impl FnMut() -> bool) -> bool {
    #[cfg(not(loom))]
    for _ in 0..YIELDS {
        if ready() {
            return true;
        }
        std::thread::yield_now();
    }
    ready()
}

/// How long a thread that has nothing to do looks for work before it sleeps: as long as sleeping would have been in vain,
/// as KVM does before it lets a halted vCPU sleep (halt_poll_ns). Each time that it was woken soon it looks for longer,
/// up to what falling asleep and being woken cost; each time that it was left alone for longer, shorter.
pub(crate) struct Patience {
    limit: Duration,
}

impl Patience {
    /// What it begins with when it grows.
    const LEAST: Duration = Duration::from_micros(10);
    /// What a sleep and a wake-up cost whoever has to be woken and whoever wakes, on a host that is a guest itself.
    const MOST: Duration = Duration::from_micros(50);

    pub(crate) fn new() -> Patience {
        Patience {
            limit: Duration::ZERO,
        }
    }

    /// Looks at `ready` and lets others run in between, until the patience is at its end. `true` as soon as it is.
    /// `since`: when it began to have nothing to do.
    #[cfg(not(loom))]
    pub(crate) fn look(&self, since: Instant, mut ready: impl FnMut() -> bool) -> bool {
        while since.elapsed() < self.limit {
            if ready() {
                return true;
            }
            std::thread::yield_now();
        }
        ready()
    }

    /// A model looks as often as it looks anywhere: not again here.
    #[cfg(loom)]
    pub(crate) fn look(&self, _since: Instant, _ready: impl FnMut() -> bool) -> bool {
        false
    }

    /// It has slept, and had nothing to do for so long.
    pub(crate) fn slept(&mut self, idle: Duration) {
        if idle <= Self::MOST {
            self.limit = (self.limit * 2).clamp(Self::LEAST, Self::MOST);
        } else {
            self.limit /= 2;
            if self.limit < Self::LEAST {
                self.limit = Duration::ZERO;
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_when_sleep_was_in_vain_and_goes_when_it_was_not() {
        let mut patience = Patience::new();
        let us = Duration::from_micros;
        let limits = [3, 3, 3, 3, 3, 51, 51, 51, 51].map(|idle| {
            patience.slept(us(idle));
            patience.limit
        });
        let expected = [10.0, 20.0, 40.0, 50.0, 50.0, 25.0, 12.5, 0.0, 0.0];
        assert_eq!(
            limits,
            expected.map(|limit| Duration::from_secs_f64(limit * 1e-6))
        );
    }

    #[test]
    fn a_patient_look_sees_what_comes_and_ends_if_nothing_does() {
        let mut patience = Patience::new();
        assert!(!patience.look(Instant::now(), || false));
        patience.slept(Duration::ZERO);
        let (start, mut looks) = (Instant::now(), 0);
        assert!(!patience.look(start, || {
            looks += 1;
            false
        }));
        assert!(start.elapsed() >= Patience::LEAST && looks > 0);
        assert!(patience.look(Instant::now(), || true));
    }
}
