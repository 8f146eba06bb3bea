use super::testing::{Does, echo, opened, peer, request};
use super::*;
use crate::virtio::subjects::quiet;
use crate::virtio::testing::{LIMIT, Outcome, R, Rig, W, kept_log};
use crossbeam_channel::bounded;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x8_0000;

/// The queue for all requests.
fn rig(log: Logger, does: impl FnMut(&[u8]) -> Does + Send + 'static) -> Rig {
    let (_, mut handlers, _) = opened(log.clone(), does);
    Rig::with_log(handlers.remove(1), log)
}

#[test]
fn a_request_comes_there_and_its_answer_back_whatever_their_size() {
    let mut rig = rig(quiet(), echo);
    // The last is in several pieces for the copy, and in several descriptors.
    for (unique, bytes) in [(1, 0), (2, 1), (3, 5000), (4, 300_000)] {
        let data: Vec<u8> = (0..bytes).map(|at| (at * 7 + unique) as u8).collect();
        rig.write(REQUEST, &request(unique as u64, &data));
        rig.write(ANSWER, &vec![0xee; 310_000]);
        let first = (bytes as u32 + 40) / 3;
        let outcome = rig.request(&[
            R(REQUEST, first),
            R(REQUEST + u64::from(first), bytes as u32 + 40 - first),
            W(ANSWER, 10),
            W(ANSWER + 10, bytes as u32 + 100),
        ]);
        assert_eq!(outcome, Outcome::Used(bytes as u32 + 16));
        let answer = rig.read(ANSWER, bytes + 17);
        assert_eq!(answer[16..16 + bytes], data);
        assert_eq!((answer[8], answer[16 + bytes]), (unique as u8, 0xee));
    }
}

#[test]
fn a_request_without_an_answer_is_given_back() {
    let (told, tell) = bounded(1);
    let (_, mut handlers, _) = opened(quiet(), move |request| {
        told.send(request.len()).unwrap();
        Does::Answers(Vec::new())
    });
    let mut rig = Rig::new(handlers.remove(0));
    rig.write(REQUEST, &request(1, &[0; 8]));
    assert_eq!(rig.request(&[R(REQUEST, 48)]), Outcome::Used(0));
    assert_eq!(tell.recv_timeout(LIMIT), Ok(48));
}

#[test]
fn requests_that_are_none_break_the_device_and_reach_nobody() {
    let (told, tell) = bounded(16);
    let mut rig = rig(quiet(), move |request| {
        told.send(()).unwrap();
        echo(request)
    });
    rig.write(REQUEST, &request(1, &[0; 8]));
    for buffers in [
        &[W(ANSWER, 100)][..],
        &[R(REQUEST, 39), W(ANSWER, 100)],
        &[R(REQUEST, 40), W(ANSWER, 100)],
        &[R(REQUEST, 49), W(ANSWER, 100)],
        &[R(u64::MAX - 100, 48), W(ANSWER, 100)],
        &[R(REQUEST, 48), W(ANSWER, 1 << 21)],
        &[R(0, 600_000), R(0, 600_000), W(ANSWER, 100)],
    ] {
        assert_eq!(rig.request(buffers), Outcome::Broken, "{buffers:?}");
        rig.start();
    }
    assert!(tell.try_recv().is_err());
    assert_eq!(rig.request(&[R(REQUEST, 48), W(ANSWER, 100)]), Outcome::Used(24));
}

#[test]
fn what_is_answered_after_a_reset_goes_nowhere() {
    let (reached, reach) = bounded(1);
    let (release, released) = bounded(1);
    let mut first = true;
    let mut rig = rig(quiet(), move |request| {
        if std::mem::take(&mut first) {
            reached.send(()).unwrap();
            released.recv().unwrap();
        }
        echo(request)
    });
    rig.write(REQUEST, &request(1, &[0x55; 100]));
    rig.provide(&[R(REQUEST, 140), W(ANSWER, 200)]);
    reach.recv_timeout(LIMIT).unwrap();
    // It takes effect though virtiofsd is busy.
    rig.start();
    rig.write(REQUEST, &request(2, &[0x66; 8]));
    rig.provide(&[R(REQUEST, 48), W(ANSWER + 0x1000, 200)]);
    release.send(()).unwrap();
    assert_eq!(rig.outcome(), Outcome::Used(24));
    assert_eq!(rig.read(ANSWER, 200), [0; 200]);
    assert_eq!(rig.read(ANSWER + 0x1000 + 16, 8), [0x66; 8]);
}

