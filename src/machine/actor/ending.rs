//! How a machine ends: vCPUs, then what they have sent, then queues and devices. What is stuck is named and left behind.
//!
//! It ends within [`LIMIT`], whoever blocks for how long: each step has until a moment that is counted from the
//! beginning ([`Timetable`]), so that steps which take all their time cannot add up to more than the last of these
//! moments, and what one does not need is left for those behind.

use super::super::MachineMessage;
use super::super::request::{Answer, Command, Request};
use super::super::state::{Refused, State, Transition};
use super::Machine;
use crate::control::plane;
use crate::host::log;
use crate::simulation;
use crate::vcpu::route::Space;
use crate::vcpu::{VcpuEvent, VcpuMessage, VcpuNews};
use crossbeam_channel::select_biased;
use slog::{debug, warn};
use std::time::{Duration, Instant};

/// A machine that is stopped, by whoever controls it, a signal or Ctrl-A x, has ended within this, and the process with it.
pub const LIMIT: Duration = Duration::from_secs(2);

/// How long a gdb may take to be told.
const DEBUGGER_LIMIT: Duration = Duration::from_millis(100);
/// How long vCPUs may take to end before they are given up and named.
const VCPU_LIMIT: Duration = Duration::from_millis(400);
/// How long the guest's last output may take to be written.
pub(in crate::machine) const OUTPUT_LIMIT: Duration = Duration::from_millis(300);
/// The same when the guest ended by itself: whoever reads may be slow, and nothing shall be lost.
pub(super) const PATIENT_OUTPUT_LIMIT: Duration = Duration::from_secs(10);
/// What the event loop has beside to tell that it has ended.
const EVENT_LOOP_LIMIT: Duration = Duration::from_millis(100);
/// How long queues' actors may take to end what they are at.
const QUEUE_LIMIT: Duration = Duration::from_millis(300);
/// How long devices may take to end where nobody is known to be stuck: a thread that only waits for a processor is not
/// to be called so.
const DEVICE_LIMIT: Duration = Duration::from_secs(1);
/// The same where somebody is stuck already.
const STUCK_DEVICE_LIMIT: Duration = Duration::from_millis(100);

// Until when, counted from the beginning.
const DEBUGGER_BY: Duration = DEBUGGER_LIMIT;
const VCPUS_BY: Duration = DEBUGGER_BY.saturating_add(VCPU_LIMIT);
const OUTPUT_BY: Duration = VCPUS_BY
    .saturating_add(OUTPUT_LIMIT)
    .saturating_add(EVENT_LOOP_LIMIT);
const QUEUES_BY: Duration = OUTPUT_BY.saturating_add(QUEUE_LIMIT);
const DEVICES_BY: Duration = QUEUES_BY.saturating_add(STUCK_DEVICE_LIMIT);
/// Clients may read what they were told, and the log be written, when the machine has ended.
const ALL_BY: Duration = DEVICES_BY
    .saturating_add(plane::LAST_WORDS)
    .saturating_add(log::LAST_WORDS);
/// For what is done between the waits, down to the kernel's work on a process that is gone.
const WORK: Duration = Duration::from_millis(300);
const _: () = assert!(ALL_BY.saturating_add(WORK).as_nanos() <= LIMIT.as_nanos());

/// When each step has to be over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Timetable {
    begun: Instant,
}

impl Timetable {
    pub(super) fn from(begun: Instant) -> Timetable {
        Timetable { begun }
    }

    pub(super) fn debugger(self) -> Instant {
        self.begun + DEBUGGER_BY
    }

    fn vcpus(self) -> Instant {
        self.begun + VCPUS_BY
    }

    /// When the event loop has to have ended that may take `limit` for its output. Not less than that if the limit is
    /// a patient one.
    fn output(self, now: Instant, limit: Duration) -> Instant {
        let until = now + limit + EVENT_LOOP_LIMIT;
        match limit > OUTPUT_LIMIT {
            true => until,
            false => until.min(self.begun + OUTPUT_BY),
        }
    }

