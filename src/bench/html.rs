//! The report as one HTML file: plots as inline SVG, nothing from elsewhere, no scripts.

use super::Results;
use super::budget::{self, Verdict};
use super::contestant::Contestant;
use super::plan::{self, Load, Source};
use super::plots::{key, latencies, throughput};
use super::report::{self, Group, HEAD, Row, Series, cells, show_ns, show_ratio};
use super::stats::median;
use crate::machine::dispatch::Dispatch;
use std::fmt::Write;

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Text of the table for the terminal, for a page.
fn prose(text: &str) -> String {
    let text = escape(text).replace(" us", " µs");
    match text.strip_prefix("x ") {
        Some(ratio) => format!("× {ratio}"),
        None => text.replace(" x ", " × "),
    }
}

fn row(cells: impl IntoIterator<Item = String>, tag: &str) -> String {
    let cells = cells.into_iter().map(|cell| format!("<{tag}>{cell}</{tag}>"));
    format!("<tr>{}</tr>", cells.collect::<String>())
}

fn table(group: &Group) -> String {
    let mut text = format!("<table>{}", row(HEAD.map(String::from), "th"));
    for series in &group.series {
        text += &row(cells(series, group.reference()).map(|cell| prose(&cell)), "td");
    }
    text + "</table>"
}

/// Where the time of an access goes.
fn split(group: &Group) -> String {
    let show = |series: &Series, value: fn(&Row) -> Option<f64>| {
        let values: Vec<f64> = series.rows.iter().filter_map(value).collect();
        prose(&show_ns(median(&values)))
    };
    let head = [
        "",
        "queued p50",
        "p99",
        "p99.9",
        "served p50",
        "p99",
        "p99.9",
        "replied p50",
        "p99",
        "p99.9",
    ];
    let mut text = format!("<table>{}", row(head.map(String::from), "th"));
    for series in &group.series {
        let values: [fn(&Row) -> Option<f64>; 9] = [
            |row| row.queued_p50_ns,
            |row| row.queued_p99_ns,
            |row| row.queued_p999_ns,
            |row| row.served_p50_ns,
            |row| row.served_p99_ns,
            |row| row.served_p999_ns,
            |row| row.replied_p50_ns,
            |row| row.replied_p99_ns,
            |row| row.replied_p999_ns,
        ];
        let cells = values.map(|value| show(series, value));
        text += &row([escape(&series.who.to_string())].into_iter().chain(cells), "td");
    }
    text + "</table>"
}

/// What was promised and what came of it.
fn budget(results: &Results) -> String {
    let lines = budget::lines(&results.groups);
    if lines.is_empty() {
        return String::new();
    }
    let met = |line: &&budget::Line| matches!(line.verdict, Verdict::Met | Verdict::Likely);
    let mut text = format!(
        "<h2>Budget: {} of {} bounds met</h2>\n<p>Each bound is on the ratio of two things that were measured in the \
         same repetition. Given are its median and interval; a question mark means that the interval has the bound in \
         it.</p>\n<table class=\"budget\">",
        lines.iter().filter(met).count(),
        lines.len()
    );
    text += &row(["", "what", "bound", "measured", ""].map(String::from), "th");
    for line in &lines {
        let class = if met(&line) { "good" } else { "bad" };
        let _ = writeln!(
            text,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"{class}\">{}</td></tr>",
            line.item,
            prose(&line.what),
            line.bound,
            prose(&show_ratio(line.measured)),
            line.verdict.name()
        );
    }
    text + "</table>\n"
}

/// Why the textbook's actors lose: counted, not guessed.
fn channels(results: &Results) -> String {
    let ask = |group: &&Group| group.load.experiment == "ask" && group.load.source == Source::Scripted;
    let mut table = row(
        ["", "p50", "p99", "a second, at full speed", "sleeps", "yields"].map(String::from),
        "th",
    );
    let mut groups = 0;
    for group in results.groups.iter().filter(ask) {
        groups += 1;
        let when = match group.load.pace_ns {
            None => "the next access at once".to_string(),
            Some(ns) => format!("an access every {}", prose(&show_ns(ns as f64))),
        };
        for (what, dispatch) in [
            (
                "a channel and a thread a device",
                Dispatch::Channel { spin: false },
            ),
            (
                "the same, both sides look before they sleep",
                Dispatch::Channel { spin: true },
            ),
            ("the actor: the turn runs on the vCPU's thread", Dispatch::Actor),
        ] {
            let Some(series) = group.of(Contestant::of(dispatch)) else {
                return String::new();
            };
            let value = |value: fn(&Row) -> f64| median(&series.values(value));
            // Throughput, and what was counted with it, knows no pace.
            let counted = |text: String| group.load.pace_ns.map_or(text, |_| String::new());
            let cells = [
                format!("{what}; {when}"),
                prose(&show_ns(value(|row| row.p50_ns))),
                prose(&show_ns(value(|row| row.p99_ns))),
                counted(report::show_rate(value(|row| row.ops_per_s))),
                counted(format!("{:.3}", value(|row| row.sleeps))),
                counted(format!("{:.3}", value(|row| row.yields))),
            ];
            table += &row(cells, "td");
        }
    }
    if groups == 0 {
        return String::new();
    }
    format!(
        "<h2>Why a thread a device is slow</h2>\n<p>One access to an idle device; sleeps and yields are what all threads \
         of the process did for it, in the mean (voluntary and other context switches, by getrusage). With a thread a \
         device, the vCPU cannot go on until the device's thread has run, nor that until the vCPU has sent: two threads \
         that are never ready at once. Where a guest computes between its accesses the device's thread sleeps by then, and \
         each access pays for a wake-up there and another one back: futex calls, the scheduler, and a processor that must be \
         woken itself if it idles. At full speed neither side gets that far: a channel looks, and yields its processor, for \
         some microseconds before it sleeps, whether it was told to spin or not. So on two processors with nothing else to \
         do two awake threads pass cache lines to and fro, which is cheaper by an order of magnitude and costs a whole \
         processor a device; and when other work puts both threads on one processor, each access is two context switches. \
         Which of the two a run at full speed shows is the scheduler's choice, so the bound is on the device that is idle. \
         The handler and the message are the same in all.</p>\n<table>{table}</table>\n"
    )
}

