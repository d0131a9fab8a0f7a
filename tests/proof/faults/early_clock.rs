//! Requests that arrive early and are applied late, with the clock of their arrival (R3): what a lease's end
//! between the two makes of them. Over the memory store, whose clock can be the early one.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::key::Key;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::store::Store;
use nblock::sys::runtime::wait;

use super::network::{Fault, Network, NetworkProfile};
use crate::asks::{Acquired, Asks, Claim, Released, Shown};
use crate::support::{LONG, PATIENCE, RawClient, answer, eventually, fresh_key, open};

/// How long a lease is that is to end while a request is kept.
const SHORT: Duration = Duration::from_millis(100);
/// How long requests are kept.
const KEPT: Duration = Duration::from_millis(300);

struct Scene {
    store: Arc<dyn Store>,
    network: Arc<Network>,
    client: Client,
    key: Key,
    lock: Lock,
}

impl Scene {
    /// A lock whose calls are as patient as `op_timeout` says.
    fn new(op_timeout: Duration) -> Scene {
        let store = open("memory:").unwrap();
        let network = Network::before(Arc::clone(&store), NetworkProfile::Fair);
        let options = ClientOptions { op_timeout, expire: LONG, ..ClientOptions::default() };
        let client = Client::over(Arc::clone(&network) as Arc<dyn Store>, options).unwrap();
        let key = fresh_key();
        let lock = client.lock(key.clone(), LockOptions::default()).unwrap();
        Scene { store, network, client, key, lock }
    }

    fn keep_the_next(&self, fault: Fault) {
        self.network.set(NetworkProfile::Script([fault].into()));
    }

    /// Somebody else's hold, past the network.
    fn taken_by_another(&self, expire: Duration) -> RawClient {
        let mut other = RawClient::new();
        eventually("it is free", || {
            let asked = answer(self.store.acquire(&self.key, other.attempt(expire)));
            matches!(asked.unwrap(), Acquired::Granted { .. })
        });
        other
    }

    fn is_of(&self, other: &RawClient) -> bool {
        let record = answer(self.store.find(&self.key)).unwrap();
        record.is_some_and(|record| record.seen().token.starts_with(&other.hold.to_string()))
    }

    fn lease_is_over(&self) -> bool {
        answer(self.store.find(&self.key)).unwrap().is_none_or(|record| record.lease.expired())
    }
}

fn expiring(expire: Duration) -> LockOptions {
    LockOptions { expire: Some(expire), timeout: Some(Timeout::After(PATIENCE)), ..LockOptions::default() }
}

/// What the other tests here rest on: the clock that decides is the one of the arrival.
#[test]
fn a_lease_that_ended_after_the_arrival_is_none_that_ended() {
    let scene = Scene::new(PATIENCE);
    let other = scene.taken_by_another(SHORT);
    scene.keep_the_next(Fault::Stalled(KEPT));
    let arrived_in_time = !scene.lease_is_over();
    let asked = Boottime::now();
    let granted = wait(scene.lock.try_lock(expiring(LONG))).unwrap();
    assert!(asked + KEPT <= Boottime::now());
    assert!(scene.lease_is_over() || granted, "it was kept until the lease was over");
    // A machine so loaded that the request left after the lease's end shows nothing.
    if arrived_in_time && !granted {
        assert!(scene.is_of(&other));
    }
    if !granted {
        assert!(wait(scene.lock.try_lock(expiring(LONG))).unwrap(), "by now it is free");
    }
    wait(scene.lock.unlock()).unwrap();
}

/// Granted, by the early clock, for a lease that is over: such a grant is none, and nothing of it stays.
#[test]
fn a_grant_that_is_over_when_it_is_made_is_none() {
    let scene = Scene::new(PATIENCE);
    scene.keep_the_next(Fault::Stalled(KEPT));
    let granted = wait(scene.lock.try_lock(expiring(SHORT))).unwrap();
    let left = scene.lock.remaining();
    if granted && left.as_ref().is_ok_and(|left| *left > Duration::ZERO) {
        let expires_at = answer(scene.store.find(&scene.key)).unwrap().expect("a hold has a record").seen().expires_at;
        assert!(Boottime::from_nanos(expires_at) >= Boottime::now(), "held, and its lease was over");
    }
    let _ = wait(scene.lock.unlock());
    wait(scene.client.close(Boottime::NEVER)).unwrap();
    assert!(scene.lease_is_over());
}

