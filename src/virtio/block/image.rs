//! A disk's raw image: a file or a block device, opened once, locked, and shared by the disk's queues.
//!
//! The lock is on the open file description [fcntl_locking(2)]: exclusive for a disk that can be written, shared for one
//! that cannot, so two machines can read one image and never share one that either writes. It goes with the last
//! descriptor, whatever becomes of the program. QEMU says what it does with a file by shared locks on single bytes. So a disk
//! that is written here is refused while QEMU has the file, and QEMU refuses it while it is written here; but what QEMU writes
//! can be *read* here, which is not noticed, and QEMU does not open what is only read here.
//!
//! What begins as a qcow2 image does is used as a raw one only if the user says so, and as a qcow2 image only if the user
//! says that. Whoever guesses lets a guest decide: it can write such a header to its raw disk, and name any file of the
//! host as its backing file, which would be read for it at the next start.

use super::SECTOR_BYTES;
use super::config::{DiskConfig, Format};
use super::qcow2::header::{Flaw, MAGIC};
use crate::virtio::straight::{Pieces, Ways};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// What is given back to the host, or made zeroes by it, in one call. The kernel holds the file's lock meanwhile, and another
/// queue's transfer in a touch may wait for it ([`crate::virtio::straight`]).
const PIECE_BYTES: u64 = 4 << 20;

/// Why an image cannot be a disk.
#[derive(Debug)]
pub struct ImageError {
    /// The image, as given.
    pub disk: PathBuf,
    /// The file that is to blame, if it is one behind the image.
    pub backing: Option<PathBuf>,
    /// Why.
    pub problem: Problem,
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--disk path={}: ", self.disk.display())?;
        if let Some(backing) = &self.backing {
            write!(f, "behind it, {}: ", backing.display())?;
        }
        write!(f, "{}", self.problem)
    }
}

impl std::error::Error for ImageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.problem.source()
    }
}

/// What is the matter with a file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// It cannot be opened.
    #[error("it cannot be opened for {}", if *.read_only { "reading" } else { "writing (with ro it need not be)" })]
    Open {
        /// As wanted.
        read_only: bool,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, …
    #[error("it is neither a regular file nor a block device")]
    Kind,
    /// Not whole sectors.
    #[error(
        "its {0} bytes are not a multiple of {SECTOR_BYTES}; `truncate -s %{SECTOR_BYTES}` makes it one (is it a raw image?)"
    )]
    Size(u64),
    /// Nothing in it.
    #[error("it is empty; `truncate -s 1G` makes an empty disk of it")]
    Empty,
    /// It begins like another format, and nobody has said that it is not.
    #[error(
        "it begins as a qcow2 image does; say format=qcow2 if it is one, format=raw if a guest has written that to its disk"
    )]
    LikeQcow2,
    /// Somebody else has it.
    #[error("another program uses it{}; end that one, or give the disk with ro to all", if *.read_only { " for writing" } else { "" })]
    Locked {
        /// As wanted.
        read_only: bool,
    },
    /// No locks there.
    #[error("its file system gives no lock, without which two machines could share the disk")]
    Lock(#[source] io::Error),
    /// Not a qcow2 image that can be used.
    #[error("{0}")]
    Qcow2(#[from] Flaw),
    /// Backing files without end.
    #[error("it is behind itself; `qemu-img rebase -u` gives the image another backing file")]
    Loop,
    /// The same without a loop.
    #[error(
        "more than {0} files are behind one another; `qemu-img convert` or `qemu-img commit` makes them fewer"
    )]
    TooDeep(usize),
    /// The host, or what the checks have not seen.
    #[error("it cannot be used as a qcow2 image; `qemu-img check` tells more")]
    Library(#[source] io::Error),
}

/// An image that was opened.
pub struct Image {
    file: File,
    path: PathBuf,
    sectors: u64,
    read_only: bool,
    /// What need not wait for the host's disk.
    ways: Ways,
    /// A flush has failed: see the module above.
    flush_failed: AtomicBool,
}

