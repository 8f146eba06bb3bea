//! Entry points for fuzzing (`fuzz/`, `cargo xtask fuzz`): what a hostile guest can do, read out of any bytes. An input is
//! survived if nothing panics or hangs and the device serves afterwards as a new one would.
//!
//! Bytes are read so that small changes of them are small changes of what the guest does, and so that most of it is
//! nearly valid: a driver whose every address is outside memory is told so at the first step.

use super::subjects::{self, Subject};
use super::testing::{self, AVAILABLE, DESCRIPTORS, MEMORY_BYTES, Rig, USED};
use crate::devices::testing::FakeContext;
use crate::devices::{Access, BackendEvent, Device, Queues, Width};
use crate::pci::{BAR, CONFIG};

/// How many steps an input has at most, so that none takes long.
const STEPS: usize = 256;

/// An input that is read from its start; zeroes follow its end.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let there = self.0.len().min(N);
        let (now, rest) = self.0.split_at(there);
        array[..there].copy_from_slice(now);
        self.0 = rest;
        array
    }

    fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    fn short(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// An address: mostly where a request can be, sometimes in the rings, at the end of memory, or anywhere.
    fn address(&mut self) -> u64 {
        match self.byte() {
            0..=191 => 0x5000 + u64::from(self.short()),
            192..=207 => DESCRIPTORS + u64::from(self.short() & 0xfff),
            208..=223 => AVAILABLE + u64::from(self.short() & 0x3ff),
            224..=231 => USED + u64::from(self.short() & 0xfff),
            232..=247 => MEMORY_BYTES - 0x8000 + u64::from(self.short()),
            _ => self.long(),
        }
    }

    fn length(&mut self) -> u32 {
        match self.byte() {
            0..=127 => u32::from(self.byte()),
            128..=223 => u32::from(self.short() & 0x1fff),
            224..=239 => u32::from(self.byte()) << 9,
            _ => self.word(),
        }
    }
}

/// A disk's queue.
pub fn blk(input: &[u8]) {
    queue(subjects::disk, input);
}

/// An entropy device's.
pub fn rng(input: &[u8]) {
    queue(subjects::entropy, input);
}

/// A network device's queues.
pub fn net(input: &[u8]) {
    queue(subjects::network, input);
}

/// A socket device's.
pub fn vsock(input: &[u8]) {
    queue(subjects::socket, input);
}

/// A balloon's.
pub fn balloon(input: &[u8]) {
    queue(subjects::balloon, input);
}

/// A console's.
pub fn console(input: &[u8]) {
    queue(subjects::console, input);
}

/// A shared folder's.
pub fn share(input: &[u8]) {
    queue(subjects::folder, input);
}

/// The control queues of a device with ports, and a port's.
pub fn ports(input: &[u8]) {
    queue(subjects::ports, input);
}

/// A driver that does with a queue, chosen by the first byte, what the others say.
fn queue(device: fn() -> Vec<Subject>, input: &[u8]) {
    let mut input = Bytes(input);
    let mut subjects = device();
    let chosen = usize::from(input.byte()) % subjects.len();
    let Subject {
        name,
        handler,
        probe,
        served,
        kept: _kept,
    } = subjects.swap_remove(chosen);
    drop(subjects);
    let mut rig = Rig::new(handler);
    for _ in 0..STEPS {
        if input.is_over() {
            break;
        }
        match input.byte() % 16 {
            0..=5 => {
                let (index, next) = (input.byte() % 20, u16::from(input.byte() % 20));
                // Into the table of the queue, or one that is indirect.
                let table = if index < 16 { DESCRIPTORS } else { 0x5000 };
                let (flags, address, length) = (input.byte(), input.address(), input.length());
                let next = if flags >= 0xf0 { input.short() } else { next };
                rig.describe(table, index.into(), address, length, (flags & 7).into(), next);
            }
            6..=7 => {
                let (at, bytes) = (input.address(), input.array::<16>());
                let end = at.saturating_add(bytes.len() as u64);
                if end <= MEMORY_BYTES {
                    rig.write(at, &bytes);
                }
            }
            // The header of a request that a disk knows: its kind and its sector.
            8 => {
                let (kind, sector) = (u32::from(input.byte() % 32), u64::from(input.byte()));
                rig.write(0x5000, &u64::from(kind).to_le_bytes());
                rig.write(0x5008, &sector.to_le_bytes());
            }
            9..=11 => rig.offer(u16::from(input.byte() % 20)),
            12 => rig.publish(input.short()),
            13 => rig.settle(),
            14 => {
                rig.features = input.long();
                rig.start();
            }
            _ => {
                rig.remote.suspend();
                rig.remote.resume();
            }
        }
    }
    rig.settle();
    rig.features = 0;
    rig.start();
    assert_eq!(probe(&mut rig), served, "{name} after a reset");
}

