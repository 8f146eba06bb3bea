//! A transmit queue: frames from the driver to the host. [VIRTIO 1.2 §5.1.6.2]
//!
//! A packet is copied out of guest memory before any of it goes to the host, and its chain is given back then. What the
//! host has no room for waits here, and the next chain with it.
//!
//! What a hostile guest can try: a chain without a whole header, or outside memory, makes the device need a reset. A frame
//! that is longer than any, or shorter than an Ethernet header, is dropped. What the header says is the tap's to check,
//! which drops what makes no sense; passt does not see it.

use super::link::LinkEnd;
use super::{HEADER_BYTES, MAX_PACKET_BYTES, MIN_FRAME_BYTES, Sent, Sink};
use crate::virtio::chain::Malformed;
use crate::virtio::queue::{Handler, Interruption, Request};
use nix::poll::PollFlags;
use std::os::fd::BorrowedFd;

/// Serves a transmit queue.
pub struct Transmit {
    sink: Box<dyn Sink>,
    link: LinkEnd,
    packet: Box<[u8]>,
    /// Bytes of a packet that the host has not taken yet; 0: there is none.
    held: usize,
    /// How much of it it has.
    given: usize,
}

impl Transmit {
    /// To a sink.
    pub fn new(sink: Box<dyn Sink>, link: LinkEnd) -> Transmit {
        Transmit {
            sink,
            link,
            packet: vec![0; MAX_PACKET_BYTES].into(),
            held: 0,
            given: 0,
        }
    }

    /// Gives the host what it has not taken yet.
    fn push(&mut self) {
        if self.held == 0 {
            return;
        }
        match self.sink.send(&mut self.packet[..self.held], self.given) {
            Sent::Done => self.held = 0,
            Sent::Part(given) => self.given = given,
            Sent::Lost(why) => {
                self.link.lose(&why);
                self.held = 0;
            }
        }
    }
}

impl Handler for Transmit {
    fn prepare(&mut self) -> bool {
        // What was begun is brought to its end even when the link is down or the driver another: a stream that breaks off
        // in a frame is lost.
        self.push();
        self.held == 0
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        Some((self.sink.fd(), PollFlags::POLLOUT))
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let bytes = request.readable_bytes();
        if bytes < HEADER_BYTES as u64 {
            return Err(Malformed::NoRequest.into());
        }
        let fits = (HEADER_BYTES + MIN_FRAME_BYTES) as u64..=self.packet.len() as u64;
        if !fits.contains(&bytes) || !self.link.is_up() {
            return Ok(0);
        }
        let bytes = bytes as usize;
        if request.load_into(0, &mut self.packet[..bytes])?.is_err() {
            return Err(Malformed::NoRequest.into());
        }
        (self.held, self.given) = (bytes, 0);
        self.push();
        Ok(0)
    }
}
