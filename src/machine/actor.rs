//! The machine actor: the sole owner of the machine's state.
//!
//! Owns: the state, the handles of all vCPUs, devices and the event loop. Receives: [`MachineMessage`]. Asks: nobody
//! (it must answer while anybody else is stuck): it sends, and waits for news with a limit. Rank: supervisor. Ends:
//! when everything else has, or when what is stuck has had its time.
//!
//! What a pause, a resume and a reset do in which order is decided in `conductor.rs`; here it is carried out.

use super::conductor::{Conductor, Effect, Pending};
use super::dispatch::{Control, Discipline};
use super::holds::{Holder, Holds};
use super::outcome::Outcome;
use super::platform::Platform;
use super::request::{Answer, Mailbox, Reply};
use super::state::{State, Transition};
use super::supervisor::OnReset;
use super::virtio::Switches;
use super::{MachineMessage, Reloaded};
use crate::actors::Lifecycle;
use crate::boot::EntryPoint;
use crate::clock::Clock;
use crate::control::observatory::{Observatory, Published};
use crate::devices::MachineRequest;
use crate::gdb::server::{self as gdb, GdbHandle};
use crate::host::character::{Waker, wake};
use crate::host::events::{EventLoopHandle, HostEvent};
use crate::host::signals;
use crate::simulation::{self, Planted};
use crate::vcpu::activity::ActivityView;
use crate::vcpu::backend::Backend;
use crate::vcpu::exit::SystemEvent;
use crate::vcpu::kick::KickHandle;
use crate::vcpu::{End, Vcpu, VcpuEvent, VcpuHandle, VcpuMessage, VcpuNews, vcpu_mailbox};
use crate::virtio::queue::{QueueActor, QueueHandle};
use crossbeam_channel::{RecvTimeoutError, Sender};
use ending::{OUTPUT_LIMIT, PATIENT_OUTPUT_LIMIT, Timetable};
use slog::{Logger, crit, debug, error, info, o, warn};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

mod asked;
pub(super) mod ending;
mod late;

/// How long all vCPUs, or all devices, may take to pause or reset before those who have not are named. A kick takes
/// microseconds, but a busy host may leave a thread waiting for a processor for a good part of a second.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// What the machine actor is made of.
pub(super) struct Parts {
    pub(super) sender: Sender<MachineMessage>,
    pub(super) mailbox: Mailbox,
    pub(super) devices: Box<dyn Control>,
    /// Of each device, how many lifecycle messages it has handled; in the order of their numbers.
    pub(super) answered: Vec<(&'static str, Arc<AtomicU32>)>,
    /// What of devices can be switched.
    pub(super) switches: Switches,
    pub(super) platform: Box<dyn Platform>,
    pub(super) event_loop: EventLoopHandle,
    pub(super) clock: Clock,
    /// Wakes the event loop, which sleeps without a limit while guest time stands.
    pub(super) waker: Waker,
    pub(super) deadline: Option<Instant>,
    pub(super) on_reset: OnReset,
    pub(super) vcpus: usize,
    /// Where the state is published.
    pub(super) published: Arc<Published>,
    pub(super) log: Logger,
}

/// The machine actor.
pub(super) struct Machine {
    conductor: Conductor,
    /// For the thread that loads the guest anew. `None` once the machine ends: it shall be the last to hold one.
    sender: Option<Sender<MachineMessage>>,
    mailbox: Mailbox,
    vcpus: Vec<RunningVcpu>,
    devices: Box<dyn Control>,
    /// The actors behind devices.
    queues: Vec<QueueHandle>,
    switches: Switches,
    lives: Vec<DeviceLife>,
    /// `None` while the guest is loaded anew.
    platform: Option<Box<dyn Platform>>,
    /// Where the boot processor starts after the reset that is under way.
    entry: Option<EntryPoint>,
    event_loop: EventLoopHandle,
    clock: Clock,
    waker: Waker,
    /// When guest time was stopped.
    frozen_at: Option<Instant>,
    deadline: Option<Instant>,
    /// Until when those who were told something should have answered, and in which stage that is.
    answers_by: Option<Instant>,
    awaited: Option<u64>,
    /// Who wants it to stand still.
    holds: Holds,
    /// Who asked for what is under way: nobody if the guest did, both if both want a pause.
    askers: Vec<(Holder, Reply)>,
    on_reset: OnReset,
    guest_wants_reset: bool,
    /// What it asked for first while a reset was under way, which may be given up.
    guest_asked: Option<MachineRequest>,
    published: Arc<Published>,
    debugger: Option<GdbHandle>,
    /// Where to look for what those are doing who do not answer.
    observatory: Option<Observatory>,
    log: Logger,
}

/// Why a machine's vCPUs were not started.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotStarted {
    /// The host gives no thread.
    #[error(transparent)]
    Host(#[from] std::io::Error),
    /// Somebody at the console has ended it.
    #[error("ended from the console")]
    Quit,
    /// A signal has.
    #[error("ended by a signal")]
    Signal,
}

/// What came while vCPUs were started.
#[derive(Default)]
struct Starting {
    ready: usize,
    quit: bool,
    /// For `supervise`, which must not miss them: no more than the mailbox holds.
    others: Vec<MachineMessage>,
}

impl Starting {
    fn take(&mut self, message: MachineMessage) {
        match message {
            MachineMessage::Vcpu(VcpuNews {
                what: VcpuEvent::Ready,
                ..
            }) => self.ready += 1,
            MachineMessage::Host(HostEvent::Quit) => self.quit = true,
            other => self.others.push(other),
        }
    }

