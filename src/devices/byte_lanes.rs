//! Wide accesses to devices of 8-bit registers.
//!
//! An 8-bit device on the ISA bus never sees a wide access: the bus makes one byte cycle of each byte, at rising
//! addresses. Boot code relies on it (`outw` to 0x70 sets the index and the data of the RTC in one instruction;
//! `outw` to 0x3f8 with DLAB set gives both halves of the divisor), so the devices here do it too.

use super::Access;

/// Reads each byte of an access with `byte`, which gets the offset of that byte. Little-endian.
pub(super) fn read(access: Access, mut byte: impl FnMut(u64) -> u8) -> u64 {
    let mut bytes = [0; 8];
    for (lane, slot) in (0..).zip(bytes.iter_mut().take(access.width.bytes())) {
        *slot = byte(access.offset.wrapping_add(lane));
    }
    u64::from_le_bytes(bytes)
}

/// Writes each byte of an access with `byte`, which gets the offset of that byte and its value. Little-endian.
pub(super) fn write(access: Access, value: u64, mut byte: impl FnMut(u64, u8)) {
    for (lane, value) in (0..).zip(value.to_le_bytes().into_iter().take(access.width.bytes())) {
        byte(access.offset.wrapping_add(lane), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Width;

    #[test]
    fn read_puts_the_lowest_offset_into_the_lowest_byte() {
        let access = Access {
            offset: 4,
            width: Width::Dword,
        };
        assert_eq!(read(access, |offset| offset as u8), 0x0706_0504);
    }

    #[test]
    fn write_visits_only_the_bytes_of_the_width() {
        let mut seen = Vec::new();
        write(
            Access {
                offset: 1,
                width: Width::Word,
            },
            0x1234,
            |offset, byte| seen.push((offset, byte)),
        );
        assert_eq!(seen, [(1, 0x34), (2, 0x12)]);
    }

    #[test]
    fn the_end_of_the_offset_space_wraps() {
        let mut seen = Vec::new();
        write(
            Access {
                offset: u64::MAX,
                width: Width::Word,
            },
            0,
            |offset, _| seen.push(offset),
        );
        assert_eq!(seen, [u64::MAX, 0]);
    }
}
