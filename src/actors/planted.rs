//! Planted bugs, and the tests that the models find them: a model that finds nothing proves something only if it
//! would find what it is for.
//!
//! Each place whose memory ordering matters is a [`Site`] and asks [`at`] for its ordering; each step of a protocol
//! that is easily left out is a [`Bug`] and asks [`planted`]. Without loom both are constants, and the compiled program
//! has no trace of them. Under loom a thread may have one [`Mutant`], for the models that it then runs: one half of one
//! site's ordering is lost, or one bug is there. `planted/found.rs` has a list of all of them, each with the model that
//! must fail.

#[cfg(all(test, loom))]
mod found;

use std::sync::atomic::Ordering;

/// A place in a protocol whose ordering matters. The reason is beside the place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Site {
    // actors/mailbox.rs, port.rs
    /// An idle actor's token is taken.
    Take,
    /// The token is given back.
    LetGo,
    /// The holder takes the lanes' bits out of the word.
    Sweep,
    /// A sender sets its bit, and may take the token by that.
    Register,
    /// The end.
    Close,
    /// A fence finds the actor idle.
    Fence,
    /// An actor's own thread goes to sleep.
    FallAsleep,
    /// A sender is the one that wakes it.
    Ring,
    /// A port takes a lane.
    Connect,
    /// A port leaves a lane.
    Disconnect,
    // actors/lane.rs
    /// The sender publishes a post.
    Push,
    /// The holder sees it.
    Pop,
    /// The holder has moved it out.
    Free,
    /// The sender sees that, and fills the slot again.
    Refill,
    /// The sender publishes a call.
    Call,
    /// The holder sees it.
    HasCall,
    /// The holder publishes the reply.
    Conclude,
    /// The holder gives the token to an asker.
    Grant,
    /// The holder gives the call back to an asker that nobody will serve.
    Kill,
    /// The asker sees any of these three.
    Settled,
    // actors/keep.rs, mailbox.rs
    /// The token is let go and kept.
    Keep,
    /// Somebody is the one that revokes it.
    Unkeep,
    /// The keeper has said that it is in a turn, and looks.
    KeeperEnters,
    /// It says that it is not.
    KeeperLeaves,
    /// It has, and looks.
    KeeperLooks,
    /// Whoever comes has revoked, and looks.
    Revoke,
    /// It sees that the keeper is not in a turn.
    RevokerLooks,
    // vcpu/kick.rs
    /// A kicker marks the word.
    Mark,
    /// The vCPU is about to run the guest.
    Enter,
    /// It is back.
    Leave,
    /// A kicker has sent its signal.
    CountDown,
    /// The thread sees that it may end.
    Gone,
    // host/wish.rs
    /// One side has said that it wishes to be told, and looks once more.
    Wish,
    /// The other side has made a change, and looks whether anybody wishes to be told.
    Change,
}

/// A mistake in a protocol that has nothing to do with memory orderings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bug {
    // actors
    /// The token is let go whatever has come in.
    LetGoBlindly,
    /// The token is handed over, and what was taken out of the word is forgotten.
    HandOverForgets,
    /// The token is handed to an asker that sleeps.
    HandToSleeper,
    /// A closing holder forgets what it has taken out of the word.
    CloseForgets,
    /// A closing holder does not wake who sleeps.
    CloseLetsSleep,
    /// A sender that comes to an idle actor leaves its bit and goes.
    RegisterAndGo,
    /// A sender that was served by another once waits for that again, unregistered.
    ExpectForEver,
    /// An asker goes to sleep without looking again.
    ParkBlindly,
    /// An asker is woken before its reply is there.
    WakeFirst,
    /// A call is served before the posts that came before it.
    CallFirst,
    /// A fence is content with an empty lane.
    FenceByLane,
    /// An actor's own thread goes to sleep without looking again.
    SleepBlindly,
    /// It prepares its bell only when it can be rung already.
    BellLate,
    /// Whoever comes takes a kept token without a look at its keeper.
    RevokeBlindly,
    /// Both sides claim a revoked token, and both get it.
    ClaimBlindly,
    /// Whoever revokes claims a later keeping than it has looked at.
    ClaimAnother,
    /// The keeper does not look whether it was revoked during its turn.
    KeepBlindly,
    /// Everybody who finds a token kept revokes it.
    RevokeTogether,
    /// A token is kept whatever has come in.
    KeepWhatever,
    // vcpu/kick.rs
    /// The signal is sent before the mark.
    SignalFirst,
    /// Kickers on their way to a signal are not counted.
    NotCounted,
    /// A kicker that finds a mark does nothing.
    MarkedAlready,
    /// Every kick signals.
    SignalAlways,
    /// The vCPU enters the guest with a mark.
    EnterBlindly,
    /// A thread that ends in the middle of a stay does not say so.
    GoneUnsaid,
    // host/wish.rs
    /// Who wishes to be told does not look again.
    WishBlindly,
    // host/timer.rs
    /// The event loop is woken before the deadline is there.
    WakeBeforeDeadline,
    /// A deadline is taken whatever it is by now.
    TakeBlindly,
}

#[cfg(not(loom))]
mod real {
    use super::{Bug, Ordering, Site};

    /// The ordering of a place.
    #[inline(always)]
    pub(crate) const fn at(_: Site, ordering: Ordering) -> Ordering {
        ordering
    }

    /// Whether a bug is there. It is not.
    #[inline(always)]
    pub(crate) const fn planted(_: Bug) -> bool {
        false
    }
}

#[cfg(not(loom))]
pub(crate) use real::{at, planted};

#[cfg(loom)]
pub(crate) use mutation::{at, planted};

#[cfg(loom)]
mod mutation {
    use super::{Bug, Ordering, Site};
    use std::cell::Cell;

    /// What an ordering gives.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(crate) enum Half {
        Acquire,
        Release,
        /// The single order of all sequentially consistent fences.
        Total,
    }

    /// What is wrong with the program.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(crate) enum Mutant {
        Loses(Site, Half),
        Has(Bug),
    }

    thread_local! {
        // All threads of a model are coroutines on the thread that explores it, so this is the whole model's.
        static MUTANT: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// The models that this thread runs from now on have a mutant.
    #[cfg(test)]
    pub(crate) fn plant(mutant: Mutant) {
        MUTANT.set(Some(mutant));
    }

    pub(crate) fn at(site: Site, ordering: Ordering) -> Ordering {
        use Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
        match MUTANT.get() {
            Some(Mutant::Loses(mutated, half)) if mutated == site => match (ordering, half) {
                (AcqRel, Half::Acquire) => Release,
                (AcqRel, Half::Release) => Acquire,
                (Acquire, Half::Acquire) | (Release, Half::Release) => Relaxed,
                (SeqCst, Half::Total) => AcqRel,
                _ => panic!(
                    "{site:?} is {ordering:?} and has no half {half:?} to lose: mend the list of mutants"
                ),
            },
            _ => ordering,
        }
    }

    pub(crate) fn planted(bug: Bug) -> bool {
        MUTANT.get() == Some(Mutant::Has(bug))
    }
}

#[cfg(all(test, loom))]
pub(crate) use mutation::{Half, Mutant, plant};