const STYLE: &str = "body{font:15px/1.5 Georgia,serif;color:#111;background:#fff;max-width:1180px;margin:2em auto;\
padding:0 1em}h1{font-size:1.6em}h2{font-size:1.15em;margin-top:2em}\
svg{background:#fff}figure{margin:0;display:inline-block;width:min(100%,570px);vertical-align:top}\
figcaption{font-size:.9em;margin:.2em 0 1em}svg text{font:12px Helvetica,Arial,sans-serif;fill:#222}\
.grid{stroke:#e4e4e4}.frame{fill:none;stroke:#444}polyline{fill:none;stroke-width:1.8}\
table{border-collapse:collapse;font:13px/1.4 Helvetica,Arial,sans-serif;margin:.5em 0}\
td,th{padding:2px 9px;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}\
td:first-child,th:first-child{text-align:left}.budget td:nth-child(2),.budget th:nth-child(2){text-align:left;\
white-space:normal}.good{color:#06662f;font-weight:bold}.bad{color:#a33;font-weight:bold}\
.key{font:13px Helvetica,Arial,sans-serif}.key span{margin-right:1.4em;white-space:nowrap}.warn{color:#a33}";

/// The whole file.
pub fn page(results: &Results) -> String {
    let host = &results.host;
    let mut text = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>actor-vmm bench</title>\
         <style>{STYLE}</style></head><body>\n<h1>Dispatch of exits: actors and locks</h1>\n\
         <p>{}, {} processors, Linux {}; actor-vmm {}. {}.</p>\n",
        escape(&host.processor),
        host.processors,
        escape(&host.kernel),
        env!("CARGO_PKG_VERSION"),
        escape(
            &report::legend(results.repetitions)
                .replace("x:", "×:")
                .replace("x 1.00", "× 1.00")
        )
    );
    for warning in &host.warnings {
        let _ = writeln!(text, "<p class=\"warn\">{}</p>", escape(warning));
    }
    text += "<p>Throughput is counted without a look at a clock, all vCPUs as fast as they can. Latencies come from \
             separate samples and are of one access, from leaving the guest to its answer, less the cost of looking. \
             Where accesses are due at fixed times, a latency counts from then, so a wait is seen by all whom it held \
             up. Where exits come from KVM, the guest takes the time itself, and what it sees is the host's exit and \
             entry too: <i>bare</i> is that alone, KVM_RUN called again with nothing done in between.</p>\n";
    text += &budget(results);
    text += &channels(results);
    // Loads that differ in nothing but vCPUs (and devices with them) share a plot.
    let mut at = 0;
    while at < results.groups.len() {
        let first = &results.groups[at].load;
        let alike: Vec<_> = results.groups[at..]
            .iter()
            .take_while(|group| group.load.is_like(first))
            .collect();
        if at == 0 || results.groups[at - 1].load.experiment != first.experiment {
            let about = plan::about(first.experiment);
            let _ = writeln!(text, "<h2>{}: {}</h2>", first.experiment, prose(about));
        }
        text += &section(first, &alike, results);
        at += alike.len();
    }
    text + "</body></html>\n"
}

fn section(first: &Load, alike: &[&Group], results: &Results) -> String {
    let mut text = key(alike[0]);
    if alike.len() > 1 {
        let source = match first.source {
            Source::Scripted => "",
            Source::Kvm => ", KVM",
        };
        let _ = writeln!(
            text,
            "<figure>{}<figcaption>{}{source}, handler {} ns: throughput against vCPUs. Points are medians, bars \
             intervals.</figcaption></figure>",
            throughput(alike),
            first.experiment,
            first.handler_ns
        );
    }
    for group in alike {
        let _ = writeln!(
            text,
            "<figure>{}<figcaption>Latencies. {}.</figcaption></figure>",
            latencies(group, |ticks| results.host.scale.ns(ticks)),
            prose(&group.load.describe())
        );
    }
    for group in alike {
        if group.load.split {
            text += &split(group);
        }
        let _ = writeln!(
            text,
            "<details><summary>{}: figures</summary>{}</details>",
            prose(&group.load.describe()),
            table(group)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Host;

    #[test]
    fn the_page_is_whole_and_needs_nothing_from_elsewhere() {
        let groups = report::tests::groups();
        let count = groups.len();
        let results = Results {
            groups,
            repetitions: 2,
            host: Host::look(),
        };
        let page = page(&results);
        assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
        for tag in [
            "svg", "figure", "table", "details", "p", "span", "text", "polyline",
        ] {
            let opened =
                page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        // A latency plot a load, and one of throughput for each source of `scale` and of `pause` and each handler of
        // `shared`.
        assert_eq!(page.matches("<figure>").count(), count + 2 + 2 + 5);
        for needle in [
            "<h2>Budget: ",
            "<h2>Why a thread",
            "queued p50",
            ">FAIL<",
            ">pass<",
        ] {
            assert!(page.contains(needle), "{needle}");
        }
        assert!(!page.contains("NaN") && !page.contains("inf\""));
        for outside in ["<script", "src=", "href=", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        let without_namespace = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!without_namespace.contains("http"));
    }
}
