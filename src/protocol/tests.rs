//! Tests of the protocol, clause by clause.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::clock::Boottime;
use crate::key::Key;
use crate::record::{self, Identity, Record};
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

const NOW: StoreTime = StoreTime(1_000);
const EXPIRE: Duration = Duration::from_nanos(100);
const ONE: ObjectId = ObjectId(1);
const TWO: ObjectId = ObjectId(2);

fn identity() -> Arc<Identity> {
    Arc::new(Identity { host: String::new(), pid: 0, boot_id: String::new(), app: String::new() })
}

fn hold(number: u8) -> HoldId {
    HoldId([number; 16])
}

fn owner(name: &str) -> OwnerToken {
    OwnerToken(name.into())
}

fn token(number: u8, attempt: u32) -> Token {
    Token { hold: hold(number), attempt }
}

fn plain(number: u8, attempt: u32, write_seq: u64, ends_at: u64) -> State {
    State { holder: Holder::Plain { token: token(number, attempt), write_seq }, ends_at: StoreTime(ends_at) }
}

/// A hold of the owner "us", with the name 1 and a lease that ends at 1,050.
fn reentrant(count: u32, entries: &[(ObjectId, u32, u64)]) -> State {
    let entries = entries.iter().map(|&(object, count, write_seq)| Entry { object, count, write_seq }).collect();
    State {
        holder: Holder::Reentrant { owner: owner("us"), hold: Some(hold(1)), count, entries },
        ends_at: StoreTime(1_050),
    }
}

fn foreign(ends_at: u64) -> State {
    State { holder: Holder::Foreign { token: "theirs".into() }, ends_at: StoreTime(ends_at) }
}

fn record(state: State, now: StoreTime) -> Record {
    Record {
        damaged: None,
        key: Key::new(b"key").expect("a key"),
        lease: match state.is_over(now) {
            true => record::Lease::RanOut(now.since(state.ends_at)),
            false => record::Lease::Runs(state.ends_at.since(now)),
        },
        expires_at_ms: 0,
        owner: None,
        fence: None,
        state,
    }
}

fn found(state: State) -> Reply {
    Reply::Found(Some(Box::new(record(state, NOW))))
}

const NOTHING: Reply = Reply::Found(None);
const APPLIED: Reply = Reply::Applied { fence: None };

fn put(number: u8) -> Write {
    let holder = Holder::Plain { token: token(number, 1), write_seq: 1 };
    Write::Put(NewRecord { holder, expire: EXPIRE, identity: identity() })
}

fn extend(write_seq: Option<u64>) -> Write {
    Write::Extend { lease: Lease::FromNow(EXPIRE), write_seq }
}

fn entry(object: Option<ObjectId>, count: u32, write_seq: u64, may_add: bool) -> Write {
    Write::Entry { object, count, write_seq, may_add, lease: Lease::AsStored, name: None }
}

fn seen(state: &State, over: bool) -> Condition {
    Condition::Seen { state: Box::new(state.clone()), over }
}

fn ours() -> Condition {
    Condition::Mine(Proof::Owner { owner: owner("us"), hold: Some(hold(1)) })
}

fn after(present: &State, condition: Condition, write: Write) -> Effect {
    apply(Some(present), NOW, None, &Change::new(condition, write))
}

fn is_refused(present: Option<&State>, condition: Condition, write: Write) -> bool {
    apply(present, NOW, None, &Change::new(condition, write)) == Effect::Refused
}

mod conditions {
    use super::*;

    #[test]
    fn absent_is_true_of_no_record_alone() {
        let put = |present: Option<&State>| apply(present, NOW, None, &Change::new(Condition::Absent, put(1)));
        assert_eq!(put(None), Effect::Put(plain(1, 1, 1, 1_100)));
        for present in [plain(1, 1, 1, 10), reentrant(1, &[]), foreign(10)] {
            assert_eq!(put(Some(&present)), Effect::Refused, "a lease that is over is a record as well");
        }
    }

    #[test]
    fn what_is_not_there_is_neither_seen_nor_ours() {
        for condition in [seen(&plain(1, 1, 1, 10), true), Condition::Mine(Proof::Token(token(1, 1))), ours()] {
            for write in [put(2), entry(Some(ONE), 1, 9, true), extend(Some(9)), Write::Delete] {
                assert!(is_refused(None, condition.clone(), write));
            }
        }
    }

    #[test]
    fn absent_has_nothing_to_extend() {
        for write in [extend(None), entry(Some(ONE), 1, 1, true)] {
            assert!(is_refused(None, Condition::Absent, write));
        }
    }

