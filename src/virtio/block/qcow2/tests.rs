//! Against Debian's qemu-img, which makes images, looks for damage and compares. A machine without it skips these tests
//! and says so; under CI that is a failure.

use super::*;
use crate::virtio::block::testing::made_image;
use crate::virtio::block::{Block, Disk};
use crate::virtio::queue::Handler;
use crate::virtio::testing::{LIMIT, Outcome, R, Rig, W, kept_log};
use proptest::prelude::*;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use virtio_bindings::virtio_blk as spec;

/// What the host, or the library, does wrong at the next write.
#[derive(Debug, Default)]
pub struct Fault(AtomicU8);

impl Fault {
    const NONE: u8 = 0;
    const FULL: u8 = 1;
    const PANIC: u8 = 2;

    pub fn happens(&self) -> io::Result<()> {
        match self.0.load(Ordering::Relaxed) {
            Self::FULL => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            Self::PANIC => panic!("planted"),
            _ => Ok(()),
        }
    }

    fn set(&self, kind: u8) {
        self.0.store(kind, Ordering::Relaxed);
    }
}

/// A directory that is gone with the value.
struct Place(PathBuf);

impl Place {
    /// `None`: there is no qemu-img to make images in it.
    fn new() -> Option<Place> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !Path::new("/usr/bin/qemu-img").exists() {
            assert!(std::env::var_os("CI").is_none(), "CI must have qemu-img");
            println!("qemu-img is not installed: nothing to try");
            return None;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("actor-vmm-qcow2-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Some(Place(path))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Runs qemu-img here; returns its status and what it said.
    fn try_qemu_img(&self, words: &str) -> (i32, String) {
        let output = Command::new("qemu-img")
            .args(words.split(' '))
            .current_dir(&self.0)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    fn qemu_img(&self, words: &str) -> String {
        let (status, text) = self.try_qemu_img(words);
        assert_eq!(status, 0, "qemu-img {words}: {text}");
        text
    }

    fn config(&self, name: &str) -> DiskConfig {
        format!("path={},format=qcow2", self.at(name).display())
            .parse()
            .unwrap()
    }

    fn open(&self, name: &str) -> Qcow2 {
        try_open(&self.config(name)).unwrap()
    }

    fn refused(&self, name: &str) -> String {
        self.said(name, try_open(&self.config(name)))
    }

    /// The same of an image that is in use.
    fn locked(&self, name: &str) -> String {
        self.said(name, Qcow2::open(&self.config(name)))
    }

    fn said(&self, name: &str, result: Result<Qcow2, ImageError>) -> String {
        let text = result.map(|_| ()).unwrap_err().to_string();
        let named = format!("--disk path={}", self.at(name).display());
        assert!(text.contains(&named), "{text}");
        text
    }

    /// Puts bytes into a file.
    fn patch(&self, name: &str, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.at(name)).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    /// What a raw image of an image's content has.
    fn content(&self, name: &str) -> Vec<u8> {
        self.qemu_img(&format!("convert -O raw {name} {name}.raw"));
        std::fs::read(self.at(&format!("{name}.raw"))).unwrap()
    }

    /// With a fault to come.
    fn open_faulty(&self, name: &str) -> (Qcow2, Arc<Fault>) {
        let fault = Arc::new(Fault::default());
        let mut seen = Vec::new();
        let opened = open_file(&self.at(name), BackingFormat::Qcow2, false, &mut seen).unwrap();
        let (mut medium, header) = (opened.medium, opened.header.unwrap());
        medium.fault = Some(fault.clone());
        let image = Qcow2 {
            image: Some(layer(medium, true, true, None).unwrap()),
            path: self.at(name),
            size: header.size,
            cluster_bytes: 1 << header.cluster_bits,
            read_only: false,
            flush_failed: false,
        };
        (image, fault)
    }
}

/// Opens an image that nobody uses. Between fork and exec, another test's qemu-img has our descriptors, and with them
/// the locks of images that were used before.
fn try_open(config: &DiskConfig) -> Result<Qcow2, ImageError> {
    let begin = std::time::Instant::now();
    loop {
        match Qcow2::open(config) {
            Err(ImageError {
                problem: Problem::Locked { .. },
                ..
            }) if begin.elapsed() < LIMIT => std::thread::yield_now(),
            result => return result,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn what_is_written_is_there_for_qemu_and_the_backing_file_is_as_it_was() {
    let Some(place) = Place::new() else { return };
    // A backing file of each format, the raw one shorter than the disk and not of whole clusters.
    std::fs::write(place.at("base.raw"), vec![0x11; (MIB + 512) as usize]).unwrap();
    place.qemu_img("create -q -f qcow2 -F raw -b base.raw middle 4M");
    place.qemu_img("create -q -f qcow2 -F qcow2 -b middle top 4M");
    let before = ["base.raw", "middle"].map(|name| std::fs::read(place.at(name)).unwrap());
    let mut image = place.open("top");
    assert_eq!((image.sectors(), image.cluster_bytes()), (4 * MIB / 512, 65536));
    let mut read = vec![0; 1024];
    image.read(MIB, &mut read).unwrap();
    assert_eq!(
        (read[..512] == [0x11; 512], read[512..] == [0; 512]),
        (true, true)
    );
    image.write(512, &[0xaa; 512]).unwrap();
    image.write(4 * MIB - 512, &[0xbb; 512]).unwrap();
    image.write_zeroes(1024, 512, false).unwrap();
    image.discard(65536, 65536).unwrap();
    image.flush().unwrap();
    drop(image);
    assert!(place.qemu_img("check top").contains("No errors"));
    let mut expected = vec![0x11; (MIB + 512) as usize];
    expected.resize(4 * MIB as usize, 0);
    expected[512..1024].fill(0xaa);
    expected[1024..1536].fill(0);
    expected[65536..131072].fill(0);
    expected[4 * MIB as usize - 512..].fill(0xbb);
    assert!(place.content("top") == expected);
    let after = ["base.raw", "middle"].map(|name| std::fs::read(place.at(name)).unwrap());
    assert!(before == after);
}

/// What a guest can do, and we between.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zeroes(u64, u64, bool),
    Read(u64, u64),
    Flush,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = 3 * MIB / 512;
    let range = (0..sectors, 1..200u64).prop_map(move |(at, count)| (at, count.min(sectors - at)));
    prop_oneof![
        4 => (range.clone(), any::<u8>()).prop_map(|((at, count), byte)| Step::Write(at, count, byte)),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, count), unmap)| Step::Zeroes(at, count, unmap)),
        2 => range.prop_map(|(at, count)| Step::Read(at, count)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    /// Whatever a guest does: each read gives what was written last, and so does qemu-img in the end, without errors.
    #[test]
    fn an_image_is_a_disk(
        steps in prop::collection::vec(step(), 1..60),
        version in prop_oneof![Just("0.10"), Just("1.1")],
        cluster in prop_oneof![Just("512"), Just("4k"), Just("64k")],
        counts in prop_oneof![Just("1"), Just("16"), Just("64")],
        compressed in any::<bool>(),
    ) {
        let Some(place) = Place::new() else { return Ok(()) };
        let counts = if version == "0.10" { "16" } else { counts };
        let options = format!("-o compat={version},cluster_size={cluster},refcount_bits={counts}");
        let mut model: Vec<u8> = (0..3 * MIB).map(|at| (at / 512 % 251) as u8).collect();
        std::fs::write(place.at("base"), &model).unwrap();
        if compressed {
            place.qemu_img(&format!("convert -q -c -f raw -O qcow2 {options} base top"));
        } else {
            place.qemu_img(&format!("create -q -f qcow2 {options} -F raw -b base top"));
        }
        let mut image = place.open("top");
        let range = |at: u64, count: u64| (at * 512) as usize..((at + count) * 512) as usize;
        for step in steps {
            match step {
                Step::Write(at, count, byte) => {
                    model[range(at, count)].fill(byte);
                    image.write(at * 512, &vec![byte; (count * 512) as usize]).unwrap();
                }
                Step::Zeroes(at, count, unmap) => {
                    model[range(at, count)].fill(0);
                    image.write_zeroes(at * 512, count * 512, unmap).unwrap();
                }
                Step::Read(at, count) => {
                    let mut bytes = vec![0; (count * 512) as usize];
                    image.read(at * 512, &mut bytes).unwrap();
                    prop_assert!(bytes == model[range(at, count)]);
                }
                Step::Flush => image.flush().unwrap(),
                Step::Reopen => {
                    drop(image);
                    image = place.open("top");
                }
            }
        }
        drop(image);
        let check = place.qemu_img("check top");
        prop_assert!(check.contains("No errors"), "{}", check);
        prop_assert!(place.content("top") == model);
    }

    /// Whatever is in a header: it is refused or checked, and nothing is read that is not there.
    #[test]
    fn no_header_is_too_strange(
        changes in prop::collection::vec((0..160usize, any::<u8>()), 0..12),
        cut in prop_oneof![4 => Just(usize::MAX), 1 => 0..300usize],
    ) {
        let mut bytes = made_image();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.truncate(cut);
        let length = bytes.len() as u64;
        if let Ok(header) = header::parse(&bytes) {
            let read = &mut |at: u64, part: &mut [u8]| {
                let from = usize::try_from(at).unwrap();
                part.copy_from_slice(bytes.get(from..from + part.len()).expect("within the file"));
                Ok(())
            };
            let _ = header.check_tables(length, true, read);
        }
    }
}

#[test]
fn the_image_of_the_property_above_is_a_good_one() {
    let Some(place) = Place::new() else { return };
    std::fs::write(place.at("made"), made_image()).unwrap();
    assert!(place.qemu_img("check made").contains("No errors"));
    assert_eq!(place.open("made").sectors(), 64);
}

#[test]
fn a_damaged_image_is_refused_with_what_to_do() {
    let Some(place) = Place::new() else { return };
    let fresh = |name: &str| {
        place.qemu_img(&format!("create -q -f qcow2 {name} 8M"));
        let mut image = place.open(name);
        image.write(0, &[1; 4096]).unwrap();
        image.flush().unwrap();
    };
    let u32s = |value: u32| value.to_be_bytes().to_vec();
    let u64s = |value: u64| value.to_be_bytes().to_vec();
    let bit = |bit: u32| u64s(1 << bit);
    fresh("whole");
    let whole = std::fs::read(place.at("whole")).unwrap();
    let place_of = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().unwrap());
    let (l1, refcounts) = (place_of(40), place_of(48));
    let block = place_of(refcounts as usize);
    for (offset, bytes, said) in [
        (0, b"NOPE".to_vec(), "not a qcow2 image"),
        (4, u32s(4), "version 4"),
        (20, u32s(8), "header is damaged"),
        (20, u32s(40), "header is damaged"),
        (24, u64s(0), "size of 0"),
        (24, u64s(8 * MIB + 1), "not whole sectors"),
        (24, u64s(1 << 40), "L1 table is too small"),
        (32, u32s(1), "encrypted"),
        (36, u32s(0), "L1 table is too small"),
        (36, u32s(u32::MAX), "larger than any"),
        (40, u64s(1 << 40), "L1 table is not within the file"),
        (40, u64s(l1 + 512), "L1 table is not within the file"),
        (
            48,
            u64s(u64::MAX - 65535),
            "refcount table is not within the file",
        ),
        (56, u32s(0), "refcount table has no size"),
        (56, u32s(u32::MAX), "refcount table has no size"),
        (72, bit(0), "qemu-img check -r all"),
        (72, bit(1), "marked as corrupt"),
        (72, bit(2), "in another file"),
        (72, bit(3), "compression that is not zlib's"),
        (72, bit(4), "extended L2 entries"),
        (72, bit(40), "bit 40"),
        (96, u32s(7), "reference counts have no size"),
        (100, u32s(8), "length is not possible"),
        (100, u32s(u32::MAX), "length is not possible"),
        (l1, u64s(1 << 50), "L2 table is not within the file"),
        (refcounts, u64s(1 << 50), "refcount block is not within the file"),
        (
            refcounts,
            u64s(0),
            "header is at a place that its reference counts call free",
        ),
        (
            block,
            vec![0, 0],
            "header is at a place that its reference counts call free",
        ),
        (block, vec![0; 32], "call free; `qemu-img check -r all`"),
    ] {
        std::fs::write(place.at("damaged"), &whole).unwrap();
        place.patch("damaged", offset, &bytes);
        let text = place.refused("damaged");
        assert!(text.contains(said), "{offset} {bytes:?}: {text}");
        assert!(
            text.contains('`') || text.contains("without that") || text.contains("copy"),
            "no remedy: {text}"
        );
    }
    for (bytes, said) in [
        (3, "not a qcow2 image"),
        (40, "header is not within"),
        (80, "header is not within"),
        (l1, "L1 table is not within"),
        (block + 100, "is not within"),
    ] {
        std::fs::write(place.at("cut"), &whole[..bytes as usize]).unwrap();
        let text = place.refused("cut");
        assert!(text.contains(said), "{bytes}: {text}");
    }
    // Read-only, counts do not matter.
    std::fs::write(place.at("damaged"), &whole).unwrap();
    place.patch("damaged", block, &[0; 32]);
    let config = DiskConfig {
        read_only: true,
        ..place.config("damaged")
    };
    let mut bytes = [0; 512];
    try_open(&config).unwrap().read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 512]);
}

#[test]
fn what_is_behind_an_image_is_named_when_it_cannot_be_used() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 a 1M");
    place.qemu_img("create -q -f qcow2 -F qcow2 -b a b 1M");
    place.qemu_img("rebase -u -F qcow2 -b b a");
    assert!(place.refused("b").contains("it is behind itself"));
    assert!(place.refused("a").contains("it is behind itself"));
    place.qemu_img("rebase -u -F qcow2 -b a a");
    assert!(place.refused("a").contains("it is behind itself"));
    for (words, said) in [
        ("-F raw -b missing", "missing: it cannot be opened for reading"),
        ("-F vmdk -b b", "format 'vmdk'"),
        ("-F raw -b nbd://host/disk", "not a path to a file"),
        ("-F raw -b json:{\"driver\":\"null-co\"}", "not a path to a file"),
        ("-F raw -b /dev/null", "/dev/null: it is neither"),
    ] {
        place.qemu_img(&format!("rebase -u {words} a"));
        let text = place.refused("a");
        assert!(text.contains(said), "{words}: {text}");
    }
    // Made by a QEMU that did not insist on a format: the extension's type becomes one that nobody knows.
    place.qemu_img("rebase -u -F raw -b missing a");
    let header = std::fs::read(place.at("a")).unwrap();
    let at = header
        .windows(4)
        .position(|four| four == 0xe279_2acau32.to_be_bytes())
        .unwrap();
    place.patch("a", at as u64, &[1, 2, 3, 4]);
    assert!(place.refused("a").contains("does not say which format"));
    // More than there may be.
    place.qemu_img("create -q -f raw 0 1M");
    for number in 1..=MAX_BACKING_FILES + 2 {
        let format = if number == 1 { "raw" } else { "qcow2" };
        place.qemu_img(&format!(
            "create -q -f qcow2 -F {format} -b {} {number} 1M",
            number - 1
        ));
    }
    assert!(
        place
            .refused(&(MAX_BACKING_FILES + 1).to_string())
            .contains("more than 16 files")
    );
    drop(place.open(&MAX_BACKING_FILES.to_string()));
}

