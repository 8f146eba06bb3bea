//! The control thread: signals, and the clients of the control socket.
//!
//! Owns: the socket, the clients, the signals' pipe. Receives: descriptors, answers of the machine actor, one order to
//! end. Asks: nobody: it sends requests to the machine actor, and the answers come as messages. Rank: backend. Ends: on
//! the machine's order.
//!
//! A client that is broken, slow or silent is its own problem: what is not a request is answered as such, one that does
//! not read is not read from, and the one that has been silent longest makes room when there are too many.

use super::lines::{Lines, Next};
use super::observatory::{GLANCE, Observatory};
use super::verbs::{self, Class, Id};
use crate::actors::{Rank, RankGuard};
use crate::host::bus::MemoryWatch;
use crate::host::character::{Waker, wake};
use crate::host::events::HostEvent;
use crate::host::signals::{self, Signals};
use crate::host::socket::OwnedSocket;
use crate::host::terminal;
use crate::machine::request::{Answer, MachineAddress, Reply};
use crate::vcpu::kick::KickHandle;
use crate::virtio::console::SizeSwitch;
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use slog::{Logger, debug, error, warn};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Clients at once.
pub const CLIENTS: usize = 16;
/// Answers of the machine actor that wait for this thread: all that can be under way.
const ANSWERS: usize = CLIENTS * super::lines::IN_FLIGHT + CLIENTS;
/// How long clients may take at the end to read what was said to them.
pub const LAST_WORDS: Duration = Duration::from_millis(150);

/// What the control thread is made of.
pub struct Plane {
    /// Where signals arrive.
    pub signals: Signals,
    /// The control socket, if there is one.
    pub socket: Option<OwnedSocket>,
    /// The machine actor.
    pub machine: MachineAddress,
    /// Where to look.
    pub observatory: Observatory,
    /// Of all vCPUs.
    pub kicks: Vec<KickHandle>,
    /// Guest memory, if there is any.
    pub memory: Option<Arc<MemoryWatch>>,
    /// The size of the guest's terminal, if it is this one.
    pub size: Option<SizeSwitch>,
    /// For what goes wrong.
    pub log: Logger,
}

/// The machine's hold of the control thread.
pub struct PlaneHandle {
    orders: Sender<()>,
    waker: Waker,
    thread: std::thread::JoinHandle<()>,
}

impl PlaneHandle {
    /// Ends it; its socket's name is gone when this returns.
    pub fn stop(self) {
        if self.orders.try_send(()).is_ok() {
            wake(&self.waker);
        }
        // It waits for nobody, so this is soon.
        let _ = self.thread.join();
    }
}

impl Plane {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the host gives no thread or no eventfd.
    pub fn start(self) -> std::io::Result<PlaneHandle> {
        let waker: Waker = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
        let (orders, inbox) = bounded(1);
        let own = waker.clone();
        if let Some(memory) = &self.memory {
            memory.wake(waker.as_raw_fd());
        }
        let thread = crate::thread::spawn("control", move || {
            let _rank = RankGuard::enter(Rank::Backend);
            if let Some(socket) = &self.socket {
                // Without this a client that comes would make accept wait if it left again.
                let _ = socket.listener().set_nonblocking(true);
            }
            Running {
                plane: self,
                waker: own,
                inbox,
                answers: bounded(ANSWERS),
                clients: Vec::new(),
                next: 0,
                told_bus: false,
                glanced: Instant::now(),
            }
            .run();
        })?;
        Ok(PlaneHandle {
            orders,
            waker,
            thread,
        })
    }
}

/// An answer of the machine actor's, for which client and which of its requests.
struct Answered {
    client: u64,
    id: Id,
    said: Answer,
}

struct Client {
    number: u64,
    stream: UnixStream,
    lines: Lines,
    /// When it last asked for something.
    heard: Instant,
    /// It has hung up, or cannot be written to.
    broken: bool,
}

