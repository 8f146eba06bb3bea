//! Plots as inline SVG: latencies, and throughput against vCPUs.

use super::contestant::Contestant;
use super::html::escape;
use super::report::{self, Group, Row, show_ns, show_rate};
use super::stats::estimate;
use crate::actors::PlacementKind;
use crate::machine::dispatch::{Dispatch, MutexKind};
use std::fmt::Write;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 360.0;
/// Around the area of a plot: left, top, right, bottom.
const MARGIN: (f64, f64, f64, f64) = (64.0, 14.0, 28.0, 48.0);

/// Colour and dashes. Colours of Okabe and Ito, which the colour-blind can tell apart; the same discipline with another
/// mutex or option is dashed.
fn style(who: Contestant) -> (&'static str, &'static str) {
    let (dispatch, placement) = match who {
        Contestant::Discipline { dispatch, placement } => (dispatch, placement),
        Contestant::Run(dispatch) => (dispatch, PlacementKind::Handoff),
        Contestant::Bare => return ("#000000", "2 3"),
        Contestant::Program(_) => return ("#E69F00", ""),
    };
    match (dispatch, placement) {
        (Dispatch::Actor, PlacementKind::Handoff) => ("#0072B2", ""),
        (Dispatch::Actor, _) => ("#0072B2", "6 3"),
        (Dispatch::Channel { spin: false }, _) => ("#CC79A7", ""),
        (Dispatch::Channel { spin: true }, _) => ("#CC79A7", "6 3"),
        (Dispatch::DeviceLock(MutexKind::Std), _) => ("#009E73", ""),
        (Dispatch::DeviceLock(MutexKind::ParkingLot), _) => ("#009E73", "6 3"),
        (Dispatch::BigLock(MutexKind::Std), _) => ("#D55E00", ""),
        (Dispatch::BigLock(MutexKind::ParkingLot), _) => ("#D55E00", "6 3"),
    }
}

/// A value on an axis, and its label.
type Mark = (f64, String);

/// An axis: where a value is between its ends.
struct Axis {
    low: f64,
    high: f64,
    /// Pixels of its ends.
    from: f64,
    to: f64,
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let part = (value - self.low) / (self.high - self.low);
        self.from + part.clamp(0.0, 1.0) * (self.to - self.from)
    }
}

fn axes(x: (f64, f64), y: (f64, f64)) -> (Axis, Axis) {
    let (left, top, right, bottom) = MARGIN;
    let x = Axis {
        low: x.0,
        high: x.1,
        from: left,
        to: WIDTH - right,
    };
    let y = Axis {
        low: y.0,
        high: y.1,
        from: HEIGHT - bottom,
        to: top,
    };
    (x, y)
}

/// Frame, grid and labels.
fn frame(svg: &mut String, x: &Axis, y: &Axis, ticks: (&[Mark], &[Mark]), labels: (&str, &str)) {
    let _ = write!(
        svg,
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" xmlns=\"http://www.w3.org/2000/svg\">"
    );
    let (bottom, top, left, right) = (y.from, y.to, x.from, x.to);
    for (value, label) in ticks.0 {
        let px = x.at(*value);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{px:.1}\" y1=\"{bottom:.1}\" x2=\"{px:.1}\" y2=\"{top:.1}\"/>\
             <text x=\"{px:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            bottom + 16.0
        );
    }
    for (value, label) in ticks.1 {
        let py = y.at(*value);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{left:.1}\" y1=\"{py:.1}\" x2=\"{right:.1}\" y2=\"{py:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            left - 6.0,
            py + 4.0
        );
    }
    let middle = (bottom + top) / 2.0;
    let _ = write!(
        svg,
        "<rect class=\"frame\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text transform=\"translate(14 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        right - left,
        bottom - top,
        (left + right) / 2.0,
        HEIGHT - 8.0,
        labels.0,
        labels.1
    );
}

fn line(svg: &mut String, points: &[(f64, f64)], who: Contestant) {
    let (colour, dashes) = style(who);
    let list: String = points.iter().map(|(x, y)| format!("{x:.1},{y:.1} ")).collect();
    let _ = write!(
        svg,
        "<polyline points=\"{}\" stroke=\"{colour}\" stroke-dasharray=\"{dashes}\"><title>{}</title></polyline>",
        list.trim_end(),
        escape(&who.to_string())
    );
}

