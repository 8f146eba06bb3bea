//! A wish to be told of a change: how two threads that work at their own pace wake each other only when needed.
//!
//! One side waits for something that the other side brings about, say that a ring is not empty. It says so, then looks
//! once more. The other side makes its change, then looks whether anybody wishes to be told. The wish and the change are
//! two words, so both sides put a sequentially consistent fence between their write and their look: one of the two
//! fences is first in the single order of all, and who has the second sees what was written before the first. So at
//! least one side sees what the other did, and nothing is left lying.

use crate::actors::sync::{AtomicBool, Bug, Ordering, Site, at, fence, planted};

/// One side's wish.
pub(super) struct Wish(AtomicBool);

impl Wish {
    pub(super) fn new(wished: bool) -> Wish {
        Wish(AtomicBool::new(wished))
    }

    /// For the side that waits. `true`: it will be told. `false`: no need, `come` says that it is there.
    pub(super) fn express(&self, come: impl FnOnce() -> bool) -> bool {
        // Relaxed, here and below: the fences order, and nothing is read because of the flag alone. A swap, not a store:
        // no store can come between the two halves of the other side's swap, but loom does not know that of stores.
        self.0.swap(true, Ordering::Relaxed);
        fence(at(Site::Wish, Ordering::SeqCst));
        if planted(Bug::WishBlindly) || !come() {
            return true;
        }
        // If the other side has seen the wish it will tell once more, which does no harm.
        self.withdraw();
        false
    }

    /// For the side that waited: it need not be told any more.
    pub(super) fn withdraw(&self) {
        self.0.swap(false, Ordering::Relaxed);
    }

    /// For the side that has made a change: whether to tell. If the change is not `enough` the wish stands. `true` once
    /// a wish.
    #[inline]
    pub(super) fn is_due(&self, enough: impl FnOnce() -> bool) -> bool {
        fence(at(Site::Change, Ordering::SeqCst));
        self.0.load(Ordering::Relaxed) && enough() && self.0.swap(false, Ordering::Relaxed)
    }
}

#[cfg(all(test, loom))]
pub(crate) mod models {
    use super::*;
    use crate::actors::park::Futex;
    use crate::actors::sync::{Arc, AtomicU32};
    use loom::thread;

    /// Bytes that the ring of the model holds.
    const ROOM: u32 = 2;

    /// A ring, its two wishes, and what its two sides sleep on.
    struct Shared {
        /// Stored by the consumer. Release, loaded with Acquire: like those of the real ring.
        head: AtomicU32,
        /// Stored by the producer.
        tail: AtomicU32,
        consumer_rests: Wish,
        room_wanted: Wish,
        consumer: Futex,
        producer: Futex,
    }

    impl Shared {
        fn filled(&self) -> u32 {
            self.tail.load(Ordering::Acquire) - self.head.load(Ordering::Acquire)
        }
    }

    fn tell(futex: &Futex) {
        futex.swap(1, Ordering::Relaxed);
        futex.wake();
    }

    fn sleep(futex: &Futex) {
        while futex.load(Ordering::Relaxed) == 0 {
            futex.wait(0);
        }
        futex.swap(0, Ordering::Relaxed);
    }

    /// A device sends more than the ring holds, as [`CharacterEnd`](super::super::character::CharacterEnd) does, and
    /// the event loop takes it, resting in between.
    #[test]
    pub(crate) fn loom_nothing_is_left_lying_and_nobody_sleeps_for_ever() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let shared = Arc::new(Shared {
                head: AtomicU32::new(0),
                tail: AtomicU32::new(0),
                consumer_rests: Wish::new(true),
                room_wanted: Wish::new(false),
                consumer: Futex::new(0),
                producer: Futex::new(0),
            });
            let device = shared.clone();
            let producer = thread::spawn(move || {
                for byte in 0..ROOM + 1 {
                    device.tail.store(byte + 1, Ordering::Release);
                    if device.consumer_rests.is_due(|| true) {
                        tell(&device.consumer);
                    }
                    while device.filled() == ROOM && device.room_wanted.express(|| device.filled() < ROOM) {
                        sleep(&device.producer);
                    }
                }
            });
            let mut taken = 0;
            // It rests from the beginning.
            sleep(&shared.consumer);
            loop {
                taken += shared.filled();
                shared.head.store(taken, Ordering::Release);
                if shared.room_wanted.is_due(|| shared.filled() <= ROOM / 2) {
                    tell(&shared.producer);
                }
                if taken == ROOM + 1 {
                    break;
                }
                if shared.consumer_rests.express(|| shared.filled() > 0) {
                    sleep(&shared.consumer);
                }
                shared.consumer_rests.withdraw();
            }
            producer.join().unwrap();
        });
    }
}
