//! `actor-vmm bench`: the disciplines of dispatch against each other, in one process and interleaved, so that a ratio
//! holds on a machine whose speed drifts.
//!
//! Each repetition of each load goes in rounds; a round takes one sample under every discipline, in a new random order.
//! Of the rounds, the third counts in which the vCPUs waited least for a processor that somebody else had.
//! What is compared is the ratio within a repetition; what is reported is its median and an interval of it.
//!
//! | file | what |
//! |---|---|
//! | `plan.rs` | the experiments |
//! | `contestant.rs` | who is compared |
//! | `rig.rs` | one sample: devices, scripted vCPUs, threads |
//! | `kvm.rs` | one sample from a bare-metal guest of KVM |
//! | `kick.rs` | one sample of kicks |
//! | `pause.rs` | one sample of pauses of a whole machine |
//! | `slow_disk.rs` | one sample of a whole machine with a slow disk |
//! | `against.rs` | one sample from another program that runs the same guest |
//! | `devices.rs` | devices that cost what they are told to |
//! | `clock.rs` | the time-stamp counter |
//! | `stats.rs` | medians and their intervals |
//! | `budget.rs` | what design.md promises, against what was measured |
//! | `report.rs`, `html.rs`, `plots.rs` | what comes out |

pub mod against;
pub mod budget;
pub mod clock;
pub mod contestant;
pub mod devices;
pub mod html;
mod kick;
mod kvm;
mod pause;
pub mod plan;
mod plots;
pub mod report;
pub mod rig;
mod slow_disk;
pub mod stats;

use crate::machine::memory::MemoryError;
use crate::machine::vm::VmError;
use against::Program;
use clock::Scale;
use contestant::Contestant;
use hdrhistogram::Histogram;
use kvm::{Counts, Pair};
use plan::{Class, Load, Source};
use report::{Group, Row};
use rig::{Measure, Sample};
use std::io;
use std::time::{Duration, Instant};

/// What to run, and for how long.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Names out of [`plan::EXPERIMENTS`], or that of [`plan::AGAINST`].
    pub experiments: Vec<&'static str>,
    /// Where exits come from. An experiment that a source cannot do is left out for it; `kick` comes from KVM anyway.
    pub sources: Vec<Source>,
    /// Other programs, the first of which ratios are to.
    pub programs: Vec<&'static Program>,
    /// How often.
    pub repetitions: usize,
    /// Everything in less than a minute.
    pub quick: bool,
}

impl Plan {
    /// All loads, in order.
    pub fn loads(&self, processors: usize) -> Vec<Load> {
        let of = |name: &&'static str| match *name {
            name if name == plan::AGAINST.0 => plan::against_loads(&self.programs),
            "kick" => plan::loads("kick", Source::Kvm, processors),
            name => {
                let loads = self.sources.iter();
                loads
                    .flat_map(|source| plan::loads(name, *source, processors))
                    .collect()
            }
        };
        self.experiments.iter().flat_map(of).collect()
    }
}

/// Why a run cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Threads, files, sockets.
    #[error("the host cannot give what the bench needs")]
    Host(#[from] io::Error),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A guest did not do what it should.
    #[error("the measuring guest failed: {0}")]
    Guest(String),
    /// Another program did not.
    #[error("{name} cannot run the measuring guest: {why}")]
    Program {
        /// Its name.
        name: String,
        /// What happened.
        why: String,
    },
}

/// Where a run is.
pub struct Progress<'a> {
    /// Samples taken.
    pub done: usize,
    /// Of so many.
    pub of: usize,
    /// Since the start.
    pub elapsed: Duration,
    /// What is being measured.
    pub load: &'a Load,
}

/// All that a run gave.
pub struct Results {
    /// One a load.
    pub groups: Vec<Group>,
    /// How often each was measured.
    pub repetitions: usize,
    /// What a reader must know of where it ran.
    pub host: Host,
}

impl Results {
    /// All rows, load by load.
    pub fn rows(&self) -> Vec<Row> {
        let series = self.groups.iter().flat_map(|group| &group.series);
        series.flat_map(|series| series.rows.iter().cloned()).collect()
    }
}

/// What a reader must know of where a run was made.
pub struct Host {
    /// As the processor calls itself.
    pub processor: String,
    /// How many this program may use.
    pub processors: usize,
    /// Its release.
    pub kernel: String,
    /// Processes that wanted to run when the run began, averaged over a minute.
    pub load_before: f64,
    /// What to be wary of.
    pub warnings: Vec<String>,
    /// How ticks become nanoseconds.
    pub scale: Scale,
}

