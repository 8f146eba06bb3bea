//! PCI configuration mechanism #1 over an empty bus: whatever the guest asks for, nothing is there.
//!
//! Spec: PCI Local Bus Specification 3.0 §3.2.2.3.2. CONFIG_ADDRESS is decoded for whole 32-bit accesses only and reads
//! back what was written, by which Linux knows the mechanism (`pci_check_type1`); smaller accesses go past it to a bus
//! where nothing answers. CONFIG_DATA reads all-ones: a master abort, no function there [§6.1].
//!
//! **Not emulated**: the reset control register that chipsets have at 0xcf9. It would be a byte access at offset 1 here,
//! which reads all-ones and is ignored: the ACPI reset register and the i8042 are there for that, and both are tried
//! first.
//!
//! **A hostile guest** gets all-ones.

use super::{Access, Claim, Context, Device, Width};

/// What to claim, as offsets from the base port.
pub const CLAIMS: &[Claim] = &[Claim::new(0, 8)];

const CONFIG_ADDRESS: Access = Access {
    offset: 0,
    width: Width::Dword,
};
/// Enable, bus, device, function and register; the other bits are read-only zeros.
const ADDRESS_MASK: u32 = 0x80ff_fffc;

/// The two ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PciConfig {
    address: u32,
}

impl PciConfig {
    /// The ports of an empty bus.
    pub fn new() -> PciConfig {
        PciConfig::default()
    }
}

impl Device for PciConfig {
    fn name(&self) -> &'static str {
        "pci_config"
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        if access == CONFIG_ADDRESS {
            u64::from(self.address)
        } else {
            access.width.all_ones()
        }
    }

    fn write(&mut self, _cx: &mut dyn Context, access: Access, value: u64) {
        if access == CONFIG_ADDRESS {
            // A dword access has no bits above 32.
            self.address = value as u32 & ADDRESS_MASK;
        }
    }

    fn reset(&mut self, _cx: &mut dyn Context) {
        *self = PciConfig::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Bench;

    const DATA: u64 = 4;

    fn pci() -> Bench<PciConfig> {
        Bench::new(PciConfig::new())
    }

    #[test]
    fn the_address_reads_back_without_its_reserved_bits() {
        for (written, read) in [(0x8000_0000, 0x8000_0000), (0xffff_ffff, 0x80ff_fffc), (0, 0)] {
            let mut pci = pci();
            pci.write_wide(0, Width::Dword, written);
            assert_eq!(pci.read_wide(0, Width::Dword), read);
        }
    }

    #[test]
    fn small_accesses_go_past_the_address() {
        let mut pci = pci();
        pci.write_wide(0, Width::Dword, 0x8000_1234);
        // Linux pci_check_type1 and pci_check_type2, and the reset control register.
        for (offset, byte) in [(3, 0x01), (0, 0x00), (2, 0x00), (1, 0x06)] {
            pci.write(offset, byte);
            assert_eq!(pci.read(offset), 0xff);
        }
        assert_eq!(pci.read_wide(0, Width::Dword), 0x8000_1234);
        assert_eq!(pci.cx.requests, []);
    }

    #[test]
    fn nothing_is_on_the_bus() {
        let mut pci = pci();
        pci.write_wide(0, Width::Dword, 0x8000_0000);
        for width in [Width::Byte, Width::Word, Width::Dword] {
            pci.write_wide(DATA, width, 0);
            assert_eq!(pci.read_wide(DATA, width), width.all_ones());
        }
    }
}
