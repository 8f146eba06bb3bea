//! `actor-vmm bench` as a user calls it: what it refuses, and the shape of what it writes. Not the figures.

#[path = "host/kvm.rs"]
mod kvm;

use kvm::have_kvm;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_actor-vmm"));
    command.arg("bench").args(args);
    command.output().expect("the program was built")
}

fn scratch(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()))
}

#[track_caller]
fn assert_refused(args: &[&str], needle: &str) {
    let output = bench(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.starts_with("actor-vmm: ") && stderr.contains(needle),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(output.stdout.is_empty());
}

#[test]
fn mistakes_are_told_before_anything_runs() {
    assert_refused(
        &["--only", "ask,flight"],
        "'flight' is not an experiment; there are ask, post",
    );
    assert_refused(&["--only", "against"], "against needs a program: --against qemu");
    assert_refused(
        &["--only", "storm,split", "--source", "kvm"],
        "storm and split cannot be done with --source kvm",
    );
    assert_refused(&["--repetitions", "0"], "--repetitions must be 1 to");
    assert_refused(
        &["--json", "/nonexistent/x.json"],
        "cannot write /nonexistent/x.json: No such file",
    );
    assert_refused(&["--csv", "/"], "cannot write /: Is a directory");
    assert_refused(&["--csv", "x", "--html", "x"], "x cannot be two outputs at once");
}

#[test]
fn the_list_names_the_experiments() {
    let output = bench(&["--list"]);
    assert!(output.status.success());
    let names: Vec<_> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| line.split(' ').next().unwrap().to_string())
        .collect();
    assert_eq!(
        names,
        [
            "ask",
            "post",
            "published",
            "scale",
            "shared",
            "victim",
            "storm",
            "split",
            "kick",
            "pause",
            "against"
        ]
    );
}

