//! A machine that somebody ends while it is being started.

use super::common::{Turn, config};
use actor_vmm::host::events::HostEvent;
use actor_vmm::machine::outcome::Outcome;
use actor_vmm::machine::platform::NoPlatform;
use actor_vmm::machine::request::Inbox;
use actor_vmm::machine::supervisor::{self, Unwired};
use actor_vmm::vcpu::scripted::{ScriptedBackend, Source, Step};
use crossbeam_channel::{Sender, bounded};
use slog::{Discard, Logger, o};

/// Says on whose thread it ends.
struct Ends(Sender<String>);

impl Source for Ends {
    fn next(&mut self) -> Option<Step> {
        None
    }

    fn seen(&mut self, _: &Step, _: u64) {}
}

impl Drop for Ends {
    fn drop(&mut self) {
        let name = std::thread::current().name().unwrap_or("?").to_string();
        self.0.send(name).unwrap();
    }
}

#[test]
fn who_leaves_while_vcpus_are_started_does_not_wait_for_the_rest() {
    let _turn = Turn::wait();
    let (tell, ended) = bounded(64);
    let inbox = Inbox::new();
    inbox.address().host(HostEvent::Quit);
    let backends = (0..64)
        .map(|_| ScriptedBackend::new(Ends(tell.clone())))
        .collect();
    let log = Logger::root(Discard, o!());
    let outcome =
        supervisor::run_controlled(&config(64), backends, &Unwired, Box::new(NoPlatform), inbox, &log);
    assert!(matches!(outcome, Ok(Outcome::Quit)), "{outcome:?}");
    // None of the 64 threads was made.
    let threads: Vec<_> = (0..64).map(|_| ended.recv().unwrap()).collect();
    assert!(
        !threads.iter().any(|name| name.starts_with("vcpu")),
        "{threads:?}"
    );
}
