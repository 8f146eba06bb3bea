//! The pause: how long it takes from somebody's wish to the machine's answer that it stands still, against what the host
//! takes for the least of it: one signal to each thread at once, and the last one's word that it has left the guest.
//!
//! Both have so many vCPUs that never rest, however few processors there are, so both have to be scheduled that often; that
//! is the host's, not ours. Ours is a whole machine: its actor is asked, all vCPUs settle their accesses, then all devices are
//! told, then guest time stands. The bare one is a thread for each vCPU that does nothing but run it, leave it when it is
//! signalled, say so and wait; and one that is asked, signals all of them and hears all of them. Before the next pause each
//! vCPU has to have run again, or a pause would find those that have not at rest. In both the vCPUs' threads give way to those
//! that direct them (`give_way`).

use super::Failure;
use super::clock::ticks;
use super::contestant::Contestant;
use super::plan::{Load, Source};
use super::rig::Sample;
use crate::actors::{Rank, RankGuard};
use crate::boot::EntryPoint;
use crate::boot::entry;
use crate::devices::Width;
use crate::guests::{LOAD_ADDRESS, image};
use crate::host::signals;
use crate::machine::cpuid::Topology;
use crate::machine::dispatch::Dispatch;
use crate::machine::memory::{self, Backing, MIN_BYTES, MemoryConfig};
use crate::machine::outcome::Outcome;
use crate::machine::platform::NoPlatform;
use crate::machine::request::{Answer, Command, Inbox, MachineAddress};
use crate::machine::state::State;
use crate::machine::supervisor::{self, Guest, MachineConfig, StartError, Unwired};
use crate::machine::vm::Vm;
use crate::vcpu::backend::{Backend, RunError};
use crate::vcpu::kick::{self, ImmediateExit, Signal, ThreadSignal};
use crate::vcpu::kvm::KvmBackend;
use crate::vcpu::scripted::{self, ScriptedBackend, Step};
use crossbeam_channel::{Receiver, Sender, bounded};
use crossbeam_utils::CachePadded;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use slog::Logger;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where the guest's vCPUs count, eight bytes each.
const COUNTS: u64 = 0x8000;

image! {
    /// RDI: which vCPU it is.
    fn counting = "actor_vmm_pause_counting";
    ".code64",
    "2: inc qword ptr [0x8000 + rdi * 8]",
    "jmp 2b"
}

/// How long a pause, a start or an end may take.
pub(super) const LIMIT: Duration = Duration::from_secs(60);
/// Pauses before those that count: what is run for the first time has to be fetched first.
const WARM: usize = 1;
/// A port where nobody is: its reads concern nobody but the vCPU.
const NOBODY: u16 = 0x1f0;

/// How far each vCPU is.
enum Counts {
    Guest(GuestMemoryMmap),
    Script(Arc<[CachePadded<AtomicU64>]>),
}

impl Counts {
    fn of(&self, vcpu: usize) -> u64 {
        match self {
            Counts::Guest(memory) => memory
                .load(GuestAddress(COUNTS + 8 * vcpu as u64), Ordering::Relaxed)
                .expect("the guest has its memory"),
            Counts::Script(counts) => counts[vcpu].load(Ordering::Relaxed),
        }
    }

