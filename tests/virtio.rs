//! Virtio devices in whole machines without `/dev/kvm`: a driver in this test plays the guest, one access at a time, and
//! everything goes by message, under every discipline of dispatch.

use actor_vmm::actors::PlacementKind;
use actor_vmm::boot::EntryPoint;
use actor_vmm::boot::layout::VIRTIO_MMIO;
use actor_vmm::devices::Width;
use actor_vmm::host::console::ConsoleKind;
use actor_vmm::machine::dispatch::Dispatch;
use actor_vmm::machine::memory::{Backing, MIN_BYTES, MemoryConfig, create};
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::platform::NoPlatform;
use actor_vmm::machine::request::{Answer, Command, Inbox, MachineAddress};
use actor_vmm::machine::state::State;
use actor_vmm::machine::supervisor::{self, Guest, MachineConfig, StartError, Unwired, Virtio};
use actor_vmm::vcpu::scripted::{ScriptedBackend, Source, Step};
use actor_vmm::virtio::Notify;
use actor_vmm::virtio::config::VirtioConfig;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use slog::{Logger, o};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Hang protection.
const LIMIT: Duration = Duration::from_secs(60);

/// A file that is gone with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(content: &[u8]) -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("actor-vmm-virtio-{}-{number}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Steps as the test makes them.
struct Played {
    steps: Receiver<Step>,
    seen: Sender<u64>,
}

impl Source for Played {
    fn next(&mut self) -> Option<Step> {
        match self.steps.try_recv() {
            Ok(step) => Some(step),
            // A guest that waits, but leaves the processor now and then: it can be paused.
            Err(TryRecvError::Empty) => {
                std::thread::yield_now();
                Some(Step::Out {
                    port: 0x80,
                    width: Width::Byte,
                    values: vec![0],
                })
            }
            Err(TryRecvError::Disconnected) => None,
        }
    }

    fn seen(&mut self, _step: &Step, value: u64) {
        // Of reads alone; each is waited for.
        let _ = self.seen.send(value);
    }
}

/// A running machine with one vCPU that does what it is told.
struct Machine {
    steps: Sender<Step>,
    seen: Receiver<u64>,
    memory: GuestMemoryMmap,
    address: MachineAddress,
    thread: JoinHandle<Result<Outcome, StartError>>,
}

fn config(
    dispatch: Dispatch,
    placements: Vec<(String, PlacementKind)>,
    virtio: VirtioConfig,
) -> MachineConfig {
    MachineConfig {
        guest: Guest::Image {
            bytes: &[],
            at: 0,
            entry: EntryPoint::Flat32 { eip: 0 },
        },
        cpus: 1,
        memory: MemoryConfig {
            size_bytes: MIN_BYTES,
            backing: Backing::Anonymous,
        },
        dispatch,
        placements,
        console: ConsoleKind::Off,
        debug_console: ConsoleKind::Off,
        control: None,
        tarpit: None,
        virtio,
        delay: None,
        timeout: Some(LIMIT),
        gdb: None,
        on_reset: Default::default(),
    }
}

impl Machine {
    fn start(config: MachineConfig) -> Machine {
        let log = Logger::root(slog::Discard, o!());
        let opened = config.virtio.open(&log).unwrap();
        let memory = create(&config.memory).unwrap();
        let (steps, script) = bounded(1);
        let (tell, seen) = bounded(1);
        let played = Played {
            steps: script,
            seen: tell,
        };
        let given = memory.clone();
        let inbox = Inbox::new();
        let address = inbox.address();
        let thread = std::thread::spawn(move || {
            let backends = vec![ScriptedBackend::new(played)];
            let virtio = Virtio {
                memory: given,
                devices: opened,
            };
            supervisor::run_around(
                &config,
                backends,
                &Unwired,
                virtio,
                Box::new(NoPlatform),
                inbox,
                &log,
            )
        });
        Machine {
            steps,
            seen,
            memory,
            address,
            thread,
        }
    }

