//! The memory store: records in this process, for tests of programs that use the library.
//!
//! Each `memory:` is a separate store; `memory:NAME` is shared within the process by name. A forked child has empty
//! stores.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::clock::Boottime;
use crate::error::Error;
use crate::key::{Key, KeyHash};
use crate::protocol::{Change, Effect, Reply, State, StoreTime, Write, apply};
use crate::record::{Identity, Lease, Record, wall_millis_at};
use crate::store::{Answer, Cursor, Filter, Notice, Page, Pong, Readiness, Store, StoreError, Watch};
use crate::sys::mutex::Mutex;
use crate::sys::process::PerProcess;
use crate::url::Url;

static NAMED: PerProcess<Mutex<HashMap<String, Weak<MemoryStore>>>> = PerProcess::new();

/// How the location of each of these stores begins.
pub const LOCATION: &str = "memory of this process";

pub fn open(url: &Url) -> Result<Arc<dyn Store>, Error> {
    url.only_options(&[])?;
    if !url.hosts.is_empty() {
        return Err(Error::invalid_argument(
            "store URL must have no host, user or password after memory: (write memory: \
             or memory:NAME)",
        ));
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

/// Runs a request as if it had arrived earlier: the store's clock shows `arrival` (R3). For tests of a server that was
/// busy between the arrival of a request and its execution. Only the memory store reads this clock.
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

/// The store's clock for the current request, which was sent at `sent`, if that is known.
fn now(sent: Option<Boottime>) -> StoreTime {
    ARRIVAL.get().or(sent).unwrap_or_else(Boottime::now).into()
}

#[derive(Default)]
struct MemoryStore {
    name: String,
    records: Arc<Mutex<Records>>,
}

#[derive(Default)]
struct Records {
    rows: BTreeMap<KeyHash, Row>,
    watches: HashMap<KeyHash, Vec<Arc<Watched>>>,
    /// Wakers to be called after the mutex is released: they run code of the program.
    woken: Vec<Waker>,
}

/// The last fence of all memory stores. They share it, so that a named store that is opened again continues above its
/// former fences.
static LAST_FENCE: AtomicU64 = AtomicU64::new(0);

fn next_fence() -> u64 {
    LAST_FENCE.fetch_add(1, Ordering::Relaxed) + 1
}

struct Row {
    key: Key,
    state: State,
    fence: u64,
    identity: Arc<Identity>,
    acquired_at: StoreTime,
}

impl Row {
    fn record(&self, now: StoreTime) -> Record {
        let lease = Lease::at(self.state.ends_at, now);
        Record {
            key: self.key.clone(),
            damaged: None,
            lease,
            expires_at_ms: lease.wall_millis(),
            owner: Some(self.identity.owner_since(wall_millis_at(self.acquired_at, now))),
            fence: Some(self.fence),
            state: self.state.clone(),
        }
    }
}

impl Records {
    fn wake(&mut self, hash: KeyHash) {
        self.woken.extend(self.watches.get(&hash).into_iter().flatten().filter_map(|watched| watched.change()));
    }

    fn change(&mut self, key: &Key, change: &Change) -> Reply {
        let (now, hash) = (now(change.sent), key.hash());
        let present = self.rows.get_mut(&hash);
        match apply(present.as_deref().map(|row| &row.state), now, change.not_after.map(StoreTime::from), change) {
            Effect::TooLate => Reply::TooLate,
            Effect::Refused => Reply::Found(present.map(|row| Box::new(row.record(now)))),
            Effect::Remove => {
                self.rows.remove(&hash);
                self.wake(hash);
                Reply::Applied { fence: None }
            }
            Effect::Update(state) => {
                let Some(row) = present else { return Reply::Found(None) };
                let sooner = state.ends_at < row.state.ends_at;
                row.state = state;
                let fence = Some(row.fence);
                if sooner {
                    self.wake(hash);
                }
                Reply::Applied { fence }
            }
            Effect::Put(state) => {
                let Write::Put(new) = &change.write else { return Reply::Found(None) };
                let identity = Arc::clone(&new.identity);
                let row = Row { key: key.clone(), state, fence: next_fence(), identity, acquired_at: now };
                let fence = Some(row.fence);
                self.rows.insert(hash, row);
                Reply::Applied { fence }
            }
        }
    }
}

/// The number of records that a page looks at, with the mutex held.
const PAGE: usize = 1024;

impl MemoryStore {
    fn with<T>(&self, operation: impl FnOnce(&mut Records) -> T) -> Answer<T> {
        let mut records = self.records.lock();
        let result = operation(&mut records);
        let woken = std::mem::take(&mut records.woken);
        drop(records);
        woken.into_iter().for_each(Waker::wake);
        Answer::Now(Ok(result))
    }
}

impl Store for MemoryStore {
    fn change(&self, key: &Key, change: Change) -> Answer<Reply> {
        self.with(|records| records.change(key, &change))
    }

    fn change_many(&self, changes: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>> {
        self.with(|records| changes.iter().map(|(key, change)| Ok(records.change(key, change))).collect())
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        let now = now(None);
        self.with(|records| records.rows.get(&key.hash()).map(|row| row.record(now)))
    }

    fn list(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page> {
        let now = now(None);
        let after = match from.map(|Cursor(hash)| <[u8; 20]>::try_from(&*hash)) {
            None => Bound::Unbounded,
            Some(Ok(hash)) => Bound::Excluded(KeyHash(hash)),
            Some(Err(_)) => return Answer::Now(Err(StoreError::rejected("the list belongs to another store"))),
        };
        self.with(|records| {
            let mut rows = records.rows.range((after, Bound::Unbounded));
            let mut page = Page::default();
            let mut last = None;
            for (hash, row) in rows.by_ref().take(PAGE) {
                last = Some(*hash);
                if filter == Filter::All || row.state.is_over(now) {
                    page.records.push(row.record(now));
                }
            }
            page.next = last.filter(|_| rows.next().is_some()).map(|hash| Cursor(Box::new(hash.0)));
            page
        })
    }

    fn fence(&self, _key: &Key) -> Answer<u64> {
        self.with(|_| next_fence())
    }

    fn watch(&self, key: &Key) -> Box<dyn Watch> {
        let watched = Arc::new(Watched::default());
        self.records.lock().watches.entry(key.hash()).or_default().push(Arc::clone(&watched));
        Box::new(MemoryWatch { records: Arc::clone(&self.records), hash: key.hash(), watched })
    }

    fn prepare(&self) -> Answer<Readiness> {
        Answer::Now(Ok(Readiness::Ready))
    }

    fn ping(&self) -> Answer<Pong> {
        let server = "memory, in this process".to_string();
        self.with(|_| Pong { server, skew_ms: None, caveats: Vec::new() })
    }

    fn location(&self) -> String {
        match self.name.as_str() {
            "" => LOCATION.to_string(),
            name => format!("{LOCATION}, named {name:?}"),
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
    /// Notes a change. Returns the waker to be called, if there is one.
    fn change(&self) -> Option<Waker> {
        let (changed, waker) = &mut *self.0.lock();
        *changed = true;
        waker.take()
    }
}

struct MemoryWatch {
    records: Arc<Mutex<Records>>,
    hash: KeyHash,
    watched: Arc<Watched>,
}

impl Watch for MemoryWatch {
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice> {
        let (changed, waker) = &mut *self.watched.0.lock();
        if std::mem::take(changed) {
            return Poll::Ready(Notice::Look);
        }
        *waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        let mut records = self.records.lock();
        if let Some(watches) = records.watches.get_mut(&self.hash) {
            watches.retain(|watched| !Arc::ptr_eq(watched, &self.watched));
            if watches.is_empty() {
                records.watches.remove(&self.hash);
            }
        }
    }
}
