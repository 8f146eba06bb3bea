//! The mailbox with a run token.
//!
//! One 64-bit word decides everything about an actor:
//!
//! ```text
//!  63    62     61     60 ............ 0
//! HELD  ASLEEP CLOSED  one bit a lane: "look into my lane"
//! ```
//!
//! * `HELD`: somebody has the run token, and only that somebody touches the actor's state.
//! * a lane's bit: its sender has left something there. Whoever holds the token must serve it before letting go.
//! * `ASLEEP`: the holder is the actor's own thread, and it sleeps; ring [`Core::bell`].
//! * `CLOSED`: the actor is gone. `HELD` stays set for ever, so no idle path can succeed.
//!
//! A sender to an idle actor takes the token by one compare-and-swap of 0 to `HELD`, runs its own message, and
//! gives the token back by one compare-and-swap of `HELD` to 0. If that fails, lanes have something, and they are
//! served first. A sender that finds the word not 0 leaves its message in its lane and does one
//! `fetch_or(HELD | bit)`: if `HELD` was clear, this very step took the token; if it was set, the holder cannot
//! let go without seeing the bit, because letting go succeeds only on a word without bits. As all of this is the
//! modification order of one word, no fence and no second look is needed, and no wake-up can fall between.
//!
//! # Orderings
//!
//! * Taking the token is `Acquire`, giving it back `Release`: turns happen one after the other, each seeing the
//!   state that the one before left.
//! * A lane's `tail` is stored with `Release` by its sender after the envelope was written, and loaded with
//!   `Acquire` by the holder: the envelope is seen whole. `head` likewise the other way: a slot is reused only
//!   after the envelope was moved out of it.
//! * A lane's `state` goes to `DONE` (or `CLOSED`, `GRANTED`) by a swap with `AcqRel`: the reply is written before,
//!   the asker reads it after its `Acquire` load, and the old value tells whether it must be woken.
//! * The `fetch_or` of a sender is `AcqRel`: `Acquire` because it may take the token, `Release` to be seen together
//!   with the lane by the holder's `fetch_and` (`Acquire`).

use super::park::{Futex, spin_until};
use super::placement::Runner;
use super::rank::RankGuard;
use super::sync::{Arc, AtomicBool, AtomicU32, AtomicU64, Ordering, UnsafeCell};
use super::{Actor, Obituary};
use crossbeam_utils::CachePadded;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub(super) const HELD: u64 = 1 << 63;
pub(super) const ASLEEP: u64 = 1 << 62;
pub(super) const CLOSED: u64 = 1 << 61;
/// How many lanes have a bit of their own; lane `n` uses bit `n % LANE_BITS`, so beyond that they share.
const LANE_BITS: usize = 61;
const LANES: u64 = (1 << LANE_BITS) - 1;

/// How many lanes an actor may have: 1024 vCPUs and then some, each lane a few hundred bytes.
pub const MAX_LANES: usize = 1088;

/// How many posts a sender may have in flight to one actor before it must wait. Enough for a burst of 16550
/// writes (16-byte FIFO), small enough that a lane stays in a few cache lines.
#[cfg(not(loom))]
pub const LANE_CREDITS: u32 = 31;
#[cfg(loom)]
/// Small, so that models reach the bound.
pub const LANE_CREDITS: u32 = 1;
/// One slot more than credits: an ask or a fence always finds room behind the posts.
const SLOTS: usize = LANE_CREDITS as usize + 1;

/// How many envelopes of others a holder serves before it looks for a spinning asker to hand the token to: the
/// holder's own work waits meanwhile, so this bounds what it does for others.
#[cfg(not(loom))]
const COMBINE: u32 = 32;
#[cfg(loom)]
const COMBINE: u32 = 1;

