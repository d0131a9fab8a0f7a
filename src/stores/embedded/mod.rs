//! The embedded store: LMDB, shared by the processes of one machine.
//!
//! No server: whoever opens the store works on the same two files (the data, and a small control file)
//! in one directory. Locks need not survive a reboot, since no holder does, so nothing is synced but the
//! fences' ceiling, and the files are named by the boot.
//!
//! What waits, waits on a thread of the runtime's blocking pool: an operation whose turn comes at once
//! is done on the caller's thread.

mod control;
mod database;
mod directory;
mod environment;
mod fence;
mod leftovers;
mod mounts;
mod mutex;
mod opener;
mod place;
mod reservation;
mod row;
mod rules;
mod run;
mod section;
mod space;
mod surroundings;
mod wake;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use self::database::Fault;
use self::directory::Directory;
use self::environment::{Environment, Stop};
pub use self::place::{Place, VARIABLE};
use self::rules::Scope;
use self::surroundings::Surroundings;
use self::wake::Registration;
use crate::error::{Error, ErrorKind};
use crate::key::{Key, KeyHash};
use crate::protocol::{Change, Reply};
use crate::record::Record;
use crate::store::{
    Answer, Cursor, Filter, Notice, Page, Pong, Readiness, Store, StoreError, StoreErrorKind, StoreOptions, Watch,
};
use crate::sys::mutex::Mutex;
use crate::sys::process::PerProcess;
use crate::sys::runtime;

/// What reads the files, for tests and fuzzers of it: no part of the interface.
#[doc(hidden)]
pub mod foreign {
    pub use super::control::{Control, Unfit};
    pub use super::row::{Home, NewRow, Row};
    pub use super::surroundings::Surroundings;
}

/// How many changes one transaction makes, and of how many bytes: others wait meanwhile.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 1 << 20;

/// The stores that this process has open.
static OPEN: PerProcess<Mutex<Vec<Weak<EmbeddedStore>>>> = PerProcess::new();

/// Opens the store of a directory. Within a process it is one store, however often it is opened.
pub fn open(place: Place, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    match mutex::where_they_may_be_owned(|| EmbeddedStore::open(place, options)) {
        Ok(store) => Ok(store),
        Err(error) if error.kind == StoreErrorKind::BadConfig => {
            Err(Error::new(ErrorKind::InvalidArgument, error.message))
        }
        Err(error) => Err(error.into()),
    }
}

/// The files, for all who use them in this process.
struct Shared {
    /// Replaced when somebody replaces the files.
    current: RwLock<Arc<Environment>>,
    place: Place,
    surroundings: Surroundings,
    reopening: Mutex<()>,
    /// For those that wait for the mutex on a thread.
    waiting: Semaphore,
}

/// How many threads wait for a store's mutex at once: where one operation waits, so would the next.
const WAITING: usize = 2;

impl Shared {
    fn current(&self) -> RwLockReadGuard<'_, Arc<Environment>> {
        self.current.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Opens the files that have taken the place of those that are gone.
    fn reopen(&self, gone: &Arc<Environment>, deadline: Instant) -> Result<(), StoreError> {
        if !gone.is_of_this_process() {
            return Err(StoreError::forked());
        }
        let _reopening = self.reopening.lock();
        if !Arc::ptr_eq(gone, &self.current()) {
            return Ok(());
        }
        let opened = Directory::open(&self.place).and_then(|directory| {
            opener::open(Arc::new(directory), &self.surroundings, gone.fence_ceiling(), deadline)
        });
        let environment = opened.map_err(|error| {
            let what = match gone.is_open() {
                true => format!("the files in {} are not there any more, and nothing else could be opened", self.place),
                false => format!(
                    "the program has closed descriptors of the library's, and the files in {} could not be opened anew",
                    self.place
                ),
            };
            StoreError::new(error.kind, format!("{what}: {}", error.message))
        })?;
        if environment.identity() == gone.identity() {
            tracing::warn!(
                "the program closed descriptors of the library's: the files in {} were opened anew",
                self.place
            );
        } else {
            tracing::warn!(
                "the files in {} were removed or replaced, or its path leads elsewhere: the locks in the former files \
                 are lost",
                self.place
            );
        }
        *self.current.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::new(environment);
        gone.close();
        Ok(())
    }

