//! qcow2 images, with what is behind them, by the crate imago.
//!
//! | question | file |
//! |---|---|
//! | what is refused before anything is served | `header.rs` |
//! | a layer's file, as imago wants it | `medium.rs` |
//!
//! An image's tables are in memory and belong to the one queue of its disk, whose actor works on them on its own thread:
//! nobody else waits for them. They are written back at a flush, before the fdatasync, and when the driver resets the
//! device or the machine ends. So what a guest has written and not flushed is lost if this program is killed, as with a
//! disk that loses power; with a raw image the host's page cache would still have it.
//!
//! imago writes counts of references before the tables that refer, and takes references away before counts, but does not
//! wait for the host's disk in between: a *host* that loses power in the middle of a flush can leave counts that are too
//! low. `qemu-img check -r all` mends that. Counts of all tables are checked at the start, those of the data are not: there
//! are too many.
//!
//! Every image in the chain is opened here: only those that the headers name as plain files with a format, each once, all but the
//! first for reading, with a lock against whoever would write. imago is not allowed to open anything.
//!
//! What a hostile guest can try: only requests, which have been checked against the disk's size before. What a hostile
//! *image* can try: it is read with the user's rights, and so are the files that it names. What is damaged in a way that
//! is seen at the start is refused; what is seen later is an I/O error to the guest and a line in the log. A panic of the
//! library ends the image, not the disk: nothing more is written to it, and each request is an I/O error.

pub mod header;
mod medium;
#[cfg(test)]
mod tests;

use super::SECTOR_BYTES;
use super::config::DiskConfig;
use super::image::{self, ImageError, Problem};
use header::{BackingFormat, Header, MOST_HEADER_BYTES, TableError};
use imago::qcow2::Qcow2 as Layer;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use medium::Medium;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// The most files behind an image, one behind the other: each has a descriptor, and tables in memory.
pub const MAX_BACKING_FILES: usize = 16;

/// An image that was opened.
pub struct Qcow2 {
    /// `None`: the library has failed.
    image: Option<FormatAccess<Medium>>,
    path: PathBuf,
    size: u64,
    cluster_bytes: u64,
    read_only: bool,
    /// A flush has failed: see [`super`].
    flush_failed: bool,
}

/// A file of the chain.
struct Opened {
    medium: Medium,
    /// `None`: raw.
    header: Option<Header>,
    path: PathBuf,
}

impl Qcow2 {
    /// Opens, locks and checks an image and what is behind it.
    ///
    /// # Errors
    /// [`ImageError`], which names the file that is to blame.
    pub fn open(config: &DiskConfig) -> Result<Qcow2, ImageError> {
        let blame = |path: &Path, problem| ImageError {
            disk: config.path.clone(),
            backing: (*path != config.path).then(|| path.to_owned()),
            problem,
        };
        let mut files: Vec<Opened> = Vec::new();
        let mut seen = Vec::new();
        let mut next = Some((config.path.clone(), BackingFormat::Qcow2));
        while let Some((path, format)) = next.take() {
            let read_only = config.read_only || !files.is_empty();
            let opened = if files.len() > MAX_BACKING_FILES {
                Err(Problem::TooDeep(MAX_BACKING_FILES))
            } else {
                open_file(&path, format, read_only, &mut seen)
            };
            let opened = opened.map_err(|problem| blame(&path, problem))?;
            if let Some(backing) = opened.header.as_ref().and_then(|header| header.backing.as_ref()) {
                let directory = path.parent().unwrap_or(Path::new(""));
                next = Some((directory.join(&backing.name), backing.format));
            }
            files.push(opened);
        }
        let (size, cluster_bits) = files[0]
            .header
            .as_ref()
            .map_or((0, 0), |top| (top.size, top.cluster_bits));
        // From the last to the first.
        let mut behind = None;
        while let Some(Opened { medium, header, path }) = files.pop() {
            let written = files.is_empty() && !config.read_only;
            let layer = contained(|| layer(medium, header.is_some(), written, behind.take()));
            behind = Some(layer.map_err(|error| blame(&path, Problem::Library(error)))?);
        }
        Ok(Qcow2 {
            image: behind,
            path: config.path.clone(),
            size,
            cluster_bytes: 1 << cluster_bits,
            read_only: config.read_only,
            flush_failed: false,
        })
    }

    /// Capacity in sectors of [`SECTOR_BYTES`].
    pub fn sectors(&self) -> u64 {
        self.size / SECTOR_BYTES
    }

