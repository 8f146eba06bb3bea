//! The built program as a user calls it: what can be wrong with the input and the host, where the console goes, how it
//! ends, and what it leaves behind.

#[path = "cli/config.rs"]
mod config;
#[path = "cli/guest.rs"]
mod guest;
#[path = "cli/process.rs"]
mod process;
#[path = "cli/terminal.rs"]
mod terminal;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use process::{
    Ended, LIMIT, PROGRAM, PROMPT, Place, collect, eventually, finish, have_kvm, signal, skipped, stop, wait,
};
use std::io::{BufRead, BufReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const BAD_INPUT: i32 = 2;
const HOST_TROUBLE: i32 = 18;
/// Of guests that end by themselves: 2 * 5 + 1.
const GUEST_EXIT: i32 = 11;

/// One line of ours that has all of `needles`, nothing else, and this status.
#[track_caller]
fn assert_refused(ended: &Ended, status: i32, needles: &[&str]) {
    ended.assert_no_panic();
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{}", ended.stderr);
    assert!(lines[0].starts_with("actor-vmm: "), "{}", ended.stderr);
    for needle in needles {
        assert!(
            ended.stderr.contains(needle),
            "no '{needle}' in: {}",
            ended.stderr
        );
    }
    assert_eq!(ended.status, status, "{}", ended.stderr);
    assert!(ended.stdout.is_empty());
}

/// A usage error: the argument parser's few lines, with all of `needles`.
#[track_caller]
fn assert_usage(ended: &Ended, needles: &[&str]) {
    ended.assert_no_panic();
    assert!(ended.stderr.starts_with("error: "), "{}", ended.stderr);
    assert!(ended.stderr.lines().count() <= 8, "{}", ended.stderr);
    for needle in needles {
        assert!(
            ended.stderr.contains(needle),
            "no '{needle}' in: {}",
            ended.stderr
        );
    }
    assert_eq!(ended.status, BAD_INPUT);
    assert!(ended.stdout.is_empty());
}

// Input files.

#[test]
fn files_that_are_no_kernels_are_refused_by_name() {
    let place = Place::new();
    place
        .file("empty", b"")
        .file("script", b"#!/bin/sh\nexit 0\n")
        .file("packed.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03abcdefgh")
        .file("cut-bzimage", &guest::cut_bzimage())
        .file("cut-elf", &guest::kernel(guest::exit())[..0x1003])
        .file("cut-header", &guest::kernel(guest::exit())[..100])
        .file("zeros", &[0; 4096]);
    std::fs::create_dir(place.path().join("directory")).unwrap();
    let before = place.content();
    for (file, said) in [
        ("missing", &["no such file"][..]),
        ("empty/sub", &["no such file"]),
        ("directory", &["it is a directory"]),
        ("empty", &["it is an empty file"]),
        ("script", &["a script", "bzImage"]),
        ("packed.gz", &["gzip", "bzImage"]),
        ("cut-bzimage", &["cut short", "get it again"]),
        ("cut-elf", &["cut short", "get it again"]),
        ("cut-header", &["cut short", "get it again"]),
        ("zeros", &["a file of zeros"]),
        ("/dev/null", &["not a regular file"]),
    ] {
        // The console's file must not be made, or emptied, for a machine that never starts.
        let ended = place.run(&format!("run --kernel {file} --console file:console"));
        assert_refused(&ended, BAD_INPUT, &[said, &["cannot boot kernel", file]].concat());
    }
    assert_eq!(place.content(), before);
}

#[test]
fn a_real_kernel_that_is_cut_short_is_refused() {
    let Some(path) = std::env::var_os("ACTOR_VMM_TEST_KERNEL") else {
        return skipped("set ACTOR_VMM_TEST_KERNEL to the path of a bzImage");
    };
    let kernel = std::fs::read(path).unwrap();
    let place = Place::new();
    for length in [0x210, 0x1000, kernel.len() / 2, kernel.len() - 4096] {
        place.file("k", &kernel[..length]);
        for unpack in ["auto", "guest"] {
            let ended = place.run(&format!("run --kernel k --unpack {unpack}"));
            assert_refused(&ended, BAD_INPUT, &["cannot boot kernel k", "get it again"]);
        }
    }
}

#[test]
fn a_kernel_that_needs_more_memory_names_the_remedy() {
    let place = Place::new();
    place.file("k", &guest::kernel_wanting(guest::exit(), 1 << 30));
    let ended = place.run("run --kernel k --memory 64M");
    assert_refused(
        &ended,
        BAD_INPUT,
        &["asks for", "the machine has 64 MiB", "--memory 1025M or more"],
    );
}

#[test]
fn an_initrd_that_is_missing_or_too_large_is_refused() {
    let place = Place::with_kernel(guest::exit());
    std::fs::File::create(place.path().join("large"))
        .unwrap()
        .set_len(100 << 20)
        .unwrap();
    for (initrd, said) in [
        ("missing", &["no such file"][..]),
        (".", &["a directory"]),
        ("large", &["100 MiB do not fit", "--memory"]),
    ] {
        let ended = place.run(&format!("run --kernel k --memory 64M --initrd {initrd}"));
        assert_refused(
            &ended,
            BAD_INPUT,
            &[said, &["cannot load initrd", initrd]].concat(),
        );
    }
}

#[test]
fn a_command_line_that_no_kernel_takes_is_refused() {
    let place = Place::with_kernel(guest::exit());
    let long = "x".repeat(5000);
    for (cmdline, said) in [
        (long.as_str(), "it has 5000 bytes and this kernel takes 2047"),
        ("quiet\nloud", "control character (code 0x0a) at byte 5"),
        ("quiet\x1b[2J", "control character (code 0x1b)"),
    ] {
        let ended = finish(&mut place.command_of(PROGRAM, ["run", "--kernel", "k", "--cmdline", cmdline]));
        assert_refused(&ended, BAD_INPUT, &["--cmdline", said]);
    }
}

#[test]
fn bytes_that_are_no_text_are_refused_or_passed_on_but_never_a_panic() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let bytes = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    let ended = finish(place.command("run --kernel").arg(bytes));
    assert_refused(&ended, BAD_INPUT, &["cannot boot kernel", "no such file"]);
    let ended = finish(place.command("run --kernel k --cmdline").arg(bytes));
    assert_usage(&ended, &["invalid UTF-8"]);
}

