//! Whole machines without `/dev/kvm`: the supervisor, the event loop and all devices around vCPUs that play a script.

use actor_vmm::actors::{Address, Lifecycle, Placement, PlacementKind, Pool};
use actor_vmm::clock::Clock;
use actor_vmm::devices::shell::{InterruptLine, Shell, Surroundings};
use actor_vmm::devices::{Access, AccessClass, Context, Device, Width};
use actor_vmm::host::console::ConsoleKind;
use actor_vmm::machine::chipset::{Lines, device_names};
use actor_vmm::machine::dispatch::Dispatch;
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::state::State;
use actor_vmm::machine::supervisor::{self, Guest, MachineConfig, StartError, Unwired};
use actor_vmm::vcpu::exit::Exit;
use actor_vmm::vcpu::route::{Route, RoutingTable, Space, Target};
use actor_vmm::vcpu::scripted::{Script, ScriptedBackend, Seen, Source, Step};
use actor_vmm::vcpu::{Vcpu, VcpuEvent, VcpuHandle, VcpuMessage, VcpuNews, kick, vcpu_mailbox};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use slog::{Drain, Logger, OwnedKVList, Record, o};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Hang protection.
const LIMIT: Duration = Duration::from_secs(60);
/// "Within about a second".
const PROMPT: Duration = Duration::from_secs(5);

/// A log that is kept.
struct Kept(Sender<String>);

impl Drain for Kept {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), slog::Never> {
        let _ = self
            .0
            .send(format!("{}: {}", record.level().as_str(), record.msg()));
        Ok(())
    }
}

fn kept_log() -> (Logger, Receiver<String>) {
    let (send, lines) = unbounded();
    (Logger::root(Kept(send).fuse(), o!()), lines)
}

/// A file that is gone with the value.
struct Temporary(PathBuf);

