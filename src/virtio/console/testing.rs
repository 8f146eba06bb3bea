//! A console's queues for tests, with a host's side that types and reads.

use super::open;
use crate::host::character::wake;
use crate::host::events::Recipient;
use crate::virtio::queue::Handler;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Reads all that a guest sends, until it is dropped.
pub struct Reader(Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        let _ = self.1.take().map(JoinHandle::join);
    }
}

/// For [`crate::virtio::subjects`].
pub struct Handlers {
    pub receive: Box<dyn Handler>,
    /// Types something in, for at least one request.
    pub fill: Box<dyn Fn()>,
    pub transmit: Box<dyn Handler>,
    pub reader: Reader,
}

/// The same.
pub fn handlers() -> Handlers {
    let mut input = open(None).unwrap();
    let receive = input.handlers.remove(0);
    let Recipient::Actors { input: bell, .. } = input.host.recipient else {
        panic!()
    };
    let end = std::cell::RefCell::new(input.host.end);
    let fill = move || {
        end.borrow_mut().give(&[7; 4096]);
        wake(&bell);
    };
    fill();
    let mut output = open(None).unwrap();
    let transmit = output.handlers.remove(1);
    let Recipient::Actors { room, .. } = output.host.recipient else {
        panic!()
    };
    let over = Arc::new(AtomicBool::new(false));
    let (ended, mut end) = (over.clone(), output.host.end);
    let reader = std::thread::spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            end.output().commit_all();
            if end.wants_output_ready() {
                wake(&room);
            }
            std::thread::yield_now();
        }
    });
    Handlers {
        receive,
        fill: Box::new(fill),
        transmit,
        reader: Reader(over, Some(reader)),
    }
}
