//! The embedded store: a table in shared memory, for the processes of one machine.
//!
//! There is no server: all processes that use a store map the same file. Locks need not survive a reboot, since no
//! holder does. So only the fence ceiling is synced, and the file is named after the boot.
//!
//! An operation that need not wait runs on the caller's thread. One that has to wait for a mutex does so on a thread of
//! the runtime's blocking pool.
//!
//! From the bottom up: `mounts`, `place`, `directory`, `machine`; `former`; `table`; `fence`, `row`, `changes`,
//! `watches`, `files`; the store, which is this file.

mod changes;
mod directory;
mod fence;
mod files;
mod former;
mod machine;
mod mounts;
mod place;
mod row;
mod table;
mod watches;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use self::changes::{Done, Woke};
use self::directory::Directory;
use self::files::Files;
use self::machine::Machine;
pub use self::place::{Place, VARIABLE};
use self::table::{Fault, Patience, Table};
use self::watches::Watching;
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

/// Access to the file format, for tests and benches. Not part of the interface.
#[doc(hidden)]
pub mod fuzzing {
    pub use super::directory::Directory;
    pub use super::machine::Machine;
    pub use super::place::Place;
    pub use super::row::{HostIdentity, NewRow, Row};
    pub use super::table::*;
}

/// The stores that this process has open.
static OPEN: PerProcess<Mutex<Vec<Weak<EmbeddedStore>>>> = PerProcess::new();

/// Opens the store of a directory. A process has one store for each directory, even if it is opened several times.
pub fn open(place: Place, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    match EmbeddedStore::open(place, options) {
        Ok(store) => Ok(store),
        Err(error) if error.kind == StoreErrorKind::BadConfig => {
            Err(Error::new(ErrorKind::InvalidArgument, error.message))
        }
        Err(error) => Err(error.into()),
    }
}

/// The files, shared by all users of the store in this process.
struct Shared {
    /// Exchanged when the files were replaced or removed.
    current: RwLock<Arc<Files>>,
    place: Place,
    machine: Machine,
    reopening: Mutex<()>,
    /// Limits how many threads wait for mutexes.
    waiting: Semaphore,
    woken_elsewhere: WokenElsewhere,
}

/// How many threads wait for a store's mutexes at once. If one operation waits, the next one of its shard would wait
/// too.
const WAITING: usize = 8;

impl Shared {
    fn current(&self) -> RwLockReadGuard<'_, Arc<Files>> {
        self.current.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Opens the files that have taken the place of `gone`.
    fn reopen(&self, gone: &Arc<Files>, deadline: Instant) -> Result<(), StoreError> {
        if !gone.is_of_this_process() {
            return Err(StoreError::forked());
        }
        let _reopening = self.reopening.lock();
        if !Arc::ptr_eq(gone, &self.current()) {
            return Ok(());
        }
        let opened = Directory::open(&self.place)
            .and_then(|directory| Files::open(directory, &self.machine, gone.table.fence_ceiling(), deadline));
        let files = opened.map_err(|error| {
            let what = match gone.is_open() {
                true => format!("the files in {} no longer exist, and the store could not be opened again", self.place),
                false => format!(
                    "the program closed file descriptors of nblock, and the files in {} could not be opened again",
                    self.place
                ),
            };
            StoreError::new(error.kind, format!("{what}: {}", error.message))
        })?;
        if files.table.file.identity() == gone.table.file.identity() {
            tracing::warn!(
                "the program closed file descriptors of nblock: the files in {} were opened again",
                self.place
            );
        } else {
            tracing::warn!(
                "the files in {} were removed or replaced, or its path leads elsewhere: the locks in the previous \
                 files are lost",
                self.place
            );
        }
        *self.current.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::new(files);
        gone.watches.close();
        Ok(())
    }

