//! Locks of other libraries on one Redis server with ours: they exclude each other in both directions.
//!
//! The libraries are fetched into `.build/redis-interop`, once: redis-py by pip, npm's redlock and ioredis where npm is
//! there. Ruby's redlock is played by scripts of the same meaning.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nblock::error::ErrorKind;
use nblock::key::Key;
use nblock::options::{LockOptions, Timeout};
use nblock::protocol::Holder;
use nblock::sys::runtime::wait;

use crate::redis::{cli, server};
use crate::servers::Server;
use crate::support::{PATIENCE, client, eventually, fresh_key, lock, skipped};

/// Another library, in a process of its own or not.
trait Library {
    /// Whether it got the lock, which it does not wait for.
    fn acquires(&mut self, key: &Key, expire: Duration) -> bool;
    /// Whether it says that it had it.
    fn releases(&mut self, key: &Key) -> bool;
}

/// A program that does as lines on its standard input say.
struct Program {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(command: &mut Command) -> Program {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the library's program");
        let input = process.stdin.take().expect("it was piped");
        let output = BufReader::new(process.stdout.take().expect("it was piped"));
        Program { process, input, output }
    }

    fn does(&mut self, what: &str) -> bool {
        writeln!(self.input, "{what}").unwrap();
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the library's program ended at {what:?}");
            match line.trim() {
                "@ yes" => return true,
                "@ no" => return false,
                _ => {}
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Library for Program {
    fn acquires(&mut self, key: &Key, expire: Duration) -> bool {
        self.does(&format!("acquire {} {}", key.as_str(), expire.as_secs_f64()))
    }

    fn releases(&mut self, key: &Key) -> bool {
        self.does(&format!("release {}", key.as_str()))
    }
}

/// What redlock-rb asks of a server: set where there is nothing or its own, deleted where it is its own.
struct RedlockRb<'a>(&'a Server);

const SET_IF_FREE_OR_OURS: &str = "local v = redis.call('get', KEYS[1]) \
     if not v or v == ARGV[1] then return redis.call('set', KEYS[1], ARGV[1], 'PX', ARGV[2]) end return false";
const DELETE_IF_OURS: &str =
    "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0";

impl Library for RedlockRb<'_> {
    fn acquires(&mut self, key: &Key, expire: Duration) -> bool {
        let ms = expire.as_millis().to_string();
        cli(self.0, &["eval", SET_IF_FREE_OR_OURS, "1", key.as_str(), "a-redlock-rb-value", &ms]) == "OK"
    }

    fn releases(&mut self, key: &Key) -> bool {
        cli(self.0, &["eval", DELETE_IF_OURS, "1", key.as_str(), "a-redlock-rb-value"]) == "1"
    }
}

const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_millis(300);

fn within(timeout: Duration) -> LockOptions {
    LockOptions { timeout: Some(Timeout::After(timeout)), ..LockOptions::default() }
}

fn lasting(expire: Duration) -> LockOptions {
    LockOptions { expire: Some(expire), ..LockOptions::default() }
}

fn exclude_each_other(name: &str, library: &mut dyn Library) {
    let server = server();
    let client = client(&server.url);
    let key = fresh_key();
    let ours = lock(&client, &key);

    // Theirs.
    assert!(library.acquires(&key, LONG), "{name}");
    assert!(!wait(ours.try_lock(LockOptions::default())).unwrap());
    let record = wait(client.find(&key)).unwrap().unwrap();
    assert!(matches!(record.state.holder, Holder::Foreign { .. }) && record.lease.remaining() <= LONG);
    assert_eq!(wait(ours.unlock()).unwrap_err().kind(), ErrorKind::InvalidOp);
    assert!(library.releases(&key), "ours has not touched it");

    // Ours.
    assert!(wait(ours.try_lock(lasting(LONG))).unwrap());
    assert!(!library.acquires(&key, LONG), "{name} is granted what is ours");
    wait(ours.refresh(None)).unwrap();
    assert!(!library.acquires(&key, LONG), "{name} is granted what was renewed");
    wait(ours.unlock()).unwrap();

    // Theirs runs out; it is ours, and not theirs to unlock.
    assert!(library.acquires(&key, SHORT), "{name}");
    assert!(wait(ours.lock(within(PATIENCE))).unwrap());
    assert!(!library.releases(&key), "{name} unlocks what is ours");
    wait(ours.refresh(None)).unwrap();
    wait(ours.unlock()).unwrap();

    // Ours runs out; it is theirs, and not ours to unlock or to renew.
    assert!(wait(ours.try_lock(lasting(SHORT))).unwrap());
    eventually("it runs out", || library.acquires(&key, LONG));
    assert_eq!(wait(ours.unlock()).unwrap_err().kind(), ErrorKind::Lost);
    assert!(!wait(ours.try_lock(LockOptions::default())).unwrap());
    assert!(library.releases(&key), "ours has not touched it");

    // Their unlock wakes ours: sooner, in one round of several, than any look without a notification.
    let mut soonest = PATIENCE;
    for _ in 0..5 {
        assert!(library.acquires(&key, LONG), "{name}");
        let before = looks(&server);
        let waiting = ours.lock(within(PATIENCE));
        let thread = std::thread::spawn(move || {
            assert!(wait(waiting).unwrap());
            Instant::now()
        });
        eventually("it waits", || looks(&server) > before);
        assert!(library.releases(&key));
        let released = Instant::now();
        soonest = soonest.min(thread.join().unwrap().saturating_duration_since(released));
        wait(ours.unlock()).unwrap();
    }
    assert!(soonest < Duration::from_secs(2), "ours was not notified: granted {soonest:?} after the unlock");
    println!("{name}: unlock to our grant {soonest:?} at best");
}

/// How often anybody began to watch a key.
fn looks(server: &Server) -> u64 {
    let stats = cli(server, &["info", "commandstats"]);
    let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_client|caching:calls="));
    line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
}

#[test]
fn redlock_rb() {
    exclude_each_other("redlock-rb's scripts", &mut RedlockRb(&server()));
}

fn sources() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/redis"))
}

