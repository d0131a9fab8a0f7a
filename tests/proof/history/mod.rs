//! The history test: programs in several languages lock, increment a number in a file that nothing else
//! protects, and note what they did; some are killed, some stopped and continued, and connections are cut.
//! Then a checker reads the notes.
//!
//! The suite `history` (`tests/run.sh history`) runs it with all languages, after the suites that install
//! them. `make torture` runs it for longer: `NBLOCK_TORTURE_GRANTS` are those on the embedded store, and others
//! in proportion; `NBLOCK_TORTURE_SEED` is to see a failure again.

mod place;
mod proxy;
mod worker;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nblock::client::Client;
use nblock::lock::Lock;
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::sys::runtime::wait;
use nblock::token::HoldId;

use crate::checker::{Event, NUMBERS_OF_A_PROCESS, check};
use crate::reql::Server;
use crate::support::{Directory, LONG, PATIENCE, RETHINKDB, Random, client, fresh_key, lock, open, skipped};
use place::{Notes, Place, Program, Worker};
use proxy::Proxy;
use worker::Mutant;

pub use worker::play as worker;

/// Of leases on this machine.
const EXPIRE: Duration = Duration::from_millis(120);

/// Of leases on a server, of which a margin for its clock is taken away.
const EXPIRE_REMOTE: Duration = Duration::from_millis(500);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().filter(|text| !text.is_empty()).map(|text| text.parse().expect("a number"))
}

/// What a history is to come to, at least, before it ends.
struct Goal {
    grants: u64,
    kills: u64,
    seed: u64,
}

/// How many grants the history of all languages on the embedded store comes to.
const GRANTS: u64 = 10_000;

impl Goal {
    /// `grants`, or as many more as there are to be more than [`GRANTS`].
    fn new(grants: u64) -> Goal {
        let grants = (number("NBLOCK_TORTURE_GRANTS").unwrap_or(GRANTS) * grants).div_ceil(GRANTS);
        Goal { grants, kills: (grants / 200).max(20), seed: number("NBLOCK_TORTURE_SEED").unwrap_or(1) }
    }
}

/// Directs the workers, and counts what they do.
struct Director<'a> {
    place: &'a Place,
    programs: &'a [Program],
    notes: Notes,
    random: Random,
    seed: u64,
    workers: Vec<(&'a Program, Worker)>,
    /// Of all that were ever started, by number: a killed one may still have sent a line.
    languages: Vec<&'static str>,
    grants: BTreeMap<&'static str, u64>,
    kills: BTreeMap<&'static str, u64>,
    stops: u64,
}

impl<'a> Director<'a> {
    fn new(place: &'a Place, programs: &'a [Program], seed: u64) -> Director<'a> {
        let none: BTreeMap<_, _> = programs.iter().map(|program| (program.language, 0)).collect();
        let (grants, kills) = (none.clone(), none);
        let (notes, random) = (Notes::of(place), Random::new(seed));
        let (workers, languages) = (Vec::new(), Vec::new());
        Director { place, programs, notes, random, seed, workers, languages, grants, kills, stops: 0 }
    }

    fn start(&mut self, program: &'a Program) -> Worker {
        let number = self.languages.len() as u64;
        self.languages.push(program.language);
        program.start(self.place, number, self.seed * 1_000_000 + number)
    }

    /// Has them work, kills them and stops them, until the goal is reached.
    fn direct(&mut self, goal: &Goal) {
        for program in self.programs {
            for _ in 0..program.workers {
                let worker = self.start(program);
                self.workers.push((program, worker));
            }
        }
        let mut progress = Instant::now();
        let reached = |director: &Director| {
            director.grants.values().sum::<u64>() >= goal.grants
                && director.kills.values().sum::<u64>() >= goal.kills
                && director.grants.values().all(|grants| *grants * 500 >= goal.grants)
        };
        while !reached(self) {
            std::thread::sleep(Duration::from_millis(20 + self.random.below(60) as u64));
            if self.count() > 0 {
                progress = Instant::now();
            }
            assert!(progress.elapsed() < PATIENCE, "nothing was granted for {PATIENCE:?}: {:?}", self.grants);
            let all: u64 = self.grants.values().sum();
            assert!(all < 10 * goal.grants, "one of the languages gets nothing: {:?}", self.grants);
            self.trouble();
        }
        for (_, worker) in &mut self.workers {
            worker.kill(self.place);
        }
    }

    /// How many grants are new.
    fn count(&mut self) -> usize {
        let mut new = 0;
        for event in self.notes.follow() {
            if let Event::Granted { hold, .. } = event {
                new += 1;
                let language = self.languages[hold.process() as usize];
                *self.grants.get_mut(language).expect("a language of this history") += 1;
                if let Some((_, worker)) =
                    self.workers.iter_mut().find(|(_, worker)| worker.process() == hold.process())
                {
                    worker.grants += 1;
                }
            }
        }
        new
    }

    /// Kills one of them, or stops it for longer than a lease: if it holds the lock, that is taken over meanwhile.
    fn trouble(&mut self) {
        for (program, worker) in &mut self.workers {
            if let Some(status) = worker.ended() {
                panic!("seed {}: a worker in {} ended by itself: {status}", self.seed, program.language);
            }
        }
        let victim = self.random.below(self.workers.len());
        if self.random.below(12) == 0 {
            let (_, worker) = &self.workers[victim];
            worker.stop();
            std::thread::sleep(self.place.expire * 3 / 2);
            worker.go_on();
            self.stops += 1;
            return;
        }
        let (program, worker) = &self.workers[victim];
        if worker.grants < program.life {
            return;
        }
        let program = *program;
        self.workers[victim].1.kill(self.place);
        self.workers[victim].1 = self.start(program);
        *self.kills.get_mut(program.language).expect("a language of this history") += 1;
    }
}

