//! Requests that overlap: answered late, sent twice, cancelled, while the next one about the same hold is sent.

use std::sync::{Arc, Barrier, mpsc};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::store::Answer;
use nblock::sys::runtime::{block_on, until, wait};

use super::endings::{OP_TIMEOUT, SHORT, Scene, UnderWay, patient, renewed};
use super::network::{Fault, Faults, NetworkProfile};
use crate::asks::{Asks, Broken, Shown};
use crate::support::{LONG, PATIENCE, Random, answer, eventually};

/// A step that was asked for twice, since its first answer was lost, is left; what is cleaned up after it must
/// not count down a second time, whatever this object has tried in between.
#[test]
fn what_is_cleaned_up_after_a_step_does_not_leave_it_again() {
    let scene = Scene::new(OP_TIMEOUT);
    let (lock, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(other.lock(patient())).unwrap());
    scene.next([Fault::CutAfter]);
    assert!(wait(lock.lock(patient())).unwrap());
    assert_eq!(scene.count(), Some(2));
    // Another step, given up on its way: it is taken back only after it has come.
    scene.next([Fault::GateBefore]);
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
    scene.next([Fault::CutThenGate]);
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
        // Not answered, and asked for again.
        scene.next([Fault::CutThenGate]);
        assert!(wait(lock.lock(patient())).unwrap());
        wait(lock.unlock()).unwrap();
        assert_eq!(scene.count(), Some(1));
    }
    assert!(Arc::strong_count(&scene.store) > users, "each of these requests has the store");
    scene.network.open_gate();
    eventually("they are applied, and change nothing", || Arc::strong_count(&scene.store) == users);
    assert_eq!(scene.count(), Some(1));
    wait(lock.unlock()).unwrap();
    assert_eq!(scene.count(), None);
}

/// The longer lease's answer comes when the shorter one is in the store already, unanswered.
#[test]
fn a_late_answer_to_a_longer_refresh_does_not_outdo_a_shorter_one() {
    let scene = Scene::new(PATIENCE);
    let (shortest, shorter) = (Duration::from_secs(1), Duration::from_secs(10));
    let lock = scene.plain();
    assert!(wait(lock.lock(LockOptions { expire: Some(shortest), ..patient() })).unwrap());
    scene.next([Fault::GateAfter, Fault::CutAfter]);
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
    scene.next([Fault::CutAfter]);
    assert_eq!(wait(lock.refresh(Some(SHORT))).unwrap_err().kind(), ErrorKind::Indeterminate);
    let n = scene.record().unwrap().seen().n;
    eventually("it is renewed", || scene.record().unwrap().seen().n > n);
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
    scene.next([Fault::GateAfter]);
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
        scene.next([Fault::Good, Fault::Unreachable, Fault::SilenceThenApplied(PATIENCE * 2)]);
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
    scene.next([Fault::GateAfter]);
    let asking = UnderWay::begun(lock.lock(patient()));
    assert_eq!(wait(lock.refresh(None)).unwrap_err().kind(), ErrorKind::Lost);
    scene.network.open_gate();
    assert!(asking.end().unwrap(), "granted again: the loss of the former hold was reported");
    wait(lock.unlock()).unwrap();
    scene.close();
    assert_eq!(scene.count(), None);
}

/// The store answers, but later than the first of several steps is waited for.
#[test]
fn closing_gives_back_all_steps_although_one_is_answered_late() {
    let scene = Scene::new(OP_TIMEOUT);
    let lock = scene.reentrant();
    assert!(wait(lock.lock(renewed(LONG))).unwrap());
    assert!(wait(lock.lock(renewed(LONG))).unwrap());
    scene.next([Fault::GateAfter]);
    std::thread::scope(|threads| {
        let closed = threads.spawn(|| scene.close());
        eventually("one step is left", || scene.count() == Some(1));
        // By then nobody waits for its answer. If not, this shows nothing, and fails nothing.
        std::thread::sleep(2 * OP_TIMEOUT);
        scene.network.open_gate();
        closed.join().unwrap();
    });
    assert_eq!(scene.count(), None);
}

/// One object's life: enter, perhaps more than once, be cancelled, leave. Nobody breaks anything, and no lease
/// runs out: no step may get a loss, since then another's was taken for it.
fn live(lock: &Lock, random: &mut Random) {
    let mut depth = 0u32;
    for _ in 0..40 {
        match random.below(3) {
            0 if depth > 0 => match wait(lock.unlock()) {
                Ok(()) => depth -= 1,
                Err(error) if error.kind() == ErrorKind::Indeterminate => depth -= 1,
                Err(error) => panic!("depth {depth}: {error}"),
            },
            1 => {
                // Given up in the middle, wherever that is.
                let patience = Boottime::now() + Duration::from_micros(random.below(60_000) as u64);
                let entered = match lock.lock(patient()) {
                    Answer::Now(entered) => Some(entered),
                    Answer::Later(mut entering) => block_on(until(patience, &mut entering)).unwrap(),
                };
                depth += u32::from(matches!(entered, Some(Ok(true))));
            }
            _ => match wait(lock.try_lock(LockOptions::default())) {
                Ok(granted) => depth += u32::from(granted),
                Err(error) => {
                    assert!(matches!(error.kind(), ErrorKind::Indeterminate | ErrorKind::Unreachable), "{error}");
                }
            },
        }
    }
    for left in (0..depth).rev() {
        if let Err(error) = wait(lock.unlock()) {
            assert_eq!(error.kind(), ErrorKind::Indeterminate, "depth {left}: {error}");
        }
    }
}

