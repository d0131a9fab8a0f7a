//! Every store against the reference: the same random changes, late and doubled ones among them, must come to what
//! `protocol::apply` says of the record that was there.

use std::sync::Arc;
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::protocol::{
    Change, Condition, Effect, Entry, Holder, Lease, NewRecord, Proof, Reply, State, StoreTime, Write, apply,
};
use nblock::record::{Lease as Remaining, Record};
use nblock::store::Store;
use nblock::token::{HoldId, ObjectId, OwnerToken, Token};

use crate::support::{LONG, Random, answer, fresh_key, identity, open};

/// No lease ends while a test runs, but these, which have ended when the next change is made.
const SHORT: Duration = Duration::from_millis(1);

struct Oracle {
    store: Arc<dyn Store>,
    key: Key,
    random: Random,
    /// What was sent before, to be sent again.
    sent: Vec<Change>,
}

/// The same with its entries in an order of ours: stores that keep them by name have none.
fn sorted(holder: &Holder) -> Holder {
    let mut holder = holder.clone();
    if let Holder::Reentrant { entries, .. } = &mut holder {
        entries.sort_by_key(|entry: &Entry| entry.object);
    }
    holder
}

impl Oracle {
    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.random.below(of.len())].clone()
    }

    fn hold(&mut self) -> HoldId {
        HoldId([self.random.below(3) as u8; 16])
    }

    fn object(&mut self) -> ObjectId {
        ObjectId([1, 2, u64::MAX][self.random.below(3)])
    }

    fn owner(&mut self) -> OwnerToken {
        OwnerToken(["us", "them", "n\0l"][self.random.below(3)].into())
    }

    fn expire(&mut self) -> Duration {
        self.pick(&[SHORT, LONG, LONG * 2])
    }

    fn lease(&mut self) -> Lease {
        let expire = self.expire();
        self.pick(&[Lease::FromNow(expire), Lease::NotSooner(expire), Lease::AsStored])
    }

    fn holder(&mut self) -> Holder {
        let write_seq = self.random.below(6) as u64;
        if self.random.below(2) == 0 {
            let token = Token { hold: self.hold(), attempt: self.random.below(3) as u32 };
            return Holder::Plain { token, write_seq };
        }
        let object = self.object();
        let entries = vec![Entry { object, count: 1 + self.random.below(2) as u32, write_seq }];
        let beyond = self.random.below(3) as u32;
        let hold = (self.random.below(4) > 0).then(|| self.hold());
        Holder::Reentrant { owner: self.owner(), hold, count: entries[0].count + beyond, entries }
    }

    fn condition(&mut self, present: Option<&State>) -> Condition {
        match (self.random.below(3), present) {
            (0, _) => Condition::Absent,
            (1, Some(state)) => {
                let mut state = state.clone();
                // Not quite what is there.
                match self.random.below(6) {
                    0 => state.ends_at = StoreTime(state.ends_at.0 - 1_000_000),
                    1 => state.holder = self.holder(),
                    _ => {}
                }
                Condition::Seen { state: Box::new(state), over: self.random.below(3) == 0 }
            }
            _ => {
                // Mostly the proof of what is there.
                let (token, owner, hold) = match present.map(|state| &state.holder) {
                    Some(Holder::Plain { token, .. }) if self.random.below(4) > 0 => {
                        (*token, self.owner(), Some(token.hold))
                    }
                    Some(Holder::Reentrant { owner, hold, .. }) if self.random.below(4) > 0 => {
                        (Token { hold: self.hold(), attempt: 0 }, owner.clone(), *hold)
                    }
                    _ => (Token { hold: self.hold(), attempt: 1 }, self.owner(), Some(self.hold())),
                };
                Condition::Mine(match self.random.below(4) {
                    0 => Proof::Token(token),
                    1 => Proof::Hold(token.hold),
                    2 => Proof::Owner { owner, hold },
                    _ => match hold {
                        Some(hold) => Proof::Object { owner, hold, object: self.object() },
                        None => Proof::Owner { owner, hold },
                    },
                })
            }
        }
    }

    fn write(&mut self, condition: &Condition) -> Write {
        let put = |oracle: &mut Oracle| {
            let (holder, expire) = (oracle.holder(), oracle.expire());
            Write::Put(NewRecord { holder, expire, identity: identity() })
        };
        if matches!(condition, Condition::Absent) {
            return put(self);
        }
        let write_seq = self.random.below(8) as u64;
        let by_owner = matches!(condition, Condition::Mine(Proof::Owner { .. } | Proof::Object { .. }));
        match self.random.below(8) {
            0 => Write::Delete,
            1 => put(self),
            2..=4 if !by_owner => {
                Write::Extend { lease: self.lease(), write_seq: (self.random.below(4) > 0).then_some(write_seq) }
            }
            2 => Write::Extend { lease: self.lease(), write_seq: None },
            _ => {
                let seen = matches!(condition, Condition::Seen { .. });
                Write::Entry {
                    object: (!seen || self.random.below(2) == 0).then(|| self.object()),
                    count: self.random.below(3) as u32,
                    write_seq,
                    may_add: self.random.below(2) == 0,
                    lease: self.lease(),
                    name: (self.random.below(2) == 0).then(|| self.hold()),
                }
            }
        }
    }

    fn change(&mut self, present: Option<&State>) -> Change {
        if !self.sent.is_empty() && self.random.below(6) == 0 {
            let again = self.random.below(self.sent.len());
            return self.sent[again].clone();
        }
        let condition = self.condition(present);
        let write = self.write(&condition);
        let change = Change::new(condition, write);
        match self.random.below(8) {
            0 => change.until(Boottime::now() - Duration::from_secs(60)),
            1..=3 => change.until(Boottime::now() + LONG),
            _ => change,
        }
    }

    fn find(&self) -> Option<Record> {
        answer(self.store.find(&self.key)).expect("find is answered")
    }

    /// One change, and whether all was as the reference says.
    fn step(&mut self) -> Effect {
        let before = self.find();
        let state = before.as_ref().map(|record| record.state.clone());
        let change = self.change(state.as_ref());
        // The store's clock, as far as it matters: leases have ended long ago, or end much later.
        let now = |record: &Record| match record.lease {
            Remaining::Runs(left) => StoreTime(record.state.ends_at.0 - left.as_nanos() as u64),
            Remaining::RanOut(ago) => StoreTime(record.state.ends_at.0 + ago.as_nanos() as u64),
            Remaining::Endless => StoreTime(0),
        };
        let late = change.not_after.is_some_and(|not_after| not_after.has_passed());
        let at = before.as_ref().map_or(StoreTime(1), now);
        let expected = match late {
            true => Effect::TooLate,
            false => apply(state.as_ref(), at, None, &change),
        };
        let reply = answer(self.store.change(&self.key, change.clone())).expect("a change is answered");
        let after = self.find();
        let told = || format!("{change:?}\non {state:?}:\n{expected:?}, and the store: {reply:?}\nthen {after:?}");
        let found = after.as_ref().map(|record| &record.state);
        match (&expected, &reply) {
            (Effect::TooLate, Reply::TooLate) => assert_eq!(found, state.as_ref(), "{}", told()),
            // What is late and refused may be called either.
            (Effect::TooLate, Reply::Found(_)) => assert_eq!(found, state.as_ref(), "{}", told()),
            (Effect::Refused, Reply::Found(record)) => {
                assert_eq!(found, state.as_ref(), "{}", told());
                assert_eq!(record.as_ref().map(|record| &record.state), state.as_ref(), "{}", told());
            }
            (Effect::Remove, Reply::Applied { .. }) => assert_eq!(found, None, "{}", told()),
            (Effect::Put(wanted) | Effect::Update(wanted), Reply::Applied { fence }) => {
                let record = after.as_ref().unwrap_or_else(|| panic!("{}", told()));
                assert_eq!(sorted(&record.state.holder), sorted(&wanted.holder), "{}", told());
                assert_eq!(record.fence, *fence, "{}", told());
                match &change.write {
                    Write::Put(NewRecord { expire, .. })
                    | Write::Extend { lease: Lease::FromNow(expire), .. }
                    | Write::Entry { lease: Lease::FromNow(expire), .. } => {
                        // From a clock that was read after the look before, and before the look afterwards.
                        let end = record.state.ends_at;
                        let (earliest, latest) = (before.as_ref().map(now), now(record));
                        assert!(earliest.is_none_or(|earliest| end >= earliest + *expire), "{}", told());
                        assert!(end <= latest + *expire + Duration::from_millis(1), "{}", told());
                    }
                    _ => {
                        // As it was, or so much later as the clock has gone on since.
                        assert!(record.state.ends_at >= wanted.ends_at, "{}", told());
                        assert!(record.state.ends_at.since(wanted.ends_at) < LONG / 2, "{}", told());
                    }
                }
            }
            _ => panic!("{}", told()),
        }
        if self.sent.len() < 40 {
            self.sent.push(change);
        }
        // A short lease has ended when the next change comes.
        if let Some(Record { lease: Remaining::Runs(left), .. }) = after
            && left <= SHORT * 2
        {
            crate::support::eventually("the lease ends", || self.find().is_none_or(|record| record.lease.expired()));
        }
        expected
    }
}

