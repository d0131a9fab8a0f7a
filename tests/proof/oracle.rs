//! Every store beside the reference meaning of a change: random changes, doubled and late ones among them, to a
//! store and to [`apply`]; the replies and what is found afterwards must be the same.
//!
//! `NBLOCK_PROOF_SEED` runs one seed, to see a failure again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::key::{Key, KeyHash};
use nblock::protocol::{
    Change, Condition, Effect, Entry, Holder, Lease, NewRecord, Proof, Reply, State, StoreTime, Write, apply,
};
use nblock::record::{self, Record};
use nblock::store::Store;
use nblock::token::{HoldId, ObjectId, OwnerToken, Token};

use crate::conformance::Subject;
use crate::support::{Random, answer, eventually, fresh_key, identity};

/// A lease that is over before the next change.
const SHORT: Duration = Duration::from_millis(1);
/// Leases that run on, and that no store confuses.
const LONG: [Duration; 2] = [Duration::from_secs(1_000), Duration::from_secs(3_000)];
/// How far a store's clock and reading it may be off.
const TOLERANCE: Duration = Duration::from_secs(100);

const CHANGES: usize = 600;
const KEYS: usize = 3;

/// What is driven: a store, or `apply` itself.
trait Applies {
    fn change(&self, key: &Key, change: Change) -> Reply;
    fn change_many(&self, changes: Vec<(Key, Change)>) -> Vec<Reply>;
    fn find(&self, key: &Key) -> Option<Record>;
}

impl Applies for Arc<dyn Store> {
    fn change(&self, key: &Key, change: Change) -> Reply {
        answer(Store::change(&**self, key, change)).expect("a change is answered")
    }

    fn change_many(&self, changes: Vec<(Key, Change)>) -> Vec<Reply> {
        let replies = answer(Store::change_many(&**self, changes)).expect("changes are answered");
        replies.into_iter().map(|reply| reply.expect("each change is answered")).collect()
    }

    fn find(&self, key: &Key) -> Option<Record> {
        answer(Store::find(&**self, key)).expect("find is answered")
    }
}

/// What a broken store makes of the effect of a change.
type Break = fn(Option<&State>, &Change, Effect) -> Effect;

/// The smallest store there can be; broken where `breaks` says so.
#[derive(Default)]
struct Smallest {
    records: Mutex<BTreeMap<KeyHash, State>>,
    breaks: Option<Break>,
}

fn record(key: &Key, state: &State) -> Record {
    let lease = record::Lease::at(state.ends_at, Boottime::now().into());
    Record { key: key.clone(), damaged: None, lease, expires_at_ms: 0, owner: None, fence: None, state: state.clone() }
}

impl Applies for Smallest {
    fn change(&self, key: &Key, change: Change) -> Reply {
        let mut records = self.records.lock().expect("no test panics here");
        let name = key.hash();
        let present = records.get(&name).cloned();
        let not_after = change.not_after.map(StoreTime::from);
        let mut effect = apply(present.as_ref(), Boottime::now().into(), not_after, &change);
        if let Some(breaks) = self.breaks {
            effect = breaks(present.as_ref(), &change, effect);
        }
        match effect {
            Effect::Put(state) | Effect::Update(state) => drop(records.insert(name, state)),
            Effect::Remove => drop(records.remove(&name)),
            Effect::Refused => return Reply::Found(present.map(|state| Box::new(record(key, &state)))),
            Effect::TooLate => return Reply::TooLate,
        }
        Reply::Applied { fence: None }
    }

    fn change_many(&self, changes: Vec<(Key, Change)>) -> Vec<Reply> {
        changes.into_iter().map(|(key, change)| self.change(&key, change)).collect()
    }

    fn find(&self, key: &Key) -> Option<Record> {
        self.records.lock().expect("no test panics here").get(&key.hash()).map(|state| record(key, state))
    }
}

