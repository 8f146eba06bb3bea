//! ELF kernels: from an uncompressed file, or from a stream while a bzImage's payload is unpacked.
//!
//! An ELF file states for each segment the physical address where it wants to be (`p_paddr`), and it is loaded there
//! and nowhere else. Guest memory is fresh, so the part of a segment that the file does not fill is zero already.
//!
//! A PVH kernel carries the address of its 32-bit entry in a note; without one the file's entry point is taken for
//! the 64-bit entry of the Linux boot protocol.
//!
//! The file may be anything: every number in it is checked before it is used.

use std::io::{self, Write};

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::file::ImageFile;
use super::kernel::KernelError;
use super::layout;

/// The four bytes every ELF file starts with.
pub const MAGIC: [u8; 4] = *b"\x7fELF";
/// Bytes of the header.
pub const HEADER_BYTES: usize = size_of::<Elf64_Ehdr>();

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_INTERP: u32 = 3;
/// Linux has five program headers. More than this is not a kernel.
const MAX_PROGRAM_HEADERS: u16 = 256;
/// The program headers must be within the first bytes of the file, because a stream cannot be read backwards.
const MAX_HEAD_BYTES: u64 = 64 << 10;
/// Notes of a kernel are a few hundred bytes.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY` [Xen: public/elfnote.h].
const NOTE_PHYS32_ENTRY: u32 = 18;

/// A part of the file and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    file_bytes: u64,
    address: u64,
    memory_bytes: u64,
}

/// What the headers say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElfLayout {
    /// The entry point, as a physical address.
    entry: u64,
    segments: Vec<Segment>,
    /// Offset and length of each note segment.
    notes: Vec<(u64, u64)>,
}

/// A kernel that is in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedElf {
    /// The entry point of the ELF header: the 64-bit entry.
    pub entry: u64,
    /// The entry of the PVH note.
    pub pvh_entry: Option<u32>,
    /// Lowest address that is used.
    pub start: u64,
    /// The address behind the highest that is used.
    pub end: u64,
}

fn corrupt(what: &'static str) -> KernelError {
    KernelError::Corrupt(what)
}

/// Copies a structure out of `bytes` at `offset`.
fn read<T: ByteValued + Default>(bytes: &[u8], offset: usize) -> Option<T> {
    let source = bytes.get(offset..offset.checked_add(size_of::<T>())?)?;
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(source);
    Some(value)
}

/// Says what an ELF file is if it is not an executable for this machine. `head` has at least the header.
pub fn foreign(head: &[u8]) -> Option<String> {
    let header: Elf64_Ehdr = read(head, 0)?;
    let of = |what: &str| Some(format!("an ELF file {what}"));
    if header.e_ident[EI_DATA] != ELFDATA2LSB {
        return of("for a big-endian machine");
    }
    match header.e_machine {
        EM_X86_64 if header.e_ident[EI_CLASS] == ELFCLASS64 => {}
        EM_X86_64 | 3 => return Some("a 32-bit ELF file".into()),
        183 => return of("for ARM64"),
        40 => return of("for 32-bit ARM"),
        243 => return of("for RISC-V"),
        other => return of(&format!("for another machine (e_machine {other})")),
    }
    match header.e_type {
        ET_EXEC => None,
        ET_DYN => Some("a program or a shared library".into()),
        1 => Some("an object file or a kernel module".into()),
        other => of(&format!("that is not executable (e_type {other})")),
    }
}

