//! The devices of a machine: which there are, where they are, and what they are connected to.

use super::MachineMessage;
use super::msi::NoWire;
use super::virtio::{Place, Placed, Source, Switches};
use crate::boot::layout::{self, io};
use crate::clock::Clock;
use crate::devices::acpi_pm::{AcpiPm, PmTimer};
use crate::devices::debug_console::DebugConsole;
use crate::devices::debug_exit::DebugExit;
use crate::devices::delay::Delay;
use crate::devices::i8042::I8042;
use crate::devices::pci_config::PciConfig;
use crate::devices::pvpanic::Pvpanic;
use crate::devices::rtc::{MemorySize, Rtc};
use crate::devices::shell::{InterruptLine, Shell, Surroundings};
use crate::devices::tarpit::{self, Mire, Tarpit};
use crate::devices::uart16550::Uart16550;
use crate::devices::{Access, AccessClass, Claim, Device, Direction, Published};
use crate::devices::{acpi_pm, debug_console, debug_exit, delay, i8042, pci_config, pvpanic, rtc, uart16550};
use crate::host::character::{self, Waker};
use crate::host::console::Console;
use crate::host::events::{CharacterDevice, Recipient, TimedDevice};
use crate::host::timer::TimerSlot;
use crate::pci::decode::{Bus, DataPorts, Ecam, Functions, Window};
use crate::pci::host_bridge::HostBridge;
use crate::pci::{ECAM_BUS_BYTES, host_bridge};
use crate::vcpu::route::{Decode, Route, RouteMap, Space, Target};
use crate::virtio::pci::Doorbells;
use crate::virtio::queue::QueueActor;
use crate::virtio::{Notify, Transport, mmio, pci};
use crossbeam_channel::Sender;
use slog::Logger;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// The names that `--placement NAME=…` takes, beside those of virtio devices.
pub fn device_names(transport: Transport) -> [&'static str; 8] {
    let pci = match transport {
        Transport::Mmio => "pci_config",
        Transport::Pci => "pci_host",
    };
    [
        "serial0",
        "rtc",
        "i8042",
        "acpi_pm",
        "debug_exit",
        "debug_console",
        "pvpanic",
        pci,
    ]
}

