//! A vCPU while a debugger has armed it: its loop, and its answers. What it decides is in `debug.rs`.

use super::backend::{Backend, RunError};
use super::debug::{DebugRequest, DebugStop, Decision, Watch};
use super::route::Bus;
use super::{Cause, State, Vcpu, VcpuEvent};

impl<B: Backend, D: Bus> Vcpu<B, D> {
    /// RUNNING under a debugger: the same, but each exit may be the debugger's.
    #[cold]
    pub(super) fn run_watched(&mut self, immediate_exit: *mut u8, watch: &Watch) -> State {
        loop {
            if !self.inbox.kick.enter() {
                match self.look() {
                    Some(state) => return state,
                    None => continue,
                }
            }
            let outcome = self.backend.run();
            let kicked = self.inbox.kick.leave();
            // SAFETY: see `run_guest`.
            unsafe { immediate_exit.write_volatile(0) };
            let next = match outcome {
                Ok(()) => self.handle_watched(watch),
                Err(RunError::Interrupted | RunError::Again) => None,
                Err(RunError::Failed(errno)) => Some(self.give_up_with(Cause::Run(errno))),
            };
            if let Some(state) = next {
                return state;
            }
            if kicked && let Some(state) = self.look() {
                return state;
            }
        }
    }

    /// Handles the exit that the backend has, if it is not the debugger's.
    fn handle_watched(&mut self, watch: &Watch) -> Option<State> {
        let exit = self.backend.exit();
        let mode = self.arming.mode;
        let rip = || self.backend.registers().map(|registers| registers.linear_rip());
        let stop = match watch.decide(&exit, mode, rip) {
            Decision::Serve => return self.handle_apart(),
            Decision::Reflect(how) => {
                let mut control = watch.control(mode);
                control.control |= how;
                // Refused when another exception is on its way, which then comes first; this one comes again.
                let _ = self.backend.set_debug(Some(&control));
                return None;
            }
            Decision::Stop(stop) => stop,
            Decision::StopBehindPort(linear) => {
                // The write is done with, and its instruction was never the guest's.
                self.settle();
                if let Some(mut cpu) = self.backend.cpu_state() {
                    cpu.set_linear_rip(linear);
                    self.backend.set_cpu_state(&cpu);
                }
                DebugStop::Planted(linear)
            }
        };
        self.bus.settle();
        self.tell(VcpuEvent::Debug(stop));
        Some(State::Waiting)
    }

    /// Answers the debugger. `still`: nothing of the guest goes on meanwhile, so that it may be changed.
    pub(super) fn serve_debugger(&mut self, request: DebugRequest, still: bool) {
        // A debugger that does not listen any more gets no answer.
        match request {
            DebugRequest::Read(answer) => drop(answer.try_send(self.backend.cpu_state())),
            DebugRequest::Write(cpu, answer) => {
                let _ = answer.try_send(still && self.backend.set_cpu_state(&cpu));
            }
            DebugRequest::Arm(arming, answer) => {
                let control = arming.watch.as_ref().map(|watch| watch.control(arming.mode));
                let done = if still {
                    self.backend.set_debug(control.as_ref())
                } else {
                    Err(nix::errno::Errno::EBUSY)
                };
                if done.is_ok() {
                    self.arming = arming;
                }
                let _ = answer.try_send(done);
            }
        }
    }
}
