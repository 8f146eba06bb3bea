//! `--control` and `actor-vmm ctl`, with the program itself and a guest on this host's KVM: the socket, its clients, and
//! signals.
//!
//! A host without `/dev/kvm` skips all of it and says so; under CI that is a failure. Limits of time are against hangs
//! only.

#[path = "host/kvm.rs"]
mod kvm;

use kvm::have_kvm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_actor-vmm");
/// Hang protection.
const LIMIT: Duration = Duration::from_secs(60);

/// A directory of one test, gone with the value.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let path = std::env::temp_dir().join(format!("actor-vmm-ctl-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Place(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("ctl")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A machine in a process of its own. Killed when it is dropped early.
struct Machine {
    child: Child,
    socket: PathBuf,
}

impl Machine {
    fn start(place: &Place, args: &[&str]) -> Machine {
        let socket = place.socket();
        let child = Command::new(PROGRAM)
            .args(["run", "--timeout", "120", "--memory", "16M", "--control"])
            .arg(&socket)
            .args(args)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(place.0.join("out")).unwrap())
            .stderr(std::fs::File::create(place.0.join("err")).unwrap())
            .spawn()
            .unwrap();
        let mut machine = Machine { child, socket };
        machine.wait_until("there is no socket", |machine| {
            UnixStream::connect(&machine.socket).is_ok()
        });
        machine.wait_until("it does not run", |machine| machine.state() == "running");
        machine
    }

    #[track_caller]
    fn wait_until(&mut self, what: &str, mut is: impl FnMut(&mut Machine) -> bool) {
        let begin = Instant::now();
        while !is(self) {
            assert!(begin.elapsed() < LIMIT, "{what}");
            assert!(self.child.try_wait().unwrap().is_none(), "it has ended; {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn state(&self) -> String {
        let status = ctl(&self.socket, &["status", "--json"]);
        let body: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
        body["state"].as_str().unwrap_or("?").to_string()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    #[track_caller]
    fn end(&mut self) -> Option<i32> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begin.elapsed() < LIMIT, "it does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ctl(socket: &Path, words: &[&str]) -> Output {
    Command::new(PROGRAM)
        .arg("ctl")
        .arg(socket)
        .args(words)
        .output()
        .unwrap()
}

#[track_caller]
fn ctl_ok(socket: &Path, words: &[&str]) -> String {
    let output = ctl(socket, words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A client that speaks for itself.
struct Client(BufReader<UnixStream>);

impl Client {
    fn new(socket: &Path) -> Client {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Client(BufReader::new(stream))
    }

    fn say(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    /// The next answer; null at the end.
    fn hear(&mut self) -> Value {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Value::Null,
            Ok(_) => serde_json::from_str(&line).unwrap(),
            Err(error) => panic!("{error}"),
        }
    }
}

fn text(place: &Place, name: &str) -> String {
    String::from_utf8_lossy(&std::fs::read(place.0.join(name)).unwrap_or_default()).into_owned()
}

const GUEST: [&str; 4] = ["--guest", "churn", "--cpus", "4"];

#[test]
fn every_verb_does_what_it_says() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("verbs");
    let mut machine = Machine::start(&place, &GUEST);
    let socket = place.socket();
    assert_eq!(
        std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let status = ctl_ok(&socket, &["status"]);
    assert!(
        status.contains("state: running") && status.contains("vcpus: 4"),
        "{status}"
    );
    assert_eq!(ctl_ok(&socket, &["kick"]), "vcpus: 4\n");
    assert_eq!(ctl_ok(&socket, &["pause"]), "state: paused\n");
    let why = ctl_ok(&socket, &["why"]);
    assert!(
        why.contains("the machine is paused") && why.contains("vcpu3: sleeps on its mailbox"),
        "{why}"
    );
    // Guest time stands.
    let time = |status: &str| {
        status
            .lines()
            .find(|line| line.starts_with("guest_time_ns"))
            .unwrap()
            .to_string()
    };
    let status = ctl_ok(&socket, &["status"]);
    assert_eq!(time(&status), time(&ctl_ok(&socket, &["status"])));
    let refused = ctl(&socket, &["pause"]);
    assert_eq!(refused.status.code(), Some(4));
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("a machine that is paused cannot be paused"),
        "{refused:?}"
    );
    assert_eq!(ctl_ok(&socket, &["reset"]), "state: paused\n");
    assert_eq!(ctl_ok(&socket, &["resume"]), "state: running\n");
    assert_eq!(ctl_ok(&socket, &["reset"]), "state: running\n");
    let actors = ctl_ok(&socket, &["actors"]);
    for name in ["machine", "vcpu0", "vcpu3", "serial0", "rtc", "events"] {
        assert!(
            actors.lines().any(|line| line.starts_with(name)),
            "no {name}: {actors}"
        );
    }
    let metrics = ctl_ok(&socket, &["metrics", "--json"]);
    let metrics: Value = serde_json::from_str(&metrics).unwrap();
    assert!(
        metrics["exits"].as_u64().unwrap() > 0 && metrics["resets"] == 2,
        "{metrics}"
    );
    assert_eq!(ctl_ok(&socket, &["stop"]), "state: stopping\n");
    assert_eq!(machine.end(), Some(20));
    assert!(!socket.exists());
    // Nobody is there any more.
    let gone = ctl(&socket, &["status"]);
    assert_eq!(gone.status.code(), Some(18));
    assert!(
        String::from_utf8_lossy(&gone.stderr).contains("no such socket"),
        "{gone:?}"
    );
}

/// `ctl PATH -` with this on stdin.
fn script(socket: &Path, text: &[u8], words: &[&str]) -> Output {
    let mut child = Command::new(PROGRAM)
        .arg("ctl")
        .arg(socket)
        .arg("-")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let text = text.to_vec();
    // It may have ended before it has read all.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&text)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

#[test]
fn verbs_from_stdin_are_done_one_after_the_other_until_one_cannot_be_done() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("script");
    let mut machine = Machine::start(&place, &GUEST);
    let socket = place.socket();
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    // Many, and each waits for the one before: a pause of a machine that is not running yet would be refused.
    let output = script(&socket, &b"pause\nresume\n".repeat(500), &[]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "state: paused\nstate: running\n".repeat(500)
    );
    let output = script(&socket, b"# as JSON\n\n kick # all\npause", &["--json"]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "{\"vcpus\":4}\n{\"state\":\"paused\"}\n"
    );
    // Nothing at all is done well, if there is a machine.
    assert!(script(&socket, b"", &[]).status.success());
    // The first that is refused is the last.
    let output = script(&socket, b"kick\n\npause\nresume\n", &[]);
    assert_eq!(output.status.code(), Some(4));
    assert!(
        said(&output).contains("line 3: a machine that is paused cannot be paused"),
        "{}",
        said(&output)
    );
    assert_eq!(
        (output.stdout.as_slice(), machine.state()),
        (&b"vcpus: 4\n"[..], "paused".into())
    );
    // So is one that there is not, whatever is behind it.
    for (text, what) in [
        (
            &b"resume\nfly\nstop\n"[..],
            "line 2: there is no verb 'fly'; there are status, pause",
        ),
        (b"kick\npause resume\n", "line 2: nothing comes behind 'pause'"),
        (
            b"link net0 sideways\n",
            "line 1: link needs a device and how it is to be",
        ),
        (b"\xff\0\n", "line 1: there is no verb"),
        (&[b'x'; 100_000], "line 1: a line is one verb"),
    ] {
        let output = script(&socket, text, &[]);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(what), "{}", said(&output));
    }
    assert_eq!(machine.state(), "running");
    // A directory cannot be read.
    let output = Command::new(PROGRAM)
        .arg("ctl")
        .arg(&socket)
        .arg("-")
        .stdin(std::fs::File::open(&place.0).unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        said(&output).contains("line 1 cannot be read: Is a directory"),
        "{}",
        said(&output)
    );
    // What a verb is about comes behind it, in a script as on the command line.
    let output = script(&socket, b"link net0 down # there is no network\n", &[]);
    assert_eq!(output.status.code(), Some(4));
    assert!(
        said(&output).contains("line 1: the machine has no such device"),
        "{}",
        said(&output)
    );
    for (words, status, what) in [
        (&["link", "net7", "up"][..], 4, "the machine has no such device"),
        (
            &["link", "net7"],
            2,
            "link needs a device and how it is to be: link net0 down, or up",
        ),
        (&["pause", "now"], 2, "nothing comes behind 'pause'"),
        (&["-", "now"], 2, "nothing comes behind '-'"),
    ] {
        let output = ctl(&socket, words);
        assert_eq!(output.status.code(), Some(status), "{words:?}");
        assert!(said(&output).contains(what), "{}", said(&output));
    }
    // What has ended answers no more.
    let output = script(&socket, b"stop\nstatus\n", &[]);
    assert_eq!(output.status.code(), Some(18));
    assert_eq!(output.stdout, b"state: stopping\n");
    assert!(
        said(&output).contains("line 2: the machine has gone away"),
        "{}",
        said(&output)
    );
    assert_eq!(machine.end(), Some(20));
    assert_eq!(script(&socket, b"", &[]).status.code(), Some(18));
}

#[test]
fn answers_that_cannot_be_written_are_told_and_end_a_script() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("full");
    let machine = Machine::start(&place, &["--guest", "churn"]);
    let socket = place.socket();
    let run = |words: &[&str], stdin: Stdio, stdout: Stdio| {
        let mut command = Command::new(PROGRAM);
        command
            .arg("ctl")
            .arg(&socket)
            .args(words)
            .stdin(stdin)
            .stdout(stdout);
        let output = command.stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    let full = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").unwrap());
    let nobody = || Stdio::from(std::io::pipe().unwrap().1);
    let verbs = |text: &str| {
        std::fs::write(place.0.join("verbs"), text).unwrap();
        Stdio::from(std::fs::File::open(place.0.join("verbs")).unwrap())
    };
    let told = "actor-vmm: cannot write to stdout: No space left on device (os error 28)\n";
    for words in [&["status"][..], &["status", "--json"], &["kick"]] {
        let (status, said) = run(words, Stdio::null(), full());
        assert_eq!((status, said.as_str()), (Some(18), told), "{words:?}");
        // Who has left has seen enough.
        let (status, said) = run(words, Stdio::null(), nobody());
        assert_eq!((status, said.as_str()), (Some(0), ""), "{words:?}");
    }
    // What was done is done; what is behind is not.
    for (stdout, expected) in [(full(), (Some(18), told)), (nobody(), (Some(141), ""))] {
        let (status, said) = run(&["-"], verbs("pause\nresume\n"), stdout);
        assert_eq!((status, said.as_str()), expected);
        assert_eq!(machine.state(), "paused");
        ctl_ok(&socket, &["resume"]);
    }
    // Refused, with nobody who reads: it is the refusal that counts.
    let (status, said) = run(&["-"], verbs("link net0 up\n"), full());
    assert_eq!(status, Some(4), "{said}");
}

#[test]
fn clients_that_are_broken_slow_or_silent_harm_nobody() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("clients");
    let mut machine = Machine::start(&place, &["--guest", "churn"]);
    let socket = place.socket();
    // Silent ones, more than there is room for; they are kept open.
    let silent: Vec<_> = (0..40).map(|_| Client::new(&socket)).collect();
    // One that leaves in the middle, one with garbage, one without an end of its line.
    Client::new(&socket).say(b"{\"verb\": \"sta");
    let mut garbage = Client::new(&socket);
    garbage.say(b"\xff\x00\nnonsense\n{\"verb\": \"fly\", \"id\": \"x\"}\n");
    assert_eq!(garbage.hear()["error"]["kind"], "malformed");
    assert_eq!(garbage.hear()["error"]["kind"], "malformed");
    let answer = garbage.hear();
    assert_eq!(
        (&answer["error"]["kind"], &answer["id"]),
        (&"unknown-verb".into(), &"x".into())
    );
    let mut endless = Client::new(&socket);
    endless.say(&[b'x'; 5000]);
    assert_eq!(endless.hear()["error"]["kind"], "too-long");
    assert_eq!(endless.hear(), Value::Null, "it is not hung up on");
    // One that asks without reading, until it cannot: it holds up itself.
    let mut deaf = UnixStream::connect(&socket).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let request = b"{\"verb\": \"actors\"}\n".repeat(100);
    let begin = Instant::now();
    let mut sent = 0;
    while begin.elapsed() < LIMIT {
        match deaf.write(&request) {
            Ok(bytes) => sent += bytes,
            Err(_) if ctl(&socket, &["status"]).status.success() && deaf.write(&request).is_err() => break,
            Err(_) => {}
        }
    }
    assert!(
        begin.elapsed() < LIMIT,
        "it takes {sent} bytes and more without an end"
    );
    // Many requests at once, answered with their ids; the same requests by several clients at once.
    let mut clients: Vec<_> = (0..4).map(|_| Client::new(&socket)).collect();
    for client in &mut clients {
        for id in 0..50 {
            client.say(format!("{{\"verb\": \"status\", \"id\": {id}}}\n").as_bytes());
        }
    }
    for client in &mut clients {
        for id in 0..50 {
            let answer = client.hear();
            assert_eq!(
                (&answer["id"], &answer["ok"]["state"]),
                (&id.into(), &"running".into())
            );
        }
    }
    // One that has shut down its side still gets its answer.
    let mut half = Client::new(&socket);
    half.say(b"{\"verb\": \"status\"}\n");
    half.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(half.hear()["ok"]["state"], "running");
    assert_eq!(half.hear(), Value::Null);
    assert_eq!(machine.state(), "running");
    // So does one that has sent more than is served at once (8 requests), or whose answers are more than are kept for it
    // (64 KiB), and it need not end its last line.
    for (verbs, times) in [(["pause", "resume"], 20), (["actors", "why"], 500)] {
        let lines = (0..times).flat_map(|_| verbs).enumerate();
        let lines = lines.map(|(id, verb)| format!("{{\"verb\": \"{verb}\", \"id\": {id}}}"));
        let mut half = Client::new(&socket);
        half.say(lines.collect::<Vec<_>>().join("\n").as_bytes());
        half.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
        // A pause that a resume overtakes is answered too: by that.
        let mut ids: Vec<_> = (0..2 * times).map(|_| half.hear()["id"].as_u64()).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..2 * times).map(Some).collect::<Vec<_>>(), "{verbs:?}");
        assert_eq!(half.hear(), Value::Null);
    }
    assert_eq!(machine.state(), "running");
    machine.signal(Signal::SIGTERM);
    assert_eq!(machine.end(), Some(143));
    assert!(!socket.exists());
    drop((silent, deaf));
}

