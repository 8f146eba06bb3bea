//! Loom models of actors: every interleaving of a few steps, and every value that the memory model lets a load return.
//!
//! `RUSTFLAGS='--cfg loom' cargo test --release --lib loom_`. A lost wake-up shows as a deadlock, two holders of
//! one token as concurrent access to a cell, a lost or doubled message as a wrong sum.

use super::port::Address;
use super::*;
use loom::thread;

/// Adds what it is sent and answers with the sum so far.
struct Adder {
    sum: u64,
    turns: u64,
}

impl Actor for Adder {
    type Message = u64;
    type Reply = (u64, u64);
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, message: u64) -> (u64, u64) {
        self.turns += 1;
        self.sum += message;
        (self.sum, self.turns)
    }
}

fn adder(lanes: usize) -> Address<Adder> {
    Address::spawn(
        Adder { sum: 0, turns: 0 },
        "adder",
        Placement::Handoff,
        lanes,
        |_| {},
    )
    .expect("no thread is started")
    .address
}

/// The same with senders that look more often than once before they do something else.
fn explore_looking(looks: u32, preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    super::park::LOOKS.set(looks);
    explore(preemptions, model);
    super::park::LOOKS.set(0);
}

/// The same with senders that keep the token after their first turn alone.
fn explore_keeping(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    super::keep::KEEP_AFTER.set(1);
    // Or it would not be alone again for long.
    super::port::FORGET.set(0);
    explore(preemptions, model);
    super::port::FORGET.set(16);
    super::keep::KEEP_AFTER.set(u32::MAX);
}

fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
pub(super) fn loom_two_asks_are_two_turns() {
    explore(3, || {
        let address = adder(2);
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        let other = thread::spawn(move || b.ask(2).unwrap());
        let (mine, _) = a.ask(1).unwrap();
        let (theirs, _) = other.join().unwrap();
        assert!(
            [(1, 3), (3, 2)].contains(&(mine, theirs)),
            "sums {mine} and {theirs}"
        );
    });
}

#[test]
pub(super) fn loom_three_asks_with_hand_over() {
    // COMBINE is 1 under loom: the second envelope that a holder meets makes it look for a spinning asker.
    explore(2, || {
        let address = adder(3);
        let mut ports: Vec<_> = (0..3).map(|_| address.connect().unwrap()).collect();
        let others: Vec<_> = ports
            .drain(1..)
            .map(|mut port| thread::spawn(move || port.ask(1).unwrap().0))
            .collect();
        let mut sums = vec![ports[0].ask(1).unwrap().0];
        sums.extend(others.into_iter().map(|other| other.join().unwrap()));
        sums.sort_unstable();
        assert_eq!(sums, [1, 2, 3]);
    });
}

#[test]
pub(super) fn loom_friends_are_served_once_each() {
    // Of two that ask twice, one may serve the other in the first round, and so look into its lane unasked in the
    // second, while the other looks for the reply before it registers, and registers in the midst of being served.
    explore(3, || {
        let address = adder(2);
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        let other = thread::spawn(move || {
            let first = b.ask(10).unwrap().0;
            (first, b.ask(100).unwrap().0)
        });
        let first = a.ask(1).unwrap().0;
        let mine = (first, a.ask(1).unwrap().0);
        let theirs = other.join().unwrap();
        assert!(mine.0 % 10 == 1 && mine.1 % 10 == 2, "{mine:?}");
        assert!(theirs.0 >= 10 && theirs.1 >= 110, "{theirs:?}");
        assert_eq!(mine.1.max(theirs.1), 112);
    });
}

