//! Test guests: small, each for a few things that a guest can do to the machine.
//!
//! `actor-vmm run --guest NAME` runs one; `tests/kvm_guests.rs` runs all. One that checks something ends by the
//! debug-exit port: with [`PASSED`], or with the number of the check that failed. One that ends otherwise (power,
//! reset, a fault) is a failure of the machine if it goes on: then it ends with [`STILL_HERE`].
//!
//! Exits of KVM that no guest can cause on x86 as this program sets it up: SYSTEM_EVENT (Hyper-V crash registers are
//! not offered), UNKNOWN and FAIL_ENTRY (need a broken host or broken registers), IRQ_WINDOW_OPEN and IOAPIC_EOI (need
//! interrupt controllers outside of KVM), DEBUG (needs KVM_SET_GUEST_DEBUG).

use super::debug::debug;
use super::probes;
use super::runtime64::runtime64;
use super::{LOAD_ADDRESS, image};
use crate::boot::EntryPoint;
use crate::machine::supervisor::Guest;

/// What a guest gives to the debug-exit port when all its checks were good.
pub const PASSED: u8 = 42;
/// What a guest gives to the debug-exit port when the machine should have ended.
pub const STILL_HERE: u8 = 41;

/// Where real-mode guests are loaded: at the start of a segment.
const REAL_ADDRESS: u64 = 0x1_0000;

/// The label at which a case begins.
macro_rules! entry {
    ($name:literal) => {
        concat!(
            ".globl actor_vmm_case_",
            $name,
            "\n.hidden actor_vmm_case_",
            $name,
            "\nactor_vmm_case_",
            $name,
            ":\n"
        )
    };
}

/// String I/O in any mode: `si`, `di` and `cx` are the registers that the mode's string instructions use, `prefix`
/// that of the image's names. DS leads to the image, ES to memory from 0. Ends with what is printed last.
///
/// Failures: 1, bytes; 2, words in; 3, double words in; 4, double words out and in.
macro_rules! string_io {
    ($p:literal, $si:literal, $di:literal, $cx:literal) => {
        concat!(
            ".set SCRATCH, 0x7000\n",
            "cld\n",
            // Bytes: 16 through the serial port's loopback with its FIFOs on and empty [PC16550D §8.5, §8.8].
            "mov bl, 1\n",
            "mov dx, COM1 + 4\n",
            "mov al, 0x1b\n",
            "out dx, al\n",
            "mov dx, COM1 + 2\n",
            "mov al, 7\n",
            "out dx, al\n",
            "mov dx, COM1\n",
            "mov ", $si, ", offset ", $p, "_PATTERN\n",
            "mov ", $cx, ", 16\n",
            "rep outsb\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 16\n",
            "rep insb\n",
            "mov dx, COM1 + 4\n",
            "mov al, 0xb\n",
            "out dx, al\n",
            "mov ", $si, ", offset ", $p, "_PATTERN\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 16\n",
            "repe cmpsb\n",
            "jne .L", $p, "_failed\n",

            // Words in, from a port that nobody claims; the word behind them stays as it is.
            "mov bl, 2\n",
            "mov dx, 0x300\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 6\n",
            "xor eax, eax\n",
            "rep stosw\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 5\n",
            "rep insw\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 5\n",
            "mov ax, 0xffff\n",
            "repe scasw\n",
            "jne .L", $p, "_failed\n",
            "inc ax\n",
            "scasw\n",
            "jne .L", $p, "_failed\n",

            // Double words in, the same way.
            "mov bl, 3\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 4\n",
            "xor eax, eax\n",
            "rep stosd\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 3\n",
            "rep insd\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 3\n",
            "mov eax, 0xffffffff\n",
            "repe scasd\n",
            "jne .L", $p, "_failed\n",
            "inc eax\n",
            "scasd\n",
            "jne .L", $p, "_failed\n",

            // Double words out: the last one stays in the address register of PCI's mechanism #1 [PCI 3.0 §3.2.2.3.2].
            "mov bl, 4\n",
            "mov dx, PCI_CONFIG\n",
            "mov ", $si, ", offset ", $p, "_ADDRESSES\n",
            "mov ", $cx, ", 2\n",
            "rep outsd\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 2\n",
            "rep insd\n",
            "mov ", $di, ", SCRATCH\n",
            "mov ", $cx, ", 2\n",
            "mov eax, 0x80005678\n",
            "repe scasd\n",
            "jne .L", $p, "_failed\n",

            // Words and double words to the debug console, which takes the low byte of each; and backwards.
            "mov dx, DEBUG_CONSOLE\n",
            "mov ", $si, ", offset ", $p, "_WORDS\n",
            "mov ", $cx, ", 6\n",
            "rep outsw\n",
            "mov ", $cx, ", 7\n",
            "rep outsd\n",
            "std\n",
            "mov ", $si, ", offset ", $p, "_BACKWARDS\n",
            "mov ", $cx, ", 10\n",
            "rep outsb\n",
            "cld\n",
        )
    };
}

