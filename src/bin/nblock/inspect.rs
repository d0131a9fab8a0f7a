//! `nblock list` and `nblock show`.

use nblock::client::Client;
use nblock::record::Record;
use nblock::runtime;
use nblock::store::Filter;
use serde_json::Value;

use crate::arguments::{List, Show};
use crate::failure::{Failure, status, write_out};
use crate::{key, open, table};

pub fn list(url: Option<&str>, list: &List) -> Result<u8, Failure> {
    let records = sorted(&open(url)?, if list.expired { Filter::Expired } else { Filter::All })?;
    if list.json {
        let records: Value = records.iter().map(table::as_json).collect();
        write_out(&format!("{records:#}\n"))?;
    } else {
        write_out(&table::table(&records))?;
    }
    Ok(0)
}

pub fn show(url: Option<&str>, show: &Show) -> Result<u8, Failure> {
    let key = key(&show.key)?;
    match runtime::wait(open(url)?.find(&key))? {
        Some(record) if show.json => write_out(&format!("{:#}\n", table::as_json(&record)))?,
        Some(record) => write_out(&table::details(&record))?,
        None => return Err(Failure::new(status::NOTHING, format!("nobody holds {}", key.quoted()))),
    }
    Ok(0)
}

/// The records of a store, by key.
pub fn sorted(client: &Client, filter: Filter) -> Result<Vec<Record>, Failure> {
    let mut records = runtime::wait(client.list(filter))?;
    records.sort_by(|a, b| a.key.as_str().cmp(b.key.as_str()));
    Ok(records)
}
