//! The sender's side of a mailbox.

use super::mailbox::{
    ASLEEP, CLOSED, Core, DEAD, DONE, Envelope, GRANTED, HELD, IDLE, LANE_CREDITS, PARKED, WAITING,
};
use super::park::spin_until;
use super::placement::{Placement, Runner};
use super::rank;
use super::sync::{Arc, Ordering};
use super::{Actor, Obituary};
use std::fmt;

/// The actor is gone: it was stopped or it panicked. The message was not handled, and never will be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the actor is closed")
    }
}

impl std::error::Error for Closed {}

/// An actor that was started, in the hands of whoever started it.
pub struct Spawned<A: Actor> {
    /// Where to connect.
    pub address: Address<A>,
    /// Its own thread, if it has one; ends after the actor has.
    pub thread: Option<std::thread::JoinHandle<()>>,
}

/// Where an actor can be reached: hands out ports, one a sender.
pub struct Address<A: Actor> {
    core: Arc<Core<A>>,
}

impl<A: Actor> Clone for Address<A> {
    fn clone(&self) -> Self {
        Address {
            core: self.core.clone(),
        }
    }
}

impl<A: Actor> Address<A> {
    /// Starts an actor.
    ///
    /// `lanes` bounds how many senders can be connected at once. `on_death` is called, on whatever thread the
    /// actor ran, if it panics; it must not wait.
    ///
    /// # Errors
    /// When the host cannot start the thread that the placement wants.
    pub fn spawn(
        actor: A,
        name: &str,
        placement: Placement,
        lanes: usize,
        on_death: impl Fn(Obituary) + Send + Sync + 'static,
    ) -> std::io::Result<Spawned<A>> {
        let (runner, resident) = match placement {
            Placement::Handoff => (Runner::Sender, false),
            Placement::Thread => (Runner::Resident, true),
            Placement::Pool(pool) => (Runner::Pool(pool), false),
        };
        let core = Arc::new(Core::new(actor, name, lanes, runner, Box::new(on_death)));
        let thread = if resident {
            let core = core.clone();
            Some(crate::thread::spawn(format!("dev:{name}"), move || {
                core.reside()
            })?)
        } else {
            None
        };
        Ok(Spawned {
            address: Address { core },
            thread,
        })
    }

    #[cfg(all(test, loom))]
    pub(super) fn resident_for_model(actor: A, lanes: usize) -> (Address<A>, impl FnOnce()) {
        let core = Arc::new(Core::new(
            actor,
            "model",
            lanes,
            Runner::Resident,
            Box::new(|_| {}),
        ));
        let resident = core.clone();
        (Address { core }, move || resident.reside())
    }

    /// A port of one's own; `None` when all lanes are taken.
    pub fn connect(&self) -> Option<Port<A>> {
        for (index, lane) in self.core.lanes.iter().enumerate() {
            // Acquire and the Release in drop: the next user of a lane sees it as the last one left it.
            if lane
                .connected
                .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
            {
                return Some(Port {
                    core: self.core.clone(),
                    lane: index,
                    stopped: false,
                });
            }
        }
        None
    }

    /// The name it was started with.
    pub fn name(&self) -> &str {
        &self.core.name
    }

    /// Whether the actor has ended.
    pub fn is_closed(&self) -> bool {
        self.core.word.load(Ordering::Relaxed) & CLOSED != 0
    }
}

/// One sender's connection to one actor. It can move to another thread, but not be used by two at once: sending
/// takes `&mut self`, which is what makes the lane's ring safe without a lock.
pub struct Port<A: Actor> {
    core: Arc<Core<A>>,
    lane: usize,
    /// A stop was left behind: nothing goes behind it.
    stopped: bool,
}

