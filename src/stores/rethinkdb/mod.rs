//! The RethinkDB store: the table of NoBrainer's locks.
//!
//! `queries` says what is asked and `store` what the answers mean. Below them `servers` reaches one of the URL's
//! hosts (by `network`, then `handshake`, `scram`, `server_info`), `connection` runs the connection (`frame`,
//! `reply`), and `network` has what is no matter of RethinkDB.

mod caveats;
mod connection;
mod ddl;
mod feed;
mod frame;
mod handshake;
mod queries;
mod reply;
mod row;
mod scram;
mod server_info;
mod servers;
mod store;
mod tables;
mod term;
#[cfg(test)]
mod testing;
mod url;

use std::sync::Arc;

use self::store::RethinkStore;
use self::url::Config;
pub use self::url::from_nobrainers_environment;
use crate::error::Error;
use crate::store::{Store, StoreOptions};
use crate::stores::network::open_stores::OpenStores;
use crate::url::Url;

/// What reads a server's bytes, for tests and fuzzers of it: no part of the interface.
#[doc(hidden)]
pub mod fuzzing {
    pub use super::frame::{Decoder, Frame, MAX_BODY, TooLong, write};
    pub use super::handshake::{MAX_MESSAGE, shake_hands};
    pub use super::reply::{Failure, ServerAnswer, has_more, read};
    pub use super::row::{REENTRANT_TYPE, Row, TIME_TYPE, entries_value, field};
    pub use super::scram::{First, MAX_ITERATIONS};
    pub use crate::stores::network::secret::Secret;
    pub use crate::stores::network::stream::Duplex;
}

static OPEN: OpenStores<Config, RethinkStore> = OpenStores::new();

/// Opens the store. Within a process it is one store, and one connection, however often it is opened.
///
/// Does not wait, and does not touch the network: connecting is the first operation's.
pub fn open(url: &Url, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    let config = Config::from_url(url, options)?;
    Ok(OPEN.get_or_open(config, RethinkStore::new))
}
