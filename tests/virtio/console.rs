//! The console in whole machines, its output in a file.

use crate::driver::Driver;
use crate::machine::{LIMIT, Machine, Scratch, config};
use crate::ways;
use actor_vmm::host::console::ConsoleKind;
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::request::{Answer, Command};
use actor_vmm::machine::state::State;
use actor_vmm::virtio::config::VirtioConfig;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};

const OUT: u64 = 0x30_0000;
const PIECE: u32 = 40_000;

/// The queue that a driver sends by.
const TRANSMIT: u32 = 1;

fn wait(driver: &Driver<'_>, way: &str) {
    let deadline = Instant::now() + LIMIT;
    while !driver.all_used(TRANSMIT) {
        assert!(Instant::now() < deadline, "{way}: the queue is not served");
        std::thread::yield_now();
    }
    driver.pending();
}

#[test]
fn all_that_a_guest_sends_arrives_once_and_in_order_through_pauses_and_after_resets() {
    for (way, transport, dispatch, placements) in ways() {
        let file = Scratch::new(b"from before");
        let virtio = VirtioConfig {
            console: Some(ConsoleKind::File(file.0.clone())),
            transport,
            ..VirtioConfig::default()
        };
        // The placements are those of other devices.
        let placements = placements
            .into_iter()
            .take(1)
            .map(|(_, kind)| ("console0".to_string(), kind));
        let machine = Machine::start(config(dispatch, placements.collect(), virtio));
        let mut driver = Driver::new(&machine, transport, 0);
        assert_eq!(driver.device_type(), 3, "{way}");
        let mut expected = Vec::new();
        for round in 0..6u8 {
            driver.start_queues(2);
            for part in 0..4u8 {
                let bytes: Vec<u8> = (0..PIECE).map(|at| (at as u8) ^ (round * 4 + part)).collect();
                machine.memory.write_slice(&bytes, GuestAddress(OUT)).unwrap();
                driver.offer_in(
                    TRANSMIT,
                    &[
                        (OUT, PIECE / 2, false),
                        (OUT + u64::from(PIECE / 2), PIECE / 2, false),
                    ],
                );
                if part % 2 == 1 {
                    assert_eq!(
                        machine.address.ask(Command::Pause),
                        Answer::Done(State::Paused),
                        "{way}"
                    );
                    assert_eq!(
                        machine.address.ask(Command::Resume),
                        Answer::Done(State::Running),
                        "{way}"
                    );
                }
                wait(&driver, &way);
                expected.extend(bytes);
            }
            driver.set_status(0);
            assert_eq!(driver.status(), 0, "{way}");
        }
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
        assert!(std::fs::read(&file.0).unwrap() == expected, "{way}");
    }
}