// The command line.

#[test]
fn usage_mistakes_are_named() {
    let place = Place::with_kernel(guest::exit());
    for (words, said) in [
        (
            "run --kernel k --memory 0",
            &["--memory", "a machine needs memory"][..],
        ),
        ("run --kernel k --memory lots", &["--memory", "512M"]),
        ("run --kernel k --memory 1M", &["--memory", "the least is 16 MiB"]),
        (
            "run --kernel k --memory 99999T",
            &["--memory", "the most is 16 TiB"],
        ),
        (
            "run --kernel k --memory 99999999999999999999999",
            &["--memory", "the most is 16 TiB"],
        ),
        (
            "run --kernel k --memory 536870913",
            &["--memory", "multiple of 4096"],
        ),
        ("run --kernel k --cpus -1", &["-1"]),
        ("run --kernel k --cpus many", &["--cpus", "many"]),
        (
            "run --kernel k --placement serial0",
            &["--placement", "serial0=thread"],
        ),
        (
            "run --kernel k --placement serial0=moon",
            &["--placement", "handoff, thread and pool"],
        ),
        (
            "run --kernel k --console tcp:1",
            &["--console", "stdio, file:PATH, pty and off"],
        ),
        ("run --kernel k --console file:", &["--console", "needs a path"]),
        (
            "run --kernel k --log-level loud",
            &["--log-level", "critical, error, warning, info, debug"],
        ),
        (
            "run --kernel k --timeout soon",
            &["--timeout", "a number of seconds"],
        ),
        ("run --kernel k --boot bios", &["--boot", "linux"]),
        ("run --kernel k --fast", &["unexpected argument '--fast'"]),
        ("run --kernel k extra", &["unexpected argument 'extra'"]),
        ("run --kernel", &["--kernel"]),
        ("run", &["--kernel"]),
        ("run --initrd k", &["--kernel"]),
        ("run --demo --kernel k", &["cannot be used with"]),
        ("fly", &["unrecognized subcommand 'fly'"]),
        ("--fast", &["unexpected argument '--fast'"]),
    ] {
        assert_usage(&place.run(words), said);
    }
    assert_eq!(place.content().len(), 1);
}

#[test]
fn without_a_subcommand_the_help_goes_to_stderr_and_with_help_to_stdout() {
    let place = Place::new();
    let ended = place.run("");
    assert_eq!(ended.status, BAD_INPUT);
    assert!(
        ended.stdout.is_empty() && ended.stderr.contains("Usage: actor-vmm"),
        "{}",
        ended.stderr
    );
    for words in ["--help", "help", "run --help"] {
        let ended = place.run(words);
        let text = String::from_utf8(ended.stdout).unwrap();
        assert_eq!((ended.status, ended.stderr.as_str()), (0, ""), "{words}");
        assert!(text.contains("Usage: actor-vmm"), "{words}: {text}");
        assert!(
            text.contains("the guest powered itself off") || words == "help",
            "{words}: {text}"
        );
    }
    assert_eq!(
        place.run("--version").stdout,
        format!("actor-vmm {}\n", env!("CARGO_PKG_VERSION")).as_bytes()
    );
}

