//! Single instructions in ring 0, to find out what this host's KVM can run.
//!
//! Hardware runs them all. A software KVM that interprets ring 0 may know only some, and a kernel that uses another
//! stops in an internal error. Each probe ends by writing 1 to the debug-exit port; whatever else happens, the
//! instruction is not to be relied on.

use super::{LOAD_ADDRESS, image};
use crate::boot::EntryPoint;
use crate::machine::supervisor::Guest;

image! {
    /// Nothing special: whether anything runs at all.
    fn nothing = "actor_vmm_probe_nothing";
    ".code64",

    "mov al, 1",
    "out 0xf4, al",
    "2: hlt",
    "jmp 2b"
}

image! {
    /// Static keys, ftrace and kprobes patch code through it; every stock kernel tests it while booting.
    fn int3 = "actor_vmm_probe_int3";
    ".code64",
    "jmp 4f",
    "3: iretq",
    // A 64-bit interrupt gate for vector 3 in an IDT at 0x3000, leading back to the label above.
    "4: lea rax, [rip + 3b]",
    "mov edi, 0x3030",
    "mov word ptr [rdi], ax",
    "mov word ptr [rdi + 2], 0x10",
    "mov word ptr [rdi + 4], 0x8e00",
    "shr rax, 16",
    "mov dword ptr [rdi + 6], eax",
    "mov word ptr [rdi + 10], 0",
    "mov dword ptr [rdi + 12], 0",
    "mov edi, 0x2ff0",
    "mov word ptr [rdi], 0xfff",
    "mov qword ptr [rdi + 2], 0x3000",
    "lidt [rdi]",
    "int3",
    "mov al, 1",
    "out 0xf4, al",
    "2: hlt",
    "jmp 2b"
}

image! {
    /// The allocator's freelists.
    fn cmpxchg16b = "actor_vmm_probe_cmpxchg16b";
    ".code64",
    "mov edi, 0x3000",
    "cmpxchg16b [rdi]",
    "mov al, 1",
    "out 0xf4, al",
    "2: hlt",
    "jmp 2b"
}

image! {
    /// Every switch of tasks, on a processor that has it.
    fn xsave = "actor_vmm_probe_xsave";
    ".code64",
    "mov rax, cr4",
    "or rax, 1 << 18 | 1 << 9",
    "mov cr4, rax",
    "mov eax, 3",
    "xor edx, edx",
    "xor ecx, ecx",
    "xsetbv",
    "mov edi, 0x3000",
    "xsave [rdi]",
    "mov al, 1",
    "out 0xf4, al",
    "2: hlt",
    "jmp 2b"
}

image! {
    /// Checksums, RAID and encryption.
    fn sse = "actor_vmm_probe_sse";
    ".code64",
    "mov rax, cr4",
    "or rax, 1 << 9",
    "mov cr4, rax",
    "xorps xmm0, xmm0",
    "mov al, 1",
    "out 0xf4, al",
    "2: hlt",
    "jmp 2b"
}

image! {
    /// Bitmaps.
    fn popcnt = "actor_vmm_probe_popcnt";
    ".code64",
    "popcnt eax, eax",
    "mov al, 1",
    "out 0xf4, al",
    "2: hlt",
    "jmp 2b"
}

/// One instruction to try.
pub struct Probe {
    /// Its name, for people.
    pub name: &'static str,
    /// What stock kernels need it for.
    pub needed_for: &'static str,
    /// Whether the host's processor has it at all; what it does not offer is not missing.
    pub offered: fn() -> bool,
    code: fn() -> &'static [u8],
}

impl Probe {
    /// The guest that tries it.
    pub fn guest(&self) -> Guest {
        Guest::Image {
            bytes: (self.code)(),
            at: LOAD_ADDRESS,
            entry: EntryPoint::Flat64 { rip: LOAD_ADDRESS },
        }
    }
}

/// Whether anything runs at all.
pub const NOTHING: Probe = Probe {
    name: "a 64-bit guest",
    needed_for: "everything",
    offered: || true,
    code: nothing,
};

/// What no stock kernel boots without.
pub const INT3: Probe = Probe {
    name: "int3",
    needed_for: "patching of running code",
    offered: || true,
    code: int3,
};

/// What stock kernels use in ring 0 and a software KVM may lack.
pub const INSTRUCTIONS: [Probe; 5] = [
    INT3,
    Probe {
        name: "cmpxchg16b",
        needed_for: "the memory allocator",
        offered: || is_x86_feature_detected!("cmpxchg16b"),
        code: cmpxchg16b,
    },
    Probe {
        name: "xsave",
        needed_for: "switching tasks",
        offered: || is_x86_feature_detected!("xsave"),
        code: xsave,
    },
    Probe {
        name: "SSE",
        needed_for: "checksums and encryption",
        offered: || true,
        code: sse,
    },
    Probe {
        name: "popcnt",
        needed_for: "bitmaps",
        offered: || is_x86_feature_detected!("popcnt"),
        code: popcnt,
    },
];
