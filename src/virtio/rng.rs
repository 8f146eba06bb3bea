//! virtio-rng, the entropy device: fills what it is given with the host's random bytes. [VIRTIO 1.2 §5.4]
//!
//! A hostile guest can ask for as much as it likes and occupies its own queue's thread with it; a request is answered
//! with [`CHUNK_BYTES`] at most, which a driver must accept.

use super::CHUNK_BYTES;
use super::chain::Malformed;
use super::queue::{Handler, Interruption, Request};
use super::registers::Identity;
use std::fs::File;
use std::io::{self, Read};

const ENTROPY_DEVICE: u32 = 4;

/// What the device is.
pub fn identity() -> Identity {
    Identity {
        device_type: ENTROPY_DEVICE,
        features: 0,
        configuration: Vec::new(),
        published: None,
        written: None,
        queues: 1,
    }
}

/// Where the bytes come from: the kernel's generator, which does not block once it is seeded. [random(4)]
const SOURCE: &str = "/dev/urandom";

/// Serves the one queue.
pub struct Rng<S>(S);

impl Rng<File> {
    /// With the host's source.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open() -> io::Result<Self> {
        Ok(Rng(File::open(SOURCE)?))
    }
}

impl<S: Read + Send> Rng<S> {
    /// With another source.
    pub fn from_source(source: S) -> Self {
        Rng(source)
    }
}

impl<S: Read + Send> Handler for Rng<S> {
    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        // One byte at least has to be given.
        let wanted = request.writable_bytes().min(CHUNK_BYTES as u64) as usize;
        if wanted == 0 {
            return Err(Malformed::NoAnswer.into());
        }
        // A source that gives nothing gives no bytes: the driver asks again.
        let Ok(got) = self.0.read(&mut request.buffer[..wanted]) else {
            return Ok(0);
        };
        match request.store(0, got)? {
            Ok(()) => Ok(got as u32),
            Err(_) => Err(Malformed::NoAnswer.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Outcome, Rig, W};

    /// Counts up.
    struct Counter(u8);

    impl Read for Counter {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            for byte in &mut *bytes {
                *byte = self.0;
                self.0 = self.0.wrapping_add(1);
            }
            Ok(bytes.len())
        }
    }

    #[test]
    fn buffers_are_filled_across_descriptors() {
        let mut rig = Rig::new(Box::new(Rng(Counter(0))));
        let outcome = rig.request(&[W(0x5000, 3), W(0x6000, 4)]);
        assert_eq!(outcome, Outcome::Used(7));
        assert_eq!(rig.read(0x5000, 3), [0, 1, 2]);
        assert_eq!(rig.read(0x6000, 5), [3, 4, 5, 6, 0]);
    }

    #[test]
    fn the_hosts_bytes_differ() {
        let mut rig = Rig::new(Box::new(Rng::open().unwrap()));
        rig.request(&[W(0x5000, 32)]);
        rig.request(&[W(0x6000, 32)]);
        assert_ne!(rig.read(0x5000, 32), rig.read(0x6000, 32));
    }

    #[test]
    fn a_large_request_is_answered_in_part() {
        let mut rig = Rig::new(Box::new(Rng(Counter(0))));
        let outcome = rig.request(&[W(0x2_0000, 200 << 10)]);
        assert_eq!(outcome, Outcome::Used(CHUNK_BYTES as u32));
    }

    #[test]
    fn no_room_breaks_the_device() {
        let no_room: [&[_]; 3] = [
            &[],
            &[crate::virtio::testing::R(0x5000, 10)],
            &[W(0x5000, 0), W(u64::MAX - 10, 100)],
        ];
        for buffers in no_room {
            let mut rig = Rig::new(Box::new(Rng(Counter(0))));
            assert!(matches!(rig.request(buffers), Outcome::Broken), "{buffers:?}");
        }
    }
}
