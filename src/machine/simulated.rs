//! Whole machines on the seeded scheduler of [`crate::simulation`]: real devices, real vCPU actors with scripted guests,
//! the real machine actor; pauses, resumes, resets, kicks, stops and panics at any point.
//!
//! In half of the schedules there is one controller who waits for each answer, and everybody answers in time. In the other
//! half there are up to three who do not wait, a vCPU may be stuck in an access or not take the time, and the time for
//! an answer may be up at any point.
//!
//! `ACTOR_VMM_SIMULATE=SEED` replays one schedule and prints what it did, `ACTOR_VMM_SIMULATE=FROM..TO` searches others
//! than the usual ones.

use super::actor::{Machine, Parts};
use super::chipset::{Chipset, ChipsetConfig};
use super::dispatch::{Actors, Discipline};
use super::outcome::Outcome;
use super::request::Inbox;
use super::supervisor::{OnReset, Unwired};
use super::virtio::Switches;
use crate::clock::Clock;
use crate::control::observatory::Published;
use crate::devices::Claim;
use crate::devices::rtc::MemorySize;
use crate::devices::shell::DeviceMessage;
use crate::host::console::{Console, ConsoleKind};
use crate::host::events::{CharacterDevice, EventLoopHandle, Gate, Recipient};
use crate::simulation::{self, Planted, draw, point};
use crate::vcpu::kick;
use crate::vcpu::scripted::ScriptedBackend;
use controllers::{Controller, Crowd};
use crossbeam_channel::{Sender, unbounded};
use guest::{COUNTER, Counter, Fate, Guest, Ledger, MUD, Mud, Time};
use slog::{Discard, Logger, o};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use vmm_sys_util::eventfd::EventFd;

mod controllers;
mod guest;

const VCPUS: usize = 2;

/// Plays the event loop: takes what devices send, and tells them that there is room.
fn play_events(
    mut characters: Vec<CharacterDevice>,
    mut gate: Box<dyn Gate>,
    waker: Arc<EventFd>,
    stop: impl Fn() -> bool,
    ended: Sender<()>,
    ledger: Arc<Ledger>,
) {
    let mut last = [None; VCPUS];
    loop {
        for line in &mut characters {
            line.end.up();
            let chunk = line.end.output();
            for byte in chunk {
                let (vcpu, round) = (usize::from(byte >> 7), byte & 0x7f);
                if round != 0 && last[vcpu] != Some(round - 1) {
                    ledger.wrong(format!("vcpu{vcpu} posted {round} after {:?}", last[vcpu]));
                }
                last[vcpu] = Some(round);
            }
            if line.end.wants_output_ready() {
                let Recipient::Device(device) = line.recipient else {
                    unreachable!("there is no other here");
                };
                gate.with(&mut |devices| {
                    devices.try_send(device, DeviceMessage::OutputReady);
                });
            }
        }
        point();
        if stop() && !characters.iter().any(|line| line.end.has_output()) {
            let _ = ended.send(());
            return;
        }
        if characters.iter().all(|line| line.end.rest()) {
            let waited = simulation::waited(|| stop() || waker.read().is_ok());
            if !waited {
                // The simulation has failed, and nobody takes turns any more.
                return;
            }
        }
    }
}

