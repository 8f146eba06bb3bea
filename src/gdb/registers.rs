//! A vCPU's registers, as KVM has them and as gdb numbers them.
//!
//! gdb learns the numbers from the target description below: its own features for the general, x87 and SSE registers,
//! in the order that `gdbstub_arch` has them, then the bases of FS and GS, then the control registers in a feature of
//! ours, which gdb shows by `info registers system`. [gdb manual: "i386 Features"]
//!
//! **RIP is told as a linear address.** That is the same number but in real mode and wherever else CS has a base; there
//! gdb, which knows no segments, would otherwise look at the wrong memory and not recognize its own breakpoints.

use crate::vcpu::debug::CpuState;
use gdbstub::arch::{Arch, RegId, Registers};
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use gdbstub_arch::x86::reg::id::X86_64CoreRegId;
use kvm_bindings::kvm_fpu;
use std::num::NonZeroUsize;

/// The x87 tag word from the abridged one that FXSAVE has: for each register, empty, or what its value is.
/// [SDM 1 §10.5.1.1, table 10-3; SDM 1 §8.1.7]
fn full_tag(fpu: &kvm_fpu) -> u16 {
    const VALID: u16 = 0;
    const ZERO: u16 = 1;
    const SPECIAL: u16 = 2;
    const EMPTY: u16 = 3;
    let top = usize::from(fpu.fsw >> 11 & 7);
    (0..8).fold(0, |tags, physical| {
        let tag = if fpu.ftwx & 1 << physical == 0 {
            EMPTY
        } else {
            // Tags go by physical register, the image by distance from the top of the stack.
            let st = &fpu.fpr[(physical + 8 - top) % 8];
            let mantissa = u64::from_le_bytes(st[..8].try_into().expect("8 of 16 bytes"));
            match u16::from_le_bytes([st[8], st[9]]) & 0x7fff {
                0 if mantissa == 0 => ZERO,
                0 | 0x7fff => SPECIAL,
                _ if mantissa >> 63 == 0 => SPECIAL,
                _ => VALID,
            }
        };
        tags | tag << (2 * physical)
    })
}

fn abridged_tag(full: u16) -> u8 {
    (0..8)
        .filter(|physical| full >> (2 * physical) & 3 != 3)
        .fold(0, |tags, physical| tags | 1 << physical)
}

/// 64-bit registers beyond gdb's core and SSE sets, in the order of their numbers, from 57.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extra {
    /// Base of FS.
    FsBase,
    /// Base of GS.
    GsBase,
    /// IA32_KERNEL_GS_BASE.
    KernelGsBase,
    /// CR0.
    Cr0,
    /// CR2.
    Cr2,
    /// CR3.
    Cr3,
    /// CR4.
    Cr4,
    /// CR8.
    Cr8,
    /// EFER.
    Efer,
}

const EXTRA: [Extra; 9] = [
    Extra::FsBase,
    Extra::GsBase,
    Extra::KernelGsBase,
    Extra::Cr0,
    Extra::Cr2,
    Extra::Cr3,
    Extra::Cr4,
    Extra::Cr8,
    Extra::Efer,
];

impl Extra {
    fn field(self, cpu: &mut CpuState) -> &mut u64 {
        match self {
            Extra::FsBase => &mut cpu.special.fs.base,
            Extra::GsBase => &mut cpu.special.gs.base,
            Extra::KernelGsBase => &mut cpu.kernel_gs_base,
            Extra::Cr0 => &mut cpu.special.cr0,
            Extra::Cr2 => &mut cpu.special.cr2,
            Extra::Cr3 => &mut cpu.special.cr3,
            Extra::Cr4 => &mut cpu.special.cr4,
            Extra::Cr8 => &mut cpu.special.cr8,
            Extra::Efer => &mut cpu.special.efer,
        }
    }
}

/// What gdb's `g` packet has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GdbRegisters {
    core: X86_64CoreRegs,
    extra: [u64; EXTRA.len()],
}

/// Bytes of the core and SSE sets in a `g` packet.
const CORE_BYTES: usize = 0x218;

