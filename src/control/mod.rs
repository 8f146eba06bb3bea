//! The control plane: what somebody outside can ask of a running machine and know about it.
//!
//! | file | what |
//! |---|---|
//! | `verbs.rs` | the verbs, their requests and answers, as JSON: no transport |
//! | `observatory.rs` | everything that can be read without asking anybody |
//! | `why.rs` | who waits for whom, made of what was read: pure |
//! | `plane.rs` | the control thread: clients, signals |
//! | `lines.rs` | lines in and out of one client, with bounds: pure |
//! | `client.rs` | `actor-vmm ctl` |
//!
//! What only looks (`status`, `why`, `actors`, `metrics`) reads words that their owners publish, so it answers whatever
//! is stuck. What changes something is a message to the machine actor; its answer comes back by a message too. The
//! control thread itself never waits for either, nor for a client.

pub mod client;
pub mod lines;
pub mod observatory;
pub mod plane;
pub mod verbs;
pub mod why;
