//! All connections of a device, and the sockets of the host at their other ends. Nothing here waits: sockets do not block,
//! and one epoll descriptor becomes readable when any of them, or the guest, has something.
//!
//! Sockets are registered once, edge-triggered: what they are good for is kept with them until an attempt says otherwise,
//! so none is asked in vain, and one that cannot be served now (no credit, no buffers of the guest) does not keep the
//! actor awake.
//!
//! Who has something for the guest is in `ready`, once, and served in turn. What is there without a connection (refusals)
//! goes first; when [`MAX_REFUSALS`] of these wait, no packet of the guest is taken and no client accepted.
//!
//! What a hostile guest can try: packets of any kind for any ports. It can have [`MAX_CONNECTIONS`], each with
//! [`BUFFER_BYTES`](super::connection::BUFFER_BYTES), and reach sockets whose path is the user's with `_` and a number
//! behind, no others.

use super::connection::{Connection, Ports, Stage};
use super::handshake::{self, Said};
use super::packet::{HEADER_BYTES, HOST_CID, Header, NEITHER, NO_RECEIVE, NO_SEND, STREAM, op};
use super::sockets::{Role, Slot, reach, watch, write, write_all};
use crate::host::socket::OwnedSocket;
use crate::virtio::complaints::Complaints;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// The most connections at once, whatever their state: each has a descriptor, of which a process often has 1024.
pub const MAX_CONNECTIONS: usize = 256;
/// Of these, clients that have not said yet what they want. The oldest has to go when there are more.
pub const MAX_SILENT: usize = 32;
/// Refusals that wait for the guest's buffers.
pub const MAX_REFUSALS: usize = 256;
/// Events that are taken from the kernel at once.
const EVENTS: usize = 64;
/// The first port of the host for its own connections: far from those that anybody listens at.
const FIRST_OWN_PORT: u32 = 1 << 30;
/// A socket that has no room for another client is tried again after this, until [`CONNECT_LIMIT`].
const RETRY: Duration = Duration::from_millis(10);
/// As long as Linux waits for an answer. [vsock(7)]
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// What an event of the epoll descriptor is about, if it is not a slot's.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const ARRIVED: u64 = u64::MAX - 2;

/// See above.
pub struct Switchboard {
    name: &'static str,
    cid: u64,
    path: PathBuf,
    listener: OwnedSocket,
    epoll: Epoll,
    timer: TimerFd,
    ticking: bool,
    arrived: Arc<EventFd>,
    slots: Vec<Option<Slot>>,
    places: BTreeMap<Ports, usize>,
    ready: VecDeque<usize>,
    refusals: VecDeque<Header>,
    /// In the order in which they came.
    silent: VecDeque<usize>,
    /// There may be clients to accept.
    knocked: bool,
    next_port: u32,
    complaints: Complaints,
}

