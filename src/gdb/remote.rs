//! The machine, as the gdb server reaches it: by messages to the machine actor and to the vCPUs, and by guest memory.
//!
//! Owns: its end of the news. Sends to: the machine actor, without waiting, and waits for the answer among its news;
//! vCPUs, and waits for the answer in the request. Each wait has a limit.

use super::target::{Debuggee, Ended};
use super::walk::Physical;
use crate::machine::request::{Answer, Command, MachineAddress, Reply};
use crate::machine::state::State;
use crate::vcpu::debug::{Arming, CpuState, DebugRequest, DebugStop};
use crate::vcpu::{VcpuHandle, VcpuMessage};
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// How long a vCPU may take to answer. One that waits answers at once; but its thread needs a processor.
const VCPU_LIMIT: Duration = Duration::from_secs(2);
/// How long the machine actor may take. It names whom it waits for well before.
const MACHINE_LIMIT: Duration = Duration::from_secs(10);
/// How often a machine that is just being reset is asked again: nobody tells when that is over.
const AGAIN: Duration = Duration::from_millis(20);

/// What the gdb server is told.
#[derive(Debug)]
pub enum News {
    /// The machine actor's answer to the request of that number.
    Answer(u64, Answer),
    /// A vCPU has stopped by itself.
    Stopped(usize, DebugStop),
    /// The machine has ended, with this exit status.
    Ended(u8),
}

/// Where news go. The server sleeps in poll, so that each comes with a write to an eventfd.
#[derive(Clone)]
pub struct NewsAddress {
    sender: Sender<News>,
    waker: Arc<EventFd>,
}

impl NewsAddress {
    /// Never waits. What there is no room for is lost: there is room for all that can be on its way.
    pub fn tell(&self, news: News) {
        let _ = self.sender.try_send(news);
        // Fails only when 2^64 - 2 wakes are pending.
        let _ = self.waker.write(1);
    }
}

/// News for the server of a machine with so many vCPUs: each has one stop on its way at most, the machine actor its end, one
/// answer, and late ones to requests that were given up.
///
/// # Errors
/// When the host gives no eventfd.
pub fn news(vcpus: usize) -> std::io::Result<(NewsAddress, Receiver<News>, Arc<EventFd>)> {
    let (sender, receiver) = bounded(2 * vcpus + 8);
    let waker = Arc::new(EventFd::from_flags(
        EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
    )?);
    let address = NewsAddress {
        sender,
        waker: waker.clone(),
    };
    Ok((address, receiver, waker))
}

/// See the module.
pub struct Remote {
    machine: MachineAddress,
    vcpus: Vec<VcpuHandle>,
    memory: GuestMemoryMmap,
    address: NewsAddress,
    news: Receiver<News>,
    stops: VecDeque<(usize, DebugStop)>,
    ended: Option<u8>,
    /// Number of the last request.
    asked: u64,
}

impl Remote {
    /// A machine that was put together.
    pub fn new(
        machine: MachineAddress,
        vcpus: Vec<VcpuHandle>,
        memory: GuestMemoryMmap,
        address: NewsAddress,
        news: Receiver<News>,
    ) -> Remote {
        Remote {
            machine,
            vcpus,
            memory,
            address,
            news,
            stops: VecDeque::new(),
            ended: None,
            asked: 0,
        }
    }

    /// Looks at what has come. The exit status, once the machine has ended.
    pub fn look(&mut self) -> Option<u8> {
        while let Ok(news) = self.news.try_recv() {
            self.take(news);
        }
        self.ended
    }

    /// Has the machine end.
    pub fn kill(&self) {
        self.machine.request(Command::Stop, Reply::new(|_| ()));
    }

    fn take(&mut self, news: News) -> Option<Answer> {
        match news {
            News::Answer(number, answer) if number == self.asked => return Some(answer),
            // Nobody waits for that any more.
            News::Answer(..) => {}
            // The last one counts: an earlier one was before it went on.
            News::Stopped(vcpu, stop) => {
                self.stops.retain(|(other, _)| *other != vcpu);
                self.stops.push_back((vcpu, stop));
            }
            News::Ended(status) => self.ended = Some(status),
        }
        None
    }

    /// Asks the machine actor, and waits.
    fn ask(&mut self, command: Command) -> Answer {
        self.ask_within(command, MACHINE_LIMIT)
    }