#[test]
fn numbers_of_cpus_that_cannot_be_are_refused() {
    let place = Place::with_kernel(guest::exit());
    for cpus in ["0", "100000", "1025"] {
        let ended = place.run(&format!("run --kernel k --cpus {cpus}"));
        assert_refused(&ended, BAD_INPUT, &["--cpus must be 1 to 1024", cpus]);
    }
}

#[test]
fn a_placement_of_no_device_lists_the_devices() {
    let ended = Place::with_kernel(guest::exit()).run("run --kernel k --placement serial9=thread");
    assert_refused(&ended, BAD_INPUT, &["'serial9'", "serial0", "rtc"]);
}

#[test]
fn disks_that_cannot_be_are_refused_before_anything_is_made() {
    let place = Place::with_kernel(guest::exit());
    std::fs::write(place.path().join("odd"), [0; 700]).unwrap();
    std::fs::write(place.path().join("disk"), [0; 1024]).unwrap();
    for (words, said) in [
        (
            "--disk path=nowhere",
            &["--disk path=nowhere", "cannot be opened for writing"][..],
        ),
        ("--disk path=odd", &["--disk path=odd", "not a multiple of 512"]),
        ("--disk path=.,ro", &["--disk path=.", "neither a regular file"]),
        (
            "--disk path=disk --disk path=disk,ro",
            &["--disk path=disk", "another program uses it"],
        ),
        ("--vsock cid=3,uds=disk", &["--vsock uds=disk", "no socket"]),
        (
            "--memory 64M --balloon size=64M",
            &["--balloon size=67108864", "less than the guest's memory"],
        ),
        (
            "--balloon --memory-backing hugepages",
            &["--balloon", "huge pages", "another --memory-backing"],
        ),
    ] {
        let ended = place.run(&format!("run --kernel k {words}"));
        assert_refused(&ended, BAD_INPUT, said);
    }
    for (words, said) in [
        ("ctl x status 1M", &["nothing comes behind 'status'"][..]),
        ("ctl x balloon lots", &["size=lots", "as 256M"]),
    ] {
        assert_refused(&place.run(words), BAD_INPUT, said);
    }
    for (words, said) in [
        ("--disk odd", &["--disk", "no key 'odd'"][..]),
        ("--disk path=disk,queues=99", &["--disk", "queues=99", "1 to 16"]),
        ("--vsock cid=2,uds=v", &["--vsock", "cid=2", "3 to 4294967294"]),
        (
            "--balloon size=1000",
            &["--balloon", "size=1000", "multiple of 4096"],
        ),
        ("--vsock uds=v", &["--vsock", "'cid' is missing"]),
        ("--notify pigeon", &["--notify", "eventfd and message"]),
    ] {
        assert_usage(&place.run(&format!("run --kernel k {words}")), said);
    }
}

#[test]
fn a_path_that_cannot_be_is_the_users_mistake_whatever_it_is_for() {
    let place = Place::with_kernel(guest::exit());
    place.file("file", b"precious");
    let before = place.content();
    let kvm = have_kvm();
    for (words, needs_kvm) in [
        ("--kernel {}", false),
        ("--kernel k --initrd {}", false),
        ("--kernel k --disk path={}", false),
        ("--kernel k --vsock cid=3,uds={}", false),
        ("--kernel k --gdb {}", false),
        ("--kernel k --control {}", true),
        ("--kernel k --console file:{}", true),
        ("--kernel k --debug-console file:{}", true),
    ] {
        // A directory that is not there, and one that is none.
        for path in ["nowhere/x", "file/x"] {
            if needs_kvm && !kvm {
                continue;
            }
            let ended = place.run(&format!("run {}", words.replace("{}", path)));
            assert_refused(&ended, BAD_INPUT, &[path]);
        }
    }
    assert_eq!(place.content(), before);
}

#[test]
fn more_memory_than_the_host_has_is_one_error_and_no_oom_kill() {
    // The most that the command line lets through; no machine that runs tests has it.
    let ended = Place::with_kernel(guest::exit()).run("run --kernel k --memory 16T");
    assert_refused(
        &ended,
        HOST_TROUBLE,
        &["--memory 16 TiB is more than the host has", "give less"],
    );
}

// The console's files.

#[test]
fn a_console_file_that_cannot_be_is_refused() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::exit());
    std::fs::create_dir(place.path().join("directory")).unwrap();
    nix::unistd::mkfifo(
        &place.path().join("fifo"),
        nix::sys::stat::Mode::from_bits_truncate(0o600),
    )
    .unwrap();
    for path in ["nowhere/console", "directory", "k/console", "fifo"] {
        let ended = place.run(&format!("run --kernel k --console file:{path}"));
        assert_refused(
            &ended,
            BAD_INPUT,
            &["the console file", path, "check the directory"],
        );
    }
}

