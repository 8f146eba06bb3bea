//! Which kinds of breakpoints this host honours: tried, not asked. Flags of KVM say only what it would like to do; where
//! a guest's mode is interpreted, or a processor is emulated, some of it never fires, or the guest gets the exception.
//!
//! A VM of its own, thrown away afterwards, with a vCPU for each trial. It is the real vCPU actor, armed by a real
//! [`DebugRequest`]: what works here works later. A trial that is not stopped as it should runs into `ud2`, for which
//! there is no handler: a triple fault; or, in real mode, where a KVM may take the empty table at 0 for handlers, into a
//! trap there.

use super::breakpoints::{Abilities, GuestMode, Mechanisms};
use crate::actors::Lifecycle;
use crate::boot::entry;
use crate::boot::{EntryPoint, layout};
use crate::clock::Clock;
use crate::guests::LOAD_ADDRESS;
use crate::machine::cpuid::Topology;
use crate::machine::vm::{self, Vm, VmError};
use crate::vcpu::backend::Backend;
use crate::vcpu::debug::{Arming, DebugRequest, DebugStop, Mode, TRAP_PORT, Watch};
use crate::vcpu::route::RoutingTable;
use crate::vcpu::{Vcpu, VcpuEvent, VcpuHandle, VcpuMessage, kick, vcpu_mailbox};
use crossbeam_channel::{Receiver, bounded};
use kvm_bindings as kvm;
use kvm_ioctls::VcpuFd;
use slog::{Discard, Logger, o};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// How long a trial of a few instructions may take before it counts as hung.
const LIMIT: Duration = Duration::from_secs(2);
const MEMORY_BYTES: usize = 2 << 20;
/// What the code stores to.
const DATA: u64 = 0x3000;

/// Of 16 as of 64 bits: `nop; nop; nop; mov [bx], ax` (or `[rdi], eax`) `; ud2`, `nop; int3; ud2`, and
/// `nop; out TRAP_PORT, al; ud2`.
const CODE: &[u8] = &[
    0x90, 0x90, 0x90, 0x89, 0x07, 0x0f, 0x0b, //
    0x90, 0xcc, 0x0f, 0x0b, //
    0x90, 0xe6, TRAP_PORT, 0x0f, 0x0b,
];
const BEHIND_STORE: u64 = 5;
const INT3: u64 = 7;
const OUT: u64 = 11;
/// Where real mode's empty interrupt table leads, and the trap there.
const NO_HANDLER: u64 = 0;
const TRAP: &[u8] = &[0xe6, TRAP_PORT];
/// Where it is for real mode: at the start of a segment.
const REAL_ADDRESS: u64 = 0x1_0000;

/// One thing to be tried.
struct Trial {
    start: u64,
    watch: Watch,
    mode: Mode,
    /// How it is to stop, and where, one after the other.
    stops: Vec<(DebugStop, u64)>,
}

/// What a trial tells about.
type Ability = fn(&mut Mechanisms) -> &mut bool;

/// All of them, for code at `base`, with what each tells about.
fn trials(base: u64, hold_interrupts: bool) -> Vec<(Ability, Trial)> {
    let plain = Watch {
        hold_interrupts,
        planted: Arc::from([NO_HANDLER]),
        ..Watch::default()
    };
    let planted = |linear: u64| Watch {
        planted: Arc::from([NO_HANDLER, linear]),
        ..plain.clone()
    };
    let register = |linear: u64, conditions: u64| Watch {
        addresses: [linear, 0, 0, 0],
        // DR0 globally, and bit 10, which is always 1 [SDM 3B §18.2.4].
        dr7: 1 << 10 | 0b10 | conditions << 16,
        ..plain.clone()
    };
    let run = |start, watch, stop, rip| Trial {
        start: base + start,
        watch,
        mode: Mode::Run,
        stops: vec![(stop, rip)],
    };
    let step = Trial {
        start: base,
        watch: plain.clone(),
        mode: Mode::Step,
        stops: vec![(DebugStop::Stepped, base + 1), (DebugStop::Stepped, base + 2)],
    };
    let (hit, nop, store) = (DebugStop::Hardware(1), base + 1, base + BEHIND_STORE);
    let (int3, out) = (base + INT3 + 1, base + OUT + 1);
    vec![
        (|m| &mut m.step, step),
        (|m| &mut m.hardware, run(0, register(nop, 0), hit, nop)),
        // Stores to two bytes.
        (|m| &mut m.watch, run(0, register(DATA, 0b0101), hit, store)),
        (
            |m| &mut m.int3,
            run(INT3, planted(int3), DebugStop::Planted(int3), int3),
        ),
        (
            |m| &mut m.port,
            run(OUT, planted(out), DebugStop::Planted(out), out),
        ),
    ]
}

