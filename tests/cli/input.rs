//! What can be wrong with files and words.

use super::guest;
use super::kvm::{have_kvm, skipped};
use super::process::{BAD_INPUT, HOST_TROUBLE, PROGRAM, Place, assert_refused, assert_usage, finish};

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
            "--share tag=a,path=disk",
            &["--share path=disk", "not a directory"],
        ),
        (
            "--share tag=a,path=. --share tag=a,path=/",
            &["--share tag=a", "two shared folders"],
        ),
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
        ("--share tag=,path=.", &["--share", "tag=", "1 to 36 bytes"]),
        ("--share path=.", &["--share", "'tag' is missing"]),
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
        ("--kernel k --share tag=a,path={}", false),
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