#[test]
fn a_full_disk_loses_output_and_nothing_else() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::talk());
    let ended = place.run("run --kernel k --console file:/dev/full --log-level error");
    assert_eq!(
        (ended.status, ended.said().len()),
        (GUEST_EXIT, 0),
        "{}",
        ended.stderr
    );
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{}", ended.stderr);
    assert!(
        lines[0].contains("output to /dev/full is lost from here on: No space left"),
        "{}",
        lines[0]
    );
}

#[test]
fn a_limit_of_file_size_is_an_error_of_the_write() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::talk());
    let limited = |words: &str| {
        let script = format!("ulimit -f 1; exec \"$0\" run {words} --log-level error");
        finish(&mut place.command_of("sh", ["-c", &script, PROGRAM]))
    };
    let ended = limited("--kernel k --console file:console");
    assert_eq!(ended.status, GUEST_EXIT, "{}", ended.stderr);
    assert!(
        ended
            .stderr
            .contains("output to console is lost from here on: File too large")
            && ended.stderr.lines().count() == 1,
        "{}",
        ended.stderr
    );
    assert!(place.read("console").starts_with(b"up\naaaa"));
    let ended = limited("--kernel k --memory-backing memfd");
    assert_refused(&ended, HOST_TROUBLE, &["File too large", "ulimit -f"]);
}

#[test]
fn a_console_does_not_write_over_what_the_machine_is_made_of() {
    let place = Place::with_kernel(guest::exit());
    place.file("initrd", b"not one").file("disk", &[1; 4096]);
    std::fs::hard_link(place.path().join("k"), place.path().join("another name")).unwrap();
    let before = place.content();
    for (words, user, path) in [
        ("--console file:k", "--kernel", "k"),
        ("--debug-console file:./initrd", "--initrd", "./initrd"),
        ("--console file:disk --disk path=disk", "--disk", "disk"),
    ] {
        let ended = place.run(&format!("run --kernel k --initrd initrd {words}"));
        assert_refused(&ended, BAD_INPUT, &["would write over", user, path]);
    }
    let by_link = place.command_of(
        PROGRAM,
        ["run", "--kernel", "k", "--console", "file:another name"],
    );
    assert_refused(
        &finish(&mut { by_link }),
        BAD_INPUT,
        &["would write over another name"],
    );
    let ended = place.run("run --kernel k --console file:new --debug-console file:./new");
    assert_refused(&ended, BAD_INPUT, &["both go to new"]);
    assert_eq!(place.content(), before, "something was written");
}

#[test]
fn a_full_file_system_keeps_what_fitted() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::talk());
    let script = "mkdir small && mount -t tmpfs -o size=16k none small || exit 77; \"$0\" run --kernel k \
                  --console file:small/console --log-level error; echo $? $(wc -c <small/console)";
    let ended = finish(&mut place.command_of("unshare", ["-m", "sh", "-c", script, PROGRAM]));
    if ended.status != 0 {
        return skipped(&format!("no mount namespace: {}", ended.stderr));
    }
    assert_eq!(
        String::from_utf8_lossy(&ended.stdout),
        format!("{GUEST_EXIT} 16384\n")
    );
    assert!(
        ended
            .stderr
            .contains("output to small/console is lost from here on: No space left")
    );
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
}

#[test]
fn a_console_file_has_what_the_guest_said_and_stdout_nothing() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::talk());
    let ended = place.run("run --kernel k --console file:console");
    assert_eq!(
        (ended.status, ended.stdout.len()),
        (GUEST_EXIT, 0),
        "{}",
        ended.stderr
    );
    let console = place.read("console");
    assert_eq!(console.len(), 3 + guest::TALK_BYTES);
    assert!(console.starts_with(b"up\naaaa"));
    assert_eq!(place.content().len(), 2);
}

#[test]
fn a_console_that_is_off_drops_what_the_guest_says() {
    if !have_kvm() {
        return;
    }
    let ended = Place::with_kernel(guest::talk()).run("run --kernel k --console off");
    assert_eq!(
        (ended.status, ended.stdout.len()),
        (GUEST_EXIT, 0),
        "{}",
        ended.stderr
    );
}

// The host.

