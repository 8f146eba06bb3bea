//! Real taps, in a network namespace of the test's own: nothing of the host's network is touched, and no rights are
//! needed where users may have namespaces. Each test runs itself again inside.

use super::*;
use crate::virtio::net::control::Control;
use crate::virtio::net::receive::Receive;
use crate::virtio::net::transmit::Transmit;
use crate::virtio::net::{MAX_PACKET_BYTES, testing};
use crate::virtio::testing::{LIMIT, Outcome, R, Rig, W, kept_log};
use slog::{Logger, o};
use std::net::UdpSocket;
use std::process::Command;
use virtio_bindings::virtio_net as spec;

const INSIDE: &str = "ACTOR_VMM_TEST_NAMESPACE";

/// Runs the test of this name in a namespace of its own; `true`: we are inside.
fn inside(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let trial = Command::new("unshare")
        .args(["-Urn", "sh", "-c", "ip tuntap add dev t0 mode tap"])
        .output();
    if !trial.is_ok_and(|output| output.status.success()) {
        println!(
            "this host gives no network namespace with a tap (unshare, ip, /dev/net/tun): nothing to try"
        );
        return false;
    }
    let output = Command::new("unshare")
        .arg("-Urn")
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("virtio::net::tap::tests::{name}"),
            "--nocapture",
        ])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {errors}");
}

fn quiet() -> Logger {
    Logger::root(slog::Discard, o!())
}

const HOST: [u8; 4] = [10, 7, 0, 1];
const GUEST: [u8; 4] = [10, 7, 0, 2];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A tap with an address, whose neighbour the guest is.
fn tap_up(kind: &str) {
    sh(&format!(
        "ip tuntap add dev t0 mode tap {kind}
         ip link set t0 address 02:00:00:00:00:01
         ip addr add 10.7.0.1/24 dev t0
         ip link set t0 up
         ip neigh add 10.7.0.2 lladdr 02:00:00:00:00:02 dev t0 nud permanent"
    ));
}

/// The sum of RFC 1071, folded, not complemented.
fn sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn pseudo_header(from: [u8; 4], to: [u8; 4], bytes: usize) -> [u8; 12] {
    let length = (bytes as u16).to_be_bytes();
    let mut header = [0; 12];
    header[..4].copy_from_slice(&from);
    header[4..8].copy_from_slice(&to);
    (header[9], header[10], header[11]) = (17, length[0], length[1]);
    header
}

/// A UDP datagram of the guest, with a header that leaves its checksum to the host.
fn datagram(text: &[u8], to_port: u16) -> Vec<u8> {
    let udp_bytes = 8 + text.len();
    let mut udp = [&7001u16.to_be_bytes()[..], &to_port.to_be_bytes()].concat();
    udp.extend((udp_bytes as u16).to_be_bytes());
    udp.extend(sum(&[&pseudo_header(GUEST, HOST, udp_bytes)]).to_be_bytes());
    udp.extend(text);
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_bytes as u16).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(GUEST);
    ip.extend(HOST);
    let check = !sum(&[&ip]);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    // NEEDS_CSUM, from byte 34 on, at 6 behind that.
    let mut packet = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    packet.extend(HOST_MAC);
    packet.extend(GUEST_MAC);
    packet.extend([8, 0]);
    packet.extend(ip);
    packet.extend(udp);
    packet
}

