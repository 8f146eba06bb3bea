//! Whole machines on the seeded scheduler of [`crate::simulation`]: real devices, real vCPU actors with scripted guests,
//! the real machine actor; pauses, resumes, resets, kicks, stops and panics at any point.
//!
//! `ACTOR_VMM_SIMULATE=SEED` replays one schedule and prints what it did, `ACTOR_VMM_SIMULATE=FROM..TO` searches others
//! than the usual ones.

use super::actor::{Machine, Parts};
use super::chipset::{Chipset, ChipsetConfig};
use super::dispatch::{Actors, Discipline};
use super::outcome::Outcome;
use super::platform::NoPlatform;
use super::request::{Answer, Command, Inbox, MachineAddress, Reply};
use super::state::{Refused, State};
use super::supervisor::{OnReset, Unwired};
use super::virtio::Switches;
use crate::boot::layout::io;
use crate::clock::Clock;
use crate::control::observatory::Published;
use crate::devices::rtc::MemorySize;
use crate::devices::shell::DeviceMessage;
use crate::devices::{Access, Claim, Context, Device, Width};
use crate::host::console::{Console, ConsoleKind};
use crate::host::events::{CharacterDevice, EventLoopHandle, Gate, Recipient};
use crate::simulation::{self, Planted, draw, point};
use crate::vcpu::kick::{self, KickHandle};
use crate::vcpu::scripted::{ScriptedBackend, Source, Step};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use slog::{Discard, Logger, o};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use vmm_sys_util::eventfd::EventFd;

const VCPUS: usize = 2;

/// Where the counter is.
const COUNTER: u16 = 0x5000;
/// What kills the counter.
const DEADLY: u32 = 0xdead;

/// A device that counts its reads, from 1. Both vCPUs use it, and another thread may run in the middle of its turn.
struct Counter {
    count: u64,
    ledger: Arc<Ledger>,
}

impl Device for Counter {
    fn name(&self) -> &'static str {
        "counter"
    }

    fn read(&mut self, _: &mut dyn Context, _: Access) -> u64 {
        self.ledger.moved();
        let before = self.count;
        point();
        self.count = before + 1;
        self.count
    }

    fn write(&mut self, _: &mut dyn Context, _: Access, value: u64) {
        self.ledger.moved();
        if value == u64::from(DEADLY) {
            std::panic::resume_unwind(Box::new("told to"));
        }
    }

    fn reset(&mut self, _: &mut dyn Context) {
        self.count = 0;
    }
}

/// What happened, for whoever checks it. Only who has its turn touches it.
struct Ledger {
    /// Whatever a guest or a device did.
    moves: AtomicU64,
    /// Reads that each vCPU has begun, and those that its guest has seen the end of.
    begun: [AtomicU64; VCPUS],
    seen: [AtomicU64; VCPUS],
    /// What the counter said, and in which life of the guest.
    counts: Sender<(u32, u64)>,
    /// What must not have happened.
    wrong: Sender<String>,
}

impl Ledger {
    fn moved(&self) {
        self.moves.fetch_add(1, Relaxed);
    }

    fn wrong(&self, what: String) {
        let _ = self.wrong.send(what);
    }
}

/// What befalls a machine, beside what is asked of it from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Nothing,
    GuestResets,
    GuestExits,
    DevicePanics,
    VcpuPanics,
}

/// A guest's processor: each round reads the counter, writes and reads a register that is its own, and posts a byte.
struct Guest {
    vcpu: usize,
    rounds: u32,
    fate: Option<(u32, Fate)>,
    life: u32,
    round: u32,
    steps: VecDeque<Step>,
    ledger: Arc<Ledger>,
}

impl Guest {
    /// The register of its own, its width, and what it holds in a round.
    fn own(&self, round: u32) -> (u16, Width, u32) {
        match self.vcpu {
            0 => (io::SERIAL0 + 7, Width::Byte, (round * 7 + 1) & 0xff),
            _ => (io::PCI_CONFIG, Width::Dword, 0x8000_0000 | ((round + 1) << 8)),
        }
    }

