//! One sample: devices under a discipline, vCPUs that access them for a while, and what came of it.
//!
//! A vCPU here is a thread that does what a running vCPU does ([`step`]) with a guest that leaves again at once: the
//! exit is decoded from a `kvm_run` page, routed, served by the device and answered. Throughput is counted in runs that
//! look at no clock; latencies come from other runs, which look before and after each access.

use super::clock::{Scale, spin, ticks};
use super::contestant::Contestant;
use super::devices::Stopwatch;
use super::devices::{Register, Word, Work};
use super::plan::{Class, Load, STORM_CALLBACK_NS, STORM_CALLBACKS, STORM_POLL_NS};
use crate::actors::{PlacementKind, Rank, RankGuard};
use crate::baselines::mutex;
use crate::boot::EntryPoint;
use crate::clock::Clock;
use crate::devices::Device;
use crate::devices::debug_exit::DebugExit;
use crate::devices::shell::{DeviceMessage, RequestSink, Shell, Surroundings};
use crate::guests::meter::END_PORT;
use crate::host::events::{Deliver, Gate};
use crate::machine::chipset::DeviceSet;
use crate::machine::dispatch::{Actors, BigLock, Channels, DeviceLocks, Discipline, Dispatch, MutexKind};
use crate::vcpu::activity::Activity;
use crate::vcpu::backend::{Backend, ResetError, RunError};
use crate::vcpu::exit::{AccessExit, Exit, decode, decode_access};
use crate::vcpu::registers::Registers;
use crate::vcpu::route::{Bus, Route, RouteMap, Space, Target};
use crate::vcpu::step;
use crossbeam_channel::Sender;
use crossbeam_utils::CachePadded;
use hdrhistogram::Histogram;
use kvm_bindings as kvm;
use slog::Logger;
use std::hint::{black_box, spin_loop};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Measure {
    /// Accesses a second, without a look at a clock.
    Throughput,
    /// How long each takes.
    Latency,
}

/// What came of one sample.
pub struct Sample {
    /// Of all measured vCPUs.
    pub ops_per_s: f64,
    /// In ticks of the counter, of all measured vCPUs; empty for [`Measure::Throughput`].
    pub latency: Histogram<u64>,
    /// Part of the time that the measured vCPUs wanted a processor and had none: somebody else did.
    pub waited: f64,
    /// How often a thread of this process went to sleep, per access.
    pub sleeps: f64,
    /// How often one that could run lost its processor, or gave it up, per access.
    pub yields: f64,
    /// How long each was queued, served and replied, in ticks, where that is told apart.
    pub parts: Option<[Histogram<u64>; 3]>,
}

impl Sample {
    /// Of nothing.
    pub fn empty() -> Sample {
        Sample {
            ops_per_s: 0.0,
            latency: histogram(),
            waited: 0.0,
            sleeps: 0.0,
            yields: 0.0,
            parts: None,
        }
    }
}

/// How often threads of this process have gone to sleep by themselves so far, and how often they have lost their
/// processor otherwise. [getrusage(2): ru_nvcsw, ru_nivcsw]
fn switches() -> (i64, i64) {
    use nix::sys::resource::{UsageWho, getrusage};
    getrusage(UsageWho::RUSAGE_SELF).map_or((0, 0), |usage| {
        (
            usage.voluntary_context_switches(),
            usage.involuntary_context_switches(),
        )
    })
}

/// Nanoseconds that this thread has waited for a processor so far; 0 where the host does not say.
pub(super) fn waited_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    // Time on a processor, time waiting for one, how often.
    let waited = text.split_ascii_whitespace().nth(1);
    waited.and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

/// An empty histogram for ticks up to about a minute, with three significant digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 1 << 38, 3).expect("the bounds are in order")
}

