//! Locks on a Redis server, compared with the bare commands that they consist of, on the same server and in the same
//! run. `NBLOCK_BENCH_REDIS_URL` names a server (`redis://host:port`); otherwise one is started, as for the tests.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{client, forever, give, hand_over, in_turns, lock, median, report, take};

const ROUNDS: usize = 2_000;

/// The shortest script with the guarantees of a grant: a deadline, a fence that grows even if the clock is set back,
/// and the lease.
const ACQUIRE: &str = "local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
    if now>=tonumber(ARGV[3]) then return -1 end \
    if redis.call('EXISTS',KEYS[1])==1 then return 0 end \
    local f=t[1]*1000000+t[2] local l=tonumber(redis.call('GET',KEYS[2]) or 0) if l>=f then f=l+1 end \
    local s=string.format('%.0f',f) redis.call('SET',KEYS[2],s,'PX',86400000) \
    redis.call('SET',KEYS[1],ARGV[1]..' '..s,'PX',ARGV[2]) return f";
const RELEASE: &str = "local v=redis.call('GET',KEYS[1]) if v and string.sub(v,1,#ARGV[1])==ARGV[1] then \
    return redis.call('DEL',KEYS[1]) end return 0";
/// What most libraries send after `SET NX PX`.
const COMPARE_AND_DELETE: &str =
    "if redis.call('get',KEYS[1])==ARGV[1] then return redis.call('del',KEYS[1]) else return 0 end";

pub fn run(directory: &Path) {
    let named = std::env::var("NBLOCK_BENCH_REDIS_URL").ok().filter(|url| !url.is_empty());
    let started = if named.is_none() { start(&directory.join("redis")) } else { None };
    let Some(url) = named.or(started.as_ref().map(|(_, url)| url.clone())) else {
        println!("redis: not measured, no server could be had");
        return;
    };
    let authority = url.strip_prefix("redis://").expect("a URL of Redis").trim_end_matches('/');
    cycles(&url, authority);
    handover(&url, authority);
    if let Some((mut tool, _)) = started {
        drop(tool.stdin.take());
        let _ = tool.wait();
    }
}

/// Starts a server that ends when its standard input is closed.
fn start(directory: &Path) -> Option<(Child, String)> {
    let tool = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/servers.sh");
    let mut command = Command::new(tool);
    command.args(["run", "redis"]).arg(directory).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut tool = command.spawn().ok()?;
    // Its output is read up to the process id: if the pipe were closed before, the tool would be killed by its next
    // write, and its server would stay.
    let mut url = None;
    for line in BufReader::new(tool.stdout.take()?).lines().map_while(Result::ok) {
        url = line.strip_prefix("url=").map(str::to_string).or(url);
        if line.starts_with("pid=") {
            break;
        }
    }
    let url = url?;
    Some((tool, url))
}

fn cycles(url: &str, authority: &str) {
    let lock = lock(client(url), "jobs:cycles");
    let options = forever();
    let mut same = Bare::connect(authority);
    let mut plain = Bare::connect(authority);
    let (acquire, release) = (same.load(ACQUIRE), same.load(RELEASE));
    let delete = plain.load(COMPARE_AND_DELETE);
    let (head, value) = values();
    let [ours, scripts, bare] = in_turns(
        ROUNDS,
        [
            &mut || {
                let start = Instant::now();
                take(lock, &options);
                give(lock);
                start.elapsed()
            },
            &mut || {
                let start = Instant::now();
                let keys = ["jobs:same", "nblock:fence:{jobs:same}"];
                same.ask(&["EVALSHA", &acquire, "2", keys[0], keys[1], &value, "60000", "99999999999999"]);
                same.ask(&["EVALSHA", &release, "1", keys[0], head]);
                start.elapsed()
            },
            &mut || {
                let start = Instant::now();
                let token = "0123456789abcdef0123456789abcdef";
                plain.ask(&["SET", "jobs:bare", token, "NX", "PX", "60000"]);
                plain.ask(&["EVALSHA", &delete, "1", "jobs:bare", token]);
                start.elapsed()
            },
        ],
    );
    report("redis: acquire+release", ours / 1e3, "the shortest scripts", scripts / 1e3, "us", "<= 1.1");
    report("redis: acquire+release", ours / 1e3, "SET NX PX, compare+delete", bare / 1e3, "us", "<= 1.4");
}

