//! The vhost-user session [https://qemu-project.gitlab.io/qemu/interop/vhost-user.html]: virtiofsd is told once, before the
//! guest runs, where its queues are and which eventfds belong to them. From then on nothing is said any more; the socket stays
//! open, and its end is virtiofsd's end.
//!
//! The queues it is told of are ours, not the guest's (see `mod.rs`), so a reset of the guest's device does not concern it.

use super::ring::{Nonsense, Ring};
use crossbeam_channel::{RecvTimeoutError, bounded};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// So long it may take for an answer, before the guest runs.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The host gives no eventfd or the like.
    #[error("the host gives no descriptors for it")]
    Descriptors(#[from] io::Error),
    /// It does not answer, or not what it should.
    #[error("it did not answer as a vhost-user program does")]
    Protocol(#[from] vhost::Error),
    /// A program of another time.
    #[error("it does not speak virtio 1")]
    TooOld,
    /// Memory that is no file; cannot be.
    #[error("the memory that is shared with it is no file")]
    Memory,
}

impl From<Nonsense> for SessionError {
    fn from(_: Nonsense) -> Self {
        SessionError::Memory
    }
}

/// A queue's eventfds, and the socket, in one descriptor to wait for.
pub struct Line {
    /// Tells virtiofsd of a request.
    kick: EventFd,
    /// Is told of an answer.
    call: EventFd,
    /// Its end is virtiofsd's.
    socket: UnixStream,
    /// Readable when either has something.
    either: Epoll,
}

impl Line {
    fn new(socket: &UnixStream) -> io::Result<Line> {
        let call = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let socket = socket.try_clone()?;
        let either = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        // SAFETY: the descriptor belongs to `call`, which outlives this use of it.
        let fd = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
        either.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        either.add(&socket, EpollEvent::new(EpollFlags::EPOLLHUP, 1))?;
        Ok(Line {
            kick: EventFd::new(libc::EFD_CLOEXEC)?,
            call,
            socket,
            either,
        })
    }

    /// There is a request.
    pub fn kick(&self) {
        // The counter is full only if a virtiofsd that was broken into has filled it (see the module above).
        let _ = self.kick.write(1);
    }

    /// Becomes readable when there may be an answer, or virtiofsd has ended.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.either.0.as_fd()
    }

    /// Takes note of all calls until now: what is looked at from here on is what comes behind.
    pub fn heard(&self) {
        let _ = self.call.read();
    }

    /// Whether virtiofsd has closed its end, which it does by ending.
    pub fn has_ended(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        // The end is told always.
        let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        poll(&mut polled, PollTimeout::ZERO).is_ok() && polled[0].any() == Some(true)
    }

    /// Ends the session for all queues.
    pub fn hang_up(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Tells the program at the other end of a socket of the queues. Returns what each of them goes on with.
///
/// # Errors
/// [`SessionError`]; the socket is closed then.
pub fn establish(
    socket: UnixStream,
    memory: &GuestMemoryMmap,
    rings: &[Ring],
    limit: Duration,
) -> Result<Vec<Line>, SessionError> {
    // The crate takes a socket's own limit for a reason to try again, so somebody else has to hang up.
    let copy = socket.try_clone()?;
    let (here, over) = bounded::<()>(0);
    let guard = crate::thread::spawn("vhost-user".to_owned(), move || {
        // Nobody ever sends: it ends when the other side is dropped.
        if over.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            let _ = copy.shutdown(Shutdown::Both);
        }
    })?;
    let told = tell(socket, memory, rings);
    drop(here);
    let _ = guard.join();
    told
}

fn tell(socket: UnixStream, memory: &GuestMemoryMmap, rings: &[Ring]) -> Result<Vec<Line>, SessionError> {
    let lines = rings.iter().map(|_| Line::new(&socket));
    let lines = lines.collect::<io::Result<Vec<_>>>()?;
    let mut frontend = Frontend::from_stream(socket, rings.len() as u64);
    frontend.set_owner()?;
    let offered = frontend.get_features()?;
    let wanted = 1 << VIRTIO_F_VERSION_1;
    if offered & wanted == 0 {
        return Err(SessionError::TooOld);
    }
    let protocol = offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if protocol != 0 {
        let known = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        let agreed = frontend.get_protocol_features()? & known;
        frontend.set_protocol_features(agreed)?;
        if agreed.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // So that what does not work is an error here.
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
    }
    frontend.set_features(wanted | protocol)?;
    let regions = memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
    frontend.set_mem_table(&regions.collect::<Result<Vec<_>, _>>()?)?;
    for (number, (ring, line)) in rings.iter().zip(&lines).enumerate() {
        frontend.set_vring_num(number, ring.size())?;
        frontend.set_vring_base(number, 0)?;
        frontend.set_vring_addr(number, &ring.config()?)?;
        frontend.set_vring_call(number, &line.call)?;
        frontend.set_vring_kick(number, &line.kick)?;
        if protocol != 0 {
            frontend.set_vring_enable(number, true)?;
        }
    }
    // The lines have copies of its socket.
    Ok(lines)
}
