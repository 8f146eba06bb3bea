//! virtio-mmio, version 2: a device's registers in a page of memory. [VIRTIO 1.2 §4.2]
//!
//! Registers are 32 bits wide and decode as whole, aligned words only; the configuration space from 0x100 on takes any
//! width. What does not exist, is write-only, or is accessed in another width reads all-ones, and writes to it are
//! ignored. Legacy drivers are not served: the version register says 2.
//!
//! What a hostile guest can try: any register in any order. All it can reach is the state machine in `registers.rs`,
//! which ignores what is out of turn. Its own memory is touched by the queues' actors alone. A reset takes effect before
//! the write returns, so a driver that does not look at the status afterwards is safe too.

use super::interrupt::{CONFIGURATION, Latch, USED};
use super::registers::Registers;
use super::{BackendEvent, BackendNews};
use crate::devices::{Access, Claim, Context, Device, Width};
use virtio_bindings::virtio_mmio as spec;

/// How much room a device has, bytes: a page, so that a guest can map each by itself.
pub const WINDOW_BYTES: u64 = 0x1000;

/// What to claim.
pub const CLAIMS: &[Claim] = &[Claim::new(0, WINDOW_BYTES)];

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// What the driver may print; nothing depends on it. "ACTV".
const VENDOR: u32 = u32::from_le_bytes(*b"ACTV");
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// Offset of the register that a queue notification goes to.
pub const QUEUE_NOTIFY: u64 = spec::VIRTIO_MMIO_QUEUE_NOTIFY as u64;
const CONFIGURATION_SPACE: u64 = spec::VIRTIO_MMIO_CONFIG as u64;

/// Where interrupts are pending.
enum Pending {
    /// In a word that the queues' actors set too, and their irqfd.
    Shared(Latch),
    /// In the register side alone; the line is a function of it.
    Own(u32),
}

/// A virtio device as a guest sees it.
pub struct Mmio {
    name: &'static str,
    registers: Registers,
    pending: Pending,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
}

impl Mmio {
    /// A device after reset. `latch`: what its queues' actors raise; without it they send messages.
    pub fn new(name: &'static str, registers: Registers, latch: Option<Latch>) -> Mmio {
        Mmio {
            name,
            registers,
            pending: latch.map_or(Pending::Own(0), Pending::Shared),
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        }
    }

    fn raise(&mut self, bit: u32) {
        match &mut self.pending {
            Pending::Shared(latch) => latch.raise(bit),
            Pending::Own(pending) => *pending |= bit,
        }
    }

    fn pending(&self) -> u32 {
        match &self.pending {
            Pending::Shared(latch) => latch.status(),
            Pending::Own(pending) => *pending,
        }
    }

    fn acknowledge(&mut self, bits: u32) {
        match &mut self.pending {
            Pending::Shared(latch) => latch.acknowledge(bits),
            Pending::Own(pending) => *pending &= !bits,
        }
    }

    fn back_to_new(&mut self) {
        self.registers.reset();
        // Behind the reset: no actor sets a bit from here on.
        self.acknowledge(!0);
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
    }

    fn read_register(&self, offset: u32) -> Option<u32> {
        Some(match offset {
            spec::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            spec::VIRTIO_MMIO_VERSION => VERSION,
            spec::VIRTIO_MMIO_DEVICE_ID => self.registers.identity().device_type,
            spec::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            spec::VIRTIO_MMIO_DEVICE_FEATURES => {
                let features = self.registers.device_features();
                match self.device_features_select {
                    0 => features as u32,
                    1 => (features >> 32) as u32,
                    _ => 0,
                }
            }
            spec::VIRTIO_MMIO_QUEUE_NUM_MAX => self.registers.queue_size_max(self.queue_select),
            spec::VIRTIO_MMIO_QUEUE_READY => self
                .registers
                .queue(self.queue_select)
                .is_some_and(|q| q.ready)
                .into(),
            spec::VIRTIO_MMIO_INTERRUPT_STATUS => self.pending(),
            spec::VIRTIO_MMIO_STATUS => self.registers.status().into(),
            spec::VIRTIO_MMIO_SHM_LEN_LOW
            | spec::VIRTIO_MMIO_SHM_LEN_HIGH
            | spec::VIRTIO_MMIO_SHM_BASE_LOW
            | spec::VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            spec::VIRTIO_MMIO_CONFIG_GENERATION => self.registers.configuration_generation(),
            _ => return None,
        })
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        let select = self.queue_select;
        match offset {
            spec::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            spec::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            spec::VIRTIO_MMIO_DRIVER_FEATURES if self.driver_features_select < 2 => {
                self.registers
                    .set_driver_features(self.driver_features_select == 1, value);
            }
            spec::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            spec::VIRTIO_MMIO_QUEUE_READY => self.registers.set_ready(select, value & 1 != 0),
            spec::VIRTIO_MMIO_QUEUE_NOTIFY => self.registers.notify(value),
            spec::VIRTIO_MMIO_INTERRUPT_ACK => self.acknowledge(value),
            spec::VIRTIO_MMIO_STATUS if value & 0xff == 0 => self.back_to_new(),
            spec::VIRTIO_MMIO_STATUS => {
                if self.registers.set_status(value as u8) {
                    self.raise(CONFIGURATION);
                }
            }
            _ => {
                let Some(setup) = self.registers.queue_to_set_up(select) else {
                    return;
                };
                let low = |old: u64| old & !u64::from(u32::MAX) | u64::from(value);
                let high = |old: u64| old & u64::from(u32::MAX) | u64::from(value) << 32;
                match offset {
                    spec::VIRTIO_MMIO_QUEUE_NUM => setup.size = value,
                    spec::VIRTIO_MMIO_QUEUE_DESC_LOW => setup.descriptors = low(setup.descriptors),
                    spec::VIRTIO_MMIO_QUEUE_DESC_HIGH => setup.descriptors = high(setup.descriptors),
                    spec::VIRTIO_MMIO_QUEUE_AVAIL_LOW => setup.available = low(setup.available),
                    spec::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => setup.available = high(setup.available),
                    spec::VIRTIO_MMIO_QUEUE_USED_LOW => setup.used = low(setup.used),
                    spec::VIRTIO_MMIO_QUEUE_USED_HIGH => setup.used = high(setup.used),
                    _ => {}
                }
            }
        }
    }

