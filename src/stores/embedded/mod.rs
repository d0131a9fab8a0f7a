//! The embedded store: LMDB, shared by the processes of one machine.

use std::sync::Arc;

use crate::error::Error;
use crate::store::{Store, StoreOptions};
use crate::url::Url;

pub fn open(_url: &Url, _options: &StoreOptions) -> Result<Arc<dyn Store>, Error> {
    Err(Error::invalid_argument("embedded: is not built yet"))
}
