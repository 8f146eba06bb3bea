//! What `--net` says: `tap=NAME` or `user`, and what else, separated by commas.

use crate::virtio::keys::{Item, KeyError, Keyed, Keys, flag, item, items, rate};
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
/// passt's most, bytes.
const MOST_USER_MTU: u16 = 65_520;

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

const KEYS: [&str; 9] = [
    "tap", "user", "mac", "mtu", "queues", "rate", "iops", "tcp", "udp",
];

/// What passt takes: `22`, `2222:22`, `5000-5009`, `127.0.0.1/22`, and lists of these.
fn ports(value: &str) -> Option<String> {
    let known = |character: char| character.is_ascii_hexdigit() || "-:,./~".contains(character);
    let begins = value.starts_with(|first: char| first.is_ascii_hexdigit() || first == '~');
    let good = begins && value.chars().all(known) && value.contains(|digit: char| digit.is_ascii_digit());
    good.then(|| value.to_owned())
}

fn name(value: &str) -> Option<String> {
    let allowed = |character: char| character.is_ascii_graphic() && character != '/';
    let good = (1..=NAME_BYTES).contains(&value.len()) && value.chars().all(allowed);
    // A pattern to the kernel, and two directories.
    let good = good && !value.contains('%') && value != "." && value != "..";
    good.then(|| value.to_owned())
}

impl FromStr for NetConfig {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        NetConfig::from_items(items(text))
    }
}

impl Keyed for NetConfig {
    fn from_items(items: Vec<Item>) -> Result<Self, KeyError> {
        let keys = Keys::new("a network device", &KEYS, items)?;
        let why =
            format!("an interface's name has 1 to {NAME_BYTES} characters, none of them a slash or a space");
        let tap = keys.value("tap", name, why)?;
        let user = keys.flag("user")?;
        let why = "an address is six bytes as 02:00:00:00:00:01, and neither all zero nor a group's";
        let mac = keys.value("mac", |text| text.parse().ok(), why)?;
        let most_mtu = if user { MOST_USER_MTU } else { u16::MAX };
        let why = format!("an MTU is {MIN_MTU} to 65535 bytes, and at most {MOST_USER_MTU} with user");
        let mtu = keys.number("mtu", MIN_MTU..=most_mtu, why)?;
        let why = format!("a network device has 1 to {MAX_PAIRS} queue pairs");
        let queues = keys.number("queues", 1..=MAX_PAIRS, why)?.unwrap_or(1);
        let allowance = Allowance {
            bytes: keys.value("rate", rate, "a rate is bytes a second, above 0, as 10M")?,
            operations: keys.number("iops", 1..=u64::MAX, "frames a second are a number above 0")?,
        };
        let why = "ports are numbers, ranges and pairs of them as 8080:80 or 5000-5009";
        let (tcp, udp) = (keys.value("tcp", ports, why)?, keys.value("udp", ports, why)?);
        let of_user = |key| {
            Err(KeyError::whole(
                key,
                format!("'{key}' belongs to user; a tap has all ports"),
            ))
        };
        let host = match (tap, user) {
            (None, false) => return Err(KeyError::whole("tap", "a network device needs tap=NAME or user")),
            (Some(_), true) => return Err(KeyError::whole("tap", "'tap' and 'user' exclude each other")),
            (Some(_), false) if tcp.is_some() => return of_user("tcp"),
            (Some(_), false) if udp.is_some() => return of_user("udp"),
            (None, true) if queues > 1 => {
                let text = format!("queues={queues}: with user there is one queue pair");
                return Err(KeyError::whole("queues", text));
            }
            (Some(name), false) => Host::Tap(name),
            (None, true) => Host::User(Ports { tcp, udp }),
        };
        Ok(NetConfig {
            host,
            mac,
            mtu,
            queues,
            allowance,
        })
    }

    fn to_items(&self) -> Vec<Item> {
        let mut items = Vec::new();
        match &self.host {
            Host::Tap(name) => items.push(item("tap", name)),
            Host::User(Ports { tcp, udp }) => {
                items.push(flag("user"));
                items.extend(tcp.iter().map(|ports| item("tcp", ports)));
                items.extend(udp.iter().map(|ports| item("udp", ports)));
            }
        }
        items.extend(self.mac.map(|mac| item("mac", mac)));
        items.extend(self.mtu.map(|mtu| item("mtu", mtu)));
        items.push(item("queues", self.queues));
        items.extend(self.allowance.bytes.map(|rate| item("rate", rate)));
        items.extend(self.allowance.operations.map(|iops| item("iops", iops)));
        items
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
            ("tap=a,rate", "'rate' needs a value"),
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
