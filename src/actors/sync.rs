//! The primitives that the protocols are written in: the real ones, or loom's, which explore every interleaving
//! and every outcome that the memory model allows (`--cfg loom`).

#[cfg(not(loom))]
pub(crate) use real::*;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
// Not loom's, which cannot hold a `dyn Job`; what it counts is not part of any protocol here.
pub(crate) use std::sync::Arc;

pub(crate) use super::planted::{Bug, Site, at, planted};

#[cfg(loom)]
pub(crate) use loom::{
    cell::UnsafeCell,
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
};

/// The queue of a pool.
#[cfg(not(loom))]
pub(crate) mod queue {
    pub(crate) use crossbeam_channel::{Receiver, Sender, bounded};
}

/// The same in loom's terms, without the bound: a mutex, a condition, and the count of senders.
#[cfg(loom)]
pub(crate) mod queue {
    use super::Arc;
    use crossbeam_channel::TrySendError;
    use loom::sync::{Condvar, Mutex};

    struct Shared<T> {
        waiting: Mutex<(std::collections::VecDeque<T>, u32)>,
        changed: Condvar,
    }

    pub(crate) struct Sender<T>(Arc<Shared<T>>);
    pub(crate) struct Receiver<T>(Arc<Shared<T>>);

    pub(crate) fn bounded<T>(_room: usize) -> (Sender<T>, Receiver<T>) {
        let shared = Arc::new(Shared {
            waiting: Mutex::new((Default::default(), 1)),
            changed: Condvar::new(),
        });
        (Sender(shared.clone()), Receiver(shared))
    }

    impl<T> Sender<T> {
        pub(crate) fn try_send(&self, item: T) -> Result<(), TrySendError<T>> {
            self.0.waiting.lock().unwrap().0.push_back(item);
            self.0.changed.notify_one();
            Ok(())
        }
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            self.0.waiting.lock().unwrap().1 += 1;
            Sender(self.0.clone())
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            // A failing model unwinds through here.
            if std::thread::panicking() {
                return;
            }
            self.0.waiting.lock().unwrap().1 -= 1;
            self.0.changed.notify_one();
        }
    }

    impl<T> Clone for Receiver<T> {
        fn clone(&self) -> Self {
            Receiver(self.0.clone())
        }
    }

    impl<T> Iterator for Receiver<T> {
        type Item = T;

        fn next(&mut self) -> Option<T> {
            let mut waiting = self.0.waiting.lock().unwrap();
            loop {
                if let Some(item) = waiting.0.pop_front() {
                    return Some(item);
                }
                if waiting.1 == 0 {
                    return None;
                }
                waiting = self.0.changed.wait(waiting).unwrap();
            }
        }
    }
}

#[cfg(not(loom))]
mod real {
    pub(crate) use std::hint::spin_loop;

    /// `std`'s cell with loom's interface, so that loom can check that every access is exclusive.
    pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(crate) const fn new(value: T) -> Self {
            UnsafeCell(std::cell::UnsafeCell::new(value))
        }

        #[inline(always)]
        pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }
}
