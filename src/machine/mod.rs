//! The machine: the supervisor actor and everything it puts together.
//!
//! | file | what |
//! |---|---|
//! | `supervisor.rs` | the machine actor: starts, watches and ends everything; owns the state |
//! | `state.rs` | the machine's states, as a pure state machine |
//! | `outcome.rs` | how a machine ends, and the exit status for it |
//! | `chipset.rs` | which devices there are, where, and what they are connected to |
//! | `dispatch.rs` | how vCPUs and the event loop reach the devices: actors, or a baseline |
//! | `vm.rs` | the KVM side: memory slots, interrupt controllers, vCPUs before they run |
//! | `memory.rs` | guest memory |
//! | `cpuid.rs` | what a vCPU's CPUID says |

pub mod chipset;
pub mod cpuid;
pub mod dispatch;
pub mod memory;
pub mod outcome;
pub mod state;
pub mod supervisor;
pub mod vm;

use crate::actors::Obituary;
use crate::devices::MachineRequest;
use crate::host::events::HostEvent;
use crate::vcpu::VcpuNews;

/// What the machine actor receives.
#[derive(Debug)]
pub enum MachineMessage {
    /// From a vCPU.
    Vcpu(VcpuNews),
    /// From a device, for its guest.
    Device(MachineRequest),
    /// A device's actor died.
    Died(Obituary),
    /// From the event loop.
    Host(HostEvent),
}