// States of a lane, in its futex word.
/// Nobody asks.
pub(super) const IDLE: u32 = 0;
/// An asker looks at the word.
pub(super) const WAITING: u32 = 1;
/// An asker sleeps on the word.
pub(super) const PARKED: u32 = 2;
/// The ask was handled, the reply is in the lane.
pub(super) const DONE: u32 = 3;
/// The ask will never be handled.
pub(super) const DEAD: u32 = 4;
/// The asker has the token now, and serves its own ask.
pub(super) const GRANTED: u32 = 5;

/// What travels in a lane.
pub(super) enum Envelope<M> {
    /// No reply wanted.
    Post(M),
    /// The reply goes into the lane.
    Ask(M),
    /// No message: tells that everything before was handled.
    Fence,
    /// The actor ends after what came before.
    Stop,
}

/// One sender's way into the mailbox: a ring of envelopes, and room for one reply.
pub(super) struct Lane<A: Actor> {
    /// Whether a port uses this lane.
    pub(super) connected: AtomicBool,
    /// `IDLE`, `WAITING`…; the futex that an asker sleeps on.
    pub(super) state: Futex,
    /// Next slot to serve; stored by the holder.
    head: AtomicU32,
    /// Next slot to fill; stored by the sender.
    tail: AtomicU32,
    reply: UnsafeCell<Option<A::Reply>>,
    slots: [UnsafeCell<MaybeUninit<Envelope<A::Message>>>; SLOTS],
}

impl<A: Actor> Lane<A> {
    fn new() -> Self {
        Lane {
            connected: AtomicBool::new(false),
            state: Futex::new(IDLE),
            head: AtomicU32::new(0),
            tail: AtomicU32::new(0),
            reply: UnsafeCell::new(None),
            slots: std::array::from_fn(|_| UnsafeCell::new(MaybeUninit::uninit())),
        }
    }

    /// Envelopes not yet served. Exact for the sender as an upper bound, for the holder as a lower one.
    pub(super) fn backlog(&self) -> u32 {
        self.tail
            .load(Ordering::Acquire)
            .wrapping_sub(self.head.load(Ordering::Acquire))
    }

    /// Adds an envelope. Only the lane's sender may call this, and only with room (`backlog() < SLOTS`).
    pub(super) fn push(&self, envelope: Envelope<A::Message>) {
        let tail = self.tail.load(Ordering::Relaxed);
        assert!(
            tail.wrapping_sub(self.head.load(Ordering::Acquire)) < SLOTS as u32,
            "lane overrun"
        );
        self.slots[tail as usize % SLOTS].with_mut(|slot| {
            // SAFETY: there is room, so the holder has moved this slot's last envelope out (`head`, Acquire), and
            // it does not look at the slot again before it sees the new tail. `&mut Port` makes us the only sender.
            unsafe { (*slot).write(envelope) };
        });
        self.tail.store(tail.wrapping_add(1), Ordering::Release);
    }

    /// Takes the oldest envelope. Only the holder of the token may call this.
    fn pop(&self) -> Option<Envelope<A::Message>> {
        let head = self.head.load(Ordering::Relaxed);
        if head == self.tail.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: head != tail, so the sender has written this slot (`tail`, Acquire) and leaves it alone until it
        // sees the new head; the token makes us the only reader, and the envelope is read out exactly once.
        let envelope =
            self.slots[head as usize % SLOTS].with_mut(|slot| unsafe { (*slot).assume_init_read() });
        self.head.store(head.wrapping_add(1), Ordering::Release);
        Some(envelope)
    }

    /// Wakes the asker of this lane with a new state, if one waits.
    fn conclude(&self, state: u32) {
        if self.state.swap(state, Ordering::AcqRel) == PARKED {
            self.state.wake();
        }
    }

    /// Takes the reply. For the asker, after `DONE`; or for the holder.
    pub(super) fn take_reply(&self) -> Option<A::Reply> {
        // SAFETY: the holder writes the reply before it swaps in `DONE`, and not again before the next ask of this
        // lane, which only the caller can make.
        self.reply.with_mut(|reply| unsafe { (*reply).take() })
    }
}

