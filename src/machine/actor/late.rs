//! What a machine says when somebody does not answer in time: who, at which device, with which message, since when.
//!
//! Nobody is asked, as whoever is late would not answer that either: it is read from what everybody publishes.

use super::super::conductor::{Late, Pending};
use super::super::outcome::Outcome;
use super::super::request::Answer;
use super::Machine;
use crate::control::why::{Graph, Seen, Snapshot};
use crate::vcpu::activity::Doing;
use slog::warn;

impl Machine {
    /// The time for answers is up.
    pub(super) fn answers_are_late(&mut self) -> Option<Outcome> {
        self.answers_by = None;
        let waits = self.whom_we_wait_for();
        let before = self.conductor.state();
        let late = self.conductor.time_is_up()?;
        if late == Late::ResetFailed {
            return Some(self.reset_failed(waits.join(", ")));
        }
        self.devices.reinforce();
        // Whatever is done now, it is not what was asked for.
        let askers = std::mem::take(&mut self.askers);
        let mut outcome = self.carry_out();
        warn!(self.log, "{late}: it waits for {}", waits.join(", "));
        self.tell_state(before);
        for (_, asker) in askers {
            asker.give(Answer::Waits(self.conductor.state(), waits.clone()));
        }
        if late == Late::Reset
            && outcome.is_none()
            && let Some(request) = self.guest_asked.take()
        {
            outcome = self.guest_asks(request);
        }
        outcome
    }

    /// Who has not answered, and why, for a person.
    pub(super) fn whom_we_wait_for(&mut self) -> Vec<String> {
        let seen = self.observatory.as_mut().map(|observatory| {
            let snapshot = observatory.look();
            let graph = snapshot.graph();
            (snapshot, graph)
        });
        let seen = seen.as_ref();
        let name = |pending| match pending {
            Pending::Vcpu(index, event) => {
                let doing = seen.and_then(|(snapshot, graph)| of_vcpu(index, snapshot, graph));
                format!("vcpu{index} to {}{}", event.name(), doing.unwrap_or_default())
            }
            Pending::Time => {
                let doing = seen.and_then(|(snapshot, graph)| of_vcpu(0, snapshot, graph));
                format!("vcpu0 to take in what time it is{}", doing.unwrap_or_default())
            }
            Pending::Device(index, event) => {
                let name = self.lives[index].name;
                let turn = seen.and_then(|(_, graph)| turn_of(name, graph));
                let turn = turn.map_or(String::new(), |turn| format!(" ({turn})"));
                format!("device {name} to {}{turn}", event.name())
            }
            Pending::Reload => "the guest to be loaded".into(),
        };
        self.conductor.pending().into_iter().map(name).collect()
    }
}

/// What a vCPU does instead of answering.
fn of_vcpu(index: usize, snapshot: &Snapshot, graph: &Graph) -> Option<String> {
    let seen = snapshot.vcpus.get(index)?;
    let since = match seen.doing {
        Doing::InGuest | Doing::Starting => String::new(),
        _ => format!(", for {} ms", seen.age.as_millis()),
    };
    let device = seen.device.and_then(|number| snapshot.devices.get(number));
    Some(match device {
        None => format!(" (it {}{since})", in_words(seen)),
        Some(device) => {
            let waits = graph
                .waits
                .iter()
                .any(|wait| wait.who == seen.name && wait.on == device.name);
            let (how, turn) = match turn_of(&device.name, graph).filter(|_| waits) {
                Some(turn) => ("it waits for", format!("; {turn}")),
                None => ("it is at", String::new()),
            };
            format!(" ({how} {} with {}{since}{turn})", device.name, seen.doing)
        }
    })
}

/// A vCPU's doing as a part of a sentence: an access has no verb of its own.
fn in_words(seen: &Seen) -> String {
    match seen.doing {
        Doing::Access { .. } => format!("is busy with {}", seen.doing),
        doing => doing.to_string(),
    }
}

/// Who runs a device's turn, with what, since when.
fn turn_of(device: &str, graph: &Graph) -> Option<String> {
    let turn = graph.turns.iter().find(|turn| turn.device == device)?;
    let message = turn.message.as_ref();
    let message = message.map_or(String::new(), |message| format!(" with {message}"));
    let since = turn.ms.map_or(String::new(), |ms| format!(", for {ms} ms"));
    Some(format!(
        "{device}'s turn is run by {}{message}{since}",
        turn.holder
    ))
}
