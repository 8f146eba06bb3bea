//! Running one scenario.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::cpio::Archive;
use harness::protocol::Event;
use harness::scenario::{Scenario, Step};

use crate::report::Report;
use crate::vmm::{DRAIN, Kind, Vmm};
use crate::{host, vmm};

const WORK: &str = "/run/work";
const CONSOLE: &str = "/run/work/console";
/// A guest whose script calls one of these gets it. It is this program, by another name.
const IN_GUEST: [&str; 4] = ["file-exerciser", "port-meter", "vsock-peer", "witness"];
const BASE_INITRD: &str = "/guest/base.cpio";
/// How the titles of scripts' outputs begin.
const SCRIPT: &str = "script ";
/// A console that says more than this is cut in the report: the serial port is slow.
const EVIDENCE_LIMIT: usize = 48 * 1024;
#[derive(Default)]
pub struct Options {
    pub vmm: Kind,
    /// Send the guest's console as it comes.
    pub live: bool,
    /// Pass on to the VMM what is typed on the host side.
    pub interactive: bool,
}

pub fn scenario(scenario: &Scenario, options: &Options, report: &Report) {
    report.send(&Event::Start {
        job: scenario.name.clone(),
        limit: scenario.limit + 2 * scenario.script_limit,
    });
    let started = Instant::now();
    let mut evidence = Evidence::default();
    let outcome = attempt(scenario, options, report, &mut evidence);
    let millis = started.elapsed().as_millis() as u64;
    let job = scenario.name.clone();
    match outcome {
        Ok(note) => report.send(&Event::Pass { job, millis, note }),
        Err(error) => {
            report.send(&Event::Fail {
                job,
                millis,
                reason: format!("{error:#}"),
            });
            for (title, text) in evidence.0 {
                let start = text.len().saturating_sub(EVIDENCE_LIMIT);
                let mut part = Vec::new();
                if start > 0 {
                    part.extend_from_slice(format!("[{start} bytes left out]\n").as_bytes());
                }
                part.extend_from_slice(&text[start..]);
                report.send(&Event::Evidence { title, text: part });
            }
        }
    }
}

/// What is worth reading after a failure.
#[derive(Default)]
struct Evidence(Vec<(String, Vec<u8>)>);

impl Evidence {
    fn add(&mut self, title: &str, text: &[u8]) {
        if !text.is_empty() {
            self.0.push((title.to_owned(), text.to_vec()));
        }
    }

    /// What scripts of the emulated host have written.
    fn scripts(&self) -> impl Iterator<Item = std::borrow::Cow<'_, str>> {
        let scripts = self.0.iter().filter(|(title, _)| title.starts_with(SCRIPT));
        scripts.map(|(_, text)| String::from_utf8_lossy(text))
    }
}

