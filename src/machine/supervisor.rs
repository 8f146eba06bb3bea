//! A machine: what it is configured to be, and how it is put together and taken apart. What it does in between is in
//! `actor.rs`.

use super::actor::ending::OUTPUT_LIMIT;
use super::actor::{Machine, NotStarted, Parts};
use super::chipset::{Chipset, ChipsetConfig, Lines, device_names};
use super::dispatch::{Actors, BigLock, Channels, DeviceLocks, Discipline, Dispatch, MutexKind};
use super::memory::{self, Backing, MIN_BYTES, MemoryConfig, MemoryError};
use super::outcome::{Outcome, status};
use super::platform::{NoPlatform, Platform};
use super::request::{Inbox, MachineAddress, Mailbox};
use super::vm::{Vm, VmError};
use super::{MachineMessage, cpuid::Topology, interpreter, virtio};
use crate::actors::PlacementKind;
use crate::baselines::mutex;
use crate::boot::layout;
use crate::boot::{self, AcpiConfig, BootConfig, BootError, EntryPoint};
use crate::clock::Clock;
use crate::control::observatory::{Observatory, Published};
use crate::control::plane::Plane;
use crate::devices::rtc::MemorySize;
use crate::devices::shell::InterruptLine;
use crate::devices::tarpit::Mire;
use crate::gdb::server::{self as gdb, GdbConfig, GdbError};
use crate::host::bus::MemoryWatch;
use crate::host::character::Waker;
use crate::host::console::{self, Console, ConsoleError, ConsoleKind};
use crate::host::events::{self, CharacterDevice, EventLoop, TimedDevice};
use crate::host::signals::{self, Signals};
use crate::host::socket::{OwnedSocket, SocketError};
use crate::vcpu::activity::{Activity, Watch};
use crate::vcpu::backend::Backend;
use crate::vcpu::kick;
use crate::virtio::config::{Opened, VirtioConfig, VirtioError};
use crate::virtio::pci::Doorbells;
use crate::virtio::queue::QueueActor;
use crate::virtio::{Notify, Transport};
use crossbeam_channel::Sender;
use slog::{Logger, debug, info, warn};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

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

impl Guest {
    /// No code, for vCPUs that bring what they run.
    pub fn none() -> Guest {
        Guest::Image {
            bytes: &[],
            at: 0,
            entry: EntryPoint::Flat32 { eip: 0 },
        }
    }
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
    /// It has a port for measurements ([`layout::io::DELAY`]) whose accesses take so long.
    pub delay: Option<Duration>,
    /// Disks and the like.
    pub virtio: VirtioConfig,
    /// After this it is ended.
    pub timeout: Option<Duration>,
    /// Where a gdb can connect.
    pub gdb: Option<GdbConfig>,
    /// What becomes of it when the guest asks for a reset.
    pub on_reset: OnReset,
    /// Where its control socket is.
    pub control: Option<PathBuf>,
    /// For tests: it has a device that blocks.
    #[doc(hidden)]
    pub tarpit: Option<Mire>,
}

/// What a guest gets that asks for a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub enum OnReset {
    /// The machine ends.
    #[default]
    Exit,
    /// It is reset in place, and boots again.
    Reset,
}

/// Why a machine cannot be started. Whose fault it is decides the exit status.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The user's files.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// No such device.
    #[error("--placement names no device '{name}'; there are {}", .there.join(", "))]
    NoSuchDevice {
        /// As given.
        name: String,
        /// What there is.
        there: Vec<&'static str>,
    },
    /// Disks and the like.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// Baselines have no placements.
    #[error("--placement places actors, and with --dispatch {0} there are none")]
    PlacementWithoutActors(Dispatch),
    /// Too many or no vCPUs.
    #[error("--cpus must be 1 to {MAX_CPUS}, not {0}")]
    Cpus(usize),
    /// Where the console goes.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] SocketError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Where gdb is to connect.
    #[error(transparent)]
    Gdb(#[from] GdbError),
    /// Threads, eventfds, signals.
    #[error("the host cannot start what the machine needs; are its limits (ulimit -u, ulimit -n) too low?")]
    Host(#[from] std::io::Error),
    /// A test guest does not fit.
    #[error("the guest's image does not fit into its memory; use a larger --memory")]
    Image,
    /// A balloon gives small pages back.
    #[error(
        "--balloon: memory of huge pages cannot be given back page by page; choose another --memory-backing"
    )]
    BalloonOfHugePages,
    /// A balloon of everything.
    #[error("--balloon size={size}: it has to be less than the guest's memory, {memory} bytes")]
    BalloonTooLarge {
        /// Bytes.
        size: u64,
        /// The same.
        memory: u64,
    },
}

