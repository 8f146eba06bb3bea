//! pvpanic: a port by which the guest's kernel says that it panicked.
//!
//! Spec: QEMU, docs/specs/pvpanic.rst. A read tells which events the device takes, a write gives events. An event for
//! a crash kernel that takes over (CRASH_LOADED) does not end anything and is only counted: that guest goes on by itself.
//! The DSDT names the port in a device with `_HID` "QEMU0001", by which Linux's `pvpanic` driver finds it.
//!
//! **Not emulated**: the PCI variant, and the shutdown event (bit 2): it is not offered.
//!
//! **A hostile guest** can end its own machine with the status of a panic.

use super::{Access, Claim, Context, Device, MachineRequest, byte_lanes};

/// What to claim, as offsets from the base port.
pub const CLAIMS: &[Claim] = &[Claim::new(0, 1)];

const EVENTS: u64 = 0;
/// The guest panicked, and that is the end of it.
const PANICKED: u8 = 1 << 0;
/// The guest panicked, and its crash kernel takes over.
const CRASH_LOADED: u8 = 1 << 1;

/// The port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pvpanic {
    crash_loaded: u64,
}

impl Pvpanic {
    /// A port.
    pub fn new() -> Pvpanic {
        Pvpanic::default()
    }

    /// How many panics since the reset were left to a crash kernel.
    pub fn crash_loaded_events(&self) -> u64 {
        self.crash_loaded
    }
}

impl Device for Pvpanic {
    fn name(&self) -> &'static str {
        "pvpanic"
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        byte_lanes::read(access, |offset| {
            if offset == EVENTS {
                PANICKED | CRASH_LOADED
            } else {
                0xff
            }
        })
    }

    fn write(&mut self, cx: &mut dyn Context, access: Access, value: u64) {
        byte_lanes::write(access, value, |offset, events| {
            if offset != EVENTS {
                return;
            }
            if events & PANICKED != 0 {
                cx.request(MachineRequest::GuestPanic);
            }
            if events & CRASH_LOADED != 0 {
                self.crash_loaded = self.crash_loaded.saturating_add(1);
            }
        });
    }

    fn reset(&mut self, _cx: &mut dyn Context) {
        *self = Pvpanic::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Bench;

    #[test]
    fn a_read_tells_both_events() {
        assert_eq!(Bench::new(Pvpanic::new()).read(EVENTS), 0b11);
    }

    #[test]
    fn events() {
        // Written byte to requests and counted crash kernels.
        let cases = [
            (0b000, vec![], 0),
            (0b001, vec![MachineRequest::GuestPanic], 0),
            (0b010, vec![], 1),
            (0b011, vec![MachineRequest::GuestPanic], 1),
            (0b100, vec![], 0),
        ];
        for (byte, requests, crash_loaded) in cases {
            let mut pvpanic = Bench::new(Pvpanic::new());
            pvpanic.write(EVENTS, byte);
            assert_eq!(pvpanic.cx.requests, requests, "{byte:#b}");
            assert_eq!(pvpanic.device.crash_loaded_events(), crash_loaded, "{byte:#b}");
        }
    }
}
