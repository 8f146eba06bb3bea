//! The KVM backend: one vCPU's descriptor, its `kvm_run` mapping, and nothing that anybody else could touch.

use super::backend::{Backend, ResetError, RunError};
use super::debug::{Activity, CpuState};
use super::exit::{AccessExit, Exit, decode, decode_access};
use super::guest_clock;
use super::power_on::PowerOn;
use super::registers::Registers;
use crate::boot::EntryPoint;
use crate::boot::entry;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS, Msrs, kvm_guest_debug, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What KVM_CAP_SYNC_REGS must offer for registers to be taken from the mapping.
const SYNC: u64 = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS) as u64;

/// IA32_KERNEL_GS_BASE. [SDM 4]
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// A vCPU of KVM.
pub struct KvmBackend {
    fd: VcpuFd,
    /// Bytes of the `kvm_run` mapping.
    mapped: usize,
    memory: GuestMemoryMmap,
    sync_regs: bool,
    irqchip: bool,
    power_on: Result<PowerOn, kvm_ioctls::Error>,
}

impl KvmBackend {
    /// Takes a vCPU that was set up. `mapped`: KVM_GET_VCPU_MMAP_SIZE; `sync_regs`: what KVM_CAP_SYNC_REGS says;
    /// `irqchip`: whether the interrupt controllers are in the kernel; `power_on`: its state now.
    pub fn new(
        fd: VcpuFd,
        mapped: usize,
        memory: GuestMemoryMmap,
        sync_regs: i32,
        irqchip: bool,
        power_on: Result<PowerOn, kvm_ioctls::Error>,
    ) -> KvmBackend {
        KvmBackend {
            fd,
            mapped,
            memory,
            sync_regs: sync_regs as u64 & SYNC == SYNC,
            irqchip,
            power_on,
        }
    }

    /// General and special registers in one system call instead of two: a run that may not enter the guest leaves
    /// them in the mapping. It also completes a pending port or memory access, which a stopped vCPU must do anyway.
    /// [KVM api: KVM_CAP_SYNC_REGS]
    fn synced_registers(&mut self) -> Option<Registers> {
        let run = self.fd.get_kvm_run();
        run.kvm_valid_regs = SYNC;
        run.immediate_exit = 1;
        let interrupted = matches!(self.fd.run(), Err(error) if error.errno() == libc::EINTR);
        let run = self.fd.get_kvm_run();
        run.immediate_exit = 0;
        run.kvm_valid_regs = 0;
        if !interrupted {
            return None;
        }
        let regs = self.fd.sync_regs();
        Some(Registers {
            general: regs.regs,
            special: regs.sregs,
        })
    }
}

impl Backend for KvmBackend {
    #[inline]
    fn run(&mut self) -> Result<(), RunError> {
        // The crate's own decoding borrows the mapping and drops fields (a port access's width); ours is `decode`.
        match self.fd.run() {
            Ok(_) => Ok(()),
            Err(error) => Err(match error.errno() {
                libc::EINTR => RunError::Interrupted,
                libc::EAGAIN => RunError::Again,
                errno => RunError::Failed(Errno::from_raw(errno)),
            }),
        }
    }

    #[inline]
    fn exit(&mut self) -> Exit {
        decode(self.fd.get_kvm_run())
    }

    #[inline]
    fn access(&mut self) -> Option<AccessExit> {
        decode_access(self.fd.get_kvm_run())
    }

    #[inline]
    fn pio_data(&mut self, offset: u64, length: usize) -> Option<&mut [u8]> {
        let offset = usize::try_from(offset).ok()?;
        if offset < size_of::<kvm_bindings::kvm_run>() || offset.checked_add(length)? > self.mapped {
            return None;
        }
        let base: *mut u8 = std::ptr::from_mut(self.fd.get_kvm_run()).cast();
        // SAFETY: the range is inside the mapping (checked) and outside `kvm_run` itself (checked), the mapping
        // lives as long as `fd`, and `&mut self` keeps everyone else, KVM_RUN included, away meanwhile.
        Some(unsafe { std::slice::from_raw_parts_mut(base.add(offset), length) })
    }

