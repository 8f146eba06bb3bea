//! What `--balloon` says: nothing, or `size=SIZE`, `stats=SECS`.

use super::PAGE_BYTES;
use crate::machine::memory::parse_bytes;
use crate::virtio::keys::items;
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

/// A `--balloon` that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BalloonSyntaxError {
    /// A key that is none.
    #[error("a balloon has no key '{0}'; there are size and stats")]
    UnknownKey(String),
    /// The same key again.
    #[error("'{0}' is given twice")]
    Twice(&'static str),
    /// `size=…`
    #[error("size={0}: a balloon's size is 0 or as 256M, a multiple of {PAGE_BYTES} bytes")]
    Size(String),
    /// `stats=…`
    #[error("stats={0}: 1 to {MAX_SECONDS} seconds")]
    Stats(String),
}

/// Reads a size, which is whole pages and may be 0.
///
/// # Errors
/// [`BalloonSyntaxError::Size`].
pub fn size(text: &str) -> Result<u64, BalloonSyntaxError> {
    parse_bytes(text)
        .ok()
        .filter(|bytes| bytes.is_multiple_of(PAGE_BYTES))
        .ok_or_else(|| BalloonSyntaxError::Size(text.into()))
}

fn once<T>(place: &mut Option<T>, key: &'static str, value: T) -> Result<(), BalloonSyntaxError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(BalloonSyntaxError::Twice(key)),
    }
}

impl FromStr for BalloonConfig {
    type Err = BalloonSyntaxError;

    fn from_str(text: &str) -> Result<Self, BalloonSyntaxError> {
        let (mut bytes, mut stats) = (None, None);
        // Without a word it is an empty balloon.
        for item in items(text).iter().filter(|_| !text.is_empty()) {
            match item.split_once('=') {
                Some(("size", value)) => once(&mut bytes, "size", size(value)?)?,
                Some(("stats", value)) => {
                    let seconds = value.parse().ok().filter(|n| (1..=MAX_SECONDS).contains(n));
                    let seconds = seconds.ok_or_else(|| BalloonSyntaxError::Stats(value.into()))?;
                    once(&mut stats, "stats", Duration::from_secs(seconds))?;
                }
                Some((key, _)) => return Err(BalloonSyntaxError::UnknownKey(key.into())),
                None => return Err(BalloonSyntaxError::UnknownKey(item.clone())),
            }
        }
        Ok(BalloonConfig {
            size_bytes: bytes.unwrap_or(0),
            stats,
        })
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
