//! Pause, resume and reset in place with real vCPUs: bare-metal guests on this host's KVM, whose own checks say whether
//! they noticed anything.
//!
//! A host without `/dev/kvm` skips all of it and says so; under CI that is a failure. Limits of time are against hangs
//! only.
//!
//! `ACTOR_VMM_PAUSES=10000` pauses so often instead of 500 times.

#[path = "host/kvm.rs"]
mod kvm;

use actor_vmm::guests::cases;
use actor_vmm::host::console::ConsoleKind;
use actor_vmm::machine::memory::Backing;
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::request::{Answer, Command, Inbox, MachineAddress};
use actor_vmm::machine::state::State;
use actor_vmm::machine::supervisor::{self, MachineConfig};
use kvm::have_kvm;
use slog::{Discard, Logger, o};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Hang protection.
const LIMIT: Duration = Duration::from_secs(600);

/// A machine on a thread of its own, with its console in a file.
struct Machine {
    address: MachineAddress,
    thread: JoinHandle<Outcome>,
    console: PathBuf,
}

impl Machine {
    fn start(name: &str, guest: &str, cpus: usize, change: impl FnOnce(&mut MachineConfig)) -> Machine {
        let console = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("kvm-control-{name}.txt"));
        let mut config = MachineConfig {
            console: ConsoleKind::File(console.clone()),
            timeout: Some(LIMIT),
            ..MachineConfig::bare(cases::by_name(guest).unwrap(), cpus)
        };
        change(&mut config);
        // What an earlier run left must not be taken for this one's.
        let _ = std::fs::remove_file(&console);
        let inbox = Inbox::new();
        let address = inbox.address();
        let thread = std::thread::spawn(move || {
            supervisor::run_kvm(&config, inbox, &Logger::root(Discard, o!())).unwrap()
        });
        Machine {
            address,
            thread,
            console,
        }
    }

    #[track_caller]
    fn done(&self, command: Command, state: State) {
        assert_eq!(
            self.address.ask(command),
            Answer::Done(state),
            "{command:?}; console: {}",
            self.said()
        );
    }

    fn said(&self) -> String {
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the guest has said `text` so many times.
    #[track_caller]
    fn wait_for(&self, text: &str, times: usize) {
        let begin = Instant::now();
        loop {
            let said = self.said();
            if said.matches(text).count() >= times {
                return;
            }
            assert!(
                begin.elapsed() < LIMIT && !self.thread.is_finished(),
                "no {times} times {text:?} in {said:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    fn stop(self) {
        self.done(Command::Stop, State::Stopping);
        let outcome = self.thread.join().unwrap();
        assert!(matches!(outcome, Outcome::Stopped), "{outcome:?}");
    }
}

#[test]
fn four_processors_under_io_notice_no_pause() {
    if !have_kvm() {
        return;
    }
    let machine = Machine::start("pause", "churn", 4, |_| {});
    machine.wait_for("up\n", 1);
    let pauses = std::env::var("ACTOR_VMM_PAUSES").map_or(500, |text| text.parse().unwrap());
    for _ in 0..pauses {
        machine.done(Command::Pause, State::Paused);
        machine.done(Command::Resume, State::Running);
    }
    let dots = machine.said().matches('.').count();
    machine.wait_for(".", dots + 2);
    machine.stop();
}

#[test]
fn four_processors_are_reset_in_place_a_hundred_times() {
    if !have_kvm() {
        return;
    }
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let machine = Machine::start(&format!("reset-{backing:?}"), "churn", 4, |config| {
            config.memory.backing = backing;
        });
        for boot in 1..=50 {
            machine.wait_for("up\n", boot);
            if boot % 5 == 0 {
                machine.done(Command::Pause, State::Paused);
                machine.done(Command::Reset, State::Paused);
                machine.done(Command::Resume, State::Running);
            } else {
                machine.done(Command::Reset, State::Running);
            }
        }
        machine.wait_for("up\n", 51);
        machine.stop();
    }
}
