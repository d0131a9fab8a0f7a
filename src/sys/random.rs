//! Randomness, from the kernel.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};

use super::process;
use crate::token::{HoldId, ObjectId};

impl HoldId {
    /// A name for a store of this machine: unique, but not secret. A thread reads random bits once, and then counts.
    #[inline]
    pub fn local() -> HoldId {
        NAMES.with(Names::next)
    }

    /// A name from new random bits, for a store that machines share: two machines that were cloned from one snapshot
    /// have the same earlier random bits, and would take each other's hold for their own (R3).
    pub fn random() -> HoldId {
        HoldId(random())
    }
}

impl ObjectId {
    pub fn random() -> ObjectId {
        ObjectId(u64::from_le_bytes(random()))
    }
}

/// The names that a thread gives: 64 random bits of this thread in this process, 32 that count, and 32 for the attempts
/// of the hold.
struct Names {
    /// The generation in which `thread` was read; 0 before.
    generation: Cell<u64>,
    thread: Cell<u64>,
    given: AtomicU32,
}

thread_local! {
    /// It has no destructor, so it can be used until the end of the thread.
    static NAMES: Names =
        const { Names { generation: Cell::new(0), thread: Cell::new(0), given: AtomicU32::new(0) } };
}

impl Names {
    #[inline]
    fn next(&self) -> HoldId {
        let generation = process::generation();
        // Atomic, since a signal handler may interrupt this and request a name too.
        let given = self.given.fetch_add(1, Ordering::Relaxed);
        if self.generation.get() != generation || given == u32::MAX {
            self.draw(generation);
        }
        HoldId((u128::from(self.thread.get()) << 64 | u128::from(given) << 32).to_be_bytes())
    }

    #[cold]
    fn draw(&self, generation: u64) {
        self.thread.set(u64::from_le_bytes(random()));
        self.generation.set(generation);
    }
}

/// New random bytes from the kernel.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives randomness (getrandom, or /dev/urandom)");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_is_given_twice() {
        let names = |count: usize| (0..count).map(|_| HoldId::local()).collect::<Vec<_>>();
        let mut all = names(10_000);
        NAMES.with(|names| names.given.store(u32::MAX - 100, Ordering::Relaxed));
        all.extend(names(10_000));
        for thread in [(); 3].map(|()| std::thread::spawn(move || names(10_000))) {
            all.extend(thread.join().unwrap());
        }
        let distinct: std::collections::HashSet<[u8; 16]> = all.iter().map(|name| name.0).collect();
        assert_eq!(distinct.len(), all.len());
        // The attempts of a hold have the numbers that follow its name.
        assert!(all.iter().all(|name| name.0[12..] == [0; 4]));
    }
}
