//! The vCPU actors: one thread each, sole owner of its descriptor, `kvm_run` mapping, registers and routing table.
//!
//! ```text
//!            Start, Resume              Pause                ┌───┐
//!   READY ────────────────▶ RUNNING ─────────────▶ PAUSED ◀──┘ Reset
//!     │                     ▲  │  exit that cannot │  │
//!     │ Stop                │  │  go on (HALTED)   │  │ Stop
//!     │                     └──┼───── Resume ──────┘  │
//!     └──────────────────▶  ENDED ◀───────────────────┘
//! ```
//!
//! A RUNNING vCPU alternates between the guest and the handling of its exits, and looks into its mailbox when it
//! was kicked. A READY or PAUSED one sleeps on its mailbox. What happens to it goes to the machine as [`VcpuNews`].

pub mod activity;
pub mod backend;
pub mod debug;
pub mod exit;
mod guest_clock;
pub mod kick;
pub mod kvm;
pub mod power_on;
pub mod registers;
pub mod route;
pub mod scripted;
mod watched;

use crate::actors::{Lifecycle, Rank, RankGuard};
use crate::boot::EntryPoint;
use crate::devices::{Direction, Width};
use crate::simulation::{Planted, planted, point, receive};
use activity::{Activity, ActivityView};
use backend::{Backend, ResetError, RunError};
use crossbeam_channel::{Receiver, Sender, TryRecvError};
use debug::{Arming, DebugRequest, DebugStop, Mode};
use exit::{AccessExit, Exit, MmioExit, PioExit, SystemEvent};
use kick::{ImmediateExit, KickHandle, KickReceiver, ThreadSignal, kick};
use registers::Registers;
use route::{Accesses, Bus, RoutingTable, Space};
use std::fmt;

/// What a vCPU actor receives. Bounded by [`MAILBOX`].
#[derive(Debug)]
pub enum VcpuMessage {
    /// The machine's life.
    Lifecycle(Lifecycle),
    /// [`Lifecycle::Reset`] of the boot processor: the guest that was loaded anew starts here.
    ResetTo(EntryPoint),
    /// Guest time goes on after a pause: to the boot processor, before any of them runs. Answered.
    TakeTime,
    /// From a debugger, with the way back.
    Debug(DebugRequest),
    /// The vCPU ends.
    Stop,
}

/// Messages a vCPU's mailbox holds: the machine actor has one on its way that is answered (Pause, Reset, TakeTime), sends no other
/// before the answer, and may have sent Resume before it; Stop may come on top. A debugger has one.
const MAILBOX: usize = 5;

/// What a vCPU tells the machine.
#[derive(Debug)]
pub struct VcpuNews {
    /// Which vCPU.
    pub vcpu: usize,
    /// What happened.
    pub what: VcpuEvent,
}

/// What can happen to a vCPU.
#[derive(Debug)]
pub enum VcpuEvent {
    /// Its thread has come up, and waits for [`Lifecycle::Start`].
    Ready,
    /// It does not run the guest until [`Lifecycle::Resume`]. No access is pending.
    Paused,
    /// What the guest reads the time from is right again.
    TimeTaken,
    /// It is in the state after power-on, and still paused; or it cannot be.
    Reset(Result<(), ResetError>),
    /// It has stopped for the debugger, and waits for [`Lifecycle::Resume`]. No access is pending.
    Debug(DebugStop),
    /// It cannot go on; see [`End`]. It waits for [`VcpuMessage::Stop`].
    Halted(End),
    /// It has ended. With the ranges that nobody claimed, and how often they were touched.
    Stopped(Vec<(Space, u64, u64)>),
}

/// Why a vCPU cannot go on.
#[derive(Debug)]
pub enum End {
    /// A triple fault.
    TripleFault,
    /// KVM says that the guest wants to be shut down or reset, or that it crashed.
    SystemEvent(SystemEvent),
    /// Neither the guest nor we can go on.
    InternalError(Box<Diagnosis>),
}

