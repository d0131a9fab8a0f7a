//! Where a history takes place, what is noted there, and the programs that work there.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::key::Key;

use super::worker::{number_in, number_text};
use crate::checker::{self, Event, HoldName, NUMBERS_OF_A_PROCESS};
use crate::child;
use crate::support::fresh_key;

/// What all workers share.
#[derive(Clone)]
pub struct Place {
    pub url: String,
    pub key: Key,
    pub files: PathBuf,
    /// Length of a lease: short, so that the killed do not hold up the others for long.
    pub expire: Duration,
}

impl Place {
    pub fn new(url: &str, files: &Path, expire: Duration) -> Place {
        std::fs::create_dir_all(files).unwrap();
        let place = Place { url: url.to_string(), key: fresh_key(), files: files.to_path_buf(), expire };
        std::fs::write(place.counter(), number_text(0)).unwrap();
        std::fs::write(place.log(), "").unwrap();
        place
    }

    /// The file with the number that nothing protects but the lock.
    pub fn counter(&self) -> PathBuf {
        self.files.join("counter")
    }

    pub fn log(&self) -> PathBuf {
        self.files.join("log")
    }

    pub fn note(&self, event: Event) {
        let mut log = OpenOptions::new().append(true).open(self.log()).unwrap();
        log.write_all(event.to_string().as_bytes()).unwrap();
    }

    /// What the file says, once nobody writes to it any more.
    pub fn count(&self) -> u64 {
        number_in(&File::open(self.counter()).unwrap())
    }
}

/// The notes so far.
pub struct Notes {
    file: File,
    /// A line that is not whole yet.
    rest: String,
    pub events: Vec<Event>,
}

impl Notes {
    pub fn of(place: &Place) -> Notes {
        Notes { file: File::open(place.log()).unwrap(), rest: String::new(), events: Vec::new() }
    }

    /// Reads on; returns what is new.
    pub fn follow(&mut self) -> &[Event] {
        let known = self.events.len();
        self.file.read_to_string(&mut self.rest).unwrap();
        let whole = self.rest.rfind('\n').map_or(0, |end| end + 1);
        let rest = self.rest.split_off(whole);
        self.events.extend(self.rest.lines().filter_map(checker::event));
        self.rest = rest;
        &self.events[known..]
    }
}

/// How a worker is started, given the arguments of all of them.
type Start = Box<dyn Fn(&[&str]) -> Command>;

/// A program in one of the languages, that works until it is killed.
pub struct Program {
    pub language: &'static str,
    start: Start,
    /// How many times as long as the others' its leases are.
    leases: u32,
    /// How many work at once.
    pub workers: usize,
    /// How many grants one has had before it may be killed: some take long to start.
    pub life: u64,
}

impl Program {
    fn new(language: &'static str, start: impl Fn(&[&str]) -> Command + 'static) -> Program {
        Program { language, start: Box::new(start), leases: 1, workers: 1, life: 40 }
    }

    /// This very program, as a worker that does this wrong, or nothing.
    pub fn rust(mutant: &'static str) -> Program {
        let start = move |told: &[&str]| child::command("worker", &[told, &[mutant]].concat());
        Program { workers: 3, life: 1, ..Program::new("rust", start) }
    }

    /// Those in other languages, built into `build`; each that cannot be had here with the reason.
    pub fn others(build: &Path) -> Vec<Result<Program, (&'static str, &'static str)>> {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let sources = root.join("tests/proof/workers");
        let library = library(build);

        let program = compiled(build, &sources.join("worker.c"), &library);
        let c = Program::new("c", move |told| with(&program, &[], told));
        let moment = compiled(build, &sources.join("moment.c"), &library);
        let script = sources.join("worker.sh");
        let shell = Program::new("shell", move |told| {
            with(Path::new("sh"), &[&script, Path::new(env!("CARGO_BIN_EXE_nblock")), &moment], told)
        });
        // A command is ended some time before its deadline, be the machine as busy as it may.
        let shell = Program { leases: 8, life: 10, ..shell };

        let (python, script) = (root.join(".build/python-tests/bin/python"), sources.join("worker.py"));
        let python = match runs(Command::new(&python).args(["-c", "import nblock"])) {
            true => Ok(Program::new("python", move |told| with(&python, &[&script], told))),
            false => Err(("python", "bindings/python/test.sh installs the package that is used here")),
        };
        let (gem, script, soname) = (root.join("bindings/ruby/lib"), sources.join("worker.rb"), library.join(SONAME));
        let ruby = match runs(Command::new("ruby").args(["-rffi", "-e", ""])) {
            true => Ok(Program::new("ruby", move |told| {
                let mut command = with(Path::new("ruby"), &[Path::new("-I"), &gem, &script], told);
                command.env("NBLOCK_LIBRARY", &soname);
                command
            })),
            false => Err(("ruby", "apt-get install ruby ruby-ffi")),
        };
        vec![Ok(Program { workers: 2, life: 1, ..c }), Ok(shell), python, ruby]
    }

