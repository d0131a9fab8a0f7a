//! The RethinkDB store: the table of NoBrainer's locks.

use std::sync::Arc;

use crate::error::Error;
use crate::store::{Store, StoreOptions};
use crate::url::Url;

pub fn open(_url: &Url, _options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    Err(Error::invalid_argument("rethinkdb: is not built yet"))
}
