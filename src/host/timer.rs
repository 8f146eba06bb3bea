//! Deadlines: devices publish when they want to be called, the event loop sleeps until the earliest.

use super::character::{Waker, wake};
use crate::devices::Nanos;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const NEVER: u64 = u64::MAX;

/// A device's deadline, as seen by both sides.
#[derive(Clone)]
pub struct TimerSlot {
    /// Guest time; `NEVER` if none.
    deadline: Arc<AtomicU64>,
    waker: Waker,
}

impl TimerSlot {
    /// A slot without a deadline, whose event loop is woken by `waker`.
    pub fn new(waker: Waker) -> TimerSlot {
        TimerSlot {
            deadline: Arc::new(AtomicU64::new(NEVER)),
            waker,
        }
    }

    /// For the device's shell: the deadline is another one now. Wakes the event loop only if it is an earlier one;
    /// a later one is found when the loop wakes for the old.
    pub fn set(&self, deadline: Option<Nanos>) {
        let deadline = deadline.map_or(NEVER, |deadline| deadline.0);
        // SeqCst, with the loop's load: either the loop sees the new deadline before it sleeps, or the eventfd
        // (which is written after) ends its sleep.
        if deadline < self.deadline.swap(deadline, Ordering::SeqCst) {
            wake(&self.waker);
        }
    }

    /// For the event loop: when to wake.
    pub fn deadline(&self) -> Option<Nanos> {
        match self.deadline.load(Ordering::SeqCst) {
            NEVER => None,
            deadline => Some(Nanos(deadline)),
        }
    }

    /// For the event loop: takes the deadline if it has come.
    pub fn take_due(&self, now: Nanos) -> bool {
        let deadline = self.deadline.load(Ordering::SeqCst);
        deadline <= now.0
            && deadline != NEVER
            && self
                .deadline
                .compare_exchange(deadline, NEVER, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
    }
}

#[cfg(test)]
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
