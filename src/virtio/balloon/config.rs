//! What `--balloon` says: nothing, or `size=SIZE`, `stats=SECS`.

use super::PAGE_BYTES;
use crate::machine::memory::parse_bytes;
use crate::virtio::keys::{Item, KeyError, Keyed, Keys, item, items};
use std::str::FromStr;
use std::time::Duration;

/// The longest time between two looks at the guest's figures.
const MAX_SECONDS: u64 = 3600;

/// A balloon, as the user wants it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BalloonConfig {
    /// What is taken from the guest at first, bytes: whole pages.
    pub size_bytes: u64,
    /// How often the guest is asked for its figures; `None`: never.
    pub stats: Option<Duration>,
}

const KEYS: [&str; 2] = ["size", "stats"];

fn pages(text: &str) -> Option<u64> {
    parse_bytes(text)
        .ok()
        .filter(|bytes| bytes.is_multiple_of(PAGE_BYTES))
}

fn size_why() -> String {
    format!("a balloon's size is 0 or as 256M, a multiple of {PAGE_BYTES} bytes")
}

/// Reads a size, which is whole pages and may be 0.
///
/// # Errors
/// [`KeyError::Value`].
pub fn size(text: &str) -> Result<u64, KeyError> {
    pages(text).ok_or_else(|| KeyError::Value {
        key: "size",
        value: text.into(),
        why: size_why(),
    })
}

impl FromStr for BalloonConfig {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        // Without a word it is an empty balloon.
        BalloonConfig::from_items(if text.is_empty() { Vec::new() } else { items(text) })
    }
}

impl Keyed for BalloonConfig {
    fn from_items(items: Vec<Item>) -> Result<Self, KeyError> {
        let keys = Keys::new("a balloon", &KEYS, items)?;
        let size_bytes = keys.value("size", pages, size_why())?.unwrap_or(0);
        let stats = keys.number("stats", 1..=MAX_SECONDS, format!("1 to {MAX_SECONDS} seconds"))?;
        Ok(BalloonConfig {
            size_bytes,
            stats: stats.map(Duration::from_secs),
        })
    }

    fn to_items(&self) -> Vec<Item> {
        let mut items = vec![item("size", self.size_bytes)];
        items.extend(self.stats.map(|stats| item("stats", stats.as_secs())));
        items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_meant() {
        for (text, size_bytes, seconds) in [
            ("", 0, None),
            ("size=0", 0, None),
            ("size=64M,stats=5", 64 << 20, Some(5)),
            ("stats=3600", 0, Some(3600)),
        ] {
            let stats = seconds.map(Duration::from_secs);
            assert_eq!(text.parse(), Ok(BalloonConfig { size_bytes, stats }), "{text}");
        }
    }

    #[test]
    fn mistakes_name_their_key() {
        for (text, named) in [
            ("size=", "size=: "),
            ("size=many", "size=many: "),
            ("size=1000", "size=1000: "),
            ("size=-1", "size=-1: "),
            ("size=1M,size=2M", "'size' is given twice"),
            ("stats=0", "stats=0: "),
            ("stats=3601", "stats=3601: "),
            ("size=1M,", "no key ''"),
            ("inflate=1M", "no key 'inflate'"),
            ("on", "no key 'on'"),
        ] {
            let error = text.parse::<BalloonConfig>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
