//! MSI-X: the table of a function, where it sends its messages, and the way of one source's messages to the guest.
//! [PCI 3.0 §6.8.2]
//!
//! The table is pure: from it and the control register follows whether a vector's messages go out now, and where to.
//! What to do about it is the function's: it keeps a [`MessageWire`] a source aimed at what the table says. While a wire is
//! aimed at nothing, signals wait in it; they are what the pending bits tell of.
//!
//! What a hostile guest can try: any address, any data, any bit in any order. A message that is not one to a local APIC
//! goes nowhere; one to an APIC is an interrupt of the guest's own.

use crate::devices::Width;

/// A vector's bytes in the table: address, data, control.
pub const ENTRY_BYTES: u64 = 16;

/// Bits of the control register in the capability. [PCI 3.0 §6.8.2.3]
pub mod control {
    /// Messages instead of the pin.
    pub const ENABLE: u16 = 1 << 15;
    /// All vectors are masked.
    pub const MASK_ALL: u16 = 1 << 14;
}

/// The one bit of a vector's control. [PCI 3.0 §6.8.2.9]
const MASKED: u32 = 1;

/// A write to memory that is an interrupt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Message {
    /// Which processors: inside a local APIC's megabyte.
    pub address: u64,
    /// Which interrupt.
    pub data: u32,
}

/// The way of one source's messages to the guest. Behind it are an irqfd, an ioctl, or a test.
pub trait MessageWire: Send {
    /// From now on signals send this; `None`: they wait. Signals that wait are sent when there is somewhere to send them.
    /// Told changes only.
    fn aim(&mut self, to: Option<Message>);

    /// Sends, or waits; one that waits already stands for all.
    fn signal(&mut self);

    /// Whether a signal waits.
    fn is_pending(&self) -> bool;

    /// What waits is nobody's any more.
    fn forget(&mut self);
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    message: Message,
    masked: bool,
}

impl Entry {
    const NEW: Entry = Entry {
        message: Message { address: 0, data: 0 },
        masked: true,
    };
}

/// A function's table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    control: u16,
}

impl Msix {
    /// So many vectors, all masked; MSI-X is off.
    pub fn new(vectors: usize) -> Msix {
        Msix {
            entries: vec![Entry::NEW; vectors],
            control: 0,
        }
    }

    /// How many.
    pub fn vectors(&self) -> usize {
        self.entries.len()
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        self.entries.fill(Entry::NEW);
        self.control = 0;
    }

    /// The control register was written.
    pub fn set_control(&mut self, control: u16) {
        self.control = control;
    }

    /// Whether the function uses messages, and not its pin.
    pub fn is_enabled(&self) -> bool {
        self.control & control::ENABLE != 0
    }

    /// What a vector sends now; `None`: nothing, as it is masked, does not exist, or leads to no APIC.
    pub fn message(&self, vector: u16) -> Option<Message> {
        /// A megabyte of addresses that are messages. [SDM 3A §11.11.1]
        const APICS: u64 = 0xfee0_0000;
        const IN_A_MEGABYTE: u64 = 0xf_ffff;
        let entry = self.entries.get(usize::from(vector))?;
        let open = self.control & (control::ENABLE | control::MASK_ALL) == control::ENABLE && !entry.masked;
        // The upper half has more bits of an APIC's number where there are more than 255.
        let low = entry.message.address & u64::from(u32::MAX);
        (open && low & !IN_A_MEGABYTE == APICS).then_some(entry.message)
    }

    /// Reads the table: double words and quad words at multiples of their width are decoded.
    pub fn read(&self, offset: u64, width: Width) -> u64 {
        let Some((vector, word)) = self.decode(offset, width) else {
            return width.all_ones();
        };
        let entry = &self.entries[vector];
        let half = |word| match word {
            0 => entry.message.address as u32,
            1 => (entry.message.address >> 32) as u32,
            2 => entry.message.data,
            _ => entry.masked.into(),
        };
        match width {
            Width::Qword => u64::from(half(word)) | u64::from(half(word + 1)) << 32,
            _ => half(word).into(),
        }
    }

    /// Writes it.
    pub fn write(&mut self, offset: u64, width: Width, value: u64) {
        let Some((vector, word)) = self.decode(offset, width) else {
            return;
        };
        self.write_word(vector, word, value as u32);
        if width == Width::Qword {
            self.write_word(vector, word + 1, (value >> 32) as u32);
        }
    }

    fn write_word(&mut self, vector: usize, word: u64, value: u32) {
        let Entry { message, masked } = &mut self.entries[vector];
        let (low, high) = (u64::from(u32::MAX), u64::from(value) << 32);
        match word {
            // A message is a double word: its address has no low bits.
            0 => message.address = message.address & !low | u64::from(value & !3),
            1 => message.address = message.address & low | high,
            2 => message.data = value,
            _ => *masked = value & MASKED != 0,
        }
    }