    /// Runs an operation, on a thread that may wait, until it succeeds or fails.
    fn run_until<T>(
        &self,
        deadline: Instant,
        operation: impl Fn(&Files, &mut Patience) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let mut patience = Patience::new(deadline.saturating_duration_since(Instant::now()));
        loop {
            let files = Arc::clone(&self.current());
            match operation(&files, &mut patience).map_err(|fault| files.why(fault)) {
                Ok(value) => return Ok(value),
                Err(Fault::Gone) => self.reopen(&files, deadline)?,
                Err(fault) => return Err(fault.into_error()),
            }
            if Instant::now() >= deadline {
                return Err(StoreError::unreachable(format!(
                    "store busy: the files in {} were replaced repeatedly: do not remove them while programs use the \
                     store",
                    self.place
                )));
            }
        }
    }

    /// Runs `work` on one key, and wakes the waiters of this process afterwards.
    #[inline(always)]
    fn on_key<T>(
        &self,
        files: &Files,
        key: &Key,
        patience: &mut Patience,
        work: impl FnOnce(&Table, &mut Patience) -> Result<Done<T>, Fault>,
    ) -> Result<T, Fault> {
        files.look()?;
        let Done { value, woke } = work(&files.table, patience)?;
        if woke != Woke::Nobody {
            files.watches.tell(key.hash());
            if woke == Woke::Others {
                self.woken_elsewhere.note(key.hash());
            }
        }
        Ok(value)
    }
}

/// Notes for which keys a change of this process has woken waiters of other processes (R11). If two keys share a place,
/// a waiter may wait a millisecond longer.
struct WokenElsewhere([AtomicBool; 256]);

impl Default for WokenElsewhere {
    fn default() -> Self {
        WokenElsewhere([const { AtomicBool::new(false) }; 256])
    }
}

impl WokenElsewhere {
    fn of(&self, hash: KeyHash) -> &AtomicBool {
        &self.0[hash.bits() as usize % self.0.len()]
    }

    fn note(&self, hash: KeyHash) {
        self.of(hash).store(true, Ordering::Relaxed);
    }

    fn take(&self, hash: KeyHash) -> bool {
        let noted = self.of(hash);
        noted.load(Ordering::Relaxed) && noted.swap(false, Ordering::Relaxed)
    }
}

/// The store of a path, if it is open. It stays the same store when the directory is replaced, so that all waiters for
/// a key are in one queue (R11).
fn find(open: &mut Vec<Weak<EmbeddedStore>>, place: &Place, machine: &Machine) -> Option<Arc<EmbeddedStore>> {
    open.retain(|store| store.strong_count() > 0);
    open.iter().filter_map(Weak::upgrade).find(|store| store.shared.place.is(place) && store.shared.machine == *machine)
}

struct EmbeddedStore {
    shared: Arc<Shared>,
    /// In nanoseconds: the longest `op_timeout` of the clients that opened it.
    op_timeout: AtomicU64,
}

impl EmbeddedStore {
    fn open(place: Place, options: &StoreOptions) -> Result<Arc<EmbeddedStore>, StoreError> {
        let machine = Machine::of_this_process()?;
        let op_timeout = options.op_timeout.as_nanos() as u64;
        let deadline = Instant::now() + options.connect_timeout;
        let directory = Directory::open(&place)?;
        let identity = directory.identity;
        let open = OPEN.get_or_init(|_| Mutex::default());
        let found = find(&mut open.lock(), &place, &machine);
        let store = match found {
            Some(store) => store,
            None => {
                // No mutex is held meanwhile: a thread that opens another directory must not wait for this one, and a
                // thread that opens the same directory has its own deadline.
                let files = Files::open(directory, &machine, 0, deadline)?;
                let mut open = open.lock();
                // Another thread may have opened it meanwhile.
                find(&mut open, &place, &machine).unwrap_or_else(|| {
                    let shared = Arc::new(Shared {
                        current: RwLock::new(Arc::new(files)),
                        place,
                        machine,
                        reopening: Mutex::default(),
                        waiting: Semaphore::new(WAITING),
                        woken_elsewhere: WokenElsewhere::default(),
                    });
                    let store = Arc::new(EmbeddedStore { shared, op_timeout: AtomicU64::new(op_timeout) });
                    open.push(Arc::downgrade(&store));
                    store
                })
            }
        };
        store.op_timeout.fetch_max(op_timeout, Ordering::Relaxed);
        let current = Arc::clone(&store.shared.current());
        if current.directory.identity != identity {
            // The store has not noticed yet that its path leads elsewhere.
            store.shared.reopen(&current, deadline)?;
        }
        Ok(store)
    }

