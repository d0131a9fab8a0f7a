//! The terminal, which belongs to one process group at a time.

use std::fs::{File, OpenOptions};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};

use libc::pid_t;

/// The controlling terminal, where there is one.
pub struct Terminal {
    tty: Option<File>,
    /// Whether the command wants it: it reads from it, or has asked for it.
    pub wanted: bool,
    lent: bool,
}

impl Terminal {
    pub fn open() -> Terminal {
        // Opening fails where there is no controlling terminal.
        let tty = OpenOptions::new().read(true).write(true).open("/dev/tty").ok();
        // In a pipeline, what reads from us (a pager) may need the terminal itself: then the command
        // gets it when it asks for it.
        // SAFETY: a question about a descriptor.
        let wanted = tty.is_some() && unsafe { libc::isatty(libc::STDIN_FILENO) } == 1 && !is_pipe(libc::STDOUT_FILENO);
        Terminal { tty, wanted, lent: false }
    }

    /// Whether our group has the terminal.
    pub fn is_ours(&self) -> bool {
        // SAFETY: system calls without pointers.
        self.tty.as_ref().is_some_and(|tty| unsafe { libc::tcgetpgrp(tty.as_raw_fd()) == libc::getpgrp() })
    }

    /// Whether the command's group has it, from us.
    pub fn is_lent(&self) -> bool {
        self.lent
    }

    /// The terminal, if it is wanted and ours to give.
    pub fn to_lend(&self) -> Option<RawFd> {
        let tty = self.tty.as_ref().filter(|_| self.wanted && self.is_ours());
        tty.map(AsRawFd::as_raw_fd)
    }

    /// Gives it to a group, if it is wanted and ours to give.
    pub fn lend(&mut self, group: pid_t) {
        if let Some(tty) = self.to_lend() {
            // SAFETY: a system call without pointers; SIGTTOU is blocked.
            self.lent = unsafe { libc::tcsetpgrp(tty, group) } == 0;
        }
    }

    /// The command's group has taken it by itself, or not.
    pub fn was_lent(&mut self, lent: bool) {
        self.lent = lent;
    }

    /// Takes it back if it was lent.
    pub fn take_back(&mut self) {
        if let Some(tty) = &self.tty
            && mem::take(&mut self.lent)
        {
            // SAFETY: as above.
            unsafe { libc::tcsetpgrp(tty.as_raw_fd(), libc::getpgrp()) };
        }
    }
}

fn is_pipe(descriptor: RawFd) -> bool {
    // SAFETY: the kernel fills in one stat.
    unsafe {
        let mut stat: libc::stat = mem::zeroed();
        libc::fstat(descriptor, &mut stat) == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFIFO
    }
}