impl Temporary {
    fn new() -> Temporary {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Temporary(std::env::temp_dir().join(format!("actor-vmm-scripted-{}-{number}", std::process::id())))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What a machine is given beside its scripts.
struct Given<L> {
    dispatch: Dispatch,
    placements: Vec<(String, PlacementKind)>,
    timeout: Duration,
    lines: L,
}

impl Given<Unwired> {
    fn plain() -> Given<Unwired> {
        Given {
            dispatch: Dispatch::Actor,
            placements: Vec::new(),
            timeout: LIMIT,
            lines: Unwired,
        }
    }
}

/// Every way to reach devices: each placement of the named ones, then each baseline.
fn ways(devices: &[&str]) -> Vec<(String, Given<Unwired>)> {
    let placed = [PlacementKind::Handoff, PlacementKind::Thread, PlacementKind::Pool].map(|kind| {
        let placements = devices.iter().map(|name| (name.to_string(), kind)).collect();
        (
            kind.to_string(),
            Given {
                placements,
                ..Given::plain()
            },
        )
    });
    let baselines = Dispatch::ALL
        .into_iter()
        .filter(|dispatch| *dispatch != Dispatch::Actor);
    let baselines = baselines.map(|dispatch| {
        (
            dispatch.to_string(),
            Given {
                dispatch,
                ..Given::plain()
            },
        )
    });
    placed.into_iter().chain(baselines).collect()
}

/// What became of a machine.
struct Ran {
    outcome: Outcome,
    console: Vec<u8>,
    log: Vec<String>,
    took: Duration,
}

impl Ran {
    fn logged(&self, words: &[&str]) -> bool {
        self.log
            .iter()
            .any(|line| words.iter().all(|word| line.contains(word)))
    }
}

fn run_sources<S: Source + 'static, L: Lines<Error = StartError>>(sources: Vec<S>, given: &Given<L>) -> Ran {
    let file = Temporary::new();
    let config = MachineConfig {
        dispatch: given.dispatch,
        placements: given.placements.clone(),
        console: ConsoleKind::File(file.0.clone()),
        timeout: Some(given.timeout),
        ..MachineConfig::bare(Guest::none(), sources.len())
    };
    let (log, lines) = kept_log();
    let backends = sources.into_iter().map(ScriptedBackend::new).collect();
    let begin = Instant::now();
    let outcome = supervisor::run_with(&config, backends, &given.lines, &log).unwrap();
    Ran {
        outcome,
        took: begin.elapsed(),
        console: std::fs::read(&file.0).unwrap(),
        log: lines.try_iter().collect(),
    }
}

/// Runs one script a vCPU. Reads that got something else than the script says fail the test.
#[track_caller]
fn run_given<L: Lines<Error = StartError>>(scripts: &[&str], given: &Given<L>) -> (Ran, Vec<Seen>) {
    let (scripts, seen): (Vec<_>, Vec<_>) = scripts
        .iter()
        .map(|text| Script::new(Script::parse(text).unwrap()))
        .unzip();
    let ran = run_sources(scripts, given);
    let seen: Vec<Seen> = seen.iter().flat_map(Receiver::try_iter).collect();
    let wrong: Vec<_> = seen.iter().filter(|seen| seen.is_wrong()).collect();
    assert!(wrong.is_empty(), "{wrong:x?}");
    (ran, seen)
}

#[track_caller]
fn run(script: &str) -> Ran {
    run_given(&[script], &Given::plain()).0
}

// What a guest says and asks for.

#[test]
fn what_the_guest_says_is_in_the_file_and_its_status_is_the_outcome() {
    let ran = run("out 3f8 1 48\nout 3f8 1 69\nout 3f8 1 a\nin 3fd 1 60\nout f4 1 5");
    assert!(matches!(ran.outcome, Outcome::GuestExit(5)), "{:?}", ran.outcome);
    assert_eq!(ran.console, b"Hi\n");
}

#[test]
fn string_forms_are_so_many_accesses_in_order() {
    let ran = run("outs 3f8 1 48 65 6c 6c 6f\nins 3fd 1 3\nouts 3f8 1 2c 20\nins 1f0 2 1000\nout f4 1 0");
    assert_eq!(ran.console, b"Hello, ");
    let (_, seen) = run_given(&["ins 3fd 1 3\nins 1f0 2 3\nout f4 1 0"], &Given::plain());
    assert_eq!(
        seen.iter().map(|seen| seen.value).collect::<Vec<_>>(),
        [0x60, 0xffff]
    );
}

#[test]
fn what_nobody_claims_reads_all_ones_takes_writes_and_is_counted() {
    let ran = run("
        in 1f0 1 ff
        in 1f0 2 ffff
        in 1f0 4 ffffffff
        out 1f0 4 12345678
        read d0000000 1 ff
        read d0000000 4 ffffffff
        read d0000000 8 ffffffffffffffff
        read d0000ffd 3 ffffff
        write d0000000 8 1
        read ffffffffffffffff 1 ff
        out f4 1 1
    ");
    assert!(matches!(ran.outcome, Outcome::GuestExit(1)));
    assert!(
        ran.logged(&["accesses to ports that nobody claims"]),
        "{:#?}",
        ran.log
    );
    assert!(
        ran.logged(&["accesses to addresses that nobody claims"]),
        "{:#?}",
        ran.log
    );
}

#[test]
fn a_guest_that_scans_everything_does_not_flood_the_log() {
    let mut script = String::new();
    for port in (0x1000..0x8000).step_by(0x10) {
        script += &format!("in {port:x} 1 ff\n");
    }
    let ran = run(&(script + "out f4 1 1"));
    let warned = ran.log.iter().filter(|line| !line.starts_with("DEBUG")).count();
    assert!(warned < 20, "{warned} lines");
    assert!(ran.log.len() < 200, "{} lines", ran.log.len());
}

#[test]
fn every_way_to_end_has_its_outcome() {
    type Is = fn(&Outcome) -> bool;
    let cases: [(&str, Is); 12] = [
        ("shutdown", |outcome| matches!(outcome, Outcome::TripleFault)),
        ("event shutdown", |outcome| matches!(outcome, Outcome::PoweredOff)),
        ("event reset", |outcome| matches!(outcome, Outcome::Reset)),
        ("event crash", |outcome| matches!(outcome, Outcome::GuestPanic)),
        // ACPI: S5 by PM1a control, and the reset register.
        ("out 604 2 3400", |outcome| matches!(outcome, Outcome::PoweredOff)),
        ("out 60c 1 1", |outcome| matches!(outcome, Outcome::Reset)),
        // The i8042's pulse of the reset line; pvpanic.
        ("out 64 1 fe", |outcome| matches!(outcome, Outcome::Reset)),
        ("out 505 1 1", |outcome| matches!(outcome, Outcome::GuestPanic)),
        ("out f4 1 0", |outcome| matches!(outcome, Outcome::GuestExit(0))),
        ("out f4 1 ff", |outcome| {
            matches!(outcome, Outcome::GuestExit(255))
        }),
        ("out f4 4 1234502a", |outcome| {
            matches!(outcome, Outcome::GuestExit(0x2a))
        }),
        // The first request wins.
        ("out f4 1 3\nout 604 2 3400\nshutdown", |outcome| {
            matches!(outcome, Outcome::GuestExit(3))
        }),
    ];
    for (script, is) in cases {
        let ran = run(&format!("out 3f8 1 2e\n{script}"));
        assert!(is(&ran.outcome), "{script}: {:?}", ran.outcome);
        assert_eq!(ran.console, b".", "{script}");
    }
}

#[test]
fn exits_nobody_can_handle_are_internal_errors_with_advice() {
    for (script, said) in [
        ("unknown 31", &["KVM_EXIT_UNKNOWN", "hardware reason 0x31"][..]),
        (
            "fail-entry 21",
            &["KVM_EXIT_FAIL_ENTRY", "0x21", "refuses the guest's state"],
        ),
        (
            "internal-error 1",
            &["KVM_EXIT_INTERNAL_ERROR", "cannot emulate", "actor-vmm doctor"],
        ),
        ("internal-error 2", &["suberror 2: unexpected exception"]),
        (
            "internal-error 3",
            &["suberror 3: an event could not be delivered"],
        ),
        ("internal-error 4", &["suberror 4"]),
        ("internal-error 63", &["suberror 99"]),
        ("other 2a", &["number 42"]),
        ("errno e", &["KVM_RUN: Bad address", "smaller --memory"]),
        ("errno 5", &["KVM_RUN: ", "dmesg"]),
        ("errno fff", &["KVM_RUN: ", "dmesg"]),
    ] {
        let ran = run(&format!("out 3f8 1 2e\n{script}\nout 3f8 1 21\nout f4 1 1"));
        let Outcome::InternalError(diagnosis) = &ran.outcome else {
            panic!("{script}: {:?}", ran.outcome)
        };
        let text = diagnosis.to_string();
        assert!(text.starts_with("vcpu0 cannot go on: "), "{text}");
        assert!(
            text.split("what to do: ")
                .nth(1)
                .is_some_and(|advice| advice.len() > 10),
            "{text}"
        );
        for needle in said {
            assert!(text.contains(needle), "no '{needle}' in: {text}");
        }
        assert!(ran.logged(&["CRIT", &text]), "{:#?}", ran.log);
        assert_eq!(
            (ran.outcome.status(), ran.console.as_slice()),
            (14, &b"."[..]),
            "{script}"
        );
    }
}

#[test]
fn exits_without_a_word_in_the_script_language_are_internal_errors_too() {
    let debug = Exit::Debug {
        exception: 3,
        pc: 0x1234,
        dr6: 0,
        dr7: 0,
    };
    let malformed = Exit::Malformed {
        reason: 2,
        what: "its direction makes no sense",
    };
    for (exit, said) in [
        (debug, "exception 3 at 0x1234"),
        (malformed, "its direction makes no sense"),
    ] {
        let (script, _) = Script::new(vec![Step::Exit(exit)]);
        let ran = run_sources(vec![script], &Given::plain());
        let Outcome::InternalError(diagnosis) = &ran.outcome else {
            panic!("{:?}", ran.outcome)
        };
        assert!(diagnosis.to_string().contains(said), "{diagnosis}");
    }
}

#[test]
fn the_other_vcpus_end_when_one_cannot_go_on() {
    let (ran, _) = run_given(&["hlt", "unknown 1", "hlt", "in 3fd 1\nhlt"], &Given::plain());
    let Outcome::InternalError(diagnosis) = &ran.outcome else {
        panic!("{:?}", ran.outcome)
    };
    assert_eq!(diagnosis.vcpu, 1);
    assert!(
        !ran.logged(&["left behind"]) && ran.took < PROMPT,
        "{:#?}",
        ran.log
    );
}

#[test]
fn interruptions_go_on() {
    let ran = run(
        "eintr\neagain\nout 3f8 1 61\nintr\nwindow\nout 3f8 1 62\neagain\neintr\nin 3fd 1 60\nout f4 1 9",
    );
    assert!(matches!(ran.outcome, Outcome::GuestExit(9)), "{:?}", ran.outcome);
    assert_eq!(ran.console, b"ab");
}

#[test]
fn the_end_of_a_script_is_a_halt_and_the_timeout_ends_it() {
    for scripts in [&["hlt"][..], &["out 3f8 1 61"], &["hlt", "hlt", "hlt"]] {
        let given = Given {
            timeout: Duration::from_millis(200),
            ..Given::plain()
        };
        let (ran, _) = run_given(scripts, &given);
        assert!(
            matches!(ran.outcome, Outcome::TimedOut(State::Running)),
            "{:?}",
            ran.outcome
        );
        assert!(
            ran.took >= Duration::from_millis(200) && ran.took < PROMPT,
            "{:?}",
            ran.took
        );
        assert!(!ran.logged(&["left behind"]), "{:#?}", ran.log);
    }
}

/// Reads the serial port's status for ever.
struct Endless;

impl Source for Endless {
    fn next(&mut self) -> Option<Step> {
        Some(status_of_serial())
    }
    fn seen(&mut self, _: &Step, _: u64) {}
}

fn status_of_serial() -> Step {
    Step::In {
        port: 0x3fd,
        width: Width::Byte,
        count: 1,
        expect: None,
    }
}

#[test]
fn vcpus_that_never_rest_are_ended_by_the_timeout() {
    for (kind, given) in ways(&["serial0"]) {
        let given = Given {
            timeout: Duration::from_millis(200),
            ..given
        };
        let ran = run_sources(vec![Endless, Endless, Endless], &given);
        assert!(
            matches!(ran.outcome, Outcome::TimedOut(State::Running)),
            "{:?}",
            ran.outcome
        );
        assert!(
            ran.took < PROMPT && !ran.logged(&["left behind"]),
            "{kind}: {:?} {:#?}",
            ran.took,
            ran.log
        );
    }
}

// Placements.

#[test]
fn placements_and_disciplines_cannot_be_told_apart() {
    let script = "
        out 3fa 1 1\n in 3fa 1 c1\n out 3ff 1 5a\n in 3ff 1 5a
        outs 3f8 1 68 65 6c 6c 6f
        out 3fc 1 10\n out 3f8 1 7a\n in 3fd 1 61\n in 3f8 1 7a\n out 3fc 1 0
        out 70 1 d\n in 71 1 80
        out cf8 4 80000000\n in cfc 4 ffffffff
        in e9 1 e9\n in 64 1
        in 604 2 1\n out 602 2 100\n in 602 2 100
        in 505 1
        outs 3f8 1 21 0a
        out f4 1 2a
    ";
    let mut values = None;
    for (kind, given) in ways(&device_names(Default::default())) {
        let (ran, seen) = run_given(&[script], &given);
        assert!(
            matches!(ran.outcome, Outcome::GuestExit(0x2a)),
            "{kind}: {:?}",
            ran.outcome
        );
        assert_eq!(ran.console, b"hello!\n", "{kind}");
        assert!(ran.took < PROMPT, "{kind}: {:?}", ran.took);
        let seen: Vec<u64> = seen.iter().map(|seen| seen.value).collect();
        assert_eq!(*values.get_or_insert_with(|| seen.clone()), seen, "{kind}");
    }
}

/// Sends numbered bytes as a driver does, looking at the status before each; the last vCPU to finish ends the machine.
struct Hammer {
    vcpu: u8,
    sent: u32,
    wanted: u32,
    status: u64,
    looked: bool,
    switched: bool,
    working: Arc<AtomicUsize>,
    done: bool,
}

impl Source for Hammer {
    fn next(&mut self) -> Option<Step> {
        let out = |port, value: u8| Step::Out {
            port,
            width: Width::Byte,
            values: vec![value.into()],
        };
        if !self.switched {
            // The FIFO: so many bytes may come between a look and the write.
            self.switched = true;
            return Some(out(0x3fa, 1));
        }
        if self.sent == self.wanted {
            if std::mem::replace(&mut self.done, true) {
                return None;
            }
            return (self.working.fetch_sub(1, Ordering::SeqCst) == 1).then(|| out(0xf4, 1));
        }
        if std::mem::replace(&mut self.looked, false) && self.status & 0x20 != 0 {
            self.sent += 1;
            return Some(out(0x3f8, self.vcpu << 5 | ((self.sent - 1) % 32) as u8));
        }
        self.looked = true;
        Some(status_of_serial())
    }

    fn seen(&mut self, _: &Step, value: u64) {
        self.status = value;
    }
}

#[test]
fn many_vcpus_on_one_port_lose_nothing_and_keep_their_own_order() {
    const BYTES: u32 = 1000;
    for (kind, given) in ways(&["serial0"]) {
        for vcpus in 1..=8 {
            let working = Arc::new(AtomicUsize::new(vcpus));
            let hammer = |vcpu| Hammer {
                vcpu: vcpu as u8,
                sent: 0,
                wanted: BYTES,
                status: 0,
                looked: false,
                switched: false,
                working: working.clone(),
                done: false,
            };
            let ran = run_sources((0..vcpus).map(hammer).collect(), &given);
            assert!(
                matches!(ran.outcome, Outcome::GuestExit(1)),
                "{kind} {vcpus}: {:?}",
                ran.outcome
            );
            let mut next = [0u32; 8];
            for byte in &ran.console {
                let from = &mut next[usize::from(byte >> 5)];
                assert_eq!(u32::from(byte & 31), *from % 32, "{kind} {vcpus}");
                *from += 1;
            }
            assert_eq!(next[..vcpus], vec![BYTES; vcpus], "{kind} {vcpus}");
        }
    }
}

// Devices that fail. The interrupt line of the serial port is called in the middle of its device's turn.

/// Raises the serial port's line: the interrupt gate, then the transmitter's interrupt.
const RAISE: &str = "out 3fc 1 8\nout 3f9 1 2\n";

#[derive(Clone)]
enum Line {
    Panics,
    /// Says so, and waits until the sender is dropped.
    Waits(Sender<()>, Receiver<()>),
}

impl Lines for Line {
    type Error = StartError;

    fn edge(&self, gsi: u32) -> Result<Box<dyn InterruptLine>, StartError> {
        if gsi == actor_vmm::boot::layout::io::SERIAL0_IRQ {
            Ok(Box::new(self.clone()))
        } else {
            Unwired.edge(gsi)
        }
    }

    fn level(&self, gsi: u32) -> Result<Box<dyn InterruptLine>, StartError> {
        Unwired.level(gsi)
    }
}

impl InterruptLine for Line {
    fn set(&mut self, _: bool) {
        match self {
            Line::Panics => panic!("a test's line"),
            Line::Waits(began, until) => {
                let _ = began.try_send(());
                let _ = until.recv();
            }
        }
    }
}

#[test]
fn a_device_that_panics_is_named_reads_all_ones_and_the_machine_goes_on() {
    for kind in [PlacementKind::Handoff, PlacementKind::Thread, PlacementKind::Pool] {
        let given = Given {
            dispatch: Dispatch::Actor,
            placements: vec![("serial0".into(), kind)],
            timeout: LIMIT,
            lines: Line::Panics,
        };
        let script = format!(
            "out 3f8 1 61\n{RAISE}in 3fd 1 ff\nin 3f8 4 ffffffff\nout 3f8 1 62\nout 70 1 d\nin 71 1 80\nout f4 1 4"
        );
        // Another vCPU has the device in use meanwhile.
        let other = "in 3fd 1\n".repeat(200);
        let (ran, _) = run_given(&[&script, &other], &given);
        assert!(
            matches!(ran.outcome, Outcome::GuestExit(4)),
            "{kind}: {:?}",
            ran.outcome
        );
        assert_eq!(ran.console, b"a", "{kind}");
        assert!(
            ran.logged(&["ERRO", "device serial0 died", "all-ones", "a test's line"]),
            "{kind}: {:#?}",
            ran.log
        );
        assert!(
            !ran.logged(&["left behind"]) && ran.took < PROMPT,
            "{kind}: {:#?}",
            ran.log
        );
    }
}

/// A script that begins when something has happened.
struct After {
    after: Option<Receiver<()>>,
    script: Script,
}

impl Source for After {
    fn next(&mut self) -> Option<Step> {
        if let Some(after) = self.after.take() {
            let _ = after.recv_timeout(LIMIT);
        }
        self.script.next()
    }

    fn seen(&mut self, step: &Step, value: u64) {
        self.script.seen(step, value);
    }
}

#[test]
fn a_vcpu_stuck_in_a_device_is_named_with_it_and_does_not_hold_up_the_end() {
    for kind in [PlacementKind::Handoff, PlacementKind::Thread, PlacementKind::Pool] {
        for end in ["out f4 1 6", "shutdown", ""] {
            let (release, until) = bounded::<()>(0);
            let (began, is_stuck) = bounded::<()>(1);
            let given = Given {
                dispatch: Dispatch::Actor,
                placements: vec![("serial0".into(), kind)],
                timeout: if end.is_empty() {
                    Duration::from_secs(1)
                } else {
                    LIMIT
                },
                lines: Line::Waits(began, until),
            };
            // The second vCPU begins when the device is stuck, and ends the machine some time later: what the first one
            // does next is to wait for it.
            let other = format!("{}{end}", "in 1f0 1 ff\n".repeat(20_000));
            let stuck = format!("out 3f8 1 61\n{RAISE}in 3fd 1");
            let script = |text: &str| Script::new(Script::parse(text).unwrap()).0;
            let after = |after, text: &str| After {
                after,
                script: script(text),
            };
            let ran = run_sources(vec![after(None, &stuck), after(Some(is_stuck), &other)], &given);
            assert_eq!(
                ran.outcome.status(),
                [13, 12, 16][["out f4 1 6", "shutdown", ""]
                    .iter()
                    .position(|e| *e == end)
                    .unwrap()]
            );
            assert!(
                ran.logged(&["WARN", "vcpu0 did not end in time"])
                    && ran.logged(&["WARN", "device serial0 is stuck"]),
                "{kind}: {:#?}",
                ran.log
            );
            assert!(
                !ran.logged(&["vcpu1 did not"]) && !ran.logged(&["device rtc"]),
                "{:#?}",
                ran.log
            );
            let limit = PROMPT
                + if end.is_empty() {
                    given.timeout
                } else {
                    Duration::from_secs(1)
                };
            assert!(ran.took < limit, "{kind}: {:?}", ran.took);
            drop(release);
        }
    }
}

// One vCPU and devices of the test's own.

/// Sixteen bytes of memory that panic when the last is read.
#[derive(Default)]
struct Scratch([u8; 16]);

impl Device for Scratch {
    fn name(&self) -> &'static str {
        "scratch"
    }
    fn read(&mut self, _: &mut dyn Context, access: Access) -> u64 {
        let at = access.offset as usize;
        assert!(at + access.width.bytes() < 16, "the last byte is not to be read");
        let mut value = [0; 8];
        value[..access.width.bytes()].copy_from_slice(&self.0[at..at + access.width.bytes()]);
        u64::from_le_bytes(value)
    }
    fn write(&mut self, _: &mut dyn Context, access: Access, value: u64) {
        let at = access.offset as usize;
        self.0[at..at + access.width.bytes()].copy_from_slice(&value.to_le_bytes()[..access.width.bytes()]);
    }
    fn reset(&mut self, _: &mut dyn Context) {}
}

struct Single {
    handle: VcpuHandle,
    news: Receiver<VcpuNews>,
    thread: JoinHandle<()>,
    died: Receiver<String>,
}

impl Single {
    /// A vCPU that plays `source`, with a [`Scratch`] at memory 0xd0000000 and port 0x100.
    fn start<S: Source + 'static>(source: S, placement: Placement) -> Single {
        kick::install_handler().unwrap();
        let clock = Clock::new();
        let outside = Surroundings {
            life: None,
            clock: clock.clone(),
            line: None,
            character: None,
            timer: None,
            requests: Box::new(|_| {}),
        };
        let (obituaries, died) = unbounded();
        let shell = Shell::new(Box::<Scratch>::default(), outside);
        let scratch = Address::spawn(shell, "scratch", placement, 2, move |obituary| {
            obituaries
                .send(format!("{}: {}", obituary.actor, obituary.cause))
                .unwrap();
        })
        .unwrap();
        let mut table = RoutingTable::new(clock, kept_log().0);
        let device = table.connect(scratch.address.connect().unwrap());
        for (space, start) in [(Space::Mmio, 0xd000_0000), (Space::Pio, 0x100)] {
            let route = Route {
                start,
                last: start + 15,
                base: 0,
                target: Target::Device {
                    device,
                    classify: |_, _| AccessClass::Post,
                },
            };
            table.insert(space, route).unwrap();
        }
        let (handle, inbox) = vcpu_mailbox();
        let (tell, news) = unbounded();
        let sink = Box::new(move |what| drop(tell.send(what)));
        let thread = std::thread::spawn(move || {
            Vcpu::new(0, ScriptedBackend::new(source), table, inbox, sink).run();
        });
        let single = Single {
            handle,
            news,
            thread,
            died,
        };
        assert!(matches!(single.news(), VcpuEvent::Ready));
        single
    }

