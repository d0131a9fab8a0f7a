//! The history test: processes lock, increment a number in a file that nothing else protects, and note
//! what they did; some are killed, some stopped and continued. Then a checker reads the notes.
//!
//! `make torture` runs it for longer: `NBLOCK_TORTURE_GRANTS`, and `NBLOCK_TORTURE_SEED` to see a
//! failure again.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::key::Key;
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::runtime::wait;
use nblock::store::{Acquired, Answer, Store};
use nblock::token::{HoldId, Token};

use crate::checker::{self, Event};
use crate::child::{Actor, say};
use crate::faults::network::{Fate, Network, Weather};
use crate::scene::{Asker, Directory, PATIENCE, RETHINKDB, Random, answer, client, fresh_key, key, open, skipped};

/// Short, so that the killed do not hold up the others for long.
const EXPIRE: Duration = Duration::from_millis(120);

/// What a worker does wrong, to show that the checker finds it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mutant {
    None,
    /// Deletes whatever record is there.
    UnlockWithoutToken,
    /// Counts its lease from when it heard of it.
    DeadlineFromReply,
    /// Two processes with one token, as a fork would make them if tokens were not drawn anew.
    TokenReused,
}

impl Mutant {
    const NAMES: [(&str, Mutant); 4] = [
        ("none", Mutant::None),
        ("unlock-without-token", Mutant::UnlockWithoutToken),
        ("deadline-from-reply", Mutant::DeadlineFromReply),
        ("token-reused", Mutant::TokenReused),
    ];
}

/// Where the workers of one history work.
#[derive(Clone)]
struct Place {
    url: String,
    key: Key,
    files: std::path::PathBuf,
}

impl Place {
    fn new(url: &str, files: &Path) -> Place {
        std::fs::create_dir_all(files).unwrap();
        std::fs::write(files.join("counter"), [0; 8]).unwrap();
        std::fs::write(files.join("log"), "").unwrap();
        Place { url: url.to_string(), key: fresh_key(), files: files.to_path_buf() }
    }

    fn log(&self) -> Vec<Event> {
        checker::read(&std::fs::read_to_string(self.files.join("log")).unwrap())
    }

    fn counter(&self) -> u64 {
        number_in(&File::open(self.files.join("counter")).unwrap())
    }

    fn actor(&self, seed: u64, mutant: &str) -> Actor {
        let files = self.files.to_str().unwrap();
        let mut actor = Actor::start("worker", &[&self.url, self.key.as_str(), files, &seed.to_string(), mutant]);
        actor.says();
        actor
    }
}

fn number_in(file: &File) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0).unwrap();
    u64::from_le_bytes(bytes)
}

/// Works until it is killed.
pub fn worker(url: &str, name: &str, files: &str, seed: &str, mutant: &str) {
    let (_, mutant) = Mutant::NAMES.into_iter().find(|(name, _)| *name == mutant).expect("a mutant's name");
    let place = Place { url: url.to_string(), key: key(name), files: files.into() };
    say("working");
    let never = AtomicBool::new(false);
    let seed = seed.parse().unwrap();
    work(&place, u64::from(std::process::id()) << 16, seed, mutant, &never);
}