/// Everything that is known when a vCPU cannot go on.
#[derive(Debug)]
pub struct Diagnosis {
    /// Which vCPU.
    pub vcpu: usize,
    /// What ended it.
    pub cause: Cause,
    /// Its registers, where they can be had.
    pub registers: Option<Registers>,
    /// The bytes at RIP, where they can be had.
    pub code: Option<Vec<u8>>,
}

/// What ended a vCPU.
#[derive(Debug)]
pub enum Cause {
    /// An exit that nobody can handle.
    Exit(Exit),
    /// KVM_RUN failed.
    Run(nix::errno::Errno),
    /// The vCPU's own thread panicked: a bug of ours.
    Panic(String),
}

impl Diagnosis {
    /// What a user can do about it.
    pub fn advice(&self) -> &'static str {
        match &self.cause {
            Cause::Exit(Exit::InternalError(error)) if error.suberror == 1 => {
                "this host's KVM does not know an instruction that the guest uses; `actor-vmm doctor` tells whether \
                 it can run stock kernels at all"
            }
            Cause::Exit(Exit::FailEntry { .. }) => {
                "the processor refuses the guest's state; if this is a stock kernel, report it with these registers \
                 and the host's kernel version"
            }
            Cause::Exit(Exit::Debug { .. }) => "the guest hit a debug trap that nobody asked for",
            Cause::Exit(_) => {
                "report it with the host's kernel version; the guest's last output may tell more"
            }
            Cause::Run(nix::errno::Errno::EFAULT) => {
                "the host could not provide guest memory: is it out of memory or huge pages? Try a smaller --memory"
            }
            Cause::Run(_) => "the host's KVM failed; see the host's kernel log (dmesg)",
            Cause::Panic(_) => "this is a bug in actor-vmm; please report it with this text",
        }
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vcpu{} cannot go on: ", self.vcpu)?;
        match &self.cause {
            Cause::Exit(exit) => write!(f, "{exit}")?,
            Cause::Run(errno) => write!(f, "KVM_RUN: {}", errno.desc())?,
            Cause::Panic(text) => write!(f, "its thread panicked: {text}")?,
        }
        let hex = |bytes: &[u8]| {
            bytes
                .iter()
                .map(|byte| format!("{byte:02x} "))
                .collect::<String>()
        };
        if let Cause::Exit(Exit::InternalError(error)) = &self.cause {
            if let Some(bytes) = error.instruction_bytes() {
                write!(f, "\ninstruction: {}", hex(&bytes).trim_end())?;
            } else if error.ndata > 0 {
                write!(f, "\ndata:")?;
                for word in &error.data[..error.ndata as usize] {
                    write!(f, " {word:x}")?;
                }
            }
        }
        if let Some(code) = &self.code {
            write!(f, "\ncode at rip: {}", hex(code).trim_end())?;
        }
        if let Some(registers) = &self.registers {
            write!(f, "\n{registers}")?;
        }
        write!(f, "\nwhat to do: {}", self.advice())
    }
}

/// The machine's hold of a vCPU, and a debugger's.
#[derive(Clone)]
pub struct VcpuHandle {
    mailbox: Sender<VcpuMessage>,
    kick: KickHandle,
}

impl VcpuHandle {
    /// Sends a message and makes the vCPU look at it. Never waits. `false`: the mailbox is full or the vCPU gone.
    pub fn send(&self, message: VcpuMessage) -> bool {
        // Message first, kick second: whoever sees the kick sees the message.
        if planted(Planted::KickFirst) {
            self.kick.kick();
            point();
        }
        let sent = self.mailbox.try_send(message).is_ok();
        point();
        if !planted(Planted::NoKick) && !planted(Planted::KickFirst) {
            self.kick.kick();
        }
        sent
    }

    /// The kick alone.
    pub fn kick(&self) {
        self.kick.kick();
    }

    /// The kick, for somebody else.
    pub fn kicker(&self) -> KickHandle {
        self.kick.clone()
    }
}

