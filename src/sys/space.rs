//! Allocating space for files before it is used: a full disk is then an error, and never a signal.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Checks that the process may have a file of this length. Extending a file beyond the limit would cause a SIGXFSZ,
/// which ends the program.
pub fn may_reach(length: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one rlimit.
    unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) };
    if length > limit.rlim_cur { Err(io::Error::from_raw_os_error(libc::EFBIG)) } else { Ok(()) }
}

/// Extends the file and allocates its blocks, so that writing to a mapping of it cannot fail.
pub fn allocate(file: &File, from: u64, to: u64) -> io::Result<()> {
    may_reach(to)?;
    loop {
        // SAFETY: a call on an open descriptor, without pointers.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), from as i64, (to - from) as i64) } {
            0 => return Ok(()),
            libc::EINTR => {}
            status => return Err(io::Error::from_raw_os_error(status)),
        }
    }
}
