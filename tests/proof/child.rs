//! Processes of the tests' own: this very program, started again to play a role.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use crate::{crash, descriptors, embedded, history, postgres, redis, resources, standstill};

const ROLE: &str = "NBLOCK_PROOF_ROLE";

/// This program in a role.
pub fn command(role: &str, arguments: &[&str]) -> Command {
    let program = std::env::current_exe().expect("this program has a name");
    playing(Command::new(program), role, arguments)
}

fn playing(mut command: Command, role: &str, arguments: &[&str]) -> Command {
    let said: Vec<&str> = std::iter::once(role).chain(arguments.iter().copied()).collect();
    command.args(["--exact", "child::role", "--ignored", "--nocapture", "--test-threads=1"]).env(ROLE, said.join("\n"));
    command
}

/// What stands before each line that an actor says: the rest of the output is the test runner's.
const MARK: &str = "@ ";

/// Longer than any test: an actor whose director is gone ends by itself.
const ALARM_SECONDS: u32 = 600;

/// A process that plays a role. Killed when it is dropped.
pub struct Actor {
    process: std::process::Child,
    output: BufReader<ChildStdout>,
    input: Option<ChildStdin>,
}

impl Actor {
    pub fn start(role: &str, arguments: &[&str]) -> Actor {
        Actor::start_by(command(role, arguments), role)
    }

    /// As `start`, by way of a program that runs another in surroundings of its own making.
    pub fn start_within(program: &str, options: &[&str], role: &str, arguments: &[&str]) -> Actor {
        let mut command = Command::new(program);
        command.args(options).arg(std::env::current_exe().expect("this program has a name"));
        Actor::start_by(playing(command, role, arguments), role)
    }

    fn start_by(mut command: Command, role: &str) -> Actor {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("the role {role} is not played: {error}"));
        let output = BufReader::new(process.stdout.take().expect("it was piped"));
        let input = process.stdin.take();
        Actor { process, output, input }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it says next; `None` when it has ended.
    pub fn line(&mut self) -> Option<String> {
        loop {
            let mut line = Vec::new();
            if self.output.read_until(b'\n', &mut line).expect("a pipe is read") == 0 {
                return None;
            }
            let line = String::from_utf8_lossy(&line);
            if let Some((_, said)) = line.split_once(MARK) {
                return Some(said.trim_end().to_string());
            }
        }
    }

    /// What it says next, which must come.
    pub fn says(&mut self) -> String {
        self.line().unwrap_or_else(|| panic!("the actor ended without a word: {:?}", self.process.wait()))
    }

    /// Tells it to go on.
    pub fn cue(&mut self) {
        self.input.as_mut().expect("it has an input").write_all(b"\n").expect("the actor listens");
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a process that was not waited for yet: its number is its own.
        assert_eq!(unsafe { libc::kill(self.pid() as i32, signal) }, 0);
    }

    /// Stops it, and waits until it stands still.
    pub fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let mut status = 0;
        // SAFETY: writes one integer; only the stop is waited for, its end is still to be reported.
        let stopped = unsafe { libc::waitpid(self.pid() as i32, &mut status, libc::WUNTRACED) };
        assert!(stopped == self.pid() as i32 && libc::WIFSTOPPED(status), "it did not stop: {status:#x}");
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(&mut self) {
        self.process.kill().expect("it was there to be killed");
        self.process.wait().expect("it is waited for");
    }

    /// Waits until it has ended, well.
    pub fn ends(mut self) {
        drop(self.input.take());
        let status = self.process.wait().expect("it is waited for");
        assert!(status.success(), "the actor ended with {status}");
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Says something to the director.
pub fn say(what: impl std::fmt::Display) {
    println!("{MARK}{what}");
    std::io::stdout().flush().expect("the director listens");
}

/// Waits for the director's cue.
pub fn wait_for_cue() {
    let mut byte = [0];
    let read = std::io::stdin().read(&mut byte).expect("a pipe is read");
    if read == 0 {
        std::process::exit(1);
    }
}

/// Waits to be killed.
pub fn wait_for_the_end() -> ! {
    loop {
        std::thread::park();
    }
}

#[test]
#[ignore = "a role that other tests start"]
fn role() {
    let said = std::env::var(ROLE).expect("a role is given");
    let words: Vec<&str> = said.split('\n').collect();
    // SAFETY: sets a timer that ends this process.
    unsafe { libc::alarm(ALARM_SECONDS) };
    match words[..] {
        ["holder", url, key, expire] => crash::holder(url, key, expire),
        ["waiter", url, key] => crash::waiter(url, key),
        ["writer", url] => embedded::writer(url),
        ["opener", url, user, group] => embedded::opener(url, user, group),
        ["filler", url, limit] => embedded::filler(url, limit),
        ["grower", url, name, count] => embedded::grower(url, name, count),
        ["storm", url, seed] => embedded::storm(url, seed),
        ["moved", url, how, what] => embedded::moved(url, how, what),
        ["fencer", url, nothing] => embedded::fencer(url, nothing),
        ["guest", url, user] => embedded::guest(url, user),
        ["read only", url] => embedded::read_only(url),
        ["standing still", url] => standstill::standing_still(url),
        ["redis fork", url, name] => redis::forked(url, name),
        ["capped", url, nothing] => embedded::capped(url, nothing),
        ["words", from, to] => embedded::damaged_words(from, to),
        ["other boot", url, boot_id_file] => embedded::other_boot(url, boot_id_file),
        ["vandal", url, seed] => embedded::vandal(url, seed),
        ["careless", url, nothing] => embedded::careless(url, nothing),
        ["daemon", url, folder] => descriptors::daemon(url, folder),
        ["stranded", url, root] => descriptors::stranded(url, root),
        ["closer", url, folder] => descriptors::closer(url, folder),
        ["generations", url, count] => descriptors::generations(url, count),
        ["forker", url] => postgres::forker(url),
        ["many", url, count] => resources::many(url, count),
        ["cycles", url, count] => resources::cycles(url, count),
        ["exhausted", url, nothing] => resources::exhausted(url, nothing),
        ["worker", url, key, files, who, seed, expire, mutant] => {
            history::worker([url, key, files, who, seed, expire, mutant]);
        }
        _ => panic!("no such role: {words:?}"),
    }
}
