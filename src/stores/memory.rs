//! The memory store: records in this process, for tests of programs that use the library.
//!
//! `memory:` is a store of its own; `memory:NAME` is shared within the process by name. A forked
//! child has empty ones.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::clock::{self, Boottime};
use crate::error::Error;
use crate::key::{Key, KeyHash};
use crate::mutex::Mutex;
use crate::process::PerProcess;
use crate::record::{Lease, Owner, Record, Reentrant, Seen};
use crate::store::{
    Acquired, Action, Answer, Attempt, Broken, Change, Claim, Filter, Identity, OwnerToken, Pong, Proof, Released,
    Renewal, Renewed, Step, Stepped, Store, StoreError, Watch,
};
use crate::token::{HoldId, ObjectId, Token};
use crate::url::Url;

static NAMED: PerProcess<Mutex<HashMap<String, Weak<MemoryStore>>>> = PerProcess::new();

pub fn open(url: &Url) -> Result<Arc<dyn Store>, Error> {
    url.only_options(&[])?;
    if !url.hosts.is_empty() {
        return Err(Error::invalid_argument("store URL memory: has no hosts: write memory: or memory:NAME"));
    }
    if url.path.is_empty() {
        return Ok(Arc::new(MemoryStore::default()));
    }
    let mut named = NAMED.get_or_init(|_| Mutex::default()).lock();
    if let Some(store) = named.get(&url.path).and_then(Weak::upgrade) {
        return Ok(store);
    }
    named.retain(|_, store| store.strong_count() > 0);
    let store = Arc::new(MemoryStore { name: url.path.clone(), ..MemoryStore::default() });
    named.insert(url.path.clone(), Arc::downgrade(&store));
    Ok(store)
}

thread_local! {
    static ARRIVAL: Cell<Option<Boottime>> = const { Cell::new(None) };
}

/// Applies a request now that arrived earlier, with the clock of its arrival (R3): for tests of what a server
/// does that was busy between the two. The stores of this room alone read that clock.
#[doc(hidden)]
pub fn as_of<T>(arrival: Boottime, request: impl FnOnce() -> T) -> T {
    struct Restored(Option<Boottime>);
    impl Drop for Restored {
        fn drop(&mut self) {
            ARRIVAL.set(self.0);
        }
    }
    let _restored = Restored(ARRIVAL.replace(Some(arrival)));
    request()
}

/// The store's clock, as the request at hand reads it.
fn now() -> Boottime {
    ARRIVAL.get().unwrap_or_else(Boottime::now)
}

#[derive(Default)]
struct MemoryStore {
    name: String,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    rows: HashMap<KeyHash, Row>,
    watches: HashMap<KeyHash, Vec<Arc<Watched>>>,
}

/// The last fence of any store: a named one grows on where a former one of its name ended.
static LAST_FENCE: AtomicU64 = AtomicU64::new(0);

fn next_fence() -> u64 {
    LAST_FENCE.fetch_add(1, Ordering::Relaxed) + 1
}

struct Row {
    key: Key,
    holder: Holder,
    expires_at: Boottime,
    n: u64,
    fence: u64,
    identity: Arc<Identity>,
    acquired_at_ms: u64,
}

enum Holder {
    Plain(Token),
    Reentrant { owner: OwnerToken, hold: HoldId, count: u32, last_steps: BTreeMap<ObjectId, u64> },
}

impl Row {
    fn expired(&self, now: Boottime) -> bool {
        self.expires_at < now
    }

    fn expires_in(&self, now: Boottime) -> Duration {
        self.expires_at.since(now)
    }

    fn record(&self, now: Boottime) -> Record {
        let lease = Lease::from_nanos(self.expires_at.as_nanos(), now.as_nanos());
        let (token, reentrant) = match &self.holder {
            Holder::Plain(token) => (token.to_string().into(), None),
            Holder::Reentrant { owner, hold, count, .. } => {
                (owner.0.as_ref().into(), Some(Reentrant { count: *count, hold: Some(*hold) }))
            }
        };
        Record {
            key: self.key.clone(),
            damaged: None,
            lease,
            expires_at_ms: lease.wall_millis(),
            owner: Some(Owner {
                host: self.identity.host.clone(),
                pid: self.identity.pid,
                boot_id: self.identity.boot_id.clone(),
                app: self.identity.app.clone(),
                acquired_at_ms: self.acquired_at_ms,
            }),
            fence: Some(self.fence),
            reentrant,
            seen: Seen { token, expires_at: self.expires_at.as_nanos(), n: self.n },
        }
    }
}

impl Inner {
    fn changed(&self, hash: KeyHash) {
        for watched in self.watches.get(&hash).into_iter().flatten() {
            watched.change();
        }
    }

