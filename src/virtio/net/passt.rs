//! User-mode networking: passt, a program of its own that is a network to the guest and an ordinary user of the host's
//! sockets. [passt(1)] No rights are needed for it.
//!
//! It is started with one end of a pair of sockets and ends when the other is closed, so it cannot outlive us, whatever
//! becomes of us. Owner of the process is the actor of the receive queue: it finds its end, says so, and ends it with
//! itself.

use super::Pair;
use super::config::Ports;
use super::stream::{StreamSink, StreamSource, Why};
use crate::virtio::program::Program;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;

const PROGRAM: &str = "passt";

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
    command.args(["--fd", &theirs.as_raw_fd().to_string()]);
    let program = Program::start(command, theirs.as_fd()).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => PasstError::NotInstalled,
        _ => PasstError::Start(error),
    })?;
    // It alone has its end from here on.
    drop(theirs);
    let stream = Arc::new(ours);
    let supervised = Supervised {
        stream: stream.clone(),
        program,
    };
    let source = StreamSource::new(stream.clone(), supervised);
    Ok((Box::new(source), Box::new(StreamSink::new(stream))))
}

/// The process, and its socket.
struct Supervised {
    stream: Arc<UnixStream>,
    program: Program,
}

impl Why for Supervised {
    fn why(&mut self) -> String {
        self.program.why()
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        // Before the program is waited for.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::net::Received;
    use nix::poll::{PollFd, PollFlags, poll};
    use std::path::Path;
    use std::time::{Duration, Instant};

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
