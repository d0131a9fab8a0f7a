//! How long to wait before an operation that failed is repeated.

use std::time::Duration;

/// Pauses that grow with each failure, so that a server that restarts is not flooded.
#[derive(Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The pause after the first failure; it doubles with each.
    const FIRST: Duration = Duration::from_millis(25);
    /// The longest pause, and so the longest delay after the server is back.
    const LONGEST: Duration = Duration::from_secs(1);

    /// The backoff after this many failures in a row.
    pub fn after(failures: u32) -> Backoff {
        Backoff { failures }
    }

    /// Counts one more failure. Returns how long to wait.
    pub fn failed(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.pause()
    }

    /// How long to wait after the last failure; zero before the first.
    pub fn pause(&self) -> Duration {
        let Some(doublings) = self.failures.checked_sub(1) else { return Duration::ZERO };
        let whole = (Backoff::FIRST * (1 << doublings.min(6))).min(Backoff::LONGEST);
        // Random, so that programs that lost the same server do not return all at once.
        let part = u32::from(u8::from_le_bytes(crate::sys::random::random::<1>()));
        whole / 2 + whole / 2 * part / 256
    }
}
