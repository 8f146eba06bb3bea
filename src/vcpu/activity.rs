//! What a thread that uses devices is doing, published for whoever wants to know while it may be stuck.
//!
//! The thread alone writes, to a cache line of its own; a reader may see the words of two moments (the address of one
//! access with the time of the next), which a second look mends. So publishing costs a few stores that go nowhere and
//! one read of the time-stamp counter at each exit; no system call, no allocation, no line that anybody else writes.
//!
//! ```text
//!  word:  63 .. 56   55 54         53         52        51 .. 0
//!         doing      width (log2)  direction  space     address, or a device's number
//! ```

use super::exit::{MmioExit, PioExit};
use super::route::Space;
use crate::devices::{Direction, Width};
use crossbeam_utils::CachePadded;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const DOING: u32 = 56;
const WIDTH: u32 = 54;
const WRITE: u64 = 1 << 53;
const MMIO: u64 = 1 << 52;
const ADDRESS: u64 = MMIO - 1;

// What is done, in the top byte; 0 is a thread that has not begun.
const IN_GUEST: u64 = 1;
const ACCESS: u64 = 2;
const OTHER_EXIT: u64 = 3;
const ASLEEP: u64 = 4;
const SETTLING: u64 = 5;
const AT_DEVICE: u64 = 6;
const ENDED: u64 = 7;

/// The words of one thread.
#[derive(Default)]
struct Words {
    word: AtomicU64,
    /// The time-stamp counter when it began.
    since: AtomicU64,
    /// How many exits there were.
    exits: AtomicU64,
}

/// The thread's end: it writes.
pub struct Activity(Arc<CachePadded<Words>>);

/// Anybody's: he looks.
#[derive(Clone)]
pub struct ActivityView(Arc<CachePadded<Words>>);

/// What a thread is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doing {
    /// It has not begun.
    Starting,
    /// In the guest, as far as it knows. Without a time: entering it is not the moment to look at a clock.
    InGuest,
    /// It handles an access of the guest's: the device's turn, or a wait for it.
    Access {
        /// Where.
        space: Space,
        /// The port or the address.
        address: u64,
        /// How wide the first element is. MMIO of other lengths counts as the next width.
        width: Width,
        /// Which way.
        direction: Direction,
    },
    /// It handles another exit.
    OtherExit,
    /// It sleeps on its mailbox: it was not started, is paused, or has halted for good.
    Asleep,
    /// It completes what is half done before it pauses.
    Settling,
    /// Not a vCPU: it brings a device a message, by its number.
    AtDevice(usize),
    /// It has ended.
    Ended,
}

/// The time-stamp counter. Not ordered with what is around it: a few nanoseconds do not matter here.
#[inline(always)]
fn counter() -> u64 {
    // SAFETY: RDTSC reads and writes no memory, and every x86-64 processor has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

impl Activity {
    /// Of a thread that has not begun.
    pub fn new() -> Activity {
        Activity(Arc::default())
    }

    /// For those who look.
    pub fn view(&self) -> ActivityView {
        ActivityView(self.0.clone())
    }

    // All stores are Relaxed: each word stands for itself, and nothing is read by way of it.

    #[inline(always)]
    fn begin(&self, word: u64) {
        self.0.word.store(word, Ordering::Relaxed);
        self.0.since.store(counter(), Ordering::Relaxed);
    }

    /// About to run the guest.
    #[inline(always)]
    pub fn in_guest(&self) {
        self.0.word.store(IN_GUEST << DOING, Ordering::Relaxed);
    }

    /// The guest was left: an exit is to be handled.
    #[inline(always)]
    pub fn exited(&self) {
        self.begin(OTHER_EXIT << DOING);
        // Only this thread writes it, so a load and a store suffice.
        let exits = self.0.exits.load(Ordering::Relaxed);
        self.0.exits.store(exits.wrapping_add(1), Ordering::Relaxed);
    }

    /// It is a port access.
    #[inline(always)]
    pub fn port(&self, exit: &PioExit) {
        let log2 = exit.width.bytes().trailing_zeros();
        let word = access(u64::from(exit.port), log2, exit.direction);
        self.0.word.store(word, Ordering::Relaxed);
    }

    /// It is a memory access.
    #[inline(always)]
    pub fn memory(&self, exit: &MmioExit) {
        let log2 = exit.length.next_power_of_two().trailing_zeros().min(3);
        let word = MMIO | access(exit.address, log2, exit.direction);
        self.0.word.store(word, Ordering::Relaxed);
    }

    /// Sleeps on its mailbox from now on.
    pub fn asleep(&self) {
        self.begin(ASLEEP << DOING);
    }

    /// Completes what is half done.
    pub fn settling(&self) {
        self.begin(SETTLING << DOING);
    }

    /// Brings a device a message.
    pub fn at_device(&self, device: usize) {
        self.begin(AT_DEVICE << DOING | device as u64 & ADDRESS);
    }

    /// Has ended.
    pub fn ended(&self) {
        self.begin(ENDED << DOING);
    }
}

impl Default for Activity {
    fn default() -> Self {
        Activity::new()
    }
}

#[inline(always)]
fn access(address: u64, log2: u32, direction: Direction) -> u64 {
    let write = match direction {
        Direction::Read => 0,
        Direction::Write => WRITE,
    };
    ACCESS << DOING | u64::from(log2) << WIDTH | write | address & ADDRESS
}

impl ActivityView {
    /// What the thread is doing, and since which reading of the time-stamp counter.
    pub fn look(&self) -> (Doing, u64) {
        loop {
            let word = self.0.word.load(Ordering::Relaxed);
            let since = self.0.since.load(Ordering::Relaxed);
            // One more look, so that the time is not another access's unless that is the same in every bit.
            if self.0.word.load(Ordering::Relaxed) == word {
                return (decode(word), since);
            }
        }
    }

    /// How many exits there were.
    pub fn exits(&self) -> u64 {
        self.0.exits.load(Ordering::Relaxed)
    }
}

fn decode(word: u64) -> Doing {
    match word >> DOING {
        IN_GUEST => Doing::InGuest,
        ACCESS => Doing::Access {
            space: if word & MMIO == 0 { Space::Pio } else { Space::Mmio },
            address: word & ADDRESS,
            width: [Width::Byte, Width::Word, Width::Dword, Width::Qword][(word >> WIDTH & 3) as usize],
            direction: if word & WRITE == 0 {
                Direction::Read
            } else {
                Direction::Write
            },
        },
        OTHER_EXIT => Doing::OtherExit,
        ASLEEP => Doing::Asleep,
        SETTLING => Doing::Settling,
        AT_DEVICE => Doing::AtDevice((word & ADDRESS) as usize),
        ENDED => Doing::Ended,
        _ => Doing::Starting,
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doing::Starting => f.write_str("starts"),
            Doing::InGuest => f.write_str("is in the guest"),
            Doing::Access {
                space,
                address,
                width,
                direction,
            } => {
                let what = match (space, direction) {
                    (Space::Pio, Direction::Read) => "in",
                    (Space::Pio, Direction::Write) => "out",
                    (Space::Mmio, Direction::Read) => "load",
                    (Space::Mmio, Direction::Write) => "store",
                };
                write!(f, "{what} {address:#x}/{}", width.bytes())
            }
            Doing::OtherExit => f.write_str("handles an exit"),
            Doing::Asleep => f.write_str("sleeps on its mailbox"),
            Doing::Settling => f.write_str("completes its last access"),
            Doing::AtDevice(device) => write!(f, "brings device {device} a message"),
            Doing::Ended => f.write_str("has ended"),
        }
    }
}