impl Switchboard {
    /// One without connections. `arrived`: written when the guest has something.
    ///
    /// # Errors
    /// When the host gives no more descriptors.
    pub fn new(
        name: &'static str,
        cid: u32,
        listener: OwnedSocket,
        arrived: Arc<EventFd>,
        complaints: Complaints,
    ) -> io::Result<Switchboard> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        let readable = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(listener.listener(), EpollEvent::new(readable, LISTENER))?;
        epoll.add(&timer, EpollEvent::new(readable, TIMER))?;
        // SAFETY: the descriptor belongs to `arrived`, which lives as long as this.
        let fd = unsafe { BorrowedFd::borrow_raw(arrived.as_raw_fd()) };
        epoll.add(fd, EpollEvent::new(readable, ARRIVED))?;
        Ok(Switchboard {
            name,
            cid: cid.into(),
            path: listener.path().to_path_buf(),
            listener,
            epoll,
            timer,
            ticking: false,
            arrived,
            slots: Vec::new(),
            places: BTreeMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            silent: VecDeque::new(),
            knocked: true,
            next_port: FIRST_OWN_PORT,
            complaints,
        })
    }

    /// All connections end. Clients that wait to be accepted go on waiting.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.places.clear();
        self.ready.clear();
        self.refusals.clear();
        self.silent.clear();
        // Whatever was noticed before.
        self.knocked = true;
    }

    /// What becomes readable when there is something to look at.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// How many connections there are, whatever their state.
    pub fn connections(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Looks which sockets are good for something now, and does what they are good for as far as it is for the host.
    pub fn look(&mut self) {
        self.harvest();
        if self.accept() {
            // What they say is there already, often.
            self.harvest();
        }
    }

    fn harvest(&mut self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        // What is left after so many rounds is there the next time, which is soon: the descriptor stays readable.
        for _ in 0..=MAX_CONNECTIONS / EVENTS {
            let Ok(count) = self.epoll.wait(&mut events, EpollTimeout::ZERO) else {
                return;
            };
            // Noted for all before anything is done for one, which may empty another's slot.
            let events = &events[..count];
            for event in events {
                self.note(*event);
            }
            for event in events {
                if let Ok(place) = usize::try_from(event.data()) {
                    self.advance(place);
                }
            }
            if count < EVENTS {
                break;
            }
        }
    }

    fn note(&mut self, event: EpollEvent) {
        match event.data() {
            LISTENER => self.knocked = true,
            ARRIVED => drop(self.arrived.read()),
            TIMER => self.tick(),
            place => {
                let flags = event.events();
                if let Some(slot) = self.slots.get_mut(place as usize).and_then(Option::as_mut) {
                    slot.readable |=
                        flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
                    slot.writable |=
                        flags.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
                    slot.hung_up |= flags.contains(EpollFlags::EPOLLHUP);
                }
            }
        }
    }

    /// Does for a slot what can be done now.
    fn advance(&mut self, place: usize) {
        let Some(slot) = self.slots.get_mut(place).and_then(Option::as_mut) else {
            return;
        };
        match &mut slot.role {
            Role::Silent => self.listen_to(place),
            Role::Line { connection, .. } => {
                if slot.hung_up && connection.stage() == Stage::Asking {
                    // It did not wait for the answer.
                    return self.end(place, true);
                }
                // Nothing is to be read behind the end that was read, so this is the other direction's.
                if slot.hung_up && connection.ended_by_host() & NO_SEND != 0 {
                    connection.end_by_host(NEITHER);
                }
                self.flush(place);
                self.consider(place);
            }
            Role::Leaving(rest) => {
                let socket = slot.socket.as_ref().expect("until it has left");
                match write_all(socket, rest) {
                    Ok(()) | Err(Errno::EAGAIN) if !rest.is_empty() => slot.writable = false,
                    _ => self.free(place),
                }
            }
        }
    }

    /// Gives the host what waits for it, and ends what the guest has ended.
    fn flush(&mut self, place: usize) {
        let Some(slot) = self.slots[place].as_mut() else {
            return;
        };
        let (Role::Line { connection, .. }, Some(socket)) = (&mut slot.role, &slot.socket) else {
            return;
        };
        while slot.writable && !connection.backlog().is_empty() {
            let (front, back) = connection.backlog().as_slices();
            match write(socket, &[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(bytes) => connection.passed_on_from_backlog(bytes),
                Err(Errno::EAGAIN) => slot.writable = false,
                // Nobody reads it any more; what was sent before is still to be read.
                Err(_) => connection.end_by_host(NO_RECEIVE),
            }
        }
        let all_sent = connection.backlog().is_empty() && connection.ended_by_guest() & NO_SEND != 0;
        if all_sent && !slot.finished {
            slot.finished = true;
            let _ = socket.shutdown(Shutdown::Write);
        }
        if connection.ended_by_host() == NEITHER {
            slot.socket = None;
        }
    }

    /// Notes whether a slot has something for the guest.
    fn consider(&mut self, place: usize) {
        let Some(slot) = self.slots[place].as_mut() else {
            return;
        };
        let Role::Line { connection, .. } = &slot.role else {
            return;
        };
        if !slot.queued && connection.has_packet(slot.readable && slot.socket.is_some()) {
            slot.queued = true;
            self.ready.push_back(place);
        }
    }

    /// Empties a slot.
    fn free(&mut self, place: usize) {
        let Some(slot) = self.slots[place].take() else {
            return;
        };
        if let Role::Line { connection, .. } = &slot.role {
            self.places.remove(&connection.ports);
        }
        if slot.queued {
            self.ready.retain(|other| *other != place);
        }
        self.silent.retain(|other| *other != place);
    }

    /// Ends a connection at once. `tell`: the guest is to hear of it.
    fn end(&mut self, place: usize, tell: bool) {
        if let Some(Slot {
            role: Role::Line { connection, .. },
            ..
        }) = self.slots[place].as_mut()
            && tell
        {
            let reset = connection.reset(self.cid);
            self.refusals.push_back(reset);
        }
        self.free(place);
    }

    /// A slot for something new, if there may be more.
    fn fill(&mut self, slot: Slot) -> Option<usize> {
        let place = match self.slots.iter().position(Option::is_none) {
            Some(place) => place,
            None if self.slots.len() < MAX_CONNECTIONS => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => return None,
        };
        if let Some(socket) = &slot.socket {
            watch(&self.epoll, socket, place).ok()?;
        }
        self.slots[place] = Some(slot);
        Some(place)
    }

    fn is_full(&self) -> bool {
        self.connections() >= MAX_CONNECTIONS
    }

    /// Lets clients in, so many at most that none has to go before it was listened to. Returns whether any came.
    fn accept(&mut self) -> bool {
        let mut count = 0;
        while self.knocked && count < MAX_SILENT && self.refusals.len() < MAX_REFUSALS && !self.is_full() {
            match self.listener.listener().accept() {
                Ok((socket, _)) => {
                    if socket.set_nonblocking(true).is_ok()
                        && let Some(place) = self.fill(Slot::new(Some(socket), Role::Silent))
                    {
                        count += 1;
                        self.silent.push_back(place);
                        if self.silent.len() > MAX_SILENT {
                            self.free(self.silent[0]);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.knocked = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {}
                Err(error) => {
                    self.complaints.say(format_args!(
                        "{}: a client cannot be accepted: {error}",
                        self.name
                    ));
                    self.begin_ticking();
                    break;
                }
            }
        }
        count > 0
    }

    /// A client says what it wants.
    fn listen_to(&mut self, place: usize) {
        let Some(slot) = self.slots[place].as_mut() else {
            return;
        };
        let Some(socket) = slot.socket.as_ref().filter(|_| slot.readable) else {
            return;
        };
        let mut text = [0; handshake::MOST_BYTES];
        let fd = socket.as_raw_fd();
        let said = match recv(fd, &mut text, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Said::Nonsense,
            Ok(bytes) => handshake::read(&text[..bytes]),
            Err(Errno::EAGAIN | Errno::EINTR) => Said::Part,
            Err(_) => Said::Nonsense,
        };
        match said {
            Said::Part => slot.readable = false,
            Said::Nonsense => self.free(place),
            Said::Connect { port, bytes } => {
                let _ = recv(fd, &mut text[..bytes], MsgFlags::MSG_DONTWAIT);
                self.silent.retain(|other| *other != place);
                let ports = self.own_port(port);
                let connection = Connection::asked_by_host(ports);
                let slot = self.slots[place].as_mut().expect("it was there");
                slot.role = Role::Line {
                    connection,
                    until: None,
                };
                self.places.insert(ports, place);
                self.advance(place);
            }
        }
    }

    /// A port of the host that has no connection with this one of the guest.
    fn own_port(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_port;
            self.next_port = host
                .checked_add(1)
                .filter(|next| *next != u32::MAX)
                .unwrap_or(FIRST_OWN_PORT);
            let ports = Ports { guest, host };
            if !self.places.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// Whether a packet of the guest can be taken.
    pub fn takes(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// A packet of the guest. `data` is what is behind the header, or nothing if that is more than anybody may send.
    pub fn take(&mut self, header: &Header, data: &[u8]) {
        if header.source_cid != self.cid {
            // An answer would go astray too.
            return;
        }
        let ports = Ports {
            guest: header.source_port,
            host: header.destination_port,
        };
        let ours = header.destination_cid == HOST_CID && header.kind == STREAM;
        let place = self.places.get(&ports).copied().filter(|_| ours);
        match (place, header.operation) {
            (Some(place), operation) => self.take_for(place, operation, header, data),
            (None, op::REQUEST) if ours && !self.is_full() => self.connect(header),
            (None, op::RST) => {}
            (None, _) => self.refusals.push_back(header.refusal()),
        }
    }

    fn take_for(&mut self, place: usize, operation: u16, header: &Header, data: &[u8]) {
        let Some(slot) = self.slots[place].as_mut() else {
            return;
        };
        let Role::Line { connection, .. } = &mut slot.role else {
            return;
        };
        connection.heard(header);
        let done = match operation {
            op::RW if header.bytes as usize == data.len() => connection.receive(header.bytes),
            op::RESPONSE => connection.agreed().map(|()| false),
            op::CREDIT_UPDATE => Ok(false),
            op::CREDIT_REQUEST => {
                connection.credit_wanted();
                Ok(false)
            }
            op::SHUTDOWN if connection.stage() == Stage::Open => {
                if connection.end_by_guest(header.flags) {
                    return self.leave(place);
                }
                if header.flags & NO_RECEIVE != 0
                    && let Some(socket) = &slot.socket
                {
                    let _ = socket.shutdown(Shutdown::Read);
                }
                Ok(false)
            }
            op::RST => return self.end(place, false),
            // Also a shutdown of what is not open, a request for what is, and data that is longer than any may be.
            _ => return self.end(place, true),
        };
        match (done, operation, &slot.socket) {
            (Err(_), ..) => return self.end(place, true),
            (Ok(_), op::RESPONSE, Some(socket)) => {
                // The first that is written to it: there is room, or nobody.
                let answer = handshake::answer(connection.ports.host);
                if write(socket, &[IoSlice::new(answer.as_bytes())]) != Ok(answer.len()) {
                    return self.end(place, true);
                }
            }
            (Ok(true), _, Some(socket)) => {
                // At once if it can be, so that it is copied once.
                let mut taken = 0;
                if slot.writable && connection.backlog().is_empty() {
                    taken = write(socket, &[IoSlice::new(data)]).unwrap_or(0);
                    connection.passed_on(taken);
                }
                connection.put_by(&data[taken..]);
            }
            _ => {}
        }
        self.flush(place);
        self.consider(place);
    }

    /// The guest neither sends nor receives any more. It is told that this is known, and may use the ports again.
    fn leave(&mut self, place: usize) {
        let Some(slot) = self.slots[place].take() else {
            return;
        };
        let queued = slot.queued;
        if let Role::Line { mut connection, .. } = slot.role {
            self.refusals.push_back(connection.reset(self.cid));
            self.places.remove(&connection.ports);
            let rest = connection.into_backlog();
            if !rest.is_empty() {
                self.slots[place] = Some(Slot {
                    role: Role::Leaving(rest),
                    queued: false,
                    ..slot
                });
            }
        }
        if queued {
            self.ready.retain(|other| *other != place);
        }
    }

    /// The guest asks for a connection.
    fn connect(&mut self, request: &Header) {
        let connection = Connection::asked_by_guest(request);
        let ports = connection.ports;
        let until = Some(Instant::now() + CONNECT_LIMIT);
        if let Some(place) = self.fill(Slot::new(None, Role::Line { connection, until })) {
            self.places.insert(ports, place);
            self.dial(place);
        }
    }

    /// Tries to reach the host's socket of a connection.
    fn dial(&mut self, place: usize) {
        let Some(slot) = self.slots[place].as_mut() else {
            return;
        };
        let Role::Line { connection, until } = &mut slot.role else {
            return;
        };
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", connection.ports.host));
        let reached = reach(&path).and_then(|socket| watch(&self.epoll, &socket, place).map(|()| socket));
        match reached {
            Ok(socket) => {
                slot.socket = Some(socket);
                connection.connected();
                *until = None;
                self.consider(place);
            }
            // Too many wait there.
            Err(Errno::EAGAIN) if until.is_some_and(|until| Instant::now() < until) => self.begin_ticking(),
            Err(error) => {
                self.complaints.say(format_args!(
                    "{}: the guest wants to connect to port {} of the host, and {} cannot be reached: {}",
                    self.name,
                    connection.ports.host,
                    path.display(),
                    error.desc()
                ));
                self.end(place, true);
            }
        }
    }

    /// Something has to be tried again.
    fn begin_ticking(&mut self) {
        if !self.ticking {
            let soon = Expiration::OneShot(TimeSpec::from(RETRY));
            self.ticking = self.timer.set(soon, TimerSetTimeFlags::empty()).is_ok();
        }
    }

    fn tick(&mut self) {
        self.ticking = false;
        for place in 0..self.slots.len() {
            if let Some(Slot {
                role: Role::Line { connection, .. },
                ..
            }) = &self.slots[place]
                && connection.stage() == Stage::Connecting
            {
                self.dial(place);
            }
        }
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest: header and data, in at most so many bytes as the buffer has, which has room for a
    /// header and a byte at least. Returns its length; `None`: there was nothing after all.
    pub fn give(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if let Some(header) = self.refusals.pop_front() {
            return Some(put(buffer, &header));
        }
        while let Some(place) = self.ready.pop_front() {
            let Some(slot) = self.slots[place].as_mut() else {
                continue;
            };
            slot.queued = false;
            let Role::Line { connection, .. } = &mut slot.role else {
                continue;
            };
            let waiting = slot.readable && slot.socket.is_some();
            if let Some(header) = connection.next(self.cid, waiting) {
                self.consider(place);
                return Some(put(buffer, &header));
            }
            let Some(socket) = slot.socket.as_ref().filter(|_| waiting && connection.may_send()) else {
                continue;
            };
            let most = (buffer.len() - HEADER_BYTES).min(connection.credit() as usize);
            let data = &mut buffer[HEADER_BYTES..][..most];
            match recv(socket.as_raw_fd(), data, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => {
                    slot.readable = false;
                    connection.end_by_host(if slot.hung_up { NEITHER } else { NO_SEND });
                }
                Ok(bytes) => {
                    let header = connection.data(self.cid, bytes);
                    put(buffer, &header);
                    self.consider(place);
                    return Some(HEADER_BYTES + bytes);
                }
                Err(Errno::EAGAIN) => slot.readable = false,
                Err(Errno::EINTR) => {}
                // It has gone without having read all.
                Err(_) => connection.end_by_host(NEITHER),
            }
            self.flush(place);
            self.consider(place);
        }
        None
    }
}

fn put(buffer: &mut [u8], header: &Header) -> usize {
    buffer[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
    HEADER_BYTES
}
