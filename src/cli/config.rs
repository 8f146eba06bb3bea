//! `--config FILE`: a machine in a TOML file, and `--dry-run`, which writes one.
//!
//! A file says what flags say, under the same names: what it has is turned into flags and parsed with those of the command
//! line, by the same code, into the same types. What is a list there (disks, networks, placements) is added to; what is
//! there once may be in one of the two, since nobody could tell which of them was meant. Every key is tried alone first, so
//! that a mistake is told with its place in the file.

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
const KEYED: [&str; 4] = ["disk", "net", "vsock", "balloon"];
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
        .position(|word| word == "run")
        .map_or(1, |n| n + 1);
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
mod tests {
    use super::super::{Cli, Command as Verb, Mistyped, parse};
    use super::*;
    use clap::CommandFactory;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A file that is gone with the value.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(text: &str) -> Scratch {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("actor-vmm-config-{}-{number}.toml", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::write(&path, text).unwrap();
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn run(words: &[String]) -> Result<(super::super::Run, ArgMatches), Mistyped> {
        let words = ["actor-vmm", "run"]
            .into_iter()
            .chain(words.iter().map(String::as_str));
        let (cli, matches) = parse(words.map(OsString::from).collect())?;
        match cli.command {
            Verb::Run(run) => Ok((*run, matches)),
            other => panic!("{other:?}"),
        }
    }

    fn resolved(run: &super::super::Run) -> MachineConfig {
        run.resolve(run.check().unwrap())
    }

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn with_file(file: &Scratch, others: &str) -> Vec<String> {
        let mut all = words(others);
        all.push(format!("--config={}", file.0.display()));
        all
    }

    /// What a file says, with other words.
    fn said(text: &str, others: &str) -> String {
        let file = Scratch::new(text);
        match run(&with_file(&file, others)) {
            Ok((run, _)) => format!("{:?}", resolved(&run)),
            Err(Mistyped::Line(error)) => error.to_string(),
            Err(Mistyped::File(error)) => {
                let text = error.to_string();
                let named = format!("--config {}: ", file.0.display());
                text.strip_prefix(&named).expect("it names the file").to_owned()
            }
        }
    }

    #[test]
    fn a_file_says_the_same_as_flags() {
        let file = r#"
            kernel = "k"
            cmdline = "root=/dev/vda quiet"
            cpus = 2
            memory = "1G"
            timeout = 2.5
            rng = true
            transport = "pci"
            on-reset = "reset"
            placement = ["rtc=pool", "blk0=thread"]
            vsock = { cid = 3, uds = "/run/v" }
            [[disk]]
            path = "a,b"
            ro = true
            [[disk]]
            path = "c"
            format = "qcow2"
            ro = false
            rate = "10M"
            [[net]]
            user = true
            tcp = "2222:22,80"
            [balloon]
        "#;
        let mut flags = words(
            "--kernel k --cpus 2 --memory 1G --timeout 2.5 --rng --transport pci --on-reset reset --placement rtc=pool \
             --placement blk0=thread --vsock cid=3,uds=/run/v --disk path=a,,b,ro --disk path=c,format=qcow2,rate=10M --net \
             user,tcp=2222:22,,80 --balloon",
        );
        flags.extend(["--cmdline".into(), "root=/dev/vda quiet".into()]);
        let (run, _) = run(&flags).unwrap();
        assert_eq!(said(file, ""), format!("{:?}", resolved(&run)));
    }

    #[test]
    fn lists_are_added_to_and_all_else_is_in_one_place() {
        let lists = said(
            "kernel = 'k'\n[[disk]]\npath = 'of the file'",
            "--disk path=of-the-line",
        );
        let (file, line) = (lists.find("of the file"), lists.find("of-the-line"));
        assert!(file.is_some() && file < line, "{lists}");
        for (file, line) in [
            ("cpus = 2", "--kernel k --cpus 2"),
            ("kernel = 'k'", "--kernel k"),
            ("rng = false", "--kernel k --rng"),
            ("[balloon]", "--kernel k --balloon"),
        ] {
            let text = said(file, line);
            assert!(
                text.contains("in the file and on the command line") && text.contains("leave one"),
                "{text}"
            );
        }
        // What is only a default is overridden by the file.
        assert!(said("cpus = 3", "--kernel k").contains("cpus: 3"));
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        for (file, expected) in [
            ("cpu = 2", "there is no key 'cpu'; did you mean 'cpus'?"),
            ("dry-run = true", "there is no key 'dry-run'"),
            ("config = 'x'", "there is no key 'config'"),
            ("qqq = 1", "there is no key 'qqq'; they are named like the flags"),
            ("cpus = 'x'", "cpus: invalid digit"),
            ("cpus = true", "cpus: it is a text or a number"),
            ("cpus = [1]", "cpus: it is a text or a number"),
            ("cpus = 2020-01-01", "cpus: it is a text or a number"),
            ("memory = 'lots'", "memory: `lots` is not a memory size"),
            ("boot = 'bios'", "boot: there are auto, linux, pvh"),
            ("rng = 1", "rng: it is true or false"),
            ("placement = 'rtc=moon'", "placement: "),
            ("placement = ['rtc=moon']", "placement[0]: "),
            ("disk = 'path=a'", "disk: it is a list: write [[disk]]"),
            ("[disk]\npath = 'a'", "disk: it is a list: write [[disk]]"),
            ("disk = ['path=a']", "disk[0]: it is a table"),
            (
                "[[disk]]\npath = 'a'\n[[disk]]\npath = 'b'\nqueues = 99",
                "disk[1].queues: queues=99: a disk has 1 to 16",
            ),
            (
                "[[disk]]\npath = 'a'\nqueue = 1",
                "disk[0].queue: a disk has no key 'queue'",
            ),
            ("[[disk]]\nro = true", "disk[0].path: a disk needs path=FILE"),
            (
                "[[disk]]\npath = 'a'\nqueues = true",
                "disk[0].queues: 'queues' needs a value",
            ),
            (
                "[[disk]]\npath = 'a'\nqueues = [1]",
                "disk[0].queues: it is a text, a number",
            ),
            (
                "[[disk]]\npath = 'a'\nro = 'yes'",
                "disk[0].ro: 'ro' takes no value",
            ),
            (
                "[[net]]\ntap = 'a'\nuser = true",
                "net[0].tap: 'tap' and 'user' exclude",
            ),
            ("vsock = true", "vsock: it is a table, as [vsock]"),
            ("[vsock]\ncid = 1\nuds = 'u'", "vsock.cid: cid=1: "),
            ("[balloon]\nsize = 1000", "balloon.size: size=1000: "),
            ("a = 1\nb = = 2", "line 2: "),
            ("cpus = 1\ncpus = 2", "line 2: "),
        ] {
            let text = said(file, "--kernel k");
            assert!(text.starts_with(expected), "{file}: {text}");
        }
        // What contradicts another key is told as on the command line.
        assert!(said("initrd = 'i'\ndemo = true", "").contains("--initrd"));
        assert!(said("cpus = 1", "").contains("--kernel"));
        let missing = run(&words("--kernel k --config /no/such"))
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert_eq!(missing, "--config /no/such: it cannot be read");
        let large = Scratch::new(&"#".repeat(MOST_BYTES as usize + 1));
        let error = run(&with_file(&large, "")).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("more than 1048576 bytes"), "{error}");
    }

    /// A flag of the command line whose value is keys has to be a table in a file.
    #[test]
    fn what_has_keys_is_known_to_have_them() {
        let mut whole = Cli::command();
        whole.build();
        let run = whole.find_subcommand("run").unwrap();
        for (key, arg) in keys_of(run) {
            let name = arg.get_value_names().and_then(|names| names.first());
            let has_keys = name.is_some_and(|name| name.contains('=')) && key != "placement";
            assert_eq!(has_keys, KEYED.contains(&key), "{key}");
        }
    }

    fn device(name: &'static str, known: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
        let words = prop::sample::subsequence(&known[1..], 0..known.len());
        prop::option::of(words).prop_map(move |words| {
            let words = words.map(|words| [&known[..1], &words].concat().join(","));
            words.map_or_else(Vec::new, |words| vec![format!("--{name}={words}")])
        })
    }

    /// Flags that go together.
    fn machine() -> impl Strategy<Value = Vec<String>> {
        let scalars = prop::sample::subsequence(
            vec![
                "--cpus=3",
                "--memory=1.5G",
                "--memory-backing=memfd",
                "--console=file:/x",
                "--debug-console=off",
                "--rng",
                "--transport=pci",
                "--notify=message",
                "--log-level=debug",
                "--gdb=007,wait",
                "--on-reset=reset",
                "--control=12",
                "--timeout=2.50",
                "--placement=rtc=pool",
                "--placement=rng0=thread",
                "--dispatch=actor",
                "--vsock=uds=a,,b,cid=5",
            ],
            0..=17,
        );
        let guest = prop_oneof![
            Just(vec!["--demo"]),
            Just(vec!["--kernel=k"]),
            Just(vec![
                "--kernel=true",
                "--initrd=2.0",
                "--cmdline=a \"b\" ,c=d \\",
                "--boot=pvh"
            ]),
        ];
        let disk = device(
            "disk",
            &[
                "path=/a,,b",
                "format=raw",
                "ro",
                "queues=4",
                "serial=1.50",
                "rate=10M",
                "iops=9",
            ],
        );
        let other = device("disk", &["path=c d", "format=qcow2", "rate=1"]);
        let net = device(
            "net",
            &[
                "user",
                "mac=02:00:00:00:00:01",
                "mtu=1400",
                "tcp=22,,80",
                "udp=5",
                "iops=7",
            ],
        );
        let balloon = device("balloon", &["size=64M", "stats=3"]);
        (guest, scalars, disk, other, net, balloon).prop_map(|(guest, scalars, disk, other, net, balloon)| {
            let texts = guest.into_iter().chain(scalars).map(str::to_owned);
            texts.chain(disk).chain(other).chain(net).chain(balloon).collect()
        })
    }

    fn printed(run: &super::super::Run, matches: &ArgMatches) -> String {
        written(&Cli::command(), matches, &resolved(run), &run.devices()).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]
        /// A machine that is printed and read again is the same machine, and is printed the same.
        #[test]
        fn what_is_printed_is_read_again(flags in machine()) {
            let Ok((first, matches)) = run(&flags) else {
                // They do not all go together.
                return Ok(());
            };
            let text = printed(&first, &matches);
            let file = Scratch::new(&text);
            let again = run(&with_file(&file, ""));
            prop_assert!(again.is_ok(), "{}\n{:?}", text, again.err());
            let (second, matches) = again.unwrap();
            // Of the time as text nothing is known any more.
            prop_assert_eq!(format!("{:?}", resolved(&first)), format!("{:?}", resolved(&second)), "{}", text);
            prop_assert_eq!(text, printed(&second, &matches));
        }

        #[test]
        fn no_file_is_too_strange(text in "[a-z=\\[\\]{}'\",.0-9\n -]{0,120}") {
            let _ = said(&text, "--kernel k");
        }
    }
}
