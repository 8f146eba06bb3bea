//! A vCPU's own routing table: from a port or an address to whoever answers, without touching anything shared.
//!
//! Each vCPU has a table and, per device, a port (lane) of its own; changes come to it as messages. A lookup first
//! tries the entry that the last access used, then searches a sorted list; neither writes shared memory.
//!
//! What nobody claims reads all-ones and ignores writes, as on a bus that nobody drives. It is counted per range
//! and logged at a bounded rate, so a guest that scans ports cannot flood the host.

use crate::actors::Port;
use crate::clock::Clock;
use crate::devices::shell::{DeviceMessage, Shell};
use crate::devices::{Access, AccessClass, Direction, Published, Width};
use slog::{Logger, debug, warn};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which address space a range is in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Space {
    /// I/O ports: 0 to 0xffff.
    Pio,
    /// Guest physical memory.
    Mmio,
}

/// How an access may be sent: [`crate::devices::Device::classify`].
pub type Classify = fn(Access, Direction) -> AccessClass;

/// Who answers for a range.
#[derive(Clone)]
pub enum Target {
    /// A device actor, by its number in the table; `classify` says how each access is sent.
    Device {
        /// As returned by [`RoutingTable::connect`].
        device: usize,
        /// From [`crate::devices::Device::classify`].
        classify: Classify,
    },
    /// A word that its owner publishes: read in place, no message. Writes are ignored.
    ///
    /// In a box, so that its address is a load: in an Arc of its own it is computed from the type's alignment at each read.
    Published(Arc<Box<dyn Published>>),
    /// Which device it is is found out at each access, from words that are published: a bus whose devices move.
    Decoded(Arc<dyn Decode>),
}

/// Finds out who answers for a part of a range. Every access to it is an ask.
pub trait Decode: Send + Sync {
    /// The device's number, and what it sees of an access that counts from the start of the range.
    fn decode(&self, access: Access) -> Option<(usize, Access)>;
}

/// Where an access goes.
pub enum Hit<'a> {
    /// To a device.
    Device {
        /// Its number.
        device: usize,
        /// How it may be sent.
        classify: Classify,
        /// What the device sees.
        access: Access,
    },
    /// To a word.
    Published(&'a dyn Published, Access),
}

/// A range of a space and who answers for it.
#[derive(Clone)]
pub struct Route {
    /// First port or address.
    pub start: u64,
    /// Last port or address, inclusive, so that a range can end at the top of a space.
    pub last: u64,
    /// What the device calls [`Route::start`]: a device with several ranges sees one space of offsets.
    pub base: u64,
    /// Who answers.
    pub target: Target,
}

impl Route {
    /// What the device sees of an access to `address`, which is in this range.
    #[inline]
    pub fn access(&self, address: u64, width: Width) -> Access {
        Access {
            offset: address - self.start + self.base,
            width,
        }
    }

    /// Where an access to `address`, which is in this range, goes; `None`: nobody answers.
    #[inline(always)]
    pub fn hit(&self, address: u64, width: Width) -> Option<Hit<'_>> {
        let access = self.access(address, width);
        match &self.target {
            Target::Device { device, classify } => Some(Hit::Device {
                device: *device,
                classify: *classify,
                access,
            }),
            Target::Published(word) => Some(Hit::Published(&***word, access)),
            Target::Decoded(bus) => bus.decode(access).map(|(device, access)| Hit::Device {
                device,
                classify: |_, _| AccessClass::Ask,
                access,
            }),
        }
    }
}

/// Why a range cannot be routed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// It ends before it starts, or outside its space.
    #[error("the range {0:#x} to {1:#x} is not a range of this space")]
    NotARange(u64, u64),
    /// Another range has a part of it.
    #[error("the range {0:#x} to {1:#x} overlaps another device's")]
    Overlap(u64, u64),
}

/// One sorted list of routes.
#[derive(Clone, Default)]
struct Routes {
    sorted: Vec<Route>,
    last_hit: usize,
}

impl Routes {
    fn insert(&mut self, route: Route) -> Result<(), RouteError> {
        if route.last < route.start {
            return Err(RouteError::NotARange(route.start, route.last));
        }
        let at = self.sorted.partition_point(|other| other.start < route.start);
        let overlaps = |other: Option<&Route>| {
            other.is_some_and(|other| other.start <= route.last && route.start <= other.last)
        };
        if overlaps(self.sorted.get(at)) || at.checked_sub(1).is_some_and(|at| overlaps(self.sorted.get(at)))
        {
            return Err(RouteError::Overlap(route.start, route.last));
        }
        self.sorted.insert(at, route);
        self.last_hit = 0;
        Ok(())
    }