    fn plan_round(&mut self) {
        let (port, width, value) = self.own(self.round);
        let read = |port, width, expect| Step::In {
            port,
            width,
            count: 1,
            expect,
        };
        let write = |port, width, value| Step::Out {
            port,
            width,
            values: vec![value],
        };
        if self.round == 0 {
            // As after power-on, in every life.
            self.steps.push_back(read(port, width, Some(0)));
        }
        self.steps.push_back(read(COUNTER, Width::Dword, None));
        self.steps.push_back(write(port, width, value));
        self.steps.push_back(read(port, width, Some(value)));
        let byte = ((self.vcpu as u32) << 7) | self.round;
        self.steps.push_back(write(io::DEBUG_CONSOLE, Width::Byte, byte));
        // Once, in the first life.
        match self.fate.take_if(|(round, _)| *round == self.round) {
            Some((_, Fate::GuestResets)) => {
                self.steps
                    .push_back(write(io::ACPI_RESET, Width::Byte, io::ACPI_RESET_VALUE.into()));
            }
            Some((_, Fate::GuestExits)) => {
                self.steps.push_back(write(io::DEBUG_EXIT, Width::Byte, 7));
            }
            Some((_, Fate::DevicePanics)) => {
                self.steps.push_back(write(COUNTER, Width::Dword, DEADLY));
            }
            Some((_, Fate::VcpuPanics)) => std::panic::resume_unwind(Box::new("told to".to_string())),
            Some((_, Fate::Nothing)) | None => {}
        }
        self.round += 1;
    }
}

impl Source for Guest {
    fn next(&mut self) -> Option<Step> {
        point();
        if self.steps.is_empty() && self.round < self.rounds {
            self.plan_round();
        }
        // In the end it halts for ever.
        let step = self.steps.pop_front()?;
        self.ledger.moved();
        tell(|| format!("vcpu{} in its life {}: {step:?}", self.vcpu, self.life));
        if matches!(step, Step::In { .. }) {
            self.ledger.begun[self.vcpu].fetch_add(1, Relaxed);
        }
        Some(step)
    }

