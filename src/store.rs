//! What keeps records, and the contract that every store fulfils.
//!
//! A store does one atomic operation per method and nothing else: waiting, retrying, cleaning up,
//! renewing and the local queue live above it, once, for all stores. Rule numbers are those of
//! `docs/correctness.md`.
//!
//! # Contract
//!
//! - Each operation is applied at one moment, or not at all, under the store's own clock.
//! - A lease whose end is *before* the store's now is over; at the very moment it still runs.
//! - A record that is damaged, or is no lock record, is [`StoreErrorKind::Rejected`] with the key in
//!   the message, and never a grant.
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

use crate::clock::Boottime;
use crate::key::Key;
use crate::record::Record;
use crate::token::{HoldId, ObjectId, Token};

/// One store. See the module for the contract.
pub trait Store: Send + Sync {
    /// Grants a plain lock, or says for how long it is held (R2, R3).
    ///
    /// Grants if there is no record, if its lease is over, or if it carries any token of
    /// `attempt.token.hold`. In the last case the record keeps its token, which the answer names, and
    /// the write is applied only if the record's `n` is lower than `attempt.n`.
    /// Takes nothing once the store's clock has passed `attempt.not_after`.
    fn acquire(&self, key: &Key, attempt: Attempt) -> Answer<Acquired>;

    /// Deletes the record if it carries a token of `claim` (R6).
    fn release(&self, key: &Key, claim: Claim) -> Answer<Released>;

    /// Sets new lease ends, each only if the record carries the very token (R8), and only over a
    /// lower `n`. One request for all; the results stand in the order of the batch.
    fn refresh(&self, batch: Vec<Renewal>) -> Answer<Vec<Result<Renewed, StoreError>>>;

    /// One step of a reentrant lock (R17). Each step applies once.
    fn step(&self, key: &Key, step: Step) -> Answer<Stepped>;

    /// The record of a key.
    fn find(&self, key: &Key) -> Answer<Option<Record>>;

    /// All records, or those whose lease is over.
    fn list(&self, filter: Filter) -> Answer<Vec<Record>>;

    /// Deletes the record if it is in the very state that was seen (R20).
    fn break_seen(&self, record: &Record) -> Answer<Broken>;

    /// A new fence for the key, larger than all before it, for a store whose grants carry none (R18).
    fn fence(&self, key: &Key) -> Answer<u64>;

    /// Watches the record of a key from now on (R10).
    fn watch(&self, key: &Key) -> Box<dyn Watch>;

    /// Asks for a sign of life.
    fn ping(&self) -> Answer<Pong>;

    /// Where this store is, for people: never with a password.
    fn location(&self) -> String;

    /// How much earlier than the store a holder counts its lease as over (R4).
    fn margin(&self, expire: Duration) -> Duration;

    /// After what time somebody who has waited for so long looks although nothing told him to (R10).
    fn safety_check(&self, waited: Duration) -> Duration;

    /// Whether somebody in another process may be waiting for this key. A hint: a wrong `true` costs
    /// the next local waiter a millisecond, a wrong `false` costs fairness (R11).
    fn awaited_elsewhere(&self, key: &Key) -> bool;
}

/// The answer to a request, there at once or later.
pub enum Answer<T, E = StoreError> {
    Now(Result<T, E>),
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

/// One request for a grant of a plain lock.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The hold that asks, and the number of this attempt within it.
    pub token: Token,
    /// Grows with every attempt and refresh of the hold.
    pub n: u64,
    pub expire: Duration,
    /// The moment, on this machine's clock, after which the attempt takes nothing.
    pub not_after: Boottime,
    pub identity: Arc<Identity>,
}

/// Who asks: what a record says of its owner, but for the moment of the grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub host: String,
    pub pid: u32,
    pub boot_id: String,
    pub app: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// Ours. `token` is the one in the record now; `applied` says whether this request's write,
    /// and so its new lease, took effect.
    Granted { token: Token, applied: bool, fence: Option<u64> },
    /// Somebody else's, for this long by the store's clock.
    Held { expires_in: Duration },
    /// The store's clock had passed `not_after`.
    TooLate,
}

/// What proves a plain hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// This very token.
    Token(Token),
    /// Any token of the hold: for cleaning up after it.
    AnyOf(HoldId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    Released,
    NotOurs,
}

/// One hold to be renewed.
#[derive(Clone, Debug)]
pub struct Renewal {
    pub key: Key,
    pub proof: Proof,
    pub n: u64,
    pub expire: Duration,
}

/// What a record must carry to be renewed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    Plain(Token),
    /// Owner token and hold (R17). Such a renewal never lowers the lease's end, and `n` is not
    /// compared: several objects renew the one record.
    Reentrant {
        owner: OwnerToken,
        hold: HoldId,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// Ours; `applied` says whether the lease's end is now this renewal's own (or, reentrant, later).
    Renewed {
        applied: bool,
    },
    Lost,
}

