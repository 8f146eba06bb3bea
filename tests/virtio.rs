//! Virtio devices in whole machines without `/dev/kvm`: a driver in this test plays the guest, one access at a time, and
//! everything goes by message, under every discipline of dispatch.

#[path = "virtio/balloon.rs"]
mod balloon;
#[path = "virtio/console.rs"]
mod console;
#[path = "virtio/driver.rs"]
mod driver;
#[path = "virtio/machine.rs"]
mod machine;
#[path = "virtio/ports.rs"]
mod ports;
#[path = "virtio/vsock.rs"]
mod vsock;

use actor_vmm::actors::PlacementKind;
use actor_vmm::boot::layout::{ECAM, PCI_WINDOW_32};
use actor_vmm::machine::dispatch::Dispatch;
use actor_vmm::machine::memory::MIN_BYTES;
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::request::{Answer, Command};
use actor_vmm::machine::state::State;
use actor_vmm::machine::supervisor::{self, Unwired};
use actor_vmm::vcpu::scripted::ScriptedBackend;
use actor_vmm::virtio::Transport;
use actor_vmm::virtio::config::VirtioConfig;
use crossbeam_channel::{TryRecvError, bounded};
use driver::{DRIVER_OK, Driver};
use machine::{Machine, Played, Scratch, config};
use slog::{Logger, o};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

/// Placements of the two devices.
type Placements = Vec<(String, PlacementKind)>;
/// A name, a transport, a discipline, and placements.
type Way = (String, Transport, Dispatch, Placements);

/// Both transports, each with every discipline and every placement.
fn ways() -> Vec<Way> {
    let named = |transport: Transport| {
        let ways = dispatches().into_iter();
        ways.map(move |(name, dispatch, placements)| {
            (format!("{transport:?}, {name}"), transport, dispatch, placements)
        })
    };
    named(Transport::Mmio).chain(named(Transport::Pci)).collect()
}

/// Every discipline, and every placement.
fn dispatches() -> Vec<(String, Dispatch, Placements)> {
    let placed = [PlacementKind::Thread, PlacementKind::Pool].map(|kind| {
        let placements = ["blk0", "rng0"].map(|name| (name.to_string(), kind));
        (kind.to_string(), Dispatch::Actor, placements.to_vec())
    });
    let disciplines = Dispatch::ALL.map(|dispatch| (dispatch.to_string(), dispatch, Vec::new()));
    disciplines.into_iter().chain(placed).collect()
}

fn devices(disk: &Scratch, transport: Transport) -> VirtioConfig {
    VirtioConfig {
        disks: vec![format!("path={},serial=s", disk.0.display()).parse().unwrap()],
        rng: true,
        transport,
        ..VirtioConfig::default()
    }
}

fn block_header(machine: &Machine, at: u64, kind: u32, sector: u64) {
    machine
        .memory
        .write_obj(u64::from(kind), GuestAddress(at))
        .unwrap();
    machine.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
}

#[test]
fn a_driver_is_served_under_every_discipline_and_placement() {
    for (way, transport, dispatch, placements) in ways() {
        let disk = Scratch::new(&[3; 8192]);
        let machine = Machine::start(config(dispatch, placements, devices(&disk, transport)));
        let (mut block, mut rng) = (
            Driver::new(&machine, transport, 0),
            Driver::new(&machine, transport, 1),
        );
        assert_eq!((block.device_type(), rng.device_type()), (2, 4), "{way}");
        block.start();
        rng.start();
        for round in 0..20u64 {
            let (header, data, status) = (0x30_0000, 0x31_0000, 0x32_0000);
            block_header(&machine, header, 1, round % 16);
            machine
                .memory
                .write_slice(&[round as u8; 512], GuestAddress(data))
                .unwrap();
            block.offer(&[(header, 16, false), (data, 512, false), (status, 1, true)]);
            rng.offer(&[(0x33_0000, 32, true)]);
            assert_eq!(block.interrupt(), 1, "{way}");
            assert_eq!(rng.interrupt(), 1, "{way}");
            assert_eq!(
                (block.used(), rng.used()),
                (round as u16 + 1, round as u16 + 1),
                "{way}"
            );
            assert_eq!(
                machine.memory.read_obj::<u8>(GuestAddress(status)).unwrap(),
                0,
                "{way}"
            );
        }
        let random: [u8; 32] = machine.memory.read_obj(GuestAddress(0x33_0000)).unwrap();
        assert_ne!(random, [0; 32]);
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
        let content = std::fs::read(&disk.0).unwrap();
        let expected: Vec<u8> = [16, 17, 18, 19]
            .into_iter()
            .chain(4..16)
            .flat_map(|byte| [byte; 512])
            .collect();
        assert_eq!(content, expected, "{way}");
    }
}

