//! Interrupts by message in a VM of KVM, and doorbells that move.
//!
//! A source of interrupts has an eventfd and, as an irqfd, an interrupt (GSI) of its own, whose route is the message that
//! the source sends now. While it is to send none the irqfd is taken from KVM, and what is signalled meanwhile waits in the
//! eventfd's count: the queue's actor, who signals, need not know. KVM looks at the count when it gets the irqfd back.
//!
//! KVM takes all routes of a VM at once, so they have one owner: the actor [`Routes`], above all others in rank, since a
//! device asks it in its turn. Everything is allocated before the guest runs.

use crate::actors::{Actor, Address, Placement, Port, Rank};
use crate::boot::layout::FIRST_MESSAGE_GSI;
use crate::pci::msix::{Message, MessageWire};
use crate::virtio::pci::Doorbells;
use crate::virtio::pci::layout::NOTIFY_STEP;
use kvm_bindings as kvm;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use slog::{Logger, error};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// The interrupt routes of a VM.
///
/// Owns: the table. Receives: a source's number and its message. Asks: nobody; it calls the kernel. Rank: table. Ends: when
/// the last wire does.
pub struct Routes {
    vm: Arc<VmFd>,
    table: kvm::KvmIrqRouting,
    /// Where the messages begin in it.
    first: usize,
}

fn route(source: usize, message: Message) -> kvm::kvm_irq_routing_entry {
    let mut route = kvm::kvm_irq_routing_entry {
        gsi: FIRST_MESSAGE_GSI + source as u32,
        type_: kvm::KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    route.u.msi.address_lo = message.address as u32;
    route.u.msi.address_hi = (message.address >> 32) as u32;
    route.u.msi.data = message.data;
    route
}

impl Actor for Routes {
    type Message = (usize, Message);
    /// Whether KVM takes it.
    type Reply = bool;
    const RANK: Rank = Rank::Table;

    fn handle(&mut self, (source, message): (usize, Message)) -> bool {
        let place = self.first + source;
        let before = self.table.as_slice()[place];
        self.table.as_mut_slice()[place] = route(source, message);
        // KVM refuses what it cannot be: bits of an address that no APIC's number has.
        let taken = self.vm.set_gsi_routing(&self.table).is_ok();
        if !taken {
            self.table.as_mut_slice()[place] = before;
        }
        taken
    }
}

impl Routes {
    /// So many wires. `others`: the routes of the interrupt controllers' pins.
    ///
    /// # Errors
    /// When the host gives no eventfds.
    pub(super) fn wires(
        vm: &Arc<VmFd>,
        others: &[kvm::kvm_irq_routing_entry],
        count: usize,
        log: &Logger,
    ) -> std::io::Result<Vec<IrqfdWire>> {
        // A message to nowhere is a route that KVM takes; no irqfd leads to it.
        let none = (0..count).map(|source| route(source, Message::default()));
        let entries: Vec<_> = others.iter().copied().chain(none).collect();
        let table = kvm::KvmIrqRouting::from_entries(&entries)
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::OutOfMemory))?;
        let routes = Routes {
            vm: vm.clone(),
            table,
            first: others.len(),
        };
        let log = log.clone();
        let on_death = move |obituary: crate::actors::Obituary| {
            error!(
                log,
                "{} died and interrupts keep their routes from now on; this is a bug: {}",
                obituary.actor,
                obituary.cause
            );
        };
        let routes = Address::spawn(routes, "msi_routes", Placement::Handoff, count, on_death)?.address;
        let wire = |source| {
            Ok(IrqfdWire {
                vm: vm.clone(),
                signal: Arc::new(EventFd::new(libc::EFD_NONBLOCK)?),
                source,
                routes: routes.connect().expect("lanes were counted"),
                route: None,
                attached: false,
            })
        };
        (0..count).map(wire).collect()
    }
}

/// A wire by irqfd.
pub struct IrqfdWire {
    vm: Arc<VmFd>,
    signal: Arc<EventFd>,
    source: usize,
    routes: Port<Routes>,
    /// The route that KVM has.
    route: Option<Message>,
    attached: bool,
}

impl IrqfdWire {
    /// What a queue's actor writes to.
    pub fn signal(&self) -> Arc<EventFd> {
        self.signal.clone()
    }

    fn gsi(&self) -> u32 {
        FIRST_MESSAGE_GSI + self.source as u32
    }

    fn detach(&mut self) {
        if self.attached {
            // Fails only for what is not attached.
            let _ = self.vm.unregister_irqfd(&self.signal, self.gsi());
            self.attached = false;
        }
    }
}

