//! A queue's actor: a thread that serves one virtqueue.
//!
//! Owns: the queue's place in its rings, the handler with what it needs of the host. Receives: [`Start`], rings of its
//! bell, the order to end. Posts to: its device's register side. Asks: nobody. Rank: backend. Ends: when the machine
//! does; if the host does not return from a read until then it is left behind.
//!
//! The register side reaches it through a [`Remote`], which never waits for the host: a start replaces one that was not
//! taken yet, a ring is one write to an eventfd (KVM's own under `--notify eventfd`), a stop takes the lease back
//! (`lease.rs`). A request that is under way then is dropped at its next touch of guest memory.
//!
//! What a hostile driver can try: chains of any kind (`chain.rs`), indices that jump, rings that change while they are
//! read. It gets DEVICE_NEEDS_RESET [VIRTIO 1.2 §2.1.2] and a queue that stands still, one line in the log at a bounded
//! rate, and nobody but itself is served worse. Memory: [`super::CHUNK_BYTES`] and a chain's descriptors a queue.

use super::chain::{Chain, Fault, Malformed};
use super::complaints::Complaints;
use super::interrupt::{self, Latch};
use super::lease::{Epoch, Lessee, Lessor, Refused, Touch, lease};
use super::{BackendEvent, BackendNews, CHUNK_BYTES};
use crate::actors::{Rank, RankGuard};
use crate::devices::shell::DeviceMessage;
use crate::host::events::Tell;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;
use slog::Logger;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// When the register side's mailbox had no room for our news, it is tried again after this.
const RETRY: Duration = Duration::from_millis(1);

/// A queue to serve.
pub struct Start {
    epoch: Epoch,
    /// Which of the device's lives the news belong to.
    life: u32,
    queue: Queue,
    features: u64,
}

/// Why a request's handling ends before its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interruption {
    /// The device was reset, or the machine ends. Nothing more may be done for the driver.
    Gone,
    /// The driver made a mistake after which the queue cannot be served.
    Broken(Malformed),
}

impl From<Malformed> for Interruption {
    fn from(mistake: Malformed) -> Self {
        Interruption::Broken(mistake)
    }
}

/// What a device does with a request. Runs on the queue's own thread, and may block there.
pub trait Handler: Send {
    /// A driver has started the device with these features.
    fn start(&mut self, _features: u64) {}

    /// Does what the request says. Returns how many bytes were written to the driver's buffers.
    ///
    /// # Errors
    /// [`Interruption`]: that of an access to the request, passed on.
    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption>;
}

/// One request, as a handler sees it.
pub struct Request<'a> {
    chain: &'a Chain,
    guest: &'a Guest,
    epoch: Epoch,
    /// [`CHUNK_BYTES`] for the handler's use.
    pub buffer: &'a mut [u8],
}

impl Request<'_> {
    /// Bytes that the driver gives.
    pub fn readable_bytes(&self) -> u64 {
        self.chain.readable_bytes()
    }

    /// Bytes that the driver has room for.
    pub fn writable_bytes(&self) -> u64 {
        self.chain.writable_bytes()
    }

    /// Copies the first `length` bytes of the buffer from what the driver gave. `Ok(Err)`: it cannot be read.
    ///
    /// # Errors
    /// [`Interruption::Gone`].
    pub fn load(&mut self, offset: u64, length: usize) -> Result<Result<(), Fault>, Interruption> {
        let _touch = self.guest.touch(self.epoch)?;
        Ok(self
            .chain
            .load(&self.guest.memory, offset, &mut self.buffer[..length]))
    }

    /// Copies the first `length` bytes of the buffer to where the driver has room.
    ///
    /// # Errors
    /// [`Interruption::Gone`].
    pub fn store(&mut self, offset: u64, length: usize) -> Result<Result<(), Fault>, Interruption> {
        let _touch = self.guest.touch(self.epoch)?;
        Ok(self
            .chain
            .store(&self.guest.memory, offset, &self.buffer[..length]))
    }
}

/// Guest memory, and the right to touch it.
struct Guest {
    memory: GuestMemoryMmap,
    lease: Lessee,
    bell: Arc<EventFd>,
    ending: Arc<AtomicBool>,
}

