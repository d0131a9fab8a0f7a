//! The guard: a process that kills the command and its children when nobody else can any more.
//!
//! It is a child of ours that does nothing but wait: for the end of a pipe whose other end only we
//! have, which comes when we are gone, however that was; and for a timer, which we set to the moment at
//! which the command must be killed, and move with every renewal. So the command is gone in time even
//! where we were killed, or are stopped.
//!
//! What it kills is *its own* process group: we put it into the command's, before the command runs. A
//! group that has a member keeps its number, so the guard cannot ever kill another group that got the
//! number later; and no message can be too late. Before that it belongs to our group, and kills nothing.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use libc::pid_t;
use nblock::clock::Boottime;

use super::timer::Timer;

pub struct Guard {
    pub pid: pid_t,
    /// While this is open, we live.
    _living: OwnedFd,
    timer: Timer,
}

impl Guard {
    /// Starts a guard that guards nothing yet. All signals that it is to survive must be blocked.
    pub fn start() -> io::Result<Guard> {
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
        // SAFETY: the child makes system calls only, and never returns: that is allowed whatever threads
        // there are, and there are none but where a guard has to be replaced.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => stand_guard(home, watched.as_raw_fd(), timer.descriptor()),
            pid => Ok(Guard { pid, _living: living, timer }),
        }
    }

    /// Puts the guard into the group of the command, which it guards from then on.
    pub fn protect(&self, group: pid_t) -> io::Result<()> {
        // SAFETY: a system call without pointers. Allowed for a child of ours that has not called exec.
        match unsafe { libc::setpgid(self.pid, group) } {
            0 => Ok(()),
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

/// The guard's whole life: it kills its group, unless that is `home`. System calls only.
fn stand_guard(home: pid_t, watched: RawFd, timer: RawFd) -> ! {
    const WATCHED: RawFd = 0;
    const TIMER: RawFd = 1;
    // SAFETY: system calls on descriptors and plain integers of this process, which has one thread.
    unsafe {
        let everything: u64 = u64::MAX;
        // Nothing but SIGKILL and SIGSTOP reaches it: it gets what the command's group gets.
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const everything, 0usize, size_of::<u64>());
        libc::prctl(libc::PR_SET_NAME, c"nblock-guard".as_ptr());
        // Standard input, output and error too: whoever reads what the command writes must see its end.
        // Rust's start-up saw to it that these two are taken: ours have higher numbers, and none is made here.
        if libc::dup2(watched, WATCHED) == -1 || libc::dup2(timer, TIMER) == -1 {
            // Found gone, and replaced.
            libc::_exit(1);
        }
        close_from(2);
        let mut polled = [
            libc::pollfd { fd: WATCHED, events: 0, revents: 0 },
            libc::pollfd { fd: TIMER, events: libc::POLLIN, revents: 0 },
        ];
        while libc::poll(polled.as_mut_ptr(), 2, -1) <= 0 {}
        if libc::getpgrp() != home {
            libc::kill(0, libc::SIGKILL);
        }
        libc::_exit(0)
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
