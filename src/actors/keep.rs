//! Keeping the token: a sender that is alone with an actor for long lets go of the token without giving it back, and its
//! turns then cost no locked instruction.
//!
//! A locked instruction waits until every store before it has reached the cache; taking the token and giving it back are
//! two of them, and two thirds of what an ask of an idle actor costs. They are needed only because somebody else might
//! come at the same moment. So after [`KEEP_AFTER`] turns in which nobody did, the holder writes `HELD | KEPT` into the
//! word where it would have written 0, and is the token's *keeper*. What it does from then on for a turn of its own is
//!
//! ```text
//!  keeper                              whoever comes (its fetch_or has found KEPT, and it is the one that cleared it)
//!  inside := true                      kept := REVOKED
//!  light fence                         heavy fence
//!  kept is YES? the turn, else claim   inside is false? claim, else leave it to the keeper
//!  inside := false
//!  light fence
//!  kept is still YES? done, else claim
//! ```
//!
//! Each side says what it does before it looks at what the other has said, so at least one of them sees the other
//! (Dekker's argument): whoever comes sees that the keeper is in a turn, or the keeper sees that it has been revoked. If
//! both may have the token, both claim, by a compare-and-swap that one of them wins: that one has it, as after any other
//! way to take it, and serves what is in the lanes. `kept` counts the keepings of a lane, so that who was held up between its
//! look and its claim does not claim a later one, in which the keeper may be in a turn. The keeper's fence is one for the compiler only. Whoever comes pays for both:
//! `membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED)`, by which every processor that runs a thread of this process passes a
//! full barrier before the call returns (membarrier(2); about a microsecond). So the keeper's store is seen, or its load
//! comes after the barrier and sees `REVOKED`. Where the host has no such call nobody keeps a token.
//!
//! Nobody waits for a keeper that does nothing: its thread may sleep, be in the guest or have ended. Whoever came holds up
//! the others that come until it has revoked, as the holder of a token does. That includes the membarrier, which waits until
//! each of those processors has answered an interrupt, and for its turn among all programs that call it: a microsecond, or a
//! time slice where the host's own processors are shared.
//!
//! # Orderings
//!
//! * `inside := false` is `Release`, and the look of whoever comes `Acquire`: the next turn sees the state that the
//!   keeper's last one left.
//! * The fences are `SeqCst` together (a model has real ones): Dekker's argument needs one order of all of them.
//! * `kept` needs none: it says who may, and what that one reads is ordered by `inside` and by the word. Its count is current
//!   for whoever revokes, who has read the word that the keeper wrote after it.

use super::sync::{AtomicBool, AtomicU32, Bug, Ordering, Site, at, planted};

/// After so many turns of one sender in which it met nobody the token is kept. To revoke it costs about as much as 400
/// turns save; so somebody who comes again and again just after that makes an access dearer by a twentieth at most.
#[cfg(not(any(test, loom)))]
const KEEP_AFTER: u32 = 8192;
/// Few, so that tests meet it.
#[cfg(all(test, not(loom)))]
const KEEP_AFTER: u32 = 8;

#[cfg(loom)]
thread_local! {
    /// What a model wants: most have enough to explore without.
    pub(super) static KEEP_AFTER: std::cell::Cell<u32> = const { std::cell::Cell::new(u32::MAX) };
}

/// Turns alone until the token is kept.
pub(super) fn keep_after() -> u32 {
    #[cfg(loom)]
    return KEEP_AFTER.get();
    #[cfg(not(loom))]
    KEEP_AFTER
}

// What `kept` can be, in its two lowest bits; above is the number of the keeping.
/// This lane's sender is not the keeper.
const NO: u32 = 0;
/// It is.
const YES: u32 = 1;
/// It was, and nobody has claimed the token yet.
const REVOKED: u32 = 2;
const WHICH: u32 = 3;
/// To the next keeping. They come round after 2^30, a day of nothing else, in which whoever revokes would have to stand still.
const NEXT: u32 = 4;

/// A lane's part of the protocol. Of all lanes of an actor one at most is kept.
pub(super) struct Keep {
    /// The keeper is in a turn. Stays set if the turn panics: the actor is closed then.
    inside: AtomicBool,
    kept: AtomicU32,
}

impl Keep {
    pub(super) fn new() -> Keep {
        Keep {
            inside: AtomicBool::new(false),
            kept: AtomicU32::new(NO),
        }
    }

    /// For the holder, before it lets go of the token by `HELD | KEPT`.
    pub(super) fn begin(&self) {
        let last = self.kept.load(Ordering::Relaxed) & !WHICH;
        self.kept.store(last.wrapping_add(NEXT) | YES, Ordering::Relaxed);
    }

