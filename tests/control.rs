//! What the machine actor does with a machine that runs: pause, resume, reset in place, stop. Scripted vCPUs, all other
//! parts real.

#[path = "control/holds.rs"]
mod holds;

use actor_vmm::actors::PlacementKind;
use actor_vmm::boot::EntryPoint;
use actor_vmm::control::client::Connection;
use actor_vmm::control::verbs::{self, Verb};
use actor_vmm::devices::Width;
use actor_vmm::devices::tarpit::{Mire, RELEASED};
use actor_vmm::host::bus::MemoryWatch;
use actor_vmm::host::console::ConsoleKind;
use actor_vmm::machine::dispatch::Dispatch;
use actor_vmm::machine::memory::{Backing, MIN_BYTES, MemoryConfig};
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::platform::{NoPlatform, Platform};
use actor_vmm::machine::request::{Answer, Command, Inbox, MachineAddress};
use actor_vmm::machine::state::{Refused, State, Transition};
use actor_vmm::machine::supervisor::{self, Guest, MachineConfig, OnReset, StartError, Unwired};
use actor_vmm::vcpu::scripted::{ScriptedBackend, Source, Step};
use crossbeam_channel::{Receiver, Sender, bounded};
use slog::{Discard, Logger, o};
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Hang protection.
const LIMIT: Duration = Duration::from_secs(300);

/// One machine at a time: each has vCPUs that never rest, and together they would leave nobody a processor.
struct Turn(&'static Receiver<()>);

impl Turn {
    fn wait() -> Turn {
        static TAKEN: OnceLock<(Sender<()>, Receiver<()>)> = OnceLock::new();
        let (take, give_back) = TAKEN.get_or_init(|| bounded(1));
        take.send(()).unwrap();
        Turn(give_back)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let _ = self.0.try_recv();
    }
}

fn config(cpus: usize) -> MachineConfig {
    MachineConfig {
        // Scripted vCPUs bring what they run.
        guest: Guest::Image {
            bytes: &[],
            at: 0,
            entry: EntryPoint::Flat32 { eip: 0 },
        },
        cpus,
        memory: MemoryConfig {
            size_bytes: MIN_BYTES,
            backing: Backing::Memfd,
        },
        dispatch: Dispatch::Actor,
        placements: Vec::new(),
        console: ConsoleKind::Off,
        debug_console: ConsoleKind::Off,
        delay: None,
        virtio: Default::default(),
        timeout: Some(LIMIT),
        gdb: None,
        on_reset: OnReset::Exit,
        control: None,
        tarpit: None,
    }
}

/// A machine on a thread of its own.
struct Machine {
    address: MachineAddress,
    thread: JoinHandle<Outcome>,
    _turn: Turn,
}

impl Machine {
    fn start<S: Source + 'static>(config: MachineConfig, sources: Vec<S>) -> Machine {
        let turn = Turn::wait();
        let inbox = Inbox::new();
        let address = inbox.address();
        let thread = std::thread::spawn(move || {
            let backends = sources.into_iter().map(ScriptedBackend::new).collect();
            let log = Logger::root(Discard, o!());
            supervisor::run_controlled(&config, backends, &Unwired, Box::new(NoPlatform), inbox, &log)
                .unwrap()
        });
        Machine {
            address,
            thread,
            _turn: turn,
        }
    }

    #[track_caller]
    fn done(&self, command: Command, state: State) {
        assert_eq!(self.address.ask(command), Answer::Done(state), "{command:?}");
    }

    fn end(self) -> Outcome {
        self.thread.join().unwrap()
    }
}

/// Reads and writes registers of several devices for ever, and checks every answer: the scratch register of the serial
/// port, a byte of CMOS memory, the address register of PCI's mechanism #1.
struct Load {
    /// Which of four vCPUs: each has registers of its own.
    vcpu: u32,
    /// Accesses so far.
    count: Arc<AtomicU64>,
    /// Answers that were not what was written.
    wrong: Arc<AtomicU64>,
    at: u32,
    expected: u64,
}

impl Load {
    fn new(vcpu: u32, count: &Arc<AtomicU64>, wrong: &Arc<AtomicU64>) -> Load {
        Load {
            vcpu,
            count: count.clone(),
            wrong: wrong.clone(),
            at: 0,
            expected: 0,
        }
    }
}

