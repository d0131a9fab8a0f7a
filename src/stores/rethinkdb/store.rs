//! The operations of the store: a query each, and what its answer means.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::caveats::Caveats;
use super::connection::{Answered, Body};
use super::contention::Contention;
use super::ddl::Named;
use super::feed::FeedWatch;
use super::queries::{FENCES, FENCES_KEY, Queries, Renewed as Entry, operation_name};
use super::reply::{self, Failure, Reply};
use super::row::{Row, field, seconds_to_ms, whole};
use super::servers::{Link, Servers, TimedReply};
use super::tables::{self, Tables};
use super::term::Term;
use super::url::Config;
use crate::clock::Boottime;
use crate::key::Key;
use crate::record::Record;
use crate::runtime;
use crate::store::{
    Acquired, Action, Answer, Attempt, Broken, Claim, Filter, OwnerToken, Pong, Proof, Readiness, Released, Renewal,
    Renewed, Step, Stepped, Store, StoreError, StoreErrorKind, Watch,
};
use crate::stores::network::skew::Offset;
use crate::token::{HoldId, Token};

/// How often a waiter looks although nothing told it to (R10).
const SAFETY_CHECK: Duration = Duration::from_secs(5);

/// The most rows, and bytes of keys, that one query renews. The server answers below its limit of
/// 100,000 elements (RethinkDB src/rdb_protocol/configured_limits.hpp), and keeps the rows in memory.
const MOST_ROWS: usize = 1000;
const MOST_KEY_BYTES: usize = 4 << 20;

pub struct RethinkStore {
    core: Arc<Core>,
}

/// What operations under way keep alive.
struct Core {
    link: Arc<Link>,
    queries: Queries,
    tables: Arc<Tables>,
    locks: Named,
    fences: Named,
    caveats: Arc<Caveats>,
    contention: Contention,
}

impl RethinkStore {
    pub fn new(config: Config) -> RethinkStore {
        let table = |table: &str, primary_key| Named::Table {
            database: config.database.clone(),
            table: table.to_string(),
            primary_key,
        };
        RethinkStore {
            core: Arc::new(Core {
                queries: Queries::new(&config),
                locks: table(&config.table, field::KEY_HASH),
                fences: table(FENCES, FENCES_KEY),
                tables: Arc::default(),
                caveats: Arc::default(),
                contention: Contention::default(),
                link: Link::new(Servers::new(config)),
            }),
        }
    }

    /// Sends a query on the table of locks and reads its answer.
    fn ask<T: 'static>(
        &self,
        term: Term,
        read: impl FnOnce(TimedReply) -> Result<T, StoreError> + Send + 'static,
    ) -> Answer<T> {
        let body = term.start();
        self.ask_on(&self.core.locks, Arc::new(move |_| body.clone()), read)
    }

    /// Sends a query on a table, which is made if it is missing.
    fn ask_on<T: 'static>(
        &self,
        table: &Named,
        body: Body,
        read: impl FnOnce(TimedReply) -> Result<T, StoreError> + Send + 'static,
    ) -> Answer<T> {
        let asking = self.core.asking(table, body);
        Answer::later(async move { read(asking.await?) })
    }
}

impl Core {
    /// Sends a query, at once; and again when what it needs was missing and has been made.
    fn asking(
        self: &Arc<Core>,
        table: &Named,
        body: Body,
    ) -> impl Future<Output = Result<TimedReply, StoreError>> + Send + use<> {
        let sent_at = Boottime::now();
        let mut asked = self.link.ask(Arc::clone(&body));
        let (core, table) = (Arc::clone(self), table.clone());
        async move {
            // The database, then the table; and each may be there twice for a moment.
            for _ in 0..4 {
                match asked.await.map_err(Failure::from).and_then(|answered| core.timed(answered, &table)) {
                    Ok(timed) => {
                        core.caveats.warn_once(&core.link);
                        return Ok(timed);
                    }
                    Err(failure) => core.make_what_is_missing(failure, &table, sent_at).await?,
                }
                asked = core.link.ask(Arc::clone(&body));
            }
            match asked.await.map_err(Failure::from).and_then(|answered| core.timed(answered, &table)) {
                Ok(timed) => Ok(timed),
                Err(Failure::Store(error)) => Err(error),
                Err(Failure::NoTable(message) | Failure::NoDatabase(message) | Failure::Ambiguous(message)) => {
                    Err(StoreError::unreachable(message))
                }
            }
        }
    }