impl MessageWire for IrqfdWire {
    fn aim(&mut self, to: Option<Message>) {
        let Some(message) = to else {
            self.detach();
            return;
        };
        if self.route != Some(message) {
            if self.routes.ask((self.source, message)) != Ok(true) {
                self.detach();
                return;
            }
            self.route = Some(message);
        }
        if !self.attached {
            // KVM sends what waits, but leaves the count; so it is taken out and written again. What the queue's actor
            // writes in between stays in the count, and is found by KVM.
            let waited = self.signal.read().is_ok();
            self.attached = self.vm.register_irqfd(&self.signal, self.gsi()).is_ok();
            if waited {
                MessageWire::signal(self);
            }
        }
    }

    fn signal(&mut self) {
        // Fails only when 2^64 - 2 signals wait.
        let _ = self.signal.write(1);
    }

    fn is_pending(&self) -> bool {
        // SAFETY: the descriptor belongs to `self.signal`, which outlives the poll.
        let signal = unsafe { BorrowedFd::borrow_raw(self.signal.as_raw_fd()) };
        let mut polled = [PollFd::new(signal, PollFlags::POLLIN)];
        !self.attached && poll(&mut polled, PollTimeout::ZERO) == Ok(1)
    }

    fn forget(&mut self) {
        if !self.attached {
            let _ = self.signal.read();
        }
    }
}

/// A wire whose signals come from the register side alone (`--notify message`), which asks KVM for each.
pub struct CallWire {
    vm: Arc<VmFd>,
    to: Option<Message>,
    pending: bool,
}

impl CallWire {
    /// A wire that is aimed at nothing.
    pub(super) fn new(vm: &Arc<VmFd>) -> CallWire {
        CallWire {
            vm: vm.clone(),
            to: None,
            pending: false,
        }
    }
}

impl MessageWire for CallWire {
    fn aim(&mut self, to: Option<Message>) {
        self.to = to;
        if to.is_some() && std::mem::take(&mut self.pending) {
            self.signal();
        }
    }

    fn signal(&mut self) {
        let Some(message) = self.to else {
            self.pending = true;
            return;
        };
        let msi = kvm::kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // Fails for a message that is to no processor: the guest's own business.
        let _ = self.vm.signal_msi(msi);
    }

    fn is_pending(&self) -> bool {
        self.pending
    }

    fn forget(&mut self) {
        self.pending = false;
    }
}

/// A wire that leads nowhere: of a machine without KVM.
#[derive(Default)]
pub struct NoWire {
    aimed: bool,
    pending: bool,
}

impl MessageWire for NoWire {
    fn aim(&mut self, to: Option<Message>) {
        self.aimed = to.is_some();
        self.pending &= !self.aimed;
    }

    fn signal(&mut self) {
        self.pending = !self.aimed;
    }

    fn is_pending(&self) -> bool {
        self.pending
    }

    fn forget(&mut self) {
        self.pending = false;
    }
}

/// Doorbells by ioeventfd. Where KVM refuses one (something is there already) notifications come as accesses.
pub struct IoeventDoorbells {
    vm: Arc<VmFd>,
    /// Of each queue, and where it is.
    bells: Vec<(EventFd, Option<u64>)>,
}

impl IoeventDoorbells {
    /// Nowhere yet.
    pub(super) fn new(vm: &Arc<VmFd>, bells: Vec<EventFd>) -> IoeventDoorbells {
        IoeventDoorbells {
            vm: vm.clone(),
            bells: bells.into_iter().map(|bell| (bell, None)).collect(),
        }
    }
}

