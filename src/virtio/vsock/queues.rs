//! The device's three queues. [VIRTIO 1.2 §5.10.2]
//!
//! All connections have one owner, the actor of the receive queue. The transmit queue's takes packets out of guest memory
//! and passes them on; when [`WAITING_PACKETS`] wait it takes no more, until some were taken. Two eventfds say "there is
//! something" and "there is room again": each is written after what it tells of has been done, and read before that is
//! looked at, so none is missed.
//!
//! A packet carries the device's life in which it was taken, as the two actors find out about a reset each at its own time:
//! one of an earlier life is dropped, one of a later waits until the owner has got there too.
//!
//! What a hostile guest can try: a transmit chain without a whole header or with less data than its header says, or a
//! receive chain without room for a header and a byte, makes the device need a reset. A guest that gives no buffers to
//! receive gets nothing, and its own packets still go to the host.

use super::connection::BUFFER_BYTES;
use super::packet::{HEADER_BYTES, Header, op};
use super::switchboard::Switchboard;
use crate::virtio::CHUNK_BYTES;
use crate::virtio::chain::Malformed;
use crate::virtio::queue::{Handler, Interruption, Request};
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::PollFlags;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Packets of the guest that wait for the owner of its connections.
pub const WAITING_PACKETS: usize = 16;
/// So many packets go to the guest, or come from it, before sockets are looked at again.
const AT_ONCE: usize = 16;

/// A packet of the guest.
pub struct Sent {
    life: u32,
    header: Header,
    data: Vec<u8>,
}

/// What the two queues have between them.
pub struct Between {
    /// Written when there are packets.
    pub arrived: Arc<EventFd>,
    /// Written when there is room for more.
    taken: Arc<EventFd>,
    outbox: Sender<Sent>,
    inbox: Receiver<Sent>,
}

impl Between {
    /// With room for so many packets.
    ///
    /// # Errors
    /// When the host gives no more descriptors.
    pub fn new(packets: usize) -> io::Result<Between> {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).map(Arc::new);
        let (outbox, inbox) = bounded(packets);
        Ok(Between {
            arrived: eventfd()?,
            taken: eventfd()?,
            outbox,
            inbox,
        })
    }
}

#[cfg(any(test, fuzzing))]
impl Between {
    /// As the transmit queue would.
    pub fn put(&self, life: u32, header: Header) {
        let data = vec![0; header.bytes as usize];
        self.outbox.try_send(Sent { life, header, data }).unwrap();
    }
}

/// Serves the receive queue, and owns all connections.
pub struct Receive {
    switchboard: Switchboard,
    inbox: Receiver<Sent>,
    arrived: Arc<EventFd>,
    taken: Arc<EventFd>,
    /// `None`: there is no driver.
    life: Option<u32>,
    /// A packet from a later life.
    early: Option<Sent>,
    /// Sockets have to be looked at.
    look: bool,
    /// Packets given since they were.
    given: usize,
}

impl Receive {
    /// With what it shares with the transmit queue.
    pub fn new(switchboard: Switchboard, between: &Between) -> Receive {
        Receive {
            switchboard,
            inbox: between.inbox.clone(),
            arrived: between.arrived.clone(),
            taken: between.taken.clone(),
            life: None,
            early: None,
            look: true,
            given: 0,
        }
    }

    /// Takes what the guest has sent.
    fn take(&mut self, life: u32) {
        let mut count = 0;
        while count < AT_ONCE && self.switchboard.takes() {
            let Some(sent) = self.early.take().or_else(|| self.inbox.try_recv().ok()) else {
                break;
            };
            // Later by less than half of all that there are.
            let ahead = sent.life.wrapping_sub(life) as i32;
            if ahead > 0 {
                self.early = Some(sent);
                break;
            }
            if ahead == 0 {
                self.switchboard.take(&sent.header, &sent.data);
            }
            count += 1;
        }
        if count > 0 {
            let _ = self.taken.write(1);
        }
        if count == AT_ONCE {
            // There may be more, of which was told already.
            let _ = self.arrived.write(1);
        }
    }
}

