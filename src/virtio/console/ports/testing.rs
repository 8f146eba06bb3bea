//! The queues of a device with ports for tests, with programs of the host.

use super::line::Exchange;
use super::{PortConfig, open};
use crate::virtio::queue::{Handler, Interruption, Request};
use crate::virtio::testing::LIMIT;
use nix::poll::PollFlags;
use slog::{Logger, o};
use std::io::{ErrorKind, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that is gone with the value.
pub struct Place(pub PathBuf);

impl Place {
    pub fn new() -> Place {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("actor-vmm-ports-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Place(path)
    }

    pub fn connect(&self, name: &str) -> UnixStream {
        let stream = UnixStream::connect(self.0.join(name)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Of the ports `a` (a socket) and `b` (a file).
pub fn configs(place: &Place) -> Vec<PortConfig> {
    [
        format!("name=a,uds={}", place.0.join("a").display()),
        format!("name=b,file={}", place.0.join("b").display()),
    ]
    .map(|text| text.parse().unwrap())
    .to_vec()
}

/// As if in each life the driver knew all ports and a program of the guest had the first open.
struct Eager(Box<dyn Handler>, Arc<Exchange>);

impl Handler for Eager {
    fn start(&mut self, features: u64, life: u32) {
        self.1.device_ready.say(life, true);
        for line in &self.1.lines {
            line.guest.say(life, true);
            line.notice.ring();
        }
        self.0.start(features, life);
    }
    fn prepare(&mut self) -> bool {
        self.0.prepare()
    }
    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.0.waits_for()
    }
    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        self.0.serve(request)
    }
}

/// For [`crate::virtio::subjects`]: a queue each of the control queues and of a port, and what fills the port's receive queue.
pub struct Handlers {
    pub place: Place,
    pub tell: Box<dyn Handler>,
    pub hear: Box<dyn Handler>,
    pub receive: Box<dyn Handler>,
    pub fill: Box<dyn Fn()>,
    pub transmit: Box<dyn Handler>,
}

/// The same.
pub fn handlers() -> Handlers {
    let log = Logger::root(slog::Discard, o!());
    let place = Place::new();
    let eager = |name: &str, queue: usize| {
        let exchange = Exchange::new(15).unwrap();
        let socket = crate::host::socket::OwnedSocket::bind("", &place.0.join(name), 16).unwrap();
        let (_, hand) = super::Outlet::socket(&log).unwrap();
        let handler: Box<dyn Handler> = match queue {
            0 => {
                let names = (0..15).map(|number| format!("port{number}")).collect();
                Box::new(super::Tell::new(names, exchange.clone()))
            }
            _ => Box::new(super::Inlet::new(0, exchange.clone(), socket, hand).unwrap()),
        };
        Box::new(Eager(handler, exchange))
    };
    let (tell, receive) = (eager("t", 0), eager("r", 2));
    let client = place.connect("r");
    client.set_nonblocking(true).unwrap();
    let fill = move || {
        while let Err(error) = (&client).write(&[7; 4096]).map(drop) {
            if error.kind() == ErrorKind::WouldBlock {
                break;
            }
        }
    };
    for _ in 0..16 {
        fill();
    }
    let mut opened = open(&configs(&place), &log).unwrap();
    let transmit = opened.handlers.remove(7);
    let hear = opened.handlers.remove(3);
    Handlers {
        place,
        tell,
        hear,
        receive,
        fill: Box::new(fill),
        transmit,
    }
}
