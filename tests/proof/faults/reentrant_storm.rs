//! Reentrant locks in a bad network, at random: two owners, each with two objects that go in and out.

use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::{Error, ErrorKind};
use nblock::key::Key;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::store::{Answer, Store};
use nblock::sys::runtime::{block_on, until, wait};

use super::network::{Fault, Network, NetworkProfile};
use super::storm::{Belief, all_at_once, belief, clears_up, no_contradiction, seeds, some, stormy};
use crate::asks::Shown;
use crate::support::{Directory, LONG, Random, answer, fresh_key, open};

const OWNERS: [&str; 2] = ["one", "other"];
const OBJECTS: usize = 2;
const ROUNDS: usize = 40;

/// One object of one owner, and what is known of it.
struct Life<'a> {
    who: usize,
    lock: &'a Lock,
    /// The store itself, without the faults.
    store: &'a Arc<dyn Store>,
    key: &'a Key,
    random: Random,
    beliefs: &'a Mutex<Vec<Belief>>,
}

/// Until when the hold was certain before a call.
#[derive(Clone, Copy)]
struct Certain(Boottime);

impl Life<'_> {
    fn certain(&self) -> Certain {
        let now = Boottime::now();
        Certain(now + self.lock.remaining().unwrap_or_default())
    }

    /// A loss, the store's word, comes after the deadline; what is not known is said so.
    fn honest(&self, error: &Error, before: Certain) {
        match error.kind() {
            ErrorKind::Indeterminate | ErrorKind::Unreachable => {}
            ErrorKind::Lost => assert!(before.0.has_passed(), "lost inside the deadline"),
            kind => panic!("{kind:?} {error}"),
        }
    }

    /// Goes in once more: whether it did.
    fn enter(&mut self) -> bool {
        let options = LockOptions {
            expire: Some(some(&mut self.random, 60, 400)),
            timeout: Some(Timeout::After(some(&mut self.random, 0, 400))),
            auto_refresh: Some(self.random.below(3) == 0),
            ..LockOptions::default()
        };
        let certain = self.certain();
        let mut asking = self.lock.lock(options);
        if self.random.below(5) == 0
            && let Answer::Later(mut asked) = asking
        {
            // Given up in the middle.
            let limit = Boottime::now() + some(&mut self.random, 0, 30);
            match block_on(until(limit, &mut asked)).unwrap() {
                Some(result) => asking = Answer::Now(result),
                None => return false,
            }
        }
        wait(asking).unwrap_or_else(|error| {
            self.honest(&error, certain);
            false
        })
    }

    /// The record is its owner's, and counts no less than this object's own steps: an unlock of somebody
    /// else's must not take away what this one is in.
    fn look(&self, depth: u32) {
        let found = answer(self.store.find(self.key)).unwrap();
        if self.lock.remaining().is_ok_and(|left| left > Duration::ZERO) {
            let found = found.expect("a hold inside its deadline has a record");
            assert_eq!(*found.seen().token, *OWNERS[self.who]);
            let count = found.lock_count().expect("a reentrant record");
            assert!(count >= depth, "counted {count}, is in {depth} times");
        }
    }

    fn live(mut self) {
        for _ in 0..ROUNDS {
            let mut depth = 0;
            for _ in 0..=self.random.below(3) {
                if self.enter() {
                    depth += 1;
                }
                if self.lock.state() != LockState::Held {
                    break;
                }
            }
            if depth == 0 {
                self.go_out_of_what_is_left();
                continue;
            }
            if self.lock.state() == LockState::Held {
                let mut believed = belief(self.who, self.lock);
                self.look(depth);
                std::thread::sleep(some(&mut self.random, 0, 30));
                if self.random.below(2) == 0 {
                    let certain = self.certain();
                    if let Err(error) = wait(self.lock.refresh(Some(some(&mut self.random, 40, 400)))) {
                        self.honest(&error, certain);
                    }
                    self.look(depth);
                }
                if let Some(mut believed) = believed.take() {
                    believed.to = believed.to.min(Boottime::now());
                    self.beliefs.lock().unwrap().push(believed);
                }
            }
            while depth > 0 && self.lock.state() != LockState::Idle {
                let certain = self.certain();
                if let Err(error) = wait(self.lock.unlock()) {
                    self.honest(&error, certain);
                }
                depth -= 1;
                self.look(depth);
            }
            self.go_out_of_what_is_left();
        }
    }

    /// A call that was given up may have gone in nevertheless.
    fn go_out_of_what_is_left(&self) {
        while self.lock.state() != LockState::Idle {
            let certain = self.certain();
            if let Err(error) = wait(self.lock.unlock())
                && error.kind() != ErrorKind::InvalidOp
            {
                self.honest(&error, certain);
            }
        }
    }
}

