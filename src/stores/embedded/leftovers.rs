//! What earlier boots, and makers that died, left in the directory.
//!
//! Nothing counts as left over that is not ours by its name and by what is in it: the directory may be used for other
//! things as well. Nor what is still in use, or may be, under another boot id.

use std::fs::{File, TryLockError};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::directory::{self, Directory, Opening, failed};
use super::run::Made;
use crate::store::StoreError;

/// What follows the boot id in the name of a file that is being made.
pub const NEW: &str = ".new";

/// How long a tmp cleaner may have a file, to see whether it is in use.
const CLEANER: Duration = Duration::from_millis(200);

/// One kind of the store's files that are made for one boot.
pub struct Kind {
    /// What stands before the boot id in its name.
    pub prefix: &'static str,
    /// Whether an open file is one, whole or damaged behind its beginning.
    pub is_one: fn(&File) -> bool,
    /// Whether somebody has begun to make one of an open file.
    pub is_begun: fn(&File) -> bool,
    /// When and where it was made, if it says so.
    pub made: fn(&File) -> Option<Made>,
}

/// The files that are left over: they are for the caller to remove, who alone opens files here. An error where another
/// boot goes on, as others see it.
pub fn find(
    directory: &Directory,
    _opening: &Opening,
    boot_id: &str,
    pid_namespace: u64,
    kinds: &[Kind],
    deadline: Instant,
) -> Result<Vec<(String, File)>, StoreError> {
    let mut leftovers = Vec::new();
    for name in directory.names()? {
        let Some((kind, (of_boot, after))) =
            kinds.iter().find_map(|kind| directory::boot_in(&name, kind.prefix).map(|parts| (kind, parts)))
        else {
            continue;
        };
        let unfinished = after == NEW;
        if !unfinished && (!after.is_empty() || of_boot == boot_id) {
            continue;
        }
        let Ok(Some(file)) = directory.open_file(&name) else { continue };
        if !(kind.is_one)(&file) && !(unfinished && (is_empty(&file) || (kind.is_begun)(&file))) {
            continue;
        }
        // What is unfinished belongs to nobody: it is made by the one who may open files here, as we are now.
        if !unfinished && goes_on(&file, kind, pid_namespace, deadline)? {
            return Err(StoreError::bad_config(format!(
                "{} is used under another boot id than this process has ({boot_id}), as in a container that was given one \
                 of its own, or on another machine: give each its own directory",
                directory.shown(&name).display()
            )));
        }
        leftovers.push((name, file));
    }
    Ok(leftovers)
}

/// Whether the boot that a file was made for may go on: somebody has the file, or it was made on this machine as it runs.
fn goes_on(file: &File, kind: &Kind, pid_namespace: u64, deadline: Instant) -> Result<bool, StoreError> {
    match directory::until(deadline.min(Instant::now() + CLEANER), || file.try_lock()) {
        Ok(()) => {
            let _ = file.unlock();
            Ok((kind.made)(file).is_some_and(|made| made.is_of_this_run(pid_namespace)))
        }
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(failed("a lock could not be asked for", &error)),
    }
}

/// Whether nothing was written to a file yet: its maker may have died before.
fn is_empty(file: &File) -> bool {
    let mut beginning = [0; 64];
    file.metadata().is_ok_and(|found| found.len() == 0)
        || file.read_exact_at(&mut beginning, 0).is_ok() && beginning == [0; 64]
}
