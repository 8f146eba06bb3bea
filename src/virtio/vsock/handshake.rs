//! What a program of the host says first when it wants a port of the guest: `CONNECT 52\n`. Firecracker's convention, so
//! that its clients work here.

/// The longest line that can be one, with some spaces to spare.
pub const MOST_BYTES: usize = 64;

/// What has come so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Said {
    /// Not yet a line.
    Part,
    /// The port, and how long the line is. What is behind it is for the guest.
    Connect {
        /// Of the guest.
        port: u32,
        /// Bytes, the line's end included.
        bytes: usize,
    },
    /// Something else.
    Nonsense,
}

/// Reads what has come.
pub fn read(text: &[u8]) -> Said {
    let Some(end) = text.iter().position(|byte| *byte == b'\n') else {
        return if text.len() < MOST_BYTES {
            Said::Part
        } else {
            Said::Nonsense
        };
    };
    let mut words = text[..end]
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let verb = words.next().unwrap_or_default();
    let port = words.next().unwrap_or_default();
    // parse takes a sign.
    let digits = port.iter().all(u8::is_ascii_digit);
    let port = std::str::from_utf8(port).ok().and_then(|port| port.parse().ok());
    match (port, words.next()) {
        (Some(port), None) if digits && verb.eq_ignore_ascii_case(b"connect") => {
            Said::Connect { port, bytes: end + 1 }
        }
        _ => Said::Nonsense,
    }
}

/// What is answered when the guest agrees.
pub fn answer(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_and_nothing_behind_it() {
        for (text, said) in [
            ("", Said::Part),
            ("CONNECT 52", Said::Part),
            ("CONNECT 52\n", Said::Connect { port: 52, bytes: 11 }),
            (
                "connect  4294967295\r\nCONNECT 1\n",
                Said::Connect {
                    port: u32::MAX,
                    bytes: 21,
                },
            ),
            ("CONNECT\n", Said::Nonsense),
            ("CONNECT 4294967296\n", Said::Nonsense),
            ("CONNECT +1\n", Said::Nonsense),
            ("CONNECT 1 2\n", Said::Nonsense),
            ("GET / HTTP/1.1\n", Said::Nonsense),
            ("\n", Said::Nonsense),
        ] {
            assert_eq!(read(text.as_bytes()), said, "{text:?}");
        }
        assert_eq!(read(&[0xff; MOST_BYTES]), Said::Nonsense);
        assert_eq!(read(&[b' '; MOST_BYTES - 1]), Said::Part);
    }
}
