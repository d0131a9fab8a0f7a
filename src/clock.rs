//! The clock that leases are measured with.

use std::ops::{Add, Sub};
use std::time::Duration;

/// A time on `CLOCK_BOOTTIME`: nanoseconds since this machine booted, including time in which it was suspended.
///
/// A lease must also end while a laptop is suspended. The monotonic clock stands still then, and is not used for
/// leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Boottime(u64);

impl Boottime {
    /// Before every other moment.
    pub const ZERO: Boottime = Boottime(0);
    /// After every other moment.
    pub const NEVER: Boottime = Boottime(u64::MAX);

    /// This moment.
    #[inline]
    pub fn now() -> Boottime {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes one timespec; CLOCK_BOOTTIME is in every kernel since Linux 2.6.39.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
        Boottime(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    /// The moment that is this many nanoseconds after boot.
    pub const fn from_nanos(nanos: u64) -> Boottime {
        Boottime(nanos)
    }

    /// Nanoseconds since boot.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero when it is not after.
    pub fn since(self, earlier: Boottime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Whether this moment is now, or earlier.
    #[inline]
    pub fn has_passed(self) -> bool {
        self <= Boottime::now()
    }
}

impl Add<Duration> for Boottime {
    type Output = Boottime;

    fn add(self, length: Duration) -> Boottime {
        Boottime(self.0.saturating_add(nanos(length)))
    }
}

impl Sub<Duration> for Boottime {
    type Output = Boottime;

    fn sub(self, length: Duration) -> Boottime {
        Boottime(self.0.saturating_sub(nanos(length)))
    }
}

/// A duration in nanoseconds, limited to what fits.
#[inline]
pub fn nanos(length: Duration) -> u64 {
    length.as_secs().saturating_mul(1_000_000_000).saturating_add(u64::from(length.subsec_nanos()))
}

/// The monotonic clock at the kernel's last tick, in nanoseconds. A tick is 1 to 10 ms. Reading it costs a fifth of
/// reading the exact time: for work that is done from time to time.
#[inline]
pub fn tick() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec; CLOCK_MONOTONIC_COARSE is in every kernel since Linux 2.6.32.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// How long the machine has been suspended since it booted.
pub fn suspended() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    Boottime::now().since(Boottime(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64))
}

/// Milliseconds since 1970 on the wall clock: for people to read, never for decisions.
pub fn wall_millis() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
