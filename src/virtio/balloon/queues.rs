//! The device's queues. [VIRTIO 1.2 §5.5.6]
//!
//! Which queue is which depends on what the driver accepts: Linux numbers those that it uses, without gaps.
//!
//! What a hostile guest can try: to give pages that it uses, that are not its own or that do not exist, in any number. It can
//! empty its own memory, for which it needs no device, and occupy its own queue's thread: a list is [`MOST_PAGES`] long at
//! most, and between two touches (of [`DISCARD_BYTES`](crate::virtio::queue::DISCARD_BYTES) each) a reset is heard. What it tells
//! of itself is told on, and believed by nobody.

use super::state::{Balloon, Giver};
use super::{PAGE_BYTES, REPORTING, STATS};
use crate::virtio::CHUNK_BYTES;
use crate::virtio::chain::Malformed;
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::{Handler, Interruption, Request};
use crate::virtio::registers::Published;
use nix::poll::PollFlags;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Pages in one list: 128 MiB. Linux has 256.
pub const MOST_PAGES: usize = CHUNK_BYTES / 4;
/// Bytes of one of the guest's figures: a tag and a value. [VIRTIO 1.2 §5.5.6.3]
const FIGURE_BYTES: usize = 10;
/// So many are looked at.
const MOST_FIGURES: usize = 64;

/// Serves the inflate queue: gives back to the host what the driver gives.
pub struct Inflate {
    balloon: Balloon,
    target: Published,
    complaints: Complaints,
    pages: Vec<u32>,
}

impl Inflate {
    /// `target`: where the driver looks for the size that it is asked for.
    pub fn new(balloon: Balloon, target: Published, complaints: Complaints) -> Inflate {
        Inflate {
            balloon,
            target,
            complaints,
            pages: Vec::new(),
        }
    }
}

impl Handler for Inflate {
    fn reconfigured(&mut self) -> bool {
        self.target.set(self.balloon.wanted_pages())
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let bytes = request.readable_bytes() as usize / 4 * 4;
        if bytes > 4 * MOST_PAGES || request.load(0, bytes)?.is_err() {
            return Err(Malformed::NoRequest.into());
        }
        let numbers = request.buffer[..bytes].chunks_exact(4);
        let numbers = numbers.map(|number| u32::from_le_bytes([number[0], number[1], number[2], number[3]]));
        self.pages.clear();
        self.pages.extend(numbers);
        // Linux gives them as it gets them: often one behind the other, up or down.
        self.pages.sort_unstable();
        self.pages.dedup();
        let mut rest = &self.pages[..];
        while let Some(first) = rest.first() {
            // Wider than a page's number, as behind the last one there is none.
            let run = rest
                .iter()
                .zip(u64::from(*first)..)
                .take_while(|(page, next)| u64::from(**page) == *next)
                .count();
            rest = &rest[run..];
            let (address, length) = (u64::from(*first) * PAGE_BYTES, run as u64 * PAGE_BYTES);
            let given = request.discard(address, length)?;
            count(&self.balloon, Giver::Inflate, given, &mut self.complaints);
        }
        Ok(0)
    }
}

fn count(balloon: &Balloon, giver: Giver, given: io::Result<u64>, complaints: &mut Complaints) {
    match given {
        Ok(bytes) => balloon.count(giver, bytes),
        Err(error) => complaints.say(format_args!(
            "balloon0: the host does not take memory back: {error}"
        )),
    }
}

/// Serves the deflate queue: the driver has taken pages back, which come anew from the host when they are touched.
pub struct Deflate;

impl Handler for Deflate {
    fn serve(&mut self, _request: &mut Request<'_>) -> Result<u32, Interruption> {
        Ok(0)
    }
}

/// Serves one of the queues behind these two: figures or reports, as the driver accepts.
pub struct Other {
    /// It is the second of them.
    second: bool,
    balloon: Balloon,
    complaints: Complaints,
    timer: Option<TimerFd>,
    features: u64,
    /// The guest is to be asked.
    due: bool,
}

impl Other {
    /// `every`: how often the guest is asked for figures.
    ///
    /// # Errors
    /// When the host gives no timer.
    pub fn new(
        second: bool,
        balloon: Balloon,
        every: Option<Duration>,
        complaints: Complaints,
    ) -> io::Result<Other> {
        let timer = match every {
            Some(every) => {
                let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
                let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
                let expiration = Expiration::Interval(TimeSpec::from(every));
                timer.set(expiration, TimerSetTimeFlags::empty())?;
                Some(timer)
            }
            None => None,
        };
        Ok(Other {
            second,
            balloon,
            complaints,
            timer,
            features: 0,
            due: false,
        })
    }

    fn is_figures(&self) -> bool {
        !self.second && self.features & STATS != 0
    }

    fn is_reports(&self) -> bool {
        let both = self.features & STATS != 0;
        self.features & REPORTING != 0 && self.second == both
    }
}

impl Handler for Other {
    fn start(&mut self, features: u64, _life: u32) {
        self.features = features;
        // The driver brings its figures without being asked, once.
        self.due = true;
    }

    fn prepare(&mut self) -> bool {
        if !self.is_figures() {
            return true;
        }
        // A buffer that is given back is the question, and the next is the answer. It stays in the queue until the next
        // question, so what is known is as old as that at most.
        if let Some(timer) = &self.timer
            && timer.wait().is_ok()
        {
            self.due = true;
        }
        self.due
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.timer
            .as_ref()
            .map(|timer| (timer.as_fd(), PollFlags::POLLIN))
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        if self.is_figures() {
            self.due = false;
            let most = (MOST_FIGURES * FIGURE_BYTES) as u64;
            let bytes = request.readable_bytes().min(most) as usize;
            if request.load(0, bytes)?.is_err() {
                return Err(Malformed::NoRequest.into());
            }
            for figure in request.buffer[..bytes].chunks_exact(FIGURE_BYTES) {
                let (tag, value) = figure.split_at(2);
                let tag = u16::from_le_bytes([tag[0], tag[1]]);
                self.balloon
                    .tell(tag, u64::from_le_bytes(std::array::from_fn(|at| value[at])));
            }
        } else if self.is_reports() {
            for (address, length) in request.writable() {
                let given = request.discard(address, length)?;
                count(&self.balloon, Giver::Report, given, &mut self.complaints);
            }
        }
        Ok(0)
    }
}
