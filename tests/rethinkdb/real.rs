//! What only a real RethinkDB server can show. Run where `NBLOCK_TEST_RETHINKDB_URL` names one; named as
//! skipped otherwise. Several servers of a cluster are written as hosts of the one URL.
//!
//! `workers_share_a_file` is the one to run while servers are killed, stopped or cut off: see
//! docs/rethinkdb-runs.md. `NBLOCK_TEST_WORKERS` and `NBLOCK_TEST_ROUNDS` make it longer.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::key::Key;
use nblock::lock::LockState;
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::protocol::{Acquisition, Change, Condition, Proof, Renewal, Renewed, Reply, Verdict};
use nblock::record::Identity;
use nblock::store::{Answer, StoreError, StoreOptions};
use nblock::stores;
use nblock::sys::runtime::{block_on, wait};
use nblock::token::{HoldId, Token};
use nblock::url::Url;

const URL: &str = "NBLOCK_TEST_RETHINKDB_URL";
const WORK: &str = "NBLOCK_TEST_WORK";

/// The server's URL with more options, or `None` where there is none.
fn url(test: &str, options: &str) -> Option<String> {
    match std::env::var(URL).ok().filter(|url| !url.is_empty()) {
        Some(url) => Some(format!("{url}{}{options}", if url.contains('?') { '&' } else { '?' })),
        None => {
            println!("SKIPPED rethinkdb-{test}: {URL} is not set");
            None
        }
    }
}

fn number(name: &str, default: u32) -> u32 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What a store answered; the thread waits for it.
fn answer<T>(answer: Answer<T>) -> Result<T, StoreError> {
    block_on(answer.get()).expect("the runtime starts")
}

fn unique() -> u64 {
    Boottime::now().as_nanos()
}

fn open(url: &str, timeout: Duration) -> Client {
    let options = ClientOptions { op_timeout: timeout, connect_timeout: timeout, ..ClientOptions::default() };
    wait(Client::open(Some(url), options)).unwrap()
}

/// The URL with its hosts in another order: a client that has several asks them all.
fn another_host_first(url: &str, number: usize) -> String {
    let start = url.find('@').or(url.find("//").map(|at| at + 1)).unwrap() + 1;
    let end = start + url[start..].find('/').unwrap();
    let mut hosts: Vec<&str> = url[start..end].split(',').collect();
    let count = hosts.len();
    hosts.rotate_left(number % count);
    format!("{}{}{}", &url[..start], hosts.join(","), &url[end..])
}

/// Clients that lock at the same moment on a table that is not there end up with one table, and exclude
/// each other on it.
#[test]
fn creation_is_raced_safely() {
    const CLIENTS: u32 = 4;
    for round in 0..number("NBLOCK_TEST_CREATIONS", 3) {
        let Some(url) = url("creation", &format!("table=race_{}_{round}", unique())) else { return };
        // Other options, other stores: each has a connection of its own.
        let urls: Vec<String> = (0..CLIENTS)
            .map(|number| format!("{}&skew={}", another_host_first(&url, number as usize), 100 + number))
            .collect();
        let start = Barrier::new(CLIENTS as usize);
        let granted: usize = std::thread::scope(|scope| {
            let (start, urls) = (&start, &urls);
            let ask = |url: &String| {
                let client = open(url, Duration::from_secs(60));
                let lock = client.lock(Key::new(b"k").unwrap(), LockOptions::default()).unwrap();
                start.wait();
                let granted = wait(lock.try_lock(LockOptions::default())).unwrap();
                (lock, granted)
            };
            let threads: Vec<_> = urls.iter().map(|url| scope.spawn(move || ask(url))).collect();
            let asked: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            // All are still held here: nobody was granted what another had just released.
            asked.iter().filter(|(_, granted)| *granted).count()
        });
        assert_eq!(granted, 1, "round {round}: in one table there is one holder");
    }
}

