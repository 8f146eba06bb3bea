//! Devices: pure state machines that know registers, and nothing of threads, descriptors, channels or clocks.
//!
//! A device sees the world through [`Context`] and is driven by calls that the shell makes, one at a time.
//! Three things are functions of a device's state and are read by the shell after every call, so no device can
//! forget to signal them: the level of its interrupt line ([`Device::interrupt`]), when it wants to be called for
//! the passing of time ([`Device::deadline`]), and nothing else.
//!
//! What a guest does wrong is never an error here: a device answers as its datasheet says, or with all-ones.
//!
//! | device | ports | line | file |
//! |---|---|---|---|
//! | 16550A serial port | 0x3f8 to 0x3ff | 4 | [`uart16550`] |
//! | MC146818 real-time clock and CMOS memory | 0x70, 0x71 | 8 | [`rtc`] |
//! | i8042, reset only | 0x60, 0x64 | | [`i8042`] |
//! | ACPI PM1a and reset register | 0x600 to 0x605, 0x60c | 9 (SCI) | [`acpi_pm`] |
//! | ACPI PM timer, a published read | 0x608 to 0x60b | | [`acpi_pm::PmTimer`] |
//! | debug exit | 0xf4 | | [`debug_exit`] |
//! | debug console | 0xe9 | | [`debug_console`] |
//! | pvpanic | 0x505 | | [`pvpanic`] |
//! | PCI configuration, empty bus (a bus with something on it: [`crate::pci`]) | 0xcf8 to 0xcff | | [`pci_config`] |
//! | delay, for measurements, only when asked for | 0xea0 | | [`delay`] |
//!
//! Virtio devices are in [`crate::virtio`]. The numbers are in [`crate::boot::layout::io`]. Each file has `CLAIMS`: the ranges to route to the device, as offsets
//! from its base port there. [`Access::offset`] counts from that base in all of them, so a device with two ranges sees
//! its second at the offset that it has in `CLAIMS`.

pub mod acpi_pm;
mod byte_lanes;
mod calendar;
#[cfg(test)]
mod conformance;
pub mod debug_console;
pub mod debug_exit;
pub mod delay;
pub mod i8042;
pub mod pci_config;
pub mod pvpanic;
pub mod rtc;
pub mod shell;
#[doc(hidden)]
pub mod tarpit;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
pub mod uart16550;

use crate::clock::Clock;
pub use crate::clock::Nanos;
use std::fmt;

/// Width of one access: what a guest can express with one `in`, `out` or load or store that leaves KVM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
// 8 bytes, so that messages and exits hold no part that is written as a byte and copied as a word: such a copy waits for the
// write to reach the cache, which takes longer than the rest of a turn.
#[repr(u64)]
pub enum Width {
    /// 8 bits.
    Byte = 1,
    /// 16 bits.
    Word = 2,
    /// 32 bits.
    Dword = 4,
    /// 64 bits; MMIO only.
    Qword = 8,
}

impl Width {
    /// The width in bytes: 1, 2, 4 or 8.
    pub const fn bytes(self) -> usize {
        self as usize
    }

    /// All-ones in this width: what a bus that nobody drives reads as.
    pub const fn all_ones(self) -> u64 {
        u64::MAX >> (64 - 8 * self as u32)
    }

    /// The width for a length in bytes, if it is one of 1, 2, 4 and 8.
    pub const fn from_bytes(bytes: usize) -> Option<Width> {
        match bytes {
            1 => Some(Width::Byte),
            2 => Some(Width::Word),
            4 => Some(Width::Dword),
            8 => Some(Width::Qword),
            _ => None,
        }
    }
}

/// Which register an access touches: the offset from the start of the device's range, and how wide.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Access {
    /// Bytes from the start of the range that the device claimed.
    pub offset: u64,
    /// How many bytes.
    pub width: Width,
}

/// What a device may ask of the machine that it is part of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum MachineRequest {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked to be reset (ACPI reset register, i8042 pulse).
    Reset,
    /// The guest gave an exit status and wants to end (debug-exit port).
    Exit(u8),
    /// The guest's kernel reports that it panicked (pvpanic).
    GuestPanic,
}

/// No deadline: 584 years after the machine's start.
pub const NEVER: Nanos = Nanos(u64::MAX);

/// What a device's state says to the outside. Fits into two registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outputs {
    /// [`Device::deadline`], or [`NEVER`].
    pub due: Nanos,
    /// [`Device::interrupt`].
    pub level: bool,
}

/// The world, as a device may see it during one call.
///
/// The shell implements it for real; tests implement it with a few vectors.
pub trait Context {
    /// Guest time now.
    fn now(&self) -> Nanos;

    /// The host's wall clock in nanoseconds since 1970-01-01 00:00:00 UTC.
    fn wall_clock_ns(&self) -> i64;

    /// Gives one byte to the device's host side. Never blocks. `true`: there is room for more; `false`: this byte
    /// was taken but the device must not send another until [`Device::output_ready`].
    fn transmit(&mut self, byte: u8) -> bool;

    /// Counts one byte that was meant for the host side and could not be kept, because the guest sent it while there
    /// was no room. The machine tells the sum at its end.
    fn lose(&mut self);

    /// Takes one byte from the device's host side, if there is one. Never blocks. After `None` the device is told
    /// by [`Device::input_ready`] when there is more.
    fn receive(&mut self) -> Option<u8>;

    /// Asks something of the machine. Takes effect after the current call; the first request of a machine wins.
    fn request(&mut self, request: MachineRequest);
}

