//! How many requests each operation of a lock takes, where nothing goes wrong: what a network costs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::lock::Lock;
use nblock::options::{ClientOptions, LockOptions};
use nblock::protocol::{Change, Reply};
use nblock::record::Record;
use nblock::store::{Answer, Cursor, Filter, Notice, Page, Pong, Readiness, Store, StoreError, Watch};
use nblock::sys::runtime::{block_on, sleep_until, wait};
use nblock::token::HoldId;

use crate::support::{LONG, PATIENCE, eventually, fresh_key, open};

/// A store that counts what it is asked. Its answers come later, as a server's do.
struct Counting {
    store: Arc<dyn Store>,
    requests: AtomicUsize,
    /// How many changes each request of many had.
    batches: Mutex<Vec<usize>>,
    /// Requests of many changes are sent while nobody has this.
    gate: Mutex<()>,
}

impl Counting {
    fn later<T: Send + 'static>(&self, answer: Answer<T>) -> Answer<T> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        Answer::later(async move {
            tokio::task::yield_now().await;
            answer.get().await
        })
    }
}

impl Store for Counting {
    fn change(&self, key: &Key, change: Change) -> Answer<Reply> {
        self.later(self.store.change(key, change))
    }

    fn change_many(&self, changes: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>> {
        drop(self.gate.lock().unwrap());
        self.batches.lock().unwrap().push(changes.len());
        self.later(self.store.change_many(changes))
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        self.later(self.store.find(key))
    }

    fn list(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page> {
        self.later(self.store.list(filter, from))
    }

    fn fence(&self, key: &Key) -> Answer<u64> {
        self.later(self.store.fence(key))
    }

    fn watch(&self, _key: &Key) -> Box<dyn Watch> {
        struct Quiet;
        impl Watch for Quiet {
            fn poll_change(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Notice> {
                std::task::Poll::Pending
            }
        }
        Box::new(Quiet)
    }

    fn prepare(&self) -> Answer<Readiness> {
        self.store.prepare()
    }

    fn ping(&self) -> Answer<Pong> {
        self.store.ping()
    }

    fn location(&self) -> String {
        self.store.location()
    }

    fn margin(&self, expire: Duration) -> Duration {
        self.store.margin(expire)
    }

    fn safety_check(&self, _waited: Duration) -> Duration {
        PATIENCE
    }

    fn awaited_elsewhere(&self, _key: &Key) -> bool {
        false
    }
}

struct Scene {
    counting: Arc<Counting>,
    client: Client,
}

impl Scene {
    fn new() -> Scene {
        let store = open(&format!("memory:{}", HoldId::random())).unwrap();
        let counting = Arc::new(Counting {
            store,
            requests: AtomicUsize::new(0),
            batches: Mutex::default(),
            gate: Mutex::default(),
        });
        let options = ClientOptions { op_timeout: PATIENCE, expire: LONG, ..ClientOptions::default() };
        let client = Client::over(Arc::clone(&counting) as Arc<dyn Store>, options).unwrap();
        Scene { counting, client }
    }

    fn plain(&self, key: &Key) -> Lock {
        self.client.lock(key.clone(), LockOptions::default()).unwrap()
    }

    fn reentrant(&self, key: &Key) -> Lock {
        self.client.reentrant_lock(key.clone(), Some("owner"), LockOptions::default()).unwrap()
    }

    /// Checks how many requests something takes.
    fn takes<T>(&self, requests: usize, what: &str, does: impl FnOnce() -> T) -> T {
        let before = self.counting.requests.load(Ordering::SeqCst);
        let done = does();
        assert_eq!(self.counting.requests.load(Ordering::SeqCst) - before, requests, "{what}");
        done
    }
}

fn granted(lock: &Lock) {
    assert!(wait(lock.try_lock(LockOptions::default())).unwrap());
}

#[test]
fn a_plain_lock() {
    let scene = Scene::new();
    let key = fresh_key();
    let (lock, other) = (scene.plain(&key), scene.plain(&key));
    scene.takes(1, "an acquire of what is free", || granted(&lock));
    scene.takes(1, "a try of what is held", || {
        assert!(!wait(other.try_lock(LockOptions::default())).unwrap());
    });
    scene.takes(1, "a refresh", || wait(lock.refresh(None)).unwrap());
    scene.takes(1, "an unlock", || wait(lock.unlock()).unwrap());

    let short = LockOptions { expire: Some(Duration::from_millis(200)), ..LockOptions::default() };
    assert!(wait(lock.try_lock(short)).unwrap());
    eventually("the lease runs out", || {
        wait(scene.client.find(&key)).unwrap().is_some_and(|record| record.lease.expired())
    });
    scene.takes(2, "a take-over", || granted(&other));
    wait(other.unlock()).unwrap();
}

#[test]
fn a_reentrant_lock() {
    let scene = Scene::new();
    let key = fresh_key();
    let (lock, other) = (scene.reentrant(&key), scene.reentrant(&key));
    scene.takes(1, "the first step", || granted(&lock));
    scene.takes(1, "a nested step", || granted(&lock));
    scene.takes(2, "the first step of another object into the hold", || granted(&other));
    scene.takes(1, "a nested step of that", || granted(&other));
    for (object, times) in [(&lock, 2), (&other, 2)] {
        for _ in 0..times {
            scene.takes(1, "a step out", || wait(object.unlock()).unwrap());
        }
    }
    assert!(wait(scene.client.find(&key)).unwrap().is_none());
}

#[test]
fn a_fence_and_its_proof() {
    let scene = Scene::new();
    let lock = scene.plain(&fresh_key());
    let options = LockOptions { fence: Some(true), ..LockOptions::default() };
    scene.takes(1, "a grant that carries its fence", || {
        assert!(wait(lock.try_lock(options)).unwrap());
    });
}

/// Many holds are renewed in few requests: all that are due when the request before was sent go with the next.
#[test]
fn renewals() {
    const HOLDS: usize = 200;
    let scene = Scene::new();
    let expire = Duration::from_secs(3);
    let options = LockOptions { auto_refresh: Some(true), expire: Some(expire), ..LockOptions::default() };
    let locks: Vec<Lock> = (0..HOLDS).map(|_| scene.plain(&fresh_key())).collect();
    let gate = scene.counting.gate.lock().unwrap();
    for lock in &locks {
        assert!(wait(lock.try_lock(options)).unwrap());
    }
    // However long the grants took: now the last of them is due as well, and the first request has still to be sent.
    block_on(sleep_until(Boottime::now() + expire / 3)).unwrap();
    drop(gate);
    let renewed = || scene.counting.batches.lock().unwrap().iter().sum::<usize>() >= HOLDS;
    eventually("all are renewed", renewed);
    let batches = scene.counting.batches.lock().unwrap().clone();
    let first_two: usize = batches.iter().take(2).sum();
    assert!(first_two >= HOLDS, "{HOLDS} holds were renewed in requests of {batches:?}");
    for lock in &locks {
        wait(lock.unlock()).unwrap();
    }
}