/// An actor, its mailbox, and how it is run.
pub(super) struct Core<A: Actor> {
    pub(super) word: CachePadded<AtomicU64>,
    /// What the actor's own thread sleeps on (placement `thread`).
    bell: CachePadded<Futex>,
    pub(super) lanes: Box<[CachePadded<Lane<A>>]>,
    pub(super) runner: Runner,
    pub(super) name: Box<str>,
    on_death: Box<dyn Fn(Obituary) + Send + Sync>,
    /// `None` after the end.
    actor: UnsafeCell<Option<A>>,
}

// SAFETY: `actor` is touched only by the holder of the token, whoever that is, so the actor moves between threads
// but is never shared: `A: Send` suffices. Lanes carry messages and replies (both `Send`) between two threads, the
// ring's and the state's orderings making each a move.
unsafe impl<A: Actor> Sync for Core<A> {}
// SAFETY: as above; nothing in here is bound to a thread.
unsafe impl<A: Actor> Send for Core<A> {}

/// Why serving stopped.
#[derive(PartialEq, Eq)]
enum Served {
    /// Nothing is left in the lane.
    All,
    /// The actor is closed; the token is gone with it.
    Closed,
}

impl<A: Actor> Core<A> {
    pub(super) fn new(
        actor: A,
        name: &str,
        lanes: usize,
        runner: Runner,
        on_death: Box<dyn Fn(Obituary) + Send + Sync>,
    ) -> Core<A> {
        assert!(
            (1..=MAX_LANES).contains(&lanes),
            "an actor has 1 to {MAX_LANES} lanes, not {lanes}"
        );
        // An actor with a thread of its own never lets go of the token: its thread is the one holder.
        let word = if runner.is_resident() { HELD } else { 0 };
        Core {
            word: CachePadded::new(AtomicU64::new(word)),
            bell: CachePadded::new(Futex::new(0)),
            lanes: (0..lanes).map(|_| CachePadded::new(Lane::new())).collect(),
            runner,
            name: name.into(),
            on_death,
            actor: UnsafeCell::new(Some(actor)),
        }
    }

    /// The bit that stands for a lane.
    #[inline]
    pub(super) fn bit(lane: usize) -> u64 {
        1 << (lane % LANE_BITS)
    }

    /// One turn, for the holder of the token. `Err`: the actor panicked and must be closed.
    #[inline]
    pub(super) fn turn(&self, message: A::Message) -> Result<A::Reply, Obituary> {
        let _rank = RankGuard::enter(A::RANK);
        self.actor.with_mut(|actor| {
            // SAFETY: the caller holds the token, and gives it up only after this returns.
            match unsafe { &mut *actor } {
                // The state of an actor that panicked is never looked at again, only dropped.
                Some(actor) => catch_unwind(AssertUnwindSafe(|| actor.handle(message)))
                    .map_err(|panic| self.obituary(&*panic)),
                None => unreachable!("a closed actor's token is never taken"),
            }
        })
    }

    #[cold]
    fn obituary(&self, panic: &(dyn std::any::Any + Send)) -> Obituary {
        let cause = panic
            .downcast_ref::<&str>()
            .map(|text| text.to_string())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a text".into());
        Obituary {
            actor: self.name.to_string(),
            cause,
        }
    }

    /// Lets go of the token after an idle turn, or serves what came in meanwhile.
    #[inline]
    pub(super) fn release(&self) {
        if self
            .word
            .compare_exchange(HELD, 0, Ordering::Release, Ordering::Relaxed)
            .is_err()
        {
            self.combine();
        }
    }

    /// Serves the holder's own lane, then everybody's, and lets go of the token.
    #[cold]
    pub(super) fn combine_from(&self, lane: usize) {
        if self.serve(&self.lanes[lane], None) == Served::Closed {
            self.close(Self::bit(lane));
        } else {
            self.release();
        }
    }

