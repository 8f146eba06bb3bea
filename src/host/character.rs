//! The two byte rings between a character device and the event loop, and who wakes whom.
//!
//! The device's turns run on vCPU threads and must never wait for a terminal or a pipe. So bytes go through two
//! rings with one producer and one consumer each, and each side tells the other only when that one wishes it
//! ([`Wish`]), because it rests or because it found no room.

use super::wish::Wish;
use rtrb::{Consumer, Producer, RingBuffer};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// Bytes each ring holds. A screen of text; small, as it counts as the VMM's own memory.
pub const RING_BYTES: usize = 8192;

/// Wakes the event loop.
pub type Waker = Arc<EventFd>;

/// What a pair shares beside its rings.
struct Flags {
    /// The event loop rests: a device that sends must wake it.
    loop_rests: Wish,
    /// The device was told that there is no room: it wants to be told when there is.
    output_wanted: Wish,
    /// The event loop found no room for input: it wants to be woken when there is.
    input_wanted: Wish,
    /// Bytes that are lost, because a guest sent them while there was no room.
    dropped: AtomicU64,
}

/// The device's end. Used in its turns only.
pub struct CharacterEnd {
    output: Output,
    input: Input,
}

/// The half of a device's end that it sends by.
pub struct Output {
    ring: Producer<u8>,
    flags: Arc<Flags>,
    waker: Waker,
}

/// The half that it receives by.
pub struct Input {
    ring: Consumer<u8>,
    flags: Arc<Flags>,
    waker: Waker,
}

/// The event loop's end.
pub struct HostEnd {
    output: Consumer<u8>,
    input: Producer<u8>,
    flags: Arc<Flags>,
}

/// A pair of ends.
pub fn pair(waker: Waker) -> (CharacterEnd, HostEnd) {
    let ((output, input), host) = halves(waker, RING_BYTES);
    (CharacterEnd { output, input }, host)
}

/// The same for a device whose two directions have an actor each. `output_bytes`: what the ring for output holds.
pub fn halves(waker: Waker, output_bytes: usize) -> ((Output, Input), HostEnd) {
    let (output_in, output_out) = RingBuffer::new(output_bytes);
    let (input_in, input_out) = RingBuffer::new(RING_BYTES);
    let flags = Arc::new(Flags {
        loop_rests: Wish::new(true),
        output_wanted: Wish::new(false),
        input_wanted: Wish::new(false),
        dropped: AtomicU64::new(0),
    });
    let output = Output {
        ring: output_in,
        flags: flags.clone(),
        waker: waker.clone(),
    };
    let input = Input {
        ring: input_out,
        flags: flags.clone(),
        waker,
    };
    let host = HostEnd {
        output: output_out,
        input: input_in,
        flags,
    };
    ((output, input), host)
}

impl CharacterEnd {
    /// Gives a byte to the host. `false`: it was taken (if the device was not told `false` before), and there is
    /// no room for another until [`HostEnd::wants_output_ready`] was answered.
    pub fn transmit(&mut self, byte: u8) -> bool {
        if self.output.ring.push(byte).is_err() {
            self.lose();
        }
        self.output.tell();
        self.output.has_room()
    }

    /// Counts a byte that the device could not keep while there was no room.
    pub fn lose(&self) {
        // A sum that is read when it does not change any more orders nothing.
        self.output.flags.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a byte from the host.
    pub fn receive(&mut self) -> Option<u8> {
        let byte = self.input.ring.pop().ok()?;
        self.input.tell();
        Some(byte)
    }
}

impl Output {
    /// Gives bytes to the host; returns how many were taken, which is as many as there was room for.
    pub fn send(&mut self, bytes: &[u8]) -> usize {
        let sent = push(&mut self.ring, bytes);
        if sent > 0 {
            self.tell();
        }
        sent
    }

    /// Whether there is room for a byte. If not, the device is told when there is ([`HostEnd::wants_output_ready`]).
    pub fn has_room(&self) -> bool {
        !self.ring.is_full() || !self.flags.output_wanted.express(|| !self.ring.is_full())
    }

    fn tell(&self) {
        if self.flags.loop_rests.is_due(|| true) {
            wake(&self.waker);
        }
    }
}

impl Input {
    /// Whether there is something.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    /// Copies what is there, as much as there is room for; returns how much.
    pub fn peek(&mut self, bytes: &mut [u8]) -> usize {
        let length = self.ring.slots().min(bytes.len());
        let Ok(chunk) = self.ring.read_chunk(length) else {
            return 0;
        };
        let (first, second) = chunk.as_slices();
        bytes[..first.len()].copy_from_slice(first);
        bytes[first.len()..length].copy_from_slice(second);
        length
    }

    /// So many of these bytes were passed on.
    pub fn consume(&mut self, bytes: usize) {
        if let Ok(chunk) = self.ring.read_chunk(bytes) {
            chunk.commit_all();
        }
        self.tell();
    }

