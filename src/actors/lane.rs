//! A lane: one sender's way into a mailbox. A ring of posts, and one cell for a call.
//!
//! A sender has one call at most under way, since it waits for its reply, and the call is the last thing in its lane.
//! So one cell is enough, the reply goes where the request was, and both fit with the lane's state into the cache
//! line that the two threads hand to and fro: a call that somebody else serves costs two transfers of one line.
//!
//! # Orderings
//!
//! * `state` is stored as `WAITING` (or `LEFT`) with `Release` after the call was written, and loaded with `Acquire` by
//!   the holder of the token: it sees the call, and every post before it.
//! * `state` goes to `DONE` (or `DEAD`, `GRANTED`) by a read-modify-write with `Release`: the reply is written before (the
//!   call taken out, the actor's state left), the asker reads it after its `Acquire` load, and the old value tells
//!   whether it must be woken. It is not `Acquire`: the holder reads nothing that the asker wrote since `WAITING`.
//! * To `PARKED` it goes with `Relaxed`: a read-modify-write keeps what `WAITING` published visible, and nothing is new.
//! * `tail` is stored with `Release` by the sender after the post was written, and loaded with `Acquire` by the holder:
//!   the post is seen whole. `head` likewise the other way: a slot is filled again only after its post was moved out.
//!
//! Each is a [`Site`], and a model fails without it (`planted.rs`).

use super::Actor;
use super::keep::Keep;
use super::park::Futex;
use super::sync::{AtomicBool, AtomicU32, Bug, Ordering, Site, UnsafeCell, at, planted};
use std::mem::MaybeUninit;

/// How many posts a sender may have in flight to one actor before it must wait. Enough for a burst of 16550
/// writes (16-byte FIFO), small enough that a lane stays in a few cache lines.
#[cfg(not(loom))]
pub const LANE_CREDITS: u32 = 32;
#[cfg(loom)]
/// Small, so that models reach the bound.
pub const LANE_CREDITS: u32 = 1;

// States of a lane, in its futex word.
/// Nobody asks.
pub(super) const IDLE: u32 = 0;
/// There is a call, and its asker looks at the word.
pub(super) const WAITING: u32 = 1;
/// There is a call, and its asker sleeps on the word.
pub(super) const PARKED: u32 = 2;
/// The call was handled; the reply is in the cell.
pub(super) const DONE: u32 = 3;
/// The call will never be handled.
pub(super) const DEAD: u32 = 4;
/// There is a call, and its asker has the token now, and serves it.
pub(super) const GRANTED: u32 = 5;
/// There is a call that nobody waits for: a stop.
pub(super) const LEFT: u32 = 6;

/// What is answered, and the answer.
pub(super) enum Call<M, R> {
    /// Nothing is called for.
    Nothing,
    /// The reply goes into the cell.
    Ask(M),
    /// No message: tells that everything before was handled.
    Fence,
    /// The actor ends after what came before.
    Stop,
    /// To an [`Call::Ask`].
    Reply(R),
}

/// One sender's lane. In this order, so that what an ask needs is in its first 64 bytes for messages of up to 40.
#[repr(C)]
pub(super) struct Lane<A: Actor> {
    /// `IDLE`, `WAITING`…; the futex that an asker sleeps on.
    pub(super) state: Futex,
    /// Next slot to serve; stored by the holder.
    head: AtomicU32,
    /// Next slot to fill; stored by the sender.
    tail: AtomicU32,
    /// How often the sender looked until its last call was handled. Relaxed: it only steers.
    pub(super) looked: AtomicU32,
    /// Whether a port uses this lane.
    pub(super) connected: AtomicBool,
    /// Whether its sender keeps the token.
    pub(super) keep: Keep,
    call: UnsafeCell<Call<A::Message, A::Reply>>,
    posts: [UnsafeCell<MaybeUninit<A::Message>>; LANE_CREDITS as usize],
}

impl<A: Actor> Lane<A> {
    pub(super) fn new() -> Self {
        Lane {
            state: Futex::new(IDLE),
            head: AtomicU32::new(0),
            tail: AtomicU32::new(0),
            looked: AtomicU32::new(0),
            connected: AtomicBool::new(false),
            keep: Keep::new(),
            call: UnsafeCell::new(Call::Nothing),
            posts: std::array::from_fn(|_| UnsafeCell::new(MaybeUninit::uninit())),
        }
    }

    /// Posts not yet taken out, or somewhat more. For the sender: relaxed, as it alone stores `tail`, and looks at `head`
    /// again before it relies on it.
    pub(super) fn backlog(&self) -> u32 {
        self.tail
            .load(Ordering::Relaxed)
            .wrapping_sub(self.head.load(Ordering::Relaxed))
    }

