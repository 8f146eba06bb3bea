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
//! Nobody is sent a second message that wants an answer before the first was answered, so a stuck one never has more
//! than one in its mailbox, however often somebody pauses and resumes: what it should be told next is decided when it
//! answers.
//!
//! The boot processor's clock comes before any vCPU runs, because all of them may read it (`vcpu/guest_clock.rs`). A resume is
//! done when all have been told to run; another wish that comes before overtakes it.

use super::state::{Refused, State, Transition};
use crate::actors::Lifecycle;

/// What the machine actor is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Send to a vCPU; Pause and Reset are answered.
    Vcpu(usize, Lifecycle),
    /// Tell the boot processor, which is paused, that guest time goes on; answered.
    TakeTime,
    /// Send to a device; all but Start are answered.
    Device(usize, Lifecycle),
    /// Guest time stands from now on.
    FreezeTime,
    /// Guest time goes on.
    ThawTime,
    /// Put back everything that is neither a vCPU nor a device, and load the guest; then [`Conductor::reloaded`].
    Reload,
    /// What somebody asked for is done.
    Done,
    /// The reset was given up before anything was changed; the machine goes on as it was.
    ResetGivenUp,
    /// Somebody does not answer, and the machine can neither go back nor forth.
    ResetFailed,
}

/// Where one vCPU is, as far as the machine knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum VcpuIs {
    Running,
    /// Pause was sent.
    Asked,
    Paused,
    /// Reset was sent.
    Resetting,
    /// Is told what time it is; when it has answered, all go on together.
    TakingTime,
}

/// Where one device is, as far as the machine knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct DeviceIs {
    /// What it was told last.
    told: Lifecycle,
    /// It has not answered that.
    waits: bool,
    /// What it should have been told by now.
    wanted: Lifecycle,
    /// It died, and answers nothing any more.
    gone: bool,
}

impl DeviceIs {
    fn is_settled(&self) -> bool {
        self.gone || (!self.waits && self.told == self.wanted)
    }
}

/// How far a pause or a reset is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    PauseVcpus,
    PauseDevices,
    ResetDevices,
    Reload,
    ResetVcpus,
}

/// What is being done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Passage {
    stage: Stage,
    /// A reset; whether the machine runs afterwards.
    reset: Option<bool>,
    /// The time was up, and who did not answer is not waited for with the next stage.
    late: bool,
}

/// Somebody who has not answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pending {
    /// A vCPU, and what it was sent.
    Vcpu(usize, Lifecycle),
    /// A device, and what it was sent.
    Device(usize, Lifecycle),
    /// Loading the guest.
    Reload,
}

/// The machine's state, and what everybody was told.
pub struct Conductor {
    state: State,
    vcpus: Vec<VcpuIs>,
    devices: Vec<DeviceIs>,
    passage: Option<Passage>,
    frozen: bool,
    /// What somebody asked for is done as soon as the boot processor knows what time it is.
    almost_done: bool,
    effects: Vec<Effect>,
}

