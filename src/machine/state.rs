//! The machine's states, as a pure state machine. Its one owner is the machine actor.
//!
//! ```text
//!              start            pause            all have answered
//!   CREATED ──────────▶ RUNNING ──────▶ PAUSING ────────────────▶ PAUSED
//!                        ▲ │             │  ▲                     │  │ ▲
//!                   they │ │      resume │  │ pause        resume │  │ │
//!               were let │ │             ▼  │                     │  │ │
//!                     go └─┼────────── RESUMING ◀─────────────────┘  │ │
//!                          │               │  ▲                      │ │
//!                    reset │         reset │  │ done, was running    │ │
//!                          │               ▼  │                reset │ │
//!                          └────────▶ RESETTING ◀────────────────────┘ │
//!                                          └───────────────────────────┘
//!                                                    done, was paused
//!
//!   CREATED, RUNNING, PAUSING, PAUSED, RESUMING, RESETTING ──fail──▶ INTERNAL ERROR
//!   all of these ──stop──▶ STOPPING ──stopped──▶ STOPPED
//! ```
//!
//! PAUSING and RESETTING last until every vCPU and every device has answered, RESUMING until the boot processor knows what
//! time it is (a moment, or none at all). A stuck device can make a pause last for ever: the machine then stays PAUSING with
//! everybody else at rest, and can be resumed or stopped. A reset that waits too long is given up before anything was
//! changed, and the machine goes on; later it waits for the guest to be loaded, however long that takes. A boot processor whose thread gets no processor keeps the machine RESUMING; it can be
//! paused, reset or stopped.

use std::fmt;

/// What a machine is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum State {
    /// Everything is there, nothing runs.
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs and devices are told to pause; not all have answered.
    Pausing,
    /// Nothing of the guest changes, and its time stands.
    Paused,
    /// Guest time goes on; vCPUs do as soon as the boot processor knows it.
    Resuming,
    /// On the way back to the state after power-on.
    Resetting,
    /// vCPUs are told to end.
    Stopping,
    /// Nothing runs any more.
    Stopped,
    /// A vCPU could not go on; the others are being stopped.
    InternalError,
}

/// What can happen to a machine as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transition {
    /// All vCPUs are ready.
    Start,
    /// Somebody wants it to stand still.
    Pause,
    /// Everybody stands still.
    Paused,
    /// Somebody wants it to go on.
    Resume,
    /// All vCPUs were told to go on.
    Resumed,
    /// Somebody wants it back at power-on.
    Reset,
    /// It is at power-on, or its reset was given up, and runs on.
    ResetRunning,
    /// It is at power-on, or its reset was given up, and stands still as it did before.
    ResetPaused,
    /// Somebody or something ends it.
    Stop,
    /// All vCPUs have ended, or are given up.
    Stopped,
    /// A vCPU cannot go on.
    Fail,
}

/// A transition that the state does not allow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a machine that is {0} {1}")]
pub struct Refused(pub State, pub Transition);

impl State {
    /// All of them.
    pub const ALL: [State; 9] = [
        State::Created,
        State::Running,
        State::Pausing,
        State::Paused,
        State::Resuming,
        State::Resetting,
        State::Stopping,
        State::Stopped,
        State::InternalError,
    ];

    /// The state after a transition.
    ///
    /// # Errors
    /// [`Refused`] when the state does not allow it; the state stays.
    pub fn after(self, transition: Transition) -> Result<State, Refused> {
        use State::*;
        match (self, transition) {
            (Created, Transition::Start) => Ok(Running),
            (Running | Resuming, Transition::Pause) => Ok(Pausing),
            (Pausing, Transition::Paused) => Ok(Paused),
            (Pausing | Paused, Transition::Resume) => Ok(Resuming),
            (Resuming, Transition::Resumed) => Ok(Running),
            (Running | Resuming | Paused, Transition::Reset) => Ok(Resetting),
            (Resetting, Transition::ResetRunning) => Ok(Resuming),
            (Resetting, Transition::ResetPaused) => Ok(Paused),
            (
                Created | Running | Pausing | Paused | Resuming | Resetting | InternalError,
                Transition::Stop,
            ) => Ok(Stopping),
            (Created | Running | Pausing | Paused | Resuming | Resetting, Transition::Fail) => {
                Ok(InternalError)
            }
            (Stopping, Transition::Stopped) => Ok(Stopped),
            _ => Err(Refused(self, transition)),
        }
    }

    /// From the number that it is published as; see [`State::ALL`].
    pub fn from_number(number: u8) -> Option<State> {
        State::ALL.get(usize::from(number)).copied()
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Created => "created",
            State::Running => "running",
            State::Pausing => "pausing",
            State::Paused => "paused",
            State::Resuming => "resuming",
            State::Resetting => "resetting",
            State::Stopping => "stopping",
            State::Stopped => "stopped",
            State::InternalError => "in internal error",
        })
    }
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transition::Start => "cannot be started",
            Transition::Pause => "cannot be paused",
            Transition::Paused => "cannot become paused",
            Transition::Resume => "cannot be resumed",
            Transition::Resumed => "cannot become running",
            Transition::Reset => "cannot be reset",
            Transition::ResetRunning | Transition::ResetPaused => "cannot come out of a reset",
            Transition::Stop => "cannot be stopped",
            Transition::Stopped => "cannot become stopped",
            Transition::Fail => "cannot fail",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::State::*;
    use super::*;

    #[test]
    fn every_pair_is_decided() {
        let allowed = [
            (Created, Transition::Start, Running),
            (Created, Transition::Stop, Stopping),
            (Created, Transition::Fail, InternalError),
            (Running, Transition::Pause, Pausing),
            (Running, Transition::Reset, Resetting),
            (Running, Transition::Stop, Stopping),
            (Running, Transition::Fail, InternalError),
            (Pausing, Transition::Paused, Paused),
            (Pausing, Transition::Resume, Resuming),
            (Pausing, Transition::Stop, Stopping),
            (Pausing, Transition::Fail, InternalError),
            (Paused, Transition::Resume, Resuming),
            (Paused, Transition::Reset, Resetting),
            (Paused, Transition::Stop, Stopping),
            (Paused, Transition::Fail, InternalError),
            (Resuming, Transition::Resumed, Running),
            (Resuming, Transition::Pause, Pausing),
            (Resuming, Transition::Reset, Resetting),
            (Resuming, Transition::Stop, Stopping),
            (Resuming, Transition::Fail, InternalError),
            (Resetting, Transition::ResetRunning, Resuming),
            (Resetting, Transition::ResetPaused, Paused),
            (Resetting, Transition::Stop, Stopping),
            (Resetting, Transition::Fail, InternalError),
            (InternalError, Transition::Stop, Stopping),
            (Stopping, Transition::Stopped, Stopped),
        ];
        for state in State::ALL {
            for transition in [
                Transition::Start,
                Transition::Pause,
                Transition::Paused,
                Transition::Resume,
                Transition::Resumed,
                Transition::Reset,
                Transition::ResetRunning,
                Transition::ResetPaused,
                Transition::Stop,
                Transition::Stopped,
                Transition::Fail,
            ] {
                let expected = allowed
                    .iter()
                    .find(|a| (a.0, a.1) == (state, transition))
                    .map(|a| a.2);
                assert_eq!(state.after(transition).ok(), expected, "{state} {transition:?}");
            }
        }
    }

    #[test]
    fn numbers_lead_back() {
        for state in State::ALL {
            assert_eq!(State::from_number(state as u8), Some(state));
        }
        assert_eq!(State::from_number(State::ALL.len() as u8), None);
    }
}
