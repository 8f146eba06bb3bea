//! The event loop: one thread that waits for the console's descriptors and the devices' deadlines. It runs devices'
//! turns, so it may be stuck in one; what must be heard even then (signals, control) is the control thread's.
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
use crate::devices::Nanos;
use crate::devices::shell::{DeviceMessage, Shell};
use crate::vcpu::activity::Activity;
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;
use slog::{Logger, error, info, warn};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// After the last output the loop looks for more at this interval before it rests and must be woken by a system
/// call on a vCPU's thread: a boot log costs a few hundred of those instead of tens of thousands.
const LINGER: Duration = Duration::from_millis(4);

/// How often to look whether somebody has opened the pseudo-terminal again.
const PTY_LOOK: Duration = Duration::from_millis(100);

/// At most this much is written at once: what a pipe that polls as writable takes without blocking (PIPE_BUF,
/// [POSIX pipe(7)]).
const WRITE_BYTES: usize = 4096;

/// What the event loop and the control thread tell the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostEvent {
    /// One of INT, TERM, HUP, QUIT came.
    Signal(i32),
    /// Somebody typed Ctrl-A x.
    Quit,
    /// The host could not provide guest memory at this guest physical address, and a vCPU's thread is stopped there.
    MemoryGone(u64),
    /// The event loop or the control thread panicked: a bug of ours.
    Died,
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
    /// Tells the loop to end: what devices have sent is written first if that takes no longer than `limit`.
    pub fn stop(&self, limit: Duration) {
        if self.orders.try_send(Order::Stop(limit)).is_ok() {
            wake(&self.waker);
        }
    }

    /// Of a loop that somebody else plays: gets the order to stop, and tells when it has.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn played(waker: Waker) -> (EventLoopHandle, impl Fn() -> bool, Sender<()>) {
        let (orders, inbox) = bounded(1);
        let (tell, ended) = bounded(1);
        let handle = EventLoopHandle { orders, waker, ended };
        (handle, move || !inbox.is_empty(), tell)
    }

    /// Gets one message when the loop has ended.
    pub fn ended(&self) -> &Receiver<()> {
        &self.ended
    }
}

/// A character device and where its bytes go.
pub struct CharacterDevice {
    /// The host side.
    pub console: Console,
    /// The rings.
    pub end: HostEnd,
    /// Whom to tell that there is input or room.
    pub recipient: Recipient,
}

/// Who is told of input and of room for output.
pub enum Recipient {
    /// The device with this number.
    Device(usize),
    /// Actors of their own, who sleep on these.
    Actors {
        /// Written when there is input.
        input: Waker,
        /// Written when there is room.
        room: Waker,
    },
}

/// A device with deadlines, as the loop sees it.
pub struct TimedDevice {
    /// When.
    pub slot: TimerSlot,
    /// Whom to tell: the device's number.
    pub device: usize,
}

/// The loop's way to the devices.
pub trait Gate: Send {
    /// Calls `work` with it. Whatever a discipline of dispatch wants held while the event loop does its work (nothing,
    /// or QEMU's lock) is held meanwhile, and never while the loop sleeps.
    fn with(&mut self, work: &mut dyn FnMut(&mut dyn Deliver));
}

/// Says something to a device.
pub trait Deliver {
    /// `false`: not now, the device's mailbox is full.
    fn try_send(&mut self, device: usize, message: DeviceMessage) -> bool;
}

/// By messages: a port of the loop's own to each device. Nothing is held.
impl Gate for Vec<Port<Shell>> {
    fn with(&mut self, work: &mut dyn FnMut(&mut dyn Deliver)) {
        work(self);
    }
}

impl Deliver for Vec<Port<Shell>> {
    fn try_send(&mut self, device: usize, message: DeviceMessage) -> bool {
        // A device that is gone needs to be told nothing.
        !matches!(self[device].try_post(message), Err(Some(_)))
    }
}

/// A backend's way to the one device that it stands behind.
pub trait Tell: Send {
    /// `false`: not now, the device's mailbox is full. Never waits for a turn of an actor.
    fn try_tell(&mut self, message: DeviceMessage) -> bool;
}

impl Tell for Port<Shell> {
    fn try_tell(&mut self, message: DeviceMessage) -> bool {
        !matches!(self.try_post(message), Err(Some(_)))
    }
}