impl Host {
    /// This one, now.
    pub fn look() -> Host {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let processors = processors();
        let load = read("/proc/loadavg");
        let load_before = load
            .split(' ')
            .next()
            .and_then(|load| load.parse().ok())
            .unwrap_or(0.0);
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
        let mut warnings = Vec::new();
        if !clock::is_steady() {
            warnings.push(
                "the time-stamp counter changes its speed here: do not trust times, only ratios".into(),
            );
        }
        if load_before > 0.25 * processors as f64 {
            warnings.push(format!(
                "others use this host (load {load_before:.2} on {processors} processors): high percentiles are theirs too"
            ));
        }
        if cfg!(debug_assertions) {
            warnings.push("this is a debug build: its figures say nothing about a release build".into());
        }
        Host {
            processor: model
                .unwrap_or("unknown")
                .trim_start_matches([':', ' ', '\t'])
                .to_string(),
            processors,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_string(),
            load_before,
            warnings,
            scale: Scale::calibrate(),
        }
    }
}

/// How many processors this program may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// How many rounds a repetition has, of which the third that others disturbed least counts, and how long samples are.
struct Lengths {
    rounds: usize,
    throughput: Duration,
    latency: Duration,
    counts: Counts,
    kicks: usize,
    pauses: usize,
}

/// Of a load. Short, so that there are samples without a disturbance on a host that has other things to do; but where
/// somebody sleeps for milliseconds, a sample must hold many of these sleeps.
fn lengths(load: &Load, quick: bool) -> Lengths {
    let victim = load.experiment == "victim" || load.slow.is_some();
    let whole = matches!(load.class, Class::Console | Class::Frame);
    let (rounds, throughput, latency) = match (quick, victim) {
        // A disk's request takes 50 ms.
        (true, _) if whole => (1, 60, 300),
        (false, _) if whole => (3, 60, 600),
        (true, false) => (3, 5, 5),
        (true, true) => (1, 40, 80),
        (false, false) => (12, 6, 8),
        (false, true) => (6, 40, 150),
    };
    let rounds = if load.class == Class::Pause { 1 } else { rounds };
    // An exit of KVM costs microseconds, a guest milliseconds, another program half a second.
    let rounds = match (load.source, quick) {
        (Source::Scripted, _) => rounds,
        (Source::Kvm, false) => 3,
        (Source::Kvm, true) => 1,
    };
    let (in_a_row, timed) = match (quick, victim) {
        (true, false) => (500, 500),
        (true, true) => (100, 1_000),
        (false, false) => (1_000, 1_000),
        (false, true) => (200, 4_000),
    };
    // What a program of its own prints is an exit a digit.
    let timed = if load.programs.is_empty() {
        timed
    } else {
        timed / 2
    };
    Lengths {
        rounds,
        throughput: Duration::from_millis(throughput),
        latency: Duration::from_millis(latency),
        counts: Counts { in_a_row, timed },
        kicks: if quick { 200 } else { 1_000 },
        // Before each all vCPUs have to have run, a time slice of the host's each if there are more than processors.
        pauses: match (quick, load.vcpus) {
            (true, ..=4) => 50,
            (true, _) => 3,
            (false, ..=4) => 200,
            (false, ..=16) => 10,
            (false, _) => 20,
        },
    }
}

/// One sample for throughput and one for latencies.
fn sample(load: &Load, who: Contestant, lengths: &Lengths, scale: Scale) -> Result<Pair, Failure> {
    if matches!(load.class, Class::Kick | Class::Pause) {
        let latency = match load.class {
            Class::Kick => kick::sample(load, who, lengths.kicks)?,
            _ => pause::sample(load, who, lengths.pauses)?,
        };
        let (ops_per_s, waited) = (latency.ops_per_s, latency.waited);
        let rate = Sample {
            ops_per_s,
            waited,
            ..Sample::empty()
        };
        return Ok(Pair { rate, latency }.scaled(scale));
    }
    let pair = match (load.source, who) {
        (Source::Scripted, _) => {
            let whole = matches!(load.class, Class::Console | Class::Frame);
            let sample = |measure, length| match whole {
                true => slow_disk::sample(load, who, measure, length, scale),
                false => Ok(rig::sample(load, who, measure, length, scale)?),
            };
            return Ok(Pair {
                rate: sample(Measure::Throughput, lengths.throughput)?,
                latency: sample(Measure::Latency, lengths.latency)?,
            });
        }
        (Source::Kvm, Contestant::Program(program)) => against::sample(load, program, lengths.counts, scale),
        (Source::Kvm, Contestant::Run(dispatch)) => {
            against::sample_ours(load, dispatch, lengths.counts, scale)
        }
        (Source::Kvm, _) => kvm::sample(load, who, lengths.counts, scale),
    };
    pair.map(|pair| pair.scaled(scale))
}

/// Leaves the third of the samples that waited least for a processor, or one of fewer than three. What waits is as bad
/// for one discipline as for another, but it is not theirs: a vCPU that others keep from running makes a lock look
/// uncontended.
fn calmest(mut samples: Vec<Sample>) -> Vec<Sample> {
    samples.sort_by(|a, b| a.waited.total_cmp(&b.waited));
    samples.truncate(samples.len().div_ceil(3));
    samples
}

