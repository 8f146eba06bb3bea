//! Brings lifecycle messages to devices, so that the machine actor never takes part in a device's turn.
//!
//! Whoever sends to an idle device runs the device's turn, and then the turns of those who came meanwhile. That is what
//! makes an access cheap, but one of those turns may block for ever, and the machine actor must not be the one who sits
//! in it. So it leaves an order per device here, and a thread that may be lost delivers it. If that thread is lost, the
//! machine actor starts another ([`Messenger::reinforce`]), and only the stuck device's own messages stay undelivered.
//!
//! The thread is started with the first order: a machine that is never paused or reset has none.
//!
//! Owns: an end of each device's mailbox, kept in a channel of its own, so that only one thread has it at a time.
//! Receives: orders. Sends to: devices, without waiting. Rank: vCPU, as any sender to devices. Ends: with the machine.

use crate::actors::{Lifecycle, Rank, RankGuard};
use crate::vcpu::activity::{Activity, ActivityView};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Orders that wait for one device: the machine has at most one that it has not heard of.
const ORDERS: usize = 4;
/// Threads at most: each but the first replaces one that is stuck.
const THREADS: usize = 4;

/// One device's end, as the messenger uses it.
pub trait Courier: Send + 'static {
    /// Sends without waiting for the device, but perhaps for those whose turns come first.
    fn deliver(&mut self, event: Lifecycle);
    /// Ends the device after what was sent before, without waiting. More than once is as good as once.
    fn stop(&mut self);
}

struct Slot<C> {
    /// Holds the courier while nobody uses it.
    home: (Sender<C>, Receiver<C>),
    orders: (Sender<Lifecycle>, Receiver<Lifecycle>),
    /// The device is to be stopped by whoever has the courier.
    stopping: AtomicBool,
}

impl<C: Courier> Slot<C> {
    /// Delivers what was ordered, unless somebody else is at it, who then delivers this too: he looks at the orders
    /// again after he has put the courier back.
    fn deliver(&self) {
        while !self.orders.1.is_empty() {
            let Ok(mut courier) = self.home.1.try_recv() else {
                return;
            };
            while let Ok(event) = self.orders.1.try_recv() {
                courier.deliver(event);
            }
            self.bring_home(courier);
            // Whoever says that it is to be stopped looks for the courier afterwards, and we the other way round; so one of
            // us sees the other.
            fence(Ordering::SeqCst);
            if self.stopping.load(Ordering::Relaxed) {
                self.stop_if_home();
            }
        }
    }

    fn bring_home(&self, courier: C) {
        // There is room: it was taken out.
        let _ = self.home.0.try_send(courier);
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.stop_if_home();
    }

    /// Perhaps by both, which is as good as by one.
    fn stop_if_home(&self) {
        if let Ok(mut courier) = self.home.1.try_recv() {
            courier.stop();
            self.bring_home(courier);
        }
    }
}

/// The couriers of all devices, and the threads that send them.
pub struct Messenger<C: Courier> {
    slots: Arc<[Slot<C>]>,
    jobs: (Sender<usize>, Receiver<usize>),
    /// Of the threads that are not started yet.
    idle: Vec<Activity>,
    views: Vec<ActivityView>,
    threads: usize,
}

impl<C: Courier> Messenger<C> {
    /// For these devices, in the order of their numbers.
    pub fn new(couriers: Vec<C>) -> Messenger<C> {
        let jobs = bounded(couriers.len().max(1) * ORDERS);
        let slot = |courier| {
            let home = bounded(1);
            let _ = home.0.try_send(courier);
            Slot {
                home,
                orders: bounded(ORDERS),
                stopping: AtomicBool::new(false),
            }
        };
        let idle: Vec<_> = (0..THREADS).map(|_| Activity::new()).collect();
        Messenger {
            views: idle.iter().map(Activity::view).collect(),
            idle,
            slots: couriers.into_iter().map(slot).collect(),
            jobs,
            threads: 0,
        }
    }

