//! What actors must not do, what they do to those who wait when they do it all the same, and everything at random.

use super::super::lane::{Call, DONE, GRANTED, PARKED, WAITING};
use super::super::mailbox::{Core, HELD, lane_bit};
use super::super::placement::Runner;
use super::super::*;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded, unbounded};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

/// So long, and it hangs.
const LIMIT: Duration = Duration::from_secs(20);

/// What a thread says, if it does not hang. It is left behind then.
fn unless_it_hangs<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (say, said) = bounded(1);
    let worker = thread::spawn(move || say.send(work()));
    match said.recv_timeout(LIMIT) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("it hangs"),
        Err(RecvTimeoutError::Disconnected) => {
            let _ = worker.join().map_err(|panic| std::panic::resume_unwind(panic));
            unreachable!("a worker that says nothing has panicked")
        }
    }
}

type Job = Box<dyn FnOnce() -> u64 + Send>;

/// A device that does what it is told.
struct Device;

impl Actor for Device {
    type Message = Job;
    type Reply = u64;
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, job: Job) -> u64 {
        job()
    }
}

/// A backend that does what it is told.
struct Backend;

impl Actor for Backend {
    type Message = Job;
    type Reply = u64;
    const RANK: Rank = Rank::Backend;

    fn handle(&mut self, job: Job) -> u64 {
        job()
    }
}

/// An actor, and what it died of.
fn spawn<A: Actor>(actor: A, placement: Placement, lanes: usize) -> (Address<A>, Receiver<String>) {
    let (tell, deaths) = unbounded();
    let spawned = Address::spawn(actor, "it", placement, lanes, move |obituary| {
        let _ = tell.send(obituary.cause);
    });
    (spawned.unwrap().address, deaths)
}

fn connect<A: Actor>(address: &Address<A>) -> Port<A> {
    address.connect().expect("there are lanes enough")
}

/// Keeps an actor busy on a thread of its own until it is told to go on.
fn busy(mut port: Port<Device>) -> (crossbeam_channel::Sender<()>, thread::JoinHandle<()>) {
    let ((go, gate), (tell, begun)) = (bounded(1), bounded(1));
    let thread = thread::spawn(move || {
        let _ = port.ask(Box::new(move || {
            tell.send(()).unwrap();
            gate.recv().unwrap();
            0
        }));
    });
    begun.recv().unwrap();
    (go, thread)
}

#[test]
fn a_panic_in_the_obituary_leaves_nobody_waiting() {
    let spawned = Address::spawn(Device, "it", Placement::Handoff, 2, |_| panic!("no flowers")).unwrap();
    let (go, holder) = busy(connect(&spawned.address));
    let mut port = connect(&spawned.address);
    port.post(Box::new(|| panic!("told to"))).unwrap();
    go.send(()).unwrap();
    holder.join().unwrap();
    assert_eq!(unless_it_hangs(move || port.ask(Box::new(|| 1))), Err(Closed));
}

/// Panics when it is dropped.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        if !thread::panicking() {
            panic!("told to");
        }
    }
}

/// Replies with a bomb once its message is gone.
struct Bomber;

impl Actor for Bomber {
    type Message = Receiver<()>;
    type Reply = Option<Bomb>;
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, gate: Receiver<()>) -> Option<Bomb> {
        gate.recv().is_err().then(|| Bomb)
    }
}

#[test]
fn a_panic_in_a_replys_drop_ends_the_actor() {
    let (address, deaths) = spawn(Bomber, Placement::Handoff, 2);
    let (mut first, mut second) = (connect(&address), connect(&address));
    let (go, gate) = bounded(0);
    let holder = thread::spawn(move || first.ask(gate).is_ok());
    // It is taken out of the channel by the turn itself.
    go.send(()).unwrap();
    assert!(holder.join().unwrap());
    let (bomb, fuse) = bounded(0);
    drop(bomb);
    let _ = second.post(fuse);
    assert_eq!(deaths.recv_timeout(LIMIT).unwrap(), "told to");
    assert!(unless_it_hangs(move || second.ask(bounded(0).1)).is_err());
}

#[test]
fn an_actor_may_not_wait_for_credits_of_its_own_mailbox() {
    let (address, deaths) = spawn(Device, Placement::Handoff, 2);
    let (mut port, mut own) = (connect(&address), connect(&address));
    let outcome = unless_it_hangs(move || {
        port.ask(Box::new(move || {
            for _ in 0..=LANE_CREDITS {
                let _ = own.post(Box::new(|| 0));
            }
            0
        }))
    });
    assert_eq!(outcome, Err(Closed));
    assert!(deaths.recv_timeout(LIMIT).unwrap().contains("may not wait"));
}