    /// Runs an operation on this thread, if it need not wait. `None`: it has to wait for a mutex, or the files must be
    /// opened again.
    #[inline]
    fn at_once<T>(
        &self,
        operation: impl FnOnce(&Shared, &Files, &mut Patience) -> Result<T, Fault>,
    ) -> Option<Answer<T>> {
        let files = self.shared.current();
        match operation(&self.shared, &files, &mut Patience::none()) {
            Ok(value) => Some(Answer::Now(Ok(value))),
            Err(fault) => match files.why(fault) {
                Fault::Busy { .. } | Fault::Gone => None,
                fault => Some(Answer::Now(Err(fault.into_error()))),
            },
        }
    }

    /// Runs an operation: on this thread if it need not wait, and otherwise on a thread that may wait.
    fn run<A, T>(&self, asked: A, operation: fn(&Shared, &Files, &A, &mut Patience) -> Result<T, Fault>) -> Answer<T>
    where
        A: Send + 'static,
        T: Send + 'static,
    {
        match self.at_once(|shared, files, patience| operation(shared, files, &asked, patience)) {
            Some(answer) => answer,
            None => self.later(move |shared, deadline| {
                shared.run_until(deadline, |files, patience| operation(shared, files, &asked, patience))
            }),
        }
    }

    #[cold]
    fn later<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared, Instant) -> Result<T, StoreError> + Send + 'static,
    ) -> Answer<T> {
        let shared = Arc::clone(&self.shared);
        let op_timeout = Duration::from_nanos(self.op_timeout.load(Ordering::Relaxed));
        // The caller gives up after `op_timeout`, and should get the error that names the busy process before that.
        let deadline = Instant::now() + (op_timeout - op_timeout / 16);
        match runtime::handle() {
            Ok(handle) => {
                // Spawned in two steps: `spawn_blocking` may start a thread, which would inherit the caller's signal
                // mask.
                let work = handle.spawn(async move {
                    let _place = shared.waiting.acquire().await;
                    let shared = Arc::clone(&shared);
                    tokio::task::spawn_blocking(move || work(&shared, deadline)).await
                });
                Answer::later(async move {
                    work.await.and_then(|done| done).unwrap_or_else(|error| {
                        Err(StoreError::unknown(format!("a task of the embedded store failed: {error}")))
                    })
                })
            }
            Err(error) => Answer::Now(Err(StoreError::resources(error.message()))),
        }
    }
}

/// Longer batches are applied on another thread, to keep the caller's free.
const BATCH: usize = 256;

#[inline(always)]
fn change(shared: &Shared, files: &Files, key: &Key, change: &Change, patience: &mut Patience) -> Result<Reply, Fault> {
    shared.on_key(files, key, patience, |table, patience| changes::change(table, key, change, patience))
}

impl Store for EmbeddedStore {
    fn change(&self, key: &Key, asked: Change) -> Answer<Reply> {
        match self.at_once(|shared, files, patience| change(shared, files, key, &asked, patience)) {
            Some(answer) => answer,
            None => {
                let (key, asked) = (key.clone(), asked.delayed());
                self.later(move |shared, deadline| {
                    shared.run_until(deadline, |files, patience| change(shared, files, &key, &asked, patience))
                })
            }
        }
    }

