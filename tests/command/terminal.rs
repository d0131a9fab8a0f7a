//! The terminal: a pseudo-terminal whose other end is the test.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus};

use super::{NBLOCK, Store, until};

/// A session with a controlling terminal, and a process in it.
struct Session {
    keyboard: File,
    shown: Vec<u8>,
    process: Child,
}

impl Session {
    /// Starts a process as the leader of a session on a terminal of its own.
    fn start(mut command: Command) -> Session {
        let (mut ours, mut theirs) = (0, 0);
        let null = std::ptr::null_mut();
        // SAFETY: two descriptors are written, which nobody else has.
        let (ours, theirs) = unsafe {
            assert_eq!(libc::openpty(&mut ours, &mut theirs, null, null.cast(), null.cast()), 0);
            for descriptor in [ours, theirs] {
                libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC);
            }
            (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs))
        };
        command.stdin(theirs.try_clone().unwrap()).stdout(theirs.try_clone().unwrap()).stderr(theirs);
        // SAFETY: system calls only.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                if libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Session { keyboard: ours.into(), shown: Vec::new(), process: command.spawn().unwrap() }
    }

    fn types(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).unwrap();
    }

    /// Reads what is shown up to and with `text`.
    #[track_caller]
    fn shows(&mut self, text: &str) {
        loop {
            let shown = String::from_utf8_lossy(&self.shown).into_owned();
            if let Some(at) = shown.find(text) {
                self.shown = shown.as_bytes()[at + text.len()..].to_vec();
                return;
            }
            let mut polled =
                libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(&self.keyboard), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd.
            let ready = unsafe { libc::poll(&mut polled, 1, super::HANGS.as_millis() as i32) };
            let mut piece = [0; 1000];
            // Reading fails when nobody has the terminal open any more.
            let read = if ready == 1 { self.keyboard.read(&mut piece).unwrap_or(0) } else { 0 };
            assert!(read > 0, "{text:?} is not in {shown:?}");
            self.shown.extend(&piece[..read]);
        }
    }

    fn wait(&mut self) -> ExitStatus {
        until(|| self.process.try_wait().unwrap())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn session(store: &Store, script: &str) -> Session {
    let mut command = store.command("sh");
    command.env("NBLOCK", NBLOCK).args(["-c", script]);
    Session::start(command)
}

#[test]
fn the_command_has_the_terminal_and_gives_it_back() {
    let store = Store::new();
    let mut session = session(&store, "$NBLOCK run k -- sh -c 'read x; echo \"one $x\"'; read x; echo \"two $x\"");
    session.types("first\n");
    session.shows("one first");
    session.types("second\n");
    session.shows("two second");
    assert!(session.wait().success());
}

#[test]
fn an_interrupt_that_is_typed_ends_the_script_too() {
    let store = Store::new();
    let mut session = session(&store, "while :; do $NBLOCK run k -- sh -c 'echo in; exec sleep 1000'; done");
    session.shows("in");
    session.types("\x03");
    assert_eq!(session.wait().signal(), Some(libc::SIGINT));
    assert_eq!(store.said(&["list"]), "");
}

#[test]
fn an_interrupt_while_waiting_is_130() {
    let store = Store::new();
    let mut holder = store.start(&["--expire", "1m"], "echo in; read x");
    holder.out.expect("in");
    let mut session = session(&store, "trap : INT; NBLOCK_LOG=info $NBLOCK run --wait k -- echo never; echo status $?");
    session.shows("the store is");
    session.types("\x03");
    session.shows("status 130");
    assert!(session.wait().success());
    holder.finish();
}

#[test]
fn a_job_can_be_stopped_and_continued() {
    let store = Store::new();
    let mut session = session(
        &store,
        "set -m; $NBLOCK run k -- sh -c 'echo in; read x; echo \"read $x\"; exit 4'; echo stopped $?; \
         fg >/dev/null; echo ended $?",
    );
    session.shows("in");
    session.types("\x1a");
    session.shows("stopped 1");
    session.types("word\n");
    session.shows("read word");
    session.shows("ended 4");
    assert!(session.wait().success());
}

#[test]
fn in_a_pipeline_the_command_has_the_terminal_when_it_asks_for_it() {
    let store = Store::new();
    // The reader of the pipe needs the terminal as well, before the command does.
    let mut session = session(
        &store,
        "set -m; $NBLOCK run k -- sh -c 'echo in; read x </dev/tty; echo \"read $x\"' | \
         sh -c 'read line; echo \"$line\"; exec cat'; echo done",
    );
    session.shows("in");
    session.types("word\n");
    session.shows("read word");
    session.shows("done");
    assert!(session.wait().success());
}

#[test]
fn watch_draws_a_table() {
    let store = Store::new();
    let mut holder = store.start(&["--expire", "1m"], "echo in; read x");
    holder.out.expect("in");
    let mut command = store.nblock(&["watch"]);
    command.env("TERM", "xterm");
    let mut session = Session::start(command);
    session.shows("\x1b[H\x1b[2J");
    session.shows("1 held or run out in ");
    session.shows("KEY  LEASE");
    session.types("\x03");
    assert_eq!(session.wait().signal(), Some(libc::SIGINT));
    holder.finish();
}