/// Runs a history, and has what was noted checked.
fn history(what: &str, place: &Place, programs: &[Program], goal: &Goal) {
    let seed = goal.seed;
    let kept = std::env::temp_dir().join(format!("nblock-history-{seed}.log"));
    println!("history {what}, seed {seed}: {} grants and {} kills to come", goal.grants, goal.kills);
    let mut director = Director::new(place, programs, seed);
    director.direct(goal);
    // Once it is ours, nobody is inside any more: not even a command whose `nblock` was killed just now.
    let ours = taken(place);
    director.count();
    let report = check(&director.notes.events, Some(place.count())).unwrap_or_else(|wrong| {
        let _ = std::fs::copy(place.log(), &kept);
        panic!("seed {seed}: {wrong}; the notes are in {}", kept.display());
    });
    let each: Vec<String> = director.grants.iter().map(|(language, grants)| format!("{language} {grants}")).collect();
    let kills: Vec<String> = director.kills.iter().map(|(language, kills)| format!("{language} {kills}")).collect();
    println!("history {what}, seed {seed}: {report}");
    println!("  grants: {}; killed: {}; stopped: {}", each.join(", "), kills.join(", "), director.stops);
    assert!(report.grants as u64 >= goal.grants && report.hand_overs * 10 > report.grants);
    drop(ours);
}

/// The lock, held, when everybody else is gone: what they left runs out.
fn taken(place: &Place) -> Lock {
    let client = worker::until_reached(|| wait(Client::open(Some(&place.url), ClientOptions::default())));
    let lock = lock(&client, &place.key);
    let options = LockOptions { expire: Some(LONG), timeout: Some(Timeout::After(PATIENCE)), ..LockOptions::default() };
    assert!(worker::until_reached(|| wait(lock.lock(options))), "what the killed left in the store stays there");
    lock
}

/// All languages that can be had here; the others are named as skipped.
fn all_programs(build: &Path) -> Vec<Program> {
    let mut programs = vec![Program::rust("none")];
    for other in Program::others(build) {
        match other {
            Ok(program) => programs.push(program),
            Err((language, reason)) => skipped(&format!("history-{language}"), reason),
        }
    }
    programs
}

#[test]
fn of_processes_embedded() {
    let (store, files) = (Directory::quick(), Directory::quick());
    let place = Place::new(&store.url(), files.path(), EXPIRE);
    history("of processes", &place, &[Program::rust("none")], &Goal::new(1_500));
}

#[test]
#[ignore = "the suite history runs it, after those that install its languages"]
fn of_languages_embedded() {
    let (store, files, build) = (Directory::quick(), Directory::quick(), Directory::new());
    let place = Place::new(&store.url(), files.path(), EXPIRE);
    history("of languages", &place, &all_programs(build.path()), &Goal::new(GRANTS));
}

/// Between the workers and a server stands what cuts their connections.
fn cut_off(what: &str, url: &str, expire: Duration, programs: &[Program], goal: &Goal) {
    let files = Directory::quick();
    // The table is there before anybody is killed while it is made.
    wait(lock(&client(url), &fresh_key()).try_lock(LockOptions::default())).unwrap();
    let (url, proxies) = Proxy::before(url, goal.seed);
    let place = Place::new(&url, files.path(), expire);
    history(what, &place, programs, goal);
    for proxy in proxies {
        println!("  connections: {proxy}");
        assert!(proxy.cuts() > 0, "no connection was cut");
    }
}

