//! Why something does not go on: who waits for whom, on which message, since when, and who has each device's run token.
//! Pure: from what was seen at one moment to a graph.
//!
//! A mailbox says that its token is held, not by whom: that would be one more store on the path of every access. It
//! follows from what each thread publishes about itself: one that is in an access to the device and does not wait for
//! a reply in the device's mailbox runs the device's turn. Where that leaves a doubt, this says so.

use crate::actors::{CallLook, Lifecycle, MailboxLook, PlacementKind};
use crate::machine::state::State;
use crate::vcpu::activity::Doing;
use serde::Serialize;
use std::time::Duration;

/// One thread that uses devices.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `vcpu0`, `events`.
    pub name: String,
    /// What it does.
    pub doing: Doing,
    /// Which device that concerns, by number.
    pub device: Option<usize>,
    /// For how long; means nothing in the guest.
    pub age: Duration,
    /// Exits so far.
    pub exits: u64,
    /// What the machine has told it and it has not answered.
    pub unanswered: Option<Lifecycle>,
}

/// One device.
#[derive(Clone, Debug)]
pub struct DeviceSeen {
    /// `serial0`.
    pub name: String,
    /// Its mailbox; the baselines have none.
    pub mailbox: Option<MailboxLook>,
    /// What the machine has told it and it has not answered.
    pub unanswered: Option<Lifecycle>,
}

/// Everything that was seen at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The machine's state.
    pub state: State,
    /// All vCPUs.
    pub vcpus: Vec<Seen>,
    /// The event loop, then the messengers: in the order of their lanes, see [`sender`].
    pub others: Vec<Seen>,
    /// All devices.
    pub devices: Vec<DeviceSeen>,
}

/// Lanes of a mailbox before those of the vCPUs: the event loop's and the messenger's. In the order in which a machine
/// connects them.
pub const LANE_EVENTS: usize = 0;
/// See [`LANE_EVENTS`].
pub const LANE_MESSENGER: usize = 1;
/// The lane of vCPU 0; the others follow.
pub const LANE_VCPUS: usize = 2;

/// An edge: somebody waits for somebody.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Wait {
    /// Who waits.
    pub who: String,
    /// For whom.
    pub on: String,
    /// On which message.
    pub message: String,
    /// For how long; the machine's own waits are limited and have no time of their own.
    pub ms: Option<u64>,
    /// Asleep, as opposed to looking.
    pub asleep: bool,
}

/// A device whose run token is held.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Turn {
    /// Whose.
    pub device: String,
    /// Who has it.
    pub holder: String,
    /// With which message the holder came.
    pub message: Option<String>,
    /// For how long.
    pub ms: Option<u64>,
    /// Calls that wait in the mailbox.
    pub calls: usize,
    /// Posts that wait in it.
    pub posts: u32,
}

/// What a thread does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Busy {
    /// `vcpu0`.
    pub name: String,
    /// What it does, in words.
    pub doing: String,
    /// For how long; not known of a vCPU in the guest.
    pub ms: Option<u64>,
}

/// The answer to "why?".
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Graph {
    /// The machine's state.
    pub state: String,
    /// Who waits for whom.
    pub waits: Vec<Wait>,
    /// Who runs whose turn.
    pub turns: Vec<Turn>,
    /// What all vCPUs do.
    pub vcpus: Vec<Busy>,
    /// The same for a person.
    pub lines: Vec<String>,
}

fn ms(age: Duration) -> u64 {
    u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
}

/// Who sends by a lane.
fn sender(snapshot: &Snapshot, lane: usize) -> Option<&Seen> {
    match lane {
        LANE_EVENTS => snapshot.others.first(),
        // Whichever messenger it is that has the courier now.
        LANE_MESSENGER => snapshot
            .others
            .iter()
            .skip(1)
            .max_by_key(|seen| seen.device.is_some()),
        lane => snapshot.vcpus.get(lane - LANE_VCPUS),
    }
}

