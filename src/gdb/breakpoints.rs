//! Which breakpoints there are, and how each is made on this host. Pure: it says what to write where, and what to load
//! into the debug registers; others do it.
//!
//! A software breakpoint is an instruction of ours in place of the guest's, by the first of these that the host
//! honours: int3; `out TRAP_PORT, al`, whose exit every KVM has. Between them comes a debug register, of which there are
//! four, because the port's instruction is two bytes long and may cover the next one. What is planted is hidden from
//! reads, kept through writes, and taken out only where it still is.
//!
//! A hardware breakpoint or a watchpoint is a debug register or nothing.

use crate::vcpu::debug::{TRAP_PORT, Watch};
use std::sync::Arc;

/// What a guest in one of its modes is stopped by on this host. Found out by `probe.rs`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mechanisms {
    /// One instruction at a time.
    pub step: bool,
    /// Execution by debug register.
    pub hardware: bool,
    /// Data by debug register.
    pub watch: bool,
    /// int3, whichever way it is told.
    pub int3: bool,
    /// A port write. Not in user mode, where it hangs on the guest's own permissions.
    pub port: bool,
}

/// The modes that hosts treat differently.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestMode {
    /// CR0.PE is 0.
    Real,
    /// Any other of rings 0 to 2.
    Kernel,
    /// Ring 3.
    User,
}

/// What this host can.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Abilities {
    /// In a guest's kernel mode.
    pub kernel: Mechanisms,
    /// In a guest's user mode.
    pub user: Mechanisms,
    /// In real mode.
    pub real: Mechanisms,
    /// No interrupts while it steps (KVM_GUESTDBG_BLOCKIRQ).
    pub hold_interrupts: bool,
}

impl Abilities {
    /// In a mode.
    pub fn of(&self, mode: GuestMode) -> &Mechanisms {
        match mode {
            GuestMode::Real => &self.real,
            GuestMode::Kernel => &self.kernel,
            GuestMode::User => &self.user,
        }
    }

    /// In any mode.
    fn any(&self, has: fn(&Mechanisms) -> bool) -> bool {
        [&self.kernel, &self.user, &self.real].into_iter().any(has)
    }

    /// Data can be watched by debug registers.
    pub fn has_watch(&self) -> bool {
        self.any(|mechanisms| mechanisms.watch)
    }
}

/// Why a breakpoint cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// Nothing is mapped there, or it is not RAM.
    #[error("there is no memory")]
    NoMemory,
    /// By nothing that this host has.
    #[error("this host's KVM honours no breakpoint in that mode")]
    NoMechanism,
    /// All four are in use.
    #[error("all four debug registers are in use")]
    Full,
    /// Of a length or alignment, or a kind, that debug registers do not have.
    #[error("a debug register watches 1, 2, 4 or 8 aligned bytes, and reads together with writes only")]
    NoSuchWatch,
    /// The planted instruction would cover another one, or does not fit into the page.
    #[error("the planted instruction needs two bytes there")]
    NoRoom,
}

/// What a data breakpoint looks for. [SDM 3B §18.2.4: R/W]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WatchFor {
    /// Stores.
    Writes,
    /// Loads and stores.
    Accesses,
}

/// What a debug register is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    /// The instruction at this linear address is about to be executed. `software`: gdb asked for a software breakpoint.
    Execute {
        /// Where.
        linear: u64,
        /// As gdb sees it.
        software: bool,
    },
    /// Data.
    Data {
        /// Where.
        linear: u64,
        /// Bytes.
        length: u64,
        /// What.
        what: WatchFor,
    },
}

/// The guest's own bytes under one that is planted.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Planted {
    linear: u64,
    physical: u64,
    original: Vec<u8>,
    ours: &'static [u8],
}

/// Where a software breakpoint would go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// As gdb says it.
    pub linear: u64,
    /// Where that is.
    pub physical: u64,
    /// Whose code it is. A page that user mode may use counts as user mode's: it may hold kernel code, but a breakpoint
    /// that the guest's user mode would not survive is worse than none.
    pub mode: GuestMode,
    /// Bytes to the end of the page.
    pub left: u64,
}

/// Bytes to be written to guest memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Patch {
    /// Guest physical address.
    pub physical: u64,
    /// What.
    pub bytes: Vec<u8>,
}

