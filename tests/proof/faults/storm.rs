//! Several clients and one key in a bad network, at random: what they believe must never contradict.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::key::Key;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::store::{Answer, Filter, Store};
use nblock::sys::runtime::wait;

use super::network::{Faults, Network, NetworkProfile};
use crate::support::{Directory, PATIENCE, Random, answer, eventually, fresh_key, open};

const CLIENTS: usize = 3;
const ROUNDS: usize = 60;

/// A time during which a client was entitled to believe that it held the lock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Belief {
    pub who: usize,
    pub from: Boottime,
    pub to: Boottime,
    pub fence: u64,
}

/// What is believed from now on: until the deadline, as far as it is known.
pub(super) fn belief(who: usize, lock: &Lock) -> Option<Belief> {
    // In this order: the deadline is no earlier than `to`.
    let from = Boottime::now();
    let left = lock.remaining().ok()?;
    Some(Belief { who, from, to: from + left, fence: lock.fence().now()? })
}

trait Now<T> {
    fn now(self) -> Option<T>;
}

impl<T, E> Now<T> for Answer<T, E> {
    fn now(self) -> Option<T> {
        match self {
            Answer::Now(result) => result.ok(),
            Answer::Later(_) => None,
        }
    }
}

pub(super) fn some(random: &mut Random, from: u64, below: u64) -> Duration {
    Duration::from_millis(from + random.below((below - from) as usize) as u64)
}

/// One client's life: lock, do something, perhaps refresh, unlock, or give up in between.
fn live(who: usize, client: &Client, key: &Key, random: &mut Random, beliefs: &Mutex<Vec<Belief>>) {
    let lock = client.lock(key.clone(), LockOptions::default()).unwrap();
    let note = |belief: Belief| beliefs.lock().unwrap().push(belief);
    for _ in 0..ROUNDS {
        let options = LockOptions {
            expire: Some(some(random, 60, 400)),
            timeout: Some(Timeout::After(some(random, 0, 600))),
            auto_refresh: Some(random.below(3) == 0),
            ..LockOptions::default()
        };
        let mut asking = lock.lock(options);
        if random.below(5) == 0
            && let Answer::Later(asked) = asking
        {
            // Given up in the middle.
            let mut asked = asked;
            let limit = Boottime::now() + some(random, 0, 30);
            match nblock::sys::runtime::block_on(nblock::sys::runtime::until(limit, &mut asked)).unwrap() {
                Some(result) => asking = Answer::Now(result),
                None => {
                    drop(asked);
                    continue;
                }
            }
        }
        match wait(asking) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => {
                assert!(
                    matches!(error.kind(), ErrorKind::Indeterminate | ErrorKind::Unreachable),
                    "{:?} {error}",
                    error.kind()
                );
                continue;
            }
        }
        let mut believed = belief(who, &lock);
        for _ in 0..random.below(4) {
            std::thread::sleep(some(random, 0, 30));
            if random.below(2) == 0 {
                // What was believed ends here, since the refresh may shorten it; then it begins again.
                if let Some(mut before) = believed.take() {
                    before.to = before.to.min(Boottime::now());
                    note(before);
                }
                let inside = lock.remaining().is_ok_and(|left| left > Duration::from_millis(1));
                let end = Boottime::now() + lock.remaining().unwrap_or_default();
                let refreshed = wait(lock.refresh(Some(some(random, 40, 400))));
                if let Err(error) = &refreshed
                    && error.kind() == ErrorKind::Lost
                {
                    assert!(!inside || end.has_passed(), "lost inside the deadline");
                }
                believed = belief(who, &lock);
            }
        }
        if random.below(3) == 0 {
            // Held to the bitter end: others take over at once when it is there.
            let limit = Boottime::now() + Duration::from_millis(500);
            while lock.state() == LockState::Held && !limit.has_passed() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if let Some(mut before) = believed {
            before.to = before.to.min(Boottime::now());
            note(before);
        }
        let called = Boottime::now();
        let left = lock.remaining().unwrap_or_default();
        match wait(lock.unlock()).map_err(|error| error.kind()) {
            Ok(()) | Err(ErrorKind::Indeterminate | ErrorKind::Unreachable | ErrorKind::InvalidOp) => {}
            // Judged by when the first request left, which was a moment after `called`.
            Err(ErrorKind::Lost) => {
                assert!(left < Duration::from_millis(30) || (called + left).has_passed(), "lost with {left:?} left");
            }
            Err(kind) => panic!("{kind:?}"),
        }
        assert_ne!(lock.state(), LockState::Held);
    }
}

/// What a storm over a store of this kind is made of.
pub(super) fn faults(kind: &str) -> Faults {
    if kind == "memory" { Faults::WithEarlyClocks } else { Faults::OfAnyStore }
}

/// So many clients, each behind a network of its own, like processes: nothing but the store joins them.
pub(super) fn stormy(store: &Arc<dyn Store>, kind: &str, seed: u64, count: usize) -> Vec<(Client, Arc<Network>)> {
    let options = ClientOptions { op_timeout: Duration::from_millis(80), ..ClientOptions::default() };
    let client = |who| {
        let random = Random::new(seed * 1000 + who as u64);
        let network = Network::before(Arc::clone(store), NetworkProfile::Storm(random, 4, faults(kind)));
        (Client::over(Arc::clone(&network) as Arc<dyn Store>, options.clone()).unwrap(), network)
    };
    (0..count).map(client).collect()
}

