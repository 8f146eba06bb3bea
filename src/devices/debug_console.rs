//! Debug console: a port that takes bytes for the host, with nothing to set up and nothing to wait for.
//!
//! After the "port 0xe9 hack" of Bochs, also QEMU's `isa-debugcon`: a write gives a byte, a read gives 0xe9, by which a
//! guest knows that the port is there. It has no way to say "wait": when the host has no room, bytes are dropped and
//! counted.
//!
//! **A hostile guest** can fill the host's side, and then loses what it writes.

use super::{Access, AccessClass, Claim, Context, Device, Direction, byte_lanes};

/// What to claim, as offsets from the base port.
pub const CLAIMS: &[Claim] = &[Claim::new(0, 1)];

const DATA: u64 = 0;
/// What a read gives.
const PRESENT: u8 = 0xe9;

/// The console.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugConsole {
    /// The host has no room until `output_ready`. Not the device's own: survives a reset.
    host_full: bool,
}

impl DebugConsole {
    /// A console whose host side has room.
    pub fn new() -> DebugConsole {
        DebugConsole::default()
    }
}

impl Device for DebugConsole {
    fn name(&self) -> &'static str {
        "debug_console"
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        byte_lanes::read(access, |offset| if offset == DATA { PRESENT } else { 0xff })
    }

    fn write(&mut self, cx: &mut dyn Context, access: Access, value: u64) {
        byte_lanes::write(access, value, |offset, byte| {
            if offset != DATA {
            } else if self.host_full {
                cx.lose();
            } else {
                self.host_full = !cx.transmit(byte);
            }
        });
    }

    fn output_ready(&mut self, _cx: &mut dyn Context) {
        self.host_full = false;
    }

    fn reset(&mut self, _cx: &mut dyn Context) {}

    fn classify(&self) -> fn(Access, Direction) -> AccessClass {
        // The guest learns nothing from a write, not even whether the byte was dropped. One vCPU's bytes stay in order;
        // how those of several interleave is promised by nobody, so a guest's lock around them protects nothing.
        |_, direction| match direction {
            Direction::Write => AccessClass::Post,
            Direction::Read => AccessClass::Ask,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Width;
    use crate::devices::testing::Bench;

    #[test]
    fn writes_go_to_the_host() {
        let mut console = Bench::new(DebugConsole::new());
        console.write(DATA, b'h');
        console.write(DATA, b'i');
        assert_eq!(console.cx.sent, b"hi");
    }

    #[test]
    fn a_wide_write_gives_only_the_byte_at_the_port() {
        let mut console = Bench::new(DebugConsole::new());
        console.write_wide(DATA, Width::Dword, 0x4443_4241);
        assert_eq!(console.cx.sent, b"A");
    }

    #[test]
    fn a_read_tells_that_the_port_is_there() {
        let mut console = Bench::new(DebugConsole::new());
        assert_eq!(console.read(DATA), 0xe9);
    }

    #[test]
    fn without_room_bytes_are_dropped_and_counted() {
        let mut console = Bench::new(DebugConsole::new());
        console.cx.room = 1;
        for byte in *b"abc" {
            console.write(DATA, byte);
        }
        console.make_room(10);
        console.write(DATA, b'd');
        assert_eq!(
            (console.cx.sent.as_slice(), console.cx.lost),
            (b"ad".as_slice(), 2)
        );
    }

    #[test]
    fn reset_keeps_the_hosts_lack_of_room_in_mind() {
        let mut console = Bench::new(DebugConsole::new());
        console.cx.room = 1;
        console.write(DATA, b'a');
        console.reset();
        console.write(DATA, b'b');
        assert_eq!(console.cx.lost, 1);
    }
}
