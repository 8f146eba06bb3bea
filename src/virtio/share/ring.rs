//! A split virtqueue [VIRTIO 1.2 §2.7] seen from the driver's side, for one request at a time, in memory that is shared with
//! virtiofsd and with nobody else.
//!
//! ```text
//!  base      +0x1000            +0x102000         +0x203000
//!  │ rings   │ what it is to do │ what it answers │
//! ```
//!
//! virtiofsd is not trusted with more than that memory: what it writes into the rings is checked, and an answer is as
//! long as there was room, whatever it says.
//!
//! # Orderings
//!
//! The index of the available ring is written `Release` behind the descriptors and the request, and that of the used ring
//! read `Acquire` before the entry and the answer: virtio's own protocol, with one request and so no event to miss. It is
//! kicked after each.

use std::sync::atomic::Ordering;
use vhost::VringConfigData;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

/// The most that a request or an answer has, bytes: a MiB of data, which is the most that virtiofsd takes, and headers.
pub const MOST_BYTES: usize = (1 << 20) + 0x1000;
/// What a queue has of the memory, bytes.
pub const STRIPE_BYTES: u64 = 4 << 20;

/// Descriptors: a request and its answer have two; a power of 2.
const SIZE: u16 = 2;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const REQUEST: u64 = 0x1000;
const ANSWER: u64 = REQUEST + MOST_BYTES as u64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// virtiofsd has written what no device may.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Nonsense;

impl From<GuestMemoryError> for Nonsense {
    fn from(_: GuestMemoryError) -> Self {
        // Our own addresses; cannot be.
        Nonsense
    }
}

/// The driver's end.
pub struct Ring {
    memory: GuestMemoryMmap,
    base: u64,
    /// Requests so far.
    made: u16,
    /// Room for the answer to the one that is under way.
    room: Option<u32>,
}

impl Ring {
    /// A new one in a place of the shared memory, which reads zeroes.
    pub fn new(memory: GuestMemoryMmap, place: usize) -> Ring {
        Ring {
            memory,
            base: place as u64 * STRIPE_BYTES,
            made: 0,
            room: None,
        }
    }

    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.base + offset)
    }

    /// Where it is, in our address space: what virtiofsd is told.
    pub fn config(&self) -> Result<VringConfigData, Nonsense> {
        let host = |offset| self.memory.get_host_address(self.at(offset)).map(|at| at as u64);
        Ok(VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: host(DESCRIPTORS)?,
            used_ring_addr: host(USED)?,
            avail_ring_addr: host(AVAILABLE)?,
            log_addr: None,
        })
    }

    /// Its length, descriptors.
    pub fn size(&self) -> u16 {
        SIZE
    }

    /// Writes a piece of the next request. The pieces end before [`MOST_BYTES`].
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Nonsense> {
        debug_assert!(offset + bytes.len() <= MOST_BYTES && self.room.is_none());
        Ok(self.memory.write_slice(bytes, self.at(REQUEST + offset as u64))?)
    }

    /// Reads a piece of the last answer.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), Nonsense> {
        debug_assert!(offset + bytes.len() <= MOST_BYTES && self.room.is_none());
        Ok(self.memory.read_slice(bytes, self.at(ANSWER + offset as u64))?)
    }

    /// Hands a request over, of so many bytes, with room for so many as its answer. None may be under way.
    pub fn submit(&mut self, bytes: usize, room: usize) -> Result<(), Nonsense> {
        debug_assert!(bytes <= MOST_BYTES && room <= MOST_BYTES && self.room.is_none());
        let room = room as u32;
        let more = if room > 0 { NEXT } else { 0 };
        self.describe(0, REQUEST, bytes as u32, more, 1)?;
        self.describe(1, ANSWER, room, WRITE, 0)?;
        let entry = AVAILABLE + 4 + 2 * u64::from(self.made % SIZE);
        self.memory.write_obj(0u16, self.at(entry))?;
        self.made = self.made.wrapping_add(1);
        self.room = Some(room);
        let index = self.at(AVAILABLE + 2);
        Ok(self.memory.store(self.made, index, Ordering::Release)?)
    }

    fn describe(&self, index: u64, place: u64, bytes: u32, flags: u16, next: u16) -> Result<(), Nonsense> {
        let at = DESCRIPTORS + 16 * index;
        self.memory.write_obj(self.at(place).0, self.at(at))?;
        self.memory.write_obj(bytes, self.at(at + 8))?;
        self.memory.write_obj(flags, self.at(at + 12))?;
        Ok(self.memory.write_obj(next, self.at(at + 14))?)
    }

    /// The answer to the request that is under way, if it is there: how many bytes it has.
    pub fn answer(&mut self) -> Result<Option<usize>, Nonsense> {
        let Some(room) = self.room else {
            return Ok(None);
        };
        let index: u16 = self.memory.load(self.at(USED + 2), Ordering::Acquire)?;
        if index == self.made.wrapping_sub(1) {
            return Ok(None);
        }
        let entry = USED + 4 + 8 * u64::from(self.made.wrapping_sub(1) % SIZE);
        let head: u32 = self.memory.read_obj(self.at(entry))?;
        let bytes: u32 = self.memory.read_obj(self.at(entry + 4))?;
        if index != self.made || head != 0 {
            return Err(Nonsense);
        }
        self.room = None;
        Ok(Some(bytes.min(room) as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring() -> Ring {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 * STRIPE_BYTES as usize)]).unwrap();
        Ring::new(memory, 1)
    }

    fn used(ring: &Ring, entry: u16, head: u32, bytes: u32) {
        let at = USED + 4 + 8 * u64::from(entry % SIZE);
        ring.memory.write_obj(head, ring.at(at)).unwrap();
        ring.memory.write_obj(bytes, ring.at(at + 4)).unwrap();
        ring.memory
            .write_obj(entry.wrapping_add(1), ring.at(USED + 2))
            .unwrap();
    }

    #[test]
    fn requests_go_round_and_answers_are_as_long_as_there_is_room() {
        let mut ring = ring();
        assert_eq!(ring.answer(), Ok(None));
        for number in 0..=u16::MAX {
            ring.submit(40, 100).unwrap();
            assert_eq!(ring.answer(), Ok(None));
            used(&ring, number, 0, if number % 2 == 0 { 16 } else { u32::MAX });
            let expected = if number % 2 == 0 { 16 } else { 100 };
            assert_eq!(ring.answer(), Ok(Some(expected)));
            assert_eq!(ring.answer(), Ok(None), "once");
        }
        ring.submit(40, 0).unwrap();
        used(&ring, 0, 0, 5);
        assert_eq!(ring.answer(), Ok(Some(0)));
    }

    #[test]
    fn what_no_device_may_write_is_nonsense() {
        for (entry, head) in [(0, 1), (0, u32::MAX), (1, 0), (40_000, 0)] {
            let mut ring = ring();
            ring.submit(40, 100).unwrap();
            used(&ring, entry, head, 16);
            assert_eq!(ring.answer(), Err(Nonsense), "{entry} {head}");
        }
    }
}
