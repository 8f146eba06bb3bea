//! A port's receive queue: what a program of the host sends, to the guest. Owns the port's socket and who is connected.
//!
//! One program at a time: others wait to be accepted until it has gone and the guest has read all that it sent. Nothing
//! goes to a guest whose program does not have the port open, since Linux throws it away; a few KiB are read ahead, by which
//! is noticed who leaves without a word (who has sent one is there until the guest has read it). When the host has no descriptor
//! for the next, he waits until another knocks. A program that has ended its own direction alone still gets what the guest writes.
//!
//! What a hostile guest can try: chains outside memory make the device need a reset. One that does not read stops the program
//! of the host, which can be seen and ended there.

use super::line::Exchange;
use super::outlet::Hand;
use crate::host::socket::OwnedSocket;
use crate::virtio::chain::Malformed;
use crate::virtio::queue::{Handler, Interruption, Request};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::unistd::read;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// Bytes that are read ahead.
const AHEAD_BYTES: usize = 16 << 10;
/// So many programs of the host come and go before the actor looks at its bell.
const AT_ONCE: usize = 16;

/// Who is connected.
struct Client {
    stream: UnixStream,
    /// It has ended its direction.
    ended: bool,
}

/// Serves the queue.
pub struct Inlet {
    place: usize,
    exchange: Arc<Exchange>,
    socket: OwnedSocket,
    hand: Hand,
    epoll: Epoll,
    /// What the epoll descriptor tells of beside the port's notices.
    watched: Watched,
    client: Option<Client>,
    ahead: Box<[u8]>,
    /// Which bytes of it the guest has not got.
    held: std::ops::Range<usize>,
    life: u32,
}

/// What an inlet waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Watched {
    /// The next program.
    Listener,
    /// What it sends.
    Client,
    /// Its end, as it sends nothing more.
    End,
    /// Neither: there is something for the guest.
    Nothing,
}

impl Inlet {
    /// Of the port in a place. `hand`: who connects is brought to the other queue by it.
    ///
    /// # Errors
    /// When the host gives no more descriptors.
    pub fn new(place: usize, exchange: Arc<Exchange>, socket: OwnedSocket, hand: Hand) -> io::Result<Inlet> {
        socket.listener().set_nonblocking(true)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll.add(exchange.lines[place].notice.fd(), readable)?;
        epoll.add(socket.listener(), knock())?;
        Ok(Inlet {
            place,
            exchange,
            socket,
            hand,
            epoll,
            watched: Watched::Listener,
            client: None,
            ahead: vec![0; AHEAD_BYTES].into(),
            held: 0..0,
            life: 0,
        })
    }

    /// The guest can be given something.
    fn is_open(&self) -> bool {
        self.exchange.lines[self.place].guest.is(self.life)
    }

    /// Gets something for the guest, if there is something. `false`: nothing is there now.
    fn fetch(&mut self) -> bool {
        for _ in 0..AT_ONCE {
            if !self.held.is_empty() {
                return true;
            }
            let Some(client) = &mut self.client else {
                if !self.accept() {
                    return false;
                }
                continue;
            };
            if client.ended {
                if !is_gone(&client.stream) {
                    return false;
                }
                self.leave();
                continue;
            }
            match read(&client.stream, &mut self.ahead) {
                Ok(0) => client.ended = true,
                Ok(length) => self.held = 0..length,
                Err(Errno::EAGAIN) => return false,
                Err(Errno::EINTR) => {}
                Err(_) => self.leave(),
            }
        }
        // There may be more, and then what is watched says so at once.
        !self.held.is_empty()
    }

    fn accept(&mut self) -> bool {
        let Ok((stream, _)) = self.socket.listener().accept() else {
            return false;
        };
        let Ok(other) = stream.set_nonblocking(true).and_then(|()| stream.try_clone()) else {
            return true;
        };
        // First there, then known to be.
        self.hand.over(Some(other));
        self.exchange.host_changed(self.place);
        self.client = Some(Client { stream, ended: false });
        true
    }

    fn leave(&mut self) {
        self.watch(Watched::Nothing);
        self.client = None;
        self.hand.over(None);
        self.exchange.host_changed(self.place);
    }

    fn watch(&mut self, what: Watched) {
        if what == self.watched {
            return;
        }
        let client = self.client.as_ref().map(|client| &client.stream);
        // Fails only without kernel memory for it; then a ring of the bell has it tried again.
        let _ = match (self.watched, client) {
            (Watched::Listener, _) => self.epoll.delete(self.socket.listener()),
            (Watched::Client | Watched::End, Some(client)) => self.epoll.delete(client),
            _ => Ok(()),
        };
        let done = match (what, client) {
            (Watched::Listener, _) => self.epoll.add(self.socket.listener(), knock()),
            (Watched::Client, Some(client)) => {
                self.epoll.add(client, EpollEvent::new(EpollFlags::EPOLLIN, 0))
            }
            // A hang-up is told without being asked for.
            (Watched::End, Some(client)) => self.epoll.add(client, EpollEvent::new(EpollFlags::empty(), 0)),
            _ => Ok(()),
        };
        self.watched = if done.is_ok() { what } else { Watched::Nothing };
    }
}

/// Somebody wants to connect. Told once, or a host without descriptors for him would keep the actor awake.
fn knock() -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0)
}

/// Whether both directions have ended.
fn is_gone(client: &UnixStream) -> bool {
    let mut polled = [PollFd::new(client.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO) != Ok(0)
}

impl Handler for Inlet {
    fn start(&mut self, _features: u64, life: u32) {
        self.life = life;
    }

    fn prepare(&mut self) -> bool {
        self.exchange.lines[self.place].notice.hush();
        let something = self.fetch();
        self.watch(match &self.client {
            _ if something => Watched::Nothing,
            None => Watched::Listener,
            Some(client) if client.ended => Watched::End,
            Some(_) => Watched::Client,
        });
        something && self.is_open()
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        Some((self.epoll.0.as_fd(), PollFlags::POLLIN))
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let room = usize::try_from(request.writable_bytes()).unwrap_or(usize::MAX);
        let length = self.held.len().min(room);
        let bytes = &self.ahead[self.held.start..][..length];
        if request.store_from(0, bytes)?.is_err() {
            return Err(Malformed::NoAnswer.into());
        }
        self.held.start += length;
        Ok(length as u32)
    }
}
