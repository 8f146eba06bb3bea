//! The one shell that makes an actor of any device: it carries messages in, and what the device's state says out.
//!
//! After every message the shell compares the device's interrupt level and deadline with what it last told the
//! outside, and tells the difference. Devices never fire lines or set timers themselves.

use super::{Access, BackendEvent, BackendNews, Context, Device, MachineRequest, NEVER, Nanos, Outputs};
use crate::actors::{Actor, Lifecycle, Rank};
use crate::clock::Clock;
use crate::host::character::CharacterEnd;
use crate::host::timer::TimerSlot;
use crate::simulation::{Planted, planted};
use std::time::SystemTime;

/// What a device actor receives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceMessage {
    /// A guest reads; the reply is the value.
    Read(Access),
    /// A guest writes.
    Write(Access, u64),
    /// The machine's life.
    Lifecycle(Lifecycle),
    /// The device's deadline has come.
    Tick,
    /// Bytes have come in on the host side.
    InputReady,
    /// The host side has room again.
    OutputReady,
    /// From an actor behind the device.
    Backend(BackendNews),
}

/// Where a device's interrupt goes.
pub trait InterruptLine: Send {
    /// The level has changed.
    fn set(&mut self, level: bool);
}

/// Where a device's requests to the machine go. Must not wait: it is called in a device's turn.
pub type RequestSink = Box<dyn Fn(MachineRequest) + Send>;

/// Where a device says that it has handled a lifecycle message (all but [`Lifecycle::Start`], which nobody waits for).
/// Must not wait: it is called in a device's turn.
pub type LifeSink = Box<dyn Fn() + Send>;

/// What a device is connected to.
pub struct Surroundings {
    /// Guest time.
    pub clock: Clock,
    /// The interrupt line, if it has one.
    pub line: Option<Box<dyn InterruptLine>>,
    /// The host side of a character device.
    pub character: Option<CharacterEnd>,
    /// Where deadlines are told.
    pub timer: Option<TimerSlot>,
    /// Where requests go.
    pub requests: RequestSink,
    /// Where the end of lifecycle messages is told.
    pub life: Option<LifeSink>,
}

impl Context for Surroundings {
    fn now(&self) -> Nanos {
        self.clock.now()
    }

    fn wall_clock_ns(&self) -> i64 {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }

    fn transmit(&mut self, byte: u8) -> bool {
        // A device without a host side talks to nobody, and is never held up.
        self.character
            .as_mut()
            .is_none_or(|character| character.transmit(byte))
    }

    fn lose(&mut self) {
        // A device without a host side is never without room.
        if let Some(character) = &self.character {
            character.lose();
        }
    }

    fn receive(&mut self) -> Option<u8> {
        self.character.as_mut()?.receive()
    }

    fn request(&mut self, request: MachineRequest) {
        (self.requests)(request);
    }
}

/// A device as an actor.
///
/// Owns: the device's state and its ends of the host side. Receives: [`DeviceMessage`]. Asks: nobody. Rank: device.
/// Ends: when the machine does, or when the device panics; its accesses then read all-ones.
pub struct Shell {
    device: Box<dyn Device>,
    outside: Surroundings,
    /// What the outside was last told.
    level: bool,
    due: Nanos,
    /// While the machine is paused.
    held: Option<Held>,
}

/// What came from the host's side while the machine was paused, and waits for the end of that: state must not change.
#[derive(Clone, Copy, Default)]
struct Held {
    tick: bool,
    input: bool,
    output: bool,
    /// What was heard from behind the device.
    news: Option<BackendNews>,
    /// The last change of the configuration.
    change: Option<BackendNews>,
}

impl Shell {
    /// A device and what it is connected to.
    pub fn new(device: Box<dyn Device>, outside: Surroundings) -> Shell {
        Shell {
            device,
            outside,
            level: false,
            due: NEVER,
            held: None,
        }
    }

    /// The machine's life. Guest time is the clock's: a device that is not called does not change.
    fn live(&mut self, event: Lifecycle) {
        match event {
            Lifecycle::Start => return,
            Lifecycle::Pause => {
                self.held.get_or_insert_default();
                self.device.pause(&mut self.outside);
            }
            Lifecycle::Resume => {
                if let Some(held) = self.held.take() {
                    self.device.resume(&mut self.outside);
                    for news in [held.change, held.news].into_iter().flatten() {
                        self.device.backend_news(&mut self.outside, news);
                    }
                    if held.tick {
                        self.tick();
                    }
                    if held.input {
                        self.device.input_ready(&mut self.outside);
                    }
                    if held.output {
                        self.device.output_ready(&mut self.outside);
                    }
                }
            }
            Lifecycle::Reset => {
                if !planted(Planted::ForgottenDevice) || self.device.name() != "serial0" {
                    self.device.reset(&mut self.outside);
                }
                // The host's side is as it was: what is there is told again, as it is to a new device.
                match &mut self.held {
                    Some(held) => (held.input, held.output) = (true, true),
                    None => self.device.input_ready(&mut self.outside),
                }
            }
        }
        // The line is as the state says before anybody hears that it is so.
        self.reflect();
        if let Some(tell) = &self.outside.life {
            tell();
        }
    }

