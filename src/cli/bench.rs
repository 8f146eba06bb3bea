//! `actor-vmm bench`: what a user types, and where the results go. The measuring is in [`crate::bench`].

use super::stdout::show;
use super::{chain, complain};
use crate::bench::against::Program;
use crate::bench::plan::{AGAINST, EXPERIMENTS, Source};
use crate::bench::{self, Plan, Progress, html, report};
use crate::machine::outcome::status;
use crate::machine::vm;
use clap::Args;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often by default, without and with `--quick`.
const REPETITIONS: usize = 5;
const QUICK_REPETITIONS: usize = 3;
/// The experiment that has no other source.
const KVM_ONLY: &str = "kick";

/// More would take days.
const MAX_REPETITIONS: usize = 1000;

/// As typed by the user.
#[derive(Args, Debug)]
pub struct Bench {
    /// Experiments to run, of those that --list names, or all [default: all, with --against only that]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Where exits come from: scripted (vCPUs that pretend, any host), kvm (a bare-metal guest, needs /dev/kvm), or both
    #[arg(
        long,
        value_name = "SOURCE",
        value_delimiter = ',',
        default_value = "scripted"
    )]
    source: Vec<Source>,
    /// Runs the same guest in another program too, each a process of its own: qemu, or a command with {image} and {cpus}
    /// in it that boots an ELF file by PVH and has its first serial port on stdout; {slow} is a Unix socket that takes
    /// bytes slowly, for port 0xe9. May be repeated; ratios are to the first
    #[arg(long, value_name = "qemu|COMMAND", value_parser = Program::parse)]
    against: Vec<Program>,
    /// Short samples: everything in less than a minute
    #[arg(long)]
    quick: bool,
    /// Names the experiments and ends
    #[arg(long)]
    list: bool,
    /// How often everything is measured [default: 5, with --quick 3]
    #[arg(long, value_name = "N")]
    repetitions: Option<usize>,
    /// Writes every repetition of everything as a JSON array
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The same as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Writes a report with plots, as one HTML file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// A file that can be written.
struct Output {
    path: PathBuf,
    file: File,
}

impl Output {
    /// Opens it, so that what is wrong with it is known before the run; what is in it stays until the results are there.
    fn open(path: &Path) -> Result<Output, String> {
        let open = File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(path);
        match open {
            Ok(file) => Ok(Output {
                path: path.to_path_buf(),
                file,
            }),
            Err(error) => Err(format!("cannot write {}: {}", path.display(), chain(&error))),
        }
    }

    fn write(mut self, text: &str) -> Result<(), String> {
        // Not every file has a length: a pipe, a terminal.
        let _ = self.file.set_len(0);
        self.file
            .write_all(text.as_bytes())
            .map_err(|error| format!("cannot write {}: {}", self.path.display(), chain(&error)))
    }
}

impl Bench {
    /// Does what was asked; returns the exit status.
    pub fn run(&self) -> u8 {
        if self.list {
            let list = EXPERIMENTS
                .into_iter()
                .chain([AGAINST])
                .map(|(name, about)| format!("{name:10} {about}\n"))
                .collect::<String>();
            return show(&list);
        }
        let mut plan = match self.plan() {
            Ok(plan) => plan,
            Err(problem) => return complain(&problem, status::BAD_INPUT),
        };
        // By default everything is run that can be; what was asked for by name must be.
        if self.only.is_empty()
            && plan.experiments.contains(&KVM_ONLY)
            && let Err(error) = vm::open()
        {
            complain(&format!("warning: {KVM_ONLY} is left out: {}", chain(&error)), 0);
            plan.experiments.retain(|name| *name != KVM_ONLY);
        }
        let open = |path: &Option<PathBuf>| path.as_deref().map(Output::open).transpose();
        let outputs = open(&self.json).and_then(|json| Ok((json, open(&self.csv)?, open(&self.html)?)));
        let (json, csv, html) = match outputs {
            Ok(outputs) => outputs,
            Err(problem) => return complain(&problem, status::BAD_INPUT),
        };
        let mut bar = Bar::default();
        let results = bench::run(&plan, |progress| bar.show(progress));
        bar.clear();
        let results = match results {
            Ok(results) => results,
            Err(failure) => return complain(&chain(&failure), status::HOST_TROUBLE),
        };
        for warning in &results.host.warnings {
            complain(&format!("warning: {warning}"), 0);
        }
        let table = show(&report::table(&results.groups, results.repetitions));
        let rows = results.rows();
        let texts: [(_, &dyn Fn() -> String); 3] = [
            (json, &|| report::json(&rows)),
            (csv, &|| report::csv(&rows)),
            (html, &|| html::page(&results)),
        ];
        for (output, text) in texts {
            if let Some(output) = output
                && let Err(problem) = output.write(&text())
            {
                return complain(&problem, status::HOST_TROUBLE);
            }
        }
        table
    }

