//! The memory store.

use std::sync::Arc;

use crate::error::Error;
use crate::store::Store;
use crate::url::Url;

pub fn open(_url: &Url) -> Result<Arc<dyn Store>, Error> {
    Err(Error::invalid_argument("memory: is not built yet"))
}
