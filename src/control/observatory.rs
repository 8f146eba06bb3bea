//! Everything that can be known about a machine without asking anybody: words that their owners publish.

use super::why::{DeviceSeen, Seen, Snapshot};
use crate::actors::{Address, Lifecycle};
use crate::clock::Clock;
use crate::devices::shell::Shell;
use crate::machine::dispatch::Dispatch;
use crate::machine::state::State;
use crate::vcpu::activity::{ActivityView, Doing, Stopwatch};
use crate::vcpu::route::{RouteMap, Target};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

/// What the machine actor publishes.
pub struct Published {
    state: AtomicU8,
    /// Of each vCPU, then of each device: which lifecycle message it has not answered.
    unanswered: Box<[AtomicU8]>,
    resets: AtomicU64,
}

impl Published {
    /// Of a machine that was created, with so many vCPUs and devices.
    pub fn new(vcpus: usize, devices: usize) -> Published {
        Published {
            state: AtomicU8::new(State::Created as u8),
            unanswered: (0..vcpus + devices).map(|_| AtomicU8::new(0)).collect(),
            resets: AtomicU64::new(0),
        }
    }

    // Relaxed everywhere: each word stands for itself.

    /// For the machine actor.
    pub fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// The machine's state.
    pub fn state(&self) -> State {
        State::from_number(self.state.load(Ordering::Relaxed)).unwrap_or(State::Created)
    }

    /// For the machine actor: the machine was reset in place once more.
    pub fn count_reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it was reset in place.
    pub fn resets(&self) -> u64 {
        self.resets.load(Ordering::Relaxed)
    }

    /// For the machine actor: what those who have not answered were sent; everybody else has.
    pub fn set_unanswered(&self, pending: impl Iterator<Item = (usize, Lifecycle)> + Clone) {
        for (index, word) in self.unanswered.iter().enumerate() {
            let message = pending.clone().find(|(who, _)| *who == index);
            word.store(message.map_or(0, |(_, event)| event as u8 + 1), Ordering::Relaxed);
        }
    }

    fn unanswered(&self, index: usize) -> Option<Lifecycle> {
        let number = self.unanswered.get(index)?.load(Ordering::Relaxed);
        [
            Lifecycle::Start,
            Lifecycle::Pause,
            Lifecycle::Resume,
            Lifecycle::Reset,
        ]
        .get(usize::from(number).checked_sub(1)?)
        .copied()
    }
}

/// A device, as it can be looked at.
pub struct WatchedDevice {
    /// Its name.
    pub name: String,
    /// Its mailbox; the baselines have none.
    pub address: Option<Address<Shell>>,
}

/// The places to look.
pub struct Observatory {
    /// The machine actor's words.
    pub published: Arc<Published>,
    /// Of each vCPU.
    pub vcpus: Vec<ActivityView>,
    /// Of the other threads that use devices, by name.
    pub others: Vec<(String, ActivityView)>,
    /// In the order of their numbers.
    pub devices: Vec<WatchedDevice>,
    /// Which address is whose.
    pub routes: RouteMap,
    /// Guest time.
    pub clock: Clock,
    /// How vCPUs reach devices.
    pub dispatch: Dispatch,
    /// For times.
    pub stopwatch: Stopwatch,
    /// When the machine was made.
    pub begun: Instant,
}

impl Observatory {
    /// Looks everywhere.
    pub fn look(&self) -> Snapshot {
        let see = |name: String, view: &ActivityView, unanswered| {
            let (doing, since) = view.look();
            Seen {
                name,
                device: self.device_of(doing),
                doing,
                age: self.stopwatch.elapsed(since),
                exits: view.exits(),
                unanswered,
            }
        };
        let count = self.vcpus.len();
        let vcpus = self.vcpus.iter().enumerate();
        let others = self.others.iter();
        let devices = self.devices.iter().enumerate();
        Snapshot {
            state: self.published.state(),
            vcpus: vcpus
                .map(|(index, view)| see(format!("vcpu{index}"), view, self.published.unanswered(index)))
                .collect(),
            others: others.map(|(name, view)| see(name.clone(), view, None)).collect(),
            devices: devices
                .map(|(index, device)| DeviceSeen {
                    name: device.name.clone(),
                    mailbox: device.address.as_ref().map(Address::look),
                    unanswered: self.published.unanswered(count + index),
                })
                .collect(),
        }
    }

    fn device_of(&self, doing: Doing) -> Option<usize> {
        match doing {
            Doing::Access { space, address, .. } => match self.routes.search(space, address)?.target {
                Target::Device { device, .. } => Some(device),
                Target::Published(_) => None,
            },
            Doing::AtDevice(device) => Some(device),
            _ => None,
        }
    }
}
