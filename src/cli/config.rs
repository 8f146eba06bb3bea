//! `--config FILE`: a machine in a TOML file, and `--dry-run`, which writes one.
//!
//! A file says what flags say, under the same names: what it has is turned into flags and parsed with those of the command
//! line, by the same code, into the same types. What is a list there (disks, networks, consoles, placements) is added to; what is
//! there once may be in one of the two, since nobody could tell which of them was meant. Every key is tried alone first, so
//! that a mistake is told with its place in the file.

use crate::host::console::ConsoleKind;
use crate::machine::supervisor::{Guest, MachineConfig};
use crate::virtio::keys::{self, Item, KeyError, Keyed};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use std::error::Error;
use std::ffi::OsString;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The largest file, bytes.
const MOST_BYTES: u64 = 1 << 20;
/// The keys whose values are keys again: tables in a file.
const KEYED: [&str; 6] = ["disk", "net", "vsock", "balloon", "share", "port"];
/// The flags that are none of a machine.
const BESIDE: [&str; 3] = ["config", "dry_run", "help"];
/// What belongs to a kernel, and is there by default.
const OF_KERNEL: [&str; 2] = ["boot", "unpack"];

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("--config {}: it cannot be read", .file.display())]
    Read {
        /// As given.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Larger than any that makes sense.
    #[error("--config {}: it has more than {MOST_BYTES} bytes, and so is no description of a machine", .0.display())]
    TooLarge(PathBuf),
    /// Not TOML.
    #[error("--config {}: line {line}: {text}", .file.display())]
    Syntax {
        /// As given.
        file: PathBuf,
        /// From 1.
        line: usize,
        /// What the parser says.
        text: String,
    },
    /// A key that is none.
    #[error("--config {}: there is no key '{key}'{}", .file.display(), match .nearest { Some(key) => format!("; did you mean '{key}'?"), None => "; they are named like the flags of `actor-vmm run`".into() })]
    Unknown {
        /// As given.
        file: PathBuf,
        /// In the file.
        key: String,
        /// The one that looks most like it, if one does.
        nearest: Option<String>,
    },
    /// A value that the key cannot have.
    #[error("--config {}: {key}: {why}", .file.display())]
    Value {
        /// As given.
        file: PathBuf,
        /// Its place, as `disk[0].queues`.
        key: String,
        /// What it can have.
        why: String,
    },
    /// In the file and on the command line.
    #[error("--config {}: {key} is in the file and on the command line as --{key}; leave one of them out", .file.display())]
    Both {
        /// As given.
        file: PathBuf,
        /// The key.
        key: String,
    },
    /// Something that no TOML file can say.
    #[error("--{0} has a value that is not text, which no file for --config can have")]
    NotText(String),
}

/// What a file says, as flags.
struct Flags<'a> {
    file: &'a Path,
    run: &'a Command,
    /// As on the command line.
    flags: Vec<OsString>,
}

/// Adds what the file says to a command line that names one, before the flags that are there.
///
/// # Errors
/// [`ConfigError`].
pub fn expand(cli: &Command, mut arguments: Vec<OsString>) -> Result<Vec<OsString>, ConfigError> {
    // To parse twice costs memory that stays.
    if !arguments
        .iter()
        .any(|word| word.as_encoded_bytes().starts_with(b"--config"))
    {
        return Ok(arguments);
    }
    // Whatever else is wrong with it is found when it is parsed with what the file says.
    let matches = cli.clone().ignore_errors(true).try_get_matches_from(&arguments);
    let Some(("run", matches)) = matches.as_ref().ok().and_then(ArgMatches::subcommand) else {
        return Ok(arguments);
    };
    let Some(file) = matches.get_one::<PathBuf>("config") else {
        return Ok(arguments);
    };
    let mut whole = cli.clone();
    whole.build();
    let run = whole.find_subcommand("run").expect("it has matched");
    let flags = flags(file, &read(file)?, run, matches)?;
    let place = arguments
        .iter()
        .skip(1)
        .position(|word| word == "run")
        .map_or(1, |n| n + 2);
    arguments.splice(place..place, flags);
    Ok(arguments)
}

