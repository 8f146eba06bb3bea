//! The interrupt of a device whose queues' actors raise it themselves (`--notify eventfd`).
//!
//! # virtio-mmio: a word that both sides know, and an irqfd
//!
//! InterruptStatus [VIRTIO 1.2 §4.2.2] has to be set before the guest's handler reads it, and the handler runs as soon
//! as the irqfd is written, so no message to the register side could be in time. The word is therefore published: the
//! actors set bits, the register side clears what the driver acknowledges. The line is edge-triggered, one edge for
//! each bit that goes from 0 to 1. A bit that is set already has an edge behind it whose acknowledgement is still to
//! come, and a driver looks at its rings after it has acknowledged, so that one will do.
//!
//! # virtio-pci: an eventfd a queue
//!
//! Whether it is an irqfd now, and of which interrupt, is the register side's: it takes it from KVM while the queue's
//! vector is masked, and then the eventfd's own count is the pending bit (`pci/vectors.rs`). The queue's actor writes to it
//! and knows nothing of that. But without MSI-X there is no such eventfd: the line is a level, which is a function of the
//! register side's state, so the actor has to send a message. Which of the two it is, is a published word. When the driver
//! changes it while queues are served, an actor may have looked at the word before and told nobody the new way; so the
//! register side, after the change, tells the driver of all queues itself. Drivers know interrupts without a reason.
//!
//! # Orderings
//!
//! `raise` is `Release`: what is in the used ring by then is seen by whoever acknowledges the bit (`acknowledge` is
//! `AcqRel`, and the exit and entry of the guest around it order the rest).
//!
//! The word of MSI-X is read after a fence (`SeqCst`) behind the write to the used ring, and written before one that is
//! before the interrupt to all: either the actor sees the new word, or what it wrote to the ring is seen by who is told.

use crate::actors::sync::{AtomicBool, fence};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// A buffer was used. [VIRTIO 1.2 §4.2.2: InterruptStatus]
pub const USED: u32 = 1;
/// The configuration, or the status by the device's own doing, has changed.
pub const CONFIGURATION: u32 = 2;

/// The word and the irqfd.
#[derive(Clone)]
pub struct Latch {
    status: Arc<AtomicU32>,
    edge: Arc<EventFd>,
}

impl Latch {
    /// With an irqfd.
    pub fn new(edge: EventFd) -> Latch {
        Latch {
            status: Arc::new(AtomicU32::new(0)),
            edge: Arc::new(edge),
        }
    }

    /// Sets a bit and tells the guest, unless it has been told of it and has not acknowledged yet.
    pub fn raise(&self, bit: u32) {
        if self.status.fetch_or(bit, Ordering::Release) & bit == 0 {
            // Fails only when 2^64 - 2 edges are pending.
            let _ = self.edge.write(1);
        }
    }

    /// What is set.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The driver has seen these.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }
}

/// Whether a device's queues signal by MSI-X. The register side writes, queues' actors read.
pub struct MsixWord(AtomicBool);

impl MsixWord {
    /// Off.
    pub fn new() -> MsixWord {
        MsixWord(AtomicBool::new(false))
    }

    /// The driver has switched MSI-X on or off. From when this returns, whoever does not see it has written to the used
    /// ring before; the driver has to be told of all queues.
    pub fn set(&self, enabled: bool) {
        self.0.store(enabled, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// How to tell the driver of what is in the used ring by now.
    pub fn is_on(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed)
    }
}

impl Default for MsixWord {
    fn default() -> Self {
        MsixWord::new()
    }
}

/// How a queue's actor tells the driver.
#[derive(Clone)]
pub enum Interrupter {
    /// virtio-mmio.
    Latch(Latch),
    /// virtio-pci: the queue's eventfd.
    Msix {
        /// Whether it is used.
        word: Arc<MsixWord>,
        /// What is written to.
        signal: Arc<EventFd>,
    },
}

impl Interrupter {
    /// A buffer was used. `false`: the register side has to be told, as nobody else can tell the driver.
    pub fn used(&self) -> bool {
        match self {
            Interrupter::Latch(latch) => latch.raise(USED),
            Interrupter::Msix { word, .. } if !word.is_on() => return false,
            // Fails only when 2^64 - 2 signals wait.
            Interrupter::Msix { signal, .. } => drop(signal.write(1)),
        }
        true
    }

    /// The configuration has changed. `false`: as above; a queue has no eventfd for that.
    pub fn configuration(&self) -> bool {
        if let Interrupter::Latch(latch) = self {
            latch.raise(CONFIGURATION);
        }
        matches!(self, Interrupter::Latch(_))
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::actors::sync::AtomicU64;
    use loom::sync::Arc;

    /// A queue's actor writes to the used ring and signals; the driver switches MSI-X off and looks at what it is told.
    #[test]
    fn loom_a_driver_that_switches_is_told_of_what_was_used() {
        loom::model(|| {
            let word = Arc::new(MsixWord::new());
            word.set(true);
            let ring = Arc::new(AtomicU64::new(0));
            let (its_word, its_ring) = (word.clone(), ring.clone());
            let actor = loom::thread::spawn(move || {
                its_ring.store(1, Ordering::Relaxed);
                // `true`: by the eventfd, which nobody listens to any more.
                its_word.is_on()
            });
            word.set(false);
            // The interrupt to all: the driver looks at the ring.
            let seen = ring.load(Ordering::Relaxed) == 1;
            let lost_signal = actor.join().unwrap();
            assert!(seen || !lost_signal);
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn each_bit_that_comes_is_one_edge_and_one_that_is_there_is_none() {
        let eventfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let edges = eventfd.try_clone().unwrap();
        let latch = Latch::new(eventfd);
        latch.raise(USED);
        latch.raise(USED);
        assert_eq!(edges.read().unwrap(), 1);
        // The other bit comes while the first is not acknowledged: the driver may have read the status already.
        latch.raise(CONFIGURATION);
        assert_eq!(edges.read().unwrap(), 1);
        latch.acknowledge(USED);
        assert_eq!(latch.status(), CONFIGURATION);
        latch.raise(USED);
        assert_eq!(edges.read().unwrap(), 1);
        latch.acknowledge(!0);
        assert_eq!(latch.status(), 0);
        assert!(edges.read().is_err());
    }
}
