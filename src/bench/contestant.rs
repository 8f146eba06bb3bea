//! Who is compared: the disciplines of dispatch, the host's bare cost, and other programs.

use super::against::Program;
use crate::actors::PlacementKind;
use crate::machine::dispatch::{Dispatch, MutexKind};
use std::fmt;

/// One of those that are compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Contestant {
    /// A discipline of dispatch in this process.
    Discipline {
        /// Which.
        dispatch: Dispatch,
        /// For `actor`: where its device actors run.
        placement: PlacementKind,
    },
    /// What the host takes for itself: KVM_RUN again and again with nothing done about its exits, or a signal that ends
    /// it and nothing looked at.
    Bare,
    /// This program as a process of its own: `actor-vmm run`.
    Run(Dispatch),
    /// Another program.
    Program(&'static Program),
}

impl Contestant {
    /// A discipline whose actors run where they do by default.
    pub const fn of(dispatch: Dispatch) -> Contestant {
        Contestant::Discipline {
            dispatch,
            placement: PlacementKind::Handoff,
        }
    }

    /// The actors.
    pub const ACTOR: Contestant = Contestant::of(Dispatch::Actor);
    /// QEMU's discipline with std's mutex.
    pub const BIG_LOCK: Contestant = Contestant::of(Dispatch::BigLock(MutexKind::Std));

    /// Which program it is.
    pub fn program(self) -> &'static str {
        match self {
            Contestant::Discipline { .. } | Contestant::Run(_) => "actor-vmm",
            Contestant::Bare => "bare",
            Contestant::Program(program) => &program.name,
        }
    }

    /// Its discipline and its mutex, as in the results. Another program is what it is.
    pub fn discipline(self) -> (&'static str, &'static str) {
        let dispatch = match self {
            Contestant::Discipline { dispatch, .. } | Contestant::Run(dispatch) => dispatch,
            Contestant::Bare | Contestant::Program(_) => return (self.program(), "none"),
        };
        match dispatch {
            Dispatch::Actor => ("actor", "none"),
            Dispatch::Channel { spin: false } => ("channel", "none"),
            Dispatch::Channel { spin: true } => ("channel:spin", "none"),
            Dispatch::DeviceLock(kind) => ("device-lock", mutex_name(kind)),
            Dispatch::BigLock(kind) => ("big-lock", mutex_name(kind)),
        }
    }

    /// Where its device actors run, or `none`.
    pub fn placement(self) -> String {
        match self {
            Contestant::Discipline {
                dispatch: Dispatch::Actor,
                placement,
            } => placement.to_string(),
            Contestant::Run(Dispatch::Actor) => PlacementKind::Handoff.to_string(),
            _ => "none".into(),
        }
    }
}

fn mutex_name(kind: MutexKind) -> &'static str {
    match kind {
        MutexKind::Std => "std",
        MutexKind::ParkingLot => "parking_lot",
    }
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Contestant::Discipline {
                dispatch,
                placement: PlacementKind::Handoff,
            } => write!(f, "{dispatch}"),
            Contestant::Discipline { dispatch, placement } => write!(f, "{dispatch} ({placement})"),
            Contestant::Bare => f.write_str("bare"),
            Contestant::Run(dispatch) => write!(f, "actor-vmm {dispatch}"),
            Contestant::Program(program) => f.write_str(&program.name),
        }
    }
}
