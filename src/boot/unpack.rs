//! Unpacks the payload of a bzImage on the host.
//!
//! The payload is read from its file and the kernel handed on in pieces, so that neither is ever in memory as a
//! whole where the format allows it. LZ4, which needs whole blocks, gets two mappings that are gone afterwards.
//!
//! The last four bytes of a payload are the size of what is inside, little endian. For all formats but gzip, which
//! ends so anyway, they follow the packed data. [Linux: scripts/Makefile.lib, size_append]

use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::file::{FileError, ImageFile};
use super::kernel::UNKNOWN_FORMAT;
use super::xz;

/// How a payload is packed, of what the host unpacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Deflate in a gzip file.
    Gzip,
    /// The legacy LZ4 frame.
    Lz4,
    /// Zstandard.
    Zstd,
    /// LZMA2 in an xz file, with or without the filter for x86 code.
    Xz,
    /// The old .lzma file.
    Lzma,
}

impl fmt::Display for Format {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Format::Gzip => "gzip",
            Format::Lz4 => "lz4",
            Format::Zstd => "zstd",
            Format::Xz => "xz",
            Format::Lzma => "lzma",
        })
    }
}

/// The payload is not what its first bytes promise.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// Reading the file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A decoder's own words.
    #[error("{0}")]
    Decoder(String),
    /// No memory for a buffer.
    #[error("the host has no memory for a buffer of {0} bytes")]
    Buffer(usize),
}

const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// What a block of the legacy frame holds at most, and always but for the last.
const LZ4_BLOCK_BYTES: u64 = 8 << 20;
/// The window that `zstd --ultra -22` uses, as the kernel's build does.
const ZSTD_MAX_WINDOW_BYTES: u64 = 128 << 20;
const READ_BYTES: usize = 64 << 10;

impl Format {
    /// By the first bytes; or the name of a format that is not unpacked here.
    pub fn detect(head: &[u8]) -> Result<Format, &'static str> {
        let known: &[(&[u8], Result<Format, &'static str>)] = &[
            (&[0x1f, 0x8b], Ok(Format::Gzip)),
            (&LZ4_MAGIC, Ok(Format::Lz4)),
            (&[0x28, 0xb5, 0x2f, 0xfd], Ok(Format::Zstd)),
            (&xz::MAGIC, Ok(Format::Xz)),
            (&[0x5d, 0, 0], Ok(Format::Lzma)),
            (b"BZh", Err("bzip2")),
            (&[0x89, b'L', b'Z', b'O'], Err("lzo")),
            (&[0x04, 0x22, 0x4d, 0x18], Err("the lz4 frame")),
        ];
        let found = known.iter().find(|(magic, _)| head.starts_with(magic));
        found.map_or(Err(UNKNOWN_FORMAT), |(_, format)| *format)
    }
}

/// Unpacks the payload in `range` of the file into `sink`. `size` is what the payload says of itself.
pub fn unpack<W: Write>(
    format: Format,
    image: &ImageFile,
    range: Range<u64>,
    size: u64,
    sink: &mut W,
) -> Result<(), UnpackError> {
    let packed = range.start..match format {
        Format::Gzip => range.end,
        _ => range.end.saturating_sub(4).max(range.start),
    };
    let input = || BufReader::with_capacity(READ_BYTES, image.section(packed.clone()));
    match format {
        Format::Lz4 => unpack_lz4(image, packed, size, sink),
        Format::Gzip => copy(flate2::bufread::GzDecoder::new(input()), sink),
        Format::Zstd => {
            let limit = ZSTD_MAX_WINDOW_BYTES;
            let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(input(), limit)
                .map_err(decoder_error)?;
            copy(decoder, sink)
        }
        Format::Lzma => {
            let options = lzma_rs::decompress::Options {
                memlimit: usize::try_from(size).ok(),
                ..Default::default()
            };
            lzma_rs::lzma_decompress_with_options(&mut input(), sink, &options).map_err(decoder_error)
        }
        Format::Xz => xz::decode(&mut input(), sink).map_err(decoder_error),
    }
}

fn decoder_error(error: impl fmt::Debug + fmt::Display) -> UnpackError {
    UnpackError::Decoder(error.to_string())
}

fn copy(mut decoder: impl Read, sink: &mut impl Write) -> Result<(), UnpackError> {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match decoder.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => sink.write_all(&buffer[..count]).map_err(decoder_error)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(decoder_error(error)),
        }
    }
}

