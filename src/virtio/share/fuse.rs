//! Of FUSE's protocol what the device itself has to know: a request's header, and an answer that says only that it failed.
//! [fuse(4)] Pure.

/// `struct fuse_in_header`, bytes.
pub const REQUEST_HEADER_BYTES: usize = 40;
/// `struct fuse_out_header`, bytes.
pub const ANSWER_HEADER_BYTES: usize = 16;

/// What a request's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// How long it says that it is, bytes.
    pub bytes: u32,
    /// The driver's name for it, which the answer repeats.
    pub unique: u64,
}

impl Request {
    /// From its first bytes.
    pub fn parse(header: &[u8; REQUEST_HEADER_BYTES]) -> Request {
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        Request {
            bytes: word(0),
            // Behind the opcode.
            unique: u64::from(word(8)) | u64::from(word(12)) << 32,
        }
    }

    /// The answer that it has failed. `errno`: above 0.
    pub fn failed(&self, errno: i32) -> [u8; ANSWER_HEADER_BYTES] {
        let mut answer = [0; ANSWER_HEADER_BYTES];
        answer[..4].copy_from_slice(&(ANSWER_HEADER_BYTES as u32).to_le_bytes());
        answer[4..8].copy_from_slice(&(-errno).to_le_bytes());
        answer[8..].copy_from_slice(&self.unique.to_le_bytes());
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_request() {
        let mut header = [0; REQUEST_HEADER_BYTES];
        header[0] = 40;
        header[4] = 26;
        header[8..16].copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
        let request = Request::parse(&header);
        assert_eq!((request.bytes, request.unique), (40, 0x1122_3344_5566_7788));
        let answer = request.failed(libc::ENOTCONN);
        assert_eq!(answer[..8], [16, 0, 0, 0, 0x95, 0xff, 0xff, 0xff]);
        assert_eq!(answer[8..], header[8..16]);
    }
}
