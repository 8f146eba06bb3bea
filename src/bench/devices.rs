//! Devices that cost what they are told to.

use super::clock::{spin, ticks};
use crate::clock::Clock;
use crate::devices::{Access, AccessClass, Context, Device, Direction, Published};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a handler does beside its register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// Keeps the processor busy for so many ticks.
    Spin(u64),
    /// Blocks, as a handler does that reads a disk.
    Sleep(Duration),
}

/// One register that remembers.
pub struct Register {
    value: u64,
    work: Work,
    posted: bool,
}

impl Register {
    /// A register. `posted`: its writes are.
    pub fn new(work: Work, posted: bool) -> Register {
        Register {
            value: 0,
            work,
            posted,
        }
    }

    #[inline]
    fn work(&self) {
        match self.work {
            Work::Spin(ticks) => spin(ticks),
            Work::Sleep(time) => std::thread::sleep(time),
        }
    }
}

impl Device for Register {
    fn name(&self) -> &'static str {
        "register"
    }

    fn read(&mut self, _: &mut dyn Context, _: Access) -> u64 {
        self.work();
        self.value
    }

    fn write(&mut self, _: &mut dyn Context, _: Access, value: u64) {
        self.work();
        self.value = value;
    }

    fn input_ready(&mut self, _: &mut dyn Context) {
        self.work();
        self.value = self.value.wrapping_add(1);
    }

    fn reset(&mut self, _: &mut dyn Context) {
        self.value = 0;
    }

    fn classify(&self) -> fn(Access, Direction) -> AccessClass {
        if self.posted {
            |_, direction| match direction {
                Direction::Read => AccessClass::Ask,
                Direction::Write => AccessClass::Post,
            }
        } else {
            |_, _| AccessClass::Ask
        }
    }
}

/// A register whose value is the time: when the handler that reads it began, and when it was done. What an access spends
/// in the queue, in the handler and on its way back is told apart by it, with nothing on the way itself.
pub struct Stopwatch(Register);

impl Stopwatch {
    /// A register.
    pub fn new(work: Work) -> Stopwatch {
        Stopwatch(Register::new(work, false))
    }

    /// From a value: when its handler began and was done, in ticks of the whole counter. `start` is when the access
    /// began, at most 2^32 ticks before.
    pub fn stamps(value: u64, start: u64) -> (u64, u64) {
        let after = |low: u32| start + u64::from(low.wrapping_sub(start as u32));
        (after((value >> 32) as u32), after(value as u32))
    }
}

impl Device for Stopwatch {
    fn name(&self) -> &'static str {
        "stopwatch"
    }

    fn read(&mut self, _: &mut dyn Context, _: Access) -> u64 {
        let begun = ticks();
        self.0.work();
        // The lower halves: both fit into what a guest can load at once.
        begun << 32 | ticks() & 0xffff_ffff
    }

    fn write(&mut self, _: &mut dyn Context, _: Access, _: u64) {}

    fn reset(&mut self, _: &mut dyn Context) {}
}

/// A word that its owner publishes.
#[derive(Default)]
pub struct Word(AtomicU64);

impl Published for Word {
    fn read(&self, _: Access, _: &Clock) -> u64 {
        // Relaxed: the word stands for itself.
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_survive_a_wrap_of_their_halves() {
        let start = 7 << 32 | 0xffff_fff0;
        let value = 0xffff_fff8 << 32 | 0x10;
        assert_eq!(
            Stopwatch::stamps(value, start),
            (7 << 32 | 0xffff_fff8, 8 << 32 | 0x10)
        );
    }
}
