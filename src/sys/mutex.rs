//! A mutex without poisoning.

use std::sync::{MutexGuard, PoisonError};

/// `std::sync::Mutex` without poisoning: a panic is reported where it happened, and what the mutex
/// guards here is never left half changed across a call that could panic.
#[derive(Debug, Default)]
pub struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub const fn new(value: T) -> Mutex<T> {
        Mutex(std::sync::Mutex::new(value))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does not lock: in a forked child, another thread of the parent may have had it locked, and it is never unlocked.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}