    fn tell(&self) {
        // Not at the first free byte: a paste would cost a wake-up each.
        let wanted = &self.flags.input_wanted;
        if wanted.is_due(|| self.ring.slots() <= RING_BYTES / 2) {
            wake(&self.waker);
        }
    }
}

impl HostEnd {
    /// What the device has sent: up to two slices, in order.
    pub fn output(&mut self) -> rtrb::chunks::ReadChunk<'_, u8> {
        let available = self.output.slots();
        self.output.read_chunk(available).expect("as many as there are")
    }

    /// Whether the device has sent something.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether the device waits to be told that there is room, and there is: half a ring, or a slow reader would cost
    /// a message a byte. Answers `true` once a wish.
    pub fn wants_output_ready(&self) -> bool {
        self.flags
            .output_wanted
            .is_due(|| self.output.slots() <= self.output.buffer().capacity() / 2)
    }

    /// The event loop is about to rest: from now on the device wakes it. `false`: not now, there is output.
    pub fn rest(&self) -> bool {
        self.flags.loop_rests.express(|| !self.output.is_empty())
    }

    /// The event loop is up: the device need not wake it.
    pub fn up(&self) {
        self.flags.loop_rests.withdraw();
    }

    /// Gives bytes to the device; returns how many were taken. If not all, the device will wake us.
    pub fn give(&mut self, bytes: &[u8]) -> usize {
        let mut given = push(&mut self.input, bytes);
        if given < bytes.len() {
            self.flags.input_wanted.express(|| {
                given += push(&mut self.input, &bytes[given..]);
                given == bytes.len()
            });
        }
        given
    }

    /// Bytes that are lost, because the guest sent them while there was no room.
    pub fn dropped(&self) -> u64 {
        self.flags.dropped.load(Ordering::Relaxed)
    }
}

/// As many as there is room for.
fn push(ring: &mut Producer<u8>, bytes: &[u8]) -> usize {
    let length = ring.slots().min(bytes.len());
    match ring.write_chunk_uninit(length) {
        Ok(chunk) => chunk.fill_from_iter(bytes.iter().copied()),
        Err(_) => 0,
    }
}

/// Adds 1 to an eventfd. It can only fail if the counter is full, and then the loop is awake anyway.
pub fn wake(waker: &EventFd) {
    let _ = waker.write(1);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn ends() -> (CharacterEnd, HostEnd, Waker) {
        let waker = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let (device, host) = pair(waker.clone());
        (device, host, waker)
    }

    #[test]
    fn a_burst_wakes_a_resting_loop_once() {
        let (mut device, host, waker) = ends();
        assert!(host.rest());
        for byte in 0..10 {
            assert!(device.transmit(byte));
        }
        assert_eq!(waker.read().unwrap(), 1);
        assert!(!host.rest());
    }

    #[test]
    fn a_full_ring_says_so_before_a_byte_is_lost_and_tells_when_there_is_room() {
        let (mut device, mut host, _) = ends();
        let mut sent = 0;
        while device.transmit(sent as u8) {
            sent += 1;
        }
        assert_eq!(sent + 1, RING_BYTES);
        assert_eq!(host.dropped(), 0);
        host.output().commit(RING_BYTES / 2 - 1);
        assert!(!host.wants_output_ready(), "hardly any room yet");
        host.output().commit(1);
        assert!(host.wants_output_ready());
        assert!(!host.wants_output_ready(), "told once");
        assert!(device.transmit(0));
    }

    #[test]
    fn a_device_that_sends_without_room_is_told_all_the_same() {
        let (mut device, mut host, _) = ends();
        while device.transmit(0) {}
        host.output().commit(RING_BYTES);
        assert!(host.wants_output_ready());
        for _ in 0..RING_BYTES {
            device.transmit(0);
        }
        assert!(!device.transmit(1));
        assert_eq!(host.dropped(), 1);
        host.output().commit(RING_BYTES);
        assert!(host.wants_output_ready());
    }

    #[test]
    fn input_beyond_the_ring_waits_and_wakes_the_loop_at_half() {
        let (mut device, mut host, waker) = ends();
        let bytes = vec![7; RING_BYTES + 10];
        assert_eq!(host.give(&bytes), RING_BYTES);
        assert!(waker.read().is_err());
        for _ in 0..RING_BYTES / 2 {
            assert_eq!(device.receive(), Some(7));
        }
        assert_eq!(waker.read().unwrap(), 1);
        assert_eq!(host.give(&bytes[..10]), 10);
    }

    #[test]
    fn two_threads_lose_nothing() {
        const BYTES: usize = 300_000;
        let (mut device, mut host, waker) = ends();
        let sender = std::thread::spawn(move || {
            for n in 0..BYTES {
                // Like a UART: after "no room", wait until told (here: until there is room).
                if !device.transmit(n as u8) {
                    while device.output.ring.is_full() {
                        std::thread::yield_now();
                    }
                }
            }
        });
        let mut next = 0;
        while next < BYTES {
            let chunk = host.output();
            for byte in chunk {
                assert_eq!(byte, next as u8);
                next += 1;
            }
            let _ = host.wants_output_ready();
            if host.rest() {
                // Woken, or the sender is still on its way: look again.
                let _ = waker.read();
                std::thread::yield_now();
            }
            host.up();
        }
        sender.join().unwrap();
        assert_eq!(host.dropped(), 0);
    }
}
