//! What the host may lack.

use super::guest;
use super::kvm::{have_kvm, skipped};
use super::process::{BAD_INPUT, Ended, GUEST_EXIT, HOST_TROUBLE, PROGRAM, Place, assert_refused, finish};
use std::os::unix::process::CommandExt;

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
    // A copy that a user without rights can reach. A process of its own makes it: if this one had the file open for
    // writing, a child that another test starts at that moment would have it too, until its exec, and ours would be
    // refused (ETXTBSY).
    let copied = finish(&mut place.command_of("cp", [PROGRAM, "actor-vmm"]));
    assert_eq!(copied.status, 0, "{}", copied.stderr);
    let copy = place.path().join("actor-vmm");
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
fn a_kernel_on_a_kvm_that_interprets_it_is_told_so_at_once() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::exit());
    let doctor = String::from_utf8(place.run("doctor").stdout).unwrap();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let hardware = cpu.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    let interprets = !hardware && doctor.contains("does not know int3");
    let said = "KVM interprets the guest's kernel mode";
    let ended = place.run("run --kernel k");
    assert_eq!(ended.status, GUEST_EXIT, "{}", ended.stderr);
    assert_eq!(
        ended.stderr.contains(said),
        interprets,
        "{}\n{doctor}",
        ended.stderr
    );
    // Before anything else, but that it starts.
    assert!(!interprets || ended.stderr.lines().nth(1).unwrap().contains(said));
    // Our own guests do without what it does not know.
    assert!(!place.run("run --demo").stderr.contains(said));
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
