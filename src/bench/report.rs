//! Results as rows, as JSON and CSV for programs, and as a table for people.

use super::Repetition;
use super::budget::{self, Line};
use super::contestant::Contestant;
use super::plan::Load;
use super::stats::{self, Estimate, estimate, median};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::fmt::Write;

/// One repetition of one load under one discipline. Latencies in nanoseconds.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Row {
    /// Which experiment.
    pub experiment: &'static str,
    /// Where the exits come from.
    pub source: &'static str,
    /// Which program: `actor-vmm`, another's name, or `bare` for what the host takes for itself.
    pub who: &'static str,
    /// `actor`, `channel`, `channel:spin`, `device-lock` or `big-lock`; of others their name.
    pub discipline: &'static str,
    /// `std`, `parking_lot`, or `none` where the discipline has no mutex.
    pub mutex: &'static str,
    /// Where the device actors run; `none` for other disciplines.
    pub placement: String,
    /// What is measured: `ask`, `post`, `published`, `console`, `frame`, `kick` or `pause`.
    pub class: &'static str,
    /// Whose accesses were measured.
    pub vcpus: usize,
    /// That they used.
    pub devices: usize,
    /// What the handler costs.
    pub handler_ns: u64,
    /// How long the handler that another vCPU is on blocks; 0 if there is none.
    pub slow_ns: u64,
    /// How long the disk that another vCPU keeps busy takes for a request; 0 if there is none.
    pub disk_ns: u64,
    /// For latencies: the time from when one access is due to when the next is; 0: it follows the last at once.
    pub pace_ns: u64,
    /// Accesses a second of all measured vCPUs, one after the other.
    pub ops_per_s: f64,
    /// Mean latency.
    pub mean_ns: f64,
    /// Its median.
    pub p50_ns: f64,
    /// Its 99th percentile.
    pub p99_ns: f64,
    /// 99.9th.
    pub p999_ns: f64,
    /// 99.99th.
    pub p9999_ns: f64,
    /// The longest.
    pub max_ns: f64,
    /// How many latencies there are.
    pub latencies: u64,
    /// Part of the time that the measured vCPUs waited for a processor: others of this process, where there are more
    /// threads than processors, and other programs.
    pub waited: f64,
    /// How often a thread of this process went to sleep, per access: 0 where nobody waits, 2 where an access goes to a
    /// thread and back. Counted for scripted vCPUs.
    pub sleeps: f64,
    /// How often one that could run lost its processor or gave it up (`sched_yield`), per access; the same.
    pub yields: f64,
    /// From leaving the guest to the begin of the handler, where that is told apart (`split`).
    pub queued_p50_ns: Option<f64>,
    /// 99th percentile.
    pub queued_p99_ns: Option<f64>,
    /// 99.9th.
    pub queued_p999_ns: Option<f64>,
    /// From the begin of the handler to its end.
    pub served_p50_ns: Option<f64>,
    /// 99th percentile.
    pub served_p99_ns: Option<f64>,
    /// 99.9th.
    pub served_p999_ns: Option<f64>,
    /// From the end of the handler to the answer in the guest's hands.
    pub replied_p50_ns: Option<f64>,
    /// 99th percentile.
    pub replied_p99_ns: Option<f64>,
    /// 99.9th.
    pub replied_p999_ns: Option<f64>,
    /// From 1.
    pub repetition: usize,
}

/// The names in [`Row`], in the order of a CSV file.
pub const COLUMNS: [&str; 34] = [
    "experiment",
    "source",
    "who",
    "discipline",
    "mutex",
    "placement",
    "class",
    "vcpus",
    "devices",
    "handler_ns",
    "slow_ns",
    "disk_ns",
    "pace_ns",
    "ops_per_s",
    "mean_ns",
    "p50_ns",
    "p99_ns",
    "p999_ns",
    "p9999_ns",
    "max_ns",
    "latencies",
    "waited",
    "sleeps",
    "yields",
    "queued_p50_ns",
    "queued_p99_ns",
    "queued_p999_ns",
    "served_p50_ns",
    "served_p99_ns",
    "served_p999_ns",
    "replied_p50_ns",
    "replied_p99_ns",
    "replied_p999_ns",
    "repetition",
];

