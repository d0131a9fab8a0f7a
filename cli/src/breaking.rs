//! `nblock break`.

use nblock::client::{Broken, Client};
use nblock::key::Key;
use nblock::record::{Lease, Record};
use nblock::store::Filter;
use nblock::sys::runtime;

use crate::arguments::Break;
use crate::failure::{Failure, status, write_out};
use crate::{inspect, key, open, table};

pub fn break_locks(url: Option<&str>, arguments: &Break) -> Result<u8, Failure> {
    let only_if = OnlyIf::new(arguments)?;
    let client = open(url)?;
    match &arguments.key {
        Some(argument) => break_one(&client, &key(argument)?, &only_if, arguments.foreign),
        None => break_expired(&client, arguments),
    }
}

/// What the record must be for it to be broken.
struct OnlyIf<'a> {
    fence: Option<u64>,
    owner: Option<(&'a str, u32)>,
    version: Option<&'a str>,
}

impl OnlyIf<'_> {
    fn new(arguments: &Break) -> Result<OnlyIf<'_>, Failure> {
        let owner = match arguments.if_owner.as_deref() {
            None => None,
            // A host name may have colons in it.
            Some(text) => match text.rsplit_once(':').map(|(host, pid)| (host, pid.parse())) {
                Some((host, Ok(pid))) if !host.is_empty() => Some((host, pid)),
                _ => {
                    let message = format!("--if-owner must be HOST:PID, as nblock show prints it (got {text:?})");
                    return Err(Failure::new(status::USAGE, message));
                }
            },
        };
        Ok(OnlyIf { fence: arguments.if_fence, owner, version: arguments.if_version.as_deref() })
    }

    /// What is not as it must be, if anything.
    fn mismatch(&self, record: &Record) -> Option<String> {
        if let Some(wanted) = self.fence
            && record.fence != Some(wanted)
        {
            let has = record.fence.map_or_else(|| "no fence".to_string(), |fence| format!("fence {fence}"));
            return Some(format!("has {has}, not {wanted}"));
        }
        if let Some((host, pid)) = self.owner
            && record.owner.as_ref().is_none_or(|owner| owner.host != host || owner.pid != pid)
        {
            let by = record.owner.as_ref().map_or_else(|| "an unknown holder".to_string(), table::holder);
            return Some(format!("is held by {by}, not {host}:{pid}"));
        }
        if let Some(wanted) = self.version
            && record.version() != wanted
        {
            return Some(format!("has version {}, not {wanted}: it was renewed, or changed hands", record.version()));
        }
        None
    }
}

/// Breaks the hold that there is now. Its renewals change the record: it is looked at again as long as
/// it is the same hold. `foreign`: also if another program wrote it, where that may be data.
fn break_one(client: &Client, key: &Key, only_if: &OnlyIf, foreign: bool) -> Result<u8, Failure> {
    let find = || inspect::find(client, key);
    let nothing = |message: String| Failure::new(status::NOTHING, message);
    let first = find()?.ok_or_else(|| nothing(format!("nobody holds {}", key.quoted())))?;
    let mut seen = first.clone();
    loop {
        if let Some(mismatch) = only_if.mismatch(&seen) {
            return Err(nothing(format!("{} {mismatch}: nothing was broken", key.quoted())));
        }
        let answer = if foreign { client.break_foreign(&seen) } else { client.break_seen(&seen) };
        match runtime::wait(answer)? {
            Broken::Broken => {
                write_out(&broke(&seen))?;
                return Ok(0);
            }
            Broken::Foreign => {
                return Err(nothing(format!(
                    "{} was not written by nblock: it may be another library's lock, or data. Nothing was broken; \
                     --foreign deletes it",
                    key.quoted()
                )));
            }
            Broken::Changed => {}
        }
        match find()? {
            Some(now) if now.is_same_hold(&first) => seen = now,
            now => {
                let what = if now.is_some() { "another client holds it now" } else { "it is free now" };
                return Err(nothing(format!("{} was released meanwhile: nothing was broken, {what}", key.quoted())));
            }
        }
    }
}

fn break_expired(client: &Client, arguments: &Break) -> Result<u8, Failure> {
    let old = |record: &Record| match record.lease {
        _ if record.damaged.is_some() => false,
        Lease::RanOut(ago) => arguments.older_than.is_none_or(|least| ago >= least),
        Lease::Runs(_) | Lease::Endless => false,
    };
    for record in inspect::by_key(client, Filter::Expired)?.iter().filter(|record| old(record)) {
        match runtime::wait(client.break_seen(record))? {
            Broken::Broken => write_out(&broke(record))?,
            // Taken over, renewed or broken by somebody else: no business of ours any more.
            Broken::Changed => write_out(&format!("left {} alone: it changed meanwhile\n", record.key.quoted()))?,
            Broken::Foreign => write_out(&format!("left {} alone: nblock did not write it\n", record.key.quoted()))?,
        }
    }
    Ok(0)
}

fn broke(record: &Record) -> String {
    let holder = record.owner.as_ref().map_or_else(String::new, |owner| format!(", of {}", table::holder(owner)));
    format!("broke {}{holder}: {}\n", record.key.quoted(), table::state(record))
}
