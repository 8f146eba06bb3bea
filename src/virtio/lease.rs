//! The right to touch guest memory: the register side lends it to a queue's actor, and can take it back at any time
//! without waiting for the host.
//!
//! A driver that resets its device may use the queue's memory for something else as soon as it has written the
//! status (Linux does not poll a virtio-mmio device), while the queue's actor may sit in a read of a slow disk. So an
//! actor never has the host write into guest memory when it may have to wait for a disk, and never holds a reference into it
//! for long: it works on a buffer of its own, and goes to guest memory in *touches*, each a copy of [`super::CHUNK_BYTES`]
//! at most (also by the host's kernel, from and to what is in memory there: [`super::straight`]) or a step on a ring. A touch
//! needs the lease. Taking the lease back waits for a touch that is going on, and for nothing else.
//! Nothing of ours is waited for inside a touch (no ask, no post, no lock), so this wait can be part of no circle, whoever waits:
//! also a queue's own actor, when it runs a turn of the register side that it has posted to.
//!
//! ```text
//!          grant                     touch
//!  REVOKED ─────▶ GRANTED, epoch n ◀───────▶ BUSY
//!     ▲             │       ▲ suspend, resume
//!     │   revoke    │       ▼
//!     └─────────────┴── SUSPENDED (what is under way goes on when resumed)
//! ```
//!
//! Each grant has a number, its epoch, so an actor that slept through a reset and a new start finds that its own is
//! over. 28 bits of it: it comes round after 2^28 resets during one request.
//!
//! # Orderings
//!
//! All is one word. Beginning a touch is `Acquire` and ending it `Release`, and `revoke`, `suspend` and `grant` are
//! `AcqRel`: what a touch wrote is seen by whoever took the lease back, and a touch sees what the granter wrote before
//! (the queue's addresses also travel by a channel, but the rings' memory does not). The word's modification order
//! decides who was first: a touch succeeds only on a granted word that is not suspended, and a revocation that finds
//! `BUSY` waits until the toucher has cleared it. `WAITING` is set by the same step that revokes, so the toucher's step
//! that clears `BUSY` sees it and wakes; the futex compares the word before it sleeps.

use crate::actors::park::{Futex, spin_until};
use crate::actors::sync::{Arc, Ordering};

const BUSY: u32 = 1;
const GRANTED: u32 = 1 << 1;
const SUSPENDED: u32 = 1 << 2;
const WAITING: u32 = 1 << 3;
const EPOCH_SHIFT: u32 = 4;

/// Which grant: counts up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Epoch(u32);

/// Why a touch is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// The grant is over: the device was reset. What was under way is dropped.
    Revoked,
    /// The machine is paused. The grant goes on later.
    Suspended,
}

/// The register side's end. One for each queue.
pub struct Lessor(Arc<Futex>);

/// The queue actor's end. One; it is not `Clone`, so at most one touch goes on.
pub struct Lessee(Arc<Futex>);

/// A lease that is not granted.
pub fn lease() -> (Lessor, Lessee) {
    let word = Arc::new(Futex::new(0));
    (Lessor(word.clone()), Lessee(word))
}

impl Lessor {
    /// Changes the bits; returns the word as it was.
    fn update(&self, change: impl Fn(u32) -> u32) -> u32 {
        let mut old = self.0.load(Ordering::Relaxed);
        loop {
            match self
                .0
                .compare_exchange(old, change(old), Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return old,
                Err(now) => old = now,
            }
        }
    }

    /// Lends guest memory, anew. The lease must not be granted.
    pub fn grant(&self) -> Epoch {
        let next = |word: u32| (word >> EPOCH_SHIFT).wrapping_add(1) << EPOCH_SHIFT;
        let old = self.update(|word| next(word) | GRANTED);
        debug_assert_eq!(old & (BUSY | GRANTED), 0);
        Epoch(next(old) >> EPOCH_SHIFT)
    }

    /// Takes it back. When this returns nobody touches guest memory for it. Returns whether it was granted.
    pub fn revoke(&self) -> bool {
        self.take(|word| word & !(GRANTED | SUSPENDED)) & GRANTED != 0
    }

    /// Takes it back for a while.
    pub fn suspend(&self) {
        self.take(|word| word | SUSPENDED);
    }

    /// Gives it again. The actor must be rung.
    pub fn resume(&self) {
        self.update(|word| word & !SUSPENDED);
    }

    /// Changes the word so that no new touch can begin, and waits for the one that has.
    fn take(&self, change: impl Fn(u32) -> u32) -> u32 {
        let with_wait = |word| match change(word) {
            after if after & BUSY != 0 => after | WAITING,
            after => after,
        };
        let old = self.update(with_wait);
        if old & BUSY != 0 {
            let over = || self.0.load(Ordering::Acquire) & BUSY == 0;
            // A copy takes less than a sleep and a wake-up, unless the toucher has no processor.
            while !spin_until(over) {
                let word = self.0.load(Ordering::Acquire);
                if word & BUSY != 0 {
                    self.0.wait(word);
                }
            }
        }
        old
    }
}

impl Lessee {
    /// Begins a touch; it ends when the value is dropped. Never waits.
    ///
    /// # Errors
    /// [`Refused`].
    #[inline]
    pub fn touch(&self, epoch: Epoch) -> Result<Touch<'_>, Refused> {
        let granted = epoch.0 << EPOCH_SHIFT | GRANTED;
        match self
            .0
            .compare_exchange(granted, granted | BUSY, Ordering::Acquire, Ordering::Relaxed)
        {
            Ok(_) => Ok(Touch(&self.0)),
            Err(word) if word == granted | SUSPENDED => Err(Refused::Suspended),
            Err(_) => Err(Refused::Revoked),
        }
    }
}