fn profile(kind: &str, seed: u64) {
    let directory = (kind == "embedded").then(Directory::quick);
    let url = directory.as_ref().map_or("memory:".to_string(), Directory::url);
    let store = open(&url).unwrap();
    let key = fresh_key();
    let name = format!("reentrant {kind} seed {seed}");
    let beliefs = Mutex::new(Vec::new());
    let clients = stormy(&store, kind, seed, OWNERS.len() + 1);
    let objects: Vec<(usize, Lock)> = (0..OWNERS.len() * OBJECTS)
        .map(|number| {
            let who = number % OWNERS.len();
            let lock = clients[who].0.reentrant_lock(key.clone(), Some(OWNERS[who]), LockOptions::default());
            (who, lock.unwrap())
        })
        .collect();
    let lives = objects.iter().enumerate().map(|(number, (who, lock))| {
        let random = Random::new(seed * 77 + number as u64);
        let life = Life { who: *who, lock, store: &store, key: &key, random, beliefs: &beliefs };
        Box::new(move || life.live()) as Box<_>
    });
    let breaker = &clients[OWNERS.len()].0;
    all_at_once(&name, breaker, lives.collect());
    no_contradiction(&name, beliefs.into_inner().unwrap(), ROUNDS / 4);
    // In fair profile the count is exact again, once what was late has run out.
    let (client, network) = &clients[0];
    network.set(NetworkProfile::Fair);
    let options = LockOptions { expire: Some(LONG), timeout: Some(Timeout::Forever), ..LockOptions::default() };
    let lock = client.reentrant_lock(key.clone(), Some("third"), options).unwrap();
    let count = || answer(store.find(&key)).unwrap().and_then(|record| record.lock_count());
    for depth in 1..=3 {
        assert!(wait(lock.lock(LockOptions::default())).unwrap());
        assert_eq!(count(), Some(depth), "{name}");
    }
    for depth in (0..3).rev() {
        wait(lock.unlock()).unwrap();
        assert_eq!(count().unwrap_or(0), depth, "{name}");
    }
    clears_up(&store, &key, &clients);
}

/// A step that was granted at the second try may not be undone when its hold has ended, where the object that
/// made it had another number by then: its way out was counted already (storm, seed 4).
#[test]
fn a_step_that_was_left_is_not_undone() {
    let store = open("memory:").unwrap();
    let network = Network::before(Arc::clone(&store), NetworkProfile::Fair);
    let behind = |store| Client::over(store, ClientOptions { expire: LONG, ..ClientOptions::default() }).unwrap();
    let (clear, stormy) = (behind(Arc::clone(&store)), behind(Arc::clone(&network) as Arc<dyn Store>));
    let key = fresh_key();
    let object = |client: &Client| client.reentrant_lock(key.clone(), Some("owner"), LockOptions::default()).unwrap();
    let count = || answer(store.find(&key)).unwrap().and_then(|record| record.lock_count());
    let (other, lock) = (object(&clear), object(&stormy));
    assert!(wait(other.try_lock(LockOptions::default())).unwrap());
    // Its first answer is lost: something may still come of it.
    network.set(NetworkProfile::Script([Fault::CutAfter].into()));
    assert!(wait(lock.lock(LockOptions::default())).unwrap());
    assert_eq!(count(), Some(2));
    // Once more, and given up on the way: what comes is another series of steps.
    network.set(NetworkProfile::Script([Fault::GateBefore].into()));
    match lock.lock(LockOptions::default()) {
        Answer::Now(granted) => panic!("{granted:?} at the gate"),
        Answer::Later(mut asking) => {
            let _ = asking.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        }
    }
    wait(lock.unlock()).unwrap();
    assert_eq!(lock.state(), LockState::Idle);
    // The clean-up of the first step, and after the gate that of the second.
    network.open_gate();
    wait(stormy.close(Boottime::NEVER)).unwrap();
    assert_eq!(count(), Some(1), "what the other object is in was taken away");
    wait(other.unlock()).unwrap();
    assert_eq!(count(), None);
}

#[test]
fn steps_never_take_away_what_another_is_in() {
    seeds(profile);
}
