//! What `--net` says: `tap=NAME` or `user`, and what else, separated by commas.

use crate::virtio::keys::{items, operations, rate};
use crate::virtio::limit::Allowance;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::str::FromStr;

/// The most queue pairs a device may have: each is two threads.
pub const MAX_PAIRS: u16 = 8;
/// Bytes of an interface's name. [netdevice(7): IFNAMSIZ, without its NUL]
const NAME_BYTES: usize = 15;
/// IPv4's least, bytes. [VIRTIO 1.2 §5.1.4.1]
const MIN_MTU: u16 = 68;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// One that nobody else has: locally administered and random.
    pub fn random() -> Mac {
        let mut bytes = [0; 6];
        // A host without a random source has no entropy device either; then all such devices share an address.
        if let Ok(mut source) = File::open("/dev/urandom") {
            let _ = source.read_exact(&mut bytes);
        }
        bytes[0] = bytes[0] & 0xfc | 2;
        Mac(bytes)
    }
}

impl FromStr for Mac {
    type Err = ();

    fn from_str(text: &str) -> Result<Mac, ()> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(())?;
            // from_str_radix takes a sign.
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| ())?;
        }
        // Of a group, or of nobody.
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(());
        }
        Ok(Mac(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Ports of the host that lead to the guest, in passt's words.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ports {
    /// `tcp=…`
    pub tcp: Option<String>,
    /// `udp=…`
    pub udp: Option<String>,
}

/// Where frames go on the host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Host {
    /// A tap interface, which is there already.
    Tap(String),
    /// passt, started by us.
    User(Ports),
}

/// A network device, as the user wants it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetConfig {
    /// Where its frames go.
    pub host: Host,
    /// Its address; a random one if not given.
    pub mac: Option<Mac>,
    /// What the guest is told of the largest IP packet, bytes.
    pub mtu: Option<u16>,
    /// How many queue pairs, each with two threads.
    pub queues: u16,
    /// What may go through it, in each direction.
    pub allowance: Allowance,
}

