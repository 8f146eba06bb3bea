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
use super::interrupt::Interrupter;
use super::lease::{Epoch, Lessee, Lessor, Refused, Touch, lease};
use super::straight::Pieces;
use super::used::{give_back, put_back};
use super::{BackendEvent, BackendNews, CHUNK_BYTES, Queues};
use crate::actors::{Rank, RankGuard};
use crate::devices::shell::DeviceMessage;
use crate::host::events::Tell;
use crate::machine::memory;
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

/// What is given back to the host in one touch, bytes: a huge page.
pub const DISCARD_BYTES: u64 = 2 << 20;

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
    /// The request is not finished: it stays at the head of the queue, and is tried again when [`Handler::prepare`] agrees.
    Untaken,
}

impl From<Malformed> for Interruption {
    fn from(mistake: Malformed) -> Self {
        Interruption::Broken(mistake)
    }
}

/// What a device does with a request. Runs on the queue's own thread, and may block there.
pub trait Handler: Send {
    /// A driver has started the device with these features. `life`: which start it is; the device's queues are told the
    /// same.
    fn start(&mut self, _features: u64, _life: u32) {}

    /// The driver has reset the device, or broken it. Called when the actor finds out, which is soon.
    fn stopped(&mut self) {}

    /// Gets ready for the next request, before it is taken. Must not wait. `false`: not now; it is tried again when the
    /// bell rings, or what [`Handler::waits_for`] says has happened.
    fn prepare(&mut self) -> bool {
        true
    }

