//! Orphans: what the requests for a hold that is not wanted any more may have left, and its removal (R7).

use super::change::{Change, Condition, Lease, Proof, Write};
use crate::token::{HoldId, ObjectId, OwnerToken};

/// What unanswered requests may have left in the store, or may still leave.
///
/// The removals may be sent any number of times, at any time: they remove the attempts of one hold, or set an object's
/// count to what it was before the step, with a number below those of later steps. One reply to a removal is enough
/// only if every request was replied to, or if the `not_after` of the last request has passed when the removal is
/// applied. Before that, a request that is still on its way could create again what was removed.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Orphan {
    /// Any attempt of a plain hold.
    Plain { hold: HoldId },
    /// A step of an object into one of these holds.
    Step {
        owner: OwnerToken,
        object: ObjectId,
        /// How many steps the object has without this one.
        count: u32,
        write_seq: u64,
        holds: Vec<HoldId>,
    },
}

impl Orphan {
    /// The changes that remove it, one for each hold. Any reply to a removal means that nothing of the orphan is left,
    /// even if the condition did not hold.
    pub fn removals(&self) -> Vec<Change> {
        match self {
            Orphan::Plain { hold } => vec![Change::new(Condition::Mine(Proof::Hold(*hold)), Write::Delete)],
            Orphan::Step { owner, object, count, write_seq, holds } => holds
                .iter()
                .map(|hold| {
                    Change::new(
                        Condition::Mine(Proof::Owner { owner: owner.clone(), hold: Some(*hold) }),
                        Write::Entry {
                            object: Some(*object),
                            count: *count,
                            write_seq: *write_seq,
                            may_add: false,
                            lease: Lease::AsStored,
                            name: None,
                        },
                    )
                })
                .collect(),
        }
    }
}
