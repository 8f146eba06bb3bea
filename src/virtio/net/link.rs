//! Whether a network device's link is up: it is, unless somebody has switched it off or the host's side is gone.
//!
//! Owner of what the driver sees (the published status) is the actor of the first receive queue. The two reasons are
//! bits of a word: one is set and cleared by whoever holds the [`LinkSwitch`], who rings that actor's bell; the other
//! is set, once, by whichever queue's actor finds the host's side gone. All that a bit says is in the bit, so `Relaxed`
//! would do for each; `AcqRel` costs nothing beside the system calls around.
//!
//! While the link is down, nothing goes through the device: what comes from either side is taken and dropped.

use super::LINK_UP;
use crate::virtio::registers::Published;
use slog::{Logger, error};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// Switched off.
const OFF: u32 = 1;
/// The host's side is gone.
const LOST: u32 = 2;

/// A device's link.
#[derive(Clone)]
pub struct Link {
    name: &'static str,
    /// What is on the host's side, for a person.
    what: String,
    word: Arc<AtomicU32>,
    status: Published,
    log: Logger,
}

impl Link {
    /// A link that is up.
    pub fn new(name: &'static str, what: String, status: Published, log: Logger) -> Link {
        Link {
            name,
            what,
            word: Arc::new(AtomicU32::new(0)),
            status,
            log,
        }
    }

    /// A queue's end. `owner`: that of the first receive queue.
    pub fn end(&self, owner: bool) -> LinkEnd {
        LinkEnd {
            link: self.clone(),
            owner,
        }
    }

    /// The switch. `bell`: rings the actor of the first receive queue.
    pub fn switch(&self, bell: EventFd) -> LinkSwitch {
        LinkSwitch {
            name: self.name,
            word: self.word.clone(),
            bell,
        }
    }
}

/// A queue's end of the link.
pub struct LinkEnd {
    link: Link,
    owner: bool,
}

impl LinkEnd {
    /// Frames may pass.
    pub fn is_up(&self) -> bool {
        self.link.word.load(Ordering::Acquire) == 0
    }

    /// The host's side is gone for ever.
    pub fn is_lost(&self) -> bool {
        self.link.word.load(Ordering::Acquire) & LOST != 0
    }

    /// It is from now on. The first who finds it says so.
    pub fn lose(&self, why: &str) {
        let Link {
            name,
            what,
            word,
            log,
            ..
        } = &self.link;
        if word.fetch_or(LOST, Ordering::AcqRel) & LOST == 0 {
            error!(
                log,
                "{name}: {what} is gone ({why}); the guest goes on with its link down, and has it again after a restart of the machine"
            );
        }
    }

    /// Publishes the status, if this is the owner's. Returns whether it has changed.
    pub fn publish(&self) -> bool {
        let status = if self.is_up() { LINK_UP } else { 0 };
        self.owner && self.link.status.set(status)
    }
}

/// Switches a device's link off and on.
pub struct LinkSwitch {
    name: &'static str,
    word: Arc<AtomicU32>,
    bell: EventFd,
}

impl LinkSwitch {
    /// The device's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Switches. Does not wait: the driver is told by the device's own actor.
    pub fn set(&self, up: bool) {
        if up {
            self.word.fetch_and(!OFF, Ordering::AcqRel);
        } else {
            self.word.fetch_or(OFF, Ordering::AcqRel);
        }
        // Fails only when the counter is full, and then it rings already.
        let _ = self.bell.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::kept_log;

    #[test]
    fn a_link_is_up_unless_there_is_a_reason() {
        let (log, lines) = kept_log();
        let status = Published::new(6, LINK_UP);
        let link = Link::new("net0", "the host's tap t".into(), status.clone(), log);
        let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let switch = link.switch(bell.try_clone().unwrap());
        let (owner, other) = (link.end(true), link.end(false));
        assert!(!owner.publish() && owner.is_up());
        switch.set(false);
        assert_eq!(bell.read().unwrap(), 1);
        assert!(!other.is_up() && !other.is_lost());
        assert!(!other.publish(), "not the owner");
        assert!(owner.publish());
        assert_eq!(status.value(), 0);
        assert!(!owner.publish(), "no change");
        other.lose("why");
        owner.lose("why not");
        switch.set(true);
        assert!(!owner.publish() && owner.is_lost(), "still down");
        let lines: Vec<String> = lines.try_iter().collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(
            lines[0].contains("net0: the host's tap t is gone (why)"),
            "{lines:?}"
        );
    }
}