    /// For the holder that could not.
    pub(super) fn end(&self) {
        let this = self.kept.load(Ordering::Relaxed) & !WHICH;
        self.kept.store(this | NO, Ordering::Relaxed);
    }

    /// Whether the sender is the keeper.
    #[inline(always)]
    fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed) & WHICH == YES
    }

    /// For the keeper, before a turn. `false`: it is the keeper no more, and must [`Keep::leave`].
    #[inline(always)]
    pub(super) fn enter(&self) -> bool {
        self.inside.store(true, Ordering::Relaxed);
        membarrier::light(at(Site::KeeperEnters, Ordering::SeqCst));
        self.is_kept()
    }

    /// For the keeper, after a turn. `false`: it is the keeper no more, and must [`Keep::claim`].
    #[inline(always)]
    pub(super) fn leave(&self) -> bool {
        self.inside
            .store(false, at(Site::KeeperLeaves, Ordering::Release));
        membarrier::light(at(Site::KeeperLooks, Ordering::SeqCst));
        self.is_kept()
    }

    /// For the keeper that is it no more, and not in a turn: whether the token is its own all the same.
    #[cold]
    pub(super) fn claim(&self) -> bool {
        // Nobody but the caller begins a keeping of this lane.
        self.claim_of(self.kept.load(Ordering::Relaxed) & !WHICH)
    }

    /// Whether the token, of this keeping, is the caller's.
    fn claim_of(&self, keeping: u32) -> bool {
        let keeping = match planted(Bug::ClaimAnother) {
            true => self.kept.load(Ordering::Relaxed) & !WHICH,
            false => keeping,
        };
        let (from, to) = (keeping | REVOKED, keeping | NO);
        if planted(Bug::ClaimBlindly) {
            return self.kept.swap(to, Ordering::Relaxed) & WHICH != YES;
        }
        self.kept
            .compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    }

    /// For whoever has cleared `KEPT`. `true`: the token is the caller's. Otherwise it is the keeper's, which will look
    /// into the lanes.
    #[cold]
    pub(super) fn revoke(&self) -> bool {
        let keeping = self.kept.load(Ordering::Relaxed) & !WHICH;
        self.kept.store(keeping | REVOKED, Ordering::Relaxed);
        membarrier::heavy(at(Site::Revoke, Ordering::SeqCst));
        let inside = self.inside.load(at(Site::RevokerLooks, Ordering::Acquire));
        (!inside || planted(Bug::RevokeBlindly)) && self.claim_of(keeping)
    }

    /// Whether the keeper is in a turn.
    pub(super) fn is_inside(&self) -> bool {
        self.inside.load(Ordering::Relaxed)
    }
}

/// Whether tokens can be kept on this host.
pub(super) fn is_possible() -> bool {
    membarrier::is_there()
}

/// A pair of fences that together are sequentially consistent: the light one costs nothing, the heavy one a system call.
#[cfg(not(loom))]
mod membarrier {
    use std::sync::LazyLock;
    use std::sync::atomic::{Ordering, compiler_fence};

    static REGISTERED: LazyLock<bool> = LazyLock::new(|| {
        // Miri has no such call.
        !cfg!(miri) && call(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
    });

    fn call(command: libc::c_int) -> bool {
        // SAFETY: takes three integers and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }

    /// Whether the host has it and lets us use it (Linux 4.14; a seccomp filter may forbid it).
    pub(super) fn is_there() -> bool {
        *REGISTERED
    }

    /// Keeps the compiler from moving the load behind it before the store in front of it.
    #[inline(always)]
    pub(super) fn light(order: Ordering) {
        compiler_fence(order);
    }

    /// A full barrier on every processor that runs a thread of this process.
    pub(super) fn heavy(_order: Ordering) {
        while !call(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
            let error = std::io::Error::last_os_error();
            // The kernel may want memory for it. Nothing else can be wrong once it is registered, but without it nothing
            // that follows would be true.
            if error.raw_os_error() != Some(libc::ENOMEM) {
                eprintln!("actor-vmm: membarrier: {error}");
                std::process::abort();
            }
            std::thread::yield_now();
        }
    }
}

/// The same in a model: real fences on both sides.
#[cfg(loom)]
mod membarrier {
    use super::super::sync::{Ordering, fence};

    pub(super) fn is_there() -> bool {
        true
    }

    pub(super) fn light(order: Ordering) {
        fence(order);
    }

    pub(super) fn heavy(order: Ordering) {
        fence(order);
    }
}
