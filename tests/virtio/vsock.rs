//! The socket device in whole machines.

use crate::driver::Driver;
use crate::machine::{LIMIT, Machine, Scratch, config};
use crate::ways;
use actor_vmm::machine::memory::MIN_BYTES;
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::request::{Answer, Command};
use actor_vmm::machine::state::State;
use actor_vmm::virtio::Transport;
use actor_vmm::virtio::config::VirtioConfig;
use actor_vmm::virtio::vsock::packet::{HEADER_BYTES, HOST_CID, Header, NEITHER, STREAM, op};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};

const CID: u32 = 9;
/// Where packets go out, and come in.
const OUT: u64 = 0x30_0000;
const IN: u64 = 0x40_0000;
const IN_BYTES: u32 = 8192;

/// Where the device's socket is.
struct Place(Scratch);

impl Place {
    fn new() -> Place {
        let scratch = Scratch::new(&[]);
        std::fs::remove_file(&scratch.0).unwrap();
        std::fs::create_dir(&scratch.0).unwrap();
        Place(scratch)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.0.join(name)
    }

    fn config(&self, transport: Transport) -> VirtioConfig {
        VirtioConfig {
            vsock: Some(
                format!("cid={CID},uds={}", self.path("v").display())
                    .parse()
                    .unwrap(),
            ),
            transport,
            ..VirtioConfig::default()
        }
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("v_{port}"))).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0.0);
    }
}

/// The driver, and a program above it.
struct Program<'a>(Driver<'a>);

impl Program<'_> {
    fn start(&mut self) {
        // Receive, transmit, event.
        self.0.start_queues(3);
    }

    fn send(&mut self, operation: u16, guest: u32, host: u32, flags: u32, data: &[u8]) {
        let header = Header {
            source_cid: CID.into(),
            destination_cid: HOST_CID,
            source_port: guest,
            destination_port: host,
            bytes: data.len() as u32,
            kind: STREAM,
            operation,
            flags,
            buffer_bytes: 1 << 30,
            forwarded: 0,
        };
        let memory = &self.0.machine.memory;
        memory.write_slice(&header.to_bytes(), GuestAddress(OUT)).unwrap();
        memory.write_slice(data, GuestAddress(OUT + 64)).unwrap();
        let head = (OUT, HEADER_BYTES as u32, false);
        match data.len() {
            0 => self.0.offer_in(1, &[head]),
            bytes => self.0.offer_in(1, &[head, (OUT + 64, bytes as u32, false)]),
        }
        self.wait(1);
    }

    fn wait(&self, queue: u32) {
        let deadline = Instant::now() + LIMIT;
        while !self.0.all_used(queue) {
            assert!(Instant::now() < deadline, "queue {queue} is not served");
            std::thread::yield_now();
        }
        // One interrupt may have told of both queues.
        self.0.pending();
    }

    /// Gives a buffer for the next packet.
    fn give(&mut self) {
        self.0.offer_in(0, &[(IN, IN_BYTES, true)]);
    }

    /// What is in the buffer that was given.
    fn take(&self) -> (Header, Vec<u8>) {
        self.wait(0);
        let memory = &self.0.machine.memory;
        let header: [u8; HEADER_BYTES] = memory.read_obj_bytes(IN);
        let header = Header::from_bytes(&header);
        let mut data = vec![0; header.bytes as usize];
        memory
            .read_slice(&mut data, GuestAddress(IN + HEADER_BYTES as u64))
            .unwrap();
        (header, data)
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        self.give();
        self.take()
    }
}

trait ReadBytes {
    fn read_obj_bytes(&self, at: u64) -> [u8; HEADER_BYTES];
}

