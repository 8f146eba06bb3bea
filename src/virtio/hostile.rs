//! What a hostile driver can do, against each device: nothing may panic, hang, grow or touch what it must not, and after
//! a reset the device serves as if nothing had been.

use super::pci::layout;
use super::rng::Rng;
use super::subjects::{quiet, subjects};
use super::testing::{
    AVAILABLE, DESCRIPTORS, INDIRECT, MEMORY_BYTES, NEXT, Outcome, R, Rig, USED, W, WRITE, kept_log,
};
use crate::devices::shell::DeviceMessage;
use crate::devices::testing::FakeContext;
use crate::devices::{Access, BackendEvent, Device, Queues, Width};
use crate::pci::decode::{Functions, Window};
use crate::pci::{BAR, CONFIG};
use crate::vcpu::route::Decode;
use crossbeam_channel::{Receiver, bounded};
use proptest::prelude::*;
use std::io::{self, Read};

/// Lets a driver do its worst with a new queue, then resets and looks whether the device serves.
fn survives(worst: impl Fn(&mut Rig, &str)) {
    for subject in subjects() {
        let mut rig = Rig::new(subject.handler);
        worst(&mut rig, subject.name);
        rig.remote.stop();
        let after = rig.memory_sum();
        assert_eq!(rig.memory_sum(), after);
        rig.start();
        assert_eq!((subject.probe)(&mut rig), subject.served, "{}", subject.name);
    }
}

/// The same with the expectation that the device says that it needs a reset.
fn breaks(worst: impl Fn(&mut Rig)) {
    survives(|rig, name| {
        worst(rig);
        rig.remote.ring();
        assert_eq!(rig.outcome(), Outcome::Broken, "{name}");
    });
}

#[test]
fn chains_that_loop() {
    breaks(|rig| {
        rig.describe(DESCRIPTORS, 0, 0x5000, 16, NEXT, 0);
        rig.offer(0);
    });
    breaks(|rig| {
        rig.describe(DESCRIPTORS, 0, 0x5000, 16, NEXT | WRITE, 1);
        rig.describe(DESCRIPTORS, 1, 0x5000, 16, NEXT | WRITE, 0);
        rig.offer(0);
    });
}

#[test]
fn chains_that_leave_their_table() {
    for (head, next) in [(0, 256), (0, u16::MAX), (256, 0), (u16::MAX, 0)] {
        breaks(|rig| {
            rig.describe(DESCRIPTORS, 0, 0x5000, 16, NEXT | WRITE, next);
            rig.offer(head);
        });
    }
}

#[test]
fn readable_behind_writable() {
    breaks(|rig| {
        rig.describe(DESCRIPTORS, 0, 0x5000, 16, NEXT | WRITE, 1);
        rig.describe(DESCRIPTORS, 1, 0x6000, 16, 0, 0);
        rig.offer(0);
    });
}

#[test]
fn indirect_tables_that_cannot_be() {
    // Empty; not whole descriptors; outside memory; at the end of the address space; with a table inside; looping;
    // longer than the queue.
    for (table, bytes) in [
        (0x7000, 0),
        (0x7000, 17),
        (MEMORY_BYTES, 32),
        (u64::MAX - 15, 16),
        (0x7000, 16),
        (0x9000, 32),
        (0x1_0000, 16 * 300),
    ] {
        breaks(|rig| {
            rig.describe(0x7000, 0, 0x7000, 16, INDIRECT, 0);
            rig.describe(0x9000, 0, 0x5000, 16, NEXT | WRITE, 1);
            rig.describe(0x9000, 1, 0x5000, 16, NEXT | WRITE, 0);
            for index in 0..300 {
                rig.describe(0x1_0000, index, 0x5000, 1, NEXT | WRITE, index + 1);
            }
            rig.describe(DESCRIPTORS, 0, table, bytes, INDIRECT, 0);
            rig.offer(0);
        });
    }
}

#[test]
fn chains_of_more_than_four_gigabytes() {
    breaks(|rig| {
        for index in 0..200 {
            rig.describe(DESCRIPTORS, index, 0x5000, u32::MAX, NEXT | WRITE, index + 1);
        }
        rig.describe(DESCRIPTORS, 200, 0x5000, u32::MAX, WRITE, 0);
        rig.offer(0);
    });
}

#[test]
fn an_index_that_jumps() {
    for index in [257, 1000, u16::MAX] {
        breaks(|rig| rig.publish(index));
    }
}