impl ElfLayout {
    /// How many bytes from the start of the file [`ElfLayout::parse`] needs. `head` has at least the header.
    pub fn head_bytes(head: &[u8]) -> Result<usize, KernelError> {
        let header: Elf64_Ehdr = read(head, 0).ok_or(corrupt("the ELF header is incomplete"))?;
        if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
            return Err(corrupt("the program headers have the wrong size"));
        }
        if header.e_phnum == 0 || header.e_phnum > MAX_PROGRAM_HEADERS {
            return Err(corrupt("the number of program headers makes no sense"));
        }
        let table = u64::from(header.e_phnum) * size_of::<Elf64_Phdr>() as u64;
        match header.e_phoff.checked_add(table) {
            Some(end) if end <= MAX_HEAD_BYTES => Ok((end as usize).max(HEADER_BYTES)),
            _ => Err(corrupt("the program headers are not at the start of the file")),
        }
    }

    /// Reads the headers; `head` has at least [`ElfLayout::head_bytes`].
    pub fn parse(head: &[u8]) -> Result<ElfLayout, KernelError> {
        if let Some(looks_like) = foreign(head) {
            return Err(KernelError::NotAKernel { looks_like });
        }
        let header: Elf64_Ehdr = read(head, 0).ok_or(corrupt("the ELF header is incomplete"))?;
        let mut layout = ElfLayout {
            entry: header.e_entry,
            segments: Vec::new(),
            notes: Vec::new(),
        };
        let mut entry_is_physical = false;
        let mut entry_by_virtual = None;
        for index in 0..usize::from(header.e_phnum) {
            let at = header.e_phoff as usize + index * size_of::<Elf64_Phdr>();
            let program: Elf64_Phdr = read(head, at).ok_or(corrupt("the program headers are incomplete"))?;
            if program.p_offset.checked_add(program.p_filesz).is_none()
                || program.p_paddr.checked_add(program.p_memsz).is_none()
                || program.p_vaddr.checked_add(program.p_memsz).is_none()
            {
                return Err(corrupt("a segment goes past the end of all addresses"));
            }
            match program.p_type {
                PT_INTERP => {
                    return Err(KernelError::NotAKernel {
                        looks_like: "a program for an operating system".into(),
                    });
                }
                PT_NOTE if program.p_filesz <= MAX_NOTE_BYTES => {
                    layout.notes.push((program.p_offset, program.p_filesz));
                }
                PT_LOAD if program.p_memsz != 0 => {
                    if program.p_filesz > program.p_memsz {
                        return Err(corrupt("a segment has more bytes in the file than in memory"));
                    }
                    let within = |start: u64| (start..start + program.p_memsz).contains(&header.e_entry);
                    entry_is_physical |= within(program.p_paddr);
                    if within(program.p_vaddr) {
                        entry_by_virtual = Some(header.e_entry - program.p_vaddr + program.p_paddr);
                    }
                    layout.segments.push(Segment {
                        offset: program.p_offset,
                        file_bytes: program.p_filesz,
                        address: program.p_paddr,
                        memory_bytes: program.p_memsz,
                    });
                }
                _ => {}
            }
        }
        if layout.segments.is_empty() {
            return Err(corrupt("no segment is to be loaded"));
        }
        if !entry_is_physical {
            layout.entry = entry_by_virtual.ok_or(corrupt("the entry point is outside of all segments"))?;
        }
        Ok(layout)
    }

    /// Where the file must end at the earliest.
    pub fn file_end(&self) -> u64 {
        let segments = self
            .segments
            .iter()
            .map(|segment| segment.offset + segment.file_bytes);
        segments
            .chain(self.notes.iter().map(|(offset, length)| offset + length))
            .max()
            .unwrap_or(0)
    }

    fn start(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.address)
            .min()
            .unwrap_or(0)
    }

    fn end(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.address + segment.memory_bytes)
            .max()
            .unwrap_or(0)
    }

    /// Every segment must be in RAM above 1 MiB and below `low_end`.
    fn check_fits(&self, low_end: u64) -> Result<(), KernelError> {
        for segment in &self.segments {
            let end = segment.address + segment.memory_bytes;
            if segment.address < layout::HIMEM || end > layout::PCI_HOLE {
                return Err(KernelError::BadAddress {
                    start: segment.address,
                    end,
                });
            }
        }
        if self.end() > low_end {
            return Err(KernelError::NotEnoughMemory {
                needed: self.end(),
                available: low_end,
            });
        }
        Ok(())
    }

    fn loaded(&self, notes: &[Vec<u8>]) -> LoadedElf {
        let pvh_entry = notes.iter().find_map(|notes| pvh_entry(notes));
        LoadedElf {
            entry: self.entry,
            pvh_entry,
            start: self.start(),
            end: self.end(),
        }
    }
}