    /// Serves lanes until none has anything, then lets go of the token; or hands it to an asker when this has gone
    /// on for long. For the holder.
    #[cold]
    pub(super) fn combine(&self) {
        let mut budget = COMBINE;
        loop {
            let bits = self.word.fetch_and(!LANES, Ordering::AcqRel) & LANES;
            if bits == 0 {
                match self
                    .word
                    .compare_exchange(HELD, 0, Ordering::Release, Ordering::Relaxed)
                {
                    Ok(_) => return,
                    Err(_) => continue,
                }
            }
            match self.serve_lanes(bits, Some(&mut budget)) {
                Sweep::Done => {}
                Sweep::HandedOver | Sweep::Closed => return,
            }
        }
    }

    /// Serves the lanes of `bits`. With a budget: hands the token over when it is used up and an asker spins.
    fn serve_lanes(&self, mut bits: u64, mut budget: Option<&mut u32>) -> Sweep {
        while bits != 0 {
            let bit = bits.trailing_zeros() as usize;
            if let Some(budget) = budget.as_deref_mut()
                && *budget == 0
            {
                if self.hand_over(bits) {
                    return Sweep::HandedOver;
                }
                *budget = COMBINE;
            }
            for lane in self.lanes.iter().skip(bit).step_by(LANE_BITS) {
                if self.serve(lane, budget.as_deref_mut()) == Served::Closed {
                    // The lanes not reached will never be, this bit's others included: their askers must hear of it.
                    self.close(bits);
                    return Sweep::Closed;
                }
            }
            bits &= bits - 1;
        }
        Sweep::Done
    }

    /// Serves what is in one lane. For the holder. After `Closed` the caller must
    /// [`Core::close`] with this lane's bit.
    ///
    /// At most a lane's worth at a time, or one sender could keep the holder for ever: what was there when the
    /// lane's bit was taken is no more than that, and whatever comes later sets the bit again.
    fn serve(&self, lane: &Lane<A>, mut budget: Option<&mut u32>) -> Served {
        for _ in 0..SLOTS {
            let Some(envelope) = lane.pop() else { break };
            if let Some(budget) = budget.as_deref_mut() {
                *budget = budget.saturating_sub(1);
            }
            let outcome = match envelope {
                Envelope::Post(message) => self.turn(message).map(drop),
                Envelope::Ask(message) => self.turn(message).map(|reply| {
                    // SAFETY: the asker waits and reads only after `DONE`, which comes below.
                    lane.reply.with_mut(|slot| unsafe { *slot = Some(reply) });
                    lane.conclude(DONE);
                }),
                Envelope::Fence => {
                    lane.conclude(DONE);
                    Ok(())
                }
                Envelope::Stop => {
                    // Whoever asked for it is told by `close`, when it is true.
                    self.end();
                    return Served::Closed;
                }
            };
            if let Err(obituary) = outcome {
                self.end();
                (self.on_death)(obituary);
                return Served::Closed;
            }
        }
        Served::All
    }

