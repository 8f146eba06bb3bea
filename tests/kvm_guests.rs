//! Bare-metal guests on this host's KVM: what a guest can do to a machine, and how machines end.
//!
//! Most run the program itself, as a user would, and look at its output and exit status. A host without `/dev/kvm`
//! skips all of it and says so; under CI that is a failure. Limits of time are against hangs only.

#[path = "host/kvm.rs"]
mod kvm;

use actor_vmm::boot::layout;
use actor_vmm::devices::Direction;
use actor_vmm::guests::cases::{self, CASES, PASSED};
use actor_vmm::guests::probes::INSTRUCTIONS;
use actor_vmm::machine::cpuid::Topology;
use actor_vmm::machine::memory::{self};
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::supervisor::{self, Guest, MachineConfig, Unwired};
use actor_vmm::machine::vm::Vm;
use actor_vmm::vcpu::Cause;
use actor_vmm::vcpu::backend::{Backend as _, RunError};
use actor_vmm::vcpu::exit::Exit;
use crossbeam_channel::{Receiver, bounded};
use kvm::have_kvm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use slog::{Discard, Logger, o};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// After this a machine ends itself, and says in which state it was.
const TIMEOUT_S: &str = "60";
/// After this a program that did not is killed.
const HANG: Duration = Duration::from_secs(75);
/// How soon a signal ends a machine.
const PROMPT: Duration = Duration::from_secs(1);

/// The status of a guest that gives `value` to the debug-exit port.
fn exit_status(value: u8) -> i32 {
    Outcome::GuestExit(value).status().into()
}

/// Told to a person even when the test passes: the test harness captures only what goes through `eprintln!`.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// How a program ended.
#[derive(Debug)]
struct Ended {
    status: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

impl Ended {
    /// Checks status and output; shows everything when they are wrong.
    #[track_caller]
    fn expect(&self, status: i32, stdout: &str) {
        assert!(
            self.status == Some(status) && self.stdout == stdout.as_bytes(),
            "expected status {status} and output {stdout:?}, got {:?} and {:?}; log:\n{}",
            self.status,
            String::from_utf8_lossy(&self.stdout),
            self.stderr
        );
    }
}

/// A program that runs. Killed when it is dropped early.
struct Running {
    child: Child,
    /// Until [`Running::end`].
    stdout: Option<BufReader<ChildStdout>>,
    stderr: Receiver<String>,
}

fn spawn(args: &[&str], input: &[u8]) -> Running {
    let mut child = Command::new(env!("CARGO_BIN_EXE_actor-vmm"))
        .args(["run", "--timeout", TIMEOUT_S, "--memory", "16M"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Small enough for the pipe: never waits.
    child.stdin.take().unwrap().write_all(input).unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut log = child.stderr.take().unwrap();
    let (sender, stderr) = bounded(1);
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = log.read_to_string(&mut text);
        let _ = sender.send(text);
    });
    Running {
        child,
        stdout: Some(stdout),
        stderr,
    }
}

fn run(args: &[&str], input: &[u8]) -> Ended {
    spawn(args, input).end()
}

/// Runs a test guest with one vCPU and no input.
fn run_guest(name: &str) -> Ended {
    run(&["--guest", name], b"")
}

impl Running {
    /// Waits for a line of the guest's.
    fn wait_for_line(&mut self, expected: &str) {
        let mut line = String::new();
        let stdout = self.stdout.as_mut().unwrap();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), expected);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for the end, without reading any output.
    fn wait(&mut self) -> Option<i32> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begin.elapsed() < HANG, "it hangs");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the end and takes all output.
    fn end(mut self) -> Ended {
        let (sender, output) = bounded(1);
        let pid = self.child.id();
        let mut stdout = self.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stdout.read_to_end(&mut bytes);
            let _ = sender.send(bytes);
        });
        let stdout = output
            .recv_timeout(HANG)
            .unwrap_or_else(|_| panic!("process {pid} hangs"));
        let status = self.wait();
        let stderr = self.stderr.recv_timeout(HANG).unwrap();
        Ended {
            status,
            stdout,
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_demo_finds_all_well() {
    if !have_kvm() {
        return;
    }
    for cpus in ["1", "2", "16", "64"] {
        let ended = run(&["--demo", "--cpus", cpus], b"");
        let output = String::from_utf8_lossy(&ended.stdout);
        let noun = if cpus == "1" { "CPU" } else { "CPUs" };
        assert!(
            ended.status == Some(0)
                && output.starts_with("Hello!")
                && output.contains(&format!(" {cpus} {noun} up"))
                && output.ends_with("All is well. Powering off.\r\n")
                && !output.contains("FAILED"),
            "{ended:?}"
        );
    }
}

#[test]
fn all_modes_say_hello() {
    if !have_kvm() {
        return;
    }
    for bits in ["16", "32", "64"] {
        let name = match bits {
            "16" => "real_hello".into(),
            _ => format!("flat{bits}_hello"),
        };
        let hello = format!("Hello from {bits} bits.\n");
        // Real mode says it twice: byte by byte, and as a string.
        let times = if bits == "16" { 2 } else { 1 };
        run_guest(&name).expect(0, &hello.repeat(times));
    }
}

#[test]
fn string_instructions_work_in_all_modes() {
    if !have_kvm() {
        return;
    }
    for name in ["real_string", "flat32_string", "flat64_string"] {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.txt"));
        let to = format!("file:{}", path.display());
        run(&["--guest", name, "--debug-console", &to], b"").expect(exit_status(PASSED), "");
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "words\ndwords\nbackwards\n",
            "{name}"
        );
    }
}

