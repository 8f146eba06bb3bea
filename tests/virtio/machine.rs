//! A machine that is played, one access at a time.

use actor_vmm::actors::PlacementKind;
use actor_vmm::devices::Width;
use actor_vmm::machine::dispatch::Dispatch;
use actor_vmm::machine::memory::{Backing, MemoryConfig, create};
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::platform::NoPlatform;
use actor_vmm::machine::request::{Inbox, MachineAddress};
use actor_vmm::machine::supervisor::{self, Guest, MachineConfig, StartError, Unwired, Virtio};
use actor_vmm::vcpu::scripted::{ScriptedBackend, Source, Step};
use actor_vmm::virtio::config::VirtioConfig;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use slog::{Logger, o};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// Hang protection.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A file that is gone with the value.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(content: &[u8]) -> Scratch {
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
pub struct Played {
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
pub struct Machine {
    steps: Sender<Step>,
    seen: Receiver<u64>,
    pub memory: GuestMemoryMmap,
    pub address: MachineAddress,
    thread: JoinHandle<Result<Outcome, StartError>>,
}

pub fn config(
    dispatch: Dispatch,
    placements: Vec<(String, PlacementKind)>,
    virtio: VirtioConfig,
) -> MachineConfig {
    let bare = MachineConfig::bare(Guest::none(), 1);
    MachineConfig {
        memory: MemoryConfig {
            backing: Backing::Anonymous,
            ..bare.memory
        },
        dispatch,
        placements,
        virtio,
        timeout: Some(LIMIT),
        ..bare
    }
}

impl Machine {
    pub fn start(config: MachineConfig) -> Machine {
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

    pub fn read(&self, address: u64, length: u8) -> u32 {
        let step = Step::Read {
            address,
            length,
            expect: None,
        };
        self.steps.send(step).unwrap();
        self.seen.recv_timeout(LIMIT).unwrap() as u32
    }

    pub fn write(&self, address: u64, length: u8, value: u32) {
        let step = Step::Write {
            address,
            length,
            value: value.into(),
        };
        self.steps.send(step).unwrap();
    }

    pub fn port_in(&self, port: u16) -> u32 {
        let step = Step::In {
            port,
            width: Width::Dword,
            count: 1,
            expect: None,
        };
        self.steps.send(step).unwrap();
        self.seen.recv_timeout(LIMIT).unwrap() as u32
    }

    pub fn port_out(&self, port: u16, value: u32) {
        let step = Step::Out {
            port,
            width: Width::Dword,
            values: vec![value],
        };
        self.steps.send(step).unwrap();
    }

    pub fn end(self) -> Outcome {
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
