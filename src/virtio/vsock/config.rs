//! What `--vsock` says: `cid=N,uds=PATH`.

use super::packet::HOST_CID;
use crate::virtio::keys::items;
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

/// A `--vsock` that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum VsockSyntaxError {
    /// A key is missing.
    #[error("a socket device needs cid=N and uds=PATH; '{0}' is missing")]
    Missing(&'static str),
    /// A key that is none.
    #[error("a socket device has no key '{0}'; there are cid and uds (a comma in a value is written ,,)")]
    UnknownKey(String),
    /// The same key again.
    #[error("'{0}' is given twice")]
    Twice(&'static str),
    /// `cid=…`
    #[error("cid={0}: a guest's context identifier is {MIN_CID} to {MAX_CID}")]
    Cid(String),
    /// `uds=…`
    #[error("uds={0}: the path of a socket to which ports are appended has 1 to {PATH_BYTES} bytes")]
    Path(String),
}

fn once<T>(place: &mut Option<T>, key: &'static str, value: T) -> Result<(), VsockSyntaxError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(VsockSyntaxError::Twice(key)),
    }
}

impl FromStr for VsockConfig {
    type Err = VsockSyntaxError;

    fn from_str(text: &str) -> Result<Self, VsockSyntaxError> {
        let (mut cid, mut path) = (None, None);
        for item in items(text) {
            match item.split_once('=') {
                Some(("cid", value)) => {
                    let number = value.parse().ok().filter(|cid| (MIN_CID..=MAX_CID).contains(cid));
                    let number = number.ok_or_else(|| VsockSyntaxError::Cid(value.into()))?;
                    once(&mut cid, "cid", number)?;
                }
                Some(("uds", value)) => {
                    if !(1..=PATH_BYTES).contains(&value.len()) || value.contains('\0') {
                        return Err(VsockSyntaxError::Path(value.into()));
                    }
                    once(&mut path, "uds", value.into())?;
                }
                Some((key, _)) => return Err(VsockSyntaxError::UnknownKey(key.into())),
                None => return Err(VsockSyntaxError::UnknownKey(item)),
            }
        }
        Ok(VsockConfig {
            cid: cid.ok_or(VsockSyntaxError::Missing("cid"))?,
            path: path.ok_or(VsockSyntaxError::Missing("uds"))?,
        })
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
