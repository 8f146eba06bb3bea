//! The KVM side of a machine: the VM descriptor, memory slots, interrupt controllers, and vCPUs before they have
//! threads. Nothing here runs a guest.

use crate::boot::entry::{self, EntryPoint};
use crate::boot::layout;
use crate::devices::shell::InterruptLine;
use crate::host::bus::MemoryWatch;
use crate::machine::msi::{CallWire, IoeventDoorbells, IrqfdWire, Routes};
use crate::machine::platform::Platform;
use crate::machine::supervisor::StartError;
use crate::machine::virtio::Source;
use crate::machine::{cpuid, memory};
use crate::vcpu::kvm::KvmBackend;
use crate::vcpu::power_on::{self, PowerOn};
use crate::virtio::Notify;
use crate::virtio::pci::Doorbells;
use kvm_bindings as kvm;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use slog::Logger;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// Why the host cannot provide a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// /dev/kvm cannot be opened.
    #[error("/dev/kvm cannot be opened: {}", remedy(*.0))]
    Open(kvm_ioctls::Error),
    /// Something else is in its place.
    #[error(
        "/dev/kvm is not KVM; what is there does not answer as KVM does (is it bound or passed on wrongly into this \
         container?)"
    )]
    NotKvm,
    /// KVM lacks something that every machine needs.
    #[error("this host's KVM lacks {0}; a newer kernel has it")]
    Lacks(&'static str),
    /// More vCPUs than KVM allows.
    #[error("{wanted} vCPUs are more than this host's KVM allows ({allowed}); use a smaller --cpus")]
    TooManyVcpus {
        /// As asked for.
        wanted: usize,
        /// KVM_CAP_MAX_VCPUS.
        allowed: usize,
    },
    /// An ioctl failed.
    #[error("KVM refuses {what} ({})", refusal(*.source))]
    Refused {
        /// The ioctl and what it was for.
        what: String,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// The PCI window is not addressable.
    #[error(
        "with --transport pci and this much memory the guest needs physical addresses of {needed} bits, and this \
         host's processor has {has}; use a smaller --memory or --transport mmio"
    )]
    AddressBits {
        /// Bits.
        needed: u32,
        /// Bits.
        has: u32,
    },
    /// No eventfd.
    #[error("the host gives no eventfd for an interrupt; is the limit of open files (ulimit -n) too low?")]
    EventFd(#[source] std::io::Error),
}

fn remedy(error: kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::ENOENT => {
            "it is not there; load the kvm-intel or kvm-amd module, or switch virtualization on in the \
                         firmware (or, inside a VM, nested virtualization on its host)"
        }
        libc::EACCES | libc::EPERM => {
            "no permission; run as root or join the group that owns it (usually kvm)"
        }
        libc::EMFILE | libc::ENFILE => "too many open files; raise ulimit -n",
        _ => "the kernel refuses; see dmesg",
    }
}

fn refusal(error: kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::EMFILE | libc::ENFILE => "too many open files; raise ulimit -n",
        libc::ENOMEM => "the host is out of memory for it",
        _ => "see the host's kernel log, dmesg",
    }
}

fn refused(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    let what = what.into();
    move |source| VmError::Refused { what, source }
}

/// The local APIC's entries for its two pins, and what firmware leaves in them: the PIC's interrupts on one, NMI on
/// the other, as the MADT says too. [SDM 3A §11.5.1, figure 11-8]
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 0b111 << 8;
const DELIVERY_NMI: u32 = 0b100 << 8;

/// Opens /dev/kvm and makes sure that it is KVM.
///
/// # Errors
/// See [`VmError`].
pub fn open() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(VmError::Open)?;
    // The one version that there has been since 2007. [KVM api: KVM_GET_API_VERSION]
    if kvm.get_api_version() != kvm::KVM_API_VERSION as i32 {
        return Err(VmError::NotKvm);
    }
    Ok(kvm)
}

/// A VM.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    memory: GuestMemoryMmap,
    /// KVM_GET_VCPU_MMAP_SIZE, bytes.
    mapped: usize,
    sync_regs: i32,
    irqchip: bool,
    cpuid: kvm::CpuId,
    /// The MSRs that are put back at a reset.
    msrs: Vec<u32>,
}