#[test]
fn a_turn_within_a_turn_may_not_wait_for_the_outer_one() {
    // A backend's turn posts down to an idle device, whose turn so runs on the same thread, and asks that backend.
    let (backend, _) = spawn(Backend, Placement::Handoff, 2);
    let (device, deaths) = spawn(Device, Placement::Handoff, 1);
    let (mut port, mut again, mut down) = (connect(&backend), connect(&backend), connect(&device));
    let outcome = unless_it_hangs(move || {
        port.ask(Box::new(move || {
            let _ = down.try_post(Box::new(move || again.ask(Box::new(|| 1)).unwrap_or(0)));
            2
        }))
    });
    assert_eq!(outcome, Ok(2));
    assert!(deaths.recv_timeout(LIMIT).unwrap().contains("may not wait"));
}

#[test]
fn actors_of_one_pool_may_not_wait_for_each_other() {
    let pool = Pool::new(1).unwrap();
    let (backend, _) = spawn(Backend, Placement::Pool(pool.clone()), 1);
    let (device, deaths) = spawn(Device, Placement::Pool(pool), 1);
    let (mut up, mut port) = (connect(&backend), connect(&device));
    let outcome = unless_it_hangs(move || port.ask(Box::new(move || up.ask(Box::new(|| 7)).unwrap_or(0))));
    assert_eq!(outcome, Err(Closed));
    assert!(deaths.recv_timeout(LIMIT).unwrap().contains("in the same pool"));
}

#[test]
fn a_wait_that_does_not_go_upward_is_refused_also_when_there_is_nothing_to_wait_for() {
    let (device, _) = spawn(Device, Placement::Handoff, 1);
    let mut port = connect(&device);
    let _rank = RankGuard::enter(Rank::Backend);
    assert!(catch_unwind(AssertUnwindSafe(|| port.fence())).is_err());
}

/// Asks another device when it is dropped.
struct AsksInDrop(Port<Device>, Arc<AtomicBool>);

impl Actor for AsksInDrop {
    type Message = ();
    type Reply = ();
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, (): ()) {}
}

