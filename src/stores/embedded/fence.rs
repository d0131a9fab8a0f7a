//! The ceiling below which fences are given out (R18): a number in a file that outlives reboots, raised and synced
//! *before* any fence at or above it is given out.
//!
//! Somebody may delete that file, or put an old one in its place. So the ceiling is kept in the file whose
//! lock openers take as well, and in the table, and the highest that is left counts. When nothing is left, the wall clock
//! stands in: blocks are used up more slowly than milliseconds pass, unless there are more than a thousand grants in every
//! second.

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
/// How the text in the file begins.
const BEGINNING: &[u8] = b"nblock fence ceiling ";

/// Fences stay below this: beyond, a float would confuse two of them.
const LIMIT: u64 = 1 << 53;

/// How much is reserved at once. Each boot uses up that much, so it is about what the clock advances in an hour, in
/// milliseconds. Even two million grants a second need one write in two seconds.
const BLOCK: u64 = 1 << 22;

/// The file of a directory, as the source of a table's fences.
pub struct FenceFile(pub Arc<Directory>);

impl FenceSource for FenceFile {
    fn reserve(&self, floor: u64, patience: &mut Patience) -> Result<Range<u64>, StoreError> {
        let opening = self.0.lock_opening(Instant::now() + patience.left())?;
        raise(&self.0, &opening.file, floor)
    }
}

/// Raises the ceiling in the file and in its copy: what is between was never reserved before, and is not below `floor`.
/// Nobody else must do so meanwhile.
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
    // What cannot be read is no copy.
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
    // Without the copy, the ceiling is in two places still.
    if is_ours(&copied) && may_reach(text.len() as u64).is_ok() {
        let _ = copy.write_all_at(text.as_bytes(), 0);
    }
    Ok(start..end)
}

/// The first bytes of an open file: more than the library writes.
fn beginning_of(file: &File) -> io::Result<Vec<u8>> {
    let mut found = vec![0; 1024];
    let length = file.read_at(&mut found, 0)?;
    found.truncate(length);
    Ok(found)
}

fn unreadable(directory: &Directory, name: &str, error: &io::Error) -> StoreError {
    failed(format_args!("{} could not be read", directory.shown(name).display()), error)
}

/// Whether a file with these first bytes may be written to, or removed: another program's is not ours to touch.
fn is_ours(beginning: &[u8]) -> bool {
    beginning.iter().zip(BEGINNING).all(|(found, ours)| found == ours)
}

fn shown(directory: &Directory) -> String {
    directory.shown(NAME).display().to_string()
}

/// A ceiling as it is written down.
fn text(ceiling: u64) -> String {
    let said = format!("nblock fence ceiling {ceiling}");
    format!("{said} {:08x}\n", crc32fast::hash(said.as_bytes()))
}

/// The ceiling that is written down in a line, if it is whole. What follows the line is not looked at.
pub fn ceiling_in(written: &[u8]) -> Option<u64> {
    let end = written.iter().position(|&byte| byte == b'\n')? + 1;
    let line = std::str::from_utf8(&written[..end]).ok()?;
    let ceiling = line.split(' ').nth(3)?.parse().ok()?;
    (line == text(ceiling)).then_some(ceiling)
}

/// Removes what a process left that was killed in [`write`].
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
