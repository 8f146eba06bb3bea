//! A seeded scheduler for whole machines: one thread runs at a time, and which is the next is drawn at each point at
//! which threads meet. The same seed gives the same schedule, so a failure can be replayed.
//!
//! The threads are real ones, with their own signals and thread-locals, and the code is the program's own. What makes
//! them take turns is a baton ([`Baton`]): who has it runs, and gives it to another in [`point`], or when it has to wait.
//! The baton carries the scheduler's state, which so has one owner. A thread that waits is asked again whenever somebody
//! else has done something. When nobody can do anything, the time of somebody who waits with a limit is up; when nobody
//! waits so, it is a deadlock, and the simulation fails.
//!
//! All this is compiled for the crate's own tests only. Elsewhere the functions that the program calls are the plain
//! operations, or nothing.

#[cfg(all(test, not(loom)))]
pub(crate) use scheduler::*;

#[cfg(not(all(test, not(loom))))]
pub(crate) use plain::*;

/// A mistake that a simulated machine has, to see that the simulation finds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Planted {
    /// A message to a vCPU comes without its kick.
    NoKick,
    /// The kick comes before the message.
    KickFirst,
    /// A vCPU pauses with an access half done.
    Unsettled,
    /// A device is not reset.
    ForgottenDevice,
    /// What a device answered is taken for the answer to the next question, too.
    HeardTwice,
    /// The boot processor is not told what time it is.
    NoTakeTime,
    /// It is told twice.
    TakeTimeTwice,
    /// It is told, and the message is lost.
    TakeTimeLost,
    /// A late pause stops guest time though the boot processor does not stand.
    FrozenEarly,
    /// A stage for which nobody has to be told anything has no limit.
    NoDeadline,
}

/// Waits for a message until then. When it is later than that the time is up, though a message be there: somebody who asks
/// again as soon as he is answered would else put it off for ever, as a channel looks at the clock only when it is empty.
fn in_time<T>(
    channel: &crossbeam_channel::Receiver<T>,
    until: std::time::Instant,
) -> Result<T, crossbeam_channel::RecvTimeoutError> {
    if std::time::Instant::now() >= until {
        return Err(crossbeam_channel::RecvTimeoutError::Timeout);
    }
    channel.recv_deadline(until)
}

#[cfg(not(all(test, not(loom))))]
mod plain {
    use super::Planted;
    use crossbeam_channel::{Receiver, RecvError, RecvTimeoutError};
    use std::time::{Duration, Instant};

    /// Another thread may run.
    #[inline(always)]
    pub(crate) fn point() {}

    /// Whether a mistake is there. It is not.
    #[inline(always)]
    pub(crate) const fn planted(_: Planted) -> bool {
        false
    }

    /// Waits for a message.
    #[inline(always)]
    pub(crate) fn receive<T>(channel: &Receiver<T>) -> Result<T, RecvError> {
        channel.recv()
    }

    /// Waits for a message until then, and not longer though there always is one.
    #[inline(always)]
    pub(crate) fn receive_until<T>(channel: &Receiver<T>, until: Instant) -> Result<T, RecvTimeoutError> {
        super::in_time(channel, until)
    }

    /// The same. In a simulation the time may be up at any moment.
    #[inline(always)]
    pub(crate) fn receive_by<T>(channel: &Receiver<T>, until: Instant) -> Result<T, RecvTimeoutError> {
        super::in_time(channel, until)
    }

    /// In a simulation: waits until `ready`. Elsewhere `false`.
    #[inline(always)]
    pub(crate) fn waited(_ready: impl FnMut() -> bool) -> bool {
        false
    }

