//! The emulated host: Debian's QEMU without KVM boots Debian's kernel on a processor with SVM, and in there KVM works.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use harness::cpio::Archive;
use harness::protocol::Event;
use harness::scenario::{self, Scenario};

use crate::{build, debugger, image, initramfs, kernel, paths, process, setup};

const QEMU: &str = "qemu-system-x86_64";
/// A processor with SVM and nested paging. QEMU does not tell KVM when a guest sets XCR0, so KVM runs the guest with
/// another value than it has set; Linux notices, complains and does without XSAVE. Better not to offer it.
// ERMS and FSRM tell the kernel that byte-wise string instructions are fast; emulated, they are the slowest.
const CPU: &str = "max,+svm,+npt,-xsave,-erms,-fsrm";
/// From the start of QEMU to the agent's first word; 4 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// So long without a word, not even the agent's heartbeat, and the emulated host hangs.
const SILENCE: Duration = Duration::from_secs(40);
/// What a busy machine may add to a limit that the agent watches itself.
const SLACK: Duration = Duration::from_secs(30);
/// What the emulated host needs besides the memory of its guests.
pub const HOST_MIB: u64 = 1536;

#[derive(clap::Args)]
pub struct Args {
    /// Scenarios to run: a name, or the part before the slash [default: all but the suite "slow"]
    pub scenarios: Vec<String>,
    /// Run a suite instead, such as ci or slow; `all` is everything
    #[arg(long)]
    pub suite: Option<String>,
    /// List the scenarios and stop
    #[arg(long)]
    pub list: bool,
    /// CPUs of the emulated host; more than one is known to be unstable
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
    /// Limit in seconds for everything together
    #[arg(long, default_value_t = 3600)]
    pub timeout: u64,
    /// Boot the emulated host anew for every scenario
    #[arg(long)]
    pub split: bool,
    /// Show the guests' consoles as they come
    #[arg(long)]
    pub console: bool,
    /// The VMM to run the scenarios with
    #[arg(long, value_enum, default_value_t)]
    pub vmm: Vmm,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Vmm {
    #[default]
    ActorVmm,
    /// Debian's QEMU: tells whether a scenario itself is right (exit statuses are not compared)
    Qemu,
}

impl Vmm {
    pub fn plan_name(self) -> &'static str {
        match self {
            Vmm::ActorVmm => "actor-vmm",
            Vmm::Qemu => "qemu",
        }
    }
}

pub fn run(args: &Args) -> Result<bool> {
    let all = scenario::load(&paths::scenarios())?;
    let chosen = select(&all, &args.scenarios, args.suite.as_deref())?;
    if args.list {
        for scenario in &chosen {
            println!("{:<40} {}", scenario.name, scenario.about);
        }
        return Ok(true);
    }
    let options = Options {
        cpus: args.cpus,
        limit: Duration::from_secs(args.timeout),
        split: args.split,
        console: args.console,
        vmm: args.vmm,
    };
    let tally = scenarios(&chosen, &options)?;
    println!("{} passed, {} failed", tally.passed, tally.failed.len());
    Ok(tally.failed.is_empty())
}

pub fn select<'a>(all: &'a [Scenario], names: &[String], suite: Option<&str>) -> Result<Vec<&'a Scenario>> {
    let in_suite = |scenario: &Scenario| match suite {
        Some("all") => true,
        Some(suite) => scenario.suites.iter().any(|s| s == suite),
        None => !names.is_empty() || !scenario.suites.iter().any(|s| s == "slow"),
    };
    let named = |scenario: &Scenario| {
        let mut names = names.iter();
        names.len() == 0 || names.any(|n| scenario.name == *n || scenario.name.starts_with(&format!("{n}/")))
    };
    for name in names {
        ensure!(
            all.iter()
                .any(|s| s.name == *name || s.name.starts_with(&format!("{name}/"))),
            "no scenario is called {name}; see `cargo xtask emulated-host --list`"
        );
    }
    let chosen: Vec<_> = all.iter().filter(|s| in_suite(s) && named(s)).collect();
    ensure!(
        !chosen.is_empty(),
        "no scenario is in that selection; see `cargo xtask emulated-host --list`"
    );
    Ok(chosen)
}

