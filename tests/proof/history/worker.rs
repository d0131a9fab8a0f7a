//! What a worker in Rust does; those in other languages (tests/proof/workers) do the same.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::{Error, ErrorKind};
use nblock::lock::Lock;
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::store::Store;
use nblock::sys::runtime::wait;
use nblock::token::{HoldId, Token};

use super::Place;
use crate::asks::{Acquired, Asks, Claim};
use crate::checker::{Event, HoldName};
use crate::faults::network::{Fault, Network, NetworkProfile};
use crate::support::{Random, RawClient, answer, key, open};

/// What a worker does wrong, to show that the checker finds it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// Deletes whatever record is there.
    UnlockWithoutToken,
    /// Counts its lease from when it heard of it.
    DeadlineFromReply,
    /// Two processes with one token, as a fork would make them if tokens were not drawn again.
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

/// Threads of a worker that does nothing wrong: they wait in one line.
const THREADS: u64 = 3;

/// The role: works until it is killed.
pub fn play([url, name, files, who, seed, expire, mutant]: [&str; 7]) {
    let (_, mutant) = Mutant::NAMES.into_iter().find(|(name, _)| *name == mutant).expect("a mutant's name");
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let expire = Duration::from_millis(number(expire));
    let place = Place { url: url.to_string(), key: key(name), files: files.into(), expire };
    // Its parent kills it, or takes it along when it ends: no test is longer than this one may be.
    // SAFETY: takes back a timer.
    unsafe { libc::alarm(0) };
    let seed = number(seed);
    let never = AtomicBool::new(false);
    let worker = Worker::new(&place, number(who), mutant, &never);
    std::thread::scope(|scope| {
        for thread in 0..if mutant == Mutant::None { THREADS } else { 1 } {
            let worker = &worker;
            scope.spawn(move || {
                // One that fails ends them all: the director sees it.
                let work = std::panic::AssertUnwindSafe(|| worker.work(seed * 1_000 + thread));
                if std::panic::catch_unwind(work).is_err() {
                    std::process::exit(1);
                }
            });
        }
    });
}

/// One process's worker, or one of several in a process. Its threads wait in one line.
pub struct Worker<'a> {
    place: &'a Place,
    who: u64,
    mutant: Mutant,
    enough: &'a AtomicBool,
    store: Arc<dyn Store>,
    client: Client,
    counter: File,
    log: File,
    turns: Mutex<u64>,
}

