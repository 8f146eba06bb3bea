//! KVM's paravirtual clock, at the moment when guest time goes on.
//!
//! The clock is a page of the guest's for each vCPU: a time, and the TSC at that time. KVM writes it when the vCPU is about
//! to enter the guest, if something has changed (`KVM_REQ_CLOCK_UPDATE`); after a pause KVM_SET_CLOCK has. But Linux's vDSO
//! reads the page of the boot processor on every processor. So whoever enters the guest before the boot processor has done
//! so would read a clock that counts the pause in, and see it go back when the boot processor comes at last, which may be
//! long after if it is halted. (By system calls a processor reads its own page, and sees nothing.) Hence the boot processor
//! takes in the new time first, here, and the others go on when it has.
//!
//! There is no ioctl for that: it is what KVM_RUN does before it enters the guest. So KVM_RUN is called with a signal
//! pending, which it lets through (KVM_SET_SIGNAL_MASK) and this thread does not: KVM serves its requests, sees the signal,
//! and returns without an instruction of the guest's done. (`immediate_exit` would make it return before.) A halted
//! processor has its halt taken away for that long, as KVM does not come so far with one that may not run; an interrupt
//! that has come meanwhile ends the halt for good, as it would have.

use super::kick::kick_signals;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVMIO, Msrs, kvm_mp_state, kvm_msr_entry, kvm_signal_mask,
};
use kvm_ioctls::VcpuFd;
use std::os::fd::AsRawFd;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_SYSTEM_TIME: where the page is. Bit 0: it is there. [KVM msr]
const PAGE: [u32; 2] = [0x4b56_4d01, 0x12];

/// KVM_SET_SIGNAL_MASK's argument, of the size of the kernel's own set of signals.
#[repr(C)]
struct Mask {
    length: u32,
    signals: [u8; KERNEL_SIGSET_BYTES],
}
const KERNEL_SIGSET_BYTES: usize = 8;

/// Makes KVM write the page of this vCPU, if the guest has one, before the guest runs. On the vCPU's own thread. `false`:
/// the host refuses, or there is no such page.
pub fn take_time(vcpu: &mut VcpuFd) -> bool {
    if !has_page(vcpu) {
        return false;
    }
    let Ok(before) = vcpu.get_mp_state() else {
        return false;
    };
    let is = |mp_state| kvm_mp_state { mp_state };
    match before.mp_state {
        KVM_MP_STATE_RUNNABLE => run_nothing(vcpu),
        KVM_MP_STATE_HALTED => {
            if vcpu.set_mp_state(is(KVM_MP_STATE_RUNNABLE)).is_err() {
                return false;
            }
            let done = run_nothing(vcpu);
            // Whoever halted and has taken an interrupt is awake: KVM would not look at it again.
            let events = vcpu.get_vcpu_events();
            let awake = events.is_ok_and(|events| {
                let taken = [
                    events.interrupt.injected,
                    events.nmi.injected,
                    events.nmi.pending,
                    events.exception.injected,
                ];
                taken.iter().any(|taken| *taken != 0)
            });
            awake || vcpu.set_mp_state(before).is_ok() && done
        }
        // It has not been started, so it reads no clock.
        _ => false,
    }
}

fn has_page(vcpu: &VcpuFd) -> bool {
    PAGE.into_iter().any(|index| {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let Ok(mut msrs) = Msrs::from_entries(&[entry]) else {
            return false;
        };
        matches!(vcpu.get_msrs(&mut msrs), Ok(1)) && msrs.as_slice()[0].data & 1 != 0
    })
}

/// KVM_RUN as far as to the guest's door.
fn run_nothing(vcpu: &mut VcpuFd) -> bool {
    let Some(signal) = PendingSignal::new() else {
        return false;
    };
    // A kick from before would make it return too early. The handler, which would set this again, is held off.
    vcpu.set_kvm_immediate_exit(0);
    if !set_mask(vcpu, Some(&signal.outside)) {
        return false;
    }
    let interrupted = matches!(vcpu.run(), Err(error) if error.errno() == libc::EINTR);
    set_mask(vcpu, None) && interrupted
}

/// What is blocked while KVM_RUN runs; `None`: what is blocked anyway.
fn set_mask(vcpu: &VcpuFd, mask: Option<&libc::sigset_t>) -> bool {
    let mask = mask.map(|set| {
        let mut signals = [0; KERNEL_SIGSET_BYTES];
        // SAFETY: the C library's set is longer than the kernel's, begins with it, and consists of plain bits.
        unsafe {
            std::ptr::copy_nonoverlapping(
                std::ptr::from_ref(set).cast(),
                signals.as_mut_ptr(),
                signals.len(),
            );
        }
        Mask {
            length: KERNEL_SIGSET_BYTES as u32,
            signals,
        }
    });
    let argument = mask.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: KVM reads `length` and so many bytes behind it, or nothing of a null pointer. [KVM api: KVM_SET_SIGNAL_MASK]
    unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK() as _, argument) == 0 }
}

