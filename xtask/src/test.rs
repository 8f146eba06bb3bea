//! README's second command, and what CI runs.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::scenario;

use crate::emulated_host::{self, Options, Vmm};
use crate::{fuzz, kernel, paths, process, setup};

#[derive(clap::Args)]
pub struct Args {
    /// Scenarios of the emulated host: a suite, `all`, or `none`
    #[arg(long, default_value = "ci")]
    pub suite: String,
    /// Only the steps whose name contains this
    #[arg(long)]
    pub only: Option<String>,
}

struct Step {
    name: &'static str,
    words: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
    limit: u64,
    /// How many tests have to pass in it; a filter that matches nothing would be a success for cargo.
    tests: Option<fn() -> Result<usize>>,
}

/// The step whose tests want a stock kernel.
const TESTS: &str = "tests";

/// Every step that is a cargo command, in order. Each has a limit in seconds, so that a hang is a failure.
const STEPS: [Step; 4] = [
    Step {
        name: "format",
        words: &["fmt", "--all", "--check"],
        env: &[],
        limit: 60,
        tests: None,
    },
    Step {
        name: "clippy",
        words: &[
            "clippy",
            "--quiet",
            "--locked",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
        env: &[],
        limit: 900,
        tests: None,
    },
    Step {
        name: TESTS,
        words: &["test", "--quiet", "--locked", "--workspace"],
        env: &[],
        limit: 1200,
        tests: None,
    },
    // Another cfg would throw away what the other steps have built, hence a target directory of its own.
    Step {
        name: "loom models",
        words: &[
            "test",
            "--quiet",
            "--locked",
            "--release",
            "--lib",
            "--target-dir",
            "target/loom",
            "loom_",
        ],
        env: &[
            ("RUSTFLAGS", "--cfg loom"),
            ("LOOM_MAX_PREEMPTIONS", "3"),
            ("CARGO_PROFILE_RELEASE_LTO", "off"),
        ],
        limit: 900,
        tests: Some(loom_models),
    },
];

/// For each target: whether it runs at all, and what is found at once.
const FUZZ_SECONDS: u32 = 5;

/// For all scenarios of the suite ci together.
const CI_LIMIT: Duration = Duration::from_secs(1800);
/// For those of any other.
const SLOW_LIMIT: Duration = Duration::from_secs(3 * 3600);

pub fn run(args: &Args) -> Result<bool> {
    let mut summary = Summary::default();
    let wanted = |name: &str| args.only.as_deref().is_none_or(|part| name.contains(part));
    if wanted("setup") {
        summary.step("setup", || setup::run(&setup::Args::default()).map(|()| true));
    }
    if wanted("/dev/kvm") {
        summary.step("/dev/kvm", local_kvm);
    }
    for step in STEPS.iter().filter(|s| wanted(s.name)) {
        summary.step(step.name, || {
            let mut command = Command::new(env!("CARGO"));
            command
                .args(step.words)
                .envs(step.env.iter().copied())
                .current_dir(paths::root());
            if step.name == TESTS {
                command.env("ACTOR_VMM_TEST_KERNEL", kernel::ensure(false)?.bzimage);
            }
            let limit = Duration::from_secs(step.limit);
            let Some(tests) = step.tests else {
                return Ok(process::run_limited(&mut command, limit)?.success());
            };
            let (status, said) = process::run_limited_and_listen(&mut command, limit)?;
            let (passed, there_are) = (passed(&said), tests()?);
            ensure!(
                !status.success() || passed == there_are,
                "{passed} passed, but the sources have {there_are}"
            );
            Ok(status.success())
        });
    }
    if wanted("fuzz") {
        let all = fuzz::Args {
            targets: Vec::new(),
            seconds: FUZZ_SECONDS,
        };
        summary.step("fuzz", || fuzz::run(&all));
    }
    if args.suite != "none" && wanted("scenarios") {
        summary.scenarios(&args.suite);
    }
    Ok(summary.print())
}

/// What the lines "test result: ok. 3 passed; …" of a test run add up to.
fn passed(said: &str) -> usize {
    let counts = said.lines().filter_map(|line| {
        let (before, _) = line.split_once(" passed;")?;
        before.rsplit(' ').next()?.parse::<usize>().ok()
    });
    counts.sum()
}

/// How many functions of the library are models by their name.
fn loom_models() -> Result<usize> {
    fn count(dir: &Path) -> Result<usize> {
        let mut models = 0;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                models += count(&path)?;
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path)?;
                models += text
                    .lines()
                    .map(|line| line.trim_start())
                    // Those that the list of planted bugs names are pub(…).
                    .filter(|line| {
                        line.starts_with("fn loom_")
                            || line.starts_with("pub(") && line.contains(") fn loom_")
                    })
                    .count();
            }
        }
        Ok(models)
    }
    let models = count(&paths::root().join("src"))?;
    ensure!(models > 0, "no function in src is called loom_…");
    Ok(models)
}

