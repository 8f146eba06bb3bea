//! Kicks by the thousand against real vCPUs, whatever they are doing: none lost, none doubled.
//!
//! Bare-metal guests on this host's KVM, under the vCPU actor itself. `ACTOR_VMM_KICKS` says how many kicks in all; see
//! design.md for what a million said. A host without `/dev/kvm` skips what needs it and says so; under CI that is a
//! failure. Limits of time are against hangs only.

#[path = "host/kvm.rs"]
mod kvm;

use actor_vmm::actors::{Address, Lifecycle, Placement, Port};
use actor_vmm::boot::layout::io;
use actor_vmm::clock::Clock;
use actor_vmm::devices::AccessClass;
use actor_vmm::devices::delay::Delay;
use actor_vmm::devices::shell::{Shell, Surroundings};
use actor_vmm::guests::cases;
use actor_vmm::machine::cpuid::Topology;
use actor_vmm::machine::memory::{self, Backing, MemoryConfig};
use actor_vmm::machine::supervisor::Guest;
use actor_vmm::machine::vm::Vm;
use actor_vmm::vcpu::backend::{Backend, ResetError, RunError};
use actor_vmm::vcpu::exit::Exit;
use actor_vmm::vcpu::kick::{self, ImmediateExit, KickReceiver, Signal, ThreadSignal};
use actor_vmm::vcpu::kvm::KvmBackend;
use actor_vmm::vcpu::registers::Registers;
use actor_vmm::vcpu::route::{Route, RoutingTable, Space, Target};
use actor_vmm::vcpu::{Vcpu, VcpuEvent, VcpuHandle, VcpuMessage, VcpuNews, vcpu_mailbox};
use crossbeam_channel::{Receiver, Sender, bounded};
use kvm::have_kvm;
use slog::{Discard, Logger, o};
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

/// After this a kick is lost.
const LOST: Duration = Duration::from_secs(20);

/// Told to a person even when the test passes.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// How many kicks in all.
fn kicks() -> u64 {
    let given = std::env::var("ACTOR_VMM_KICKS").ok();
    given.map_or(10_000, |text| text.parse().expect("ACTOR_VMM_KICKS is a number"))
}

/// What the vCPU is busy with.
#[derive(Clone, Copy, Debug)]
enum Load {
    /// Nothing but a jump.
    Spin,
    /// HLT, with interrupt controllers in the kernel.
    Halt,
    /// HLT, without: the vCPU sleeps on its mailbox.
    HaltOutside,
    /// A port that nobody claims.
    Ports,
    /// An address that nobody claims.
    Memory,
    /// A device with a thread of its own that takes its time: the vCPU waits for the reply.
    Reply,
}

const LOADS: [Load; 6] = [
    Load::Spin,
    Load::Halt,
    Load::HaltOutside,
    Load::Ports,
    Load::Memory,
    Load::Reply,
];

impl Load {
    fn guest(self) -> &'static str {
        match self {
            Load::Spin => "spin",
            Load::Halt | Load::HaltOutside => "halted",
            Load::Ports | Load::Reply => "port_loop",
            Load::Memory => "memory_loop",
        }
    }

    fn vcpu(self) -> KvmBackend {
        let config = MemoryConfig {
            size_bytes: memory::MIN_BYTES,
            backing: Backing::Memfd,
        };
        let memory = memory::create(&config).unwrap();
        let Some(Guest::Image { bytes, at, entry }) = cases::by_name(self.guest()) else {
            unreachable!("test guests are images")
        };
        memory.write_slice(bytes, GuestAddress(at)).unwrap();
        actor_vmm::boot::entry::write_tables(&memory, &entry).unwrap();
        let vm = Vm::new(memory, 1, !matches!(self, Load::HaltOutside)).unwrap();
        let fd = vm.vcpu(0, &Topology::flat(1)).unwrap();
        vm.enter_at(&fd, &entry).unwrap();
        vm.backend(fd)
    }

    /// What its accesses reach, and the device's end, to stop it.
    fn bus(self) -> (RoutingTable, Option<Port<Shell>>) {
        let clock = Clock::new();
        let mut bus = RoutingTable::new(clock.clone(), no_log());
        if !matches!(self, Load::Reply) {
            return (bus, None);
        }
        let outside = Surroundings {
            life: None,
            clock,
            line: None,
            character: None,
            timer: None,
            requests: Box::new(|_| {}),
        };
        let shell = Shell::new(Box::new(Delay::new(Duration::from_micros(20))), outside);
        let address = Address::spawn(shell, "delay", Placement::Thread, 2, |_| {})
            .unwrap()
            .address;
        let device = bus.connect(address.connect().unwrap());
        let port = u64::from(io::SERIAL0) + 5;
        let route = Route {
            start: port,
            last: port,
            base: 0,
            target: Target::Device {
                device,
                classify: |_, _| AccessClass::Ask,
            },
        };
        bus.insert(Space::Pio, route).unwrap();
        (bus, address.connect())
    }
}

