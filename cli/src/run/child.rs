//! The command: a child in a process group of its own, guarded before it runs.
//!
//! Its process starts as with `vfork`: it shares our memory, and the thread that starts it stands still until the program
//! is loaded, or could not be. A copy of our memory would take longer to make than all that it does. The time that the
//! system takes to load the program counts for the lease: nothing is renewed by this thread meanwhile, and the guard has
//! its deadline.

use std::ffi::{CStr, CString, OsString, c_char, c_void};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStringExt as _;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use libc::{c_int, pid_t};

use super::guard::{Guard, Post};
use super::signals::Signals;
use super::stack::Stack;
use super::terminal::Terminal;

/// What to run, as `execvpe` takes it: made before the fork, after which nothing may be allocated.
pub struct Program {
    /// What the pointers point to.
    _texts: Vec<CString>,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
}

impl Program {
    /// A command and its arguments, in our environment with a few variables set.
    pub fn new(command: &[OsString], set: &[(&str, String)]) -> io::Result<Program> {
        let arguments: Vec<CString> = command.iter().map(|text| c_string(text.clone())).collect::<io::Result<_>>()?;
        let variables: Vec<CString> =
            set.iter().map(|(name, value)| c_string(format!("{name}={value}").into())).collect::<io::Result<_>>()?;
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let mut environment = inherited(set);
        environment.extend(pointers(&variables));
        environment.push(ptr::null());
        let mut to_run = pointers(&arguments);
        to_run.push(ptr::null());
        Ok(Program { arguments: to_run, environment, _texts: arguments.into_iter().chain(variables).collect() })
    }
}

/// Our environment as it was given, but for what is set otherwise. Nothing in this process changes it.
fn inherited(set: &[(&str, String)]) -> Vec<*const c_char> {
    unsafe extern "C" {
        static environ: *const *const c_char;
    }
    let mut inherited = Vec::new();
    // SAFETY: the C library's: strings, and a null pointer at the end; or null, of one that was cleared.
    unsafe {
        let mut next = environ;
        while !next.is_null() && !(*next).is_null() {
            let text = CStr::from_ptr(*next).to_bytes();
            let name = &text[..text.iter().position(|&byte| byte == b'=').unwrap_or(text.len())];
            if !set.iter().any(|(set, _)| set.as_bytes() == name) {
                inherited.push(*next);
            }
            next = next.add(1);
        }
    }
    inherited
}