    /// Runs an operation to its end, on a thread that may wait.
    fn run_until<T>(
        &self,
        deadline: Instant,
        operation: impl Fn(&mut Scope) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        loop {
            let environment = Arc::clone(&self.current());
            let stop = match environment.run_until(deadline, &operation) {
                Err(Stop::FencesSpent) => environment.reserve_fences(deadline),
                Err(stop) => Err(stop),
                Ok((value, calls)) => {
                    calls.make();
                    return Ok(value);
                }
            };
            match stop {
                Ok(()) | Err(Stop::Busy | Stop::FencesSpent) => {}
                Err(Stop::Gone) => self.reopen(&environment, deadline)?,
                Err(Stop::Failed(error)) => return Err(error),
            }
            if Instant::now() >= deadline {
                return Err(StoreError::unreachable(format!(
                    "store busy: the files in {} were replaced again and again",
                    self.place
                )));
            }
        }
    }
}

/// The store of a path, if it is open. There is one only, which goes with its path when the directory
/// is replaced: all who wait for a key of it stand in one line (R11).
fn find(open: &mut Vec<Weak<EmbeddedStore>>, place: &Place, surroundings: &Surroundings) -> Option<Arc<EmbeddedStore>> {
    open.retain(|store| store.strong_count() > 0);
    open.iter()
        .filter_map(Weak::upgrade)
        .find(|store| store.shared.place.is(place) && store.shared.surroundings == *surroundings)
}

struct EmbeddedStore {
    shared: Arc<Shared>,
    /// In nanoseconds: the longest that anybody who opened it wants to wait.
    op_timeout: AtomicU64,
}

impl EmbeddedStore {
    fn open(place: Place, options: &StoreOptions) -> Result<Arc<EmbeddedStore>, StoreError> {
        let surroundings = Surroundings::of_this_process()?;
        let op_timeout = options.op_timeout.as_nanos() as u64;
        let deadline = Instant::now() + options.connect_timeout;
        let directory = Directory::open(&place)?;
        let identity = directory.identity;
        let open = OPEN.get_or_init(|_| Mutex::default());
        let found = find(&mut open.lock(), &place, &surroundings);
        let store = match found {
            Some(store) => store,
            None => {
                // Nothing is locked in this process meanwhile: who opens another directory must not wait
                // for this one, and who opens the same has another deadline.
                let environment = opener::open(Arc::new(directory), &surroundings, 0, deadline)?;
                let mut open = open.lock();
                // Another thread may have been faster.
                find(&mut open, &place, &surroundings).unwrap_or_else(|| {
                    let shared = Arc::new(Shared {
                        current: RwLock::new(Arc::new(environment)),
                        place,
                        surroundings,
                        reopening: Mutex::default(),
                        waiting: Semaphore::new(WAITING),
                    });
                    let store = Arc::new(EmbeddedStore { shared, op_timeout: AtomicU64::new(op_timeout) });
                    open.push(Arc::downgrade(&store));
                    store
                })
            }
        };
        store.op_timeout.fetch_max(op_timeout, Ordering::Relaxed);
        let current = Arc::clone(&store.shared.current());
        if current.directory().identity != identity {
            // The store has not noticed yet that its path leads elsewhere.
            store.shared.reopen(&current, deadline)?;
        }
        Ok(store)
    }

    /// Runs an operation: here and now if its turn is now, else on a thread that may wait.
    #[inline]
    fn run<A, T>(&self, asked: A, operation: fn(&mut Scope, &A) -> Result<T, Fault>) -> Answer<T>
    where
        A: Send + 'static,
        T: Send + 'static,
    {
        let done = self.shared.current().try_run(|scope| operation(scope, &asked));
        match done {
            Ok((value, calls)) => {
                calls.make();
                return Answer::Now(Ok(value));
            }
            Err(Stop::Failed(error)) => return Answer::Now(Err(error)),
            Err(Stop::Busy | Stop::Gone | Stop::FencesSpent) => {}
        }
        self.later(move |shared, deadline| shared.run_until(deadline, |scope| operation(scope, &asked)))
    }

    #[cold]
    fn later<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared, Instant) -> Result<T, StoreError> + Send + 'static,
    ) -> Answer<T> {
        let shared = Arc::clone(&self.shared);
        let op_timeout = Duration::from_nanos(self.op_timeout.load(Ordering::Relaxed));
        // Who asks stops listening after the whole of it, and should hear before that who is busy.
        let deadline = Instant::now() + (op_timeout - op_timeout / 16);
        match runtime::handle() {
            Ok(handle) => {
                // It may start a thread, which would take signals if the caller does.
                let work = handle.spawn(async move {
                    let _place = shared.waiting.acquire().await;
                    let shared = Arc::clone(&shared);
                    tokio::task::spawn_blocking(move || work(&shared, deadline)).await
                });
                Answer::later(async move {
                    work.await.and_then(|done| done).unwrap_or_else(|error| {
                        Err(StoreError::unknown(format!("an operation of the embedded store ended halfway: {error}")))
                    })
                })
            }
            Err(error) => Answer::Now(Err(StoreError::resources(error.message()))),
        }
    }
}

