//! `channel`: actors out of a textbook. A thread a device; a request goes to it over a channel that carries the
//! way back for the reply.

use crate::actors::Actor;
use crate::devices::shell::{DeviceMessage, Shell};
use crate::devices::{Access, AccessClass, Direction};
use crate::host::events::{Deliver, Gate};
use crate::vcpu::route::{Classify, Reach};
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Requests that wait for one device: as many as a lane of ours has, for the comparison's sake.
const REQUESTS: usize = 32;

/// How often an asker looks for its reply, and a device's thread for a request, before it sleeps, if told to spin.
const SPINS: u32 = 2000;

/// A message, and where the reply goes if one is wanted.
struct Request {
    message: DeviceMessage,
    reply: Option<Sender<u64>>,
}

/// Where requests for one device go.
#[derive(Clone)]
pub struct ChannelAddress(Sender<Request>);

/// Looks for a message up to [`SPINS`] times, then sleeps for it. `None`: all senders are gone.
#[inline]
fn spin_for<T>(messages: &Receiver<T>) -> Option<T> {
    for _ in 0..SPINS {
        if let Ok(message) = messages.try_recv() {
            return Some(message);
        }
        spin_loop();
    }
    messages.recv().ok()
}

/// Starts a device's thread. It ends when all senders are gone. `spin`: it looks for a while before it sleeps. An asker
/// that spins gains nothing from it if the other side must be woken.
///
/// # Errors
/// When the host gives no more threads.
pub fn start(mut shell: Shell, name: &str, spin: bool) -> std::io::Result<ChannelAddress> {
    let (sender, requests): (_, Receiver<Request>) = bounded(REQUESTS);
    crate::thread::spawn(format!("dev:{name}"), move || {
        let mut alive = true;
        let next = || match spin {
            true => spin_for(&requests),
            false => requests.recv().ok(),
        };
        while let Some(Request { message, reply }) = next() {
            // A device that panicked drives nothing, as everywhere.
            let turn = AssertUnwindSafe(|| shell.handle(message));
            let value = if alive { catch_unwind(turn).ok() } else { None };
            alive &= value.is_some();
            let value = value.unwrap_or(u64::MAX);
            if let Some(reply) = reply {
                // An asker that is gone does not care.
                let _ = reply.send(value);
            }
        }
    })?;
    Ok(ChannelAddress(sender))
}

/// A vCPU's way to all devices.
pub struct ChannelReach {
    devices: Vec<ChannelAddress>,
    reply: Sender<u64>,
    replies: Receiver<u64>,
    spin: bool,
}

impl ChannelReach {
    /// For one vCPU. `spin`: look for a while before sleeping.
    pub fn new(devices: Vec<ChannelAddress>, spin: bool) -> ChannelReach {
        // One ask at a time.
        let (reply, replies) = bounded(1);
        ChannelReach {
            devices,
            reply,
            replies,
            spin,
        }
    }

    fn call(&mut self, device: usize, message: DeviceMessage) -> Option<u64> {
        self.devices[device]
            .0
            .send(Request {
                message,
                reply: Some(self.reply.clone()),
            })
            .ok()?;
        match self.spin {
            true => spin_for(&self.replies),
            false => self.replies.recv().ok(),
        }
    }
}

impl Reach for ChannelReach {
    fn ask(&mut self, device: usize, access: Access) -> Option<u64> {
        self.call(device, DeviceMessage::Read(access))
    }

    fn write(&mut self, device: usize, access: Access, value: u64, classify: Classify) -> bool {
        let message = DeviceMessage::Write(access, value);
        match classify(access, Direction::Write) {
            AccessClass::Ask => {
                self.call(device, message);
                false
            }
            AccessClass::Post => {
                let _ = self.devices[device].0.send(Request { message, reply: None });
                true
            }
        }
    }

    fn fence(&mut self, device: usize) {
        // A lifecycle event that no device acts on: when its reply is there, what came before was handled.
        self.call(device, DeviceMessage::Lifecycle(crate::actors::Lifecycle::Start));
    }
}

/// The event loop's way to the devices.
impl Gate for Vec<ChannelAddress> {
    fn with(&mut self, work: &mut dyn FnMut(&mut dyn Deliver)) {
        work(self);
    }
}

impl Deliver for Vec<ChannelAddress> {
    fn try_send(&mut self, device: usize, message: DeviceMessage) -> bool {
        let sent = self[device].0.try_send(Request { message, reply: None });
        !matches!(sent, Err(TrySendError::Full(_)))
    }
}