    fn news(&self) -> VcpuEvent {
        self.news.recv_timeout(LIMIT).expect("news").what
    }

    fn send(&self, message: VcpuMessage) {
        assert!(self.handle.send(message));
    }

    fn end(self) {
        let begin = Instant::now();
        self.send(VcpuMessage::Stop);
        assert!(matches!(self.news(), VcpuEvent::Stopped(_)));
        self.thread.join().unwrap();
        assert!(begin.elapsed() < PROMPT);
    }
}

#[test]
fn memory_accesses_of_any_length_reach_their_device() {
    let script = "
        write d0000000 8 1122334455667788
        read d0000000 8 1122334455667788
        read d0000000 4 55667788
        read d0000002 2 5566
        read d0000003 1 55
        read d0000001 3 556677
        write d0000001 5 a5a4a3a2a1
        read d0000000 8 1122a5a4a3a2a188
        read d0000010 4 ffffffff
        in 102 2 a3a2
        ins 104 1 2
        unknown 1
    ";
    for placement in [
        Placement::Handoff,
        Placement::Thread,
        Placement::Pool(Pool::new(2).unwrap()),
    ] {
        let (script, seen) = Script::new(Script::parse(script).unwrap());
        let single = Single::start(script, placement);
        single.send(VcpuMessage::Lifecycle(Lifecycle::Start));
        assert!(matches!(single.news(), VcpuEvent::Halted(_)));
        let wrong: Vec<_> = seen.try_iter().filter(Seen::is_wrong).collect();
        assert!(wrong.is_empty(), "{wrong:x?}");
        single.end();
    }
}