/// For disciplines without ports: through a gate.
impl Tell for (Box<dyn Gate>, usize) {
    fn try_tell(&mut self, message: DeviceMessage) -> bool {
        let (gate, device) = self;
        let mut sent = false;
        gate.with(&mut |devices| sent = devices.try_send(*device, message));
        sent
    }
}

/// What the loop is made of.
pub struct EventLoop {
    /// Guest time.
    pub clock: Clock,
    /// What devices wake it with.
    pub waker: Waker,
    /// Devices with bytes.
    pub characters: Vec<CharacterDevice>,
    /// Devices with deadlines.
    pub timed: Vec<TimedDevice>,
    /// The way to both.
    pub gate: Box<dyn Gate>,
    /// Where signals and escapes go. Must not wait for long.
    pub machine: Box<dyn Fn(HostEvent) + Send>,
    /// Where the loop publishes which device it is bringing a message.
    pub activity: Activity,
    /// For what goes wrong with the console.
    pub log: Logger,
}

impl EventLoop {
    /// Starts the loop's thread.
    ///
    /// # Errors
    /// When the host cannot start a thread.
    pub fn start(self) -> std::io::Result<EventLoopHandle> {
        // One order, ever.
        let (orders, inbox) = bounded(1);
        let (tell, ended) = bounded(1);
        let waker = self.waker.clone();
        crate::thread::spawn("events", move || {
            let _rank = RankGuard::enter(Rank::Backend);
            let mut gate = self.gate;
            Running {
                clock: self.clock,
                waker: self.waker,
                lines: self.characters.into_iter().map(Line::new).collect(),
                timed: self.timed,
                machine: self.machine,
                activity: self.activity,
                log: self.log,
                inbox,
                until: None,
            }
            .run(&mut *gate);
            let _ = tell.send(());
        })?;
        Ok(EventLoopHandle { orders, waker, ended })
    }
}

/// The loop while it runs.
struct Running {
    clock: Clock,
    waker: Waker,
    lines: Vec<Line>,
    timed: Vec<TimedDevice>,
    machine: Box<dyn Fn(HostEvent) + Send>,
    activity: Activity,
    log: Logger,
    inbox: Receiver<Order>,
    /// Stopping: until when.
    until: Option<Instant>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Without it no signal would be heard, and nothing could end the machine but SIGKILL.
        if std::thread::panicking() {
            (self.machine)(HostEvent::Died);
        }
    }
}

impl Running {
    fn run(mut self, gate: &mut dyn Gate) {
        loop {
            if let Ok(Order::Stop(limit)) = self.inbox.try_recv() {
                self.until = Some(Instant::now() + limit);
            }
            if let Some(until) = self.until
                && (!self.lines.iter().any(Line::has_work) || Instant::now() >= until)
            {
                for line in &mut self.lines {
                    line.tell_losses(&self.log);
                }
                return;
            }
            let fired = self.sleep();
            gate.with(&mut |devices| {
                for (line, (readable, writable)) in self.lines.iter_mut().zip(&fired) {
                    line.device.end.up();
                    line.look_for_peer();
                    if *readable {
                        line.read_input(&*self.machine, &self.log);
                    }
                    if *writable || line.nobody_listens() {
                        line.write_output(&self.log);
                    }
                    line.deliver(devices, &self.activity);
                }
                self.tick(devices);
            });
        }
    }

    /// Tells devices whose deadline has come.
    fn tick(&mut self, devices: &mut dyn Deliver) {
        let now = self.clock.now();
        for timed in &self.timed {
            if !timed.slot.take_due(now) {
                continue;
            }
            self.activity.at_device(timed.device);
            if !devices.try_send(timed.device, DeviceMessage::Tick) {
                // No credit: the device is busy. Again when it may have one.
                timed.slot.set(Some(Nanos(now.0 + 1_000_000)));
            }
            self.activity.asleep();
        }
    }

