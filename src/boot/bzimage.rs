//! bzImage: the setup header, the image as it is, and the kernel packed inside.
//!
//! [Linux: Documentation/arch/x86/boot.rst]

use linux_loader::bootparam::{XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use super::elf::{ElfSink, LoadedElf};
use super::file::{FileError, ImageFile};
use super::kernel::KernelError;
use super::layout;
use super::unpack::{self, Format};
use crate::machine::memory::low_end;

/// The 64-bit entry point, from the start of the loaded image.
pub const ENTRY_64_OFFSET: u64 = 0x200;

/// Where the header is in the file and in the zero page.
const HEADER_OFFSET: usize = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The first protocol that says whether there is a 64-bit entry point.
const MIN_VERSION: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const SECTOR_BYTES: u64 = 512;
/// `syssize` counts these.
const PARAGRAPH_BYTES: u64 = 16;

/// A bzImage, by its header.
#[derive(Clone, Copy, Debug)]
pub struct BzImage {
    /// The header as it is in the file, without what lies behind its own end.
    pub header: setup_header,
}

fn align_up(address: u64, alignment: u64) -> Option<u64> {
    address
        .checked_add(alignment - 1)
        .map(|address| address & !(alignment - 1))
}

impl BzImage {
    /// Reads the header from the start of a file. `None` if the file has none.
    pub fn parse(head: &[u8]) -> Result<Option<BzImage>, KernelError> {
        let word = |offset: usize| {
            head.get(offset..offset + 2)
                .map(|b| u16::from_le_bytes([b[0], b[1]]))
        };
        if word(0x1fe) != Some(BOOT_FLAG) || head.get(0x202..0x206) != Some(&MAGIC.to_le_bytes()[..]) {
            return Ok(None);
        }
        let mut header = setup_header::default();
        // The second byte of the jump over the header tells where the header ends.
        let Some(end) = head.get(0x201).map(|distance| 0x202 + usize::from(*distance)) else {
            return Ok(None);
        };
        let length = (end - HEADER_OFFSET).min(size_of::<setup_header>());
        let Some(bytes) = head.get(HEADER_OFFSET..HEADER_OFFSET + length) else {
            let reaches = (HEADER_OFFSET + length) as u64;
            return Err(FileError::CutShort {
                reaches,
                length: head.len() as u64,
            }
            .into());
        };
        header.as_mut_slice()[..length].copy_from_slice(bytes);

        if header.version < MIN_VERSION {
            return Err(KernelError::TooOld(header.version));
        }
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(KernelError::No64Bit);
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Err(KernelError::Corrupt(
                "it is a zImage and a 64-bit kernel at the same time",
            ));
        }
        if !header.kernel_alignment.is_power_of_two() {
            return Err(KernelError::Corrupt("its alignment is not a power of two"));
        }
        Ok(Some(BzImage { header }))
    }

    /// Where the part behind the setup code starts in the file.
    fn image_start(&self) -> u64 {
        let sectors = match self.header.setup_sects {
            0 => 4, // [boot.rst: for backwards compatibility]
            sectors => u64::from(sectors),
        };
        (sectors + 1) * SECTOR_BYTES
    }

    /// Where the file must end at the earliest.
    pub fn file_end(&self) -> u64 {
        // Not every build pads the file to the last paragraph.
        let image = u64::from(self.header.syssize) * PARAGRAPH_BYTES;
        let image = self.image_start() + image.saturating_sub(PARAGRAPH_BYTES - 1);
        image.max(self.payload().end)
    }

    fn payload(&self) -> std::ops::Range<u64> {
        let start = self.image_start() + u64::from(self.header.payload_offset);
        start..start + u64::from(self.header.payload_length)
    }

    /// Bytes from its load address that the kernel needs before it knows the memory map.
    pub fn init_bytes(&self) -> u64 {
        u64::from(self.header.init_size)
    }

    /// The highest address the initrd's last byte may have.
    pub fn initrd_max(&self) -> u64 {
        u64::from(self.header.initrd_addr_max)
    }

    /// The longest command line, without the NUL.
    pub fn cmdline_max(&self) -> usize {
        self.header.cmdline_size as usize
    }

    /// How the payload is packed, or the name of a format that the host does not unpack.
    pub fn packing(&self, image: &ImageFile) -> Result<Result<Format, String>, KernelError> {
        let payload = self.payload();
        if self.header.payload_length == 0 {
            return Ok(Err("no payload is declared".into()));
        }
        let mut head = [0; 16];
        let wanted = head.len().min((payload.end - payload.start) as usize);
        image.read_exact(&mut head[..wanted], payload.start)?;
        Ok(Format::detect(&head).map_err(str::to_owned))
    }

    /// Unpacks the payload, an ELF file, and loads it. Gives the size of the ELF file too.
    pub fn load_unpacked<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        image: &ImageFile,
        format: Format,
    ) -> Result<(LoadedElf, u64), KernelError> {
        let low_end = low_end(memory);
        let payload = self.payload();
        // The build puts the size in front of the payload's end (gzip ends with it anyway). It goes before the
        // unpacking, so that a bomb is refused for what it is: a kernel that does not fit.
        let mut size = [0; 4];
        image.read_exact(&mut size, payload.end.saturating_sub(4).max(payload.start))?;
        let size = u64::from(u32::from_le_bytes(size));
        if size > low_end {
            let room = self.init_bytes().max(size);
            let needed = self.header.pref_address.max(layout::HIMEM).saturating_add(room);
            return Err(KernelError::NotEnoughMemory {
                needed,
                available: low_end,
            });
        }
        let mut sink = ElfSink::new(memory, low_end, size);
        let unpacked = unpack::unpack(format, image, payload, size, &mut sink);
        if let Some(error) = sink.take_error() {
            return Err(error);
        }
        unpacked.map_err(|source| KernelError::Unpack { format, source })?;
        if sink.position() != size {
            return Err(KernelError::Corrupt(
                "the kernel inside of the bzImage is smaller than it says",
            ));
        }
        Ok((sink.finish()?, size))
    }

    /// Loads the image as it is, to unpack itself. Gives its start and the end of the room that it needs.
    pub fn load_packed<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        image: &ImageFile,
    ) -> Result<(u64, u64), KernelError> {
        let low_end = low_end(memory);
        let length = image.length().saturating_sub(self.image_start());
        // The kernel unpacks itself to its preferred address or above, so nothing is gained by going below it.
        let start = match self.header.relocatable_kernel {
            0 => Some(self.header.pref_address),
            _ => align_up(
                self.header.pref_address.max(layout::HIMEM),
                u64::from(self.header.kernel_alignment),
            ),
        };
        let end = start.and_then(|start| start.checked_add(self.init_bytes().max(length)));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(KernelError::Corrupt(
                "its preferred address is past the end of all addresses",
            ));
        };
        if start < layout::HIMEM || end > layout::PCI_HOLE {
            return Err(KernelError::BadAddress { start, end });
        }
        if end > low_end {
            return Err(KernelError::NotEnoughMemory {
                needed: end,
                available: low_end,
            });
        }
        image.read_to_guest(memory, GuestAddress(start), self.image_start(), length)?;
        Ok((start, end))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::elf::tests::{elf, memory};
    use super::super::file::tests::image_of;
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    /// How a test's kernel is packed.
    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Payload {
        Gzip,
        Lz4,
        Lzma,
        Xz,
        Raw(&'static [u8]),
    }

    pub(crate) fn pack(how: Payload, content: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        match how {
            Payload::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
                encoder.write_all(content).unwrap();
                return encoder.finish().unwrap(); // ends with the size
            }
            Payload::Lz4 => {
                packed.extend([0x02, 0x21, 0x4c, 0x18]);
                for block in content.chunks(8 << 20) {
                    let block = lz4_flex::block::compress(block);
                    packed.extend((block.len() as u32).to_le_bytes());
                    packed.extend(block);
                }
            }
            Payload::Lzma => lzma_rs::lzma_compress(&mut &content[..], &mut packed).unwrap(),
            Payload::Xz => lzma_rs::xz_compress(&mut &content[..], &mut packed).unwrap(),
            Payload::Raw(bytes) => packed.extend(bytes),
        }
        packed.extend((content.len() as u32).to_le_bytes());
        packed
    }

    /// A bzImage with a setup of 2 sectors that wants to be at 16 MiB and needs 4 MiB there.
    pub(crate) fn bzimage(how: Payload, kernel: &[u8]) -> Vec<u8> {
        let payload = pack(how, kernel);
        let payload_offset = 0x240;
        let body = (payload_offset + payload.len()).next_multiple_of(16);
        let header = setup_header {
            setup_sects: 1,
            syssize: (body / 16) as u32,
            boot_flag: BOOT_FLAG,
            jump: u16::from_le_bytes([0xeb, (HEADER_OFFSET + size_of::<setup_header>() - 0x202) as u8]),
            header: MAGIC,
            version: 0x20f,
            loadflags: LOADED_HIGH,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 2047,
            payload_offset: payload_offset as u32,
            payload_length: payload.len() as u32,
            pref_address: 0x100_0000,
            init_size: 0x40_0000,
            ..Default::default()
        };
        let mut file = vec![0; 1024];
        file[HEADER_OFFSET..HEADER_OFFSET + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        file.extend([0xcc; 0x240]);
        file.extend(payload);
        file.resize(1024 + body, 0);
        file
    }

    fn parse(file: &[u8]) -> Result<BzImage, KernelError> {
        BzImage::parse(file).map(|image| image.expect("a bzImage"))
    }

    fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut file = bzimage(Payload::Lz4, &elf(None));
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
        file
    }

    #[test]
    fn every_packing_gives_the_kernel() {
        let kernel = elf(Some(0x10_0040));
        for (how, format) in [
            (Payload::Gzip, Format::Gzip),
            (Payload::Lz4, Format::Lz4),
            (Payload::Lzma, Format::Lzma),
            (Payload::Xz, Format::Xz),
        ] {
            let image = image_of(&bzimage(how, &kernel));
            let mut head = [0; 4096];
            image.read_up_to(&mut head, 0).unwrap();
            let bzimage = parse(&head).unwrap();
            assert_eq!(bzimage.packing(&image).unwrap(), Ok(format));
            let memory = memory();
            let (loaded, size) = bzimage.load_unpacked(&memory, &image, format).unwrap();
            assert_eq!(size, kernel.len() as u64);
            assert_eq!(loaded.pvh_entry, Some(0x10_0040));
            assert_eq!(
                memory.read_obj::<u32>(GuestAddress(0x20_0004)).unwrap(),
                0x0706_0504
            );
        }
    }

    #[test]
    fn an_old_or_32_bit_kernel_is_named() {
        assert!(matches!(
            parse(&patched(0x206, &[0x0b, 2])),
            Err(KernelError::TooOld(0x20b))
        ));
        assert!(
            KernelError::TooOld(0x20b)
                .to_string()
                .contains("protocol is 2.11")
        );
        assert!(matches!(
            parse(&patched(0x236, &[0, 0])),
            Err(KernelError::No64Bit)
        ));
        assert!(matches!(
            parse(&patched(0x230, &[3, 0, 0, 0])),
            Err(KernelError::Corrupt(_))
        ));
    }

    #[test]
    fn a_file_cut_short_says_where_it_should_go() {
        let file = bzimage(Payload::Lz4, &elf(None));
        let end = parse(&file).unwrap().file_end();
        assert!(end <= file.len() as u64 && end + 16 > file.len() as u64);
        assert!(matches!(
            parse(&file[..0x210]),
            Err(KernelError::File(FileError::CutShort {
                reaches: 0x26c,
                length: 0x210
            }))
        ));
        let image = image_of(&file[..file.len() - 100]);
        assert!(matches!(image.require(end), Err(FileError::CutShort { reaches, .. }) if reaches == end));
    }

    #[test]
    fn the_image_itself_goes_to_its_preferred_address() {
        let file = bzimage(Payload::Lz4, &elf(None));
        let memory = memory();
        let (start, end) = parse(&file)
            .unwrap()
            .load_packed(&memory, &image_of(&file))
            .unwrap();
        assert_eq!((start, end), (0x100_0000, 0x140_0000));
        assert_eq!(memory.read_obj::<u32>(GuestAddress(start)).unwrap(), 0xcccc_cccc);
        assert_eq!(
            memory.read_obj::<u32>(GuestAddress(start + 0x240)).unwrap(),
            0x184c_2102
        );
    }

    #[test]
    fn a_relocatable_image_is_aligned() {
        let file = patched(0x258, &0x101_0000u64.to_le_bytes());
        let (start, _) = parse(&file)
            .unwrap()
            .load_packed(&memory(), &image_of(&file))
            .unwrap();
        assert_eq!(start, 0x120_0000);
        for wild in [u64::MAX, u64::MAX - 0x20_0000, 0xd000_0000] {
            let file = patched(0x258, &wild.to_le_bytes());
            assert!(
                parse(&file)
                    .unwrap()
                    .load_packed(&memory(), &image_of(&file))
                    .is_err()
            );
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked() {
        let mut file = bzimage(Payload::Gzip, &elf(None));
        let bzimage = parse(&file).unwrap();
        let size_at = bzimage.payload().end as usize - 4;
        file[size_at..size_at + 4].copy_from_slice(&0xf000_0000u32.to_le_bytes());
        assert!(matches!(
            bzimage.load_unpacked(&memory(), &image_of(&file), Format::Gzip),
            Err(KernelError::NotEnoughMemory { .. })
        ));
        // One that lies about its size stops at what it said.
        file[size_at..size_at + 4].copy_from_slice(&100u32.to_le_bytes());
        assert!(matches!(
            bzimage.load_unpacked(&memory(), &image_of(&file), Format::Gzip),
            Err(KernelError::Corrupt(_))
        ));
    }
}
