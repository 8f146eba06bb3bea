//! The driver's side, for tests: guest memory with one queue in it, and register sides without actors behind.

use super::interrupt::{Latch, MsixWord};
use super::mmio::Mmio;
use super::pci::{Doorbells, Function, Wiring};
use super::queue::{Handler, QueueHandle, Remote, queue_actor};
use super::registers::{Backend, Identity, Registers};
use super::{BackendEvent, QUEUE_SIZE};
use crate::devices::shell::DeviceMessage;
use crate::host::events::Tell;
use crate::pci::decode::Bus;
use crate::pci::msix::{Message, MessageWire};
use crossbeam_channel::{Receiver, Sender, unbounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use slog::{Drain, Logger, OwnedKVList, Record, o};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Hang protection.
pub const LIMIT: Duration = Duration::from_secs(30);

/// How much memory a test's guest has.
pub const MEMORY_BYTES: u64 = 1 << 20;

/// Guest memory.
pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).unwrap()
}

/// What a register side asked of its queues.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Call {
    Start {
        index: usize,
        size: u16,
        event_idx: bool,
        life: u32,
    },
    Notify(usize),
    Stop(usize),
    Suspend,
    Resume,
}

struct Recorded(Sender<Call>);

impl Backend for Recorded {
    fn start(&mut self, index: usize, queue: Queue, _features: u64, life: u32) {
        let (size, event_idx) = (queue.size(), queue.event_idx_enabled());
        let call = Call::Start {
            index,
            size,
            event_idx,
            life,
        };
        let _ = self.0.send(call);
    }
    fn notify(&mut self, index: usize) {
        let _ = self.0.send(Call::Notify(index));
    }
    fn stop(&mut self, index: usize) {
        let _ = self.0.send(Call::Stop(index));
    }
    fn suspend(&mut self) {
        let _ = self.0.send(Call::Suspend);
    }
    fn resume(&mut self) {
        let _ = self.0.send(Call::Resume);
    }
}

/// A backend that only notes what it is asked.
pub fn recorded() -> (Box<dyn Backend>, Receiver<Call>) {
    let (calls, made) = unbounded();
    (Box::new(Recorded(calls)), made)
}

fn identity() -> Identity {
    Identity {
        device_type: 2,
        features: 1 << 9,
        configuration: (0..60).collect(),
        published: None,
        written: None,
        queues: 2,
    }
}

/// A register side with two queues and some configuration, and what it asks of its queues. `latched`: with an irqfd.
pub fn mmio(latched: bool) -> (Mmio, Receiver<Call>) {
    let (backend, calls) = recorded();
    let latch = latched.then(|| Latch::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
    (
        Mmio::new("virtio", Registers::new(identity(), memory(), backend), latch),
        calls,
    )
}

/// A wire that tells what it sends.
struct ToldWire {
    source: usize,
    to: Option<Message>,
    pending: bool,
    sent: Sender<(usize, Message)>,
}

impl MessageWire for ToldWire {
    fn aim(&mut self, to: Option<Message>) {
        assert_ne!(to, self.to, "changes only");
        self.to = to;
        if to.is_some() && std::mem::take(&mut self.pending) {
            self.signal();
        }
    }
    fn signal(&mut self) {
        match self.to {
            Some(message) => drop(self.sent.send((self.source, message))),
            None => self.pending = true,
        }
    }
    fn is_pending(&self) -> bool {
        self.pending
    }
    fn forget(&mut self) {
        self.pending = false;
    }
}

/// Doorbells that tell where they are.
struct ToldDoorbells(Sender<Option<u64>>);

impl Doorbells for ToldDoorbells {
    fn place(&mut self, registers: Option<u64>) {
        let _ = self.0.send(registers);
    }
}

/// What can be seen of a function from outside.
pub struct Seen {
    /// What it asks of its queues.
    pub calls: Receiver<Call>,
    /// Messages, with their sources.
    pub sent: Receiver<(usize, Message)>,
    /// Where its doorbells were put.
    pub doorbells: Receiver<Option<u64>>,
    /// Its bus.
    pub bus: Arc<Bus>,
}

/// The slot of [`pci`].
pub const SLOT: usize = 1;
/// Where its BAR is at power-on.
pub const ADDRESS: u64 = 0x1_0000_8000;

/// The same device as of [`mmio`], as a function.
pub fn pci() -> (Function, Seen) {
    let (backend, calls) = recorded();
    let (tell, sent) = unbounded();
    let wire = |source| {
        Box::new(ToldWire {
            source,
            to: None,
            pending: false,
            sent: tell.clone(),
        }) as Box<dyn MessageWire>
    };
    let (place, doorbells) = unbounded();
    let bus = Bus::new([0xc000_0000..0xe000_0000, 0x1_0000_0000..0x2_0000_0000]);
    let wiring = Wiring {
        bus: bus.clone(),
        slot: SLOT,
        address: ADDRESS,
        wires: (0..3).map(wire).collect(),
        doorbells: Box::new(ToldDoorbells(place)),
        msix_word: Some(Arc::new(MsixWord::new())),
    };
    let registers = Registers::new(identity(), memory(), backend);
    let seen = Seen {
        calls,
        sent,
        doorbells,
        bus,
    };
    (Function::new("virtio_pci", registers, wiring), seen)
}

struct Kept(Sender<String>);

impl Drain for Kept {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), slog::Never> {
        let _ = self.0.send(record.msg().to_string());
        Ok(())
    }
}