fn follows(url: &str, keys: usize, seed: u64) {
    let store = open(url).expect("the store opens");
    let mut effects = std::collections::BTreeMap::<&str, u64>::new();
    for number in 0..keys {
        let seed = seed + number as u64;
        let mut oracle =
            Oracle { store: Arc::clone(&store), key: fresh_key(), random: Random::new(seed), sent: Vec::new() };
        for _ in 0..40 {
            let effect = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| oracle.step()));
            let effect = effect.unwrap_or_else(|panic| {
                println!("oracle: seed {seed}");
                std::panic::resume_unwind(panic)
            });
            let name = match effect {
                Effect::Put(_) => "put",
                Effect::Update(_) => "updated",
                Effect::Remove => "removed",
                Effect::Refused => "refused",
                Effect::TooLate => "too late",
            };
            *effects.entry(name).or_default() += 1;
        }
    }
    println!("oracle on {url}: {effects:?}");
    assert!(effects.len() == 5 && effects.values().all(|count| *count >= keys as u64 / 2), "{effects:?}");
}

#[test]
fn memory_does_what_the_reference_says() {
    follows(&format!("memory:{}", HoldId::random()), 300, 1);
}

#[test]
fn postgres_does_what_the_reference_says() {
    let server = crate::postgres::shared();
    follows(&server.url, 60, 1);
}
