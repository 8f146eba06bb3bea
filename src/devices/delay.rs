//! Delay: a port whose accesses take as long as the machine was told, for measurements.
//!
//! It stands for every device whose handler blocks: it sleeps in its own turn, which no other device here does. A machine
//! has it only when it is asked for (`actor-vmm run --delay-port`). A read gives 0; a write is ignored, and takes as long.
//!
//! **A hostile guest** can keep its own vCPUs waiting, and those that wait for this port with them.

use super::{Access, Claim, Context, Device};
use std::time::Duration;

/// What to claim, as offsets from the base port.
pub const CLAIMS: &[Claim] = &[Claim::new(0, 1)];

/// The port; it has no state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delay(Duration);

impl Delay {
    /// A port whose accesses take so long.
    pub fn new(time: Duration) -> Delay {
        Delay(time)
    }
}

impl Device for Delay {
    fn name(&self) -> &'static str {
        "delay"
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        std::thread::sleep(self.0);
        match access.offset {
            0 => 0,
            _ => access.width.all_ones(),
        }
    }

    fn write(&mut self, _cx: &mut dyn Context, _access: Access, _value: u64) {
        std::thread::sleep(self.0);
    }

    fn reset(&mut self, _cx: &mut dyn Context) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Bench;
    use std::time::Instant;

    #[test]
    fn accesses_take_their_time() {
        let time = Duration::from_millis(2);
        let write: fn(&mut Bench<Delay>) = |delay| delay.write(0, 1);
        let read: fn(&mut Bench<Delay>) = |delay| assert_eq!(delay.read(0), 0);
        let mut delay = Bench::new(Delay::new(time));
        for access in [write, read] {
            let start = Instant::now();
            access(&mut delay);
            assert!(start.elapsed() >= time);
        }
    }
}