/// What [`string_io`] reads. `base` is the address of the image's symbol as its code sees it.
macro_rules! string_io_data {
    ($p:literal, $symbol:literal, $base:literal) => {
        concat!(
            ".set ",
            $p,
            "_PATTERN, .L",
            $p,
            "_pattern - ",
            $symbol,
            " + ",
            $base,
            "\n",
            ".set ",
            $p,
            "_ADDRESSES, .L",
            $p,
            "_addresses - ",
            $symbol,
            " + ",
            $base,
            "\n",
            ".set ",
            $p,
            "_WORDS, .L",
            $p,
            "_words - ",
            $symbol,
            " + ",
            $base,
            "\n",
            ".set ",
            $p,
            "_BACKWARDS, .L",
            $p,
            "_backwards_end - 1 - ",
            $symbol,
            " + ",
            $base,
            "\n",
            ".L",
            $p,
            "_pattern: .ascii \"0123456789abcdef\"\n",
            ".L",
            $p,
            "_addresses: .long 0x80001234, 0x80005678\n",
            ".L",
            $p,
            "_words:\n",
            ".word 0x7777, 0x786f, 0x7972, 0x7a64, 0x7b73, 0x7c0a\n",
            ".long 0x64, 0xabcdef77, 0x6f, 0x12345672, 0x64, 0x73, 0x0a\n",
            ".ascii \"\\nsdrawkcab\"\n",
            ".L",
            $p,
            "_backwards_end:\n",
        )
    };
}

image! {
    fn real = "actor_vmm_cases_real";
    ".code16",
    // Hello, byte by byte and as a string.
    entry!("real_hello"),
    "mov ax, cs",
    "mov ds, ax",
    "cld",
    ".set REAL_TEXT, .Lreal_text - actor_vmm_cases_real",
    ".set REAL_TEXT_BYTES, .Lreal_text_end - 1 - .Lreal_text",
    "mov dx, COM1",
    "mov si, offset REAL_TEXT",
    "2: lodsb",
    "test al, al",
    "jz 3f",
    "out dx, al",
    "jmp 2b",
    "3: mov cx, offset REAL_TEXT_BYTES",
    "mov si, offset REAL_TEXT",
    "rep outsb",
    "mov dx, PM1A_CONTROL",
    "mov ax, POWER_OFF",
    "out dx, ax",
    "mov bl, {still_here}",
    "jmp .Lreal_linger",
    ".Lreal_text: .asciz \"Hello from 16 bits.\\n\"",
    ".Lreal_text_end:",

    entry!("real_string"),
    "mov ax, cs",
    "mov ds, ax",
    string_io!("real", "si", "di", "cx"),
    "mov bl, {passed}",
    ".Lreal_failed:",
    "mov al, bl",
    "out DEBUG_EXIT, al",
    "2: hlt",
    "jmp 2b",
    string_io_data!("real", "actor_vmm_cases_real", "0"),

    // The 8042's command to pulse its output 0, the processor's reset [IBM PC/AT Technical Reference].
    entry!("real_reset"),
    "mov al, 0xfe",
    "out I8042_COMMAND, al",
    "mov bl, {still_here}",

    // linger: the machine ends asynchronously; wait half a second by the PM timer, then give BL.
    ".Lreal_linger:",
    "mov dx, PM_TIMER",
    "in eax, dx",
    "mov ecx, eax",
    "2: in eax, dx",
    "sub eax, ecx",
    "cmp eax, PM_TIMER_HZ / 2",
    "jb 2b",
    "jmp .Lreal_failed";
    passed = const PASSED, still_here = const STILL_HERE
}

image! {
    fn flat32 = "actor_vmm_cases_flat32";
    ".code32",
    entry!("flat32_hello"),
    "cld",
    ".set FLAT32_TEXT, .Lflat32_text - actor_vmm_cases_flat32 + LOAD_ADDRESS",
    ".set FLAT32_TEXT_BYTES, .Lflat32_text_end - .Lflat32_text",
    "mov edx, COM1",
    "mov esi, offset FLAT32_TEXT",
    "mov ecx, offset FLAT32_TEXT_BYTES",
    "rep outsb",
    "mov edx, PM1A_CONTROL",
    "mov eax, POWER_OFF",
    "out dx, ax",
    // Half a second later the machine is off.
    "mov edx, PM_TIMER",
    "in eax, dx",
    "mov ecx, eax",
    "2: in eax, dx",
    "sub eax, ecx",
    "cmp eax, PM_TIMER_HZ / 2",
    "jb 2b",
    "mov bl, {still_here}",
    ".Lflat32_failed:",
    "mov al, bl",
    "out DEBUG_EXIT, al",
    "2: hlt",
    "jmp 2b",
    ".Lflat32_text: .ascii \"Hello from 32 bits.\\n\"",
    ".Lflat32_text_end:",

    entry!("flat32_string"),
    string_io!("flat32", "esi", "edi", "ecx"),
    "mov bl, {passed}",
    "jmp .Lflat32_failed",
    string_io_data!("flat32", "actor_vmm_cases_flat32", "LOAD_ADDRESS");
    passed = const PASSED, still_here = const STILL_HERE
}