#[test]
pub(super) fn loom_a_friend_meets_the_end() {
    // The actor panics in a turn that its holder does for a friend, or for itself while the friend is not registered.
    explore(3, || {
        let address = Address::spawn(Mortal, "mortal", Placement::Handoff, 2, |_| {})
            .expect("no thread is started")
            .address;
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        let other = thread::spawn(move || {
            let _ = b.ask(false);
            b.ask(true)
        });
        let _ = a.ask(false);
        let _ = a.ask(false);
        assert_eq!(other.join().unwrap(), Err(Closed));
        assert!(address.is_closed());
        assert_eq!(a.ask(false), Err(Closed));
    });
}

#[test]
pub(super) fn loom_a_message_ends_the_actor() {
    // Wherever it is handled, whoever asked hears of it and gets its call back.
    explore(3, || {
        let address = Address::spawn(Mortal, "mortal", Placement::Handoff, 2, |_| {})
            .expect("no thread is started")
            .address;
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        let other = thread::spawn(move || b.ask(true));
        let _ = a.ask(false);
        assert_eq!(other.join().unwrap(), Err(Closed));
        assert!(address.is_closed());
    });
}

/// Panics when told to.
struct Mortal;

impl Actor for Mortal {
    type Message = bool;
    type Reply = ();
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, panic: bool) {
        if panic {
            // Without the hook, which would tell of every one of many.
            std::panic::resume_unwind(Box::new("told to"));
        }
    }
}

#[test]
pub(super) fn loom_what_a_holder_hands_over_is_served() {
    // A holder whose budget is used up by one post, while another post and an ask are left, gives the token to the asker,
    // and the post's bit with it: if it did not, the post would lie in its lane for ever.
    explore(2, || {
        let address = adder(4);
        let mut ports: Vec<_> = (0..4).map(|_| address.connect().unwrap()).collect();
        let (mut holder, mut asker) = (ports.pop().unwrap(), ports.pop().unwrap());
        let mut threads: Vec<_> = ports
            .into_iter()
            .map(|mut port| thread::spawn(move || port.post(10).unwrap()))
            .collect();
        threads.push(thread::spawn(move || assert!(asker.ask(100).unwrap().0 >= 100)));
        holder.ask(1).unwrap();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        // Nobody holds the token now, so nothing may be left in any lane.
        assert_eq!(holder.ask(0).unwrap().0, 121);
    });
}

/// Shows outside what it has handled, with no ordering of its own.
struct Shows(std::sync::Arc<loom::sync::atomic::AtomicBool>);

impl Actor for Shows {
    type Message = bool;
    type Reply = ();
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, show: bool) {
        if show {
            self.0.store(true, loom::sync::atomic::Ordering::Relaxed);
        }
    }
}

#[test]
pub(super) fn loom_a_fence_comes_after_the_turn_and_not_after_the_taking() {
    explore(3, || {
        let shown = std::sync::Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let address = Address::spawn(Shows(shown.clone()), "shows", Placement::Handoff, 2, |_| {})
            .expect("no thread is started")
            .address;
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        // May hold the token, and so run the other's post.
        let other = thread::spawn(move || b.ask(false).unwrap());
        a.post(true).unwrap();
        a.fence().unwrap();
        assert!(shown.load(loom::sync::atomic::Ordering::Relaxed));
        other.join().unwrap();
    });
}

#[test]
pub(super) fn loom_posts_keep_their_order_and_none_is_lost() {
    explore(3, || {
        let address = adder(2);
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        let other = thread::spawn(move || {
            // One more than there are credits under loom.
            b.post(10).unwrap();
            b.post(100).unwrap();
            // An ask comes after one's own posts.
            assert!(b.ask(0).unwrap().0 >= 110);
        });
        a.post(1).unwrap();
        a.fence().unwrap();
        assert!(a.ask(0).unwrap().0 & 1 == 1);
        other.join().unwrap();
        assert_eq!(a.ask(0).unwrap().0, 111);
    });
}

