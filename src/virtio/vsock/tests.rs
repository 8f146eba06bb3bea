//! The socket device with real sockets of the host, and a guest that is played packet by packet.

mod packets;
mod queues;

use super::connection::{BUFFER_BYTES, Ports};
use super::packet::{HEADER_BYTES, HOST_CID, Header, NEITHER, NO_RECEIVE, NO_SEND, op};
use super::queues::Between;
use super::switchboard::{MAX_CONNECTIONS, MAX_REFUSALS, MAX_SILENT, Switchboard};
use super::testing::{CID, PORTS, Place, header, switchboard};
use crate::virtio::testing::LIMIT;
use crossbeam_channel::Receiver;
use nix::poll::{PollFd, PollFlags, poll};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Instant;

/// A guest without queues: packets go straight to the switchboard.
struct Guest {
    place: Place,
    board: Switchboard,
    lines: Receiver<String>,
    /// Its credit.
    buffer_bytes: u32,
    forwarded: u32,
}

impl Guest {
    fn new() -> Guest {
        let place = Place::new();
        let (board, lines) = switchboard(&place, &Between::new(1).unwrap());
        Guest {
            place,
            board,
            lines,
            buffer_bytes: 1 << 20,
            forwarded: 0,
        }
    }

    fn send(&mut self, operation: u16, ports: Ports, flags: u32, data: &[u8]) {
        let header = Header {
            bytes: data.len() as u32,
            flags,
            buffer_bytes: self.buffer_bytes,
            forwarded: self.forwarded,
            ..header(operation, ports)
        };
        self.board.take(&header, data);
    }

    /// What is there for it.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        self.board.look();
        let mut buffer = [0; HEADER_BYTES + 4096];
        let bytes = self.board.give(&mut buffer)?;
        let header = Header::from_bytes(buffer.first_chunk().unwrap());
        assert_eq!(
            (header.source_cid, header.destination_cid),
            (HOST_CID, CID.into())
        );
        assert_eq!(bytes, HEADER_BYTES + header.bytes as usize);
        Some((header, buffer[HEADER_BYTES..bytes].to_vec()))
    }

    /// The next, which must be of this operation.
    fn expect(&mut self, operation: u16) -> Header {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some((header, _)) = self.poll() {
                assert_eq!(header.operation, operation, "{header:?}");
                return header;
            }
            self.wait(deadline);
        }
    }

    /// Waits until there is something to look at.
    fn wait(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() as u16;
        assert_ne!(left, 0, "nothing came");
        poll(&mut [PollFd::new(self.board.fd(), PollFlags::POLLIN)], left).unwrap();
    }

    /// So much data, which may come in several packets.
    fn receive(&mut self, bytes: usize) -> Vec<u8> {
        let (mut all, deadline) = (Vec::new(), Instant::now() + LIMIT);
        while all.len() < bytes {
            match self.poll() {
                Some((header, data)) if header.operation == op::RW => all.extend(data),
                Some((header, _)) => assert_eq!(header.operation, op::CREDIT_UPDATE),
                None => self.wait(deadline),
            }
        }
        assert_eq!(all.len(), bytes);
        all
    }

    /// A connection to a port of the host.
    fn connect(&mut self, ports: Ports, listener: &UnixListener) -> UnixStream {
        self.send(op::REQUEST, ports, 0, &[]);
        self.expect(op::RESPONSE);
        let socket = listener.accept().unwrap().0;
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        // It is writable by now, which has to be noticed.
        self.board.look();
        socket
    }
}

fn read_line(client: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn is_over(socket: &mut UnixStream) -> bool {
    matches!(socket.read(&mut [0; 16]), Ok(0))
}

#[test]
fn the_guest_reaches_a_port_of_the_host_and_each_direction_ends_by_itself() {
    let mut guest = Guest::new();
    let listener = guest.place.listen(52);
    let mut host = guest.connect(PORTS, &listener);
    guest.send(op::RW, PORTS, 0, b"question");
    let mut read = [0; 8];
    host.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"question");
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.receive(6), b"answer");
    // The host has said all that it has to say, and still listens.
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_SEND);
    guest.send(op::RW, PORTS, 0, b"more");
    host.read_exact(&mut read[..4]).unwrap();
    guest.send(op::SHUTDOWN, PORTS, NO_SEND, &[]);
    assert!(is_over(&mut host));
    // Until something happens again, there is nothing to look at.
    guest.board.look();
    guest.board.look();
    let quiet = poll(&mut [PollFd::new(guest.board.fd(), PollFlags::POLLIN)], 0u16).unwrap();
    assert_eq!(quiet, 0, "it wakes itself");
    drop(host);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NEITHER);
    guest.send(op::SHUTDOWN, PORTS, NEITHER, &[]);
    assert_eq!(guest.expect(op::RST).source_port, 52);
    assert_eq!(guest.board.connections(), 0);
    // The other way round: the guest is first, and its ports can be used at once again.
    let mut host = guest.connect(PORTS, &listener);
    guest.send(op::SHUTDOWN, PORTS, NO_RECEIVE, &[]);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send(op::SHUTDOWN, PORTS, NO_SEND, &[]);
    assert!(is_over(&mut host));
    guest.expect(op::RST);
    guest.connect(PORTS, &listener);
}

