//! The common configuration: what every virtio function has. [VIRTIO 1.2 §4.1.4.3]

use super::Function;
use super::vectors::{self, CONFIGURATION, NO_VECTOR};
use crate::devices::Width::{self, Byte, Dword, Qword, Word};
use crate::virtio::registers::QueueSetup;

/// Offsets of the registers.
mod offset {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const END: u64 = 0x38;
}

/// What the select registers say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Selected {
    device_features: u32,
    driver_features: u32,
    queue: u16,
}

/// The half of a 64-bit register that an access is to, as a shift and a mask.
fn part(offset: u64, width: Width) -> Option<(u32, u64)> {
    match (offset % 8, width) {
        (0, Qword) => Some((0, u64::MAX)),
        (half @ (0 | 4), Dword) => Some((half as u32 * 8, u64::from(u32::MAX))),
        _ => None,
    }
}

fn address(setup: &mut QueueSetup, offset: u64) -> &mut u64 {
    match offset {
        ..offset::QUEUE_DRIVER => &mut setup.descriptors,
        offset::QUEUE_DRIVER..offset::QUEUE_DEVICE => &mut setup.available,
        offset::QUEUE_DEVICE.. => &mut setup.used,
    }
}

impl Function {
    /// Reads a register; `None`: there is none of that width.
    pub(super) fn read_common(&self, offset: u64, width: Width) -> Option<u64> {
        let Selected {
            device_features,
            driver_features,
            queue,
        } = self.selected;
        let select = |features: u64, select: u32| match select {
            0 => features & u64::from(u32::MAX),
            1 => features >> 32,
            _ => 0,
        };
        let setup = self.registers.queue(queue.into()).copied();
        Some(match (offset, width) {
            (offset::DEVICE_FEATURE_SELECT, Dword) => device_features.into(),
            (offset::DEVICE_FEATURE, Dword) => select(self.registers.device_features(), device_features),
            (offset::DRIVER_FEATURE_SELECT, Dword) => driver_features.into(),
            (offset::DRIVER_FEATURE, Dword) => select(self.registers.driver_features(), driver_features),
            (offset::CONFIG_MSIX_VECTOR, Word) => self.vectors.vector(CONFIGURATION).into(),
            (offset::NUM_QUEUES, Word) => self.registers.identity().queues as u64,
            (offset::DEVICE_STATUS, Byte) => self.registers.status().into(),
            (offset::CONFIG_GENERATION, Byte) => u64::from(self.registers.configuration_generation()) & 0xff,
            (offset::QUEUE_SELECT, Word) => queue.into(),
            // 0: there is no such queue.
            (offset::QUEUE_SIZE, Word) => setup.map_or(0, |setup| u64::from(setup.size)),
            (offset::QUEUE_MSIX_VECTOR, Word) => match setup {
                Some(_) => self.vectors.vector(vectors::queue(queue.into())).into(),
                None => NO_VECTOR.into(),
            },
            (offset::QUEUE_ENABLE, Word) => setup.is_some_and(|setup| setup.ready).into(),
            (offset::QUEUE_NOTIFY_OFF, Word) => setup.map_or(0, |_| queue.into()),
            (offset::QUEUE_DESC..offset::END, _) => {
                let (shift, mask) = part(offset, width)?;
                setup.map_or(0, |mut setup| *address(&mut setup, offset)) >> shift & mask
            }
            _ => return None,
        })
    }

    /// Writes one.
    pub(super) fn write_common(&mut self, offset: u64, width: Width, value: u64) {
        let queue = u32::from(self.selected.queue);
        match (offset, width) {
            (offset::DEVICE_FEATURE_SELECT, Dword) => self.selected.device_features = value as u32,
            (offset::DRIVER_FEATURE_SELECT, Dword) => self.selected.driver_features = value as u32,
            (offset::DRIVER_FEATURE, Dword) if self.selected.driver_features < 2 => {
                let high = self.selected.driver_features == 1;
                self.registers.set_driver_features(high, value as u32);
            }
            (offset::CONFIG_MSIX_VECTOR, Word) => {
                self.vectors.set_vector(CONFIGURATION, value as u16);
                self.reflect_vectors();
            }
            (offset::DEVICE_STATUS, Byte) if value == 0 => self.reset_device(),
            (offset::DEVICE_STATUS, Byte) => {
                let broken = self.registers.set_status(value as u8);
                if broken {
                    self.tell_configuration();
                }
            }
            (offset::QUEUE_SELECT, Word) => self.selected.queue = value as u16,
            (offset::QUEUE_SIZE, Word) => {
                if let Some(setup) = self.registers.queue_to_set_up(queue) {
                    setup.size = value as u32;
                }
            }
            (offset::QUEUE_MSIX_VECTOR, Word) if self.registers.queue(queue).is_some() => {
                self.vectors
                    .set_vector(vectors::queue(queue as usize), value as u16);
                self.reflect_vectors();
            }
            // A driver must not write 0: a queue ends with a reset.
            (offset::QUEUE_ENABLE, Word) if value == 1 => self.registers.set_ready(queue, true),
            (offset::QUEUE_DESC..offset::END, _) => {
                if let Some((shift, mask)) = part(offset, width)
                    && let Some(setup) = self.registers.queue_to_set_up(queue)
                {
                    let register = address(setup, offset);
                    *register = *register & !(mask << shift) | (value & mask) << shift;
                }
            }
            _ => {}
        }
    }
}