    fn tick(&mut self) {
        // A tick that was on its way when the deadline moved is too early: nothing is due.
        if self
            .device
            .deadline()
            .is_some_and(|deadline| deadline <= self.outside.clock.now())
        {
            self.device.tick(&mut self.outside);
        }
        // The timer is spent whatever came of it, and must be told again even if the deadline is the same.
        self.due = NEVER;
    }

    /// From the host's side: at once, or after a pause.
    fn hear_host(&mut self, message: DeviceMessage) {
        match (message, &mut self.held) {
            (DeviceMessage::Tick, Some(held)) => held.tick = true,
            (DeviceMessage::InputReady, Some(held)) => held.input = true,
            (DeviceMessage::OutputReady, Some(held)) => held.output = true,
            (DeviceMessage::Backend(news), Some(held)) if news.event == BackendEvent::Reconfigured => {
                held.change = Some(news);
            }
            (DeviceMessage::Backend(news), Some(held)) => {
                held.news = Some(held.news.map_or(news, |earlier| earlier.and(news)));
            }
            (DeviceMessage::Backend(news), None) => self.device.backend_news(&mut self.outside, news),
            (DeviceMessage::Tick, None) => self.tick(),
            (DeviceMessage::InputReady, None) => self.device.input_ready(&mut self.outside),
            (DeviceMessage::OutputReady, None) => self.device.output_ready(&mut self.outside),
            _ => {}
        }
    }

    /// What no guest's access is.
    #[cold]
    #[inline(never)]
    fn hear(&mut self, message: DeviceMessage) {
        match message {
            DeviceMessage::Lifecycle(event) => self.live(event),
            _ => self.hear_host(message),
        }
    }

    /// How many actors behind the device will post to it.
    pub fn backends(&self) -> usize {
        self.device.backends()
    }

    /// Tells the outside what has changed.
    #[inline]
    fn reflect(&mut self) {
        let Outputs { due, level } = self.device.outputs();
        if level != self.level {
            self.drive(level);
        }
        if due != self.due {
            self.set_timer(due);
        }
    }

    // Apart: most messages change neither.

    #[inline(never)]
    fn drive(&mut self, level: bool) {
        self.level = level;
        if let Some(line) = &mut self.outside.line {
            line.set(level);
        }
    }

    #[inline(never)]
    fn set_timer(&mut self, due: Nanos) {
        self.due = due;
        if let Some(timer) = &self.outside.timer {
            timer.set((due != NEVER).then_some(due));
        }
    }
}

impl Actor for Shell {
    type Message = DeviceMessage;
    type Reply = u64;
    const RANK: Rank = Rank::Device;

    // Small enough to be compiled into each place that makes a message: where it is known to be a guest's access, nothing
    // of it goes through memory, and a turn is the device's own work and two looks.
    #[inline(always)]
    fn handle(&mut self, message: DeviceMessage) -> u64 {
        let mut reply = 0;
        match message {
            DeviceMessage::Read(access) => reply = self.device.read(&mut self.outside, access),
            DeviceMessage::Write(access, value) => self.device.write(&mut self.outside, access, value),
            other => self.hear(other),
        }
        self.reflect();
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Width;
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// One register: bit 0 is the interrupt, the rest the deadline.
    #[derive(Default)]
    struct Toy(u64);

    impl Device for Toy {
        fn name(&self) -> &'static str {
            "toy"
        }
        fn read(&mut self, _: &mut dyn Context, _: Access) -> u64 {
            self.0
        }
        fn write(&mut self, cx: &mut dyn Context, _: Access, value: u64) {
            if value == 0xdead {
                cx.request(MachineRequest::PowerOff);
            }
            self.0 = value;
        }
        fn interrupt(&self) -> bool {
            self.0 & 1 != 0
        }
        fn deadline(&self) -> Option<Nanos> {
            (self.0 >> 1 != 0).then_some(Nanos(self.0 >> 1))
        }
        fn tick(&mut self, _: &mut dyn Context) {
            self.0 = 1;
        }
        fn reset(&mut self, _: &mut dyn Context) {
            self.0 = 0;
        }
    }

