//! A vCPU's registers as a report shows them.

use std::fmt;

/// General, segment and control registers. Names as in the SDM.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Registers {
    /// RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8 to R15, RIP, RFLAGS.
    pub general: kvm_bindings::kvm_regs,
    /// Segments, descriptor tables, control registers, EFER.
    pub special: kvm_bindings::kvm_sregs,
}

impl Registers {
    /// The linear address of the next instruction. In 64-bit code the base of CS is ignored.
    pub fn linear_rip(&self) -> u64 {
        if self.special.cs.l != 0 {
            self.general.rip
        } else {
            self.special.cs.base.wrapping_add(self.general.rip) & 0xffff_ffff
        }
    }
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (&self.general, &self.special);
        writeln!(
            f,
            "rax={:016x} rbx={:016x} rcx={:016x} rdx={:016x}",
            r.rax, r.rbx, r.rcx, r.rdx
        )?;
        writeln!(
            f,
            "rsi={:016x} rdi={:016x} rsp={:016x} rbp={:016x}",
            r.rsi, r.rdi, r.rsp, r.rbp
        )?;
        writeln!(
            f,
            "r8 ={:016x} r9 ={:016x} r10={:016x} r11={:016x}",
            r.r8, r.r9, r.r10, r.r11
        )?;
        writeln!(
            f,
            "r12={:016x} r13={:016x} r14={:016x} r15={:016x}",
            r.r12, r.r13, r.r14, r.r15
        )?;
        writeln!(f, "rip={:016x} rflags={:08x}", r.rip, r.rflags)?;
        for (name, segment) in [
            ("cs", &s.cs),
            ("ss", &s.ss),
            ("ds", &s.ds),
            ("es", &s.es),
            ("fs", &s.fs),
            ("gs", &s.gs),
            ("tr", &s.tr),
        ] {
            writeln!(
                f,
                "{name}={:04x} base={:016x} limit={:08x} type={:x} dpl={} l={} db={}",
                segment.selector,
                segment.base,
                segment.limit,
                segment.type_,
                segment.dpl,
                segment.l,
                segment.db
            )?;
        }
        writeln!(
            f,
            "gdt={:016x}/{:04x} idt={:016x}/{:04x}",
            s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit
        )?;
        write!(
            f,
            "cr0={:08x} cr2={:016x} cr3={:016x} cr4={:08x} cr8={:x} efer={:x} apic={:x}",
            s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base
        )
    }
}
