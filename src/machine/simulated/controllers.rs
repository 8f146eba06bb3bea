//! Whoever controls a simulated machine: one who waits for each answer, or several who do not.

use super::super::request::{Answer, Command, MachineAddress, Reply};
use super::super::state::{Refused, State};
use super::guest::{Fate, Ledger};
use super::{VCPUS, tell};
use crate::control::observatory::Published;
use crate::simulation::{self, draw, point};
use crate::vcpu::kick::KickHandle;
use crossbeam_channel::{Receiver, bounded};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Whoever controls the machine.
pub(super) struct Controller {
    pub(super) machine: MachineAddress,
    pub(super) kickers: Vec<KickHandle>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) fate: Fate,
    pub(super) paused: bool,
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
            Answer::Gone | Answer::Refused(Refused(State::Stopping, _)) => self.fate.ends(),
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

    pub(super) fn control(mut self) {
        for _ in 0..1 + draw(6) {
            for _ in 0..draw(40) {
                point();
            }
            match draw(6) {
                0 | 1 if !self.paused => {
                    self.paused = self.ask(Command::Pause) == Answer::Done(State::Paused);
                    // The guest's reset may begin as soon as the machine is paused.
                    if self.paused && self.fate != Fate::GuestResets {
                        check_stillness(&self.ledger);
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

/// Several who want something of one machine at the same time, in schedules in which everybody may be late.
pub(super) struct Crowd {
    pub(super) machine: MachineAddress,
    pub(super) kickers: Vec<KickHandle>,
    pub(super) published: Arc<Published>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) fate: Fate,
    /// The time for an answer may be up at any moment.
    pub(super) hasty: bool,
    /// Those who have not finished.
    pub(super) left: AtomicU64,
    /// Somebody has asked for the end.
    pub(super) stopped: AtomicBool,
}

/// What was asked for and where the answer comes.
type Asked = (Command, Receiver<Answer>);

impl Crowd {
    /// One of them, who asks without waiting, then for all his answers. Each must come, though nobody lets go whoever
    /// is stuck. The last one sees to it that the machine is as good as new.
    pub(super) fn control(&self) {
        let mut asked: Vec<Asked> = Vec::new();
        for _ in 0..1 + draw(5) {
            for _ in 0..draw(30) {
                point();
            }
            let command = match draw(16) {
                0..=3 => Command::Pause,
                4..=7 => Command::Resume,
                8 | 9 => Command::Reset,
                10 => Command::Halt,
                11 => Command::Release,
                12 => {
                    self.kickers[draw(VCPUS)].kick();
                    continue;
                }
                13 => {
                    self.ledger.loose.store(true, Relaxed);
                    continue;
                }
                14 if draw(4) == 0 => Command::Stop,
                _ => {
                    self.hear(asked.drain(..));
                    continue;
                }
            };
            asked.push(self.request(command));
        }
        self.hear(asked.drain(..));
        if self.left.fetch_sub(1, Relaxed) == 1 {
            self.finish();
        }
    }

    fn request(&self, command: Command) -> Asked {
        tell(|| format!("asked to {command:?}"));
        if command == Command::Stop {
            self.stopped.store(true, Relaxed);
        }
        let (tell, answer) = bounded(1);
        let reply = Reply::new(move |answer| drop(tell.try_send(answer)));
        self.machine.request(command, reply);
        (command, answer)
    }

    fn hear(&self, asked: impl Iterator<Item = Asked>) {
        for (command, answer) in asked {
            self.answer(command, &answer);
        }
    }

    /// Waits for an answer, and checks that it is one that fits.
    fn answer(&self, command: Command, answer: &Receiver<Answer>) -> Answer {
        let answer = simulation::receive(answer).unwrap_or(Answer::Gone);
        tell(|| format!("{command:?} is answered with {answer:?}"));
        let late = self.hasty || matches!(self.fate, Fate::Stuck | Fate::LateTime);
        // A reset that is late in the middle ends the machine.
        let ends = self.fate.ends() || late || self.stopped.load(Relaxed);
        let fits = match &answer {
            Answer::Gone | Answer::Refused(Refused(State::Stopping, _)) => ends,
            Answer::Done(_) | Answer::Overtaken(_) | Answer::Refused(_) => true,
            Answer::Waits(_, whom) => late && !whom.is_empty(),
            Answer::Failed(_) => late && command == Command::Reset,
            // The other one, of a controller and a debugger, has it stand still.
            Answer::Unfit(_) => matches!(command, Command::Resume | Command::Release),
            Answer::NoSuchDevice => false,
        };
        if !fits {
            let what = format!("{command:?} was answered with {answer:?}");
            self.ledger.wrong(what);
        }
        answer
    }

    fn ask(&self, command: Command) -> Answer {
        let (command, answer) = self.request(command);
        self.answer(command, &answer)
    }

    fn is_over(&self) -> bool {
        let state = self.published.state();
        self.stopped.load(Relaxed) || matches!(state, State::Stopping | State::Stopped | State::InternalError)
    }

    /// Nobody is stuck or late any more: no state lasts but those in which the machine rests, and it can be paused, goes
    /// on, and its guests come to their ends.
    fn finish(&self) {
        self.ledger.loose.store(true, Relaxed);
        simulation::hasten(0);
        // A reset that is under way leads back to what was before.
        while self.rest() != State::Running && !self.is_over() {
            let wishes = [Command::Release, Command::Resume];
            if wishes.map(|wish| self.ask(wish)).contains(&Answer::Gone) {
                return;
            }
        }
        // Twice, for the second has to be told time again.
        for _ in 0..2 {
            let paused = self.until(Command::Pause, State::Paused);
            if paused && self.fate != Fate::GuestResets {
                if !self.ledger.frozen.load(Relaxed) {
                    self.ledger.wrong("paused, and guest time goes on".into());
                }
                check_stillness(&self.ledger);
            }
            self.until(Command::Resume, State::Running);
        }
        // One that was not told to go on would not.
        simulation::waited(|| self.is_over() || self.ledger.over.iter().all(|over| over.load(Relaxed)));
        self.ask(Command::Stop);
        for kicker in &self.kickers {
            kicker.kick();
        }
    }

    /// Waits until the machine rests, or is at its end. How it rests.
    fn rest(&self) -> State {
        let rests = || matches!(self.published.state(), State::Running | State::Paused);
        simulation::waited(|| rests() || self.is_over());
        self.published.state()
    }

    /// Asks until it is done: the guest's own reset may be under way. `false`: the machine ends.
    fn until(&self, command: Command, state: State) -> bool {
        loop {
            match self.ask(command) {
                Answer::Done(done) if done == state => return true,
                _ if self.is_over() => return false,
                Answer::Refused(Refused(State::Resetting, _)) | Answer::Overtaken(State::Resetting)
                    if self.fate == Fate::GuestResets =>
                {
                    self.rest();
                }
                answer => {
                    self.ledger
                        .wrong(format!("in the end {command:?} was answered with {answer:?}"));
                    return false;
                }
            }
        }
    }
}

/// The machine was just paused: nothing moves, and nothing is half done.
fn check_stillness(ledger: &Ledger) {
    let before = ledger.moves.load(Relaxed);
    for (begun, seen) in ledger.begun.iter().zip(&ledger.seen) {
        let (begun, seen) = (begun.load(Relaxed), seen.load(Relaxed));
        if begun != seen {
            ledger.wrong(format!("paused, and of {begun} reads {seen} are done"));
        }
    }
    for _ in 0..draw(20) {
        point();
    }
    if ledger.moves.load(Relaxed) != before {
        ledger.wrong("something moved in a paused machine".into());
    }
}