/// While this lives, guest memory may be touched.
pub struct Touch<'a>(&'a Futex);

impl Drop for Touch<'_> {
    #[inline]
    fn drop(&mut self) {
        let mut old = self.0.load(Ordering::Relaxed);
        loop {
            match self
                .0
                .compare_exchange(old, old & !(BUSY | WAITING), Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => break,
                Err(now) => old = now,
            }
        }
        if old & WAITING != 0 {
            self.0.wake();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

    #[test]
    fn a_lease_is_good_from_its_grant_to_its_end() {
        let (lessor, lessee) = lease();
        assert_eq!(lessee.touch(Epoch(0)).err(), Some(Refused::Revoked));
        let first = lessor.grant();
        drop(lessee.touch(first).unwrap());
        drop(lessee.touch(first).unwrap());
        assert!(lessor.revoke());
        assert!(!lessor.revoke(), "it was not granted any more");
        assert_eq!(lessee.touch(first).err(), Some(Refused::Revoked));
        let second = lessor.grant();
        assert_eq!(lessee.touch(first).err(), Some(Refused::Revoked), "an old epoch");
        drop(lessee.touch(second).unwrap());
    }

    #[test]
    fn a_suspended_lease_goes_on_and_a_revoked_one_does_not() {
        let (lessor, lessee) = lease();
        let epoch = lessor.grant();
        lessor.suspend();
        assert_eq!(lessee.touch(epoch).err(), Some(Refused::Suspended));
        lessor.resume();
        drop(lessee.touch(epoch).unwrap());
        lessor.suspend();
        lessor.revoke();
        assert_eq!(lessee.touch(epoch).err(), Some(Refused::Revoked));
        lessor.resume();
        assert_eq!(lessee.touch(epoch).err(), Some(Refused::Revoked));
    }

    #[test]
    fn nothing_is_touched_after_a_revocation() {
        let (lessor, lessee) = lease();
        // Odd while a touch goes on.
        let touched = Arc::new(AtomicU64::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let (seen, ended) = (touched.clone(), over.clone());
        let granted = Arc::new(AtomicU32::new(0));
        let epoch = granted.clone();
        let toucher = std::thread::spawn(move || {
            let mut touches = 0u64;
            while !ended.load(Ordering::Relaxed) {
                if let Ok(_touch) = lessee.touch(Epoch(epoch.load(Ordering::Relaxed))) {
                    seen.store(seen.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                    std::hint::black_box([0u8; 64]);
                    seen.store(seen.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                    touches += 1;
                }
            }
            touches
        });
        let mut stopped_while_busy = 0;
        for round in 0..6_400u64 {
            let before = touched.load(Ordering::Relaxed);
            granted.store(lessor.grant().0, Ordering::Relaxed);
            while round % 64 == 0 && touched.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
            lessor.revoke();
            let now = touched.load(Ordering::Relaxed);
            assert!(now.is_multiple_of(2), "a touch goes on after the revocation");
            stopped_while_busy += u64::from(now != before);
        }
        over.store(true, Ordering::Relaxed);
        let touches = toucher.join().unwrap();
        assert!(
            touches > 0 && stopped_while_busy > 0,
            "{touches} {stopped_while_busy}"
        );
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::thread;

    fn explore(model: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(4);
        builder.check(model);
    }

    /// Guest memory: loom tells when two are at it at once.
    struct Memory(UnsafeCell<u32>);
    // SAFETY: access is what the model is to prove exclusive; loom checks each.
    unsafe impl Sync for Memory {}

    fn work(lessee: &Lessee, epoch: Epoch, memory: &Memory) -> Option<Refused> {
        match lessee.touch(epoch) {
            // SAFETY: exclusive if the protocol is right; loom checks.
            Ok(_touch) => memory.0.with_mut(|value| unsafe { *value += 1 }),
            Err(refused) => return Some(refused),
        }
        None
    }

    #[test]
    fn loom_after_a_revocation_nobody_touches() {
        explore(|| {
            let memory = Arc::new(Memory(UnsafeCell::new(0)));
            let (lessor, lessee) = lease();
            let epoch = lessor.grant();
            let theirs = memory.clone();
            let toucher = thread::spawn(move || {
                work(&lessee, epoch, &theirs);
                work(&lessee, epoch, &theirs);
            });
            lessor.revoke();
            // SAFETY: as above.
            memory.0.with_mut(|value| unsafe { *value += 10 });
            toucher.join().unwrap();
        });
    }

    #[test]
    fn loom_a_suspension_ends_and_an_old_epoch_stays_over() {
        explore(|| {
            let memory = Arc::new(Memory(UnsafeCell::new(0)));
            let (lessor, lessee) = lease();
            let epoch = lessor.grant();
            let theirs = memory.clone();
            let toucher = thread::spawn(move || (work(&lessee, epoch, &theirs), lessee));
            lessor.suspend();
            // SAFETY: as above.
            memory.0.with_mut(|value| unsafe { *value += 10 });
            lessor.resume();
            lessor.revoke();
            lessor.grant();
            let (_, lessee) = toucher.join().unwrap();
            assert_eq!(work(&lessee, epoch, &memory), Some(Refused::Revoked));
        });
    }
}
