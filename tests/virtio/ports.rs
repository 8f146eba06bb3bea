//! Ports in whole machines: one that leads to a socket, and one to a file.

use crate::driver::Driver;
use crate::machine::{LIMIT, Machine, Scratch, config};
use crate::ways;
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::request::{Answer, Command};
use actor_vmm::machine::state::State;
use actor_vmm::virtio::config::VirtioConfig;
use actor_vmm::virtio::console::ports::talk::{MESSAGE_BYTES, Message, event};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};

const OUT: u64 = 0x30_0000;
const IN: u64 = 0x40_0000;
const BYTES: u32 = 100_000;

/// Queues: control, then of the first port, then of the second.
const TELL: u32 = 2;
const HEAR: u32 = 3;
const RECEIVE: u32 = 4;
const TRANSMIT: u32 = 5;
const INTO_FILE: u32 = 7;
const QUEUES: u32 = 8;

fn wait(driver: &Driver<'_>, queue: u32) {
    let deadline = Instant::now() + LIMIT;
    while !driver.all_used(queue) {
        assert!(Instant::now() < deadline, "queue {queue} is not served");
        std::thread::yield_now();
    }
    driver.pending();
}

fn say(driver: &mut Driver<'_>, event: u16, id: u32, value: u16) {
    let bytes = Message { id, event, value }.to_bytes();
    driver
        .machine
        .memory
        .write_slice(&bytes, GuestAddress(OUT))
        .unwrap();
    driver.offer_in(HEAR, &[(OUT, MESSAGE_BYTES as u32, false)]);
    wait(driver, HEAR);
}

fn told(driver: &mut Driver<'_>) -> (u32, u16, u16) {
    driver.offer_in(TELL, &[(IN, 100, true)]);
    wait(driver, TELL);
    let bytes: [u8; MESSAGE_BYTES] = driver.machine.memory.read_obj(GuestAddress(IN)).unwrap();
    let message = Message::from_bytes(bytes);
    (message.id, message.event, message.value)
}

#[test]
fn bytes_go_both_ways_through_pauses_and_after_resets_under_every_discipline() {
    for (way, transport, dispatch, placements) in ways() {
        let (socket, file) = (Scratch::new(&[]), Scratch::new(b"from before"));
        std::fs::remove_file(&socket.0).unwrap();
        let virtio = VirtioConfig {
            ports: vec![
                format!("name=a,uds={}", socket.0.display()).parse().unwrap(),
                format!("name=b,file={}", file.0.display()).parse().unwrap(),
            ],
            transport,
            ..VirtioConfig::default()
        };
        // The placements are those of other devices.
        let placements = placements.into_iter().take(1);
        let placements = placements.map(|(_, kind)| ("ports0".to_string(), kind));
        let machine = Machine::start(config(dispatch, placements.collect(), virtio));
        assert_eq!(
            std::fs::metadata(&socket.0).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let mut driver = Driver::new(&machine, transport, 0);
        assert_eq!((driver.device_type(), driver.field(4)), (3, 3), "{way}");
        let mut client = UnixStream::connect(&socket.0).unwrap();
        let mut kept = Vec::new();
        for round in 0..3u8 {
            driver.start_queues(QUEUES);
            say(&mut driver, event::DEVICE_READY, 0, 1);
            assert_eq!(told(&mut driver), (1, event::DEVICE_ADD, 1), "{way}");
            assert_eq!(told(&mut driver), (2, event::DEVICE_ADD, 1), "{way}");
            say(&mut driver, event::PORT_READY, 1, 1);
            assert_eq!(told(&mut driver), (1, event::PORT_NAME, 1), "{way}");
            assert_eq!(told(&mut driver), (1, event::PORT_OPEN, 1), "{way}");
            say(&mut driver, event::PORT_OPEN, 1, 1);
            let bytes: Vec<u8> = (0..BYTES).map(|at| (at as u8) ^ round).collect();
            machine.memory.write_slice(&bytes, GuestAddress(OUT)).unwrap();
            driver.offer_in(TRANSMIT, &[(OUT, BYTES, false)]);
            driver.offer_in(INTO_FILE, &[(OUT, BYTES, false)]);
            assert_eq!(
                machine.address.ask(Command::Pause),
                Answer::Done(State::Paused),
                "{way}"
            );
            assert_eq!(
                machine.address.ask(Command::Resume),
                Answer::Done(State::Running),
                "{way}"
            );
            let mut got = vec![0; BYTES as usize];
            client.read_exact(&mut got).unwrap();
            assert!(got == bytes, "{way}");
            wait(&driver, TRANSMIT);
            wait(&driver, INTO_FILE);
            kept.extend(bytes);
            client.write_all(&[round; 5000]).unwrap();
            driver.offer_in(RECEIVE, &[(IN, 5000, true)]);
            wait(&driver, RECEIVE);
            let mut got = [0; 5000];
            machine.memory.read_slice(&mut got, GuestAddress(IN)).unwrap();
            // In as many pieces as the socket gave; the first is here.
            assert_eq!(got[0], round, "{way}");
            let rest = got.iter().rposition(|byte| *byte == round).unwrap() + 1;
            assert_eq!(rest, 5000, "{way}: a socket gives what was written at once");
            machine
                .memory
                .write_slice(&[0xff; 5000], GuestAddress(IN))
                .unwrap();
            driver.set_status(0);
            assert_eq!(driver.status(), 0, "{way}");
        }
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
        assert!(std::fs::read(&file.0).unwrap() == kept, "{way}");
        assert!(!socket.0.exists(), "{way}");
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0, "{way}");
    }
}
