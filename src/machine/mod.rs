//! The machine: guest memory and what the guest is told about its processors.

pub mod cpuid;
pub mod memory;
