//! The Redis store on a real server: what conformance does not ask of every store.

use std::ffi::CString;
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use nblock::client::{Broken, Client};
use nblock::clock::Boottime;
use nblock::error::{Error, ErrorKind};
use nblock::ffi::{
    NBL_CANCELLED, NBL_CSTR, NBL_OK, nbl_client_free, nbl_client_new, nbl_find, nbl_list_free, nbl_list_record,
    nbl_lock_free, nbl_lock_new, nbl_lock_start, nbl_op_cancel, nbl_op_fd, nbl_op_finish, nbl_op_free, nbl_record_t,
    nbl_try_lock, nbl_unlock,
};
use nblock::key::Key;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::protocol::{
    Change, Condition, Effect, Entry, Holder, Lease, NewRecord, Proof, Reply, State, StoreTime, Write, apply,
};
use nblock::record::{self, Record};
use nblock::store::{Filter, Store};
use nblock::sys::runtime::wait;
use nblock::token::{HoldId, ObjectId, OwnerToken, Token};

use crate::child::{Actor, say, wait_for_the_end};
use crate::servers::Server;
use crate::support::{LONG, PATIENCE, Random, answer, client, eventually, fresh_key, identity, key, lock, open};

/// A server that the tests of this program share while one of them needs it.
pub fn server() -> Arc<Server> {
    static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let server = Arc::new(Server::start("redis", &[]));
        *shared = Arc::downgrade(&server);
        server
    })
}

/// What the server's own client prints.
pub fn cli(server: &Server, arguments: &[&str]) -> String {
    server.ask("redis-cli", &[&["-p", "{port}"], arguments].concat())
}

fn found(store: &Arc<dyn Store>, key: &Key) -> Option<Record> {
    answer(store.find(key)).expect("find is answered")
}

/// Draws changes out of few names and numbers, so that many of them match.
struct Draw(Random);

impl Draw {
    fn of<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.0.below(from.len())].clone()
    }

    fn hold(&mut self) -> HoldId {
        HoldId([self.0.below(2) as u8; 16])
    }

    fn token(&mut self) -> Token {
        Token { hold: self.hold(), attempt: self.0.below(2) as u32 }
    }

    fn owner(&mut self) -> OwnerToken {
        OwnerToken(self.of(&["o", "ö p"]).into())
    }

    fn object(&mut self) -> ObjectId {
        ObjectId(self.of(&[1, u64::MAX]))
    }

    fn some_hold(&mut self) -> Option<HoldId> {
        (self.0.below(3) > 0).then(|| self.hold())
    }

    fn number(&mut self) -> u64 {
        self.0.below(5) as u64
    }

    fn lease(&mut self) -> Lease {
        let length = LONG * (1 + self.0.below(3) as u32);
        self.of(&[Lease::FromNow(length), Lease::NotSooner(length), Lease::AsStored])
    }

    fn holder(&mut self) -> Holder {
        if self.0.below(3) == 0 {
            return Holder::Plain { token: self.token(), write_seq: self.number() };
        }
        let mut entries = Vec::new();
        for object in [ObjectId(1), ObjectId(u64::MAX)] {
            if self.0.below(2) == 0 {
                entries.push(Entry { object, count: 1 + self.0.below(3) as u32, write_seq: self.number() });
            }
        }
        let counted: u32 = entries.iter().map(|entry| entry.count).sum();
        let count = (counted + self.0.below(3) as u32).max(1);
        Holder::Reentrant { owner: self.owner(), hold: self.some_hold(), count, entries }
    }

    fn write(&mut self) -> Write {
        match self.0.below(6) {
            0 => Write::Put(NewRecord { holder: self.holder(), expire: LONG, identity: identity() }),
            1 => Write::Delete,
            2 | 3 => {
                let write_seq = (self.0.below(4) > 0).then(|| self.number());
                Write::Extend { lease: self.lease(), write_seq }
            }
            _ => Write::Entry {
                object: (self.0.below(4) > 0).then(|| self.object()),
                count: self.0.below(3) as u32,
                write_seq: self.number(),
                may_add: self.0.below(2) == 0,
                lease: self.lease(),
                name: self.some_hold(),
            },
        }
    }

    fn proof(&mut self) -> Proof {
        match self.0.below(4) {
            0 => Proof::Token(self.token()),
            1 => Proof::Hold(self.hold()),
            2 => Proof::Owner { owner: self.owner(), hold: self.some_hold() },
            _ => Proof::Object { owner: self.owner(), hold: self.hold(), object: self.object() },
        }
    }

    fn change(&mut self, present: Option<&State>, before: &[State]) -> Change {
        let put = |draw: &mut Draw| Write::Put(NewRecord { holder: draw.holder(), expire: LONG, identity: identity() });
        let (condition, write) = match (self.0.below(6), present) {
            (0, _) | (_, None) => (Condition::Absent, put(self)),
            (1 | 2, Some(present)) => {
                let mut state = if self.0.below(4) > 0 { present.clone() } else { self.of(before) };
                if let Holder::Foreign { .. } = state.holder {
                    // Its end is reckoned from two readings of the clock, and no two finds say the same.
                    state = present.clone();
                }
                if self.0.below(8) == 0 {
                    state.ends_at = StoreTime(state.ends_at.0 + 5_000_000_000);
                }
                (Condition::Seen { state: Box::new(state), over: self.0.below(8) == 0 }, self.write())
            }
            _ => (Condition::Mine(self.proof()), self.write()),
        };
        let change = Change::new(condition, write);
        if self.0.below(4) == 0 { change.until(Boottime::now() + LONG) } else { change }
    }
}

