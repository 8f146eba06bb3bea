//! Where the guest's console goes: this terminal (or pipe), a file, a pseudo-terminal, or nowhere.

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::termios::{self, SetArg};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What `--console` says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum ConsoleKind {
    /// stdin and stdout.
    #[default]
    Stdio,
    /// Output into a file, which is made or emptied; no input.
    File(PathBuf),
    /// A pseudo-terminal whose name is told on stderr.
    Pty,
    /// Output is dropped; no input.
    Off,
}

impl ConsoleKind {
    /// What it is parsed from; `None`: its path is no text.
    pub fn to_text(&self) -> Option<String> {
        Some(match self {
            ConsoleKind::Stdio => "stdio".into(),
            ConsoleKind::Pty => "pty".into(),
            ConsoleKind::Off => "off".into(),
            ConsoleKind::File(path) => format!("file:{}", path.to_str()?),
        })
    }
}

impl FromStr for ConsoleKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stdio" => Ok(ConsoleKind::Stdio),
            "pty" => Ok(ConsoleKind::Pty),
            "off" => Ok(ConsoleKind::Off),
            _ => match text.strip_prefix("file:") {
                Some("") => Err("file: needs a path behind the colon".into()),
                Some(path) => Ok(ConsoleKind::File(path.into())),
                None => Err(format!(
                    "'{text}' is not a console; there are stdio, file:PATH, pty and off, and virtio and serial before these"
                )),
            },
        }
    }
}

/// Why a console cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be made.
    #[error(
        "the console file {path} cannot be opened for writing; check the directory and its permissions (and a FIFO \
         needs its reader first)"
    )]
    File {
        /// As given.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The host gives no pseudo-terminal.
    #[error("the host gives no pseudo-terminal for the console")]
    Pty(#[source] std::io::Error),
    /// Two consoles on one place.
    #[error("{one} and {other} both go to {place}; send one of them elsewhere")]
    Same {
        /// An option.
        one: &'static str,
        /// Another.
        other: &'static str,
        /// Where both go.
        place: String,
    },
    /// It would be written over.
    #[error("{option} would write over {path}, which is the file of {user}; send it elsewhere")]
    Used {
        /// The console's option.
        option: &'static str,
        /// The other's.
        user: &'static str,
        /// As given.
        path: PathBuf,
    },
    /// A descriptor is missing.
    #[error(
        "stdin and stdout cannot be used for the console (is one closed, or ulimit -n too low?); --console sends it \
         elsewhere"
    )]
    Stdio(#[source] std::io::Error),
}

/// A console that was opened.
pub struct Console {
    /// Where input comes from.
    input: Option<OwnedFd>,
    /// Where output goes; `None` drops it.
    output: Option<OwnedFd>,
    /// It was opened for this, so what is in it is replaced.
    is_file: bool,
    /// What errors call its output.
    pub name: String,
    /// And its input.
    pub input_name: String,
    /// Whether a person types here, so that escapes mean something.
    pub interactive: bool,
    /// A pseudo-terminal has times when nobody is on the other side.
    pub comes_and_goes: bool,
}

