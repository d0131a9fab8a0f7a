//! A client: an open store plus default options.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{self, AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use tokio::sync::Notify;

use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::mutex::Mutex;
use crate::options::{ClientOptions, LockOptions};
use crate::process::{self, PerProcess};
use crate::queue::Queue;
use crate::record::Record;
use crate::refresh::Keeper;
use crate::runtime;
use crate::store::{Answer, Broken, Filter, Identity, Pong, Store, StoreError, StoreErrorKind, StoreOptions};
use crate::stores;
use crate::token::HoldId;
use crate::url::Url;
use crate::{key::Key, lock::Lock};

/// An open store plus default options. Cloning gives another handle of the same client.
///
/// In a forked child it opens the store anew on first use (R16).
#[derive(Clone)]
pub struct Client(Arc<Inner>);

pub(crate) struct Inner {
    /// Where the store is opened anew in a forked child; `None` where it was given open.
    url: Option<Url>,
    options: ClientOptions,
    closed: AtomicBool,
    live: PerProcess<Live>,
}

/// What a client has in one process.
struct Live {
    open: Arc<OpenStore>,
    identity: Arc<Identity>,
    closing: Notify,
    background: Arc<Background>,
}

/// A store that this process has open, with what its clients share: the queue and the renewals.
pub(crate) struct OpenStore {
    pub store: Arc<dyn Store>,
    pub queue: Arc<Queue>,
    pub keeper: Arc<Keeper>,
    /// Whether other machines use it.
    shared_by_machines: bool,
    generation: u64,
}

/// Requests under way, and releases and clean-ups that go on after their caller was answered.
#[derive(Default)]
pub(crate) struct Background {
    running: AtomicUsize,
    done: Notify,
}

/// One of them, until it is dropped.
pub(crate) struct Running(Arc<Background>);

impl Background {
    fn begin(self: &Arc<Self>) -> Running {
        self.running.fetch_add(1, Ordering::SeqCst);
        Running(Arc::clone(self))
    }

    fn is_idle(&self) -> bool {
        self.running.load(Ordering::SeqCst) == 0
    }

    async fn idle(&self) {
        loop {
            let done = self.done.notified();
            if self.is_idle() {
                return;
            }
            done.await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.done.notify_waiters();
        }
    }
}

/// Work that whoever waits for it drives, and that goes on in the background when he waits no more.
///
/// So an answer that comes in time wakes one thread, and not two.
pub(crate) struct CarriedOn<T: Send + 'static> {
    client: Client,
    /// `None` when it has ended.
    work: Option<Pin<Box<dyn Future<Output = T> + Send>>>,
    running: Option<Running>,
    generation: u64,
}

impl<T: Send + 'static> Future for CarriedOn<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let work = self.work.as_mut().expect("it is not polled after its end");
        let output = ready!(work.as_mut().poll(context));
        (self.work, self.running) = (None, None);
        Poll::Ready(output)
    }
}

impl<T: Send + 'static> Drop for CarriedOn<T> {
    fn drop(&mut self) {
        let Some(work) = self.work.take() else { return };
        if self.generation != process::generation() {
            // The parent process's, to be carried on there.
            return std::mem::forget((work, self.running.take()));
        }
        self.client.spawn(async move {
            work.await;
        });
    }
}

impl Live {
    fn new(store: Arc<dyn Store>, shared_by_machines: bool, options: &ClientOptions) -> Live {
        Live {
            open: OpenStore::of(store, shared_by_machines),
            identity: Arc::new(Identity::of_this_process(&options.app)),
            closing: Notify::new(),
            background: Arc::default(),
        }
    }
}

static OPEN_STORES: PerProcess<Mutex<HashMap<usize, Weak<OpenStore>>>> = PerProcess::new();

impl OpenStore {
    /// The one that goes with this store: a store opened twice has one queue.
    fn of(store: Arc<dyn Store>, shared_by_machines: bool) -> Arc<OpenStore> {
        let mut open_stores = OPEN_STORES.get_or_init(|_| Mutex::default()).lock();
        open_stores.retain(|_, open| open.strong_count() > 0);
        let address = Arc::as_ptr(&store).cast::<()>() as usize;
        if let Some(open) = open_stores.get(&address).and_then(Weak::upgrade) {
            return open;
        }
        let keeper = Arc::new(Keeper::new(Arc::clone(&store)));
        let open = Arc::new(OpenStore {
            queue: Arc::default(),
            keeper,
            store,
            shared_by_machines,
            generation: process::generation(),
        });
        open_stores.insert(address, Arc::downgrade(&open));
        open
    }

    /// Whether it is of the same process as something else. Where a signal's handler forks between two looks, one
    /// may be the parent's and the other this process's: then nothing is to be done.
    pub fn is_of(&self, generation: u64) -> bool {
        self.generation == generation
    }