    /// Whether to go on.
    fn look(&self) -> Result<(), NotStarted> {
        if self.quit {
            return Err(NotStarted::Quit);
        }
        // The thread that hears signals is started after the vCPUs, whose kicks it has.
        if signals::end_is_wanted() {
            return Err(NotStarted::Signal);
        }
        Ok(())
    }
}

struct RunningVcpu {
    handle: VcpuHandle,
    thread: Option<std::thread::JoinHandle<()>>,
    stopped: bool,
}

/// What a device was told, and what it has answered.
struct DeviceLife {
    name: &'static str,
    told: u32,
    /// The last answer that the conductor has heard of.
    heard: u32,
    answered: Arc<AtomicU32>,
}

impl Machine {
    pub(super) fn new(parts: Parts) -> Machine {
        let lives = parts.answered.into_iter();
        let lives: Vec<_> = lives
            .map(|(name, answered)| DeviceLife {
                name,
                told: 0,
                heard: 0,
                answered,
            })
            .collect();
        Machine {
            conductor: Conductor::new(parts.vcpus, lives.len()),
            sender: Some(parts.sender),
            mailbox: parts.mailbox,
            vcpus: Vec::with_capacity(parts.vcpus),
            devices: parts.devices,
            queues: Vec::new(),
            switches: parts.switches,
            lives,
            platform: Some(parts.platform),
            entry: None,
            event_loop: parts.event_loop,
            clock: parts.clock,
            waker: parts.waker,
            frozen_at: None,
            deadline: parts.deadline,
            answers_by: None,
            awaited: None,
            holds: Holds::default(),
            askers: Vec::new(),
            on_reset: parts.on_reset,
            guest_wants_reset: false,
            guest_asked: None,
            published: parts.published,
            debugger: None,
            observatory: None,
            log: parts.log,
        }
    }

    /// Starts the actors behind devices.
    pub(super) fn start_queues<D: Discipline>(
        &mut self,
        queues: Vec<(usize, QueueActor)>,
        discipline: &D,
    ) -> std::io::Result<()> {
        for (device, queue) in queues {
            self.queues.push(queue.spawn(discipline.tell(device))?);
        }
        Ok(())
    }

    /// Starts the vCPUs' threads and waits until all are ready. Returns where each publishes what it is doing. A thousand take
    /// their time, so whoever wants an end meanwhile is heard between any two.
    pub(super) fn start_vcpus<B: Backend + Send + 'static, D: Discipline>(
        &mut self,
        backends: Vec<B>,
        discipline: &D,
        news: &Sender<MachineMessage>,
    ) -> Result<Vec<ActivityView>, NotStarted> {
        let mut views = Vec::with_capacity(backends.len());
        let expected = backends.len();
        let mut start = Starting::default();
        for (index, backend) in backends.into_iter().enumerate() {
            while let Ok(message) = self.mailbox.try_recv() {
                start.take(message);
            }
            start.look()?;
            let bus = discipline.bus(self.log.new(o!("vcpu" => index)));
            let (handle, inbox) = vcpu_mailbox();
            let news = news.clone();
            // A machine that is gone does not care.
            let tell = Box::new(move |what: VcpuNews| drop(news.send(MachineMessage::Vcpu(what))));
            let vcpu = Vcpu::new(index, backend, bus, inbox, tell);
            views.push(vcpu.activity());
            let thread = crate::thread::spawn(format!("vcpu{index}"), move || vcpu.run())?;
            self.vcpus.push(RunningVcpu {
                handle,
                thread: Some(thread),
                stopped: false,
            });
        }
        while start.ready < expected {
            start.take(simulation::receive(&self.mailbox).expect("we hold a sender"));
            start.look()?;
        }
        for other in start.others {
            let _ = news.try_send(other);
        }
        Ok(views)
    }