    fn acquire(&mut self, key: &Key, attempt: Attempt) -> Acquired {
        let now = now();
        if now > attempt.not_after {
            return Acquired::TooLate;
        }
        if let Some(row) = self.rows.get_mut(&key.hash()) {
            match row.holder {
                Holder::Plain(token) if token.hold == attempt.token.hold => {
                    let applied = row.n < attempt.n;
                    if applied {
                        row.n = attempt.n;
                        row.expires_at = now + attempt.expire;
                    }
                    return Acquired::Granted { token, applied, fence: Some(row.fence) };
                }
                _ if row.expired(now) => {}
                _ => return Acquired::Held { expires_in: row.expires_in(now) },
            }
        }
        let fence = next_fence();
        self.rows.insert(
            key.hash(),
            Row {
                key: key.clone(),
                holder: Holder::Plain(attempt.token),
                expires_at: now + attempt.expire,
                n: attempt.n,
                fence,
                identity: attempt.identity,
                acquired_at_ms: clock::wall_millis(),
            },
        );
        Acquired::Granted { token: attempt.token, applied: true, fence: Some(fence) }
    }

    fn release(&mut self, key: &Key, claim: Claim) -> Released {
        let ours = self.rows.get(&key.hash()).is_some_and(|row| match (&row.holder, claim) {
            (Holder::Plain(token), Claim::Token(ours)) => *token == ours,
            (Holder::Plain(token), Claim::AnyOf(hold)) => token.hold == hold,
            (Holder::Reentrant { .. }, _) => false,
        });
        if !ours {
            return Released::NotOurs;
        }
        self.rows.remove(&key.hash());
        self.changed(key.hash());
        Released::Released
    }

    fn renew(&mut self, renewal: &Renewal) -> Renewed {
        let now = now();
        let Some(row) = self.rows.get_mut(&renewal.key.hash()) else { return Renewed::Lost };
        let until = now + renewal.expire;
        match (&row.holder, &renewal.proof) {
            (Holder::Plain(token), Proof::Plain(ours)) if token == ours => {
                let applied = row.n < renewal.n;
                if applied {
                    let shortened = until < row.expires_at;
                    row.n = renewal.n;
                    row.expires_at = until;
                    if shortened {
                        self.changed(renewal.key.hash());
                    }
                }
                Renewed::Renewed { applied }
            }
            (Holder::Reentrant { owner, hold, .. }, Proof::Reentrant { owner: ours, hold: our_hold })
                if owner == ours && hold == our_hold =>
            {
                row.expires_at = row.expires_at.max(until);
                Renewed::Renewed { applied: true }
            }
            _ => Renewed::Lost,
        }
    }

    fn step(&mut self, key: &Key, step: Step) -> Stepped {
        match step.action {
            Action::Enter { hold, fresh, expire, not_after, identity } => {
                let now = now();
                if now > not_after {
                    return Stepped::TooLate;
                }
                if let Some(row) = self.rows.get_mut(&key.hash()) {
                    let expired = row.expired(now);
                    match &mut row.holder {
                        Holder::Reentrant { owner, hold: current, count, last_steps }
                            if *owner == step.owner && (!expired || hold == Some(*current) || fresh == *current) =>
                        {
                            let last = last_steps.entry(step.object).or_default();
                            if *last > step.number {
                                return Stepped::TooLate;
                            }
                            if *last < step.number {
                                *last = step.number;
                                *count += 1;
                            }
                            row.expires_at = row.expires_at.max(now + expire);
                            return Stepped::Entered {
                                hold: *current,
                                count: *count,
                                applied: true,
                                fence: Some(row.fence),
                            };
                        }
                        _ if expired => {}
                        _ => return Stepped::Held { expires_in: row.expires_in(now) },
                    }
                }
                let fence = next_fence();
                self.rows.insert(
                    key.hash(),
                    Row {
                        key: key.clone(),
                        holder: Holder::Reentrant {
                            owner: step.owner,
                            hold: fresh,
                            count: 1,
                            last_steps: BTreeMap::from([(step.object, step.number)]),
                        },
                        expires_at: now + expire,
                        n: 0,
                        fence,
                        identity,
                        acquired_at_ms: clock::wall_millis(),
                    },
                );
                Stepped::Entered { hold: fresh, count: 1, applied: true, fence: Some(fence) }
            }
            Action::Leave { hold, enter, .. } => {
                let Some(Holder::Reentrant { owner, hold: current, count, last_steps }) =
                    self.rows.get_mut(&key.hash()).map(|row| &mut row.holder)
                else {
                    return Stepped::NotOurs;
                };
                if *owner != step.owner || hold != Some(*current) {
                    return Stepped::NotOurs;
                }
                let last = last_steps.get(&step.object).copied().unwrap_or(0);
                if last < step.number {
                    if enter.is_some_and(|enter| enter != last) {
                        return Stepped::NotOurs;
                    }
                    last_steps.insert(step.object, step.number);
                    *count -= 1;
                }
                let count = *count;
                if count == 0 {
                    self.rows.remove(&key.hash());
                    self.changed(key.hash());
                }
                Stepped::Left { count }
            }
            Action::Undo { enter } => {
                let Some(Holder::Reentrant { owner, count, last_steps, .. }) =
                    self.rows.get_mut(&key.hash()).map(|row| &mut row.holder)
                else {
                    return Stepped::Undone;
                };
                if *owner != step.owner {
                    return Stepped::Undone;
                }
                let last = last_steps.entry(step.object).or_default();
                let entered = *last == enter;
                *last = (*last).max(step.number);
                if entered {
                    *count -= 1;
                    if *count == 0 {
                        self.rows.remove(&key.hash());
                        self.changed(key.hash());
                    }
                }
                Stepped::Undone
            }
        }
    }

