//! The initrd: as high in memory as the kernel allows, read straight from its file.

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::file::{FileError, ImageFile};
use crate::machine::memory::{human, low_end};

const PAGE_BYTES: u64 = 4096;

/// An initrd in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// Where.
    pub address: u64,
    /// How long, in bytes.
    pub length: u64,
}

/// An initrd that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// No room.
    #[error(
        "its {} do not fit: between the kernel, which ends at {floor:#x}, and {ceiling:#x} there are {}; \
         give more with --memory, or make it smaller",
        human(*.length), human(.ceiling.saturating_sub(*.floor))
    )]
    TooLarge {
        /// Its length in bytes.
        length: u64,
        /// First free address.
        floor: u64,
        /// The address behind the last it could use.
        ceiling: u64,
    },
}

/// Where `length` bytes go between `floor` and `ceiling`: page-aligned, as high as possible.
fn place(length: u64, floor: u64, ceiling: u64) -> Result<u64, InitrdError> {
    let address = ceiling
        .checked_sub(length)
        .map(|address| address & !(PAGE_BYTES - 1));
    match address {
        Some(address) if address >= floor => Ok(address),
        _ => Err(InitrdError::TooLarge {
            length,
            floor,
            ceiling,
        }),
    }
}

/// Loads `image` behind `kernel_end`, with its last byte at or below `max`.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    image: &ImageFile,
    kernel_end: u64,
    max: u64,
) -> Result<Initrd, InitrdError> {
    let length = image.length();
    let address = place(length, kernel_end, low_end(memory).min(max.saturating_add(1)))?;
    image.read_to_guest(memory, GuestAddress(address), 0, length)?;
    Ok(Initrd { address, length })
}

#[cfg(test)]
mod tests {
    use super::super::elf::tests::{MEMORY, memory};
    use super::super::file::tests::image_of;
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn it_goes_to_the_top_of_ram_or_of_what_the_kernel_reaches() {
        let content: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
        for (max, expected) in [
            (u64::MAX, MEMORY - 0x2000),
            (0x7fff_ffff, MEMORY - 0x2000),
            (0xff_ffff, 0xff_e000),
        ] {
            let memory = memory();
            let initrd = load(&memory, &image_of(&content), 0x20_0000, max).unwrap();
            assert_eq!(
                initrd,
                Initrd {
                    address: expected,
                    length: 5000
                }
            );
            let mut bytes = vec![0; 5000];
            memory.read_slice(&mut bytes, GuestAddress(expected)).unwrap();
            assert_eq!(bytes, content);
        }
    }

    #[test]
    fn it_never_overlaps_the_kernel() {
        let image = image_of(&[0; 5000]);
        assert!(load(&memory(), &image, MEMORY - 0x2000, u64::MAX).is_ok());
        let error = load(&memory(), &image, MEMORY - 0x1fff, u64::MAX).unwrap_err();
        assert!(error.to_string().contains("5000 bytes do not fit"), "{error}");
        assert!(error.to_string().contains("--memory"), "{error}");
        assert!(load(&memory(), &image, MEMORY + 0x2000, u64::MAX).is_err());
        assert!(place(u64::MAX, 0, MEMORY).is_err());
    }
}
