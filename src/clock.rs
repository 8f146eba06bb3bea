//! Guest time: what devices see of the passing of time. It stands still while the machine is paused.
//!
//! One word says it all, so a reader can never see half of a change: either `running`, with what to subtract from
//! the host's monotonic clock, or `frozen`, with the time at which it stands. The machine actor alone writes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Nanoseconds of guest time since the machine was created; does not advance while the machine is paused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Nanos(pub u64);

const FROZEN: u64 = 1 << 63;

/// A clock that many may read and one sets.
#[derive(Clone)]
pub struct Clock {
    origin: Instant,
    /// Running: nanoseconds to subtract. Frozen: `FROZEN` and the time.
    state: Arc<AtomicU64>,
}

impl Default for Clock {
    fn default() -> Self {
        Clock::new()
    }
}

impl Clock {
    /// A clock that starts at 0 and runs.
    pub fn new() -> Clock {
        Clock {
            origin: Instant::now(),
            state: Arc::new(AtomicU64::new(0)),
        }
    }

    /// A clock that stands at a time.
    pub fn frozen_at(now: Nanos) -> Clock {
        Clock {
            origin: Instant::now(),
            state: Arc::new(AtomicU64::new(FROZEN | now.0)),
        }
    }

    fn host(&self) -> u64 {
        self.host_at(Instant::now())
    }

    fn host_at(&self, at: Instant) -> u64 {
        // 292 years fit into 63 bits of nanoseconds.
        at.saturating_duration_since(self.origin).as_nanos() as u64
    }

    /// Guest time now.
    #[inline]
    pub fn now(&self) -> Nanos {
        // Relaxed: the word stands for itself, and whoever pauses the machine waits for its readers anyway.
        let state = self.state.load(Ordering::Relaxed);
        if state & FROZEN != 0 {
            Nanos(state & !FROZEN)
        } else {
            Nanos(self.host().saturating_sub(state))
        }
    }

    /// Whether it stands.
    pub fn is_frozen(&self) -> bool {
        self.state.load(Ordering::Relaxed) & FROZEN != 0
    }

    /// Stops it now. For the machine actor.
    pub fn freeze(&self) {
        self.freeze_at(Instant::now());
    }

    /// Stops it at a moment that has just been, so that it stops together with another clock.
    pub fn freeze_at(&self, at: Instant) {
        let state = self.state.load(Ordering::Relaxed);
        if state & FROZEN == 0 {
            let stands = self.host_at(at).saturating_sub(state);
            self.state.store(FROZEN | stands, Ordering::Relaxed);
        }
    }

    /// Lets it run on from where it stands. For the machine actor.
    pub fn thaw(&self) {
        self.thaw_at(Instant::now());
    }

    /// Lets it run on as from a moment that has just been.
    pub fn thaw_at(&self, at: Instant) {
        let state = self.state.load(Ordering::Relaxed);
        if state & FROZEN != 0 {
            let behind = self.host_at(at).saturating_sub(state & !FROZEN);
            self.state.store(behind, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stands_while_frozen_and_goes_on_from_there() {
        let clock = Clock::new();
        let before = clock.now();
        clock.freeze();
        let frozen = clock.now();
        assert!(frozen >= before);
        std::thread::yield_now();
        assert_eq!(clock.now(), frozen);
        clock.freeze();
        assert_eq!(clock.now(), frozen);
        clock.thaw();
        clock.thaw();
        let after = clock.now();
        assert!(
            after >= frozen && after.0 - frozen.0 < 1_000_000_000,
            "{frozen:?} {after:?}"
        );
    }

    #[test]
    fn it_stops_and_goes_on_at_the_moments_that_another_clock_did() {
        let clock = Clock::new();
        let after_ms = |ms| clock.origin + std::time::Duration::from_millis(ms);
        clock.freeze_at(after_ms(5000));
        assert_eq!(clock.now(), Nanos(5_000_000_000));
        // As if it had stood from 5 s to 7 s.
        clock.thaw_at(after_ms(7000));
        clock.freeze_at(after_ms(8000));
        assert_eq!(clock.now(), Nanos(6_000_000_000));
    }
}
