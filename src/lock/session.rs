//! What the locks of one client share: the open store, the client's options, and the operations in progress.
//!
//! A forked child opens the store again on first use (R16).

use std::borrow::Borrow;
use std::collections::HashMap;
use std::future::Future;
use std::ops::Deref;
use std::pin::{Pin, pin};
use std::sync::atomic::{self, AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::Notify;

use super::queue::Queue;
use super::schedule::Schedule;
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::options::ClientOptions;
use crate::record::Identity;
use crate::store::{Answer, Store, StoreError, StoreErrorKind, StoreOptions};
use crate::stores::Choice;
use crate::sys::mutex::Mutex;
use crate::sys::process::{self, PerProcess};
use crate::sys::runtime;
use crate::token::HoldId;

/// A client's open store and options, in every process that uses it.
pub struct Session {
    /// The store that a forked child opens again; `None` if the caller passed an open store.
    choice: Option<Choice>,
    options: ClientOptions,
    /// Distinguishes the clients of one store.
    id: u64,
    closed: AtomicBool,
    process: PerProcess<Arc<ProcessSession>>,
}

/// The part of a session that belongs to one process.
pub struct ProcessSession {
    pub open: Arc<OpenStore>,
    pub identity: Arc<Identity>,
    closing: Notify,
    tasks: TaskTracker,
}

/// A store that this process has open, and what all its clients share.
pub struct OpenStore {
    pub store: Arc<dyn Store>,
    pub queue: Arc<Queue>,
    pub schedule: Arc<Schedule>,
    /// Whether other machines can use it.
    shared_by_machines: bool,
    pub generation: u64,
}

static OPEN_STORES: PerProcess<Mutex<HashMap<usize, Weak<OpenStore>>>> = PerProcess::new();

impl OpenStore {
    /// The `OpenStore` of this store: if a store is opened twice, its clients share one queue.
    fn of(store: Arc<dyn Store>, shared_by_machines: bool) -> Arc<OpenStore> {
        let mut open_stores = OPEN_STORES.get_or_init(|_| Mutex::default()).lock();
        open_stores.retain(|_, open| open.strong_count() > 0);
        let address = Arc::as_ptr(&store).cast::<()>() as usize;
        if let Some(open) = open_stores.get(&address).and_then(Weak::upgrade) {
            return open;
        }
        let schedule = Arc::new(Schedule::new(Arc::clone(&store)));
        let open = Arc::new(OpenStore {
            queue: Arc::default(),
            schedule,
            store,
            shared_by_machines,
            generation: process::generation(),
        });
        open_stores.insert(address, Arc::downgrade(&open));
        open
    }

    /// Whether this process opened it. A signal handler may fork in the middle of a call: then the child continues the
    /// call with its parent's store.
    pub fn is_of_this_process(&self) -> bool {
        self.generation == process::generation()
    }

    /// A name for one more hold.
    #[inline(always)]
    pub fn name_hold(&self) -> HoldId {
        if self.shared_by_machines { HoldId::random() } else { HoldId::local() }
    }

    /// The error of a request whose reply did not arrive in time.
    pub fn unanswered(&self, waited: Duration) -> Error {
        Error::new(ErrorKind::Indeterminate, format!("no answer from {} within {waited:?}", self.store.location()))
    }
}

impl Drop for OpenStore {
    fn drop(&mut self) {
        self.schedule.stop();
    }
}

impl ProcessSession {
    fn new(store: Arc<dyn Store>, shared_by_machines: bool, options: &ClientOptions) -> ProcessSession {
        ProcessSession {
            open: OpenStore::of(store, shared_by_machines),
            identity: Arc::new(identity_of_this_process(&options.app)),
            closing: Notify::new(),
            tasks: TaskTracker::default(),
        }
    }

    /// Begins a task that closing the client waits for.
    #[inline]
    fn begin_task(self: &Arc<Self>) -> TaskGuard<&Arc<Self>> {
        self.tasks.running.fetch_add(1, Ordering::SeqCst);
        TaskGuard(self)
    }
}

impl Session {
    pub fn new(choice: Option<Choice>, options: ClientOptions) -> Session {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let id = LAST.fetch_add(1, Ordering::Relaxed);
        Session { choice, options, id, closed: AtomicBool::new(false), process: PerProcess::new() }
    }

    /// A session on a store that is already open. A forked child cannot open it again.
    pub fn over(store: Arc<dyn Store>, options: ClientOptions) -> Session {
        let session = Session::new(None, options);
        session.process.get_or_init(|_| Arc::new(ProcessSession::new(store, true, &session.options)));
        session
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn options(&self) -> &ClientOptions {
        &self.options
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    #[inline]
    pub fn check_open(&self) -> Result<(), Error> {
        if self.is_closed() { Err(Error::invalid_op("the client is closed")) } else { Ok(()) }
    }

    #[inline]
    fn process(&self) -> Result<&Arc<ProcessSession>, Error> {
        self.process.get_or_try_init(|_| {
            let options = &self.options;
            let store_options =
                StoreOptions { op_timeout: options.op_timeout, connect_timeout: options.connect_timeout };
            let choice = self.choice.as_ref().ok_or_else(|| {
                Error::new(
                    ErrorKind::Forked,
                    "the client's store was opened before the fork, by the parent process: open a client in this \
                     process",
                )
            })?;
            let store = choice.open(&store_options)?;
            Ok(Arc::new(ProcessSession::new(store, choice.is_shared_by_machines(), options)))
        })
    }

    /// The open store. It is opened now if this process has not used it yet.
    pub fn open_store(&self) -> Result<&Arc<OpenStore>, Error> {
        Ok(&self.process()?.open)
    }

    /// Waits until the client is closed.
    pub async fn closing(&self) {
        let Ok(process) = self.process() else { return };
        let closing = process.closing.notified();
        if !self.is_closed() {
            closing.await;
        }
    }

    /// Closes the client: ends waits, releases auto-refreshed holds, and waits for operations in progress, until
    /// `limit`.
    pub fn close(self: &Arc<Self>, limit: Boottime) -> Answer<(), Error> {
        // In a total order with tasks that begin now (SeqCst): a task either finds the client closed, or is waited for.
        self.closed.store(true, Ordering::SeqCst);
        atomic::fence(Ordering::SeqCst);
        let Some(process) = self.process.current() else { return Answer::Now(Ok(())) };
        process.closing.notify_waiters();
        for lock in process.open.schedule.renewed_for(self.id) {
            lock.release_at_close();
        }
        if process.tasks.is_idle() {
            return Answer::Now(Ok(()));
        }
        let process = Arc::clone(process);
        Answer::later(async move {
            match runtime::until(limit, &mut pin!(process.tasks.idle())).await {
                Some(()) => Ok(()),
                None => Err(Error::new(
                    ErrorKind::Indeterminate,
                    "the client is closed, but the store has not answered every release: a lock whose release did not \
                     arrive stays until its lease ends",
                )),
            }
        })
    }

    /// Gives up the client without closing it: ends waits, and abandons every hold (R15).
    pub fn abandon(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(process) = self.process.current() else { return };
        process.closing.notify_waiters();
        for lock in process.open.schedule.renewed_for(self.id) {
            lock.abandon_with_client();
        }
    }

    /// Begins a task that closing the client waits for, unless the client is closed.
    #[inline(always)]
    pub fn begin_task(&self) -> Result<TaskGuard<&Arc<ProcessSession>>, Error> {
        let guard = self.process()?.begin_task();
        self.check_open()?;
        Ok(guard)
    }

    /// Runs a background task that closing the client waits for.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        match runtime::handle().and_then(|handle| Ok((handle, self.process()?))) {
            Ok((handle, process)) => {
                let guard = process.begin_task().kept();
                handle.spawn(async move {
                    work.await;
                    drop(guard);
                });
            }
            Err(error) => tracing::warn!("a request was not sent, and a lease will run out instead: {error}"),
        }
    }

    /// A future that continues in the background if its awaiter drops it.
    pub fn detachable<T: Send>(self: &Arc<Self>, work: impl Future<Output = T> + Send + 'static) -> Detachable<T> {
        Detachable {
            session: Arc::clone(self),
            work: Some(Box::pin(work)),
            task: self.process().ok().map(|process| process.begin_task().kept()),
            generation: process::generation(),
        }
    }
}

/// Counts requests in progress, and releases and clean-ups that continue after their call has returned.
#[derive(Default)]
struct TaskTracker {
    running: AtomicUsize,
    /// Whether a close waits until there are none.
    awaited: AtomicBool,
    done: Notify,
}

/// A counted task, until this is dropped, with the session's part of this process.
pub struct TaskGuard<P: Borrow<Arc<ProcessSession>> = Arc<ProcessSession>>(P);

impl TaskTracker {
    fn is_idle(&self) -> bool {
        self.running.load(Ordering::SeqCst) == 0
    }

    async fn idle(&self) {
        // In a total order with the end of a task (SeqCst): either the task sees `awaited`, or it is not counted here
        // any more.
        self.awaited.store(true, Ordering::SeqCst);
        loop {
            let done = self.done.notified();
            if self.is_idle() {
                return;
            }
            done.await;
        }
    }
}

impl TaskGuard<&Arc<ProcessSession>> {
    /// The same task, with a reference of its own, so that it may outlive the call that began it.
    pub fn kept(self) -> TaskGuard {
        let kept = TaskGuard(Arc::clone(self.0));
        std::mem::forget(self);
        kept
    }
}

impl<P: Borrow<Arc<ProcessSession>>> Deref for TaskGuard<P> {
    type Target = ProcessSession;

    #[inline]
    fn deref(&self) -> &ProcessSession {
        self.0.borrow()
    }
}

impl<P: Borrow<Arc<ProcessSession>>> Drop for TaskGuard<P> {
    #[inline]
    fn drop(&mut self) {
        let tasks = &self.0.borrow().tasks;
        if tasks.running.fetch_sub(1, Ordering::SeqCst) == 1 && tasks.awaited.load(Ordering::SeqCst) {
            tasks.done.notify_waiters();
        }
    }
}

/// A future polled by its awaiter; if dropped, it finishes on the runtime.
///
/// So a reply that arrives while the awaiter polls wakes one thread only.
pub struct Detachable<T: Send + 'static> {
    session: Arc<Session>,
    /// `None` after it has ended.
    work: Option<Pin<Box<dyn Future<Output = T> + Send>>>,
    task: Option<TaskGuard>,
    generation: u64,
}

