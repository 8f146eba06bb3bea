//! The gdb server: gdb's remote protocol, for the whole machine. Each vCPU is a thread of one process.
//!
//! | file | what |
//! |---|---|
//! | `breakpoints.rs` | which breakpoints there are, and how each is made: pure |
//! | `registers.rs` | a vCPU's registers as gdb numbers them: pure |
//! | `target.rs` | the machine as gdb's protocol sees it, over whatever can be paused and asked |
//! | `session.rs` | one gdb's session, without its socket |
//! | `server.rs` | the thread: sockets and news in one poll |
//! | `remote.rs` | the machine as this thread reaches it: by messages |
//! | `probe.rs` | which breakpoints this host honours |
//! | `walk.rs` | linear to physical addresses, by the guest's page tables: pure |

pub mod breakpoints;
pub mod probe;
pub mod registers;
pub mod remote;
pub mod server;
pub mod session;
pub mod target;
#[cfg(test)]
mod tests;
pub mod walk;