/// `NBLOCK_PROOF_SEED` runs one seed, to see a failure again.
#[test]
fn steps_in_a_storm_are_counted_exactly() {
    let first = std::env::var("NBLOCK_PROOF_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = first.map_or(1..=6, |seed| seed..=seed);
    println!("seeds {seeds:?}");
    std::thread::scope(|scope| {
        for seed in seeds {
            scope.spawn(move || {
                let scene = Scene::new(Duration::from_millis(40));
                scene.network.set(NetworkProfile::Storm(Random::new(seed), 4, Faults::AppliedOnce));
                std::thread::scope(|scope| {
                    for who in 0..3 {
                        let lock = scene.reentrant();
                        scope.spawn(move || live(&lock, &mut Random::new(seed * 100 + who)));
                    }
                });
                scene.network.set(NetworkProfile::Fair);
                scene.close();
                assert_eq!(scene.count(), None, "seed {seed}");
            });
        }
    });
}

/// An unlock meets the close that has just given its hold back: it must not take the step of another client.
#[test]
fn an_unlock_that_races_its_close_takes_nothing_of_others() {
    let scene = Scene::new(PATIENCE);
    let other = scene.reentrant();
    assert!(wait(other.lock(patient())).unwrap());
    for _ in 0..4000 {
        let client = Client::over(Arc::clone(&scene.store), ClientOptions::default()).unwrap();
        let lock = client.reentrant_lock(scene.key.clone(), Some("owner"), LockOptions::default()).unwrap();
        assert!(wait(lock.lock(renewed(LONG))).unwrap());
        let together = Barrier::new(2);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                together.wait();
                // Given back by this call, or by the close.
                let _ = wait(lock.unlock());
            });
            together.wait();
            wait(client.close(Boottime::NEVER)).unwrap();
        });
        assert_eq!(scene.count(), Some(1), "the other one is still in");
    }
}

/// A loss takes all the steps that an object was in. The ways out of them must not leave what another object, or
/// process, has entered with the same owner token since.
#[test]
fn the_ways_out_of_a_lost_hold_leave_nothing_of_others() {
    let scene = Scene::new(PATIENCE);
    let (lock, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(lock.lock(patient())).unwrap());
    assert!(wait(lock.lock(patient())).unwrap());
    let seen = scene.record().unwrap();
    assert_eq!(answer(scene.store.break_seen(&seen)).unwrap(), Broken::Broken);
    assert!(wait(other.lock(patient())).unwrap());
    for _ in 0..2 {
        assert_eq!(wait(lock.unlock()).unwrap_err().kind(), ErrorKind::Lost);
        assert_eq!(scene.count(), Some(1), "the other one is in");
    }
    // Who never lost anything may unlock what its owner token holds.
    wait(lock.unlock()).unwrap();
    assert!(scene.record().is_none());
}

/// An outage that outlasts this object's lease, and not that of another object in the hold.
#[test]
fn a_way_out_is_sent_for_as_long_as_another_is_in() {
    let scene = Scene::new(OP_TIMEOUT);
    let (lock, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(lock.lock(LockOptions { expire: Some(SHORT), ..patient() })).unwrap());
    assert!(wait(other.lock(LockOptions { expire: Some(LONG), ..patient() })).unwrap());
    scene.network.set(NetworkProfile::Always(Fault::Unreachable));
    let lease_over = Boottime::now() + SHORT + 2 * OP_TIMEOUT;
    assert!(wait(lock.unlock()).is_err());
    eventually("its lease is over", || lease_over.has_passed());
    scene.network.set(NetworkProfile::Fair);
    eventually("the step is made", || scene.count() == Some(1));
    wait(other.unlock()).unwrap();
    assert!(scene.record().is_none());
}

