//! A receive queue: frames from the host into the driver's buffers. [VIRTIO 1.2 §5.1.6.3, §5.1.6.4]
//!
//! A frame is taken from the host first, and then chains for it: with VIRTIO_NET_F_MRG_RXBUF as many as it needs, else
//! one. Without buffers of the driver nothing is taken from the host, where frames then wait or are dropped.
//!
//! What a hostile guest can try: chains outside memory or without room for a header make the device need a reset. A
//! chain that is too small for a frame stays where it is, and the frame is dropped.

use super::link::LinkEnd;
use super::{HEADER_BYTES, MAX_PACKET_BYTES, MIN_FRAME_BYTES, Received, Source, offload};
use crate::virtio::chain::Malformed;
use crate::virtio::queue::{Handler, Interruption, Request};
use nix::poll::PollFlags;
use std::os::fd::BorrowedFd;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

/// Where in the header the number of chains is.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// So many packets are dropped before the actor looks at its bell again.
const DROPS_AT_ONCE: usize = 64;

/// Serves a receive queue.
pub struct Receive {
    source: Box<dyn Source>,
    link: LinkEnd,
    features: u64,
    packet: Box<[u8]>,
    /// Bytes of a packet that waits for the driver's buffers; 0: none does.
    held: usize,
}

impl Receive {
    /// From a source.
    pub fn new(source: Box<dyn Source>, link: LinkEnd) -> Receive {
        Receive {
            source,
            link,
            features: 0,
            packet: vec![0; MAX_PACKET_BYTES].into(),
            held: 0,
        }
    }

    fn merges(&self) -> bool {
        self.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0
    }

    fn is_wanted(&self, bytes: usize) -> bool {
        let header = self.packet.first_chunk().expect("longer than a header");
        bytes >= HEADER_BYTES + MIN_FRAME_BYTES
            && self.link.is_up()
            && offload::is_accepted(header, self.features)
    }
}

impl Handler for Receive {
    fn start(&mut self, features: u64, _life: u32) {
        self.features = features;
        self.source.start(features);
        // A frame that no driver has taken yet is for this one, if it takes such.
        if !self.is_wanted(self.held) {
            self.held = 0;
        }
    }

    fn prepare(&mut self) -> bool {
        if self.held != 0 {
            return true;
        }
        for _ in 0..DROPS_AT_ONCE {
            if self.link.is_lost() {
                return false;
            }
            match self.source.receive(&mut self.packet) {
                Received::Packet(bytes) if self.is_wanted(bytes) => {
                    self.held = bytes;
                    return true;
                }
                Received::Packet(_) => {}
                Received::Nothing => return false,
                Received::Lost(why) => self.link.lose(&why),
            }
        }
        // There are more: what it waits for is there at once.
        false
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        (!self.link.is_lost()).then(|| (self.source.fd(), PollFlags::POLLIN))
    }

    fn watches(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        // A driver that gives no buffers is to hear of a lost link nevertheless. An end is told without being asked for
        // [poll(2): POLLERR, POLLHUP], but a tap wakes only those who ask for something to read, urgent or not. Urgent
        // there never is.
        (self.held != 0 && !self.link.is_lost()).then(|| (self.source.fd(), PollFlags::POLLPRI))
    }

    fn noticed(&mut self) {
        // The next look at the source finds out what has happened.
        self.held = 0;
    }

    fn room(&self) -> u64 {
        if self.merges() { self.held as u64 } else { 0 }
    }

    fn reconfigured(&mut self) -> bool {
        self.link.publish()
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let room = request.writable_bytes();
        if room < HEADER_BYTES as u64 {
            return Err(Malformed::NoAnswer.into());
        }
        let packet = std::mem::take(&mut self.held);
        if room < packet as u64 {
            return Err(Interruption::Untaken);
        }
        let chains = request.chains() as u16;
        self.packet[NUM_BUFFERS].copy_from_slice(&chains.to_le_bytes());
        match request.store_from(0, &self.packet[..packet])? {
            Ok(()) => Ok(packet as u32),
            Err(_) => Err(Malformed::NoAnswer.into()),
        }
    }
}
