//! A host's side for tests: packets that come and go through a pair of datagram sockets.

use super::{LINK_UP, Link, Pair, Received, Sent, Sink, Source};
use crate::virtio::registers::Published;
use slog::Logger;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

struct Datagrams(Arc<UnixDatagram>);

impl Source for Datagrams {
    fn receive(&mut self, packet: &mut [u8]) -> Received {
        match self.0.recv(packet) {
            // Not a packet, but the wish of a test.
            Ok(4) if packet.starts_with(b"lost") => Received::Lost("the test wants it".into()),
            Ok(bytes) => Received::Packet(bytes),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Received::Nothing,
            Err(error) => Received::Lost(error.to_string()),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Sink for Datagrams {
    fn send(&mut self, packet: &mut [u8], given: usize) -> Sent {
        match self.0.send(packet) {
            Ok(_) => Sent::Done,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Sent::Part(given),
            Err(error) => Sent::Lost(error.to_string()),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A pair, and the other end of both its directions.
pub(crate) fn pair() -> (Pair, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let ours = Arc::new(ours);
    let pair: Pair = (Box::new(Datagrams(ours.clone())), Box::new(Datagrams(ours)));
    (pair, theirs)
}

/// A link that is up.
pub(crate) fn link(log: Logger) -> Link {
    let status = Published::new(super::STATUS_OFFSET, LINK_UP);
    Link::new("net0", "the test".into(), status, log)
}
