//! An access to an idle device makes no system call and no allocation.
//!
//! Allocations are counted by the global allocator. System calls are not counted but forbidden: the accesses run in a
//! forked child under seccomp, where any but the exit is death. That both checks can fail is shown, too.

use actor_vmm::actors::{Address, Placement, Port, Rank, RankGuard, Spawned};
use actor_vmm::boot::layout::io;
use actor_vmm::clock::Clock;
use actor_vmm::devices::acpi_pm::PmTimer;
use actor_vmm::devices::shell::{DeviceMessage, Shell, Surroundings};
use actor_vmm::devices::uart16550::Uart16550;
use actor_vmm::devices::{Access, AccessClass, Context, Device, Width};
use actor_vmm::pci::decode::{Bus, DataPorts, Functions, Window};
use actor_vmm::pci::host_bridge::HostBridge;
use actor_vmm::vcpu::route::{Accesses, Route, RoutingTable, Space, Target};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use slog::{Discard, Logger, o};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write as _;
use std::sync::Arc;

/// Enough that something done now and then is met.
const ROUNDS: u64 = 100_000;

thread_local! {
    /// Calls of the allocator by this thread. Without a destructor, so the allocator can use it at any time.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

fn count() {
    ALLOCATIONS.set(ALLOCATIONS.get() + 1);
}

// SAFETY: everything is the system's allocator's; counting touches a thread-local integer only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Calls of the allocator, frees included, while `work` runs.
fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[derive(PartialEq, Debug)]
enum Verdict {
    /// It did what it should, without a system call.
    Clean,
    /// It came to its end with another result than it should.
    Wrong,
    /// It made a system call.
    Killed,
}

/// Runs `work` in a child that may not make system calls. It says whether all was as it should be.
fn without_system_calls(work: impl FnOnce() -> bool) -> Verdict {
    // SAFETY: the child runs `work`, which needs no lock that another thread could hold (were it to allocate, the other
    // check would find it), and ends without running anything else.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let status = if !forbid_system_calls() {
                NO_SECCOMP
            } else if work() {
                0
            } else {
                1
            };
            // SAFETY: ends the child, whatever state it is in.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, 0) => Verdict::Clean,
            WaitStatus::Exited(_, 1) => Verdict::Wrong,
            WaitStatus::Signaled(_, Signal::SIGSYS, _) => Verdict::Killed,
            other => panic!("the child could not forbid itself system calls, or crashed: {other:?}"),
        },
    }
}

const NO_SECCOMP: i32 = 2;

/// From now on every system call of this process but its end is SIGSYS. A filter, because strict mode takes the
/// time-stamp counter away as well, and with it the clock.
fn forbid_system_calls() -> bool {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let (load, equal, ret) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    let mut filter = [
        // The number is the first word of seccomp_data.
        step(load, 0, 0, 0),
        step(equal, 1, 0, libc::SYS_exit_group as u32),
        step(ret, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        step(ret, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: numbers, and a program that lives until the call has copied it.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
    }
}

/// A register of 64 bits.
struct Register(u64);

impl Device for Register {
    fn name(&self) -> &'static str {
        "register"
    }
    fn read(&mut self, _: &mut dyn Context, _: Access) -> u64 {
        self.0
    }
    fn write(&mut self, _: &mut dyn Context, _: Access, value: u64) {
        self.0 = value;
    }
    fn reset(&mut self, _: &mut dyn Context) {}
}

const ACCESS: Access = Access {
    offset: 0,
    width: Width::Dword,
};

fn spawn(device: Box<dyn Device>, clock: &Clock, placement: Placement) -> Spawned<Shell> {
    let outside = Surroundings {
        life: None,
        clock: clock.clone(),
        line: None,
        character: None,
        timer: None,
        requests: Box::new(|_| {}),
    };
    Address::spawn(Shell::new(device, outside), "register", placement, 4, |_| {}).unwrap()
}

/// Whether a thread of this process with that name sleeps.
fn sleeps(name: &str) -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let mut states = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
    states.any(|stat| stat.contains(&format!("({name}) S ")))
}

fn port(placement: Placement) -> Port<Shell> {
    spawn(Box::new(Register(0)), &Clock::new(), placement)
        .address
        .connect()
        .unwrap()
}

