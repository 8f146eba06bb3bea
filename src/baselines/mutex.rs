//! std's mutex and parking_lot's behind one name, without anything that costs.

use std::ops::DerefMut;

/// std's.
pub type Std<T> = std::sync::Mutex<T>;
/// parking_lot's.
pub type ParkingLot<T> = parking_lot::Mutex<T>;

/// A mutex.
pub trait Mutex<T>: Send + Sync + 'static {
    /// What is held.
    type Guard<'a>: DerefMut<Target = T>
    where
        Self: 'a;

    /// A mutex around a value.
    fn new(value: T) -> Self;

    /// Waits for it. A panic of an earlier holder is that one's business.
    fn lock(&self) -> Self::Guard<'_>;
}

impl<T: Send + 'static> Mutex<T> for std::sync::Mutex<T> {
    type Guard<'a> = std::sync::MutexGuard<'a, T>;

    fn new(value: T) -> Self {
        std::sync::Mutex::new(value)
    }

    #[inline]
    fn lock(&self) -> Self::Guard<'_> {
        std::sync::Mutex::lock(self).unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl<T: Send + 'static> Mutex<T> for parking_lot::Mutex<T> {
    type Guard<'a> = parking_lot::MutexGuard<'a, T>;

    fn new(value: T) -> Self {
        parking_lot::Mutex::new(value)
    }

    #[inline]
    fn lock(&self) -> Self::Guard<'_> {
        parking_lot::Mutex::lock(self)
    }
}