fn c_string(text: OsString) -> io::Result<CString> {
    CString::new(text.into_vec()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

pub struct Child {
    /// Its number, and that of its group.
    pub pid: pid_t,
}

/// Why the command does not run.
pub enum NotStarted {
    /// There is no process for it.
    NoProcess(io::Error),
    NotGuarded(io::Error),
    /// The system cannot run it.
    NotRun(io::Error),
}

/// How the command has changed state since the last call.
pub enum Became {
    Ended(Ending),
    /// Stopped by this signal.
    Stopped(c_int),
}

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Exited(u8),
    Killed(c_int),
}

impl Child {
    /// Starts the command, guarded, with the terminal if it is to have that. No guard: the command was killed before.
    pub fn start(
        program: &Program,
        signals: &Signals,
        post: Post,
        terminal: &mut Terminal,
    ) -> Result<(Child, Option<Guard>), NotStarted> {
        // `execvpe` has a path on it; for a script that does not name its interpreter, also the arguments.
        let stack = Stack::new((32 << 10) + size_of_val(program.arguments.as_slice()));
        let start = Start {
            program,
            signals,
            post: &post,
            terminal: terminal.to_lend(),
            // SAFETY: a system call without pointers.
            parent: unsafe { libc::getpid() },
            guard: AtomicI32::new(0),
            lent: AtomicBool::new(false),
            error: AtomicI32::new(0),
        };
        extern "C" fn begin(start: *mut c_void) -> c_int {
            // SAFETY: what is given to `clone`, by a thread that waits.
            unsafe { &*start.cast::<Start>() }.become_command()
        }
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: the child has a stack of its own, makes async-signal-safe calls only, and never returns. What it uses
        // of this thread's is there, since the thread waits for it to be gone from this memory.
        let pid = unsafe { libc::clone(begin, stack.top(), flags, (&raw const start).cast_mut().cast()) };
        if pid == -1 {
            return Err(NotStarted::NoProcess(io::Error::last_os_error()));
        }
        terminal.was_lent(start.lent.into_inner());
        let (guard, error) = (start.guard.into_inner(), start.error.into_inner());
        let error = (error != 0).then(|| io::Error::from_raw_os_error(error));
        let guard = (guard > 0).then(|| post.taken_by(guard));
        match (error, guard) {
            (None, guard) => Ok((Child { pid }, guard)),
            (Some(error), None) => Err(NotStarted::NotGuarded(error)),
            (Some(error), Some(guard)) => {
                guard.dismiss();
                Err(NotStarted::NotRun(error))
            }
        }
    }

    /// Sends a signal to the command and its group. Only while the command was not waited for. Why the
    /// command itself could not be sent it, if it could not: it may have another user's rights.
    pub fn signal_all(&self, signal: c_int) -> io::Result<()> {
        let _ = self.signal_group(signal);
        // SAFETY: a system call without pointers.
        if unsafe { libc::getpgid(self.pid) } != self.pid {
            // It went into another group.
            return self.signal(signal);
        }
        // The group has the guard in it, which can be sent anything: that says nothing of the command.
        self.signal(0)
    }

    /// Sends a signal to the command's group. Only while the command, or the guard, was not waited for:
    /// they keep the group's number.
    pub fn signal_group(&self, signal: c_int) -> io::Result<()> {
        send(-self.pid, signal)
    }

    /// Sends a signal to the command itself. Only while it was not waited for.
    pub fn signal(&self, signal: c_int) -> io::Result<()> {
        send(self.pid, signal)
    }

    /// Its change of state since the last call, if any. Does not wait.
    pub fn became(&self) -> Option<Became> {
        let mut status = 0;
        // SAFETY: the kernel writes one integer.
        if unsafe { libc::waitpid(self.pid, &mut status, libc::WNOHANG | libc::WUNTRACED) } != self.pid {
            return None;
        }
        Some(if libc::WIFSTOPPED(status) {
            Became::Stopped(libc::WSTOPSIG(status))
        } else if libc::WIFSIGNALED(status) {
            Became::Ended(Ending::Killed(libc::WTERMSIG(status)))
        } else {
            Became::Ended(Ending::Exited(libc::WEXITSTATUS(status) as u8))
        })
    }
}

fn send(to: pid_t, signal: c_int) -> io::Result<()> {
    // SAFETY: a system call without pointers.
    match unsafe { libc::kill(to, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the command's process needs until it is the command, and the result.
struct Start<'a> {
    program: &'a Program,
    signals: &'a Signals,
    post: &'a Post,
    /// The terminal, if it is to have it.
    terminal: Option<RawFd>,
    parent: pid_t,
    /// The guard's number, once there is one.
    guard: AtomicI32,
    /// Whether it has the terminal.
    lent: AtomicBool,
    /// Why there is no guard, or no command where there is a guard.
    error: AtomicI32,
}

impl Start<'_> {
    /// The process's life until it is the command. Async-signal-safe calls only (`execvpe` of glibc and musl allocates
    /// nothing).
    fn become_command(&self) -> ! {
        // SAFETY: system calls; the program's strings and their arrays were made before.
        unsafe {
            libc::setpgid(0, 0);
            // Belt and braces, for the command itself only: the guard is what also covers its children.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // Killed before that?
            if libc::getppid() != self.parent || libc::getpgrp() != libc::getpid() {
                libc::_exit(i32::from(crate::failure::status::INTERNAL));
            }
            let guard = self.post.start_guard(libc::CLONE_PARENT);
            if guard == -1 {
                self.fail();
            }
            self.guard.store(guard, Ordering::Relaxed);
            if let Some(terminal) = self.terminal {
                // SIGTTOU is blocked.
                self.lent.store(libc::tcsetpgrp(terminal, libc::getpid()) == 0, Ordering::Relaxed);
            }
            self.signals.restore_in_child();
            crate::standard::close_again();
            let Program { arguments, environment, .. } = self.program;
            libc::execvpe(arguments[0], arguments.as_ptr(), environment.as_ptr());
            self.fail()
        }
    }

    fn fail(&self) -> ! {
        // SAFETY: reads an integer of this thread's, and ends this process.
        unsafe {
            self.error.store(*libc::__errno_location(), Ordering::Relaxed);
            libc::_exit(i32::from(crate::failure::status::NO_SUCH_COMMAND))
        }
    }
}