#[test]
fn a_read_that_panics_in_the_middle_of_a_script_gives_all_ones_from_then_on() {
    let script = "in 100 1 0\nin 10f 1 ff\nin 100 1 ff\nread d0000000 8 ffffffffffffffff\nwrite d0000000 1 1\nunknown 1";
    for placement in [
        Placement::Handoff,
        Placement::Thread,
        Placement::Pool(Pool::new(2).unwrap()),
    ] {
        let (script, seen) = Script::new(Script::parse(script).unwrap());
        let single = Single::start(script, placement);
        single.send(VcpuMessage::Lifecycle(Lifecycle::Start));
        assert!(matches!(single.news(), VcpuEvent::Halted(_)));
        let seen: Vec<_> = seen.try_iter().collect();
        assert!(seen.len() == 4 && !seen.iter().any(Seen::is_wrong), "{seen:x?}");
        let obituary = single.died.recv_timeout(LIMIT).unwrap();
        assert_eq!(obituary, "scratch: the last byte is not to be read");
        single.end();
    }
}

/// Reads and writes a port for ever, and counts.
struct Counting(Arc<AtomicUsize>);

impl Source for Counting {
    fn next(&mut self) -> Option<Step> {
        let count = self.0.fetch_add(1, Ordering::Relaxed);
        Some(if count.is_multiple_of(2) {
            Step::In {
                port: 0x100,
                width: Width::Byte,
                count: 1,
                expect: None,
            }
        } else {
            Step::Out {
                port: 0x101,
                width: Width::Byte,
                values: vec![1],
            }
        })
    }
    fn seen(&mut self, _: &Step, _: u64) {}
}

