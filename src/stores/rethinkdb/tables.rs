//! Making the table, and where the URL allows it the database, when an operation finds it missing.
//!
//! Two servers, and even one, let two clients create the same name at once: both succeed, and the name
//! means neither until one is gone. So a client that created one looks again, takes its own away if there
//! are several, and tries again at random; and no client that saw it missing uses it before it was alone
//! for a while.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::ddl::{self, Named};
use super::reply::Failure;
use super::row::whole;
use super::servers::Link;
use crate::clock::Boottime;
use crate::store::{StoreError, StoreErrorKind};
use crate::sys::mutex::Mutex;
use crate::sys::random::random;
use crate::sys::runtime::sleep_until;

/// How long a name must mean one thing before it is used.
const ALONE: Duration = Duration::from_secs(1);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The longest pause before trying again.
const LONGEST_PAUSE: Duration = Duration::from_millis(700);
/// How many replicas a new table gets at most: of three, one may be lost and the other two go on.
pub const MOST_REPLICAS: u64 = 3;

/// How the server says that there are fewer servers than the replicas it was asked for
/// (RethinkDB src/clustering/administration/tables/generate_config.cc).
const TOO_FEW_SERVERS: &str = "replicas on servers with the tag";

/// After this, a name that means several things needs a person.
const GIVE_UP: Duration = Duration::from_secs(60);

/// What this store has seen made.
#[derive(Default)]
pub struct Tables {
    made: Mutex<HashMap<Named, Boottime>>,
    one_at_a_time: tokio::sync::Mutex<()>,
}

/// Makes what an operation that was sent at `missing_at` found missing. Goes on to its end once begun:
/// run it in a task of its own.
pub async fn make(tables: Arc<Tables>, link: Arc<Link>, named: Named, missing_at: Boottime) -> Result<(), StoreError> {
    let _alone = tables.one_at_a_time.lock().await;
    let made_since = tables.made.lock().get(&named).is_some_and(|made_at| *made_at > missing_at);
    if made_since {
        return Ok(());
    }
    Maker { link: &link, named: &named, own: None }.make().await?;
    tables.made.lock().insert(named, Boottime::now());
    Ok(())
}

struct Maker<'a> {
    link: &'a Arc<Link>,
    named: &'a Named,
    /// The id of the one that we created.
    own: Option<String>,
}