/// The time from one connection's release to another's grant.
fn handover(url: &str, authority: &str) {
    // A URL with another option is another store, with its own connection.
    let other = format!("{url}?skew=1");
    let locks = [lock(client(url), "jobs:handover") as usize, lock(client(&other), "jobs:handover") as usize];
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut tracking = Bare::connect(authority);
    tracking.ask(&["HELLO", "3"]);
    tracking.ask(&["CLIENT", "TRACKING", "ON", "OPTIN"]);
    let mut writer = Bare::connect(authority);
    let (acquire, release) = (writer.load(ACQUIRE), writer.load(RELEASE));
    let (head, value) = values();
    let (mut plain, mut scripts) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS / 10 {
        // During the pause, the waiter's watch takes effect.
        ours.push(hand_over(locks, Duration::from_millis(10)));

        writer.ask(&["SET", "jobs:pushed", "x"]);
        let ask = |bare: &mut Bare| bare.ask(&["SET", "jobs:pushed", "y", "NX", "PX", "60000"]);
        let [pushed, granted] = bare_hand_over(&mut tracking, &mut writer, &["DEL", "jobs:pushed"], ask);
        theirs.push(pushed);
        plain.push(granted);

        writer.ask(&["DEL", "jobs:pushed"]);
        let keys = ["jobs:pushed", "nblock:fence:{jobs:pushed}"];
        let ask = |bare: &mut Bare| {
            bare.ask(&["EVALSHA", &acquire, "2", keys[0], keys[1], &value, "60000", "99999999999999"]);
        };
        ask(&mut writer);
        let release = ["EVALSHA", &release, "1", keys[0], head];
        let [_, granted] = bare_hand_over(&mut tracking, &mut writer, &release, ask);
        scripts.push(granted);
    }
    let [ours, theirs, plain, scripts] = [ours, theirs, plain, scripts].map(|times| median(times) / 1e3);
    report("redis: release to grant elsewhere", ours, "bare DEL to push", theirs, "us", "<= 1.5");
    // The lower bound for a client that is notified and then sends its request: with plain commands, and with scripts
    // that have the same guarantees.
    report("redis: release to grant elsewhere", ours, "DEL, push, SET NX PX", plain, "us", "-");
    report("redis: release to grant elsewhere", ours, "the shortest scripts", scripts, "us", "<= 1.1");
    report("the shortest scripts, and a push", scripts, "bare DEL to push", theirs, "us", "-");
}

/// A thread waits for the push about a key, and then calls `ask`. Returns the nanoseconds from the release, which
/// `writer` sends, to the push and to the reply.
fn bare_hand_over(
    tracking: &mut Bare,
    writer: &mut Bare,
    release: &[&str],
    ask: impl Fn(&mut Bare) + Send,
) -> [f64; 2] {
    tracking.ask(&["CLIENT", "CACHING", "YES"]);
    tracking.ask(&["GET", "jobs:pushed"]);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || {
            let pushed = tracking.line();
            let told = Instant::now();
            assert!(pushed.starts_with('>'), "{pushed}");
            (0..5).for_each(|_| drop(tracking.line()));
            ask(tracking);
            [told, Instant::now()]
        });
        std::thread::sleep(Duration::from_millis(10));
        let released = Instant::now();
        writer.ask(release);
        waiter.join().expect("the waiter").map(|at| at.saturating_duration_since(released).as_nanos() as f64)
    })
}

/// The beginning of a record's value, and a whole value.
fn values() -> (&'static str, String) {
    let head = "nb1 0123456789abcdef0123456789abcdef.1 ";
    let owner = r#"1 1900000000000 {"acquired_at_ms":1900000000000,"app":"nblock-benches","boot_id":"00000000-0000-0000-0000-000000000000","host":"host","pid":12345}"#;
    (head, format!("{head}{owner}"))
}

/// A minimal connection.
struct Bare {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Bare {
    fn connect(authority: &str) -> Bare {
        let stream = TcpStream::connect(authority).expect("the server");
        stream.set_nodelay(true).expect("a socket");
        Bare { stream, read: Vec::new() }
    }

    fn load(&mut self, script: &str) -> String {
        self.send(&["SCRIPT", "LOAD", script]);
        self.line();
        self.line()
    }

    fn send(&mut self, words: &[&str]) {
        let mut command = format!("*{}\r\n", words.len());
        for word in words {
            command += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.stream.write_all(command.as_bytes()).expect("a connection");
    }

    fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.read.windows(2).position(|two| two == b"\r\n") {
                let line = String::from_utf8_lossy(&self.read[..end]).into_owned();
                self.read.drain(..end + 2);
                return line;
            }
            let mut space = [0; 4096];
            let read = self.stream.read(&mut space).expect("an answer");
            assert!(read > 0, "the server closed the connection");
            self.read.extend_from_slice(&space[..read]);
        }
    }

    /// Sends a command, and discards its reply: a line, a string, or a map of lines and strings.
    fn ask(&mut self, words: &[&str]) {
        self.send(words);
        self.skip();
    }

    fn skip(&mut self) {
        let line = self.line();
        assert!(!line.starts_with('-'), "{line}");
        let (kind, count) = line.split_at(1);
        let items = |factor: usize| count.parse::<usize>().unwrap_or(0) * factor;
        match kind {
            "$" if count != "-1" => drop(self.line()),
            "*" => (0..items(1)).for_each(|_| self.skip()),
            "%" => (0..items(2)).for_each(|_| self.skip()),
            _ => {}
        }
    }
}
