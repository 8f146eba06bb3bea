//! Descriptor chains: taken from the ring once, checked, and from then on read from our own copy.
//!
//! A guest can change a chain while we look at it, link it into a loop, point it anywhere and make it of any length.
//! [`Chain::read`] copies each descriptor once and decides on the copy, so what comes later changes nothing. What it
//! lets through has at most as many descriptors as the queue, readable ones first, and ends. Addresses are not checked
//! here: guest memory is asked with every access, and refuses what is outside.

use super::straight::Pieces;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A piece of guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub bytes: u32,
}

/// What is wrong with a chain. The device cannot go on: it does not know what the driver wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Malformed {
    /// A loop, an index beyond the table, a table outside memory, a table inside a table, or 4 GiB and more.
    #[error("a descriptor chain that does not end")]
    Endless,
    /// More descriptors than the queue has. [VIRTIO 1.2 §2.7.5.3.1]
    #[error("a descriptor chain longer than the queue")]
    TooLong,
    /// A readable descriptor behind a writable one. [VIRTIO 1.2 §2.7.4.2]
    #[error("a readable descriptor behind a writable one")]
    Order,
    /// Without a byte for the answer.
    #[error("a descriptor chain without room for the answer")]
    NoAnswer,
    /// The request cannot be read.
    #[error("a request that is too short or outside memory")]
    NoRequest,
    /// More bytes than any driver by the book has for one request.
    #[error("a request larger than the device takes")]
    TooLarge,
}

/// An access that the chain or guest memory does not have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault;

/// The driver's name for a chain, and the room in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// Index of its first descriptor.
    pub index: u16,
    /// Bytes that the driver has room for in it.
    pub room: u64,
}

/// The most descriptors of chains that are put together: a frame of 64 KiB in pages, with much to spare.
const MOST_SEGMENTS: usize = 1024;

/// One request's buffers: a chain's, or several chains' if one has not enough room.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Chain {
    heads: Vec<Head>,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    /// None. The vectors keep their room, so a queue's requests do not allocate for long.
    pub fn clear(&mut self) {
        self.heads.clear();
        self.readable.clear();
        self.writable.clear();
    }

    /// Adds a chain.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn read(
        &mut self,
        mut chain: DescriptorChain<&GuestMemoryMmap>,
        queue_size: u16,
    ) -> Result<(), Malformed> {
        let (readable, writable) = (self.readable.len(), self.writable.len());
        let before = self.writable_bytes();
        let index = chain.head_index();
        // The iterator stops at what it cannot follow, without a word: then the last one has a next.
        let mut more = true;
        for descriptor in &mut chain {
            more = descriptor.has_next();
            if self.readable.len() + self.writable.len() == readable + writable + usize::from(queue_size) {
                return Err(Malformed::TooLong);
            }
            let segment = Segment {
                address: descriptor.addr().0,
                bytes: descriptor.len(),
            };
            if descriptor.is_write_only() {
                self.writable.push(segment);
            } else if self.writable.len() == writable {
                self.readable.push(segment);
            } else {
                return Err(Malformed::Order);
            }
        }
        if more {
            return Err(Malformed::Endless);
        }
        let room = self.writable_bytes() - before;
        self.heads.push(Head { index, room });
        Ok(())
    }

    /// By what the driver knows them.
    pub fn heads(&self) -> &[Head] {
        &self.heads
    }

    /// No more chains can be added: the driver has no more in a queue of this size, or it is enough by any measure.
    pub fn is_full(&self, queue_size: u16) -> bool {
        self.heads.len() >= usize::from(queue_size)
            || self.readable.len() + self.writable.len() >= MOST_SEGMENTS
    }

    /// Where the driver has room.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes that the driver gives.
    pub fn readable_bytes(&self) -> u64 {
        total(&self.readable)
    }

    /// Bytes that the driver has room for.
    pub fn writable_bytes(&self) -> u64 {
        total(&self.writable)
    }

    /// Copies what the driver gave, from `offset` of it.
    ///
    /// # Errors
    /// [`Fault`]; part of it may have been copied.
    pub fn load(&self, memory: &GuestMemoryMmap, offset: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        each(&self.readable, offset, bytes.len(), |address, range| {
            memory.read_slice(&mut bytes[range], address).map_err(|_| Fault)
        })
    }

    /// Copies to where the driver has room, from `offset` of it.
    ///
    /// # Errors
    /// [`Fault`]; part of it may have been copied.
    pub fn store(&self, memory: &GuestMemoryMmap, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        each(&self.writable, offset, bytes.len(), |address, range| {
            memory.write_slice(&bytes[range], address).map_err(|_| Fault)
        })
    }
}

impl Chain {
    /// Where what the driver gave is: `length` bytes from `offset` of it.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn given<'a>(
        &self,
        memory: &'a GuestMemoryMmap,
        offset: u64,
        length: usize,
    ) -> Result<Pieces<'a>, Fault> {
        Pieces::of(memory, &self.readable, offset, length)
    }

    /// Where the driver has room: `length` bytes from `offset` of it.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn room<'a>(
        &self,
        memory: &'a GuestMemoryMmap,
        offset: u64,
        length: usize,
    ) -> Result<Pieces<'a>, Fault> {
        Pieces::of(memory, &self.writable, offset, length)
    }
}

fn total(segments: &[Segment]) -> u64 {
    // 32768 segments of 4 GiB do not overflow.
    segments.iter().map(|segment| u64::from(segment.bytes)).sum()
}

/// Calls `copy` for each part of `length` bytes from `offset`.
pub(super) fn each(
    segments: &[Segment],
    mut offset: u64,
    length: usize,
    mut copy: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut done = 0;
    for segment in segments {
        if done == length {
            break;
        }
        let bytes = u64::from(segment.bytes);
        if offset >= bytes {
            offset -= bytes;
            continue;
        }
        let part = ((bytes - offset) as usize).min(length - done);
        let address = segment.address.checked_add(offset).ok_or(Fault)?;
        copy(GuestAddress(address), done..done + part)?;
        done += part;
        offset = 0;
    }
    if done == length { Ok(()) } else { Err(Fault) }
}
