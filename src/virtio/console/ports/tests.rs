//! The queues of a device with ports, each on its thread with guest memory, and programs of the host.

use super::talk::{Message, event};
use super::testing::{Place, configs};
use super::{PortConfig, open};
use crate::virtio::testing::{Outcome, R, Rig, W, kept_log};
use slog::{Logger, o};
use std::io::{Read, Write};

const DATA: u64 = 0x5000;

/// A device with the ports `a` (a socket) and `b` (a file).
struct Device {
    /// Control receive, control transmit, then of each port receive and transmit.
    tell: Rig,
    hear: Rig,
    receive: Rig,
    transmit: Rig,
    file: Rig,
    place: Place,
}

impl Device {
    fn new() -> Device {
        Device::with_log(Logger::root(slog::Discard, o!()))
    }

    fn with_log(log: Logger) -> Device {
        let place = Place::new();
        let opened = open(&configs(&place), &log).unwrap();
        let mut rigs = opened.handlers.into_iter().skip(2).map(Rig::new);
        let mut next = || rigs.next().unwrap();
        let (tell, hear, receive, transmit) = (next(), next(), next(), next());
        let (_, file) = (next(), next());
        Device {
            tell,
            hear,
            receive,
            transmit,
            file,
            place,
        }
    }

    fn say(&mut self, event: u16, id: u32, value: u16) {
        self.hear.write(DATA, &Message { id, event, value }.to_bytes());
        assert_eq!(self.hear.request(&[R(DATA, 8)]), Outcome::Used(0));
    }

    fn told(&mut self) -> (u32, u16, u16, Vec<u8>) {
        let Outcome::Used(bytes) = self.tell.request(&[W(DATA, 100)]) else {
            panic!()
        };
        let message = Message::from_bytes(self.tell.read(DATA, 8).try_into().unwrap());
        let behind = self.tell.read(DATA + 8, bytes as usize - 8);
        (message.id, message.event, message.value, behind)
    }

    /// As Linux's driver begins.
    fn begin(&mut self) {
        self.say(event::DEVICE_READY, u32::MAX, 1);
        assert_eq!(self.told(), (1, event::DEVICE_ADD, 1, vec![]));
        assert_eq!(self.told(), (2, event::DEVICE_ADD, 1, vec![]));
        self.say(event::PORT_READY, 1, 1);
        assert_eq!(self.told(), (1, event::PORT_NAME, 1, b"a".to_vec()));
    }

    fn reset(&mut self, order: &[usize]) {
        for queue in order {
            let rigs = [
                &mut self.tell,
                &mut self.hear,
                &mut self.receive,
                &mut self.transmit,
                &mut self.file,
            ];
            rigs[*queue % 5].remote.stop();
        }
        for queue in order {
            let rigs = [
                &mut self.tell,
                &mut self.hear,
                &mut self.receive,
                &mut self.transmit,
                &mut self.file,
            ];
            rigs.into_iter().nth(*queue % 5).unwrap().start();
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.transmit.write(DATA, bytes);
        let outcome = self.transmit.request(&[R(DATA, bytes.len() as u32)]);
        assert_eq!(outcome, Outcome::Used(0));
    }

    fn take(&mut self, most: u32) -> Vec<u8> {
        let Outcome::Used(bytes) = self.receive.request(&[W(DATA, most)]) else {
            panic!()
        };
        self.receive.read(DATA, bytes as usize)
    }
}

#[test]
fn a_driver_learns_of_ports_and_bytes_go_both_ways() {
    let mut device = Device::new();
    device.begin();
    device.say(event::PORT_READY, 2, 1);
    assert_eq!(device.told(), (2, event::PORT_NAME, 1, b"b".to_vec()));
    assert_eq!(
        device.told(),
        (2, event::PORT_OPEN, 1, vec![]),
        "a file is always there"
    );
    let mut client = device.place.connect("a");
    assert_eq!(device.told(), (1, event::PORT_OPEN, 1, vec![]));
    client.write_all(b"to the guest").unwrap();
    device.say(event::PORT_OPEN, 1, 1);
    assert_eq!(device.take(6), b"to the");
    assert_eq!(device.take(100), b" guest");
    device.send(b"to the host");
    let mut got = [0; 11];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"to the host");
    // One that has said all still hears.
    client.write_all(b"bye").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(device.take(100), b"bye");
    device.send(b"answer");
    client.read_exact(&mut got[..6]).unwrap();
    drop(client);
    assert_eq!(device.told(), (1, event::PORT_OPEN, 0, vec![]));
    device.send(b"for nobody");
    let mut client = device.place.connect("a");
    assert_eq!(device.told(), (1, event::PORT_OPEN, 1, vec![]));
    device.send(b"next");
    client.read_exact(&mut got[..4]).unwrap();
    assert_eq!(&got[..4], b"next");
    device.file.write(DATA, b"kept");
    assert_eq!(device.file.request(&[R(DATA, 4)]), Outcome::Used(0));
    assert_eq!(std::fs::read(device.place.0.join("b")).unwrap(), b"kept");
}

