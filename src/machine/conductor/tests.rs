//! A pause, a resume and a reset, step by step; and any order of events.

use super::Effect::*;
use super::*;
use Lifecycle::*;
use proptest::prelude::*;

fn running(vcpus: usize, devices: usize) -> Conductor {
    let mut machine = Conductor::new(vcpus, devices);
    machine.go(Transition::Start).unwrap();
    machine.effects();
    machine
}

fn paused(vcpus: usize, devices: usize) -> Conductor {
    let mut machine = running(vcpus, devices);
    machine.pause().unwrap();
    (0..vcpus).for_each(|index| machine.vcpu_paused(index));
    (0..devices).for_each(|index| machine.device_done(index));
    machine.effects();
    assert_eq!(machine.state(), State::Paused);
    machine
}

#[test]
fn a_pause_tells_all_vcpus_at_once_then_devices_then_time() {
    let mut machine = running(2, 2);
    machine.pause().unwrap();
    assert_eq!(machine.effects(), [Vcpu(0, Pause), Vcpu(1, Pause)]);
    machine.vcpu_paused(1);
    assert_eq!(machine.effects(), []);
    machine.vcpu_paused(0);
    assert_eq!(machine.effects(), [Device(0, Pause), Device(1, Pause)]);
    machine.device_done(1);
    assert_eq!((machine.effects(), machine.state()), (vec![], State::Pausing));
    machine.device_done(0);
    assert_eq!(machine.effects(), [FreezeTime, Done]);
    assert_eq!(machine.state(), State::Paused);
    machine.resume().unwrap();
    assert_eq!(
        machine.effects(),
        [ThawTime, Device(0, Resume), Device(1, Resume), TakeTime]
    );
    machine.time_taken();
    assert_eq!(machine.effects(), [Vcpu(0, Resume), Vcpu(1, Resume), Done]);
}

#[test]
fn nobody_runs_before_the_boot_processor_knows_what_time_it_is() {
    let mut machine = paused(2, 0);
    machine.resume().unwrap();
    assert_eq!(
        (machine.effects(), machine.state()),
        (vec![ThawTime, TakeTime], State::Resuming)
    );
    // A pause that comes first finds everybody standing, and waits for the one that is busy.
    machine.pause().unwrap();
    assert_eq!((machine.effects(), machine.state()), (vec![], State::Pausing));
    assert_eq!(machine.pending(), [Pending::Time]);
    machine.time_taken();
    assert_eq!(machine.effects(), [FreezeTime, Done]);
    // Once more, taken back: it is told once, and the others wait for that.
    machine.resume().unwrap();
    machine.pause().unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.effects(), [ThawTime, TakeTime]);
    machine.time_taken();
    assert_eq!(machine.effects(), [Vcpu(0, Resume), Vcpu(1, Resume), Done]);
    machine.time_taken();
    assert_eq!((machine.effects(), machine.state()), (vec![], State::Running));
}

#[test]
fn a_resume_whose_boot_processor_is_late_says_so_and_is_done_when_it_has_answered() {
    let mut machine = paused(2, 1);
    machine.resume().unwrap();
    assert_eq!(machine.effects(), [ThawTime, Device(0, Resume), TakeTime]);
    assert!(machine.awaited().is_some());
    assert_eq!(machine.time_is_up(), Some(Late::Resume));
    assert_eq!((machine.effects(), machine.awaited()), (vec![], None));
    assert_eq!(machine.state(), State::Resuming);
    assert_eq!(
        machine.pending(),
        [Pending::Time, Pending::Device(0, Lifecycle::Resume)]
    );
    assert_eq!(
        machine.resume(),
        Err(Refused(State::Resuming, Transition::Resume))
    );
    machine.time_taken();
    assert_eq!(machine.effects(), [Vcpu(0, Resume), Vcpu(1, Resume), Done]);
    assert_eq!(machine.state(), State::Running);
    // One that is reset meanwhile, and that reset given up, still has to be told to run.
    let mut machine = paused(2, 0);
    machine.resume().unwrap();
    machine.reset().unwrap();
    assert_eq!(machine.time_is_up(), Some(Late::Reset));
    assert_eq!(machine.effects(), [ThawTime, TakeTime]);
    assert_eq!(machine.state(), State::Resuming);
    assert!(machine.awaited().is_some());
    machine.time_taken();
    assert_eq!(machine.effects(), [Vcpu(0, Resume), Vcpu(1, Resume), Done]);
}