    /// What comes behind has its time, however long the output took.
    fn after_output(self, now: Instant) -> Timetable {
        let begun = now.checked_sub(OUTPUT_BY).unwrap_or(self.begun);
        Timetable::from(self.begun.max(begun))
    }

    fn queues(self) -> Instant {
        self.begun + QUEUES_BY
    }

    fn devices(self, now: Instant, all_ended: bool) -> Instant {
        let limit = match all_ended {
            true => DEVICE_LIMIT,
            false => STUCK_DEVICE_LIMIT,
        };
        (now + limit).min(self.begun + DEVICES_BY)
    }
}

impl Machine {
    /// Ends everything. `timetable`: from when on.
    pub(in crate::machine) fn stop(&mut self, output_limit: Duration) {
        self.stop_by(output_limit, Timetable::from(Instant::now()));
    }

    pub(super) fn stop_by(&mut self, output_limit: Duration, timetable: Timetable) {
        self.overtake();
        self.sender = None;
        self.go(Transition::Stop);
        let output_limit = match self.end_vcpus(timetable.vcpus()) {
            true => output_limit.min(OUTPUT_LIMIT),
            false => output_limit,
        };
        for queue in &self.queues {
            queue.end();
        }
        self.drain_output(timetable.output(Instant::now(), output_limit));
        let timetable = timetable.after_output(Instant::now());
        for queue in self.queues.drain(..) {
            if let Err(name) = queue.join(timetable.queues()) {
                warn!(
                    self.log,
                    "{name} waits for the host (a slow or stuck disk?) and is left behind; its request may not be done"
                );
            }
        }
        // A vCPU that does not end waits for a device whose turn does not: one that does not take its own stop.
        let all_ended = self.vcpus.iter().all(|vcpu| vcpu.stopped);
        let until = timetable.devices(Instant::now(), all_ended);
        for name in self.devices.stop(all_ended, until) {
            warn!(
                self.log,
                "device {name} is stuck in an access and is left behind; this is a bug"
            );
        }
        self.go(Transition::Stopped);
    }

