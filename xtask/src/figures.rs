//! A line of figures: how long accesses took. A guest prints it, the harness shows it, and a bench reads it.

use std::fmt;

/// Times of many accesses, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spread {
    pub name: String,
    pub count: u64,
    pub p50: u64,
    pub p99: u64,
    pub p999: u64,
    pub max: u64,
}

impl Spread {
    /// Sorts the times. There has to be one at least.
    pub fn of(name: &str, times: &mut [u64]) -> Self {
        times.sort_unstable();
        let last = times.len() - 1;
        let at = |thousandth: usize| times[(times.len() * thousandth / 1000).min(last)];
        Self {
            name: name.to_owned(),
            count: times.len() as u64,
            p50: at(500),
            p99: at(990),
            p999: at(999),
            max: times[last],
        }
    }

    /// What [`Display`](fmt::Display) writes; `None` for any other text.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let name = words.next()?.to_owned();
        let mut number = |label: &str| {
            let (name, value) = words.next()?.split_once('=')?;
            if name == label { value.parse().ok() } else { None }
        };
        Some(Self {
            name,
            count: number("accesses")?,
            p50: number("p50_ns")?,
            p99: number("p99_ns")?,
            p999: number("p999_ns")?,
            max: number("max_ns")?,
        })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            count,
            p50,
            p99,
            p999,
            max,
        } = self;
        write!(
            f,
            "{name} accesses={count} p50_ns={p50} p99_ns={p99} p999_ns={p999} max_ns={max}"
        )
    }
}

/// What one operation takes on average, or at a percentile. Less is better.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Without a blank or `=`.
    pub name: String,
    pub nanos: u64,
}

impl Cost {
    /// What [`Display`](fmt::Display) writes; `None` for any other text.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, value) = text.split_once(' ')?;
        Some(Self {
            name: name.to_owned(),
            nanos: value.strip_prefix("ns=")?.parse().ok()?,
        })
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ns={}", self.name, self.nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_read_as_it_was_written() {
        let cost = Cost {
            name: "randread-4k".to_owned(),
            nanos: 17,
        };
        assert_eq!(Cost::parse(&cost.to_string()), Some(cost));
        assert_eq!(Cost::parse("randread-4k ns=x"), None);
    }

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let mut times: Vec<u64> = (1..=2000).rev().collect();
        let spread = Spread::of("slow", &mut times);
        assert_eq!(
            (spread.count, spread.p50, spread.p99, spread.p999, spread.max),
            (2000, 1001, 1981, 1999, 2000)
        );
        assert_eq!(Spread::parse(&spread.to_string()), Some(spread));
        assert_eq!(Spread::parse("7 of 9 slow accesses were waited for"), None);
        assert_eq!(Spread::of("one", &mut [5]).p999, 5);
    }
}
