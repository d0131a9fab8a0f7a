//! A client: an open store plus default options.

use std::sync::Arc;
use std::time::Duration;

use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::key::Key;
use crate::lock::session::Session;
use crate::lock::{Lock, Owner};
use crate::options::{ClientOptions, LockOptions};
use crate::protocol::{Change, Condition, Holder, Reply, Write};
use crate::record::Record;
use crate::store::{Answer, Cursor, Filter, Page, Readiness, Store};
use crate::stores::Choice;
use crate::sys::process;
use crate::sys::runtime;

/// An open store plus default options. Cloning gives another handle of the same client.
///
/// The store is chosen once, when the client is opened (R25). A forked child opens the same store again on first use
/// (R16), or gets an error if it cannot: the child may have become another user, or have another root directory.
///
/// ```
/// use nblock::{Client, ClientOptions, Filter, Key, LockOptions, Timeout, wait};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), nblock::Error> {
/// let options = ClientOptions { timeout: Timeout::After(Duration::from_secs(2)), ..Default::default() };
/// let client = wait(Client::open(Some("memory:"), options))?;
/// let lock = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
/// assert!(wait(lock.try_lock(LockOptions::default()))?);
///
/// for record in wait(client.list(Filter::All))? {
///     println!("{}: {:?} left", record.key.quoted(), record.lease.remaining());
/// }
/// let record = wait(client.find(lock.key()))?.expect("it is held");
/// assert_eq!(record.owner.map(|owner| owner.pid), Some(std::process::id()));
/// wait(lock.unlock())
/// # }
/// ```
#[derive(Clone)]
pub struct Client(Arc<Session>);

/// The result of breaking a record by force.
///
/// ```
/// use nblock::{Broken, Client, ClientOptions, Key, LockOptions, wait};
///
/// # fn main() -> Result<(), nblock::Error> {
/// let client = wait(Client::open(Some("memory:"), ClientOptions::default()))?;
/// let lock = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
/// assert!(wait(lock.try_lock(LockOptions::default()))?);
/// let record = wait(client.find(lock.key()))?.expect("it is held");
///
/// wait(lock.refresh(None))?;
/// match wait(client.break_seen(&record))? {
///     Broken::Broken => println!("its holder may still be working"),
///     Broken::Changed => println!("not broken: it was renewed, or has another holder"),
///     Broken::Foreign => println!("not broken: another program wrote it, and it may be no lock"),
/// }
/// # assert_eq!(wait(client.break_seen(&record))?, Broken::Changed);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The record is deleted.
    Broken,
    /// The record is gone, or has changed since it was read.
    Changed,
    /// Another program wrote it, and it may be no lock: only [`Client::break_foreign`] deletes it.
    Foreign,
}

/// What [`Client::ping`] learned about the store.
///
/// ```
/// use nblock::{Client, ClientOptions, wait};
///
/// # fn main() -> Result<(), nblock::Error> {
/// let client = wait(Client::open(Some("memory:"), ClientOptions::default()))?;
/// let ping = wait(client.ping())?;
/// println!("{} answered after {:?}", ping.server, ping.round_trip);
/// for caveat in &ping.caveats {
///     eprintln!("warning: {caveat}");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ping {
    /// The server or store that replied, with its version and location.
    pub server: String,
    /// Where the store is, for people to read, as [`Client::location`].
    pub location: String,
    /// The time between the request and the reply.
    pub round_trip: Duration,
    /// How far the server's clock is ahead of this machine's, in milliseconds. `None` if it is the same clock, or if it
    /// was not measured.
    pub skew_ms: Option<i64>,
    /// Problems in the server's set-up that endanger locks, and what to do about them.
    pub caveats: Vec<String>,
}