/// One machine's life. What went wrong, if something did.
fn live() -> Result<(), String> {
    let mut fates = vec![
        Fate::Nothing,
        Fate::Nothing,
        Fate::GuestResets,
        Fate::GuestExits,
        Fate::DevicePanics,
        Fate::VcpuPanics,
    ];
    // One who waits for each answer, or more who do not.
    let crowd = draw(2) * (1 + draw(3));
    let mut hasty = 0;
    if crowd > 0 {
        fates.extend([Fate::Stuck, Fate::Stuck, Fate::Stuck, Fate::LateTime]);
        hasty = [0, 0, 400, 60][draw(4)];
    }
    simulation::hasten(hasty);
    let fate = fates[draw(fates.len())];
    let unlucky = draw(VCPUS);
    let (counts, counted) = unbounded();
    let (wrong, complaints) = unbounded();
    let ledger = Arc::new(Ledger {
        moves: AtomicU64::new(0),
        begun: Default::default(),
        seen: Default::default(),
        counts,
        times: AtomicU64::new(0),
        known: AtomicU64::new(0),
        frozen: AtomicBool::new(false),
        loose: AtomicBool::new(false),
        resets: AtomicU64::new(0),
        dead: AtomicBool::new(false),
        over: Default::default(),
        wrong,
    });
    let log = Logger::root(Discard, o!());
    let inbox = Inbox::new();
    let address = inbox.address();
    let Inbox { sender, mailbox } = inbox;
    let clock = Clock::new();
    let waker = Arc::new(EventFd::new(libc::EFD_NONBLOCK).map_err(|error| error.to_string())?);
    let config = ChipsetConfig {
        memory: MemorySize {
            below_4g_bytes: 16 << 20,
            above_4g_bytes: 0,
        },
        clock: clock.clone(),
        waker: waker.clone(),
        machine: sender.clone(),
        delay: None,
        tarpit: None,
        bus: None,
    };
    let off = || Console::open(&ConsoleKind::Off).expect("nothing is opened");
    let mut chipset = Chipset::new(&config, off(), off(), &Unwired).map_err(|error| error.to_string())?;
    let counter = Box::new(Counter {
        count: 0,
        ledger: ledger.clone(),
    });
    const CLAIMS: &[Claim] = &[Claim::new(0, 4)];
    chipset.add_device(counter, COUNTER, CLAIMS, &config);
    chipset.add_device(Box::new(Mud(ledger.clone())), MUD, CLAIMS, &config);
    drop(config);
    let devices = chipset.devices.len();
    let answered = chipset.devices.iter();
    let answered = answered
        .map(|device| (device.name, device.answered.clone()))
        .collect();
    let characters = std::mem::take(&mut chipset.characters);
    let mut actors = Actors::new(chipset, VCPUS, &[], &sender).map_err(|error| error.to_string())?;
    let (event_loop, stop, ended) = EventLoopHandle::played(waker.clone());
    let (gate, waker_end, events) = (actors.gate(), waker.clone(), ledger.clone());
    crate::thread::spawn("events", move || {
        play_events(characters, gate, waker_end, stop, ended, events);
    })
    .map_err(|error| error.to_string())?;
    let published = Arc::new(Published::new(VCPUS, devices));
    let mut machine = Machine::new(Parts {
        sender: sender.clone(),
        mailbox,
        devices: actors.control(),
        answered,
        switches: Switches::default(),
        platform: Box::new(Time(ledger.clone())),
        event_loop,
        clock,
        waker,
        deadline: None,
        on_reset: OnReset::Reset,
        vcpus: VCPUS,
        published: published.clone(),
        log,
    });
    let backends = (0..VCPUS).map(|vcpu| {
        let rounds = 2 + draw(6) as u32;
        ScriptedBackend::new(Guest {
            vcpu,
            rounds,
            fate: (vcpu == unlucky).then(|| (draw(rounds as usize) as u32, fate)),
            late: fate == Fate::LateTime,
            life: 0,
            round: 0,
            steps: VecDeque::new(),
            ledger: ledger.clone(),
        })
    });
    machine
        .start_vcpus(backends.collect(), &actors, &sender)
        .map_err(|error| error.to_string())?;
    drop((sender, actors));
    let (kickers, controlled) = (machine.kickers(), ledger.clone());
    if crowd == 0 {
        let controller = Controller {
            machine: address,
            kickers,
            ledger: controlled,
            fate,
            paused: false,
        };
        crate::thread::spawn("controller", move || controller.control())
            .map_err(|error| error.to_string())?;
    } else {
        let all = Arc::new(Crowd {
            machine: address,
            kickers,
            published,
            ledger: controlled,
            fate,
            hasty: hasty > 0,
            left: AtomicU64::new(crowd as u64),
            stopped: AtomicBool::new(false),
        });
        for number in 0..crowd {
            let one = all.clone();
            crate::thread::spawn(format!("controller{number}"), move || one.control())
                .map_err(|error| error.to_string())?;
        }
    }
    tell(|| format!("{fate:?} for vcpu{unlucky}, {crowd} who do not wait, hasty {hasty}"));
    let outcome = machine.supervise();
    tell(|| format!("it ended as {outcome:?}"));
    // Who is left behind may go.
    ledger.loose.store(true, Relaxed);
    drop((machine, ledger));
    simulation::wait_for_all();
    let expected = matches!(
        (&outcome, fate),
        (Outcome::Stopped, _)
            | (Outcome::GuestExit(7), Fate::GuestExits)
            | (Outcome::InternalError(_), Fate::VcpuPanics)
            // A reset that is late in the middle.
            | (Outcome::ResetFailed(_), Fate::Stuck | Fate::LateTime)
    ) || hasty > 0 && matches!(outcome, Outcome::ResetFailed(_));
    if !expected {
        return Err(format!("with {fate:?} it ended as {outcome:?}"));
    }
    if let Some(wrong) = complaints.try_iter().next() {
        return Err(format!("with {fate:?}: {wrong}"));
    }
    check_counts(counted.try_iter())
}

