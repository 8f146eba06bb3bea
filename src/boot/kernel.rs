//! From a kernel file to a kernel in guest memory: what kind it is decides how it gets there.
//!
//! | file | protocol `auto` | what is loaded |
//! |---|---|---|
//! | bzImage | 64-bit Linux | its payload unpacked on the host, or the image itself, which unpacks itself in the guest |
//! | ELF with a PVH note | PVH | the segments |
//! | other ELF | 64-bit Linux | the segments |

use linux_loader::bootparam::setup_header;
use vm_memory::GuestMemoryBackend;

use super::bzimage::{self, BzImage};
use super::elf;
use super::entry::EntryPoint;
use super::file::{FileError, ImageFile};
use super::layout;
use super::unpack::{Format, UnpackError};
use crate::machine::memory::{human, low_end};

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BootProtocol {
    /// A bzImage by the Linux protocol, an ELF file by PVH if it has the note.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux,
    /// PVH: 32-bit entry with an `hvm_start_info`.
    Pvh,
}

/// Who unpacks a bzImage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unpack {
    /// The host when it knows the compression, otherwise the guest.
    #[default]
    Auto,
    /// The host, or it is an error.
    Host,
    /// The guest.
    Guest,
}

/// A kernel that cannot be booted, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// Something else.
    #[error(
        "it is not a kernel for this machine but {looks_like}; a bzImage (vmlinuz) or an x86-64 ELF kernel (vmlinux) is needed"
    )]
    NotAKernel {
        /// What it is.
        looks_like: String,
    },
    /// A bzImage from before 64-bit entry points were declared.
    #[error("its boot protocol is {}.{:02}, and 2.12 is the oldest that is supported; a kernel from 2013 or later has it", .0 >> 8, .0 & 0xff)]
    TooOld(u16),
    /// A bzImage without 64-bit entry.
    #[error("it is a 32-bit kernel; an x86-64 kernel is needed")]
    No64Bit,
    /// Contradicts itself.
    #[error("it is damaged: {0}; get it again")]
    Corrupt(&'static str),
    /// Does not fit RAM.
    #[error(
        "it asks for {mib} MiB of memory and the machine has {}; give --memory {mib}M or more",
        human(*.available), mib = .needed.div_ceil(1 << 20)
    )]
    NotEnoughMemory {
        /// Bytes of RAM from address 0 that it needs.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// Is for another memory layout.
    #[error(
        "it wants to be at {start:#x} to {end:#x}, and no machine here has RAM for kernels there (1 MiB to 3 GiB is for them)"
    )]
    BadAddress {
        /// First address.
        start: u64,
        /// The address behind the last.
        end: u64,
    },
    /// The payload cannot be unpacked.
    #[error("its {format} payload cannot be unpacked on the host; --unpack guest leaves that to the kernel")]
    Unpack {
        /// How it is packed.
        format: Format,
        /// Why not.
        #[source]
        source: UnpackError,
    },
    /// `Unpack::Host` for a format that the host does not know.
    #[error(
        "it is packed in a way that the host cannot unpack ({0}); --unpack guest leaves that to the kernel"
    )]
    UnknownPacking(String),
    /// `BootProtocol::Pvh` without a note.
    #[error("it has no PVH entry point; boot it with --boot linux, or build it with CONFIG_PVH")]
    NoPvhEntry,
    /// `BootProtocol::Pvh` for a bzImage as it is.
    #[error("a bzImage has a PVH entry point only when the host unpacks it; use --unpack host")]
    PvhPacked,
    /// Guest memory refused a write that was checked before: our bug.
    #[error("guest memory cannot be written")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// A kernel in guest memory.
#[derive(Clone, Debug)]
pub struct LoadedKernel {
    /// Where the boot processor starts.
    pub entry: EntryPoint,
    /// What kind of file it was, in words.
    pub format: &'static str,
    /// The compression and the size of what was unpacked on the host.
    pub unpacked: Option<(Format, u64)>,
    /// The bzImage's own header, for the zero page.
    pub header: Option<setup_header>,
    /// Lowest address it uses.
    pub start: u64,
    /// First address that is free behind it, with the room it claims for its start.
    pub end: u64,
    /// The highest address the initrd's last byte may have.
    pub initrd_max: u64,
    /// The longest command line it takes, without the NUL.
    pub cmdline_max: usize,
}

