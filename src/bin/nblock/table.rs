//! Records as text and as JSON. Never with a token (R19).

use std::fmt::Write as _;
use std::time::Duration;

use nblock::clock::wall_millis;
use nblock::record::{Lease, Owner, Record};
use serde_json::{Value, json};

use crate::duration::{show, show_moment};

/// Records as a table with a line for each, or nothing where there are none.
pub fn table(records: &[Record]) -> String {
    if records.is_empty() {
        return String::new();
    }
    let mut rows = vec![["KEY", "LEASE", "HOLDER", "HELD FOR", "FENCE"].map(str::to_string)];
    rows.extend(records.iter().map(|record| {
        let owner = record.owner.as_ref();
        [
            printable(record.key.as_str(), 60),
            lease(record.lease),
            owner.map_or_else(|| "-".to_string(), holder),
            owner.map_or_else(|| "-".to_string(), |owner| show(since(owner.acquired_at_ms))),
            record.fence.map_or_else(|| "-".to_string(), |fence| fence.to_string()),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3)];
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a String does not fail.
            let _ = write!(text, "{cell:width$}  ");
        }
        let _ = writeln!(text, "{}", row[4]);
    }
    text
}

/// One record, a line for each thing that is known of it.
pub fn details(record: &Record) -> String {
    let mut text = format!("key          {}\n", printable(record.key.as_str(), usize::MAX));
    let _ = writeln!(text, "lease        {}", lease(record.lease));
    let _ = writeln!(text, "expires at   {}", show_moment(record.expires_at_ms));
    match &record.owner {
        None => text.push_str("holder       not recorded\n"),
        Some(owner) => {
            let _ = writeln!(text, "holder       {}", holder(owner));
            let _ = writeln!(text, "boot id      {}", printable(&owner.boot_id, 80));
            let _ = writeln!(
                text,
                "held since   {} ({})",
                show_moment(owner.acquired_at_ms),
                show(since(owner.acquired_at_ms))
            );
        }
    }
    if let Some(fence) = record.fence {
        let _ = writeln!(text, "fence        {fence}");
    }
    if let Some(count) = record.lock_count() {
        let _ = writeln!(text, "reentrant    locked {count} times");
    }
    text
}

pub fn as_json(record: &Record) -> Value {
    let expires_in = match record.lease {
        Lease::Runs(left) => Some(left.as_secs_f64()),
        Lease::RanOut(ago) => Some(-ago.as_secs_f64()),
        Lease::Endless => None,
    };
    json!({
        "key": record.key.as_str(),
        "expired": record.lease.expired(),
        "expires_in": expires_in,
        "expires_at": show_moment(record.expires_at_ms),
        "owner": record.owner.as_ref().map(|owner| json!({
            "host": owner.host,
            "pid": owner.pid,
            "boot_id": owner.boot_id,
            "app": owner.app,
            "acquired_at": show_moment(owner.acquired_at_ms),
        })),
        "fence": record.fence,
        "reentrant_count": record.lock_count(),
    })
}

pub fn lease(lease: Lease) -> String {
    match lease {
        Lease::Runs(left) => format!("{} left", show(left)),
        Lease::RanOut(ago) => format!("ran out {} ago", show(ago)),
        Lease::Endless => "no end".to_string(),
    }
}

/// Who holds a lock, in short.
pub fn holder(owner: &Owner) -> String {
    format!("{}:{} {}", printable(&owner.host, 40), owner.pid, printable(&owner.app, 40))
}

fn since(wall: u64) -> Duration {
    Duration::from_millis(wall_millis().saturating_sub(wall))
}

/// Text from a store as a terminal may show it: others wrote it, and it may be long.
pub fn printable(text: &str, most: usize) -> String {
    let mut shown = String::new();
    for (index, c) in text.chars().enumerate() {
        if index == most {
            shown.push_str("...");
            break;
        }
        // Debug's escapes are for what cannot be seen; quotes and backslashes may stay as they are.
        match c {
            '"' | '\'' | '\\' => shown.push(c),
            c => shown.extend(c.escape_debug()),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        assert_eq!(super::printable("jobs:grün \"x\"", 60), "jobs:grün \"x\"");
        assert_eq!(super::printable("a\u{1b}[2Jb\n\0", 60), "a\\u{1b}[2Jb\\n\\0");
        assert_eq!(super::printable("\u{202e}abc", 60), "\\u{202e}abc");
        assert_eq!(super::printable("äöüß", 3), "äöü...");
    }
}
