//! The experiments, as lists of loads.

use super::against::Program;
use super::contestant::Contestant;
use crate::actors::PlacementKind;
use crate::guests::meter::MAX_VCPUS;
use crate::machine::dispatch::{Dispatch, MutexKind};
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
    /// They read the line status of a whole machine's serial port.
    Console,
    /// They send frames through a whole machine's network, which gives each back.
    Frame,
    /// Nothing of theirs: they are kicked.
    Kick,
    /// Nothing of theirs: all of them are paused.
    Pause,
}

impl Class {
    /// As in the results.
    pub fn name(self) -> &'static str {
        match self {
            Class::Ask => "ask",
            Class::Post => "post",
            Class::Published => "published",
            Class::Console => "console",
            Class::Frame => "frame",
            Class::Kick => "kick",
            Class::Pause => "pause",
        }
    }
}

/// Where exits come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// vCPUs that pretend, at full speed, on any host.
    Scripted,
    /// A bare-metal guest of KVM, which takes the time itself.
    Kvm,
}

impl Source {
    /// As in the results.
    pub fn name(self) -> &'static str {
        match self {
            Source::Scripted => "scripted",
            Source::Kvm => "kvm",
        }
    }
}

impl std::str::FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Source::Scripted, Source::Kvm]
            .into_iter()
            .find(|source| source.name() == text)
            .ok_or_else(|| format!("'{text}' is not a source of exits; there are scripted and kvm"))
    }
}

/// One thing to be measured under every discipline.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Load {
    /// Which experiment it is of.
    pub experiment: &'static str,
    /// Where its exits come from.
    pub source: Source,
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
    /// One more vCPU that keeps a disk busy, which takes so long for each request.
    pub disk: Option<Duration>,
    /// The event loop is busy.
    pub storm: bool,
    /// How long each access was queued, served and replied is told apart.
    pub split: bool,
    /// For `kick`: the guest is halted. If not, it spins.
    pub halted: bool,
    /// For `against`: the other programs.
    pub programs: Vec<&'static Program>,
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
/// The same where an exit costs more than ten microseconds.
const KVM_PACE_NS: u64 = 50_000;
/// Where threads have to be woken for each.
const FRAME_PACE_NS: u64 = 200_000;
/// What the slow disk takes for a request.
pub const SLOW_DISK: Duration = Duration::from_millis(50);

/// The names, and what each experiment is.
pub const EXPERIMENTS: [(&str, &str); 10] = [
    (
        "ask",
        "one vCPU, one idle device, a handler that does nothing: what an ask costs, at full speed and now and then",
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
        "vCPUs on a fast device while another is on one that blocks for 0, 1 or 10 ms; console and network of a machine \
         whose disk takes 50 ms for a request",
    ),
    ("storm", "vCPUs on their devices while the event loop is busy"),
    (
        "split",
        "where the time of an access goes: queued, served, replied",
    ),
    (
        "kick",
        "from the order to stop a vCPU to its look into the mailbox; needs /dev/kvm",
    ),
    (
        "pause",
        "from the wish to pause a machine of 1, 4, 16 and 64 vCPUs to its answer",
    ),
];

/// The name of what `--against` adds.
pub const AGAINST: (&str, &str) = (
    "against",
    "the same guest in other programs and here, each a process of its own, on this host's KVM",
);

/// What an experiment is, by its name.
pub fn about(experiment: &str) -> &'static str {
    EXPERIMENTS
        .iter()
        .chain([&AGAINST])
        .find(|(name, _)| *name == experiment)
        .map_or("", |(_, about)| about)
}

/// The most vCPUs that `pause` pauses, and those that something is promised for.
pub const PAUSED_MOST: usize = 64;

/// How long the slow device takes in `against`.
pub const AGAINST_SLOW: Duration = Duration::from_millis(10);

