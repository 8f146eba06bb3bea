//! Guest memory: how much, what backs it, where it is, and what the guest is told about it.
//!
//! RAM is one contiguous block from 0 up to the PCI hole, and what does not fit there goes on at 4 GiB. The legacy
//! hole between 640 KiB and 1 MiB has RAM behind it too (the ACPI tables are there), but the memory map that the
//! guest gets leaves it out.
//!
//! Where it can be had without a price, all of it is one shared memfd, so that another process can be given guest
//! memory by its descriptor; see [`Backing`]. Pages are taken from the host when they are first touched.

use std::ffi::CStr;
use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{self, MapFlags, ProtFlags};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::boot::layout;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const PAGE_BYTES: u64 = 4 * KIB;
const HUGE_PAGE_BYTES: u64 = 2 * MIB;

/// The least memory a machine can have: boot structures, a small kernel and its stack fit.
pub const MIN_BYTES: u64 = 16 * MIB;
/// The most: 46 address bits are the least that 64-bit server processors have; this stays clear of them.
pub const MAX_BYTES: u64 = 16 << 40;

const MEMFD_NAME: &CStr = c"guest-ram";
const SHMEM_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const MEMINFO: &str = "/proc/meminfo";
const FREE_HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// [`Backing::Memfd`] where the host gives transparent huge pages to shared memory, else [`Backing::Anonymous`]:
    /// a guest on small pages boots a third slower, and no device shares guest memory.
    #[default]
    Auto,
    /// One memfd: can be shared with other processes. Transparent huge pages where the host offers them for shared
    /// memory (/sys/kernel/mm/transparent_hugepage/shmem_enabled).
    Memfd,
    /// Private memory, with transparent huge pages wherever the host has them.
    Anonymous,
    /// 2 MiB pages out of the host's pool. They are reserved when the machine starts.
    Hugepages,
}

/// How much memory the guest has, and what backs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// RAM in bytes: what [`parse_size`] lets through.
    pub size_bytes: u64,
    /// What it is made of.
    pub backing: Backing,
}

/// A memory size that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number with a unit.
    #[error("`{0}` is not a memory size; write for example 512M, 4.5G or 536870912")]
    Syntax(String),
    /// Zero.
    #[error("a machine needs memory; the least is {}", human(MIN_BYTES))]
    Zero,
    /// Below [`MIN_BYTES`].
    #[error("{size} of memory is too little; the least is {least}", size = human(*.0), least = human(MIN_BYTES))]
    TooSmall(u64),
    /// Above [`MAX_BYTES`].
    #[error("`{0}` of memory is more than a machine can have; the most is {most}", most = human(MAX_BYTES))]
    TooLarge(String),
    /// Not whole pages.
    #[error("{size} bytes of memory are not a multiple of {page}; the nearest size below is {nearest}",
        nearest = .size - .size % .page)]
    PartialPage {
        /// What was asked for.
        size: u64,
        /// The page size it should be a multiple of.
        page: u64,
    },
}

/// Guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size does not fit the backing.
    #[error("the memory size does not fit --memory-backing hugepages")]
    Size(#[source] SizeError),
    /// The host has no memfd, or not with huge pages.
    #[error("cannot create the file behind guest memory{}", if *.huge { " (does this host's kernel have hugetlbfs? without --memory-backing hugepages it is not needed)" } else { " (is `ulimit -f` too low? --memory-backing anonymous needs no file)" })]
    Create {
        /// Whether huge pages were asked for.
        huge: bool,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host's pool of huge pages is too small.
    #[error(
        "not enough huge pages: {needed} of 2 MiB are needed and {free} are free; `sysctl vm.nr_hugepages={sysctl}` \
         makes room, or choose another --memory-backing",
        sysctl = .needed - .free.min(.needed) + .pool
    )]
    HugePages {
        /// Pages needed.
        needed: u64,
        /// Pages free in the pool.
        free: u64,
        /// Pages in the pool, used ones included.
        pool: u64,
    },
    /// More than the host has.
    #[error(
        "--memory {} is more than the host has ({} of RAM and swap); give less, or the host would run out of memory \
         while the guest runs", human(*.wanted), human(*.has)
    )]
    MoreThanHost {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes of RAM and swap.
        has: u64,
    },
    /// The host does not give that much.
    #[error("the host does not give {} of address space for guest memory; give less with --memory, or look at `ulimit -v` and vm.overcommit_memory", human(*.size))]
    Map {
        /// Size of the block in bytes.
        size: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Parses `512M`, `4.5G`, `1536m`, `2GiB` or plain bytes: binary units K, M, G and T. What a machine can have.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    check_size(parse_bytes(text)?, PAGE_BYTES)
}