#[test]
fn kvm_that_is_missing_or_not_kvm_or_not_ours_names_the_remedy() {
    let place = Place::with_kernel(guest::exit());
    let in_namespace = |prepare: &str, words: &str| {
        let script = format!("{prepare} || exit 77; exec \"$0\" {words}");
        finish(&mut place.command_of("unshare", ["-m", "sh", "-c", &script, PROGRAM]))
    };
    if in_namespace("true", "--version").status != 0 {
        skipped("no mount namespaces for this user: /dev/kvm cannot be hidden");
    } else {
        let missing = "mount -t tmpfs none /dev";
        let ended = in_namespace(missing, "run --kernel k --console off");
        assert_refused(
            &ended,
            HOST_TROUBLE,
            &["/dev/kvm cannot be opened", "it is not there", "kvm-intel"],
        );
        let ended = in_namespace(missing, "doctor");
        let text = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert_eq!(
            (ended.status, ended.stderr.as_str()),
            (HOST_TROUBLE, ""),
            "{text}"
        );
        assert!(text.contains("it is not there"), "{text}");
        if std::path::Path::new("/dev/kvm").exists() {
            let other = "mount --bind /dev/null /dev/kvm";
            let ended = in_namespace(other, "run --kernel k");
            assert_refused(&ended, HOST_TROUBLE, &["/dev/kvm is not KVM"]);
            let ended = in_namespace(other, "doctor");
            let text = String::from_utf8_lossy(&ended.stdout).into_owned();
            assert!(
                ended.status == HOST_TROUBLE && text.contains("/dev/kvm is not KVM"),
                "{text}"
            );
        }
    }
    // SAFETY: takes nothing, always succeeds.
    let root = unsafe { libc::geteuid() } == 0;
    if !root || !std::path::Path::new("/dev/kvm").exists() {
        return skipped("/dev/kvm cannot be taken away without root");
    }
    // A copy that a user without rights can reach.
    let copy = place.path().join("actor-vmm");
    std::fs::copy(PROGRAM, &copy).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(place.path(), mode).unwrap();
    let ended = finish(
        place
            .command_of(copy, ["run", "--kernel", "k"])
            .uid(65534)
            .gid(65534),
    );
    if !ended.stderr.contains("the guest starts") {
        assert_refused(
            &ended,
            HOST_TROUBLE,
            &["/dev/kvm cannot be opened", "no permission", "group"],
        );
    }
}

#[test]
fn every_limit_of_open_files_gives_one_error_or_a_machine() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::exit());
    let mut started = false;
    for files in 4..64 {
        let script = format!("ulimit -n {files}; exec \"$0\" run --kernel k --cpus 4 --log-level error");
        let ended = finish(&mut place.command_of("sh", ["-c", &script, PROGRAM]));
        if ended.stderr.contains("error while loading shared libraries") {
            continue;
        }
        if ended.status == GUEST_EXIT {
            assert_eq!(
                (ended.stdout.as_slice(), ended.stderr.as_str()),
                (&b"up\n"[..], "")
            );
            started = true;
        } else {
            assert!(
                !started,
                "{files} are too few, and fewer were enough: {}",
                ended.stderr
            );
            assert_refused_or_first(&ended);
        }
    }
    assert!(started);
}

#[track_caller]
fn assert_refused_or_first(ended: &Ended) {
    // The kernel's file is the first that is opened: it is the user's input that cannot be read then.
    let status = if ended.stderr.contains("cannot boot kernel") {
        BAD_INPUT
    } else {
        HOST_TROUBLE
    };
    let needles: &[&str] = if status == BAD_INPUT {
        &["Too many open files"]
    } else {
        &["ulimit -n"]
    };
    assert_refused(ended, status, needles);
}

#[test]
fn a_limit_of_address_space_gives_one_error() {
    let place = Place::with_kernel(guest::exit());
    let script = "ulimit -v 600000; exec \"$0\" run --kernel k --memory 1G";
    let ended = finish(&mut place.command_of("sh", ["-c", script, PROGRAM]));
    assert_refused(&ended, HOST_TROUBLE, &["address space", "ulimit -v"]);
}

// The three standard descriptors.

#[test]
fn closed_standard_descriptors_do_no_harm() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::exit());
    for closed in ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"] {
        let script = format!("exec \"$0\" run --kernel k --log-level error {closed}");
        let ended = finish(&mut place.command_of("sh", ["-c", &script, PROGRAM]));
        assert_eq!(
            (ended.status, ended.stderr.as_str()),
            (GUEST_EXIT, ""),
            "{closed}"
        );
        let stdout_closed = closed.split_whitespace().any(|word| word == ">&-");
        let expected = if stdout_closed { 0 } else { 3 };
        assert_eq!(ended.stdout.len(), expected, "{closed}");
        let script = format!("exec \"$0\" run --kernel missing {closed}");
        let ended = finish(&mut place.command_of("sh", ["-c", &script, PROGRAM]));
        assert_eq!(ended.status, BAD_INPUT, "{closed}");
    }
    assert_eq!(place.content().len(), 1);
}

#[test]
fn a_reader_that_leaves_loses_output_and_nothing_else() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::talk());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = place.command("run --kernel k --log-level error");
    let mut child = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let stderr = collect(child.stderr.take().unwrap());
    drop(command);
    assert_eq!(wait(&mut child, LIMIT), GUEST_EXIT);
    let text = String::from_utf8(stderr.join().unwrap()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        text.contains("output to stdout is lost from here on: Broken pipe"),
        "{text}"
    );
}

