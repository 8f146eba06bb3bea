//! User-mode networking: passt, a program of its own that is a network to the guest and an ordinary user of the host's
//! sockets. [passt(1)] No rights are needed for it.
//!
//! It is started with one end of a pair of sockets and ends when the other is closed, so it cannot outlive us, whatever
//! becomes of us. Owner of the process is the actor of the receive queue: it finds its end, says so, and ends it with
//! itself.

use super::Pair;
use super::config::Ports;
use super::stream::{StreamSink, StreamSource, Why};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::pipe2;
use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PROGRAM: &str = "passt";
/// So long it may take to end after its socket was closed; it takes some milliseconds.
const END_LIMIT: Duration = Duration::from_millis(300);
/// Of what it says, so much is kept: the last word of one that goes wrong.
const WORDS_BYTES: usize = 4096;

/// Why there is no user-mode network.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// It is not installed.
    #[error(
        "--net user: it needs the program passt, which is not installed; `apt-get install passt` brings it"
    )]
    NotInstalled,
    /// It cannot be started.
    #[error("--net user: passt cannot be started")]
    Start(#[source] io::Error),
}

/// Starts passt and returns the way to it. `mtu`: what it tells the guest by DHCP.
///
/// # Errors
/// [`PasstError`].
pub fn start(mtu: Option<u16>, ports: &Ports) -> Result<Pair, PasstError> {
    let mut command = Command::new(PROGRAM);
    command.args(["--foreground", "--quiet"]);
    if let Some(mtu) = mtu {
        command.args(["--mtu", &mtu.to_string()]);
    }
    for (flag, ports) in [("--tcp-ports", &ports.tcp), ("--udp-ports", &ports.udp)] {
        if let Some(ports) = ports {
            command.args([flag, ports]);
        }
    }
    start_command(command)
}

fn start_command(mut command: Command) -> Result<Pair, PasstError> {
    let (ours, theirs) = UnixStream::pair().map_err(PasstError::Start)?;
    ours.set_nonblocking(true).map_err(PasstError::Start)?;
    // Neither end blocks: one that says too much goes on, and we ask only when there is something.
    let (words, mouth) =
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|errno| PasstError::Start(errno.into()))?;
    let inherited = theirs.as_raw_fd();
    command.args(["--fd", &inherited.to_string()]);
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
    let child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => PasstError::NotInstalled,
        _ => PasstError::Start(error),
    })?;
    // It alone has its end from here on; the command has a copy of its stderr.
    drop((theirs, command));
    let stream = Arc::new(ours);
    let supervised = Supervised {
        child,
        words: File::from(words),
        stream: stream.clone(),
    };
    let source = StreamSource::new(stream.clone(), supervised);
    Ok((Box::new(source), Box::new(StreamSink::new(stream))))
}

/// The process.
struct Supervised {
    child: Child,
    /// What it says on its stderr. It ends when the process does.
    words: File,
    stream: Arc<UnixStream>,
}

impl Supervised {
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
        // Without a system logger it complains of that after each line.
        let last = lines.rfind(|line| !line.is_empty() && !line.starts_with("Failed to send"));
        let printable = |character: char| if character.is_control() { '.' } else { character };
        Some(last.unwrap_or_default().chars().map(printable).collect())
    }
}

impl Why for Supervised {
    fn why(&mut self) -> String {
        let Some(words) = self.last_words(END_LIMIT) else {
            return "it has closed its socket".into();
        };
        let status = match self.child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        if words.is_empty() {
            format!("it has ended: {status}")
        } else {
            format!("it has ended: {status}: {words}")
        }
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let _ = self.stream.shutdown(Shutdown::Both);
        if self.last_words(END_LIMIT).is_none() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::net::Received;
    use std::path::Path;

    fn command(script: &str) -> Command {
        // Which knows descriptors of several digits.
        let mut command = Command::new("bash");
        // What is added behind are the script's own arguments.
        command.args(["-c", script, "bash"]);
        command
    }

    fn receive(pair: &mut Pair) -> Received {
        let mut packet = vec![0; super::super::MAX_PACKET_BYTES];
        let mut polled = [PollFd::new(pair.0.fd(), PollFlags::POLLIN)];
        poll(&mut polled, 30_000u16).unwrap();
        pair.0.receive(&mut packet)
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_a_remedy() {
        let error = start_command(Command::new("no-such-program-as-this")).map(|_| ());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("apt-get install passt"), "{error}");
    }

    #[test]
    fn an_end_of_its_own_is_told_with_its_status_and_last_words() {
        let script = "echo first >&2; echo last >&2; echo Failed to send 5 bytes to syslog >&2; exit 3";
        let mut pair = start_command(command(script)).unwrap();
        match receive(&mut pair) {
            Received::Lost(why) => assert_eq!(why, "it has ended: exit status: 3: last"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn it_gets_its_end_of_the_socket_and_ends_with_ours() {
        // Sends a frame of one byte, and then waits for the end of its socket.
        let script = r#"printf '\000\000\000\001x' >&$2; cat <&$2 >/dev/null"#;
        let mut pair = start_command(command(script)).unwrap();
        assert!(matches!(receive(&mut pair), Received::Packet(13)));
        drop(pair);
    }

    #[test]
    fn one_that_does_not_end_is_ended() {
        let script = r#"printf '\000\000\000\004wait' >&$2; exec sleep 1000"#;
        let mut pair = start_command(command(script)).unwrap();
        assert!(matches!(receive(&mut pair), Received::Packet(16)));
        let before = Instant::now();
        drop(pair);
        // Not a measure of speed: it would sleep for 1000 s.
        assert!(before.elapsed() < Duration::from_secs(100));
    }

    #[test]
    fn what_is_installed_starts() {
        if !Path::new("/usr/bin/passt").exists() {
            println!("passt is not installed: nothing to try");
            return;
        }
        // It may find no network here and end at once; either way it is ours to end.
        let pair = start(Some(1500), &Ports::default()).unwrap();
        drop(pair);
    }
}
