//! README's first command: see the stock kernel boot.

use std::io::{IsTerminal, Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use harness::cpio::Archive;
use harness::protocol::Event;
use harness::scenario;

use crate::emulated_host::{Host, Image, Inside, Outcome, Vmm};
use crate::{build, emulated_host, initramfs, kernel, paths, process, setup};

/// Not among the tests: it belongs to this command.
const SCENARIO: &str = include_str!("boot.toml");
const NAME: &str = "boot-command";
const LIMIT: Duration = Duration::from_secs(180);

#[derive(clap::Args)]
pub struct Args {
    /// A shell in the guest instead of a few facts
    #[arg(long)]
    pub shell: bool,
    /// Where to boot; by default `actor-vmm doctor` is asked
    #[arg(long, value_enum, default_value_t)]
    pub host: Place,
    /// The VMM inside the emulated host
    #[arg(long, value_enum, default_value_t)]
    pub vmm: Vmm,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Place {
    #[default]
    Auto,
    /// On this machine's /dev/kvm
    Local,
    /// In the emulated host
    Emulated,
}

pub fn run(args: &Args) -> Result<bool> {
    setup::run(&setup::Args::default())?;
    let text = scenario_text(args.shell);
    let scenario = scenario::parse(NAME, &text)?.remove(0);
    let started = Instant::now();
    let local = match args.host {
        Place::Local => true,
        Place::Emulated => false,
        Place::Auto => {
            let vmm = build::release()?;
            let doctor = Command::new(&vmm)
                .arg("doctor")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .output()
                .with_context(|| format!("cannot start {}", vmm.display()))?;
            doctor.status.success()
        }
    };
    let place = if local {
        "on this machine's /dev/kvm"
    } else {
        "in the emulated host"
    };
    match (local, args.host) {
        (true, _) => eprintln!("boot: this machine's KVM can run a stock kernel: booting {place}"),
        (false, Place::Auto) => eprintln!(
            "boot: this machine has no KVM that can run a stock kernel (target/release/actor-vmm doctor says why): \
             booting {place}, which takes a minute"
        ),
        (false, _) => eprintln!("boot: booting {place}"),
    }
    let seen = if local {
        locally(&scenario, args.shell)?
    } else {
        emulated(&scenario, &text, args)?
    };
    let expected = scenario.substitute(&scenario.expect[0]);
    if !args.shell {
        ensure!(seen.contains(&expected), "the guest did not say \"{expected}\"");
    }
    let release = kernel::ensure(false)?.release;
    println!(
        "boot: Debian's stock kernel {release} reached userspace on {} CPUs {place} ({:.1} s)",
        scenario.cpus,
        started.elapsed().as_secs_f64()
    );
    Ok(true)
}

fn scenario_text(shell: bool) -> String {
    let more = if shell { "setsid cttyhack sh\n" } else { "" };
    let limit = if shell { 24 * 3600 } else { LIMIT.as_secs() };
    SCENARIO
        .replace("@SHELL@", more)
        .replace("@LIMIT@", &limit.to_string())
}

fn locally(scenario: &scenario::Scenario, shell: bool) -> Result<String> {
    let vmm = build::release()?;
    let kernel = kernel::ensure(false)?;
    let mut initrd = initramfs::guest(&kernel)?;
    let mut archive = Archive::new();
    archive.file("script", 0o755, scenario.guest_script().as_bytes());
    initrd.extend_from_slice(&archive.finish());
    let path = paths::scratch().join("boot-initramfs");
    fs::create_dir_all(paths::scratch())?;
    fs::write(&path, initrd).with_context(|| format!("cannot write {}", path.display()))?;

    let mut command = Command::new(vmm);
    command
        .arg("run")
        .arg("--kernel")
        .arg(kernel.bzimage)
        .arg("--initrd")
        .arg(path);
    command.args([
        "--cmdline",
        &format!("console=ttyS0 panic=-1 {}", scenario.cmdline),
    ]);
    command.args(["--cpus", &scenario.cpus.to_string(), "--memory", &scenario.memory]);
    process::die_with_us(&mut command);
    if shell {
        let status = command.status().context("cannot start actor-vmm")?;
        ensure!(status.success(), "actor-vmm ended with {status}");
        return Ok(String::new());
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start actor-vmm")?;
    let mut stdout = child.stdout.take().context("stdout is a pipe")?;
    let reader = thread::spawn(move || {
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stdout.read(&mut buffer) {
            emulated_host::show(&Event::Console(buffer[..count].to_vec()));
            seen.extend_from_slice(&buffer[..count]);
        }
        seen
    });
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                process::kill_tree(&mut child);
                bail!("the guest was still running after {} s", LIMIT.as_secs());
            }
            None => thread::sleep(Duration::from_millis(20)),
        }
    };
    let seen = reader.join().unwrap_or_default();
    ensure!(status.success(), "actor-vmm ended with {status}");
    Ok(String::from_utf8_lossy(&seen).into_owned())
}

fn emulated(scenario: &scenario::Scenario, text: &str, args: &Args) -> Result<String> {
    let image = Image::build(&Inside {
        qemu: args.vmm == Vmm::Qemu,
        actor_vmm: args.vmm == Vmm::ActorVmm,
        ..Inside::default()
    })?;
    let interactive = if args.shell { "interactive\n" } else { "" };
    let host = Host {
        plan: format!(
            "vmm {}\nlive\n{interactive}scenario {NAME}\n",
            args.vmm.plan_name()
        ),
        memory_mib: emulated_host::HOST_MIB + scenario.memory_mib()?,
        cpus: 1,
        files: vec![(format!("scenarios/{NAME}.toml"), text.as_bytes().to_vec())],
        typing: args.shell,
        counted: false,
    };
    let _terminal = if args.shell && std::io::stdin().is_terminal() {
        RawTerminal::set()
    } else {
        None
    };
    let limit = Duration::from_secs(scenario.limit) + LIMIT;
    let mut seen = Vec::new();
    let mut failure = None;
    let outcome = image.boot(&host, Instant::now() + limit, &mut |event| {
        match &event {
            Event::Console(bytes) => seen.extend_from_slice(bytes),
            Event::Fail { reason, .. } => failure = Some(reason.clone()),
            // The console was on the screen already.
            Event::Evidence { title, .. } if title == "guest console" => return,
            _ => {}
        }
        emulated_host::show(&event);
    })?;
    if let Outcome::Died { reason, .. } = outcome {
        bail!("the emulated host failed: {reason}");
    }
    if let Some(reason) = failure {
        bail!("{reason}");
    }
    Ok(String::from_utf8_lossy(&seen).into_owned())
}

/// Typed keys go to the guest one by one, and the guest does the echo.
struct RawTerminal {
    before: String,
}

impl RawTerminal {
    fn set() -> Option<Self> {
        let stty = |args: &[&str]| {
            Command::new("stty")
                .args(args)
                .stdin(Stdio::inherit())
                .output()
                .ok()
        };
        let before = String::from_utf8_lossy(&stty(&["-g"])?.stdout).trim().to_owned();
        // Not `raw`: the output still needs its carriage returns, and Ctrl-C ends this program.
        stty(&["-icanon", "-echo", "min", "1"])?;
        Some(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = Command::new("stty")
            .arg(&self.before)
            .stdin(Stdio::inherit())
            .status();
        let _ = std::io::stdout().flush();
    }
}
