//! A writer for the "newc" archives that Linux takes as an initramfs.
//!
//! Linux unpacks archives that follow each other as if they were one, so a large part that rarely changes and a small
//! part that always does are simply concatenated.

use std::collections::BTreeSet;

const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHAR: u32 = 0o020_000;

#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    dirs: BTreeSet<String>,
}

impl Archive {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and those above it, once.
    pub fn dir(&mut self, path: &str) {
        if path.is_empty() || !self.dirs.insert(path.to_owned()) {
            return;
        }
        self.parents(path);
        self.entry(path, DIR | 0o755, (0, 0), &[]);
    }

    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path, FILE | mode, (0, 0), content);
    }

    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, LINK | 0o777, (0, 0), target.as_bytes());
    }

    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, CHAR | 0o600, (major, minor), &[]);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        // The next archive of a concatenation has to start on a 4-byte boundary; 512 is what cpio itself pads to.
        self.pad(512);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("an initramfs file is under 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a path is short");
        let links = if mode & DIR != 0 { 2 } else { 1 };
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_directories_come_once_and_first() {
        let mut archive = Archive::new();
        archive.file("a/b/one", 0o644, b"hello");
        archive.file("a/b/two", 0o755, b"");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 5, "a, a/b, one, two, trailer");
        assert!(text.find("a\0").unwrap() < text.find("a/b\0").unwrap());
        assert!(text.find("a/b\0").unwrap() < text.find("a/b/one\0").unwrap());
        assert!(text.contains("hello"));
    }
}
