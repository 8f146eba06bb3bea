//! `actor-vmm ctl`.

use crate::control::client::{self, ClientError, Connection, Script};
use crate::control::verbs::Verb;
use crate::machine::outcome::status;
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use std::io::Write;
use std::path::PathBuf;

/// Exit statuses of `ctl`, for its help.
const TABLE: &str = "\
Exit status:
  0   done; with -, all of it
  2   bad usage, or a line of stdin that is no verb
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
    /// What to ask; - reads verbs from stdin, one a line, and asks each when the one before is answered, until one
    /// cannot be done
    #[arg(value_enum)]
    verb: What,
    /// Prints the answer as JSON
    #[arg(long)]
    json: bool,
}

/// One verb, or many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    One(Verb),
    Stdin,
}

impl ValueEnum for What {
    fn value_variants<'a>() -> &'a [What] {
        const ALL: [What; Verb::ALL.len() + 1] = {
            let mut all = [What::Stdin; Verb::ALL.len() + 1];
            let mut n = 0;
            while n < Verb::ALL.len() {
                all[n] = What::One(Verb::ALL[n]);
                n += 1;
            }
            all
        };
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            What::One(verb) => verb.to_possible_value(),
            What::Stdin => {
                Some(PossibleValue::new("-").help("Verbs from stdin, one a line; # begins a comment"))
            }
        }
    }
}

impl Ctl {
    /// Asks, prints answers, and returns the exit status.
    pub fn run(&self) -> u8 {
        let mut machine = match Connection::open(&self.path) {
            Ok(machine) => machine,
            Err(error) => return super::complain(&super::chain(&error), status::HOST_TROUBLE),
        };
        let mut script = match self.verb {
            What::One(verb) => return self.ask(&mut machine, verb, ""),
            What::Stdin => Script::new(std::io::stdin().lock()),
        };
        while let Some(next) = script.next() {
            let status = match next {
                Ok(verb) => self.ask(&mut machine, verb, &format!("line {}: ", script.line())),
                Err(error) => super::complain(&super::chain(&error), status::BAD_INPUT),
            };
            if status != 0 {
                return status;
            }
        }
        0
    }

    /// One verb. `place` is where it comes from, for what is wrong.
    fn ask(&self, machine: &mut Connection, verb: Verb, place: &str) -> u8 {
        match machine.ask(verb) {
            Ok(body) => {
                let text = if self.json {
                    body.to_string()
                } else {
                    client::in_words(verb, &body)
                };
                // A reader that is gone needs no answer.
                drop(writeln!(std::io::stdout(), "{text}"));
                0
            }
            Err(error @ ClientError::Refused { .. }) => super::complain(&format!("{place}{error}"), REFUSED),
            Err(error) => super::complain(&format!("{place}{}", super::chain(&error)), status::HOST_TROUBLE),
        }
    }
}