/// Finds the entry point of the PVH note in the bytes of a note segment.
fn pvh_entry(notes: &[u8]) -> Option<u32> {
    let padded = |length: u32| (length as usize).checked_next_multiple_of(4);
    let mut at = 0;
    loop {
        let header: Elf64_Nhdr = read(notes, at)?;
        let name = at + size_of::<Elf64_Nhdr>();
        let value = name.checked_add(padded(header.n_namesz)?)?;
        if header.n_type == NOTE_PHYS32_ENTRY
            && header.n_namesz == 4
            && notes.get(name..name + 4) == Some(b"Xen\0")
        {
            // Linux writes 8 bytes or 4, depending on its width; the address fits 4.
            let bytes = notes.get(value..value.checked_add(4)?)?;
            return (header.n_descsz >= 4)
                .then(|| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        }
        at = value.checked_add(padded(header.n_descsz)?)?;
    }
}

/// Loads an ELF file into guest memory, of which the block at 0 ends at `low_end`.
pub fn load_file<M: GuestMemoryBackend>(
    memory: &M,
    low_end: u64,
    image: &ImageFile,
) -> Result<LoadedElf, KernelError> {
    let mut head = vec![0; HEADER_BYTES];
    image.read_exact(&mut head, 0)?;
    if let Some(looks_like) = foreign(&head) {
        return Err(KernelError::NotAKernel { looks_like });
    }
    head.resize(ElfLayout::head_bytes(&head)?, 0);
    image.read_exact(&mut head, 0)?;
    let layout = ElfLayout::parse(&head)?;
    image.require(layout.file_end())?;
    layout.check_fits(low_end)?;
    for segment in layout.segments.iter().filter(|segment| segment.file_bytes != 0) {
        image.read_to_guest(
            memory,
            GuestAddress(segment.address),
            segment.offset,
            segment.file_bytes,
        )?;
    }
    let mut notes = Vec::new();
    for (offset, length) in &layout.notes {
        let mut bytes = vec![0; *length as usize];
        image.read_exact(&mut bytes, *offset)?;
        notes.push(bytes);
    }
    Ok(layout.loaded(&notes))
}

/// Loads an ELF file that arrives as a stream: bytes are copied to guest memory as they come, and nothing but the
/// headers and notes is kept.
#[derive(Debug)]
pub struct ElfSink<'a, M> {
    memory: &'a M,
    low_end: u64,
    /// The start of the file, until the headers are complete.
    head: Vec<u8>,
    layout: Option<ElfLayout>,
    notes: Vec<Vec<u8>>,
    position: u64,
    limit: u64,
    error: Option<KernelError>,
}

impl<'a, M: GuestMemoryBackend> ElfSink<'a, M> {
    /// Takes at most `limit` bytes.
    pub fn new(memory: &'a M, low_end: u64, limit: u64) -> Self {
        let (head, notes) = (Vec::new(), Vec::new());
        ElfSink {
            memory,
            low_end,
            head,
            layout: None,
            notes,
            position: 0,
            limit,
            error: None,
        }
    }

    /// Why a write failed, if the reason was here.
    pub fn take_error(&mut self) -> Option<KernelError> {
        self.error.take()
    }

    /// Bytes taken.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Nothing of what is still to come will be loaded.
    pub fn is_complete(&self) -> bool {
        self.layout
            .as_ref()
            .is_some_and(|layout| self.position >= layout.file_end())
    }

