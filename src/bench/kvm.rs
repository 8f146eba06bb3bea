//! One sample from a bare-metal guest of KVM: the same devices as for scripted vCPUs, the vCPU actors of a machine
//! around them, and a guest that takes the time of its own accesses ([`crate::guests::meter`]).

use super::Failure;
use super::clock::Scale;
use super::contestant::Contestant;
use super::plan::{Class, Load};
use super::rig::{self, PUBLISHED_PORT, Sample, port_of, waited_ns};
use crate::actors::{Rank, RankGuard};
use crate::boot::{EntryPoint, entry};
use crate::guests::LOAD_ADDRESS;
use crate::guests::meter::{self, Found, MEMORY_BYTES, Operation, Order, Target};
use crate::machine::cpuid::Topology;
use crate::machine::dispatch::Discipline;
use crate::machine::memory::{self, Backing, MemoryConfig};
use crate::machine::vm::Vm;
use crate::vcpu::backend::{Backend, RunError};
use crate::vcpu::exit::Exit;
use crate::vcpu::kick::{self, ImmediateExit, KickHandle, KickReceiver, ThreadSignal};
use crate::vcpu::kvm::KvmBackend;
use crate::vcpu::{End, Vcpu, VcpuEvent, VcpuHandle, VcpuMessage, VcpuNews, vcpu_mailbox};
use crossbeam_channel::{Receiver, Sender, bounded, select};
use slog::Logger;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// How many accesses a guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Without a look at the clock.
    pub in_a_row: u32,
    /// Timed.
    pub timed: u32,
}

/// Throughput and latencies, both from one guest.
pub(super) struct Pair {
    pub rate: Sample,
    pub latency: Sample,
}

impl Pair {
    /// From what a guest found. The rate of all vCPUs together, from when the first began to when the last was done.
    pub fn of(order: &Order, found: &[Found]) -> Pair {
        let begin = found.iter().map(|vcpu| vcpu.begin).min().unwrap_or(0);
        let end = found.iter().map(|vcpu| vcpu.end).max().unwrap_or(0);
        let accesses = f64::from(order.in_a_row) * found.len() as f64;
        let ticks = end.saturating_sub(begin).max(1) as f64;
        let mut latency = Sample::empty();
        for took in found.iter().flat_map(|vcpu| &vcpu.timed) {
            latency.latency.saturating_record(u64::from(*took).max(1));
        }
        let rate = Sample {
            // In accesses a tick: `scaled` makes seconds of it.
            ops_per_s: accesses / ticks,
            ..Sample::empty()
        };
        Pair { rate, latency }
    }

    /// Ticks become seconds.
    pub fn scaled(mut self, scale: Scale) -> Pair {
        self.rate.ops_per_s *= 1e9 / scale.ns(1.0);
        self
    }
}

/// How long a guest may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A guest's vCPUs and memory, ready to run.
pub(super) struct Machine {
    pub memory: GuestMemoryMmap,
    pub backends: Vec<KvmBackend>,
    // Lines and slots live as long as this.
    _vm: Vm,
}

impl Machine {
    /// A VM with this code in it, entered where it is loaded.
    pub fn new(code: &[u8], entry: EntryPoint, vcpus: usize) -> Result<Machine, Failure> {
        let config = MemoryConfig {
            size_bytes: MEMORY_BYTES,
            backing: Backing::Anonymous,
        };
        let memory = memory::create(&config)?;
        memory
            .write_slice(code, GuestAddress(LOAD_ADDRESS))
            .and_then(|()| entry::write_tables(&memory, &entry))
            .expect("the guest's memory has room for it");
        let topology = Topology::flat(vcpus as u32);
        let vm = Vm::new(memory.clone(), vcpus, true)?;
        let mut backends = Vec::with_capacity(vcpus);
        for index in 0..vcpus {
            let fd = vm.vcpu(index, &topology)?;
            if index == 0 {
                vm.enter_at(&fd, &entry)?;
            }
            backends.push(vm.backend(fd));
        }
        Ok(Machine {
            memory,
            backends,
            _vm: vm,
        })
    }
}

