//! Devices that block for ever, vCPUs that are late, and what can be asked of a machine meanwhile.

use crate::common::{LIMIT, Load, Machine, Temporary, config, wait_until};
use actor_vmm::actors::PlacementKind;
use actor_vmm::boot::EntryPoint;
use actor_vmm::control::client::Connection;
use actor_vmm::control::verbs::{self, Verb};
use actor_vmm::devices::Width;
use actor_vmm::devices::tarpit::{Mire, RELEASED};
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::platform::Platform;
use actor_vmm::machine::request::{Answer, Command};
use actor_vmm::machine::state::{Refused, State, Transition};
use actor_vmm::machine::supervisor::{MachineConfig, StartError};
use actor_vmm::vcpu::scripted::{Source, Step};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Reads the tarpit once, and then halts; or, without a turn at it, works.
enum Mixed {
    Stuck {
        began: Arc<AtomicU64>,
        done: bool,
        released: Arc<AtomicU64>,
    },
    Works(Load),
}

impl Source for Mixed {
    fn next(&mut self) -> Option<Step> {
        match self {
            Mixed::Stuck { began, done, .. } => {
                if std::mem::replace(done, true) {
                    return None;
                }
                began.fetch_add(1, Ordering::Relaxed);
                Some(Step::In {
                    port: 0xf6,
                    width: Width::Byte,
                    count: 1,
                    expect: None,
                })
            }
            Mixed::Works(load) => load.next(),
        }
    }

    fn seen(&mut self, step: &Step, value: u64) {
        match self {
            Mixed::Stuck { released, .. } => {
                assert_eq!(value, u64::from(RELEASED));
                released.fetch_add(1, Ordering::Relaxed);
            }
            Mixed::Works(load) => load.seen(step, value),
        }
    }
}

/// A machine of which two vCPUs are stuck in the tarpit and two work.
pub struct Mired {
    pub machine: Machine,
    pub socket: Temporary,
    pub count: Arc<AtomicU64>,
    pub wrong: Arc<AtomicU64>,
    pub released: Arc<AtomicU64>,
    pub release: Option<crossbeam_channel::Sender<()>>,
}

impl Mired {
    pub fn start(kind: PlacementKind) -> Mired {
        let socket = Temporary::new(&format!("mired-{kind}"));
        let (release, mire) = Mire::new();
        let config = MachineConfig {
            placements: vec![("tarpit".into(), kind)],
            control: Some(socket.0.clone()),
            tarpit: Some(mire),
            ..config(4)
        };
        let (count, wrong) = (Arc::default(), Arc::default());
        let (began, released) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let stuck = || Mixed::Stuck {
            began: began.clone(),
            done: false,
            released: released.clone(),
        };
        let works = |vcpu| Mixed::Works(Load::new(vcpu, &count, &wrong));
        let machine = Machine::start(config, vec![stuck(), works(1), stuck(), works(3)]);
        wait_until("it does not get stuck", || began.load(Ordering::Relaxed) == 2);
        Mired {
            machine,
            socket,
            count,
            wrong,
            released,
            release: Some(release),
        }
    }

    pub fn goes_on(&self) {
        let now = self.count.load(Ordering::Relaxed);
        wait_until("the others do not go on", || {
            self.count.load(Ordering::Relaxed) > now + 100
        });
    }

    pub fn stands(&self) {
        let now = self.count.load(Ordering::Relaxed);
        for _ in 0..100 {
            std::thread::yield_now();
        }
        assert_eq!(
            self.count.load(Ordering::Relaxed),
            now,
            "the others do not stand still"
        );
    }

    pub fn why(&self) -> serde_json::Value {
        Connection::open(&self.socket.0)
            .unwrap()
            .ask(Verb::Why, &verbs::from_words(&["why"]).unwrap().1)
            .unwrap()
    }
}

const PLACEMENTS: [PlacementKind; 3] = [PlacementKind::Handoff, PlacementKind::Thread, PlacementKind::Pool];