const INT3: &[u8] = &[0xcc];
const OUT: &[u8] = &[0xe6, TRAP_PORT];

/// The breakpoints of a session.
#[derive(Debug)]
pub struct Breakpoints {
    abilities: Abilities,
    planted: Vec<Planted>,
    slots: [Option<Slot>; 4],
}

impl Breakpoints {
    /// None yet.
    pub fn new(abilities: Abilities) -> Breakpoints {
        Breakpoints {
            abilities,
            planted: Vec::new(),
            slots: [None; 4],
        }
    }

    /// Makes a software breakpoint. `memory`: what is there now, as the guest would read it, two bytes if the page has
    /// them. Returns what to write; nothing, when a debug register does it or it is there already.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn add_software(&mut self, place: Place, memory: &[u8]) -> Result<Option<Patch>, Refusal> {
        let execute = Slot::Execute {
            linear: place.linear,
            software: true,
        };
        if self.slots.contains(&Some(execute)) || self.planted.iter().any(|p| p.linear == place.linear) {
            return Ok(None);
        }
        let here = *self.abilities.of(place.mode);
        if here.int3 {
            return self.plant(place, memory, INT3).map(Some);
        }
        if here.hardware {
            match self.load(execute) {
                Ok(()) => return Ok(None),
                // Then by the port, if that works.
                Err(_) if here.port => {}
                Err(refusal) => return Err(refusal),
            }
        }
        if here.port {
            return self.plant(place, memory, OUT).map(Some);
        }
        Err(Refusal::NoMechanism)
    }

    fn plant(&mut self, place: Place, memory: &[u8], ours: &'static [u8]) -> Result<Patch, Refusal> {
        let length = ours.len() as u64;
        if place.left < length {
            return Err(Refusal::NoRoom);
        }
        let original = memory.get(..ours.len()).ok_or(Refusal::NoMemory)?.to_vec();
        let overlaps = |other: &Planted| {
            place.physical < other.physical + other.ours.len() as u64
                && other.physical < place.physical + length
        };
        if let Some(other) = self.planted.iter().find(|other| overlaps(other)) {
            // The same bytes at another linear address are a breakpoint of their own, but for the same bytes.
            if other.physical != place.physical || other.ours != ours {
                return Err(Refusal::NoRoom);
            }
        }
        self.planted.push(Planted {
            linear: place.linear,
            physical: place.physical,
            original,
            ours,
        });
        Ok(Patch {
            physical: place.physical,
            bytes: ours.to_vec(),
        })
    }

    /// Takes a software breakpoint away. `read`: what is at a physical address now, ours included. `None`: there is no
    /// such breakpoint. Otherwise what to write, if anything: what the guest has overwritten meanwhile stays.
    pub fn remove_software(
        &mut self,
        linear: u64,
        read: impl FnOnce(u64, usize) -> Option<Vec<u8>>,
    ) -> Option<Option<Patch>> {
        let execute = Slot::Execute {
            linear,
            software: true,
        };
        if let Some(slot) = self.slots.iter_mut().find(|slot| **slot == Some(execute)) {
            *slot = None;
            return Some(None);
        }
        let index = self.planted.iter().position(|planted| planted.linear == linear)?;
        let gone = self.planted.remove(index);
        if self.planted.iter().any(|other| other.physical == gone.physical) {
            return Some(None);
        }
        let still = read(gone.physical, gone.ours.len()).is_some_and(|now| now == gone.ours);
        Some(still.then_some(Patch {
            physical: gone.physical,
            bytes: gone.original,
        }))
    }

    /// Makes a hardware breakpoint.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn add_hardware(&mut self, linear: u64) -> Result<(), Refusal> {
        if !self.abilities.any(|mechanisms| mechanisms.hardware) {
            return Err(Refusal::NoMechanism);
        }
        self.load(Slot::Execute {
            linear,
            software: false,
        })
    }

    /// Makes a watchpoint.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn add_watch(&mut self, linear: u64, length: u64, what: WatchFor) -> Result<(), Refusal> {
        if !self.abilities.has_watch() {
            return Err(Refusal::NoMechanism);
        }
        if !matches!(length, 1 | 2 | 4 | 8) || !linear.is_multiple_of(length) {
            return Err(Refusal::NoSuchWatch);
        }
        self.load(Slot::Data { linear, length, what })
    }

    fn load(&mut self, slot: Slot) -> Result<(), Refusal> {
        if self.slots.contains(&Some(slot)) {
            return Ok(());
        }
        let free = self
            .slots
            .iter_mut()
            .find(|slot| slot.is_none())
            .ok_or(Refusal::Full)?;
        *free = Some(slot);
        Ok(())
    }

    /// Takes a hardware breakpoint or a watchpoint away. `false`: there is none.
    pub fn remove(&mut self, slot: Slot) -> bool {
        match self.slots.iter_mut().find(|there| **there == Some(slot)) {
            Some(there) => {
                *there = None;
                true
            }
            None => false,
        }
    }

    /// Takes everything away; what to write for that, in order. `read` as for [`Breakpoints::remove_software`].
    pub fn clear(&mut self, read: impl Fn(u64, usize) -> Option<Vec<u8>>) -> Vec<Patch> {
        self.slots = [None; 4];
        let linear: Vec<u64> = self.planted.iter().map(|planted| planted.linear).collect();
        linear
            .into_iter()
            .filter_map(|linear| self.remove_software(linear, &read).flatten())
            .collect()
    }

    /// Makes what was read from memory look as if nothing was planted.
    pub fn hide(&self, physical: u64, data: &mut [u8]) {
        for planted in &self.planted {
            for (offset, (original, ours)) in planted.original.iter().zip(planted.ours).enumerate() {
                let at = (planted.physical + offset as u64).wrapping_sub(physical);
                if let Some(byte) = usize::try_from(at).ok().and_then(|at| data.get_mut(at))
                    && byte == ours
                {
                    *byte = *original;
                }
            }
        }
    }

    /// Takes note of what is written to memory, and returns what to write so that what is planted stays.
    pub fn keep(&mut self, physical: u64, data: &[u8]) -> Vec<u8> {
        let mut data = data.to_vec();
        for planted in &mut self.planted {
            for (offset, (original, ours)) in planted.original.iter_mut().zip(planted.ours).enumerate() {
                let at = (planted.physical + offset as u64).wrapping_sub(physical);
                if let Some(byte) = usize::try_from(at).ok().and_then(|at| data.get_mut(at)) {
                    *original = std::mem::replace(byte, *ours);
                }
            }
        }
        data
    }

    /// What stops vCPUs: the same for all.
    pub fn watch(&self) -> Watch {
        let mut watch = Watch {
            hold_interrupts: self.abilities.hold_interrupts,
            ..Watch::default()
        };
        for (number, slot) in self.slots.iter().enumerate() {
            let (linear, condition, length) = match *slot {
                None => continue,
                Some(Slot::Execute { linear, .. }) => (linear, 0b00, 1),
                Some(Slot::Data { linear, length, what }) => {
                    let condition = match what {
                        WatchFor::Writes => 0b01,
                        WatchFor::Accesses => 0b11,
                    };
                    (linear, condition, length)
                }
            };
            // Lengths of 1, 2, 8 and 4 bytes are 0 to 3, in this order [SDM 3B §18.2.4].
            let length = match length {
                2 => 0b01,
                4 => 0b11,
                8 => 0b10,
                _ => 0b00u64,
            };
            watch.addresses[number] = linear;
            // Global enable; the condition and the length.
            watch.dr7 |= 0b10 << (2 * number) | (length << 2 | condition) << (16 + 4 * number);
        }
        if watch.dr7 != 0 {
            // Bit 10 reads as 1; GE, which processors since the P6 ignore.
            watch.dr7 |= 1 << 10 | 1 << 9;
        }
        let mut linear: Vec<u64> = self.planted.iter().map(|planted| planted.linear).collect();
        linear.sort_unstable();
        watch.planted = Arc::from(linear);
        watch
    }

    /// Whether nothing is to be watched.
    pub fn is_empty(&self) -> bool {
        self.planted.is_empty() && self.slots.iter().all(Option::is_none)
    }

    /// What the first of these debug registers is for.
    pub fn slot(&self, conditions: u8) -> Option<Slot> {
        self.slots
            .iter()
            .enumerate()
            .find_map(|(number, slot)| slot.filter(|_| conditions & 1 << number != 0))
    }
}

#[cfg(test)]
mod tests;