fn no_log() -> Logger {
    Logger::root(Discard, o!())
}

/// A vCPU actor on its thread.
struct Running {
    handle: VcpuHandle,
    news: Receiver<VcpuEvent>,
    thread: JoinHandle<()>,
}

impl Running {
    fn start<B: Backend + Send + 'static>(backend: B, bus: RoutingTable) -> Running {
        Running::start_with(backend, bus, |_| {})
    }

    /// `before`: what is done to the handle before there is a thread.
    fn start_with<B: Backend + Send + 'static>(
        backend: B,
        bus: RoutingTable,
        before: impl FnOnce(&VcpuHandle),
    ) -> Running {
        kick::install_handler().unwrap();
        let (handle, inbox) = vcpu_mailbox();
        before(&handle);
        let (tell, news) = bounded(16);
        let sink = Box::new(move |news: VcpuNews| tell.try_send(news.what).unwrap());
        let vcpu = Vcpu::new(0, backend, bus, inbox, sink);
        let thread = std::thread::spawn(move || vcpu.run());
        let running = Running { handle, news, thread };
        assert!(matches!(running.next(), VcpuEvent::Ready));
        running
    }

    #[track_caller]
    fn next(&self) -> VcpuEvent {
        self.news.recv_timeout(LOST).expect("a kick was lost")
    }

    fn send(&self, event: Lifecycle) {
        assert!(self.handle.send(VcpuMessage::Lifecycle(event)));
    }

    /// Two kicks: one ends whatever it does, one comes while it sleeps on its mailbox.
    #[track_caller]
    fn pause_and_resume(&self) {
        self.send(Lifecycle::Pause);
        let paused = self.next();
        assert!(matches!(paused, VcpuEvent::Paused), "{paused:?}");
        self.send(Lifecycle::Resume);
    }

    /// Its end, and that nothing came twice.
    #[track_caller]
    fn stop(self) {
        assert!(self.handle.send(VcpuMessage::Stop));
        let stopped = self.next();
        assert!(matches!(stopped, VcpuEvent::Stopped(_)), "{stopped:?}");
        self.thread.join().unwrap();
        assert_eq!(self.news.try_iter().count(), 0);
        // And more, when there is no thread and no mapping any more.
        for _ in 0..1000 {
            self.handle.kick();
        }
    }
}

#[test]
fn no_kick_is_lost_or_doubled_whatever_the_vcpu_does() {
    if !have_kvm() {
        return;
    }
    let rounds = kicks() / LOADS.len() as u64 / 2;
    for load in LOADS {
        let (bus, device) = load.bus();
        let vcpu = Running::start(load.vcpu(), bus);
        vcpu.send(Lifecycle::Start);
        let begin = std::time::Instant::now();
        for _ in 0..rounds {
            vcpu.pause_and_resume();
        }
        let took = begin.elapsed();
        vcpu.stop();
        if let Some(mut device) = device {
            device.stop();
        }
        tell(&format!(
            "{load:?}: {} kicks, none lost, none doubled, {:.1} us each",
            2 * rounds,
            took.as_secs_f64() * 1e6 / (2 * rounds) as f64
        ));
    }
}

/// Counts signals, and knows whether its thread exists.
struct Counted {
    signal: ThreadSignal,
    exists: AtomicBool,
    signals: AtomicU64,
}

impl Counted {
    fn new() -> Arc<Counted> {
        Arc::new(Counted {
            signal: ThreadSignal::new(),
            exists: AtomicBool::new(false),
            signals: AtomicU64::new(0),
        })
    }
}

/// A newtype, as neither the trait nor `Arc` is ours.
struct Shared(Arc<Counted>);

impl Signal for Shared {
    fn send(&self) {
        assert!(
            self.0.exists.load(Ordering::SeqCst),
            "a signal to a thread that does not exist"
        );
        self.0.signals.fetch_add(1, Ordering::Relaxed);
        self.0.signal.send();
        assert!(
            self.0.exists.load(Ordering::SeqCst),
            "the thread ended under a signal"
        );
    }
}

/// What one kicked thread has counted.
#[derive(Default, Debug)]
struct Looks {
    stays: u64,
    kicked: u64,
}

