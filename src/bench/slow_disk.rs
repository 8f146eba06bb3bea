//! What a machine's console and network notice of its disk, when that takes 50 ms for each request.
//!
//! A whole machine with scripted vCPUs: its own chipset, a disk and a network device behind virtio-mmio, with all their
//! actors. One vCPU is measured. It reads the line status of the first serial port, which is what a driver does for each
//! character; or it sends a frame through a network that gives every frame back, from the offer to the frame in its
//! memory, through both queues' actors. The other vCPU keeps four requests under way at the disk, and reads the disk's registers.
//! Drivers poll their used rings, as busy ones do, so that no interrupt is in the way.

use super::Failure;
use super::clock::{Scale, ticks};
use super::contestant::Contestant;
use super::pause::{self, Ours};
use super::plan::{Class, Load};
use super::rig::{Measure, Sample, histogram, waited_ns};
use crate::boot::layout::VIRTIO_MMIO;
use crate::devices::Width;
use crate::machine::memory;
use crate::machine::platform::NoPlatform;
use crate::machine::supervisor::{self, Unwired, Virtio};
use crate::vcpu::scripted::{self, ScriptedBackend, Step};
use crate::virtio::block::{self, Block, Disk, DiskConfig};
use crate::virtio::config::Opened;
use crate::virtio::mmio::{QUEUE_NOTIFY, WINDOW_BYTES};
use crate::virtio::net;
use crate::virtio::queue::{Handler, Interruption, Request};
use crossbeam_channel::{Sender, bounded};
use hdrhistogram::Histogram;
use nix::sys::memfd::{MFdFlags, memfd_create};
use slog::Logger;
use std::collections::VecDeque;
use std::fs::File;
use std::hint::spin_loop;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// How many requests are under way at the disk.
const DEPTH: u16 = 4;
/// What the disk has.
const DISK_BYTES: u64 = 1 << 20;
/// What a request reads.
const READ_BYTES: u32 = 4096;
/// A frame without data, and what virtio puts before it.
const FRAME_BYTES: u32 = 12 + 60;
/// Room for a frame.
const ROOM_BYTES: u32 = 2048;
/// Descriptors of a queue.
const SIZE: u16 = 8;
/// Line status of the first serial port.
const LINE_STATUS: u16 = 0x3fd;
/// How long the vCPU that keeps the disk busy sleeps between two looks: half of what one of its requests takes, as it shall
/// not be what is noticed.
const LOOK: Duration = Duration::from_millis(25);

/// A disk that takes its time.
struct Slow<H> {
    inner: H,
    time: Duration,
    /// Requests that it has begun.
    begun: Arc<AtomicU32>,
}

impl<H: Handler> Handler for Slow<H> {
    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(self.time);
        self.inner.serve(request)
    }
}