/// A vCPU's mailbox, before its thread is.
pub struct VcpuInbox {
    mailbox: Receiver<VcpuMessage>,
    kick: KickReceiver,
}

/// A vCPU's two ends.
pub fn vcpu_mailbox() -> (VcpuHandle, VcpuInbox) {
    let (sender, mailbox) = crossbeam_channel::bounded(MAILBOX);
    let (handle, receiver) = kick(ThreadSignal::new());
    (
        VcpuHandle {
            mailbox: sender,
            kick: handle,
        },
        VcpuInbox {
            mailbox,
            kick: receiver,
        },
    )
}

/// What a vCPU does between messages.
enum State {
    /// Sleeps on its mailbox.
    Waiting,
    /// Runs the guest.
    Running,
    /// Is done.
    Ended,
}

/// A vCPU actor. Lives on its own thread.
///
/// Owns: its backend (descriptor, mapping, registers) and its routing table. Receives: [`VcpuMessage`]. Asks:
/// devices. Rank: vCPU. Ends: on Stop.
pub struct Vcpu<B: Backend, D: Bus = RoutingTable> {
    index: usize,
    backend: B,
    bus: D,
    inbox: VcpuInbox,
    news: NewsSink,
    /// What the debugger wants; nothing, if there is none.
    arming: Arming,
    activity: Activity,
}

/// Where a vCPU's news go. Must not wait for long: it is called on the vCPU's thread.
pub type NewsSink = Box<dyn Fn(VcpuNews) + Send>;

impl<B: Backend, D: Bus> Vcpu<B, D> {
    /// A vCPU that is ready to be run.
    pub fn new(index: usize, backend: B, bus: D, inbox: VcpuInbox, news: NewsSink) -> Self {
        Vcpu {
            index,
            backend,
            bus,
            inbox,
            news,
            arming: Arming::default(),
            activity: Activity::new(),
        }
    }

    /// What it is doing, for whoever wants to know while it runs.
    pub fn activity(&self) -> ActivityView {
        self.activity.view()
    }

