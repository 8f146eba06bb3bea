//! Rate limits: bytes and operations a second, for any queue's handler.
//!
//! A limit is a token bucket in the form of one word, the *due time* [ITU-T I.371, the generic cell rate algorithm]: when
//! everything that was done so far would be paid for at the allowed rate. Work may begin while that time is at most
//! [`BURST`] ahead of now, and what was done moves it by its price. So a request is never cut in pieces and always gets
//! through; a large one is paid for by those behind it. All queues of a device share their words, without a lock: a
//! read-modify-write each, which stands for itself, so `Relaxed`. Queues that begin at the same moment may exceed the
//! burst by a request each.
//!
//! A queue that has to wait sleeps on a timer and its bell, so a reset does not wait for it. What waits meanwhile is in
//! the driver's queue, or on the host's side.
//!
//! What a hostile guest can try: nothing that is not paid for. A request that is not served is free.

use super::queue::{Handler, Interruption, Request};
use nix::poll::PollFlags;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// So much of a second's allowance may be used at once, after a time without work.
pub const BURST: Duration = Duration::from_millis(100);
/// The longest that a queue sleeps for a limit before it looks again.
const MOST_SLEEP: Duration = Duration::from_secs(60);
const NS: u128 = 1_000_000_000;

/// What the user allows; `None`: anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Allowance {
    /// Bytes a second, at least 1.
    pub bytes: Option<u64>,
    /// Operations a second, at least 1: requests of a disk, frames of a network.
    pub operations: Option<u64>,
}

impl Allowance {
    /// There is a limit.
    pub fn is_limited(&self) -> bool {
        self.bytes.is_some() || self.operations.is_some()
    }
}

/// One bucket. Times are nanoseconds since some begin.
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    due: AtomicU64,
}

impl Bucket {
    fn new(per_second: u64) -> Bucket {
        Bucket {
            per_second: per_second.max(1),
            due: AtomicU64::new(0),
        }
    }

    /// How long to wait before anything may begin.
    fn wait(&self, now: u64) -> Duration {
        let allowed = now.saturating_add(BURST.as_nanos() as u64);
        Duration::from_nanos(self.due.load(Ordering::Relaxed).saturating_sub(allowed))
    }

    /// So much was done.
    fn pay(&self, amount: u64, now: u64) {
        let price = u128::from(amount) * NS / u128::from(self.per_second);
        let price = u64::try_from(price).unwrap_or(u64::MAX);
        // Never fails: the closure always gives a value.
        let _ = self
            .due
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |due| {
                Some(due.max(now).saturating_add(price))
            });
    }
}

/// The limits that a device's queues in one direction share.
#[derive(Debug)]
pub struct Limits {
    begin: Instant,
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limits {
    /// `None`: there are none.
    pub fn new(allowance: Allowance) -> Option<Arc<Limits>> {
        let limits = Limits {
            begin: Instant::now(),
            bytes: allowance.bytes.map(Bucket::new),
            operations: allowance.operations.map(Bucket::new),
        };
        allowance.is_limited().then(|| Arc::new(limits))
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        self.bytes.iter().chain(&self.operations)
    }

    fn wait(&self, now: u64) -> Duration {
        self.buckets()
            .map(|bucket| bucket.wait(now))
            .max()
            .unwrap_or_default()
    }

    fn pay(&self, bytes: u64, now: u64) {
        if let Some(bucket) = &self.bytes {
            bucket.pay(bytes, now);
        }
        if let Some(bucket) = &self.operations {
            bucket.pay(1, now);
        }
    }
}

/// A handler whose work has a price.
pub struct Limited<H> {
    inner: H,
    limits: Arc<Limits>,
    /// Bytes of a request that are no data: headers and status.
    overhead: u64,
    timer: TimerFd,
    waiting: bool,
}

impl<H: Handler + 'static> Limited<H> {
    /// Puts limits around a handler, if there are any.
    ///
    /// # Errors
    /// When the host gives no timer.
    pub fn around(inner: H, limits: &Option<Arc<Limits>>, overhead: u64) -> io::Result<Box<dyn Handler>> {
        let Some(limits) = limits.clone() else {
            return Ok(Box::new(inner));
        };
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Box::new(Limited {
            inner,
            limits,
            overhead,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            waiting: false,
        }))
    }
}

impl<H: Handler> Handler for Limited<H> {
    fn start(&mut self, features: u64, life: u32) {
        self.inner.start(features, life);
    }

    fn stopped(&mut self) {
        self.inner.stopped();
    }

    fn prepare(&mut self) -> bool {
        self.waiting = false;
        if !self.inner.prepare() {
            return false;
        }
        let wait = self.limits.wait(self.limits.now());
        if wait.is_zero() {
            return true;
        }
        let later = Expiration::OneShot(TimeSpec::from(wait.min(MOST_SLEEP)));
        // Without a timer there is no limit: better than a queue that never wakes.
        self.waiting = self.timer.set(later, TimerSetTimeFlags::empty()).is_ok();
        !self.waiting
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        if self.waiting {
            Some((self.timer.as_fd(), PollFlags::POLLIN))
        } else {
            self.inner.waits_for()
        }
    }

    fn watches(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.inner.watches()
    }

    fn noticed(&mut self) {
        self.inner.noticed();
    }