/// On a table that is not there, a lock that does not wait is granted: opening the client makes the table, with a
/// replica on each of up to three servers.
#[test]
fn a_fresh_table_is_ready_for_a_lock_that_does_not_wait() {
    let Some(url) = url("fresh", &format!("table=fresh_{}", unique())) else { return };
    let client = open(&url, Duration::from_secs(60));
    let lock = client.lock(Key::new(b"k").unwrap(), LockOptions::default()).unwrap();
    let no_wait = LockOptions { timeout: Some(Timeout::NoWait), ..LockOptions::default() };
    assert!(wait(lock.lock(no_wait)).unwrap());
    wait(lock.unlock()).unwrap();
    assert_eq!(wait(client.ping()).unwrap().caveats, Vec::<String>::new());
}

/// Rows that go while they are renewed, many in one request, are found gone by themselves: the request does
/// not fail for the others.
#[test]
fn rows_go_while_many_are_renewed() {
    const ROWS: u32 = 200;
    let Some(url) = url("vanishing", "table=vanishing&durability=soft") else { return };
    let patience = Duration::from_secs(60);
    let options = StoreOptions { op_timeout: patience, connect_timeout: patience };
    // Other options, other stores: each has a connection of its own.
    let open = |skew: u32| stores::open(&Url::parse(&format!("{url}&skew={skew}")).unwrap(), &options).unwrap();
    let (store, theirs) = (open(100), open(101));
    let identity = Arc::new(Identity { host: "h".into(), pid: 1, boot_id: "b".into(), app: "a".into() });
    let expire = Duration::from_secs(3600);
    let number = unique();
    let keys: Vec<Key> =
        (0..ROWS).map(|row| Key::new(format!("vanishing:{number}:{row}").as_bytes()).unwrap()).collect();
    let release = |token| Change::new(Condition::Mine(Proof::Token(token)), nblock::protocol::Write::Delete);
    for round in 0..u64::from(self::number("NBLOCK_TEST_VANISHINGS", 5)) {
        let asked: Vec<_> = keys
            .iter()
            .map(|key| {
                let mut acquisition = Acquisition::plain(HoldId::random(), expire, Arc::clone(&identity));
                let (asked, change) = acquisition.ask();
                let reply = store.change(key, change.until(Boottime::now() + patience));
                (acquisition, asked, reply)
            })
            .collect();
        let mut holds: Vec<(&Key, Token)> = Vec::new();
        for (key, (mut acquisition, asked, reply)) in keys.iter().zip(asked) {
            match acquisition.read(asked, answer(reply).unwrap()) {
                Verdict::Granted(granted) => holds.push((key, granted.token.expect("a plain hold has a token"))),
                other => panic!("round {round}: {other:?}"),
            }
        }
        let renewal = |token| Renewal { proof: Proof::Token(token), expire, write_seq: 2 };
        let renewals = holds.iter().map(|(key, token)| (Key::clone(key), renewal(*token).change()));
        let renewed = store.change_many(renewals.collect());
        // Every second one is deleted meanwhile, by another connection.
        let deleted: Vec<_> = holds.iter().step_by(2).map(|(key, token)| theirs.change(key, release(*token))).collect();
        let renewed = answer(renewed).unwrap();
        for deleted in deleted {
            assert!(matches!(answer(deleted).unwrap(), Reply::Applied { .. }));
        }
        for (index, reply) in renewed.iter().enumerate() {
            let reply = reply.as_ref().unwrap_or_else(|error| panic!("round {round}: row {index}: {error}"));
            match renewal(holds[index].1).read(reply) {
                Renewed::Ours { applied: true } => {}
                Renewed::Lost if index % 2 == 0 => {}
                other => panic!("round {round}: row {index}: {other:?}"),
            }
        }
        for (key, token) in &holds {
            answer(store.change(key, release(*token))).unwrap();
        }
    }
}

