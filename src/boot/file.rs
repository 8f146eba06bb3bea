//! A kernel or initrd file: opened with care, read by position, never held in memory as a whole.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// What is wrong with a file before its content matters, or when it ends too early.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Nothing there.
    #[error("there is no such file")]
    NotFound,
    /// Not readable.
    #[error("permission denied; the user who runs the machine must be able to read it")]
    Permission,
    /// A directory.
    #[error("it is a directory, not a file")]
    Directory,
    /// A pipe, device or socket.
    #[error("it is not a regular file; copy it to one first")]
    NotRegular,
    /// No content.
    #[error("it is an empty file")]
    Empty,
    /// Ends before it should.
    #[error(
        "it is cut short: by its own header it goes up to byte {reaches}, but it ends at byte {length} \
         ({missing} bytes are missing); get it again",
        missing = .reaches.saturating_sub(*.length)
    )]
    CutShort {
        /// Where it should end at the earliest.
        reaches: u64,
        /// Where it ends.
        length: u64,
    },
    /// Anything else.
    #[error("cannot read it")]
    Io(#[source] io::Error),
}

impl From<io::Error> for FileError {
    fn from(error: io::Error) -> FileError {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => FileError::NotFound,
            io::ErrorKind::PermissionDenied => FileError::Permission,
            io::ErrorKind::IsADirectory => FileError::Directory,
            _ => FileError::Io(error),
        }
    }
}

/// A regular, non-empty file.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    length: u64,
}

impl ImageFile {
    /// Opens the file at `path`. Does not wait when it is a pipe.
    pub fn open(path: &Path) -> Result<ImageFile, FileError> {
        use std::os::unix::fs::OpenOptionsExt;
        ImageFile::new(
            File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(path)?,
        )
    }

    /// Takes an open file.
    pub fn new(file: File) -> Result<ImageFile, FileError> {
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(FileError::Directory);
        }
        if !metadata.is_file() {
            return Err(FileError::NotRegular);
        }
        match metadata.len() {
            0 => Err(FileError::Empty),
            length => Ok(ImageFile { file, length }),
        }
    }

    /// Its length when it was opened.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Fills `buffer` from `offset`, as far as the file goes.
    pub fn read_up_to(&self, buffer: &mut [u8], offset: u64) -> Result<usize, FileError> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    /// Fills all of `buffer` from `offset`.
    pub fn read_exact(&self, buffer: &mut [u8], offset: u64) -> Result<(), FileError> {
        let done = self.read_up_to(buffer, offset)?;
        if done < buffer.len() {
            let reaches = offset.saturating_add(buffer.len() as u64);
            return Err(FileError::CutShort {
                reaches,
                length: offset + done as u64,
            });
        }
        Ok(())
    }

    /// An error if the file ends before `end`.
    pub fn require(&self, end: u64) -> Result<(), FileError> {
        if end > self.length {
            return Err(FileError::CutShort {
                reaches: end,
                length: self.length,
            });
        }
        Ok(())
    }

    /// Reads `length` bytes at `offset` straight into guest memory, which the caller knows to have room.
    pub fn read_to_guest<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        address: GuestAddress,
        offset: u64,
        length: u64,
    ) -> Result<(), FileError> {
        let end = offset.saturating_add(length);
        self.require(end)?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))?;
        memory
            .read_exact_volatile_from(address, &mut file, length as usize)
            .map_err(|error| FileError::Io(io::Error::other(error)))
    }

    /// A reader of the bytes in `range`.
    pub fn section(&self, range: Range<u64>) -> Section<'_> {
        Section { image: self, range }
    }
}

/// Reads one part of a file from its start to its end.
#[derive(Debug)]
pub struct Section<'a> {
    image: &'a ImageFile,
    range: Range<u64>,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.range.end.saturating_sub(self.range.start);
        let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.image.file.read_at(&mut buffer[..wanted], self.range.start)?;
        self.range.start += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;

    /// A file with this content that no directory knows.
    pub(crate) fn file_of(content: &[u8]) -> File {
        let descriptor =
            nix::sys::memfd::memfd_create(c"test-image", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        let mut file = File::from(descriptor);
        file.write_all(content).unwrap();
        file
    }

    pub(crate) fn image_of(content: &[u8]) -> ImageFile {
        ImageFile::new(file_of(content)).unwrap()
    }

    #[test]
    fn what_is_no_file_is_named() {
        let error = |path: &str| ImageFile::open(Path::new(path)).unwrap_err();
        assert!(matches!(error("/nonexistent/vmlinuz"), FileError::NotFound));
        assert!(matches!(error("/etc/hostname/vmlinuz"), FileError::NotFound));
        assert!(matches!(error("/"), FileError::Directory));
        assert!(matches!(error("/dev/null"), FileError::NotRegular));
        assert!(matches!(ImageFile::new(file_of(b"")), Err(FileError::Empty)));
        let denied: FileError = io::Error::from_raw_os_error(libc::EACCES).into();
        assert!(matches!(denied, FileError::Permission));
    }

    #[test]
    fn a_pipe_does_not_make_it_wait() {
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        assert!(matches!(
            ImageFile::new(File::from(reader)),
            Err(FileError::NotRegular)
        ));
    }

    #[test]
    fn reading_past_the_end_says_how_much_is_missing() {
        let image = image_of(&[1; 100]);
        let mut buffer = [0; 16];
        let error = image.read_exact(&mut buffer, 90).unwrap_err();
        assert!(matches!(
            error,
            FileError::CutShort {
                reaches: 106,
                length: 100
            }
        ));
        assert!(error.to_string().contains("(6 bytes are missing)"), "{error}");
        assert_eq!(image.read_up_to(&mut buffer, 90).unwrap(), 10);
        let mut section = Vec::new();
        image.section(95..99).read_to_end(&mut section).unwrap();
        assert_eq!(section, [1; 4]);
    }
}