#[test]
fn a_device_that_never_answers_is_named_by_why_and_holds_up_nobody_else() {
    for kind in PLACEMENTS {
        let mired = Mired::start(kind);
        mired.goes_on();
        // Both are known to have begun, not yet to have got there.
        let mut why = mired.why();
        wait_until("why does not name it", || {
            why = mired.why();
            let sleeps = |wait: &serde_json::Value| wait["on"] == "tarpit" && wait["asleep"] == true;
            let waits = why["waits"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|wait| sleeps(wait))
                .count();
            let turn = why["turns"]
                .as_array()
                .unwrap()
                .iter()
                .any(|turn| turn["device"] == "tarpit");
            turn && waits == if kind == PlacementKind::Handoff { 1 } else { 2 }
        });
        let turns = why["turns"].as_array().unwrap();
        let turn = turns.iter().find(|turn| turn["device"] == "tarpit").unwrap();
        let holder = turn["holder"].as_str().unwrap();
        match kind {
            PlacementKind::Handoff => {
                assert!(holder == "vcpu0" || holder == "vcpu2", "{why:#}");
                assert_eq!(turn["message"], "in 0xf6/1", "{why:#}");
            }
            PlacementKind::Thread => assert_eq!(holder, "its own thread"),
            PlacementKind::Pool => assert_eq!(holder, "a thread of the pool"),
        }
        for wait in why["waits"].as_array().unwrap() {
            if wait["on"] == "tarpit" {
                assert_eq!(wait["message"], "in 0xf6/1", "{why:#}");
                assert_ne!(wait["who"], holder, "{why:#}");
            }
        }
        // The time is that of the wait: a while later it is longer by that while.
        let age = |why: &serde_json::Value| {
            let waits = why["waits"].as_array().unwrap();
            let wait = waits.iter().find(|wait| wait["on"] == "tarpit").unwrap();
            wait["ms"].as_u64().unwrap()
        };
        let (begin, before) = (Instant::now(), age(&why));
        while begin.elapsed() < Duration::from_millis(200) {
            std::thread::yield_now();
        }
        let later = age(&mired.why());
        assert!(later >= before + 150, "{before} ms, then {later} ms");
        // Soon, as often as not: the host may be busy.
        let fastest = (0..10).map(|_| {
            let begin = Instant::now();
            mired.why();
            begin.elapsed()
        });
        let fastest = fastest.min().unwrap();
        assert!(fastest < Duration::from_millis(100), "{fastest:?}");

        let begin = Instant::now();
        mired.machine.done(Command::Stop, State::Stopping);
        assert!(matches!(mired.machine.end(), Outcome::Stopped));
        assert!(begin.elapsed() < LIMIT / 10, "{:?}", begin.elapsed());
        assert_eq!(mired.wrong.load(Ordering::Relaxed), 0);
        assert!(!mired.socket.0.exists(), "the socket is left behind");
        drop(mired.release);
    }
}

#[test]
fn a_pause_with_a_stuck_device_says_whom_it_waits_for_and_stops_the_others() {
    for kind in PLACEMENTS {
        let mut mired = Mired::start(kind);
        mired.goes_on();
        // It has been stuck for some time when somebody asks.
        wait_until("it is not stuck for half a second", || {
            let why = mired.why();
            let mut vcpus = why["vcpus"].as_array().unwrap().iter();
            vcpus.any(|vcpu| vcpu["name"] == "vcpu0" && vcpu["ms"].as_u64() >= Some(500))
        });
        let answer = mired.machine.address.ask(Command::Pause);
        let Answer::Waits(State::Pausing, whom) = answer else {
            panic!("{kind}: {answer:?}")
        };
        // Device, message, and since when: since it is stuck, not since the pause, which has waited for 2 s.
        let vcpu0 = whom
            .iter()
            .find(|who| who.starts_with("vcpu0 to pause ("))
            .unwrap();
        let (_, since) = vcpu0.split_once("tarpit with in 0xf6/1, for ").unwrap();
        let ms: u64 = since[..since.find(' ').unwrap()].parse().unwrap();
        assert!(ms >= 2_400, "{whom:?}");
        match kind {
            PlacementKind::Handoff => {
                let runs = |who: &str| who.contains("it is at tarpit with in 0xf6/1, for ");
                let waits = |who: &str| who.contains("; tarpit's turn is run by vcpu");
                assert_eq!(whom.iter().filter(|who| runs(who)).count(), 1, "{whom:?}");
                assert_eq!(whom.iter().filter(|who| waits(who)).count(), 1, "{whom:?}");
            }
            PlacementKind::Thread => assert!(
                vcpu0.contains("; tarpit's turn is run by its own thread"),
                "{vcpu0}"
            ),
            PlacementKind::Pool => assert!(
                vcpu0.contains("; tarpit's turn is run by a thread of the pool"),
                "{vcpu0}"
            ),
        }
        assert!(!whom.iter().any(|who| who.starts_with("vcpu1")), "{whom:?}");
        mired.stands();
        let why = mired.why();
        assert_eq!(why["state"], "pausing");
        let machine_waits = |on: &str| {
            let waits = why["waits"].as_array().unwrap().iter();
            waits
                .clone()
                .any(|wait| wait["who"] == "machine" && wait["on"] == on)
        };
        assert!(machine_waits("vcpu0") && !machine_waits("vcpu1"), "{why:#}");
        // A reset is refused meanwhile; resuming takes the pause back.
        assert!(matches!(
            mired.machine.address.ask(Command::Reset),
            Answer::Refused(Refused(State::Pausing, Transition::Reset))
        ));
        mired.machine.done(Command::Resume, State::Running);
        mired.goes_on();
        // A reset is given up, and the machine goes on.
        assert!(matches!(
            mired.machine.address.ask(Command::Reset),
            Answer::Waits(State::Running, _)
        ));
        mired.goes_on();
        // Once it is loose everything works.
        mired.release = None;
        wait_until("it is not loose", || mired.released.load(Ordering::Relaxed) == 2);
        mired.machine.done(Command::Pause, State::Paused);
        mired.stands();
        mired.machine.done(Command::Resume, State::Running);
        mired.machine.done(Command::Stop, State::Stopping);
        assert!(matches!(mired.machine.end(), Outcome::Stopped));
    }
}

