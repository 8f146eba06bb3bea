//! Any packets in any order.

use super::Guest;
use crate::virtio::vsock::connection::{BUFFER_BYTES, Ports};
use crate::virtio::vsock::packet::Header;
use crate::virtio::vsock::switchboard::MAX_CONNECTIONS;
use crate::virtio::vsock::testing::{Place, header};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

fn any_packet() -> impl Strategy<Value = (Header, usize)> {
    let port = || prop_oneof![8 => 0..4u32, 1 => any::<u32>()];
    let operation = prop_oneof![20 => 1..8u16, 1 => any::<u16>()];
    let numbers = (any::<u32>(), any::<u32>(), 0..8u32);
    let bytes = prop_oneof![4 => 0..300usize, 1 => 0..70_000usize];
    let odd = prop_oneof![30 => Just(0), 1 => 1..4u8];
    (port(), port(), operation, numbers, bytes, odd).prop_map(
        |(guest, host, operation, numbers, bytes, odd)| {
            let header = Header {
                bytes: bytes as u32,
                flags: numbers.2,
                buffer_bytes: numbers.0,
                forwarded: numbers.1,
                ..header(operation, Ports { guest, host })
            };
            let header = match odd {
                1 => Header {
                    source_cid: 1,
                    ..header
                },
                2 => Header {
                    destination_cid: 1,
                    ..header
                },
                3 => Header { kind: 2, ..header },
                _ => header,
            };
            (header, bytes)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any packets in any order, with a host that does this and that: nothing panics, and all bounds hold.
    #[test]
    fn any_packets_are_survived(steps in prop::collection::vec((any_packet(), 0..8u8), 0..120)) {
        let mut guest = Guest::new();
        let listener = guest.place.listen(1);
        listener.set_nonblocking(true).unwrap();
        let mut sockets = Vec::new();
        for ((header, bytes), host) in steps {
            if guest.board.takes() {
                let data = if bytes as u32 <= BUFFER_BYTES { vec![1; bytes] } else { Vec::new() };
                guest.board.take(&header, &data);
            }
            match host {
                0 => sockets.extend(listener.accept().map(|(socket, _)| socket)),
                1 => sockets.push(guest.place.client(header.source_port)),
                2 => drop(sockets.pop()),
                3 => {
                    if let Some(socket) = sockets.last_mut() {
                        socket.set_nonblocking(true).unwrap();
                        let _ = socket.write(&[2; 5000]);
                        let _ = socket.read(&mut [0; 5000]);
                    }
                }
                _ => drop(guest.board.give(&mut [0; 2000])),
            }
            guest.board.look();
            prop_assert!(guest.board.connections() <= MAX_CONNECTIONS);
        }
        // What is there for the guest comes to an end.
        sockets.clear();
        for _ in 0..10_000 {
            guest.board.look();
            if guest.board.give(&mut [0; 2000]).is_none() {
                break;
            }
        }
        prop_assert!(!guest.board.has_packet());
        guest.board.clear();
        prop_assert_eq!(guest.board.connections(), 0);
        guest.connect(Ports { guest: 70, host: 1 }, &listener_again(&guest.place));
    }
}

/// A new listener in place of the one whose clients nobody wants.
fn listener_again(place: &Place) -> UnixListener {
    std::fs::remove_file(place.0.join("v_1")).unwrap();
    place.listen(1)
}
