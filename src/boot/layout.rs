//! Where everything is in the guest's physical address space and port space: the one place for addresses.
//!
//! ```text
//! 0x0000_0000_0000  low RAM (640 KiB; boot parameters, page tables, GDT below 0x9_0000)
//! 0x0000_000a_0000  hole: VGA and option ROMs (not RAM)
//! 0x0000_000e_0000  ACPI tables (RSDP first), reserved in the E820 map
//! 0x0000_0010_0000  RAM: kernels from 1 MiB up, the initrd at the top of RAM below the hole
//! 0x0000_c000_0000  PCI hole: RAM that does not fit below continues at 4 GiB; first a window for BARs (--transport pci)
//! 0x0000_e000_0000  PCI configuration spaces, ECAM of bus 0 (--transport pci)
//! 0x0000_feb0_0000  virtio-mmio devices, a page each
//! 0x0000_fec0_0000  IOAPIC
//! 0x0000_fee0_0000  local APICs
//! 0x0001_0000_0000  RAM above 4 GiB, then at a multiple of 4 GiB a window for BARs (--transport pci)
//! ```

/// Boot GDT.
pub const GDT: u64 = 0x500;
/// The `hvm_start_info` of a PVH boot, with its module list and memory map behind it.
pub const PVH_START_INFO: u64 = 0x6000;
/// The zero page (`boot_params`) of the 64-bit Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack top.
pub const BOOT_STACK: u64 = 0x8ff0;
/// PML4, then one PDPT and four PDs: identity map of the first 4 GiB by 2 MiB pages.
pub const PML4: u64 = 0x9000;
/// The page-directory-pointer table below [`PML4`].
pub const PDPT: u64 = 0xa000;
/// First of four page directories.
pub const PAGE_DIRECTORIES: u64 = 0xb000;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, with its NUL. Linux on x86 accepts up to 2048 bytes (`COMMAND_LINE_SIZE`); other
/// kernels may take more, so a kernel's own `cmdline_size` decides when it states one.
pub const CMDLINE_CAPACITY: usize = 0x1_0000;
/// End of usable low RAM.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables: RSDP first, where a scan from 0xe0000 finds it.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// Where RAM goes on after the legacy hole, and where kernels are loaded at the earliest.
pub const HIMEM: u64 = 0x10_0000;
/// Start of the PCI hole: RAM below 4 GiB ends here at the latest.
pub const PCI_HOLE: u64 = 0xc000_0000;
/// Where RAM above the PCI hole starts.
pub const RAM_ABOVE_4G: u64 = 0x1_0000_0000;
/// The first virtio-mmio device; the next follow, [`crate::virtio::mmio::WINDOW_BYTES`] each.
pub const VIRTIO_MMIO: u64 = 0xfeb0_0000;
/// The first interrupt behind those of the I/O APIC: from here on they are messages.
pub const FIRST_MESSAGE_GSI: u32 = 24;
/// The interrupts of virtio devices, by their places, and of the pins of PCI slots from 1 on: those of the I/O APIC that no PC has, then those of ISA that
/// nothing here uses.
pub const VIRTIO_GSIS: [u32; 16] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 14, 15];
/// ECAM of PCI bus 0.
pub const ECAM: u64 = 0xe000_0000;
/// Addresses below 4 GiB for BARs.
pub const PCI_WINDOW_32: std::ops::Range<u64> = PCI_HOLE..ECAM;
/// How many addresses there are for BARs above 4 GiB, bytes.
const PCI_WINDOW_64_BYTES: u64 = 4 << 30;

/// Addresses above 4 GiB for BARs, in a machine with so much RAM: behind it.
pub fn pci_window_64(memory_bytes: u64) -> std::ops::Range<u64> {
    let above = memory_bytes.saturating_sub(PCI_HOLE);
    let start = (RAM_ABOVE_4G + above).next_multiple_of(PCI_WINDOW_64_BYTES);
    start..start + PCI_WINDOW_64_BYTES
}

/// I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APIC.
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages that KVM needs on Intel for its TSS (`KVM_SET_TSS_ADDR`), inside the hole.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page for KVM's identity map (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Port numbers and interrupt lines.
pub mod io {
    /// First serial port (COM1), 8 ports.
    pub const SERIAL0: u16 = 0x3f8;
    /// COM1's line.
    pub const SERIAL0_IRQ: u32 = 4;
    /// CMOS RTC: index and data.
    pub const RTC: u16 = 0x70;
    /// RTC line.
    pub const RTC_IRQ: u32 = 8;
    /// i8042 data port (0x60); the command port is 0x64.
    pub const I8042: u16 = 0x60;
    /// Debug console: bytes written go to the log of the host. Reads 0xe9, which tells that it is there.
    pub const DEBUG_CONSOLE: u16 = 0xe9;
    /// Debug exit: a write ends the machine with a status.
    pub const DEBUG_EXIT: u16 = 0xf4;
    /// The test device that blocks; in no machine without `--test-tarpit`.
    pub const TARPIT: u16 = 0xf6;
    /// pvpanic.
    pub const PVPANIC: u16 = 0x505;
    /// ACPI PM1a event block: status at +0, enable at +2.
    pub const PM1A_EVENT: u16 = 0x600;
    /// ACPI PM1a control block.
    pub const PM1A_CONTROL: u16 = 0x604;
    /// ACPI PM timer, 4 bytes.
    pub const PM_TIMER: u16 = 0x608;
    /// ACPI reset register, one byte.
    pub const ACPI_RESET: u16 = 0x60c;
    /// What to write to [`ACPI_RESET`].
    pub const ACPI_RESET_VALUE: u8 = 0x1;
    /// The SCI's line.
    pub const SCI_IRQ: u32 = 9;
    /// Delay, for measurements: in a machine only when it is asked for.
    pub const DELAY: u16 = 0xea0;
    /// PCI configuration mechanism #1: address at +0, data at +4.
    pub const PCI_CONFIG: u16 = 0xcf8;
    /// Its data.
    pub const PCI_CONFIG_DATA: u16 = 0xcfc;
}
