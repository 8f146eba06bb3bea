//! The kick: how long it takes from the order to stop a vCPU until it has looked into its mailbox, against what the
//! host takes for the least of it: a signal, and KVM_RUN's return.
//!
//! Both are measured in the same way: a thread stays in KVM_RUN, is taken out of it, notes the time, tells it, and goes
//! back in. Ours is the vCPU actor of a machine: a request is sent to it ([`VcpuHandle::send`]), and the time is when it
//! serves that request, with its registers asked for (which the backend here has not, so nothing but the clock is looked
//! at). The bare one is a loop around KVM_RUN. A guest that spins counts, so that whoever kicks knows that it is inside;
//! one that halts is given time.

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
use crate::vcpu::debug::{CpuState, DebugRequest};
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
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
/// When a bare loop that does not answer is sent another signal.
const AGAIN: Duration = Duration::from_millis(50);

/// What the vCPU's thread and whoever kicks it share.
#[derive(Default)]
struct Shared {
    signal: ThreadSignal,
    /// The guest is about to be entered.
    entering: AtomicBool,
    /// When the last kick was heard.
    heard: AtomicU64,
    /// For the bare loop: it ends.
    over: AtomicBool,
}

impl Shared {
    /// Before whoever waits for it is told.
    fn hear(&self) {
        // Relaxed: the channel on which it is told makes it visible.
        self.heard.store(ticks(), Ordering::Relaxed);
    }
}

/// A vCPU that tells when it is about to enter the guest, and when it is asked for its state.
struct Watched<'a>(KvmBackend, &'a Shared);

impl Backend for Watched<'_> {
    #[inline]
    fn run(&mut self) -> Result<(), RunError> {
        self.1.entering.store(true, Ordering::Release);
        self.0.run()
    }
    fn cpu_state(&mut self) -> Option<Box<CpuState>> {
        self.1.hear();
        None
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

/// A kick was heard.
type Heard = Option<Box<CpuState>>;

/// Kicks a vCPU so many times, and tells how long each took.
pub(super) fn sample(load: &Load, who: Contestant, kicks: usize) -> Result<Sample, Failure> {
    kick::install_handler()?;
    let code = if load.halted { halted() } else { spinning() };
    let entry = EntryPoint::Flat64 { rip: LOAD_ADDRESS };
    let mut machine = Machine::new(code, entry, 1)?;
    let backend = machine.backends.remove(0);
    let shared = Arc::new(Shared::default());
    let (tell, heard): (Sender<Heard>, Receiver<Heard>) = bounded(1);
    let (order, inbox) = if who == Contestant::Bare {
        (Order::Bare(&shared), None)
    } else {
        let (handle, inbox) = vcpu_mailbox();
        handle.send(VcpuMessage::Lifecycle(Lifecycle::Start));
        (Order::Actor(handle, tell.clone()), Some(inbox))
    };
    let own = shared.clone();
    let thread = crate::thread::spawn("vcpu0", move || {
        own.signal.bind_thread();
        let waited = waited_ns();
        let backend = Watched(backend, &own);
        let outcome = match inbox {
            Some(inbox) => be_actor(backend, inbox),
            None => be_bare(backend, tell),
        };
        outcome.map(|()| waited_ns() - waited)
    })?;
    let begin = Instant::now();
    let kicker = Kicker {
        load,
        memory: &machine.memory,
        order: &order,
        heard,
        shared: &shared,
    };
    let outcome = kicker.kick(kicks);
    match &order {
        Order::Actor(handle, _) => drop(handle.send(VcpuMessage::Stop)),
        Order::Bare(shared) => {
            shared.over.store(true, Ordering::Relaxed);
            // A signal that comes before KVM_RUN is lost on a bare loop: again until it has gone.
            while !thread.is_finished() {
                shared.signal.send();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    // Why it has ended early says more than that nobody heard.
    let waited = thread.join().expect("nothing there panics")?;
    let mut sample = outcome?;
    sample.waited = waited as f64 / begin.elapsed().as_nanos().max(1) as f64;
    Ok(sample)
}

/// How a vCPU is told to listen.
enum Order<'a> {
    Actor(VcpuHandle, Sender<Heard>),
    Bare(&'a Shared),
}

/// Whoever kicks.
struct Kicker<'a> {
    load: &'a Load,
    memory: &'a GuestMemoryMmap,
    order: &'a Order<'a>,
    heard: Receiver<Heard>,
    shared: &'a Shared,
}

impl Kicker<'_> {
    fn kick(self, kicks: usize) -> Result<Sample, Failure> {
        let mut sample = Sample::empty();
        let mut sum = 0;
        let mut heard = 0;
        while heard < kicks {
            wait_until_inside(self.memory, &self.shared.entering, self.load.halted)?;
            let start = match self.order {
                Order::Actor(handle, tell) => {
                    let request = VcpuMessage::Debug(DebugRequest::Read(tell.clone()));
                    let start = ticks();
                    handle.send(request);
                    start
                }
                Order::Bare(shared) => {
                    let start = ticks();
                    shared.signal.send();
                    start
                }
            };
            if !self.is_heard()? {
                continue;
            }
            heard += 1;
            let took = self
                .shared
                .heard
                .load(Ordering::Relaxed)
                .saturating_sub(start)
                .max(1);
            sample.latency.saturating_record(took);
            sum += took;
        }
        // In kicks a tick.
        sample.ops_per_s = kicks as f64 / sum.max(1) as f64;
        Ok(sample)
    }

    /// Waits until the kick was heard. `false`: it had to be repeated, and does not count. That happens to a bare loop,
    /// if it has not been in KVM_RUN yet when the signal came; nothing of the kind can happen to an actor.
    fn is_heard(&self) -> Result<bool, Failure> {
        let (start, mut first) = (Instant::now(), true);
        loop {
            if self.heard.recv_timeout(AGAIN).is_ok() {
                return Ok(first);
            }
            match self.order {
                Order::Bare(shared) if start.elapsed() < LIMIT => shared.signal.send(),
                Order::Actor(..) if start.elapsed() < LIMIT => continue,
                _ => return Err(Failure::Guest("a kick was not heard".into())),
            }
            first = false;
        }
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

/// The life of a vCPU actor.
fn be_actor(backend: Watched, inbox: VcpuInbox) -> Result<(), Failure> {
    let (tell, told) = bounded(8);
    let news = Box::new(move |news: VcpuNews| drop(tell.try_send(news.what)));
    let bus: RoutingTable = RoutingTable::new(Clock::new(), Logger::root(slog::Discard, slog::o!()));
    Vcpu::new(0, backend, bus, inbox, news).run();
    match told.into_iter().find_map(|event| match event {
        VcpuEvent::Halted(end) => Some(format!("{end:?}")),
        _ => None,
    }) {
        Some(why) => Err(Failure::Guest(why)),
        None => Ok(()),
    }
}

/// Stays in KVM_RUN, and tells when one was over.
fn be_bare(mut backend: Watched, tell: Sender<Heard>) -> Result<(), Failure> {
    loop {
        match backend.run() {
            Err(RunError::Interrupted) => {
                backend.1.hear();
                let _ = tell.try_send(None);
            }
            Ok(()) | Err(RunError::Again) => {}
            Err(RunError::Failed(errno)) => return Err(Failure::Guest(errno.to_string())),
        }
        if backend.1.over.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
}