#[test]
fn a_port_that_nobody_listens_at_is_refused_and_said() {
    let mut guest = Guest::new();
    guest.send(op::REQUEST, PORTS, 0, &[]);
    let refused = guest.expect(op::RST);
    assert_eq!((refused.source_port, refused.destination_port), (52, 1000));
    assert_eq!(guest.board.connections(), 0);
    let line = guest.lines.try_recv().unwrap();
    assert!(
        line.contains("port 52") && line.contains("v_52 cannot be reached: No such file"),
        "{line}"
    );
    // A socket whose owner is gone.
    drop(guest.place.listen(52));
    guest.send(op::REQUEST, PORTS, 0, &[]);
    guest.expect(op::RST);
    // Another type, another host: refused in the name of whom it was for.
    for request in [
        Header {
            kind: 2,
            ..header(op::REQUEST, PORTS)
        },
        Header {
            destination_cid: 9,
            ..header(op::REQUEST, PORTS)
        },
    ] {
        guest.board.take(&request, &[]);
        let mut buffer = [0; HEADER_BYTES + 1];
        guest.board.give(&mut buffer).unwrap();
        let answer = Header::from_bytes(buffer.first_chunk().unwrap());
        assert_eq!((answer.operation, answer.kind), (op::RST, request.kind));
        assert_eq!(answer.source_cid, request.destination_cid);
    }
    // In nobody's name: not answered at all.
    guest.board.take(
        &Header {
            source_cid: 8,
            ..header(op::REQUEST, PORTS)
        },
        &[],
    );
    assert!(!guest.board.has_packet());
}

#[test]
fn the_host_reaches_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let mut client = guest.place.client(80);
    client.write_all(b"GET").unwrap();
    let request = guest.expect(op::REQUEST);
    assert_eq!(request.destination_port, 80);
    assert!(request.source_port >= 1 << 30);
    let ports = Ports {
        guest: 80,
        host: request.source_port,
    };
    assert!(guest.poll().is_none(), "nothing before it has agreed");
    guest.send(op::RESPONSE, ports, 0, &[]);
    assert_eq!(read_line(&mut client), format!("OK {}\n", request.source_port));
    assert_eq!(guest.receive(3), b"GET");
    guest.send(op::RW, ports, 0, b"page");
    guest.send(op::SHUTDOWN, ports, NEITHER, &[]);
    let mut page = String::new();
    client.read_to_string(&mut page).unwrap();
    assert_eq!(page, "page");
    guest.expect(op::RST);

    // One that the guest refuses, one that does not wait, and one that says something else.
    let mut refused = guest.place.client(81);
    let request = guest.expect(op::REQUEST);
    guest.send(
        op::RST,
        Ports {
            guest: 81,
            host: request.source_port,
        },
        0,
        &[],
    );
    assert!(is_over(&mut refused));
    let impatient = guest.place.client(82);
    guest.expect(op::REQUEST);
    drop(impatient);
    assert_eq!(guest.expect(op::RST).destination_port, 82);
    let mut stranger = UnixStream::connect(guest.place.socket()).unwrap();
    stranger.write_all(b"HELO\n").unwrap();
    assert!(guest.poll().is_none());
    // What it said was not all read, or was: both are an end.
    assert!(matches!(stranger.read(&mut [0; 4]), Ok(0) | Err(_)));
    assert_eq!(guest.board.connections(), 0);
    // A line that comes in pieces.
    let mut slow = UnixStream::connect(guest.place.socket()).unwrap();
    for piece in ["CON", "NECT 8", "3\n"] {
        assert!(guest.poll().is_none());
        slow.write_all(piece.as_bytes()).unwrap();
    }
    assert_eq!(guest.expect(op::REQUEST).destination_port, 83);
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_nothing_is_lost() {
    let mut guest = Guest::new();
    let listener = guest.place.listen(52);
    let mut host = guest.connect(PORTS, &listener);
    let (mut sent, mut known) = (0u32, 0u32);
    let byte = |at: u32| (at % 251) as u8;
    // As much as the guest may send, until nothing comes that allows more.
    loop {
        let bytes = (BUFFER_BYTES - (sent - known)).min(5000);
        if bytes == 0 {
            let Some((told, _)) = guest.poll() else { break };
            assert_eq!(told.operation, op::CREDIT_UPDATE);
            known = told.forwarded;
            continue;
        }
        let data: Vec<u8> = (sent..sent + bytes).map(byte).collect();
        guest.send(op::RW, PORTS, 0, &data);
        sent += bytes;
    }
    // What the socket holds, and ours.
    assert!(sent > BUFFER_BYTES && sent < 8 << 20, "{sent}");
    // The guest closes; all of it still gets there.
    guest.send(op::SHUTDOWN, PORTS, NEITHER, &[]);
    guest.expect(op::RST);
    assert_eq!(guest.board.connections(), 1, "the rest waits for the host");
    let (mut got, mut piece) = (0, [0; 10_000]);
    loop {
        guest.board.look();
        match host.read(&mut piece).unwrap() {
            0 => break,
            bytes => {
                assert!(
                    piece[..bytes]
                        .iter()
                        .zip(got..)
                        .all(|(have, at)| *have == byte(at))
                );
                got += bytes as u32;
            }
        }
    }
    assert_eq!((got, guest.board.connections()), (sent, 0));
    // More than it may: it loses the connection.
    let _host = guest.connect(PORTS, &listener);
    guest.send(op::RW, PORTS, 0, &vec![0; BUFFER_BYTES as usize + 1]);
    guest.expect(op::RST);
}

