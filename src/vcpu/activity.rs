//! What a thread that uses devices is doing, published for whoever wants to know while it may be stuck.
//!
//! The thread alone writes, to a cache line of its own. So publishing costs a few stores at each exit; no system call, no
//! allocation, no line that anybody else writes, and no look at a clock: how long it has been doing the same thing is for
//! whoever looks to find out, by looking again ([`Watch`]).
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
    /// In the guest, as far as it knows.
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
    }

    /// About to run the guest.
    #[inline(always)]
    pub fn in_guest(&self) {
        self.0.word.store(IN_GUEST << DOING, Ordering::Relaxed);
    }

    /// The guest was left: an exit is to be handled. `waits`: perhaps not at once, so that it must be seen before it is
    /// known which.
    #[inline(always)]
    pub fn exited(&self, waits: bool) {
        if waits {
            self.other_exit();
        }
        // Only this thread writes it, so a load and a store suffice.
        let exits = self.0.exits.load(Ordering::Relaxed);
        self.0.exits.store(exits.wrapping_add(1), Ordering::Relaxed);
    }

    /// It is no access.
    #[inline(always)]
    pub fn other_exit(&self) {
        self.begin(OTHER_EXIT << DOING);
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
    /// What the thread is doing.
    pub fn look(&self) -> Doing {
        decode(self.0.word.load(Ordering::Relaxed))
    }

    /// How many exits there were.
    pub fn exits(&self) -> u64 {
        self.0.exits.load(Ordering::Relaxed)
    }
}

/// How long a thread has been at the same thing, as far as somebody who looks now and then can tell.
pub struct Watch {
    view: ActivityView,
    /// What was seen last: the words, and when they were first seen so.
    seen: (u64, u64),
    since: Instant,
    told: Arc<Told>,
    /// Whether it tells, or is told.
    leads: bool,
}

/// Since when a thread is at the same thing, as the one who looks often tells others.
struct Told {
    epoch: Instant,
    /// At what, as a digest of [`TAG_BITS`]; and since when, in milliseconds from `epoch`. One word, which stands for itself.
    since: AtomicU64,
}

const TAG_BITS: u32 = 24;
const MS_BITS: u32 = u64::BITS - TAG_BITS;

/// A digest of what was seen, at the place where it is in the word. Two things have the same by chance once in 2²⁴ times.
fn tag((word, exits): (u64, u64)) -> u64 {
    // Two odd numbers, of the golden ratio and of the square root of 3: multiplicative hashing [Knuth, TAOCP 3, 6.4].
    let mixed = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ exits.wrapping_mul(0xbb67_ae85_84ca_a73b);
    (mixed ^ mixed >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> MS_BITS << MS_BITS
}

impl Told {
    fn tell(&self, seen: (u64, u64), since: Instant) {
        let ms = since.saturating_duration_since(self.epoch).as_millis() as u64;
        // 34 years fit.
        self.since
            .store(tag(seen) | ms & !(u64::MAX << MS_BITS), Ordering::Relaxed);
    }

    /// `None`: it was not seen at that.
    fn since(&self, seen: (u64, u64)) -> Option<Instant> {
        let word = self.since.load(Ordering::Relaxed);
        let ms = Duration::from_millis(word & !(u64::MAX << MS_BITS));
        (word >> MS_BITS << MS_BITS == tag(seen)).then(|| self.epoch + ms)
    }
}

/// What a [`Watch`] tells.
#[derive(Clone, Copy, Debug)]
pub struct Sighting {
    /// What it does.
    pub doing: Doing,
    /// For how long at least. It may be longer by the time between two looks.
    pub age: Duration,
    /// How many exits there were.
    pub exits: u64,
}

impl Watch {
    /// From now on.
    pub fn new(view: ActivityView) -> Watch {
        let since = Instant::now();
        let told = Told {
            epoch: since,
            since: AtomicU64::new(0),
        };
        Watch {
            view,
            seen: (0, 0),
            since,
            told: Arc::new(told),
            leads: true,
        }
    }

    /// One for somebody who seldom looks: it knows since when from this one.
    pub fn second(&self) -> Watch {
        Watch {
            view: self.view.clone(),
            seen: self.seen,
            since: self.since,
            told: self.told.clone(),
            leads: false,
        }
    }

    /// Looks. The same access that was made again counts as another.
    pub fn look(&mut self, now: Instant) -> Sighting {
        let exits = self.view.exits();
        let word = self.view.0.word.load(Ordering::Relaxed);
        if self.seen != (word, exits) {
            self.seen = (word, exits);
            self.since = now;
            if self.leads {
                self.told.tell(self.seen, now);
            } else if let Some(since) = self.told.since(self.seen) {
                self.since = since;
            }
        }
        Sighting {
            doing: decode(word),
            age: now.saturating_duration_since(self.since),
            exits,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_what_is_read() {
        let activity = Activity::new();
        let view = activity.view();
        assert_eq!(view.look(), Doing::Starting);
        activity.in_guest();
        assert_eq!(view.look(), Doing::InGuest);
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
            assert_eq!(view.look(), expected);
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
            assert_eq!(view.look(), expected);
        }
        activity.at_device(7);
        assert_eq!(view.look(), Doing::AtDevice(7));
        assert_eq!(view.exits(), 0);
        activity.exited(true);
        assert_eq!((view.look(), view.exits()), (Doing::OtherExit, 1));
    }

    #[test]
    fn a_second_watch_knows_from_the_first_since_when() {
        let activity = Activity::new();
        let mut first = Watch::new(activity.view());
        let mut second = first.second();
        let begin = first.since;
        let at = |ms| begin + Duration::from_millis(ms);
        activity.exited(true);
        activity.at_device(3);
        first.look(at(100));
        assert_eq!(second.look(at(5_000)).age, Duration::from_millis(4_900));
        // It is at something else, which the first has not seen.
        activity.exited(true);
        activity.at_device(3);
        assert_eq!(second.look(at(6_000)).age, Duration::ZERO);
        first.look(at(6_100));
        assert_eq!(second.look(at(7_000)).age, Duration::from_millis(1_000));
    }

    #[test]
    fn a_watch_tells_how_long_the_same_thing_lasts() {
        let activity = Activity::new();
        let mut watch = Watch::new(activity.view());
        let begin = watch.since;
        let at = |ms| begin + Duration::from_millis(ms);
        activity.exited(true);
        activity.at_device(3);
        assert_eq!(watch.look(at(100)).age, Duration::ZERO);
        let later = watch.look(at(250));
        assert_eq!(
            (later.doing, later.age),
            (Doing::AtDevice(3), Duration::from_millis(150))
        );
        // The same again is another one.
        activity.exited(true);
        activity.at_device(3);
        assert_eq!(watch.look(at(300)).age, Duration::ZERO);
        assert_eq!(watch.look(at(301)).exits, 2);
        // A clock that goes back.
        assert_eq!(watch.look(at(0)).age, Duration::ZERO);
    }
}