/// Finds out.
///
/// # Errors
/// See [`VmError`]: not even a VM can be made.
pub fn abilities() -> Result<Abilities, VmError> {
    let offered = vm::open()?.check_extension_raw(kvm::KVM_CAP_SET_GUEST_DEBUG2.into());
    let hold_interrupts = offered > 0 && offered as u32 & kvm::KVM_GUESTDBG_BLOCKIRQ != 0;
    let mut abilities = Abilities {
        hold_interrupts,
        ..Abilities::default()
    };
    let modes = [GuestMode::Kernel, GuestMode::User, GuestMode::Real];
    let vcpus = modes.len() * trials(0, hold_interrupts).len();
    let Ok(memory) = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]) else {
        return Ok(abilities);
    };
    if kick::install_handler().is_err() || !prepare(&memory) {
        return Ok(abilities);
    }
    let vm = Vm::new(memory, vcpus, false)?;
    let topology = Topology::flat(vcpus as u32);
    let mut index = 0;
    for mode in modes {
        let (base, mechanisms) = match mode {
            GuestMode::Real => (REAL_ADDRESS, &mut abilities.real),
            GuestMode::Kernel => (LOAD_ADDRESS, &mut abilities.kernel),
            GuestMode::User => (LOAD_ADDRESS, &mut abilities.user),
        };
        for (ability, trial) in trials(base, hold_interrupts) {
            // A port write of user mode hangs on the guest's own permissions, which change.
            if mode == GuestMode::User && trial.start == base + OUT {
                continue;
            }
            let fd = vm.vcpu(index, &topology)?;
            *ability(mechanisms) =
                enter(&vm, &fd, mode, trial.start)? && try_one(index, vm.backend(fd), &trial);
            index += 1;
        }
    }
    Ok(abilities)
}

/// Puts a vCPU before its first instruction. `false`: the host does not take the registers.
fn enter(vm: &Vm, fd: &VcpuFd, mode: GuestMode, start: u64) -> Result<bool, VmError> {
    let entry = match mode {
        GuestMode::Real => EntryPoint::RealMode {
            cs: (REAL_ADDRESS >> 4) as u16,
            ip: (start - REAL_ADDRESS) as u16,
        },
        GuestMode::Kernel | GuestMode::User => EntryPoint::Flat64 { rip: start },
    };
    vm.enter_at(fd, &entry)?;
    let adapt = || -> Result<(), kvm_ioctls::Error> {
        let mut regs = fd.get_regs()?;
        (regs.rbx, regs.rdi) = (DATA, DATA);
        fd.set_regs(&regs)?;
        let mut sregs = fd.get_sregs()?;
        // No handlers in real mode either.
        sregs.idt = kvm::kvm_dtable::default();
        if mode == GuestMode::User {
            make_user(&mut sregs);
        }
        fd.set_sregs(&sregs)
    };
    Ok(adapt().is_ok())
}

/// Code, and page tables that let user mode at everything.
fn prepare(memory: &GuestMemoryMmap) -> bool {
    const USER: u64 = 1 << 2;
    let entry = EntryPoint::Flat64 { rip: LOAD_ADDRESS };
    let open = |address: u64| {
        let address = GuestAddress(address);
        let entry: Result<u64, _> = memory.read_obj(address);
        entry.and_then(|entry| memory.write_obj(entry | USER, address))
    };
    [LOAD_ADDRESS, REAL_ADDRESS]
        .into_iter()
        .all(|address| memory.write_slice(CODE, GuestAddress(address)).is_ok())
        && memory.write_slice(TRAP, GuestAddress(NO_HANDLER)).is_ok()
        && entry::write_tables(memory, &entry).is_ok()
        // The first 2 MiB, which is all there is.
        && [layout::PML4, layout::PDPT, layout::PAGE_DIRECTORIES]
            .into_iter()
            .all(|entry| open(entry).is_ok())
}

fn make_user(sregs: &mut kvm::kvm_sregs) {
    sregs.cs.dpl = 3;
    sregs.cs.selector |= 3;
    for segment in [
        &mut sregs.ss,
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        segment.dpl = 3;
        segment.selector |= 3;
    }
}

