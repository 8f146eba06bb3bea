//! The machine's states, as a pure state machine. Its one owner is the machine actor.
//!
//! ```text
//!  CREATED ──start──▶ RUNNING ──stop──▶ STOPPING ──stopped──▶ STOPPED
//!     │                  │                 ▲
//!     │                  └─fail─▶ INTERNAL ─┤ stop
//!     └───────────────────────── ERROR     │
//!     └──────────────────stop──────────────┘
//! ```

use std::fmt;

/// What a machine is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Everything is there, nothing runs.
    Created,
    /// vCPUs run.
    Running,
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
    /// Somebody or something ends it.
    Stop,
    /// All vCPUs have ended, or are given up.
    Stopped,
    /// A vCPU cannot go on.
    Fail,
}

/// A transition that the state does not allow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a machine that is {0} cannot {1:?}")]
pub struct Refused(pub State, pub Transition);

impl State {
    /// The state after a transition.
    ///
    /// # Errors
    /// [`Refused`] when the state does not allow it; the state stays.
    pub fn after(self, transition: Transition) -> Result<State, Refused> {
        use State::*;
        match (self, transition) {
            (Created, Transition::Start) => Ok(Running),
            (Created | Running | InternalError, Transition::Stop) => Ok(Stopping),
            (Created | Running, Transition::Fail) => Ok(InternalError),
            (Stopping, Transition::Stopped) => Ok(Stopped),
            _ => Err(Refused(self, transition)),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Created => "created",
            State::Running => "running",
            State::Stopping => "stopping",
            State::Stopped => "stopped",
            State::InternalError => "in internal error",
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
            (Running, Transition::Stop, Stopping),
            (Running, Transition::Fail, InternalError),
            (InternalError, Transition::Stop, Stopping),
            (Stopping, Transition::Stopped, Stopped),
        ];
        for state in [Created, Running, Stopping, Stopped, InternalError] {
            for transition in [
                Transition::Start,
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
}