pub struct Options {
    pub cpus: u32,
    pub limit: Duration,
    pub split: bool,
    pub console: bool,
    pub vmm: Vmm,
}

#[derive(Default)]
pub struct Tally {
    pub passed: u32,
    /// Names.
    pub failed: Vec<String>,
}

/// Runs scenarios in as few emulated hosts as possible, and prints how each went.
pub fn scenarios(chosen: &[&Scenario], options: &Options) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut waiting: VecDeque<&Scenario> = VecDeque::new();
    for scenario in chosen {
        if scenario.only_actor_vmm && options.vmm != Vmm::ActorVmm {
            println!("skipped {:<44} only actor-vmm can do this", scenario.name);
        } else {
            waiting.push_back(scenario);
        }
    }
    let image = Image::build(&Inside {
        qemu: options.vmm == Vmm::Qemu,
        actor_vmm: options.vmm == Vmm::ActorVmm,
        gdb: waiting.iter().any(|scenario| scenario.gdb),
        qemu_img: waiting.iter().any(|scenario| scenario.qemu_img),
        system: waiting.iter().any(|scenario| scenario.system),
    })?;
    let deadline = Instant::now() + options.limit;
    let mut hung_before: Vec<String> = Vec::new();
    while !waiting.is_empty() {
        let count = if options.split { 1 } else { waiting.len() };
        let batch: Vec<_> = waiting.iter().take(count).copied().collect();
        let mut memory_mib = HOST_MIB;
        let mut plan = format!("vmm {}\n", options.vmm.plan_name());
        if options.console {
            plan.push_str("live\n");
        }
        for scenario in &batch {
            memory_mib = memory_mib.max(HOST_MIB + scenario.memory_mib()?);
            plan.push_str(&format!("scenario {}\n", scenario.name));
        }
        let host = Host {
            plan,
            memory_mib,
            cpus: options.cpus,
            files: Vec::new(),
            typing: false,
            counted: false,
        };
        let outcome = image.boot(&host, deadline, &mut |event| match event {
            Event::Pass { job, millis, note } => {
                println!("pass    {job:<44} {:>6.1} s  {note}", seconds(millis));
                tally.passed += 1;
                waiting.retain(|s| s.name != job);
            }
            Event::Fail { job, millis, reason } => {
                println!("FAIL    {job:<44} {:>6.1} s  {reason}", seconds(millis));
                waiting.retain(|s| s.name != job);
                tally.failed.push(job);
            }
            other => show(&other),
        })?;
        let Outcome::Died { reason, during, hung } = outcome else {
            continue;
        };
        // The scenario that was running takes the blame; the others get a new host. Without one, nothing works.
        let Some(name) = during else {
            bail!("the emulated host failed: {reason}")
        };
        // A host in which nothing runs, not even the agent's heartbeat, is not the work of a program in it. The one such
        // fault that is known is mended (`Machine::start`), but a machine that is far too busy looks the same: once more.
        if hung && !hung_before.contains(&name) {
            println!(
                "again   {name:<44}           the emulated host hangs: {reason}; once more in a new one"
            );
            hung_before.push(name);
            continue;
        }
        println!("FAIL    {name:<44}           the emulated host failed: {reason}");
        waiting.retain(|s| s.name != name);
        tally.failed.push(name);
        if Instant::now() >= deadline {
            for scenario in waiting.drain(..) {
                println!("FAIL    {:<44}           not run, the time is up", scenario.name);
                tally.failed.push(scenario.name.clone());
            }
        }
    }
    Ok(tally)
}

pub fn seconds(millis: u64) -> f64 {
    millis as f64 / 1000.0
}

/// Prints what needs no thought.
pub fn show(event: &Event) {
    match event {
        Event::Ready(what) => println!("        emulated host: {what}"),
        Event::Console(bytes) => raw(bytes),
        Event::Evidence { title, text } => {
            println!("---- {title} ----");
            for line in String::from_utf8_lossy(text).lines() {
                println!("{}", printable(line));
            }
            println!("---- end of {title} ----");
        }
        _ => {}
    }
}

/// A guest must not be able to play with the terminal of whoever reads a log.
fn printable(line: &str) -> String {
    line.trim_end_matches('\r')
        .chars()
        .map(|c| if c.is_control() && c != '\t' { '.' } else { c })
        .collect()
}

