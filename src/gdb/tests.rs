//! Sessions against a machine that is a few vectors, in the words of the protocol.

use super::breakpoints::{Abilities, Mechanisms};
use super::session::{Over, Session};
use super::target::{Debugged, Debuggee, Ended};
use super::walk::Physical;
use crate::vcpu::debug::{Activity, Arming, CpuState, DebugStop, Mode};
use gdbstub::conn::Connection;
use slog::{Discard, Logger, o};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::rc::Rc;

/// What gdb gets.
#[derive(Clone, Default)]
struct Wire(Rc<RefCell<String>>);

impl Connection for Wire {
    type Error = Infallible;

    fn write(&mut self, byte: u8) -> Result<(), Infallible> {
        self.0.borrow_mut().push(byte.into());
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// vCPUs that do nothing, without paging.
struct Fake {
    memory: Vec<u8>,
    cpus: Vec<CpuState>,
    armed: Vec<Option<Arming>>,
    running: bool,
    stops: VecDeque<(usize, DebugStop)>,
    stuck: Vec<String>,
    /// Somebody else has paused it.
    paused: bool,
    gone: bool,
}

impl Fake {
    fn new(vcpus: usize) -> Fake {
        let mut cpus = vec![CpuState::default(); vcpus];
        for (index, cpu) in cpus.iter_mut().enumerate() {
            cpu.general.rip = 0x10 * (index as u64 + 1);
            cpu.general.rax = 0xaa;
            // Protected mode.
            cpu.special.cr0 = 1;
        }
        Fake {
            memory: (0..=255).collect(),
            cpus,
            armed: vec![None; vcpus],
            running: true,
            stops: VecDeque::new(),
            stuck: Vec::new(),
            paused: false,
            gone: false,
        }
    }
}

impl Physical for Fake {
    fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let start = address as usize;
        match self.memory.get(start..start + data.len()) {
            Some(there) => {
                data.copy_from_slice(there);
                true
            }
            None => false,
        }
    }
}

impl Debuggee for Fake {
    fn vcpus(&self) -> usize {
        self.cpus.len()
    }

    fn cpu(&mut self, vcpu: usize) -> Option<CpuState> {
        self.cpus.get(vcpu).cloned()
    }

    fn set_cpu(&mut self, vcpu: usize, cpu: &CpuState) -> bool {
        assert!(!self.running, "a running vCPU is not changed");
        self.cpus[vcpu] = cpu.clone();
        true
    }

    fn arm(&mut self, vcpu: usize, arming: Arming) -> bool {
        assert!(!self.running, "a running vCPU is not armed");
        self.armed[vcpu] = Some(arming);
        true
    }

    fn write(&mut self, address: u64, data: &[u8]) -> bool {
        assert!(!self.running, "memory is patched while nothing runs");
        let start = address as usize;
        self.memory[start..start + data.len()].copy_from_slice(data);
        true
    }

    fn pause(&mut self) -> Result<Vec<String>, Ended> {
        if self.gone {
            return Err(Ended);
        }
        self.running = false;
        Ok(self.stuck.clone())
    }

    fn resume(&mut self) -> Result<bool, Ended> {
        self.running = !self.paused;
        Ok(self.running)
    }

    fn next_stop(&mut self) -> Option<(usize, DebugStop)> {
        self.stops.pop_front()
    }
}

const ALL: Mechanisms = Mechanisms {
    step: true,
    hardware: true,
    watch: true,
    int3: true,
    port: true,
};

fn debugged(vcpus: usize, kernel: Mechanisms) -> Debugged<Fake> {
    let abilities = Abilities {
        kernel,
        ..Abilities::default()
    };
    Debugged::new(Fake::new(vcpus), abilities, Logger::root(Discard, o!()))
}

/// A session, and what it says.
struct Talk<'d> {
    session: Session<'d, Fake, Wire>,
    wire: Wire,
}