impl Image {
    /// Opens and locks what the configuration says.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open(config: &DiskConfig) -> Result<Image, ImageError> {
        Image::try_open(config).map_err(|problem| ImageError {
            disk: config.path.clone(),
            backing: None,
            problem,
        })
    }

    fn try_open(config: &DiskConfig) -> Result<Image, Problem> {
        let read_only = config.read_only;
        let file = open(&config.path, read_only)?;
        lock(&file, read_only)?;
        let bytes = size(&file).map_err(|source| Problem::Open { read_only, source })?;
        if bytes == 0 {
            return Err(Problem::Empty);
        }
        let mut magic = [0; 4];
        let like_qcow2 = file.read_exact_at(&mut magic, 0).is_ok() && magic == MAGIC;
        if like_qcow2 && config.format != Some(Format::Raw) {
            return Err(Problem::LikeQcow2);
        }
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Problem::Size(bytes));
        }
        Ok(Image {
            ways: Ways::of(&file),
            file,
            path: config.path.clone(),
            sectors: bytes / SECTOR_BYTES,
            read_only,
            flush_failed: AtomicBool::new(false),
        })
    }

    /// Around a file as it is.
    #[cfg(test)]
    pub(crate) fn for_test(file: File, sectors: u64, ways: Ways) -> Image {
        Image {
            ways,
            file,
            path: "test".into(),
            sectors,
            read_only: false,
            flush_failed: AtomicBool::new(false),
        }
    }

    /// Capacity in sectors of [`SECTOR_BYTES`].
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// For the log.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Which transfers of it need not wait for the host's disk.
    pub fn ways(&self) -> Ways {
        self.ways
    }

    /// Reads what can be had without a wait from `offset`. Returns bytes; see [`Ways::read`].
    pub fn read_now(&self, offset: u64, to: &Pieces<'_>) -> usize {
        self.ways.read(&self.file, offset, to)
    }

    /// Writes what can be written without a wait at `offset`. Returns bytes; see [`Ways::write`].
    pub fn write_now(&self, offset: u64, from: &Pieces<'_>) -> usize {
        self.ways.write(&self.file, offset, from)
    }

    /// Reads all of `bytes` from `offset`.
    ///
    /// # Errors
    /// The host's.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// All that was written is on the host's disk.
    ///
    /// # Errors
    /// The host's; once there was one, always.
    pub fn flush(&self) -> io::Result<()> {
        // SeqCst costs nothing beside the system call; two queues may flush at once.
        if self.flush_failed.load(Ordering::SeqCst) {
            return Err(io::Error::other(
                "an earlier flush failed, what was lost is not known",
            ));
        }
        let result = self.file.sync_data();
        if result.is_err() {
            self.flush_failed.store(true, Ordering::SeqCst);
        }
        result
    }

    /// The content of the range does not matter any more.
    ///
    /// # Errors
    /// The host's. That it does not know how is none.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.allocate(punch, offset, bytes) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => Ok(()),
            result => Ok(result?),
        }
    }

    /// The range reads as zeroes. `unmap`: the host may give the space back.
    ///
    /// # Errors
    /// The host's.
    pub fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep;
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | keep;
        if unmap && self.allocate(punch, offset, bytes).is_ok() || self.allocate(zero, offset, bytes).is_ok()
        {
            return Ok(());
        }
        super::in_pieces_of_zeroes(offset, bytes, |offset, zeroes| self.write(offset, zeroes))
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, bytes: u64) -> Result<(), Errno> {
        let signed = |value: u64| i64::try_from(value).map_err(|_| Errno::EFBIG);
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(PIECE_BYTES);
            match fallocate(&self.file, how, signed(offset + done)?, signed(part)?) {
                Err(Errno::EINTR) => {}
                result => {
                    result?;
                    done += part;
                }
            }
        }
        Ok(())
    }
}

/// Opens a file that may be an image.
pub(super) fn open(path: &Path, read_only: bool) -> Result<File, Problem> {
    let cannot = |source| Problem::Open { read_only, source };
    // A pipe must not hold us up; on files and block devices the flag means nothing.
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(cannot)?;
    let kind = file.metadata().map_err(cannot)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Problem::Kind);
    }
    Ok(file)
}

/// How large a file or a block device is, whose metadata do not have that.
pub(super) fn size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Takes a lock on all of the file, now or not at all: to write it, or against who writes it.
pub(super) fn lock(file: &File, read_only: bool) -> Result<(), Problem> {
    let lock = libc::flock {
        l_type: if read_only { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // Has to be 0 for a lock on the description.
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(Problem::Locked { read_only }),
        Err(errno) => Err(Problem::Lock(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Scratch;
    use super::*;

    fn refused(config: &DiskConfig) -> String {
        Image::open(config).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_a_disk_says_why() {
        let missing = DiskConfig {
            path: "/no/such".into(),
            ..Scratch::new(b"").config(true)
        };
        assert!(refused(&missing).contains("--disk path=/no/such: it cannot be opened for reading"));
        assert!(refused(&Scratch::new(b"").config(false)).contains("it is empty"));
        assert!(refused(&Scratch::new(&[0; 700]).config(false)).contains("700 bytes are not a multiple"));
        let like = Scratch::new(&[b"QFI\xfb".as_slice(), &[0; 508]].concat());
        assert!(refused(&like.config(false)).contains("say format=qcow2"));
        let as_raw = DiskConfig {
            format: Some(Format::Raw),
            ..like.config(false)
        };
        assert_eq!(Image::open(&as_raw).unwrap().sectors(), 1);
        for path in ["/", "/dev/null"] {
            let config = DiskConfig {
                path: path.into(),
                ..missing.clone()
            };
            assert!(
                refused(&config).contains("neither a regular file nor a block device"),
                "{path}"
            );
        }
    }

    #[test]
    fn a_writer_is_alone_and_readers_are_not() {
        let file = Scratch::new(&[0; 1024]);
        let writer = Image::open(&file.config(false)).unwrap();
        assert!(refused(&file.config(false)).contains("another program uses it;"));
        assert!(refused(&file.config(true)).contains("another program uses it for writing"));
        drop(writer);
        let readers = [true, true].map(|ro| Image::open(&file.config(ro)).unwrap());
        assert!(refused(&file.config(false)).contains("another program uses it"));
        drop(readers);
        Image::open(&file.config(false)).unwrap();
    }

    #[test]
    fn zeroes_are_zeroes_by_any_way_and_a_discard_harms_nothing_else() {
        let file = Scratch::new(&[7; 8192]);
        let image = Image::open(&file.config(false)).unwrap();
        image.write_zeroes(512, 1024, false).unwrap();
        image.write_zeroes(4096, 512, true).unwrap();
        image.discard(8192 - 512, 512).unwrap();
        image.flush().unwrap();
        let content = std::fs::read(&file.0).unwrap();
        assert_eq!(content.len(), 8192);
        for (at, byte) in content.iter().enumerate().take(8192 - 512) {
            let zero = (512..1536).contains(&at) || (4096..4608).contains(&at);
            assert_eq!(*byte, if zero { 0 } else { 7 }, "{at}");
        }
    }
}
