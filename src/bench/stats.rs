//! What repetitions say: medians, and intervals that assume no distribution.

/// The median; of an even number the mean of the middle two. `NaN` of nothing.
pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// Which order statistics bound the median, counted from either end, and how sure that is: the narrowest interval of at
/// least 95 %, or the whole range where that is less. Of `n` independent values `k` or fewer are below the median with
/// the probability of `k` or fewer heads in `n` throws.
pub fn interval_rank(n: usize) -> (usize, f64) {
    let mut best = (0, 0.0);
    // Probability of exactly k heads, and of fewer.
    let (mut exactly, mut below) = (0.5f64.powi(n as i32), 0.0);
    for k in 0..n.div_ceil(2) {
        below += exactly;
        exactly *= (n - k) as f64 / (k + 1) as f64;
        let confidence = 1.0 - 2.0 * below;
        if k == 0 || confidence >= 0.95 {
            best = (k, confidence.max(0.0));
        } else {
            break;
        }
    }
    best
}

/// A median with its interval.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// Lower bound.
    pub low: f64,
    /// Upper bound.
    pub high: f64,
}

/// Of values of which there is at least one.
pub fn estimate(values: &[f64]) -> Estimate {
    let sorted = sorted(values);
    let (rank, _) = interval_rank(sorted.len());
    Estimate {
        median: median(values),
        low: sorted.get(rank).copied().unwrap_or(f64::NAN),
        high: sorted
            .len()
            .checked_sub(1 + rank)
            .map_or(f64::NAN, |at| sorted[at]),
    }
}

/// Numbers in a random order, the same for the same seed.
pub fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    // SplitMix64.
    let mut state = seed;
    for last in (1..n).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        order.swap(last, ((z ^ (z >> 31)) % (last as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn intervals_are_those_of_the_sign_test() {
        // From tables of the sign test.
        for (n, rank, confidence) in [
            (1, 0, 0.0),
            (5, 0, 0.9375),
            (6, 0, 0.96875),
            (9, 1, 0.960_937_5),
            (20, 5, 0.958_610_5),
        ] {
            let (r, c) = interval_rank(n);
            assert_eq!(r, rank, "{n}");
            assert!((c - confidence).abs() < 1e-6, "{n}: {c}");
        }
    }

    #[test]
    fn an_estimate_holds_its_median() {
        let e = estimate(&[5.0, 1.0, 4.0, 2.0, 3.0]);
        assert_eq!((e.low, e.median, e.high), (1.0, 3.0, 5.0));
        let one = estimate(&[2.0]);
        assert_eq!((one.low, one.median, one.high), (2.0, 2.0, 2.0));
    }

    #[test]
    fn shuffles_are_permutations_that_depend_on_the_seed() {
        let mut order = shuffled(8, 1);
        assert_ne!(order, shuffled(8, 2));
        order.sort_unstable();
        assert_eq!(order, (0..8).collect::<Vec<_>>());
        assert!(shuffled(0, 1).is_empty());
    }
}