impl<'d> Talk<'d> {
    fn new(target: &'d mut Debugged<Fake>) -> Talk<'d> {
        let wire = Wire::default();
        let session = Session::new(target, wire.clone()).unwrap();
        let mut talk = Talk { session, wire };
        // Without acknowledgements from here on.
        assert_eq!(talk.say("QStartNoAckMode"), "+$OK#9a");
        talk
    }

    fn send(&mut self, packet: &str) -> Result<String, Over> {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        self.session
            .received(format!("+${packet}#{sum:02x}").as_bytes())
            .map(|()| self.heard())
    }

    fn say(&mut self, packet: &str) -> String {
        self.send(packet).unwrap()
    }

    fn heard(&mut self) -> String {
        std::mem::take(&mut *self.wire.0.borrow_mut())
    }

    /// The body of the one packet that was the answer.
    fn body(&mut self, packet: &str) -> String {
        let answer = self.say(packet);
        let body = answer
            .strip_prefix('$')
            .and_then(|answer| answer.split('#').next());
        body.unwrap_or_else(|| panic!("{answer}")).to_string()
    }

    fn stop(&mut self, vcpu: usize, stop: DebugStop) -> String {
        self.session.machine().stops.push_back((vcpu, stop));
        self.session.look().unwrap();
        self.heard()
    }

    fn machine(&mut self) -> &mut Fake {
        self.session.machine()
    }
}

#[test]
fn registers_and_memory_of_the_thread_that_is_asked_about() {
    let mut target = debugged(2, ALL);
    let mut talk = Talk::new(&mut target);
    assert!(!talk.machine().running, "attached: it stands");
    assert_eq!(talk.body("Hg2"), "OK");
    // Number 16 is RIP.
    // Runs are compressed: 0 and fourteen more.
    assert_eq!(talk.body("p10"), "20*+");
    assert_eq!(talk.body("P10=3400000000000000"), "OK");
    assert_eq!(talk.machine().cpus[1].general.rip, 0x34);
    assert_eq!(talk.machine().cpus[0].general.rip, 0x10);
    assert!(talk.body("g").starts_with("aa0"));
    assert_eq!(talk.body("m42,3"), "424344");
    assert_eq!(talk.body("M42,2:ffee"), "OK");
    assert_eq!(talk.machine().memory[0x41..0x45], [0x41, 0xff, 0xee, 0x44]);
    // Up to the end of memory, and beyond.
    assert_eq!(talk.body("mffe,2"), "E0e");
    assert_eq!(talk.body("Mff,2:0102"), "E0e");
    assert_eq!(talk.machine().memory[0xff], 0xff, "not by halves");
    assert_eq!(talk.body("Hg9"), "OK");
    assert!(talk.body("p10").starts_with('E'), "no such thread");
}

#[test]
fn threads_say_what_they_do() {
    let mut target = debugged(2, ALL);
    target.machine.cpus[1].activity = Activity::NotStarted;
    let mut talk = Talk::new(&mut target);
    assert_eq!(talk.body("qfThreadInfo"), "m01,02");
    let text: String = "vcpu1: not started"
        .bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(talk.body("qThreadExtraInfo,2"), text);
}

#[test]
fn a_breakpoint_is_planted_hit_and_taken_out() {
    let mut target = debugged(2, ALL);
    let mut talk = Talk::new(&mut target);
    assert_eq!(talk.body("Z0,20,1"), "OK");
    assert_eq!(talk.machine().memory[0x20], 0xcc);
    assert_eq!(talk.body("m20,1"), "20");
    assert_eq!(talk.say("vCont;c"), "");
    assert!(talk.machine().running);
    let armed = talk.machine().armed[1].clone().unwrap();
    assert_eq!(
        (armed.mode, &armed.watch.unwrap().planted[..]),
        (Mode::Run, &[0x20][..])
    );
    let told = talk.stop(1, DebugStop::Planted(0x20));
    assert!(told.starts_with("$T05thread:02;swbreak:;"), "{told}");
    assert!(!talk.machine().running);
    assert_eq!(talk.body("z0,20,1"), "OK");
    assert_eq!(talk.machine().memory[0x20], 0x20);
    assert_eq!(talk.body("Z0,200,1"), "E0e", "no memory");
    assert_eq!(talk.body("z0,20,1"), "E16", "none there");
}

#[test]
fn a_step_is_of_one_vcpu_and_others_run_or_stay() {
    let mut target = debugged(3, ALL);
    let mut talk = Talk::new(&mut target);
    let modes = |talk: &mut Talk<'_>| -> Vec<Mode> {
        let armed = talk.machine().armed.iter();
        armed.map(|arming| arming.as_ref().unwrap().mode).collect()
    };
    talk.say("vCont;s:2;c");
    assert_eq!(modes(&mut talk), [Mode::Run, Mode::Step, Mode::Run]);
    let told = talk.stop(1, DebugStop::Stepped);
    assert!(told.starts_with("$T05thread:02;#"), "{told}");
    talk.say("vCont;s:2");
    assert_eq!(modes(&mut talk), [Mode::Hold, Mode::Step, Mode::Hold]);
    talk.stop(1, DebugStop::Stepped);
    talk.say("vCont;c");
    assert_eq!(modes(&mut talk), [Mode::Run; 3]);
}

