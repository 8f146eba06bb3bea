//! Machines of scripted vCPUs, all other parts real.

use actor_vmm::devices::Width;
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::platform::{NoPlatform, Platform};
use actor_vmm::machine::request::{Answer, Command, Inbox, MachineAddress};
use actor_vmm::machine::state::State;
use actor_vmm::machine::supervisor::{self, Guest, MachineConfig, Unwired};
use actor_vmm::vcpu::scripted::{ScriptedBackend, Source, Step};
use crossbeam_channel::{Receiver, Sender, bounded};
use slog::{Discard, Logger, o};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Hang protection.
pub const LIMIT: Duration = Duration::from_secs(300);

/// One machine at a time: each has vCPUs that never rest, and together they would leave nobody a processor.
pub struct Turn(&'static Receiver<()>);

impl Turn {
    pub fn wait() -> Turn {
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

pub fn config(cpus: usize) -> MachineConfig {
    MachineConfig {
        timeout: Some(LIMIT),
        ..MachineConfig::bare(Guest::none(), cpus)
    }
}

/// A machine on a thread of its own.
pub struct Machine {
    pub address: MachineAddress,
    thread: JoinHandle<Outcome>,
    _turn: Turn,
}

impl Machine {
    pub fn start<S: Source + 'static>(config: MachineConfig, sources: Vec<S>) -> Machine {
        Machine::start_on(config, sources, NoPlatform)
    }

    pub fn start_on<S: Source + 'static>(
        config: MachineConfig,
        sources: Vec<S>,
        platform: impl Platform + 'static,
    ) -> Machine {
        let turn = Turn::wait();
        let inbox = Inbox::new();
        let address = inbox.address();
        let thread = std::thread::spawn(move || {
            let backends = sources.into_iter().map(ScriptedBackend::new).collect();
            let log = Logger::root(Discard, o!());
            supervisor::run_controlled(&config, backends, &Unwired, Box::new(platform), inbox, &log).unwrap()
        });
        Machine {
            address,
            thread,
            _turn: turn,
        }
    }

    #[track_caller]
    pub fn done(&self, command: Command, state: State) {
        assert_eq!(self.address.ask(command), Answer::Done(state), "{command:?}");
    }

    pub fn end(self) -> Outcome {
        self.thread.join().unwrap()
    }
}

/// Reads and writes registers of several devices for ever, and checks every answer: the scratch register of the serial
/// port, a byte of CMOS memory, the address register of PCI's mechanism #1.
pub struct Load {
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
    pub fn new(vcpu: u32, count: &Arc<AtomicU64>, wrong: &Arc<AtomicU64>) -> Load {
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

#[track_caller]
pub fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < LIMIT, "{what}");
        std::thread::yield_now();
    }
}

pub struct Temporary(pub PathBuf);

impl Temporary {
    pub fn new(name: &str) -> Temporary {
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
