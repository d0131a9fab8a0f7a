//! Each path of the lock under each fault of its first request, one by one.

use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::{Error, ErrorKind};
use nblock::key::Key;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::record::Record;
use nblock::store::{Answer, Store};
use nblock::sys::runtime::wait;

use super::network::{Fault, Network, NetworkProfile};
use crate::asks::{Asks, Shown};
use crate::support::{Directory, LONG, PATIENCE, RawClient, answer, eventually, fresh_key, open};

const OP_TIMEOUT: Duration = Duration::from_millis(150);
/// Longer than `OP_TIMEOUT`: what is late by so much is late for the caller.
const LATE: Duration = Duration::from_millis(220);
const SOON: Duration = Duration::from_millis(5);

const FATES: [Fault; 15] = [
    Fault::Good,
    Fault::Slow(SOON, SOON),
    Fault::Slow(LATE, SOON),
    Fault::Slow(SOON, LATE),
    Fault::Unreachable,
    Fault::CutBefore,
    Fault::CutAfter,
    Fault::CutThenApplied(SOON),
    Fault::Silence(LATE),
    Fault::SilenceThenApplied(LATE),
    Fault::Twice(SOON),
    Fault::Stalled(SOON),
    Fault::Stalled(LATE),
    Fault::CutThenStalled(SOON),
    Fault::CutThenStalled(LATE),
];

/// A lock behind a network, and the same store without one.
struct Scene {
    fault: Fault,
    network: Arc<Network>,
    store: Arc<dyn Store>,
    client: Client,
    key: Key,
    lock: Lock,
    _directory: Option<Directory>,
}

impl Scene {
    fn new(kind: &str, fault: Fault, owner: Option<&str>) -> Scene {
        let directory = (kind == "embedded").then(Directory::quick);
        let url = directory.as_ref().map_or("memory:".to_string(), Directory::url);
        let store = open(&url).unwrap();
        let network = Network::before(Arc::clone(&store), NetworkProfile::Fair);
        let options = ClientOptions { op_timeout: OP_TIMEOUT, expire: LONG, ..ClientOptions::default() };
        let client = Client::over(Arc::clone(&network) as Arc<dyn Store>, options).unwrap();
        let key = fresh_key();
        let lock = match owner {
            None => client.lock(key.clone(), LockOptions::default()),
            Some(owner) => client.reentrant_lock(key.clone(), Some(owner), LockOptions::default()),
        };
        Scene { fault, network, store, lock: lock.unwrap(), client, key, _directory: directory }
    }

    /// The next request meets this fault, and those after it are well.
    fn strike(&self) {
        self.network.set(NetworkProfile::Script([self.fault].into()));
    }

    fn record(&self) -> Option<Record> {
        answer(self.store.find(&self.key)).unwrap()
    }

    /// What is left in the store, once nothing works in the background any more and all that was to be
    /// applied late was.
    fn at_the_end(&self) -> Option<Record> {
        wait(self.client.close(Boottime::NEVER)).unwrap();
        std::thread::sleep(2 * LATE + SOON);
        self.record()
    }

    /// Requests that were doubled, or applied when nobody could prevent it any more, may take a free lock for one
    /// lease from their arrival (R7), no others.
    fn no_orphan(&self, left: Option<Record>) {
        let Some(left) = left else { return };
        assert!(self.fault.may_leave_an_orphan(), "an orphan");
        if self.fault.keeps_the_clock() {
            // It arrived at least as long ago as `at_the_end` waits, and nobody renewed it.
            assert!(left.lease.remaining() < LONG - 2 * LATE, "an orphan that outlives its lease");
        }
    }

    fn taken_by_another(&self) -> bool {
        let acquired = answer(self.store.acquire(&self.key, RawClient::new().attempt(LONG))).unwrap();
        matches!(acquired, crate::asks::Acquired::Granted { .. })
    }
}

