//! The ceiling below which fences are given out (R18).
//!
//! A fence is a base plus the number of the grant's own transaction. The base changes whenever the
//! data file is made anew, at every boot at least, so every fence that was ever given out must be
//! below the next base. Hence the ceiling: a number in a file that outlives reboots, raised and synced
//! *before* any fence at or above it is given out.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;

use super::directory::{Directory, Opening, failed};
use crate::clock;
use crate::store::StoreError;

const NAME: &str = "fence";
const NEW: &str = "fence.new";

/// Fences stay below this: beyond, a float would confuse two of them.
pub const LIMIT: u64 = 1 << 53;

/// How much is reserved at first. Each boot uses up that much, so it is kept below what the clock
/// advances between two boots (an hour, in milliseconds): see `start`.
pub const FIRST_BLOCK: u64 = 1 << 22;
/// How much is reserved at most at once, for those who use up fences quickly.
pub const LARGEST_BLOCK: u64 = 1 << 32;

/// Reserves numbers that were never reserved before.
pub fn reserve(directory: &Directory, _opening: &Opening, block: u64) -> Result<Range<u64>, StoreError> {
    let start = match directory.open_file(NAME)? {
        Some(file) => read(&file)
            .map_err(|error| failed(format_args!("{} could not be read", shown(directory)), &error))?
            .ok_or_else(|| {
                StoreError::rejected(format!(
                    "{} is damaged, and without it a fence could be lower than one before: write {:?} to it, with \
                         a ceiling above every fence that was given out",
                    shown(directory),
                    text(LIMIT / 2).trim_end()
                ))
            })?,
        // Somebody may have deleted it. Blocks are used up more slowly than milliseconds pass, so
        // this is above what it said.
        None => clock::wall_millis(),
    };
    let end = start.saturating_add(block).min(LIMIT);
    if start >= end {
        return Err(StoreError::rejected(format!("fences are used up: {} has reached 2^53", shown(directory))));
    }
    write(directory, end)?;
    Ok(start..end)
}

fn shown(directory: &Directory) -> String {
    directory.shown(NAME).display().to_string()
}

fn text(ceiling: u64) -> String {
    let said = format!("nblock fence ceiling {ceiling}");
    format!("{said} {:08x}\n", crc32fast::hash(said.as_bytes()))
}

fn read(file: &File) -> io::Result<Option<u64>> {
    let mut found = String::new();
    match file.take(1024).read_to_string(&mut found) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
        read => read?,
    };
    let ceiling = found.split(' ').nth(3).and_then(|number| number.parse().ok());
    Ok(ceiling.filter(|&ceiling| found == text(ceiling)))
}

fn write(directory: &Directory, ceiling: u64) -> Result<(), StoreError> {
    directory.remove(NEW)?;
    let mut file = directory.create_file(NEW)?;
    file.write_all(text(ceiling).as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|error| failed(format_args!("{} could not be written", directory.shown(NEW).display()), &error))?;
    directory.rename(NEW, NAME)?;
    directory.sync()
}
