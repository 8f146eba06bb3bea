//! The guests of simulated machines, devices that tell on them, and the ledger of what happened.

use super::super::platform::Platform;
use super::super::supervisor::StartError;
use super::{VCPUS, tell};
use crate::boot::EntryPoint;
use crate::boot::layout::io;
use crate::devices::{Access, Context, Device, Width};
use crate::simulation::{self, draw, point};
use crate::vcpu::scripted::{Source, Step};
use crossbeam_channel::Sender;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Where the counter is.
pub(super) const COUNTER: u16 = 0x5000;
/// What kills the counter.
pub(super) const DEADLY: u32 = 0xdead;

/// A device that counts its reads, from 1. Both vCPUs use it, and another thread may run in the middle of its turn.
pub(super) struct Counter {
    pub(super) count: u64,
    pub(super) ledger: Arc<Ledger>,
}

impl Device for Counter {
    fn name(&self) -> &'static str {
        "counter"
    }

    fn read(&mut self, _: &mut dyn Context, _: Access) -> u64 {
        self.ledger.moved();
        let before = self.count;
        point();
        self.count = before + 1;
        self.count
    }

    fn write(&mut self, _: &mut dyn Context, _: Access, value: u64) {
        self.ledger.moved();
        if value == u64::from(DEADLY) {
            self.ledger.dead.store(true, Relaxed);
            std::panic::resume_unwind(Box::new("told to"));
        }
    }

    fn reset(&mut self, _: &mut dyn Context) {
        self.ledger.resets.fetch_add(1, Relaxed);
        self.count = 0;
    }
}

/// Where the mud is.
pub(super) const MUD: u16 = 0x5010;

/// A device whose reads end when somebody lets them.
pub(super) struct Mud(pub(super) Arc<Ledger>);

impl Device for Mud {
    fn name(&self) -> &'static str {
        "mud"
    }

    fn read(&mut self, _: &mut dyn Context, _: Access) -> u64 {
        simulation::waited(|| self.0.loose.load(Relaxed));
        self.0.moved();
        0
    }

    fn write(&mut self, _: &mut dyn Context, _: Access, _: u64) {}

    fn reset(&mut self, _: &mut dyn Context) {}
}

/// Guest time, as the hypervisor has it.
pub(super) struct Time(pub(super) Arc<Ledger>);

impl Platform for Time {
    fn freeze(&mut self) -> Instant {
        tell(|| "guest time stands".into());
        if self.0.frozen.swap(true, Relaxed) {
            self.0.wrong("guest time was stopped twice".into());
        }
        Instant::now()
    }

    fn thaw(&mut self, _: Duration) -> Instant {
        tell(|| "guest time goes on".into());
        self.0.times.fetch_add(1, Relaxed);
        if !self.0.frozen.swap(false, Relaxed) {
            self.0.wrong("guest time was let go that did not stand".into());
        }
        Instant::now()
    }

    fn reset(&mut self) -> Result<Option<EntryPoint>, StartError> {
        point();
        Ok(None)
    }
}

/// What happened, for whoever checks it. Only who has its turn touches it.
pub(super) struct Ledger {
    /// Whatever a guest or a device did.
    pub(super) moves: AtomicU64,
    /// Reads that each vCPU has begun, and those that its guest has seen the end of.
    pub(super) begun: [AtomicU64; VCPUS],
    pub(super) seen: [AtomicU64; VCPUS],
    /// What the counter said, and in which life of the guest.
    pub(super) counts: Sender<(u32, u64)>,
    /// How often guest time was set, and which of these times the boot processor knows.
    pub(super) times: AtomicU64,
    pub(super) known: AtomicU64,
    /// Guest time stands.
    pub(super) frozen: AtomicBool,
    /// Who was stuck is not any more.
    pub(super) loose: AtomicBool,
    /// How often the counter was reset, and whether it is dead.
    pub(super) resets: AtomicU64,
    pub(super) dead: AtomicBool,
    /// Which guests have come to their ends, and halt.
    pub(super) over: [AtomicBool; VCPUS],
    /// What must not have happened.
    pub(super) wrong: Sender<String>,
}

impl Ledger {
    pub(super) fn moved(&self) {
        self.moves.fetch_add(1, Relaxed);
    }

    /// A vCPU runs the guest. KVM writes the boot processor's clock when that comes in; all others read it.
    fn entered(&self, vcpu: usize) {
        let time = self.times.load(Relaxed);
        if self.frozen.load(Relaxed) {
            self.wrong(format!("vcpu{vcpu} runs while guest time stands"));
        }
        if vcpu == 0 {
            self.known.store(time, Relaxed);
        } else if self.known.load(Relaxed) != time {
            self.wrong(format!(
                "vcpu{vcpu} runs, and the boot processor's clock is wrong"
            ));
        }
    }

    /// A vCPU, which does not run, was told what time it is.
    fn took_time(&self, vcpu: usize) {
        let time = self.times.load(Relaxed);
        let before = self.known.swap(time, Relaxed);
        if vcpu != 0 || before == time || self.frozen.load(Relaxed) {
            self.wrong(format!("vcpu{vcpu} was told the time {time}, and knew {before}"));
        }
    }