impl Snapshot {
    /// Who waits for whom.
    pub fn graph(&self) -> Graph {
        let mut waits = Vec::new();
        let machine = |on: &str, event: Lifecycle| Wait {
            who: "machine".into(),
            on: on.into(),
            message: event.name().into(),
            ms: None,
            asleep: true,
        };
        for seen in &self.vcpus {
            waits.extend(seen.unanswered.map(|event| machine(&seen.name, event)));
        }
        for device in &self.devices {
            waits.extend(device.unanswered.map(|event| machine(&device.name, event)));
        }
        let mut turns = Vec::new();
        for (number, device) in self.devices.iter().enumerate() {
            let Some(mailbox) = &device.mailbox else { continue };
            if mailbox.closed {
                continue;
            }
            let turn = self.turn(number, device, mailbox);
            for lane in &mailbox.lanes {
                let asleep = lane.call == CallLook::Sleeps;
                if !asleep && lane.call != CallLook::Looks {
                    continue;
                }
                let Some(seen) = sender(self, lane.lane) else {
                    continue;
                };
                if turn.as_ref().is_some_and(|turn| turn.holder == seen.name) {
                    continue;
                }
                waits.push(Wait {
                    who: seen.name.clone(),
                    on: device.name.clone(),
                    message: if seen.device == Some(number) {
                        seen.doing.to_string()
                    } else {
                        "its earlier posts".into()
                    },
                    ms: Some(ms(seen.age)),
                    asleep,
                });
            }
            turns.extend(turn);
        }
        let busy = |seen: &Seen| Busy {
            name: seen.name.clone(),
            doing: seen.doing.to_string(),
            ms: (!matches!(seen.doing, Doing::InGuest | Doing::Starting)).then(|| ms(seen.age)),
        };
        let mut graph = Graph {
            state: self.state.to_string(),
            waits,
            turns,
            vcpus: self.vcpus.iter().map(busy).collect(),
            lines: Vec::new(),
        };
        graph.lines = graph.in_words();
        graph
    }

    /// Who runs a device's turn.
    fn turn(&self, number: usize, device: &DeviceSeen, mailbox: &MailboxLook) -> Option<Turn> {
        if !mailbox.held || mailbox.asleep {
            return None;
        }
        let call_of = |lane: usize| {
            let lane = mailbox.lanes.iter().find(|look| look.lane == lane);
            lane.map_or(CallLook::Nothing, |look| look.call)
        };
        let threads = self
            .others
            .iter()
            .enumerate()
            .map(|(index, seen)| (index.min(LANE_MESSENGER), seen))
            .chain(
                self.vcpus
                    .iter()
                    .enumerate()
                    .map(|(index, seen)| (index + LANE_VCPUS, seen)),
            )
            .filter(|(_, seen)| seen.device == Some(number));
        // In an access to it and not waiting; or, if all wait, the one that does not sleep: it serves its own call.
        let rank = |lane| match call_of(lane) {
            CallLook::Nothing | CallLook::Left | CallLook::Granted => 2,
            CallLook::Looks => 1,
            CallLook::Sleeps => 0,
        };
        let holder = match mailbox.placement {
            PlacementKind::Handoff => threads
                .map(|(lane, seen)| (rank(lane), seen.age, seen))
                .filter(|(rank, ..)| *rank > 0)
                .max_by_key(|(rank, age, _)| (*rank, *age))
                .map(|(_, _, seen)| seen),
            PlacementKind::Thread | PlacementKind::Pool => None,
        };
        // An own thread holds the token even when it looks for work.
        if mailbox.placement == PlacementKind::Thread && mailbox.lanes.is_empty() {
            return None;
        }
        let (name, message, age) = match (holder, mailbox.placement) {
            (Some(seen), _) => (
                seen.name.clone(),
                Some(seen.doing.to_string()),
                Some(ms(seen.age)),
            ),
            (None, PlacementKind::Thread) => ("its own thread".into(), None, None),
            (None, PlacementKind::Pool) => ("a thread of the pool".into(), None, None),
            // It has just let go, or has just come.
            (None, PlacementKind::Handoff) => ("somebody who comes or goes".into(), None, None),
        };
        let calls = |call: CallLook| matches!(call, CallLook::Looks | CallLook::Sleeps | CallLook::Granted);
        Some(Turn {
            device: device.name.clone(),
            holder: name.clone(),
            message,
            ms: age,
            calls: mailbox
                .lanes
                .iter()
                .filter(|look| {
                    calls(look.call) && sender(self, look.lane).is_none_or(|seen| seen.name != name)
                })
                .count(),
            posts: mailbox.lanes.iter().map(|look| look.posts).sum(),
        })
    }
}

