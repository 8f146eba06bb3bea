//! `key=value,key=value`: what `--disk`, `--net` and the like say, and the tables of a file for `--config`.
//!
//! Both come here as a list of keys, most of them with a value, and are parsed by the same code; what a device is made of is
//! written as such a list again, for `--dry-run`.

use crate::machine::memory::parse_bytes;
use std::fmt;
use std::str::FromStr;

/// A key and its value; `None`: a key that stands for itself, as `ro`.
pub type Item = (String, Option<String>);

/// What is wrong with a device as the user wants it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyError {
    /// A key that is none.
    #[error("{what} has no key '{key}'; there are {known} (a comma in a value is written ,,){}", meant(.nearest))]
    Unknown {
        /// The device, with its article.
        what: &'static str,
        /// As given.
        key: String,
        /// All that there are.
        known: String,
        /// The one that looks most like it, if one does.
        nearest: Option<&'static str>,
    },
    /// The same key again.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A value is missing.
    #[error("'{0}' needs a value")]
    NoValue(String),
    /// A value where none belongs.
    #[error("'{0}' takes no value")]
    FlagWithValue(String),
    /// A value that the key cannot have.
    #[error("{key}={value}: {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// As given.
        value: String,
        /// What it can have.
        why: String,
    },
    /// Keys that are missing, or exclude each other.
    #[error("{text}")]
    Whole {
        /// The key that it is about.
        key: &'static str,
        /// What is the matter, and what helps.
        text: String,
    },
}

impl KeyError {
    /// The key that it is about.
    pub fn key(&self) -> &str {
        match self {
            KeyError::Unknown { key, .. }
            | KeyError::Twice(key)
            | KeyError::NoValue(key)
            | KeyError::FlagWithValue(key) => key,
            KeyError::Value { key, .. } | KeyError::Whole { key, .. } => key,
        }
    }

    /// One about several keys, or about none that is there.
    pub fn whole(key: &'static str, text: impl Into<String>) -> KeyError {
        KeyError::Whole {
            key,
            text: text.into(),
        }
    }
}

fn meant(nearest: &Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |key| format!("; did you mean '{key}'?"))
}

/// Of some words the one that looks most like another, if any does.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|key| (strsim::jaro(word, key), key))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .map(|(_, key)| key)
}

/// A list of keys, each of which is there once, and is known.
pub struct Keys {
    items: Vec<Item>,
}

impl Keys {
    /// `what`: the device, with its article. `known`: its keys.
    ///
    /// # Errors
    /// [`KeyError::Unknown`], [`KeyError::Twice`].
    pub fn new(what: &'static str, known: &[&'static str], items: Vec<Item>) -> Result<Keys, KeyError> {
        for (number, (key, _)) in items.iter().enumerate() {
            if !known.contains(&key.as_str()) {
                return Err(KeyError::Unknown {
                    what,
                    key: key.clone(),
                    known: listed(known),
                    nearest: nearest(key, known.iter().copied()),
                });
            }
            if items[..number].iter().any(|(other, _)| other == key) {
                return Err(KeyError::Twice(key.clone()));
            }
        }
        Ok(Keys { items })
    }

    /// The value of a key, if it is there.
    ///
    /// # Errors
    /// [`KeyError::NoValue`]; [`KeyError::Value`] if `parse` finds that it is none, with what `why` tells.
    pub fn value<T, W: fmt::Display>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
        why: W,
    ) -> Result<Option<T>, KeyError> {
        let Some((_, value)) = self.items.iter().find(|(name, _)| name == key) else {
            return Ok(None);
        };
        let value = value.as_ref().ok_or_else(|| KeyError::NoValue(key.into()))?;
        parse(value).map(Some).ok_or_else(|| KeyError::Value {
            key,
            value: value.clone(),
            why: why.to_string(),
        })
    }

    /// The same of a number within bounds.
    ///
    /// # Errors
    /// As of [`Keys::value`].
    pub fn number<T: FromStr + PartialOrd, W: fmt::Display>(
        &self,
        key: &'static str,
        bounds: std::ops::RangeInclusive<T>,
        why: W,
    ) -> Result<Option<T>, KeyError> {
        // parse takes a sign.
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        let parse = |text: &str| text.parse().ok().filter(|n| digits(text) && bounds.contains(n));
        self.value(key, parse, why)
    }

    /// Whether a key that stands for itself is there.
    ///
    /// # Errors
    /// [`KeyError::FlagWithValue`].
    pub fn flag(&self, key: &'static str) -> Result<bool, KeyError> {
        match self.items.iter().find(|(name, _)| name == key) {
            None => Ok(false),
            Some((_, None)) => Ok(true),
            Some((_, Some(_))) => Err(KeyError::FlagWithValue(key.into())),
        }
    }
}

