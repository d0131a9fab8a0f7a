//! The operations of the store: a command each, and what its reply means.

use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::caveats;
use super::commands::{Command, Commands};
use super::connection::Answered;
use super::failure;
use super::greeting;
use super::resp::Value;
use super::servers::{Link, Servers};
use super::url::Config;
use super::value::{self, Found};
use super::watch::{Silent, TrackedWatch};
use crate::key::Key;
use crate::protocol::{Change, Reply, Write};
use crate::record::{Identity, Record};
use crate::store::{
    Answer, ClockSteps, Cursor, Filter, Page, Pong, Readiness, Store, StoreError, StoreErrorKind, Watch,
};
use crate::stores::network::contention::Contention;
use crate::stores::network::link;

/// How often a waiter looks without a notification (R10).
const SAFETY_CHECK: Duration = Duration::from_secs(5);

/// The shortest time between two looks of a waiter where the server does not tell of changes. It grows with the time
/// waited.
const SHORTEST_POLL: Duration = Duration::from_millis(100);

/// How many changes go to the server in one part of a batch.
const BATCH: usize = 512;

pub struct RedisStore {
    core: Arc<Core>,
}

/// What operations under way keep alive.
struct Core {
    link: Arc<Link>,
    commands: Commands,
    contention: Contention,
    warned: AtomicBool,
}

impl RedisStore {
    pub fn new(config: Config) -> RedisStore {
        RedisStore {
            core: Arc::new(Core {
                commands: Commands::new(&config.prefix),
                contention: Contention::default(),
                warned: AtomicBool::new(false),
                link: link::Link::new(Servers::new(config)),
            }),
        }
    }
}

/// A batch has as many replies as commands; one command has one.
fn only(answered: &mut Answered) -> Result<Value, StoreError> {
    answered.replies.pop().ok_or_else(StoreError::unexpected_reply)
}

fn positive(fence: i64) -> Option<u64> {
    u64::try_from(fence).ok().filter(|fence| *fence > 0)
}

fn of_key(key: &Key) -> String {
    format!("the key {}", key.quoted())
}

/// What a script found at a key: its time to live, and what is there.
fn found<'a>(ttl: &Value, rest: &'a [Value]) -> Result<(i64, Found<'a>), StoreError> {
    let ttl = ttl.as_integer().ok_or_else(StoreError::unexpected_reply)?;
    match rest {
        [Value::Text(value)] => Ok((ttl, Found::Value(value))),
        [digest, Value::Integer(1)] => {
            Ok((ttl, Found::Digest(digest.as_text().ok_or_else(StoreError::unexpected_reply)?)))
        }
        _ => Err(StoreError::unexpected_reply()),
    }
}

impl Core {
    /// Sends one command, at once.
    fn ask_one(&self, command: Command) -> impl Future<Output = Result<Answered, StoreError>> + Send + use<> {
        self.link.ask(Arc::new([command]))
    }

    /// The result of a change: too late, found otherwise, or applied.
    fn changed(&self, reply: Value, answered: &Answered, key: &Key, change: &Change) -> Result<Reply, StoreError> {
        let changed = self.read_changed(reply, answered, key, change);
        if changed.as_ref().is_err_and(|error| error.kind == StoreErrorKind::Unknown) {
            // Replies that do not fit their requests may belong to others.
            answered.connection.leave("the server sent an unexpected reply");
        }
        changed
    }

    fn read_changed(&self, reply: Value, answered: &Answered, key: &Key, change: &Change) -> Result<Reply, StoreError> {
        let items = match reply {
            Value::Error(said) => return Err(self.not_changed(&said, answered, key, change)),
            Value::Integer(now_ms) => {
                self.link.observe(answered, now_ms);
                return Ok(Reply::TooLate);
            }
            // The shortest answer: a fence that is the server's time in microseconds, or 0.
            Value::Text(fence) => {
                let fence = str::from_utf8(&fence).ok().and_then(|fence| fence.parse::<i64>().ok());
                let fence = fence.ok_or_else(StoreError::unexpected_reply)?;
                self.link.observe(answered, fence / 1000);
                let fence = positive(fence);
                return match &change.write {
                    // A grant has a fence.
                    Write::Put(_) if fence.is_none() => Err(StoreError::unexpected_reply()),
                    _ => Ok(Reply::Applied { fence }),
                };
            }
            Value::Array(items) => items,
            _ => return Err(StoreError::unexpected_reply()),
        };
        let now_ms = items.first().and_then(Value::as_integer).ok_or_else(StoreError::unexpected_reply)?;
        self.link.observe(answered, now_ms);
        match &items[1..] {
            [] => Ok(Reply::Found(None)),
            [fence] => {
                let fence = fence.as_integer().ok_or_else(StoreError::unexpected_reply)?;
                Ok(Reply::Applied { fence: positive(fence) })
            }
            [ttl, rest @ ..] => {
                let (ttl, found) = found(ttl, rest)?;
                let record = value::record(key, found, ttl, now_ms);
                if let Write::Put(new) = &change.write {
                    self.note_contention(key, &record, &new.identity);
                }
                Ok(Reply::Found(Some(Box::new(record))))
            }
        }
    }

