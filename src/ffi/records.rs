//! A list of records.

use super::error::Failure;
use crate::client::{Broken, Client};
use crate::error::Error;
use crate::record::Record;
use crate::store::Answer;

/// Records, and the client they came from.
#[derive(Default)]
pub(crate) struct List {
    pub records: Vec<Record>,
    pub client: Option<Client>,
}

impl List {
    pub fn get(&self, index: usize) -> Result<&Record, Failure> {
        self.records.get(index).ok_or_else(|| {
            Failure::invalid_argument(format!("index is {index}: the list has {} records", self.records.len()))
        })
    }

    /// Breaks the record at `index` if it is as it was found.
    pub fn break_seen(&self, index: usize) -> Result<(Answer<Broken, Error>, String), Failure> {
        let record = self.get(index)?;
        let client = self.client.as_ref().ok_or_else(|| Failure::invalid_argument("the list has no client"))?;
        let changed = format!("the record of {} has changed since it was read", record.key.quoted());
        Ok((client.break_seen(record), changed))
    }
}