impl Source for Load {
    fn next(&mut self) -> Option<Step> {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.at += 1;
        let value = self.at >> 1;
        let write = self.at & 1 == 0;
        let (port, width, value) = match self.vcpu {
            0 => (0x3ff, Width::Byte, value & 0xff),
            // Bits 31, 23 to 2: what the register keeps [PCI 3.0 §3.2.2.3.2].
            1 => (0xcf8, Width::Dword, value & 0x3f << 2),
            // Interrupt enables, of which the port has four.
            2 => (0x3f9, Width::Byte, value & 0xf),
            // Nobody is there.
            _ => (0x1f0, Width::Word, 0xffff),
        };
        if write {
            self.expected = value.into();
            Some(Step::Out {
                port,
                width,
                values: vec![value],
            })
        } else {
            Some(Step::In {
                port,
                width,
                count: 1,
                expect: None,
            })
        }
    }

    fn seen(&mut self, _: &Step, value: u64) {
        if self.at > 2 && value != self.expected {
            self.wrong.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn reset(&mut self) {
        self.at = 0;
    }
}

/// Every way to reach devices.
fn ways() -> Vec<MachineConfig> {
    let placed =
        [PlacementKind::Handoff, PlacementKind::Thread, PlacementKind::Pool].map(|kind| MachineConfig {
            placements: vec![("serial0".into(), kind), ("pci_config".into(), kind)],
            ..config(4)
        });
    let baselines = Dispatch::ALL.into_iter().skip(1);
    let baselines = baselines.map(|dispatch| MachineConfig {
        dispatch,
        ..config(4)
    });
    placed.into_iter().chain(baselines).collect()
}

fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < LIMIT, "{what}");
        std::thread::yield_now();
    }
}

fn pause_and_resume(config: MachineConfig, times: u32) {
    let (count, wrong) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let sources = (0..4).map(|vcpu| Load::new(vcpu, &count, &wrong)).collect();
    let machine = Machine::start(config, sources);
    wait_until("it does not start", || count.load(Ordering::Relaxed) > 0);
    for _ in 0..times {
        machine.done(Command::Pause, State::Paused);
        let stands = count.load(Ordering::Relaxed);
        std::thread::yield_now();
        assert_eq!(
            count.load(Ordering::Relaxed),
            stands,
            "it runs while it is paused"
        );
        machine.done(Command::Resume, State::Running);
        wait_until("it does not go on", || count.load(Ordering::Relaxed) > stands);
    }
    machine.done(Command::Stop, State::Stopping);
    assert!(matches!(machine.end(), Outcome::Stopped));
    assert_eq!(wrong.load(Ordering::Relaxed), 0, "answers that are not right");
}

#[test]
fn four_vcpus_under_load_are_paused_and_resumed_many_times() {
    pause_and_resume(config(4), 200);
}

#[test]
fn every_way_to_reach_devices_pauses_and_resumes() {
    for config in ways() {
        pause_and_resume(config, 10);
    }
}

/// Boots, says so, and resets itself; powers off at the last boot.
struct Reboots {
    boots: Arc<AtomicU32>,
    last: u32,
    at: usize,
}

impl Source for Reboots {
    fn next(&mut self) -> Option<Step> {
        let out = |port, value| {
            Some(Step::Out {
                port,
                width: Width::Byte,
                values: vec![value],
            })
        };
        self.at += 1;
        match self.at {
            1 => {
                let boot = self.boots.fetch_add(1, Ordering::Relaxed);
                out(0x3f8, u32::from(b'a') + boot % 26)
            }
            // The scratch register is as after power-on.
            2 => Some(Step::In {
                port: 0x3ff,
                width: Width::Byte,
                count: 1,
                expect: None,
            }),
            3 => out(0x3ff, 0x5a),
            4 if self.boots.load(Ordering::Relaxed) == self.last => Some(Step::Out {
                port: 0x604,
                width: Width::Word,
                values: vec![0x3400],
            }),
            // Again and again, as a guest does that is not believed: one reset all the same.
            _ => out(0x60c, 1),
        }
    }

    fn seen(&mut self, _: &Step, value: u64) {
        assert_eq!(value, 0, "a register has survived the reset");
    }

    fn reset(&mut self) {
        self.at = 0;
    }
}

struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str) -> Temporary {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Temporary(std::env::temp_dir().join(format!("actor-vmm-control-{process}-{number}-{name}")))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_guest_reboots_a_hundred_times_in_place() {
    let file = Temporary::new("reboots");
    let boots = Arc::new(AtomicU32::new(0));
    let source = Reboots {
        boots: boots.clone(),
        last: 101,
        at: 0,
    };
    let config = MachineConfig {
        gdb: None,
        on_reset: OnReset::Reset,
        console: ConsoleKind::File(file.0.clone()),
        ..config(1)
    };
    let outcome = Machine::start(config, vec![source]).end();
    assert!(matches!(outcome, Outcome::PoweredOff), "{outcome:?}");
    assert_eq!(boots.load(Ordering::Relaxed), 101);
    let said = std::fs::read(&file.0).unwrap();
    let expected: Vec<u8> = (0..101).map(|boot| b'a' + boot % 26).collect();
    assert_eq!(String::from_utf8(said), String::from_utf8(expected));
}

#[test]
fn a_reset_by_the_guest_ends_the_machine_unless_told_otherwise() {
    let source = Reboots {
        boots: Arc::default(),
        last: 101,
        at: 0,
    };
    let outcome = Machine::start(config(1), vec![source]).end();
    assert!(matches!(outcome, Outcome::Reset), "{outcome:?}");
}

/// Counts its boots and halts.
struct Boots(Arc<AtomicU32>, bool);

impl Source for Boots {
    fn next(&mut self) -> Option<Step> {
        if !std::mem::replace(&mut self.1, true) {
            self.0.fetch_add(1, Ordering::Relaxed);
            return Some(Step::In {
                port: 0x3fd,
                width: Width::Byte,
                count: 1,
                expect: None,
            });
        }
        None
    }

    fn seen(&mut self, _: &Step, _: u64) {}

    fn reset(&mut self) {
        self.1 = false;
    }
}

#[test]
fn a_reset_from_outside_keeps_a_paused_machine_paused() {
    for config in ways() {
        let boots = Arc::new(AtomicU32::new(0));
        let vcpus = (0..4).map(|_| Boots(boots.clone(), false)).collect();
        let machine = Machine::start(config, vcpus);
        wait_until("it does not start", || boots.load(Ordering::Relaxed) == 4);
        machine.done(Command::Pause, State::Paused);
        for _ in 0..3 {
            machine.done(Command::Reset, State::Paused);
        }
        assert_eq!(boots.load(Ordering::Relaxed), 4, "it runs while it is paused");
        machine.done(Command::Resume, State::Running);
        wait_until("it does not boot again", || boots.load(Ordering::Relaxed) == 8);
        machine.done(Command::Reset, State::Running);
        wait_until("it does not boot again", || boots.load(Ordering::Relaxed) == 12);
        machine.done(Command::Stop, State::Stopping);
        assert!(matches!(machine.end(), Outcome::Stopped));
    }
}

#[test]
fn what_the_state_does_not_allow_is_refused_by_name() {
    let boots = Arc::new(AtomicU32::new(0));
    let machine = Machine::start(config(1), vec![Boots(boots.clone(), false)]);
    wait_until("it does not start", || boots.load(Ordering::Relaxed) == 1);
    assert_eq!(
        machine.address.ask(Command::Resume),
        Answer::Refused(Refused(State::Running, Transition::Resume))
    );
    machine.done(Command::Pause, State::Paused);
    assert_eq!(
        machine.address.ask(Command::Pause),
        Answer::Refused(Refused(State::Paused, Transition::Pause))
    );
    let address = machine.address.clone();
    // Stop in this state, too.
    machine.done(Command::Stop, State::Stopping);
    assert!(matches!(machine.end(), Outcome::Stopped));
    assert_eq!(address.ask(Command::Pause), Answer::Gone);
}

/// Reads the tarpit once, and then halts; or, without a turn at it, works.
enum Mixed {
    Stuck {
        began: Arc<AtomicU64>,
        done: bool,
        released: Arc<AtomicU64>,
    },
    Works(Load),
}

impl Source for Mixed {
    fn next(&mut self) -> Option<Step> {
        match self {
            Mixed::Stuck { began, done, .. } => {
                if std::mem::replace(done, true) {
                    return None;
                }
                began.fetch_add(1, Ordering::Relaxed);
                Some(Step::In {
                    port: 0xf6,
                    width: Width::Byte,
                    count: 1,
                    expect: None,
                })
            }
            Mixed::Works(load) => load.next(),
        }
    }

    fn seen(&mut self, step: &Step, value: u64) {
        match self {
            Mixed::Stuck { released, .. } => {
                assert_eq!(value, u64::from(RELEASED));
                released.fetch_add(1, Ordering::Relaxed);
            }
            Mixed::Works(load) => load.seen(step, value),
        }
    }
}

/// A machine of which two vCPUs are stuck in the tarpit and two work.
struct Mired {
    machine: Machine,
    socket: Temporary,
    count: Arc<AtomicU64>,
    wrong: Arc<AtomicU64>,
    released: Arc<AtomicU64>,
    release: Option<crossbeam_channel::Sender<()>>,
}

impl Mired {
    fn start(kind: PlacementKind) -> Mired {
        let socket = Temporary::new(&format!("mired-{kind}"));
        let (release, mire) = Mire::new();
        let config = MachineConfig {
            placements: vec![("tarpit".into(), kind)],
            control: Some(socket.0.clone()),
            tarpit: Some(mire),
            ..config(4)
        };
        let (count, wrong) = (Arc::default(), Arc::default());
        let (began, released) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let stuck = || Mixed::Stuck {
            began: began.clone(),
            done: false,
            released: released.clone(),
        };
        let works = |vcpu| Mixed::Works(Load::new(vcpu, &count, &wrong));
        let machine = Machine::start(config, vec![stuck(), works(1), stuck(), works(3)]);
        wait_until("it does not get stuck", || began.load(Ordering::Relaxed) == 2);
        Mired {
            machine,
            socket,
            count,
            wrong,
            released,
            release: Some(release),
        }
    }

    fn goes_on(&self) {
        let now = self.count.load(Ordering::Relaxed);
        wait_until("the others do not go on", || {
            self.count.load(Ordering::Relaxed) > now + 100
        });
    }

    fn stands(&self) {
        let now = self.count.load(Ordering::Relaxed);
        for _ in 0..100 {
            std::thread::yield_now();
        }
        assert_eq!(
            self.count.load(Ordering::Relaxed),
            now,
            "the others do not stand still"
        );
    }

    fn why(&self) -> serde_json::Value {
        Connection::open(&self.socket.0)
            .unwrap()
            .ask(Verb::Why, &verbs::from_words(&["why"]).unwrap().1)
            .unwrap()
    }
}

const PLACEMENTS: [PlacementKind; 3] = [PlacementKind::Handoff, PlacementKind::Thread, PlacementKind::Pool];

#[test]
fn a_device_that_never_answers_is_named_by_why_and_holds_up_nobody_else() {
    for kind in PLACEMENTS {
        let mired = Mired::start(kind);
        mired.goes_on();
        // Both are known to have begun, not yet to have got there.
        let mut why = mired.why();
        wait_until("why does not name it", || {
            why = mired.why();
            let sleeps = |wait: &serde_json::Value| wait["on"] == "tarpit" && wait["asleep"] == true;
            let waits = why["waits"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|wait| sleeps(wait))
                .count();
            let turn = why["turns"]
                .as_array()
                .unwrap()
                .iter()
                .any(|turn| turn["device"] == "tarpit");
            turn && waits == if kind == PlacementKind::Handoff { 1 } else { 2 }
        });
        let turns = why["turns"].as_array().unwrap();
        let turn = turns.iter().find(|turn| turn["device"] == "tarpit").unwrap();
        let holder = turn["holder"].as_str().unwrap();
        match kind {
            PlacementKind::Handoff => {
                assert!(holder == "vcpu0" || holder == "vcpu2", "{why:#}");
                assert_eq!(turn["message"], "in 0xf6/1", "{why:#}");
            }
            PlacementKind::Thread => assert_eq!(holder, "its own thread"),
            PlacementKind::Pool => assert_eq!(holder, "a thread of the pool"),
        }
        for wait in why["waits"].as_array().unwrap() {
            if wait["on"] == "tarpit" {
                assert_eq!(wait["message"], "in 0xf6/1", "{why:#}");
                assert_ne!(wait["who"], holder, "{why:#}");
            }
        }
        // The time is that of the wait: a while later it is longer by that while.
        let age = |why: &serde_json::Value| {
            let waits = why["waits"].as_array().unwrap();
            let wait = waits.iter().find(|wait| wait["on"] == "tarpit").unwrap();
            wait["ms"].as_u64().unwrap()
        };
        let (begin, before) = (Instant::now(), age(&why));
        while begin.elapsed() < Duration::from_millis(200) {
            std::thread::yield_now();
        }
        let later = age(&mired.why());
        assert!(later >= before + 150, "{before} ms, then {later} ms");
        // Soon, as often as not: the host may be busy.
        let fastest = (0..10).map(|_| {
            let begin = Instant::now();
            mired.why();
            begin.elapsed()
        });
        let fastest = fastest.min().unwrap();
        assert!(fastest < Duration::from_millis(100), "{fastest:?}");

        let begin = Instant::now();
        mired.machine.done(Command::Stop, State::Stopping);
        assert!(matches!(mired.machine.end(), Outcome::Stopped));
        assert!(begin.elapsed() < LIMIT / 10, "{:?}", begin.elapsed());
        assert_eq!(mired.wrong.load(Ordering::Relaxed), 0);
        assert!(!mired.socket.0.exists(), "the socket is left behind");
        drop(mired.release);
    }
}

#[test]
fn a_pause_with_a_stuck_device_says_whom_it_waits_for_and_stops_the_others() {
    for kind in PLACEMENTS {
        let mut mired = Mired::start(kind);
        mired.goes_on();
        let Answer::Waits(State::Pausing, whom) = mired.machine.address.ask(Command::Pause) else {
            panic!("{kind}: it is paused")
        };
        assert!(whom.contains(&"vcpu0 to pause".to_string()), "{whom:?}");
        assert!(!whom.iter().any(|who| who.starts_with("vcpu1")), "{whom:?}");
        mired.stands();
        let why = mired.why();
        assert_eq!(why["state"], "pausing");
        let machine_waits = |on: &str| {
            let waits = why["waits"].as_array().unwrap().iter();
            waits
                .clone()
                .any(|wait| wait["who"] == "machine" && wait["on"] == on)
        };
        assert!(machine_waits("vcpu0") && !machine_waits("vcpu1"), "{why:#}");
        // A reset is refused meanwhile; resuming takes the pause back.
        assert!(matches!(
            mired.machine.address.ask(Command::Reset),
            Answer::Refused(Refused(State::Pausing, Transition::Reset))
        ));
        mired.machine.done(Command::Resume, State::Running);
        mired.goes_on();
        // A reset is given up, and the machine goes on.
        assert!(matches!(
            mired.machine.address.ask(Command::Reset),
            Answer::Waits(State::Running, _)
        ));
        mired.goes_on();
        // Once it is loose everything works.
        mired.release = None;
        wait_until("it is not loose", || mired.released.load(Ordering::Relaxed) == 2);
        mired.machine.done(Command::Pause, State::Paused);
        mired.stands();
        mired.machine.done(Command::Resume, State::Running);
        mired.machine.done(Command::Stop, State::Stopping);
        assert!(matches!(mired.machine.end(), Outcome::Stopped));
    }
}

#[test]
fn a_machine_that_waits_for_a_pause_can_be_stopped() {
    let mired = Mired::start(PlacementKind::Handoff);
    let address = mired.machine.address.clone();
    let asker = std::thread::spawn(move || address.ask(Command::Pause));
    wait_until("it is not pausing", || mired.why()["state"] == "pausing");
    mired.machine.done(Command::Stop, State::Stopping);
    let answer = asker.join().unwrap();
    assert!(
        matches!(answer, Answer::Overtaken(_) | Answer::Waits(..)),
        "{answer:?}"
    );
    assert!(matches!(mired.machine.end(), Outcome::Stopped));
    drop(mired.release);
}

/// Touches guest memory that the host has just taken away, on the vCPU's own thread.
struct Touches {
    memory: GuestMemoryMmap,
    file: File,
}

impl Source for Touches {
    fn next(&mut self) -> Option<Step> {
        self.file.set_len(0x1000).unwrap();
        let value: u8 = self.memory.read_obj(GuestAddress(0x5008)).unwrap();
        panic!("memory that is not there reads {value}");
    }

    fn seen(&mut self, _: &Step, _: u64) {}
}

struct WithMemory(Arc<MemoryWatch>);

impl Platform for WithMemory {
    fn freeze(&mut self) {}
    fn thaw(&mut self, _: Duration) {}
    fn reset(&mut self) -> Result<Option<EntryPoint>, StartError> {
        Ok(None)
    }
    fn memory(&self) -> Option<Arc<MemoryWatch>> {
        Some(self.0.clone())
    }
}

#[test]
fn memory_that_the_host_takes_away_is_an_internal_error_with_its_address() {
    let place = Temporary::new("memory");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&place.0)
        .unwrap();
    file.set_len(MIN_BYTES).unwrap();
    let backing = FileOffset::new(file.try_clone().unwrap(), 0);
    let memory =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MIN_BYTES as usize, Some(backing))])
            .unwrap();
    let platform = WithMemory(Arc::new(MemoryWatch::new(&memory).unwrap()));
    let backends = vec![ScriptedBackend::new(Touches { memory, file })];
    let log = Logger::root(Discard, o!());
    let outcome = supervisor::run_controlled(
        &config(1),
        backends,
        &Unwired,
        Box::new(platform),
        Inbox::new(),
        &log,
    );
    let outcome = outcome.unwrap();
    assert!(matches!(outcome, Outcome::MemoryGone(0x5008)), "{outcome:?}");
    assert_eq!(outcome.status(), 14);
    assert!(
        outcome.to_string().contains("guest physical address 0x5008"),
        "{outcome}"
    );
}