/// One worker's life. `who` tells its holds from all others.
fn work(place: &Place, who: u64, seed: u64, mutant: Mutant, enough: &AtomicBool) {
    let counter = OpenOptions::new().read(true).write(true).open(place.files.join("counter")).unwrap();
    let log = OpenOptions::new().append(true).open(place.files.join("log")).unwrap();
    // One write to a file opened for appending: lines of several processes do not mix.
    let note = |event: Event| (&log).write_all(format!("{event}\n").as_bytes()).unwrap();
    let mut random = Random::new(seed);
    let store = open(&place.url).unwrap();
    let client = match mutant {
        Mutant::DeadlineFromReply => {
            // Its answers take a while, which a lease counted from the answer forgets.
            let slow = Fate::Slow(Duration::ZERO, EXPIRE / 2);
            let network = Network::before(Arc::clone(&store), Weather::Always(slow));
            Client::over(network as Arc<dyn Store>, ClientOptions::default()).unwrap()
        }
        _ => client(&place.url),
    };
    let mut lock = client.lock(place.key.clone(), LockOptions::default()).unwrap();
    let mut number = 0;
    while !enough.load(Ordering::Relaxed) {
        let timeout = Duration::from_millis([5, 200, 30_000][random.below(3)]);
        let options = LockOptions {
            expire: Some(EXPIRE),
            timeout: Some(Timeout::After(timeout)),
            auto_refresh: Some(random.below(4) == 0),
            ..LockOptions::default()
        };
        let asked = Boottime::now();
        let (granted, fence, deadline) = if mutant == Mutant::TokenReused {
            let mut attempt = Asker::new().attempt(EXPIRE);
            attempt.token = Token { hold: HoldId([7; 16]), attempt: 1 };
            match answer(store.acquire(&place.key, attempt)).unwrap() {
                Acquired::Granted { fence, .. } => (true, fence.unwrap_or(0), Boottime::now() + EXPIRE),
                _ => (false, 0, Boottime::ZERO),
            }
        } else {
            let granted = wait(lock.lock(options)).unwrap_or_else(|error| {
                // A store that does not answer in time (somebody was stopped while he wrote) granted nothing.
                assert!(matches!(error.kind(), ErrorKind::Indeterminate | ErrorKind::Unreachable), "{error}");
                false
            });
            let now = Boottime::now();
            let left = if granted { lock.remaining().unwrap_or_default() } else { Duration::ZERO };
            // Asked for with the grant, or not at all: this is not the place to wait.
            let fence = match lock.fence() {
                Answer::Now(Ok(fence)) => fence,
                _ => 0,
            };
            let left = if mutant == Mutant::DeadlineFromReply { EXPIRE } else { left };
            (granted, fence, now + left)
        };
        let from = Boottime::now();
        note(Event::Waited { timeout: timeout.as_nanos() as u64, waited: from.since(asked).as_nanos() as u64 });
        if !granted {
            continue;
        }
        number += 1;
        let hold = who + number;
        if from >= deadline {
            // Over before it began: it is not relied on.
            let _ = wait(lock.unlock());
            continue;
        }
        // From here on it is relied on.
        note(Event::Granted { hold, fence, from: from.as_nanos(), deadline: deadline.as_nanos() });
        let read = number_in(&counter);
        if random.below(8) == 0 {
            std::thread::yield_now();
        }
        // What a mutant does wrong shows where holds are long.
        let rarely = if mutant == Mutant::None { 100 } else { 2 };
        if random.below(rarely) == 0 {
            // Long enough for its lease to run out now and then.
            std::thread::sleep(Duration::from_millis(random.below(200) as u64));
        }
        let late = deadline <= Boottime::now();
        if late && mutant == Mutant::None {
            note(Event::Released { hold, at: deadline.as_nanos() });
        } else {
            counter.write_all_at(&(read + 1).to_le_bytes(), 0).unwrap();
            let inside = Boottime::now() < deadline;
            note(Event::Incremented { hold, read, inside });
            note(Event::Released { hold, at: Boottime::now().as_nanos() });
        }
        match mutant {
            Mutant::UnlockWithoutToken => {
                if let Some(record) = answer(store.find(&place.key)).unwrap() {
                    let _ = answer(store.break_seen(&record));
                }
                let _ = wait(lock.unlock());
            }
            Mutant::TokenReused => {
                drop(answer(store.release(&place.key, nblock::store::Claim::AnyOf(HoldId([7; 16])))))
            }
            _ if random.below(200) == 0 => {
                // Forgotten: it runs out by itself. It must not be noted as released, but it is over for us.
                lock = client.lock(place.key.clone(), LockOptions::default()).unwrap();
            }
            _ => {
                let inside = Boottime::now() + Duration::from_millis(30) < deadline;
                if let Err(error) = wait(lock.unlock()) {
                    let lost = error.kind() == ErrorKind::Lost;
                    assert!(lost || error.kind() == ErrorKind::Indeterminate, "{error}");
                    note(Event::Lost { hold, inside: lost && inside && Boottime::now() < deadline });
                }
            }
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Directs processes until there were so many grants and kills, and has what they noted checked.
fn processes(url: &str) {
    let grants = number("NBLOCK_TORTURE_GRANTS").unwrap_or(10_000) as usize;
    let seed = number("NBLOCK_TORTURE_SEED").unwrap_or(1);
    let files = Directory::quick();
    let place = Place::new(url, files.path());
    let mut random = Random::new(seed);
    let mut next = seed * 1_000_000;
    let mut start = || {
        next += 1;
        place.actor(next, "none")
    };
    let mut killed: Vec<Actor> = (0..3).map(|_| start()).collect();
    let stopped: Vec<Actor> = (0..2).map(|_| start()).collect();
    let (mut kills, mut stops, mut seen) = (0, 0, 0);
    let began = Instant::now();
    while seen < grants || kills < grants / 200 {
        std::thread::sleep(Duration::from_millis(20 + random.below(30) as u64));
        let victim = random.below(killed.len());
        killed[victim].kill();
        kills += 1;
        killed[victim] = start();
        if kills % 4 == 0 {
            // Stopped for longer than its lease: if it holds the lock, that is taken over meanwhile.
            let pausing = &stopped[random.below(stopped.len())];
            pausing.stop();
            std::thread::sleep(EXPIRE + EXPIRE / 2);
            pausing.signal(libc::SIGCONT);
            stops += 1;
        }
        seen = place.log().iter().filter(|event| matches!(event, Event::Granted { .. })).count();
        assert!(began.elapsed() < 20 * PATIENCE, "{seen} grants and {kills} kills in {:?}", began.elapsed());
    }
    drop((killed, stopped));
    let report = checker::check(&place.log(), place.counter(), kills as u64).unwrap_or_else(|wrong| {
        let kept = std::env::temp_dir().join(format!("nblock-history-{seed}.log"));
        let _ = std::fs::copy(files.path().join("log"), &kept);
        panic!("seed {seed}: {wrong}; the notes are in {}", kept.display());
    });
    println!("history of processes, seed {seed}: {report}; {kills} killed, {stops} stopped");
    assert!(report.grants >= grants && report.hand_overs * 10 > report.grants);
}

#[test]
fn of_processes_embedded() {
    let directory = Directory::quick();
    processes(&directory.url());
}

#[test]
fn of_processes_rethinkdb() {
    match std::env::var(RETHINKDB) {
        Ok(url) => processes(&url),
        Err(_) => skipped("history-rethinkdb", &format!("{RETHINKDB} is not set")),
    }
}

#[test]
fn of_threads_memory() {
    let files = Directory::quick();
    let url = format!("memory:{}", HoldId::random());
    let place = Place::new(&url, files.path());
    let _store = open(&url).unwrap();
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 1..=4 {
            let (place, enough) = (&place, &enough);
            scope.spawn(move || work(place, seed << 32, seed, Mutant::None, enough));
        }
        let grants = |place: &Place| place.log().iter().filter(|event| matches!(event, Event::Granted { .. })).count();
        while grants(&place) < 10_000 {
            std::thread::sleep(Duration::from_millis(50));
        }
        enough.store(true, Ordering::Relaxed);
    });
    let report = checker::check(&place.log(), place.counter(), 0).unwrap_or_else(|wrong| panic!("{wrong}"));
    println!("history of threads in memory: {report}");
    assert!(report.grants >= 10_000);
}

/// Runs workers that do one thing wrong, until the checker finds it.
fn is_caught(mutant: &str) {
    let (store, files) = (Directory::quick(), Directory::quick());
    let place = Place::new(&store.url(), files.path());
    let workers: Vec<Actor> = (0..3).map(|seed| place.actor(seed, if seed == 2 { "none" } else { mutant })).collect();
    let start = Instant::now();
    loop {
        // A worker that is stopped while it holds the lock is late afterwards.
        if mutant == "unlock-without-token" {
            workers[0].stop();
            std::thread::sleep(EXPIRE * 2);
            workers[0].signal(libc::SIGCONT);
        }
        std::thread::sleep(Duration::from_millis(100));
        match checker::check(&place.log(), place.counter(), 0) {
            // Two holders, or what comes of two: an increment that is gone, a hold that was lost.
            Err(wrong) => return println!("{mutant} is caught: {wrong}"),
            Ok(_) => assert!(start.elapsed() < PATIENCE, "the checker does not find {mutant}"),
        }
    }
}

#[test]
fn an_unlock_without_the_token_is_caught() {
    is_caught("unlock-without-token");
}

#[test]
fn a_deadline_from_the_reply_is_caught() {
    is_caught("deadline-from-reply");
}

#[test]
fn a_token_that_two_processes_use_is_caught() {
    is_caught("token-reused");
}

/// Waiters of one process are served in the order in which they asked, whoever drives them first.
#[test]
fn waiters_in_one_process_are_served_in_order() {
    for url in [format!("memory:{}", HoldId::random()), Directory::quick().url()] {
        let client = client(&url);
        let key = fresh_key();
        let new = || client.lock(key.clone(), LockOptions::default()).unwrap();
        let forever = LockOptions { timeout: Some(Timeout::Forever), ..LockOptions::default() };
        let first = new();
        assert!(wait(first.try_lock(LockOptions::default())).unwrap());
        let waiters: Vec<_> = (0..20)
            .map(|number| {
                let lock = new();
                // Its place is taken by asking.
                let asked = lock.lock(forever);
                (number, lock, asked)
            })
            .collect();
        let served = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for (number, lock, asked) in waiters.into_iter().rev() {
                let served = &served;
                scope.spawn(move || {
                    assert!(wait(asked).unwrap());
                    served.lock().unwrap().push(number);
                    wait(lock.unlock()).unwrap();
                });
            }
            wait(first.unlock()).unwrap();
        });
        assert_eq!(served.into_inner().unwrap(), (0..20).collect::<Vec<_>>());
    }
}
