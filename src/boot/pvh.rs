//! What a PVH kernel is told: `hvm_start_info`, its module list and its memory map.
//!
//! [Xen: public/arch-x86/hvm/start_info.h]

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams, Error};
use linux_loader::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::layout;
use super::params::Told;
use crate::machine::memory::RangeKind;

/// The version with a memory map.
const VERSION: u32 = 1;
const MODULES: u64 = layout::PVH_START_INFO + 0x40;
const MEMORY_MAP: u64 = layout::PVH_START_INFO + 0x80;

/// Writes all of it to its place.
pub fn write<M: GuestMemoryBackend>(memory: &M, told: &Told) -> Result<(), Error> {
    let map: Vec<_> = told
        .memory_map
        .iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.length,
            type_: match range.kind {
                RangeKind::Usable => XEN_HVM_MEMMAP_TYPE_RAM,
                RangeKind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
            },
            reserved: 0,
        })
        .collect();
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: told.initrd.iter().len() as u32,
        modlist_paddr: if told.initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: told.rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if let Some(initrd) = told.initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.length,
            ..Default::default()
        };
        params.set_modules(&[module], GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory)
}

#[cfg(test)]
mod tests {
    use super::super::elf::tests::memory;
    use super::super::initrd::Initrd;
    use super::*;
    use crate::machine::memory::memory_map;
    use vm_memory::Bytes;

    #[test]
    fn everything_is_reachable_from_the_start_info() {
        let (memory, map) = (memory(), memory_map(4608 << 20));
        let initrd = Some(Initrd {
            address: 0x1f0_0000,
            length: 0x1234,
        });
        let told = Told {
            memory_map: &map,
            initrd,
            rsdp: layout::ACPI_TABLES,
            kernel: 0,
        };
        write(&memory, &told).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(layout::PVH_START_INFO)).unwrap();
        assert_eq!(
            (info.magic, info.version, info.nr_modules),
            (XEN_HVM_START_MAGIC_VALUE, 1, 1)
        );
        assert_eq!(
            (info.cmdline_paddr, info.rsdp_paddr),
            (layout::CMDLINE, layout::ACPI_TABLES)
        );
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x1f0_0000, 0x1234));
        let step = size_of::<hvm_memmap_table_entry>() as u64;
        for (index, range) in map.iter().enumerate() {
            let at = GuestAddress(info.memmap_paddr + step * index as u64);
            let entry: hvm_memmap_table_entry = memory.read_obj(at).unwrap();
            assert_eq!((entry.addr, entry.size), (range.start, range.length));
        }
        assert!(info.memmap_paddr + step * map.len() as u64 <= layout::ZERO_PAGE);
    }

    #[test]
    fn without_an_initrd_there_is_no_module() {
        let (memory, map) = (memory(), memory_map(64 << 20));
        write(
            &memory,
            &Told {
                memory_map: &map,
                initrd: None,
                rsdp: 0,
                kernel: 0,
            },
        )
        .unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(layout::PVH_START_INFO)).unwrap();
        assert_eq!((info.nr_modules, info.modlist_paddr), (0, 0));
    }
}