/// APIC IDs above this need the 32-bit format of KVM's x2APIC interface.
const XAPIC_IDS: usize = 255;

impl Vm {
    /// A VM with this memory. `irqchip`: with PIC, IOAPIC, local APICs and PIT in the kernel.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn new(memory: GuestMemoryMmap, vcpus: usize, irqchip: bool) -> Result<Vm, VmError> {
        let kvm = open()?;
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(VmError::Lacks(name));
            }
        }
        let allowed = kvm.get_max_vcpus();
        if vcpus > allowed {
            return Err(VmError::TooManyVcpus {
                wanted: vcpus,
                allowed,
            });
        }
        let fd = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
        if vcpus > XAPIC_IDS {
            let cap = kvm::kvm_enable_cap {
                cap: kvm::KVM_CAP_X2APIC_API,
                args: [
                    u64::from(
                        kvm::KVM_X2APIC_API_USE_32BIT_IDS | kvm::KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
                    ),
                    0,
                    0,
                    0,
                ],
                ..Default::default()
            };
            fd.enable_cap(&cap).map_err(refused("KVM_CAP_X2APIC_API"))?;
        }
        // Only Intel hosts use these, and only without "unrestricted guest"; harmless elsewhere. Before any vCPU.
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(refused("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(refused("KVM_SET_TSS_ADDR"))?;
        for (slot, region) in memory.iter().enumerate() {
            let what = format!(
                "{} bytes of guest memory at {:#x}",
                region.len(),
                region.start_addr().raw_value()
            );
            let host = memory
                .get_host_address(region.start_addr())
                .expect("a region contains its own start");
            let region = kvm::kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the range is one mapping of `memory`, which this VM keeps a reference to, so it stays mapped
            // for as long as the slot exists; only the guest and vm-memory's volatile accesses touch it.
            unsafe { fd.set_user_memory_region(region) }.map_err(refused(what))?;
        }
        if irqchip {
            fd.create_irq_chip().map_err(refused("KVM_CREATE_IRQCHIP"))?;
            // Port 0x61 too: Linux's own calibration of the TSC looks at the PIT's output there.
            let pit = kvm::kvm_pit_config {
                flags: kvm::KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            };
            fd.create_pit2(pit).map_err(refused("KVM_CREATE_PIT2"))?;
            let routes = kvm::KvmIrqRouting::from_entries(&interrupt_routes())
                .map_err(|_| VmError::Lacks("room for the interrupt routes of a PC"))?;
            fd.set_gsi_routing(&routes)
                .map_err(refused("KVM_SET_GSI_ROUTING"))?;
        }
        let mapped = kvm
            .get_vcpu_mmap_size()
            .map_err(refused("KVM_GET_VCPU_MMAP_SIZE"))?;
        let sync_regs = kvm.check_extension_int(Cap::SyncRegs);
        let cpuid = kvm
            .get_supported_cpuid(kvm::KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
        let msrs = kvm.get_msr_index_list().map(|list| list.as_slice().to_vec());
        let msrs = power_on::wanted_msrs(&msrs.map_err(refused("KVM_GET_MSR_INDEX_LIST"))?);
        Ok(Vm {
            kvm,
            fd: Arc::new(fd),
            memory,
            mapped,
            sync_regs,
            irqchip,
            cpuid,
            msrs,
        })
    }

    /// Makes a vCPU with its CPUID, and in the state of a processor after reset.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn vcpu(&self, index: usize, topology: &cpuid::Topology) -> Result<VcpuFd, VmError> {
        let what = |ioctl: &str| refused(format!("{ioctl} for vcpu{index}"));
        let fd = self
            .fd
            .create_vcpu(topology.apic_id(index as u32).into())
            .map_err(what("KVM_CREATE_VCPU"))?;
        let entries = cpuid::guest_entries(self.cpuid.as_slice(), topology, index as u32, &self.features());
        let cpuid = kvm::CpuId::from_entries(&entries)
            .map_err(|_| VmError::Lacks("room for the CPUID entries of this processor"))?;
        fd.set_cpuid2(&cpuid).map_err(what("KVM_SET_CPUID2"))?;
        let msrs = kvm::Msrs::from_entries(&[
            // Fast string operations on, as firmware leaves it [SDM 4: IA32_MISC_ENABLE].
            kvm::kvm_msr_entry {
                index: 0x1a0,
                data: 1,
                ..Default::default()
            },
            // Variable ranges off, everything write-back, as firmware would leave RAM [SDM 3A §12.11.2.1].
            kvm::kvm_msr_entry {
                index: 0x2ff,
                data: 1 << 11 | 6,
                ..Default::default()
            },
        ])
        .expect("two entries fit");
        // A host that knows fewer takes fewer; the guest then sees the reset value.
        fd.set_msrs(&msrs).map_err(what("KVM_SET_MSRS"))?;
        if self.irqchip {
            let mut lapic = fd.get_lapic().map_err(what("KVM_GET_LAPIC"))?;
            for (register, mode) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
                for (byte, value) in lapic.regs[register..].iter_mut().zip(u32::to_le_bytes(mode)) {
                    *byte = value as std::os::raw::c_char;
                }
            }
            fd.set_lapic(&lapic).map_err(what("KVM_SET_LAPIC"))?;
        }
        Ok(fd)
    }

    /// Makes a vCPU start at `entry` instead of waiting for a start-up interrupt.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn enter_at(&self, fd: &VcpuFd, entry: &EntryPoint) -> Result<(), VmError> {
        let base = fd.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
        let (regs, sregs) = entry::apply(entry, base);
        fd.set_sregs(&sregs).map_err(refused("KVM_SET_SREGS"))?;
        fd.set_regs(&regs).map_err(refused("KVM_SET_REGS"))
    }

    /// A vCPU as a backend for its actor. The state that it has now is the one that a reset gives it.
    pub fn backend(&self, fd: VcpuFd) -> KvmBackend {
        let power_on = PowerOn::take(&fd, &self.msrs);
        KvmBackend::new(
            fd,
            self.mapped,
            self.memory.clone(),
            self.sync_regs,
            self.irqchip,
            power_on,
        )
    }

    /// What a reset and a pause do to the VM itself. Before any vCPU runs. `load` puts the guest into empty memory.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn platform(
        &self,
        load: impl FnMut(&GuestMemoryMmap) -> Result<EntryPoint, StartError> + Send + 'static,
    ) -> Result<VmPlatform, VmError> {
        let mut irqchips = Vec::new();
        let mut pit = None;
        if self.irqchip {
            for chip_id in [
                kvm::KVM_IRQCHIP_PIC_MASTER,
                kvm::KVM_IRQCHIP_PIC_SLAVE,
                kvm::KVM_IRQCHIP_IOAPIC,
            ] {
                let mut chip = kvm::kvm_irqchip {
                    chip_id,
                    ..Default::default()
                };
                self.fd
                    .get_irqchip(&mut chip)
                    .map_err(refused("KVM_GET_IRQCHIP"))?;
                irqchips.push(chip);
            }
            pit = Some(self.fd.get_pit2().map_err(refused("KVM_GET_PIT2"))?);
        }
        Ok(VmPlatform {
            vm: self.fd.clone(),
            memory: self.memory.clone(),
            irqchips,
            pit,
            frozen: None,
            load: Box::new(load),
            watch: None,
        })
    }

    fn features(&self) -> cpuid::Features {
        cpuid::Features {
            tsc_deadline: self.irqchip && self.kvm.check_extension(Cap::TscDeadlineTimer),
        }
    }

    /// An edge-triggered interrupt line by irqfd: what ISA devices have.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn edge_line(&self, gsi: u32) -> Result<Box<dyn InterruptLine>, VmError> {
        Ok(Box::new(EdgeLine(self.edge_eventfd(gsi)?)))
    }

    /// The eventfd of such a line.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn edge_eventfd(&self, gsi: u32) -> Result<EventFd, VmError> {
        let eventfd = EventFd::new(libc::EFD_NONBLOCK).map_err(VmError::EventFd)?;
        self.fd
            .register_irqfd(&eventfd, gsi)
            .map_err(refused(format!("KVM_IRQFD for interrupt {gsi}")))?;
        Ok(eventfd)
    }

    /// Has KVM write to an eventfd when the guest writes the 32-bit `value` to `address`, instead of leaving the guest.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn bell(&self, address: u64, value: u32, bell: &EventFd) -> Result<(), VmError> {
        self.fd
            .register_ioevent(bell, &IoEventAddress::Mmio(address), value)
            .map_err(refused(format!("KVM_IOEVENTFD at {address:#x}")))
    }

    /// So many sources of interrupts by message. For a machine to be called once, as they share the numbers of interrupts.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn messages(&self, count: usize, notify: Notify, log: &Logger) -> Result<Vec<Source>, VmError> {
        if notify == Notify::Message {
            let call = || Source {
                wire: Box::new(CallWire::new(&self.fd)),
                signal: None,
            };
            return Ok(std::iter::repeat_with(call).take(count).collect());
        }
        let wires = Routes::wires(&self.fd, &interrupt_routes(), count, log).map_err(VmError::EventFd)?;
        let source = |wire: IrqfdWire| Source {
            signal: Some(wire.signal()),
            wire: Box::new(wire),
        };
        Ok(wires.into_iter().map(source).collect())
    }

    /// Doorbells of a device's queues.
    pub fn doorbells(&self, bells: Vec<EventFd>) -> Box<dyn Doorbells> {
        Box::new(IoeventDoorbells::new(&self.fd, bells))
    }

    /// Makes sure that the guest can address this. [SDM 2A: CPUID 80000008H]
    ///
    /// # Errors
    /// [`VmError::AddressBits`].
    pub fn check_addresses(&self, last: u64) -> Result<(), VmError> {
        let mut leaves = self.cpuid.as_slice().iter();
        let leaf = leaves.find(|entry| entry.function == 0x8000_0008);
        // What a processor without the leaf has.
        let has = leaf.map_or(36, |entry| entry.eax & 0xff);
        let needed = u64::BITS - last.leading_zeros();
        if needed > has {
            return Err(VmError::AddressBits { needed, has });
        }
        Ok(())
    }

    /// A level-triggered interrupt line: what the ACPI SCI has.
    pub fn level_line(&self, gsi: u32) -> Box<dyn InterruptLine> {
        Box::new(LevelLine {
            vm: self.fd.clone(),
            gsi,
        })
    }
}

