//! `actor-vmm doctor`: what this host's KVM can and cannot do, in words that a user can act on.
//!
//! It does not believe flags alone: it runs small guests, and looks what becomes of them.

use super::stdout::Stdout;
use crate::gdb::breakpoints::Mechanisms;
use crate::gdb::probe;
use crate::guests::probes::{INSTRUCTIONS, NOTHING, Probe};
use crate::machine::outcome::{Outcome, status};
use crate::machine::supervisor::{self, MachineConfig};
use crate::machine::vm;
use crate::vcpu::Cause;
use crate::vcpu::exit::Exit;
use kvm_ioctls::Cap;
use slog::{Discard, Logger, o};
use std::time::Duration;

/// How long a probe of a few instructions may take before it counts as hung.
const PROBE_LIMIT: Duration = Duration::from_secs(3);

/// What became of a probe.
enum Verdict {
    Works,
    /// KVM interprets the guest and does not know the instruction.
    Unknown,
    Fails(String),
    /// The user has had enough.
    Interrupted(u8),
}

fn try_probe(probe: &Probe) -> Verdict {
    let config = MachineConfig {
        timeout: Some(PROBE_LIMIT),
        ..MachineConfig::bare(probe.guest(), 1)
    };
    match supervisor::run(&config, &Logger::root(Discard, o!())) {
        Ok(Outcome::GuestExit(1)) => Verdict::Works,
        Ok(Outcome::InternalError(diagnosis)) => match &diagnosis.cause {
            Cause::Exit(Exit::InternalError(error)) if error.suberror == 1 => Verdict::Unknown,
            Cause::Exit(exit) => Verdict::Fails(exit.to_string()),
            Cause::Run(errno) => Verdict::Fails(format!("KVM_RUN: {}", errno.desc())),
            Cause::Panic(text) => Verdict::Fails(text.clone()),
        },
        Ok(outcome @ Outcome::Signal(_)) => Verdict::Interrupted(outcome.status()),
        Ok(Outcome::TimedOut(_)) => Verdict::Fails("the guest hangs in it".into()),
        Ok(outcome) => Verdict::Fails(outcome.to_string()),
        Err(error) => Verdict::Fails(super::chain(&error)),
    }
}

/// Runs all checks and prints what they found. Returns the exit status: 0 if stock kernels can run here.
///
/// A reader that leaves early changes nothing; see [`super::stdout`].
pub fn run() -> u8 {
    let mut stdout = Stdout::default();
    let status = check(&mut stdout);
    stdout.status(status)
}