/// A directory of the build folder with what `fetch` puts there, made once for one content of `list`.
fn fetched(name: &str, list: &str, fetch: impl Fn(&Path) -> Command) -> PathBuf {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(".build/redis-interop").join(name);
    let wanted = std::fs::read_to_string(sources().join(list)).unwrap();
    let stamp = directory.join("stamp");
    if std::fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == wanted) {
        return directory;
    }
    assert!(
        std::env::var("NBLOCK_NO_INSTALL").map_or(true, |value| value != "1"),
        "NBLOCK_NO_INSTALL is set, and what tests/redis/{list} names is not in {}",
        directory.display()
    );
    println!("fetching into .build/redis-interop, installing nothing: what tests/redis/{list} names");
    for _ in 0..3 {
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let output = fetch(&directory).output();
        match output {
            Ok(output) if output.status.success() => {
                std::fs::write(&stamp, &wanted).unwrap();
                return directory;
            }
            failed => println!("{failed:?}"),
        }
    }
    panic!("what tests/redis/{list} names could not be fetched");
}

#[test]
fn redis_py() {
    let packages = fetched("python", "requirements.txt", |directory| {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"]).arg(directory);
        pip.arg("--requirement").arg(sources().join("requirements.txt"));
        pip
    });
    let server = server();
    let mut python = Command::new("python3");
    python.arg(sources().join("redis_py.py")).arg(server.port.to_string()).env("PYTHONPATH", packages);
    exclude_each_other("redis-py", &mut Program::start(&mut python));
}

#[test]
fn node_redlock() {
    if Command::new("npm").arg("--version").output().is_err() {
        return skipped("redis-node", "npm is not installed");
    }
    let packages = fetched("node", "package.json", |directory| {
        std::fs::copy(sources().join("package.json"), directory.join("package.json")).unwrap();
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"])
            .current_dir(directory);
        npm
    });
    let server = server();
    let mut node = Command::new("node");
    node.arg(sources().join("redlock.mjs")).arg(server.port.to_string()).arg(packages);
    exclude_each_other("npm's redlock", &mut Program::start(&mut node));
}
