//! Each queue of each device, with a request that it must be able to serve: for hostile tests and fuzzing.

use super::balloon;
use super::block::config::Format;
use super::block::testing::{Scratch, made_image};
use super::block::{Block, Disk, DiskConfig, Image};
use super::console;
use super::limit::{Allowance, Limited, Limits};
use super::net;
use super::net::control::Control;
use super::net::receive::Receive;
use super::net::transmit::Transmit;
use super::queue::Handler;
use super::rng::Rng;
use super::share;
use super::testing::{LIMIT, Outcome, R, Rig, W};
use super::vsock;
use slog::{Logger, o};
use std::sync::Arc;

/// A log of nothing.
pub fn quiet() -> Logger {
    Logger::root(slog::Discard, o!())
}

/// A device, a request that it must be able to serve, and what has to stay alive.
pub struct Subject {
    pub name: &'static str,
    pub handler: Box<dyn Handler>,
    pub probe: Box<dyn Fn(&mut Rig) -> Outcome>,
    /// What becomes of it.
    pub served: Outcome,
    pub kept: Box<dyn std::any::Any>,
}

/// All of them.
pub fn subjects() -> Vec<Subject> {
    let devices = [disk, entropy, network, socket, balloon, console, folder, ports];
    devices.into_iter().flat_map(|queues| queues()).collect()
}

/// A disk's request for its first sector.
fn first_sector() -> Box<dyn Fn(&mut Rig) -> Outcome> {
    Box::new(|rig| {
        rig.write(0x5000, &[0; 16]);
        let outcome = rig.request(&[R(0x5000, 16), W(0x6000, 512), W(0x6300, 1)]);
        assert_eq!(rig.read(0x6300, 1), [0], "the request has failed");
        outcome
    })
}

/// A disk's queue, with each kind of image; with a limit that is never reached for long.
pub fn disk() -> Vec<Subject> {
    let file = Scratch::new(&[0; 64 << 10]);
    let image = Arc::new(Image::open(&file.config(false)).unwrap());
    let allowance = Allowance {
        bytes: Some(1 << 40),
        operations: Some(1 << 30),
    };
    let limits = Limits::new(allowance);
    let limited = Subject {
        name: "blk limited",
        handler: Limited::around(Block::new(Disk::Raw(image), "", quiet()), &limits, 17).unwrap(),
        probe: first_sector(),
        served: Outcome::Used(513),
        kept: Box::new(file),
    };
    let file = Scratch::new(&[0; 64 << 10]);
    let image = Arc::new(Image::open(&file.config(false)).unwrap());
    let disk = Subject {
        name: "blk",
        handler: Box::new(Block::new(Disk::Raw(image), "", quiet())),
        probe: first_sector(),
        served: Outcome::Used(513),
        kept: Box::new(file),
    };
    let file = Scratch::new(&made_image());
    let config = DiskConfig {
        format: Some(Format::Qcow2),
        ..file.config(false)
    };
    let qcow2 = Subject {
        name: "blk qcow2",
        handler: Box::new(Block::new(Disk::open(&config).unwrap().remove(0), "", quiet())),
        probe: first_sector(),
        served: Outcome::Used(513),
        kept: Box::new(file),
    };
    vec![disk, limited, qcow2]
}

/// The entropy device's.
pub fn entropy() -> Vec<Subject> {
    vec![Subject {
        name: "rng",
        handler: Box::new(Rng::open().unwrap()),
        probe: Box::new(|rig| rig.request(&[W(0x5000, 16)])),
        served: Outcome::Used(16),
        kept: Box::new(()),
    }]
}

/// A network device's.
pub fn network() -> Vec<Subject> {
    let (mut all, (pair, host)) = (Vec::new(), net::testing::pair());
    let link = net::testing::link(quiet());
    // Frames are there: a queue without any would look at nothing.
    let (inside, frame) = (Arc::new(host), [0; 12 + 60]);
    let sender = inside.clone();
    inside.set_nonblocking(true).unwrap();
    while sender.send(&frame).is_ok() {}
    all.push(Subject {
        name: "net receive",
        handler: Box::new(Receive::new(pair.0, link.end(true))),
        probe: Box::new(move |rig| {
            let _ = sender.send(&frame);
            rig.request(&[W(0x5000, 12), W(0x6000, 1600)])
        }),
        served: Outcome::Used(72),
        kept: Box::new(()),
    });
    all.push(Subject {
        name: "net transmit",
        handler: Box::new(Transmit::new(pair.1, link.end(false))),
        probe: Box::new(move |rig| {
            let mut frame = [0; 2048];
            while inside.recv(&mut frame).is_ok() {}
            let outcome = rig.request(&[R(0x5000, 12), R(0x6000, 60)]);
            // Behind what was on its way before, perhaps.
            let deadline = std::time::Instant::now() + LIMIT;
            while !matches!(inside.recv(&mut frame), Ok(72)) {
                assert!(std::time::Instant::now() < deadline, "the frame was not sent");
                std::thread::yield_now();
            }
            outcome
        }),
        served: Outcome::Used(0),
        kept: Box::new(()),
    });
    all.push(Subject {
        name: "net control",
        handler: Box::new(Control::without_commands()),
        probe: Box::new(|rig| rig.request(&[R(0x5000, 4), W(0x6000, 1)])),
        served: Outcome::Used(1),
        kept: Box::new(()),
    });
    all
}

