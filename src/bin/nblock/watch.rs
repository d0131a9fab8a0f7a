//! `nblock watch`: a table that is drawn anew on a terminal, a line for each change elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};
use std::thread;
use std::time::Duration;

use nblock::clock::wall_millis;
use nblock::record::Record;
use nblock::store::Filter;

use crate::duration::show_moment;
use crate::failure::{Failure, write_out};
use crate::inspect::sorted;
use crate::open;
use crate::table::{holder, lease, printable, table};

/// How often the store is asked.
const PERIOD: Duration = Duration::from_secs(1);

/// Ends when it is interrupted, or the store fails.
pub fn watch(url: Option<&str>) -> Result<u8, Failure> {
    let client = open(url)?;
    let location = client.location()?;
    let on_terminal = io::stdout().is_terminal();
    let mut known = BTreeMap::new();
    loop {
        let records = sorted(&client, Filter::All)?;
        if on_terminal {
            write_out(&screen(&location, &records, height()))?;
        } else {
            write_out(&changes(&mut known, records))?;
        }
        thread::sleep(PERIOD);
    }
}

/// What a terminal of so many lines is to show, from its top.
fn screen(location: &str, records: &[Record], height: usize) -> String {
    let count = records.len();
    let mut text = format!("\x1b[H\x1b[2J{}  {count} held or run out in {location}\n\n", show_moment(wall_millis()));
    // The title, an empty line, the heading, and a line for what does not fit.
    let room = height.saturating_sub(5).max(1);
    text.push_str(&table(&records[..count.min(room)]));
    if count > room {
        let _ = writeln!(text, "... and {} more", count - room);
    }
    text
}

/// The lines that a terminal has; as many as it takes where it does not say.
fn height() -> usize {
    // SAFETY: the kernel fills in one winsize.
    let (status, size) = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        (libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size), size)
    };
    if status == 0 && size.ws_row > 0 { size.ws_row.into() } else { usize::MAX }
}

/// One line for each record that came, went, changed hands or ran out since the last look.
fn changes(known: &mut BTreeMap<Box<str>, Record>, records: Vec<Record>) -> String {
    let now = show_moment(wall_millis());
    let mut text = String::new();
    let mut gone = std::mem::take(known);
    for record in records {
        let key: Box<str> = record.key.as_str().into();
        let before = gone.remove(&key);
        let same = before.as_ref().filter(|before| before.is_same_hold(&record));
        let shown = printable(&key, 200);
        let by = record.owner.as_ref().map_or_else(String::new, |owner| format!(" by {}", holder(owner)));
        // Writing to a String does not fail.
        let _ = match same {
            Some(before) if before.lease.expired() == record.lease.expired() => Ok(()),
            Some(_) if record.lease.expired() => writeln!(text, "{now}  ran out   {shown}"),
            Some(_) => writeln!(text, "{now}  renewed   {shown}{by}: {}", lease(record.lease)),
            None if record.lease.expired() => writeln!(text, "{now}  ran out   {shown}{by}"),
            None => writeln!(text, "{now}  held      {shown}{by}: {}", lease(record.lease)),
        };
        known.insert(key, record);
    }
    for key in gone.keys() {
        let _ = writeln!(text, "{now}  free      {}", printable(key, 200));
    }
    text
}