    fn plan(&self) -> Result<Plan, String> {
        let known = || EXPERIMENTS.iter().chain([&AGAINST]).map(|(name, _)| *name);
        let mut experiments: Vec<&'static str> = Vec::new();
        for wanted in &self.only {
            if wanted == "all" {
                experiments.extend(EXPERIMENTS.map(|(name, _)| name));
                continue;
            }
            let Some(name) = known().find(|name| name == wanted) else {
                let all = known().collect::<Vec<_>>().join(", ");
                return Err(format!("'{wanted}' is not an experiment; there are {all}"));
            };
            experiments.push(name);
        }
        if experiments.contains(&AGAINST.0) && self.against.is_empty() {
            return Err(format!("{} needs a program: --against qemu", AGAINST.0));
        }
        if !self.against.is_empty() {
            experiments.push(AGAINST.0);
        }
        if experiments.is_empty() {
            experiments = EXPERIMENTS.map(|(name, _)| name).to_vec();
        }
        let mut seen = Vec::new();
        experiments.retain(|name| {
            !seen.contains(name) && {
                seen.push(*name);
                true
            }
        });
        let mut sources = self.source.clone();
        sources.dedup();
        let default = if self.quick {
            QUICK_REPETITIONS
        } else {
            REPETITIONS
        };
        let repetitions = self.repetitions.unwrap_or(default);
        if !(1..=MAX_REPETITIONS).contains(&repetitions) {
            return Err(format!(
                "--repetitions must be 1 to {MAX_REPETITIONS}, not {repetitions}"
            ));
        }
        let outputs: Vec<&PathBuf> = [&self.json, &self.csv, &self.html]
            .into_iter()
            .flatten()
            .collect();
        for (n, path) in outputs.iter().enumerate() {
            if outputs[..n].contains(path) {
                return Err(format!("{} cannot be two outputs at once", path.display()));
            }
        }
        let plan = Plan {
            experiments,
            sources,
            // They are wanted until the program ends, and then it does not matter.
            programs: self
                .against
                .iter()
                .map(|program| &*Box::leak(Box::new(program.clone())))
                .collect(),
            repetitions,
            quick: self.quick,
        };
        if plan.loads(1).is_empty() {
            let names: Vec<_> = self.source.iter().map(|source| source.name()).collect();
            return Err(format!(
                "{} cannot be done with --source {}",
                plan.experiments.join(" and "),
                names.join(",")
            ));
        }
        Ok(plan)
    }
}

/// Where the run is, on stderr: one line that changes on a terminal, a line now and then elsewhere.
#[derive(Default)]
struct Bar {
    last: Option<Instant>,
    width: usize,
}

impl Bar {
    fn show(&mut self, progress: &Progress) {
        let terminal = std::io::stderr().is_terminal();
        let pause = Duration::from_millis(if terminal { 200 } else { 10_000 });
        if self.last.is_some_and(|last| last.elapsed() < pause) {
            return;
        }
        self.last = Some(Instant::now());
        let part = progress.done as f64 / progress.of as f64;
        let left = if progress.done == 0 {
            String::new()
        } else {
            let left = progress.elapsed.as_secs_f64() * (1.0 - part) / part;
            format!(", {left:.0} s left")
        };
        let text = format!("{:3.0} %{left}  {}", part * 100.0, progress.load.describe());
        let mut stderr = std::io::stderr();
        // Nothing can be done about a stderr that cannot be written.
        let _ = if terminal {
            let text: String = text.chars().take(100).collect();
            let width = std::mem::replace(&mut self.width, text.len());
            write!(stderr, "\r{text:width$}")
        } else {
            writeln!(stderr, "{text}")
        };
    }

    fn clear(&mut self) {
        if self.width > 0 {
            let _ = write!(std::io::stderr(), "\r{:1$}\r", "", self.width);
        }
    }
}