/// Devices and the ranges that lead to them: what a discipline of dispatch takes. A machine's come from its
/// [`Chipset`]; benches bring their own.
pub struct DeviceSet {
    /// Names, for `--placement` and the log, and devices; their numbers are their places here.
    pub devices: Vec<(&'static str, Shell)>,
    /// Which range is whose.
    pub routes: RouteMap,
    /// Guest time.
    pub clock: Clock,
}

impl From<Chipset> for DeviceSet {
    fn from(chipset: Chipset) -> DeviceSet {
        let routes = chipset.routes();
        let devices = chipset.devices.into_iter();
        DeviceSet {
            devices: devices.map(|wired| (wired.name, wired.shell)).collect(),
            routes,
            clock: chipset.clock,
        }
    }
}

/// Where the devices' interrupt lines lead, and what reaches them without an exit.
pub trait Lines {
    /// What can go wrong.
    type Error: From<std::io::Error>;
    /// An edge-triggered line.
    fn edge(&self, gsi: u32) -> Result<Box<dyn InterruptLine>, Self::Error>;
    /// A level-triggered line.
    fn level(&self, gsi: u32) -> Result<Box<dyn InterruptLine>, Self::Error>;
    /// Whether eventfds reach the guest, and its writes them. If not, everything goes by message, and the methods below
    /// that take or give some are not called.
    fn has_eventfds(&self) -> bool {
        false
    }
    /// An eventfd each write to which is an edge of a line.
    fn edge_eventfd(&self, _gsi: u32) -> Result<EventFd, Self::Error> {
        Err(std::io::Error::from(std::io::ErrorKind::Unsupported).into())
    }
    /// So many sources of interrupts by message. Called once a machine.
    fn messages(&self, count: usize, _notify: Notify, _log: &Logger) -> Result<Vec<Source>, Self::Error> {
        let none = || Source {
            wire: Box::<NoWire>::default(),
            signal: None,
        };
        Ok(std::iter::repeat_with(none).take(count).collect())
    }
    /// Has a driver's notifications ring bells, wherever the registers for them are.
    fn doorbells(&self, _bells: Vec<EventFd>) -> Result<Box<dyn Doorbells>, Self::Error> {
        Err(std::io::Error::from(std::io::ErrorKind::Unsupported).into())
    }
    /// Has a 32-bit write of `value` to `address` ring `bell` instead of leaving the guest.
    fn bell(&self, _address: u64, _value: u32, _bell: &EventFd) -> Result<(), Self::Error> {
        Err(std::io::Error::from(std::io::ErrorKind::Unsupported).into())
    }
}

/// What a chipset is made from.
pub struct ChipsetConfig {
    /// What the RTC's CMOS says about memory.
    pub memory: MemorySize,
    /// Guest time.
    pub clock: Clock,
    /// What wakes the event loop.
    pub waker: Waker,
    /// Where requests and deaths are told.
    pub machine: Sender<MachineMessage>,
    /// How long the port for measurements takes, if there is to be one.
    pub delay: Option<Duration>,
    /// For tests: a device that blocks.
    pub tarpit: Option<Mire>,
    /// A PCI bus; without it the ports for it lead nowhere.
    pub bus: Option<Arc<Bus>>,
}

/// One device, before it is an actor.
struct Part {
    device: Box<dyn Device>,
    space: Space,
    base: u64,
    claims: &'static [Claim],
    line: Option<Box<dyn InterruptLine>>,
    console: Option<Console>,
    timed: bool,
}

/// One device, ready to be driven.
pub struct Wired {
    /// The device in its shell.
    pub shell: Shell,
    /// For `--placement` and the log.
    pub name: &'static str,
    /// How many lifecycle messages it has handled. The machine is told too, but may have no room for that.
    pub answered: Arc<AtomicU32>,
    space: Space,
    base: u64,
    claims: &'static [Claim],
    classify: fn(Access, Direction) -> AccessClass,
}

/// The devices of a machine, before a discipline of dispatch takes them.
pub struct Chipset {
    /// All devices; their numbers are their places here.
    pub devices: Vec<Wired>,
    /// Guest time.
    pub clock: Clock,
    /// For the event loop.
    pub characters: Vec<CharacterDevice>,
    /// For the event loop.
    pub timed: Vec<TimedDevice>,
    /// The actors behind devices, which are given by their numbers.
    pub queues: Vec<(usize, QueueActor)>,
    /// What can be switched from outside.
    pub switches: Switches,
    pm_timer: Arc<Box<dyn Published>>,
    bus: Option<Arc<Bus>>,
    /// Who is on it.
    functions: Functions,
}

impl Chipset {
    /// Makes the devices. `console`: where the first serial port goes; `debug_console`:
    /// where the debug console does.
    ///
    /// # Errors
    /// From `lines`.
    pub fn new<L: Lines>(
        config: &ChipsetConfig,
        console: Console,
        debug_console: Console,
        lines: &L,
    ) -> Result<Chipset, L::Error> {
        let part = |device: Box<dyn Device>, base: u16, claims| Part {
            device,
            space: Space::Pio,
            base: base.into(),
            claims,
            line: None,
            console: None,
            timed: false,
        };
        let mut parts = vec![
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
        ];
        let bridge = parts.len();
        parts.push(match &config.bus {
            Some(bus) => part(
                Box::new(HostBridge::new(bus.clone())),
                io::PCI_CONFIG,
                host_bridge::CLAIMS,
            ),
            None => part(Box::new(PciConfig::new()), io::PCI_CONFIG, pci_config::CLAIMS),
        });
        if let Some(time) = config.delay {
            parts.push(part(Box::new(Delay::new(time)), io::DELAY, delay::CLAIMS));
        }
        if let Some(mire) = &config.tarpit {
            parts.push(part(
                Box::new(Tarpit::new(mire.clone())),
                io::TARPIT,
                tarpit::CLAIMS,
            ));
        }
        let mut chipset = Chipset {
            devices: Vec::with_capacity(parts.len()),
            pm_timer: Arc::new(Box::new(PmTimer::new())),
            clock: config.clock.clone(),
            characters: Vec::new(),
            timed: Vec::new(),
            queues: Vec::new(),
            bus: config.bus.clone(),
            functions: Functions {
                bridge,
                others: Vec::new(),
            },
            switches: Switches::default(),
        };
        for part in parts {
            chipset.add(part, config);
        }
        Ok(chipset)
    }

    /// One more device, for tests.
    #[cfg(all(test, not(loom)))]
    pub(super) fn add_device(
        &mut self,
        device: Box<dyn Device>,
        base: u16,
        claims: &'static [Claim],
        config: &ChipsetConfig,
    ) {
        let part = Part {
            device,
            space: Space::Pio,
            base: base.into(),
            claims,
            line: None,
            console: None,
            timed: false,
        };
        self.add(part, config);
    }