#[test]
fn buffers_over_the_rings_and_each_other() {
    // What the device writes lands in its own rings and table; it may break, it may not be otherwise impressed.
    survives(|rig, _| {
        for place in [DESCRIPTORS, AVAILABLE, USED, 0x5000] {
            rig.start();
            let _ = rig.request(&[R(0x5000, 16), W(place, 512), W(place, 512), W(0x6100, 1)]);
        }
    });
}

#[test]
fn a_queue_that_changes_while_it_is_served() {
    survives(|rig, _| {
        let memory = rig.memory.clone();
        let (stop, stopped) = bounded::<()>(0);
        let changer = std::thread::spawn(move || {
            use vm_memory::{Bytes, GuestAddress};
            let mut noise = 1u64;
            while stopped.try_recv() == Err(crossbeam_channel::TryRecvError::Empty) {
                noise = noise
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let at = (noise >> 33) % 0x800;
                memory
                    .write_slice(&noise.to_le_bytes(), GuestAddress(DESCRIPTORS + at))
                    .unwrap();
                memory
                    .write_slice(
                        &noise.to_le_bytes()[..2],
                        GuestAddress(AVAILABLE + 2 + at % 0x200),
                    )
                    .unwrap();
            }
        });
        for _ in 0..300 {
            rig.start();
            rig.offer(0);
            rig.remote.ring();
        }
        drop(stop);
        changer.join().unwrap();
    });
}

#[test]
fn the_log_of_a_driver_that_goes_on_is_bounded() {
    let (log, lines) = kept_log();
    let mut rig = Rig::with_log(Box::new(Rng::open().unwrap()), log);
    for _ in 0..200 {
        assert_eq!(rig.request(&[]), Outcome::Broken);
        rig.remote.stop();
        rig.start();
    }
    let lines: Vec<String> = lines.try_iter().collect();
    assert!((1..10).contains(&lines.len()), "{lines:?}");
}

/// Waits until it is let go: a host that does not answer.
struct Stuck {
    entered: crossbeam_channel::Sender<()>,
    release: Receiver<()>,
}

impl Stuck {
    /// A queue with such a host; tells when a request is inside, and lets one go for each message.
    fn rig() -> (Rig, Receiver<()>, crossbeam_channel::Sender<()>) {
        let (entered, inside) = bounded(1);
        let (release, released) = bounded(1);
        let source = Stuck {
            entered,
            release: released,
        };
        (Rig::new(Box::new(Rng::from_source(source))), inside, release)
    }
}

impl Read for Stuck {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let _ = self.entered.send(());
        let _ = self.release.recv();
        bytes.fill(0xff);
        Ok(bytes.len())
    }
}

#[test]
fn a_reset_does_not_wait_for_the_host_and_nothing_is_written_after_it() {
    let (mut rig, inside, release) = Stuck::rig();
    for _ in 0..100 {
        rig.describe(DESCRIPTORS, 0, 0x5000, 64, WRITE, 0);
        rig.offer(0);
        rig.remote.ring();
        inside.recv().unwrap();
        // The request is under way in the host. This returns although nobody has released it.
        rig.remote.stop();
        let before = rig.memory_sum();
        // A new start, whose request comes behind the old one's end.
        release.send(()).unwrap();
        rig.start();
        rig.describe(DESCRIPTORS, 0, 0x6000, 64, WRITE, 0);
        rig.offer(0);
        rig.remote.ring();
        inside.recv().unwrap();
        assert_eq!(
            rig.read(0x5000, 64),
            [0; 64],
            "the old request's buffer; sum {before}"
        );
        release.send(()).unwrap();
        assert_eq!(rig.outcome(), Outcome::Used(64));
        assert_eq!(rig.read(0x6000, 64), [0xff; 64]);
        rig.remote.stop();
        rig.write(0x6000, &[0; 64]);
        rig.start();
    }
}

#[test]
fn a_suspended_request_goes_on_when_resumed() {
    let (mut rig, inside, release) = Stuck::rig();
    rig.describe(DESCRIPTORS, 0, 0x5000, 64, WRITE, 0);
    rig.offer(0);
    rig.remote.ring();
    inside.recv().unwrap();
    rig.remote.suspend();
    let before = rig.memory_sum();
    release.send(()).unwrap();
    // The actor comes back from the host and waits. It gives no sign of it, but it must not have written when it goes on.
    for _ in 0..50 {
        rig.remote.ring();
        std::thread::yield_now();
        assert_eq!(rig.memory_sum(), before);
    }
    rig.remote.resume();
    assert_eq!(rig.outcome(), Outcome::Used(64));
}

