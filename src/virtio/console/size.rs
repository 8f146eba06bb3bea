//! How large a terminal is: a word that the control thread sets when the terminal has changed, and that the receive queue's
//! actor shows the driver.
//!
//! Linux looks at the size only when it is told of a change, and not before it has a terminal for it. So a driver is told when
//! it first writes something, whatever has changed.
//!
//! All that the word says is in it, and the bell that tells of it comes behind: `Release` and `Acquire` for that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// A terminal's size.
#[derive(Clone, Debug)]
pub struct Size(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    word: AtomicU32,
    /// The driver is to be told, even of no change.
    due: AtomicBool,
}

/// Columns and rows as the configuration space has them. [VIRTIO 1.2 §5.3.4]
fn word(columns: u16, rows: u16) -> u32 {
    u32::from(rows) << 16 | u32::from(columns)
}

impl Size {
    /// Of a terminal that has one.
    pub fn new(columns: u16, rows: u16) -> Size {
        Size(Arc::new(Shared {
            word: AtomicU32::new(word(columns, rows)),
            due: AtomicBool::new(false),
        }))
    }

    /// As the configuration space has it.
    pub fn word(&self) -> u32 {
        self.0.word.load(Ordering::Acquire)
    }

    /// A driver has a terminal now, and is to be told. Whoever shows the size has to be woken then.
    pub fn remind(&self) {
        self.0.due.store(true, Ordering::Release);
    }

    /// Whether one is; once.
    pub fn is_due(&self) -> bool {
        self.0.due.swap(false, Ordering::AcqRel)
    }

    /// To change it. `bell`: rings the actor that shows it.
    pub fn switch(&self, bell: EventFd) -> SizeSwitch {
        SizeSwitch {
            size: self.clone(),
            bell,
        }
    }
}

/// Changes the size.
pub struct SizeSwitch {
    size: Size,
    bell: EventFd,
}

impl SizeSwitch {
    /// The terminal has this size now. Does not wait: the driver is told by the device's own actor.
    pub fn set(&self, columns: u16, rows: u16) {
        self.size.0.word.store(word(columns, rows), Ordering::Release);
        // Fails only when the counter is full, and then it rings already.
        let _ = self.bell.write(1);
    }
}
