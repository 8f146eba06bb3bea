//! The machine: the supervisor actor and everything it puts together.
//!
//! | file | what |
//! |---|---|
//! | `supervisor.rs` | what a machine is made of, and how it is put together |
//! | `actor.rs` | the machine actor: watches, pauses, resets and ends everything; owns the state |
//! | `actor/asked.rs` | what is asked of it from outside |
//! | `actor/late.rs` | what it says when somebody does not answer |
//! | `actor/ending.rs` | how it ends everything, and in what time |
//! | `state.rs` | the machine's states, as a pure state machine |
//! | `holds.rs` | who wants it to stand still, a controller or a debugger: pure |
//! | `conductor.rs` | who is told what in which order for a pause, a resume, a reset: pure |
//! | `request.rs` | what may be asked of the machine, and the answers |
//! | `messenger.rs` | brings lifecycle messages to devices, so that the machine actor is never stuck in one |
//! | `platform.rs` | what is neither a vCPU nor a device, to be stopped and reset |
//! | `outcome.rs` | how a machine ends, and the exit status for it |
//! | `simulated.rs` | whole machines on a seeded scheduler: a test |
//! | `chipset.rs` | which devices there are, where, and what they are connected to |
//! | `dispatch.rs` | how vCPUs and the event loop reach the devices: actors, or a baseline |
//! | `virtio.rs` | virtio devices: their places, notifications and queues |
//! | `msi.rs` | interrupts by message, and doorbells that move |
//! | `vm.rs` | the KVM side: memory slots, interrupt controllers, vCPUs before they run |
//! | `interpreter.rs` | whether KVM interprets the guest's kernel mode, in short |
//! | `memory.rs` | guest memory |
//! | `cpuid.rs` | what a vCPU's CPUID says |

mod actor;
pub mod chipset;
pub mod conductor;
pub mod cpuid;
pub mod dispatch;
pub mod holds;
mod interpreter;
pub mod memory;
mod messenger;
pub mod msi;
pub mod outcome;
pub mod platform;
pub mod request;
#[cfg(all(test, not(loom)))]
mod simulated;
pub mod state;
pub mod supervisor;
pub mod virtio;
pub mod vm;

use crate::actors::Obituary;
use crate::boot::EntryPoint;
use crate::devices::MachineRequest;
use crate::host::events::HostEvent;
use crate::vcpu::VcpuNews;
use supervisor::StartError;

/// What the machine actor receives.
#[derive(Debug)]
pub enum MachineMessage {
    /// From a vCPU.
    Vcpu(VcpuNews),
    /// From a device, for its guest.
    Device(MachineRequest),
    /// A device's actor died.
    Died(Obituary),
    /// A device has handled a lifecycle message: look at the counts.
    DeviceAnswered,
    /// From the event loop.
    Host(HostEvent),
    /// From whoever controls the machine.
    Request(request::Request),
    /// The guest was loaded anew, or could not be.
    Reloaded(Reloaded),
}

/// What comes back from the thread that loads the guest anew.
pub struct Reloaded {
    platform: Box<dyn platform::Platform>,
    entry: Result<Option<EntryPoint>, StartError>,
}

impl std::fmt::Debug for Reloaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.entry.fmt(f)
    }
}
