//! Requests that overlap: answered late, sent twice, cancelled, while the next one about the same hold is sent.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::lock::LockState;
use nblock::options::{LockOptions, Timeout};
use nblock::runtime::wait;
use nblock::store::Broken;

use super::endings::{OP_TIMEOUT, SHORT, Scene, UnderWay, patient, renewed};
use super::network::Fate;
use crate::scene::{LONG, PATIENCE, answer, eventually};

/// A step that was asked for twice, since its first answer was lost, is left; what is cleaned up after it must
/// not count down a second time, whatever this object has tried in between.
#[test]
fn what_is_cleaned_up_after_a_step_does_not_leave_it_again() {
    let scene = Scene::new(OP_TIMEOUT);
    let (lock, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(other.lock(patient())).unwrap());
    scene.next([Fate::CutAfter]);
    assert!(wait(lock.lock(patient())).unwrap());
    assert_eq!(scene.count(), Some(2));
    // Another step, given up on its way: it is taken back only after it has come.
    scene.next([Fate::GateBefore]);
    drop(UnderWay::begun(lock.lock(patient())));
    // The next requests: the unlock, the clean-up after the first step, and that once more.
    let (tell, told) = mpsc::channel();
    let (second, third) = (Arc::clone(&scene.network), Arc::clone(&scene.network));
    scene.network.meanwhile(move || second.meanwhile(move || third.meanwhile(move || tell.send(()).unwrap())));
    wait(lock.unlock()).unwrap();
    told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(scene.count(), Some(1), "the other one is still in");
    scene.network.open_gate();
    scene.close();
    assert_eq!(scene.count(), Some(1), "the other one is still in");
}

/// The first request for a step comes late, when the hold has ended, and the object enters what it made.
#[test]
fn a_late_step_that_its_own_object_meets_is_taken_back() {
    let op_timeout = Duration::from_secs(3);
    let scene = Scene::new(op_timeout);
    let lock = scene.reentrant();
    scene.next([Fate::CutThenGate]);
    let begun = Boottime::now();
    assert!(wait(lock.lock(patient())).unwrap());
    let (tell, told) = mpsc::channel();
    let cleaning = Arc::clone(&scene.network);
    scene.network.meanwhile(move || cleaning.meanwhile(move || tell.send(()).unwrap()));
    wait(lock.unlock()).unwrap();
    told.recv_timeout(PATIENCE).unwrap();
    scene.network.open_gate();
    // Where the machine was too slow, it takes nothing any more: this shows nothing then, and fails nothing.
    let too_late = begun + op_timeout * 2;
    eventually("the late step is applied", || scene.count() == Some(1) || too_late.has_passed());
    assert!(wait(lock.lock(patient())).unwrap());
    wait(lock.unlock()).unwrap();
    scene.close();
    assert_eq!(scene.count(), None);
}

#[test]
fn what_may_come_of_steps_is_kept_no_longer_than_they_are_in() {
    let scene = Scene::new(OP_TIMEOUT);
    let lock = scene.reentrant();
    assert!(wait(lock.lock(patient())).unwrap());
    let users = Arc::strong_count(&scene.store);
    for _ in 0..3 {
        // Not answered in time, and asked for again.
        scene.next([Fate::GateBefore]);
        assert!(wait(lock.lock(patient())).unwrap());
        wait(lock.unlock()).unwrap();
        assert_eq!(scene.count(), Some(1));
    }
    assert!(Arc::strong_count(&scene.store) > users, "each of these requests has the store");
    scene.network.open_gate();
    eventually("they are done with", || Arc::strong_count(&scene.store) == users);
    assert_eq!(scene.count(), Some(1));
}