#[test]
fn a_start_right_after_a_pause_is_heard() {
    // Rings are counted, not told apart: those of the resume, the reset, the start and the driver can be one.
    let (mut rig, inside, release) = Stuck::rig();
    for round in 0..2000 {
        rig.describe(DESCRIPTORS, 0, 0x5000, 64, WRITE, 0);
        rig.offer(0);
        rig.remote.ring();
        inside
            .recv_timeout(super::testing::LIMIT)
            .unwrap_or_else(|_| panic!("round {round}: nobody looked at the queue"));
        rig.remote.suspend();
        release.send(()).unwrap();
        // It comes back from the host and waits, at last.
        for _ in 0..round % 64 {
            std::thread::yield_now();
        }
        rig.remote.resume();
        rig.start();
    }
    drop(release);
}

/// Any content for a descriptor: mostly near what is valid.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address =
        prop_oneof![6 => 0..MEMORY_BYTES, 1 => MEMORY_BYTES - 64..MEMORY_BYTES + 64, 1 => any::<u64>()];
    let length = prop_oneof![6 => 0..2048u32, 1 => Just(0), 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0..4u16, 2 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..16u16, 1 => any::<u16>()];
    (address, length, flags, next)
}

/// What a driver can do to registers.
#[derive(Debug, Clone)]
enum Act {
    Read(u64, Width),
    Write(u64, Width, u64),
    News(u32, bool),
    Pause,
    Resume,
    Reset,
}

/// Any of it, with offsets mostly as they are given.
fn act(offset: impl Strategy<Value = u64> + Clone + 'static) -> impl Strategy<Value = Act> {
    let width = prop_oneof![6 => Just(Width::Dword), 2 => Just(Width::Byte), 3 => Just(Width::Word), 1 => Just(Width::Qword)];
    let offset = prop_oneof![19 => offset, 1 => any::<u64>()];
    let value = prop_oneof![
        4 => 0..4u64, 3 => Just(0xf), 2 => Just(0xb), 2 => (0..0x100u64).prop_map(|page| page << 12),
        2 => Just(u64::MAX), 1 => any::<u64>()
    ];
    prop_oneof![
        4 => (offset.clone(), width.clone()).prop_map(|(offset, width)| Act::Read(offset, width)),
        12 => (offset, width, value).prop_map(|(offset, width, value)| Act::Write(offset, width, value)),
        1 => (0..4u32, any::<bool>()).prop_map(|(life, broken)| Act::News(life, broken)),
        1 => Just(Act::Pause),
        1 => Just(Act::Resume),
        1 => Just(Act::Reset),
    ]
}

/// Registers of virtio-mmio.
fn mmio_offset() -> impl Strategy<Value = u64> + Clone {
    prop_oneof![8 => (0..0x50u64).prop_map(|word| word * 4), 1 => 0..0x1100u64]
}

/// Configuration space and BAR of virtio-pci.
fn pci_offset() -> impl Strategy<Value = u64> + Clone {
    let config = prop_oneof![
        3 => Just(4u64), 2 => (4..6u64).prop_map(|bar| bar * 4), 4 => 0..0x100u64, 1 => 0..0x1100u64
    ]
    .prop_map(|register| CONFIG + register);
    let common = 0..0x3au64;
    let table = (0..16u64).prop_map(|word| layout::TABLE + 4 * word);
    let others = prop_oneof![
        Just(layout::ISR),
        Just(layout::PENDING),
        layout::NOTIFY..layout::NOTIFY + 12,
        0..0x9000u64
    ];
    let bar = prop_oneof![6 => common, 2 => table, 1 => others].prop_map(|offset| BAR + offset);
    prop_oneof![2 => config, 3 => bar]
}