    fn change_many(&self, asked: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>> {
        let mut replies = Vec::with_capacity(asked.len());
        if asked.len() <= BATCH {
            let files = self.shared.current();
            for (key, asked) in &asked {
                let changed = change(&self.shared, &files, key, asked, &mut Patience::none());
                match changed.map_err(|fault| files.why(fault)) {
                    Ok(reply) => replies.push(Ok(reply)),
                    Err(Fault::Failed(error)) => replies.push(Err(error)),
                    // The remaining changes have to wait.
                    Err(_) => break,
                }
            }
        }
        if replies.len() == asked.len() {
            return Answer::Now(Ok(replies));
        }
        self.later(move |shared, deadline| {
            for (key, asked) in asked.into_iter().skip(replies.len()) {
                let asked = asked.delayed();
                replies
                    .push(shared.run_until(deadline, |files, patience| change(shared, files, &key, &asked, patience)));
            }
            Ok(replies)
        })
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        self.run(key.clone(), |shared, files, key, patience| {
            shared.on_key(files, key, patience, |table, patience| changes::find(table, key, patience))
        })
    }

    fn list(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page> {
        let from = match from.map(|Cursor(place)| <[u8; 4]>::try_from(&*place)) {
            None => table::Cursor::default(),
            Some(Ok(place)) => table::Cursor::from_bytes(place),
            Some(Err(_)) => return Answer::Now(Err(StoreError::rejected("the list belongs to another store"))),
        };
        self.later(move |shared, deadline| {
            let list = |files: &Files, patience: &mut Patience| {
                files.look()?;
                changes::list(&files.table, filter, from, patience)
            };
            let (records, next) = shared.run_until(deadline, list)?;
            Ok(Page { records, next: next.map(|place| Cursor(Box::new(place.to_bytes()))) })
        })
    }

    fn fence(&self, key: &Key) -> Answer<u64> {
        self.run(key.clone(), |shared, files, key, patience| {
            shared.on_key(files, key, patience, |table, patience| changes::fence(table, key, patience))
        })
    }

    fn watch(&self, key: &Key) -> Box<dyn Watch> {
        Box::new(EmbeddedWatch {
            watching: self.shared.current().watches.watch(key.hash()),
            shared: Arc::downgrade(&self.shared),
            key: key.clone(),
        })
    }

    fn prepare(&self) -> Answer<Readiness> {
        Answer::Now(Ok(Readiness::Ready))
    }

    fn ping(&self) -> Answer<Pong> {
        self.run((), |_, files, (), _| {
            files.look()?;
            let server = format!("a table in shared memory, format {}", table::FORMAT);
            Ok(Pong { server, skew_ms: None, caveats: Vec::new() })
        })
    }

    fn location(&self) -> String {
        self.shared.place.to_string()
    }

    fn margin(&self, expire: Duration) -> Duration {
        Duration::from_millis(1).min(expire / 2)
    }

    /// For all waiters, the listening thread checks once a second whether a releaser was killed between its change and
    /// its wake-up. The check here is only for what that thread cannot see, and costs more, so it becomes less
    /// frequent.
    fn safety_check(&self, waited: Duration) -> Duration {
        let often = Duration::from_secs(1);
        match self.shared.current().watches.listens() {
            true => waited.clamp(often, Duration::from_secs(16)),
            false => often,
        }
    }

    fn awaited_elsewhere(&self, key: &Key) -> bool {
        self.shared.woken_elsewhere.take(key.hash())
    }
}

struct EmbeddedWatch {
    watching: Watching,
    shared: Weak<Shared>,
    key: Key,
}

impl Watch for EmbeddedWatch {
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice> {
        if self.watching.is_closed()
            && let Some(shared) = self.shared.upgrade()
        {
            // The files were replaced: watch the new ones.
            self.watching = shared.current().watches.watch(self.key.hash());
            return Poll::Ready(Notice::Look);
        }
        self.watching.poll(context).map(|()| Notice::Look)
    }
}
