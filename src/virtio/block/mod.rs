//! virtio-blk, the block device. [VIRTIO 1.2 §5.2]
//!
//! | question | file |
//! |---|---|
//! | what `--disk` says | `config.rs` |
//! | a raw image: opened, locked, read, written | `image.rs` |
//! | a qcow2 image | `qcow2/` |
//! | either, as a queue has it | `disk.rs` |
//! | requests: parsed and checked, then done | `request.rs` |
//!
//! The disk has a write cache (the host's page cache): what a guest has written survives the guest at once, and the host
//! only once the guest has flushed, which is an fdatasync. A flush covers what any queue has completed before it.
//! A flush that failed makes all later ones fail: the host's kernel drops what it could not write and would say that all
//! is well the next time [fsync(2)].

pub mod config;
pub mod disk;
pub mod image;
pub mod qcow2;
pub mod request;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;

pub use config::DiskConfig;
pub use disk::Disk;
pub use image::{Image, ImageError};
pub use request::Block;

use super::QUEUE_SIZE;
use super::registers::Identity;
use virtio_bindings::virtio_blk as spec;

/// Unit of addresses and capacities, whatever the image's own blocks are.
pub const SECTOR_BYTES: u64 = 512;

const BLOCK_DEVICE: u32 = 2;
/// Bytes of a request that are no data: its header and its status. [VIRTIO 1.2 §5.2.6]
pub const OVERHEAD_BYTES: u64 = 16 + 1;

/// Most sectors of one discard: 1 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one write of zeroes: 16 MiB, as a host that has no quick way must write them.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;
/// Most ranges in one request of either.
pub const MAX_RANGES: u32 = 16;

/// What the device is for this disk and so many queues.
pub fn identity(disk: &Disk, queues: u16) -> Identity {
    let mut features = 1 << spec::VIRTIO_BLK_F_SEG_MAX
        | 1 << spec::VIRTIO_BLK_F_BLK_SIZE
        | 1 << spec::VIRTIO_BLK_F_TOPOLOGY
        | 1 << spec::VIRTIO_BLK_F_FLUSH;
    if queues > 1 {
        features |= 1 << spec::VIRTIO_BLK_F_MQ;
    }
    features |= if disk.is_read_only() {
        1 << spec::VIRTIO_BLK_F_RO
    } else {
        1 << spec::VIRTIO_BLK_F_DISCARD | 1 << spec::VIRTIO_BLK_F_WRITE_ZEROES
    };
    Identity {
        device_type: BLOCK_DEVICE,
        features,
        configuration: configuration(disk, queues),
        published: None,
        written: None,
        queues: queues.into(),
    }
}

/// `struct virtio_blk_config` [VIRTIO 1.2 §5.2.4], field by field; what belongs to features that are not offered is 0.
fn configuration(disk: &Disk, queues: u16) -> Vec<u8> {
    /// log2 of physical by logical blocks: 4 KiB, the pages of the host's cache.
    const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
    const PAGE_SECTORS: u16 = 8;
    // What is given back, and best written, at once.
    let allocation = u32::try_from(disk.allocation_bytes() / SECTOR_BYTES).unwrap_or(PAGE_SECTORS.into());
    let mut bytes = Vec::with_capacity(60);
    let mut put = |field: &[u8]| bytes.extend_from_slice(field);
    put(&disk.sectors().to_le_bytes()); // capacity
    put(&0u32.to_le_bytes()); // size_max
    put(&(u32::from(QUEUE_SIZE) - 2).to_le_bytes()); // seg_max: header and status take two
    put(&[0; 4]); // geometry
    put(&(SECTOR_BYTES as u32).to_le_bytes()); // blk_size
    put(&[PHYSICAL_BLOCK_EXPONENT, 0]); // physical_block_exp, alignment_offset
    put(&PAGE_SECTORS.to_le_bytes()); // min_io_size
    put(&disk.cluster_bytes().map_or(0, |_| allocation).to_le_bytes()); // opt_io_size
    put(&[0, 0]); // writeback, unused
    put(&queues.to_le_bytes()); // num_queues
    put(&MAX_DISCARD_SECTORS.to_le_bytes());
    put(&MAX_RANGES.to_le_bytes()); // max_discard_seg
    put(&allocation.to_le_bytes()); // discard_sector_alignment
    put(&MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
    put(&MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
    put(&[1, 0, 0, 0]); // write_zeroes_may_unmap, unused
    bytes
}

/// Writes zeroes where nothing quicker is there. `write`: at an offset, some bytes.
fn in_pieces_of_zeroes(
    offset: u64,
    bytes: u64,
    mut write: impl FnMut(u64, &[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let mut done = 0;
    while done < bytes {
        let part = (bytes - done).min(ZEROES.len() as u64);
        write(offset + done, &ZEROES[..part as usize])?;
        done += part;
    }
    Ok(())
}
