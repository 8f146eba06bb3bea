//! Log lines that a guest can cause: a few at once, then one in a while.

use slog::{Logger, warn};
use std::fmt;
use std::time::{Duration, Instant};

const BURST: u32 = 4;
const REFILL: Duration = Duration::from_secs(10);

/// The lines of one source.
pub struct Complaints {
    log: Logger,
    left: u32,
    refilled: Option<Instant>,
    unsaid: u64,
}

impl Complaints {
    /// To this log.
    pub fn new(log: Logger) -> Complaints {
        Complaints {
            log,
            left: BURST,
            refilled: None,
            unsaid: 0,
        }
    }

    /// Logs a warning, or counts it.
    pub fn say(&mut self, line: fmt::Arguments<'_>) {
        match self.may(Instant::now()) {
            Some(0) => warn!(self.log, "{line}"),
            Some(unsaid) => warn!(self.log, "{line} ({unsaid} like this were not logged)"),
            None => {}
        }
    }

    /// Whether a line may be logged, and how many were not since the last.
    fn may(&mut self, now: Instant) -> Option<u64> {
        if self.left == 0 {
            if self
                .refilled
                .is_some_and(|then| now.duration_since(then) < REFILL)
            {
                self.unsaid += 1;
                return None;
            }
            self.left = 1;
        }
        self.left -= 1;
        self.refilled = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_in_a_while_with_the_count_of_the_others() {
        let mut complaints = Complaints::new(Logger::root(slog::Discard, slog::o!()));
        let start = Instant::now();
        let said = (0..1000).filter(|_| complaints.may(start).is_some()).count();
        assert_eq!(said, BURST as usize);
        assert_eq!(complaints.may(start + REFILL / 2), None);
        assert_eq!(complaints.may(start + REFILL), Some(1000 - u64::from(BURST) + 1));
        assert_eq!(complaints.may(start + REFILL), None);
    }
}
