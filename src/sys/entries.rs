//! A list that is consistent in a forked child, even if another thread was changing it during the fork.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Entries are added and never freed. An owner that does not need one any more marks it for reuse.
pub(crate) struct Entries<T: 'static> {
    newest: AtomicPtr<Entry<T>>,
}

struct Entry<T> {
    value: T,
    next: *const Entry<T>,
}

impl<T: Send + Sync> Entries<T> {
    pub const fn new() -> Entries<T> {
        Entries { newest: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Iterates from the newest entry on. May be called in a signal handler, and in a child that was just forked.
    pub fn iter(&self) -> impl Iterator<Item = &'static T> {
        // SAFETY: entries are never freed, and not changed once they are published.
        let entry = |at: *const Entry<T>| unsafe { at.as_ref() };
        std::iter::successors(entry(self.newest.load(Ordering::Acquire)), move |found| entry(found.next))
            .map(|found| &found.value)
    }

    pub fn add(&self, value: T) -> &'static T {
        let entry = Box::into_raw(Box::new(Entry { value, next: ptr::null() }));
        let mut newest = self.newest.load(Ordering::Acquire);
        loop {
            // SAFETY: it is not published yet.
            unsafe { (*entry).next = newest };
            match self.newest.compare_exchange(newest, entry, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: published, and never freed.
                Ok(_) => return unsafe { &(*entry).value },
                Err(now) => newest = now,
            }
        }
    }
}