    fn read(&self, address: u64) -> u32 {
        let step = Step::Read {
            address,
            length: 4,
            expect: None,
        };
        self.steps.send(step).unwrap();
        self.seen.recv_timeout(LIMIT).unwrap() as u32
    }

    fn write(&self, address: u64, value: u32) {
        let step = Step::Write {
            address,
            length: 4,
            value: value.into(),
        };
        self.steps.send(step).unwrap();
    }

    fn end(self) -> Outcome {
        let exit = Step::Out {
            port: 0xf4,
            width: Width::Byte,
            values: vec![7],
        };
        self.steps.send(exit).unwrap();
        drop(self.steps);
        self.thread.join().unwrap().unwrap()
    }
}

/// A driver for the device in a place. Rings are at fixed addresses for each.
struct Driver<'a> {
    machine: &'a Machine,
    registers: u64,
    rings: u64,
    offered: u16,
}

const FEATURES_OK: u32 = 0xb;
const DRIVER_OK: u32 = 0xf;

impl<'a> Driver<'a> {
    fn new(machine: &'a Machine, place: u64) -> Driver<'a> {
        Driver {
            machine,
            registers: VIRTIO_MMIO + place * 0x1000,
            rings: 0x10_0000 + place * 0x10_0000,
            offered: 0,
        }
    }

    fn get(&self, register: u64) -> u32 {
        self.machine.read(self.registers + register)
    }

    fn set(&self, register: u64, value: u32) {
        self.machine.write(self.registers + register, value);
    }

    /// Resets, negotiates VIRTIO_F_VERSION_1 alone, and starts queue 0 of 8 descriptors.
    fn start(&mut self) {
        self.set(0x70, 0);
        assert_eq!(self.get(0x70), 0);
        let zeroes = [0; 0x3000];
        self.machine
            .memory
            .write_slice(&zeroes, GuestAddress(self.rings))
            .unwrap();
        self.offered = 0;
        self.set(0x70, 1);
        self.set(0x70, 3);
        self.set(0x24, 1);
        self.set(0x20, 1);
        self.set(0x70, FEATURES_OK);
        assert_eq!(self.get(0x70), FEATURES_OK);
        self.set(0x30, 0);
        self.set(0x38, 8);
        for (register, offset) in [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)] {
            self.set(register, (self.rings + offset) as u32);
            self.set(register + 4, 0);
        }
        self.set(0x44, 1);
        self.set(0x70, DRIVER_OK);
        assert_eq!(self.get(0x70), DRIVER_OK);
    }

    /// Offers one chain: (address, bytes, whether the device writes), and notifies.
    fn offer(&mut self, buffers: &[(u64, u32, bool)]) {
        let memory = &self.machine.memory;
        for (index, (address, length, write)) in buffers.iter().enumerate() {
            let more = index + 1 < buffers.len();
            let flags = u64::from(more) | u64::from(*write) << 1;
            let last = u64::from(*length) | flags << 32 | (index as u64 + 1) << 48;
            let at = self.rings + 16 * index as u64;
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(last, GuestAddress(at + 8)).unwrap();
        }
        let available = self.rings + 0x1000;
        let slot = available + 4 + 2 * u64::from(self.offered % 8);
        memory.write_obj(0u16, GuestAddress(slot)).unwrap();
        self.offered = self.offered.wrapping_add(1);
        memory
            .store(self.offered, GuestAddress(available + 2), Ordering::Release)
            .unwrap();
        self.set(0x50, 0);
    }

    /// Waits for the interrupt status, acknowledges it, and returns it.
    fn interrupt(&self) -> u32 {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.get(0x60);
            if status != 0 {
                self.set(0x64, status);
                return status;
            }
            assert!(Instant::now() < deadline, "no interrupt");
        }
    }

    fn used(&self) -> u16 {
        let at = GuestAddress(self.rings + 0x2002);
        self.machine.memory.load(at, Ordering::Acquire).unwrap()
    }
}

