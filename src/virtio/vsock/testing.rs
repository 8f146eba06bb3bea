//! The host's side of a socket device for tests.

use super::connection::Ports;
use super::packet::{HOST_CID, Header, STREAM, op};
use super::queues::{Between, Receive, Transmit};
use super::switchboard::Switchboard;
use crate::host::socket::OwnedSocket;
use crate::virtio::complaints::Complaints;
use crate::virtio::testing::{LIMIT, kept_log};
use crossbeam_channel::Receiver;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

pub const CID: u32 = 7;

/// A directory for sockets.
pub struct Place(pub PathBuf);

impl Place {
    pub fn new() -> Place {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("actor-vmm-vsock-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Place(path)
    }

    pub fn socket(&self) -> PathBuf {
        self.0.join("v")
    }

    /// Somebody who listens at a port of the host.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.0.join(format!("v_{port}"))).unwrap()
    }

    /// Somebody who wants a port of the guest.
    pub fn client(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.socket()).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Of a connection.
pub const PORTS: Ports = Ports {
    guest: 1000,
    host: 52,
};

/// A switchboard at a socket there.
pub fn switchboard(place: &Place, between: &Between) -> (Switchboard, Receiver<String>) {
    let (log, lines) = kept_log();
    let socket = OwnedSocket::bind("--vsock uds=", &place.socket(), 16).unwrap();
    let board = Switchboard::new(
        "vsock0",
        CID,
        socket,
        between.arrived.clone(),
        Complaints::new(log),
    );
    (board.unwrap(), lines)
}

pub fn header(operation: u16, ports: Ports) -> Header {
    Header {
        source_cid: CID.into(),
        destination_cid: HOST_CID,
        source_port: ports.guest,
        destination_port: ports.host,
        kind: STREAM,
        operation,
        buffer_bytes: 1 << 20,
        ..Header::default()
    }
}

/// Handlers for [`crate::virtio::subjects`]. In each of a thousand lives the receive queue has something to say.
pub fn handlers() -> (Place, Receive, Transmit) {
    let place = Place::new();
    let between = Between::new(4000).unwrap();
    for life in 1..=1000 {
        for _ in 0..4 {
            between.put(life, header(op::RW, PORTS));
        }
    }
    let (board, _) = switchboard(&place, &between);
    let receive = Receive::new(board, &between);
    // Nobody takes what this one says, for which there is room.
    let transmit = Transmit::new(&Between::new(1 << 12).unwrap());
    (place, receive, transmit)
}
