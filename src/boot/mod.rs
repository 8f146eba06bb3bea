//! From files to guest memory: kernels, boot parameters, memory map, ACPI tables.

pub mod bzimage;
pub mod elf;
pub mod entry;
pub mod file;
pub mod kernel;
pub mod layout;
pub mod unpack;
mod xz;
