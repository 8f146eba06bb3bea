//! A port's transmit queue: what a program of the guest writes, to the host.
//!
//! A chain is given back when the host has taken all of it, so a program of the host that does not read stops the guest's
//! writer, and nobody else. Without a program of the host what the guest writes is dropped, as Linux expects: a writer there
//! waits until it is told of one, and what it wrote to one that is gone has to be given back.
//!
//! What a hostile guest can try: chains outside memory make the device need a reset.

use super::line::Bell;
use crate::virtio::CHUNK_BYTES;
use crate::virtio::chain::Malformed;
use crate::virtio::queue::{Handler, Interruption, Request};
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, send};
use slog::{Logger, error};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

/// Brings the program of the host that is there now. The last one counts.
pub struct Hand {
    outbox: Sender<Option<UnixStream>>,
    untaken: Receiver<Option<UnixStream>>,
    bell: Arc<Bell>,
}

impl Hand {
    /// Does not wait.
    pub fn over(&self, client: Option<UnixStream>) {
        let mut client = client;
        // The other end may take one out meanwhile, but we alone put some in: twice at most.
        while let Err(TrySendError::Full(back)) = self.outbox.try_send(client) {
            let _ = self.untaken.try_recv();
            client = back;
        }
        self.bell.ring();
    }
}

/// Where it goes.
enum Target {
    Nobody,
    Client(UnixStream),
    File(File),
}

/// Serves the queue.
pub struct Outlet {
    target: Target,
    /// Of a socket: who comes next, and what tells of him or of room. Slept on only when there was no room.
    handed: Option<(Receiver<Option<UnixStream>>, Arc<Bell>, Epoll)>,
    /// So much of the chain at the head of the queue was taken.
    sent: u64,
    /// That was somebody else, who is gone.
    stale: bool,
    /// There was no room.
    blocked: bool,
    /// For a person.
    what: String,
    log: Logger,
}

impl Outlet {
    /// Into a file.
    pub fn file(file: File, path: &Path, log: &Logger) -> Outlet {
        Outlet {
            target: Target::File(file),
            handed: None,
            sent: 0,
            stale: false,
            blocked: false,
            what: path.display().to_string(),
            log: log.clone(),
        }
    }

    /// To whoever is brought.
    ///
    /// # Errors
    /// When the host gives no more descriptors.
    pub fn socket(log: &Logger) -> io::Result<(Outlet, Hand)> {
        let bell = Arc::new(Bell::new()?);
        let (outbox, inbox) = bounded(1);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(bell.fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        let hand = Hand {
            outbox,
            untaken: inbox.clone(),
            bell: bell.clone(),
        };
        let outlet = Outlet {
            target: Target::Nobody,
            handed: Some((inbox, bell, epoll)),
            sent: 0,
            stale: false,
            blocked: false,
            what: String::new(),
            log: log.clone(),
        };
        Ok((outlet, hand))
    }

    /// Takes whoever was brought.
    fn look(&mut self) {
        let Some((inbox, bell, epoll)) = &self.handed else {
            return;
        };
        bell.hush();
        if let Ok(client) = inbox.try_recv() {
            // Also a chain of which nothing was taken yet, if somebody was waited for.
            self.stale |= self.sent > 0 || self.blocked;
            self.blocked = false;
            // Closed with the last descriptor for it, and then it is out of the epoll descriptor too; but the port's other
            // queue may still have one.
            if let Target::Client(old) = &self.target {
                let _ = epoll.delete(old);
            }
            self.target = match client {
                Some(client) => {
                    let _ = epoll.add(&client, EpollEvent::new(EpollFlags::EPOLLOUT, 0));
                    Target::Client(client)
                }
                None => Target::Nobody,
            };
        }
    }

    fn has_room(&self) -> bool {
        let fd = match &self.target {
            Target::Nobody => return true,
            Target::Client(client) => client.as_fd(),
            Target::File(file) => file.as_fd(),
        };
        let mut polled = [PollFd::new(fd, PollFlags::POLLOUT)];
        poll(&mut polled, PollTimeout::ZERO) != Ok(0)
    }

    fn lose(&mut self) {
        if let (Some((_, _, epoll)), Target::Client(client)) = (&self.handed, &self.target) {
            let _ = epoll.delete(client);
        }
        self.target = Target::Nobody;
        self.blocked = false;
    }
}

impl Handler for Outlet {
    fn start(&mut self, _features: u64, _life: u32) {
        (self.sent, self.stale) = (0, false);
    }

    fn prepare(&mut self) -> bool {
        self.look();
        self.blocked &= !self.has_room();
        !self.blocked
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match (&self.target, &self.handed) {
            (Target::File(file), _) => Some((file.as_fd(), PollFlags::POLLOUT)),
            (_, Some((_, _, epoll))) => Some((epoll.0.as_fd(), PollFlags::POLLIN)),
            _ => None,
        }
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        // Whoever the driver has been told of is there by now, though perhaps not when this was got ready.
        self.look();
        let left = request.readable_bytes().saturating_sub(self.sent);
        let length = left.min(CHUNK_BYTES as u64) as usize;
        if request.load(self.sent, length)?.is_err() {
            return Err(Malformed::NoRequest.into());
        }
        let bytes = &request.buffer[..length];
        let sent = match &self.target {
            _ if self.stale || length == 0 => Ok(length),
            Target::Nobody => Ok(length),
            Target::Client(client) => {
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                send(client.as_raw_fd(), bytes, flags)
            }
            Target::File(file) => nix::unistd::write(file, bytes),
        };
        match sent {
            Ok(sent) if sent as u64 == left => {
                (self.sent, self.stale) = (0, false);
                return Ok(0);
            }
            Ok(sent) => self.sent += sent as u64,
            Err(Errno::EAGAIN) => self.blocked = true,
            Err(Errno::EINTR) => {}
            Err(why) => {
                if let Target::File(_) = self.target {
                    error!(
                        self.log,
                        "ports0: output to {} is lost from here on: {}",
                        self.what,
                        why.desc()
                    );
                }
                self.lose();
                self.stale |= self.sent > 0;
            }
        }
        Err(Interruption::Untaken)
    }
}