/// Both devices, in the order of their places; and the file, which has no name.
fn devices(time: Duration, begun: &Arc<AtomicU32>, log: &Logger) -> Result<(Vec<Opened>, File), Failure> {
    let file = File::from(memfd_create("disk", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
    file.set_len(DISK_BYTES)?;
    let config = DiskConfig {
        path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        read_only: true,
        queues: 1,
        serial: String::new(),
        allowance: Default::default(),
        format: None,
    };
    let mut disks = Disk::open(&config).map_err(io::Error::other)?;
    let identity = block::identity(&disks[0], 1);
    let inner = Block::new(disks.remove(0), "", log.clone());
    let disk = Opened {
        name: "blk0",
        identity,
        handlers: vec![Box::new(Slow {
            inner,
            time,
            begun: begun.clone(),
        })],
        ..Opened::bare()
    };
    let network = net::open_loop("net0", log).map_err(io::Error::other)?;
    let network = Opened {
        name: "net0",
        identity: network.identity,
        handlers: network.handlers,
        link: Some(network.link),
        ..Opened::bare()
    };
    Ok((vec![disk, network], file))
}

/// A queue as its driver has it: descriptor table, available ring and used ring on a page each, then buffers.
struct Ring {
    memory: GuestMemoryMmap,
    /// Of the device's registers.
    device: u64,
    number: u16,
    /// Of the first page.
    base: u64,
    offered: u16,
    used: u16,
}

impl Ring {
    const PAGE: u64 = 0x1000;

    fn new(memory: &GuestMemoryMmap, place: u64, number: u16) -> Ring {
        let base = 0x10_0000 + (2 * place + u64::from(number)) * 0x2_0000;
        let ring = Ring {
            memory: memory.clone(),
            device: VIRTIO_MMIO + place * WINDOW_BYTES,
            number,
            base,
            offered: 0,
            used: 0,
        };
        // VRING_AVAIL_F_NO_INTERRUPT: it is polled.
        ring.put(Ring::PAGE, &1u16.to_le_bytes());
        ring
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(self.base + offset))
            .expect("rings are in the guest's memory");
    }

    /// Where a chain's buffers are, from [`Ring::base`].
    fn buffer(chain: u16) -> u64 {
        4 * Ring::PAGE + u64::from(chain) * 2 * Ring::PAGE
    }

    /// Makes a chain of buffers behind one another: bytes, and whether the device writes them. `first`: its head.
    fn describe(&self, first: u16, buffers: &[(u32, bool)]) {
        let mut address = self.base + Ring::buffer(first);
        for (number, (bytes, written)) in (first..).zip(buffers) {
            let more = usize::from(number - first) + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(*written) << 1;
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&address.to_le_bytes());
            descriptor[8..12].copy_from_slice(&bytes.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&(number + 1).to_le_bytes());
            self.put(u64::from(number) * 16, &descriptor);
            address += u64::from(*bytes);
        }
    }

    /// What tells the device where the rings are.
    fn registers(&self) -> Vec<Step> {
        let low = |page: u64| self.base + page * Ring::PAGE;
        [
            (0x30, self.number.into()), // QueueSel
            (0x38, SIZE.into()),        // QueueNum
            (0x80, low(0)),             // QueueDescLow
            (0x90, low(1)),             // QueueDriverLow
            (0xa0, low(2)),             // QueueDeviceLow
            (0x44, 1),                  // QueueReady
        ]
        .map(|(register, value)| store(self.device + register, value))
        .to_vec()
    }

    /// Gives a chain to the device, which does not hear of it yet.
    fn offer(&mut self, head: u16) {
        self.put(
            Ring::PAGE + 4 + 2 * u64::from(self.offered % SIZE),
            &head.to_le_bytes(),
        );
        self.offered = self.offered.wrapping_add(1);
        // The chain before the index.
        self.memory
            .store(
                self.offered.to_le(),
                GuestAddress(self.base + Ring::PAGE + 2),
                Ordering::Release,
            )
            .expect("rings are in the guest's memory");
    }

    fn notify(&self) -> Step {
        store(self.device + QUEUE_NOTIFY, self.number.into())
    }

    /// How many chains have come back since the last time.
    fn take(&mut self) -> u16 {
        let index: u16 = self
            .memory
            .load(GuestAddress(self.base + 2 * Ring::PAGE + 2), Ordering::Acquire)
            .expect("rings are in the guest's memory");
        let come = u16::from_le(index).wrapping_sub(self.used);
        self.used = u16::from_le(index);
        come
    }
}

fn store(address: u64, value: u64) -> Step {
    Step::Write {
        address,
        length: 4,
        value,
    }
}

/// What a driver says to a device before and after its queues; VIRTIO_F_VERSION_1 is all that it wants.
fn driven(rings: &[&Ring]) -> VecDeque<Step> {
    let device = rings[0].device;
    let mut steps = VecDeque::new();
    for (register, value) in [(0x70, 0), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 0xb)] {
        steps.push_back(store(device + register, value));
    }
    steps.extend(rings.iter().flat_map(|ring| ring.registers()));
    steps.push_back(store(device + 0x70, 0xf));
    steps
}

const WARM: u32 = 0;
const MEASURED: u32 = 1;
const OVER: u32 = 2;

/// What the measured vCPU does.
enum What {
    Console,
    Frame { receive: Ring, transmit: Ring },
}

