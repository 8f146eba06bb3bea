//! The contract of the runtime, under every placement.

mod faults;
mod keep;

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// Remembers who sent what, and panics or asks around when told to.
#[derive(Default)]
struct Recorder {
    last: Vec<u64>,
    turns: u64,
    busy: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Say {
    /// From sender, number: numbers of one sender must come in order.
    Number(usize, u64),
    Panic,
    Count,
}

impl Actor for Recorder {
    type Message = Say;
    type Reply = u64;
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, message: Say) -> u64 {
        assert!(!self.busy.swap(true, Ordering::AcqRel), "two turns at once");
        match message {
            Say::Number(sender, number) => {
                self.turns += 1;
                if self.last.len() <= sender {
                    self.last.resize(sender + 1, 0);
                }
                assert_eq!(self.last[sender] + 1, number, "sender {sender} out of order");
                self.last[sender] = number;
            }
            Say::Panic => panic!("told to"),
            Say::Count => {}
        }
        self.busy.store(false, Ordering::Release);
        self.turns
    }
}

fn placements() -> Vec<Placement> {
    vec![
        Placement::Handoff,
        Placement::Thread,
        Placement::Pool(Pool::new(2).unwrap()),
    ]
}

fn recorder(placement: Placement, lanes: usize) -> (Spawned<Recorder>, Arc<AtomicU64>) {
    let deaths = Arc::new(AtomicU64::new(0));
    let seen = deaths.clone();
    let spawned = Address::spawn(
        Recorder::default(),
        "recorder",
        placement,
        lanes,
        move |obituary| {
            assert_eq!(
                obituary,
                Obituary {
                    actor: "recorder".into(),
                    cause: "told to".into()
                }
            );
            seen.fetch_add(1, Ordering::Relaxed);
        },
    )
    .unwrap();
    (spawned, deaths)
}

#[test]
fn asks_and_posts_of_one_sender_stay_in_order() {
    for placement in placements() {
        let (spawned, _) = recorder(placement, 1);
        let mut port = spawned.address.connect().unwrap();
        for number in 1..=1000 {
            match number % 3 {
                0 => assert_eq!(port.ask(Say::Number(0, number)), Ok(number)),
                _ => port.post(Say::Number(0, number)).unwrap(),
            }
        }
        port.fence().unwrap();
        assert_eq!(port.ask(Say::Count), Ok(1000));
    }
}

