//! `cargo xtask bench disk` and `bench net`: what a request to a virtio device takes, under each discipline and in QEMU.
//!
//! The same kernel, guest, and backend of the host for all: a raw file on tmpfs (in QEMU by its threads), or a tap. The guest
//! measures (`io-meter`, in the emulated host's agent), here the figures are put side by side. Each run is in an emulated
//! host of its own, for the reason that `bench boot` gives; VMMs are taken in turns.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use harness::figures::Cost;
use harness::protocol::Event;

use crate::emulated_host::{self, HOST_MIB, Host, Image, Inside, Outcome};

const MEMORY_MIB: u64 = 256;
const CMDLINE: &str = "console=ttyS0 quiet reboot=t panic=-1";
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// design.md's budget: at least equal to QEMU.
const BOUND: f64 = 1.0;

#[derive(clap::Args)]
pub struct Args {
    /// Guests of each VMM, taken in turns
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Which VMMs to run; ratios are to the first of QEMU among them, or else to the first [default: those over virtio-mmio]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub vmm: Vec<Contender>,
    /// Time is counted in emulated instructions (2 ns each): repeatable on a busy machine, but blind to their cost
    #[arg(long)]
    pub counted: bool,
    /// One more option of `actor-vmm run`, such as --vmm-arg=--notify=message; may be repeated
    #[arg(long, allow_hyphen_values = true)]
    pub vmm_arg: Vec<String>,
    /// Every figure of every run, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Contender {
    /// By virtio-mmio, as by default
    ActorVmm,
    /// --dispatch channel
    ActorVmmChannel,
    /// --dispatch device-lock
    ActorVmmDeviceLock,
    /// --dispatch big-lock
    ActorVmmBigLock,
    /// --transport pci
    ActorVmmPci,
    /// QEMU -M microvm, by virtio-mmio (version 2)
    Qemu,
    /// QEMU -M microvm with PCI
    QemuPci,
}

const DEFAULT: [Contender; 5] = [
    Contender::ActorVmm,
    Contender::ActorVmmChannel,
    Contender::ActorVmmDeviceLock,
    Contender::ActorVmmBigLock,
    Contender::Qemu,
];

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Disk,
    Net,
}

impl Device {
    fn name(self) -> &'static str {
        match self {
            Device::Disk => "disk",
            Device::Net => "net",
        }
    }
}

impl Contender {
    fn name(self) -> String {
        self.to_possible_value()
            .map(|v| v.get_name().to_owned())
            .unwrap_or_default()
    }

    fn is_ours(self) -> bool {
        !matches!(self, Contender::Qemu | Contender::QemuPci)
    }

    fn is_by_pci(self) -> bool {
        matches!(self, Contender::ActorVmmPci | Contender::QemuPci)
    }

    /// The words after exec.
    fn command(self, device: Device, more: &[String]) -> Vec<String> {
        let memory = format!("{MEMORY_MIB}M");
        let common = ["/guest/bzImage", "${INITRD}", CMDLINE];
        let (program, mut words): (&str, Vec<&str>) = if self.is_ours() {
            let [kernel, initrd, cmdline] = common;
            let words = [
                "run",
                "--kernel",
                kernel,
                "--initrd",
                initrd,
                "--cmdline",
                cmdline,
                "--memory",
                &memory,
            ];
            ("/bin/actor-vmm", words.to_vec())
        } else {
            let [kernel, initrd, cmdline] = common;
            let machine = if self.is_by_pci() {
                "microvm,pcie=on"
            } else {
                "microvm"
            };
            let words = [
                "-M",
                machine,
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-m",
                &memory,
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
                "-serial",
                "stdio",
                "-global",
                "virtio-mmio.force-legacy=false",
                "-kernel",
                kernel,
                "-initrd",
                initrd,
                "-append",
                cmdline,
            ];
            ("/usr/bin/qemu-system-x86_64", words.to_vec())
        };
        let dispatch = match self {
            Contender::ActorVmmChannel => Some("channel"),
            Contender::ActorVmmDeviceLock => Some("device-lock"),
            Contender::ActorVmmBigLock => Some("big-lock"),
            _ => None,
        };
        words.extend(dispatch.iter().flat_map(|dispatch| ["--dispatch", dispatch]));
        if self == Contender::ActorVmmPci {
            words.extend(["--transport", "pci"]);
        }
        words.extend(match (self.is_ours(), device) {
            (true, Device::Disk) => ["--disk", "path=${DISK}"].as_slice(),
            (true, Device::Net) => &["--net", "tap=tap0,mac=02:00:00:00:00:02"],
            (false, Device::Disk) => &[
                "-drive",
                "file=${DISK},format=raw,if=none,id=disk,cache=writeback,aio=threads",
                "-device",
            ],
            (false, Device::Net) => &[
                "-netdev",
                "tap,id=net,ifname=tap0,script=no,downscript=no,vhost=off",
                "-device",
            ],
        });
        words.extend(match (self, device) {
            (Contender::Qemu, Device::Disk) => Some("virtio-blk-device,drive=disk"),
            (Contender::QemuPci, Device::Disk) => Some("virtio-blk-pci,drive=disk"),
            (Contender::Qemu, Device::Net) => Some("virtio-net-device,netdev=net,mac=02:00:00:00:00:02"),
            (Contender::QemuPci, Device::Net) => {
                Some("virtio-net-pci,netdev=net,mac=02:00:00:00:00:02,romfile=")
            }
            _ => None,
        });
        let more = more.iter().filter(|_| self.is_ours()).map(String::as_str);
        std::iter::once(program)
            .chain(words)
            .chain(more)
            .map(str::to_owned)
            .collect()
    }
}