/// What is run against other programs: one vCPU; two on two devices, and two on one; one while another waits for a slow
/// device.
pub fn against_loads(programs: &[&'static Program]) -> Vec<Load> {
    let base = Load {
        experiment: AGAINST.0,
        source: Source::Kvm,
        programs: programs.to_vec(),
        ..Load::default()
    };
    let with = |vcpus, devices| Load {
        vcpus,
        devices,
        ..base.clone()
    };
    let victim = Load {
        pace_ns: Some(KVM_PACE_NS),
        slow: Some(AGAINST_SLOW),
        programs: programs
            .iter()
            .filter(|program| program.can_be_slow())
            .copied()
            .collect(),
        ..base.clone()
    };
    let mut loads = vec![with(1, 1), with(2, 2), with(2, 1)];
    loads.extend((!victim.programs.is_empty()).then_some(victim));
    loads
}

impl Default for Load {
    fn default() -> Load {
        Load {
            experiment: "",
            source: Source::Scripted,
            class: Class::Ask,
            vcpus: 1,
            devices: 1,
            handler_ns: 0,
            pace_ns: None,
            slow: None,
            disk: None,
            storm: false,
            split: false,
            halted: false,
            programs: Vec::new(),
        }
    }
}

/// The loads of an experiment from this source on a host with so many processors; none where the source cannot do it.
pub fn loads(experiment: &str, source: Source, processors: usize) -> Vec<Load> {
    let most = match source {
        Source::Scripted => MAX_CPUS,
        // One more is the slow one.
        Source::Kvm => MAX_VCPUS - 1,
    };
    let processors = processors.min(most);
    let experiment = EXPERIMENTS
        .iter()
        .find(|(name, _)| *name == experiment)
        .map_or("", |(name, _)| name);
    if !matches!(
        (experiment, source),
        (
            "ask" | "post" | "published" | "scale" | "shared" | "victim" | "pause",
            _
        ) | ("storm" | "split", Source::Scripted)
            | ("kick", Source::Kvm)
    ) {
        return Vec::new();
    }
    let base = Load {
        experiment,
        source,
        ..Load::default()
    };
    let pace = match source {
        Source::Scripted => PACE_NS,
        Source::Kvm => KVM_PACE_NS,
    };
    match experiment {
        "ask" => {
            // A guest that computes in between leaves its devices idle, and their threads, if they have any, asleep.
            let calm = Load {
                pace_ns: Some(pace),
                ..base.clone()
            };
            vec![base, calm]
        }
        "post" => {
            let class = Class::Post;
            let busy = Load {
                class,
                handler_ns: 2_000,
                pace_ns: Some(match source {
                    Source::Scripted => POST_PACE_NS,
                    Source::Kvm => KVM_PACE_NS,
                }),
                ..base.clone()
            };
            vec![Load { class, ..base }, busy]
        }
        "published" => vec![Load {
            class: Class::Published,
            ..base
        }],
        "scale" => {
            // A guest of KVM also spins where it waits for its other vCPUs.
            let times = if source == Source::Kvm { 2 } else { 4 };
            let most = (times * processors).min(most);
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
            if source == Source::Kvm {
                // What 200 ns more or less are drowns in an exit.
                loads.retain(|load| load.vcpus <= 4 && load.handler_ns != 200);
            }
            loads
        }
        "victim" => {
            let handlers = [None, Some(1), Some(10)].map(|ms| Load {
                // The slow one sleeps; the others are to have a processor each.
                vcpus: processors.saturating_sub(1).max(1),
                pace_ns: Some(pace),
                slow: ms.map(Duration::from_millis),
                ..base.clone()
            });
            let mut loads = handlers.to_vec();
            if source == Source::Scripted {
                for (class, pace) in [(Class::Console, pace), (Class::Frame, FRAME_PACE_NS)] {
                    loads.extend([None, Some(SLOW_DISK)].map(|disk| Load {
                        class,
                        pace_ns: Some(pace),
                        disk,
                        ..base.clone()
                    }));
                }
            }
            loads
        }
        "storm" => {
            let mut counts = vec![1, processors];
            counts.dedup();
            let load = |n| Load {
                vcpus: n,
                devices: n,
                pace_ns: Some(pace),
                storm: true,
                ..base.clone()
            };
            counts.into_iter().map(load).collect()
        }
        "split" => {
            let load = |vcpus, handler_ns| Load {
                vcpus,
                handler_ns,
                split: true,
                ..base.clone()
            };
            vec![load(1, 0), load(2, 0), load(2, 200), load(2, 2_000)]
        }
        "kick" => [false, true]
            .map(|halted| Load {
                class: Class::Kick,
                halted,
                ..base.clone()
            })
            .to_vec(),
        "pause" => [1, 4, 16, PAUSED_MOST]
            .map(|vcpus| Load {
                class: Class::Pause,
                vcpus,
                devices: 0,
                ..base.clone()
            })
            .to_vec(),
        _ => Vec::new(),
    }
}

impl Load {
    /// Everybody who is measured with this load.
    pub fn contestants(&self) -> Vec<Contestant> {
        if matches!(self.class, Class::Kick | Class::Pause) {
            return vec![Contestant::ACTOR, Contestant::Bare];
        }
        if !self.programs.is_empty() {
            let ours = [
                Contestant::Run(Dispatch::Actor),
                Contestant::Run(Dispatch::BigLock(MutexKind::Std)),
            ];
            let theirs = self.programs.iter().map(|program| Contestant::Program(program));
            let mut all: Vec<_> = ours.into_iter().chain(theirs).collect();
            // Nothing is slow where nothing is done.
            all.extend(self.slow.is_none().then_some(Contestant::Bare));
            return all;
        }
        if matches!(self.class, Class::Console | Class::Frame) {
            return vec![Contestant::ACTOR, Contestant::BIG_LOCK];
        }
        let mut all = Dispatch::ALL.map(Contestant::of).to_vec();
        // What posts are for: a device that works while its vCPU goes on. And where its time goes.
        if self.split || self.class == Class::Post && self.handler_ns > 0 {
            let dispatch = Dispatch::Actor;
            let placement = PlacementKind::Thread;
            all.insert(1, Contestant::Discipline { dispatch, placement });
        }
        // What is left when nothing is done for an exit.
        if self.source == Source::Kvm && self.handler_ns == 0 && self.slow.is_none() {
            all.push(Contestant::Bare);
        }
        all
    }

    /// Whom the others are compared with.
    pub fn reference(&self) -> Contestant {
        match (self.class, self.programs.first()) {
            (Class::Kick | Class::Pause, _) => Contestant::Bare,
            (_, Some(program)) => Contestant::Program(program),
            _ => Contestant::BIG_LOCK,
        }
    }

    /// Whether it differs in nothing but vCPUs, and devices with them, and its contestants are the same.
    pub fn is_like(&self, other: &Load) -> bool {
        let shared = |load: &Load| load.devices != load.vcpus;
        let rest = |load: &Load| Load {
            vcpus: 1,
            devices: 1,
            ..load.clone()
        };
        shared(self) == shared(other)
            && rest(self) == rest(other)
            && self.contestants() == other.contestants()
    }

    /// For people.
    pub fn describe(&self) -> String {
        let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        if self.class == Class::Kick {
            let what = if self.halted { "halted" } else { "running" };
            return format!("kick: 1 vCPU, {what}, from the order to its look into the mailbox; kvm");
        }
        if self.class == Class::Pause {
            let (who, source) = (plural(self.vcpus, "running vCPU"), self.source.name());
            return format!("pause: {who}, from the wish to the answer; {source}");
        }
        if let Some(what) = match self.class {
            Class::Console => Some("the serial port's line status"),
            Class::Frame => Some("a frame to a network and back"),
            _ => None,
        } {
            let disk = self.disk.map_or_else(
                || "its disk at rest".to_owned(),
                |time| {
                    format!(
                        "another vCPU keeping a disk busy that takes {} ms a request",
                        time.as_millis()
                    )
                },
            );
            let pace = self.pace_ns.unwrap_or(0) / 1_000;
            return format!("{}: {what}, {disk}; one in {pace} us", self.experiment);
        }
        let mut text = format!(
            "{}: {} on {}, {}",
            self.experiment,
            plural(self.vcpus, "vCPU"),
            plural(self.devices, "device"),
            self.class.name()
        );
        if self.class != Class::Published && self.programs.is_empty() {
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
        if self.source == Source::Kvm {
            text += "; kvm";
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_experiment_has_loads_on_every_host_and_its_reference_takes_part() {
        for processors in [1, 2, 3, 64, 4096] {
            for (name, _) in EXPERIMENTS {
                let loads: Vec<_> = [Source::Scripted, Source::Kvm]
                    .into_iter()
                    .flat_map(|source| loads(name, source, processors))
                    .collect();
                assert!(!loads.is_empty(), "{name}");
                for load in loads {
                    let most = match load.source {
                        Source::Scripted => MAX_CPUS,
                        Source::Kvm => MAX_VCPUS,
                    };
                    let vcpus = load.vcpus + usize::from(load.slow.is_some());
                    let most = if name == "pause" { PAUSED_MOST } else { most };
                    let devices = load.devices >= 1 || name == "pause";
                    assert!((1..=most).contains(&vcpus) && devices, "{load:?}");
                    assert!(load.contestants().contains(&load.reference()), "{load:?}");
                }
            }
        }
        assert_eq!(loads("nothing", Source::Scripted, 2), []);
        let counts: Vec<_> = loads("scale", Source::Scripted, 3)
            .iter()
            .map(|load| load.vcpus)
            .collect();
        assert_eq!(counts, [1, 2, 3, 4, 8, 12]);
    }

    #[test]
    fn programs_are_the_reference_and_only_those_that_can_be_slow_have_victims() {
        let qemu: &'static Program = Box::leak(Box::new(Program::qemu()));
        let plain: &'static Program = Box::leak(Box::new(Program::parse("/x/vmm {image}").unwrap()));
        let loads = against_loads(&[plain, qemu]);
        assert_eq!(loads.len(), 4);
        assert_eq!(loads[0].reference(), Contestant::Program(plain));
        assert_eq!(loads[3].reference(), Contestant::Program(qemu));
        assert_eq!(against_loads(&[plain]).len(), 3);
        for load in loads {
            assert!(load.contestants().contains(&load.reference()));
        }
    }
}
