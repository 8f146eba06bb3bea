//! `cargo xtask bench boot`: exec to /init, and memory outside guest RAM.

pub mod io;
pub mod victim;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use harness::protocol::{Event, Sample};

use crate::emulated_host::{self, Host, Image, Inside, Outcome};

const MEMORY_MIB: u64 = 256;
/// The emulated host and one guest.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// All VMMs get the same. `reboot=t` and `quiet` are what a microvm user would choose, too.
const CMDLINE: &str = "console=ttyS0 quiet reboot=t panic=-1";
/// The one whose time is 1.00, if it is among them; otherwise it is the first.
const REFERENCE: Contender = Contender::Microvm;
/// The budget (design.md) of a boot's time, to [`REFERENCE`]'s.
const TIME_BOUND: f64 = 0.4;
/// The budget of memory outside guest RAM.
const MEMORY_BOUND_KIB: f64 = 3072.0;

/// Far more than a hundred million asks take.
const STRESS_LIMIT: Duration = Duration::from_secs(3600);

/// The long run of `tests/stress.rs`, optimised.
pub fn stress() -> Result<bool> {
    let mut command = std::process::Command::new(env!("CARGO"));
    command
        .args([
            "test",
            "--release",
            "--locked",
            "--test",
            "stress",
            "--",
            "--ignored",
            "--nocapture",
        ])
        .current_dir(crate::paths::root());
    Ok(crate::process::run_limited(&mut command, STRESS_LIMIT)?.success())
}

#[derive(clap::Args)]
pub struct Args {
    /// Boots of each VMM, taken in turns
    #[arg(long, default_value_t = 5)]
    pub runs: u64,
    /// Which VMMs to run
    #[arg(long, value_enum, value_delimiter = ',')]
    pub vmm: Vec<Contender>,
    /// One more option of `actor-vmm run`, such as --vmm-arg=--unpack=guest; may be repeated
    #[arg(long, allow_hyphen_values = true)]
    pub vmm_arg: Vec<String>,
    /// Print the guest's kernel log with its times, and the VMM's mappings (the console slows the boot a little)
    #[arg(long)]
    pub dmesg: bool,
    /// The guest's kernel command line
    #[arg(long, default_value = CMDLINE)]
    pub cmdline: String,
    /// Time is counted in emulated instructions (2 ns each): repeatable on a busy machine, but blind to their cost
    #[arg(long)]
    pub counted: bool,
    /// Every sample, not only the summary
    #[arg(long)]
    pub samples: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Contender {
    /// bzImage, defaults
    ActorVmm,
    /// The vmlinux out of the same bzImage, by its PVH entry
    ActorVmmVmlinux,
    /// bzImage, --dispatch channel
    ActorVmmChannel,
    /// bzImage, --dispatch device-lock
    ActorVmmDeviceLock,
    /// bzImage, --dispatch big-lock
    ActorVmmBigLock,
    /// QEMU -M microvm as it comes
    Microvm,
    /// QEMU -M microvm without ACPI, option ROMs, PIT and RTC: the least that still has a serial console
    MicrovmMinimal,
    /// QEMU -M microvm with the vmlinux, by its PVH entry
    MicrovmVmlinux,
}

const DEFAULT: [Contender; 4] = [
    Contender::ActorVmm,
    Contender::Microvm,
    Contender::MicrovmMinimal,
    Contender::MicrovmVmlinux,
];

impl Contender {
    fn name(self) -> String {
        self.to_possible_value()
            .map(|v| v.get_name().to_owned())
            .unwrap_or_default()
    }

    fn is_ours(self) -> bool {
        self.name().starts_with("actor-vmm")
    }

    /// How its vCPUs reach devices, if not as by default.
    fn dispatch(self) -> Option<&'static str> {
        match self {
            Contender::ActorVmmChannel => Some("channel"),
            Contender::ActorVmmDeviceLock => Some("device-lock"),
            Contender::ActorVmmBigLock => Some("big-lock"),
            _ => None,
        }
    }

