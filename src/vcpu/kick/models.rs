//! Loom models of the kick: up to two kickers, a vCPU in a guest that never leaves by itself, and the end of its thread.

use super::*;
use crate::actors::park::Futex;
use loom::cell::UnsafeCell;
use loom::thread;

/// The vCPU's thread as the host and its kickers see it.
struct Thread {
    /// A signal has come: a stay in the guest ends, or the next one at once.
    interrupted: Futex,
    /// As [`ThreadSignal`]'s: set before the first stay, with no ordering of its own.
    id: AtomicU32,
    /// Read by every signal, written by the end of the thread, with nothing but the protocol to order them.
    exists: UnsafeCell<bool>,
    /// For the count of signals only.
    signals: std::sync::atomic::AtomicU32,
}

// SAFETY: `exists` is what loom watches: it fails the model when a read and the write are not ordered.
unsafe impl Send for Thread {}
// SAFETY: as above.
unsafe impl Sync for Thread {}

impl Signal for Arc<Thread> {
    fn send(&self) {
        assert_eq!(
            self.id.load(Ordering::Relaxed),
            1,
            "a signal to a thread that is not known"
        );
        self.exists.with(|exists| {
            // SAFETY: see `Thread`.
            assert!(unsafe { *exists }, "a signal to a thread that has ended");
        });
        self.signals.fetch_add(1, Ordering::Relaxed);
        self.interrupted.swap(1, Ordering::Relaxed);
        self.interrupted.wake();
    }
}

impl Thread {
    fn new() -> Arc<Thread> {
        Arc::new(Thread {
            interrupted: Futex::new(0),
            id: AtomicU32::new(0),
            exists: UnsafeCell::new(true),
            signals: std::sync::atomic::AtomicU32::new(0),
        })
    }

    /// One stay in a guest that never leaves by itself.
    fn stay(&self) {
        while self.interrupted.load(Ordering::Relaxed) == 0 {
            self.interrupted.wait(0);
        }
        self.interrupted.swap(0, Ordering::Relaxed);
    }

    fn end(&self) {
        // SAFETY: see `Thread`.
        self.exists.with_mut(|exists| unsafe { *exists = false });
    }
}

/// The life of a vCPU until it has seen `wanted` messages. Returns its stays in the guest.
fn run_until(receiver: &KickReceiver<Arc<Thread>>, this: &Thread, mailbox: &AtomicU32, wanted: u32) -> u32 {
    let mut stays = 0;
    this.id.store(1, Ordering::Relaxed);
    loop {
        if receiver.enter() {
            stays += 1;
            this.stay();
            receiver.leave();
        }
        // Relaxed on purpose: the kick alone must make the message visible.
        if mailbox.load(Ordering::Relaxed) == wanted {
            receiver.gone();
            this.end();
            return stays;
        }
    }
}

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// Before the thread is ready, while it is inside, outside or between, and after it is gone.
#[test]
pub(crate) fn loom_a_kick_is_never_lost() {
    explore(|| {
        let thread = Thread::new();
        let (handle, receiver) = kick(thread.clone());
        let mailbox = Arc::new(AtomicU32::new(0));
        let inbox = mailbox.clone();
        let vcpu = thread::spawn(move || run_until(&receiver, &thread, &inbox, 1));
        mailbox.store(1, Ordering::Relaxed);
        handle.kick();
        vcpu.join().unwrap();
        handle.kick();
    });
}

#[test]
pub(crate) fn loom_two_kickers_are_both_heard_and_a_burst_costs_one_signal() {
    explore(|| {
        let thread = Thread::new();
        let (handle, receiver) = kick(thread.clone());
        let mailbox = Arc::new(AtomicU32::new(0));
        let inbox = mailbox.clone();
        let this = thread.clone();
        let vcpu = thread::spawn(move || run_until(&receiver, &this, &inbox, 2));
        let (other, outbox) = (handle.clone(), mailbox.clone());
        let kicker = thread::spawn(move || {
            outbox.fetch_add(1, Ordering::Relaxed);
            other.kick();
        });
        mailbox.fetch_add(1, Ordering::Relaxed);
        handle.kick();
        kicker.join().unwrap();
        let stays = vcpu.join().unwrap();
        let signals = thread.signals.load(Ordering::Relaxed);
        assert!(signals <= stays, "{signals} signals for {stays} stays");
    });
}

/// A thread that panics in the middle of a stay has not left it when it ends.
#[test]
pub(crate) fn loom_a_thread_that_ends_inside_gets_no_signal() {
    explore(|| {
        let thread = Thread::new();
        let (handle, receiver) = kick(thread.clone());
        let vcpu = thread::spawn(move || {
            thread.id.store(1, Ordering::Relaxed);
            receiver.enter();
            receiver.gone();
            thread.end();
        });
        handle.kick();
        vcpu.join().unwrap();
        handle.kick();
    });
}