    /// Whether this process opened it, and not the one that it was forked from.
    pub fn is_of_this_process(&self) -> bool {
        self.generation == process::generation()
    }

    /// A name for one more hold.
    pub fn name_hold(&self) -> HoldId {
        if self.shared_by_machines { HoldId::drawn_now() } else { HoldId::random() }
    }
}

impl Drop for OpenStore {
    fn drop(&mut self) {
        self.keeper.stop();
    }
}

impl Client {
    /// Opens a store and asks it for a sign of life, within `connect_timeout`. May wait.
    pub fn open(url: Option<&str>, options: ClientOptions) -> Answer<Client, Error> {
        let opened = (|| {
            options.check()?;
            process::check()?;
            let (url, why) = crate::stores::url_to_use(url)?;
            tracing::info!("the store is {url:?}: {why}");
            let client = Client::new(Some(url), options);
            client.live()?;
            Ok(client)
        })();
        let client: Client = match opened {
            Ok(client) => client,
            Err(error) => return Answer::Now(Err(error)),
        };
        let limit = Boottime::now() + client.options().connect_timeout;
        match client.ping() {
            Answer::Now(pong) => Answer::Now(pong.map(|_| client)),
            Answer::Later(pong) => Answer::later(async move {
                let mut pong = pong;
                match runtime::until(limit, &mut pong).await {
                    Some(pong) => pong.map(|_| client),
                    None => Err(Error::new(
                        ErrorKind::Unreachable,
                        format!("no answer from {} within {:?}", client.location()?, client.options().connect_timeout),
                    )),
                }
            }),
        }
    }

    /// A client over a store that is open already: one of the program's own, or one that stands between
    /// a lock and another store. A forked child cannot open it anew, and is told so. Does not wait.
    pub fn over(store: Arc<dyn Store>, options: ClientOptions) -> Result<Client, Error> {
        options.check()?;
        process::check()?;
        let client = Client::new(None, options);
        client.0.live.get_or_init(|_| Live::new(store, true, &client.0.options));
        Ok(client)
    }

    fn new(url: Option<Url>, options: ClientOptions) -> Client {
        Client(Arc::new(Inner { url, options, closed: AtomicBool::new(false), live: PerProcess::new() }))
    }

    pub fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    /// A lock for `key` on this client's store. Does not wait.
    pub fn lock(&self, key: Key, defaults: LockOptions) -> Result<Lock, Error> {
        defaults.check()?;
        self.check_open()?;
        Ok(Lock::new(self.clone(), key, None, defaults))
    }

    /// A reentrant lock for `key`: whoever presents `owner` may lock again. Does not wait.
    pub fn reentrant_lock(&self, key: Key, owner: Option<&str>, defaults: LockOptions) -> Result<Lock, Error> {
        defaults.check()?;
        self.check_open()?;
        Ok(Lock::new(self.clone(), key, Some(crate::lock::owner(owner)?), defaults))
    }

    /// The record of a key. May wait, `op_timeout` at most.
    pub fn find(&self, key: &Key) -> Answer<Option<Record>, Error> {
        self.ask(|store| store.find(key))
    }

    /// All records, or those whose lease is over. May wait, `op_timeout` at most.
    pub fn list(&self, filter: Filter) -> Answer<Vec<Record>, Error> {
        self.ask(|store| store.list(filter))
    }

    /// Deletes a record that still is as it was seen. May wait, `op_timeout` at most.
    pub fn break_seen(&self, record: &Record) -> Answer<Broken, Error> {
        self.ask(|store| store.break_seen(record))
    }

    /// Asks the store for a sign of life. May wait, `op_timeout` at most.
    pub fn ping(&self) -> Answer<Pong, Error> {
        self.ask(|store| store.ping())
    }

    /// Where the store is, for people.
    pub fn location(&self) -> Result<String, Error> {
        Ok(self.live()?.open.store.location())
    }

