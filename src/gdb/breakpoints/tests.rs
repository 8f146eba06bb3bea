//! What is written where, and what is loaded, case by case.

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
        ..Abilities::default()
    })
}

fn place(linear: u64, physical: u64) -> Place {
    Place {
        linear,
        physical,
        mode: GuestMode::Kernel,
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
        ..Abilities::default()
    });
    let user = Place {
        mode: GuestMode::User,
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
