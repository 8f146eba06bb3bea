//! The console's two queues: bytes between the driver's buffers and the rings to the event loop, which has the terminal, its
//! escapes and its pace. [VIRTIO 1.2 §5.3.6]
//!
//! A byte of the host leaves its ring when it is in the guest's memory, and a chain of the guest is given back when all of it
//! is in the ring: a reset, a pause or a host that does not read lose nothing that the guest was told is taken. What was
//! typed before there is a driver waits for it.
//!
//! What a hostile guest can try: chains outside memory make the device need a reset, and empty ones are given back. A chain
//! may be of any length, and is passed on in pieces. Memory: two rings of fixed size.

use super::size::Size;
use crate::host::character::{Input, Output, Waker, wake};
use crate::virtio::CHUNK_BYTES;
use crate::virtio::chain::Malformed;
use crate::virtio::queue::{Handler, Interruption, Request};
use crate::virtio::registers::Published;
use nix::poll::PollFlags;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Until an eventfd is written.
fn until(bell: &Waker) -> Option<(BorrowedFd<'_>, PollFlags)> {
    // SAFETY: the descriptor belongs to `bell`, which the result borrows.
    let fd = unsafe { BorrowedFd::borrow_raw(bell.as_raw_fd()) };
    Some((fd, PollFlags::POLLIN))
}

/// Serves the receive queue, and shows the driver the terminal's size.
pub struct Receive {
    input: Input,
    bell: Waker,
    size: Option<(Size, Published)>,
    /// There is a driver.
    started: bool,
}

impl Receive {
    /// `bell`: written when there is input. `size`: the size, and where the driver sees it.
    pub fn new(input: Input, bell: Waker, size: Option<(Size, Published)>) -> Receive {
        Receive {
            input,
            bell,
            size,
            started: false,
        }
    }
}

impl Handler for Receive {
    fn start(&mut self, _features: u64, _life: u32) {
        self.started = true;
    }

    fn stopped(&mut self) {
        self.started = false;
    }

    fn prepare(&mut self) -> bool {
        // Read before the ring is looked at, so what comes behind is told again.
        let _ = self.bell.read();
        !self.input.is_empty()
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        until(&self.bell)
    }

    fn reconfigured(&mut self) -> bool {
        let started = self.started;
        self.size.as_ref().is_some_and(|(size, published)| {
            let reminded = started && size.is_due();
            published.set(size.word()) || reminded
        })
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let room = request.writable_bytes().min(CHUNK_BYTES as u64) as usize;
        let length = self.input.peek(&mut request.buffer[..room]);
        if request.store(0, length)?.is_err() {
            return Err(Malformed::NoAnswer.into());
        }
        self.input.consume(length);
        Ok(length as u32)
    }
}

/// Serves the transmit queue.
pub struct Transmit {
    output: Output,
    bell: Waker,
    /// So much of the chain at the head of the queue is in the ring.
    sent: u64,
    /// The size, and what wakes the actor that shows it.
    size: Option<(Size, Waker)>,
    /// The driver has sent something.
    spoken: bool,
}

impl Transmit {
    /// `bell`: written when there is room again. `size`: the size, and what wakes the other queue's actor.
    pub fn new(output: Output, bell: Waker, size: Option<(Size, Waker)>) -> Transmit {
        Transmit {
            output,
            bell,
            sent: 0,
            size,
            spoken: false,
        }
    }
}

impl Handler for Transmit {
    fn start(&mut self, _features: u64, _life: u32) {
        (self.sent, self.spoken) = (0, false);
    }

    fn prepare(&mut self) -> bool {
        let _ = self.bell.read();
        self.output.has_room()
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        until(&self.bell)
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        if !std::mem::replace(&mut self.spoken, true)
            && let Some((size, waker)) = &self.size
        {
            size.remind();
            wake(waker);
        }
        // The driver may have made the chain another one meanwhile; then it has what it deserves.
        let left = request.readable_bytes().saturating_sub(self.sent);
        let length = left.min(CHUNK_BYTES as u64) as usize;
        if request.load(self.sent, length)?.is_err() {
            return Err(Malformed::NoRequest.into());
        }
        let sent = self.output.send(&request.buffer[..length]) as u64;
        if sent < left {
            self.sent += sent;
            return Err(Interruption::Untaken);
        }
        self.sent = 0;
        Ok(0)
    }
}