/// The longer lease's answer comes when the shorter one is in the store already, unanswered.
#[test]
fn a_late_answer_to_a_longer_refresh_does_not_outdo_a_shorter_one() {
    let scene = Scene::new(PATIENCE);
    let (shortest, shorter) = (Duration::from_secs(1), Duration::from_secs(10));
    let lock = scene.plain();
    assert!(wait(lock.lock(LockOptions { expire: Some(shortest), ..patient() })).unwrap());
    scene.next([Fate::GateAfter, Fate::CutAfter]);
    let longer = UnderWay::begun(lock.refresh(Some(LONG)));
    assert_eq!(wait(lock.refresh(Some(shorter))).unwrap_err().kind(), ErrorKind::Indeterminate);
    scene.network.open_gate();
    longer.end().unwrap();
    assert!(lock.remaining().unwrap() <= shorter, "{:?}", lock.remaining());
}

#[test]
fn a_shorter_lease_is_renewed_in_time_although_nobody_answered() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.plain();
    assert!(wait(lock.lock(renewed(LONG))).unwrap());
    scene.next([Fate::CutAfter]);
    assert_eq!(wait(lock.refresh(Some(SHORT))).unwrap_err().kind(), ErrorKind::Indeterminate);
    let n = scene.record().unwrap().seen.n;
    eventually("it is renewed", || scene.record().unwrap().seen.n > n);
}

/// Nobody else would tell: the call that enters again is the one that hears of the loss.
#[test]
fn entering_a_lost_hold_again_tells_of_the_loss() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.reentrant();
    assert!(wait(lock.lock(renewed(SHORT * 10))).unwrap());
    eventually("it is broken", || {
        let seen = scene.record().unwrap();
        answer(scene.store.break_seen(&seen)).unwrap() == Broken::Broken
    });
    eventually("the library has heard of it", || lock.state() == LockState::Lost);
    let briefly = LockOptions { timeout: Some(Timeout::After(SHORT)), ..patient() };
    assert_eq!(wait(lock.lock(briefly)).unwrap_err().kind(), ErrorKind::Lost);
    assert_eq!(lock.state(), LockState::Idle);
    assert!(wait(lock.lock(briefly)).unwrap());
    assert_eq!(scene.count(), Some(1));
}

#[test]
fn an_unlock_that_waits_its_turn_goes_on_without_its_caller() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.reentrant();
    assert!(wait(lock.lock(patient())).unwrap());
    scene.next([Fate::GateAfter]);
    let asking = UnderWay::begun(lock.lock(patient()));
    drop(UnderWay::begun(lock.unlock()));
    scene.network.open_gate();
    assert!(asking.end().unwrap());
    eventually("one of two steps is left", || scene.count() == Some(1));
}

/// A grant without its fence is given back; the caller does not wait for the end of that.
#[test]
fn an_acquire_that_is_cancelled_while_it_gives_back_leaves_nothing() {
    for reentrant in [false, true] {
        let scene = Scene::new(PATIENCE);
        scene.network.without_fences();
        let lock = if reentrant { scene.reentrant() } else { scene.plain() };
        scene.next([Fate::Good, Fate::Unreachable, Fate::SilenceThenApplied(PATIENCE * 2)]);
        let asking = UnderWay::begun(lock.lock(LockOptions { fence: Some(true), ..patient() }));
        assert!(scene.record().is_some());
        drop(asking);
        eventually("it is given back", || scene.record().is_none());
    }
}

#[test]
fn a_loss_that_a_refresh_has_told_is_not_told_by_the_step_under_way() {
    let scene = Scene::new(PATIENCE);
    let lock = scene.reentrant();
    assert!(wait(lock.lock(patient())).unwrap());
    assert_eq!(answer(scene.store.break_seen(&scene.record().unwrap())).unwrap(), Broken::Broken);
    scene.next([Fate::GateAfter]);
    let asking = UnderWay::begun(lock.lock(patient()));
    assert_eq!(wait(lock.refresh(None)).unwrap_err().kind(), ErrorKind::Lost);
    scene.network.open_gate();
    assert!(asking.end().unwrap(), "granted anew: that the former hold was lost was told");
    wait(lock.unlock()).unwrap();
    scene.close();
    assert_eq!(scene.count(), None);
}
