//! Sleeping on a word of shared memory, and waking the threads that sleep there.

use std::io;
use std::ptr;
use std::time::Duration;

use super::word::Word32;

/// How a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The word was not as expected, or its sleepers were woken.
    Called,
    TimedOut,
    /// A signal handler has run.
    Interrupted,
}

/// Every bit of a bitset.
pub const ANY: u32 = u32::MAX;

/// Sleeps if the word is `expected`, until one of `bits` is woken, but not for longer than `left`.
pub fn sleep(word: &Word32, expected: u32, left: Duration, bits: u32) -> Woken {
    let until = moment(left);
    // SAFETY: the word is mapped while it is borrowed, and the time outlives the call.
    let status = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.address(),
            libc::FUTEX_WAIT_BITSET,
            expected,
            &raw const until,
            ptr::null::<u32>(),
            bits,
        )
    };
    if status == 0 {
        return Woken::Called;
    }
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::ETIMEDOUT) => Woken::TimedOut,
        Some(libc::EINTR) => Woken::Interrupted,
        _ => Woken::Called,
    }
}

/// Wakes up to `how_many` threads that sleep on the word with one of `bits`.
pub fn wake(word: &Word32, how_many: i32, bits: u32) {
    // SAFETY: the word is mapped while it is borrowed; the call only looks up the threads that sleep on it.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.address(),
            libc::FUTEX_WAKE_BITSET,
            how_many,
            ptr::null::<libc::timespec>(),
            ptr::null::<u32>(),
            bits,
        );
    }
}

/// The time after `left`, on the clock that futexes use.
fn moment(left: Duration) -> libc::timespec {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    let nanos = time.tv_nsec as u64 + u64::from(left.subsec_nanos());
    // Limited, so that the sum cannot overflow.
    let seconds = left.as_secs().min(1 << 40) + nanos / 1_000_000_000;
    libc::timespec { tv_sec: time.tv_sec + seconds as i64, tv_nsec: (nanos % 1_000_000_000) as i64 }
}
