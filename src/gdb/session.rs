//! One gdb's session: gdbstub's state machine, fed with what gdb sends and with what vCPUs tell. Without a descriptor
//! or a clock of its own.

use super::target::{Debugged, Debuggee, Ended};
use crate::vcpu::debug::DebugStop;
use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use std::fmt::Display;

/// How a session ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Over {
    /// gdb has detached.
    Detached,
    /// gdb wants the machine to end.
    Kill,
    /// The machine has ended.
    Ended,
    /// gdb or its connection misbehaves.
    Failed(String),
}

type Stub<M, C> = GdbStubStateMachine<'static, Debugged<M>, C>;

/// A gdb that is connected, and what it debugs.
pub struct Session<'d, M: Debuggee, C: Connection> {
    // Taken while it is fed: gdbstub's state machine moves with each step.
    stub: Option<Stub<M, C>>,
    target: &'d mut Debugged<M>,
}

impl<'d, M: Debuggee, C: Connection<Error: Display>> Session<'d, M, C> {
    /// A gdb has connected: the machine stands from now on.
    ///
    /// # Errors
    /// How it is over already.
    pub fn new(target: &'d mut Debugged<M>, connection: C) -> Result<Self, Over> {
        target.halt().map_err(|Ended| Over::Ended)?;
        let stub = GdbStub::new(connection)
            .run_state_machine(target)
            .map_err(|error| Over::Failed(error.to_string()))?;
        Ok(Session {
            stub: Some(stub),
            target,
        })
    }

    /// The machine.
    pub fn machine(&mut self) -> &mut M {
        &mut self.target.machine
    }

    /// What gdb sent.
    ///
    /// # Errors
    /// How it is over.
    pub fn received(&mut self, bytes: &[u8]) -> Result<(), Over> {
        for byte in bytes {
            let (stub, waits) = match self.take()? {
                GdbStubStateMachine::Idle(stub) => (stub.incoming_data(self.target, *byte), false),
                GdbStubStateMachine::Running(stub) => (stub.incoming_data(self.target, *byte), true),
                other => (Ok(other), false),
            };
            self.proceed(stub, waits)?;
        }
        Ok(())
    }

    /// vCPUs may have stopped.
    ///
    /// # Errors
    /// How it is over.
    pub fn look(&mut self) -> Result<(), Over> {
        if !matches!(self.stub, Some(GdbStubStateMachine::Running(_))) {
            return Ok(());
        }
        let Some((vcpu, stop)) = self.target.machine.next_stop() else {
            return Ok(());
        };
        self.target.halt().map_err(|Ended| Over::Ended)?;
        self.report(vcpu, stop)
    }

    /// The machine has ended, with this exit status.
    pub fn ended(mut self, status: u8) {
        if let Some(GdbStubStateMachine::Running(stub)) = self.stub.take() {
            let _ = stub.report_stop(self.target, MultiThreadStopReason::Exited(status));
        }
    }

    fn take(&mut self) -> Result<Stub<M, C>, Over> {
        self.stub.take().ok_or(Over::Detached)
    }

    fn report(&mut self, vcpu: usize, stop: DebugStop) -> Result<(), Over> {
        let stub = match self.take()? {
            GdbStubStateMachine::Running(mut stub) => {
                tell(stub.borrow_conn(), &mut self.target.notices);
                let reason = self.target.reason(vcpu, stop);
                stub.report_stop(self.target, reason)
            }
            other => Ok(other),
        };
        self.proceed(stub, false)
    }

    /// What follows from a step of the protocol, without waiting for more. `waits`: gdb waits for a stop.
    fn proceed<E: Display>(&mut self, stub: Result<Stub<M, C>, E>, waits: bool) -> Result<(), Over> {
        let stub = stub.map_err(|error| Over::Failed(error.to_string()))?;
        match stub {
            GdbStubStateMachine::CtrlCInterrupt(mut stub) => {
                self.target.halt().map_err(|Ended| Over::Ended)?;
                if waits {
                    tell(stub.borrow_conn(), &mut self.target.notices);
                }
                let reason = self.target.signal(Signal::SIGINT);
                let next = stub.interrupt_handled(self.target, Some(reason));
                self.proceed(next, false)
            }
            GdbStubStateMachine::Disconnected(stub) => Err(match stub.get_reason() {
                DisconnectReason::Kill => Over::Kill,
                DisconnectReason::Disconnect => Over::Detached,
                DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_) => Over::Ended,
            }),
            mut stub => {
                let running = match &mut stub {
                    GdbStubStateMachine::Running(stub) => {
                        tell(stub.borrow_conn(), &mut self.target.notices);
                        true
                    }
                    _ => false,
                };
                self.stub = Some(stub);
                match self.target.take_at_once() {
                    Some((vcpu, stop)) if running => self.report(vcpu, stop),
                    _ => Ok(()),
                }
            }
        }
    }
}

/// Sends text to gdb's console, which may be done while gdb waits for a stop. [gdb manual: "Stop Reply Packets", O]
fn tell<C: Connection>(connection: &mut C, notices: &mut Vec<String>) {
    for notice in notices.drain(..) {
        let body: String = std::iter::once("O".to_string())
            .chain(
                format!("actor-vmm: {notice}\n")
                    .bytes()
                    .map(|byte| format!("{byte:02x}")),
            )
            .collect();
        let sum = body.bytes().fold(0u8, u8::wrapping_add);
        // Who cannot be told is gone, which the next packet finds.
        let _ = connection.write_all(format!("${body}#{sum:02x}").as_bytes());
    }
    let _ = connection.flush();
}
