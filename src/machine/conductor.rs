//! How a machine is paused, resumed and reset: who is told what, in which order, and when it is done. Pure: no thread,
//! no clock; the machine actor carries out the [`Effect`]s and brings the answers.
//!
//! ```text
//!  pause    vCPUs, all at once ─▶ devices ─▶ guest time          (paused)
//!  resume   guest time ─▶ devices ─▶ the boot processor's clock ─▶ vCPUs    (running)
//!  reset    as pause ─▶ devices at power-on ─▶ interrupt controllers, memory, the guest loaded anew
//!           ─▶ vCPUs at power-on ─▶ as resume, if it was running
//! ```
//!
//! The order is that of dependency: a vCPU uses devices, and a device uses guest time. When all vCPUs have answered, no
//! access is half done, and when a device has answered, everything that was sent to it before has been handled.
//!
//! **Each stage has its time**, whoever has to be told for it and whoever only has to answer what he was told before: a
//! stage whose answers are waited for has a number ([`Conductor::awaited`]), and another number is another limit. When that
//! is over ([`Conductor::time_is_up`]) whoever asked hears whom the machine waits for. A pause goes on with all the
//! others then, a resume waits, and so does a reset for the guest to be loaded; otherwise it is given up, if nothing was
//! changed yet.
//!
//! **The boot processor's clock** comes before any vCPU runs, because all of them may read it (`vcpu/guest_clock.rs`), and
//! only the boot processor itself can set it right. So guest time stands only while the boot processor does: it can be told
//! when time goes on, and nobody has to wait for one that is stuck in an access. A pause that is late because of the boot
//! processor does not stop guest time before that has answered.

use super::state::{Refused, State, Transition};
use crate::actors::Lifecycle;
use crate::simulation::{Planted, planted};
use roll::Roll;
use std::fmt;

mod roll;
#[cfg(test)]
mod tests;

/// What the machine actor is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Send to a vCPU; Pause and Reset are answered.
    Vcpu(usize, Lifecycle),
    /// Tell the boot processor, which is paused, that guest time goes on; answered.
    TakeTime,
    /// Send to a device; answered.
    Device(usize, Lifecycle),
    /// Guest time stands from now on.
    FreezeTime,
    /// Guest time goes on.
    ThawTime,
    /// Put back everything that is neither a vCPU nor a device, and load the guest; then [`Conductor::reloaded`].
    Reload,
    /// What somebody asked for is done.
    Done,
}

/// Somebody who has not answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pending {
    /// A vCPU, and what it was sent.
    Vcpu(usize, Lifecycle),
    /// The boot processor, which was told that guest time goes on.
    Time,
    /// A device, and what it was sent.
    Device(usize, Lifecycle),
    /// Loading the guest.
    Reload,
}

/// What was not done in its time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Late {
    /// A pause; all who can stand still do, and it is complete when the others have answered.
    Pause,
    /// A resume; it is complete when the boot processor has answered.
    Resume,
    /// A reset, which was given up before anything was changed; the machine goes on as it was.
    Reset,
    /// A reset in the middle, which goes on when the guest is loaded: files may be slow.
    Reload,
    /// A reset in the middle: the machine can neither go back nor forth.
    ResetFailed,
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Late::Pause => "a pause is not complete",
            Late::Resume => "a resume is not complete",
            Late::Reset => "a reset was given up",
            Late::Reload => "a reset is not complete",
            Late::ResetFailed => "a reset has failed",
        })
    }
}

/// What is being done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Goal {
    Pause,
    Resume,
    /// Whether the machine runs afterwards.
    Reset {
        runs: bool,
    },
}

/// How far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    PauseVcpus,
    PauseDevices,
    ResetDevices,
    Reload,
    ResetVcpus,
    TakeTime,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Passage {
    goal: Goal,
    stage: Stage,
    /// The time was up, and whom it waits for was said: it has no other limit.
    late: bool,
}

/// The machine's state, and what everybody was told.
pub struct Conductor {
    state: State,
    roll: Roll,
    passage: Option<Passage>,
    /// How many stages there were.
    stages: u64,
    /// Guest time stands. Then the boot processor does, too.
    frozen: bool,
    effects: Vec<Effect>,
}

