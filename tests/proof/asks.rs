//! What the lock asks of a store, one request at a time: for tests that stand in the lock's place.

use std::sync::Arc;
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::protocol::{
    Change, Condition, Holder, Lease, NewRecord, Orphan, Proof, Renewal as Extension, Reply, Write,
};
use nblock::record::{Identity, Record};
use nblock::store::{Answer, Store, StoreError};
use nblock::token::{HoldId, Token};

/// One request for a grant of a plain lock.
#[derive(Clone, Debug)]
pub struct Attempt {
    pub token: Token,
    pub n: u64,
    pub expire: Duration,
    pub not_after: Boottime,
    pub identity: Arc<Identity>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// Ours. `token` is the one in the record now; `applied` says whether this request's write, and so its new
    /// lease, took effect.
    Granted {
        token: Token,
        applied: bool,
        fence: Option<u64>,
    },
    /// Somebody else's, for this long by the store's clock.
    Held {
        expires_in: Duration,
    },
    TooLate,
}

/// What proves a plain hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    Token(Token),
    /// Any token of the hold.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    Renewed { applied: bool },
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    Broken,
    Changed,
}

pub trait Asks {
    fn acquire(&self, key: &Key, attempt: Attempt) -> Answer<Acquired>;
    fn release(&self, key: &Key, claim: Claim) -> Answer<Released>;
    fn refresh(&self, batch: Vec<Renewal>) -> Answer<Vec<Result<Renewed, StoreError>>>;
    fn break_seen(&self, record: &Record) -> Answer<Broken>;
    /// All records, or those whose lease is over.
    fn list_all(&self, filter: nblock::store::Filter) -> Answer<Vec<Record>>;
}

impl Asks for Arc<dyn Store> {
    fn acquire(&self, key: &Key, attempt: Attempt) -> Answer<Acquired> {
        let first = self.change(key, put(&attempt, Condition::Absent));
        let (store, key) = (Arc::clone(self), key.clone());
        let later = |first: Answer<Reply>| {
            Answer::later(async move {
                let mut reply = first.get().await?;
                loop {
                    let next = match read_acquired(&attempt, reply) {
                        Ok(acquired) => return Ok(acquired),
                        Err(next) => *next,
                    };
                    match next {
                        Next::TakeOver(change) => reply = store.change(&key, change).get().await?,
                        Next::Prove { change, token, fence } => {
                            let proven = store.change(&key, change).get().await?;
                            return Ok(read_proven(proven, token, fence));
                        }
                    }
                }
            })
        };
        // Where the store answers at once, so does this: a request that is dropped was made.
        match first {
            Answer::Now(reply) => match nblock::sys::runtime::block_on(later(Answer::Now(reply)).get()) {
                Ok(answer) => Answer::Now(answer),
                Err(error) => Answer::Now(Err(StoreError::resources(error.message()))),
            },
            first => later(first),
        }
    }

    fn release(&self, key: &Key, claim: Claim) -> Answer<Released> {
        let change = match claim {
            Claim::Token(token) => Change::new(Condition::Mine(Proof::Token(token)), Write::Delete),
            Claim::AnyOf(hold) => Orphan::Plain { hold }.removals().remove(0),
        };
        self.change(key, change).map(|reply| match reply {
            Reply::Applied { .. } => Released::Released,
            _ => Released::NotOurs,
        })
    }

    fn refresh(&self, batch: Vec<Renewal>) -> Answer<Vec<Result<Renewed, StoreError>>> {
        let (mut changes, mut extensions) = (Vec::new(), Vec::new());
        for Renewal { key, proof, n, expire } in batch {
            let extension = Extension { proof, expire, write_seq: n };
            changes.push((key, extension.change()));
            extensions.push(extension);
        }
        self.change_many(changes).map(move |replies| {
            let read = |(extension, reply): (Extension, Result<Reply, StoreError>)| {
                reply.map(|reply| match extension.read(&reply) {
                    nblock::protocol::Renewed::Ours { applied } => Renewed::Renewed { applied },
                    nblock::protocol::Renewed::Lost => Renewed::Lost,
                })
            };
            extensions.into_iter().zip(replies).map(read).collect()
        })
    }

