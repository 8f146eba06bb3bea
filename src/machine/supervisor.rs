//! The machine actor: the sole owner of the machine's state.
//!
//! Owns: the state, the handles of all vCPUs, devices and the event loop. Receives: [`MachineMessage`]. Asks: nobody
//! (it must answer while anybody else is stuck): it sends, and waits for news with a limit. Rank: supervisor. Ends:
//! when everything else has, or when what is stuck has had its time.

use super::chipset::{Chipset, ChipsetConfig, DEVICE_NAMES, Lines};
use super::dispatch::{Actors, BigLock, Channels, Control, DeviceLocks, Discipline, Dispatch, MutexKind};
use super::memory::{self, MemoryConfig, MemoryError};
use super::outcome::Outcome;
use super::state::{State, Transition};
use super::vm::{Vm, VmError};
use super::{MachineMessage, cpuid::Topology};
use crate::actors::{Lifecycle, PlacementKind};
use crate::baselines::mutex;
use crate::boot::layout;
use crate::boot::{self, AcpiConfig, BootConfig, BootError, EntryPoint};
use crate::clock::Clock;
use crate::devices::MachineRequest;
use crate::devices::rtc::MemorySize;
use crate::devices::shell::InterruptLine;
use crate::host::character::Waker;
use crate::host::console::{self, Console, ConsoleError, ConsoleKind};
use crate::host::events::{
    self, CharacterDevice, EventLoop, EventLoopHandle, HostEvent, Signals, TimedDevice,
};
use crate::vcpu::backend::Backend;
use crate::vcpu::exit::SystemEvent;
use crate::vcpu::route::Space;
use crate::vcpu::{End, Vcpu, VcpuEvent, VcpuHandle, VcpuMessage, VcpuNews, kick, vcpu_mailbox};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select};
use slog::{Logger, crit, debug, error, info, o, warn};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Messages that wait for the machine actor. Each vCPU has one at most on its way, devices and the event loop drop
/// theirs when it is full (then an end is in it already).
const MAILBOX: usize = 2048;

/// How long vCPUs may take to end before they are given up and named.
const VCPU_LIMIT: Duration = Duration::from_millis(500);
/// How long the guest's last output may take to be written.
const OUTPUT_LIMIT: Duration = Duration::from_millis(300);
/// The same when the guest ended by itself: whoever reads may be slow, and nothing shall be lost.
const PATIENT_OUTPUT_LIMIT: Duration = Duration::from_secs(10);

/// What a guest starts with.
#[derive(Clone, Debug)]
pub enum Guest {
    /// A kernel from files.
    Kernel(BootConfig),
    /// Code that is copied to an address and entered: bare-metal guests.
    Image {
        /// The code and data.
        bytes: &'static [u8],
        /// Guest physical address.
        at: u64,
        /// How the boot processor enters it.
        entry: EntryPoint,
    },
}

/// A whole machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What it boots.
    pub guest: Guest,
    /// How many vCPUs.
    pub cpus: usize,
    /// Its memory.
    pub memory: MemoryConfig,
    /// How vCPUs reach devices.
    pub dispatch: Dispatch,
    /// Which device runs where; for [`Dispatch::Actor`] only.
    pub placements: Vec<(String, PlacementKind)>,
    /// Where the first serial port goes.
    pub console: ConsoleKind,
    /// Where the debug console goes.
    pub debug_console: ConsoleKind,
    /// After this it is ended.
    pub timeout: Option<Duration>,
}

/// Why a machine cannot be started. Whose fault it is decides the exit status.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The user's files.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// No such device.
    #[error("--placement names no device '{name}'; there are {}", DEVICE_NAMES.join(", "))]
    NoSuchDevice {
        /// As given.
        name: String,
    },
    /// Baselines have no placements.
    #[error("--placement places actors, and with --dispatch {0} there are none")]
    PlacementWithoutActors(Dispatch),
    /// Too many or no vCPUs.
    #[error("--cpus must be 1 to {MAX_CPUS}, not {0}")]
    Cpus(usize),
    /// Where the console goes.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Threads, eventfds, signals.
    #[error("the host cannot start what the machine needs; are its limits (ulimit -u, ulimit -n) too low?")]
    Host(#[from] std::io::Error),
    /// A test guest does not fit.
    #[error("the guest's image does not fit into its memory; use a larger --memory")]
    Image,
}

