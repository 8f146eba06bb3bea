//! Offloads: work on a frame that one side leaves to the other (a checksum, the cutting of a large segment). A pure
//! matter of bits: which the driver has accepted, what the host's tap is told of it, and whether a packet keeps to it.
//!
//! From the guest, a tap takes whatever its header says and checks it. To the guest, the tap was told what the driver
//! accepts, but packets that were under way then are looked at here: what the driver did not accept it does not get.

use super::HEADER_BYTES;
use virtio_bindings::virtio_net as spec;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What a device with a tap offers.
pub const OFFERED: u64 = bit(spec::VIRTIO_NET_F_CSUM)
    | bit(spec::VIRTIO_NET_F_HOST_TSO4)
    | bit(spec::VIRTIO_NET_F_HOST_TSO6)
    | bit(spec::VIRTIO_NET_F_HOST_ECN)
    | bit(spec::VIRTIO_NET_F_GUEST_CSUM)
    | bit(spec::VIRTIO_NET_F_GUEST_TSO4)
    | bit(spec::VIRTIO_NET_F_GUEST_TSO6)
    | bit(spec::VIRTIO_NET_F_GUEST_ECN);

/// What TUNSETOFFLOAD is told for a driver with these features. A feature without those that it needs counts for nothing
/// [VIRTIO 1.2 §5.1.3.1]; the kernel would refuse it.
pub fn for_tap(features: u64) -> libc::c_uint {
    let has = |feature| features & bit(feature) != 0;
    if !has(spec::VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut offloads = libc::TUN_F_CSUM;
    if has(spec::VIRTIO_NET_F_GUEST_TSO4) {
        offloads |= libc::TUN_F_TSO4;
    }
    if has(spec::VIRTIO_NET_F_GUEST_TSO6) {
        offloads |= libc::TUN_F_TSO6;
    }
    if offloads != libc::TUN_F_CSUM && has(spec::VIRTIO_NET_F_GUEST_ECN) {
        offloads |= libc::TUN_F_TSO_ECN;
    }
    offloads
}

/// Whether a driver with these features takes a packet with this header.
pub fn is_accepted(header: &[u8; HEADER_BYTES], features: u64) -> bool {
    let offloads = for_tap(features);
    let [flags, gso, ..] = *header;
    if u32::from(flags) & spec::VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 && offloads & libc::TUN_F_CSUM == 0 {
        return false;
    }
    let ecn = u32::from(gso) & spec::VIRTIO_NET_HDR_GSO_ECN != 0;
    let needed = match u32::from(gso) & !spec::VIRTIO_NET_HDR_GSO_ECN {
        spec::VIRTIO_NET_HDR_GSO_NONE => 0,
        spec::VIRTIO_NET_HDR_GSO_TCPV4 => libc::TUN_F_TSO4,
        spec::VIRTIO_NET_HDR_GSO_TCPV6 => libc::TUN_F_TSO6,
        _ => return false,
    };
    offloads & needed == needed && (!ecn || offloads & libc::TUN_F_TSO_ECN != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use spec::*;

    fn header(flags: u32, gso: u32) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        (header[0], header[1]) = (flags as u8, gso as u8);
        header
    }

    #[test]
    fn the_tap_is_told_what_the_driver_accepted_and_no_more() {
        assert_eq!(for_tap(0), 0);
        assert_eq!(
            for_tap(bit(VIRTIO_NET_F_GUEST_TSO4)),
            0,
            "segments without checksums"
        );
        let features = bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_ECN);
        assert_eq!(for_tap(features), libc::TUN_F_CSUM, "ECN without segments");
        assert_eq!(
            for_tap(features | bit(VIRTIO_NET_F_GUEST_TSO6)),
            libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN
        );
    }

    #[test]
    fn a_packet_has_to_keep_to_it() {
        let csum = bit(VIRTIO_NET_F_GUEST_CSUM);
        let tso4 = csum | bit(VIRTIO_NET_F_GUEST_TSO4);
        let needs = VIRTIO_NET_HDR_F_NEEDS_CSUM;
        for (flags, gso, features, expected) in [
            (0, VIRTIO_NET_HDR_GSO_NONE, 0, true),
            (needs, VIRTIO_NET_HDR_GSO_NONE, 0, false),
            (needs, VIRTIO_NET_HDR_GSO_NONE, csum, true),
            (needs, VIRTIO_NET_HDR_GSO_TCPV4, csum, false),
            (needs, VIRTIO_NET_HDR_GSO_TCPV4, tso4, true),
            (needs, VIRTIO_NET_HDR_GSO_TCPV6, tso4, false),
            (
                needs,
                VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN,
                tso4,
                false,
            ),
            (
                needs,
                VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN,
                OFFERED,
                true,
            ),
            (needs, VIRTIO_NET_HDR_GSO_UDP, OFFERED, false),
            (0, 0x7f, OFFERED, false),
        ] {
            assert_eq!(
                is_accepted(&header(flags, gso), features),
                expected,
                "{flags} {gso:#x} {features:#x}"
            );
        }
    }

    proptest! {
        /// Whatever is accepted with some features is accepted with more.
        #[test]
        fn more_features_accept_more(flags: u8, gso: u8, features: u64, more: u64) {
            let header = header(flags.into(), gso.into());
            if is_accepted(&header, features) {
                prop_assert!(is_accepted(&header, features | more));
            }
        }
    }
}
