//! Files that say the same as flags, mistakes in them, and what is printed.

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
        [[share]]
        tag = "home"
        path = "/a,b"
        [[port]]
        name = "agent"
        uds = "a,b"
        [[port]]
        file = "log"
        name = "log"
    "#;
    let mut flags = words(
        "--kernel k --cpus 2 --memory 1G --timeout 2.5 --rng --transport pci --on-reset reset --placement rtc=pool \
         --placement blk0=thread --vsock cid=3,uds=/run/v --disk path=a,,b,ro --disk path=c,format=qcow2,rate=10M --net \
         user,tcp=2222:22,,80 --balloon --share tag=home,path=/a,,b --port name=agent,uds=a,,b --port \
         name=log,file=log",
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
        ("port = 'name=a'", "port: it is a list: write [[port]]"),
        (
            "[[port]]\nname = 'a'\nfile = 'x'\nuds = 'y'",
            "port[0].file: a port leads to one place",
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
        ("[[share]]\npath = 'a'", "share[0].tag: a shared folder needs"),
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
            "--port=name=x,uds=a,,b",
            "--port=name=7,file=2.0",
        ],
        0..=19,
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
    let share = prop::sample::select(vec![None, Some("--share=tag=a b,path=/c,,d,cache=none")]);
    let share = share.prop_map(|share| share.map(str::to_owned));
    (guest, scalars, disk, other, net, balloon, share).prop_map(
        |(guest, scalars, disk, other, net, balloon, share)| {
            let texts = guest.into_iter().chain(scalars).map(str::to_owned);
            texts
                .chain(disk)
                .chain(other)
                .chain(net)
                .chain(balloon)
                .chain(share)
                .collect()
        },
    )
}

fn printed(run: &super::super::Run, matches: &ArgMatches) -> String {
    written(&Cli::command(), matches, &resolved(run), &run.devices()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]
    /// A machine that is printed and read again is the same machine, and is printed the same.
    #[test]
    fn what_is_printed_is_read_again(flags in machine()) {
        let parsed = run(&flags);
        // They do not all go together, but most do.
        prop_assume!(parsed.is_ok());
        let (first, matches) = parsed.unwrap();
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
