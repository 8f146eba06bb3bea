//! The kick: how long it takes from the order to stop a vCPU until it has looked into its mailbox, against what the
//! host takes for the least of it: a signal, and KVM_RUN's return.
//!
//! Both are measured on the same vCPU of KVM, on the same thread. Ours is the vCPU actor of a machine, with a mailbox of
//! its own each time: a message is sent to it ([`VcpuHandle::send`]), it leaves the guest, finds the message, and tells
//! that it ends. The bare one is a loop around KVM_RUN. A guest that spins counts, so that whoever kicks knows that it
//! is inside; one that halts is given time.

use super::Failure;
use super::clock::ticks;
use super::contestant::Contestant;
use super::kvm::Machine;
use super::plan::Load;
use super::rig::{Sample, waited_ns};
use crate::actors::Lifecycle;
use crate::boot::EntryPoint;
use crate::clock::Clock;
use crate::guests::{LOAD_ADDRESS, image};
use crate::vcpu::backend::{Backend, ResetError, RunError};
use crate::vcpu::exit::Exit;
use crate::vcpu::kick::{self, Signal, ThreadSignal};
use crate::vcpu::kvm::KvmBackend;
use crate::vcpu::registers::Registers;
use crate::vcpu::route::RoutingTable;
use crate::vcpu::{Vcpu, VcpuEvent, VcpuHandle, VcpuInbox, VcpuMessage, VcpuNews, vcpu_mailbox};
use crossbeam_channel::{Receiver, Sender, bounded};
use slog::Logger;
use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where the guest counts.
const COUNT: u64 = 0x8000;

image! {
    fn spinning = "actor_vmm_kick_spinning";
    ".code64",
    "2: inc qword ptr [0x8000]",
    "jmp 2b"
}

image! {
    /// Interrupts are off, so nothing but a signal ends it.
    fn halted = "actor_vmm_kick_halted";
    ".code64",
    "cli",
    "2: inc qword ptr [0x8000]",
    "hlt",
    "jmp 2b"
}

/// How long a guest that halts is given to do so, and how long any may take for a sign of life.
const SETTLE: Duration = Duration::from_micros(200);
const LIMIT: Duration = Duration::from_secs(5);

/// The same vCPU, lent to one vCPU actor after the other. It tells when it is about to enter the guest.
struct Lent<'a>(&'a mut KvmBackend, &'a AtomicBool);

impl Backend for Lent<'_> {
    #[inline]
    fn run(&mut self) -> Result<(), RunError> {
        self.1.store(true, Ordering::Release);
        self.0.run()
    }
    #[inline]
    fn exit(&mut self) -> Exit {
        self.0.exit()
    }
    fn pio_data(&mut self, offset: u64, length: usize) -> Option<&mut [u8]> {
        self.0.pio_data(offset, length)
    }
    fn mmio_data(&mut self) -> &mut [u8; 8] {
        self.0.mmio_data()
    }
    fn immediate_exit(&mut self) -> *mut u8 {
        self.0.immediate_exit()
    }
    fn registers(&mut self) -> Option<Registers> {
        self.0.registers()
    }
    fn code_at(&mut self, linear: u64) -> Option<Vec<u8>> {
        self.0.code_at(linear)
    }
    fn wakes_from_halt(&self) -> bool {
        self.0.wakes_from_halt()
    }
    fn reset(&mut self, entry: Option<&EntryPoint>) -> Result<(), ResetError> {
        self.0.reset(entry)
    }
}

/// What the vCPU's thread is to do next.
enum Task {
    /// Be a vCPU actor until it is told to stop.
    Actor(VcpuInbox),
    /// Be in KVM_RUN until a signal ends it.
    Bare,
}

