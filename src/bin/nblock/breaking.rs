//! `nblock break`.

use nblock::client::{Broken, Client};
use nblock::record::{Lease, Record};
use nblock::runtime;
use nblock::store::Filter;

use crate::arguments::Break;
use crate::failure::{Failure, status, write_out};
use crate::{inspect, key, open, table};

pub fn break_locks(url: Option<&str>, arguments: &Break) -> Result<u8, Failure> {
    let client = open(url)?;
    match &arguments.key {
        Some(argument) => break_one(&client, &key(argument)?),
        None => break_expired(&client, arguments),
    }
}

/// Breaks the hold that there is now. Its renewals change the record: it is looked at again as long as
/// it is the same hold.
fn break_one(client: &Client, key: &nblock::key::Key) -> Result<u8, Failure> {
    let find = || runtime::wait(client.find(key));
    let first = find()?.ok_or_else(|| Failure::new(status::NOTHING, format!("nobody holds {}", key.quoted())))?;
    let mut seen = first.clone();
    loop {
        if let Broken::Broken = runtime::wait(client.break_seen(&seen))? {
            write_out(&broke(&seen))?;
            return Ok(0);
        }
        match find()? {
            Some(now) if now.is_same_hold(&first) => seen = now,
            now => {
                let what = if now.is_some() { "somebody else holds it now" } else { "it is free now" };
                let message = format!("{} was given back meanwhile: nothing was broken, {what}", key.quoted());
                return Err(Failure::new(status::NOTHING, message));
            }
        }
    }
}

fn break_expired(client: &Client, arguments: &Break) -> Result<u8, Failure> {
    let old = |record: &Record| match record.lease {
        Lease::RanOut(ago) => arguments.older_than.is_none_or(|least| ago >= least),
        Lease::Runs(_) | Lease::Endless => false,
    };
    for record in inspect::sorted(client, Filter::Expired)?.iter().filter(|record| old(record)) {
        match runtime::wait(client.break_seen(record))? {
            Broken::Broken => write_out(&broke(record))?,
            // Taken over, renewed or broken by somebody else: no business of ours any more.
            Broken::Changed => write_out(&format!("left {} alone: it changed meanwhile\n", record.key.quoted()))?,
        }
    }
    Ok(0)
}

fn broke(record: &Record) -> String {
    let holder = record.owner.as_ref().map_or_else(String::new, |owner| format!(", of {}", table::holder(owner)));
    format!("broke {}{holder}: {}\n", record.key.quoted(), table::lease(record.lease))
}