impl Handler for Receive {
    fn start(&mut self, _features: u64, life: u32) {
        self.switchboard.clear();
        self.life = Some(life);
        self.look = true;
    }

    fn stopped(&mut self) {
        self.switchboard.clear();
        self.life = None;
    }

    fn prepare(&mut self) -> bool {
        let Some(life) = self.life else { return false };
        if self.look || self.given >= AT_ONCE || !self.switchboard.has_packet() {
            self.switchboard.look();
            (self.look, self.given) = (false, 0);
        }
        self.take(life);
        self.switchboard.has_packet()
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.watches()
    }

    fn watches(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        // The guest's packets go to the host even if it takes none. With a packet of a later life there is nothing to do but
        // to begin that life, for which the bell rings.
        let watched = self.life.is_some() && self.early.is_none();
        watched.then(|| (self.switchboard.fd(), PollFlags::POLLIN))
    }

    fn noticed(&mut self) {
        self.look = true;
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let room = request.writable_bytes().min(CHUNK_BYTES as u64) as usize;
        if room <= HEADER_BYTES {
            return Err(Malformed::NoAnswer.into());
        }
        self.given += 1;
        let Some(bytes) = self.switchboard.give(&mut request.buffer[..room]) else {
            return Err(Interruption::Untaken);
        };
        match request.store(0, bytes)? {
            Ok(()) => Ok(bytes as u32),
            Err(_) => Err(Malformed::NoAnswer.into()),
        }
    }
}

/// Serves the transmit queue.
pub struct Transmit {
    outbox: Sender<Sent>,
    arrived: Arc<EventFd>,
    taken: Arc<EventFd>,
    life: u32,
}

impl Transmit {
    /// With what it shares with the receive queue.
    pub fn new(between: &Between) -> Transmit {
        Transmit {
            outbox: between.outbox.clone(),
            arrived: between.arrived.clone(),
            taken: between.taken.clone(),
            life: 0,
        }
    }
}

impl Handler for Transmit {
    fn start(&mut self, _features: u64, life: u32) {
        self.life = life;
    }

    fn prepare(&mut self) -> bool {
        let _ = self.taken.read();
        !self.outbox.is_full()
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        // SAFETY: the descriptor belongs to `taken`, which lives as long as this.
        let fd = unsafe { BorrowedFd::borrow_raw(self.taken.as_raw_fd()) };
        Some((fd, PollFlags::POLLIN))
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let mut header = [0; HEADER_BYTES];
        if request.load_into(0, &mut header)?.is_err() {
            return Err(Malformed::NoRequest.into());
        }
        let header = Header::from_bytes(&header);
        if request.readable_bytes() < HEADER_BYTES as u64 + u64::from(header.bytes) {
            return Err(Malformed::NoRequest.into());
        }
        let mut data = Vec::new();
        // More than a connection's room is a violation, whatever it is.
        if header.operation == op::RW && header.bytes <= BUFFER_BYTES {
            data.resize(header.bytes as usize, 0);
            if request.load_into(HEADER_BYTES as u64, &mut data)?.is_err() {
                return Err(Malformed::NoRequest.into());
            }
        }
        let sent = Sent {
            life: self.life,
            header,
            data,
        };
        // Nobody else sends, and there was room.
        let _ = self.outbox.try_send(sent);
        let _ = self.arrived.write(1);
        Ok(0)
    }
}

/// Serves the event queue: its one event, that all connections are gone, is for guests that were moved to another host.
pub struct Events;

impl Handler for Events {
    fn prepare(&mut self) -> bool {
        false
    }

    fn serve(&mut self, _request: &mut Request<'_>) -> Result<u32, Interruption> {
        Err(Interruption::Untaken)
    }
}
