//! The event loop: one thread that waits for everything that is not a vCPU: the console's descriptors, the devices'
//! deadlines, and signals.
//!
//! Owns: the console, the event loop's end of the character rings. Receives: [`Order`]. Posts to: the console's
//! device, the devices with deadlines, the machine. Asks: nobody. Rank: backend. Ends: on [`Order::Stop`].
//!
//! It never writes to a descriptor that is not ready, so a pipe that nobody reads or a terminal that was stopped
//! with Ctrl-S holds up the guest's output (the UART's transmitter then stays busy) and nothing else.

use super::character::{HostEnd, RING_BYTES, Waker, wake};
use super::console::Console;
use super::escape::{Command, Escape, HELP};
use super::timer::TimerSlot;
use super::{log as hostlog, terminal};
use crate::actors::{Port, Rank, RankGuard};
use crate::clock::Clock;
use crate::devices::shell::{DeviceMessage, Shell};
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use slog::{Logger, error, info};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// After the last output the loop looks for more at this interval before it rests and must be woken by a system
/// call on a vCPU's thread: a boot log costs a few hundred of those instead of tens of thousands.
const LINGER: Duration = Duration::from_millis(4);

/// How often to look whether somebody has opened the pseudo-terminal again.
const PTY_LOOK: Duration = Duration::from_millis(100);

/// At most this much is written at once: what a pipe that polls as writable takes without blocking (PIPE_BUF,
/// [POSIX pipe(7)]).
const WRITE_BYTES: usize = 4096;

/// What the event loop tells the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostEvent {
    /// One of INT, TERM, HUP, QUIT came.
    Signal(i32),
    /// Somebody typed Ctrl-A x.
    Quit,
}

/// What the machine tells the event loop.
enum Order {
    /// Write what is left, for at most this long, then end.
    Stop(Duration),
}

/// The machine's hold of the event loop.
pub struct EventLoopHandle {
    orders: Sender<Order>,
    waker: Waker,
    ended: Receiver<()>,
}

impl EventLoopHandle {
    /// Ends the loop: what devices have sent is written first if that takes no longer than `limit`.
    pub fn stop(&self, limit: Duration) {
        if self.orders.try_send(Order::Stop(limit)).is_ok() {
            wake(&self.waker);
        }
        let _ = self.ended.recv_timeout(limit + Duration::from_millis(200));
    }
}

/// The console's device, as the loop sees it.
pub struct ConsoleDevice {
    /// The rings.
    pub end: HostEnd,
    /// Where to tell that there is input or room.
    pub port: Port<Shell>,
}

/// A device with deadlines, as the loop sees it.
pub struct TimedDevice {
    /// When.
    pub slot: TimerSlot,
    /// Whom to tell.
    pub port: Port<Shell>,
}

/// What the loop is made of.
pub struct EventLoop {
    /// Guest time.
    pub clock: Clock,
    /// What devices wake it with.
    pub waker: Waker,
    /// Where the console goes.
    pub console: Console,
    /// Whose console it is.
    pub device: Option<ConsoleDevice>,
    /// Devices with deadlines.
    pub timed: Vec<TimedDevice>,
    /// Where signals and escapes go. Must not wait for long.
    pub machine: Box<dyn Fn(HostEvent) + Send>,
    /// For what goes wrong with the console.
    pub log: Logger,
}

/// The signals that end the machine.
const ENDING: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

type Signals = SignalDelivery<UnixStream, SignalOnly>;

/// Starts to collect signals. Before any thread is started that could be killed by one.
///
/// # Errors
/// What the host says.
pub fn collect_signals() -> std::io::Result<Signals> {
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    SignalDelivery::with_pipe(read, write, SignalOnly, ENDING)
}

impl EventLoop {
    /// Starts the loop's thread.
    ///
    /// # Errors
    /// When the host cannot start a thread.
    pub fn start(self, signals: Signals) -> std::io::Result<EventLoopHandle> {
        // One order, ever.
        let (orders, inbox) = bounded(1);
        let (tell, ended) = bounded(1);
        let waker = self.waker.clone();
        std::thread::Builder::new().name("events".into()).spawn(move || {
            let _rank = RankGuard::enter(Rank::Backend);
            Running {
                outside: self,
                inbox,
                escape: Escape::default(),
                typed: Vec::new(),
                last_output: None,
                connected: true,
                input_posted: true,
                output_posted: true,
                until: None,
            }
            .run(signals);
            let _ = tell.send(());
        })?;
        Ok(EventLoopHandle { orders, waker, ended })
    }
}