impl<T: Send + 'static> Future for Detachable<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let work = self.work.as_mut().expect("it is not polled after its end");
        let output = ready!(work.as_mut().poll(context));
        (self.work, self.task) = (None, None);
        Poll::Ready(output)
    }
}

impl<T: Send + 'static> Drop for Detachable<T> {
    fn drop(&mut self) {
        let Some(work) = self.work.take() else { return };
        if self.generation != process::generation() {
            // It belongs to the parent process, which finishes it.
            return std::mem::forget((work, self.task.take()));
        }
        self.session.spawn(async move {
            work.await;
        });
    }
}

/// A call that a forked child leaves alone when it drops it: what the call would release, and the mutexes it would
/// lock, belong to the parent process.
pub struct OfItsProcess<T> {
    call: Option<Call<T>>,
    generation: u64,
}

type Call<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

impl<T> OfItsProcess<T> {
    pub fn new(call: Call<T>) -> OfItsProcess<T> {
        OfItsProcess { call: Some(call), generation: process::generation() }
    }
}

impl<T> Future for OfItsProcess<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<T, Error>> {
        let generation = self.generation;
        match &mut self.call {
            Some(call) if generation == process::generation() => call.as_mut().poll(context),
            _ => Poll::Ready(Err(Error::new(
                ErrorKind::Forked,
                "the call belongs to the process that this one was forked from",
            ))),
        }
    }
}

impl<T> Drop for OfItsProcess<T> {
    fn drop(&mut self) {
        if self.generation != process::generation() {
            std::mem::forget(self.call.take());
        }
    }
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

/// The host, process, boot and application that records name as the owner. If `app` is empty, it is the program's name.
fn identity_of_this_process(app: &str) -> Identity {
    let app = match app {
        "" => std::fs::read_to_string("/proc/self/comm").unwrap_or_default().trim().to_string(),
        app => app.to_string(),
    };
    Identity {
        host: process::host_name(),
        pid: std::process::id(),
        boot_id: process::boot_id().unwrap_or_default(),
        app,
    }
}
