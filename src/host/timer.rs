//! Deadlines: devices publish when they want to be called, the event loop sleeps until the earliest.

use super::character::{Waker, wake};
use crate::actors::sync::{AtomicU64, Bug, Ordering, planted};
use crate::devices::Nanos;
use std::sync::Arc;

const NEVER: u64 = u64::MAX;

/// Guest time; `NEVER` if none. The word stands for itself: nobody reads anything else because of what is in it. Each
/// change is a read-modify-write, so whoever makes one knows what was there; and that a sleeping loop sees an earlier
/// deadline is the eventfd's doing, which is written after the word and read before it. Hence `Relaxed` everywhere.
struct Deadline(AtomicU64);

impl Deadline {
    /// For the device: another one. Calls `wake` if it is earlier than the one before.
    fn set(&self, deadline: u64, wake: impl Fn()) {
        if planted(Bug::WakeBeforeDeadline) && deadline < self.0.load(Ordering::Relaxed) {
            wake();
        }
        let before = self.0.swap(deadline, Ordering::Relaxed);
        if deadline < before && !planted(Bug::WakeBeforeDeadline) {
            wake();
        }
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// For the loop: takes it if it has come. Not if the device has changed it meanwhile.
    fn take(&self, now: u64) -> Option<u64> {
        let deadline = self.get();
        if deadline == NEVER || deadline > now {
            return None;
        }
        if planted(Bug::TakeBlindly) {
            self.0.store(NEVER, Ordering::Relaxed);
            return Some(deadline);
        }
        self.0
            .compare_exchange(deadline, NEVER, Ordering::Relaxed, Ordering::Relaxed)
            .ok()
    }
}

/// A device's deadline, as seen by both sides.
#[derive(Clone)]
pub struct TimerSlot {
    deadline: Arc<Deadline>,
    waker: Waker,
}

impl TimerSlot {
    /// A slot without a deadline, whose event loop is woken by `waker`.
    pub fn new(waker: Waker) -> TimerSlot {
        TimerSlot {
            deadline: Arc::new(Deadline(AtomicU64::new(NEVER))),
            waker,
        }
    }

    /// For the device's shell: the deadline is another one now. Wakes the event loop only if it is an earlier one;
    /// a later one is found when the loop wakes for the old.
    pub fn set(&self, deadline: Option<Nanos>) {
        let deadline = deadline.map_or(NEVER, |deadline| deadline.0);
        self.deadline.set(deadline, || wake(&self.waker));
    }

    /// For the event loop: when to wake.
    pub fn deadline(&self) -> Option<Nanos> {
        match self.deadline.get() {
            NEVER => None,
            deadline => Some(Nanos(deadline)),
        }
    }

    /// For the event loop: takes the deadline if it has come.
    pub fn take_due(&self, now: Nanos) -> bool {
        self.deadline.take(now.0).is_some()
    }
}

#[cfg(all(test, loom))]
pub(crate) mod models {
    use super::*;
    use crate::actors::park::Futex;
    use loom::thread;

    /// A device sets a deadline and then an earlier one; the loop sleeps until the earliest that it knows of, or until
    /// it is woken. Time does not pass but by sleeping, and the last deadline has to be taken in the end.
    #[test]
    pub(crate) fn loom_no_deadline_is_slept_through() {
        loom::model(|| {
            let deadline = Arc::new(Deadline(AtomicU64::new(NEVER)));
            let eventfd = Arc::new(Futex::new(0));
            let (theirs, waker) = (deadline.clone(), eventfd.clone());
            let device = thread::spawn(move || {
                for at in [5, 3] {
                    theirs.set(at, || {
                        waker.swap(1, Ordering::AcqRel);
                        waker.wake();
                    });
                }
            });
            loop {
                let until = deadline.get();
                if until == NEVER {
                    while eventfd.load(Ordering::Relaxed) == 0 {
                        eventfd.wait(0);
                    }
                    eventfd.swap(0, Ordering::AcqRel);
                } else if deadline.take(until) == Some(3) {
                    break;
                } else {
                    // What the loop has seen may be old; it does not stay so.
                    thread::yield_now();
                }
            }
            device.join().unwrap();
            assert_eq!(deadline.get(), NEVER);
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn an_earlier_deadline_wakes_and_a_later_one_does_not() {
        let waker = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let slot = TimerSlot::new(waker.clone());
        slot.set(Some(Nanos(100)));
        assert_eq!(waker.read().unwrap(), 1);
        slot.set(Some(Nanos(200)));
        slot.set(None);
        assert!(waker.read().is_err());
        slot.set(Some(Nanos(50)));
        assert_eq!(waker.read().unwrap(), 1);
    }

    #[test]
    fn a_deadline_is_due_once() {
        let slot = TimerSlot::new(Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        assert!(!slot.take_due(Nanos(u64::MAX - 1)));
        slot.set(Some(Nanos(100)));
        assert!(!slot.take_due(Nanos(99)));
        assert!(slot.take_due(Nanos(100)));
        assert!(!slot.take_due(Nanos(100)));
        assert_eq!(slot.deadline(), None);
    }
}