/// Runs it. `tell` is called before each round; it is called on the only thread that is awake then, so it disturbs
/// nothing.
///
/// # Errors
/// See [`Failure`].
pub fn run(plan: &Plan, mut tell: impl FnMut(&Progress)) -> Result<Results, Failure> {
    let host = Host::look();
    let scale = host.scale;
    let mut groups: Vec<Group> = plan.loads(host.processors).into_iter().map(Group::new).collect();
    let samples = |group: &Group| lengths(&group.load, plan.quick).rounds * group.series.len();
    let of = plan.repetitions * groups.iter().map(samples).sum::<usize>();
    let (start, mut done, mut seed) = (Instant::now(), 0, 0);
    for repetition in 1..=plan.repetitions {
        for group in &mut groups {
            let load = &group.load;
            let lengths = lengths(load, plan.quick);
            let mut pairs: Vec<Vec<Pair>> = group.series.iter().map(|_| Vec::new()).collect();
            for _ in 0..lengths.rounds {
                let elapsed = start.elapsed();
                tell(&Progress {
                    done,
                    of,
                    elapsed,
                    load,
                });
                seed += 1;
                for n in stats::shuffled(group.series.len(), seed) {
                    pairs[n].push(sample(load, group.series[n].who, &lengths, scale)?);
                    done += 1;
                }
            }
            for (series, pairs) in group.series.iter_mut().zip(pairs) {
                let (rates, latencies) = pairs.into_iter().map(|pair| (pair.rate, pair.latency)).unzip();
                let repeated = Repetition::of(calmest(rates), calmest(latencies));
                series.rows.push(Row::new(
                    load,
                    series.who,
                    &repeated,
                    |ticks| scale.ns(ticks),
                    repetition,
                ));
                series
                    .latency
                    .add(repeated.latency)
                    .expect("all have the same bounds");
            }
        }
    }
    Ok(Results {
        groups,
        repetitions: plan.repetitions,
        host,
    })
}

/// What one repetition gave.
pub struct Repetition {
    /// Accesses a second.
    pub ops_per_s: f64,
    /// Part of the time that vCPUs waited for a processor.
    pub waited: f64,
    /// How often a thread went to sleep, per access.
    pub sleeps: f64,
    /// How often one lost its processor otherwise, per access.
    pub yields: f64,
    /// In ticks.
    pub latency: Histogram<u64>,
    /// Queued, served, replied, in ticks, where that is told apart.
    pub parts: Option<[Histogram<u64>; 3]>,
}

impl Repetition {
    fn of(rates: Vec<Sample>, latencies: Vec<Sample>) -> Repetition {
        let waited = rates.iter().chain(&latencies).map(|sample| sample.waited);
        let waited = waited.sum::<f64>() / (rates.len() + latencies.len()) as f64;
        let middle = |value: fn(&Sample) -> f64| stats::median(&rates.iter().map(value).collect::<Vec<_>>());
        let (ops_per_s, sleeps) = (middle(|sample| sample.ops_per_s), middle(|sample| sample.sleeps));
        let yields = middle(|sample| sample.yields);
        let mut latency = rig::histogram();
        let mut parts: Option<[Histogram<u64>; 3]> = None;
        for sample in latencies {
            latency.add(sample.latency).expect("all have the same bounds");
            match (&mut parts, sample.parts) {
                (Some(all), Some(own)) => {
                    for (all, own) in all.iter_mut().zip(own) {
                        all.add(own).expect("all have the same bounds");
                    }
                }
                (none, own) => *none = own,
            }
        }
        Repetition {
            ops_per_s,
            waited,
            sleeps,
            yields,
            latency,
            parts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kicks_come_from_kvm_whatever_the_source_is() {
        let plan = |experiments: &[&'static str], sources: &[Source]| Plan {
            experiments: experiments.to_vec(),
            sources: sources.to_vec(),
            programs: Vec::new(),
            repetitions: 1,
            quick: true,
        };
        let loads = plan(&["published", "kick"], &[Source::Scripted]).loads(2);
        let names: Vec<_> = loads.iter().map(|load| (load.experiment, load.source)).collect();
        let kick = ("kick", Source::Kvm);
        assert_eq!(names, [("published", Source::Scripted), kick, kick]);
        assert_eq!(plan(&["storm"], &[Source::Kvm]).loads(2), []);
    }

    #[test]
    fn the_calmest_third_counts() {
        let of = |count: usize| {
            let sample = |n: usize| Sample {
                ops_per_s: n as f64,
                waited: 1.0 / (n + 1) as f64,
                ..Sample::empty()
            };
            let left = calmest((0..count).map(sample).collect());
            left.iter()
                .map(|sample| sample.ops_per_s as usize)
                .collect::<Vec<_>>()
        };
        assert_eq!(of(1), [0]);
        assert_eq!(of(3), [2]);
        assert_eq!(of(12), [11, 10, 9, 8]);
    }
}
