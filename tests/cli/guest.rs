//! Tiny guests, and the kernel files that carry them: ELF for the 64-bit Linux boot protocol.
//!
//! They use only what every KVM runs in ring 0, the ones that interpret it included. They say "up" on the
//! serial port when they run.

/// Assembles a guest into this binary's read-only data, and defines a function that returns its bytes.
macro_rules! code {
    ($(#[$meta:meta])* fn $name:ident = $symbol:literal; $($line:expr),+ $(,)?) => {
        std::arch::global_asm!(
            ".pushsection .rodata.guest, \"a\"",
            concat!(".globl ", $symbol, ", ", $symbol, "_end"),
            concat!(".hidden ", $symbol, ", ", $symbol, "_end"),
            concat!($symbol, ":"),
            $($line),+,
            concat!($symbol, "_end:"),
            ".popsection",
        );
        $(#[$meta])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = $symbol]
                static START: u8;
                #[link_name = concat!($symbol, "_end")]
                static END: u8;
            }
            // SAFETY: both labels are in one section, the end behind the start, and nothing writes there.
            unsafe {
                let start = &raw const START;
                std::slice::from_raw_parts(start, (&raw const END).offset_from(start) as usize)
            }
        }
    };
}

/// Says "up" and a line end; leaves DX at the serial port.
macro_rules! up {
    () => {
        "mov edx, 0x3f8
         mov al, 0x75
         out dx, al
         mov al, 0x70
         out dx, al
         mov al, 0x0a
         out dx, al"
    };
}

code! {
    /// Ends with status 5 (11 for the process).
    fn exit = "cli_exit";
    up!(),
    "mov al, 5
     out 0xf4, al
     2: hlt
     jmp 2b"
}

code! {
    /// Never leaves the processor.
    fn spin = "cli_spin";
    up!(),
    "2: jmp 2b"
}

code! {
    /// Sleeps, and nothing can wake it.
    fn halt = "cli_halt";
    up!(),
    "2: hlt
     jmp 2b"
}

code! {
    /// Leaves the guest as often as it can.
    fn port_loop = "cli_port_loop";
    up!(),
    "2: in al, 0x64
     jmp 2b"
}

code! {
    /// Runs into a place where there is no memory to run code from: no KVM can go on there.
    fn broken = "cli_broken";
    up!(),
    "mov eax, 0xd0000000
     jmp rax"
}

code! {
    /// A fault that it cannot take, and one for that.
    fn triple_fault = "cli_triple_fault";
    up!(),
    "mov edi, 0x3000
     mov qword ptr [rdi], 0
     mov qword ptr [rdi + 8], 0
     lidt [rdi]
     ud2"
}

/// Says `a` in so many rounds of 16, looking whether the transmitter is empty before each; then ends with status 5.
macro_rules! say {
    ($rounds:literal) => {
        concat!(
            "mov ebx, ",
            $rounds,
            "
             2: mov edx, 0x3fd
             in al, dx
             test al, 0x20
             jz 2b
             mov edx, 0x3f8
             mov al, 0x61
             mov ecx, 16
             3: out dx, al
             dec ecx
             jnz 3b
             dec ebx
             jnz 2b
             mov al, 5
             out 0xf4, al
             4: hlt
             jmp 4b"
        )
    };
}

/// What [`talk`] says behind "up": more than the ring between the device and the host holds.
pub const TALK_BYTES: usize = 1250 * 16;

code! {
    /// Says [`TALK_BYTES`], then ends with status 5 (11 for the process).
    fn talk = "cli_talk";
    "mov edx, 0x3fa
     mov al, 1
     out dx, al",
    up!(),
    say!(1250)
}

/// What [`talk_long`] says behind "up": more than a pipe holds, too.
pub const TALK_LONG_BYTES: usize = 6250 * 16;

code! {
    /// Says [`TALK_LONG_BYTES`], then ends with status 5 (11 for the process).
    fn talk_long = "cli_talk_long";
    "mov edx, 0x3fa
     mov al, 1
     out dx, al",
    up!(),
    say!(6250)
}

code! {
    /// Says something for ever, when the transmitter lets it; and something on the debug console whether it does or
    /// not.
    fn flood = "cli_flood";
    up!(),
    "2: mov ecx, 64
     3: mov edx, 0x3fd
     in al, dx
     test al, 0x20
     jz 4f
     mov edx, 0x3f8
     mov al, 0x61
     out dx, al
     4: dec ecx
     jnz 3b
     mov al, 0x2e
     out 0xe9, al
     jmp 2b"
}

/// What [`babble`] says behind "up".
pub const BABBLE_BYTES: usize = 16_000;

code! {
    /// Says [`BABBLE_BYTES`] without looking whether the transmitter takes them, then something on the debug console,
    /// then ends with status 5 (11 for the process).
    fn babble = "cli_babble";
    "mov edx, 0x3fa
     mov al, 1
     out dx, al",
    up!(),
    "mov al, 0x61
     mov ecx, 16000
     2: out dx, al
     dec ecx
     jnz 2b
     mov al, 0x2e
     out 0xe9, al
     mov al, 5
     out 0xf4, al
     3: hlt
     jmp 3b"
}

code! {
    /// Sends back what it receives, until that is a 4: then it ends with status 7 (15 for the process). A 0 is taken for
    /// "nothing received".
    fn echo = "cli_echo";
    "mov edx, 0x3f9
     mov al, 1
     out dx, al
     mov edx, 0x3fa
     out dx, al",
    up!(),
    "2: mov edx, 0x3fd
     in al, dx
     test al, 1
     jz 2b
     mov edi, 0x200000
     mov ecx, 16
     mov edx, 0x3f8
     rep insb
     3: mov edx, 0x3fd
     in al, dx
     test al, 0x20
     jz 3b
     mov edx, 0x3f8
     mov esi, 0x200000
     mov ecx, 16
     4: lodsb
     test al, al
     jz 5f
     cmp al, 4
     je 6f
     out dx, al
     5: dec ecx
     jnz 4b
     jmp 2b
     6: mov al, 7
     out 0xf4, al
     7: hlt
     jmp 7b"
}

/// Where guests are loaded and entered.
const LOAD_ADDRESS: u64 = 0x10_0000;
const CODE_OFFSET: usize = 0x1000;

/// A kernel file for `code`, that wants `memory` bytes behind the load address.
pub fn kernel_wanting(code: &[u8], memory: u64) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // e_type EXEC, e_machine x86-64, e_version.
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    // e_entry, e_phoff, e_shoff, e_flags.
    file.extend(LOAD_ADDRESS.to_le_bytes());
    file.extend(64u64.to_le_bytes());
    file.extend([0; 12]);
    // Sizes of the header and of a program header; one of those, no sections.
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // PT_LOAD, read, write and execute; offset, addresses, sizes, alignment.
    file.extend(1u32.to_le_bytes());
    file.extend(7u32.to_le_bytes());
    for word in [
        CODE_OFFSET as u64,
        LOAD_ADDRESS,
        LOAD_ADDRESS,
        code.len() as u64,
        memory,
        0x1000,
    ] {
        file.extend(word.to_le_bytes());
    }
    file.resize(CODE_OFFSET, 0);
    file.extend(code);
    file
}

/// A kernel file for `code`.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    kernel_wanting(code, 0x1_0000)
}

/// A bzImage by its header, of which most is missing.
pub fn cut_bzimage() -> Vec<u8> {
    let mut file = vec![0; 2048];
    let mut put = |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &0x1_0000u32.to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x100_0000u32.to_le_bytes());
    file
}
