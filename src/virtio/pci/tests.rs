//! A driver by the book, and what is particular to the transport.

use super::super::registers::status;
use super::super::testing::{ADDRESS, Call, SLOT, Seen, pci};
use super::*;
use crate::devices::testing::FakeContext;
use crate::pci::CONFIG;
use crate::pci::decode::{Functions, Window};
use crate::pci::msix::Message;
use crate::vcpu::route::Decode;
use Width::{Byte, Dword, Qword, Word};

struct Driver {
    device: Function,
    cx: FakeContext,
    seen: Seen,
}

/// Memory, and bus master.
const ON: u64 = 0x6;
const MSIX_ON: u64 = 0x8000;
const TO_CPU: u64 = 0xfee0_1000;

impl Driver {
    fn new() -> Driver {
        let (device, seen) = pci();
        Driver {
            device,
            cx: FakeContext::new(),
            seen,
        }
    }

    fn get(&mut self, offset: u64, width: Width) -> u64 {
        let offset = BAR + offset;
        self.device.read(&mut self.cx, Access { offset, width }) & width.all_ones()
    }

    fn set(&mut self, offset: u64, width: Width, value: u64) {
        let offset = BAR + offset;
        self.device.write(&mut self.cx, Access { offset, width }, value);
    }

    fn config(&mut self, register: u64, width: Width) -> u64 {
        let offset = CONFIG + register;
        self.device.read(&mut self.cx, Access { offset, width }) & width.all_ones()
    }

    fn set_config(&mut self, register: u64, width: Width, value: u64) {
        let offset = CONFIG + register;
        self.device.write(&mut self.cx, Access { offset, width }, value);
    }

    /// Where a capability is, by its id and, of virtio's, its kind.
    fn capability(&mut self, id: u64, kind: Option<u64>) -> u64 {
        let mut at = self.config(0x34, Byte);
        while at != 0 {
            let is_kind = |driver: &mut Driver| kind.is_none_or(|kind| driver.config(at + 3, Byte) == kind);
            if self.config(at, Byte) == id && is_kind(self) {
                return at;
            }
            at = self.config(at + 1, Byte);
        }
        panic!("no capability {id:#x} {kind:?}");
    }

    fn msix(&mut self, control: u64) {
        let at = self.capability(0x11, None);
        self.set_config(at + 2, Word, control);
    }

    /// Opens or masks a vector, whose data are its number.
    fn vector(&mut self, vector: u64, masked: bool) {
        let entry = layout::TABLE + 16 * vector;
        self.set(entry, Qword, TO_CPU);
        self.set(entry + 8, Dword, vector);
        self.set(entry + 12, Dword, masked.into());
    }

    /// What a driver does, step by step. [VIRTIO 1.2 §3.1.1, §4.1.5.1]
    fn start(&mut self) {
        self.set_config(4, Word, ON);
        self.set(0x14, Byte, 0);
        assert_eq!(self.get(0x14, Byte), 0);
        self.set(0x14, Byte, 1);
        self.set(0x14, Byte, 3);
        for (select, features) in [(0, 0), (1, 1)] {
            self.set(0x08, Dword, select);
            self.set(0x0c, Dword, features);
        }
        self.set(0x14, Byte, 0xb);
        for index in 0..2 {
            let base = 0x1_0000 * (index + 1);
            self.set(0x16, Word, index);
            self.set(0x18, Word, 64);
            self.set(0x1a, Word, index + 1);
            self.set(0x20, Dword, base);
            self.set(0x28, Qword, base + 0x1000);
            self.set(0x30, Dword, base + 0x2000);
            self.set(0x34, Dword, 0);
            self.set(0x1c, Word, 1);
        }
        self.set(0x10, Word, 0);
        self.set(0x14, Byte, 0xf);
        assert_eq!(self.get(0x14, Byte), 0xf);
    }

    fn news(&mut self, event: BackendEvent) {
        let news = BackendNews::new(1, event);
        self.device.backend_news(&mut self.cx, news);
    }

    fn used(&mut self, queue: usize) {
        self.news(BackendEvent::Used(Queues::one(queue)));
    }

    fn sent(&self) -> Vec<(usize, u32)> {
        let sent = self.seen.sent.try_iter();
        sent.map(|(source, Message { address, data })| {
            assert_eq!(address, TO_CPU);
            (source, data)
        })
        .collect()
    }
}