    /// The life of a vCPU, on the thread that calls this.
    pub fn run(mut self) {
        let _rank = RankGuard::enter(Rank::Vcpu);
        let flag = self.backend.immediate_exit();
        // SAFETY: the byte is in the backend's mapping, which lives until the end of this function, after `_exit`
        // (dropped first: it is declared later than `self`); only this thread and its own signal handler write it.
        let exit = unsafe { ImmediateExit::bind(flag) };
        self.inbox.kick.bind_thread();
        self.tell(VcpuEvent::Ready);
        let life = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.live(flag)));
        if let Err(panic) = life {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| text.to_string())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            let diagnosis = self.diagnosis(Cause::Panic(text), false);
            self.tell(VcpuEvent::Halted(End::InternalError(diagnosis)));
        }
        self.inbox.kick.gone();
        drop(exit);
        self.activity.ended();
        let unclaimed = self.bus.unclaimed();
        self.tell(VcpuEvent::Stopped(unclaimed));
    }

    fn live(&mut self, immediate_exit: *mut u8) {
        let mut state = State::Waiting;
        loop {
            state = match state {
                State::Waiting => self.wait(),
                // Two loops, so that the usual one has nothing of the other on its way.
                State::Running => match self.arming.watch.clone() {
                    None => self.run_guest(immediate_exit),
                    Some(watch) => self.run_watched(immediate_exit, &watch),
                },
                State::Ended => return,
            };
        }
    }

    /// READY, PAUSED, or halted for good: sleeps until a message changes that.
    fn wait(&mut self) -> State {
        self.activity.asleep();
        loop {
            match receive(&self.inbox.mailbox) {
                // The debugger may want it to stay where it is while others go on.
                Ok(VcpuMessage::Lifecycle(Lifecycle::Start | Lifecycle::Resume)) => {
                    if self.arming.mode != Mode::Hold {
                        return State::Running;
                    }
                }
                Ok(VcpuMessage::TakeTime) => {
                    self.backend.take_time();
                    self.tell(VcpuEvent::TimeTaken);
                }
                Ok(VcpuMessage::Debug(request)) => self.serve_debugger(request, true),
                Ok(VcpuMessage::Lifecycle(Lifecycle::Pause)) => self.pause(),
                Ok(VcpuMessage::Lifecycle(Lifecycle::Reset)) => self.reset(None),
                Ok(VcpuMessage::ResetTo(entry)) => self.reset(Some(&entry)),
                // Without a machine there is nothing to run for.
                Ok(VcpuMessage::Stop) | Err(_) => return State::Ended,
            }
        }
    }

    /// RUNNING: the loop that everything is for.
    fn run_guest(&mut self, immediate_exit: *mut u8) -> State {
        loop {
            if !self.inbox.kick.enter() {
                match self.look() {
                    Some(state) => return state,
                    None => continue,
                }
            }
            self.activity.in_guest();
            let outcome = self.backend.run();
            let kicked = self.inbox.kick.leave();
            // After `leave`: no signal for this stay is marked any more. One that is still on its way sets the byte
            // again and costs one empty run.
            // SAFETY: see `run`. Volatile, as the handler and the kernel share it.
            unsafe { immediate_exit.write_volatile(0) };
            let next = match outcome {
                Ok(()) => self.handle(),
                Err(RunError::Interrupted | RunError::Again) => None,
                Err(RunError::Failed(errno)) => Some(self.give_up_with(Cause::Run(errno))),
            };
            if let Some(state) = next {
                return state;
            }
            if kicked && let Some(state) = self.look() {
                return state;
            }
        }
    }

    /// Looks into the mailbox after a kick.
    fn look(&mut self) -> Option<State> {
        loop {
            match self.inbox.mailbox.try_recv() {
                Ok(VcpuMessage::Lifecycle(Lifecycle::Pause)) => {
                    self.settle();
                    self.pause();
                    return Some(State::Waiting);
                }
                // A reset comes to a vCPU that is paused, and to no other.
                Ok(VcpuMessage::Lifecycle(Lifecycle::Start | Lifecycle::Resume | Lifecycle::Reset))
                | Ok(VcpuMessage::ResetTo(_)) => {}
                // Nor is one told so that runs: KVM does it by itself then.
                Ok(VcpuMessage::TakeTime) => self.tell(VcpuEvent::TimeTaken),
                Ok(VcpuMessage::Debug(request)) => self.serve_debugger(request, false),
                Ok(VcpuMessage::Stop) | Err(TryRecvError::Disconnected) => return Some(State::Ended),
                Err(TryRecvError::Empty) => return None,
            }
        }
    }

    /// PAUSED from now on.
    fn pause(&mut self) {
        self.backend.paused();
        self.tell(VcpuEvent::Paused);
    }

    /// Back to power-on, by the one thread that may touch the vCPU.
    fn reset(&mut self, entry: Option<&EntryPoint>) {
        let done = self.backend.reset(entry);
        self.tell(VcpuEvent::Reset(done));
    }

    /// No access of this vCPU is half done: its posts are handled, and the exit that was handled last is completed
    /// in the guest by a run that may not enter it. [KVM api: immediate_exit]
    fn settle(&mut self) {
        self.activity.settling();
        if planted(Planted::Unsettled) {
            return;
        }
        self.bus.settle();
        let flag = self.backend.immediate_exit();
        // SAFETY: see `run`.
        unsafe { flag.write_volatile(1) };
        // An access that spans several exits (a string, a page crossing) goes on with its next part.
        while let Ok(()) = self.backend.run() {
            if self.handle_apart().is_some() {
                break;
            }
        }
        // SAFETY: see `run`.
        unsafe { flag.write_volatile(0) };
    }

    /// Handles the exit that the backend has. `Some`: the vCPU does not go on running. A part of the loop above; others take
    /// [`Vcpu::handle_apart`].
    #[inline(always)]
    fn handle(&mut self) -> Option<State> {
        // What a discipline holds is held here, from before the exit is looked at until it is served, and no longer.
        self.activity.exited(D::WAITS);
        let served = serve(&mut self.backend, self.bus.exited(), &self.activity);
        match served {
            Served::GoOn => None,
            // Without an in-kernel interrupt controller nothing can wake it but a message.
            Served::Halt => self.halted(),
            Served::End(end) => Some(self.give_up(end)),
            Served::Fail(exit) => Some(self.give_up_with(Cause::Exit(exit))),
        }
    }

    /// The same, where no guest waits for it to be quick.
    #[inline(never)]
    fn handle_apart(&mut self) -> Option<State> {
        self.handle()
    }

    /// HLT without anybody in the kernel to wake it: the vCPU sleeps on its mailbox.
    fn halted(&mut self) -> Option<State> {
        if self.backend.wakes_from_halt() {
            return None;
        }
        self.activity.asleep();
        loop {
            match receive(&self.inbox.mailbox) {
                // The halt is over when the machine says so: it goes on behind the HLT, as after an interrupt.
                Ok(VcpuMessage::Lifecycle(Lifecycle::Start | Lifecycle::Resume)) => return None,
                Ok(VcpuMessage::Lifecycle(Lifecycle::Pause)) => {
                    self.bus.settle();
                    self.pause();
                    return Some(State::Waiting);
                }
                Ok(VcpuMessage::Lifecycle(Lifecycle::Reset) | VcpuMessage::ResetTo(_)) => {}
                Ok(VcpuMessage::TakeTime) => self.tell(VcpuEvent::TimeTaken),
                Ok(VcpuMessage::Debug(request)) => self.serve_debugger(request, false),
                Ok(VcpuMessage::Stop) | Err(_) => return Some(State::Ended),
            }
        }
    }

    fn give_up(&mut self, end: End) -> State {
        self.bus.settle();
        self.tell(VcpuEvent::Halted(end));
        State::Waiting
    }

    fn give_up_with(&mut self, cause: Cause) -> State {
        let diagnosis = self.diagnosis(cause, true);
        self.give_up(End::InternalError(diagnosis))
    }

    fn diagnosis(&mut self, cause: Cause, look: bool) -> Box<Diagnosis> {
        // After a panic the backend is not trusted with more work.
        let registers = if look { self.backend.registers() } else { None };
        let code = registers
            .as_ref()
            .and_then(|registers| self.backend.code_at(registers.linear_rip()));
        Box::new(Diagnosis {
            vcpu: self.index,
            cause,
            registers,
            code,
        })
    }

    fn tell(&self, what: VcpuEvent) {
        (self.news)(VcpuNews {
            vcpu: self.index,
            what,
        });
    }
}

