//! What a virtio function's configuration space and BAR have where. [VIRTIO 1.2 §4.1.2, §4.1.4]
//!
//! ```text
//!  BAR 0, 32 KiB   0x0000  common configuration       0x3000  notifications, 4 bytes a queue
//!                  0x1000  interrupt status           0x4000  MSI-X table
//!                  0x2000  device configuration       0x5000  MSI-X pending bits
//! ```
//!
//! A page each, so that a guest can map each by itself.

use crate::pci::config::{ConfigSpace, Identity as PciIdentity};
use crate::pci::msix::{ENTRY_BYTES, control};
use crate::virtio::registers::Identity;
use std::ops::Range;

/// How large the BAR is.
pub const BAR_BYTES: u64 = 0x8000;

/// Common configuration: without what belongs to features that are not offered (queue reset, notification data).
pub const COMMON: Range<u64> = 0..0x38;
/// Interrupt status.
pub const ISR: u64 = 0x1000;
/// Device configuration.
pub const DEVICE: Range<u64> = 0x2000..0x3000;
/// Notifications.
pub const NOTIFY: u64 = 0x3000;
/// How far apart queues' notification registers are, bytes.
pub const NOTIFY_STEP: u64 = 4;
/// MSI-X table.
pub const TABLE: u64 = 0x4000;
/// MSI-X pending bits.
pub const PENDING: u64 = 0x5000;

/// Capability ids. [PCI 3.0 appendix H]
const VENDOR_SPECIFIC: u8 = 0x09;
const MSI_X: u8 = 0x11;

/// What a virtio capability leads to. [VIRTIO 1.2 §4.1.4]
mod kind {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI_CONFIG: u8 = 5;
}

/// Where what a guest writes in the capabilities is found again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Places {
    /// The capability for access to the BAR by the configuration space: the BAR's number at +4, offset at +8, length at
    /// +12, data at +16. [VIRTIO 1.2 §4.1.4.9]
    pub window: usize,
    /// That of MSI-X: the control register at +2.
    pub msix: usize,
}

/// Red Hat, who keeps the numbers of virtio devices.
const VENDOR: u16 = 0x1af4;
/// A device's number is this and its type. [VIRTIO 1.2 §4.1.2.1]
const FIRST_DEVICE: u16 = 0x1040;
/// A device that is not transitional has at least this.
const SUBSYSTEM: u16 = 0x40;

/// Class codes, as drivers of other things look for them. [PCI 3.0 appendix D]
fn class(device_type: u32) -> [u8; 3] {
    match device_type {
        // Network: Ethernet; vsock: other.
        1 => [2, 0, 0],
        19 => [2, 0x80, 0],
        // Mass storage: other.
        2 | 26 => [1, 0x80, 0],
        // Communication: other.
        3 => [7, 0x80, 0],
        _ => [0xff, 0, 0],
    }
}

/// The configuration space of a device with so many interrupt sources, whose BAR is at an address at power-on.
pub fn config_space(identity: &Identity, vectors: usize, address: u64) -> (ConfigSpace, Places) {
    let mut space = ConfigSpace::new(&PciIdentity {
        vendor: VENDOR,
        device: FIRST_DEVICE + identity.device_type as u16,
        revision: 1,
        class: class(identity.device_type),
        subsystem: [VENDOR, SUBSYSTEM],
        pin: true,
    })
    .with_bar(BAR_BYTES, address);
    let mut add = |kind, offset: u64, bytes: u64, more: &[u8], writable: &[u8]| {
        let length = 16 + more.len() as u8;
        let mut body = vec![length, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((bytes as u32).to_le_bytes());
        body.extend(more);
        let mut mask = vec![0; body.len()];
        mask[..writable.len()].copy_from_slice(writable);
        space.add_capability(VENDOR_SPECIFIC, &body, &mask)
    };
    add(kind::COMMON, COMMON.start, COMMON.end, &[], &[]);
    let step = (NOTIFY_STEP as u32).to_le_bytes();
    add(
        kind::NOTIFY,
        NOTIFY,
        NOTIFY_STEP * identity.queues as u64,
        &step,
        &[],
    );
    add(kind::ISR, ISR, 1, &[], &[]);
    if !identity.configuration.is_empty() {
        add(
            kind::DEVICE,
            DEVICE.start,
            identity.configuration.len() as u64,
            &[],
            &[],
        );
    }
    // BAR, offset, length and data are the driver's.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    let window = add(kind::PCI_CONFIG, 0, 0, &[0; 4], &writable);

    let mut body = (vectors as u16 - 1).to_le_bytes().to_vec();
    body.extend((TABLE as u32).to_le_bytes());
    body.extend((PENDING as u32).to_le_bytes());
    let mut writable = [0; 10];
    writable[..2].copy_from_slice(&(control::ENABLE | control::MASK_ALL).to_le_bytes());
    debug_assert!(TABLE + ENTRY_BYTES * vectors as u64 <= PENDING);
    let msix = space.add_capability(MSI_X, &body, &writable);
    (space, Places { window, msix })
}