#[test]
fn ports_and_memory_of_all_widths() {
    if !have_kvm() {
        return;
    }
    run_guest("ports").expect(exit_status(PASSED), "");
    let ended = run(&["--guest", "memory", "--log-level", "debug"], b"");
    ended.expect(exit_status(PASSED), "");
    // Two pages of nowhere, and the end of RAM.
    for range in ["0xd0000000", "0xd0001000", "0x1000000"] {
        assert!(
            ended.stderr.contains(&format!("from={range}")),
            "{range} is not counted:\n{}",
            ended.stderr
        );
    }
}

#[test]
fn interrupts_arrive_and_end_halts() {
    if !have_kvm() {
        return;
    }
    for name in [
        "apic_one_shot",
        "apic_periodic",
        "pit_ioapic",
        "pit_pic",
        "rtc_periodic",
    ] {
        let ended = run_guest(name);
        assert_eq!(ended.status, Some(exit_status(PASSED)), "{name}: {ended:?}");
    }
    // Not every host has it; the guest says so by its first check.
    let ended = run_guest("apic_deadline");
    if ended.status == Some(exit_status(1)) {
        tell("SKIPPED: TSC deadline, which this host's KVM does not offer");
    } else {
        ended.expect(exit_status(PASSED), "");
    }
}

#[test]
fn the_serial_port_sends_and_receives_by_interrupts_wherever_it_runs() {
    if !have_kvm() {
        return;
    }
    let text = b"More than one FIFO of the serial port can take, until a full stop.";
    for placement in ["handoff", "thread", "pool"] {
        let option = format!("serial0={placement}");
        run(&["--guest", "serial_transmit", "--placement", &option], b"")
            .expect(exit_status(PASSED), "interrupts\n");
        run(&["--guest", "serial_echo", "--placement", &option], text)
            .expect(0, std::str::from_utf8(text).unwrap());
        run(&["--guest", "flat64_string", "--placement", &option], b"").expect(exit_status(PASSED), "");
    }
}

#[test]
fn all_processors_start() {
    if !have_kvm() {
        return;
    }
    for name in ["smp_xapic", "smp_x2apic", "smp_broadcast"] {
        for cpus in ["2", "16", "64"] {
            run(&["--guest", name, "--cpus", cpus], b"")
                .expect(exit_status(PASSED), &format!("{cpus} CPUs up\n"));
        }
    }
}

#[test]
fn guests_end_machines_with_the_documented_status() {
    if !have_kvm() {
        return;
    }
    for (name, status) in [
        ("flat64_hello", 0),
        ("reset_acpi", 10),
        ("real_reset", 10),
        ("pvpanic", 12),
        ("triple_fault", 12),
        ("debug_exit", 15),
    ] {
        let ended = run_guest(name);
        assert_eq!(ended.status, Some(status), "{name}: {ended:?}");
    }
}

