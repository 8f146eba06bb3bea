//! Virtio devices: the register side is a quick device like any other, and each queue is an actor with a thread.
//!
//! ```text
//!   vCPU ──access──▶ register side ──start, ring, stop──▶ queue's actor ──▶ host file, random source, …
//!    ▲               (mmio.rs, registers.rs)   (queue.rs)      │
//!    │                      ▲────────news, when by message─────┤
//!    └──────────irqfd───────────────(interrupt.rs)─────────────┘
//! ```
//!
//! | question | file |
//! |---|---|
//! | status, features, queues: what any transport has | `registers.rs` |
//! | virtio-mmio's registers | `mmio.rs` |
//! | a queue's actor | `queue.rs` |
//! | who may touch guest memory, and how it is taken back | `lease.rs` |
//! | descriptor chains from a guest, and back | `chain.rs`, `used.rs` |
//! | interrupts by irqfd | `interrupt.rs` |
//! | the devices | `rng.rs`, `block/` |
//! | what the user says, and what is opened for it | `config.rs` |
//!
//! [VIRTIO 1.2] is <https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html>.

pub mod block;
pub mod chain;
pub mod complaints;
pub mod config;
#[cfg(test)]
mod hostile;
pub mod interrupt;
pub mod lease;
pub mod mmio;
pub mod queue;
pub mod registers;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod used;

/// The most that is copied between guest memory and a queue's own buffer in one touch, bytes. Larger costs memory a
/// queue and time when a reset has to wait for it, smaller costs system calls.
pub const CHUNK_BYTES: usize = 128 << 10;

/// How long a queue is, descriptors. As other VMMs have it; a power of 2.
pub const QUEUE_SIZE: u16 = 256;

pub use crate::devices::{BackendEvent, BackendNews};

/// How the driver's and the device's notifications travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub enum Notify {
    /// Queue notifications by ioeventfd, interrupts by irqfd: neither leaves the kernel.
    #[default]
    EventFd,
    /// Both through the register side, as messages.
    Message,
}

impl std::str::FromStr for Notify {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "eventfd" => Ok(Notify::EventFd),
            "message" => Ok(Notify::Message),
            _ => Err(format!(
                "'{text}' is no way to notify; there are eventfd and message"
            )),
        }
    }
}