#[test]
fn a_cancelled_request_that_is_applied_at_last_lives_one_lease_from_its_arrival() {
    let op_timeout = Duration::from_millis(50);
    for fault in [Fault::Stalled(KEPT), Fault::CutThenStalled(KEPT)] {
        let scene = Scene::new(op_timeout);
        scene.network.set(NetworkProfile::Always(fault));
        let error = wait(scene.lock.try_lock(expiring(LONG))).unwrap_err();
        let arrived_before = Boottime::now();
        scene.network.set(NetworkProfile::Fair);
        assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error}");
        assert_eq!(scene.lock.state(), LockState::Idle);
        wait(scene.client.close(Boottime::NEVER)).unwrap();
        std::thread::sleep(KEPT + SHORT);
        let left = answer(scene.store.find(&scene.key)).unwrap();
        match fault {
            // Its answer came, and what it took was removed.
            Fault::Stalled(_) => assert!(left.is_none(), "an orphan"),
            // On a machine so loaded that the clean-up came after it, there is nothing to see.
            _ => {
                let expires_at = left.map_or(Boottime::ZERO, |left| Boottime::from_nanos(left.seen().expires_at));
                assert!(expires_at <= arrived_before + LONG, "an orphan that outlives its lease");
            }
        }
    }
}

/// Applied when its lease was over and another's began: it gives that one nothing, and takes nothing from it.
#[test]
fn a_renewal_and_a_release_that_were_overtaken_leave_the_next_holder_alone() {
    for release in [false, true] {
        let scene = Scene::new(PATIENCE);
        assert!(wait(scene.lock.lock(expiring(SHORT))).unwrap());
        scene.keep_the_next(Fault::Stalled(KEPT));
        std::thread::scope(|scope| {
            let late = scope.spawn(|| match release {
                true => wait(scene.lock.unlock()),
                false => wait(scene.lock.refresh(Some(LONG))),
            });
            let other = scene.taken_by_another(LONG);
            let result = late.join().unwrap();
            if let Err(error) = &result {
                assert_eq!(error.kind(), ErrorKind::Lost, "{error}");
            }
            assert!(release || result.is_err(), "renewed what was another's");
            assert!(scene.is_of(&other));
            let left = answer(scene.store.find(&scene.key)).unwrap().unwrap().lease.remaining();
            assert!(left <= LONG);
            let released = answer(scene.store.release(&scene.key, Claim::AnyOf(other.hold))).unwrap();
            assert_eq!(released, Released::Released);
        });
    }
}

/// A renewal with the early clock is applied over its own lease's end, where nobody came: the deadline is
/// counted from before it left, so what its holder believes is in the record.
#[test]
fn a_renewal_that_was_kept_beyond_the_lease_is_believed_from_its_arrival() {
    let scene = Scene::new(PATIENCE);
    assert!(wait(scene.lock.lock(expiring(SHORT))).unwrap());
    scene.keep_the_next(Fault::Stalled(KEPT));
    wait(scene.lock.refresh(Some(LONG))).unwrap();
    let believed = Boottime::now() + scene.lock.remaining().unwrap();
    let record = answer(scene.store.find(&scene.key)).unwrap().unwrap();
    assert!(believed <= Boottime::from_nanos(record.seen().expires_at), "believes in more than there is");
    wait(scene.lock.unlock()).unwrap();
}

#[test]
fn a_break_that_was_kept_breaks_only_what_was_seen() {
    let scene = Scene::new(PATIENCE);
    assert!(wait(scene.lock.lock(expiring(SHORT))).unwrap());
    eventually("it runs out", || scene.lease_is_over());
    let seen = answer(scene.store.find(&scene.key)).unwrap().unwrap();
    scene.keep_the_next(Fault::Stalled(KEPT));
    let sent = Barrier::new(2);
    std::thread::scope(|scope| {
        let breaking = scope.spawn(|| {
            let breaking = scene.client.break_seen(&seen);
            sent.wait();
            wait(breaking)
        });
        sent.wait();
        // Overdue, and saved by its holder while the break is on its way: or broken, and then the store says so.
        let saved = wait(scene.lock.refresh(Some(LONG)));
        let broken = breaking.join().unwrap().unwrap();
        match saved {
            Ok(()) => assert_eq!((broken, scene.lock.state()), (nblock::client::Broken::Changed, LockState::Held)),
            Err(error) => assert_eq!((broken, error.kind()), (nblock::client::Broken::Broken, ErrorKind::Lost)),
        }
    });
}
