//! Which virtio devices a machine has: what the user says, and what is opened on the host for it before anything of the
//! machine is made.

use super::balloon::{self, Balloon, BalloonConfig};
use super::block::{self, Block, Disk, DiskConfig, ImageError};
use super::console::ports::{self, PortConfig, PortError, PortHost};
use super::console::{self, HostSide, Size};
use super::limit::{Limited, Limits};
use super::net::config::Host;
use super::net::{self, Link, Mac, NetConfig, NetError};
use super::queue::Handler;
use super::registers::Identity;
use super::rng::{self, Rng};
use super::share::{self, ShareConfig, ShareError};
use super::vsock::{self, VsockConfig, VsockError};
use super::{Notify, Transport};
use crate::host::console::ConsoleKind;
use crate::host::terminal;
use slog::Logger;
use std::fs::File;
use std::io;
use std::path::PathBuf;

/// The most virtio devices: each has an interrupt of its own.
pub const MAX_DEVICES: usize = crate::boot::layout::VIRTIO_GSIS.len();

/// The devices that the user wants.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VirtioConfig {
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Network devices.
    pub nets: Vec<NetConfig>,
    /// An entropy device.
    pub rng: bool,
    /// A socket device.
    pub vsock: Option<VsockConfig>,
    /// A balloon.
    pub balloon: Option<BalloonConfig>,
    /// Shared folders.
    pub shares: Vec<ShareConfig>,
    /// Where a console goes.
    pub console: Option<ConsoleKind>,
    /// Ports between programs of guest and host.
    pub ports: Vec<PortConfig>,
    /// How drivers get at them.
    pub transport: Transport,
    /// How notifications travel.
    pub notify: Notify,
}