/// Applies a batch, transaction by transaction. What went wrong is said for each change.
fn change_all(shared: &Shared, deadline: Instant, batch: &[(Key, Change)]) -> Vec<Result<Reply, StoreError>> {
    let mut results = Vec::with_capacity(batch.len());
    while results.len() < batch.len() {
        let rest = &batch[results.len()..];
        match shared.run_until(deadline, |scope| change_some(scope, rest)) {
            Ok(mut some) => results.append(&mut some),
            Err(error) => results.resize(batch.len(), Err(error)),
        }
    }
    results
}

/// Applies as many changes as one transaction should.
fn change_some(scope: &mut Scope, batch: &[(Key, Change)]) -> Result<Vec<Result<Reply, StoreError>>, Fault> {
    let mut results = Vec::with_capacity(batch.len().min(BATCH));
    let mut bytes = 0;
    for (key, change) in batch.iter().take(BATCH) {
        results.push(match rules::change(scope, key, change) {
            Ok(reply) => Ok(reply),
            Err(Fault::Failed(error)) => Err(error),
            Err(fault) => return Err(fault),
        });
        bytes += key.as_str().len();
        if bytes >= BATCH_BYTES {
            break;
        }
    }
    Ok(results)
}

impl Store for EmbeddedStore {
    fn change(&self, key: &Key, change: Change) -> Answer<Reply> {
        self.run((key.clone(), change), |scope, (key, change)| rules::change(scope, key, change))
    }

    fn change_many(&self, changes: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>> {
        if changes.len() > BATCH || changes.iter().map(|(key, _)| key.as_str().len()).sum::<usize>() >= BATCH_BYTES {
            // The caller has other things to do meanwhile.
            return self.later(move |shared, deadline| Ok(change_all(shared, deadline, &changes)));
        }
        self.run(changes, |scope, changes| change_some(scope, changes))
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        self.run(key.clone(), rules::find)
    }

    fn list(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page> {
        let after = match from.map(|Cursor(hash)| <[u8; 20]>::try_from(&*hash)) {
            None => None,
            Some(Ok(hash)) => Some(KeyHash(hash)),
            Some(Err(_)) => return Answer::Now(Err(StoreError::rejected("the list is another store's"))),
        };
        self.later(move |shared, deadline| {
            let page = shared.run_until(deadline, |scope| rules::list(scope, filter, after))?;
            Ok(Page { records: page.records, next: page.next.map(|hash| Cursor(Box::new(hash.0))) })
        })
    }

    fn fence(&self, _key: &Key) -> Answer<u64> {
        self.run((), |scope, ()| rules::fence(scope))
    }

    fn watch(&self, key: &Key) -> Box<dyn Watch> {
        Box::new(EmbeddedWatch {
            registration: self.shared.current().watches().watch(key.hash()),
            shared: Arc::downgrade(&self.shared),
            key: key.clone(),
        })
    }

    fn prepare(&self) -> Answer<Readiness> {
        self.ping().map(|_| Readiness::Ready)
    }

    fn ping(&self) -> Answer<Pong> {
        self.run((), |_, ()| Ok(Pong { server: database::version().to_string(), skew_ms: None, caveats: Vec::new() }))
    }

    fn location(&self) -> String {
        self.shared.place.to_string()
    }

    fn margin(&self, expire: Duration) -> Duration {
        Duration::from_millis(1).min(expire / 2)
    }

    /// The thread that listens looks once a second, for all that wait, whether a releaser was killed between its
    /// commit and its call. What is left is files that somebody removed: since an attempt costs more, it becomes rarer.
    fn safety_check(&self, waited: Duration) -> Duration {
        let often = Duration::from_secs(1);
        match self.shared.current().watches().listens() {
            true => waited.clamp(often, Duration::from_secs(16)),
            false => often,
        }
    }

    fn awaited_elsewhere(&self, key: &Key) -> bool {
        self.shared.current().watches().awaited_elsewhere(key.hash())
    }
}

struct EmbeddedWatch {
    registration: Registration,
    shared: Weak<Shared>,
    key: Key,
}

impl Watch for EmbeddedWatch {
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice> {
        if self.registration.is_closed()
            && let Some(shared) = self.shared.upgrade()
        {
            // Other files: who waits must look there.
            self.registration = shared.current().watches().watch(self.key.hash());
            return Poll::Ready(Notice::Look);
        }
        self.registration.poll(context).map(|()| Notice::Look)
    }
}