#[test]
fn a_chain_is_locked_against_writers() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 base 1M");
    place.qemu_img("create -q -f qcow2 -F qcow2 -b base one 1M");
    place.qemu_img("create -q -f qcow2 -F qcow2 -b base two 1M");
    let one = place.open("one");
    // Two machines on one backing file, and neither on the other's disk or on the backing file itself.
    let two = place.open("two");
    assert!(place.locked("one").contains("another program uses it;"));
    assert!(place.locked("base").contains("another program uses it;"));
    let (status, text) = place.try_qemu_img("check one");
    assert!(status != 0 && text.contains("lock"), "{text}");
    drop((one, two));
    let writer = place.open("base");
    let text = place.locked("one");
    assert!(
        text.contains("behind it,") && text.contains("uses it for writing"),
        "{text}"
    );
    drop(writer);
    drop(place.open("one"));
}

#[test]
fn a_killed_program_leaves_nothing_worse_than_leaked_clusters() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 disk 64M");
    let mut image = place.open("disk");
    image.write(0, &vec![1; 100_000]).unwrap();
    image.flush().unwrap();
    image.write(10 * MIB, &vec![2; 3 << 20]).unwrap();
    image.write_zeroes(0, 65536, true).unwrap();
    // The tables in memory are gone with the program, and its lock.
    let layer = image.image.take().unwrap();
    image.read_only = true;
    drop(image);
    std::mem::forget(layer);
    std::fs::copy(place.at("disk"), place.at("after")).unwrap();
    let (status, text) = place.try_qemu_img("check after");
    // 3: leaks, and nothing else.
    assert!(status == 0 || status == 3, "{status}: {text}");
    let mut bytes = vec![0; 4096];
    let mut image = place.open("after");
    image.read(65536, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 4096], "was flushed");
}

