//! Whether somebody in another process may be waiting (R11). Most servers do not say; what was seen of others does.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Boottime;
use crate::key::KeyHash;

/// How long others are expected to come again after one of them was seen to have the lock.
const EXPECTED: Duration = Duration::from_secs(1);

/// How often others are let go first although none was seen. Who lets others go first waits for about a
/// millisecond (R11): a loop that locks and unlocks without a pause spends a hundredth of its time on it, and
/// starves a newcomer for about so long.
const NOW_AND_THEN: Duration = Duration::from_millis(100);

/// Slots by key hash. Two keys in one cost a waiter a millisecond, and nothing else.
pub struct Contention([Slot; 256]);

/// Moments, in nanoseconds of boot time.
#[derive(Default)]
struct Slot {
    expected_until: AtomicU64,
    not_again_before: AtomicU64,
}

impl Default for Contention {
    fn default() -> Contention {
        Contention(std::array::from_fn(|_| Slot::default()))
    }
}

impl Contention {
    /// Another process was seen to have the lock.
    pub fn seen(&self, hash: KeyHash) {
        self.slot(hash).expected_until.store((Boottime::now() + EXPECTED).as_nanos(), Ordering::Relaxed);
    }

    /// Asked at each unlock: whether to let others go first.
    pub fn likely(&self, hash: KeyHash) -> bool {
        let slot = self.slot(hash);
        let now = Boottime::now();
        if now.as_nanos() < slot.expected_until.load(Ordering::Relaxed) {
            return true;
        }
        let due = now.as_nanos() >= slot.not_again_before.load(Ordering::Relaxed);
        if due {
            slot.not_again_before.store((now + NOW_AND_THEN).as_nanos(), Ordering::Relaxed);
        }
        due
    }

    fn slot(&self, hash: KeyHash) -> &Slot {
        &self.0[(hash.bits() % self.0.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_let_go_first_when_seen_and_now_and_then() {
        let contention = Contention::default();
        let (hash, other) = (KeyHash([1; 20]), KeyHash([2; 20]));
        let began = Boottime::now();
        let mut times = 0;
        for _ in 0..1000 {
            times += u32::from(contention.likely(hash));
        }
        let passed = Boottime::now().since(began).as_millis() as u32;
        assert!((1..=2 + passed / 100).contains(&times), "{times} times within {passed} ms");
        contention.seen(hash);
        assert!((0..10).all(|_| contention.likely(hash)) || (began + EXPECTED).has_passed());
        assert!(contention.likely(other), "another key is another matter");
    }
}