/// What prints something and ends, and with which status.
const PRINTS: [(&str, &[i32]); 6] = [
    ("--help", &[0]),
    ("--version", &[0]),
    ("run --help", &[0]),
    ("ctl --help", &[0]),
    ("bench --list", &[0]),
    ("doctor", &[0, HOST_TROUBLE]),
];

#[test]
fn everything_that_prints_and_cannot_says_so() {
    let place = Place::new();
    for (words, _) in PRINTS {
        let mut command = place.command(words);
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut child = command.stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = collect(child.stderr.take().unwrap());
        let status = wait(&mut child, LIMIT);
        let text = String::from_utf8(stderr.join().unwrap()).unwrap();
        assert!(
            text.starts_with("actor-vmm: cannot write to stdout: No space left on device"),
            "{words}: {text}"
        );
        assert_eq!(
            (status, text.lines().count()),
            (HOST_TROUBLE, 1),
            "{words}: {text}"
        );
    }
}

#[test]
fn everything_that_prints_stands_a_reader_that_leaves() {
    let place = Place::new();
    for (words, statuses) in PRINTS {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = place.command(words);
        let mut child = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = collect(child.stderr.take().unwrap());
        let status = wait(&mut child, LIMIT);
        let text = String::from_utf8(stderr.join().unwrap()).unwrap();
        assert!(statuses.contains(&status), "{words}: {status}: {text}");
        assert_eq!(text, "", "{words}");
    }
}

#[test]
fn a_pipe_nobody_reads_holds_up_neither_the_guest_nor_the_end() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::flood());
    // stderr into the same pipe: the log must not hold up anything either.
    for both in [false, true] {
        place.file("alive", b"");
        let (reader, writer) = std::io::pipe().unwrap();
        let mut command = place.command("run --kernel k --debug-console file:alive --log-level debug");
        command.stderr(if both {
            Stdio::from(writer.try_clone().unwrap())
        } else {
            Stdio::null()
        });
        let mut child = command.stdout(writer).spawn().unwrap();
        // The pipe (64 KiB), the ring and the FIFO are full before so many rounds of 64 bytes are done.
        eventually("the guest goes on", || place.read("alive").len() > 1500);
        let begin = Instant::now();
        signal(&child, Signal::SIGTERM);
        assert_eq!(wait(&mut child, PROMPT), 143);
        assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
        drop(reader);
    }
}

/// Whether a pipe has no room.
fn is_full(writer: &PipeWriter) -> bool {
    let mut ends = [PollFd::new(writer.as_fd(), PollFlags::POLLOUT)];
    poll(&mut ends, PollTimeout::ZERO).unwrap() == 0
}

#[test]
fn a_guest_that_is_done_waits_for_a_slow_reader_unless_somebody_ends_it() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::talk_long());
    let spawn = || {
        let (reader, writer) = std::io::pipe().unwrap();
        let child = place
            .command("run --kernel k")
            .stdout(writer.try_clone().unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the pipe is full", || is_full(&writer));
        (reader, child)
    };
    // The guest has more to say than the pipe and the ring hold, and waits; then all of it arrives.
    let (mut reader, mut child) = spawn();
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(
        (wait(&mut child, LIMIT), all.len()),
        (GUEST_EXIT, 3 + guest::TALK_LONG_BYTES)
    );

    let (reader, mut child) = spawn();
    signal(&child, Signal::SIGTERM);
    let status = wait(&mut child, PROMPT);
    assert!([GUEST_EXIT, 143].contains(&status), "{status}");
    drop(reader);
}

#[test]
fn what_a_guest_sends_to_a_full_transmitter_is_counted_and_told_at_the_end() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::babble());
    let (mut reader, writer) = std::io::pipe().unwrap();
    // The least that a pipe can hold, so that pipe, ring and FIFO together are less than what the guest says.
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let mut child = place
        .command("run --kernel k --debug-console file:done")
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = collect(child.stderr.take().unwrap());
    eventually("the guest has said it all", || !place.read("done").is_empty());
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(wait(&mut child, LIMIT), GUEST_EXIT);
    let stderr = String::from_utf8(stderr.join().unwrap()).unwrap();
    let told = stderr.lines().find_map(|line| {
        let (before, _) = line.split_once(" bytes of the guest's output to stdout are lost")?;
        before.rsplit(' ').next()?.parse::<usize>().ok()
    });
    let lost = told.unwrap_or_else(|| panic!("no loss is told: {stderr}"));
    assert!(lost > 0);
    assert_eq!(all.len() + lost, 3 + guest::BABBLE_BYTES, "{stderr}");
}

