//! What the actors of a device with ports publish to each other. Each word has one writer; who reads it is rung behind the
//! write (`Release`, and `Acquire` to read), and compares it with what he has seen, so none waits for room and a flood of a
//! guest's messages is no more than the last of each kind.
//!
//! | word | written by | read by |
//! |---|---|---|
//! | `device_ready`, `ready` | the queue of the driver's control messages | the queue of ours |
//! | `guest` | the same | the port's receive queue |
//! | `host` | the port's receive queue | the queue of our control messages |
//!
//! What the driver says belongs to a life of the device: the queues find out about a reset each at its own time.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// An eventfd that wakes an actor.
pub struct Bell(EventFd);

impl Bell {
    /// A new one.
    ///
    /// # Errors
    /// When the host gives no more descriptors.
    pub fn new() -> io::Result<Bell> {
        EventFd::new(libc::EFD_NONBLOCK).map(Bell)
    }

    /// Wakes.
    pub fn ring(&self) {
        // Fails only when the counter is full, and then it rings already.
        let _ = self.0.write(1);
    }

    /// Before what it tells of is looked at.
    pub fn hush(&self) {
        let _ = self.0.read();
    }

    /// What becomes readable.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// A word of the driver's: 31 bits that count how often it was said, a bit of value, and the life in which it was.
#[derive(Default)]
pub struct Said(AtomicU64);

impl Said {
    /// For its one writer: the driver has said it again.
    pub fn say(&self, life: u32, value: bool) {
        let count = (self.0.load(Ordering::Relaxed) as u32 >> 1).wrapping_add(1);
        let word = u64::from(life) << 32 | u64::from(count << 1 | u32::from(value));
        self.0.store(word, Ordering::Release);
    }

    /// What was said, if it is of this life and not what was `seen` before.
    pub fn news(&self, life: u32, seen: &mut u64) -> Option<bool> {
        let word = self.0.load(Ordering::Acquire);
        if word == *seen || word >> 32 != u64::from(life) {
            return None;
        }
        *seen = word;
        Some(word & 1 != 0)
    }

    /// Whether it was said and is so, in this life.
    pub fn is(&self, life: u32) -> bool {
        let word = self.0.load(Ordering::Acquire);
        word >> 32 == u64::from(life) && word & 1 != 0
    }
}

/// Of one port.
pub struct Line {
    /// The driver has it.
    pub ready: Said,
    /// A program of the guest has it open.
    pub guest: Said,
    /// Rings the port's receive queue.
    pub notice: Bell,
    /// How often a program of the host has come or gone.
    host: AtomicU32,
}

/// Of all ports.
pub struct Exchange {
    /// The driver wants to know which ports there are.
    pub device_ready: Said,
    /// Rings the queue of our control messages.
    pub news: Bell,
    /// The ports', by their places.
    pub lines: Vec<Line>,
}

impl Exchange {
    /// Of so many ports.
    ///
    /// # Errors
    /// When the host gives no more descriptors.
    pub fn new(ports: usize) -> io::Result<Arc<Exchange>> {
        let line = |_| {
            Ok(Line {
                ready: Said::default(),
                guest: Said::default(),
                notice: Bell::new()?,
                host: AtomicU32::new(0),
            })
        };
        Ok(Arc::new(Exchange {
            device_ready: Said::default(),
            news: Bell::new()?,
            lines: (0..ports).map(line).collect::<io::Result<_>>()?,
        }))
    }

    /// For the port's one writer: a program of the host has come, or gone.
    pub fn host_changed(&self, place: usize) {
        self.lines[place].host.fetch_add(1, Ordering::Release);
        self.news.ring();
    }

    /// How often one has.
    pub fn host(&self, place: usize) -> u32 {
        self.lines[place].host.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_news_once_and_in_its_life_only() {
        let (said, mut seen) = (Said::default(), 0);
        assert_eq!((said.news(0, &mut seen), said.is(0)), (None, false));
        said.say(3, true);
        assert_eq!((said.news(2, &mut seen), said.is(2)), (None, false));
        assert_eq!((said.news(3, &mut seen), said.is(3)), (Some(true), true));
        assert_eq!(said.news(3, &mut seen), None);
        said.say(3, true);
        assert_eq!(said.news(3, &mut seen), Some(true), "again");
        said.say(3, false);
        said.say(3, false);
        assert_eq!((said.news(3, &mut seen), said.is(3)), (Some(false), false));
    }
}
