//! What `--disk` says: `path=…` and what else, separated by commas.

use crate::virtio::keys::{Item, KeyError, Keyed, Keys, flag, item, items, rate};
use crate::virtio::limit::Allowance;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The most queues a disk may have: each is a thread.
pub const MAX_QUEUES: u16 = 16;
/// Bytes of a serial number. [VIRTIO 1.2 §5.2.6: VIRTIO_BLK_T_GET_ID]
pub const SERIAL_BYTES: usize = 20;

/// A disk, as the user wants it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskConfig {
    /// The image: a regular file or a block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
    /// How many queues, each with a thread.
    pub queues: u16,
    /// What the guest sees as the serial number.
    pub serial: String,
    /// What may go through it, in both directions together.
    pub allowance: Allowance,
    /// What the image is; `None`: raw, unless it looks like something else.
    pub format: Option<Format>,
}

/// Formats of images.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The file's bytes are the disk's.
    Raw,
    /// QEMU's format, with backing files.
    Qcow2,
}

const KEYS: [&str; 7] = ["path", "format", "ro", "queues", "serial", "rate", "iops"];

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for DiskConfig {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        DiskConfig::from_items(items(text))
    }
}

impl Keyed for DiskConfig {
    fn from_items(items: Vec<Item>) -> Result<Self, KeyError> {
        let keys = Keys::new("a disk", &KEYS, items)?;
        let path = |text: &str| (!text.is_empty()).then(|| text.into());
        let path = keys.value("path", path, "a disk needs path=FILE")?;
        let format = |text: &str| {
            let mut all = [Format::Raw, Format::Qcow2].into_iter();
            all.find(|format| format.to_string() == text)
        };
        let format = keys.value("format", format, "there are raw and qcow2")?;
        let why = format!("a disk has 1 to {MAX_QUEUES} queues");
        let queues = keys.number("queues", 1..=MAX_QUEUES, why)?.unwrap_or(1);
        let printable = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
        let serial = |text: &str| {
            let good = text.bytes().all(printable) && (1..=SERIAL_BYTES).contains(&text.len());
            good.then(|| text.to_owned())
        };
        let why = format!("a serial number is 1 to {SERIAL_BYTES} printable ASCII characters");
        let serial = keys.value("serial", serial, why)?;
        let allowance = Allowance {
            bytes: keys.value("rate", rate, "a rate is bytes a second, above 0, as 10M")?,
            operations: keys.number("iops", 1..=u64::MAX, "requests a second are a number above 0")?,
        };
        let config = DiskConfig {
            read_only: keys.flag("ro")?,
            path: path.ok_or_else(|| KeyError::whole("path", "a disk needs path=FILE"))?,
            queues,
            serial: serial.unwrap_or_default(),
            allowance,
            format,
        };
        // Its tables have one owner, which is its queue's actor.
        if format == Some(Format::Qcow2) && queues > 1 {
            let text = format!("queues={queues}: a disk with format=qcow2 has one queue");
            return Err(KeyError::whole("queues", text));
        }
        Ok(config)
    }

    fn to_items(&self) -> Vec<Item> {
        let mut items = vec![item("path", self.path.display())];
        items.extend(self.format.map(|format| item("format", format)));
        items.extend(self.read_only.then(|| flag("ro")));
        items.push(item("queues", self.queues));
        items.extend((!self.serial.is_empty()).then(|| item("serial", &self.serial)));
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
        let disk: DiskConfig = "path=/a,,b,ro,queues=4,serial=disk 1,iops=9,format=raw"
            .parse()
            .unwrap();
        let expected = DiskConfig {
            path: "/a,b".into(),
            read_only: true,
            queues: 4,
            serial: "disk 1".into(),
            allowance: Allowance {
                bytes: None,
                operations: Some(9),
            },
            format: Some(Format::Raw),
        };
        assert_eq!(disk, expected);
        let disk: DiskConfig = "path=x=y".parse().unwrap();
        assert_eq!((disk.path, disk.read_only, disk.queues), ("x=y".into(), false, 1));
    }

    #[test]
    fn mistakes_name_their_key() {
        for (text, named) in [
            ("", "no key ''"),
            ("ro", "path="),
            ("path=", "path="),
            ("/disk.img", "no key '/disk.img'"),
            ("path=a,rw", "'rw'"),
            ("path=a,ro=1", "'ro'"),
            ("path=a,ro,ro", "'ro' is given twice"),
            ("path=a,path=b", "'path' is given twice"),
            ("path=a,queues=0", "queues=0"),
            ("path=a,queues=17", "queues=17"),
            ("path=a,queues=many", "queues=many"),
            ("path=a,serial=", "serial="),
            ("path=a,serial=123456789012345678901", "20 printable"),
            ("path=a,serial=é", "printable"),
            ("path=a,", "no key ''"),
            ("path=a,rate=fast", "rate=fast: "),
            ("path=a,rate=0", "rate=0: "),
            ("path=a,iops=1.5", "iops=1.5: "),
            ("path=a,format=vmdk", "format=vmdk: "),
            (
                "path=a,format=qcow2,queues=2",
                "queues=2: a disk with format=qcow2 has one queue",
            ),
            ("path=a,rate=1,rate=2", "'rate' is given twice"),
        ] {
            let error = text.parse::<DiskConfig>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