#[test]
fn one_that_ends_is_told_once_and_the_guest_gets_errors() {
    let (log, lines) = kept_log();
    let mut served = 0;
    let (_, handlers, thread) = opened(log.clone(), move |request| {
        served += 1;
        if served > 1 { Does::Ends } else { echo(request) }
    });
    let mut rigs = handlers
        .into_iter()
        .map(|handler| Rig::with_log(handler, log.clone()));
    let (mut urgent, mut usual) = (rigs.next().unwrap(), rigs.next().unwrap());
    for rig in [&urgent, &usual] {
        rig.write(REQUEST, &request(0x77, &[1; 8]));
    }
    let buffers = [R(REQUEST, 48), W(ANSWER, 100)];
    assert_eq!(usual.request(&buffers), Outcome::Used(24));
    let refused = |rig: &mut Rig| {
        assert_eq!(rig.request(&buffers), Outcome::Used(16));
        let answer = rig.read(ANSWER, 16);
        assert_eq!(answer[4..8], (-libc::ENOTCONN).to_le_bytes());
        assert_eq!(answer[8..], 0x77u64.to_le_bytes());
    };
    // The one that it ends at, and those behind, also after a reset.
    refused(&mut usual);
    thread.join().unwrap();
    refused(&mut usual);
    usual.start();
    refused(&mut usual);
    refused(&mut urgent);
    assert_eq!(urgent.request(&[R(REQUEST, 48)]), Outcome::Used(0));
    let said = lines.recv_timeout(LIMIT).unwrap();
    assert!(said.starts_with("share0 (tag test): virtiofsd is lost"), "{said}");
    drop((urgent, usual));
    assert!(lines.try_recv().is_err());
}

#[test]
fn one_that_ends_while_nobody_asks_is_told_too() {
    let (log, lines) = kept_log();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let copy = theirs.try_clone().unwrap();
    let thread = peer(theirs, echo);
    let keeper = Keeper {
        name: "share0 (tag test)".into(),
        program: None,
        log: log.clone(),
    };
    let mut handlers = handlers("test", ours, keeper, LIMIT).unwrap();
    let rig = Rig::with_log(handlers.remove(1), log);
    copy.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(lines.recv_timeout(LIMIT).unwrap().contains("is lost"));
    drop((rig, copy));
    thread.join().unwrap();
}

#[test]
fn one_that_lies_is_lost() {
    let (log, lines) = kept_log();
    let mut rig = rig(log, |_| Does::Lies);
    rig.write(REQUEST, &request(1, &[]));
    assert_eq!(rig.request(&[R(REQUEST, 40), W(ANSWER, 100)]), Outcome::Used(16));
    assert!(lines.recv_timeout(LIMIT).unwrap().contains("nonsense"));
}

/// The end of the actor is waited for by the rig, with a limit.
#[test]
fn one_that_never_answers_holds_up_no_pause_and_no_end() {
    let (reached, reach) = bounded(1);
    let mut rig = rig(quiet(), move |_| {
        reached.send(()).unwrap();
        Does::Nothing
    });
    rig.write(REQUEST, &request(1, &[]));
    rig.provide(&[R(REQUEST, 40), W(ANSWER, 100)]);
    reach.recv_timeout(LIMIT).unwrap();
    rig.remote.suspend();
    rig.remote.resume();
    rig.remote.stop();
    drop(rig);
}

#[test]
fn a_driver_finds_the_tag_and_one_queue_for_requests() {
    let identity = identity("home");
    assert_eq!((identity.device_type, identity.queues), (26, 2));
    let mut expected = [0; 40];
    expected[..4].copy_from_slice(b"home");
    expected[36] = 1;
    assert_eq!(identity.configuration, expected);
}

fn fail(script: &str) -> String {
    let start = |fd: &str| {
        let mut command = Command::new("bash");
        command.args(["-c", script, "bash", fd]);
        command
    };
    let (program, socket) = daemon::start_command(start).unwrap();
    let keeper = Keeper {
        name: "share0".into(),
        program: Some(program),
        log: quiet(),
    };
    // Not a measure of speed: one that says nothing is not waited for for ever.
    let result = handlers("test", socket, keeper, Duration::from_millis(100));
    let error = result.map(|_| ()).unwrap_err();
    let source = std::error::Error::source(&error).map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

#[test]
fn one_that_does_not_serve_is_told_with_its_last_words() {
    let said = fail("echo first >&2; echo no rights >&2; exit 3");
    assert!(
        said.contains(
            "--share tag=test: virtiofsd does not serve it: it has ended: exit status: 3: no rights"
        ),
        "{said}"
    );
    let said = fail("exec sleep 1000");
    assert!(said.contains("did not answer"), "{said}");
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|this| this.uid() == 0)
}

#[test]
fn what_is_installed_starts_serves_and_ends() {
    let config: ShareConfig = format!("tag=test,path={},sandbox=chroot", std::env::temp_dir().display())
        .parse()
        .unwrap();
    let opened = match open("share0", &config, &quiet()) {
        Err(ShareError::NotInstalled(_)) => return println!("virtiofsd is not installed: nothing to try"),
        // Not everybody may.
        Err(error @ ShareError::Ended(..)) if !is_root() => {
            return println!("nothing to try: {error}");
        }
        result => result.unwrap(),
    };
    let mut rig = Rig::new(opened.handlers.into_iter().nth(1).unwrap());
    // FUSE_INIT, version 7.31, read ahead 128 KiB.
    let mut init = request(1, &[0; 16]);
    init[4] = 26;
    init[40..52].copy_from_slice(&[7, 0, 0, 0, 31, 0, 0, 0, 0, 0, 2, 0]);
    // Twice, as after a reset.
    for _ in 0..2 {
        rig.write(REQUEST, &init);
        assert_eq!(rig.request(&[R(REQUEST, 56), W(ANSWER, 80)]), Outcome::Used(80));
        let answer = rig.read(ANSWER, 20);
        assert_eq!(
            (&answer[4..8], answer[16]),
            (&[0; 4][..], 7),
            "no error, version 7"
        );
        rig.start();
    }
}
