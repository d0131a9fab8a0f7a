//! The interface of stores, and the contract that every store fulfils.
//!
//! A store evaluates changes (see [`crate::protocol`]) and finds, lists and watches records. It decides nothing: the
//! rules are in `protocol`, and waiting, retrying, cleaning up, renewing and the local queue are in `lock`, once for
//! all stores. Rule numbers are those of `docs/protocol.md`.
//!
//! # Contract
//!
//! - Each change is applied at one moment, or not at all. The time of that moment is read from the store's own clock:
//!   when the change is applied, or earlier, but not before it arrived at the server (or was sent, if the sender's
//!   thread applies it: [`Change::sent`](crate::protocol::Change)).
//! - A change that removes a record, or makes its lease end sooner, wakes its watches.
//! - If grants have fences, the fence grows with every grant of a key.
//! - A record that is damaged, or is not a lock record, gives [`StoreErrorKind::Rejected`] with the key in the message,
//!   and never a grant. [`Store::find`] and [`Store::list`] show it as damaged, and a change whose condition is exactly
//!   that state breaks it.
//! - **Answers.** An operation returns [`Answer::Now`] if it is done without waiting, on the caller's thread. Otherwise
//!   it returns [`Answer::Later`], a future that needs no particular executor. That future ends, at the latest, when
//!   the store has been unable to send the request for its `op_timeout` ([`StoreErrorKind::Unreachable`]), or when the
//!   connection that carried the request has ended ([`StoreErrorKind::Unknown`]). Dropping it does not recall the
//!   request.
//! - Dropping the store ends its connections and threads. Its watches and answers may outlive it.
//! - Methods may be called from any thread, and from inside or outside the library's runtime.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::Boottime;
use crate::error::Error;
use crate::key::Key;
use crate::protocol::{Change, Reply};
use crate::record::Record;
use crate::sys::mutex::Mutex;

/// One store. See the module for the contract.
pub trait Store: Send + Sync {
    /// Applies a change to the record of a key, as defined by [`apply`](crate::protocol::apply).
    fn change(&self, key: &Key, change: Change) -> Answer<Reply>;