#[test]
fn a_machine_that_waits_for_a_pause_can_be_stopped() {
    let mired = Mired::start(PlacementKind::Handoff);
    let address = mired.machine.address.clone();
    let asker = std::thread::spawn(move || address.ask(Command::Pause));
    wait_until("it is not pausing", || mired.why()["state"] == "pausing");
    mired.machine.done(Command::Stop, State::Stopping);
    let answer = asker.join().unwrap();
    assert!(
        matches!(answer, Answer::Overtaken(_) | Answer::Waits(..)),
        "{answer:?}"
    );
    assert!(matches!(mired.machine.end(), Outcome::Stopped));
    drop(mired.release);
}

/// Reads the tarpit when it is told to, and says when.
struct OnOrder {
    order: Receiver<()>,
    began: Sender<Instant>,
}

impl Source for OnOrder {
    fn next(&mut self) -> Option<Step> {
        self.order.recv().ok()?;
        let _ = self.began.send(Instant::now());
        Some(Step::In {
            port: 0xf6,
            width: Width::Byte,
            count: 1,
            expect: None,
        })
    }

    fn seen(&mut self, _: &Step, _: u64) {}
}

#[test]
fn why_names_a_stuck_device_within_a_tenth_of_a_second() {
    const LIMIT: Duration = Duration::from_millis(100);
    let mut fastest = Duration::MAX;
    // The best of some: the host may be busy.
    for _ in 0..10 {
        let socket = Temporary::new("named");
        let (release, mire) = Mire::new();
        let config = MachineConfig {
            tarpit: Some(mire),
            control: Some(socket.0.clone()),
            ..config(1)
        };
        let ((go, order), (began, told)) = (bounded(1), bounded(1));
        let machine = Machine::start(config, vec![OnOrder { order, began }]);
        let request = verbs::from_words(&["why"]).unwrap().1;
        wait_until("there is no socket", || Connection::open(&socket.0).is_ok());
        let mut control = Connection::open(&socket.0).unwrap();
        go.send(()).unwrap();
        let began = told.recv().unwrap();
        wait_until("why does not name it", || {
            let why = control.ask(Verb::Why, &request).unwrap();
            let mut turns = why["turns"].as_array().unwrap().iter();
            turns.any(|turn| turn["device"] == "tarpit" && turn["message"] == "in 0xf6/1")
        });
        fastest = fastest.min(began.elapsed());
        drop((release, go));
        machine.done(Command::Stop, State::Stopping);
        assert!(matches!(machine.end(), Outcome::Stopped));
        if fastest < LIMIT {
            return;
        }
    }
    panic!("it takes {fastest:?}");
}

/// One vCPU in the tarpit, alone or with others that work.
fn one_stuck(mire: Mire, others: u32, count: &Arc<AtomicU64>) -> (MachineConfig, Vec<Mixed>, Arc<AtomicU64>) {
    let began = Arc::new(AtomicU64::new(0));
    let stuck = Mixed::Stuck {
        began: began.clone(),
        done: false,
        released: Arc::default(),
    };
    let works = (1..=others).map(|vcpu| Mixed::Works(Load::new(vcpu, count, &Arc::default())));
    let config = MachineConfig {
        tarpit: Some(mire),
        ..config(1 + others as usize)
    };
    (config, std::iter::once(stuck).chain(works).collect(), began)
}

