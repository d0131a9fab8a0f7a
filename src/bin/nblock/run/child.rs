//! The command: a child in a process group of its own, held back until it is guarded.

use std::ffi::{CStr, CString, OsString, c_char};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, IntoRawFd as _, RawFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::ptr;

use libc::{c_int, pid_t};

use super::signals::Signals;

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
    /// Tells it to go on; it answers only if it could not run the command.
    channel: UnixStream,
}

/// What became of the command since it was last asked.
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
    /// Forks a child, in a group of its own, that waits to be released and dies with us.
    pub fn hold_back(program: &Program, signals: &Signals) -> io::Result<Child> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        // SAFETY: the child makes async-signal-safe calls only, and never returns.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let parent = ours.into_raw_fd();
                become_command(program, signals, parent, theirs.as_raw_fd())
            }
            pid => {
                // As the child itself does: whoever is first, it is done before anything else.
                // SAFETY: a system call without pointers.
                unsafe { libc::setpgid(pid, pid) };
                Ok(Child { pid, channel: ours })
            }
        }
    }

    /// Lets it run the command.
    pub fn release(&self) {
        // A child that was killed meanwhile does not read it, and is found dead.
        let _ = (&self.channel).write(&[1]);
    }

    /// Why the command could not be run, once the child has ended.
    pub fn exec_error(&self) -> Option<io::Error> {
        let mut number = [0; 4];
        (&self.channel).read_exact(&mut number).ok()?;
        Some(io::Error::from_raw_os_error(i32::from_ne_bytes(number)))
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

    /// What became of it since the last time, if anything. Does not wait.
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

/// The child's life until it is the command. Async-signal-safe calls only (`execvpe` of glibc and musl
/// allocates nothing).
fn become_command(program: &Program, signals: &Signals, parents: RawFd, channel: RawFd) -> ! {
    // SAFETY: system calls; the program's strings and their arrays were made before the fork.
    unsafe {
        libc::setpgid(0, 0);
        // Belt and braces, for the command itself only: the guard is what also covers its children.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // Ours alone then: with the parent, the other end is gone.
        libc::close(parents);
        let mut word = 0u8;
        let told = loop {
            match libc::read(channel, (&raw mut word).cast(), 1) {
                -1 if *libc::__errno_location() == libc::EINTR => {}
                read => break read == 1,
            }
        };
        if !told || libc::getpgrp() != libc::getpid() {
            libc::_exit(i32::from(crate::failure::status::INTERNAL));
        }
        signals.restore_in_child();
        crate::standard::close_again();
        libc::execvpe(program.arguments[0], program.arguments.as_ptr(), program.environment.as_ptr());
        let number = (*libc::__errno_location()).to_ne_bytes();
        libc::write(channel, number.as_ptr().cast(), number.len());
        libc::_exit(i32::from(crate::failure::status::NO_SUCH_COMMAND))
    }
}