#[test]
fn clusters_of_a_snapshot_are_not_written() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 disk 4M");
    let mut image = place.open("disk");
    image.write(0, &vec![1; 2 << 20]).unwrap();
    drop(image);
    place.qemu_img("snapshot -c before disk");
    let mut image = place.open("disk");
    image.write(65536, &vec![2; 1 << 20]).unwrap();
    image.write_zeroes(3 * 65536, 65536, true).unwrap();
    image.discard(0, 65536).unwrap();
    drop(image);
    assert!(place.qemu_img("check disk").contains("No errors"));
    place.qemu_img("snapshot -a before disk");
    let content = place.content("disk");
    assert!(content[..2 << 20] == vec![1; 2 << 20] && content[2 << 20..] == vec![0; 2 << 20]);
}

#[test]
fn what_a_table_names_behind_the_end_is_an_error_and_not_zeroes() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 disk 4M");
    let mut image = place.open("disk");
    image.write(0, &[1; 512]).unwrap();
    image.write(65536, &[1; 65536]).unwrap();
    drop(image);
    let file = File::options().write(true).open(place.at("disk")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 65536).unwrap();
    let mut image = place.open("disk");
    let mut bytes = [0; 512];
    image.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 512]);
    let error = image.read(65536, &mut bytes).unwrap_err().to_string();
    assert!(error.contains("behind its end"), "{error}");
}

