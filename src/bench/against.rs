//! The measuring guest in programs that are processes of their own: QEMU, any other VMM that boots ELF files by PVH and
//! has a first serial port on its stdout, and this program itself.
//!
//! A program is a command in which `{image}` stands for the guest's file and `{cpus}` for the number of its vCPUs.
//! `{slow}`, if it is there, stands for a Unix socket that takes bytes slowly: whatever the program's port 0xe9 writes
//! to it makes that port a slow device, and the program takes part in the experiment with a victim.

use super::Failure;
use super::clock::Scale;
use super::kvm::{Counts, Pair};
use super::plan::{AGAINST_SLOW, Load};
use crate::boot::layout::io;
use crate::guests::meter::{self, Operation, Order, ReportError, Target};
use crate::machine::dispatch::Dispatch;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Two devices that every PC has, each with a register that is plain memory: the scratch register of the first serial
/// port [PC16550D §8.10], and a cell of the RTC's CMOS (the guest has set its index).
pub const FIRST_PORT: u16 = io::SERIAL0 + 7;
/// See [`FIRST_PORT`].
pub const SECOND_PORT: u16 = io::RTC + 1;
/// How long a program may take for one guest, with its start.
const LIMIT: Duration = Duration::from_secs(60);
/// More than this no report is.
const MAX_REPORT_BYTES: usize = 16 << 20;

/// Another program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Program {
    /// As in the results.
    pub name: String,
    words: Vec<String>,
}

/// QEMU's `microvm` boots an ELF file by PVH itself; `pc` goes through SeaBIOS first, which takes five seconds where
/// ring 0 is interpreted, for the same devices behind the same lock. `qemu64`, because `host` needs MSRs that not every
/// KVM lets be set.
const QEMU: &str = "qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu qemu64 -smp {cpus} -m 64M -nodefaults \
    -no-user-config -display none -serial stdio \
    -chardev socket,id=slow,path={slow} -device isa-debugcon,iobase=0xe9,chardev=slow -kernel {image}";

impl Program {
    /// QEMU as it is on the path.
    pub fn qemu() -> Program {
        Program {
            name: "qemu".into(),
            words: QEMU.split_ascii_whitespace().map(String::from).collect(),
        }
    }

    /// As typed: `qemu`, or a command. Words are apart by spaces; single or double quotes keep them together.
    ///
    /// # Errors
    /// What is wrong with it, for the user.
    pub fn parse(text: &str) -> Result<Program, String> {
        if text == "qemu" {
            return Ok(Program::qemu());
        }
        let words = split_words(text)?;
        let Some(first) = words.first() else {
            return Err(
                "--against needs a command, such as 'vmm --kernel {image} --cpus {cpus}', or qemu".into(),
            );
        };
        if !words.iter().any(|word| word.contains("{image}")) {
            return Err(format!(
                "--against '{text}' has no {{image}}, which stands for the guest's file; qemu alone needs none"
            ));
        }
        let name = Path::new(first).file_name().unwrap_or_default();
        Ok(Program {
            name: name.to_string_lossy().into_owned(),
            words,
        })
    }

    /// Whether it has a place for a slow device.
    pub fn can_be_slow(&self) -> bool {
        self.words.iter().any(|word| word.contains("{slow}"))
    }

    fn command(&self, files: &Files, cpus: usize) -> Vec<String> {
        let replace = |word: &String| {
            word.replace("{image}", &files.image().to_string_lossy())
                .replace("{cpus}", &cpus.to_string())
                .replace("{slow}", &files.slow().to_string_lossy())
        };
        self.words.iter().map(replace).collect()
    }
}

fn split_words(text: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut quote, mut inside) = (Vec::new(), String::new(), None, false);
    for character in text.chars() {
        match (quote, character) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => (quote, inside) = (Some(character), true),
            (None, c) if c.is_whitespace() => {
                if std::mem::take(&mut inside) {
                    words.push(std::mem::take(&mut word));
                }
            }
            (_, c) => {
                word.push(c);
                inside = true;
            }
        }
    }
    if quote.is_some() {
        return Err(format!("--against '{text}' has a quote that does not end"));
    }
    words.extend(inside.then_some(word));
    Ok(words)
}