#[test]
fn a_pause_for_which_nobody_has_to_be_told_anything_has_a_limit_of_its_own() {
    let mut machine = running(1, 1);
    machine.pause().unwrap();
    let first = machine.awaited();
    assert_eq!(machine.time_is_up(), Some(Late::Pause));
    machine.resume().unwrap();
    machine.effects();
    // The vCPU has not answered the first one.
    for again in ["a pause", "a reset"] {
        match again {
            "a pause" => machine.pause().unwrap(),
            _ => machine.reset().unwrap(),
        }
        let awaited = machine.awaited();
        assert!(awaited.is_some() && awaited != first, "{again}");
        assert!(machine.time_is_up().is_some(), "{again}");
        assert_eq!(machine.awaited(), None, "{again}");
        if again == "a pause" {
            machine.resume().unwrap();
        }
    }
    assert_eq!(machine.state(), State::Running);
    // Said once.
    assert_eq!(machine.time_is_up(), None);
}

#[test]
fn guest_time_stands_only_while_the_boot_processor_does() {
    let mut machine = running(2, 0);
    machine.pause().unwrap();
    machine.vcpu_paused(1);
    machine.effects();
    // It is stuck: when the others go on they read a clock that nobody has stopped.
    machine.time_is_up();
    assert_eq!((machine.effects(), machine.state()), (vec![], State::Pausing));
    machine.resume().unwrap();
    assert_eq!(machine.effects(), [Vcpu(1, Resume), Done]);
    machine.vcpu_paused(0);
    assert_eq!(machine.effects(), [Vcpu(0, Resume)]);
    // It comes loose while the other is stuck.
    machine.pause().unwrap();
    machine.effects();
    machine.time_is_up();
    assert_eq!(machine.effects(), []);
    machine.vcpu_paused(0);
    assert_eq!(machine.effects(), [FreezeTime]);
    machine.resume().unwrap();
    assert_eq!(machine.effects(), [ThawTime, TakeTime]);
    // A late pause in between does not make it stand: what it was told still holds.
    machine.pause().unwrap();
    machine.time_is_up();
    machine.resume().unwrap();
    assert_eq!(machine.effects(), []);
    machine.time_taken();
    assert_eq!(machine.effects(), [Vcpu(0, Resume), Done]);
}

#[test]
fn one_that_is_late_for_a_pause_goes_on_with_the_others() {
    let mut machine = running(2, 0);
    machine.pause().unwrap();
    machine.vcpu_paused(0);
    machine.effects();
    machine.time_is_up();
    machine.resume().unwrap();
    assert_eq!(machine.effects(), [FreezeTime, ThawTime, TakeTime]);
    machine.vcpu_paused(1);
    assert_eq!(machine.effects(), []);
    machine.time_taken();
    assert_eq!(machine.effects(), [Vcpu(0, Resume), Vcpu(1, Resume), Done]);
}

#[test]
fn a_reset_goes_through_everybody_and_back_to_what_was() {
    for was_running in [true, false] {
        let mut machine = if was_running { running(1, 1) } else { paused(1, 1) };
        machine.reset().unwrap();
        if was_running {
            machine.vcpu_paused(0);
            machine.device_done(0);
        }
        assert_eq!(machine.effects().last(), Some(&Device(0, Reset)));
        machine.device_done(0);
        assert_eq!(machine.effects(), [Reload]);
        assert_eq!(machine.pending(), [Pending::Reload]);
        // It takes long, and is complete all the same; what comes behind has time of its own.
        assert_eq!(machine.time_is_up(), Some(Late::Reload));
        assert_eq!((machine.awaited(), machine.effects()), (None, vec![]));
        machine.reloaded();
        assert!(machine.awaited().is_some());
        assert_eq!(machine.effects(), [Vcpu(0, Reset)]);
        machine.vcpu_reset(0);
        if was_running {
            assert_eq!(
                machine.effects(),
                [ThawTime, Device(0, Resume), Vcpu(0, Resume), Done]
            );
            assert_eq!(machine.state(), State::Running);
        } else {
            assert_eq!(machine.effects(), [Done]);
            assert_eq!(machine.state(), State::Paused);
        }
    }
}