#[test]
fn many_senders_lose_and_double_nothing() {
    const EACH: u64 = 20_000;
    // More senders than bits in the word, so that lanes share one.
    const SENDERS: usize = 70;
    for placement in placements() {
        let (spawned, deaths) = recorder(placement, SENDERS + 1);
        let threads: Vec<_> = (0..SENDERS)
            .map(|sender| {
                let mut port = spawned.address.connect().unwrap();
                thread::spawn(move || {
                    for number in 1..=EACH / SENDERS as u64 {
                        if number % 4 == 0 {
                            port.ask(Say::Number(sender, number)).unwrap();
                        } else {
                            port.post(Say::Number(sender, number)).unwrap();
                        }
                    }
                    port.fence().unwrap();
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        let mut port = spawned.address.connect().unwrap();
        assert_eq!(port.ask(Say::Count), Ok(EACH / SENDERS as u64 * SENDERS as u64));
        assert_eq!(deaths.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn a_panic_closes_the_actor_and_names_it() {
    for placement in placements() {
        let (spawned, deaths) = recorder(placement, 2);
        let (mut port, mut other) = (
            spawned.address.connect().unwrap(),
            spawned.address.connect().unwrap(),
        );
        assert_eq!(port.ask(Say::Panic), Err(Closed));
        assert_eq!(other.ask(Say::Count), Err(Closed));
        assert_eq!(port.post(Say::Count), Err(Closed));
        assert_eq!(other.fence(), Err(Closed));
        assert!(spawned.address.is_closed());
        if let Some(thread) = spawned.thread {
            thread.join().unwrap();
        }
        assert_eq!(deaths.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn a_panic_in_a_post_is_seen_by_the_next_ask() {
    for placement in placements() {
        let (spawned, _) = recorder(placement, 1);
        let mut port = spawned.address.connect().unwrap();
        let _ = port.post(Say::Panic);
        assert_eq!(port.ask(Say::Count), Err(Closed));
    }
}

#[test]
fn a_panic_among_many_senders_leaves_nobody_waiting() {
    for placement in placements() {
        let (spawned, deaths) = recorder(placement, 65);
        let threads: Vec<_> = (0..65)
            .map(|sender| {
                let mut port = spawned.address.connect().unwrap();
                thread::spawn(move || {
                    for number in 1.. {
                        let say = if sender == 3 && number == 50 {
                            Say::Panic
                        } else {
                            Say::Number(sender, number)
                        };
                        if port.ask(say).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(deaths.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn stop_comes_after_what_was_sent_before() {
    for placement in placements() {
        let (spawned, deaths) = recorder(placement, 1);
        let mut port = spawned.address.connect().unwrap();
        for number in 1..=10 {
            port.post(Say::Number(0, number)).unwrap();
        }
        port.stop();
        port.stop();
        assert_eq!(port.ask(Say::Count), Err(Closed));
        assert_eq!(deaths.load(Ordering::Relaxed), 0);
        if let Some(thread) = spawned.thread {
            thread.join().unwrap();
        }
    }
}

#[test]
fn lanes_are_bounded_and_come_back() {
    let (spawned, _) = recorder(Placement::Handoff, 1);
    let port = spawned.address.connect().unwrap();
    assert!(spawned.address.connect().is_none());
    drop(port);
    assert!(spawned.address.connect().is_some());
}

/// Blocks in its turn until it is let go.
struct Stuck(crossbeam_channel::Receiver<()>);

impl Actor for Stuck {
    type Message = ();
    type Reply = ();
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, (): ()) {
        let _ = self.0.recv();
    }
}

#[test]
fn posts_to_a_busy_actor_do_not_wait_and_are_bounded() {
    for placement in [Placement::Thread, Placement::Pool(Pool::new(1).unwrap())] {
        let (go, gate) = crossbeam_channel::unbounded();
        let spawned = Address::spawn(Stuck(gate), "stuck", placement, 1, |_| {}).unwrap();
        let mut port = spawned.address.connect().unwrap();
        let mut taken = 0;
        while port.try_post(()).is_ok() {
            taken += 1;
            assert!(taken <= LANE_CREDITS + 1, "no bound");
        }
        assert!(taken >= LANE_CREDITS);
        for _ in 0..taken {
            go.send(()).unwrap();
        }
        port.fence().unwrap();
        assert!(port.try_post(()).is_ok());
        drop(go);
        port.stop();
    }
}

#[test]
fn nothing_goes_behind_a_stop_that_was_left() {
    let (go, gate) = crossbeam_channel::unbounded();
    let spawned = Address::spawn(Stuck(gate), "stuck", Placement::Thread, 1, |_| {}).unwrap();
    let mut port = spawned.address.connect().unwrap();
    // The first is stuck in its turn or still in the lane; the lane is full either way.
    while port.try_post(()).is_ok() {}
    port.stop_later();
    port.stop_later();
    for _ in 0..3 {
        assert_eq!(port.post(()), Err(Closed));
        assert_eq!(port.ask(()), Err(Closed));
        assert_eq!(port.try_post(()), Err(None));
    }
    drop(go);
    spawned.thread.unwrap().join().unwrap();
    assert!(spawned.address.is_closed());
}

#[test]
fn a_full_lane_of_a_closed_actor_says_closed() {
    let (go, gate) = crossbeam_channel::unbounded();
    let spawned = Address::spawn(Stuck(gate), "stuck", Placement::Thread, 2, |_| {}).unwrap();
    let (mut full, mut other) = (
        spawned.address.connect().unwrap(),
        spawned.address.connect().unwrap(),
    );
    other.stop_later();
    drop(go);
    spawned.thread.unwrap().join().unwrap();
    while full.try_post(()) == Err(Some(())) {}
    assert_eq!(full.try_post(()), Err(None));
}

/// Asks another actor in its turn.
struct Relay(Port<Recorder>);

impl Actor for Relay {
    type Message = ();
    type Reply = ();
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, (): ()) {
        let _ = self.0.ask(Say::Count);
    }
}

#[test]
fn a_wait_that_does_not_go_upward_is_refused() {
    let (target, _) = recorder(Placement::Handoff, 1);
    let deaths = Arc::new(AtomicU64::new(0));
    let seen = deaths.clone();
    let relay = Address::spawn(
        Relay(target.address.connect().unwrap()),
        "relay",
        Placement::Handoff,
        1,
        move |o| {
            assert!(o.cause.contains("may not wait for recorder"), "{}", o.cause);
            seen.fetch_add(1, Ordering::Relaxed);
        },
    )
    .unwrap();
    assert_eq!(relay.address.connect().unwrap().ask(()), Err(Closed));
    assert_eq!(deaths.load(Ordering::Relaxed), 1);
}

#[test]
fn a_message_to_a_closed_actor_is_dropped_once() {
    struct Sink;
    impl Actor for Sink {
        type Message = Arc<()>;
        type Reply = ();
        const RANK: Rank = Rank::Device;
        fn handle(&mut self, _: Arc<()>) {}
    }
    let token = Arc::new(());
    let spawned = Address::spawn(Sink, "sink", Placement::Handoff, 1, |_| {}).unwrap();
    let mut port = spawned.address.connect().unwrap();
    port.stop();
    for _ in 0..3 * LANE_CREDITS {
        assert_eq!(port.ask(token.clone()), Err(Closed));
        assert_eq!(port.post(token.clone()), Err(Closed));
    }
    drop((port, spawned));
    assert_eq!(Arc::strong_count(&token), 1);
}
