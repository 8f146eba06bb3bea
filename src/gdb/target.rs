//! The machine as gdb's protocol sees it: gdbstub's `Target`, over whatever can be paused, asked and resumed.
//!
//! Owns: the breakpoints, and what is known of each vCPU while the machine stands. Nothing here waits for anybody but
//! through [`Debuggee`].

use super::breakpoints::{Abilities, Breakpoints, GuestMode, Patch, Place, Refusal, Slot, WatchFor};
use super::registers::{GdbRegister, GdbRegisters, X86_64System};
use super::walk::{Paging, Physical};
use crate::vcpu::debug::{Activity, Arming, CpuState, DebugStop, Mode, Watch};
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as BreakpointKinds, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint,
    HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use slog::{Logger, warn};
use std::collections::VecDeque;
use std::num::NonZeroUsize;

/// What a debugged machine can do. All of it may take its time, none of it for ever.
pub trait Debuggee: Physical {
    /// How many vCPUs there are.
    fn vcpus(&self) -> usize;
    /// A vCPU's state. `None`: it does not answer.
    fn cpu(&mut self, vcpu: usize) -> Option<CpuState>;
    /// Changes a vCPU's state. `false`: it or the host refuses.
    fn set_cpu(&mut self, vcpu: usize, cpu: &CpuState) -> bool;
    /// How a vCPU goes on when the machine is resumed. `false`: it or the host refuses.
    fn arm(&mut self, vcpu: usize, arming: Arming) -> bool;
    /// Writes guest physical memory. `false`: it is not all RAM.
    fn write(&mut self, address: u64, data: &[u8]) -> bool;
    /// Pauses the machine. Who does not stand still in time is named.
    ///
    /// # Errors
    /// The machine has ended.
    fn pause(&mut self) -> Result<Vec<String>, Ended>;
    /// Lets the machine go on. `false`: somebody else has paused it too, and it goes on when he lets it.
    ///
    /// # Errors
    /// The machine has ended.
    fn resume(&mut self) -> Result<bool, Ended>;
    /// vCPUs that have stopped by themselves and were not asked about yet.
    fn next_stop(&mut self) -> Option<(usize, DebugStop)>;
}

/// The machine is no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the machine has ended")]
pub struct Ended;

/// gdb's errors are numbers; these are what it says about memory and about arguments.
const EFAULT: u8 = 14;
const EINVAL: u8 = 22;

/// What a session knows.
pub struct Debugged<M: Debuggee> {
    /// The machine.
    pub machine: M,
    abilities: Abilities,
    breakpoints: Breakpoints,
    /// What each vCPU said since the machine stands.
    known: Vec<Option<CpuState>>,
    modes: Vec<Option<Mode>>,
    /// vCPUs that gdb does not name stay where they are.
    locked: bool,
    /// The vCPU that gdb was told about, or asked about, last: its page tables are the ones that breakpoints go by.
    current: usize,
    /// A stop that is to be told without running first.
    at_once: Option<(usize, DebugStop)>,
    /// Data was touched by vCPUs that nobody was told about yet; one each at most.
    untold: VecDeque<(usize, DebugStop)>,
    /// Text for the person at gdb.
    pub notices: Vec<String>,
    log: Logger,
}

fn vcpu_of(tid: Tid) -> usize {
    tid.get() - 1
}

/// gdb's number of a vCPU: they start at 1.
pub fn tid_of(vcpu: usize) -> Tid {
    NonZeroUsize::MIN.saturating_add(vcpu)
}

impl<M: Debuggee> Debugged<M> {
    /// A machine that nobody has looked at yet.
    pub fn new(machine: M, abilities: Abilities, log: Logger) -> Debugged<M> {
        let vcpus = machine.vcpus();
        Debugged {
            machine,
            abilities,
            breakpoints: Breakpoints::new(abilities),
            known: vec![None; vcpus],
            modes: vec![None; vcpus],
            locked: false,
            current: 0,
            at_once: None,
            untold: VecDeque::new(),
            notices: Vec::new(),
            log,
        }
    }

    /// Makes the machine stand still.
    ///
    /// # Errors
    /// See [`Ended`].
    pub fn halt(&mut self) -> Result<(), Ended> {
        let stuck = self.machine.pause()?;
        self.known.fill(None);
        if !stuck.is_empty() {
            self.notices.push(format!(
                "the machine does not stand still: it waits for {}",
                stuck.join(", ")
            ));
        }
        // Whoever else has stopped at a breakpoint is still there and will say so again; but data is touched once.
        while let Some((vcpu, stop)) = self.machine.next_stop() {
            let data = matches!(stop, DebugStop::Hardware(conditions)
                if matches!(self.breakpoints.slot(conditions), Some(Slot::Data { .. })));
            if data && !self.untold.iter().any(|(other, _)| *other == vcpu) {
                self.untold.push_back((vcpu, stop));
            }
        }
        Ok(())
    }

