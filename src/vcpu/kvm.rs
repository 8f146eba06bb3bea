//! The KVM backend: one vCPU's descriptor, its `kvm_run` mapping, and nothing that anybody else could touch.

use super::backend::{Backend, ResetError, RunError};
use super::exit::{Exit, decode};
use super::power_on::PowerOn;
use super::registers::Registers;
use crate::boot::EntryPoint;
use crate::boot::entry;
use kvm_bindings::{KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What KVM_CAP_SYNC_REGS must offer for registers to be taken from the mapping.
const SYNC: u64 = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS) as u64;

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
}