impl GdbRegisters {
    /// The whole set as gdb has it.
    pub fn of(cpu: &CpuState) -> GdbRegisters {
        let (r, s, f) = (&cpu.general, &cpu.special, &cpu.fpu);
        let mut core = X86_64CoreRegs {
            regs: [
                r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12,
                r.r13, r.r14, r.r15,
            ],
            rip: cpu.linear_rip(),
            eflags: r.rflags as u32,
            mxcsr: f.mxcsr,
            ..Default::default()
        };
        core.segments.cs = s.cs.selector.into();
        core.segments.ss = s.ss.selector.into();
        core.segments.ds = s.ds.selector.into();
        core.segments.es = s.es.selector.into();
        core.segments.fs = s.fs.selector.into();
        core.segments.gs = s.gs.selector.into();
        for (st, bytes) in core.st.iter_mut().zip(&f.fpr) {
            st.copy_from_slice(&bytes[..10]);
        }
        core.fpu.fctrl = f.fcw.into();
        core.fpu.fstat = f.fsw.into();
        core.fpu.ftag = full_tag(f).into();
        core.fpu.fop = f.last_opcode.into();
        // As FXSAVE64 has them: offsets of 64 bits, of which gdb has room for the selector's half too.
        core.fpu.fioff = f.last_ip as u32;
        core.fpu.fiseg = (f.last_ip >> 32) as u32;
        core.fpu.fooff = f.last_dp as u32;
        core.fpu.foseg = (f.last_dp >> 32) as u32;
        for (xmm, bytes) in core.xmm.iter_mut().zip(&f.xmm) {
            *xmm = u128::from_le_bytes(*bytes);
        }
        GdbRegisters {
            core,
            extra: EXTRA.map(|register| *register.field(&mut cpu.clone())),
        }
    }

    /// Puts what gdb wrote into a vCPU's state. Segment selectors are left as they are: loading one is more than writing a number.
    pub fn put(&self, cpu: &mut CpuState) {
        let core = &self.core;
        let r = &mut cpu.general;
        [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
            r.r14, r.r15,
        ] = core.regs;
        r.rflags = core.eflags.into();
        for (register, value) in EXTRA.into_iter().zip(self.extra) {
            *register.field(cpu) = value;
        }
        cpu.set_linear_rip(core.rip);
        let f = &mut cpu.fpu;
        for (bytes, st) in f.fpr.iter_mut().zip(&core.st) {
            bytes[..10].copy_from_slice(st);
        }
        f.fcw = core.fpu.fctrl as u16;
        f.fsw = core.fpu.fstat as u16;
        f.ftwx = abridged_tag(core.fpu.ftag as u16);
        f.last_opcode = core.fpu.fop as u16;
        f.last_ip = u64::from(core.fpu.fiseg) << 32 | u64::from(core.fpu.fioff);
        f.last_dp = u64::from(core.fpu.foseg) << 32 | u64::from(core.fpu.fooff);
        for (bytes, xmm) in f.xmm.iter_mut().zip(&core.xmm) {
            *bytes = xmm.to_le_bytes();
        }
        f.mxcsr = core.mxcsr;
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CORE_BYTES + 8 * EXTRA.len());
        self.gdb_serialize(|byte| bytes.push(byte.unwrap_or(0)));
        bytes
    }

    /// One register's bytes; `None`: there is none of that number.
    pub fn get(&self, register: GdbRegister) -> Vec<u8> {
        self.bytes()[register.start..register.start + register.length].to_vec()
    }

    /// Changes one register. `false`: the value has another length.
    pub fn set(&mut self, register: GdbRegister, value: &[u8]) -> bool {
        let mut bytes = self.bytes();
        let place = &mut bytes[register.start..register.start + register.length];
        if place.len() != value.len() {
            return false;
        }
        place.copy_from_slice(value);
        self.gdb_deserialize(&bytes).is_ok()
    }
}