impl ReadBytes for vm_memory::GuestMemoryMmap {
    fn read_obj_bytes(&self, at: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        self.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

/// Every transport, discipline and placement, with a machine and a program in it.
fn everywhere(play: impl Fn(&str, &Place, &Machine, &mut Program<'_>)) {
    for (way, transport, dispatch, placements) in ways() {
        let place = Place::new();
        // Of the two devices of other tests, the place of one.
        let placements = placements.into_iter().take(1);
        let placements = placements.map(|(_, kind)| ("vsock0".to_string(), kind)).collect();
        let machine = Machine::start(config(dispatch, placements, place.config(transport)));
        let mut program = Program(Driver::new(&machine, transport, 0));
        assert_eq!(program.0.device_type(), 19, "{way}");
        program.start();
        play(&way, &place, &machine, &mut program);
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
        assert!(!place.path("v").exists(), "{way}: the socket is left");
    }
}

#[test]
fn programs_talk_both_ways_under_every_discipline_and_placement() {
    everywhere(|way, place, _, program| {
        let mode = std::fs::metadata(place.path("v")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{way}");
        // The guest asks.
        let listener = place.listen(52);
        program.send(op::REQUEST, 1000, 52, 0, &[]);
        assert_eq!(program.next().0.operation, op::RESPONSE, "{way}");
        let mut host = listener.accept().unwrap().0;
        host.set_read_timeout(Some(LIMIT)).unwrap();
        for round in 0..10u8 {
            program.send(op::RW, 1000, 52, 0, &[round; 1000]);
            let mut read = [0; 1000];
            host.read_exact(&mut read).unwrap();
            assert_eq!(read, [round; 1000], "{way}");
            program.give();
            host.write_all(&[round; 2000]).unwrap();
            let mut got = Vec::new();
            loop {
                got.extend(program.take().1);
                if got.len() >= 2000 {
                    break;
                }
                program.give();
            }
            assert_eq!(got, [round; 2000], "{way}");
        }
        program.send(op::SHUTDOWN, 1000, 52, NEITHER, &[]);
        assert_eq!(program.next().0.operation, op::RST, "{way}");
        assert_eq!(host.read(&mut [0]).unwrap(), 0, "{way}");
        // The host asks.
        let mut client = UnixStream::connect(place.path("v")).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.write_all(b"CONNECT 80\nhello").unwrap();
        let (request, _) = program.next();
        assert_eq!(
            (request.operation, request.destination_port),
            (op::REQUEST, 80),
            "{way}"
        );
        let port = request.source_port;
        program.send(op::RESPONSE, 80, port, 0, &[]);
        assert_eq!(program.next().1, b"hello", "{way}");
        program.send(op::RW, 80, port, 0, b"world");
        program.send(op::SHUTDOWN, 80, port, NEITHER, &[]);
        let mut all = String::new();
        client.read_to_string(&mut all).unwrap();
        assert_eq!(all, format!("OK {port}\nworld"), "{way}");
    });
}

#[test]
fn a_reset_with_connections_under_way_leaves_a_device_that_serves() {
    everywhere(|way, place, machine, program| {
        let listener = place.listen(52);
        for round in 0..30u8 {
            program.send(op::REQUEST, 1000, 52, 0, &[]);
            let mut host = listener.accept().unwrap().0;
            host.set_read_timeout(Some(LIMIT)).unwrap();
            assert_eq!(program.next().0.operation, op::RESPONSE, "{way}");
            // Both ways at once, and then no driver any more.
            program.give();
            host.write_all(&[round; 4000]).unwrap();
            program.send(op::RW, 1000, 52, 0, &[round; 4000]);
            program.0.set_status(0);
            assert_eq!((program.0.status(), program.0.pending()), (0, 0), "{way}");
            let clear = [0; IN_BYTES as usize];
            machine.memory.write_slice(&clear, GuestAddress(IN)).unwrap();
            // The host notices; when it has, nobody has written where the driver had its buffer.
            let mut all = Vec::new();
            // What the host had sent was not all taken, which is an end of another kind.
            let _ = host.read_to_end(&mut all);
            assert!(all.len() <= 4000, "{way}");
            let mut after = clear;
            machine.memory.read_slice(&mut after, GuestAddress(IN)).unwrap();
            assert!(after == clear, "{way}: memory was touched after the reset");
            program.start();
        }
    });
}

#[test]
fn a_paused_machine_takes_and_gives_nothing_and_goes_on_where_it_was() {
    everywhere(|way, place, machine, program| {
        let listener = place.listen(52);
        program.send(op::REQUEST, 1000, 52, 0, &[]);
        assert_eq!(program.next().0.operation, op::RESPONSE, "{way}");
        let mut host = listener.accept().unwrap().0;
        let whole = || {
            let mut bytes = vec![0; MIN_BYTES as usize];
            machine.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        for round in 0..10u8 {
            program.give();
            assert_eq!(
                machine.address.ask(Command::Pause),
                Answer::Done(State::Paused),
                "{way}"
            );
            let before = whole();
            host.write_all(&[round; 3000]).unwrap();
            for _ in 0..10 {
                std::thread::yield_now();
            }
            assert!(whole() == before, "{way}: memory was touched while paused");
            assert_eq!(
                machine.address.ask(Command::Resume),
                Answer::Done(State::Running),
                "{way}"
            );
            assert_eq!(program.take().1, [round; 3000], "{way}");
        }
        // A reset of the machine is one of the device.
        assert_eq!(
            machine.address.ask(Command::Reset),
            Answer::Done(State::Running),
            "{way}"
        );
        assert!(matches!(host.read(&mut [0]), Ok(0) | Err(_)), "{way}");
    });
}

#[test]
fn a_driver_that_breaks_a_queue_is_told_to_reset() {
    everywhere(|way, _, _, program| {
        for queue in [1, 0] {
            if queue == 0 {
                // There is something for it.
                program.send(op::RW, 1, 1, 0, b"x");
            }
            program.0.offer_in(queue, &[(IN, 10, queue == 0)]);
            while program.0.interrupt() & 2 == 0 {}
            assert_eq!(program.0.status(), 0x4f, "{way}");
            program.start();
        }
        program.send(op::RW, 1, 1, 0, b"x");
        assert_eq!(program.next().0.operation, op::RST, "{way}");
    });
}
