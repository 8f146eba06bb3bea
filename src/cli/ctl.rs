//! `actor-vmm ctl`.

use crate::control::client::{self, ClientError};
use crate::control::verbs::Verb;
use crate::machine::outcome::status;
use clap::Args;
use std::io::Write;
use std::path::PathBuf;

/// Exit statuses of `ctl`, for its help.
const TABLE: &str = "\
Exit status:
  0   done
  2   bad usage
  4   the machine refuses, or cannot do it now; the reason is on stderr
  18  no machine can be reached there";

/// The machine refuses.
const REFUSED: u8 = 4;

/// As typed by the user.
#[derive(Args, Debug)]
#[command(after_help = TABLE)]
pub struct Ctl {
    /// The machine's control socket
    path: PathBuf,
    /// What to ask
    #[arg(value_enum)]
    verb: Verb,
    /// Prints the answer as JSON
    #[arg(long)]
    json: bool,
}

impl Ctl {
    /// Asks, prints the answer, and returns the exit status.
    pub fn run(&self) -> u8 {
        match client::ask(&self.path, self.verb) {
            Ok(body) => {
                let text = if self.json {
                    body.to_string()
                } else {
                    client::in_words(self.verb, &body)
                };
                // A reader that is gone needs no answer.
                drop(writeln!(std::io::stdout(), "{text}"));
                0
            }
            Err(error @ ClientError::Refused { .. }) => super::complain(&error.to_string(), REFUSED),
            Err(error) => super::complain(&super::chain(&error), status::HOST_TROUBLE),
        }
    }
}