/// What the guest of a load shall do with the devices of [`rig`].
fn order(load: &Load, counts: Counts, scale: Scale) -> Order {
    let measured = (0..load.vcpus).map(|n| match load.class {
        Class::Published => Target {
            port: PUBLISHED_PORT as u16,
            operation: Operation::In32,
        },
        Class::Post => Target {
            port: port_of(n % load.devices) as u16,
            operation: Operation::Out32,
        },
        _ => Target {
            port: port_of(n % load.devices) as u16,
            operation: Operation::In32,
        },
    });
    Order {
        measured: measured.collect(),
        slow: load.slow.map(|_| Target {
            port: port_of(load.devices) as u16,
            operation: Operation::In8,
        }),
        in_a_row: counts.in_a_row,
        timed: counts.timed,
        pace: load.pace_ns.map_or(0, |ns| scale.ticks(ns) as u32),
        print: false,
    }
}

/// One guest under one discipline, or with nothing done for its exits.
pub(super) fn sample(load: &Load, who: Contestant, counts: Counts, scale: Scale) -> Result<Pair, Failure> {
    kick::install_handler()?;
    let order = match load.programs.is_empty() {
        true => order(load, counts, scale),
        false => Order {
            print: false,
            ..super::against::order(load, counts, scale, 0)
        },
    };
    let machine = Machine::new(&order.image(), Order::entry(), order.vcpus())?;
    let Contestant::Discipline { dispatch, placement } = who else {
        let waited = run_bare(machine.backends)?;
        return finish(&machine.memory, &order, waited);
    };
    let (ended, end) = bounded(1);
    let mut set = rig::devices(load, scale);
    rig::add_end(&mut set, ended);
    let run = Run {
        backends: machine.backends,
        end,
    };
    let vcpus = order.vcpus();
    let waited = rig::with_discipline(set, dispatch, placement, vcpus, run)??;
    finish(&machine.memory, &order, waited)
}

fn finish(memory: &GuestMemoryMmap, order: &Order, waited: f64) -> Result<Pair, Failure> {
    let found = meter::read_results(memory, order).expect("the guest has its memory");
    let mut pair = Pair::of(order, &found);
    (pair.rate.waited, pair.latency.waited) = (waited, waited);
    Ok(pair)
}

struct Run {
    backends: Vec<KvmBackend>,
    end: Receiver<()>,
}

impl rig::WithDiscipline for Run {
    type Output = Result<f64, Failure>;

    /// Runs the guest to its end; which part of the time its vCPUs waited for a processor.
    fn run<D: Discipline>(self, mut discipline: D) -> Result<f64, Failure> {
        let mut control = discipline.control();
        let (tell, news) = bounded(4 * self.backends.len());
        let mut vcpus: Vec<(VcpuHandle, JoinHandle<f64>)> = Vec::new();
        let mut outcome = Ok(());
        for (index, backend) in self.backends.into_iter().enumerate() {
            let bus = discipline.bus(Logger::root(slog::Discard, slog::o!()));
            let (handle, inbox) = vcpu_mailbox();
            let tell: Sender<VcpuNews> = tell.clone();
            // Nobody waits for the news of a sample that is over.
            let sink = Box::new(move |what| drop(tell.try_send(what)));
            let vcpu = Vcpu::new(index, backend, bus, inbox, sink);
            match crate::thread::spawn(format!("vcpu{index}"), move || waiting(|| vcpu.run())) {
                Ok(thread) => vcpus.push((handle, thread)),
                Err(error) => {
                    outcome = Err(error.into());
                    break;
                }
            }
        }
        if outcome.is_ok() {
            for (vcpu, _) in &vcpus {
                vcpu.send(VcpuMessage::Lifecycle(crate::actors::Lifecycle::Start));
            }
            outcome = wait_for_end(&self.end, &news);
        }
        for (vcpu, _) in &vcpus {
            vcpu.send(VcpuMessage::Stop);
        }
        let count = vcpus.len().max(1) as f64;
        let waited = vcpus
            .into_iter()
            .map(|(_, thread)| thread.join().expect("a vCPU contains its panics"));
        let waited = waited.sum::<f64>() / count;
        drop(discipline);
        control.stop(true, Instant::now() + LIMIT);
        outcome.map(|()| waited)
    }
}