    #[test]
    fn seen_compares_the_whole_state() {
        let holder = |owner: &str, hold, count, entries: &[(ObjectId, u32, u64)]| {
            let State { holder, ends_at } = reentrant(count, entries);
            let Holder::Reentrant { entries, .. } = holder else { unreachable!() };
            State { holder: Holder::Reentrant { owner: super::owner(owner), hold, count, entries }, ends_at }
        };
        let here = holder("us", Some(hold(1)), 3, &[(ONE, 1, 4), (TWO, 2, 5)]);
        assert_eq!(after(&here, seen(&here, false), Write::Delete), Effect::Remove);
        let others = [
            holder("them", Some(hold(1)), 3, &[(ONE, 1, 4), (TWO, 2, 5)]),
            holder("us", Some(hold(2)), 3, &[(ONE, 1, 4), (TWO, 2, 5)]),
            holder("us", None, 3, &[(ONE, 1, 4), (TWO, 2, 5)]),
            holder("us", Some(hold(1)), 4, &[(ONE, 1, 4), (TWO, 2, 5)]),
            holder("us", Some(hold(1)), 3, &[(ONE, 1, 4)]),
            holder("us", Some(hold(1)), 3, &[(ONE, 1, 4), (TWO, 2, 6)]),
            holder("us", Some(hold(1)), 3, &[(ONE, 2, 4), (TWO, 2, 5)]),
            State { ends_at: StoreTime(1_051), ..here.clone() },
            foreign(1_050),
            plain(1, 1, 1, 1_050),
        ];
        for other in others {
            assert_eq!(after(&here, seen(&other, false), Write::Delete), Effect::Refused, "{other:?}");
            assert_eq!(after(&other, seen(&here, false), Write::Delete), Effect::Refused, "{other:?}");
        }
        let here = plain(1, 1, 1, 10);
        for other in [plain(2, 1, 1, 10), plain(1, 2, 1, 10), plain(1, 1, 2, 10), plain(1, 1, 1, 11)] {
            assert_eq!(after(&here, seen(&other, false), Write::Delete), Effect::Refused, "{other:?}");
        }
    }

    #[test]
    fn over_is_asked_of_the_stores_clock_when_it_is_applied() {
        for (ends_at, over) in [(999, true), (1_000, false), (1_001, false), (u64::MAX, false)] {
            let here = plain(1, 1, 1, ends_at);
            assert_eq!(here.is_over(NOW), over);
            assert_eq!(after(&here, seen(&here, true), put(2)) != Effect::Refused, over, "{ends_at}");
            assert_ne!(after(&here, seen(&here, false), put(2)), Effect::Refused);
        }
        assert!(!State { ends_at: StoreTime::NEVER, ..foreign(0) }.is_over(StoreTime(u64::MAX)));
    }

    #[test]
    fn seen_compares_no_number() {
        let here = reentrant(2, &[(ONE, 2, 9)]);
        assert_eq!(
            after(&here, seen(&here, false), entry(Some(ONE), 1, 1, false)),
            Effect::Update(reentrant(1, &[(ONE, 1, 1)]))
        );
    }

    #[test]
    fn a_token_proves_its_own_record() {
        let delete = |present: &State, proof| after(present, Condition::Mine(proof), Write::Delete) == Effect::Remove;
        let here = plain(1, 2, 5, 10);
        assert!(delete(&here, Proof::Token(token(1, 2))), "also when the lease is over");
        assert!(!delete(&here, Proof::Token(token(1, 1))));
        assert!(!delete(&here, Proof::Token(token(2, 2))));
        assert!(delete(&here, Proof::Hold(hold(1))));
        assert!(!delete(&here, Proof::Hold(hold(2))));
        assert!(!delete(&here, Proof::Owner { owner: owner("us"), hold: None }));
        assert!(!delete(&foreign(10), Proof::Token(token(1, 2))));
        assert!(!delete(&foreign(10), Proof::Hold(hold(1))));
        assert!(!delete(&foreign(10), Proof::Owner { owner: owner("theirs"), hold: None }));
    }

    #[test]
    fn owner_and_name_prove_a_reentrant_hold() {
        let proves = |present: &State, name: &str, hold| {
            let proof = Proof::Owner { owner: owner(name), hold };
            after(present, Condition::Mine(proof), extend(None)) != Effect::Refused
        };
        let here = reentrant(1, &[(ONE, 1, 1)]);
        assert!(proves(&here, "us", Some(hold(1))));
        assert!(!proves(&here, "them", Some(hold(1))));
        assert!(!proves(&here, "us", Some(hold(2))));
        assert!(!proves(&here, "us", None), "it has a name");
        let unnamed = unnamed(1);
        assert!(proves(&unnamed, "us", None));
        assert!(!proves(&unnamed, "us", Some(hold(1))));
        assert!(!proves(&unnamed, "them", None));
    }

    #[test]
    fn an_objects_entry_proves_its_part() {
        let proves = |present: &State, name: &str, hold, object| {
            let proof = Proof::Object { owner: owner(name), hold, object };
            after(present, Condition::Mine(proof), extend(None)) != Effect::Refused
        };
        let here = reentrant(2, &[(ONE, 1, 1)]);
        assert!(proves(&here, "us", hold(1), ONE));
        assert!(!proves(&here, "us", hold(1), TWO));
        assert!(!proves(&here, "us", hold(2), ONE));
        assert!(!proves(&here, "them", hold(1), ONE));
        assert!(!proves(&unnamed(1), "us", hold(1), ONE));
        assert!(!proves(&plain(1, 1, 1, 1_050), "us", hold(1), ONE));
    }

