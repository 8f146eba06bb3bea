//! Virtio devices in a machine: where each is, how it and its driver notify each other, and its queues' actors.

use super::chipset::Lines;
use crate::boot::acpi::{PciRoot, VirtioMmio};
use crate::boot::layout;
use crate::devices::shell::InterruptLine;
use crate::devices::{Device, Queues as QueueSet};
use crate::pci::decode::Bus;
use crate::pci::msix::MessageWire;
use crate::virtio::balloon::BalloonSwitch;
use crate::virtio::config::Opened;
use crate::virtio::console::{HostSide, SizeSwitch};
use crate::virtio::interrupt::{Interrupter, Latch, MsixWord};
use crate::virtio::mmio::{Mmio, QUEUE_NOTIFY, WINDOW_BYTES};
use crate::virtio::net::LinkSwitch;
use crate::virtio::pci::layout::BAR_BYTES;
use crate::virtio::pci::{Function, NoDoorbells, Wiring};
use crate::virtio::queue::{QueueActor, Remote, queue_actor};
use crate::virtio::registers::{Backend, Registers};
use crate::virtio::{Notify, Transport};
use slog::Logger;
use std::ops::Range;
use std::sync::Arc;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// Where the device in a place is, by virtio-mmio.
pub fn address(place: usize) -> u64 {
    layout::VIRTIO_MMIO + place as u64 * WINDOW_BYTES
}

/// The slot of the device in a place, by virtio-pci: the host bridge has slot 0.
pub fn slot(place: usize) -> usize {
    place + 1
}

/// What the guest's kernel is told of so many devices behind virtio-mmio.
pub fn described(devices: usize, notify: Notify) -> Vec<VirtioMmio> {
    let describe = |(place, gsi)| VirtioMmio {
        address: address(place) as u32,
        bytes: WINDOW_BYTES as u32,
        gsi,
        // An irqfd gives an edge; a line that is a function of the device's state has a level.
        edge: notify == Notify::EventFd,
    };
    let places = layout::VIRTIO_GSIS.into_iter().enumerate();
    places.take(devices).map(describe).collect()
}

/// The addresses for BARs, in a machine with so much memory.
pub fn windows(memory_bytes: u64) -> [Range<u64>; 2] {
    [layout::PCI_WINDOW_32, layout::pci_window_64(memory_bytes)]
}

/// What the guest's kernel is told of a bus with so many devices.
pub fn root(devices: usize, memory_bytes: u64) -> PciRoot {
    let pins = layout::VIRTIO_GSIS.into_iter().enumerate();
    PciRoot {
        windows: windows(memory_bytes),
        pins: pins
            .take(devices)
            .map(|(place, gsi)| (slot(place) as u8, gsi))
            .collect(),
    }
}

/// A device's queues, from its register side.
struct Queues(Vec<Remote>);

impl Backend for Queues {
    fn start(&mut self, index: usize, queue: Queue, features: u64, life: u32) {
        self.0[index].start(queue, features, life);
    }

    fn notify(&mut self, index: usize) {
        self.0[index].ring();
    }

    fn stop(&mut self, index: usize) {
        self.0[index].stop();
    }

    fn suspend(&mut self) {
        for queue in &self.0 {
            queue.suspend();
        }
    }

    fn resume(&mut self) {
        for queue in &self.0 {
            queue.resume();
        }
    }
}

/// Where a device is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Its first register.
    Mmio(u64),
    /// Its slot on the bus.
    Pci(usize),
}

/// A device, before it is an actor, and the actors behind it.
pub struct Placed {
    /// Its register side.
    pub device: Box<dyn Device>,
    /// Where it is.
    pub place: Place,
    /// The line that its state drives, if there is one.
    pub line: Option<Box<dyn InterruptLine>>,
    /// Its queues' actors.
    pub queues: Vec<QueueActor>,
    /// What of it can be switched.
    pub switches: Switches,
    /// Of a console: the event loop's end.
    pub console: Option<HostSide>,
}

/// What of devices can be switched from outside.
#[derive(Default)]
pub struct Switches {
    /// Links of network devices, in their order.
    pub links: Vec<LinkSwitch>,
    /// The balloon.
    pub balloon: Option<BalloonSwitch>,
    /// The size of the console.
    pub size: Option<SizeSwitch>,
}

impl Switches {
    /// Those of one more device.
    pub fn join(&mut self, other: Switches) {
        self.links.extend(other.links);
        self.balloon = self.balloon.take().or(other.balloon);
        self.size = self.size.take().or(other.size);
    }
}

/// What all devices are connected with.
pub struct Connections<'a, L> {
    /// The bus, if they are on one.
    pub bus: Option<&'a Arc<Bus>>,
    /// How they and drivers notify each other.
    pub notify: Notify,
    /// All of the guest's.
    pub memory: &'a GuestMemoryMmap,
    /// Interrupts and bells.
    pub lines: &'a L,
    /// For their queues' actors.
    pub log: &'a Logger,
}

/// One source of interrupts by message.
pub struct Source {
    /// The register side's end.
    pub wire: Box<dyn MessageWire>,
    /// What an actor behind it can signal by.
    pub signal: Option<Arc<EventFd>>,
}

