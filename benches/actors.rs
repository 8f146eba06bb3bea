//! What one message costs, against the lock that it replaces. In one process, so that the ratio holds on a machine
//! whose speed drifts; `actor-vmm`'s claims are ratios, never times.
//!
//! `cargo bench --bench actors`. The mutex is std's, uncontended: the best case of a lock.

use actor_vmm::actors::{Actor, Address, Placement, Rank};
use actor_vmm::baselines::mutex::{Mutex, Std};
use actor_vmm::clock::Clock;
use actor_vmm::devices::acpi_pm::PmTimer;
use actor_vmm::devices::shell::{Shell, Surroundings};
use actor_vmm::devices::{Access, AccessClass, Context, Device, Direction, Width};
use actor_vmm::vcpu::route::{Accesses, Route, RoutingTable, Space, Target};
use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::Arc;

/// Adds up what it gets.
struct Sum(u64);

impl Sum {
    #[inline(never)]
    fn add(&mut self, value: u64) -> u64 {
        self.0 = self.0.wrapping_add(value);
        self.0
    }
}

impl Actor for Sum {
    type Message = u64;
    type Reply = u64;
    const RANK: Rank = Rank::Device;
    fn handle(&mut self, value: u64) -> u64 {
        self.add(value)
    }
}

/// A register that remembers.
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
    fn classify(&self) -> fn(Access, Direction) -> AccessClass {
        |_, direction| match direction {
            Direction::Read => AccessClass::Ask,
            Direction::Write => AccessClass::Post,
        }
    }
}

fn mailbox(c: &mut Criterion) {
    let mut group = c.benchmark_group("mailbox");
    let locked = <Std<Sum> as Mutex<Sum>>::new(Sum(0));
    group.bench_function("std mutex, uncontended", |b| {
        b.iter(|| Mutex::lock(&locked).add(black_box(1)));
    });
    let spawned = Address::spawn(Sum(0), "sum", Placement::Handoff, 1, |_| {}).expect("no thread is started");
    let mut port = spawned.address.connect().expect("one lane");
    group.bench_function("ask, idle handoff", |b| b.iter(|| port.ask(black_box(1))));
    group.bench_function("post, idle handoff", |b| b.iter(|| port.post(black_box(1))));
    let resident = Address::spawn(Sum(0), "sum", Placement::Thread, 1, |_| {}).expect("a thread");
    let mut port = resident.address.connect().expect("one lane");
    group.bench_function("ask, thread", |b| b.iter(|| port.ask(black_box(1))));
    group.bench_function("post, thread", |b| b.iter(|| port.post(black_box(1))));
    port.stop();
    group.finish();
}

fn routing(c: &mut Criterion) {
    let mut group = c.benchmark_group("routing");
    let mut table = RoutingTable::new(Clock::new(), slog::Logger::root(slog::Discard, slog::o!()));
    for n in 0..16 {
        let outside = Surroundings {
            life: None,
            clock: Clock::new(),
            line: None,
            character: None,
            timer: None,
            requests: Box::new(|_| {}),
        };
        let device: Box<dyn Device> = Box::new(Register(0));
        let classify = device.classify();
        let shell = Shell::new(device, outside);
        let spawned =
            Address::spawn(shell, "register", Placement::Handoff, 1, |_| {}).expect("no thread is started");
        let device = table.connect(spawned.address.connect().expect("one lane"));
        let start = 0x100 * n;
        let route = Route {
            start,
            last: start + 7,
            base: 0,
            target: Target::Device { device, classify },
        };
        table.insert(Space::Pio, route).expect("no overlap");
    }
    let timer = Target::Published(Arc::new(Box::new(PmTimer::new())));
    table
        .insert(
            Space::Pio,
            Route {
                start: 0x2000,
                last: 0x2003,
                base: 0,
                target: timer,
            },
        )
        .expect("no overlap");
    group.bench_function("read, same device", |b| {
        b.iter(|| table.port_in(black_box(0x300), Width::Byte))
    });
    let mut port = 0;
    group.bench_function("read, another device each time", |b| {
        b.iter(|| {
            port = (port + 0x500) & 0xfff & !0xff;
            table.port_in(black_box(port), Width::Byte)
        });
    });
    group.bench_function("posted write", |b| {
        b.iter(|| table.port_out(black_box(0x300), Width::Byte, 1))
    });
    group.bench_function("published read", |b| {
        b.iter(|| table.port_in(black_box(0x2000), Width::Dword))
    });
    group.bench_function("nobody", |b| {
        b.iter(|| table.port_in(black_box(0x3000), Width::Byte))
    });
    group.finish();
}

criterion_group!(benches, mailbox, routing);
criterion_main!(benches);
