//! Who answers an access to the bus: by words that the owners publish, read in place.
//!
//! The host bridge owns CF8 and each function its BAR; what they hold is published here as a word, and vCPUs read it when
//! they route an access. Moving a BAR is so a write to one word by its owner, in his turn; no vCPU has to be told, and none
//! can be forgotten.
//!
//! # Orderings
//!
//! All is `Relaxed`: each word stands for itself, nothing else is published by it. A vCPU that has written a BAR finds it
//! moved, because the write is an ask: the owner's turn is before its reply, which is before the vCPU's next access.
//! Another vCPU that learns of the move through guest memory does so through the processor's cache coherence, which is
//! there for the word as well. One that does not know hits the old or the new place, as on a real bus.
//!
//! What a hostile guest can try: BARs anywhere, over each other and over everything. Outside the windows nothing is
//! decoded, so that they cannot hide memory or interrupt controllers; of two in the same place the lower slot answers.
//! Two vCPUs that write CF8 at once get each other's register, as on a real bus.

use super::{BAR, CONFIG, ECAM_FUNCTION_BYTES, NOWHERE, SLOTS};
use crate::devices::{Access, Width};
use crate::vcpu::route::Decode;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What stands for a BAR that is not decoded: no BAR is there.
const NO_BAR: u64 = u64::MAX;

/// Ports of mechanism #1: Enable, bus, device, function and register; the other bits are read-only zeros.
/// [PCI 3.0 §3.2.2.3.2]
pub const ADDRESS_MASK: u32 = 0x80ff_fffc;
const ENABLE: u32 = 1 << 31;

/// What is published of a bus.
pub struct Bus {
    address: AtomicU32,
    bars: [AtomicU64; SLOTS],
    /// Addresses that the bridge passes on.
    windows: [Range<u64>; 2],
}

impl Bus {
    /// A bus whose bridge passes these addresses on.
    pub fn new(windows: [Range<u64>; 2]) -> Arc<Bus> {
        Arc::new(Bus {
            address: AtomicU32::new(0),
            bars: [const { AtomicU64::new(NO_BAR) }; SLOTS],
            windows,
        })
    }

    /// For the host bridge, the one owner of CF8.
    pub fn publish_address(&self, address: u32) {
        self.address.store(address, Ordering::Relaxed);
    }

    /// For the one owner of the function in a slot.
    pub fn bar(self: &Arc<Bus>, slot: usize, bytes: u64) -> BarWord {
        BarWord {
            bus: self.clone(),
            slot,
            bytes,
        }
    }

    /// Where the bridge passes accesses on.
    pub fn windows(&self) -> &[Range<u64>] {
        &self.windows
    }
}

/// The owner's end of a function's BAR.
pub struct BarWord {
    bus: Arc<Bus>,
    slot: usize,
    bytes: u64,
}

impl BarWord {
    /// Publishes where the BAR is. Returns where it is decoded: nowhere, if it is not within a window.
    pub fn publish(&self, base: Option<u64>) -> Option<u64> {
        let fits = |base: &u64| {
            let end = base.checked_add(self.bytes);
            end.is_some_and(|end| {
                self.bus
                    .windows
                    .iter()
                    .any(|window| window.start <= *base && end <= window.end)
            })
        };
        let decoded = base.filter(fits);
        self.bus.bars[self.slot].store(decoded.unwrap_or(NO_BAR), Ordering::Relaxed);
        decoded
    }
}

/// Which device actor is the function in each slot.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Functions {
    /// The number of the host bridge, which answers for what is not there.
    pub bridge: usize,
    /// Slot, number, and bytes of its BAR.
    pub others: Vec<(usize, usize, u64)>,
}

impl Functions {
    /// Who has the configuration space of a function, and what of it is accessed.
    fn config(&self, bus: u32, slot: usize, function: u32, register: u64, width: Width) -> (usize, Access) {
        let access = |offset| Access { offset, width };
        if (bus, function) != (0, 0) {
            return (self.bridge, access(NOWHERE));
        }
        if slot == 0 {
            return (self.bridge, access(CONFIG + register));
        }
        match self.others.iter().find(|(there, ..)| *there == slot) {
            Some((_, number, _)) => (*number, access(CONFIG + register)),
            None => (self.bridge, access(NOWHERE)),
        }
    }
}

/// CONFIG_DATA, 0xcfc to 0xcff: the function and register that CF8 says.
pub struct DataPorts {
    /// What is published.
    pub bus: Arc<Bus>,
    /// Who is there.
    pub functions: Functions,
}

impl Decode for DataPorts {
    fn decode(&self, Access { offset, width }: Access) -> Option<(usize, Access)> {
        let address = self.bus.address.load(Ordering::Relaxed);
        let within = offset + width.bytes() as u64 <= 4;
        if address & ENABLE == 0 || !within {
            let access = Access {
                offset: NOWHERE,
                width,
            };
            return Some((self.functions.bridge, access));
        }
        let register = u64::from(address & 0xfc) + offset;
        let (slot, function) = (address >> 11 & 0x1f, address >> 8 & 7);
        let bus = address >> 16 & 0xff;
        Some(
            self.functions
                .config(bus, slot as usize, function, register, width),
        )
    }
}

/// ECAM of bus 0. [PCIe 5.0 §7.2.2]
pub struct Ecam {
    /// Who is there.
    pub functions: Functions,
}