image! {
    fn flat64 = "actor_vmm_cases_flat64";
    runtime64!("flat64", "actor_vmm_cases_flat64"),
    ".code64",

    // passed and failed: with PASSED, or with the number in BL.
    ".Lflat64_passed:",
    "mov bl, {passed}",
    ".Lflat64_failed:",
    "mov al, bl",
    "jmp .Lflat64_exit",

    // linger: the machine ends asynchronously, within half a second.
    ".Lflat64_linger:",
    "mov eax, PM_TIMER_HZ / 2",
    "call .Lflat64_pause",
    "mov al, {still_here}",
    "jmp .Lflat64_exit",

    entry!("flat64_hello"),
    "call .Lflat64_say",
    r#".asciz "Hello from 64 bits.\n""#,
    "mov dx, PM1A_CONTROL",
    "mov ax, POWER_OFF",
    "out dx, ax",
    "jmp .Lflat64_linger",

    entry!("flat64_string"),
    string_io!("flat64", "esi", "edi", "ecx"),
    "jmp .Lflat64_passed",
    string_io_data!("flat64", "actor_vmm_cases_flat64", "LOAD_ADDRESS"),

    // Ports. 1: a byte, in the UART's scratch register [PC16550D §8.10].
    entry!("ports"),
    "mov bl, 1",
    "mov dx, COM1 + 7",
    "mov al, 0x5a",
    "out dx, al",
    "xor eax, eax",
    "in al, dx",
    "cmp eax, 0x5a",
    "jne .Lflat64_failed",
    // 2: a word, in PM1_EN, of which bits 0, 5, 8, 9 and 10 exist [ACPI 6.4 table 4.14]; no event is pending.
    "mov bl, 2",
    "mov dx, PM1A_CONTROL - 2",
    "mov eax, 0xffff",
    "out dx, ax",
    "xor eax, eax",
    "in ax, dx",
    "cmp eax, 0x721",
    "jne .Lflat64_failed",
    "xor eax, eax",
    "out dx, ax",
    // 3: a double word, in PCI's address register.
    "mov bl, 3",
    "mov dx, PCI_CONFIG",
    "mov eax, 0x80abcdec",
    "out dx, eax",
    "xor eax, eax",
    "in eax, dx",
    "cmp eax, 0x80abcdec",
    "jne .Lflat64_failed",
    // 4, 5, 6: nobody there, in all widths; AL and AX leave the rest of RAX as it is.
    "mov bl, 4",
    "mov dx, 0x300",
    "xor eax, eax",
    "out dx, al",
    "in al, dx",
    "cmp rax, 0xff",
    "jne .Lflat64_failed",
    "mov bl, 5",
    "xor eax, eax",
    "out dx, ax",
    "in ax, dx",
    "cmp rax, 0xffff",
    "jne .Lflat64_failed",
    "mov bl, 6",
    "xor eax, eax",
    "out dx, eax",
    "in eax, dx",
    "inc eax",
    "jnz .Lflat64_failed",
    // 7: the last port; what would be behind it does not matter to a byte.
    "mov bl, 7",
    "mov dx, 0xffff",
    "xor eax, eax",
    "in al, dx",
    "cmp eax, 0xff",
    "jne .Lflat64_failed",
    "jmp .Lflat64_passed",

    // Memory that nobody claims. Needs RAM to end at 16 MiB. 1 to 4: loads of 1, 2, 4 and 8 bytes.
    entry!("memory"),
    "mov edi, NOWHERE",
    "mov bl, 1",
    "xor eax, eax",
    "mov al, [rdi]",
    "cmp rax, 0xff",
    "jne .Lflat64_failed",
    "mov bl, 2",
    "xor eax, eax",
    "mov ax, [rdi + 2]",
    "cmp rax, 0xffff",
    "jne .Lflat64_failed",
    "mov bl, 3",
    "xor eax, eax",
    "mov eax, [rdi + 4]",
    "inc eax",
    "jnz .Lflat64_failed",
    "mov bl, 4",
    "xor eax, eax",
    "mov rax, [rdi + 8]",
    "inc rax",
    "jnz .Lflat64_failed",
    // Stores of the same widths are taken and forgotten.
    "mov [rdi], al",
    "mov [rdi + 2], ax",
    "mov [rdi + 4], eax",
    "mov [rdi + 8], rax",
    // 5: a load across a page comes in two parts, and both are all-ones; so do stores, which are forgotten.
    "mov bl, 5",
    "mov rax, [rdi + 0xffd]",
    "inc rax",
    "jnz .Lflat64_failed",
    "mov ax, [rdi + 0xfff]",
    "inc ax",
    "jnz .Lflat64_failed",
    "mov [rdi + 0xffd], rax",
    "mov [rdi + 0xfff], ax",
    // 6: across the end of RAM: the lower half is RAM, the upper is nowhere.
    "mov bl, 6",
    "mov ebp, 0x1000000",
    "mov dword ptr [rbp - 4], 0x12345678",
    "mov rax, [rbp - 4]",
    "mov rcx, 0xffffffff12345678",
    "cmp rax, rcx",
    "jne .Lflat64_failed",
    // 7: a store there changes RAM in its lower half.
    "mov bl, 7",
    "mov rax, 0x1122334455667788",
    "mov [rbp - 4], rax",
    "mov eax, [rbp - 4]",
    "cmp eax, 0x55667788",
    "jne .Lflat64_failed",
    // 8: strings, out of nowhere and into it.
    "mov bl, 8",
    "cld",
    "mov esi, NOWHERE + 0xff0",
    "mov edi, 0x7000",
    "mov ecx, 4",
    "rep movsq",
    "mov edi, 0x7000",
    "mov ecx, 4",
    "mov rax, -1",
    "repe scasq",
    "jne .Lflat64_failed",
    "mov esi, 0x7000",
    "mov edi, NOWHERE + 0xff0",
    "mov ecx, 17",
    "rep movsb",
    // 9: read, modify, write.
    "mov bl, 9",
    "mov edi, NOWHERE",
    "add dword ptr [rdi], 1",
    "jnc .Lflat64_failed",
    "jnz .Lflat64_failed",
    "jmp .Lflat64_passed",

    // Halts. 1: a one-shot timer of the local APIC (LVT mode 00) wakes the processor [SDM 3A §11.5.4], three times.
    entry!("apic_one_shot"),
    "call .Lflat64_interrupts",
    "mov edi, TIMER_VECTOR",
    "lea rsi, [rip + .Lflat64_on_timer]",
    "call .Lflat64_gate",
    "mov ebx, LAPIC",
    "mov dword ptr [rbx + LAPIC_TIMER_DIVIDE], 0xb",
    "mov dword ptr [rbx + LAPIC_LVT_TIMER], TIMER_VECTOR",
    "mov ecx, 3",
    "2: mov dword ptr [rbx + LAPIC_TIMER_INITIAL], 1000000",
    // STI takes effect behind HLT, so the interrupt cannot come before it [SDM 2B, STI].
    "sti",
    "hlt",
    "cli",
    "loop 2b",
    "mov bl, 1",
    "cmp dword ptr [TICKS], 3",
    "jne .Lflat64_failed",
    "jmp .Lflat64_passed",

    entry!("apic_periodic"),
    "call .Lflat64_interrupts",
    "mov edi, TIMER_VECTOR",
    "lea rsi, [rip + .Lflat64_on_timer]",
    "call .Lflat64_gate",
    "mov ebx, LAPIC",
    "mov dword ptr [rbx + LAPIC_TIMER_DIVIDE], 0xb",
    "mov dword ptr [rbx + LAPIC_LVT_TIMER], 1 << 17 | TIMER_VECTOR",
    "mov dword ptr [rbx + LAPIC_TIMER_INITIAL], 1000000",
    "sti",
    "2: hlt",
    "cmp dword ptr [TICKS], 10",
    "jb 2b",
    "jmp .Lflat64_passed",

    // LVT mode 10: the deadline is a value of the TSC, in IA32_TSC_DEADLINE [SDM 3A §11.5.4.1]. 1: CPUID does not
    // offer it (ECX bit 24 of leaf 1).
    entry!("apic_deadline"),
    "mov eax, 1",
    "cpuid",
    "mov bl, 1",
    "test ecx, 1 << 24",
    "jz .Lflat64_failed",
    "call .Lflat64_interrupts",
    "mov edi, TIMER_VECTOR",
    "lea rsi, [rip + .Lflat64_on_timer]",
    "call .Lflat64_gate",
    "mov ebx, LAPIC",
    "mov dword ptr [rbx + LAPIC_LVT_TIMER], 2 << 17 | TIMER_VECTOR",
    "mov ebx, 3",
    "2: rdtsc",
    "add eax, 1000000",
    "adc edx, 0",
    "mov ecx, 0x6e0",
    "wrmsr",
    "sti",
    "hlt",
    "cli",
    "dec ebx",
    "jnz 2b",
    "mov bl, 2",
    "cmp dword ptr [TICKS], 3",
    "jne .Lflat64_failed",
    "jmp .Lflat64_passed",

    ".Lflat64_on_timer:",
    "lock inc dword ptr [TICKS]",
    "call .Lflat64_eoi",
    "iretq",

    // PIT, channel 0 in mode 2 at 1193182 / 1193 Hz [82C54], through the pin of the IOAPIC that the MADT names for it:
    // source override from 0 to 2.
    entry!("pit_ioapic"),
    "call .Lflat64_interrupts",
    "mov edi, PIT_VECTOR",
    "lea rsi, [rip + .Lflat64_on_pit]",
    "call .Lflat64_gate",
    "mov edi, 2",
    "mov esi, PIT_VECTOR",
    "call .Lflat64_pin",
    "call .Lflat64_pit_on",
    "mov edi, PIT_IRQS",
    "mov esi, 5",
    "sti",
    "call .Lflat64_wait",
    "mov bl, 1",
    "jc .Lflat64_failed",
    "2: hlt",
    "cmp dword ptr [PIT_IRQS], 10",
    "jb 2b",
    "jmp .Lflat64_passed",

    ".Lflat64_pit_on:",
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 1193 & 0xff",
    "out 0x40, al",
    "mov al, 1193 >> 8",
    "out 0x40, al",
    "ret",

    ".Lflat64_on_pit:",
    "lock inc dword ptr [PIT_IRQS]",
    "call .Lflat64_eoi",
    "iretq",

    // The same through the PIC: initialised with vectors from 0x20 and 0x28 [82C59A ICW1 to ICW4], all but input 0
    // masked, and let in by the boot processor's LINT0 as ExtINT [SDM 3A §11.5.1].
    entry!("pit_pic"),
    "call .Lflat64_interrupts",
    "mov edi, 0x20",
    "lea rsi, [rip + .Lflat64_on_pit_pic]",
    "call .Lflat64_gate",
    "mov al, 0x11",
    "out 0x20, al",
    "out 0xa0, al",
    "mov al, 0x20",
    "out 0x21, al",
    "mov al, 0x28",
    "out 0xa1, al",
    "mov al, 4",
    "out 0x21, al",
    "mov al, 2",
    "out 0xa1, al",
    "mov al, 1",
    "out 0x21, al",
    "out 0xa1, al",
    "mov al, 0xfe",
    "out 0x21, al",
    "mov al, 0xff",
    "out 0xa1, al",
    "mov ebx, LAPIC",
    "mov dword ptr [rbx + LAPIC_LVT_LINT0], 7 << 8",
    "call .Lflat64_pit_on",
    "mov edi, PIT_IRQS",
    "mov esi, 5",
    "sti",
    "call .Lflat64_wait",
    "mov bl, 1",
    "jc .Lflat64_failed",
    "jmp .Lflat64_passed",

    // An interrupt of the PIC is ended there (OCW2, non-specific), not in the local APIC.
    ".Lflat64_on_pit_pic:",
    "push rax",
    "lock inc dword ptr [PIT_IRQS]",
    "mov al, 0x20",
    "out 0x20, al",
    "pop rax",
    "iretq",

    // Real-time clock: the periodic interrupt (B.PIE) at 1024 Hz, through pin 8; reading C makes room for the next
    // [MC146818, "Registers"].
    entry!("rtc_periodic"),
    "call .Lflat64_interrupts",
    "mov edi, RTC_VECTOR",
    "lea rsi, [rip + .Lflat64_on_rtc]",
    "call .Lflat64_gate",
    "mov edi, 8",
    "mov esi, RTC_VECTOR",
    "call .Lflat64_pin",
    "mov al, 0xa",
    "out RTC, al",
    "mov al, 0x26",
    "out RTC + 1, al",
    "mov al, 0xb",
    "out RTC, al",
    "in al, RTC + 1",
    "or al, 1 << 6",
    "mov cl, al",
    "mov al, 0xb",
    "out RTC, al",
    "mov al, cl",
    "out RTC + 1, al",
    "mov edi, RTC_IRQS",
    "mov esi, 2",
    "sti",
    // Polled for first: without an interrupt this shall not halt.
    "call .Lflat64_wait",
    "mov bl, 1",
    "jc .Lflat64_failed",
    "2: hlt",
    "cmp dword ptr [RTC_IRQS], 8",
    "jb 2b",
    // 2: C had PF and IRQF each time.
    "mov bl, 2",
    "cmp byte ptr [SEEN], 0xc0",
    "jne .Lflat64_failed",
    "jmp .Lflat64_passed",

    ".Lflat64_on_rtc:",
    "push rax",
    "mov al, 0xc",
    "out RTC, al",
    "in al, RTC + 1",
    // UF comes once a second, enabled or not.
    "and al, 0xc0",
    "mov [SEEN], al",
    "lock inc dword ptr [RTC_IRQS]",
    "call .Lflat64_eoi",
    "pop rax",
    "iretq",

    // Serial port: echoes what comes in, by interrupts, until a full stop, then powers off.
    entry!("serial_echo"),
    "call .Lflat64_interrupts",
    "mov edi, SERIAL_VECTOR",
    "lea rsi, [rip + .Lflat64_on_serial]",
    "call .Lflat64_gate",
    "mov edi, 4",
    "mov esi, SERIAL_VECTOR",
    "call .Lflat64_pin",
    // FIFOs with the trigger at 1; DTR, RTS and OUT2; the receiver's interrupt (IER.ERBFI).
    "mov dx, COM1 + 2",
    "mov al, 7",
    "out dx, al",
    "mov dx, COM1 + 4",
    "mov al, 0xb",
    "out dx, al",
    "mov dx, COM1 + 1",
    "mov al, 1",
    "out dx, al",
    "2: sti",
    "hlt",
    "cli",
    "cmp byte ptr [SEEN], 0x2e",
    "jne 2b",
    "mov dx, PM1A_CONTROL",
    "mov ax, POWER_OFF",
    "out dx, ax",
    "jmp .Lflat64_linger",

    // As long as LSR.DR says that there is more.
    ".Lflat64_on_serial:",
    "push rax",
    "push rdx",
    "push rsi",
    "2: mov dx, COM1 + 5",
    "in al, dx",
    "test al, 1",
    "jz 3f",
    "mov dx, COM1",
    "in al, dx",
    "cmp al, 0x2e",
    "jne 4f",
    "mov [SEEN], al",
    "4:",
    "mov [BUFFER], al",
    "mov byte ptr [BUFFER + 1], 0",
    "mov esi, BUFFER",
    "call .Lflat64_put",
    "jmp 2b",
    "3: lock inc dword ptr [SERIAL_IRQS]",
    "call .Lflat64_eoi",
    "pop rsi",
    "pop rdx",
    "pop rax",
    "iretq",

    // The transmitter's interrupt: it comes when it is enabled while the transmitter is empty, and after each write.
    // IRQ 4 is an edge: it comes again only if it was inactive between, which reading the IIR sees to.
    entry!("serial_transmit"),
    "call .Lflat64_interrupts",
    "mov edi, SERIAL_VECTOR",
    "lea rsi, [rip + .Lflat64_on_transmit]",
    "call .Lflat64_gate",
    "mov edi, 4",
    "mov esi, SERIAL_VECTOR",
    "call .Lflat64_pin",
    "mov dx, COM1 + 4",
    "mov al, 0xb",
    "out dx, al",
    "lea rbp, [rip + .Lflat64_transmitted]",
    "mov dx, COM1 + 1",
    "mov al, 2",
    "out dx, al",
    "mov edi, SERIAL_IRQS",
    "mov esi, 12",
    "sti",
    "call .Lflat64_wait",
    "mov bl, 1",
    "jc .Lflat64_failed",
    "jmp .Lflat64_passed",
    ".Lflat64_transmitted: .asciz \"interrupts\\n\"",

    // One byte an interrupt; at the end the interrupt is switched off.
    ".Lflat64_on_transmit:",
    "push rax",
    "push rdx",
    "mov dx, COM1 + 2",
    "in al, dx",
    "mov al, [rbp]",
    "test al, al",
    "jz 2f",
    "inc rbp",
    "mov dx, COM1",
    "out dx, al",
    "jmp 3f",
    "2: mov dx, COM1 + 1",
    "out dx, al",
    "3: lock inc dword ptr [SERIAL_IRQS]",
    "call .Lflat64_eoi",
    "pop rdx",
    "pop rax",
    "iretq",

    // Start-up of all processors, one by one with memory-mapped registers, in x2APIC mode, and by a broadcast. Then an
    // interrupt to each, and back. 1: not all came up; 2: not all were interrupted; 3: no answer.
    entry!("smp_x2apic"),
    "mov dword ptr [X2APIC], 1",
    entry!("smp_xapic"),
    "mov dword ptr [ONE_BY_ONE], 1",
    entry!("smp_broadcast"),
    "call .Lflat64_interrupts",
    "call .Lflat64_count",
    "mov ebp, eax",
    "call .Lflat64_start",
    "mov bl, 1",
    "jc .Lflat64_failed",
    "sti",
    "mov edi, ebp",
    "mov eax, 0x4000 | IPI_ASK",
    "call .Lflat64_others",
    "mov edi, ASKED",
    "lea esi, [rbp - 1]",
    "call .Lflat64_wait",
    "mov bl, 2",
    "jc .Lflat64_failed",
    "mov edi, ANSWERED",
    "mov esi, 1",
    "call .Lflat64_wait",
    "mov bl, 3",
    "jc .Lflat64_failed",
    "cli",
    "mov eax, [ASKED]",
    "inc eax",
    "call .Lflat64_decimal",
    "call .Lflat64_say",
    r#".asciz " CPUs up\n""#,
    "jmp .Lflat64_passed",

    // Endless I/O by up to four processors, each with a register of its own that must keep what was written, and a
    // look at the PM timer, which must not go back. The boot processor says when all are at it, and a dot now and
    // then. 1: not all came up; 2: not all began; 3: a register has something else; 4: time went back.
    entry!("churn"),
    "call .Lflat64_interrupts",
    "mov edi, IPI_ASK",
    "lea rsi, [rip + .Lflat64_churn_other]",
    "call .Lflat64_gate",
    "call .Lflat64_count",
    "mov ebp, eax",
    "cmp eax, 1",
    "je 2f",
    "call .Lflat64_start",
    "mov bl, 1",
    "jc .Lflat64_failed",
    "mov edi, ebp",
    "mov eax, 0x4000 | IPI_ASK",
    "call .Lflat64_others",
    "mov edi, ASKED",
    "lea esi, [rbp - 1]",
    "call .Lflat64_wait",
    "mov bl, 2",
    "jc .Lflat64_failed",
    "2: call .Lflat64_say",
    r#".asciz "up\n""#,
    "jmp .Lflat64_churn",
    ".Lflat64_churn_other:",
    "lock inc dword ptr [ASKED]",
    ".Lflat64_churn:",
    "call .Lflat64_id",
    "mov ebp, eax",
    "mov dx, PM_TIMER",
    "in eax, dx",
    "mov r12d, eax",
    "xor r13d, r13d",
    "3: inc r13d",
    "cmp ebp, 1",
    "je 4f",
    "cmp ebp, 2",
    "je 5f",
    "cmp ebp, 3",
    "je 6f",
    // The serial port's scratch register [PC16550D §8.9].
    "mov dx, COM1 + 7",
    "mov al, r13b",
    "out dx, al",
    "xor eax, eax",
    "in al, dx",
    "cmp al, r13b",
    "jmp 7f",
    // The register bits of PCI's address register.
    "4: mov dx, PCI_CONFIG",
    "mov eax, r13d",
    "and eax, 0xfc",
    "mov ebx, eax",
    "out dx, eax",
    "xor eax, eax",
    "in eax, dx",
    "cmp eax, ebx",
    "jmp 7f",
    // The serial port's interrupt enables; nobody listens to its line.
    "5: mov dx, COM1 + 1",
    "mov al, r13b",
    "and al, 0xf",
    "mov bl, al",
    "out dx, al",
    "xor eax, eax",
    "in al, dx",
    "cmp al, bl",
    "jmp 7f",
    // A byte of CMOS memory.
    "6: mov al, 0x40",
    "out RTC, al",
    "mov al, r13b",
    "out RTC + 1, al",
    "xor eax, eax",
    "in al, RTC + 1",
    "cmp al, r13b",
    "7: mov bl, 3",
    "jne .Lflat64_failed",
    "mov dx, PM_TIMER",
    "in eax, dx",
    "mov ecx, eax",
    "sub eax, r12d",
    "mov r12d, ecx",
    "test eax, eax",
    "mov bl, 4",
    "js .Lflat64_failed",
    "test ebp, ebp",
    "jne 3b",
    "test r13d, 0x3f",
    "jne 3b",
    "call .Lflat64_say",
    r#".asciz ".""#,
    "jmp 3b",

    // Reads the test device that does not answer.
    entry!("tarpit"),
    "in al, TARPIT",
    "jmp .Lflat64_linger",

    // Ends.
    entry!("reset_acpi"),
    "mov dx, ACPI_RESET",
    "mov al, ACPI_RESET_VALUE",
    "out dx, al",
    "jmp .Lflat64_linger",

    entry!("debug_exit"),
    "mov al, 7",
    "out DEBUG_EXIT, al",
    "jmp .Lflat64_linger",

    // Event 0: panicked [QEMU: docs/specs/pvpanic.rst].
    entry!("pvpanic"),
    "mov dx, PVPANIC",
    "mov al, 1",
    "out dx, al",
    "jmp .Lflat64_linger",

    // A page fault without an IDT is a double fault is a shutdown [SDM 3A §6.15, interrupt 8]. 4 GiB are mapped.
    entry!("triple_fault"),
    "mov rbx, 1 << 32",
    "mov eax, [rbx]",
    "jmp .Lflat64_linger",

    // Endless: as each says when it begins. In ring 0, with interrupts off.
    entry!("spin"),
    "call .Lflat64_say",
    r#".asciz "ready\n""#,
    "2: jmp 2b",

    entry!("halted"),
    "call .Lflat64_say",
    r#".asciz "ready\n""#,
    "2: cli",
    "hlt",
    "jmp 2b",

    entry!("port_loop"),
    "call .Lflat64_say",
    r#".asciz "ready\n""#,
    "mov dx, COM1 + 5",
    "2: in al, dx",
    "jmp 2b",

    entry!("memory_loop"),
    "call .Lflat64_say",
    r#".asciz "ready\n""#,
    "mov ebx, NOWHERE",
    "2: mov eax, [rbx]",
    "jmp 2b",

    // Prints without an end: whoever reads may be slow, or not there.
    entry!("chatter"),
    "call .Lflat64_say",
    r#".asciz "ready\n""#,
    "jmp actor_vmm_case_chatter",

    // The boot processor spins, all others halt.
    entry!("spin_smp"),
    "call .Lflat64_interrupts",
    "call .Lflat64_count",
    "call .Lflat64_start",
    "mov bl, 1",
    "jc .Lflat64_failed",
    "jmp actor_vmm_case_spin";
    passed = const PASSED, still_here = const STILL_HERE
}