impl Conductor {
    /// A machine that was created, with so many vCPUs and devices.
    pub fn new(vcpus: usize, devices: usize) -> Conductor {
        Conductor {
            state: State::Created,
            roll: Roll::new(vcpus, devices),
            passage: None,
            stages: 0,
            frozen: false,
            effects: Vec::new(),
        }
    }

    /// The machine's state.
    pub fn state(&self) -> State {
        self.state
    }

    /// What is to be done now, in this order. Empty until the next event.
    pub fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// The number of the stage whose answers are waited for with a limit; another number is another limit. `None`: nobody
    /// is waited for, or it was said that it takes long.
    pub fn awaited(&self) -> Option<u64> {
        self.passage.filter(|passage| !passage.late).map(|_| self.stages)
    }

    /// Who has not answered.
    pub fn pending(&self) -> Vec<Pending> {
        let passage = self.passage.filter(|passage| passage.stage == Stage::Reload);
        let reload = passage.map(|_| Pending::Reload);
        self.roll.pending().chain(reload).collect()
    }

    /// A transition without effects of its own: start, stop, stopped, fail.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn go(&mut self, transition: Transition) -> Result<(), Refused> {
        self.state = self.state.after(transition)?;
        match transition {
            Transition::Start => {
                // Devices do what they are asked from the first.
                let vcpu = |vcpu| Effect::Vcpu(vcpu, Lifecycle::Start);
                self.effects.extend((0..self.roll.vcpus()).map(vcpu));
            }
            Transition::Stop | Transition::Fail => {
                self.passage = None;
                self.effects.clear();
            }
            _ => {}
        }
        Ok(())
    }

    /// Somebody wants the machine to stand still.
    ///
    /// # Errors
    /// [`Refused`] when it does not run.
    pub fn pause(&mut self) -> Result<(), Refused> {
        self.state = self.state.after(Transition::Pause)?;
        self.stand_still(Goal::Pause);
        Ok(())
    }

    /// Somebody wants it to go on, be it paused or on the way there.
    ///
    /// # Errors
    /// [`Refused`] when it is neither.
    pub fn resume(&mut self) -> Result<(), Refused> {
        self.state = self.state.after(Transition::Resume)?;
        self.run_on();
        self.advance();
        Ok(())
    }

    /// Somebody wants it back at power-on.
    ///
    /// # Errors
    /// [`Refused`] when it neither runs nor is paused.
    pub fn reset(&mut self) -> Result<(), Refused> {
        let runs = self.state != State::Paused;
        self.state = self.state.after(Transition::Reset)?;
        self.stand_still(Goal::Reset { runs });
        Ok(())
    }

    fn stand_still(&mut self, goal: Goal) {
        self.begin(goal, Stage::PauseVcpus);
        self.roll.pause_vcpus(&mut self.effects);
        self.advance();
    }

    /// A vCPU stands still.
    pub fn vcpu_paused(&mut self, index: usize) {
        if self.roll.vcpu_paused(index) {
            if self.state == State::Running {
                // Nobody wants that any more.
                self.roll.resume_vcpus(&mut self.effects);
            }
            self.advance();
        }
    }

    /// The boot processor knows what time it is.
    pub fn time_taken(&mut self) {
        if self.roll.time_taken() {
            self.advance();
        }
    }

    /// A vCPU is at power-on.
    pub fn vcpu_reset(&mut self, index: usize) {
        if self.roll.vcpu_reset(index) {
            self.advance();
        }
    }

    /// A device has handled the last lifecycle message that was sent to it.
    pub fn device_done(&mut self, index: usize) {
        if self.roll.device_done(index, &mut self.effects) {
            self.advance();
        }
    }

    /// A device died.
    pub fn device_gone(&mut self, index: usize) {
        self.roll.device_gone(index);
        self.advance();
    }

    /// Interrupt controllers and memory are at power-on, and the guest is loaded.
    pub fn reloaded(&mut self) {
        if let Some(passage) = self.passage.filter(|passage| passage.stage == Stage::Reload) {
            self.begin(passage.goal, Stage::ResetVcpus);
            self.roll.reset_vcpus(&mut self.effects);
            self.advance();
        }
    }

    /// The time for a stage is up. What was late, if anything still is.
    pub fn time_is_up(&mut self) -> Option<Late> {
        self.awaited()?;
        let passage = self.passage.as_mut()?;
        passage.late = true;
        let Passage { goal, stage, .. } = *passage;
        match (stage, goal) {
            (Stage::ResetDevices | Stage::ResetVcpus, _) => return Some(Late::ResetFailed),
            (Stage::Reload, _) => return Some(Late::Reload),
            // All others shall stand still, whoever is stuck.
            (Stage::PauseVcpus, Goal::Pause) => self.tell_devices(Lifecycle::Pause, Stage::PauseDevices),
            (_, Goal::Reset { .. }) => self.leave_reset(goal),
            _ => {}
        }
        self.advance();
        Some(match goal {
            Goal::Pause => Late::Pause,
            Goal::Resume => Late::Resume,
            Goal::Reset { .. } => Late::Reset,
        })
    }

    /// Goes to the next stage when all who are waited for have answered.
    fn advance(&mut self) {
        while let Some(Passage { goal, stage, late }) = self.passage {
            let vcpus = self.roll.vcpus_stand();
            let devices = self.roll.devices_settled();
            if late && goal == Goal::Pause && (self.roll.boot_stands() || planted(Planted::FrozenEarly)) {
                self.freeze();
            }
            match stage {
                Stage::PauseVcpus if vcpus => self.tell_devices(Lifecycle::Pause, Stage::PauseDevices),
                Stage::PauseDevices if vcpus && devices => {
                    self.freeze();
                    if goal == Goal::Pause {
                        self.finish(Transition::Paused);
                    } else {
                        self.tell_devices(Lifecycle::Reset, Stage::ResetDevices);
                    }
                }
                Stage::ResetDevices if devices => {
                    self.next(Stage::Reload);
                    self.effects.push(Effect::Reload);
                    return;
                }
                Stage::ResetVcpus if vcpus => self.leave_reset(goal),
                Stage::TakeTime if !self.roll.takes_time() => {
                    self.roll.resume_vcpus(&mut self.effects);
                    self.finish(Transition::Resumed);
                }
                _ => return,
            }
        }
    }

    /// Out of RESETTING, to what the machine did before.
    fn leave_reset(&mut self, goal: Goal) {
        if goal == (Goal::Reset { runs: false }) {
            self.finish(Transition::ResetPaused);
        } else {
            self.take(Transition::ResetRunning);
            self.run_on();
        }
    }

    /// Guest time, devices, the boot processor's clock.
    fn run_on(&mut self) {
        self.begin(Goal::Resume, Stage::TakeTime);
        let stood = std::mem::take(&mut self.frozen);
        if stood {
            self.effects.push(Effect::ThawTime);
        }
        self.roll.resume_devices(&mut self.effects);
        if stood {
            self.roll.take_time(&mut self.effects);
        }
    }

    /// What somebody asked for is done.
    fn finish(&mut self, transition: Transition) {
        self.passage = None;
        self.take(transition);
        self.effects.push(Effect::Done);
    }

    /// What the stages themselves make sure is allowed.
    fn take(&mut self, transition: Transition) {
        self.state = self.state.after(transition).expect("a stage fits its state");
    }

    fn begin(&mut self, goal: Goal, stage: Stage) {
        self.stages += 1;
        self.passage = Some(Passage {
            goal,
            stage,
            late: false,
        });
    }

    /// The next stage, with time of its own, unless whoever waits knows already that it is late.
    fn next(&mut self, stage: Stage) {
        self.stages += 1;
        if let Some(passage) = &mut self.passage {
            passage.stage = stage;
        }
    }

    fn tell_devices(&mut self, event: Lifecycle, stage: Stage) {
        self.next(stage);
        self.roll.tell_devices(event, &mut self.effects);
    }

    fn freeze(&mut self) {
        if !std::mem::replace(&mut self.frozen, true) {
            self.effects.push(Effect::FreezeTime);
        }
    }
}
