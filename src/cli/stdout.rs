//! What a command prints for whoever called it. (What a guest prints is the console's matter.)
//!
//! A reader that leaves early (`doctor | head -1`) has seen enough: nothing is said about it, and the status is that of what
//! was done. Everything else that keeps a result from being written, a full disk say, is an error, or a script would take a
//! cut file for a whole one.

use crate::machine::outcome::status;
use std::io::{self, ErrorKind, Write};

/// Stdout, and what became of it.
#[derive(Default)]
pub struct Stdout {
    failed: Option<io::Error>,
}

impl Stdout {
    /// Prints text, all of it now. Behind a failure nothing more is tried.
    pub fn print(&mut self, text: &str) {
        if self.failed.is_none() {
            let mut stdout = io::stdout();
            let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
            self.wrote(written);
        }
    }

    /// What became of something that was printed by other means.
    pub fn wrote(&mut self, written: io::Result<()>) {
        self.failed = self.failed.take().or(written.err());
    }

    /// Nobody reads any more.
    pub fn reader_left(&self) -> bool {
        let kind = self.failed.as_ref().map(io::Error::kind);
        kind == Some(ErrorKind::BrokenPipe)
    }

    /// Something could not be written, or nobody reads any more.
    pub fn is_over(&self) -> bool {
        self.failed.is_some()
    }

    /// The exit status of a command that would have this one if all of it was printed. Says what is wrong if it was not.
    pub fn status(self, status: u8) -> u8 {
        match &self.failed {
            Some(error) if !self.reader_left() => super::complain(
                &format!("cannot write to stdout: {}", super::chain(error)),
                status::HOST_TROUBLE,
            ),
            _ => status,
        }
    }
}

/// Prints text, and nothing else is to be done.
pub fn show(text: &str) -> u8 {
    let mut stdout = Stdout::default();
    stdout.print(text);
    stdout.status(0)
}