/// The measured vCPU. Every access, or frame, counts from when it was due.
struct Victim {
    steps: VecDeque<Step>,
    what: What,
    phase: Arc<AtomicU32>,
    pace: u64,
    due: Option<u64>,
    latency: Histogram<u64>,
    /// When its first that counts began, and how long it had waited for a processor by then.
    begun: Option<(u64, u64)>,
    outcome: Sender<Told>,
}

/// What it has to say in the end.
struct Told {
    latency: Histogram<u64>,
    /// Ticks.
    elapsed: u64,
    waited_ns: u64,
}

impl Victim {
    fn is(&self, phase: u32) -> bool {
        self.phase.load(Ordering::Relaxed) == phase
    }

    /// One is done.
    fn done(&mut self) {
        let Some(due) = self.due else { return };
        if self.is(MEASURED) {
            let begun = self.begun.get_or_insert_with(|| (due, waited_ns()));
            if due >= begun.0 {
                self.latency.saturating_record(ticks().saturating_sub(due).max(1));
            }
        }
        self.due = Some(due + self.pace);
    }

    /// Waits for the frame that is under way. `false`: no more.
    fn comes_back(&mut self) -> bool {
        let What::Frame { receive, transmit } = &mut self.what else {
            return true;
        };
        let mut looks = 0u32;
        while receive.take() == 0 {
            if self.phase.load(Ordering::Relaxed) == OVER {
                return false;
            }
            looks += 1;
            // Somebody may need this processor for the frame.
            if looks.is_multiple_of(64) {
                std::thread::yield_now();
            }
            spin_loop();
        }
        transmit.take();
        receive.offer(0);
        true
    }
}

impl scripted::Source for Victim {
    fn next(&mut self) -> Option<Step> {
        if let Some(step) = self.steps.pop_front() {
            return Some(step);
        }
        if matches!(self.what, What::Frame { .. }) && self.due.is_some() && self.comes_back() {
            self.done();
        }
        let due = *self.due.get_or_insert_with(ticks);
        while ticks() < due && !self.is(OVER) {
            spin_loop();
        }
        if self.is(OVER) {
            if let Some((begun, waited)) = self.begun.take() {
                let _ = self.outcome.try_send(Told {
                    latency: std::mem::replace(&mut self.latency, histogram()),
                    elapsed: ticks() - begun,
                    waited_ns: waited_ns().saturating_sub(waited),
                });
            }
            std::thread::sleep(Duration::from_micros(100));
            return Some(line_status());
        }
        Some(match &mut self.what {
            What::Console => line_status(),
            What::Frame { transmit, .. } => {
                transmit.offer(0);
                transmit.notify()
            }
        })
    }

    fn seen(&mut self, _: &Step, _: u64) {
        if matches!(self.what, What::Console) && !self.is(OVER) {
            self.done();
        }
    }
}

fn line_status() -> Step {
    Step::In {
        port: LINE_STATUS,
        width: Width::Byte,
        count: 1,
        expect: None,
    }
}

/// The vCPU that keeps the disk busy.
struct Busy {
    steps: VecDeque<Step>,
    ring: Ring,
    free: u16,
}

impl scripted::Source for Busy {
    fn next(&mut self) -> Option<Step> {
        if let Some(step) = self.steps.pop_front() {
            return Some(step);
        }
        self.free += self.ring.take();
        if self.free == 0 {
            std::thread::sleep(LOOK);
            // InterruptStatus: the register side is not the one that is slow.
            return Some(Step::Read {
                address: self.ring.device + 0x60,
                length: 4,
                expect: None,
            });
        }
        while self.free > 0 {
            self.free -= 1;
            // All read the same into the same place, so any may stand for any.
            self.ring.offer(0);
        }
        Some(self.ring.notify())
    }

    fn seen(&mut self, _: &Step, _: u64) {}
}

/// Either of them.
enum Guest {
    Victim(Box<Victim>),
    Busy(Box<Busy>),
}

impl scripted::Source for Guest {
    fn next(&mut self) -> Option<Step> {
        match self {
            Guest::Victim(victim) => victim.next(),
            Guest::Busy(busy) => busy.next(),
        }
    }

    fn seen(&mut self, step: &Step, value: u64) {
        match self {
            Guest::Victim(victim) => victim.seen(step, value),
            Guest::Busy(busy) => busy.seen(step, value),
        }
    }
}