    async fn make_what_is_missing(
        &self,
        failure: Failure,
        table: &Named,
        missing_at: Boottime,
    ) -> Result<(), StoreError> {
        let config = &self.link.engine.config;
        let missing = match failure {
            Failure::Store(error) => return Err(error),
            Failure::NoTable(_) => table.clone(),
            // Somebody makes it, too; it is used when it is alone.
            Failure::Ambiguous(message) if message.starts_with("Database") => Named::Database(config.database.clone()),
            Failure::Ambiguous(_) => table.clone(),
            Failure::NoDatabase(_) => {
                let database = Named::Database(config.database.clone());
                if !config.create {
                    return Err(tables::missing(&database));
                }
                database
            }
        };
        // In a task of its own: begun, it is done, even where the operation is given up.
        let making = tables::make(Arc::clone(&self.tables), Arc::clone(&self.link), missing, missing_at);
        let handle = runtime::handle().map_err(|error| StoreError::resources(error.message()))?;
        handle.spawn(making).await.unwrap_or_else(|_| Err(StoreError::unreachable("the library stopped")))
    }

    /// Sends an attempt, as the query that `ask` makes of it.
    fn acquiring(
        self: &Arc<Core>,
        ask: fn(&Queries, &Key, &Attempt, i64) -> Term,
        key: &Key,
        attempt: &Attempt,
    ) -> impl Future<Output = Result<TimedReply, StoreError>> + Send + use<> {
        let (queries, key, attempt) = (self.queries.clone(), key.clone(), attempt.clone());
        let body: Body =
            Arc::new(move |offset: &Offset| ask(&queries, &key, &attempt, offset.earliest(attempt.not_after)).start());
        self.asking(&self.locks, body)
    }

    /// What an attempt came to.
    fn acquired(&self, timed: &TimedReply, key: &Key, attempt: &Attempt) -> Result<Acquired, StoreError> {
        let Some(after) = row_after(&timed.result, key)? else { return Ok(Acquired::TooLate) };
        let row = Row::read(after)?;
        match Token::parse(&row.token) {
            Some(present) if present.hold == attempt.token.hold => {
                Ok(Acquired::Granted { token: present, applied: was_applied(&timed.result, attempt.n), fence: None })
            }
            _ => {
                let us = &attempt.identity;
                if row.owner.as_ref().is_none_or(|owner| owner.pid != us.pid || owner.boot_id != us.boot_id) {
                    self.contention.seen(key.hash());
                }
                Ok(Acquired::Held { expires_in: expires_in(&row, timed.now_ms) })
            }
        }
    }

    /// No table, no locks: looking does not make one. Opening a client does, and so does locking.
    fn nothing_where_there_is_no_table(&self, failure: Failure) -> Result<(), StoreError> {
        match failure {
            Failure::NoTable(_) => Ok(()),
            Failure::Ambiguous(message) => Err(StoreError::unreachable(message)),
            Failure::NoDatabase(_) => Err(tables::missing(&Named::Database(self.link.engine.config.database.clone()))),
            Failure::Store(error) => Err(error),
        }
    }

    /// What a query on a table was answered with. The server's words for a permission that is missing do not name
    /// the table.
    fn timed(&self, answered: Answered, table: &Named) -> Result<TimedReply, Failure> {
        self.link.timed(answered).map_err(|failure| self.naming_the_table(failure, table))
    }

    fn naming_the_table(&self, failure: Failure, table: &Named) -> Failure {
        match failure {
            Failure::Store(error) if error.kind == StoreErrorKind::Denied => {
                let (shown, said) = (table.shown(), error.message.trim_end_matches('.'));
                let grant = table.grant(&self.link.engine.config.user);
                StoreError::new(error.kind, format!("{shown}: {said}. It is given with {grant}")).into()
            }
            failure => failure,
        }
    }
}