/// The scripts mean what the reference says, change by change.
#[test]
fn scripts_mean_what_apply_says() {
    const SEED: u64 = 1;
    let server = server();
    let store = open(&server.url).unwrap();
    let mut draw = Draw(Random::new(SEED));
    let mut counts = [0; 4];
    for round in 0..60 {
        let key = fresh_key();
        let mut before = vec![State { holder: draw.holder(), ends_at: StoreTime(0) }];
        for step in 0..50 {
            if draw.0.below(20) == 0 {
                cli(&server, &["set", key.as_str(), "a stranger's", "px", "3600000"]);
            }
            let present = found(&store, &key);
            let state = present.as_ref().map(|record| &record.state);
            let change = draw.change(state, &before);
            let what = format!("seed {SEED}, round {round}, step {step}: {change:?} on {state:?}");
            // Nothing here is ever over.
            let expected = apply(state, StoreTime(1), None, &change);
            let reply = answer(store.change(&key, change.clone())).unwrap_or_else(|error| panic!("{what}: {error}"));
            let after = found(&store, &key);
            match (&expected, &reply) {
                (Effect::Refused, Reply::Found(record)) => {
                    counts[0] += 1;
                    assert_same(record.as_deref().map(|record| &record.state), state, &what);
                    assert_same(after.as_ref().map(|record| &record.state), state, &what);
                }
                (Effect::Remove, Reply::Applied { .. }) => {
                    counts[1] += 1;
                    assert!(after.is_none(), "{what}");
                }
                (Effect::Put(next), Reply::Applied { fence }) => {
                    counts[2] += 1;
                    let after = after.unwrap_or_else(|| panic!("{what}: nothing is there"));
                    assert_eq!(after.state.holder, next.holder, "{what}");
                    assert!(fence.is_some() && after.fence == *fence, "{what}");
                    let before = present.as_ref().and_then(|record| record.fence).unwrap_or(0);
                    assert!(after.fence > Some(before), "{what}");
                }
                (Effect::Update(next), Reply::Applied { fence }) => {
                    counts[3] += 1;
                    let after = after.unwrap_or_else(|| panic!("{what}: nothing is there"));
                    assert_eq!(after.state.holder, next.holder, "{what}");
                    assert_eq!(
                        (after.fence, *fence),
                        (present.as_ref().and_then(|record| record.fence), after.fence),
                        "{what}"
                    );
                    assert_end(&change, state, &after.state, &what);
                }
                other => panic!("{what}: {other:?}"),
            }
            before.extend(found(&store, &key).map(|record| record.state));
        }
    }
    assert!(counts.iter().all(|count| *count > 50), "not all outcomes were tried: {counts:?}");
}

fn assert_same(one: Option<&State>, other: Option<&State>, what: &str) {
    assert_eq!(one.map(|state| &state.holder), other.map(|state| &state.holder), "{what}");
    let millis = |state: Option<&State>| state.map_or(0, |state| state.ends_at.0 / 1_000_000);
    // Of a stranger's key, Redis tells the time that is left, and the end is reckoned from that.
    assert!(millis(one).abs_diff(millis(other)) <= 50, "{what}");
}

/// Leases differ by an hour, and a test takes less.
fn assert_end(change: &Change, before: Option<&State>, after: &State, what: &str) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let lease = match &change.write {
        Write::Extend { lease, .. } | Write::Entry { lease, .. } => *lease,
        other => panic!("{what}: {other:?}"),
    };
    let stored = before.expect("it was there").ends_at.0;
    let expected = match lease {
        Lease::FromNow(length) => now + length.as_nanos() as u64,
        Lease::NotSooner(length) => stored.max(now + length.as_nanos() as u64),
        Lease::AsStored => stored,
    };
    let slack = if lease == Lease::AsStored { 2_000_000 } else { 1_000_000_000 * 600 };
    assert!(after.ends_at.0.abs_diff(expected) <= slack, "{what}: ends at {} and not {expected}", after.ends_at.0);
}

fn once() -> LockOptions {
    LockOptions::default()
}

fn within(timeout: Duration) -> LockOptions {
    LockOptions { timeout: Some(Timeout::After(timeout)), ..LockOptions::default() }
}

/// A client that gives up soon, where nothing is to be waited for.
fn hasty(url: &str) -> Result<Client, Error> {
    let timeout = Duration::from_secs(2);
    let options = ClientOptions { op_timeout: timeout, connect_timeout: timeout, ..ClientOptions::default() };
    wait(Client::open(Some(url), options))
}

fn refused(url: &str) -> (ErrorKind, String) {
    let error = hasty(url).err().unwrap_or_else(|| panic!("{url} lets us in"));
    (error.kind(), error.message().to_string())
}

fn try_lock_error(lock: &Lock) -> (ErrorKind, String) {
    let error = wait(lock.try_lock(once())).expect_err("it is an error");
    assert_eq!(lock.state(), LockState::Idle);
    (error.kind(), error.message().to_string())
}

/// A key of another type is no lock: an error that names it, and it stays as it is.
#[test]
fn data_of_another_type_is_left_alone() {
    let server = server();
    let client = client(&server.url);
    let name = fresh_key();
    cli(&server, &["hset", name.as_str(), "field", "1"]);
    let ours = lock(&client, &name);
    let (kind, message) = try_lock_error(&ours);
    assert_eq!(kind, ErrorKind::Store, "{message}");
    assert!(message.contains(name.as_str()) && message.contains("is not a string"), "{message}");
    let error = wait(client.find(&name)).unwrap_err();
    assert!(error.message().contains(name.as_str()), "{error}");
    let listed = wait(client.list(Filter::All)).unwrap();
    assert!(listed.iter().all(|record| record.key != name));
    assert_eq!(cli(&server, &["hget", name.as_str(), "field"]), "1");
}

