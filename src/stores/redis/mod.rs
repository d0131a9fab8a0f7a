//! The Redis store, and Valkey's: one string for each lock, at the plain key where redis-py, redlock-rb, node-redlock
//! and redsync have theirs.
//!
//! `commands` and the scripts of `lua/` say what is asked, `value` what is stored, and `store` what the answers mean.
//! Below them `servers` reaches one of the URL's hosts (by `network`, then `greeting`), and `connection` runs the
//! connection (`resp`, `failure`). `watch` hears of changes.

mod caveats;
mod commands;
mod connection;
mod failure;
mod greeting;
mod resp;
mod servers;
mod store;
mod url;
mod value;
mod watch;
mod watches;

use std::sync::Arc;

use self::store::RedisStore;
use self::url::Config;
pub use self::url::SCHEMES;
use crate::error::Error;
use crate::store::{Store, StoreOptions};
use crate::stores::network::open_stores::OpenStores;
use crate::url::Url;

/// What reads a server's bytes, for tests and fuzzers of it: no part of the interface.
#[doc(hidden)]
pub mod fuzzing {
    pub use super::resp::{Decoder, Malformed, Value};
}

static OPEN: OpenStores<Config, RedisStore> = OpenStores::new();

/// Opens the store. Within a process it is one store, and one connection, however often it is opened.
///
/// Does not wait, and does not touch the network: connecting is the first operation's.
pub fn open(url: &Url, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    let config = Config::from_url(url, options)?;
    Ok(OPEN.get_or_open(config, RedisStore::new))
}
