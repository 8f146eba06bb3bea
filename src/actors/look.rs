//! What a mailbox looks like from outside, without taking part: loads of its published words, nothing else. For whoever
//! wants to know why something does not go on. Each word is of its own moment.

use super::Actor;
use super::lane::{GRANTED, LEFT, PARKED, WAITING};
use super::mailbox::{ASLEEP, CLOSED, HELD, KEPT};
use super::placement::{PlacementKind, Runner};
use super::port::Address;
use super::sync::Ordering;

/// A mailbox at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MailboxLook {
    /// Somebody has the run token, and not only keeps it.
    pub held: bool,
    /// It is the actor's own thread, and it sleeps.
    pub asleep: bool,
    /// The actor has ended.
    pub closed: bool,
    /// Where the actor runs.
    pub placement: PlacementKind,
    /// The lanes that have something.
    pub lanes: Vec<LaneLook>,
}

/// A lane at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneLook {
    /// Which: in the order in which senders connected.
    pub lane: usize,
    /// What its sender waits for.
    pub call: CallLook,
    /// Posts that nobody has taken out.
    pub posts: u32,
}

/// What a lane's sender waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallLook {
    /// Nothing.
    Nothing,
    /// A reply, and it looks for it; or it serves its own call.
    Looks,
    /// A reply, and it sleeps.
    Sleeps,
    /// It was given the token.
    Granted,
    /// Nobody waits: a stop.
    Left,
}

impl<A: Actor> Address<A> {
    /// The mailbox now.
    pub fn look(&self) -> MailboxLook {
        let core = self.core();
        // Relaxed, here and below: each word stands for itself.
        let word = core.word.load(Ordering::Relaxed);
        let lanes = core.lanes.iter().enumerate().filter_map(|(lane, state)| {
            let call = match state.state.load(Ordering::Relaxed) {
                WAITING => CallLook::Looks,
                PARKED => CallLook::Sleeps,
                GRANTED => CallLook::Granted,
                LEFT => CallLook::Left,
                _ => CallLook::Nothing,
            };
            let posts = state.backlog();
            (call != CallLook::Nothing || posts > 0).then_some(LaneLook { lane, call, posts })
        });
        MailboxLook {
            held: word & HELD != 0 && (word & KEPT == 0 || core.is_keeper_inside()),
            asleep: word & ASLEEP != 0,
            closed: word & CLOSED != 0,
            placement: match core.runner {
                Runner::Sender => PlacementKind::Handoff,
                Runner::Resident => PlacementKind::Thread,
                Runner::Pool(_) => PlacementKind::Pool,
            },
            lanes: lanes.collect(),
        }
    }
}