    fn search(&self, address: u64) -> Option<usize> {
        let at = self
            .sorted
            .partition_point(|route| route.start <= address)
            .checked_sub(1)?;
        (address <= self.sorted[at].last).then_some(at)
    }

    /// The same, remembering what was found. A few loads and one comparison where an access goes where the one before
    /// went, and out of line otherwise.
    #[inline(always)]
    fn find(&mut self, address: u64) -> Option<&Route> {
        let hit = self.sorted.get(self.last_hit);
        // One comparison for both ends; what it subtracts is what the device sees.
        if hit.is_some_and(|route| address.wrapping_sub(route.start) <= route.last - route.start) {
            self.sorted.get(self.last_hit)
        } else {
            self.find_another(address)
        }
    }

    #[cold]
    #[inline(never)]
    fn find_another(&mut self, address: u64) -> Option<&Route> {
        self.last_hit = self.search(address)?;
        self.sorted.get(self.last_hit)
    }
}

/// What a vCPU does with its exits' accesses, whatever the discipline behind.
pub trait Accesses {
    /// A read of one element; all-ones where nobody answers. Bits above the width mean nothing: who takes the value takes
    /// as many bytes as it asked for.
    fn read(&mut self, space: Space, address: u64, width: Width) -> u64;

    /// A write of one element. Bits of `value` above the width are ignored.
    fn write(&mut self, space: Space, address: u64, width: Width, value: u64);

    /// One element of an `in`.
    #[inline(always)]
    fn port_in(&mut self, port: u16, width: Width) -> u64 {
        self.read(Space::Pio, port.into(), width)
    }

    /// One element of an `out`.
    #[inline(always)]
    fn port_out(&mut self, port: u16, width: Width, value: u64) {
        self.write(Space::Pio, port.into(), width, value);
    }

    /// A load of 1 to 8 bytes.
    fn load(&mut self, address: u64, bytes: &mut [u8]) {
        for (offset, width) in pieces(address, bytes.len()) {
            let value = self
                .read(Space::Mmio, address.wrapping_add(offset as u64), width)
                .to_le_bytes();
            bytes[offset..offset + width.bytes()].copy_from_slice(&value[..width.bytes()]);
        }
    }

    /// A store of 1 to 8 bytes.
    fn store(&mut self, address: u64, bytes: &[u8]) {
        for (offset, width) in pieces(address, bytes.len()) {
            let mut value = [0; 8];
            value[..width.bytes()].copy_from_slice(&bytes[offset..offset + width.bytes()]);
            self.write(
                Space::Mmio,
                address.wrapping_add(offset as u64),
                width,
                u64::from_le_bytes(value),
            );
        }
    }
}

impl<T: Accesses> Accesses for &mut T {
    #[inline(always)]
    fn read(&mut self, space: Space, address: u64, width: Width) -> u64 {
        (**self).read(space, address, width)
    }

    #[inline(always)]
    fn write(&mut self, space: Space, address: u64, width: Width, value: u64) {
        (**self).write(space, address, width, value);
    }
}

/// A vCPU's way to the devices: one discipline of dispatch.
pub trait Bus: Send + 'static {
    /// What is held from the moment the guest was left until its exit was handled: nothing, or a lock.
    type Held<'a>: Accesses
    where
        Self: 'a;

    /// Whether [`Bus::exited`] may wait.
    const WAITS: bool = false;

    /// The guest was left; its exit is about to be looked at.
    fn exited(&mut self) -> Self::Held<'_>;

    /// Everything that this vCPU has posted is complete.
    fn settle(&mut self);

    /// Accesses that nobody claimed: the start of each range and how many there were. For the log at the end.
    fn unclaimed(&self) -> Vec<(Space, u64, u64)>;
}

/// How a message gets to a device once the table has said which: what the disciplines with a table per vCPU differ
/// in.
pub trait Reach: Send + 'static {
    /// Sends a read and waits for the value; `None` when the device is dead.
    fn ask(&mut self, device: usize, access: Access) -> Option<u64>;

    /// Sends a write. `false`: it is complete. `true`: it may not be, since `classify` lets it be posted.
    fn write(&mut self, device: usize, access: Access, value: u64, classify: Classify) -> bool;

    /// Everything posted to the device is complete.
    fn fence(&mut self, device: usize);
}

/// By messages: a port of this vCPU's own to each device.
impl Reach for Vec<Port<Shell>> {
    // Apart from the way of a published read, which is the shorter for it.
    #[inline(never)]
    fn ask(&mut self, device: usize, access: Access) -> Option<u64> {
        self[device].ask_with(|| DeviceMessage::Read(access)).ok()
    }

