//! Runs the program with limits, and looks at what it leaves behind.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The program.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_actor-vmm");
/// Hang protection for everything that has no limit of its own. Runs take milliseconds to seconds.
pub const LIMIT: Duration = Duration::from_secs(60);
/// "Within a second", with much room for a host that is busy: its kernel alone can take seconds to close a VM then.
/// `tests/kvm_guests.rs` holds the second itself.
pub const PROMPT: Duration = Duration::from_secs(20);

/// Exit statuses.
pub const BAD_INPUT: i32 = 2;
pub const HOST_TROUBLE: i32 = 18;
/// Of guests that end by themselves: 2 * 5 + 1.
pub const GUEST_EXIT: i32 = 11;

/// A directory of one test, which is the program's working directory and is gone with the value.
pub struct Place(PathBuf);

impl Place {
    pub fn new() -> Place {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("actor-vmm-cli-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Place(path)
    }

    /// A place with one kernel file, `k`.
    pub fn with_kernel(code: &[u8]) -> Place {
        let place = Place::new();
        place.file("k", &super::guest::kernel(code));
        place
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str, content: &[u8]) -> &Place {
        std::fs::write(self.0.join(name), content).unwrap();
        self
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).unwrap_or_default()
    }

    /// Names and lengths of all files.
    pub fn content(&self) -> Vec<(String, u64)> {
        let mut content: Vec<_> = std::fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let length = entry.metadata().unwrap().len();
                (entry.file_name().to_string_lossy().into_owned(), length)
            })
            .collect();
        content.sort();
        content
    }

    /// The program with these words as arguments, in this directory and in a process group of its own.
    pub fn command(&self, words: &str) -> Command {
        self.command_of(PROGRAM, words.split_whitespace())
    }

    /// The same as a session leader, which needs no process group of its own.
    pub fn session_command(&self, words: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(words.split_whitespace()).current_dir(&self.0);
        hang_up_by_default(&mut command);
        command
    }

    pub fn command_of<I: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = I>,
    ) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(&self.0).process_group(0);
        command.stdin(Stdio::null());
        hang_up_by_default(&mut command);
        command
    }

    /// Runs the program to its end.
    pub fn run(&self, words: &str) -> Ended {
        finish(&mut self.command(words))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The program leaves a hang-up ignored that was ignored before it (nohup), and a test run under nohup hands that on.
fn hang_up_by_default(command: &mut Command) {
    // SAFETY: one system call between fork and exec, async-signal-safe.
    unsafe {
        command.pre_exec(|| match libc::signal(libc::SIGHUP, libc::SIG_DFL) {
            libc::SIG_ERR => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
}

/// What became of a run.
#[derive(Debug)]
pub struct Ended {
    /// The exit status; 1000 and the signal's number if one killed it.
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
    pub took: Duration,
}

impl Ended {
    /// Lines on stderr that are no log records.
    pub fn said(&self) -> Vec<&str> {
        self.stderr
            .lines()
            .filter(|line| !line.starts_with('['))
            .collect()
    }

    pub fn assert_no_panic(&self) {
        for word in ["panicked", "bug in", "RUST_BACKTRACE"] {
            assert!(!self.stderr.contains(word), "{}", self.stderr);
        }
    }
}

/// Runs a command to its end, with stdout and stderr collected.
pub fn finish(command: &mut Command) -> Ended {
    let begin = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (stdout, stderr) = (
        collect(child.stdout.take().unwrap()),
        collect(child.stderr.take().unwrap()),
    );
    let status = wait(&mut child, LIMIT);
    let took = begin.elapsed();
    Ended {
        status,
        stdout: stdout.join().unwrap(),
        stderr: String::from_utf8_lossy(&stderr.join().unwrap()).into_owned(),
        took,
    }
}

/// A program that runs, with its stdin and stdout in the hands of the test.
pub struct Piped {
    pub child: Child,
    pub stdin: ChildStdin,
    pub stdout: ChildStdout,
    /// All of its stderr, once it has ended.
    pub stderr: JoinHandle<Vec<u8>>,
}

impl Piped {
    pub fn start(command: &mut Command) -> Piped {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Piped {
            stdin: child.stdin.take().unwrap(),
            stdout: child.stdout.take().unwrap(),
            stderr: collect(child.stderr.take().unwrap()),
            child,
        }
    }
}

/// Collects what comes until the other side is closed.
pub fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all);
        all
    })
}

/// Waits for the end of a child, kills it if that takes too long, and asserts that it leaves no process behind.
#[track_caller]
pub fn wait(child: &mut Child, limit: Duration) -> i32 {
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let threads = threads(child.id());
            let _ = child.kill();
            let _ = child.wait();
            panic!("still there after {limit:?}; its threads: {threads}");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_group_is_gone(child.id());
    status
        .code()
        .unwrap_or_else(|| 1000 + status.signal().unwrap_or(0))
}

/// Name and what each thread of a process waits in.
fn threads(pid: u32) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        for file in ["comm", "wchan"] {
            let read = std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            text += &format!("{} ", read.trim());
        }
    }
    text
}

/// The child was the leader of a process group; when it is gone, so is everyone it started.
#[track_caller]
fn assert_group_is_gone(pid: u32) {
    let group = nix::unistd::Pid::from_raw(pid as i32);
    assert_eq!(
        nix::sys::signal::killpg(group, None),
        Err(nix::errno::Errno::ESRCH),
        "a process was left behind"
    );
}

/// Sends a signal to a child.
pub fn signal(child: &Child, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// Stops the program as nobody can refuse, and waits until each of its threads stands.
#[track_caller]
pub fn stop(process: nix::unistd::Pid) {
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGSTOP).unwrap();
    eventually("all of it stands", || {
        let mut tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
        tasks.all(|task| {
            // A thread that has just ended stands as well.
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            // The state is behind the name, which may have anything in it.
            stat.rsplit(')')
                .next()
                .is_none_or(|rest| rest.trim_start().starts_with('T'))
                || stat.is_empty()
        })
    });
}

/// Waits until something holds.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One line of ours that has all of `needles`, nothing else, and this status.
#[track_caller]
pub fn assert_refused(ended: &Ended, status: i32, needles: &[&str]) {
    ended.assert_no_panic();
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{}", ended.stderr);
    assert!(lines[0].starts_with("actor-vmm: "), "{}", ended.stderr);
    for needle in needles {
        assert!(
            ended.stderr.contains(needle),
            "no '{needle}' in: {}",
            ended.stderr
        );
    }
    assert_eq!(ended.status, status, "{}", ended.stderr);
    assert!(ended.stdout.is_empty());
}

/// A usage error: the argument parser's few lines, with all of `needles`.
#[track_caller]
pub fn assert_usage(ended: &Ended, needles: &[&str]) {
    ended.assert_no_panic();
    assert!(ended.stderr.starts_with("error: "), "{}", ended.stderr);
    assert!(ended.stderr.lines().count() <= 8, "{}", ended.stderr);
    for needle in needles {
        assert!(
            ended.stderr.contains(needle),
            "no '{needle}' in: {}",
            ended.stderr
        );
    }
    assert_eq!(ended.status, BAD_INPUT);
    assert!(ended.stdout.is_empty());
}