#[test]
fn whoever_is_stuck_does_not_keep_the_others_from_pausing_and_is_named() {
    let mut machine = running(2, 1);
    machine.pause().unwrap();
    machine.vcpu_paused(0);
    machine.effects();
    machine.time_is_up();
    assert_eq!(machine.effects(), [Device(0, Pause), FreezeTime]);
    assert_eq!(
        machine.pending(),
        [Pending::Vcpu(1, Pause), Pending::Device(0, Pause)]
    );
    assert_eq!(machine.state(), State::Pausing);
    // It comes loose after all.
    machine.device_done(0);
    assert_eq!(machine.state(), State::Pausing);
    machine.vcpu_paused(1);
    assert_eq!((machine.effects(), machine.state()), (vec![Done], State::Paused));
}

#[test]
fn a_stuck_vcpu_is_sent_one_pause_however_often_it_is_asked_for() {
    let mut machine = running(1, 0);
    let mut sent = 0;
    for _ in 0..100 {
        machine.pause().unwrap();
        machine.time_is_up();
        machine.resume().unwrap();
        sent += machine
            .effects()
            .iter()
            .filter(|effect| matches!(effect, Vcpu(..)))
            .count();
    }
    assert_eq!(sent, 1);
    machine.vcpu_paused(0);
    assert_eq!(machine.effects(), [Vcpu(0, Resume)]);
}

#[test]
fn a_reset_that_waits_too_long_is_given_up_and_the_machine_goes_on() {
    let mut machine = running(2, 1);
    machine.reset().unwrap();
    machine.vcpu_paused(0);
    machine.effects();
    assert_eq!(machine.time_is_up(), Some(Late::Reset));
    assert_eq!(machine.effects(), [Vcpu(0, Resume), Done]);
    assert_eq!(machine.state(), State::Running);
    machine.vcpu_paused(1);
    assert_eq!(machine.effects(), [Vcpu(1, Resume)]);
}

#[test]
fn a_device_that_does_not_come_back_from_its_reset_fails_the_machine() {
    let mut machine = paused(1, 1);
    machine.reset().unwrap();
    machine.effects();
    assert_eq!(machine.time_is_up(), Some(Late::ResetFailed));
}

#[test]
fn the_dead_are_not_waited_for() {
    let mut machine = running(1, 2);
    machine.device_gone(0);
    machine.pause().unwrap();
    machine.vcpu_paused(0);
    machine.device_gone(1);
    assert_eq!(machine.state(), State::Paused);
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let mut machine = running(1, 1);
    assert_eq!(machine.resume(), Err(Refused(State::Running, Transition::Resume)));
    assert_eq!(machine.effects(), []);
    machine.pause().unwrap();
    assert_eq!(machine.pause(), Err(Refused(State::Pausing, Transition::Pause)));
    assert_eq!(machine.reset(), Err(Refused(State::Pausing, Transition::Reset)));
    assert_eq!(machine.effects(), [Vcpu(0, Pause)]);
    machine.go(Transition::Stop).unwrap();
    assert_eq!(
        machine.pause().unwrap_err().to_string(),
        "a machine that is stopping cannot be paused"
    );
    // Answers that come late do nothing.
    machine.vcpu_paused(0);
    machine.device_done(0);
    assert_eq!(machine.time_is_up(), None);
    assert_eq!((machine.effects(), machine.state()), (vec![], State::Stopping));
}

/// What can happen to a machine, with whom it happens to.
#[derive(Clone, Copy, Debug)]
enum Event {
    Pause,
    Resume,
    Reset,
    Answer(usize),
    TimeIsUp,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Pause),
        Just(Event::Resume),
        Just(Event::Reset),
        Just(Event::TimeIsUp),
        (0usize..8).prop_map(Event::Answer),
        (0usize..8).prop_map(Event::Answer),
        (0usize..8).prop_map(Event::Answer),
    ]
}

/// What the conductor has had done, and what nobody may see it do.
struct Play {
    machine: Conductor,
    /// What was sent and not answered.
    outstanding: Vec<Effect>,
    runs: [bool; VCPUS],
    frozen: bool,
    /// Guest time was set, and the boot processor does not know.
    stale: bool,
}

const VCPUS: usize = 3;
const DEVICES: usize = 2;

