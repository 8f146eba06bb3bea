//! The escape in what a person types at the console: Ctrl-A, then a letter. A pure state machine.

/// What a typed escape asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Ctrl-A x: end the machine.
    Quit,
    /// Ctrl-A h or Ctrl-A ?: tell which escapes there are.
    Help,
}

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What Ctrl-A h prints.
pub const HELP: &str = "\
Ctrl-A x       end the machine
Ctrl-A h or ?  this help
Ctrl-A Ctrl-A  send Ctrl-A to the guest
";

/// Remembers whether the last byte was the escape.
#[derive(Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Passes one typed byte: what goes to the guest (0 to 2 bytes) and what was asked for.
    pub fn feed(&mut self, byte: u8, guest: &mut Vec<u8>) -> Option<Command> {
        if !self.pending {
            if byte == ESCAPE {
                self.pending = true;
            } else {
                guest.push(byte);
            }
            return None;
        }
        self.pending = false;
        match byte {
            b'x' | b'X' => return Some(Command::Quit),
            b'h' | b'H' | b'?' => return Some(Command::Help),
            ESCAPE => guest.push(ESCAPE),
            // No escape of ours: the guest gets all of it.
            other => guest.extend([ESCAPE, other]),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(bytes: &[u8]) -> (Vec<u8>, Vec<Command>) {
        let (mut escape, mut guest) = (Escape::default(), Vec::new());
        let commands = bytes
            .iter()
            .filter_map(|byte| escape.feed(*byte, &mut guest))
            .collect();
        (guest, commands)
    }

    #[test]
    fn plain_text_passes() {
        assert_eq!(feed(b"ls -l\r"), (b"ls -l\r".to_vec(), vec![]));
    }

    #[test]
    fn escapes_are_taken_out() {
        assert_eq!(
            feed(b"a\x01xb\x01hc\x01?"),
            (b"abc".to_vec(), vec![Command::Quit, Command::Help, Command::Help])
        );
    }

    #[test]
    fn the_escape_itself_and_unknown_ones_reach_the_guest() {
        assert_eq!(feed(b"\x01\x01\x01z\x01"), (b"\x01\x01z".to_vec(), vec![]));
    }
}
