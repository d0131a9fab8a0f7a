//! The guard: a process that kills the command and its children when nobody else can any more.
//!
//! It is a child of ours that does nothing but wait: for the end of a pipe whose other end only we
//! have, which comes when we are gone, however that was; and for a timer, which we set to the moment at
//! which the command must be killed, and move with every renewal. So the command is gone in time even
//! where we were killed, or are stopped.
//!
//! What it kills is *its own* process group: the command's, which it is born into. A group that has a
//! member keeps its number, so the guard cannot ever kill another group that got the number later; and no
//! message can be too late. One that replaces a guard is born into our group, and kills nothing until we
//! have put it into the command's.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::{io, ptr};

use libc::{c_int, pid_t};
use nblock::clock::Boottime;

use super::stack::Stack;
use super::timer::Timer;

/// It makes a few system calls.
const GUARDS_STACK: usize = 8 << 10;

/// What a guard waits for, and what it has to live: made before it.
pub struct Post {
    watched: OwnedFd,
    /// While this is open, we live.
    living: OwnedFd,
    timer: Timer,
    /// The group that it must not kill: ours.
    home: pid_t,
    stack: Stack,
}

pub struct Guard {
    pub pid: pid_t,
    _living: OwnedFd,
    timer: Timer,
}

impl Post {
    pub fn new() -> io::Result<Post> {
        let timer = Timer::new()?;
        let mut ends = [0; 2];
        // SAFETY: the kernel writes two descriptors.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else's.
        let (watched, living) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
        // Asked before there is a guard: it may be in the command's group by the time it asks.
        // SAFETY: a system call without pointers.
        let home = unsafe { libc::getpgrp() };
        Ok(Post { watched, living, timer, home, stack: Stack::new(GUARDS_STACK) })
    }

    /// Starts the guard, in the group of the calling process, as a child of it or as its sibling (`CLONE_PARENT`).
    /// Answers its number; -1, and `errno`, if it could not be started. All signals that it is to survive must be blocked.
    /// Async-signal-safe.
    pub fn start_guard(&self, parent: c_int) -> pid_t {
        extern "C" fn guard(post: *mut c_void) -> c_int {
            // SAFETY: the post, of which the guard has a copy.
            unsafe { &*post.cast::<Post>() }.stand()
        }
        // SAFETY: a process with a copy of this memory, and so of the stack, that makes system calls only: that is allowed
        // whatever threads there are.
        unsafe { libc::clone(guard, self.stack.top(), parent | libc::SIGCHLD, ptr::from_ref(self).cast_mut().cast()) }
    }

    /// The guard that was started here.
    pub fn taken_by(self, pid: pid_t) -> Guard {
        Guard { pid, _living: self.living, timer: self.timer }
    }

    /// When the group is to be killed: see [`Guard::set_deadline`].
    pub fn set_deadline(&self, at: Boottime) {
        self.timer.set(at);
    }
}

impl Guard {
    /// Starts a guard in the place of one that is gone, in the group of the command.
    pub fn replace(group: pid_t) -> io::Result<Guard> {
        let post = Post::new()?;
        let pid = post.start_guard(0);
        if pid == -1 {
            return Err(io::Error::last_os_error());
        }
        let guard = post.taken_by(pid);
        // SAFETY: a system call without pointers. Allowed for a child of ours that has not called exec.
        match unsafe { libc::setpgid(pid, group) } {
            0 => Ok(guard),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// When the group is to be killed, unless this is called again before. `NEVER`: not while we live.
    pub fn set_deadline(&self, at: Boottime) {
        self.timer.set(at);
    }

    /// Whether the last deadline has passed.
    pub fn fired(&self) -> bool {
        self.timer.fired()
    }

    /// Ends it. What is left of the group is nobody's business any more.
    pub fn dismiss(&self) {
        // SAFETY: a child that was not waited for: the number is still its own.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }
}

impl Post {
    /// The guard's whole life: it kills its group, unless that is ours. System calls only.
    fn stand(&self) -> ! {
        const WATCHED: RawFd = 0;
        const TIMER: RawFd = 1;
        // SAFETY: system calls on descriptors and plain integers of this process, which has one thread.
        unsafe {
            let everything: u64 = u64::MAX;
            // Nothing but SIGKILL and SIGSTOP reaches it: it gets what the command's group gets.
            libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const everything, 0usize, size_of::<u64>());
            libc::prctl(libc::PR_SET_NAME, c"nblock-guard".as_ptr());
            // Standard input, output and error too: a reader of the command's output must see its end.
            // Rust's start-up saw to it that these two are taken: ours have higher numbers, and none is made here.
            if libc::dup2(self.watched.as_raw_fd(), WATCHED) == -1 || libc::dup2(self.timer.descriptor(), TIMER) == -1 {
                // Found gone, and replaced.
                libc::_exit(1);
            }
            close_from(2);
            let mut polled = [
                libc::pollfd { fd: WATCHED, events: 0, revents: 0 },
                libc::pollfd { fd: TIMER, events: libc::POLLIN, revents: 0 },
            ];
            while libc::poll(polled.as_mut_ptr(), 2, -1) <= 0 {}
            if libc::getpgrp() != self.home {
                libc::kill(0, libc::SIGKILL);
            }
            libc::_exit(0)
        }
    }
}

/// Closes every descriptor from `first` on. System calls only.
unsafe fn close_from(first: RawFd) {
    // SAFETY: the caller has no use for them any more.
    unsafe {
        // Since Linux 5.9.
        if libc::syscall(libc::SYS_close_range, first as libc::c_uint, libc::c_uint::MAX, 0) == 0 {
            return;
        }
        let mut limit = libc::rlimit { rlim_cur: 1024, rlim_max: 1024 };
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        for descriptor in first..limit.rlim_cur.min(1 << 20) as RawFd {
            libc::close(descriptor);
        }
    }
}
