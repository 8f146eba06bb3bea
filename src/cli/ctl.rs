//! `actor-vmm ctl`.

use super::stdout::Stdout;
use crate::control::client::{self, ClientError, Connection, Script};
use crate::control::verbs::{self, Verb};
use crate::machine::outcome::status;
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::path::PathBuf;

/// Exit statuses of `ctl`, for its help.
const TABLE: &str = "\
Exit status:
  0   done; with -, all of it
  2   bad usage, or a line of stdin that is no verb
  4   the machine refuses, or cannot do it now; the reason is on stderr
  18  no machine can be reached there, or the answer cannot be written to stdout (it is done all the same)
  141 with -: whoever reads the answers has left; the verbs behind the one whose answer he did not want are not done";

/// The machine refuses.
const REFUSED: u8 = 4;
/// As of a program that SIGPIPE has ended.
const READER_LEFT: u8 = 128 + Signal::SIGPIPE as u8;

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
    /// What the verb is about, if it is about something: link DEVICE up|down, balloon SIZE
    about: Vec<String>,
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
        // What is wrong with the words is wrong with any machine.
        let words = |verb: Verb| {
            let about = self.about.iter().map(String::as_str);
            verbs::from_words(&std::iter::once(verb.name()).chain(about).collect::<Vec<_>>())
        };
        let one = match self.verb {
            What::One(verb) => words(verb).map(Some),
            What::Stdin if self.about.is_empty() => Ok(None),
            What::Stdin => Err(verbs::WordsError::Alone("-")),
        };
        let one = match one {
            Ok(one) => one,
            Err(error) => return super::complain(&super::chain(&error), status::BAD_INPUT),
        };
        let mut machine = match Connection::open(&self.path) {
            Ok(machine) => machine,
            Err(error) => return super::complain(&super::chain(&error), status::HOST_TROUBLE),
        };
        if let Some((verb, request)) = one {
            let mut stdout = Stdout::default();
            let status = self.ask(&mut machine, verb, &request, "", &mut stdout);
            return stdout.status(status);
        }
        let mut stdout = Stdout::default();
        let mut script = Script::new(std::io::stdin().lock());
        while let Some(next) = script.next() {
            let status = match next {
                Ok((verb, request)) => {
                    let place = format!("line {}: ", script.line());
                    self.ask(&mut machine, verb, &request, &place, &mut stdout)
                }
                Err(error) => super::complain(&super::chain(&error), status::BAD_INPUT),
            };
            if stdout.reader_left() {
                return READER_LEFT;
            }
            if status != 0 || stdout.is_over() {
                return stdout.status(status);
            }
        }
        0
    }

    /// One verb. `place` is where it comes from, for what is wrong.
    fn ask(
        &self,
        machine: &mut Connection,
        verb: Verb,
        request: &Value,
        place: &str,
        stdout: &mut Stdout,
    ) -> u8 {
        match machine.ask(verb, request) {
            Ok(body) => {
                let text = if self.json {
                    body.to_string()
                } else {
                    client::in_words(verb, &body)
                };
                stdout.print(&format!("{text}\n"));
                0
            }
            Err(error @ ClientError::Refused { .. }) => super::complain(&format!("{place}{error}"), REFUSED),
            Err(error) => super::complain(&format!("{place}{}", super::chain(&error)), status::HOST_TROUBLE),
        }
    }
}
