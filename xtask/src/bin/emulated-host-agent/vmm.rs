//! Starting a VMM, and being at the other end of its stdin, stdout and stderr.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use std::{ptr, thread};

use anyhow::{Context, Result, bail};
use harness::scenario::{Kernel, Scenario, Stdin};

use crate::report::terminal_settings;

const BZIMAGE: &str = "/guest/bzImage";
const VMLINUX: &str = "/guest/vmlinux";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    #[default]
    ActorVmm,
    /// Debian's QEMU, microvm: a second opinion on whether a scenario itself is right.
    Qemu,
}

impl Kind {
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "actor-vmm" => Ok(Kind::ActorVmm),
            "qemu" => Ok(Kind::Qemu),
            _ => bail!("no VMM is called {name}"),
        }
    }

    pub fn command(self, scenario: &Scenario, initrd: &str) -> Command {
        let kernel = match scenario.kernel {
            Kernel::Bzimage => BZIMAGE,
            Kernel::Vmlinux => VMLINUX,
        };
        let cmdline = scenario.substitute(&format!("console=ttyS0 panic=-1 {}", scenario.cmdline));
        let cpus = scenario.cpus.to_string();
        match self {
            Kind::ActorVmm => {
                let mut command = Command::new("/bin/actor-vmm");
                command.args([
                    "run",
                    "--kernel",
                    kernel,
                    "--initrd",
                    initrd,
                    "--cmdline",
                    cmdline.trim(),
                ]);
                command.args(["--cpus", &cpus, "--memory", &scenario.memory]);
                if let Some(boot) = &scenario.boot {
                    command.args(["--boot", boot]);
                }
                command.args(scenario.args.iter().map(|a| scenario.substitute(a)));
                command
            }
            Kind::Qemu => {
                let mut command = Command::new("/usr/bin/qemu-system-x86_64");
                command.args([
                    "-M",
                    "microvm,acpi=on,rtc=on,pit=on,pic=on",
                    "-accel",
                    "kvm",
                    "-cpu",
                    "host",
                ]);
                command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
                let serial = if scenario.stdin == Stdin::Pty {
                    "mon:stdio"
                } else {
                    "stdio"
                };
                command.args(["-smp", &cpus, "-m", &scenario.memory, "-serial", serial]);
                command.args(["-kernel", kernel, "-initrd", initrd, "-append", cmdline.trim()]);
                command
            }
        }
    }
}

enum Input {
    Out(Vec<u8>, Instant),
    Err(Vec<u8>),
    Closed,
    Exited(Instant),
}

/// A VMM that was started. Dropping it kills it.
pub struct Vmm {
    child: Child,
    reaped: bool,
    inputs: Receiver<Input>,
    stdin: Option<Sender<Vec<u8>>>,
    terminal: Option<Terminal>,
    open_streams: u32,
    pub started: Instant,
    pub exited: Option<Instant>,
    pub out: Vec<u8>,
    pub err: Vec<u8>,
    /// When the latest byte of `out` arrived.
    pub out_at: Instant,
}

struct Terminal {
    slave: OwnedFd,
    before: libc::termios,
}