#[test]
fn a_driver_finds_what_it_looks_for() {
    let mut driver = Driver::new();
    assert_eq!(driver.config(0, Dword), 0x1042_1af4);
    assert_eq!(driver.config(8, Byte), 1, "not transitional");
    for (kind, offset, length) in [
        (1, 0, 56),
        (2, 0x3000, 8),
        (3, 0x1000, 1),
        (4, 0x2000, 60),
        (5, 0, 0),
    ] {
        let at = driver.capability(9, Some(kind));
        assert_eq!(driver.config(at + 4, Byte), 0, "BAR 0");
        let found = (driver.config(at + 8, Dword), driver.config(at + 12, Dword));
        assert_eq!(found, (offset, length), "{kind}");
    }
    let notify = driver.capability(9, Some(2));
    assert_eq!(
        (driver.config(notify + 2, Byte), driver.config(notify + 16, Dword)),
        (20, 4)
    );
    let msix = driver.capability(0x11, None);
    assert_eq!(driver.config(msix + 2, Word), 2, "three vectors");
    assert_eq!(
        (driver.config(msix + 4, Dword), driver.config(msix + 8, Dword)),
        (0x4000, 0x5000)
    );
    let features = [0, 1, 2].map(|select| {
        driver.set(0, Dword, select);
        driver.get(4, Dword)
    });
    assert_eq!(features, [1 << 9 | 1 << 28 | 1 << 29, 1, 0]);
    assert_eq!(driver.get(0x12, Word), 2, "queues");
    for (queue, size, offset) in [(0, 256, 0), (1, 256, 1), (2, 0, 0)] {
        driver.set(0x16, Word, queue);
        assert_eq!((driver.get(0x18, Word), driver.get(0x1e, Word)), (size, offset));
        assert_eq!(driver.get(0x1a, Word), 0xffff);
    }
    assert_eq!(driver.get(0x2008, Qword), 0x0f0e_0d0c_0b0a_0908);
    assert_eq!(driver.get(0x203a, Dword), 0xffff_3b3a);
}

#[test]
fn registers_decode_in_their_own_width() {
    let mut driver = Driver::new();
    for (offset, right) in [
        (0x00, Dword),
        (0x10, Word),
        (0x14, Byte),
        (0x15, Byte),
        (0x16, Word),
        (0x20, Dword),
        (0x20, Qword),
        (0x1000, Byte),
    ] {
        for width in [Byte, Word, Dword, Qword] {
            let read = driver.get(offset, width);
            let is_64 = offset == 0x20 && width >= Dword;
            assert_eq!(
                read == width.all_ones() && offset != 0x10,
                width != right && !is_64 && offset != 0x10
            );
        }
    }
    for (offset, width) in [(0x22, Word), (0x24, Qword), (0x38, Dword), (0x3000, Word)] {
        assert_eq!(driver.get(offset, width), width.all_ones());
    }
}

#[test]
fn queues_are_started_as_they_were_set_up_and_notified_by_their_address() {
    let mut driver = Driver::new();
    driver.start();
    let started = driver
        .seen
        .calls
        .try_iter()
        .filter(|call| matches!(call, Call::Start { .. }));
    let expected = [0, 1].map(|index| Call::Start {
        index,
        size: 64,
        event_idx: false,
        life: 1,
    });
    assert_eq!(started.collect::<Vec<_>>(), expected);
    driver.set(0x16, Word, 1);
    assert_eq!(
        (driver.get(0x28, Dword), driver.get(0x28, Qword)),
        (0x2_1000, 0x2_1000)
    );
    driver.set(0x3004, Word, 1);
    driver.set(0x3000, Dword, 7);
    driver.set(0x3008, Word, 2);
    driver.set(0x3002, Word, 0);
    let calls: Vec<_> = driver.seen.calls.try_iter().collect();
    assert_eq!(calls, [Call::Notify(1), Call::Notify(0)]);
}

#[test]
fn without_msix_the_line_is_up_until_the_status_is_read() {
    let mut driver = Driver::new();
    driver.start();
    driver.used(1);
    assert!(driver.device.interrupt());
    assert_eq!(driver.config(6, Word) & 8, 8, "seen in the status");
    driver.set_config(4, Word, ON | 1 << 10);
    assert!(!driver.device.interrupt(), "disabled");
    assert_eq!(driver.config(6, Word) & 8, 8);
    driver.set_config(4, Word, ON);
    assert!(driver.device.interrupt());
    driver.news(BackendEvent::Broken);
    assert_eq!((driver.get(0x1000, Byte), driver.get(0x14, Byte)), (3, 0x4f));
    assert!(!driver.device.interrupt());
    assert_eq!((driver.get(0x1000, Byte), driver.config(6, Word) & 8), (0, 0));
    assert_eq!(driver.sent(), []);
}

