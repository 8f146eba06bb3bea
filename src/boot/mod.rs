//! From files to guest memory: kernels, boot parameters, memory map, ACPI tables.

pub mod acpi;
pub mod bzimage;
pub mod cmdline;
pub mod elf;
pub mod entry;
pub mod file;
pub mod initrd;
pub mod kernel;
pub mod layout;
pub mod params;
pub mod pvh;
pub mod unpack;
mod xz;
