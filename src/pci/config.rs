//! The configuration space of one function: a header of type 0 and capabilities, as bytes with a mask of those that a
//! guest may change. [PCI 3.0 §6.1, §6.2, §6.7]
//!
//! Pure. A BAR needs nothing beyond that mask: the bits below its size are not writable, so a guest that writes all-ones
//! reads the size back [§6.2.5.1]. Accesses are bytes, words and double words at multiples of their width; others, and
//! those behind the 256 bytes of a conventional function, read all-ones and are ignored.
//!
//! What a hostile guest can try: any write at any place. It changes what the mask lets through, and all that is made of
//! it (where a BAR is, who gets messages) is checked where it is used.

use crate::devices::Width;

/// Bytes of a conventional function's space.
pub const BYTES: usize = 256;

/// Offsets in the header. [PCI 3.0 §6.1]
pub mod offset {
    /// Vendor, then device.
    pub const VENDOR: usize = 0x00;
    /// What the function may do.
    pub const COMMAND: usize = 0x04;
    /// What it can do, and what has happened.
    pub const STATUS: usize = 0x06;
    /// Revision, then the class code.
    pub const REVISION: usize = 0x08;
    /// For memory write and invalidate; kept, without effect.
    pub const CACHE_LINE_SIZE: usize = 0x0c;
    /// The first BAR.
    pub const BAR0: usize = 0x10;
    /// Subsystem vendor, then subsystem.
    pub const SUBSYSTEM: usize = 0x2c;
    /// The first capability.
    pub const CAPABILITIES: usize = 0x34;
    /// Which line the interrupt is, as software notes it here for itself.
    pub const INTERRUPT_LINE: usize = 0x3c;
    /// Which pin.
    pub const INTERRUPT_PIN: usize = 0x3d;
}

/// Bits of the command register. [PCI 3.0 §6.2.2]
pub mod command {
    /// Answers at its memory BARs.
    pub const MEMORY: u16 = 1 << 1;
    /// May access memory, and send messages.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Must not drive its interrupt pin.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Bits of the status register. [PCI 3.0 §6.2.3]
mod status {
    pub const INTERRUPT: u8 = 1 << 3;
    pub const CAPABILITIES: u8 = 1 << 4;
}

/// A memory BAR of 64 bits, not prefetchable. [PCI 3.0 §6.2.5.1]
const BAR_64: u8 = 0b100;

/// Where capabilities begin: behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// What a function is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Who made it.
    pub vendor: u16,
    /// What it is to its vendor.
    pub device: u16,
    /// Of the device.
    pub revision: u8,
    /// Base class, subclass, interface.
    pub class: [u8; 3],
    /// Whose board it is on, and which.
    pub subsystem: [u16; 2],
    /// It has an interrupt pin, INTA#.
    pub pin: bool,
}

/// The space.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigSpace {
    now: [u8; BYTES],
    power_on: [u8; BYTES],
    writable: [u8; BYTES],
    /// Where the next capability goes, and where its offset has to be written.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(identity: &Identity) -> ConfigSpace {
        let mut space = ConfigSpace {
            now: [0; BYTES],
            power_on: [0; BYTES],
            writable: [0; BYTES],
            next: FIRST_CAPABILITY,
            link: offset::CAPABILITIES,
        };
        space.put(offset::VENDOR, &identity.vendor.to_le_bytes());
        space.put(offset::VENDOR + 2, &identity.device.to_le_bytes());
        let [base, sub, interface] = identity.class;
        space.put(offset::REVISION, &[identity.revision, interface, sub, base]);
        space.put(offset::SUBSYSTEM, &identity.subsystem[0].to_le_bytes());
        space.put(offset::SUBSYSTEM + 2, &identity.subsystem[1].to_le_bytes());
        space.put(offset::INTERRUPT_PIN, &[identity.pin.into()]);
        let command = command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE;
        space.let_write(offset::COMMAND, &command.to_le_bytes());
        space.let_write(offset::CACHE_LINE_SIZE, &[0xff]);
        space.let_write(offset::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Makes BARs 0 and 1 one of 64 bits, with so many bytes (a power of 2, at least 16). At power-on it is at `address`.
    #[must_use]
    pub fn with_bar(mut self, bytes: u64, address: u64) -> ConfigSpace {
        debug_assert!(bytes.is_power_of_two() && bytes >= 16 && address.is_multiple_of(bytes));
        let mask = !(bytes - 1);
        self.let_write(offset::BAR0, &mask.to_le_bytes());
        self.put(offset::BAR0, &(address & mask | u64::from(BAR_64)).to_le_bytes());
        self
    }

    /// Adds a capability: its id, what follows the link to the next, and which bits of that a guest may write. Returns
    /// its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        debug_assert_eq!(body.len(), writable.len());
        let at = self.next;
        self.put(self.link, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.let_write(at + 2, writable);
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        let status = self.now[offset::STATUS] | status::CAPABILITIES;
        self.put(offset::STATUS, &[status]);
        at
    }

    /// What it is now and after a reset.
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.now[at..at + bytes.len()].copy_from_slice(bytes);
        self.power_on[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn let_write(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// A guest's read.
    pub fn read(&self, offset: u64, width: Width) -> u64 {
        let Some(at) = decode(offset, width) else {
            return width.all_ones();
        };
        let mut value = [0; 8];
        value[..width.bytes()].copy_from_slice(&self.now[at..at + width.bytes()]);
        u64::from_le_bytes(value)
    }

    /// A guest's write.
    pub fn write(&mut self, offset: u64, width: Width, value: u64) {
        let Some(at) = decode(offset, width) else {
            return;
        };
        let bytes = value.to_le_bytes();
        for (place, byte) in (at..at + width.bytes()).zip(bytes) {
            let mask = self.writable[place];
            self.now[place] = self.now[place] & !mask | byte & mask;
        }
    }

    /// Tells in the status register whether the function wants an interrupt by its pin. [PCI 3.0 §6.2.3]
    pub fn set_interrupt(&mut self, wanted: bool) {
        let others = self.now[offset::STATUS] & !status::INTERRUPT;
        self.now[offset::STATUS] = others | if wanted { status::INTERRUPT } else { 0 };
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.word(offset::COMMAND)
    }

    /// Two bytes.
    pub fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.now[at], self.now[at + 1]])
    }

    /// Four bytes.
    pub fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    /// Where the BAR is, if the function answers there.
    pub fn bar(&self) -> Option<u64> {
        let address = u64::from(self.dword(offset::BAR0 + 4)) << 32 | u64::from(self.dword(offset::BAR0));
        (self.command() & command::MEMORY != 0).then_some(address & !0xf)
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        self.now = self.power_on;
    }
}