    /// All vCPUs, until then. Whether somebody who is in a hurry came meanwhile.
    fn end_vcpus(&mut self, until: Instant) -> bool {
        for vcpu in &self.vcpus {
            vcpu.handle.send(VcpuMessage::Stop);
        }
        let mut hurry = false;
        while self.vcpus.iter().any(|vcpu| !vcpu.stopped) {
            match simulation::receive_until(&self.mailbox, until) {
                Ok(message) => hurry |= self.hears_of_vcpus(message),
                Err(_) => break,
            }
        }
        // Who has ended, while this thread had no processor, is not to be called late.
        for message in self
            .mailbox
            .try_iter()
            .take(self.mailbox.len())
            .collect::<Vec<_>>()
        {
            hurry |= self.hears_of_vcpus(message);
        }
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            if let Some(thread) = vcpu.thread.take_if(|_| vcpu.stopped) {
                let _ = thread.join();
            } else if !vcpu.stopped {
                warn!(self.log, "vcpu{index} did not end in time and is left behind");
            }
        }
        hurry
    }

    /// The same, and a vCPU's word that it has ended.
    fn hears_of_vcpus(&mut self, message: MachineMessage) -> bool {
        let MachineMessage::Vcpu(VcpuNews {
            vcpu,
            what: VcpuEvent::Stopped(unclaimed),
        }) = message
        else {
            return self.hears_at_the_end(message);
        };
        self.vcpus[vcpu].stopped = true;
        for (space, start, count) in unclaimed {
            let space = match space {
                Space::Pio => "ports",
                Space::Mmio => "addresses",
            };
            debug!(self.log, "vcpu{vcpu}: accesses to {space} that nobody claims";
                "from" => format!("{start:#x}"), "count" => count);
        }
        false
    }

    /// Has the event loop write what the guest has sent, and end. A signal or a stop meanwhile cuts that short.
    fn drain_output(&mut self, until: Instant) {
        let limit = until.saturating_duration_since(Instant::now());
        self.event_loop.stop(limit.saturating_sub(EVENT_LOOP_LIMIT));
        let deadline = crossbeam_channel::at(until);
        loop {
            simulation::waited(|| !self.event_loop.ended().is_empty() || !self.mailbox.is_empty());
            select_biased! {
                recv(self.event_loop.ended()) -> _ => return,
                // Before the messages: there may always be one.
                recv(deadline) -> _ => return,
                recv(*self.mailbox) -> message => match message {
                    Ok(message) => if self.hears_at_the_end(message) { return },
                    // Nobody is left to send.
                    Err(_) => {
                        let _ = self.event_loop.ended().recv_deadline(until);
                        return;
                    }
                },
            }
        }
    }

    /// What somebody says to a machine that ends. `true`: that it is to end soon.
    fn hears_at_the_end(&self, message: MachineMessage) -> bool {
        let Request { command, reply } = match message {
            MachineMessage::Host(_) => return true,
            MachineMessage::Request(request) => request,
            _ => return false,
        };
        let refused = |transition| Answer::Refused(Refused(self.conductor.state(), transition));
        reply.give(match command {
            Command::Stop => Answer::Done(State::Stopping),
            Command::Pause | Command::Halt => refused(Transition::Pause),
            Command::Resume | Command::Release => refused(Transition::Resume),
            Command::Reset => refused(Transition::Reset),
            Command::Link { .. } | Command::Balloon { .. } => Answer::Gone,
        });
        command == Command::Stop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_does_not_put_off_the_time() {
        let (sender, mailbox) = crossbeam_channel::unbounded();
        sender.send(()).unwrap();
        assert!(simulation::receive_until(&mailbox, Instant::now()).is_err());
        assert!(simulation::receive_by(&mailbox, Instant::now()).is_err());
        let later = Instant::now() + LIMIT;
        assert!(simulation::receive_until(&mailbox, later).is_ok());
    }

    #[test]
    fn whoever_takes_all_his_time_a_stop_is_over_in_its_limit() {
        let begun = Instant::now();
        let timetable = Timetable::from(begun);
        // Each step ends when its time is up, and the next begins then.
        let debugger = timetable.debugger();
        let vcpus = timetable.vcpus().max(debugger);
        let output = timetable.output(vcpus, OUTPUT_LIMIT).max(vcpus);
        assert!(output - vcpus >= OUTPUT_LIMIT, "there is time for output");
        let timetable = timetable.after_output(output);
        assert_eq!(timetable.begun, begun);
        let queues = timetable.queues().max(output);
        assert!(queues - output >= QUEUE_LIMIT);
        for all_ended in [true, false] {
            let devices = timetable.devices(queues, all_ended).max(queues);
            assert!(devices - queues >= STUCK_DEVICE_LIMIT);
            let over = devices + plane::LAST_WORDS + log::LAST_WORDS;
            assert!(over - begun + WORK <= LIMIT, "{:?}", over - begun);
        }
    }

    #[test]
    fn what_a_step_does_not_need_is_left_for_those_behind() {
        let begun = Instant::now();
        let timetable = Timetable::from(begun);
        assert_eq!(timetable.devices(begun, true), begun + DEVICE_LIMIT);
        assert_eq!(timetable.devices(begun, false), begun + STUCK_DEVICE_LIMIT);
        assert!(timetable.queues() - begun > 2 * QUEUE_LIMIT);
        // Output that may take long takes nothing from anybody.
        let later = timetable.output(begun, PATIENT_OUTPUT_LIMIT);
        assert!(later - begun >= PATIENT_OUTPUT_LIMIT);
        let timetable = timetable.after_output(later);
        assert_eq!(timetable.queues() - later, QUEUE_LIMIT);
    }
}
