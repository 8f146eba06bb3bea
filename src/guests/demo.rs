//! The guest of `actor-vmm run --demo`: says hello on the serial port, tries what a machine of this program has, tells
//! what it found, and powers off.
//!
//! What fails is told, and ends the machine through the debug-exit port with the check's number, so the exit status
//! is twice that and one more:
//!
//! | number | check | expects |
//! |---|---|---|
//! | 1 | serial port | 16 bytes written in loopback by `rep outsb` come back by `rep insb` |
//! | 2 | real-time clock | register D says that the time is valid, and the time does not change while it is read |
//! | 3 | PM timer | it goes on |
//! | 4 | APIC timer | five interrupts, a millisecond apart, the last four out of HLT |
//! | 5 | serial interrupt | "transmitter empty" comes through pin 4 of the IOAPIC |
//! | 6 | start-up | as many processors as CPUID tells come up within 10 s |
//! | 7 | interrupts between processors | each gets one from the boot processor, and answers |
//! | 8 | unclaimed memory | reads all-ones |
//! | 9 | unclaimed ports | read all-ones |
//! | 10 | debug console | reads 0xe9 |
//! | 11 | power | the machine is off a second after PM1a control was told so |
//!
//! It runs on any KVM, also on one that interprets ring 0.

use super::runtime64::runtime64;
use super::{LOAD_ADDRESS, image};
use crate::boot::EntryPoint;
use crate::machine::supervisor::Guest;