    /// Leaves an order. `false`: the host gives no thread, or too many wait already, which a machine that waits for
    /// answers does not bring about.
    pub fn order(&mut self, device: usize, event: Lifecycle) -> bool {
        let left =
            self.slots[device].orders.0.try_send(event).is_ok() && self.jobs.0.try_send(device).is_ok();
        left && (self.threads > 0 || (!self.idle.is_empty() && self.start()))
    }

    /// Orders were not delivered for a long time: another thread, if the ones that there are do not get to them.
    pub fn reinforce(&mut self) {
        if !self.idle.is_empty() && !self.jobs.1.is_empty() {
            self.start();
        }
    }

    /// What each thread that there is or may be is doing.
    pub fn views(&self) -> Vec<ActivityView> {
        self.views.clone()
    }

    fn start(&mut self) -> bool {
        // The one of the first thread is the first view.
        let activity = self.idle.remove(0);
        let (slots, jobs) = (self.slots.clone(), self.jobs.1.clone());
        let work = move || {
            let _rank = RankGuard::enter(Rank::Vcpu);
            while let Ok(device) = crate::simulation::receive(&jobs) {
                activity.at_device(device);
                slots[device].deliver();
                activity.asleep();
            }
        };
        let started = crate::thread::spawn("messenger", work).is_ok();
        self.threads += usize::from(started);
        started
    }

    /// Ends all devices. One whose courier is under way is ended when that is back, which may be never.
    pub fn stop(&mut self) {
        self.slots.iter().for_each(Slot::stop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Tells what it delivers; its device may be stuck.
    struct Fake {
        device: usize,
        stuck: Option<Receiver<()>>,
        delivered: Sender<(usize, Lifecycle)>,
    }

    impl Courier for Fake {
        fn deliver(&mut self, event: Lifecycle) {
            if let Some(stuck) = &self.stuck {
                let _ = stuck.recv();
            }
            let _ = self.delivered.send((self.device, event));
        }

        fn stop(&mut self) {
            let _ = self.delivered.send((self.device, STOP));
        }
    }

    /// What a fake tells when it is stopped.
    const STOP: Lifecycle = Lifecycle::Reset;
    const HANG: Duration = Duration::from_secs(30);

    #[test]
    fn a_stuck_device_keeps_one_thread_and_the_others_get_their_messages() {
        let (tell, delivered) = bounded(16);
        let (release, stuck) = bounded::<()>(0);
        let fakes = (0..3).map(|device| Fake {
            device,
            stuck: (device == 0).then(|| stuck.clone()),
            delivered: tell.clone(),
        });
        let mut messenger = Messenger::new(fakes.collect());
        for device in 0..3 {
            assert!(messenger.order(device, Lifecycle::Pause));
        }
        // The first thread is in device 0 for good before this can do anything.
        while messenger.jobs.1.len() > 2 {
            std::thread::yield_now();
        }
        messenger.reinforce();
        let mut got: Vec<_> = (0..2).map(|_| delivered.recv_timeout(HANG).unwrap().0).collect();
        got.sort_unstable();
        assert_eq!(got, [1, 2]);
        // Another order for the stuck one costs no thread, and comes when it is loose.
        assert!(messenger.order(0, Lifecycle::Resume));
        assert!(messenger.order(1, Lifecycle::Resume));
        assert_eq!(delivered.recv_timeout(HANG).unwrap(), (1, Lifecycle::Resume));
        // A stop does not wait for it, and is not forgotten.
        messenger.stop();
        let mut got: Vec<_> = (0..2).map(|_| delivered.try_recv().unwrap()).collect();
        got.sort_unstable_by_key(|(device, _)| *device);
        assert_eq!(got, [(1, STOP), (2, STOP)]);
        drop(release);
        assert_eq!(delivered.recv_timeout(HANG).unwrap(), (0, Lifecycle::Pause));
        assert_eq!(delivered.recv_timeout(HANG).unwrap(), (0, Lifecycle::Resume));
        assert_eq!(delivered.recv_timeout(HANG).unwrap(), (0, STOP));
    }
}
