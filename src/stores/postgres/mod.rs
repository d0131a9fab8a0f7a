//! The PostgreSQL store: one table of locks.
//!
//! `statements` says what is asked and `store` what the answers mean; `row` reads a row. Below them `servers`
//! reaches one of the URL's hosts over a `socket`, `connection` runs the driver's connection, sends statements and
//! cancels them, `sqlstate` says what the server's errors mean, `table` makes the table, and `listening` wakes
//! waiters.

mod caveats;
mod channel;
mod connection;
mod environment;
mod listening;
mod row;
mod servers;
mod socket;
mod sqlstate;
mod statements;
mod store;
mod table;
mod url;

use std::sync::Arc;

use self::store::PostgresStore;
use self::url::Config;
use crate::error::Error;
use crate::store::{Store, StoreOptions};
use crate::stores::network::open_stores::OpenStores;
use crate::url::Url;

pub use self::table::schema;

static OPEN: OpenStores<Config, PostgresStore> = OpenStores::new();

/// Opens the store. Within a process it is one store, and one connection, however often it is opened.
///
/// Does not wait, and does not touch the network: connecting is the first operation's.
pub fn open(url: &Url, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    let config = Config::from_url(url, options, environment::variable)?;
    Ok(OPEN.get_or_open(config, PostgresStore::new))
}
