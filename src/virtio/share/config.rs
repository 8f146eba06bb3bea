//! What `--share` says: `tag=NAME,path=DIR`, and what else.

use crate::virtio::keys::{Item, KeyError, Keyed, Keys, item, items};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The longest name by which a guest mounts a folder, bytes. [VIRTIO 1.2 §5.11.4]
pub const TAG_BYTES: usize = 36;

/// How virtiofsd is locked into the folder.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sandbox {
    /// Namespaces of its own, with the folder as root.
    #[default]
    Namespace,
    /// chroot alone: where namespaces cannot be made, as in many containers.
    Chroot,
}

/// What a guest may remember of files that others can change too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Cache {
    /// For a second.
    #[default]
    Auto,
    /// For ever: nobody else changes them.
    Always,
    /// Nothing.
    None,
}

/// A shared folder, as the user wants it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShareConfig {
    /// By which name the guest mounts it.
    pub tag: String,
    /// On the host.
    pub path: PathBuf,
    /// How virtiofsd is locked in.
    pub sandbox: Sandbox,
    /// What the guest remembers.
    pub cache: Cache,
}

const KEYS: [&str; 4] = ["tag", "path", "sandbox", "cache"];

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Sandbox::Namespace => "namespace",
            Sandbox::Chroot => "chroot",
        })
    }
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cache::Auto => "auto",
            Cache::Always => "always",
            Cache::None => "none",
        })
    }
}

impl FromStr for ShareConfig {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        ShareConfig::from_items(items(text))
    }
}

impl Keyed for ShareConfig {
    fn from_items(items: Vec<Item>) -> Result<Self, KeyError> {
        let keys = Keys::new("a shared folder", &KEYS, items)?;
        let tag = |text: &str| {
            let good = (1..=TAG_BYTES).contains(&text.len()) && !text.contains('\0');
            good.then(|| text.to_owned())
        };
        let why = format!("the name by which the guest mounts it has 1 to {TAG_BYTES} bytes");
        let tag = keys.value("tag", tag, why)?;
        let path = |text: &str| (!text.is_empty() && !text.contains('\0')).then(|| text.into());
        let path = keys.value("path", path, "it is a directory of the host")?;
        let sandbox = |text: &str| match text {
            "namespace" => Some(Sandbox::Namespace),
            "chroot" => Some(Sandbox::Chroot),
            _ => None,
        };
        let sandbox = keys.value("sandbox", sandbox, "there are namespace and chroot")?;
        let cache = |text: &str| match text {
            "auto" => Some(Cache::Auto),
            "always" => Some(Cache::Always),
            "none" => Some(Cache::None),
            _ => None,
        };
        let cache = keys.value("cache", cache, "there are auto, always and none")?;
        let missing = |key: &'static str| {
            let text = format!("a shared folder needs tag=NAME and path=DIR; '{key}' is missing");
            KeyError::whole(key, text)
        };
        Ok(ShareConfig {
            tag: tag.ok_or_else(|| missing("tag"))?,
            path: path.ok_or_else(|| missing("path"))?,
            sandbox: sandbox.unwrap_or_default(),
            cache: cache.unwrap_or_default(),
        })
    }

    fn to_items(&self) -> Vec<Item> {
        vec![
            item("tag", &self.tag),
            item("path", self.path.display()),
            item("sandbox", self.sandbox),
            item("cache", self.cache),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_meant() {
        let config: ShareConfig = "tag=home,path=/a,,b,sandbox=chroot,cache=none".parse().unwrap();
        let expected = ShareConfig {
            tag: "home".into(),
            path: "/a,b".into(),
            sandbox: Sandbox::Chroot,
            cache: Cache::None,
        };
        assert_eq!(config, expected);
        assert_eq!(ShareConfig::from_items(config.to_items()), Ok(expected));
        let config: ShareConfig = "tag=x,path=y".parse().unwrap();
        assert_eq!((config.sandbox, config.cache), (Sandbox::Namespace, Cache::Auto));
    }

    #[test]
    fn mistakes_name_their_key() {
        let long = format!("tag={},path=/a", "x".repeat(37));
        for (text, named) in [
            ("", "no key ''"),
            ("tag=a", "'path' is missing"),
            ("path=/a", "'tag' is missing"),
            ("tag=,path=/a", "tag=: "),
            (&long, "1 to 36 bytes"),
            ("tag=a,path=", "path=: "),
            ("tag=a,tag=b,path=/a", "'tag' is given twice"),
            ("tag=a,path=/a,sandbox=none", "namespace and chroot"),
            ("tag=a,path=/a,cache=some", "auto, always and none"),
            ("tag=a,path=/a,ro", "no key 'ro'"),
        ] {
            let error = text.parse::<ShareConfig>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        assert!(
            format!("tag={},path=/a", "x".repeat(36))
                .parse::<ShareConfig>()
                .is_ok()
        );
    }
}