    /// Nobody debugs any more: everything is as it was, and the machine goes on, unless somebody else has paused it:
    /// `false`.
    ///
    /// # Errors
    /// See [`Ended`].
    pub fn release(&mut self) -> Result<bool, Ended> {
        self.halt()?;
        let machine = &self.machine;
        let patches = self.breakpoints.clear(|at, length| read(machine, at, length));
        self.apply(patches);
        (self.at_once, self.locked) = (None, false);
        self.untold.clear();
        for vcpu in 0..self.known.len() {
            self.machine.arm(vcpu, Arming::default());
        }
        self.machine.resume()
    }

    /// No vCPU runs an instruction when the machine starts.
    pub fn hold(&mut self) {
        for vcpu in 0..self.known.len() {
            let held = Arming {
                mode: Mode::Hold,
                watch: Some(Watch::default()),
            };
            self.machine.arm(vcpu, held);
        }
    }

    /// A stop that gdb is to be told without waiting for one.
    pub fn take_at_once(&mut self) -> Option<(usize, DebugStop)> {
        self.at_once.take()
    }

    /// What gdb is told of a stop.
    pub fn reason(&mut self, vcpu: usize, stop: DebugStop) -> MultiThreadStopReason<u64> {
        self.current = vcpu;
        let tid = tid_of(vcpu);
        match stop {
            DebugStop::Planted(_) => MultiThreadStopReason::SwBreak(tid),
            DebugStop::Hardware(conditions) => match self.breakpoints.slot(conditions) {
                Some(Slot::Execute { software: true, .. }) => MultiThreadStopReason::SwBreak(tid),
                Some(Slot::Execute { software: false, .. }) => MultiThreadStopReason::HwBreak(tid),
                Some(Slot::Data { linear, what, .. }) => MultiThreadStopReason::Watch {
                    tid,
                    kind: match what {
                        WatchFor::Writes => WatchKind::Write,
                        WatchFor::Accesses => WatchKind::ReadWrite,
                    },
                    addr: linear,
                },
                None => self.signal(Signal::SIGTRAP),
            },
            DebugStop::Stepped => self.signal(Signal::SIGTRAP),
        }
    }

    /// The current vCPU has a signal, as gdb sees it.
    pub fn signal(&self, signal: Signal) -> MultiThreadStopReason<u64> {
        MultiThreadStopReason::SignalWithThread {
            tid: tid_of(self.current),
            signal,
        }
    }

    fn cpu(&mut self, vcpu: usize) -> Option<&mut CpuState> {
        let known = self.known.get_mut(vcpu)?;
        if known.is_none() {
            *known = self.machine.cpu(vcpu);
        }
        known.as_mut()
    }

    fn known(&mut self, tid: Tid) -> TargetResult<&mut CpuState, Self> {
        self.current = vcpu_of(tid).min(self.known.len() - 1);
        self.cpu(vcpu_of(tid)).ok_or(TargetError::NonFatal)
    }

    fn change(&mut self, tid: Tid, change: impl FnOnce(&mut GdbRegisters) -> bool) -> TargetResult<(), Self> {
        let vcpu = vcpu_of(tid);
        let mut cpu = self.known(tid)?.clone();
        let mut registers = GdbRegisters::of(&cpu);
        if !change(&mut registers) {
            return Err(TargetError::Errno(EINVAL));
        }
        registers.put(&mut cpu);
        let taken = self.machine.set_cpu(vcpu, &cpu);
        // What the processor made of it is asked for anew.
        self.known[vcpu] = None;
        if taken {
            Ok(())
        } else {
            Err(TargetError::Errno(EINVAL))
        }
    }

    fn apply(&mut self, patches: impl IntoIterator<Item = Patch>) -> bool {
        let mut all = true;
        for patch in patches {
            all &= self.machine.write(patch.physical, &patch.bytes);
        }
        all
    }

    /// Where a breakpoint at a linear address goes: by the current vCPU's tables, or by those of the first that has
    /// something there.
    fn place(&mut self, linear: u64) -> Option<Place> {
        let others = (0..self.known.len()).filter(|vcpu| *vcpu != self.current);
        let order: Vec<usize> = std::iter::once(self.current).chain(others).collect();
        order.into_iter().find_map(|vcpu| {
            let cpu = self.cpu(vcpu)?;
            let (paging, real) = (Paging::of_cpu(cpu), cpu.is_real_mode());
            let there = paging.translate(&self.machine, linear)?;
            Some(Place {
                linear,
                physical: there.physical,
                mode: match (real, there.user) {
                    (true, _) => GuestMode::Real,
                    (false, true) => GuestMode::User,
                    (false, false) => GuestMode::Kernel,
                },
                left: there.left,
            })
        })
    }