impl StartError {
    /// The exit status that says so.
    pub fn status(&self) -> u8 {
        if self.is_bad_input() {
            status::BAD_INPUT
        } else {
            status::HOST_TROUBLE
        }
    }

    /// Whether the user can mend it with other input, as opposed to another host.
    pub fn is_bad_input(&self) -> bool {
        match self {
            StartError::Virtio(error) => return error.is_bad_input(),
            StartError::Control(error) => return error.is_bad_input(),
            StartError::Gdb(error) => return error.is_bad_input(),
            _ => {}
        }
        matches!(
            self,
            StartError::Boot(_)
                | StartError::NoSuchDevice { .. }
                | StartError::PlacementWithoutActors(_)
                | StartError::Console(ConsoleError::Same { .. } | ConsoleError::Used { .. })
                | StartError::Cpus(_)
                | StartError::Console(ConsoleError::File { .. })
                | StartError::Image
                | StartError::BalloonOfHugePages
                | StartError::BalloonTooLarge { .. }
                | StartError::Vm(VmError::TooManyVcpus { .. } | VmError::AddressBits { .. })
        )
    }
}

/// Clients of the control socket that wait to be accepted.
const CONTROL_BACKLOG: i32 = 16;

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

    fn has_eventfds(&self) -> bool {
        true
    }

    fn edge_eventfd(&self, gsi: u32) -> Result<EventFd, StartError> {
        Ok(Vm::edge_eventfd(self, gsi)?)
    }

    fn messages(
        &self,
        count: usize,
        notify: Notify,
        log: &Logger,
    ) -> Result<Vec<virtio::Source>, StartError> {
        Ok(Vm::messages(self, count, notify, log)?)
    }

    fn doorbells(&self, bells: Vec<EventFd>) -> Result<Box<dyn Doorbells>, StartError> {
        Ok(Vm::doorbells(self, bells))
    }

    fn bell(&self, address: u64, value: u32, bell: &EventFd) -> Result<(), StartError> {
        Ok(Vm::bell(self, address, value, bell)?)
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
    run_kvm(config, Inbox::new(), log)
}

/// The same, around a mailbox whose address somebody has.
///
/// # Errors
/// As [`run`].
pub fn run_kvm(config: &MachineConfig, inbox: Inbox, log: &Logger) -> Result<Outcome, StartError> {
    config.check()?;
    // What can be wrong with the user's input is found before the host is asked for anything.
    let listener = config.gdb.as_ref().map(gdb::Listener::new).transpose()?;
    let virtio = config.virtio.open(log)?;
    memory::check_host(&config.memory)?;
    let memory = memory::create(&config.memory)?;
    let watch = MemoryWatch::new(&memory)?;
    let topology = Topology::flat(config.cpus as u32);
    let mut acpi = AcpiConfig::new(topology.apic_ids());
    match config.virtio.transport {
        Transport::Mmio => acpi.virtio = virtio::described(virtio.len(), config.virtio.notify),
        Transport::Pci => acpi.pci = Some(virtio::root(virtio.len(), config.memory.size_bytes)),
    }
    let entry = load(&memory, &config.guest, &acpi, log)?;
    let interpreted = matches!(config.guest, Guest::Kernel(_)) && interpreter::interprets_kernel_mode();
    let vm = Vm::new(memory.clone(), config.cpus, true)?;
    if let Some(root) = &acpi.pci {
        vm.check_addresses(root.windows[1].end - 1)?;
    }
    let mut backends = Vec::with_capacity(config.cpus);
    for index in 0..config.cpus {
        let fd = vm.vcpu(index, &topology)?;
        if index == 0 {
            vm.enter_at(&fd, &entry)?;
        }
        backends.push(vm.backend(fd));
    }
    let (guest, load_log) = (config.guest.clone(), log.clone());
    let platform = vm.platform(move |memory| load(memory, &guest, &acpi, &load_log))?;
    let platform = platform.watched(watch);
    let debugger = match listener {
        Some(listener) => Some(gdb::Server::new(listener, memory.clone())?),
        None => None,
    };
    let virtio = Virtio {
        memory,
        devices: virtio,
    };
    let besides = Besides {
        virtio,
        debugger,
        interpreted,
    };
    run_with_all(config, backends, &vm, Box::new(platform), inbox, besides, log)
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
    run_controlled(config, backends, lines, Box::new(NoPlatform), Inbox::new(), log)
}