impl Conductor {
    /// A machine that was created, with so many vCPUs and devices.
    pub fn new(vcpus: usize, devices: usize) -> Conductor {
        Conductor {
            state: State::Created,
            vcpus: vec![VcpuIs::Running; vcpus],
            devices: vec![
                DeviceIs {
                    told: Lifecycle::Start,
                    waits: false,
                    wanted: Lifecycle::Start,
                    gone: false,
                };
                devices
            ],
            passage: None,
            frozen: false,
            almost_done: false,
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

    /// Whether somebody has been told something and the time that he has for it should be limited.
    pub fn is_under_way(&self) -> bool {
        self.passage
            .is_some_and(|passage| !passage.late && passage.stage != Stage::Reload)
    }

    /// Who has not answered.
    pub fn pending(&self) -> Vec<Pending> {
        let vcpus = self.vcpus.iter().enumerate().filter_map(|(index, is)| match is {
            VcpuIs::Asked => Some(Pending::Vcpu(index, Lifecycle::Pause)),
            VcpuIs::Resetting => Some(Pending::Vcpu(index, Lifecycle::Reset)),
            VcpuIs::TakingTime => Some(Pending::Vcpu(index, Lifecycle::Resume)),
            VcpuIs::Running | VcpuIs::Paused => None,
        });
        let devices = self.devices.iter().enumerate();
        let devices = devices
            .filter(|(_, device)| device.waits && !device.gone)
            .map(|(index, device)| Pending::Device(index, device.told));
        let reload = self
            .passage
            .filter(|passage| passage.stage == Stage::Reload)
            .map(|_| Pending::Reload);
        vcpus.chain(devices).chain(reload).collect()
    }

    /// A transition without effects of its own: start, stop, stopped, fail.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn go(&mut self, transition: Transition) -> Result<(), Refused> {
        self.state = self.state.after(transition)?;
        match transition {
            Transition::Start => {
                let devices = 0..self.devices.len();
                self.effects
                    .extend(devices.map(|device| Effect::Device(device, Lifecycle::Start)));
                let vcpus = 0..self.vcpus.len();
                self.effects
                    .extend(vcpus.map(|vcpu| Effect::Vcpu(vcpu, Lifecycle::Start)));
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
        self.begin(None);
        Ok(())
    }

    /// Somebody wants it to go on, be it paused or on the way there.
    ///
    /// # Errors
    /// [`Refused`] when it is neither.
    pub fn resume(&mut self) -> Result<(), Refused> {
        self.state = self.state.after(Transition::Resume)?;
        self.passage = None;
        self.run_on();
        self.done();
        Ok(())
    }

    /// Somebody wants it back at power-on.
    ///
    /// # Errors
    /// [`Refused`] when it neither runs nor is paused.
    pub fn reset(&mut self) -> Result<(), Refused> {
        let running = self.state == State::Running;
        self.state = self.state.after(Transition::Reset)?;
        self.begin(Some(running));
        Ok(())
    }

    /// What somebody asked for is done, or will be when the machine runs.
    fn done(&mut self) {
        self.almost_done = self.state == State::Running && self.vcpus[0] == VcpuIs::TakingTime;
        if !self.almost_done {
            self.effects.push(Effect::Done);
        }
    }

    fn begin(&mut self, reset: Option<bool>) {
        self.almost_done = false;
        self.passage = Some(Passage {
            stage: Stage::PauseVcpus,
            reset,
            late: false,
        });
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            // One that was asked before, for a pause that was taken back, answers that.
            if *vcpu == VcpuIs::Running {
                *vcpu = VcpuIs::Asked;
                self.effects.push(Effect::Vcpu(index, Lifecycle::Pause));
            }
        }
        self.advance();
    }

    /// A vCPU stands still.
    pub fn vcpu_paused(&mut self, index: usize) {
        if self.vcpus[index] != VcpuIs::Asked {
            return;
        }
        self.vcpus[index] = VcpuIs::Paused;
        match self.state {
            // Nobody wants that any more.
            State::Running => self.wake_vcpus(),
            _ => self.advance(),
        }
    }

    /// The boot processor knows what time it is.
    pub fn time_taken(&mut self) {
        if self.vcpus[0] != VcpuIs::TakingTime {
            return;
        }
        self.vcpus[0] = VcpuIs::Paused;
        match self.state {
            State::Running => {
                self.wake_vcpus();
                if std::mem::take(&mut self.almost_done) {
                    self.effects.push(Effect::Done);
                }
            }
            // Somebody wants it to stand still again, which it does.
            _ => self.advance(),
        }
    }

    /// A vCPU is at power-on.
    pub fn vcpu_reset(&mut self, index: usize) {
        if self.vcpus[index] == VcpuIs::Resetting {
            self.vcpus[index] = VcpuIs::Paused;
            self.advance();
        }
    }

    /// A device has handled the last lifecycle message that was sent to it.
    pub fn device_done(&mut self, index: usize) {
        let device = &mut self.devices[index];
        if !std::mem::take(&mut device.waits) {
            return;
        }
        self.catch_up(index);
        self.advance();
    }

    /// A device died.
    pub fn device_gone(&mut self, index: usize) {
        self.devices[index].gone = true;
        self.advance();
    }

    /// Interrupt controllers and memory are at power-on, and the guest is loaded.
    pub fn reloaded(&mut self) {
        let Some(passage) = self
            .passage
            .as_mut()
            .filter(|passage| passage.stage == Stage::Reload)
        else {
            return;
        };
        passage.stage = Stage::ResetVcpus;
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            *vcpu = VcpuIs::Resetting;
            self.effects.push(Effect::Vcpu(index, Lifecycle::Reset));
        }
        self.advance();
    }

    /// The time for a stage is up.
    pub fn time_is_up(&mut self) {
        let Some(passage) = self.passage.as_mut() else {
            return;
        };
        passage.late = true;
        let Passage { stage, reset, .. } = *passage;
        match (stage, reset) {
            // All others shall stand still, whoever is stuck.
            (Stage::PauseVcpus, None) => {
                self.tell_devices(Lifecycle::Pause, Stage::PauseDevices);
                self.freeze();
                self.advance();
            }
            (Stage::PauseDevices, None) => self.freeze(),
            (Stage::PauseVcpus | Stage::PauseDevices, Some(running)) => {
                self.passage = None;
                self.finish_reset(running);
                self.effects.push(Effect::ResetGivenUp);
            }
            (Stage::ResetDevices | Stage::ResetVcpus, _) => self.effects.push(Effect::ResetFailed),
            (Stage::Reload, _) => {}
        }
    }

    /// Goes to the next stage when all who are waited for have answered.
    fn advance(&mut self) {
        while let Some(passage) = self.passage {
            let vcpus = self.vcpus.iter().all(|vcpu| *vcpu == VcpuIs::Paused);
            let devices = self.devices.iter().all(DeviceIs::is_settled);
            match passage.stage {
                Stage::PauseVcpus if vcpus => self.tell_devices(Lifecycle::Pause, Stage::PauseDevices),
                Stage::PauseDevices if vcpus && devices => {
                    self.freeze();
                    match passage.reset {
                        None => {
                            self.passage = None;
                            self.take(Transition::Paused);
                            self.effects.push(Effect::Done);
                        }
                        Some(_) => self.tell_devices(Lifecycle::Reset, Stage::ResetDevices),
                    }
                }
                Stage::ResetDevices if devices => {
                    self.stage(Stage::Reload);
                    self.effects.push(Effect::Reload);
                    return;
                }
                Stage::ResetVcpus if vcpus => {
                    self.passage = None;
                    self.finish_reset(passage.reset == Some(true));
                    self.done();
                }
                _ => return,
            }
        }
    }

    /// Out of RESETTING, to what the machine did before.
    fn finish_reset(&mut self, running: bool) {
        if running {
            self.take(Transition::ResetRunning);
            self.run_on();
        } else {
            self.take(Transition::ResetPaused);
        }
    }

    /// What the stages themselves make sure is allowed.
    fn take(&mut self, transition: Transition) {
        self.state = self.state.after(transition).expect("a stage fits its state");
    }

    fn stage(&mut self, stage: Stage) {
        if let Some(passage) = &mut self.passage {
            passage.stage = stage;
        }
    }

    fn tell_devices(&mut self, event: Lifecycle, stage: Stage) {
        self.stage(stage);
        for index in 0..self.devices.len() {
            self.devices[index].wanted = event;
            self.catch_up(index);
        }
    }

    /// Tells a device what it should know, if it has answered what it was told before.
    fn catch_up(&mut self, index: usize) {
        let device = &mut self.devices[index];
        if !device.waits && !device.gone && device.told != device.wanted {
            device.told = device.wanted;
            device.waits = true;
            self.effects.push(Effect::Device(index, device.wanted));
        }
    }

    fn freeze(&mut self) {
        if !std::mem::replace(&mut self.frozen, true) {
            self.effects.push(Effect::FreezeTime);
        }
    }

    /// Guest time, devices, vCPUs.
    fn run_on(&mut self) {
        let stood = std::mem::take(&mut self.frozen);
        if stood {
            self.effects.push(Effect::ThawTime);
        }
        for index in 0..self.devices.len() {
            let device = &mut self.devices[index];
            // One that was never told to pause need not be told to go on.
            if device.told != Lifecycle::Start {
                device.wanted = Lifecycle::Resume;
                self.catch_up(index);
            } else {
                device.wanted = Lifecycle::Start;
            }
        }
        // One that is alone has nobody who reads its clock before it runs.
        if stood && self.vcpus.len() > 1 && self.vcpus[0] == VcpuIs::Paused {
            self.vcpus[0] = VcpuIs::TakingTime;
            self.effects.push(Effect::TakeTime);
        }
        self.wake_vcpus();
    }

    /// All that stand still go on, unless the boot processor's clock is not right yet.
    fn wake_vcpus(&mut self) {
        if self.vcpus[0] == VcpuIs::TakingTime {
            return;
        }
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            if *vcpu == VcpuIs::Paused {
                *vcpu = VcpuIs::Running;
                self.effects.push(Effect::Vcpu(index, Lifecycle::Resume));
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(machine.effects(), [ThawTime, TakeTime]);
        // A pause that comes first finds everybody standing, and waits for the one that is busy.
        machine.pause().unwrap();
        assert_eq!((machine.effects(), machine.state()), (vec![], State::Pausing));
        assert_eq!(machine.pending(), [Pending::Vcpu(0, Resume)]);
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
        assert_eq!(machine.effects(), []);
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
            machine.reloaded();
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
        machine.time_is_up();
        assert_eq!(machine.effects(), [Vcpu(0, Resume), ResetGivenUp]);
        assert_eq!(machine.state(), State::Running);
        machine.vcpu_paused(1);
        assert_eq!(machine.effects(), [Vcpu(1, Resume)]);
    }

    #[test]
    fn a_device_that_does_not_come_back_from_its_reset_fails_the_machine() {
        let mut machine = paused(1, 1);
        machine.reset().unwrap();
        machine.effects();
        machine.time_is_up();
        assert_eq!(machine.effects(), [ResetFailed]);
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
        machine.time_is_up();
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

    proptest! {
        /// Whatever happens in whatever order: nobody has two messages to answer, no vCPU runs while the machine is
        /// paused, none is reset while it runs, time stands exactly while it should; and when everybody answers in the
        /// end, all come to rest as the machine's state says.
        #[test]
        fn any_order_of_events_ends_well(events in prop::collection::vec(event(), 0..200)) {
            const VCPUS: usize = 3;
            const DEVICES: usize = 2;
            let mut machine = running(VCPUS, DEVICES);
            let mut outstanding: Vec<Effect> = Vec::new();
            let mut runs = [true; VCPUS];
            let mut frozen = false;
            let mut failed = false;
            let mut carry_out = |machine: &mut Conductor, outstanding: &mut Vec<Effect>, runs: &mut [bool; VCPUS]| {
                for effect in machine.effects() {
                    match effect {
                        Vcpu(index, Resume | Start) => {
                            assert!(!outstanding.contains(&TakeTime));
                            runs[index] = true;
                        }
                        TakeTime => {
                            assert!(!runs[0] && !frozen);
                            let busy = |other: &Effect| matches!(other, Vcpu(0, _) | TakeTime);
                            assert!(!outstanding.iter().any(busy));
                            outstanding.push(effect);
                        }
                        Vcpu(index, event) => {
                            assert!(!outstanding.iter().any(|other| matches!(other, Vcpu(who, _) if *who == index)));
                            assert!(index > 0 || !outstanding.contains(&TakeTime));
                            assert!(event == Pause || !runs[index]);
                            outstanding.push(effect);
                        }
                        Device(_, Start) => {}
                        Device(index, event) => {
                            assert!(!outstanding.iter().any(|other| matches!(other, Device(who, _) if *who == index)));
                            assert!(event != Reset || runs == &[false; VCPUS]);
                            outstanding.push(effect);
                        }
                        Reload => outstanding.push(effect),
                        FreezeTime => assert!(!std::mem::replace(&mut frozen, true)),
                        ThawTime => assert!(std::mem::take(&mut frozen)),
                        Done | ResetGivenUp => {}
                        ResetFailed => failed = true,
                    }
                }
                match machine.state() {
                    State::Paused => assert!(frozen && runs == &[false; VCPUS]),
                    State::Running => assert!(!frozen),
                    _ => {}
                }
                failed
            };
            let answer = |machine: &mut Conductor, effect, runs: &mut [bool; VCPUS]| match effect {
                Vcpu(index, Pause) => {
                    runs[index] = false;
                    machine.vcpu_paused(index);
                }
                Vcpu(index, _) => machine.vcpu_reset(index),
                TakeTime => machine.time_taken(),
                Device(index, _) => machine.device_done(index),
                _ => machine.reloaded(),
            };
            for event in events {
                match event {
                    Event::Pause => drop(machine.pause()),
                    Event::Resume => drop(machine.resume()),
                    Event::Reset => drop(machine.reset()),
                    Event::TimeIsUp => if machine.is_under_way() { machine.time_is_up() },
                    Event::Answer(which) => if !outstanding.is_empty() {
                        let effect = outstanding.remove(which % outstanding.len());
                        answer(&mut machine, effect, &mut runs);
                    },
                }
                if carry_out(&mut machine, &mut outstanding, &mut runs) {
                    // The machine would be stopped.
                    return Ok(());
                }
            }
            while let Some(effect) = outstanding.pop() {
                answer(&mut machine, effect, &mut runs);
                carry_out(&mut machine, &mut outstanding, &mut runs);
            }
            match machine.state() {
                State::Running => prop_assert_eq!(runs, [true; VCPUS]),
                State::Paused => prop_assert_eq!(runs, [false; VCPUS]),
                other => prop_assert!(false, "it ends {}", other),
            }
            prop_assert!(machine.pending().is_empty());
        }
    }
}