struct Running {
    plane: Plane,
    waker: Waker,
    inbox: Receiver<()>,
    answers: (Sender<Answered>, Receiver<Answered>),
    clients: Vec<Client>,
    /// Number of the next client.
    next: u64,
    told_bus: bool,
    /// When it was last looked where threads are.
    glanced: Instant,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(memory) = &self.plane.memory {
            memory.wake(-1);
        }
        // Without it no signal would be heard, and nothing could end the machine but SIGKILL.
        if std::thread::panicking() {
            self.plane.machine.host(HostEvent::Died);
        }
    }
}

impl Running {
    fn run(mut self) {
        let mut until = None;
        loop {
            if self.inbox.try_recv().is_ok() {
                until = Some(Instant::now() + LAST_WORDS);
                // What is under way is answered by its end.
                self.plane.socket = None;
            }
            if let Some(until) = until {
                self.give_answers();
                let unread = self
                    .clients
                    .iter()
                    .any(|client| !client.lines.output().is_empty());
                if !unread || Instant::now() >= until {
                    return;
                }
            }
            self.wait(until);
            self.glance();
            self.hear_signals();
            self.give_answers();
            self.accept();
            for index in 0..self.clients.len() {
                self.serve(index);
            }
            self.clients
                .retain(|client| !client.broken && !client.lines.is_over());
        }
    }