/// Where in the pretended mapping the data of a port access is: behind the page, as with KVM.
const DATA_OFFSET: u64 = 0x1000;
/// Port of the first device; each has a range of this many.
const PORTS: u64 = 0x1000;
const PORTS_EACH: u64 = 8;
/// Of the published word.
pub(super) const PUBLISHED_PORT: u64 = 0xf000;
/// Where the registers of a load with [`Load::split`] are: memory, for eight bytes.
const STOPWATCHES: u64 = 0xd000_0000;
const STOPWATCH_BYTES: u64 = 0x1000;

/// First port of a device.
pub(super) fn port_of(device: usize) -> u64 {
    PORTS + PORTS_EACH * device as u64
}

/// A guest that does the same access again and again.
struct Again {
    run: Box<kvm::kvm_run>,
    data: [u8; 4],
    mmio: [u8; 8],
}

impl Again {
    fn new(port: u64, write: bool) -> Again {
        let mut run = Box::new(kvm::kvm_run {
            exit_reason: kvm::KVM_EXIT_IO,
            ..Default::default()
        });
        run.__bindgen_anon_1.io = kvm::kvm_run__bindgen_ty_1__bindgen_ty_4 {
            direction: if write {
                kvm::KVM_EXIT_IO_OUT as u8
            } else {
                kvm::KVM_EXIT_IO_IN as u8
            },
            size: 4,
            port: port as u16,
            count: 1,
            data_offset: DATA_OFFSET,
        };
        Again {
            run,
            data: [0; 4],
            mmio: [0; 8],
        }
    }

    /// One that loads eight bytes.
    fn load(address: u64) -> Again {
        let mut again = Again::new(0, false);
        again.run.exit_reason = kvm::KVM_EXIT_MMIO;
        again.run.__bindgen_anon_1.mmio = kvm::kvm_run__bindgen_ty_1__bindgen_ty_6 {
            phys_addr: address,
            len: 8,
            ..Default::default()
        };
        again
    }
}

impl Backend for Again {
    #[inline]
    fn run(&mut self) -> Result<(), RunError> {
        // As far as the compiler knows the guest could have written anything.
        black_box(self);
        Ok(())
    }

    #[inline]
    fn exit(&mut self) -> Exit {
        decode(&self.run)
    }

    #[inline]
    fn access(&mut self) -> Option<AccessExit> {
        decode_access(&self.run)
    }

    #[inline]
    fn pio_data(&mut self, offset: u64, length: usize) -> Option<&mut [u8]> {
        let start = usize::try_from(offset.checked_sub(DATA_OFFSET)?).ok()?;
        self.data.get_mut(start..start.checked_add(length)?)
    }

    fn mmio_data(&mut self) -> &mut [u8; 8] {
        &mut self.mmio
    }

    fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut self.run.immediate_exit
    }

    fn registers(&mut self) -> Option<Registers> {
        None
    }

    fn code_at(&mut self, _linear: u64) -> Option<Vec<u8>> {
        None
    }

    fn wakes_from_halt(&self) -> bool {
        true
    }

    fn reset(&mut self, _entry: Option<&EntryPoint>) -> Result<(), ResetError> {
        Ok(())
    }
}