/// Nanoseconds, of each run, by VMM and figure. A figure's place is that of its first mention.
#[derive(Default)]
struct Seen {
    order: Vec<String>,
    runs: BTreeMap<String, Vec<BTreeMap<String, u64>>>,
}

impl Seen {
    fn add(&mut self, vmm: &str, note: &str) -> Result<()> {
        let mut run = BTreeMap::new();
        for text in note.split("; ") {
            let cost = Cost::parse(text).with_context(|| format!("not a figure: {text}"))?;
            if !self.order.contains(&cost.name) {
                self.order.push(cost.name.clone());
            }
            run.insert(cost.name, cost.nanos);
        }
        self.runs.entry(vmm.to_owned()).or_default().push(run);
        Ok(())
    }

    /// Of each run.
    fn of(&self, vmm: &str, figure: &str) -> Vec<f64> {
        let runs = self.runs.get(vmm).map(Vec::as_slice).unwrap_or_default();
        runs.iter()
            .filter_map(|run| run.get(figure).map(|&nanos| nanos as f64))
            .collect()
    }

    fn json(&self) -> String {
        let mut out = String::from("[\n");
        let mut first = true;
        for (vmm, runs) in &self.runs {
            for (number, run) in runs.iter().enumerate() {
                for (figure, nanos) in run {
                    // Names are ours, without anything to escape.
                    out.push_str(if first { "" } else { ",\n" });
                    first = false;
                    out.push_str(&format!(
                        "{{\"vmm\":\"{vmm}\",\"run\":{},\"figure\":\"{figure}\",\"ns\":{nanos}}}",
                        number + 1
                    ));
                }
            }
        }
        out.push_str("\n]\n");
        out
    }
}

