//! What the machine actor does with a machine that runs: pause, resume, reset in place, stop. Scripted vCPUs, all other
//! parts real.

use actor_vmm::actors::PlacementKind;
use actor_vmm::boot::EntryPoint;
use actor_vmm::devices::Width;
use actor_vmm::host::console::ConsoleKind;
use actor_vmm::machine::dispatch::Dispatch;
use actor_vmm::machine::memory::{Backing, MIN_BYTES, MemoryConfig};
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::platform::NoPlatform;
use actor_vmm::machine::request::{Answer, Command, Inbox, MachineAddress};
use actor_vmm::machine::state::{Refused, State, Transition};
use actor_vmm::machine::supervisor::{self, Guest, MachineConfig, OnReset, Unwired};
use actor_vmm::vcpu::scripted::{ScriptedBackend, Source, Step};
use slog::{Discard, Logger, o};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Hang protection.
const LIMIT: Duration = Duration::from_secs(120);

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
    }
}

/// A machine on a thread of its own.
struct Machine {
    address: MachineAddress,
    thread: JoinHandle<Outcome>,
}

impl Machine {
    fn start<S: Source + 'static>(config: MachineConfig, sources: Vec<S>) -> Machine {
        let inbox = Inbox::new();
        let address = inbox.address();
        let thread = std::thread::spawn(move || {
            let backends = sources.into_iter().map(ScriptedBackend::new).collect();
            let log = Logger::root(Discard, o!());
            supervisor::run_controlled(&config, backends, &Unwired, Box::new(NoPlatform), inbox, &log)
                .unwrap()
        });
        Machine { address, thread }
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
fn four_vcpus_under_load_are_paused_and_resumed_a_thousand_times() {
    pause_and_resume(config(4), 1000);
}

#[test]
fn every_way_to_reach_devices_pauses_and_resumes() {
    for config in ways() {
        pause_and_resume(config, 100);
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
        Temporary(std::env::temp_dir().join(format!("actor-vmm-control-{}-{name}", std::process::id())))
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