/// What an actor behind a device (a disk's queue) tells its register side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackendEvent {
    /// Buffers of these queues were used and the driver wants to know. Only when interrupts go by message.
    Used(Queues),
    /// A queue cannot be served any more.
    Broken,
    /// What the device publishes of its configuration has changed. Only when interrupts go by message.
    Reconfigured,
}

/// A set of a device's queues, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Queues(pub u64);

impl Queues {
    /// The most queues of a device.
    pub const MOST: usize = u64::BITS as usize;

    /// One queue.
    pub fn one(index: usize) -> Queues {
        debug_assert!(index < Queues::MOST);
        Queues(1 << index)
    }

    /// Whether the queue is one of them.
    pub fn has(self, index: usize) -> bool {
        index < Queues::MOST && self.0 >> index & 1 != 0
    }
}

/// The same with the life of the device that it belongs to: news from before a reset are nobody's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackendNews {
    /// As given with the start.
    pub life: u32,
    /// What happened.
    pub event: BackendEvent,
}

impl BackendNews {
    /// The event of a life.
    pub fn new(life: u32, event: BackendEvent) -> BackendNews {
        BackendNews { life, event }
    }

    /// What is left to tell when `later` comes before this could be told. What is of an earlier life is nobody's.
    #[must_use]
    pub fn and(self, later: BackendNews) -> BackendNews {
        let event = match (self.event, later.event) {
            _ if self.life != later.life => later.event,
            (BackendEvent::Broken, _) | (_, BackendEvent::Broken) => BackendEvent::Broken,
            (BackendEvent::Used(Queues(some)), BackendEvent::Used(Queues(more))) => {
                BackendEvent::Used(Queues(some | more))
            }
            _ => later.event,
        };
        BackendNews::new(later.life, event)
    }
}

/// How an access may reach its device. The default is [`AccessClass::Ask`]; everything else is opted into per
/// register, with the reason beside it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum AccessClass {
    /// The vCPU waits until the access is complete.
    Ask,
    /// A write that the vCPU does not wait for. Ordered after this vCPU's earlier accesses to the same device,
    /// and complete before this vCPU's next access to any other device.
    ///
    /// There is no order among vCPUs: what one posts under a guest's lock may come after what another, who took the
    /// lock next, does to the same device. So a register whose writes a guest orders by a lock (a FIFO, an index)
    /// must not be posted, only one whose writes stand for themselves.
    Post,
}

/// A register that runs by itself (a timer's count): its owner publishes what is needed to compute it, and vCPUs
/// read it in place, without a message.
pub trait Published: Send + Sync {
    /// The register's value now. Only who needs the time looks at the clock, which costs more than all the rest.
    fn read(&self, access: Access, clock: &Clock) -> u64;
}

/// One range to route to a device, relative to the device's base port or address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Claim {
    /// Where it starts, in bytes from the base.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

impl Claim {
    /// The range of `len` bytes at `offset`.
    pub const fn new(offset: u64, len: u64) -> Claim {
        Claim { offset, len }
    }
}

/// Which way an access goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u64)] // As Width.
pub enum Direction {
    /// The guest reads.
    Read,
    /// The guest writes.
    Write,
}

/// A device: registers and what they do. Implementations must not panic whatever a guest does.
pub trait Device: Send {
    /// A short name for logs: `serial0`, `rtc`.
    fn name(&self) -> &'static str;

    /// Reads a register. Bits above the width are ignored by the caller. Registers that do not exist, and widths
    /// that the hardware does not decode, read as all-ones.
    fn read(&mut self, cx: &mut dyn Context, access: Access) -> u64;

    /// Writes a register. Bits of `value` above the width are zero. What does not exist is ignored.
    fn write(&mut self, cx: &mut dyn Context, access: Access, value: u64);

    /// The level of the interrupt line, computed from the state alone.
    fn interrupt(&self) -> bool {
        false
    }

    /// When this device next wants [`Device::tick`], computed from the state alone.
    fn deadline(&self) -> Option<Nanos> {
        None
    }

    /// Both, by one call: the shell looks after every message. Nobody implements it otherwise.
    fn outputs(&self) -> Outputs {
        Outputs {
            due: self.deadline().unwrap_or(NEVER),
            level: self.interrupt(),
        }
    }

    /// Time has passed: called at or after [`Device::deadline`], never before.
    fn tick(&mut self, _cx: &mut dyn Context) {}

    /// There may be bytes for [`Context::receive`].
    fn input_ready(&mut self, _cx: &mut dyn Context) {}

    /// There is room for [`Context::transmit`] again.
    fn output_ready(&mut self, _cx: &mut dyn Context) {}

    /// An actor behind the device has something to tell.
    fn backend_news(&mut self, _cx: &mut dyn Context, _news: BackendNews) {}

    /// How many actors behind the device post to it.
    fn backends(&self) -> usize {
        0
    }

    /// Guest time stands still. When this returns, nobody behind the device touches guest memory.
    fn pause(&mut self, _cx: &mut dyn Context) {}

    /// Guest time goes on.
    fn resume(&mut self, _cx: &mut dyn Context) {}

    /// Back to the state after power-on. What the host side holds (bytes typed but not read) is not the device's
    /// and stays.
    fn reset(&mut self, cx: &mut dyn Context);

    /// How an access to this register may be sent. Asked once per access on the sender's side, so it must not
    /// depend on state: a plain function.
    fn classify(&self) -> fn(Access, Direction) -> AccessClass {
        |_, _| AccessClass::Ask
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "+{:#x}/{}", self.offset, self.width.bytes())
    }
}
