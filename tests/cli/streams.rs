//! The three standard descriptors, and what comes and goes there.

use super::guest;
use super::kvm::have_kvm;
use super::process::{
    BAD_INPUT, GUEST_EXIT, HOST_TROUBLE, LIMIT, PROGRAM, PROMPT, Piped, Place, collect, eventually, finish,
    signal, stop, wait,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::io::{PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::Instant;

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
const PRINTS: [(&str, &[i32]); 7] = [
    ("--help", &[0]),
    ("--version", &[0]),
    ("run --help", &[0]),
    ("ctl --help", &[0]),
    ("run --demo --dry-run", &[0]),
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
    let Piped {
        mut child,
        mut stdin,
        stdout,
        stderr,
    } = Piped::start(&mut place.command("run --kernel k --log-level error"));
    let stdout = collect(stdout);
    let sent = text(1 << 20);
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
    let mut running = Piped::start(&mut place.command("run --kernel k"));
    let stdout = collect(running.stdout);
    running.stdin.write_all(b"a\x01xb\x03\x04").unwrap();
    assert_eq!(wait(&mut running.child, LIMIT), 15);
    assert_eq!(stdout.join().unwrap(), b"up\na\x01xb\x03");
}

#[test]
fn a_program_that_is_stopped_goes_on_where_it_was() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::echo());
    let Piped {
        mut child,
        mut stdin,
        mut stdout,
        stderr,
    } = Piped::start(&mut place.command("run --kernel k --log-level error"));
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
