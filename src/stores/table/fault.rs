//! Why an operation was not carried out.

use crate::store::StoreError;

#[derive(Debug)]
pub enum Fault {
    /// The shard has fewer free cells than so many. [`super::Table::with`] sees to it and begins anew.
    Full(u32),
    /// The shard has no fences left. [`super::Table::with`] sees to it and begins anew.
    FencesSpent,
    /// What the shard derives from its records is damaged. [`super::Table::with`] has it derived anew.
    Spoiled,
    /// The file was replaced: open the one that is there now.
    Gone,
    /// The table was opened by the process that this one was forked from.
    Forked,
    Failed(StoreError),
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Fault {
        Fault::Failed(error)
    }
}

impl Fault {
    /// For callers that open anew on [`Fault::Gone`] and [`Fault::Forked`] by themselves.
    pub fn into_error(self) -> StoreError {
        match self {
            Fault::Failed(error) => error,
            Fault::Gone => StoreError::unreachable("the files of the embedded store were replaced"),
            Fault::Forked => StoreError::unreachable("the embedded store was opened before this process was forked"),
            Fault::Full(_) | Fault::FencesSpent | Fault::Spoiled => {
                StoreError::unreachable("store busy: others used up again and again what was made for this operation")
            }
        }
    }
}