impl Store for RethinkStore {
    fn acquire(&self, key: &Key, attempt: Attempt) -> Answer<Acquired> {
        // Most often there is no row, or one whose lease runs. Creating one, or hearing what is there, costs the
        // server a good deal less than the whole condition, which is asked where the row may be taken.
        let created = self.core.acquiring(Queries::create, key, &attempt);
        let (core, key) = (Arc::clone(&self.core), key.clone());
        Answer::later(async move {
            let mut answered = created.await?;
            if may_be_taken(&answered, attempt.token.hold) {
                answered = core.acquiring(Queries::acquire, &key, &attempt).await?;
            }
            core.acquired(&answered, &key, &attempt)
        })
    }

    fn release(&self, key: &Key, claim: Claim) -> Answer<Released> {
        let term = self.core.queries.release(key, claim);
        let key = key.clone();
        self.ask(term, move |timed| {
            Ok(if deleted(&timed.result, &key)? { Released::Released } else { Released::NotOurs })
        })
    }

    fn refresh(&self, batch: Vec<Renewal>) -> Answer<Vec<Result<Renewed, StoreError>>> {
        let parts = Parts::of(batch.iter().enumerate());
        let asked: Vec<_> = parts.iter().map(|part| self.refresh_part(part, &batch)).collect();
        let again = RethinkStore { core: Arc::clone(&self.core) };
        Answer::later(async move {
            let mut verdicts: Vec<Option<Result<Renewed, StoreError>>> = batch.iter().map(|_| None).collect();
            let mut missing = Vec::new();
            for (part, asked) in parts.into_iter().zip(asked) {
                match asked.await {
                    Ok(found) => {
                        for (index, verdict) in found {
                            verdicts[index] = Some(Ok(verdict));
                        }
                        missing.extend(part.into_iter().filter(|index| verdicts[*index].is_none()));
                    }
                    Err(error) => {
                        for index in part {
                            verdicts[index] = Some(Err(error.clone()));
                        }
                    }
                }
            }
            // A read may have missed a row; only a write knows for sure that it is gone.
            let asked: Vec<_> = missing.iter().map(|index| again.refresh_part(&[*index], &batch)).collect();
            for (index, asked) in missing.into_iter().zip(asked) {
                let verdict = asked.await.map(|found| found.first().map_or(Renewed::Lost, |(_, verdict)| *verdict));
                verdicts[index] = Some(verdict);
            }
            Ok(verdicts.into_iter().map(|verdict| verdict.unwrap_or(Ok(Renewed::Lost))).collect())
        })
    }