impl<'a> Worker<'a> {
    pub fn new(place: &'a Place, who: u64, mutant: Mutant, enough: &'a AtomicBool) -> Worker<'a> {
        let counter = OpenOptions::new().read(true).write(true).open(place.counter()).unwrap();
        let log = OpenOptions::new().append(true).open(place.log()).unwrap();
        let store = until_reached(|| open(&place.url));
        let client = match mutant {
            Mutant::DeadlineFromReply => {
                // Its answers take a while, which a lease counted from the answer forgets.
                let slow = Fault::Slow(Duration::ZERO, place.expire / 2);
                let network = Network::before(Arc::clone(&store), NetworkProfile::Always(slow));
                Client::over(network as Arc<dyn Store>, ClientOptions::default()).unwrap()
            }
            _ => until_reached(|| wait(Client::open(Some(&place.url), ClientOptions::default()))),
        };
        Worker { place, who, mutant, enough, store, client, counter, log, turns: Mutex::new(0) }
    }

    /// One write to a file opened for appending: lines of several processes do not mix.
    fn note(&self, event: Event) {
        (&self.log).write_all(event.to_string().as_bytes()).unwrap();
    }

    fn lock(&self) -> Lock {
        self.client.lock(self.place.key.clone(), LockOptions::default()).unwrap()
    }

    /// One thread's life.
    pub fn work(&self, seed: u64) {
        let mut random = Random::new(seed);
        let mut lock = self.lock();
        while !self.enough.load(Ordering::Relaxed) {
            let timeout = Duration::from_millis([5, 200, 30_000][random.below(3)]);
            let options = LockOptions {
                expire: Some(self.place.expire),
                timeout: Some(Timeout::After(timeout)),
                auto_refresh: Some(random.below(4) == 0),
                fence: Some(true),
                ..LockOptions::default()
            };
            let Some((hold, fence, from, deadline)) = self.acquire(&lock, options, timeout) else { continue };
            self.note(Event::Granted { hold, fence, from, deadline: deadline.as_nanos() });
            self.use_it(hold, &lock, deadline, options.auto_refresh == Some(true), &mut random);
            if self.mutant == Mutant::None && random.below(200) == 0 {
                // Forgotten: it runs out by itself.
                lock = self.lock();
            } else {
                self.release(hold, &lock);
            }
        }
    }

    /// Asks, and notes how long that took. `None`: not granted, or not in time to rely on it.
    fn acquire(&self, lock: &Lock, options: LockOptions, timeout: Duration) -> Option<(HoldName, u64, u64, Boottime)> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        *turns += 1;
        let hold = HoldName { who: self.who, turn: *turns };
        let asked = Boottime::now();
        let granted = if self.mutant == Mutant::TokenReused {
            let mut attempt = RawClient::new().attempt(self.place.expire);
            attempt.token = REUSED;
            match answer(self.store.acquire(&self.place.key, attempt)).unwrap() {
                Acquired::Granted { fence, .. } => Ok(Some((fence.unwrap_or(0), Boottime::now() + self.place.expire))),
                _ => Ok(None),
            }
        } else {
            // Its place in the line is taken by asking.
            let asking = lock.lock(options);
            drop(turns);
            wait(asking).map(|granted| granted.then(|| self.grant(lock)))
        };
        let from = Boottime::now();
        let granted = match granted {
            // A store that did not answer granted nothing. Lost: while its fence was fetched.
            Err(error) if unanswered(error.kind()) || error.kind() == ErrorKind::Lost => return None,
            granted => granted.unwrap_or_else(|error| panic!("{error}")),
        };
        if granted.is_some_and(|(_, deadline)| deadline <= from) {
            // Over before it began: it is not relied on.
            let _ = wait(lock.unlock());
            return None;
        }
        let (asked, timeout, ended) = (asked.as_nanos(), timeout.as_nanos() as u64, from.as_nanos());
        self.note(Event::Waited { hold, asked, timeout, ended });
        granted.map(|(fence, deadline)| (hold, fence, from.as_nanos(), deadline))
    }

    /// The fence of a hold and its deadline.
    fn grant(&self, lock: &Lock) -> (u64, Boottime) {
        let fence = wait(lock.fence()).unwrap_or(0);
        let deadline = match self.mutant {
            Mutant::DeadlineFromReply => Boottime::now() + self.place.expire,
            _ => deadline(lock),
        };
        (fence, deadline)
    }

    /// Reads a number, and writes one more.
    fn use_it(&self, hold: HoldName, lock: &Lock, mut until: Boottime, renewed: bool, random: &mut Random) {
        let read = number_in(&self.counter);
        if random.below(8) == 0 {
            std::thread::yield_now();
        }
        // What a mutant does wrong shows where holds are long.
        let rarely = if self.mutant == Mutant::None { 100 } else { 2 };
        if random.below(rarely) == 0 {
            // Long enough for its lease to run out now and then.
            std::thread::sleep(self.place.expire * random.below(170) as u32 / 100);
            let later = deadline(lock);
            if renewed && later > until {
                until = later;
                self.note(Event::Renewed { hold, deadline: until.as_nanos() });
            }
        }
        let before = Boottime::now();
        if before < until || self.mutant != Mutant::None {
            self.note(Event::Writing { hold, read, at: before.as_nanos() });
            self.counter.write_all_at(number_text(read + 1).as_bytes(), 0).unwrap();
            self.note(Event::Wrote { hold, at: Boottime::now().as_nanos() });
        }
        self.note(Event::Released { hold, at: Boottime::now().as_nanos() });
    }

    fn release(&self, hold: HoldName, lock: &Lock) {
        match self.mutant {
            Mutant::UnlockWithoutToken => {
                if let Some(record) = answer(self.store.find(&self.place.key)).unwrap() {
                    let _ = answer(self.store.break_seen(&record));
                }
                let _ = wait(lock.unlock());
            }
            Mutant::TokenReused => drop(answer(self.store.release(&self.place.key, Claim::AnyOf(REUSED.hold)))),
            Mutant::None | Mutant::DeadlineFromReply => match wait(lock.unlock()) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Lost => {
                    self.note(Event::Lost { hold, at: Boottime::now().as_nanos() });
                }
                Err(error) => assert!(unanswered(error.kind()), "{error}"),
            },
        }
    }
}

const REUSED: Token = Token { hold: HoldId([7; 16]), attempt: 1 };

fn unanswered(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Indeterminate | ErrorKind::Unreachable)
}

/// Counted from before it was asked for: never too late. Zero where it has passed.
fn deadline(lock: &Lock) -> Boottime {
    let now = Boottime::now();
    match lock.remaining() {
        Ok(remaining) if !remaining.is_zero() => now + remaining,
        _ => Boottime::ZERO,
    }
}

/// Asks again until the store is reached. A connection that is cut while it is greeted reads like a wrong URL.
pub fn until_reached<T>(ask: impl Fn() -> Result<T, Error>) -> T {
    loop {
        match ask() {
            Err(error) if unanswered(error.kind()) || error.kind() == ErrorKind::Store => {
                std::thread::sleep(Duration::from_millis(20));
            }
            reached => return reached.unwrap_or_else(|error| panic!("{error}")),
        }
    }
}

pub fn number_in(file: &File) -> u64 {
    let mut bytes = [0; 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    std::str::from_utf8(&bytes).unwrap().trim().parse().unwrap()
}

/// A number as the file has it: always of the same length, so that one write replaces all of it.
pub fn number_text(number: u64) -> String {
    format!("{number:19}\n")
}
