//! One connection between a port of the guest and a port of the host: credit, half-closes, what is to be said next. A
//! pure state machine; sockets are somebody else's.
//!
//! ```text
//!  guest asks:  Connecting ──the host's socket is there──▶ Open      (RESPONSE is said)
//!  host asks:   Asking (REQUEST is said) ──RESPONSE──▶ Open
//! ```
//!
//! **Credit** [VIRTIO 1.2 §5.10.6.3]: each side tells how much room it has and how much it has passed on; the other may
//! have so much on its way and no more. Ours is [`BUFFER_BYTES`] a connection: what the host's socket does not take
//! waits in `backlog`, which can hold all of it. What the guest's credit does not allow is not read from the host's
//! socket. So both directions stop at the one who does not read, and nothing grows.
//!
//! What a hostile guest can try: to send more than its credit, or after it has said that it will not, or before there is
//! a connection: each is [`Violation`], and the connection ends by RST. To tell any numbers as its own credit: then it
//! gets what it says that it has room for, or nothing.

use super::packet::{HOST_CID, Header, NEITHER, NO_RECEIVE, NO_SEND, STREAM, op};
use std::collections::VecDeque;

/// Room for what the guest has sent and the host's socket has not taken yet, bytes a connection: Linux's largest packet.
pub const BUFFER_BYTES: u32 = 64 << 10;
/// When so much has been passed on that the guest does not know of, it is told. It never waits then: what it does not
/// know of is less than its room, so it has some.
const TELL_BYTES: u32 = BUFFER_BYTES / 2;

/// Which connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Ports {
    /// The guest's port.
    pub guest: u32,
    /// The host's.
    pub host: u32,
}

/// How far it has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// The host has asked the guest.
    Asking,
    /// The guest has asked; there is no socket of the host yet.
    Connecting,
    /// Both have agreed.
    Open,
}

/// The guest does what it may not. The connection ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Violation;

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// Which.
    pub ports: Ports,
    stage: Stage,
    backlog: VecDeque<u8>,
    /// Bytes from the guest, modulo 2^32, as all counts here.
    received: u32,
    /// Of these, passed on to the host.
    forwarded: u32,
    /// Of these, the guest knows of.
    told: u32,
    /// Bytes to the guest.
    sent: u32,
    /// The guest's room, and what it has passed on.
    guest_buffer: u32,
    guest_forwarded: u32,
    /// The guest has been asked for its credit, and has said nothing since.
    credit_asked: bool,
    /// Directions that each side has ended, and what of the host's the guest knows.
    guest_ended: u32,
    host_ended: u32,
    told_ended: u32,
    /// The first thing to say: REQUEST or RESPONSE.
    greeting: Option<u16>,
    /// The guest has asked for our credit.
    credit_due: bool,
}

impl Connection {
    fn new(ports: Ports, stage: Stage) -> Connection {
        Connection {
            ports,
            stage,
            backlog: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            credit_asked: false,
            guest_ended: 0,
            host_ended: 0,
            told_ended: 0,
            greeting: None,
            credit_due: false,
        }
    }

    /// The guest asks for one.
    pub fn asked_by_guest(request: &Header) -> Connection {
        let ports = Ports {
            guest: request.source_port,
            host: request.destination_port,
        };
        let mut connection = Connection::new(ports, Stage::Connecting);
        connection.heard(request);
        connection
    }