#[test]
fn who_does_not_read_stops_the_other_and_nothing_is_lost_or_held_up() {
    let mut device = Device::new();
    device.begin();
    device.say(event::PORT_OPEN, 1, 1);
    let mut client = device.place.connect("a");
    assert_eq!(device.told(), (1, event::PORT_OPEN, 1, vec![]));
    // More than a socket holds, in chains that are longer than a touch.
    let bytes: Vec<u8> = (0..600_000u32).map(|at| (at ^ at >> 8) as u8).collect();
    let mut reader = client.try_clone().unwrap();
    device.transmit.write(DATA, &bytes);
    device.transmit.provide(&[R(DATA, bytes.len() as u32)]);
    // Meanwhile the other direction goes on, and so do the control queues.
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || client.write_all(&sent).map(|()| client));
    let mut got = Vec::new();
    while got.len() < bytes.len() {
        got.extend(device.take(50_000));
        device.say(event::PORT_OPEN, 1, 1);
    }
    assert!(got == bytes);
    let client = writer.join().unwrap().unwrap();
    assert_eq!(device.transmit.poll_used(), None, "nobody has read it");
    let mut got = vec![0; bytes.len()];
    reader.read_exact(&mut got).unwrap();
    assert!(got == bytes);
    assert_eq!(device.transmit.outcome(), Outcome::Used(0));
    drop(client);
}

#[test]
fn one_that_leaves_while_the_guest_writes_leaves_nothing_for_the_next() {
    let mut device = Device::new();
    device.begin();
    for round in 0..20u8 {
        let mut client = device.place.connect("a");
        assert_eq!(device.told(), (1, event::PORT_OPEN, 1, vec![]));
        device.transmit.write(DATA, &vec![round; 600_000]);
        device.transmit.provide(&[R(DATA, 600_000)]);
        // Some of it is there, and much is not.
        client.read_exact(&mut [0; 1000]).unwrap();
        drop(client);
        let mut next = device.place.connect("a");
        assert_eq!(
            device.transmit.outcome(),
            Outcome::Used(0),
            "given back all the same"
        );
        assert_eq!(device.told(), (1, event::PORT_OPEN, 0, vec![]));
        assert_eq!(device.told(), (1, event::PORT_OPEN, 1, vec![]));
        device.send(b"new");
        let mut got = [0; 3];
        next.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"new");
        drop(next);
        assert_eq!(device.told(), (1, event::PORT_OPEN, 0, vec![]));
    }
}

#[test]
fn what_the_host_sends_waits_for_a_guest_that_has_the_port_open() {
    let mut device = Device::new();
    device.begin();
    // It has said all and gone before anybody reads, and the next waits for its turn.
    device.place.connect("a").write_all(b"first").unwrap();
    let mut second = device.place.connect("a");
    second.write_all(b"second").unwrap();
    assert_eq!(device.told(), (1, event::PORT_OPEN, 1, vec![]));
    device.receive.provide(&[W(DATA, 100)]);
    // An orderly guest: whatever happens on the other queues, nothing comes.
    for value in [0, 0] {
        device.say(event::PORT_OPEN, 1, value);
    }
    assert_eq!(device.receive.poll_used(), None);
    device.say(event::PORT_OPEN, 1, 1);
    assert_eq!(device.receive.outcome(), Outcome::Used(5));
    assert_eq!(device.receive.read(DATA, 5), b"first");
    assert_eq!(device.take(100), b"second");
    assert_eq!(device.told(), (1, event::PORT_OPEN, 0, vec![]));
    assert_eq!(device.told(), (1, event::PORT_OPEN, 1, vec![]));
}