/// Runs one vCPU as the machine would. Whether it is stopped as it should.
fn try_one(index: usize, backend: impl Backend + Send + 'static, trial: &Trial) -> bool {
    let (handle, inbox) = vcpu_mailbox();
    let (tell, news) = bounded(16);
    let bus = RoutingTable::new(Clock::new(), Logger::root(Discard, o!()));
    let sink = Box::new(move |what| drop(tell.try_send(what)));
    let vcpu = Vcpu::new(index, backend, bus, inbox, sink);
    let Ok(thread) = crate::thread::spawn(format!("probe{index}"), move || vcpu.run()) else {
        return false;
    };
    let works = stops_as_it_should(&handle, &news, trial);
    handle.send(VcpuMessage::Stop);
    // A thread that does not end hangs in a broken KVM, and is left behind.
    while let Ok(what) = news.recv_timeout(LIMIT) {
        if let VcpuEvent::Stopped(_) = what.what {
            let _ = thread.join();
            break;
        }
    }
    works
}

fn stops_as_it_should(handle: &VcpuHandle, news: &Receiver<crate::vcpu::VcpuNews>, trial: &Trial) -> bool {
    let next = || news.recv_timeout(LIMIT).ok().map(|news| news.what);
    if !matches!(next(), Some(VcpuEvent::Ready)) {
        return false;
    }
    trial.stops.iter().all(|(stop, rip)| {
        let arming = Arming {
            mode: trial.mode,
            watch: Some(trial.watch.clone()),
        };
        let (answer, armed) = bounded(1);
        handle.send(VcpuMessage::Debug(DebugRequest::Arm(arming, answer)));
        if !matches!(armed.recv_timeout(LIMIT), Ok(Ok(()))) {
            return false;
        }
        handle.send(VcpuMessage::Lifecycle(Lifecycle::Resume));
        if !matches!(next(), Some(VcpuEvent::Debug(seen)) if seen == *stop) {
            return false;
        }
        let (answer, state) = bounded(1);
        handle.send(VcpuMessage::Debug(DebugRequest::Read(answer)));
        matches!(state.recv_timeout(LIMIT), Ok(Some(cpu)) if cpu.linear_rip() == *rip)
    })
}

impl Abilities {
    /// What a person at gdb should know, if there is anything.
    pub fn caveats(&self) -> Vec<String> {
        let modes = [
            ("kernel", &self.kernel),
            ("user", &self.user),
            ("real", &self.real),
        ];
        let lacks = |has: fn(&Mechanisms) -> bool| {
            let lacking: Vec<&str> = modes
                .iter()
                .filter(|(_, mechanisms)| !has(mechanisms))
                .map(|(mode, _)| *mode)
                .collect();
            let (last, others) = lacking.split_last()?;
            Some(match others {
                [] => last.to_string(),
                others => format!("{} and {last}", others.join(", ")),
            })
        };
        let mut caveats = Vec::new();
        for (what, has) in [
            (
                "software breakpoints",
                (|m| m.int3 || m.hardware || m.port) as fn(&Mechanisms) -> bool,
            ),
            ("hardware breakpoints", |m| m.hardware),
            ("hardware watchpoints", |m| m.watch),
            ("single steps", |m| m.step),
        ] {
            if let Some(mode) = lacks(has) {
                caveats.push(format!("{what} do not work in the guest's {mode} mode"));
            }
        }
        if !self.has_watch() && self.kernel.step {
            caveats.push("gdb watches data by steps, slowly, after `set can-use-hw-watchpoints 0`".into());
        }
        if !self.kernel.int3 && self.kernel.port {
            let what = "software breakpoints take two bytes: one before a jump's target may hide it";
            caveats.push(if self.kernel.hardware {
                format!("from the fifth on, {what}")
            } else {
                what.into()
            });
        }
        caveats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_can_everything_needs_no_words() {
        let all = Mechanisms {
            step: true,
            hardware: true,
            watch: true,
            int3: true,
            port: true,
        };
        let mut abilities = Abilities {
            kernel: all,
            user: Mechanisms { port: false, ..all },
            real: all,
            hold_interrupts: true,
        };
        assert_eq!(abilities.caveats(), Vec::<String>::new());
        abilities.user.step = false;
        abilities.user.watch = false;
        assert_eq!(
            abilities.caveats(),
            [
                "hardware watchpoints do not work in the guest's user mode",
                "single steps do not work in the guest's user mode"
            ]
        );
        let bare = Abilities {
            kernel: Mechanisms {
                port: true,
                step: true,
                ..Mechanisms::default()
            },
            ..Abilities::default()
        };
        assert_eq!(
            bare.caveats(),
            [
                "software breakpoints do not work in the guest's user and real mode",
                "hardware breakpoints do not work in the guest's kernel, user and real mode",
                "hardware watchpoints do not work in the guest's kernel, user and real mode",
                "single steps do not work in the guest's user and real mode",
                "gdb watches data by steps, slowly, after `set can-use-hw-watchpoints 0`",
                "software breakpoints take two bytes: one before a jump's target may hide it",
            ]
        );
    }
}