#[test]
fn a_killed_machine_leaves_a_name_that_the_next_one_takes_and_a_live_one_keeps_its() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("stale");
    let socket = place.socket();
    let mut first = Machine::start(&place, &["--guest", "spin"]);
    first.signal(Signal::SIGKILL);
    assert_eq!(first.end(), None);
    assert!(socket.exists(), "SIGKILL leaves it, or this tests nothing");
    let second = Machine::start(&place, &["--guest", "spin"]);
    // A third one does not get it, and the second keeps it.
    let third = Command::new(PROGRAM)
        .args(["run", "--guest", "spin", "--control"])
        .arg(&socket)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&third.stderr);
    assert_eq!(third.status.code(), Some(2), "{said}");
    assert!(said.contains("another program listens there"), "{said}");
    assert_eq!(second.state(), "running");
}

#[test]
fn signals_end_dump_or_do_nothing() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("signals");
    for (signal, status) in [
        (Signal::SIGINT, 130),
        (Signal::SIGTERM, 143),
        (Signal::SIGHUP, 129),
        (Signal::SIGQUIT, 131),
    ] {
        let mut machine = Machine::start(&place, &GUEST);
        for harmless in [Signal::SIGWINCH, Signal::SIGPIPE, Signal::SIGCONT] {
            machine.signal(harmless);
        }
        machine.signal(Signal::SIGUSR1);
        machine.wait_until("no dump", |_| {
            let log = text(&place, "err");
            log.contains("the machine is running") && log.contains("vcpu3: ")
        });
        // In a paused machine too.
        if signal == Signal::SIGINT {
            ctl_ok(&place.socket(), &["pause"]);
        }
        machine.signal(signal);
        assert_eq!(machine.end(), Some(status));
        assert!(!place.socket().exists());
    }
}