impl Drop for AsksInDrop {
    fn drop(&mut self) {
        if self.0.ask(Box::new(|| 0)).is_ok() {
            self.1.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn an_actor_has_its_rank_to_the_end() {
    let (device, _) = spawn(Device, Placement::Handoff, 1);
    let asked = Arc::new(AtomicBool::new(false));
    let (address, _) = spawn(AsksInDrop(connect(&device), asked.clone()), Placement::Handoff, 1);
    connect(&address).stop();
    assert!(address.is_closed() && !asked.load(Ordering::Relaxed));
}

#[test]
fn who_was_answered_in_its_sleep_does_not_wait_for_the_long_turns_of_others() {
    let (address, _) = spawn(Device, Placement::Handoff, 3);
    let (go, holder) = busy(connect(&address));
    let (mut asks, mut posts) = (connect(&address), connect(&address));
    let (tell, awake) = bounded(1);
    let sleeper = thread::spawn(move || {
        asks.ask(Box::new(|| 0)).unwrap();
        tell.send(()).unwrap();
    });
    while address.lane_state(1) != PARKED {
        thread::yield_now();
    }
    // The first is long enough to be noticed, and the second is not over before the sleeper is awake.
    posts
        .post(Box::new(|| {
            thread::sleep(Duration::from_millis(2));
            0
        }))
        .unwrap();
    let (say, heard) = bounded(1);
    posts
        .post(Box::new(move || {
            say.send(awake.recv_timeout(LIMIT).is_ok()).unwrap();
            0
        }))
        .unwrap();
    go.send(()).unwrap();
    assert!(heard.recv().unwrap());
    holder.join().unwrap();
    sleeper.join().unwrap();
}

/// An actor whose turns do what other processors would do meanwhile: who was answered asks again at once.
struct Turnstile {
    core: Weak<Core<Turnstile>>,
    served: Arc<Vec<AtomicU64>>,
}

fn ask_again(core: &Core<Turnstile>, lane: usize) {
    core.lanes[lane].call(Call::Ask(lane), WAITING);
    core.word.fetch_or(HELD | lane_bit(lane), Ordering::AcqRel);
}

impl Actor for Turnstile {
    type Message = usize;
    type Reply = ();
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, lane: usize) {
        self.served[lane].fetch_add(1, Ordering::Relaxed);
        let core = self.core.upgrade().expect("whoever runs this holds it");
        for lane in 0..core.lanes.len() {
            if core.lanes[lane].state.load(Ordering::Acquire) == DONE {
                core.lanes[lane].take();
                ask_again(&core, lane);
            }
        }
    }
}

#[test]
fn with_more_askers_than_a_budget_each_has_its_turn() {
    const ASKERS: usize = 40;
    const HOLDERS: u64 = 200;
    let served: Arc<Vec<AtomicU64>> = Arc::new((0..ASKERS).map(|_| AtomicU64::new(0)).collect());
    let core = Arc::new_cyclic(|core: &Weak<Core<Turnstile>>| {
        let actor = Turnstile {
            core: core.clone(),
            served: served.clone(),
        };
        Core::new(actor, "it", ASKERS, Runner::Sender, Box::new(|_| {}))
    });
    assert!(core.try_hold());
    for lane in 0..ASKERS {
        ask_again(&core, lane);
    }
    let mut holder = 0;
    for _ in 0..HOLDERS {
        core.combine_from(holder);
        holder = (0..ASKERS)
            .find(|lane| core.lanes[*lane].state.load(Ordering::Acquire) == GRANTED)
            .expect("it was handed over");
        core.lanes[holder].state.store(WAITING, Ordering::Relaxed);
    }
    let served: Vec<u64> = served.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    // 33 turns a holder, among 40.
    assert!(served.iter().all(|count| *count >= HOLDERS / 2), "{served:?}");
}

/// Checks each sender's order, and remembers what it has handled.
struct Ledger {
    last: Vec<u64>,
    handled: Arc<Vec<AtomicU64>>,
}

/// Counts itself.
struct Entry {
    sender: usize,
    number: u64,
    die: bool,
    alive: Arc<AtomicU64>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Actor for Ledger {
    type Message = Entry;
    type Reply = u64;
    const RANK: Rank = Rank::Device;

    fn handle(&mut self, entry: Entry) -> u64 {
        assert!(!entry.die, "told to");
        assert!(entry.number > self.last[entry.sender], "out of order");
        self.last[entry.sender] = entry.number;
        self.handled[entry.sender].store(entry.number, Ordering::SeqCst);
        entry.number
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    AllStopSending,
    Panic,
    Stop,
}

/// One sender of everything there is to send, in an order that `seed` decides. Ports come and go.
fn send_at_random(
    address: &Address<Ledger>,
    handled: &[AtomicU64],
    alive: &Arc<AtomicU64>,
    (sender, count, ending): (usize, u64, Ending),
    seed: u64,
) {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = move |bound: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    let mut port = connect(address);
    for number in 1..=count {
        alive.fetch_add(1, Ordering::SeqCst);
        let entry = Entry {
            sender,
            number,
            die: ending == Ending::Panic && sender == 0 && number == count / 2,
            alive: alive.clone(),
        };
        let closed = match below(8) {
            0..4 => match port.ask(entry) {
                Ok(reply) => {
                    assert_eq!(reply, number);
                    false
                }
                Err(Closed) => {
                    let last = handled[sender].load(Ordering::SeqCst);
                    assert!(
                        last < number,
                        "{number} was handled, and its asker told that it was not"
                    );
                    true
                }
            },
            4 | 5 => port.post(entry).is_err(),
            6 => port.tell(|| entry, || true).is_err(),
            _ => matches!(port.try_post(entry), Err(None)),
        };
        if closed {
            assert_ne!(ending, Ending::AllStopSending);
            return;
        }
        if below(32) == 0 {
            let _ = port.fence();
            drop(port);
            port = connect(address);
        }
        if ending == Ending::Stop && sender == 1 && number == count / 2 {
            if below(2) == 0 {
                port.stop_later();
                assert_eq!(port.fence(), Err(Closed));
            } else {
                port.stop();
                assert!(address.is_closed());
            }
            return;
        }
    }
    let _ = port.fence();
}

#[test]
fn at_random_each_message_is_handled_or_refused_and_dropped_once() {
    for round in 0..24 {
        let senders = [2, 3, 8, 70][round as usize % 4];
        let ending = [Ending::AllStopSending, Ending::Panic, Ending::Stop][round as usize % 3];
        for placement in [
            Placement::Handoff,
            Placement::Thread,
            Placement::Pool(Pool::new(2).unwrap()),
        ] {
            let alive = Arc::new(AtomicU64::new(0));
            let handled: Arc<Vec<AtomicU64>> = Arc::new((0..senders).map(|_| AtomicU64::new(0)).collect());
            let ledger = Ledger {
                last: vec![0; senders],
                handled: handled.clone(),
            };
            // One lane more than senders: a lane is free again only after its port is.
            let (address, deaths) = spawn(ledger, placement, senders + 1);
            let count = if senders > 60 { 100 } else { 1500 };
            let threads: Vec<_> = (0..senders)
                .map(|sender| {
                    let (address, handled, alive) = (address.clone(), handled.clone(), alive.clone());
                    let seed = round * 1000 + sender as u64;
                    thread::spawn(move || {
                        send_at_random(&address, &handled, &alive, (sender, count, ending), seed);
                    })
                })
                .collect();
            for thread in threads {
                unless_it_hangs(move || thread.join()).unwrap();
            }
            if ending == Ending::AllStopSending {
                connect(&address).stop();
            }
            assert!(address.is_closed(), "round {round}");
            assert_eq!(deaths.try_iter().count(), usize::from(ending == Ending::Panic));
            drop(address);
            // The actor's own thread or a pool's may be the last to let go of it.
            while alive.load(Ordering::SeqCst) != 0 {
                thread::yield_now();
            }
        }
    }
}
