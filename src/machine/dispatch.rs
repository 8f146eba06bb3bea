//! The disciplines of dispatch: how vCPUs and the event loop reach the devices of a machine.
//!
//! `actor` is what this program is for. The others are baselines, around the same devices in the same machine; see
//! [`crate::baselines`].

use super::MachineMessage;
use super::chipset::DeviceSet;
use super::messenger::{Courier, Messenger};
use crate::actors::{Address, Lifecycle, Placement, PlacementKind, Pool, Port, Spawned};
use crate::baselines::big_lock::{self, BigLockBus, BigLockGate};
use crate::baselines::channel::{self, ChannelAddress, ChannelReach};
use crate::baselines::device_lock::{DeviceLockBus, DeviceLockGate, Devices};
use crate::baselines::mutex::Mutex;
use crate::clock::Clock;
use crate::control::observatory::WatchedDevice;
use crate::devices::shell::{DeviceMessage, Shell};
use crate::host::events::{Deliver, Gate, Tell};
use crate::simulation;
use crate::vcpu::activity::ActivityView;
use crate::vcpu::route::{Bus, RouteMap, RoutingTable};
use crossbeam_channel::Sender;
use slog::Logger;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What `--dispatch` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub enum Dispatch {
    /// Messages to actors with a run token.
    #[default]
    Actor,
    /// A thread a device, and channels. `spin`: both sides look before they sleep.
    Channel {
        /// Whether to look before sleeping.
        spin: bool,
    },
    /// An RwLock around the table, a mutex around each device.
    DeviceLock(MutexKind),
    /// One mutex around everything.
    BigLock(MutexKind),
}

/// Whose mutex a lock baseline uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub enum MutexKind {
    /// `std::sync::Mutex`.
    #[default]
    Std,
    /// `parking_lot::Mutex`.
    ParkingLot,
}

impl Dispatch {
    /// All of them, for benches and tests.
    pub const ALL: [Dispatch; 7] = [
        Dispatch::Actor,
        Dispatch::Channel { spin: false },
        Dispatch::Channel { spin: true },
        Dispatch::DeviceLock(MutexKind::Std),
        Dispatch::DeviceLock(MutexKind::ParkingLot),
        Dispatch::BigLock(MutexKind::Std),
        Dispatch::BigLock(MutexKind::ParkingLot),
    ];
}

impl fmt::Display for Dispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dispatch::Actor => "actor",
            Dispatch::Channel { spin: false } => "channel",
            Dispatch::Channel { spin: true } => "channel:spin",
            Dispatch::DeviceLock(MutexKind::Std) => "device-lock",
            Dispatch::DeviceLock(MutexKind::ParkingLot) => "device-lock:parking_lot",
            Dispatch::BigLock(MutexKind::Std) => "big-lock",
            Dispatch::BigLock(MutexKind::ParkingLot) => "big-lock:parking_lot",
        })
    }
}

impl FromStr for Dispatch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Dispatch::ALL
            .into_iter()
            .find(|dispatch| dispatch.to_string() == text);
        found.ok_or_else(|| {
            let all = Dispatch::ALL.map(|dispatch| dispatch.to_string()).join(", ");
            format!("'{text}' is not a discipline of dispatch; there are {all}")
        })
    }
}

/// A discipline that has taken the devices of a machine.
pub trait Discipline {
    /// What a vCPU gets.
    type Bus: Bus;

    /// A vCPU's way to the devices.
    fn bus(&self, log: Logger) -> Self::Bus;

    /// The event loop's.
    fn gate(&self) -> Box<dyn Gate>;

    /// The way of an actor behind a device to it.
    fn tell(&self, device: usize) -> Box<dyn Tell> {
        Box::new((self.gate(), device))
    }

    /// The machine actor's.
    fn control(&mut self) -> Box<dyn Control>;

    /// The devices as they can be looked at, and which address is whose.
    fn watch(&self) -> (Vec<WatchedDevice>, RouteMap);
}

