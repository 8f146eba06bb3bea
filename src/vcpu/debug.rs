//! A vCPU under a debugger: what it is asked, what it tells, and what it does with its exits. Pure, but for the types
//! of KVM.
//!
//! The debugger never touches a vCPU: it sends [`DebugRequest`]s, which a vCPU that waits serves at once and a running
//! one does not take. [`Arming`] says how the next stay in the guest is: not at all, one instruction, or until a
//! breakpoint. A vCPU that is not armed looks at nothing of this: it runs another loop.

use super::exit::{Exit, PioExit};
use crate::devices::{Direction, Width};
use crossbeam_channel::Sender;
use kvm_bindings as kvm;
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};
use nix::errno::Errno;
use std::sync::Arc;

/// What a vCPU tells of itself while it is paused.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CpuState {
    /// RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8 to R15, RIP, RFLAGS.
    pub general: kvm_regs,
    /// Segments, descriptor tables, control registers, EFER.
    pub special: kvm_sregs,
    /// x87 and SSE.
    pub fpu: kvm_fpu,
    /// The MSR IA32_KERNEL_GS_BASE: what SWAPGS puts into GS's base.
    pub kernel_gs_base: u64,
    /// What it would do if it were not paused.
    pub activity: Activity,
}

/// What a vCPU would do if it were not paused. [KVM api: KVM_GET_MP_STATE]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// Runs instructions.
    #[default]
    Running,
    /// In HLT.
    Halted,
    /// An application processor that nobody has started yet.
    NotStarted,
}

impl Activity {
    /// For `info threads`.
    pub fn text(self) -> &'static str {
        match self {
            Activity::Running => "running",
            Activity::Halted => "halted",
            Activity::NotStarted => "not started",
        }
    }
}

impl CpuState {
    /// Executes 64-bit code: the base of CS means nothing.
    pub fn is_64_bit(&self) -> bool {
        self.special.cs.l != 0
    }

    /// The linear address of the next instruction.
    pub fn linear_rip(&self) -> u64 {
        linear_rip(&self.general, &self.special)
    }

    /// Makes a linear address the next instruction's.
    pub fn set_linear_rip(&mut self, linear: u64) {
        self.general.rip = if self.is_64_bit() {
            linear
        } else {
            linear.wrapping_sub(self.special.cs.base) & 0xffff_ffff
        };
    }

    /// CR0.PE is 0.
    pub fn is_real_mode(&self) -> bool {
        self.special.cr0 & 1 == 0
    }

    /// The privilege level, 0 to 3. [SDM 3A §5.5: SS's descriptor has it]
    pub fn ring(&self) -> u8 {
        self.special.ss.dpl
    }
}

/// The linear address of the next instruction. In 64-bit code the base of CS is ignored.
pub fn linear_rip(general: &kvm_regs, special: &kvm_sregs) -> u64 {
    if special.cs.l != 0 {
        general.rip
    } else {
        special.cs.base.wrapping_add(general.rip) & 0xffff_ffff
    }
}

/// What a debugger asks of a vCPU that waits. Each with where the answer goes; a debugger that is gone gets none.
#[derive(Debug)]
pub enum DebugRequest {
    /// Its state. `None`: the backend has none to tell.
    Read(Sender<Option<Box<CpuState>>>),
    /// It takes this state, but for the activity. `false`: the host refuses it.
    Write(Box<CpuState>, Sender<bool>),
    /// How it goes on from the next resume.
    Arm(Arming, Sender<Result<(), Errno>>),
}

/// How a vCPU goes on when it is resumed.
#[derive(Clone, Debug, Default)]
pub struct Arming {
    /// Whether it does.
    pub mode: Mode,
    /// `None`: nobody debugs, and the processor's debug registers are the guest's.
    pub watch: Option<Watch>,
}

/// Whether a resumed vCPU runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It runs.
    #[default]
    Run,
    /// It executes one instruction.
    Step,
    /// It stays where it is.
    Hold,
}

/// What stops a running vCPU.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// DR0 to DR3: linear addresses.
    pub addresses: [u64; 4],
    /// DR7. [SDM 3B §18.2.4]
    pub dr7: u64,
    /// Where instructions of ours are in place of the guest's: linear addresses, ascending.
    pub planted: Arc<[u64]>,
    /// No interrupts during a step, where the host can do that.
    pub hold_interrupts: bool,
}

/// The instruction that is planted where int3 does not work: `out TRAP_PORT, al`. Nobody claims this port (it was the
/// coprocessor's), and only a write to it from a planted address counts.
pub const TRAP_PORT: u8 = 0xf1;

