//! Debug exit: a port that ends the machine with a status that the guest gives.
//!
//! After QEMU's `isa-debug-exit`. The low byte of the value is the guest's status; what the process makes of it is the
//! machine's business. Reads are all-ones.
//!
//! **A hostile guest** can end its own machine.

use super::{Access, Claim, Context, Device, MachineRequest};

/// What to claim, as offsets from the base port.
pub const CLAIMS: &[Claim] = &[Claim::new(0, 1)];

/// The port; it has no state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugExit;

impl DebugExit {
    /// A port.
    pub fn new() -> DebugExit {
        DebugExit
    }
}

impl Device for DebugExit {
    fn name(&self) -> &'static str {
        "debug_exit"
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        access.width.all_ones()
    }

    fn write(&mut self, cx: &mut dyn Context, access: Access, value: u64) {
        if access.offset == 0 {
            let [status, ..] = value.to_le_bytes();
            cx.request(MachineRequest::Exit(status));
        }
    }

    fn reset(&mut self, _cx: &mut dyn Context) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Width;
    use crate::devices::testing::Bench;

    #[test]
    fn a_write_of_any_width_exits_with_its_low_byte() {
        for (width, value) in [
            (Width::Byte, 0x2a),
            (Width::Word, 0x012a),
            (Width::Dword, 0xffff_ff2a),
        ] {
            let mut exit = Bench::new(DebugExit::new());
            exit.write_wide(0, width, value);
            assert_eq!(exit.cx.requests, [MachineRequest::Exit(0x2a)], "{width:?}");
        }
    }

    #[test]
    fn reading_asks_for_nothing_and_gives_all_ones() {
        let mut exit = Bench::new(DebugExit::new());
        assert_eq!(exit.read_wide(0, Width::Dword), 0xffff_ffff);
        assert_eq!(exit.cx.requests, []);
    }
}