fn wait_for_end(end: &Receiver<()>, news: &Receiver<VcpuNews>) -> Result<(), Failure> {
    let late = crossbeam_channel::after(LIMIT);
    loop {
        select! {
            recv(end) -> _ => return Ok(()),
            recv(news) -> news => match news.expect("a sender is here").what {
                VcpuEvent::Halted(End::InternalError(diagnosis)) => {
                    return Err(Failure::Guest(diagnosis.to_string()));
                }
                VcpuEvent::Halted(_) => return Err(Failure::Guest("a triple fault".into())),
                _ => {}
            },
            recv(late) -> _ => {
                return Err(Failure::Guest(format!("it did not end within {} s", LIMIT.as_secs())));
            }
        }
    }
}

/// Which part of the time of `work` this thread waited for a processor.
fn waiting(work: impl FnOnce()) -> f64 {
    let (start, waited) = (Instant::now(), waited_ns());
    work();
    (waited_ns() - waited) as f64 / start.elapsed().as_nanos().max(1) as f64
}

/// Runs the guest with nothing done for its exits: what a read gives is what the mapping happens to hold.
fn run_bare(backends: Vec<KvmBackend>) -> Result<f64, Failure> {
    let (sender, results) = bounded(backends.len());
    let mut threads: Vec<(KickHandle, JoinHandle<f64>)> = Vec::new();
    let mut outcome = Ok(());
    for (index, mut backend) in backends.into_iter().enumerate() {
        let (handle, receiver) = kick::kick(ThreadSignal::new());
        let sender = sender.clone();
        let thread = crate::thread::spawn(format!("bare{index}"), move || {
            waiting(|| {
                let ended = run_bare_vcpu(&mut backend, &receiver);
                receiver.gone();
                // As many as there are threads fit.
                let _ = sender.try_send(ended);
            })
        });
        match thread {
            Ok(thread) => threads.push((handle, thread)),
            Err(error) => outcome = Err(error.into()),
        }
    }
    if outcome.is_ok() {
        // The first to end is the boot processor, or whoever cannot go on.
        outcome = match results.recv_timeout(LIMIT) {
            Ok(ended) => ended,
            Err(_) => Err(Failure::Guest(format!(
                "it did not end within {} s",
                LIMIT.as_secs()
            ))),
        };
    }
    for (handle, _) in &threads {
        handle.kick();
    }
    let count = threads.len().max(1) as f64;
    let waited = threads
        .into_iter()
        .map(|(_, thread)| thread.join().expect("nothing there panics"));
    let waited = waited.sum::<f64>() / count;
    outcome.map(|()| waited)
}

fn run_bare_vcpu(backend: &mut KvmBackend, receiver: &KickReceiver) -> Result<(), Failure> {
    let _rank = RankGuard::enter(Rank::Vcpu);
    let flag = backend.immediate_exit();
    // SAFETY: the byte is in the backend's mapping, which outlives this function; only this thread and its own signal
    // handler write it.
    let _exit = unsafe { ImmediateExit::bind(flag) };
    receiver.bind_thread();
    // A kick means stop. It is marked once a stay; here the whole guest is one.
    if !receiver.enter() {
        return Ok(());
    }
    loop {
        match backend.run() {
            Ok(()) => match backend.exit() {
                Exit::Pio(pio) if pio.port != meter::END_PORT => {}
                Exit::Pio(_) => return Ok(()),
                other => return Err(Failure::Guest(other.to_string())),
            },
            Err(RunError::Again) => {}
            Err(RunError::Interrupted) => return Ok(()),
            Err(RunError::Failed(errno)) => return Err(Failure::Guest(errno.to_string())),
        }
    }
}
