//! A timer on the clock of leases.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nblock::clock::Boottime;

/// A descriptor that is readable once a moment on `CLOCK_BOOTTIME` has passed.
///
/// The timeouts of `poll` stand still while the machine sleeps; a lease does not.
pub struct Timer(OwnedFd);

impl Timer {
    pub fn new() -> io::Result<Timer> {
        // SAFETY: makes a descriptor, which nobody else has.
        let descriptor = unsafe { libc::timerfd_create(libc::CLOCK_BOOTTIME, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        Ok(Timer(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Sets it to another moment; it is not readable before that. `NEVER` stops it.
    pub fn set(&self, at: Boottime) {
        let nanos = if at == Boottime::NEVER { 0 } else { at.as_nanos().max(1) };
        // SAFETY: itimerspec is plain integers; the descriptor is a timer of ours.
        let status = unsafe {
            let mut timer: libc::itimerspec = mem::zeroed();
            timer.it_value.tv_sec = (nanos / 1_000_000_000) as i64;
            timer.it_value.tv_nsec = (nanos % 1_000_000_000) as i64;
            libc::timerfd_settime(self.0.as_raw_fd(), libc::TFD_TIMER_ABSTIME, &timer, ptr::null_mut())
        };
        debug_assert_eq!(status, 0, "{}", io::Error::last_os_error());
    }

    /// Whether its moment has come since it was last set. Says so once.
    pub fn fired(&self) -> bool {
        let mut count = 0u64;
        // SAFETY: reads eight bytes into as many.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) == 8 }
    }

    pub fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