#[test]
fn a_step_that_the_host_cannot_do_is_refused_with_words() {
    let cannot = Mechanisms { step: false, ..ALL };
    let mut target = debugged(1, cannot);
    let mut talk = Talk::new(&mut target);
    let told = talk.say("vCont;s:1;c");
    let words: String = "actor-vmm: vcpu0 does not step"
        .bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(told.starts_with(&format!("$O{words}")), "{told}");
    assert!(told.contains("$T05thread:01;"), "{told}");
    assert!(!talk.machine().running, "it did not move");
}

#[test]
fn data_that_a_second_vcpu_touched_is_told_next() {
    let mut target = debugged(2, ALL);
    let mut talk = Talk::new(&mut target);
    assert_eq!(talk.body("Z2,40,4"), "OK");
    assert_eq!(talk.body("Z0,20,1"), "OK");
    talk.say("vCont;c");
    talk.machine()
        .stops
        .extend([(0, DebugStop::Planted(0x20)), (1, DebugStop::Hardware(1))]);
    talk.session.look().unwrap();
    assert!(talk.heard().starts_with("$T05thread:01;swbreak:;"));
    // Not run: told.
    let told = talk.say("vCont;c");
    assert!(told.starts_with("$T05thread:02;watch:40;"), "{told}");
    assert!(!talk.machine().running);
    assert_eq!(talk.say("vCont;c"), "");
    assert!(talk.machine().running);
}

#[test]
fn data_that_nobody_watches_any_more_is_not_told() {
    let mut target = debugged(2, ALL);
    let mut talk = Talk::new(&mut target);
    assert_eq!(talk.body("Z3,40,4"), "E16", "x86 has none for reads alone");
    talk.body("Z4,40,4");
    talk.say("vCont;c");
    talk.machine()
        .stops
        .extend([(0, DebugStop::Stepped), (1, DebugStop::Hardware(1))]);
    talk.session.look().unwrap();
    talk.heard();
    assert_eq!(talk.body("z4,40,4"), "OK");
    assert_eq!(talk.say("vCont;c"), "");
    assert!(talk.machine().running);
}

#[test]
fn ctrl_c_stops_and_says_who_is_stuck() {
    let mut target = debugged(1, ALL);
    let mut talk = Talk::new(&mut target);
    talk.say("vCont;c");
    talk.session.received(b"\x03").unwrap();
    assert!(talk.heard().contains("$T02thread:01;"));
    assert!(!talk.machine().running);
    talk.machine().stuck = vec!["vcpu0 to pause".into()];
    let words: String = "waits for vcpu0"
        .bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    talk.say("vCont;c");
    let told = talk.stop(0, DebugStop::Stepped);
    assert!(told.contains(&words), "{told}");
    talk.say("vCont;c");
    talk.session.received(b"\x03").unwrap();
    assert!(talk.heard().contains(&words));
    talk.machine().stuck.clear();
    talk.say("vCont;c");
    let told = talk.stop(0, DebugStop::Stepped);
    assert!(!told.contains(&words), "said once: {told}");
}

#[test]
fn a_machine_that_somebody_else_has_paused_stays_so_and_gdb_is_told() {
    let mut target = debugged(1, ALL);
    let mut talk = Talk::new(&mut target);
    talk.machine().paused = true;
    let words: String = "was paused by its controller"
        .bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let told = talk.say("vCont;c");
    assert!(told.contains(&words), "at once: {told}");
    talk.session.received(b"\x03").unwrap();
    assert!(talk.heard().starts_with("$T02thread:01;"), "Ctrl-C works");
    assert_eq!(target.release(), Ok(false));
    assert!(!target.machine.running);
    target.machine.paused = false;
    assert_eq!(target.release(), Ok(true));
}

#[test]
fn however_it_is_over_nothing_is_left_behind() {
    for end in ["D", "k"] {
        let mut target = debugged(2, ALL);
        {
            let mut talk = Talk::new(&mut target);
            talk.say("Z0,20,1");
            talk.say("Z1,30,1");
            let over = talk.send(end).unwrap_err();
            assert_eq!(over, if end == "D" { Over::Detached } else { Over::Kill });
        }
        target.release().unwrap();
        assert_eq!(target.machine.memory, (0..=255).collect::<Vec<u8>>());
        assert!(target.machine.running);
        for arming in &target.machine.armed {
            assert!(arming.as_ref().unwrap().watch.is_none());
        }
    }
}

#[test]
fn the_end_of_the_machine_is_told_with_its_status() {
    let mut target = debugged(1, ALL);
    let mut talk = Talk::new(&mut target);
    talk.say("vCont;c");
    talk.session.ended(85);
    assert_eq!(talk.wire.0.borrow().as_str(), "$W55#c1");
    target.machine.gone = true;
    assert_eq!(
        Session::new(&mut target, Wire::default()).err(),
        Some(Over::Ended)
    );
}
