//! The host bridge: function 0 of device 0, and CONFIG_ADDRESS of mechanism #1.
//!
//! CONFIG_ADDRESS is decoded for whole 32-bit accesses only and reads back what was written; smaller accesses go past it
//! [PCI 3.0 §3.2.2.3.2]. It is published (`decode.rs`): CONFIG_DATA is routed to the function that it names. What is routed
//! to no function comes here and reads all-ones: a master abort [§6.1].
//!
//! **Not emulated**: the reset control register that chipsets have at 0xcf9. It would be a byte access at offset 1 here,
//! which reads all-ones and is ignored: the ACPI reset register and the i8042 are there for that, and both are tried
//! first.
//!
//! **A hostile guest** can change the bits that [`ConfigSpace`] lets through; nothing depends on them.

use super::config::{BYTES, ConfigSpace, Identity};
use super::decode::{ADDRESS_MASK, Bus};
use super::{CONFIG, NOWHERE};
use crate::devices::{Access, Claim, Context, Device, Width};
use std::sync::Arc;

/// What to claim, as offsets from the base port. CONFIG_DATA is decoded.
pub const CLAIMS: &[Claim] = &[Claim::new(0, 4)];

const CONFIG_ADDRESS: Access = Access {
    offset: 0,
    width: Width::Dword,
};

/// A bridge without any particular chipset's features, so that no driver of one's is looked for: the one that QEMU's
/// generic PCI Express host has.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    // [PCI 3.0 appendix D: bridge devices, host bridge]
    class: [6, 0, 0],
    subsystem: [0x1af4, 0x1100],
    pin: false,
};

/// The bridge.
pub struct HostBridge {
    address: u32,
    config: ConfigSpace,
    bus: Arc<Bus>,
}

impl HostBridge {
    /// The bridge of a bus.
    pub fn new(bus: Arc<Bus>) -> HostBridge {
        HostBridge {
            address: 0,
            config: ConfigSpace::new(&IDENTITY),
            bus,
        }
    }
}

/// The register of the configuration space that is accessed.
pub(crate) fn register(access: Access) -> Option<u64> {
    let register = access.offset.checked_sub(CONFIG)?;
    (access.offset < NOWHERE && register < BYTES as u64).then_some(register)
}

impl Device for HostBridge {
    fn name(&self) -> &'static str {
        "pci_host"
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        if access == CONFIG_ADDRESS {
            return self.address.into();
        }
        register(access).map_or(access.width.all_ones(), |register| {
            self.config.read(register, access.width)
        })
    }

    fn write(&mut self, _cx: &mut dyn Context, access: Access, value: u64) {
        if access == CONFIG_ADDRESS {
            // A dword access has no bits above 32.
            self.address = value as u32 & ADDRESS_MASK;
            self.bus.publish_address(self.address);
        } else if let Some(register) = register(access) {
            self.config.write(register, access.width, value);
        }
    }

    fn reset(&mut self, _cx: &mut dyn Context) {
        self.address = 0;
        self.bus.publish_address(0);
        self.config.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::super::decode::{DataPorts, Functions};
    use super::*;
    use crate::devices::testing::Bench;
    use crate::vcpu::route::Decode;

    fn bridge() -> (Bench<HostBridge>, Arc<Bus>) {
        let bus = Bus::new([0..0, 0..0]);
        (Bench::new(HostBridge::new(bus.clone())), bus)
    }

    #[test]
    fn the_address_reads_back_without_its_reserved_bits_and_is_published() {
        let (mut bridge, bus) = bridge();
        let ports = DataPorts {
            bus,
            functions: Functions::default(),
        };
        let width = Width::Dword;
        for (written, read) in [
            (0x8000_0000, 0x8000_0000),
            (0xffff_ffff, 0x80ff_fffc),
            (0x8000_0010, 0x8000_0010),
        ] {
            bridge.write_wide(0, width, written);
            assert_eq!(bridge.read_wide(0, width), read);
        }
        let (_, access) = ports.decode(Access { offset: 0, width }).unwrap();
        assert_eq!(access.offset, CONFIG + 0x10);
        bridge.reset();
        assert_eq!(bridge.read_wide(0, width), 0);
        let (_, access) = ports.decode(Access { offset: 0, width }).unwrap();
        assert_eq!(access.offset, NOWHERE, "not enabled any more");
    }

    #[test]
    fn small_accesses_go_past_the_address() {
        let (mut bridge, _) = bridge();
        bridge.write_wide(0, Width::Dword, 0x8000_1234);
        // Linux pci_check_type1 and pci_check_type2, and the reset control register.
        for (offset, byte) in [(3, 0x01), (0, 0x00), (2, 0x00), (1, 0x06)] {
            bridge.write(offset, byte);
            assert_eq!(bridge.read(offset), 0xff);
        }
        assert_eq!(bridge.read_wide(0, Width::Dword), 0x8000_1234);
        assert_eq!(bridge.cx.requests, []);
    }

    #[test]
    fn it_is_a_host_bridge_and_beside_it_is_nothing() {
        let (mut bridge, _) = bridge();
        assert_eq!(bridge.read_wide(CONFIG, Width::Dword), 0x0008_1b36);
        assert_eq!(bridge.read_wide(CONFIG + 0xa, Width::Word), 0x0600);
        assert_eq!(bridge.read_wide(CONFIG + 0x100, Width::Dword), 0xffff_ffff);
        for width in [Width::Byte, Width::Word, Width::Dword] {
            bridge.write_wide(NOWHERE, width, 0);
            assert_eq!(bridge.read_wide(NOWHERE, width), width.all_ones());
        }
    }
}
