//! The sender's side of a mailbox.

use super::keep::keep_after;
use super::lane::{Call, DEAD, DONE, GRANTED, LANE_CREDITS, LEFT, PARKED, WAITING};
use super::mailbox::{ASLEEP, CLOSED, Core, HELD, KEPT, Met, lane_bit};
use super::park::{look, spin_until, yield_until};
use super::placement::{Placement, Runner};
use super::rank::{self, MayWait, RankGuard};
use super::sync::{Arc, Bug, Ordering, Site, at, planted};
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
                .compare_exchange(
                    false,
                    true,
                    at(Site::Connect, Ordering::Acquire),
                    Ordering::Relaxed,
                )
                .is_ok()
            {
                return Some(Port {
                    core: self.core.clone(),
                    lane: index,
                    stopped: false,
                    friends: Friends::default(),
                    alone: keep_after(),
                    opening: match self.core.runner.is_sender() {
                        true => Opening::Alone,
                        false => Opening::Register,
                    },
                });
            }
        }
        None
    }

    /// The state of a lane.
    #[cfg(all(test, not(loom)))]
    pub(super) fn lane_state(&self, lane: usize) -> u32 {
        self.core.lanes[lane].state.load(Ordering::Relaxed)
    }

    pub(super) fn core(&self) -> &Core<A> {
        &self.core
    }

    /// The name it was started with.
    pub fn name(&self) -> &str {
        &self.core.name
    }

    /// Whether the actor has ended.
    pub fn is_closed(&self) -> bool {
        self.core.word.load(Ordering::Acquire) & CLOSED != 0
    }
}

/// One sender's connection to one actor. It can move to another thread, but not be used by two at once: sending
/// takes `&mut self`, which is what makes the lane's ring safe without a lock.
pub struct Port<A: Actor> {
    core: Arc<Core<A>>,
    lane: usize,
    /// A stop was left behind: nothing goes behind it.
    stopped: bool,
    friends: Friends,
    opening: Opening,
    /// Turns alone until it keeps the token.
    alone: u32,
}

/// What a sender does first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// It takes the token, if the actor is idle. It has no friends.
    Alone,
    /// The same, and it has.
    Among,
    /// It has kept the token, and goes on as long as nobody has revoked it.
    Keeper,
    /// It leaves its ask in its lane and looks: its last one was served by somebody else, and soon.
    Leave,
    /// It leaves everything in its lane: the token is never a sender's.
    Register,
}

/// Whom a sender has served lately, so that it looks into their lanes unasked; see [`super::mailbox`].
#[derive(Default)]
struct Friends {
    /// The bits of their lanes.
    lanes: u64,
    /// Looks in a row that found nothing.
    in_vain: u32,
    /// Own turns until the next look.
    turns: u32,
    /// Own turns between looks: as many as the friends do not notice much, since each look that finds something takes
    /// as long as several short turns.
    every: u32,
}

impl Friends {
    /// Looks in vain until they are forgotten.
    #[cfg(not(loom))]
    fn forget() -> u32 {
        16
    }
    #[cfg(loom)]
    fn forget() -> u32 {
        FORGET.get()
    }

    /// The most own turns between looks.
    const SELDOM: u32 = 16;
    /// A friend shall look so often for its reply: longer than without us, shorter than [`PATIENCE`].
    const LOOKS: std::ops::Range<u32> = 7..11;

    /// Those served by the sender of lane `own`.
    fn add(&mut self, served: u64, own: usize) {
        self.lanes |= served & !lane_bit(own);
    }

    /// Whether to look after this turn.
    #[inline]
    fn is_time(&mut self) -> bool {
        self.turns = self.turns.saturating_sub(1);
        self.turns == 0
    }

    /// Learns from a look.
    fn found(&mut self, met: &Met) {
        self.in_vain = if met.any { 0 } else { self.in_vain + 1 };
        if self.in_vain > Self::forget() {
            *self = Friends::default();
        } else if met.any {
            if met.looked < Self::LOOKS.start {
                self.every = (self.every + 1).min(Self::SELDOM);
            } else if met.looked >= Self::LOOKS.end {
                self.every /= 2;
            }
        }
        self.turns = self.every;
    }
}