fn read(file: &Path) -> Result<Table, ConfigError> {
    let cannot = |source| ConfigError::Read {
        file: file.into(),
        source,
    };
    let mut text = String::new();
    let opened = std::fs::File::open(file).map_err(cannot)?;
    opened
        .take(MOST_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(cannot)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(ConfigError::TooLarge(file.into()));
    }
    text.parse()
        .map_err(|error: toml::de::Error| ConfigError::Syntax {
            file: file.into(),
            line: 1 + error
                .span()
                .map_or(0, |span| text[..span.start].matches('\n').count()),
            text: error.message().replace('\n', ", "),
        })
}

/// The flags of a machine that a command has.
fn keys_of(run: &Command) -> impl Iterator<Item = (&str, &Arg)> {
    let of_machine = run
        .get_arguments()
        .filter(|arg| !BESIDE.contains(&arg.get_id().as_str()));
    of_machine.filter_map(|arg| Some((arg.get_long()?, arg)))
}

fn flags(
    file: &Path,
    table: &Table,
    run: &Command,
    given: &ArgMatches,
) -> Result<Vec<OsString>, ConfigError> {
    let mut flags = Flags {
        file,
        run,
        flags: Vec::new(),
    };
    for (key, value) in table {
        let Some((_, arg)) = keys_of(run).find(|(name, _)| name == key) else {
            let visible = keys_of(run)
                .filter(|(_, arg)| !arg.is_hide_set())
                .map(|(name, _)| name);
            return Err(ConfigError::Unknown {
                file: file.into(),
                key: key.clone(),
                nearest: keys::nearest(key, visible).map(str::to_owned),
            });
        };
        let is_list = matches!(arg.get_action(), ArgAction::Append);
        if !is_list && given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine) {
            return Err(ConfigError::Both {
                file: file.into(),
                key: key.clone(),
            });
        }
        match (value, is_list) {
            (Value::Array(list), true) => {
                for (number, value) in list.iter().enumerate() {
                    flags.add(arg, key, &format!("{key}[{number}]"), value)?;
                }
            }
            (_, true) if KEYED.contains(&key.as_str()) => {
                return Err(flags.wrong(key, format!("it is a list: write [[{key}]]")));
            }
            // One alone need not be in a list.
            (value, _) => flags.add(arg, key, key, value)?,
        }
    }
    Ok(flags.flags)
}

impl Flags<'_> {
    fn wrong(&self, key: impl Into<String>, why: impl Into<String>) -> ConfigError {
        ConfigError::Value {
            file: self.file.into(),
            key: key.into(),
            why: why.into(),
        }
    }

    /// Adds a flag with its value. `place`: where that is in the file.
    fn add(&mut self, arg: &Arg, key: &str, place: &str, value: &Value) -> Result<(), ConfigError> {
        let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
        let text = match value {
            Value::Boolean(on) if is_switch => {
                self.flags.extend(on.then(|| format!("--{key}").into()));
                return Ok(());
            }
            _ if is_switch => return Err(self.wrong(place, "it is true or false")),
            Value::Table(table) if KEYED.contains(&key) => keys::text(&self.items(place, table)?),
            _ if KEYED.contains(&key) => return Err(self.wrong(place, format!("it is a table, as [{key}]"))),
            value => scalar(value).ok_or_else(|| self.wrong(place, "it is a text or a number"))?,
        };
        let flag = OsString::from(format!("--{key}={text}"));
        self.try_alone(place, &flag)?;
        self.flags.push(flag);
        Ok(())
    }

    /// A table's keys. One that is false is not there.
    fn items(&self, place: &str, table: &Table) -> Result<Vec<Item>, ConfigError> {
        let mut items = Vec::new();
        for (key, value) in table {
            let value = match value {
                Value::Boolean(false) => continue,
                Value::Boolean(true) => None,
                value => {
                    let wrong =
                        || self.wrong(format!("{place}.{key}"), "it is a text, a number, true or false");
                    Some(scalar(value).ok_or_else(wrong)?)
                }
            };
            items.push((key.clone(), value));
        }
        Ok(items)
    }

    /// Whether a value can be parsed; what it contradicts is found later.
    fn try_alone(&self, place: &str, flag: &OsString) -> Result<(), ConfigError> {
        let words = [OsString::from("run"), flag.clone()];
        let Err(error) = self.run.clone().try_get_matches_from(words) else {
            return Ok(());
        };
        if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
            return Ok(());
        }
        let source = error.source();
        if let Some(error) = source.and_then(|source| source.downcast_ref::<KeyError>()) {
            return Err(self.wrong(format!("{place}.{}", error.key()), error.to_string()));
        }
        Err(self.wrong(place, why(&error)))
    }
}

