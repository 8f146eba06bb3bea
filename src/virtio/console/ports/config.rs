//! What `--port` says: `name=NAME,uds=PATH` or `name=NAME,file=PATH`.

use crate::virtio::keys::{Item, KeyError, Keyed, Keys, item, items};
use std::path::PathBuf;
use std::str::FromStr;

/// The longest name, bytes. Linux takes more; `/dev/virtio-ports/NAME` has to be a file.
const NAME_BYTES: usize = 64;

/// What a port leads to on the host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PortHost {
    /// A Unix socket, to which one program at a time connects.
    Socket(PathBuf),
    /// A file, which gets what the guest writes.
    File(PathBuf),
}

/// A port, as the user wants it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortConfig {
    /// By what the guest knows it.
    pub name: String,
    /// Where it leads.
    pub host: PortHost,
}

const KEYS: [&str; 3] = ["name", "uds", "file"];

/// Whether it can be a port's name, and a file's.
fn is_name(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=NAME_BYTES).contains(&text.len()) && text.bytes().all(good) && ![".", ".."].contains(&text)
}

impl FromStr for PortConfig {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        PortConfig::from_items(items(text))
    }
}

impl Keyed for PortConfig {
    fn from_items(items: Vec<Item>) -> Result<Self, KeyError> {
        let keys = Keys::new("a port", &KEYS, items)?;
        let why = format!("a port's name has 1 to {NAME_BYTES} letters, digits, '.', '_' or '-'");
        let name = keys.value("name", |text| is_name(text).then(|| text.to_owned()), why)?;
        let path = |text: &str| (!text.is_empty() && !text.contains('\0')).then(|| PathBuf::from(text));
        let uds = keys.value("uds", path, "a path is needed")?;
        let file = keys.value("file", path, "a path is needed")?;
        let missing = |key: &'static str| {
            let text = format!("a port needs name=NAME, and uds=PATH or file=PATH; '{key}' is missing");
            KeyError::whole(key, text)
        };
        let host = match (uds, file) {
            (Some(path), None) => PortHost::Socket(path),
            (None, Some(path)) => PortHost::File(path),
            (Some(_), Some(_)) => {
                return Err(KeyError::whole(
                    "file",
                    "a port leads to one place: uds=PATH or file=PATH",
                ));
            }
            (None, None) => return Err(missing("uds")),
        };
        Ok(PortConfig {
            name: name.ok_or_else(|| missing("name"))?,
            host,
        })
    }

    fn to_items(&self) -> Vec<Item> {
        let host = match &self.host {
            PortHost::Socket(path) => item("uds", path.display()),
            PortHost::File(path) => item("file", path.display()),
        };
        vec![item("name", &self.name), host]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_meant() {
        let port: PortConfig = "name=org.qemu.guest_agent.0,uds=/run/a,,b".parse().unwrap();
        assert_eq!(port.name, "org.qemu.guest_agent.0");
        assert_eq!(port.host, PortHost::Socket("/run/a,b".into()));
        assert_eq!(PortConfig::from_items(port.to_items()), Ok(port));
        let port: PortConfig = "file=log,name=x".parse().unwrap();
        assert_eq!(port.host, PortHost::File("log".into()));
    }

    #[test]
    fn mistakes_name_their_key() {
        let long = format!("name={},uds=/a", "x".repeat(65));
        for (text, named) in [
            ("", "no key ''"),
            ("name=x", "'uds' is missing"),
            ("uds=/a", "'name' is missing"),
            ("name=,uds=/a", "name=: "),
            ("name=a/b,uds=/a", "name=a/b: "),
            ("name=..,uds=/a", "name=..: "),
            (&long, "1 to 64"),
            ("name=x,name=y,uds=/a", "'name' is given twice"),
            ("name=x,uds=/a,file=/b", "one place"),
            ("name=x,uds=", "uds=: a path"),
            ("name=x,file", "'file' needs a value"),
            ("name=x,uds=/a,server", "no key 'server'"),
        ] {
            let error = text.parse::<PortConfig>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
