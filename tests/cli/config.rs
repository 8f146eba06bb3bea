//! `--config` and `--dry-run`.

use crate::process::{BAD_INPUT, Place, assert_refused};

#[test]
fn a_machine_is_printed_as_a_file_that_says_the_same() {
    // Nothing that is named is there, and none of it is needed.
    let place = Place::new();
    let words = "run --kernel no/kernel --console file:out --control ctl --cpus 2 --disk path=no/disk,ro --net user \
                 --balloon --rng --dry-run";
    let first = place.run(words);
    assert_eq!((first.status, first.stderr.as_str()), (0, ""));
    let text = String::from_utf8(first.stdout.clone()).unwrap();
    for line in [
        "cpus = 2",
        "memory = \"512M\"",
        "[[disk]]",
        "queues = 1",
        "ro = true",
        "[balloon]",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert_eq!(place.content(), [], "nothing is made");
    place.file("vm.toml", &first.stdout);
    let second = place.run("run --config vm.toml --dry-run");
    assert_eq!(
        (second.status, second.stdout == first.stdout),
        (0, true),
        "{}",
        second.stderr
    );
}

#[test]
fn a_machine_of_a_file_runs_and_one_that_contradicts_itself_does_not() {
    let place = Place::new();
    place.file(
        "broken.toml",
        b"demo = true\ncpus = 2\n[[disk]]\npath = \"d\"\nqueue = 2\n",
    );
    for words in ["run --config broken.toml", "run --config broken.toml --dry-run"] {
        let said = &["--config broken.toml: disk[0].queue", "did you mean 'queues'?"];
        assert_refused(&place.run(words), BAD_INPUT, said);
    }
    place.file("both.toml", b"demo = true\ncpus = 2\n");
    let said = &["--config both.toml: cpus is in the file and on the command line"];
    assert_refused(&place.run("run --config both.toml --cpus 2"), BAD_INPUT, said);
    // What only the whole machine shows is found without one, too.
    for (file, said) in [
        ("cpus = 5000", &["--cpus must be 1 to"][..]),
        ("placement = [\"moon=pool\"]", &["moon"]),
        ("memory = \"64M\"\n[balloon]\nsize = \"64M\"", &["--balloon"]),
        (
            "[[net]]\ntap = \"a\"\n[[net]]\ntap = \"a\"",
            &["--net tap=a: two network devices"],
        ),
    ] {
        place.file("odd.toml", format!("demo = true\n{file}\n").as_bytes());
        assert_refused(&place.run("run --config odd.toml --dry-run"), BAD_INPUT, said);
    }
    assert_refused(
        &place.run("run --config missing.toml"),
        BAD_INPUT,
        &["missing.toml", "No such file"],
    );
}

#[test]
fn a_damaged_qcow2_image_is_bad_input() {
    let place = Place::new();
    place.file("disk", &[b"QFI\xfb\0\0\0\x09".as_slice(), &[0; 504]].concat());
    let said = &[
        "--disk path=disk: it is of version 9 of qcow2",
        "qemu-img convert",
    ];
    assert_refused(
        &place.run("run --demo --disk path=disk,format=qcow2"),
        BAD_INPUT,
        said,
    );
    let said = &["--disk path=disk: it begins as a qcow2 image does", "format=raw"];
    assert_refused(&place.run("run --demo --disk path=disk"), BAD_INPUT, said);
}
