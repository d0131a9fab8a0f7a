//! Why an operation failed.

use std::time::Duration;

use super::thread;
use crate::store::StoreError;

#[derive(Debug)]
pub enum Fault {
    /// Another thread had the mutex during the whole wait.
    Busy {
        owner: u32,
        waited: Duration,
    },
    /// The shard has fewer free cells than this. [`super::Table::with`] makes space and starts again.
    Full(u32),
    /// The shard has no fences left. [`super::Table::with`] reserves some and starts again.
    FencesSpent,
    /// Derived data of the shard (its free cells) is damaged. [`super::Table::with`] has it derived again.
    Spoiled,
    /// The record of the key is damaged, or a damaged record may be that of the key.
    Damaged(Damaged),
    /// The file was replaced: the present one has to be opened.
    Gone,
    /// The table was opened by the process that this one was forked from.
    Forked,
    Failed(StoreError),
}

/// The place and the contents of something damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged {
    pub shard: usize,
    pub slot: usize,
    /// The link that leads there, as it is stored.
    pub link: u32,
    /// A checksum of what is there.
    pub contents: u64,
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Fault {
        Fault::Failed(error)
    }
}

impl Fault {
    /// The error for the caller of the store. [`Fault::Gone`] is normally handled before, by opening the file again.
    pub fn into_error(self) -> StoreError {
        match self {
            Fault::Failed(error) => error,
            Fault::Busy { owner, waited } => {
                let waited = waited.as_secs_f64();
                StoreError::unreachable(match thread::process_of(owner) {
                    Some(process) => format!(
                        "store busy: process {process} did not release a part of the store within {waited:.1} s: if it \
                         is stopped, continue or end it"
                    ),
                    None => format!("store busy: a part of the store was in use for {waited:.1} s"),
                })
            }
            Fault::Damaged(_) => StoreError::rejected("a record is damaged"),
            Fault::Gone => StoreError::unreachable("the files of the embedded store were replaced during the call"),
            Fault::Forked => StoreError::forked(),
            Fault::Full(_) | Fault::FencesSpent | Fault::Spoiled => StoreError::unreachable(
                "store busy: other processes repeatedly used the space that was prepared for \
                     this operation",
            ),
        }
    }
}