/// What somebody else wrote is held by somebody else: it is shown without its value, and goes only by force, as it
/// was seen.
#[test]
fn foreign_values_are_held_and_hidden() {
    let server = server();
    let client = client(&server.url);
    let (lasting, brief, endless) = (fresh_key(), fresh_key(), fresh_key());
    cli(&server, &["set", lasting.as_str(), "secret token", "px", "3600000"]);
    cli(&server, &["set", brief.as_str(), "secret token", "px", "100"]);
    cli(&server, &["set", endless.as_str(), "nb2 of a later version"]);

    for name in [&lasting, &endless] {
        assert!(!wait(lock(&client, name).try_lock(once())).unwrap());
        let record = wait(client.find(name)).unwrap().unwrap();
        assert!(record.is_foreign() && record.owner.is_none());
        assert!(is_foreign_in_c(&server.url, name));
        let shown = format!("{record:?}");
        assert!(!shown.contains("secret") && !shown.contains("later version"), "{shown}");
    }
    assert!(wait(lock(&client, &brief).lock(within(PATIENCE))).unwrap(), "taken over when it has run out");
    let found = |name: &Key| wait(client.find(name)).unwrap().unwrap();
    assert!(!found(&brief).is_foreign() && !is_foreign_in_c(&server.url, &brief), "it is ours now");
    assert_eq!(found(&endless).lease, record::Lease::Endless);
    assert!(wait(client.list(Filter::Expired)).unwrap().is_empty());
    let listed = wait(client.list(Filter::All)).unwrap();
    let foreign = |record: &&Record| record.is_foreign();
    assert_eq!(listed.iter().filter(foreign).filter(|record| [&lasting, &endless].contains(&&record.key)).count(), 2);

    // Breaking what is listed, or found by a name, breaks locks, and no data of other programs.
    for record in listed.iter().filter(foreign).chain([&found(&lasting), &found(&endless)]) {
        assert_eq!(wait(client.break_seen(record)).unwrap(), Broken::Foreign);
    }

    let seen = found(&lasting);
    cli(&server, &["pexpire", lasting.as_str(), "9000000"]);
    assert_eq!(wait(client.break_foreign(&seen)).unwrap(), Broken::Changed, "it was renewed");
    let seen = found(&lasting);
    cli(&server, &["set", lasting.as_str(), "another token", "keepttl"]);
    assert_eq!(wait(client.break_foreign(&seen)).unwrap(), Broken::Changed, "it is another");
    for name in [&lasting, &endless] {
        assert_eq!(wait(client.break_foreign(&found(name))).unwrap(), Broken::Broken);
        assert!(wait(lock(&client, name).try_lock(once())).unwrap());
    }
}

/// What C's interface, which the other languages have it from, says of a record.
fn is_foreign_in_c(url: &str, key: &Key) -> bool {
    let url = CString::new(url).unwrap();
    let size = size_of::<nbl_record_t>() as u32;
    let (mut client, mut list) = (null_mut(), null_mut());
    let none = null_mut();
    // SAFETY: a URL, a key of that length, and locals that outlive the calls; of the struct every field may be zero.
    unsafe {
        assert_eq!(nbl_client_new(url.as_ptr(), null(), &mut client, none), NBL_OK);
        assert_eq!(nbl_find(client, key.as_str().as_ptr().cast(), key.as_str().len(), &mut list, none), NBL_OK);
        let mut record = nbl_record_t { struct_size: size, ..std::mem::zeroed() };
        assert_eq!(nbl_list_record(list, 0, &mut record, none), NBL_OK);
        assert_eq!(nbl_list_free(list), NBL_OK);
        assert_eq!(nbl_client_free(client), NBL_OK);
        record.foreign == 1
    }
}

/// The command marks what nblock did not write, and deletes it only with --foreign.
#[test]
fn the_command_breaks_foreign_values_only_when_told() {
    let server = server();
    let (ours, theirs) = (fresh_key(), fresh_key());
    assert!(wait(lock(&client(&server.url), &ours).try_lock(once())).unwrap());
    cli(&server, &["set", theirs.as_str(), "a visitor's basket"]);
    let nblock = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nblock"));
        command.args(["--url", &server.url]).args(arguments).output().unwrap()
    };
    let said = |arguments: &[&str]| String::from_utf8(nblock(arguments).stdout).unwrap();
    let listed = |key: &Key| said(&["list", key.as_str()]).lines().nth(1).unwrap().to_string();
    assert!(listed(&theirs).contains("  (foreign)  ") && !listed(&ours).contains("(foreign)"));
    assert!(said(&["show", theirs.as_str()]).contains("\nholder       foreign: "));
    for (key, foreign) in [(&theirs, true), (&ours, false)] {
        assert!(said(&["list", "--json", key.as_str()]).contains(&format!("\"foreign\": {foreign},")));
    }
    // A lock of another library that has no timeout is never free by itself.
    let waited = nblock(&["run", "--no-wait", theirs.as_str(), "--", "true"]);
    assert_eq!(waited.status.code(), Some(75));
    let said = String::from_utf8(waited.stderr).unwrap();
    assert!(said.contains(" is held by another program (no end), and was not granted in time"), "{said}");
    let breaks = |arguments: &[&str]| {
        let output = nblock(&[&["break"], arguments].concat());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (status, said) = breaks(&[theirs.as_str()]);
    assert!(status == Some(1) && said.contains(theirs.as_str()) && said.contains("--foreign"), "{said}");
    assert!(!said.contains("basket"), "{said}");
    let (status, said) = breaks(&["--expired"]);
    assert_eq!((status, said.as_str()), (Some(0), ""));
    assert_eq!(cli(&server, &["get", theirs.as_str()]), "a visitor's basket");
    assert_eq!(breaks(&["--foreign", theirs.as_str()]), (Some(0), String::new()));
    assert_eq!(cli(&server, &["exists", theirs.as_str()]), "0");
    assert_eq!(breaks(&[ours.as_str()]), (Some(0), String::new()), "a lock of nblock's needs no word");
}

/// A list is of the URL's prefix only, and never of counters.
#[test]
fn lists_know_their_prefix() {
    let server = server();
    let name = fresh_key();
    let prefix = format!("p*{}:", name.as_str());
    let prefixed = client(&format!("{}?prefix={prefix}", server.url));
    let ours = lock(&prefixed, &key("k"));
    assert!(wait(ours.try_lock(once())).unwrap());
    cli(&server, &["set", &format!("{prefix}theirs"), "x"]);
    cli(&server, &["set", &prefix.replace('*', "other"), "x"]);
    let mut keys: Vec<String> =
        wait(prefixed.list(Filter::All)).unwrap().iter().map(|record| record.key.as_str().to_string()).collect();
    keys.sort();
    assert_eq!(keys, ["k", "theirs"]);
    assert_eq!(cli(&server, &["exists", &format!("{prefix}k")]), "1");
    // The counter outlives the lock, and cannot be locked.
    let counter = format!("{prefix}nblock:fence:{{{prefix}k}}");
    let fence = wait(ours.fence()).unwrap();
    assert_eq!(cli(&server, &["get", &counter]), fence.to_string());
    assert!(cli(&server, &["pttl", &counter]).parse::<u64>().unwrap() > 80_000_000);
    let (kind, message) = try_lock_error(&lock(&prefixed, &key("nblock:fence:{k}")));
    assert!(kind == ErrorKind::Store && message.contains("the store's own"), "{message}");
}