/// Devices whose mailboxes, if they have any, are not looked at.
fn unwatched(names: &[&'static str]) -> Vec<WatchedDevice> {
    let device = |name: &&str| WatchedDevice {
        name: name.to_string(),
        address: None,
    };
    names.iter().map(device).collect()
}

/// What the machine actor can do to the devices. It never waits for one, and never runs a device's turn.
pub trait Control {
    /// Tells a device about the machine's life. `false`: it cannot be told.
    fn tell(&mut self, device: usize, event: Lifecycle) -> bool;

    /// Devices have not answered for a long time: whoever brings them their messages may be stuck with one of them.
    fn reinforce(&mut self);

    /// What the threads that bring messages are doing.
    fn messengers(&self) -> Vec<ActivityView>;

    /// Ends all devices, after what was said before. `all_ended`: all who use them have ended, so none can be stuck and
    /// their threads are waited for. Returns the names of those that have not ended by then.
    fn stop(&mut self, all_ended: bool, until: Instant) -> Vec<String>;
}

/// How many threads a pool has. Register handlers are short; what blocks has a thread of its own elsewhere.
const POOL_THREADS: usize = 2;

/// Lanes of a device beside the vCPUs' and those of the actors behind it: the machine actor's and the event loop's.
const OTHER_LANES: usize = 2;

/// `actor`.
pub struct Actors {
    devices: Vec<Spawned<Shell>>,
    routes: RouteMap,
    clock: Clock,
}

impl Actors {
    /// Starts an actor for each device. `vcpus` will connect; deaths are told to `machine`.
    ///
    /// # Errors
    /// When the host cannot start a thread.
    pub fn new(
        set: impl Into<DeviceSet>,
        vcpus: usize,
        placements: &[(String, PlacementKind)],
        machine: &Sender<MachineMessage>,
    ) -> io::Result<Actors> {
        let set = set.into();
        let mut pool = None;
        let mut devices = Vec::with_capacity(set.devices.len());
        for (name, shell) in set.devices {
            let wanted = placements.iter().rev().find(|(wanted, _)| *wanted == name);
            let placement = match wanted.map_or(PlacementKind::default(), |(_, kind)| *kind) {
                PlacementKind::Handoff => Placement::Handoff,
                PlacementKind::Thread => Placement::Thread,
                PlacementKind::Pool => Placement::Pool(match &pool {
                    Some(pool) => Pool::clone(pool),
                    None => pool.insert(Pool::new(POOL_THREADS)?).clone(),
                }),
            };
            let lanes = vcpus + OTHER_LANES + shell.backends();
            let machine = machine.clone();
            let on_death = move |obituary| drop(machine.try_send(MachineMessage::Died(obituary)));
            devices.push(Address::spawn(shell, name, placement, lanes, on_death)?);
        }
        Ok(Actors {
            devices,
            routes: set.routes,
            clock: set.clock,
        })
    }

    fn ports(&self) -> Vec<Port<Shell>> {
        self.devices
            .iter()
            .map(|device| device.address.connect().expect("lanes were counted"))
            .collect()
    }
}

impl Discipline for Actors {
    type Bus = RoutingTable;

    fn bus(&self, log: Logger) -> RoutingTable {
        RoutingTable::with(self.routes.clone(), self.ports(), self.clock.clone(), log)
    }

    fn gate(&self) -> Box<dyn Gate> {
        Box::new(self.ports())
    }

    fn tell(&self, device: usize) -> Box<dyn Tell> {
        let address = &self.devices[device].address;
        Box::new(address.connect().expect("lanes were counted"))
    }

    fn control(&mut self) -> Box<dyn Control> {
        let threads = self
            .devices
            .iter_mut()
            .filter_map(|device| device.thread.take())
            .collect();
        let addresses = self.devices.iter().map(|device| device.address.clone()).collect();
        Box::new(ActorControl {
            messenger: Messenger::new(self.ports()),
            addresses,
            threads,
        })
    }

    fn watch(&self) -> (Vec<WatchedDevice>, RouteMap) {
        let device = |device: &Spawned<Shell>| WatchedDevice {
            name: device.address.name().to_string(),
            address: Some(device.address.clone()),
        };
        (self.devices.iter().map(device).collect(), self.routes.clone())
    }
}

impl Courier for Port<Shell> {
    fn deliver(&mut self, event: Lifecycle) {
        // There is a credit: the machine waits for the answer of one before it orders another. A device that is gone
        // answers nothing.
        let _ = self.try_post(DeviceMessage::Lifecycle(event));
    }

    fn stop(&mut self) {
        self.stop_later();
    }
}

struct ActorControl {
    messenger: Messenger<Port<Shell>>,
    addresses: Vec<Address<Shell>>,
    threads: Vec<JoinHandle<()>>,
}

impl Control for ActorControl {
    fn tell(&mut self, device: usize, event: Lifecycle) -> bool {
        !self.addresses[device].is_closed() && self.messenger.order(device, event)
    }

    fn reinforce(&mut self) {
        self.messenger.reinforce();
    }

    fn messengers(&self) -> Vec<ActivityView> {
        self.messenger.views()
    }

    fn stop(&mut self, all_ended: bool, until: Instant) -> Vec<String> {
        self.messenger.stop();
        simulation::ready_by(until, || self.addresses.iter().all(|device| device.is_closed()));
        let stuck: Vec<String> = self
            .addresses
            .iter()
            .filter(|device| !device.is_closed())
            .map(|device| device.name().to_string())
            .collect();
        if all_ended && stuck.is_empty() {
            for thread in self.threads.drain(..) {
                let _ = thread.join();
            }
        }
        stuck
    }
}

/// `channel`.
pub struct Channels {
    devices: Vec<ChannelAddress>,
    names: Vec<&'static str>,
    routes: RouteMap,
    clock: Clock,
    spin: bool,
}

impl Channels {
    /// Starts a thread for each device.
    ///
    /// # Errors
    /// When the host cannot start one.
    pub fn new(set: impl Into<DeviceSet>, spin: bool) -> io::Result<Channels> {
        let set = set.into();
        let names = set.devices.iter().map(|(name, _)| *name).collect();
        let devices = set.devices.into_iter();
        let devices = devices.map(|(name, shell)| channel::start(shell, name, spin));
        Ok(Channels {
            names,
            devices: devices.collect::<io::Result<_>>()?,
            routes: set.routes,
            clock: set.clock,
            spin,
        })
    }
}

impl Discipline for Channels {
    type Bus = RoutingTable<ChannelReach>;

    fn bus(&self, log: Logger) -> Self::Bus {
        let reach = ChannelReach::new(self.devices.clone(), self.spin);
        RoutingTable::with(self.routes.clone(), reach, self.clock.clone(), log)
    }

    fn gate(&self) -> Box<dyn Gate> {
        Box::new(self.devices.clone())
    }

    fn control(&mut self) -> Box<dyn Control> {
        // The threads end when all who could send are gone.
        gate_control(self.devices.len(), || self.gate())
    }

    fn watch(&self) -> (Vec<WatchedDevice>, RouteMap) {
        (unwatched(&self.names), self.routes.clone())
    }
}

/// `device-lock`.
pub struct DeviceLocks<M> {
    shared: Arc<Devices<M>>,
    names: Vec<&'static str>,
    /// As they were when the devices were taken, for those who look.
    routes: RouteMap,
}

impl<M: Mutex<Shell>> DeviceLocks<M> {
    /// Takes the devices.
    pub fn new(set: impl Into<DeviceSet>) -> Self {
        let DeviceSet {
            devices,
            routes,
            clock,
        } = set.into();
        let (names, shells) = devices.into_iter().unzip::<_, _, Vec<_>, Vec<_>>();
        DeviceLocks {
            shared: Arc::new(Devices::new(shells, routes.clone(), clock)),
            names,
            routes,
        }
    }
}

impl<M: Mutex<Shell>> Discipline for DeviceLocks<M> {
    type Bus = DeviceLockBus<M>;

    fn bus(&self, log: Logger) -> Self::Bus {
        DeviceLockBus::new(self.shared.clone(), log)
    }

    fn gate(&self) -> Box<dyn Gate> {
        Box::new(DeviceLockGate(self.shared.clone()))
    }

    fn control(&mut self) -> Box<dyn Control> {
        gate_control(self.names.len(), || self.gate())
    }

    fn watch(&self) -> (Vec<WatchedDevice>, RouteMap) {
        (unwatched(&self.names), self.routes.clone())
    }
}

/// `big-lock`.
pub struct BigLock<M> {
    shared: Arc<M>,
    names: Vec<&'static str>,
    /// As they were when the devices were taken, for those who look.
    routes: RouteMap,
}

impl<M: Mutex<big_lock::Machine>> BigLock<M> {
    /// Takes the devices.
    pub fn new(set: impl Into<DeviceSet>) -> Self {
        let DeviceSet {
            devices,
            routes,
            clock,
        } = set.into();
        let (names, shells) = devices.into_iter().unzip::<_, _, Vec<_>, Vec<_>>();
        BigLock {
            shared: Arc::new(M::new(big_lock::Machine::new(shells, routes.clone(), clock))),
            names,
            routes,
        }
    }
}

impl<M: Mutex<big_lock::Machine>> Discipline for BigLock<M> {
    type Bus = BigLockBus<M>;

    fn bus(&self, log: Logger) -> Self::Bus {
        BigLockBus::new(self.shared.clone(), log)
    }

    fn gate(&self) -> Box<dyn Gate> {
        Box::new(BigLockGate(self.shared.clone()))
    }

    fn control(&mut self) -> Box<dyn Control> {
        gate_control(self.names.len(), || self.gate())
    }

    fn watch(&self) -> (Vec<WatchedDevice>, RouteMap) {
        (unwatched(&self.names), self.routes.clone())
    }
}

/// Through a gate: for disciplines whose devices have no end of their own.
struct GateCourier {
    device: usize,
    gate: Box<dyn Gate>,
}

fn gate_control(count: usize, gate: impl Fn() -> Box<dyn Gate>) -> Box<dyn Control> {
    let courier = |device| GateCourier { device, gate: gate() };
    Box::new(GateControl(Messenger::new((0..count).map(courier).collect())))
}

impl Courier for GateCourier {
    fn deliver(&mut self, event: Lifecycle) {
        let device = self.device;
        let mut sent = false;
        while !sent {
            self.gate.with(&mut |devices: &mut dyn Deliver| {
                sent = devices.try_send(device, DeviceMessage::Lifecycle(event));
            });
            if !sent {
                // Its mailbox is full (`channel`); locks always take it.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    // There is nothing to end.
    fn stop(&mut self) {}
}

struct GateControl(Messenger<GateCourier>);

impl Control for GateControl {
    fn tell(&mut self, device: usize, event: Lifecycle) -> bool {
        self.0.order(device, event)
    }

    fn reinforce(&mut self) {
        self.0.reinforce();
    }

    fn messengers(&self) -> Vec<ActivityView> {
        self.0.views()
    }

    // There is nothing to end, and no way to tell who is stuck.
    fn stop(&mut self, _all_ended: bool, _until: Instant) -> Vec<String> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_parse() {
        for dispatch in Dispatch::ALL {
            assert_eq!(dispatch.to_string().parse(), Ok(dispatch));
        }
        assert!(
            "lock"
                .parse::<Dispatch>()
                .unwrap_err()
                .contains("there are actor, channel")
        );
    }
}
