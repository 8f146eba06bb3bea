//! Virtio devices in a machine: where each is, how it and its driver notify each other, and its queues' actors.

use super::chipset::Lines;
use crate::boot::acpi::VirtioMmio;
use crate::boot::layout;
use crate::devices::shell::InterruptLine;
use crate::virtio::Notify;
use crate::virtio::config::Opened;
use crate::virtio::interrupt::Latch;
use crate::virtio::mmio::{Mmio, QUEUE_NOTIFY, WINDOW_BYTES};
use crate::virtio::queue::{QueueActor, Remote, queue_actor};
use crate::virtio::registers::{Backend, Registers};
use slog::Logger;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

/// Where the device in a place is.
pub fn address(place: usize) -> u64 {
    layout::VIRTIO_MMIO + place as u64 * WINDOW_BYTES
}

/// What the guest's kernel is told of so many devices.
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

/// A device, before it is an actor, and the actors behind it.
pub struct Placed {
    /// Its register side.
    pub device: Box<Mmio>,
    /// Its first register.
    pub address: u64,
    /// The line that its state drives, when interrupts go by message.
    pub line: Option<Box<dyn InterruptLine>>,
    /// Its queues' actors.
    pub queues: Vec<QueueActor>,
}

/// Connects a device in its place.
///
/// # Errors
/// From `lines`.
pub fn place<L: Lines>(
    place: usize,
    opened: Opened,
    notify: Notify,
    memory: &GuestMemoryMmap,
    lines: &L,
    log: &Logger,
) -> Result<Placed, L::Error> {
    let Opened {
        name,
        identity,
        handlers,
    } = opened;
    let (address, gsi) = (address(place), layout::VIRTIO_GSIS[place]);
    let (latch, line) = match notify {
        Notify::EventFd => (Some(Latch::new(lines.edge_eventfd(gsi)?)), None),
        Notify::Message => (None, Some(lines.level(gsi)?)),
    };
    let (mut queues, mut remotes) = (Vec::new(), Vec::new());
    for (number, handler) in handlers.into_iter().enumerate() {
        let name = format!("{name}.q{number}");
        let (actor, remote) = queue_actor(
            name,
            number as u16,
            handler,
            memory.clone(),
            latch.clone(),
            log.clone(),
        )?;
        if notify == Notify::EventFd {
            lines.bell(address + QUEUE_NOTIFY, number as u32, actor.bell())?;
        }
        queues.push(actor);
        remotes.push(remote);
    }
    let registers = Registers::new(identity, memory.clone(), Box::new(Queues(remotes)));
    Ok(Placed {
        device: Box::new(Mmio::new(name, registers, latch)),
        address,
        line,
        queues,
    })
}
