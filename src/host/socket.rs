//! A Unix socket that others connect to, and that only its owner may use (mode 0600).
//!
//! A process that was killed leaves its socket's name behind. It is replaced if nobody listens there, and only then.
//! Two programs that start at the same time could each take the other's new socket for such a leftover; so looking and
//! replacing happen under an advisory lock of the directory, which is gone with the process whatever becomes of it.

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{Mode, SFlag, fchmod, lstat};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long another program may keep the directory's lock: it holds it for microseconds.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// Why there is no socket. `option`: what the user has named it by, as `--control `.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another program has it.
    #[error("{option}{}: another program listens there; give another path", .path.display())]
    InUse {
        /// As given.
        option: &'static str,
        /// The same.
        path: PathBuf,
    },
    /// Something else has its name.
    #[error("{option}{}: there is something that is no socket; give another path or remove it", .path.display())]
    NotASocket {
        /// As given.
        option: &'static str,
        /// The same.
        path: PathBuf,
    },
    /// The name is too long for a socket, or has a zero byte.
    #[error("{option}{}: a socket's path has at most 107 bytes; give a shorter one", .path.display())]
    Path {
        /// As given.
        option: &'static str,
        /// The same.
        path: PathBuf,
    },
    /// The host.
    #[error("{option}{}: {what}; check the directory and its permissions", .path.display())]
    Host {
        /// As given.
        option: &'static str,
        /// The same.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it did not work.
        source: std::io::Error,
    },
}

/// A socket that listens, and whose name is removed with the value if it is still its own.
pub struct OwnedSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the name.
    identity: (u64, u64),
}

impl SocketError {
    /// Whether the user can mend it with another path, as for any file that he names: a directory that is not there, say.
    pub fn is_bad_input(&self) -> bool {
        let SocketError::Host { source, .. } = self else {
            return true;
        };
        // What another path would not help against.
        let host = [
            Errno::EMFILE,
            Errno::ENFILE,
            Errno::ENOMEM,
            Errno::ENOBUFS,
            Errno::EWOULDBLOCK,
        ];
        !host
            .iter()
            .any(|errno| source.raw_os_error() == Some(*errno as i32))
    }
}