impl Row {
    /// What one repetition gave. `ns` makes nanoseconds of the histograms' units.
    pub fn new(
        load: &Load,
        who: Contestant,
        repeated: &Repetition,
        ns: impl Fn(f64) -> f64,
        repetition: usize,
    ) -> Row {
        let (discipline, mutex) = who.discipline();
        let latency = &repeated.latency;
        // A tenth of a nanosecond is less than a tick.
        let round = |ticks: f64| (ns(ticks) * 10.0).round() / 10.0;
        let at = |quantile| round(latency.value_at_quantile(quantile) as f64);
        let part = |n: usize, quantile| {
            let parts = repeated.parts.as_ref()?;
            Some(round(parts[n].value_at_quantile(quantile) as f64))
        };
        Row {
            experiment: load.experiment,
            source: load.source.name(),
            who: who.program(),
            discipline,
            mutex,
            placement: who.placement(),
            class: load.class.name(),
            vcpus: load.vcpus,
            devices: load.devices,
            handler_ns: load.handler_ns,
            slow_ns: load.slow.map_or(0, |time| time.as_nanos() as u64),
            disk_ns: load.disk.map_or(0, |time| time.as_nanos() as u64),
            pace_ns: load.pace_ns.unwrap_or(0),
            ops_per_s: repeated.ops_per_s.round(),
            mean_ns: round(latency.mean()),
            p50_ns: at(0.5),
            p99_ns: at(0.99),
            p999_ns: at(0.999),
            p9999_ns: at(0.9999),
            max_ns: round(latency.max() as f64),
            latencies: latency.len(),
            waited: (repeated.waited * 1e4).round() / 1e4,
            sleeps: (repeated.sleeps * 1e4).round() / 1e4,
            yields: (repeated.yields * 1e4).round() / 1e4,
            queued_p50_ns: part(0, 0.5),
            queued_p99_ns: part(0, 0.99),
            queued_p999_ns: part(0, 0.999),
            served_p50_ns: part(1, 0.5),
            served_p99_ns: part(1, 0.99),
            served_p999_ns: part(1, 0.999),
            replied_p50_ns: part(2, 0.5),
            replied_p99_ns: part(2, 0.99),
            replied_p999_ns: part(2, 0.999),
            repetition,
        }
    }
}

/// An array of rows.
pub fn json(rows: &[Row]) -> String {
    let mut text = serde_json::to_string_pretty(rows).expect("rows are numbers and names");
    text.push('\n');
    text
}

/// A line of names, then one a row.
pub fn csv(rows: &[Row]) -> String {
    let mut text = COLUMNS.join(",") + "\n";
    for row in rows {
        let values = serde_json::to_value(row).expect("rows are numbers and names");
        let cells = COLUMNS.map(|column| match &values[column] {
            // Ours need no quotes; a program's name is whatever its file's is.
            serde_json::Value::String(name) => name.replace([',', '"', '\n'], "_"),
            serde_json::Value::Null => String::new(),
            number => number.to_string(),
        });
        text += &cells.join(",");
        text.push('\n');
    }
    text
}

/// All repetitions of one load under one discipline.
pub struct Series {
    /// Who.
    pub who: Contestant,
    /// One a repetition.
    pub rows: Vec<Row>,
    /// Of all repetitions, in ticks.
    pub latency: Histogram<u64>,
}

impl Series {
    /// One number a repetition.
    pub fn values(&self, value: impl Fn(&Row) -> f64) -> Vec<f64> {
        self.rows.iter().map(value).collect()
    }

    /// Against another series, repetition by repetition.
    pub fn ratio(&self, other: &Series, value: impl Fn(&Row) -> f64) -> Estimate {
        let pairs = self.rows.iter().zip(&other.rows);
        estimate(
            &pairs
                .map(|(ours, theirs)| value(ours) / value(theirs))
                .collect::<Vec<_>>(),
        )
    }
}

/// All that was measured of one load.
pub struct Group {
    /// What was measured.
    pub load: Load,
    /// Under whom.
    pub series: Vec<Series>,
}

impl Group {
    /// Of a load, with nothing measured yet.
    pub fn new(load: Load) -> Group {
        let series = load.contestants().into_iter().map(|who| Series {
            who,
            rows: Vec::new(),
            latency: super::rig::histogram(),
        });
        Group {
            series: series.collect(),
            load,
        }
    }

    /// The series of a contestant, if it took part.
    pub fn of(&self, who: Contestant) -> Option<&Series> {
        self.series.iter().find(|series| series.who == who)
    }

    /// What everything is compared with: see [`Load::reference`].
    pub fn reference(&self) -> &Series {
        self.of(self.load.reference())
            .expect("it takes part in every load")
    }
}

