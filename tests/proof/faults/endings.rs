//! Holds that end while something else about them is under way: each schedule by itself, in a fixed order.

use std::future::Future;
use std::pin::Pin;
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::thread;
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::{Error, ErrorKind};
use nblock::ffi::*;
use nblock::key::Key;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, IfHeld, LockOptions, Timeout};
use nblock::record::Record;
use nblock::store::{Answer, Store};
use nblock::sys::runtime::{block_on, wait};

use super::network::{Fault, Network, NetworkProfile};
use crate::asks::{Acquired, Asks, Broken, Claim, Shown};
use crate::support::{LONG, PATIENCE, RawClient, answer, eventually, fresh_key, open};

/// Short: requests that nobody answers are given up after it.
pub const OP_TIMEOUT: Duration = Duration::from_millis(150);
/// A lease that a test sees running out, or being renewed.
pub const SHORT: Duration = Duration::from_millis(300);

/// A store, a network before it, and a client behind that.
pub struct Scene {
    pub network: Arc<Network>,
    pub store: Arc<dyn Store>,
    pub client: Client,
    pub key: Key,
}

impl Scene {
    pub fn new(op_timeout: Duration) -> Scene {
        let store = open("memory:").unwrap();
        let network = Network::before(Arc::clone(&store), NetworkProfile::Fair);
        let options = ClientOptions { op_timeout, expire: LONG, ..ClientOptions::default() };
        let client = Client::over(Arc::clone(&network) as Arc<dyn Store>, options).unwrap();
        Scene { network, store, client, key: fresh_key() }
    }

    pub fn plain(&self) -> Arc<Lock> {
        Arc::new(self.client.lock(self.key.clone(), LockOptions::default()).unwrap())
    }

    /// One of the objects that share an owner token.
    pub fn reentrant(&self) -> Arc<Lock> {
        Arc::new(self.client.reentrant_lock(self.key.clone(), Some("owner"), LockOptions::default()).unwrap())
    }

    /// What happens to the next requests.
    pub fn next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.network.set(NetworkProfile::Script(faults.into_iter().collect()));
    }

    pub fn record(&self) -> Option<Record> {
        answer(self.store.find(&self.key)).unwrap()
    }

    pub fn count(&self) -> Option<u32> {
        self.record().and_then(|record| record.lock_count())
    }

    pub fn close(&self) {
        wait(self.client.close(Boottime::NEVER)).unwrap();
    }
}

pub fn patient() -> LockOptions {
    LockOptions { timeout: Some(Timeout::After(PATIENCE)), ..LockOptions::default() }
}

pub fn renewed(expire: Duration) -> LockOptions {
    LockOptions { auto_refresh: Some(true), expire: Some(expire), ..patient() }
}

/// A call under way, which has sent what it sends first.
pub struct UnderWay<T>(Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>);

impl<T: Send + 'static> UnderWay<T> {
    pub fn begun(answer: Answer<T, Error>) -> UnderWay<T> {
        let Answer::Later(mut call) = answer else { panic!("it was answered at once") };
        // Started: the library's timers run.
        nblock::sys::runtime::handle().unwrap();
        assert!(call.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        UnderWay(call)
    }

    pub fn end(self) -> Result<T, Error> {
        block_on(self.0).unwrap()
    }
}

#[test]
fn a_reentrant_grant_that_comes_after_its_lock_was_freed_is_undone() {
    let scene = Scene::new(PATIENCE);
    let (lock, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(other.lock(patient())).unwrap());
    // The first request finds the hold, the second enters it.
    scene.next([Fault::Good, Fault::GateAfter]);
    let asking = UnderWay::begun(lock.lock(patient()));
    assert_eq!(scene.count(), Some(2));
    lock.abandon();
    scene.network.open_gate();
    assert_eq!(asking.end().unwrap_err().kind(), ErrorKind::Cancelled);
    eventually("the step is undone", || scene.count() == Some(1));
    wait(other.unlock()).unwrap();
    assert!(scene.record().is_none());
}

