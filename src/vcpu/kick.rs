//! The kick: how any thread makes a vCPU look into its mailbox, without a lost wake-up and without a lock.
//!
//! ```text
//!            enter()                     leave()
//!  OUTSIDE ──────────▶ INSIDE (KVM_RUN) ─────────▶ OUTSIDE        + KICKED: look into the mailbox
//!                        │ kick(): KICKED, and one signal         + GONE: the thread is past its last run
//!                        ▼
//!                      the signal's handler sets immediate_exit in the vCPU's own mapping
//! ```
//!
//! The kicker posts its message first, then marks the word, and signals only if the mark fell while the vCPU was
//! inside, and only the first mark of a stay does, so a burst costs one signal. The vCPU marks the word INSIDE
//! before KVM_RUN and does not go in if KICKED is set. Between that step and the KVM_RUN instruction the signal may
//! already arrive: its handler sets `immediate_exit`, so KVM_RUN returns at once. After it, the signal itself ends
//! KVM_RUN. So there is no window.
//!
//! The kicker never touches the mapping: only the vCPU's own thread does, in its loop or in its handler, so a kick
//! cannot write to an unmapped page. A recycled thread id cannot be hit: while a kicker is between its mark and its
//! signal it is counted, and the thread does not end before the count is 0.
//!
//! Orderings: the kicker's read-modify-write is `Release` and the vCPU's [`KickReceiver::leave`] `Acquire`, on one word:
//! a vCPU that sees KICKED sees the message that was posted before. Every kick is a read-modify-write even if KICKED is
//! set already, so that a second kicker's message is covered by the same release sequence. The other way,
//! [`KickReceiver::enter`] is `Release` and the kicker's mark `Acquire` too: who marks a stay knows the thread's id. The
//! count of signals under way goes down with `Release` and is waited for with `Acquire`. `kick/models.rs` explores all of
//! it, and finds each of these lost (`actors/planted.rs`).

use crate::actors::sync::{Arc, AtomicU32, Bug, Ordering, Site, at, planted};
use std::cell::Cell;

const INSIDE: u32 = 1;
const KICKED: u32 = 2;
const GONE: u32 = 4;
/// Kickers between their mark and their signal are counted from here up.
const SENDER: u32 = 8;

/// How a signal reaches the thread. A trait so that models can deliver it as they like.
pub trait Signal: Send + Sync + 'static {
    /// Interrupts the vCPU's thread. Called only while that thread cannot end.
    fn send(&self);
}

/// The word that the vCPU and its kickers share.
pub struct Kick<S: Signal = ThreadSignal> {
    word: AtomicU32,
    signal: S,
}

/// What a kicker holds.
pub struct KickHandle<S: Signal = ThreadSignal>(Arc<Kick<S>>);

impl<S: Signal> Clone for KickHandle<S> {
    fn clone(&self) -> Self {
        KickHandle(self.0.clone())
    }
}

/// What the vCPU holds.
pub struct KickReceiver<S: Signal = ThreadSignal>(Arc<Kick<S>>);

/// A kick and its two ends.
pub fn kick<S: Signal>(signal: S) -> (KickHandle<S>, KickReceiver<S>) {
    let shared = Arc::new(Kick {
        word: AtomicU32::new(0),
        signal,
    });
    (KickHandle(shared.clone()), KickReceiver(shared))
}

impl<S: Signal> KickHandle<S> {
    /// Makes the vCPU look into its mailbox soon. Safe at any time: before the vCPU is ready, and after it is gone.
    pub fn kick(&self) {
        let shared = &*self.0;
        let mut seen = shared.word.load(Ordering::Relaxed);
        if planted(Bug::SignalFirst) && seen & (INSIDE | KICKED) == INSIDE {
            shared.signal.send();
        }
        if planted(Bug::MarkedAlready) && seen & KICKED != 0 {
            return;
        }
        let signals = loop {
            // Inside, and nobody has kicked during this stay.
            let unmarked = if planted(Bug::SignalAlways) { 0 } else { KICKED };
            let first = seen & (INSIDE | unmarked | GONE) == INSIDE && !planted(Bug::SignalFirst);
            let counted = first && !planted(Bug::NotCounted);
            let next = (seen | KICKED) + if counted { SENDER } else { 0 };
            let order = at(Site::Mark, Ordering::AcqRel);
            match shared
                .word
                .compare_exchange_weak(seen, next, order, Ordering::Relaxed)
            {
                Ok(_) => break first,
                Err(now) => seen = now,
            }
        };
        if signals {
            shared.signal.send();
            if !planted(Bug::NotCounted) {
                // Release: the thread that sees the count go down may end, after the signal was sent.
                shared
                    .word
                    .fetch_sub(SENDER, at(Site::CountDown, Ordering::Release));
            }
        }
    }
}

