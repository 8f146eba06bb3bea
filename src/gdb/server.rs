//! The gdb server's thread: a listening socket, one connection at most, and the machine's news, in one poll.
//!
//! Owns: the sockets, the session, the breakpoints. Receives: [`News`], and what gdb sends. Asks: the machine actor and
//! vCPUs; nobody asks it. Rank: supervisor. Ends: with the machine.
//!
//! Whoever can connect can do anything with the guest. So a port is one of the loopback interface, and a socket in the
//! file system is the user's alone (mode 0600). A gdb that misbehaves or vanishes is disconnected; what it has planted
//! is taken out, and the machine goes on.

use super::breakpoints::Abilities;
use super::probe;
use super::remote::{News, NewsAddress, Remote, news};
use super::session::{Over, Session};
use super::target::{Debugged, Debuggee as _, Ended};
use crate::host::socket::{OwnedSocket, SocketError};
use crate::machine::request::MachineAddress;
use crate::machine::vm::VmError;
use crate::vcpu::VcpuHandle;
use crossbeam_channel::Receiver;
use gdbstub::conn::Connection;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use slog::{Logger, error, info, warn};
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// How long gdb may take to read an answer.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// `--gdb`: where a gdb can connect, and whether the guest waits for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GdbConfig {
    /// Where.
    pub place: GdbPlace,
    /// The machine stands before its first instruction until gdb lets it go.
    pub wait: bool,
}

/// Where a gdb can connect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GdbPlace {
    /// A TCP port of 127.0.0.1; 0 is any that is free.
    Port(u16),
    /// A Unix socket.
    Path(PathBuf),
}

impl FromStr for GdbConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (place, wait) = match text.strip_suffix(",wait") {
            Some(place) => (place, true),
            None => (text, false),
        };
        let place = if place.is_empty() {
            return Err("expected a port or the path of a socket, as 1234 or ./gdb.sock".into());
        } else if place.bytes().all(|byte| byte.is_ascii_digit()) {
            GdbPlace::Port(place.parse().map_err(|_| "a port is at most 65535".to_string())?)
        } else {
            GdbPlace::Path(place.into())
        };
        Ok(GdbConfig { place, wait })
    }
}

impl fmt::Display for GdbPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GdbPlace::Port(port) => write!(f, "127.0.0.1:{port}"),
            GdbPlace::Path(path) => path.display().fmt(f),
        }
    }
}

/// Nobody can connect there.
#[derive(Debug, thiserror::Error)]
pub enum GdbError {
    /// A port.
    #[error(
        "--gdb {port}: somebody listens at that port already; choose another one, or 0 for any that is free"
    )]
    InUse {
        /// As given.
        port: u16,
    },
    /// A port that the host does not give.
    #[error("--gdb {port}: the host does not let us listen there; choose another port")]
    Port {
        /// As given.
        port: u16,
        /// What it says.
        source: io::Error,
    },
    /// A socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

impl GdbError {
    /// Whether the user can mend it with another place.
    pub fn is_bad_input(&self) -> bool {
        match self {
            GdbError::InUse { .. } => true,
            GdbError::Port { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            GdbError::Socket(error) => error.is_bad_input(),
        }
    }
}

/// gdbs that wait to be accepted.
const BACKLOG: i32 = 4;

enum Socket {
    Tcp(TcpListener),
    Unix(OwnedSocket),
}

/// A socket that listens. Its file, if it has one, is removed with it.
pub struct Listener {
    socket: Socket,
    place: GdbPlace,
    wait: bool,
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// See [`GdbError`].
    pub fn new(config: &GdbConfig) -> Result<Listener, GdbError> {
        let (socket, place) = match &config.place {
            &GdbPlace::Port(port) => {
                let told = |source: io::Error| match source.kind() {
                    io::ErrorKind::AddrInUse => GdbError::InUse { port },
                    _ => GdbError::Port { port, source },
                };
                let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(told)?;
                socket.set_nonblocking(true).map_err(told)?;
                let port = socket.local_addr().map_err(told)?.port();
                (Socket::Tcp(socket), GdbPlace::Port(port))
            }
            GdbPlace::Path(path) => {
                let socket = OwnedSocket::bind("--gdb ", path, BACKLOG)?;
                (Socket::Unix(socket), config.place.clone())
            }
        };
        Ok(Listener {
            socket,
            place,
            wait: config.wait,
        })
    }

