//! The balloon's queues, with guest memory whose pages are counted on the host's side.

use super::queues::{Deflate, Inflate, MOST_PAGES, Other};
use super::state::Giver;
use super::testing::{balloon, inflate, quiet};
use super::{BalloonConfig, PAGE_BYTES, REPORTING, STATS, open};
use crate::virtio::registers::Published;
use crate::virtio::testing::{Buffer, LIMIT, MEMORY_BYTES, Outcome, R, Rig, W};
use slog::{Logger, o};
use std::time::{Duration, Instant};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Pages of guest memory that the host has given. [mincore(2)]
fn resident(rig: &Rig) -> usize {
    let region = rig.memory.iter().next().unwrap();
    let mut pages = vec![0u8; (region.len() / PAGE_BYTES) as usize];
    // SAFETY: the range is the region's, and there is a byte for each of its pages.
    let result = unsafe { libc::mincore(region.as_ptr().cast(), region.len() as usize, pages.as_mut_ptr()) };
    assert_eq!(result, 0);
    pages.iter().filter(|page| **page & 1 != 0).count()
}

/// Fills memory behind the rings, and touches what a request is made of.
fn fill(rig: &Rig) {
    rig.write(0, &[0; 16]);
    rig.write(0x5000, &[0; 16]);
    rig.write(0x10_000, &vec![7; (MEMORY_BYTES - 0x10_000) as usize]);
}

/// Gives pages by their numbers.
fn give(rig: &mut Rig, pages: &[u32]) -> Outcome {
    let list: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    rig.write(0x5000, &list);
    rig.request(&[R(0x5000, list.len() as u32)])
}

#[test]
fn what_is_inflated_is_the_hosts_again_and_reads_zeroes() {
    let balloon = balloon();
    let mut rig = Rig::new(Box::new(inflate(&balloon)));
    fill(&rig);
    let before = resident(&rig);
    // Up, down, twice, and one by itself.
    let mut pages: Vec<u32> = (0x20..0x40).chain((0x80..0x90).rev()).collect();
    pages.extend([0x85, 0x60]);
    assert_eq!(give(&mut rig, &pages), Outcome::Used(0));
    assert_eq!(before - resident(&rig), 49);
    assert_eq!(balloon.given_bytes(Giver::Inflate), 49 * PAGE_BYTES);
    assert_eq!(rig.read(0x20_000 - 1, 3), [7, 0, 0]);
    assert_eq!(rig.read(0x3f_fff, 2), [0, 7]);
    assert_eq!(rig.read(0x60_000 - 1, 4097), [&[7][..], &[0; 4096]].concat());
    assert_eq!(rig.read(0x61_000, 1), [7]);
    // Deflated pages are simply used again.
    rig.write(0x20_000, &[9]);
    assert_eq!(rig.read(0x20_000, 2), [9, 0]);
    let mut deflate = Rig::new(Box::new(Deflate));
    assert_eq!(give(&mut deflate, &[0x20, 0x21]), Outcome::Used(0));
}

#[test]
fn pages_that_are_none_are_nothing() {
    let balloon = balloon();
    let mut rig = Rig::new(Box::new(inflate(&balloon)));
    fill(&rig);
    let before = rig.read(0x10_000, (MEMORY_BYTES - 0x10_000) as usize);
    let last = (MEMORY_BYTES / PAGE_BYTES) as u32;
    assert_eq!(
        give(&mut rig, &[last, last + 1, u32::MAX - 1, u32::MAX]),
        Outcome::Used(0)
    );
    assert_eq!(rig.request(&[R(0x5000, 3)]), Outcome::Used(0), "not one number");
    assert!(rig.read(0x10_000, before.len()) == before);
    assert_eq!(balloon.given_bytes(Giver::Inflate), 0);
    // The last page is one.
    assert_eq!(give(&mut rig, &[last - 1, last]), Outcome::Used(0));
    assert_eq!(rig.read(MEMORY_BYTES - PAGE_BYTES - 1, 2), [7, 0]);
    // Longer than any list.
    rig.start();
    assert_eq!(
        rig.request(&[R(0x10_000, 4 * MOST_PAGES as u32 + 4)]),
        Outcome::Broken
    );
    rig.start();
    assert_eq!(rig.request(&[R(1 << 40, 16)]), Outcome::Broken);
}

#[test]
fn what_is_inflated_after_a_reset_is_left_alone() {
    let balloon = balloon();
    let mut rig = Rig::new(Box::new(inflate(&balloon)));
    fill(&rig);
    let list: Vec<u8> = (0x20..0xf0u32).flat_map(u32::to_le_bytes).collect();
    for _ in 0..200 {
        rig.write(0x5000, &list);
        rig.provide(&[R(0x5000, list.len() as u32)]);
        // Anywhere between not begun and done. From here on the memory is the driver's.
        rig.remote.stop();
        fill(&rig);
        let bytes = rig.read(0x10_000, (MEMORY_BYTES - 0x10_000) as usize);
        assert!(
            bytes.iter().all(|byte| *byte == 7),
            "memory was emptied after the reset"
        );
        rig.start();
    }
    assert_eq!(give(&mut rig, &[0x20]), Outcome::Used(0));
}