    /// The words after exec.
    fn command(self, args: &Args) -> Vec<String> {
        let kernel = match self {
            Contender::ActorVmmVmlinux | Contender::MicrovmVmlinux => "/guest/vmlinux",
            _ => "/guest/bzImage",
        };
        let memory = format!("{MEMORY_MIB}M");
        let initrd = "${INITRD}";
        let words: Vec<&str> = if self.is_ours() {
            let run = [
                "/bin/actor-vmm",
                "run",
                "--kernel",
                kernel,
                "--initrd",
                initrd,
                "--cmdline",
                &args.cmdline,
            ];
            run.into_iter()
                .chain(["--cpus", "1", "--memory", &memory])
                .collect()
        } else {
            let machine = match self {
                Contender::MicrovmMinimal => "microvm,acpi=off,x-option-roms=off,pit=off,pic=on,rtc=off",
                _ => "microvm",
            };
            let qemu = [
                "/usr/bin/qemu-system-x86_64",
                "-M",
                machine,
                "-accel",
                "kvm",
                "-cpu",
                "host",
            ];
            let rest = [
                "-smp",
                "1",
                "-m",
                &memory,
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
            ];
            let boot = [
                "-display", "none", "-serial", "stdio", "-kernel", kernel, "-initrd", initrd, "-append",
            ];
            qemu.into_iter()
                .chain(rest)
                .chain(boot)
                .chain([args.cmdline.as_str()])
                .collect()
        };
        let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        if self.is_ours() {
            let dispatch = self.dispatch().map(|dispatch| ["--dispatch", dispatch]);
            words.extend(dispatch.into_iter().flatten().map(str::to_owned));
            words.extend(args.vmm_arg.iter().cloned());
        }
        words
    }
}

pub fn run(args: &Args) -> Result<bool> {
    let vmms: &[Contender] = if args.vmm.is_empty() { &DEFAULT } else { &args.vmm };
    ensure!(args.runs > 0, "--runs has to be at least 1");
    let image = Image::build(&Inside {
        qemu: vmms.iter().any(|v| !v.is_ours()),
        actor_vmm: vmms.iter().any(|v| v.is_ours()),
        ..Inside::default()
    })?;
    println!(
        "same bzImage, same initrd, 1 vCPU, {MEMORY_MIB} MiB, in turns, each boot in a fresh emulated host:"
    );
    for vmm in vmms {
        println!("  {:<22} {}", vmm.name(), shell_words(&vmm.command(args)));
    }
    let mut samples: BTreeMap<String, Vec<Sample>> = BTreeMap::new();
    let mut failures = 0;
    for round in 1..=args.runs {
        for vmm in vmms {
            failures += boot_once(&image, *vmm, args, round, &mut samples, true)?;
        }
    }
    print_summary(vmms, &samples);
    Ok(failures == 0)
}

/// One boot of one VMM, in an emulated host of its own: under QEMU's emulation, memory that has held a guest's code is
/// much slower to write afterwards, so the second guest of a host would pay for the first. Returns how many failed.
fn boot_once(
    image: &Image,
    vmm: Contender,
    args: &Args,
    round: u64,
    samples: &mut BTreeMap<String, Vec<Sample>>,
    retry: bool,
) -> Result<u64> {
    let words = vmm.command(args);
    ensure!(
        !words.iter().any(|w| w.contains(['\t', '\n'])),
        "a tab cannot be passed on"
    );
    let table = format!("{}\t{}\n", vmm.name(), words.join("\t"));
    let host = Host {
        plan: format!("bench 1 {MEMORY_MIB} {}\n", u8::from(args.dmesg)),
        memory_mib: emulated_host::HOST_MIB + MEMORY_MIB,
        cpus: 1,
        files: vec![("bench".to_owned(), table.into_bytes())],
        typing: false,
        counted: args.counted,
    };
    let mut failures = 0;
    let outcome = image.boot(&host, Instant::now() + BOOT_LIMIT, &mut |event| match event {
        Event::Sample(sample) => {
            if args.samples || args.dmesg {
                println!(
                    "  {round:>3} {:<22} {:>8.0} ms  {:>7} KiB outside guest RAM ({} KiB anonymous)",
                    sample.vmm,
                    sample.exec_to_init_us as f64 / 1000.0,
                    sample.outside_kib,
                    sample.anonymous_kib
                );
            }
            samples.entry(sample.vmm.clone()).or_default().push(sample);
        }
        Event::Fail { job, reason, .. } => {
            println!("FAIL    {job}: {reason}");
            failures += 1;
        }
        // That the host is up is no news here.
        other if args.dmesg => emulated_host::show(&other),
        _ => {}
    })?;
    match outcome {
        // See `emulated_host::scenarios`.
        Outcome::Died { hung: true, .. } if retry => {
            println!("again: the emulated host hangs; once more in a new one");
            return boot_once(image, vmm, args, round, samples, false);
        }
        Outcome::Died { reason, .. } => bail!("the emulated host failed: {reason}"),
        Outcome::Done => {}
    }
    Ok(failures)
}