/// A reentrant hold keeps its name while others are in: what was asked about one stay in it says nothing of the next.
#[test]
fn a_loss_that_was_answered_late_is_not_the_loss_of_the_next_step() {
    let scene = Scene::new(PATIENCE);
    let (lock, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(other.lock(patient())).unwrap());
    assert!(wait(lock.lock(patient())).unwrap());
    // The refresh finds that this object has left, and its answer comes when it is in again.
    scene.next([Fault::GateAfter]);
    let leaving = Arc::clone(&lock);
    scene.network.meanwhile(move || wait(leaving.unlock()).unwrap());
    let refreshing = UnderWay::begun(lock.refresh(None));
    assert_eq!(scene.count(), Some(1));
    assert!(wait(lock.lock(patient())).unwrap());
    scene.network.open_gate();
    assert_eq!(refreshing.end().unwrap_err().kind(), ErrorKind::InvalidOp);
    assert_eq!(lock.state(), LockState::Held);
    wait(lock.unlock()).unwrap();
    assert_eq!(scene.count(), Some(1));
    wait(other.unlock()).unwrap();
    assert!(scene.record().is_none());
}

/// As above, by the library's own renewal.
#[test]
fn a_loss_that_the_library_heard_late_is_not_the_loss_of_the_next_step() {
    let scene = Scene::new(PATIENCE);
    let (lock, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(other.lock(patient())).unwrap());
    assert!(wait(lock.lock(renewed(SHORT * 10))).unwrap());
    scene.next([Fault::GateAfter]);
    let leaving = Arc::clone(&lock);
    let (tell, told) = mpsc::channel();
    scene.network.meanwhile(move || tell.send(wait(leaving.unlock())).unwrap());
    told.recv_timeout(PATIENCE).unwrap().unwrap();
    eventually("the renewal is answered", || scene.network.at_gate() == 1);
    assert!(wait(lock.lock(renewed(SHORT * 10))).unwrap());
    let end = Boottime::now() + lock.remaining().unwrap();
    scene.network.open_gate();
    eventually("it is renewed on", || lock.remaining().is_ok_and(|left| Boottime::now() + left > end + SHORT));
    wait(lock.unlock()).unwrap();
    assert_eq!(scene.count(), Some(1));
}

/// The step was given up; the network is away for longer than the step's lease, and others are in for longer.
#[test]
fn a_step_that_was_given_up_is_undone_for_as_long_as_another_is_in() {
    let scene = Scene::new(OP_TIMEOUT);
    let (lock, other) = (scene.reentrant(), scene.reentrant());
    assert!(wait(other.lock(LockOptions { expire: Some(LONG), ..patient() })).unwrap());
    scene.next([Fault::Good, Fault::GateAfter]);
    let asking = UnderWay::begun(lock.lock(LockOptions { expire: Some(SHORT), ..patient() }));
    assert_eq!(scene.count(), Some(2));
    scene.network.set(NetworkProfile::Always(Fault::Unreachable));
    drop(asking);
    scene.network.open_gate();
    let lease_over = Boottime::now() + SHORT * 2 + OP_TIMEOUT * 2;
    eventually("its lease is over", || lease_over.has_passed());
    scene.network.set(NetworkProfile::Fair);
    eventually("the step is undone", || scene.count() == Some(1));
    wait(other.unlock()).unwrap();
    assert!(scene.record().is_none());
}

/// Somebody changes the record all the time, and it is never free when this waiter asks.
#[test]
fn a_wait_ends_in_time_although_it_is_told_of_changes_all_the_time() {
    let scene = Scene::new(PATIENCE);
    let (lock, holder) = (scene.plain(), scene.plain());
    assert!(wait(holder.lock(patient())).unwrap());
    scene.network.restless();
    let waiter =
        std::thread::spawn(move || wait(lock.lock(LockOptions { timeout: Some(Timeout::After(SHORT)), ..patient() })));
    eventually("the wait ends", || waiter.is_finished());
    assert!(!waiter.join().unwrap().unwrap());
}

#[test]
fn a_close_ends_a_wait_that_is_told_of_changes_all_the_time() {
    let scene = Scene::new(PATIENCE);
    let (lock, holder) = (scene.plain(), scene.plain());
    assert!(wait(holder.lock(patient())).unwrap());
    scene.network.restless();
    let waiter = std::thread::spawn(move || wait(lock.lock(patient())));
    eventually("it asks", || scene.network.requests() > 2);
    scene.close();
    assert_eq!(waiter.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
}

/// The watch tells of a new holder: one with the same owner token, for all that it says.
#[test]
fn a_new_holder_with_the_same_owner_token_lets_a_waiter_in() {
    let scene = Scene::new(PATIENCE);
    scene.network.announcing();
    let (lock, same) = (scene.reentrant(), scene.reentrant());
    let other = scene.client.reentrant_lock(scene.key.clone(), Some("other"), LockOptions::default()).unwrap();
    assert!(wait(other.lock(patient())).unwrap());
    let waiting = UnderWay::begun(lock.lock(patient()));
    let looks = scene.network.requests();
    // Both at once, as the waiter sees it.
    wait(other.unlock()).unwrap();
    assert!(wait(same.lock(patient())).unwrap());
    assert_eq!(scene.network.requests(), looks + 2, "the waiter has not looked in between");
    assert!(waiting.end().unwrap());
    assert_eq!(scene.count(), Some(2));
}