/// Connects devices in their places.
///
/// # Errors
/// From `lines`.
pub fn place<L: Lines>(devices: Vec<Opened>, connect: &Connections<'_, L>) -> Result<Vec<Placed>, L::Error> {
    let Some(bus) = connect.bus else {
        let devices = devices.into_iter().enumerate();
        return devices
            .map(|(place, opened)| connect.mmio(place, opened))
            .collect();
    };
    let sources = devices.iter().map(|device| 1 + device.handlers.len()).sum();
    let sources = connect.lines.messages(sources, connect.notify, connect.log)?;
    let mut sources = sources.into_iter();
    let mut placed = Vec::with_capacity(devices.len());
    for (place, opened) in devices.into_iter().enumerate() {
        let its = sources.by_ref().take(1 + opened.handlers.len()).collect();
        placed.push(connect.pci(place, opened, bus, its)?);
    }
    Ok(placed)
}

/// A transport by which devices are reached, with what it needs.
pub fn bus(transport: Transport, memory_bytes: u64) -> Option<Arc<Bus>> {
    (transport == Transport::Pci).then(|| Bus::new(windows(memory_bytes)))
}

impl<L: Lines> Connections<'_, L> {
    /// The actors of a device's queues, and the ways to them.
    fn queues(
        &self,
        opened: Opened,
        interrupter: impl Fn(usize) -> Option<Interrupter>,
    ) -> std::io::Result<(Registers, Vec<QueueActor>, Switches)> {
        debug_assert!(opened.handlers.len() <= QueueSet::MOST);
        let (mut queues, mut remotes) = (Vec::new(), Vec::new());
        for (number, handler) in opened.handlers.into_iter().enumerate() {
            let (actor, remote) = queue_actor(
                format!("{}.q{number}", opened.name),
                number as u16,
                handler,
                self.memory.clone(),
                interrupter(number),
                self.log.clone(),
            )?;
            queues.push(actor);
            remotes.push(remote);
        }
        // The first queue's actor tells the driver.
        let mut switches = Switches::default();
        if let Some(first) = queues.first() {
            if let Some(link) = opened.link {
                switches.links.push(link.switch(first.bell().try_clone()?));
            }
            if let Some(balloon) = opened.balloon {
                let bytes = self.memory.iter().map(GuestMemoryRegion::len).sum();
                switches.balloon = Some(balloon.switch(first.bell().try_clone()?, bytes));
            }
            if let Some(size) = opened.size {
                switches.size = Some(size.switch(first.bell().try_clone()?));
            }
        }
        let registers = Registers::new(opened.identity, self.memory.clone(), Box::new(Queues(remotes)));
        Ok((registers, queues, switches))
    }

    fn mmio(&self, place: usize, mut opened: Opened) -> Result<Placed, L::Error> {
        let (name, console) = (opened.name, opened.console.take());
        let (address, gsi) = (address(place), layout::VIRTIO_GSIS[place]);
        let (latch, line) = match self.notify {
            Notify::EventFd => (Some(Latch::new(self.lines.edge_eventfd(gsi)?)), None),
            Notify::Message => (None, Some(self.lines.level(gsi)?)),
        };
        let (registers, queues, switches) = self.queues(opened, |_| latch.clone().map(Interrupter::Latch))?;
        if self.notify == Notify::EventFd {
            for (number, actor) in queues.iter().enumerate() {
                self.lines
                    .bell(address + QUEUE_NOTIFY, number as u32, actor.bell())?;
            }
        }
        Ok(Placed {
            device: Box::new(Mmio::new(name, registers, latch)),
            place: Place::Mmio(address),
            line,
            queues,
            switches,
            console,
        })
    }

    fn pci(
        &self,
        place: usize,
        mut opened: Opened,
        bus: &Arc<Bus>,
        sources: Vec<Source>,
    ) -> Result<Placed, L::Error> {
        let (name, console) = (opened.name, opened.console.take());
        let msix_word = (self.notify == Notify::EventFd).then(|| Arc::new(MsixWord::new()));
        let interrupter = |number: usize| {
            Some(Interrupter::Msix {
                word: msix_word.clone()?,
                signal: sources[1 + number].signal.clone()?,
            })
        };
        let (registers, queues, switches) = self.queues(opened, interrupter)?;
        let doorbells = match self.notify {
            Notify::EventFd => {
                let bells = queues.iter().map(|actor| actor.bell().try_clone());
                self.lines.doorbells(bells.collect::<std::io::Result<_>>()?)?
            }
            Notify::Message => Box::new(NoDoorbells),
        };
        let slot = slot(place);
        let wiring = Wiring {
            bus: bus.clone(),
            slot,
            // As firmware would: in the upper window, one behind the other.
            address: bus.windows()[1].start + place as u64 * BAR_BYTES,
            wires: sources.into_iter().map(|source| source.wire).collect(),
            doorbells,
            msix_word,
        };
        Ok(Placed {
            device: Box::new(Function::new(name, registers, wiring)),
            place: Place::Pci(slot),
            line: Some(self.lines.level(layout::VIRTIO_GSIS[place])?),
            queues,
            switches,
            console,
        })
    }
}
