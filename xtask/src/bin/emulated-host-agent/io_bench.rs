//! A disk or a network of the guest, under one VMM after the other, over the same things of the host.
//!
//! The disk is a file on tmpfs: its pages are in memory, so what is measured is the way there. The network is a tap, with the
//! other end of the guest's connections in this process.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use harness::cpio::Archive;
use harness::protocol::Event;
use harness::scenario::Stdin;

use crate::io_meter::{PING_BYTES, PORT, STREAM_BYTES, UPWARDS};
use crate::report::Report;
use crate::run;
use crate::vmm::Vmm;

const LIMIT: Duration = Duration::from_secs(150);
const INITRD: &str = "/run/bench-initrd";
const DISK: &str = "/run/bench-disk";
const DISK_BYTES: u64 = 64 << 20;
const FIGURE: &str = "figure: ";
const END: &str = "bench: end";
const TRANSPORTS: &str =
    "virtio_ring virtio virtio_mmio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci";

/// `disk` or `net`; `/bench` has a tab-separated command per VMM: its name and its words.
pub fn run(kind: &str, report: &Report) -> Result<()> {
    let commands = fs::read_to_string("/bench").context("the emulated host has no /bench")?;
    let (modules, measure) = match kind {
        "disk" => {
            write_disk()?;
            ("virtio_blk", "io-meter disk /dev/vda")
        }
        "net" => {
            set_up_tap()?;
            (
                "failover net_failover virtio_net",
                "ip addr add 10.7.0.2/24 dev eth0; ip link set eth0 up; io-meter net 10.7.0.1",
            )
        }
        _ => bail!("no such bench: {kind}"),
    };
    write_initrd(&format!(
        "for module in {TRANSPORTS} {modules}; do insmod /modules/$module.ko; done\n{measure}\necho '{END}'\n"
    ))?;
    for command in commands.lines() {
        let mut words = command.split('\t');
        let (name, program) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        report.send(&Event::Start {
            job: name.to_owned(),
            limit: LIMIT.as_secs() + 30,
        });
        let mut command = Command::new(program);
        command.args(words.map(|w| w.replace("${INITRD}", INITRD).replace("${DISK}", DISK)));
        let mut vmm = Vmm::start(command, Stdin::Pipe)?;
        let started = vmm.started;
        let outcome = figures(&mut vmm);
        let millis = started.elapsed().as_millis() as u64;
        match outcome {
            Ok(note) => report.send(&Event::Pass {
                job: name.to_owned(),
                millis,
                note,
            }),
            Err(error) => {
                report.send(&Event::Fail {
                    job: name.to_owned(),
                    millis,
                    reason: format!("{error:#}"),
                });
                for (title, text) in [("console", &vmm.out), ("stderr", &vmm.err)] {
                    report.send(&Event::Evidence {
                        title: format!("{name}'s {title}"),
                        text: text.clone(),
                    });
                }
            }
        }
    }
    Ok(())
}

/// What the guest measures.
fn figures(vmm: &mut Vmm) -> Result<String> {
    let deadline = vmm.started + LIMIT;
    while !run::console_has(vmm, END) {
        ensure!(
            vmm.exited.is_none() && vmm.step(deadline, &mut |_| {}),
            "the guest did not measure to the end"
        );
    }
    let console = String::from_utf8_lossy(&vmm.out).into_owned();
    let all: Vec<&str> = console
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix(FIGURE))
        .collect();
    ensure!(!all.is_empty(), "the guest has measured nothing");
    Ok(all.join("; "))
}

/// Not sparse: what a guest reads is memory, not a hole.
fn write_disk() -> Result<()> {
    let mut file = File::create(DISK).context("cannot make the disk")?;
    let piece: Vec<u8> = (0..1u32 << 18)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    for _ in 0..DISK_BYTES / piece.len() as u64 {
        file.write_all(&piece).context("cannot write the disk")?;
    }
    Ok(())
}

fn set_up_tap() -> Result<()> {
    for line in [
        "tunctl -t tap0",
        "ip addr add 10.7.0.1/24 dev tap0",
        "ip link set tap0 up",
    ] {
        let mut words = line.split(' ');
        let status = Command::new(words.next().unwrap_or_default())
            .args(words)
            .stdout(std::process::Stdio::null())
            .status()
            .with_context(|| format!("cannot run {line}"))?;
        ensure!(status.success(), "`{line}` failed ({status})");
    }
    let listener = TcpListener::bind(("10.7.0.1", PORT)).context("cannot listen")?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A guest that goes away is found out by its VMM's end.
            thread::spawn(move || serve(stream));
        }
    });
    Ok(())
}

/// The other end: a byte says what for.
fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut what = [0; 1];
    stream.read_exact(&mut what)?;
    let mut buffer = vec![0x5a; 128 << 10];
    match what[0] {
        UPWARDS => {
            let mut left = STREAM_BYTES;
            while left > 0 {
                match stream.read(&mut buffer)? {
                    0 => return Err(ErrorKind::UnexpectedEof.into()),
                    bytes => left = left.saturating_sub(bytes),
                }
            }
            stream.write_all(&[UPWARDS])
        }
        crate::io_meter::DOWNWARDS => {
            for _ in 0..STREAM_BYTES / buffer.len() {
                stream.write_all(&buffer)?;
            }
            // Until the guest has had enough.
            stream.read(&mut what).map(drop)
        }
        _ => {
            let mut ping = [0; PING_BYTES];
            loop {
                stream.read_exact(&mut ping)?;
                stream.write_all(&ping)?;
            }
        }
    }
}

fn write_initrd(script: &str) -> Result<()> {
    let mut archive = Archive::new();
    archive.file("script", 0o755, script.as_bytes());
    archive.file("bin/io-meter", 0o755, &fs::read("/init")?);
    let mut bytes = fs::read("/guest/base.cpio").context("the emulated host has no guest")?;
    bytes.extend_from_slice(&archive.finish());
    fs::write(INITRD, bytes)?;
    Ok(())
}
