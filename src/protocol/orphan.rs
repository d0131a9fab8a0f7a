//! What requests of a hold that is not wanted any more may have left, and its removal (R7).

use super::change::{Change, Condition, Lease, Proof, Write};
use crate::token::{HoldId, ObjectId, OwnerToken};

/// What unanswered requests may have left in the store, or may still leave.
///
/// Its changes may be sent any number of times, at any time: they remove attempts of one hold, or set an
/// object's count to what it was before the step, under a number that later steps are above. One answer is
/// enough only where every request was answered, or the last one's `not_after` has passed when the change
/// is applied: until then a request that is still on its way makes again what was removed.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Orphan {
    /// Any attempt of a plain hold.
    Plain { hold: HoldId },
    /// A step of an object into one of these holds.
    Step {
        owner: OwnerToken,
        object: ObjectId,
        /// How often the object is in without the step.
        count: u32,
        write_seq: u64,
        holds: Vec<HoldId>,
    },
}

impl Orphan {
    /// The changes that remove it, one for each hold. What the store finds instead does not matter: a change
    /// that is answered has left nothing of the orphan.
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