/// What the ratios and intervals are.
pub fn legend(repetitions: usize) -> String {
    let (_, confidence) = stats::interval_rank(repetitions);
    if repetitions == 1 {
        return "one repetition; x: ratio to big-lock with std's mutex, or where that takes no part to the line with x 1.00"
            .into();
    }
    format!(
        "medians of {repetitions} interleaved repetitions; x: median of the ratios to big-lock with std's mutex (where it \
         takes no part: to the line with x 1.00) in the same repetition, [its {:.0} % interval]",
        confidence * 100.0
    )
}

/// A duration with three digits.
pub fn show_ns(ns: f64) -> String {
    match ns {
        ns if ns < 999.5 => format!("{ns:.0} ns"),
        ns if ns < 9.995e3 => format!("{:.2} us", ns / 1e3),
        ns if ns < 99.95e3 => format!("{:.1} us", ns / 1e3),
        ns if ns < 999.5e3 => format!("{:.0} us", ns / 1e3),
        ns if ns < 9.995e6 => format!("{:.2} ms", ns / 1e6),
        ns if ns < 99.95e6 => format!("{:.1} ms", ns / 1e6),
        ns => format!("{:.0} ms", ns / 1e6),
    }
}

/// A rate with three digits.
pub fn show_rate(per_s: f64) -> String {
    match per_s {
        rate if rate < 1e4 => format!("{rate:.0}/s"),
        rate if rate < 1e6 => format!("{:.1} k/s", rate / 1e3),
        rate => format!("{:.2} M/s", rate / 1e6),
    }
}

/// A ratio with three digits.
pub(super) fn show(number: f64) -> String {
    match number {
        n if n < 9.995 => format!("{n:.2}"),
        n if n < 99.95 => format!("{n:.1}"),
        n => format!("{n:.0}"),
    }
}

/// A ratio with its interval.
pub fn show_ratio(e: Estimate) -> String {
    format!("x {} [{}, {}]", show(e.median), show(e.low), show(e.high))
}

/// The head of [`cells`].
pub const HEAD: [&str; 9] = ["", "throughput", "", "p50", "", "p99", "p99.9", "", "p99.99"];

/// A line of the table.
pub fn cells(series: &Series, reference: &Series) -> [String; 9] {
    let middle = |value: fn(&Row) -> f64| median(&series.values(value));
    let against = |value: fn(&Row) -> f64| show_ratio(series.ratio(reference, value));
    [
        series.who.to_string(),
        show_rate(middle(|row| row.ops_per_s)),
        against(|row| row.ops_per_s),
        show_ns(middle(|row| row.p50_ns)),
        against(|row| row.p50_ns),
        show_ns(middle(|row| row.p99_ns)),
        show_ns(middle(|row| row.p999_ns)),
        against(|row| row.p999_ns),
        show_ns(middle(|row| row.p9999_ns)),
    ]
}

/// For the terminal.
pub fn table(groups: &[Group], repetitions: usize) -> String {
    let mut text = legend(repetitions) + "\n";
    for group in groups {
        let _ = writeln!(text, "\n{}", group.load.describe());
        let mut lines = vec![HEAD.map(String::from)];
        lines.extend(group.series.iter().map(|series| cells(series, group.reference())));
        let widths: [usize; 9] =
            std::array::from_fn(|n| lines.iter().map(|line| line[n].len()).max().unwrap_or(0));
        for line in lines {
            let mut out = String::new();
            for (n, cell) in line.iter().enumerate() {
                let width = widths[n];
                // Names and ratios to the left, numbers to the right.
                let _ = match n {
                    0 | 2 | 4 | 7 => write!(out, "  {cell:width$}"),
                    _ => write!(out, "  {cell:>width$}"),
                };
            }
            let _ = writeln!(text, "{}", out.trim_end());
        }
        if group.load.split {
            for series in &group.series {
                let _ = writeln!(text, "  {}: {}", series.who, split(series));
            }
        }
    }
    let lines = budget::lines(groups);
    if !lines.is_empty() {
        let _ = writeln!(text, "\nbudget (issue: bound, median of the ratios [interval])");
    }
    for Line {
        item,
        what,
        bound,
        measured,
        verdict,
    } in &lines
    {
        let (ratio, verdict) = (show_ratio(*measured), verdict.name());
        let _ = writeln!(text, "  {verdict:8} {item:2} {what}: {bound}, measured {ratio}");
    }
    text
}

