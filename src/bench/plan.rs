//! The experiments, as lists of loads.

use crate::actors::PlacementKind;
use crate::machine::dispatch::Dispatch;
use crate::machine::supervisor::MAX_CPUS;
use std::time::Duration;

/// How the measured vCPUs reach their registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// They read, and wait for the value.
    Ask,
    /// They write, and do not.
    Post,
    /// They read a word in place.
    Published,
}

impl Class {
    /// As in the results.
    pub fn name(self) -> &'static str {
        match self {
            Class::Ask => "ask",
            Class::Post => "post",
            Class::Published => "published",
        }
    }
}

/// One thing to be measured under every discipline.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Load {
    /// Which experiment it is of.
    pub experiment: &'static str,
    /// How registers are reached.
    pub class: Class,
    /// vCPUs whose accesses are measured.
    pub vcpus: usize,
    /// Devices that these use: vCPU `n` uses device `n` modulo this.
    pub devices: usize,
    /// What a handler of these costs.
    pub handler_ns: u64,
    /// For latencies: one access every so often, whose latency counts from when it was due. `None`: the next access as
    /// soon as the last is served.
    pub pace_ns: Option<u64>,
    /// One more vCPU, half of whose time goes to a device with a handler that blocks for so long.
    pub slow: Option<Duration>,
    /// The event loop is busy.
    pub storm: bool,
}

/// What the event loop does in a storm: it sleeps in poll for `STORM_POLL_NS`, then serves `STORM_CALLBACKS` callbacks,
/// each of which takes `STORM_CALLBACK_NS` and tells a device something.
pub const STORM_POLL_NS: u64 = 2_000;
/// See [`STORM_POLL_NS`].
pub const STORM_CALLBACKS: usize = 8;
/// See [`STORM_POLL_NS`].
pub const STORM_CALLBACK_NS: u64 = 1_000;

/// A vCPU that computes in between: 50 000 accesses a second.
const PACE_NS: u64 = 20_000;
/// A vCPU that posts faster than that, but slower than the device can take it.
const POST_PACE_NS: u64 = 5_000;

/// The names, and what each experiment is.
pub const EXPERIMENTS: [(&str, &str); 7] = [
    (
        "ask",
        "one vCPU, one idle device, a handler that does nothing: what an ask costs",
    ),
    (
        "post",
        "one vCPU posts to an idle device, and to one that is busy for 2 us with each post",
    ),
    ("published", "one vCPU reads a published word"),
    ("scale", "N vCPUs on N devices, N from 1 to 4 x processors"),
    (
        "shared",
        "2, 4 and 8 vCPUs on one device, with handlers of 0, 200 and 2000 ns",
    ),
    (
        "victim",
        "vCPUs on a fast device while another is on one that blocks for 0, 1 or 10 ms",
    ),
    ("storm", "vCPUs on their devices while the event loop is busy"),
];

/// The loads of an experiment on a host with so many processors.
pub fn loads(experiment: &str, processors: usize) -> Vec<Load> {
    let processors = processors.min(MAX_CPUS);
    let experiment = EXPERIMENTS
        .iter()
        .find(|(name, _)| *name == experiment)
        .map_or("", |(name, _)| name);
    let base = Load {
        experiment,
        class: Class::Ask,
        vcpus: 1,
        devices: 1,
        handler_ns: 0,
        pace_ns: None,
        slow: None,
        storm: false,
    };
    match experiment {
        "ask" => vec![base],
        "post" => {
            let class = Class::Post;
            let busy = Load {
                class,
                handler_ns: 2_000,
                pace_ns: Some(POST_PACE_NS),
                ..base.clone()
            };
            vec![Load { class, ..base }, busy]
        }
        "published" => vec![Load {
            class: Class::Published,
            ..base
        }],
        "scale" => {
            let most = (4 * processors).min(MAX_CPUS);
            let mut counts: Vec<usize> = (0..).map(|n| 1 << n).take_while(|n| *n < most).collect();
            counts.extend([processors, most]);
            counts.sort_unstable();
            counts.dedup();
            let load = |n| Load {
                vcpus: n,
                devices: n,
                ..base.clone()
            };
            counts.into_iter().map(load).collect()
        }
        "shared" => {
            let mut loads = Vec::new();
            for handler_ns in [0, 200, 2_000] {
                loads.extend([2, 4, 8].map(|vcpus| Load {
                    vcpus,
                    handler_ns,
                    ..base.clone()
                }));
            }
            loads
        }
        "victim" => [None, Some(1), Some(10)]
            .map(|ms| Load {
                // The slow one sleeps; the others are to have a processor each.
                vcpus: processors.saturating_sub(1).max(1),
                pace_ns: Some(PACE_NS),
                slow: ms.map(Duration::from_millis),
                ..base.clone()
            })
            .to_vec(),
        "storm" => {
            let mut counts = vec![1, processors];
            counts.dedup();
            let load = |n| Load {
                vcpus: n,
                devices: n,
                pace_ns: Some(PACE_NS),
                storm: true,
                ..base.clone()
            };
            counts.into_iter().map(load).collect()
        }
        _ => Vec::new(),
    }
}

/// A discipline, and where its device actors run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Contestant {
    /// The discipline.
    pub dispatch: Dispatch,
    /// For `actor`.
    pub placement: PlacementKind,
}

impl std::fmt::Display for Contestant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.placement {
            PlacementKind::Handoff => write!(f, "{}", self.dispatch),
            placement => write!(f, "{} ({placement})", self.dispatch),
        }
    }
}

impl Load {
    /// Everybody who is measured with this load.
    pub fn contestants(&self) -> Vec<Contestant> {
        let mut all = Dispatch::ALL
            .map(|dispatch| Contestant {
                dispatch,
                placement: PlacementKind::Handoff,
            })
            .to_vec();
        // What posts are for: a device that works while its vCPU goes on.
        if self.class == Class::Post && self.handler_ns > 0 {
            let dispatch = Dispatch::Actor;
            let placement = PlacementKind::Thread;
            all.insert(1, Contestant { dispatch, placement });
        }
        all
    }

    /// For people.
    pub fn describe(&self) -> String {
        let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let mut text = format!(
            "{}: {} on {}, {}",
            self.experiment,
            plural(self.vcpus, "vCPU"),
            plural(self.devices, "device"),
            self.class.name()
        );
        if self.class != Class::Published {
            text += &format!(", handler {} ns", self.handler_ns);
        }
        if let Some(slow) = self.slow {
            text += &format!(", and one more vCPU on a handler of {} ms", slow.as_millis());
        }
        if self.storm {
            text += ", event loop busy";
        }
        if let Some(pace) = self.pace_ns {
            text += &format!("; latency at one access in {} us a vCPU", pace / 1_000);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_experiment_has_loads_on_every_host_and_big_lock_takes_part() {
        for processors in [1, 2, 3, 64, 4096] {
            for (name, _) in EXPERIMENTS {
                let loads = loads(name, processors);
                assert!(!loads.is_empty(), "{name}");
                for load in loads {
                    assert!((1..=1024).contains(&load.vcpus) && load.devices >= 1, "{load:?}");
                    let first = load.contestants();
                    assert!(first.iter().any(|c| c.to_string() == "big-lock"), "{first:?}");
                }
            }
        }
        assert_eq!(loads("nothing", 2), []);
        let counts: Vec<_> = loads("scale", 3).iter().map(|load| load.vcpus).collect();
        assert_eq!(counts, [1, 2, 3, 4, 8, 12]);
    }
}
