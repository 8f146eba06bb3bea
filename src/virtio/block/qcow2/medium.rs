//! The file of one layer of an image, as the qcow2 library wants it.
//!
//! It is the library's own access to files but for two things: what is to last is synchronized by fdatasync, and a place
//! behind the end of a qcow2 file is an error. The library, and the kernel's sparse files, would give zeroes, and a guest
//! would take what is left of a file that was cut short for the whole of it.

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, file};
use std::fmt;
use std::fs::File;
use std::io;

/// The file of a layer.
#[derive(Debug)]
pub struct Medium {
    inner: file::File,
    /// The same open file, so the same lock.
    file: File,
    /// Reads have to begin before the file's end, rounded up to this; 1 for no such check.
    cluster_bytes: u64,
    #[cfg(test)]
    pub(super) fault: Option<std::sync::Arc<super::tests::Fault>>,
}

impl Medium {
    /// Around a file that was opened as it will be used. `cluster_bytes`: of a qcow2 image.
    ///
    /// # Errors
    /// The host's.
    pub fn new(file: File, cluster_bytes: Option<u64>) -> io::Result<Medium> {
        Ok(Medium {
            inner: file.try_clone()?.try_into()?,
            file,
            cluster_bytes: cluster_bytes.unwrap_or(1),
            #[cfg(test)]
            fault: None,
        })
    }

    #[cfg(test)]
    fn faulty(&self) -> io::Result<()> {
        self.fault.as_ref().map_or(Ok(()), |fault| fault.happens())
    }
}

impl fmt::Display for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Storage for Medium {
    fn mem_align(&self) -> usize {
        self.inner.mem_align()
    }

    fn req_align(&self) -> usize {
        self.inner.req_align()
    }

    fn zero_align(&self) -> usize {
        self.inner.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.inner.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }

    unsafe fn pure_readv(&self, bytes: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        if self.cluster_bytes > 1 && offset >= self.size()?.next_multiple_of(self.cluster_bytes) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the image names a place behind its end ({offset:#x}); `qemu-img check` tells more"),
            ));
        }
        // SAFETY: the caller has promised what `pure_readv` asks for, and alignments are the inner one's.
        unsafe { self.inner.pure_readv(bytes, offset) }
    }

    unsafe fn pure_writev(&self, bytes: IoVector<'_>, offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.faulty()?;
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.pure_writev(bytes, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.inner.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.inner.get_storage_helper()
    }

    fn resize(&self, new_size: u64, mode: imago::storage::PreallocateMode) -> io::Result<()> {
        self.inner.resize(new_size, mode)
    }
}