impl StartError {
    /// Whether the user can mend it with other input, as opposed to another host.
    pub fn is_bad_input(&self) -> bool {
        matches!(
            self,
            StartError::Boot(_)
                | StartError::NoSuchDevice { .. }
                | StartError::PlacementWithoutActors(_)
                | StartError::Console(ConsoleError::Same(_))
                | StartError::Cpus(_)
                | StartError::Console(ConsoleError::File { .. })
                | StartError::Image
                | StartError::Vm(VmError::TooManyVcpus { .. })
        )
    }
}

/// More than this no machine has: lanes are made for it.
pub const MAX_CPUS: usize = 1024;

/// The lines of a VM.
impl Lines for Vm {
    type Error = StartError;

    fn edge(&self, gsi: u32) -> Result<Box<dyn InterruptLine>, StartError> {
        Ok(self.edge_line(gsi)?)
    }

    fn level(&self, gsi: u32) -> Result<Box<dyn InterruptLine>, StartError> {
        Ok(self.level_line(gsi))
    }
}

/// Lines that lead nowhere: for machines without KVM, whose guests are scripts and take no interrupts.
pub struct Unwired;

impl Lines for Unwired {
    type Error = StartError;

    fn edge(&self, _gsi: u32) -> Result<Box<dyn InterruptLine>, StartError> {
        Ok(Box::new(Unwired))
    }

    fn level(&self, _gsi: u32) -> Result<Box<dyn InterruptLine>, StartError> {
        Ok(Box::new(Unwired))
    }
}

impl InterruptLine for Unwired {
    fn set(&mut self, _level: bool) {}
}

/// Builds a machine of KVM, runs it to its end, and takes it apart.
///
/// # Errors
/// [`StartError`] when it cannot be started; nothing of it is left then.
pub fn run(config: &MachineConfig, log: &Logger) -> Result<Outcome, StartError> {
    config.check()?;
    // What can be wrong with the user's files is found before the host is asked for anything.
    memory::check_host(&config.memory)?;
    let memory = memory::create(&config.memory)?;
    let topology = Topology::flat(config.cpus as u32);
    let entry = load(&memory, config, &topology, log)?;
    let vm = Vm::new(memory.clone(), config.cpus, true)?;
    let mut backends = Vec::with_capacity(config.cpus);
    for index in 0..config.cpus {
        let fd = vm.vcpu(index, &topology)?;
        if index == 0 {
            vm.enter_at(&fd, &entry)?;
        }
        backends.push(vm.backend(fd));
    }
    run_with(config, backends, &vm, log)
}

/// Runs a machine around vCPUs that are there already, one a backend: those of KVM, or scripted ones. The devices,
/// the event loop and the supervisor are the same for both.
///
/// # Errors
/// [`StartError`] when it cannot be started; nothing of it is left then.
pub fn run_with<B, L>(
    config: &MachineConfig,
    backends: Vec<B>,
    lines: &L,
    log: &Logger,
) -> Result<Outcome, StartError>
where
    B: Backend + Send + 'static,
    L: Lines<Error = StartError>,
{
    config.check()?;
    let console = Console::open(&config.console)?;
    let debug_console = Console::open_output(&config.debug_console)?;
    for console in [&console, &debug_console] {
        if console.comes_and_goes {
            // A person must find it whatever the log level is.
            crate::host::log::print(&format!("console: {}", console.name));
        }
    }
    kick::install_handler()?;
    let signals = events::collect_signals()?;
    for console in [&console, &debug_console] {
        console.begin();
    }

    let (sender, mailbox) = bounded(MAILBOX);
    let clock = Clock::new();
    let waker = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
    let raw = events::take_terminal(&console);
    let below_4g_bytes = config.memory.size_bytes.min(layout::PCI_HOLE);
    let chipset_config = ChipsetConfig {
        memory: MemorySize {
            below_4g_bytes,
            above_4g_bytes: config.memory.size_bytes - below_4g_bytes,
        },
        clock: clock.clone(),
        waker: waker.clone(),
        machine: sender.clone(),
    };
    let mut chipset = Chipset::new(chipset_config, console, debug_console, lines)?;
    let assembly = Assembly {
        backends,
        characters: std::mem::take(&mut chipset.characters),
        timed: std::mem::take(&mut chipset.timed),
        signals,
        clock,
        waker,
        sender,
        mailbox,
        deadline: config.timeout.map(|limit| Instant::now() + limit),
        memory_bytes: config.memory.size_bytes,
        log: log.clone(),
    };
    let outcome = match config.dispatch {
        Dispatch::Actor => {
            let vcpus = assembly.backends.len();
            let actors = Actors::new(chipset, vcpus, &config.placements, &assembly.sender)?;
            assembly.run(actors)
        }
        Dispatch::Channel { spin } => assembly.run(Channels::new(chipset, spin)?),
        Dispatch::DeviceLock(MutexKind::Std) => assembly.run(DeviceLocks::<mutex::Std<_>>::new(chipset)),
        Dispatch::DeviceLock(MutexKind::ParkingLot) => {
            assembly.run(DeviceLocks::<mutex::ParkingLot<_>>::new(chipset))
        }
        Dispatch::BigLock(MutexKind::Std) => assembly.run(BigLock::<mutex::Std<_>>::new(chipset)),
        Dispatch::BigLock(MutexKind::ParkingLot) => {
            assembly.run(BigLock::<mutex::ParkingLot<_>>::new(chipset))
        }
    }?;
    drop(raw);
    Ok(outcome)
}