/// Where the devices of [`table`] are.
mod at {
    /// A register: reads and writes are asks.
    pub const ASKED: u16 = 0x100;
    /// A register: writes are posts.
    pub const POSTED: u16 = 0x110;
    /// Where a bus passes accesses on.
    pub const WINDOW: u64 = 0xc000_0000;
    /// A function's BAR there.
    pub const BAR: u64 = WINDOW + 0x3000;
}

/// A vCPU's table with two registers, a serial port, the PM timer and a PCI bus.
fn table(clock: &Clock) -> RoutingTable {
    let mut table = RoutingTable::new(clock.clone(), Logger::root(Discard, o!()));
    let mut add = |device, start: u16, length: u64, class: fn() -> AccessClass| {
        let spawned = spawn(device, clock, Placement::Handoff);
        let device = table.connect(spawned.address.connect().unwrap());
        let classify: fn(_, _) -> _ = match class() {
            AccessClass::Ask => |_, _| AccessClass::Ask,
            AccessClass::Post => |_, _| AccessClass::Post,
        };
        let start = u64::from(start);
        let route = Route {
            start,
            last: start + length - 1,
            base: 0,
            target: Target::Device { device, classify },
        };
        table.insert(Space::Pio, route).unwrap();
    };
    add(Box::new(Register(0)), at::ASKED, 4, || AccessClass::Ask);
    add(Box::new(Register(0)), at::POSTED, 4, || AccessClass::Post);
    add(Box::new(Uart16550::new("serial0")), io::SERIAL0, 8, || {
        AccessClass::Ask
    });
    let start = u64::from(io::PM_TIMER);
    let timer = Route {
        start,
        last: start + 3,
        base: 0,
        target: Target::Published(Arc::new(Box::new(PmTimer::new()))),
    };
    table.insert(Space::Pio, timer).unwrap();
    add_bus(&mut table, clock);
    table
}

/// A bus with its bridge, and a register as the function in slot 1.
fn add_bus(table: &mut RoutingTable, clock: &Clock) {
    const BAR_BYTES: u64 = 0x1000;
    let bus = Bus::new([at::WINDOW..at::WINDOW + 0x1_0000, 0..0]);
    let mut connect = |device| {
        let spawned = spawn(device, clock, Placement::Handoff);
        table.connect(spawned.address.connect().unwrap())
    };
    let bridge = connect(Box::new(HostBridge::new(bus.clone())));
    let function = connect(Box::new(Register(0)));
    assert!(bus.bar(1, BAR_BYTES).publish(Some(at::BAR)).is_some());
    let functions = Functions {
        bridge,
        others: vec![(1, function, BAR_BYTES)],
    };
    let data = DataPorts {
        bus: bus.clone(),
        functions: functions.clone(),
    };
    let window = Window {
        bus,
        functions,
        start: at::WINDOW,
    };
    let to_bridge = Target::Device {
        device: bridge,
        classify: |_, _| AccessClass::Ask,
    };
    for (space, start, bytes, target) in [
        (Space::Pio, io::PCI_CONFIG.into(), 4, to_bridge),
        (
            Space::Pio,
            io::PCI_CONFIG_DATA.into(),
            4,
            Target::Decoded(Arc::new(data)),
        ),
        (
            Space::Mmio,
            at::WINDOW,
            0x1_0000,
            Target::Decoded(Arc::new(window)),
        ),
    ] {
        let route = Route {
            start,
            last: start + bytes - 1,
            base: 0,
            target,
        };
        table.insert(space, route).unwrap();
    }
}

/// A function's configuration space by mechanism #1, and its BAR.
fn access_bus(table: &mut RoutingTable) -> bool {
    (0..ROUNDS).all(|round| {
        table.port_out(io::PCI_CONFIG, Width::Dword, 0x8000_0810);
        table.port_out(io::PCI_CONFIG_DATA, Width::Dword, round);
        let config = table.port_in(io::PCI_CONFIG_DATA, Width::Dword);
        let mut bar = [0; 4];
        table.store(at::BAR + 4, &(round as u32 + 1).to_le_bytes());
        table.load(at::BAR + 8, &mut bar);
        (config, u64::from(u32::from_le_bytes(bar))) == (round, round + 1)
    })
}