image! {
    fn demo = "actor_vmm_demo";
    ".code64",
    "jmp .Ldemo_main",
    runtime64!("demo", "actor_vmm_demo"),

    ".Ldemo_main:",
    "cld",
    // 8 bits, no parity, one stop bit; FIFOs on and empty; DTR, RTS, and OUT2, which is the interrupt's gate
    // [PC16550D §8.1, §8.5, §8.8].
    "mov dx, COM1 + 3",
    "mov al, 3",
    "out dx, al",
    "mov dx, COM1 + 2",
    "mov al, 7",
    "out dx, al",
    "mov dx, COM1 + 4",
    "mov al, 0xb",
    "out dx, al",
    "call .Ldemo_say",
    r#".asciz "Hello! I am the guest that actor-vmm carries with it.\r\n\r\n""#,

    // Processor: vendor from leaf 0 in EBX, EDX, ECX [SDM 2A CPUID]; the hypervisor's signature from leaf 0x40000000
    // in EBX, ECX, EDX [Linux: Documentation/virt/kvm/x86/cpuid.rst].
    "call .Ldemo_say",
    r#".asciz "ok      processor: ""#,
    "xor eax, eax",
    "cpuid",
    "mov [BUFFER], ebx",
    "mov [BUFFER + 4], edx",
    "mov [BUFFER + 8], ecx",
    "mov dword ptr [BUFFER + 12], 0",
    "mov esi, BUFFER",
    "call .Ldemo_put",
    "mov eax, 0x40000000",
    "cpuid",
    "mov [BUFFER], ebx",
    "mov [BUFFER + 4], ecx",
    "mov [BUFFER + 8], edx",
    "call .Ldemo_say",
    r#".asciz ", under ""#,
    "mov esi, BUFFER",
    "call .Ldemo_put",
    "call .Ldemo_newline",

    // 1. Serial port: MCR.LOOP leads the transmitter to the receiver [PC16550D §8.8]. What had been received before is
    // thrown away first.
    "mov dx, COM1 + 4",
    "mov al, 0x1b",
    "out dx, al",
    "mov dx, COM1 + 2",
    "mov al, 7",
    "out dx, al",
    "lea rsi, [rip + .Ldemo_pattern]",
    "mov dx, COM1",
    "mov ecx, 16",
    "rep outsb",
    "mov edi, BUFFER",
    "mov ecx, 16",
    "rep insb",
    "mov dx, COM1 + 4",
    "mov al, 0xb",
    "out dx, al",
    "lea rsi, [rip + .Ldemo_pattern]",
    "mov edi, BUFFER",
    "mov ecx, 16",
    "repe cmpsb",
    "je 2f",
    "call .Ldemo_failed",
    r#".byte 1; .asciz "serial port: what went into its loopback did not come back""#,
    ".Ldemo_pattern: .ascii \"0123456789abcdef\"",
    "2: call .Ldemo_say",
    r#".asciz "ok      serial port: 16 bytes through its loopback, by rep outsb and rep insb\r\n""#,

    // 2. Real-time clock: not while it updates (A.UIP), and twice the same, so that no carry came between
    // [MC146818, "Update cycle"]. At most 256 attempts.
    "mov al, 0xd",
    "call .Ldemo_cmos",
    "test al, 0x80",
    "jz 5f",
    "mov ebx, 256",
    "2: dec ebx",
    "jz 5f",
    "mov al, 0xa",
    "call .Ldemo_cmos",
    "test al, 0x80",
    "jnz 2b",
    "mov edi, BUFFER",
    "call .Ldemo_time",
    "mov edi, BUFFER + 16",
    "call .Ldemo_time",
    "mov esi, BUFFER",
    "mov edi, BUFFER + 16",
    "mov ecx, 7",
    "repe cmpsb",
    "jne 2b",
    "call .Ldemo_say",
    r#".asciz "ok      real-time clock: ""#,
    "xor ebx, ebx",
    "3: movzx eax, byte ptr [rbx + BUFFER]",
    "call .Ldemo_hex",
    "lea rsi, [rip + .Ldemo_separators]",
    "lea rsi, [rsi + 2 * rbx]",
    "call .Ldemo_put",
    "inc ebx",
    "cmp ebx, 7",
    "jb 3b",
    "call .Ldemo_say",
    r#".asciz " UTC\r\n""#,
    "jmp 4f",
    "5: call .Ldemo_failed",
    r#".byte 2; .asciz "real-time clock: its time is not valid""#,
    // Behind century, year, month, day, hours, minutes and seconds, two bytes each.
    r#".Ldemo_separators: .ascii "\0\0-\0-\0 \0:\0:\0\0\0""#,
    "4:",

    // 3. PM timer [ACPI 6.4 §4.8.2.1].
    "mov dx, PM_TIMER",
    "in eax, dx",
    "mov ebx, eax",
    "mov ecx, 1000",
    "2: in eax, dx",
    "sub eax, ebx",
    "jnz 3f",
    "loop 2b",
    "call .Ldemo_failed",
    r#".byte 3; .asciz "PM timer: it stands still""#,
    "3: call .Ldemo_say",
    r#".asciz "ok      PM timer: ""#,
    "call .Ldemo_decimal",
    "call .Ldemo_say",
    r#".asciz " ticks of 1/3579545 s from one read to the next\r\n""#,

    // 4. APIC timer: periodic (LVT bit 17), bus clock undivided [SDM 3A §11.5.4]; KVM's bus clock has 1 GHz. The
    // first interrupt is polled for, so that this does not halt for ever without one.
    "call .Ldemo_interrupts",
    "mov edi, TIMER_VECTOR",
    "lea rsi, [rip + .Ldemo_on_timer]",
    "call .Ldemo_gate",
    "mov ebx, LAPIC",
    "mov dword ptr [rbx + LAPIC_TIMER_DIVIDE], 0xb",
    "mov dword ptr [rbx + LAPIC_LVT_TIMER], 1 << 17 | TIMER_VECTOR",
    "mov dword ptr [rbx + LAPIC_TIMER_INITIAL], 1000000",
    "sti",
    "mov edi, TICKS",
    "mov esi, 1",
    "call .Ldemo_wait",
    "jnc 2f",
    "call .Ldemo_failed",
    r#".byte 4; .asciz "APIC timer: no interrupt""#,
    "2: hlt",
    "cmp dword ptr [TICKS], 5",
    "jb 2b",
    "cli",
    "mov dword ptr [rbx + LAPIC_TIMER_INITIAL], 0",
    "call .Ldemo_say",
    r#".asciz "ok      APIC timer: 5 interrupts, a millisecond apart\r\n""#,

    // 5. Serial interrupt: enabled (IER.ETBEI) while the transmitter is empty, it comes at once [PC16550D §8.7].
    "mov edi, SERIAL_VECTOR",
    "lea rsi, [rip + .Ldemo_on_serial]",
    "call .Ldemo_gate",
    "mov edi, 4",
    "mov esi, SERIAL_VECTOR",
    "call .Ldemo_pin",
    "sti",
    "mov dx, COM1 + 1",
    "mov al, 1 << 1",
    "out dx, al",
    "mov edi, SERIAL_IRQS",
    "mov esi, 1",
    "call .Ldemo_wait",
    "cli",
    "jc 2f",
    // IIR: 001 in bits 3 to 1 is "transmitter empty" [PC16550D table IV].
    "mov al, [SEEN]",
    "and al, 0xf",
    "cmp al, 2",
    "je 3f",
    "2: call .Ldemo_failed",
    r#".byte 5; .asciz "serial interrupt: it did not come through pin 4 of the IOAPIC""#,
    "3: call .Ldemo_say",
    r#".asciz "ok      serial interrupt: transmitter empty, through pin 4 of the IOAPIC\r\n""#,

    // 6. Start-up of the other processors.
    "call .Ldemo_count",
    "mov ebx, eax",
    "call .Ldemo_start",
    "jnc 2f",
    "call .Ldemo_say",
    r#".asciz "FAILED  start-up: CPUs up: ""#,
    "mov eax, [UP]",
    "inc eax",
    "call .Ldemo_decimal",
    "call .Ldemo_say",
    r#".asciz "; CPUID tells: ""#,
    "mov eax, ebx",
    "call .Ldemo_decimal",
    "call .Ldemo_newline",
    "mov al, 6",
    "jmp .Ldemo_exit",
    "2: call .Ldemo_say",
    r#".asciz "ok      start-up by INIT and SIPI: ""#,
    "mov eax, [UP]",
    "inc eax",
    "call .Ldemo_decimal",
    "cmp eax, 1",
    "je 3f",
    "call .Ldemo_say",
    r#".asciz " CPUs up\r\n""#,
    "jmp 4f",
    "3: call .Ldemo_say",
    r#".asciz " CPU up (more: --cpus)\r\n""#,
    "4:",

    // 7. Interrupts between processors, to all but this one and back.
    "cmp ebx, 1",
    "je 4f",
    "sti",
    "mov eax, 0x4000 | IPI_ASK",
    "mov edi, ebx",
    "call .Ldemo_others",
    "mov edi, ASKED",
    "lea esi, [rbx - 1]",
    "call .Ldemo_wait",
    "jc 2f",
    "mov edi, ANSWERED",
    "mov esi, 1",
    "call .Ldemo_wait",
    "jnc 3f",
    "2: call .Ldemo_failed",
    r#".byte 7; .asciz "interrupts between processors: not all were handled and answered""#,
    "3: cli",
    "call .Ldemo_say",
    r#".asciz "ok      interrupts between processors: handled and answered by ""#,
    "mov eax, [ASKED]",
    "call .Ldemo_decimal",
    "call .Ldemo_newline",
    "4:",

    // 8. and 9. Nobody there: all-ones, as a bus that nobody drives.
    "mov ebx, NOWHERE",
    "mov rax, [rbx]",
    "inc rax",
    "jz 2f",
    "call .Ldemo_failed",
    r#".byte 8; .asciz "unclaimed memory: does not read all-ones""#,
    "2: mov dx, 0x300",
    "in eax, dx",
    "inc eax",
    "jz 2f",
    "call .Ldemo_failed",
    r#".byte 9; .asciz "unclaimed ports: do not read all-ones""#,
    "2: call .Ldemo_say",
    r#".asciz "ok      unclaimed memory and ports: read all-ones\r\n""#,

    // 10. Debug console: it reads as its own port number.
    "in al, DEBUG_CONSOLE",
    "cmp al, 0xe9",
    "je 2f",
    "call .Ldemo_failed",
    r#".byte 10; .asciz "debug console: is not there""#,
    ".Ldemo_greeting: .ascii \"Hello from the demo guest.\\n\"",
    ".Ldemo_greeting_end:",
    "2: lea rsi, [rip + .Ldemo_greeting]",
    ".set DEMO_GREETING, .Ldemo_greeting_end - .Ldemo_greeting",
    "mov ecx, offset DEMO_GREETING",
    "mov dx, DEBUG_CONSOLE",
    "rep outsb",
    "call .Ldemo_say",
    r#".asciz "ok      debug console: is there (see it with --debug-console)\r\n""#,

    // 11. Power: S5 through PM1a control [ACPI 6.4 §16.1.7].
    "call .Ldemo_say",
    r#".asciz "\r\nAll is well. Powering off.\r\n""#,
    "mov dx, PM1A_CONTROL",
    "mov ax, POWER_OFF",
    "out dx, ax",
    "mov eax, PM_TIMER_HZ",
    "call .Ldemo_pause",
    "call .Ldemo_failed",
    r#".byte 11; .asciz "power: the machine is still on""#,

    // failed: behind the call are the check's number and what to say. Does not return.
    ".Ldemo_failed:",
    "cli",
    "pop rsi",
    "lodsb",
    "call .Ldemo_say",
    r#".asciz "FAILED  ""#,
    "call .Ldemo_put",
    "call .Ldemo_newline",
    "jmp .Ldemo_exit",

    ".Ldemo_newline:",
    "call .Ldemo_say",
    r#".asciz "\r\n""#,
    "ret",

    // cmos: AL is read from index AL.
    ".Ldemo_cmos:",
    "out RTC, al",
    "in al, RTC + 1",
    "ret",

    // time: century, year, month, day, hours, minutes and seconds to RDI. BCD in 24-hour mode, as power-on leaves it.
    ".Ldemo_time:",
    "lea rsi, [rip + 3f]",
    "mov ecx, 7",
    "2: lodsb",
    "call .Ldemo_cmos",
    "stosb",
    "loop 2b",
    "ret",
    "3: .byte 0x32, 9, 8, 7, 4, 2, 0",

    ".Ldemo_on_timer:",
    "lock inc dword ptr [TICKS]",
    "call .Ldemo_eoi",
    "iretq",

    // The interrupt stays away from now on (IER), and its cause is kept.
    ".Ldemo_on_serial:",
    "push rax",
    "push rdx",
    "mov dx, COM1 + 2",
    "in al, dx",
    "mov [SEEN], al",
    "mov dx, COM1 + 1",
    "xor eax, eax",
    "out dx, al",
    "lock inc dword ptr [SERIAL_IRQS]",
    "call .Ldemo_eoi",
    "pop rdx",
    "pop rax",
    "iretq",
}

/// The guest.
pub fn guest() -> Guest {
    Guest::Image {
        bytes: demo(),
        at: LOAD_ADDRESS,
        entry: EntryPoint::Flat64 { rip: LOAD_ADDRESS },
    }
}