    /// The error of a change. Nothing was applied.
    ///
    /// A server without memory, or that cannot save its data, refuses grants. A hold that ends or is renewed is asked
    /// for again instead: the server may do it soon.
    fn not_changed(&self, said: &str, answered: &Answered, key: &Key, change: &Change) -> StoreError {
        let error = self.link.failed(said, &of_key(key), &answered.connection);
        match error.kind {
            StoreErrorKind::Resources if !matches!(change.write, Write::Put(_)) => {
                StoreError::unreachable(error.message)
            }
            _ => error,
        }
    }

    /// Another process was seen to have the lock.
    fn note_contention(&self, key: &Key, record: &Record, us: &Identity) {
        if record.owner.as_ref().is_none_or(|owner| owner.pid != us.pid || owner.boot_id != us.boot_id) {
            self.contention.seen(key.hash());
        }
    }

    /// What the look script found, and the server's now.
    fn looked(&self, answered: &mut Answered, of: &str) -> Result<(i64, Vec<Value>), StoreError> {
        match only(answered)? {
            Value::Error(said) => Err(self.link.failed(&said, of, &answered.connection)),
            Value::Array(mut items) if !items.is_empty() => {
                let now_ms = items.remove(0).as_integer().ok_or_else(StoreError::unexpected_reply)?;
                self.link.observe(answered, now_ms);
                Ok((now_ms, items))
            }
            _ => Err(StoreError::unexpected_reply()),
        }
    }

    /// The record of a key, as the look script found it. `None`: nothing is there, or nothing that is a string.
    fn looked_at(&self, item: &Value, key: &Key, now_ms: i64) -> Result<Option<Record>, StoreError> {
        match item {
            Value::Null | Value::Integer(_) => Ok(None),
            Value::Array(parts) => {
                let (ttl, rest) = parts.split_first().ok_or_else(StoreError::unexpected_reply)?;
                let (ttl, found) = found(ttl, rest)?;
                Ok(Some(value::record(key, found, ttl, now_ms)))
            }
            _ => Err(StoreError::unexpected_reply()),
        }
    }

    /// One part of a list, and where the next begins.
    async fn page(&self, from: Vec<u8>) -> Result<Page, StoreError> {
        let mut answered = self.ask_one(self.commands.scan(&from)).await?;
        let (next, names) = match only(&mut answered)? {
            Value::Error(said) => return Err(self.link.failed(&said, "the list of locks", &answered.connection)),
            Value::Array(parts) => match <[Value; 2]>::try_from(parts) {
                Ok([Value::Text(next), Value::Array(names)]) => (next, names),
                _ => return Err(StoreError::unexpected_reply()),
            },
            _ => return Err(StoreError::unexpected_reply()),
        };
        // A server may name a key twice. What is not UTF-8 is no key of a lock.
        let mut seen = HashSet::new();
        let keys: Vec<(&str, Key)> = names
            .iter()
            .filter_map(Value::as_text)
            .filter(|name| seen.insert(*name))
            .filter_map(|name| Some((name, self.commands.key_of(name)?)))
            .collect();
        let mut records = Vec::with_capacity(keys.len());
        if !keys.is_empty() {
            let names: Vec<&str> = keys.iter().map(|(name, _)| *name).collect();
            let mut answered = self.ask_one(self.commands.look(&names)).await?;
            let (now_ms, items) = self.looked(&mut answered, "the list of locks")?;
            for ((_, key), item) in keys.iter().zip(&items) {
                records.extend(self.looked_at(item, key, now_ms)?);
            }
        }
        let next = (next != b"0").then(|| Cursor(next.into_boxed_slice()));
        Ok(Page { records, next })
    }

    /// The server's time, and what it says of itself.
    async fn introspect(&self) -> Result<(Answered, Vec<String>), StoreError> {
        let save: &[&[u8]] = &[b"CONFIG", b"GET", b"save"];
        let commands = [Command::plain(&[b"TIME"]), Command::plain(&[b"INFO"]), Command::plain(save)];
        let answered = self.link.ask(Arc::new(commands)).await?;
        match &answered.replies[..] {
            [Value::Error(said), ..] => Err(self.link.failed(said, "TIME", &answered.connection)),
            [time, info, save] => {
                let now_ms = greeting::milliseconds(time).ok_or_else(StoreError::unexpected_reply)?;
                self.link.observe(&answered, i64::try_from(now_ms).unwrap_or(0));
                let caveats = caveats::found(info.as_text().unwrap_or_default(), Some(save));
                Ok((answered, caveats))
            }
            _ => Err(StoreError::unexpected_reply()),
        }
    }
}

impl Store for RedisStore {
    fn change(&self, key: &Key, change: Change) -> Answer<Reply> {
        let asked = match self.core.commands.change(key, &change) {
            Ok(command) => self.core.ask_one(command),
            Err(error) => return Answer::Now(Err(error)),
        };
        let (core, key) = (Arc::clone(&self.core), key.clone());
        Answer::later(async move {
            let mut answered = asked.await?;
            let reply = only(&mut answered)?;
            core.changed(reply, &answered, &key, &change)
        })
    }

