//! A balloon's queues for tests.

use super::queues::{Deflate, Inflate, Other};
use super::{Balloon, REPORTING};
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::Handler;
use crate::virtio::registers::{Published, Written};
use slog::{Logger, o};

pub fn quiet() -> Complaints {
    Complaints::new(Logger::root(slog::Discard, o!()))
}

pub fn balloon() -> Balloon {
    Balloon::new(0, Written::new(4))
}

pub fn inflate(balloon: &Balloon) -> Inflate {
    Inflate::new(balloon.clone(), Published::wide(0, 0), quiet())
}

/// For [`crate::virtio::subjects`].
pub fn handlers() -> [(&'static str, u64, Box<dyn Handler>); 3] {
    let balloon = balloon();
    let other = Other::new(false, balloon.clone(), None, quiet()).unwrap();
    [
        ("balloon inflate", 0, Box::new(inflate(&balloon))),
        ("balloon deflate", 0, Box::new(Deflate)),
        ("balloon report", REPORTING, Box::new(other)),
    ]
}
