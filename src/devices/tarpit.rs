//! Tarpit: a port whose reads do not return. For tests of everything else: what the machine does around a device whose
//! handler blocks for ever, which no device of ours should. Only with the hidden flag `--test-tarpit`.
//!
//! **A hostile guest** that has it can stop its own vCPUs, as it can by a loop.

use super::{Access, Claim, Context, Device};
use crossbeam_channel::{Receiver, Sender, bounded};

/// What to claim, as offsets from the base port.
pub const CLAIMS: &[Claim] = &[Claim::new(0, 1)];

/// What a read returns once it does.
pub const RELEASED: u8 = 0x42;

/// What keeps reads from returning.
#[derive(Clone, Debug)]
pub struct Mire(Receiver<()>);

impl Mire {
    /// One that lets go when the sender is dropped.
    pub fn new() -> (Sender<()>, Mire) {
        let (release, stuck) = bounded(0);
        (release, Mire(stuck))
    }

    /// One that never lets go.
    pub fn endless() -> Mire {
        Mire(crossbeam_channel::never())
    }
}

/// The port; it has no state but what keeps it.
pub struct Tarpit(Mire);

impl Tarpit {
    /// A port.
    pub fn new(mire: Mire) -> Tarpit {
        Tarpit(mire)
    }
}

impl Device for Tarpit {
    fn name(&self) -> &'static str {
        "tarpit"
    }

    fn read(&mut self, _cx: &mut dyn Context, _access: Access) -> u64 {
        // What comes is that the sender is gone.
        let _ = self.0.0.recv();
        RELEASED.into()
    }

    fn write(&mut self, _cx: &mut dyn Context, _access: Access, _value: u64) {}

    fn reset(&mut self, _cx: &mut dyn Context) {}
}
