//! virtio-fs: a directory of the host as a file system of the guest. [VIRTIO 1.2 §5.11] virtiofsd serves it, a program of its
//! own, by vhost-user.
//!
//! | question | file |
//! |---|---|
//! | what `--share` says | `config.rs` |
//! | how virtiofsd is started | `daemon.rs`, `../program.rs` |
//! | what it is told | `session.rs` |
//! | the queue by which it gets a request | `ring.rs` |
//! | the guest's queues | `queue.rs` |
//! | what of FUSE is known here | `fuse.rs` |
//!
//! ```text
//!  guest memory ──copy, under the lease──▶ memory of the device ◀──vhost-user──▶ virtiofsd ──▶ directory
//!  guest's queues       queue's actor       rings of the device
//! ```
//!
//! virtiofsd is given memory of the device's own, not the guest's. It cannot be told to stop at once (GET_VRING_BASE is
//! answered when it is), and a reset and a pause take effect at once here; so what it writes late must not be the guest's
//! memory. This is also all that a virtiofsd which has been broken into can reach of us, but for one thing: it shares the
//! eventfds of its queues, and can make our read or write of one block. Then that queue serves its guest no more, and the
//! machine's end names it.
//!
//! What a hostile guest can try: chains of any kind (`../chain.rs`), and any bytes as a FUSE request. A request that is not as
//! long as it says, or longer than virtiofsd takes, makes the device need a reset; all others reach virtiofsd, which is
//! locked into the directory, sees no memory of the guest, and with whose end the guest gets errors. Memory: 2 MiB a queue,
//! once they were used. One request of a queue is under way at a time, and one line is logged in all.

pub mod config;
mod daemon;
mod fuse;
mod queue;
mod ring;
mod session;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use config::ShareConfig;

use self::config::TAG_BYTES;
use self::queue::{Forward, Keeper};
use self::ring::{Ring, STRIPE_BYTES};
use self::session::{ANSWER_LIMIT, SessionError, establish};
use super::program::Program;
use super::queue::Handler;
use super::registers::Identity;
use crate::machine::memory::{self, Backing, MIN_BYTES, MemoryConfig, MemoryError};
use slog::Logger;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const FILE_SYSTEM_DEVICE: u32 = 26;
/// One for what does not wait behind others (FORGET, INTERRUPT), one for all else. [VIRTIO 1.2 §5.11.2] Linux uses no more
/// until version 6.12, and QEMU's virtiofsd has no more.
const QUEUES: usize = 2;

/// Why there is no shared folder. The tag says which.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// No directory.
    #[error("--share path={}: it is not a directory that can be shared", .path.display())]
    Directory {
        /// As given.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no virtiofsd.
    #[error(
        "--share tag={0}: it needs the program virtiofsd, which is not installed; `apt-get install virtiofsd` brings it (Debian 12: `apt-get install qemu-system-common`)"
    )]
    NotInstalled(String),
    /// It cannot be started.
    #[error("--share tag={0}: virtiofsd cannot be started")]
    Start(String, #[source] io::Error),
    /// It ended before it served anything.
    #[error("--share tag={0}: virtiofsd does not serve it: {1}")]
    Ended(String, String),
    /// It does not answer.
    #[error("--share tag={0}: virtiofsd does not serve it")]
    Session(String, #[source] SessionError),
    /// There is no memory to share with it.
    #[error("--share tag={0}: there is no memory to share with virtiofsd")]
    Memory(String, #[source] Box<MemoryError>),
}

impl ShareError {
    /// Whether the user can mend it with other input, as opposed to another host.
    pub fn is_bad_input(&self) -> bool {
        matches!(self, ShareError::Directory { .. })
    }
}

/// A shared folder with what it needs of the host.
pub struct OpenedShare {
    /// What it is to a driver.
    pub identity: Identity,
    /// One for each queue.
    pub handlers: Vec<Box<dyn Handler>>,
}

/// Starts virtiofsd for a folder. `name`: the device's, for the log.
///
/// # Errors
/// [`ShareError`]; what was started is ended.
pub fn open(name: &str, config: &ShareConfig, log: &Logger) -> Result<OpenedShare, ShareError> {
    let wrong = |source| ShareError::Directory {
        path: config.path.clone(),
        source,
    };
    // It looks whether it is a directory, and may be looked into.
    drop(std::fs::read_dir(&config.path).map_err(wrong)?);
    let config = &ShareConfig {
        path: std::fs::canonicalize(&config.path).map_err(wrong)?,
        ..config.clone()
    };
    let (program, socket) = daemon::start(config).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ShareError::NotInstalled(config.tag.clone()),
        _ => ShareError::Start(config.tag.clone(), error),
    })?;
    let keeper = Keeper {
        name: format!("{name} (tag {})", config.tag),
        program: Some(program),
        log: log.clone(),
    };
    Ok(OpenedShare {
        identity: identity(&config.tag),
        handlers: handlers(&config.tag, socket, keeper, ANSWER_LIMIT)?,
    })
}

/// The configuration space [VIRTIO 1.2 §5.11.4]: the tag, filled up with zeroes, and how many request queues there are.
fn identity(tag: &str) -> Identity {
    let mut configuration = tag.as_bytes().to_vec();
    configuration.resize(TAG_BYTES, 0);
    configuration.extend((QUEUES as u32 - 1).to_le_bytes());
    Identity {
        device_type: FILE_SYSTEM_DEVICE,
        features: 0,
        configuration,
        published: None,
        written: None,
        queues: QUEUES,
    }
}

/// The queues' handlers, once the program at the other end of the socket knows its own.
fn handlers(
    tag: &str,
    socket: UnixStream,
    mut keeper: Keeper,
    limit: Duration,
) -> Result<Vec<Box<dyn Handler>>, ShareError> {
    const { assert!(QUEUES as u64 * STRIPE_BYTES <= MIN_BYTES) };
    // As a guest's, in another size: sealed, so that nobody pulls it from under us, and taken page by page.
    let memory = memory::create(&MemoryConfig {
        size_bytes: MIN_BYTES,
        backing: Backing::Memfd,
    });
    let memory = memory.map_err(|error| ShareError::Memory(tag.into(), Box::new(error)))?;
    let rings: Vec<_> = (0..QUEUES)
        .map(|place| Ring::new(memory.clone(), place))
        .collect();
    let lines = establish(socket, &memory, &rings, limit).map_err(|error| {
        // One that has ended has said why.
        match keeper.program.as_mut().map(Program::why) {
            Some(why) if keeper.program.as_mut().is_some_and(Program::has_ended) => {
                ShareError::Ended(tag.into(), why)
            }
            _ => ShareError::Session(tag.into(), error),
        }
    })?;
    let mut keeper = Some(keeper);
    let ends = rings.into_iter().zip(lines).enumerate();
    let handler = |(number, (ring, line))| {
        // The queue for all but a few requests finds it soonest.
        let keeper = keeper.take_if(|_| number == QUEUES - 1);
        Box::new(Forward::new(ring, line, keeper)) as Box<dyn Handler>
    };
    Ok(ends.map(handler).collect())
}