/// A fence grows although the server's clock, or another counter, is behind the last one.
#[test]
fn fences_grow_over_a_clock_that_is_behind() {
    let server = server();
    let client = client(&server.url);
    let name = fresh_key();
    let counter = format!("nblock:fence:{{{}}}", name.as_str());
    let ahead = 5_000_000_000_000_000_u64;
    cli(&server, &["set", &counter, &ahead.to_string()]);
    for next in 1..=3 {
        let ours = lock(&client, &name);
        assert!(wait(ours.try_lock(once())).unwrap());
        assert_eq!(wait(ours.fence()).unwrap(), ahead + next);
        wait(ours.unlock()).unwrap();
    }
}

/// The first request of a connection carries the text of its script: it is applied also if the caller gives it up.
#[test]
fn a_server_that_knows_no_script_yet_applies_what_nobody_waits_for() {
    let server = Server::start("redis", &[]);
    let (store, key) = (open(&server.url).unwrap(), fresh_key());
    let change = nblock::protocol::Acquisition::plain(HoldId::random(), LONG, identity()).ask().1;
    drop(store.change(&key, change));
    eventually("it is applied", || found(&store, &key).is_some());
}

/// A server that has forgotten its scripts is sent them again.
#[test]
fn scripts_that_were_flushed_are_sent_again() {
    let server = Server::start("redis", &[]);
    let client = client(&server.url);
    let ours = lock(&client, &fresh_key());
    for _ in 0..3 {
        assert!(wait(ours.try_lock(once())).unwrap());
        cli(&server, &["script", "flush"]);
        wait(ours.refresh(None)).unwrap();
        cli(&server, &["script", "flush"]);
        wait(ours.unlock()).unwrap();
        cli(&server, &["script", "flush"]);
    }
}

#[test]
fn wrong_servers_and_passwords_are_refused_in_words() {
    let server = Server::start("redis", &["--requirepass", "hunter2"]);
    let at = |account: &str| format!("redis://{account}127.0.0.1:{}", server.port);
    for (account, part) in [("", "requires a password"), (":wrong@", "was denied access"), ("bob:hunter2@", "\"bob\"")]
    {
        let (kind, message) = refused(&at(account));
        assert!(kind == ErrorKind::Denied && message.contains(part), "{message}");
        assert!(!message.contains("hunter2") && !message.contains(":wrong"), "{message}");
    }
    for account in [":hunter2@", "default:hunter2@"] {
        assert!(wait(lock(&client(&at(account)), &fresh_key()).try_lock(once())).unwrap());
    }
    let (kind, message) = refused(&format!("{}/99", at(":hunter2@")));
    assert!(kind == ErrorKind::Store && message.contains("database 99"), "{kind:?} {message}");

    let cluster = Server::start("redis", &["--cluster-enabled", "yes"]);
    let (kind, message) = refused(&cluster.url);
    assert!(kind == ErrorKind::Store && message.contains("Redis Cluster"), "{kind:?} {message}");

    // Something else that answers.
    for (answer, part) in
        [("HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak the Redis protocol"), ("-ERR unknown command\r\n", "6.0")]
    {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = std::io::Read::read(&mut stream, &mut [0; 1024]);
                let _ = std::io::Write::write_all(&mut stream, answer.as_bytes());
            }
        });
        let (kind, message) = refused(&format!("redis://127.0.0.1:{port}"));
        assert!(kind == ErrorKind::Store && message.contains(part), "{kind:?} {message}");
    }
}

/// A memory that is full is an error that says so, and the lock is not granted.
#[test]
fn a_full_memory_is_told() {
    let server = Server::start("redis", &[]);
    let client = client(&server.url);
    let name = fresh_key();
    cli(&server, &["config", "set", "maxmemory", "1"]);
    let ours = lock(&client, &name);
    let (kind, message) = try_lock_error(&ours);
    assert!(kind == ErrorKind::Resources && message.contains("maxmemory"), "{kind:?} {message}");
    cli(&server, &["config", "set", "maxmemory", "0"]);
    assert!(wait(client.find(&name)).unwrap().is_none());
    assert!(wait(ours.try_lock(once())).unwrap());
}

/// What is held stays held, is renewed, counted and released while the memory is full.
#[test]
fn a_full_memory_ends_no_hold() {
    let server = Server::start("redis", &[]);
    let client = client(&server.url);
    let plain = lock(&client, &fresh_key());
    let reentrant = client.reentrant_lock(fresh_key(), None, once()).unwrap();
    assert!(wait(plain.try_lock(once())).unwrap());
    for _ in 0..3 {
        assert!(wait(reentrant.try_lock(once())).unwrap());
    }
    let count = || match wait(client.find(reentrant.key())).unwrap()?.state.holder {
        Holder::Reentrant { count, .. } => Some(count),
        other => panic!("{other:?}"),
    };
    cli(&server, &["config", "set", "maxmemory", "1"]);
    let longer = Some(Duration::from_secs(600));
    wait(plain.refresh(longer)).unwrap();
    wait(reentrant.refresh(longer)).unwrap();
    for held in [&plain, &reentrant] {
        let left = wait(client.find(held.key())).unwrap().expect("it is held").lease.remaining();
        assert!(left > Duration::from_secs(500), "{left:?}");
    }
    wait(reentrant.unlock()).unwrap();
    assert_eq!(count(), Some(2));
    wait(reentrant.unlock()).unwrap();
    wait(reentrant.unlock()).unwrap();
    wait(plain.unlock()).unwrap();
    assert_eq!(count(), None);
    assert_eq!(cli(&server, &["keys", "*"]).lines().filter(|name| !name.contains("fence")).count(), 0);
}

