//! The queues, each on its thread, with guest memory.

use crate::virtio::testing::{LIMIT, Outcome, R, Rig, W};
use crate::virtio::vsock::connection::Ports;
use crate::virtio::vsock::packet::{HEADER_BYTES, Header, op};
use crate::virtio::vsock::queues::{Between, Receive, Transmit};
use crate::virtio::vsock::testing::{PORTS, Place, header, switchboard};
use std::io::{Read, Write};

/// The two queues, each with its thread and its own guest memory.
struct Queues {
    place: Place,
    receive: Rig,
    transmit: Rig,
}

const HEAD: u64 = 0x5000;
const DATA: u64 = 0x6000;

impl Queues {
    fn new() -> Queues {
        let place = Place::new();
        let between = Between::new(2).unwrap();
        let (board, _) = switchboard(&place, &between);
        Queues {
            receive: Rig::new(Box::new(Receive::new(board, &between))),
            transmit: Rig::new(Box::new(Transmit::new(&between))),
            place,
        }
    }

    fn send(&mut self, operation: u16, ports: Ports, data: &[u8]) {
        let bytes = data.len() as u32;
        let header = Header {
            bytes,
            ..header(operation, ports)
        };
        self.transmit.write(HEAD, &header.to_bytes());
        self.transmit.write(DATA, data);
        let outcome = self
            .transmit
            .request(&[R(HEAD, HEADER_BYTES as u32), R(DATA, bytes)]);
        assert_eq!(outcome, Outcome::Used(0));
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        let outcome = self
            .receive
            .request(&[W(HEAD, HEADER_BYTES as u32), W(DATA, 4096)]);
        let header = Header::from_bytes(self.receive.read(HEAD, HEADER_BYTES).first_chunk().unwrap());
        assert_eq!(outcome, Outcome::Used(HEADER_BYTES as u32 + header.bytes));
        (header, self.receive.read(DATA, header.bytes as usize))
    }
}

#[test]
fn packets_of_the_guest_get_through_while_it_takes_none() {
    let mut queues = Queues::new();
    let listener = queues.place.listen(52);
    queues.send(op::REQUEST, PORTS, &[]);
    for number in 0..100 {
        queues.send(op::RW, PORTS, &[number; 600]);
    }
    let mut host = listener.accept().unwrap().0;
    let mut all = [0; 60_000];
    host.read_exact(&mut all).unwrap();
    assert!(
        all.chunks(600)
            .zip(0..)
            .all(|(piece, number)| piece == [number; 600])
    );
    assert_eq!(queues.next().0.operation, op::RESPONSE);
    host.write_all(&[9; 5000]).unwrap();
    let mut got = 0;
    while got < 5000 {
        let (header, data) = queues.next();
        if header.operation == op::RW {
            assert!(data.iter().all(|byte| *byte == 9));
            got += data.len();
        }
    }
}

#[test]
fn a_reset_ends_all_connections_and_what_was_on_its_way_is_not_for_the_next() {
    let mut queues = Queues::new();
    let listener = queues.place.listen(52);
    for round in 0..50 {
        queues.send(op::REQUEST, PORTS, &[]);
        assert_eq!(queues.next().0.operation, op::RESPONSE);
        let mut host = listener.accept().unwrap().0;
        host.set_read_timeout(Some(LIMIT)).unwrap();
        queues.send(op::RW, PORTS, &[round; 100]);
        // Nobody knows how much of it was on its way; the receive queue is not always first to know.
        if round % 2 == 0 {
            queues.receive.start();
            queues.transmit.start();
        } else {
            queues.transmit.start();
            queues.receive.start();
        }
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        assert!(all.len() <= 100 && all.iter().all(|byte| *byte == round));
        // The connection is nobody's now.
        queues.send(op::RW, PORTS, b"x");
        assert_eq!(queues.next().0.operation, op::RST);
    }
}

#[test]
fn chains_that_cannot_be_packets() {
    let mut queues = Queues::new();
    let mut too_short = header(op::RW, PORTS);
    too_short.bytes = 11;
    for buffers in [
        &[R(HEAD, 43)][..],
        &[R(HEAD, 44), R(DATA, 10)],
        &[W(HEAD, 100)],
        &[R(1 << 40, 44)],
    ] {
        queues.transmit.write(HEAD, &too_short.to_bytes());
        assert_eq!(queues.transmit.request(buffers), Outcome::Broken, "{buffers:?}");
        queues.transmit.start();
    }
    for buffers in [&[W(HEAD, 44)][..], &[R(HEAD, 100)], &[W(1 << 40, 100)]] {
        // There is something for it.
        let client = queues.place.client(1);
        assert_eq!(queues.receive.request(buffers), Outcome::Broken, "{buffers:?}");
        queues.receive.start();
        drop(client);
    }
}
