//! `cargo xtask bench victim`: what Linux on one device notices of another CPU on a device that blocks.
//!
//! The scenarios of `tests/emulated/victim.toml`, again and again, in turns; the guest measures (`port-meter`, in the
//! emulated host's agent), here the figures are put side by side.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use harness::figures::Spread;
use harness::protocol::Event;
use harness::scenario::{self, Scenario};

use super::spread;
use crate::emulated_host::{self, HOST_MIB, Host, Image, Inside, Outcome};
use crate::paths;

const SCENARIOS: &str = "victim";
/// Whose p99.9 may hardly grow, and by what factor at most.
const PROMISE: (&str, f64) = ("victim/actor", 1.1);
/// Without this one's p99.9 at the slow device's time or beyond, nothing was shown.
const CONTRAST: (&str, f64) = ("victim/big-lock", 10e6);
/// A boot of the emulated host.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

#[derive(clap::Args)]
pub struct Args {
    /// Guests under each discipline, taken in turns
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
}

/// One guest's figures, by what its other CPU did.
type Figures = BTreeMap<String, Spread>;

pub fn run(args: &Args) -> Result<bool> {
    ensure!(args.runs > 0, "--runs has to be at least 1");
    let all = scenario::load(&paths::scenarios())?;
    let mut chosen = emulated_host::select(&all, &[SCENARIOS.to_owned()], None)?;
    let names: Vec<String> = chosen.iter().map(|s| s.name.clone()).collect();
    let image = Image::build(&Inside {
        actor_vmm: true,
        ..Inside::default()
    })?;
    let mut seen: BTreeMap<String, Vec<Figures>> = BTreeMap::new();
    let mut failures = 0;
    for _ in 0..args.runs {
        failures += round(&image, &chosen, &mut seen, true)?;
        chosen.rotate_left(1);
    }
    Ok(summary(&names, &seen)? && failures == 0)
}

/// Each scenario once, in one emulated host. Returns how many failed.
fn round(
    image: &Image,
    chosen: &[&Scenario],
    seen: &mut BTreeMap<String, Vec<Figures>>,
    retry: bool,
) -> Result<u64> {
    let mut plan = String::new();
    let (mut memory_mib, mut limit) = (0, BOOT_LIMIT);
    for scenario in chosen {
        plan.push_str(&format!("scenario {}\n", scenario.name));
        memory_mib = memory_mib.max(scenario.memory_mib()?);
        limit += Duration::from_secs(scenario.limit);
    }
    let host = Host {
        plan,
        memory_mib: HOST_MIB + memory_mib,
        cpus: 1,
        files: Vec::new(),
        typing: false,
        counted: false,
    };
    let (mut failures, mut passed) = (0, Vec::new());
    let outcome = image.boot(&host, Instant::now() + limit, &mut |event| match event {
        Event::Pass { job, note, .. } => {
            let figures: Figures = note
                .split("; ")
                .filter_map(Spread::parse)
                .map(|spread| (spread.name.clone(), spread))
                .collect();
            println!("  {job:<30} {note}");
            passed.push((job, figures));
        }
        Event::Fail { job, reason, .. } => {
            println!("FAIL    {job}: {reason}");
            failures += 1;
        }
        Event::Ready(_) => {}
        other => emulated_host::show(&other),
    })?;
    match outcome {
        // See `emulated_host::scenarios`. What it has measured until then does not count twice.
        Outcome::Died { hung: true, .. } if retry => {
            println!("again: the emulated host hangs; once more in a new one");
            return round(image, chosen, seen, false);
        }
        Outcome::Died { reason, .. } => bail!("the emulated host failed: {reason}"),
        Outcome::Done => {}
    }
    for (job, figures) in passed {
        seen.entry(job).or_default().push(figures);
    }
    Ok(failures)
}

