//! Placeholder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    Linux64 { rip: u64, zero_page: u64 },
    Pvh { eip: u32, start_info: u32 },
}
