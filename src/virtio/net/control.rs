//! The control queue: how many queue pairs the driver uses. [VIRTIO 1.2 §5.1.6.5]
//!
//! What a hostile guest can try: commands that do not exist, numbers that cannot be, commands cut short: the answer is
//! VIRTIO_NET_ERR. A command without room for the answer makes the device need a reset.

use super::receive::Receive;
use super::tap::Tap;
use crate::virtio::chain::Malformed;
use crate::virtio::queue::{Handler, Interruption, Request};
use nix::poll::PollFlags;
use std::os::fd::BorrowedFd;
use virtio_bindings::virtio_net as spec;

/// Class and command.
const HEAD_BYTES: u64 = 2;
/// The longest command that is looked at.
const COMMAND_BYTES: usize = 4;

/// Serves the control queue. The only one who changes which queues of the tap are in use.
pub struct Control {
    /// `None`: for a driver that has not accepted MQ, and so has no command that is known here.
    tap: Option<Tap>,
}

impl Control {
    /// For a tap of several queues, of which the first is in use.
    pub fn new(tap: Tap) -> Control {
        Control { tap: Some(tap) }
    }

    /// One that refuses all.
    pub fn without_commands() -> Control {
        Control { tap: None }
    }

    /// Does a command. Returns whether it could be done.
    fn perform(&self, command: &[u8]) -> bool {
        const CLASS: u8 = spec::VIRTIO_NET_CTRL_MQ as u8;
        const COMMAND: u8 = spec::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8;
        match (command, &self.tap) {
            (&[CLASS, COMMAND, low, high], Some(tap)) => {
                tap.use_pairs(u16::from_le_bytes([low, high])).is_ok()
            }
            _ => false,
        }
    }
}

impl Handler for Control {
    fn start(&mut self, _features: u64, _life: u32) {
        self.stopped();
    }

    fn stopped(&mut self) {
        // What a driver begins with. One that is refused is lost, which the queues themselves find.
        if let Some(tap) = &self.tap {
            let _ = tap.use_pairs(1);
        }
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        if request.writable_bytes() == 0 {
            return Err(Malformed::NoAnswer.into());
        }
        let bytes = request.readable_bytes();
        if bytes < HEAD_BYTES {
            return Err(Malformed::NoRequest.into());
        }
        let mut command = [0; COMMAND_BYTES];
        let command = &mut command[..bytes.min(COMMAND_BYTES as u64) as usize];
        if request.load_into(0, command)?.is_err() {
            return Err(Malformed::NoRequest.into());
        }
        let answer = if bytes <= COMMAND_BYTES as u64 && self.perform(command) {
            spec::VIRTIO_NET_OK
        } else {
            spec::VIRTIO_NET_ERR
        };
        match request.store_from(0, &[answer as u8])? {
            Ok(()) => Ok(1),
            Err(_) => Err(Malformed::NoAnswer.into()),
        }
    }
}

/// Serves the second receive queue, which is the control queue of a driver that has accepted that one and not MQ.
pub struct SecondOrControl {
    second: Receive,
    control: Control,
    is_control: bool,
}

impl SecondOrControl {
    /// Either.
    pub fn new(second: Receive) -> SecondOrControl {
        SecondOrControl {
            second,
            control: Control::without_commands(),
            is_control: false,
        }
    }
}

impl Handler for SecondOrControl {
    fn start(&mut self, features: u64, life: u32) {
        self.is_control = features & 1 << spec::VIRTIO_NET_F_MQ == 0;
        if !self.is_control {
            self.second.start(features, life);
        }
    }

    fn prepare(&mut self) -> bool {
        self.is_control || self.second.prepare()
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.second.waits_for().filter(|_| !self.is_control)
    }

    fn room(&self) -> u64 {
        if self.is_control { 0 } else { self.second.room() }
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        if self.is_control {
            self.control.serve(request)
        } else {
            self.second.serve(request)
        }
    }
}