const HEADER: u64 = 0x5000;
const STATUS: u64 = 0x5100;
const DATA: u64 = 0x8000;

fn request(rig: &mut Rig, kind: u32, sector: u64, data: &[crate::virtio::testing::Buffer]) -> u8 {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    rig.write(HEADER, &header);
    rig.write(STATUS, &[0xee]);
    let buffers = [&[R(HEADER, 16)], data, &[W(STATUS, 1)]].concat();
    assert!(matches!(rig.request(&buffers), Outcome::Used(_)));
    rig.read(STATUS, 1)[0]
}

#[test]
fn a_full_host_is_an_io_error_and_the_image_stays_good() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 disk 64M");
    let (image, fault) = place.open_faulty("disk");
    let (log, lines) = kept_log();
    let mut rig = Rig::new(Box::new(Block::new(Disk::Qcow2(Box::new(image)), "", log)));
    rig.write(DATA, &[7; 4096]);
    assert_eq!(request(&mut rig, spec::VIRTIO_BLK_T_OUT, 0, &[R(DATA, 4096)]), 0);
    fault.set(Fault::FULL);
    for sector in 0..20 {
        let status = request(
            &mut rig,
            spec::VIRTIO_BLK_T_OUT,
            1000 + 1000 * sector,
            &[R(DATA, 4096)],
        );
        assert_eq!(status, spec::VIRTIO_BLK_S_IOERR as u8);
    }
    assert_eq!(
        request(&mut rig, spec::VIRTIO_BLK_T_FLUSH, 0, &[]),
        spec::VIRTIO_BLK_S_IOERR as u8
    );
    let said: Vec<String> = lines.try_iter().collect();
    assert!((1..10).contains(&said.len()), "{said:?}");
    assert!(
        said[0].contains("No space left on device") && said[0].contains("make room"),
        "{said:?}"
    );
    // Room was made: nothing is lost, and a flush is one.
    fault.set(Fault::NONE);
    assert_eq!(
        request(&mut rig, spec::VIRTIO_BLK_T_OUT, 5000, &[R(DATA, 4096)]),
        0
    );
    assert_eq!(request(&mut rig, spec::VIRTIO_BLK_T_FLUSH, 0, &[]), 0);
    drop(rig);
    // 3: clusters that were taken when there was no room are leaked, and nothing else is wrong.
    let (status, text) = place.try_qemu_img("check disk");
    assert!(status == 0 || status == 3, "{status}: {text}");
    let content = place.content("disk");
    assert!(content[..4096] == [7; 4096] && content[5000 * 512..5000 * 512 + 4096] == [7; 4096]);
}