/// One key: the record as it is, and the states that were seen.
struct Row {
    key: Key,
    state: Option<State>,
    /// What the store's clock said when it was found.
    now: StoreTime,
    fence: u64,
    seen: Vec<State>,
    sent: Vec<Change>,
    /// Whether the store forgets a record when its lease is over.
    forgets: bool,
}

fn name(number: usize) -> HoldId {
    HoldId([number as u8 + 1; 16])
}

fn owner(random: &mut Random) -> OwnerToken {
    OwnerToken(["ours", "theirs"][usize::from(random.below(8) == 0)].into())
}

fn expire(random: &mut Random) -> Duration {
    [SHORT, LONG[0], LONG[1]][random.below(3)]
}

fn token(random: &mut Random) -> Token {
    Token { hold: name(random.below(2)), attempt: 1 + random.below(2) as u32 }
}

fn object(random: &mut Random) -> ObjectId {
    ObjectId(u64::MAX - random.below(3) as u64)
}

fn put(random: &mut Random, shared: bool) -> Write {
    let holder = match random.below(5) {
        0 | 1 => Holder::Plain { token: token(random), write_seq: 1 + random.below(5) as u64 },
        2 if shared => {
            Holder::Reentrant { owner: owner(random), hold: None, count: 1 + random.below(2) as u32, entries: vec![] }
        }
        _ => {
            let entry = Entry { object: object(random), count: 1, write_seq: 1 + random.below(5) as u64 };
            Holder::Reentrant {
                owner: owner(random),
                hold: Some(name(random.below(2))),
                count: 1,
                entries: vec![entry],
            }
        }
    };
    Write::Put(NewRecord { holder, expire: expire(random), identity: identity() })
}

fn lease(random: &mut Random) -> Lease {
    match random.below(4) {
        0 => Lease::FromNow(expire(random)),
        1 => Lease::NotSooner(expire(random)),
        _ => Lease::AsStored,
    }
}

fn entry(random: &mut Random, object: Option<ObjectId>) -> Write {
    Write::Entry {
        object,
        count: random.below(4) as u32,
        write_seq: 1 + random.below(12) as u64,
        may_add: random.below(2) == 0,
        lease: lease(random),
        name: (random.below(2) == 0).then(|| name(random.below(2))),
    }
}

/// A change that the protocol may ask for, likely to be true of what is there.
/// `shared`: whether another library makes records there, which have no name.
fn change(random: &mut Random, row: &Row, shared: bool) -> Change {
    let new = match random.below(20) {
        // A late or a doubled one.
        0..=3 if !row.sent.is_empty() => return row.sent[random.below(row.sent.len())].clone(),
        0..=5 => Change::new(Condition::Absent, put(random, shared)),
        6..=9 if !row.seen.is_empty() => {
            let state = match &row.state {
                Some(state) if random.below(3) > 0 => state.clone(),
                _ => row.seen[random.below(row.seen.len())].clone(),
            };
            let write = match random.below(4) {
                0 | 1 => put(random, shared),
                3 if matches!(state.holder, Holder::Reentrant { .. }) => {
                    let object = (random.below(2) == 0).then(|| object(random));
                    entry(random, object)
                }
                _ => Write::Delete,
            };
            Change::new(Condition::Seen { state: Box::new(state), over: random.below(2) == 0 }, write)
        }
        10..=13 => {
            let token = match &row.state {
                Some(State { holder: Holder::Plain { token, .. }, .. }) if random.below(3) > 0 => *token,
                _ => token(random),
            };
            let proof = if random.below(3) == 0 { Proof::Hold(token.hold) } else { Proof::Token(token) };
            let write = match random.below(4) {
                0 => Write::Delete,
                _ => Write::Extend {
                    lease: Lease::FromNow(expire(random)),
                    write_seq: Some(1 + random.below(12) as u64),
                },
            };
            Change::new(Condition::Mine(proof), write)
        }
        _ => {
            let (owner, hold) = match &row.state {
                Some(State { holder: Holder::Reentrant { owner, hold, .. }, .. }) if random.below(4) > 0 => {
                    (owner.clone(), *hold)
                }
                _ => (owner(random), (random.below(3) > 0).then(|| name(random.below(2)))),
            };
            let object = object(random);
            match (random.below(4), hold) {
                (0, Some(hold)) => {
                    let extend = Write::Extend { lease: Lease::NotSooner(expire(random)), write_seq: None };
                    Change::new(Condition::Mine(Proof::Object { owner, hold, object }), extend)
                }
                (1, hold) => {
                    let extend = Write::Extend { lease: lease(random), write_seq: None };
                    Change::new(Condition::Mine(Proof::Owner { owner, hold }), extend)
                }
                (_, hold) => {
                    let condition = Condition::Mine(Proof::Owner { owner, hold });
                    Change::new(condition, entry(random, Some(object)))
                }
            }
        }
    };
    // Never near now: the two clocks need not be the same.
    match random.below(8) {
        0 => new.until(Boottime::now() - LONG[0]),
        1 | 2 => new.until(Boottime::now() + LONG[0]),
        _ => new,
    }
}