/// The loop while it runs.
struct Running {
    outside: EventLoop,
    inbox: Receiver<Order>,
    escape: Escape,
    /// Typed, but not yet in the ring.
    typed: Vec<u8>,
    /// When output last came; lingers after it.
    last_output: Option<Instant>,
    /// Somebody is on the other side of the pseudo-terminal.
    connected: bool,
    /// Whether the device has been told of the input, or of the room, that there is. If its mailbox had no credit,
    /// it has not.
    input_posted: bool,
    output_posted: bool,
    /// Stopping: until when.
    until: Option<Instant>,
}

impl Running {
    fn run(mut self, mut signals: Signals) {
        loop {
            if let Ok(Order::Stop(limit)) = self.inbox.try_recv() {
                self.until = Some(Instant::now() + limit);
            }
            self.deliver();
            let waiting = self
                .outside
                .device
                .as_ref()
                .is_some_and(|device| device.end.has_output());
            if let Some(until) = self.until
                && (!waiting || self.outside.console.output().is_none() || Instant::now() >= until)
            {
                return;
            }
            self.sleep(&mut signals, waiting);
        }
    }

    /// Due ticks, and news for the console's device that could not be delivered before.
    fn deliver(&mut self) {
        let now = self.outside.clock.now();
        for timed in &mut self.outside.timed {
            if timed.slot.take_due(now)
                && timed.port.try_post(DeviceMessage::Tick) == Err(Some(DeviceMessage::Tick))
            {
                // No credit: the device is busy. Again when it may have one.
                timed.slot.set(Some(crate::devices::Nanos(now.0 + 1_000_000)));
            }
        }
        self.give_typed();
        let Some(device) = &mut self.outside.device else {
            return;
        };
        if device.end.wants_output_ready() {
            self.output_posted = false;
        }
        if !self.output_posted {
            self.output_posted = !matches!(device.port.try_post(DeviceMessage::OutputReady), Err(Some(_)));
        }
        if !self.input_posted {
            self.input_posted = !matches!(device.port.try_post(DeviceMessage::InputReady), Err(Some(_)));
        }
    }

    /// Typed bytes into the ring.
    fn give_typed(&mut self) {
        if self.typed.is_empty() {
            return;
        }
        let Some(device) = &mut self.outside.device else {
            self.typed.clear();
            return;
        };
        let given = device.end.give(&self.typed);
        self.typed.drain(..given);
        self.input_posted &= given == 0;
    }

    /// Sleeps until something happens, and takes what came through descriptors.
    fn sleep(&mut self, signals: &mut Signals, waiting: bool) {
        let timeout = self.timeout(waiting);
        let console = &self.outside.console;
        // What cannot be taken is not asked for: back-pressure to whoever types or pastes.
        let input = console
            .input()
            .filter(|_| self.typed.is_empty() && self.until.is_none());
        let output = console.output().filter(|_| waiting && self.connected);
        // SAFETY: the descriptor belongs to `signals`, which outlives the poll.
        let signal_fd = unsafe { BorrowedFd::borrow_raw(signals.get_read().as_raw_fd()) };
        // SAFETY: as above, with the waker, an Arc held by `self`.
        let waker_fd = unsafe { BorrowedFd::borrow_raw(self.outside.waker.as_raw_fd()) };
        let mut polled = vec![
            PollFd::new(waker_fd, PollFlags::POLLIN),
            PollFd::new(signal_fd, PollFlags::POLLIN),
        ];
        // A pseudo-terminal that nobody has opened would report that for ever; it is looked at now and then.
        let input_at = input.filter(|_| self.connected).map(|fd| {
            polled.push(PollFd::new(fd, PollFlags::POLLIN));
            polled.len() - 1
        });
        let output_at = output.map(|fd| {
            polled.push(PollFd::new(fd, PollFlags::POLLOUT));
            polled.len() - 1
        });
        let ready = match ppoll(&mut polled, timeout.map(TimeSpec::from), None::<SigSet>) {
            Ok(ready) => ready > 0,
            Err(Errno::EINTR) => false,
            Err(error) => {
                error!(self.outside.log, "the event loop cannot wait"; "error" => error.desc());
                std::thread::sleep(LINGER);
                false
            }
        };
        let revents = |at: Option<usize>| {
            at.filter(|_| ready)
                .and_then(|at| polled[at].revents())
                .unwrap_or(PollFlags::empty())
        };
        let (woken, signalled) = (revents(Some(0)), revents(Some(1)));
        let (readable, writable) = (revents(input_at), revents(output_at));
        drop(polled);

        if let Some(device) = &self.outside.device {
            device.end.up();
        }
        if !woken.is_empty() {
            let _ = self.outside.waker.read();
        }
        if !signalled.is_empty() {
            for signal in signals.pending() {
                (self.outside.machine)(HostEvent::Signal(signal));
            }
        }
        if self.outside.console.comes_and_goes {
            self.look_for_peer();
        }
        if !readable.is_empty() && self.connected {
            self.read_input();
        }
        if !writable.is_empty() || (waiting && (self.outside.console.output().is_none() || !self.connected)) {
            self.write_output();
        }
    }

