//! What `--disk` says: `path=…` and what else, separated by commas.

use crate::virtio::keys::{items, operations, rate};
use crate::virtio::limit::Allowance;
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

/// A `--disk` that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DiskSyntaxError {
    /// No path.
    #[error("a disk needs path=FILE")]
    NoPath,
    /// A key that is none.
    #[error(
        "a disk has no key '{0}'; there are path, format, ro, queues, serial, rate and iops (a comma in a value is written ,,)"
    )]
    UnknownKey(String),
    /// The same key again.
    #[error("'{0}' is given twice")]
    Twice(&'static str),
    /// A value where none belongs.
    #[error("'ro' takes no value")]
    FlagWithValue,
    /// `queues=…`
    #[error("queues={0}: a disk has 1 to {MAX_QUEUES} queues")]
    Queues(String),
    /// `rate=…`
    #[error("rate={0}: a rate is bytes a second, above 0, as 10M")]
    Rate(String),
    /// `iops=…`
    #[error("iops={0}: requests a second are a number above 0")]
    Iops(String),
    /// `serial=…`
    #[error("serial={0}: a serial number is 1 to {SERIAL_BYTES} printable ASCII characters")]
    Serial(String),
    /// `format=…`
    #[error("format={0}: there are raw and qcow2")]
    Format(String),
    /// A qcow2 image with several queues.
    #[error("queues={0}: a disk with format=qcow2 has one queue")]
    QueuesOfQcow2(u16),
}

/// Sets what was not set yet.
fn once<T>(place: &mut Option<T>, key: &'static str, value: T) -> Result<(), DiskSyntaxError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(DiskSyntaxError::Twice(key)),
    }
}

impl FromStr for DiskConfig {
    type Err = DiskSyntaxError;

    fn from_str(text: &str) -> Result<Self, DiskSyntaxError> {
        let (mut path, mut read_only, mut queues, mut serial) = (None, None, None, None);
        let (mut bytes, mut iops, mut format) = (None, None, None);
        for item in items(text) {
            match item.split_once('=') {
                Some(("path", value)) if !value.is_empty() => once(&mut path, "path", value.into())?,
                Some(("path", _)) => return Err(DiskSyntaxError::NoPath),
                Some(("format", value)) => {
                    let known = match value {
                        "raw" => Format::Raw,
                        "qcow2" => Format::Qcow2,
                        _ => return Err(DiskSyntaxError::Format(value.into())),
                    };
                    once(&mut format, "format", known)?;
                }
                Some(("queues", value)) => {
                    let number = value.parse().ok().filter(|n| (1..=MAX_QUEUES).contains(n));
                    let number = number.ok_or_else(|| DiskSyntaxError::Queues(value.into()))?;
                    once(&mut queues, "queues", number)?;
                }
                Some(("serial", value)) => {
                    let printable = value.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
                    if !printable || !(1..=SERIAL_BYTES).contains(&value.len()) {
                        return Err(DiskSyntaxError::Serial(value.into()));
                    }
                    once(&mut serial, "serial", value.to_owned())?;
                }
                Some(("rate", value)) => {
                    let number = rate(value).ok_or_else(|| DiskSyntaxError::Rate(value.into()))?;
                    once(&mut bytes, "rate", number)?;
                }
                Some(("iops", value)) => {
                    let number = operations(value).ok_or_else(|| DiskSyntaxError::Iops(value.into()))?;
                    once(&mut iops, "iops", number)?;
                }
                Some(("ro", _)) => return Err(DiskSyntaxError::FlagWithValue),
                None if item == "ro" => once(&mut read_only, "ro", true)?,
                Some((key, _)) => return Err(DiskSyntaxError::UnknownKey(key.into())),
                None => return Err(DiskSyntaxError::UnknownKey(item)),
            }
        }
        let queues = queues.unwrap_or(1);
        // Its tables have one owner, which is its queue's actor.
        if format == Some(Format::Qcow2) && queues > 1 {
            return Err(DiskSyntaxError::QueuesOfQcow2(queues));
        }
        Ok(DiskConfig {
            path: path.ok_or(DiskSyntaxError::NoPath)?,
            read_only: read_only.unwrap_or(false),
            queues,
            serial: serial.unwrap_or_default(),
            allowance: Allowance {
                bytes,
                operations: iops,
            },
            format,
        })
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