fn print_summary(vmms: &[Contender], samples: &BTreeMap<String, Vec<Sample>>) {
    let reference = if vmms.contains(&REFERENCE) {
        REFERENCE
    } else {
        vmms[0]
    };
    let reference = samples.get(&reference.name()).map(|s| (time(s), memory(s)));
    let ratio = |value: f64, of: fn(&(Spread, Spread)) -> f64| match &reference {
        Some(reference) => format!("{:.2}", value / of(reference)),
        None => "-".to_owned(),
    };
    println!();
    println!(
        "  {:<22} {:^39}   {:^26}",
        "", "exec to /init, ms", "outside guest RAM, KiB"
    );
    println!(
        "  {:<22} {:>7} {:>7} {:>7} {:>7} {:>7}   {:>8} {:>8} {:>8}  runs",
        "", "median", "min", "max", "ratio", "of min", "median", "anon", "ratio"
    );
    for vmm in vmms {
        let name = vmm.name();
        let Some(own) = samples.get(&name) else { continue };
        let (time, memory) = (time(own), memory(own));
        let anon = spread(own.iter().map(|s| s.anonymous_kib as f64)).median;
        println!(
            "  {name:<22} {:>7.0} {:>7.0} {:>7.0} {:>7} {:>7}   {:>8.0} {anon:>8.0} {:>8}  {}",
            time.median,
            time.min,
            time.max,
            ratio(time.median, |r| r.0.median),
            ratio(time.min, |r| r.0.min),
            memory.median,
            ratio(memory.median, |r| r.1.median),
            own.len()
        );
    }
    println!();
    println!("{NOTES}");
    if let (Some(own), Some((reference, _))) = (samples.get(&Contender::ActorVmm.name()), &reference)
        && vmms.contains(&REFERENCE)
    {
        println!();
        verdict(
            "exec to /init, to microvm's",
            time(own).median / reference.median,
            TIME_BOUND,
            "",
        );
        verdict("outside guest RAM", memory(own).median, MEMORY_BOUND_KIB, " KiB");
    }
}

fn verdict(what: &str, value: f64, bound: f64, unit: &str) {
    let met = if value <= bound { "met" } else { "NOT met" };
    let digits = usize::from(bound < 10.0) * 2;
    println!("{what}: {value:.digits$}{unit}, at most {bound}{unit}: {met}");
}

const NOTES: &str = "\
Ratios are to `microvm`, or without it to the first: of the medians, and of the fastest runs (other work on the machine only ever adds time).
Memory is the sum of Rss in smaps without the mappings of guest RAM (the largest mapping, with all of its file), when
the guest has reached /init; anon is the part of it that belongs to no file: heap, stacks, tables.";

struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

fn time(samples: &[Sample]) -> Spread {
    spread(samples.iter().map(|s| s.exec_to_init_us as f64 / 1000.0))
}

fn memory(samples: &[Sample]) -> Spread {
    spread(samples.iter().map(|s| s.outside_kib as f64))
}

fn spread(values: impl Iterator<Item = f64>) -> Spread {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let count = values.len();
    if count == 0 {
        return Spread {
            min: f64::NAN,
            median: f64::NAN,
            max: f64::NAN,
        };
    }
    let median = (values[(count - 1) / 2] + values[count / 2]) / 2.0;
    Spread {
        min: values[0],
        median,
        max: values[count - 1],
    }
}

fn shell_words(words: &[String]) -> String {
    let quoted: Vec<String> = words
        .iter()
        .map(|w| {
            if w.contains(' ') {
                format!("'{w}'")
            } else {
                w.clone()
            }
        })
        .collect();
    quoted.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(spread([3.0, 1.0, 2.0].into_iter()).median, 2.0);
        assert_eq!(spread([4.0, 1.0, 2.0, 3.0].into_iter()).median, 2.5);
        assert!(spread(std::iter::empty()).median.is_nan());
    }
}