    struct Line(Arc<AtomicU64>);
    impl InterruptLine for Line {
        fn set(&mut self, level: bool) {
            // Rising edges in the high half, falling ones in the low.
            self.0
                .fetch_add(if level { 1 << 32 } else { 1 }, Ordering::Relaxed);
        }
    }

    const REGISTER: Access = Access {
        offset: 0,
        width: Width::Qword,
    };

    fn shell() -> (Shell, Arc<AtomicU64>, crossbeam_channel::Receiver<MachineRequest>) {
        let edges = Arc::new(AtomicU64::new(0));
        let (requests, asked) = crossbeam_channel::unbounded();
        let outside = Surroundings {
            clock: Clock::new(),
            line: Some(Box::new(Line(edges.clone()))),
            character: None,
            timer: None,
            life: None,
            requests: Box::new(move |request| requests.send(request).unwrap()),
        };
        (Shell::new(Box::<Toy>::default(), outside), edges, asked)
    }

    #[test]
    fn a_paused_device_is_told_afterwards_what_came_meanwhile() {
        let (mut shell, _, _) = shell();
        shell.handle(DeviceMessage::Write(REGISTER, 1 << 1));
        shell.handle(DeviceMessage::Lifecycle(Lifecycle::Pause));
        while shell.outside.clock.now() < Nanos(1) {}
        shell.handle(DeviceMessage::Tick);
        assert_eq!(shell.handle(DeviceMessage::Read(REGISTER)), 1 << 1);
        shell.handle(DeviceMessage::Lifecycle(Lifecycle::Resume));
        assert_eq!(shell.handle(DeviceMessage::Read(REGISTER)), 1);
    }

    #[test]
    fn every_lifecycle_message_that_somebody_waits_for_is_acknowledged() {
        let (mut shell, _, _) = shell();
        let count = Arc::new(AtomicU64::new(0));
        let counted = count.clone();
        shell.outside.life = Some(Box::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        }));
        for event in [
            Lifecycle::Start,
            Lifecycle::Pause,
            Lifecycle::Pause,
            Lifecycle::Reset,
            Lifecycle::Resume,
            Lifecycle::Resume,
        ] {
            shell.handle(DeviceMessage::Lifecycle(event));
        }
        assert_eq!(count.load(Ordering::Relaxed), 5);
    }

    #[test]
    fn the_line_follows_the_state_and_is_told_changes_only() {
        let (mut shell, edges, _) = shell();
        for (value, expected) in [
            (0, 0),
            (1, 1 << 32),
            (1, 1 << 32),
            (0, (1 << 32) + 1),
            (0, (1 << 32) + 1),
        ] {
            shell.handle(DeviceMessage::Write(REGISTER, value));
            assert_eq!(edges.load(Ordering::Relaxed), expected);
        }
        shell.handle(DeviceMessage::Write(REGISTER, 1));
        shell.handle(DeviceMessage::Lifecycle(Lifecycle::Reset));
        assert_eq!(edges.load(Ordering::Relaxed), (2 << 32) + 2);
        assert_eq!(shell.handle(DeviceMessage::Read(REGISTER)), 0);
    }

    #[test]
    fn a_tick_before_its_time_is_none() {
        let (mut shell, _, _) = shell();
        shell.handle(DeviceMessage::Write(REGISTER, u64::MAX - 1));
        shell.handle(DeviceMessage::Tick);
        assert_eq!(shell.handle(DeviceMessage::Read(REGISTER)), u64::MAX - 1);
        shell.handle(DeviceMessage::Write(REGISTER, 2));
        shell.handle(DeviceMessage::Tick);
        assert_eq!(shell.handle(DeviceMessage::Read(REGISTER)), 1);
    }

    #[test]
    fn requests_go_to_the_machine() {
        let (mut shell, _, asked) = shell();
        shell.handle(DeviceMessage::Write(REGISTER, 0xdead));
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [MachineRequest::PowerOff]);
    }

    #[test]
    fn a_turn_without_a_host_side_is_not_held_up() {
        let (mut shell, _, _) = shell();
        let log = Rc::new(RefCell::new(Vec::new()));
        for byte in 0..100 {
            log.borrow_mut().push(shell.outside.transmit(byte));
        }
        assert!(log.borrow().iter().all(|room| *room));
        assert_eq!(shell.outside.receive(), None);
    }
}