#[test]
fn a_reset_is_a_new_beginning_whichever_queue_hears_of_it_first() {
    let mut device = Device::new();
    let mut client = device.place.connect("a");
    for round in 0..20 {
        let order: Vec<usize> = (round..round + 5).collect();
        device.reset(&order);
        device.begin();
        assert_eq!(
            device.told(),
            (1, event::PORT_OPEN, 1, vec![]),
            "it is there still"
        );
        client.write_all(b"once").unwrap();
        device.receive.provide(&[W(DATA, 100)]);
        device.say(event::PORT_OPEN, 1, 0);
        assert_eq!(device.receive.poll_used(), None, "open in an earlier life");
        device.say(event::PORT_OPEN, 1, 1);
        assert_eq!(device.receive.outcome(), Outcome::Used(4));
        device.send(b"back");
        client.read_exact(&mut [0; 4]).unwrap();
    }
}

#[test]
fn floods_and_nonsense_are_borne() {
    let (log, lines) = kept_log();
    let mut device = Device::with_log(log);
    for id in [0, 3, 16, u32::MAX] {
        for number in 0..100 {
            device.say(number % 9 + 1, id, number);
        }
    }
    for _ in 0..1000 {
        device.say(event::DEVICE_READY, 7, 1);
        device.say(event::PORT_READY, 1, 1);
        device.say(event::PORT_OPEN, 1, 1);
    }
    let (mut adds, mut names) = (0, 0);
    while (adds, names) != (1, 1) {
        match device.told() {
            (2, event::DEVICE_ADD, 1, _) => adds += 1,
            (1, event::PORT_NAME, 1, _) => names += 1,
            (1, event::DEVICE_ADD, 1, _) => {}
            other => panic!("{other:?}"),
        }
    }
    device.say(event::PORT_READY, 1, 1);
    assert_eq!(
        device.told(),
        (1, event::PORT_NAME, 1, b"a".to_vec()),
        "and no more of it"
    );
    let lines = lines.try_iter().count();
    assert!((1..10).contains(&lines), "{lines}");
    for buffers in [&[R(DATA, 7)][..], &[W(DATA, 8)], &[R(1 << 40, 8)]] {
        assert_eq!(device.hear.request(buffers), Outcome::Broken, "{buffers:?}");
        device.reset(&[0, 1, 2, 3, 4]);
    }
    for buffers in [&[W(DATA, 7)][..], &[R(DATA, 8)], &[W(1 << 40, 80)]] {
        device.reset(&[0, 1, 2, 3, 4]);
        device.say(event::DEVICE_READY, 0, 1);
        assert_eq!(device.tell.request(buffers), Outcome::Broken, "{buffers:?}");
    }
}

#[test]
fn a_full_disk_is_a_line_in_the_log_and_the_guest_goes_on() {
    let (log, lines) = kept_log();
    let port = "name=x,file=/dev/full".parse().unwrap();
    let mut opened = open(&[port], &log).unwrap();
    let mut rig = Rig::new(opened.handlers.remove(5));
    for _ in 0..3 {
        assert_eq!(rig.request(&[R(DATA, 512)]), Outcome::Used(0));
    }
    let lines: Vec<String> = lines.try_iter().collect();
    assert!(lines.len() == 1 && lines[0].contains("/dev/full"), "{lines:?}");
}

#[test]
fn ports_that_cannot_be_are_refused() {
    let place = Place::new();
    let log = Logger::root(slog::Discard, o!());
    let port = |text: &str| -> PortConfig { text.parse().unwrap() };
    let many: Vec<_> = (0..16)
        .map(|number| port(&format!("name=p{number},uds=/x")))
        .collect();
    let file = format!("name=x,uds={}", place.0.display());
    for (ports, said) in [
        (many, "16 times --port"),
        (vec![port("name=x,uds=/a"), port("name=x,file=/b")], "name=x: two"),
        (vec![port("name=x,file=/no/such")], "--port file=/no/such"),
        (vec![port(&file)], "no socket"),
    ] {
        let Err(error) = open(&ports, &log) else {
            panic!("{ports:?}")
        };
        assert!(
            error.to_string().contains(said) && error.is_bad_input(),
            "{error}"
        );
    }
}