/// Processes read a number from a file and write it back one higher, under one lock. What was done inside a
/// hold's deadline must all be there, and the fences must grow.
#[test]
fn workers_share_a_file() {
    let workers = number("NBLOCK_TEST_WORKERS", 4);
    let rounds = number("NBLOCK_TEST_ROUNDS", 50);
    let Some(url) = url("workers", "") else { return };
    let directory = std::env::temp_dir().join(format!("nblock-workers-{}", unique()));
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("counter"), "0").unwrap();
    std::fs::write(directory.join("log"), "").unwrap();
    let key = format!("workers:{}", unique());
    let children: Vec<_> = (0..workers)
        .map(|worker| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "real::worker", "--ignored", "--nocapture"])
                .env(WORK, format!("{}\n{key}\n{worker}\n{rounds}", directory.display()))
                .env(URL, &url)
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success(), "a worker failed");
    }

    let log = std::fs::read_to_string(directory.join("log")).unwrap();
    let mut done: Vec<(u64, u64, u64)> = log
        .lines()
        .map(|line| {
            let mut parts = line.split(' ').map(|part| part.parse::<u64>().unwrap());
            (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap())
        })
        .collect();
    done.sort_unstable();
    let doubled = done.windows(2).filter(|pair| pair[0].0 == pair[1].0).count();
    let backwards = done.windows(2).filter(|pair| pair[0].1 >= pair[1].1).count();
    let handovers = done.windows(2).filter(|pair| pair[0].2 != pair[1].2).count();
    let unsure = std::fs::read_to_string(directory.join("unsure")).map_or(0, |text| text.lines().count());
    println!(
        "workers {workers}, increments {}, hand-overs {handovers}, numbers given twice {doubled}, fences that did not \
         grow {backwards}, holds that were overdue or lost in the middle {unsure}",
        done.len()
    );
    assert_eq!(done.len() as u32, workers * rounds);
    assert_eq!((doubled, backwards), (0, 0));
    std::fs::remove_dir_all(directory).unwrap();
}

/// One of them: run by `workers_share_a_file` in a process of its own.
#[test]
#[ignore = "run by workers_share_a_file"]
fn worker() {
    let work = std::env::var(WORK).expect("workers_share_a_file says what to do");
    let mut work = work.lines();
    let directory = Path::new(work.next().unwrap());
    let key = Key::new(work.next().unwrap().as_bytes()).unwrap();
    let worker: u32 = work.next().unwrap().parse().unwrap();
    let rounds: u32 = work.next().unwrap().parse().unwrap();
    let client = open(&std::env::var(URL).unwrap(), Duration::from_secs(5));
    let options = LockOptions {
        expire: Some(Duration::from_secs(4)),
        timeout: Some(Timeout::After(Duration::from_secs(120))),
        auto_refresh: Some(true),
        fence: Some(true),
        ..LockOptions::default()
    };
    let note = |file: &str, line: String| {
        let mut file = OpenOptions::new().create(true).append(true).open(directory.join(file)).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    };
    let lock = client.lock(key, LockOptions::default()).unwrap();
    let mut done = 0;
    while done < rounds {
        match wait(lock.lock(options)) {
            Ok(true) => {}
            Ok(false) => panic!("worker {worker} waited for two minutes"),
            // The servers are away: what was asked for is cleaned up, and asked for again.
            Err(error) if matches!(error.kind(), ErrorKind::Unreachable | ErrorKind::Indeterminate) => continue,
            Err(error) => panic!("worker {worker}: {error}"),
        }
        // It came with the grant, unless the hold is lost already.
        let fence = wait(lock.fence());
        let counter = directory.join("counter");
        let number = std::fs::read_to_string(&counter).unwrap().parse::<u64>().unwrap() + 1;
        // A resource would refuse a fence that is too small; a file cannot. So a worker that is past its deadline
        // leaves it alone: nothing between here and the write takes anywhere near the margin.
        match fence {
            Ok(fence) if lock.state() == LockState::Held => {
                std::fs::write(&counter, number.to_string()).unwrap();
                note("log", format!("{number} {fence} {worker}\n"));
                done += 1;
            }
            fence => note("unsure", format!("{fence:?} {worker}\n")),
        }
        match wait(lock.unlock()) {
            Ok(()) => {}
            Err(error)
                if matches!(error.kind(), ErrorKind::Lost | ErrorKind::Indeterminate | ErrorKind::Unreachable) => {}
            Err(error) => panic!("worker {worker}: {error}"),
        }
    }
    wait(client.close(Boottime::now() + Duration::from_secs(30))).unwrap();
}