impl<S: Signal> KickReceiver<S> {
    /// About to run the guest. `false`: do not, look into the mailbox first.
    #[inline]
    pub fn enter(&self) -> bool {
        // Not Acquire: who does not go in looks at the word once more, below.
        let before = self.0.word.fetch_or(INSIDE, at(Site::Enter, Ordering::Release));
        if before & KICKED == 0 || planted(Bug::EnterBlindly) {
            return true;
        }
        self.leave();
        false
    }

    /// Back from the guest. `true`: look into the mailbox.
    #[inline]
    pub fn leave(&self) -> bool {
        // Not Release: whoever sees that nobody is inside has nothing to do.
        let order = at(Site::Leave, Ordering::Acquire);
        self.0.word.fetch_and(!(INSIDE | KICKED), order) & KICKED != 0
    }

    /// The thread will not run the guest again. Returns when no signal to it can be on its way any more.
    pub fn gone(&self) {
        // Relaxed: the load sees this or later, and so what was released before.
        if !planted(Bug::GoneUnsaid) {
            self.0.word.fetch_or(GONE, Ordering::Relaxed);
        }
        while self.0.word.load(at(Site::Gone, Ordering::Acquire)) >= SENDER {
            #[cfg(loom)]
            loom::thread::yield_now();
            #[cfg(not(loom))]
            {
                crate::simulation::point();
                std::thread::yield_now();
            }
        }
    }
}

/// The real signal: a real-time signal to one thread by tgkill.
pub struct ThreadSignal {
    tid: std::sync::atomic::AtomicI32,
}

impl ThreadSignal {
    /// For a thread that is not known yet.
    pub fn new() -> ThreadSignal {
        ThreadSignal {
            tid: std::sync::atomic::AtomicI32::new(0),
        }
    }
}

impl Default for ThreadSignal {
    fn default() -> Self {
        ThreadSignal::new()
    }
}

impl Signal for ThreadSignal {
    fn send(&self) {
        crate::simulation::point();
        // Relaxed: the mark that led here saw the vCPU inside, and so what it did before it went in.
        let tid = self.tid.load(std::sync::atomic::Ordering::Relaxed);
        // A real-time signal is queued, and the queue has a limit that other processes of the user fill too
        // (RLIMIT_SIGPENDING). A standard signal is only marked as pending and cannot fail so.
        for signal in kick_signals() {
            // SAFETY: tgkill takes numbers only. The thread exists: it set its id before its first `enter`, without
            // which nobody signals, and it waits in `gone` for us.
            if unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal) } == 0 {
                return;
            }
        }
    }
}

/// The signals used for kicks, in the order in which they are tried: the first real-time signal that the C library
/// leaves to programs, because nobody else sends that by accident; and one that no hardware of this kind has raised
/// since the 387.
pub fn kick_signals() -> [i32; 2] {
    [libc::SIGRTMIN(), libc::SIGSTKFLT]
}

thread_local! {
    /// Where this thread's `immediate_exit` is; null on threads that are no vCPUs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// Installs the kick's signal handler, once a process, and lets its signals through on this thread and on those that
/// it starts, whatever mask the program was started with.
///
/// # Errors
/// What sigaction says.
pub fn install_handler() -> std::io::Result<()> {
    static INSTALLED: std::sync::OnceLock<()> = std::sync::OnceLock::new();
    if INSTALLED.get().is_none() {
        for signal in kick_signals() {
            // SAFETY: the handler reads a const-initialised thread-local without destructor (static TLS, no
            // allocation) and stores one byte: both async-signal-safe.
            unsafe { signal_hook::low_level::register(signal, on_kick) }?;
        }
        let _ = INSTALLED.set(());
    }
    crate::host::signals::unblock(&kick_signals())
}

/// Whether the current thread is a vCPU's. Async-signal-safe.
pub fn is_vcpu_thread() -> bool {
    !IMMEDIATE_EXIT.get().is_null()
}

fn on_kick() {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: not null only between `ImmediateExit::bind` and its drop on this very thread, for which the
        // binder promised that the byte is mapped. Volatile: the kernel reads it behind the compiler's back.
        unsafe { flag.write_volatile(1) };
    }
}

/// While this lives, the kick's signal sets a byte on this thread.
pub struct ImmediateExit(());

impl ImmediateExit {
    /// Makes `flag` the byte that a kick of the current thread sets.
    ///
    /// # Safety
    /// The byte must stay mapped and be written by this thread only until the result is dropped.
    pub unsafe fn bind(flag: *mut u8) -> ImmediateExit {
        IMMEDIATE_EXIT.set(flag);
        ImmediateExit(())
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}

impl ThreadSignal {
    /// The current thread is the one to signal.
    pub fn bind_thread(&self) {
        let tid = nix::unistd::gettid().as_raw();
        self.tid.store(tid, std::sync::atomic::Ordering::Relaxed);
    }
}

impl KickReceiver<ThreadSignal> {
    /// The current thread is the one to signal. Before the first [`KickReceiver::enter`].
    pub fn bind_thread(&self) {
        self.0.signal.bind_thread();
    }
}

#[cfg(all(test, loom))]
pub(crate) mod models;