#[cfg(loom)]
thread_local! {
    /// What a model wants of [`Friends::forget`].
    pub(super) static FORGET: std::cell::Cell<u32> = const { std::cell::Cell::new(16) };
}

/// How often a sender looks for the reply before it registers, if its last ask was served by somebody else.
const PATIENCE: u32 = 24;

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
        self.ask_with(|| message)
    }

    /// The same with a message that is made where it goes to: one that is made before is copied between taking the token
    /// and letting go of it, and the second of these steps waits for every load and store before.
    ///
    /// # Errors
    /// As [`Port::ask`].
    ///
    /// # Panics
    /// As [`Port::ask`].
    #[inline]
    pub fn ask_with(&mut self, message: impl FnOnce() -> A::Message) -> Result<A::Reply, Closed> {
        let rank = rank::assert_may_wait_for(A::RANK, &self.core.name);
        if self.take_alone() {
            return self.turn(rank.enter(), message(), |reply| reply);
        }
        self.ask_in_company(rank, message())
    }

    /// Where others have been met.
    #[inline(never)]
    fn ask_in_company(&mut self, rank: MayWait, message: A::Message) -> Result<A::Reply, Closed> {
        if self.take_among() {
            return self.turn_among(rank.enter(), message, |reply| reply);
        }
        self.ask_busy(message)
    }

    /// Takes the token if the actor is idle, so that the message can be handled by a turn of our own: for who has nobody
    /// else to think of.
    #[inline(always)]
    fn take_alone(&mut self) -> bool {
        match self.opening {
            Opening::Keeper => self.core.lanes[self.lane].keep.enter() || self.not_entered(),
            // Idle: nobody runs it and nothing is queued, so ours is the oldest message there is. See the module
            // documentation of `mailbox` for why 0 means that.
            Opening::Alone => self.core.try_hold(),
            _ => false,
        }
    }

    /// Lets go of the token after a turn alone.
    #[inline(always)]
    fn let_go(&mut self) {
        if self.opening == Opening::Keeper {
            if !self.core.lanes[self.lane].keep.leave() && !planted(Bug::KeepBlindly) {
                self.kept_no_more();
            }
            return;
        }
        self.alone -= 1;
        if self.alone == 0 {
            self.keep();
        } else if !self.core.try_release() {
            self.combine();
        }
    }

    /// Nobody has come for long: keeps the token, where that is possible.
    #[cold]
    fn keep(&mut self) {
        self.alone = keep_after();
        if self.core.keepable {
            if self.core.try_keep(self.lane) {
                self.opening = Opening::Keeper;
            } else {
                self.combine();
            }
        } else if !self.core.try_release() {
            self.combine();
        }
    }

    /// The keeper was revoked before a turn. `false`: it has not taken the token for it.
    #[cold]
    fn not_entered(&mut self) -> bool {
        self.core.lanes[self.lane].keep.leave();
        self.kept_no_more();
        false
    }

    /// The keeper was revoked, and is not in a turn now.
    #[cold]
    fn kept_no_more(&mut self) {
        self.open(false);
        if self.core.lanes[self.lane].keep.claim() {
            self.combine();
        }
    }

    /// The same for who has friends.
    #[inline]
    fn take_among(&self) -> bool {
        self.opening == Opening::Among && self.core.try_hold()
    }

    /// What to do first the next time. `served`: the last ask was served by somebody else, and soon.
    fn open(&mut self, served: bool) {
        self.opening = match self.opening {
            Opening::Register => Opening::Register,
            _ if served => Opening::Leave,
            _ if self.friends.lanes != 0 => Opening::Among,
            _ => Opening::Alone,
        };
        self.alone = keep_after();
    }

    /// Has served these lanes.
    fn befriend(&mut self, served: u64) {
        self.friends.add(served, self.lane);
        self.open(false);
    }

    #[cold]
    fn ask_busy(&mut self, message: A::Message) -> Result<A::Reply, Closed> {
        self.call(Call::Ask(message))?;
        match self.core.lanes[self.lane].take() {
            Call::Reply(reply) => Ok(reply),
            _ => Err(Closed),
        }
    }

    /// A turn of our own, for the holder of the token, who lets go of it.
    #[inline(always)]
    fn turn<R>(
        &mut self,
        rank: RankGuard,
        message: A::Message,
        then: impl FnOnce(A::Reply) -> R,
    ) -> Result<R, Closed> {
        match self.core.turn_at(rank, message, then) {
            Ok(reply) => {
                self.let_go();
                Ok(reply)
            }
            Err(obituary) => {
                self.core.die(obituary);
                self.open(false);
                Err(Closed)
            }
        }
    }

    /// The same among friends: serves them too, if they have something.
    #[inline]
    fn turn_among<R>(
        &mut self,
        rank: RankGuard,
        message: A::Message,
        then: impl FnOnce(A::Reply) -> R,
    ) -> Result<R, Closed> {
        match self.core.turn_at(rank, message, then) {
            Ok(reply) => {
                self.release_among_friends();
                Ok(reply)
            }
            Err(obituary) => {
                self.core.die(obituary);
                Err(Closed)
            }
        }
    }

    /// Serves those who came in during our turn, and lets go of the token.
    #[cold]
    fn combine(&mut self) {
        let served = self.core.combine(self.lane);
        self.befriend(served);
    }

    /// Serves those who have been served here before, if they have something, and lets go of the token.
    #[inline]
    fn release_among_friends(&mut self) {
        let released = if self.friends.is_time() {
            let met = self.core.serve_friends(self.friends.lanes);
            self.friends.found(&met);
            self.open(false);
            met.released
        } else {
            self.core.try_release()
        };
        if !released {
            self.combine();
        }
    }

    /// Sends and goes on. Waits only when [`LANE_CREDITS`] earlier posts of this port are unhandled.
    ///
    /// # Errors
    /// [`Closed`] when the actor has ended. A post that was taken can still be lost if the actor ends first, and one that
    /// comes at the same moment as the end may have been handled all the same.
    ///
    /// # Panics
    /// When it has to wait, and the wait would not go upward in [`Rank`](super::Rank).
    #[inline]
    pub fn post(&mut self, message: A::Message) -> Result<(), Closed> {
        if self.take_alone() {
            return self.turn(RankGuard::enter(A::RANK), message, drop);
        }
        self.post_in_company(message)
    }

    #[inline(never)]
    fn post_in_company(&mut self, message: A::Message) -> Result<(), Closed> {
        if self.take_among() {
            return self.turn_among(RankGuard::enter(A::RANK), message, drop);
        }
        self.post_busy(message)
    }

    #[cold]
    fn post_busy(&mut self, message: A::Message) -> Result<(), Closed> {
        if self.core.lanes[self.lane].backlog() >= LANE_CREDITS {
            rank::assert_may_wait_for(A::RANK, &self.core.name);
            self.call(Call::Fence)?;
        }
        if self.stopped || self.is_closed() {
            return Err(Closed);
        }
        // Who posts does not look for replies.
        self.open(false);
        self.core.lanes[self.lane].push(message);
        self.register().map(drop)
    }

    /// Asks or posts. Which of them matters only while the actor is busy, and only then `is_post` is called. `true`: it
    /// was a post, and may not have been handled yet. The message is made as in [`Port::ask_with`].
    ///
    /// # Errors
    /// As [`Port::ask`] and [`Port::post`].
    ///
    /// # Panics
    /// As [`Port::ask`].
    #[inline]
    pub fn tell(
        &mut self,
        message: impl FnOnce() -> A::Message,
        is_post: impl FnOnce() -> bool,
    ) -> Result<bool, Closed> {
        let rank = rank::assert_may_wait_for(A::RANK, &self.core.name);
        if self.take_alone() {
            return self.turn(rank.enter(), message(), |_| false);
        }
        self.tell_in_company(rank, message(), is_post)
    }

    /// The part of [`Port::tell`] for an actor that is idle: `false` if it may not be, and nothing was done.
    ///
    /// # Errors
    /// As [`Port::ask`].
    ///
    /// # Panics
    /// As [`Port::ask`].
    #[inline]
    pub fn tell_idle(&mut self, message: impl FnOnce() -> A::Message) -> Result<bool, Closed> {
        let rank = rank::assert_may_wait_for(A::RANK, &self.core.name);
        if self.take_alone() {
            return self.turn(rank.enter(), message(), |_| true);
        }
        Ok(false)
    }

    #[inline(never)]
    fn tell_in_company(
        &mut self,
        rank: MayWait,
        message: A::Message,
        is_post: impl FnOnce() -> bool,
    ) -> Result<bool, Closed> {
        if self.take_among() {
            self.turn_among(rank.enter(), message, |_| false)
        } else if is_post() {
            self.post_busy(message).map(|()| true)
        } else {
            self.ask_busy(message).map(|_| false)
        }
    }

    /// Sends and goes on, or gives the message back when there are no credits. Never waits for an actor, so it is for those
    /// who may not: the event loop, a backend, an actor that answers to a lower rank. (To take a kept token is a system
    /// call, see `keep.rs`.)
    ///
    /// # Errors
    /// `Err(Some(message))` without credits; `Err(None)` when the actor has ended.
    pub fn try_post(&mut self, message: A::Message) -> Result<(), Option<A::Message>> {
        // Nobody empties the lanes of a closed actor, so this comes first.
        if self.stopped || self.is_closed() {
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
        rank::assert_may_wait_for(A::RANK, &self.core.name);
        // The lane's head is moved before the turn runs, so an empty lane is not enough: the word tells.
        // A token is kept only where nothing was left in any lane.
        let word = self.core.word.load(at(Site::Fence, Ordering::Acquire));
        let idle = word == 0 || word == HELD | KEPT;
        if idle || planted(Bug::FenceByLane) && self.core.lanes[self.lane].backlog() == 0 {
            return Ok(());
        }
        self.call(Call::Fence)
    }

    /// Ends the actor, after what this port has sent before. Waits until it has ended, unless this port has left a stop
    /// already ([`Port::stop_later`]).
    pub fn stop(&mut self) {
        rank::assert_may_wait_for(A::RANK, &self.core.name);
        // Closed already is what was wanted.
        let _ = self.call(Call::Stop);
    }

    /// Ends the actor, after what this port has sent before. Does not wait, so it can be used on an actor that may
    /// be stuck.
    pub fn stop_later(&mut self) {
        // What would come behind a stop is refused here, so the stop is the last thing in the lane and keeps its cell.
        if !std::mem::replace(&mut self.stopped, true) && !self.is_closed() {
            self.core.lanes[self.lane].call(Call::Stop, LEFT);
            // A keeper would go on in front of it until whoever is about to revoke has done so.
            self.open(false);
            let _ = self.register();
        }
    }

    /// The actor's name.
    pub fn name(&self) -> &str {
        &self.core.name
    }

    /// Nobody empties the lanes of a closed actor: without this look a persistent sender would fill its own.
    fn is_closed(&self) -> bool {
        self.core.word.load(Ordering::Relaxed) & CLOSED != 0
    }

    /// Sees to it that somebody serves what is in the lane. `true`: this very call has done it.
    fn register(&mut self) -> Result<bool, Closed> {
        let core = &*self.core;
        // AcqRel: this may take the token (Acquire), and it publishes the lane (Release).
        let order = at(Site::Register, Ordering::AcqRel);
        let before = core.word.fetch_or(HELD | lane_bit(self.lane), order);
        if before & CLOSED != 0 {
            // What is in the lane is dropped with the mailbox.
            return Err(Closed);
        }
        if before & HELD == 0 {
            match core.runner {
                Runner::Sender if planted(Bug::RegisterAndGo) => {}
                Runner::Sender => {
                    let served = core.combine_from(self.lane);
                    self.befriend(served);
                    return Ok(true);
                }
                Runner::Pool(_) => {
                    if let Err(job) = core.runner.schedule(self.core.clone()) {
                        job.run();
                    }
                }
                Runner::Resident => unreachable!("a resident never lets go of its token"),
            }
        } else if before & KEPT != 0 {
            if core.unkeep() {
                let served = core.combine_from(self.lane);
                self.befriend(served);
                return Ok(true);
            }
        } else if before & ASLEEP != 0 {
            core.ring();
        }
        Ok(false)
    }

    /// Leaves a call, and waits until it was handled.
    #[cold]
    fn call(&mut self, call: Call<A::Message, A::Reply>) -> Result<(), Closed> {
        if self.stopped {
            return Err(Closed);
        }
        if let Runner::Pool(pool) = &self.core.runner {
            pool.assert_may_wait(&self.core.name);
        }
        let lane = self.lane;
        self.core.lanes[lane].call(call, WAITING);
        let outcome = self.await_reply();
        if outcome.is_err() {
            // Nobody will: what was called for is dropped now, not with the mailbox.
            self.core.lanes[lane].take();
        }
        outcome
    }

    /// Waits for `DONE` or `DEAD`; when the token is handed to us, uses it.
    fn await_reply(&mut self) -> Result<(), Closed> {
        // Whom somebody served the last time, it may serve again without being told.
        let expects = self.opening == Opening::Leave;
        self.open(false);
        let looked = if expects {
            look(PATIENCE, || self.is_settled())
        } else {
            None
        };
        if let Some(looked) = looked {
            self.open(true);
            self.core.lanes[self.lane].looked.store(looked, Ordering::Relaxed);
        } else if !(expects && planted(Bug::ExpectForEver)) {
            match self.register() {
                Ok(true) => {}
                Ok(false) => {
                    let served = spin_until(|| self.is_settled());
                    self.open(served);
                }
                Err(Closed) => {
                    // It may have been served before the end: by a friend, or for the bit of an earlier post.
                    let state = self.core.lanes[self.lane]
                        .state
                        .load(at(Site::Settled, Ordering::Acquire));
                    return if state == DONE { Ok(()) } else { Err(Closed) };
                }
            }
        }
        loop {
            let state = &self.core.lanes[self.lane].state;
            match state.load(at(Site::Settled, Ordering::Acquire)) {
                DONE => return Ok(()),
                DEAD => {
                    self.open(false);
                    return Err(Closed);
                }
                GRANTED => {
                    // We hold the token. Our own call is still in the lane: back to waiting, then serve it.
                    state.store(WAITING, Ordering::Relaxed);
                    let served = self.core.combine_from(self.lane);
                    self.befriend(served);
                }
                _ => {
                    if yield_until(|| self.is_settled()) {
                        continue;
                    }
                    // Relaxed, here and in `is_settled`: what it has become is looked at above.
                    if planted(Bug::ParkBlindly) {
                        state.swap(PARKED, Ordering::Relaxed);
                    } else if state
                        .compare_exchange(WAITING, PARKED, Ordering::Relaxed, Ordering::Relaxed)
                        .is_err()
                    {
                        continue;
                    }
                    while state.load(Ordering::Relaxed) == PARKED {
                        state.wait(PARKED);
                    }
                }
            }
        }
    }

    /// Whether the call needs no more waiting.
    #[inline]
    fn is_settled(&self) -> bool {
        let state = self.core.lanes[self.lane].state.load(Ordering::Relaxed);
        state != WAITING && state != PARKED
    }
}

impl<A: Actor> Drop for Port<A> {
    fn drop(&mut self) {
        // Posts that are still in the lane will be served: their bit is set. The next user of the lane comes after
        // them. Not so a stop: its cell is in use until the end.
        if !self.stopped {
            self.core.lanes[self.lane]
                .connected
                .store(false, at(Site::Disconnect, Ordering::Release));
        }
    }
}