/// The same of any size, up to [`MAX_BYTES`].
///
/// # Errors
/// [`SizeError::Syntax`], [`SizeError::TooLarge`].
pub fn parse_bytes(text: &str) -> Result<u64, SizeError> {
    let syntax = || SizeError::Syntax(text.to_owned());
    let trimmed = text.trim();
    let split = trimmed
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(syntax()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let fraction_is_off = number.contains('.') && (fraction.is_empty() || fraction.len() > 9 || shift == 0);
    if whole.is_empty() || fraction_is_off || fraction.contains('.') {
        return Err(syntax());
    }
    // All digits by now: what does not parse is too long for the type.
    let too_large = || SizeError::TooLarge(text.to_owned());
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let mut bytes = u128::from(whole) << shift;
    if !fraction.is_empty() {
        let digits: u128 = fraction.parse().map_err(|_| syntax())?;
        bytes += (digits << shift) / 10u128.pow(fraction.len() as u32);
    }
    if bytes > u128::from(MAX_BYTES) {
        return Err(too_large());
    }
    Ok(bytes as u64)
}

fn check_size(size: u64, page: u64) -> Result<u64, SizeError> {
    match size {
        0 => Err(SizeError::Zero),
        _ if size < MIN_BYTES => Err(SizeError::TooSmall(size)),
        _ if size > MAX_BYTES => Err(SizeError::TooLarge(human(size))),
        _ if !size.is_multiple_of(page) => Err(SizeError::PartialPage { size, page }),
        _ => Ok(size),
    }
}

/// A size in the largest unit that shows it exactly.
pub fn human(bytes: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in UNITS {
        if bytes >> shift != 0 && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

/// Where RAM is: guest address and length of each block.
pub fn blocks(size_bytes: u64) -> Vec<(GuestAddress, u64)> {
    let below = size_bytes.min(layout::PCI_HOLE);
    let mut blocks = vec![(GuestAddress(0), below)];
    if size_bytes > below {
        blocks.push((GuestAddress(layout::RAM_ABOVE_4G), size_bytes - below));
    }
    blocks
}

impl Backing {
    /// What [`Backing::Auto`] stands for on this host.
    fn resolve(self) -> Backing {
        if self != Backing::Auto {
            return self;
        }
        let shmem = std::fs::read_to_string(SHMEM_HUGE_PAGES).unwrap_or_default();
        let offered = ["[always]", "[within_size]", "[advise]", "[force]"];
        if offered.iter().any(|word| shmem.contains(word)) {
            Backing::Memfd
        } else {
            Backing::Anonymous
        }
    }
}

/// Whether the host could ever fill so much guest memory. It is taken page by page as the guest touches it, so without
/// this look the answer would be the OOM killer's, and late.
///
/// # Errors
/// [`MemoryError::MoreThanHost`].
pub fn check_host(config: &MemoryConfig) -> Result<(), MemoryError> {
    // Huge pages are reserved by `create`. A host that does not tell is believed to have enough.
    let Some(has) = std::fs::read_to_string(MEMINFO)
        .ok()
        .and_then(|text| host_bytes(&text))
        .filter(|_| config.backing != Backing::Hugepages)
    else {
        return Ok(());
    };
    if config.size_bytes > has {
        return Err(MemoryError::MoreThanHost {
            wanted: config.size_bytes,
            has,
        });
    }
    Ok(())
}

/// RAM and swap, from the text of /proc/meminfo [proc_meminfo(5)].
fn host_bytes(meminfo: &str) -> Option<u64> {
    let field = |name: &str| -> Option<u64> {
        let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = rest
            .strip_prefix(':')?
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse()
            .ok()?;
        kib.checked_mul(KIB)
    };
    Some(field("MemTotal")?.saturating_add(field("SwapTotal").unwrap_or(0)))
}

/// Takes guest memory from the host: a region for each of [`blocks`].
pub fn create(config: &MemoryConfig) -> Result<GuestMemoryMmap, MemoryError> {
    let backing = config.backing.resolve();
    let huge = backing == Backing::Hugepages;
    let page = if huge { HUGE_PAGE_BYTES } else { PAGE_BYTES };
    let size = check_size(config.size_bytes, page).map_err(MemoryError::Size)?;
    let file = match backing {
        Backing::Anonymous | Backing::Auto => None,
        Backing::Memfd | Backing::Hugepages => Some(std::sync::Arc::new(create_file(size, huge)?)),
    };
    let mut regions = Vec::with_capacity(2);
    let mut offset = 0;
    for (start, length) in blocks(size) {
        // Reserving huge pages makes a pool that is too small an error here instead of a SIGBUS later.
        let noreserve = if huge { 0 } else { libc::MAP_NORESERVE };
        let mut builder = MmapRegionBuilder::new(length as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_hugetlbfs(huge);
        builder = match &file {
            Some(file) => builder
                .with_file_offset(FileOffset::from_arc(file.clone(), offset))
                .with_mmap_flags(libc::MAP_SHARED | noreserve),
            None => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | noreserve),
        };
        let padding = Padding::align_next(length as usize);
        let region = builder.build().map_err(|error| map_error(size, huge, error))?;
        drop(padding);
        advise(&region, huge);
        // `None` only where the address space ends, and MAX_BYTES is far from there.
        let past_end = || map_error(size, huge, MmapRegionError::InvalidOffsetLength);
        regions.push(GuestRegionMmap::new(region, start).ok_or_else(past_end)?);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions)
        .map_err(|_| map_error(size, huge, MmapRegionError::InvalidOffsetLength))
}

/// Empties guest memory: every page reads zeros and is the host's again, as after [`create`].
///
/// # Errors
/// What the host says, for memory that is neither private nor a file with holes.
pub fn clear(memory: &GuestMemoryMmap) -> io::Result<()> {
    for region in memory.iter() {
        let advice = advice(region);
        // SAFETY: the range is one mapping of `memory`, which nobody has references into: the guest does not run, and
        // vm-memory's accesses are volatile copies. Both leave the mapping in place and zeros in it.
        if unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Gives a piece of guest memory back to the host: it reads zeroes then, and is taken anew when it is touched. Of pages
/// that are not whole, and of what is no memory, nothing. Returns how many bytes.
///
/// # Errors
/// What the host says.
pub fn discard(memory: &GuestMemoryMmap, address: u64, bytes: u64) -> io::Result<u64> {
    let end = address.checked_add(bytes);
    // Behind the last page of all there is none.
    let start = address.checked_next_multiple_of(PAGE_BYTES);
    let (Some(start), Some(end)) = (start, end.map(|end| end / PAGE_BYTES * PAGE_BYTES)) else {
        return Ok(0);
    };
    let mut given = 0;
    for region in memory.iter() {
        let base = region.start_addr().0;
        let (from, to) = (start.max(base), end.min(base + region.len()));
        if from >= to {
            continue;
        }
        let advice = advice(region);
        // SAFETY: the range is within one mapping of `memory`, which nobody has references into; see `clear`. What the
        // guest does meanwhile is its own affair.
        let result = unsafe {
            let pointer = region.as_ptr().add((from - base) as usize);
            libc::madvise(pointer.cast(), (to - from) as usize, advice)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        given += to - from;
    }
    Ok(given)
}

/// What empties a region: a hole in the file, or no private pages.
fn advice(region: &GuestRegionMmap) -> libc::c_int {
    if region.file_offset().is_some() {
        libc::MADV_REMOVE
    } else {
        libc::MADV_DONTNEED
    }
}

/// The file behind shared guest memory.
fn create_file(size: u64, huge: bool) -> Result<File, MemoryError> {
    let fail = |errno: Errno| MemoryError::Create {
        huge,
        source: errno.into(),
    };
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if huge {
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    }
    let file = File::from(memfd_create(MEMFD_NAME, flags).map_err(fail)?);
    file.set_len(size)
        .map_err(|source| MemoryError::Create { huge, source })?;
    // Nobody who gets the descriptor can pull the memory from under the guest.
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(fail)?;
    Ok(file)
}

/// Address space that is taken for a moment so that the next mapping starts at a multiple of 2 MiB, without which
/// neither the host nor KVM can use a huge page for it. The kernel places a mapping below the last one; if it does
/// not, the guest is slower and nothing else.
struct Padding(Option<(std::ptr::NonNull<std::ffi::c_void>, std::num::NonZeroUsize)>);

impl Padding {
    fn align_next(length: usize) -> Padding {
        Padding(Self::map(length))
    }

    fn map(length: usize) -> Option<(std::ptr::NonNull<std::ffi::c_void>, std::num::NonZeroUsize)> {
        use std::num::NonZeroUsize;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        let reserve = |at: Option<NonZeroUsize>, length: NonZeroUsize, flags: MapFlags| {
            // SAFETY: a new mapping that nobody has a reference into, never in place of another (no MAP_FIXED).
            unsafe { mman::mmap_anonymous(at, length, ProtFlags::PROT_NONE, flags) }.ok()
        };
        // Where it would go.
        let length = NonZeroUsize::new(length)?;
        let probe = reserve(None, length, flags)?;
        // SAFETY: the mapping made above, which nobody uses.
        unsafe { mman::munmap(probe, length.get()) }.ok()?;
        let excess = NonZeroUsize::new(probe.addr().get() % HUGE_PAGE_BYTES as usize)?;
        let end = probe.addr().get() + length.get();
        let at = NonZeroUsize::new(end - excess.get())?;
        let padding = reserve(Some(at), excess, flags | MapFlags::MAP_FIXED_NOREPLACE)?;
        Some((padding, excess))
    }
}

impl Drop for Padding {
    fn drop(&mut self) {
        if let Some((start, length)) = self.0 {
            // SAFETY: the mapping that `map` made, which nobody uses.
            let _ = unsafe { mman::munmap(start, length.get()) };
        }
    }
}

/// Hints to the host; a host that does not know one does without.
fn advise(region: &vm_memory::MmapRegion, huge: bool) {
    let mut hints = vec![libc::MADV_DONTDUMP];
    if !huge {
        hints.push(libc::MADV_HUGEPAGE);
    }
    for hint in hints {
        // SAFETY: the range is exactly the mapping that `region` owns, and neither hint changes its content.
        unsafe { libc::madvise(region.as_ptr().cast(), region.size(), hint) };
    }
}

fn map_error(size: u64, huge: bool, error: MmapRegionError) -> MemoryError {
    if huge {
        let read = |path: &str| {
            std::fs::read_to_string(path)
                .ok()
                .and_then(|s| s.trim().parse().ok())
        };
        return MemoryError::HugePages {
            needed: size / HUGE_PAGE_BYTES,
            free: read(FREE_HUGE_PAGES).unwrap_or(0),
            pool: read(&FREE_HUGE_PAGES.replace("free", "nr")).unwrap_or(0),
        };
    }
    let source = match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    };
    MemoryError::Map { size, source }
}

/// What a range of guest-physical addresses is, as the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// RAM that the guest may use.
    Usable,
    /// Not for the guest to use.
    Reserved,
}

/// One line of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// What it is.
    pub kind: RangeKind,
}

impl MemoryRange {
    /// The address behind the last.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }
}

/// The memory map of a machine with `size_bytes` of RAM, by ascending addresses: what E820 and PVH tell the guest.
pub fn memory_map(size_bytes: u64) -> Vec<MemoryRange> {
    use RangeKind::{Reserved, Usable};
    let range = |kind, start: u64, end: u64| MemoryRange {
        start,
        length: end - start,
        kind,
    };
    let low = size_bytes.min(layout::PCI_HOLE);
    let mut map = vec![
        range(Usable, 0, layout::LOW_RAM_END.min(low)),
        range(Reserved, layout::LOW_RAM_END, 0xa_0000),
        range(Reserved, layout::ACPI_TABLES, layout::ACPI_TABLES_END),
    ];
    if low > layout::HIMEM {
        map.push(range(Usable, layout::HIMEM, low));
    }
    map.push(range(
        Reserved,
        layout::KVM_IDENTITY_MAP,
        layout::KVM_TSS + 3 * PAGE_BYTES,
    ));
    if size_bytes > low {
        map.push(range(
            Usable,
            layout::RAM_ABOVE_4G,
            layout::RAM_ABOVE_4G + size_bytes - low,
        ));
    }
    map
}

/// RAM in bytes of memory that [`create`] (or a test) made.
pub fn total_bytes<M: GuestMemoryBackend>(memory: &M) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

/// The address behind the last byte of the block of RAM that starts at 0.
pub fn low_end<M: GuestMemoryBackend>(memory: &M) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, |region| region.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn sizes_parse() {
        for (text, bytes) in [
            ("512M", 512 * MIB),
            ("1536m", 1536 * MIB),
            ("4.5G", 4608 * MIB),
            ("0.25g", 256 * MIB),
            ("2GiB", 2048 * MIB),
            ("16384k", 16 * MIB),
            ("536870912", 512 * MIB),
            (" 64M ", 64 * MIB),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_that_are_none_say_why() {
        for text in [
            "", "M", "12x", "1.2.3G", "1.G", ".5G", "-5M", "5 M", "0x10M", "1.5", "512MM", "½G",
        ] {
            assert_eq!(
                parse_size(text),
                Err(SizeError::Syntax(text.to_owned())),
                "{text}"
            );
        }
        assert_eq!(parse_size("0"), Err(SizeError::Zero));
        assert_eq!(parse_size("0G"), Err(SizeError::Zero));
        assert_eq!(parse_size("8M"), Err(SizeError::TooSmall(8 * MIB)));
        assert_eq!(
            parse_size("536870913"),
            Err(SizeError::PartialPage {
                size: 536_870_913,
                page: PAGE_BYTES
            })
        );
        for text in ["17T", "99999999999999999999999", "18446744073709551615T"] {
            assert_eq!(
                parse_size(text),
                Err(SizeError::TooLarge(text.to_owned())),
                "{text}"
            );
        }
        assert_eq!(
            parse_size("8M").unwrap_err().to_string(),
            "8 MiB of memory is too little; the least is 16 MiB"
        );
        assert!(
            parse_size("536870913")
                .unwrap_err()
                .to_string()
                .ends_with("below is 536870912")
        );
    }

    #[test]
    fn blocks_leave_the_hole_out() {
        assert_eq!(blocks(512 * MIB), [(GuestAddress(0), 512 * MIB)]);
        assert_eq!(blocks(3072 * MIB), [(GuestAddress(0), 3072 * MIB)]);
        assert_eq!(
            blocks(4608 * MIB),
            [
                (GuestAddress(0), 3072 * MIB),
                (GuestAddress(layout::RAM_ABOVE_4G), 1536 * MIB)
            ]
        );
    }

    #[test]
    fn the_map_is_sorted_disjoint_and_complete() {
        for size in [16 * MIB, 128 * MIB, 3072 * MIB, 3073 * MIB, 4608 * MIB, 64 << 30] {
            let map = memory_map(size);
            for pair in map.windows(2) {
                assert!(pair[0].end() <= pair[1].start, "{pair:x?}");
            }
            let usable: u64 = map
                .iter()
                .filter(|r| r.kind == RangeKind::Usable)
                .map(|range| range.length)
                .sum();
            assert_eq!(usable, size - (layout::HIMEM - layout::LOW_RAM_END));
        }
    }

    #[test]
    fn memory_is_there_zeroed_sealed_and_shared_across_the_hole() {
        let memory = create(&MemoryConfig {
            size_bytes: 3100 * MIB,
            backing: Backing::Memfd,
        })
        .expect("guest memory");
        assert_eq!(total_bytes(&memory), 3100 * MIB);
        assert_eq!(low_end(&memory), layout::PCI_HOLE);
        assert!(!memory.address_in_range(GuestAddress(layout::PCI_HOLE)));
        let high = GuestAddress(layout::RAM_ABOVE_4G);
        assert_eq!(memory.read_obj::<u64>(high).unwrap(), 0);
        memory.write_obj(0x1122_3344u32, high).unwrap();

        let region = memory.find_region(high).unwrap();
        let offset = region.file_offset().unwrap();
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(offset.file(), &mut bytes, offset.start()).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), 0x1122_3344);
        assert!(offset.file().set_len(0).is_err(), "a sealed file does not shrink");
    }

    #[test]
    fn cleared_memory_reads_zeros_whatever_it_is_made_of() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let memory = create(&MemoryConfig {
                size_bytes: MIN_BYTES,
                backing,
            })
            .unwrap();
            for at in [0, 4096, MIN_BYTES - 8] {
                memory.write_obj(0x55u64, GuestAddress(at)).unwrap();
            }
            clear(&memory).unwrap();
            for at in [0, 4096, MIN_BYTES - 8] {
                assert_eq!(
                    memory.read_obj::<u64>(GuestAddress(at)).unwrap(),
                    0,
                    "{backing:?}"
                );
            }
        }
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        let text = "MemTotal:       1024 kB\nMemFree: 5 kB\nSwapTotal:      1024 kB\n";
        assert_eq!(host_bytes(text), Some(2 * MIB));
        assert_eq!(host_bytes("MemTotal:       1024 kB\n"), Some(MIB));
        assert_eq!(host_bytes("nothing"), None);
        let config = |size_bytes| MemoryConfig {
            size_bytes,
            backing: Backing::Memfd,
        };
        assert!(check_host(&config(MIN_BYTES)).is_ok());
        let error = check_host(&config(MAX_BYTES)).unwrap_err().to_string();
        assert!(
            error.contains("--memory 16 TiB is more than the host has"),
            "{error}"
        );
    }

    #[test]
    fn huge_pages_that_are_not_there_name_the_remedy() {
        // More than any test machine has set aside.
        let config = MemoryConfig {
            size_bytes: 1 << 40,
            backing: Backing::Hugepages,
        };
        match create(&config) {
            Err(error @ MemoryError::HugePages { needed: 524_288, .. }) => {
                let text = error.to_string();
                assert!(
                    text.contains("524288") && text.contains("sysctl vm.nr_hugepages="),
                    "{text}"
                );
            }
            Err(error @ MemoryError::Create { huge: true, .. }) => {
                assert!(error.to_string().contains("hugetlbfs"));
            }
            other => panic!("{other:?}"),
        }
        let odd = MemoryConfig {
            size_bytes: 17 * MIB,
            backing: Backing::Hugepages,
        };
        assert!(matches!(
            create(&odd),
            Err(MemoryError::Size(SizeError::PartialPage { .. }))
        ));
    }

    #[test]
    fn huge_pages_that_are_there_are_used() {
        let free = std::fs::read_to_string(FREE_HUGE_PAGES)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        if free.unwrap_or(0u64) < MIN_BYTES / HUGE_PAGE_BYTES {
            eprintln!("SKIPPED: no huge pages on this machine (sysctl vm.nr_hugepages=8)");
            return;
        }
        let config = MemoryConfig {
            size_bytes: MIN_BYTES,
            backing: Backing::Hugepages,
        };
        let memory = create(&config).unwrap();
        memory.write_obj(7u64, GuestAddress(MIN_BYTES - 8)).unwrap();
        assert_eq!(memory.iter().next().unwrap().is_hugetlbfs(), Some(true));
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(human(4608 * MIB), "4608 MiB");
        assert_eq!(human(4 << 30), "4 GiB");
        assert_eq!(human(5000), "5000 bytes");
        assert_eq!(human(0), "0 bytes");
    }
}