/// One port per breakpoint would tell which it was; but the address does.
const TRAP_LENGTH: u64 = 2;

/// Why a vCPU stopped by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DebugStop {
    /// It has executed one instruction.
    Stepped,
    /// It is at a planted instruction, at this linear address.
    Planted(u64),
    /// The conditions of the debug registers in these bits hold (bit 0: DR0).
    Hardware(u8),
}

/// What a vCPU does with an exit while it is watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Nothing of the debugger's: as always.
    Serve,
    /// It stops, and waits.
    Stop(DebugStop),
    /// It stops at this linear address, after the port write there is done with.
    StopBehindPort(u64),
    /// The exception is the guest's own: it gets it (KVM_GUESTDBG_INJECT_DB or _BP), and goes on.
    Reflect(u32),
}

/// [SDM 3B §18.2.3: DR6]
const DR6_CONDITIONS: u64 = 0xf;
const DR6_BS: u64 = 1 << 14;
const EXCEPTION_DB: u32 = 1;
const EXCEPTION_BP: u32 = 3;
const INT3: u8 = 0xcc;

impl Watch {
    /// What KVM is to be told. [KVM api: KVM_SET_GUEST_DEBUG]
    pub fn control(&self, mode: Mode) -> kvm::kvm_guest_debug {
        let mut debug = kvm::kvm_guest_debug {
            control: kvm::KVM_GUESTDBG_ENABLE | kvm::KVM_GUESTDBG_USE_SW_BP,
            ..Default::default()
        };
        if mode == Mode::Step {
            debug.control |= kvm::KVM_GUESTDBG_SINGLESTEP;
            if self.hold_interrupts {
                debug.control |= kvm::KVM_GUESTDBG_BLOCKIRQ;
            }
        }
        if self.dr7 != 0 {
            debug.control |= kvm::KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[..4].copy_from_slice(&self.addresses);
            debug.arch.debugreg[7] = self.dr7;
        }
        debug
    }

    fn is_planted(&self, linear: u64) -> bool {
        self.planted.binary_search(&linear).is_ok()
    }

