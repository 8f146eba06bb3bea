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

/// What one privilege level of this host's guests is stopped by. Found out by `probe.rs`.
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
    /// A port write. Not in user mode, which may not.
    pub port: bool,
}

/// What this host can.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Abilities {
    /// In a guest's kernel mode.
    pub kernel: Mechanisms,
    /// In a guest's user mode.
    pub user: Mechanisms,
    /// No interrupts while it steps (KVM_GUESTDBG_BLOCKIRQ).
    pub hold_interrupts: bool,
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
    /// User mode may execute it.
    pub user: bool,
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
        // A page of user mode's may hold kernel code; but a breakpoint that user mode's code would not survive is worse
        // than none.
        let here = if place.user {
            self.abilities.user
        } else {
            self.abilities.kernel
        };
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
        if !self.abilities.kernel.hardware && !self.abilities.user.hardware {
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
        if !self.abilities.kernel.watch && !self.abilities.user.watch {
            return Err(Refusal::NoMechanism);
        }
        if !matches!(length, 1 | 2 | 4 | 8) || linear % length != 0 {
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
mod tests {
    use super::*;
    use std::cell::RefCell;

    const ALL: Mechanisms = Mechanisms {
        step: true,
        hardware: true,
        watch: true,
        int3: true,
        port: true,
    };
    const NO_INT3: Mechanisms = Mechanisms { int3: false, ..ALL };
    const PORT_ONLY: Mechanisms = Mechanisms {
        step: true,
        hardware: false,
        watch: false,
        int3: false,
        port: true,
    };

    fn table(kernel: Mechanisms) -> Breakpoints {
        Breakpoints::new(Abilities {
            kernel,
            user: Mechanisms::default(),
            hold_interrupts: false,
        })
    }

    fn place(linear: u64, physical: u64) -> Place {
        Place {
            linear,
            physical,
            user: false,
            left: 0x1000 - (physical & 0xfff),
        }
    }

    /// Memory that patches are applied to.
    struct Memory(RefCell<[u8; 16]>);

    impl Memory {
        fn new() -> Memory {
            Memory(RefCell::new(*b"0123456789abcdef"))
        }

        fn read(&self, physical: u64, length: usize) -> Option<Vec<u8>> {
            let memory = self.0.borrow();
            memory
                .get(physical as usize..physical as usize + length)
                .map(Into::into)
        }

        fn apply(&self, patch: &Patch) {
            let at = patch.physical as usize;
            self.0.borrow_mut()[at..at + patch.bytes.len()].copy_from_slice(&patch.bytes);
        }

        fn seen(&self, table: &Breakpoints) -> String {
            let mut data = *self.0.borrow();
            table.hide(0, &mut data);
            String::from_utf8_lossy(&data).into_owned()
        }
    }

    fn add(table: &mut Breakpoints, memory: &Memory, place: Place) -> Result<bool, Refusal> {
        let there = memory.read(place.physical, 2).unwrap_or_default();
        let patch = table.add_software(place, &there)?;
        if let Some(patch) = &patch {
            memory.apply(patch);
        }
        Ok(patch.is_some())
    }

    fn remove(table: &mut Breakpoints, memory: &Memory, linear: u64) -> bool {
        let Some(patch) = table.remove_software(linear, |at, length| memory.read(at, length)) else {
            return false;
        };
        if let Some(patch) = patch {
            memory.apply(&patch);
        }
        true
    }

    #[test]
    fn int3_is_planted_hidden_and_taken_out() {
        let (mut table, memory) = (table(ALL), Memory::new());
        assert_eq!(add(&mut table, &memory, place(0xf003, 3)), Ok(true));
        assert_eq!(
            add(&mut table, &memory, place(0xf003, 3)),
            Ok(false),
            "twice is once"
        );
        assert_eq!(memory.0.borrow()[3], 0xcc);
        assert_eq!(memory.seen(&table), "0123456789abcdef");
        assert_eq!(table.watch().planted[..], [0xf003]);
        assert!(!table.is_empty());
        assert!(remove(&mut table, &memory, 0xf003));
        assert!(!remove(&mut table, &memory, 0xf003));
        assert_eq!(memory.0.borrow()[..], *b"0123456789abcdef");
        assert!(table.is_empty());
    }

    #[test]
    fn what_is_planted_survives_writes_and_shows_them() {
        let (mut table, memory) = (table(ALL), Memory::new());
        add(&mut table, &memory, place(3, 3)).unwrap();
        let kept = table.keep(2, b"XYZ");
        assert_eq!(kept, [b'X', 0xcc, b'Z']);
        memory.apply(&Patch {
            physical: 2,
            bytes: kept,
        });
        assert_eq!(memory.seen(&table), "01XYZ56789abcdef");
        remove(&mut table, &memory, 3);
        assert_eq!(&memory.0.borrow()[..6], b"01XYZ5");
    }

    #[test]
    fn what_the_guest_wrote_over_it_stays() {
        let (mut table, memory) = (table(ALL), Memory::new());
        add(&mut table, &memory, place(3, 3)).unwrap();
        memory.0.borrow_mut()[3] = b'!';
        assert_eq!(memory.seen(&table), "012!456789abcdef");
        remove(&mut table, &memory, 3);
        assert_eq!(memory.0.borrow()[3], b'!');
    }

    #[test]
    fn two_linear_addresses_of_one_byte_are_two_breakpoints() {
        let (mut table, memory) = (table(ALL), Memory::new());
        add(&mut table, &memory, place(0x1003, 3)).unwrap();
        let hidden: Vec<u8> = memory.seen(&table).into_bytes();
        let patch = table.add_software(place(0x2003, 3), &hidden[3..5]).unwrap();
        memory.apply(&patch.unwrap());
        assert_eq!(table.watch().planted[..], [0x1003, 0x2003]);
        remove(&mut table, &memory, 0x1003);
        assert_eq!(memory.0.borrow()[3], 0xcc);
        remove(&mut table, &memory, 0x2003);
        assert_eq!(memory.0.borrow()[3], b'3');
    }

    #[test]
    fn without_int3_debug_registers_and_then_the_port() {
        let (mut table, memory) = (table(NO_INT3), Memory::new());
        for n in 0..4 {
            assert_eq!(add(&mut table, &memory, place(n, n)), Ok(false));
        }
        assert_eq!(add(&mut table, &memory, place(8, 8)), Ok(true));
        assert_eq!(memory.0.borrow()[8..10], [0xe6, TRAP_PORT]);
        assert_eq!(
            add(&mut table, &memory, place(9, 9)),
            Err(Refusal::NoRoom),
            "its second byte is another's"
        );
        assert_eq!(memory.seen(&table), "0123456789abcdef");
        assert!(remove(&mut table, &memory, 2));
        assert_eq!(add(&mut table, &memory, place(9, 9)), Ok(false));
        assert_eq!(
            table.slot(0b0100),
            Some(Slot::Execute {
                linear: 9,
                software: true
            })
        );
    }

    #[test]
    fn the_ports_instruction_needs_two_bytes_of_one_page() {
        let (mut table, memory) = (table(PORT_ONLY), Memory::new());
        let last = Place {
            left: 1,
            ..place(5, 5)
        };
        assert_eq!(add(&mut table, &memory, last), Err(Refusal::NoRoom));
        assert_eq!(add(&mut table, &memory, place(15, 15)), Err(Refusal::NoMemory));
    }

    #[test]
    fn user_code_is_left_alone_where_its_breakpoints_do_not_work() {
        let step_only = Mechanisms {
            step: true,
            ..Mechanisms::default()
        };
        let mut table = Breakpoints::new(Abilities {
            kernel: ALL,
            user: step_only,
            hold_interrupts: false,
        });
        let user = Place {
            user: true,
            ..place(1, 1)
        };
        assert_eq!(table.add_software(user, b"xy"), Err(Refusal::NoMechanism));
        assert!(table.add_software(place(1, 1), b"xy").unwrap().is_some());
    }

    #[test]
    fn debug_registers_by_the_book() {
        let mut table = table(ALL);
        table.add_hardware(0x1000).unwrap();
        table.add_watch(0x2008, 8, WatchFor::Writes).unwrap();
        table.add_watch(0x3004, 4, WatchFor::Accesses).unwrap();
        table.add_watch(0x4002, 2, WatchFor::Writes).unwrap();
        let watch = table.watch();
        assert_eq!(watch.addresses, [0x1000, 0x2008, 0x3004, 0x4002]);
        // Lengths and conditions, from DR3 to DR0: 01 01, 11 11, 10 01, 00 00.
        assert_eq!(watch.dr7 >> 16, 0b0101_1111_1001_0000);
        assert_eq!(watch.dr7 & 0xff, 0b1010_1010);
        assert_eq!(table.add_hardware(0x1000), Ok(()), "twice is once");
        assert_eq!(table.add_hardware(0x5000), Err(Refusal::Full));
        assert!(table.remove(Slot::Data {
            linear: 0x2008,
            length: 8,
            what: WatchFor::Writes
        }));
        assert!(!table.remove(Slot::Data {
            linear: 0x2008,
            length: 8,
            what: WatchFor::Writes
        }));
        assert_eq!(table.add_hardware(0x5000), Ok(()));
        assert_eq!(table.watch().addresses[1], 0x5000);
    }

    #[test]
    fn watches_that_no_debug_register_has() {
        let mut table = table(ALL);
        for (linear, length) in [(0, 0), (0, 3), (0, 16), (2, 4), (4, 8)] {
            assert_eq!(
                table.add_watch(linear, length, WatchFor::Writes),
                Err(Refusal::NoSuchWatch)
            );
        }
    }

    #[test]
    fn what_the_host_does_not_honour_is_refused() {
        let mut table = table(Mechanisms {
            step: true,
            ..Mechanisms::default()
        });
        assert_eq!(table.add_software(place(1, 1), b"xy"), Err(Refusal::NoMechanism));
        assert_eq!(table.add_hardware(1), Err(Refusal::NoMechanism));
        assert_eq!(table.add_watch(8, 8, WatchFor::Writes), Err(Refusal::NoMechanism));
        assert!(table.is_empty());
    }

    #[test]
    fn clearing_leaves_the_guest_as_it_was() {
        let (mut table, memory) = (table(ALL), Memory::new());
        for n in [1, 5, 9] {
            add(&mut table, &memory, place(n, n)).unwrap();
        }
        table.add_hardware(0).unwrap();
        for patch in table.clear(|at, length| memory.read(at, length)) {
            memory.apply(&patch);
        }
        assert_eq!(memory.0.borrow()[..], *b"0123456789abcdef");
        assert!(table.is_empty());
        assert_eq!(table.watch().dr7, 0);
    }
}