/// Every store, every fault, all at once: they mostly sleep.
fn everywhere(owner: Option<&str>, path: impl Fn(&Scene) + Sync) {
    std::thread::scope(|scope| {
        for kind in ["memory", "embedded"] {
            for fault in FATES.into_iter().filter(|fault| kind == "memory" || !fault.keeps_the_clock()) {
                let path = &path;
                let name = format!("{kind} {fault:?}");
                let built = std::thread::Builder::new().name(name);
                built.spawn_scoped(scope, move || path(&Scene::new(kind, fault, owner))).unwrap();
            }
        }
    });
}

/// An error that says that nobody knows, or that nothing came through.
fn honest(error: &Error) {
    assert!(matches!(error.kind(), ErrorKind::Indeterminate | ErrorKind::Unreachable), "{:?} {error}", error.kind());
}

fn patient() -> LockOptions {
    LockOptions { timeout: Some(Timeout::After(PATIENCE)), ..LockOptions::default() }
}

#[test]
fn one_try() {
    everywhere(None, |scene| {
        scene.strike();
        match wait(scene.lock.try_lock(LockOptions::default())) {
            Ok(granted) => {
                assert!(granted, "nobody else was there");
                assert!(!scene.taken_by_another());
                wait(scene.lock.unlock()).unwrap();
            }
            Err(error) => {
                honest(&error);
                assert_eq!(scene.lock.state(), LockState::Idle);
            }
        }
        let left = scene.at_the_end();
        scene.no_orphan(left);
    });
}

#[test]
fn waiting_is_granted_whatever_the_first_request_met() {
    everywhere(None, |scene| {
        scene.strike();
        assert!(wait(scene.lock.lock(patient())).unwrap());
        assert!(!scene.taken_by_another());
        let token = scene.lock.instance_token().unwrap();
        std::thread::sleep(2 * LATE);
        // What came late has not changed whose it is.
        assert_eq!(*scene.record().unwrap().seen().token, *token);
        assert_eq!(scene.lock.state(), LockState::Held);
        wait(scene.lock.unlock()).unwrap();
        assert!(scene.at_the_end().is_none(), "an orphan");
    });
}

#[test]
fn what_is_late_after_the_hold_has_ended_leaves_no_orphan() {
    everywhere(None, |scene| {
        scene.strike();
        assert!(wait(scene.lock.lock(patient())).unwrap());
        wait(scene.lock.unlock()).unwrap();
        let left = scene.at_the_end();
        scene.no_orphan(left);
    });
}

#[test]
fn cancelled_while_the_first_request_is_under_way() {
    everywhere(None, |scene| {
        scene.strike();
        match scene.lock.lock(patient()) {
            Answer::Now(granted) => {
                assert!(granted.unwrap());
                wait(scene.lock.unlock()).unwrap();
            }
            Answer::Later(mut asking) => {
                let _ = asking.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                drop(asking);
                eventually("the lock is idle", || scene.lock.state() != LockState::Pending);
                if scene.lock.state() == LockState::Held {
                    wait(scene.lock.unlock()).unwrap();
                }
            }
        }
        let left = scene.at_the_end();
        scene.no_orphan(left);
    });
}

#[test]
fn unlock() {
    everywhere(None, |scene| {
        assert!(wait(scene.lock.lock(patient())).unwrap());
        scene.strike();
        // Sent inside the deadline: whatever came of it, it was not lost.
        if let Err(error) = wait(scene.lock.unlock()) {
            honest(&error);
        }
        assert_eq!(scene.lock.state(), LockState::Idle);
        assert!(scene.at_the_end().is_none(), "the release did not go on");
    });
}

