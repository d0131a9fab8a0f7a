//! `nblock watch`: a table that is drawn again every second on a terminal, a line for each change elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use nblock::clock::wall_millis;
use nblock::record::Record;
use nblock::store::Filter;

use crate::arguments::Watch;
use crate::display::{LONG, Output, within};
use crate::duration::show_moment;
use crate::failure::{Failure, output_is_open, write_out};
use crate::inspect::selected;
use crate::open;
use crate::table::{holder, lease, table};

/// How often the store is asked.
const PERIOD: Duration = Duration::from_secs(1);

/// Ends when it is interrupted, or the store fails.
pub fn watch(url: Option<&str>, watch: &Watch) -> Result<u8, Failure> {
    output_is_open()?;
    let resized = Resized::block();
    let client = open(url)?;
    let location = client.location()?;
    let mut known = BTreeMap::new();
    let mut before = None;
    loop {
        let records = selected(&client, Filter::All, &watch.selection)?;
        let output = Output::standard();
        if output.size.is_some() {
            // What the terminal made of what was there when it changed its size is anybody's guess.
            let anew = before != Some(output);
            write_out(&screen(&location, &records, &output, anew))?;
        } else {
            write_out(&changes(&mut known, records))?;
        }
        before = Some(output);
        resized.wait(PERIOD);
    }
}

/// The signal that the terminal has another size, blocked, and waited for.
struct Resized(libc::sigset_t);

impl Resized {
    /// To be called before there are threads.
    fn block() -> Resized {
        // SAFETY: sigemptyset initialises the set.
        unsafe {
            let mut set = std::mem::MaybeUninit::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            let mut set = set.assume_init();
            libc::sigaddset(&mut set, libc::SIGWINCH);
            libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            Resized(set)
        }
    }

    /// Waits for that time, or until the signal comes.
    fn wait(&self, most: Duration) {
        let most = libc::timespec { tv_sec: most.as_secs() as i64, tv_nsec: most.subsec_nanos().into() };
        // SAFETY: a set and a length of time that were made.
        unsafe { libc::sigtimedwait(&self.0, std::ptr::null_mut(), &most) };
    }
}

/// What a terminal is to show, from its top. Written over what it shows, so that nothing flickers.
fn screen(location: &str, records: &[Record], output: &Output, anew: bool) -> String {
    let (height, columns) = output.size.unwrap_or((usize::MAX, usize::MAX));
    let count = records.len();
    let damaged = records.iter().filter(|record| record.damaged.is_some()).count();
    let expired = records.iter().filter(|record| record.lease.expired()).count();
    let held = count - expired - damaged;
    let mut title = format!("{}  {held} held, {expired} ran out", show_moment(wall_millis()));
    if damaged > 0 {
        let _ = write!(title, ", {damaged} damaged");
    }
    // The title, the place, an empty line, the heading, a line for what does not fit, and where the cursor is.
    let room = height.saturating_sub(6).max(1);
    let mut lines = vec![within(&title, columns), within(location, columns)];
    if count > 0 {
        lines.push(String::new());
    }
    lines.extend(table(&records[..count.min(room)], output).lines().map(str::to_string));
    if count > room {
        lines.push(within(&format!("... and {} more", count - room), columns));
    }
    // A line more than the terminal has would move the others up.
    lines.truncate(height.saturating_sub(1).max(1));
    let mut text = String::from(if anew { "\x1b[H\x1b[2J" } else { "\x1b[H" });
    for line in lines {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{line}\x1b[K");
    }
    text + "\x1b[J"
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
        let shown = within(&key, LONG);
        let by = record.owner.as_ref().map_or_else(String::new, |owner| format!(" by {}", holder(owner)));
        // Writing to a String does not fail.
        let _ = match same {
            Some(before) if before.lease.expired() == record.lease.expired() => Ok(()),
            Some(_) if record.lease.expired() => writeln!(text, "{now}  ran out   {shown}"),
            Some(_) => writeln!(text, "{now}  renewed   {shown}{by}: {}", lease(record.lease)),
            None if record.damaged.is_some() => writeln!(text, "{now}  damaged   {shown}"),
            None if record.lease.expired() => writeln!(text, "{now}  ran out   {shown}{by}"),
            None => writeln!(text, "{now}  held      {shown}{by}: {}", lease(record.lease)),
        };
        known.insert(key, record);
    }
    for key in gone.keys() {
        let _ = writeln!(text, "{now}  free      {}", within(key, LONG));
    }
    text
}