/// A directory of our own, gone when this is.
struct Files(PathBuf);

impl Files {
    fn new() -> std::io::Result<Files> {
        // A number that no other run of this process has.
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("actor-vmm-bench-{}-{n}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Files(path))
    }

    fn image(&self) -> PathBuf {
        self.0.join("meter.elf")
    }

    fn slow(&self) -> PathBuf {
        self.0.join("slow")
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // Nothing can be done about a directory that cannot be removed.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process that does not outlive this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A socket that takes a byte every two [`AGAINST_SLOW`] from whoever connects, until this is dropped. The guest is half
/// of the time elsewhere, so it finds the socket full for [`AGAINST_SLOW`].
struct SlowReader {
    path: PathBuf,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl SlowReader {
    fn start(path: PathBuf) -> std::io::Result<SlowReader> {
        let listener = UnixListener::bind(&path)?;
        let (stop, stopped) = bounded(0);
        let thread = crate::thread::spawn("slow-reader", move || {
            let Ok((mut stream, _)) = listener.accept() else {
                return;
            };
            let mut byte = [0];
            while let Ok(1) = stream.read(&mut byte)
                && let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(2 * AGAINST_SLOW)
            {}
        })?;
        Ok(SlowReader {
            path,
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for SlowReader {
    fn drop(&mut self) {
        self.stop = None;
        // It may still wait for somebody to connect.
        let _ = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Nanoseconds that the threads of a process have waited for a processor so far.
fn waited_ns(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let waited = |task: std::io::Result<std::fs::DirEntry>| -> Option<u64> {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().nth(1)?.parse().ok()
    };
    tasks.into_iter().flatten().filter_map(waited).sum()
}

/// What the guest shall do in such a program.
pub fn order(load: &Load, counts: Counts, scale: Scale, slow_port: u16) -> Order {
    let slow = |operation| Target {
        port: slow_port,
        operation,
    };
    let ports = [FIRST_PORT, SECOND_PORT];
    let measured = (0..load.vcpus).map(|n| Target {
        port: ports[n % load.devices.min(ports.len())],
        operation: Operation::In8,
    });
    Order {
        measured: measured.collect(),
        slow: load.slow.map(|_| slow(Operation::Out8)),
        in_a_row: counts.in_a_row,
        timed: counts.timed,
        pace: load.pace_ns.map_or(0, |ns| scale.ticks(ns) as u32),
        print: true,
    }
}

/// One guest in another program.
pub(super) fn sample(load: &Load, program: &Program, counts: Counts, scale: Scale) -> Result<Pair, Failure> {
    let order = order(load, counts, scale, io::DEBUG_CONSOLE);
    let files = Files::new()?;
    let words = program.command(&files, order.vcpus());
    run(&program.name, words, &files, &order)
}

/// One guest in `actor-vmm run`.
pub(super) fn sample_ours(
    load: &Load,
    dispatch: Dispatch,
    counts: Counts,
    scale: Scale,
) -> Result<Pair, Failure> {
    let order = order(load, counts, scale, io::DELAY);
    let files = Files::new()?;
    let program = std::env::current_exe()?;
    let cpus = order.vcpus().to_string();
    let (dispatch, image) = (dispatch.to_string(), files.image());
    let (program, image) = (program.to_string_lossy(), image.to_string_lossy());
    let mut words = vec![
        &*program,
        "run",
        "--kernel",
        &*image,
        "--cpus",
        &cpus,
        "--memory",
        "64M",
        "--dispatch",
        &dispatch,
        "--log-level",
        "error",
    ];
    let slow = load.slow.map(|time| time.as_secs_f64().to_string());
    if let Some(slow) = &slow {
        words.extend(["--delay-port", slow]);
    }
    let words = words.into_iter().map(String::from).collect();
    run("actor-vmm run", words, &files, &order)
}

fn run(name: &str, words: Vec<String>, files: &Files, order: &Order) -> Result<Pair, Failure> {
    std::fs::write(files.image(), meter::elf(order))?;
    // Dropped after the process, or it could wait for a process that waits for it.
    let _slow = SlowReader::start(files.slow())?;
    let mut errors = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(files.0.join("stderr"))?;
    let fail = |why: String| Failure::Program {
        name: name.into(),
        why,
    };
    let child = Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors.try_clone()?)
        .spawn();
    let mut running = match child {
        Ok(child) => Running(child),
        Err(error) => return Err(fail(format!("{}: {error}; is it installed?", words[0]))),
    };
    let mut output = running.0.stdout.take().expect("it is piped");
    let start = Instant::now();
    let deadline = start + LIMIT;
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    let why = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(Failure::Host(error.into())),
            Ok(0) => break format!("its guest did not report within {} s", LIMIT.as_secs()),
            Ok(_) => {}
        }
        let length = output.read(&mut chunk)?;
        text.extend_from_slice(&chunk[..length]);
        match meter::parse_report(&text, order) {
            Ok(found) => {
                // Its guest is halted now, and it is there until it is killed.
                let waited = waited_ns(running.0.id()) as f64 / start.elapsed().as_nanos() as f64;
                let mut pair = Pair::of(order, &found);
                (pair.rate.waited, pair.latency.waited) = (waited, waited);
                return Ok(pair);
            }
            Err(ReportError::Incomplete) if length > 0 && text.len() < MAX_REPORT_BYTES => {}
            Err(ReportError::Incomplete) => break "it ended before its guest had reported".into(),
            Err(damaged) => break damaged.to_string(),
        }
    };
    drop(running);
    errors.rewind()?;
    let mut told = String::new();
    let _ = errors.read_to_string(&mut told);
    let last = told.lines().rev().find(|line| !line.trim().is_empty());
    Err(fail(match last {
        Some(line) => format!("{why}; it said: {line}"),
        None => why,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_words_with_places() {
        let program = Program::parse("/usr/bin/vmm --kernel={image} -c {cpus} 'a b' \"\"").unwrap();
        assert_eq!(program.name, "vmm");
        assert!(!program.can_be_slow());
        let files = Files::new().unwrap();
        let words = program.command(&files, 2);
        assert_eq!(words[1], format!("--kernel={}", files.image().display()));
        assert_eq!(words[2..], ["-c", "2", "a b", ""]);
        assert!(Program::qemu().can_be_slow());
        for (text, needle) in [
            ("", "needs a command"),
            ("vmm --kernel x", "has no {image}"),
            ("vmm 'x {image}", "does not end"),
        ] {
            assert!(Program::parse(text).unwrap_err().contains(needle), "{text}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_or_says_nothing_is_told() {
        let scale = Scale::calibrate();
        let load = Load::default();
        let counts = Counts {
            in_a_row: 1,
            timed: 1,
        };
        let why = |text: &str| {
            let program = Program::parse(text).unwrap();
            match sample(&load, &program, counts, scale) {
                Err(failure) => failure.to_string(),
                Ok(_) => panic!("{text}"),
            }
        };
        assert!(why("/nonexistent/vmm {image}").contains("is it installed?"));
        let told = why("sh -c 'echo no way >&2' {image}");
        assert!(
            told.contains("sh") && told.contains("ended before") && told.contains("no way"),
            "{told}"
        );
        let told = why("echo {image}");
        assert!(told.contains("ended before"), "{told}");
    }

    #[test]
    fn nothing_is_left_behind() {
        let files = Files::new().unwrap();
        let path = files.0.clone();
        std::fs::write(files.image(), "x").unwrap();
        drop(files);
        assert!(!path.exists());
    }
}
