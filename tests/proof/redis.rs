//! The Redis store on a real server: what conformance does not ask of every store.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::protocol::{
    Change, Condition, Effect, Entry, Holder, Lease, NewRecord, Proof, Reply, State, StoreTime, Write, apply,
};
use nblock::record::Record;
use nblock::store::{Store, StoreErrorKind};
use nblock::token::{HoldId, ObjectId, OwnerToken, Token};

use crate::scene::{LONG, Random, answer, fresh_key, identity, open};
use crate::servers::Server;

/// A server that the tests of this program share while one of them needs it.
pub fn server() -> Arc<Server> {
    static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let server = Arc::new(Server::start("redis", &[]));
        *shared = Arc::downgrade(&server);
        server
    })
}

/// What the server's own client prints.
pub fn cli(server: &Server, arguments: &[&str]) -> String {
    server.ask("redis-cli", &[&["-p", "{port}"], arguments].concat())
}

fn found(store: &Arc<dyn Store>, key: &Key) -> Option<Record> {
    answer(store.find(key)).expect("find is answered")
}

/// Draws changes out of few names and numbers, so that many of them match.
struct Draw(Random);

impl Draw {
    fn of<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.0.below(from.len())].clone()
    }

    fn hold(&mut self) -> HoldId {
        HoldId([self.0.below(2) as u8; 16])
    }

    fn token(&mut self) -> Token {
        Token { hold: self.hold(), attempt: self.0.below(2) as u32 }
    }

    fn owner(&mut self) -> OwnerToken {
        OwnerToken(self.of(&["o", "ö p"]).into())
    }

    fn object(&mut self) -> ObjectId {
        ObjectId(self.of(&[1, u64::MAX]))
    }

    fn some_hold(&mut self) -> Option<HoldId> {
        (self.0.below(3) > 0).then(|| self.hold())
    }

    fn number(&mut self) -> u64 {
        self.0.below(5) as u64
    }

    fn lease(&mut self) -> Lease {
        let length = LONG * (1 + self.0.below(3) as u32);
        self.of(&[Lease::FromNow(length), Lease::NotSooner(length), Lease::AsStored])
    }

    fn holder(&mut self) -> Holder {
        if self.0.below(3) == 0 {
            return Holder::Plain { token: self.token(), write_seq: self.number() };
        }
        let mut entries = Vec::new();
        for object in [ObjectId(1), ObjectId(u64::MAX)] {
            if self.0.below(2) == 0 {
                entries.push(Entry { object, count: 1 + self.0.below(3) as u32, write_seq: self.number() });
            }
        }
        let counted: u32 = entries.iter().map(|entry| entry.count).sum();
        let count = (counted + self.0.below(3) as u32).max(1);
        Holder::Reentrant { owner: self.owner(), hold: self.some_hold(), count, entries }
    }

    fn write(&mut self) -> Write {
        match self.0.below(6) {
            0 => Write::Put(NewRecord { holder: self.holder(), expire: LONG, identity: identity() }),
            1 => Write::Delete,
            2 | 3 => {
                let write_seq = (self.0.below(4) > 0).then(|| self.number());
                Write::Extend { lease: self.lease(), write_seq }
            }
            _ => Write::Entry {
                object: (self.0.below(4) > 0).then(|| self.object()),
                count: self.0.below(3) as u32,
                write_seq: self.number(),
                may_add: self.0.below(2) == 0,
                lease: self.lease(),
                name: self.some_hold(),
            },
        }
    }

    fn proof(&mut self) -> Proof {
        match self.0.below(4) {
            0 => Proof::Token(self.token()),
            1 => Proof::Hold(self.hold()),
            2 => Proof::Owner { owner: self.owner(), hold: self.some_hold() },
            _ => Proof::Object { owner: self.owner(), hold: self.hold(), object: self.object() },
        }
    }

    fn change(&mut self, present: Option<&State>, before: &[State]) -> Change {
        let put = |draw: &mut Draw| Write::Put(NewRecord { holder: draw.holder(), expire: LONG, identity: identity() });
        let (condition, write) = match (self.0.below(6), present) {
            (0, _) | (_, None) => (Condition::Absent, put(self)),
            (1 | 2, Some(present)) => {
                let mut state = if self.0.below(4) > 0 { present.clone() } else { self.of(before) };
                if self.0.below(8) == 0 {
                    state.ends_at = StoreTime(state.ends_at.0 + 5_000_000);
                }
                (Condition::Seen { state: Box::new(state), over: self.0.below(8) == 0 }, self.write())
            }
            _ => (Condition::Mine(self.proof()), self.write()),
        };
        let change = Change::new(condition, write);
        if self.0.below(4) == 0 { change.until(Boottime::now() + LONG) } else { change }
    }
}

