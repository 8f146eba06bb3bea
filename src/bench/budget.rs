//! What is promised of the actors (issue 3, design.md), against what a run measured: bounds on ratios within one
//! repetition.

use super::contestant::Contestant;
use super::plan::{AGAINST, Class, Load, PAUSED_MOST, SLOW_DISK, Source};
use super::report::{Group, Row, Series, show};
use super::stats::{Estimate, estimate};
use crate::actors::PlacementKind;
use crate::machine::dispatch::{Dispatch, MutexKind};
use std::fmt;
use std::time::Duration;

/// A bound on a ratio.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Bound {
    /// It must not be above this.
    AtMost(f64),
    /// It must not be below this.
    AtLeast(f64),
}

impl Bound {
    fn holds(self, ratio: f64) -> bool {
        match self {
            Bound::AtMost(most) => ratio <= most,
            Bound::AtLeast(least) => ratio >= least,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::AtMost(most) => write!(f, "at most {}", show(*most)),
            Bound::AtLeast(least) => write!(f, "at least {}", show(*least)),
        }
    }
}

/// What a run says about a bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The whole interval is within.
    Met,
    /// The median is within, not all of the interval.
    Likely,
    /// The median is not within, some of the interval is.
    Unlikely,
    /// Nothing of the interval is within.
    Missed,
}

impl Verdict {
    fn of(bound: Bound, measured: Estimate) -> Verdict {
        let ends = [measured.low, measured.high].map(|end| bound.holds(end));
        match (bound.holds(measured.median), ends) {
            (true, [true, true]) => Verdict::Met,
            (true, _) => Verdict::Likely,
            (false, [false, false]) => Verdict::Missed,
            (false, _) => Verdict::Unlikely,
        }
    }

    /// In a table.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Met => "pass",
            Verdict::Likely => "pass?",
            Verdict::Unlikely => "fail?",
            Verdict::Missed => "FAIL",
        }
    }
}

/// A bound and what was measured.
#[derive(Clone, PartialEq, Debug)]
pub struct Line {
    /// Its number in the issue.
    pub item: &'static str,
    /// What is compared.
    pub what: String,
    /// How it must be.
    pub bound: Bound,
    /// How it was.
    pub measured: Estimate,
    /// What that says.
    pub verdict: Verdict,
}

const STD: Dispatch = Dispatch::BigLock(MutexKind::Std);
const BIG_LOCKS: [Dispatch; 2] = [STD, Dispatch::BigLock(MutexKind::ParkingLot)];
const DEVICE_LOCKS: [Dispatch; 2] = [
    Dispatch::DeviceLock(MutexKind::Std),
    Dispatch::DeviceLock(MutexKind::ParkingLot),
];

type Value = fn(&Row) -> f64;

fn cost(row: &Row) -> f64 {
    1.0 / row.ops_per_s
}

fn rate(row: &Row) -> f64 {
    row.ops_per_s
}

fn p50(row: &Row) -> f64 {
    row.p50_ns
}

fn p99(row: &Row) -> f64 {
    row.p99_ns
}

fn p999(row: &Row) -> f64 {
    row.p999_ns
}

/// All bounds that this run has something to say about.
pub fn lines(groups: &[Group]) -> Vec<Line> {
    let mut lines = Lines {
        groups,
        lines: Vec::new(),
    };
    lines.idle();
    lines.scale();
    lines.shared();
    lines.victim();
    lines.slow_disk();
    lines.channel();
    lines.against();
    lines.kick();
    lines.pause();
    lines.lines
}

struct Lines<'a> {
    groups: &'a [Group],
    lines: Vec<Line>,
}

/// The best of some in each repetition: the one with the smallest `value`, or with the largest.
fn best(group: &Group, whose: &[Dispatch], value: Value, smallest: bool) -> Option<Vec<f64>> {
    let series: Option<Vec<&Series>> = whose
        .iter()
        .map(|dispatch| group.of(Contestant::of(*dispatch)))
        .collect();
    let series = series?;
    let repetitions = series.iter().map(|series| series.rows.len()).min()?;
    let of = |n: usize| series.iter().map(move |series| value(&series.rows[n]));
    Some(
        (0..repetitions)
            .map(|n| match smallest {
                true => of(n).fold(f64::INFINITY, f64::min),
                false => of(n).fold(0.0, f64::max),
            })
            .collect(),
    )
}

