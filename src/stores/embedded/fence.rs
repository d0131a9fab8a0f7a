//! The fence ceiling (R18): all fences given out are below it. It is a number in a file that survives reboots, and is
//! raised and synced *before* any fence at or above it is given out.
//!
//! That file may be deleted, or replaced by an old copy. So `open.lock` and the table have copies of the ceiling, and
//! the highest of those that are left counts. If none is left, the wall clock's milliseconds are used instead: fences
//! are used up more slowly than that, unless there are more than a thousand grants every second.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use super::directory::{Directory, failed};
use super::table::{FenceSource, Patience};
use crate::clock;
use crate::store::StoreError;
use crate::sys::space::may_reach;

const NAME: &str = "fence";
const NEW: &str = "fence.new";
/// The beginning of the text in the file.
const BEGINNING: &[u8] = b"nblock fence ceiling ";

/// Fences are below this: a double could not represent all integers beyond it.
const LIMIT: u64 = 1 << 53;

/// The number of fences that are reserved at once. Each boot uses up that many, so it is about the number of
/// milliseconds in an hour (see the wall clock above). Two million grants a second need one write in two seconds.
const BLOCK: u64 = 1 << 22;

/// The `fence` file of a directory, from which a table gets its fences.
pub struct FenceFile(pub Arc<Directory>);

impl FenceSource for FenceFile {
    fn reserve(&self, floor: u64, patience: &mut Patience) -> Result<Range<u64>, StoreError> {
        let opening = self.0.lock_opening(Instant::now() + patience.left())?;
        raise(&self.0, &opening.file, floor)
    }
}

/// Raises the ceiling in the file and in its copy. The fences in between were never reserved before, and are not below
/// `floor`. The caller has `open.lock` locked.
fn raise(directory: &Directory, copy: &File, floor: u64) -> Result<Range<u64>, StoreError> {
    let kept = match directory.open_file(NAME)? {
        Some(file) => ceiling_in(&beginning_of(&file).map_err(|error| unreadable(directory, NAME, &error))?)
            .ok_or_else(|| {
                StoreError::rejected(format!(
                    "{} is damaged, or is not a file of nblock. Without it a fence could be lower than an earlier one. \
                     If it is a file of nblock, write {:?} to it, with a ceiling above every fence that was given out; \
                     otherwise name a separate directory for the locks",
                    shown(directory),
                    text(LIMIT / 2).trim_end()
                ))
            })?,
        None => 0,
    };
    // A copy that cannot be read does not count.
    let copied = beginning_of(copy).unwrap_or_default();
    let start = kept.max(ceiling_in(&copied).unwrap_or(0)).max(floor).max(clock::wall_millis());
    let end = start.saturating_add(BLOCK).min(LIMIT);
    if start >= end {
        return Err(StoreError::rejected(format!(
            "fences are used up ({} has reached 2^53): name another directory for \
             the locks",
            shown(directory)
        )));
    }
    write(directory, end)?;
    let text = text(end);
    // If the copy cannot be written, the ceiling is still in two places.
    if is_ours(&copied) && may_reach(text.len() as u64).is_ok() {
        let _ = copy.write_all_at(text.as_bytes(), 0);
    }
    Ok(start..end)
}

/// The first bytes of an open file, up to more than nblock writes to it.
fn beginning_of(file: &File) -> io::Result<Vec<u8>> {
    let mut found = vec![0; 1024];
    let length = file.read_at(&mut found, 0)?;
    found.truncate(length);
    Ok(found)
}

fn unreadable(directory: &Directory, name: &str, error: &io::Error) -> StoreError {
    failed(format_args!("{} could not be read", directory.shown(name).display()), error)
}

/// Whether a file with these first bytes is nblock's, so that it may be written and removed.
fn is_ours(beginning: &[u8]) -> bool {
    beginning.iter().zip(BEGINNING).all(|(found, ours)| found == ours)
}

fn shown(directory: &Directory) -> String {
    directory.shown(NAME).display().to_string()
}

/// The text of a ceiling in the file.
fn text(ceiling: u64) -> String {
    let said = format!("nblock fence ceiling {ceiling}");
    format!("{said} {:08x}\n", crc32fast::hash(said.as_bytes()))
}

/// The ceiling in the first line, if its checksum is right. What follows the line is ignored.
pub fn ceiling_in(written: &[u8]) -> Option<u64> {
    let end = written.iter().position(|&byte| byte == b'\n')? + 1;
    let line = std::str::from_utf8(&written[..end]).ok()?;
    let ceiling = line.split(' ').nth(3)?.parse().ok()?;
    (line == text(ceiling)).then_some(ceiling)
}

/// Removes the file of a process that was killed in [`write()`].
fn remove_unfinished(directory: &Directory) -> Result<(), StoreError> {
    let Some(file) = directory.open_file(NEW)? else { return Ok(()) };
    if is_ours(&beginning_of(&file).map_err(|error| unreadable(directory, NEW, &error))?) {
        return directory.remove(NEW);
    }
    Err(StoreError::rejected(format!(
        "{} is not a file of nblock: name a separate directory for the locks",
        directory.shown(NEW).display()
    )))
}

fn write(directory: &Directory, ceiling: u64) -> Result<(), StoreError> {
    let text = text(ceiling);
    remove_unfinished(directory)?;
    let mut file = directory.create_file(NEW)?;
    may_reach(text.len() as u64)
        .and_then(|()| file.write_all(text.as_bytes()))
        .and_then(|()| file.sync_all())
        .map_err(|error| failed(format_args!("{} could not be written", directory.shown(NEW).display()), &error))?;
    directory.rename(NEW, NAME)?;
    directory.sync()
}