    /// Sleeps until something happens.
    fn wait(&self, until: Option<Instant>) {
        // SAFETY: the descriptor belongs to `signals`, which outlives the poll.
        let signal_fd = unsafe { BorrowedFd::borrow_raw(self.plane.signals.get_read().as_raw_fd()) };
        // SAFETY: as above, with the waker, an Arc held by `self`.
        let waker_fd = unsafe { BorrowedFd::borrow_raw(self.waker.as_raw_fd()) };
        let mut polled = vec![
            PollFd::new(waker_fd, PollFlags::POLLIN),
            PollFd::new(signal_fd, PollFlags::POLLIN),
        ];
        if let Some(socket) = &self.plane.socket {
            polled.push(PollFd::new(socket.listener().as_fd(), PollFlags::POLLIN));
        }
        for client in &self.clients {
            let mut flags = PollFlags::empty();
            if client.lines.wants_input() && until.is_none() {
                flags |= PollFlags::POLLIN;
            }
            if !client.lines.output().is_empty() {
                flags |= PollFlags::POLLOUT;
            }
            // One that is only waited for is not looked at: if it has hung up, poll would say so again and again.
            if flags.is_empty() {
                continue;
            }
            polled.push(PollFd::new(client.stream.as_fd(), flags));
        }
        let until = until.unwrap_or(self.glanced + self.glance_every());
        let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut polled, limit) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                error!(self.plane.log, "the control thread cannot wait: {}", error.desc());
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let _ = self.waker.read();
    }

    fn glance(&mut self) {
        let now = Instant::now();
        if now.saturating_duration_since(self.glanced) >= self.glance_every() {
            self.glanced = now;
            self.plane.observatory.glance();
        }
    }

    /// Without a socket only USR1 asks how long something has lasted.
    fn glance_every(&self) -> Duration {
        if self.plane.socket.is_some() {
            GLANCE
        } else {
            GLANCE * 10
        }
    }

    fn hear_signals(&mut self) {
        for signal in self.plane.signals.pending() {
            if signals::ends(signal) {
                self.plane.machine.host(HostEvent::Signal(signal));
            } else if signal == libc::SIGWINCH {
                if let (Some(size), Some((columns, rows))) = (&self.plane.size, terminal::size()) {
                    size.set(columns, rows);
                }
            } else {
                // In one record, which has one place in the log's queue however many vCPUs there are.
                let lines = self.plane.observatory.look().graph().lines;
                warn!(self.plane.log, "asked by a signal:\n  {}", lines.join("\n  "));
            }
        }
        let fault = self.plane.memory.as_ref().and_then(|memory| memory.fault());
        if let Some(address) = fault.filter(|_| !self.told_bus) {
            self.told_bus = true;
            self.plane.machine.host(HostEvent::MemoryGone(address));
        }
    }

    fn give_answers(&mut self) {
        for Answered { client, id, said } in self.answers.1.try_iter() {
            // One that has left does not care.
            if let Some(client) = self.clients.iter_mut().find(|other| other.number == client) {
                client.lines.answer(&verbs::answered(id, said).to_string());
            }
        }
    }

    fn accept(&mut self) {
        let Some(socket) = &self.plane.socket else { return };
        loop {
            let stream = match socket.listener().accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    debug!(self.plane.log, "a client of the control socket is lost: {error}");
                    return;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.clients.len() >= CLIENTS {
                // The one that has asked for nothing for the longest time, if it waits for nothing.
                let idle = self.clients.iter().enumerate();
                let idle = idle.filter(|(_, client)| client.lines.is_idle());
                match idle
                    .min_by_key(|(_, client)| client.heard)
                    .map(|(index, _)| index)
                {
                    Some(index) => drop(self.clients.swap_remove(index)),
                    None => continue,
                }
            }
            self.clients.push(Client {
                number: self.next,
                stream,
                lines: Lines::default(),
                heard: Instant::now(),
                broken: false,
            });
            self.next += 1;
        }
    }

    /// Reads, answers and writes as much as one client takes now.
    fn serve(&mut self, index: usize) {
        let ending = self.plane.socket.is_none();
        self.clients[index].read(ending);
        loop {
            self.answer_all(index);
            // What came first and found no room for its answers has it when these are written; nothing else will wake us for it.
            let client = &mut self.clients[index];
            let unread = client.lines.output().len();
            client.write();
            if client.broken || unread == 0 || !client.lines.output().is_empty() {
                return;
            }
        }
    }

    /// Takes requests of a client for as long as there are any, and room for the answers.
    fn answer_all(&mut self, index: usize) {
        loop {
            let (number, next) = {
                let client = &mut self.clients[index];
                (client.number, client.lines.take())
            };
            match next {
                Next::Nothing => break,
                Next::TooLong => {
                    let text = format!("a request has at most {} bytes", super::lines::LINE_BYTES);
                    let client = &mut self.clients[index];
                    client
                        .lines
                        .say(&verbs::error(None, "too-long", text).to_string());
                    client.lines.close();
                }
                Next::Line(line) => {
                    self.clients[index].heard = Instant::now();
                    if let Some(answer) = self.perform(number, &line) {
                        self.clients[index].lines.answer(&answer);
                    }
                }
            }
        }
    }

    /// Does what a line says. `None`: the answer comes later.
    fn perform(&mut self, client: u64, line: &[u8]) -> Option<String> {
        let (verb, class, id) = match verbs::parse(line) {
            Ok(parsed) => parsed,
            Err(answer) => return Some(answer.to_string()),
        };
        match class {
            Class::Look => {
                let answer = verbs::look(verb, id, &mut self.plane.observatory, &self.plane.kicks);
                Some(answer.to_string())
            }
            Class::Ask(command) => {
                debug!(self.plane.log, "control: {}", verb.name());
                let (answers, waker) = (self.answers.0.clone(), self.waker.clone());
                let reply = Reply::new(move |said| {
                    // There is room for all that are under way.
                    let _ = answers.try_send(Answered { client, id, said });
                    wake(&waker);
                });
                self.plane.machine.request(command, reply);
                None
            }
        }
    }
}

impl Client {
    fn read(&mut self, ending: bool) {
        let mut bytes = [0; 4096];
        // A few times: one that sends without end must leave a turn to the others.
        for _ in 0..4 {
            if !self.lines.wants_input() || ending {
                return;
            }
            match self.stream.read(&mut bytes) {
                // It may have shut down one way only, and still wants its answers.
                Ok(0) => return self.lines.end(),
                Ok(length) => self.lines.push(&bytes[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.broken = true;
                    return;
                }
            }
            if self.lines.has_line() {
                return;
            }
        }
    }

    fn write(&mut self) {
        while !self.lines.output().is_empty() {
            match self.stream.write(self.lines.output()) {
                Ok(written) => self.lines.written(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.broken = true;
                    return;
                }
            }
        }
    }
}
