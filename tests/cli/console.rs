//! Where the console goes: files, and pseudo-terminals.

use super::guest;
use super::kvm::{have_kvm, skipped};
use super::process::{
    BAD_INPUT, GUEST_EXIT, HOST_TROUBLE, LIMIT, PROGRAM, PROMPT, Place, assert_refused, collect, eventually,
    finish, signal, wait,
};
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

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
