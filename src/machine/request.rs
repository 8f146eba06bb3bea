//! What somebody outside the machine may ask of it, and the answers. The way back travels in the request, so an answer
//! cannot go astray, and a request that nobody will answer says so by being dropped.

use super::MachineMessage;
use super::state::{Refused, State};
use crate::host::events::HostEvent;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// What can be asked of the machine actor. What only looks is not asked but read; see [`crate::control`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// [`Command::Pause`] for a debugger, whose reasons are its own; see [`super::holds`].
    Halt,
    /// The debugger has no reason any more.
    Release,
    /// Back to power-on, in place.
    Reset,
    /// End.
    Stop,
    /// Switch the link of a network device (by its number, from 0) on or off. The driver hears of it soon after.
    Link {
        /// Which.
        net: usize,
        /// On.
        up: bool,
    },
    /// Ask the balloon's driver for another size. It gives what it can, when it can.
    Balloon {
        /// What the guest is to do without.
        bytes: u64,
    },
}

/// What became of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It is done; the machine is in this state now.
    Done(State),
    /// The machine's state does not allow it.
    Refused(Refused),
    /// It is not done yet: for whom the machine waits. A pause goes on; a reset was given up.
    Waits(State, Vec<String>),
    /// Somebody asked for something else before it was done; the machine is in this state now.
    Overtaken(State),
    /// It went wrong, and the machine ends.
    Failed(String),
    /// There is no such device.
    NoSuchDevice,
    /// What was asked for cannot be.
    Unfit(String),
    /// There is no machine any more.
    Gone,
}

/// The way back of an answer. Dropped without one it answers [`Answer::Gone`].
pub struct Reply(Option<Box<dyn FnOnce(Answer) + Send>>);

impl Reply {
    /// A way back. `tell` must not wait.
    pub fn new(tell: impl FnOnce(Answer) + Send + 'static) -> Reply {
        Reply(Some(Box::new(tell)))
    }

    /// Answers.
    pub fn give(mut self, answer: Answer) {
        if let Some(tell) = self.0.take() {
            tell(answer);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(tell) = self.0.take() {
            tell(Answer::Gone);
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

/// A command and the way back.
#[derive(Debug)]
pub struct Request {
    /// What.
    pub command: Command,
    /// The way back.
    pub reply: Reply,
}

/// Messages that wait for the machine actor. Each vCPU has one at most on its way, devices and the event loop drop
/// theirs when it is full (then an end is in it already, or they are looked at anyway).
const MAILBOX: usize = 2048;

/// The machine's mailbox, made before the machine, so that somebody can hold its address.
pub struct Inbox {
    pub(super) sender: Sender<MachineMessage>,
    pub(crate) mailbox: Mailbox,
}

/// The machine's end of its mailbox. What is in it when it is dropped is dropped too, requests with their replies: a
/// channel would keep them for as long as anybody has the address, and whoever waits for an answer has it.
pub(crate) struct Mailbox {
    messages: Receiver<MachineMessage>,
    closed: Arc<AtomicBool>,
}

impl Mailbox {
    /// Where it can be reached. `sender`: one of its own.
    pub(super) fn address(&self, sender: &Sender<MachineMessage>) -> MachineAddress {
        MachineAddress {
            sender: sender.clone(),
            messages: self.messages.clone(),
            closed: self.closed.clone(),
        }
    }
}

impl Deref for Mailbox {
    type Target = Receiver<MachineMessage>;

    fn deref(&self) -> &Receiver<MachineMessage> {
        &self.messages
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        // With the one in `MachineAddress::request`: whichever of the two fences is the second, whoever it belongs to
        // sees what the other did, and empties the mailbox.
        fence(Ordering::SeqCst);
        empty(&self.messages);
    }
}

fn empty(messages: &Receiver<MachineMessage>) {
    while messages.try_recv().is_ok() {}
}

/// Where a machine can be reached by whoever controls it.
#[derive(Clone)]
pub struct MachineAddress {
    sender: Sender<MachineMessage>,
    /// For the end, when nobody else takes anything out.
    messages: Receiver<MachineMessage>,
    closed: Arc<AtomicBool>,
}

impl Inbox {
    /// An empty mailbox.
    pub fn new() -> Inbox {
        let (sender, messages) = bounded(MAILBOX);
        let closed = Arc::new(AtomicBool::new(false));
        Inbox {
            sender,
            mailbox: Mailbox { messages, closed },
        }
    }

    /// Where it can be reached.
    pub fn address(&self) -> MachineAddress {
        self.mailbox.address(&self.sender)
    }
}

impl Default for Inbox {
    fn default() -> Self {
        Inbox::new()
    }
}

impl MachineAddress {
    /// Asks, without waiting. When the mailbox is full, or the machine has ended, the reply says [`Answer::Gone`].
    pub fn request(&self, command: Command, reply: Reply) {
        // What cannot be sent is dropped, and the reply with it.
        let _ = self
            .sender
            .try_send(MachineMessage::Request(Request { command, reply }));
        // See `Mailbox`.
        fence(Ordering::SeqCst);
        if self.closed.load(Ordering::Relaxed) {
            empty(&self.messages);
        }
    }

    /// What the host's side has to say. Does not wait: when the mailbox is full there is an end in it already.
    pub fn host(&self, event: HostEvent) {
        let _ = self.sender.try_send(MachineMessage::Host(event));
    }

    /// Asks and waits for the answer. For tests and tools, which may.
    pub fn ask(&self, command: Command) -> Answer {
        let (tell, answer) = bounded(1);
        self.request(command, Reply::new(move |answer| drop(tell.try_send(answer))));
        answer.recv().unwrap_or(Answer::Gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_to_a_machine_that_is_gone_is_answered() {
        let inbox = Inbox::new();
        let address = inbox.address();
        let waiting = address.clone();
        let asker = std::thread::spawn(move || waiting.ask(Command::Pause));
        // Taken and dropped, or never taken: both are answered.
        drop(inbox.mailbox.recv());
        assert_eq!(asker.join().unwrap(), Answer::Gone);
        // Left in it at the end.
        let waiting = address.clone();
        let asker = std::thread::spawn(move || waiting.ask(Command::Pause));
        while inbox.mailbox.is_empty() {
            std::thread::yield_now();
        }
        drop(inbox);
        assert_eq!(asker.join().unwrap(), Answer::Gone);
        assert_eq!(address.ask(Command::Stop), Answer::Gone);
    }
}
