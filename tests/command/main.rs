//! The `nblock` command, with real processes.
//!
//! Nothing here waits for time to pass: what is waited for is a line that a process writes, the end of
//! a pipe that a whole process group had open, or the end of a process.

mod inspection;
mod loss;
mod run;
mod signals;
mod terminal;
mod troubleshooting;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::options::{ClientOptions, LockOptions};
use nblock::sys::runtime;

const NBLOCK: &str = env!("CARGO_BIN_EXE_nblock");

/// How long something may take before it counts as hanging. Far more than anything takes.
const HANGS: Duration = Duration::from_secs(100);

/// A store in a directory of its own.
struct Store(PathBuf);

impl Store {
    fn new() -> Store {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Store(std::env::temp_dir().join(format!("nblock-command-{}-{number}", std::process::id())))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("NBLOCK_DIR", &self.0).env_remove("NBLOCK_URL").env_remove("NBLOCK_LOG");
        // Tests that run in the background have some signals ignored, and so would what they start.
        // SAFETY: system calls only.
        unsafe {
            command.pre_exec(|| {
                for signal in 1..32 {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        command
    }

    fn nblock(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(NBLOCK);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    fn run(&self, arguments: &[&str]) -> Output {
        self.nblock(arguments).output().unwrap()
    }

    /// What a successful run writes.
    fn said(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.said(arguments)).unwrap()
    }

    /// Starts `nblock run` with these options on the key `k`, and a shell script.
    fn start(&self, options: &[&str], script: &str) -> Running {
        let mut command = self.nblock(&["run"]);
        command.args(options).args(["k", "--", "sh", "-c", script]);
        Running::start(command)
    }

    /// The store as a program sees it.
    fn client(&self, op_timeout: Duration) -> Client {
        let options = ClientOptions { op_timeout, connect_timeout: op_timeout, ..ClientOptions::default() };
        let url = format!("embedded:{}", self.0.display());
        runtime::wait(Client::open(Some(&url), options)).unwrap()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process, its output line by line. Killed when it is dropped.
struct Running {
    process: Child,
    out: Lines,
    err: Lines,
}

impl Running {
    fn start(mut command: Command) -> Running {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = Lines::of(process.stdout.take().unwrap());
        let err = Lines::of(process.stderr.take().unwrap());
        Running { process, out, err }
    }

    fn pid(&self) -> i32 {
        self.process.id() as i32
    }

    fn signal(&self, signal: i32) {
        send(self.pid(), signal);
    }

    /// Ends its standard input, which the scripts here wait for.
    fn finish(&mut self) -> ExitStatus {
        drop(self.process.stdin.take());
        self.wait()
    }

    fn wait(&mut self) -> ExitStatus {
        until(|| self.process.try_wait().unwrap())
    }

    fn status(&mut self) -> Option<i32> {
        self.wait().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The lines of a pipe, as they come.
struct Lines(Receiver<String>);

impl Lines {
    fn of(pipe: impl Read + Send + 'static) -> Lines {
        let (tell, told) = channel();
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        Lines(told)
    }

    /// The next line; `None` at the end, when nobody has the pipe open any more.
    fn next(&self) -> Option<String> {
        match self.0.recv_timeout(HANGS) {
            Ok(line) => Some(line),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => None,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("no line came, and no end"),
        }
    }

    #[track_caller]
    fn expect(&self, line: &str) {
        assert_eq!(self.next().as_deref(), Some(line));
    }

    /// The next line that has `part` in it.
    #[track_caller]
    fn expect_part(&self, part: &str) -> String {
        let mut before = Vec::new();
        while let Some(line) = self.next() {
            if line.contains(part) {
                return line;
            }
            before.push(line);
        }
        panic!("{part:?} is not in {before:?}");
    }

    /// All that still comes, to the end.
    fn rest(&self) -> Vec<String> {
        std::iter::from_fn(|| self.next()).collect()
    }
}

/// Takes a plain lease that nobody renews; the token that must never be seen.
fn lease(store: &Store, key: &str, expire: Duration) -> String {
    let client = store.client(Duration::from_secs(20));
    let lock = client.lock(Key::new(key.as_bytes()).unwrap(), LockOptions::default()).unwrap();
    assert!(runtime::wait(lock.try_lock(LockOptions { expire: Some(expire), ..LockOptions::default() })).unwrap());
    let token = lock.instance_token().unwrap();
    lock.abandon();
    token
}

fn send(pid: i32, signal: i32) {
    assert!(pid > 1);
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "{}", std::io::Error::last_os_error());
}

/// Looks until there is something. For what gives no other sign.
#[track_caller]
fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let limit = Boottime::now() + HANGS;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(!limit.has_passed(), "it never came");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A process's state, the letter of proc(5); `None` when it is gone.
fn state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}
