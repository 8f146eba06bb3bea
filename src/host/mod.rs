//! The host's side of the machine: what blocks, and what talks to descriptors.
//!
//! | file | what |
//! |---|---|
//! | `events.rs` | the event loop: one thread that waits for the console's descriptors and timers |
//! | `signals.rs` | which signals do what |
//! | `bus.rs` | SIGBUS in guest memory |
//! | `character.rs` | the two rings between a character device and the event loop |
//! | `wish.rs` | how those two wake each other only when needed |
//! | `timer.rs` | deadlines that devices tell the event loop |
//! | `code.rs` | the memory of code that has done its work |
//! | `console.rs` | where the guest's console goes: stdio, a file, a pseudo-terminal, nowhere |
//! | `socket.rs` | a Unix socket that others connect to: made, found stale, removed |
//! | `escape.rs` | Ctrl-A x and its like in what a person types |
//! | `terminal.rs` | the terminal's raw mode, and its end on every way out |
//! | `log.rs` | the log: one line a record on stderr, never in the way of a vCPU |

pub mod bus;
pub mod character;
pub mod code;
pub mod console;
pub mod escape;
pub mod events;
pub mod log;
pub mod signals;
pub mod socket;
pub mod terminal;
pub mod timer;
pub(crate) mod wish;
