//! The primitives that the protocols are written in: the real ones, or loom's, which explore every interleaving
//! and every outcome that the memory model allows (`--cfg loom`).

#[cfg(not(loom))]
pub(crate) use real::*;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
// Not loom's, which cannot hold a `dyn Job`; what it counts is not part of any protocol here.
pub(crate) use std::sync::Arc;

#[cfg(loom)]
pub(crate) use loom::{
    cell::UnsafeCell,
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

#[cfg(not(loom))]
mod real {
    pub(crate) use std::hint::spin_loop;

    /// `std`'s cell with loom's interface, so that loom can check that every access is exclusive.
    pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(crate) const fn new(value: T) -> Self {
            UnsafeCell(std::cell::UnsafeCell::new(value))
        }

        #[inline(always)]
        pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }
}
