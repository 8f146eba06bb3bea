//! virtio-balloon: memory that the guest does without, and that the host has back. [VIRTIO 1.2 §5.5]
//!
//! | question | file |
//! |---|---|
//! | what `--balloon` says | `config.rs` |
//! | what is known of it, and how its size is changed | `state.rs` |
//! | the queues | `queues.rs` |
//!
//! The driver is asked for a size by the configuration space, takes so many pages out of use and lists them in the inflate
//! queue; their memory goes back to the host, and when the driver takes them back it finds zeroes. Under memory pressure it
//! does so by itself (VIRTIO_BALLOON_F_DEFLATE_ON_OOM). With free-page reporting it also tells which pages are free anyway.
//!
//! Memory is given back under the queue's lease, like any touch: after a reset the guest may use the pages again, and none
//! of them is emptied then.

pub mod config;
pub mod queues;
pub mod state;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use config::BalloonConfig;
pub use state::{Balloon, BalloonSwitch};

use self::queues::{Deflate, Inflate, Other};
use super::complaints::Complaints;
use super::queue::Handler;
use super::registers::{Identity, Published, Written};
use slog::Logger;
use std::io;

const BALLOON_DEVICE: u32 = 5;
/// A page to this device, whatever the guest's. [VIRTIO 1.2 §5.5.6]
pub const PAGE_BYTES: u64 = 4096;

/// Features. [VIRTIO 1.2 §5.5.3]
pub const STATS: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The same.
pub const REPORTING: u64 = 1 << 5;

/// Where in `struct virtio_balloon_config` [VIRTIO 1.2 §5.5.4] num_pages and actual are.
const TARGET_OFFSET: usize = 0;
const ACTUAL_OFFSET: usize = 4;
const CONFIGURATION_BYTES: usize = 16;

/// A balloon with what it needs of the host.
pub struct OpenedBalloon {
    /// What it is to a driver.
    pub identity: Identity,
    /// One for each queue.
    pub handlers: Vec<Box<dyn Handler>>,
    /// What is known of it.
    pub balloon: Balloon,
}

/// Makes one.
///
/// # Errors
/// When the host gives no timer.
pub fn open(config: &BalloonConfig, log: &Logger) -> io::Result<OpenedBalloon> {
    let pages = u32::try_from(config.size_bytes / PAGE_BYTES).unwrap_or(u32::MAX);
    let (target, actual) = (Published::wide(TARGET_OFFSET, pages), Written::new(ACTUAL_OFFSET));
    let balloon = Balloon::new(pages, actual.clone());
    let complaints = || Complaints::new(log.clone());
    let mut handlers: Vec<Box<dyn Handler>> = vec![
        Box::new(Inflate::new(balloon.clone(), target.clone(), complaints())),
        Box::new(Deflate),
        Box::new(Other::new(false, balloon.clone(), config.stats, complaints())?),
    ];
    let mut features = DEFLATE_ON_OOM | REPORTING;
    if config.stats.is_some() {
        features |= STATS;
        handlers.push(Box::new(Other::new(true, balloon.clone(), None, complaints())?));
    }
    Ok(OpenedBalloon {
        identity: Identity {
            device_type: BALLOON_DEVICE,
            features,
            configuration: vec![0; CONFIGURATION_BYTES],
            published: Some(target),
            written: Some(actual),
            queues: handlers.len(),
        },
        handlers,
        balloon,
    })
}
