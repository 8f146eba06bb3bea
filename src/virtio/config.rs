//! Which virtio devices a machine has: what the user says, and what is opened on the host for it before anything of the
//! machine is made.

use super::block::{self, Block, DiskConfig, Image, ImageError};
use super::queue::Handler;
use super::registers::Identity;
use super::rng::{self, Rng};
use super::{Notify, Transport};
use slog::Logger;
use std::io;
use std::sync::Arc;

/// The most virtio devices: each has an interrupt of its own.
pub const MAX_DEVICES: usize = crate::boot::layout::VIRTIO_GSIS.len();

/// The devices that the user wants.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VirtioConfig {
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// An entropy device.
    pub rng: bool,
    /// How drivers get at them.
    pub transport: Transport,
    /// How notifications travel.
    pub notify: Notify,
}

/// Devices that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// Too many.
    #[error("{wanted} virtio devices (--disk, --rng) are more than a machine can have ({MAX_DEVICES})")]
    TooMany {
        /// As asked for.
        wanted: usize,
    },
    /// A disk's image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The host's random source.
    #[error("--rng: the host's /dev/urandom cannot be opened")]
    Random(#[source] io::Error),
}

/// Names of disks, for `--placement` and the log.
const DISK_NAMES: [&str; MAX_DEVICES] = [
    "blk0", "blk1", "blk2", "blk3", "blk4", "blk5", "blk6", "blk7", "blk8", "blk9", "blk10", "blk11",
    "blk12", "blk13", "blk14", "blk15",
];
const RNG_NAME: &str = "rng0";

impl VirtioConfig {
    /// The names of the devices, in the order of their places.
    pub fn names(&self) -> Vec<&'static str> {
        let disks = DISK_NAMES.into_iter().take(self.disks.len());
        disks.chain(self.rng.then_some(RNG_NAME)).collect()
    }

    /// What contradicts itself.
    ///
    /// # Errors
    /// [`VirtioError::TooMany`].
    pub fn check(&self) -> Result<(), VirtioError> {
        let wanted = self.disks.len() + usize::from(self.rng);
        if wanted > MAX_DEVICES {
            return Err(VirtioError::TooMany { wanted });
        }
        Ok(())
    }

    /// Opens what the devices need of the host.
    ///
    /// # Errors
    /// [`VirtioError`]; what was opened is closed again.
    pub fn open(&self, log: &Logger) -> Result<Vec<Opened>, VirtioError> {
        self.check()?;
        let mut opened = Vec::with_capacity(self.disks.len() + 1);
        for (name, disk) in DISK_NAMES.into_iter().zip(&self.disks) {
            let image = Arc::new(Image::open(disk)?);
            let handlers = (0..disk.queues)
                .map(|_| Box::new(Block::new(image.clone(), &disk.serial, log.clone())) as Box<dyn Handler>);
            opened.push(Opened {
                name,
                identity: block::identity(&image, disk.queues),
                handlers: handlers.collect(),
            });
        }
        if self.rng {
            opened.push(Opened {
                name: RNG_NAME,
                identity: rng::identity(),
                handlers: vec![Box::new(Rng::open().map_err(VirtioError::Random)?)],
            });
        }
        Ok(opened)
    }
}

/// A device with what it needs of the host.
pub struct Opened {
    /// For `--placement` and the log.
    pub name: &'static str,
    /// What it is to a driver.
    pub identity: Identity,
    /// One for each of its queues.
    pub handlers: Vec<Box<dyn Handler>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_devices_are_refused_before_any_is_opened() {
        let disk: DiskConfig = "path=/no/such".parse().unwrap();
        let config = VirtioConfig {
            disks: vec![disk; MAX_DEVICES],
            rng: true,
            ..VirtioConfig::default()
        };
        let log = Logger::root(slog::Discard, slog::o!());
        let error = config.open(&log).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("17 virtio devices (--disk, --rng)"), "{error}");
        assert_eq!(config.names().len(), MAX_DEVICES + 1);
    }
}