#[test]
fn reported_pages_are_given_whole() {
    let balloon = balloon();
    let other = Other::new(false, balloon.clone(), None, quiet()).unwrap();
    let mut rig = Rig::new(Box::new(other));
    rig.features = REPORTING;
    rig.start();
    fill(&rig);
    let buffers: [Buffer; 3] = [
        W(0x20_000, 0x8000),
        W(0x40_800, 0x1800),
        W(MEMORY_BYTES - 0x1000, 0x4000),
    ];
    assert_eq!(rig.request(&buffers), Outcome::Used(0));
    assert_eq!(balloon.given_bytes(Giver::Report), 0x8000 + 0x1000 + 0x1000);
    assert_eq!(rig.read(0x1f_fff, 2), [7, 0]);
    assert_eq!(rig.read(0x27_fff, 2), [0, 7]);
    assert_eq!(rig.read(0x40_fff, 2), [7, 0]);
    assert_eq!(rig.read(0x41_fff, 2), [0, 7]);
    // The same queue of a driver that wants figures too is another one's.
    rig.features = REPORTING | STATS;
    rig.start();
    assert_eq!(rig.request(&[W(0x50_000, 0x1000)]), Outcome::Used(0));
    assert_eq!(rig.read(0x50_000, 1), [7]);
}

#[test]
fn figures_are_asked_for_now_and_then() {
    let balloon = balloon();
    let every = Duration::from_millis(20);
    let other = Other::new(false, balloon.clone(), Some(every), quiet()).unwrap();
    let mut rig = Rig::new(Box::new(other));
    rig.features = REPORTING | STATS;
    rig.start();
    let figures = |value: u64| {
        let one = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        [one(4, value), one(5, 1 << 20), one(77, 1), vec![1, 2, 3]].concat()
    };
    let begin = Instant::now();
    for round in 1..=5 {
        let list = figures(round);
        rig.write(0x5000, &list);
        // The first at once, each later one when it is asked for.
        assert_eq!(rig.request(&[R(0x5000, list.len() as u32)]), Outcome::Used(0));
        let told: Vec<_> = balloon.figures().collect();
        assert_eq!(told, [("free_bytes", round), ("total_bytes", 1 << 20)]);
    }
    assert!(begin.elapsed() >= every * 3, "not asked in time, but at once");
    assert!(begin.elapsed() < LIMIT);
}

#[test]
fn a_driver_hears_of_another_size() {
    let balloon = balloon();
    let target = Published::wide(0, 0);
    let handler = Inflate::new(balloon.clone(), target.clone(), quiet());
    let mut rig = Rig::new(Box::new(handler));
    let bell = rig.remote.bell().try_clone().unwrap();
    let switch = balloon.switch(bell, MEMORY_BYTES);
    switch.set(64 << 10).unwrap();
    rig.reconfigured();
    assert_eq!(target.value(), 16);
    switch.set(0).unwrap();
    rig.reconfigured();
    assert_eq!(target.value(), 0);
}

#[test]
fn what_a_driver_is_told_of_the_device() {
    let log = Logger::root(slog::Discard, o!());
    let size_bytes = 8 << 20;
    for (stats, queues, features) in [(None, 3, 0x24), (Some(Duration::from_secs(1)), 4, 0x26)] {
        let opened = open(&BalloonConfig { size_bytes, stats }, &log).unwrap();
        assert_eq!((opened.handlers.len(), opened.identity.queues), (queues, queues));
        assert_eq!(
            (opened.identity.device_type, opened.identity.features),
            (5, features)
        );
        assert_eq!(opened.identity.published.unwrap().value(), 2048);
        assert_eq!(
            (opened.balloon.wanted_bytes(), opened.balloon.actual_bytes()),
            (size_bytes, 0)
        );
    }
}

#[test]
fn a_report_at_the_end_of_all_addresses_empties_nothing() {
    let balloon = balloon();
    let mut rig = Rig::new(Box::new(
        Other::new(false, balloon.clone(), None, quiet()).unwrap(),
    ));
    rig.features = REPORTING;
    rig.start();
    fill(&rig);
    let before = rig.read(0x10_000, (MEMORY_BYTES - 0x10_000) as usize);
    for (address, bytes) in [
        (u64::MAX - 10, 5),
        (u64::MAX, 0),
        (u64::MAX - 4095, 4095),
        (u64::MAX - 4096, u32::MAX),
    ] {
        let outcome = rig.request(&[W(address, bytes)]);
        assert_eq!(outcome, Outcome::Used(0), "{address:#x}");
    }
    assert_eq!(balloon.given_bytes(Giver::Report), 0);
    let after = rig.read(0x10_000, (MEMORY_BYTES - 0x10_000) as usize);
    assert!(before == after);
}