/// Where the time goes, as medians and 99th percentiles.
fn split(series: &Series) -> String {
    let show = |value: fn(&Row) -> Option<f64>| {
        let values: Vec<f64> = series.rows.iter().filter_map(value).collect();
        show_ns(median(&values))
    };
    format!(
        "queued {} (p99 {}), served {} ({}), replied {} ({})",
        show(|row| row.queued_p50_ns),
        show(|row| row.queued_p99_ns),
        show(|row| row.served_p50_ns),
        show(|row| row.served_p99_ns),
        show(|row| row.replied_p50_ns),
        show(|row| row.replied_p99_ns)
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::plan::{Source, loads};
    use crate::bench::rig::histogram;
    use crate::machine::dispatch::Dispatch;

    /// What two repetitions of every load could give; each contestant 10 ns slower than the one before.
    pub fn groups() -> Vec<Group> {
        let of = |name| {
            [Source::Scripted, Source::Kvm]
                .into_iter()
                .flat_map(move |source| loads(name, source, 2))
        };
        let names = [
            "ask",
            "post",
            "published",
            "scale",
            "shared",
            "victim",
            "split",
            "kick",
            "pause",
        ];
        names.into_iter().flat_map(of).map(fill).collect()
    }

    pub fn fill(load: Load) -> Group {
        let mut group = Group::new(load);
        for (n, series) in group.series.iter_mut().enumerate() {
            let mut latency = histogram();
            for value in 0..1000u64 {
                latency.record(100 + value / 100 + 10 * n as u64).unwrap();
            }
            let repeated = Repetition {
                ops_per_s: 1e9 / (100 + 10 * n) as f64,
                waited: 0.0,
                sleeps: 0.0,
                yields: 0.0,
                parts: group.load.split.then(|| [(); 3].map(|()| latency.clone())),
                latency,
            };
            series.rows = [1, 2]
                .map(|n| Row::new(&group.load, series.who, &repeated, |t| t, n))
                .to_vec();
            series.latency = repeated.latency;
        }
        group
    }

    #[test]
    fn rows_have_these_columns_and_no_others() {
        let groups = groups();
        let row = &groups[0].series[0].rows[0];
        let value = serde_json::to_value(row).unwrap();
        let mut names: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        let mut columns = COLUMNS.to_vec();
        names.sort_unstable();
        columns.sort_unstable();
        assert_eq!(names, columns);
        assert_eq!(value["discipline"], "actor");
        assert_eq!(value["mutex"], "none");
        assert_eq!(value["placement"], "handoff");
        assert_eq!(value["p50_ns"], 104.0);
        assert_eq!(value["latencies"], 1000);
    }

    #[test]
    fn csv_has_a_line_a_row() {
        let groups = groups();
        let rows: Vec<Row> = groups[0]
            .series
            .iter()
            .flat_map(|series| series.rows.clone())
            .collect();
        let text = csv(&rows);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 1 + rows.len());
        for line in &lines {
            assert_eq!(line.split(',').count(), COLUMNS.len(), "{line}");
        }
        assert!(
            lines[1].starts_with("ask,scripted,actor-vmm,actor,none,handoff,ask,1,1,0,0,0,0,10000000"),
            "{}",
            lines[1]
        );
        let parsed: serde_json::Value = serde_json::from_str(&json(&rows)).unwrap();
        assert_eq!(parsed.as_array().unwrap().len(), rows.len());
    }

    #[test]
    fn the_table_has_everybody_and_the_reference_is_one() {
        let text = table(&groups(), 2);
        for dispatch in Dispatch::ALL {
            assert!(text.contains(&format!("  {dispatch} ")), "{dispatch}");
        }
        let reference = text.lines().find(|line| line.starts_with("  big-lock ")).unwrap();
        assert!(reference.contains("x 1.00 [1.00, 1.00]"), "{reference}");
        assert!(text.contains("actor (thread)"));
    }

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        let ns = [4.2, 999.4, 999.6, 12_345.0, 123_456.0, 1.5e6, 10.2e6, 2e9].map(show_ns);
        assert_eq!(
            ns,
            [
                "4 ns", "999 ns", "1.00 us", "12.3 us", "123 us", "1.50 ms", "10.2 ms", "2000 ms"
            ]
        );
        assert_eq!(
            [9_999.0, 2e5, 3.456e7].map(show_rate),
            ["9999/s", "200.0 k/s", "34.56 M/s"]
        );
        assert_eq!([0.123, 12.34, 1234.0].map(show), ["0.12", "12.3", "1234"]);
    }
}