/// The tests skip by themselves what needs /dev/kvm; that must not go unnoticed.
fn local_kvm() -> Result<bool> {
    let kvm = Path::new("/dev/kvm");
    let Err(error) = std::fs::File::options().read(true).write(true).open(kvm) else {
        return Ok(true);
    };
    if std::env::var_os("CI").is_some() {
        return Err(error).context("CI has to have a usable /dev/kvm");
    }
    eprintln!("**** /dev/kvm cannot be used ({error}): EVERY TEST THAT NEEDS IT IS SKIPPED ****");
    Ok(true)
}

#[derive(Default)]
struct Summary {
    lines: Vec<String>,
    passed: u32,
    failed: u32,
}

impl Summary {
    fn step(&mut self, name: &str, work: impl FnOnce() -> Result<bool>) {
        println!("==== {name}");
        let started = Instant::now();
        let result = work();
        let took = started.elapsed().as_secs_f64();
        let verdict = match result {
            Ok(true) => {
                self.passed += 1;
                "pass"
            }
            Ok(false) => {
                self.failed += 1;
                "FAIL"
            }
            Err(error) => {
                println!("{error:#}");
                self.failed += 1;
                "FAIL"
            }
        };
        println!("{verdict}    {name:<44} {took:>6.1} s");
        self.lines.push(format!("{verdict}    {name:<44} {took:>6.1} s"));
    }

    fn scenarios(&mut self, suite: &str) {
        println!("==== scenarios");
        let started = Instant::now();
        let outcome = scenario::load(&paths::scenarios()).and_then(|all| {
            let chosen = emulated_host::select(&all, &[], Some(suite))?;
            let options = Options {
                cpus: 1,
                limit: if suite == "ci" { CI_LIMIT } else { SLOW_LIMIT },
                split: false,
                console: false,
                vmm: Vmm::ActorVmm,
            };
            emulated_host::scenarios(&chosen, &options)
        });
        match outcome {
            Ok(tally) => {
                self.passed += tally.passed;
                self.failed += tally.failed.len() as u32;
                let took = started.elapsed().as_secs_f64();
                self.lines.push(format!(
                    "        scenarios: {} passed in {took:.1} s",
                    tally.passed
                ));
                self.lines
                    .extend(tally.failed.iter().map(|name| format!("FAIL    {name}")));
            }
            Err(error) => {
                println!("{error:#}");
                self.failed += 1;
                self.lines.push(format!("FAIL    scenarios: {error:#}"));
            }
        }
    }

    fn print(&self) -> bool {
        println!("==== summary");
        for line in &self.lines {
            println!("{line}");
        }
        println!("{} passed, {} failed", self.passed, self.failed);
        self.failed == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_tests_are_added_up() {
        let said = "running 2 tests\n..\ntest result: ok. 2 passed; 0 failed; 0 ignored\n\n\
                    running 0 tests\n\ntest result: ok. 0 passed; 0 failed\ntest result: ok. 11 passed; 0 failed\n";
        assert_eq!(passed(said), 13);
        assert_eq!(passed("test result: FAILED. 0 passed; 1 failed"), 0);
    }

    #[test]
    fn the_library_has_models() {
        assert!(loom_models().unwrap() >= 10);
    }
}
