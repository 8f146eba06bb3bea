//! Who may wait for whom: supervisor < vCPU < device < backend < table, upward only. With every wait going up, no cycle of
//! waits can exist, so no deadlock among actors can. Asserted in every build: the check is one thread-local byte.

use std::cell::Cell;

/// An actor's place in the order of waits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
#[repr(u8)]
pub enum Rank {
    /// The machine actor and the program's main thread. May ask anybody; nobody may wait for it.
    Supervisor = 0,
    /// A vCPU thread. May ask devices and backends.
    Vcpu = 1,
    /// A device. May ask backends and tables.
    Device = 2,
    /// Whatever talks to the host: console, event loop. May ask nobody but tables: a turn of a device may run on its thread.
    Backend = 3,
    /// The owner of something that the kernel has one of for a whole machine, such as KVM's interrupt routes. It calls the
    /// kernel, and may ask nobody.
    Table = 4,
}

#[cfg(not(loom))]
thread_local! {
    static CURRENT: Cell<Rank> = const { Cell::new(Rank::Supervisor) };
}

// A model's threads are coroutines on one thread of the system.
#[cfg(loom)]
loom::thread_local! {
    static CURRENT: Cell<Rank> = Cell::new(Rank::Supervisor);
}

/// While this lives the current thread acts at the rank it was made with; afterwards at the one before.
#[must_use]
pub struct RankGuard {
    before: Rank,
    // Not Send: it stands for a fact about one thread.
    _thread: std::marker::PhantomData<*const ()>,
}

impl RankGuard {
    /// The current thread acts at `rank` from now on, or at a higher one if it does so already: what waits for a turn
    /// within a turn waits for both.
    #[inline]
    pub fn enter(rank: Rank) -> RankGuard {
        RankGuard {
            before: CURRENT.with(|current| current.replace(current.get().max(rank))),
            _thread: std::marker::PhantomData,
        }
    }
}

/// That the current thread acts at a rank from which it may wait for one of rank `target`.
pub(super) struct MayWait {
    current: Rank,
    target: Rank,
}

impl MayWait {
    /// The wait is over before it began: the current thread acts at `target` itself. [`RankGuard::enter`] without a second
    /// look, which would fall between taking a token and letting go of it.
    #[inline(always)]
    pub(super) fn enter(self) -> RankGuard {
        CURRENT.with(|current| current.set(self.target));
        RankGuard {
            before: self.current,
            _thread: std::marker::PhantomData,
        }
    }
}

impl Drop for RankGuard {
    #[inline]
    fn drop(&mut self) {
        CURRENT.with(|current| current.set(self.before));
    }
}

/// The current thread is about to wait for an actor of rank `target`.
///
/// # Panics
/// When the wait would not go upward: a bug of ours, contained at the actor whose turn it is.
#[inline]
pub(super) fn assert_may_wait_for(target: Rank, name: &str) -> MayWait {
    let current = CURRENT.with(Cell::get);
    if current >= target {
        refuse(current, target, name);
    }
    MayWait { current, target }
}

#[cold]
#[inline(never)]
fn refuse(current: Rank, target: Rank, name: &str) -> ! {
    panic!("rank: a {current:?} may not wait for {name}, which is a {target:?}; waits go upward only");
}
