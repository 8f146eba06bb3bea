//! Images for tests.

use super::DiskConfig;
use super::qcow2::header;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// A file that is gone with the value.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(content: &[u8]) -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("actor-vmm-disk-{}-{number}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Scratch(path)
    }

    pub fn config(&self, read_only: bool) -> DiskConfig {
        DiskConfig {
            path: self.0.clone(),
            read_only,
            queues: 1,
            serial: String::new(),
            allowance: Default::default(),
            format: None,
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A small image of our own: clusters of 512 bytes, for L1 table, refcount table, refcount block and an L2 table.
pub fn made_image() -> Vec<u8> {
    let mut bytes = vec![0; 512 * 5];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &header::MAGIC);
    put(4, &3u32.to_be_bytes());
    put(20, &9u32.to_be_bytes());
    put(24, &32768u64.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &512u64.to_be_bytes());
    put(48, &1024u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(512, &(2048u64 | 1 << 63).to_be_bytes());
    put(1024, &1536u64.to_be_bytes());
    for cluster in 0..5 {
        put(1536 + 2 * cluster, &1u16.to_be_bytes());
    }
    bytes
}