/// The scripts mean what the reference says, change by change.
#[test]
fn scripts_mean_what_apply_says() {
    const SEED: u64 = 1;
    let server = server();
    let store = open(&server.url).unwrap();
    let mut draw = Draw(Random::new(SEED));
    let mut counts = [0; 4];
    for round in 0..60 {
        let key = fresh_key();
        let mut before = vec![State { holder: draw.holder(), ends_at: StoreTime(0) }];
        for step in 0..50 {
            if draw.0.below(20) == 0 {
                cli(&server, &["set", key.as_str(), "a stranger's", "px", "3600000"]);
            }
            let present = found(&store, &key);
            let state = present.as_ref().map(|record| &record.state);
            let change = draw.change(state, &before);
            let what = format!("seed {SEED}, round {round}, step {step}: {change:?} on {state:?}");
            // Nothing here is ever over.
            let expected = apply(state, StoreTime(1), None, &change);
            let reply = answer(store.change(&key, change.clone())).unwrap_or_else(|error| panic!("{what}: {error}"));
            let after = found(&store, &key);
            match (&expected, &reply) {
                (Effect::Refused, Reply::Found(record)) => {
                    counts[0] += 1;
                    assert_same(record.as_deref().map(|record| &record.state), state, &what);
                    assert_same(after.as_ref().map(|record| &record.state), state, &what);
                }
                (Effect::Remove, Reply::Applied { .. }) => {
                    counts[1] += 1;
                    assert!(after.is_none(), "{what}");
                }
                (Effect::Put(next), Reply::Applied { fence }) => {
                    counts[2] += 1;
                    let after = after.unwrap_or_else(|| panic!("{what}: nothing is there"));
                    assert_eq!(after.state.holder, next.holder, "{what}");
                    assert!(fence.is_some() && after.fence == *fence, "{what}");
                    let before = present.as_ref().and_then(|record| record.fence).unwrap_or(0);
                    assert!(after.fence > Some(before), "{what}");
                }
                (Effect::Update(next), Reply::Applied { fence }) => {
                    counts[3] += 1;
                    let after = after.unwrap_or_else(|| panic!("{what}: nothing is there"));
                    assert_eq!(after.state.holder, next.holder, "{what}");
                    assert_eq!(
                        (after.fence, *fence),
                        (present.as_ref().and_then(|record| record.fence), after.fence),
                        "{what}"
                    );
                    assert_end(&change, state, &after.state, &what);
                }
                other => panic!("{what}: {other:?}"),
            }
            before.extend(found(&store, &key).map(|record| record.state));
        }
    }
    assert!(counts.iter().all(|count| *count > 50), "not all outcomes were tried: {counts:?}");
}

fn assert_same(one: Option<&State>, other: Option<&State>, what: &str) {
    assert_eq!(one.map(|state| &state.holder), other.map(|state| &state.holder), "{what}");
    let millis = |state: Option<&State>| state.map_or(0, |state| state.ends_at.0 / 1_000_000);
    // Of a stranger's key, Redis tells the time that is left, and the end is reckoned from that.
    assert!(millis(one).abs_diff(millis(other)) <= 2, "{what}");
}

/// Leases differ by an hour, and a test takes less.
fn assert_end(change: &Change, before: Option<&State>, after: &State, what: &str) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let lease = match &change.write {
        Write::Extend { lease, .. } | Write::Entry { lease, .. } => *lease,
        other => panic!("{what}: {other:?}"),
    };
    let stored = before.expect("it was there").ends_at.0;
    let expected = match lease {
        Lease::FromNow(length) => now + length.as_nanos() as u64,
        Lease::NotSooner(length) => stored.max(now + length.as_nanos() as u64),
        Lease::AsStored => stored,
    };
    let slack = if lease == Lease::AsStored { 2_000_000 } else { 1_000_000_000 * 600 };
    assert!(after.ends_at.0.abs_diff(expected) <= slack, "{what}: ends at {} and not {expected}", after.ends_at.0);
}
