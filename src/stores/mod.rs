//! The stores, one module each, and the only place that knows their names.

pub mod embedded;
pub mod memory;
#[doc(hidden)]
pub mod network;
pub mod postgres;
pub mod redis;
pub mod rethinkdb;
pub mod settings;

use std::cell::RefCell;
use std::sync::Arc;

use self::settings::Machine;
use crate::error::{Error, ErrorKind};
use crate::store::{Store, StoreOptions};
use crate::url::Url;

/// The environment variable that names the store if the program does not.
const VARIABLE: &str = "NBLOCK_URL";

/// The choice of a store. It is made once: the store is opened again by the same choice, also in a forked child (R25).
pub struct Choice {
    pub url: Url,
    pub why: String,
    /// Where the URL was found, if the program did not give it.
    source: Option<&'static str>,
    /// Embedded store only.
    place: Option<embedded::Place>,
}

impl Choice {
    /// Chooses the store for a URL, or without one. May read the environment and the file system.
    pub fn make(given: Option<&str>) -> Result<Choice, Error> {
        let (url, why, source) = chosen(given)?;
        Choice::of(url, why, source)
    }

    fn of(url: Url, why: String, source: Option<&'static str>) -> Result<Choice, Error> {
        let place = (url.scheme == "embedded").then(|| embedded::Place::choose(&url)).transpose();
        Ok(Choice { place: place.map_err(|error| naming(source, error))?, url, why, source })
    }

    /// Whether other machines may use it.
    pub fn is_shared_by_machines(&self) -> bool {
        is_shared_by_machines(&self.url)
    }

    /// Opens the store.
    pub fn open(&self, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
        self.open_unnamed(options).map_err(|error| naming(self.source, error))
    }

    fn open_unnamed(&self, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
        match (&self.place, self.url.scheme.as_str()) {
            (Some(place), _) => embedded::open(place.clone(), options),
            (None, "memory") => memory::open(&self.url),
            (None, "rethinkdb") => rethinkdb::open(&self.url, options),
            (None, "postgres" | "postgresql") => postgres::open(&self.url, options),
            (None, scheme) if redis::SCHEMES.contains(&scheme) => redis::open(&self.url, options),
            (None, other) => Err(Error::invalid_argument(format!(
                "store URL must begin with embedded:, memory:, redis://, postgres:// or rethinkdb:// (got {other:?})"
            ))),
        }
    }
}

/// Whether other machines may use the store that a URL names.
pub fn is_shared_by_machines(url: &Url) -> bool {
    !matches!(url.scheme.as_str(), "memory" | "embedded")
}

/// Opens the store that a URL names.
pub fn open(url: &Url, options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    Choice::of(url.clone(), String::new(), None)?.open(options)
}

/// The store URL that a client uses, and why: the one given, else `NBLOCK_URL`, else NoBrainer's
/// environment, else the machine's file, else the embedded store.
pub fn url_to_use(given: Option<&str>) -> Result<(Url, String), Error> {
    chosen(given).map(|(url, why, _)| (url, why))
}

/// The store URL that a client uses, why, and where it was found if the program did not give it.
fn chosen(given: Option<&str>) -> Result<(Url, String, Option<&'static str>), Error> {
    if let Some(url) = given {
        return Ok((Url::parse(url)?, "given by the caller".to_string(), None));
    }
    // All variables that can choose the store.
    const NAMES: [&str; 6] = [VARIABLE, embedded::VARIABLE, "RETHINKDB_URL", "RDB_URL", "RETHINKDB_DB", "RDB_DB"];
    let ignored = settings::ignored(&NAMES).join(", ");
    let because = |why: &str| match ignored.is_empty() {
        true => why.to_string(),
        false => format!("{why}; {ignored} ignored, because this program runs with more rights than its caller"),
    };
    if !ignored.is_empty() {
        tracing::warn!("{ignored} ignored: this program runs with more rights than its caller");
    }
    if let Some(text) = settings::variable(VARIABLE)? {
        return Ok((parse(&text, VARIABLE)?, because("from NBLOCK_URL"), Some(VARIABLE)));
    }
    let refused = RefCell::new(None);
    let nobrainers = rethinkdb::from_nobrainers_environment(|name| {
        settings::variable(name).unwrap_or_else(|error| {
            refused.borrow_mut().get_or_insert(error);
            None
        })
    });
    if let Some(error) = refused.into_inner() {
        return Err(error);
    }
    if let Some(url) = nobrainers {
        return Ok((url?, because("from NoBrainer's environment"), Some("NoBrainer's environment")));
    }
    if let Some(text) = Machine::read()?.url {
        let source = settings::MACHINE_FILE;
        return Ok((parse(&text, source)?, because("from /etc/nblock.conf"), Some(source)));
    }
    Ok((Url::parse("embedded:")?, because("the default: no other store is configured"), None))
}

fn parse(text: &str, source: &'static str) -> Result<Url, Error> {
    Url::parse(text).map_err(|error| naming(Some(source), error))
}

/// Adds to an error about a URL where the URL was found.
fn naming(source: Option<&'static str>, error: Error) -> Error {
    match source {
        Some(source) if error.kind() == ErrorKind::InvalidArgument => {
            Error::new(error.kind(), format!("{source}: {}", error.message()))
        }
        _ => error,
    }
}
