//! Ports: `/dev/virtio-ports/NAME` in the guest, a Unix socket or a file on the host. [VIRTIO 1.2 §5.3]
//!
//! | question | file |
//! |---|---|
//! | what `--port` says | `config.rs` |
//! | what device and driver tell each other | `talk.rs` (pure) |
//! | what the queues' actors tell each other | `line.rs` |
//! | the control queues | `control.rs` |
//! | the host to the guest, and who is connected | `inlet.rs` |
//! | the guest to the host | `outlet.rs` |
//!
//! A queue is an actor with a thread, as of all devices, so whoever does not read stops his own port's direction alone. Port 0
//! is what a driver without VIRTIO_CONSOLE_F_MULTIPORT takes for its console. It leads nowhere, and is not announced.

pub mod config;
pub mod control;
pub mod inlet;
pub mod line;
pub mod outlet;
pub mod talk;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use config::{PortConfig, PortHost};

use self::control::{Hear, Tell};
use self::inlet::Inlet;
use self::line::Exchange;
use self::outlet::Outlet;
use super::{CONFIGURATION_BYTES, CONSOLE_DEVICE};
use crate::host::socket::{OwnedSocket, SocketError};
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::{Handler, Interruption, Request};
use crate::virtio::registers::Identity;
use slog::Logger;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// There are control queues and more ports than one. [VIRTIO 1.2 §5.3.3]
const VIRTIO_CONSOLE_F_MULTIPORT: u64 = 1 << 1;
/// Where in the configuration the number of ports is.
const MAX_NR_PORTS_OFFSET: usize = 4;
/// The most ports: each has two queues, with a thread each.
pub const MAX_PORTS: usize = 15;
/// Programs of the host that wait to be accepted.
const BACKLOG: i32 = 16;

/// Ports that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Too many.
    #[error("{0} times --port is more than a machine can have ({MAX_PORTS})")]
    TooMany(usize),
    /// Two of one name.
    #[error("--port name={0}: two ports cannot share a name")]
    SameName(String),
    /// Its socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Its file.
    #[error("--port file={}: it cannot be opened for writing; check the directory and its permissions (and a FIFO needs its reader first)", .path.display())]
    File {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No descriptors.
    #[error("--port: the host gives no descriptors for it")]
    Host(#[from] io::Error),
}

impl PortError {
    /// Whether the user can mend it with other input, as opposed to another host.
    pub fn is_bad_input(&self) -> bool {
        match self {
            PortError::TooMany(_) | PortError::SameName(_) | PortError::File { .. } => true,
            PortError::Socket(error) => error.is_bad_input(),
            PortError::Host(_) => false,
        }
    }
}

/// What contradicts itself.
///
/// # Errors
/// [`PortError::TooMany`], [`PortError::SameName`].
pub fn check(ports: &[PortConfig]) -> Result<(), PortError> {
    if ports.len() > MAX_PORTS {
        return Err(PortError::TooMany(ports.len()));
    }
    for (number, port) in ports.iter().enumerate() {
        if ports[..number].iter().any(|other| other.name == port.name) {
            return Err(PortError::SameName(port.name.clone()));
        }
    }
    Ok(())
}

/// A device with ports, before it is connected with anything.
pub struct OpenedPorts {
    /// What it is to a driver.
    pub identity: Identity,
    /// One for each queue.
    pub handlers: Vec<Box<dyn Handler>>,
    /// Files that are to be emptied when the machine starts.
    pub files: Vec<File>,
}

/// Makes the sockets and opens the files.
///
/// # Errors
/// [`PortError`]; no socket is left then.
pub fn open(ports: &[PortConfig], log: &Logger) -> Result<OpenedPorts, PortError> {
    check(ports)?;
    let exchange = Exchange::new(ports.len())?;
    let names = ports.iter().map(|port| port.name.clone()).collect();
    // In the order of the queues. [VIRTIO 1.2 §5.3.2]
    let mut handlers: Vec<Box<dyn Handler>> = vec![
        Box::new(Silent),
        Box::new(Sink),
        Box::new(Tell::new(names, exchange.clone())),
        Box::new(Hear::new(exchange.clone(), Complaints::new(log.clone()))),
    ];
    let mut files = Vec::new();
    for (place, port) in ports.iter().enumerate() {
        match &port.host {
            PortHost::Socket(path) => {
                let socket = OwnedSocket::bind("--port uds=", path, BACKLOG)?;
                let (outlet, hand) = Outlet::socket(log)?;
                handlers.push(Box::new(Inlet::new(place, exchange.clone(), socket, hand)?));
                handlers.push(Box::new(outlet));
            }
            PortHost::File(path) => {
                let file = open_file(path)?;
                files.push(file.try_clone()?);
                exchange.host_changed(place);
                handlers.push(Box::new(Silent));
                handlers.push(Box::new(Outlet::file(file, path, log)));
            }
        }
    }
    let mut configuration = vec![0; CONFIGURATION_BYTES];
    configuration[MAX_NR_PORTS_OFFSET] = ports.len() as u8 + 1;
    Ok(OpenedPorts {
        identity: Identity {
            device_type: CONSOLE_DEVICE,
            features: VIRTIO_CONSOLE_F_MULTIPORT,
            configuration,
            queues: handlers.len(),
            ..Identity::default()
        },
        handlers,
        files,
    })
}

fn open_file(path: &Path) -> Result<File, PortError> {
    let mut options = OpenOptions::new();
    // Not emptied before the machine starts. A FIFO must not make it wait, neither here nor when it is full.
    options.write(true).create(true).truncate(false);
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).map_err(|source| PortError::File {
        path: path.into(),
        source,
    })
}

/// Serves a receive queue to which nothing comes.
struct Silent;

impl Handler for Silent {
    fn prepare(&mut self) -> bool {
        false
    }

    fn serve(&mut self, _request: &mut Request<'_>) -> Result<u32, Interruption> {
        Err(Interruption::Untaken)
    }
}

/// Serves a transmit queue that leads nowhere.
struct Sink;

impl Handler for Sink {
    fn serve(&mut self, _request: &mut Request<'_>) -> Result<u32, Interruption> {
        Ok(0)
    }
}