#[test]
pub(super) fn loom_resident_sleeps_and_is_woken() {
    explore(3, || {
        let (address, reside) = Address::resident_for_model(Adder { sum: 0, turns: 0 }, 2);
        let resident = thread::spawn(reside);
        let mut port = address.connect().unwrap();
        port.post(1).unwrap();
        assert_eq!(port.ask(2).unwrap(), (3, 2));
        port.stop();
        resident.join().unwrap();
        assert_eq!(port.ask(1), Err(Closed));
    });
}

#[test]
pub(super) fn loom_resident_with_two_senders() {
    explore(2, || {
        let (address, reside) = Address::resident_for_model(Adder { sum: 0, turns: 0 }, 2);
        let resident = thread::spawn(reside);
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        let other = thread::spawn(move || b.ask(1).unwrap().0);
        let mine = a.ask(1).unwrap().0;
        assert_eq!(mine + other.join().unwrap(), 3);
        a.stop();
        resident.join().unwrap();
    });
}

#[test]
pub(super) fn loom_close_answers_everybody() {
    explore(3, || {
        let address = adder(2);
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        // Handled before the end, or refused: never left waiting.
        let other = thread::spawn(move || match b.ask(1) {
            Ok((sum, turns)) => assert_eq!((sum, turns), (1, 1)),
            Err(Closed) => {}
        });
        a.stop();
        assert!(address.is_closed());
        assert_eq!(a.ask(1), Err(Closed));
        other.join().unwrap();
    });
}

#[test]
pub(super) fn loom_a_lane_is_used_again() {
    explore(3, || {
        let address = adder(2);
        let mut first = address.connect().unwrap();
        let mut holder = address.connect().unwrap();
        // Holds the token at times, so the posts below lie in the lane when it changes hands.
        let other = thread::spawn(move || {
            holder.ask(100).unwrap();
            holder
        });
        let before = thread::spawn(move || {
            first.post(1).unwrap();
            first.post(2).unwrap();
        });
        let mut second = loop {
            match address.connect() {
                Some(port) => break port,
                None => thread::yield_now(),
            }
        };
        second.post(10).unwrap();
        let sum = second.ask(20).unwrap().0;
        assert!(sum >= 33 && sum % 100 == 33 % 100, "{sum}");
        before.join().unwrap();
        other.join().unwrap();
    });
}

#[test]
pub(super) fn loom_who_is_told_closed_was_not_handled() {
    // The bit of a post can have the ask behind it served before the asker has registered, and then the actor ends.
    explore(3, || {
        let shown = std::sync::Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let address = Address::spawn(Shows(shown.clone()), "shows", Placement::Handoff, 2, |_| {})
            .expect("no thread is started")
            .address;
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        let other = thread::spawn(move || {
            if b.post(false).is_ok() && b.ask(true).is_err() {
                assert!(
                    !shown.load(loom::sync::atomic::Ordering::Relaxed),
                    "it was handled"
                );
            }
        });
        let _ = a.ask(false);
        a.stop();
        other.join().unwrap();
    });
}

#[test]
pub(super) fn loom_lanes_that_share_a_bit() {
    // A holder that was called for by one lane looks into the other too, whose sender is anywhere in between.
    explore(3, || {
        let address = adder(4);
        let mut ports: Vec<_> = (0..4).map(|_| address.connect().unwrap()).collect();
        let (mut last, mut first) = (ports.pop().unwrap(), ports.swap_remove(0));
        let other = thread::spawn(move || {
            last.post(1).unwrap();
            last.ask(2).unwrap().0
        });
        first.post(10).unwrap();
        assert!(first.ask(20).unwrap().0 >= 30);
        assert_eq!(other.join().unwrap() % 10, 3);
        assert_eq!(first.ask(0).unwrap().0, 33);
    });
}