/// As above, and an earlier request for the step has had no answer.
#[test]
fn a_step_that_was_asked_for_twice_is_undone_when_its_lock_was_freed_meanwhile() {
    for twice in [Fault::CutAfter, Fault::CutBefore] {
        let scene = Scene::new(PATIENCE);
        let (lock, other) = (scene.reentrant(), scene.reentrant());
        assert!(wait(other.lock(patient())).unwrap());
        // The first request finds the hold, the second has no answer, the third is granted.
        scene.next([Fault::Good, twice, Fault::GateAfter]);
        let asking = thread::spawn({
            let lock = Arc::clone(&lock);
            move || wait(lock.lock(patient()))
        });
        let sent = || scene.network.requests() >= 4;
        eventually("the last request is on its way", sent);
        lock.abandon();
        scene.network.open_gate();
        assert_eq!(asking.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
        eventually("the step is undone", || scene.count() == Some(1));
        wait(other.unlock()).unwrap();
        assert!(scene.record().is_none());
    }
}

#[test]
fn a_reentrant_grant_that_comes_after_its_client_was_closed_is_undone() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.reentrant();
    scene.next([Fault::GateAfter]);
    let asking = UnderWay::begun(lock.lock(patient()));
    assert_eq!(scene.count(), Some(1));
    let closing = scene.client.close(Boottime::NEVER);
    scene.network.open_gate();
    assert_eq!(asking.end().unwrap_err().kind(), ErrorKind::Cancelled);
    wait(closing).unwrap();
    assert_eq!(scene.count(), None, "the close waits until the step is undone");
}

/// A program that ends after the close leaves nothing of what was asked for meanwhile.
#[test]
fn a_close_waits_for_what_is_being_asked_for() {
    let slow = Duration::from_millis(50);
    for fault in [Fault::GateAfter, Fault::GateBefore, Fault::Slow(slow, slow)] {
        for patience in [patient(), LockOptions { timeout: Some(Timeout::NoWait), ..patient() }] {
            let scene = Scene::new(PATIENCE);
            let lock = scene.plain();
            scene.next([fault]);
            let asking = UnderWay::begun(lock.lock(patience));
            let closing = scene.client.close(Boottime::NEVER);
            let client = thread::spawn(move || asking.end());
            scene.network.open_gate();
            wait(closing).unwrap();
            assert!(scene.record().is_none(), "{fault:?}");
            assert_eq!(client.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
        }
    }
}

/// The grants race the close; whichever way each goes, nothing that is renewed stays behind.
#[test]
fn a_client_that_closes_gives_back_all_that_is_renewed() {
    for _ in 0..20 {
        let scene = Scene::new(PATIENCE);
        thread::scope(|scope| {
            let holders: Vec<_> = (0..600)
                .map(|_| {
                    let lock = scene.client.lock(fresh_key(), LockOptions::default()).unwrap();
                    // Due for renewal all the time.
                    assert!(wait(lock.try_lock(renewed(Duration::from_millis(9)))).unwrap());
                    lock
                })
                .collect();
            let late = scope.spawn(|| {
                let mut locks = Vec::new();
                loop {
                    let Ok(lock) = scene.client.lock(fresh_key(), LockOptions::default()) else { return locks };
                    let granted = wait(lock.try_lock(renewed(LONG)));
                    locks.push(lock);
                    match granted {
                        Ok(granted) => assert!(granted, "nobody else was there"),
                        Err(error) => {
                            assert!(matches!(error.kind(), ErrorKind::InvalidOp | ErrorKind::Cancelled), "{error}");
                            return locks;
                        }
                    }
                }
            });
            scene.close();
            let late = late.join().unwrap();
            // What was granted just then is on its way out: closing again waits for it.
            scene.close();
            let all = answer(scene.store.list_all(nblock::store::Filter::All)).unwrap();
            let left = all.len();
            assert_eq!(left, 0, "of {}", holders.len() + late.len());
        });
    }
}

#[test]
fn nothing_is_renewed_anew_once_its_client_is_closed() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.plain();
    assert!(wait(lock.try_lock(LockOptions { expire: Some(SHORT), ..patient() })).unwrap());
    scene.close();
    assert_eq!(lock.enable_auto_refresh().unwrap_err().kind(), ErrorKind::InvalidOp);
    let end = scene.record().unwrap().seen().expires_at;
    eventually("its lease runs out", || scene.record().unwrap().seen().expires_at < Boottime::now().as_nanos());
    assert_eq!(scene.record().unwrap().seen().expires_at, end);
}

#[test]
fn closing_waits_for_a_reentrant_lock_that_is_busy() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.reentrant();
    assert!(wait(lock.lock(renewed(LONG))).unwrap());
    scene.next([Fault::GateAfter]);
    let asking = UnderWay::begun(lock.lock(patient()));
    assert_eq!(scene.count(), Some(2));
    thread::scope(|scope| {
        let closed = scope.spawn(|| scene.close());
        eventually("it is being closed", || scene.client.is_closed());
        scene.network.open_gate();
        assert_eq!(asking.end().unwrap_err().kind(), ErrorKind::Cancelled);
        closed.join().unwrap();
    });
    assert!(scene.record().is_none(), "all of the hold was given back");
}

