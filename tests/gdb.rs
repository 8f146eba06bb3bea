//! Debian's gdb against a bare-metal guest on this host's KVM: what a person who debugs a kernel does, as scripts.
//!
//! A gdb is driven through pipes and waited for by what it prints; the program by its log. Nothing waits by sleeping.
//! A host without `/dev/kvm` or gdb skips all of it and says so; under CI that is a failure.

#[path = "host/kvm.rs"]
mod kvm;

use actor_vmm::guests::LOAD_ADDRESS;
use actor_vmm::guests::cases::PASSED;
use actor_vmm::guests::debug::{COUNTER, FUNCTION, LOOP, STOP};
use actor_vmm::machine::outcome::{Outcome, status};
use kvm::{have_kvm, skipped};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_actor-vmm");
/// Against hangs only.
const HANG: Duration = Duration::from_secs(60);

/// What a process prints, as it comes.
struct Output {
    text: String,
    parts: Receiver<Vec<u8>>,
    /// How far [`Output::until`] has looked.
    seen: usize,
}

impl Output {
    fn of(mut pipe: impl Read + Send + 'static) -> Output {
        let (sender, parts) = channel();
        std::thread::spawn(move || {
            let mut data = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut data) {
                if sender.send(data[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Output {
            text: String::new(),
            parts,
            seen: 0,
        }
    }

    /// Waits for a text behind the last one; what was before it.
    #[track_caller]
    fn until(&mut self, wanted: &str) -> String {
        let deadline = Instant::now() + HANG;
        loop {
            if let Some(at) = self.text[self.seen..].find(wanted) {
                let before = self.text[self.seen..self.seen + at].to_string();
                self.seen += at + wanted.len();
                return before;
            }
            match self
                .parts
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(part) => self.text += &String::from_utf8_lossy(&part),
                Err(why) => panic!("no {wanted:?} ({why}) in:\n{}", self.text),
            }
        }
    }

    /// Everything so far does not count.
    fn skip(&mut self) {
        while let Ok(part) = self.parts.try_recv() {
            self.text += &String::from_utf8_lossy(&part);
        }
        self.seen = self.text.len();
    }

    fn rest(&mut self) -> &str {
        while let Ok(part) = self.parts.recv_timeout(HANG) {
            self.text += &String::from_utf8_lossy(&part);
        }
        &self.text
    }
}

/// A directory that goes with the value.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("actor-vmm-gdb-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Place(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The program with a guest.
struct Machine {
    child: Child,
    log: Output,
    at: String,
}

impl Machine {
    /// Starts it, with gdb at a free port. `None`: this host cannot.
    fn start(words: &str) -> Option<Machine> {
        Machine::start_at("0", words)
    }

    fn start_at(place: &str, words: &str) -> Option<Machine> {
        if !have_kvm() {
            return None;
        }
        if !Path::new("/usr/bin/gdb").exists() {
            assert!(std::env::var_os("CI").is_none(), "CI must have /usr/bin/gdb");
            skipped("there is no /usr/bin/gdb");
            return None;
        }
        let mut child = Command::new(PROGRAM)
            .args(["run", "--log-level", "debug", "--timeout", "120", "--gdb", place])
            .args(words.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = Output::of(child.stderr.take().unwrap());
        log.until("gdb: ");
        while !log.until(" at ").ends_with("listening") && !log.text.contains("waits for gdb") {}
        let at = log.until("\n");
        Some(Machine { child, log, at })
    }

    /// A gdb that is connected.
    fn gdb(&self) -> Gdb {
        let mut gdb = Gdb::start();
        gdb.ask(&format!("target remote {}", self.at));
        gdb
    }

    #[track_caller]
    fn ends_with(mut self, status: u8) -> String {
        let log = self.log.rest().to_string();
        let ended = self.child.wait().unwrap();
        assert_eq!(ended.code(), Some(status.into()), "{log}");
        assert!(!log.contains("a bug") && !log.contains("bug in"), "{log}");
        log
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Debian's gdb.
struct Gdb {
    child: Child,
    input: ChildStdin,
    output: Output,
    /// Where gdb prints what the program tells its user.
    errors: Output,
}

impl Gdb {
    fn start() -> Gdb {
        let mut child = Command::new("/usr/bin/gdb")
            .args([
                "-nx",
                "-q",
                "-ex",
                "set pagination off",
                "-ex",
                "set confirm off",
                "-ex",
                "set prompt",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env("DEBUGINFOD_URLS", "")
            .spawn()
            .unwrap();
        let output = Output::of(child.stdout.take().unwrap());
        let errors = Output::of(child.stderr.take().unwrap());
        Gdb {
            input: child.stdin.take().unwrap(),
            output,
            errors,
            child,
        }
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    /// What gdb prints for a command that ends.
    #[track_caller]
    fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.tell("echo \\n<done>\\n");
        self.output.until("<done>\n")
    }

    /// A number, as `print` says it.
    #[track_caller]
    fn number(&mut self, expression: &str) -> u64 {
        let answer = self.ask(&format!("output/x (unsigned long){expression}"));
        let hex = answer.rsplit("0x").next().unwrap().trim();
        u64::from_str_radix(hex, 16).unwrap_or_else(|_| panic!("{expression}: {answer}"))
    }

    #[track_caller]
    fn word(&mut self, address: u64) -> u64 {
        self.number(&format!("*(unsigned long*){address:#x}"))
    }

    /// Continues, and does as Ctrl-C at the keyboard does once the machine runs.
    fn interrupt(&mut self, machine: &mut Machine) {
        machine.log.skip();
        self.tell("continue");
        machine.log.until("-> running");
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT).unwrap();
    }
}

impl Drop for Gdb {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn function(gdb: &mut Gdb) -> u64 {
    // Where the guest has set itself up.
    loop {
        match gdb.word(FUNCTION) {
            0 => drop(gdb.ask("stepi 50")),
            there => return there,
        }
    }
}

/// The guest ends when it is told so, having gone on: its own way out.
#[track_caller]
fn end(mut gdb: Gdb, machine: Machine) {
    gdb.ask(&format!("set var *(char*){STOP:#x} = 1"));
    gdb.tell("continue");
    gdb.output.until("exited with code");
    machine.ends_with(Outcome::GuestExit(PASSED).status());
}

#[test]
fn a_session_from_attach_to_the_end() {
    let Some(mut machine) = Machine::start("--guest debug") else {
        return;
    };
    let mut gdb = machine.gdb();
    let function = function(&mut gdb);
    // Breakpoint, memory, backtrace, registers.
    gdb.ask(&format!("break *{function:#x}"));
    let stopped = gdb.ask("continue");
    assert!(stopped.contains("Breakpoint 1,"), "{stopped}");
    assert_eq!(gdb.number("$rip"), function);
    assert_eq!(gdb.number("$r12"), 0xdeb06);
    assert_eq!(gdb.number("$cs"), 0x10);
    assert_eq!(gdb.number("$cr0") & 0x8000_0001, 0x8000_0001);
    assert_eq!(gdb.number("$efer"), 0x500);
    assert_eq!(gdb.number("$cr3"), 0x9000);
    let backtrace = gdb.ask("backtrace 2");
    assert_eq!(backtrace.matches("#1").count(), 1, "{backtrace}");
    // What is planted is not seen.
    assert_eq!(gdb.number(&format!("*(unsigned char*){function:#x}")), 0x55);
    // Steps: over the breakpoint, through `push`, `mov` and the count.
    let before = gdb.word(COUNTER);
    gdb.ask("stepi");
    assert_eq!(gdb.number("$rip"), function + 1);
    gdb.ask("stepi 2");
    assert_eq!(gdb.word(COUNTER), before + 1);
    // Once around the loop for each continue.
    for _ in 0..3 {
        gdb.ask("continue");
    }
    assert_eq!(gdb.word(COUNTER), before + 3);
    // A register is written; the guest goes on with it.
    gdb.ask("set var $r12 = 7");
    gdb.ask("continue");
    assert_eq!(gdb.number("$r12"), 7);
    // Ctrl-C.
    gdb.ask("delete");
    // It may be stopped before it has done anything at all, where others want the processor; but not each time.
    let went_on = (0..100).any(|_| {
        gdb.interrupt(&mut machine);
        gdb.output.until("SIGINT");
        gdb.word(COUNTER) > before + 4
    });
    assert!(went_on, "a guest that goes on does nothing");
    // Detached, it runs on; a second one finds it further.
    let counted = gdb.word(COUNTER);
    gdb.ask("detach");
    drop(gdb);
    machine.log.until("gdb has detached");
    let mut gdb = machine.gdb();
    assert!(gdb.word(COUNTER) >= counted);
    end(gdb, machine);
}

#[test]
fn a_symbol_file_gives_names_to_break_at_and_to_look_at() {
    let Some(machine) = Machine::start("--guest debug") else {
        return;
    };
    let place = Place::new();
    let mut gdb = machine.gdb();
    let (function, called) = (function(&mut gdb), gdb.word(LOOP));
    // As a kernel's own list of its functions has them.
    let list = format!("{called:016x} T called_for_ever\n{function:016x} t counted\n");
    let file = place.0.join("names.elf");
    std::fs::write(&file, harness::symbols::elf(&list).unwrap()).unwrap();
    let loaded = gdb.ask(&format!("symbol-file {}", file.display()));
    assert!(loaded.contains("Reading symbols from"), "{loaded}");
    // Behind what sets its frame up, as gdb does for a person.
    let planted = gdb.ask("break counted");
    assert!(
        planted.contains(&format!("Breakpoint 1 at {:#x}", function + 4)),
        "{planted}"
    );
    let stopped = gdb.ask("continue");
    assert!(
        stopped.contains("Breakpoint 1, ") && stopped.contains("counted ()"),
        "{stopped}"
    );
    assert_eq!(gdb.number("$rip"), function + 4);
    let backtrace = gdb.ask("backtrace");
    let frames: Vec<_> = backtrace.lines().filter(|line| line.starts_with('#')).collect();
    assert_eq!(frames.len(), 2, "{backtrace}");
    assert!(frames[0].ends_with(" in counted ()"), "{backtrace}");
    assert!(frames[1].ends_with(" in called_for_ever ()"), "{backtrace}");
    let symbol = gdb.ask("info symbol $rip");
    assert!(symbol.contains("counted + 4 in section .text"), "{symbol}");
    let symbol = gdb.ask(&format!("info symbol {called:#x}"));
    assert!(symbol.contains("called_for_ever in section .text"), "{symbol}");
    gdb.ask("delete");
    end(gdb, machine);
}

#[test]
fn hardware_breakpoints_or_a_word_about_them() {
    let Some(machine) = Machine::start("--guest debug") else {
        return;
    };
    let works = !machine
        .log
        .text
        .contains("hardware breakpoints do not work in the guest's kernel");
    let mut gdb = machine.gdb();
    let function = function(&mut gdb);
    gdb.ask(&format!("hbreak *{function:#x}"));
    if works {
        let stopped = gdb.ask("continue");
        assert!(stopped.contains("Breakpoint 1,"), "{stopped}");
        assert_eq!(gdb.number("$rip"), function);
    }
    gdb.ask("delete");
    end(gdb, machine);
}

#[test]
fn a_watchpoint_stops_behind_the_store() {
    let Some(machine) = Machine::start("--guest debug") else {
        return;
    };
    let mut gdb = machine.gdb();
    let function = function(&mut gdb);
    if machine
        .log
        .text
        .contains("hardware watchpoints do not work in the guest's kernel")
    {
        // What the program says one should do.
        assert!(machine.log.text.contains("`set can-use-hw-watchpoints 0`"));
        gdb.ask("set can-use-hw-watchpoints 0");
    }
    gdb.ask(&format!("watch *(unsigned long*){COUNTER:#x}"));
    let stopped = gdb.ask("continue");
    assert!(stopped.contains("atchpoint 1"), "{stopped}");
    assert!(stopped.contains("Old value"), "{stopped}");
    // `push rbp` is 1 byte long, `mov rbp, rsp` 3, the count 8.
    assert_eq!(gdb.number("$rip"), function + 12);
    gdb.ask("delete");
    end(gdb, machine);
}

#[test]
fn the_guest_waits_before_its_first_instruction() {
    let Some(machine) = Machine::start_at("0,wait", "--guest debug") else {
        return;
    };
    let mut gdb = machine.gdb();
    let start = gdb.number("$rip");
    assert!(
        (LOAD_ADDRESS..LOAD_ADDRESS + 0x1000).contains(&start),
        "{start:#x}"
    );
    assert_eq!(gdb.number("$rsp"), 0x8ff0);
    assert_eq!((gdb.word(COUNTER), gdb.word(FUNCTION)), (0, 0));
    gdb.ask("stepi");
    assert_ne!(gdb.number("$rip"), start);
    end(gdb, machine);
}

#[test]
fn vcpus_are_threads_and_steps_are_of_one() {
    let Some(mut machine) = Machine::start("--guest debug --cpus 3") else {
        return;
    };
    let mut gdb = machine.gdb();
    // The others are up once the loop runs.
    gdb.ask("continue&");
    machine.log.until("-> running");
    drop(gdb);
    let mut gdb = machine.gdb();
    while gdb.word(FUNCTION) == 0 {
        gdb.ask("detach");
        gdb.ask(&format!("target remote {}", machine.at));
    }
    let threads = gdb.ask("info threads");
    assert!(threads.contains("vcpu0: running"), "{threads}");
    for other in ["vcpu1: halted", "vcpu2: halted"] {
        assert!(threads.contains(other), "{threads}");
    }
    gdb.ask("thread 3");
    let halted = gdb.number("$rip");
    gdb.ask("thread 1");
    let function = gdb.word(FUNCTION);
    gdb.ask(&format!("break *{function:#x}"));
    let stopped = gdb.ask("continue");
    assert!(stopped.contains("Thread 1 hit Breakpoint"), "{stopped}");
    gdb.ask("set scheduler-locking on");
    gdb.ask("stepi 4");
    gdb.ask("set scheduler-locking off");
    gdb.ask("thread 3");
    assert_eq!(gdb.number("$rip"), halted);
    gdb.ask("delete");
    gdb.ask("thread 1");
    end(gdb, machine);
}

#[test]
fn ctrl_c_shows_registers_memory_and_a_backtrace_of_each_vcpu() {
    let Some(mut machine) = Machine::start("--guest debug --cpus 3") else {
        return;
    };
    let mut gdb = machine.gdb();
    let function = function(&mut gdb);
    let start = gdb.word(LOOP);
    let counted = gdb.word(COUNTER);
    // Ctrl-C may come before the first instruction: that the machine runs is said before its vCPUs are in the guest.
    while gdb.word(COUNTER) == counted {
        gdb.interrupt(&mut machine);
        gdb.output.until("SIGINT");
    }
    let backtraces = gdb.ask("thread apply all backtrace 3");
    // One that works: it is in the function or in the loop that calls it, wherever Ctrl-C found it.
    gdb.ask("thread 1");
    let rip = gdb.number("$rip");
    // The function is 14 bytes long, and behind the loop and its way out.
    assert!((start..function + 14).contains(&rip), "{rip:#x}: {backtraces}");
    let rips: Vec<u64> = (1..=3)
        .map(|thread| {
            gdb.ask(&format!("thread {thread}"));
            assert_eq!(gdb.number("$cr3"), 0x9000, "the same tables for all");
            gdb.number("$rip")
        })
        .collect();
    // The others halt, and a vCPU in HLT is behind it.
    for &halted in &rips[1..] {
        assert_eq!(gdb.number(&format!("*(unsigned char*){:#x}", halted - 1)), 0xf4);
    }
    for (vcpu, rip) in rips.iter().enumerate() {
        let own = format!("Thread 1.{} (vcpu{vcpu}: ", vcpu + 1);
        let own = &backtraces[backtraces.find(&own).expect(&backtraces)..];
        let first = own.find("#0  ").expect(&backtraces);
        assert!(
            own[first..].starts_with(&format!("#0  {rip:#018x} in")),
            "vcpu{vcpu} is at {rip:#x}: {backtraces}"
        );
    }
    // At the function's first instruction its caller is known: the return address is on top of the stack.
    gdb.ask("thread 1");
    gdb.ask(&format!("break *{function:#x}"));
    gdb.ask("continue");
    let stack = gdb.number("$rsp");
    let called_from = gdb.word(stack);
    assert_eq!(
        called_from,
        start + 5,
        "behind the `call` that the loop begins with"
    );
    let backtrace = gdb.ask("backtrace 2");
    assert!(
        backtrace.contains(&format!("#1  {called_from:#018x} in")),
        "{backtrace}"
    );
    gdb.ask("delete");
    end(gdb, machine);
}

#[test]
fn a_gdb_that_vanishes_leaves_the_guest_running_and_whole() {
    let Some(mut machine) = Machine::start("--guest debug") else {
        return;
    };
    let mut gdb = machine.gdb();
    let function = function(&mut gdb);
    gdb.ask("set breakpoint always-inserted on");
    gdb.ask(&format!("break *{function:#x}"));
    gdb.ask("continue");
    let counted = gdb.word(COUNTER);
    gdb.child.kill().unwrap();
    machine.log.until("gdb is gone");
    machine.log.until("-> running");
    drop(gdb);
    // It runs past the place, which has its own byte again: asked until it has.
    loop {
        let mut gdb = machine.gdb();
        assert_eq!(gdb.number(&format!("*(unsigned char*){function:#x}")), 0x55);
        if gdb.word(COUNTER) > counted + 1 {
            return end(gdb, machine);
        }
        gdb.ask("detach");
    }
}

/// What `ctl` asks for, and what the machine's state is then.
#[track_caller]
fn ctl(control: &Path, verb: &str) -> String {
    let said = Command::new(PROGRAM)
        .arg("ctl")
        .arg(control)
        .arg(verb)
        .output()
        .unwrap();
    assert!(said.status.success(), "{verb}: {said:?}");
    String::from_utf8(said.stdout).unwrap()
}

#[test]
fn a_machine_that_ctl_has_paused_stays_so_whatever_becomes_of_gdb() {
    let place = Place::new();
    let control = place.0.join("ctl");
    let words = format!("--guest debug --control {}", control.display());
    let Some(mut machine) = Machine::start(&words) else {
        return;
    };
    let counted = |machine: &Machine| machine.gdb().word(COUNTER);
    machine.log.until("-> running");
    for gdb_comes_first in [true, false] {
        for gdb_goes_first in [true, false] {
            let way = format!("gdb comes first: {gdb_comes_first}, goes first: {gdb_goes_first}");
            let mut gdb = None;
            if gdb_comes_first {
                gdb = Some(machine.gdb());
            }
            assert_eq!(ctl(&control, "pause"), "state: paused\n", "{way}");
            let mut gdb = gdb.unwrap_or_else(|| machine.gdb());
            let count = gdb.word(COUNTER);
            assert!(ctl(&control, "status").contains("held_by: control, gdb\n"));
            if gdb_goes_first {
                machine.log.skip();
                if gdb_comes_first {
                    gdb.ask("detach");
                } else {
                    gdb.child.kill().unwrap();
                }
                machine.log.until("stays paused without gdb");
                let status = ctl(&control, "status");
                assert!(
                    status.contains("held_by: control\n") && status.contains("state: paused"),
                    "{way}: {status}"
                );
                assert_eq!(counted(&machine), count, "{way}");
                machine.log.until("stays paused without gdb");
                assert_eq!(ctl(&control, "resume"), "state: running\n", "{way}");
            } else {
                assert_eq!(ctl(&control, "resume"), "state: paused\n", "{way}");
                assert_eq!(gdb.word(COUNTER), count, "{way}");
                gdb.ask("detach");
                let begin = Instant::now();
                while !ctl(&control, "status").contains("state: running") {
                    assert!(begin.elapsed() < HANG, "{way}");
                }
            }
            let mut now = count;
            while now == count {
                now = counted(&machine);
            }
        }
    }
    // Only gdb has it: nobody else lets it go on. gdb's `continue` of a machine that is paused waits for who paused it.
    let mut gdb = machine.gdb();
    let refused = Command::new(PROGRAM)
        .arg("ctl")
        .arg(&control)
        .arg("resume")
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(4));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("gdb has stopped the machine"), "{said}");
    ctl(&control, "pause");
    gdb.tell("continue");
    gdb.errors.until("paused by its controller too");
    machine.log.skip();
    ctl(&control, "resume");
    machine.log.until("-> running");
    kill(Pid::from_raw(gdb.child.id() as i32), Signal::SIGINT).unwrap();
    gdb.output.until("SIGINT");
    end(gdb, machine);
}

#[test]
fn a_gdb_that_vanishes_while_the_guest_runs() {
    let Some(mut machine) = Machine::start("--guest debug") else {
        return;
    };
    let mut gdb = machine.gdb();
    gdb.tell("continue");
    machine.log.until("paused -> running");
    drop(gdb);
    machine.log.until("gdb is gone");
    machine.log.until("-> running");
    end(machine.gdb(), machine);
}

#[test]
fn kill_ends_the_machine() {
    let Some(machine) = Machine::start("--guest debug") else {
        return;
    };
    let mut gdb = machine.gdb();
    gdb.ask("kill");
    let log = machine.ends_with(status::STOPPED);
    assert!(log.contains("stopped by whoever controls the machine"), "{log}");
}

#[test]
fn a_signal_ends_a_machine_that_gdb_has_stopped() {
    let Some(machine) = Machine::start_at("0,wait", "--guest debug") else {
        return;
    };
    let mut gdb = machine.gdb();
    gdb.number("$rip");
    kill(Pid::from_raw(machine.child.id() as i32), Signal::SIGTERM).unwrap();
    machine.ends_with(128 + Signal::SIGTERM as u8);
}

#[test]
fn real_mode_and_protected_mode_without_paging() {
    for guest in ["real_hello", "flat32_hello"] {
        let Some(machine) = Machine::start_at("0,wait", &format!("--guest {guest}")) else {
            return;
        };
        let mut gdb = machine.gdb();
        let start = gdb.number("$rip");
        let byte = gdb.number(&format!("*(unsigned char*){start:#x}"));
        assert!(byte != 0, "{guest}: code is at {start:#x}");
        // A breakpoint on the second instruction, at its linear address.
        gdb.ask("stepi");
        let second = gdb.number("$rip");
        gdb.ask("stepi");
        let third = gdb.number("$rip");
        assert!(start != second && second != third, "{guest}");
        gdb.ask(&format!("set var $rip = {start:#x}"));
        gdb.ask(&format!("break *{second:#x}"));
        let stopped = gdb.ask("continue");
        assert!(stopped.contains("Breakpoint 1,"), "{guest}: {stopped}");
        assert_eq!(gdb.number("$rip"), second, "{guest}");
        gdb.ask("delete");
        gdb.tell("continue");
        gdb.output.until("exited normally");
        machine.ends_with(status::POWERED_OFF);
    }
}

#[test]
fn one_gdb_at_a_time_over_a_socket_of_the_users_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    let path = place.0.join("gdb");
    let Some(machine) = Machine::start_at(path.to_str().unwrap(), "--guest debug") else {
        return;
    };
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut gdb = machine.gdb();
    gdb.number("$rip");
    // The second one is disconnected without a word; the first one does not notice.
    let mut second = UnixStream::connect(&path).unwrap();
    second.set_read_timeout(Some(HANG)).unwrap();
    assert_eq!(second.read(&mut [0; 16]).unwrap(), 0);
    gdb.number("$rip");
    end(gdb, machine);
    assert!(!path.exists(), "the socket goes with the machine");
}

#[test]
fn a_killed_machine_leaves_a_name_that_the_next_one_takes_and_a_live_one_keeps_its() {
    let place = Place::new();
    let path = place.0.join("gdb");
    let at = path.to_str().unwrap();
    let Some(mut first) = Machine::start_at(at, "--guest debug") else {
        return;
    };
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert!(path.exists(), "SIGKILL leaves it, or this tests nothing");
    let second = Machine::start_at(at, "--guest debug").unwrap();
    let third = Command::new(PROGRAM)
        .args(["run", "--guest", "debug", "--gdb", at])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&third.stderr);
    assert_eq!(third.status.code(), Some(status::BAD_INPUT.into()), "{said}");
    assert!(said.contains("another program listens there"), "{said}");
    end(second.gdb(), second);
    assert!(!path.exists(), "the socket goes with the machine");
}

#[test]
fn nonsense_on_the_line_harms_nobody() {
    let place = Place::new();
    let path = place.0.join("gdb");
    let Some(mut machine) = Machine::start_at(path.to_str().unwrap(), "--guest debug") else {
        return;
    };
    for nonsense in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"$#00",
        b"$g#",
        b"$vCont;x:y#00",
        b"$Hg-1#00$mffffffffffffffff,ffff#00",
        b"$Z0,ffffffffffffffff,1#00$Z9,0,0#00",
        b"$p9999#00$P0=#00$Gxx#00$qXfer:features:read:nosuch.xml:0,ffff#00",
        &[b'$'; 70_000],
        &[0xff; 300],
    ] {
        let mut client = UnixStream::connect(&path).unwrap();
        let _ = client.write_all(nonsense);
        drop(client);
        machine.log.until("gdb is gone");
    }
    end(machine.gdb(), machine);
}

#[test]
fn places_that_cannot_be_are_one_clear_error() {
    if !have_kvm() {
        return;
    }
    let place = Place::new();
    let file = place.0.join("file");
    std::fs::write(&file, "precious").unwrap();
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port().to_string();
    let path = place.0.join("busy");
    let _listener = UnixListener::bind(&path).unwrap();
    for (at, why) in [
        ("65536", "at most 65535"),
        ("", "expected a port"),
        (port.as_str(), "somebody listens at that port already"),
        (path.to_str().unwrap(), "another program listens there"),
        (file.to_str().unwrap(), "no socket"),
        ("/nonexistent/directory/gdb", "check the directory"),
    ] {
        let ended = Command::new(PROGRAM)
            .args(["run", "--guest", "debug", "--timeout", "60", "--gdb", at])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(
            ended.status.code(),
            Some(status::BAD_INPUT.into()),
            "{at}: {told}"
        );
        assert!(told.contains("--gdb") && told.contains(why), "{at}: {told}");
        assert!(!told.contains("the guest starts"), "{at}: {told}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}