/// How a case is entered.
#[derive(Clone, Copy)]
enum Mode {
    Real,
    Flat32,
    Flat64,
}

/// One test guest.
#[derive(Clone, Copy)]
pub struct Case {
    /// What `--guest` takes.
    pub name: &'static str,
    image: fn() -> &'static [u8],
    /// Where it begins, in this process.
    entry: fn() -> *const u8,
    mode: Mode,
}

impl Case {
    /// The guest.
    pub fn guest(&self) -> Guest {
        let bytes = (self.image)();
        let offset = (self.entry)() as usize - bytes.as_ptr() as usize;
        debug_assert!(offset < bytes.len());
        let offset = offset as u64;
        let (at, entry) = match self.mode {
            Mode::Real => (
                REAL_ADDRESS,
                EntryPoint::RealMode {
                    cs: (REAL_ADDRESS >> 4) as u16,
                    ip: offset as u16,
                },
            ),
            Mode::Flat32 => (
                LOAD_ADDRESS,
                EntryPoint::Flat32 {
                    eip: (LOAD_ADDRESS + offset) as u32,
                },
            ),
            Mode::Flat64 => (
                LOAD_ADDRESS,
                EntryPoint::Flat64 {
                    rip: LOAD_ADDRESS + offset,
                },
            ),
        };
        Guest::Image { bytes, at, entry }
    }
}

