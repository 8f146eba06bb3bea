//! From a linear address to a physical one, through the guest's own page tables, as its processor would.
//!
//! A pure function of the control registers and of what is in memory. Sets no accessed or dirty bit: a debugger looks
//! and leaves nothing. [SDM 3A chapter 5 (4 in older editions): paging]
//!
//! What a hostile guest can try: tables that point to themselves, to nowhere, or outside of memory. A walk reads at
//! most five entries, and an entry that cannot be read ends it.

use crate::vcpu::debug::CpuState;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// Reads guest physical memory.
pub trait Physical {
    /// Fills `data` from `address`. `false` when that is not all RAM.
    fn read(&self, address: u64, data: &mut [u8]) -> bool;
}

impl Physical for GuestMemoryMmap {
    fn read(&self, address: u64, data: &mut [u8]) -> bool {
        self.read_slice(data, GuestAddress(address)).is_ok()
    }
}

/// How a processor translates, by its control registers. [SDM 3A §5.1.1, figure 5-1]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paging {
    /// CR0.PG is 0: linear addresses are physical ones, of 32 bits.
    Off,
    /// Two levels of 32-bit entries.
    Bits32 {
        /// CR3.
        cr3: u64,
        /// CR4.PSE: pages of 4 MiB.
        large: bool,
    },
    /// PAE: three levels of 64-bit entries, 32-bit linear addresses.
    Pae {
        /// CR3.
        cr3: u64,
    },
    /// IA-32e: four levels, or five with CR4.LA57.
    Long {
        /// CR3.
        cr3: u64,
        /// 4 or 5.
        levels: u8,
    },
}

/// Where a linear address is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The guest physical address.
    pub physical: u64,
    /// Bytes from there to the end of the page: what follows may be anywhere.
    pub left: u64,
    /// User mode may use it: the U/S bit is set at every level. Without paging nothing tells, and it counts as the
    /// kernel's.
    pub user: bool,
}

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1 << 0;
const USER: u64 = 1 << 2;
const PAGE_SIZE: u64 = 1 << 7;
/// Bits 51 to 12: the widest physical address that the architecture has.
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const PAGE_BITS: u32 = 12;
const TABLE_BITS: u32 = 9;