#[test]
fn a_machine_with_a_stuck_device_is_stopped_by_a_signal_and_why_names_it() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("tarpit");
    for end in ["signal", "ctl", "twice"] {
        // The best of some: the host may be busy.
        let mut best = Duration::MAX;
        for _ in 0..5 {
            best = best.min(end_stuck(&place, end));
            if best < STOP_LIMIT {
                break;
            }
        }
        assert!(best < STOP_LIMIT, "{end}: {best:?}");
    }
}

/// What a machine that is stopped has, to be gone, though a device blocks for ever.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Ends a machine with a stuck device in that way, and tells how long it took.
fn end_stuck(place: &Place, end: &str) -> Duration {
    let mut machine = Machine::start(place, &["--guest", "tarpit", "--test-tarpit"]);
    let socket = place.socket();
    machine.wait_until("why does not name it", |_| {
        ctl_ok(&socket, &["why"]).contains("tarpit's turn is run by vcpu0, which came with in 0xf6/1")
    });
    if end == "twice" {
        let waits = ctl(&socket, &["pause"]);
        assert_eq!(waits.status.code(), Some(4));
        let said = String::from_utf8_lossy(&waits.stderr);
        let words = "waits for vcpu0 to pause (it is at tarpit with in 0xf6/1, for ";
        assert!(said.contains(words), "{said}");
        // By a thread of its own.
        machine.wait_until("the log does not say it", |_| {
            text(place, "err").contains(&format!("a pause is not complete: it {words}"))
        });
    }
    let begin = Instant::now();
    match end {
        "signal" => machine.signal(Signal::SIGTERM),
        "ctl" => drop(ctl_ok(&socket, &["stop"])),
        _ => {
            machine.signal(Signal::SIGTERM);
            machine.signal(Signal::SIGTERM);
        }
    }
    let status = machine.end();
    let took = begin.elapsed();
    assert_eq!(status, Some(if end == "ctl" { 20 } else { 143 }), "{end}");
    if end == "signal" {
        let log = text(place, "err");
        assert!(log.contains("device tarpit is stuck in an access"), "{log}");
    }
    took
}