fn raw(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    // Nobody to tell when stdout is closed.
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

/// What all emulated hosts of one command have inside.
pub struct Image {
    kernel: kernel::Kernel,
    base: Vec<u8>,
    /// Its disk. What is written to it is gone at the end.
    disk: Option<PathBuf>,
}

/// One emulated host.
pub struct Host {
    /// What the agent shall do, in its own words.
    pub plan: String,
    pub memory_mib: u64,
    pub cpus: u32,
    /// More files, by path.
    pub files: Vec<(String, Vec<u8>)>,
    /// Pass on what is typed here.
    pub typing: bool,
    /// Let the emulated host's clock count instructions instead of following the real time.
    pub counted: bool,
}

pub enum Outcome {
    Done,
    Died {
        reason: String,
        /// The job that was running.
        during: Option<String>,
        /// Nothing in it ran any more, as opposed to a job that did not end.
        hung: bool,
    },
}

/// Which programs.
#[derive(Clone, Copy, Default)]
pub struct Inside {
    pub actor_vmm: bool,
    pub qemu: bool,
    pub gdb: bool,
    pub qemu_img: bool,
    pub system: bool,
}

impl Image {
    pub fn build(inside: &Inside) -> Result<Self> {
        setup::run(&setup::Args::default())?;
        let kernel = kernel::ensure(false)?;
        let mut archive = Archive::new();
        let agent = build::static_binary("xtask", "emulated-host-agent")?;
        archive.file("init", 0o755, &fs::read(agent)?);
        if inside.actor_vmm {
            let vmm = build::static_binary("actor-vmm", "actor-vmm")?;
            archive.file("bin/actor-vmm", 0o755, &fs::read(vmm)?);
        }
        for entry in fs::read_dir(paths::scenarios())? {
            let path = entry?.path();
            if let (Some(name), true) = (path.file_name(), path.extension().is_some_and(|e| e == "toml")) {
                archive.file(
                    &format!("scenarios/{}", name.to_string_lossy()),
                    0o644,
                    &fs::read(&path)?,
                );
            }
        }
        if inside.gdb {
            initramfs::with_libraries(&mut archive, &debugger::ensure()?, "usr/bin/gdb")?;
        }
        if inside.qemu_img {
            initramfs::with_libraries(&mut archive, Path::new("/usr/bin/qemu-img"), "usr/bin/qemu-img")?;
        }
        let mut base = initramfs::host(&kernel, inside.qemu)?;
        base.extend_from_slice(&archive.finish());
        let disk = if inside.system {
            Some(image::ensure(false)?.disk)
        } else {
            None
        };
        Ok(Self { kernel, base, disk })
    }

    /// Boots once, hands every event to `each`, and ends QEMU whatever happens.
    pub fn boot(&self, host: &Host, deadline: Instant, each: &mut dyn FnMut(Event)) -> Result<Outcome> {
        let scratch = Scratch::new()?;
        let initrd = scratch.0.join("initramfs");
        let console = scratch.0.join("console");
        let mut archive = Archive::new();
        archive.file("plan", 0o644, host.plan.as_bytes());
        for (path, content) in &host.files {
            archive.file(path, 0o644, content);
        }
        let mut file =
            fs::File::create(&initrd).with_context(|| format!("cannot write {}", initrd.display()))?;
        file.write_all(&self.base)?;
        file.write_all(&archive.finish())?;
        drop(file);

        let mut machine = Machine::start(self.command(host, &initrd, &console), host.typing)?;
        let outcome = machine.follow(deadline, each);
        if let Outcome::Died { .. } = outcome {
            let text = fs::read(&console).unwrap_or_default();
            show(&Event::Evidence {
                title: "emulated host's console".to_owned(),
                text,
            });
        }
        Ok(outcome)
    }

    fn command(&self, host: &Host, initrd: &Path, console: &Path) -> Command {
        let mut command = Command::new(QEMU);
        command.args(["-accel", "tcg", "-cpu", CPU, "-smp", &host.cpus.to_string()]);
        command.args(["-m", &format!("{}M", host.memory_mib)]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command
            .arg("-kernel")
            .arg(&self.kernel.bzimage)
            .arg("-initrd")
            .arg(initrd);
        if let Some(disk) = &self.disk {
            // A comma in a value is written twice.
            let path = disk.display().to_string().replace(',', ",,");
            command.args(["-drive", &format!("file={path},format=raw,if=virtio,snapshot=on")]);
        }
        if host.counted {
            // Two nanoseconds an instruction is about what an idle machine does.
            command.args(["-icount", "shift=1,sleep=off"]);
        }
        command.args(["-append", "console=ttyS0 quiet panic=-1"]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args([
            "-chardev",
            "stdio,id=report,signal=off",
            "-serial",
            "chardev:report",
        ]);
        command
    }
}

/// A running QEMU; dropping it kills it.
struct Machine {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Machine {
    fn start(mut command: Command, typing: bool) -> Result<Self> {
        command
            .stdin(if typing { Stdio::inherit() } else { Stdio::null() })
            .stdout(Stdio::piped());
        process::die_with_us(&mut command);
        // QEMU keeps what waits for an emulated processor in one word, and changes it from two threads: the one that runs
        // timers and devices, under a lock, and the processor's own, which takes no lock when it finds a virtual
        // interrupt in a VMRUN (that is how KVM waits for its guest to take interrupts, so a long console is full of
        // it). In QEMU 7.2 each change is one plain instruction, and of two at the same time on two processors one can
        // be lost. If that is the host kernel's one-shot timer, nothing sets the timer again, and the emulated host
        // sleeps for ever with the interrupt waiting in its APIC (QEMU's monitor: HLT=1, IF set, IRR 236, ISR none,
        // current_count 0; within seconds when something in the host sleeps for 100 µs again and again). QEMU made
        // the word atomic in 2025: "cpu-common: use atomic access for interrupt_request". One processor does one
        // instruction after the other, so there nothing is lost.
        process::stay_on_one_processor(&mut command);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {QEMU}; run: cargo xtask setup"))?;
        let stdout = child.stdout.take().context("stdout is a pipe")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
                line.clear();
            }
        });
        Ok(Self { child, lines })
    }

    fn follow(&mut self, deadline: Instant, each: &mut dyn FnMut(Event)) -> Outcome {
        let mut during = None;
        let mut job_deadline = Instant::now() + BOOT_LIMIT;
        let mut waiting_for = "did not come up".to_owned();
        // Before its first word it has BOOT_LIMIT.
        let mut heard = Instant::now() + BOOT_LIMIT;
        loop {
            let until = job_deadline.min(deadline).min(heard + SILENCE);
            let line = match self
                .lines
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    let now = Instant::now();
                    let hung = now >= heard + SILENCE && now < deadline;
                    let reason = if now >= deadline {
                        "the time is up".to_owned()
                    } else if hung {
                        "nothing in it runs any more".to_owned()
                    } else {
                        waiting_for
                    };
                    return Outcome::Died { reason, during, hung };
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Outcome::Died {
                        reason: "it ended without a word".to_owned(),
                        during,
                        hung: false,
                    };
                }
            };
            heard = Instant::now();
            let Some(event) = Event::decode(&line) else {
                continue;
            };
            match &event {
                Event::Start { job, limit } => {
                    during = Some(job.clone());
                    job_deadline = Instant::now() + Duration::from_secs(*limit) + SLACK;
                    waiting_for = "it hangs".to_owned();
                }
                // A long console on the way is progress, too.
                Event::Evidence { .. } => job_deadline = job_deadline.max(Instant::now() + SLACK),
                Event::Pass { .. } | Event::Fail { .. } | Event::Sample(_) | Event::Ready(_) => {
                    during = None;
                    job_deadline = Instant::now() + SLACK * 2;
                    waiting_for = "it hangs between two jobs".to_owned();
                }
                Event::Console(_) | Event::Alive => {}
                Event::End => return Outcome::Done,
            }
            each(event);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        process::kill_tree(&mut self.child);
    }
}

/// A directory that goes away with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let dir = paths::scratch().join(std::process::id().to_string());
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left-overs are in target/, where `cargo clean` finds them.
        let _ = fs::remove_dir_all(&self.0);
    }
}
