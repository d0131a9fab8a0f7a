//! The signals that `nblock run` passes on, taken from a descriptor instead of by handlers.

use std::cell::Cell;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::{
    SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2, SIGWINCH, c_int,
    pid_t, sigset_t,
};

/// What is passed on, or acted upon.
const TAKEN: [c_int; 10] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGCONT, SIGWINCH, SIGTSTP, SIGCHLD];

/// The signals of this process, blocked, and read from a descriptor.
///
/// What our parent process ignores (`nohup`, a shell's background jobs) stays ignored, by us and by
/// the command.
pub struct Signals {
    descriptor: OwnedFd,
    before: sigset_t,
    /// Whether the command is stopped when it reads from a terminal that is not its own, even where we
    /// were started with that signal ignored.
    asks_for_terminal: Cell<bool>,
    /// Children that are waited for elsewhere.
    ours: Cell<[pid_t; 2]>,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
    /// Something happened to a child.
    Child,
    /// Stop, as by ^Z.
    Stop,
    /// Go on after a stop.
    Continue,
    /// The terminal has another size.
    Resized,
    /// HUP, INT, QUIT or TERM.
    End(c_int),
    /// USR1 or USR2.
    User(c_int),
}

impl Signals {
    /// Blocks the signals and opens the descriptor. To be called before there are threads.
    pub fn take() -> io::Result<Signals> {
        // SAFETY: sets are initialised before they are read; dispositions are plain integers to us.
        unsafe {
            // Ignored, it would have the kernel reap our children unseen.
            libc::signal(SIGCHLD, libc::SIG_DFL);
            let mut read = empty();
            let mut blocked = empty();
            for signal in TAKEN {
                let mut action = MaybeUninit::<libc::sigaction>::zeroed();
                libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
                if action.assume_init().sa_sigaction != libc::SIG_IGN {
                    libc::sigaddset(&mut read, signal);
                    libc::sigaddset(&mut blocked, signal);
                }
            }
            // Handing over the terminal from the background must not stop us.
            libc::sigaddset(&mut blocked, SIGTTIN);
            libc::sigaddset(&mut blocked, SIGTTOU);
            let descriptor = libc::signalfd(-1, &read, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if descriptor < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut before = empty();
            libc::sigprocmask(libc::SIG_BLOCK, &blocked, &mut before);
            Ok(Signals {
                descriptor: OwnedFd::from_raw_fd(descriptor),
                before,
                asks_for_terminal: Cell::new(false),
                ours: Cell::new([0; 2]),
            })
        }
    }

    /// Has the command stopped when it reads from the terminal without having it, so that it can be given
    /// the terminal. Shells ignore SIGTTIN in a command substitution, which shares their process group:
    /// from another group, such as the command's, reading would fail.
    pub fn let_the_command_ask_for_the_terminal(&self) {
        self.asks_for_terminal.set(true);
    }

    /// The guard, and the command or 0: they are waited for elsewhere.
    pub fn set_children(&self, ours: [pid_t; 2]) {
        self.ours.set(ours);
    }

    /// Waits for children that nobody else waits for, as an init does: as PID 1 of a container we are the
    /// parent of every process that has lost its own. Does not wait for any of them to end.
    pub fn reap_orphans(&self) {
        loop {
            // SAFETY: the kernel fills in one siginfo, or leaves it zeroed.
            let pid = unsafe {
                let mut info: libc::siginfo_t = mem::zeroed();
                let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
                if libc::waitid(libc::P_ALL, 0, &mut info, flags) != 0 { 0 } else { info.si_pid() }
            };
            // One of ours that has ended may stand before others: there is another signal for it to come.
            if pid == 0 || self.ours.get().contains(&pid) {
                return;
            }
            // SAFETY: a system call that writes nothing.
            unsafe { libc::waitpid(pid, ptr::null_mut(), libc::WNOHANG) };
        }
    }

    pub fn descriptor(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }

    /// The next signal that came, if one did. Does not wait.
    pub fn next(&self) -> Option<Arrived> {
        // SAFETY: plain integers, filled in by the kernel.
        let info = unsafe {
            let mut info: libc::signalfd_siginfo = mem::zeroed();
            let size = mem::size_of_val(&info);
            let read = libc::read(self.descriptor(), (&raw mut info).cast(), size);
            (read == size as isize).then_some(info)
        }?;
        Some(match info.ssi_signo as c_int {
            SIGCHLD => Arrived::Child,
            SIGTSTP => Arrived::Stop,
            SIGCONT => Arrived::Continue,
            SIGWINCH => Arrived::Resized,
            signal @ (SIGUSR1 | SIGUSR2) => Arrived::User(signal),
            signal => Arrived::End(signal),
        })
    }

    /// What the command gets: the mask of our parent process, and SIGPIPE as it was before Rust's
    /// start-up ignored it. Async-signal-safe.
    pub fn restore_in_child(&self) {
        // SAFETY: a mask that the kernel gave us, and a default action.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            if self.asks_for_terminal.get() {
                libc::signal(SIGTTIN, libc::SIG_DFL);
            }
            libc::sigprocmask(libc::SIG_SETMASK, &self.before, ptr::null_mut());
        }
    }
}

/// Stops this process group, and so this process, as ^Z would; returns once it was continued.
///
/// The whole group: a script that runs us must stop as well, or nobody could continue us. A group
/// that nobody could continue is not stopped by the kernel, and this returns `false` at once.
pub fn stop_with_group() -> bool {
    // SAFETY: sets are initialised before they are read.
    unsafe {
        let (mut stop, mut pending) = (empty(), empty());
        libc::sigaddset(&mut stop, SIGTSTP);
        libc::kill(0, SIGTSTP);
        // Delivered here.
        libc::sigprocmask(libc::SIG_UNBLOCK, &stop, ptr::null_mut());
        libc::sigprocmask(libc::SIG_BLOCK, &stop, ptr::null_mut());
        libc::sigpending(&mut pending);
        libc::sigismember(&pending, SIGCONT) == 1
    }
}

/// Ends this process by a signal, as a shell's loop expects of a program that was interrupted.
pub fn die(signal: c_int) -> ! {
    // SAFETY: as above; this process is about to end.
    unsafe {
        // The command's core was written, if any: ours says nothing.
        libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 });
        let mut set = empty();
        libc::sigaddset(&mut set, signal);
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
        libc::sigprocmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
        libc::_exit(128 + signal)
    }
}

/// Ends this process group by a signal, and so this process, as if it had been typed at the terminal.
pub fn die_with_group(signal: c_int) -> ! {
    // SAFETY: a system call without pointers.
    unsafe { libc::kill(0, signal) };
    die(signal)
}

fn empty() -> sigset_t {
    // SAFETY: sigemptyset initialises the set.
    unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}