/// Stays in the guest until `ended`, and answers every look into the mailbox.
fn stay(
    mut backend: impl Backend,
    receiver: KickReceiver<Shared>,
    counted: &Counted,
    wanted: &AtomicU64,
    answers: &Sender<u64>,
    ended: &AtomicBool,
) -> Looks {
    let flag = backend.immediate_exit();
    // SAFETY: the byte lives in the backend, and this thread alone touches it until the binding is dropped, below.
    let bound = unsafe { ImmediateExit::bind(flag) };
    counted.signal.bind_thread();
    counted.exists.store(true, Ordering::SeqCst);
    let mut looks = Looks::default();
    let mut answered = 0;
    while !ended.load(Ordering::Relaxed) {
        let kicked = if receiver.enter() {
            looks.stays += 1;
            let outcome = backend.run();
            assert!(
                matches!(outcome, Ok(()) | Err(RunError::Interrupted)),
                "{outcome:?}"
            );
            let kicked = receiver.leave();
            // SAFETY: see above.
            unsafe { flag.write_volatile(0) };
            kicked
        } else {
            true
        };
        looks.kicked += u64::from(kicked);
        let now = wanted.load(Ordering::Relaxed);
        if kicked && now != answered {
            answered = now;
            answers.send(now).unwrap();
        }
    }
    receiver.gone();
    counted.exists.store(false, Ordering::SeqCst);
    drop(bound);
    looks
}

