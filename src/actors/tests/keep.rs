//! A kept token, with the processor's own memory ordering and the host's membarrier.

use super::super::keep;
use super::super::mailbox::{HELD, KEPT};
use super::super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// Asks how often two turns were at once.
const TOGETHER: usize = usize::MAX;

/// Counts what each sender sends, without a locked instruction, which would do the fences' work for them.
struct Tally {
    of: [u64; 3],
    /// Set in a turn; relaxed, and not by an exchange.
    inside: Arc<AtomicU64>,
    together: u64,
}

impl Actor for Tally {
    type Message = usize;
    type Reply = u64;
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, sender: usize) -> u64 {
        if sender == TOGETHER {
            return self.together;
        }
        self.together += self.inside.load(Ordering::Relaxed);
        self.inside.store(1, Ordering::Relaxed);
        self.of[sender] += 1;
        self.inside.store(0, Ordering::Relaxed);
        self.of[sender]
    }
}

fn tally() -> Address<Tally> {
    let tally = Tally {
        of: [0; 3],
        inside: Arc::default(),
        together: 0,
    };
    Address::spawn(tally, "tally", Placement::Handoff, 3, |obituary| {
        panic!("{obituary:?}")
    })
    .unwrap()
    .address
}

fn is_kept(address: &Address<Tally>) -> bool {
    address.core().word.load(Ordering::Relaxed) & (HELD | KEPT) == HELD | KEPT
}

/// `false`: this host cannot, so there is nothing to test.
fn can_be_kept() -> bool {
    let can = keep::is_possible();
    if !can {
        assert!(
            cfg!(miri) || std::env::var_os("CI").is_none(),
            "CI has to have membarrier(2)"
        );
        println!("**** no membarrier here: SKIPPED ****");
    }
    can
}

#[test]
fn who_is_alone_for_long_keeps_the_token_until_somebody_comes() {
    if !can_be_kept() {
        return;
    }
    let address = tally();
    let (mut keeper, mut other) = (address.connect().unwrap(), address.connect().unwrap());
    for round in 1..=100 {
        for _ in 0..keep::keep_after() {
            assert!(!is_kept(&address));
            keeper.ask(0).unwrap();
        }
        assert!(is_kept(&address));
        assert!(!address.look().held, "kept is not held");
        keeper.post(0).unwrap();
        keeper.fence().unwrap();
        assert!(is_kept(&address), "a turn and a fence of its own change nothing");
        other.fence().unwrap();
        assert!(is_kept(&address), "nothing of the other's can be unhandled");
        assert_eq!(other.ask(1), Ok(round));
        assert!(!is_kept(&address));
        // It notices with its next message, and begins to count from there.
        keeper.ask(0).unwrap();
    }
}

#[test]
fn a_keeper_that_is_gone_leaves_the_token_to_the_next() {
    let address = tally();
    let keep = keep::keep_after() + 1;
    thread::scope(|scope| {
        let mut keeper = address.connect().unwrap();
        scope.spawn(move || (0..keep).for_each(|_| assert!(keeper.ask(0).is_ok())));
    });
    // In the lane that the keeper had, and in another.
    let (mut heir, mut other) = (address.connect().unwrap(), address.connect().unwrap());
    assert_eq!(other.ask(1), Ok(1));
    assert_eq!(heir.ask(0), Ok(u64::from(keep) + 1));
    heir.stop();
    assert_eq!(other.ask(1), Err(Closed));
}

#[test]
fn a_keeper_can_stop_what_it_keeps() {
    let address = tally();
    let mut keeper = address.connect().unwrap();
    for _ in 0..=keep::keep_after() {
        keeper.ask(0).unwrap();
    }
    keeper.stop();
    assert!(address.is_closed());
    assert_eq!(keeper.ask(0), Err(Closed));
}

#[test]
fn nobody_who_comes_to_a_kept_token_is_lost_or_meets_another() {
    /// How often somebody comes.
    const VISITS: u64 = if cfg!(miri) { 50 } else { 50_000 };
    let address = tally();
    let (mut keeper, mut visitor) = (address.connect().unwrap(), address.connect().unwrap());
    let done = AtomicU64::new(0);
    let (turns, found_kept) = thread::scope(|scope| {
        let keeping = scope.spawn(|| {
            let mut turns = 0;
            while done.load(Ordering::Relaxed) == 0 {
                turns += 1;
                assert_eq!(keeper.ask(0), Ok(turns));
            }
            turns
        });
        let mut random = 1_u64;
        let mut found_kept = 0;
        for visit in 1..=VISITS {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            for _ in 0..random >> 54 {
                std::hint::spin_loop();
            }
            found_kept += u64::from(is_kept(&address));
            match visit % 3 {
                0 => visitor.post(1).unwrap(),
                _ => assert_eq!(visitor.ask(1), Ok(visit)),
            }
        }
        done.store(1, Ordering::Relaxed);
        (keeping.join().unwrap(), found_kept)
    });
    visitor.fence().unwrap();
    assert_eq!(visitor.ask(2), Ok(1));
    assert_eq!(visitor.ask(0), Ok(turns + 1));
    assert_eq!(visitor.ask(1), Ok(VISITS + 1));
    assert_eq!(visitor.ask(TOGETHER), Ok(0), "two turns at once");
    if can_be_kept() {
        assert!(
            found_kept > VISITS / 100,
            "{found_kept} of {VISITS} found it kept"
        );
    }
}