#[test]
fn a_panic_of_the_library_ends_the_image_and_not_the_queue() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 disk 64M");
    let (image, fault) = place.open_faulty("disk");
    let (log, lines) = kept_log();
    let mut rig = Rig::new(Box::new(Block::new(Disk::Qcow2(Box::new(image)), "", log)));
    rig.write(DATA, &[7; 4096]);
    assert_eq!(request(&mut rig, spec::VIRTIO_BLK_T_OUT, 0, &[R(DATA, 4096)]), 0);
    assert_eq!(request(&mut rig, spec::VIRTIO_BLK_T_FLUSH, 0, &[]), 0);
    fault.set(Fault::PANIC);
    let status = request(&mut rig, spec::VIRTIO_BLK_T_OUT, 1000, &[R(DATA, 4096)]);
    assert_eq!(status, spec::VIRTIO_BLK_S_IOERR as u8);
    let said = lines.recv().unwrap();
    assert!(
        said.contains("the qcow2 library has failed") && said.contains("disk"),
        "{said}"
    );
    fault.set(Fault::NONE);
    let (read, flush) = (spec::VIRTIO_BLK_T_IN, spec::VIRTIO_BLK_T_FLUSH);
    assert_eq!(
        request(&mut rig, read, 0, &[W(DATA, 512)]),
        spec::VIRTIO_BLK_S_IOERR as u8
    );
    assert_eq!(request(&mut rig, flush, 0, &[]), spec::VIRTIO_BLK_S_IOERR as u8);
    // The queue still answers, and what was flushed is there.
    assert_eq!(request(&mut rig, spec::VIRTIO_BLK_T_GET_ID, 0, &[W(DATA, 20)]), 0);
    drop(rig);
    std::fs::copy(place.at("disk"), place.at("after")).unwrap();
    let (status, text) = place.try_qemu_img("check after");
    assert!(status == 0 || status == 3, "{status}: {text}");
    assert!(place.content("after")[..4096] == [7; 4096]);
}

#[test]
fn a_reset_writes_the_tables() {
    let Some(place) = Place::new() else { return };
    place.qemu_img("create -q -f qcow2 disk 4M");
    let mut disk = Disk::open(&place.config("disk")).unwrap().remove(0);
    disk.write(MIB, &[9; 512]).unwrap();
    let (log, _lines) = kept_log();
    let mut block = Block::new(disk, "", log);
    block.stopped();
    // As it is now, while the machine goes on.
    std::fs::copy(place.at("disk"), place.at("now")).unwrap();
    assert!(place.qemu_img("check now").contains("No errors"));
    assert!(place.content("now")[MIB as usize..][..512] == [9; 512]);
}