    fn seen(&mut self, step: &Step, value: u64) {
        self.ledger.seen[self.vcpu].fetch_add(1, Relaxed);
        match step {
            Step::In {
                expect: Some(expect), ..
            } if u64::from(*expect) != value => self.ledger.wrong(format!(
                "vcpu{} in its life {}, round {}: {step:?} got {value:#x}",
                self.vcpu, self.life, self.round
            )),
            Step::In { port: COUNTER, .. } => {
                let _ = self.ledger.counts.send((self.life, value));
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.ledger.moved();
        self.life += 1;
        self.round = 0;
        self.steps.clear();
    }
}

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

/// Whoever controls the machine.
struct Controller {
    machine: MachineAddress,
    kickers: Vec<KickHandle>,
    ledger: Arc<Ledger>,
    fate: Fate,
    paused: bool,
}

impl Controller {
    fn request(&self, command: Command) -> Receiver<Answer> {
        tell(|| format!("asked to {command:?}"));
        let (tell, answer) = bounded(1);
        self.machine
            .request(command, Reply::new(move |answer| drop(tell.try_send(answer))));
        answer
    }

    /// Waits for an answer, and checks that it is one that fits.
    fn answer(&self, command: Command, answer: &Receiver<Answer>) -> Answer {
        let answer = simulation::receive(answer).unwrap_or(Answer::Gone);
        tell(|| format!("{command:?} is answered with {answer:?}"));
        let fits = match &answer {
            Answer::Done(_) | Answer::Overtaken(_) => true,
            // It ends by itself.
            Answer::Gone | Answer::Refused(Refused(State::Stopping, _)) => {
                matches!(self.fate, Fate::GuestExits | Fate::VcpuPanics)
            }
            // The guest's own reset may be under way.
            Answer::Refused(_) => self.fate == Fate::GuestResets,
            Answer::Waits(..) | Answer::Failed(_) | Answer::NoSuchDevice | Answer::Unfit(_) => false,
        };
        if !fits {
            self.ledger
                .wrong(format!("{command:?} was answered with {answer:?}"));
        }
        answer
    }

    fn ask(&self, command: Command) -> Answer {
        self.answer(command, &self.request(command))
    }

    /// The machine was just paused: nothing moves, and nothing is half done.
    fn check_stillness(&self) {
        if self.fate == Fate::GuestResets {
            // That reset may begin as soon as the machine is paused.
            return;
        }
        let before = self.ledger.moves.load(Relaxed);
        for (begun, seen) in self.ledger.begun.iter().zip(&self.ledger.seen) {
            let (begun, seen) = (begun.load(Relaxed), seen.load(Relaxed));
            if begun != seen {
                self.ledger
                    .wrong(format!("paused, and of {begun} reads {seen} are done"));
            }
        }
        for _ in 0..draw(20) {
            point();
        }
        if self.ledger.moves.load(Relaxed) != before {
            self.ledger.wrong("something moved in a paused machine".into());
        }
    }

    fn control(mut self) {
        for _ in 0..1 + draw(6) {
            for _ in 0..draw(40) {
                point();
            }
            match draw(6) {
                0 | 1 if !self.paused => {
                    self.paused = self.ask(Command::Pause) == Answer::Done(State::Paused);
                    if self.paused {
                        self.check_stillness();
                    }
                }
                0..=2 if self.paused => {
                    self.paused = self.ask(Command::Resume) != Answer::Done(State::Running);
                }
                2 => {
                    let (pause, resume) = (self.request(Command::Pause), self.request(Command::Resume));
                    self.answer(Command::Pause, &pause);
                    self.answer(Command::Resume, &resume);
                }
                3 => {
                    let answer = self.ask(Command::Reset);
                    let expected = if self.paused {
                        State::Paused
                    } else {
                        State::Running
                    };
                    let other = matches!(answer, Answer::Done(state) if state != expected);
                    if other && self.fate != Fate::GuestResets {
                        self.ledger
                            .wrong(format!("a reset in {expected} led to {answer:?}"));
                    }
                }
                _ => {
                    for _ in 0..3 {
                        self.kickers[draw(VCPUS)].kick();
                    }
                }
            }
        }
        self.ask(Command::Stop);
        // After the end, too.
        for kicker in &self.kickers {
            kicker.kick();
        }
    }
}

/// One machine's life. What went wrong, if something did.
fn live() -> Result<(), String> {
    let fates = [
        Fate::Nothing,
        Fate::Nothing,
        Fate::GuestResets,
        Fate::GuestExits,
        Fate::DevicePanics,
        Fate::VcpuPanics,
    ];
    let fate = fates[draw(fates.len())];
    let unlucky = draw(VCPUS);
    let (counts, counted) = unbounded();
    let (wrong, complaints) = unbounded();
    let ledger = Arc::new(Ledger {
        moves: AtomicU64::new(0),
        begun: Default::default(),
        seen: Default::default(),
        counts,
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
    let mut machine = Machine::new(Parts {
        sender: sender.clone(),
        mailbox,
        devices: actors.control(),
        answered,
        switches: Switches::default(),
        platform: Box::new(NoPlatform),
        event_loop,
        clock,
        waker,
        deadline: None,
        on_reset: OnReset::Reset,
        vcpus: VCPUS,
        published: Arc::new(Published::new(VCPUS, devices)),
        log,
    });
    let backends = (0..VCPUS).map(|vcpu| {
        let rounds = 2 + draw(6) as u32;
        ScriptedBackend::new(Guest {
            vcpu,
            rounds,
            fate: (vcpu == unlucky).then(|| (draw(rounds as usize) as u32, fate)),
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
    let controller = Controller {
        machine: address,
        kickers: machine.kickers(),
        ledger: ledger.clone(),
        fate,
        paused: false,
    };
    crate::thread::spawn("controller", move || controller.control()).map_err(|error| error.to_string())?;
    tell(|| format!("{fate:?} for vcpu{unlucky}"));
    let outcome = machine.supervise();
    tell(|| format!("it ended as {outcome:?}"));
    drop((machine, ledger));
    simulation::wait_for_all();
    let expected = matches!(
        (&outcome, fate),
        (Outcome::Stopped, _)
            | (Outcome::GuestExit(7), Fate::GuestExits)
            | (Outcome::InternalError(_), Fate::VcpuPanics)
    );
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

#[test]
fn planted_mistakes_are_found() {
    // From where: one of them shows in few schedules.
    for (planted, from) in [
        (Planted::NoKick, 0),
        (Planted::KickFirst, 0),
        (Planted::Unsettled, 0),
        (Planted::ForgottenDevice, 0),
        (Planted::HeardTwice, 3_000),
    ] {
        let found = (from..from + 10_000).find_map(|seed| simulate(seed, Some(planted)).err());
        let found = found.unwrap_or_else(|| panic!("no schedule finds {planted:?}"));
        println!("{planted:?}: {found}");
    }
}
