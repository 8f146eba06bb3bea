//! The lock baselines, and the textbook channels: the disciplines that the actors are compared with.
//!
//! They drive the same devices in the same machine (`--dispatch`), and are meant to be as good as what they stand
//! for: a lock where the original has one, nothing else in between.
//!
//! | discipline | stands for | file |
//! |---|---|---|
//! | `big-lock` | QEMU: one mutex taken when KVM_RUN returns, before the exit is looked at, held through the handler; the event loop serves its callbacks under it | `big_lock.rs` |
//! | `device-lock` | Firecracker, Cloud Hypervisor: the table of ranges behind an RwLock, each device behind a mutex, both held through the handler | `device_lock.rs` |
//! | `channel` | actors out of a textbook: a thread a device, a request and a reply over channels | `channel.rs` |
//!
//! The lock ones come with std's mutex and with parking_lot's. This is the only module where lock types are allowed.
#![allow(
    clippy::disallowed_types,
    reason = "this is what the actors are compared with"
)]

pub mod big_lock;
pub mod channel;
pub mod device_lock;
pub mod mutex;