#[test]
fn an_instruction_that_kvm_does_not_know_is_an_internal_error_with_a_diagnosis() {
    if !have_kvm() {
        return;
    }
    for probe in &INSTRUCTIONS {
        let ended = run_guest(&format!("probe_{}", probe.name));
        if ended.status == Some(exit_status(1)) {
            tell(&format!(
                "SKIPPED: {} is no internal error, this host's KVM runs it",
                probe.name
            ));
            continue;
        }
        assert_eq!(ended.status, Some(14), "{}: {ended:?}", probe.name);
        for part in [
            "vcpu0 cannot go on: KVM_EXIT_INTERNAL_ERROR",
            "\ncode at rip: ",
            "\nrip=00000000001000",
            "\ncr0=80000011 ",
            "\nwhat to do: ",
        ] {
            assert!(
                ended.stderr.contains(part),
                "{}: no {part:?} in:\n{}",
                probe.name,
                ended.stderr
            );
        }
    }
}

#[test]
fn signals_end_running_halted_and_spinning_guests_promptly() {
    if !have_kvm() {
        return;
    }
    for (name, cpus) in [
        ("spin", "1"),
        ("halted", "1"),
        ("port_loop", "1"),
        ("memory_loop", "1"),
        ("spin_smp", "8"),
        // Nobody reads its output any more.
        ("chatter", "1"),
    ] {
        for (signal, status) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
            // This box may be busy with something else: one of three must be prompt.
            let mut fastest = Duration::MAX;
            for _ in 0..3 {
                let mut running = spawn(&["--guest", name, "--cpus", cpus], b"");
                running.wait_for_line("ready");
                let begin = Instant::now();
                running.signal(signal);
                assert_eq!(running.wait(), Some(status), "{name}, {signal}");
                fastest = fastest.min(begin.elapsed());
                let log = running.stderr.recv_timeout(HANG).unwrap();
                assert!(!log.contains("left behind"), "{name}, {signal}:\n{log}");
                if fastest < PROMPT {
                    break;
                }
            }
            assert!(fastest < PROMPT, "{name}, {signal}: {fastest:?}");
        }
    }
}

/// One vCPU of a VM of its own, about to run a test guest. `irqchip`: with interrupt controllers in the kernel.
fn machine_of_one(name: &str, irqchip: bool) -> (Vm, kvm_ioctls::VcpuFd, MachineConfig) {
    let guest = cases::by_name(name).unwrap();
    let config = MachineConfig {
        timeout: Some(Duration::from_millis(300)),
        ..MachineConfig::bare(guest.clone(), 1)
    };
    let memory = memory::create(&config.memory).unwrap();
    let Guest::Image { bytes, at, entry } = guest else {
        unreachable!("test guests are images")
    };
    memory.write_slice(bytes, GuestAddress(at)).unwrap();
    actor_vmm::boot::entry::write_tables(&memory, &entry).unwrap();
    let vm = Vm::new(memory, 1, irqchip).unwrap();
    let fd = vm.vcpu(0, &Topology::flat(1)).unwrap();
    vm.enter_at(&fd, &entry).unwrap();
    (vm, fd, config)
}

/// Runs a guest on a bare vCPU, with ones for all that it reads, until an exit that is neither port nor memory.
fn exits(name: &str, irqchip: bool) -> Vec<Exit> {
    let (vm, fd, _) = machine_of_one(name, irqchip);
    let mut backend = vm.backend(fd);
    let mut exits = Vec::new();
    for _ in 0..10_000 {
        let exit = match backend.run() {
            Ok(()) => backend.exit(),
            Err(RunError::Interrupted | RunError::Again) => continue,
            Err(RunError::Failed(errno)) => panic!("{errno}"),
        };
        exits.push(exit);
        match exit {
            Exit::Pio(pio) => {
                let length = pio.width.bytes() * pio.count as usize;
                let data = backend.pio_data(pio.data_offset, length).unwrap();
                if pio.direction == Direction::Read {
                    data.fill(0xff);
                } else if pio.port == layout::io::DEBUG_EXIT {
                    return exits;
                }
            }
            Exit::Mmio(mmio) if mmio.direction == Direction::Read => backend.mmio_data().fill(0xff),
            Exit::Mmio(_) => {}
            _ => return exits,
        }
    }
    panic!("{name} goes on and on: {:?}", exits.last());
}