/// Has the host send a datagram to the guest, again until it is there: the first may come before the actor has started.
/// Returns the header's flags, and whether the checksum is complete.
fn receive_datagram(rig: &mut Rig, socket: &UdpSocket, text: &[u8]) -> (u8, bool) {
    let deadline = std::time::Instant::now() + LIMIT;
    loop {
        rig.provide(&[W(0x1_0000, MAX_PACKET_BYTES as u32)]);
        while rig.poll_used().is_none() {
            assert!(std::time::Instant::now() < deadline, "no datagram");
            socket.send_to(text, ("10.7.0.2", 7001)).unwrap();
            let _ = rig.news.recv_timeout(std::time::Duration::from_millis(20));
        }
        // The kernel sends other frames too.
        let packet = rig.read(0x1_0000, HEADER_BYTES + 14 + 20 + 8 + text.len());
        let ip = &packet[HEADER_BYTES + 14..];
        if packet[HEADER_BYTES + 12..][..2] == [8, 0] && ip[9] == 17 && ip[28..] == *text {
            let udp = &ip[20..];
            let whole = sum(&[&pseudo_header(HOST, GUEST, udp.len()), udp]) == 0xffff;
            return (packet[0], whole);
        }
    }
}

#[test]
fn datagrams_pass_both_ways_with_the_offloads_that_the_driver_accepted() {
    if !inside("datagrams_pass_both_ways_with_the_offloads_that_the_driver_accepted") {
        return;
    }
    tap_up("");
    let (_tap, mut queues) = Tap::open("t0", 1).unwrap();
    let (source, sink) = queues.remove(0).pair();
    let link = testing::link(quiet());
    let mut receive = Rig::new(Box::new(Receive::new(source, link.end(true))));
    let mut transmit = Rig::new(Box::new(Transmit::new(sink, link.end(false))));
    let socket = UdpSocket::bind(("10.7.0.1", 7000)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    for (features, flags) in [(0, 0), (1 << spec::VIRTIO_NET_F_GUEST_CSUM, 1), (0, 0)] {
        receive.remote.stop();
        receive.features = features;
        receive.start();
        let packet = datagram(b"from the guest", 7000);
        transmit.write(0x1_0000, &packet);
        let sent = transmit.request(&[R(0x1_0000, 12), R(0x1_000c, packet.len() as u32 - 12)]);
        assert_eq!(sent, Outcome::Used(0));
        let mut got = [0; 100];
        let (bytes, _) = socket.recv_from(&mut got).unwrap();
        assert_eq!(
            &got[..bytes],
            b"from the guest",
            "the kernel drops one with a wrong checksum"
        );
        // When this one is there the actor has started, and told the tap.
        receive_datagram(&mut receive, &socket, b"warm up");
        let (seen, whole) = receive_datagram(&mut receive, &socket, b"from the host");
        assert_eq!((seen, whole), (flags, flags == 0), "{features:#x}");
    }
}

#[test]
fn a_tap_that_is_deleted_is_a_lost_link_and_one_line() {
    if !inside("a_tap_that_is_deleted_is_a_lost_link_and_one_line") {
        return;
    }
    for frame_first in [false, true] {
        delete_a_tap(frame_first);
    }
}

fn delete_a_tap(frame_first: bool) {
    tap_up("");
    let (_tap, mut queues) = Tap::open("t0", 1).unwrap();
    assert!(matches!(Tap::open("t0", 1), Err(TapError::Busy(_))));
    assert!(matches!(Tap::open("t0", 2), Err(TapError::Kind(_, true))));
    let (source, sink) = queues.remove(0).pair();
    let (log, lines) = kept_log();
    let link = testing::link(log);
    let mut receive = Rig::new(Box::new(Receive::new(source, link.end(true))));
    let mut transmit = Rig::new(Box::new(Transmit::new(sink, link.end(false))));
    // A frame that waits for a buffer of the driver, which gives none, or none: both find the end.
    if frame_first {
        let socket = UdpSocket::bind(("10.7.0.1", 7000)).unwrap();
        socket.send_to(b"waits", ("10.7.0.2", 7001)).unwrap();
    }
    sh("ip link del t0");
    receive.reconfigured();
    let packet = datagram(b"to nobody", 7000);
    transmit.write(0x1_0000, &packet);
    for _ in 0..3 {
        let sent = transmit.request(&[R(0x1_0000, packet.len() as u32)]);
        assert_eq!(sent, Outcome::Used(0));
    }
    drop((receive, transmit));
    let lines: Vec<String> = lines.try_iter().collect();
    assert!(
        lines.len() == 1 && lines[0].contains("somebody has deleted it"),
        "{lines:?}"
    );
    assert!(matches!(Tap::open("t0", 1), Err(TapError::NoSuch(_))));
}

#[test]
fn queues_are_used_as_the_driver_says_and_a_reset_goes_back_to_one() {
    if !inside("queues_are_used_as_the_driver_says_and_a_reset_goes_back_to_one") {
        return;
    }
    tap_up("multi_queue");
    let (tap, queues) = Tap::open("t0", 3).unwrap();
    let (log, lines) = kept_log();
    let link = testing::link(log);
    let ends: Vec<_> = queues.into_iter().map(TapQueue::pair).collect();
    let mut rigs: Vec<Rig> = ends
        .into_iter()
        .map(|(source, _)| Rig::new(Box::new(Receive::new(source, link.end(false)))))
        .collect();
    let mut control = Rig::new(Box::new(Control::new(tap)));
    let mut say = |pairs: u16| {
        control.write(0x5000, &[4, 0, pairs as u8, (pairs >> 8) as u8]);
        assert_eq!(control.request(&[R(0x5000, 4), W(0x6000, 1)]), Outcome::Used(1));
        control.read(0x6000, 1)[0]
    };
    for (pairs, answer) in [(0, 1), (4, 1), (u16::MAX, 1), (3, 0), (1, 0), (2, 0)] {
        assert_eq!(say(pairs), answer, "{pairs}");
    }
    // Two in use: flows come at either, none is lost, and the third gets nothing.
    let socket = UdpSocket::bind(("10.7.0.1", 7000)).unwrap();
    for rig in &mut rigs {
        for head in 0..64 {
            rig.describe(
                crate::virtio::testing::DESCRIPTORS,
                head,
                0x1_0000 + 0x800 * u64::from(head),
                0x800,
                2,
                0,
            );
            rig.offer(head);
        }
        rig.remote.ring();
    }
    for port in 8000..8040u16 {
        socket.send_to(b"flow", ("10.7.0.2", port)).unwrap();
    }
    let mut found = std::collections::BTreeMap::new();
    let deadline = std::time::Instant::now() + LIMIT;
    while found.len() < 40 {
        assert!(
            std::time::Instant::now() < deadline,
            "{} of 40 flows",
            found.len()
        );
        for (number, rig) in rigs.iter_mut().enumerate() {
            while let Some(slot) = rig.poll_used() {
                let packet = rig.read(0x1_0000 + 0x800 * u64::from(slot), 100);
                if packet[HEADER_BYTES + 12..][..2] == [8, 0] && packet[HEADER_BYTES + 14 + 9] == 17 {
                    let port = u16::from_be_bytes([packet[HEADER_BYTES + 36], packet[HEADER_BYTES + 37]]);
                    found.insert(port, number);
                }
            }
        }
        std::thread::yield_now();
    }
    assert!(found.values().all(|number| *number < 2), "{found:?}");
    // The driver is gone: one again, and the others are not taken for lost.
    control.remote.stop();
    control.start();
    drop((control, rigs));
    assert_eq!(lines.try_iter().count(), 0);
}

#[test]
fn what_is_no_tap_is_refused_with_a_remedy() {
    for (name, said) in [
        ("actor-vmm-none", "ip tuntap add dev actor-vmm-none mode tap"),
        ("lo", "it is not a tap"),
    ] {
        let error = Tap::open(name, 1).map(|_| ()).unwrap_err();
        // Without the driver, or rights to it, even lo is not looked at.
        if !matches!(error, TapError::NoDriver(..) | TapError::Denied(_)) {
            assert!(error.to_string().contains(said), "{error}");
            assert!(error.is_bad_input());
        }
    }
}