    fn accept(&self) -> io::Result<Link> {
        let stream = match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept()?;
                // Packets are small, and each is waited for.
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(WRITE_LIMIT))?;
                Stream::Tcp(stream)
            }
            Socket::Unix(socket) => {
                let (stream, _) = socket.listener().accept()?;
                stream.set_write_timeout(Some(WRITE_LIMIT))?;
                Stream::Unix(stream)
            }
        };
        Ok(Link {
            stream: Arc::new(stream),
            pending: Vec::new(),
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket) => socket.listener().as_fd(),
        }
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn read(&self, data: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&*stream).read(data),
            Stream::Unix(stream) => (&*stream).read(data),
        }
    }

    fn write(&self, data: &[u8]) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => (&*stream).write_all(data),
            Stream::Unix(stream) => (&*stream).write_all(data),
        }
    }
}

/// A connection, as gdbstub writes to it: by packets, not by bytes.
struct Link {
    stream: Arc<Stream>,
    pending: Vec<u8>,
}

/// A packet that is longer than this is sent in parts: gdb may ask for as much as it likes.
const PENDING: usize = 16 << 10;

impl Connection for Link {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.pending.push(byte);
        if self.pending.len() >= PENDING {
            return Connection::flush(self);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.stream.write(&self.pending);
        self.pending.clear();
        result
    }
}

/// The machine's hold of the server.
pub struct GdbHandle {
    address: NewsAddress,
    /// Nothing comes here but its end.
    over: Receiver<()>,
}

impl GdbHandle {
    /// A vCPU has news for the debugger.
    pub fn stopped(&self, vcpu: usize, stop: crate::vcpu::debug::DebugStop) {
        self.address.tell(News::Stopped(vcpu, stop));
    }

    /// The machine has ended. gdb has a moment to be told.
    pub fn end(self, status: u8, until: Instant) {
        self.address.tell(News::Ended(status));
        let _ = self.over.recv_deadline(until);
    }
}

/// A server before there is a machine.
pub struct Server {
    listener: Listener,
    abilities: Abilities,
    memory: GuestMemoryMmap,
}

impl Server {
    /// Finds out what the host can, and tells what it cannot.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn new(listener: Listener, memory: GuestMemoryMmap) -> Result<Server, VmError> {
        let abilities = probe::abilities()?;
        for caveat in abilities.caveats() {
            crate::host::log::print(&format!("gdb: on this host, {caveat}"));
        }
        Ok(Server {
            listener,
            abilities,
            memory,
        })
    }

    /// Starts the server of a machine whose vCPUs are ready and have not started. When this returns they are held, if
    /// they are to wait.
    ///
    /// # Errors
    /// When the host gives no eventfd or thread.
    pub fn start(
        self,
        machine: MachineAddress,
        vcpus: Vec<VcpuHandle>,
        log: &Logger,
    ) -> io::Result<GdbHandle> {
        let (address, receiver, waker) = news(vcpus.len())?;
        let remote = Remote::new(machine, vcpus, self.memory, address.clone(), receiver);
        let mut debugged = Debugged::new(remote, self.abilities, log.clone());
        let (place, wait) = (&self.listener.place, self.listener.wait);
        if wait {
            debugged.hold();
        }
        let does = if wait {
            "the guest waits for gdb at"
        } else {
            "listening at"
        };
        // A person must find it whatever the log level is.
        crate::host::log::print(&format!("gdb: {does} {place}"));
        let (running, over) = crossbeam_channel::bounded(0);
        let server = Running {
            listener: self.listener,
            debugged,
            waker,
            log: log.clone(),
        };
        crate::thread::spawn("gdb", move || {
            server.run();
            drop(running);
        })?;
        Ok(GdbHandle { address, over })
    }
}