    /// Vector and double word of an access.
    fn decode(&self, offset: u64, width: Width) -> Option<(usize, u64)> {
        let whole = width >= Width::Dword && offset.is_multiple_of(width.bytes() as u64);
        let vector = usize::try_from(offset / ENTRY_BYTES).ok()?;
        (whole && vector < self.entries.len()).then_some((vector, offset % ENTRY_BYTES / 4))
    }

    /// Reads the array of pending bits, whose vectors are told by `pending`; double words and quad words, as above.
    pub fn read_pending(&self, offset: u64, width: Width, pending: impl Fn(u16) -> bool) -> u64 {
        let bits = 64 * self.vectors().div_ceil(64) as u64;
        let whole = width >= Width::Dword && offset.is_multiple_of(width.bytes() as u64);
        if !whole || offset >= bits / 8 {
            return width.all_ones();
        }
        let first = offset * 8;
        let last = (first + 8 * width.bytes() as u64).min(self.vectors() as u64);
        let is_set = |vector: &u64| pending(*vector as u16);
        (first..last)
            .filter(is_set)
            .fold(0, |value, vector| value | 1 << (vector - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Width::{Byte, Dword, Qword, Word};
    use proptest::prelude::*;

    const TO_CPU_3: u64 = 0xfee0_3000;

    #[test]
    fn a_vector_sends_when_nothing_masks_it() {
        let mut msix = Msix::new(3);
        assert_eq!(msix.message(1), None);
        msix.write(0x10, Dword, TO_CPU_3);
        msix.write(0x18, Dword, 0x41);
        msix.write(0x1c, Dword, 0);
        assert_eq!(msix.message(1), None, "MSI-X is off");
        let message = Message {
            address: TO_CPU_3,
            data: 0x41,
        };
        for (control, expected) in [(0x8000, Some(message)), (0xc000, None), (0x4000, None)] {
            msix.set_control(control);
            assert_eq!(msix.message(1), expected, "{control:#x}");
        }
        msix.set_control(0x8000);
        assert_eq!(msix.message(0), None, "another one");
        assert_eq!(msix.message(3), None, "none");
        msix.write(0x18, Qword, 1 << 32 | 0x42);
        assert_eq!(msix.message(1), None, "masked");
        msix.write(0x1c, Dword, 0xffff_fffe);
        assert_eq!(msix.message(1).unwrap().data, 0x42);
        assert_eq!(msix.read(0x1c, Dword), 0, "reserved bits read 0");
    }

    #[test]
    fn what_is_no_message_to_an_apic_goes_nowhere() {
        for (address, sent) in [
            (0, false),
            (0x1000, false),
            (0xfedf_fffc, false),
            (0xfee0_0000, true),
            (0xfeef_fffc, true),
            (0xfef0_0000, false),
            (0x1_fee0_0000, true),
        ] {
            let mut msix = Msix::new(1);
            msix.set_control(0x8000);
            msix.write(0, Qword, address);
            msix.write(0xc, Dword, 0);
            assert_eq!(msix.message(0).is_some(), sent, "{address:#x}");
        }
    }

    #[test]
    fn pending_bits_are_words_of_64() {
        let msix = Msix::new(66);
        let pending = |vector| [0, 5, 33, 65].contains(&vector);
        assert_eq!(msix.read_pending(0, Qword, pending), 1 | 1 << 5 | 1 << 33);
        assert_eq!(msix.read_pending(4, Dword, pending), 2);
        assert_eq!(msix.read_pending(8, Qword, pending), 2);
        assert_eq!(msix.read_pending(12, Dword, pending), 0);
        for (offset, width) in [
            (16, Qword),
            (0, Byte),
            (2, Word),
            (4, Qword),
            (u64::MAX - 7, Qword),
        ] {
            assert_eq!(msix.read_pending(offset, width, pending), width.all_ones());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_table_is_memory_where_it_is_decoded(
            writes in prop::collection::vec((prop_oneof![9 => 0..0x38u64, 1 => any::<u64>()], 0..4usize, any::<u64>()), 0..60)
        ) {
            let mut msix = Msix::new(3);
            msix.set_control(0x8000);
            let mut model = [0u32, 0, 0, 1].repeat(3);
            for (offset, width, value) in writes {
                let width = [Byte, Word, Dword, Qword][width];
                msix.write(offset, width, value & width.all_ones());
                if width >= Dword && offset % width.bytes() as u64 == 0 && offset < 0x30 {
                    for (index, half) in [value as u32, (value >> 32) as u32].into_iter().enumerate().take(width.bytes() / 4) {
                        let word = offset as usize / 4 + index;
                        model[word] = half & [!3, !0, !0, 1][word % 4];
                    }
                }
            }
            for (word, expected) in model.iter().enumerate() {
                prop_assert_eq!(msix.read(4 * word as u64, Dword), u64::from(*expected));
            }
            for vector in 0..3u16 {
                let entry = &model[4 * usize::from(vector)..][..4];
                let open = entry[3] == 0 && entry[0] >> 20 == 0xfee;
                prop_assert_eq!(msix.message(vector).is_some(), open);
            }
            msix.reset();
            prop_assert_eq!(msix, Msix::new(3));
        }
    }
}
