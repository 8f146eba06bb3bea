//! A vCPU's state after power-on: taken once, before the vCPU first runs, and put back at each reset by the vCPU's own
//! thread.
//!
//! Everything that KVM lets be read is taken rather than written down here from the SDM: what KVM itself makes a new
//! vCPU be, with this machine's CPUID, is what a reset must give. [SDM 3A table 10-1 says what that should be]

use super::backend::ResetError;
use kvm_bindings as kvm;
use kvm_ioctls::VcpuFd;

/// IA32_TIME_STAMP_COUNTER [SDM 4]. A host that writes 0 there starts all vCPUs of a VM together. [KVM: kvm_synchronize_tsc]
const MSR_TSC: u32 = 0x10;
/// Hyper-V's MSRs, which our CPUID does not offer: reading some of them has effects of its own.
const HYPER_V_MSRS: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_ffff;

/// Everything that KVM tells about a vCPU. What a host does not know is `None`, and stays as it is at a reset.
pub struct PowerOn {
    regs: kvm::kvm_regs,
    sregs: kvm::kvm_sregs,
    xcrs: Option<kvm::kvm_xcrs>,
    xsave: Option<Box<kvm::kvm_xsave>>,
    lapic: Option<Box<kvm::kvm_lapic_state>>,
    msrs: Vec<kvm::kvm_msr_entry>,
    debug: Option<kvm::kvm_debugregs>,
    events: Option<kvm::kvm_vcpu_events>,
    mp_state: Option<kvm::kvm_mp_state>,
}

impl PowerOn {
    /// Takes the state of a vCPU that has not run. `msrs`: those that the host knows; those that cannot be read are
    /// left out.
    ///
    /// # Errors
    /// When not even the registers can be read.
    pub fn take(fd: &VcpuFd, msrs: &[u32]) -> Result<PowerOn, kvm_ioctls::Error> {
        Ok(PowerOn {
            regs: fd.get_regs()?,
            sregs: fd.get_sregs()?,
            // A host without XSAVE tells of none, and refuses to set none. [KVM api: KVM_GET_XCRS]
            xcrs: fd.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs > 0),
            xsave: fd.get_xsave().ok().map(Box::new),
            lapic: fd.get_lapic().ok().map(Box::new),
            msrs: read_msrs(fd, msrs),
            debug: fd.get_debug_regs().ok(),
            events: fd.get_vcpu_events().ok(),
            mp_state: fd.get_mp_state().ok(),
        })
    }

    /// Puts it back. The order is the one in which each part's side effects are undone by a later one: the APIC's
    /// mode before its registers, its timer before the deadline in an MSR, events and the MP state last.
    ///
    /// # Errors
    /// [`ResetError`] names the ioctl.
    pub fn put_back(&self, fd: &VcpuFd) -> Result<(), ResetError> {
        let failed = |what: &'static str| move |source| ResetError { what, source };
        fd.set_sregs(&self.sregs).map_err(failed("KVM_SET_SREGS"))?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        if let Some(xsave) = &self.xsave {
            // SAFETY: KVM reads as many bytes as its XSAVE2 extension says, which is more than the structure's 4096
            // only for a process that has asked for dynamic features (AMX) by arch_prctl; this one never does.
            unsafe { fd.set_xsave(xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        }
        fd.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        if let Some(lapic) = &self.lapic {
            fd.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC"))?;
        }
        write_msrs(fd, &self.msrs)?;
        if let Some(debug) = &self.debug {
            fd.set_debug_regs(debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
        }
        if let Some(mut events) = self.events {
            // "Nothing pending" counts too, latched INITs and SMM included. [KVM api: KVM_SET_VCPU_EVENTS]
            events.flags |= kvm::KVM_VCPUEVENT_VALID_NMI_PENDING
                | kvm::KVM_VCPUEVENT_VALID_SIPI_VECTOR
                | kvm::KVM_VCPUEVENT_VALID_SHADOW
                | kvm::KVM_VCPUEVENT_VALID_SMM;
            // A host without SMM refuses its flag.
            if fd.set_vcpu_events(&events).is_err() {
                events.flags &= !kvm::KVM_VCPUEVENT_VALID_SMM;
                fd.set_vcpu_events(&events)
                    .map_err(failed("KVM_SET_VCPU_EVENTS"))?;
            }
        }
        if let Some(mp_state) = self.mp_state {
            fd.set_mp_state(mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        }
        Ok(())
    }
}

/// Which of the host's MSRs are taken.
pub fn wanted_msrs(all: &[u32]) -> Vec<u32> {
    let wanted = all.iter().filter(|index| !HYPER_V_MSRS.contains(*index));
    wanted.copied().collect()
}

/// Reads what can be read. KVM stops at the first MSR that it does not know; that one is left out.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Vec<kvm::kvm_msr_entry> {
    let mut taken = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .take(kvm::KVM_MAX_MSR_ENTRIES)
            .map(|index| kvm::kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let Ok(mut msrs) = kvm::Msrs::from_entries(&entries) else {
            break;
        };
        let read = fd.get_msrs(&mut msrs).unwrap_or(0).min(entries.len());
        taken.extend(msrs.as_slice()[..read].iter().map(|msr| kvm::kvm_msr_entry {
            data: if msr.index == MSR_TSC { 0 } else { msr.data },
            ..*msr
        }));
        let skip = usize::from(read < entries.len());
        rest = &rest[read + skip..];
    }
    taken
}

/// Writes what can be written: some can only be read.
fn write_msrs(fd: &VcpuFd, msrs: &[kvm::kvm_msr_entry]) -> Result<(), ResetError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm::KVM_MAX_MSR_ENTRIES)];
        let Ok(entries) = kvm::Msrs::from_entries(chunk) else {
            break;
        };
        let written = fd.set_msrs(&entries).map_err(|source| ResetError {
            what: "KVM_SET_MSRS",
            source,
        })?;
        let written = written.min(chunk.len());
        let skip = usize::from(written < chunk.len());
        rest = &rest[written + skip..];
    }
    Ok(())
}