    fn plant(&mut self, linear: u64) -> Result<(), Refusal> {
        let place = self.place(linear).ok_or(Refusal::NoMemory)?;
        let length = place.left.min(2) as usize;
        let mut memory = read(&self.machine, place.physical, length).ok_or(Refusal::NoMemory)?;
        self.breakpoints.hide(place.physical, &mut memory);
        let patch = self.breakpoints.add_software(place, &memory)?;
        self.apply(patch);
        Ok(())
    }

    /// gdb has one word for all refusals; the log has the right one.
    fn told(&self, what: &str, linear: u64, result: Result<(), Refusal>) -> TargetResult<bool, Self> {
        match result {
            Ok(()) => Ok(true),
            Err(refusal) => {
                warn!(self.log, "gdb: no {what} at {linear:#x}: {refusal}");
                Err(TargetError::Errno(if refusal == Refusal::NoMemory {
                    EFAULT
                } else {
                    EINVAL
                }))
            }
        }
    }

    /// Whether the host can execute one instruction where this vCPU is; if not, gdb's user is told.
    fn can_step(&mut self, vcpu: usize) -> bool {
        let Some(cpu) = self.cpu(vcpu) else {
            return true;
        };
        let (mode, name) = match (cpu.is_real_mode(), cpu.ring()) {
            (true, _) => (GuestMode::Real, "real"),
            (false, 3) => (GuestMode::User, "user"),
            (false, _) => (GuestMode::Kernel, "kernel"),
        };
        let can = self.abilities.of(mode).step;
        if !can {
            self.notices.push(format!(
                "vcpu{vcpu} does not step: this host's KVM cannot step a guest's {name} mode"
            ));
        }
        can
    }
}

fn read(memory: &impl Physical, address: u64, length: usize) -> Option<Vec<u8>> {
    let mut data = vec![0; length];
    memory.read(address, &mut data).then_some(data)
}

