//! The console's queues, each on its thread with guest memory, and the event loop's end in the test's hands.

use super::{OUTPUT_BYTES, OpenedConsole, Size, open};
use crate::host::character::{HostEnd, wake};
use crate::host::events::Recipient;
use crate::virtio::testing::{LIMIT, Outcome, R, Rig, W};
use std::sync::Arc;
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

const DATA: u64 = 0x5000;

/// A console whose host's side is played.
struct Played {
    receive: Rig,
    transmit: Rig,
    end: HostEnd,
    input: Arc<EventFd>,
    room: Arc<EventFd>,
    waker: Arc<EventFd>,
}

impl Played {
    fn new() -> Played {
        let OpenedConsole {
            mut handlers, host, ..
        } = open(None).unwrap();
        let Recipient::Actors { input, room } = host.recipient else {
            panic!()
        };
        let transmit = Rig::new(handlers.pop().unwrap());
        let receive = Rig::new(handlers.pop().unwrap());
        Played {
            receive,
            transmit,
            end: host.end,
            input,
            room,
            waker: host.waker,
        }
    }

    /// Everything of `bytes`, as fast as the guest takes it.
    fn type_in(&mut self, bytes: &[u8]) -> usize {
        let given = self.end.give(bytes);
        wake(&self.input);
        given
    }

    /// What the guest has sent: waits until there is something.
    fn read(&mut self) -> Vec<u8> {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.end.up();
            let bytes: Vec<u8> = self.end.output().into_iter().collect();
            if self.end.wants_output_ready() {
                wake(&self.room);
            }
            if !bytes.is_empty() {
                return bytes;
            }
            assert!(Instant::now() < deadline, "the guest's output does not come");
            if self.end.rest() {
                while self.waker.read().is_err() && Instant::now() < deadline {
                    std::thread::yield_now();
                }
            }
        }
    }
}

#[test]
fn bytes_go_both_ways_and_chains_may_be_of_any_shape() {
    let mut console = Played::new();
    assert_eq!(console.type_in(b"typed"), 5);
    assert_eq!(
        console.receive.request(&[W(DATA, 2), W(DATA + 0x100, 64)]),
        Outcome::Used(5)
    );
    assert_eq!(console.receive.read(DATA, 2), b"ty");
    assert_eq!(console.receive.read(DATA + 0x100, 3), b"ped");
    console.transmit.write(DATA, b"ab");
    console.transmit.write(DATA + 0x100, b"cde");
    let pieces = [R(DATA, 2), R(DATA + 0x100, 0), R(DATA + 0x100, 3)];
    assert_eq!(console.transmit.request(&pieces), Outcome::Used(0));
    assert_eq!(console.transmit.request(&[]), Outcome::Used(0));
    assert_eq!(console.read(), b"abcde");
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_nothing_is_lost() {
    let mut console = Played::new();
    let bytes: Vec<u8> = (0..OUTPUT_BYTES * 3)
        .map(|at| (at * 7 + at / 256) as u8)
        .collect();
    console.transmit.write(DATA, &bytes);
    // One chain of three times what the ring holds: it is not given back before the last piece is taken.
    console.transmit.provide(&[R(DATA, bytes.len() as u32)]);
    let mut got = Vec::new();
    while got.len() < bytes.len() {
        assert_eq!(
            console.transmit.poll_used(),
            None,
            "{} bytes were read",
            got.len()
        );
        got.extend(console.read());
        if got.len() + OUTPUT_BYTES >= bytes.len() {
            break;
        }
    }
    assert_eq!(console.transmit.outcome(), Outcome::Used(0));
    while got.len() < bytes.len() {
        got.extend(console.read());
    }
    assert!(got == bytes);
}

#[test]
fn what_a_reset_finds_under_way_is_for_the_next_driver_or_nobody() {
    let mut console = Played::new();
    // Half a chain is in the ring; the next life's begins anew.
    console.transmit.write(DATA, &vec![1; OUTPUT_BYTES * 2]);
    console.transmit.provide(&[R(DATA, 2 * OUTPUT_BYTES as u32)]);
    let first = console.read();
    assert!(first.iter().all(|byte| *byte == 1));
    console.transmit.start();
    console.transmit.write(DATA, b"new");
    console.transmit.provide(&[R(DATA, 3)]);
    let mut rest = Vec::new();
    while !rest.ends_with(b"new") {
        rest.extend(console.read());
    }
    assert!(rest[..rest.len() - 3].iter().all(|byte| *byte == 1));
    assert!(first.len() + rest.len() <= 2 * OUTPUT_BYTES + 3);
    assert_eq!(console.transmit.outcome(), Outcome::Used(0));
    // Typed without a driver: the first that comes gets it.
    console.receive.remote.stop();
    console.type_in(b"early");
    console.receive.start();
    assert_eq!(console.receive.request(&[W(DATA, 64)]), Outcome::Used(5));
    assert_eq!(console.receive.read(DATA, 5), b"early");
}

#[test]
fn more_than_the_ring_holds_is_typed_in_as_the_guest_takes_it() {
    let mut console = Played::new();
    let bytes: Vec<u8> = (0..100_000u32).map(|at| (at * 3 + at / 256) as u8).collect();
    let mut given = console.type_in(&bytes);
    assert!(given < bytes.len());
    let mut got = Vec::new();
    while got.len() < bytes.len() {
        let Outcome::Used(length) = console.receive.request(&[W(DATA, 3000)]) else {
            panic!()
        };
        got.extend(console.receive.read(DATA, length as usize));
        if console.waker.read().is_ok() {
            given += console.type_in(&bytes[given..]);
        }
    }
    assert!(got == bytes);
}

#[test]
fn a_driver_is_told_of_another_size() {
    let size = Size::new(80, 25);
    let mut opened = open(Some(size.clone())).unwrap();
    let published = opened.identity.published.clone().unwrap();
    assert_eq!((opened.identity.features, published.value()), (1, 25 << 16 | 80));
    let mut receive = Rig::new(opened.handlers.remove(0));
    let mut transmit = Rig::new(opened.handlers.remove(0));
    for _ in 0..3 {
        // A driver that has just begun, by what it says first.
        receive.start();
        transmit.start();
        assert_eq!(transmit.request(&[R(DATA, 1)]), Outcome::Used(0));
        receive.reconfigured();
    }
    let bell = receive.remote.bell().try_clone().unwrap();
    let switch = size.switch(bell);
    for (columns, rows) in [(132, 43), (1, 65535)] {
        switch.set(columns, rows);
        receive.reconfigured();
        assert_eq!(published.value(), u32::from(rows) << 16 | u32::from(columns));
    }
}