/// A kick's signal that is pending for this thread and held off, until this is dropped.
struct PendingSignal {
    ours: libc::sigset_t,
    /// What was blocked before.
    outside: libc::sigset_t,
}

impl PendingSignal {
    fn new() -> Option<PendingSignal> {
        // SAFETY: all-zero sets are overwritten by the calls, which get pointers to nothing else.
        let held = unsafe {
            let (mut ours, mut outside) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigemptyset(&mut ours);
            for signal in kick_signals() {
                libc::sigaddset(&mut ours, signal);
            }
            if libc::pthread_sigmask(libc::SIG_BLOCK, &ours, &mut outside) != 0 {
                return None;
            }
            PendingSignal { ours, outside }
        };
        // The second, if the queue of the first is full: see `kick.rs`.
        let sent = kick_signals().into_iter().any(|signal| {
            // SAFETY: numbers only, and this thread exists.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) == 0 }
        });
        sent.then_some(held)
    }
}

impl Drop for PendingSignal {
    fn drop(&mut self) {
        let none = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: sets that were filled in; nothing is written. One that is left, because a kick came too, costs an empty
        // run.
        unsafe {
            libc::sigtimedwait(&self.ours, std::ptr::null_mut(), &none);
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.outside, std::ptr::null_mut());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::EntryPoint;
    use crate::boot::entry;
    use crate::guests::{LOAD_ADDRESS, image};
    use crate::machine::cpuid::Topology;
    use crate::machine::memory::{self, Backing, MIN_BYTES, MemoryConfig};
    use crate::machine::platform::Platform;
    use crate::machine::vm::Vm;
    use crate::vcpu::kick;
    use std::time::Duration;
    use vm_memory::{Bytes, GuestAddress};

    /// Where the guest counts, and where its clock's page is: a version, and at 16 the time in nanoseconds. [KVM msr]
    const COUNT: GuestAddress = GuestAddress(0x8000);
    const CLOCK: u64 = 0x9000;

    image! {
        /// Tells once that it is there, then counts.
        fn counting = "actor_vmm_guest_clock_counting";
        ".code64",
        "out 0xf4, al",
        "2: inc qword ptr [0x8000]",
        "jmp 2b"
    }

    #[test]
    fn the_clock_is_taken_without_an_instruction_of_the_guests_whether_it_runs_or_halts() {
        if crate::machine::vm::open().is_err() {
            assert!(std::env::var_os("CI").is_none(), "there is no /dev/kvm");
            eprintln!("SKIPPED: no /dev/kvm");
            return;
        }
        kick::install_handler().unwrap();
        let memory = memory::create(&MemoryConfig {
            size_bytes: MIN_BYTES,
            backing: Backing::Anonymous,
        })
        .unwrap();
        let at = EntryPoint::Flat64 { rip: LOAD_ADDRESS };
        memory
            .write_slice(counting(), GuestAddress(LOAD_ADDRESS))
            .unwrap();
        entry::write_tables(&memory, &at).unwrap();
        let vm = Vm::new(memory.clone(), 1, true).unwrap();
        let mut vcpu = vm.vcpu(0, &Topology::flat(1)).unwrap();
        vm.enter_at(&vcpu, &at).unwrap();
        assert!(!take_time(&mut vcpu), "there is no page yet");
        let page = [kvm_msr_entry {
            index: PAGE[0],
            data: CLOCK | 1,
            ..Default::default()
        }];
        if !matches!(vcpu.set_msrs(&Msrs::from_entries(&page).unwrap()), Ok(1)) {
            eprintln!("SKIPPED: this KVM has no such clock");
            return;
        }
        vcpu.run().unwrap();
        let seen = || -> (u32, u64) {
            let version = memory.read_obj(GuestAddress(CLOCK)).unwrap();
            (version, memory.read_obj(GuestAddress(CLOCK + 16)).unwrap())
        };
        let mut platform = vm.platform(move |_| Ok(at)).unwrap();
        for halted in [false, true, false] {
            if halted {
                vcpu.set_mp_state(kvm_mp_state {
                    mp_state: KVM_MP_STATE_HALTED,
                })
                .unwrap();
            }
            platform.freeze();
            platform.thaw(Duration::ZERO);
            let before = seen();
            // A kick from before does not make it return too early.
            vcpu.set_kvm_immediate_exit(1);
            assert!(take_time(&mut vcpu));
            let after = seen();
            assert!(after.0 != before.0 && after.1 >= before.1, "{before:?} {after:?}");
            assert_eq!(memory.read_obj::<u64>(COUNT).unwrap(), 0, "the guest ran");
            let state = vcpu.get_mp_state().unwrap().mp_state;
            assert_eq!(state == KVM_MP_STATE_HALTED, halted);
            // Nothing is left of the signal.
            assert_eq!(vcpu.get_kvm_run().immediate_exit, 0);
            vcpu.set_mp_state(kvm_mp_state {
                mp_state: KVM_MP_STATE_RUNNABLE,
            })
            .unwrap();
        }
    }
}