    fn step(&self, key: &Key, step: Step) -> Answer<Stepped> {
        let Step { owner, object, number, action } = step;
        let queries = self.core.queries.clone();
        match action {
            Action::Enter { hold, fresh, expire, not_after, identity } => {
                let (locked, asked_by) = (key.clone(), owner.clone());
                let body: Body = Arc::new(move |offset: &Offset| {
                    let not_after = offset.earliest(not_after);
                    let step = (object, number);
                    queries.enter(&locked, &asked_by, step, hold, fresh, expire, not_after, &identity).start()
                });
                let key = key.clone();
                self.ask_on(&self.core.locks, body, move |timed| {
                    let Some(after) = row_after(&timed.result, &key)? else { return Ok(Stepped::TooLate) };
                    let row = Row::read(after)?;
                    let last = last_step(after, &operation_name(object));
                    Ok(match present_hold(&row, &owner) {
                        Some((hold, count)) if last == number => {
                            Stepped::Entered { hold, count, applied: true, fence: None }
                        }
                        Some(_) if last > number => Stepped::TooLate,
                        _ => Stepped::Held { expires_in: expires_in(&row, timed.now_ms) },
                    })
                })
            }
            Action::Leave { hold, enter, fresh } => {
                let term = queries.leave(key, &owner, (object, number), hold, enter, fresh);
                let key = key.clone();
                self.ask(term, move |timed| {
                    let Some(after) = row_after(&timed.result, &key)? else {
                        let before = timed.result.pointer("/changes/0/old_val");
                        let was_there = before.is_some_and(|before| !before.is_null());
                        return Ok(if was_there { Stepped::Left { count: 0 } } else { Stepped::NotOurs });
                    };
                    // Somebody else's row may be anything.
                    let Ok(row) = Row::read(after) else { return Ok(Stepped::NotOurs) };
                    let (name, last) = (hold.unwrap_or(fresh), last_step(after, &operation_name(object)));
                    Ok(match present_hold(&row, &owner) {
                        Some((present, count)) if present == name && last >= number => Stepped::Left { count },
                        _ => Stepped::NotOurs,
                    })
                })
            }
            Action::Undo { enter } => {
                let term = queries.undo(key, &owner, (object, number), enter);
                let key = key.clone();
                self.ask(term, move |timed| row_after(&timed.result, &key).map(|_| Stepped::Undone))
            }
        }
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        let body = self.core.queries.find(key).start();
        let asked = self.core.link.ask(Arc::new(move |_| body.clone()));
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            match asked.await.map_err(Failure::from).and_then(|answered| core.timed(answered, &core.locks)) {
                Ok(TimedReply { result: Value::Null, .. }) => Ok(None),
                Ok(timed) => Row::read(&timed.result)?.record(timed.now_ms).map(Some),
                Err(failure) => core.nothing_where_there_is_no_table(failure).map(|()| None),
            }
        })
    }

    fn list(&self, filter: Filter) -> Answer<Vec<Record>> {
        let body = self.core.queries.list(filter).start();
        let asked = self.core.link.ask(Arc::new(move |_| body.clone()));
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            match all_items(asked.await?).await.map_err(|failure| core.naming_the_table(failure, &core.locks)) {
                Ok(items) => records(items),
                Err(failure) => core.nothing_where_there_is_no_table(failure).map(|()| Vec::new()),
            }
        })
    }

    fn break_seen(&self, record: &Record) -> Answer<Broken> {
        let term = self.core.queries.break_seen(record);
        let key = record.key.clone();
        self.ask(term, move |timed| Ok(if deleted(&timed.result, &key)? { Broken::Broken } else { Broken::Changed }))
    }

    fn fence(&self, key: &Key) -> Answer<u64> {
        let body = self.core.queries.fence(key).start();
        self.ask_on(&self.core.fences, Arc::new(move |_| body.clone()), |timed| {
            timed.result.get("fence").and_then(whole).ok_or_else(|| {
                StoreError::rejected(format!("a row of the table {FENCES} is no fence counter: {}", timed.result))
            })
        })
    }

    fn watch(&self, key: &Key) -> Box<dyn Watch> {
        Box::new(FeedWatch::new(&self.core.link, &self.core.queries, key))
    }

    fn prepare(&self) -> Answer<Readiness> {
        let body = self.core.queries.ping().start();
        let asking = self.core.asking(&self.core.locks, Arc::new(move |_| body.clone()));
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            match asking.await {
                Ok(_) => Ok(Readiness::Ready),
                Err(error) if sees_no_primary(&error) => {
                    let why = format!("{}: {}", core.locks.shown(), error.message);
                    Ok(Readiness::NotYet(StoreError::unreachable(why)))
                }
                Err(error) => Err(error),
            }
        })
    }

    fn ping(&self) -> Answer<Pong> {
        let body = self.core.queries.ping().start();
        let asked = self.core.link.ask(Arc::new(move |_| body.clone()));
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            let answered = asked.await?;
            let info = Arc::clone(&answered.connection.info);
            if let Err(failure) = core.timed(answered, &core.locks) {
                core.nothing_where_there_is_no_table(failure)?;
            }
            Ok(Pong {
                server: format!("RethinkDB {} at {} ({})", info.version, info.host, info.name),
                skew_ms: core.link.engine.clocks.ahead_of_ours(&info.id),
                caveats: core.caveats.recent(&core.link).await,
            })
        })
    }

    fn location(&self) -> String {
        self.core.link.engine.config.to_string()
    }

    fn margin(&self, expire: Duration) -> Duration {
        self.core.link.engine.clocks.margin(expire)
    }

    fn safety_check(&self, _waited: Duration) -> Duration {
        SAFETY_CHECK
    }

    fn awaited_elsewhere(&self, key: &Key) -> bool {
        self.core.contention.likely(key.hash())
    }
}

type Part = Vec<usize>;
type Asked = Pin<Box<dyn Future<Output = Result<Vec<(usize, Renewed)>, StoreError>> + Send>>;