    /// Looks again and again until it is `ready`, or until then. For what nobody tells.
    pub(crate) fn ready_by(until: Instant, mut ready: impl FnMut() -> bool) {
        while !ready() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What a new thread runs.
    #[inline(always)]
    pub(crate) fn enrol<T>(body: impl FnOnce() -> T) -> impl FnOnce() -> T {
        body
    }
}

#[cfg(all(test, not(loom)))]
mod scheduler {
    use super::Planted;
    use crossbeam_channel::{Receiver, RecvError, RecvTimeoutError, Sender, TryRecvError, bounded};
    use std::cell::RefCell;
    use std::time::{Duration, Instant};

    /// Turns in one schedule: a livelock is a failure.
    const MOST_TURNS: u64 = 200_000;

    /// What whoever runs has.
    pub(crate) struct Baton {
        seed: u64,
        random: u64,
        seats: Vec<Seat>,
        turns: u64,
        /// Counts what was done; who waits is asked again when it has changed.
        done: u64,
        planted: Option<Planted>,
        /// One turn in so many, the time of somebody is up who waits with a limit. 0: none.
        hasty: usize,
        /// A digest of who ran when.
        trace: u64,
        /// Why the simulation has failed. From then on all threads run freely.
        failed: Option<String>,
    }

    struct Seat {
        to: Sender<Box<Baton>>,
        is: Is,
    }

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Is {
        Ready,
        /// It waits, and looked when so much had been done.
        Waiting {
            since: u64,
            limit: Limit,
        },
        /// The time that it had is up.
        Late,
        Ended,
    }

    /// How long somebody waits.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Limit {
        Never,
        /// Until nobody else can do anything.
        Last,
        /// Until then, or any moment before; see [`hasten`].
        Any,
    }

    /// A thread's place in a simulation.
    struct Member {
        seat: usize,
        from: Receiver<Box<Baton>>,
        /// While it runs.
        baton: Option<Box<Baton>>,
    }

    thread_local! {
        static MEMBER: RefCell<Option<Member>> = const { RefCell::new(None) };
    }

    impl Baton {
        /// The next number. [Marsaglia, Xorshift RNGs, 2003: xorshift64*]
        fn draw(&mut self, below: usize) -> usize {
            self.random ^= self.random >> 12;
            self.random ^= self.random << 25;
            self.random ^= self.random >> 27;
            let number = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
            (number % below as u64) as usize
        }

        /// Who runs next.
        fn choose(&mut self) -> Option<usize> {
            self.turns += 1;
            if self.turns > MOST_TURNS {
                self.failed = Some("it goes on and on".into());
                return None;
            }
            let done = self.done;
            let can = |seat: &Seat| match seat.is {
                Is::Ready | Is::Late => true,
                Is::Waiting { since, .. } => since < done,
                Is::Ended => false,
            };
            let any = |seat: &Seat| {
                matches!(
                    seat.is,
                    Is::Waiting {
                        limit: Limit::Any,
                        ..
                    }
                )
            };
            if self.hasty > 0
                && let Some(late) = self.seats.iter().position(any)
                && self.draw(self.hasty) == 0
            {
                self.seats[late].is = Is::Late;
                return Some(self.chosen(late));
            }
            let mut who: Vec<usize> = (0..self.seats.len()).filter(|n| can(&self.seats[*n])).collect();
            if who.is_empty() {
                let limited = |seat: &Seat| match seat.is {
                    Is::Waiting { limit, .. } => limit != Limit::Never,
                    _ => false,
                };
                who = (0..self.seats.len())
                    .filter(|n| limited(&self.seats[*n]))
                    .collect();
                for late in &who {
                    self.seats[*late].is = Is::Late;
                }
            }
            if who.is_empty() {
                let states: Vec<_> = self.seats.iter().map(|seat| seat.is).collect();
                self.failed = Some(format!("a deadlock: {states:?}"));
                return None;
            }
            let drawn = self.draw(who.len());
            Some(self.chosen(who[drawn]))
        }

        fn chosen(&mut self, next: usize) -> usize {
            self.trace = (self.trace ^ next as u64).wrapping_mul(0x100_0000_01b3);
            next
        }
    }

