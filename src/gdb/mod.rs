//! The gdb server: gdb's remote protocol, for the whole machine. Each vCPU is a thread of one process.
//!
//! | file | what |
//! |---|---|
//! | `breakpoints.rs` | which breakpoints there are, and how each is made: pure |
//! | `registers.rs` | a vCPU's registers as gdb numbers them: pure |
//! | `walk.rs` | linear to physical addresses, by the guest's page tables: pure |

pub mod breakpoints;
pub mod registers;
pub mod walk;