/// Loads `image` into guest memory.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    image: &ImageFile,
    protocol: BootProtocol,
    unpack: Unpack,
) -> Result<LoadedKernel, KernelError> {
    let mut head = [0; 4096];
    let count = image.read_up_to(&mut head, 0)?;
    let head = &head[..count];
    if head.starts_with(&elf::MAGIC) {
        let loaded = elf::load_file(memory, low_end(memory), image)?;
        let protocol = match (protocol, loaded.pvh_entry) {
            (BootProtocol::Auto, Some(_)) => BootProtocol::Pvh,
            (protocol, _) => protocol,
        };
        return Ok(LoadedKernel {
            entry: entry_of(&loaded, protocol)?,
            format: "ELF",
            unpacked: None,
            header: None,
            start: loaded.start,
            end: loaded.end,
            initrd_max: u64::from(u32::MAX),
            cmdline_max: DEFAULT_CMDLINE_MAX,
        });
    }
    match BzImage::parse(head)? {
        Some(header) => load_bzimage(memory, image, &header, protocol, unpack),
        None => Err(KernelError::NotAKernel {
            looks_like: looks_like(head),
        }),
    }
}

/// `COMMAND_LINE_SIZE` of Linux on x86, less the NUL.
const DEFAULT_CMDLINE_MAX: usize = 2047;

fn entry_of(loaded: &elf::LoadedElf, protocol: BootProtocol) -> Result<EntryPoint, KernelError> {
    if protocol == BootProtocol::Pvh {
        let eip = loaded.pvh_entry.ok_or(KernelError::NoPvhEntry)?;
        return Ok(EntryPoint::Pvh {
            eip,
            start_info: layout::PVH_START_INFO as u32,
        });
    }
    Ok(EntryPoint::Linux64 {
        rip: loaded.entry,
        zero_page: layout::ZERO_PAGE,
    })
}

fn load_bzimage<M: GuestMemoryBackend>(
    memory: &M,
    image: &ImageFile,
    bzimage: &BzImage,
    protocol: BootProtocol,
    unpack: Unpack,
) -> Result<LoadedKernel, KernelError> {
    image.require(bzimage.file_end())?;
    let kernel = |entry, unpacked, start, end| LoadedKernel {
        entry,
        format: "bzImage",
        unpacked,
        header: Some(bzimage.header),
        start,
        end,
        initrd_max: bzimage.initrd_max(),
        cmdline_max: bzimage.cmdline_max(),
    };
    let packing = match unpack {
        Unpack::Guest => None,
        Unpack::Auto | Unpack::Host => match bzimage.packing(image)? {
            Ok(format) => Some(format),
            Err(other) if unpack == Unpack::Host => return Err(KernelError::UnknownPacking(other)),
            Err(_) => None,
        },
    };
    let Some(format) = packing else {
        if protocol == BootProtocol::Pvh {
            return Err(KernelError::PvhPacked);
        }
        let (start, end) = bzimage.load_packed(memory, image)?;
        let entry = EntryPoint::Linux64 {
            rip: start + bzimage::ENTRY_64_OFFSET,
            zero_page: layout::ZERO_PAGE,
        };
        return Ok(kernel(entry, None, start, end));
    };
    let (loaded, bytes) = bzimage.load_unpacked(memory, image, format)?;
    // The room the header claims is for unpacking too, but nothing says that the kernel itself does not use it.
    let end = loaded
        .end
        .max(loaded.start.saturating_add(bzimage.init_bytes()))
        .min(low_end(memory));
    Ok(kernel(
        entry_of(&loaded, protocol)?,
        Some((format, bytes)),
        loaded.start,
        end,
    ))
}

