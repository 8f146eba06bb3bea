//! virtio-vsock, the socket device: connections between the guest's programs and the host's, without a network.
//! [VIRTIO 1.2 §5.10]
//!
//! ```text
//!  guest memory ◀──▶ transmit queue's actor ──packets──▶ receive queue's actor ◀──▶ Unix sockets of the host
//!               ◀────────────────────────────────────── (owns all connections)
//! ```
//!
//! | question | file |
//! |---|---|
//! | what `--vsock` says | `config.rs` |
//! | the header of a packet | `packet.rs` |
//! | one connection: credit, half-closes | `connection.rs` (pure) |
//! | all connections, and the host's sockets | `switchboard.rs`, `sockets.rs` |
//! | what a client of the host says first | `handshake.rs` (pure) |
//! | the queues | `queues.rs` |
//!
//! On the host a connection is a Unix socket, in Firecracker's convention: the guest's connection to port P of the host
//! goes to the socket at `PATH_P`, which somebody listens at; who connects to `PATH` and says `CONNECT P\n` gets port P of
//! the guest, and reads `OK N\n` when the guest has agreed, or the end when it has not. Nothing of vhost: the kernel's own
//! device would be one more that touches guest memory and cannot be told to stop.

pub mod config;
pub mod connection;
pub mod handshake;
pub mod packet;
pub mod queues;
mod sockets;
pub mod switchboard;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use config::VsockConfig;

use self::queues::{Between, Events, Receive, Transmit, WAITING_PACKETS};
use self::switchboard::Switchboard;
use super::complaints::Complaints;
use super::queue::Handler;
use super::registers::Identity;
use crate::host::socket::{OwnedSocket, SocketError};
use slog::Logger;

const SOCKET_DEVICE: u32 = 19;
/// Stream sockets are served. [VIRTIO 1.2 §5.10.3]
const VIRTIO_VSOCK_F_STREAM: u64 = 1 << 0;
/// Clients that wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket device that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Its socket on the host.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No descriptors.
    #[error("--vsock: the host gives no descriptors for it")]
    Host(#[source] std::io::Error),
}

impl VsockError {
    /// Whether the user can mend it with other input, as opposed to another host.
    pub fn is_bad_input(&self) -> bool {
        match self {
            VsockError::Socket(error) => error.is_bad_input(),
            VsockError::Host(_) => false,
        }
    }
}

/// A socket device with what it needs of the host.
pub struct OpenedVsock {
    /// What it is to a driver.
    pub identity: Identity,
    /// One for each queue.
    pub handlers: Vec<Box<dyn Handler>>,
}

/// Makes the host's socket.
///
/// # Errors
/// [`VsockError`]; nothing is left then.
pub fn open(name: &'static str, config: &VsockConfig, log: &Logger) -> Result<OpenedVsock, VsockError> {
    let socket = OwnedSocket::bind("--vsock uds=", &config.path, BACKLOG)?;
    let between = Between::new(WAITING_PACKETS).map_err(VsockError::Host)?;
    let complaints = Complaints::new(log.clone());
    let switchboard = Switchboard::new(name, config.cid, socket, between.arrived.clone(), complaints);
    let receive = Receive::new(switchboard.map_err(VsockError::Host)?, &between);
    Ok(OpenedVsock {
        identity: Identity {
            device_type: SOCKET_DEVICE,
            features: VIRTIO_VSOCK_F_STREAM,
            configuration: u64::from(config.cid).to_le_bytes().to_vec(),
            published: None,
            written: None,
            queues: 3,
        },
        handlers: vec![
            Box::new(receive),
            Box::new(Transmit::new(&between)),
            Box::new(Events),
        ],
    })
}