impl Doorbells for IoeventDoorbells {
    fn place(&mut self, registers: Option<u64>) {
        for (index, (bell, there)) in self.bells.iter_mut().enumerate() {
            if let Some(address) = there.take() {
                // Fails only for what is not there.
                let _ = self
                    .vm
                    .unregister_ioevent(bell, &IoEventAddress::Mmio(address), NoDatamatch);
            }
            // A write of any width and value, as the address says it all.
            let address = registers.map(|start| start + NOTIFY_STEP * index as u64);
            *there = address.filter(|address| {
                self.vm
                    .register_ioevent(bell, &IoEventAddress::Mmio(*address), NoDatamatch)
                    .is_ok()
            });
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::cpuid::Topology;
    use super::super::virtio::Source;
    use super::super::vm::{Vm, open};
    use super::*;
    use crate::virtio::Notify;
    use kvm_ioctls::VcpuFd;
    use std::time::{Duration, Instant};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    /// Registers of a local APIC. [SDM 3A table 11-1]
    const SPURIOUS: usize = 0xf0;
    const REQUESTS: usize = 0x200;

    /// A processor that does not run, whose APIC keeps what comes.
    struct Processor(VcpuFd);

    impl Processor {
        fn register(&self, offset: usize) -> u32 {
            let lapic = self.0.get_lapic().unwrap();
            u32::from_le_bytes(std::array::from_fn(|byte| lapic.regs[offset + byte] as u8))
        }

        fn has(&self, vector: u32) -> bool {
            let register = REQUESTS + 0x10 * (vector as usize / 32);
            self.register(register) >> (vector % 32) & 1 != 0
        }

        /// KVM may send from a thread of its own.
        fn gets(&self, vector: u32) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while !self.has(vector) {
                assert!(Instant::now() < deadline, "no interrupt {vector:#x}");
                std::thread::yield_now();
            }
        }
    }

    /// `None`: there is no KVM here.
    fn machine(notify: Notify) -> Option<(Processor, Vec<Source>)> {
        if open().is_err() {
            eprintln!("SKIPPED: no usable /dev/kvm on this machine");
            return None;
        }
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let vm = Vm::new(memory, 1, true).unwrap();
        let vcpu = vm.vcpu(0, &Topology::flat(1)).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        // Enabled by software, spurious vector 0xff.
        for (byte, value) in lapic.regs[SPURIOUS..].iter_mut().zip([0xff, 1]) {
            *byte = value as u8 as std::os::raw::c_char;
        }
        vcpu.set_lapic(&lapic).unwrap();
        let log = Logger::root(slog::Discard, slog::o!());
        let sources = vm.messages(3, notify, &log).unwrap();
        Some((Processor(vcpu), sources))
    }

    fn to(data: u32) -> Option<Message> {
        let address = 0xfee0_0000;
        Some(Message { address, data })
    }

    #[test]
    fn a_source_sends_what_it_is_aimed_at_and_keeps_what_comes_meanwhile() {
        for notify in [Notify::EventFd, Notify::Message] {
            let Some((processor, mut sources)) = machine(notify) else {
                return;
            };
            let [first, second, _] = &mut sources[..] else {
                unreachable!()
            };
            // As the queue's actor signals, where it can.
            let signal = |source: &mut Source| match &source.signal {
                Some(signal) => signal.write(1).unwrap(),
                None => source.wire.signal(),
            };
            signal(first);
            assert!(first.wire.is_pending() && !second.wire.is_pending());
            first.wire.aim(to(0x41));
            processor.gets(0x41);
            assert!(!first.wire.is_pending());
            // Anew while it is aimed; another; the first is not disturbed by that.
            first.wire.aim(to(0x42));
            second.wire.aim(to(0x43));
            assert!(!processor.has(0x42) && !processor.has(0x43));
            signal(second);
            processor.gets(0x43);
            signal(first);
            processor.gets(0x42);
            // Masked, signalled twice, forgotten; masked, signalled, opened for another.
            first.wire.aim(None);
            signal(first);
            signal(first);
            assert!(first.wire.is_pending());
            first.wire.forget();
            assert!(!first.wire.is_pending());
            first.wire.aim(to(0x44));
            signal(second);
            first.wire.aim(None);
            signal(first);
            first.wire.aim(to(0x45));
            processor.gets(0x45);
            assert!(!processor.has(0x44));
        }
    }

    #[test]
    fn a_thousand_signals_against_a_mask_that_comes_and_goes_are_not_lost() {
        let Some((processor, mut sources)) = machine(Notify::EventFd) else {
            return;
        };
        let source = &mut sources[0];
        let signal = source.signal.clone().unwrap();
        for round in 0..500 {
            let vector = 0x40 + round % 64;
            source.wire.aim(to(vector));
            let (sender, mine) = (
                std::thread::spawn({
                    let signal = signal.clone();
                    move || signal.write(1).unwrap()
                }),
                &mut source.wire,
            );
            mine.aim(None);
            mine.aim(to(vector));
            sender.join().unwrap();
            processor.gets(vector);
            // What KVM left in the count would be told of again, of the next vector: it is taken as no loss.
            let mut lapic = processor.0.get_lapic().unwrap();
            for word in 0..8 {
                lapic.regs[REQUESTS + 0x10 * word..][..4].fill(0);
            }
            mine.aim(None);
            mine.forget();
            processor.0.set_lapic(&lapic).unwrap();
        }
    }
}
