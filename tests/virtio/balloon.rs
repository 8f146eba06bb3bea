//! The balloon in whole machines.

use crate::driver::Driver;
use crate::machine::{LIMIT, Machine, Scratch, config};
use crate::ways;
use actor_vmm::control::client::{ClientError, Connection};
use actor_vmm::control::verbs;
use actor_vmm::machine::memory::{Backing, MIN_BYTES};
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::request::{Answer, Command};
use actor_vmm::machine::state::State;
use actor_vmm::virtio::Transport;
use actor_vmm::virtio::config::VirtioConfig;
use serde_json::{Value, json};
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const PAGE: u64 = 4096;
/// The list of pages.
const LIST: u64 = 0x30_0000;
/// What is inflated: from 8 MiB on.
const FIRST: u32 = 0x800;
const PAGES: u32 = 1000;

fn balloon(transport: Transport, text: &str) -> VirtioConfig {
    VirtioConfig {
        balloon: Some(text.parse().unwrap()),
        transport,
        ..VirtioConfig::default()
    }
}

/// Pages of guest memory that are the machine's. [mincore(2)]
fn resident(machine: &Machine) -> usize {
    let mut count = 0;
    for region in machine.memory.iter() {
        let mut pages = vec![0u8; (region.len() / PAGE) as usize];
        let (start, bytes) = (region.as_ptr(), region.len() as usize);
        // SAFETY: the range is the region's, and there is a byte for each of its pages.
        let result = unsafe { libc::mincore(start.cast(), bytes, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        count += pages.iter().filter(|page| **page & 1 != 0).count();
    }
    count
}

fn fill(machine: &Machine, byte: u8) {
    let all = vec![byte; PAGES as usize * PAGE as usize];
    machine
        .memory
        .write_slice(&all, GuestAddress(u64::from(FIRST) * PAGE))
        .unwrap();
}

fn is_filled_with(machine: &Machine, byte: u8) -> bool {
    let mut all = vec![!byte; PAGES as usize * PAGE as usize];
    machine
        .memory
        .read_slice(&mut all, GuestAddress(u64::from(FIRST) * PAGE))
        .unwrap();
    all.iter().all(|have| *have == byte)
}

/// Asks the control plane about the balloon.
fn ask(control: &mut Connection, size: Option<&str>) -> Result<Value, ClientError> {
    let (verb, mut request) = verbs::from_words(&["balloon"]).unwrap();
    if let Some(size) = size {
        request["size"] = json!(size);
    }
    control.ask(verb, &request)
}

/// Has the driver give the pages.
fn inflate(machine: &Machine, driver: &mut Driver<'_>) {
    for page in 0..PAGES {
        let at = GuestAddress(LIST + 4 * u64::from(page));
        machine.memory.write_obj((FIRST + page).to_le(), at).unwrap();
    }
    driver.offer(&[(LIST, 4 * PAGES, false)]);
}

#[test]
fn a_balloon_gives_memory_back_under_every_discipline_and_placement() {
    for (way, transport, dispatch, placements) in ways() {
        let placements = placements.into_iter().take(1);
        let placements = placements
            .map(|(_, kind)| ("balloon0".to_string(), kind))
            .collect();
        let socket = Scratch::new(&[]);
        std::fs::remove_file(&socket.0).unwrap();
        let mut config = config(dispatch, placements, balloon(transport, "size=4M"));
        config.control = Some(socket.0.clone());
        // Both kinds of memory.
        config.memory.backing = match transport {
            Transport::Mmio => Backing::Anonymous,
            Transport::Pci => Backing::Memfd,
        };
        let machine = Machine::start(config);
        let mut driver = Driver::new(&machine, transport, 0);
        assert_eq!(driver.device_type(), 5, "{way}");
        driver.start_queues(2);
        assert_eq!((driver.field(0), driver.field(4)), (1024, 0), "{way}");
        fill(&machine, 3);
        // With a huge page for the list, perhaps.
        machine.memory.write_obj(0u32, GuestAddress(LIST)).unwrap();
        let before = resident(&machine);
        inflate(&machine, &mut driver);
        assert_eq!(driver.interrupt(), 1, "{way}");
        let after = resident(&machine);
        assert!(before - after > PAGES as usize - 10, "{way}: {before} {after}");
        assert!(is_filled_with(&machine, 0), "{way}");
        driver.set_field(4, PAGES);
        // A step is on its way otherwise.
        assert_eq!(driver.field(4), PAGES, "{way}");

        // The control plane knows, and asks for another size.
        let mut control = Connection::open(&socket.0).unwrap();
        let told = ask(&mut control, None).unwrap();
        let field = |name: &str| told[name].as_u64().unwrap();
        assert_eq!(field("wanted_bytes"), 4 << 20, "{way}");
        assert_eq!(field("actual_bytes"), u64::from(PAGES) * PAGE, "{way}");
        assert_eq!(field("inflated_bytes_total"), u64::from(PAGES) * PAGE, "{way}");
        ask(&mut control, Some("1M")).unwrap();
        assert_eq!(driver.interrupt(), 2, "{way}: a change of configuration");
        assert_eq!(driver.field(0), 256, "{way}");
        for (size, said) in [
            ("16M", "more than the guest's memory"),
            ("100", "multiple of 4096"),
        ] {
            match ask(&mut control, Some(size)) {
                Err(ClientError::Refused { text, .. }) => assert!(text.contains(said), "{way}: {text}"),
                other => panic!("{way}: {other:?}"),
            }
        }
        // In a paused machine as well: it is taken at once, and the guest hears of it when it goes on.
        assert_eq!(machine.address.ask(Command::Pause), Answer::Done(State::Paused));
        assert_eq!(ask(&mut control, Some("2M")).unwrap()["state"], "paused", "{way}");
        let told = ask(&mut control, None).unwrap();
        assert_eq!(told["wanted_bytes"].as_u64(), Some(2 << 20), "{way}");
        assert_eq!(machine.address.ask(Command::Resume), Answer::Done(State::Running));
        assert_eq!(driver.interrupt(), 2, "{way}: a change of configuration");
        assert_eq!(driver.field(0), 512, "{way}");
        // Deflated pages are used again.
        driver.offer_in(1, &[(LIST, 4 * PAGES, false)]);
        assert_eq!(driver.interrupt(), 1, "{way}");
        fill(&machine, 4);
        assert!(is_filled_with(&machine, 4), "{way}");
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
    }
}

#[test]
fn no_page_is_emptied_after_a_reset_or_while_the_machine_is_paused() {
    for (way, transport, dispatch, placements) in ways() {
        let placements = placements.into_iter().take(1);
        let placements = placements
            .map(|(_, kind)| ("balloon0".to_string(), kind))
            .collect();
        let machine = Machine::start(config(dispatch, placements, balloon(transport, "")));
        let mut driver = Driver::new(&machine, transport, 0);
        for _ in 0..20 {
            driver.start();
            fill(&machine, 5);
            inflate(&machine, &mut driver);
            // Anywhere between not begun and done.
            driver.set_status(0);
            assert_eq!((driver.status(), driver.pending()), (0, 0), "{way}");
            fill(&machine, 6);
            for _ in 0..5 {
                std::thread::yield_now();
            }
            assert!(
                is_filled_with(&machine, 6),
                "{way}: memory was emptied after the reset"
            );

            driver.start();
            inflate(&machine, &mut driver);
            assert_eq!(
                machine.address.ask(Command::Pause),
                Answer::Done(State::Paused),
                "{way}"
            );
            let begun = resident(&machine);
            for _ in 0..5 {
                std::thread::yield_now();
            }
            assert_eq!(
                resident(&machine),
                begun,
                "{way}: memory was given back while paused"
            );
            assert_eq!(
                machine.address.ask(Command::Resume),
                Answer::Done(State::Running),
                "{way}"
            );
            assert_eq!(driver.interrupt(), 1, "{way}");
            assert!(is_filled_with(&machine, 0), "{way}");
        }
        assert!(matches!(machine.end(), Outcome::GuestExit(7)), "{way}");
    }
}

#[test]
fn without_a_balloon_nobody_can_change_its_size() {
    let socket = Scratch::new(&[]);
    std::fs::remove_file(&socket.0).unwrap();
    let mut config = config(Default::default(), Vec::new(), VirtioConfig::default());
    config.control = Some(socket.0.clone());
    assert_eq!(config.memory.size_bytes, MIN_BYTES);
    let machine = Machine::start(config);
    let deadline = Instant::now() + LIMIT;
    let mut control = loop {
        match Connection::open(&socket.0) {
            Ok(control) => break control,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    for size in [None, Some("1M")] {
        match ask(&mut control, size) {
            Err(ClientError::Refused { kind, .. }) => assert_eq!(kind, "no-such-device"),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(machine.end(), Outcome::GuestExit(7)));
}