fn summary(names: &[String], seen: &BTreeMap<String, Vec<Figures>>) -> Result<bool> {
    println!();
    println!(
        "  {:<30} {:^27}   {:^33}",
        "", "p99.9 in us, medians", "slow to alone, p99.9"
    );
    println!(
        "  {:<30} {:>8} {:>8} {:>9}   {:>9} {:>9} {:>9} {:>10}  p50",
        "", "alone", "sleeper", "slow", "median", "min", "max", "to sleeper"
    );
    let mut met = 0;
    for name in names {
        let Some(runs) = seen.get(name) else { continue };
        let all = |part: &str, value: fn(&Spread) -> u64| -> Result<Vec<f64>> {
            let values: Option<Vec<f64>> = runs
                .iter()
                .map(|run| run.get(part).map(|spread| value(spread) as f64))
                .collect();
            values.ok_or_else(|| anyhow::anyhow!("{name} told nothing about \"{part}\""))
        };
        let p999 = |part| all(part, |s| s.p999);
        let (alone, sleeper, slow) = (p999("alone")?, p999("sleeper")?, p999("slow")?);
        let to_alone = spread(ratios(&slow, &alone));
        let to_sleeper = spread(ratios(&slow, &sleeper)).median;
        let p50 = spread(ratios(&all("slow", |s| s.p50)?, &all("alone", |s| s.p50)?)).median;
        let median = |values: &[f64]| spread(values.iter().copied()).median;
        println!(
            "  {name:<30} {:>8.0} {:>8.0} {:>9.0}   {:>9.2} {:>9.2} {:>9.2} {to_sleeper:>10.2}  {p50:.2}",
            median(&alone) / 1e3,
            median(&sleeper) / 1e3,
            median(&slow) / 1e3,
            to_alone.median,
            to_alone.min,
            to_alone.max,
        );
        if name == PROMISE.0 {
            met += u32::from(to_alone.median <= PROMISE.1);
        }
        if name == CONTRAST.0 {
            met += u32::from(median(&slow) >= CONTRAST.1);
        }
    }
    let kept = met == 2;
    println!();
    println!(
        "{}    {}: p99.9 next to a slow device at most {} x alone, and {}: at least {} ms",
        if kept { "pass" } else { "FAIL" },
        PROMISE.0,
        PROMISE.1,
        CONTRAST.0,
        CONTRAST.1 / 1e6
    );
    println!("{NOTES}");
    Ok(kept)
}

/// Run by run: both of a pair are of the same guest.
fn ratios(of: &[f64], to: &[f64]) -> impl Iterator<Item = f64> {
    of.iter().zip(to).map(|(of, to)| of / to)
}

const NOTES: &str = "\
A guest's first CPU reads one device while the second has nothing to do (alone), sleeps and reads it once in 10 ms
(sleeper), or is on a device whose handler takes 10 ms all the time (slow). The emulated host has one CPU for both, so
the second takes some time from the first whatever the discipline.";

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(alone: u64, slow: u64) -> Figures {
        let spread = |name: &str, p999| Spread::of(name, &mut [p999]);
        [("alone", alone), ("sleeper", alone), ("slow", slow)]
            .map(|(name, p999)| (name.to_owned(), spread(name, p999)))
            .into()
    }

    #[test]
    fn the_promise_needs_both_sides() {
        let names = ["victim/actor", "victim/big-lock"].map(str::to_owned);
        let kept = |actor: u64, big_lock: u64| {
            let seen = [
                (names[0].clone(), vec![figures(1000, actor)]),
                (names[1].clone(), vec![figures(1000, big_lock)]),
            ];
            summary(&names, &seen.into()).unwrap()
        };
        assert!(kept(1100, 10_000_000));
        assert!(!kept(1200, 10_000_000), "the actor was held up");
        assert!(!kept(1100, 9_000_000), "nothing was shown");
        let lacking = [(names[0].clone(), vec![Figures::new()])];
        assert!(summary(&names, &lacking.into()).is_err());
        assert!(!summary(&names, &BTreeMap::new()).unwrap());
    }
}