    /// The stream is over.
    pub fn finish(self) -> Result<LoadedElf, KernelError> {
        match self.layout {
            Some(layout) if self.position >= layout.file_end() => Ok(layout.loaded(&self.notes)),
            _ => Err(corrupt("the kernel inside of the bzImage is incomplete")),
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), KernelError> {
        self.position += bytes.len() as u64;
        if self.position > self.limit {
            return Err(corrupt("the kernel inside of the bzImage is larger than it says"));
        }
        let start = self.position - bytes.len() as u64;
        if let Some(layout) = &self.layout {
            return place(self.memory, layout, &mut self.notes, start, bytes);
        }
        self.head.extend_from_slice(bytes);
        if self.head.len() >= 4 && !self.head.starts_with(&MAGIC) {
            return Err(corrupt("what is inside of the bzImage is not an ELF file"));
        }
        if self.head.len() < HEADER_BYTES || self.head.len() < ElfLayout::head_bytes(&self.head)? {
            return Ok(());
        }
        let layout = ElfLayout::parse(&self.head)?;
        layout.check_fits(self.low_end)?;
        self.notes = layout
            .notes
            .iter()
            .map(|(_, length)| vec![0; *length as usize])
            .collect();
        place(self.memory, &layout, &mut self.notes, 0, &self.head)?;
        self.head = Vec::new();
        self.layout = Some(layout);
        Ok(())
    }
}

/// Copies what `bytes`, which are at `start` in the file, have of each segment and note.
fn place<M: GuestMemoryBackend>(
    memory: &M,
    layout: &ElfLayout,
    notes: &mut [Vec<u8>],
    start: u64,
    bytes: &[u8],
) -> Result<(), KernelError> {
    for segment in &layout.segments {
        if let Some((at, part)) = overlap(segment.offset, segment.file_bytes, start, bytes) {
            write_nonzero(memory, part, segment.address + at)?;
        }
    }
    for ((offset, length), note) in layout.notes.iter().zip(notes) {
        if let Some((at, part)) = overlap(*offset, *length, start, bytes) {
            note[at as usize..at as usize + part.len()].copy_from_slice(part);
        }
    }
    Ok(())
}

/// Writes all pages but those of zeros, which fresh memory has already: a kernel has megabytes of them, and each
/// page that is not touched saves a fault now and the host's memory as long as the guest does not need it.
fn write_nonzero<M: GuestMemoryBackend>(
    memory: &M,
    mut bytes: &[u8],
    mut address: u64,
) -> Result<(), GuestMemoryError> {
    const PAGE_BYTES: u64 = 4096;
    // Pages in one go, as far as they are alike.
    let mut run = 0;
    while run < bytes.len() {
        let to_boundary = (PAGE_BYTES - (address + run as u64) % PAGE_BYTES) as usize;
        let page = &bytes[run..bytes.len().min(run + to_boundary)];
        if !is_zero(page) {
            run += page.len();
            continue;
        }
        memory.write_slice(&bytes[..run], GuestAddress(address))?;
        address += (run + page.len()) as u64;
        bytes = &bytes[run + page.len()..];
        run = 0;
    }
    memory.write_slice(bytes, GuestAddress(address))
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<32>();
    words.iter().all(|word| *word == [0; 32]) && rest.iter().all(|byte| *byte == 0)
}

/// The part of `bytes` (at `start`) that falls into `length` bytes at `offset`, and how far into them.
fn overlap(offset: u64, length: u64, start: u64, bytes: &[u8]) -> Option<(u64, &[u8])> {
    let from = offset.max(start);
    let to = (offset + length).min(start + bytes.len() as u64);
    (from < to).then(|| {
        (
            from - offset,
            &bytes[(from - start) as usize..(to - start) as usize],
        )
    })
}

impl<M: GuestMemoryBackend> Write for ElfSink<'_, M> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.take(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                self.error = Some(error);
                Err(io::Error::other("the kernel cannot be loaded"))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::file::tests::image_of;
    use super::*;
    use proptest::prelude::*;
    use vm_memory::GuestMemoryMmap;

    pub(crate) const MEMORY: u64 = 32 << 20;