/// R7: judged by when it left. What happened to the record while it was on its way is no loss.
#[test]
fn an_unlock_that_is_overtaken_on_its_way() {
    const EXPIRE: Duration = Duration::from_millis(500);
    for (kind, fault) in [
        ("memory", Fault::Slow(EXPIRE * 2, SOON)),
        ("embedded", Fault::Slow(EXPIRE * 2, SOON)),
        ("memory", Fault::CutBefore),
    ] {
        let scene = Scene::new(kind, fault, None);
        let options = ClientOptions { op_timeout: PATIENCE, ..ClientOptions::default() };
        let client = Client::over(Arc::clone(&scene.network) as Arc<dyn Store>, options).unwrap();
        let lock = client.lock(scene.key.clone(), LockOptions::default()).unwrap();
        assert!(wait(lock.try_lock(LockOptions { expire: Some(EXPIRE), ..patient() })).unwrap());
        scene.strike();
        let inside = lock.remaining().unwrap() > EXPIRE / 4;
        let unlocked = lock.unlock();
        let sent = lock.remaining().is_err();
        if fault != Fault::CutBefore {
            eventually("the lease runs out and another takes it", || scene.taken_by_another());
        }
        let unlocked = wait(unlocked);
        // On a machine so loaded that it left late, there is nothing to see.
        if inside && sent {
            unlocked.unwrap_or_else(|error| panic!("{kind} {fault:?}: {error}"));
        }
    }
}

#[test]
fn unlock_and_lock_again_at_once() {
    everywhere(None, |scene| {
        assert!(wait(scene.lock.lock(patient())).unwrap());
        scene.strike();
        let _ = wait(scene.lock.unlock());
        // A release that goes on, or comes late or twice, is the former hold's.
        assert!(wait(scene.lock.lock(patient())).unwrap());
        std::thread::sleep(2 * LATE);
        assert_eq!(scene.lock.state(), LockState::Held);
        assert!(!scene.taken_by_another());
        wait(scene.lock.refresh(None)).unwrap();
        wait(scene.lock.unlock()).unwrap();
        assert!(scene.at_the_end().is_none());
    });
}

#[test]
fn refresh() {
    everywhere(None, |scene| {
        assert!(wait(scene.lock.lock(patient())).unwrap());
        scene.strike();
        if let Err(error) = wait(scene.lock.refresh(Some(LONG * 2))) {
            honest(&error);
        }
        assert_eq!(scene.lock.state(), LockState::Held, "an unanswered refresh leaves the hold as it was");
        let certain = scene.lock.remaining().unwrap();
        wait(scene.lock.refresh(Some(LONG * 3))).unwrap();
        assert!(scene.lock.remaining().unwrap() > certain.max(LONG * 2));
        std::thread::sleep(2 * LATE);
        // A late renewal has not taken back the later one.
        assert!(scene.record().unwrap().lease.remaining() > LONG * 2);
        wait(scene.lock.unlock()).unwrap();
        assert!(scene.at_the_end().is_none());
    });
}

#[test]
fn a_refresh_that_shortens() {
    everywhere(None, |scene| {
        assert!(wait(scene.lock.lock(patient())).unwrap());
        scene.strike();
        let _ = wait(scene.lock.refresh(Some(LONG / 2)));
        // Applied or not, nobody may count on more than this.
        assert!(scene.lock.remaining().unwrap() <= LONG / 2);
        std::thread::sleep(2 * LATE);
        let certain = scene.lock.remaining().unwrap();
        assert!(scene.record().unwrap().lease.remaining() + Duration::from_millis(1) >= certain);
        wait(scene.lock.unlock()).unwrap();
        assert!(scene.at_the_end().is_none());
    });
}

#[test]
fn renewals_by_the_library() {
    everywhere(None, |scene| {
        let expire = Some(Duration::from_millis(900));
        let renewed = LockOptions { expire, auto_refresh: Some(true), ..patient() };
        assert!(wait(scene.lock.lock(renewed)).unwrap());
        let first = scene.record().unwrap().seen();
        scene.strike();
        eventually("it is renewed", || match scene.record() {
            Some(record) => record.seen().n > first.n + 2,
            None => panic!("it was lost"),
        });
        // Overdue it may have been, on a loaded machine: lost it was not.
        assert!(matches!(scene.lock.state(), LockState::Held | LockState::Overdue));
        assert_eq!(scene.record().unwrap().seen().token, first.token);
        let _ = wait(scene.lock.unlock());
        let left = scene.at_the_end();
        assert!(left.is_none(), "renewed after unlock");
    });
}