#[test]
fn a_halt_without_interrupt_controllers_is_an_exit_and_can_be_stopped() {
    if !have_kvm() {
        return;
    }
    assert_eq!(exits("halted", false).last(), Some(&Exit::Hlt));

    let (vm, fd, config) = machine_of_one("halted", false);
    let begin = Instant::now();
    let outcome = supervisor::run_with(&config, vec![vm.backend(fd)], &Unwired, &no_log()).unwrap();
    assert!(matches!(outcome, Outcome::TimedOut(_)), "{outcome:?}");
    assert!(begin.elapsed() < HANG);
}

#[test]
fn memory_exits_have_all_widths_and_split_at_pages() {
    if !have_kvm() {
        return;
    }
    let exits = exits("memory", true);
    let seen = |direction, address, length| {
        exits.iter().any(|exit| {
            matches!(exit, Exit::Mmio(mmio)
                if (mmio.direction, mmio.address, mmio.length) == (direction, address, length))
        })
    };
    let nowhere = layout::PCI_HOLE + 0x1000_0000;
    for direction in [Direction::Read, Direction::Write] {
        for (offset, length) in [(0, 1), (2, 2), (4, 4), (8, 8), (0xffd, 3), (0x1000, 5)] {
            assert!(
                seen(direction, nowhere + offset, length),
                "no {direction:?} of {length} bytes at {offset:#x}"
            );
        }
        assert!(
            seen(direction, memory::MIN_BYTES, 4),
            "{direction:?} across the end of RAM"
        );
    }
}

#[test]
fn a_debug_exit_that_nobody_asked_for_is_an_internal_error() {
    if !have_kvm() {
        return;
    }
    let (vm, fd, config) = machine_of_one("spin", true);
    let debug = kvm_bindings::kvm_guest_debug {
        control: kvm_bindings::KVM_GUESTDBG_ENABLE | kvm_bindings::KVM_GUESTDBG_SINGLESTEP,
        ..Default::default()
    };
    if let Err(error) = fd.set_guest_debug(&debug) {
        tell(&format!(
            "SKIPPED: single steps, which this host's KVM refuses: {error}"
        ));
        return;
    }
    let outcome = supervisor::run_with(&config, vec![vm.backend(fd)], &vm, &no_log()).unwrap();
    let Outcome::InternalError(diagnosis) = outcome else {
        panic!("{outcome:?}")
    };
    assert!(
        matches!(diagnosis.cause, Cause::Exit(Exit::Debug { exception: 1, .. })),
        "{diagnosis}"
    );
}

#[test]
fn registers_that_the_processor_refuses_are_an_internal_error() {
    if !have_kvm() {
        return;
    }
    let (vm, fd, config) = machine_of_one("spin", true);
    // Code of 64 and of 32 bits at once [SDM 3C §27.3.1.2; APM 2 §15.5.1].
    let mut sregs = fd.get_sregs().unwrap();
    (sregs.cs.l, sregs.cs.db) = (1, 1);
    if let Err(error) = fd.set_sregs(&sregs) {
        tell(&format!(
            "SKIPPED: FAIL_ENTRY, KVM refuses such registers itself: {error}"
        ));
        return;
    }
    match supervisor::run_with(&config, vec![vm.backend(fd)], &vm, &no_log()).unwrap() {
        Outcome::InternalError(diagnosis) => {
            assert!(diagnosis.registers.is_some(), "{diagnosis}");
            if !matches!(diagnosis.cause, Cause::Exit(Exit::FailEntry { .. })) {
                tell(&format!(
                    "SKIPPED: FAIL_ENTRY, it is another error here: {diagnosis}"
                ));
            }
        }
        Outcome::TimedOut(_) => tell("SKIPPED: FAIL_ENTRY, this host's KVM runs anything"),
        outcome => panic!("{outcome:?}"),
    }
}

#[test]
fn every_test_guest_is_used() {
    let source = concat!(
        include_str!("kvm_guests.rs"),
        include_str!("kvm_control.rs"),
        include_str!("ctl.rs")
    );
    for case in CASES {
        let quoted = format!("\"{}\"", case.name);
        assert!(
            source.contains(&quoted) || case.name.ends_with("_hello"),
            "{}",
            case.name
        );
    }
}

fn no_log() -> Logger {
    Logger::root(Discard, o!())
}
