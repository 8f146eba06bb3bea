//! The actor runtime: typed addresses, bounded mailboxes, a run token, placements, ranks, lifecycle.
//!
//! # The contract, in a page
//!
//! * An [`Actor`] owns its state. Nobody else can name it. It handles one message at a time.
//! * A sender holds a [`Port`]: its own bounded lane into the actor's mailbox. Messages of one port are handled in
//!   the order they were sent. There is no order between ports.
//! * [`Port::ask`] waits for the reply, which travels in the request's own lane. [`Port::post`] does not wait;
//!   it costs a credit, and a sender without credits waits until its earlier posts have been handled.
//!   [`Port::fence`] waits until they all have.
//! * Waiting goes upward only: an actor (or a thread) may ask only actors of a higher [`Rank`]. This is asserted
//!   in every build, so no cycle of waits can exist. Actors of one pool may not wait for each other at all.
//! * Where an actor runs is chosen when it is spawned ([`Placement`]) and cannot be seen by it or its senders:
//!   `handoff` (on the thread of whoever sends to it while it is idle), `thread` (one of its own) or `pool`.
//! * An actor that panics is closed: its state is dropped, everyone who waits for it gets [`Closed`] at once, so
//!   does everyone who sends later, and an [`Obituary`] names it. Stop ([`Port::stop`]) closes it in order, after
//!   the sender's earlier messages.
//! * On an idle `handoff` actor, ask and post make no system call and no allocation; and no locked instruction for a sender
//!   that has been alone with it for long.
//!
//! | file | what |
//! |---|---|
//! | `mailbox.rs` | the word of the run token, serving, handing over, closing |
//! | `lane.rs` | one sender's way in: a ring of posts, a cell for a call |
//! | `port.rs` | the sender's side: ask, post, fence, stop |
//! | `keep.rs` | a sender that is alone for long keeps the token |
//! | `placement.rs` | who runs a turn: the sender, a thread, a pool |
//! | `park.rs` | spin, then sleep, without a lost wake-up |
//! | `rank.rs` | who may wait for whom |
//! | `look.rs` | a mailbox as it looks from outside |
//! | `sync.rs` | the atomics: the real ones, or loom's when models are explored |
//! | `models.rs` | loom models of the token, park and close protocols |
//! | `planted.rs` | the mistakes that those and all other models must find |

mod keep;
mod lane;
mod look;
mod mailbox;
pub(crate) mod park;
mod placement;
mod planted;
mod port;
mod rank;
pub(crate) mod sync;

#[cfg(all(test, loom))]
mod models;
#[cfg(all(test, not(loom)))]
mod tests;

pub use lane::LANE_CREDITS;
pub use look::{CallLook, LaneLook, MailboxLook};
pub use mailbox::MAX_LANES;
pub use placement::{Placement, PlacementKind, Pool};
pub use port::{Address, Closed, Port, Spawned};
pub use rank::{Rank, RankGuard};

/// State with one owner that handles messages one at a time.
pub trait Actor: Send + 'static {
    /// What it receives.
    type Message: Send;
    /// What an ask returns.
    type Reply: Send;
    /// Where it stands in the order of waits.
    const RANK: Rank;

    /// One turn. A post's reply is dropped.
    fn handle(&mut self, message: Self::Message) -> Self::Reply;
}

/// What every actor of a machine is told about the machine's life, as a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lifecycle {
    /// The machine starts to run. For vCPUs only.
    Start,
    /// Guest time stops. State must not change until [`Lifecycle::Resume`].
    Pause,
    /// Guest time goes on.
    Resume,
    /// Back to the power-on state.
    Reset,
}

impl Lifecycle {
    /// All of them, in the order of their numbers.
    pub const ALL: [Lifecycle; 4] = [
        Lifecycle::Start,
        Lifecycle::Pause,
        Lifecycle::Resume,
        Lifecycle::Reset,
    ];

    /// As a verb.
    pub fn name(self) -> &'static str {
        match self {
            Lifecycle::Start => "start",
            Lifecycle::Pause => "pause",
            Lifecycle::Resume => "resume",
            Lifecycle::Reset => "reset",
        }
    }
}

/// The news that an actor died of a panic.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Obituary {
    /// Its name, as given when it was spawned.
    pub actor: String,
    /// What it said when it panicked.
    pub cause: String,
}
