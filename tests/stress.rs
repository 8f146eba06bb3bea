//! Many messages from many senders under every placement: none lost, none doubled, none out of order, none answered with
//! another's reply.
//!
//! `cargo test` sends some. `cargo xtask bench stress` sends a hundred million.

use actor_vmm::actors::{Actor, Address, Placement, Pool, Port, Rank, Spawned};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// How many asks the short run sends, and the long one, of all placements together.
const SHORT: u64 = 400_000;
const LONG: u64 = 100_000_000;

/// What a sender does with its message.
#[derive(Clone, Copy)]
enum Way {
    Ask,
    Post,
}

/// From a sender; the numbers of each come one after the other.
struct Numbered {
    sender: usize,
    number: u64,
}

/// Counts what comes from each sender. Not atomic and not locked: the actor's state has one owner at a time, or this
/// goes wrong. Nor by an exchange, which would order what the mailbox has to order.
struct Counter {
    last: Vec<u64>,
    total: u64,
    wrong: u64,
    inside: AtomicBool,
}

impl Actor for Counter {
    type Message = Numbered;
    type Reply = (u64, u64, u64);
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, Numbered { sender, number }: Numbered) -> (u64, u64, u64) {
        let alone = !self.inside.load(Ordering::Relaxed);
        self.inside.store(true, Ordering::Relaxed);
        // 0 asks for the counts and counts for nothing.
        if number > 0 {
            let expected = self.last[sender] + 1;
            self.wrong += u64::from(number != expected || !alone);
            self.last[sender] = number;
            self.total += 1;
        }
        self.inside.store(false, Ordering::Relaxed);
        (mixed(sender, number), self.total, self.wrong)
    }
}

/// What only this sender's message with this number is answered with.
fn mixed(sender: usize, number: u64) -> u64 {
    (number ^ (sender as u64) << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// One sender's messages: asks, each answered with its own reply; before every 16th a burst of posts, which an ask or a
/// fence ends. How many posts there were.
fn send(mut port: Port<Counter>, sender: usize, asks: u64) -> u64 {
    let (mut number, mut posts) = (0, 0);
    let mut next = |port: &mut Port<Counter>, way: Way| {
        number += 1;
        let message = Numbered { sender, number };
        match way {
            Way::Post => port.post(message).expect("it lives"),
            Way::Ask => {
                let (reply, ..) = port.ask(message).expect("it lives");
                assert_eq!(reply, mixed(sender, number), "another's reply");
            }
        }
    };
    for n in 0..asks {
        if n % 16 == 0 {
            // From none to more than there are credits for.
            let burst = n / 16 % 40;
            for _ in 0..burst {
                next(&mut port, Way::Post);
            }
            posts += burst;
            if n % 32 == 0 {
                port.fence().expect("it lives");
            }
        }
        next(&mut port, Way::Ask);
    }
    posts
}

/// How many asks were counted.
fn run(placement: Placement, senders: usize, asks: u64) -> u64 {
    let counter = Counter {
        last: vec![0; senders],
        total: 0,
        wrong: 0,
        inside: AtomicBool::new(false),
    };
    let died = |obituary| panic!("{obituary:?}");
    let Spawned { address, thread } =
        Address::spawn(counter, "counter", placement, senders + 1, died).expect("the host has threads");
    let each = asks / senders as u64;
    let posts: u64 = thread::scope(|scope| {
        let senders: Vec<_> = (0..senders)
            .map(|sender| {
                let port = address.connect().expect("there is a lane for each");
                scope.spawn(move || send(port, sender, each))
            })
            .collect();
        senders
            .into_iter()
            .map(|sender| sender.join().expect("no assertion failed"))
            .sum()
    });
    let mut port = address.connect().expect("there is one lane more");
    let (_, total, wrong) = port.ask(Numbered { sender: 0, number: 0 }).expect("it lives");
    let asked = each * senders as u64;
    assert_eq!((total, wrong), (asked + posts, 0), "{senders} senders");
    port.stop();
    if let Some(thread) = thread {
        thread.join().expect("it ended in order");
    }
    asked
}

/// Every placement with two senders and with more than there are processors, each with so many percent of the asks.
fn run_all(asks: u64) -> u64 {
    let pool = || Placement::Pool(Pool::new(2).expect("the host has threads"));
    // A sleeping thread that must be woken for each ask is slower by two orders of magnitude.
    type Share = (fn() -> Placement, usize, u64);
    let shares: [Share; 7] = [
        (|| Placement::Handoff, 1, 10),
        (|| Placement::Handoff, 2, 40),
        (|| Placement::Handoff, 8, 40),
        (|| Placement::Thread, 2, 4),
        (|| Placement::Thread, 8, 3),
        (pool, 2, 2),
        (pool, 8, 1),
    ];
    shares
        .into_iter()
        .map(|(placement, senders, share)| run(placement(), senders, asks * share / 100))
        .sum()
}

#[test]
fn nothing_is_lost_or_doubled() {
    assert!(run_all(SHORT) > SHORT * 99 / 100);
}

#[test]
#[ignore = "minutes; cargo xtask bench stress"]
fn nothing_of_a_hundred_million_is_lost_or_doubled() {
    let asked = run_all(LONG);
    assert!(asked > LONG * 99 / 100);
    println!("{asked} asks");
}