/// Takes a sample of so long.
pub(super) fn sample(
    load: &Load,
    who: Contestant,
    measure: Measure,
    duration: Duration,
    scale: Scale,
) -> Result<Sample, Failure> {
    let Contestant::Discipline { dispatch, .. } = who else {
        panic!("{who} has no scripted vCPUs");
    };
    pause::be_ready()?;
    let log = Logger::root(slog::Discard, slog::o!());
    let memory = memory::create(&pause::memory_config())?;
    let begun = Arc::new(AtomicU32::new(0));
    let (devices, _file) = devices(load.disk.unwrap_or_default(), &begun, &log)?;
    let phase = Arc::new(AtomicU32::new(WARM));
    let (outcome, told) = bounded(1);
    let (steps, what) = match load.class {
        Class::Console => (VecDeque::new(), What::Console),
        _ => {
            let (mut receive, transmit) = (Ring::new(&memory, 1, 0), Ring::new(&memory, 1, 1));
            receive.describe(0, &[(ROOM_BYTES, true)]);
            transmit.describe(0, &[(FRAME_BYTES, false)]);
            receive.offer(0);
            (driven(&[&receive, &transmit]), What::Frame { receive, transmit })
        }
    };
    let mut guests = vec![Guest::Victim(Box::new(Victim {
        steps,
        what,
        phase: phase.clone(),
        pace: scale.ticks(load.pace_ns.unwrap_or(0)),
        due: None,
        latency: histogram(),
        begun: None,
        outcome,
    }))];
    if load.disk.is_some() {
        let ring = Ring::new(&memory, 0, 0);
        // A header of zeroes reads from the first sector.
        ring.describe(0, &[(16, false), (READ_BYTES, true), (1, true)]);
        let steps = driven(&[&ring]);
        guests.push(Guest::Busy(Box::new(Busy {
            steps,
            ring,
            free: DEPTH,
        })));
    }
    let backends: Vec<_> = guests.into_iter().map(ScriptedBackend::new).collect();
    let vcpus = backends.len();
    let ours = Ours::start(vcpus, dispatch, move |config, inbox, log| {
        let virtio = Virtio { memory, devices };
        supervisor::run_around(
            config,
            backends,
            &Unwired,
            virtio,
            Box::new(NoPlatform),
            inbox,
            log,
        )
    })?;
    // A tenth of it, and until requests are under way.
    std::thread::sleep((duration / 10).max(Duration::from_millis(20)));
    phase.store(MEASURED, Ordering::Relaxed);
    std::thread::sleep(duration);
    phase.store(OVER, Ordering::Relaxed);
    let told = told.recv_timeout(pause::LIMIT);
    ours.end()?;
    let told = told.map_err(|_| Failure::Guest("the measured vCPU does not answer".into()))?;
    // Or nothing was shown.
    if load.disk.is_some() && begun.load(Ordering::Relaxed) < 2 {
        return Err(Failure::Guest("the disk was not kept busy".into()));
    }
    let elapsed = scale.ns(told.elapsed as f64);
    Ok(Sample {
        ops_per_s: told.latency.len() as f64 * 1e9 / elapsed,
        waited: told.waited_ns as f64 / elapsed,
        latency: match measure {
            Measure::Latency => told.latency,
            Measure::Throughput => histogram(),
        },
        ..Sample::empty()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::{Source, loads};

    #[test]
    fn consoles_and_frames_are_timed_beside_a_disk_that_is_busy() {
        let scale = Scale::calibrate();
        let mut seen = 0;
        for load in loads("victim", Source::Scripted, 2) {
            if !matches!(load.class, Class::Console | Class::Frame) {
                continue;
            }
            for who in load.contestants() {
                let long = Duration::from_millis(120);
                let sample = sample(&load, who, Measure::Latency, long, scale).unwrap();
                // In the time of two of the disk's requests.
                assert!(sample.latency.len() > 2, "{who}: {load:?}");
                assert!(sample.ops_per_s > 0.0);
                seen += 1;
            }
        }
        assert_eq!(seen, 8);
    }
}
