//! Bare-metal guests carried in the binary, in assembly built by the compiler itself: no other tool is needed.
//!
//! | file | what |
//! |---|---|
//! | `probes.rs` | single instructions, to find out what this host's KVM can run |

pub mod probes;

/// Where guests are loaded and entered.
pub const LOAD_ADDRESS: u64 = 0x10_0000;

/// Assembles a guest into this binary's read-only data and defines a function that returns its bytes.
///
/// `image!(fn name = "symbol"; "line of assembly", …)`. The symbol must be unique in the binary. Syntax is Intel's;
/// `.code16`, `.code32` and `.code64` choose the mode. Code must not depend on where it is in the binary: labels are
/// used relative to each other or to RIP.
macro_rules! image {
    ($(#[$meta:meta])* $vis:vis fn $name:ident = $symbol:literal; $($line:expr),+ $(,)?) => {
        std::arch::global_asm!(
            ".pushsection .rodata.guest, \"a\"",
            concat!(".globl ", $symbol, ", ", $symbol, "_end"),
            concat!(".hidden ", $symbol, ", ", $symbol, "_end"),
            ".balign 16",
            concat!($symbol, ":"),
            $($line),+,
            concat!($symbol, "_end:"),
            // What follows in the compilation unit is the compiler's.
            ".code64",
            ".popsection",
        );
        $(#[$meta])*
        $vis fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = $symbol]
                static START: u8;
                #[link_name = concat!($symbol, "_end")]
                static END: u8;
            }
            // SAFETY: both labels are in one section, the end behind the start (above), and nothing writes there.
            unsafe {
                let start = &raw const START;
                std::slice::from_raw_parts(start, (&raw const END).offset_from(start) as usize)
            }
        }
    };
}
pub(crate) use image;
