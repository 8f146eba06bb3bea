//! The second serial port: events go out, typed text comes in.

use std::fs::File;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::protocol::Event;

const PORT: &str = "/dev/ttyS1";
/// The host side takes ten of these without a word for a hang.
const HEARTBEAT: Duration = Duration::from_secs(4);

pub struct Report {
    port: File,
}

impl Report {
    pub fn open() -> Result<Self> {
        let port = File::options()
            .read(true)
            .write(true)
            .open(PORT)
            .with_context(|| format!("cannot open {PORT}"))?;
        make_raw(port.as_raw_fd()).context("cannot set up the reporting port")?;
        Ok(Self { port })
    }

    pub fn send(&self, event: &Event) {
        let mut line = event.encode();
        line.push('\n');
        // A report that cannot be sent leaves nobody to tell; the host side's time limits deal with it.
        let _ = (&self.port).write_all(line.as_bytes());
    }

    /// Says every few seconds that this host still runs, whatever its jobs do.
    pub fn keep_saying_alive(&self) -> Result<()> {
        let report = Self {
            port: self.port.try_clone()?,
        };
        // A write to a terminal is whole, so lines of two threads do not mix.
        thread::spawn(move || {
            loop {
                thread::sleep(HEARTBEAT);
                report.send(&Event::Alive);
            }
        });
        Ok(())
    }

    pub fn flush(&self) {
        // SAFETY: the descriptor is open.
        unsafe { libc::tcdrain(self.port.as_raw_fd()) };
    }

    /// What a person types on the host side.
    pub fn typed(&self) -> Result<Receiver<Vec<u8>>> {
        let mut port = self.port.try_clone()?;
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(count @ 1..) = port.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(receiver)
    }
}

fn make_raw(fd: RawFd) -> std::io::Result<()> {
    let mut settings = terminal_settings(fd)?;
    // SAFETY: `settings` is a valid termios that only this function holds.
    let result = unsafe {
        libc::cfmakeraw(&mut settings);
        libc::tcsetattr(fd, libc::TCSANOW, &settings)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

pub fn terminal_settings(fd: RawFd) -> std::io::Result<libc::termios> {
    let mut settings = MaybeUninit::uninit();
    // SAFETY: tcgetattr fills the whole structure when it returns 0, and only then is it read.
    unsafe {
        if libc::tcgetattr(fd, settings.as_mut_ptr()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(settings.assume_init())
    }
}