    fn break_seen(&self, record: &Record) -> Answer<Broken> {
        let condition = Condition::Seen { state: Box::new(record.state.clone()), over: false };
        self.change(&record.key, Change::new(condition, Write::Delete)).map(|reply| match reply {
            Reply::Applied { .. } => Broken::Broken,
            _ => Broken::Changed,
        })
    }

    fn list_all(&self, filter: nblock::store::Filter) -> Answer<Vec<Record>> {
        let store = Arc::clone(self);
        Answer::later(async move {
            let (mut records, mut from) = (Vec::new(), None);
            loop {
                let page = store.list(filter, from).get().await?;
                records.extend(page.records);
                from = page.next;
                if from.is_none() {
                    return Ok(records);
                }
            }
        })
    }
}

fn put(attempt: &Attempt, condition: Condition) -> Change {
    let Attempt { token, n, expire, not_after, identity } = attempt.clone();
    let holder = Holder::Plain { token, write_seq: n };
    Change::new(condition, Write::Put(NewRecord { holder, expire, identity })).until(not_after)
}

enum Next {
    TakeOver(Change),
    Prove { change: Change, token: Token, fence: Option<u64> },
}

fn read_acquired(attempt: &Attempt, reply: Reply) -> Result<Acquired, Box<Next>> {
    let record = match reply {
        Reply::Applied { fence } => return Ok(Acquired::Granted { token: attempt.token, applied: true, fence }),
        Reply::TooLate => return Ok(Acquired::TooLate),
        Reply::Found(None) => return Err(Box::new(Next::TakeOver(put(attempt, Condition::Absent)))),
        Reply::Found(Some(record)) => record,
    };
    match record.state.holder.token() {
        Some(token) if token.hold == attempt.token.hold => {
            let write = Write::Extend { lease: Lease::FromNow(attempt.expire), write_seq: Some(attempt.n) };
            let change = Change::new(Condition::Mine(Proof::Token(token)), write).until(attempt.not_after);
            Err(Box::new(Next::Prove { change, token, fence: record.fence }))
        }
        _ if record.lease.expired() => {
            let seen = Condition::Seen { state: Box::new(record.state.clone()), over: true };
            Err(Box::new(Next::TakeOver(put(attempt, seen))))
        }
        _ => Ok(Acquired::Held { expires_in: record.lease.remaining() }),
    }
}

fn read_proven(reply: Reply, token: Token, fence: Option<u64>) -> Acquired {
    match reply {
        Reply::Applied { .. } => Acquired::Granted { token, applied: true, fence },
        Reply::Found(Some(record)) if record.state.holder.token() == Some(token) => {
            Acquired::Granted { token, applied: false, fence }
        }
        Reply::Found(record) => {
            Acquired::Held { expires_in: record.map_or(Duration::ZERO, |record| record.lease.remaining()) }
        }
        Reply::TooLate => Acquired::TooLate,
    }
}

/// What tests compare of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The instance token as text.
    pub token: String,
    /// The lease's end, in nanoseconds of the store's clock.
    pub expires_at: u64,
    pub n: u64,
}

pub trait Shown {
    fn seen(&self) -> Seen;
}

impl Shown for Record {
    fn seen(&self) -> Seen {
        let (token, n) = match &self.state.holder {
            Holder::Plain { token, write_seq } => (token.to_string(), *write_seq),
            Holder::Reentrant { owner, .. } => (owner.0.to_string(), 0),
            Holder::Foreign { token } => (token.to_string(), 0),
        };
        Seen { token, expires_at: self.state.ends_at.0, n }
    }
}