/// Whether consoles, each with its option, would write over each other, or over a file that the machine is made of. `used`:
/// those files, with the option of each.
///
/// # Errors
/// [`ConsoleError::Same`], [`ConsoleError::Used`].
pub fn check_distinct(
    consoles: &[(&'static str, &ConsoleKind)],
    used: &[(&'static str, &Path)],
) -> Result<(), ConsoleError> {
    for (number, (option, kind)) in consoles.iter().enumerate() {
        for (earlier, other) in &consoles[..number] {
            let place = match (kind, other) {
                (ConsoleKind::Stdio, ConsoleKind::Stdio) => "stdio".into(),
                (ConsoleKind::File(path), ConsoleKind::File(other)) if place(path) == place(other) => {
                    other.display().to_string()
                }
                _ => continue,
            };
            return Err(ConsoleError::Same {
                one: earlier,
                other: option,
                place,
            });
        }
        let ConsoleKind::File(path) = kind else { continue };
        if let Some((user, _)) = used.iter().find(|(_, file)| place(file) == place(path)) {
            return Err(ConsoleError::Used {
                option,
                user,
                path: path.clone(),
            });
        }
    }
    Ok(())
}

/// What tells one file from all others, whatever it is called.
#[derive(PartialEq, Eq)]
enum Place {
    /// Device and inode.
    File(u64, u64),
    /// It does not exist yet: its directory, if there is one, and its name.
    Name(PathBuf, Option<OsString>),
}

fn place(path: &Path) -> Place {
    if let Ok(metadata) = std::fs::metadata(path) {
        return Place::File(metadata.dev(), metadata.ino());
    }
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let directory = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.into());
    Place::Name(directory, path.file_name().map(Into::into))
}

impl Console {
    /// Opens a console for output alone: the debug console's port has no input.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open_output(kind: &ConsoleKind) -> Result<Console, ConsoleError> {
        let mut console = Console::open(kind)?;
        if !console.comes_and_goes {
            console.input = None;
        }
        console.interactive = false;
        Ok(console)
    }

    /// Opens a console.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open(kind: &ConsoleKind) -> Result<Console, ConsoleError> {
        let quiet = |name: &str| Console {
            input: None,
            output: None,
            is_file: false,
            name: name.into(),
            input_name: name.into(),
            interactive: false,
            comes_and_goes: false,
        };
        match kind {
            ConsoleKind::Off => Ok(quiet("off")),
            ConsoleKind::File(path) => {
                let file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    // Not emptied yet: see `Console::begin`.
                    .truncate(false)
                    // A FIFO must not make it wait, neither here nor when it is full.
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path)
                    .map_err(|source| ConsoleError::File {
                        path: path.clone(),
                        source,
                    })?;
                Ok(Console {
                    output: Some(file.into()),
                    is_file: true,
                    ..quiet(&path.display().to_string())
                })
            }
            ConsoleKind::Stdio => {
                // Copies, so that closing the console does not close what the program was given.
                let stdin = std::io::stdin();
                let input = match reopen(stdin.as_fd(), true) {
                    Some(input) => input,
                    None => stdin.as_fd().try_clone_to_owned().map_err(ConsoleError::Stdio)?,
                };
                let stdout = std::io::stdout();
                let output = match reopen(stdout.as_fd(), false) {
                    Some(output) => output,
                    None => stdout.as_fd().try_clone_to_owned().map_err(ConsoleError::Stdio)?,
                };
                Ok(Console {
                    input: Some(input),
                    output: Some(output),
                    interactive: std::io::stdin().is_terminal(),
                    input_name: "stdin".into(),
                    ..quiet("stdout")
                })
            }
            ConsoleKind::Pty => {
                let (master, name) = open_pty().map_err(ConsoleError::Pty)?;
                let output = master.try_clone().map_err(ConsoleError::Pty)?;
                Ok(Console {
                    input: Some(master),
                    output: Some(output),
                    comes_and_goes: true,
                    ..quiet(&name)
                })
            }
        }
    }

    /// Everything else could be had too: a file is emptied, so that what was in it is not lost to a machine that does
    /// not start.
    pub fn begin(&self) {
        if let Some(output) = self.output.as_ref().filter(|_| self.is_file) {
            // Something that is no regular file cannot be emptied, and need not be.
            let _ = nix::unistd::ftruncate(output, 0);
        }
    }

    /// Where input comes from.
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(|fd| fd.as_fd())
    }

    /// Where output goes.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        self.output.as_ref().map(|fd| fd.as_fd())
    }

    /// No more input will come.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Output cannot be written any more; drop what comes.
    pub fn close_output(&mut self) {
        self.output = None;
    }
}

/// Another open file description of a terminal or a pipe, with O_NONBLOCK. A terminal that polls as writable can still
/// block a write that is larger than its room, and so can a pipe that others write to; what polls as readable, a read
/// after somebody else has read it. The flag
/// must not be set on what we were given: it would be set for everyone who shares that, our shell included.
fn reopen(fd: BorrowedFd<'_>, read: bool) -> Option<OwnedFd> {
    let kind = SFlag::from_bits_truncate(fstat(fd).ok()?.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFIFO && !fd.is_terminal() {
        return None;
    }
    // Where it cannot be had (no /proc, the terminal of another user), the one we were given must do.
    OpenOptions::new()
        .read(read)
        .write(!read)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .ok()
        .map(OwnedFd::from)
}

fn open_pty() -> std::io::Result<(OwnedFd, String)> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname_r(&master)?;
    // Opened and closed once: from then on the master says (POLLHUP) whether somebody is on the other side. Raw, so
    // that what comes before that somebody has set it up is not echoed back to the guest.
    let slave = File::options().read(true).write(true).open(&name)?;
    let mut raw = termios::tcgetattr(&slave)?;
    termios::cfmakeraw(&mut raw);
    termios::tcsetattr(&slave, SetArg::TCSANOW, &raw)?;
    drop(slave);
    // SAFETY: the descriptor is taken out of its owner, which forgets it.
    let owned = unsafe {
        use std::os::fd::{FromRawFd, IntoRawFd};
        OwnedFd::from_raw_fd(master.into_raw_fd())
    };
    Ok((owned, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_parse() {
        assert_eq!("stdio".parse(), Ok(ConsoleKind::Stdio));
        assert_eq!("file:/x/y".parse(), Ok(ConsoleKind::File("/x/y".into())));
        assert_eq!(
            "file:".parse::<ConsoleKind>(),
            Err("file: needs a path behind the colon".into())
        );
        assert!(
            "tcp:1"
                .parse::<ConsoleKind>()
                .unwrap_err()
                .contains("'tcp:1' is not a console")
        );
    }

    #[test]
    fn a_file_keeps_its_content_until_the_machine_begins() {
        let path = std::env::temp_dir().join(format!("actor-vmm-console-{}", std::process::id()));
        std::fs::write(&path, "from before").unwrap();
        let console = Console::open(&ConsoleKind::File(path.clone())).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"from before");
        console.begin();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_in_no_directory_is_named() {
        let Err(error) = Console::open(&ConsoleKind::File("/nowhere/console".into())) else {
            panic!()
        };
        assert!(error.to_string().contains("/nowhere/console"), "{error}");
    }

    #[test]
    fn a_pty_has_a_name_that_opens() {
        let console = Console::open(&ConsoleKind::Pty).unwrap();
        assert!(
            File::options().read(true).write(true).open(&console.name).is_ok(),
            "{}",
            console.name
        );
    }
}
