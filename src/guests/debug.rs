//! The guest that the tests of the gdb server debug: it counts, in a function that it calls for ever, until it is told to
//! stop by a byte of its memory.
//!
//! | address | what |
//! |---|---|
//! | [`COUNTER`] | how often the function was called, 8 bytes |
//! | [`FUNCTION`] | where the function is, 8 bytes; not 0 once everything is set up |
//! | [`LOOP`] | where the loop is that calls it, 8 bytes |
//! | [`STOP`] | not 0: end with [`PASSED`](super::cases::PASSED) |

use super::image;
use super::runtime64::runtime64;

/// See the module.
pub const COUNTER: u64 = 0x3_0000;
/// See the module.
pub const FUNCTION: u64 = 0x3_0008;
/// See the module.
pub const LOOP: u64 = 0x3_0010;
/// See the module.
pub const STOP: u64 = 0x3_0018;

image! {
    /// See the module.
    pub(super) fn debug = "actor_vmm_debug";
    ".code64",
    runtime64!("dbg", "actor_vmm_debug"),

    ".globl actor_vmm_case_debug",
    ".hidden actor_vmm_case_debug",
    "actor_vmm_case_debug:",
    "call .Ldbg_interrupts",
    "call .Ldbg_count",
    "cmp eax, 1",
    "je 2f",
    "call .Ldbg_start",
    "2: lea rax, [rip + .Ldbg_loop]",
    "mov [{table} + 0x10], rax",
    "lea rax, [rip + .Ldbg_function]",
    "mov [{table} + 0x08], rax",
    // A frame that a backtrace ends in, and a register to be recognized.
    "xor ebp, ebp",
    "mov r12d, 0xdeb06",
    ".Ldbg_loop:",
    "call .Ldbg_function",
    "cmp byte ptr [{table} + 0x18], 0",
    "je .Ldbg_loop",
    "mov al, {passed}",
    "call .Ldbg_exit",

    ".Ldbg_function:",
    "push rbp",
    "mov rbp, rsp",
    "inc qword ptr [{table}]",
    "pop rbp",
    "ret",
    ; table = const COUNTER, passed = const super::cases::PASSED
}