#[test]
fn a_reentrant_lock_that_is_freed_during_its_unlock_is_not_renewed_any_more() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.reentrant();
    assert!(wait(lock.lock(renewed(SHORT))).unwrap());
    assert!(wait(lock.lock(renewed(SHORT))).unwrap());
    scene.next([Fault::GateAfter]);
    let unlocking = UnderWay::begun(lock.unlock());
    eventually("the step is made", || scene.count() == Some(1));
    lock.abandon();
    scene.network.open_gate();
    unlocking.end().unwrap();
    let watched = Boottime::now();
    eventually("its lease runs out", || {
        scene.record().is_some_and(|record| record.seen().expires_at < Boottime::now().as_nanos())
    });
    assert!(Boottime::now().since(watched) < PATIENCE);
}

/// A step was sent twice, since its first answer was lost; the unlock that follows has no answer in time.
/// What is cleaned up after the one must not be taken for the other.
#[test]
fn an_unanswered_step_is_not_undone_while_its_unlock_is_under_way() {
    let scene = Scene::new(OP_TIMEOUT);
    let (lock, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(other.lock(patient())).unwrap());
    scene.next([Fault::CutAfter]);
    assert!(wait(lock.lock(patient())).unwrap());
    assert_eq!(scene.count(), Some(2));
    scene.next([Fault::GateBefore]);
    assert_eq!(wait(lock.unlock()).unwrap_err().kind(), ErrorKind::Indeterminate);
    assert_eq!(lock.state(), LockState::Idle);
    scene.network.open_gate();
    // All that goes on in the background.
    scene.close();
    assert_eq!(scene.count(), Some(1), "counted down once: the other one is still in");
}

/// What was undone late may not be a step that was left by then, whatever became of steps in between.
#[test]
fn a_step_that_was_left_is_not_undone() {
    let scene = Scene::new(OP_TIMEOUT);
    let elsewhere = Client::over(Arc::clone(&scene.store), ClientOptions::default()).unwrap();
    let other = elsewhere.reentrant_lock(scene.key.clone(), Some("owner"), LockOptions::default()).unwrap();
    assert!(wait(other.lock(patient())).unwrap());
    let lock = scene.reentrant();
    // Its first answer is lost: something may still come of it.
    scene.next([Fault::CutAfter]);
    assert!(wait(lock.lock(patient())).unwrap());
    assert_eq!(scene.count(), Some(2));
    // Once more, and given up on the way.
    scene.next([Fault::GateBefore]);
    drop(UnderWay::begun(lock.lock(patient())));
    wait(lock.unlock()).unwrap();
    assert_eq!(lock.state(), LockState::Idle);
    // The clean-up of the first step, and after the gate that of the second.
    scene.network.open_gate();
    scene.close();
    assert_eq!(scene.count(), Some(1), "what the other object is in was taken away");
    wait(other.unlock()).unwrap();
    assert!(scene.record().is_none());
}

/// A thread asks, is granted, and stands in line behind another when it gives up waiting for the answer.
#[test]
fn a_request_given_up_before_the_line_is_not_granted_at_its_back() {
    let scene = Scene::new(OP_TIMEOUT);
    let held = answer(scene.store.acquire(&scene.key, RawClient::new().attempt(LONG))).unwrap();
    let Acquired::Granted { token, .. } = held else { panic!("{held:?}") };
    let (first, second) = (scene.plain(), scene.plain());
    let (tell, told) = std::sync::mpsc::channel();
    scene.next([Fault::GateAfter]);
    let (before, store, key) = (Arc::clone(&first), Arc::clone(&scene.store), scene.key.clone());
    // While the second thread's request is sent, the first joins the line, and the lock becomes free.
    scene.network.meanwhile(move || {
        tell.send(UnderWay::begun(before.lock(patient()))).unwrap();
        answer(store.release(&key, Claim::Token(token))).unwrap();
    });
    let asking = UnderWay::begun(second.lock(patient()));
    assert!(scene.record().is_some_and(|record| *record.seen().token != *token.to_string()), "it was granted");
    let uses = |lock: Arc<Lock>, asking: UnderWay<bool>| {
        thread::spawn(move || {
            assert!(asking.end().unwrap());
            wait(lock.unlock()).unwrap();
        })
    };
    let (first, second) = (uses(first, told.recv().unwrap()), uses(second, asking));
    // By then the second has given its request up. If not, this shows nothing, and fails nothing.
    thread::sleep(2 * OP_TIMEOUT);
    scene.network.open_gate();
    first.join().unwrap();
    second.join().unwrap();
    scene.close();
    assert!(scene.record().is_none());
}

