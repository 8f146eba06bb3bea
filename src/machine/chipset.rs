//! The devices of a machine: which there are, where they are, and what they are connected to.

use super::MachineMessage;
use crate::actors::{Address, Placement, PlacementKind, Pool, Port, Spawned};
use crate::boot::layout::io;
use crate::clock::Clock;
use crate::devices::acpi_pm::{AcpiPm, PmTimer};
use crate::devices::debug_console::DebugConsole;
use crate::devices::debug_exit::DebugExit;
use crate::devices::i8042::I8042;
use crate::devices::pci_config::PciConfig;
use crate::devices::pvpanic::Pvpanic;
use crate::devices::rtc::{MemorySize, Rtc};
use crate::devices::shell::{InterruptLine, Shell, Surroundings};
use crate::devices::uart16550::Uart16550;
use crate::devices::{Access, AccessClass, Claim, Device, Direction};
use crate::devices::{acpi_pm, debug_console, debug_exit, i8042, pci_config, pvpanic, rtc, uart16550};
use crate::host::character::{self, Waker};
use crate::host::console::Console;
use crate::host::events::{CharacterDevice, TimedDevice};
use crate::host::timer::TimerSlot;
use crate::vcpu::route::{Route, RoutingTable, Space, Target};
use crossbeam_channel::Sender;
use std::sync::Arc;

/// The names that `--placement NAME=…` takes.
pub const DEVICE_NAMES: [&str; 8] = [
    "serial0",
    "rtc",
    "i8042",
    "acpi_pm",
    "debug_exit",
    "debug_console",
    "pvpanic",
    "pci_config",
];

/// How many threads a pool has. Register handlers are short; what blocks has a thread of its own elsewhere.
const POOL_THREADS: usize = 2;

/// Lanes of a device beside the vCPUs': the machine actor's and the event loop's two (bytes and deadlines).
const OTHER_LANES: usize = 3;

/// Where the chipset's interrupt lines lead.
pub trait Lines {
    /// What can go wrong.
    type Error;
    /// An edge-triggered line.
    fn edge(&self, gsi: u32) -> Result<Box<dyn InterruptLine>, Self::Error>;
    /// A level-triggered line.
    fn level(&self, gsi: u32) -> Result<Box<dyn InterruptLine>, Self::Error>;
}

/// What a chipset is made from.
pub struct ChipsetConfig<'a> {
    /// How many vCPUs will connect.
    pub vcpus: usize,
    /// What the RTC's CMOS says about memory.
    pub memory: MemorySize,
    /// Which device runs where; others by handoff.
    pub placements: &'a [(String, PlacementKind)],
    /// Guest time.
    pub clock: Clock,
    /// What wakes the event loop.
    pub waker: Waker,
    /// Where requests and deaths are told.
    pub machine: Sender<MachineMessage>,
}

/// One device, before it is an actor.
struct Part {
    device: Box<dyn Device>,
    base: u16,
    claims: &'static [Claim],
    line: Option<Box<dyn InterruptLine>>,
    console: Option<Console>,
    timed: bool,
}

/// One device as an actor.
struct Placed {
    spawned: Spawned<Shell>,
    base: u16,
    claims: &'static [Claim],
    classify: fn(Access, Direction) -> AccessClass,
}

/// The devices of a machine, as actors.
pub struct Chipset {
    devices: Vec<Placed>,
    pm_timer: Arc<PmTimer>,
    clock: Clock,
    /// For the event loop.
    pub characters: Vec<CharacterDevice>,
    /// For the event loop.
    pub timed: Vec<TimedDevice>,
}

