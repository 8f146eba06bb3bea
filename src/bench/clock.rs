//! Time for measurements: the processor's time-stamp counter, whose read costs less than most of what is measured.

use std::arch::x86_64::{_mm_lfence, _rdtsc};
use std::time::{Duration, Instant};

/// The counter now. Everything before is done when it is read, and nothing after has begun.
#[inline]
pub fn ticks() -> u64 {
    // SAFETY: LFENCE and RDTSC read and write no memory, and every x86-64 processor has them.
    unsafe {
        _mm_lfence();
        let now = _rdtsc();
        _mm_lfence();
        now
    }
}

/// What a tick is, and what looking costs.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    ns_per_tick: f64,
    /// Ticks that an interval with nothing in it takes; subtracted from each latency.
    pub overhead: u64,
}

impl Scale {
    /// Compares the counter with the host's monotonic clock for 50 ms, and takes the median of empty intervals.
    pub fn calibrate() -> Scale {
        let (clock, counter) = (Instant::now(), ticks());
        std::thread::sleep(Duration::from_millis(50));
        let (elapsed, counted) = (clock.elapsed(), ticks().wrapping_sub(counter));
        let mut empty: Vec<u64> = (0..10_001)
            .map(|_| {
                let start = ticks();
                ticks().wrapping_sub(start)
            })
            .collect();
        empty.sort_unstable();
        Scale {
            ns_per_tick: elapsed.as_nanos() as f64 / counted as f64,
            overhead: empty[empty.len() / 2],
        }
    }

    /// Ticks as nanoseconds.
    pub fn ns(&self, ticks: f64) -> f64 {
        ticks * self.ns_per_tick
    }

    /// Nanoseconds as ticks.
    pub fn ticks(&self, ns: u64) -> u64 {
        (ns as f64 / self.ns_per_tick) as u64
    }
}

/// Keeps the processor busy for so many ticks of wall-clock time. 0: for none.
#[inline]
pub fn spin(duration: u64) {
    if duration > 0 {
        let start = ticks();
        while ticks().wrapping_sub(start) < duration {
            std::hint::spin_loop();
        }
    }
}

/// Whether the counter runs at one speed on all processors, whatever they do.
pub fn is_steady() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    ["constant_tsc", "nonstop_tsc"]
        .iter()
        .all(|flag| flags.split_ascii_whitespace().any(|word| word == *flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_goes_both_ways_and_a_spin_lasts() {
        let scale = Scale::calibrate();
        let back = scale.ns(scale.ticks(1_000_000) as f64);
        assert!((back - 1e6).abs() < 100.0, "{back}");
        let start = ticks();
        spin(scale.ticks(20_000));
        assert!(ticks() - start >= scale.ticks(20_000));
    }
}