    fn ask<T: Send + 'static>(&self, request: impl FnOnce(&dyn Store) -> Answer<T>) -> Answer<T, Error> {
        let open = match self.check_open().and_then(|()| self.open_store()) {
            Ok(open) => open,
            Err(error) => return Answer::Now(Err(error)),
        };
        match request(&*open.store) {
            Answer::Now(result) => Answer::Now(result.map_err(Error::from)),
            Answer::Later(mut answer) => {
                let (open, op_timeout) = (Arc::clone(open), self.options().op_timeout);
                let limit = Boottime::now() + op_timeout;
                Answer::later(async move {
                    match runtime::until(limit, &mut answer).await {
                        Some(result) => result.map_err(Error::from),
                        None => Err(unanswered(&*open.store, op_timeout)),
                    }
                })
            }
        }
    }

    /// Closes the client: waits of its locks end as cancelled, auto-refreshed holds are released,
    /// plain leases run out (R15), and calls under way and background work are waited for, until `limit`:
    /// what is granted meanwhile is given back. A future of its locks that nobody drives counts as well.
    ///
    /// Closing again is no error.
    pub fn close(&self, limit: Boottime) -> Answer<(), Error> {
        // In one order with what begins just now: either it finds the client closed, or it is waited for.
        self.0.closed.store(true, Ordering::SeqCst);
        atomic::fence(Ordering::SeqCst);
        let Some(live) = self.0.live.current() else { return Answer::Now(Ok(())) };
        live.closing.notify_waiters();
        for lock in live.open.keeper.renewed_for(self) {
            lock.give_back_at_close();
        }
        let background = Arc::clone(&live.background);
        if background.is_idle() {
            return Answer::Now(Ok(()));
        }
        Answer::later(async move {
            match runtime::until(limit, &mut std::pin::pin!(background.idle())).await {
                Some(()) => Ok(()),
                None => Err(Error::new(
                    ErrorKind::Indeterminate,
                    "the client is closed, but the store has not yet answered every release: what it \
                     did not get runs out with its lease",
                )),
            }
        })
    }

    /// Gives the client up without closing it: waits end, and every hold is abandoned (R15). Does not
    /// wait.
    pub fn abandon(&self) {
        if self.0.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(live) = self.0.live.current() else { return };
        live.closing.notify_waiters();
        for lock in live.open.keeper.renewed_for(self) {
            lock.abandon("its client");
        }
    }

    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    pub(crate) fn check_open(&self) -> Result<(), Error> {
        if self.is_closed() { Err(Error::invalid_op("the client is closed")) } else { Ok(()) }
    }

    fn live(&self) -> Result<&Live, Error> {
        self.0.live.get_or_try_init(|_| {
            let options = &self.0.options;
            let store_options =
                StoreOptions { op_timeout: options.op_timeout, connect_timeout: options.connect_timeout };
            let url = self.0.url.as_ref().ok_or_else(|| {
                Error::new(
                    ErrorKind::Forked,
                    "the client's store was opened by the process that this one was forked from",
                )
            })?;
            Ok(Live::new(stores::open(url, &store_options)?, stores::is_shared_by_machines(url), options))
        })
    }

    pub(crate) fn open_store(&self) -> Result<&Arc<OpenStore>, Error> {
        Ok(&self.live()?.open)
    }

    /// Runs something that nobody waits for, but this client's close.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        match runtime::handle().and_then(|handle| Ok((handle, self.live()?))) {
            Ok((handle, live)) => {
                let (running, open) = (live.background.begin(), Arc::clone(&live.open));
                handle.spawn(async move {
                    work.await;
                    drop((running, open));
                });
            }
            Err(error) => tracing::warn!("background work was given up, a lease runs out instead: {error}"),
        }
    }

    /// Begins what the client's close waits for, unless it is closed.
    pub(crate) fn begin(&self) -> Result<Running, Error> {
        let running = self.live()?.background.begin();
        self.check_open()?;
        Ok(running)
    }

    /// Work that goes on in the background where whoever asked for it does not wait for its end.
    pub(crate) fn carry_on<T: Send>(&self, work: impl Future<Output = T> + Send + 'static) -> CarriedOn<T> {
        CarriedOn {
            client: self.clone(),
            work: Some(Box::pin(work)),
            running: self.live().ok().map(|live| live.background.begin()),
            generation: process::generation(),
        }
    }

    pub(crate) fn identity(&self) -> Result<&Arc<Identity>, Error> {
        Ok(&self.live()?.identity)
    }

    /// Waits until the client is closed.
    pub(crate) async fn closing(&self) {
        let Ok(live) = self.live() else { return };
        let closing = live.closing.notified();
        if !self.is_closed() {
            closing.await;
        }
    }

    pub(crate) fn is(&self, other: &Client) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

pub(crate) fn unanswered(store: &dyn Store, waited: std::time::Duration) -> Error {
    Error::new(ErrorKind::Indeterminate, format!("no answer from {} within {waited:?}", store.location()))
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        let kind = match error.kind {
            StoreErrorKind::Unreachable => ErrorKind::Unreachable,
            StoreErrorKind::Unknown => ErrorKind::Indeterminate,
            StoreErrorKind::Denied => ErrorKind::Denied,
            StoreErrorKind::Rejected | StoreErrorKind::BadConfig => ErrorKind::Store,
            StoreErrorKind::Resources => ErrorKind::Resources,
            StoreErrorKind::Forked => ErrorKind::Forked,
        };
        Error::new(kind, error.message)
    }
}

impl Identity {
    /// The host, process and boot that are asking, and the program's name where `app` is empty.
    fn of_this_process(app: &str) -> Identity {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_string();
        let app = match app {
            "" => read("/proc/self/comm"),
            app => app.to_string(),
        };
        Identity {
            host: read("/proc/sys/kernel/hostname"),
            pid: std::process::id(),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            app,
        }
    }
}