/// A release that the server refuses because it cannot save its data is sent again until it can.
#[test]
fn a_release_outlasts_a_server_that_cannot_save() {
    let server = Server::start("redis", &["--enable-protected-configs", "yes", "--save", "3600 1000000"]);
    let name = fresh_key();
    let client = client(&server.url);
    let held = lock(&client, &name);
    assert!(wait(held.try_lock(once())).unwrap());
    let place = cli(&server, &["config", "get", "dir"]).lines().nth(1).unwrap().to_string();
    let save = |place: &str, status: &str| {
        cli(&server, &["config", "set", "dir", place]);
        cli(&server, &["bgsave"]);
        eventually("it was tried", || {
            cli(&server, &["info", "persistence"]).contains(&format!("rdb_last_bgsave_status:{status}"))
        });
    };
    save("/proc", "err");
    let (kind, message) = try_lock_error(&lock(&client, &fresh_key()));
    assert!(kind == ErrorKind::Resources && message.contains("MISCONF"), "{kind:?} {message}");
    let releasing = held.unlock();
    let thread = std::thread::spawn(move || wait(releasing));
    save(&place, "ok");
    thread.join().unwrap().unwrap();
    assert!(wait(client.find(&name)).unwrap().is_none());
}

/// The server repeats the arguments of a command that it does not know; the password is one of them.
#[test]
fn a_server_that_repeats_the_password_is_not_quoted() {
    let server = Server::start("redis", &["--rename-command", "HELLO", ""]);
    let (kind, message) = refused(&format!("redis://user:s3cret@127.0.0.1:{}", server.port));
    assert!(kind != ErrorKind::Denied && message.contains("RESP3"), "{kind:?} {message}");
    assert!(!message.contains("s3cret"), "{message}");
}

/// A counter of one store is no lock of another, whatever their prefixes are.
#[test]
fn counters_are_no_locks_of_other_prefixes() {
    let server = Server::start("redis", &[]);
    let counted = lock(&client(&format!("{}?prefix=app:", server.url)), &key("jobs"));
    assert!(wait(counted.try_lock(once())).unwrap());
    for (prefix, name) in [("", "app:nblock:fence:{app:jobs}"), ("app:nblock:", "fence:{app:jobs}")] {
        let client = client(&format!("{}?prefix={prefix}", server.url));
        let (kind, message) = try_lock_error(&lock(&client, &key(name)));
        assert!(kind == ErrorKind::Store && message.contains("nblock:fence:"), "{kind:?} {message}");
    }
    let names: Vec<_> = wait(client(&server.url).list(Filter::All)).unwrap();
    assert_eq!(names.len(), 1, "{names:?}");
}

/// A user that may ask for tracking but not for single keys: waiters poll at once, and not after the safety check.
#[test]
fn half_of_tracking_is_none() {
    let server = Server::start("redis", &[]);
    cli(&server, &["acl", "setuser", "half", "on", ">secret", "~*", "+@all", "-client|caching"]);
    let url = format!("redis://half:secret@127.0.0.1:{}", server.port);
    let stores = [open(&url).unwrap(), open(&server.url).unwrap()];
    let [half, whole] = stores.map(|store| {
        answer(store.ping()).unwrap();
        store.safety_check(Duration::ZERO)
    });
    assert!(half <= Duration::from_millis(100) && whole > half, "{half:?} {whole:?}");
}

/// The words of a refusal are the remedy: a user with just those commands and keys can do everything.
#[test]
fn a_user_with_just_what_is_needed() {
    let server = Server::start("redis", &[]);
    let acl = |rules: &str| {
        let mut words = vec!["acl", "setuser"];
        words.extend(rules.split_whitespace());
        cli(&server, &words);
    };
    acl("locker on >secret ~other:* +hello +select +ping +time +info +client|tracking +client|caching");
    let url = format!("redis://locker:secret@127.0.0.1:{}?prefix=app:", server.port);
    let ours = lock(&client(&url), &key("jobs"));
    let (kind, message) = try_lock_error(&ours);
    assert!(kind == ErrorKind::Denied && message.contains("evalsha"), "{kind:?} {message}");
    let remedy = message.split("ACL SETUSER ").nth(1).expect("it says what to do");
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/redis.md")).unwrap();
    let commands = remedy.split(" ~").next().unwrap().strip_prefix("locker ").unwrap();
    let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flat(&page.replace('\\', " ")).contains(&flat(commands)), "docs/redis.md does not name {commands}");

    // Commands, but no keys.
    acl(&format!("locker {commands}"));
    let (kind, message) = try_lock_error(&ours);
    assert!(kind == ErrorKind::Denied && message.contains("jobs"), "{kind:?} {message}");
    acl(remedy);
    let one = client(&url);
    assert!(wait(ours.try_lock(LockOptions { fence: Some(true), ..once() })).unwrap());
    wait(ours.refresh(None)).unwrap();
    assert_eq!(wait(one.list(Filter::All)).unwrap().len(), 1);
    assert!(wait(one.find(&key("jobs"))).unwrap().is_some());
    assert!(wait(one.ping()).unwrap().caveats.iter().all(|caveat| !caveat.contains("NOPERM")));
    let second = lock(&client(&format!("{url}&skew=1")), &key("jobs"));
    let waiting = second.lock(within(PATIENCE));
    wait(ours.unlock()).unwrap();
    assert!(wait(waiting).unwrap());
    wait(second.unlock()).unwrap();
    let log = cli(&server, &["acl", "log"]);
    assert!(log.contains("evalsha"), "{log}");
    let reentrant = one.reentrant_lock(key("jobs"), Some("o"), once()).unwrap();
    assert!(wait(reentrant.try_lock(once())).unwrap() && wait(reentrant.try_lock(once())).unwrap());
    wait(reentrant.unlock()).unwrap();
    wait(reentrant.unlock()).unwrap();
}

/// A server that becomes a replica is left, and asked again when it is a primary once more.
#[test]
fn a_server_that_becomes_a_replica_is_left() {
    let (primary, other) = (Server::start("redis", &[]), Server::start("redis", &[]));
    let client = hasty(&primary.url).unwrap();
    let ours = lock(&client, &fresh_key());
    assert!(wait(ours.try_lock(once())).unwrap());
    wait(ours.unlock()).unwrap();
    cli(&primary, &["replicaof", "127.0.0.1", &other.port.to_string()]);
    let (kind, message) = try_lock_error(&ours);
    assert_eq!(kind, ErrorKind::Unreachable, "{message}");
    let (kind, message) = refused(&format!("{}?poll=100", primary.url));
    assert!(kind == ErrorKind::Unreachable && message.contains("is a replica"), "{kind:?} {message}");
    cli(&primary, &["replicaof", "no", "one"]);
    assert!(wait(ours.lock(within(PATIENCE))).unwrap());

    // Of two hosts, the one that is the primary is taken.
    cli(&primary, &["replicaof", "127.0.0.1", &other.port.to_string()]);
    let both = format!("redis://127.0.0.1:{},127.0.0.1:{}", primary.port, other.port);
    assert!(wait(lock(&self::client(&both), &fresh_key()).lock(within(PATIENCE))).unwrap());
}