impl Vmm {
    pub fn start(mut command: Command, stdin: Stdin) -> Result<Self> {
        let (sender, inputs) = mpsc::channel();
        let mut terminal = None;
        let mut master = None;
        command.stderr(Stdio::piped());
        match stdin {
            Stdin::Null => {
                command.stdin(Stdio::null()).stdout(Stdio::piped());
            }
            Stdin::Pipe => {
                command.stdin(Stdio::piped()).stdout(Stdio::piped());
            }
            Stdin::Pty => {
                let (ours, theirs) = open_pty().context("cannot open a pseudo-terminal")?;
                command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?);
                terminal = Some(Terminal {
                    before: terminal_settings(theirs.as_raw_fd())?,
                    slave: theirs,
                });
                master = Some(ours);
            }
        }
        let on_terminal = stdin == Stdin::Pty;
        // SAFETY: between fork and exec only two system calls are made, which touch no memory of ours.
        unsafe {
            command.pre_exec(move || {
                if libc::setsid() < 0 || (on_terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0) {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        // The command holds copies of the terminal, which would keep it open after the VMM.
        drop(command);

        let (output, input): (Box<dyn Read + Send>, Option<Box<dyn Write + Send>>) = match master {
            Some(master) => (Box::new(master.try_clone()?), Some(Box::new(master))),
            None => (
                Box::new(child.stdout.take().context("stdout is a pipe")?),
                child
                    .stdin
                    .take()
                    .map(|pipe| Box::new(pipe) as Box<dyn Write + Send>),
            ),
        };
        pump(output, sender.clone(), |bytes| Input::Out(bytes, Instant::now()));
        pump(
            Box::new(child.stderr.take().context("stderr is a pipe")?),
            sender.clone(),
            Input::Err,
        );
        let pid = child.id();
        thread::spawn(move || {
            wait_without_reaping(pid);
            // Nobody listens any more when the VMM was given up.
            let _ = sender.send(Input::Exited(Instant::now()));
        });
        let stdin = input.map(|mut input| {
            let (sender, chunks) = mpsc::channel::<Vec<u8>>();
            thread::spawn(move || {
                for chunk in chunks {
                    if input.write_all(&chunk).is_err() {
                        break;
                    }
                }
            });
            sender
        });
        Ok(Self {
            child,
            reaped: false,
            inputs,
            stdin,
            terminal,
            open_streams: 2,
            started,
            exited: None,
            out: Vec::new(),
            err: Vec::new(),
            out_at: started,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Takes in one thing that happened; false when the time is up or nothing more can happen.
    pub fn step(&mut self, deadline: Instant, live: &mut dyn FnMut(&[u8])) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.inputs.recv_timeout(left) {
            Ok(Input::Out(bytes, at)) => {
                live(&bytes);
                self.out.extend_from_slice(&bytes);
                self.out_at = at;
            }
            Ok(Input::Err(bytes)) => self.err.extend_from_slice(&bytes),
            Ok(Input::Closed) => self.open_streams -= 1,
            Ok(Input::Exited(at)) => self.exited = Some(at),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return false,
        }
        true
    }

    /// All there was to read was read.
    pub fn drained(&self) -> bool {
        self.open_streams == 0 || (self.terminal.is_some() && self.open_streams == 1)
    }

    pub fn type_in(&self, bytes: Vec<u8>) -> Result<()> {
        match &self.stdin {
            Some(stdin) => stdin.send(bytes).ok().context("the VMM's stdin is closed"),
            None => bail!("this scenario gives the VMM no stdin"),
        }
    }

    pub fn signal(&self, signal: i32) {
        if !self.reaped {
            // SAFETY: the child is not reaped yet, so the id is still its own.
            unsafe { libc::kill(self.child.id() as i32, signal) };
        }
    }

    /// Takes the exit status of a VMM that has exited, as a shell would see it.
    pub fn status(&mut self) -> Result<i32> {
        let status = self.child.wait()?;
        self.reaped = true;
        Ok(status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(-1))
    }

    /// Whether the terminal is in another state than before the VMM.
    pub fn terminal_changed(&self) -> Option<bool> {
        let terminal = self.terminal.as_ref()?;
        let now = terminal_settings(terminal.slave.as_raw_fd()).ok()?;
        let then = &terminal.before;
        let same = now.c_iflag == then.c_iflag
            && now.c_oflag == then.c_oflag
            && now.c_cflag == then.c_cflag
            && now.c_lflag == then.c_lflag
            && now.c_cc == then.c_cc;
        Some(!same)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if !self.reaped {
            self.signal(libc::SIGKILL);
            // A VMM that does not die even so would hang process 1; the host side's watchdog sees that.
            let _ = self.child.wait();
        }
    }
}

fn pump(mut from: Box<dyn Read + Send>, to: Sender<Input>, wrap: fn(Vec<u8>) -> Input) {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match from.read(&mut buffer) {
                Ok(count @ 1..) => {
                    if to.send(wrap(buffer[..count].to_vec())).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A pseudo-terminal whose other side is gone reads as EIO.
                Ok(_) | Err(_) => break,
            }
        }
        let _ = to.send(Input::Closed);
    });
}

fn open_pty() -> io::Result<(File, OwnedFd)> {
    let (mut master, mut slave) = (-1, -1);
    let size = libc::winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: two places for descriptors; no name, no settings, a window size that outlives the call.
    let result = unsafe { libc::openpty(&mut master, &mut slave, ptr::null_mut(), ptr::null(), &size) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both descriptors are new and ours; the VMM must not inherit the master.
    unsafe {
        libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::fcntl(slave, libc::F_SETFD, libc::FD_CLOEXEC);
        Ok((File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)))
    }
}

/// The id stays the child's own until somebody reaps it, so that it can be signalled without a race.
fn wait_without_reaping(pid: u32) {
    loop {
        // SAFETY: waitid writes into a structure that is ours.
        let result = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            libc::waitid(libc::P_PID, pid, &mut info, libc::WEXITED | libc::WNOWAIT)
        };
        if result == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// A moment for the last bytes after the exit: the pipes are empty soon, or somebody who was left behind holds them.
pub const DRAIN: Duration = Duration::from_secs(2);