impl Registers for GdbRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.core.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.core.gdb_serialize(&mut write_byte);
        for byte in self.extra.iter().flat_map(|value| value.to_le_bytes()) {
            write_byte(Some(byte));
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let (core, extra) = bytes.split_at_checked(CORE_BYTES).ok_or(())?;
        self.core.gdb_deserialize(core)?;
        if extra.len() != 8 * EXTRA.len() {
            return Err(());
        }
        for (value, bytes) in self.extra.iter_mut().zip(extra.chunks_exact(8)) {
            *value = u64::from_le_bytes(bytes.try_into().map_err(|_| ())?);
        }
        Ok(())
    }
}

/// A register by its number: where it is in the `g` packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GdbRegister {
    start: usize,
    length: usize,
}

impl RegId for GdbRegister {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let length = |id| match X86_64CoreRegId::from_raw_id(id) {
            Some((_, length)) => length.map(NonZeroUsize::get),
            None => None,
        };
        let mut start = 0;
        let mut number = 0;
        while let Some(length) = length(number) {
            if number == id {
                return Some((GdbRegister { start, length }, NonZeroUsize::new(length)));
            }
            start += length;
            number += 1;
        }
        let extra = id.checked_sub(number).filter(|extra| *extra < EXTRA.len())?;
        let start = start + 8 * extra;
        Some((GdbRegister { start, length: 8 }, NonZeroUsize::new(8)))
    }
}

/// x86-64 with the system's registers.
pub enum X86_64System {}

impl Arch for X86_64System {
    type Usize = u64;
    type Registers = GdbRegisters;
    type RegId = GdbRegister;
    type BreakpointKind = usize;

    fn target_description_xml() -> Option<&'static str> {
        Some(DESCRIPTION)
    }
}

