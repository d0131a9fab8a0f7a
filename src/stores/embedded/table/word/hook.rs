//! A hook for tests: counts the stores to shared memory, and kills or stops the process after a chosen one.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};

static LEFT: AtomicU64 = AtomicU64::new(u64::MAX);
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Sends `signal` to this process after its store number `after`, counted from now. Only for a process with one thread
/// (a forked child).
pub fn arm(after: u64, signal: i32) {
    SIGNAL.store(signal, Relaxed);
    LEFT.store(after, Relaxed);
}

pub fn stored() {
    if LEFT.load(Relaxed) != u64::MAX && LEFT.fetch_sub(1, Relaxed) == 1 {
        LEFT.store(u64::MAX, Relaxed);
        // SAFETY: a signal to this thread, delivered before the call returns.
        unsafe {
            libc::raise(SIGNAL.load(Relaxed));
        }
    }
}

/// How many stores were made since `arm(after, ..)`.
pub fn made(after: u64) -> u64 {
    after - LEFT.load(Relaxed)
}