/// The same, around a mailbox whose address somebody has. `platform`: what else there is to pause and to reset.
///
/// # Errors
/// As [`run_with`].
pub fn run_controlled<B, L>(
    config: &MachineConfig,
    backends: Vec<B>,
    lines: &L,
    platform: Box<dyn Platform>,
    inbox: Inbox,
    log: &Logger,
) -> Result<Outcome, StartError>
where
    B: Backend + Send + 'static,
    L: Lines<Error = StartError>,
{
    run_around(config, backends, lines, Virtio::default(), platform, inbox, log)
}

/// Virtio devices that were opened, and the guest memory that they need.
#[derive(Default)]
pub struct Virtio {
    /// All of it.
    pub memory: GuestMemoryMmap,
    /// By their places.
    pub devices: Vec<Opened>,
}

/// The same with virtio devices.
///
/// # Errors
/// As [`run_with`].
pub fn run_around<B, L>(
    config: &MachineConfig,
    backends: Vec<B>,
    lines: &L,
    virtio: Virtio,
    platform: Box<dyn Platform>,
    inbox: Inbox,
    log: &Logger,
) -> Result<Outcome, StartError>
where
    B: Backend + Send + 'static,
    L: Lines<Error = StartError>,
{
    let besides = Besides {
        virtio,
        debugger: None,
        interpreted: false,
    };
    run_with_all(config, backends, lines, platform, inbox, besides, log)
}

/// What a machine need not have.
struct Besides {
    virtio: Virtio,
    debugger: Option<gdb::Server>,
    /// The host cannot do what the guest most likely needs.
    interpreted: bool,
}

