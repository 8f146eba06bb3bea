//! What the machine actor does with a machine that runs: pause, resume, reset in place, stop. Scripted vCPUs, all other
//! parts real.

#[path = "control/common.rs"]
mod common;
#[path = "control/ends.rs"]
mod ends;
#[path = "control/holds.rs"]
mod holds;
#[path = "control/start.rs"]
mod start;
#[path = "control/stuck.rs"]
mod stuck;

use actor_vmm::actors::PlacementKind;
use actor_vmm::boot::EntryPoint;
use actor_vmm::devices::Width;
use actor_vmm::host::bus::MemoryWatch;
use actor_vmm::host::console::ConsoleKind;
use actor_vmm::machine::dispatch::Dispatch;
use actor_vmm::machine::memory::MIN_BYTES;
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::platform::Platform;
use actor_vmm::machine::request::{Answer, Command, Inbox};
use actor_vmm::machine::state::{Refused, State, Transition};
use actor_vmm::machine::supervisor::{self, MachineConfig, OnReset, StartError, Unwired};
use actor_vmm::vcpu::scripted::{ScriptedBackend, Source, Step};
use common::{Load, Machine, Temporary, config, wait_until};
use slog::{Discard, Logger, o};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

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
    fn freeze(&mut self) -> Instant {
        Instant::now()
    }
    fn thaw(&mut self, _: Duration) -> Instant {
        Instant::now()
    }
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
