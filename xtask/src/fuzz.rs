//! `cargo xtask fuzz`: hostile guests, led by what of the program they have reached (libFuzzer).
//!
//! With a stable toolchain and without cargo-fuzz: what the coverage needs are options that rustc has anyway. No address
//! sanitizer, which wants nightly; there is little unsafe code for it to watch.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{paths, process, setup};

#[derive(clap::Args)]
pub struct Args {
    /// Which targets, of fuzz/fuzz_targets; without any, all
    pub targets: Vec<String>,
    /// How long each runs, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub seconds: u32,
}

const BUILD_LIMIT: Duration = Duration::from_secs(1200);
/// For a target to start, and to finish what it is at.
const SPARE: Duration = Duration::from_secs(120);
/// An input that takes so long hangs.
const INPUT_LIMIT_SECONDS: u32 = 60;
/// A device that makes the program larger than this does not bound what a guest makes it keep.
const MEMORY_MIB: u32 = 1024;
/// Any target reaches more than these at once, if it is compiled so that they are counted.
const EDGES: u32 = 100;
/// Longer inputs do the same things more often.
const INPUT_BYTES: u32 = 2048;
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Coverage as libFuzzer wants it: a counter an edge, where it is, and what is compared with what.
const FLAGS: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

pub fn run(args: &Args) -> Result<bool> {
    setup::run(&setup::Args::default())?;
    let fuzz = paths::root().join("fuzz");
    let all = targets(&fuzz)?;
    let unknown = args.targets.iter().find(|target| !all.contains(target));
    if let Some(unknown) = unknown {
        anyhow::bail!("there is no target {unknown}; there are {}", all.join(", "));
    }
    let wanted = if args.targets.is_empty() {
        &all
    } else {
        &args.targets
    };
    let built = paths::root().join("target/fuzz");
    build(&fuzz, &built, wanted)?;
    let mut survived = true;
    for target in wanted {
        survived &= one(target, &built, args.seconds)?;
    }
    Ok(survived)
}

/// The names of the targets' files.
fn targets(fuzz: &Path) -> Result<Vec<String>> {
    let place = fuzz.join("fuzz_targets");
    let files = fs::read_dir(&place).with_context(|| format!("cannot read {}", place.display()))?;
    let mut names = Vec::new();
    for file in files {
        let path = file?.path();
        let name = path.file_stem().context("a file has a name")?;
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn build(fuzz: &Path, built: &Path, targets: &[String]) -> Result<()> {
    let mut command = Command::new(env!("CARGO"));
    // With --target, build scripts and macros are not made to count.
    command
        .args(["build", "--quiet", "--locked", "--release", "--target", TRIPLE])
        .arg("--target-dir")
        .arg(built)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
        .current_dir(fuzz);
    for target in targets {
        command.args(["--bin", target]);
    }
    let status = process::run_limited(&mut command, BUILD_LIMIT)?;
    ensure!(status.success(), "the fuzz targets do not compile");
    Ok(())
}

/// Whether the target survived everything that was tried.
fn one(target: &str, built: &Path, seconds: u32) -> Result<bool> {
    // What was found to lead further is kept: the next run begins there.
    let corpus = built.join("corpus").join(target);
    let found = built.join("found");
    fs::create_dir_all(&corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
    fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
    eprintln!("fuzz: {target} for {seconds} s");
    let log = built.join(format!("{target}.log"));
    let file = fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(built.join(TRIPLE).join("release").join(target));
    command
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_LIMIT_SECONDS}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-max_len={INPUT_BYTES}"))
        .arg(format!("-artifact_prefix={}/{target}-", found.display()))
        .stdout(file.try_clone()?)
        .stderr(file);
    let limit = Duration::from_secs(seconds.into()) + SPARE;
    let status = process::run_limited(&mut command, limit)?;
    let said = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let said = String::from_utf8_lossy(&said);
    // One that was not led by anything would survive anything.
    let done = said.lines().rev().find(|line| line.starts_with("Done "));
    match done {
        Some(done) if status.success() && reached(&said) >= EDGES => {
            eprintln!("fuzz: {target}: {done}, {} edges", reached(&said));
            Ok(true)
        }
        _ => {
            let last: Vec<&str> = said.lines().rev().take(30).collect();
            last.iter().rev().for_each(|line| eprintln!("{line}"));
            eprintln!(
                "fuzz: {target} did not survive ({status}); the input is in {}, all that was said in {}; once more with: {} INPUT",
                found.display(),
                log.display(),
                built.join(TRIPLE).join("release").join(target).display(),
            );
            Ok(false)
        }
    }
}

/// How many edges of the program a target has reached, by its last status line that tells.
fn reached(said: &str) -> u32 {
    let tells = |line: &str| line.split_once(" cov: ")?.1.split(' ').next()?.parse().ok();
    said.lines().rev().find_map(tells).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_target_is_built() {
        let fuzz = paths::root().join("fuzz");
        let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
        let targets = targets(&fuzz).unwrap();
        for target in &targets {
            assert!(manifest.contains(&format!("name = \"{target}\"")), "{target}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), targets.len());
    }

    #[test]
    fn what_was_reached_is_read_from_the_last_status() {
        let said =
            "#2 INITED cov: 98 ft: 1\n#9\tNEW    cov: 966 ft: 2075 corp: 1\nDone 9 runs in 6 second(s)";
        assert_eq!(reached(said), 966);
        assert_eq!(
            reached("WARNING: no interesting inputs were found so far\nDone 9 runs"),
            0
        );
    }
}
