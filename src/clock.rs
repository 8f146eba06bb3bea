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
        // 292 years fit into 63 bits of nanoseconds.
        self.origin.elapsed().as_nanos() as u64
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

    /// Stops it. For the machine actor.
    pub fn freeze(&self) {
        self.state.store(FROZEN | self.now().0, Ordering::Relaxed);
    }

    /// Lets it run on from where it stands. For the machine actor.
    pub fn thaw(&self) {
        let state = self.state.load(Ordering::Relaxed);
        if state & FROZEN != 0 {
            self.state
                .store(self.host() - (state & !FROZEN), Ordering::Relaxed);
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
}