/// Puts the guest into empty memory, and says where it starts.
type Load = dyn FnMut(&GuestMemoryMmap) -> Result<EntryPoint, StartError> + Send;

/// The VM, as it is paused and reset.
pub struct VmPlatform {
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap,
    /// As they were before any vCPU ran.
    irqchips: Vec<kvm::kvm_irqchip>,
    pit: Option<kvm::kvm_pit_state2>,
    /// The clock and the PIT when guest time was stopped.
    frozen: Option<(kvm::kvm_clock_data, Option<kvm::kvm_pit_state2>)>,
    load: Box<Load>,
    watch: Option<Arc<MemoryWatch>>,
}

impl VmPlatform {
    /// The same, with guest memory that is watched.
    pub fn watched(mut self, watch: MemoryWatch) -> VmPlatform {
        self.watch = Some(Arc::new(watch));
        self
    }
}

/// After a pause of this length and more the PIT starts its period anew, or KVM would deliver every tick of the pause
/// in a burst. A shorter one is left to catch up: a guest that counts ticks shall have them.
const PIT_FORGETS: Duration = Duration::from_millis(100);

/// By so much the host's clock and KVM's may be apart at the moment that is taken for both.
const APART: Duration = Duration::from_micros(100);
/// How often that is tried.
const TRIES: usize = 20;

