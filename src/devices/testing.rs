//! A fake world for device tests: what a device sees through [`Context`] as plain fields.
//!
//! It also polices the contract: a device that transmits while its host side has no room fails the test.

use std::collections::VecDeque;

use super::{Access, Context, Device, MachineRequest, Nanos, Width};

/// The world as vectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FakeContext {
    /// Guest time.
    pub now: Nanos,
    /// Host wall clock, nanoseconds since 1970.
    pub wall_clock_ns: i64,
    /// What the device sent.
    pub sent: Vec<u8>,
    /// How many bytes the host side takes before it has no room.
    pub room: usize,
    /// How many bytes the device could not keep for the host.
    pub lost: usize,
    /// What the host side has for the device.
    pub typed: VecDeque<u8>,
    /// What the device asked of the machine.
    pub requests: Vec<MachineRequest>,
}

impl FakeContext {
    /// A world at guest time 0 on 2001-09-09 01:46:40 UTC (10^9 s), with room without end and nothing typed.
    pub fn new() -> FakeContext {
        FakeContext {
            now: Nanos(0),
            wall_clock_ns: 1_000_000_000 * 1_000_000_000,
            sent: Vec::new(),
            room: usize::MAX,
            lost: 0,
            typed: VecDeque::new(),
            requests: Vec::new(),
        }
    }

    /// Lets guest time and wall clock go on by `ns` nanoseconds.
    pub fn advance_ns(&mut self, ns: u64) {
        self.now = Nanos(self.now.0.saturating_add(ns));
        self.wall_clock_ns = self.wall_clock_ns.saturating_add_unsigned(ns);
    }
}

impl Context for FakeContext {
    fn now(&self) -> Nanos {
        self.now
    }

    fn wall_clock_ns(&self) -> i64 {
        self.wall_clock_ns
    }

    fn transmit(&mut self, byte: u8) -> bool {
        assert!(
            self.room > 0,
            "the device transmits although it was told that there is no room"
        );
        self.sent.push(byte);
        self.room -= 1;
        self.room > 0
    }

    fn lose(&mut self) {
        self.lost += 1;
    }

    fn receive(&mut self) -> Option<u8> {
        self.typed.pop_front()
    }

    fn request(&mut self, request: MachineRequest) {
        self.requests.push(request);
    }
}

/// A device with a world of its own: what most tests arrange, act on and look at.
pub struct Bench<D> {
    /// The device under test.
    pub device: D,
    /// Its world.
    pub cx: FakeContext,
}

impl<D: Device> Bench<D> {
    /// Puts a device into a new world.
    pub fn new(device: D) -> Bench<D> {
        Bench {
            device,
            cx: FakeContext::new(),
        }
    }

    /// Reads with a given width.
    pub fn read_wide(&mut self, offset: u64, width: Width) -> u64 {
        self.device.read(&mut self.cx, Access { offset, width })
    }

    /// Reads one byte.
    pub fn read(&mut self, offset: u64) -> u8 {
        self.read_wide(offset, Width::Byte) as u8
    }

    /// Writes with a given width.
    pub fn write_wide(&mut self, offset: u64, width: Width, value: u64) {
        self.device.write(&mut self.cx, Access { offset, width }, value);
    }

    /// Writes one byte.
    pub fn write(&mut self, offset: u64, value: u8) {
        self.write_wide(offset, Width::Byte, u64::from(value));
    }

    /// Gives the device something to receive and tells it so.
    pub fn type_bytes(&mut self, bytes: &[u8]) {
        self.cx.typed.extend(bytes);
        self.device.input_ready(&mut self.cx);
    }

    /// Makes room for `bytes` bytes and tells the device so.
    pub fn make_room(&mut self, bytes: usize) {
        self.cx.room = bytes;
        self.device.output_ready(&mut self.cx);
    }

    /// Lets time pass, with a tick at every deadline on the way.
    pub fn run_for_ns(&mut self, ns: u64) {
        let end = self.cx.now.0.saturating_add(ns);
        while let Some(deadline) = self.device.deadline().filter(|deadline| deadline.0 <= end) {
            self.cx.advance_ns(deadline.0.saturating_sub(self.cx.now.0));
            self.device.tick(&mut self.cx);
            let next = self.device.deadline();
            assert!(
                next.is_none_or(|next| next > self.cx.now),
                "a tick at once after a tick: the shell would spin"
            );
        }
        self.cx.advance_ns(end - self.cx.now.0);
    }

    /// Machine reset.
    pub fn reset(&mut self) {
        self.device.reset(&mut self.cx);
    }
}
