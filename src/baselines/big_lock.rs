//! `big-lock`: QEMU's discipline. One mutex around all devices and the table of ranges.

use super::mutex::Mutex;
use crate::actors::Actor;
use crate::clock::Clock;
use crate::devices::shell::{DeviceMessage, Shell};
use crate::devices::{Direction, Width};
use crate::host::events::{Deliver, Gate};
use crate::vcpu::route::{Accesses, Bus, Hit, RouteMap, Space, Unclaimed};
use slog::Logger;
use std::sync::Arc;

/// What the mutex protects.
pub struct Machine {
    devices: Vec<Shell>,
    routes: RouteMap,
    clock: Clock,
}

impl Machine {
    /// All devices, and the ranges that lead to them.
    pub fn new(devices: Vec<Shell>, routes: RouteMap, clock: Clock) -> Machine {
        Machine {
            devices,
            routes,
            clock,
        }
    }
}

/// A vCPU's reference to the lock.
pub struct BigLockBus<M> {
    lock: Arc<M>,
    unclaimed: Unclaimed,
}

impl<M: Mutex<Machine>> BigLockBus<M> {
    /// For one vCPU.
    pub fn new(lock: Arc<M>, log: Logger) -> Self {
        BigLockBus {
            lock,
            unclaimed: Unclaimed::new(log),
        }
    }
}

/// The lock, held.
pub struct Held<'a, M: Mutex<Machine> + 'a> {
    machine: M::Guard<'a>,
    unclaimed: &'a mut Unclaimed,
}

impl<M: Mutex<Machine>> Bus for BigLockBus<M> {
    type Held<'a> = Held<'a, M>;
    const WAITS: bool = true;

    #[inline]
    fn exited(&mut self) -> Held<'_, M> {
        Held {
            machine: self.lock.lock(),
            unclaimed: &mut self.unclaimed,
        }
    }

    // A write is complete when it returns.
    fn settle(&mut self) {}

    fn unclaimed(&self) -> Vec<(Space, u64, u64)> {
        self.unclaimed.counts.clone()
    }
}

impl<'a, M: Mutex<Machine>> Accesses for Held<'a, M> {
    #[inline(always)]
    fn read(&mut self, space: Space, address: u64, width: Width) -> u64 {
        let Machine {
            devices,
            routes,
            clock,
        } = &mut *self.machine;
        let Some(hit) = routes.find(space, address, width) else {
            self.unclaimed.note(space, address, width, Direction::Read);
            return width.all_ones();
        };
        match hit {
            Hit::Device { device, access, .. } => devices[device].handle(DeviceMessage::Read(access)),
            Hit::Published(word, access) => word.read(access, clock),
        }
    }

    #[inline(always)]
    fn write(&mut self, space: Space, address: u64, width: Width, value: u64) {
        let Machine { devices, routes, .. } = &mut *self.machine;
        let Some(hit) = routes.find(space, address, width) else {
            self.unclaimed.note(space, address, width, Direction::Write);
            return;
        };
        if let Hit::Device { device, access, .. } = hit {
            devices[device].handle(DeviceMessage::Write(access, value & width.all_ones()));
        }
    }
}

/// The event loop's way to the devices: the lock is held around all of its work, as in QEMU, whose main loop drops it
/// only to sleep.
pub struct BigLockGate<M>(pub Arc<M>);

impl<M: Mutex<Machine>> Gate for BigLockGate<M> {
    fn with(&mut self, work: &mut dyn FnMut(&mut dyn Deliver)) {
        work(&mut *self.0.lock());
    }
}

impl Deliver for Machine {
    fn try_send(&mut self, device: usize, message: DeviceMessage) -> bool {
        self.devices[device].handle(message);
        true
    }
}
