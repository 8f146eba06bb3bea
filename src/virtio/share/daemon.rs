//! virtiofsd: a program of its own that serves a directory of the host by vhost-user. There are two of that name: the one of
//! QEMU until version 7.2, which Debian 12 has in its package qemu-system-common, and its successor in Rust.
//!
//! Both want a listening socket. It has a name for a moment only, in a directory of ours: our end is connected and the name
//! gone before the program starts.

use super::config::ShareConfig;
use crate::virtio::program::Program;
use nix::unistd::mkdtemp;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

/// Where the successor is.
const NEW: &str = "/usr/libexec/virtiofsd";
/// Where QEMU's is.
const OLD: &str = "/usr/lib/qemu/virtiofsd";

/// Starts the one that there is. Returns it with our end of its socket.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] if there is none; what the host says.
pub fn start(config: &ShareConfig) -> io::Result<(Program, UnixStream)> {
    start_command(|fd| {
        if Path::new(NEW).exists() {
            let mut command = Command::new(NEW);
            command.args([&format!("--fd={fd}"), "--log-level", "error"]);
            command.args(["--sandbox", &config.sandbox.to_string()]);
            // The same under another name.
            let cache = config.cache.to_string().replace("none", "never");
            command
                .args(["--cache", &cache])
                .arg("--shared-dir")
                .arg(&config.path);
            command
        } else {
            let mut command = Command::new(OLD);
            // It takes no space there.
            command.args(["-f", &format!("--fd={fd}"), "-o", "log_level=err"]);
            command.args([
                "-o",
                &format!("sandbox={},cache={}", config.sandbox, config.cache),
            ]);
            command.arg("-o").arg(source(config.path.as_os_str()));
            command
        }
    })
}

/// Starts what is made of the descriptor's number.
pub fn start_command(command: impl FnOnce(&str) -> Command) -> io::Result<(Program, UnixStream)> {
    // Whatever it is, it is not that there is no virtiofsd.
    let place = std::env::temp_dir();
    let no_socket =
        |error| io::Error::other(format!("no socket can be made in {}: {error}", place.display()));
    let (listener, ours) = socket().map_err(no_socket)?;
    let command = command(&listener.as_raw_fd().to_string());
    Ok((Program::start(command, listener.as_fd())?, ours))
}

/// A listening socket without a name to which one connection is made.
fn socket() -> io::Result<(UnixListener, UnixStream)> {
    // Nobody else may look into it.
    let place = mkdtemp(&std::env::temp_dir().join("actor-vmm-XXXXXX"))?;
    let name = place.join("s");
    let made = UnixListener::bind(&name).and_then(|listener| Ok((listener, UnixStream::connect(&name)?)));
    let _ = std::fs::remove_file(&name);
    let _ = std::fs::remove_dir(&place);
    made
}

/// `source=PATH` as an option among others: there are commas between them, and a backslash takes one for itself.
fn source(path: &OsStr) -> OsString {
    let mut option = b"source=".to_vec();
    for byte in path.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            option.push(b'\\');
        }
        option.push(*byte);
    }
    OsString::from_vec(option)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_connected_and_has_no_name() {
        let (listener, ours) = socket().unwrap();
        let (theirs, _) = listener.accept().unwrap();
        drop(ours);
        assert_eq!(io::copy(&mut &theirs, &mut io::sink()).unwrap(), 0);
        let name = listener.local_addr().unwrap();
        let place = name.as_pathname().unwrap().parent().unwrap();
        assert!(!place.exists(), "{place:?}");
    }

    #[test]
    fn a_path_is_one_option() {
        assert_eq!(source(OsStr::new("/a,b\\c=d")), "source=/a\\,b\\\\c=d");
    }
}
