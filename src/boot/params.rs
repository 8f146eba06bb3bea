//! The zero page of the Linux boot protocol.
//!
//! [Linux: Documentation/arch/x86/zero-page.rst and boot.rst]

use linux_loader::bootparam::{E820_MAX_ENTRIES_ZEROPAGE, boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams, Error};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::initrd::Initrd;
use super::layout;
use crate::machine::memory::{MemoryRange, RangeKind};

/// "Undefined": a boot loader without a number of its own.
const TYPE_OF_LOADER: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What the kernel is told beside its own header.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    /// Memory map.
    pub memory_map: &'a [MemoryRange],
    /// Initrd, if there is one.
    pub initrd: Option<Initrd>,
    /// Address of the RSDP.
    pub rsdp: u64,
    /// Where the kernel was loaded.
    pub kernel: u64,
}

/// The header for an ELF kernel, which brings none: what a bzImage of the same kernel would say.
fn plain_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        kernel_alignment: 0x20_0000,
        ..Default::default()
    }
}

/// The address as the header's 32 bits and the extension's.
fn split(address: u64) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}

/// Fills a zero page. `header` is the bzImage's own.
pub fn zero_page(header: Option<setup_header>, told: &Told) -> boot_params {
    let mut params = boot_params {
        hdr: header.unwrap_or_else(plain_header),
        ..Default::default()
    };
    params.hdr.type_of_loader = TYPE_OF_LOADER;
    params.hdr.code32_start = told.kernel as u32;
    (params.hdr.cmd_line_ptr, params.ext_cmd_line_ptr) = split(layout::CMDLINE);
    if let Some(initrd) = told.initrd {
        (params.hdr.ramdisk_image, params.ext_ramdisk_image) = split(initrd.address);
        (params.hdr.ramdisk_size, params.ext_ramdisk_size) = split(initrd.length);
    }
    params.acpi_rsdp_addr = told.rsdp;
    let mut table = [boot_e820_entry::default(); E820_MAX_ENTRIES_ZEROPAGE];
    for (entry, range) in table.iter_mut().zip(told.memory_map) {
        let kind = match range.kind {
            RangeKind::Usable => E820_RAM,
            RangeKind::Reserved => E820_RESERVED,
        };
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.length,
            r#type: kind,
        };
    }
    params.e820_table = table;
    params.e820_entries = told.memory_map.len().min(E820_MAX_ENTRIES_ZEROPAGE) as u8;
    params
}

/// Fills the zero page and writes it to its place.
pub fn write<M: GuestMemoryBackend>(
    memory: &M,
    header: Option<setup_header>,
    told: &Told,
) -> Result<(), Error> {
    let params = BootParams::new(&zero_page(header, told), GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory::memory_map;
    use vm_memory::ByteValued;

    fn field<const N: usize>(params: &boot_params, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&params.as_slice()[offset..offset + N]);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn fields_are_where_the_protocol_has_them() {
        let map = memory_map(4608 << 20);
        let told = Told {
            memory_map: &map,
            initrd: Some(Initrd {
                address: 0x1_2345_6000,
                length: 0x1234,
            }),
            rsdp: layout::ACPI_TABLES,
            kernel: 0x100_0000,
        };
        let own = setup_header {
            init_size: 0x77,
            ..plain_header()
        };
        let params = zero_page(Some(own), &told);
        assert_eq!(field::<8>(&params, 0x070), layout::ACPI_TABLES);
        assert_eq!(field::<4>(&params, 0x0c0), 1, "ext_ramdisk_image");
        assert_eq!(field::<1>(&params, 0x1e8), map.len() as u64, "e820_entries");
        assert_eq!(field::<1>(&params, 0x1ef), 0, "sentinel");
        assert_eq!(
            field::<4>(&params, 0x202),
            u64::from(u32::from_le_bytes(*b"HdrS"))
        );
        assert_eq!(field::<1>(&params, 0x210), 0xff, "type_of_loader");
        assert_eq!(field::<1>(&params, 0x211), 1, "loadflags");
        assert_eq!(field::<4>(&params, 0x218), 0x2345_6000, "ramdisk_image");
        assert_eq!(field::<4>(&params, 0x21c), 0x1234, "ramdisk_size");
        assert_eq!(field::<4>(&params, 0x228), layout::CMDLINE, "cmd_line_ptr");
        assert_eq!(field::<4>(&params, 0x260), 0x77, "the kernel's own init_size");
        for (index, range) in map.iter().enumerate() {
            let at = 0x2d0 + 20 * index;
            assert_eq!(
                (field::<8>(&params, at), field::<8>(&params, at + 8)),
                (range.start, range.length)
            );
            let kind = if range.kind == RangeKind::Usable { 1 } else { 2 };
            assert_eq!(field::<4>(&params, at + 16), kind);
        }
    }
}