    /// Applies many changes to records of different keys, independently, in as few requests as possible. The replies
    /// are in the order of the changes. A [`Reply::Found`] may have only the key and the state of its record.
    fn change_many(&self, changes: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>>;

    /// The record of a key.
    fn find(&self, key: &Key) -> Answer<Option<Record>>;

    /// All records, or those whose lease is over, part by part. `None`: the first part. Damaged records are included
    /// only in the list of all. Records that change meanwhile may be included or not.
    fn list(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page>;

    /// A new fence for the key, larger than all earlier ones. For stores whose grants have none (R18).
    fn fence(&self, key: &Key) -> Answer<u64>;

    /// Watches the record of a key from now on (R10): its removal, and changes that make its lease end sooner.
    fn watch(&self, key: &Key) -> Box<dyn Watch>;

    /// Prepares what the first grant would otherwise wait for: connects, and creates what is missing. Called when a
    /// client is opened, and repeated while the failure may be temporary.
    fn prepare(&self) -> Answer<Readiness>;

    /// Checks that the server replies.
    fn ping(&self) -> Answer<Pong>;

    /// Where this store is, for people. Never includes a password.
    fn location(&self) -> String;

    /// Whether the place where this store keeps its records is used only for locks. If not, a record of the kind
    /// [`Holder::Foreign`](crate::protocol::Holder::Foreign) may be the data of any program.
    fn is_for_locks_alone(&self) -> bool {
        true
    }

    /// How much earlier than the store a holder considers its lease over (R4).
    fn margin(&self, expire: Duration) -> Duration;

    /// The times at which the store's clock was found to have gone ahead of ours. `None` if it is our clock (R4).
    fn clock_steps(&self) -> Option<&Arc<ClockSteps>> {
        None
    }

    /// The longest time between two looks of a waiter that has already waited for `waited` (R10).
    fn safety_check(&self, waited: Duration) -> Duration;

    /// Whether a waiter in another process may be waiting for this key. A hint: a wrong `true` costs the next
    /// local waiter a millisecond, a wrong `false` costs fairness (R11).
    fn awaited_elsewhere(&self, key: &Key) -> bool;
}

/// The times at which the store's clock was found to have gone ahead of ours, and by how much. The reason may be that
/// the server's clock was set forward, or that this machine was paused by its host without noticing.
#[derive(Default)]
pub struct ClockSteps {
    steps: Mutex<Vec<(Boottime, Duration)>>,
    noted: Notify,
}

impl ClockSteps {
    /// How many steps are kept. If there are more, the oldest is added to the next one.
    const MOST: usize = 16;

    /// Notes that the clock went ahead by at most `by` after the time `after` of our clock. Leases that were requested
    /// up to then are shortened by it.
    pub fn note(&self, after: Boottime, by: Duration) {
        let mut steps = self.steps.lock();
        steps.push((after, by));
        if steps.len() > Self::MOST {
            let (_, oldest) = steps.remove(0);
            steps[0].1 = steps[0].1.saturating_add(oldest);
        }
        drop(steps);
        self.noted.notify_one();
    }

    /// The last step also shortens leases that were requested up to `sent`.
    pub fn reach(&self, sent: Boottime) {
        if let Some((after, _)) = self.steps.lock().last_mut() {
            *after = sent.max(*after);
        }
    }

    /// By how much to shorten a lease that is counted from `sent`.
    pub fn since(&self, sent: Boottime) -> Duration {
        let steps = self.steps.lock();
        steps.iter().filter(|(after, _)| sent <= *after).fold(Duration::ZERO, |sum, (_, by)| sum.saturating_add(*by))
    }

    /// Waits until the next step is noted.
    pub async fn noted(&self) {
        self.noted.notified().await;
    }
}

/// The answer to a request, available at once or later.
///
/// ```
/// use nblock::{Answer, Error, wait};
///
/// let at_once: Answer<u32, Error> = Answer::Now(Ok(1));
/// let later: Answer<u32, Error> = Answer::later(async { Ok(2) });
///
/// // A thread waits for it; async code awaits `get`.
/// assert_eq!(wait(at_once), Ok(1));
/// assert_eq!(wait(Answer::<u32, Error>::later(async { Ok(later.get().await? + 1) })), Ok(3));
/// ```
pub enum Answer<T, E = StoreError> {
    /// The answer is available.
    Now(Result<T, E>),
    /// The answer comes from this future.
    Later(Pin<Box<dyn Future<Output = Result<T, E>> + Send>>),
}

impl<T: 'static, E: 'static> Answer<T, E> {
    /// The answer with its value converted.
    pub fn map<U: 'static>(self, convert: impl FnOnce(T) -> U + Send + 'static) -> Answer<U, E> {
        match self {
            Answer::Now(result) => Answer::Now(result.map(convert)),
            Answer::Later(answer) => Answer::later(async move { answer.await.map(convert) }),
        }
    }
}

impl<T, E> Answer<T, E> {
    /// An answer that comes from a future.
    pub fn later(future: impl Future<Output = Result<T, E>> + Send + 'static) -> Answer<T, E> {
        Answer::Later(Box::pin(future))
    }

    /// The answer as a future, which needs no particular executor.
    pub async fn get(self) -> Result<T, E> {
        match self {
            Answer::Now(result) => result,
            Answer::Later(future) => future.await,
        }
    }
}

/// Which records a list contains.
///
/// ```
/// use nblock::{Client, ClientOptions, Filter, Key, LockOptions, wait};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), nblock::Error> {
/// let client = wait(Client::open(Some("memory:"), ClientOptions::default()))?;
/// let brief = LockOptions { expire: Some(Duration::from_millis(1)), ..Default::default() };
/// let lock = client.lock(Key::new(b"jobs:report")?, brief)?;
/// assert!(wait(lock.try_lock(LockOptions::default()))?);
/// std::thread::sleep(Duration::from_millis(10));
///
/// // A record whose lease has ended stays until the lock is taken over, unlocked or broken.
/// assert_eq!(wait(client.list(Filter::All))?.len(), 1);
/// assert_eq!(wait(client.list(Filter::Expired))?.len(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filter {
    /// All of them.
    #[default]
    All,
    /// Those whose lease is over.
    Expired,
}

