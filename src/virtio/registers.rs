//! What any transport's registers stand for: status, features and queues of one device, as a pure state machine.
//!
//! ```text
//!  RESET ──ACKNOWLEDGE, DRIVER──▶ negotiating ──FEATURES_OK──▶ queues ──DRIVER_OK──▶ live
//!    ▲                                                                               │  │
//!    └────────────────────────── status 0, at any time ──────────────────────────────┘  │ broken
//!    └──────────────────────────────────────────────────────── DEVICE_NEEDS_RESET ◀─────┘
//! ```
//!
//! What a driver does out of turn is ignored, and what it does wrong with a queue makes the device need a reset:
//! [VIRTIO 1.2 §2.1, §2.2, §3.1]. Nothing is served before DRIVER_OK, and nothing after status 0 was written.

use super::{BackendEvent, BackendNews, QUEUE_SIZE};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use virtio_bindings::virtio_config as spec;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Status bits. [VIRTIO 1.2 §2.1]
pub mod status {
    use super::spec;
    /// The driver has found the device.
    pub const ACKNOWLEDGE: u8 = spec::VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
    /// It knows how to drive it.
    pub const DRIVER: u8 = spec::VIRTIO_CONFIG_S_DRIVER as u8;
    /// It is ready.
    pub const DRIVER_OK: u8 = spec::VIRTIO_CONFIG_S_DRIVER_OK as u8;
    /// Features are agreed on.
    pub const FEATURES_OK: u8 = spec::VIRTIO_CONFIG_S_FEATURES_OK as u8;
    /// The device cannot go on.
    pub const DEVICE_NEEDS_RESET: u8 = spec::VIRTIO_CONFIG_S_NEEDS_RESET as u8;
    /// The driver has given up.
    pub const FAILED: u8 = spec::VIRTIO_CONFIG_S_FAILED as u8;
    /// What a driver may set.
    pub const BY_DRIVER: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// Feature bits that every device here has.
pub const COMMON_FEATURES: u64 = VERSION_1 | EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// No legacy interface; a driver must accept it.
const VERSION_1: u64 = 1 << spec::VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// Where a queue is, as the driver says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueSetup {
    /// Descriptors.
    pub size: u32,
    /// Descriptor table, guest physical.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// The driver has said all of it.
    pub ready: bool,
}

impl QueueSetup {
    const NEW: QueueSetup = QueueSetup {
        size: QUEUE_SIZE as u32,
        descriptors: 0,
        available: 0,
        used: 0,
        ready: false,
    };

    /// The queue, if it can be one and all of it is in memory.
    fn queue(&self, memory: &GuestMemoryMmap, features: u64) -> Option<Queue> {
        let mut queue = Queue::new(QUEUE_SIZE).ok()?;
        queue.try_set_size(u16::try_from(self.size).ok()?).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).ok()?;
        queue.set_event_idx(features & EVENT_IDX != 0);
        queue.set_ready(true);
        // The crate takes an available ring at 0 for a queue that was reset.
        (self.available != 0 && queue.is_valid(memory)).then_some(queue)
    }
}

/// What the register side needs of its queues' actors. None of this waits for the host.
pub trait Backend: Send {
    /// Has a queue served from now on.
    fn start(&mut self, index: usize, queue: Queue, features: u64, life: u32);
    /// The driver has put something into it.
    fn notify(&mut self, index: usize);
    /// When this returns the queue is served no more, and guest memory not touched for it.
    fn stop(&mut self, index: usize);
    /// When this returns, guest memory is not touched until [`Backend::resume`].
    fn suspend(&mut self);
    /// Goes on.
    fn resume(&mut self);
}

/// A field of the configuration space that a queue's actor changes and the register side reads in place: up to 32 bits, and
/// a count of the changes, which is the configuration's generation [VIRTIO 1.2 §2.5].
///
/// One word, so that field and generation change together. It stands for itself, but the interrupt that tells of it comes
/// behind: `Release` here and `Acquire` there, so that whoever comes for the interrupt finds the change.
#[derive(Clone, Debug)]
pub struct Published {
    /// Where it is in the configuration space.
    pub offset: usize,
    bytes: usize,
    word: Arc<AtomicU64>,
}

impl Published {
    /// A field of 16 bits with this value.
    pub fn new(offset: usize, value: u16) -> Published {
        Published {
            bytes: 2,
            ..Published::wide(offset, value.into())
        }
    }

    /// One of 32 bits.
    pub fn wide(offset: usize, value: u32) -> Published {
        Published {
            offset,
            bytes: 4,
            word: Arc::new(AtomicU64::new(value.into())),
        }
    }

