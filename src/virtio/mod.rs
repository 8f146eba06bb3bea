//! Virtio devices: the register side is a quick device like any other, and each queue is an actor with a thread.
//!
//! ```text
//!   vCPU ──access──▶ register side ──start, ring, stop──▶ queue's actor ──▶ host file, random source, …
//!    ▲             (mmio.rs or pci/, registers.rs) (queue.rs)   │
//!    │                      ▲────────news, when by message─────┤
//!    └──────────irqfd───────────────(interrupt.rs)─────────────┘
//! ```
//!
//! | question | file |
//! |---|---|
//! | status, features, queues: what any transport has | `registers.rs` |
//! | virtio-mmio's registers | `mmio.rs` |
//! | virtio-pci: a function of [`crate::pci`]'s bus | `pci/` |
//! | a queue's actor | `queue.rs` |
//! | who may touch guest memory, and how it is taken back | `lease.rs` |
//! | bytes straight between a file and guest memory | `straight.rs` |
//! | rate limits, around any handler | `limit.rs` |
//! | descriptor chains from a guest, and back | `chain.rs`, `used.rs` |
//! | interrupts that queues' actors raise themselves | `interrupt.rs` |
//! | the devices | `rng.rs`, `block/`, `net/`, `vsock/`, `balloon/`, `console/`, `share/` |
//! | a program beside us that serves one | `program.rs` |
//! | what the user says, and what is opened for it | `config.rs`, `keys.rs` |
//!
//! [VIRTIO 1.2] is <https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html>.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod complaints;
pub mod config;
pub mod console;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod hostile;
pub mod interrupt;
pub mod keys;
pub mod lease;
pub mod limit;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod program;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod share;
pub mod straight;
#[cfg(any(test, fuzzing))]
pub(crate) mod subjects;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
pub mod used;
pub mod vsock;

/// The most that is copied between guest memory and a queue's own buffer in one touch, bytes. Larger costs memory a
/// queue and time when a reset has to wait for it, smaller costs system calls.
pub const CHUNK_BYTES: usize = 128 << 10;

/// How long a queue is, descriptors. As other VMMs have it; a power of 2.
pub const QUEUE_SIZE: u16 = 256;

pub use crate::devices::{BackendEvent, BackendNews, Queues};

/// How the driver's and the device's notifications travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub enum Notify {
    /// Queue notifications by ioeventfd, interrupts by irqfd: neither leaves the kernel.
    #[default]
    EventFd,
    /// Both through the register side, as messages.
    Message,
}

/// How a driver finds a device and gets at its registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub enum Transport {
    /// virtio-mmio: a page of registers each, described in the DSDT.
    #[default]
    Mmio,
    /// virtio-pci: a function each on a PCI bus.
    Pci,
}

impl std::str::FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "mmio" => Ok(Transport::Mmio),
            "pci" => Ok(Transport::Pci),
            _ => Err(format!("'{text}' is no transport; there are mmio and pci")),
        }
    }
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