    /// Adds a post. Only the lane's sender may call this, and only with room (`backlog() < LANE_CREDITS`).
    pub(super) fn push(&self, message: A::Message) {
        let tail = self.tail.load(Ordering::Relaxed);
        assert!(
            tail.wrapping_sub(self.head.load(at(Site::Refill, Ordering::Acquire))) < LANE_CREDITS,
            "lane overrun"
        );
        self.posts[(tail % LANE_CREDITS) as usize].with_mut(|slot| {
            // SAFETY: there is room, so the holder has moved this slot's last post out (`head`, Acquire), and it does
            // not look at the slot again before it sees the new tail. `&mut Port` makes us the only sender.
            unsafe { (*slot).write(message) };
        });
        self.tail
            .store(tail.wrapping_add(1), at(Site::Push, Ordering::Release));
    }

    /// Takes the oldest post. Only the holder of the token may call this.
    pub(super) fn pop(&self) -> Option<A::Message> {
        let head = self.head.load(Ordering::Relaxed);
        if head == self.tail.load(at(Site::Pop, Ordering::Acquire)) {
            return None;
        }
        // SAFETY: head != tail, so the sender has written this slot (`tail`, Acquire) and leaves it alone until it
        // sees the new head; the token makes us the only reader, and the post is read out exactly once.
        let message =
            self.posts[(head % LANE_CREDITS) as usize].with_mut(|slot| unsafe { (*slot).assume_init_read() });
        self.head
            .store(head.wrapping_add(1), at(Site::Free, Ordering::Release));
        Some(message)
    }

    /// Puts a call into the cell, in state `WAITING` or `LEFT`. Only the lane's sender may call this, and only when the
    /// call before is over.
    pub(super) fn call(&self, call: Call<A::Message, A::Reply>, state: u32) {
        self.call.with_mut(|cell| {
            // SAFETY: without a call in the state the holder leaves the cell alone; `&mut Port` makes us the only sender.
            unsafe { *cell = call };
        });
        self.state.store(state, at(Site::Call, Ordering::Release));
    }

    /// Whether there is a call to serve.
    #[inline]
    pub(super) fn has_call(&self) -> bool {
        let state = self.state.load(at(Site::HasCall, Ordering::Acquire));
        matches!(state, WAITING | PARKED | LEFT)
    }

    /// Takes the call, or the reply, out of the cell: for the holder, after [`Lane::has_call`]; for the asker, after
    /// `DONE`, or when nobody will ever serve the lane again.
    pub(super) fn take(&self) -> Call<A::Message, A::Reply> {
        self.call.with_mut(|cell| {
            // SAFETY: between `WAITING` and `DONE` the cell is the holder's, and before and after the asker's; the state's
            // orderings make each a move.
            std::mem::replace(unsafe { &mut *cell }, Call::Nothing)
        })
    }

    /// For the holder: the call is handled. `true`: its asker sleeps, and has to be woken ([`Futex::wake`]).
    pub(super) fn conclude(&self, reply: Option<A::Reply>) -> bool {
        if let Some(reply) = reply {
            // SAFETY: as in `take`: the asker reads only after `DONE`, which comes below.
            self.call.with_mut(|cell| unsafe { *cell = Call::Reply(reply) });
        }
        if planted(Bug::WakeFirst) {
            self.state.wake();
        }
        let before = self.state.swap(DONE, at(Site::Conclude, Ordering::Release));
        before == PARKED && !planted(Bug::WakeFirst)
    }

    /// Hands the token to the asker, if it looks.
    pub(super) fn grant(&self) -> bool {
        // Release: the asker that sees GRANTED is the next holder and must see the actor's state.
        let release = at(Site::Grant, Ordering::Release);
        let granted = |from| {
            self.state
                .compare_exchange(from, GRANTED, release, Ordering::Relaxed)
                .is_ok()
        };
        granted(WAITING) || planted(Bug::HandToSleeper) && granted(PARKED)
    }

    /// Tells an asker, if one waits, that nobody will serve it.
    pub(super) fn kill(&self) {
        // Only the one who waits leaves WAITING or PARKED behind; a lane at rest is left alone. Relaxed: whose bit is
        // seen, his state is (`Site::Close`).
        let mut state = self.state.load(Ordering::Relaxed);
        while matches!(state, WAITING | PARKED) {
            let release = at(Site::Kill, Ordering::Release);
            match self
                .state
                .compare_exchange(state, DEAD, release, Ordering::Relaxed)
            {
                Ok(_) => {
                    if state == PARKED && !planted(Bug::CloseLetsSleep) {
                        self.state.wake();
                    }
                    return;
                }
                Err(now) => state = now,
            }
        }
    }
}

impl<A: Actor> Drop for Lane<A> {
    fn drop(&mut self) {
        // What was left in the lane of a closed actor.
        while self.pop().is_some() {}
    }
}