/// Magic, then blocks, each behind its packed size. Every block but the last unpacks to 8 MiB.
fn unpack_lz4(
    image: &ImageFile,
    packed: Range<u64>,
    size: u64,
    sink: &mut impl Write,
) -> Result<(), UnpackError> {
    let mut blocks = Vec::new();
    let mut largest = 0;
    let mut at = packed.start + LZ4_MAGIC.len() as u64;
    while at < packed.end {
        let mut length = [0; 4];
        image.read_exact(&mut length, at)?;
        let length = u64::from(u32::from_le_bytes(length));
        let start = at + 4;
        at = start + length;
        // A block of incompressible data grows by 1/255.
        if at > packed.end || length > LZ4_BLOCK_BYTES + LZ4_BLOCK_BYTES / 128 {
            return Err(UnpackError::Decoder("a block is larger than it can be".into()));
        }
        if blocks.len() as u64 > size / LZ4_BLOCK_BYTES {
            return Err(UnpackError::Decoder(
                "there are more blocks than its size needs".into(),
            ));
        }
        largest = largest.max(length);
        blocks.push((start, length));
    }
    if blocks.is_empty() {
        return Err(UnpackError::Decoder("there is no block".into()));
    }
    let mut input = Scratch::new(largest as usize)?;
    let mut output = Scratch::new(size.min(LZ4_BLOCK_BYTES) as usize)?;
    for (start, length) in blocks {
        let input = &mut input[..length as usize];
        image.read_exact(input, start)?;
        let count = lz4_flex::block::decompress_into(input, &mut output).map_err(decoder_error)?;
        sink.write_all(&output[..count]).map_err(decoder_error)?;
    }
    Ok(())
}

/// A large buffer that goes back to the host when it is dropped, which a heap does not promise.
struct Scratch {
    start: NonNull<u8>,
    length: usize,
}

impl Scratch {
    fn new(length: usize) -> Result<Scratch, UnpackError> {
        let bytes = NonZeroUsize::new(length).unwrap_or(NonZeroUsize::MIN);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // All of it is going to be used: one call instead of a fault for each page.
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap_anonymous(None, bytes, protection, flags) };
        let start = start.map_err(|_| UnpackError::Buffer(length))?;
        Ok(Scratch {
            start: start.cast(),
            length,
        })
    }
}

impl Deref for Scratch {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has `length` initialised (zero) bytes, lives as long as `self`, and is its own.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping of `new`, to which no reference is left.
        let unmapped = unsafe { munmap(self.start.cast(), self.length.max(1)) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::super::bzimage::tests::{Payload, pack};
    use super::super::file::tests::image_of;
    use super::*;

    fn unpacked(format: Format, packed: &[u8], size: usize) -> Result<Vec<u8>, UnpackError> {
        let mut sink = Vec::new();
        unpack(
            format,
            &image_of(packed),
            0..packed.len() as u64,
            size as u64,
            &mut sink,
        )?;
        Ok(sink)
    }

    #[test]
    fn several_lz4_blocks() {
        let content: Vec<u8> = (0..(17u32 << 20)).map(|i| (i >> 7) as u8).collect();
        let packed = pack(Payload::Lz4, &content);
        assert!(unpacked(Format::Lz4, &packed, content.len()).unwrap() == content);
    }

    #[test]
    fn lz4_blocks_that_lie_about_their_size_are_refused() {
        for length in [0u32, 1, 100, 1 << 30, u32::MAX] {
            let mut packed = pack(Payload::Lz4, &[7; 1000]);
            packed[4..8].copy_from_slice(&length.to_le_bytes());
            assert!(unpacked(Format::Lz4, &packed, 1000).is_err(), "{length}");
        }
        assert!(unpacked(Format::Lz4, &[0x02, 0x21, 0x4c, 0x18, 0, 0, 0, 0], 0).is_err());
        assert!(unpacked(Format::Lz4, &[0x02, 0x21], 0).is_err());
    }

    /// "The quick brown fox" 64 times over, packed by `zstd -19`; there is no encoder for it here.
    #[test]
    fn zstd() {
        const FRAME: &str = include_str!("testdata/fox.zst.hex");
        let digits: Vec<u8> = FRAME.bytes().filter(u8::is_ascii_hexdigit).collect();
        let mut packed: Vec<u8> = digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect();
        let content = "The quick brown fox\n".repeat(64).into_bytes();
        packed.extend((content.len() as u32).to_le_bytes());
        assert_eq!(unpacked(Format::Zstd, &packed, content.len()).unwrap(), content);
    }

    #[test]
    fn damage_is_an_error_in_every_format() {
        for (how, format) in [
            (Payload::Gzip, Format::Gzip),
            (Payload::Lzma, Format::Lzma),
            (Payload::Xz, Format::Xz),
            (Payload::Lz4, Format::Lz4),
        ] {
            let packed = pack(how, &[0x5a; 5000]);
            assert!(
                unpacked(format, &packed[..packed.len() / 2], 5000).is_err(),
                "{format}"
            );
        }
    }

    #[test]
    fn formats_are_known_by_their_first_bytes() {
        assert_eq!(Format::detect(&[0x1f, 0x8b, 8]), Ok(Format::Gzip));
        assert_eq!(Format::detect(b"BZh9"), Err("bzip2"));
        assert_eq!(Format::detect(b"\x89LZO"), Err("lzo"));
        assert_eq!(Format::detect(b""), Err(UNKNOWN_FORMAT));
    }
}