    fn ask_within(&mut self, command: Command, limit: Duration) -> Answer {
        let deadline = Instant::now() + limit;
        loop {
            let address = self.address.clone();
            self.asked += 1;
            let number = self.asked;
            let reply = Reply::new(move |answer| address.tell(News::Answer(number, answer)));
            self.machine.request(command, reply);
            let answer = loop {
                if self.ended.is_some() {
                    return Answer::Gone;
                }
                match self.news.recv_deadline(deadline) {
                    Ok(news) => {
                        if let Some(answer) = self.take(news) {
                            break answer;
                        }
                    }
                    Err(_) => return Answer::Waits(State::Running, vec!["the machine actor".into()]),
                }
            };
            match answer {
                Answer::Refused(refused) if refused.0 == State::Resetting && Instant::now() < deadline => {
                    if let Ok(news) = self.news.recv_timeout(AGAIN) {
                        self.take(news);
                    }
                }
                answer => return answer,
            }
        }
    }

    fn ask_vcpu<T>(&self, vcpu: usize, request: impl FnOnce(Sender<T>) -> DebugRequest) -> Option<T> {
        let (answer, answers) = bounded(1);
        let sent = self.vcpus.get(vcpu)?.send(VcpuMessage::Debug(request(answer)));
        if !sent {
            return None;
        }
        answers.recv_timeout(VCPU_LIMIT).ok()
    }
}

impl Physical for Remote {
    fn read(&self, address: u64, data: &mut [u8]) -> bool {
        Physical::read(&self.memory, address, data)
    }
}

impl Debuggee for Remote {
    fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    fn cpu(&mut self, vcpu: usize) -> Option<CpuState> {
        self.ask_vcpu(vcpu, DebugRequest::Read).flatten().map(|cpu| *cpu)
    }

    fn set_cpu(&mut self, vcpu: usize, cpu: &CpuState) -> bool {
        let cpu = Box::new(cpu.clone());
        self.ask_vcpu(vcpu, |answer| DebugRequest::Write(cpu, answer)) == Some(true)
    }

    fn arm(&mut self, vcpu: usize, arming: Arming) -> bool {
        matches!(
            self.ask_vcpu(vcpu, |answer| DebugRequest::Arm(arming, answer)),
            Some(Ok(()))
        )
    }

    fn write(&mut self, address: u64, data: &[u8]) -> bool {
        // Not by halves.
        self.memory.check_range(GuestAddress(address), data.len())
            && self.memory.write_slice(data, GuestAddress(address)).is_ok()
    }

    fn pause(&mut self) -> Result<Vec<String>, Ended> {
        match self.ask(Command::Halt) {
            Answer::Done(_) => Ok(Vec::new()),
            Answer::Refused(refused) if refused.0 == State::Paused => Ok(Vec::new()),
            Answer::Refused(refused) => Ok(vec![format!("it is {}", refused.0)]),
            Answer::Waits(_, names) => Ok(names),
            Answer::Overtaken(_) => Ok(vec!["somebody else let it go on".into()]),
            Answer::Failed(_) | Answer::Gone => Err(Ended),
            // For other commands.
            Answer::NoSuchDevice | Answer::Unfit(_) => Err(Ended),
        }
    }

    fn resume(&mut self) -> Result<bool, Ended> {
        match self.ask(Command::Release) {
            Answer::Failed(_) | Answer::Gone => Err(Ended),
            Answer::Done(state) => Ok(state == State::Running),
            _ => Ok(true),
        }
    }

    fn next_stop(&mut self) -> Option<(usize, DebugStop)> {
        self.look();
        self.stops.pop_front()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::machine::MachineMessage;
    use crate::machine::request::{Inbox, Request};

    #[test]
    fn a_late_answer_is_not_the_answer_to_what_is_asked_next() {
        let inbox = Inbox::new();
        let (address, news, _waker) = news(1).unwrap();
        let mut remote = Remote::new(
            inbox.address(),
            Vec::new(),
            GuestMemoryMmap::default(),
            address,
            news,
        );
        // The machine actor has a processor only after the time is up.
        assert!(matches!(
            remote.ask_within(Command::Halt, Duration::ZERO),
            Answer::Waits(..)
        ));
        let machine = std::thread::spawn(move || {
            let request = || match inbox.mailbox.recv().unwrap() {
                MachineMessage::Request(Request { command, reply }) => (command, reply),
                other => panic!("{other:?}"),
            };
            let (first, halted) = request();
            let (second, released) = request();
            assert_eq!((first, second), (Command::Halt, Command::Release));
            halted.give(Answer::Done(State::Paused));
            released.give(Answer::Done(State::Running));
        });
        assert_eq!(remote.ask(Command::Release), Answer::Done(State::Running));
        machine.join().unwrap();
    }
}