    pub(crate) fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
    }

    /// Two segments with recognisable bytes at 1 MiB and 2 MiB, the second with 4 KiB of bss, and a PVH note.
    pub(crate) fn elf(pvh: Option<u32>) -> Vec<u8> {
        let notes = match pvh {
            None => Vec::new(),
            Some(entry) => {
                let mut notes = Vec::new();
                for (name, kind, value) in [
                    (&b"Linux\0\0\0"[..], 0x101, &[9u8; 3][..]),
                    (
                        &b"Xen\0"[..],
                        NOTE_PHYS32_ENTRY,
                        &u64::from(entry).to_le_bytes()[..],
                    ),
                ] {
                    let name_bytes = name.iter().rposition(|byte| *byte != 0).unwrap() as u32 + 2;
                    notes.extend(name_bytes.to_le_bytes());
                    notes.extend((value.len() as u32).to_le_bytes());
                    notes.extend(u32::to_le_bytes(kind));
                    notes.extend(name);
                    notes.extend(value);
                    notes.resize(notes.len().next_multiple_of(4), 0);
                }
                notes
            }
        };
        let text = vec![0x90; 0x3000];
        let data: Vec<u8> = (0..0x1000u32).map(|i| i as u8).collect();
        let (text_at, data_at, notes_at) = (0x1000u64, 0x5000u64, 0x6000u64);
        let programs = [
            (PT_LOAD, text_at, 0x10_0000, text.len() as u64, 0x3000),
            (PT_LOAD, data_at, 0x20_0000, data.len() as u64, 0x2000),
            (PT_NOTE, notes_at, 0, notes.len() as u64, 0),
        ];
        let mut header = Elf64_Ehdr {
            e_type: ET_EXEC,
            e_machine: EM_X86_64,
            e_version: 1,
            e_entry: 0x10_0010,
            e_phoff: HEADER_BYTES as u64,
            e_ehsize: HEADER_BYTES as u16,
            e_phentsize: size_of::<Elf64_Phdr>() as u16,
            e_phnum: programs.len() as u16,
            ..Default::default()
        };
        header.e_ident[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        let mut file = header.as_slice().to_vec();
        for (p_type, p_offset, p_paddr, p_filesz, p_memsz) in programs {
            let p_vaddr = 0xffff_ffff_8000_0000 + p_paddr;
            let program = Elf64_Phdr {
                p_type,
                p_offset,
                p_vaddr,
                p_paddr,
                p_filesz,
                p_memsz,
                ..Default::default()
            };
            file.extend(program.as_slice());
        }
        file.resize(text_at as usize, 0);
        file.extend(text);
        file.resize(data_at as usize, 0);
        file.extend(data);
        file.resize(notes_at as usize, 0);
        file.extend(notes);
        file
    }

    fn load(content: &[u8]) -> Result<(GuestMemoryMmap, LoadedElf), KernelError> {
        let memory = memory();
        let loaded = load_file(&memory, MEMORY, &image_of(content))?;
        Ok((memory, loaded))
    }

    fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut file = elf(None);
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
        file
    }

    fn assert_loaded(memory: &GuestMemoryMmap) {
        assert_eq!(
            memory.read_obj::<u32>(GuestAddress(0x10_0000)).unwrap(),
            0x9090_9090
        );
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_2fff)).unwrap(), 0x90);
        assert_eq!(
            memory.read_obj::<u32>(GuestAddress(0x20_0004)).unwrap(),
            0x0706_0504
        );
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x20_1000)).unwrap(), 0);
    }

    #[test]
    fn segments_go_to_their_physical_addresses() {
        let (memory, loaded) = load(&elf(None)).unwrap();
        assert_eq!(
            loaded,
            LoadedElf {
                entry: 0x10_0010,
                pvh_entry: None,
                start: 0x10_0000,
                end: 0x20_2000
            }
        );
        assert_loaded(&memory);
    }

    #[test]
    fn the_pvh_note_is_found_behind_others() {
        assert_eq!(load(&elf(Some(0x10_0040))).unwrap().1.pvh_entry, Some(0x10_0040));
    }

    #[test]
    fn a_virtual_entry_point_becomes_physical() {
        let entry = 0xffff_ffff_8010_0020u64;
        assert_eq!(
            load(&patched(24, &entry.to_le_bytes())).unwrap().1.entry,
            0x10_0020
        );
    }

    #[test]
    fn a_stream_in_pieces_of_any_size_gives_the_same() {
        let file = elf(Some(0x10_0040));
        for size in [1, 7, 63, 4096, 0x5001, file.len()] {
            let memory = memory();
            let mut sink = ElfSink::new(&memory, MEMORY, file.len() as u64);
            for piece in file.chunks(size) {
                sink.write_all(piece).unwrap();
            }
            let loaded = sink.finish().unwrap();
            assert_eq!(loaded.pvh_entry, Some(0x10_0040));
            assert_eq!(loaded.end, 0x20_2000);
            assert_loaded(&memory);
        }
    }

    #[test]
    fn a_stream_that_ends_early_or_goes_on_is_refused() {
        let (memory, file) = (memory(), elf(None));
        let mut sink = ElfSink::new(&memory, MEMORY, 1 << 20);
        sink.write_all(&file[..0x5800]).unwrap();
        assert!(matches!(sink.finish(), Err(KernelError::Corrupt(_))));

        let mut sink = ElfSink::new(&memory, MEMORY, 0x5800);
        assert!(sink.write_all(&file).is_err());
        assert!(matches!(sink.take_error(), Some(KernelError::Corrupt(_))));

        let mut sink = ElfSink::new(&memory, MEMORY, 1 << 20);
        assert!(sink.write_all(b"no ELF file").is_err());
    }

    #[test]
    fn what_is_not_for_this_machine_is_named() {
        for (offset, bytes, expected) in [
            (4, &[1u8][..], "a 32-bit ELF file"),
            (5, &[2], "an ELF file for a big-endian machine"),
            (18, &[3, 0], "a 32-bit ELF file"),
            (18, &[183, 0], "an ELF file for ARM64"),
            (18, &[243, 0], "an ELF file for RISC-V"),
            (18, &[8, 0], "an ELF file for another machine (e_machine 8)"),
            (16, &[1, 0], "an object file or a kernel module"),
            (16, &[3, 0], "a program or a shared library"),
            (
                HEADER_BYTES + 2 * 56,
                &[3, 0, 0, 0],
                "a program for an operating system",
            ),
        ] {
            match load(&patched(offset, bytes)) {
                Err(KernelError::NotAKernel { looks_like }) => assert_eq!(looks_like, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }

    #[test]
    fn segments_outside_of_ram_are_refused() {
        let address = HEADER_BYTES + 56 + 24; // of the second
        let size = HEADER_BYTES + 56 + 40;
        assert!(matches!(
            load(&patched(address, &0x7000u64.to_le_bytes())),
            Err(KernelError::BadAddress { start: 0x7000, .. })
        ));
        assert!(matches!(
            load(&patched(address, &0xc000_0000u64.to_le_bytes())),
            Err(KernelError::BadAddress { .. })
        ));
        assert!(matches!(
            load(&patched(size, &0x4000_0000u64.to_le_bytes())),
            Err(KernelError::NotEnoughMemory {
                needed: 0x4020_0000,
                available: MEMORY
            })
        ));
        for wild in [u64::MAX, u64::MAX - 0x1000] {
            assert!(load(&patched(address, &wild.to_le_bytes())).is_err());
            assert!(load(&patched(size, &wild.to_le_bytes())).is_err());
            assert!(load(&patched(HEADER_BYTES + 8, &wild.to_le_bytes())).is_err());
            assert!(load(&patched(32, &wild.to_le_bytes())).is_err());
        }
    }

    #[test]
    fn a_file_that_is_cut_short_says_where_it_should_go() {
        let file = elf(None);
        match load(&file[..0x5800]) {
            Err(KernelError::File(super::super::file::FileError::CutShort { reaches, length })) => {
                assert_eq!((reaches, length), (0x6000, 0x5800));
            }
            other => panic!("{other:?}"),
        }
        assert!(load(&file[..20]).is_err());
        assert!(load(&file[..100]).is_err());
    }

    #[test]
    fn pages_of_zeros_are_not_written() {
        let memory = memory();
        let at = 0x10_0800u64;
        memory
            .write_slice(&[0xee; 0x5000], GuestAddress(0x10_0000))
            .unwrap();
        let mut bytes = vec![0; 0x4000];
        (bytes[0], bytes[0x1900], bytes[0x3fff]) = (1, 2, 3);
        write_nonzero(&memory, &bytes, at).unwrap();
        let byte = |address: u64| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!((byte(at), byte(at + 1), byte(0x10_0fff)), (1, 0, 0));
        assert_eq!(
            (byte(0x10_1000), byte(0x10_1fff)),
            (0xee, 0xee),
            "a page of zeros"
        );
        assert_eq!((byte(0x10_2000), byte(at + 0x1900), byte(0x10_2fff)), (0, 2, 0));
        assert_eq!(
            (byte(0x10_3000), byte(0x10_3fff)),
            (0xee, 0xee),
            "a page of zeros"
        );
        assert_eq!((byte(0x10_4000), byte(0x10_47ff), byte(0x10_4800)), (0, 3, 0xee));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn damaged_files_never_panic(
            flips in proptest::collection::vec((0usize..0x400, any::<u8>()), 0..6),
            length in 1usize..0x6100,
            piece in 1usize..0x2000,
        ) {
            let mut file = elf(Some(0x10_0040));
            for (offset, value) in flips {
                file[offset] ^= value;
            }
            file.truncate(length);
            let _ = load(&file);
            let memory = memory();
            let mut sink = ElfSink::new(&memory, MEMORY, 0x6000);
            if file.chunks(piece).all(|piece| sink.write_all(piece).is_ok()) {
                let _ = sink.finish();
            }
        }

        #[test]
        fn notes_of_any_content_never_panic(notes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = pvh_entry(&notes);
        }
    }
}
