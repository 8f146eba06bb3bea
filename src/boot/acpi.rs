//! ACPI tables: what the machine has, in the words of [ACPI 6.5].
//!
//! RSDP, XSDT, FADT, FACS, MADT, DSDT, and MCFG where there is a PCI bus, one behind the other from [`layout::ACPI_TABLES`]. Not hardware-reduced:
//! there are a PM timer, a fixed power button and an SCI. The interrupt controllers are those of KVM.

use crate::devices::acpi_pm::SLP_TYP_S5;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    PackageBuilder, Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout::{self, io};
use crate::pci::ECAM_BUS_BYTES;

const OEM: [u8; 6] = *b"ACTVMM";
const OEM_TABLE: [u8; 8] = *b"ACTORVMM";
const OEM_REVISION: u32 = 1;

/// What the tables tell of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// The APIC id of each processor, by processor number.
    pub apic_ids: Vec<u32>,
    /// KVM's interval timer is there: ISA line 0 then is at pin 2 of the I/O APIC.
    pub pit: bool,
    /// COM1.
    pub serial0: bool,
    /// CMOS clock.
    pub rtc: bool,
    /// A keyboard controller that a driver could use. One that only resets the machine is none.
    pub i8042: bool,
    /// pvpanic.
    pub pvpanic: bool,
    /// Virtio devices behind virtio-mmio.
    pub virtio: Vec<VirtioMmio>,
    /// A PCI bus.
    pub pci: Option<PciRoot>,
}

/// A PCI bus, as it is from its host bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciRoot {
    /// Addresses for BARs, below 4 GiB and above.
    pub windows: [Range<u64>; 2],
    /// Slots, and the interrupts that their pins INTA# lead to.
    pub pins: Vec<(u8, u32)>,
}

/// A virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Where its registers are.
    pub address: u32,
    /// How many bytes of them.
    pub bytes: u32,
    /// Its interrupt.
    pub gsi: u32,
    /// Edge-triggered; else level-triggered.
    pub edge: bool,
}

impl AcpiConfig {
    /// The usual devices and these processors.
    pub fn new(apic_ids: Vec<u32>) -> AcpiConfig {
        AcpiConfig {
            apic_ids,
            pit: true,
            serial0: true,
            rtc: true,
            i8042: false,
            pvpanic: true,
            virtio: Vec::new(),
            pci: None,
        }
    }
}

/// Tables that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// No processor.
    #[error("a machine needs a processor")]
    NoProcessor,
    /// More than fits.
    #[error(
        "the tables for {cpus} processors need {needed} bytes and there is room for {room}; use fewer with --cpus"
    )]
    TooLarge {
        /// Processors.
        cpus: usize,
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        room: u64,
    },
    /// Guest memory refused a write: our bug.
    #[error("guest memory cannot be written")]
    Memory(#[from] GuestMemoryError),
}

/// A table and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its guest-physical address.
    pub address: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The tables, RSDP first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables(Vec<Table>);