fn perform(device: &mut dyn Device, cx: &mut FakeContext, act: &Act) {
    match *act {
        Act::Read(offset, width) => {
            device.read(cx, Access { offset, width });
        }
        Act::Write(offset, width, value) => {
            device.write(cx, Access { offset, width }, value & width.all_ones())
        }
        Act::News(life, broken) => {
            let event = if broken {
                BackendEvent::Broken
            } else {
                BackendEvent::Used(Queues(life.into()))
            };
            device.backend_news(cx, super::BackendNews::new(life, event));
        }
        Act::Pause => device.pause(cx),
        Act::Resume => device.resume(cx),
        Act::Reset => device.reset(cx),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_ring_is_survived(
        descriptors in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(prop_oneof![9 => 0..16u16, 1 => any::<u16>()], 1..24),
        junk in prop::collection::vec(any::<u8>(), 64),
    ) {
        survives(|rig, name| {
            rig.write(0x5000, &junk);
            for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
                rig.describe(DESCRIPTORS, index as u16, *address, *length, *flags, *next);
            }
            for head in &heads {
                rig.offer(*head);
            }
            rig.remote.ring();
            if name != "net receive" {
                // Something becomes of it, good or bad. A frame that does not fit is dropped without a word.
                let _ = rig.news.recv_timeout(super::testing::LIMIT).expect("an answer");
            }
        });
    }

    #[test]
    fn any_registers_in_any_order_are_survived(acts in prop::collection::vec(act(mmio_offset()), 0..200)) {
        for latched in [false, true] {
            let (mut device, calls) = super::testing::mmio(latched);
            let mut cx = FakeContext::new();
            for act in &acts {
                perform(&mut device, &mut cx, act);
                // Every queue that is started was stopped before, and is within memory.
                let _ = calls.try_iter().count();
            }
            device.reset(&mut cx);
            let (mut new, _calls) = super::testing::mmio(latched);
            for offset in (0..0x200).step_by(4) {
                let access = Access { offset, width: Width::Dword };
                prop_assert_eq!(device.read(&mut cx, access), new.read(&mut cx, access), "{:#x}", offset);
            }
            prop_assert!(!device.interrupt());
        }
    }

    #[test]
    fn any_registers_of_a_function_in_any_order_are_survived(acts in prop::collection::vec(act(pci_offset()), 0..200)) {
        let (mut device, seen) = super::testing::pci();
        let mut cx = FakeContext::new();
        let mut places = vec![super::testing::ADDRESS];
        for act in &acts {
            perform(&mut device, &mut cx, act);
            let _ = seen.calls.try_iter().count();
            // Messages go to local APICs, doorbells are in windows.
            for (_, message) in seen.sent.try_iter() {
                prop_assert_eq!(message.address >> 20 & 0xfff, 0xfee);
            }
            for start in seen.doorbells.try_iter().flatten() {
                places.push(start - layout::NOTIFY);
                prop_assert!(seen.bus.windows().iter().any(|window| window.contains(&start)));
            }
        }
        device.reset(&mut cx);
        let (mut new, _seen) = super::testing::pci();
        let config = (0..0x100).map(|register| (CONFIG + register, Width::Byte));
        let bar = (0..0x8000 / 4).map(|word| (BAR + 4 * word, Width::Dword));
        let common = (0..0x38).flat_map(|offset| [(BAR + offset, Width::Byte), (BAR + offset, Width::Word)]);
        for (offset, width) in config.chain(bar).chain(common) {
            let access = Access { offset, width };
            prop_assert_eq!(device.read(&mut cx, access), new.read(&mut cx, access), "{:#x}", offset);
        }
        prop_assert!(!device.interrupt());
        prop_assert_eq!(seen.sent.try_iter().count(), 0);
        // Nothing of it is decoded any more.
        let device = (1, 0, layout::BAR_BYTES);
        for window in seen.bus.windows() {
            let decode = Window {
                bus: seen.bus.clone(),
                functions: Functions { bridge: 0, others: vec![device] },
                start: window.start,
            };
            for offset in places.iter().filter_map(|place| place.checked_sub(window.start)) {
                prop_assert_eq!(decode.decode(Access { offset, width: Width::Byte }), None);
            }
        }
    }
}

#[test]
fn news_that_find_no_room_are_told_again() {
    use crate::host::events::Tell;
    /// Refuses every other message.
    struct Reluctant(bool, crossbeam_channel::Sender<DeviceMessage>);
    impl Tell for Reluctant {
        fn try_tell(&mut self, message: DeviceMessage) -> bool {
            self.0 = !self.0;
            !self.0 && self.1.send(message).is_ok()
        }
    }
    let (news, told) = crossbeam_channel::unbounded();
    let mut rig = Rig::with_tell(
        Box::new(Rng::open().unwrap()),
        quiet(),
        Box::new(Reluctant(false, news)),
        told,
    );
    for _ in 0..20 {
        assert_eq!(rig.request(&[W(0x5000, 16)]), Outcome::Used(16));
    }
}