#[test]
fn a_reset_by_the_guest_reboots_it_in_place_until_somebody_stops_it() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("reboot");
    let mut machine = Machine::start(&place, &["--guest", "reset_acpi", "--on-reset", "reset"]);
    let socket = place.socket();
    machine.wait_until("it does not reboot", |_| {
        let status = ctl(&socket, &["status", "--json"]);
        let body: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
        body["resets"].as_u64() >= Some(100)
    });
    assert!(ctl(&socket, &["stop"]).status.success());
    assert_eq!(machine.end(), Some(20));
}

#[test]
fn a_signal_during_boot_ends_it_and_leaves_no_socket() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("boot");
    // At every moment of a start, from before there is a socket on.
    for delay_us in (0..40).map(|step| step * 500) {
        let mut child = Command::new(PROGRAM)
            .args([
                "run",
                "--guest",
                "churn",
                "--cpus",
                "4",
                "--memory",
                "16M",
                "--control",
            ])
            .arg(place.socket())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(delay_us));
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            assert!(begin.elapsed() < LIMIT, "it does not end after {delay_us} us");
            std::thread::sleep(Duration::from_millis(1));
        };
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        // Before it listens to signals the default is the same end.
        use std::os::unix::process::ExitStatusExt;
        assert!(
            status.code() == Some(143) || status.signal() == Some(15),
            "{status:?} after {delay_us} us: {said}"
        );
        if status.code() == Some(143) {
            assert!(!place.socket().exists(), "after {delay_us} us");
        }
    }
}

#[test]
fn a_sigbus_that_somebody_sends_kills_as_it_does_any_program() {
    if !have_kvm() {
        return;
    }
    let place = Place::new("bus");
    let mut machine = Machine::start(&place, &["--guest", "spin"]);
    machine.signal(Signal::SIGBUS);
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = machine.child.try_wait().unwrap() {
            break status;
        }
        assert!(begin.elapsed() < LIMIT, "it does not end");
        std::thread::sleep(Duration::from_millis(2));
    };
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(status.signal(), Some(libc::SIGBUS));
}