/// A `--net` that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NetSyntaxError {
    /// Neither a tap nor user.
    #[error("a network device needs tap=NAME or user")]
    NoHost,
    /// Both.
    #[error("'tap' and 'user' exclude each other")]
    TwoHosts,
    /// A key that is none.
    #[error(
        "a network device has no key '{0}'; there are tap, user, mac, mtu, queues, rate, iops, tcp and udp (a comma in a value is written ,,)"
    )]
    UnknownKey(String),
    /// The same key again.
    #[error("'{0}' is given twice")]
    Twice(&'static str),
    /// A value where none belongs.
    #[error("'user' takes no value")]
    FlagWithValue,
    /// `tap=…`
    #[error("tap={0}: an interface's name has 1 to {NAME_BYTES} characters, none of them a slash or a space")]
    Tap(String),
    /// `mac=…`
    #[error("mac={0}: an address is six bytes as 02:00:00:00:00:01, and neither all zero nor a group's")]
    Mac(String),
    /// `mtu=…`
    #[error("mtu={0}: an MTU is {MIN_MTU} to 65535 bytes, and at most 65520 with user")]
    Mtu(String),
    /// `queues=…`
    #[error("queues={0}: a network device has 1 to {MAX_PAIRS} queue pairs")]
    Queues(String),
    /// `rate=…`
    #[error("rate={0}: a rate is bytes a second, above 0, as 10M")]
    Rate(String),
    /// `iops=…`
    #[error("iops={0}: frames a second are a number above 0")]
    Iops(String),
    /// passt has one connection.
    #[error("queues={0}: with user there is one queue pair")]
    QueuesOfUser(u16),
    /// `tcp=…`, `udp=…`
    #[error("{0}={1}: ports are numbers, ranges and pairs of them as 8080:80 or 5000-5009")]
    Ports(&'static str, String),
    /// Ports without passt.
    #[error("'{0}' belongs to user; a tap has all ports")]
    PortsOfTap(&'static str),
}

/// What passt takes: `22`, `2222:22`, `5000-5009`, `127.0.0.1/22`, and lists of these.
fn ports(key: &'static str, value: &str) -> Result<String, NetSyntaxError> {
    let known = |character: char| character.is_ascii_hexdigit() || "-:,./~".contains(character);
    let begins = value.starts_with(|first: char| first.is_ascii_hexdigit() || first == '~');
    if begins && value.chars().all(known) && value.contains(|digit: char| digit.is_ascii_digit()) {
        Ok(value.to_owned())
    } else {
        Err(NetSyntaxError::Ports(key, value.into()))
    }
}

fn name(value: &str) -> Result<String, NetSyntaxError> {
    let allowed = |character: char| character.is_ascii_graphic() && character != '/';
    let good = (1..=NAME_BYTES).contains(&value.len()) && value.chars().all(allowed);
    // A pattern to the kernel, and two directories.
    let good = good && !value.contains('%') && value != "." && value != "..";
    good.then(|| value.to_owned())
        .ok_or_else(|| NetSyntaxError::Tap(value.into()))
}

fn once<T>(place: &mut Option<T>, key: &'static str, value: T) -> Result<(), NetSyntaxError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(NetSyntaxError::Twice(key)),
    }
}

impl FromStr for NetConfig {
    type Err = NetSyntaxError;

    fn from_str(text: &str) -> Result<Self, NetSyntaxError> {
        let (mut tap, mut user, mut mac, mut mtu, mut queues) = (None, None, None, None, None);
        let (mut tcp, mut udp) = (None, None);
        let (mut bytes, mut iops) = (None, None);
        for item in items(text) {
            match item.split_once('=') {
                Some(("tap", value)) => once(&mut tap, "tap", name(value)?)?,
                Some(("user", _)) => return Err(NetSyntaxError::FlagWithValue),
                None if item == "user" => once(&mut user, "user", ())?,
                Some(("mac", value)) => {
                    let address = value.parse().map_err(|()| NetSyntaxError::Mac(value.into()))?;
                    once(&mut mac, "mac", address)?;
                }
                Some(("mtu", value)) => {
                    let number = value.parse().ok().filter(|mtu| *mtu >= MIN_MTU);
                    let number = number.ok_or_else(|| NetSyntaxError::Mtu(value.into()))?;
                    once(&mut mtu, "mtu", number)?;
                }
                Some(("queues", value)) => {
                    let number = value.parse().ok().filter(|n| (1..=MAX_PAIRS).contains(n));
                    let number = number.ok_or_else(|| NetSyntaxError::Queues(value.into()))?;
                    once(&mut queues, "queues", number)?;
                }
                Some(("rate", value)) => {
                    let number = rate(value).ok_or_else(|| NetSyntaxError::Rate(value.into()))?;
                    once(&mut bytes, "rate", number)?;
                }
                Some(("iops", value)) => {
                    let number = operations(value).ok_or_else(|| NetSyntaxError::Iops(value.into()))?;
                    once(&mut iops, "iops", number)?;
                }
                Some(("tcp", value)) => once(&mut tcp, "tcp", ports("tcp", value)?)?,
                Some(("udp", value)) => once(&mut udp, "udp", ports("udp", value)?)?,
                Some((key, _)) => return Err(NetSyntaxError::UnknownKey(key.into())),
                None => return Err(NetSyntaxError::UnknownKey(item)),
            }
        }
        let queues = queues.unwrap_or(1);
        let host = match (tap, user) {
            (None, None) => return Err(NetSyntaxError::NoHost),
            (Some(_), Some(())) => return Err(NetSyntaxError::TwoHosts),
            (Some(_), None) if tcp.is_some() => return Err(NetSyntaxError::PortsOfTap("tcp")),
            (Some(_), None) if udp.is_some() => return Err(NetSyntaxError::PortsOfTap("udp")),
            (None, Some(())) if queues > 1 => return Err(NetSyntaxError::QueuesOfUser(queues)),
            (None, Some(())) if mtu.is_some_and(|mtu| mtu > 65_520) => {
                return Err(NetSyntaxError::Mtu(mtu.unwrap_or(0).to_string()));
            }
            (Some(name), None) => Host::Tap(name),
            (None, Some(())) => Host::User(Ports { tcp, udp }),
        };
        Ok(NetConfig {
            host,
            mac,
            mtu,
            queues,
            allowance: Allowance {
                bytes,
                operations: iops,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_meant() {
        let net: NetConfig = "tap=tap0,mac=02:00:00:00:00:0a,mtu=9000,queues=4,rate=1M,iops=1000"
            .parse()
            .unwrap();
        let expected = NetConfig {
            host: Host::Tap("tap0".into()),
            mac: Some(Mac([2, 0, 0, 0, 0, 10])),
            mtu: Some(9000),
            queues: 4,
            allowance: Allowance {
                bytes: Some(1 << 20),
                operations: Some(1000),
            },
        };
        assert_eq!(net, expected);
        let net: NetConfig = "user,tcp=2222:22,,8000-8009".parse().unwrap();
        let ports = Ports {
            tcp: Some("2222:22,8000-8009".into()),
            udp: None,
        };
        assert_eq!((net.host, net.queues, net.mac), (Host::User(ports), 1, None));
    }

    #[test]
    fn mistakes_name_their_key() {
        for (text, named) in [
            ("", "no key ''"),
            ("queues=2", "tap=NAME or user"),
            ("tap=a,user", "exclude each other"),
            ("tap=", "tap=:"),
            ("tap=a/b", "tap=a/b"),
            ("tap=1234567890123456", "15 characters"),
            ("tap=tap%d", "tap=tap%d"),
            ("tap=a,tap=b", "'tap' is given twice"),
            ("user,user", "'user' is given twice"),
            ("user=1", "'user' takes no value"),
            ("tap=a,mac=1", "mac=1"),
            ("tap=a,mac=01:00:00:00:00:00", "a group's"),
            ("tap=a,mac=00:00:00:00:00:00", "all zero"),
            ("tap=a,mac=02:00:00:00:00:00:00", "six bytes"),
            ("tap=a,mac=02:00:00:00:00:+1", "six bytes"),
            ("tap=a,mtu=67", "mtu=67"),
            ("tap=a,mtu=65536", "mtu=65536"),
            ("user,mtu=65521", "65520 with user"),
            ("tap=a,queues=0", "queues=0"),
            ("tap=a,queues=9", "queues=9"),
            ("user,queues=2", "with user there is one"),
            ("tap=a,tcp=22", "'tcp' belongs to user"),
            ("tap=a,udp=22", "'udp' belongs to user"),
            ("user,tcp=--help", "tcp=--help"),
            ("user,udp=", "udp="),
            ("user,tcp=all", "tcp=all"),
            ("tap=a,rate", "no key 'rate'"),
            ("tap=a,rate=0", "rate=0: "),
            ("tap=a,iops=-1", "iops=-1: "),
            ("tap=a,iops=1,iops=2", "'iops' is given twice"),
        ] {
            let error = text.parse::<NetConfig>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn random_addresses_are_local_and_nobodys_group() {
        let (one, two) = (Mac::random(), Mac::random());
        assert_ne!(one, two);
        assert_eq!((one.0[0] & 3, two.0[0] & 3), (2, 2));
        assert_eq!(one.to_string().parse(), Ok(one));
    }
}