impl Play {
    fn carry_out(&mut self) {
        let sent_to = |outstanding: &[Effect], who: usize| {
            let to = |effect: &Effect| match effect {
                Vcpu(index, _) => *index == who,
                TakeTime => who == 0,
                _ => false,
            };
            outstanding.iter().any(to)
        };
        for effect in self.machine.effects() {
            match effect {
                Vcpu(index, Resume | Start) => {
                    assert!(!self.stale && !self.frozen, "vcpu{index} runs on a stale clock");
                    self.runs[index] = true;
                }
                TakeTime => {
                    assert!(self.stale && !self.runs[0] && !self.frozen);
                    assert!(!sent_to(&self.outstanding, 0));
                    self.outstanding.push(effect);
                }
                Vcpu(index, event) => {
                    assert!(!sent_to(&self.outstanding, index));
                    assert!(event == Pause || !self.runs[index]);
                    self.outstanding.push(effect);
                }
                Device(index, event) => {
                    let to = |other: &Effect| matches!(other, Device(who, _) if *who == index);
                    assert!(!self.outstanding.iter().any(to));
                    assert!(event != Reset || self.runs == [false; VCPUS]);
                    self.outstanding.push(effect);
                }
                Reload => self.outstanding.push(effect),
                FreezeTime => {
                    assert!(!self.runs[0] && !self.stale && !std::mem::replace(&mut self.frozen, true));
                }
                ThawTime => {
                    assert!(std::mem::take(&mut self.frozen));
                    self.stale = true;
                }
                Done => {}
            }
        }
        match self.machine.state() {
            State::Paused => assert!(self.frozen && self.runs == [false; VCPUS]),
            State::Running | State::Resuming => assert!(!self.frozen),
            _ => {}
        }
    }

    fn answer(&mut self, which: usize) {
        match self.outstanding.remove(which) {
            Vcpu(index, Pause) => {
                self.runs[index] = false;
                self.machine.vcpu_paused(index);
            }
            Vcpu(index, _) => self.machine.vcpu_reset(index),
            TakeTime => {
                self.stale = false;
                self.machine.time_taken();
            }
            Device(index, _) => self.machine.device_done(index),
            _ => self.machine.reloaded(),
        }
        self.carry_out();
    }
}

proptest! {
    /// Whatever happens in whatever order: nobody has two messages to answer, no vCPU runs while the machine is
    /// paused or before the boot processor knows the time, none is reset while it runs, time stands exactly while it
    /// should; whoever waits for answers has a limit, once; and when everybody answers in the end, all come to rest
    /// as the machine's state says.
    #[test]
    fn any_order_of_events_ends_well(events in prop::collection::vec(event(), 0..200)) {
        let mut stage = Play {
            machine: running(VCPUS, DEVICES),
            outstanding: Vec::new(),
            runs: [true; VCPUS],
            frozen: false,
            stale: false,
        };
        // What was asked for and neither done nor said to be late.
        let mut asked = false;
        for event in events {
            match event {
                Event::Pause => asked |= stage.machine.pause().is_ok(),
                Event::Resume => asked |= stage.machine.resume().is_ok(),
                Event::Reset => asked |= stage.machine.reset().is_ok(),
                Event::TimeIsUp => match stage.machine.time_is_up() {
                    // The machine would be stopped.
                    Some(Late::ResetFailed) => return Ok(()),
                    Some(_) => asked = false,
                    None => {}
                },
                Event::Answer(which) => if !stage.outstanding.is_empty() {
                    stage.answer(which % stage.outstanding.len());
                },
            }
            stage.carry_out();
            let state = stage.machine.state();
            let rests = matches!(state, State::Running | State::Paused);
            asked &= !rests;
            prop_assert!(!asked || stage.machine.awaited().is_some(), "{} for ever", state);
            prop_assert!(!rests || stage.machine.awaited().is_none());
        }
        while !stage.outstanding.is_empty() {
            stage.answer(stage.outstanding.len() - 1);
        }
        match stage.machine.state() {
            State::Running => prop_assert_eq!(stage.runs, [true; VCPUS]),
            State::Paused => prop_assert_eq!(stage.runs, [false; VCPUS]),
            other => prop_assert!(false, "it ends {}", other),
        }
        prop_assert!(stage.machine.pending().is_empty());
        prop_assert!(!stage.stale);
    }
}