    /// Gives the token to an asker that is looking at its lane. `false` if none is: a sleeping one would keep the
    /// token idle until it is awake, so it is served instead.
    fn hand_over(&self, bits: u64) -> bool {
        // What was taken out of the word but not served must be seen by the next holder.
        let mut rest = bits;
        while rest != 0 {
            let bit = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            for lane in self.lanes.iter().skip(bit).step_by(LANE_BITS) {
                if lane.state.load(Ordering::Relaxed) != WAITING {
                    continue;
                }
                self.word.fetch_or(bits, Ordering::AcqRel);
                // Release: the asker that sees GRANTED is the next holder and must see the actor's state.
                if lane
                    .state
                    .compare_exchange(WAITING, GRANTED, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
                {
                    return true;
                }
                // It went to sleep meanwhile. The bits are ours to serve still; they may stay set too, which
                // costs a look into an empty lane.
            }
        }
        false
    }

    /// Drops the actor's state. For the holder, which afterwards must [`Core::close`].
    fn end(&self) {
        // SAFETY: the caller holds the token.
        let actor = self.actor.with_mut(|actor| unsafe { (*actor).take() });
        // A destructor that panics must not take the machine with it.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(actor)));
    }

    /// Closes the mailbox: from now on nobody can take the token, and everyone who waits is told. `pending`: bits
    /// that the holder has taken out of the word and not served.
    pub(super) fn close(&self, pending: u64) {
        // One step decides for each sender: its bit was set before (we tell it), or it sees CLOSED itself.
        let bits = (self.word.fetch_or(HELD | CLOSED, Ordering::AcqRel) | pending) & LANES;
        let mut rest = bits;
        while rest != 0 {
            let bit = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            for lane in self.lanes.iter().skip(bit).step_by(LANE_BITS) {
                // Only the one who waits leaves WAITING or PARKED behind; a lane at rest is left alone.
                for waiting in [WAITING, PARKED] {
                    if lane
                        .state
                        .compare_exchange(waiting, DEAD, Ordering::AcqRel, Ordering::Relaxed)
                        .is_ok()
                    {
                        if waiting == PARKED {
                            lane.state.wake();
                        }
                        break;
                    }
                }
            }
        }
    }

    /// Ends the actor after a panic on the idle path. For the holder.
    #[cold]
    pub(super) fn die(&self, obituary: Obituary) {
        self.end();
        self.close(0);
        (self.on_death)(obituary);
    }

    /// The life of the actor's own thread (placement `thread`): the one holder, from spawn to the end.
    pub(super) fn reside(&self) {
        loop {
            let bits = self.word.fetch_and(!LANES, Ordering::AcqRel) & LANES;
            if bits != 0 {
                match self.serve_lanes(bits, None) {
                    Sweep::Done => continue,
                    Sweep::Closed | Sweep::HandedOver => return,
                }
            }
            if spin_until(|| self.word.load(Ordering::Relaxed) != HELD) {
                continue;
            }
            self.bell.store(0, Ordering::Relaxed);
            // Release, so that whoever sees ASLEEP and rings does so after the store above. If a bit has been set
            // since the last look, the exchange fails.
            if self
                .word
                .compare_exchange(HELD, HELD | ASLEEP, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                while self.bell.load(Ordering::Acquire) == 0 {
                    self.bell.wait(0);
                }
            }
        }
    }

    /// Wakes the actor's own thread. For a sender whose `fetch_or` saw ASLEEP.
    #[cold]
    pub(super) fn ring(&self) {
        // Of many senders that saw ASLEEP, the one that clears it rings, so a burst costs one system call.
        if self.word.fetch_and(!ASLEEP, Ordering::AcqRel) & ASLEEP != 0 {
            self.bell.store(1, Ordering::Release);
            self.bell.wake();
        }
    }
}

/// How a sweep over the lanes ended.
#[derive(PartialEq, Eq)]
enum Sweep {
    Done,
    HandedOver,
    Closed,
}

impl<A: Actor> Drop for Core<A> {
    fn drop(&mut self) {
        // What was left in the lanes of a closed actor.
        for lane in self.lanes.iter() {
            while lane.pop().is_some() {}
        }
    }
}

/// Something a pool can run: an actor whose token was taken on the pool's behalf.
pub(super) trait Job: Send + Sync {
    fn run(self: Arc<Self>);
}

impl<A: Actor> Job for Core<A> {
    /// One sweep. The token is never handed to an asker: this actor's turns run in the pool only.
    fn run(self: Arc<Self>) {
        let bits = self.word.fetch_and(!LANES, Ordering::AcqRel) & LANES;
        if self.serve_lanes(bits, None) == Sweep::Closed {
            return;
        }
        if self
            .word
            .compare_exchange(HELD, 0, Ordering::Release, Ordering::Relaxed)
            .is_err()
        {
            // More came in. Behind the others in the queue, so that a busy actor does not keep a worker.
            let again = self.clone();
            self.runner.schedule(again);
        }
    }
}