/// A name, a discipline, and placements of the two devices.
type Way = (String, Dispatch, Vec<(String, PlacementKind)>);

/// Every discipline, and every placement.
fn ways() -> Vec<Way> {
    let placed = [PlacementKind::Thread, PlacementKind::Pool].map(|kind| {
        let placements = ["blk0", "rng0"].map(|name| (name.to_string(), kind));
        (kind.to_string(), Dispatch::Actor, placements.to_vec())
    });
    let disciplines = Dispatch::ALL.map(|dispatch| (dispatch.to_string(), dispatch, Vec::new()));
    disciplines.into_iter().chain(placed).collect()
}

fn devices(disk: &Scratch) -> VirtioConfig {
    VirtioConfig {
        disks: vec![format!("path={},serial=s", disk.0.display()).parse().unwrap()],
        rng: true,
        notify: Notify::EventFd,
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
    for (way, dispatch, placements) in ways() {
        let disk = Scratch::new(&[3; 8192]);
        let machine = Machine::start(config(dispatch, placements, devices(&disk)));
        let (mut block, mut rng) = (Driver::new(&machine, 0), Driver::new(&machine, 1));
        assert_eq!((block.get(8), rng.get(8)), (2, 4), "{way}");
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
    for (way, dispatch, placements) in ways() {
        let disk = Scratch::new(&[9; 1 << 20]);
        let machine = Machine::start(config(dispatch, placements, devices(&disk)));
        let mut block = Driver::new(&machine, 0);
        let (header, data, status) = (0x30_0000, 0x40_0000, 0x32_0000);
        for _ in 0..100 {
            block.start();
            block_header(&machine, header, 0, 0);
            block.offer(&[(header, 16, false), (data, 1 << 20, true), (status, 1, true)]);
            // No waiting: the request is anywhere between not begun and done.
            block.set(0x70, 0);
            assert_eq!(block.get(0x70), 0, "{way}");
            assert_eq!(block.get(0x60), 0, "{way}: nothing is pending after a reset");
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
fn while_a_machine_is_paused_its_memory_stands_still_and_then_the_request_goes_on() {
    for (way, dispatch, placements) in ways() {
        let disk = Scratch::new(&[9; 1 << 20]);
        let machine = Machine::start(config(dispatch, placements, devices(&disk)));
        let mut block = Driver::new(&machine, 0);
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
        assert_eq!(block.get(0x70), 0, "{way}");
        block.start();
        block.offer(&[(header, 16, false), (data, 512, true), (status, 1, true)]);
        assert_eq!(block.interrupt(), 1, "{way}");
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
    }
}

#[test]
fn a_driver_that_breaks_its_queue_is_told_to_reset() {
    let disk = Scratch::new(&[0; 512]);
    let machine = Machine::start(config(Dispatch::Actor, Vec::new(), devices(&disk)));
    let mut rng = Driver::new(&machine, 1);
    for _ in 0..3 {
        rng.start();
        rng.offer(&[(0x30_0000, 16, false)]);
        assert_eq!(rng.interrupt(), 2, "a change of configuration");
        assert_eq!(rng.get(0x70), 0x40 | DRIVER_OK);
    }
    rng.start();
    rng.offer(&[(0x30_0000, 16, true)]);
    assert_eq!(rng.interrupt(), 1);
    assert!(matches!(machine.end(), Outcome::GuestExit(7)));
}

#[test]
fn a_placement_can_name_a_device_that_is_there_and_no_other() {
    let disk = Scratch::new(&[0; 512]);
    let placements = vec![("blk1".to_string(), PlacementKind::Thread)];
    let config = config(Dispatch::Actor, placements, devices(&disk));
    let backends: Vec<ScriptedBackend<Played>> = Vec::new();
    let log = Logger::root(slog::Discard, o!());
    let error = supervisor::run_with(&config, backends, &Unwired, &log).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("'blk1'") && text.contains("blk0, rng0"), "{text}");
    assert!(error.is_bad_input());
}
