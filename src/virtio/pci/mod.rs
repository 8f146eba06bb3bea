//! virtio-pci, modern: a device as a function of a PCI bus. [VIRTIO 1.2 §4.1]
//!
//! Owns: the device's registers, the function's configuration space and its MSI-X table. All of it is one actor, so a
//! move of the BAR, a masked vector and a reset of the device come one after the other.
//!
//! | question | file |
//! |---|---|
//! | what is where | `layout.rs` |
//! | the common configuration | `common.rs` |
//! | interrupt sources and MSI-X | `vectors.rs` |
//!
//! Registers decode in their own width only (a half of a 64-bit one too); the device configuration takes any width. What
//! does not exist, is write-only, or is accessed in another width reads all-ones, and writes to it are ignored. There is no
//! legacy interface: the revision says 1 and there is no I/O BAR.
//!
//! Interrupts go by MSI-X while the driver has enabled it. If not, the line INTA# is a level: up while the interrupt status
//! is not 0, which a read clears. While the function may not be bus master it touches no memory and sends no message; what
//! would go out waits. So a kernel that hands over to the next with bus mastering off is safe from its old queues.
//!
//! What a hostile guest can try: any register in any order, in the BAR, in the configuration space, and in the BAR through
//! the configuration space; BARs anywhere (`pci/decode.rs`); messages to anywhere (`pci/msix.rs`); MSI-X on and off while
//! queues are served (`interrupt.rs`). All it can reach is the state machines behind; its memory is touched by the queues'
//! actors alone. System calls that it can cause: a few a write that changes where a message or a notification goes.

mod common;
pub mod layout;
#[cfg(test)]
mod tests;
pub mod vectors;

use super::interrupt::{CONFIGURATION as ISR_CONFIGURATION, MsixWord, USED as ISR_USED};
use super::registers::Registers;
use super::{BackendEvent, BackendNews, Queues};
use crate::devices::{Access, Claim, Context, Device, Width};
use crate::pci::config::{ConfigSpace, command};
use crate::pci::decode::BarWord;
use crate::pci::host_bridge::register;
use crate::pci::msix::MessageWire;
use crate::pci::{BAR, decode};
use common::Selected;
use layout::Places;
use std::sync::Arc;
use vectors::Vectors;

/// What to claim: nothing, as the bus decodes.
pub const CLAIMS: &[Claim] = &[];

/// Bells that are rung by a driver's notifications without an exit: KVM's ioeventfds, wherever the notification registers
/// are.
pub trait Doorbells: Send {
    /// The registers are at this address now; `None`: nowhere. Told changes only.
    fn place(&mut self, registers: Option<u64>);
}

/// Notifications come as accesses.
pub struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn place(&mut self, _registers: Option<u64>) {}
}

/// How a function is connected.
pub struct Wiring {
    /// Its bus, and its slot there.
    pub bus: Arc<decode::Bus>,
    /// From 1.
    pub slot: usize,
    /// Where its BAR is at power-on.
    pub address: u64,
    /// One for the configuration, one a queue.
    pub wires: Vec<Box<dyn MessageWire>>,
    /// One a queue, if there are any.
    pub doorbells: Box<dyn Doorbells>,
    /// What tells queues' actors whether to use their wires; without it they send messages.
    pub msix_word: Option<Arc<MsixWord>>,
}

/// A virtio device as a guest sees it.
pub struct Function {
    name: &'static str,
    registers: Registers,
    config: ConfigSpace,
    places: Places,
    bar: BarWord,
    /// Where the configuration space says that the BAR is, and so where the doorbells are.
    base: Option<u64>,
    doorbells: Box<dyn Doorbells>,
    vectors: Vectors,
    msix_word: Option<Arc<MsixWord>>,
    /// Interrupt status.
    isr: u32,
    selected: Selected,
    paused: bool,
}

impl Function {
    /// A function after reset.
    pub fn new(name: &'static str, registers: Registers, wiring: Wiring) -> Function {
        let vectors = Vectors::new(wiring.wires);
        let (config, places) =
            layout::config_space(registers.identity(), vectors.table.vectors(), wiring.address);
        let mut function = Function {
            name,
            registers,
            config,
            places,
            bar: wiring.bus.bar(wiring.slot, layout::BAR_BYTES),
            base: None,
            doorbells: wiring.doorbells,
            vectors,
            msix_word: wiring.msix_word,
            isr: 0,
            selected: Selected::default(),
            paused: false,
        };
        function.suspend();
        function
    }

    fn is_master(&self) -> bool {
        self.config.command() & command::BUS_MASTER != 0
    }

    /// Guest memory is not touched while the machine is paused, and while the function may not.
    fn suspend(&mut self) {
        self.registers.suspend(self.paused || !self.is_master());
    }

    fn reflect_vectors(&mut self) {
        let may_send = self.is_master();
        self.vectors.reflect(may_send);
    }

    /// Something was written to the configuration space, or it was reset: the rest follows.
    fn configured(&mut self, was_master: bool) {
        let base = self.config.bar();
        if base != self.base {
            self.base = base;
            let decoded = self.bar.publish(base);
            self.doorbells.place(decoded.map(|base| base + layout::NOTIFY));
        }
        if was_master != self.is_master() {
            self.suspend();
        }
        let was_enabled = self.vectors.table.is_enabled();
        self.vectors
            .table
            .set_control(self.config.word(self.places.msix + 2));
        let enabled = self.vectors.table.is_enabled();
        self.reflect_vectors();
        if was_enabled != enabled {
            if let Some(word) = &self.msix_word {
                word.set(enabled);
            }
            // Whoever has not seen it has told nobody. See `interrupt.rs`.
            if self.registers.live() {
                self.tell_used(Queues(u64::MAX));
            }
        }
    }