impl Client {
    /// Opens a store and prepares it for the first grant: connects, and creates what is missing. May wait, at most
    /// `connect_timeout`.
    ///
    /// Failures that may be temporary are retried until then. If the server replies, but still cannot grant anything
    /// after that time, the client is opened nevertheless, and each call's own timeout applies.
    pub fn open(url: Option<&str>, options: ClientOptions) -> Answer<Client, Error> {
        let opened = (|| {
            options.check()?;
            process::check()?;
            let choice = Choice::make(url)?;
            tracing::info!("the store is {:?}: {}", choice.url, choice.why);
            let client = Client(Arc::new(Session::new(Some(choice), options)));
            client.0.open_store()?;
            Ok(client)
        })();
        let client: Client = match opened {
            Ok(client) => client,
            Err(error) => return Answer::Now(Err(error)),
        };
        let store = match client.0.open_store() {
            Ok(open) => Arc::clone(&open.store),
            Err(error) => return Answer::Now(Err(error)),
        };
        let limit = Boottime::now() + client.options().connect_timeout;
        match store.prepare() {
            Answer::Now(Ok(Readiness::Ready)) => Answer::Now(Ok(client)),
            Answer::Now(Err(error)) if !error.may_pass() => Answer::Now(Err(error.into())),
            first => match runtime::handle() {
                Ok(_) => Answer::later(async move {
                    client.get_ready(&*store, first, limit).await?;
                    Ok(client)
                }),
                Err(error) => Answer::Now(Err(error)),
            },
        }
    }

    /// Waits until the store is ready. Retries temporary failures until `limit`.
    async fn get_ready(&self, store: &dyn Store, first: Answer<Readiness>, limit: Boottime) -> Result<(), Error> {
        let mut preparing = Box::pin(first.get());
        let mut backoff = Backoff::default();
        let mut trouble = None;
        loop {
            match runtime::until(limit, &mut preparing).await {
                Some(Ok(Readiness::Ready)) => return Ok(()),
                Some(Err(error)) if !error.may_pass() => return Err(error.into()),
                Some(not_ready) => trouble = Some(not_ready),
                None => {}
            }
            runtime::sleep_until(limit.min(Boottime::now() + backoff.failed())).await;
            if limit.has_passed() {
                break;
            }
            preparing = Box::pin(store.prepare().get());
        }
        match trouble {
            Some(Err(error)) => Err(error.into()),
            Some(Ok(Readiness::NotYet(why))) => {
                tracing::warn!("opened, but {why}");
                Ok(())
            }
            Some(Ok(Readiness::Ready)) | None => Err(Error::new(
                ErrorKind::Unreachable,
                format!("no answer from {} within {:?}", store.location(), self.options().connect_timeout),
            )),
        }
    }

    /// A client with a store that is already open: one of the program's own, or one that wraps another store. A forked
    /// child cannot open it again, and gets an error. Does not wait.
    #[cfg(feature = "internals")]
    #[doc(hidden)]
    pub fn over(store: Arc<dyn Store>, options: ClientOptions) -> Result<Client, Error> {
        options.check()?;
        process::check()?;
        Ok(Client(Arc::new(Session::over(store, options))))
    }

    /// The options that the client was opened with.
    pub fn options(&self) -> &ClientOptions {
        self.0.options()
    }

    /// A lock for `key` on this client's store. Does not wait.
    pub fn lock(&self, key: Key, defaults: LockOptions) -> Result<Lock, Error> {
        defaults.check()?;
        self.0.check_open()?;
        Ok(Lock::new(Arc::clone(&self.0), key, None, defaults))
    }

    /// A reentrant lock for `key`: every user with the same `owner` may lock it again. Does not wait.
    pub fn reentrant_lock(&self, key: Key, owner: Option<&str>, defaults: LockOptions) -> Result<Lock, Error> {
        defaults.check()?;
        self.0.check_open()?;
        Ok(Lock::new(Arc::clone(&self.0), key, Some(Owner::new(owner)?), defaults))
    }

    /// The record of a key. May wait, at most `op_timeout`.
    pub fn find(&self, key: &Key) -> Answer<Option<Record>, Error> {
        self.ask(|store| store.find(key))
    }