#[test]
fn with_msix_each_source_sends_its_vector() {
    let mut driver = Driver::new();
    driver.msix(MSIX_ON);
    for vector in 0..3 {
        driver.vector(vector, false);
    }
    driver.start();
    driver.used(1);
    assert_eq!(driver.sent(), [(2, 2)]);
    driver.news(BackendEvent::Used(Queues(3)));
    assert_eq!(driver.sent(), [(1, 1), (2, 2)]);
    // Two on one vector.
    driver.set(0x16, Word, 0);
    driver.set(0x1a, Word, 2);
    driver.used(0);
    assert_eq!(driver.sent(), [(1, 2)]);
    // One that does not exist is none.
    driver.set(0x1a, Word, 3);
    assert_eq!(driver.get(0x1a, Word), 0xffff);
    driver.used(0);
    driver.news(BackendEvent::Broken);
    assert_eq!(driver.sent(), [(0, 0)]);
    assert!(!driver.device.interrupt());
}

#[test]
fn what_is_masked_is_pending_and_goes_out_later() {
    let mut driver = Driver::new();
    driver.msix(MSIX_ON);
    driver.vector(1, false);
    driver.start();
    driver.vector(1, true);
    driver.used(0);
    driver.used(0);
    driver.used(1);
    assert_eq!((driver.sent(), driver.get(0x5000, Qword)), (vec![], 0b110));
    driver.vector(1, false);
    assert_eq!(
        (driver.sent(), driver.get(0x5000, Dword)),
        (vec![(1, 1)], 0b100),
        "once"
    );
    // All at once, by the function's mask.
    driver.vector(2, false);
    assert_eq!(driver.sent(), [(2, 2)]);
    driver.msix(MSIX_ON | 0x4000);
    driver.used(1);
    assert_eq!(driver.sent(), []);
    driver.msix(MSIX_ON);
    assert_eq!(driver.sent(), [(2, 2)]);
    // A reset of the device forgets, and leaves the table.
    driver.vector(1, true);
    driver.used(0);
    driver.set(0x14, Byte, 0);
    assert_eq!(driver.get(0x5000, Dword), 0);
    assert_eq!(driver.get(0x4000 + 16 + 12, Dword), 1);
    driver.vector(1, false);
    assert_eq!(driver.sent(), []);
}

#[test]
fn who_switches_msix_while_queues_are_served_is_told_of_all() {
    let mut driver = Driver::new();
    let word = driver.device.msix_word.clone().unwrap();
    driver.vector(1, false);
    driver.vector(2, false);
    driver.start();
    assert!(!word.is_on());
    driver.msix(MSIX_ON);
    assert!(word.is_on());
    assert_eq!(driver.sent(), [(1, 1), (2, 2)]);
    driver.msix(0);
    assert!(!word.is_on());
    assert!(driver.device.interrupt());
}

#[test]
fn who_is_not_master_touches_no_memory_and_sends_nothing() {
    let mut driver = Driver::new();
    driver.msix(MSIX_ON);
    driver.vector(1, false);
    driver.start();
    driver.seen.calls.try_iter().count();
    driver.set_config(4, Word, 2);
    driver.used(0);
    assert_eq!(driver.sent(), []);
    driver.device.pause(&mut driver.cx);
    driver.set_config(4, Word, ON);
    assert_eq!(driver.sent(), [(1, 1)]);
    driver.device.resume(&mut driver.cx);
    let calls: Vec<_> = driver.seen.calls.try_iter().collect();
    let expected = [Call::Suspend, Call::Suspend, Call::Suspend, Call::Resume];
    assert_eq!(calls, expected, "paused as long as either wants it");
    // Nor is a queue that is started then served.
    driver.set(0x14, Byte, 0);
    driver.start();
    driver.set_config(4, Word, 2);
    driver.set(0x14, Byte, 0);
    driver.seen.calls.try_iter().count();
    driver.set(0x14, Byte, 3);
    driver.set(0x08, Dword, 1);
    driver.set(0x0c, Dword, 1);
    driver.set(0x14, Byte, 0xb);
    driver.set(0x14, Byte, 0xf);
    assert_eq!(driver.seen.calls.try_iter().last(), Some(Call::Suspend));
}