/// All that a machine is made of, but for how its devices are reached.
struct Assembly<B> {
    backends: Vec<B>,
    characters: Vec<CharacterDevice>,
    timed: Vec<TimedDevice>,
    signals: Signals,
    clock: Clock,
    waker: Waker,
    sender: Sender<MachineMessage>,
    mailbox: Receiver<MachineMessage>,
    deadline: Option<Instant>,
    memory_bytes: u64,
    log: Logger,
}

impl<B: Backend + Send + 'static> Assembly<B> {
    fn run<D: Discipline>(self, mut discipline: D) -> Result<Outcome, StartError> {
        let tell = self.sender.clone();
        let event_loop = EventLoop {
            clock: self.clock,
            waker: self.waker,
            characters: self.characters,
            timed: self.timed,
            gate: discipline.gate(),
            machine: Box::new(move |event| drop(tell.try_send(MachineMessage::Host(event)))),
            log: self.log.clone(),
        }
        .start(self.signals)?;
        let mut machine = Machine {
            state: State::Created,
            mailbox: self.mailbox,
            vcpus: Vec::new(),
            devices: discipline.control(),
            event_loop,
            deadline: self.deadline,
            log: self.log,
        };
        let started = machine.start_vcpus(self.backends, &discipline, &self.sender);
        drop((self.sender, discipline));
        match started {
            Ok(()) => {
                info!(machine.log, "the guest starts"; "cpus" => machine.vcpus.len(),
                    "memory" => memory::human(self.memory_bytes));
                crate::host::code::give_back();
                Ok(machine.supervise())
            }
            Err(error) => {
                machine.stop(OUTPUT_LIMIT);
                Err(error.into())
            }
        }
    }
}

impl MachineConfig {
    /// What contradicts itself, found before anything is made.
    fn check(&self) -> Result<(), StartError> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(StartError::Cpus(self.cpus));
        }
        console::check_distinct(&self.console, &self.debug_console)?;
        if self.dispatch != Dispatch::Actor && !self.placements.is_empty() {
            return Err(StartError::PlacementWithoutActors(self.dispatch));
        }
        match self
            .placements
            .iter()
            .find(|(name, _)| !DEVICE_NAMES.contains(&name.as_str()))
        {
            Some((name, _)) => Err(StartError::NoSuchDevice { name: name.clone() }),
            None => Ok(()),
        }
    }
}

