//! The RethinkDB store: the table of NoBrainer's locks.
//!
//! `queries` says what is asked and `store` what the answers mean. Below them `link` keeps a connection
//! to one of the URL's hosts: `dial` gets it (`wire`, `tls`, `handshake`, `scram`, `introduce`),
//! `connection` runs it (`frame`, `reply`), `skew` learns the servers' clocks from it.

mod connection;
mod dial;
mod feed;
mod frame;
mod handshake;
mod introduce;
mod link;
mod queries;
mod reply;
mod row;
mod scram;
mod skew;
mod store;
mod tables;
mod term;
#[cfg(test)]
mod testing;
mod tls;
mod url;
mod wire;

use std::sync::Arc;

pub use self::url::from_nobrainers_environment;
use crate::error::Error;
use crate::store::{Store, StoreOptions};
use crate::url::Url;

/// Opens the store. Does not wait, and does not touch the network: connecting is the first operation's.
pub fn open(url: &Url, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    Ok(Arc::new(store::RethinkStore::new(self::url::Config::from_url(url, options)?)))
}