#[test]
fn a_thread_that_queues_on_a_lock_object_is_told_when_it_is_freed() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.plain();
    assert!(wait(lock.lock(patient())).unwrap());
    let queueing = LockOptions { if_held: Some(IfHeld::Wait), timeout: Some(Timeout::Forever), ..patient() };
    let (first, second) = (UnderWay::begun(lock.lock(queueing)), UnderWay::begun(lock.lock(queueing)));
    lock.abandon();
    assert_eq!(first.end().unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(second.end().unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn a_hold_that_is_entered_again_is_renewed_as_before() {
    let scene = Scene::new(PATIENCE);
    scene.network.without_fences();
    let lock = scene.reentrant();
    let fenced = LockOptions { fence: Some(true), ..patient() };
    assert!(wait(lock.lock(fenced)).unwrap());
    let fence = wait(lock.fence()).unwrap();
    for _ in 0..5 {
        wait(lock.refresh(None)).unwrap();
    }
    scene.next([Fault::GateAfter]);
    let refreshing = UnderWay::begun(lock.refresh(None));
    assert!(wait(lock.lock(fenced)).unwrap());
    assert_eq!(wait(lock.fence()).unwrap(), fence, "one hold, one fence");
    scene.network.open_gate();
    refreshing.end().unwrap();
    wait(lock.refresh(Some(LONG * 3))).unwrap();
    assert!(lock.remaining().unwrap() > LONG * 2, "what was renewed counts");
}

#[test]
fn a_refresh_that_meets_our_own_unlock_is_no_loss() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.plain();
    assert!(wait(lock.lock(patient())).unwrap());
    scene.next([Fault::GateBefore]);
    let refreshing = UnderWay::begun(lock.refresh(None));
    wait(lock.unlock()).unwrap();
    scene.network.open_gate();
    let error = refreshing.end().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidOp, "{error}");
}

#[test]
fn a_loss_that_a_refresh_has_told_is_not_told_again() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.plain();
    assert!(wait(lock.lock(renewed(SHORT * 10))).unwrap());
    // Renewals change what was seen: it may take a few tries.
    eventually("it is broken", || {
        let seen = scene.record().unwrap();
        answer(scene.store.break_seen(&seen)).unwrap() == Broken::Broken
    });
    scene.next([Fault::GateAfter]);
    let refreshing = UnderWay::begun(lock.refresh(None));
    eventually("the library has heard of it", || lock.state() == LockState::Lost);
    scene.network.open_gate();
    assert_eq!(refreshing.end().unwrap_err().kind(), ErrorKind::Lost);
    assert_eq!(lock.state(), LockState::Idle);
    assert_eq!(wait(lock.unlock()).unwrap_err().kind(), ErrorKind::InvalidOp);
}

/// An object that never locked may unlock what its owner token holds, and has no deadline of its own.
#[test]
fn an_unlock_by_another_object_whose_answer_is_lost() {
    let scene = Scene::new(PATIENCE);
    let (holder, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(holder.lock(patient())).unwrap());
    // It looks at the record, and then leaves.
    scene.next([Fault::Good, Fault::CutAfter]);
    wait(other.unlock()).unwrap();
    assert!(scene.record().is_none());
}

/// An operation whose grant nobody took note of is given back, also when the lock is in use meanwhile.
#[test]
fn an_untold_reentrant_grant_that_is_cancelled_while_the_lock_is_busy() {
    let name = format!("memory:{}", fresh_key().as_str());
    let (store, key) = (open(&name).unwrap(), fresh_key());
    let url = std::ffi::CString::new(name).unwrap();
    let text = std::ffi::CString::new(key.as_str()).unwrap();
    // SAFETY: every pointer is a text that lives, a place of this function, or NULL where that is fine.
    unsafe {
        let (mut client, mut lock) = (null_mut(), null_mut());
        assert_eq!(nbl_client_new(url.as_ptr(), null(), &mut client, null_mut()), NBL_OK);
        let (text, owner) = (text.as_ptr(), c"owner".as_ptr());
        let made = nbl_reentrant_lock_new(client, text, NBL_CSTR, owner, null(), &mut lock, null_mut());
        assert_eq!(made, NBL_OK);
        for _ in 0..200 {
            let (mut granted, mut more) = (null_mut(), null_mut());
            assert_eq!(nbl_lock_start(lock, null(), &mut granted, null_mut()), NBL_OK);
            assert_eq!(nbl_op_wait(granted, NBL_FOREVER, null_mut()), NBL_OK);
            // Reported; a second one, not reported.
            assert_eq!(nbl_lock_start(lock, null(), &mut more, null_mut()), NBL_OK);
            let unlocking = thread::spawn({
                let lock = lock as usize;
                move || nbl_unlock(lock as *mut nbl_lock_t, null_mut())
            });
            assert_eq!(nbl_op_cancel(more), NBL_OK);
            assert_eq!(unlocking.join().unwrap(), NBL_OK);
            eventually("both steps are taken back", || answer(store.find(&key)).unwrap().is_none());
            nbl_op_free(more);
            nbl_op_free(granted);
        }
        nbl_lock_free(lock);
        nbl_client_free(client);
    }
}