impl Guest {
    /// Begins a touch; waits while the machine is paused.
    fn touch(&self, epoch: Epoch) -> Result<Touch<'_>, Interruption> {
        loop {
            match self.lease.touch(epoch) {
                Ok(touch) => return Ok(touch),
                Err(Refused::Revoked) => return Err(Interruption::Gone),
                Err(Refused::Suspended) if self.ending.load(Ordering::Acquire) => {
                    return Err(Interruption::Gone);
                }
                // Whoever resumes, resets or ends the machine rings. What else rang is found when the queue is looked
                // at again, which it always is after a request.
                Err(Refused::Suspended) => self.rest(None),
            }
        }
    }

    /// Sleeps until the bell rings.
    fn rest(&self, limit: Option<Duration>) {
        // SAFETY: the descriptor belongs to `self.bell`, which outlives the poll.
        let bell = unsafe { BorrowedFd::borrow_raw(self.bell.as_raw_fd()) };
        let mut polled = [PollFd::new(bell, PollFlags::POLLIN)];
        match ppoll(&mut polled, limit.map(TimeSpec::from), None::<SigSet>) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => drop(self.bell.read()),
            // Out of kernel memory. Not to spin meanwhile.
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

/// The register side's end: [`super::registers::Backend`] is made of these.
pub struct Remote {
    lease: Lessor,
    starts: Sender<Start>,
    /// To take back a start that was not taken.
    untaken: Receiver<Start>,
    bell: Arc<EventFd>,
}

impl Remote {
    /// Has the queue served. It must be valid, and not be served now.
    pub fn start(&self, queue: Queue, features: u64, life: u32) {
        let mut start = Start {
            epoch: self.lease.grant(),
            life,
            queue,
            features,
        };
        // The actor may take one out meanwhile, but we alone put some in: twice at most.
        while let Err(TrySendError::Full(back)) = self.starts.try_send(start) {
            let _ = self.untaken.try_recv();
            start = back;
        }
        self.ring();
    }

    /// There may be something to do.
    pub fn ring(&self) {
        // Fails only when the counter is full, and then it rings already.
        let _ = self.bell.write(1);
    }

    /// What rings the bell: for an ioeventfd.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Nobody touches guest memory for this queue any more.
    pub fn stop(&self) {
        if self.lease.revoke() {
            self.ring();
        }
    }

    /// The same until [`Remote::resume`].
    pub fn suspend(&self) {
        self.lease.suspend();
    }

    /// What was under way goes on.
    pub fn resume(&self) {
        self.lease.resume();
        self.ring();
    }
}

/// A queue's actor before it has a thread.
pub struct QueueActor {
    name: String,
    handler: Box<dyn Handler>,
    guest: Guest,
    starts: Receiver<Start>,
    /// `None`: interrupts go by message.
    latch: Option<Latch>,
    queue_number: u16,
    log: Logger,
}

/// An actor for a queue, and the way to it.
///
/// # Errors
/// When the host gives no eventfd.
pub fn queue_actor(
    name: String,
    queue_number: u16,
    handler: Box<dyn Handler>,
    memory: GuestMemoryMmap,
    latch: Option<Latch>,
    log: Logger,
) -> std::io::Result<(QueueActor, Remote)> {
    let bell = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
    let (starts, inbox) = bounded(1);
    let (lessor, lessee) = lease();
    let actor = QueueActor {
        name,
        handler,
        guest: Guest {
            memory,
            lease: lessee,
            bell: bell.clone(),
            ending: Arc::new(AtomicBool::new(false)),
        },
        starts: inbox.clone(),
        latch,
        queue_number,
        log,
    };
    let remote = Remote {
        lease: lessor,
        starts,
        untaken: inbox,
        bell,
    };
    Ok((actor, remote))
}

/// A queue's actor while its thread runs.
pub struct QueueHandle {
    name: String,
    ending: Arc<AtomicBool>,
    bell: Arc<EventFd>,
    ended: Receiver<()>,
    thread: JoinHandle<()>,
}

impl QueueHandle {
    /// Tells it to end; does not wait.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        let _ = self.bell.write(1);
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// Its name, when it has not by then.
    pub fn join(self, deadline: std::time::Instant) -> Result<(), String> {
        // Nobody ever sends: it ends when the other side is dropped.
        match self.ended.recv_deadline(deadline) {
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => Err(self.name),
            _ => {
                let _ = self.thread.join();
                Ok(())
            }
        }
    }
}

impl QueueActor {
    /// What rings it, for an ioeventfd.
    pub fn bell(&self) -> &EventFd {
        &self.guest.bell
    }

    /// Starts the thread. `tell`: the way to the device's register side.
    ///
    /// # Errors
    /// When the host gives no more threads.
    pub fn spawn(self, tell: Box<dyn Tell>) -> std::io::Result<QueueHandle> {
        let (name, bell, ending) = (
            self.name.clone(),
            self.guest.bell.clone(),
            self.guest.ending.clone(),
        );
        let (alive, ended) = bounded(0);
        let running = Running {
            complaints: Complaints::new(self.log),
            name: self.name,
            handler: self.handler,
            guest: self.guest,
            starts: self.starts,
            signal: Signal {
                latch: self.latch,
                tell,
                untold: None,
            },
            queue_number: self.queue_number,
            chain: Chain::default(),
            buffer: vec![0; CHUNK_BYTES],
        };
        let thread = crate::thread::spawn(format!("be:{name}"), move || {
            let _rank = RankGuard::enter(Rank::Backend);
            running.run();
            drop(alive);
        })?;
        Ok(QueueHandle {
            name,
            ending,
            bell,
            ended,
            thread,
        })
    }
}

/// How the driver is told.
struct Signal {
    latch: Option<Latch>,
    tell: Box<dyn Tell>,
    /// What the register side's mailbox had no room for. The later of two says all.
    untold: Option<BackendNews>,
}

impl Signal {
    fn tell(&mut self, life: u32, event: BackendEvent) {
        // That the device is broken must not be forgotten for a used buffer.
        let broken = self.untold == Some(BackendNews::new(life, BackendEvent::Broken));
        let event = if broken { BackendEvent::Broken } else { event };
        self.untold = Some(BackendNews::new(life, event));
        self.again();
    }

    fn again(&mut self) {
        if let Some(news) = self.untold
            && self.tell.try_tell(DeviceMessage::Backend(news))
        {
            self.untold = None;
        }
    }
}

struct Running {
    name: String,
    handler: Box<dyn Handler>,
    guest: Guest,
    starts: Receiver<Start>,
    signal: Signal,
    queue_number: u16,
    chain: Chain,
    buffer: Vec<u8>,
    complaints: Complaints,
}

impl Running {
    fn run(mut self) {
        let mut served: Option<Start> = None;
        while !self.guest.ending.load(Ordering::Acquire) {
            if let Ok(start) = self.starts.try_recv() {
                self.handler.start(start.features);
                served = Some(start);
            }
            if let Some(start) = &mut served {
                match self.serve(start) {
                    Ok(()) => {}
                    Err(Interruption::Gone) => served = None,
                    Err(Interruption::Broken(mistake)) => {
                        self.complaints.say(format_args!(
                            "{}: the driver's queue {} cannot be served any more and the driver has to reset the device: {mistake}",
                            self.name, self.queue_number
                        ));
                        self.signal.tell(start.life, BackendEvent::Broken);
                        served = None;
                    }
                }
            }
            self.signal.again();
            self.guest.rest(self.signal.untold.map(|_| RETRY));
        }
    }

    /// Serves what is there, until nothing is.
    fn serve(&mut self, start: &mut Start) -> Result<(), Interruption> {
        let Start {
            epoch, queue, life, ..
        } = start;
        let broken = |_| Interruption::Broken(Malformed::Endless);
        loop {
            while self.next(*epoch, queue)? {
                let mut request = Request {
                    chain: &self.chain,
                    guest: &self.guest,
                    epoch: *epoch,
                    buffer: &mut self.buffer,
                };
                let used = self.handler.serve(&mut request)?;
                let touch = self.guest.touch(*epoch)?;
                let memory = &self.guest.memory;
                queue.add_used(memory, self.chain.head(), used).map_err(broken)?;
                let notify = queue.needs_notification(memory).map_err(broken)?;
                // Under the lease, so that no bit is set after a reset has cleared them.
                if notify && let Some(latch) = &self.signal.latch {
                    latch.raise(interrupt::USED);
                }
                // Not under the lease: the register side may wait for it while it has the mailbox.
                drop(touch);
                if notify && self.signal.latch.is_none() {
                    self.signal.tell(*life, BackendEvent::Used);
                }
            }
            let _touch = self.guest.touch(*epoch)?;
            if !queue.enable_notification(&self.guest.memory).map_err(broken)? {
                return Ok(());
            }
        }
    }

    /// Takes the next chain. `false`: there is none.
    fn next(&mut self, epoch: Epoch, queue: &mut Queue) -> Result<bool, Interruption> {
        if self.guest.ending.load(Ordering::Acquire) {
            return Err(Interruption::Gone);
        }
        let _touch = self.guest.touch(epoch)?;
        let memory = &self.guest.memory;
        let longest = queue.max_size();
        let broken = |_| Interruption::Broken(Malformed::Endless);
        queue.disable_notification(memory).map_err(broken)?;
        // Fails when the driver's index is further ahead than the queue is long.
        let Some(chain) = queue.iter(memory).map_err(broken)?.next() else {
            return Ok(false);
        };
        self.chain.read(chain, longest)?;
        Ok(true)
    }
}