/// The registers of virtio-mmio.
pub fn mmio(input: &[u8]) {
    let mut input = Bytes(input);
    let latched = input.byte() & 1 != 0;
    let (mut device, calls) = testing::mmio(latched);
    let mut cx = FakeContext::new();
    registers(&mut device, &mut cx, &mut input, |input| match input.byte() {
        byte @ 0..=199 => u64::from(byte % 0x44) * 4,
        200..=239 => u64::from(input.short() % 0x1100),
        _ => input.long(),
    });
    let _ = calls.try_iter().count();
    let (mut new, _calls) = testing::mmio(latched);
    let places = (0..0x200).step_by(4).map(|offset| (offset, Width::Dword));
    same(&mut device, &mut new, &mut cx, places);
}

/// A function's configuration space and registers of virtio-pci.
pub fn pci(input: &[u8]) {
    let mut input = Bytes(input);
    let (mut device, seen) = testing::pci();
    let mut cx = FakeContext::new();
    registers(&mut device, &mut cx, &mut input, |input| match input.byte() {
        byte @ 0..=63 => CONFIG + u64::from(byte) * 4,
        byte @ 64..=127 => BAR + u64::from(byte - 64),
        128..=159 => CONFIG + u64::from(input.short() % 0x1100),
        160..=239 => BAR + u64::from(input.short() % 0x9000),
        _ => input.long(),
    });
    // Messages go to local APICs and nowhere else.
    for (_, message) in seen.sent.try_iter() {
        assert_eq!(message.address >> 20 & 0xfff, 0xfee);
    }
    let (mut new, _seen) = testing::pci();
    let config = (0..0x100).map(|register| (CONFIG + register, Width::Byte));
    let bar = (0..0x8000 / 4).map(|word| (BAR + 4 * word, Width::Dword));
    same(&mut device, &mut new, &mut cx, config.chain(bar));
}

/// Any accesses and any news, and a reset.
fn registers(
    device: &mut dyn Device,
    cx: &mut FakeContext,
    input: &mut Bytes<'_>,
    offset: fn(&mut Bytes<'_>) -> u64,
) {
    for _ in 0..STEPS {
        if input.is_over() {
            break;
        }
        let what = input.byte();
        let width = [Width::Dword, Width::Word, Width::Byte, Width::Qword][usize::from(what >> 6)];
        match what % 16 {
            0..=3 => {
                let offset = offset(input);
                device.read(cx, Access { offset, width });
            }
            4..=11 => {
                let offset = offset(input);
                let value = match input.byte() {
                    small @ 0..=127 => u64::from(small),
                    page @ 128..=223 => u64::from(page) << 12,
                    224..=239 => u64::MAX,
                    _ => input.long(),
                };
                device.write(cx, Access { offset, width }, value & width.all_ones());
            }
            12 => {
                let life = u32::from(input.byte() % 4);
                let event = match life {
                    3 => BackendEvent::Broken,
                    _ => BackendEvent::Used(Queues(input.byte().into())),
                };
                device.backend_news(cx, super::BackendNews::new(life, event));
            }
            13 => device.pause(cx),
            14 => device.resume(cx),
            _ => device.reset(cx),
        }
    }
    device.reset(cx);
    assert!(!device.interrupt());
}

/// Both have the same in all these places.
fn same(
    device: &mut dyn Device,
    new: &mut dyn Device,
    cx: &mut FakeContext,
    places: impl Iterator<Item = (u64, Width)>,
) {
    for (offset, width) in places {
        let access = Access { offset, width };
        assert_eq!(device.read(cx, access), new.read(cx, access), "{offset:#x}");
    }
}

/// The targets are what they are called after in `fuzz/`, and survive at least noise.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_file_and_survives_noise() {
        type Target = fn(&[u8]);
        let targets: [(&str, Target); 10] = [
            ("balloon", balloon),
            ("blk", blk),
            ("console", console),
            ("mmio", mmio),
            ("net", net),
            ("pci", pci),
            ("ports", ports),
            ("rng", rng),
            ("share", share),
            ("vsock", vsock),
        ];
        let files = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/fuzz_targets");
        let mut found: Vec<_> = std::fs::read_dir(files)
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        assert_eq!(found, targets.map(|(name, _)| format!("{name}.rs")));
        for (_, target) in targets {
            let mut noise = 1u64;
            for _ in 0..16 {
                let mut next = || {
                    noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (noise >> 56) as u8
                };
                let bytes: Vec<u8> = (0..400).map(|_| next()).collect();
                target(&bytes);
            }
        }
    }
}