/// A log that is kept.
pub fn kept_log() -> (Logger, Receiver<String>) {
    let (lines, kept) = unbounded();
    (Logger::root(Kept(lines).fuse(), o!()), kept)
}

struct News(Sender<DeviceMessage>);

impl Tell for News {
    fn try_tell(&mut self, message: DeviceMessage) -> bool {
        self.0.send(message).is_ok()
    }
}

/// A buffer that the driver gives to the device to read (`R`) or to write (`W`): address and bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Buffer {
    R(u64, u32),
    W(u64, u32),
}
pub use Buffer::{R, W};

/// What became of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// So many bytes were written.
    Used(u32),
    /// The device needs a reset.
    Broken,
}

pub const DESCRIPTORS: u64 = 0;
pub const AVAILABLE: u64 = 0x2000;
pub const USED: u64 = 0x3000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Whether somebody has rung, and nobody has heard it.
fn ready(bell: &EventFd) -> bool {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open as long as `bell` is, which outlives this function.
    let bell = unsafe { BorrowedFd::borrow_raw(bell.as_raw_fd()) };
    let mut polled = [PollFd::new(bell, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// A queue's actor on its thread, and a driver for it.
pub struct Rig {
    pub memory: GuestMemoryMmap,
    pub remote: Remote,
    pub news: Receiver<DeviceMessage>,
    handle: Option<QueueHandle>,
    pub size: u16,
    pub available: u16,
    used: u16,
    pub life: u32,
    /// What the driver accepts.
    pub features: u64,
}

impl Rig {
    /// A queue that is served.
    pub fn new(handler: Box<dyn Handler>) -> Rig {
        Rig::with_log(handler, Logger::root(slog::Discard, o!()))
    }

    pub fn with_log(handler: Box<dyn Handler>, log: Logger) -> Rig {
        let (news, told) = unbounded();
        Rig::with_tell(handler, log, Box::new(News(news)), told)
    }

    /// `tell` has to send to `told`.
    pub fn with_tell(
        handler: Box<dyn Handler>,
        log: Logger,
        tell: Box<dyn Tell>,
        told: Receiver<DeviceMessage>,
    ) -> Rig {
        let memory = memory();
        let (actor, remote) = queue_actor("test".into(), 0, handler, memory.clone(), None, log).unwrap();
        let handle = actor.spawn(tell).unwrap();
        let mut rig = Rig {
            memory,
            remote,
            news: told,
            handle: Some(handle),
            size: QUEUE_SIZE,
            available: 0,
            used: 0,
            life: 0,
            features: 0,
        };
        rig.start();
        rig
    }

    /// Resets and starts the queue: the rings are empty.
    pub fn start(&mut self) {
        self.remote.stop();
        self.write(AVAILABLE, &[0; 0x400]);
        self.write(USED, &[0; 0x1000]);
        (self.available, self.used) = (0, 0);
        self.life += 1;
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.try_set_size(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(DESCRIPTORS))
            .unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        self.remote.start(queue, self.features, self.life);
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// A sum over all of memory: whether anything was touched.
    pub fn memory_sum(&self) -> u64 {
        let bytes = self.read(0, MEMORY_BYTES as usize);
        let words = bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        words.fold(0, |sum: u64, word| sum.rotate_left(7) ^ word)
    }

    /// Writes a descriptor into a table.
    pub fn describe(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    /// Makes a chain available, by its head.
    pub fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % self.size);
        self.write(slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.publish(self.available);
    }

    /// Rings, and waits until the actor has served what it could. (It takes a ring only when it has nothing left to do, so
    /// the second is taken after what came with the first.)
    pub fn settle(&self) {
        let deadline = Instant::now() + LIMIT;
        for _ in 0..2 {
            self.remote.ring();
            let bell = self.remote.bell();
            while ready(bell) {
                assert!(Instant::now() < deadline, "the actor does not come to its bell");
                std::thread::yield_now();
            }
        }
    }

    /// Sets the available ring's index.
    pub fn publish(&self, index: u16) {
        let at = GuestAddress(AVAILABLE + 2);
        let order = std::sync::atomic::Ordering::Release;
        self.memory.store(index.to_le(), at, order).unwrap();
    }

    /// Offers the buffers as one chain and waits for what becomes of it.
    pub fn request(&mut self, buffers: &[Buffer]) -> Outcome {
        self.provide(buffers);
        self.outcome()
    }

    /// Waits until the driver is told of a change of the configuration.
    pub fn reconfigured(&mut self) {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.news.recv_deadline(deadline).expect("news within the limit") {
                DeviceMessage::Backend(news) if news.event == BackendEvent::Reconfigured => return,
                _ => {}
            }
        }
    }

    /// Offers the buffers as one chain.
    pub fn provide(&mut self, buffers: &[Buffer]) {
        for (index, buffer) in buffers.iter().enumerate() {
            let next = if index + 1 < buffers.len() { NEXT } else { 0 };
            let (address, length, flags) = match *buffer {
                R(address, length) => (address, length, next),
                W(address, length) => (address, length, next | WRITE),
            };
            self.describe(
                DESCRIPTORS,
                index as u16,
                address,
                length,
                flags,
                index as u16 + 1,
            );
        }
        if buffers.is_empty() {
            self.describe(DESCRIPTORS, 0, 0, 0, 0, 0);
        }
        self.offer(0);
        self.remote.ring();
    }

    /// Waits until the next chain is given back, whether it is told or not; returns how many bytes were written to it.
    pub fn used_next(&mut self) -> u32 {
        let deadline = Instant::now() + LIMIT;
        loop {
            let index = self
                .memory
                .load::<u16>(GuestAddress(USED + 2), std::sync::atomic::Ordering::Acquire);
            if index.unwrap() != self.used {
                return self.take_used();
            }
            assert!(Instant::now() < deadline, "no chain was given back");
            let _ = self.news.recv_timeout(Duration::from_millis(10));
        }
    }

    /// The next chain that was given back, by its head, if there is one.
    pub fn poll_used(&mut self) -> Option<u16> {
        let index = self
            .memory
            .load::<u16>(GuestAddress(USED + 2), std::sync::atomic::Ordering::Acquire);
        if index.unwrap() == self.used {
            return None;
        }
        let slot = USED + 4 + 8 * u64::from(self.used % self.size);
        let head = self.read(slot, 2);
        self.take_used();
        Some(u16::from_le_bytes(head.try_into().unwrap()))
    }

    /// Takes the next chain that was given back.
    pub fn take_used(&mut self) -> u32 {
        let slot = USED + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        u32::from_le_bytes(self.read(slot + 4, 4).try_into().unwrap())
    }

    /// Waits for what becomes of the oldest request.
    pub fn outcome(&mut self) -> Outcome {
        let deadline = Instant::now() + LIMIT;
        loop {
            let news = self.news.recv_deadline(deadline).expect("news within the limit");
            let DeviceMessage::Backend(news) = news else {
                panic!("{news:?}")
            };
            if news.life != self.life || news.event == BackendEvent::Reconfigured {
                continue;
            }
            if news.event == BackendEvent::Broken {
                return Outcome::Broken;
            }
            return Outcome::Used(self.take_used());
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let handle = self.handle.take().expect("until now");
        handle.end();
        let joined = handle.join(Instant::now() + LIMIT);
        if !std::thread::panicking() {
            joined.expect("the actor ends when it is told to");
        }
    }
}