    /// How long to sleep: `None` for as long as nothing happens.
    fn timeout(&mut self, waiting: bool) -> Option<Duration> {
        let mut wanted: Vec<Duration> = Vec::with_capacity(4);
        let now = self.outside.clock.now();
        for timed in &self.outside.timed {
            if let Some(deadline) = timed.slot.deadline() {
                wanted.push(Duration::from_nanos(deadline.0.saturating_sub(now.0)));
            }
        }
        if !self.input_posted || !self.output_posted {
            wanted.push(Duration::from_millis(1));
        }
        if let Some(until) = self.until {
            wanted.push(until.saturating_duration_since(Instant::now()));
        }
        if self.outside.console.comes_and_goes && !self.connected {
            wanted.push(PTY_LOOK);
        }
        if waiting && self.outside.console.output().is_none() {
            wanted.push(Duration::ZERO);
        }
        if !waiting && let Some(device) = &self.outside.device {
            let lingers = self.last_output.is_some_and(|last| last.elapsed() < LINGER);
            if lingers {
                wanted.push(LINGER);
            } else if !device.end.rest() {
                wanted.push(Duration::ZERO);
            }
        }
        wanted.into_iter().min()
    }

    /// Whether somebody is on the other side of the pseudo-terminal.
    fn look_for_peer(&mut self) {
        let Some(fd) = self.outside.console.input() else {
            return;
        };
        let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
        let hung_up = matches!(
            ppoll(&mut polled, Some(TimeSpec::from(Duration::ZERO)), None::<SigSet>),
            Ok(1..)
        ) && polled[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP));
        self.connected = !hung_up;
    }

    fn read_input(&mut self) {
        let Some(fd) = self.outside.console.input() else {
            return;
        };
        let mut bytes = [0; RING_BYTES / 2];
        match nix::unistd::read(fd, &mut bytes) {
            Ok(0) => self.outside.console.close_input(),
            Ok(length) => {
                for byte in &bytes[..length] {
                    if !self.outside.console.interactive {
                        self.typed.push(*byte);
                    } else if let Some(command) = self.escape.feed(*byte, &mut self.typed) {
                        match command {
                            Command::Quit => (self.outside.machine)(HostEvent::Quit),
                            Command::Help => hostlog::print(HELP.trim_end()),
                        }
                    }
                }
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            // The other side of a pseudo-terminal has gone; `look_for_peer` sees to it.
            Err(Errno::EIO) if self.outside.console.comes_and_goes => {}
            Err(error) => {
                info!(self.outside.log, "no more console input"; "error" => error.desc());
                self.outside.console.close_input();
            }
        }
    }

    fn write_output(&mut self) {
        let Some(device) = &mut self.outside.device else {
            return;
        };
        self.last_output = Some(Instant::now());
        let chunk = device.end.output();
        let (first, _) = chunk.as_slices();
        let bytes = &first[..first.len().min(WRITE_BYTES)];
        let Some(fd) = self.outside.console.output().filter(|_| self.connected) else {
            // Nobody listens: the bytes are gone, as on a wire that is not plugged in.
            chunk.commit_all();
            return;
        };
        match nix::unistd::write(fd, bytes) {
            Ok(written) => chunk.commit(written),
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(error) => {
                let name = &self.outside.console.name;
                let message = format!(
                    "the console's output to {name} is lost from here on: {}",
                    error.desc()
                );
                error!(self.outside.log, "{message}");
                chunk.commit_all();
                self.outside.console.close_output();
            }
        }
    }
}

/// The terminal is raw while the guest has it.
pub fn take_terminal(console: &Console) -> Option<terminal::Raw> {
    if console.interactive {
        terminal::Raw::enter()
    } else {
        None
    }
}