// Input.

/// Bytes that the echo guest passes on: printable, without a period that a lost piece could hide in.
fn text(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        b'!' + (state % 90) as u8
    };
    (0..length).map(|_| byte()).collect()
}

#[test]
fn a_megabyte_of_piped_input_arrives_complete_and_unaltered() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::echo());
    let mut child = place
        .command("run --kernel k --log-level error")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (stdout, stderr) = (
        collect(child.stdout.take().unwrap()),
        collect(child.stderr.take().unwrap()),
    );
    let sent = text(1 << 20);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&sent).unwrap();
    stdin.write_all(&[4]).unwrap();
    drop(stdin);
    assert_eq!(wait(&mut child, 4 * LIMIT), 15);
    let received = stdout.join().unwrap();
    assert_eq!(&received[..3], b"up\n");
    let received = &received[3..];
    let differs = sent.iter().zip(received).position(|(a, b)| a != b);
    assert!(
        received == sent,
        "{} of {} bytes; differs at {differs:?}",
        received.len(),
        sent.len()
    );
    assert_eq!(String::from_utf8(stderr.join().unwrap()).unwrap(), "");
}

#[test]
fn escapes_in_piped_input_are_the_guests() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::echo());
    let mut child = place
        .command("run --kernel k")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let stdout = collect(child.stdout.take().unwrap());
    child.stdin.take().unwrap().write_all(b"a\x01xb\x03\x04").unwrap();
    assert_eq!(wait(&mut child, LIMIT), 15);
    assert_eq!(stdout.join().unwrap(), b"up\na\x01xb\x03");
}

#[test]
fn a_program_that_is_stopped_goes_on_where_it_was() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::echo());
    let mut child = place
        .command("run --kernel k --log-level error")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = collect(child.stderr.take().unwrap());
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut hear = |expected: &[u8]| {
        let mut heard = vec![0; expected.len()];
        stdout.read_exact(&mut heard).unwrap();
        assert_eq!(heard, expected);
    };
    hear(b"up\n");
    for round in 0..20 {
        let (before, meanwhile) = (format!("<{round} before>"), format!("<{round} meanwhile>"));
        // Some of it is under way when it is stopped.
        stdin.write_all(before.as_bytes()).unwrap();
        stop(Pid::from_raw(child.id() as i32));
        stdin.write_all(meanwhile.as_bytes()).unwrap();
        signal(&child, Signal::SIGCONT);
        hear(before.as_bytes());
        hear(meanwhile.as_bytes());
    }
    stdin.write_all(&[4]).unwrap();
    assert_eq!(wait(&mut child, LIMIT), 15);
    assert_eq!(stderr.join().unwrap(), b"");
}

// Ends.

#[test]
fn signals_end_a_guest_that_spins_sleeps_or_loops_on_a_port() {
    if !have_kvm() {
        return;
    }
    for code in [guest::spin(), guest::halt(), guest::port_loop()] {
        let place = Place::with_kernel(code);
        for (end, status) in [
            (Signal::SIGINT, 130),
            (Signal::SIGTERM, 143),
            (Signal::SIGHUP, 129),
            (Signal::SIGQUIT, 131),
        ] {
            let mut child = place
                .command("run --kernel k --cpus 2")
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            BufReader::new(child.stdout.take().unwrap())
                .read_line(&mut line)
                .unwrap();
            let stderr = collect(child.stderr.take().unwrap());
            assert_eq!(line, "up\n");
            let begin = Instant::now();
            signal(&child, end);
            let got = wait(&mut child, LIMIT);
            let (took, text) = (
                begin.elapsed(),
                String::from_utf8(stderr.join().unwrap()).unwrap(),
            );
            assert_eq!(got, status, "{end}: {text}");
            assert!(took < PROMPT, "{end}: {took:?}");
            assert!(
                text.contains(&format!("ended by {end}")) && !text.contains("left behind"),
                "{text}"
            );
        }
    }
}

#[test]
fn a_signal_at_any_moment_of_the_start_ends_it() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::spin());
    for delay_us in (0..40_000).step_by(1500) {
        let mut child = place
            .command("run --kernel k --cpus 4")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(delay_us));
        signal(&child, Signal::SIGTERM);
        let status = wait(&mut child, LIMIT);
        // Before the program has taken the signal over, it kills it.
        assert!([143, 1015].contains(&status), "after {delay_us} µs: {status}");
    }
}

#[test]
fn a_timeout_is_told_with_its_status() {
    if !have_kvm() {
        return;
    }
    let ended = Place::with_kernel(guest::spin()).run("run --kernel k --timeout 0.3");
    assert_eq!(
        (ended.status, ended.stdout.as_slice()),
        (16, &b"up\n"[..]),
        "{}",
        ended.stderr
    );
    assert!(
        ended
            .stderr
            .contains("--timeout was over; the machine was running"),
        "{}",
        ended.stderr
    );
    assert!(ended.took < PROMPT, "{:?}", ended.took);
}