/// What a file that starts with `head` probably is.
pub fn looks_like(head: &[u8]) -> String {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    let packed =
        |how: &str| format!("a file packed with {how} (an initrd, or a kernel to be unpacked first)");
    if head.len() >= elf::HEADER_BYTES && at(0, &elf::MAGIC) {
        return elf::foreign(head).unwrap_or_else(|| "an ELF file".into());
    }
    let known: &[(usize, &[u8], &str)] = &[
        (0, b"#!", "a script"),
        (56, b"ARM\x64", "an ARM64 kernel image"),
        (56, b"RSC\x05", "a RISC-V kernel image"),
        (4, b"zimg", "a packed EFI kernel for another machine"),
        (0x24, &[0x18, 0x28, 0x6f, 0x01], "a 32-bit ARM kernel image"),
        (0, &[0x27, 0x05, 0x19, 0x56], "a U-Boot image"),
        (0, &[0xd0, 0x0d, 0xfe, 0xed], "a device tree or FIT image"),
        (0, b"MZ", "an EFI or DOS program"),
        (0, b"0707", "a cpio archive (an initrd)"),
        (0, b"QFI\xfb", "a qcow2 disk image"),
        (0, b"hsqs", "a squashfs image"),
        (0, b"!<arch>", "a package or a static library"),
        (257, b"ustar", "a tar archive"),
        (510, &[0x55, 0xaa], "a disk image or boot sector"),
    ];
    if let Some((_, _, what)) = known.iter().find(|(offset, magic, _)| at(*offset, magic)) {
        return (*what).to_owned();
    }
    match Format::detect(head) {
        Ok(format) => return packed(&format.to_string()),
        Err(name) if name != UNKNOWN_FORMAT => return packed(name),
        Err(_) => {}
    }
    if head.iter().all(|byte| *byte == 0) {
        return "a file of zeros".into();
    }
    if head
        .iter()
        .all(|byte| matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r') || *byte >= 0x80)
        && std::str::from_utf8(&head[..head.len().min(64)]).map_or_else(|e| e.error_len().is_none(), |_| true)
    {
        return "a text file".into();
    }
    "something of an unknown kind".into()
}

/// What [`Format::detect`] calls data that it does not know.
pub const UNKNOWN_FORMAT: &str = "unknown";

#[cfg(test)]
mod tests {
    use super::super::bzimage::tests::{Payload, bzimage};
    use super::super::elf::tests::{MEMORY, elf, memory};
    use super::super::file::tests::image_of;
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    fn boot(content: &[u8], protocol: BootProtocol, unpack: Unpack) -> Result<LoadedKernel, KernelError> {
        load(&memory(), &image_of(content), protocol, unpack)
    }

    fn auto(content: &[u8]) -> Result<LoadedKernel, KernelError> {
        boot(content, BootProtocol::Auto, Unpack::Auto)
    }

    const ZERO_PAGE: u64 = layout::ZERO_PAGE;
    const START_INFO: u32 = layout::PVH_START_INFO as u32;

    #[test]
    fn an_elf_file_is_entered_by_its_note_or_by_its_entry() {
        let pvh = EntryPoint::Pvh {
            eip: 0x10_0040,
            start_info: START_INFO,
        };
        let linux = EntryPoint::Linux64 {
            rip: 0x10_0010,
            zero_page: ZERO_PAGE,
        };
        let entry = |file: &[u8], protocol| boot(file, protocol, Unpack::Auto).map(|kernel| kernel.entry);
        let (with, without) = (elf(Some(0x10_0040)), elf(None));
        assert_eq!(entry(&with, BootProtocol::Auto).unwrap(), pvh);
        assert_eq!(entry(&with, BootProtocol::Pvh).unwrap(), pvh);
        assert_eq!(entry(&with, BootProtocol::Linux).unwrap(), linux);
        assert_eq!(entry(&without, BootProtocol::Auto).unwrap(), linux);
        assert!(matches!(
            entry(&without, BootProtocol::Pvh),
            Err(KernelError::NoPvhEntry)
        ));
    }

    #[test]
    fn a_bzimage_is_unpacked_by_the_host_or_by_itself() {
        let file = bzimage(Payload::Lz4, &elf(Some(0x10_0040)));
        let kernel = auto(&file).unwrap();
        assert_eq!(
            kernel.entry,
            EntryPoint::Linux64 {
                rip: 0x10_0010,
                zero_page: ZERO_PAGE
            }
        );
        assert!(matches!(kernel.unpacked, Some((Format::Lz4, _))));
        assert!(kernel.header.is_some());

        let kernel = boot(&file, BootProtocol::Pvh, Unpack::Host).unwrap();
        assert_eq!(
            kernel.entry,
            EntryPoint::Pvh {
                eip: 0x10_0040,
                start_info: START_INFO
            }
        );

        let kernel = boot(&file, BootProtocol::Auto, Unpack::Guest).unwrap();
        assert_eq!(
            kernel.entry,
            EntryPoint::Linux64 {
                rip: 0x100_0200,
                zero_page: ZERO_PAGE
            }
        );
        assert_eq!(kernel.unpacked, None);
        assert_eq!(kernel.end, 0x100_0000 + 0x40_0000);
        assert!(matches!(
            boot(&file, BootProtocol::Pvh, Unpack::Guest),
            Err(KernelError::PvhPacked)
        ));
    }

    #[test]
    fn a_packing_nobody_knows_is_left_to_the_guest() {
        let file = bzimage(Payload::Raw(b"BZh91AY and so on"), &[0; 64]);
        assert_eq!(auto(&file).unwrap().unpacked, None);
        match boot(&file, BootProtocol::Auto, Unpack::Host) {
            Err(KernelError::UnknownPacking(name)) => assert_eq!(name, "bzip2"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_a_kernel_is_named() {
        let mut arm = vec![b'M', b'Z'];
        arm.resize(64, 0);
        arm[56..60].copy_from_slice(b"ARM\x64");
        let mut disk = vec![1u8; 512];
        disk[510..].copy_from_slice(&[0x55, 0xaa]);
        for (content, expected) in [
            (&b"#!/bin/sh\necho\n"[..], "a script"),
            (b"\x1f\x8b\x08\0\0\0\0\0", "packed with gzip (an initrd,"),
            (b"070701000000", "a cpio archive (an initrd)"),
            (b"\x28\xb5\x2f\xfd1234", "packed with zstd"),
            (b"BZh91AY", "packed with bzip2"),
            (b"hello, world\n", "a text file"),
            (&[0; 8192], "a file of zeros"),
            (&[0x81, 0x13, 0, 0xff], "something of an unknown kind"),
            (b"MZ\x90\0 a program", "an EFI or DOS program"),
            (&arm, "an ARM64 kernel image"),
            (&disk, "a disk image or boot sector"),
        ] {
            match auto(content) {
                Err(error @ KernelError::NotAKernel { .. }) => {
                    let text = error.to_string();
                    assert!(text.contains(expected) && text.contains("bzImage"), "{text}");
                }
                other => panic!("{expected}: {other:?}"),
            }
        }
    }

    #[test]
    fn too_little_memory_names_the_remedy() {
        let small = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
        let file = image_of(&bzimage(Payload::Lz4, &elf(None)));
        let error = load(&small, &file, BootProtocol::Auto, Unpack::Guest).unwrap_err();
        assert_eq!(
            error.to_string(),
            "it asks for 20 MiB of memory and the machine has 16 MiB; give --memory 20M or more"
        );
    }

    /// With `ACTOR_VMM_TEST_KERNEL=/path/to/vmlinuz`, a real kernel: unpacked on the host, by every protocol.
    #[test]
    fn a_real_kernel_loads() {
        let Some(path) = std::env::var_os("ACTOR_VMM_TEST_KERNEL") else {
            eprintln!("SKIPPED: set ACTOR_VMM_TEST_KERNEL to the path of a bzImage to run this test");
            return;
        };
        let image = ImageFile::open(path.as_ref()).unwrap();
        let memory =
            || vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 256 << 20)]).unwrap();
        let unpacked = memory();
        let start = std::time::Instant::now();
        let kernel = load(&unpacked, &image, BootProtocol::Auto, Unpack::Host).unwrap();
        eprintln!("{kernel:x?} in {:?}", start.elapsed());
        let EntryPoint::Linux64 { rip, .. } = kernel.entry else {
            panic!("{:?}", kernel.entry)
        };
        assert_ne!(unpacked.read_obj::<u64>(GuestAddress(rip)).unwrap(), 0);

        let kernel = load(&memory(), &image, BootProtocol::Pvh, Unpack::Auto).unwrap();
        assert!(
            matches!(kernel.entry, EntryPoint::Pvh { .. }),
            "{:?}",
            kernel.entry
        );
        let kernel = load(&memory(), &image, BootProtocol::Auto, Unpack::Guest).unwrap();
        assert!(kernel.end > kernel.start + image.length());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn damaged_bzimages_never_panic(
            flips in proptest::collection::vec((0usize..0x600, any::<u8>()), 0..8),
            cut in 0usize..0x2000,
            which in 0usize..5,
            guest in any::<bool>(),
        ) {
            let how = [Payload::Lz4, Payload::Gzip, Payload::Lzma, Payload::Xz, Payload::Lz4][which];
            let mut file = bzimage(how, &elf(Some(0x10_0040)));
            for (offset, value) in flips {
                if offset < file.len() {
                    file[offset] ^= value;
                }
            }
            file.truncate(file.len().saturating_sub(cut / 2).max(1));
            let unpack = if guest { Unpack::Guest } else { Unpack::Auto };
            let _ = boot(&file, BootProtocol::Auto, unpack);
        }

        #[test]
        fn any_bytes_are_described(head in proptest::collection::vec(any::<u8>(), 1..600)) {
            prop_assert!(!looks_like(&head).is_empty());
            let _ = auto(&head);
        }
    }

    #[test]
    fn memory_of_these_tests_holds_the_test_kernels() {
        const { assert!(MEMORY > 0x140_0000) };
    }
}
