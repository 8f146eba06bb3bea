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
//! | `rig.rs` | one sample: devices, scripted vCPUs, threads |
//! | `devices.rs` | devices that cost what they are told to |
//! | `clock.rs` | the time-stamp counter |
//! | `stats.rs` | medians and their intervals |
//! | `report.rs`, `html.rs` | what comes out |

pub mod clock;
pub mod devices;
pub mod html;
pub mod plan;
pub mod report;
pub mod rig;
pub mod stats;

use clock::Scale;
use plan::Load;
use report::{Group, Row, Series};
use rig::{Measure, Sample};
use std::io;
use std::time::{Duration, Instant};

/// What to run, and for how long.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Names out of [`plan::EXPERIMENTS`].
    pub experiments: Vec<&'static str>,
    /// How often.
    pub repetitions: usize,
    /// Everything in less than a minute.
    pub quick: bool,
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
}

/// Of a load. Short, so that there are samples without a disturbance on a host that has other things to do; but where
/// somebody sleeps for milliseconds, a sample must hold many of these sleeps.
fn lengths(load: &Load, quick: bool) -> Lengths {
    let (rounds, throughput, latency) = match (quick, load.experiment == "victim") {
        (true, false) => (3, 5, 5),
        (true, true) => (1, 40, 80),
        (false, false) => (12, 6, 8),
        (false, true) => (6, 40, 150),
    };
    Lengths {
        rounds,
        throughput: Duration::from_millis(throughput),
        latency: Duration::from_millis(latency),
    }
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
/// When the host cannot start a thread.
pub fn run(plan: &Plan, mut tell: impl FnMut(&Progress)) -> io::Result<Results> {
    let host = Host::look();
    let scale = host.scale;
    let names = plan.experiments.iter();
    let loads: Vec<Load> = names
        .flat_map(|name| plan::loads(name, host.processors))
        .collect();
    let mut groups: Vec<Group> = loads
        .into_iter()
        .map(|load| Group {
            series: load
                .contestants()
                .into_iter()
                .map(|who| Series {
                    who,
                    rows: Vec::new(),
                    latency: rig::histogram(),
                })
                .collect(),
            load,
        })
        .collect();
    let samples = |group: &Group| lengths(&group.load, plan.quick).rounds * group.series.len();
    let of = plan.repetitions * groups.iter().map(samples).sum::<usize>();
    let (start, mut done, mut seed) = (Instant::now(), 0, 0);
    for repetition in 1..=plan.repetitions {
        for group in &mut groups {
            let load = &group.load;
            let lengths = lengths(load, plan.quick);
            let mut rates: Vec<Vec<Sample>> = group.series.iter().map(|_| Vec::new()).collect();
            let mut latencies: Vec<Vec<Sample>> = group.series.iter().map(|_| Vec::new()).collect();
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
                    let who = group.series[n].who;
                    let sample = |measure, length| rig::sample(load, who, measure, length, scale);
                    rates[n].push(sample(Measure::Throughput, lengths.throughput)?);
                    latencies[n].push(sample(Measure::Latency, lengths.latency)?);
                    done += 1;
                }
            }
            for ((series, rates), latencies) in group.series.iter_mut().zip(rates).zip(latencies) {
                let (rates, latencies) = (calmest(rates), calmest(latencies));
                let waited = rates.iter().chain(&latencies).map(|sample| sample.waited);
                let waited = waited.sum::<f64>() / (rates.len() + latencies.len()) as f64;
                let rate = stats::median(&rates.iter().map(|sample| sample.ops_per_s).collect::<Vec<_>>());
                let mut latency = rig::histogram();
                for sample in latencies {
                    latency.add(sample.latency).expect("all have the same bounds");
                }
                let row = Row::new(
                    load,
                    series.who,
                    (rate, waited),
                    &latency,
                    |ticks| scale.ns(ticks),
                    repetition,
                );
                series.rows.push(row);
                series.latency.add(latency).expect("all have the same bounds");
            }
        }
    }
    Ok(Results {
        groups,
        repetitions: plan.repetitions,
        host,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calmest_third_counts() {
        let of = |count: usize| {
            let sample = |n: usize| Sample {
                ops_per_s: n as f64,
                latency: rig::histogram(),
                waited: 1.0 / (n + 1) as f64,
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
