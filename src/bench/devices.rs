//! Devices that cost what they are told to.

use super::clock::spin;
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

/// A word that its owner publishes.
#[derive(Default)]
pub struct Word(AtomicU64);

impl Published for Word {
    fn read(&self, _: Access, _: &Clock) -> u64 {
        // Relaxed: the word stands for itself.
        self.0.load(Ordering::Relaxed)
    }
}