impl Tables {
    /// The address of the RSDP.
    pub fn rsdp(&self) -> u64 {
        layout::ACPI_TABLES
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Table> {
        self.0.iter()
    }

    /// Bytes from the first to the end of the last.
    pub fn total_bytes(&self) -> u64 {
        self.0.last().map_or(0, |last| {
            last.address + last.bytes.len() as u64 - layout::ACPI_TABLES
        })
    }

    /// Writes them to their places.
    pub fn write<M: GuestMemoryBackend>(&self, memory: &M) -> Result<(), AcpiError> {
        for table in &self.0 {
            memory.write_slice(&table.bytes, GuestAddress(table.address))?;
        }
        Ok(())
    }
}

/// APIC ids from here on have no place in the old MADT entry, which has 8 bits and uses the last value for "all".
const FIRST_X2APIC_ONLY: u32 = 255;

fn aml(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// Makes the tables.
pub fn build(config: &AcpiConfig) -> Result<Tables, AcpiError> {
    if config.apic_ids.is_empty() {
        return Err(AcpiError::NoProcessor);
    }
    let mut tables = Vec::new();
    // The RSDP has its place but needs the XSDT's address, which comes last.
    let mut next = layout::ACPI_TABLES + Rsdp::len() as u64;
    let mut add = |bytes: Vec<u8>| {
        // The FACS must be on 64 bytes [ACPI §5.2.10]; it does the others no harm.
        let address = next.next_multiple_of(64);
        next = address + bytes.len() as u64;
        tables.push(Table { address, bytes });
        address
    };
    let facs = add(aml(&FACS::new()));
    let dsdt = add(dsdt(config));
    let fadt = add(fadt(config, facs as u32, dsdt));
    let madt = add(madt(config));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if config.pci.is_some() {
        xsdt.add_entry(add(mcfg()));
    }
    let xsdt = add(aml(&xsdt));
    tables.insert(
        0,
        Table {
            address: layout::ACPI_TABLES,
            bytes: aml(&Rsdp::new(OEM, xsdt)),
        },
    );

    if next > layout::ACPI_TABLES_END {
        return Err(AcpiError::TooLarge {
            cpus: config.apic_ids.len(),
            needed: next - layout::ACPI_TABLES,
            room: layout::ACPI_TABLES_END - layout::ACPI_TABLES,
        });
    }
    Ok(Tables(tables))
}

/// Makes the tables and writes them.
pub fn write<M: GuestMemoryBackend>(memory: &M, config: &AcpiConfig) -> Result<Tables, AcpiError> {
    let tables = build(config)?;
    tables.write(memory)?;
    Ok(tables)
}

/// IAPC_BOOT_ARCH [ACPI §5.2.9.3].
mod boot_arch {
    pub const LEGACY_DEVICES: u16 = 1 << 0;
    pub const I8042: u16 = 1 << 1;
    pub const VGA_NOT_PRESENT: u16 = 1 << 2;
    pub const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
}

fn fadt(config: &AcpiConfig, facs: u32, dsdt: u64) -> Vec<u8> {
    let port = |port: u16, bits: u8, access| GAS::new(GasSpace::SystemIo, bits, 0, access, port.into());
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .firmware_ctrl_32(facs)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // PWR_BUTTON stays clear: the button is in the fixed registers. The sleep button is nowhere, and the clock
        // wakes nobody through them.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    table.dsdt = (dsdt as u32).into();
    // No SMI command port: the machine is in ACPI mode from the start, SCI_EN is always set.
    table.sci_int = (io::SCI_IRQ as u16).into();
    table.pm1a_evt_blk = u32::from(io::PM1A_EVENT).into();
    table.pm1_evt_len = 4;
    table.x_pm1a_evt_blk = port(io::PM1A_EVENT, 32, AccessSize::WordAccess);
    table.pm1a_cnt_blk = u32::from(io::PM1A_CONTROL).into();
    table.pm1_cnt_len = 2;
    table.x_pm1a_cnt_blk = port(io::PM1A_CONTROL, 16, AccessSize::WordAccess);
    table.pm_tmr_blk = u32::from(io::PM_TIMER).into();
    table.pm_tmr_len = 4;
    table.x_pm_tmr_blk = port(io::PM_TIMER, 32, AccessSize::DwordAccess);
    table.reset_reg = port(io::ACPI_RESET, 8, AccessSize::ByteAccess);
    table.reset_value = io::ACPI_RESET_VALUE;
    // Above these limits a state is not there: no C2, no C3.
    table.p_lvl2_lat = 101.into();
    table.p_lvl3_lat = 1001.into();

    let mut arch = boot_arch::VGA_NOT_PRESENT;
    if config.serial0 {
        arch |= boot_arch::LEGACY_DEVICES;
    }
    if config.i8042 {
        arch |= boot_arch::I8042;
    }
    if config.rtc {
        table.century = 0x32;
    } else {
        arch |= boot_arch::CMOS_RTC_NOT_PRESENT;
    }
    table.iapc_boot_arch = arch.into();
    aml(&table.finalize())
}

fn madt(config: &AcpiConfig) -> Vec<u8> {
    const REVISION: u8 = 5;
    /// The 8259s are there too.
    const PCAT_COMPAT: u32 = 1;
    /// Active high, level triggered [ACPI §5.2.12.5].
    const LEVEL_HIGH: u16 = 0b11_01;
    /// As the bus has it: for ISA active high, edge triggered.
    const AS_THE_BUS: u16 = 0;
    const ALL_PROCESSORS: u8 = 0xff;

    let mut body: Vec<u8> = Vec::new();
    body.dword(layout::LAPIC as u32);
    body.dword(PCAT_COMPAT);
    for (uid, id) in config.apic_ids.iter().enumerate() {
        match (u8::try_from(uid), u8::try_from(*id)) {
            (Ok(uid), Ok(id)) if u32::from(uid.max(id)) < FIRST_X2APIC_ONLY => {
                ProcessorLocalApic::new(uid, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            _ => local_x2apic(&mut body, uid as u32, *id),
        }
    }
    IoApic::new(0, layout::IOAPIC as u32, 0).to_aml_bytes(&mut body);
    if config.pit {
        source_override(&mut body, 0, 2, AS_THE_BUS);
    }
    source_override(&mut body, io::SCI_IRQ as u8, io::SCI_IRQ, LEVEL_HIGH);
    // LINT1 is where NMIs come in, on every processor [ACPI §5.2.12.7, §5.2.12.13].
    body.vec(&[4, 6, ALL_PROCESSORS, 0, 0, 1]);
    if config.apic_ids.iter().any(|id| *id >= FIRST_X2APIC_ONLY) {
        body.vec(&[0xa, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    let mut table = Sdt::new(*b"APIC", 36, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// [ACPI §5.2.12.12]
fn local_x2apic(body: &mut Vec<u8>, uid: u32, id: u32) {
    body.vec(&[9, 16, 0, 0]);
    body.dword(id);
    body.dword(EnabledStatus::Enabled as u32);
    body.dword(uid);
}

/// [ACPI §5.2.12.5]
fn source_override(body: &mut Vec<u8>, source: u8, gsi: u32, flags: u16) {
    const ISA: u8 = 0;
    body.vec(&[2, 10, ISA, source]);
    body.dword(gsi);
    body.word(flags);
}

/// [PCI Firmware 3.0 §4.1.2]
fn mcfg() -> Vec<u8> {
    let mut table = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    table.add_ecam(layout::ECAM, 0, 0, 0);
    aml(&table)
}

/// The host bridge, and the addresses of its configuration spaces, which are no window: "motherboard resources".
/// [PCI Firmware 3.0 §4.1.2, §4.3; ACPI §6.2.13]
fn pci_root(bus: &mut Vec<u8>, root: &PciRoot) {
    let ecam = aml(&Memory32Fixed::new(
        true,
        layout::ECAM as u32,
        ECAM_BUS_BYTES as u32,
    ));
    device(bus, "MBRS", &EISAName::new("PNP0C02"), 0, &[ecam]);

    let cacheable = AddressSpaceCacheable::NotCacheable;
    let [low, high] = &root.windows;
    let low = AddressSpace::new_memory(cacheable, true, low.start as u32, (low.end - 1) as u32, None);
    let high = AddressSpace::new_memory(cacheable, true, high.start, high.end - 1, None);
    let resources = Raw([
        aml(&AddressSpace::new_bus_number(0u16, 0u16)),
        aml(&IO::new(io::PCI_CONFIG, io::PCI_CONFIG, 1, 8)),
        aml(&low),
        aml(&high),
    ]
    .concat());
    let mut pins = PackageBuilder::new();
    for (slot, gsi) in &root.pins {
        // Any function of the slot, INTA#, straight to an interrupt.
        let mut pin = PackageBuilder::new();
        pin.add_element(&(u32::from(*slot) << 16 | 0xffff));
        for number in [0u32, 0, *gsi] {
            pin.add_element(&number);
        }
        pins.add_element(&pin);
    }
    let resources = ResourceTemplate::new(vec![&resources]);
    let (express, conventional) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let names: [(&str, &dyn Aml); 7] = [
        ("_HID", &express),
        ("_CID", &conventional),
        ("_UID", &0u8),
        ("_SEG", &0u8),
        ("_BBN", &0u8),
        ("_CRS", &resources),
        ("_PRT", &pins),
    ];
    let names = names.map(|(name, value)| Name::new(name.into(), value));
    let children = names.iter().map(|name| name as &dyn Aml).collect();
    Device::new("PCI0".into(), children).to_aml_bytes(bus);
}

fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    const REVISION: u8 = 2; // 64-bit integers
    let mut body = Vec::new();

    let mut s5 = PackageBuilder::new();
    for value in [SLP_TYP_S5, SLP_TYP_S5, 0, 0] {
        s5.add_element(&value);
    }
    Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut body);

    let mut bus = Vec::new();
    if config.serial0 {
        let resources = [
            aml(&IO::new(io::SERIAL0, io::SERIAL0, 1, 8)),
            aml(&Interrupt::new(true, true, false, false, io::SERIAL0_IRQ)),
        ];
        device(&mut bus, "COM1", &EISAName::new("PNP0501"), 0, &resources);
    }
    if config.rtc {
        let resources = [
            aml(&IO::new(io::RTC, io::RTC, 1, 2)),
            aml(&Interrupt::new(true, true, false, false, io::RTC_IRQ)),
        ];
        device(&mut bus, "RTC0", &EISAName::new("PNP0B00"), 0, &resources);
    }
    if config.pvpanic {
        let resources = [aml(&IO::new(io::PVPANIC, io::PVPANIC, 1, 1))];
        device(&mut bus, "PEVT", &"QEMU0001", 0, &resources);
    }
    for (uid, virtio) in config.virtio.iter().enumerate() {
        // Active high, not shared.
        let resources = [
            aml(&Memory32Fixed::new(true, virtio.address, virtio.bytes)),
            aml(&Interrupt::new(true, virtio.edge, false, false, virtio.gsi)),
        ];
        // The ID that Linux's virtio-mmio driver is known by.
        device(
            &mut bus,
            &format!("VR{uid:02X}"),
            &"LNRO0005",
            uid as u8,
            &resources,
        );
    }
    if let Some(root) = &config.pci {
        pci_root(&mut bus, root);
    }
    for uid in 0..config.apic_ids.len() {
        let hid = Name::new("_HID".into(), &"ACPI0007");
        let uid_name = Name::new("_UID".into(), &(uid as u32));
        Device::new(Path::new(&processor_name(uid)), vec![&hid, &uid_name]).to_aml_bytes(&mut bus);
    }
    let bus = Raw(bus);
    Scope::new("\\_SB_".into(), vec![&bus]).to_aml_bytes(&mut body);

    let mut table = Sdt::new(*b"DSDT", 36, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// `C` and three hexadecimal digits.
fn processor_name(uid: usize) -> String {
    format!("C{uid:03X}")
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// A device that is there, enabled, shown and working.
fn device(bus: &mut Vec<u8>, name: &str, hid: &dyn Aml, uid: u8, resources: &[Vec<u8>]) {
    let hid = Name::new("_HID".into(), hid);
    let uid = Name::new("_UID".into(), &uid);
    let status = Name::new("_STA".into(), &0xfu8);
    let resources = Raw(resources.concat());
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&resources]));
    Device::new(name.into(), vec![&hid, &uid, &status, &resources]).to_aml_bytes(bus);
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn memory_with(config: &AcpiConfig) -> GuestMemoryMmap {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        write(&memory, config).unwrap();
        memory
    }

    fn cpus(count: u32) -> AcpiConfig {
        AcpiConfig::new((0..count).collect())
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// As a guest finds tables: RSDP by scan, then XSDT, FADT, DSDT. Checks signatures, lengths and sums on the way.
    fn find(memory: &GuestMemoryMmap, signature: &[u8; 4]) -> Vec<u8> {
        let table = |address: u64| {
            let mut bytes = vec![0; 8];
            memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes.resize(u32_at(&bytes, 4) as usize, 0);
            memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        };
        let checked = |address: u64| {
            let bytes = table(address);
            assert_eq!(sum(&bytes), 0, "{:?}", std::str::from_utf8(&bytes[..4]));
            bytes
        };
        let mut rsdp = vec![0; 36];
        let found = (layout::ACPI_TABLES..layout::ACPI_TABLES_END)
            .step_by(16)
            .find(|address| {
                memory.read_slice(&mut rsdp, GuestAddress(*address)).unwrap();
                rsdp.starts_with(b"RSD PTR ")
            });
        assert_eq!(found, Some(layout::ACPI_TABLES));
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp), rsdp[15]), (0, 0, 2));
        let xsdt = checked(u64_at(&rsdp, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let mut tables: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| checked(u64_at(entry, 0)))
            .collect();
        let fadt = tables
            .iter()
            .find(|table| table.starts_with(b"FACP"))
            .unwrap()
            .clone();
        assert_eq!(
            u64_at(&fadt, 140),
            u64::from(u32_at(&fadt, 40)),
            "both addresses of the DSDT"
        );
        tables.push(checked(u64_at(&fadt, 140)));
        assert_eq!(u32_at(&fadt, 36) % 64, 0);
        tables.push(table(u64::from(u32_at(&fadt, 36))));
        tables
            .into_iter()
            .find(|table| table.starts_with(signature))
            .unwrap()
    }

    #[test]
    fn the_fadt_has_the_registers_of_the_machine() {
        let fadt = find(&memory_with(&cpus(2)), b"FACP");
        assert_eq!((fadt.len(), fadt[8]), (276, 6));
        assert_eq!(fadt[46], 9, "SCI");
        assert_eq!(u32_at(&fadt, 48), 0, "no SMI command port");
        assert_eq!(
            (u32_at(&fadt, 56), u64_at(&fadt, 152), fadt[88]),
            (0x600, 0x600, 4)
        );
        assert_eq!(
            (u32_at(&fadt, 64), u64_at(&fadt, 176), fadt[89]),
            (0x604, 0x604, 2)
        );
        assert_eq!(
            (u32_at(&fadt, 76), u64_at(&fadt, 212), fadt[91]),
            (0x608, 0x608, 4)
        );
        assert_eq!(
            (fadt[116], u64_at(&fadt, 120), fadt[128]),
            (1, 0x60c, 1),
            "reset register"
        );
        assert_eq!(fadt[108], 0x32, "century");
        assert_eq!(fadt[109], 0b101, "legacy devices, no 8042, no VGA, MSI");
        let flags = u32_at(&fadt, 112);
        assert_eq!(
            flags,
            1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10,
            "{flags:#x}"
        );
        assert_eq!(&find(&memory_with(&cpus(1)), b"FACS")[..4], b"FACS");
    }

    #[test]
    fn the_fadt_says_which_legacy_devices_there_are() {
        let config = AcpiConfig {
            rtc: false,
            i8042: true,
            serial0: false,
            ..cpus(1)
        };
        let fadt = find(&memory_with(&config), b"FACP");
        assert_eq!((fadt[108], fadt[109]), (0, 0b10_0110));
    }

    /// Type and bytes of each entry.
    fn madt_entries(config: &AcpiConfig) -> Vec<Vec<u8>> {
        let madt = find(&memory_with(config), b"APIC");
        assert_eq!((u32_at(&madt, 36), u32_at(&madt, 40)), (0xfee0_0000, 1));
        let mut entries = Vec::new();
        let mut rest = &madt[44..];
        while !rest.is_empty() {
            let (entry, behind) = rest.split_at(rest[1].into());
            entries.push(entry.to_vec());
            rest = behind;
        }
        entries
    }

    #[test]
    fn the_madt_has_every_processor_and_line() {
        assert_eq!(
            madt_entries(&cpus(2)),
            [
                &[0, 8, 0, 0, 1, 0, 0, 0][..],
                &[0, 8, 1, 1, 1, 0, 0, 0],
                &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
                &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
                &[2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0],
                &[4, 6, 0xff, 0, 0, 1],
            ]
        );
        let without_pit = madt_entries(&AcpiConfig {
            pit: false,
            ..cpus(1)
        });
        assert_eq!(without_pit.iter().filter(|entry| entry[0] == 2).count(), 1);
    }

    #[test]
    fn large_apic_ids_get_x2apic_entries() {
        let entries = madt_entries(&AcpiConfig::new(vec![0, 254, 255, 300]));
        let of = |kind: u8| entries.iter().filter(move |entry| entry[0] == kind);
        assert_eq!(of(0).count(), 2);
        let ids: Vec<_> = of(9).map(|entry| (u32_at(entry, 4), u32_at(entry, 12))).collect();
        assert_eq!(ids, [(255, 2), (300, 3)]);
        assert_eq!(of(0xa).count(), 1);
    }

    #[test]
    fn many_processors_fit_and_too_many_are_refused() {
        let tables = build(&cpus(1024)).unwrap();
        assert!(tables.total_bytes() < layout::ACPI_TABLES_END - layout::ACPI_TABLES);
        let error = build(&cpus(4096)).unwrap_err();
        assert!(error.to_string().contains("4096 processors"), "{error}");
        assert!(matches!(build(&cpus(0)), Err(AcpiError::NoProcessor)));
    }

    #[test]
    fn tables_do_not_overlap() {
        let tables = build(&cpus(64)).unwrap();
        let all: Vec<_> = tables.iter().collect();
        for pair in all.windows(2) {
            assert!(pair[0].address + pair[0].bytes.len() as u64 <= pair[1].address);
        }
        assert_eq!(all.len(), 6);
    }

    fn root() -> PciRoot {
        PciRoot {
            windows: [layout::PCI_WINDOW_32, layout::pci_window_64(5 << 30)],
            pins: vec![(1, 16), (2, 17)],
        }
    }

    #[test]
    fn the_mcfg_has_the_one_bus() {
        let config = AcpiConfig {
            pci: Some(root()),
            ..cpus(1)
        };
        let mcfg = find(&memory_with(&config), b"MCFG");
        assert_eq!((mcfg.len(), u64_at(&mcfg, 44)), (60, 0xe000_0000));
        assert_eq!(&mcfg[52..56], [0; 4], "segment 0, bus 0 to 0");
        assert_eq!(build(&cpus(1)).unwrap().iter().count(), 6, "none without a bus");
    }

    /// iasl, where it is installed, must find nothing to complain of. `ACTOR_VMM_ACPI_DUMP=/dir` keeps the tables.
    #[test]
    fn iasl_reads_every_table() {
        if std::process::Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("SKIPPED: no iasl on this machine (Debian: apt install acpica-tools)");
            return;
        }
        let kept = std::env::var_os("ACTOR_VMM_ACPI_DUMP");
        let directory = kept.clone().map_or_else(
            || std::env::temp_dir().join(format!("acpi-{}", std::process::id())),
            std::path::PathBuf::from,
        );
        std::fs::create_dir_all(&directory).unwrap();
        let virtio = |address, gsi, edge| VirtioMmio {
            address,
            bytes: 0x1000,
            gsi,
            edge,
        };
        let memory = memory_with(&AcpiConfig {
            virtio: vec![virtio(0xfeb0_0000, 16, true), virtio(0xfeb0_1000, 5, false)],
            pci: Some(root()),
            ..AcpiConfig::new((0..3).chain([255, 256]).collect())
        });
        for signature in [b"FACP", b"APIC", b"MCFG", b"DSDT", b"FACS"] {
            let name = std::str::from_utf8(signature).unwrap();
            std::fs::write(directory.join(format!("{name}.dat")), find(&memory, signature)).unwrap();
            let iasl = |arguments: &[&str]| {
                let output = std::process::Command::new("iasl")
                    .current_dir(&directory)
                    .args(arguments)
                    .output()
                    .unwrap();
                let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
                let complains = ["Error", "Warning", "invalid", "Invalid", "Unknown"]
                    .iter()
                    .any(|word| {
                        text.lines()
                            .any(|line| line.contains(word) && !line.contains("0 "))
                    });
                assert!(output.status.success() && !complains, "{name}: {text}");
            };
            iasl(&["-d", &format!("{name}.dat")]);
            // What it read compiles to the same again.
            if signature == b"DSDT" {
                iasl(&["-vw", "3144", &format!("{name}.dsl")]);
            }
        }
        let dsl = std::fs::read_to_string(directory.join("DSDT.dsl")).unwrap();
        for expected in [
            "PNP0501",
            "PNP0B00",
            "QEMU0001",
            "ACPI0007",
            "LNRO0005",
            "0xFEB01000",
            "PNP0A08",
            "PNP0C02",
            "0x0000000200000000",
            "0x0002FFFF",
            "Name (\\_S5",
            "0x0505",
        ] {
            assert!(dsl.contains(expected), "{expected} in {dsl}");
        }
        if kept.is_none() {
            std::fs::remove_dir_all(&directory).unwrap();
        }
    }
}
