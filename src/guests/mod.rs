//! Bare-metal guests carried in the binary, in assembly built by the compiler itself: no other tool is needed.
//!
//! | file | what |
//! |---|---|
//! | `probes.rs` | single instructions, to find out what this host's KVM can run |
//! | `demo.rs` | the guest of `actor-vmm run --demo` |
//! | `cases.rs` | test guests, one for each thing that a guest can do to the machine |
//! | `meter.rs` | the measuring guest of `actor-vmm bench` |
//! | `debug.rs` | the guest that the tests of the gdb server debug |
//! | `runtime64.rs` | what 64-bit guests share: printing, interrupts, starting processors |
//!
//! All of them stay within what a KVM that interprets ring 0 knows: integer, string, control-register and MSR
//! instructions; no `int n`, no SSE.

#[doc(hidden)]
pub mod cases;
#[doc(hidden)]
pub mod debug;
pub mod demo;
pub mod meter;
pub mod probes;
mod runtime64;

/// Where guests are loaded and entered.
pub const LOAD_ADDRESS: u64 = 0x10_0000;

/// Assembles a guest into this binary's read-only data and defines a function that returns its bytes.
///
/// `image!(fn name = "symbol"; "line of assembly", …)`. The symbol must be unique in the binary. Syntax is Intel's;
/// `.code16`, `.code32` and `.code64` choose the mode. Code must not depend on where it is in the binary: labels are
/// used relative to each other or to RIP. A difference of labels is an immediate only by a name of its own: `.set
/// LENGTH, .Lend - .Lstart`, then `offset LENGTH`. More numbers of Rust's come as `; name = const VALUE` at the end, for
/// `{name}` in the lines. Labels are the binary's, not the image's: `.L` and a prefix.
///
/// Every image can use the names below; they are numbers, so `mov dx, COM1` loads one. In 64-bit code an address
/// above 2 GiB (`LAPIC`) must come from a register: a displacement is sign-extended.
macro_rules! image {
    (
        $(#[$meta:meta])* $vis:vis fn $name:ident = $symbol:literal; $($line:expr),+ $(,)?
        $(; $($operand:ident = const $value:expr),+)?
    ) => {
        std::arch::global_asm!(
            ".pushsection .rodata.guest, \"a\"",
            // The machine, as `layout.rs` has it.
            ".set COM1, {com1}",
            ".set RTC, {rtc}",
            ".set I8042_COMMAND, {i8042} + 4",
            ".set DEBUG_CONSOLE, {debug_console}",
            ".set DEBUG_EXIT, {debug_exit}",
            ".set TARPIT, {tarpit}",
            ".set PVPANIC, {pvpanic}",
            ".set PM1A_CONTROL, {pm1a_control}",
            ".set PM_TIMER, {pm_timer}",
            ".set PM_TIMER_HZ, {pm_timer_hz}",
            ".set POWER_OFF, {power_off}",
            ".set ACPI_RESET, {acpi_reset}",
            ".set ACPI_RESET_VALUE, {acpi_reset_value}",
            ".set PCI_CONFIG, {pci_config}",
            ".set IOAPIC, {ioapic}",
            ".set LAPIC, {lapic}",
            ".set NOWHERE, {pci_hole} + 0x10000000",
            ".set PML4, {pml4}",
            // [boot/entry.rs: the selectors of its GDT]
            ".set CODE_SELECTOR, 0x10",
            ".set DATA_SELECTOR, 0x18",
            ".set LOAD_ADDRESS, {load}",
            concat!(".globl ", $symbol, ", ", $symbol, "_end"),
            concat!(".hidden ", $symbol, ", ", $symbol, "_end"),
            ".balign 16",
            concat!($symbol, ":"),
            $($line),+,
            concat!($symbol, "_end:"),
            // What follows in the compilation unit is the compiler's.
            ".code64",
            ".popsection",
            com1 = const $crate::boot::layout::io::SERIAL0,
            rtc = const $crate::boot::layout::io::RTC,
            i8042 = const $crate::boot::layout::io::I8042,
            debug_console = const $crate::boot::layout::io::DEBUG_CONSOLE,
            debug_exit = const $crate::boot::layout::io::DEBUG_EXIT,
            tarpit = const $crate::boot::layout::io::TARPIT,
            pvpanic = const $crate::boot::layout::io::PVPANIC,
            pm1a_control = const $crate::boot::layout::io::PM1A_CONTROL,
            pm_timer = const $crate::boot::layout::io::PM_TIMER,
            pm_timer_hz = const $crate::devices::acpi_pm::PM_TIMER_HZ,
            // PM1_CNT: SLP_TYP and SLP_EN [ACPI 6.4 table 4.15].
            power_off = const ($crate::devices::acpi_pm::SLP_TYP_S5 as u16) << 10 | 1 << 13,
            acpi_reset = const $crate::boot::layout::io::ACPI_RESET,
            acpi_reset_value = const $crate::boot::layout::io::ACPI_RESET_VALUE,
            pci_config = const $crate::boot::layout::io::PCI_CONFIG,
            ioapic = const $crate::boot::layout::IOAPIC,
            lapic = const $crate::boot::layout::LAPIC,
            pci_hole = const $crate::boot::layout::PCI_HOLE,
            pml4 = const $crate::boot::layout::PML4,
            load = const $crate::guests::LOAD_ADDRESS,
            $($($operand = const $value,)+)?
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
