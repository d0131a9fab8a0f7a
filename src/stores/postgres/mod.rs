//! The PostgreSQL store: one table of locks.
//!
//! `statements` says what is asked and `store` what the answers mean; `row` reads a row. Below them `servers`
//! reaches one of the URL's hosts, `connection` runs the driver's connection and sends statements, `sqlstate` says
//! what the server's errors mean, `table` makes the table, and `listening` wakes waiters.

mod caveats;
mod connection;
mod environment;
mod listening;
mod row;
mod servers;
mod sqlstate;
mod statements;
mod store;
mod table;
mod url;

use std::sync::{Arc, Weak};

use self::store::PostgresStore;
use self::url::Config;
use crate::error::Error;
use crate::store::{Store, StoreOptions};
use crate::sys::mutex::Mutex;
use crate::sys::process::PerProcess;
use crate::url::Url;

pub use self::table::schema;

/// The stores that this process has open, by all that their URLs and options say.
type OpenStores = Vec<(Config, Weak<PostgresStore>)>;

static OPEN: PerProcess<Mutex<OpenStores>> = PerProcess::new();

/// Opens the store. Within a process it is one store, and one connection, however often it is opened.
///
/// Does not wait, and does not touch the network: connecting is the first operation's.
pub fn open(url: &Url, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    let config = Config::from_url(url, options, environment::variable)?;
    let mut open = OPEN.get_or_init(|_| Mutex::default()).lock();
    open.retain(|(_, store)| store.strong_count() > 0);
    let known = open.iter().find(|(known, _)| *known == config).and_then(|(_, store)| store.upgrade());
    Ok(known.unwrap_or_else(|| {
        let store = Arc::new(PostgresStore::new(config.clone()));
        open.push((config, Arc::downgrade(&store)));
        store
    }))
}