/// The place of an access, if it is one that a conventional function decodes.
fn decode(offset: u64, width: Width) -> Option<usize> {
    let whole = width <= Width::Dword && offset.is_multiple_of(width.bytes() as u64);
    (whole && offset < BYTES as u64).then_some(offset as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Width::{Byte, Dword, Qword, Word};
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0x80, 0],
            subsystem: [0x1af4, 0x40],
            pin: true,
        };
        let mut space = ConfigSpace::new(&identity).with_bar(0x8000, 0x12_3456_8000);
        space.add_capability(9, &[1, 2, 3], &[0, 0xf0, 0]);
        space.add_capability(0x11, &[4; 10], &[0xff; 10]);
        space
    }

    #[test]
    fn the_header_is_where_software_looks() {
        let space = space();
        assert_eq!(space.read(0, Dword), 0x1042_1af4);
        assert_eq!(space.read(8, Dword), 0x0180_0001);
        assert_eq!(space.read(0xe, Byte), 0, "header of type 0, one function");
        assert_eq!(space.read(0x2c, Dword), 0x0040_1af4);
        assert_eq!(space.read(0x3d, Byte), 1);
        assert_eq!(space.read(6, Word), 0x10);
        // 0x40: 9, 0x48; 0x48: 0x11, end.
        assert_eq!(space.read(0x34, Byte), 0x40);
        assert_eq!(space.read(0x40, Dword), 0x0201_4809);
        assert_eq!(space.read(0x48, Word), 0x0011);
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = space();
        assert_eq!(
            (space.read(0x10, Dword), space.read(0x14, Dword)),
            (0x3456_8004, 0x12)
        );
        assert_eq!(space.bar(), None, "nothing is decoded after power-on");
        space.write(0x10, Dword, 0xffff_ffff);
        space.write(0x14, Dword, 0xffff_ffff);
        assert_eq!(
            (space.read(0x10, Dword), space.read(0x14, Dword)),
            (0xffff_8004, 0xffff_ffff)
        );
        space.write(0x10, Dword, 0xc001_8000);
        space.write(0x14, Dword, 0);
        space.write(4, Word, 0xffff);
        assert_eq!(
            space.read(4, Word),
            0x0406,
            "no I/O space, no reserved bits: they read 0"
        );
        assert_eq!(space.bar(), Some(0xc001_8000));
        space.write(4, Word, 0);
        assert_eq!(space.bar(), None);
    }

    #[test]
    fn a_capability_is_written_where_it_may_be() {
        let mut space = space();
        space.write(0x40, Dword, 0xffff_ffff);
        assert_eq!(space.read(0x40, Dword), 0xf201_4809);
    }

    #[test]
    fn the_interrupt_is_seen_in_the_status() {
        let mut space = space();
        space.set_interrupt(true);
        assert_eq!(space.read(6, Word), 0x18);
        space.set_interrupt(false);
        assert_eq!(space.read(6, Word), 0x10);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_writes_leave_what_is_read_only_and_a_reset_undoes_them(
            writes in prop::collection::vec((prop_oneof![9 => 0..260u64, 1 => any::<u64>()], 0..4usize, any::<u64>()), 0..60)
        ) {
            let mut space = space();
            let new = space.clone();
            for (offset, width, value) in writes {
                let width = [Byte, Word, Dword, Qword][width];
                space.write(offset, width, value);
                let _ = space.read(offset, width);
            }
            for at in 0..BYTES {
                prop_assert_eq!(space.now[at] & !space.writable[at], new.now[at] & !new.writable[at]);
            }
            prop_assert!(space.bar().is_none_or(|address| address.is_multiple_of(0x8000)));
            space.reset();
            prop_assert_eq!(space, new);
        }

        #[test]
        fn what_is_not_decoded_reads_all_ones(offset in any::<u64>(), width in 0..4usize) {
            let width = [Byte, Word, Dword, Qword][width];
            if width == Qword || offset % width.bytes() as u64 != 0 || offset >= 256 {
                prop_assert_eq!(space().read(offset, width), width.all_ones());
            }
        }
    }
}