#[test]
pub(super) fn loom_posts_in_lanes_that_share_a_bit() {
    // The same with posts, one of which is called for and one not yet, while a third sender holds the token.
    explore(2, || {
        let address = adder(4);
        let mut ports: Vec<_> = (0..4).map(|_| address.connect().unwrap()).collect();
        let (mut last, mut first) = (ports.pop().unwrap(), ports.swap_remove(0));
        let mut holder = ports.pop().unwrap();
        let others = [
            thread::spawn(move || first.post(1).unwrap()),
            thread::spawn(move || last.post(10).unwrap()),
        ];
        holder.ask(100).unwrap();
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(holder.ask(0).unwrap().0, 111);
    });
}

#[test]
pub(super) fn loom_a_friend_that_has_gone_is_not_waited_for() {
    // Who was served by another once leaves its next ask where that one would look, but it may never look again.
    explore_looking(1, 3, || {
        let address = adder(2);
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        let other = thread::spawn(move || {
            b.ask(10).unwrap();
            b.ask(100).unwrap().0
        });
        a.ask(1).unwrap();
        assert!(other.join().unwrap() >= 110);
    });
}

#[test]
pub(super) fn loom_a_pool_serves_everybody() {
    explore(2, || {
        let (pool, work) = Pool::for_model();
        let worker = thread::spawn(work);
        let address = Address::spawn(
            Adder { sum: 0, turns: 0 },
            "adder",
            Placement::Pool(pool),
            2,
            |_| {},
        )
        .expect("no thread is started")
        .address;
        let (mut a, mut b) = (address.connect().unwrap(), address.connect().unwrap());
        let other = thread::spawn(move || {
            b.post(10).unwrap();
            b.ask(0).unwrap().0
        });
        let mine = a.ask(1).unwrap().0;
        let theirs = other.join().unwrap();
        assert!(mine % 10 == 1 && theirs >= 10, "{mine} and {theirs}");
        assert_eq!(a.ask(0).unwrap().0, 11);
        drop((a, address));
        worker.join().unwrap();
    });
}

#[test]
pub(super) fn loom_a_keeper_and_who_comes() {
    // The keeper is before, in, between or after its turns when the other comes, and may keep the token again.
    explore_keeping(3, || {
        let address = adder(2);
        let (mut keeper, mut other) = (address.connect().unwrap(), address.connect().unwrap());
        assert_eq!(keeper.ask(1).unwrap(), (1, 1));
        let other = thread::spawn(move || other.ask(10).unwrap().0);
        let mine = [keeper.ask(1).unwrap().0, keeper.ask(1).unwrap().0];
        let theirs = other.join().unwrap();
        assert!((11..=13).contains(&theirs), "{theirs}");
        let expected = [2, 3].map(|sum| if sum + 10 > theirs { sum + 10 } else { sum });
        assert_eq!(mine, expected, "theirs was {theirs}");
        assert_eq!(keeper.ask(0).unwrap(), (13, 5));
    });
}

#[test]
pub(super) fn loom_a_keeper_that_is_away_keeps_nobody_waiting() {
    // It does nothing, and is gone in the end: whoever comes takes the token and keeps it in turn.
    explore_keeping(3, || {
        let address = adder(3);
        let mut keeper = address.connect().unwrap();
        assert_eq!(keeper.ask(1).unwrap(), (1, 1));
        let others: Vec<_> = (0..2)
            .map(|_| {
                let mut port = address.connect().unwrap();
                thread::spawn(move || {
                    port.post(10).unwrap();
                    port.fence().unwrap();
                })
            })
            .collect();
        others.into_iter().for_each(|other| other.join().unwrap());
        drop(keeper);
        // In the keeper's lane.
        assert_eq!(address.connect().unwrap().ask(0).unwrap().0, 21);
    });
}