/// What the time-stamp counter says in time, by the host's clock. The longer ago it was made, the better it is.
#[derive(Clone, Copy)]
pub struct Stopwatch {
    clock: Instant,
    counter: u64,
}

impl Stopwatch {
    /// Starts.
    pub fn start() -> Stopwatch {
        Stopwatch {
            clock: Instant::now(),
            counter: counter(),
        }
    }

    /// How long ago the counter was at `since`. Zero for what it cannot tell (a counter that went back).
    pub fn elapsed(&self, since: u64) -> Duration {
        let now = counter();
        let whole = now.saturating_sub(self.counter);
        let part = now.saturating_sub(since);
        if whole == 0 {
            return Duration::ZERO;
        }
        let ns = self.clock.elapsed().as_nanos() as f64 * (part as f64 / whole as f64);
        Duration::from_nanos(ns as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_what_is_read() {
        let activity = Activity::new();
        let view = activity.view();
        assert_eq!(view.look().0, Doing::Starting);
        activity.in_guest();
        assert_eq!(view.look().0, Doing::InGuest);
        for (port, width, direction) in [
            (0, Width::Byte, Direction::Read),
            (0xffff, Width::Dword, Direction::Write),
        ] {
            activity.port(&PioExit {
                direction,
                port,
                width,
                count: 1,
                data_offset: 0,
            });
            let expected = Doing::Access {
                space: Space::Pio,
                address: port.into(),
                width,
                direction,
            };
            assert_eq!(view.look().0, expected);
        }
        for (length, width) in [
            (1, Width::Byte),
            (3, Width::Dword),
            (4, Width::Dword),
            (8, Width::Qword),
        ] {
            activity.memory(&MmioExit {
                direction: Direction::Write,
                address: ADDRESS,
                length,
                data: [0; 8],
            });
            let expected = Doing::Access {
                space: Space::Mmio,
                address: ADDRESS,
                width,
                direction: Direction::Write,
            };
            assert_eq!(view.look().0, expected);
        }
        activity.at_device(7);
        assert_eq!(view.look().0, Doing::AtDevice(7));
        assert_eq!(view.exits(), 0);
        activity.exited();
        assert_eq!((view.look().0, view.exits()), (Doing::OtherExit, 1));
    }

    #[test]
    fn the_counter_is_told_as_time() {
        let watch = Stopwatch::start();
        let (since, clock) = (counter(), Instant::now());
        while clock.elapsed() < Duration::from_millis(50) {}
        let (told, real) = (watch.elapsed(since), clock.elapsed());
        let ratio = told.as_secs_f64() / real.as_secs_f64();
        assert!((0.5..2.0).contains(&ratio), "{told:?} for {real:?}");
        assert_eq!(watch.elapsed(u64::MAX), Duration::ZERO);
    }
}