/// The devices of a load: the measured ones, then the slow one, then the storm's.
pub(super) fn devices(load: &Load, scale: Scale) -> DeviceSet {
    let clock = Clock::new();
    let posted = load.class == Class::Post;
    let busy = Work::Spin(scale.ticks(load.handler_ns));
    let measured = || -> Box<dyn Device> {
        match load.split {
            true => Box::new(Stopwatch::new(busy)),
            false => Box::new(Register::new(busy, posted)),
        }
    };
    let mut registers: Vec<(&'static str, Box<dyn Device>)> =
        (0..load.devices).map(|_| ("measured", measured())).collect();
    if let Some(time) = load.slow {
        registers.push(("slow", Box::new(Register::new(Work::Sleep(time), false))));
    }
    if load.storm {
        registers.push(("storm", Box::new(Register::new(Work::Spin(0), false))));
    }
    let mut routes = RouteMap::default();
    let mut shells = Vec::with_capacity(registers.len());
    for (device, (name, register)) in registers.into_iter().enumerate() {
        let classify = register.classify();
        let (space, start, bytes) = match load.split {
            true => (
                Space::Mmio,
                STOPWATCHES + STOPWATCH_BYTES * device as u64,
                STOPWATCH_BYTES,
            ),
            false => (Space::Pio, port_of(device), PORTS_EACH),
        };
        let route = Route {
            start,
            last: start + bytes - 1,
            base: 0,
            target: Target::Device { device, classify },
        };
        routes.insert(space, route).expect("the ranges are apart");
        let outside = surroundings(&clock, Box::new(|_| {}));
        shells.push((name, Shell::new(register, outside)));
    }
    let published = Route {
        start: PUBLISHED_PORT,
        last: PUBLISHED_PORT + 3,
        base: 0,
        target: Target::Published(Arc::new(Box::new(Word::default()))),
    };
    routes
        .insert(Space::Pio, published)
        .expect("it is behind the devices");
    DeviceSet {
        devices: shells,
        routes,
        clock,
    }
}

fn surroundings(clock: &Clock, requests: RequestSink) -> Surroundings {
    Surroundings {
        clock: clock.clone(),
        line: None,
        character: None,
        timer: None,
        requests,
        life: None,
    }
}

/// Adds the port at which a guest of KVM says that it is done.
pub(super) fn add_end(set: &mut DeviceSet, ended: Sender<()>) {
    let device = set.devices.len();
    let end = DebugExit::new();
    let route = Route {
        start: END_PORT.into(),
        last: END_PORT.into(),
        base: 0,
        target: Target::Device {
            device,
            classify: end.classify(),
        },
    };
    set.routes
        .insert(Space::Pio, route)
        .expect("it is before the devices");
    // Once is enough.
    let requests = Box::new(move |_| {
        let _ = ended.try_send(());
    });
    let outside = surroundings(&set.clock, requests);
    set.devices.push(("end", Shell::new(Box::new(end), outside)));
}

/// What is done with a discipline, whichever it is.
pub(super) trait WithDiscipline {
    /// What comes of it.
    type Output;

    /// Does it.
    fn run<D: Discipline>(self, discipline: D) -> Self::Output;
}

/// Puts devices behind a discipline of dispatch. `vcpus` will connect.
pub(super) fn with_discipline<W: WithDiscipline>(
    set: DeviceSet,
    dispatch: Dispatch,
    placement: PlacementKind,
    vcpus: usize,
    work: W,
) -> io::Result<W::Output> {
    Ok(match dispatch {
        Dispatch::Actor => {
            // Nobody listens: these devices ask for nothing and do not die.
            let (machine, _mailbox) = crossbeam_channel::bounded(1);
            let placements = [("measured".to_string(), placement)];
            work.run(Actors::new(set, vcpus, &placements, &machine)?)
        }
        Dispatch::Channel { spin } => work.run(Channels::new(set, spin)?),
        Dispatch::DeviceLock(MutexKind::Std) => work.run(DeviceLocks::<mutex::Std<_>>::new(set)),
        Dispatch::DeviceLock(MutexKind::ParkingLot) => {
            work.run(DeviceLocks::<mutex::ParkingLot<_>>::new(set))
        }
        Dispatch::BigLock(MutexKind::Std) => work.run(BigLock::<mutex::Std<_>>::new(set)),
        Dispatch::BigLock(MutexKind::ParkingLot) => work.run(BigLock::<mutex::ParkingLot<_>>::new(set)),
    })
}

/// Takes one sample of `duration` with scripted vCPUs, after a tenth of that to warm up.
///
/// # Errors
/// When the host cannot start a thread.
///
/// # Panics
/// When asked for somebody who is not a discipline: those run on KVM only.
pub fn sample(
    load: &Load,
    who: Contestant,
    measure: Measure,
    duration: Duration,
    scale: Scale,
) -> io::Result<Sample> {
    let Contestant::Discipline { dispatch, placement } = who else {
        panic!("{who} has no scripted vCPUs");
    };
    let set = devices(load, scale);
    let vcpus = load.vcpus + usize::from(load.slow.is_some());
    let rig = Rig {
        load,
        measure,
        duration,
        scale,
    };
    with_discipline(set, dispatch, placement, vcpus, rig)?
}

/// How long devices may take to end when all who use them have.
const END_LIMIT: Duration = Duration::from_secs(1);

const WARM: u32 = 0;
const MEASURED: u32 = 1;
const OVER: u32 = 2;

/// What all threads of a sample look at. Written twice in all.
struct Phase(CachePadded<AtomicU32>);

impl Phase {
    #[inline]
    fn is(&self, phase: u32) -> bool {
        self.0.load(Ordering::Relaxed) == phase
    }
}

struct Rig<'a> {
    load: &'a Load,
    measure: Measure,
    duration: Duration,
    scale: Scale,
}

