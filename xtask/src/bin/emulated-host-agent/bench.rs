//! How long a VMM takes from exec to the guest's /init, and what it takes in memory then.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use harness::cpio::Archive;
use harness::protocol::{Event, Sample};
use harness::scenario::Stdin;

use crate::report::Report;
use crate::vmm::{DRAIN, Vmm};
use crate::{run, smaps};

/// Printed by the first line of the guest's /init.
const MARK: &str = "bench: init";
const END: &str = "bench: end";
const LIMIT: Duration = Duration::from_secs(120);
const INITRD: &str = "/run/bench-initrd";

/// `RUNS MEMORY_MIB DMESG`, then one tab-separated command per VMM: its name and its words.
pub fn boot(line: &str, report: &Report) -> Result<()> {
    let mut words = line.split(' ');
    let mut number = || {
        words
            .next()
            .and_then(|w| w.parse::<u64>().ok())
            .context("the bench needs three numbers")
    };
    let (runs, memory_mib, dmesg) = (number()?, number()?, number()? != 0);
    let commands = fs::read_to_string("/bench").context("the emulated host has no /bench")?;
    write_initrd(dmesg)?;
    for run in 0..runs {
        for command in commands.lines() {
            let mut words = command.split('\t');
            let (name, program) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
            let job = format!("{name} run {}", run + 1);
            report.send(&Event::Start {
                job: job.clone(),
                limit: LIMIT.as_secs() + 30,
            });
            let mut command = Command::new(program);
            command.args(words.map(|w| w.replace("${INITRD}", INITRD)));
            let vmm = Vmm::start(command, Stdin::Pipe)?;
            let started = vmm.started;
            match one(name, vmm, memory_mib, dmesg, report) {
                Ok(sample) => report.send(&Event::Sample(sample)),
                Err(error) => {
                    let millis = started.elapsed().as_millis() as u64;
                    report.send(&Event::Fail {
                        job,
                        millis,
                        reason: format!("{error:#}"),
                    });
                }
            }
        }
    }
    Ok(())
}

fn one(name: &str, mut vmm: Vmm, memory_mib: u64, dmesg: bool, report: &Report) -> Result<Sample> {
    let deadline = vmm.started + LIMIT;
    let mut ignore = |_: &[u8]| {};
    while !run::console_has(&vmm, MARK) {
        if !vmm.step(deadline, &mut ignore) || vmm.exited.is_some() {
            report.send(&Event::Evidence {
                title: format!("{name}'s console"),
                text: vmm.out.clone(),
            });
            report.send(&Event::Evidence {
                title: format!("{name}'s stderr"),
                text: vmm.err.clone(),
            });
            bail!("the guest did not reach /init");
        }
    }
    let exec_to_init_us = (vmm.out_at - vmm.started).as_micros() as u64;
    while !run::console_has(&vmm, END) && vmm.step(deadline, &mut ignore) {}
    // Memory is counted when the VMM has nothing left to do.
    let settled = Instant::now() + Duration::from_millis(300);
    while vmm.step(settled, &mut ignore) {}
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).context("the VMM is gone")?;
    let usage = smaps::usage(&smaps, memory_mib);
    if dmesg {
        report.send(&Event::Evidence {
            title: format!("{name}'s guest"),
            text: vmm.out.clone(),
        });
        report.send(&Event::Evidence {
            title: format!("{name}'s mappings"),
            text: mappings(&smaps).into_bytes(),
        });
    }
    vmm.signal(libc::SIGTERM);
    let patience = Instant::now() + DRAIN;
    while vmm.exited.is_none() && vmm.step(patience, &mut ignore) {}
    // Whoever is still there is killed by the drop.
    Ok(Sample {
        vmm: name.to_owned(),
        exec_to_init_us,
        outside_kib: usage.outside_kib,
        anonymous_kib: usage.anonymous_kib,
        guest_kib: usage.guest_kib,
    })
}

/// One line per mapping that has resident memory: what makes up the VMM's share.
fn mappings(smaps: &str) -> String {
    let mut out = String::new();
    let mut header = "";
    for line in smaps.lines() {
        if line.split_whitespace().next().is_some_and(|w| w.contains('-')) {
            header = line;
        } else if let Some(rss) = line.strip_prefix("Rss:")
            && rss.trim() != "0 kB"
        {
            out.push_str(&format!("{:>12}  {header}\n", rss.trim()));
        }
    }
    out
}

fn write_initrd(dmesg: bool) -> Result<()> {
    let more = if dmesg { "/bin/busybox dmesg\n" } else { "" };
    // Nothing may come before the mark: not even a mount.
    let init =
        format!("#!/bin/busybox sh\necho '{MARK}'\n{more}echo '{END}'\nexec /bin/busybox sleep 1000000\n");
    let mut archive = Archive::new();
    archive.file("init", 0o755, init.as_bytes());
    let mut bytes = fs::read("/guest/base.cpio").context("the emulated host has no guest")?;
    bytes.extend_from_slice(&archive.finish());
    fs::write(INITRD, bytes)?;
    Ok(())
}