    /// What is allocated at once, bytes.
    pub fn cluster_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// For the log.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the library work. After a panic of it there is none any more.
    fn with<T>(&mut self, work: impl FnOnce(&mut FormatAccess<Medium>) -> io::Result<T>) -> io::Result<T> {
        let image = self.image.as_mut().ok_or_else(|| {
            io::Error::other("the qcow2 library has failed before, and the image is left as it was then")
        })?;
        // What it was working on is not used again: see below.
        match catch_unwind(AssertUnwindSafe(|| work(image))) {
            Ok(result) => result,
            Err(_) => {
                // Not dropped, which would write tables that may be wrong by now. The lock stays.
                std::mem::forget(self.image.take());
                Err(failed())
            }
        }
    }

    /// Reads all of `bytes` from `offset`.
    ///
    /// # Errors
    /// The host's, and what is found to be damaged.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.with(|image| image.read(bytes, offset))
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// As above.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.with(|image| image.write(bytes, offset))
    }

    /// All that was written is on the host's disk, and so are the tables.
    ///
    /// # Errors
    /// As above; once the host has lost something, always.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.flush_failed {
            return Err(io::Error::other(
                "an earlier flush failed, what was lost is not known",
            ));
        }
        // What could not be written is still here, and is tried again by the next.
        self.write_back()?;
        let result = self.with(|image| image.sync());
        self.flush_failed = result.is_err();
        result
    }

    /// Writes the tables to the file.
    ///
    /// # Errors
    /// As above.
    pub fn write_back(&mut self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.with(|image| image.flush())
    }

    /// The content of the range does not matter any more. Whole clusters of it are free for others in the image.
    ///
    /// # Errors
    /// As above.
    pub fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.with(|image| image.discard_to_any(offset, bytes)) {
            // Version 2 has no way to say that a cluster is zero whatever is behind it.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    /// The range reads as zeroes. `unmap`: clusters may be freed.
    ///
    /// # Errors
    /// As above.
    pub fn write_zeroes(&mut self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let result = match unmap {
            true => self.with(|image| image.discard_to_zero(offset, bytes)),
            false => self.with(|image| image.write_zeroes(offset, bytes)),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                super::in_pieces_of_zeroes(offset, bytes, |offset, zeroes| self.write(offset, zeroes))
            }
            result => result,
        }
    }
}

fn failed() -> io::Error {
    io::Error::other("the qcow2 library has failed, which is a bug; nothing more is written to the image")
}

/// Lets the library work on what is gone if it panics.
fn contained<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(failed()))
}

fn open_file(
    path: &Path,
    format: BackingFormat,
    read_only: bool,
    seen: &mut Vec<(u64, u64)>,
) -> Result<Opened, Problem> {
    let cannot = |source| Problem::Open { read_only, source };
    let file = image::open(path, read_only)?;
    let metadata = file.metadata().map_err(cannot)?;
    let identity = (metadata.dev(), metadata.ino());
    // Before the lock, which would be somebody else's.
    if seen.contains(&identity) {
        return Err(Problem::Loop);
    }
    seen.push(identity);
    image::lock(&file, read_only)?;
    let header = match format {
        BackingFormat::Raw => None,
        BackingFormat::Qcow2 => Some(checked_header(&file, read_only)?),
    };
    let cluster = header.as_ref().map(|header| 1 << header.cluster_bits);
    Ok(Opened {
        medium: Medium::new(file, cluster).map_err(cannot)?,
        header,
        path: path.to_owned(),
    })
}

fn checked_header(file: &File, read_only: bool) -> Result<Header, Problem> {
    let cannot = |source| Problem::Open { read_only, source };
    let file_bytes = image::size(file).map_err(cannot)?;
    let mut first = vec![0; file_bytes.min(MOST_HEADER_BYTES) as usize];
    file.read_exact_at(&mut first, 0).map_err(cannot)?;
    let header = header::parse(&first)?;
    let read = &mut |offset, bytes: &mut [u8]| file.read_exact_at(bytes, offset);
    match header.check_tables(file_bytes, !read_only, read) {
        Ok(()) => Ok(header),
        Err(TableError::Flaw(flaw)) => Err(flaw.into()),
        Err(TableError::Host(error)) => Err(cannot(error)),
    }
}

fn layer(
    medium: Medium,
    is_qcow2: bool,
    written: bool,
    behind: Option<FormatAccess<Medium>>,
) -> io::Result<FormatAccess<Medium>> {
    let gate = DenyImplicitOpenGate::default();
    if !is_qcow2 {
        return Ok(FormatAccess::new(Raw::builder(medium).write(written).open(gate)?));
    }
    let builder = Layer::<Medium>::builder(medium).write(written);
    let builder = builder.backing(behind).data_file(None);
    Ok(FormatAccess::new(builder.open(gate)?))
}