/// A socket device's.
pub fn socket() -> Vec<Subject> {
    let (place, receive, transmit) = vsock::testing::handlers();
    let receive = Subject {
        name: "vsock receive",
        handler: Box::new(receive),
        probe: Box::new(|rig| rig.request(&[W(0x5000, 44), W(0x6000, 100)])),
        served: Outcome::Used(44),
        kept: Box::new(place),
    };
    let transmit = Subject {
        name: "vsock transmit",
        handler: Box::new(transmit),
        probe: Box::new(|rig| {
            rig.write(0x5000, &[0; 44]);
            rig.request(&[R(0x5000, 44)])
        }),
        served: Outcome::Used(0),
        kept: Box::new(()),
    };
    vec![receive, transmit]
}

/// A balloon's.
pub fn balloon() -> Vec<Subject> {
    let handlers = balloon::testing::handlers().into_iter();
    let subject = |(name, features, handler)| Subject {
        name,
        handler,
        probe: Box::new(move |rig: &mut Rig| {
            rig.features = features;
            rig.start();
            rig.request(&[R(0x5000, 16)])
        }),
        served: Outcome::Used(0),
        kept: Box::new(()),
    };
    handlers.map(subject).collect()
}

/// A console's.
pub fn console() -> Vec<Subject> {
    let console::testing::Handlers {
        receive,
        fill,
        transmit,
        reader,
    } = console::testing::handlers();
    let receive = Subject {
        name: "console receive",
        handler: receive,
        probe: Box::new(move |rig| {
            fill();
            rig.request(&[W(0x5000, 16)])
        }),
        served: Outcome::Used(16),
        kept: Box::new(()),
    };
    let transmit = Subject {
        name: "console transmit",
        handler: transmit,
        probe: Box::new(|rig| rig.request(&[R(0x5000, 16)])),
        served: Outcome::Used(0),
        kept: Box::new(reader),
    };
    vec![receive, transmit]
}

/// A shared folder's.
pub fn folder() -> Vec<Subject> {
    let subject = |(number, name)| {
        let (_, mut handlers, _) = share::testing::opened(quiet(), share::testing::echo);
        Subject {
            name,
            handler: handlers.remove(number),
            probe: Box::new(|rig: &mut Rig| {
                rig.write(0x5000, &share::testing::request(1, &[7; 8]));
                let outcome = rig.request(&[R(0x5000, 48), W(0x6000, 100)]);
                assert_eq!(rig.read(0x6010, 8), [7; 8]);
                outcome
            }),
            served: Outcome::Used(24),
            // With the one for requests the other side ends.
            kept: Box::new(handlers),
        }
    };
    ["share urgent", "share requests"]
        .into_iter()
        .enumerate()
        .map(subject)
        .collect()
}

/// Of a device with ports: its control queues, and a port's.
pub fn ports() -> Vec<Subject> {
    let console::ports::testing::Handlers {
        place,
        tell,
        hear,
        receive,
        fill,
        transmit,
    } = console::ports::testing::handlers();
    let place = Arc::new(place);
    let subject = |name, handler, served, probe| Subject {
        name,
        handler,
        probe,
        served: Outcome::Used(served),
        kept: Box::new(place.clone()),
    };
    vec![
        subject(
            "port receive",
            receive,
            1,
            Box::new(move |rig: &mut Rig| {
                fill();
                // Of what was read ahead before, any number of bytes may be left.
                rig.request(&[W(0x5000, 1)])
            }),
        ),
        subject(
            "port transmit",
            transmit,
            0,
            Box::new(|rig| rig.request(&[R(0x5000, 16)])),
        ),
        subject(
            "ports control receive",
            tell,
            8,
            Box::new(|rig| rig.request(&[W(0x5000, 64)])),
        ),
        subject(
            "ports control transmit",
            hear,
            0,
            Box::new(|rig| {
                rig.write(0x5000, &[0; 8]);
                rig.request(&[R(0x5000, 8)])
            }),
        ),
    ]
}
