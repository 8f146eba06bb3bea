//! The mailbox with a run token.
//!
//! One 64-bit word decides everything about an actor:
//!
//! ```text
//!  63    62     61    60    59 ............ 0
//! HELD  ASLEEP CLOSED KEPT  one bit a lane: "look into my lane"
//! ```
//!
//! * `HELD`: somebody has the run token, and only that somebody touches the actor's state.
//! * a lane's bit: its sender has left something there. Whoever holds the token must serve it before letting go.
//! * `ASLEEP`: the holder is the actor's own thread, and it sleeps; ring [`Core::bell`].
//! * `KEPT`: the holder has let go, and comes back without a step on this word: see [`super::keep`].
//! * `CLOSED`: the actor is gone. `HELD` stays set for ever, so no idle path can succeed.
//!
//! A sender to an idle actor takes the token by one compare-and-swap of 0 to `HELD`, runs its own message, and
//! gives the token back by one compare-and-swap of `HELD` to 0. If that fails, lanes have something, and they are
//! served first. A sender that finds the word not 0 leaves its message in its lane and does one
//! `fetch_or(HELD | bit)`: if `HELD` was clear, this very step took the token; if it was set, the holder cannot
//! let go without seeing the bit, because letting go succeeds only on a word without bits. As all of this is the
//! modification order of one word, no fence and no second look is needed, and no wake-up can fall between.
//!
//! # Friends
//!
//! While two threads keep asking one actor, taking the token in turns drags its state from one processor's cache to the
//! other's with every message. So a sender whose last ask was served by somebody else leaves its next one in its lane
//! and looks for the reply for a moment before it touches the word; and a holder that has served others looks into
//! their lanes after each turn of its own ([`Core::serve_friends`]). The state then stays where it is, and a call costs
//! two transfers of one cache line. Nothing depends on it: who is not served in that moment does as above.
//!
//! # Waking
//!
//! A woken thread may be put onto the processor of the one that wakes it. If that one held the token, everybody would
//! wait for it to be scheduled again, fall asleep, and have to be woken in turn: a convoy. So who sleeps is woken after
//! the token was let go ([`Sleepers`]), unless the turns are so long that the wait would be noticed.
//!
//! # Orderings
//!
//! * Taking the token is `Acquire`, giving it back `Release`: turns happen one after the other, each seeing the
//!   state that the one before left.
//! * The `fetch_or` of a sender is `AcqRel`: `Acquire` because it may take the token, `Release` to be seen together
//!   with the lane by the holder's `fetch_and` (`Acquire`). Handing over puts bits back with `Relaxed`: every step on the
//!   word but the first is a read-modify-write, so the senders' `Release` reaches whoever sweeps next.
//! * Closing is `AcqRel`: `Acquire` to see the calls that have to be refused, `Release` because a sender that finds the
//!   word closed gets its call back.
//! * Keeping is `Release`, as giving back is, and so that who is the keeper is seen by whoever revokes; that is `Acquire`.
//! * Falling asleep is `Release` and the ringer's `fetch_and` `Acquire`, so that the bell is first made ready and then
//!   rung. The bell itself carries no data (`Relaxed`): what there is to do is in the word.
//! * Those of a lane are in `lane.rs`.
//!
//! Each is a [`Site`], and a model fails without it (`planted.rs`).

use super::keep;
use super::lane::{Call, LANE_CREDITS, Lane, PARKED, WAITING};
use super::park::{Futex, Patience, spin_until};
use super::placement::Runner;
use super::rank::RankGuard;
use super::sync::{Arc, AtomicU32, AtomicU64, Bug, Ordering, Site, UnsafeCell, at, planted};
use super::{Actor, Obituary};
use crossbeam_utils::CachePadded;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

pub(super) const HELD: u64 = 1 << 63;
pub(super) const ASLEEP: u64 = 1 << 62;
pub(super) const CLOSED: u64 = 1 << 61;
pub(super) const KEPT: u64 = 1 << 60;
/// How many lanes have a bit of their own; lane `n` uses bit `n % LANE_BITS`, so beyond that they share.
#[cfg(not(loom))]
const LANE_BITS: usize = 60;
/// Few, so that models have lanes that share a bit.
#[cfg(loom)]
const LANE_BITS: usize = 3;
const LANES: u64 = (1 << LANE_BITS) - 1;

/// How many lanes an actor may have: 1024 vCPUs and then some, each lane a few hundred bytes.
pub const MAX_LANES: usize = 1088;

