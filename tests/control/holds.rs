//! A controller and a debugger that both want the machine to stand still.

use super::*;
use crate::stuck::Mired;

/// A machine that counts its accesses.
struct Counted {
    machine: Machine,
    count: Arc<AtomicU64>,
}

impl Counted {
    fn start() -> Counted {
        let (count, wrong) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let loads = (0..2).map(|vcpu| Load::new(vcpu, &count, &wrong)).collect();
        let machine = Machine::start(config(2), loads);
        let counted = Counted { machine, count };
        counted.goes_on();
        counted
    }

    #[track_caller]
    fn goes_on(&self) {
        let before = self.count.load(Ordering::Relaxed);
        wait_until("it does not go on", || {
            self.count.load(Ordering::Relaxed) > before + 100
        });
    }

    /// In a paused machine no vCPU is in its loop: nothing to wait for.
    #[track_caller]
    fn stands(&self) {
        let before = self.count.load(Ordering::Relaxed);
        std::thread::yield_now();
        assert_eq!(self.count.load(Ordering::Relaxed), before);
    }
}

#[test]
fn a_machine_that_two_hold_goes_on_when_both_have_let_go() {
    let both = [
        (Command::Pause, Command::Resume),
        (Command::Halt, Command::Release),
    ];
    let counted = Counted::start();
    for (first, second) in [(0, 1), (1, 0)] {
        for (early, late) in [(0, 1), (1, 0)] {
            counted.machine.done(both[first].0, State::Paused);
            counted.machine.done(both[second].0, State::Paused);
            counted.stands();
            counted.machine.done(both[early].1, State::Paused);
            counted.stands();
            // Who has let go cannot do it for the other.
            let again = counted.machine.address.ask(both[early].1);
            assert!(matches!(&again, Answer::Unfit(_)), "{again:?}");
            counted.stands();
            // And may come back.
            counted.machine.done(both[early].0, State::Paused);
            counted.machine.done(both[early].1, State::Paused);
            // A reset leaves it paused, and the reason as it is.
            counted.machine.done(Command::Reset, State::Paused);
            counted.machine.done(both[late].1, State::Running);
            counted.goes_on();
            let none = counted.machine.address.ask(both[late].1);
            assert_eq!(none, Answer::Refused(Refused(State::Running, Transition::Resume)));
        }
    }
    counted.machine.done(Command::Stop, State::Stopping);
    assert!(matches!(counted.machine.end(), Outcome::Stopped));
}

#[test]
fn both_are_told_of_a_pause_that_somebody_stuck_holds_up() {
    let mut mired = Mired::start(PlacementKind::Handoff);
    let address = mired.machine.address.clone();
    let debugger = std::thread::spawn(move || address.ask(Command::Halt));
    wait_until("it is not pausing", || mired.why()["state"] == "pausing");
    // Within the time that the debugger's has, or after it: the same.
    let waits = |answer: Answer| matches!(answer, Answer::Waits(State::Pausing, whom) if whom.iter().any(|who| who.starts_with("vcpu0 to pause (")));
    assert!(waits(mired.machine.address.ask(Command::Pause)));
    assert!(waits(debugger.join().unwrap()));
    mired.stands();
    // Each takes back its own.
    mired.machine.done(Command::Release, State::Pausing);
    mired.stands();
    let debugger = mired.machine.address.ask(Command::Halt);
    assert!(waits(debugger), "its time is up already");
    mired.machine.done(Command::Resume, State::Pausing);
    mired.stands();
    mired.machine.done(Command::Release, State::Running);
    mired.goes_on();
    mired.release = None;
    mired.machine.done(Command::Stop, State::Stopping);
    assert!(matches!(mired.machine.end(), Outcome::Stopped));
}
