//! The queues of a network device, each on its thread, with a host of datagrams.

use super::control::{Control, SecondOrControl};
use super::receive::Receive;
use super::transmit::Transmit;
use super::*;
use crate::virtio::testing::{LIMIT, Outcome, R, Rig, W, kept_log};
use proptest::prelude::*;
use slog::o;
use std::os::unix::net::UnixDatagram;
use vmm_sys_util::eventfd::EventFd;

const MERGE: u64 = 1 << spec::VIRTIO_NET_F_MRG_RXBUF;

fn quiet() -> Logger {
    Logger::root(slog::Discard, o!())
}

/// A packet with an empty header.
fn packet(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES][..], frame].concat()
}

/// A receive queue and the host's side of it.
fn receiver(features: u64) -> (Rig, UnixDatagram) {
    let (pair, host) = testing::pair();
    host.set_read_timeout(Some(LIMIT)).unwrap();
    let link = testing::link(quiet());
    let mut rig = Rig::new(Box::new(Receive::new(pair.0, link.end(true))));
    rig.features = features;
    rig.start();
    (rig, host)
}

fn transmitter() -> (Rig, UnixDatagram) {
    let (pair, host) = testing::pair();
    host.set_read_timeout(Some(LIMIT)).unwrap();
    let link = testing::link(quiet());
    (Rig::new(Box::new(Transmit::new(pair.1, link.end(false)))), host)
}

