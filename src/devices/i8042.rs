//! i8042 keyboard controller: what is left of it on a machine without keyboard, its line to the processor's reset.
//!
//! Spec: IBM PC/AT Technical Reference (1985), "Keyboard controller": status register, command 0xf0 to 0xff "pulse
//! output port". Linux resets by command 0xfe (`reboot=k`), after it has waited for an empty input buffer.
//!
//! **Not emulated**: everything else. No byte ever comes, so a driver that tests the controller gives up. Port 0x61,
//! between the two ports, belongs to the PIT's speaker in KVM and is not claimed here.
//!
//! **A hostile guest** can reset its own machine.
//!
//! vm-superio's `I8042Device` was considered: it signals through a `&self` trigger it owns and reads no status, so
//! wrapping it takes more code than this.

use super::{Access, Claim, Context, Device, MachineRequest, byte_lanes};

/// What to claim, as offsets from the base port: the data port and the status and command port.
pub const CLAIMS: &[Claim] = &[Claim::new(DATA, 1), Claim::new(STATUS_COMMAND, 1)];

const DATA: u64 = 0;
const STATUS_COMMAND: u64 = 4;
/// Status: system flag, set since the self-test. Output and input buffer (bits 0 and 1) are empty.
const STATUS_SYSTEM: u8 = 1 << 2;
/// Commands 0xf0 to 0xff pulse those of the output lines 0 to 3 whose bit is clear.
const PULSE_OUTPUT: u8 = 0xf0;
/// Line 0 is the processor's reset.
const LINE_RESET: u8 = 1 << 0;

/// The controller; it has no state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct I8042;

impl I8042 {
    /// A controller.
    pub fn new() -> I8042 {
        I8042
    }
}

impl Device for I8042 {
    fn name(&self) -> &'static str {
        "i8042"
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        byte_lanes::read(access, |offset| match offset {
            DATA => 0,
            STATUS_COMMAND => STATUS_SYSTEM,
            _ => 0xff,
        })
    }

    fn write(&mut self, cx: &mut dyn Context, access: Access, value: u64) {
        byte_lanes::write(access, value, |offset, byte| {
            if offset == STATUS_COMMAND && byte & (PULSE_OUTPUT | LINE_RESET) == PULSE_OUTPUT {
                cx.request(MachineRequest::Reset);
            }
        });
    }

    fn reset(&mut self, _cx: &mut dyn Context) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Bench;

    #[test]
    fn command_fe_asks_for_a_reset() {
        let mut i8042 = Bench::new(I8042::new());
        i8042.write(STATUS_COMMAND, 0xfe);
        assert_eq!(i8042.cx.requests, [MachineRequest::Reset]);
    }

    #[test]
    fn other_commands_and_data_ask_for_nothing() {
        for (offset, byte) in [
            (STATUS_COMMAND, 0xff),
            (STATUS_COMMAND, 0xaa),
            (STATUS_COMMAND, 0xd1),
            (DATA, 0xfe),
        ] {
            let mut i8042 = Bench::new(I8042::new());
            i8042.write(offset, byte);
            assert_eq!(i8042.cx.requests, [], "{byte:#x} at {offset}");
        }
    }

    #[test]
    fn the_status_says_that_both_buffers_are_empty() {
        let mut i8042 = Bench::new(I8042::new());
        assert_eq!(i8042.read(STATUS_COMMAND) & 0b11, 0);
    }
}