impl OwnedSocket {
    /// Makes the socket. `backlog`: how many clients may wait to be accepted.
    ///
    /// # Errors
    /// See [`SocketError`]; nothing is left then, and nothing of others is touched.
    pub fn bind(option: &'static str, path: &Path, backlog: i32) -> Result<OwnedSocket, SocketError> {
        let host = |what| {
            let path = path.to_path_buf();
            move |source: Errno| SocketError::Host {
                option,
                path,
                what,
                source: source.into(),
            }
        };
        let address = UnixAddr::new(path).map_err(|_| SocketError::Path {
            option,
            path: path.into(),
        })?;
        let fd = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .map_err(host("no socket can be made"))?;
        // The name gets the socket's own mode, so that there is no moment in which others may use it.
        fchmod(fd.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR).map_err(host("the socket's mode cannot be set"))?;
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let lock = lock(directory).map_err(host("its directory cannot be used"))?;
        match bind(fd.as_raw_fd(), &address) {
            Ok(()) => {}
            Err(Errno::EADDRINUSE) => {
                replaceable(option, path, &address)?;
                std::fs::remove_file(path).map_err(|source| SocketError::Host {
                    option,
                    path: path.into(),
                    what: "a socket that nobody listens to cannot be removed",
                    source,
                })?;
                bind(fd.as_raw_fd(), &address).map_err(host("the socket cannot be made there"))?;
            }
            Err(error) => return Err(host("the socket cannot be made there")(error)),
        }
        let status = lstat(path).map_err(host("the socket that was made is not there"))?;
        let socket = OwnedSocket {
            listener: UnixListener::from(fd),
            path: path.into(),
            identity: (status.st_dev, status.st_ino),
        };
        let backlog = Backlog::new(backlog).expect("a small number");
        listen(&socket.listener, backlog).map_err(host("nobody can be listened to"))?;
        drop(lock);
        Ok(socket)
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for OwnedSocket {
    fn drop(&mut self) {
        // Somebody may have removed it, and somebody else have made his.
        if lstat(&self.path).is_ok_and(|status| (status.st_dev, status.st_ino) == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Keeps other programs of this kind out of the directory for a moment.
fn lock(directory: &Path) -> Result<Flock<File>, Errno> {
    let mut file =
        File::open(directory).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
    let begin = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK)) if begin.elapsed() < LOCK_LIMIT => {
                file = back;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err((_, error)) => return Err(error),
        }
    }
}

/// Whether what has the name is a socket to which nobody listens.
fn replaceable(option: &'static str, path: &Path, address: &UnixAddr) -> Result<(), SocketError> {
    let path = path.to_path_buf();
    let kind = lstat(&path).map_or(SFlag::empty(), |status| {
        SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
    });
    if kind != SFlag::S_IFSOCK {
        return Err(SocketError::NotASocket { option, path });
    }
    let probe: OwnedFd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .map_err(|source| SocketError::Host {
        option,
        path: path.clone(),
        what: "no socket can be made",
        source: source.into(),
    })?;
    match connect(probe.as_raw_fd(), address) {
        Err(Errno::ECONNREFUSED) => Ok(()),
        // Somebody is there, or (EAGAIN: his backlog is full; EACCES: it is another user's) may be.
        _ => Err(SocketError::InUse { option, path }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    fn bind_at(path: &Path) -> Result<OwnedSocket, SocketError> {
        OwnedSocket::bind("--control ", path, 16)
    }

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Place {
            let path = std::env::temp_dir().join(format!("actor-vmm-socket-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Place(path)
        }
        fn path(&self) -> PathBuf {
            self.0.join("ctl")
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn it_is_its_owners_alone_and_gone_at_the_end() {
        let place = Place::new("mode");
        let socket = bind_at(&place.path()).unwrap();
        let mode = std::fs::metadata(place.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(place.path()).unwrap();
        drop(socket);
        assert!(!place.path().exists());
    }

    #[test]
    fn a_leftover_is_replaced_and_a_live_one_is_not() {
        let place = Place::new("stale");
        // A socket whose owner is gone without a word, as after SIGKILL.
        drop(UnixListener::bind(place.path()).unwrap());
        let first = bind_at(&place.path()).unwrap();
        let Err(SocketError::InUse { .. }) = bind_at(&place.path()) else {
            panic!("two have it")
        };
        UnixStream::connect(place.path()).unwrap();
        drop(first);
        bind_at(&place.path()).unwrap();
    }

    #[test]
    fn of_many_that_start_at_once_exactly_one_gets_it() {
        let place = Place::new("race");
        for _ in 0..20 {
            drop(UnixListener::bind(place.path()).unwrap());
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let path = place.path();
                    std::thread::spawn(move || bind_at(&path).ok())
                })
                .collect();
            let got: Vec<_> = threads
                .into_iter()
                .filter_map(|thread| thread.join().unwrap())
                .collect();
            assert_eq!(got.len(), 1);
            UnixStream::connect(place.path()).unwrap();
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_the_users_and_a_lack_of_descriptors_the_hosts() {
        let place = Place::new("whose");
        for wrong in [place.path().join("ctl"), "/proc/self/ctl".into()] {
            let error = bind_at(&wrong).map(drop).unwrap_err();
            assert!(error.is_bad_input(), "{error}");
        }
        let error = SocketError::Host {
            option: "--control ",
            path: place.path(),
            what: "no socket can be made",
            source: Errno::EMFILE.into(),
        };
        assert!(!error.is_bad_input());
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let place = Place::new("others");
        std::fs::write(place.path(), "text").unwrap();
        assert!(matches!(
            bind_at(&place.path()),
            Err(SocketError::NotASocket { .. })
        ));
        assert_eq!(std::fs::read(place.path()).unwrap(), b"text");
        std::fs::remove_file(place.path()).unwrap();
        // Removed by somebody, and made by somebody else: not removed at our end.
        let ours = bind_at(&place.path()).unwrap();
        std::fs::remove_file(place.path()).unwrap();
        let theirs = bind_at(&place.path()).unwrap();
        drop(ours);
        UnixStream::connect(place.path()).unwrap();
        drop(theirs);
    }

    #[test]
    fn bad_paths_are_named() {
        let long = PathBuf::from("/tmp/".to_string() + &"x".repeat(200));
        for (path, said) in [
            (Path::new("/nowhere/ctl"), "/nowhere/ctl: its directory"),
            (&long, "at most 107 bytes"),
            (Path::new("/proc/ctl"), "cannot be made there"),
        ] {
            let Err(error) = bind_at(path) else {
                panic!("{path:?}")
            };
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