/// Does something to KVM's clock, and tells at which moment. Who loses the processor in between does not know that moment, and
/// the guest's clock and its devices' time would be apart by what he had to wait, for ever; so he does it again. The vCPUs
/// stand, and nobody has seen it.
fn at_one_moment<T>(mut act: impl FnMut() -> T) -> (T, Instant) {
    let mut tries = (0..TRIES).map(|_| {
        let begin = Instant::now();
        let done = act();
        let took = begin.elapsed();
        (took, (done, begin + took / 2))
    });
    let (mut took, mut last) = tries.next().expect("there is a first");
    while took > APART
        && let Some(next) = tries.next()
    {
        (took, last) = next;
    }
    last
}

impl Platform for VmPlatform {
    fn freeze(&mut self) -> Instant {
        // A host without the clock has guests without it. The TSC and what is made of it (the local APIC's deadline)
        // cannot be stopped; guests that use it as a clock see the pause, as on QEMU.
        let (clock, at) = at_one_moment(|| self.vm.get_clock().ok());
        let pit = self.pit.and_then(|_| self.vm.get_pit2().ok());
        self.frozen = clock.map(|clock| (clock, pit));
        at
    }

    fn thaw(&mut self, stood: Duration) -> Instant {
        let Some((mut clock, pit)) = self.frozen.take() else {
            return Instant::now();
        };
        // Flags say how the clock was read, not how to set it. [KVM api: KVM_SET_CLOCK]
        clock.flags = 0;
        let (_, at) = at_one_moment(|| self.vm.set_clock(&clock));
        if let Some(pit) = pit.filter(|_| stood >= PIT_FORGETS) {
            let _ = self.vm.set_pit2(&pit);
        }
        at
    }