    /// Waits until all have run from now on. Asleep in between: whoever waits shall not take a processor from them.
    fn wait_for_all(&self, vcpus: usize) -> Result<(), Failure> {
        let begin = Instant::now();
        let before: Vec<u64> = (0..vcpus).map(|vcpu| self.of(vcpu)).collect();
        while (0..vcpus).any(|vcpu| self.of(vcpu) == before[vcpu]) {
            if begin.elapsed() > LIMIT {
                return Err(Failure::Guest("a vCPU does not run".into()));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

/// Reads a port again and again, and counts.
struct Reading {
    vcpu: usize,
    counts: Arc<[CachePadded<AtomicU64>]>,
}

impl scripted::Source for Reading {
    fn next(&mut self) -> Option<Step> {
        self.counts[self.vcpu].fetch_add(1, Ordering::Relaxed);
        Some(Step::In {
            port: NOBODY,
            width: Width::Byte,
            count: 1,
            expect: None,
        })
    }

    fn seen(&mut self, _: &Step, _: u64) {}
}

/// What this program needs before it runs a machine.
pub(super) fn be_ready() -> Result<(), Failure> {
    kick::install_handler()?;
    // A machine takes them over. This program wants to be ended by them at once.
    signals::keep_as_they_are()?;
    Ok(())
}

/// Pauses so many times, and tells how long each took.
pub(super) fn sample(load: &Load, who: Contestant, pauses: usize) -> Result<Sample, Failure> {
    be_ready()?;
    let vcpus = load.vcpus;
    match load.source {
        Source::Kvm => {
            let guest = Counting::new(vcpus)?;
            let counts = Counts::Guest(guest.memory.clone());
            if who == Contestant::Bare {
                return with(Bare::start(guest.backends)?, &counts, vcpus, pauses);
            }
            let Counting { memory, vm, backends } = guest;
            let ours = Ours::start(vcpus, Dispatch::Actor, move |config, inbox, log| {
                let platform = vm.platform(move |_| Ok(Counting::ENTRY))?;
                drop(memory);
                supervisor::run_controlled(config, backends, &vm, Box::new(platform), inbox, log)
            })?;
            with(ours, &counts, vcpus, pauses)
        }
        Source::Scripted => {
            let shared: Arc<[_]> = (0..vcpus).map(|_| CachePadded::new(AtomicU64::new(0))).collect();
            let counts = Counts::Script(shared.clone());
            let backends: Vec<_> = (0..vcpus)
                .map(|vcpu| {
                    let counts = shared.clone();
                    ScriptedBackend::new(Reading { vcpu, counts })
                })
                .collect();
            if who == Contestant::Bare {
                return with(Bare::start(backends)?, &counts, vcpus, pauses);
            }
            let ours = Ours::start(vcpus, Dispatch::Actor, move |config, inbox, log| {
                supervisor::run_controlled(config, backends, &Unwired, Box::new(NoPlatform), inbox, log)
            })?;
            with(ours, &counts, vcpus, pauses)
        }
    }
}

/// What can be paused.
trait Pausable {
    /// Returns when all stand.
    fn pause(&self) -> Result<(), Failure>;
    fn resume(&self) -> Result<(), Failure>;
    fn end(self) -> Result<(), Failure>;
}

fn with(them: impl Pausable, counts: &Counts, vcpus: usize, pauses: usize) -> Result<Sample, Failure> {
    let measured = measure(&them, counts, vcpus, pauses);
    // Why it has ended early says more than that it did not answer.
    them.end()?;
    measured
}

fn measure(them: &impl Pausable, counts: &Counts, vcpus: usize, pauses: usize) -> Result<Sample, Failure> {
    let mut sample = Sample::empty();
    let mut sum = 0;
    // All have run, so all are there.
    counts.wait_for_all(vcpus)?;
    let yielding = give_way()?;
    if yielding != vcpus {
        return Err(Failure::Guest(format!(
            "{yielding} threads of {vcpus} vCPUs give way"
        )));
    }
    for n in 0..WARM + pauses {
        counts.wait_for_all(vcpus)?;
        let start = ticks();
        them.pause()?;
        let took = ticks().saturating_sub(start).max(1);
        them.resume()?;
        if n >= WARM {
            sample.latency.saturating_record(took);
            sum += took;
        }
    }
    // In pauses a tick. How long vCPUs waited for a processor is left out: they have more than there are, on purpose.
    sample.ops_per_s = pauses as f64 / sum.max(1) as f64;
    Ok(sample)
}

/// Lets the threads of all vCPUs give way to those that direct them, in both contestants alike: a thread of the policy
/// SCHED_IDLE leaves its processor at once for one of another (sched(7)). Else a sample tells when the host's scheduler gives a
/// processor to a thread that wants one beside 64 that never rest (0.03 to 88 ms with two processors), which is not the cost
/// of a pause. It takes no privilege. Returns how many vCPUs there are.
fn give_way() -> Result<usize, Failure> {
    let mut threads = 0;
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?;
        // One that has just ended has no name, and is no vCPU.
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if !name.starts_with("vcpu") {
            continue;
        }
        let id: libc::pid_t = task.file_name().to_string_lossy().parse().expect("a thread's id");
        let none = libc::sched_param { sched_priority: 0 };
        // SAFETY: `none` is read during the call alone. With an id that is in use no more it fails.
        if unsafe { libc::sched_setscheduler(id, libc::SCHED_IDLE, &none) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        threads += 1;
    }
    Ok(threads)
}

/// A guest of KVM with all of its vCPUs running.
struct Counting {
    backends: Vec<KvmBackend>,
    vm: Vm,
    memory: GuestMemoryMmap,
}

impl Counting {
    const ENTRY: EntryPoint = EntryPoint::Flat64 { rip: LOAD_ADDRESS };

    fn new(vcpus: usize) -> Result<Counting, Failure> {
        let memory = memory::create(&memory_config())?;
        memory
            .write_slice(counting(), GuestAddress(LOAD_ADDRESS))
            .and_then(|()| entry::write_tables(&memory, &Counting::ENTRY))
            .expect("the guest's memory has room for it");
        let topology = Topology::flat(vcpus as u32);
        let vm = Vm::new(memory.clone(), vcpus, true)?;
        let mut backends = Vec::with_capacity(vcpus);
        for index in 0..vcpus {
            let fd = vm.vcpu(index, &topology)?;
            vm.enter_at(&fd, &Counting::ENTRY)?;
            let host = |error: kvm_ioctls::Error| std::io::Error::from(error);
            let mut registers = fd.get_regs().map_err(host)?;
            registers.rdi = index as u64;
            fd.set_regs(&registers).map_err(host)?;
            // As after INIT and SIPI, which the guest is spared.
            fd.set_mp_state(kvm_mp_state {
                mp_state: KVM_MP_STATE_RUNNABLE,
            })
            .map_err(host)?;
            backends.push(vm.backend(fd));
        }
        Ok(Counting { backends, vm, memory })
    }
}

pub(super) fn memory_config() -> MemoryConfig {
    MemoryConfig {
        size_bytes: MIN_BYTES,
        backing: Backing::Anonymous,
    }
}

/// A machine, on a thread of its own.
pub(super) struct Ours {
    address: MachineAddress,
    thread: JoinHandle<Result<Outcome, StartError>>,
}

impl Ours {
    pub(super) fn start(
        vcpus: usize,
        dispatch: Dispatch,
        run: impl FnOnce(&MachineConfig, Inbox, &Logger) -> Result<Outcome, StartError> + Send + 'static,
    ) -> Result<Ours, Failure> {
        let config = MachineConfig {
            memory: memory_config(),
            dispatch,
            ..MachineConfig::bare(Guest::none(), vcpus)
        };
        let inbox = Inbox::new();
        let address = inbox.address();
        let log = Logger::root(slog::Discard, slog::o!());
        let thread = crate::thread::spawn("machine", move || run(&config, inbox, &log))?;
        Ok(Ours { address, thread })
    }

    /// Ends it.
    pub(super) fn end(self) -> Result<(), Failure> {
        let _ = self.address.ask(Command::Stop);
        match self.thread.join().expect("a machine contains its panics") {
            Ok(Outcome::Stopped) => Ok(()),
            Ok(other) => Err(Failure::Guest(format!("a machine ended by itself: {other:?}"))),
            Err(error) => Err(Failure::Guest(format!("a machine cannot start: {error}"))),
        }
    }

    fn ask(&self, command: Command, state: State) -> Result<(), Failure> {
        match self.address.ask(command) {
            Answer::Done(now) if now == state => Ok(()),
            other => Err(Failure::Guest(format!(
                "a machine answers {command:?} with {other:?}"
            ))),
        }
    }
}

impl Pausable for Ours {
    fn pause(&self) -> Result<(), Failure> {
        self.ask(Command::Pause, State::Paused)
    }

    fn resume(&self) -> Result<(), Failure> {
        self.ask(Command::Resume, State::Running)
    }

    fn end(self) -> Result<(), Failure> {
        Ours::end(self)
    }
}

/// Threads that run a vCPU each, and nothing else; and one that is asked, signals them and hears them.
struct Bare {
    signals: Arc<[ThreadSignal]>,
    over: Arc<AtomicBool>,
    ask: Sender<()>,
    answers: Receiver<bool>,
    go: Vec<Sender<()>>,
    threads: Vec<JoinHandle<Result<(), Failure>>>,
}

impl Bare {
    fn start<B: Backend + Send + 'static>(backends: Vec<B>) -> Result<Bare, Failure> {
        let signals: Arc<[ThreadSignal]> = backends.iter().map(|_| ThreadSignal::new()).collect();
        let over = Arc::new(AtomicBool::new(false));
        let (tell, heard) = bounded(backends.len());
        let (mut go, mut threads) = (Vec::new(), Vec::new());
        for (vcpu, backend) in backends.into_iter().enumerate() {
            let (sender, wait) = bounded(1);
            let (signals, over, tell) = (signals.clone(), over.clone(), tell.clone());
            let run = move || be_bare(backend, &signals[vcpu], &over, &tell, &wait);
            threads.push(crate::thread::spawn(format!("vcpu{vcpu}"), run)?);
            go.push(sender);
        }
        let (ask, asked) = bounded(1);
        let (answer, answers) = bounded(1);
        let all = signals.clone();
        let kicker = move || {
            while asked.recv().is_ok() {
                all.iter().for_each(Signal::send);
                let all_heard = all.iter().all(|_| heard.recv_timeout(LIMIT).is_ok());
                let _ = answer.try_send(all_heard);
            }
            Ok(())
        };
        threads.push(crate::thread::spawn("kicker", kicker)?);
        Ok(Bare {
            signals,
            over,
            ask,
            answers,
            go,
            threads,
        })
    }
}

impl Pausable for Bare {
    fn pause(&self) -> Result<(), Failure> {
        let _ = self.ask.try_send(());
        match self.answers.recv() {
            Ok(true) => Ok(()),
            _ => Err(Failure::Guest("a bare vCPU has not left the guest".into())),
        }
    }

    fn resume(&self) -> Result<(), Failure> {
        for go in &self.go {
            // It waits for that, and for nothing else.
            let _ = go.try_send(());
        }
        Ok(())
    }

    fn end(self) -> Result<(), Failure> {
        self.over.store(true, Ordering::Relaxed);
        drop((self.go, self.ask));
        // Again until they have gone: one that has just started knows no signal yet.
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            self.signals.iter().for_each(Signal::send);
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut threads = self.threads.into_iter();
        threads.try_for_each(|thread| thread.join().expect("nothing there panics"))
    }
}

/// Runs the guest until there is a signal, says so, and waits.
fn be_bare<B: Backend>(
    mut backend: B,
    signal: &ThreadSignal,
    over: &AtomicBool,
    tell: &Sender<()>,
    go: &Receiver<()>,
) -> Result<(), Failure> {
    let _rank = RankGuard::enter(Rank::Vcpu);
    let flag = backend.immediate_exit();
    // SAFETY: the byte is in the backend's mapping, which outlives `_exit` (dropped first: declared later); only this
    // thread and its own signal handler write it.
    let _exit = unsafe { ImmediateExit::bind(flag) };
    signal.bind_thread();
    loop {
        match backend.run() {
            Err(RunError::Interrupted) => {}
            Ok(()) | Err(RunError::Again) => continue,
            Err(RunError::Failed(errno)) => return Err(Failure::Guest(errno.to_string())),
        }
        // SAFETY: as above. Volatile, as the handler and the kernel share it.
        unsafe { flag.write_volatile(0) };
        if over.load(Ordering::Relaxed) {
            return Ok(());
        }
        let _ = tell.try_send(());
        if go.recv().is_err() {
            return Ok(());
        }
    }
}