/// What `apply` says of the row.
fn expected(row: &Row, change: &Change) -> Effect {
    let late = change.not_after.is_some_and(|not_after| not_after < Boottime::now());
    let not_after = change.not_after.map(|_| if late { StoreTime(0) } else { StoreTime::NEVER });
    apply(row.state.as_ref(), row.now, not_after, change)
}

fn is_about(found: StoreTime, expected: StoreTime) -> bool {
    found.since(expected).max(expected.since(found)) < TOLERANCE
}

impl Row {
    fn new(forgets: bool) -> Row {
        let (key, now) = (fresh_key(), StoreTime(1));
        Row { key, state: None, now, fence: 0, seen: Vec::new(), sent: Vec::new(), forgets }
    }

    /// Compares what the store did with what `apply` says, and goes on from what the store has.
    fn follow(&mut self, store: &dyn Applies, change: &Change, reply: &Reply, in_batch: bool) -> Result<(), String> {
        let effect = expected(self, change);
        match (&effect, reply) {
            (Effect::Put(_) | Effect::Update(_) | Effect::Remove, Reply::Applied { .. })
            | (Effect::TooLate, Reply::TooLate) => {}
            (Effect::Refused, Reply::Found(found)) if self.is_told(change, found.as_deref(), in_batch) => {}
            _ => return Err(format!("replied {reply:?}")),
        }
        let mut found = store.find(&self.key);
        match (&effect, &found) {
            (Effect::Put(state) | Effect::Update(state), Some(found)) => {
                if sorted(&found.state.holder) != sorted(&state.holder) || !self.ends_as_asked(change, found) {
                    return Err(format!("the record is now {:?}", found.state));
                }
            }
            (Effect::Remove, None) => {}
            (Effect::Put(state) | Effect::Update(state), None)
                if self.forgets && state.ends_at.since(self.now) <= SHORT => {}
            (Effect::Refused | Effect::TooLate, found)
                if found.as_ref().map(|found| &found.state) == self.state.as_ref() => {}
            _ => return Err(format!("the record is now {:?}", found.map(|found| found.state))),
        }
        if let Reply::Applied { fence: Some(fence) } = reply {
            let grows = matches!(effect, Effect::Put(_));
            if grows && *fence <= self.fence || matches!(effect, Effect::Update(_)) && *fence != self.fence {
                return Err(format!("the fence is {fence} after {}", self.fence));
            }
            self.fence = *fence;
        }
        if found.as_ref().is_some_and(|found| found.lease.remaining() <= SHORT) {
            eventually("the lease runs out", || {
                found = store.find(&self.key);
                found.as_ref().is_none_or(|found| found.lease.expired() && !self.forgets)
            });
        }
        if let Some(Record { state, lease, .. }) = &found {
            self.now = match lease {
                record::Lease::RanOut(ago) => state.ends_at + *ago,
                lease => StoreTime(state.ends_at.0 - lease.remaining().as_nanos() as u64),
            };
        }
        self.state = found.map(|found| found.state);
        self.seen.extend(self.state.clone());
        self.sent.push(change.clone());
        Ok(())
    }