    /// Sleeps until something happens. Says for each line whether its input and its output are ready.
    fn sleep(&mut self) -> Vec<(bool, bool)> {
        let timeout = self.timeout();
        // SAFETY: the descriptor belongs to the waker, an Arc held by `self`, which outlives the poll.
        let waker_fd = unsafe { BorrowedFd::borrow_raw(self.waker.as_raw_fd()) };
        let mut polled = vec![PollFd::new(waker_fd, PollFlags::POLLIN)];
        let stopping = self.until.is_some();
        let mut at = |fd: Option<BorrowedFd<'_>>, flags| {
            // SAFETY: the descriptor belongs to a console of `self`, which is not changed before the poll is over.
            let fd = unsafe { BorrowedFd::borrow_raw(fd?.as_raw_fd()) };
            polled.push(PollFd::new(fd, flags));
            Some(polled.len() - 1)
        };
        let places: Vec<_> = self
            .lines
            .iter()
            .map(|line| {
                let input = at(line.wanted_input().filter(|_| !stopping), PollFlags::POLLIN);
                (input, at(line.wanted_output(), PollFlags::POLLOUT))
            })
            .collect();
        let ready = match ppoll(&mut polled, timeout.map(TimeSpec::from), None::<SigSet>) {
            Ok(ready) => ready > 0,
            Err(Errno::EINTR) => false,
            Err(error) => {
                error!(self.log, "the event loop cannot wait: {}", error.desc());
                std::thread::sleep(LINGER);
                false
            }
        };
        let fired = |at: Option<usize>| {
            ready
                && at
                    .and_then(|at| polled[at].revents())
                    .is_some_and(|events| !events.is_empty())
        };
        if fired(Some(0)) {
            let _ = self.waker.read();
        }
        places
            .into_iter()
            .map(|(input, output)| (fired(input), fired(output)))
            .collect()
    }

    /// How long to sleep: `None` for as long as nothing happens.
    fn timeout(&mut self) -> Option<Duration> {
        let now = self.clock.now();
        // While guest time stands no deadline comes nearer; the machine wakes the loop when it goes on.
        let timed = self.timed.iter().filter(|_| !self.clock.is_frozen());
        let deadlines = timed.filter_map(|timed| timed.slot.deadline());
        let deadline = deadlines
            .map(|deadline| Duration::from_nanos(deadline.0.saturating_sub(now.0)))
            .min();
        let until = self
            .until
            .map(|until| until.saturating_duration_since(Instant::now()));
        let lines = self.lines.iter_mut().filter_map(Line::timeout).min();
        [deadline, until, lines].into_iter().flatten().min()
    }
}

/// One character device's line to the outside.
struct Line {
    device: CharacterDevice,
    escape: Escape,
    /// Typed, but not yet in the ring.
    typed: Vec<u8>,
    /// When output last came; the loop lingers after it.
    last_output: Option<Instant>,
    /// Somebody is on the other side (of a pseudo-terminal; elsewhere always).
    connected: bool,
    /// Whether the device has been told of the input, or of the room, that there is. It has not if its mailbox had
    /// no credit.
    input_told: bool,
    output_told: bool,
}

impl Line {
    fn new(device: CharacterDevice) -> Line {
        Line {
            device,
            escape: Escape::default(),
            typed: Vec::new(),
            last_output: None,
            connected: true,
            input_told: true,
            output_told: true,
        }
    }

    /// Whether the device has sent something that somebody may still want.
    fn has_work(&self) -> bool {
        self.device.end.has_output() && !self.nobody_listens()
    }

    /// What the guest sent and nobody got.
    fn tell_losses(&mut self, log: &Logger) {
        let unread = if self.nobody_listens() {
            0
        } else {
            self.device.end.output().len() as u64
        };
        let lost = self.device.end.dropped() + unread;
        if lost > 0 {
            warn!(
                log,
                "{lost} bytes of the guest's output to {} are lost", self.device.console.name
            );
        }
    }

    fn nobody_listens(&self) -> bool {
        self.device.console.output().is_none() || !self.connected
    }