impl Graph {
    fn in_words(&self) -> Vec<String> {
        let for_ms = |ms: Option<u64>| ms.map_or(String::new(), |ms| format!(", for {ms} ms"));
        let mut lines = vec![format!("the machine is {}", self.state)];
        for wait in &self.waits {
            let how = if wait.asleep { "sleeps" } else { "looks" };
            lines.push(match wait.ms {
                None => format!("{} waits for {} to answer: {}", wait.who, wait.on, wait.message),
                ms => format!(
                    "{} waits for {}: {}{} ({how})",
                    wait.who,
                    wait.on,
                    wait.message,
                    for_ms(ms)
                ),
            });
        }
        for turn in &self.turns {
            lines.push(format!(
                "{}'s turn is run by {}{}{}; waiting in its mailbox: {} calls, {} posts",
                turn.device,
                turn.holder,
                turn.message
                    .as_ref()
                    .map_or(String::new(), |message| format!(", which came with {message}")),
                for_ms(turn.ms),
                turn.calls,
                turn.posts
            ));
        }
        for vcpu in &self.vcpus {
            lines.push(format!("{}: {}{}", vcpu.name, vcpu.doing, for_ms(vcpu.ms)));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::LaneLook;
    use crate::devices::{Direction, Width};
    use crate::vcpu::route::Space;

    fn seen(name: &str, device: Option<usize>, ms: u64) -> Seen {
        Seen {
            name: name.into(),
            doing: match device {
                None => Doing::InGuest,
                Some(device) => Doing::Access {
                    space: Space::Pio,
                    address: 0x100 * device as u64,
                    width: Width::Byte,
                    direction: Direction::Read,
                },
            },
            device,
            age: Duration::from_millis(ms),
            exits: 0,
            unanswered: None,
        }
    }

    fn device(name: &str, placement: PlacementKind, held: bool, lanes: &[(usize, CallLook)]) -> DeviceSeen {
        DeviceSeen {
            name: name.into(),
            mailbox: Some(MailboxLook {
                held,
                asleep: false,
                closed: false,
                placement,
                lanes: lanes
                    .iter()
                    .map(|(lane, call)| LaneLook {
                        lane: *lane,
                        call: *call,
                        posts: 0,
                    })
                    .collect(),
            }),
            unanswered: None,
        }
    }

    fn snapshot(vcpus: Vec<Seen>, devices: Vec<DeviceSeen>) -> Snapshot {
        Snapshot {
            state: State::Running,
            vcpus,
            others: vec![seen("events", None, 0), seen("messenger0", None, 0)],
            devices,
        }
    }

    #[test]
    fn the_holder_is_in_an_access_and_does_not_wait_and_the_others_do() {
        let graph = snapshot(
            vec![
                seen("vcpu0", Some(1), 7000),
                seen("vcpu1", Some(1), 6000),
                seen("vcpu2", Some(0), 1),
                seen("vcpu3", None, 0),
            ],
            vec![
                device("serial0", PlacementKind::Handoff, false, &[]),
                device("tarpit", PlacementKind::Handoff, true, &[(3, CallLook::Sleeps)]),
            ],
        )
        .graph();
        assert_eq!(
            graph.turns,
            [Turn {
                device: "tarpit".into(),
                holder: "vcpu0".into(),
                message: Some("in 0x100/1".into()),
                ms: Some(7000),
                calls: 1,
                posts: 0
            }]
        );
        assert_eq!(
            graph.waits,
            [Wait {
                who: "vcpu1".into(),
                on: "tarpit".into(),
                message: "in 0x100/1".into(),
                ms: Some(6000),
                asleep: true
            }]
        );
        assert!(
            graph
                .lines
                .contains(&"vcpu1 waits for tarpit: in 0x100/1, for 6000 ms (sleeps)".to_string()),
            "{:#?}",
            graph.lines
        );
    }

    #[test]
    fn who_serves_his_own_call_is_the_holder_and_waits_for_nobody() {
        let graph = snapshot(
            vec![seen("vcpu0", Some(0), 9), seen("vcpu1", Some(0), 8)],
            vec![device(
                "serial0",
                PlacementKind::Handoff,
                true,
                &[(2, CallLook::Looks), (3, CallLook::Sleeps)],
            )],
        )
        .graph();
        assert_eq!(graph.turns[0].holder, "vcpu0");
        assert_eq!(
            graph.waits.iter().map(|wait| &wait.who).collect::<Vec<_>>(),
            ["vcpu1"]
        );
    }

    #[test]
    fn a_wait_for_another_device_than_the_accessed_one_is_for_earlier_posts() {
        let graph = snapshot(
            vec![seen("vcpu0", Some(1), 9)],
            vec![
                device("posted", PlacementKind::Thread, true, &[(2, CallLook::Sleeps)]),
                device("asked", PlacementKind::Handoff, false, &[]),
            ],
        )
        .graph();
        assert_eq!(
            (graph.waits[0].on.as_str(), graph.waits[0].message.as_str()),
            ("posted", "its earlier posts")
        );
        assert_eq!(graph.turns[0].holder, "its own thread");
    }

    #[test]
    fn what_the_machine_waits_for_is_there() {
        let mut stuck = seen("vcpu0", Some(0), 9);
        stuck.unanswered = Some(Lifecycle::Pause);
        let graph = snapshot(
            vec![stuck],
            vec![device("serial0", PlacementKind::Handoff, true, &[])],
        )
        .graph();
        assert_eq!(
            (graph.waits[0].who.as_str(), graph.waits[0].on.as_str()),
            ("machine", "vcpu0")
        );
        assert!(
            graph.lines[1].contains("machine waits for vcpu0 to answer: pause"),
            "{:?}",
            graph.lines
        );
    }

    #[test]
    fn threads_that_look_for_work_hold_nobody_up() {
        let graph = snapshot(vec![], vec![device("serial0", PlacementKind::Thread, true, &[])]).graph();
        assert_eq!((graph.turns, graph.waits), (vec![], vec![]));
    }
}