/// One stay in the guest and its exit, served as a running vCPU serves it, but for the looks at its kick and mailbox:
/// what benches compare the disciplines with. `false`: the exit is not one that a vCPU just goes on after.
///
/// # Errors
/// See [`RunError`].
#[inline(always)]
pub fn step<B: Backend, D: Bus>(backend: &mut B, bus: &mut D, activity: &Activity) -> Result<bool, RunError> {
    activity.in_guest();
    backend.run()?;
    activity.exited(D::WAITS);
    Ok(matches!(serve(backend, bus.exited(), activity), Served::GoOn))
}

/// What is left to do after an exit was served.
enum Served {
    GoOn,
    Halt,
    End(End),
    Fail(Exit),
}

/// Looks at the exit and serves it, with whatever the discipline holds.
#[inline(always)]
fn serve<B: Backend>(backend: &mut B, mut devices: impl Accesses, activity: &Activity) -> Served {
    match backend.access() {
        Some(AccessExit::Pio(pio)) => {
            activity.port(&pio);
            serve_pio(backend, &mut devices, pio)
        }
        Some(AccessExit::Mmio(mmio)) => {
            activity.memory(&mmio);
            serve_mmio(backend, &mut devices, mmio)
        }
        None => {
            activity.other_exit();
            serve_rare(backend.exit())
        }
    }
}