impl RethinkStore {
    /// Renews one part of a batch. What it says nothing about, it has not found.
    fn refresh_part(&self, part: &[usize], batch: &[Renewal]) -> Asked {
        let queries = &self.core.queries;
        let asking = |term: Term| {
            let body = term.start();
            self.core.asking(&self.core.locks, Arc::new(move |_| body.clone()))
        };
        if let [index] = *part {
            let renewal = batch[index].clone();
            let asked = asking(match &renewal.proof {
                Proof::Plain(token) => queries.refresh_one(&renewal.key, *token, renewal.n, renewal.expire),
                Proof::Reentrant { owner, hold } => {
                    queries.refresh_reentrant(&renewal.key, owner, *hold, renewal.expire)
                }
            });
            return Box::pin(async move { Ok(vec![(index, verdict(&asked.await?.result, &renewal)?)]) });
        }
        let mut entries = Vec::with_capacity(part.len());
        let mut by_hash = HashMap::with_capacity(part.len());
        for &index in part {
            let renewal = &batch[index];
            if let Proof::Plain(token) = renewal.proof {
                let hash = renewal.key.hash();
                by_hash.insert(hash.base64(), (index, token.to_string(), renewal.n));
                entries.push(Entry { hash, token, n: renewal.n, expire: renewal.expire });
            }
        }
        let asked = asking(queries.refresh_many(&entries));
        Box::pin(async move {
            let timed = asked.await.map_err(|error| match error.kind {
                // Some rows may have been written before others failed.
                StoreErrorKind::Unreachable => StoreError::unknown(error.message),
                _ => error,
            })?;
            let rows =
                timed.result.as_array().ok_or_else(|| StoreError::unknown("the server's answer makes no sense"))?;
            let mut found = Vec::with_capacity(rows.len());
            for row in rows {
                let hash = row.get(0).and_then(Value::as_str).unwrap_or_default();
                let Some((index, token, n)) = by_hash.get(hash) else { continue };
                let ours = row.get(1).and_then(Value::as_str) == Some(token);
                let number = |index| row.get(index).and_then(whole);
                let applied = number(2).is_some_and(|before| before < *n) && number(3) == Some(*n);
                found.push((*index, if ours { Renewed::Renewed { applied } } else { Renewed::Lost }));
            }
            Ok(found)
        })
    }
}

/// Splits batches.
struct Parts;

impl Parts {
    /// Parts that one query each can renew: many plain holds of different keys, or one hold.
    fn of<'a>(batch: impl Iterator<Item = (usize, &'a Renewal)>) -> Vec<Part> {
        let mut alone = Vec::new();
        let mut parts: Vec<Part> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        let (mut present, mut bytes) = (Part::new(), 0);
        for (index, renewal) in batch {
            if matches!(renewal.proof, Proof::Reentrant { .. }) || !seen.insert(renewal.key.hash()) {
                alone.push(vec![index]);
                continue;
            }
            let length = renewal.key.as_str().len();
            if present.len() == MOST_ROWS || (bytes + length > MOST_KEY_BYTES && !present.is_empty()) {
                parts.push(std::mem::take(&mut present));
                bytes = 0;
            }
            present.push(index);
            bytes += length;
        }
        parts.push(present);
        parts.append(&mut alone);
        parts.retain(|part| !part.is_empty());
        parts
    }
}

/// What a renewal of one row came to. The verdict is what the row carries now, not what was counted.
fn verdict(result: &Value, renewal: &Renewal) -> Result<Renewed, StoreError> {
    let Some(after) = row_after(result, &renewal.key)? else { return Ok(Renewed::Lost) };
    let carries = |name: &str, text: &str| after.get(name).and_then(Value::as_str) == Some(text);
    Ok(match &renewal.proof {
        Proof::Plain(token) if carries(field::INSTANCE_TOKEN, &token.to_string()) => {
            Renewed::Renewed { applied: was_applied(result, renewal.n) }
        }
        Proof::Reentrant { owner, hold }
            if carries(field::INSTANCE_TOKEN, &owner.0) && carries(field::HOLD, &hold.to_string()) =>
        {
            Renewed::Renewed { applied: true }
        }
        Proof::Plain(_) | Proof::Reentrant { .. } => Renewed::Lost,
    })
}

/// How the server begins to say that there is a row already; what follows shows it
/// (RethinkDB src/rdb_protocol/table_common.cc: `resolve_insert_conflict`).
const DUPLICATE: &str = "Duplicate primary key";