impl WithDiscipline for Rig<'_> {
    type Output = io::Result<Sample>;

    fn run<D: Discipline>(self, mut discipline: D) -> io::Result<Sample> {
        let phase = Arc::new(Phase(CachePadded::new(AtomicU32::new(WARM))));
        let mut control = discipline.control();
        let outcome = self.run_threads(&discipline, &phase);
        // Also when a thread could not be started: those that were must end.
        phase.0.store(OVER, Ordering::Relaxed);
        control.stop(true, Instant::now() + END_LIMIT);
        outcome
    }
}

impl Rig<'_> {
    fn run_threads<D: Discipline>(&self, discipline: &D, phase: &Arc<Phase>) -> io::Result<Sample> {
        let load = self.load;
        let log = || Logger::root(slog::Discard, slog::o!());
        let mut threads = Vec::with_capacity(load.vcpus);
        let mut others: Vec<JoinHandle<()>> = Vec::new();
        for n in 0..load.vcpus {
            let device = n % load.devices;
            let guest = match load.class {
                Class::Published => Again::new(PUBLISHED_PORT, false),
                _ if load.split => Again::load(STOPWATCHES + STOPWATCH_BYTES * device as u64),
                _ => Again::new(port_of(device), load.class == Class::Post),
            };
            let vcpu = Vcpu {
                bus: discipline.bus(log()),
                guest,
                activity: Activity::new(),
                phase: phase.clone(),
                overhead: self.scale.overhead,
            };
            let pace = load.pace_ns.map(|ns| self.scale.ticks(ns));
            let (measure, split) = (self.measure, load.split);
            threads.push(crate::thread::spawn(format!("vcpu{n}"), move || {
                vcpu.run(measure, pace, split)
            })?);
        }
        let mut next = load.devices;
        if let Some(time) = load.slow {
            let vcpu = Vcpu {
                bus: discipline.bus(log()),
                guest: Again::new(port_of(next), false),
                activity: Activity::new(),
                phase: phase.clone(),
                overhead: 0,
            };
            next += 1;
            others.push(crate::thread::spawn("vcpu-slow", move || vcpu.run_slow(time))?);
        }
        if load.storm {
            let (gate, phase, scale) = (discipline.gate(), phase.clone(), self.scale);
            others.push(crate::thread::spawn("events", move || {
                storm(gate, next, &phase, scale)
            })?);
        }
        std::thread::sleep(self.duration / 10);
        let (start, (slept, yielded)) = (ticks(), switches());
        phase.0.store(MEASURED, Ordering::Relaxed);
        std::thread::sleep(self.duration);
        phase.0.store(OVER, Ordering::Relaxed);
        let now = switches();
        // Less the sleep above.
        let (slept, yielded) = ((now.0 - slept - 1).max(0), now.1 - yielded);
        let elapsed = self.scale.ns((ticks() - start) as f64);
        let (mut ops, mut waited, mut latency) = (0, 0, histogram());
        let mut parts = load.split.then(|| [(); 3].map(|()| histogram()));
        for thread in threads {
            let Outcome {
                count,
                latencies,
                parts: own,
                started,
                waited_ns,
            } = thread.join().expect("a vCPU of the bench does not panic");
            ops += count;
            waited += waited_ns + self.scale.ns(started.saturating_sub(start) as f64) as u64;
            if let Some(latencies) = latencies {
                latency.add(latencies).expect("all have the same bounds");
            }
            for (all, own) in parts.iter_mut().flatten().zip(own.iter().flatten()) {
                all.add(own).expect("all have the same bounds");
            }
        }
        for thread in others {
            thread.join().expect("a helper of the bench does not panic");
        }
        Ok(Sample {
            ops_per_s: ops as f64 * 1e9 / elapsed,
            latency,
            waited: waited as f64 / (elapsed * load.vcpus as f64),
            sleeps: slept as f64 / ops.max(1) as f64,
            yields: yielded as f64 / ops.max(1) as f64,
            parts,
        })
    }
}