fn check(stdout: &mut Stdout) -> u8 {
    macro_rules! println {
        ($($text:tt)*) => {
            stdout.print(&format!("{}\n", format_args!($($text)*)))
        };
    }
    let kvm = match vm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("/dev/kvm        {error}");
            println!("\nThis host cannot run virtual machines as it is.");
            return status::HOST_TROUBLE;
        }
    };
    println!("/dev/kvm        opens; API version {}", kvm.get_api_version());
    println!(
        "vCPUs           up to {} a machine, {} recommended",
        kvm.get_max_vcpus(),
        kvm.get_nr_vcpus()
    );
    let mut missing = Vec::new();
    for (cap, name, needed, what) in [
        (
            Cap::Irqchip,
            "KVM_CAP_IRQCHIP",
            true,
            "interrupt controllers in the kernel",
        ),
        (Cap::Irqfd, "KVM_CAP_IRQFD", true, "interrupts by eventfd"),
        (
            Cap::Ioeventfd,
            "KVM_CAP_IOEVENTFD",
            false,
            "notifications by eventfd",
        ),
        (
            Cap::ImmediateExit,
            "KVM_CAP_IMMEDIATE_EXIT",
            true,
            "kicks that cannot be lost",
        ),
        (
            Cap::SyncRegs,
            "KVM_CAP_SYNC_REGS",
            false,
            "registers without a system call",
        ),
        (
            Cap::TscDeadlineTimer,
            "KVM_CAP_TSC_DEADLINE_TIMER",
            false,
            "timer interrupts without calibration",
        ),
        (
            Cap::SetGuestDebug,
            "KVM_CAP_SET_GUEST_DEBUG",
            false,
            "breakpoints",
        ),
    ] {
        let there = kvm.check_extension(cap);
        let word = if there { "yes" } else { "no" };
        println!("{name:<27} {word:<4} {what}");
        if needed && !there {
            missing.push(name);
        }
    }
    if !missing.is_empty() {
        println!(
            "\nThis host's KVM lacks {}: actor-vmm cannot run here. A newer kernel has them.",
            missing.join(", ")
        );
        return status::HOST_TROUBLE;
    }
    match try_probe(&NOTHING) {
        Verdict::Works => println!("{:<27} yes", NOTHING.name),
        Verdict::Interrupted(status) => return status,
        Verdict::Unknown | Verdict::Fails(_) => {
            println!("{:<27} no", NOTHING.name);
            println!("\nNot even the smallest guest runs here; see the host's kernel log (dmesg).");
            return status::HOST_TROUBLE;
        }
    }
    let (mut unknown, mut failed) = (Vec::new(), Vec::new());
    for probe in INSTRUCTIONS.iter().filter(|probe| (probe.offered)()) {
        let (name, why) = (probe.name, probe.needed_for);
        match try_probe(probe) {
            Verdict::Works => println!("{name:<27} yes  in ring 0, for {why}"),
            Verdict::Unknown => {
                println!("{name:<27} no   in ring 0, for {why}: KVM cannot emulate it");
                unknown.push(name);
            }
            Verdict::Fails(how) => {
                println!("{name:<27} no   in ring 0, for {why}: {how}");
                failed.push(name);
            }
            Verdict::Interrupted(status) => return status,
        }
    }
    match probe::abilities() {
        Ok(abilities) => {
            // A line for each kind, not for each mode of the guest: the same instructions are probed above for other reasons.
            type Kind = fn(&Mechanisms) -> bool;
            let kinds: [(&str, Kind, &str); 5] = [
                ("gdb: int3", |m| m.int3, "software breakpoints"),
                ("gdb: port trap", |m| m.port, "the same where int3 does not work"),
                (
                    "gdb: debug register, code",
                    |m| m.hardware,
                    "hardware breakpoints",
                ),
                ("gdb: debug register, data", |m| m.watch, "watchpoints"),
                ("gdb: single step", |m| m.step, "stepi"),
            ];
            let modes = [
                ("kernel", abilities.kernel),
                ("user", abilities.user),
                ("real", abilities.real),
            ];
            for (name, works, what) in kinds {
                let (there, lacking): (Vec<_>, Vec<_>) = modes.iter().partition(|(_, m)| works(m));
                let names = |modes: Vec<&(&'static str, Mechanisms)>| {
                    let names: Vec<_> = modes.iter().map(|(name, _)| *name).collect();
                    names.join(", ")
                };
                match (there.is_empty(), lacking.is_empty()) {
                    (_, true) => println!("{name:<27} yes  {what}"),
                    (true, _) => println!("{name:<27} no   {what}"),
                    _ => println!(
                        "{name:<27} yes  {what} in {} mode; not in {} mode",
                        names(there),
                        names(lacking)
                    ),
                }
            }
        }
        Err(error) => println!("{:<27} no   {}", "gdb", super::chain(&error)),
    }
    if !failed.is_empty() {
        println!(
            "\nSomething is wrong with this host's KVM: {} should work on its processor. See its kernel log (dmesg);\n\
             stock Linux kernels are not to be relied on here.",
            failed.join(", ")
        );
        return status::HOST_TROUBLE;
    }
    if unknown.is_empty() {
        println!("\nThis host can run stock Linux kernels.");
        return 0;
    }
    println!(
        "\nThis is a software KVM: it interprets a guest's kernel mode, and does not know {}.\n\
         Stock Linux kernels cannot boot here; bare-metal guests that do without can (try `actor-vmm run --demo`).\n\
         To run stock kernels, use a host whose processor has VMX or SVM, or emulate one (`cargo xtask boot` in the\n\
         source tree does).",
        unknown.join(", ")
    );
    status::HOST_TROUBLE
}
