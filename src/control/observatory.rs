//! Everything that can be known about a machine without asking anybody: words that their owners publish.

use super::why::{DeviceSeen, Seen, Snapshot};
use crate::actors::{Address, Lifecycle};
use crate::clock::Clock;
use crate::devices::shell::Shell;
use crate::machine::dispatch::Dispatch;
use crate::machine::holds::Holds;
use crate::machine::state::State;
use crate::vcpu::activity::{Doing, Watch};
use crate::vcpu::route::{Hit, RouteMap};
use crate::virtio::balloon::Balloon;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the machine actor publishes.
pub struct Published {
    state: AtomicU8,
    holds: AtomicU8,
    /// Of each vCPU, then of each device: which lifecycle message it has not answered.
    unanswered: Box<[AtomicU8]>,
    resets: AtomicU64,
}

impl Published {
    /// Of a machine that was created, with so many vCPUs and devices.
    pub fn new(vcpus: usize, devices: usize) -> Published {
        Published {
            state: AtomicU8::new(State::Created as u8),
            holds: AtomicU8::new(Holds::default().number()),
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

    /// For the machine actor.
    pub fn set_holds(&self, holds: Holds) {
        self.holds.store(holds.number(), Ordering::Relaxed);
    }

    /// Who wants the machine to stand still.
    pub fn holds(&self) -> Holds {
        Holds::from_number(self.holds.load(Ordering::Relaxed))
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
        Lifecycle::ALL.get(usize::from(number).checked_sub(1)?).copied()
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
    pub vcpus: Vec<Watch>,
    /// Of the other threads that use devices, by name.
    pub others: Vec<(String, Watch)>,
    /// In the order of their numbers.
    pub devices: Vec<WatchedDevice>,
    /// Which address is whose.
    pub routes: RouteMap,
    /// Guest time.
    pub clock: Clock,
    /// How vCPUs reach devices.
    pub dispatch: Dispatch,
    /// What is known of the balloon, if there is one.
    pub balloon: Option<Balloon>,
    /// When the machine was made.
    pub begun: Instant,
}

impl Observatory {
    /// One for somebody who seldom looks; see [`Watch::second`].
    pub fn second(&self) -> Observatory {
        let devices = self.devices.iter().map(|device| WatchedDevice {
            name: device.name.clone(),
            address: device.address.clone(),
        });
        let others = self.others.iter();
        Observatory {
            published: self.published.clone(),
            vcpus: self.vcpus.iter().map(Watch::second).collect(),
            others: others
                .map(|(name, watch)| (name.clone(), watch.second()))
                .collect(),
            devices: devices.collect(),
            routes: self.routes.clone(),
            clock: self.clock.clone(),
            dispatch: self.dispatch,
            balloon: self.balloon.clone(),
            begun: self.begun,
        }
    }

    /// Looks where threads are, so that a later look can tell how long they have been there.
    pub fn glance(&mut self) {
        let now = Instant::now();
        let others = self.others.iter_mut().map(|(_, watch)| watch);
        for watch in self.vcpus.iter_mut().chain(others) {
            watch.look(now);
        }
    }

    /// Looks everywhere.
    pub fn look(&mut self) -> Snapshot {
        let now = Instant::now();
        let (routes, published) = (&self.routes, &self.published);
        let see = |name: String, watch: &mut Watch, unanswered| {
            let sighting = watch.look(now);
            Seen {
                name,
                device: device_of(routes, sighting.doing),
                doing: sighting.doing,
                age: sighting.age,
                exits: sighting.exits,
                unanswered,
            }
        };
        let count = self.vcpus.len();
        let vcpus = self.vcpus.iter_mut().enumerate();
        let others = self.others.iter_mut();
        let devices = self.devices.iter().enumerate();
        Snapshot {
            state: published.state(),
            vcpus: vcpus
                .map(|(index, watch)| see(format!("vcpu{index}"), watch, published.unanswered(index)))
                .collect(),
            others: others
                .map(|(name, watch)| see(name.clone(), watch, None))
                .collect(),
            devices: devices
                .map(|(index, device)| DeviceSeen {
                    name: device.name.clone(),
                    mailbox: device.address.as_ref().map(Address::look),
                    unanswered: published.unanswered(count + index),
                })
                .collect(),
        }
    }
}

/// How often the control thread looks, where somebody may ask: what it then says of times is short by this at most.
pub const GLANCE: Duration = Duration::from_millis(100);

fn device_of(routes: &RouteMap, doing: Doing) -> Option<usize> {
    match doing {
        // On a bus: who answers there now. The guest may have moved it since.
        Doing::Access {
            space,
            address,
            width,
            ..
        } => match routes.search(space, address, width)? {
            Hit::Device { device, .. } => Some(device),
            Hit::Published(..) => None,
        },
        Doing::AtDevice(device) => Some(device),
        _ => None,
    }
}
