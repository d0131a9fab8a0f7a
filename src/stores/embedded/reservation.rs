//! Reserving the fences that transactions give out (R18).
//!
//! A fence is a base plus the number of the grant's own transaction. The base changes whenever the data file is made
//! anew, at every boot at least, so every fence that was ever given out must be below the next base: below the ceiling in
//! the fence file, which is kept in the control file and the data file as well.

use super::control::Guard;
use super::database::{Database, Fault};
use super::directory::{Directory, Opening};
use super::fence;
use crate::store::StoreError;

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
    let reserved = fence::raise(directory, opening, floor, block)?;
    database.note_ceiling(reserved.end)?;
    match fences {
        // Nobody else has reserved since: the numbers go on.
        Some((base, ceiling)) if ceiling == reserved.start => guard.set_fences(base, reserved.end),
        _ => guard.set_fences(reserved.start.saturating_sub(number), reserved.end),
    }
    Ok(())
}