/// Part of a list.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The records of this part.
    pub records: Vec<Record>,
    /// Where the next part begins; `None` after the last.
    pub next: Option<Cursor>,
}

/// A position in a list, in the store's own format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(pub Box<[u8]>);

/// The reply to a ping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pong {
    /// The server or store that replied, with its version.
    pub server: String,
    /// The difference between the server's clock and ours in milliseconds, if it can be measured.
    pub skew_ms: Option<i64>,
    /// Problems in the server's set-up that endanger locks, and what to do about them, as far as they can be detected.
    pub caveats: Vec<String>,
}

/// Whether a store can grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It can grant.
    Ready,
    /// The server replies, but cannot grant anything at the moment, for this reason.
    NotYet(StoreError),
}

/// Watches one record.
///
/// Changes between the creation of the watch and the first poll are not missed. Losing the connection counts as a
/// change, and so does getting it back.
pub trait Watch: Send {
    /// Ready if there was a change since it was last ready. Waits otherwise.
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice>;
}

/// What a watch reports to a waiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Try again, or read the record.
    Look,
    /// There is a new holder, for this long: trying before that is pointless.
    Held {
        /// How long the new holder's lease still runs.
        expires_in: Duration,
    },
}

/// How long after the announced end of a lease to try. A lease is over only when its end is *before* the store's
/// current time, and clocks are not read at exactly the same moment.
pub(crate) const JUST_AFTER: Duration = Duration::from_micros(100);

/// Why a store could not do what was requested.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreError {
    /// The kind, which decides how the lock layer continues.
    pub kind: StoreErrorKind,
    /// The message, for people.
    pub message: Box<str>,
}

/// What is known about a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// Could not be reached, or was busy for too long: nothing was applied.
    Unreachable,
    /// The request may have been applied.
    Unknown,
    /// The credentials or the permission were refused.
    Denied,
    /// Refused for good, or the record is damaged.
    Rejected,
    /// The URL or its options are invalid, or name something that does not exist.
    BadConfig,
    /// The system provided no memory, thread, descriptor or space: nothing was applied.
    Resources,
    /// The call belongs to the process that this one was forked from, and continues there.
    Forked,
}

impl StoreError {
    /// An error with a message for people.
    pub fn new(kind: StoreErrorKind, message: impl Into<String>) -> StoreError {
        StoreError { kind, message: message.into().into_boxed_str() }
    }

    /// An error of the kind [`StoreErrorKind::Unreachable`].
    pub fn unreachable(message: impl Into<String>) -> StoreError {
        StoreError::new(StoreErrorKind::Unreachable, message)
    }

    /// An error of the kind [`StoreErrorKind::Unknown`].
    pub fn unknown(message: impl Into<String>) -> StoreError {
        StoreError::new(StoreErrorKind::Unknown, message)
    }

    /// The reply does not have the form that the request requires: what was applied is not known.
    pub fn unexpected_reply() -> StoreError {
        StoreError::unknown("the server sent an unexpected reply")
    }

    /// An error of the kind [`StoreErrorKind::Rejected`].
    pub fn rejected(message: impl Into<String>) -> StoreError {
        StoreError::new(StoreErrorKind::Rejected, message)
    }

    /// An error of the kind [`StoreErrorKind::BadConfig`].
    pub fn bad_config(message: impl Into<String>) -> StoreError {
        StoreError::new(StoreErrorKind::BadConfig, message)
    }

    /// An error of the kind [`StoreErrorKind::Forked`].
    pub fn forked() -> StoreError {
        StoreError::new(StoreErrorKind::Forked, Error::forked_during_call().message())
    }

    /// An error of the kind [`StoreErrorKind::Resources`].
    pub fn resources(message: impl Into<String>) -> StoreError {
        StoreError::new(StoreErrorKind::Resources, message)
    }

    /// Whether a retry may succeed.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self.kind, StoreErrorKind::Unreachable | StoreErrorKind::Unknown)
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for StoreError {}

/// Options that the client passes to its store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// How long one request may take.
    pub op_timeout: Duration,
    /// How long connecting may take.
    pub connect_timeout: Duration,
}
