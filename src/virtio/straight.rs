//! Bytes straight between a file and guest memory, without the copy through a queue's buffer.
//!
//! Only where the host need not wait for a disk: this is done inside a touch ([`super::lease`]), which a reset and a pause
//! wait for. So [`Ways`] are found out once for a file: a file that is memory itself (tmpfs) is as quick as guest memory,
//! which is made of the same. Of other files nothing is known: also a read that may not wait (`RWF_NOWAIT` [preadv2(2)]) has
//! the kernel read ahead first, and that asks the disk. What cannot be had so goes through the buffer, and so do errors:
//! there they are told. What a transfer does wait for is the file's lock in the kernel: who else holds that of a file on tmpfs
//! copies memory too, or gives it back ([`super::block::image`] does so in small pieces).
//!
//! What a hostile guest can try: pieces outside memory (nothing is done), more than [`MOST_PIECES`] (done in parts),
//! memory that changes or overlaps meanwhile (its own loss: the kernel copies once and looks at nothing).

use super::chain::{Fault, Segment, each};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

/// Pieces of one transfer: the pages of a touch ([`super::CHUNK_BYTES`]), and as many again.
pub const MOST_PIECES: usize = 64;

/// Host addresses of the pieces of guest memory that a transfer is from or to.
pub struct Pieces<'a> {
    places: [libc::iovec; MOST_PIECES],
    count: usize,
    memory: PhantomData<&'a GuestMemoryMmap>,
}

impl<'a> Pieces<'a> {
    /// Of `length` bytes from `offset` of the segments; less if these are more than [`MOST_PIECES`].
    ///
    /// # Errors
    /// [`Fault`]: not all of it is memory.
    pub(super) fn of(
        memory: &'a GuestMemoryMmap,
        segments: &[Segment],
        offset: u64,
        length: usize,
    ) -> Result<Pieces<'a>, Fault> {
        let mut pieces = Pieces {
            places: [libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            }; MOST_PIECES],
            count: 0,
            memory: PhantomData,
        };
        each(segments, offset, length, |address, range| {
            for slice in GuestMemoryBackend::get_slices(memory, address, range.len()) {
                let slice = slice.map_err(|_| Fault)?;
                if let Some(place) = pieces.places.get_mut(pieces.count) {
                    place.iov_base = slice.ptr_guard_mut().as_ptr().cast();
                    place.iov_len = slice.len();
                    pieces.count += 1;
                }
            }
            Ok(())
        })?;
        Ok(pieces)
    }
}

/// Which transfers of a file need not wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ways {
    /// None that is known.
    None,
    /// All: the file is memory.
    All,
}

impl Ways {
    /// What the file's file system promises.
    pub fn of(file: &File) -> Ways {
        // The nodes of devices are in such a file system, too.
        let regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
        if regular && fstatfs(file).is_ok_and(|system| system.filesystem_type() == TMPFS_MAGIC) {
            return Ways::All;
        }
        Ways::None
    }

    /// Reads what need not be waited for from `offset` of the file. Returns bytes; none also for an error, which a read of the
    /// usual kind will tell.
    pub fn read(self, file: &File, offset: u64, to: &Pieces<'_>) -> usize {
        let (Ways::All, Ok(offset)) = (self, i64::try_from(offset)) else {
            return 0;
        };
        let count = to.count as i32;
        // SAFETY: the kernel writes to guest memory, which is mapped for as long as `to` borrows it, and where no reference of
        // ours points: others change it at any time.
        let read = unsafe { libc::preadv(file.as_raw_fd(), to.places.as_ptr(), count, offset) };
        usize::try_from(read).unwrap_or(0)
    }