/// How many envelopes of others a holder serves before it looks for a spinning asker to hand the token to: the
/// holder's own work waits meanwhile, so this bounds what it does for others.
#[cfg(not(loom))]
const COMBINE: u32 = 32;
#[cfg(loom)]
const COMBINE: u32 = 1;

/// After a turn longer than this, an asker that sleeps is woken at once, while the token is held: the turns to come may
/// be as long. A few times what waking costs.
const LONG_TURN: Duration = Duration::from_micros(20);

/// How many askers a holder may owe a wake-up.
const SLEEPERS: usize = 16;

/// The bit that stands for a lane.
#[inline]
pub(super) fn lane_bit(lane: usize) -> u64 {
    1 << (lane % LANE_BITS)
}

/// The first of `bits` above bit `at`, else the lowest.
#[inline]
fn next_bit(bits: u64, at: usize) -> usize {
    let above = bits & (!0 << at << 1);
    (if above != 0 { above } else { bits }).trailing_zeros() as usize
}

/// An actor, its mailbox, and how it is run.
pub(super) struct Core<A: Actor> {
    pub(super) word: CachePadded<AtomicU64>,
    /// What the actor's own thread sleeps on (placement `thread`).
    bell: CachePadded<Futex>,
    pub(super) lanes: Box<[CachePadded<Lane<A>>]>,
    /// The lane whose sender keeps the token, while the word says that it is kept.
    keeper: AtomicU32,
    /// Whether it can be kept. Asked at the start, because the host is asked for it.
    pub(super) keepable: bool,
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
            keeper: AtomicU32::new(0),
            keepable: runner.is_sender() && keep::is_possible(),
            runner,
            name: name.into(),
            on_death,
            actor: UnsafeCell::new(Some(actor)),
        }
    }

    /// Takes the token of an idle actor.
    #[inline]
    pub(super) fn try_hold(&self) -> bool {
        self.word
            .compare_exchange(0, HELD, at(Site::Take, Ordering::Acquire), Ordering::Relaxed)
            .is_ok()
    }

    /// One turn, for the holder of the token, and what is done with its reply. `Err`: one of them panicked, and the actor
    /// must be closed.
    #[inline]
    fn turn<R>(&self, message: A::Message, then: impl FnOnce(A::Reply) -> R) -> Result<R, Box<Obituary>> {
        self.turn_at(RankGuard::enter(A::RANK), message, then)
    }

    /// The same by a thread that acts at the actor's rank already.
    #[inline(always)]
    pub(super) fn turn_at<R>(
        &self,
        _rank: RankGuard,
        message: A::Message,
        then: impl FnOnce(A::Reply) -> R,
    ) -> Result<R, Box<Obituary>> {
        self.actor.with_mut(|actor| {
            // SAFETY: the caller holds the token, and gives it up only after this returns.
            match unsafe { &mut *actor } {
                // The state of an actor that panicked is never looked at again, only dropped.
                Some(actor) => catch_unwind(AssertUnwindSafe(|| then(actor.handle(message))))
                    .map_err(|panic| self.obituary(&*panic)),
                None => unreachable!("a closed actor's token is never taken"),
            }
        })
    }

    // Boxed, so that the outcome of a turn fits into registers.
    #[cold]
    #[inline(never)]
    fn obituary(&self, panic: &(dyn std::any::Any + Send)) -> Box<Obituary> {
        let cause = panic
            .downcast_ref::<&str>()
            .map(|text| text.to_string())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a text".into());
        Box::new(Obituary {
            actor: self.name.to_string(),
            cause,
        })
    }

    /// Lets go of the token, unless something came in meanwhile. For the holder.
    #[inline]
    pub(super) fn try_release(&self) -> bool {
        if planted(Bug::LetGoBlindly) {
            self.word.swap(0, Ordering::Release);
            return true;
        }
        self.word
            .compare_exchange(HELD, 0, at(Site::LetGo, Ordering::Release), Ordering::Relaxed)
            .is_ok()
    }

    /// Lets go of the token and keeps it, for the sender of `lane`, unless something came in meanwhile. For the holder.
    #[cold]
    pub(super) fn try_keep(&self, lane: usize) -> bool {
        self.lanes[lane].keep.begin();
        self.keeper.store(lane as u32, Ordering::Relaxed);
        let release = at(Site::Keep, Ordering::Release);
        let kept = if planted(Bug::KeepWhatever) {
            self.word.swap(HELD | KEPT, release);
            true
        } else {
            self.word
                .compare_exchange(HELD, HELD | KEPT, release, Ordering::Relaxed)
                .is_ok()
        };
        if !kept {
            self.lanes[lane].keep.end();
        }
        kept
    }

    /// Takes a kept token from its keeper. For a sender whose `fetch_or` saw KEPT. `true`: the token is the caller's.
    #[cold]
    pub(super) fn unkeep(&self) -> bool {
        // Of many senders that saw KEPT, the one that clears it revokes.
        let before = self.word.fetch_and(!KEPT, at(Site::Unkeep, Ordering::Acquire));
        if before & KEPT == 0 && !planted(Bug::RevokeTogether) {
            return false;
        }
        self.lanes[self.keeper.load(Ordering::Relaxed) as usize]
            .keep
            .revoke()
    }

    /// Whether the keeper of the token, if it is kept, is in a turn. For who looks from outside.
    pub(super) fn is_keeper_inside(&self) -> bool {
        self.lanes[self.keeper.load(Ordering::Relaxed) as usize]
            .keep
            .is_inside()
    }

    /// Takes the bits of the lanes that have something out of the word. For the holder, who has to serve them.
    #[inline]
    fn sweep(&self) -> u64 {
        self.word.fetch_and(!LANES, at(Site::Sweep, Ordering::Acquire)) & LANES
    }

    /// Serves the holder's own lane, then everybody's, and lets go of the token.
    #[cold]
    pub(super) fn combine_from(&self, lane: usize) -> u64 {
        let mut sleepers = Sleepers::new(self);
        if let Err(obituary) = self.serve(lane, None, &mut sleepers) {
            self.finish(lane_bit(lane), obituary);
            return 0;
        }
        self.combine(lane)
    }

    /// Serves lanes until none has anything, then lets go of the token; or hands it to an asker when this has gone
    /// on for long. For the holder. Returns the bits of the lanes whose asks it served.
    #[cold]
    pub(super) fn combine(&self, own: usize) -> u64 {
        // Round about from the holder's own lane, which was served last: from the lowest each time, those that ask again
        // at once would use up every budget.
        let mut at = own % LANE_BITS;
        let mut budget = COMBINE;
        let mut friends = 0;
        // Wakes them when it goes out of scope: on every way out the token is another's by then, or nobody's.
        let mut sleepers = Sleepers::new(self);
        loop {
            let bits = self.sweep();
            if bits == 0 {
                if self.try_release() {
                    return friends;
                }
                continue;
            }
            friends |= bits;
            match self.serve_lanes(bits, &mut at, Some(&mut budget), &mut sleepers) {
                Sweep::Done => {}
                Sweep::HandedOver | Sweep::Closed => return 0,
            }
        }
    }

    /// Serves the calls of senders that were served here before, if they are there already, and lets go of the token.
    /// For the holder, after a turn of its own.
    #[inline(never)]
    pub(super) fn serve_friends(&self, friends: u64) -> Met {
        let mut sleepers = Sleepers::new(self);
        let mut met = Met::default();
        let mut rest = friends;
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            if !self.lanes[lane].has_call() {
                continue;
            }
            met.any = true;
            met.looked = met.looked.max(self.lanes[lane].looked.load(Ordering::Relaxed));
            if let Err(obituary) = self.serve(lane, None, &mut sleepers) {
                self.finish(lane_bit(lane), obituary);
                met.released = true;
                return met;
            }
        }
        met.released = self.try_release();
        met
    }

    /// Serves the lanes of `bits`. With a budget: hands the token over when it is used up and an asker spins.
    fn serve_lanes(
        &self,
        mut bits: u64,
        at: &mut usize,
        mut budget: Option<&mut u32>,
        sleepers: &mut Sleepers<A>,
    ) -> Sweep {
        while bits != 0 {
            let bit = next_bit(bits, *at);
            if let Some(budget) = budget.as_deref_mut()
                && *budget == 0
            {
                if self.hand_over(bits, *at) {
                    return Sweep::HandedOver;
                }
                *budget = COMBINE;
            }
            for lane in (bit..self.lanes.len()).step_by(LANE_BITS) {
                if let Err(obituary) = self.serve(lane, budget.as_deref_mut(), sleepers) {
                    // The lanes not reached will never be, this bit's others included: their askers must hear of it.
                    self.finish(bits, obituary);
                    return Sweep::Closed;
                }
            }
            bits &= !(1 << bit);
            *at = bit;
        }
        Sweep::Done
    }

    /// Serves what is in one lane. For the holder. After `Err` (the actor has ended) the caller must [`Core::close`]
    /// with this lane's bit.
    fn serve(
        &self,
        lane: usize,
        mut budget: Option<&mut u32>,
        sleepers: &mut Sleepers<A>,
    ) -> Result<(), Option<Box<Obituary>>> {
        let index = lane;
        let lane = &*self.lanes[index];
        // Looked at first: with a call, every post that comes before it is there too, and no other can come.
        let called = lane.has_call();
        // At most a lane's worth at a time, or one sender could keep the holder for ever: what was there when the
        // lane's bit was taken is no more than that, and whatever comes later sets the bit again.
        let posts = if called && planted(Bug::CallFirst) {
            0
        } else {
            LANE_CREDITS
        };
        for _ in 0..posts {
            let Some(message) = lane.pop() else { break };
            sleepers.mind();
            spend(&mut budget);
            if let Err(obituary) = self.turn(message, drop) {
                return Err(Some(obituary));
            }
        }
        if !called {
            return Ok(());
        }
        spend(&mut budget);
        sleepers.mind();
        // The clock costs as much as a turn; who does not sleep pays nothing for it.
        let slept_since = (lane.state.load(Ordering::Relaxed) == PARKED).then(Instant::now);
        let reply = match lane.take() {
            Call::Ask(message) => match self.turn(message, Some) {
                Ok(reply) => reply,
                Err(obituary) => return Err(Some(obituary)),
            },
            Call::Fence => None,
            Call::Stop => {
                return Err(None);
            }
            Call::Nothing | Call::Reply(_) => unreachable!("a state without its call"),
        };
        if lane.conclude(reply) {
            // Who fell asleep during the turn had looked for longer than a short one takes.
            // A model is the same each time it is explored, so it knows no long turns.
            let long = slept_since.is_none_or(|since| since.elapsed() > LONG_TURN && cfg!(not(loom)));
            sleepers.owe(index, long);
        }
        Ok(())
    }

    /// Gives the token to an asker that is looking at its lane. `false` if none is: a sleeping one would keep the
    /// token idle until it is awake, so it is served instead.
    fn hand_over(&self, bits: u64, at: usize) -> bool {
        // What was taken out of the word but not served must be seen by the next holder.
        let mut rest = bits;
        while rest != 0 {
            let bit = next_bit(rest, at);
            rest &= !(1 << bit);
            for lane in self.lanes.iter().skip(bit).step_by(LANE_BITS) {
                if lane.state.load(Ordering::Relaxed) != WAITING && !planted(Bug::HandToSleeper) {
                    continue;
                }
                if !planted(Bug::HandOverForgets) {
                    self.word.fetch_or(bits, Ordering::Relaxed);
                }
                if lane.grant() {
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
        let _rank = RankGuard::enter(A::RANK);
        let _ = catch_unwind(AssertUnwindSafe(|| drop(actor)));
    }

    /// Closes the mailbox: from now on nobody can take the token, and everyone who waits is told. `pending`: bits
    /// that the holder has taken out of the word and not served.
    pub(super) fn close(&self, pending: u64) {
        // One step decides for each sender: its bit was set before (we tell it), or it sees CLOSED itself.
        let before = self
            .word
            .fetch_or(HELD | CLOSED, at(Site::Close, Ordering::AcqRel));
        let pending = if planted(Bug::CloseForgets) { 0 } else { pending };
        let bits = (before | pending) & LANES;
        let mut rest = bits;
        while rest != 0 {
            let bit = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            for lane in self.lanes.iter().skip(bit).step_by(LANE_BITS) {
                lane.kill();
            }
        }
    }

    /// Ends the actor after a panic on the idle path. For the holder.
    #[cold]
    pub(super) fn die(&self, obituary: Box<Obituary>) {
        self.finish(0, Some(obituary));
    }

    /// Ends the actor, tells of its death, and closes it. For the holder.
    #[cold]
    fn finish(&self, pending: u64, obituary: Option<Box<Obituary>>) {
        self.end();
        if let Some(obituary) = obituary {
            // A panic here must not leave the mailbox open without a holder.
            let _ = catch_unwind(AssertUnwindSafe(|| (self.on_death)(*obituary)));
        }
        self.close(pending);
    }

    /// The life of the actor's own thread (placement `thread`): the one holder, from spawn to the end.
    pub(super) fn reside(&self) {
        let mut patience = Patience::new();
        loop {
            let bits = self.sweep();
            if bits != 0 {
                // Nobody is held up by this thread being preempted who is not anyway: it wakes as soon as it can.
                match self.serve_lanes(bits, &mut 0, None, &mut Sleepers::at_once(self)) {
                    Sweep::Done => continue,
                    Sweep::Closed | Sweep::HandedOver => return,
                }
            }
            let has_work = || self.word.load(Ordering::Relaxed) != HELD;
            if spin_until(has_work) {
                continue;
            }
            // Whoever finds us asleep pays for it: waking costs a sender more than what it came for.
            let idle = Instant::now();
            if patience.look(idle, has_work) {
                continue;
            }
            if !planted(Bug::BellLate) {
                self.bell.store(0, Ordering::Relaxed);
            }
            // Release, so that whoever sees ASLEEP and rings does so after the store above. If a bit has been set
            // since the last look, the exchange fails.
            let asleep = if planted(Bug::SleepBlindly) {
                self.word.fetch_or(ASLEEP, Ordering::Release);
                true
            } else {
                let release = at(Site::FallAsleep, Ordering::Release);
                self.word
                    .compare_exchange(HELD, HELD | ASLEEP, release, Ordering::Relaxed)
                    .is_ok()
            };
            if planted(Bug::BellLate) {
                self.bell.store(0, Ordering::Relaxed);
            }
            if asleep {
                while self.bell.load(Ordering::Relaxed) == 0 {
                    self.bell.wait(0);
                }
                patience.slept(idle.elapsed());
            }
        }
    }

    /// Wakes the actor's own thread. For a sender whose `fetch_or` saw ASLEEP.
    #[cold]
    pub(super) fn ring(&self) {
        // Of many senders that saw ASLEEP, the one that clears it rings, so a burst costs one system call.
        let before = self.word.fetch_and(!ASLEEP, at(Site::Ring, Ordering::Acquire));
        if before & ASLEEP != 0 {
            self.bell.store(1, Ordering::Relaxed);
            self.bell.wake();
        }
    }
}

/// What [`Core::serve_friends`] found.
#[derive(Default)]
pub(super) struct Met {
    /// Somebody had a call.
    pub(super) any: bool,
    /// How often the most patient of them had looked for the reply before that.
    pub(super) looked: u32,
    /// The token is gone: let go, or with the actor.
    pub(super) released: bool,
}

/// How a sweep over the lanes ended.
#[derive(PartialEq, Eq)]
enum Sweep {
    Done,
    HandedOver,
    Closed,
}

/// Counts one envelope of another's.
fn spend(budget: &mut Option<&mut u32>) {
    if let Some(budget) = budget.as_deref_mut() {
        *budget = budget.saturating_sub(1);
    }
}

/// Askers that were answered in their sleep, and are to be woken when the token is let go: when this is dropped.
struct Sleepers<'a, A: Actor> {
    core: &'a Core<A>,
    lanes: [u16; SLEEPERS],
    count: usize,
    /// How many to owe before they are woken anyway.
    most: usize,
    /// Since when the first of them has its answer.
    since: Option<Instant>,
}

impl<'a, A: Actor> Sleepers<'a, A> {
    fn new(core: &'a Core<A>) -> Self {
        Sleepers {
            core,
            lanes: [0; SLEEPERS],
            count: 0,
            most: SLEEPERS,
            since: None,
        }
    }

    /// For a thread that never lets go of the token.
    fn at_once(core: &'a Core<A>) -> Self {
        Sleepers {
            most: 1,
            ..Self::new(core)
        }
    }

    fn owe(&mut self, lane: usize, at_once: bool) {
        self.lanes[self.count] = lane as u16;
        self.count += 1;
        if at_once || self.count == self.most {
            self.wake();
        } else if self.since.is_none() {
            self.since = Some(Instant::now());
        }
    }

    /// Before a turn: wakes them if the turns since have been long.
    fn mind(&mut self) {
        if self
            .since
            .is_some_and(|since| !cfg!(loom) && since.elapsed() > LONG_TURN)
        {
            self.wake();
        }
    }

    fn wake(&mut self) {
        self.since = None;
        for lane in &self.lanes[..self.count] {
            // It may be awake by now, and even asleep in another ask: it looks again.
            self.core.lanes[*lane as usize].state.wake();
        }
        self.count = 0;
    }
}

impl<A: Actor> Drop for Sleepers<'_, A> {
    fn drop(&mut self) {
        if self.count > 0 {
            self.wake();
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
        loop {
            let bits = self.sweep();
            let sweep = self.serve_lanes(bits, &mut 0, None, &mut Sleepers::at_once(&self));
            if sweep == Sweep::Closed || self.try_release() {
                return;
            }
            // More came in. Behind the others in the queue, so that a busy actor does not keep a worker.
            if self.runner.schedule(self.clone()).is_ok() {
                return;
            }
        }
    }
}