    fn tell_used(&mut self, queues: Queues) {
        if self.vectors.table.is_enabled() {
            for index in (0..self.registers.identity().queues).filter(|index| queues.has(*index)) {
                self.vectors.signal(vectors::queue(index));
            }
        } else {
            self.isr |= ISR_USED;
        }
    }

    fn tell_configuration(&mut self) {
        self.isr |= ISR_CONFIGURATION;
        if self.vectors.table.is_enabled() {
            self.vectors.signal(vectors::CONFIGURATION);
        }
    }

    /// Status 0 was written: the device is new, the function is as it was.
    fn reset_device(&mut self) {
        self.registers.reset();
        // Behind the reset: no actor signals from here on.
        self.vectors.take_back();
        self.isr = 0;
        self.selected = Selected::default();
    }

    fn read_bar(&mut self, offset: u64, width: Width) -> u64 {
        match offset {
            offset if layout::COMMON.contains(&offset) => {
                self.read_common(offset, width).unwrap_or(width.all_ones())
            }
            layout::ISR if width == Width::Byte => std::mem::take(&mut self.isr).into(),
            offset if layout::DEVICE.contains(&offset) => {
                let mut bytes = [0xff; 8];
                let within = &mut bytes[..width.bytes()];
                self.registers
                    .read_configuration(offset - layout::DEVICE.start, within);
                u64::from_le_bytes(bytes)
            }
            layout::TABLE..layout::PENDING => self.vectors.table.read(offset - layout::TABLE, width),
            layout::PENDING..layout::BAR_BYTES => self.vectors.read_pending(offset - layout::PENDING, width),
            _ => width.all_ones(),
        }
    }

    fn write_bar(&mut self, offset: u64, width: Width, value: u64) {
        match offset {
            offset if layout::COMMON.contains(&offset) => self.write_common(offset, width, value),
            offset if layout::DEVICE.contains(&offset) => {
                let bytes = value.to_le_bytes();
                self.registers
                    .write_configuration(offset - layout::DEVICE.start, &bytes[..width.bytes()]);
            }
            layout::NOTIFY..layout::TABLE => {
                let offset = offset - layout::NOTIFY;
                if offset.is_multiple_of(layout::NOTIFY_STEP) {
                    // What is written is the queue's number again.
                    self.registers.notify((offset / layout::NOTIFY_STEP) as u32);
                }
            }
            layout::TABLE..layout::PENDING => {
                self.vectors.table.write(offset - layout::TABLE, width, value);
                self.reflect_vectors();
            }
            _ => {}
        }
    }

    /// The place in the BAR that the window in the configuration space shows, if it is one. [VIRTIO 1.2 §4.1.4.9]
    fn window(&self) -> Option<(u64, Width)> {
        let at = self.places.window;
        let (bar, offset) = (self.config.word(at + 4) as u8, self.config.dword(at + 8));
        let width = Width::from_bytes(self.config.dword(at + 12) as usize)?;
        let aligned = offset.is_multiple_of(width.bytes() as u32);
        (bar == 0 && width <= Width::Dword && aligned).then_some((offset.into(), width))
    }

    /// Whether an access to the configuration space is to the data of that window.
    fn is_window_data(&self, register: u64) -> bool {
        register == self.places.window as u64 + 16
    }

    fn read_config(&mut self, register: u64, width: Width) -> u64 {
        if self.is_window_data(register)
            && let Some((offset, inner)) = self.window()
        {
            return self.read_bar(offset, inner) & inner.all_ones();
        }
        let wanted = self.wants_line();
        self.config.set_interrupt(wanted);
        self.config.read(register, width)
    }

    fn write_config(&mut self, register: u64, width: Width, value: u64) {
        if self.is_window_data(register)
            && let Some((offset, inner)) = self.window()
        {
            self.write_bar(offset, inner, value & inner.all_ones());
            return;
        }
        let was_master = self.is_master();
        self.config.write(register, width, value);
        self.configured(was_master);
    }

    /// The pin would be driven, were it not disabled.
    fn wants_line(&self) -> bool {
        self.isr != 0 && !self.vectors.table.is_enabled()
    }
}

impl Device for Function {
    fn name(&self) -> &'static str {
        self.name
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        if let Some(offset) = access.offset.checked_sub(BAR) {
            return self.read_bar(offset, access.width);
        }
        register(access).map_or(access.width.all_ones(), |register| {
            self.read_config(register, access.width)
        })
    }

    fn write(&mut self, _cx: &mut dyn Context, access: Access, value: u64) {
        if let Some(offset) = access.offset.checked_sub(BAR) {
            self.write_bar(offset, access.width, value);
        } else if let Some(register) = register(access) {
            self.write_config(register, access.width, value);
        }
    }

    fn interrupt(&self) -> bool {
        self.wants_line() && self.config.command() & command::INTX_DISABLE == 0
    }

    fn backend_news(&mut self, _cx: &mut dyn Context, news: BackendNews) {
        match self.registers.news(news) {
            Some(BackendEvent::Used(queues)) => self.tell_used(queues),
            Some(BackendEvent::Broken | BackendEvent::Reconfigured) => self.tell_configuration(),
            None => {}
        }
    }

    fn backends(&self) -> usize {
        self.registers.identity().queues
    }

    fn pause(&mut self, _cx: &mut dyn Context) {
        self.paused = true;
        self.suspend();
    }

    fn resume(&mut self, _cx: &mut dyn Context) {
        self.paused = false;
        self.suspend();
    }

    fn reset(&mut self, _cx: &mut dyn Context) {
        let was_master = self.is_master();
        self.reset_device();
        self.vectors.table.reset();
        self.config.reset();
        self.configured(was_master);
        if let Some(word) = &self.msix_word {
            word.set(false);
        }
    }
}
