//! Records as text and as JSON. Never with a token (R19).

use std::fmt::Write as _;
use std::time::Duration;

use nblock::clock::wall_millis;
use nblock::record::{Lease, Owner, Record};
use serde_json::{Value, json};

use crate::display::{Colour, LONG, Output, printable, width, within};
use crate::duration::{show, show_moment};

/// What stands in a column of the table.
struct Column {
    title: &'static str,
    /// Not made narrower than this.
    least: usize,
    cell: fn(&Record, usize) -> String,
}

/// In the order in which they stand. Where a terminal is too narrow for all of them, the last ones go first.
const COLUMNS: [Column; 5] = [
    Column { title: "KEY", least: 24, cell: |record, columns| within(record.key.as_str(), columns) },
    Column { title: "LEASE", least: usize::MAX, cell: |record, _| state(record) },
    Column { title: "HOLDER", least: 12, cell: |record, columns| within(&or_dash(holder_cell(record)), columns) },
    Column { title: "HELD FOR", least: usize::MAX, cell: |record, _| or_dash(record.owner.as_ref().map(held_for)) },
    Column {
        title: "FENCE",
        least: usize::MAX,
        cell: |record, _| or_dash(record.fence.map(|fence| fence.to_string())),
    },
];

/// Between two columns.
const GAP: usize = 2;

/// Elsewhere than on a terminal nothing is cut; but what is longer than this does not make its column wider.
const WIDEST: usize = 60;

/// Records as a table with a line for each, or nothing where there are none. Of a terminal's width it makes
/// the best: the last columns are left out, and the names made shorter.
pub fn table(records: &[Record], output: &Output) -> String {
    if records.is_empty() {
        return String::new();
    }
    let on_terminal = output.size.is_some();
    let most = if on_terminal { output.columns() } else { usize::MAX };
    let mut rows = vec![COLUMNS.map(|column| column.title.to_string())];
    rows.extend(records.iter().map(|record| COLUMNS.map(|column| (column.cell)(record, most))));
    let mut widths: Vec<usize> =
        (0..COLUMNS.len()).map(|column| rows.iter().map(|row| width(&row[column])).max().unwrap_or(0)).collect();
    if on_terminal {
        fit(&mut widths, most);
    } else {
        widths.iter_mut().for_each(|width| *width = (*width).min(WIDEST));
    }
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let record = index.checked_sub(1).map(|index| &records[index]);
        let colour = match record {
            None => Colour::Heading,
            Some(record) if record.lease.expired() || record.damaged.is_some() => Colour::Alarm,
            Some(_) => Colour::None,
        };
        for (column, &wide) in widths.iter().enumerate() {
            let cell = match record {
                Some(record) if width(&row[column]) > wide && on_terminal => (COLUMNS[column].cell)(record, wide),
                _ => row[column].clone(),
            };
            // The last one is not filled up.
            let fill = if column + 1 == widths.len() { 0 } else { wide.saturating_sub(width(&cell)) + GAP };
            // The heading, and the lease that ran out.
            let colour = if record.is_none() || column == 1 { colour } else { Colour::None };
            // Writing to a String does not fail.
            let _ = write!(text, "{}{:fill$}", output.paint(&cell, colour), "");
        }
        text.push('\n');
    }
    text
}

/// Makes columns narrower, the widest one first, and leaves out the last ones, until they fit.
fn fit(widths: &mut Vec<usize>, most: usize) {
    let total = |widths: &[usize]| widths.iter().sum::<usize>() + GAP * (widths.len() - 1);
    let least = |column: usize, width: usize| width.min(COLUMNS[column].least);
    while widths.len() > 1 {
        let narrowest: Vec<_> = widths.iter().enumerate().map(|(column, &width)| least(column, width)).collect();
        if total(&narrowest) <= most {
            break;
        }
        widths.pop();
    }
    while total(widths) > most {
        // Of those that may become narrower the widest; the only one that is left must.
        let may =
            (0..widths.len()).filter(|&column| widths[column] > least(column, widths[column]) || widths.len() == 1);
        let Some(widest) = may.max_by_key(|&column| widths[column]).filter(|&column| widths[column] > 1) else { break };
        let over = total(widths) - most;
        let next = (0..widths.len()).filter(|&column| column != widest).map(|column| widths[column]).max().unwrap_or(1);
        // Down to the next widest, and then by turns.
        let step = over.min(widths[widest].saturating_sub(next).max(1));
        widths[widest] = (widths[widest] - step).max(1);
    }
}

/// One record, a line for each thing that is known of it.
pub fn details(record: &Record) -> String {
    let mut text = format!("key          {}\n", printable(record.key.as_str()));
    if let Some(damage) = &record.damaged {
        let _ = writeln!(text, "damaged      {}", printable(damage));
        let _ = writeln!(text, "version      {}", record.version());
        return text;
    }
    let _ = writeln!(text, "lease        {}", lease(record.lease));
    let _ = writeln!(text, "expires at   {}", show_moment(record.expires_at_ms));
    match &record.owner {
        None if record.is_foreign() => text.push_str("holder       foreign: another program wrote this record\n"),
        None => text.push_str("holder       not recorded\n"),
        Some(owner) => {
            let _ = writeln!(text, "holder       {}", printable(&holder_plain(owner)));
            let _ = writeln!(text, "boot id      {}", within(&owner.boot_id, LONG));
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
    let _ = writeln!(text, "version      {}", record.version());
    text
}

pub fn as_json(record: &Record) -> Value {
    let whole = record.damaged.is_none();
    let remaining = match record.lease {
        Lease::Runs(left) => Some(left.as_secs_f64()),
        Lease::RanOut(ago) => Some(-ago.as_secs_f64()),
        Lease::Endless => None,
    };
    json!({
        "key": record.key.as_str(),
        "damaged": record.damaged,
        "foreign": record.is_foreign(),
        "expired": record.lease.expired(),
        "remaining": whole.then_some(remaining),
        "expires_at": whole.then(|| show_moment(record.expires_at_ms)),
        "owner": record.owner.as_ref().map(|owner| json!({
            "host": owner.host,
            "pid": owner.pid,
            "boot_id": owner.boot_id,
            "app": owner.app,
            "acquired_at": show_moment(owner.acquired_at_ms),
        })),
        "fence": record.fence,
        "lock_count": record.lock_count(),
        "version": record.version(),
    })
}

/// What is to be said of a record in short: how its lease stands, or that it is damaged.
pub fn state(record: &Record) -> String {
    match record.damaged {
        Some(_) => "damaged".to_string(),
        None => lease(record.lease),
    }
}

pub fn lease(lease: Lease) -> String {
    match lease {
        Lease::Runs(left) => format!("{} left", show(left)),
        Lease::RanOut(ago) => format!("ran out {} ago", show(ago)),
        Lease::Endless => "no end".to_string(),
    }
}

/// Who holds a lock, as one line can show it.
pub fn holder(owner: &Owner) -> String {
    within(&holder_plain(owner), LONG)
}

fn holder_plain(owner: &Owner) -> String {
    format!("{}:{} {}", owner.host, owner.pid, owner.app)
}

/// Who holds it, or that another program does, which is not named.
fn holder_cell(record: &Record) -> Option<String> {
    let foreign = || record.is_foreign().then(|| "(foreign)".to_string());
    record.owner.as_ref().map(holder_plain).or_else(foreign)
}

fn held_for(owner: &Owner) -> String {
    show(since(owner.acquired_at_ms))
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_string())
}

fn since(wall: u64) -> Duration {
    Duration::from_millis(wall_millis().saturating_sub(wall))
}