    #[test]
    fn a_number_must_be_above_the_records() {
        let here = plain(1, 1, 5, 1_050);
        let renew = |write_seq| after(&here, Condition::Mine(Proof::Token(token(1, 1))), extend(write_seq));
        assert_eq!(renew(Some(4)), Effect::Refused);
        assert_eq!(renew(Some(5)), Effect::Refused);
        assert_eq!(renew(Some(6)), Effect::Update(plain(1, 1, 6, 1_100)));
        assert_eq!(renew(None), Effect::Update(plain(1, 1, 5, 1_100)));
    }

    #[test]
    fn a_number_must_be_above_the_entrys_own() {
        let here = reentrant(3, &[(ONE, 1, 5), (TWO, 2, 9)]);
        for (write_seq, applied) in [(4, false), (5, false), (6, true), (9, true)] {
            let effect = after(&here, ours(), entry(Some(ONE), 2, write_seq, false));
            assert_eq!(effect != Effect::Refused, applied, "{write_seq}");
        }
        assert_eq!(after(&here, ours(), entry(Some(TWO), 1, 9, true)), Effect::Refused);
    }

    #[test]
    fn an_object_without_an_entry_gets_one_only_where_it_may() {
        let here = reentrant(1, &[(ONE, 1, 5)]);
        assert_eq!(after(&here, ours(), entry(Some(TWO), 1, 1, false)), Effect::Refused);
        assert_eq!(
            after(&here, ours(), entry(Some(TWO), 1, 1, true)),
            Effect::Update(reentrant(2, &[(ONE, 1, 5), (TWO, 1, 1)]))
        );
    }
}

/// A hold that another library created.
fn unnamed(count: u32) -> State {
    State {
        holder: Holder::Reentrant { owner: owner("us"), hold: None, count, entries: Vec::new() },
        ends_at: StoreTime(1_050),
    }
}

mod writes {
    use super::*;

    #[test]
    fn put_replaces_all_of_it() {
        for present in [plain(1, 1, 7, 10), reentrant(3, &[(ONE, 1, 9)]), foreign(10)] {
            let over = State { ends_at: StoreTime(10), ..present };
            assert_eq!(after(&over, seen(&over, true), put(2)), Effect::Put(plain(2, 1, 1, 1_100)));
        }
    }

    #[test]
    fn entries_are_set_and_not_added_to() {
        let here = reentrant(5, &[(ONE, 2, 1), (TWO, 3, 1)]);
        let set = |count| after(&here, ours(), entry(Some(ONE), count, 2, true));
        assert_eq!(set(2), Effect::Update(reentrant(5, &[(TWO, 3, 1), (ONE, 2, 2)])));
        assert_eq!(set(4), Effect::Update(reentrant(7, &[(TWO, 3, 1), (ONE, 4, 2)])));
        assert_eq!(set(1), Effect::Update(reentrant(4, &[(TWO, 3, 1), (ONE, 1, 2)])));
        assert_eq!(set(0), Effect::Update(reentrant(3, &[(TWO, 3, 1)])));
    }

    #[test]
    fn the_record_goes_with_the_last_count() {
        let here = reentrant(1, &[(ONE, 1, 1)]);
        assert_eq!(after(&here, ours(), entry(Some(ONE), 0, 2, false)), Effect::Remove);
    }

    #[test]
    fn the_count_decides_and_not_the_entries() {
        // Another library has locked once more.
        let here = reentrant(2, &[(ONE, 1, 1)]);
        assert_eq!(after(&here, ours(), entry(Some(ONE), 0, 2, false)), Effect::Update(reentrant(1, &[])));
        // Another library has unlocked once.
        let here = reentrant(1, &[(ONE, 1, 1), (TWO, 1, 1)]);
        assert_eq!(after(&here, ours(), entry(Some(ONE), 0, 2, false)), Effect::Remove);
        let here = reentrant(1, &[(ONE, 3, 1)]);
        assert_eq!(after(&here, ours(), entry(Some(ONE), 0, 2, false)), Effect::Remove, "never below nothing");
    }

    #[test]
    fn what_is_beyond_the_entries_is_set_like_an_entry() {
        let here = reentrant(5, &[(ONE, 2, 1)]);
        let set = |count| after(&here, seen(&here, false), entry(None, count, 0, false));
        assert_eq!(set(2), Effect::Update(reentrant(4, &[(ONE, 2, 1)])));
        assert_eq!(set(0), Effect::Update(reentrant(2, &[(ONE, 2, 1)])));
        let alone = unnamed(1);
        assert_eq!(after(&alone, seen(&alone, false), entry(None, 0, 0, false)), Effect::Remove);
        let short = reentrant(1, &[(ONE, 2, 1)]);
        assert_eq!(
            after(&short, seen(&short, false), entry(None, 1, 0, false)),
            Effect::Update(reentrant(2, &[(ONE, 2, 1)]))
        );
    }

    #[test]
    fn counts_end_at_the_highest_number() {
        let here = reentrant(u32::MAX, &[(ONE, 1, 1)]);
        assert_eq!(
            after(&here, ours(), entry(Some(TWO), 7, 1, true)),
            Effect::Update(reentrant(u32::MAX, &[(ONE, 1, 1), (TWO, 7, 1)]))
        );
    }