    fn room(&self) -> u64 {
        self.inner.room()
    }

    fn reconfigured(&mut self) -> bool {
        self.inner.reconfigured()
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let given = request.readable_bytes();
        let used = self.inner.serve(request)?;
        let bytes = (given + u64::from(used)).saturating_sub(self.overhead);
        let bytes = bytes.saturating_add(self.inner.beside());
        self.limits.pay(bytes, self.limits.now());
        Ok(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::rng::Rng;
    use crate::virtio::testing::{Outcome, Rig, W};
    use proptest::prelude::*;
    use std::io::Read;

    const SECOND: u64 = 1_000_000_000;

    fn limits(bytes: Option<u64>, operations: Option<u64>) -> Arc<Limits> {
        Limits::new(Allowance { bytes, operations }).unwrap()
    }

    #[test]
    fn a_burst_is_free_and_what_is_beyond_is_waited_for() {
        let limits = limits(Some(1000), None);
        assert_eq!(limits.wait(0), Duration::ZERO);
        limits.pay(100, 0);
        assert_eq!(limits.wait(0), Duration::ZERO, "100 ms worth of it");
        limits.pay(500, 0);
        assert_eq!(limits.wait(0), Duration::from_millis(500));
        assert_eq!(limits.wait(SECOND / 4), Duration::from_millis(250));
        assert_eq!(limits.wait(SECOND / 2), Duration::ZERO);
        // A time without work is not saved up.
        limits.pay(1000, 100 * SECOND);
        assert_eq!(limits.wait(100 * SECOND), Duration::from_millis(900));
    }

    #[test]
    fn the_stricter_limit_counts() {
        let limits = limits(Some(1_000_000), Some(10));
        limits.pay(1, 0);
        assert_eq!(limits.wait(0), Duration::ZERO);
        limits.pay(1, 0);
        assert_eq!(limits.wait(0), Duration::from_millis(100));
        limits.pay(10_000_000, 0);
        assert_eq!(limits.wait(0), Duration::from_nanos(9_900_002_000));
    }

    #[test]
    fn no_numbers_overflow() {
        let limits = limits(Some(1), Some(u64::MAX));
        limits.pay(u64::MAX, u64::MAX);
        limits.pay(u64::MAX, 0);
        assert!(limits.wait(0) > Duration::from_secs(1 << 33));
        assert_eq!(limits.wait(u64::MAX), Duration::ZERO);
        assert!(Limits::new(Allowance::default()).is_none());
    }

    proptest! {
        /// Whatever the requests: what is done in a time is at most its allowance, a burst and one request.
        #[test]
        fn no_more_than_is_allowed(
            rate in 1..1_000_000u64,
            requests in prop::collection::vec((1..200_000u64, 0..SECOND / 10), 1..200),
        ) {
            let limits = limits(Some(rate), None);
            let (mut now, mut done, mut largest) = (0u64, 0u128, 0u64);
            for (bytes, pause) in requests {
                now += pause + limits.wait(now + pause).as_nanos() as u64;
                prop_assert_eq!(limits.wait(now), Duration::ZERO);
                // A price is rounded down to a nanosecond.
                let allowed = (u128::from(now) + BURST.as_nanos() + 200) * u128::from(rate) / NS;
                prop_assert!(done <= allowed + u128::from(largest) + 200, "{done} {allowed}");
                limits.pay(bytes, now);
                done += u128::from(bytes);
                largest = largest.max(bytes);
            }
        }
    }

    struct Zeroes;

    impl Read for Zeroes {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            bytes.fill(0);
            Ok(bytes.len())
        }
    }

    #[test]
    fn a_limited_queue_takes_its_time_and_a_reset_does_not() {
        let begin = Instant::now();
        // 64 KiB a second and a burst of 6.4 KiB: the second request of 4 KiB begins at once, each later one waits.
        let limits = Some(limits(Some(64 << 10), None));
        let handler = Limited::around(Rng::from_source(Zeroes), &limits, 0).unwrap();
        let mut rig = Rig::new(handler);
        for _ in 0..10 {
            assert_eq!(rig.request(&[W(0x5000, 4096)]), Outcome::Used(4096));
        }
        // The last began when what was before it was paid for, but for the burst.
        let least = Duration::from_secs_f64(9.0 * 4096.0 / 65536.0) - BURST;
        assert!(begin.elapsed() >= least, "{:?}", begin.elapsed());
        // A minute's worth, and then a driver that does not want to wait.
        let minute = Some(super::tests::limits(Some(1), None));
        let mut rig = Rig::new(Limited::around(Rng::from_source(Zeroes), &minute, 0).unwrap());
        assert_eq!(rig.request(&[W(0x5000, 60)]), Outcome::Used(60));
        rig.provide(&[W(0x5000, 1)]);
        let before = Instant::now();
        rig.start();
        drop(rig);
        assert!(
            before.elapsed() < Duration::from_secs(50),
            "it waited for the limit"
        );
    }

    #[test]
    fn what_is_not_limited_has_nothing_around() {
        let mut rig = Rig::new(Limited::around(Rng::from_source(Zeroes), &None, 0).unwrap());
        assert_eq!(rig.request(&[W(0x5000, 4096)]), Outcome::Used(4096));
    }
}