    #[inline(always)]
    fn write(&mut self, device: usize, access: Access, value: u64, classify: Classify) -> bool {
        // What only a busy device needs to know is not handed to an idle one.
        !write_idle(self, device, access, value) && write_busy(self, device, access, value, classify)
    }

    #[inline]
    fn fence(&mut self, device: usize) {
        let _ = self[device].fence();
    }
}

/// A write to a device that is idle; `false` if it may not be. A dead device takes nothing.
#[inline(never)]
fn write_idle(ports: &mut [Port<Shell>], device: usize, access: Access, value: u64) -> bool {
    let told = ports[device].tell_idle(|| DeviceMessage::Write(access, value));
    told.unwrap_or(true)
}

/// The others. Whether it may not be complete.
#[inline(never)]
fn write_busy(
    ports: &mut [Port<Shell>],
    device: usize,
    access: Access,
    value: u64,
    classify: Classify,
) -> bool {
    let is_post = || classify(access, Direction::Write) == AccessClass::Post;
    let told = ports[device].tell(|| DeviceMessage::Write(access, value), is_post);
    told.unwrap_or(false)
}

/// Ranges of both spaces and who answers for them.
#[derive(Clone, Default)]
pub struct RouteMap {
    pio: Routes,
    mmio: Routes,
}

impl RouteMap {
    /// Routes a range.
    ///
    /// # Errors
    /// See [`RouteError`].
    pub fn insert(&mut self, space: Space, route: Route) -> Result<(), RouteError> {
        match space {
            Space::Pio if route.last > 0xffff => Err(RouteError::NotARange(route.start, route.last)),
            Space::Pio => self.pio.insert(route),
            Space::Mmio => self.mmio.insert(route),
        }
    }

    /// Where an access goes, by search alone.
    pub fn search(&self, space: Space, address: u64, width: Width) -> Option<Hit<'_>> {
        let routes = match space {
            Space::Pio => &self.pio,
            Space::Mmio => &self.mmio,
        };
        routes
            .search(address)
            .and_then(|at| routes.sorted[at].hit(address, width))
    }

    /// The same, remembering the last route: most accesses go where the one before went.
    #[inline(always)]
    pub fn find(&mut self, space: Space, address: u64, width: Width) -> Option<Hit<'_>> {
        let route = match space {
            Space::Pio => self.pio.find(address),
            Space::Mmio => self.mmio.find(address),
        };
        route?.hit(address, width)
    }
}

/// Where a vCPU's accesses go: its own table, and its own way to each device.
pub struct RoutingTable<R: Reach = Vec<Port<Shell>>> {
    routes: RouteMap,
    reach: R,
    /// The device that may still have posts of ours to handle. One at most: see [`RoutingTable::order`].
    posted: Option<usize>,
    clock: Clock,
    unclaimed: Unclaimed,
}

impl RoutingTable {
    /// An empty table.
    pub fn new(clock: Clock, log: Logger) -> RoutingTable {
        RoutingTable::with(RouteMap::default(), Vec::new(), clock, log)
    }

    /// Adds a device and returns its number, for [`Target::Device`].
    pub fn connect(&mut self, port: Port<Shell>) -> usize {
        self.reach.push(port);
        self.reach.len() - 1
    }
}

impl<R: Reach> RoutingTable<R> {
    /// A table with these routes, whose devices are reached so.
    pub fn with(routes: RouteMap, reach: R, clock: Clock, log: Logger) -> Self {
        RoutingTable {
            routes,
            reach,
            posted: None,
            clock,
            unclaimed: Unclaimed::new(log),
        }
    }

    /// Routes a range.
    ///
    /// # Errors
    /// See [`RouteError`].
    pub fn insert(&mut self, space: Space, route: Route) -> Result<(), RouteError> {
        self.routes.insert(space, route)
    }

    /// Keeps the guest's own order: what this vCPU posted to one device is complete before it reaches another, or
    /// the guest could see effects in an order that no hardware shows. To the same device the lane keeps the order.
    #[inline]
    fn order(&mut self, device: usize) {
        if let Some(posted) = self.posted
            && posted != device
        {
            complete(&mut self.reach, posted);
            self.posted = None;
        }
    }
}

/// Waits for what was posted: seldom, and so not on the way of those that have posted nothing.
#[cold]
#[inline(never)]
fn complete(reach: &mut impl Reach, posted: usize) {
    reach.fence(posted);
}