    fn read_configuration(&self, offset: u64, width: Width) -> u64 {
        let mut bytes = [0xff; 8];
        self.registers
            .read_configuration(offset, &mut bytes[..width.bytes()]);
        u64::from_le_bytes(bytes)
    }
}

/// A word's offset, if the access is one.
fn register(access: Access) -> Option<u32> {
    let offset = u32::try_from(access.offset).ok()?;
    (access.width == Width::Dword && offset.is_multiple_of(4) && u64::from(offset) < CONFIGURATION_SPACE)
        .then_some(offset)
}

impl Device for Mmio {
    fn name(&self) -> &'static str {
        self.name
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        if let Some(offset) = access.offset.checked_sub(CONFIGURATION_SPACE) {
            return self.read_configuration(offset, access.width);
        }
        register(access)
            .and_then(|offset| self.read_register(offset))
            .map_or(u64::MAX, u64::from)
    }

    fn write(&mut self, _cx: &mut dyn Context, access: Access, value: u64) {
        if let Some(offset) = access.offset.checked_sub(CONFIGURATION_SPACE) {
            let bytes = value.to_le_bytes();
            self.registers
                .write_configuration(offset, &bytes[..access.width.bytes()]);
        } else if let Some(offset) = register(access) {
            self.write_register(offset, value as u32);
        }
    }

    fn interrupt(&self) -> bool {
        match self.pending {
            // The latch has raised it.
            Pending::Shared(_) => false,
            Pending::Own(pending) => pending != 0,
        }
    }

    fn backend_news(&mut self, _cx: &mut dyn Context, news: BackendNews) {
        match self.registers.news(news) {
            Some(BackendEvent::Used(_)) => self.raise(USED),
            Some(BackendEvent::Broken | BackendEvent::Reconfigured) => self.raise(CONFIGURATION),
            None => {}
        }
    }

    fn backends(&self) -> usize {
        self.registers.identity().queues
    }

    fn pause(&mut self, _cx: &mut dyn Context) {
        self.registers.suspend(true);
    }

    fn resume(&mut self, _cx: &mut dyn Context) {
        self.registers.suspend(false);
    }

    fn reset(&mut self, _cx: &mut dyn Context) {
        self.back_to_new();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Queues;
    use super::super::registers::status;
    use super::super::testing::{Call, mmio};
    use super::*;
    use crate::devices::testing::FakeContext;

    struct Driver {
        device: Mmio,
        cx: FakeContext,
        calls: crossbeam_channel::Receiver<Call>,
    }

    impl Driver {
        fn new(latched: bool) -> Driver {
            let (device, calls) = mmio(latched);
            Driver {
                device,
                cx: FakeContext::new(),
                calls,
            }
        }

        fn read(&mut self, offset: u64) -> u32 {
            let width = Width::Dword;
            self.device.read(&mut self.cx, Access { offset, width }) as u32
        }

        fn write(&mut self, offset: u32, value: u32) {
            let access = Access {
                offset: offset.into(),
                width: Width::Dword,
            };
            self.device.write(&mut self.cx, access, value.into());
        }

        /// What a driver does, step by step. [VIRTIO 1.2 §3.1.1, §4.2.3]
        fn start(&mut self) {
            self.write(0x70, 0);
            self.write(0x70, 1);
            self.write(0x70, 3);
            for (select, features) in [(0, 0), (1, 1)] {
                self.write(0x24, select);
                self.write(0x20, features);
            }
            self.write(0x70, 0xb);
            self.write(0x30, 0);
            for (register, value) in [
                (0x38, 64),
                (0x80, 0x1000),
                (0x84, 0),
                (0x90, 0x2000),
                (0x94, 0),
                (0xa0, 0x3000),
                (0xa4, 0),
                (0x44, 1),
            ] {
                self.write(register, value);
            }
            self.write(0x70, 0xf);
        }

        fn news(&mut self, event: BackendEvent) {
            let life = self.calls.try_iter().find_map(|call| match call {
                Call::Start { life, .. } => Some(life),
                _ => None,
            });
            let life = life.unwrap_or(1);
            self.device
                .backend_news(&mut self.cx, BackendNews::new(life, event));
        }
    }

    #[test]
    fn a_driver_finds_what_it_looks_for() {
        let mut driver = Driver::new(false);
        let found = [0x00, 0x04, 0x08, 0x0c, 0x34, 0xfc, 0xb0, 0xbc].map(|offset| driver.read(offset));
        let expected = [0x7472_6976, 2, 2, 0x5654_4341, 256, 0, u32::MAX, u32::MAX];
        assert_eq!(found, expected);
        let features = [0, 1, 2].map(|select| {
            driver.write(0x14, select);
            driver.read(0x10)
        });
        assert_eq!(features, [1 << 9 | 1 << 28 | 1 << 29, 1, 0]);
        driver.write(0x30, 2);
        assert_eq!(driver.read(0x34), 0, "no third queue");
    }

    #[test]
    fn a_queue_is_started_as_it_was_set_up() {
        let mut driver = Driver::new(false);
        driver.start();
        assert_eq!(driver.read(0x70), 0xf);
        assert_eq!(driver.read(0x44), 1);
        let started = driver
            .calls
            .try_iter()
            .find(|call| matches!(call, Call::Start { .. }));
        let expected = Call::Start {
            index: 0,
            size: 64,
            event_idx: false,
            life: 1,
        };
        assert_eq!(started, Some(expected));
        driver.write(0x50, 0);
        assert_eq!(driver.calls.try_iter().last(), Some(Call::Notify(0)));
    }

    #[test]
    fn the_line_is_up_from_the_news_to_the_acknowledgement() {
        let mut driver = Driver::new(false);
        driver.start();
        driver.news(BackendEvent::Used(Queues::one(0)));
        assert!(driver.device.interrupt());
        driver.news(BackendEvent::Broken);
        assert_eq!((driver.read(0x60), driver.read(0x70)), (3, 0x4f));
        driver.write(0x64, 1);
        assert!(driver.device.interrupt(), "one of two is left");
        driver.write(0x64, 2);
        assert!(!driver.device.interrupt());
    }

    #[test]
    fn a_reset_clears_what_is_pending() {
        for latched in [false, true] {
            let mut driver = Driver::new(latched);
            driver.start();
            driver.news(BackendEvent::Broken);
            assert_eq!(driver.read(0x60), 2);
            driver.write(0x70, 0);
            assert_eq!(
                (driver.read(0x60), driver.read(0x70), driver.read(0x44)),
                (0, 0, 0)
            );
            assert!(!driver.device.interrupt());
            assert_ne!(
                driver
                    .calls
                    .try_iter()
                    .filter(|call| matches!(call, Call::Stop(_)))
                    .count(),
                0
            );
        }
    }

    #[test]
    fn a_queue_outside_memory_is_a_change_of_configuration() {
        let mut driver = Driver::new(false);
        driver.start();
        driver.write(0x70, 0);
        driver.write(0x70, 3);
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        driver.write(0x70, 0xb);
        driver.write(0xa4, 0x1234);
        driver.write(0x44, 1);
        driver.write(0x70, 0xf);
        assert_eq!(u32::from(status::DEVICE_NEEDS_RESET) | 0xf, driver.read(0x70));
        assert_eq!(driver.read(0x60), CONFIGURATION);
    }

    #[test]
    fn configuration_reads_in_any_width_and_registers_in_one() {
        let mut driver = Driver::new(false);
        let mut read = |offset, width: Width| {
            driver.device.read(&mut driver.cx, Access { offset, width }) & width.all_ones()
        };
        assert_eq!(read(0x100, Width::Byte), 0);
        assert_eq!(read(0x103, Width::Word), 0x0403);
        assert_eq!(read(0x108, Width::Qword), 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(read(0x13a, Width::Dword), 0xffff_3b3a);
        assert_eq!(read(u64::MAX, Width::Qword), u64::MAX);
        for width in [Width::Byte, Width::Word, Width::Qword] {
            assert_eq!(read(0, width), width.all_ones());
        }
        assert_eq!(read(2, Width::Dword), Width::Dword.all_ones());
    }
}