/// Devices that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// Too many.
    #[error(
        "{wanted} virtio devices (--disk, --net, --rng, --vsock, --balloon, --share, --console virtio, --port) are more than a machine can have ({MAX_DEVICES})"
    )]
    TooMany {
        /// As asked for.
        wanted: usize,
    },
    /// A disk's image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A network device.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A balloon's timer.
    #[error("--balloon: the host gives no timer")]
    Balloon(#[source] io::Error),
    /// A shared folder.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// Two of one tag.
    #[error("--share tag={0}: two shared folders cannot have the same name for the guest")]
    SameTag(String),
    /// Ports.
    #[error(transparent)]
    Port(#[from] PortError),
    /// A console's eventfds.
    #[error("--console virtio: the host gives no descriptors for it")]
    Console(#[source] io::Error),
    /// A limit's timer.
    #[error("--disk: the host gives no timer for its rate")]
    Timer(#[source] io::Error),
    /// Two of one tap.
    #[error("--net tap={0}: two network devices cannot share a tap")]
    SameTap(String),
    /// Two of one address.
    #[error("--net mac={0}: two network devices cannot share an address")]
    SameMac(Mac),
    /// The host's random source.
    #[error("--rng: the host's /dev/urandom cannot be opened")]
    Random(#[source] io::Error),
}

impl VirtioError {
    /// Whether the user can mend it with other input, as opposed to another host.
    pub fn is_bad_input(&self) -> bool {
        match self {
            VirtioError::TooMany { .. }
            | VirtioError::Image(_)
            | VirtioError::SameTap(_)
            | VirtioError::SameMac(_)
            | VirtioError::SameTag(_) => true,
            VirtioError::Net(error) => error.is_bad_input(),
            VirtioError::Vsock(error) => error.is_bad_input(),
            VirtioError::Share(error) => error.is_bad_input(),
            VirtioError::Port(error) => error.is_bad_input(),
            VirtioError::Random(_)
            | VirtioError::Balloon(_)
            | VirtioError::Console(_)
            | VirtioError::Timer(_) => false,
        }
    }
}

/// Names of disks, for `--placement` and the log.
const DISK_NAMES: [&str; MAX_DEVICES] = [
    "blk0", "blk1", "blk2", "blk3", "blk4", "blk5", "blk6", "blk7", "blk8", "blk9", "blk10", "blk11",
    "blk12", "blk13", "blk14", "blk15",
];
const NET_NAMES: [&str; MAX_DEVICES] = [
    "net0", "net1", "net2", "net3", "net4", "net5", "net6", "net7", "net8", "net9", "net10", "net11",
    "net12", "net13", "net14", "net15",
];
const SHARE_NAMES: [&str; MAX_DEVICES] = [
    "share0", "share1", "share2", "share3", "share4", "share5", "share6", "share7", "share8", "share9",
    "share10", "share11", "share12", "share13", "share14", "share15",
];
const RNG_NAME: &str = "rng0";
const VSOCK_NAME: &str = "vsock0";
const BALLOON_NAME: &str = "balloon0";
const CONSOLE_NAME: &str = "console0";
const PORTS_NAME: &str = "ports0";

impl VirtioConfig {
    /// The names of the devices, in the order of their places.
    pub fn names(&self) -> Vec<&'static str> {
        let disks = DISK_NAMES.into_iter().take(self.disks.len());
        let nets = NET_NAMES.into_iter().take(self.nets.len());
        let rng = self.rng.then_some(RNG_NAME);
        let vsock = self.vsock.is_some().then_some(VSOCK_NAME);
        let balloon = self.balloon.is_some().then_some(BALLOON_NAME);
        let console = self.console.is_some().then_some(CONSOLE_NAME);
        let shares = SHARE_NAMES.into_iter().take(self.shares.len());
        let ports = (!self.ports.is_empty()).then_some(PORTS_NAME);
        let others = [rng, vsock, balloon, console].into_iter().flatten();
        disks
            .chain(nets)
            .chain(others)
            .chain(shares)
            .chain(ports)
            .collect()
    }

    /// What contradicts itself.
    ///
    /// # Errors
    /// [`VirtioError::TooMany`], [`VirtioError::SameTap`], [`VirtioError::SameMac`], [`VirtioError::SameTag`],
    /// [`VirtioError::Port`].
    pub fn check(&self) -> Result<(), VirtioError> {
        let others = [
            self.rng,
            self.vsock.is_some(),
            self.balloon.is_some(),
            self.console.is_some(),
            !self.ports.is_empty(),
        ];
        let others = others.into_iter().filter(|wanted| *wanted).count();
        let wanted = self.disks.len() + self.nets.len() + self.shares.len() + others;
        if wanted > MAX_DEVICES {
            return Err(VirtioError::TooMany { wanted });
        }
        for (number, net) in self.nets.iter().enumerate() {
            for other in &self.nets[..number] {
                match (&net.host, &other.host) {
                    (Host::Tap(one), Host::Tap(two)) if one == two => {
                        return Err(VirtioError::SameTap(one.clone()));
                    }
                    _ => {}
                }
                if let Some(mac) = net.mac.filter(|_| net.mac == other.mac) {
                    return Err(VirtioError::SameMac(mac));
                }
            }
        }
        for (number, share) in self.shares.iter().enumerate() {
            if self.shares[..number].iter().any(|other| other.tag == share.tag) {
                return Err(VirtioError::SameTag(share.tag.clone()));
            }
        }
        Ok(ports::check(&self.ports)?)
    }

    /// The files that ports lead to.
    pub fn port_files(&self) -> impl Iterator<Item = &PathBuf> {
        self.ports.iter().filter_map(|port| match &port.host {
            PortHost::File(path) => Some(path),
            PortHost::Socket(_) => None,
        })
    }

    /// Opens what the devices need of the host.
    ///
    /// # Errors
    /// [`VirtioError`]; what was opened is closed again.
    pub fn open(&self, log: &Logger) -> Result<Vec<Opened>, VirtioError> {
        self.check()?;
        let mut opened = Vec::with_capacity(self.names().len());
        for (name, disk) in DISK_NAMES.into_iter().zip(&self.disks) {
            let disks = Disk::open(disk)?;
            let identity = block::identity(&disks[0], disk.queues);
            let limits = Limits::new(disk.allowance);
            let handlers = disks.into_iter().map(|opened| {
                let block = Block::new(opened, &disk.serial, log.clone());
                Limited::around(block, &limits, block::OVERHEAD_BYTES).map_err(VirtioError::Timer)
            });
            opened.push(Opened {
                name,
                identity,
                handlers: handlers.collect::<Result<_, _>>()?,
                ..Opened::bare()
            });
        }
        for (name, config) in NET_NAMES.into_iter().zip(&self.nets) {
            let net = net::open(name, config, log)?;
            opened.push(Opened {
                name,
                identity: net.identity,
                handlers: net.handlers,
                link: Some(net.link),
                ..Opened::bare()
            });
        }
        if self.rng {
            opened.push(Opened {
                name: RNG_NAME,
                identity: rng::identity(),
                handlers: vec![Box::new(Rng::open().map_err(VirtioError::Random)?)],
                ..Opened::bare()
            });
        }
        if let Some(config) = &self.vsock {
            let vsock = vsock::open(VSOCK_NAME, config, log)?;
            opened.push(Opened {
                name: VSOCK_NAME,
                identity: vsock.identity,
                handlers: vsock.handlers,
                ..Opened::bare()
            });
        }
        if let Some(config) = &self.balloon {
            let opened_balloon = balloon::open(config, log).map_err(VirtioError::Balloon)?;
            opened.push(Opened {
                name: BALLOON_NAME,
                identity: opened_balloon.identity,
                handlers: opened_balloon.handlers,
                balloon: Some(opened_balloon.balloon),
                ..Opened::bare()
            });
        }
        if let Some(kind) = &self.console {
            let terminal = terminal::size().filter(|_| *kind == ConsoleKind::Stdio);
            let size = terminal.map(|(columns, rows)| Size::new(columns, rows));
            let console = console::open(size).map_err(VirtioError::Console)?;
            opened.push(Opened {
                name: CONSOLE_NAME,
                identity: console.identity,
                handlers: console.handlers,
                console: Some(console.host),
                size: console.size,
                ..Opened::bare()
            });
        }
        for (name, config) in SHARE_NAMES.into_iter().zip(&self.shares) {
            let share = share::open(name, config, log)?;
            opened.push(Opened {
                name,
                identity: share.identity,
                handlers: share.handlers,
                ..Opened::bare()
            });
        }
        if !self.ports.is_empty() {
            let ports = ports::open(&self.ports, log)?;
            opened.push(Opened {
                name: PORTS_NAME,
                identity: ports.identity,
                handlers: ports.handlers,
                files: ports.files,
                ..Opened::bare()
            });
        }
        Ok(opened)
    }
}

/// A device with what it needs of the host.
pub struct Opened {
    /// For `--placement` and the log.
    pub name: &'static str,
    /// What it is to a driver.
    pub identity: Identity,
    /// One for each of its queues.
    pub handlers: Vec<Box<dyn Handler>>,
    /// Of a network device: its link.
    pub link: Option<Link>,
    /// Of a balloon: what is known of it.
    pub balloon: Option<Balloon>,
    /// Of a console: the other end.
    pub console: Option<HostSide>,
    /// Of a console that is a terminal: how large it is.
    pub size: Option<Size>,
    /// Files that are emptied when the machine starts.
    pub files: Vec<File>,
}

impl Opened {
    /// Nothing yet.
    pub(crate) fn bare() -> Opened {
        Opened {
            name: "",
            identity: Identity::default(),
            handlers: Vec::new(),
            link: None,
            balloon: None,
            console: None,
            size: None,
            files: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_devices_are_refused_before_any_is_opened() {
        let disk: DiskConfig = "path=/no/such".parse().unwrap();
        let config = VirtioConfig {
            disks: vec![disk; MAX_DEVICES],
            rng: true,
            ..VirtioConfig::default()
        };
        let log = Logger::root(slog::Discard, slog::o!());
        let error = config.open(&log).map(|_| ()).unwrap_err().to_string();
        assert!(
            error.starts_with(
                "17 virtio devices (--disk, --net, --rng, --vsock, --balloon, --share, --console virtio, --port)"
            ),
            "{error}"
        );
        assert_eq!(config.names().len(), MAX_DEVICES + 1);
    }

    #[test]
    fn two_folders_cannot_share_a_tag() {
        let shares = |tags: [&str; 2]| VirtioConfig {
            shares: tags
                .map(|tag| format!("tag={tag},path=/").parse().unwrap())
                .into(),
            ..VirtioConfig::default()
        };
        let error = shares(["a", "a"]).check().unwrap_err();
        assert!(
            error.is_bad_input() && error.to_string().contains("--share tag=a: two"),
            "{error}"
        );
        assert!(shares(["a", "b"]).check().is_ok());
        assert_eq!(shares(["a", "b"]).names(), ["share0", "share1"]);
    }

    #[test]
    fn two_networks_cannot_share_a_tap_or_an_address() {
        let mac = "mac=02:00:00:00:00:01";
        for (nets, said) in [
            (["tap=a".into(), "tap=a".into()], "tap=a: two network devices"),
            (
                [format!("user,{mac}"), format!("tap=a,{mac}")],
                "mac=02:00:00:00:00:01: two",
            ),
            (["tap=a".into(), "tap=b".into()], ""),
            (["user".into(), "user".into()], ""),
        ] {
            let config = VirtioConfig {
                nets: nets.iter().map(|net: &String| net.parse().unwrap()).collect(),
                ..VirtioConfig::default()
            };
            let error = config.check().err();
            assert_eq!(error.is_some(), !said.is_empty(), "{nets:?}");
            if let Some(error) = error {
                assert!(
                    error.is_bad_input() && error.to_string().contains(said),
                    "{error}"
                );
            }
        }
    }
}
