//! The stores, one room each, and the one function that knows their names.

pub mod embedded;
pub mod memory;
#[doc(hidden)]
pub mod network;
pub mod postgres;
pub mod rethinkdb;

use std::sync::Arc;

use crate::error::Error;
use crate::store::{Store, StoreOptions};
use crate::url::Url;

/// Opens the store that a URL names.
pub fn open(url: &Url, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    match url.scheme.as_str() {
        "memory" => memory::open(url),
        "embedded" => embedded::open(url, options),
        "rethinkdb" => rethinkdb::open(url, options),
        "postgres" | "postgresql" => postgres::open(url, options),
        other => Err(Error::invalid_argument(format!(
            "store URL begins with {other:?}: write embedded:, memory:, rethinkdb://... or postgres://..."
        ))),
    }
}

/// The store URL that a client uses, and why: the one given, else `NBLOCK_URL`, else NoBrainer's
/// environment, else the embedded store.
pub fn url_to_use(given: Option<&str>) -> Result<(Url, &'static str), Error> {
    if let Some(url) = given {
        return Ok((Url::parse(url)?, "it was given"));
    }
    if let Ok(url) = std::env::var("NBLOCK_URL")
        && !url.is_empty()
    {
        return Ok((Url::parse(&url)?, "NBLOCK_URL says so"));
    }
    if let Some(url) = rethinkdb::from_nobrainers_environment(|name| std::env::var(name).ok()) {
        return Ok((url?, "NoBrainer's environment says so"));
    }
    Ok((Url::parse("embedded:")?, "nothing else was named"))
}
