//! `struct virtio_vsock_hdr`: what is in front of each packet, and is all of most. [VIRTIO 1.2 §5.10.6]

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The host's context identifier. [VIRTIO 1.2 §5.10.4]
pub const HOST_CID: u64 = 2;
/// The one type of sockets that is served.
pub const STREAM: u16 = 1;

/// Operations. [VIRTIO 1.2 §5.10.6]
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Grants it.
    pub const RESPONSE: u16 = 2;
    /// There is no such connection, from now on at least.
    pub const RST: u16 = 3;
    /// The sender does not receive, or does not send, any more.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// Nothing but the sender's credit, which is in each header.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`]: the sender will not receive any more.
pub const NO_RECEIVE: u32 = 1;
/// It will not send any more.
pub const NO_SEND: u32 = 2;
/// Neither.
pub const NEITHER: u32 = NO_RECEIVE | NO_SEND;

/// A header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Header {
    /// Who sends.
    pub source_cid: u64,
    /// To whom.
    pub destination_cid: u64,
    /// From which of his ports.
    pub source_port: u32,
    /// To which port.
    pub destination_port: u32,
    /// Bytes of data behind the header.
    pub bytes: u32,
    /// [`STREAM`], or a type that is not served.
    pub kind: u16,
    /// See [`op`].
    pub operation: u16,
    /// Of [`op::SHUTDOWN`].
    pub flags: u32,
    /// Room that the sender has for this connection, bytes.
    pub buffer_bytes: u32,
    /// Bytes that he has received and passed on, counted from the connection's begin, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// As it is in memory.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = &mut bytes[..];
        let mut put = |field: &[u8]| {
            let (place, behind) = std::mem::take(&mut rest).split_at_mut(field.len());
            place.copy_from_slice(field);
            rest = behind;
        };
        put(&self.source_cid.to_le_bytes());
        put(&self.destination_cid.to_le_bytes());
        put(&self.source_port.to_le_bytes());
        put(&self.destination_port.to_le_bytes());
        put(&self.bytes.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.operation.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buffer_bytes.to_le_bytes());
        put(&self.forwarded.to_le_bytes());
        bytes
    }

    /// From memory. Any content is a header.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Header {
        fn take<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
            std::array::from_fn(|index| bytes[at + index])
        }
        Header {
            source_cid: u64::from_le_bytes(take(bytes, 0)),
            destination_cid: u64::from_le_bytes(take(bytes, 8)),
            source_port: u32::from_le_bytes(take(bytes, 16)),
            destination_port: u32::from_le_bytes(take(bytes, 20)),
            bytes: u32::from_le_bytes(take(bytes, 24)),
            kind: u16::from_le_bytes(take(bytes, 28)),
            operation: u16::from_le_bytes(take(bytes, 30)),
            flags: u32::from_le_bytes(take(bytes, 32)),
            buffer_bytes: u32::from_le_bytes(take(bytes, 36)),
            forwarded: u32::from_le_bytes(take(bytes, 40)),
        }
    }

    /// That there is no such connection, to whoever has sent this.
    pub fn refusal(&self) -> Header {
        Header {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            kind: self.kind,
            operation: op::RST,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|index| index as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.source_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.destination_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(
            (header.source_port, header.destination_port),
            (0x1312_1110, 0x1716_1514)
        );
        assert_eq!(
            (header.bytes, header.kind, header.operation),
            (0x1b1a_1918, 0x1d1c, 0x1f1e)
        );
        assert_eq!(
            (header.flags, header.buffer_bytes, header.forwarded),
            (0x2322_2120, 0x2726_2524, 0x2b2a_2928)
        );
        assert_eq!(header.to_bytes(), bytes);
    }
}
