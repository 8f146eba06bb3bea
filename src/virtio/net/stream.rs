//! Frames over a stream: each behind its length, 32 bits, big end first, as passt and QEMU's `-netdev stream` have it.

use super::{HEADER_BYTES, MAX_FRAME_BYTES, Pair, Received, Sent, Sink, Source};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

const LENGTH_BYTES: usize = 4;
/// Room for several frames: fewer system calls.
const BUFFER_BYTES: usize = 128 << 10;

/// Cuts a stream into frames. Pure.
pub struct Cutter {
    buffer: Box<[u8]>,
    begin: usize,
    end: usize,
}

/// A length that no frame has: the stream makes no sense from here on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoFrame(u32);

impl Cutter {
    /// At the beginning of a stream.
    pub fn new() -> Cutter {
        Cutter {
            buffer: vec![0; BUFFER_BYTES].into(),
            begin: 0,
            end: 0,
        }
    }

    /// The next frame, if it is there as a whole.
    ///
    /// # Errors
    /// [`NoFrame`].
    pub fn frame(&mut self) -> Result<Option<&[u8]>, NoFrame> {
        let there = &self.buffer[self.begin..self.end];
        let Some((length, rest)) = there.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        let bytes = length as usize;
        if bytes == 0 || bytes > MAX_FRAME_BYTES {
            return Err(NoFrame(length));
        }
        if rest.len() < bytes {
            return Ok(None);
        }
        let start = self.begin + LENGTH_BYTES;
        self.begin = start + bytes;
        Ok(Some(&self.buffer[start..start + bytes]))
    }

    /// Where more of the stream goes. Never empty after [`Cutter::frame`] has found none.
    pub fn room(&mut self) -> &mut [u8] {
        self.buffer.copy_within(self.begin..self.end, 0);
        self.end -= self.begin;
        self.begin = 0;
        &mut self.buffer[self.end..]
    }

    /// So much has come there.
    pub fn add(&mut self, bytes: usize) {
        self.end = (self.end + bytes).min(self.buffer.len());
    }
}

impl Default for Cutter {
    fn default() -> Self {
        Cutter::new()
    }
}

/// Says why a stream has ended.
pub trait Why: Send {
    /// For a person. May wait for a moment.
    fn why(&mut self) -> String;
}

/// Frames from a stream.
pub struct StreamSource<W> {
    stream: Arc<UnixStream>,
    cutter: Cutter,
    why: W,
}

impl<W: Why> StreamSource<W> {
    /// The stream must not block.
    pub fn new(stream: Arc<UnixStream>, why: W) -> Self {
        StreamSource {
            stream,
            cutter: Cutter::new(),
            why,
        }
    }
}

