//! `device-lock`: the discipline of Firecracker and Cloud Hypervisor. The table of ranges is shared behind an RwLock,
//! each device behind a mutex of its own; both are held through the handler.

use super::mutex::Mutex;
use crate::actors::Actor;
use crate::clock::Clock;
use crate::devices::shell::{DeviceMessage, Shell};
use crate::devices::{Direction, Width};
use crate::host::events::{Deliver, Gate};
use crate::vcpu::route::{Accesses, Bus, Hit, RouteMap, Space, Unclaimed};
use slog::Logger;
use std::sync::{Arc, PoisonError, RwLock};

/// What all vCPUs share.
pub struct Devices<M> {
    routes: RwLock<RouteMap>,
    devices: Vec<M>,
    clock: Clock,
}

impl<M: Mutex<Shell>> Devices<M> {
    /// All devices, and the ranges that lead to them.
    pub fn new(devices: Vec<Shell>, routes: RouteMap, clock: Clock) -> Self {
        Devices {
            routes: RwLock::new(routes),
            devices: devices.into_iter().map(M::new).collect(),
            clock,
        }
    }
}

/// A vCPU's reference to them.
pub struct DeviceLockBus<M> {
    shared: Arc<Devices<M>>,
    unclaimed: Unclaimed,
}

impl<M: Mutex<Shell>> DeviceLockBus<M> {
    /// For one vCPU.
    pub fn new(shared: Arc<Devices<M>>, log: Logger) -> Self {
        DeviceLockBus {
            shared,
            unclaimed: Unclaimed::new(log),
        }
    }
}

impl<M: Mutex<Shell>> Bus for DeviceLockBus<M> {
    type Held<'a> = &'a mut Self;

    #[inline]
    fn exited(&mut self) -> &mut Self {
        self
    }

    // A write is complete when it returns.
    fn settle(&mut self) {}

    fn unclaimed(&self) -> Vec<(Space, u64, u64)> {
        self.unclaimed.counts.clone()
    }
}

impl<M: Mutex<Shell>> Accesses for DeviceLockBus<M> {
    #[inline(always)]
    fn read(&mut self, space: Space, address: u64, width: Width) -> u64 {
        let shared = &*self.shared;
        let routes = shared.routes.read().unwrap_or_else(PoisonError::into_inner);
        let Some(hit) = routes.search(space, address, width) else {
            self.unclaimed.note(space, address, width, Direction::Read);
            return width.all_ones();
        };
        match hit {
            Hit::Device { device, access, .. } => {
                shared.devices[device].lock().handle(DeviceMessage::Read(access))
            }
            Hit::Published(word, access) => word.read(access, &shared.clock),
        }
    }

    #[inline(always)]
    fn write(&mut self, space: Space, address: u64, width: Width, value: u64) {
        let shared = &*self.shared;
        let routes = shared.routes.read().unwrap_or_else(PoisonError::into_inner);
        let Some(hit) = routes.search(space, address, width) else {
            self.unclaimed.note(space, address, width, Direction::Write);
            return;
        };
        if let Hit::Device { device, access, .. } = hit {
            shared.devices[device]
                .lock()
                .handle(DeviceMessage::Write(access, value & width.all_ones()));
        }
    }
}

/// The event loop's way to the devices.
pub struct DeviceLockGate<M>(pub Arc<Devices<M>>);

impl<M: Mutex<Shell>> Gate for DeviceLockGate<M> {
    fn with(&mut self, work: &mut dyn FnMut(&mut dyn Deliver)) {
        work(self);
    }
}

impl<M: Mutex<Shell>> Deliver for DeviceLockGate<M> {
    fn try_send(&mut self, device: usize, message: DeviceMessage) -> bool {
        self.0.devices[device].lock().handle(message);
        true
    }
}
