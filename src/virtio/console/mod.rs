//! virtio-console: a console that the guest writes to in pieces instead of characters, and ports for programs. Two
//! devices of the same type. [VIRTIO 1.2 §5.3]
//!
//! | question | file |
//! |---|---|
//! | the console's queues | `terminal.rs` |
//! | how large the terminal is | `size.rs` |
//! | ports | `ports/` |
//!
//! The console (`--console virtio`) is a device without VIRTIO_CONSOLE_F_MULTIPORT: two queues, and the terminal's size in
//! the configuration space. Ports (`--port`) are another, and none of them is a console: it would be told its size by a
//! message whose two fields Linux read in the wrong order until 2025, and no device can know which Linux it has.
//!
//! VIRTIO_CONSOLE_F_EMERG_WRITE is not offered: Linux does not use it, and a character that comes by a register would need a
//! way of its own to the host beside the queue's.

pub mod ports;
pub mod size;
pub mod terminal;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use size::{Size, SizeSwitch};

use self::terminal::{Receive, Transmit};
use super::queue::Handler;
use super::registers::{Identity, Published};
use crate::host::character::{self, HostEnd, Waker};
use crate::host::events::Recipient;
use std::io;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

const CONSOLE_DEVICE: u32 = 3;
/// The size is in the configuration space. [VIRTIO 1.2 §5.3.3]
const VIRTIO_CONSOLE_F_SIZE: u64 = 1 << 0;
/// `struct virtio_console_config` [VIRTIO 1.2 §5.3.4]: columns and rows, 16 bits each, the number of ports, and the register
/// for emergencies.
const CONFIGURATION_BYTES: usize = 12;
const SIZE_OFFSET: usize = 0;

/// What the guest can have written without anybody reading it. More than a serial port's, since Linux's driver has a
/// processor wait, with interrupts off, until what it has written was taken.
const OUTPUT_BYTES: usize = 64 << 10;

/// The host's end of a console: what the event loop needs of it.
pub struct HostSide {
    /// The rings.
    pub end: HostEnd,
    /// The actors to be told.
    pub recipient: Recipient,
    /// What wakes the event loop.
    pub waker: Waker,
}

/// A console, before it is connected with anything.
pub struct OpenedConsole {
    /// What it is to a driver.
    pub identity: Identity,
    /// One for each queue.
    pub handlers: Vec<Box<dyn Handler>>,
    /// The other end.
    pub host: HostSide,
    /// How large it is, if that is known.
    pub size: Option<Size>,
}

/// Makes one. `size`: how large the terminal is, if it is one.
///
/// # Errors
/// When the host gives no eventfds.
pub fn open(size: Option<Size>) -> io::Result<OpenedConsole> {
    let eventfd = || EventFd::new(libc::EFD_NONBLOCK).map(Arc::new);
    let (waker, input_bell, room_bell) = (eventfd()?, eventfd()?, eventfd()?);
    let ((output, input), end) = character::halves(waker.clone(), OUTPUT_BYTES);
    let published = size
        .as_ref()
        .map(|size| Published::wide(SIZE_OFFSET, size.word()));
    let shown = size.clone().zip(published.clone());
    let reminded = size.clone().map(|size| (size, input_bell.clone()));
    Ok(OpenedConsole {
        identity: Identity {
            device_type: CONSOLE_DEVICE,
            features: size.as_ref().map_or(0, |_| VIRTIO_CONSOLE_F_SIZE),
            configuration: vec![0; CONFIGURATION_BYTES],
            published,
            written: None,
            queues: 2,
        },
        handlers: vec![
            Box::new(Receive::new(input, input_bell.clone(), shown)),
            Box::new(Transmit::new(output, room_bell.clone(), reminded)),
        ],
        host: HostSide {
            end,
            recipient: Recipient::Actors {
                input: input_bell,
                room: room_bell,
            },
            waker,
        },
        size,
    })
}
