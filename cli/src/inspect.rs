//! `nblock list` and `nblock show`.

use std::cmp::Reverse;
use std::time::Duration;

use nblock::client::Client;
use nblock::key::Key;
use nblock::record::{Lease, Record};
use nblock::store::Filter;
use nblock::sys::runtime;
use serde_json::Value;

use crate::arguments::{List, Order, Selection, Show};
use crate::display::Output;
use crate::failure::{Failure, status, write_out};
use crate::pattern::Pattern;
use crate::{key, open, table};

pub fn list(url: Option<&str>, list: &List) -> Result<u8, Failure> {
    let filter = if list.expired { Filter::Expired } else { Filter::All };
    let records = selected(&open(url)?, filter, &list.selection)?;
    if list.json {
        let records: Value = records.iter().map(table::as_json).collect();
        write_out(&format!("{records:#}\n"))?;
    } else {
        write_out(&table::table(&records, &Output::standard()))?;
    }
    Ok(0)
}

pub fn show(url: Option<&str>, show: &Show) -> Result<u8, Failure> {
    let key = key(&show.key)?;
    match find(&open(url)?, &key)? {
        Some(record) if show.json => write_out(&format!("{:#}\n", table::as_json(&record)))?,
        Some(record) => write_out(&table::details(&record))?,
        None => return Err(Failure::new(status::NOTHING, format!("nobody holds {}", key.quoted()))),
    }
    Ok(0)
}

/// The record of a key, or, of a damaged one whose key cannot be read, of the text that stands for it.
pub fn find(client: &Client, key: &Key) -> Result<Option<Record>, Failure> {
    if let Some(record) = runtime::wait(client.find(key))? {
        return Ok(Some(record));
    }
    if !key.as_str().starts_with('(') {
        return Ok(None);
    }
    let mut all = runtime::wait(client.list(Filter::All))?;
    let at = all.iter().position(|record| record.key.is_placeholder() && record.key.as_str() == key.as_str());
    Ok(at.map(|at| all.swap_remove(at)))
}

/// The records of a store, by key.
pub fn by_key(client: &Client, filter: Filter) -> Result<Vec<Record>, Failure> {
    let mut records = runtime::wait(client.list(filter))?;
    records.sort_by(|a, b| a.key.as_str().cmp(b.key.as_str()));
    Ok(records)
}

/// The records that were asked for, in the order that was asked for; by key where that says nothing.
pub fn selected(client: &Client, filter: Filter, selection: &Selection) -> Result<Vec<Record>, Failure> {
    let mut records = by_key(client, filter)?;
    if let Some(pattern) = &selection.pattern {
        let text = pattern.to_str().ok_or_else(|| {
            Failure::new(status::USAGE, format!("PATTERN must be UTF-8 (got {:?})", pattern.to_string_lossy()))
        })?;
        let pattern = Pattern::new(text);
        records.retain(|record| pattern.matches(record.key.as_str()));
    }
    match selection.sort {
        Order::Key => {}
        // What is damaged comes first.
        Order::Lease => records.sort_by_key(|record| match record.lease {
            _ if record.damaged.is_some() => (0, Reverse(Duration::ZERO), Duration::ZERO),
            Lease::RanOut(ago) => (1, Reverse(ago), Duration::ZERO),
            Lease::Runs(left) => (2, Reverse(Duration::ZERO), left),
            Lease::Endless => (3, Reverse(Duration::ZERO), Duration::ZERO),
        }),
        // What does not say comes last.
        Order::Held => {
            records.sort_by_key(|record| record.owner.as_ref().map_or(u64::MAX, |owner| owner.acquired_at_ms))
        }
        Order::Holder => records.sort_by(|a, b| {
            let holder =
                |record: &Record| record.owner.as_ref().map(|owner| (owner.host.clone(), owner.app.clone(), owner.pid));
            let (a, b) = (holder(a), holder(b));
            a.is_none().cmp(&b.is_none()).then_with(|| a.cmp(&b))
        }),
    }
    if selection.reverse {
        records.reverse();
    }
    Ok(records)
}