/// The text that the users of one reentrant lock share.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct OwnerToken(pub Arc<str>);

impl OwnerToken {
    /// The longest owner token, in bytes.
    pub const MAX_BYTES: usize = 255;
}

impl std::fmt::Debug for OwnerToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OwnerToken(..)")
    }
}

/// One step of a reentrant lock.
#[derive(Clone, Debug)]
pub struct Step {
    pub owner: OwnerToken,
    pub object: ObjectId,
    /// Grows with every step of the object. A step at or below the last one that the record knows of
    /// this object was applied before, and is not applied again.
    pub number: u64,
    pub action: Action,
}

#[derive(Clone, Debug)]
pub enum Action {
    /// Lock once more. Creates the record, takes it over when its lease is over (unless it carries
    /// this owner token and `hold` is its hold, which goes on), or counts up when it carries the
    /// owner token. `fresh` names the hold when the step creates, takes over, or meets a hold of
    /// this owner without a name. Takes nothing once the store's clock has passed `not_after`.
    /// Never lowers the lease's end.
    Enter { hold: Option<HoldId>, fresh: HoldId, expire: Duration, not_after: Boottime, identity: Arc<Identity> },
    /// Unlock once: counts down, or deletes with the last. Needs owner token and hold. `hold: None`
    /// means a hold that has no name yet (NoBrainer made it); the step then names it `fresh`, and
    /// by that name it is known when it is sent again.
    ///
    /// `enter` is the number of the step in whose way out it is: it counts only where that step is the last
    /// that the record knows of this object, so that one that comes late, or twice, takes away nothing of
    /// others where a late request has brought the hold back. `None`: of an object that never entered, which
    /// takes whatever step there is.
    Leave { hold: Option<HoldId>, enter: Option<u64>, fresh: HoldId },
    /// Take back the `Enter` numbered `enter`, if it was applied, and forbid it if it was not.
    /// `number` is above `enter`.
    Undo { enter: u64 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stepped {
    /// Entered, now or by an earlier request of the same number. `applied` says whether this request
    /// moved the lease's end to its own or found it later.
    Entered { hold: HoldId, count: u32, applied: bool, fence: Option<u64> },
    /// Somebody else's, for this long by the store's clock.
    Held { expires_in: Duration },
    /// The store's clock had passed `not_after`, or the step was undone before it came.
    TooLate,
    /// Left; so many are still in. 0: the record is gone.
    Left { count: u32 },
    /// The record is gone, or carries another owner token or hold.
    NotOurs,
    /// Nothing of the undone step is left.
    Undone,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filter {
    #[default]
    All,
    Expired,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    Broken,
    /// The record is gone, or is not as it was seen.
    Changed,
}

/// A sign of life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pong {
    /// What answered, with its version.
    pub server: String,
    /// How far the server's clock is from ours, as far as it can be measured, in milliseconds.
    pub skew_ms: Option<i64>,
}

/// Watches one record.
///
/// What happens between the watch's creation and the first poll is not missed. Losing the connection
/// is a change, and so is having it again.
pub trait Watch: Send {
    /// Ready when there was a change since the last time it was ready; waits otherwise.
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Change>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Try, or look.
    Look,
    /// A new holder has it, for this long: no use trying before.
    Held { expires_in: Duration },
}

/// Beyond the moment that a lease's end was announced for. A lease is over when its end is *before*
/// the store's now, and no clock is read twice at the same moment.
pub(crate) const JUST_AFTER: Duration = Duration::from_micros(100);

/// Why a store did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreError {
    pub kind: StoreErrorKind,
    pub message: Box<str>,
}

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
    /// The URL or its options make no sense, or name something that is not there.
    BadConfig,
    /// The system gave no memory, thread, descriptor or space: nothing was applied.
    Resources,
    /// The call belongs to the process that this one was forked from, and goes on there.
    Forked,
}

impl StoreError {
    pub fn new(kind: StoreErrorKind, message: impl Into<String>) -> StoreError {
        StoreError { kind, message: message.into().into_boxed_str() }
    }

    pub fn unreachable(message: impl Into<String>) -> StoreError {
        StoreError::new(StoreErrorKind::Unreachable, message)
    }

    pub fn unknown(message: impl Into<String>) -> StoreError {
        StoreError::new(StoreErrorKind::Unknown, message)
    }

    pub fn rejected(message: impl Into<String>) -> StoreError {
        StoreError::new(StoreErrorKind::Rejected, message)
    }

    pub fn bad_config(message: impl Into<String>) -> StoreError {
        StoreError::new(StoreErrorKind::BadConfig, message)
    }

    pub fn forked() -> StoreError {
        StoreError::new(
            StoreErrorKind::Forked,
            "the call belongs to the process that this one was forked from, by a handler that interrupted it",
        )
    }

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
    pub op_timeout: Duration,
    pub connect_timeout: Duration,
}
