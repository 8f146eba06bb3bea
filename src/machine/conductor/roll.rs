//! Where every vCPU and every device is, as far as the machine knows: what it was told last, and whether it has answered.
//!
//! Nobody is sent a second message that wants an answer before the first was answered, so a stuck one never has more
//! than one in its mailbox, however often somebody pauses and resumes: what it should be told next is decided when it
//! answers.

use super::{Effect, Pending};
use crate::actors::Lifecycle;
use crate::simulation::{Planted, planted};

/// Where one vCPU is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum VcpuIs {
    Running,
    /// Pause was sent.
    Asked,
    Paused,
    /// Reset was sent.
    Resetting,
    /// Stands still, and is told what time it is.
    TakingTime,
}

/// Where one device is.
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

/// The boot processor.
const BOOT: usize = 0;

/// All of them.
pub(super) struct Roll {
    vcpus: Vec<VcpuIs>,
    devices: Vec<DeviceIs>,
}

impl Roll {
    /// All run, or will when they are started.
    pub(super) fn new(vcpus: usize, devices: usize) -> Roll {
        let device = DeviceIs {
            told: Lifecycle::Start,
            waits: false,
            wanted: Lifecycle::Start,
            gone: false,
        };
        Roll {
            vcpus: vec![VcpuIs::Running; vcpus],
            devices: vec![device; devices],
        }
    }

    /// How many vCPUs there are.
    pub(super) fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Who has not answered.
    pub(super) fn pending(&self) -> impl Iterator<Item = Pending> {
        let vcpus = self.vcpus.iter().enumerate().filter_map(|(index, is)| match is {
            VcpuIs::Asked => Some(Pending::Vcpu(index, Lifecycle::Pause)),
            VcpuIs::Resetting => Some(Pending::Vcpu(index, Lifecycle::Reset)),
            VcpuIs::TakingTime => Some(Pending::Time),
            VcpuIs::Running | VcpuIs::Paused => None,
        });
        let devices = self.devices.iter().enumerate();
        let devices = devices
            .filter(|(_, device)| device.waits && !device.gone)
            .map(|(index, device)| Pending::Device(index, device.told));
        vcpus.chain(devices)
    }

    /// All vCPUs stand still, and know what they were told.
    pub(super) fn vcpus_stand(&self) -> bool {
        self.vcpus.iter().all(|vcpu| *vcpu == VcpuIs::Paused)
    }

    /// The boot processor does.
    pub(super) fn boot_stands(&self) -> bool {
        self.vcpus[BOOT] == VcpuIs::Paused
    }

    /// The boot processor has been told what time it is and has not answered.
    pub(super) fn takes_time(&self) -> bool {
        self.vcpus[BOOT] == VcpuIs::TakingTime
    }

    /// All devices have answered what they should have been told, but those that died.
    pub(super) fn devices_settled(&self) -> bool {
        let mut devices = self.devices.iter();
        devices.all(|device| device.gone || (!device.waits && device.told == device.wanted))
    }

    /// Tells all vCPUs that run to pause.
    pub(super) fn pause_vcpus(&mut self, effects: &mut Vec<Effect>) {
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            // One that was asked before, for a pause that was taken back, answers that.
            if *vcpu == VcpuIs::Running {
                *vcpu = VcpuIs::Asked;
                effects.push(Effect::Vcpu(index, Lifecycle::Pause));
            }
        }
    }

    /// All vCPUs, which stand still, to power-on.
    pub(super) fn reset_vcpus(&mut self, effects: &mut Vec<Effect>) {
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            *vcpu = VcpuIs::Resetting;
            effects.push(Effect::Vcpu(index, Lifecycle::Reset));
        }
    }

    /// Tells the boot processor, which stands still, what time it is, if anybody else will look at its clock.
    pub(super) fn take_time(&mut self, effects: &mut Vec<Effect>) {
        // One that is alone has nobody who reads its clock before it runs.
        if self.vcpus.len() > 1 && self.boot_stands() && !planted(Planted::NoTakeTime) {
            self.vcpus[BOOT] = VcpuIs::TakingTime;
            effects.push(Effect::TakeTime);
        }
    }

    /// All vCPUs that stand still go on.
    pub(super) fn resume_vcpus(&mut self, effects: &mut Vec<Effect>) {
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            if *vcpu == VcpuIs::Paused {
                *vcpu = VcpuIs::Running;
                effects.push(Effect::Vcpu(index, Lifecycle::Resume));
            }
        }
    }

    fn answered(&mut self, index: usize, waits: VcpuIs) -> bool {
        let vcpu = &mut self.vcpus[index];
        let is = *vcpu == waits;
        if is {
            *vcpu = VcpuIs::Paused;
        }
        is
    }

    /// A vCPU stands still. `false`: nobody has told it to.
    pub(super) fn vcpu_paused(&mut self, index: usize) -> bool {
        self.answered(index, VcpuIs::Asked)
    }

    /// A vCPU is at power-on. `false`: nobody has told it to be.
    pub(super) fn vcpu_reset(&mut self, index: usize) -> bool {
        self.answered(index, VcpuIs::Resetting)
    }

    /// The boot processor knows what time it is. `false`: nobody has told it.
    pub(super) fn time_taken(&mut self) -> bool {
        self.answered(BOOT, VcpuIs::TakingTime)
    }

    /// Tells all devices.
    pub(super) fn tell_devices(&mut self, event: Lifecycle, effects: &mut Vec<Effect>) {
        for index in 0..self.devices.len() {
            self.devices[index].wanted = event;
            self.catch_up(index, effects);
        }
    }

    /// Tells all devices to go on. One that was never told to pause need not be told.
    pub(super) fn resume_devices(&mut self, effects: &mut Vec<Effect>) {
        for index in 0..self.devices.len() {
            let device = &mut self.devices[index];
            device.wanted = match device.told {
                Lifecycle::Start => Lifecycle::Start,
                _ => Lifecycle::Resume,
            };
            self.catch_up(index, effects);
        }
    }

    /// A device has handled what it was told last. `false`: it was told nothing.
    pub(super) fn device_done(&mut self, index: usize, effects: &mut Vec<Effect>) -> bool {
        let waited = std::mem::take(&mut self.devices[index].waits);
        if waited {
            self.catch_up(index, effects);
        }
        waited
    }

    /// A device died.
    pub(super) fn device_gone(&mut self, index: usize) {
        self.devices[index].gone = true;
    }

    /// Tells a device what it should know, if it has answered what it was told before.
    fn catch_up(&mut self, index: usize, effects: &mut Vec<Effect>) {
        let device = &mut self.devices[index];
        if !device.waits && !device.gone && device.told != device.wanted {
            device.told = device.wanted;
            device.waits = true;
            effects.push(Effect::Device(index, device.wanted));
        }
    }
}
