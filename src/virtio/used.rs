//! Giving chains back to the driver, one or several at a time, and not at all.

use super::chain::Chain;
use std::sync::atomic::Ordering;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// [VIRTIO 1.2 §2.7.8, §2.7.6]
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAILABLE_HEADER_BYTES: u64 = 4;

/// The chains were not used: they are the next ones again.
pub fn put_back(queue: &mut Queue, chain: &Chain) {
    for _ in chain.heads() {
        queue.go_to_previous_position();
    }
}

/// Gives the chains back to the driver, with so many bytes written to them in their order. Returns whether the driver
/// wants to be notified.
///
/// All of them become visible by one step of the used ring's index: a driver that finds the first buffer of a frame
/// takes the others at once. [VIRTIO 1.2 §5.1.6.3.2]
///
/// # Errors
/// When the rings are not in memory.
pub fn give_back(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    chain: &Chain,
    used: u32,
) -> Result<bool, virtio_queue::Error> {
    let Some((last, others)) = chain.heads().split_last() else {
        return Ok(false);
    };
    let old = queue.next_used();
    let mut left = used;
    let mut part = |room: u64| {
        let part = left.min(u32::try_from(room).unwrap_or(u32::MAX));
        left -= part;
        part
    };
    for (place, head) in others.iter().enumerate() {
        let slot = old.wrapping_add(place as u16) % queue.size();
        let element = [u32::from(head.index).to_le(), part(head.room).to_le()];
        let at = queue.used_ring() + USED_HEADER_BYTES + USED_ELEMENT_BYTES * u64::from(slot);
        memory
            .write_obj(element, GuestAddress(at))
            .map_err(virtio_queue::Error::GuestMemory)?;
    }
    queue.set_next_used(old.wrapping_add(others.len() as u16));
    let of_last = if others.is_empty() { used } else { part(last.room) };
    queue.add_used(memory, last.index, of_last)?;
    let notify = queue.needs_notification(memory)?;
    if others.is_empty() || !queue.event_idx_enabled() {
        return Ok(notify);
    }
    // The crate has counted one step where there were several.
    let event_at = queue.avail_ring() + AVAILABLE_HEADER_BYTES + 2 * u64::from(queue.size());
    let event: u16 = memory
        .load(GuestAddress(event_at), Ordering::Relaxed)
        .map_err(virtio_queue::Error::GuestMemory)?;
    let new = queue.next_used();
    Ok(new.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < new.wrapping_sub(old))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{AVAILABLE, DESCRIPTORS, USED, memory};

    /// A queue of 8 with chains of one descriptor of 16, 0, 8, … bytes, of which `taken` were taken.
    fn queue(memory: &GuestMemoryMmap, start: u16, taken: usize, event_idx: bool) -> (Queue, Chain) {
        let mut queue = Queue::new(8).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(DESCRIPTORS))
            .unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.set_next_avail(start);
        queue.set_next_used(start);
        for (index, bytes) in [16u32, 0, 8, 4, 4, 4, 4, 4].into_iter().enumerate() {
            let at = DESCRIPTORS + 16 * index as u64;
            memory.write_obj(0x5000u64, GuestAddress(at)).unwrap();
            memory.write_obj(bytes, GuestAddress(at + 8)).unwrap();
            memory.write_obj(2u16, GuestAddress(at + 12)).unwrap();
            let slot = u64::from(start.wrapping_add(index as u16) % 8);
            memory
                .write_obj(index as u16, GuestAddress(AVAILABLE + 4 + 2 * slot))
                .unwrap();
        }
        memory
            .write_obj(start.wrapping_add(8), GuestAddress(AVAILABLE + 2))
            .unwrap();
        let mut chain = Chain::default();
        for _ in 0..taken {
            let next = queue.iter(memory).unwrap().next().unwrap();
            chain.read(next, 8).unwrap();
        }
        (queue, chain)
    }

    fn used(memory: &GuestMemoryMmap, slot: u16) -> (u32, u32) {
        let element: [u32; 2] = memory
            .read_obj(GuestAddress(USED + 4 + 8 * u64::from(slot % 8)))
            .unwrap();
        (element[0], element[1])
    }

    #[test]
    fn what_was_written_is_spread_over_the_chains_in_their_order() {
        let memory = memory();
        // Across the end of the ring and of the index.
        let start = u16::MAX - 1;
        let (mut queue, chain) = queue(&memory, start, 4, false);
        assert_eq!(chain.writable_bytes(), 28);
        assert!(give_back(&mut queue, &memory, &chain, 26).unwrap());
        let elements = [0, 1, 2, 3].map(|place| used(&memory, start.wrapping_add(place)));
        assert_eq!(elements, [(0, 16), (1, 0), (2, 8), (3, 2)]);
        let index: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(index, start.wrapping_add(4));
    }

    #[test]
    fn what_is_put_back_is_taken_again() {
        let memory = memory();
        let (mut queue, chain) = queue(&memory, 5, 3, false);
        put_back(&mut queue, &chain);
        assert_eq!(queue.next_avail(), 5);
        let next = queue.iter(&memory).unwrap().next().unwrap();
        assert_eq!(next.head_index(), 0);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 0);
    }

    #[test]
    fn the_driver_is_notified_if_any_of_the_steps_is_the_one_that_it_waits_for() {
        for start in [0, 7, u16::MAX - 1] {
            for (event, expected) in [(-1i32, false), (0, true), (1, true), (2, true), (3, false)] {
                let memory = memory();
                let (mut queue, chain) = queue(&memory, start, 3, true);
                let event = (i32::from(start) + event) as u16;
                memory
                    .write_obj(event, GuestAddress(AVAILABLE + 4 + 2 * 8))
                    .unwrap();
                let notify = give_back(&mut queue, &memory, &chain, 20).unwrap();
                assert_eq!(notify, expected, "{start} {event}");
            }
        }
    }
}
