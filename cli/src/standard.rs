//! Standard input, output and error, one or more of which may be closed when we are started.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

/// A bit for each that was closed.
static CLOSED: AtomicU8 = AtomicU8::new(0);

/// Opens /dev/null for those that are closed, so that nothing else gets their numbers. To be called before
/// anything is opened.
pub fn fill() -> io::Result<()> {
    for descriptor in 0..3 {
        // SAFETY: a question about a descriptor; a path that is a string.
        unsafe {
            if libc::fcntl(descriptor, libc::F_GETFD) != -1 {
                continue;
            }
            CLOSED.fetch_or(1 << descriptor, Ordering::Relaxed);
            // The lowest number that is free: the lower ones were filled before.
            if libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) != descriptor {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
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
