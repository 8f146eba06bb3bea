//! Who runs an actor's turns. The mailbox is the same; what differs is who takes the run token.

use super::mailbox::Job;
use super::sync::Arc;
use super::sync::queue::{Receiver, Sender, bounded};
use crossbeam_channel::TrySendError;
use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::AtomicUsize;

/// How many actors may share one pool. Each is in the queue at most once (its token is taken while it is), so a
/// queue of this size never blocks.
const POOL_ACTORS: usize = 1024;

thread_local! {
    /// The number of the pool that this thread works for; 0: none.
    static WORKS_FOR: Cell<usize> = const { Cell::new(0) };
}

/// Where an actor runs.
#[derive(Clone, Default)]
pub enum Placement {
    /// On the thread of whoever sends to it while it is idle, or of whoever is serving it already.
    #[default]
    Handoff,
    /// On a thread of its own.
    Thread,
    /// On one of a pool's threads.
    Pool(Pool),
}

/// A [`Placement`] as a user names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub enum PlacementKind {
    /// See [`Placement::Handoff`].
    #[default]
    Handoff,
    /// See [`Placement::Thread`].
    Thread,
    /// See [`Placement::Pool`].
    Pool,
}

impl FromStr for PlacementKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "handoff" => Ok(PlacementKind::Handoff),
            "thread" => Ok(PlacementKind::Thread),
            "pool" => Ok(PlacementKind::Pool),
            _ => Err(format!(
                "'{text}' is not a placement; there are handoff, thread and pool"
            )),
        }
    }
}

impl fmt::Display for PlacementKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PlacementKind::Handoff => "handoff",
            PlacementKind::Thread => "thread",
            PlacementKind::Pool => "pool",
        })
    }
}

/// A few threads that run the actors placed on them. The threads end when the last clone and the last actor are
/// gone.
#[derive(Clone)]
pub struct Pool {
    queue: Sender<Arc<dyn Job>>,
    /// From 1.
    number: usize,
}

impl Pool {
    /// Starts `threads` workers.
    ///
    /// # Errors
    /// When the host cannot start a thread.
    pub fn new(threads: usize) -> std::io::Result<Pool> {
        static POOLS: AtomicUsize = AtomicUsize::new(0);
        let number = POOLS.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
        let (queue, jobs): (_, Receiver<Arc<dyn Job>>) = bounded(POOL_ACTORS);
        for n in 0..threads.max(1) {
            let jobs = jobs.clone();
            crate::thread::spawn(format!("pool{n}"), move || {
                WORKS_FOR.set(number);
                for job in jobs {
                    job.run();
                }
            })?;
        }
        Ok(Pool { queue, number })
    }

    /// The current thread is about to wait for an actor of this pool.
    ///
    /// # Panics
    /// On a thread of this very pool: when all of them wait so, nobody is left to run what they wait for. A bug of ours,
    /// contained at the actor whose turn it is.
    pub(super) fn assert_may_wait(&self, name: &str) {
        assert!(
            WORKS_FOR.get() != self.number,
            "an actor of a pool may not wait for {name}, which is in the same pool"
        );
    }

    /// A pool of one, and what its worker does.
    #[cfg(all(test, loom))]
    pub(super) fn for_model() -> (Pool, impl FnOnce() + Send) {
        let (queue, jobs): (_, Receiver<Arc<dyn Job>>) = bounded(POOL_ACTORS);
        (Pool { queue, number: 1 }, move || {
            jobs.into_iter().for_each(|job| job.run())
        })
    }
}

/// What a sender does with a token that it has just taken, or cannot take.
pub(super) enum Runner {
    /// It runs the actor itself.
    Sender,
    /// It never gets the token: the actor's own thread keeps it.
    Resident,
    /// It gives it to a pool.
    Pool(Pool),
}

impl Runner {
    pub(super) fn is_resident(&self) -> bool {
        matches!(self, Runner::Resident)
    }

    #[inline]
    pub(super) fn is_sender(&self) -> bool {
        matches!(self, Runner::Sender)
    }

    /// Has a pool run the actor whose token the caller holds. `Err`: it has more actors than its queue was made for, and
    /// the caller has to run it, since nobody else will.
    pub(super) fn schedule(&self, job: Arc<dyn Job>) -> Result<(), Arc<dyn Job>> {
        match self {
            Runner::Pool(pool) => pool.queue.try_send(job).map_err(TrySendError::into_inner),
            Runner::Sender | Runner::Resident => unreachable!("only a pool's actors are scheduled"),
        }
    }
}