    /// Changes it. For its one owner. Returns whether it was another one.
    pub fn set(&self, value: impl Into<u32>) -> bool {
        let value = value.into();
        let old = self.word.load(Ordering::Relaxed);
        if old as u32 == value {
            return false;
        }
        let generation = (old >> 32) as u32;
        let new = u64::from(generation.wrapping_add(1)) << 32 | u64::from(value);
        self.word.store(new, Ordering::Release);
        true
    }

    /// Its value.
    pub fn value(&self) -> u32 {
        self.word.load(Ordering::Acquire) as u32
    }

    fn generation(&self) -> u32 {
        (self.word.load(Ordering::Acquire) >> 32) as u32
    }
}

/// A field of the configuration space that the driver writes: 32 bits, for whoever wants to know. The register side is its
/// one writer; `Release` to write and `Acquire` to read, as of [`Published`].
#[derive(Clone, Debug)]
pub struct Written {
    /// Where it is in the configuration space.
    pub offset: usize,
    word: Arc<AtomicU32>,
}

impl Written {
    /// A field that is 0 until the driver writes it.
    pub fn new(offset: usize) -> Written {
        Written {
            offset,
            word: Arc::default(),
        }
    }

    /// Its value.
    pub fn value(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    fn set(&self, value: u32) {
        self.word.store(value, Ordering::Release);
    }
}

impl PartialEq for Written {
    fn eq(&self, other: &Written) -> bool {
        self.offset == other.offset && Arc::ptr_eq(&self.word, &other.word)
    }
}

impl Eq for Written {}

impl PartialEq for Published {
    fn eq(&self, other: &Published) -> bool {
        self.offset == other.offset && Arc::ptr_eq(&self.word, &other.word)
    }
}

impl Eq for Published {}

/// What a device is to its driver.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    /// Device type. [VIRTIO 1.2 §5]
    pub device_type: u32,
    /// Its own features; [`COMMON_FEATURES`] come on top.
    pub features: u64,
    /// Its configuration space.
    pub configuration: Vec<u8>,
    /// The one field of it that changes, if one does.
    pub published: Option<Published>,
    /// The one field of it that the driver may write, if one is.
    pub written: Option<Written>,
    /// How many queues.
    pub queues: usize,
}

/// A device's registers, whatever the transport.
pub struct Registers {
    identity: Identity,
    memory: GuestMemoryMmap,
    backend: Box<dyn Backend>,
    status: u8,
    driver_features: u64,
    queues: Vec<QueueSetup>,
    /// Counts starts, so that news from before a reset can be told.
    life: u32,
    /// Guest memory may not be touched: the machine is paused, or the transport says so.
    suspended: bool,
}

impl Registers {
    /// A device after reset.
    pub fn new(identity: Identity, memory: GuestMemoryMmap, backend: Box<dyn Backend>) -> Registers {
        Registers {
            queues: vec![QueueSetup::NEW; identity.queues],
            identity,
            memory,
            backend,
            status: 0,
            driver_features: 0,
            life: 0,
            suspended: false,
        }
    }

    /// What it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How often the configuration has changed.
    pub fn configuration_generation(&self) -> u32 {
        self.identity.published.as_ref().map_or(0, Published::generation)
    }

    /// Bytes of the configuration space; what is beyond its end stays as it is.
    pub fn read_configuration(&self, offset: u64, bytes: &mut [u8]) {
        let published = self.identity.published.as_ref();
        let published = published.map(|field| (field.offset, field.value(), field.bytes));
        let written = self.identity.written.as_ref();
        let written = written.map(|field| (field.offset, field.value(), 4));
        let fields = [published, written];
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        for (at, byte) in bytes.iter_mut().enumerate() {
            let Some(at) = offset.checked_add(at) else { return };
            if let Some(value) = self.identity.configuration.get(at) {
                *byte = *value;
            }
            for (start, value, size) in fields.into_iter().flatten() {
                let value = value.to_le_bytes();
                if let Some(value) = at.checked_sub(start).and_then(|at| value[..size].get(at)) {
                    *byte = *value;
                }
            }
        }
    }

    /// Writes bytes of the configuration space; what the driver may not write stays as it is.
    pub fn write_configuration(&self, offset: u64, bytes: &[u8]) {
        let (Some(field), Ok(offset)) = (&self.identity.written, usize::try_from(offset)) else {
            return;
        };
        let mut value = field.value().to_le_bytes();
        for (at, byte) in bytes.iter().enumerate() {
            let at = offset.checked_add(at).and_then(|at| at.checked_sub(field.offset));
            if let Some(place) = at.and_then(|at| value.get_mut(at)) {
                *place = *byte;
            }
        }
        field.set(u32::from_le_bytes(value));
    }