    /// Starts one. `number` is its own, in this history.
    pub fn start(&self, place: &Place, number: u64, seed: u64) -> Worker {
        let who = number * NUMBERS_OF_A_PROCESS;
        let told = [
            &place.url,
            place.key.as_str(),
            place.files.to_str().expect("a path in UTF-8"),
            &who.to_string(),
            &seed.to_string(),
            &(place.expire * self.leases).as_millis().to_string(),
        ];
        let mut command = (self.start)(&told);
        // A group of its own: what it starts is killed and stopped with it.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: one system call, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // Whatever becomes of the director, its workers do not work on.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let process = command.spawn().unwrap_or_else(|error| panic!("no worker in {}: {error}", self.language));
        Worker { process, language: self.language, who, grants: 0 }
    }
}

const SONAME: &str = "libnblock.so.0";

/// A directory with the library that is tested, under the name that programs load.
fn library(build: &Path) -> PathBuf {
    let built = std::env::current_exe().expect("this program has a name").with_file_name("libnblock.so");
    let directory = build.join("lib");
    std::fs::create_dir_all(&directory).unwrap();
    for name in [SONAME, "libnblock.so"] {
        std::os::unix::fs::symlink(&built, directory.join(name)).unwrap();
    }
    directory
}

fn compiled(build: &Path, source: &Path, library: &Path) -> PathBuf {
    let program = build.join(source.file_stem().expect("a name"));
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread", "-I"]);
    compiler
        .arg(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("include"))
        .arg(source)
        .arg("-o")
        .arg(&program);
    compiler.arg("-L").arg(library).arg("-lnblock").arg(format!("-Wl,-rpath,{}", library.display()));
    let status = compiler.status().unwrap_or_else(|error| panic!("cc: {error} (apt-get install gcc)"));
    assert!(status.success(), "{} is not compiled", source.display());
    program
}

fn with(program: &Path, before: &[&Path], told: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(before).args(told);
    command
}

fn runs(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// A worker at work. Killed when it is dropped.
pub struct Worker {
    process: Child,
    language: &'static str,
    who: u64,
    /// How many it has noted.
    pub grants: u64,
}

impl Worker {
    /// Its number.
    pub fn process(&self) -> u64 {
        self.who / NUMBERS_OF_A_PROCESS
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the group of a process that was not waited for yet: its number is its own.
        assert_eq!(unsafe { libc::kill(-(self.process.id() as i32), signal) }, 0);
    }

    /// Stops it, and waits until it stands still.
    pub fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let (pid, mut status) = (self.process.id() as i32, 0);
        // SAFETY: writes one integer; only the stop is waited for, its end is still to be reported.
        let stopped = unsafe { libc::waitpid(pid, &mut status, libc::WUNTRACED) };
        assert!(stopped == pid && libc::WIFSTOPPED(status), "{} did not stop: {status:#x}", self.language);
    }

    pub fn go_on(&self) {
        self.signal(libc::SIGCONT);
    }

    /// Kills it, waits until it is gone, and notes that.
    pub fn kill(&mut self, place: &Place) {
        self.signal(libc::SIGKILL);
        self.process.wait().expect("it is waited for");
        let hold = HoldName { who: self.who, turn: 0 };
        place.note(Event::Ended { hold, at: Boottime::now().as_nanos() });
    }

    /// How it ended, if it did by itself, which none should.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().expect("it is looked at")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Ok(None) = self.process.try_wait() {
            self.signal(libc::SIGKILL);
            let _ = self.process.wait();
        }
    }
}