    #[test]
    fn a_hold_without_a_name_gets_one_and_no_other() {
        let name = |present: &State, hold, name| {
            let write =
                Write::Entry { object: Some(ONE), count: 1, write_seq: 1, may_add: true, lease: Lease::AsStored, name };
            match after(present, Condition::Mine(Proof::Owner { owner: owner("us"), hold }), write) {
                Effect::Update(State { holder: Holder::Reentrant { hold, count, .. }, .. }) => (hold, count),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(name(&unnamed(1), None, Some(hold(7))), (Some(hold(7)), 2));
        assert_eq!(name(&unnamed(1), None, None), (None, 2));
        assert_eq!(name(&reentrant(1, &[]), Some(hold(1)), Some(hold(7))), (Some(hold(1)), 2));
    }

    #[test]
    fn no_entries_in_what_is_not_reentrant() {
        let here = plain(1, 1, 1, 1_050);
        assert_eq!(
            after(&here, Condition::Mine(Proof::Token(token(1, 1))), entry(Some(ONE), 1, 9, true)),
            Effect::Refused
        );
        assert_eq!(after(&foreign(9), seen(&foreign(9), false), entry(None, 0, 9, true)), Effect::Refused);
    }

    #[test]
    fn a_lease_is_new_or_not_sooner_or_as_it_was() {
        let lease = |present: &State, lease| match after(present, ours(), Write::Extend { lease, write_seq: None }) {
            Effect::Update(state) => state.ends_at.0,
            other => panic!("{other:?}"),
        };
        let here = reentrant(1, &[(ONE, 1, 1)]);
        assert_eq!(lease(&here, Lease::FromNow(EXPIRE)), 1_100);
        assert_eq!(lease(&here, Lease::FromNow(EXPIRE / 10)), 1_010, "also sooner");
        assert_eq!(lease(&here, Lease::NotSooner(EXPIRE)), 1_100);
        assert_eq!(lease(&here, Lease::NotSooner(EXPIRE / 10)), 1_050);
        assert_eq!(lease(&here, Lease::AsStored), 1_050);
        assert_eq!(lease(&here, Lease::FromNow(Duration::MAX)), u64::MAX, "an end that cannot be counted is never");
    }

    #[test]
    fn an_extension_changes_nothing_else() {
        let here = reentrant(3, &[(ONE, 1, 1), (TWO, 1, 1)]);
        let effect = after(&here, ours(), extend(Some(9)));
        assert_eq!(effect, Effect::Update(State { ends_at: StoreTime(1_100), ..here }));
        let here = foreign(1_050);
        assert_eq!(after(&here, seen(&here, false), extend(Some(9))), Effect::Update(foreign(1_100)));
    }
}

#[test]
fn late_is_after_the_moment_and_before_everything_else() {
    for (not_after, late) in [(999, true), (1_000, false), (1_001, false)] {
        for present in [None, Some(plain(2, 1, 1, 5_000))] {
            let change = Change::new(Condition::Absent, put(1));
            let effect = apply(present.as_ref(), NOW, Some(StoreTime(not_after)), &change);
            let otherwise = if present.is_none() { Effect::Put(plain(1, 1, 1, 1_100)) } else { Effect::Refused };
            assert_eq!(effect, if late { Effect::TooLate } else { otherwise }, "{not_after}");
        }
    }
    let change = Change::new(Condition::Absent, put(1));
    assert_eq!(apply(None, StoreTime(u64::MAX), None, &change), Effect::Put(plain(1, 1, 1, u64::MAX)));
    assert_eq!(change.until(Boottime::from_nanos(7)).not_after, Some(Boottime::from_nanos(7)));
}

#[test]
fn a_timeless_change_does_the_same_at_any_time() {
    let mine = Condition::Mine(Proof::Token(token(1, 1)));
    let release = Change::new(mine.clone(), Write::Delete);
    assert!(release.is_timeless());
    for present in [None, Some(plain(1, 1, 1, 1_000)), Some(plain(2, 1, 1, 1_000))] {
        let at = |now| apply(present.as_ref(), StoreTime(now), None, &release);
        assert!([0, 1_000, u64::MAX].into_iter().all(|now| at(now) == at(1)));
    }
    let seen = Condition::Seen { state: Box::new(plain(1, 1, 1, 1_000)), over: true };
    let extend = Write::Extend { lease: Lease::FromNow(EXPIRE), write_seq: Some(2) };
    for timed in [
        release.clone().until(Boottime::ZERO),
        Change::new(seen, Write::Delete),
        Change::new(mine, extend),
        Change::new(Condition::Absent, put(1)),
    ] {
        assert!(!timed.is_timeless(), "{timed:?}");
    }
}

/// A record to which changes are applied. The store's clock stands still.
struct Store(Option<State>);

impl Store {
    fn ask(&mut self, change: &Change) -> Reply {
        match apply(self.0.as_ref(), NOW, None, change) {
            Effect::Put(state) | Effect::Update(state) => self.0 = Some(state),
            Effect::Remove => self.0 = None,
            Effect::Refused => return Reply::Found(self.0.clone().map(|state| Box::new(record(state, NOW)))),
            Effect::TooLate => return Reply::TooLate,
        }
        APPLIED
    }

    fn state(&self) -> &State {
        self.0.as_ref().expect("a record is there")
    }
}

fn asks(number: u8) -> Acquisition {
    Acquisition::plain(hold(number), EXPIRE, identity())
}

/// An object of the owner "us".
fn steps(object: ObjectId, held: Option<(HoldId, u32)>, name: u8, write_seq: u64) -> Acquisition {
    Acquisition::reentrant((owner("us"), object), held, hold(name), write_seq, EXPIRE, identity())
}

fn granted(verdict: Verdict) -> Granted {
    match verdict {
        Verdict::Granted(granted) => granted,
        other => panic!("{other:?}"),
    }
}

/// Sends requests until the reply is final.
fn acquire(store: &mut Store, acquisition: &mut Acquisition) -> Verdict {
    for _ in 0..9 {
        let (asked, change) = acquisition.ask();
        match acquisition.read(asked, store.ask(&change)) {
            Verdict::Ask => {}
            verdict => return verdict,
        }
    }
    panic!("it asks again and again");
}

mod acquisition {
    use super::*;

    #[test]
    fn what_is_free_takes_one_request() {
        let mut store = Store(None);
        let mut first = asks(1);
        let (asked, change) = first.ask();
        let granted = granted(first.read(asked, store.ask(&change)));
        assert_eq!(granted, Granted { hold: hold(1), token: Some(token(1, 1)), fence: None, write_seq: 1 });
        assert_eq!(*store.state(), plain(1, 1, 1, 1_100));
    }

    #[test]
    fn the_first_request_alone_is_that_of_the_acquisition() {
        let (token, alone) = Acquisition::first_of_plain(hold(1), EXPIRE, identity());
        let mut first = asks(1);
        let (asked, change) = first.ask();
        assert_eq!(alone, change);
        let granted = granted(first.read(asked, Reply::Applied { fence: Some(7) }));
        let proof = first.proof(&granted);
        assert_eq!(Granted::first_of_plain(token, Some(7)), (granted, proof));
    }

    #[test]
    fn what_is_held_is_told() {
        let mut store = Store(Some(plain(2, 1, 1, 1_000)));
        assert!(
            matches!(acquire(&mut store, &mut asks(1)), Verdict::Held(record) if record.state == plain(2, 1, 1, 1_000))
        );
    }

    #[test]
    fn what_is_over_is_taken_over_whatever_it_was() {
        for state in [plain(2, 1, 1, 999), foreign(999), State { ends_at: StoreTime(999), ..reentrant(1, &[]) }] {
            let mut store = Store(Some(state));
            assert_eq!(granted(acquire(&mut store, &mut asks(1))).token, Some(token(1, 2)));
            assert_eq!(*store.state(), plain(1, 2, 2, 1_100));
        }
    }

    #[test]
    fn a_take_over_of_what_was_renewed_is_refused() {
        let mut store = Store(Some(plain(2, 1, 1, 999)));
        let mut second = asks(1);
        let (asked, change) = second.ask();
        assert!(matches!(second.read(asked, store.ask(&change)), Verdict::Ask));
        let (asked, take_over) = second.ask();
        store.0 = Some(plain(2, 1, 2, 1_100));
        assert!(matches!(second.read(asked, store.ask(&take_over)), Verdict::Held(_)));
    }

    #[test]
    fn its_own_earlier_attempt_is_known_and_proven() {
        let mut store = Store(None);
        let mut first = asks(1);
        let (_, unanswered) = first.ask();
        store.ask(&unanswered);
        for over in [false, true] {
            let mut first = first.clone();
            let mut store = Store(store.0.clone());
            if over {
                store.0 = Some(plain(1, 1, 1, 10));
            }
            let granted = granted(acquire(&mut store, &mut first));
            assert_eq!((granted.token, granted.write_seq), (Some(token(1, 1)), 3));
            assert_eq!(*store.state(), plain(1, 1, 3, 1_100));
        }
    }

    #[test]
    fn attempts_have_tokens_and_numbers_of_their_own() {
        let mut first = asks(1);
        let of = |change: Change| match change.write {
            Write::Put(NewRecord { holder: Holder::Plain { token, write_seq }, .. }) => (token, write_seq),
            other => panic!("{other:?}"),
        };
        assert_eq!(of(first.ask().1), (token(1, 1), 1));
        assert_eq!(of(first.ask().1), (token(1, 2), 2));
        assert_eq!(first.write_seq(), 2);
    }

    #[test]
    fn names_of_reentrant_attempts_are_their_own() {
        let mut object = steps(ONE, None, 1, 0);
        let mut store = Store(None);
        let (_, late) = object.ask();
        let granted = granted(acquire(&mut store, &mut object));
        let made = store.state().clone();
        // When the late request is applied, all users of the first hold have left: what it creates is another hold.
        store.0 = None;
        assert!(matches!(store.ask(&late), Reply::Applied { .. }));
        let proof = Proof::Object { owner: owner("us"), hold: granted.hold, object: ONE };
        assert!(made.holder.is_proven_by(&proof) && !store.state().holder.is_proven_by(&proof));
        // Both are cleaned up.
        for removal in object.orphan().removals() {
            store.ask(&removal);
        }
        assert_eq!(store.0, None);
    }

    #[test]
    fn a_late_attempt_that_was_applied_is_entered() {
        let mut object = steps(ONE, None, 1, 0);
        let mut store = Store(None);
        let (_, unanswered) = object.ask();
        let _ = object.ask();
        store.ask(&unanswered);
        store.0.as_mut().expect("made").ends_at = StoreTime(10);
        let granted = granted(acquire(&mut store, &mut object));
        assert_eq!(*store.state(), State { ends_at: StoreTime(1_100), ..reentrant(1, &[(ONE, 1, granted.write_seq)]) });
        assert_eq!(granted.hold, hold(1));
    }

    #[test]
    fn refused_requests_leave_nothing_to_clean_up() {
        let mut store = Store(Some(plain(9, 1, 1, 5_000)));
        let mut object = steps(ONE, None, 1, 0);
        for _ in 0..100 {
            assert!(matches!(acquire(&mut store, &mut object), Verdict::Held(_)));
        }
        assert!(object.orphan().removals().is_empty());
        let _ = object.ask();
        assert_eq!(object.orphan().removals().len(), 1);
    }

    #[test]
    fn too_late_asks_again() {
        let mut first = asks(1);
        let (asked, _) = first.ask();
        assert!(matches!(first.read(asked, Reply::TooLate), Verdict::Ask));
    }

    #[test]
    fn what_was_granted_and_is_gone_is_gone() {
        let mut store = Store(None);
        let mut first = asks(1);
        let granted = granted(acquire(&mut store, &mut first));
        for state in [None, Some(plain(1, 2, 9, 5_000)), Some(plain(2, 1, 1, 10))] {
            let mut first = first.clone();
            first.prove(granted.clone());
            let (asked, change) = first.ask();
            assert!(matches!(first.read(asked, Store(state).ask(&change)), Verdict::Gone));
        }
        // A write number that was too low is not a loss.
        first.prove(granted);
        let (asked, change) = first.ask();
        assert!(matches!(first.read(asked, Store(Some(plain(1, 1, 9, 5_000))).ask(&change)), Verdict::Ask));
    }

    #[test]
    fn a_proof_keeps_the_fence_that_was_drawn() {
        let mut store = Store(None);
        let mut first = asks(1);
        let grant = granted(acquire(&mut store, &mut first));
        first.prove(Granted { fence: Some(7), ..grant });
        let proven = granted(acquire(&mut store, &mut first));
        assert_eq!((proven.fence, proven.write_seq, proven.token), (Some(7), 2, Some(token(1, 1))));
    }

    #[test]
    fn a_restart_is_another_hold() {
        let mut store = Store(None);
        let mut first = asks(1);
        let _ = first.ask();
        first.restart(hold(3));
        assert_eq!(granted(acquire(&mut store, &mut first)).token, Some(token(3, 1)));
        let mut object = steps(ONE, None, 1, 5);
        let _ = object.ask();
        object.restart(hold(3));
        store.0 = None;
        let granted = granted(acquire(&mut store, &mut object));
        assert_eq!((granted.hold, granted.write_seq), (hold(3), 7), "an object's numbers go on");
    }

    #[test]
    fn an_object_joins_its_owners_hold() {
        let mut store = Store(Some(reentrant(1, &[(ONE, 1, 1)])));
        let granted = granted(acquire(&mut store, &mut steps(TWO, None, 2, 0)));
        assert_eq!((granted.hold, granted.token), (hold(1), None));
        assert_eq!(
            *store.state(),
            State { ends_at: StoreTime(1_100), ..reentrant(2, &[(ONE, 1, 1), (TWO, 1, granted.write_seq)]) }
        );
    }

    #[test]
    fn a_hold_of_another_library_gets_a_name_once() {
        let mut store = Store(Some(unnamed(1)));
        let mut first = steps(ONE, None, 7, 0);
        let grant = granted(acquire(&mut store, &mut first));
        assert_ne!(grant.hold, hold(8));
        let second = granted(acquire(&mut store, &mut steps(TWO, None, 8, 0)));
        assert_eq!(second.hold, grant.hold);
        assert!(matches!(&store.state().holder, Holder::Reentrant { count: 3, entries, .. } if entries.len() == 2));
    }

    #[test]
    fn what_is_over_is_taken_over_also_from_its_owner() {
        let mut store = Store(Some(State { ends_at: StoreTime(10), ..reentrant(1, &[(ONE, 1, 1)]) }));
        let granted = granted(acquire(&mut store, &mut steps(TWO, None, 2, 0)));
        assert_ne!(granted.hold, hold(1));
    }

    #[test]
    fn a_further_step_needs_its_hold_and_its_entry() {
        let enters = |state: Option<State>| acquire(&mut Store(state), &mut steps(ONE, Some((hold(1), 1)), 9, 3));
        for over in [10, 1_050] {
            let state = State { ends_at: StoreTime(over), ..reentrant(2, &[(ONE, 1, 3), (TWO, 1, 1)]) };
            let mut store = Store(Some(state));
            let granted = granted(acquire(&mut store, &mut steps(ONE, Some((hold(1), 1)), 9, 3)));
            assert_eq!((granted.hold, granted.write_seq), (hold(1), 4));
            assert_eq!(
                *store.state(),
                State { ends_at: StoreTime(1_100), ..reentrant(3, &[(TWO, 1, 1), (ONE, 2, 4)]) }
            );
        }
        let mut other_hold = reentrant(1, &[(ONE, 1, 3)]);
        if let Holder::Reentrant { hold, .. } = &mut other_hold.holder {
            *hold = Some(super::hold(2));
        }
        for state in [None, Some(unnamed(1)), Some(reentrant(1, &[(TWO, 1, 1)])), Some(other_hold), Some(foreign(10))] {
            assert!(matches!(enters(state.clone()), Verdict::Lost), "{state:?}");
        }
    }

    #[test]
    fn a_number_that_was_too_low_is_raised() {
        let mut store = Store(Some(reentrant(1, &[(ONE, 1, 6)])));
        let granted = granted(acquire(&mut store, &mut steps(ONE, Some((hold(1), 1)), 9, 3)));
        assert_eq!(granted.write_seq, 7);
    }

    #[test]
    fn what_was_lost_is_forgotten() {
        let mut store = Store(None);
        let mut object = steps(ONE, Some((hold(1), 2)), 9, 3);
        assert!(matches!(acquire(&mut store, &mut object), Verdict::Lost));
        object.forget_held();
        let granted = granted(acquire(&mut store, &mut object));
        assert_eq!(granted.hold, hold(9));
        assert!(matches!(store.state().holder, Holder::Reentrant { count: 1, .. }));
    }
}

mod replies {
    use super::*;

    fn renewal() -> Renewal {
        Renewal { proof: Proof::Token(token(1, 1)), expire: EXPIRE, write_seq: 4 }
    }

    #[test]
    fn a_renewal_is_judged_by_what_the_record_proves() {
        assert_eq!(renewal().read(&APPLIED), Renewed::Ours { applied: true });
        assert_eq!(renewal().read(&found(plain(1, 1, 9, 10))), Renewed::Ours { applied: false });
        for reply in [NOTHING, found(plain(1, 2, 1, 10)), found(plain(2, 1, 1, 10)), found(foreign(10)), Reply::TooLate]
        {
            assert_eq!(renewal().read(&reply), Renewed::Lost, "{reply:?}");
        }
        let renewal = Renewal { proof: Proof::Object { owner: owner("us"), hold: hold(1), object: ONE }, ..renewal() };
        assert_eq!(renewal.read(&found(reentrant(1, &[(TWO, 1, 1)]))), Renewed::Lost, "its entry has gone");
    }

    #[test]
    fn renewals_are_numbered_and_those_of_several_objects_never_shorten() {
        assert_eq!(renewal().change().write, Write::Extend { lease: Lease::FromNow(EXPIRE), write_seq: Some(4) });
        assert_eq!(renewal().change().not_after, None);
        let of_objects = [
            Proof::Owner { owner: owner("us"), hold: Some(hold(1)) },
            Proof::Object { owner: owner("us"), hold: hold(1), object: ONE },
        ];
        for proof in of_objects {
            let renewal = Renewal { proof, ..renewal() };
            assert_eq!(renewal.change().write, Write::Extend { lease: Lease::NotSooner(EXPIRE), write_seq: None });
        }
    }

    fn at(nanos: u64) -> Boottime {
        Boottime::from_nanos(nanos)
    }

    #[test]
    fn an_unlock_is_judged_by_when_it_first_left() {
        let release = Release::Plain { token: token(1, 1) };
        let judge =
            |reply: &Reply, sent, doubtful, now| release.judge(reply, || at(sent), at(10), doubtful, || at(now));
        use Judgement::{Lost, Released};
        for (sent, doubtful, now, verdict) in [
            (9, true, 9, Released),
            (9, true, 20, Released),
            (9, false, 10, Released),
            // Before its deadline, a hold can be lost only by breaking the lock.
            (9, false, 9, Lost),
            (10, false, 20, Lost),
            (10, true, 20, Lost),
        ] {
            for reply in [NOTHING, found(plain(2, 1, 1, 10))] {
                assert_eq!(judge(&reply, sent, doubtful, now), verdict, "{sent} {doubtful} {now}");
            }
            assert_eq!(judge(&APPLIED, sent, doubtful, now), Released);
        }
    }

    #[test]
    fn a_step_that_the_record_shows_was_made() {
        let step = Step { owner: owner("us"), object: ONE, hold: hold(1), count: 1, write_seq: 5 };
        let release = Release::Step(step);
        // The request was sent after the deadline, and every request was answered.
        let judge = |state| release.judge(&found(state), || at(20), at(10), false, || at(30));
        assert_eq!(judge(reentrant(1, &[(ONE, 1, 5)])), Judgement::Released);
        assert_eq!(judge(reentrant(2, &[(ONE, 2, 6)])), Judgement::Released);
        assert_eq!(judge(reentrant(1, &[(ONE, 1, 4)])), Judgement::Lost);
        assert_eq!(judge(reentrant(1, &[(TWO, 1, 5)])), Judgement::Lost);
        assert_eq!(judge(unnamed(1)), Judgement::Lost);
    }

    #[test]
    fn a_release_removes_its_own() {
        let mut store = Store(Some(plain(1, 1, 9, 10)));
        assert!(matches!(store.ask(&Release::Plain { token: token(1, 2) }.change()), Reply::Found(Some(_))));
        assert!(matches!(store.ask(&Release::Plain { token: token(1, 1) }.change()), Reply::Applied { .. }));
        assert_eq!(store.0, None);

        let mut store = Store(Some(reentrant(3, &[(ONE, 2, 4), (TWO, 1, 1)])));
        let step = Step { owner: owner("us"), object: ONE, hold: hold(1), count: 1, write_seq: 5 };
        let release = Release::Step(step.clone());
        assert!(matches!(store.ask(&release.change()), Reply::Applied { .. }));
        assert_eq!(*store.state(), reentrant(2, &[(TWO, 1, 1), (ONE, 1, 5)]), "and moves no lease");
        assert!(matches!(store.ask(&release.change()), Reply::Found(Some(_))), "once");
        let last = Release::Step(Step { count: 0, write_seq: 6, ..step });
        store.ask(&last.change());
        store.ask(&last.change());
        assert_eq!(*store.state(), reentrant(1, &[(TWO, 1, 1)]));
    }

    #[test]
    fn somebody_elses_step_is_taken_as_it_was_seen() {
        let step_out = |state: State| step_out_of(&record(state, NOW), &owner("us"));
        assert!(step_out(plain(1, 1, 1, 10)).is_none());
        assert!(step_out_of(&record(reentrant(1, &[(ONE, 1, 1)]), NOW), &owner("them")).is_none());
        for (before, expected) in [
            (reentrant(3, &[(ONE, 1, 7), (TWO, 2, 3)]), Some(reentrant(2, &[(ONE, 1, 7), (TWO, 1, 3)]))),
            (reentrant(1, &[(ONE, 1, 7)]), None),
            // What another library counted is removed first.
            (reentrant(4, &[(ONE, 1, 7)]), Some(reentrant(3, &[(ONE, 1, 7)]))),
            (reentrant(2, &[(ONE, 1, 7)]), Some(reentrant(1, &[(ONE, 1, 7)]))),
            (unnamed(2), Some(unnamed(1))),
            (unnamed(1), None),
        ] {
            let release = step_out(before.clone()).expect("it is the owner's");
            let mut store = Store(Some(before.clone()));
            store.ask(&release.change());
            assert_eq!(store.0, expected, "{before:?}");
            let mut changed = Store(Some(State { ends_at: StoreTime(5), ..before }));
            assert!(matches!(changed.ask(&release.change()), Reply::Found(Some(_))));
        }
    }

    #[test]
    fn an_orphan_of_a_plain_hold_is_any_of_its_attempts() {
        let removals = asks(1).orphan().removals();
        assert_eq!(removals.len(), 1);
        for (state, left) in [(plain(1, 7, 9, 5_000), false), (plain(2, 7, 9, 5_000), true)] {
            let mut store = Store(Some(state));
            store.ask(&removals[0]);
            assert_eq!(store.0.is_some(), left);
        }
    }

    #[test]
    fn an_orphan_of_a_step_sets_what_the_object_was_before() {
        let mut store = Store(Some(reentrant(1, &[(ONE, 1, 3)])));
        let mut object = steps(ONE, Some((hold(1), 1)), 9, 3);
        let (_, unanswered) = object.ask();
        let orphan = object.orphan();
        assert!(object.write_seq() > 4, "later steps are above it");
        store.ask(&unanswered);
        for _ in 0..2 {
            orphan.removals().iter().for_each(|removal| drop(store.ask(removal)));
            assert_eq!(store.state().holder, reentrant(1, &[(ONE, 1, 5)]).holder);
        }
        assert!(matches!(store.ask(&unanswered), Reply::Found(Some(_))), "and forbids it");
        // A later step has a higher number.
        let mut next = steps(ONE, Some((hold(1), 1)), 8, object.write_seq());
        granted(acquire(&mut store, &mut next));
        orphan.removals().iter().for_each(|removal| drop(store.ask(removal)));
        assert_eq!(store.state().holder, reentrant(2, &[(ONE, 2, 6)]).holder);
    }

    #[test]
    fn an_orphan_that_comes_late_is_removed_by_the_next_removal() {
        let mut store = Store(Some(reentrant(1, &[(TWO, 1, 1)])));
        let mut object = steps(ONE, None, 9, 0);
        granted(acquire(&mut store, &mut object.clone()));
        store.0 = Some(reentrant(1, &[(TWO, 1, 1)]));
        // The first request finds the hold; the second one is still under way.
        let (asked, change) = object.ask();
        object.read(asked, store.ask(&change));
        let (_, late) = object.ask();
        let orphan = object.orphan();
        let remove = |store: &mut Store| orphan.removals().iter().for_each(|removal| drop(store.ask(removal)));
        remove(&mut store);
        store.ask(&late);
        assert!(store.state().holder.entry(ONE).is_some(), "nothing remembers the number of what has gone");
        remove(&mut store);
        assert_eq!(store.state().holder, reentrant(1, &[(TWO, 1, 1)]).holder);
    }
}

#[test]
fn tokens_are_never_shown() {
    let shown = format!("{:?} {:?}", plain(1, 1, 7, 10), reentrant(1, &[(ONE, 1, 1)]));
    assert!(!shown.contains("us") && !shown.contains(&hold(1).to_string()), "{shown}");
}