impl<R: Reach> Accesses for RoutingTable<R> {
    #[inline(always)]
    fn read(&mut self, space: Space, address: u64, width: Width) -> u64 {
        let Some(hit) = self.routes.find(space, address, width) else {
            self.unclaimed.note(space, address, width, Direction::Read);
            return width.all_ones();
        };
        match hit {
            Hit::Device { device, access, .. } => {
                self.order(device);
                // A dead device drives nothing.
                self.reach.ask(device, access).unwrap_or(width.all_ones())
            }
            // No message, no count of references: nothing shared is written. Posts come first here too.
            Hit::Published(word, access) => {
                if let Some(posted) = self.posted {
                    complete(&mut self.reach, posted);
                    self.posted = None;
                }
                word.read(access, &self.clock)
            }
        }
    }

    #[inline(always)]
    fn write(&mut self, space: Space, address: u64, width: Width, value: u64) {
        let Some(hit) = self.routes.find(space, address, width) else {
            self.unclaimed.note(space, address, width, Direction::Write);
            return;
        };
        let Hit::Device {
            device,
            classify,
            access,
        } = hit
        else {
            return;
        };
        self.order(device);
        if self
            .reach
            .write(device, access, value & width.all_ones(), classify)
        {
            self.posted = Some(device);
        }
    }
}

impl<R: Reach> Bus for RoutingTable<R> {
    type Held<'a> = &'a mut RoutingTable<R>;

    #[inline]
    fn exited(&mut self) -> &mut RoutingTable<R> {
        self
    }

    fn settle(&mut self) {
        if let Some(posted) = self.posted.take() {
            self.reach.fence(posted);
        }
    }

    fn unclaimed(&self) -> Vec<(Space, u64, u64)> {
        self.unclaimed.counts.clone()
    }
}

/// Splits an access into parts that a bus has: 1, 2, 4 or 8 bytes, each aligned to its size within the whole. An
/// access of 1, 2, 4 or 8 bytes stays whole even if it is misaligned; that is the device's to judge.
fn pieces(address: u64, length: usize) -> impl Iterator<Item = (usize, Width)> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let rest = length.min(8).checked_sub(offset).filter(|rest| *rest > 0)?;
        let width = match Width::from_bytes(rest) {
            Some(width) if offset == 0 => width,
            _ => {
                let aligned = 1 << (address.wrapping_add(offset as u64)).trailing_zeros().min(3);
                [Width::Qword, Width::Dword, Width::Word, Width::Byte]
                    .into_iter()
                    .find(|width| width.bytes() <= rest && width.bytes() <= aligned)
                    .expect("a byte always fits")
            }
        };
        let piece = (offset, width);
        offset += width.bytes();
        Some(piece)
    })
}

/// How many ranges are told apart. What comes after goes into the last entry: a guest that touches everything must
/// not make the host's memory grow.
const UNCLAIMED_RANGES: usize = 64;
/// How many lines a burst of unclaimed accesses may log, and how long until one more may be.
const LOG_BURST: u32 = 8;
const LOG_REFILL: Duration = Duration::from_secs(10);

/// Counts accesses to nowhere.
pub(crate) struct Unclaimed {
    log: Logger,
    /// (space, start of the range, count): 16 ports or 4 KiB a range.
    pub(crate) counts: Vec<(Space, u64, u64)>,
    lines_left: u32,
    refilled: Option<Instant>,
}

impl Unclaimed {
    pub(crate) fn new(log: Logger) -> Unclaimed {
        Unclaimed {
            log,
            counts: Vec::new(),
            lines_left: LOG_BURST,
            refilled: None,
        }
    }

