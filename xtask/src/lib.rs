//! What both sides of the emulated host share: the developer's tool (`cargo xtask`) outside, and the agent that is
//! process 1 inside.

pub mod cpio;
pub mod figures;
pub mod protocol;
pub mod scenario;
pub mod symbols;