fn run_with_all<B, L>(
    config: &MachineConfig,
    backends: Vec<B>,
    lines: &L,
    platform: Box<dyn Platform>,
    inbox: Inbox,
    Besides {
        virtio,
        debugger,
        interpreted,
    }: Besides,
    log: &Logger,
) -> Result<Outcome, StartError>
where
    B: Backend + Send + 'static,
    L: Lines<Error = StartError>,
{
    config.check()?;
    let console = Console::open(&config.console)?;
    let debug_console = Console::open_output(&config.debug_console)?;
    let mut virtio_console = config.virtio.console.as_ref().map(Console::open).transpose()?;
    for console in [&console, &debug_console].into_iter().chain(&virtio_console) {
        if console.comes_and_goes {
            // A person must find it whatever the log level is.
            crate::host::log::print(&format!("console: {}", console.name));
        }
    }
    let bind = |path| OwnedSocket::bind("--control ", path, CONTROL_BACKLOG);
    let socket = config.control.as_deref().map(bind).transpose()?;
    kick::install_handler()?;
    let signals = signals::collect()?;
    for console in [&console, &debug_console].into_iter().chain(&virtio_console) {
        console.begin();
    }
    for file in virtio.devices.iter().flat_map(|device| &device.files) {
        // Something that is no regular file cannot be emptied, and need not be.
        let _ = file.set_len(0);
    }

    let address = inbox.address();
    let Inbox { sender, mailbox } = inbox;
    let clock = Clock::new();
    // A console's own actors have it already.
    let its_waker = virtio.devices.iter().find_map(|device| device.console.as_ref());
    let waker = match its_waker {
        Some(host) => host.waker.clone(),
        None => Arc::new(EventFd::new(libc::EFD_NONBLOCK)?),
    };
    let mut consoles = std::iter::once(&console).chain(&virtio_console);
    let raw = consoles.find_map(events::take_terminal);
    let below_4g_bytes = config.memory.size_bytes.min(layout::PCI_HOLE);
    let chipset_config = ChipsetConfig {
        memory: MemorySize {
            below_4g_bytes,
            above_4g_bytes: config.memory.size_bytes - below_4g_bytes,
        },
        clock: clock.clone(),
        waker: waker.clone(),
        machine: sender.clone(),
        delay: config.delay,
        tarpit: config.tarpit.clone(),
        bus: virtio::bus(config.virtio.transport, config.memory.size_bytes),
    };
    let mut chipset = Chipset::new(&chipset_config, console, debug_console, lines)?;
    let notify = match lines.has_eventfds() {
        true => config.virtio.notify,
        false => Notify::Message,
    };
    let connections = virtio::Connections {
        bus: chipset_config.bus.as_ref(),
        notify,
        memory: &virtio.memory,
        lines,
        log,
    };
    for placed in virtio::place(virtio.devices, &connections)? {
        let console = virtio_console.take_if(|_| placed.console.is_some());
        chipset.add_virtio(placed, console, &chipset_config);
    }
    let devices = chipset.devices.len();
    let answered = chipset
        .devices
        .iter()
        .map(|device| (device.name, device.answered.clone()));
    let assembly = Assembly {
        answered: answered.collect(),
        backends,
        platform,
        characters: std::mem::take(&mut chipset.characters),
        timed: std::mem::take(&mut chipset.timed),
        queues: std::mem::take(&mut chipset.queues),
        switches: std::mem::take(&mut chipset.switches),
        signals,
        socket,
        address,
        published: Arc::new(Published::new(config.cpus, devices)),
        dispatch: config.dispatch,
        clock,
        waker,
        sender,
        mailbox,
        debugger,
        interpreted,
        on_reset: config.on_reset,
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
    answered: Vec<(&'static str, Arc<AtomicU32>)>,
    backends: Vec<B>,
    platform: Box<dyn Platform>,
    debugger: Option<gdb::Server>,
    interpreted: bool,
    on_reset: OnReset,
    characters: Vec<CharacterDevice>,
    timed: Vec<TimedDevice>,
    queues: Vec<(usize, QueueActor)>,
    switches: virtio::Switches,
    signals: Signals,
    socket: Option<OwnedSocket>,
    address: MachineAddress,
    published: Arc<Published>,
    dispatch: Dispatch,
    clock: Clock,
    waker: Waker,
    sender: Sender<MachineMessage>,
    mailbox: Mailbox,
    deadline: Option<Instant>,
    memory_bytes: u64,
    log: Logger,
}

impl<B: Backend + Send + 'static> Assembly<B> {
    fn run<D: Discipline>(mut self, mut discipline: D) -> Result<Outcome, StartError> {
        let size = self.switches.size.take();
        let tell = self.sender.clone();
        let activity = Activity::new();
        let events = activity.view();
        let event_loop = EventLoop {
            clock: self.clock.clone(),
            waker: self.waker.clone(),
            characters: self.characters,
            timed: self.timed,
            // The first to connect to the devices, then the messenger, then the vCPUs: `control/why.rs` knows them by
            // that.
            gate: discipline.gate(),
            machine: Box::new(move |event| drop(tell.try_send(MachineMessage::Host(event)))),
            activity,
            log: self.log.clone(),
        }
        .start()?;
        let devices = discipline.control();
        let messengers = devices.messengers();
        let vcpus = self.backends.len();
        let memory = self.platform.memory();
        let balloon = self
            .switches
            .balloon
            .as_ref()
            .map(|switch| switch.balloon().clone());
        let mut machine = Machine::new(Parts {
            sender: self.sender.clone(),
            mailbox: self.mailbox,
            devices,
            answered: self.answered,
            switches: self.switches,
            platform: self.platform,
            event_loop,
            clock: self.clock.clone(),
            waker: self.waker,
            deadline: self.deadline,
            on_reset: self.on_reset,
            vcpus,
            published: self.published.clone(),
            log: self.log.clone(),
        });
        let views = machine
            .start_queues(self.queues, &discipline)
            .map_err(NotStarted::Host)
            .and_then(|()| machine.start_vcpus(self.backends, &discipline, &self.sender));
        let mut signals = self.signals;
        let views = match views {
            Ok(views) => views,
            Err(why) => {
                drop(self.sender);
                machine.stop(OUTPUT_LIMIT);
                return match why {
                    NotStarted::Host(error) => Err(error.into()),
                    NotStarted::Quit => Ok(Outcome::Quit),
                    NotStarted::Signal => {
                        let which = signals.pending().find(|signal| signals::ends(*signal));
                        Ok(Outcome::Signal(which.unwrap_or(libc::SIGTERM)))
                    }
                };
            }
        };
        let plane = || {
            if let Some(server) = self.debugger {
                machine.debug_by(server)?;
            }
            let events = std::iter::once(("events".to_string(), events));
            let messengers = messengers.into_iter().enumerate();
            let messengers = messengers.map(|(index, view)| (format!("messenger{index}"), view));
            let others = events
                .chain(messengers)
                .map(|(name, view)| (name, Watch::new(view)));
            let (devices, routes) = discipline.watch();
            let observatory = Observatory {
                published: self.published,
                vcpus: views.into_iter().map(Watch::new).collect(),
                others: others.collect(),
                devices,
                routes,
                clock: self.clock,
                dispatch: self.dispatch,
                balloon,
                begun: Instant::now(),
            };
            machine.look_from(observatory.second());
            Plane {
                signals,
                socket: self.socket,
                machine: self.address,
                observatory,
                kicks: machine.kicks(),
                memory,
                size,
                log: self.log.clone(),
            }
            .start()
        };
        let started = plane();
        drop((self.sender, discipline));
        match started {
            Ok(plane) => {
                info!(self.log, "the guest starts"; "cpus" => vcpus,
                    "memory" => memory::human(self.memory_bytes));
                if self.interpreted {
                    warn!(
                        self.log,
                        "this host's KVM interprets the guest's kernel mode, and does not know all that stock kernels need \
                         there: one may be silent for minutes before it fails (`actor-vmm doctor` tells more)"
                    );
                }
                crate::host::code::give_back();
                let outcome = machine.supervise();
                // Only now: it hears signals and answers while the machine ends.
                plane.stop();
                Ok(outcome)
            }
            Err(error) => {
                machine.stop(OUTPUT_LIMIT);
                Err(error.into())
            }
        }
    }
}

impl MachineConfig {
    /// The least of a machine: so many vCPUs and [`MIN_BYTES`] of memory, run by actors, with nobody to talk to and no
    /// time limit.
    pub fn bare(guest: Guest, cpus: usize) -> MachineConfig {
        MachineConfig {
            guest,
            cpus,
            memory: MemoryConfig {
                size_bytes: MIN_BYTES,
                backing: Backing::Memfd,
            },
            dispatch: Dispatch::Actor,
            placements: Vec::new(),
            console: ConsoleKind::Off,
            debug_console: ConsoleKind::Off,
            delay: None,
            virtio: VirtioConfig::default(),
            timeout: None,
            gdb: None,
            on_reset: OnReset::Exit,
            control: None,
            tarpit: None,
        }
    }

    /// The files that the machine is made of, and the option that each was given by.
    fn files(&self) -> Vec<(&'static str, &Path)> {
        let mut files = Vec::new();
        if let Guest::Kernel(boot) = &self.guest {
            files.push(("--kernel", boot.kernel.as_path()));
            files.extend(boot.initrd.as_deref().map(|initrd| ("--initrd", initrd)));
        }
        let disks = self.virtio.disks.iter();
        files.extend(disks.map(|disk| ("--disk", disk.path.as_path())));
        files
    }

    /// What contradicts itself, found before anything is made.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn check(&self) -> Result<(), StartError> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(StartError::Cpus(self.cpus));
        }
        let ports = self.virtio.port_files().cloned().map(ConsoleKind::File);
        let ports: Vec<_> = ports.collect();
        let consoles = [
            ("--console", Some(&self.console)),
            ("--console virtio", self.virtio.console.as_ref()),
            ("--debug-console", Some(&self.debug_console)),
        ];
        let consoles = consoles.into_iter();
        let consoles: Vec<_> = consoles
            .filter_map(|(option, kind)| Some((option, kind?)))
            .chain(ports.iter().map(|kind| ("--port file", kind)))
            .collect();
        console::check_distinct(&consoles, &self.files())?;
        if self.dispatch != Dispatch::Actor && !self.placements.is_empty() {
            return Err(StartError::PlacementWithoutActors(self.dispatch));
        }
        self.virtio.check()?;
        if let Some(balloon) = &self.virtio.balloon {
            if self.memory.backing == Backing::Hugepages {
                return Err(StartError::BalloonOfHugePages);
            }
            if balloon.size_bytes >= self.memory.size_bytes {
                return Err(StartError::BalloonTooLarge {
                    size: balloon.size_bytes,
                    memory: self.memory.size_bytes,
                });
            }
        }
        let mut there = [&device_names(self.virtio.transport)[..], &self.virtio.names()].concat();
        if self.tarpit.is_some() {
            there.push("tarpit");
        }
        match self
            .placements
            .iter()
            .find(|(name, _)| !there.contains(&name.as_str()))
        {
            Some((name, _)) => Err(StartError::NoSuchDevice {
                name: name.clone(),
                there,
            }),
            None => Ok(()),
        }
    }
}

/// Puts the guest into memory and tells where it starts.
fn load(
    memory: &GuestMemoryMmap,
    guest: &Guest,
    acpi: &AcpiConfig,
    log: &Logger,
) -> Result<EntryPoint, StartError> {
    let begin = Instant::now();
    let entry = match guest {
        Guest::Kernel(files) => {
            let loaded = boot::load(memory, files, acpi)?;
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