#[test]
fn a_running_vcpu_pauses_and_resumes_whenever_it_is_kicked() {
    let count = Arc::new(AtomicUsize::new(0));
    let single = Single::start(Counting(count.clone()), Placement::Handoff);
    single.send(VcpuMessage::Lifecycle(Lifecycle::Start));
    let goes_on = || {
        let (now, begin) = (count.load(Ordering::Relaxed), Instant::now());
        while count.load(Ordering::Relaxed) == now {
            assert!(begin.elapsed() < LIMIT, "it does not run");
            std::thread::yield_now();
        }
    };
    for round in 0..500 {
        goes_on();
        // Kicks without a message change nothing.
        for _ in 0..round % 4 {
            single.handle.kick();
        }
        single.send(VcpuMessage::Lifecycle(Lifecycle::Pause));
        assert!(matches!(single.news(), VcpuEvent::Paused));
        let paused = count.load(Ordering::Relaxed);
        single.handle.kick();
        std::thread::yield_now();
        assert_eq!(
            count.load(Ordering::Relaxed),
            paused,
            "it runs while it is paused"
        );
        single.send(VcpuMessage::Lifecycle(Lifecycle::Resume));
    }
    goes_on();
    single.end();
}

#[test]
fn a_sleeping_vcpu_hears_a_kick_too() {
    let (script, _) = Script::new(Script::parse("hlt").unwrap());
    let single = Single::start(script, Placement::Handoff);
    single.send(VcpuMessage::Lifecycle(Lifecycle::Start));
    for _ in 0..200 {
        single.send(VcpuMessage::Lifecycle(Lifecycle::Pause));
        assert!(matches!(single.news(), VcpuEvent::Paused));
        single.send(VcpuMessage::Lifecycle(Lifecycle::Resume));
    }
    single.end();
}

/// A bug in a backend.
struct Buggy;

impl Source for Buggy {
    fn next(&mut self) -> Option<Step> {
        panic!("a test's backend")
    }
    fn seen(&mut self, _: &Step, _: u64) {}
}

#[test]
fn a_vcpu_that_panics_is_an_internal_error_of_the_machine() {
    let ran = run_sources(vec![Buggy], &Given::plain());
    let Outcome::InternalError(diagnosis) = &ran.outcome else {
        panic!("{:?}", ran.outcome)
    };
    let text = diagnosis.to_string();
    assert!(
        text.contains("its thread panicked: a test's backend") && text.contains("please report it"),
        "{text}"
    );
    assert!(ran.took < PROMPT);
}