/// Latencies of a group: how many of all accesses took at most so long. The percentile grows by a nine a step, so that
/// the tail is as wide as the rest.
pub(super) fn latencies(group: &Group, ns: impl Fn(f64) -> f64) -> String {
    const NINES: f64 = 4.0;
    // 80 points from the shortest to the 99.99th percentile.
    let nines = || (0..=80).map(|n| f64::from(n) * NINES / 80.0);
    let curve = |series: &report::Series| -> Vec<(f64, f64)> {
        nines()
            .map(|nines| {
                let quantile = 1.0 - 10f64.powf(-nines);
                let value = ns(series.latency.value_at_quantile(quantile) as f64);
                (value.max(1.0).log10(), nines)
            })
            .collect()
    };
    let curves: Vec<_> = group.series.iter().map(|s| (s.who, curve(s))).collect();
    let all = || {
        curves
            .iter()
            .flat_map(|(_, points)| points.iter().map(|(x, _)| *x))
    };
    let low = all().fold(f64::INFINITY, f64::min).floor();
    let high = all().fold(low + 1.0, f64::max).ceil();
    let (x, y) = axes((low, high), (0.0, NINES));
    let decades: Vec<_> = (low as i32..=high as i32)
        .map(|decade| {
            let label = show_ns(10f64.powi(decade)).replace(".00", "").replace(".0 ", " ");
            (f64::from(decade), label.replace("us", "µs"))
        })
        .collect();
    let percentiles = [
        (0.0, "min"),
        (0.5f64.recip().log10(), "50"),
        (1.0, "90"),
        (2.0, "99"),
        (3.0, "99.9"),
        (4.0, "99.99"),
    ]
    .map(|(nines, label)| (nines, label.to_string()));
    let mut svg = String::new();
    let labels = ("latency of an access", "percentile of accesses");
    frame(&mut svg, &x, &y, (&decades, &percentiles), labels);
    // Ours last, on top.
    for (who, points) in curves.iter().rev() {
        let points: Vec<_> = points.iter().map(|(v, n)| (x.at(*v), y.at(*n))).collect();
        line(&mut svg, &points, *who);
    }
    svg + "</svg>"
}

/// A step of 1, 2 or 5 times a power of ten, so that about five fit.
fn nice_step(most: f64) -> f64 {
    let rough = (most / 5.0).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|step| step * power >= rough);
    step.unwrap_or(10.0) * power
}

/// Throughput against vCPUs, with the intervals as bars.
pub(super) fn throughput(groups: &[&Group]) -> String {
    let rate = |row: &Row| row.ops_per_s / 1e6;
    let most = groups
        .iter()
        .flat_map(|group| &group.series)
        .map(|series| estimate(&series.values(rate)).high)
        .fold(0.0, f64::max);
    let vcpus: Vec<f64> = groups.iter().map(|group| group.load.vcpus as f64).collect();
    let (low, high) = (vcpus[0].log2(), vcpus[vcpus.len() - 1].log2());
    let step = nice_step(most);
    let top = (most / step).ceil().max(1.0) * step;
    let (x, y) = axes((low - 0.15, high + 0.15), (0.0, top));
    let across: Vec<_> = vcpus.iter().map(|n| (n.log2(), n.to_string())).collect();
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    let up: Vec<_> = (0..=(top / step).round() as i32)
        .map(|n| (f64::from(n) * step, format!("{:.decimals$}", f64::from(n) * step)))
        .collect();
    let mut svg = String::new();
    let labels = ("vCPUs", "accesses, millions a second");
    frame(&mut svg, &x, &y, (&across, &up), labels);
    for n in (0..groups[0].series.len()).rev() {
        let who = groups[0].series[n].who;
        let mut points = Vec::new();
        for group in groups {
            let e = estimate(&group.series[n].values(rate));
            let px = x.at((group.load.vcpus as f64).log2());
            points.push((px, y.at(e.median)));
            let _ = write!(
                svg,
                "<line x1=\"{px:.1}\" y1=\"{:.1}\" x2=\"{px:.1}\" y2=\"{:.1}\" stroke=\"{}\"/>\
                 <circle cx=\"{px:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{}\"><title>{}: {}</title></circle>",
                y.at(e.low),
                y.at(e.high),
                style(who).0,
                y.at(e.median),
                style(who).0,
                escape(&who.to_string()),
                show_rate(e.median * 1e6)
            );
        }
        line(&mut svg, &points, who);
    }
    svg + "</svg>"
}

pub(super) fn key(group: &Group) -> String {
    let mut text = String::from("<p class=\"key\">");
    for series in &group.series {
        let (colour, dashes) = style(series.who);
        let _ = write!(
            text,
            "<span><svg width=\"34\" height=\"10\"><line x1=\"0\" y1=\"5\" x2=\"34\" y2=\"5\" stroke=\"{colour}\" \
             stroke-dasharray=\"{dashes}\" stroke-width=\"2\"/></svg> {}</span>",
            escape(&series.who.to_string())
        );
    }
    text + "</p>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        for (most, step) in [(36.0, 10.0), (4.9, 1.0), (0.07, 0.02), (100.0, 20.0)] {
            assert!(
                (nice_step(most) - step).abs() < step * 1e-9,
                "{most}: {}",
                nice_step(most)
            );
        }
    }
}
