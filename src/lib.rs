//! actor-vmm: a KVM virtual machine monitor made of actors.
//!
//! Where to look:
//!
//! * [`actors`]: the runtime. Typed addresses, mailboxes with a run token, placements, ranks, lifecycle.
//! * [`vcpu`]: the vCPU actors. Exits, routing, the kick, the KVM and the scripted backend.
//! * [`devices`]: the devices, each a pure state machine, and the one shell that makes an actor of any of them.
//! * [`pci`]: a bus. Configuration spaces, who answers where, MSI-X.
//! * [`virtio`]: disks and the like. Register sides are devices; each queue is an actor with a thread.
//! * [`baselines`]: the locks that the actors are compared with; the only place where lock types may be.
//! * [`bench`]: what the actors are worth against the baselines, measured.
//! * [`boot`]: from files to guest memory. Kernel formats, boot parameters, ACPI tables, memory map.
//! * [`machine`]: the supervisor. Guest memory, CPUID, wiring, the machine's states.
//! * [`host`]: the host's side. Console, terminal, signals, timers, log.
//! * [`guests`]: bare-metal guests carried in the binary: the demo and the test guests.
//! * [`cli`]: the command line.
//!
//! `design.md` has the topology, the ranks, the orderings and the decisions.

// What tests and fuzzing share is more than the latter needs.
#![cfg_attr(fuzzing, allow(dead_code))]

pub mod actors;
pub mod baselines;
pub mod bench;
pub mod boot;
pub mod cli;
pub mod clock;
pub mod control;
pub mod devices;
pub mod gdb;
pub mod guests;
pub mod host;
pub mod machine;
pub mod pci;
pub(crate) mod simulation;
pub mod thread;
pub mod vcpu;
pub mod virtio;