/// Whether a row that was there instead of being created is this hold's, or one whose lease is over.
fn may_be_taken(timed: &TimedReply, hold: HoldId) -> bool {
    let said = timed.result.get("first_error").and_then(Value::as_str);
    let Some(row) = timed.result.pointer("/changes/0/new_val") else { return false };
    let Some(Ok(row)) = said.filter(|said| said.starts_with(DUPLICATE)).map(|_| Row::read(row)) else { return false };
    row.expires_at_ms < timed.now_ms || Token::parse(&row.token).is_some_and(|present| present.hold == hold)
}

/// The row as a write left it; `None` where there is none, or the replace was not done at all.
fn row_after<'a>(result: &'a Value, key: &Key) -> Result<Option<&'a Value>, StoreError> {
    if result.is_null() {
        return Ok(None);
    }
    no_errors(result, key)?;
    match result.pointer("/changes/0/new_val") {
        Some(Value::Null) => Ok(None),
        Some(row) => Ok(Some(row)),
        None => Err(StoreError::unknown("the server's answer does not say what became of the row")),
    }
}

/// Whether a replace that left our token in the row wrote its number too: not one that found it there, nor
/// a higher one.
fn was_applied(result: &Value, n: u64) -> bool {
    let at = |row: &str, name: &str| result.pointer(&format!("/changes/0/{row}/{name}"));
    let number = |row: &str| at(row, field::N).and_then(whole);
    let took_over = at("old_val", field::INSTANCE_TOKEN) != at("new_val", field::INSTANCE_TOKEN);
    number("new_val") == Some(n) && (took_over || number("old_val").unwrap_or(0) < n)
}

/// Whether a replace that only we told to delete did so.
fn deleted(result: &Value, key: &Key) -> Result<bool, StoreError> {
    no_errors(result, key)?;
    let count = result.get("deleted").and_then(whole);
    Ok(count.ok_or_else(|| StoreError::unknown("the server's answer does not say whether it deleted"))? == 1)
}

fn no_errors(result: &Value, key: &Key) -> Result<(), StoreError> {
    match result.get("first_error").and_then(Value::as_str).filter(|said| !said.starts_with(DUPLICATE)) {
        None => Ok(()),
        Some(said) => Err(StoreError::rejected(format!("the row of {}: {said}", key.quoted()))),
    }
}

/// How long a lease still runs. It is over when its end is *before* the server's now, and both are
/// whole milliseconds.
fn expires_in(row: &Row, now_ms: u64) -> Duration {
    Duration::from_millis(row.expires_at_ms.saturating_sub(now_ms).saturating_add(1))
}

/// The hold and count of a row that carries the owner token.
fn present_hold(row: &Row, owner: &OwnerToken) -> Option<(HoldId, u32)> {
    let reentrant = row.reentrant.as_ref().filter(|_| row.token == *owner.0)?;
    Some((reentrant.hold?, reentrant.count))
}

fn last_step(row: &Value, object: &str) -> u64 {
    row.get(field::OPS).and_then(|operations| operations.get(object)).and_then(whole).unwrap_or(0)
}

/// All of a stream.
async fn all_items(mut answered: Answered) -> Result<Vec<Value>, Failure> {
    let mut all = Vec::new();
    loop {
        match reply::read(&answered.body)? {
            Reply::Atom(Value::Array(items)) => {
                all.extend(items);
                return Ok(all);
            }
            Reply::Atom(_) => return Err(StoreError::unknown("the server's answer makes no sense").into()),
            Reply::Items { items, more } => {
                all.extend(items);
                if !more {
                    return Ok(all);
                }
            }
        }
        answered = answered.connection.resume(answered.token).await?;
    }
}

fn sees_no_primary(error: &StoreError) -> bool {
    Failure::Store(error.clone()).sees_no_primary()
}

/// The records of a list, in whose midst the server's now stands.
fn records(items: Vec<Value>) -> Result<Vec<Record>, StoreError> {
    let now = items.iter().find_map(Value::as_f64);
    let now_ms = seconds_to_ms(now.ok_or_else(|| StoreError::unknown("the list does not say when it was made"))?);
    let rows = items.iter().filter(|item| !item.is_number());
    let read = rows.filter_map(|row| match Row::read(row).and_then(|row| row.record(now_ms)) {
        Ok(record) => Some(record),
        Err(error) => {
            // One such row must not hide all others.
            tracing::warn!("left out of a list: {error}");
            None
        }
    });
    Ok(read.collect())
}
