//! Who wants the machine to stand still. Pure: the machine actor's own memory.
//!
//! A controller (`ctl pause`) and a debugger (gdb has stopped it) want it for reasons of their own. It stands for as long as
//! either does, and each takes back only what it asked for: a gdb that detaches, or is killed, does not let a machine go
//! that somebody has paused, and a `resume` does not pull one away under gdb.

use super::state::{Refused, State, Transition};

/// Somebody who can want it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Holder {
    /// Whoever controls the machine.
    Controller,
    /// A debugger.
    Debugger,
}

impl Holder {
    /// Both.
    pub const ALL: [Holder; 2] = [Holder::Controller, Holder::Debugger];

    /// For people, and for programs.
    pub fn name(self) -> &'static str {
        match self {
            Holder::Controller => "control",
            Holder::Debugger => "gdb",
        }
    }
}

/// What is to be done about a wish.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Have the machine pause, or resume.
    Begin,
    /// It is being paused already, for the other.
    Join,
    /// Nothing: it stands, and goes on doing so.
    Stands,
    /// The state does not allow it.
    Refused(Refused),
    /// Only the other has it stand still.
    NotYours(Holder),
}

/// A running machine, or one that is resuming, has no holder, one that is pausing or paused has at least one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Holds(u8);

impl Holds {
    /// From the number that it is published as.
    pub fn from_number(number: u8) -> Holds {
        Holds(number)
    }

    /// The number.
    pub fn number(self) -> u8 {
        self.0
    }

    /// Whether this one has the machine stand still.
    pub fn has(self, who: Holder) -> bool {
        self.0 & bit(who) != 0
    }

    /// Somebody wants it to stand still.
    pub fn pause(&mut self, who: Holder, state: State) -> Step {
        let step = match state {
            _ if self.has(who) => Step::Refused(Refused(state, Transition::Pause)),
            State::Running | State::Resuming => Step::Begin,
            State::Pausing => Step::Join,
            State::Paused => Step::Stands,
            _ => Step::Refused(Refused(state, Transition::Pause)),
        };
        if !matches!(step, Step::Refused(_)) {
            self.0 |= bit(who);
        }
        step
    }

    /// Somebody does not want it any more.
    pub fn resume(&mut self, who: Holder, state: State) -> Step {
        let stands = matches!(state, State::Pausing | State::Paused);
        let other = Holder::ALL
            .into_iter()
            .find(|other| *other != who && self.has(*other));
        match (self.has(who), other) {
            (true, other) if stands => {
                self.0 &= !bit(who);
                other.map_or(Step::Begin, |_| Step::Stands)
            }
            (false, Some(other)) if stands => Step::NotYours(other),
            _ => Step::Refused(Refused(state, Transition::Resume)),
        }
    }
}

fn bit(who: Holder) -> u8 {
    1 << who as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use Holder::{Controller, Debugger};

    #[test]
    fn it_goes_on_when_the_last_lets_go_in_whatever_order() {
        for (first, second) in [(Controller, Debugger), (Debugger, Controller)] {
            for (early, late) in [(Controller, Debugger), (Debugger, Controller)] {
                let mut holds = Holds::default();
                assert_eq!(holds.pause(first, State::Running), Step::Begin);
                assert_eq!(holds.pause(second, State::Paused), Step::Stands);
                assert_eq!(holds.resume(early, State::Paused), Step::Stands);
                assert_eq!(holds.resume(early, State::Paused), Step::NotYours(late));
                assert_eq!(holds.resume(late, State::Paused), Step::Begin);
                assert_eq!(holds, Holds::default());
            }
        }
    }

    #[test]
    fn who_comes_while_it_is_pausing_joins_and_may_leave_again() {
        let mut holds = Holds::default();
        assert_eq!(holds.pause(Debugger, State::Running), Step::Begin);
        assert_eq!(holds.pause(Controller, State::Pausing), Step::Join);
        assert_eq!(holds.resume(Controller, State::Pausing), Step::Stands);
        assert_eq!(holds.resume(Debugger, State::Pausing), Step::Begin);
    }

    #[test]
    fn what_is_refused_changes_nothing() {
        for who in Holder::ALL {
            let mut holds = Holds::default();
            for state in State::ALL {
                let refused = Step::Refused(Refused(state, Transition::Resume));
                assert_eq!(holds.resume(who, state), refused);
                if !matches!(
                    state,
                    State::Running | State::Resuming | State::Pausing | State::Paused
                ) {
                    let refused = Step::Refused(Refused(state, Transition::Pause));
                    assert_eq!(holds.pause(who, state), refused);
                }
                assert_eq!(holds, Holds::default());
            }
            assert_eq!(holds.pause(who, State::Running), Step::Begin);
            let refused = Step::Refused(Refused(State::Paused, Transition::Pause));
            assert_eq!(holds.pause(who, State::Paused), refused);
            // In the middle of a reset nobody is let go.
            let refused = Step::Refused(Refused(State::Resetting, Transition::Resume));
            assert_eq!(holds.resume(who, State::Resetting), refused);
            assert!(holds.has(who));
        }
    }
}
