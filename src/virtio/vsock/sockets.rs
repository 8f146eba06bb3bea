//! Sockets of the host at the other ends of connections: what each is for and good for, and what is done with them. Nothing
//! here waits.

use super::connection::Connection;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// What a slot is for.
pub enum Role {
    /// A client that has not said yet what it wants.
    Silent,
    /// A connection. `until`: how long its socket is still tried.
    Line {
        /// Which.
        connection: Connection,
        /// See above.
        until: Option<Instant>,
    },
    /// The guest is done with it and knows; the host's socket is to get the rest.
    Leaving(VecDeque<u8>),
}

/// A descriptor of the host, and what it is good for.
pub struct Slot {
    /// `None`: it is not connected yet, or gone.
    pub socket: Option<UnixStream>,
    /// There may be something to read, or the end.
    pub readable: bool,
    /// There may be room.
    pub writable: bool,
    /// Both directions have ended on the host's side.
    pub hung_up: bool,
    /// The host has been told that nothing more comes. Once: each time is an event of the same socket.
    pub finished: bool,
    /// It waits for its turn to say something to the guest.
    pub queued: bool,
    /// What it is for.
    pub role: Role,
}

impl Slot {
    /// A slot for something new.
    pub fn new(socket: Option<UnixStream>, role: Role) -> Slot {
        Slot {
            socket,
            readable: false,
            writable: false,
            hung_up: false,
            finished: false,
            queued: false,
            role,
        }
    }
}

/// Has the epoll descriptor tell of a socket.
pub fn watch(epoll: &Epoll, socket: &UnixStream, place: usize) -> Result<(), Errno> {
    let all = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    epoll.add(socket, EpollEvent::new(all, place as u64))
}

/// Connects to a socket of the host, at once or not at all.
pub fn reach(path: &std::ffi::OsStr) -> Result<UnixStream, Errno> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(socket.into())
}

/// Writes as much as there is room for, without a signal when nobody is there.
pub fn write(socket: &UnixStream, parts: &[IoSlice<'_>]) -> Result<usize, Errno> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), parts, &[], flags, None) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Writes what there is room for of a backlog, until all is written or there is none.
pub fn write_all(socket: &UnixStream, rest: &mut VecDeque<u8>) -> Result<(), Errno> {
    while !rest.is_empty() {
        let bytes = write(socket, &[IoSlice::new(rest.as_slices().0)])?;
        rest.drain(..bytes);
    }
    Ok(())
}