    fn break_seen(&mut self, record: &Record) -> Broken {
        let hash = record.key.hash();
        let now = now();
        let as_seen = self.rows.get(&hash).is_some_and(|row| {
            let present = row.record(now);
            present.seen == record.seen && present.reentrant == record.reentrant
        });
        if !as_seen {
            return Broken::Changed;
        }
        self.rows.remove(&hash);
        self.changed(hash);
        Broken::Broken
    }
}

impl MemoryStore {
    fn with<T>(&self, operation: impl FnOnce(&mut Inner) -> T) -> Answer<T> {
        Answer::Now(Ok(operation(&mut self.inner.lock())))
    }
}

impl Store for MemoryStore {
    fn acquire(&self, key: &Key, attempt: Attempt) -> Answer<Acquired> {
        self.with(|inner| inner.acquire(key, attempt))
    }

    fn release(&self, key: &Key, claim: Claim) -> Answer<Released> {
        self.with(|inner| inner.release(key, claim))
    }

    fn refresh(&self, batch: Vec<Renewal>) -> Answer<Vec<Result<Renewed, StoreError>>> {
        self.with(|inner| batch.iter().map(|renewal| Ok(inner.renew(renewal))).collect())
    }

    fn step(&self, key: &Key, step: Step) -> Answer<Stepped> {
        self.with(|inner| inner.step(key, step))
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        let now = now();
        self.with(|inner| inner.rows.get(&key.hash()).map(|row| row.record(now)))
    }

    fn list(&self, filter: Filter) -> Answer<Vec<Record>> {
        let now = now();
        let wanted = |row: &&Row| filter == Filter::All || row.expired(now);
        self.with(|inner| inner.rows.values().filter(wanted).map(|row| row.record(now)).collect())
    }

    fn break_seen(&self, record: &Record) -> Answer<Broken> {
        self.with(|inner| inner.break_seen(record))
    }

    fn fence(&self, _key: &Key) -> Answer<u64> {
        self.with(|_| next_fence())
    }

    fn watch(&self, key: &Key) -> Box<dyn Watch> {
        let watched = Arc::new(Watched::default());
        self.inner.lock().watches.entry(key.hash()).or_default().push(Arc::clone(&watched));
        Box::new(MemoryWatch { inner: Arc::clone(&self.inner), hash: key.hash(), watched })
    }

    fn ping(&self) -> Answer<Pong> {
        self.with(|_| Pong { server: "memory, in this process".to_string(), skew_ms: None })
    }

    fn location(&self) -> String {
        match self.name.as_str() {
            "" => "memory of this process".to_string(),
            name => format!("memory of this process, named {name:?}"),
        }
    }

    fn margin(&self, expire: Duration) -> Duration {
        Duration::from_millis(1).min(expire / 2)
    }

    fn safety_check(&self, _waited: Duration) -> Duration {
        Duration::from_secs(60)
    }

    fn awaited_elsewhere(&self, _key: &Key) -> bool {
        false
    }
}

#[derive(Default)]
struct Watched(Mutex<(bool, Option<Waker>)>);

impl Watched {
    fn change(&self) {
        let waker = {
            let (changed, waker) = &mut *self.0.lock();
            *changed = true;
            waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

struct MemoryWatch {
    inner: Arc<Mutex<Inner>>,
    hash: KeyHash,
    watched: Arc<Watched>,
}

impl Watch for MemoryWatch {
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Change> {
        let (changed, waker) = &mut *self.watched.0.lock();
        if std::mem::take(changed) {
            return Poll::Ready(Change::Look);
        }
        *waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        let mut inner = self.inner.lock();
        if let Some(watches) = inner.watches.get_mut(&self.hash) {
            watches.retain(|watched| !Arc::ptr_eq(watched, &self.watched));
            if watches.is_empty() {
                inner.watches.remove(&self.hash);
            }
        }
    }
}