fn attempt(
    scenario: &Scenario,
    options: &Options,
    report: &Report,
    evidence: &mut Evidence,
) -> Result<String> {
    // The last scenario's directory, if there was one.
    let _ = fs::remove_dir_all(WORK);
    fs::create_dir_all(WORK)?;
    let initrd = initrd(scenario)?;
    if !scenario.before.is_empty() {
        script("before", &scenario.before, scenario, None, evidence)?;
    }
    let typed = if options.interactive {
        Some(report.typed()?)
    } else {
        None
    };
    let processes: BTreeSet<i32> = host::user_processes().into_iter().map(|(pid, _)| pid).collect();
    let files = files();

    let command = options.vmm.command(scenario, &initrd);
    let mut vmm = Vmm::start(command, scenario.stdin)?;
    let mut live = |bytes: &[u8]| {
        if options.live {
            report.send(&Event::Console(bytes.to_vec()));
        }
    };
    let outcome = drive(scenario, &mut vmm, typed, &mut live, evidence);
    let status = match &outcome {
        Ok(_) => vmm.status(),
        Err(_) => {
            vmm.signal(libc::SIGKILL);
            vmm.status()
        }
    };
    fs::write(CONSOLE, &vmm.out)?;
    evidence.add("guest console", &vmm.out);
    evidence.add("VMM's stderr", &vmm.err);
    let last_step = outcome?;
    let status = status?;

    let mut wrong = Vec::new();
    let knows_statuses = options.vmm == Kind::ActorVmm;
    if let Some(expected) = scenario.status
        && knows_statuses
        && status != expected
    {
        wrong.push(format!("exit status {status} instead of {expected}"));
    }
    let ended = vmm.exited.unwrap_or_else(Instant::now);
    let end_ms = ended.saturating_duration_since(last_step).as_millis() as u64;
    if let Some(limit) = scenario.ends_within_ms
        && end_ms > limit
    {
        wrong.push(format!(
            "took {end_ms} ms to end after the last step, more than {limit}"
        ));
    }
    let console = String::from_utf8_lossy(&vmm.out);
    for pattern in scenario.expect.iter().map(|p| scenario.substitute(p)) {
        if !console.contains(&pattern) {
            wrong.push(format!("the console lacks \"{}\"", pattern.escape_debug()));
        }
    }
    for pattern in scenario.reject.iter().map(|p| scenario.substitute(p)) {
        if let Some(line) = console.lines().find(|line| line.contains(&pattern)) {
            wrong.push(format!("the console has \"{}\"", line.trim().escape_debug()));
        }
    }
    if vmm.terminal_changed() == Some(true) && knows_statuses {
        wrong.push("the terminal was not put back into its old state".to_owned());
    }
    host::reap_orphans();
    for (pid, name) in host::user_processes() {
        if !processes.contains(&pid) {
            wrong.push(format!("process {pid} ({name}) was left behind"));
            // The next scenario shall not suffer from it.
            // SAFETY: a signal to a process that did not exist before the VMM.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
    for file in self::files().difference(&files) {
        wrong.push(format!("{file} was left behind"));
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("; "));
    }
    if !scenario.after.is_empty() {
        script("after", &scenario.after, scenario, Some(&vmm), evidence)?;
    }
    let mut note = match scenario.ends_within_ms {
        Some(_) => format!("ended {end_ms} ms after the last step, status {status}"),
        None => format!("status {status}"),
    };
    // What the guest measured, and what was measured around it.
    let scripts: String = evidence.scripts().collect();
    let lines = console.lines().chain(scripts.lines());
    for figure in lines.filter_map(|line| line.strip_prefix("figure: ")) {
        note.push_str(&format!("; {}", figure.trim()));
    }
    Ok(note)
}

/// Does the steps and waits for the end; returns when the last step was done.
fn drive(
    scenario: &Scenario,
    vmm: &mut Vmm,
    typed: Option<Receiver<Vec<u8>>>,
    live: &mut dyn FnMut(&[u8]),
    evidence: &mut Evidence,
) -> Result<Instant> {
    let deadline = vmm.started + Duration::from_secs(scenario.limit);
    let mut seen = Seen::default();
    for step in &scenario.steps {
        do_step(step, scenario, vmm, deadline, &mut seen, live, evidence)?;
    }
    let last_step = Instant::now();
    while vmm.exited.is_none() {
        // Typed text is looked for ten times a second, as somebody who types will not notice.
        let turn = match &typed {
            Some(typed) => {
                while let Ok(bytes) = typed.try_recv() {
                    vmm.type_in(bytes)?;
                }
                deadline.min(Instant::now() + Duration::from_millis(100))
            }
            None => deadline,
        };
        if !vmm.step(turn, live) && Instant::now() >= deadline {
            bail!("still running after {} s", scenario.limit);
        }
    }
    let drain = Instant::now() + DRAIN;
    while !vmm.drained() && vmm.step(drain, live) {}
    // What is there already may still be taken in, without waiting.
    while vmm.step(Instant::now(), live) {}
    Ok(last_step)
}

fn do_step(
    step: &Step,
    scenario: &Scenario,
    vmm: &mut Vmm,
    deadline: Instant,
    seen: &mut Seen,
    live: &mut dyn FnMut(&[u8]),
    evidence: &mut Evidence,
) -> Result<()> {
    let waits = [
        (&step.wait, Stream::Console, &mut seen.console),
        (&step.wait_log, Stream::Log, &mut seen.log),
    ];
    for (pattern, stream, seen) in waits {
        if let Some(pattern) = pattern {
            wait(
                &scenario.substitute(pattern),
                stream,
                scenario,
                vmm,
                deadline,
                seen,
                live,
            )?;
        }
    }
    if let Some(millis) = step.sleep_ms {
        let until = Instant::now() + Duration::from_millis(millis);
        while vmm.step(until, live) {}
    }
    if let Some(text) = &step.run {
        fs::write(CONSOLE, &vmm.out)?;
        script("step", text, scenario, Some(vmm), evidence)?;
    }
    if let Some(text) = &step.send {
        vmm.type_in(scenario.substitute(text).into_bytes())?;
    }
    if let Some(name) = &step.send_file {
        let bytes = fs::read(format!("{WORK}/{name}")).with_context(|| format!("`before` made no {name}"))?;
        vmm.type_in(bytes)?;
    }
    if let Some(name) = &step.signal {
        let signal = match scenario.substitute(name).as_str() {
            "INT" => libc::SIGINT,
            "TERM" => libc::SIGTERM,
            "HUP" => libc::SIGHUP,
            "QUIT" => libc::SIGQUIT,
            "KILL" => libc::SIGKILL,
            "USR1" => libc::SIGUSR1,
            "STOP" => libc::SIGSTOP,
            "CONT" => libc::SIGCONT,
            "WINCH" => libc::SIGWINCH,
            other => bail!("no signal is called {other}"),
        };
        vmm.signal(signal);
    }
    Ok(())
}

/// What a step can wait for a text on.
#[derive(Clone, Copy)]
enum Stream {
    Console,
    Log,
}

impl Stream {
    fn of(self, vmm: &Vmm) -> &[u8] {
        match self {
            Stream::Console => &vmm.out,
            Stream::Log => &vmm.err,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Stream::Console => "console",
            Stream::Log => "VMM's stderr",
        }
    }
}

/// How far the steps have looked.
#[derive(Default)]
struct Seen {
    console: usize,
    log: usize,
}

fn wait(
    pattern: &str,
    stream: Stream,
    scenario: &Scenario,
    vmm: &mut Vmm,
    deadline: Instant,
    seen: &mut usize,
    live: &mut dyn FnMut(&[u8]),
) -> Result<()> {
    loop {
        let text = stream.of(vmm);
        if let Some(at) = find(&text[*seen..], pattern.as_bytes()) {
            *seen += at + pattern.len();
            return Ok(());
        }
        // A long listing is searched once, not again with every piece of it that arrives.
        *seen = (*seen).max(text.len().saturating_sub(pattern.len()));
        let (name, pattern) = (stream.name(), pattern.escape_debug());
        if vmm.exited.is_some() && vmm.drained() {
            let status = vmm.status()?;
            bail!("the VMM ended with status {status} before the {name} said \"{pattern}\"");
        }
        if !vmm.step(deadline, live) {
            if vmm.exited.is_some() {
                continue;
            }
            bail!("the {name} did not say \"{pattern}\" within {} s", scenario.limit);
        }
    }
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    if pattern.is_empty() {
        return Some(0);
    }
    text.windows(pattern.len()).position(|window| window == pattern)
}

/// Runs a script of the emulated host; what it prints is evidence, a status other than 0 is a failure.
fn script(
    what: &str,
    text: &str,
    scenario: &Scenario,
    vmm: Option<&Vmm>,
    evidence: &mut Evidence,
) -> Result<()> {
    let log = format!("/run/script.{what}");
    let out = fs::File::create(&log)?;
    let mut command = Command::new("/bin/busybox");
    command.args(["sh", "-e", "-c", text]).current_dir(WORK);
    command
        .envs(scenario.variables())
        .env("WORK", WORK)
        .env("CONSOLE", CONSOLE);
    if let Some(vmm) = vmm {
        command.env("VMM_PID", vmm.pid().to_string());
    }
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    // Not by busybox's timeout: its watcher outlives the script by up to a second, and would count as left behind.
    let mut child = command.spawn().context("cannot start busybox")?;
    let deadline = Instant::now() + Duration::from_secs(scenario.script_limit);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            break child.wait()?;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    evidence.add(&format!("{SCRIPT}`{what}`"), &fs::read(&log)?);
    ensure!(status.success(), "the script `{what}` failed ({status})");
    Ok(())
}

/// The guest's initramfs: what all have in common, then the scenario's own script.
fn initrd(scenario: &Scenario) -> Result<String> {
    let mut archive = Archive::new();
    archive.file("script", 0o755, scenario.guest_script().as_bytes());
    for name in IN_GUEST {
        if scenario.guest_script().contains(name) {
            archive.file(&format!("bin/{name}"), 0o755, &fs::read("/init")?);
        }
    }
    let mut bytes = fs::read(BASE_INITRD).context("the emulated host has no guest")?;
    bytes.extend_from_slice(&archive.finish());
    let path = "/run/initrd";
    fs::write(path, bytes)?;
    Ok(path.to_owned())
}

/// The places where a program may leave something behind.
fn files() -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for dir in ["/tmp", "/dev/shm", "/dev/hugepages", "/"] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            all.insert(entry.path().to_string_lossy().into_owned());
        }
    }
    all
}

/// Lets the bench use the same search.
pub fn console_has(vmm: &vmm::Vmm, pattern: &str) -> bool {
    find(&vmm.out, pattern.as_bytes()).is_some()
}
