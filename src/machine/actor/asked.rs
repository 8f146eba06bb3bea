//! What is asked of a machine from outside, and who asked for what is under way.

use super::super::holds::{Holder, Step};
use super::super::outcome::Outcome;
use super::super::request::{Answer, Command, Reply, Request};
use super::super::state::{Refused, State};
use super::Machine;
use slog::info;

impl Machine {
    /// What somebody outside wants.
    pub(super) fn serve(&mut self, Request { command, reply }: Request) -> Option<Outcome> {
        let (who, begun) = match command {
            Command::Pause => return self.hold(Holder::Controller, reply),
            Command::Halt => return self.hold(Holder::Debugger, reply),
            Command::Resume => return self.let_go(Holder::Controller, reply),
            Command::Release => return self.let_go(Holder::Debugger, reply),
            Command::Reset => (Holder::Controller, self.conductor.reset()),
            Command::Link { net, up } => {
                reply.give(match self.switches.links.get(net) {
                    Some(link) => {
                        info!(
                            self.log,
                            "{}: its link is switched {}",
                            link.name(),
                            if up { "on" } else { "off" }
                        );
                        link.set(up);
                        Answer::Done(self.conductor.state())
                    }
                    None => Answer::NoSuchDevice,
                });
                return None;
            }
            Command::Balloon { bytes } => {
                reply.give(
                    match self.switches.balloon.as_ref().map(|balloon| balloon.set(bytes)) {
                        Some(Ok(())) => Answer::Done(self.conductor.state()),
                        Some(Err(error)) => Answer::Unfit(error.to_string()),
                        None => Answer::NoSuchDevice,
                    },
                );
                return None;
            }
            Command::Stop => {
                self.overtake();
                reply.give(Answer::Done(State::Stopping));
                return Some(Outcome::Stopped);
            }
        };
        self.begun(begun, who, reply);
        None
    }

    /// Somebody wants the machine to stand still.
    fn hold(&mut self, who: Holder, reply: Reply) -> Option<Outcome> {
        let step = self.holds.pause(who, self.conductor.state());
        self.published.set_holds(self.holds);
        match step {
            Step::Begin => {
                let begun = self.conductor.pause();
                self.begun(begun, who, reply);
            }
            // Its time may be up already.
            Step::Join if self.conductor.awaited().is_none() => {
                reply.give(Answer::Waits(self.conductor.state(), self.whom_we_wait_for()));
            }
            Step::Join => self.askers.push((who, reply)),
            step => self.at_once(step, reply),
        }
        None
    }

    /// Somebody does not want that any more.
    fn let_go(&mut self, who: Holder, reply: Reply) -> Option<Outcome> {
        let step = self.holds.resume(who, self.conductor.state());
        self.published.set_holds(self.holds);
        match step {
            Step::Begin => {
                let begun = self.conductor.resume();
                self.begun(begun, who, reply);
            }
            step => {
                // Its own pause may be under way, with the other's.
                if let Some(own) = self.askers.iter().position(|(other, _)| *other == who)
                    && step == Step::Stands
                {
                    let (_, own) = self.askers.swap_remove(own);
                    own.give(Answer::Overtaken(self.conductor.state()));
                }
                self.at_once(step, reply);
            }
        }
        None
    }

    /// The answer to what changes nothing.
    fn at_once(&self, step: Step, reply: Reply) {
        reply.give(match step {
            Step::Refused(refused) => Answer::Refused(refused),
            Step::NotYours(Holder::Debugger) => {
                Answer::Unfit("gdb has stopped the machine; let it go on or detach there".into())
            }
            Step::NotYours(Holder::Controller) => {
                Answer::Unfit("the machine is paused by its controller".into())
            }
            Step::Begin | Step::Join | Step::Stands => Answer::Done(self.conductor.state()),
        });
    }

    fn begun(&mut self, begun: Result<(), Refused>, who: Holder, reply: Reply) {
        match begun {
            Ok(()) => {
                // Of a resume before it has come to the vCPUs, or of a pause that is taken back.
                self.overtake();
                self.askers.push((who, reply));
            }
            Err(refused) => reply.give(Answer::Refused(refused)),
        }
    }

    /// Whoever asked for what is under way does not get it.
    pub(super) fn overtake(&mut self) {
        self.answer(Answer::Overtaken(self.conductor.state()));
    }

    pub(super) fn answer(&mut self, answer: Answer) {
        for (_, asker) in self.askers.drain(..) {
            asker.give(answer.clone());
        }
    }
}