impl<M: Debuggee> Target for Debugged<M> {
    type Arch = X86_64System;
    type Error = Ended;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl<M: Debuggee> MultiThreadBase for Debugged<M> {
    fn read_registers(&mut self, registers: &mut GdbRegisters, tid: Tid) -> TargetResult<(), Self> {
        *registers = GdbRegisters::of(self.known(tid)?);
        Ok(())
    }

    fn write_registers(&mut self, registers: &GdbRegisters, tid: Tid) -> TargetResult<(), Self> {
        self.change(tid, |now| {
            *now = registers.clone();
            true
        })
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let paging = Paging::of_cpu(self.known(tid)?);
        let mut done = 0;
        while done < data.len() {
            let Some(there) = paging.translate(&self.machine, start.wrapping_add(done as u64)) else {
                break;
            };
            let length = there.left.min((data.len() - done) as u64) as usize;
            let part = &mut data[done..done + length];
            if !self.machine.read(there.physical, part) {
                break;
            }
            self.breakpoints.hide(there.physical, part);
            done += length;
        }
        if done == 0 && !data.is_empty() {
            return Err(TargetError::Errno(EFAULT));
        }
        Ok(done)
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let paging = Paging::of_cpu(self.known(tid)?);
        let mut done = 0;
        while done < data.len() {
            let there = paging
                .translate(&self.machine, start.wrapping_add(done as u64))
                .ok_or(TargetError::Errno(EFAULT))?;
            let length = there.left.min((data.len() - done) as u64) as usize;
            let part = &data[done..done + length];
            // Asked first: what is noted as written must be.
            if read(&self.machine, there.physical, length).is_none() {
                return Err(TargetError::Errno(EFAULT));
            }
            let bytes = self.breakpoints.keep(there.physical, part);
            self.apply([Patch {
                physical: there.physical,
                bytes,
            }]);
            done += length;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Ended> {
        (0..self.known.len()).for_each(|vcpu| thread_is_active(tid_of(vcpu)));
        Ok(())
    }

    fn is_thread_alive(&mut self, tid: Tid) -> Result<bool, Ended> {
        Ok(vcpu_of(tid) < self.known.len())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        // `thread_extra_info` may only look.
        for vcpu in 0..self.known.len() {
            let _ = self.cpu(vcpu);
        }
        Some(self)
    }
}

impl<M: Debuggee> ThreadExtraInfo for Debugged<M> {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Ended> {
        let vcpu = vcpu_of(tid);
        let activity = match self.known.get(vcpu) {
            Some(Some(cpu)) => Activity::text(cpu.activity),
            _ => "does not answer",
        };
        let text = format!("vcpu{vcpu}: {activity}");
        let length = text.len().min(buffer.len());
        buffer[..length].copy_from_slice(&text.as_bytes()[..length]);
        Ok(length)
    }
}

impl<M: Debuggee> SingleRegisterAccess<Tid> for Debugged<M> {
    fn read_register(&mut self, tid: Tid, id: GdbRegister, buffer: &mut [u8]) -> TargetResult<usize, Self> {
        let value = GdbRegisters::of(self.known(tid)?).get(id);
        let room = buffer.get_mut(..value.len()).ok_or(TargetError::Errno(EINVAL))?;
        room.copy_from_slice(&value);
        Ok(value.len())
    }

    fn write_register(&mut self, tid: Tid, id: GdbRegister, value: &[u8]) -> TargetResult<(), Self> {
        self.change(tid, |registers| registers.set(id, value))
    }
}

impl<M: Debuggee> MultiThreadResume for Debugged<M> {
    fn clear_resume_actions(&mut self) -> Result<(), Ended> {
        self.modes.fill(None);
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Ended> {
        if let Some(mode) = self.modes.get_mut(vcpu_of(tid)) {
            *mode = Some(Mode::Run);
        }
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }

    fn resume(&mut self) -> Result<(), Ended> {
        // What a vCPU touched meanwhile is told first, if anybody still wants to know.
        while let Some((vcpu, stop)) = self.untold.pop_front() {
            let wanted = matches!(stop, DebugStop::Hardware(conditions)
                if matches!(self.breakpoints.slot(conditions), Some(Slot::Data { .. })));
            if wanted {
                self.at_once = Some((vcpu, stop));
                return Ok(());
            }
        }
        let default = if self.locked { Mode::Hold } else { Mode::Run };
        let watch = self.breakpoints.watch();
        for vcpu in 0..self.known.len() {
            let mode = self.modes[vcpu].unwrap_or(default);
            if mode == Mode::Step && !self.can_step(vcpu) {
                self.at_once = Some((vcpu, DebugStop::Stepped));
                return Ok(());
            }
            let arming = Arming {
                mode,
                watch: Some(watch.clone()),
            };
            if !self.machine.arm(vcpu, arming) {
                self.notices.push(format!(
                    "vcpu{vcpu} goes on without breakpoints: it does not take them"
                ));
            }
        }
        self.known.fill(None);
        if !self.machine.resume()? {
            self.notices
                .push("the machine was paused by its controller too, and goes on when he resumes it".into());
        }
        Ok(())
    }
}

impl<M: Debuggee> MultiThreadSingleStep for Debugged<M> {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Ended> {
        if let Some(mode) = self.modes.get_mut(vcpu_of(tid)) {
            *mode = Some(Mode::Step);
        }
        Ok(())
    }
}

impl<M: Debuggee> MultiThreadSchedulerLocking for Debugged<M> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Ended> {
        self.locked = true;
        Ok(())
    }
}

impl<M: Debuggee> BreakpointKinds for Debugged<M> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    // Where the host has no watchpoints gdb is not offered any.
    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        if self.abilities.has_watch() {
            Some(self)
        } else {
            None
        }
    }
}

impl<M: Debuggee> SwBreakpoint for Debugged<M> {
    fn add_sw_breakpoint(&mut self, linear: u64, _kind: usize) -> TargetResult<bool, Self> {
        let result = self.plant(linear);
        self.told("breakpoint", linear, result)
    }

    fn remove_sw_breakpoint(&mut self, linear: u64, _kind: usize) -> TargetResult<bool, Self> {
        let machine = &self.machine;
        let removed = self
            .breakpoints
            .remove_software(linear, |at, length| read(machine, at, length));
        match removed {
            Some(patch) => Ok(self.apply(patch)),
            None => Ok(false),
        }
    }
}

impl<M: Debuggee> HwBreakpoint for Debugged<M> {
    fn add_hw_breakpoint(&mut self, linear: u64, _kind: usize) -> TargetResult<bool, Self> {
        let result = self.breakpoints.add_hardware(linear);
        self.told("hardware breakpoint", linear, result)
    }

    fn remove_hw_breakpoint(&mut self, linear: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(Slot::Execute {
            linear,
            software: false,
        }))
    }
}

fn watch_for(kind: WatchKind) -> Result<WatchFor, Refusal> {
    match kind {
        WatchKind::Write => Ok(WatchFor::Writes),
        WatchKind::ReadWrite => Ok(WatchFor::Accesses),
        WatchKind::Read => Err(Refusal::NoSuchWatch),
    }
}

impl<M: Debuggee> HwWatchpoint for Debugged<M> {
    fn add_hw_watchpoint(&mut self, linear: u64, length: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let result = watch_for(kind).and_then(|what| self.breakpoints.add_watch(linear, length, what));
        self.told("watchpoint", linear, result)
    }

    fn remove_hw_watchpoint(
        &mut self,
        linear: u64,
        length: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        Ok(watch_for(kind).is_ok_and(|what| self.breakpoints.remove(Slot::Data { linear, length, what })))
    }
}