#[test]
fn caveats_are_named() {
    let server = Server::start("redis", &[]);
    let client = client(&server.url);
    let caveats = || wait(client.ping()).unwrap().caveats.join("; ");
    assert!(caveats().contains("saves nothing to disk"), "{}", caveats());
    cli(&server, &["config", "set", "maxmemory", "1gb"]);
    cli(&server, &["config", "set", "maxmemory-policy", "allkeys-lru"]);
    assert!(caveats().contains("allkeys-lru"), "{}", caveats());
    cli(&server, &["config", "set", "maxmemory-policy", "noeviction"]);
    cli(&server, &["config", "set", "appendonly", "yes"]);
    assert_eq!(caveats(), "");
    let pong = wait(client.ping()).unwrap();
    assert!(pong.server.starts_with("Redis ") && pong.server.contains(&server.port.to_string()), "{}", pong.server);
    assert!(pong.skew_ms.is_some_and(|skew| skew.abs() < 1000), "{:?}", pong.skew_ms);
}

/// Unix sockets, databases, and Valkey's name for the same.
#[test]
fn other_ways_in() {
    let server = server();
    let name = fresh_key();
    let socket = server.socket.as_ref().unwrap().display().to_string();
    let held = lock(&client(&format!("redis+unix:{socket}?db=3")), &name);
    assert!(wait(held.try_lock(once())).unwrap());
    assert!(
        !wait(lock(&client(&format!("{}/3", server.url.replace("redis:", "valkey:"))), &name).try_lock(once()))
            .unwrap()
    );
    assert!(wait(lock(&client(&server.url), &name).try_lock(once())).unwrap(), "another database");
}

/// Waiters without tracking look now and then.
#[test]
fn waiting_without_being_told() {
    let server = server();
    let client = client(&format!("{}?notify=off&poll=20", server.url));
    let name = fresh_key();
    let held = lock(&client, &name);
    assert!(wait(held.try_lock(once())).unwrap());
    // Another store: nothing in this process tells it.
    let other = lock(&self::client(&format!("{}?notify=off&poll=21", server.url)), &name);
    let waiting = other.lock(within(PATIENCE));
    let thread = std::thread::spawn(move || wait(waiting));
    wait(held.unlock()).unwrap();
    assert!(thread.join().unwrap().unwrap());
}

/// R10: losing the connection that tells of changes is a change.
#[test]
fn waiters_outlast_their_connection() {
    let server = Server::start("redis", &[]);
    let (holder, waiter) = (client(&server.url), client(&format!("{}?skew=3", server.url)));
    let name = fresh_key();
    let held = lock(&holder, &name);
    assert!(wait(held.try_lock(once())).unwrap());
    let waiting = lock(&waiter, &name);
    let asked = waiting.lock(within(PATIENCE));
    let thread = std::thread::spawn(move || wait(asked));
    eventually("the waiter is there", || cli(&server, &["client", "list"]).contains("cmd=pttl"));
    cli(&server, &["client", "kill", "type", "normal"]);
    eventually("it is given back", || wait(held.unlock()).is_ok() || held.state() == LockState::Idle);
    assert!(thread.join().unwrap().unwrap());
}

/// What was never sent is not in doubt: the error says that nothing was applied, and why.
#[test]
fn without_a_server_nothing_is_in_doubt() {
    let mut server = Server::start("redis", &[]);
    let options = ClientOptions { op_timeout: Duration::from_secs(1), ..ClientOptions::default() };
    let client = wait(Client::open(Some(&server.url), options)).unwrap();
    let locks: Vec<_> = (0..8).map(|_| lock(&client, &fresh_key())).collect();
    locks.iter().for_each(|lock| assert!(wait(lock.try_lock(LockOptions::default())).unwrap()));
    server.kill();
    // The end of the connection is noticed by a request that may have been sent.
    eventually("it is gone", || matches!(wait(client.ping()), Err(error) if error.kind() == ErrorKind::Unreachable));
    std::thread::scope(|scope| {
        for lock in &locks {
            scope.spawn(|| {
                let error = wait(lock.refresh(None)).expect_err("there is no server");
                assert_eq!(error.kind(), ErrorKind::Unreachable, "{}", error.message());
                assert!(error.message().contains("Connection refused"), "{}", error.message());
            });
        }
    });
}

/// R16: a lock works in a forked child, by a connection of its own, and the parent notices nothing.
#[test]
fn a_forked_child_connects_anew() {
    let server = server();
    let name = fresh_key();
    let mut parent = Actor::start("redis fork", &[&server.url, name.as_str()]);
    assert_eq!(parent.says(), "well");
    parent.kill();
}

pub fn forked(url: &str, name: &str) {
    let client = client(url);
    let (held, idle) = (lock(&client, &key(name)), lock(&client, &key(&format!("{name}:idle"))));
    let renewed = LockOptions { auto_refresh: Some(true), expire: Some(Duration::from_millis(600)), ..once() };
    assert!(wait(held.try_lock(renewed)).unwrap());
    // SAFETY: the child runs this thread alone, and ends by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: sets a timer that ends this process.
        unsafe { libc::alarm(30) };
        let well = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            assert!(wait(idle.try_lock(once())).unwrap());
            assert_eq!(wait(held.unlock()).unwrap_err().kind(), ErrorKind::Forked);
            assert!(!wait(held.try_lock(once())).unwrap(), "it is the parent's");
            wait(idle.unlock()).unwrap();
        }));
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(i32::from(well.is_err())) };
    }
    let mut status = 0;
    // SAFETY: writes one integer.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child found something wrong");
    let until = Boottime::now() + Duration::from_secs(1);
    while !until.has_passed() {
        assert_eq!(held.state(), LockState::Held, "renewals of the parent go on");
        std::thread::sleep(Duration::from_millis(10));
    }
    wait(held.unlock()).unwrap();
    assert!(wait(idle.try_lock(once())).unwrap());
    say("well");
    wait_for_the_end();
}