pub fn run(device: Device, args: &Args) -> Result<bool> {
    ensure!(args.runs > 0, "--runs has to be at least 1");
    let vmms: &[Contender] = if args.vmm.is_empty() { &DEFAULT } else { &args.vmm };
    if let Some(path) = &args.json {
        // Before the minutes, not after them.
        std::fs::write(path, "").with_context(|| format!("cannot write {}", path.display()))?;
    }
    let image = Image::build(&Inside {
        qemu: vmms.iter().any(|v| !v.is_ours()),
        actor_vmm: vmms.iter().any(|v| v.is_ours()),
        ..Inside::default()
    })?;
    for vmm in vmms {
        println!(
            "  {:<22} {}",
            vmm.name(),
            vmm.command(device, &args.vmm_arg).join(" ")
        );
    }
    let mut seen = Seen::default();
    let mut failures = 0;
    for round in 1..=args.runs {
        for vmm in vmms {
            let words = vmm.command(device, &args.vmm_arg).join("\t");
            let host = Host {
                plan: format!("io {}\n", device.name()),
                memory_mib: HOST_MIB + MEMORY_MIB,
                cpus: 1,
                files: vec![(
                    "bench".to_owned(),
                    format!("{}\t{words}\n", vmm.name()).into_bytes(),
                )],
                typing: false,
                counted: args.counted,
            };
            failures += once(&image, &host, round, &mut seen, true)?;
        }
    }
    if let Some(path) = &args.json {
        std::fs::write(path, seen.json()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(summary(vmms, &seen) && failures == 0)
}

/// One guest in one emulated host. Returns how many failed.
fn once(image: &Image, host: &Host, round: usize, seen: &mut Seen, retry: bool) -> Result<u64> {
    let (mut failures, mut notes) = (0, Vec::new());
    let outcome = image.boot(host, Instant::now() + BOOT_LIMIT, &mut |event| match event {
        Event::Pass { job, note, .. } => notes.push((job, note)),
        Event::Fail { job, reason, .. } => {
            println!("FAIL    {job}: {reason}");
            failures += 1;
        }
        Event::Ready(_) => {}
        other => emulated_host::show(&other),
    })?;
    match outcome {
        // See `emulated_host::scenarios`.
        Outcome::Died { hung: true, .. } if retry => {
            println!("again: the emulated host hangs; once more in a new one");
            return once(image, host, round, seen, false);
        }
        Outcome::Died { reason, .. } => bail!("the emulated host failed: {reason}"),
        Outcome::Done => {}
    }
    for (job, note) in notes {
        println!("  {round:>3} {job:<22} {note}");
        seen.add(&job, &note)?;
    }
    Ok(failures)
}

fn summary(vmms: &[Contender], seen: &Seen) -> bool {
    let reference = vmms.iter().find(|v| !v.is_ours()).unwrap_or(&vmms[0]);
    println!();
    println!(
        "  {:<16} {:<22} {:>12} {:>7}   of the rounds",
        "", "", "us, median", "ratio"
    );
    let mut kept = true;
    let mut verdicts = Vec::new();
    for figure in &seen.order {
        let base = seen.of(&reference.name(), figure);
        for vmm in vmms {
            let own = seen.of(&vmm.name(), figure);
            let ratio = ratio(&own, &base);
            println!(
                "  {figure:<16} {:<22} {:>12.1} {:>7.2}   {:.2} to {:.2}",
                vmm.name(),
                super::spread(own.iter().copied()).median / 1e3,
                ratio.median,
                ratio.min,
                ratio.max,
            );
            let promised = matches!(vmm, Contender::ActorVmm | Contender::ActorVmmPci);
            if promised && !reference.is_ours() && vmm.is_by_pci() == reference.is_by_pci() {
                let met = ratio.median <= BOUND;
                kept &= met;
                verdicts.push(format!(
                    "{}    {figure}: {} takes {:.2} of {}'s time, at most {BOUND:.2}",
                    if met { "pass" } else { "FAIL" },
                    vmm.name(),
                    ratio.median,
                    reference.name()
                ));
            }
        }
    }
    println!("\n{NOTES}");
    for verdict in verdicts {
        println!("{verdict}");
    }
    kept
}

const NOTES: &str = "\
Time a request takes (at a percentile, or on average with as many under way as the name's last number says), to that of
QEMU in the same round: median, least and greatest of the rounds.";

/// Of pairs, one of each round. Its median is what counts: a busy machine can hold up a single round by any factor.
fn ratio(own: &[f64], base: &[f64]) -> super::Spread {
    super::spread(own.iter().zip(base).map(|(own, base)| own / base))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_promise_is_kept_or_not_by_each_figure() {
        let verdict = |ping: u64, send: u64| {
            let mut seen = Seen::default();
            seen.add("qemu", "ping ns=1000; send ns=1000").unwrap();
            let note = format!("ping ns={ping}; send ns={send}");
            seen.add("actor-vmm", &note).unwrap();
            summary(&[Contender::ActorVmm, Contender::Qemu], &seen)
        };
        assert!(verdict(900, 1000));
        assert!(!verdict(900, 1001));
        assert!(!verdict(1001, 900));
        assert!(
            !summary(&[Contender::ActorVmm, Contender::Qemu], &{
                let mut seen = Seen::default();
                seen.add("qemu", "ping ns=1000").unwrap();
                seen
            }),
            "nothing of ours was measured"
        );
    }

    #[test]
    fn a_ratio_is_of_pairs() {
        let ratio = ratio(&[50.0, 200.0, 30.0], &[100.0, 50.0, 100.0]);
        assert_eq!((ratio.min, ratio.median, ratio.max), (0.3, 0.5, 4.0));
        assert!(super::ratio(&[], &[]).median.is_nan());
    }

    #[test]
    fn commands_differ_by_the_vmm_alone() {
        for device in [Device::Disk, Device::Net] {
            for vmm in Contender::value_variants() {
                let words = vmm.command(device, &["--rng".to_owned()]);
                assert!(words.iter().all(|w| !w.contains(['\t', '\n'])));
                assert!(words.contains(&"${INITRD}".to_owned()) && words.contains(&"256M".to_owned()));
                assert_eq!(words.contains(&"--rng".to_owned()), vmm.is_ours());
            }
        }
    }

    #[test]
    fn what_is_not_a_figure_is_an_error() {
        assert!(Seen::default().add("qemu", "ping 7").is_err());
    }
}
