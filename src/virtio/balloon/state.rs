//! What is known of a balloon without asking anybody, and how its size is changed.
//!
//! Each word has one writer and stands for itself, so `Relaxed` would do for each; `Release` and `Acquire` cost nothing
//! beside the system calls around. The wanted size: whoever holds the [`BalloonSwitch`], who rings the inflate queue's
//! actor; that one publishes it to the driver. The actual size: the register side, from the driver's write. The count of
//! what was given back: the inflate queue's actor and the reporting queue's, each its own. The guest's figures: the actor
//! of the queue that they come by.

use super::PAGE_BYTES;
use crate::virtio::registers::Written;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// Names of the guest's figures, by their tags. [VIRTIO 1.2 §5.5.6.4]
pub const FIGURES: [&str; 10] = [
    "swap_in_bytes",
    "swap_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "caches_bytes",
    "hugetlb_allocations",
    "hugetlb_failures",
];
/// Of one that the guest has not told.
const UNTOLD: u64 = u64::MAX;

/// A balloon's words.
#[derive(Clone, Debug)]
pub struct Balloon {
    wanted: Arc<AtomicU32>,
    actual: Written,
    given: Arc<[AtomicU64; 2]>,
    figures: Arc<[AtomicU64; FIGURES.len()]>,
}

/// Who gives memory back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Giver {
    /// The inflate queue: the guest does without the pages.
    Inflate = 0,
    /// The reporting queue: they are free, and the guest may take them again.
    Report = 1,
}

impl Balloon {
    /// Of this size at first, in pages. `actual`: where the driver says what it has.
    pub fn new(pages: u32, actual: Written) -> Balloon {
        Balloon {
            wanted: Arc::new(AtomicU32::new(pages)),
            actual,
            given: Arc::default(),
            figures: Arc::new([const { AtomicU64::new(UNTOLD) }; FIGURES.len()]),
        }
    }

    /// What the driver is asked for, pages.
    pub fn wanted_pages(&self) -> u32 {
        self.wanted.load(Ordering::Acquire)
    }

    /// The same in bytes.
    pub fn wanted_bytes(&self) -> u64 {
        u64::from(self.wanted_pages()) * PAGE_BYTES
    }

    /// What the driver says that it has given, bytes.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.actual.value()) * PAGE_BYTES
    }

    /// Bytes that went back to the host so far, by whom.
    pub fn given_bytes(&self, giver: Giver) -> u64 {
        self.given[giver as usize].load(Ordering::Acquire)
    }

    /// So many more. For that giver alone.
    pub fn count(&self, giver: Giver, bytes: u64) {
        let word = &self.given[giver as usize];
        word.store(
            word.load(Ordering::Relaxed).wrapping_add(bytes),
            Ordering::Release,
        );
    }

    /// The guest says so. For the figures' queue alone.
    pub fn tell(&self, tag: u16, value: u64) {
        if let Some(word) = self.figures.get(usize::from(tag)) {
            word.store(value, Ordering::Release);
        }
    }

    /// What the guest has told last.
    pub fn figures(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let words = self.figures.iter().map(|word| word.load(Ordering::Acquire));
        FIGURES
            .into_iter()
            .zip(words)
            .filter(|(_, value)| *value != UNTOLD)
    }

    /// The switch. `bell`: rings the inflate queue's actor. `memory_bytes`: what the guest has.
    pub fn switch(&self, bell: EventFd, memory_bytes: u64) -> BalloonSwitch {
        BalloonSwitch {
            balloon: self.clone(),
            bell,
            memory_bytes,
        }
    }
}

/// Changes a balloon's size.
pub struct BalloonSwitch {
    balloon: Balloon,
    bell: EventFd,
    memory_bytes: u64,
}

/// More than there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a balloon of {wanted} bytes is more than the guest's memory, {has} bytes")]
pub struct TooLarge {
    /// As asked for.
    pub wanted: u64,
    /// What there is.
    pub has: u64,
}

impl BalloonSwitch {
    /// What is known of it.
    pub fn balloon(&self) -> &Balloon {
        &self.balloon
    }

    /// Asks the driver for another size, bytes. Does not wait: it gives what it can, when it can.
    ///
    /// # Errors
    /// [`TooLarge`].
    pub fn set(&self, bytes: u64) -> Result<(), TooLarge> {
        if bytes >= self.memory_bytes {
            return Err(TooLarge {
                wanted: bytes,
                has: self.memory_bytes,
            });
        }
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.balloon.wanted.store(pages, Ordering::Release);
        // Fails only when the counter is full, and then it rings already.
        let _ = self.bell.write(1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_wanted_and_heard_of() {
        let actual = Written::new(4);
        let balloon = Balloon::new(3, actual);
        let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let switch = balloon.switch(bell.try_clone().unwrap(), 1 << 20);
        assert_eq!((balloon.wanted_bytes(), balloon.actual_bytes()), (3 << 12, 0));
        switch.set(1 << 19).unwrap();
        assert_eq!((balloon.wanted_pages(), bell.read().unwrap()), (128, 1));
        let error = switch.set(1 << 20).unwrap_err();
        assert!(error.to_string().contains("1048576 bytes is more"), "{error}");
        assert!(bell.read().is_err());
        assert_eq!(balloon.wanted_pages(), 128);
    }

    #[test]
    fn figures_are_known_when_they_were_told() {
        let balloon = Balloon::new(0, Written::new(4));
        assert_eq!(balloon.figures().count(), 0);
        balloon.tell(4, 77);
        balloon.tell(9, 0);
        balloon.tell(10, 1);
        balloon.tell(u16::MAX, 1);
        let told: Vec<_> = balloon.figures().collect();
        assert_eq!(told, [("free_bytes", 77), ("hugetlb_failures", 0)]);
        balloon.count(Giver::Report, 5);
        balloon.count(Giver::Report, 5);
        assert_eq!(
            (
                balloon.given_bytes(Giver::Inflate),
                balloon.given_bytes(Giver::Report)
            ),
            (0, 10)
        );
    }
}