struct Running {
    listener: Listener,
    debugged: Debugged<Remote>,
    waker: Arc<EventFd>,
    log: Logger,
}

impl Running {
    fn run(mut self) {
        let life = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.serve()));
        if life.is_err() {
            error!(
                self.log,
                "the gdb server died, which is a bug; the machine goes on without"
            );
            // What is planted cannot be taken out any more by who knew it; but nothing waits for gdb.
            let _ = self.debugged.machine.resume();
        }
    }

    fn serve(&mut self) {
        if self.listener.wait {
            // The vCPUs are held; now the machine knows that it stands.
            let _ = self.debugged.halt();
        }
        while self.debugged.machine.look().is_none() {
            ready(&self.waker, &self.listener, None);
            // Who has gone again meanwhile is no error.
            if let Ok(link) = self.listener.accept() {
                self.session(link);
            }
        }
    }

    fn session(&mut self, link: Link) {
        info!(self.log, "gdb has connected; the machine stands");
        let stream = link.stream.clone();
        let over = match Session::new(&mut self.debugged, link) {
            Ok(session) => Self::converse(session, &stream, &self.listener, &self.waker),
            Err(over) => over,
        };
        match over {
            Over::Ended => return,
            Over::Kill => {
                info!(self.log, "gdb ends the machine");
                self.debugged.machine.kill();
                return;
            }
            Over::Detached => info!(self.log, "gdb has detached"),
            Over::Failed(why) => warn!(self.log, "gdb is gone ({why})"),
        }
        match self.debugged.release() {
            Ok(true) => info!(self.log, "the machine goes on without gdb"),
            Ok(false) => info!(
                self.log,
                "the machine stays paused without gdb: its controller has paused it"
            ),
            Err(Ended) => {}
        }
    }

    /// Until it is over.
    fn converse(
        mut session: Session<'_, Remote, Link>,
        stream: &Stream,
        listener: &Listener,
        waker: &EventFd,
    ) -> Over {
        loop {
            if let Some(status) = session.machine().look() {
                session.ended(status);
                return Over::Ended;
            }
            if let Err(over) = session.look() {
                return over;
            }
            let readable = ready(waker, listener, Some(stream));
            if !readable {
                // One at a time: a second one is told so by its end of the line.
                drop(listener.accept());
                continue;
            }
            let mut data = [0; 4096];
            match stream.read(&mut data) {
                Ok(0) => return Over::Failed("it closed the connection".into()),
                Ok(count) => {
                    if let Err(over) = session.received(&data[..count]) {
                        return over;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Over::Failed(error.to_string()),
            }
        }
    }
}

/// Sleeps until there is news, a connection, or something from gdb. Whether it is the last.
fn ready(waker: &EventFd, listener: &Listener, stream: Option<&Stream>) -> bool {
    let mut fds = vec![
        PollFd::new(waker.as_fd(), PollFlags::POLLIN),
        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
    ];
    if let Some(stream) = stream {
        let fd = match stream {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        };
        fds.push(PollFd::new(fd, PollFlags::POLLIN));
    }
    // Interrupted: everything is looked at again anyway.
    let _ = poll(&mut fds, PollTimeout::NONE);
    let readable = fds.get(2).is_some_and(|fd| fd.any() == Some(true));
    // Before the news are looked at: what comes later wakes again.
    let _ = waker.read();
    readable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let parse = |text: &str| text.parse::<GdbConfig>();
        assert_eq!(
            parse("1234"),
            Ok(GdbConfig {
                place: GdbPlace::Port(1234),
                wait: false
            })
        );
        assert_eq!(
            parse("/run/gdb,wait"),
            Ok(GdbConfig {
                place: GdbPlace::Path("/run/gdb".into()),
                wait: true
            })
        );
        for wrong in ["", ",wait", "65536", "99999999999999999999"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