impl Maker<'_> {
    async fn make(&mut self) -> Result<(), StoreError> {
        let give_up_at = Boottime::now() + GIVE_UP;
        loop {
            let there = self.there().await?;
            match there.len() {
                0 => self.create().await?,
                1 if self.stays_alone(&there).await? => break,
                1 => {}
                _ => self.withdraw(&there).await?,
            }
            if give_up_at.has_passed() {
                return Err(StoreError::bad_config(format!(
                    "{} exists more than once: delete all but one, by id, in the server's table rethinkdb.{}",
                    self.named.shown(),
                    self.named.catalogue_name()
                )));
            }
        }
        if self.own.is_some() {
            tracing::info!("created {}", self.named.shown());
        }
        match self.named.wait(self.link.engine.config.op_timeout) {
            Some(wait) => match self.link.ask_term(&wait).await {
                Ok(_) => Ok(()),
                // Some accounts may not ask; the operation itself will tell.
                Err(Failure::Store(error)) if error.kind == StoreErrorKind::Denied => Ok(()),
                Err(failure) => Err(self.explain(failure)),
            },
            None => Ok(()),
        }
    }

    async fn there(&self) -> Result<Vec<String>, StoreError> {
        let found = self.link.ask_term(&self.named.ids()).await.map_err(|failure| self.explain(failure))?;
        let Value::Array(ids) = found.result else {
            return Err(StoreError::unknown("the server sent a list of tables of an unexpected form"));
        };
        Ok(ids.iter().filter_map(Value::as_str).map(str::to_string).collect())
    }

    async fn create(&mut self) -> Result<(), StoreError> {
        self.own = None;
        let replicas = self.replicas().await?;
        let mut created = self.link.ask_term(&self.named.create(replicas)).await;
        if matches!(&created, Err(failure) if failure.message().contains(TOO_FEW_SERVERS)) {
            // One has gone since they were counted.
            created = self.link.ask_term(&self.named.create(None)).await;
        }
        match created {
            Ok(created) => {
                let id = created.result.pointer("/config_changes/0/new_val/id").and_then(Value::as_str);
                self.own = id.map(str::to_string);
                Ok(())
            }
            // Another client was first. (NoBrainer goes by the same words.)
            Err(failure) if failure.message().contains("already exists") => {
                self.pause().await;
                Ok(())
            }
            Err(failure) => Err(self.explain(failure)),
        }
    }

    /// How many replicas the table gets: as many as there are servers, up to [`MOST_REPLICAS`]. `None`: one, which
    /// is what the server does by default.
    async fn replicas(&self) -> Result<Option<u64>, StoreError> {
        let Named::Table { database, table, .. } = self.named else { return Ok(None) };
        match self.link.ask_term(&ddl::servers()).await {
            Ok(servers) => Ok(whole(&servers.result).map(|servers| servers.clamp(1, MOST_REPLICAS))),
            Err(Failure::Store(error)) if error.may_pass() => Err(error),
            Err(failure) => {
                tracing::warn!(
                    "{} is created with one replica, since this account may not see how many servers there are ({}): \
                     on a cluster, set it with {}",
                    self.named.shown(),
                    failure.message(),
                    reconfigure(database, table)
                );
                Ok(None)
            }
        }
    }

    async fn stays_alone(&self, there: &[String]) -> Result<bool, StoreError> {
        let until = Boottime::now() + ALONE;
        while !until.has_passed() {
            sleep_until(Boottime::now() + LOOK_EVERY).await;
            if self.there().await? != there {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes ours away, whichever the others are.
    async fn withdraw(&mut self, there: &[String]) -> Result<(), StoreError> {
        if let Some(own) = self.own.take_if(|own| there.contains(own)) {
            match self.link.ask_term(&self.named.delete(&own)).await {
                Ok(_) => tracing::debug!("{} was created twice, and ours deleted", self.named.shown()),
                Err(failure) => {
                    // Whether it is gone is seen with the next look.
                    let error = self.explain(failure);
                    self.own = Some(own);
                    if !error.may_pass() {
                        return Err(error);
                    }
                }
            }
        }
        self.pause().await;
        Ok(())
    }

    async fn pause(&self) {
        let part = u32::from(u16::from_le_bytes(random()));
        sleep_until(Boottime::now() + LONGEST_PAUSE * part / (1 << 16)).await;
    }

    fn explain(&self, failure: Failure) -> StoreError {
        let shown = self.named.shown();
        match failure {
            Failure::NoDatabase(_) | Failure::NoTable(_) => missing(self.named),
            Failure::Ambiguous(message) => StoreError::unreachable(message),
            Failure::Store(error) if error.kind == StoreErrorKind::Denied => StoreError::new(
                StoreErrorKind::Denied,
                format!(
                    "{shown} does not exist, and this account may not create it: {}. Create it with {}",
                    error.message,
                    self.named.recipe()
                ),
            ),
            Failure::Store(error) => {
                StoreError::new(error.kind, format!("{shown} could not be created: {}", error.message))
            }
        }
    }
}

/// What a person would type to give a table more replicas.
pub fn reconfigure(database: &str, table: &str) -> String {
    format!("r.db({database:?}).table({table:?}).reconfigure({{shards: 1, replicas: {MOST_REPLICAS}}})")
}

/// What is not there, and how it is made.
pub fn missing(named: &Named) -> StoreError {
    let otherwise = match named {
        Named::Database(_) => ", or add create=1 to the store URL",
        Named::Table { .. } => "",
    };
    StoreError::bad_config(format!("{} does not exist: create it with {}{otherwise}", named.shown(), named.recipe()))
}

impl Named {
    pub fn shown(&self) -> String {
        match self {
            Named::Database(name) => format!("the database {name:?}"),
            Named::Table { database, table, .. } => format!("the table {:?}", format!("{database}.{table}")),
        }
    }

    /// What a person would type to let `user` lock, refresh, list and unlock.
    pub fn grant(&self, user: &str) -> String {
        match self {
            Named::Database(name) => format!("r.db({name:?}).grant({user:?}, {{read: true, write: true}})"),
            Named::Table { database, table, .. } => {
                format!("r.db({database:?}).table({table:?}).grant({user:?}, {{read: true, write: true}})")
            }
        }
    }

    /// What a person would type into the server's Data Explorer.
    fn recipe(&self) -> String {
        match self {
            Named::Database(name) => format!("r.dbCreate({name:?})"),
            Named::Table { database, table, primary_key } => {
                format!("r.db({database:?}).tableCreate({table:?}, {{primaryKey: {primary_key:?}}})")
            }
        }
    }

    fn catalogue_name(&self) -> &'static str {
        match self {
            Named::Database(_) => "db_config",
            Named::Table { .. } => "table_config",
        }
    }
}
