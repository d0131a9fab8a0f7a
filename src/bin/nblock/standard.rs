//! Which of standard input, output and error were closed when we were started. Rust's start-up opens
//! /dev/null in their place, so that what was written there would seem to be.

use std::sync::atomic::{AtomicU8, Ordering};

/// A bit for each.
static CLOSED: AtomicU8 = AtomicU8::new(0);

/// Every function of this section runs before Rust's own start-up.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    let closed = (0..3)
        // SAFETY: a question about a descriptor.
        .filter(|&descriptor| unsafe { libc::fcntl(descriptor, libc::F_GETFD) } == -1)
        .fold(0, |bits, descriptor| bits | 1 << descriptor);
    CLOSED.store(closed, Ordering::Relaxed);
}

pub fn output_was_closed() -> bool {
    CLOSED.load(Ordering::Relaxed) & 1 << libc::STDOUT_FILENO != 0
}

/// Closes them again, for the command, which is to find them as we were given them. Async-signal-safe.
pub fn close_again() {
    let closed = CLOSED.load(Ordering::Relaxed);
    for descriptor in (0..3).filter(|descriptor| closed & 1 << descriptor != 0) {
        // SAFETY: /dev/null, which nobody uses in this process any more.
        unsafe { libc::close(descriptor) };
    }
}