#[test]
fn an_internal_error_tells_registers_code_and_what_to_do() {
    if !have_kvm() {
        return;
    }
    let ended = Place::with_kernel(guest::broken()).run("run --kernel k --log-level critical");
    assert_eq!(
        (ended.status, ended.stdout.as_slice()),
        (14, &b"up\n"[..]),
        "{}",
        ended.stderr
    );
    for needle in ["vcpu0 cannot go on", "what to do: ", "d0000000"] {
        assert!(
            ended.stderr.contains(needle),
            "no '{needle}' in: {}",
            ended.stderr
        );
    }
}

#[test]
fn a_triple_fault_has_its_status() {
    if !have_kvm() {
        return;
    }
    let ended = Place::with_kernel(guest::triple_fault()).run("run --kernel k");
    assert_eq!(
        (ended.status, ended.stdout.as_slice()),
        (12, &b"up\n"[..]),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains("triple fault"), "{}", ended.stderr);
}

#[test]
fn the_guest_alone_is_on_stdout_and_the_log_level_is_obeyed() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::exit());
    let mut lines = 0;
    for level in ["critical", "error", "warning", "info", "debug"] {
        let ended = place.run(&format!("run --kernel k --log-level {level}"));
        assert_eq!(
            (ended.status, ended.stdout.as_slice()),
            (GUEST_EXIT, &b"up\n"[..])
        );
        assert!(ended.said().is_empty(), "{}", ended.stderr);
        let now = ended.stderr.lines().count();
        assert!(
            now >= lines && (now == 0) == ["critical", "error", "warning"].contains(&level),
            "{}",
            ended.stderr
        );
        lines = now;
    }
}

#[test]
fn every_placement_gives_the_same_console() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::talk());
    for placement in ["handoff", "thread", "pool"] {
        let words =
            format!("run --kernel k --placement serial0={placement} --placement debug_exit={placement}");
        let ended = place.run(&words);
        assert_eq!(
            (ended.status, ended.stdout.len()),
            (GUEST_EXIT, 3 + guest::TALK_BYTES),
            "{}",
            ended.stderr
        );
    }
}

#[test]
fn the_demo_ends_by_itself() {
    if !have_kvm() {
        return;
    }
    let ended = Place::new().run("run --demo");
    ended.assert_no_panic();
    // Power-off, or a status that the guest gave.
    assert!(
        ended.status == 0 || ended.status % 2 == 1 && ended.status < 128,
        "{ended:?}"
    );
}

// The pseudo-terminal.

/// A machine whose console is a pseudo-terminal, and that one's name. `stderr` goes on being read.
fn on_pty(place: &Place) -> (std::process::Child, String) {
    let mut child = place
        .command("run --kernel k --console pty --debug-console file:alive")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    collect(stderr);
    let name = line
        .trim_end()
        .strip_prefix("console: ")
        .unwrap_or_else(|| panic!("{line}"))
        .to_string();
    (child, name)
}

#[test]
fn a_pty_console_talks_to_whoever_opens_it() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::echo());
    let (mut child, name) = on_pty(&place);
    // "up" may have come before anybody was there to read it.
    let mut pty = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&name)
        .unwrap();
    pty.write_all(b"hello").unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"hello") {
        let mut byte = [0];
        pty.read_exact(&mut byte).unwrap();
        got.extend(byte);
    }
    // Somebody else comes later.
    drop(pty);
    let mut pty = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&name)
        .unwrap();
    pty.write_all(b"again").unwrap();
    let mut got = [0; 5];
    pty.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"again");
    pty.write_all(&[4]).unwrap();
    assert_eq!(wait(&mut child, LIMIT), 15);
}

#[test]
fn a_pty_console_that_nobody_opens_holds_up_nothing() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::talk());
    let (mut child, _) = on_pty(&place);
    assert_eq!(wait(&mut child, LIMIT), GUEST_EXIT);
}

#[test]
fn a_pty_console_that_nobody_reads_does_not_hold_up_the_end() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::flood());
    let (mut child, name) = on_pty(&place);
    let pty = std::fs::File::options()
        .read(true)
        .write(true)
        .open(name)
        .unwrap();
    eventually("the guest goes on", || place.read("alive").len() > 500);
    signal(&child, Signal::SIGTERM);
    assert_eq!(wait(&mut child, PROMPT), 143);
    drop(pty);
}

/// For [`terminal`]: the program as a session leader needs no process group of its own.
fn plain(words: &str, place: &Place) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(words.split_whitespace()).current_dir(place.path());
    process::hang_up_by_default(&mut command);
    command
}