    /// What to do with an exit. `rip` is the linear address of the next instruction; it is asked for only by exits that
    /// may be the debugger's.
    pub fn decide(&self, exit: &Exit, mode: Mode, rip: impl FnOnce() -> Option<u64>) -> Decision {
        match exit {
            Exit::Debug {
                exception: EXCEPTION_DB,
                dr6,
                ..
            } => {
                // Each condition is told whether it is enabled or not [SDM 3B §18.2.3].
                let enabled = (0..4).filter(|n| self.dr7 >> (2 * n) & 0b11 != 0);
                let conditions = enabled.fold(0, |bits, n| bits | 1 << n) & (dr6 & DR6_CONDITIONS) as u8;
                if conditions != 0 {
                    Decision::Stop(DebugStop::Hardware(conditions))
                } else if mode == Mode::Step {
                    Decision::Stop(DebugStop::Stepped)
                } else if dr6 & DR6_BS != 0 {
                    // The guest's own trap flag.
                    Decision::Reflect(kvm::KVM_GUESTDBG_INJECT_DB)
                } else {
                    Decision::Serve
                }
            }
            Exit::Debug {
                exception: EXCEPTION_BP,
                pc,
                ..
            } => {
                if self.is_planted(*pc) {
                    Decision::Stop(DebugStop::Planted(*pc))
                } else {
                    Decision::Reflect(kvm::KVM_GUESTDBG_INJECT_BP)
                }
            }
            // A KVM that interprets ring 0 and does not know int3: the exit repeats until the instruction is mended.
            Exit::InternalError(error)
                if error
                    .instruction_bytes()
                    .is_some_and(|code| code.first() == Some(&INT3)) =>
            {
                match rip().filter(|rip| self.is_planted(*rip)) {
                    Some(rip) => Decision::Stop(DebugStop::Planted(rip)),
                    None => Decision::Serve,
                }
            }
            Exit::Pio(PioExit {
                direction: Direction::Write,
                port,
                width: Width::Byte,
                count: 1,
                ..
            }) if *port == u16::from(TRAP_PORT) && !self.planted.is_empty() => {
                let Some(rip) = rip() else { return Decision::Serve };
                // Hosts differ in whether RIP is behind the instruction at this exit.
                let here = [rip, rip.wrapping_sub(TRAP_LENGTH)]
                    .into_iter()
                    .find(|rip| self.is_planted(*rip));
                here.map_or(Decision::Serve, Decision::StopBehindPort)
            }
            _ => Decision::Serve,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::exit::InternalError;

    fn watch() -> Watch {
        Watch {
            addresses: [0x1000, 0x2000, 0, 0],
            // DR0 and DR1 enabled.
            dr7: 0b0101,
            planted: Arc::from([0x3000, 0x4000]),
            hold_interrupts: true,
        }
    }

    fn debug(exception: u32, pc: u64, dr6: u64) -> Exit {
        Exit::Debug {
            exception,
            pc,
            dr6,
            dr7: 0,
        }
    }

    fn decide(exit: &Exit, mode: Mode, rip: u64) -> Decision {
        watch().decide(exit, mode, || Some(rip))
    }

    #[test]
    fn steps_and_conditions() {
        let step = debug(1, 0x10, DR6_BS);
        assert_eq!(decide(&step, Mode::Step, 0), Decision::Stop(DebugStop::Stepped));
        assert_eq!(
            decide(&step, Mode::Run, 0),
            Decision::Reflect(kvm::KVM_GUESTDBG_INJECT_DB),
            "the guest steps itself"
        );
        for mode in [Mode::Run, Mode::Step] {
            assert_eq!(
                decide(&debug(1, 0x2000, 0b1110 | DR6_BS), mode, 0),
                Decision::Stop(DebugStop::Hardware(0b10)),
                "conditions that are not enabled do not count"
            );
        }
    }

    #[test]
    fn an_int3_is_ours_where_we_planted_one() {
        assert_eq!(
            decide(&debug(3, 0x3000, 0), Mode::Run, 0),
            Decision::Stop(DebugStop::Planted(0x3000))
        );
        assert_eq!(
            decide(&debug(3, 0x3001, 0), Mode::Run, 0),
            Decision::Reflect(kvm::KVM_GUESTDBG_INJECT_BP)
        );
    }

    #[test]
    fn an_int3_that_kvm_cannot_emulate() {
        let error = |byte: u8| {
            let mut data = [0; 16];
            data[0] = 1;
            data[1] = u64::from_le_bytes([15, byte, 0, 0, 0, 0, 0, 0]);
            Exit::InternalError(InternalError {
                suberror: 1,
                ndata: 4,
                data,
            })
        };
        assert_eq!(
            decide(&error(0xcc), Mode::Run, 0x4000),
            Decision::Stop(DebugStop::Planted(0x4000))
        );
        assert_eq!(decide(&error(0xcc), Mode::Run, 0x4001), Decision::Serve);
        assert_eq!(decide(&error(0x0f), Mode::Run, 0x4000), Decision::Serve);
    }

    #[test]
    fn a_port_write_from_a_planted_address_wherever_rip_is() {
        let exit = |port: u16, count: u32| {
            Exit::Pio(PioExit {
                direction: Direction::Write,
                port,
                width: Width::Byte,
                count,
                data_offset: 0x1000,
            })
        };
        let trap = exit(TRAP_PORT.into(), 1);
        for rip in [0x3000, 0x3002] {
            assert_eq!(decide(&trap, Mode::Run, rip), Decision::StopBehindPort(0x3000));
        }
        assert_eq!(decide(&trap, Mode::Run, 0x3001), Decision::Serve);
        assert_eq!(decide(&exit(0x80, 1), Mode::Run, 0x3000), Decision::Serve);
        assert_eq!(
            decide(&exit(TRAP_PORT.into(), 2), Mode::Run, 0x3000),
            Decision::Serve
        );
    }

    #[test]
    fn other_exits_are_served_without_a_look_at_the_registers() {
        for exit in [Exit::Hlt, Exit::Shutdown, Exit::Intr] {
            let decision = watch().decide(&exit, Mode::Step, || panic!("not needed"));
            assert_eq!(decision, Decision::Serve);
        }
    }

    #[test]
    fn kvm_is_told_what_is_needed_and_no_more() {
        let step = watch().control(Mode::Step);
        assert_eq!(
            step.control,
            kvm::KVM_GUESTDBG_ENABLE
                | kvm::KVM_GUESTDBG_USE_SW_BP
                | kvm::KVM_GUESTDBG_SINGLESTEP
                | kvm::KVM_GUESTDBG_BLOCKIRQ
                | kvm::KVM_GUESTDBG_USE_HW_BP
        );
        assert_eq!(step.arch.debugreg[..2], [0x1000, 0x2000]);
        assert_eq!(step.arch.debugreg[7], 0b0101);
        let run = Watch::default().control(Mode::Run);
        assert_eq!(
            run.control,
            kvm::KVM_GUESTDBG_ENABLE | kvm::KVM_GUESTDBG_USE_SW_BP
        );
    }
}