/// Puts the guest into memory and tells where it starts.
fn load(
    memory: &GuestMemoryMmap,
    config: &MachineConfig,
    topology: &Topology,
    log: &Logger,
) -> Result<EntryPoint, StartError> {
    let begin = Instant::now();
    let entry = match &config.guest {
        Guest::Kernel(files) => {
            let loaded = boot::load(memory, files, &AcpiConfig::new(topology.apic_ids()))?;
            debug!(log, "loaded"; "kernel" => format!("{:x?}", loaded.kernel), "initrd" => format!("{:x?}", loaded.initrd),
                "acpi_bytes" => loaded.acpi_bytes);
            loaded.entry
        }
        Guest::Image { bytes, at, entry } => {
            use vm_memory::{Bytes, GuestAddress};
            memory
                .write_slice(bytes, GuestAddress(*at))
                .map_err(|_| StartError::Image)?;
            boot::entry::write_tables(memory, entry).map_err(|_| StartError::Image)?;
            *entry
        }
    };
    debug!(log, "guest loaded"; "ms" => begin.elapsed().as_millis(), "entry" => format!("{entry:x?}"));
    Ok(entry)
}

/// The machine actor.
struct Machine {
    state: State,
    mailbox: Receiver<MachineMessage>,
    vcpus: Vec<RunningVcpu>,
    devices: Box<dyn Control>,
    event_loop: EventLoopHandle,
    deadline: Option<Instant>,
    log: Logger,
}

struct RunningVcpu {
    handle: VcpuHandle,
    thread: Option<std::thread::JoinHandle<()>>,
    stopped: bool,
}