    fn reset(&mut self) -> Result<Option<EntryPoint>, StartError> {
        for chip in &self.irqchips {
            self.vm.set_irqchip(chip).map_err(refused("KVM_SET_IRQCHIP"))?;
        }
        if let Some(pit) = &self.pit {
            self.vm.set_pit2(pit).map_err(refused("KVM_SET_PIT2"))?;
            // It is not to be set to what it was before the reset when time goes on.
            if let Some(frozen) = &mut self.frozen {
                frozen.1 = None;
            }
        }
        memory::clear(&self.memory).map_err(StartError::Host)?;
        (self.load)(&self.memory).map(Some)
    }

    fn memory(&self) -> Option<Arc<MemoryWatch>> {
        self.watch.clone()
    }
}

/// Which pin each interrupt comes in at: of the PIC and of the IOAPIC by its own number, as PCs have it, but the PIT,
/// interrupt 0, at pin 2 of the IOAPIC, as the MADT says. Pin 2 of the PIC is where the second one is. KVM's own
/// default has the PIT at pin 0.
fn interrupt_routes() -> Vec<kvm::kvm_irq_routing_entry> {
    const CASCADE: u32 = 2;
    const PIC_PINS: u32 = 8;
    const IOAPIC_PINS: u32 = 24;
    let route = |gsi, irqchip, pin| {
        let mut route = kvm::kvm_irq_routing_entry {
            gsi,
            type_: kvm::KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        route.u.irqchip = kvm::kvm_irq_routing_irqchip { irqchip, pin };
        route
    };
    let isa = (0..2 * PIC_PINS).filter(|gsi| *gsi != CASCADE);
    let pic = isa.map(|gsi| match gsi.checked_sub(PIC_PINS) {
        None => route(gsi, kvm::KVM_IRQCHIP_PIC_MASTER, gsi),
        Some(pin) => route(gsi, kvm::KVM_IRQCHIP_PIC_SLAVE, pin),
    });
    let ioapic = (0..IOAPIC_PINS)
        .filter(|gsi| *gsi != CASCADE)
        .map(|gsi| route(gsi, kvm::KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi }));
    pic.chain(ioapic).collect()
}

/// An edge is one write to an eventfd.
struct EdgeLine(EventFd);

impl InterruptLine for EdgeLine {
    fn set(&mut self, level: bool) {
        if level {
            // Fails only when 2^64 - 2 edges are pending.
            let _ = self.0.write(1);
        }
    }
}

/// A level is held in KVM's IOAPIC.
struct LevelLine {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl InterruptLine for LevelLine {
    fn set(&mut self, level: bool) {
        // Fails only for an interrupt that does not exist.
        let _ = self.vm.set_irq_line(self.gsi, level);
    }
}
