//! Who runs an actor's turns. The mailbox is the same; what differs is who takes the run token.

use super::mailbox::Job;
use super::sync::Arc;
use super::sync::queue::{Receiver, Sender, bounded};
use std::fmt;
use std::str::FromStr;

/// How many actors may share one pool. Each is in the queue at most once (its token is taken while it is), so a
/// queue of this size never blocks.
const POOL_ACTORS: usize = 1024;

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
}

impl Pool {
    /// Starts `threads` workers.
    ///
    /// # Errors
    /// When the host cannot start a thread.
    pub fn new(threads: usize) -> std::io::Result<Pool> {
        let (queue, jobs): (_, Receiver<Arc<dyn Job>>) = bounded(POOL_ACTORS);
        for n in 0..threads.max(1) {
            let jobs = jobs.clone();
            crate::thread::spawn(format!("pool{n}"), move || {
                for job in jobs {
                    job.run();
                }
            })?;
        }
        Ok(Pool { queue })
    }

    /// A pool of one, and what its worker does.
    #[cfg(all(test, loom))]
    pub(super) fn for_model() -> (Pool, impl FnOnce() + Send) {
        let (queue, jobs): (_, Receiver<Arc<dyn Job>>) = bounded(POOL_ACTORS);
        (Pool { queue }, move || jobs.into_iter().for_each(|job| job.run()))
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

    /// Has a pool run the actor whose token the caller holds.
    pub(super) fn schedule(&self, job: Arc<dyn Job>) {
        match self {
            Runner::Pool(pool) => {
                if let Err(refused) = pool.queue.try_send(job) {
                    // More actors than the queue was made for. Late is better than never, and never is not an
                    // option while the token is held.
                    refused.into_inner().run();
                }
            }
            Runner::Sender | Runner::Resident => unreachable!("only a pool's actors are scheduled"),
        }
    }
}
