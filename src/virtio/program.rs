//! A program beside us that serves a device: started with one end of a socket, ended with the other.
//!
//! It ends by itself when our end of its socket is closed, whatever becomes of us; if it does not, it is killed with all that it
//! has started, and not waited for without an end: one that is stuck in the host's kernel goes when that lets it go. What it
//! says on its stderr is kept for the one line that tells why it is gone.

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, pipe2};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// So long it may take to end after its socket was closed; it takes some milliseconds.
const END_LIMIT: Duration = Duration::from_millis(300);
/// Of what it says, so much is kept: the last word of one that goes wrong.
const WORDS_BYTES: usize = 4096;

/// The process. Whoever owns it has to close its socket before this is dropped.
pub struct Program {
    child: Child,
    /// What it says on its stderr. It ends when the process does.
    words: File,
}

impl Program {
    /// Starts it. `inherited`: its end of the socket, whose number it is told by `command`.
    ///
    /// # Errors
    /// What the host says; [`io::ErrorKind::NotFound`] if there is no such program.
    pub fn start(mut command: Command, inherited: BorrowedFd<'_>) -> io::Result<Program> {
        // Neither end blocks: one that says too much goes on, and we ask only when there is something.
        let (words, mouth) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let inherited = inherited.as_raw_fd();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(mouth))
            // What is typed at a terminal is not for it.
            .process_group(0);
        // SAFETY: between fork and exec one system call is made, which touches no memory.
        unsafe {
            command.pre_exec(move || {
                Errno::result(libc::fcntl(inherited, libc::F_SETFD, 0))?;
                Ok(())
            });
        }
        // The command, which has a copy of its stderr, ends here.
        let child = command.spawn()?;
        Ok(Program {
            child,
            words: File::from(words),
        })
    }

    /// Waits until it has ended, which it does by itself. Returns the last of what it has said; `None`: it has not ended.
    fn last_words(&mut self, limit: Duration) -> Option<String> {
        let deadline = Instant::now() + limit;
        let mut said = Vec::new();
        let mut piece = [0; 512];
        loop {
            match self.words.read(&mut piece) {
                Ok(0) => break,
                Ok(bytes) => {
                    said.extend_from_slice(&piece[..bytes]);
                    let excess = said.len().saturating_sub(WORDS_BYTES);
                    said.drain(..excess);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let mut polled = [PollFd::new(self.words.as_fd(), PollFlags::POLLIN)];
                    let left = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
                    if left == 0 || matches!(poll(&mut polled, left), Err(errno) if errno != Errno::EINTR) {
                        return None;
                    }
                }
                Err(_) => return None,
            }
        }
        let said = String::from_utf8_lossy(&said);
        let mut lines = said.lines().map(str::trim);
        // Without a system logger passt complains of that after each line.
        let last = lines.rfind(|line| !line.is_empty() && !line.starts_with("Failed to send"));
        let printable = |character: char| if character.is_control() { '.' } else { character };
        Some(last.unwrap_or_default().chars().map(printable).collect())
    }

    /// Says why its socket has ended, for a person. May wait for a moment.
    pub fn why(&mut self) -> String {
        let Some(words) = self.last_words(END_LIMIT) else {
            return "it has closed its socket".into();
        };
        let status = match self.reap() {
            Some(status) => status.to_string(),
            None => "nobody knows how".into(),
        };
        if words.is_empty() {
            format!("it has ended: {status}")
        } else {
            format!("it has ended: {status}: {words}")
        }
    }

    /// Waits for its end, which is near, for a moment.
    fn reap(&mut self) -> Option<ExitStatus> {
        let until = Instant::now() + END_LIMIT;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
                Ok(status) => return status,
                Err(_) => return None,
            }
        }
    }

    /// Whether it has ended already.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.has_ended() {
            return;
        }
        if self.last_words(END_LIMIT).is_none() {
            // Its group: virtiofsd in its sandbox is a child of what we have started.
            let group = Pid::from_raw(self.child.id().cast_signed());
            let _ = killpg(group, Signal::SIGKILL);
        }
        self.reap();
    }
}