/// Asks, posts, and posts followed by an ask to another device (a fence between them).
fn access_devices(table: &mut RoutingTable) -> bool {
    (0..ROUNDS).all(|round| {
        table.port_out(at::ASKED, Width::Dword, round);
        table.port_out(at::POSTED, Width::Dword, round + 1);
        table.port_out(at::POSTED, Width::Dword, round + 2);
        let asked = table.port_in(at::ASKED, Width::Dword);
        let posted = table.port_in(at::POSTED, Width::Dword);
        table.port_out(io::SERIAL0, Width::Byte, u64::from(b'a'));
        let status = table.port_in(io::SERIAL0 + 5, Width::Byte);
        (asked, posted, status) == (round, round + 2, 0x60)
    })
}

/// Published reads.
fn access_timer(table: &mut RoutingTable) -> bool {
    let mut last = 0;
    (0..ROUNDS).all(|_| {
        let now = table.port_in(io::PM_TIMER, Width::Dword);
        let before = std::mem::replace(&mut last, now);
        before <= now
    })
}

/// Ask and post without a table.
fn access_port(port: &mut Port<Shell>) -> bool {
    (0..ROUNDS).all(|round| {
        port.post(DeviceMessage::Write(ACCESS, round)).is_ok()
            && port.ask(DeviceMessage::Read(ACCESS)) == Ok(round)
            && port.fence().is_ok()
    })
}

#[test]
fn the_checks_can_fail() {
    let _rank = RankGuard::enter(Rank::Vcpu);
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 2);
    // SAFETY: a system call without arguments.
    let call = || unsafe { libc::syscall(libc::SYS_getppid) } != 0;
    assert_eq!(without_system_calls(call), Verdict::Killed);
    assert_eq!(without_system_calls(|| true), Verdict::Clean);
    assert_eq!(without_system_calls(|| false), Verdict::Wrong);
    // An actor on a thread of its own has to be woken.
    let mut port = port(Placement::Thread);
    assert!(port.ask(DeviceMessage::Read(ACCESS)).is_ok());
    while !sleeps("dev:register") {
        std::thread::yield_now();
    }
    assert_eq!(
        without_system_calls(|| port.ask(DeviceMessage::Read(ACCESS)).is_ok()),
        Verdict::Killed
    );
}

#[test]
fn an_idle_ask_and_post_make_no_allocation() {
    let _rank = RankGuard::enter(Rank::Vcpu);
    let mut port = port(Placement::Handoff);
    let mut table = table(&Clock::new());
    assert_eq!(allocations(|| assert!(access_port(&mut port))), 0);
    assert_eq!(allocations(|| assert!(access_devices(&mut table))), 0);
    assert_eq!(allocations(|| assert!(access_timer(&mut table))), 0);
    assert_eq!(allocations(|| assert!(access_bus(&mut table))), 0);
}

#[test]
fn an_idle_ask_and_post_make_no_system_call() {
    let _rank = RankGuard::enter(Rank::Vcpu);
    // Time stands still, so that no device asks the host for it: what that costs is the host's affair.
    let clock = Clock::new();
    clock.freeze();
    let mut port = port(Placement::Handoff);
    let mut table = table(&clock);
    assert_eq!(without_system_calls(|| access_port(&mut port)), Verdict::Clean);
    assert_eq!(
        without_system_calls(|| access_devices(&mut table)),
        Verdict::Clean
    );
    assert_eq!(without_system_calls(|| access_timer(&mut table)), Verdict::Clean);
    assert_eq!(without_system_calls(|| access_bus(&mut table)), Verdict::Clean);
}

#[test]
fn with_a_clock_that_needs_none_nothing_makes_a_system_call() {
    let _rank = RankGuard::enter(Rank::Vcpu);
    let clock = Clock::new();
    if without_system_calls(|| clock.now() <= clock.now()) == Verdict::Killed {
        // Not every host's clock source can be read in user mode.
        let text = "**** SKIPPED: reading the time is a system call on this host ****";
        return drop(writeln!(std::io::stderr(), "{text}"));
    }
    let mut table = table(&clock);
    assert_eq!(
        without_system_calls(|| access_devices(&mut table)),
        Verdict::Clean
    );
    assert_eq!(without_system_calls(|| access_timer(&mut table)), Verdict::Clean);
}