    /// What the host has to do before [`Handler::prepare`] can succeed, if it is not the driver who has to.
    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        None
    }

    /// What of the host is to be noticed while it is the driver who has to do something. [`Handler::noticed`] is called
    /// then, and [`Handler::prepare`]; after these it must have ceased, or this must be none.
    fn watches(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        None
    }

    /// See [`Handler::watches`].
    fn noticed(&mut self) {}

    /// How much room the next request has to have, bytes: so many of the driver's chains are put together for it, if
    /// there are.
    fn room(&self) -> u64 {
        0
    }

    /// Whether the device's published configuration ([`super::registers::Published`]) has changed, and the driver is to
    /// be told. Asked whenever the actor has been awake.
    fn reconfigured(&mut self) -> bool {
        false
    }

    /// Bytes that the last request has moved and that were in none of its buffers. For a limit.
    fn beside(&self) -> u64 {
        0
    }

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

    /// Where the driver has room: addresses and bytes.
    pub fn writable(&self) -> impl ExactSizeIterator<Item = (u64, u64)> {
        self.chain
            .writable()
            .iter()
            .map(|segment| (segment.address, segment.bytes.into()))
    }

    /// Gives a piece of guest memory back to the host, in touches of [`DISCARD_BYTES`] at most; see
    /// [`memory::discard`]. `Ok(Err)`: the host does not take it.
    ///
    /// # Errors
    /// [`Interruption::Gone`].
    pub fn discard(&self, address: u64, bytes: u64) -> Result<std::io::Result<u64>, Interruption> {
        let (mut done, mut given) = (0, 0);
        while done < bytes {
            let part = (bytes - done).min(DISCARD_BYTES);
            let Some(from) = address.checked_add(done) else {
                break;
            };
            let _touch = self.guest.touch(self.epoch)?;
            match memory::discard(&self.guest.memory, from, part) {
                Ok(bytes) => given += bytes,
                Err(error) => return Ok(Err(error)),
            }
            done += part;
        }
        Ok(Ok(given))
    }

    /// How many of the driver's chains it is made of.
    pub fn chains(&self) -> usize {
        self.chain.heads().len()
    }

    /// Copies what the driver gave. `Ok(Err)`: it cannot be read.
    ///
    /// # Errors
    /// [`Interruption::Gone`].
    pub fn load_into(&self, offset: u64, bytes: &mut [u8]) -> Result<Result<(), Fault>, Interruption> {
        let _touch = self.guest.touch(self.epoch)?;
        Ok(self.chain.load(&self.guest.memory, offset, bytes))
    }

    /// Copies to where the driver has room.
    ///
    /// # Errors
    /// [`Interruption::Gone`].
    pub fn store_from(&self, offset: u64, bytes: &[u8]) -> Result<Result<(), Fault>, Interruption> {
        let _touch = self.guest.touch(self.epoch)?;
        Ok(self.chain.store(&self.guest.memory, offset, bytes))
    }

    /// Has `transfer` take `length` bytes of what the driver gave from where they are, in one touch: it must not wait for
    /// anything but memory ([`super::straight`]). Returns how many it took. `Ok(Err)`: they cannot be read.
    ///
    /// # Errors
    /// [`Interruption::Gone`].
    pub fn take_straight(
        &self,
        offset: u64,
        length: usize,
        transfer: impl FnOnce(&Pieces<'_>) -> usize,
    ) -> Result<Result<usize, Fault>, Interruption> {
        let _touch = self.guest.touch(self.epoch)?;
        let given = self.chain.given(&self.guest.memory, offset, length);
        Ok(given.map(|given| transfer(&given)))
    }

    /// The same of bytes to where the driver has room.
    ///
    /// # Errors
    /// [`Interruption::Gone`].
    pub fn give_straight(
        &self,
        offset: u64,
        length: usize,
        transfer: impl FnOnce(&Pieces<'_>) -> usize,
    ) -> Result<Result<usize, Fault>, Interruption> {
        let _touch = self.guest.touch(self.epoch)?;
        let room = self.chain.room(&self.guest.memory, offset, length);
        Ok(room.map(|room| transfer(&room)))
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
        match self.lease.touch(epoch) {
            Ok(touch) => Ok(touch),
            Err(Refused::Revoked) => Err(Interruption::Gone),
            Err(Refused::Suspended) => self.touch_when_resumed(epoch),
        }
    }

    #[cold]
    fn touch_when_resumed(&self, epoch: Epoch) -> Result<Touch<'_>, Interruption> {
        let touch = loop {
            match self.lease.touch(epoch) {
                Ok(touch) => break Ok(touch),
                Err(Refused::Revoked) => break Err(Interruption::Gone),
                Err(Refused::Suspended) if self.ending.load(Ordering::Acquire) => {
                    break Err(Interruption::Gone);
                }
                // Whoever resumes, resets or ends the machine rings.
                Err(Refused::Suspended) => drop(self.rest(None, None)),
            }
        };
        // So may have others, as one with the above: the driver, or a new start. Whoever rests next has to hear it too.
        let _ = self.bell.write(1);
        touch
    }

    /// Sleeps until the bell rings, or the host has done something. Returns whether it has.
    fn rest(&self, limit: Option<Duration>, host: Option<(BorrowedFd<'_>, PollFlags)>) -> bool {
        // SAFETY: the descriptor belongs to `self.bell`, which outlives the poll.
        let bell = unsafe { BorrowedFd::borrow_raw(self.bell.as_raw_fd()) };
        let (fd, events) = host.unwrap_or((bell, PollFlags::POLLIN));
        let mut polled = [PollFd::new(bell, PollFlags::POLLIN), PollFd::new(fd, events)];
        let polled = &mut polled[..1 + usize::from(host.is_some())];
        match ppoll(polled, limit.map(TimeSpec::from), None::<SigSet>) {
            Ok(_) if polled[0].any() == Some(true) => drop(self.bell.read()),
            Ok(_) | Err(Errno::EINTR) => {}
            // Out of kernel memory. Not to spin meanwhile.
            Err(_) => std::thread::sleep(RETRY),
        }
        polled.get(1).is_some_and(|host| host.any() == Some(true))
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
    interrupter: Option<Interrupter>,
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
    interrupter: Option<Interrupter>,
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
        interrupter,
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
                interrupter: self.interrupter,
                tell,
                untold: None,
                unconfigured: None,
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
    interrupter: Option<Interrupter>,
    tell: Box<dyn Tell>,
    /// What the register side's mailbox had no room for.
    untold: Option<BackendNews>,
    /// The same of changes of the configuration.
    unconfigured: Option<BackendNews>,
}

impl Signal {
    fn tell(&mut self, life: u32, event: BackendEvent) {
        let news = BackendNews::new(life, event);
        self.untold = Some(self.untold.map_or(news, |earlier| earlier.and(news)));
        self.again();
    }

    /// The same of a change of the configuration.
    fn tell_change(&mut self, life: u32) {
        self.unconfigured = Some(BackendNews::new(life, BackendEvent::Reconfigured));
        self.again();
    }

    fn again(&mut self) {
        for news in [&mut self.unconfigured, &mut self.untold] {
            if let Some(what) = *news
                && self.tell.try_tell(DeviceMessage::Backend(what))
            {
                *news = None;
            }
        }
    }

    /// When to try again.
    fn retry(&self) -> Option<Duration> {
        (self.untold.is_some() || self.unconfigured.is_some()).then_some(RETRY)
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
                self.handler.start(start.features, start.life);
                served = Some(start);
            }
            let mut rest = Rest::ForDriver;
            if let Some(start) = &mut served {
                match self.serve(start) {
                    Ok(how) => rest = how,
                    Err(Interruption::Gone | Interruption::Untaken) => {
                        self.handler.stopped();
                        served = None;
                    }
                    Err(Interruption::Broken(mistake)) => {
                        self.complaints.say(format_args!(
                            "{}: the driver's queue {} cannot be served any more and the driver has to reset the device: {mistake}",
                            self.name, self.queue_number
                        ));
                        self.signal.tell(start.life, BackendEvent::Broken);
                        self.handler.stopped();
                        served = None;
                    }
                }
            }
            if self.handler.reconfigured()
                && let Some(start) = &served
            {
                self.tell_change(start.epoch, start.life);
            }
            self.signal.again();
            let host = match rest {
                Rest::ForHost => self.handler.waits_for(),
                Rest::ForDriver => self.handler.watches(),
            };
            let woken_by_host = self.guest.rest(self.signal.retry(), host);
            if woken_by_host && rest == Rest::ForDriver {
                self.handler.noticed();
            }
        }
    }

    /// Tells the driver that the configuration has changed, unless it is gone: then it looks anyway.
    fn tell_change(&mut self, epoch: Epoch, life: u32) {
        // Under the lease, so that nothing is raised after a reset has cleared what is.
        let told = match &self.signal.interrupter {
            Some(interrupter) => match self.guest.touch(epoch) {
                Ok(_touch) => interrupter.configuration(),
                Err(_) => true,
            },
            None => false,
        };
        if !told {
            self.signal.tell_change(life);
        }
    }

    /// Serves what is there, until nothing is. Returns what has to happen next.
    fn serve(&mut self, start: &mut Start) -> Result<Rest, Interruption> {
        let Start {
            epoch, queue, life, ..
        } = start;
        let broken = |_| Interruption::Broken(Malformed::Endless);
        loop {
            if self.guest.ending.load(Ordering::Acquire) {
                return Err(Interruption::Gone);
            }
            if !self.handler.prepare() {
                // A reset while the host does nothing is found out here: nobody rings for what is not served any more.
                drop(self.guest.touch(*epoch)?);
                return Ok(Rest::ForHost);
            }
            if !self.gather(*epoch, queue)? {
                return Ok(Rest::ForDriver);
            }
            let mut request = Request {
                chain: &self.chain,
                guest: &self.guest,
                epoch: *epoch,
                buffer: &mut self.buffer,
            };
            let used = match self.handler.serve(&mut request) {
                Err(Interruption::Untaken) => {
                    put_back(queue, &self.chain);
                    continue;
                }
                result => result?,
            };
            let touch = self.guest.touch(*epoch)?;
            let notify = give_back(queue, &self.guest.memory, &self.chain, used).map_err(broken)?;
            // Under the lease, so that nothing is raised after a reset has cleared what is.
            let by_message = notify && !self.signal.interrupter.as_ref().is_some_and(Interrupter::used);
            // Not under the lease: the register side may wait for it while it has the mailbox.
            drop(touch);
            if by_message {
                let this = Queues::one(self.queue_number.into());
                self.signal.tell(*life, BackendEvent::Used(this));
            }
        }
    }

    /// Takes the next request: a chain, or as many as have the room that the handler needs. `false`: they are not there
    /// yet, and the driver will notify when there are more.
    fn gather(&mut self, epoch: Epoch, queue: &mut Queue) -> Result<bool, Interruption> {
        let broken = |_| Interruption::Broken(Malformed::Endless);
        let room = self.handler.room();
        self.chain.clear();
        loop {
            if self.next(epoch, queue)? {
                if self.chain.writable_bytes() >= room || self.chain.is_full(queue.size()) {
                    return Ok(true);
                }
                continue;
            }
            let _touch = self.guest.touch(epoch)?;
            if !queue.enable_notification(&self.guest.memory).map_err(broken)? {
                put_back(queue, &self.chain);
                return Ok(false);
            }
        }
    }

    /// Takes the next chain. `false`: there is none.
    fn next(&mut self, epoch: Epoch, queue: &mut Queue) -> Result<bool, Interruption> {
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

/// What a queue's actor sleeps for, beside its bell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rest {
    /// Nothing.
    ForDriver,
    /// What its handler waits for.
    ForHost,
}