macro_rules! cases {
    ($($image:ident $mode:ident: $($name:literal),+;)+) => {
        /// All test guests but the probes.
        pub const CASES: &[Case] = &[$($(Case {
            name: $name,
            image: $image,
            entry: {
                fn entry() -> *const u8 {
                    unsafe extern "C" {
                        #[link_name = concat!("actor_vmm_case_", $name)]
                        static ENTRY: u8;
                    }
                    &raw const ENTRY
                }
                entry
            },
            mode: Mode::$mode,
        },)+)+];
    };
}

cases! {
    real Real: "real_hello", "real_string", "real_reset";
    flat32 Flat32: "flat32_hello", "flat32_string";
    flat64 Flat64:
        "flat64_hello", "flat64_string", "ports", "memory",
        "apic_one_shot", "apic_periodic", "apic_deadline", "pit_ioapic", "pit_pic", "rtc_periodic",
        "serial_echo", "serial_transmit", "smp_xapic", "smp_x2apic", "smp_broadcast",
        "churn", "tarpit", "reset_acpi", "debug_exit", "pvpanic", "triple_fault",
        "spin", "halted", "port_loop", "memory_loop", "chatter", "spin_smp";
    debug Flat64: "debug";
}

/// The guest with this name: one of [`CASES`], or `probe_` and the name of a probe.
pub fn by_name(name: &str) -> Option<Guest> {
    if let Some(instruction) = name.strip_prefix("probe_") {
        let probe = probes::INSTRUCTIONS
            .iter()
            .find(|probe| probe.name == instruction)?;
        return Some(probe.guest());
    }
    let case = CASES.iter().find(|case| case.name == name)?;
    Some(case.guest())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_begins_inside_its_image() {
        for case in CASES {
            let Some(Guest::Image { bytes, at, entry }) = by_name(case.name) else {
                panic!("{}", case.name)
            };
            let offset = entry.address() - at;
            assert!((offset as usize) < bytes.len(), "{}: {offset:#x}", case.name);
        }
        assert!(by_name("probe_popcnt").is_some());
        assert!(by_name("nothing").is_none());
    }
}