#[test]
fn a_reset_with_requests_under_way_leaves_a_device_that_serves() {
    for (way, transport, dispatch, placements) in ways() {
        let disk = Scratch::new(&[9; 1 << 20]);
        let machine = Machine::start(config(dispatch, placements, devices(&disk, transport)));
        let mut block = Driver::new(&machine, transport, 0);
        let (header, data, status) = (0x30_0000, 0x40_0000, 0x32_0000);
        for _ in 0..100 {
            block.start();
            block_header(&machine, header, 0, 0);
            block.offer(&[(header, 16, false), (data, 1 << 20, true), (status, 1, true)]);
            // No waiting: the request is anywhere between not begun and done.
            block.set_status(0);
            assert_eq!(block.status(), 0, "{way}");
            assert_eq!(block.pending(), 0, "{way}: nothing is pending after a reset");
            machine
                .memory
                .write_slice(&[0; 1 << 20], GuestAddress(data))
                .unwrap();
            let mut whole = vec![1; 1 << 20];
            machine.memory.read_slice(&mut whole, GuestAddress(data)).unwrap();
            assert!(
                whole.iter().all(|byte| *byte == 0),
                "{way}: memory was touched after the reset"
            );
        }
        block.start();
        block_header(&machine, header, 0, 0);
        block.offer(&[(header, 16, false), (data, 512, true), (status, 1, true)]);
        assert_eq!(block.interrupt(), 1, "{way}");
        assert_eq!(
            machine.memory.read_obj::<[u8; 32]>(GuestAddress(data)).unwrap(),
            [9; 32],
            "{way}"
        );
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
    }
}

#[test]
fn driver_ok_against_a_pause_leaves_a_device_that_serves() {
    for (way, transport, dispatch, placements) in ways() {
        let disk = Scratch::new(&[9; 1 << 20]);
        let machine = Machine::start(config(dispatch, placements, devices(&disk, transport)));
        let mut block = Driver::new(&machine, transport, 0);
        let (header, data, status) = (0x30_0000, 0x40_0000, 0x32_0000);
        let (over, is_over) = bounded::<()>(0);
        let (begin, begun) = bounded(1);
        let address = machine.address.clone();
        // Pauses without end, which fall before, into and behind the driver's steps as it happens.
        let pauses = std::thread::spawn(move || {
            let mut count = 0;
            while let Err(TryRecvError::Empty) = is_over.try_recv() {
                assert_eq!(address.ask(Command::Pause), Answer::Done(State::Paused));
                assert_eq!(address.ask(Command::Resume), Answer::Done(State::Running));
                let _ = begin.try_send(());
                count += 1;
            }
            count
        });
        begun.recv_timeout(machine::LIMIT).expect("a pause");
        for round in 0..20 {
            block.start();
            block_header(&machine, header, 0, 0);
            let clear = [round; 512];
            machine.memory.write_slice(&clear, GuestAddress(data)).unwrap();
            block.offer(&[(header, 16, false), (data, 512, true), (status, 1, true)]);
            assert_eq!(block.interrupt(), 1, "{way}");
            let mut read = [0; 512];
            machine.memory.read_slice(&mut read, GuestAddress(data)).unwrap();
            assert_eq!(read, [9; 512], "{way}");
            block.set_status(0);
            assert_eq!(block.status(), 0, "{way}");
        }
        drop(over);
        assert!(pauses.join().unwrap() > 0, "{way}: there was no pause");
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
    }
}