/// Sentinels say who the primary is; after a failover it is another, and the same client goes on with that one.
#[test]
fn sentinels_name_the_primary() {
    let mut primary = Server::start("redis", &[]);
    let port = primary.port.to_string();
    let replica = Server::start("redis", &["--replicaof", "127.0.0.1", &port]);
    let options = ["sentinel down-after-milliseconds nblock 500", "sentinel failover-timeout nblock 5000"];
    let sentinel = Server::before(primary.port, "sentinel", &options);
    eventually("the sentinel knows the replica", || {
        cli(&sentinel, &["sentinel", "replicas", "nblock"]).contains(&replica.port.to_string())
    });
    eventually("the replica follows", || cli(&replica, &["info", "replication"]).contains("master_link_status:up"));

    let (kind, message) = refused(&format!("redis://127.0.0.1:{}", sentinel.port));
    assert!(kind == ErrorKind::Store && message.contains("is a sentinel"), "{message}");
    let (kind, message) = refused(&format!("redis+sentinel://127.0.0.1:{}/other", sentinel.port));
    assert!(kind == ErrorKind::Store && message.contains("no primary named \"other\""), "{message}");
    let (kind, message) = refused(&format!("redis+sentinel://127.0.0.1:{}/nblock", primary.port));
    assert!(kind == ErrorKind::Store && message.contains("not a sentinel"), "{message}");

    let url = format!("redis+sentinel://127.0.0.1:{}/nblock", sentinel.port);
    let client = client(&url);
    let (held, waiting) = (lock(&client, &fresh_key()), lock(&self::client(&format!("{url}?skew=251")), &fresh_key()));
    assert!(wait(held.try_lock(once())).unwrap());
    assert!(wait(client.ping()).unwrap().server.contains(&port));
    assert!(client.location().unwrap().contains("/nblock"));
    eventually("the replica has it", || cli(&replica, &["exists", held.key().as_str()]) == "1");
    primary.kill();
    // What waits outlasts the time without a primary; what was replicated is held still.
    assert!(wait(waiting.lock(within(PATIENCE))).unwrap());
    assert!(wait(client.ping()).unwrap().server.contains(&replica.port.to_string()));
    wait(held.refresh(None)).unwrap();
    wait(held.unlock()).unwrap();

    // The former primary comes back, is made a replica, and is not asked.
    primary.restart(&[]);
    assert!(wait(held.lock(within(PATIENCE))).unwrap());
    assert_eq!(cli(&replica, &["exists", held.key().as_str()]), "1");
}

fn certificate(name: &str) -> String {
    format!("{}/../tests/rethinkdb/certificates/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A server's port for TLS. Another program may take it in between: then the next one is tried.
fn with_tls(clients: &str) -> (Server, u16) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (pem, key, authority) = (certificate("server.pem"), certificate("server.key"), certificate("authority.pem"));
    let options = ["--tls-port", &port.to_string(), "--tls-cert-file", &pem, "--tls-key-file", &key];
    let options = [&options[..], &["--tls-ca-cert-file", &authority, "--tls-auth-clients", clients]].concat();
    (Server::start("redis", &options), port)
}

#[test]
fn tls_checks_the_certificate() {
    let (server, port) = with_tls("no");
    let ca = certificate("authority.pem");
    let url = format!("rediss://localhost:{port}?ca={ca}");
    let name = fresh_key();
    let ours = lock(&client(&url), &name);
    assert!(wait(ours.try_lock(once())).unwrap());
    assert!(!wait(lock(&client(&server.url), &name).try_lock(once())).unwrap(), "it is the same server");
    let waiting = lock(&client(&format!("{url}&skew=1")), &name);
    let asked = waiting.lock(within(PATIENCE));
    let thread = std::thread::spawn(move || wait(asked));
    wait(ours.unlock()).unwrap();
    assert!(thread.join().unwrap().unwrap());

    let (kind, message) = refused(&format!("rediss://localhost:{port}?ca={}", certificate("stranger.pem")));
    assert!(kind == ErrorKind::Store && message.contains("not signed by a CA"), "{message}");
    let (kind, message) = refused(&format!("rediss://localhost:{}?ca={ca}", server.port));
    assert_ne!(kind, ErrorKind::Internal, "{message}");
}

#[test]
fn tls_with_a_client_s_certificate() {
    let (_server, port) = with_tls("yes");
    let url = format!("rediss://localhost:{port}?ca={}", certificate("authority.pem"));
    let account = format!("&cert={}&key={}", certificate("client.pem"), certificate("client.key"));
    assert!(wait(lock(&client(&format!("{url}{account}")), &fresh_key()).try_lock(once())).unwrap());
    let (_, message) = refused(&url);
    assert!(message.contains("cert="), "{message}");
}

/// Answers that no Redis gives: never a grant.
#[test]
fn an_answer_of_another_shape_is_no_grant() {
    for (answer, kind) in [
        ("+OK\r\n", ErrorKind::Indeterminate),
        ("*0\r\n", ErrorKind::Indeterminate),
        ("$2\r\nOK\r\n", ErrorKind::Indeterminate),
        ("$1\r\n0\r\n", ErrorKind::Indeterminate),
        ("$-1\r\n", ErrorKind::Indeterminate),
        ("*2\r\n+OK\r\n+OK\r\n", ErrorKind::Indeterminate),
        ("*3\r\n:1\r\n:1\r\n:1\r\n", ErrorKind::Indeterminate),
        ("-ERR who knows\r\n", ErrorKind::Store),
        ("-LOADING Redis is loading the dataset in memory\r\n", ErrorKind::Unreachable),
        ("-MISCONF Redis is configured to save RDB snapshots\r\n", ErrorKind::Resources),
        ("HTTP/1.1 200 OK\r\n", ErrorKind::Indeterminate),
    ] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("redis://127.0.0.1:{}", listener.local_addr().unwrap().port());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || scripted(&mut stream, answer));
            }
        });
        let options = ClientOptions { op_timeout: Duration::from_secs(1), ..ClientOptions::default() };
        let client = wait(Client::open(Some(&url), options)).unwrap();
        let ours = lock(&client, &fresh_key());
        let error = wait(ours.try_lock(once())).expect_err(answer);
        assert_eq!(error.kind(), kind, "{answer:?}: {error}");
        assert_eq!(ours.state(), LockState::Idle);
    }
}