impl Chipset {
    /// Makes the devices and starts their actors. `console`: where the first serial port goes; `debug_console`:
    /// where the debug console does.
    ///
    /// # Errors
    /// From `lines`; or when the host cannot start a thread.
    pub fn new<L: Lines>(
        config: ChipsetConfig<'_>,
        console: Console,
        debug_console: Console,
        lines: &L,
    ) -> Result<Chipset, L::Error>
    where
        L::Error: From<std::io::Error>,
    {
        let part = |device: Box<dyn Device>, base, claims| Part {
            device,
            base,
            claims,
            line: None,
            console: None,
            timed: false,
        };
        let parts = vec![
            Part {
                line: Some(lines.edge(io::SERIAL0_IRQ)?),
                console: Some(console),
                timed: true,
                ..part(
                    Box::new(Uart16550::new("serial0")),
                    io::SERIAL0,
                    uart16550::CLAIMS,
                )
            },
            Part {
                line: Some(lines.edge(io::RTC_IRQ)?),
                timed: true,
                ..part(Box::new(Rtc::new(config.memory)), io::RTC, rtc::CLAIMS)
            },
            Part {
                line: Some(lines.level(io::SCI_IRQ)?),
                ..part(Box::new(AcpiPm::new()), io::PM1A_EVENT, acpi_pm::CLAIMS)
            },
            Part {
                console: Some(debug_console),
                ..part(
                    Box::new(DebugConsole::new()),
                    io::DEBUG_CONSOLE,
                    debug_console::CLAIMS,
                )
            },
            part(Box::new(I8042::new()), io::I8042, i8042::CLAIMS),
            part(Box::new(DebugExit::new()), io::DEBUG_EXIT, debug_exit::CLAIMS),
            part(Box::new(Pvpanic::new()), io::PVPANIC, pvpanic::CLAIMS),
            part(Box::new(PciConfig::new()), io::PCI_CONFIG, pci_config::CLAIMS),
        ];
        let mut pool = None;
        let mut chipset = Chipset {
            devices: Vec::with_capacity(parts.len()),
            pm_timer: Arc::new(PmTimer::new()),
            clock: config.clock.clone(),
            characters: Vec::new(),
            timed: Vec::new(),
        };
        for part in parts {
            let wanted = config
                .placements
                .iter()
                .rev()
                .find(|(name, _)| name == part.device.name());
            let placement = match wanted.map_or(PlacementKind::default(), |(_, kind)| *kind) {
                PlacementKind::Handoff => Placement::Handoff,
                PlacementKind::Thread => Placement::Thread,
                PlacementKind::Pool => Placement::Pool(match &pool {
                    Some(pool) => Pool::clone(pool),
                    None => pool.insert(Pool::new(POOL_THREADS)?).clone(),
                }),
            };
            chipset.add(part, placement, &config)?;
        }
        Ok(chipset)
    }

    fn add(&mut self, part: Part, placement: Placement, config: &ChipsetConfig<'_>) -> std::io::Result<()> {
        let Part {
            device,
            base,
            claims,
            line,
            console,
            timed,
        } = part;
        let (name, classify) = (device.name(), device.classify());
        let (character, host_end) = match console {
            Some(console) => {
                let (device_end, host_end) = character::pair(config.waker.clone());
                (Some(device_end), Some((console, host_end)))
            }
            None => (None, None),
        };
        let timer = timed.then(|| TimerSlot::new(config.waker.clone()));
        let machine = config.machine.clone();
        let outside = Surroundings {
            clock: config.clock.clone(),
            line,
            character,
            timer: timer.clone(),
            // A turn must not wait. A full mailbox has an end of the machine in it already.
            requests: Box::new(move |request| drop(machine.try_send(MachineMessage::Device(request)))),
        };
        let machine = config.machine.clone();
        let spawned = Address::spawn(
            Shell::new(device, outside),
            name,
            placement,
            config.vcpus + OTHER_LANES,
            move |obituary| drop(machine.try_send(MachineMessage::Died(obituary))),
        )?;
        let connect = || spawned.address.connect().expect("lanes were counted");
        if let Some((console, end)) = host_end {
            self.characters.push(CharacterDevice {
                console,
                end,
                port: connect(),
            });
        }
        if let Some(slot) = timer {
            self.timed.push(TimedDevice {
                slot,
                port: connect(),
            });
        }
        self.devices.push(Placed {
            spawned,
            base,
            claims,
            classify,
        });
        Ok(())
    }

    /// A vCPU's own table, with a port of its own to each device.
    pub fn routing_table(&self, log: slog::Logger) -> RoutingTable {
        let mut table = RoutingTable::new(self.clock.clone(), log);
        for placed in &self.devices {
            let device = table.connect(placed.spawned.address.connect().expect("lanes were counted"));
            for claim in placed.claims {
                let start = u64::from(placed.base) + claim.offset;
                let route = Route {
                    start,
                    last: start + claim.len - 1,
                    base: claim.offset,
                    target: Target::Device {
                        device,
                        classify: placed.classify,
                    },
                };
                table
                    .insert(Space::Pio, route)
                    .expect("the layout has no overlaps");
            }
        }
        let timer = Route {
            start: io::PM_TIMER.into(),
            last: u64::from(io::PM_TIMER) + 3,
            base: 0,
            target: Target::Published(self.pm_timer.clone()),
        };
        table
            .insert(Space::Pio, timer)
            .expect("the layout has no overlaps");
        table
    }

    /// The machine actor's ports, by name.
    pub fn ports(&self) -> Vec<Port<Shell>> {
        self.devices
            .iter()
            .map(|placed| placed.spawned.address.connect().expect("lanes were counted"))
            .collect()
    }

    /// Takes the threads of devices that have their own.
    pub fn take_threads(&mut self) -> Vec<std::thread::JoinHandle<()>> {
        self.devices
            .iter_mut()
            .filter_map(|placed| placed.spawned.thread.take())
            .collect()
    }
}