impl<'a> Lines<'a> {
    fn find(&self, experiment: &str, wanted: impl Fn(&Load) -> bool) -> Option<&'a Group> {
        self.groups
            .iter()
            .find(|group| group.load.experiment == experiment && wanted(&group.load))
    }

    fn push(&mut self, item: &'static str, what: impl Into<String>, bound: Bound, ratios: &[f64]) {
        if ratios.is_empty() {
            return;
        }
        let measured = estimate(ratios);
        self.lines.push(Line {
            item,
            what: what.into(),
            bound,
            measured,
            verdict: Verdict::of(bound, measured),
        });
    }

    /// A contestant of a load against the best of others.
    fn against_best(
        &mut self,
        item: &'static str,
        what: impl Into<String>,
        bound: Bound,
        (group, who): (&Group, Contestant),
        (others, value): (&[Dispatch], Value),
    ) {
        let smallest = matches!(bound, Bound::AtMost(_));
        if let (Some(ours), Some(best)) = (group.of(who), best(group, others, value, smallest)) {
            let ratios = ours.values(value).into_iter().zip(best);
            let ratios: Vec<f64> = ratios.map(|(ours, best)| ours / best).collect();
            self.push(item, what, bound, &ratios);
        }
    }

    fn idle(&mut self) {
        let scripted =
            |load: &Load| load.source == Source::Scripted && load.handler_ns == 0 && load.pace_ns.is_none();
        let idle: [(&str, &str, f64); 3] = [
            (
                "ask",
                "cost of an ask, idle, to big-lock with the better mutex",
                1.05,
            ),
            ("post", "cost of a post, idle, to the same", 1.0),
            (
                "published",
                "cost of a published read, to the same read under big-lock with the better mutex",
                0.3,
            ),
        ];
        for (experiment, what, most) in idle {
            if let Some(group) = self.find(experiment, scripted) {
                let us = (group, Contestant::ACTOR);
                self.against_best("1", what, Bound::AtMost(most), us, (&BIG_LOCKS, cost));
            }
        }
        // What it spares, too: a register that is not published is asked for.
        let groups = ["published", "ask"].map(|experiment| self.find(experiment, scripted));
        if let [Some(published), Some(ask)] = groups
            && let (Some(ours), Some(theirs)) =
                (published.of(Contestant::ACTOR), best(ask, &BIG_LOCKS, cost, true))
        {
            let ratios = ours.values(cost).into_iter().zip(theirs);
            let ratios: Vec<f64> = ratios.map(|(ours, theirs)| ours / theirs).collect();
            let what = "the same, to an ask under big-lock";
            self.push("1", what, Bound::AtMost(0.3), &ratios);
        }
        if let Some(group) = self.find("post", |load| {
            load.source == Source::Scripted && load.handler_ns > 0
        }) {
            let dispatch = Dispatch::Actor;
            let placement = PlacementKind::Thread;
            let us = Contestant::Discipline { dispatch, placement };
            let what = "p50 of a post to a thread that is busy for 2 us at a time, to big-lock with the better mutex";
            let bound = Bound::AtMost(0.5);
            self.against_best("1", what, bound, (group, us), (&BIG_LOCKS, p50));
        }
    }

    fn scale(&mut self) {
        let two = |load: &Load| load.source == Source::Scripted && load.vcpus == 2;
        let Some(group) = self.find("scale", two) else {
            return;
        };
        let us = (group, Contestant::ACTOR);
        let what = "throughput, two vCPUs on two devices, to big-lock (std)";
        self.against_best("2", what, Bound::AtLeast(5.0), us, (&[STD], rate));
        let what = "the same, to device-lock with the better mutex";
        self.against_best("2", what, Bound::AtLeast(1.5), us, (&DEVICE_LOCKS, rate));
    }

    fn shared(&mut self) {
        let locks = [BIG_LOCKS, DEVICE_LOCKS].concat();
        let groups = self.groups;
        let shared =
            |group: &&Group| group.load.experiment == "shared" && group.load.source == Source::Scripted;
        for group in groups.iter().filter(shared) {
            let Load {
                vcpus, handler_ns, ..
            } = group.load;
            let us = (group, Contestant::ACTOR);
            let on = format!("{vcpus} vCPUs on one device, handler {handler_ns} ns");
            let what = format!("throughput, {on}, to the best lock");
            self.against_best("3", what, Bound::AtLeast(1.0), us, (&locks, rate));
            let what = format!("p99.9, {on}, to the best lock");
            self.against_best("3", what, Bound::AtMost(1.0), us, (&locks, p999));
            if (vcpus, handler_ns) == (2, 200) {
                let what = format!("p99.9, {on}, to big-lock (std)");
                self.against_best("3", what, Bound::AtMost(0.2), us, (&[STD], p999));
            }
        }
    }

    fn victim(&mut self) {
        for source in [Source::Scripted, Source::Kvm] {
            let slow = |slow: Option<Duration>| {
                self.find("victim", move |load| {
                    load.source == source && load.class == Class::Ask && load.slow == slow
                })
            };
            let (Some(without), Some(with)) = (slow(None), slow(Some(Duration::from_millis(10)))) else {
                continue;
            };
            let ratios = |who| -> Option<Vec<f64>> {
                let (with, without) = (with.of(who)?.values(p999), without.of(who)?.values(p999));
                Some(
                    with.iter()
                        .zip(without)
                        .map(|(with, without)| with / without)
                        .collect(),
                )
            };
            let name = source.name();
            if let Some(ratios) = ratios(Contestant::ACTOR) {
                let what = format!("p99.9 next to a handler of 10 ms, to without one, {name}");
                self.push("4", what, Bound::AtMost(1.1), &ratios);
            }
            // That the experiment shows what it is for.
            if let Some(ratios) = ratios(Contestant::BIG_LOCK) {
                let what = format!("the same of big-lock (std): what there is to be gained, {name}");
                self.push("4", what, Bound::AtLeast(10.0), &ratios);
            }
        }
    }

    /// A machine's console and network beside its slow disk.
    fn slow_disk(&mut self) {
        for (class, what) in [
            (Class::Console, "the serial port's line status"),
            (Class::Frame, "a frame to a network and back"),
        ] {
            let of = |disk| self.find("victim", move |load| load.class == class && load.disk == disk);
            let (Some(without), Some(with)) = (of(None), of(Some(SLOW_DISK))) else {
                continue;
            };
            let (Some(without), Some(with)) = (without.of(Contestant::ACTOR), with.of(Contestant::ACTOR))
            else {
                continue;
            };
            for (name, value) in [("p50", p50 as Value), ("p99", p99)] {
                let ratios = with.values(value).into_iter().zip(without.values(value));
                let ratios: Vec<f64> = ratios.map(|(with, without)| with / without).collect();
                let what = format!("{name} of {what} while a disk takes 50 ms a request, to without");
                self.push("4", what, Bound::AtMost(1.1), &ratios);
            }
        }
    }

    /// An idle device's thread sleeps. At full speed it never is: the channel looks and yields before it lets either side
    /// sleep, so that an ask there may be one to a thread that is awake; see the page's text.
    fn channel(&mut self) {
        let naive = Contestant::of(Dispatch::Channel { spin: false });
        for source in [Source::Scripted, Source::Kvm] {
            let Some(group) = self.find("ask", |load| load.source == source && load.pace_ns.is_some()) else {
                continue;
            };
            if let (Some(ours), Some(naive)) = (group.of(Contestant::ACTOR), group.of(naive)) {
                let ratios = naive.values(p50).into_iter().zip(ours.values(p50));
                let ratios: Vec<f64> = ratios.map(|(naive, ours)| naive / ours).collect();
                match source {
                    Source::Scripted => {
                        let what =
                            "p50 of an ask through channels to a device whose thread sleeps, to the actor's";
                        self.push("5", what, Bound::AtLeast(100.0), &ratios);
                    }
                    // The host's exit is in both.
                    Source::Kvm => {
                        let what = "the same from a guest of KVM, exit and entry included in both";
                        self.push("5", what, Bound::AtLeast(1.0), &ratios);
                    }
                }
            }
        }
    }

    fn against(&mut self) {
        let groups = self.groups;
        for group in groups.iter().filter(|group| group.load.experiment == AGAINST.0) {
            let reference = group.reference();
            let Load { vcpus, devices, .. } = group.load;
            let name = reference.who;
            let least = match (vcpus, devices, group.load.slow) {
                (1, 1, None) => 1.0,
                (2, 2, None) => 2.0,
                _ => continue,
            };
            let ratios = |who| -> Option<Vec<f64>> {
                let theirs = reference.values(rate).into_iter();
                Some(
                    group
                        .of(who)?
                        .values(rate)
                        .into_iter()
                        .zip(theirs)
                        .map(|(a, b)| a / b)
                        .collect(),
                )
            };
            let on = format!("{vcpus} vCPUs on {devices} devices");
            let Some(ours) = ratios(Contestant::Run(Dispatch::Actor)) else {
                continue;
            };
            let what = format!("exits a second, {on}, to {name}");
            self.push("6", what, Bound::AtLeast(least), &ours);
            // What the host's own exit leaves room for: nobody can be faster than nothing at all.
            if let Some(bare) = ratios(Contestant::Bare) {
                let part: Vec<f64> = ours.iter().zip(&bare).map(|(ours, bare)| ours / bare).collect();
                let room = estimate(&bare);
                let what = format!(
                    "the same, to KVM_RUN without any work, which has x {} of {name}",
                    show(room.median)
                );
                self.push("6", what, Bound::AtLeast(0.9), &part);
            }
        }
    }

    fn kick(&mut self) {
        let groups = self.groups;
        for group in groups.iter().filter(|group| group.load.class == Class::Kick) {
            let state = if group.load.halted { "halted" } else { "running" };
            let Some(ours) = group.of(Contestant::ACTOR) else {
                continue;
            };
            for (name, value) in [("p50", p50 as Value), ("p99", p99)] {
                let bare = group.reference().values(value);
                let ratios = ours.values(value).into_iter().zip(bare);
                let ratios: Vec<f64> = ratios.map(|(ours, bare)| ours / bare).collect();
                let what = format!("{name} of a kick, {state} guest, to a signal and KVM_RUN's return");
                self.push("K", what, Bound::AtMost(1.2), &ratios);
            }
        }
    }

    fn pause(&mut self) {
        let groups = self.groups;
        let most = |group: &&Group| group.load.class == Class::Pause && group.load.vcpus == PAUSED_MOST;
        for group in groups.iter().filter(most) {
            let Some(ours) = group.of(Contestant::ACTOR) else {
                continue;
            };
            let bare = group.reference().values(p50);
            let ratios: Vec<f64> = ours
                .values(p50)
                .into_iter()
                .zip(bare)
                .map(|(ours, bare)| ours / bare)
                .collect();
            let source = group.load.source.name();
            let what = format!(
                "p50 of a pause of {PAUSED_MOST} running vCPUs, to asking a thread that signals as many at once until all have left the guest, {source}"
            );
            self.push("P", what, Bound::AtMost(2.0), &ratios);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::groups;

    #[test]
    fn every_line_is_there_and_says_what_was_measured() {
        let groups = groups();
        let lines = lines(&groups);
        let count = |item: &str| lines.iter().filter(|line| line.item == item).count();
        // ask, post and published, this to two others, and the busy post; two of scale; nine loads and one more line of
        // shared; two sources of victim, console and frames beside a slow disk; two sources of a channel; kick running and halted; two sources of pause.
        assert_eq!(
            ["1", "2", "3", "4", "5", "6", "K", "P"].map(count),
            [5, 2, 19, 8, 2, 0, 4, 2]
        );
        // Each contestant takes 10 ns more than the one before, the actor 100: locks 130 to 160.
        let ask = &lines[0];
        assert!((ask.measured.median - 100.0 / 150.0).abs() < 1e-6, "{ask:?}");
        assert_eq!(ask.verdict, Verdict::Met);
        let channel = lines.iter().find(|line| line.item == "5").unwrap();
        assert!((channel.measured.median - 1.1).abs() < 0.01, "{channel:?}");
        assert_eq!(channel.verdict, Verdict::Missed);
    }

    #[test]
    fn verdicts_look_at_the_interval() {
        let of = |low, median, high| Verdict::of(Bound::AtMost(1.0), Estimate { median, low, high });
        assert_eq!(of(0.8, 0.9, 1.0), Verdict::Met);
        assert_eq!(of(0.8, 0.9, 1.1), Verdict::Likely);
        assert_eq!(of(0.9, 1.1, 1.2), Verdict::Unlikely);
        assert_eq!(of(1.1, 1.2, 1.3), Verdict::Missed);
        assert!(Bound::AtLeast(2.0).holds(2.0) && !Bound::AtLeast(2.0).holds(1.9));
    }
}