    /// What cannot be taken is not asked for: back-pressure to whoever types or pastes. A pseudo-terminal that
    /// nobody has opened would report that for ever; it is looked at now and then.
    fn wanted_input(&self) -> Option<BorrowedFd<'_>> {
        self.device
            .console
            .input()
            .filter(|_| self.typed.is_empty() && self.connected)
    }

    fn wanted_output(&self) -> Option<BorrowedFd<'_>> {
        self.device
            .console
            .output()
            .filter(|_| self.connected && self.device.end.has_output())
    }

    fn timeout(&mut self) -> Option<Duration> {
        let mut wanted = Vec::with_capacity(3);
        if !self.input_told || !self.output_told {
            wanted.push(Duration::from_millis(1));
        }
        if !self.connected {
            wanted.push(PTY_LOOK);
        }
        let waiting = self.device.end.has_output();
        if waiting && self.nobody_listens() {
            wanted.push(Duration::ZERO);
        } else if !waiting {
            if self.last_output.is_some_and(|last| last.elapsed() < LINGER) {
                wanted.push(LINGER);
            } else if !self.device.end.rest() {
                wanted.push(Duration::ZERO);
            }
        }
        wanted.into_iter().min()
    }

    /// Gives the device what was typed, and the news that it has not got yet.
    fn deliver(&mut self, devices: &mut dyn Deliver, activity: &Activity) {
        let CharacterDevice { end, recipient, .. } = &mut self.device;
        if !self.typed.is_empty() {
            let given = end.give(&self.typed);
            self.typed.drain(..given);
            self.input_told &= given == 0;
        }
        self.output_told &= !end.wants_output_ready();
        if self.output_told && self.input_told {
            return;
        }
        match recipient {
            Recipient::Device(device) => {
                activity.at_device(*device);
                if !self.output_told {
                    self.output_told = devices.try_send(*device, DeviceMessage::OutputReady);
                }
                if !self.input_told {
                    self.input_told = devices.try_send(*device, DeviceMessage::InputReady);
                }
                activity.asleep();
            }
            Recipient::Actors { input, room } => {
                if !std::mem::replace(&mut self.output_told, true) {
                    wake(room);
                }
                if !std::mem::replace(&mut self.input_told, true) {
                    wake(input);
                }
            }
        }
    }

    /// Whether somebody is on the other side of a pseudo-terminal.
    fn look_for_peer(&mut self) {
        let console = &self.device.console;
        let Some(fd) = console.input().filter(|_| console.comes_and_goes) else {
            return;
        };
        let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
        let events = match ppoll(&mut polled, Some(TimeSpec::from(Duration::ZERO)), None::<SigSet>) {
            Ok(1..) => polled[0].revents(),
            _ => None,
        };
        self.connected = !events.is_some_and(|events| events.contains(PollFlags::POLLHUP));
    }

    fn read_input(&mut self, machine: &dyn Fn(HostEvent), log: &Logger) {
        let console = &mut self.device.console;
        let Some(fd) = console.input() else { return };
        let mut bytes = [0; RING_BYTES / 2];
        match nix::unistd::read(fd, &mut bytes) {
            Ok(0) => console.close_input(),
            Ok(length) if !console.interactive => self.typed.extend_from_slice(&bytes[..length]),
            Ok(length) => {
                for byte in &bytes[..length] {
                    match self.escape.feed(*byte, &mut self.typed) {
                        Some(Command::Quit) => machine(HostEvent::Quit),
                        Some(Command::Help) => print_help(),
                        None => {}
                    }
                }
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            // The other side of a pseudo-terminal has gone; `look_for_peer` sees to it.
            Err(Errno::EIO) if console.comes_and_goes => {}
            Err(error) => {
                info!(log, "no more input from {}: {}", console.input_name, error.desc());
                console.close_input();
            }
        }
    }

    fn write_output(&mut self, log: &Logger) {
        let nobody = self.nobody_listens();
        let CharacterDevice { console, end, .. } = &mut self.device;
        self.last_output = Some(Instant::now());
        let chunk = end.output();
        let (first, _) = chunk.as_slices();
        let bytes = &first[..first.len().min(WRITE_BYTES)];
        let Some(fd) = console.output().filter(|_| !nobody) else {
            // The bytes are gone, as on a wire that is not plugged in.
            chunk.commit_all();
            return;
        };
        match nix::unistd::write(fd, bytes) {
            Ok(written) => chunk.commit(written),
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(error) => {
                error!(
                    log,
                    "output to {} is lost from here on: {}",
                    console.name,
                    error.desc()
                );
                chunk.commit_all();
                console.close_output();
            }
        }
    }
}

/// The terminal may not take it now, and the event loop must not wait for it. One at a time: a terminal that nobody
/// reads must not collect threads.
fn print_help() {
    static UNDER_WAY: AtomicBool = AtomicBool::new(false);
    if UNDER_WAY.swap(true, Ordering::AcqRel) {
        return;
    }
    let print = || {
        hostlog::print(HELP.trim_end());
        UNDER_WAY.store(false, Ordering::Release);
    };
    if crate::thread::spawn("help", print).is_err() {
        // A host without threads shows no help.
        UNDER_WAY.store(false, Ordering::Release);
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