impl<W: Why> Source for StreamSource<W> {
    fn receive(&mut self, packet: &mut [u8]) -> Received {
        loop {
            match self.cutter.frame() {
                Ok(Some(frame)) => {
                    let bytes = HEADER_BYTES + frame.len();
                    let Some(place) = packet.get_mut(..bytes) else {
                        continue;
                    };
                    place[..HEADER_BYTES].fill(0);
                    place[HEADER_BYTES..].copy_from_slice(frame);
                    return Received::Packet(bytes);
                }
                Ok(None) => {}
                Err(NoFrame(bytes)) => return Received::Lost(format!("it sent a frame of {bytes} bytes")),
            }
            match (&*self.stream).read(self.cutter.room()) {
                Ok(0) => return Received::Lost(self.why.why()),
                Ok(bytes) => self.cutter.add(bytes),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Received::Nothing,
                    ErrorKind::Interrupted => {}
                    _ => return Received::Lost(self.why.why()),
                },
            }
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Frames to a stream.
pub struct StreamSink(Arc<UnixStream>);

impl StreamSink {
    /// The stream must not block.
    pub fn new(stream: Arc<UnixStream>) -> StreamSink {
        StreamSink(stream)
    }
}

impl Sink for StreamSink {
    fn send(&mut self, packet: &mut [u8], mut given: usize) -> Sent {
        // The length goes where the end of the header is, so that both go at once. The host has no use for the header.
        let start = HEADER_BYTES - LENGTH_BYTES;
        let frame = packet.len() - HEADER_BYTES;
        packet[start..HEADER_BYTES].copy_from_slice(&(frame as u32).to_be_bytes());
        while start + given < packet.len() {
            match (&*self.0).write(&packet[start + given..]) {
                Ok(bytes) => given += bytes,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Sent::Part(given),
                    ErrorKind::Interrupted => {}
                    // Why, the other direction finds out: it is woken by the same.
                    _ => {
                        return Sent::Done;
                    }
                },
            }
        }
        Sent::Done
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A network that gives every frame back.
///
/// # Errors
/// When the host gives no sockets.
pub fn loopback() -> std::io::Result<Pair> {
    struct Closed;
    impl Why for Closed {
        fn why(&mut self) -> String {
            "the other direction has ended".into()
        }
    }
    let (one, other) = UnixStream::pair()?;
    one.set_nonblocking(true)?;
    other.set_nonblocking(true)?;
    let source = StreamSource::new(Arc::new(one), Closed);
    Ok((Box::new(source), Box::new(StreamSink::new(Arc::new(other)))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_length_that_no_frame_has_ends_it() {
        for length in [0u32, MAX_FRAME_BYTES as u32 + 1, u32::MAX] {
            let mut cutter = Cutter::new();
            cutter.room()[..4].copy_from_slice(&length.to_be_bytes());
            cutter.add(4);
            assert_eq!(cutter.frame(), Err(NoFrame(length)));
        }
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_the_stream_is_cut(
            frames in prop::collection::vec((1..=MAX_FRAME_BYTES, any::<u8>()), 1..8),
            cuts in prop::collection::vec(1..100_000usize, 1..16),
        ) {
            let mut stream = Vec::new();
            for (length, byte) in &frames {
                stream.extend_from_slice(&(*length as u32).to_be_bytes());
                stream.extend(std::iter::repeat_n(*byte, *length));
            }
            let (mut cutter, mut sent, mut found) = (Cutter::new(), 0, Vec::new());
            let mut cuts = cuts.iter().cycle();
            while sent < stream.len() {
                let room = cutter.room();
                prop_assert!(!room.is_empty());
                let part = (*cuts.next().unwrap()).min(room.len()).min(stream.len() - sent);
                room[..part].copy_from_slice(&stream[sent..sent + part]);
                cutter.add(part);
                sent += part;
                while let Some(frame) = cutter.frame().unwrap() {
                    prop_assert!(frame.iter().all(|byte| *byte == frame[0]));
                    found.push((frame.len(), frame[0]));
                }
            }
            prop_assert_eq!(found, frames);
        }
    }

    struct Nobody;
    impl Why for Nobody {
        fn why(&mut self) -> String {
            "nobody".into()
        }
    }

    fn pair() -> (Arc<UnixStream>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Arc::new(ours), theirs)
    }

    #[test]
    fn a_stream_without_room_takes_a_packet_in_parts_and_nothing_is_lost() {
        let (ours, mut theirs) = pair();
        let mut sink = StreamSink::new(ours);
        let mut packet = vec![7; HEADER_BYTES + 60_000];
        let (mut whole, mut parts) = (0, 0);
        let mut bytes = 0;
        while parts < 3 {
            let mut given = 0;
            loop {
                match sink.send(&mut packet, given) {
                    Sent::Done => break,
                    Sent::Part(now) => {
                        parts += 1;
                        given = now;
                        let mut taken = vec![0; 100_000];
                        bytes += theirs.read(&mut taken).unwrap();
                    }
                    Sent::Lost(why) => panic!("{why}"),
                }
            }
            whole += 1;
        }
        theirs.set_nonblocking(true).unwrap();
        let mut taken = vec![0; 100_000];
        while let Ok(more) = theirs.read(&mut taken) {
            bytes += more;
        }
        assert_eq!(bytes, whole * (LENGTH_BYTES + 60_000));
    }

    #[test]
    fn the_end_of_a_stream_is_the_end_of_the_source() {
        let (ours, mut theirs) = pair();
        let mut source = StreamSource::new(ours, Nobody);
        let mut packet = vec![1; super::super::MAX_PACKET_BYTES];
        assert!(matches!(source.receive(&mut packet), Received::Nothing));
        theirs.write_all(&[0, 0, 0, 2, 8, 9, 0, 0]).unwrap();
        assert!(matches!(source.receive(&mut packet), Received::Packet(14)));
        assert_eq!(packet[..15], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 9, 1]);
        assert!(matches!(source.receive(&mut packet), Received::Nothing));
        drop(theirs);
        assert!(matches!(source.receive(&mut packet), Received::Lost(why) if why == "nobody"));
    }
}