    #[cold]
    pub(crate) fn note(&mut self, space: Space, address: u64, width: Width, direction: Direction) {
        let range = match space {
            Space::Pio => address & !0xf,
            Space::Mmio => address & !0xfff,
        };
        let known = self
            .counts
            .iter()
            .position(|(s, r, _)| (*s, *r) == (space, range));
        if known.is_some() || self.counts.len() == UNCLAIMED_RANGES {
            self.counts[known.unwrap_or(UNCLAIMED_RANGES - 1)].2 += 1;
            return;
        }
        self.counts.push((space, range, 1));
        // The first of a range. Even those are bounded in time.
        let now = Instant::now();
        if self
            .refilled
            .is_none_or(|at| now.duration_since(at) >= LOG_REFILL)
        {
            self.refilled = Some(now);
            self.lines_left = LOG_BURST;
        }
        let what = match (space, direction) {
            (Space::Pio, Direction::Read) => "in from a port",
            (Space::Pio, Direction::Write) => "out to a port",
            (Space::Mmio, Direction::Read) => "load from an address",
            (Space::Mmio, Direction::Write) => "store to an address",
        };
        match self.lines_left {
            0 => return,
            1 => warn!(
                self.log,
                "more accesses that nobody claims; not logged for {} s",
                LOG_REFILL.as_secs()
            ),
            _ => {
                debug!(self.log, "{what} that nobody claims"; "address" => format!("{address:#x}"), "bytes" => width.bytes())
            }
        }
        self.lines_left -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(start: u64, last: u64) -> Route {
        struct Nine;
        impl Published for Nine {
            fn read(&self, access: Access, _: &Clock) -> u64 {
                0x9999_9999_9999_9900 | access.offset
            }
        }
        Route {
            start,
            last,
            base: 0,
            target: Target::Published(Arc::new(Box::new(Nine))),
        }
    }

    fn table() -> RoutingTable {
        RoutingTable::new(Clock::new(), Logger::root(slog::Discard, slog::o!()))
    }

    #[test]
    fn overlaps_and_bad_ranges_are_refused() {
        let mut table = table();
        table.insert(Space::Pio, route(0x60, 0x6f)).unwrap();
        for (start, last) in [
            (0x60, 0x6f),
            (0x5f, 0x60),
            (0x6f, 0x70),
            (0x65, 0x65),
            (0, 0xffff),
        ] {
            assert_eq!(
                table.insert(Space::Pio, route(start, last)),
                Err(RouteError::Overlap(start, last))
            );
        }
        assert_eq!(
            table.insert(Space::Pio, route(9, 8)),
            Err(RouteError::NotARange(9, 8))
        );
        assert_eq!(
            table.insert(Space::Pio, route(0, 0x1_0000)),
            Err(RouteError::NotARange(0, 0x1_0000))
        );
        table.insert(Space::Pio, route(0x70, 0x70)).unwrap();
        table.insert(Space::Pio, route(0x5f, 0x5f)).unwrap();
        table.insert(Space::Mmio, route(u64::MAX, u64::MAX)).unwrap();
    }

    #[test]
    fn edges_of_a_range_hit_and_their_neighbours_do_not() {
        let mut table = table();
        table.insert(Space::Pio, route(0x60, 0x6f)).unwrap();
        table.insert(Space::Pio, route(0x100, 0x100)).unwrap();
        for (port, expected) in [(0x60, 0x00), (0x6f, 0x0f), (0x100, 0x00)] {
            // Above the width there may be anything.
            assert_eq!(table.port_in(port, Width::Byte) & 0xff, expected, "{port:#x}");
        }
        for port in [0, 0x5f, 0x70, 0xff, 0x101, 0xffff] {
            assert_eq!(table.port_in(port, Width::Byte), 0xff, "{port:#x}");
        }
    }

    #[test]
    fn what_nobody_claims_is_all_ones_and_counted_in_bounded_memory() {
        let mut table = table();
        assert_eq!(table.port_in(0x10, Width::Byte), 0xff);
        assert_eq!(table.port_in(0x12, Width::Dword), 0xffff_ffff);
        table.port_out(0x1f, Width::Word, 1);
        assert_eq!(table.unclaimed(), [(Space::Pio, 0x10, 3)]);
        let mut bytes = [0; 8];
        for page in 0..10_000 {
            table.load(page << 12, &mut bytes);
        }
        assert_eq!(bytes, [0xff; 8]);
        assert_eq!(table.unclaimed().len(), UNCLAIMED_RANGES);
        assert_eq!(table.unclaimed().iter().map(|entry| entry.2).sum::<u64>(), 10_003);
    }

    #[test]
    fn odd_lengths_come_in_parts() {
        let parts = |address, length| {
            pieces(address, length)
                .map(|(o, w)| (o, w.bytes()))
                .collect::<Vec<_>>()
        };
        assert_eq!(parts(0x1001, 4), [(0, 4)]);
        assert_eq!(parts(0x1ffd, 3), [(0, 1), (1, 2)]);
        assert_eq!(parts(0x1000, 7), [(0, 4), (4, 2), (6, 1)]);
        assert_eq!(parts(0x1003, 5), [(0, 1), (1, 4)]);
        assert_eq!(parts(0x1000, 0), []);
        let mut table = table();
        table.insert(Space::Mmio, route(0x1000, 0x1fff)).unwrap();
        let mut bytes = [0; 3];
        table.load(0x1ffd, &mut bytes);
        assert_eq!(bytes, [0xfd, 0xfe, 0x9f]);
    }
}