impl Decode for Ecam {
    fn decode(&self, Access { offset, width }: Access) -> Option<(usize, Access)> {
        let number = offset / ECAM_FUNCTION_BYTES;
        let (slot, function) = (number as usize / 8, number as u32 % 8);
        let register = offset % ECAM_FUNCTION_BYTES;
        Some(self.functions.config(0, slot, function, register, width))
    }
}

/// A window for BARs.
pub struct Window {
    /// What is published.
    pub bus: Arc<Bus>,
    /// Who is there.
    pub functions: Functions,
    /// Its first address.
    pub start: u64,
}

impl Decode for Window {
    fn decode(&self, access: Access) -> Option<(usize, Access)> {
        let address = self.start + access.offset;
        self.functions.others.iter().find_map(|(slot, number, bytes)| {
            let base = self.bus.bars[*slot].load(Ordering::Relaxed);
            let offset = address.checked_sub(base).filter(|offset| offset < bytes)?;
            let access = Access {
                offset: BAR + offset,
                width: access.width,
            };
            Some((*number, access))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Width::{Byte, Dword, Word};

    const LOW: u64 = 0xc000_0000;
    const HIGH: u64 = 0x1_0000_0000;

    fn bus() -> Arc<Bus> {
        Bus::new([LOW..LOW + 0x1000_0000, HIGH..HIGH + 0x1000_0000])
    }

    fn functions() -> Functions {
        Functions {
            bridge: 7,
            others: vec![(1, 20, 0x8000), (3, 21, 0x8000)],
        }
    }

    fn nowhere(width: Width) -> Option<(usize, Access)> {
        Some((
            7,
            Access {
                offset: NOWHERE,
                width,
            },
        ))
    }

    #[test]
    fn the_data_ports_are_the_register_that_was_addressed() {
        let bus = bus();
        let ports = DataPorts {
            bus: bus.clone(),
            functions: functions(),
        };
        let at = |address: u32, offset, width| {
            bus.publish_address(address);
            ports.decode(Access { offset, width })
        };
        let config = |number, register, width| {
            Some((
                number,
                Access {
                    offset: CONFIG + register,
                    width,
                },
            ))
        };
        assert_eq!(at(0x8000_0000, 0, Dword), config(7, 0, Dword));
        assert_eq!(at(0x8000_0810, 0, Dword), config(20, 0x10, Dword));
        assert_eq!(at(0x8000_1804, 2, Word), config(21, 6, Word));
        assert_eq!(at(0x8000_18fc, 3, Byte), config(21, 0xff, Byte));
        // Not enabled; slot 2; function 1; bus 1; across the end.
        for (address, offset, width) in [
            (0x0000_0800, 0, Dword),
            (0x8000_1000, 0, Dword),
            (0x8000_0900, 0, Dword),
            (0x8001_0800, 0, Dword),
            (0x8000_0800, 3, Word),
        ] {
            assert_eq!(at(address, offset, width), nowhere(width), "{address:#x}");
        }
    }

    #[test]
    fn ecam_has_a_page_a_function() {
        let ecam = Ecam {
            functions: functions(),
        };
        let at = |offset| ecam.decode(Access { offset, width: Dword }).unwrap();
        let access = |offset| Access { offset, width: Dword };
        assert_eq!(at(0x8), (7, access(CONFIG + 8)));
        assert_eq!(at(0x8010), (20, access(CONFIG + 0x10)));
        assert_eq!(at(0x1_8ffc), (21, access(CONFIG + 0xffc)));
        for absent in [0x1000, 0x9000, 0x1_0000, ECAM_FUNCTION_BYTES * 255] {
            assert_eq!(at(absent), (7, access(NOWHERE)), "{absent:#x}");
        }
    }

    #[test]
    fn a_bar_is_where_it_was_published_last_and_within_a_window() {
        let bus = bus();
        let (first, second) = (bus.bar(1, 0x8000), bus.bar(3, 0x8000));
        let window = |start| Window {
            bus: bus.clone(),
            functions: functions(),
            start,
        };
        let (low, high) = (window(LOW), window(HIGH));
        let at = |window: &Window, offset| window.decode(Access { offset, width: Byte });
        let hit = |number, offset| {
            let offset = BAR + offset;
            Some((number, Access { offset, width: Byte }))
        };
        assert_eq!(at(&low, 0), None);
        assert_eq!(first.publish(Some(LOW + 0x8000)), Some(LOW + 0x8000));
        assert_eq!(second.publish(Some(HIGH)), Some(HIGH));
        assert_eq!(at(&low, 0x7fff), None);
        assert_eq!(at(&low, 0x8000), hit(20, 0));
        assert_eq!(at(&low, 0xffff), hit(20, 0x7fff));
        assert_eq!(at(&low, 0x1_0000), None);
        assert_eq!(at(&high, 0x123), hit(21, 0x123));
        // One over the other: the lower slot.
        first.publish(Some(HIGH));
        assert_eq!(at(&low, 0x8000), None);
        assert_eq!(at(&high, 0x123), hit(20, 0x123));
        // Outside, partly outside, off, at the end of the address space.
        for base in [
            Some(0),
            Some(LOW - 0x8000),
            Some(HIGH + 0x1000_0000 - 0x4000),
            Some(0xfee0_0000),
            Some(u64::MAX - 0x7fff),
            None,
        ] {
            assert_eq!(first.publish(base), None, "{base:x?}");
            assert_eq!(at(&high, 0x123), hit(21, 0x123));
        }
    }
}