    #[inline]
    fn mmio_data(&mut self) -> &mut [u8; 8] {
        // SAFETY: plain bytes inside the mapping; any bits are valid.
        unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio.data }
    }

    fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut self.fd.get_kvm_run().immediate_exit
    }

    fn registers(&mut self) -> Option<Registers> {
        if self.sync_regs
            && let Some(registers) = self.synced_registers()
        {
            return Some(registers);
        }
        Some(Registers {
            general: self.fd.get_regs().ok()?,
            special: self.fd.get_sregs().ok()?,
        })
    }

    fn code_at(&mut self, linear: u64) -> Option<Vec<u8>> {
        let translation = self.fd.translate_gva(linear).ok()?;
        if translation.valid == 0 {
            return None;
        }
        // Not past the end of the page: the next linear page may be anywhere.
        let length = (0x1000 - (linear & 0xfff)).min(16) as usize;
        let mut code = vec![0; length];
        self.memory
            .read_slice(&mut code, GuestAddress(translation.physical_address))
            .ok()?;
        Some(code)
    }

    fn wakes_from_halt(&self) -> bool {
        self.irqchip
    }

    fn paused(&mut self) {
        // Fails where the guest has no such clock, which then has no watchdog that looks at it either.
        // [KVM api: KVM_KVMCLOCK_CTRL]
        let _ = self.fd.kvmclock_ctrl();
    }

    fn take_time(&mut self) {
        // Where it cannot be done, a guest may see its clock go back by a pause.
        let _ = guest_clock::take_time(&mut self.fd);
    }

    fn reset(&mut self, entry: Option<&EntryPoint>) -> Result<(), ResetError> {
        let failed = |what: &'static str| move |source| ResetError { what, source };
        match &self.power_on {
            Ok(state) => state.put_back(&self.fd)?,
            Err(error) => return Err(failed("KVM_GET_REGS")(*error)),
        }
        let Some(entry) = entry else { return Ok(()) };
        // The kernel that is started now may be another file than the one that the machine was started with.
        let base = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        let (regs, sregs) = entry::apply(entry, base);
        self.fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        self.fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
    }

    fn cpu_state(&mut self) -> Option<Box<CpuState>> {
        let activity = match self.fd.get_mp_state() {
            Ok(state) => match state.mp_state {
                KVM_MP_STATE_HALTED => Activity::Halted,
                KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::NotStarted,
                _ => Activity::Running,
            },
            // Without interrupt controllers in the kernel there is no such state.
            Err(_) => Activity::Running,
        };
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
            index: KERNEL_GS_BASE,
            ..Default::default()
        }])
        .ok()?;
        let known = self.fd.get_msrs(&mut msrs).ok()? == 1;
        Some(Box::new(CpuState {
            general: self.fd.get_regs().ok()?,
            special: self.fd.get_sregs().ok()?,
            fpu: self.fd.get_fpu().ok()?,
            kernel_gs_base: if known { msrs.as_slice()[0].data } else { 0 },
            activity,
        }))
    }

    fn set_cpu_state(&mut self, cpu: &CpuState) -> bool {
        let Some(before) = self.cpu_state() else {
            return false;
        };
        // Only what is changed: a host may refuse to set what it told.
        let mut taken = true;
        if cpu.special != before.special {
            taken &= self.fd.set_sregs(&cpu.special).is_ok();
        }
        if cpu.general != before.general {
            taken &= self.fd.set_regs(&cpu.general).is_ok();
        }
        if cpu.fpu != before.fpu {
            taken &= self.fd.set_fpu(&cpu.fpu).is_ok();
        }
        if cpu.kernel_gs_base != before.kernel_gs_base {
            let msrs = Msrs::from_entries(&[kvm_msr_entry {
                index: KERNEL_GS_BASE,
                data: cpu.kernel_gs_base,
                ..Default::default()
            }]);
            taken &= msrs.is_ok_and(|msrs| matches!(self.fd.set_msrs(&msrs), Ok(1)));
        }
        taken
    }

    fn set_debug(&mut self, debug: Option<&kvm_guest_debug>) -> Result<(), Errno> {
        self.fd
            .set_guest_debug(debug.unwrap_or(&kvm_guest_debug::default()))
            .map_err(|error| Errno::from_raw(error.errno()))
    }
}