    pub(super) fn wrong(&self, what: String) {
        let _ = self.wrong.send(what);
    }
}

/// What befalls a machine, beside what is asked of it from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    Nothing,
    GuestResets,
    GuestExits,
    DevicePanics,
    VcpuPanics,
    /// A vCPU's access does not end until somebody lets it go.
    Stuck,
    /// The boot processor does not take the time until somebody lets it go.
    LateTime,
}

impl Fate {
    /// The machine ends by itself.
    pub(super) fn ends(self) -> bool {
        matches!(self, Fate::GuestExits | Fate::VcpuPanics)
    }
}

/// A guest's processor: each round reads the counter, writes and reads a register that is its own, and posts a byte.
pub(super) struct Guest {
    pub(super) vcpu: usize,
    pub(super) rounds: u32,
    pub(super) fate: Option<(u32, Fate)>,
    /// It takes its time to take the time.
    pub(super) late: bool,
    pub(super) life: u32,
    pub(super) round: u32,
    pub(super) steps: VecDeque<Step>,
    pub(super) ledger: Arc<Ledger>,
}

impl Guest {
    /// The register of its own, its width, and what it holds in a round.
    fn own(&self, round: u32) -> (u16, Width, u32) {
        match self.vcpu {
            0 => (io::SERIAL0 + 7, Width::Byte, (round * 7 + 1) & 0xff),
            _ => (io::PCI_CONFIG, Width::Dword, 0x8000_0000 | ((round + 1) << 8)),
        }
    }

    fn plan_round(&mut self) {
        let (port, width, value) = self.own(self.round);
        let read = |port, width, expect| Step::In {
            port,
            width,
            count: 1,
            expect,
        };
        let write = |port, width, value| Step::Out {
            port,
            width,
            values: vec![value],
        };
        if self.round == 0 {
            // As after power-on, in every life.
            self.steps.push_back(read(port, width, Some(0)));
        }
        self.steps.push_back(read(COUNTER, Width::Dword, None));
        self.steps.push_back(write(port, width, value));
        self.steps.push_back(read(port, width, Some(value)));
        let byte = ((self.vcpu as u32) << 7) | self.round;
        self.steps.push_back(write(io::DEBUG_CONSOLE, Width::Byte, byte));
        // Once, in the first life.
        match self.fate.take_if(|(round, _)| *round == self.round) {
            Some((_, Fate::GuestResets)) => {
                self.steps
                    .push_back(write(io::ACPI_RESET, Width::Byte, io::ACPI_RESET_VALUE.into()));
            }
            Some((_, Fate::GuestExits)) => {
                self.steps.push_back(write(io::DEBUG_EXIT, Width::Byte, 7));
            }
            Some((_, Fate::DevicePanics)) => {
                self.steps.push_back(write(COUNTER, Width::Dword, DEADLY));
            }
            Some((_, Fate::VcpuPanics)) => std::panic::resume_unwind(Box::new("told to".to_string())),
            Some((_, Fate::Stuck)) => self.steps.push_back(read(MUD, Width::Byte, None)),
            Some((_, Fate::Nothing | Fate::LateTime)) | None => {}
        }
        self.round += 1;
    }
}

impl Source for Guest {
    fn next(&mut self) -> Option<Step> {
        self.ledger.entered(self.vcpu);
        if self.steps.is_empty() && self.round < self.rounds {
            self.plan_round();
        }
        // In the end it halts for ever.
        self.ledger.over[self.vcpu].store(self.steps.is_empty(), Relaxed);
        let step = self.steps.pop_front()?;
        self.ledger.moved();
        tell(|| format!("vcpu{} in its life {}: {step:?}", self.vcpu, self.life));
        if matches!(step, Step::In { .. }) {
            self.ledger.begun[self.vcpu].fetch_add(1, Relaxed);
        }
        Some(step)
    }

    fn seen(&mut self, step: &Step, value: u64) {
        self.ledger.seen[self.vcpu].fetch_add(1, Relaxed);
        match step {
            Step::In {
                expect: Some(expect), ..
            } if u64::from(*expect) != value => self.ledger.wrong(format!(
                "vcpu{} in its life {}, round {}: {step:?} got {value:#x}",
                self.vcpu, self.life, self.round
            )),
            Step::In { port: COUNTER, .. } => {
                let _ = self.ledger.counts.send((self.life, value));
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.ledger.moved();
        self.life += 1;
        // Devices come before vCPUs.
        let resets = self.ledger.resets.load(Relaxed);
        if resets != u64::from(self.life) && !self.ledger.dead.load(Relaxed) {
            let what = format!(
                "vcpu{} begins its life {}, and the counter was reset {resets} times",
                self.vcpu, self.life
            );
            self.ledger.wrong(what);
        }
        self.round = 0;
        self.steps.clear();
        self.ledger.over[self.vcpu].store(false, Relaxed);
    }

    fn take_time(&mut self) {
        tell(|| format!("vcpu{} is told the time", self.vcpu));
        for _ in 0..draw(10) {
            point();
        }
        if self.late {
            simulation::waited(|| self.ledger.loose.load(Relaxed));
        }
        self.ledger.took_time(self.vcpu);
    }
}