impl Paging {
    /// By the control registers.
    pub fn of(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Paging {
        if cr0 & CR0_PG == 0 {
            Paging::Off
        } else if efer & EFER_LMA != 0 {
            Paging::Long {
                cr3,
                levels: if cr4 & CR4_LA57 == 0 { 4 } else { 5 },
            }
        } else if cr4 & CR4_PAE != 0 {
            Paging::Pae { cr3 }
        } else {
            Paging::Bits32 {
                cr3,
                large: cr4 & CR4_PSE != 0,
            }
        }
    }

    /// As a vCPU has it now.
    pub fn of_cpu(cpu: &CpuState) -> Paging {
        let special = &cpu.special;
        Paging::of(special.cr0, special.cr3, special.cr4, special.efer)
    }

    /// Translates a linear address. `None`: nothing is mapped there, or the tables cannot be read.
    pub fn translate(self, memory: &impl Physical, linear: u64) -> Option<Translation> {
        match self {
            Paging::Off => {
                let physical = linear & u64::from(u32::MAX);
                Some(Translation {
                    physical,
                    left: 0x1000 - (physical & 0xfff),
                    user: false,
                })
            }
            Paging::Bits32 { cr3, large } => two_levels(memory, cr3, large, linear & u64::from(u32::MAX)),
            Paging::Pae { cr3 } => pae(memory, cr3, linear & u64::from(u32::MAX)),
            Paging::Long { cr3, levels } => {
                // Canonical: the bits above the highest translated one repeat it [SDM 1 §3.3.7.1].
                let unused = 64 - (PAGE_BITS + TABLE_BITS * u32::from(levels));
                if (linear as i64) << unused >> unused != linear as i64 {
                    return None;
                }
                descend(memory, cr3 & FRAME, u32::from(levels), linear, true)
            }
        }
    }
}

fn entry(memory: &impl Physical, address: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    memory.read(address, &mut bytes).then_some(())?;
    Some(u64::from_le_bytes(bytes)).filter(|entry| entry & PRESENT != 0)
}

fn found(frame: u64, bits: u32, linear: u64, user: bool) -> Option<Translation> {
    let inside = linear & ((1 << bits) - 1);
    Some(Translation {
        physical: frame & FRAME & !((1 << bits) - 1) | inside,
        left: (1 << bits) - inside,
        user,
    })
}

/// Tables of 512 entries, from `level` down to 1. Pages may end at levels 3 (1 GiB) and 2 (2 MiB).
fn descend(
    memory: &impl Physical,
    mut table: u64,
    mut level: u32,
    linear: u64,
    mut user: bool,
) -> Option<Translation> {
    loop {
        let bits = PAGE_BITS + TABLE_BITS * (level - 1);
        let index = linear >> bits & ((1 << TABLE_BITS) - 1);
        let entry = entry(memory, table + 8 * index)?;
        user &= entry & USER != 0;
        if level == 1 || (level <= 3 && entry & PAGE_SIZE != 0) {
            return found(entry, bits, linear, user);
        }
        table = entry & FRAME;
        level -= 1;
    }
}

/// [SDM 3A §5.4]: the page-directory-pointer table has four entries, at 32-byte alignment, with no rights in them.
fn pae(memory: &impl Physical, cr3: u64, linear: u64) -> Option<Translation> {
    let pointer = entry(memory, (cr3 & 0xffff_ffe0) + 8 * (linear >> 30))?;
    descend(memory, pointer & FRAME, 2, linear, true)
}

/// [SDM 3A §5.3]: 1024 entries of 32 bits a table; 4 MiB pages have physical bits 39 to 32 in bits 20 to 13.
fn two_levels(memory: &impl Physical, cr3: u64, large: bool, linear: u64) -> Option<Translation> {
    let entry = |address| {
        let mut bytes = [0; 4];
        memory.read(address, &mut bytes).then_some(())?;
        Some(u64::from(u32::from_le_bytes(bytes))).filter(|entry| entry & PRESENT != 0)
    };
    let directory = entry((cr3 & 0xffff_f000) + 4 * (linear >> 22))?;
    let user = directory & USER != 0;
    if large && directory & PAGE_SIZE != 0 {
        let frame = directory & 0xffc0_0000 | (directory >> 13 & 0xff) << 32;
        return found(frame, 22, linear, user);
    }
    let page = entry((directory & 0xffff_f000) + 4 * (linear >> 12 & 0x3ff))?;
    found(page & 0xffff_f000, PAGE_BITS, linear, user && page & USER != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Words of 4 bytes where something was put, zero below `end`, and nothing from there on.
    struct Memory {
        words: HashMap<u64, u32>,
        end: u64,
    }

    impl Memory {
        fn new() -> Memory {
            Memory {
                words: HashMap::new(),
                end: 1 << 20,
            }
        }

        fn put(mut self, address: u64, entry: u64) -> Memory {
            self.words.insert(address, entry as u32);
            self.words.insert(address + 4, (entry >> 32) as u32);
            self
        }

        fn put32(mut self, address: u64, entry: u32) -> Memory {
            self.words.insert(address, entry);
            self
        }
    }

    impl Physical for Memory {
        fn read(&self, address: u64, data: &mut [u8]) -> bool {
            if address >= self.end {
                return false;
            }
            for (index, chunk) in data.chunks_mut(4).enumerate() {
                let word = self.words.get(&(address + 4 * index as u64)).copied();
                chunk.copy_from_slice(&word.unwrap_or(0).to_le_bytes()[..chunk.len()]);
            }
            true
        }
    }

    const P: u64 = PRESENT;
    const U: u64 = USER;
    const S: u64 = PAGE_SIZE;

    fn at(physical: u64, left: u64, user: bool) -> Option<Translation> {
        Some(Translation { physical, left, user })
    }

    #[test]
    fn control_registers_choose_the_mode() {
        let pg = CR0_PG;
        assert_eq!(Paging::of(1, 0x1000, CR4_PAE, 0), Paging::Off);
        assert_eq!(
            Paging::of(pg, 0x1000, 0, 0),
            Paging::Bits32 {
                cr3: 0x1000,
                large: false
            }
        );
        assert_eq!(
            Paging::of(pg, 0x1000, CR4_PSE, 0),
            Paging::Bits32 {
                cr3: 0x1000,
                large: true
            }
        );
        assert_eq!(Paging::of(pg, 0x1000, CR4_PAE, 0), Paging::Pae { cr3: 0x1000 });
        let long = |cr4| Paging::of(pg, 0x1000, cr4, EFER_LMA);
        assert_eq!(
            long(CR4_PAE),
            Paging::Long {
                cr3: 0x1000,
                levels: 4
            }
        );
        assert_eq!(
            long(CR4_PAE | CR4_LA57),
            Paging::Long {
                cr3: 0x1000,
                levels: 5
            }
        );
    }

    #[test]
    fn without_paging_addresses_have_32_bits() {
        let memory = Memory::new();
        assert_eq!(
            Paging::Off.translate(&memory, 0x1_0000_7123),
            at(0x7123, 0xedd, false)
        );
    }

    #[test]
    fn four_levels_and_all_page_sizes() {
        // Linear 0xffff_8000_0000_0000: PML4 entry 256; then entries 0.
        let base = 0xffff_8000_0000_0000u64;
        let memory = Memory::new()
            .put(0x1000 + 8 * 256, 0x2000 | P | U)
            .put(0x2000, 0x3000 | P | U)
            .put(0x2000 + 8, 0x1_4000_0000 | P | S)
            .put(0x3000, 0x4000 | P | U)
            .put(0x3000 + 8, 0x0060_0000 | P | S | U)
            .put(0x4000 + 8 * 5, 1 << 63 | 0x9_8765_4000 | P | U)
            .put(0x4000 + 8 * 6, 0x7000 | P);
        let long = Paging::Long {
            cr3: 0x1000 | 0x18,
            levels: 4,
        };
        let translate = |offset: u64| long.translate(&memory, base + offset);
        assert_eq!(translate(0x5678), at(0x9_8765_4678, 0x988, true));
        assert_eq!(
            translate(0x6000),
            at(0x7000, 0x1000, false),
            "not the user's at one level"
        );
        assert_eq!(translate(0x20_0001), at(0x0060_0001, 0x1f_ffff, true));
        assert_eq!(
            translate(0x4000_0123),
            at(0x1_4000_0123, 0x4000_0000 - 0x123, false)
        );
        for absent in [0x7000, 0x40_0000, 0x8000_0000] {
            assert_eq!(translate(absent), None, "{absent:#x}");
        }
        for wild in [0x0000_8000_0000_0000, 0xfff0_8000_0000_0000] {
            assert_eq!(long.translate(&memory, wild), None, "{wild:#x} is not canonical");
        }
    }

    #[test]
    fn five_levels() {
        // Linear 0xff00...: PML5 entry 256, then 1, 2, 3, 4.
        let linear = 0xff00_0000_0000_0000u64 | 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0xabc;
        let memory = Memory::new()
            .put(0x1000 + 8 * 256, 0x2000 | P)
            .put(0x2000 + 8, 0x3000 | P)
            .put(0x3000 + 16, 0x4000 | P)
            .put(0x4000 + 24, 0x5000 | P)
            .put(0x5000 + 32, 0x6000 | P);
        let five = Paging::Long {
            cr3: 0x1000,
            levels: 5,
        };
        assert_eq!(five.translate(&memory, linear), at(0x6abc, 0x544, false));
        let four = Paging::Long {
            cr3: 0x1000,
            levels: 4,
        };
        assert_eq!(four.translate(&memory, linear), None, "not canonical with four");
    }

    #[test]
    fn the_size_bit_means_nothing_at_the_upper_levels_and_in_a_page_table() {
        let memory = Memory::new()
            .put(0x1000, 0x2000 | P | S)
            .put(0x2000, 0x3000 | P)
            .put(0x3000, 0x4000 | P)
            .put(0x4000, 0x5000 | P | S);
        let long = Paging::Long {
            cr3: 0x1000,
            levels: 4,
        };
        assert_eq!(long.translate(&memory, 0x10), at(0x5010, 0xff0, false));
    }

    #[test]
    fn pae_has_four_pointers_and_2_mib_pages() {
        // CR3 may be at any multiple of 32.
        let memory = Memory::new()
            .put(0x1020 + 8 * 3, 0x2000 | P)
            .put(0x2000, 0x3000 | P | U)
            .put(0x2000 + 8, 0x2_0020_0000 | P | S | U)
            .put(0x3000 + 8, 0x8000 | P | U);
        let pae = Paging::Pae { cr3: 0x1020 };
        assert_eq!(pae.translate(&memory, 0xc000_1004), at(0x8004, 0xffc, true));
        assert_eq!(
            pae.translate(&memory, 0xc020_0004),
            at(0x2_0020_0004, 0x1f_fffc, true)
        );
        assert_eq!(pae.translate(&memory, 0), None);
    }

    #[test]
    fn two_levels_with_and_without_4_mib_pages() {
        let memory = Memory::new()
            .put32(0x1000, 0x2000 | 1 | 4)
            .put32(0x1000 + 4, 0x0040_0000 | 0x2000 | 0x80 | 1 | 4)
            .put32(0x2000 + 4 * 7, 0x9000 | 1 | 4);
        let small = Paging::Bits32 {
            cr3: 0x1000,
            large: false,
        };
        let large = Paging::Bits32 {
            cr3: 0x1000,
            large: true,
        };
        assert_eq!(large.translate(&memory, 0x7abc), at(0x9abc, 0x544, true));
        // Bit 13 of the entry is bit 32 of the address.
        assert_eq!(
            large.translate(&memory, 0x40_0010),
            at(0x1_0040_0010, 0x40_0000 - 0x10, true)
        );
        assert_eq!(
            small.translate(&memory, 0x40_0010),
            None,
            "outside of memory: the bit is ignored"
        );
    }

    #[test]
    fn tables_outside_of_memory_end_the_walk() {
        let memory = Memory::new().put(0x1000, 0xffff_f000 | P);
        for levels in [4, 5] {
            let long = Paging::Long { cr3: 0x1000, levels };
            assert_eq!(long.translate(&memory, 0), None);
        }
        let nowhere = Paging::Long {
            cr3: FRAME,
            levels: 4,
        };
        assert_eq!(nowhere.translate(&memory, 0), None);
    }
}
