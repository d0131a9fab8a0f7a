//! For tests: a fork in a signal handler.

use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, Ordering};
use std::{mem, ptr};

/// The results of `fork` in the handlers, by signal. The highest signal on Linux is 64.
static CHILDREN: [AtomicI32; 65] = [const { AtomicI32::new(-1) }; 65];

extern "C" fn fork_in_handler(signal: c_int) {
    // SAFETY: the child makes a few calls and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: ends the child, should it hang.
        unsafe { libc::alarm(30) };
    }
    CHILDREN[signal as usize].store(child, Ordering::SeqCst);
}

/// Makes this process fork when it handles the signal. The value returned is -1 before that, and then the result of
/// `fork`, which is 0 in the child.
pub fn fork_at(signal: c_int) -> &'static AtomicI32 {
    // SAFETY: the handler forks, which is what is tried by it.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = fork_in_handler as *const () as usize;
        assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
    }
    &CHILDREN[signal as usize]
}