#[test]
fn a_burst_of_kicks_costs_one_signal_a_stay() {
    if !have_kvm() {
        return;
    }
    kick::install_handler().unwrap();
    const BURST: u64 = 50;
    let bursts = kicks() / BURST / 2;
    for load in [Load::Spin, Load::Halt] {
        let counted = Counted::new();
        let (handle, receiver) = kick::kick(Shared(counted.clone()));
        let (wanted, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (tell_answer, answers) = bounded(1024);
        let backend = load.vcpu();
        let thread = {
            let (counted, wanted, ended) = (counted.clone(), wanted.clone(), ended.clone());
            std::thread::spawn(move || stay(backend, receiver, &counted, &wanted, &tell_answer, &ended))
        };
        for burst in 1..=bursts {
            wanted.store(burst, Ordering::Relaxed);
            for _ in 0..BURST {
                handle.kick();
            }
            // The last kick came after the message, so it is seen whatever became of the others.
            while answers.recv_timeout(LOST).expect("a kick was lost") != burst {}
        }
        ended.store(true, Ordering::Relaxed);
        handle.kick();
        let looks = thread.join().unwrap();
        let signals = counted.signals.load(Ordering::Relaxed);
        assert!(signals <= looks.kicked, "{signals} signals, {looks:?}");
        assert!(
            looks.kicked <= bursts * BURST + 1 && looks.kicked >= bursts,
            "{looks:?}"
        );
        tell(&format!(
            "{load:?}: {} kicks in bursts of {BURST}, {signals} signals, {} looks, {} stays",
            bursts * BURST,
            looks.kicked,
            looks.stays
        ));
        for _ in 0..1000 {
            handle.kick();
        }
        assert_eq!(
            counted.signals.load(Ordering::Relaxed),
            signals,
            "a signal after the end"
        );
    }
}

/// Stops between the look at the kick's word and KVM_RUN, for as long as somebody else wants.
struct Between {
    backend: KvmBackend,
    here: Sender<()>,
    go: Receiver<()>,
}

impl Backend for Between {
    fn run(&mut self) -> Result<(), RunError> {
        // Not while it is settled: then it is the vCPU itself that set the byte, and nobody waits for us.
        // SAFETY: this is the vCPU's thread, as in `Vcpu::run`.
        if unsafe { self.backend.immediate_exit().read_volatile() } == 0 && self.here.send(()).is_ok() {
            let _ = self.go.recv();
        }
        self.backend.run()
    }
    fn exit(&mut self) -> Exit {
        self.backend.exit()
    }
    fn pio_data(&mut self, offset: u64, length: usize) -> Option<&mut [u8]> {
        self.backend.pio_data(offset, length)
    }
    fn mmio_data(&mut self) -> &mut [u8; 8] {
        self.backend.mmio_data()
    }
    fn immediate_exit(&mut self) -> *mut u8 {
        self.backend.immediate_exit()
    }
    fn registers(&mut self) -> Option<Registers> {
        self.backend.registers()
    }
    fn code_at(&mut self, linear: u64) -> Option<Vec<u8>> {
        self.backend.code_at(linear)
    }
    fn wakes_from_halt(&self) -> bool {
        self.backend.wakes_from_halt()
    }
    fn reset(&mut self, entry: Option<&actor_vmm::boot::EntryPoint>) -> Result<(), ResetError> {
        self.backend.reset(entry)
    }
}

#[test]
fn a_kick_between_the_flag_check_and_kvm_run_is_not_lost() {
    if !have_kvm() {
        return;
    }
    for load in [Load::Spin, Load::Halt] {
        let (here, arrived) = bounded(0);
        let (release, go) = bounded(0);
        let between = Between {
            backend: load.vcpu(),
            here,
            go,
        };
        let vcpu = Running::start(between, load.bus().0);
        vcpu.send(Lifecycle::Start);
        for _ in 0..100 {
            // Until its line is printed the guest leaves by itself, which costs a round and changes nothing.
            arrived.recv_timeout(LOST).unwrap();
            vcpu.send(Lifecycle::Pause);
            release.send(()).unwrap();
            loop {
                crossbeam_channel::select! {
                    recv(vcpu.news) -> paused => {
                        assert!(matches!(paused, Ok(VcpuEvent::Paused)), "{paused:?}");
                        break;
                    }
                    recv(arrived) -> _ => release.send(()).unwrap(),
                    default(LOST) => panic!("a kick was lost"),
                }
            }
            vcpu.send(Lifecycle::Resume);
        }
        // From now on it does not stop there.
        drop((arrived, release));
        vcpu.stop();
    }
}

#[test]
fn a_kick_before_the_thread_is_ready_is_heard_when_it_is() {
    if !have_kvm() {
        return;
    }
    for load in LOADS {
        let vcpu = Running::start_with(load.vcpu(), load.bus().0, |handle| {
            for _ in 0..100 {
                handle.kick();
            }
            assert!(handle.send(VcpuMessage::Lifecycle(Lifecycle::Start)));
            assert!(handle.send(VcpuMessage::Lifecycle(Lifecycle::Pause)));
        });
        let paused = vcpu.next();
        assert!(matches!(paused, VcpuEvent::Paused), "{paused:?}");
        vcpu.stop();
    }
}

/// Never leaves by itself. Without KVM, so that many can come and go.
struct Asleep(Box<u8>);

impl Asleep {
    fn new() -> Asleep {
        Asleep(Box::new(0))
    }
}

impl Backend for Asleep {
    fn run(&mut self) -> Result<(), RunError> {
        // SAFETY: the byte is this thread's; its signal handler writes it.
        while unsafe { (&raw const *self.0).read_volatile() } == 0 {
            std::thread::yield_now();
        }
        Err(RunError::Interrupted)
    }
    fn exit(&mut self) -> Exit {
        Exit::Intr
    }
    fn pio_data(&mut self, _: u64, _: usize) -> Option<&mut [u8]> {
        None
    }
    fn mmio_data(&mut self) -> &mut [u8; 8] {
        unreachable!("it has no exits")
    }
    fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut *self.0
    }
    fn registers(&mut self) -> Option<Registers> {
        None
    }
    fn code_at(&mut self, _: u64) -> Option<Vec<u8>> {
        None
    }
    fn wakes_from_halt(&self) -> bool {
        true
    }
    fn reset(&mut self, _: Option<&actor_vmm::boot::EntryPoint>) -> Result<(), ResetError> {
        Ok(())
    }
}

#[test]
fn threads_come_and_go_under_kicks_and_none_gets_anothers() {
    kick::install_handler().unwrap();
    let generations = (kicks() / 50).clamp(50, 2000);
    for _ in 0..generations {
        let counted = Counted::new();
        let (handle, receiver) = kick::kick(Shared(counted.clone()));
        let ended = Arc::new(AtomicBool::new(false));
        let over = Arc::new(AtomicBool::new(false));
        // Two that kick before, while and after the thread is there.
        let kickers: Vec<_> = (0..2)
            .map(|_| {
                let (handle, over) = (handle.clone(), over.clone());
                std::thread::spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        handle.kick();
                    }
                })
            })
            .collect();
        let wanted = Arc::new(AtomicU64::new(1));
        let (tell_answer, answers) = bounded(4);
        let thread = {
            let (counted, ended) = (counted.clone(), ended.clone());
            std::thread::spawn(move || stay(Asleep::new(), receiver, &counted, &wanted, &tell_answer, &ended))
        };
        answers.recv_timeout(LOST).expect("a kick was lost");
        ended.store(true, Ordering::Relaxed);
        thread.join().unwrap();
        over.store(true, Ordering::Relaxed);
        for kicker in kickers {
            kicker.join().unwrap();
        }
    }
}