/// What one vCPU has to say.
struct Outcome {
    count: u64,
    latencies: Option<Histogram<u64>>,
    parts: Option<[Histogram<u64>; 3]>,
    /// When it saw that accesses count: late, if it had no processor then.
    started: u64,
    /// Since then.
    waited_ns: u64,
}

/// The event loop of a machine whose console and timers never rest.
fn storm(mut gate: Box<dyn Gate>, device: usize, phase: &Phase, scale: Scale) {
    let _rank = RankGuard::enter(Rank::Backend);
    let (poll, callback) = (scale.ticks(STORM_POLL_NS), scale.ticks(STORM_CALLBACK_NS));
    while !phase.is(OVER) {
        spin(poll);
        gate.with(&mut |devices: &mut dyn Deliver| {
            for _ in 0..STORM_CALLBACKS {
                spin(callback);
                devices.try_send(device, DeviceMessage::InputReady);
            }
        });
    }
}

/// One vCPU of a sample.
struct Vcpu<D: Bus> {
    bus: D,
    guest: Again,
    activity: Activity,
    phase: Arc<Phase>,
    overhead: u64,
}

impl<D: Bus> Vcpu<D> {
    // As in the loop of a running vCPU, which has it as a part.
    #[inline(always)]
    fn step(&mut self) {
        let served = step(&mut self.guest, &mut self.bus, &self.activity);
        debug_assert_eq!(served, Ok(true));
    }

    /// Accesses that were measured, and how long they took if that was.
    fn run(mut self, measure: Measure, pace: Option<u64>, split: bool) -> Outcome {
        let _rank = RankGuard::enter(Rank::Vcpu);
        let mut latency = (measure == Measure::Latency).then(histogram);
        let mut parts = (split && latency.is_some()).then(|| [(); 3].map(|()| histogram()));
        while self.phase.is(WARM) {
            self.step();
        }
        let (started, waited) = (ticks(), waited_ns());
        let count = match (&mut latency, &mut parts, pace) {
            (None, _, _) => self.count(),
            (Some(latency), Some(parts), _) => self.time_split(latency, parts),
            (Some(latency), None, None) => self.time(latency),
            (Some(latency), None, Some(pace)) => self.time_paced(latency, pace),
        };
        let waited_ns = waited_ns() - waited;
        self.bus.settle();
        Outcome {
            count,
            latencies: latency,
            parts,
            started,
            waited_ns,
        }
    }

    // Each of these does one access at least: a vCPU that had no processor all the time has a rate and a latency too.

    fn count(&mut self) -> u64 {
        let mut ops = 0;
        loop {
            self.step();
            ops += 1;
            if !self.phase.is(MEASURED) {
                return ops;
            }
        }
    }

    fn time(&mut self, latency: &mut Histogram<u64>) -> u64 {
        let mut ops = 0;
        loop {
            let start = ticks();
            self.step();
            let took = ticks().saturating_sub(start).saturating_sub(self.overhead);
            latency.saturating_record(took.max(1));
            ops += 1;
            if !self.phase.is(MEASURED) {
                return ops;
            }
        }
    }