/// Breaks what has run out, as an operator does, until asked to stop. A lease that was renewed meanwhile, or is
/// another's by now, is not what was seen.
pub(super) fn break_what_ran_out(client: &Client, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        for record in wait(client.list(Filter::Expired)).unwrap_or_default() {
            match wait(client.break_seen(&record)).map_err(|error| error.kind()) {
                Ok(_) | Err(ErrorKind::Indeterminate | ErrorKind::Unreachable) => {}
                Err(kind) => panic!("{kind:?}"),
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Looks for two who believed at once, and for fences that do not grow.
pub(super) fn no_contradiction(name: &str, mut beliefs: Vec<Belief>, least: usize) {
    beliefs.retain(|belief| belief.to > belief.from);
    beliefs.sort_by_key(|belief| belief.from);
    assert!(beliefs.len() > least, "{name}: only {} holds", beliefs.len());
    for (index, one) in beliefs.iter().enumerate() {
        for other in beliefs[index + 1..].iter().take_while(|other| other.from < one.to) {
            assert_eq!(one.who, other.who, "{name}: two holders: {one:?} and {other:?}");
        }
        for other in &beliefs[index + 1..] {
            // One fence to a hold, and a later holder's is higher.
            assert!(other.fence >= one.fence, "{name}: {one:?} before {other:?}");
            assert!(other.fence != one.fence || other.who == one.who, "{name}: one fence for two");
        }
    }
}

/// The profile clears up. Nothing renews what nobody holds: what is left runs out by itself.
pub(super) fn clears_up(store: &Arc<dyn Store>, key: &Key, clients: &[(Client, Arc<Network>)]) {
    for (client, network) in clients {
        network.set(NetworkProfile::Fair);
        wait(client.close(Boottime::now() + PATIENCE)).unwrap();
    }
    eventually("orphans run out", || {
        let record = answer(store.find(key)).unwrap();
        record.is_none_or(|record| record.lease.expired())
    });
}

/// Runs each on a thread of its own, and beside them somebody who breaks what has run out.
pub(super) fn all_at_once<'a>(name: &str, breaker: &Client, lives: Vec<Box<dyn FnOnce() + Send + 'a>>) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let spawn = |who: String, life| {
            std::thread::Builder::new().name(format!("{name} {who}")).spawn_scoped(scope, life).unwrap()
        };
        let breaking =
            spawn("breaker".into(), Box::new(|| break_what_ran_out(breaker, &stop)) as Box<dyn FnOnce() + Send>);
        let living: Vec<_> =
            lives.into_iter().enumerate().map(|(who, life)| spawn(format!("client {who}"), life)).collect();
        let ended: Vec<_> = living.into_iter().map(|life| life.join()).collect();
        stop.store(true, Ordering::Relaxed);
        breaking.join().unwrap();
        assert!(ended.iter().all(|ended| ended.is_ok()), "{name}: see above");
    });
}

fn profile(kind: &str, seed: u64) {
    let directory = (kind == "embedded").then(Directory::quick);
    let url = directory.as_ref().map_or("memory:".to_string(), Directory::url);
    let store = open(&url).unwrap();
    let key = fresh_key();
    let name = format!("{kind} seed {seed}");
    let beliefs = Mutex::new(Vec::new());
    let clients = stormy(&store, kind, seed, CLIENTS + 1);
    let (breaker, holders) = clients.split_last().unwrap();
    let lives = holders.iter().enumerate().map(|(who, (client, _))| {
        let (key, beliefs) = (&key, &beliefs);
        Box::new(move || live(who, client, key, &mut Random::new(seed * 77 + who as u64), beliefs)) as Box<_>
    });
    all_at_once(&name, &breaker.0, lives.collect());
    no_contradiction(&name, beliefs.into_inner().unwrap(), ROUNDS / 4);
    clears_up(&store, &key, &clients);
}

/// `NBLOCK_PROOF_SEED` runs one seed, to see a failure again; `NBLOCK_PROOF_SEEDS` so many.
pub(super) fn seeds(profile: fn(&str, u64)) {
    let number = |name: &str| {
        std::env::var(name).ok().filter(|text| !text.is_empty()).map(|text| text.parse::<u64>().expect("a number"))
    };
    let seeds: Vec<u64> = match number("NBLOCK_PROOF_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("NBLOCK_PROOF_SEEDS").unwrap_or(6)).collect(),
    };
    println!("seeds {} to {}", seeds[0], seeds[seeds.len() - 1]);
    for some in seeds.chunks(6) {
        std::thread::scope(|scope| {
            for &seed in some {
                for kind in ["memory", "embedded"] {
                    let run = move || profile(kind, seed);
                    std::thread::Builder::new().name(format!("{kind} seed {seed}")).spawn_scoped(scope, run).unwrap();
                }
            }
        });
    }
}

#[test]
fn beliefs_never_contradict() {
    seeds(profile);
}