    /// Whether a refused change gets what is there: in a batch, at least whether that proves its hold.
    fn is_told(&self, change: &Change, found: Option<&Record>, in_batch: bool) -> bool {
        match (&self.state, found, &change.condition) {
            (None, None, _) => true,
            (Some(state), Some(found), Condition::Mine(proof)) if in_batch => {
                state.holder.is_proven_by(proof) == found.state.holder.is_proven_by(proof)
            }
            (Some(state), Some(found), _) => *state == found.state,
            _ => false,
        }
    }

    /// Which lease it is can be seen, and not when exactly the store's clock was read.
    fn ends_as_asked(&self, change: &Change, found: &Record) -> bool {
        let lease = match &change.write {
            Write::Put(new) => Lease::FromNow(new.expire),
            Write::Entry { lease, .. } | Write::Extend { lease, .. } => *lease,
            Write::Delete => return false,
        };
        match (lease, &self.state) {
            (Lease::FromNow(expire), _) | (Lease::NotSooner(expire), None) => is_about_left(found, expire),
            (Lease::NotSooner(expire), Some(before)) => {
                let same = found.state.ends_at == before.ends_at;
                match before.ends_at.since(self.now) {
                    left if left > expire + TOLERANCE => same,
                    left if left + TOLERANCE < expire => is_about_left(found, expire),
                    _ => same || found.state.ends_at > before.ends_at && is_about_left(found, expire),
                }
            }
            (Lease::AsStored, before) => before.as_ref().is_some_and(|before| found.state.ends_at == before.ends_at),
        }
    }
}

/// The order of entries means nothing.
fn sorted(holder: &Holder) -> Holder {
    let mut holder = holder.clone();
    if let Holder::Reentrant { entries, .. } = &mut holder {
        entries.sort_by_key(|entry| entry.object);
    }
    holder
}

fn is_about_left(found: &Record, asked: Duration) -> bool {
    let left = found.lease.remaining();
    is_about(StoreTime(left.as_nanos() as u64), StoreTime(asked.as_nanos() as u64))
}

/// Drives a store beside `apply`. What differs first is the error.
fn differs(store: &dyn Applies, shared: bool, forgets: bool, seed: u64) -> Result<usize, String> {
    let mut random = Random::new(seed);
    let mut rows: Vec<Row> = (0..KEYS).map(|_| Row::new(forgets)).collect();
    let mut applied = 0;
    for number in 0..CHANGES {
        let mut changes: Vec<Change> = rows.iter().map(|row| change(&mut random, row, shared)).collect();
        let at = random.below(KEYS);
        let many = random.below(8) == 0;
        if many {
            // Renewals, which a store may batch by themselves, take nothing from anybody at any time.
            let renewals = changes.iter_mut().filter(|change| matches!(change.write, Write::Extend { .. }));
            renewals.for_each(|change| change.not_after = None);
        }
        let replies = match many {
            true => {
                let keys = rows.iter().map(|row| row.key.clone());
                store.change_many(keys.zip(changes.iter().cloned()).collect())
            }
            false => vec![store.change(&rows[at].key, changes[at].clone())],
        };
        let which = if many { 0..KEYS } else { at..at + 1 };
        for (at, reply) in which.zip(&replies) {
            applied += usize::from(matches!(reply, Reply::Applied { .. }));
            let (row, change) = (&mut rows[at], &changes[at]);
            let before = row.state.clone();
            row.follow(store, change, reply, many).map_err(|difference| {
                format!(
                    "change {number} of seed {seed}: {change:?} on {before:?} at {:?}: {difference}; apply says {:?}",
                    row.now,
                    expected(row, change)
                )
            })?;
        }
    }
    Ok(applied)
}

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("NBLOCK_PROOF_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 1..5,
    }
}