/// `a, b and c`.
fn listed(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [one] => (*one).into(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

/// A device that is told by keys.
pub trait Keyed: Sized {
    /// Of a list of keys.
    ///
    /// # Errors
    /// [`KeyError`].
    fn from_items(items: Vec<Item>) -> Result<Self, KeyError>;

    /// The list that it is, with what was left out.
    fn to_items(&self) -> Vec<Item>;
}

/// An item with a value.
pub fn item(key: &str, value: impl fmt::Display) -> Item {
    (key.into(), Some(value.to_string()))
}

/// An item that stands for itself.
pub fn flag(key: &str) -> Item {
    (key.into(), None)
}

/// A rate, as `rate=10M` (bytes a second) says it.
pub fn rate(text: &str) -> Option<u64> {
    parse_bytes(text).ok().filter(|rate| *rate > 0)
}

/// Splits at single commas; two of them stand for one.
pub fn items(text: &str) -> Vec<Item> {
    let mut words = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else {
            words.last_mut().expect("never empty").push(character);
        }
    }
    let split = |word: String| match word.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (word, None),
    };
    words.into_iter().map(split).collect()
}

/// The text that is split into these.
pub fn text(items: &[Item]) -> String {
    let word = |(key, value): &Item| match value {
        Some(value) => format!("{key}={value}").replace(',', ",,"),
        None => key.replace(',', ",,"),
    };
    items.iter().map(word).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KNOWN: [&str; 3] = ["path", "queues", "ro"];

    fn keys(text: &str) -> Result<Keys, KeyError> {
        Keys::new("a thing", &KNOWN, items(text))
    }

    #[test]
    fn rates_are_above_zero() {
        assert_eq!(
            (rate("10M"), rate("1"), rate("0"), rate("fast")),
            (Some(10 << 20), Some(1), None, None)
        );
    }

    #[test]
    fn a_comma_splits_and_two_are_one() {
        assert_eq!(items("a,b,,c,d=e=f"), [flag("a"), flag("b,c"), item("d", "e=f")]);
        assert_eq!(items(""), [flag("")]);
    }

    #[test]
    fn values_are_numbers_within_bounds_and_flags_stand_alone() {
        let given = keys("queues=4,ro").unwrap();
        assert_eq!(given.number("queues", 1..=4, ""), Ok(Some(4)));
        assert_eq!(given.flag("ro"), Ok(true));
        assert_eq!(given.value("path", |_| Some(()), ""), Ok(None));
        for text in ["queues=0", "queues=5", "queues=+1", "queues=", "queues=1.0"] {
            let error = keys(text)
                .unwrap()
                .number("queues", 1..=4u8, "1 to 4")
                .unwrap_err();
            assert_eq!(
                (error.key(), error.to_string()),
                ("queues", format!("{text}: 1 to 4"))
            );
        }
        let error = keys("queues").unwrap().number("queues", 1..=4u8, "").unwrap_err();
        assert_eq!(error.to_string(), "'queues' needs a value");
        let error = keys("ro=1").unwrap().flag("ro").unwrap_err();
        assert_eq!(error.to_string(), "'ro' takes no value");
    }

    #[test]
    fn an_unknown_key_is_told_with_the_nearest() {
        let said = |text: &str| keys(text).map(|_| ()).unwrap_err().to_string();
        assert!(said("queue=1").contains("a thing has no key 'queue'; there are path, queues and ro"));
        assert!(said("queue=1").ends_with("did you mean 'queues'?"));
        assert!(!said("speed=1").contains("did you mean"));
        assert_eq!(said("ro,ro"), "'ro' is given twice");
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_is_split(
            list in prop::collection::vec(("[a-z]{1,4}", prop::option::of("[a-z,=]{0,6}")), 1..6),
        ) {
            prop_assert_eq!(items(&text(&list)), list);
        }
    }
}