#[test]
fn a_pause_and_a_reset_are_answered_in_time_though_nobody_has_to_be_told_anything() {
    let (release, mire) = Mire::new();
    let (config, vcpus, began) = one_stuck(mire, 0, &Arc::default());
    let machine = Machine::start(config, vcpus);
    wait_until("it does not get stuck", || began.load(Ordering::Relaxed) == 1);
    // The first tells it to pause, the second finds that it was told.
    for _ in 0..2 {
        let answer = machine.address.ask(Command::Pause);
        assert!(matches!(answer, Answer::Waits(State::Pausing, _)), "{answer:?}");
        machine.done(Command::Resume, State::Running);
    }
    for _ in 0..2 {
        let answer = machine.address.ask(Command::Reset);
        assert!(matches!(answer, Answer::Waits(State::Running, _)), "{answer:?}");
    }
    drop(release);
    machine.done(Command::Pause, State::Paused);
    machine.done(Command::Stop, State::Stopping);
    assert!(matches!(machine.end(), Outcome::Stopped));
}

/// Counts how often guest time was stopped.
struct Stops(Arc<AtomicU64>);

impl Platform for Stops {
    fn freeze(&mut self) -> Instant {
        self.0.fetch_add(1, Ordering::Relaxed);
        Instant::now()
    }
    fn thaw(&mut self, _: Duration) -> Instant {
        Instant::now()
    }
    fn reset(&mut self) -> Result<Option<EntryPoint>, StartError> {
        Ok(None)
    }
}

/// A clock that was set back could not be made right while the boot processor is stuck, and all others look at that.
#[test]
fn guest_time_is_not_stopped_while_the_boot_processor_is_stuck() {
    let (release, mire) = Mire::new();
    let (count, stops) = (Arc::default(), Arc::new(AtomicU64::new(0)));
    let (config, vcpus, began) = one_stuck(mire, 1, &count);
    let machine = Machine::start_on(config, vcpus, Stops(stops.clone()));
    wait_until("it does not get stuck", || began.load(Ordering::Relaxed) == 1);
    let answer = machine.address.ask(Command::Pause);
    assert!(matches!(answer, Answer::Waits(State::Pausing, _)), "{answer:?}");
    assert_eq!(stops.load(Ordering::Relaxed), 0);
    machine.done(Command::Resume, State::Running);
    let now = count.load(Ordering::Relaxed);
    wait_until("the other does not go on", || {
        count.load(Ordering::Relaxed) > now + 100
    });
    drop(release);
    machine.done(Command::Pause, State::Paused);
    assert_eq!(stops.load(Ordering::Relaxed), 1);
    machine.done(Command::Stop, State::Stopping);
    assert!(matches!(machine.end(), Outcome::Stopped));
}

/// Works, and the first time that it is told what time it is it does not come back until the sender is gone.
struct TellsNoTime {
    load: Load,
    late: Option<Receiver<()>>,
}

impl Source for TellsNoTime {
    fn next(&mut self) -> Option<Step> {
        self.load.next()
    }

    fn seen(&mut self, step: &Step, value: u64) {
        self.load.seen(step, value);
    }

    fn take_time(&mut self) {
        if let Some(late) = self.late.take() {
            let _ = late.recv();
        }
    }
}

#[test]
fn a_resume_whose_boot_processor_does_not_take_the_time_says_so_and_nobody_runs_before() {
    let (count, wrong) = (Arc::new(AtomicU64::new(0)), Arc::default());
    let (release, late) = bounded(0);
    let vcpu = |vcpu| TellsNoTime {
        load: Load::new(vcpu, &count, &wrong),
        late: Some(late.clone()),
    };
    let machine = Machine::start(config(2), vec![vcpu(0), vcpu(1)]);
    wait_until("it does not start", || count.load(Ordering::Relaxed) > 0);
    machine.done(Command::Pause, State::Paused);
    let stands = count.load(Ordering::Relaxed);
    let Answer::Waits(State::Resuming, whom) = machine.address.ask(Command::Resume) else {
        panic!("it goes on")
    };
    assert!(
        whom[0].starts_with("vcpu0 to take in what time it is"),
        "{whom:?}"
    );
    assert!(matches!(
        machine.address.ask(Command::Resume),
        Answer::Refused(Refused(State::Resuming, Transition::Resume))
    ));
    // Whatever else is asked for waits as well, and says so.
    let answer = machine.address.ask(Command::Pause);
    assert!(matches!(answer, Answer::Waits(State::Pausing, _)), "{answer:?}");
    let answer = machine.address.ask(Command::Resume);
    assert!(matches!(answer, Answer::Waits(State::Resuming, _)), "{answer:?}");
    assert_eq!(
        count.load(Ordering::Relaxed),
        stands,
        "it runs on a clock that is wrong"
    );
    drop(release);
    wait_until("it does not go on", || count.load(Ordering::Relaxed) > stands);
    machine.done(Command::Pause, State::Paused);
    machine.done(Command::Resume, State::Running);
    machine.done(Command::Stop, State::Stopping);
    assert!(matches!(machine.end(), Outcome::Stopped));
    assert_eq!(wrong.load(Ordering::Relaxed), 0);
}
