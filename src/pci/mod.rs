//! PCI: one segment with one bus, behind a host bridge whose decoding is done by whoever makes the access.
//!
//! ```text
//!          0xcf8                   0xcfc, ECAM, windows
//!   vCPU ────────▶ host bridge     vCPU ── decode (published words) ──▶ function's own actor
//!                       │ publishes CF8          ▲
//!                       └────────────────────────┘◀── functions publish where their BARs are
//! ```
//!
//! On a real bus every function sees every access, and the one whose it is answers. Here a vCPU finds the one itself: the
//! number in an ECAM address or in CF8 names the function, and each function publishes where its BAR is (`decode.rs`). So
//! a configuration access and an access to a BAR are messages to the one actor that owns the function, as for any other
//! device, and nothing that all functions share is on the way.
//!
//! | question | file |
//! |---|---|
//! | a function's configuration space | `config.rs` |
//! | who answers | `decode.rs` |
//! | the host bridge | `host_bridge.rs` |
//! | MSI-X | `msix.rs` |
//!
//! What a device actor sees of its accesses: its configuration space from [`CONFIG`] on, its BAR from [`BAR`] on.
//!
//! [PCI 3.0] is the PCI Local Bus Specification 3.0, [PCIe 5.0] the PCI Express Base Specification 5.0.

pub mod config;
pub mod decode;
pub mod host_bridge;
pub mod msix;

/// Devices of a bus; each here has function 0 alone. [PCI 3.0 §3.2.2.3.2]
pub const SLOTS: usize = 32;

/// Bytes of a function's space in ECAM. [PCIe 5.0 §7.2.2]
pub const ECAM_FUNCTION_BYTES: u64 = 0x1000;
/// Bytes of a bus in ECAM: 32 devices of 8 functions.
pub const ECAM_BUS_BYTES: u64 = ECAM_FUNCTION_BYTES * 8 * SLOTS as u64;

/// Where a device actor finds accesses to its configuration space.
pub const CONFIG: u64 = 0x1000;
/// Where the host bridge finds accesses to functions that are not there.
pub const NOWHERE: u64 = 0x2000;
/// Where a device actor finds accesses to its BAR.
pub const BAR: u64 = 0x1_0000;
