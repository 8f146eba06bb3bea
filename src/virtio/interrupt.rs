//! The interrupt of a device whose queues' actors raise it themselves (`--notify eventfd`): a word that both sides
//! know, and an irqfd.
//!
//! InterruptStatus [VIRTIO 1.2 §4.2.2] has to be set before the guest's handler reads it, and the handler runs as soon
//! as the irqfd is written, so no message to the register side could be in time. The word is therefore published: the
//! actors set bits, the register side clears what the driver acknowledges. The line is edge-triggered, one edge for
//! each bit that goes from 0 to 1. A bit that is set already has an edge behind it whose acknowledgement is still to
//! come, and a driver looks at its rings after it has acknowledged, so that one will do.
//!
//! # Orderings
//!
//! `raise` is `Release`: what is in the used ring by then is seen by whoever acknowledges the bit (`acknowledge` is
//! `AcqRel`, and the exit and entry of the guest around it order the rest).

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

#[cfg(test)]
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