    /// All records, or those whose lease is over. May wait, at most `op_timeout` for each part of the list.
    pub fn list(&self, filter: Filter) -> Answer<Vec<Record>, Error> {
        let mut records = Vec::new();
        let mut from = None;
        loop {
            match self.page(filter, from) {
                Answer::Now(Err(error)) => return Answer::Now(Err(error)),
                Answer::Now(Ok(page)) => {
                    records.extend(page.records);
                    from = page.next;
                    if from.is_none() {
                        return Answer::Now(Ok(records));
                    }
                }
                Answer::Later(mut answer) => {
                    let client = self.clone();
                    return Answer::later(async move {
                        loop {
                            let page = answer.await?;
                            records.extend(page.records);
                            match page.next {
                                None => return Ok(records),
                                next => answer = Box::pin(client.page(filter, next).get()),
                            }
                        }
                    });
                }
            }
        }
    }

    fn page(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page, Error> {
        self.ask(|store| store.list(filter, from))
    }

    /// Deletes a record that has not changed since it was read (R20). Breaking a lock is forcible: its holder may still
    /// be working. May wait, at most `op_timeout`.
    ///
    /// In Redis, where any string counts as a held lock, it deletes only records that nblock wrote.
    pub fn break_seen(&self, record: &Record) -> Answer<Broken, Error> {
        if matches!(record.state.holder, Holder::Foreign { .. }) {
            match self.0.open_store() {
                Ok(open) if open.store.is_for_locks_alone() => {}
                Ok(_) => return Answer::Now(Ok(Broken::Foreign)),
                Err(error) => return Answer::Now(Err(error)),
            }
        }
        self.break_foreign(record)
    }

    /// As [`break_seen`](Client::break_seen), but also deletes a record that nblock did not write: it may be a lock of
    /// another library, or other data.
    pub fn break_foreign(&self, record: &Record) -> Answer<Broken, Error> {
        let condition = Condition::Seen { state: Box::new(record.state.clone()), over: false };
        self.ask(|store| store.change(&record.key, Change::new(condition, Write::Delete))).map(|reply| match reply {
            Reply::Applied { .. } => Broken::Broken,
            Reply::Found(_) | Reply::TooLate => Broken::Changed,
        })
    }

    /// Checks that the store replies. May wait, at most `op_timeout`.
    pub fn ping(&self) -> Answer<Ping, Error> {
        self.ask(|store| {
            let (location, sent) = (store.location(), Boottime::now());
            store.ping().map(move |pong| Ping {
                server: pong.server,
                location,
                round_trip: Boottime::now().since(sent),
                skew_ms: pong.skew_ms,
                caveats: pong.caveats,
            })
        })
    }

    /// Where the store is, for people.
    pub fn location(&self) -> Result<String, Error> {
        Ok(self.0.open_store()?.store.location())
    }

    fn ask<T: Send + 'static>(&self, request: impl FnOnce(&dyn Store) -> Answer<T>) -> Answer<T, Error> {
        let open = match self.0.check_open().and_then(|()| self.0.open_store()) {
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
                        None => Err(open.unanswered(op_timeout)),
                    }
                })
            }
        }
    }

    /// Closes the client: calls that wait for its locks end as cancelled, auto-refreshed holds are released, and plain
    /// leases end by themselves (R15). Waits for calls under way and background work until `limit`; holds that are
    /// granted meanwhile are given back. It also waits for futures of its locks that are not being polled.
    ///
    /// Closing a client again is not an error.
    pub fn close(&self, limit: Boottime) -> Answer<(), Error> {
        self.0.close(limit)
    }

    /// Gives the client up without closing it: waits end, and every hold is abandoned (R15). Does not wait.
    pub fn abandon(&self) {
        self.0.abandon();
    }

    /// Whether the client is closed. Does not wait.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}