    impl Member {
        /// Gives the baton on, and waits until it comes back, unless this thread has `ended`.
        fn pass(&mut self, is: Is) {
            let Some(mut baton) = self.baton.take() else {
                return;
            };
            if baton.failed.is_some() {
                self.baton = Some(baton);
                return;
            }
            baton.seats[self.seat].is = is;
            match baton.choose() {
                Some(next) if next == self.seat => self.baton = Some(baton),
                Some(next) => {
                    let to = baton.seats[next].to.clone();
                    // It is there: it has not ended.
                    to.send(baton).expect("a member waits for its turn");
                    if is != Is::Ended {
                        self.baton = self.from.recv().ok();
                    }
                }
                // It has failed, and whoever started it finds out. All others go on by themselves.
                None if self.seat == 0 => self.baton = Some(baton),
                None => {
                    let first = baton.seats[0].to.clone();
                    let _ = first.send(baton);
                }
            }
        }

        fn is_free(&self) -> bool {
            self.baton.as_ref().is_none_or(|baton| baton.failed.is_some())
        }
    }

    fn with<R>(work: impl FnOnce(&mut Member) -> R) -> Option<R> {
        MEMBER.with_borrow_mut(|member| member.as_mut().map(work))
    }

    /// Whether this thread takes turns now.
    fn is_member() -> bool {
        with(|member| !member.is_free()).unwrap_or(false)
    }

    /// Another thread may run.
    pub(crate) fn point() {
        with(|member| {
            if let Some(baton) = &mut member.baton {
                baton.done += 1;
            }
            member.pass(Is::Ready);
        });
    }

    pub(crate) fn planted(bug: Planted) -> bool {
        with(|member| {
            member
                .baton
                .as_ref()
                .is_some_and(|baton| baton.planted == Some(bug))
        })
        .unwrap_or(false)
    }

    /// A number of the schedule's own, for whatever is to be different in each.
    pub(crate) fn draw(below: usize) -> usize {
        with(|member| member.baton.as_mut().map_or(0, |baton| baton.draw(below))).unwrap_or(0)
    }

    /// Waits until `look` gives something; `None` if the time is up.
    fn wait<T>(limit: Limit, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        point();
        loop {
            if let Some(found) = look() {
                with(|member| member.baton.as_mut().map(|baton| baton.done += 1));
                return Some(found);
            }
            let late = with(|member| {
                let since = member.baton.as_ref().map_or(0, |baton| baton.done);
                member.pass(Is::Waiting { since, limit });
                let seat = member.seat;
                let Some(baton) = &mut member.baton else {
                    return true;
                };
                std::mem::replace(&mut baton.seats[seat].is, Is::Ready) == Is::Late
            });
            if with(|member| member.seat == 0 && member.is_free()).unwrap_or(false) {
                // What it waits for may never come. `run` knows why.
                std::panic::resume_unwind(Box::new("the simulation has failed"));
            }
            if late.unwrap_or(true) || !is_member() {
                return look();
            }
        }
    }

    /// For whoever started the simulation: waits until all others have ended.
    pub(crate) fn wait_for_all() {
        let all = || {
            let ended = |baton: &Baton| baton.seats[1..].iter().all(|seat| seat.is == Is::Ended);
            with(|member| member.baton.as_deref().is_none_or(ended))
                .unwrap_or(true)
                .then_some(())
        };
        wait(Limit::Never, all);
    }

    fn try_receive<T>(channel: &Receiver<T>) -> Option<Result<T, RecvError>> {
        match channel.try_recv() {
            Ok(message) => Some(Ok(message)),
            Err(TryRecvError::Disconnected) => Some(Err(RecvError)),
            Err(TryRecvError::Empty) => None,
        }
    }

    pub(crate) fn receive<T>(channel: &Receiver<T>) -> Result<T, RecvError> {
        if is_member()
            && let Some(received) = wait(Limit::Never, || try_receive(channel))
        {
            return received;
        }
        channel.recv()
    }