/// A server that greets as Redis does, and answers every script alike.
fn scripted(stream: &mut std::net::TcpStream, answer: &str) {
    use std::io::{BufRead, BufReader, Write};
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    while let Some(head) = lines.next() {
        let count: usize = head.trim_start_matches('*').parse().unwrap();
        let words: Vec<String> = (0..count).filter_map(|_| lines.nth(1)).collect();
        let time = "*2\r\n$10\r\n1790000000\r\n$1\r\n0\r\n";
        let said = match words.first().map(String::as_str) {
            Some("HELLO") => "%2\r\n+mode\r\n+standalone\r\n+role\r\n+master\r\n",
            Some("TIME") => time,
            Some("INFO" | "CONFIG") => "-NOPERM no\r\n",
            Some("CLIENT") => "+OK\r\n",
            Some("PING") => "+PONG\r\n",
            _ => answer,
        };
        if stream.write_all(said.as_bytes()).is_err() {
            return;
        }
    }
}

/// What one worker had: from when to when it knew the lock to be its own.
#[derive(Clone, Copy, Debug)]
struct Had {
    from: Boottime,
    to: Boottime,
}

/// A failover can forget a lock that is held, and nothing else can give it to two: of two holds that overlap, one was
/// granted before it and one after.
#[test]
fn only_a_failover_gives_a_lock_to_two() {
    const WORKERS: u32 = 4;
    const GRANTS: usize = 300;
    let mut primary = Server::start("redis", &[]);
    let replica = Server::start("redis", &["--replicaof", "127.0.0.1", &primary.port.to_string()]);
    let options = ["sentinel down-after-milliseconds nblock 500", "sentinel failover-timeout nblock 5000"];
    let sentinel = Server::before(primary.port, "sentinel", &options);
    eventually("the sentinel knows the replica", || {
        cli(&sentinel, &["sentinel", "replicas", "nblock"]).contains(&replica.port.to_string())
    });
    eventually("the replica follows", || cli(&replica, &["info", "replication"]).contains("master_link_status:up"));
    let name = fresh_key();
    let had = Mutex::new(Vec::<Had>::new());
    let enough = std::sync::atomic::AtomicBool::new(false);
    let count = || had.lock().unwrap().len();
    let (before, after) = std::thread::scope(|scope| {
        for number in 0..WORKERS {
            // Another option, another store: each has a connection of its own.
            let url = format!("redis+sentinel://127.0.0.1:{}/nblock?skew={}", sentinel.port, 20 + number);
            let (name, had, enough) = (&name, &had, &enough);
            scope.spawn(move || {
                let ours = lock(&client(&url), name);
                let expire = Some(Duration::from_millis(600));
                let options = LockOptions { expire, auto_refresh: Some(true), ..within(Duration::from_secs(1)) };
                while !enough.load(std::sync::atomic::Ordering::Relaxed) {
                    // Without a primary that is an error, and tried again.
                    if !matches!(wait(ours.lock(options)), Ok(true)) {
                        continue;
                    }
                    let from = Boottime::now();
                    let mut to = from;
                    let until = from + Duration::from_millis(5);
                    while !until.has_passed() {
                        let now = Boottime::now();
                        if ours.state() != LockState::Held {
                            break;
                        }
                        to = now;
                    }
                    had.lock().unwrap().push(Had { from, to });
                    let _ = wait(ours.unlock());
                }
            });
        }
        eventually("there are grants", || count() >= GRANTS);
        let before = Boottime::now();
        primary.kill();
        let after = Boottime::now();
        let so_far = count();
        eventually("there are grants after the failover", || count() >= so_far + GRANTS);
        enough.store(true, std::sync::atomic::Ordering::Relaxed);
        (before, after)
    });
    assert!(cli(&replica, &["info", "replication"]).contains("role:master"), "no failover took place");
    let mut had = had.into_inner().unwrap();
    had.sort_by_key(|had| had.from);
    let mut overlaps = 0;
    for (index, one) in had.iter().enumerate() {
        for other in had[index + 1..].iter().take_while(|other| other.from < one.to) {
            overlaps += 1;
            assert!(one.from <= after && before <= other.from, "{one:?} and {other:?} overlap");
        }
    }
    println!("{} holds, {overlaps} overlaps across the failover", had.len());
}

/// A grant whose operation is cancelled before it is reported is released, and the lock can be taken again at once:
/// while the release is under way, the lock is not in use.
#[test]
fn a_lock_can_be_taken_again_after_an_unreported_grant_was_cancelled() {
    let server = server();
    let (url, key) = (CString::new(&*server.url).unwrap(), fresh_key());
    let text = CString::new(key.as_str()).unwrap();
    let (mut client, mut lock) = (null_mut(), null_mut());
    // SAFETY: every pointer is a text that lives, a place of this function, or NULL where that is fine.
    unsafe {
        assert_eq!(nbl_client_new(url.as_ptr(), null(), &mut client, null_mut()), NBL_OK);
        assert_eq!(nbl_lock_new(client, text.as_ptr(), NBL_CSTR, null(), &mut lock, null_mut()), NBL_OK);
        for _ in 0..50 {
            let mut granted = null_mut();
            assert_eq!(nbl_lock_start(lock, null(), &mut granted, null_mut()), NBL_OK);
            let mut polled = libc::pollfd { fd: nbl_op_fd(granted), events: libc::POLLIN, revents: 0 };
            assert_eq!(libc::poll(&mut polled, 1, -1), 1);
            assert_eq!(nbl_op_cancel(granted), NBL_OK);
            assert_eq!(nbl_op_finish(granted, null_mut()), NBL_CANCELLED);
            nbl_op_free(granted);
            assert_eq!(nbl_try_lock(lock, null(), null_mut()), NBL_OK, "the release was sent before");
            assert_eq!(nbl_unlock(lock, null_mut()), NBL_OK);
        }
        nbl_lock_free(lock);
        nbl_client_free(client);
    }
}