/// Every read was counted once: in each life the guest has seen 1, 2, 3… In the last it may not have seen what was under
/// way when it ended. After the counter's death it reads all-ones.
fn check_counts(counts: impl Iterator<Item = (u32, u64)>) -> Result<(), String> {
    let mut lives: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for (life, count) in counts {
        let alive = count != u64::from(u32::MAX);
        lives.entry(life).or_default().extend(alive.then_some(count));
    }
    let last = lives.keys().next_back().copied();
    for (life, mut counts) in lives {
        counts.sort_unstable();
        let missing = counts
            .last()
            .map_or(0, |most| *most as usize - counts.len().min(*most as usize));
        let doubled = counts.windows(2).any(|pair| pair[0] == pair[1]);
        let allowed = if Some(life) == last { VCPUS } else { 0 };
        if doubled || missing > allowed {
            return Err(format!("in life {life} the counter said {counts:?}"));
        }
    }
    Ok(())
}

/// Prints what a schedule does, if only one is wanted.
fn tell(what: impl FnOnce() -> String) {
    if std::env::var("ACTOR_VMM_SIMULATE").is_ok_and(|given| !given.contains("..")) {
        println!("{}", what());
    }
}

/// One schedule, on a thread of its own: it is the machine actor's.
fn simulate(seed: u64, planted: Option<Planted>) -> Result<u64, String> {
    let thread = std::thread::spawn(move || {
        kick::install_handler().expect("a handler can be installed");
        simulation::run(seed, planted, live)
    });
    thread
        .join()
        .unwrap_or_else(|_| Err(format!("seed {seed}: the scheduler panicked")))
}

/// What the environment says, or these.
fn seeds(usual: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let Ok(given) = std::env::var("ACTOR_VMM_SIMULATE") else {
        return usual;
    };
    let number = |text: &str| {
        text.parse::<u64>()
            .expect("ACTOR_VMM_SIMULATE is SEED or FROM..TO")
    };
    match given.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => number(&given)..number(&given) + 1,
    }
}

fn search(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        if let Err(why) = simulate(seed, None) {
            panic!("{why}\nagain: ACTOR_VMM_SIMULATE={seed} cargo test --lib simulated");
        }
    }
}

// Two halves, for two processors.
#[test]
fn schedules_of_a_machine_the_first_half() {
    search(seeds(0..5_000));
}

#[test]
fn schedules_of_a_machine_the_second_half() {
    if std::env::var_os("ACTOR_VMM_SIMULATE").is_none() {
        search(5_000..10_000);
    }
}

#[test]
fn a_seed_is_a_schedule() {
    for seed in 0..50 {
        assert_eq!(simulate(seed, None), simulate(seed, None), "seed {seed}");
    }
}

/// Some schedule finds it.
fn find(planted: Planted) {
    let found = (0..10_000).find_map(|seed| simulate(seed, Some(planted)).err());
    let found = found.unwrap_or_else(|| panic!("no schedule finds {planted:?}"));
    println!("{planted:?}: {found}");
}

#[test]
fn planted_mistakes_of_kicks_and_answers_are_found() {
    find(Planted::NoKick);
    find(Planted::KickFirst);
    find(Planted::Unsettled);
    find(Planted::ForgottenDevice);
    find(Planted::HeardTwice);
}

#[test]
fn planted_mistakes_of_time_and_limits_are_found() {
    find(Planted::NoTakeTime);
    find(Planted::TakeTimeTwice);
    find(Planted::TakeTimeLost);
    find(Planted::FrozenEarly);
    find(Planted::NoDeadline);
}