/// On a server in memory, which applies queries late.
#[test]
fn of_processes_through_cut_connections() {
    let goal = Goal::new(300);
    let server = Server::start(goal.seed);
    // There is one clock here.
    let url = format!("{}?skew=5", server.url());
    cut_off("of processes through cut connections", &url, EXPIRE * 2, &[Program::rust("none")], &goal);
}

#[test]
#[ignore = "the suite history runs it, after those that install its languages"]
fn of_languages_through_cut_connections() {
    let (goal, build) = (Goal::new(600), Directory::new());
    let server = Server::start(goal.seed);
    let url = format!("{}?skew=5", server.url());
    cut_off("of languages through cut connections", &url, EXPIRE * 2, &all_programs(build.path()), &goal);
}

#[test]
#[ignore = "the suite history runs it, after those that install its languages"]
fn of_languages_rethinkdb() {
    let Some(url) = std::env::var(RETHINKDB).ok().filter(|url| !url.is_empty()) else {
        return skipped("history-rethinkdb", &format!("{RETHINKDB} is not set"));
    };
    let build = Directory::new();
    cut_off(
        "on RethinkDB through cut connections",
        &url,
        EXPIRE_REMOTE,
        &all_programs(build.path()),
        &Goal::new(1_000),
    );
}

/// On a real server, which tells waiters of changes and forgets what is over.
#[test]
fn of_processes_redis() {
    let server = crate::redis::server();
    let programs = [Program::rust("none")];
    cut_off("on Redis through cut connections", &server.url, EXPIRE * 2, &programs, &Goal::new(1_000));
}

#[test]
#[ignore = "the suite history runs it, after those that install its languages"]
fn of_languages_redis() {
    let (server, build) = (crate::redis::server(), Directory::new());
    let programs = all_programs(build.path());
    cut_off("of languages on Redis through cut connections", &server.url, EXPIRE * 2, &programs, &Goal::new(1_000));
}

#[test]
fn of_processes_on_postgresql_through_cut_connections() {
    let server = crate::postgres::shared();
    cut_off(
        "on PostgreSQL through cut connections",
        &server.url,
        EXPIRE * 2,
        &[Program::rust("none")],
        &Goal::new(300),
    );
}

#[test]
#[ignore = "the suite history runs it, after those that install its languages"]
fn of_languages_on_postgresql() {
    let (server, build) = (crate::postgres::shared(), Directory::new());
    let what = "of languages on PostgreSQL through cut connections";
    cut_off(what, &server.url, EXPIRE * 2, &all_programs(build.path()), &Goal::new(600));
}

#[test]
fn of_threads_memory() {
    let files = Directory::quick();
    let url = format!("memory:{}", HoldId::random());
    let place = Place::new(&url, files.path(), EXPIRE);
    let _store = open(&url).unwrap();
    let enough = AtomicBool::new(false);
    let mut notes = Notes::of(&place);
    // Four threads, of which two and two wait in one line each.
    let workers =
        [1, 2].map(|number| worker::Worker::new(&place, number * NUMBERS_OF_A_PROCESS, Mutant::None, &enough));
    std::thread::scope(|scope| {
        for seed in 1..=4 {
            let worker = &workers[seed as usize % 2];
            scope.spawn(move || worker.work(seed));
        }
        let mut grants = 0;
        while grants < 10_000 {
            std::thread::sleep(Duration::from_millis(50));
            grants += notes.follow().iter().filter(|event| matches!(event, Event::Granted { .. })).count();
        }
        enough.store(true, Ordering::Relaxed);
    });
    notes.follow();
    let report = check(&notes.events, Some(place.count())).unwrap_or_else(|wrong| panic!("{wrong}"));
    println!("history of threads in memory: {report}");
    assert!(report.grants >= 10_000);
}

/// Runs workers that do one thing wrong, until the checker finds it.
fn is_caught(mutant: &'static str) {
    let (store, files) = (Directory::quick(), Directory::quick());
    let place = Place::new(&store.url(), files.path(), EXPIRE);
    let mut notes = Notes::of(&place);
    let workers: Vec<Worker> = [mutant, mutant, "none"]
        .iter()
        .zip(1..)
        .map(|(what, seed)| Program::rust(what).start(&place, seed, seed))
        .collect();
    let start = Instant::now();
    loop {
        // A worker that is stopped while it holds the lock is late afterwards.
        if mutant == "unlock-without-token" {
            workers[0].stop();
            std::thread::sleep(EXPIRE * 2);
            workers[0].go_on();
        }
        std::thread::sleep(Duration::from_millis(100));
        notes.follow();
        match check(&notes.events, None) {
            // Two holders, or their result: an increment that is gone, a hold that was lost.
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

/// Waiters of one process are served in the order in which they asked, in whatever order they are polled.
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
