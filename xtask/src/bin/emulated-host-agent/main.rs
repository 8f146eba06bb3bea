//! Process 1 of the emulated host.
//!
//! It mounts what a VMM needs, loads KVM, runs the jobs of `/plan` and reports each over the second serial port in the
//! lines of `harness::protocol`. Then it powers the emulated host off.
//!
//! It keeps one empty VM open from the first moment to the last: when the last VM descriptor of a host closes, KVM
//! switches virtualization off on every CPU by an inter-processor call, and emulated hosts are known to hang in it.

mod bench;
mod file_exerciser;
mod host;
mod io_bench;
mod io_meter;
mod port_meter;
mod report;
mod run;
mod smaps;
mod vmm;
mod vsock_peer;
mod witness;

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use harness::protocol::Event;
use harness::scenario;

use crate::report::Report;

fn main() {
    let name = std::env::args().next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default();
    if let Some(main) = by_name(name) {
        if let Err(error) = main() {
            eprintln!("{name}: {error:#}");
            std::process::exit(1);
        }
        return;
    }
    if std::process::id() != 1 {
        eprintln!("this program is process 1 of the emulated host; see `cargo xtask emulated-host --help`");
        std::process::exit(2);
    }
    let result = host::prepare().and_then(|()| {
        let report = Report::open()?;
        report.keep_saying_alive()?;
        let outcome = jobs(&report);
        if let Err(error) = &outcome {
            let text = format!("{error:#}").into_bytes();
            report.send(&Event::Evidence {
                title: "the emulated host".to_owned(),
                text,
            });
        }
        report.send(&Event::End);
        report.flush();
        outcome
    });
    if let Err(error) = result {
        // The first serial port: the host side shows it when no `End` came.
        eprintln!("emulated-host-agent: {error:#}");
    }
    host::power_off();
}

/// `symbols`: what a guest's /proc/kallsyms has on stdin, the ELF file for gdb on stdout.
fn symbols() -> Result<()> {
    let list = std::io::read_to_string(std::io::stdin())?;
    std::io::stdout().write_all(&harness::symbols::elf(&list)?)?;
    Ok(())
}

/// What else this program is, by the name it was called by, inside a guest or in the emulated host.
fn by_name(name: &str) -> Option<fn() -> Result<()>> {
    match name {
        "io-meter" => Some(io_meter::main),
        "file-exerciser" => Some(file_exerciser::main),
        "port-meter" => Some(port_meter::main),
        "vsock-peer" => Some(vsock_peer::main),
        "symbols" => Some(symbols),
        "witness" => Some(witness::main),
        _ => None,
    }
}

fn jobs(report: &Report) -> Result<()> {
    host::wait_for_tsc()?;
    host::load_modules()?;
    let holder = host::hold_a_vm()?;
    report.send(&Event::Ready(host::describe()?));
    let scenarios = scenario::load(Path::new("/scenarios"))?;
    let plan = fs::read_to_string("/plan").context("the emulated host has no /plan")?;
    let mut options = run::Options::default();
    for line in plan.lines() {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        match verb {
            "vmm" => options.vmm = vmm::Kind::parse(rest)?,
            "live" => options.live = true,
            "interactive" => options.interactive = true,
            "scenario" => {
                let Some(scenario) = scenarios.iter().find(|s| s.name == rest) else {
                    bail!("no scenario is called {rest}");
                };
                run::scenario(scenario, &options, report);
            }
            "bench" => bench::boot(rest, report)?,
            "io" => io_bench::run(rest, report)?,
            _ => bail!("the plan has an unknown line: {line}"),
        }
    }
    drop(holder);
    Ok(())
}
