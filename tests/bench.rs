//! `actor-vmm bench` as a user calls it: what it refuses, and the shape of what it writes. Not the figures.

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
        ["ask", "post", "published", "scale", "shared", "victim", "storm"]
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
    // Seven disciplines, three repetitions.
    assert_eq!(rows.len(), 21);
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
            (1..=count).collect::<Vec<_>>(),
            "{discipline} {mutex}"
        );
    }
    let csv_text = std::fs::read_to_string(&csv).unwrap();
    assert_eq!(csv_text.lines().count(), 22);
    assert!(csv_text.starts_with("experiment,source,discipline,mutex,"));
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