#[test]
fn a_quick_run_writes_rows_a_table_and_a_report() {
    let (json, csv, html) = (scratch("bench.json"), scratch("bench.csv"), scratch("bench.html"));
    // What was there before must be gone, however long.
    std::fs::write(&json, "x".repeat(1 << 20)).unwrap();
    let paths = [&json, &csv, &html].map(|path| path.to_str().unwrap());
    let output = bench(&[
        "--quick", "--only", "ask", "--json", paths[0], "--csv", paths[1], "--html", paths[2],
    ]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("0 %"), "no progress: {stderr}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("ask: 1 vCPU on 1 device, ask"), "{table}");

    let rows: Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    let rows = rows.as_array().unwrap();
    // Two loads, seven disciplines, three repetitions.
    assert_eq!(rows.len(), 42);
    for row in rows {
        for name in ["experiment", "source", "discipline", "mutex", "class"] {
            assert!(row[name].is_string(), "{name}: {row}");
        }
        for name in ["vcpus", "devices", "handler_ns", "repetition"] {
            assert!(row[name].is_u64(), "{name}: {row}");
        }
        for name in ["ops_per_s", "p50_ns", "p99_ns", "p999_ns", "p9999_ns"] {
            assert!(
                row[name].as_f64().is_some_and(|value| value > 0.0),
                "{name}: {row}"
            );
        }
        let tail = ["p50_ns", "p99_ns", "p999_ns", "p9999_ns"].map(|name| row[name].as_f64().unwrap());
        assert!(tail.is_sorted(), "{row}");
        assert_eq!(
            (&row["experiment"], &row["source"]),
            (&"ask".into(), &"scripted".into())
        );
    }
    for (discipline, mutex, count) in [
        ("actor", "none", 3),
        ("channel", "none", 3),
        ("channel:spin", "none", 3),
        ("device-lock", "std", 3),
        ("device-lock", "parking_lot", 3),
        ("big-lock", "std", 3),
        ("big-lock", "parking_lot", 3),
    ] {
        let found = rows
            .iter()
            .filter(|row| row["discipline"] == discipline && row["mutex"] == mutex);
        let mut repetitions: Vec<_> = found.map(|row| row["repetition"].as_u64().unwrap()).collect();
        repetitions.sort_unstable();
        assert_eq!(
            repetitions,
            (1..=count).flat_map(|n| [n, n]).collect::<Vec<_>>(),
            "{discipline} {mutex}"
        );
    }
    let csv_text = std::fs::read_to_string(&csv).unwrap();
    assert_eq!(csv_text.lines().count(), 43);
    assert!(csv_text.starts_with("experiment,source,who,discipline,mutex,"));
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("<svg") && page.ends_with("</html>\n"));
    for path in [json, csv, html] {
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn results_that_cannot_be_written_are_told() {
    let output = bench(&[
        "--quick",
        "--repetitions",
        "1",
        "--only",
        "ask",
        "--json",
        "/dev/full",
    ]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(18), "{stderr}");
    assert!(
        stderr.contains("actor-vmm: cannot write /dev/full: No space left"),
        "{stderr}"
    );
}

/// The rows of a run on KVM; `None` where there is none.
fn rows_on_kvm(name: &str, args: &[&str]) -> Option<Vec<Value>> {
    if !have_kvm() {
        return None;
    }
    let json = scratch(name);
    let path = json.to_str().unwrap();
    let fixed = ["--quick", "--repetitions", "1", "--json", path];
    let output = bench(&[&fixed, args].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let rows: Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    std::fs::remove_file(json).unwrap();
    Some(rows.as_array().unwrap().clone())
}

#[test]
fn a_guest_of_kvm_measures_itself_under_every_discipline() {
    let Some(rows) = rows_on_kvm("kvm.json", &["--source", "kvm", "--only", "ask,victim"]) else {
        return;
    };
    assert!(rows.iter().all(|row| row["source"] == "kvm"), "{rows:?}");
    let of = |experiment: &str, slow_ns: u64| {
        let row = move |row: &&Value| row["experiment"] == experiment && row["slow_ns"] == slow_ns;
        rows.iter().filter(row).collect::<Vec<_>>()
    };
    // Seven disciplines, and the bare loop where nothing is slow; an ask also now and then.
    assert_eq!(of("ask", 0).len(), 16);
    assert_eq!(of("victim", 0).len(), 8);
    for row in of("ask", 0) {
        assert_eq!(row["latencies"], 500, "{row}");
        assert!(row["ops_per_s"].as_f64().unwrap() > 0.0, "{row}");
    }
    // A handler of 10 ms is seen by whoever shares its lock, however busy the host is.
    let slow = of("victim", 10_000_000);
    assert_eq!(slow.len(), 7);
    for row in slow.iter().filter(|row| row["discipline"] == "big-lock") {
        assert!(row["max_ns"].as_f64().unwrap() > 5e6, "{row}");
    }
}

#[test]
fn kicks_are_heard() {
    let Some(rows) = rows_on_kvm("kick.json", &["--only", "kick"]) else {
        return;
    };
    let names: Vec<_> = rows
        .iter()
        .map(|row| row["discipline"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["actor", "bare", "actor", "bare"]);
    for row in &rows {
        assert_eq!(
            (&row["class"], &row["latencies"]),
            (&"kick".into(), &200.into()),
            "{row}"
        );
    }
}

#[test]
fn whole_machines_are_paused() {
    let Some(rows) = rows_on_kvm("pause.json", &["--only", "pause", "--source", "scripted,kvm"]) else {
        return;
    };
    let of: Vec<_> = rows
        .iter()
        .map(|row| {
            (
                row["source"].as_str().unwrap(),
                row["vcpus"].as_u64().unwrap(),
                row["discipline"].as_str().unwrap(),
            )
        })
        .collect();
    let mut expected = Vec::new();
    for source in ["scripted", "kvm"] {
        for vcpus in [1, 4, 16, 64] {
            expected.extend(["actor", "bare"].map(|who| (source, vcpus, who)));
        }
    }
    assert_eq!(of, expected);
    for row in &rows {
        let pauses = if row["vcpus"].as_u64() > Some(4) { 3 } else { 50 };
        assert_eq!(
            (&row["class"], &row["latencies"]),
            (&"pause".into(), &pauses.into()),
            "{row}"
        );
    }
}

#[test]
fn the_same_guest_runs_in_any_program_that_a_template_names() {
    let program = env!("CARGO_BIN_EXE_actor-vmm");
    let template = format!("'{program}' run --kernel {{image}} --cpus {{cpus}} --memory 64M");
    let Some(rows) = rows_on_kvm("against.json", &["--against", &template]) else {
        return;
    };
    // One vCPU, two on two devices, two on one: ours twice, theirs, and the bare loop.
    assert_eq!(rows.len(), 12);
    for of in rows.chunks(4) {
        let names: Vec<_> = of
            .iter()
            .map(|row| (row["who"].as_str().unwrap(), row["discipline"].as_str().unwrap()))
            .collect();
        let expected = [
            ("actor-vmm", "actor"),
            ("actor-vmm", "big-lock"),
            ("actor-vmm", "actor-vmm"),
            ("bare", "bare"),
        ];
        assert_eq!(names, expected);
    }
    let vcpus: Vec<_> = rows
        .iter()
        .step_by(4)
        .map(|row| row["vcpus"].as_u64().unwrap())
        .collect();
    assert_eq!(vcpus, [1, 2, 2]);
    for row in &rows {
        assert_eq!(
            row["latencies"].as_u64().unwrap(),
            250 * row["vcpus"].as_u64().unwrap(),
            "{row}"
        );
    }
}

#[test]
fn a_program_that_cannot_run_the_guest_is_named() {
    if !have_kvm() {
        return;
    }
    let output = bench(&[
        "--quick",
        "--repetitions",
        "1",
        "--against",
        "sh -c 'echo no >&2' {image}",
    ]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(18), "{stderr}");
    assert!(
        stderr.contains("sh cannot run the measuring guest") && stderr.contains("it said: no"),
        "{stderr}"
    );
}