#[test]
fn while_a_machine_is_paused_its_memory_stands_still_and_then_the_request_goes_on() {
    for (way, transport, dispatch, placements) in ways() {
        let disk = Scratch::new(&[9; 1 << 20]);
        let machine = Machine::start(config(dispatch, placements, devices(&disk, transport)));
        let mut block = Driver::new(&machine, transport, 0);
        block.start();
        let (header, data, status) = (0x30_0000, 0x40_0000, 0x32_0000);
        let whole = || {
            let mut bytes = vec![0; MIN_BYTES as usize];
            machine.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        for _ in 0..10 {
            block_header(&machine, header, 0, 0);
            machine
                .memory
                .write_slice(&[0; 1 << 20], GuestAddress(data))
                .unwrap();
            block.offer(&[(header, 16, false), (data, 1 << 20, true), (status, 1, true)]);
            assert_eq!(
                machine.address.ask(Command::Pause),
                Answer::Done(State::Paused),
                "{way}"
            );
            let before = whole();
            for _ in 0..10 {
                std::thread::yield_now();
            }
            assert!(whole() == before, "{way}: memory was touched while paused");
            assert_eq!(
                machine.address.ask(Command::Resume),
                Answer::Done(State::Running),
                "{way}"
            );
            assert_eq!(block.interrupt(), 1, "{way}");
            let bytes = whole();
            let read = &bytes[data as usize..][..1 << 20];
            assert!(read.iter().all(|byte| *byte == 9), "{way}");
        }
        // A reset of the machine is one of the device.
        assert_eq!(
            machine.address.ask(Command::Reset),
            Answer::Done(State::Running),
            "{way}"
        );
        if transport == Transport::Pci {
            // And one of the function.
            assert_eq!(block.status(), u32::from(u8::MAX), "{way}");
            block.switch_on();
        }
        assert_eq!(block.status(), 0, "{way}");
        block.start();
        block.offer(&[(header, 16, false), (data, 512, true), (status, 1, true)]);
        assert_eq!(block.interrupt(), 1, "{way}");
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
    }
}

#[test]
fn a_limited_disk_takes_its_time_and_nobody_else_waits_for_it() {
    for (way, transport, dispatch, placements) in ways() {
        let disk = Scratch::new(&[9; 1 << 20]);
        let mut virtio = devices(&disk, transport);
        virtio.disks = vec![format!("path={},rate=256K", disk.0.display()).parse().unwrap()];
        let machine = Machine::start(config(dispatch, placements, virtio));
        let (mut block, mut rng) = (
            Driver::new(&machine, transport, 0),
            Driver::new(&machine, transport, 1),
        );
        block.start();
        rng.start();
        let (header, data, status) = (0x30_0000, 0x40_0000, 0x32_0000);
        let begin = std::time::Instant::now();
        for _ in 0..6 {
            block_header(&machine, header, 0, 0);
            block.offer(&[(header, 16, false), (data, 16 << 10, true), (status, 1, true)]);
            // Another device is served meanwhile, and the machine pauses at once.
            rng.offer(&[(0x33_0000, 32, true)]);
            assert_eq!(rng.interrupt(), 1, "{way}");
            assert_eq!(
                machine.address.ask(Command::Pause),
                Answer::Done(State::Paused),
                "{way}"
            );
            assert_eq!(
                machine.address.ask(Command::Resume),
                Answer::Done(State::Running),
                "{way}"
            );
            assert_eq!(block.interrupt(), 1, "{way}");
        }
        // The last began when the five before it were paid for, but for a tenth of a second.
        let least = Duration::from_secs_f64(5.0 * 16.0 / 256.0 - 0.1);
        assert!(begin.elapsed() >= least, "{way}: {:?}", begin.elapsed());
        // Four seconds' worth, and a reset that does not wait for them.
        block.offer(&[(header, 16, false), (data, 1 << 20, true), (status, 1, true)]);
        assert_eq!(block.interrupt(), 1, "{way}");
        block.offer(&[(header, 16, false), (data, 512, true), (status, 1, true)]);
        block.set_status(0);
        assert_eq!((block.status(), block.pending()), (0, 0), "{way}");
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
    }
}

#[test]
fn a_driver_that_breaks_its_queue_is_told_to_reset() {
    for transport in [Transport::Mmio, Transport::Pci] {
        let disk = Scratch::new(&[0; 512]);
        let machine = Machine::start(config(Dispatch::Actor, Vec::new(), devices(&disk, transport)));
        let mut rng = Driver::new(&machine, transport, 1);
        for _ in 0..3 {
            rng.start();
            rng.offer(&[(0x30_0000, 16, false)]);
            assert_eq!(rng.interrupt(), 2, "a change of configuration");
            assert_eq!(rng.status(), 0x40 | DRIVER_OK);
        }
        rng.start();
        rng.offer(&[(0x30_0000, 16, true)]);
        assert_eq!(rng.interrupt(), 1);
        assert!(matches!(machine.end(), Outcome::GuestExit(7)));
    }
}

#[test]
fn a_placement_can_name_a_device_that_is_there_and_no_other() {
    for (transport, there, other) in [
        (Transport::Mmio, "pci_config", "pci_host"),
        (Transport::Pci, "pci_host", "pci_config"),
    ] {
        for name in ["blk1", other] {
            let disk = Scratch::new(&[0; 512]);
            let placements = vec![(name.to_string(), PlacementKind::Thread)];
            let config = config(Dispatch::Actor, placements, devices(&disk, transport));
            let backends: Vec<ScriptedBackend<Played>> = Vec::new();
            let log = Logger::root(slog::Discard, o!());
            let error = supervisor::run_with(&config, backends, &Unwired, &log).unwrap_err();
            let text = error.to_string();
            let expected = [format!("'{name}'"), format!("{there}, blk0, rng0")];
            assert!(expected.iter().all(|part| text.contains(part)), "{text}");
            assert!(error.is_bad_input());
        }
    }
}

#[test]
fn a_bus_is_scanned_and_a_bar_moved_under_every_discipline() {
    const ADDRESS: u16 = 0xcf8;
    const DATA: u16 = 0xcfc;
    for (way, dispatch, placements) in dispatches() {
        let disk = Scratch::new(&[5; 512]);
        let machine = Machine::start(config(dispatch, placements, devices(&disk, Transport::Pci)));
        let config = |slot: u32, register: u32| {
            machine.port_out(ADDRESS, 1 << 31 | slot << 11 | register);
            machine.port_in(DATA)
        };
        let found: Vec<u32> = (0..32).map(|slot| config(slot, 0)).collect();
        assert_eq!(found[..3], [0x0008_1b36, 0x1042_1af4, 0x1044_1af4], "{way}");
        assert!(found[3..].iter().all(|id| *id == u32::MAX), "{way}");
        // By ECAM the same.
        let ecam: Vec<u32> = (0..32).map(|slot| machine.read(ECAM + (slot << 15), 4)).collect();
        assert_eq!(ecam, found, "{way}");
        assert_eq!(
            machine.port_in(ADDRESS),
            1 << 31 | 31 << 11,
            "what was written last"
        );

        let mut block = Driver::new(&machine, Transport::Pci, 0);
        let before = block.registers;
        block.start();
        let (header, data, status) = (0x30_0000, 0x31_0000, 0x32_0000);
        for (round, place) in [PCI_WINDOW_32.start, before, PCI_WINDOW_32.start + 0x80_0000]
            .into_iter()
            .enumerate()
        {
            machine.write(block.config + 0x10, 4, place as u32);
            machine.write(block.config + 0x14, 4, (place >> 32) as u32);
            let old = std::mem::replace(&mut block.registers, place);
            assert_eq!(
                machine.read(old + 0x14, 1),
                0xff,
                "{way}: nobody is there any more"
            );
            assert_eq!(block.status(), DRIVER_OK, "{way}: the device has not noticed");
            block_header(&machine, header, 0, 0);
            block.offer(&[(header, 16, false), (data, 512, true), (status, 1, true)]);
            assert_eq!(block.interrupt(), 1, "{way}");
            assert_eq!(block.used(), round as u16 + 1, "{way}");
        }
        assert_eq!(
            machine.memory.read_obj::<u8>(GuestAddress(data)).unwrap(),
            5,
            "{way}"
        );
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
    }
}
