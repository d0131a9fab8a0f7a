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
    fn start(command: Command) -> Session {
        Session::start_sized(command, 0, 0)
    }

    /// Likewise, on a terminal of so many lines and columns.
    fn start_sized(mut command: Command, lines: u16, columns: u16) -> Session {
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
        set_size(&ours, lines, columns);
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

    fn resize(&self, lines: u16, columns: u16) {
        set_size(&self.keyboard, lines, columns);
    }

    /// Reads what is shown up to and with `text`.
    #[track_caller]
    fn shows(&mut self, text: &str) -> String {
        loop {
            let found = self.shown.windows(text.len()).position(|part| part == text.as_bytes());
            if let Some(at) = found {
                let rest = self.shown.split_off(at + text.len());
                let shown = std::mem::replace(&mut self.shown, rest);
                return String::from_utf8(shown).unwrap();
            }
            let shown = String::from_utf8_lossy(&self.shown).into_owned();
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

fn set_size(terminal: &impl std::os::fd::AsRawFd, lines: u16, columns: u16) {
    let size = libc::winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: one winsize.
    assert_eq!(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) }, 0);
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
fn in_a_command_substitution_the_command_can_read_from_the_terminal() {
    let store = Store::new();
    if !std::path::Path::new("/bin/bash").exists() {
        println!("\nSKIPPED command-bash: there is no /bin/bash");
        return;
    }
    let mut command = store.command("/bin/bash");
    command.env("NBLOCK", NBLOCK).env("PS1", "> ").args(["--norc", "--noprofile", "--noediting", "-i"]);
    let mut session = Session::start(command);
    // An interactive shell's command substitution is in the shell's own process group, with SIGTTIN ignored.
    session.types("x=$($NBLOCK run k -- sh -c 'echo i''n >&2; read y </dev/tty; echo \"<$y>\"'); echo \"got $x\"\n");
    session.shows("in\r\n");
    session.types("word\n");
    session.shows("got <word>");
    // And what reads from a pipe there keeps the terminal, as without nblock.
    session.types("x=$($NBLOCK run k -- echo li''ne | sh -c 'read a; echo $a >&2; read y </dev/tty; echo \"<$y>\"')\n");
    session.shows("line\r\n");
    session.types("other\n");
    session.types("echo \"got $x\"\n");
    session.shows("got <other>");
    session.types("exit\n");
    assert!(session.wait().success());
}

/// A terminal of so many lines and columns, on which `nblock` runs.
fn nblock_on_terminal(store: &Store, arguments: &[&str], lines: u16, columns: u16, no_color: &str) -> Session {
    let mut command = store.nblock(arguments);
    command.env("TERM", "xterm").env("NO_COLOR", no_color);
    Session::start_sized(command, lines, columns)
}

#[test]
fn watch_draws_a_table() {
    let store = Store::new();
    let mut holder = store.start(&["--expire", "1m"], "echo in; read x");
    holder.out.expect("in");
    let mut session = nblock_on_terminal(&store, &["watch"], 24, 80, "");
    session.shows("\x1b[H\x1b[2J");
    session.shows("1 held, 0 ran out\x1b[K");
    session.shows("\x1b[1mKEY\x1b[0m  \x1b[1mLEASE\x1b[0m");
    session.shows("\x1b[J");
    // The second time it is written over the first.
    let again = session.shows("1 held, 0 ran out\x1b[K");
    assert!(again.contains("\x1b[H") && !again.contains("\x1b[2J"), "{again:?}");
    session.types("\x03");
    assert_eq!(session.wait().signal(), Some(libc::SIGINT));
    holder.finish();
}

/// The lines of a screen up to where the cursor stays, without what the terminal does with them.
fn screen(session: &mut Session) -> Vec<String> {
    let text = session.shows("\x1b[J");
    let from = text.rfind("\x1b[H").unwrap_or(0);
    let text = text[from..].replace("\x1b[H", "").replace("\x1b[2J", "").replace("\x1b[J", "");
    text.replace("\r\n", "\n").lines().map(|line| line.trim_end_matches("\x1b[K").to_string()).collect()
}

#[test]
fn watch_fits_the_terminal_whatever_the_keys_and_its_size_are() {
    let store = Store::new();
    let keys = ["任务".repeat(80), "задача:отчёт".to_string(), "k".repeat(300), "e\u{301}tude".to_string()];
    let more = (0..40).map(|number| format!("many:{number:02}"));
    for key in keys.into_iter().chain(more) {
        super::lease(&store, &key, std::time::Duration::from_secs(600));
    }
    let mut session = nblock_on_terminal(&store, &["watch"], 20, 60, "1");
    let check = |lines: Vec<String>, height: usize, columns: usize| {
        assert!(lines.len() < height, "{lines:?}");
        for line in &lines {
            // Wide characters take two columns.
            let width: usize = line
                .chars()
                .map(|c| match c {
                    '任' | '务' => 2,
                    '\u{301}' => 0,
                    _ => 1,
                })
                .sum();
            assert!(width <= columns, "{width} columns: {line:?}");
            assert!(!line.contains('\x1b'), "NO_COLOR is set: {line:?}");
        }
        lines.join("\n")
    };
    let shown = check(screen(&mut session), 20, 60);
    assert!(shown.contains("44 held, 0 ran out") && shown.contains("... and 30 more"), "{shown}");
    assert!(shown.contains("KEY") && shown.contains("LEASE") && shown.contains("HOLDER"), "{shown}");
    assert!(!shown.contains("FENCE"), "no room for it: {shown}");
    // Drawn again at once, and in full.
    session.resize(60, 120);
    session.shows("\x1b[H\x1b[2J");
    let shown = check(screen(&mut session), 60, 120);
    assert!(shown.contains("FENCE") && shown.contains("задача:отчёт") && shown.contains("e\u{301}tude"), "{shown}");
    assert!(!shown.contains("more"), "{shown}");
    session.resize(3, 10);
    session.shows("\x1b[H\x1b[2J");
    check(screen(&mut session), 3, 10);
    session.types("\x03");
    assert_eq!(session.wait().signal(), Some(libc::SIGINT));
}

#[test]
fn colours_are_for_terminals_that_are_not_asked_to_go_without() {
    let store = Store::new();
    super::lease(&store, "out", std::time::Duration::from_millis(1));
    until(|| store.json(&["list", "--json"])[0]["expired"].as_bool().filter(|expired| *expired));
    let shown = |no_color: &str| {
        let mut session = nblock_on_terminal(&store, &["list"], 24, 80, no_color);
        let shown = session.shows("\r\nout") + &session.shows(" ago");
        session.wait();
        shown
    };
    assert!(shown("").contains("\x1b[1mKEY") && shown("").contains("\x1b[31mran out"), "{:?}", shown(""));
    assert!(!shown("1").contains('\x1b'));
    assert!(!store.said(&["list"]).contains('\x1b'), "nor in a pipe");
}
