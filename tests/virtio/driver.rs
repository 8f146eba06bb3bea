//! The driver of a virtio device, over either transport.

use crate::machine::{LIMIT, Machine};
use actor_vmm::boot::layout::{ECAM, VIRTIO_MMIO};
use actor_vmm::virtio::Transport;
use std::sync::atomic::Ordering;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};

/// A driver for the device in a place. Rings are at fixed addresses for each.
pub struct Driver<'a> {
    pub machine: &'a Machine,
    transport: Transport,
    /// The function's configuration space, by virtio-pci.
    pub config: u64,
    pub registers: u64,
    rings: u64,
    offered: Vec<u16>,
}

pub const FEATURES_OK: u32 = 0xb;
pub const DRIVER_OK: u32 = 0xf;

/// What is where in a function's BAR.
pub const ISR: u64 = 0x1000;
pub const NOTIFY: u64 = 0x3000;

impl<'a> Driver<'a> {
    pub fn new(machine: &'a Machine, transport: Transport, place: u64) -> Driver<'a> {
        let mut driver = Driver {
            machine,
            transport,
            config: ECAM + ((place + 1) << 15),
            registers: VIRTIO_MMIO + place * 0x1000,
            rings: 0x10_0000 + place * 0x10_0000,
            offered: Vec::new(),
        };
        if transport == Transport::Pci {
            driver.switch_on();
        }
        driver
    }

    /// Finds the BAR, and has the function answer there and access memory.
    pub fn switch_on(&mut self) {
        let half = |register| u64::from(self.machine.read(self.config + register, 4));
        self.registers = (half(0x14) << 32 | half(0x10)) & !0xf;
        self.machine.write(self.config + 4, 2, 6);
    }

    pub fn is_pci(&self) -> bool {
        self.transport == Transport::Pci
    }

    pub fn get(&self, register: u64, length: u8) -> u32 {
        self.machine.read(self.registers + register, length)
    }

    pub fn set(&self, register: u64, length: u8, value: u32) {
        self.machine.write(self.registers + register, length, value);
    }

    pub fn device_type(&self) -> u32 {
        match self.transport {
            Transport::Mmio => self.get(8, 4),
            Transport::Pci => self.machine.read(self.config + 2, 2) - 0x1040,
        }
    }

    /// Where the device's own configuration begins.
    fn device_configuration(&self) -> u64 {
        match self.transport {
            Transport::Mmio => 0x100,
            Transport::Pci => 0x2000,
        }
    }

    /// A field of the device's own configuration, of 32 bits.
    pub fn field(&self, offset: u64) -> u32 {
        self.get(self.device_configuration() + offset, 4)
    }

    /// Writes one.
    pub fn set_field(&self, offset: u64, value: u32) {
        self.set(self.device_configuration() + offset, 4, value);
    }

    pub fn status(&self) -> u32 {
        match self.transport {
            Transport::Mmio => self.get(0x70, 4),
            Transport::Pci => self.get(0x14, 1),
        }
    }

    pub fn set_status(&self, status: u32) {
        match self.transport {
            Transport::Mmio => self.set(0x70, 4, status),
            Transport::Pci => self.set(0x14, 1, status),
        }
    }

    /// [`Driver::start_queues`] with queue 0 alone.
    pub fn start(&mut self) {
        self.start_queues(1);
    }

    /// Resets, negotiates VIRTIO_F_VERSION_1 alone, and starts the first queues, of 8 descriptors each.
    pub fn start_queues(&mut self, queues: u32) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.offered = vec![0; queues as usize];
        self.set_status(1);
        self.set_status(3);
        let (select, features) = if self.is_pci() { (0x08, 0x0c) } else { (0x24, 0x20) };
        self.set(select, 4, 1);
        self.set(features, 4, 1);
        self.set_status(FEATURES_OK);
        assert_eq!(self.status(), FEATURES_OK);
        for queue in 0..queues {
            self.set_up(queue);
        }
        self.set_status(DRIVER_OK);
        assert_eq!(self.status(), DRIVER_OK);
    }

    /// Where a queue's rings are.
    fn rings(&self, queue: u32) -> u64 {
        self.rings + u64::from(queue) * 0x4000
    }

    fn set_up(&self, queue: u32) {
        let rings = self.rings(queue);
        let zeroes = [0; 0x3000];
        self.machine
            .memory
            .write_slice(&zeroes, GuestAddress(rings))
            .unwrap();
        let (select, size, width) = if self.is_pci() {
            (0x16, 0x18, 2)
        } else {
            (0x30, 0x38, 4)
        };
        self.set(select, width, queue);
        self.set(size, width, 8);
        let addresses = if self.is_pci() {
            [0x20, 0x28, 0x30]
        } else {
            [0x80, 0x90, 0xa0]
        };
        for (register, offset) in addresses.into_iter().zip([0, 0x1000, 0x2000]) {
            self.set(register, 4, (rings + offset) as u32);
            self.set(register + 4, 4, 0);
        }
        let ready = if self.is_pci() { 0x1c } else { 0x44 };
        self.set(ready, width, 1);
    }

    /// Offers one chain in queue 0: (address, bytes, whether the device writes), and notifies.
    pub fn offer(&mut self, buffers: &[(u64, u32, bool)]) {
        self.offer_in(0, buffers);
    }

    /// The same in any queue. There must be no other chain in it.
    pub fn offer_in(&mut self, queue: u32, buffers: &[(u64, u32, bool)]) {
        let (memory, rings) = (&self.machine.memory, self.rings(queue));
        for (index, (address, length, write)) in buffers.iter().enumerate() {
            let more = index + 1 < buffers.len();
            let flags = u64::from(more) | u64::from(*write) << 1;
            let last = u64::from(*length) | flags << 32 | (index as u64 + 1) << 48;
            let at = rings + 16 * index as u64;
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(last, GuestAddress(at + 8)).unwrap();
        }
        let offered = &mut self.offered[queue as usize];
        let available = rings + 0x1000;
        let slot = available + 4 + 2 * u64::from(*offered % 8);
        memory.write_obj(0u16, GuestAddress(slot)).unwrap();
        *offered = offered.wrapping_add(1);
        memory
            .store(*offered, GuestAddress(available + 2), Ordering::Release)
            .unwrap();
        match self.transport {
            Transport::Mmio => self.set(0x50, 4, queue),
            Transport::Pci => self.set(NOTIFY + 4 * u64::from(queue), 2, queue),
        }
    }

    /// Whether all that was offered in a queue was given back.
    pub fn all_used(&self, queue: u32) -> bool {
        self.used_in(queue) == self.offered[queue as usize]
    }

    /// The interrupt status, which is acknowledged by it.
    pub fn pending(&self) -> u32 {
        if self.is_pci() {
            return self.get(ISR, 1);
        }
        let status = self.get(0x60, 4);
        if status != 0 {
            self.set(0x64, 4, status);
            // It is complete before anything else: a step is on its way otherwise, unlike a guest's access, while the
            // next request is already in memory; its interrupt would be acknowledged with this one.
            self.get(0x64, 4);
        }
        status
    }

    /// Waits for the interrupt status, acknowledges it, and returns it.
    pub fn interrupt(&self) -> u32 {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.pending();
            if status != 0 {
                return status;
            }
            assert!(Instant::now() < deadline, "no interrupt");
        }
    }

    pub fn used(&self) -> u16 {
        self.used_in(0)
    }

    fn used_in(&self, queue: u32) -> u16 {
        let at = GuestAddress(self.rings(queue) + 0x2002);
        self.machine.memory.load(at, Ordering::Acquire).unwrap()
    }
}