    /// The register's value is when its handler began and ended: see [`Stopwatch`]. So nothing is added to the way there
    /// and back.
    fn time_split(&mut self, latency: &mut Histogram<u64>, parts: &mut [Histogram<u64>; 3]) -> u64 {
        let mut ops = 0;
        loop {
            let start = ticks();
            self.step();
            let end = ticks();
            let (begun, done) = Stopwatch::stamps(u64::from_le_bytes(self.guest.mmio), start);
            let [queued, served, replied] = parts;
            for (part, ticks) in [
                (&mut *latency, end.saturating_sub(start)),
                (queued, begun.saturating_sub(start)),
                (served, done.saturating_sub(begun)),
                (replied, end.saturating_sub(done)),
            ] {
                part.saturating_record(ticks.saturating_sub(self.overhead).max(1));
            }
            ops += 1;
            if !self.phase.is(MEASURED) {
                return ops;
            }
        }
    }

    /// Every access counts from when it was due: one that waits holds up those behind it, and their wait is seen too.
    fn time_paced(&mut self, latency: &mut Histogram<u64>, pace: u64) -> u64 {
        let mut ops = 0;
        let mut due = ticks();
        let mut done;
        loop {
            self.step();
            done = ticks();
            let took = done.saturating_sub(due).saturating_sub(self.overhead);
            latency.saturating_record(took.max(1));
            due += pace;
            ops += 1;
            while ticks() < due && self.phase.is(MEASURED) {
                spin_loop();
            }
            if !self.phase.is(MEASURED) {
                break;
            }
        }
        // Those that were due before the last one ended, and came too late for this sample.
        while due < done {
            latency.saturating_record((done - due).max(1));
            due += pace;
        }
        ops
    }

    /// Half of the time in the handler, half not.
    fn run_slow(mut self, time: Duration) {
        let _rank = RankGuard::enter(Rank::Vcpu);
        while !self.phase.is(OVER) {
            self.step();
            std::thread::sleep(time);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::{EXPERIMENTS, Source, loads};

    #[test]
    fn every_load_runs_under_every_discipline() {
        let scale = Scale::calibrate();
        for (experiment, _) in EXPERIMENTS {
            // The first and the last: the simplest and the fullest.
            let mut loads = loads(experiment, Source::Scripted, 2);
            // Those have machines of their own.
            loads.retain(|load| !matches!(load.class, Class::Pause | Class::Console | Class::Frame));
            for load in loads.first().into_iter().chain(loads.last()) {
                for who in load.contestants() {
                    for measure in [Measure::Throughput, Measure::Latency] {
                        let sample =
                            super::sample(load, who, measure, Duration::from_millis(2), scale).unwrap();
                        assert_eq!(
                            sample.latency.is_empty() && sample.ops_per_s > 0.0,
                            measure == Measure::Throughput && sample.ops_per_s > 0.0,
                            "{who}: {load:?}"
                        );
                        let parts = sample.parts.iter().flatten();
                        assert_eq!(parts.count(), if load.split { 3 } else { 0 });
                    }
                }
            }
        }
    }

    #[test]
    fn the_pretended_guest_reads_and_writes_the_device() {
        let load = &loads("ask", Source::Scripted, 1)[0];
        let set = devices(load, Scale::calibrate());
        let discipline = BigLock::<mutex::Std<_>>::new(set);
        let mut bus = discipline.bus(Logger::root(slog::Discard, slog::o!()));
        let mut guest = Again::new(PORTS, true);
        guest.data = 7u32.to_le_bytes();
        assert_eq!(step(&mut guest, &mut bus, &Activity::new()), Ok(true));
        let mut guest = Again::new(PORTS, false);
        assert_eq!(step(&mut guest, &mut bus, &Activity::new()), Ok(true));
        assert_eq!(u32::from_le_bytes(guest.data), 7);
        assert_eq!(bus.unclaimed(), []);
    }
}
