//! The ceiling below which fences are given out (R18).
//!
//! A fence is a base plus the number of the grant's own transaction. The base changes whenever the
//! data file is made anew, at every boot at least, so every fence that was ever given out must be
//! below the next base. Hence the ceiling: a number in a file that outlives reboots, raised and synced
//! *before* any fence at or above it is given out.
//!
//! Somebody may delete that file, or put an old one in its place. So the ceiling is kept in the control
//! file and the data file as well, and whatever is left of the three counts. When nothing is left, the
//! wall clock stands in: blocks are used up more slowly than milliseconds pass, unless there are more
//! than a thousand transactions in every second.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;

use super::control::{Guard, may_reach};
use super::database::{Database, Fault};
use super::directory::{Directory, Opening, failed};
use crate::clock;
use crate::store::StoreError;

const NAME: &str = "fence";
const NEW: &str = "fence.new";

/// Fences stay below this: beyond, a float would confuse two of them.
pub const LIMIT: u64 = 1 << 53;

/// How much is reserved at first. Each boot uses up that much, so it is kept below what the clock
/// advances between two boots (an hour, in milliseconds): see `raise`.
const FIRST_BLOCK: u64 = 1 << 22;
/// How much is reserved at most at once, for those who use up fences quickly.
const LARGEST_BLOCK: u64 = 1 << 32;

/// Reserves more fences, unless the next transaction has one that is above `floor`.
pub fn reserve(
    guard: &Guard<'_>,
    database: &mut Database,
    directory: &Directory,
    opening: &Opening,
    floor: u64,
) -> Result<(), StoreError> {
    let number = loop {
        let begun = database.begin().map(|transaction| transaction.number());
        match begun {
            Ok(number) => break number,
            Err(Fault::Failed(error)) => return Err(error),
            Err(_) => database.grow()?,
        }
    };
    let fences = guard.fences();
    let spent = match fences {
        Some((base, ceiling)) if (floor..ceiling).contains(&base.saturating_add(number)) => return Ok(()),
        Some((base, ceiling)) => ceiling - base,
        None => 0,
    };
    // Who uses them up quickly gets more at once.
    let block = spent.clamp(FIRST_BLOCK, LARGEST_BLOCK);
    let floor = floor.max(guard.fence_ceiling()).max(database.own_ceiling());
    let reserved = raise(directory, opening, floor, block)?;
    database.note_ceiling(reserved.end)?;
    match fences {
        // Nobody else has reserved since: the numbers go on.
        Some((base, ceiling)) if ceiling == reserved.start => guard.set_fences(base, reserved.end),
        _ => guard.set_fences(reserved.start.saturating_sub(number), reserved.end),
    }
    Ok(())
}

/// Raises the ceiling in the file: what is between was never reserved before, and is not below `floor`.
fn raise(directory: &Directory, _opening: &Opening, floor: u64, block: u64) -> Result<Range<u64>, StoreError> {
    let kept = match directory.open_file(NAME)? {
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
        None => 0,
    };
    let start = kept.max(floor).max(clock::wall_millis());
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

/// A ceiling as it is written down.
pub fn text(ceiling: u64) -> String {
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

fn read(file: &File) -> io::Result<Option<u64>> {
    let mut found = Vec::new();
    file.take(1024).read_to_end(&mut found)?;
    Ok(ceiling_in(&found))
}

fn write(directory: &Directory, ceiling: u64) -> Result<(), StoreError> {
    let text = text(ceiling);
    directory.remove(NEW)?;
    let mut file = directory.create_file(NEW)?;
    may_reach(text.len() as u64)
        .and_then(|()| file.write_all(text.as_bytes()))
        .and_then(|()| file.sync_all())
        .map_err(|error| failed(format_args!("{} could not be written", directory.shown(NEW).display()), &error))?;
    directory.rename(NEW, NAME)?;
    directory.sync()
}
