//! Running programs: with a time limit, and with nothing left over.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Runs a command that must succeed and returns its stdout; what it says on stderr becomes part of the error.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let name = describe(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said
            .lines()
            .rev()
            .find(|l| !l.trim().is_empty())
            .unwrap_or("it said nothing")
            .to_owned();
        bail!("`{name}` failed ({}): {last}", output.status);
    }
    Ok(output.stdout)
}

/// Runs a command on this terminal; after the limit it and its descendants are killed.
pub fn run_limited(command: &mut Command, limit: Duration) -> Result<ExitStatus> {
    let mut child = start(command)?;
    wait_limited(&mut child, command, limit)
}

/// The same, and returns what it said on stdout, too.
pub fn run_limited_and_listen(command: &mut Command, limit: Duration) -> Result<(ExitStatus, String)> {
    let mut child = start(command.stdout(Stdio::piped()))?;
    let stdout = child.stdout.take().context("stdout is a pipe")?;
    let listener = thread::spawn(move || {
        let mut said = String::new();
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            println!("{line}");
            said.push_str(&line);
            said.push('\n');
        }
        said
    });
    let status = wait_limited(&mut child, command, limit)?;
    let said = listener.join().ok().context("whoever listens does not panic")?;
    Ok((status, said))
}

fn start(command: &mut Command) -> Result<Child> {
    let child = command.stdin(Stdio::null()).spawn();
    child.with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))
}

fn wait_limited(child: &mut Child, command: &Command, limit: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            kill_tree(child);
            bail!(
                "`{}` was still running after {} s and was killed",
                describe(command),
                limit.as_secs()
            );
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Has the kernel kill the child should this program die first.
pub fn die_with_us(command: &mut Command) {
    // SAFETY: one system call between fork and exec, which touches no memory of ours.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Keeps the child and all its threads on the processor that this thread is on now, which was not busy with others a
/// moment ago, or the host would have put us elsewhere.
pub fn stay_on_one_processor(command: &mut Command) {
    // SAFETY: two system calls between fork and exec, which write to a set of their own.
    unsafe {
        command.pre_exec(|| {
            let here = libc::sched_getcpu();
            if here < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut only: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(here as usize, &mut only);
            if libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &only) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Kills a child that is not reaped yet, with everything that it started, and reaps it.
pub fn kill_tree(child: &mut Child) {
    for pid in descendants(child.id() as i32) {
        // SAFETY: a signal to a process that was a descendant of our child a moment ago.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    // Both fail only when the child has gone by itself.
    let _ = child.kill();
    let _ = child.wait();
}

fn descendants(root: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        // pid (comm) state ppid …; comm may contain anything, so the last parenthesis counts.
        let parent = stat
            .rfind(')')
            .and_then(|at| stat[at + 1..].split_whitespace().nth(1)?.parse().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut queue = vec![root];
    while let Some(pid) = queue.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            found.push(child);
            queue.push(child);
        }
    }
    found
}

pub fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}