/// What clap says of a value, without the flag.
fn why(error: &clap::Error) -> String {
    if let Some(ContextValue::Strings(valid)) = error.get(ContextKind::ValidValue)
        && !valid.is_empty()
    {
        return format!("there are {}", valid.join(", "));
    }
    match error.source() {
        Some(source) => source.to_string(),
        None => error.to_string().lines().next().unwrap_or_default().to_owned(),
    }
}

/// A value without parts, as on the command line.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(_) | Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

/// The other way round: a number only if it is the same again.
fn value(text: &str) -> Value {
    let integer = text
        .parse::<i64>()
        .ok()
        .filter(|number| number.to_string() == text);
    let float = text
        .parse::<f64>()
        .ok()
        .filter(|number| number.is_finite() && number.to_string() == text);
    match (integer, float) {
        (Some(number), _) => Value::Integer(number),
        (None, Some(number)) => Value::Float(number),
        (None, None) => Value::String(text.to_owned()),
    }
}

/// The devices of a machine, by key, in their order.
pub type Devices<'a> = [(&'a str, Vec<Vec<Item>>); KEYED.len()];

/// Writes a machine that was parsed as a file: what was said, and what is so by default.
///
/// # Errors
/// [`ConfigError::NotText`].
pub fn written(
    cli: &Command,
    matches: &ArgMatches,
    machine: &MachineConfig,
    devices: &Devices<'_>,
) -> Result<String, ConfigError> {
    let mut whole = cli.clone();
    whole.build();
    let run = whole.find_subcommand("run").expect("it was parsed");
    let mut table = Table::new();
    for (key, arg) in keys_of(run).filter(|(key, _)| !KEYED.contains(key)) {
        let id = arg.get_id().as_str();
        if !matches.contains_id("kernel") && OF_KERNEL.contains(&id) {
            continue;
        }
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            if matches.get_flag(id) {
                table.insert(key.into(), Value::Boolean(true));
            }
            continue;
        }
        let text = |word: &std::ffi::OsStr| {
            word.to_str()
                .map(value)
                .ok_or_else(|| ConfigError::NotText(key.into()))
        };
        let Some(words) = matches.get_raw(id) else {
            continue;
        };
        let mut values = words.map(text).collect::<Result<Vec<_>, _>>()?;
        let value = match arg.get_action() {
            ArgAction::Append => Value::Array(values),
            _ => values.remove(0),
        };
        table.insert(key.into(), value);
    }
    // Where the consoles go depends on which there are.
    let serial = [("serial", Some(&machine.console))];
    let consoles = serial
        .into_iter()
        .chain([("virtio", machine.virtio.console.as_ref())]);
    let consoles = consoles.filter_map(|(device, kind)| kind.map(|kind| (device, kind)));
    let text = |(device, kind): (&str, &ConsoleKind)| {
        let place = kind
            .to_text()
            .ok_or_else(|| ConfigError::NotText("console".into()))?;
        Ok(Value::String(format!("{device}:{place}")))
    };
    let consoles = consoles.map(text).collect::<Result<Vec<_>, ConfigError>>()?;
    table.insert("console".into(), Value::Array(consoles));
    // Its default is what the consoles make of it.
    if let Guest::Kernel(kernel) = &machine.guest {
        table.insert("cmdline".into(), Value::String(kernel.cmdline.clone()));
    }
    for (key, list) in devices {
        let tables = list.iter().map(|items| {
            let entry =
                |(key, text): &Item| (key.clone(), text.as_deref().map_or(Value::Boolean(true), value));
            Value::Table(items.iter().map(entry).collect())
        });
        let mut tables: Vec<Value> = tables.collect();
        let arg = run.get_arguments().find(|arg| arg.get_long() == Some(key));
        let is_list = arg.is_some_and(|arg| matches!(arg.get_action(), ArgAction::Append));
        match tables.len() {
            0 => {}
            _ if is_list => drop(table.insert((*key).into(), Value::Array(tables))),
            _ => drop(table.insert((*key).into(), tables.remove(0))),
        }
    }
    Ok(table.to_string())
}

/// The items of devices.
pub fn items_of<'a, K: Keyed + 'a>(devices: impl IntoIterator<Item = &'a K>) -> Vec<Vec<Item>> {
    devices.into_iter().map(Keyed::to_items).collect()
}

#[cfg(test)]
mod tests;
