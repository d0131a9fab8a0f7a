//! What keeps records, and the contract that every store fulfils.
//!
//! A store evaluates changes (see [`crate::protocol`]), finds, lists and watches records, and decides nothing:
//! the rules are in `protocol`; waiting, retrying, cleaning up, renewing and the local queue are in `lock`,
//! once, for all stores. Rule numbers are those of `docs/protocol.md`.
//!
//! # Contract
//!
//! - Each change is applied at one moment, or not at all, under the store's own clock, read when it is applied
//!   or, at the earliest, when it arrived: on a server, or where the sender's thread applies it
//!   ([`Change::sent`](crate::protocol::Change)).
//! - A change that removes a record, or lets its lease end sooner, wakes its watches.
//! - A grant's fence grows over all grants of its key, where grants carry fences.
//! - A record that is damaged, or is no lock record, is [`StoreErrorKind::Rejected`] with the key in
//!   the message, and never a grant. [`Store::find`] and [`Store::list`] show it as damaged beside the others, and
//!   a change whose condition is that very state breaks it.
//! - **Answers.** An operation answers [`Answer::Now`] when it is done without waiting, on the
//!   caller's thread. Otherwise it answers [`Answer::Later`], a future that needs no particular
//!   executor. That future ends, at the latest, when the store has been unable to send the request
//!   for its `op_timeout` ([`StoreErrorKind::Unreachable`]), or when the connection that carried
//!   the request has ended ([`StoreErrorKind::Unknown`]). Dropping it does not recall the request.
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
    /// Applies a change to the record of a key, as [`apply`](crate::protocol::apply) says.
    fn change(&self, key: &Key, change: Change) -> Answer<Reply>;

    /// Applies many changes to records of different keys, each by itself, in as few requests as may be; the
    /// replies stand in the order of the changes. A [`Reply::Found`] may leave out all of the record but its
    /// key and state.
    fn change_many(&self, changes: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>>;

    /// The record of a key.
    fn find(&self, key: &Key) -> Answer<Option<Record>>;

    /// All records, or those whose lease is over, part by part; `None` begins. Damaged ones are among all, and not
    /// among the others. What changes meanwhile may be in the list or not.
    fn list(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page>;

    /// A new fence for the key, larger than all before it, for a store whose grants carry none (R18).
    fn fence(&self, key: &Key) -> Answer<u64>;

    /// Watches the record of a key from now on (R10): its removal, and a lease that ends sooner than before.
    fn watch(&self, key: &Key) -> Box<dyn Watch>;

    /// Gets ready what the first grant would have to wait for: a connection, and what has to be made. Opening a
    /// client asks for it, and again while the failure may pass.
    fn prepare(&self) -> Answer<Readiness>;

    /// Asks for a sign of life.
    fn ping(&self) -> Answer<Pong>;

    /// Where this store is, for people: never with a password.
    fn location(&self) -> String;

    /// Whether nothing but locks is kept where this store keeps its records. Otherwise a record of the kind
    /// [`Holder::Foreign`](crate::protocol::Holder::Foreign) may be any program's data.
    fn is_for_locks_alone(&self) -> bool {
        true
    }

    /// How much earlier than the store a holder counts its lease as over (R4).
    fn margin(&self, expire: Duration) -> Duration;

    /// When the clock by which leases end was seen to go ahead of ours, where it is another clock (R4).
    fn clock_steps(&self) -> Option<&Arc<ClockSteps>> {
        None
    }

    /// The longest sleep between two looks of a waiter that has waited for `waited` (R10).
    fn safety_check(&self, waited: Duration) -> Duration;

    /// Whether a waiter in another process may be waiting for this key. A hint: a wrong `true` costs the next
    /// local waiter a millisecond, a wrong `false` costs fairness (R11).
    fn awaited_elsewhere(&self, key: &Key) -> bool;
}

/// When the clock by which leases end was seen to go ahead of ours, and by how much. A server's clock that was set forward
/// looks like that, and so does every server's clock to a machine that was paused by its host and does not know.
#[derive(Default)]
pub struct ClockSteps {
    steps: Mutex<Vec<(Boottime, Duration)>>,
    noted: Notify,
}

impl ClockSteps {
    /// How many are kept. If there are more, the oldest count as later than they were.
    const MOST: usize = 16;

    /// Notes that the clock has gone ahead by so much, or less, after a moment of ours: what was asked for before that counts
    /// by the clock as it was.
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

    /// What was asked for up to this moment, too, counts by the clock as it was before the last step.
    pub fn reach(&self, sent: Boottime) {
        if let Some((after, _)) = self.steps.lock().last_mut() {
            *after = sent.max(*after);
        }
    }

    /// How much has to be taken off a lease that is counted from when a request was sent.
    pub fn since(&self, sent: Boottime) -> Duration {
        let steps = self.steps.lock();
        steps.iter().filter(|(after, _)| sent <= *after).fold(Duration::ZERO, |sum, (_, by)| sum.saturating_add(*by))
    }

    /// Waits until another one is noted.
    pub async fn noted(&self) {
        self.noted.notified().await;
    }
}

/// The answer to a request, there at once or later.
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
    /// The answer is there.
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

/// Which records a list has.
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

/// A place in a list, in the store's own terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(pub Box<[u8]>);

/// A sign of life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pong {
    /// What answered, with its version.
    pub server: String,
    /// How far the server's clock is from ours, as far as it can be measured, in milliseconds.
    pub skew_ms: Option<i64>,
    /// What in the server's set-up endangers locks, and what to do about it, as far as it can be seen.
    pub caveats: Vec<String>,
}

/// Whether a store can grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It can grant.
    Ready,
    /// Its server answers, but can grant nothing at the moment, for this reason.
    NotYet(StoreError),
}

/// Watches one record.
///
/// What happens between the watch's creation and the first poll is not missed. Losing the connection
/// is a change, and so is having it again.
pub trait Watch: Send {
    /// Ready when there was a change since the last time it was ready; waits otherwise.
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice>;
}

/// What a watch tells a waiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Try, or look.
    Look,
    /// A new holder has it, for this long: no use trying before.
    Held {
        /// How long the new holder's lease still runs.
        expires_in: Duration,
    },
}

/// Beyond the moment that a lease's end was announced for. A lease is over when its end is *before*
/// the store's now, and no clock is read twice at the same moment.
pub(crate) const JUST_AFTER: Duration = Duration::from_micros(100);

/// Why a store did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreError {
    /// The kind, which decides what the lock does next.
    pub kind: StoreErrorKind,
    /// The message, for people.
    pub message: Box<str>,
}

/// What is known of a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// Could not be reached, or was busy for too long: nothing was applied.
    Unreachable,
    /// Perhaps applied.
    Unknown,
    /// The credentials or the permission were refused.
    Denied,
    /// Refused for good, or the record is damaged.
    Rejected,
    /// The URL or its options are invalid, or name something that does not exist.
    BadConfig,
    /// The system gave no memory, thread, descriptor or space: nothing was applied.
    Resources,
    /// The call belongs to the process that this one was forked from, and goes on there.
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

    /// The server's reply has a form that the request does not have: what was applied is not known.
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

    /// Whether asking again may help.
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

/// What opening a store gives it from the client.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// How long one request may take.
    pub op_timeout: Duration,
    /// How long connecting may take.
    pub connect_timeout: Duration,
}
