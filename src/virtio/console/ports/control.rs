//! The two control queues. [VIRTIO 1.2 §5.3.6.2]
//!
//! What a hostile guest can try: a message that is too short or outside memory, or a buffer for ours that is too small, makes
//! the device need a reset. Messages of ports that there are not, or that mean nothing, are a line in the log at a bounded
//! rate. Any number of messages that mean something leaves a few words; see `line.rs`.

use super::line::Exchange;
use super::talk::{MESSAGE_BYTES, Message, Talk, event};
use crate::virtio::chain::Malformed;
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::{Handler, Interruption, Request};
use nix::poll::PollFlags;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// What was seen last of a port's words.
type Seen = u64;

/// Serves the control receive queue: tells the driver.
pub struct Tell {
    talk: Talk,
    exchange: Arc<Exchange>,
    life: u32,
    device: Seen,
    ports: Vec<Seen>,
}

impl Tell {
    /// Of ports with these names, in the exchange's order.
    pub fn new(names: Vec<String>, exchange: Arc<Exchange>) -> Tell {
        Tell {
            ports: vec![0; names.len()],
            talk: Talk::new(names),
            exchange,
            life: 0,
            device: 0,
        }
    }
}

impl Handler for Tell {
    fn start(&mut self, _features: u64, life: u32) {
        self.talk.reset();
        self.life = life;
    }

    fn prepare(&mut self) -> bool {
        let exchange = &self.exchange;
        exchange.news.hush();
        if exchange.device_ready.news(self.life, &mut self.device) == Some(true) {
            self.talk.device_ready();
        }
        for (place, (line, seen)) in exchange.lines.iter().zip(&mut self.ports).enumerate() {
            self.talk.host(place, exchange.host(place));
            if let Some(ready) = line.ready.news(self.life, seen) {
                self.talk.port_ready(place, ready);
            }
        }
        self.talk.next().is_some()
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        Some((self.exchange.news.fd(), PollFlags::POLLIN))
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let Some((message, behind)) = self.talk.next() else {
            return Err(Interruption::Untaken);
        };
        let bytes = [&message.to_bytes()[..], behind.as_bytes()].concat();
        if request.writable_bytes() < bytes.len() as u64 || request.store_from(0, &bytes)?.is_err() {
            return Err(Malformed::NoAnswer.into());
        }
        self.talk.told(message);
        Ok(bytes.len() as u32)
    }
}

/// Serves the control transmit queue: hears what the driver says.
pub struct Hear {
    exchange: Arc<Exchange>,
    life: u32,
    complaints: Complaints,
}

impl Hear {
    /// For the others.
    pub fn new(exchange: Arc<Exchange>, complaints: Complaints) -> Hear {
        Hear {
            exchange,
            life: 0,
            complaints,
        }
    }

    fn hear(&mut self, message: Message) {
        let exchange = &self.exchange;
        let line = usize::try_from(message.id)
            .ok()
            .and_then(|id| exchange.lines.get(id.checked_sub(1)?));
        let value = message.value == 1;
        match (message.event, line) {
            (event::DEVICE_READY, _) => {
                exchange.device_ready.say(self.life, value);
                exchange.news.ring();
            }
            (event::PORT_READY, Some(line)) => {
                line.ready.say(self.life, value);
                exchange.news.ring();
            }
            (event::PORT_OPEN, Some(line)) => {
                line.guest.say(self.life, value);
                line.notice.ring();
            }
            _ => self.complaints.say(format_args!(
                "ports0: the driver sends a control message that means nothing: event {} of port {}",
                message.event, message.id
            )),
        }
    }
}

impl Handler for Hear {
    fn start(&mut self, _features: u64, life: u32) {
        self.life = life;
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        let mut bytes = [0; MESSAGE_BYTES];
        if request.load_into(0, &mut bytes)?.is_err() {
            return Err(Malformed::NoRequest.into());
        }
        self.hear(Message::from_bytes(bytes));
        Ok(0)
    }
}