    /// From now on, one turn in so many, the time of somebody is up who waits by [`receive_by`]. 0: none.
    pub(crate) fn hasten(one_in: usize) {
        with(|member| member.baton.as_mut().map(|baton| baton.hasty = one_in));
    }

    pub(crate) fn receive_until<T>(channel: &Receiver<T>, until: Instant) -> Result<T, RecvTimeoutError> {
        receive_limited(channel, until, Limit::Last)
    }

    pub(crate) fn receive_by<T>(channel: &Receiver<T>, until: Instant) -> Result<T, RecvTimeoutError> {
        receive_limited(channel, until, Limit::Any)
    }

    fn receive_limited<T>(
        channel: &Receiver<T>,
        until: Instant,
        limit: Limit,
    ) -> Result<T, RecvTimeoutError> {
        if !is_member() {
            return super::in_time(channel, until);
        }
        match wait(limit, || try_receive(channel)) {
            Some(received) => received.map_err(|RecvError| RecvTimeoutError::Disconnected),
            None => Err(RecvTimeoutError::Timeout),
        }
    }

    /// In a simulation: waits until `ready`. Elsewhere `false`.
    pub(crate) fn waited(mut ready: impl FnMut() -> bool) -> bool {
        is_member() && wait(Limit::Never, || ready().then_some(())).is_some()
    }

    /// Waits until it is `ready`, or the time is up.
    pub(crate) fn ready_by(until: Instant, mut ready: impl FnMut() -> bool) {
        if is_member() {
            wait(Limit::Last, || ready().then_some(()));
        }
        while !ready() && !is_member() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What a new thread runs: the same, but it takes turns if the one that starts it does.
    pub(crate) fn enrol<T>(body: impl FnOnce() -> T) -> impl FnOnce() -> T {
        let (to, from) = bounded(1);
        let seat = with(|member| {
            let baton = member.baton.as_mut().filter(|baton| baton.failed.is_none())?;
            baton.seats.push(Seat { to, is: Is::Ready });
            Some(baton.seats.len() - 1)
        })
        .flatten();
        move || {
            let Some(seat) = seat else { return body() };
            let baton = from.recv().ok();
            MEMBER.set(Some(Member { seat, from, baton }));
            let _end = End;
            body()
        }
    }

    /// Gives the baton on for good.
    struct End;

    impl Drop for End {
        fn drop(&mut self) {
            with(|member| {
                if let Some(baton) = &mut member.baton {
                    baton.done += 1;
                }
                member.pass(Is::Ended);
            });
            MEMBER.set(None);
        }
    }

    /// Runs `body`, and all threads that it starts, by the schedule of `seed`. The digest of the schedule.
    ///
    /// # Errors
    /// Why it failed: a deadlock, no end, or what `body` says.
    pub(crate) fn run(
        seed: u64,
        planted: Option<Planted>,
        body: impl FnOnce() -> Result<(), String>,
    ) -> Result<u64, String> {
        let (to, from) = bounded(1);
        let baton = Box::new(Baton {
            seed,
            // Never 0, and neighbours are far from each other.
            random: (seed.wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            seats: vec![Seat { to, is: Is::Ready }],
            turns: 0,
            done: 0,
            planted,
            hasty: 0,
            trace: 0xcbf2_9ce4_8422_2325,
            failed: None,
        });
        MEMBER.set(Some(Member {
            seat: 0,
            from,
            baton: Some(baton),
        }));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        let member = MEMBER.take().expect("it was set above");
        let baton = member.baton.expect("whoever ends last gives it back");
        let failed = |why: &str| format!("seed {}: {why}", baton.seed);
        match (outcome, &baton.failed) {
            (_, Some(why)) => Err(failed(why)),
            (Ok(Err(why)), _) => Err(failed(&why)),
            (Err(panic), _) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
                Err(failed(&text.unwrap_or_default()))
            }
            (Ok(Ok(())), None) => Ok(baton.trace),
        }
    }
}