#[test]
fn a_guest_that_does_not_read_stops_the_host() {
    let mut guest = Guest::new();
    let listener = guest.place.listen(52);
    guest.buffer_bytes = 10_000;
    let mut host = guest.connect(PORTS, &listener);
    host.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let mut got = Vec::new();
    loop {
        match host.write(&[5; 4096]) {
            Ok(bytes) => sent += bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        while let Some((header, data)) = guest.poll() {
            assert!(
                matches!(header.operation, op::RW | op::CREDIT_REQUEST),
                "{header:?}"
            );
            got.extend(data);
        }
    }
    assert_eq!(got.len(), 10_000, "its credit, to the byte");
    assert!(sent > 10_000 && sent < 8 << 20, "{sent}");
    host.shutdown(Shutdown::Write).unwrap();
    while got.len() < sent {
        guest.forwarded = got.len() as u32;
        guest.send(op::CREDIT_UPDATE, PORTS, 0, &[]);
        let bytes = (sent - got.len()).min(10_000);
        got.extend(guest.receive(bytes));
    }
    guest.expect(op::SHUTDOWN);
    assert!(got.iter().all(|byte| *byte == 5));
}

#[test]
fn a_hundred_connections_each_way_at_once() {
    let mut guest = Guest::new();
    let listener = guest.place.listen(52);
    let mut hosts = BTreeMap::new();
    for guest_port in 0..100 {
        let ports = Ports {
            guest: guest_port,
            host: 52,
        };
        hosts.insert(guest_port, guest.connect(ports, &listener));
    }
    let mut clients = BTreeMap::new();
    for _ in 0..100 {
        let client = guest.place.client(80);
        let host_port = guest.expect(op::REQUEST).source_port;
        guest.send(
            op::RESPONSE,
            Ports {
                guest: 80,
                host: host_port,
            },
            0,
            &[],
        );
        clients.insert(host_port, client);
    }
    for (host_port, client) in &mut clients {
        assert_eq!(read_line(client), format!("OK {host_port}\n"));
    }
    // Each gets its own number through, in both directions and in any order.
    for (port, socket) in hosts.iter_mut().chain(&mut clients) {
        socket.write_all(&port.to_le_bytes()).unwrap();
    }
    let mut seen = 0;
    while seen < 200 {
        let (header, data) = guest.poll().expect("all of it is there");
        if header.operation == op::RW {
            let mine = if header.source_port == 52 {
                header.destination_port
            } else {
                header.source_port
            };
            assert_eq!(data, mine.to_le_bytes());
            let ports = Ports {
                guest: header.destination_port,
                host: header.source_port,
            };
            guest.send(op::RW, ports, 0, &data);
            seen += 1;
        }
    }
    for (port, socket) in hosts.iter_mut().chain(&mut clients) {
        let mut back = [0; 4];
        socket.read_exact(&mut back).unwrap();
        assert_eq!(back, port.to_le_bytes());
    }
    drop((hosts, clients));
    let mut ended = 0;
    while ended < 200 {
        let (header, _) = guest.poll().expect("all have gone");
        assert_eq!((header.operation, header.flags), (op::SHUTDOWN, NEITHER));
        guest.send(
            op::SHUTDOWN,
            Ports {
                guest: header.destination_port,
                host: header.source_port,
            },
            NEITHER,
            &[],
        );
        guest.expect_reset();
        ended += 1;
    }
    assert_eq!(guest.board.connections(), 0);
}

impl Guest {
    /// A refusal goes first.
    fn expect_reset(&mut self) {
        let (header, _) = self.poll().expect("a refusal");
        assert_eq!(header.operation, op::RST);
    }
}

#[test]
fn everything_is_bounded() {
    let mut guest = Guest::new();
    // Connections.
    let listener = guest.place.listen(52);
    listener.set_nonblocking(true).unwrap();
    let mut hosts = Vec::new();
    for guest_port in 0..MAX_CONNECTIONS as u32 {
        hosts.push(guest.connect(
            Ports {
                guest: guest_port,
                host: 52,
            },
            &listener,
        ));
    }
    let one_more = Ports {
        guest: 5000,
        host: 52,
    };
    guest.send(op::REQUEST, one_more, 0, &[]);
    assert_eq!(guest.expect(op::RST).destination_port, 5000);
    // A client waits until there is room.
    let _client = guest.place.client(80);
    assert!(guest.poll().is_none());
    guest.send(op::RST, Ports { guest: 0, host: 52 }, 0, &[]);
    assert_eq!(guest.expect(op::REQUEST).destination_port, 80);
    guest.board.clear();
    // Clients that say nothing: the oldest has to go.
    let mut silent: Vec<UnixStream> = (0..MAX_SILENT)
        .map(|_| UnixStream::connect(guest.place.socket()))
        .inspect(|_| guest.board.look())
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(guest.board.connections(), MAX_SILENT);
    silent[0].set_nonblocking(true).unwrap();
    assert_eq!(
        silent[0].read(&mut [0]).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    let _one_more = UnixStream::connect(guest.place.socket()).unwrap();
    guest.board.look();
    assert_eq!(guest.board.connections(), MAX_SILENT);
    assert!(is_over(&mut silent[0]));
    guest.board.clear();
    // Refusals: then neither packets nor clients are taken.
    for _ in 0..MAX_REFUSALS {
        assert!(guest.board.takes());
        guest.send(op::RW, PORTS, 0, b"x");
    }
    assert!(!guest.board.takes());
    let _client = guest.place.client(81);
    guest.board.look();
    assert_eq!(guest.board.connections(), 0);
    for _ in 0..MAX_REFUSALS {
        guest.expect(op::RST);
    }
    assert!(guest.board.takes());
    assert_eq!(guest.expect(op::REQUEST).destination_port, 81);
    // And the log.
    for _ in 0..1000 {
        guest.send(op::REQUEST, Ports { guest: 1, host: 9 }, 0, &[]);
        guest.expect(op::RST);
    }
    assert!(guest.lines.try_iter().count() < 10);
}

#[test]
fn a_socket_without_room_for_another_is_tried_until_there_is() {
    let mut guest = Guest::new();
    let listener = guest.place.listen(52);
    // std's listeners have room for thousands.
    let small = nix::sys::socket::Backlog::new(0).unwrap();
    nix::sys::socket::listen(&listener, small).unwrap();
    for guest_port in 0..3 {
        guest.send(
            op::REQUEST,
            Ports {
                guest: guest_port,
                host: 52,
            },
            0,
            &[],
        );
    }
    guest.expect(op::RESPONSE);
    let mut sockets = Vec::new();
    while sockets.len() < 2 {
        sockets.push(listener.accept().unwrap());
        guest.expect(op::RESPONSE);
    }
    // One at a time is let in, and whom nobody lets in is refused.
    guest.send(op::REQUEST, Ports { guest: 8, host: 52 }, 0, &[]);
    guest.send(op::REQUEST, Ports { guest: 9, host: 52 }, 0, &[]);
    assert_eq!(guest.expect(op::RST).source_port, 52);
}

#[test]
fn the_socket_goes_with_the_device() {
    let guest = Guest::new();
    let path = guest.place.socket();
    assert!(path.exists());
    drop(guest.board);
    assert!(!Path::exists(&path));
}
