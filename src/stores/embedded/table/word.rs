//! Words of shared memory: the only way in which this store reads or changes its file.
//!
//! Other processes change the same memory at any moment, and a process may be killed between any two of its stores. So
//! shared memory is never accessed as plain data, but only as atomics, each always with the same width. A struct in it
//! consists of atomics only.
//!
//! Order matters in two ways. Between threads, the mutex of a shard and the sequentially consistent operations below
//! establish it. For a thread that is killed, *program order* is enough: it dies between two instructions, all of those
//! before take effect and none after. So only the compiler must be kept from moving stores, which [`Word32::store`]
//! does.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64, compiler_fence};

#[cfg(test)]
pub mod hook;

#[cfg(not(test))]
mod hook {
    #[inline(always)]
    pub fn stored() {}
}

/// Four bytes of shared memory.
#[repr(transparent)]
pub struct Word32(AtomicU32);

/// Eight bytes of shared memory.
#[repr(transparent)]
pub struct Word64(AtomicU64);

impl Word32 {
    /// For words that only the owner of a mutex changes.
    #[inline]
    pub fn load(&self) -> u32 {
        self.0.load(Relaxed)
    }

    /// For words that are changed without a mutex.
    #[inline]
    pub fn load_in_order(&self) -> u32 {
        self.0.load(SeqCst)
    }

    /// Stores in program order: a thread that finds the memory as a killed thread left it sees this store only together
    /// with all earlier ones.
    #[inline]
    pub fn store(&self, value: u32) {
        compiler_fence(SeqCst);
        self.0.store(value, Relaxed);
        compiler_fence(SeqCst);
        hook::stored();
    }

    /// Changes the word if it is as expected.
    #[inline]
    pub fn exchange(&self, expected: u32, value: u32) -> Result<(), u32> {
        let done = self.0.compare_exchange(expected, value, SeqCst, SeqCst);
        if done.is_ok() {
            hook::stored();
        }
        done.map(drop)
    }

    pub fn fetch_add(&self, value: u32) -> u32 {
        let before = self.0.fetch_add(value, SeqCst);
        hook::stored();
        before
    }

    pub fn fetch_or(&self, bits: u32) -> u32 {
        let before = self.0.fetch_or(bits, SeqCst);
        hook::stored();
        before
    }

    pub fn fetch_and(&self, bits: u32) -> u32 {
        let before = self.0.fetch_and(bits, SeqCst);
        hook::stored();
        before
    }

    /// The address, for the kernel's futex calls.
    pub fn address(&self) -> *const AtomicU32 {
        &raw const self.0
    }
}

impl Word64 {
    #[inline]
    pub fn load(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Stores in program order, as [`Word32::store`] does.
    #[inline]
    pub fn store(&self, value: u64) {
        compiler_fence(SeqCst);
        self.fill(value);
        compiler_fence(SeqCst);
    }

    /// Stores in any order relative to other calls of this: for cells to which no link leads yet.
    #[inline]
    pub fn fill(&self, value: u64) {
        self.0.store(value, Relaxed);
        hook::stored();
    }
}