/// Kicks a vCPU so many times, and tells how long each took.
pub(super) fn sample(load: &Load, who: Contestant, kicks: usize) -> Result<Sample, Failure> {
    kick::install_handler()?;
    let code = if load.halted { halted() } else { spinning() };
    let entry = EntryPoint::Flat64 { rip: LOAD_ADDRESS };
    let mut machine = Machine::new(code, entry, 1)?;
    let mut backend = machine.backends.remove(0);
    let (tasks, todo): (Sender<Task>, Receiver<Task>) = bounded(1);
    let (done, stamps) = bounded::<Result<u64, Failure>>(1);
    let signal = Arc::new(ThreadSignal::new());
    let entered = Arc::new(AtomicBool::new(false));
    let (own, entering) = (signal.clone(), entered.clone());
    let thread = crate::thread::spawn("vcpu0", move || {
        own.bind_thread();
        let waited = waited_ns();
        for task in todo {
            let outcome = match task {
                Task::Actor(inbox) => be_actor(Lent(&mut backend, &entering), inbox),
                Task::Bare => be_bare(Lent(&mut backend, &entering)),
            };
            if done.send(outcome).is_err() {
                break;
            }
        }
        waited_ns() - waited
    })?;
    let begin = Instant::now();
    let kicker = Kicker {
        load,
        who,
        memory: &machine.memory,
        tasks,
        stamps,
        entered: &entered,
        signal: &signal,
    };
    let outcome = kicker.kick(kicks);
    if outcome.is_err() {
        // It may be inside still: one signal takes it out, wherever it is, if it is repeated.
        while !thread.is_finished() {
            signal.send();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let waited = thread.join().expect("nothing there panics");
    let mut sample = outcome?;
    sample.waited = waited as f64 / begin.elapsed().as_nanos().max(1) as f64;
    Ok(sample)
}

/// Whoever kicks.
struct Kicker<'a> {
    load: &'a Load,
    who: Contestant,
    memory: &'a GuestMemoryMmap,
    tasks: Sender<Task>,
    stamps: Receiver<Result<u64, Failure>>,
    entered: &'a AtomicBool,
    signal: &'a ThreadSignal,
}

impl Kicker<'_> {
    fn kick(self, kicks: usize) -> Result<Sample, Failure> {
        let mut sample = Sample::empty();
        let mut sum = 0;
        for _ in 0..kicks {
            let (task, handle): (Task, Option<VcpuHandle>) = if self.who == Contestant::Bare {
                (Task::Bare, None)
            } else {
                let (handle, inbox) = vcpu_mailbox();
                (Task::Actor(inbox), Some(handle))
            };
            self.tasks.send(task).expect("the vCPU's thread waits for tasks");
            if let Some(handle) = &handle {
                handle.send(VcpuMessage::Lifecycle(Lifecycle::Start));
            }
            wait_until_inside(self.memory, self.entered, self.load.halted)?;
            let start = ticks();
            match &handle {
                Some(handle) => drop(handle.send(VcpuMessage::Stop)),
                None => self.signal.send(),
            }
            let end = self
                .stamps
                .recv_timeout(LIMIT)
                .map_err(|_| Failure::Guest("a kick was not heard".into()))??;
            let took = end.saturating_sub(start).max(1);
            sample.latency.saturating_record(took);
            sum += took;
        }
        // In kicks a tick.
        sample.ops_per_s = kicks as f64 / sum.max(1) as f64;
        Ok(sample)
    }
}

fn count(memory: &GuestMemoryMmap) -> u64 {
    memory
        .load(GuestAddress(COUNT), Ordering::Relaxed)
        .expect("the guest has its memory")
}

/// The vCPU is in the guest, or halted there.
fn wait_until_inside(memory: &GuestMemoryMmap, entered: &AtomicBool, halted: bool) -> Result<(), Failure> {
    let start = Instant::now();
    let until = |ready: &dyn Fn() -> bool| {
        while !ready() {
            spin_loop();
            if start.elapsed() > LIMIT {
                return Err(Failure::Guest("it does not run".into()));
            }
        }
        Ok(())
    };
    until(&|| entered.swap(false, Ordering::Acquire))?;
    if halted {
        // A vCPU that was halted stays so when KVM_RUN begins again: there is no sign of it but time.
        std::thread::sleep(SETTLE);
        return Ok(());
    }
    let before = count(memory);
    until(&|| count(memory) != before)
}

/// The life of a vCPU actor, and when it told that it had ended.
fn be_actor(backend: Lent, inbox: VcpuInbox) -> Result<u64, Failure> {
    let (tell, told) = bounded(8);
    let news = Box::new(move |news: VcpuNews| {
        let now = ticks();
        drop(tell.try_send((now, news.what)));
    });
    let bus: RoutingTable = RoutingTable::new(Clock::new(), Logger::root(slog::Discard, slog::o!()));
    Vcpu::new(0, backend, bus, inbox, news).run();
    for (now, what) in told {
        match what {
            VcpuEvent::Stopped(_) => return Ok(now),
            VcpuEvent::Halted(end) => return Err(Failure::Guest(format!("{end:?}"))),
            VcpuEvent::Ready | VcpuEvent::Paused | VcpuEvent::Reset(_) | VcpuEvent::Debug(_) => {}
        }
    }
    Err(Failure::Guest("its vCPU ended without a word".into()))
}

/// One stay in KVM_RUN, and when it was over.
fn be_bare(mut backend: Lent) -> Result<u64, Failure> {
    loop {
        match backend.run() {
            Err(RunError::Interrupted) => return Ok(ticks()),
            Ok(()) | Err(RunError::Again) => {}
            Err(RunError::Failed(errno)) => return Err(Failure::Guest(errno.to_string())),
        }
    }
}
