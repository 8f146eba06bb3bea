//! What device and driver tell each other of ports, as a pure state machine. [VIRTIO 1.2 §5.3.6.2]
//!
//! ```text
//!  driver: DEVICE_READY ─▶ PORT_ADD of each port ─▶ driver: PORT_READY ─▶ PORT_NAME, and PORT_OPEN when a program of the
//!                                                                      host comes or goes
//! ```
//!
//! What is to be told is what the driver has not been told yet: a few words a port, however often it asks, and however often
//! programs of the host come and go. One that has gone is always told before the next that has come.

/// A control message without what some have behind. [VIRTIO 1.2 §5.3.6.2: struct virtio_console_control]
pub const MESSAGE_BYTES: usize = 8;

/// What a message is about. [VIRTIO 1.2 §5.3.6.2]
pub mod event {
    /// The driver is ready.
    pub const DEVICE_READY: u16 = 0;
    /// There is a port.
    pub const DEVICE_ADD: u16 = 1;
    /// The driver has it.
    pub const PORT_READY: u16 = 3;
    /// A program has it open, or no more.
    pub const PORT_OPEN: u16 = 6;
    /// What it is called.
    pub const PORT_NAME: u16 = 7;
}

/// A control message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    /// Of which port.
    pub id: u32,
    /// One of [`event`].
    pub event: u16,
    /// What of it.
    pub value: u16,
}

impl Message {
    /// As it is in memory.
    pub fn from_bytes(bytes: [u8; MESSAGE_BYTES]) -> Message {
        let [i, j, k, l, e, f, v, w] = bytes;
        Message {
            id: u32::from_le_bytes([i, j, k, l]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([v, w]),
        }
    }

    /// The same.
    pub fn to_bytes(self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..4].copy_from_slice(&self.id.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.event.to_le_bytes());
        bytes[6..].copy_from_slice(&self.value.to_le_bytes());
        bytes
    }
}

/// What the driver knows of one port, and is to be told.
#[derive(Clone, Debug, Default)]
struct Port {
    add_due: bool,
    /// The driver has it.
    ready: bool,
    name_due: bool,
    told_open: bool,
    /// Which of the host's comings and goings it was told last: odd when somebody has come.
    told: u32,
    /// Which was the last.
    host: u32,
}

/// See above. Ports have the numbers from 1 on: 0 is the console of a driver that knows no others.
pub struct Talk {
    names: Vec<String>,
    ports: Vec<Port>,
}

impl Talk {
    /// Of ports with these names.
    pub fn new(names: Vec<String>) -> Talk {
        let ports = vec![Port::default(); names.len()];
        Talk { names, ports }
    }

    /// The driver begins anew: it knows nothing.
    pub fn reset(&mut self) {
        self.ports.fill(Port::default());
    }

    /// The driver wants to know which ports there are.
    pub fn device_ready(&mut self) {
        for port in &mut self.ports {
            *port = Port {
                add_due: true,
                host: port.host,
                ..Port::default()
            };
        }
    }

    /// The driver has a port, or cannot have it. `place`: the port's place in the list of names.
    pub fn port_ready(&mut self, place: usize, ready: bool) {
        let port = &mut self.ports[place];
        *port = Port {
            ready,
            name_due: ready,
            host: port.host,
            ..Port::default()
        };
    }

    /// How often a program of the host has come or gone. Odd: somebody is there.
    pub fn host(&mut self, place: usize, count: u32) {
        self.ports[place].host = count;
    }

    /// The next message: which port, what, and what is behind it.
    pub fn next(&self) -> Option<(Message, &str)> {
        self.ports
            .iter()
            .zip(&self.names)
            .zip(1..)
            .find_map(|((port, name), id)| {
                let message = |event, value| Message { id, event, value };
                if port.add_due {
                    return Some((message(event::DEVICE_ADD, 1), ""));
                }
                if !port.ready {
                    return None;
                }
                if port.name_due {
                    return Some((message(event::PORT_NAME, 1), name.as_str()));
                }
                match port.told_open {
                    true if port.told != port.host => Some((message(event::PORT_OPEN, 0), "")),
                    false if port.host % 2 == 1 => Some((message(event::PORT_OPEN, 1), "")),
                    _ => None,
                }
            })
    }

    /// The driver was told it.
    pub fn told(&mut self, message: Message) {
        let port = &mut self.ports[message.id as usize - 1];
        match message.event {
            event::DEVICE_ADD => port.add_due = false,
            event::PORT_NAME => port.name_due = false,
            _ => {
                port.told_open = message.value == 1;
                port.told = port.host;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(talk: &mut Talk) -> Vec<(u32, u16, u16, String)> {
        let mut all = Vec::new();
        while let Some((message, behind)) = talk.next() {
            all.push((message.id, message.event, message.value, behind.to_string()));
            talk.told(message);
        }
        all
    }

    #[test]
    fn a_driver_learns_of_ports_their_names_and_who_is_there() {
        let mut talk = Talk::new(vec!["a".into(), "b".into()]);
        talk.host(0, 1);
        assert_eq!(talk.next(), None, "nobody has asked");
        talk.device_ready();
        talk.device_ready();
        assert_eq!(
            all(&mut talk),
            [
                (1, event::DEVICE_ADD, 1, "".into()),
                (2, event::DEVICE_ADD, 1, "".into())
            ]
        );
        talk.port_ready(0, true);
        talk.port_ready(1, false);
        assert_eq!(
            all(&mut talk),
            [
                (1, event::PORT_NAME, 1, "a".into()),
                (1, event::PORT_OPEN, 1, "".into())
            ]
        );
        talk.host(1, 1);
        assert_eq!(all(&mut talk), [], "it cannot have that port");
    }

    #[test]
    fn a_coming_and_going_is_told_as_such_and_many_as_one() {
        let mut talk = Talk::new(vec!["a".into()]);
        talk.port_ready(0, true);
        all(&mut talk);
        let open = |value| (1, event::PORT_OPEN, value, String::new());
        talk.host(0, 2);
        assert_eq!(all(&mut talk), [], "come and gone before it was told");
        talk.host(0, 3);
        assert_eq!(all(&mut talk), [open(1)]);
        talk.host(0, 5);
        assert_eq!(all(&mut talk), [open(0), open(1)], "another one");
        talk.host(0, 4001);
        assert_eq!(all(&mut talk), [open(0), open(1)]);
        talk.host(0, 4002);
        assert_eq!(all(&mut talk), [open(0)]);
        talk.host(0, 4003);
        talk.reset();
        assert_eq!(all(&mut talk), []);
    }

    #[test]
    fn messages_are_little_endian() {
        let bytes = [1, 2, 0, 0, 6, 0, 1, 0];
        let message = Message {
            id: 0x201,
            event: event::PORT_OPEN,
            value: 1,
        };
        assert_eq!((Message::from_bytes(bytes), message.to_bytes()), (message, bytes));
    }
}