/// Numbers are given by order: [`GdbRegister::from_raw_id`] counts the same way.
const DESCRIPTION: &str = r#"<?xml version="1.0"?>
<!DOCTYPE target SYSTEM "gdb-target.dtd">
<target version="1.0">
<architecture>i386:x86-64</architecture>
<feature name="org.gnu.gdb.i386.core">
<flags id="i386_eflags" size="4">
<field name="CF" start="0" end="0"/><field name="" start="1" end="1"/><field name="PF" start="2" end="2"/>
<field name="AF" start="4" end="4"/><field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/>
<field name="TF" start="8" end="8"/><field name="IF" start="9" end="9"/><field name="DF" start="10" end="10"/>
<field name="OF" start="11" end="11"/><field name="NT" start="14" end="14"/><field name="RF" start="16" end="16"/>
<field name="VM" start="17" end="17"/><field name="AC" start="18" end="18"/><field name="VIF" start="19" end="19"/>
<field name="VIP" start="20" end="20"/><field name="ID" start="21" end="21"/>
</flags>
<reg name="rax" bitsize="64" type="int64"/><reg name="rbx" bitsize="64" type="int64"/>
<reg name="rcx" bitsize="64" type="int64"/><reg name="rdx" bitsize="64" type="int64"/>
<reg name="rsi" bitsize="64" type="int64"/><reg name="rdi" bitsize="64" type="int64"/>
<reg name="rbp" bitsize="64" type="data_ptr"/><reg name="rsp" bitsize="64" type="data_ptr"/>
<reg name="r8" bitsize="64" type="int64"/><reg name="r9" bitsize="64" type="int64"/>
<reg name="r10" bitsize="64" type="int64"/><reg name="r11" bitsize="64" type="int64"/>
<reg name="r12" bitsize="64" type="int64"/><reg name="r13" bitsize="64" type="int64"/>
<reg name="r14" bitsize="64" type="int64"/><reg name="r15" bitsize="64" type="int64"/>
<reg name="rip" bitsize="64" type="code_ptr"/><reg name="eflags" bitsize="32" type="i386_eflags"/>
<reg name="cs" bitsize="32" type="int32"/><reg name="ss" bitsize="32" type="int32"/>
<reg name="ds" bitsize="32" type="int32"/><reg name="es" bitsize="32" type="int32"/>
<reg name="fs" bitsize="32" type="int32"/><reg name="gs" bitsize="32" type="int32"/>
<reg name="st0" bitsize="80" type="i387_ext"/><reg name="st1" bitsize="80" type="i387_ext"/>
<reg name="st2" bitsize="80" type="i387_ext"/><reg name="st3" bitsize="80" type="i387_ext"/>
<reg name="st4" bitsize="80" type="i387_ext"/><reg name="st5" bitsize="80" type="i387_ext"/>
<reg name="st6" bitsize="80" type="i387_ext"/><reg name="st7" bitsize="80" type="i387_ext"/>
<reg name="fctrl" bitsize="32" type="int" group="float"/><reg name="fstat" bitsize="32" type="int" group="float"/>
<reg name="ftag" bitsize="32" type="int" group="float"/><reg name="fiseg" bitsize="32" type="int" group="float"/>
<reg name="fioff" bitsize="32" type="int" group="float"/><reg name="foseg" bitsize="32" type="int" group="float"/>
<reg name="fooff" bitsize="32" type="int" group="float"/><reg name="fop" bitsize="32" type="int" group="float"/>
</feature>
<feature name="org.gnu.gdb.i386.sse">
<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/>
<vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/>
<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/>
<field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>
<reg name="xmm0" bitsize="128" type="vec128"/><reg name="xmm1" bitsize="128" type="vec128"/>
<reg name="xmm2" bitsize="128" type="vec128"/><reg name="xmm3" bitsize="128" type="vec128"/>
<reg name="xmm4" bitsize="128" type="vec128"/><reg name="xmm5" bitsize="128" type="vec128"/>
<reg name="xmm6" bitsize="128" type="vec128"/><reg name="xmm7" bitsize="128" type="vec128"/>
<reg name="xmm8" bitsize="128" type="vec128"/><reg name="xmm9" bitsize="128" type="vec128"/>
<reg name="xmm10" bitsize="128" type="vec128"/><reg name="xmm11" bitsize="128" type="vec128"/>
<reg name="xmm12" bitsize="128" type="vec128"/><reg name="xmm13" bitsize="128" type="vec128"/>
<reg name="xmm14" bitsize="128" type="vec128"/><reg name="xmm15" bitsize="128" type="vec128"/>
<reg name="mxcsr" bitsize="32" type="int32" group="vector"/>
</feature>
<feature name="org.gnu.gdb.i386.segments">
<reg name="fs_base" bitsize="64" type="int"/><reg name="gs_base" bitsize="64" type="int"/>
</feature>
<feature name="actor-vmm.x86.system">
<reg name="k_gs_base" bitsize="64" type="int" group="system"/>
<reg name="cr0" bitsize="64" type="int" group="system"/><reg name="cr2" bitsize="64" type="int" group="system"/>
<reg name="cr3" bitsize="64" type="int" group="system"/><reg name="cr4" bitsize="64" type="int" group="system"/>
<reg name="cr8" bitsize="64" type="int" group="system"/><reg name="efer" bitsize="64" type="int" group="system"/>
</feature>
</target>
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu() -> CpuState {
        let mut cpu = CpuState::default();
        cpu.special.cs.l = 1;
        cpu.special.cs.selector = 0x10;
        cpu.special.fs.base = 0xf5;
        cpu.special.cr3 = 0x9000;
        cpu.special.efer = 0x500;
        cpu.kernel_gs_base = 0xffff_8000_0000_1234;
        cpu.general.rip = 0x10_0000;
        cpu.general.rsp = 0x8ff0;
        cpu.general.r15 = 15;
        cpu.general.rflags = 0x202;
        cpu.fpu.xmm[3][0] = 0x33;
        cpu.fpu.mxcsr = 0x1f80;
        cpu.fpu.fcw = 0x37f;
        cpu
    }

    fn number(name: &str) -> usize {
        let before = DESCRIPTION
            .split_once(&format!("<reg name=\"{name}\""))
            .unwrap()
            .0;
        before.matches("<reg name=").count()
    }

    fn value(cpu: &CpuState, name: &str) -> u64 {
        let (register, length) = GdbRegister::from_raw_id(number(name)).unwrap();
        let mut bytes = GdbRegisters::of(cpu).get(register);
        assert_eq!(bytes.len(), length.unwrap().get());
        bytes.resize(8, 0);
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    #[test]
    fn each_name_leads_to_its_value() {
        let cpu = cpu();
        for (name, expected) in [
            ("rsp", 0x8ff0),
            ("r15", 15),
            ("rip", 0x10_0000),
            ("eflags", 0x202),
            ("cs", 0x10),
            ("fctrl", 0x37f),
            ("ftag", 0xffff),
            ("xmm3", 0x33),
            ("mxcsr", 0x1f80),
            ("fs_base", 0xf5),
            ("gs_base", 0),
            ("k_gs_base", 0xffff_8000_0000_1234),
            ("cr3", 0x9000),
            ("efer", 0x500),
        ] {
            assert_eq!(value(&cpu, name), expected, "{name}");
        }
    }

    #[test]
    fn the_description_counts_as_the_numbers_do() {
        let registers = DESCRIPTION.matches("<reg name=").count();
        assert!(GdbRegister::from_raw_id(registers - 1).is_some());
        assert_eq!(GdbRegister::from_raw_id(registers), None);
        let mut total = 0;
        for (id, part) in DESCRIPTION.split("bitsize=\"").skip(1).enumerate() {
            let bits: usize = part.split('"').next().unwrap().parse().unwrap();
            let (register, length) = GdbRegister::from_raw_id(id).unwrap();
            assert_eq!(length.unwrap().get(), bits / 8, "number {id}");
            assert_eq!(register.start, total);
            total += bits / 8;
        }
        assert_eq!(GdbRegisters::of(&cpu()).bytes().len(), total);
    }

    #[test]
    fn a_round_trip_changes_nothing() {
        let before = cpu();
        let mut after = before.clone();
        GdbRegisters::of(&before).put(&mut after);
        assert_eq!(after, before);
    }

    #[test]
    fn one_register_is_written_alone() {
        let mut cpu = cpu();
        let mut registers = GdbRegisters::of(&cpu);
        let (cr2, _) = GdbRegister::from_raw_id(number("cr2")).unwrap();
        assert!(registers.set(cr2, &7u64.to_le_bytes()));
        assert!(!registers.set(cr2, &[1, 2]));
        let before = cpu.clone();
        registers.put(&mut cpu);
        assert_eq!(cpu.special.cr2, 7);
        cpu.special.cr2 = 0;
        assert_eq!(cpu, before);
    }

    #[test]
    fn rip_is_linear_where_cs_has_a_base() {
        let mut cpu = CpuState::default();
        cpu.special.cs.base = 0xf_0000;
        cpu.general.rip = 0xfff0;
        assert_eq!(value(&cpu, "rip"), 0xf_fff0);
        cpu.set_linear_rip(0xf_1234);
        assert_eq!(cpu.general.rip, 0x1234);
        cpu.special.cs.base = 0xffff_0000;
        cpu.general.rip = 0x1_0010;
        assert_eq!(cpu.linear_rip(), 0x10, "32 bits wrap");
    }

    #[test]
    fn tags_tell_what_is_in_the_x87_registers() {
        let mut fpu = kvm_fpu {
            // Top is 6: physical registers 6 and 7 are in use, as ST0 and ST1.
            fsw: 6 << 11,
            ftwx: 0b1100_0000,
            ..Default::default()
        };
        // ST0 is 1.0, ST1 is 0.
        fpu.fpr[0][7] = 0x80;
        fpu.fpr[0][8..10].copy_from_slice(&0x3fffu16.to_le_bytes());
        assert_eq!(full_tag(&fpu), 0b01_00_11_11_11_11_11_11);
        assert_eq!(abridged_tag(full_tag(&fpu)), fpu.ftwx);
        // Infinity and a number that is not normal.
        fpu.fpr[0][8..10].copy_from_slice(&0x7fffu16.to_le_bytes());
        fpu.fpr[1][0] = 1;
        assert_eq!(full_tag(&fpu) >> 12, 0b10_10);
    }
}