impl Machine {
    /// Starts the vCPUs' threads and lets them run when all are ready.
    fn start_vcpus<B: Backend + Send + 'static, D: Discipline>(
        &mut self,
        backends: Vec<B>,
        discipline: &D,
        news: &Sender<MachineMessage>,
    ) -> std::io::Result<()> {
        let expected = backends.len();
        for (index, backend) in backends.into_iter().enumerate() {
            let bus = discipline.bus(self.log.new(o!("vcpu" => index)));
            let (handle, inbox) = vcpu_mailbox();
            let news = news.clone();
            // A machine that is gone does not care.
            let tell = Box::new(move |what: VcpuNews| drop(news.send(MachineMessage::Vcpu(what))));
            let vcpu = Vcpu::new(index, backend, bus, inbox, tell);
            let thread = crate::thread::spawn(format!("vcpu{index}"), move || vcpu.run())?;
            self.vcpus.push(RunningVcpu {
                handle,
                thread: Some(thread),
                stopped: false,
            });
        }
        let mut ready = 0;
        while ready < expected {
            match self.mailbox.recv() {
                Ok(MachineMessage::Vcpu(VcpuNews {
                    what: VcpuEvent::Ready,
                    ..
                })) => ready += 1,
                // A signal before the start is found again by `supervise`, which must not miss it.
                Ok(other) => {
                    let _ = news.try_send(other);
                }
                Err(_) => unreachable!("we hold a sender"),
            }
        }
        Ok(())
    }

    fn go(&mut self, transition: Transition) {
        match self.state.after(transition) {
            Ok(state) => {
                debug!(self.log, "machine: {} -> {}", self.state, state);
                self.state = state;
            }
            Err(refused) => error!(self.log, "{refused}"),
        }
    }

    /// Lets the guest run and waits for how it ends.
    fn supervise(&mut self) -> Outcome {
        self.go(Transition::Start);
        self.devices.tell(Lifecycle::Start);
        for vcpu in &self.vcpus {
            vcpu.handle.send(VcpuMessage::Lifecycle(Lifecycle::Start));
        }
        let outcome = loop {
            let message = match self.deadline {
                None => self.mailbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => self.mailbox.recv_deadline(deadline),
            };
            match message {
                Ok(message) => {
                    if let Some(outcome) = self.handle(message) {
                        break outcome;
                    }
                }
                Err(RecvTimeoutError::Timeout) => break Outcome::TimedOut(self.state),
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("vCPUs hold senders until they are stopped")
                }
            }
        };
        if let Outcome::InternalError(diagnosis) = &outcome {
            self.go(Transition::Fail);
            crit!(self.log, "{diagnosis}");
        }
        let patience = match outcome {
            Outcome::PoweredOff | Outcome::GuestExit(_) | Outcome::Reset => PATIENT_OUTPUT_LIMIT,
            _ => OUTPUT_LIMIT,
        };
        self.stop(patience);
        outcome
    }

    /// One message. `Some`: the machine has come to its end.
    fn handle(&mut self, message: MachineMessage) -> Option<Outcome> {
        match message {
            MachineMessage::Device(MachineRequest::PowerOff) => Some(Outcome::PoweredOff),
            MachineMessage::Device(MachineRequest::Reset) => Some(Outcome::Reset),
            MachineMessage::Device(MachineRequest::Exit(value)) => Some(Outcome::GuestExit(value)),
            MachineMessage::Device(MachineRequest::GuestPanic) => Some(Outcome::GuestPanic),
            MachineMessage::Host(HostEvent::Signal(signal)) => Some(Outcome::Signal(signal)),
            MachineMessage::Host(HostEvent::Quit) => Some(Outcome::Quit),
            MachineMessage::Host(HostEvent::Died) => Some(Outcome::EventLoopDied),
            MachineMessage::Died(obituary) => {
                error!(
                    self.log,
                    "device {} died and reads all-ones from now on; this is a bug: {}",
                    obituary.actor,
                    obituary.cause
                );
                None
            }
            MachineMessage::Vcpu(VcpuNews { vcpu, what }) => match what {
                VcpuEvent::Halted(End::TripleFault) => Some(Outcome::TripleFault),
                VcpuEvent::Halted(End::SystemEvent(event)) => Some(match event {
                    SystemEvent::Shutdown => Outcome::PoweredOff,
                    SystemEvent::Reset => Outcome::Reset,
                    SystemEvent::Crash => Outcome::GuestPanic,
                    SystemEvent::Other(kind) => {
                        warn!(
                            self.log,
                            "vcpu{vcpu}: KVM system event {kind}, taken as a request to reset"
                        );
                        Outcome::Reset
                    }
                }),
                VcpuEvent::Halted(End::InternalError(diagnosis)) => Some(Outcome::InternalError(diagnosis)),
                VcpuEvent::Ready | VcpuEvent::Paused | VcpuEvent::Stopped(_) => None,
            },
        }
    }

    /// Has the event loop write what the guest has sent, and end. A signal meanwhile cuts that short.
    fn drain_output(&mut self, limit: Duration) {
        self.event_loop.stop(limit);
        let deadline = crossbeam_channel::after(limit + Duration::from_millis(200));
        loop {
            select! {
                recv(self.event_loop.ended()) -> _ => return,
                recv(self.mailbox) -> message => match message {
                    Ok(MachineMessage::Host(_)) => return,
                    Ok(_) => {}
                    // Nobody is left to send.
                    Err(_) => {
                        let _ = self.event_loop.ended().recv_timeout(limit);
                        return;
                    }
                },
                recv(deadline) -> _ => return,
            }
        }
    }

    /// Ends everything: vCPUs, then what they have sent, then devices. What is stuck is named and left behind.
    fn stop(&mut self, output_limit: Duration) {
        self.go(Transition::Stop);
        for vcpu in &self.vcpus {
            vcpu.handle.send(VcpuMessage::Stop);
        }
        let deadline = Instant::now() + VCPU_LIMIT;
        while self.vcpus.iter().any(|vcpu| !vcpu.stopped) {
            match self.mailbox.recv_deadline(deadline) {
                Ok(MachineMessage::Vcpu(VcpuNews {
                    vcpu,
                    what: VcpuEvent::Stopped(unclaimed),
                })) => {
                    self.vcpus[vcpu].stopped = true;
                    for (space, start, count) in unclaimed {
                        let space = match space {
                            Space::Pio => "ports",
                            Space::Mmio => "addresses",
                        };
                        debug!(self.log, "vcpu{vcpu}: accesses to {space} that nobody claims";
                            "from" => format!("{start:#x}"), "count" => count);
                    }
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            if let Some(thread) = vcpu.thread.take_if(|_| vcpu.stopped) {
                let _ = thread.join();
            } else if !vcpu.stopped {
                warn!(self.log, "vcpu{index} did not end in time and is left behind");
            }
        }
        self.drain_output(output_limit);
        // A vCPU that does not end waits for a device whose turn does not: one that does not take its own stop.
        let all_ended = self.vcpus.iter().all(|vcpu| vcpu.stopped);
        for name in self.devices.stop(all_ended) {
            warn!(
                self.log,
                "device {name} is stuck in an access and is left behind; this is a bug"
            );
        }
        self.go(Transition::Stopped);
    }
}