#[test]
fn the_bar_is_sized_and_moved_and_the_doorbells_with_it() {
    let mut driver = Driver::new();
    let functions = Functions {
        bridge: 0,
        others: vec![(SLOT, 5, layout::BAR_BYTES)],
    };
    let bus = driver.seen.bus.clone();
    let who = |address: u64| {
        let start = bus
            .windows()
            .iter()
            .find(|window| window.contains(&address))?
            .start;
        let window = Window {
            bus: bus.clone(),
            functions: functions.clone(),
            start,
        };
        let access = Access {
            offset: address - start,
            width: Byte,
        };
        window.decode(access).map(|(_, access)| access.offset - BAR)
    };
    assert_eq!(who(ADDRESS), None, "memory is not decoded yet");
    driver.set_config(0x10, Dword, 0xffff_ffff);
    driver.set_config(0x14, Dword, 0xffff_ffff);
    assert_eq!(
        (driver.config(0x10, Dword), driver.config(0x14, Dword)),
        (0xffff_8004, 0xffff_ffff)
    );
    driver.set_config(0x10, Dword, ADDRESS & 0xffff_ffff);
    driver.set_config(0x14, Dword, ADDRESS >> 32);
    assert_eq!(driver.seen.doorbells.try_iter().count(), 0);
    driver.set_config(4, Word, ON);
    assert_eq!((who(ADDRESS), who(ADDRESS + 0x7fff)), (Some(0), Some(0x7fff)));
    driver.set_config(4, Word, 0);
    assert_eq!(who(ADDRESS), None);
    driver.set_config(0x10, Dword, 0xc001_0000);
    driver.set_config(0x14, Dword, 0);
    driver.set_config(4, Word, ON);
    assert_eq!((who(ADDRESS), who(0xc001_0000)), (None, Some(0)));
    // Where the bridge passes nothing on.
    driver.set_config(0x10, Dword, 0xfee0_0000);
    assert_eq!(who(0xc001_0000), None);
    let doorbells: Vec<_> = driver.seen.doorbells.try_iter().collect();
    assert_eq!(doorbells, [Some(ADDRESS + 0x3000), None, Some(0xc001_3000), None]);
}

#[test]
fn the_bar_is_reached_through_the_configuration_space() {
    let mut driver = Driver::new();
    let at = driver.capability(9, Some(5));
    let aim = |driver: &mut Driver, bar, offset, length| {
        driver.set_config(at + 4, Byte, bar);
        driver.set_config(at + 8, Dword, offset);
        driver.set_config(at + 12, Dword, length);
    };
    aim(&mut driver, 0, 0x14, 1);
    driver.set_config(at + 16, Dword, 0xffff_ff01);
    assert_eq!(driver.get(0x14, Byte), u64::from(status::ACKNOWLEDGE));
    assert_eq!(driver.config(at + 16, Dword), 1);
    aim(&mut driver, 0, 0x2004, 4);
    assert_eq!(driver.config(at + 16, Dword), 0x0706_0504);
    // What is no access to the BAR is plain bytes.
    for (bar, offset, length) in [(1, 0x14, 1), (0, 0x15, 2), (0, 0x14, 3), (0, 0, 8), (0, 0, 0)] {
        aim(&mut driver, bar, offset, length);
        driver.set_config(at + 16, Dword, 0);
        assert_eq!(driver.config(at + 16, Dword), 0);
        assert_eq!(driver.get(0x14, Byte), 1);
    }
    aim(&mut driver, 0, 0xffff_fffc, 4);
    driver.set_config(at + 16, Dword, 0);
    assert_eq!(driver.config(at + 16, Dword), 0xffff_ffff);
}

#[test]
fn a_reset_of_the_machine_is_as_after_power_on() {
    let mut driver = Driver::new();
    driver.msix(MSIX_ON);
    driver.vector(1, false);
    driver.start();
    driver.used(1);
    driver.device.reset(&mut driver.cx);
    assert_eq!((driver.config(4, Word), driver.get(0x14, Byte)), (0, 0));
    assert_eq!(driver.config(0x10, Dword), ADDRESS & 0xffff_ffff | 4);
    assert_eq!(driver.get(0x4000 + 16 + 12, Dword), 1, "masked");
    assert_eq!(driver.get(0x5000, Dword), 0);
    assert!(!driver.device.msix_word.as_ref().unwrap().is_on());
    assert_eq!(driver.seen.doorbells.try_iter().last(), Some(None));
}
