//! How long to wait before what failed is tried again.

use std::time::Duration;

/// Growing pauses after what failed, so that a server that comes back is not flooded.
#[derive(Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The pause after the first failure; it doubles with each.
    const FIRST: Duration = Duration::from_millis(25);
    /// The longest, and so the most that is lost when a server is back.
    const LONGEST: Duration = Duration::from_secs(1);

    /// As after so many failures in a row.
    pub fn after(failures: u32) -> Backoff {
        Backoff { failures }
    }

    /// Notes one more failure: how long to wait now.
    pub fn failed(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.pause()
    }

    /// How long to wait after the last failure; not at all before the first.
    pub fn pause(&self) -> Duration {
        let Some(doublings) = self.failures.checked_sub(1) else { return Duration::ZERO };
        let whole = (Backoff::FIRST * (1 << doublings.min(6))).min(Backoff::LONGEST);
        // Programs that lost the same server do not come back in step.
        let part = u32::from(u8::from_le_bytes(crate::sys::random::random::<1>()));
        whole / 2 + whole / 2 * part / 256
    }
}