/// A keeper asks so often more, while two others post.
fn a_keeper_and_two_who_post(asks: u64) {
    let address = adder(3);
    let mut keeper = address.connect().unwrap();
    keeper.ask(1).unwrap();
    let others: Vec<_> = (0..2)
        .map(|_| {
            let mut port = address.connect().unwrap();
            thread::spawn(move || port.post(10).unwrap())
        })
        .collect();
    for _ in 0..asks {
        keeper.ask(1).unwrap();
    }
    others.into_iter().for_each(|other| other.join().unwrap());
    // Whatever was posted is in nobody's lane any more: the last one to let go has seen it.
    assert_eq!(keeper.ask(0).unwrap().0, 21 + asks);
}

#[test]
pub(super) fn loom_a_kept_token_is_revoked_once() {
    // Two come at once, while the keeper is in a turn or not, and comes back or not.
    explore_keeping(2, || a_keeper_and_two_who_post(1));
}

#[test]
pub(super) fn loom_a_keeper_meets_the_end() {
    // The actor panics in a turn of its keeper, which somebody else is about to revoke; or the other way round.
    for theirs in [false, true] {
        explore_keeping(3, move || {
            let address = Address::spawn(Mortal, "mortal", Placement::Handoff, 2, |_| {})
                .expect("no thread is started")
                .address;
            let (mut keeper, mut other) = (address.connect().unwrap(), address.connect().unwrap());
            keeper.ask(false).unwrap();
            let other = thread::spawn(move || other.ask(theirs));
            let mine = keeper.ask(!theirs);
            let theirs_ended = other.join().unwrap();
            match theirs {
                true => assert_eq!(theirs_ended, Err(Closed)),
                false => assert_eq!(mine, Err(Closed)),
            }
            assert!(address.is_closed());
            assert_eq!(keeper.ask(false), Err(Closed));
        });
    }
}

#[test]
pub(super) fn loom_a_keeper_can_fence_and_stop() {
    explore_keeping(3, || {
        let address = adder(2);
        let (mut keeper, mut other) = (address.connect().unwrap(), address.connect().unwrap());
        keeper.post(1).unwrap();
        let other = thread::spawn(move || match other.ask(10) {
            Ok((sum, _)) => assert!((11..=12).contains(&sum), "{sum}"),
            Err(Closed) => {}
        });
        keeper.post(1).unwrap();
        keeper.fence().unwrap();
        keeper.stop();
        assert!(address.is_closed());
        other.join().unwrap();
    });
}

#[test]
pub(super) fn loom_who_revokes_knows_who_keeps() {
    // Of two that find the first keeper, one serves both, a third then keeps the token, and only now the other revokes.
    explore_keeping(3, || {
        let address = adder(4);
        let mut ports: Vec<_> = (0..4).map(|_| address.connect().unwrap()).collect();
        let (mut first, mut third) = (ports.pop().unwrap(), ports.pop().unwrap());
        first.ask(1).unwrap();
        let others: Vec<_> = ports
            .into_iter()
            .map(|mut port| thread::spawn(move || port.post(10).unwrap()))
            .collect();
        third.ask(100).unwrap();
        third.ask(100).unwrap();
        others.into_iter().for_each(|other| other.join().unwrap());
        assert_eq!(first.ask(0).unwrap().0, 221);
    });
}

#[test]
pub(super) fn loom_who_was_held_up_claims_no_later_keeping() {
    // One revokes, finds the keeper in no turn, and is held up. The keeper takes the token back by that, serves it, and keeps
    // the token again, in the same lane. Another revokes that, while the keeper is in a turn.
    explore_keeping(3, || a_keeper_and_two_who_post(4));
}

#[test]
pub(super) fn loom_nothing_goes_in_front_of_a_keepers_stop() {
    explore_keeping(3, || {
        let address = adder(2);
        let (mut keeper, mut other) = (address.connect().unwrap(), address.connect().unwrap());
        keeper.ask(1).unwrap();
        let other = thread::spawn(move || {
            let _ = other.post(10);
        });
        keeper.stop_later();
        assert_eq!(keeper.ask(1), Err(Closed));
        assert_eq!(keeper.post(1), Err(Closed));
        other.join().unwrap();
    });
}