    /// The same for a write.
    pub fn write(self, file: &File, offset: u64, from: &Pieces<'_>) -> usize {
        let (Ways::All, Ok(offset)) = (self, i64::try_from(offset)) else {
            return 0;
        };
        let count = from.count as i32;
        // SAFETY: as in `read`; the kernel only reads, and copes with memory that changes meanwhile.
        let written = unsafe { libc::pwritev(file.as_raw_fd(), from.places.as_ptr(), count, offset) };
        usize::try_from(written).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    const MEMORY_BYTES: u64 = 1 << 20;

    fn memory() -> GuestMemoryMmap {
        let half = MEMORY_BYTES as usize / 2;
        // Two regions without a gap: a piece may be in both.
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]).unwrap()
    }

    fn file(content: &[u8]) -> File {
        let mut file: File = memfd_create(c"disk", MFdFlags::empty()).unwrap().into();
        file.write_all(content).unwrap();
        file
    }

    fn content(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|at| (at / 7) as u8).collect()
    }

    fn segment(address: u64, bytes: u32) -> Segment {
        Segment { address, bytes }
    }

    #[test]
    fn bytes_go_to_each_piece_and_come_from_each() {
        let (memory, content) = (memory(), content(9000));
        let file = file(&content);
        assert_eq!(Ways::of(&file), Ways::All);
        let middle = MEMORY_BYTES / 2;
        let segments = [segment(64, 100), segment(middle - 50, 4096), segment(8192, 4096)];
        let pieces = Pieces::of(&memory, &segments, 60, 8000).unwrap();
        assert_eq!(Ways::All.read(&file, 10, &pieces), 8000);
        let read = |address, bytes| {
            let mut read = vec![0; bytes];
            memory.read_slice(&mut read, GuestAddress(address)).unwrap();
            read
        };
        assert_eq!(read(64, 60), [0; 60], "before the offset");
        assert_eq!(read(64 + 60, 40), content[10..50]);
        assert_eq!(read(middle - 50, 4096), content[50..50 + 4096]);
        let rest = 8000 - 40 - 4096;
        assert_eq!(read(8192, rest), content[4146..4146 + rest]);
        assert_eq!(read(8192 + rest as u64, 10), [0; 10], "behind the length");

        assert_eq!(Ways::All.write(&file, 1000, &pieces), 8000);
        let mut written = vec![0; 8000];
        file.read_exact_at(&mut written, 1000).unwrap();
        assert_eq!(written, content[10..8010]);
    }

    #[test]
    fn what_is_not_memory_is_a_fault_and_nothing_is_done() {
        let memory = memory();
        for bad in [
            segment(MEMORY_BYTES - 100, 200),
            segment(1 << 40, 512),
            segment(u64::MAX - 10, 512),
        ] {
            assert!(
                Pieces::of(&memory, &[segment(0, 100), bad], 0, 300).is_err(),
                "{bad:?}"
            );
            // Not needed, so not looked at.
            assert!(Pieces::of(&memory, &[segment(0, 100), bad], 0, 100).is_ok());
        }
        assert!(
            Pieces::of(&memory, &[segment(0, 100)], 0, 101).is_err(),
            "too short"
        );
    }

    #[test]
    fn too_many_pieces_are_done_in_part() {
        let (memory, content) = (memory(), content(4096));
        let file = file(&content);
        let segments: Vec<Segment> = (0..100).map(|n| segment(n * 32, 16)).collect();
        let pieces = Pieces::of(&memory, &segments, 0, 1600).unwrap();
        assert_eq!(Ways::All.read(&file, 0, &pieces), MOST_PIECES * 16);
        let mut last = [0; 16];
        memory.read_slice(&mut last, GuestAddress(63 * 32)).unwrap();
        assert_eq!(last, content[63 * 16..64 * 16]);
    }

    #[test]
    fn a_way_that_is_not_there_does_nothing() {
        let memory = memory();
        let file = file(&content(4096));
        let pieces = Pieces::of(&memory, &[segment(0, 512)], 0, 512).unwrap();
        assert_eq!(Ways::None.read(&file, 0, &pieces), 0);
        assert_eq!(Ways::None.write(&file, 0, &pieces), 0);
        assert_eq!(Ways::All.read(&file, 4096, &pieces), 0, "behind the end");
        assert_eq!(Ways::All.read(&file, u64::MAX, &pieces), 0);
        let device = File::open("/dev/zero").unwrap();
        assert_eq!(Ways::of(&device), Ways::None, "not memory, though its node is");
        let closed = File::open("/proc/self/maps").unwrap();
        assert_eq!(
            Ways::All.write(&closed, 0, &pieces),
            0,
            "an error is told elsewhere"
        );
    }
}
