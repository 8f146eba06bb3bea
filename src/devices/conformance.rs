//! What every device must pass, whatever it is: a new device gets a line in [`DEVICES`] and nothing else.

use proptest::prelude::*;

use super::testing::FakeContext;
use super::{
    Access, Device, MachineRequest, Nanos, Width, acpi_pm, debug_console, debug_exit, i8042, pci_config,
    pvpanic, rtc, uart16550,
};

/// A device, and its registers: the offsets whose bytes may read as something else than all-ones.
type Subject = (fn() -> Box<dyn Device>, &'static [u64]);

/// Every device.
const DEVICES: &[Subject] = &[
    (
        || Box::new(uart16550::Uart16550::new("serial0")),
        &[0, 1, 2, 3, 4, 5, 6, 7],
    ),
    (
        || {
            Box::new(rtc::Rtc::new(rtc::MemorySize {
                below_4g_bytes: 3 << 30,
                above_4g_bytes: 5 << 30,
            }))
        },
        &[1],
    ),
    (|| Box::new(i8042::I8042::new()), &[0, 4]),
    (|| Box::new(acpi_pm::AcpiPm::new()), &[0, 1, 2, 3, 4, 5]),
    (|| Box::new(debug_exit::DebugExit::new()), &[]),
    (|| Box::new(debug_console::DebugConsole::new()), &[0]),
    (|| Box::new(pvpanic::Pvpanic::new()), &[0]),
    // The address decodes as a whole dword only.
    (|| Box::new(pci_config::PciConfig::new()), &[]),
    // Registers decode as whole dwords only.
    (|| Box::new(crate::virtio::testing::mmio(false).0), &[]),
    // Configuration space and BAR are further up.
    (|| Box::new(crate::virtio::testing::pci().0), &[]),
    (
        || {
            Box::new(crate::pci::host_bridge::HostBridge::new(
                crate::pci::decode::Bus::new([0..0, 0..0]),
            ))
        },
        &[],
    ),
];

/// One thing that can happen to a device.
#[derive(Debug, Clone)]
enum Step {
    Read(Access),
    Write(Access, u64),
    InputReady(Vec<u8>),
    OutputReady(usize),
    Advance(u64),
    SetWallClock(i64),
}

/// What can be seen of a device after a step.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    read: Option<u64>,
    interrupt: bool,
    deadline: Option<Nanos>,
    sent: Vec<u8>,
    requests: Vec<MachineRequest>,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![9 => 0..16u64, 1 => any::<u64>()];
    let width = prop_oneof![
        5 => Just(Width::Byte),
        2 => Just(Width::Word),
        2 => Just(Width::Dword),
        1 => Just(Width::Qword),
    ];
    (offset, width).prop_map(|(offset, width)| Access { offset, width })
}

fn step() -> impl Strategy<Value = Step> {
    let value = prop_oneof![3 => 0..256u64, 1 => any::<u64>()];
    prop_oneof![
        8 => access().prop_map(Step::Read),
        8 => (access(), value).prop_map(|(access, value)| Step::Write(access, value & access.width.all_ones())),
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::InputReady),
        1 => (1..40usize).prop_map(Step::OutputReady),
        2 => prop_oneof![0..3_000_000_000u64, 0..200_000u64, any::<u64>()].prop_map(Step::Advance),
        1 => any::<i64>().prop_map(Step::SetWallClock),
    ]
}

fn script() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 0..120)
}

/// Does one step as the shell would: with a tick when the deadline has come.
fn perform(device: &mut dyn Device, cx: &mut FakeContext, step: &Step) -> Seen {
    let mut read = None;
    match step {
        Step::Read(access) => read = Some(device.read(cx, *access)),
        Step::Write(access, value) => device.write(cx, *access, *value),
        Step::InputReady(bytes) => {
            cx.typed.extend(bytes);
            device.input_ready(cx);
        }
        Step::OutputReady(room) => {
            cx.room = *room;
            device.output_ready(cx);
        }
        Step::Advance(ns) => cx.advance_ns(*ns),
        Step::SetWallClock(ns) => cx.wall_clock_ns = *ns,
    }
    if device.deadline().is_some_and(|deadline| deadline <= cx.now) {
        device.tick(cx);
        // Guest time at its end cannot have anything after it.
        assert!(
            device.deadline().is_none_or(|deadline| deadline > cx.now) || cx.now == Nanos(u64::MAX),
            "{} wants a tick again at once: the shell would spin",
            device.name()
        );
    }
    Seen {
        read,
        interrupt: device.interrupt(),
        deadline: device.deadline(),
        sent: std::mem::take(&mut cx.sent),
        requests: std::mem::take(&mut cx.requests),
    }
}

/// A world in which nothing is left from before, at the time of `cx`.
fn fresh_world_at(cx: &FakeContext) -> FakeContext {
    FakeContext {
        now: cx.now,
        wall_clock_ns: cx.wall_clock_ns,
        ..FakeContext::new()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_happens_to_a_device_makes_it_panic(script in script()) {
        for (new, _) in DEVICES {
            let (mut device, mut cx) = (new(), FakeContext::new());
            for step in &script {
                perform(&mut *device, &mut cx, step);
            }
        }
    }

    #[test]
    fn a_reset_device_cannot_be_told_from_a_new_one(before in script(), after in script()) {
        for (new, _) in DEVICES {
            let (mut device, mut cx) = (new(), FakeContext::new());
            for step in &before {
                perform(&mut *device, &mut cx, step);
            }
            // The host's side is not the device's: a host without room is one before and after.
            cx.room = usize::MAX;
            device.output_ready(&mut cx);
            device.reset(&mut cx);
            let (mut cx, mut new_cx) = (fresh_world_at(&cx), fresh_world_at(&cx));
            let mut new_device = new();
            for step in &after {
                let seen = perform(&mut *device, &mut cx, step);
                let expected = perform(&mut *new_device, &mut new_cx, step);
                prop_assert_eq!(seen, expected, "{} after {:?}", device.name(), step);
            }
        }
    }

    #[test]
    fn what_is_no_register_reads_all_ones(script in script(), far in 16..u64::MAX - 8) {
        for (new, registers) in DEVICES {
            let (mut device, mut cx) = (new(), FakeContext::new());
            for step in &script {
                perform(&mut *device, &mut cx, step);
            }
            for offset in (0..16).chain([far]).filter(|offset| !registers.contains(offset)) {
                let read = device.read(&mut cx, Access { offset, width: Width::Byte }) & 0xff;
                prop_assert_eq!(read, 0xff, "{} at {:#x}", device.name(), offset);
            }
            for width in [Width::Byte, Width::Word, Width::Dword, Width::Qword] {
                let read = device.read(&mut cx, Access { offset: far, width }) & width.all_ones();
                prop_assert_eq!(read, width.all_ones(), "{} at {:#x}", device.name(), far);
            }
        }
    }

    #[test]
    fn interrupt_and_deadline_are_functions_of_the_state(script in script()) {
        for (new, _) in DEVICES {
            let (mut device, mut cx) = (new(), FakeContext::new());
            for step in &script {
                let seen = perform(&mut *device, &mut cx, step);
                cx.advance_ns(1_000_000);
                prop_assert_eq!((device.interrupt(), device.deadline()), (seen.interrupt, seen.deadline));
            }
        }
    }
}

#[test]
fn names_are_distinct() {
    let mut names: Vec<&str> = DEVICES.iter().map(|(new, _)| new().name()).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}
