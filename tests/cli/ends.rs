//! How a machine ends, and what is said then.

use super::guest;
use super::kvm::have_kvm;
use super::process::{GUEST_EXIT, LIMIT, PROMPT, Place, collect, signal, wait};
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

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
        // A warning about this host is no news of the guest.
        let told = ended.stderr.lines();
        let now = told
            .filter(|line| !line.contains("this host's KVM interprets"))
            .count();
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