#[test]
fn a_frame_is_received_into_one_chain() {
    let (mut rig, host) = receiver(0);
    let frame: Vec<u8> = (0..100).collect();
    host.send(&packet(&frame)).unwrap();
    assert_eq!(
        rig.request(&[W(0x5000, 12), W(0x6000, 50), W(0x7000, 2000)]),
        Outcome::Used(112)
    );
    assert_eq!(rig.read(0x5000, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(
        [rig.read(0x6000, 50), rig.read(0x7000, 51)].concat(),
        [&frame[..], &[0]].concat()
    );
}

#[test]
fn a_frame_waits_for_chains_enough_and_is_spread_over_them() {
    let (mut rig, host) = receiver(MERGE);
    let frame: Vec<u8> = (0..1000u32).map(|at| at as u8 ^ 0x5a).collect();
    host.send(&packet(&frame)).unwrap();
    // Three chains of one descriptor each; the third comes when the first two were seen, perhaps.
    for (index, address) in [(0, 0x5000), (1, 0x6000), (2, 0x7000)] {
        rig.describe(crate::virtio::testing::DESCRIPTORS, index, address, 400, 2, 0);
        rig.offer(index);
        rig.remote.ring();
        std::thread::yield_now();
    }
    let outcomes = [(); 3].map(|()| rig.used_next());
    assert_eq!(outcomes, [400, 400, 212]);
    let read = [
        rig.read(0x5000, 400),
        rig.read(0x6000, 400),
        rig.read(0x7000, 212),
    ]
    .concat();
    assert_eq!(read[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    assert_eq!(read[12..], frame);
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_and_its_chain_serves_the_next() {
    for (features, size) in [(0, 256), (MERGE, 1)] {
        let (mut rig, host) = receiver(features);
        // A queue of one has no second chain to merge.
        rig.size = size;
        rig.start();
        host.send(&packet(&[1; 1000])).unwrap();
        host.send(&packet(&[2; 100])).unwrap();
        assert_eq!(rig.request(&[W(0x5000, 500)]), Outcome::Used(112));
        assert_eq!(rig.read(0x500c, 101), [vec![2; 100], vec![0]].concat());
    }
}

#[test]
fn what_is_no_packet_or_not_accepted_is_not_received() {
    let (mut rig, host) = receiver(0);
    host.send(&[1; 5]).unwrap();
    host.send(&packet(&[2; 13])).unwrap();
    let mut checksum = packet(&[3; 60]);
    checksum[0] = spec::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    host.send(&checksum).unwrap();
    for _ in 0..200 {
        // More than are dropped at once.
        host.set_nonblocking(false).unwrap();
        host.send(&checksum).unwrap();
    }
    host.send(&packet(&[4; 60])).unwrap();
    assert_eq!(rig.request(&[W(0x5000, 500)]), Outcome::Used(72));
    assert_eq!(rig.read(0x500c, 60), [4; 60]);
}

#[test]
fn a_chain_without_a_header_breaks_the_device_and_a_reset_mends_it() {
    let (mut rig, host) = receiver(MERGE);
    for buffers in [&[R(0x5000, 500)][..], &[W(u64::MAX - 100, 500)], &[]] {
        // The frame before this one is still there, but for the first.
        let _ = host.send(&packet(&[1; 60]));
        // With merging, one that is too small waits for more, so the queue has one place.
        rig.size = 1;
        rig.start();
        assert_eq!(rig.request(buffers), Outcome::Broken, "{buffers:?}");
        rig.remote.stop();
    }
    rig.start();
    host.send(&packet(&[2; 60])).unwrap();
    assert_eq!(rig.request(&[W(0x5000, 500)]), Outcome::Used(72));
}

#[test]
fn a_frame_is_transmitted_from_any_split() {
    let (mut rig, host) = transmitter();
    rig.write(0x5000, &[9; 12]);
    rig.write(0x6000, &(0..200).collect::<Vec<u8>>());
    for buffers in [
        &[R(0x5000, 12), R(0x6000, 200)][..],
        &[R(0x5000, 5), R(0x5005, 7), R(0x6000, 1), R(0x6001, 199)],
    ] {
        assert_eq!(rig.request(buffers), Outcome::Used(0));
        let mut got = [0; 1000];
        let bytes = host.recv(&mut got).unwrap();
        assert_eq!(bytes, 212);
        assert_eq!(got[12..212], (0..200).collect::<Vec<u8>>());
    }
}

#[test]
fn headers_that_are_none_break_the_device_and_frames_that_are_none_are_dropped() {
    let (mut rig, host) = transmitter();
    for buffers in [
        &[][..],
        &[R(0x5000, 11)],
        &[W(0x5000, 100)],
        &[R(0x5000, 12), R(u64::MAX - 100, 100)],
    ] {
        assert_eq!(rig.request(buffers), Outcome::Broken, "{buffers:?}");
        rig.remote.stop();
        rig.start();
    }
    for buffers in [
        &[R(0x5000, 12)][..],
        &[R(0x5000, 12 + 13)],
        &[R(0x5000, MAX_PACKET_BYTES as u32 + 1)],
        &[R(0x5000, u32::MAX)],
    ] {
        assert_eq!(rig.request(buffers), Outcome::Used(0), "{buffers:?}");
    }
    assert_eq!(rig.request(&[R(0x5000, 12), R(0x6000, 14)]), Outcome::Used(0));
    let mut got = [0; 1000];
    assert_eq!(host.recv(&mut got).unwrap(), 26, "the only one that was sent");
}

#[test]
fn a_host_without_room_holds_the_driver_up_and_a_reset_does_not_wait_for_it() {
    let (mut rig, host) = transmitter();
    let frame = [R(0x5000, 12), R(0x6000, 1000)];
    // Until the host takes no more, and so no chain is given back.
    let mut sent = 0u32;
    loop {
        rig.provide(&frame);
        match rig.news.recv_timeout(std::time::Duration::from_millis(300)) {
            Ok(_) => sent += 1,
            Err(_) => break,
        }
        rig.take_used();
    }
    rig.remote.stop();
    rig.start();
    // What was given back goes out, what was not does not, and the new driver is served.
    let mut got = [0; 2000];
    for _ in 0..sent {
        host.recv(&mut got).unwrap();
    }
    assert_eq!(rig.request(&frame), Outcome::Used(0));
    host.recv(&mut got).unwrap();
    host.set_nonblocking(true).unwrap();
    assert!(host.recv(&mut got).is_err());
}

#[test]
fn a_link_that_is_off_passes_nothing_and_the_driver_is_told() {
    let (pair, host) = testing::pair();
    let link = testing::link(quiet());
    let mut receive = Rig::new(Box::new(Receive::new(pair.0, link.end(true))));
    let mut transmit = Rig::new(Box::new(Transmit::new(pair.1, link.end(false))));
    // The bell of the actor is reached through its remote in a machine; here by hand.
    let switch = link.switch(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    switch.set(false);
    receive.remote.ring();
    receive.reconfigured();
    host.send(&packet(&[1; 60])).unwrap();
    assert_eq!(
        transmit.request(&[R(0x5000, 12), R(0x6000, 60)]),
        Outcome::Used(0)
    );
    host.set_nonblocking(true).unwrap();
    assert!(host.recv(&mut [0; 100]).is_err());
    receive.provide(&[W(0x5000, 500)]);
    // The frame is taken and dropped. When it is, the host can send a second, a third, … without end.
    host.set_nonblocking(false).unwrap();
    for _ in 0..2000 {
        host.send(&packet(&[2; 60])).unwrap();
    }
    switch.set(true);
    receive.remote.ring();
    receive.reconfigured();
    host.send(&packet(&[3; 61])).unwrap();
    // Those of before may still come behind the switch: they were on their way.
    loop {
        let used = receive.used_next();
        if used == 73 {
            break;
        }
        assert_eq!(used, 72);
        receive.provide(&[W(0x5000, 500)]);
    }
}

#[test]
fn a_host_that_vanishes_is_a_link_down_and_one_line() {
    let (pair, host) = testing::pair();
    let (log, lines) = kept_log();
    let link = testing::link(log);
    let mut rig = Rig::new(Box::new(Receive::new(pair.0, link.end(true))));
    host.send(b"lost").unwrap();
    rig.reconfigured();
    let mut transmit = Rig::new(Box::new(Transmit::new(pair.1, link.end(false))));
    drop(host);
    // The queues are still served, and nothing is sent.
    for _ in 0..3 {
        assert_eq!(
            transmit.request(&[R(0x5000, 12), R(0x6000, 60)]),
            Outcome::Used(0)
        );
        rig.start();
        rig.provide(&[W(0x5000, 500)]);
    }
    drop((rig, transmit));
    let lines: Vec<String> = lines.try_iter().collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
}

#[test]
fn a_driver_without_buffers_hears_of_a_host_that_vanishes() {
    struct Ended;
    impl stream::Why for Ended {
        fn why(&mut self) -> String {
            "the test wants it".into()
        }
    }
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let ours = std::sync::Arc::new(ours);
    // A frame that waits for a buffer is in front of the end.
    std::io::Write::write_all(&mut theirs, &[&[0, 0, 0, 60][..], &[1; 60]].concat()).unwrap();
    let source = stream::StreamSource::new(ours.clone(), Ended);
    let link = testing::link(quiet());
    let mut rig = Rig::new(Box::new(Receive::new(Box::new(source), link.end(true))));
    // Until the frame was taken, and nothing else is there.
    let deadline = std::time::Instant::now() + LIMIT;
    let left = || {
        let mut bytes = 0i32;
        // SAFETY: FIONREAD writes a number, which is ours.
        unsafe {
            libc::ioctl(
                std::os::fd::AsRawFd::as_raw_fd(&*ours),
                libc::FIONREAD,
                &mut bytes,
            )
        };
        bytes
    };
    while left() != 0 {
        assert!(std::time::Instant::now() < deadline, "the frame was not taken");
        std::thread::yield_now();
    }
    drop(theirs);
    rig.reconfigured();
}

#[test]
fn commands_that_are_none_are_refused() {
    let mut rig = Rig::new(Box::new(Control::without_commands()));
    for command in [&[4, 0, 1, 0][..], &[0, 0], &[255; 64]] {
        rig.write(0x5000, command);
        let outcome = rig.request(&[R(0x5000, command.len() as u32), W(0x6000, 1)]);
        assert_eq!(outcome, Outcome::Used(1));
        assert_eq!(rig.read(0x6000, 1), [spec::VIRTIO_NET_ERR as u8]);
        rig.write(0x6000, &[9]);
    }
    for buffers in [
        &[R(0x5000, 4)][..],
        &[R(0x5000, 1), W(0x6000, 1)],
        &[W(0x6000, 1)],
        &[R(0x5000, 4), W(u64::MAX, 1)],
    ] {
        assert_eq!(rig.request(buffers), Outcome::Broken, "{buffers:?}");
        rig.remote.stop();
        rig.start();
    }
}

#[test]
fn a_driver_without_mq_finds_the_control_queue_behind_the_first_pair() {
    let (pair, host) = testing::pair();
    let link = testing::link(quiet());
    let second = Receive::new(pair.0, link.end(false));
    let mut rig = Rig::new(Box::new(SecondOrControl::new(second)));
    host.send(&packet(&[1; 60])).unwrap();
    assert_eq!(rig.request(&[R(0x5000, 4), W(0x6000, 1)]), Outcome::Used(1));
    assert_eq!(rig.read(0x6000, 1), [spec::VIRTIO_NET_ERR as u8]);
    rig.features = 1 << spec::VIRTIO_NET_F_MQ;
    rig.start();
    assert_eq!(rig.request(&[W(0x6000, 500)]), Outcome::Used(72));
}

#[test]
fn what_a_driver_is_told_of_the_device() {
    for (text, features, configuration, queues) in [
        (
            "tap=a,mac=02:00:00:00:00:01,queues=4,mtu=9000",
            offload::OFFERED
                | MERGE
                | 1 << spec::VIRTIO_NET_F_MQ
                | 1 << spec::VIRTIO_NET_F_CTRL_VQ
                | 1 << spec::VIRTIO_NET_F_MTU,
            [2, 0, 0, 0, 0, 1, 1, 0, 4, 0, 0x28, 0x23],
            9,
        ),
        (
            "user,mac=02:00:00:00:00:01",
            MERGE,
            [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0],
            2,
        ),
    ] {
        let config: NetConfig = text.parse().unwrap();
        let offloads = if queues == 2 { 0 } else { offload::OFFERED };
        let published = Published::new(STATUS_OFFSET, LINK_UP);
        let identity = identity(&config, config.mac.unwrap(), offloads, published);
        let always = 1 << spec::VIRTIO_NET_F_MAC | 1 << spec::VIRTIO_NET_F_STATUS;
        assert_eq!(identity.features, features | always, "{text}");
        assert_eq!(identity.configuration, configuration, "{text}");
        assert_eq!(identity.queues, queues, "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any frame through any chains comes out as it went in, or not at all.
    #[test]
    fn frames_are_whole_or_not_there(
        length in 14..3000usize,
        rooms in prop::collection::vec(26..900u32, 1..8),
        merge: bool,
    ) {
        let (mut rig, host) = receiver(if merge { MERGE } else { 0 });
        rig.size = 8;
        rig.start();
        let frame: Vec<u8> = (0..length).map(|at| (at * 7) as u8).collect();
        host.send(&packet(&frame)).unwrap();
        // One that fits anything follows.
        host.send(&packet(&[0xee; 14])).unwrap();
        for (index, room) in rooms.iter().enumerate() {
            let at = 0x5000 + 0x1000 * index as u64;
            rig.describe(crate::virtio::testing::DESCRIPTORS, index as u16, at, *room, 2, 0);
            rig.offer(index as u16);
        }
        // Room for whatever does not fit otherwise, so that there is an end.
        let last = rooms.len() as u16;
        rig.describe(crate::virtio::testing::DESCRIPTORS, last, 0x2_0000, 3100, 2, 0);
        rig.offer(last);
        rig.remote.ring();
        let mut got = Vec::new();
        let first = rig.used_next();
        let chains = u16::from_le_bytes(rig.read(0x500a, 2).try_into().unwrap());
        let place = |index: usize| if index == rooms.len() { 0x2_0000 } else { 0x5000 + 0x1000 * index as u64 };
        let mut length_of = first;
        for index in 0..usize::from(chains) {
            got.extend(rig.read(place(index), length_of as usize));
            if index + 1 < usize::from(chains) {
                length_of = rig.used_next();
            }
        }
        let fits = merge || rooms[0] as usize >= 12 + length;
        let expected = if fits { frame } else { vec![0xee; 14] };
        if fits || rooms[0] >= 26 {
            prop_assert_eq!(&got[12..], &expected[..]);
        }
    }
}