/// The exits that are no accesses: nothing of them is a device's.
#[cold]
#[inline(never)]
fn serve_rare(exit: Exit) -> Served {
    match exit {
        // Nothing to inject (no device of ours bypasses the in-kernel controller), nobody to tell.
        Exit::IrqWindowOpen | Exit::Intr | Exit::IoapicEoi { .. } => Served::GoOn,
        Exit::Hlt => Served::Halt,
        Exit::Shutdown => Served::End(End::TripleFault),
        Exit::SystemEvent(event) => Served::End(End::SystemEvent(event)),
        exit @ (Exit::Pio(_)
        | Exit::Mmio(_)
        | Exit::Debug { .. }
        | Exit::Unknown { .. }
        | Exit::FailEntry { .. }
        | Exit::InternalError(_)
        | Exit::Other { .. }
        | Exit::Malformed { .. }) => Served::Fail(exit),
    }
}

#[inline(always)]
fn serve_pio<B: Backend>(backend: &mut B, devices: &mut impl Accesses, exit: PioExit) -> Served {
    // One element, but for string forms: apart, so that the way of the others has no loop and no multiplication.
    if exit.count != 1 {
        let PioExit {
            direction,
            port,
            width,
            count,
            data_offset,
        } = exit;
        return serve_string(backend, devices, direction, port, width, count, data_offset);
    }
    let Some(data) = backend.pio_data(exit.data_offset, exit.width.bytes()) else {
        return outside();
    };
    match exit.direction {
        Direction::Read => put(data, devices.port_in(exit.port, exit.width)),
        Direction::Write => devices.port_out(exit.port, exit.width, get(data)),
    }
    Served::GoOn
}

/// String forms are so many accesses to one port, in order. Each field for itself: a [`PioExit`] would be put into memory for it,
/// also by those that do not come here.
#[cold]
#[inline(never)]
fn serve_string<B: Backend>(
    backend: &mut B,
    devices: &mut impl Accesses,
    direction: Direction,
    port: u16,
    width: Width,
    count: u32,
    data_offset: u64,
) -> Served {
    let length = width.bytes().checked_mul(count as usize);
    let Some(data) = length.and_then(|length| backend.pio_data(data_offset, length)) else {
        return outside();
    };
    for element in data.chunks_exact_mut(width.bytes()) {
        match direction {
            Direction::Read => put(element, devices.port_in(port, width)),
            Direction::Write => devices.port_out(port, width, get(element)),
        }
    }
    Served::GoOn
}

#[cold]
fn outside() -> Served {
    Served::Fail(Exit::Malformed {
        reason: kvm_bindings::KVM_EXIT_IO,
        what: "its data is outside the mapping",
    })
}

/// Stores the low bytes of a value in an element of 1, 2 or 4 bytes. By known lengths: a copy of any length is a call.
#[inline]
fn put(element: &mut [u8], value: u64) {
    if let Ok(element) = <&mut [u8; 4]>::try_from(&mut *element) {
        *element = (value as u32).to_le_bytes();
    } else if let Ok(element) = <&mut [u8; 2]>::try_from(&mut *element) {
        *element = (value as u16).to_le_bytes();
    } else {
        element[0] = value as u8;
    }
}

/// The value of an element of 1, 2 or 4 bytes.
#[inline]
fn get(element: &[u8]) -> u64 {
    match *element {
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
        [a, b] => u16::from_le_bytes([a, b]).into(),
        _ => element[0].into(),
    }
}

fn serve_mmio<B: Backend>(backend: &mut B, devices: &mut impl Accesses, exit: MmioExit) -> Served {
    let length = exit.length;
    match exit.direction {
        Direction::Read => devices.load(exit.address, &mut backend.mmio_data()[..length]),
        Direction::Write => devices.store(exit.address, &exit.data[..length]),
    }
    Served::GoOn
}