    /// All that is offered.
    pub fn device_features(&self) -> u64 {
        self.identity.features | COMMON_FEATURES
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// What the driver accepts.
    pub fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// Replaces 32 bits of what the driver accepts. Ignored once features are agreed on.
    pub fn set_driver_features(&mut self, high: bool, bits: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let shift = if high { 32 } else { 0 };
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= u64::from(bits) << shift;
    }

    /// A write of the status register. `true`: the device came to need a reset by it.
    pub fn set_status(&mut self, value: u8) -> bool {
        if value == 0 {
            self.reset();
            return false;
        }
        // A driver must not clear bits; it can only begin anew.
        let new = value & status::BY_DRIVER & !self.status;
        self.status |= new & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        if new & status::FEATURES_OK != 0 && self.features_are_acceptable() {
            self.status |= status::FEATURES_OK;
        }
        let agreed = self.status & status::FEATURES_OK != 0;
        if new & status::DRIVER_OK != 0 && agreed && self.status & status::DEVICE_NEEDS_RESET == 0 {
            self.status |= status::DRIVER_OK;
            return self.start();
        }
        false
    }

    fn features_are_acceptable(&self) -> bool {
        self.driver_features & !self.device_features() == 0 && self.driver_features & VERSION_1 != 0
    }

    /// Whether queues are served.
    pub fn live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::DEVICE_NEEDS_RESET) == status::DRIVER_OK
    }

    /// Starts the queues that are ready. `true`: one of them cannot be.
    fn start(&mut self) -> bool {
        let features = self.driver_features;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, setup) in self.queues.iter().enumerate().filter(|(_, setup)| setup.ready) {
            let Some(queue) = setup.queue(&self.memory, features) else {
                self.status |= status::DEVICE_NEEDS_RESET;
                return true;
            };
            queues.push((index, queue));
        }
        self.life = self.life.wrapping_add(1);
        for (index, queue) in queues {
            self.backend.start(index, queue, features, self.life);
        }
        if self.suspended {
            self.backend.suspend();
        }
        false
    }

    /// Back to the state after power-on, at once: what is under way is dropped.
    pub fn reset(&mut self) {
        for index in 0..self.queues.len() {
            self.backend.stop(index);
        }
        self.status = 0;
        self.driver_features = 0;
        self.queues.fill(QueueSetup::NEW);
        if let Some(field) = &self.identity.written {
            field.set(0);
        }
    }

    /// The longest that a queue can be; 0: there is no such queue.
    pub fn queue_size_max(&self, index: u32) -> u32 {
        self.queue(index).map_or(0, |_| QUEUE_SIZE.into())
    }

    /// A queue, as it was set up.
    pub fn queue(&self, index: u32) -> Option<&QueueSetup> {
        self.queues.get(index as usize)
    }

    /// A queue that may be set up: it is not ready, and the device is not live.
    pub fn queue_to_set_up(&mut self, index: u32) -> Option<&mut QueueSetup> {
        let negotiated = self.status & (status::FEATURES_OK | status::DRIVER_OK) == status::FEATURES_OK;
        self.queues
            .get_mut(index as usize)
            .filter(|setup| negotiated && !setup.ready)
    }

    /// A write of a queue's ready register.
    pub fn set_ready(&mut self, index: u32, ready: bool) {
        if ready {
            if let Some(setup) = self.queue_to_set_up(index) {
                setup.ready = true;
            }
        } else if let Some(setup) = self.queues.get_mut(index as usize) {
            setup.ready = false;
            self.backend.stop(index as usize);
        }
    }

    /// The driver notifies a queue.
    pub fn notify(&mut self, index: u32) {
        if self.live() && self.queue(index).is_some_and(|setup| setup.ready) {
            self.backend.notify(index as usize);
        }
    }

    /// News of a queue's actor. `Some`: the driver has to be told of it.
    pub fn news(&mut self, news: BackendNews) -> Option<BackendEvent> {
        if news.life != self.life || !self.live() {
            return None;
        }
        if news.event == BackendEvent::Broken {
            self.status |= status::DEVICE_NEEDS_RESET;
            // The other queues stand still too, whichever way they are notified.
            for index in 0..self.queues.len() {
                self.backend.stop(index);
            }
        }
        Some(news.event)
    }

    /// Whether guest memory may not be touched for this device. When this returns, nobody does if so.
    pub fn suspend(&mut self, suspended: bool) {
        self.suspended = suspended;
        match suspended {
            true => self.backend.suspend(),
            false => self.backend.resume(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::status::*;
    use super::*;
    use crate::virtio::testing::{Call, memory, recorded};

    #[test]
    fn a_published_field_is_read_in_place_and_counts_its_changes() {
        let (backend, _calls) = recorded();
        let field = Published::new(6, 1);
        let identity = Identity {
            device_type: 1,
            features: 0,
            configuration: (0..10).collect(),
            published: Some(field.clone()),
            written: None,
            queues: 0,
        };
        let registers = Registers::new(identity, memory(), backend);
        let read = |offset| {
            let mut bytes = [0xff; 4];
            registers.read_configuration(offset, &mut bytes);
            bytes
        };
        assert_eq!((read(4), registers.configuration_generation()), ([4, 5, 1, 0], 0));
        assert!(!field.set(1u16));
        assert!(field.set(0x1234u16));
        assert_eq!(read(7), [0x12, 8, 9, 0xff]);
        assert_eq!((read(u64::MAX - 1), read(3)), ([0xff; 4], [3, 4, 5, 0x34]));
        assert_eq!((field.value(), registers.configuration_generation()), (0x1234, 1));
    }

    #[test]
    fn a_driver_writes_what_it_may_and_a_reset_clears_it() {
        let (backend, _calls) = recorded();
        let (target, written) = (Published::wide(0, 0x0102_0304), Written::new(4));
        let identity = Identity {
            device_type: 5,
            features: 0,
            configuration: vec![9; 10],
            published: Some(target),
            written: Some(written.clone()),
            queues: 0,
        };
        let mut registers = Registers::new(identity, memory(), backend);
        let read = |registers: &Registers| {
            let mut bytes = [0xff; 12];
            registers.read_configuration(0, &mut bytes);
            bytes
        };
        assert_eq!(read(&registers), [4, 3, 2, 1, 0, 0, 0, 0, 9, 9, 0xff, 0xff]);
        registers.write_configuration(4, &[1, 2, 3, 4]);
        assert_eq!(written.value(), 0x0403_0201);
        registers.write_configuration(2, &[7, 7, 7, 8]);
        registers.write_configuration(7, &[6, 6]);
        registers.write_configuration(u64::MAX, &[5, 5]);
        assert_eq!(read(&registers), [4, 3, 2, 1, 7, 8, 3, 6, 9, 9, 0xff, 0xff]);
        registers.reset();
        assert_eq!(written.value(), 0);
    }

    fn new() -> (Registers, crossbeam_channel::Receiver<Call>) {
        let (backend, calls) = recorded();
        let identity = Identity {
            device_type: 2,
            features: 1 << 9,
            configuration: vec![1, 2, 3],
            published: None,
            written: None,
            queues: 2,
        };
        (Registers::new(identity, memory(), backend), calls)
    }

    /// Sets a queue up at addresses in memory.
    fn set_up(registers: &mut Registers, index: u32) {
        let setup = registers.queue_to_set_up(index).unwrap();
        let base = 0x1_0000 * u64::from(index + 1);
        (setup.size, setup.descriptors, setup.available, setup.used) =
            (16, base, base + 0x1000, base + 0x2000);
        registers.set_ready(index, true);
    }

    fn negotiate(registers: &mut Registers, features: u64) {
        registers.set_status(ACKNOWLEDGE);
        registers.set_status(ACKNOWLEDGE | DRIVER);
        registers.set_driver_features(false, features as u32);
        registers.set_driver_features(true, (features >> 32) as u32);
        registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    const USED_0: crate::devices::Queues = crate::devices::Queues(1);
    const ALL: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

    #[test]
    fn a_driver_by_the_book_has_its_ready_queues_served() {
        let (mut registers, calls) = new();
        negotiate(&mut registers, VERSION_1 | EVENT_IDX | 1 << 9);
        assert_eq!(registers.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        set_up(&mut registers, 1);
        assert!(!registers.set_status(ALL));
        assert_eq!(registers.status(), ALL);
        let started = Call::Start {
            index: 1,
            size: 16,
            event_idx: true,
            life: 1,
        };
        assert_eq!(calls.try_iter().collect::<Vec<_>>(), [started]);
        registers.notify(0);
        registers.notify(1);
        registers.notify(2);
        assert_eq!(calls.try_iter().collect::<Vec<_>>(), [Call::Notify(1)]);
    }

    #[test]
    fn which_features_are_accepted() {
        let offered = COMMON_FEATURES | 1 << 9;
        for (features, accepted) in [
            (VERSION_1, true),
            (offered, true),
            (0, false),
            (1 << 9, false),
            (VERSION_1 | 1 << 5, false),
            (VERSION_1 | 1 << 34, false),
            (u64::MAX, false),
        ] {
            let (mut registers, _calls) = new();
            negotiate(&mut registers, features);
            let agreed = registers.status() & FEATURES_OK != 0;
            assert_eq!(agreed, accepted, "{features:#x}");
        }
    }

    #[test]
    fn out_of_turn_is_ignored() {
        let (mut registers, calls) = new();
        // No DRIVER_OK without features; no queue without features.
        registers.set_status(DRIVER_OK);
        assert_eq!(registers.status(), 0);
        assert!(registers.queue_to_set_up(0).is_none());
        registers.set_ready(0, true);
        assert!(!registers.queue(0).unwrap().ready);
        // Features are settled, and a queue that is ready too.
        negotiate(&mut registers, VERSION_1);
        registers.set_driver_features(false, 1 << 9);
        set_up(&mut registers, 0);
        assert!(registers.queue_to_set_up(0).is_none());
        // Bits cannot be cleared, and those of the device not be set.
        registers.set_status(ACKNOWLEDGE | DEVICE_NEEDS_RESET | 0x30);
        assert_eq!(registers.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        registers.set_status(ALL);
        registers.set_status(ALL);
        assert!(registers.queue_to_set_up(1).is_none());
        registers.set_ready(1, true);
        assert!(!registers.queue(1).unwrap().ready);
        assert_eq!(calls.try_iter().count(), 1, "started once");
    }

    #[test]
    fn a_queue_that_cannot_be_needs_a_reset() {
        type Spoil = fn(&mut QueueSetup);
        let spoils: [Spoil; 11] = [
            |setup| setup.size = 0,
            |setup| setup.size = 3,
            |setup| setup.size = 512,
            |setup| setup.size = 0x1_0010,
            |setup| setup.descriptors = 0xffff_ffff_ffff_fff0,
            |setup| setup.descriptors = 8,
            |setup| setup.available = 0,
            |setup| setup.available = 1,
            |setup| setup.used = 2,
            |setup| setup.used = 1 << 40,
            |setup| setup.descriptors = crate::virtio::testing::MEMORY_BYTES - 16,
        ];
        for (number, spoil) in spoils.into_iter().enumerate() {
            let (mut registers, calls) = new();
            negotiate(&mut registers, VERSION_1);
            set_up(&mut registers, 0);
            set_up(&mut registers, 1);
            spoil(&mut registers.queues[1]);
            assert!(registers.set_status(ALL), "{number}");
            assert_ne!(registers.status() & DEVICE_NEEDS_RESET, 0, "{number}");
            assert_eq!(calls.try_iter().count(), 0, "none is served");
            registers.notify(0);
            assert_eq!(calls.try_iter().count(), 0);
            registers.set_status(0);
            assert_eq!(registers.status(), 0);
        }
    }

    #[test]
    fn a_reset_stops_everything_and_news_from_before_are_nobodys() {
        let (mut registers, calls) = new();
        let start = |registers: &mut Registers| {
            negotiate(registers, VERSION_1);
            set_up(registers, 0);
            registers.set_status(ALL);
            registers.life
        };
        let first = start(&mut registers);
        assert_eq!(
            registers.news(BackendNews::new(first, BackendEvent::Used(USED_0))),
            Some(BackendEvent::Used(USED_0))
        );
        registers.set_status(0);
        let stopped = calls.try_iter().filter(|call| matches!(call, Call::Stop(_)));
        assert_eq!(stopped.count(), 2);
        assert_eq!(
            registers.news(BackendNews::new(first, BackendEvent::Broken)),
            None
        );
        assert_eq!(
            (registers.status(), registers.queue(0)),
            (0, Some(&QueueSetup::NEW))
        );
        let second = start(&mut registers);
        assert_eq!(
            registers.news(BackendNews::new(first, BackendEvent::Broken)),
            None
        );
        assert_eq!(registers.status(), ALL);
        let broken = BackendNews::new(second, BackendEvent::Broken);
        assert_eq!(registers.news(broken), Some(BackendEvent::Broken));
        assert_eq!(registers.status(), ALL | DEVICE_NEEDS_RESET);
        assert_eq!(registers.news(broken), None, "told once");
    }

    #[test]
    fn a_queue_alone_can_be_stopped() {
        let (mut registers, calls) = new();
        negotiate(&mut registers, VERSION_1);
        set_up(&mut registers, 0);
        registers.set_status(ALL);
        calls.try_iter().count();
        registers.set_ready(0, false);
        registers.notify(0);
        assert_eq!(calls.try_iter().collect::<Vec<_>>(), [Call::Stop(0)]);
        assert!(!registers.queue(0).unwrap().ready);
    }
}