    fn change_many(&self, changes: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>> {
        let mut replies: Vec<Option<Result<Reply, StoreError>>> = Vec::with_capacity(changes.len());
        let mut parts: Vec<(Vec<usize>, Vec<Command>)> = Vec::new();
        for (index, (key, change)) in changes.iter().enumerate() {
            match self.core.commands.change(key, change) {
                Ok(command) => {
                    replies.push(None);
                    if parts.last().is_none_or(|(indices, _)| indices.len() == BATCH) {
                        parts.push((Vec::new(), Vec::new()));
                    }
                    if let Some((indices, commands)) = parts.last_mut() {
                        indices.push(index);
                        commands.push(command);
                    }
                }
                Err(error) => replies.push(Some(Err(error))),
            }
        }
        let asked: Vec<_> =
            parts.into_iter().map(|(indices, commands)| (indices, self.core.link.ask(commands.into()))).collect();
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            for (indices, asked) in asked {
                match asked.await {
                    Ok(mut answered) => {
                        let each = std::mem::take(&mut answered.replies);
                        for (index, reply) in indices.into_iter().zip(each) {
                            let (key, change) = &changes[index];
                            replies[index] = Some(core.changed(reply, &answered, key, change));
                        }
                    }
                    Err(error) => {
                        for index in indices {
                            replies[index] = Some(Err(error.clone()));
                        }
                    }
                }
            }
            Ok(replies.into_iter().map(|reply| reply.unwrap_or_else(|| Err(StoreError::unexpected_reply()))).collect())
        })
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        let asked = match self.core.commands.full_key(key) {
            Ok(name) => self.core.ask_one(self.core.commands.look(&[&name])),
            Err(error) => return Answer::Now(Err(error)),
        };
        let (core, key) = (Arc::clone(&self.core), key.clone());
        Answer::later(async move {
            let mut answered = asked.await?;
            let (now_ms, items) = core.looked(&mut answered, &of_key(&key))?;
            match items.first() {
                Some(Value::Integer(_)) => Err(failure::error("WRONGTYPE", &of_key(&key), &core.link.engine.config)),
                Some(item) => core.looked_at(item, &key, now_ms),
                None => Err(StoreError::unexpected_reply()),
            }
        })
    }

    fn list(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page> {
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            match filter {
                Filter::All => core.page(from.map_or_else(|| b"0".to_vec(), |Cursor(cursor)| cursor.into_vec())).await,
                // The server has forgotten what is over. That it answers is to be known, though.
                Filter::Expired => core.introspect().await.map(|_| Page::default()),
            }
        })
    }

    fn fence(&self, key: &Key) -> Answer<u64> {
        let asked = match self.core.commands.fence(key) {
            Ok(command) => self.core.ask_one(command),
            Err(error) => return Answer::Now(Err(error)),
        };
        let (core, key) = (Arc::clone(&self.core), key.clone());
        Answer::later(async move {
            let mut answered = asked.await?;
            match only(&mut answered)? {
                Value::Integer(fence) => u64::try_from(fence).map_err(|_| StoreError::unexpected_reply()),
                Value::Error(said) => {
                    let of = format!("the counter of fences of the key {}", key.quoted());
                    Err(core.link.failed(&said, &of, &answered.connection))
                }
                _ => Err(StoreError::unexpected_reply()),
            }
        })
    }

    fn watch(&self, key: &Key) -> Box<dyn Watch> {
        match self.core.commands.full_key(key) {
            Ok(name) if self.core.link.engine.config.notify => Box::new(TrackedWatch::new(&self.core.link, name)),
            _ => Box::new(Silent),
        }
    }

    fn prepare(&self) -> Answer<Readiness> {
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            let (_, caveats) = core.introspect().await?;
            if !core.warned.swap(true, Ordering::Relaxed) {
                caveats.iter().for_each(|caveat| tracing::warn!("{caveat}"));
            }
            Ok(Readiness::Ready)
        })
    }

    fn ping(&self) -> Answer<Pong> {
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            let (answered, caveats) = core.introspect().await?;
            let info = &answered.connection.info;
            let skew_ms = core.link.engine.clocks.ahead_of_ours(&info.address);
            Ok(Pong { server: info.to_string(), skew_ms, caveats })
        })
    }

    fn location(&self) -> String {
        self.core.link.engine.config.to_string()
    }

    /// A Redis may be a cache, too.
    fn is_for_locks_alone(&self) -> bool {
        false
    }

    fn margin(&self, expire: Duration) -> Duration {
        self.core.link.engine.clocks.margin(expire)
    }

    fn clock_steps(&self) -> Option<&Arc<ClockSteps>> {
        Some(&self.core.link.engine.clocks.steps)
    }

    fn safety_check(&self, waited: Duration) -> Duration {
        let servers = &self.core.link.engine;
        match servers.tell_of_changes() {
            true => SAFETY_CHECK,
            false => (waited / 10).max(SHORTEST_POLL).min(servers.config.poll),
        }
    }

    fn awaited_elsewhere(&self, key: &Key) -> bool {
        self.core.contention.likely(key.hash())
    }
}
