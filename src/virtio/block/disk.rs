//! A disk as one of its queues has it: a raw image, which all its queues share, or a qcow2 image, which its one queue owns.

use super::config::{DiskConfig, Format};
use super::image::{Image, ImageError};
use super::qcow2::Qcow2;
use crate::virtio::straight::Ways;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// What is allocated and given back at once in a file, bytes: the pages of the host's cache.
const PAGE_BYTES: u64 = 4096;

/// A queue's way to the image.
pub enum Disk {
    /// Nothing of it changes but the file.
    Raw(Arc<Image>),
    /// With tables in memory.
    Qcow2(Box<Qcow2>),
}

impl Disk {
    /// Opens what the configuration says, once for each queue.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open(config: &DiskConfig) -> Result<Vec<Disk>, ImageError> {
        if config.format == Some(Format::Qcow2) {
            return Ok(vec![Disk::Qcow2(Box::new(Qcow2::open(config)?))]);
        }
        let image = Arc::new(Image::open(config)?);
        Ok((0..config.queues).map(|_| Disk::Raw(image.clone())).collect())
    }

    /// Capacity in sectors of [`super::SECTOR_BYTES`].
    pub fn sectors(&self) -> u64 {
        match self {
            Disk::Raw(image) => image.sectors(),
            Disk::Qcow2(image) => image.sectors(),
        }
    }

    /// Bytes of a cluster, if the format has them.
    pub fn cluster_bytes(&self) -> Option<u64> {
        match self {
            Disk::Raw(_) => None,
            Disk::Qcow2(image) => Some(image.cluster_bytes()),
        }
    }

    /// What is allocated and given back at once, bytes.
    pub fn allocation_bytes(&self) -> u64 {
        self.cluster_bytes().unwrap_or(PAGE_BYTES)
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        match self {
            Disk::Raw(image) => image.is_read_only(),
            Disk::Qcow2(image) => image.is_read_only(),
        }
    }

    /// For the log.
    pub fn path(&self) -> &Path {
        match self {
            Disk::Raw(image) => image.path(),
            Disk::Qcow2(image) => image.path(),
        }
    }

    /// The image, if there is any point in asking it for what need not wait.
    pub fn at_once(&self) -> Option<&Image> {
        match self {
            Disk::Raw(image) if image.ways() == Ways::All => Some(image),
            _ => None,
        }
    }

    /// Reads all of `bytes` from `offset`.
    ///
    /// # Errors
    /// The host's, or the image's.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Disk::Raw(image) => image.read(offset, bytes),
            Disk::Qcow2(image) => image.read(offset, bytes),
        }
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The host's, or the image's.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Disk::Raw(image) => image.write(offset, bytes),
            Disk::Qcow2(image) => image.write(offset, bytes),
        }
    }

    /// All that was written is on the host's disk.
    ///
    /// # Errors
    /// The host's, or the image's; once something was lost, always.
    pub fn flush(&mut self) -> io::Result<()> {
        match self {
            Disk::Raw(image) => image.flush(),
            Disk::Qcow2(image) => image.flush(),
        }
    }

    /// All that was written is in the file, though it may not be on the host's disk yet.
    ///
    /// # Errors
    /// The host's, or the image's.
    pub fn write_back(&mut self) -> io::Result<()> {
        match self {
            Disk::Raw(_) => Ok(()),
            Disk::Qcow2(image) => image.write_back(),
        }
    }

    /// The content of the range does not matter any more.
    ///
    /// # Errors
    /// The host's, or the image's.
    pub fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        match self {
            Disk::Raw(image) => image.discard(offset, bytes),
            Disk::Qcow2(image) => image.discard(offset, bytes),
        }
    }

    /// The range reads as zeroes. `unmap`: the space may be given back.
    ///
    /// # Errors
    /// The host's, or the image's.
    pub fn write_zeroes(&mut self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        match self {
            Disk::Raw(image) => image.write_zeroes(offset, bytes, unmap),
            Disk::Qcow2(image) => image.write_zeroes(offset, bytes, unmap),
        }
    }
}