    /// The kicks of all vCPUs, once they are there.
    pub(super) fn kicks(&self) -> Vec<KickHandle> {
        self.vcpus.iter().map(|vcpu| vcpu.handle.kicker()).collect()
    }

    /// Lets a debugger at the vCPUs, which are ready and have not started.
    pub(super) fn debug_by(&mut self, server: gdb::Server) -> std::io::Result<()> {
        let Some(sender) = &self.sender else { return Ok(()) };
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.handle.clone()).collect();
        self.debugger = Some(server.start(self.mailbox.address(sender), vcpus, &self.log)?);
        Ok(())
    }

    /// From where it can see what everybody does.
    pub(super) fn look_from(&mut self, observatory: Observatory) {
        self.observatory = Some(observatory);
    }

    /// Kicks of all vCPUs.
    #[cfg(all(test, not(loom)))]
    pub(super) fn kickers(&self) -> Vec<crate::vcpu::kick::KickHandle> {
        self.vcpus.iter().map(|vcpu| vcpu.handle.kicker()).collect()
    }

    fn go(&mut self, transition: Transition) {
        let before = self.conductor.state();
        if let Err(refused) = self.conductor.go(transition) {
            error!(self.log, "{refused}");
        }
        self.tell_state(before);
    }

    /// Publishes the state, and logs it if it is another one than before.
    fn tell_state(&self, before: State) {
        let state = self.conductor.state();
        if state != before {
            self.published.set_state(state);
            debug!(self.log, "machine: {before} -> {state}");
        }
    }

    /// Lets the guest run and waits for how it ends.
    pub(super) fn supervise(&mut self) -> Outcome {
        self.go(Transition::Start);
        let mut ended = self.carry_out();
        let outcome = loop {
            if let Some(outcome) = ended {
                break outcome;
            }
            ended = match self.receive() {
                Ok(message) => self.handle(message),
                Err(RecvTimeoutError::Timeout) if self.is_over() => {
                    break Outcome::TimedOut(self.conductor.state());
                }
                Err(RecvTimeoutError::Timeout) => self.answers_are_late(),
                Err(RecvTimeoutError::Disconnected) => unreachable!("we hold a sender"),
            };
        };
        if let Outcome::InternalError(diagnosis) = &outcome {
            self.go(Transition::Fail);
            crit!(self.log, "{diagnosis}");
        }
        let timetable = Timetable::from(Instant::now());
        if let Some(debugger) = self.debugger.take() {
            debugger.end(outcome.status(), timetable.debugger());
        }
        let patience = match outcome {
            Outcome::PoweredOff | Outcome::GuestExit(_) | Outcome::Reset => PATIENT_OUTPUT_LIMIT,
            _ => OUTPUT_LIMIT,
        };
        self.stop_by(patience, timetable);
        outcome
    }

    fn receive(&self) -> Result<MachineMessage, RecvTimeoutError> {
        match [self.deadline, self.answers_by].into_iter().flatten().min() {
            None => simulation::receive(&self.mailbox).map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => simulation::receive_by(&self.mailbox, until),
        }
    }

    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// One message. `Some`: the machine has come to its end.
    fn handle(&mut self, message: MachineMessage) -> Option<Outcome> {
        let before = self.conductor.state();
        match message {
            MachineMessage::Device(request) => {
                if let Some(outcome) = self.guest_asks(request) {
                    return Some(outcome);
                }
            }
            MachineMessage::Host(HostEvent::Signal(signal)) => return Some(Outcome::Signal(signal)),
            MachineMessage::Host(HostEvent::Quit) => return Some(Outcome::Quit),
            MachineMessage::Host(HostEvent::Died) => return Some(Outcome::EventLoopDied),
            MachineMessage::Host(HostEvent::MemoryGone(address)) => {
                return Some(Outcome::MemoryGone(address));
            }
            MachineMessage::Died(obituary) => {
                error!(
                    self.log,
                    "device {} died and reads all-ones from now on; this is a bug: {}",
                    obituary.actor,
                    obituary.cause
                );
                if let Some(index) = self.lives.iter().position(|life| life.name == obituary.actor) {
                    self.conductor.device_gone(index);
                }
            }
            MachineMessage::DeviceAnswered => {}
            MachineMessage::Request(request) => {
                if let Some(outcome) = self.serve(request) {
                    return Some(outcome);
                }
            }
            MachineMessage::Reloaded(Reloaded { platform, entry }) => {
                self.platform = Some(platform);
                match entry {
                    Ok(entry) => {
                        self.entry = entry;
                        self.published.count_reset();
                        // Of the guest that was.
                        self.guest_wants_reset = false;
                        self.guest_asked = None;
                        self.conductor.reloaded();
                    }
                    Err(error) => return Some(self.reset_failed(chain(&error))),
                }
            }
            MachineMessage::Vcpu(VcpuNews { vcpu, what }) => match what {
                VcpuEvent::Halted(end) => {
                    if let Some(outcome) = self.vcpu_ended(vcpu, end) {
                        return Some(outcome);
                    }
                }
                VcpuEvent::Paused => self.conductor.vcpu_paused(vcpu),
                VcpuEvent::TimeTaken => self.conductor.time_taken(),
                VcpuEvent::Reset(Ok(())) => self.conductor.vcpu_reset(vcpu),
                VcpuEvent::Reset(Err(error)) => {
                    return Some(self.reset_failed(format!("vcpu{vcpu}: {}", chain(&error))));
                }
                VcpuEvent::Debug(stop) => {
                    if let Some(debugger) = &self.debugger {
                        debugger.stopped(vcpu, stop);
                    }
                }
                VcpuEvent::Ready | VcpuEvent::Stopped(_) => {}
            },
        }
        // Whatever the message was: a device that found no room for its own has counted.
        for (index, life) in self.lives.iter_mut().enumerate() {
            // Each answer once: what the conductor decides because of one device is a new question to all others, which
            // they have not been asked yet.
            let news = life.heard != life.told || simulation::planted(Planted::HeardTwice);
            if life.answered.load(Ordering::Acquire) == life.told && news {
                life.heard = life.told;
                self.conductor.device_done(index);
            }
        }
        let mut outcome = self.carry_out();
        self.tell_state(before);
        if outcome.is_none() && self.guest_wants_reset {
            let before = self.conductor.state();
            self.reset_for_guest();
            outcome = self.carry_out();
            self.tell_state(before);
        }
        outcome
    }

    /// What the guest itself wants.
    fn guest_asks(&mut self, request: MachineRequest) -> Option<Outcome> {
        // The guest that is being reset has no say any more, unless the reset is given up.
        if self.conductor.state() == State::Resetting {
            self.guest_asked.get_or_insert(request);
            return None;
        }
        match request {
            MachineRequest::PowerOff => Some(Outcome::PoweredOff),
            MachineRequest::Reset => self.guest_resets(),
            MachineRequest::Exit(value) => Some(Outcome::GuestExit(value)),
            MachineRequest::GuestPanic => Some(Outcome::GuestPanic),
        }
    }

    fn guest_resets(&mut self) -> Option<Outcome> {
        if self.on_reset == OnReset::Exit {
            return Some(Outcome::Reset);
        }
        self.guest_wants_reset = true;
        None
    }

    /// The guest's own reset, as soon as the machine's state allows it: one that is being paused is paused first, and
    /// stays so afterwards.
    fn reset_for_guest(&mut self) {
        let fits = matches!(self.conductor.state(), State::Running | State::Paused);
        if fits && std::mem::take(&mut self.guest_wants_reset) {
            info!(self.log, "the guest asked for a reset, in place");
            let begun = self.conductor.reset();
            debug_assert!(begun.is_ok());
        }
    }

    fn vcpu_ended(&mut self, vcpu: usize, end: End) -> Option<Outcome> {
        match end {
            End::TripleFault => Some(Outcome::TripleFault),
            End::SystemEvent(SystemEvent::Shutdown) => self.guest_asks(MachineRequest::PowerOff),
            End::SystemEvent(SystemEvent::Reset) => self.guest_asks(MachineRequest::Reset),
            End::SystemEvent(SystemEvent::Crash) => self.guest_asks(MachineRequest::GuestPanic),
            End::SystemEvent(SystemEvent::Other(kind)) => {
                warn!(
                    self.log,
                    "vcpu{vcpu}: KVM system event {kind}, taken as a request to reset"
                );
                self.guest_asks(MachineRequest::Reset)
            }
            End::InternalError(diagnosis) => Some(Outcome::InternalError(diagnosis)),
        }
    }

    /// Does what the conductor says, and what follows from it.
    fn carry_out(&mut self) -> Option<Outcome> {
        let mut moved = false;
        loop {
            let effects = self.conductor.effects();
            if effects.is_empty() {
                break;
            }
            moved = true;
            for effect in effects {
                match effect {
                    Effect::Vcpu(index, event) => self.tell_vcpu(index, event),
                    Effect::TakeTime => self.tell_time(),
                    Effect::Device(index, event) => self.tell_device(index, event),
                    Effect::FreezeTime => self.freeze(),
                    Effect::ThawTime => self.thaw(),
                    Effect::Reload => {
                        if let Err(error) = self.reload() {
                            return Some(self.reset_failed(error.to_string()));
                        }
                    }
                    Effect::Done => self.answer(Answer::Done(self.conductor.state())),
                }
            }
        }
        // Each stage has its time, also one for which nobody had to be told anything, as all have been before.
        let awaited = self.conductor.awaited();
        if awaited != self.awaited {
            self.awaited = awaited;
            let limited = awaited.filter(|_| moved || !simulation::planted(Planted::NoDeadline));
            self.answers_by = limited.map(|_| Instant::now() + ANSWER_LIMIT);
        }
        self.publish_unanswered();
        None
    }

    fn publish_unanswered(&self) {
        let pending = self.conductor.pending();
        let vcpus = self.vcpus.len();
        let numbered = pending.iter().filter_map(|pending| match pending {
            Pending::Vcpu(index, event) => Some((*index, *event)),
            Pending::Time => Some((0, Lifecycle::Resume)),
            Pending::Device(index, event) => Some((vcpus + index, *event)),
            Pending::Reload => None,
        });
        self.published.set_unanswered(numbered);
    }

    fn tell_vcpu(&self, index: usize, event: Lifecycle) {
        let handle = &self.vcpus[index].handle;
        let sent = match (event, self.entry) {
            (Lifecycle::Reset, Some(entry)) if index == 0 => handle.send(VcpuMessage::ResetTo(entry)),
            _ => handle.send(VcpuMessage::Lifecycle(event)),
        };
        if !sent {
            // It has ended, which it tells itself; its mailbox has room for all that it is ever sent.
            debug!(self.log, "vcpu{index} does not take {event:?}");
        }
    }

    /// Tells the boot processor that guest time goes on.
    fn tell_time(&self) {
        let boot = &self.vcpus[0].handle;
        let times = match () {
            () if simulation::planted(Planted::TakeTimeLost) => 0,
            () if simulation::planted(Planted::TakeTimeTwice) => 2,
            () => 1,
        };
        for _ in 0..times {
            if !boot.send(VcpuMessage::TakeTime) {
                // As in `tell_vcpu`.
                debug!(self.log, "vcpu0 does not take what time it is");
            }
        }
    }

    fn tell_device(&mut self, index: usize, event: Lifecycle) {
        self.lives[index].told = self.lives[index].told.wrapping_add(1);
        if !self.devices.tell(index, event) {
            self.conductor.device_gone(index);
        }
    }

    fn freeze(&mut self) {
        let at = self.platform.as_mut().map(|platform| platform.freeze());
        let at = at.unwrap_or_else(Instant::now);
        self.clock.freeze_at(at);
        self.frozen_at = Some(at);
    }

    fn thaw(&mut self) {
        let stood = self.frozen_at.take().map_or(Duration::ZERO, |at| at.elapsed());
        let at = self.platform.as_mut().map(|platform| platform.thaw(stood));
        self.clock.thaw_at(at.unwrap_or_else(Instant::now));
        // Its deadlines are due again.
        wake(&self.waker);
    }

    /// Has the guest loaded anew by a thread of its own: files may be slow, and the machine has to answer meanwhile.
    fn reload(&mut self) -> std::io::Result<()> {
        let Some(mut platform) = self.platform.take() else {
            return Ok(());
        };
        let Some(sender) = self.sender.clone() else {
            return Ok(());
        };
        let work = move || {
            let entry = platform.reset();
            // A machine that is gone does not care.
            let _ = sender.send(MachineMessage::Reloaded(Reloaded { platform, entry }));
        };
        crate::thread::spawn("reload", work).map(drop)
    }

    fn reset_failed(&mut self, why: String) -> Outcome {
        error!(self.log, "the machine cannot be reset: {why}");
        self.answer(Answer::Failed(why.clone()));
        Outcome::ResetFailed(why)
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
