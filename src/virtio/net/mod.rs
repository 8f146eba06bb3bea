//! virtio-net, the network device. [VIRTIO 1.2 §5.1]
//!
//! | question | file |
//! |---|---|
//! | what `--net` says | `config.rs` |
//! | a tap interface, and its queues | `tap.rs` |
//! | user-mode networking: passt, started by us | `passt.rs`; its frames: `stream.rs` |
//! | frames to the guest, and from it | `receive.rs`, `transmit.rs` |
//! | commands of the driver (how many queue pairs) | `control.rs` |
//! | which offloads a frame may use, and the host is told of | `offload.rs` |
//! | whether the link is up | `link.rs` |
//!
//! Each queue is an actor with a thread, and each has its own descriptor of the host: a pair of queues is a queue of the
//! tap. A frame goes through a buffer of the queue's actor, in one copy each way and one system call.
//!
//! What a hostile guest can try is said in the files of the queues. Frames are the guest's own: what it sends goes to the
//! tap as it is, source address included, and who does not want that filters there.

pub mod config;
pub mod control;
pub mod link;
pub mod offload;
pub mod passt;
pub mod receive;
pub mod stream;
pub mod tap;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod transmit;

pub use config::{Mac, NetConfig};
pub use link::{Link, LinkSwitch};

use self::config::{Host, Ports};
use self::control::{Control, SecondOrControl};
use self::passt::PasstError;
use self::receive::Receive;
use self::tap::{Tap, TapError, TapQueue};
use self::transmit::Transmit;
use super::limit::{Limited, Limits};
use super::queue::Handler;
use super::registers::{Identity, Published};
use slog::Logger;
use std::os::fd::BorrowedFd;
use virtio_bindings::virtio_net as spec;

const NETWORK_DEVICE: u32 = 1;

/// `struct virtio_net_hdr_v1` [VIRTIO 1.2 §5.1.6], in front of each frame.
pub const HEADER_BYTES: usize = 12;
/// The longest frame: 64 KiB of IP with an Ethernet header and a VLAN tag.
pub const MAX_FRAME_BYTES: usize = 65_535 + 18;
/// The shortest: an Ethernet header.
pub const MIN_FRAME_BYTES: usize = 14;
/// The same with the header.
pub const MAX_PACKET_BYTES: usize = HEADER_BYTES + MAX_FRAME_BYTES;

/// Where in `struct virtio_net_config` [VIRTIO 1.2 §5.1.4] the status is.
const STATUS_OFFSET: usize = 6;
const LINK_UP: u16 = spec::VIRTIO_NET_S_LINK_UP as u16;