fn agrees(subject: Option<Subject>, shared: bool) {
    let Some(subject) = subject else { return };
    let mut all = 0;
    for seed in seeds() {
        let applied = differs(&subject.store, shared, subject.forgets, seed);
        let applied = applied.unwrap_or_else(|difference| panic!("{difference}"));
        println!("seed {seed}: {applied} of {CHANGES} changes were applied");
        all += applied;
    }
    assert!(all > CHANGES / 8, "too few changes were applied to tell anything: {all}");
}

#[test]
fn memory() {
    agrees(Subject::memory(), true);
}

#[test]
fn embedded() {
    agrees(Subject::embedded(), false);
}

#[test]
fn reql() {
    agrees(Subject::reql(), true);
}

#[test]
fn rethinkdb() {
    agrees(Subject::rethinkdb(), true);
}

#[test]
fn redis() {
    agrees(Subject::redis(), true);
}

#[test]
fn postgres() {
    agrees(Subject::postgres(), true);
}

/// The comparison itself finds nothing where nothing is wrong, and what is wrong where something is.
#[test]
fn broken_stores_are_found() {
    for seed in seeds() {
        differs(&Smallest::default(), true, false, seed).unwrap_or_else(|difference| panic!("{difference}"));
    }
    type Breaks = fn(Option<&State>, &Change, Effect) -> Effect;
    let broken: [(&str, Breaks); 6] = [
        ("numbers are not compared", |present, change, effect| {
            let (Effect::Refused, Some(present), Condition::Mine(proof)) = (&effect, present, &change.condition) else {
                return effect;
            };
            match (&change.write, &present.holder) {
                (Write::Extend { .. }, Holder::Plain { .. }) if present.holder.is_proven_by(proof) => {
                    Effect::Update(present.clone())
                }
                _ => effect,
            }
        }),
        ("the lease is not compared", |present, change, effect| {
            match (&effect, present, &change.condition, &change.write) {
                (Effect::Refused, Some(present), Condition::Seen { state, over: false }, Write::Delete)
                    if present.holder == state.holder =>
                {
                    Effect::Remove
                }
                _ => effect,
            }
        }),
        ("late is not too late", |present, change, effect| match effect {
            Effect::TooLate => apply(present, Boottime::now().into(), None, change),
            effect => effect,
        }),
        ("entries are lost", |_, _, effect| match effect {
            Effect::Update(mut state) => {
                if let Holder::Reentrant { entries, .. } = &mut state.holder {
                    entries.truncate(1);
                }
                Effect::Update(state)
            }
            effect => effect,
        }),
        ("a lease is made shorter", |present, change, effect| match (effect, present, &change.write) {
            (
                Effect::Update(state),
                Some(_),
                Write::Entry { lease: Lease::NotSooner(expire), .. }
                | Write::Extend { lease: Lease::NotSooner(expire), .. },
            ) => Effect::Update(State { ends_at: StoreTime::from(Boottime::now()) + *expire, ..state }),
            (effect, ..) => effect,
        }),
        ("the record goes with the last entry", |_, _, effect| match effect {
            Effect::Update(State { holder: Holder::Reentrant { ref entries, .. }, .. }) if entries.is_empty() => {
                Effect::Remove
            }
            effect => effect,
        }),
    ];
    for (what, breaks) in broken {
        let smallest = || Smallest { breaks: Some(breaks), ..Smallest::default() };
        let found = (1..20).any(|seed| differs(&smallest(), true, false, seed).is_err());
        assert!(found, "nothing was found wrong where {what}");
    }
}