    /// Adds a virtio device. `console`: where a console goes, if it is one.
    pub fn add_virtio(&mut self, placed: Placed, console: Option<Console>, config: &ChipsetConfig) {
        let number = self.devices.len();
        let (base, claims) = match placed.place {
            Place::Mmio(address) => (address, mmio::CLAIMS),
            Place::Pci(slot) => {
                let function = (slot, number, pci::layout::BAR_BYTES);
                self.functions.others.push(function);
                (0, pci::CLAIMS)
            }
        };
        let part = Part {
            device: placed.device,
            space: Space::Mmio,
            base,
            claims,
            line: placed.line,
            console: None,
            timed: false,
        };
        self.add(part, config);
        if let (Some(host), Some(console)) = (placed.console, console) {
            self.characters.push(CharacterDevice {
                console,
                end: host.end,
                recipient: host.recipient,
            });
        }
        let queues = placed.queues.into_iter();
        self.queues.extend(queues.map(|queue| (number, queue)));
        self.switches.join(placed.switches);
    }

    fn add(&mut self, part: Part, config: &ChipsetConfig) {
        let Part {
            device,
            space,
            base,
            claims,
            line,
            console,
            timed,
        } = part;
        let number = self.devices.len();
        let character = console.map(|console| {
            let (device_end, end) = character::pair(config.waker.clone());
            self.characters.push(CharacterDevice {
                console,
                end,
                recipient: Recipient::Device(number),
            });
            device_end
        });
        let timer = timed.then(|| {
            let slot = TimerSlot::new(config.waker.clone());
            self.timed.push(TimedDevice {
                slot: slot.clone(),
                device: number,
            });
            slot
        });
        let machine = config.machine.clone();
        let answered = Arc::new(AtomicU32::new(0));
        let (count, news) = (answered.clone(), config.machine.clone());
        let life = Box::new(move || {
            // Release: who sees the count sees what the device did.
            count.fetch_add(1, Ordering::Release);
            // A machine without room has messages to handle, and looks at the count after each.
            let _ = news.try_send(MachineMessage::DeviceAnswered);
        });
        let outside = Surroundings {
            clock: config.clock.clone(),
            line,
            character,
            timer,
            // A turn must not wait. A full mailbox has an end of the machine in it already.
            requests: Box::new(move |request| drop(machine.try_send(MachineMessage::Device(request)))),
            life: Some(life),
        };
        let (name, classify) = (device.name(), device.classify());
        self.devices.push(Wired {
            shell: Shell::new(device, outside),
            name,
            answered,
            space,
            base,
            claims,
            classify,
        });
    }

    /// The ranges of all devices, which are numbered as in [`Chipset::devices`].
    pub fn routes(&self) -> RouteMap {
        let mut map = RouteMap::default();
        for (device, wired) in self.devices.iter().enumerate() {
            for claim in wired.claims {
                let start = wired.base + claim.offset;
                let route = Route {
                    start,
                    last: start + claim.len - 1,
                    base: claim.offset,
                    target: Target::Device {
                        device,
                        classify: wired.classify,
                    },
                };
                map.insert(wired.space, route)
                    .expect("the layout has no overlaps");
            }
        }
        let timer = Route {
            start: io::PM_TIMER.into(),
            last: u64::from(io::PM_TIMER) + 3,
            base: 0,
            target: Target::Published(self.pm_timer.clone()),
        };
        map.insert(Space::Pio, timer).expect("the layout has no overlaps");
        if let Some(bus) = &self.bus {
            for (space, route) in self.bus_routes(bus) {
                map.insert(space, route).expect("the layout has no overlaps");
            }
        }
        map
    }

    /// The ranges in which a bus finds out who answers.
    fn bus_routes(&self, bus: &Arc<Bus>) -> Vec<(Space, Route)> {
        let functions = || self.functions.clone();
        let route = |start: u64, bytes: u64, decode: Arc<dyn Decode>| Route {
            start,
            last: start + bytes - 1,
            base: 0,
            target: Target::Decoded(decode),
        };
        let data = DataPorts {
            bus: bus.clone(),
            functions: functions(),
        };
        let ecam = Ecam {
            functions: functions(),
        };
        let mut routes = vec![
            (Space::Pio, route(io::PCI_CONFIG_DATA.into(), 4, Arc::new(data))),
            (Space::Mmio, route(layout::ECAM, ECAM_BUS_BYTES, Arc::new(ecam))),
        ];
        for window in bus.windows() {
            let decode = Window {
                bus: bus.clone(),
                functions: functions(),
                start: window.start,
            };
            let bytes = window.end - window.start;
            routes.push((Space::Mmio, route(window.start, bytes, Arc::new(decode))));
        }
        routes
    }
}
