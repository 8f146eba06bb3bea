//! What `--vsock` says: `cid=N,uds=PATH`.

use super::packet::HOST_CID;
use crate::virtio::keys::{Item, KeyError, Keyed, Keys, item, items};
use std::path::PathBuf;
use std::str::FromStr;

/// The longest path: a socket's own, 107 bytes [unix(7)], less `_` and a port.
const PATH_BYTES: usize = 107 - 11;
/// The least identifier of a guest: below are the hypervisor's, the local one and the host's. [vsock(7)]
const MIN_CID: u32 = HOST_CID as u32 + 1;
/// The last; behind it is the wildcard.
const MAX_CID: u32 = u32::MAX - 1;

/// A socket device, as the user wants it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VsockConfig {
    /// The guest's context identifier.
    pub cid: u32,
    /// Where the host's programs find the guest; with `_` and a port behind, where the guest finds theirs.
    pub path: PathBuf,
}

const KEYS: [&str; 2] = ["cid", "uds"];

impl FromStr for VsockConfig {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        VsockConfig::from_items(items(text))
    }
}

impl Keyed for VsockConfig {
    fn from_items(items: Vec<Item>) -> Result<Self, KeyError> {
        let keys = Keys::new("a socket device", &KEYS, items)?;
        let why = format!("a guest's context identifier is {MIN_CID} to {MAX_CID}");
        let cid = keys.number("cid", MIN_CID..=MAX_CID, why)?;
        let path = |text: &str| {
            let good = (1..=PATH_BYTES).contains(&text.len()) && !text.contains('\0');
            good.then(|| text.into())
        };
        let why = format!("the path of a socket to which ports are appended has 1 to {PATH_BYTES} bytes");
        let path = keys.value("uds", path, why)?;
        let missing = |key: &'static str| {
            let text = format!("a socket device needs cid=N and uds=PATH; '{key}' is missing");
            KeyError::whole(key, text)
        };
        Ok(VsockConfig {
            cid: cid.ok_or_else(|| missing("cid"))?,
            path: path.ok_or_else(|| missing("uds"))?,
        })
    }

    fn to_items(&self) -> Vec<Item> {
        vec![item("cid", self.cid), item("uds", self.path.display())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_meant() {
        let config: VsockConfig = "cid=3,uds=/run/a,,b".parse().unwrap();
        assert_eq!((config.cid, config.path), (3, PathBuf::from("/run/a,b")));
    }

    #[test]
    fn mistakes_name_their_key() {
        let long = format!("cid=3,uds=/{}", "x".repeat(96));
        for (text, named) in [
            ("", "no key ''"),
            ("cid=3", "'uds' is missing"),
            ("uds=/a", "'cid' is missing"),
            ("cid=2,uds=/a", "cid=2: "),
            ("cid=4294967295,uds=/a", "cid=4294967295: "),
            ("cid=x,uds=/a", "cid=x: "),
            ("cid=3,cid=4,uds=/a", "'cid' is given twice"),
            ("cid=3,uds=/a,uds=/b", "'uds' is given twice"),
            ("cid=3,uds=", "uds=: "),
            (&long, "1 to 96 bytes"),
            ("cid=3,uds=/a,port=1", "no key 'port'"),
            ("cid=3,uds=/a,ro", "no key 'ro'"),
        ] {
            let error = text.parse::<VsockConfig>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