impl<A: Actor> Port<A> {
    /// Sends and waits for the reply.
    ///
    /// # Errors
    /// [`Closed`] when the actor has ended, or ends before it handled this.
    ///
    /// # Panics
    /// When the wait would not go upward in [`Rank`](super::Rank).
    #[inline]
    pub fn ask(&mut self, message: A::Message) -> Result<A::Reply, Closed> {
        rank::assert_may_wait_for(A::RANK, &self.core.name);
        let core = &*self.core;
        // Idle: nobody runs it and nothing is queued, so this is the oldest message there is. See the module
        // documentation of `mailbox` for why 0 means that.
        if core.runner.is_sender()
            && core
                .word
                .compare_exchange(0, HELD, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        {
            return match core.turn(message) {
                Ok(reply) => {
                    core.release();
                    Ok(reply)
                }
                Err(obituary) => {
                    core.die(obituary);
                    Err(Closed)
                }
            };
        }
        self.wait_for(Envelope::Ask(message))?;
        self.core.lanes[self.lane].take_reply().ok_or(Closed)
    }

    /// Sends and goes on. Waits only when [`LANE_CREDITS`] earlier posts of this port are unhandled.
    ///
    /// # Errors
    /// [`Closed`] when the actor has ended. A post that was taken can still be lost if the actor ends first.
    #[inline]
    pub fn post(&mut self, message: A::Message) -> Result<(), Closed> {
        let core = &*self.core;
        if core.runner.is_sender()
            && core
                .word
                .compare_exchange(0, HELD, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        {
            return match core.turn(message) {
                Ok(_) => {
                    core.release();
                    Ok(())
                }
                Err(obituary) => {
                    core.die(obituary);
                    Err(Closed)
                }
            };
        }
        if core.lanes[self.lane].backlog() >= LANE_CREDITS {
            self.wait_for(Envelope::Fence)?;
        }
        self.leave(Envelope::Post(message)).map(|_| ())
    }

    /// Sends and goes on, or gives the message back when there are no credits. Never waits, so it is for those who
    /// may not: the event loop, a backend, an actor that answers to a lower rank.
    ///
    /// # Errors
    /// `Err(Some(message))` without credits; `Err(None)` when the actor has ended.
    pub fn try_post(&mut self, message: A::Message) -> Result<(), Option<A::Message>> {
        // Nobody empties the lanes of a closed actor, so this comes first.
        if self.stopped || self.core.word.load(Ordering::Relaxed) & CLOSED != 0 {
            return Err(None);
        }
        if self.core.lanes[self.lane].backlog() >= LANE_CREDITS {
            return Err(Some(message));
        }
        self.post(message).map_err(|Closed| None)
    }

    /// Waits until everything that this port has sent was handled.
    ///
    /// # Errors
    /// [`Closed`] when the actor ended before.
    pub fn fence(&mut self) -> Result<(), Closed> {
        // The lane's head is moved before the turn runs, so an empty lane is not enough: the word tells.
        if self.core.word.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        rank::assert_may_wait_for(A::RANK, &self.core.name);
        self.wait_for(Envelope::Fence)
    }

    /// Ends the actor, after what this port has sent before. Waits until it has ended.
    pub fn stop(&mut self) {
        rank::assert_may_wait_for(A::RANK, &self.core.name);
        // Closed already is what was wanted.
        let _ = self.wait_for(Envelope::Stop);
    }

    /// Ends the actor, after what this port has sent before. Does not wait, so it can be used on an actor that may
    /// be stuck.
    pub fn stop_later(&mut self) {
        // The slot beyond the credits is free, as nobody waits on this lane. What would come behind a stop is refused
        // here, so the stop is the last thing in the lane and keeps its slot.
        if !std::mem::replace(&mut self.stopped, true) {
            let _ = self.push(Envelope::Stop);
        }
    }

    /// The actor's name.
    pub fn name(&self) -> &str {
        &self.core.name
    }

    /// Puts an envelope into the lane and sees to it that somebody serves it.
    fn leave(&mut self, envelope: Envelope<A::Message>) -> Result<(), Closed> {
        if self.stopped {
            return Err(Closed);
        }
        self.push(envelope)
    }

    fn push(&mut self, envelope: Envelope<A::Message>) -> Result<(), Closed> {
        let core = &*self.core;
        // Nobody empties the lanes of a closed actor: without this look a persistent sender would fill its own.
        if core.word.load(Ordering::Relaxed) & CLOSED != 0 {
            return Err(Closed);
        }
        core.lanes[self.lane].push(envelope);
        // AcqRel: this may take the token (Acquire), and it publishes the lane (Release).
        let before = core
            .word
            .fetch_or(HELD | Core::<A>::bit(self.lane), Ordering::AcqRel);
        if before & CLOSED != 0 {
            // What is in the lane is dropped with the mailbox.
            return Err(Closed);
        }
        if before & HELD == 0 {
            match core.runner {
                Runner::Sender => core.combine_from(self.lane),
                Runner::Pool(_) => core.runner.schedule(self.core.clone()),
                Runner::Resident => unreachable!("a resident never lets go of its token"),
            }
        } else if before & ASLEEP != 0 {
            core.ring();
        }
        Ok(())
    }

    /// Leaves an envelope that is answered, and waits for the answer.
    #[cold]
    fn wait_for(&mut self, envelope: Envelope<A::Message>) -> Result<(), Closed> {
        let lane = self.lane;
        // Relaxed: published together with the envelope.
        self.core.lanes[lane].state.store(WAITING, Ordering::Relaxed);
        let outcome = self.leave(envelope).and_then(|()| self.await_state());
        self.core.lanes[lane].state.store(IDLE, Ordering::Relaxed);
        outcome
    }

    /// Waits for `DONE` or `DEAD`; when the token is handed to us, uses it.
    fn await_state(&mut self) -> Result<(), Closed> {
        let core = &*self.core;
        let state = &core.lanes[self.lane].state;
        let settled = |now: u32| now != WAITING && now != PARKED;
        loop {
            if !spin_until(|| settled(state.load(Ordering::Acquire)))
                && state
                    .compare_exchange(WAITING, PARKED, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
            {
                while state.load(Ordering::Acquire) == PARKED {
                    state.wait(PARKED);
                }
            }
            match state.load(Ordering::Acquire) {
                DONE => return Ok(()),
                DEAD => return Err(Closed),
                GRANTED => {
                    // We hold the token. Our own envelope is still in the lane: back to waiting, then serve it.
                    state.store(WAITING, Ordering::Relaxed);
                    core.combine_from(self.lane);
                }
                _ => {}
            }
        }
    }
}

impl<A: Actor> Drop for Port<A> {
    fn drop(&mut self) {
        // Posts that are still in the lane will be served: their bit is set. The next user of the lane comes after
        // them.
        self.core.lanes[self.lane]
            .connected
            .store(false, Ordering::Release);
    }
}
