//! From files to guest memory: kernels, boot parameters, memory map, ACPI tables.

pub mod layout;
