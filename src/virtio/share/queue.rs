//! The handler of a queue: a request is copied to virtiofsd, and its answer back.
//!
//! ```text
//!            serve: copied, kicked             called
//!   IDLE ───────────────────────▶ UNDER WAY ───────────▶ ANSWERED ──serve: copied back──▶ IDLE
//!    ▲                                │ reset
//!    └──────────called, dropped─── STALE
//! ```
//!
//! While a request is under way it stays at the head of the guest's queue, and the actor sleeps for virtiofsd and for its
//! bell alike: a reset, a pause and the machine's end wait for nobody. What virtiofsd answers to a driver that is gone goes
//! nowhere, since the memory it writes is not the guest's.
//!
//! When virtiofsd has ended, each request is answered with ENOTCONN, as FUSE does when a server is gone.

use super::fuse::{ANSWER_HEADER_BYTES, REQUEST_HEADER_BYTES, Request as Header};
use super::ring::{MOST_BYTES, Ring};
use super::session::Line;
use crate::virtio::CHUNK_BYTES;
use crate::virtio::chain::Malformed;
use crate::virtio::program::Program;
use crate::virtio::queue::{Handler, Interruption, Request};
use nix::poll::PollFlags;
use slog::{Logger, error};
use std::os::fd::BorrowedFd;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Idle,
    UnderWay,
    Answered(usize),
    Stale,
    /// virtiofsd has ended.
    Lost,
}

/// What one of the handlers has to itself: the process, and to say when it is gone.
pub struct Keeper {
    /// For the log: the device and its tag.
    pub name: String,
    /// `None`: somebody else ends it.
    pub program: Option<Program>,
    pub log: Logger,
}

/// A queue's handler.
pub struct Forward {
    ring: Ring,
    line: Line,
    state: State,
    keeper: Option<Keeper>,
}

impl Forward {
    /// Nothing is under way. The one with the keeper says when virtiofsd is gone, and ends it with itself.
    pub fn new(ring: Ring, line: Line, keeper: Option<Keeper>) -> Forward {
        Forward {
            ring,
            line,
            state: State::Idle,
            keeper,
        }
    }

    /// Looks for what virtiofsd has done.
    fn look(&mut self) {
        if self.state == State::Lost {
            return;
        }
        // Before the ring, so that what is told from here on is told again.
        self.line.heard();
        match self.ring.answer() {
            Ok(Some(bytes)) if self.state == State::UnderWay => self.state = State::Answered(bytes),
            Ok(Some(_)) => self.state = State::Idle,
            // What it has answered before its end is good.
            Ok(None) if self.line.has_ended() => self.lose(None),
            Ok(None) => {}
            Err(_) => self.lose(Some("it has written nonsense into its queue")),
        }
    }

    #[cold]
    fn lose(&mut self, why: Option<&str>) {
        self.state = State::Lost;
        // The other queues' handlers find out by it.
        self.line.hang_up();
        let Some(Keeper { name, program, log }) = &mut self.keeper else {
            return;
        };
        let why = match (why, program) {
            (Some(why), _) => why.to_owned(),
            (None, Some(program)) => program.why(),
            (None, None) => "its socket has ended".to_owned(),
        };
        error!(
            log,
            "{name}: virtiofsd is lost, and the guest gets an error (ENOTCONN) for all that it does in the folder: {why}"
        );
    }

    /// Copies a request to virtiofsd.
    fn submit(&mut self, request: &mut Request<'_>) -> Result<(), Interruption> {
        let (bytes, room) = (request.readable_bytes(), request.writable_bytes());
        if bytes > MOST_BYTES as u64 || room > MOST_BYTES as u64 {
            return Err(Malformed::TooLarge.into());
        }
        let (bytes, room) = (bytes as usize, room as usize);
        for offset in (0..bytes).step_by(CHUNK_BYTES) {
            let part = CHUNK_BYTES.min(bytes - offset);
            request
                .load(offset as u64, part)?
                .map_err(|_| Malformed::NoRequest)?;
            if offset == 0 {
                // Its length is what it says it is: of the copy, which the driver cannot change any more.
                let header = request.buffer[..part].first_chunk::<REQUEST_HEADER_BYTES>();
                let said = header.map(|header| Header::parse(header).bytes as usize);
                if said != Some(bytes) {
                    return Err(Malformed::NoRequest.into());
                }
            }
            if self.ring.write(offset, &request.buffer[..part]).is_err() {
                self.lose(Some("its memory is gone"));
                return Ok(());
            }
        }
        if bytes == 0 {
            return Err(Malformed::NoRequest.into());
        }
        match self.ring.submit(bytes, room) {
            Ok(()) => {
                self.state = State::UnderWay;
                self.line.kick();
            }
            Err(_) => self.lose(Some("its memory is gone")),
        }
        Ok(())
    }

    /// Copies an answer to the driver.
    fn deliver(&mut self, request: &mut Request<'_>, bytes: usize) -> Result<u32, Interruption> {
        self.state = State::Idle;
        // The driver may have changed its mind about the room.
        let bytes = bytes.min(usize::try_from(request.writable_bytes()).unwrap_or(usize::MAX));
        for offset in (0..bytes).step_by(CHUNK_BYTES) {
            let part = CHUNK_BYTES.min(bytes - offset);
            if self.ring.read(offset, &mut request.buffer[..part]).is_err() {
                return Err(Malformed::NoAnswer.into());
            }
            request
                .store(offset as u64, part)?
                .map_err(|_| Malformed::NoAnswer)?;
        }
        Ok(bytes as u32)
    }

    /// Answers that it cannot be done.
    fn refuse(&self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        // Some requests have no answer.
        if request.writable_bytes() < ANSWER_HEADER_BYTES as u64 {
            return Ok(0);
        }
        let mut header = [0; REQUEST_HEADER_BYTES];
        request
            .load_into(0, &mut header)?
            .map_err(|_| Malformed::NoRequest)?;
        let answer = Header::parse(&header).failed(libc::ENOTCONN);
        request.store_from(0, &answer)?.map_err(|_| Malformed::NoAnswer)?;
        Ok(answer.len() as u32)
    }
}

impl Handler for Forward {
    /// A reset and a start that come one upon the other are found out as a start alone.
    fn start(&mut self, _features: u64, _life: u32) {
        self.stopped();
    }

    fn stopped(&mut self) {
        self.state = match self.state {
            State::UnderWay | State::Stale => State::Stale,
            State::Idle | State::Answered(_) => State::Idle,
            State::Lost => State::Lost,
        };
    }

    fn prepare(&mut self) -> bool {
        if matches!(self.state, State::UnderWay | State::Stale) {
            self.look();
        }
        !matches!(self.state, State::UnderWay | State::Stale)
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        Some((self.line.fd(), PollFlags::POLLIN))
    }

    fn watches(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        (self.state != State::Lost).then(|| (self.line.fd(), PollFlags::POLLIN))
    }

    fn noticed(&mut self) {
        self.look();
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        match self.state {
            State::Answered(bytes) => return self.deliver(request, bytes),
            State::Idle => self.submit(request)?,
            State::UnderWay | State::Stale | State::Lost => {}
        }
        match self.state {
            State::Lost => self.refuse(request),
            _ => Err(Interruption::Untaken),
        }
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // Before the program is waited for.
        if self.keeper.is_some() {
            self.line.hang_up();
        }
    }
}