    /// The host asks for one.
    pub fn asked_by_host(ports: Ports) -> Connection {
        Connection {
            greeting: Some(op::REQUEST),
            ..Connection::new(ports, Stage::Asking)
        }
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The host's socket is there.
    pub fn connected(&mut self) {
        debug_assert_eq!(self.stage, Stage::Connecting);
        (self.stage, self.greeting) = (Stage::Open, Some(op::RESPONSE));
    }

    /// The guest agrees.
    ///
    /// # Errors
    /// Nobody has asked it.
    pub fn agreed(&mut self) -> Result<(), Violation> {
        // To a request that it has not been told yet, it cannot.
        if self.stage != Stage::Asking || self.greeting.is_some() {
            return Err(Violation);
        }
        self.stage = Stage::Open;
        Ok(())
    }

    /// What each of the guest's packets says.
    pub fn heard(&mut self, header: &Header) {
        (self.guest_buffer, self.guest_forwarded) = (header.buffer_bytes, header.forwarded);
        self.credit_asked = false;
    }

    /// The guest asks for our credit.
    pub fn credit_wanted(&mut self) {
        self.credit_due = true;
    }

    /// The guest sends so many bytes. Returns whether they are for the host; they are not when nobody there reads any more.
    ///
    /// # Errors
    /// It may not.
    pub fn receive(&mut self, bytes: u32) -> Result<bool, Violation> {
        let room = BUFFER_BYTES - self.received.wrapping_sub(self.forwarded);
        if self.stage != Stage::Open || self.guest_ended & NO_SEND != 0 || bytes > room {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(bytes);
        let wanted = self.host_ended & NO_RECEIVE == 0;
        if !wanted {
            self.forwarded = self.received;
        }
        Ok(wanted)
    }

    /// What waits for the host's socket.
    pub fn backlog(&self) -> &VecDeque<u8> {
        &self.backlog
    }

    /// So much of what was received waits.
    pub fn put_by(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
    }

    /// The host's socket has taken so much, which did not wait.
    pub fn passed_on(&mut self, bytes: usize) {
        self.forwarded = self.forwarded.wrapping_add(bytes as u32);
    }

    /// The same of the backlog.
    pub fn passed_on_from_backlog(&mut self, bytes: usize) {
        self.backlog.drain(..bytes);
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
        self.passed_on(bytes);
    }

    /// The guest ends directions. Returns whether it has ended both by now.
    pub fn end_by_guest(&mut self, flags: u32) -> bool {
        self.guest_ended |= flags & NEITHER;
        self.guest_ended == NEITHER
    }

    /// Directions that the guest has ended.
    pub fn ended_by_guest(&self) -> u32 {
        self.guest_ended
    }

    /// The host ends directions.
    pub fn end_by_host(&mut self, flags: u32) {
        self.host_ended |= flags & NEITHER;
        if flags & NO_RECEIVE != 0 {
            self.backlog = VecDeque::new();
            self.forwarded = self.received;
        }
    }

    /// Directions that the host has ended.
    pub fn ended_by_host(&self) -> u32 {
        self.host_ended
    }

    /// The backlog, when the guest has nothing to do with it any more.
    pub fn into_backlog(self) -> VecDeque<u8> {
        self.backlog
    }

    /// How much may be sent to the guest, bytes.
    pub fn credit(&self) -> u32 {
        // A guest that claims to have passed on what it was not sent has no room.
        let on_its_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(on_its_way)
    }

    /// Whether data of the host is wanted at all, with or without credit.
    fn receives(&self) -> bool {
        self.stage == Stage::Open && self.host_ended & NO_SEND == 0 && self.guest_ended & NO_RECEIVE == 0
    }

    /// Whether data of the host can go to the guest now.
    pub fn may_send(&self) -> bool {
        self.receives() && self.credit() > 0
    }

    /// What is to be said to the guest beside data, if anything is. `waiting`: the host has data.
    fn due(&self, waiting: bool) -> Option<(u16, u32)> {
        if let Some(greeting) = self.greeting {
            return Some((greeting, 0));
        }
        if self.stage != Stage::Open {
            return None;
        }
        if self.host_ended != self.told_ended {
            return Some((op::SHUTDOWN, self.host_ended));
        }
        if self.credit_due || self.forwarded.wrapping_sub(self.told) >= TELL_BYTES {
            return Some((op::CREDIT_UPDATE, 0));
        }
        let stuck = waiting && self.receives() && self.credit() == 0 && !self.credit_asked;
        stuck.then_some((op::CREDIT_REQUEST, 0))
    }

    /// Whether there is something for the guest. `waiting`: the host has data.
    pub fn has_packet(&self, waiting: bool) -> bool {
        self.due(waiting).is_some() || waiting && self.may_send()
    }

    /// The next packet without data, if one is due.
    pub fn next(&mut self, cid: u64, waiting: bool) -> Option<Header> {
        let (operation, flags) = self.due(waiting)?;
        match operation {
            op::SHUTDOWN => self.told_ended = flags,
            op::CREDIT_REQUEST => self.credit_asked = true,
            _ => {}
        }
        self.greeting = None;
        Some(self.header(cid, operation, 0, flags))
    }

    /// A packet with so much data, which must be within the credit.
    pub fn data(&mut self, cid: u64, bytes: usize) -> Header {
        debug_assert!(bytes as u32 <= self.credit());
        self.sent = self.sent.wrapping_add(bytes as u32);
        self.header(cid, op::RW, bytes as u32, 0)
    }

    fn header(&mut self, cid: u64, operation: u16, bytes: u32, flags: u32) -> Header {
        // Every header tells.
        self.told = self.forwarded;
        self.credit_due = false;
        Header {
            source_cid: HOST_CID,
            destination_cid: cid,
            source_port: self.ports.host,
            destination_port: self.ports.guest,
            bytes,
            kind: STREAM,
            operation,
            flags,
            buffer_bytes: BUFFER_BYTES,
            forwarded: self.forwarded,
        }
    }

    /// That it is over.
    pub fn reset(&mut self, cid: u64) -> Header {
        self.header(cid, op::RST, 0, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CID: u64 = 3;

    fn request(buffer_bytes: u32) -> Header {
        Header {
            source_port: 70,
            destination_port: 80,
            buffer_bytes,
            ..Header::default()
        }
    }

    fn open(buffer_bytes: u32) -> Connection {
        let mut connection = Connection::asked_by_guest(&request(buffer_bytes));
        connection.connected();
        let response = connection.next(CID, false).unwrap();
        assert_eq!(response.operation, op::RESPONSE);
        assert_eq!((response.source_port, response.destination_port), (80, 70));
        assert_eq!((response.source_cid, response.destination_cid), (2, CID));
        assert_eq!((response.buffer_bytes, response.kind), (BUFFER_BYTES, STREAM));
        connection
    }

    #[test]
    fn nothing_goes_either_way_before_both_have_agreed() {
        let mut by_guest = Connection::asked_by_guest(&request(100));
        assert!(!by_guest.has_packet(true));
        assert_eq!(by_guest.receive(1), Err(Violation));
        assert_eq!(by_guest.agreed(), Err(Violation));
        let mut by_host = Connection::asked_by_host(Ports { guest: 1, host: 2 });
        assert_eq!(by_host.agreed(), Err(Violation), "before it was asked");
        assert_eq!(by_host.next(CID, true).unwrap().operation, op::REQUEST);
        assert_eq!(by_host.next(CID, true), None);
        assert_eq!(by_host.receive(1), Err(Violation));
        by_host.agreed().unwrap();
        assert_eq!(by_host.agreed(), Err(Violation), "twice");
        assert_eq!(by_host.receive(1), Ok(true));
    }

    #[test]
    fn the_guest_gets_what_it_has_room_for_and_is_asked_once_when_it_has_none() {
        let mut connection = open(100);
        assert_eq!(connection.credit(), 100);
        assert_eq!(connection.data(CID, 100).bytes, 100);
        assert!(!connection.may_send() && connection.has_packet(true) && !connection.has_packet(false));
        assert_eq!(connection.next(CID, true).unwrap().operation, op::CREDIT_REQUEST);
        assert!(!connection.has_packet(true));
        connection.heard(&Header {
            forwarded: 60,
            ..request(100)
        });
        assert_eq!(connection.credit(), 60);
        // What cannot be is no credit, and no more than it says that it has.
        connection.heard(&Header {
            forwarded: 101,
            ..request(100)
        });
        assert_eq!(connection.credit(), 0);
        connection.heard(&Header {
            forwarded: 100,
            ..request(u32::MAX)
        });
        assert_eq!(connection.credit(), u32::MAX);
    }

    #[test]
    fn the_guest_may_send_what_fits_and_hears_when_there_is_room_again() {
        let mut connection = open(100);
        assert_eq!(connection.receive(BUFFER_BYTES + 1), Err(Violation));
        assert_eq!(connection.receive(BUFFER_BYTES), Ok(true));
        assert_eq!(connection.receive(1), Err(Violation));
        connection.put_by(&[7; BUFFER_BYTES as usize]);
        connection.passed_on_from_backlog(TELL_BYTES as usize - 1);
        assert!(!connection.has_packet(false));
        connection.passed_on_from_backlog(1);
        let told = connection.next(CID, false).unwrap();
        assert_eq!((told.operation, told.forwarded), (op::CREDIT_UPDATE, TELL_BYTES));
        assert!(!connection.has_packet(false));
        connection.credit_wanted();
        assert_eq!(connection.next(CID, false).unwrap().operation, op::CREDIT_UPDATE);
        assert_eq!(connection.receive(TELL_BYTES), Ok(true));
        assert_eq!(connection.receive(1), Err(Violation));
    }

    #[test]
    fn each_direction_ends_by_itself() {
        let mut connection = open(100);
        connection.end_by_host(NO_SEND);
        let told = connection.next(CID, true).unwrap();
        assert_eq!((told.operation, told.flags), (op::SHUTDOWN, NO_SEND));
        assert!(!connection.has_packet(true), "it will not send");
        assert_eq!(connection.receive(10), Ok(true));
        connection.put_by(&[1; 10]);
        connection.end_by_host(NO_RECEIVE);
        assert_eq!(connection.next(CID, true).unwrap().flags, NEITHER);
        assert!(connection.backlog().is_empty(), "nobody reads it");
        assert_eq!(connection.receive(BUFFER_BYTES), Ok(false));
        assert_eq!(connection.receive(BUFFER_BYTES), Ok(false), "it does not count");
        assert!(!connection.end_by_guest(NO_SEND));
        assert_eq!(connection.receive(1), Err(Violation));
        assert!(connection.end_by_guest(NO_RECEIVE));
        let mut deaf = open(100);
        assert!(!deaf.end_by_guest(NO_RECEIVE));
        assert!(!deaf.has_packet(true));
    }

    proptest! {
        /// Whatever either side does, both limits hold, and who has waited for room hears of it.
        #[test]
        fn credit_is_kept(steps in prop::collection::vec((any::<bool>(), 0..200_000u32), 1..300)) {
            let mut connection = open(50_000);
            // What the guest knows.
            let (mut sent, mut known) = (0u64, 0u64);
            let mut passed = 0u64;
            for (guest_sends, amount) in steps {
                if guest_sends {
                    let room = u64::from(BUFFER_BYTES) - (sent - known);
                    let bytes = u64::from(amount).min(room) as u32;
                    prop_assert_eq!(connection.receive(bytes), Ok(true));
                    connection.put_by(&vec![0; bytes as usize]);
                    sent += u64::from(bytes);
                } else {
                    let bytes = (amount as usize).min(connection.backlog().len());
                    connection.passed_on_from_backlog(bytes);
                    passed += bytes as u64;
                }
                prop_assert!(connection.backlog().len() <= BUFFER_BYTES as usize);
                prop_assert_eq!(connection.backlog().len() as u64, sent - passed);
                if let Some(told) = connection.next(CID, false) {
                    prop_assert_eq!(u64::from(told.forwarded), passed);
                    known = passed;
                }
                // It never waits for what has room.
                prop_assert!(sent - known < u64::from(BUFFER_BYTES) || passed < sent);
            }
        }
    }
}