/// A network device that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Its tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// passt.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// A limit's timer.
    #[error("--net: the host gives no timer for its rate")]
    Timer(#[source] std::io::Error),
    /// A bench's sockets.
    #[error("the host gives no sockets")]
    Loop(#[source] std::io::Error),
}

impl NetError {
    /// Whether the user can mend it with other input, as opposed to another host.
    pub fn is_bad_input(&self) -> bool {
        match self {
            NetError::Tap(error) => error.is_bad_input(),
            NetError::Passt(_) | NetError::Timer(_) | NetError::Loop(_) => false,
        }
    }
}

/// What the host gives in one direction of a queue pair. Nothing of this waits.
pub trait Source: Send {
    /// A driver has started the device with these features.
    fn start(&mut self, _features: u64) {}
    /// Takes one packet (header and frame), if there is one.
    fn receive(&mut self, packet: &mut [u8]) -> Received;
    /// What becomes readable when there may be one.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// What came of it.
#[derive(Debug)]
pub enum Received {
    /// So many bytes.
    Packet(usize),
    /// Nothing is there.
    Nothing,
    /// The host's side is gone, and why.
    Lost(String),
}

/// The same in the other direction.
pub trait Sink: Send {
    /// Gives a packet (header and frame), of which so much has been given. What it refuses is dropped, as networks do.
    fn send(&mut self, packet: &mut [u8], given: usize) -> Sent;
    /// What becomes writable when there is room again.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// What came of it.
#[derive(Debug)]
pub enum Sent {
    /// All of it, or it was dropped.
    Done,
    /// So much of it; there is no room now.
    Part(usize),
    /// The host's side is gone, and why.
    Lost(String),
}

/// The two directions of a queue pair.
pub type Pair = (Box<dyn Source>, Box<dyn Sink>);

/// A network device with what it needs of the host.
pub struct OpenedNet {
    /// What it is to a driver.
    pub identity: Identity,
    /// One for each queue: receive, transmit, and so on, and the control queue if there are several pairs.
    pub handlers: Vec<Box<dyn Handler>>,
    /// To switch its link.
    pub link: Link,
}

/// Opens what a device needs of the host.
///
/// # Errors
/// [`NetError`]; what was opened is closed again, and what was started ended.
pub fn open(name: &'static str, config: &NetConfig, log: &Logger) -> Result<OpenedNet, NetError> {
    let (pairs, offloads, control): (Vec<Pair>, _, _) = match &config.host {
        Host::Tap(tap) => {
            let (tap, queues) = Tap::open(tap, config.queues)?;
            let pairs = queues.into_iter().map(TapQueue::pair).collect();
            let control = (config.queues > 1).then(|| Control::new(tap));
            (pairs, offload::OFFERED, control)
        }
        Host::User(ports) => (vec![passt::start(config.mtu, ports)?], 0, None),
    };
    let what = match &config.host {
        Host::Tap(tap) => format!("the host's tap {tap}"),
        Host::User(_) => "passt".into(),
    };
    let mut opened = assemble(name, what, config, (pairs, offloads), log)?;
    opened
        .handlers
        .extend(control.map(|control| Box::new(control) as Box<dyn Handler>));
    Ok(opened)
}

/// A device whose network gives every frame back, for benches.
///
/// # Errors
/// [`NetError`].
pub(crate) fn open_loop(name: &'static str, log: &Logger) -> Result<OpenedNet, NetError> {
    let config = NetConfig {
        host: Host::User(Ports::default()),
        mac: None,
        mtu: None,
        queues: 1,
        allowance: Default::default(),
    };
    let pair = stream::loopback().map_err(NetError::Loop)?;
    assemble(name, "the loop".into(), &config, (vec![pair], 0), log)
}

/// Puts queues around what the host gives.
fn assemble(
    name: &'static str,
    what: String,
    config: &NetConfig,
    (pairs, offloads): (Vec<Pair>, u64),
    log: &Logger,
) -> Result<OpenedNet, NetError> {
    let published = Published::new(STATUS_OFFSET, LINK_UP);
    let mac = config.mac.unwrap_or_else(Mac::random);
    slog::debug!(log, "{name} has the address {mac}");
    let link = Link::new(name, what, published.clone(), log.clone());
    // Each direction has its own.
    let limits = [(); 2].map(|()| Limits::new(config.allowance));
    let mut handlers: Vec<Box<dyn Handler>> = Vec::with_capacity(2 * pairs.len() + 1);
    for (number, (source, sink)) in pairs.into_iter().enumerate() {
        let receive = Receive::new(source, link.end(number == 0));
        // A driver that takes the control queue and not MQ finds it behind the first pair. [VIRTIO 1.2 §5.1.2]
        let overhead = HEADER_BYTES as u64;
        let receive = match number {
            1 => Limited::around(SecondOrControl::new(receive), &limits[0], overhead),
            _ => Limited::around(receive, &limits[0], overhead),
        };
        let transmit = Limited::around(Transmit::new(sink, link.end(false)), &limits[1], overhead);
        handlers.extend([
            receive.map_err(NetError::Timer)?,
            transmit.map_err(NetError::Timer)?,
        ]);
    }
    Ok(OpenedNet {
        identity: identity(config, mac, offloads, published),
        handlers,
        link,
    })
}

/// What the device is to a driver.
fn identity(config: &NetConfig, mac: Mac, offloads: u64, published: Published) -> Identity {
    let mut features = offloads
        | 1 << spec::VIRTIO_NET_F_MAC
        | 1 << spec::VIRTIO_NET_F_STATUS
        | 1 << spec::VIRTIO_NET_F_MRG_RXBUF;
    if config.mtu.is_some() {
        features |= 1 << spec::VIRTIO_NET_F_MTU;
    }
    let pairs = usize::from(config.queues);
    let several = pairs > 1;
    if several {
        features |= 1 << spec::VIRTIO_NET_F_MQ | 1 << spec::VIRTIO_NET_F_CTRL_VQ;
    }
    let mut configuration = Vec::with_capacity(12);
    configuration.extend_from_slice(&mac.0);
    configuration.extend_from_slice(&LINK_UP.to_le_bytes());
    configuration.extend_from_slice(&config.queues.to_le_bytes()); // max_virtqueue_pairs
    configuration.extend_from_slice(&config.mtu.unwrap_or(0).to_le_bytes());
    Identity {
        device_type: NETWORK_DEVICE,
        features,
        configuration,
        published: Some(published),
        written: None,
        queues: 2 * pairs + usize::from(several),
    }
}
