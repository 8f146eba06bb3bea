//! Whether this host's KVM interprets a guest's kernel mode, which stock kernels cannot do without hardware: `doctor` tells in
//! full, and this is so much of it as every start of a kernel can afford.

use super::cpuid::Topology;
use super::memory::MIN_BYTES;
use super::supervisor::Guest;
use super::vm::Vm;
use crate::boot::entry;
use crate::guests::probes::INT3;
use kvm_ioctls::VcpuExit;
use std::arch::x86_64::__cpuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Whether a stock kernel will most likely stop in an internal error, perhaps after minutes. Never an error: whoever finds
/// nothing out starts as always.
///
/// Where the processor has VMX or SVM it is not tried, and costs nothing; elsewhere KVM is a program, and a small guest shows
/// whether it knows `int3`, which every stock kernel executes while it boots.
pub fn interprets_kernel_mode() -> bool {
    !has_virtualization() && fails_at_int3().unwrap_or(false)
}

/// [SDM 3C §24.6, APM 3 §E.3: CPUID]
fn has_virtualization() -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let extended = __cpuid(0x8000_0000).eax >= 0x8000_0001;
    __cpuid(1).ecx & VMX != 0 || extended && __cpuid(0x8000_0001).ecx & SVM != 0
}

/// `None`: not to be found out.
fn fails_at_int3() -> Option<bool> {
    let Guest::Image { bytes, at, entry } = INT3.guest() else {
        return None;
    };
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MIN_BYTES as usize)]).ok()?;
    memory.write_slice(bytes, GuestAddress(at)).ok()?;
    entry::write_tables(&memory, &entry).ok()?;
    let vm = Vm::new(memory, 1, false).ok()?;
    let mut vcpu = vm.vcpu(0, &Topology::flat(1)).ok()?;
    vm.enter_at(&vcpu, &entry).ok()?;
    // It has no loop without an exit: whatever becomes of it is one.
    Some(matches!(vcpu.run(), Ok(VcpuExit::InternalError)))
}