#[test]
fn the_lock_is_freed_or_the_client_closed_while_it_waits() {
    everywhere(None, |scene| {
        scene.strike();
        let answer = scene.lock.lock(patient());
        let closing = scene.client.close(Boottime::NEVER);
        let granted = wait(answer);
        wait(closing).unwrap();
        std::thread::sleep(2 * LATE + SOON);
        let left = scene.record();
        match granted {
            // Granted before the client was closed: a plain lease, which runs out (R15).
            Ok(true) => {}
            _ => scene.no_orphan(left),
        }
    });
}

#[test]
fn reentrant_steps_are_counted_once() {
    everywhere(Some("owner"), |scene| {
        assert!(wait(scene.lock.lock(patient())).unwrap());
        scene.strike();
        assert!(wait(scene.lock.lock(patient())).unwrap());
        std::thread::sleep(2 * LATE);
        let count = || scene.record().and_then(|record| record.lock_count());
        assert_eq!(count(), Some(2));
        scene.strike();
        match wait(scene.lock.unlock()) {
            Ok(()) => {}
            Err(error) => honest(&error),
        }
        eventually("the step is made", || count() == Some(1));
        std::thread::sleep(2 * LATE);
        assert_eq!(count(), Some(1), "the step was made once");
        wait(scene.lock.unlock()).unwrap();
        assert!(scene.at_the_end().is_none());
    });
}

#[test]
fn a_reentrant_step_that_is_given_up_is_undone() {
    everywhere(Some("owner"), |scene| {
        assert!(wait(scene.lock.lock(patient())).unwrap());
        let other = scene.client.reentrant_lock(scene.key.clone(), Some("owner"), LockOptions::default()).unwrap();
        scene.strike();
        let mut entered = 1;
        if let Answer::Later(mut asking) = other.lock(patient()) {
            let _ = asking.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            drop(asking);
            eventually("the lock is idle", || other.state() != LockState::Pending);
        }
        entered += u32::from(other.state() == LockState::Held);
        std::thread::sleep(2 * LATE + OP_TIMEOUT);
        let count = || scene.record().and_then(|record| record.lock_count());
        eventually("the step is undone", || count() == Some(entered));
        for _ in 0..entered {
            wait(scene.lock.unlock()).unwrap();
        }
        drop(other);
        scene.no_orphan(scene.at_the_end());
    });
}

#[test]
fn breaking_by_force() {
    everywhere(None, |scene| {
        assert!(wait(scene.lock.lock(patient())).unwrap());
        let seen = scene.record().unwrap();
        wait(scene.lock.refresh(None)).unwrap();
        scene.strike();
        // It was renewed since: whatever becomes of the request, nothing is broken.
        if let Err(error) = wait(scene.client.break_seen(&seen)) {
            honest(&error);
        }
        std::thread::sleep(2 * LATE);
        assert_eq!(scene.lock.state(), LockState::Held);
        let seen = scene.record().expect("it is not broken");
        scene.strike();
        let broken = wait(scene.client.break_seen(&seen));
        std::thread::sleep(2 * LATE);
        match broken {
            Ok(_) => assert!(scene.record().is_none()),
            Err(error) => honest(&error),
        }
        // The store's word, and nobody's guess.
        let gone = scene.record().is_none();
        match wait(scene.lock.refresh(None)) {
            Ok(()) => assert!(!gone),
            Err(error) => assert!(gone && error.kind() == ErrorKind::Lost, "{error}"),
        }
    });
}
