//! A function's interrupt sources, its MSI-X table, and the wires between them.
//!
//! Sources are the device's configuration, then its queues. The driver gives each a vector. Where a source's messages go
//! is a function of the state: of its vector, of the table and its control, and of whether the function may send messages
//! at all. After each change the wires are compared with it ([`Vectors::reflect`]), as interrupt lines are.

use crate::devices::Width;
use crate::pci::msix::{Message, MessageWire, Msix};

/// A source without a vector: nobody is told. [VIRTIO 1.2 §4.1.4.3]
pub const NO_VECTOR: u16 = 0xffff;

/// The source that is the configuration.
pub const CONFIGURATION: usize = 0;

/// The source that is a queue.
pub fn queue(index: usize) -> usize {
    index + 1
}

struct Source {
    vector: u16,
    aimed: Option<Message>,
    wire: Box<dyn MessageWire>,
}

/// All of them.
pub struct Vectors {
    /// The table.
    pub table: Msix,
    sources: Vec<Source>,
}

impl Vectors {
    /// A source for each wire, and as many vectors.
    pub fn new(wires: Vec<Box<dyn MessageWire>>) -> Vectors {
        let source = |wire| Source {
            vector: NO_VECTOR,
            aimed: None,
            wire,
        };
        Vectors {
            table: Msix::new(wires.len()),
            sources: wires.into_iter().map(source).collect(),
        }
    }

    /// Which vector a source has.
    pub fn vector(&self, source: usize) -> u16 {
        self.sources.get(source).map_or(NO_VECTOR, |source| source.vector)
    }

    /// Gives a source a vector; one that does not exist is none, and so the driver reads it back.
    pub fn set_vector(&mut self, source: usize, vector: u16) {
        if let Some(source) = self.sources.get_mut(source) {
            let exists = usize::from(vector) < self.table.vectors();
            source.vector = if exists { vector } else { NO_VECTOR };
        }
    }

    /// Aims the wires at what the state says. `may_send`: the function may send messages.
    pub fn reflect(&mut self, may_send: bool) {
        for source in &mut self.sources {
            let message = may_send.then(|| self.table.message(source.vector)).flatten();
            if message != source.aimed {
                source.aimed = message;
                source.wire.aim(message);
            }
        }
    }

    /// Something happened at a source.
    pub fn signal(&mut self, source: usize) {
        if let Some(source) = self.sources.get_mut(source)
            && source.vector != NO_VECTOR
        {
            source.wire.signal();
        }
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, width: Width) -> u64 {
        self.table.read_pending(offset, width, |vector| {
            let waits = |source: &Source| {
                source.vector == vector && source.aimed.is_none() && source.wire.is_pending()
            };
            self.sources.iter().any(waits)
        })
    }

    /// The device was reset: no source has a vector, nothing waits. The table is the function's and stays.
    pub fn take_back(&mut self) {
        for source in &mut self.sources {
            source.vector = NO_VECTOR;
            if source.aimed.take().is_some() {
                source.wire.aim(None);
            }
            source.wire.forget();
        }
    }
}
