//! Giving a hold, or one step of it, back (R6, R7, R17).

use super::change::{Change, Condition, Lease, Proof, Reply, Write};
use super::state::Holder;
use crate::clock::Boottime;
use crate::record::Record;
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// One unlock. Its change may be sent again until it is answered.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Release {
    /// A plain hold.
    Plain { token: Token },
    /// One step of a reentrant hold.
    Step(Step),
    /// A step that another user of the owner token made, in the state that was read.
    Others(Box<Change>),
}

/// A step out of a reentrant hold.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Step {
    pub owner: OwnerToken,
    pub object: ObjectId,
    pub hold: HoldId,
    /// How often the object is in afterwards.
    pub count: u32,
    pub write_seq: u64,
}

/// What the store said to an unlock.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Judgement {
    /// It was ours, and is not in the record any more.
    Released,
    /// It was not ours any more.
    Lost,
}

impl Release {
    /// The change of the release of a plain hold.
    #[inline]
    pub fn change_of_plain(token: Token) -> Change {
        Change::new(Condition::Mine(Proof::Token(token)), Write::Delete)
    }

    pub fn change(&self) -> Change {
        match self {
            Release::Plain { token } => Release::change_of_plain(*token),
            Release::Step(step) => Change::new(
                Condition::Mine(Proof::Owner { owner: step.owner.clone(), hold: Some(step.hold) }),
                Write::Entry {
                    object: Some(step.object),
                    count: step.count,
                    write_seq: step.write_seq,
                    may_add: false,
                    lease: Lease::AsStored,
                    name: None,
                },
            ),
            Release::Others(change) => (**change).clone(),
        }
    }

    /// What a reply means: judged by when the *first* request left (R7).
    ///
    /// `sent`: when that was; a later moment errs to the side of a loss. `doubtful`: whether an earlier request may
    /// have been applied although its answer never came. A request whose answer was lost may have removed the hold,
    /// and one that was long on its way may have been overtaken by the lease's end. Inside the deadline neither can be: somebody broke it. Of a
    /// step that leaves the object in the hold, the record itself says that an earlier request was applied.
    pub fn judge(
        &self,
        reply: &Reply,
        sent: impl FnOnce() -> Boottime,
        deadline: Boottime,
        doubtful: bool,
        now: impl FnOnce() -> Boottime,
    ) -> Judgement {
        let released = match reply {
            Reply::Applied { .. } => true,
            Reply::Found(Some(record)) if self.is_done(&record.state.holder) => true,
            Reply::Found(_) | Reply::TooLate => sent() < deadline && (doubtful || deadline <= now()),
        };
        if released { Judgement::Released } else { Judgement::Lost }
    }

    /// Whether the record says that this step was made, or a later one.
    fn is_done(&self, holder: &Holder) -> bool {
        let Release::Step(step) = self else { return false };
        let proof = Proof::Object { owner: step.owner.clone(), hold: step.hold, object: step.object };
        holder.is_proven_by(&proof) && holder.entry(step.object).is_some_and(|entry| entry.write_seq >= step.write_seq)
    }
}

/// The unlock of an object that is in no hold itself, but whose owner token has the record that was read: it takes
/// a step of another user. `None`: the owner token does not have it.
pub fn step_out_of(record: &Record, owner: &OwnerToken) -> Option<Release> {
    let Holder::Reentrant { owner: present, count, entries, .. } = &record.state.holder else { return None };
    if present != owner {
        return None;
    }
    let counted: u64 = entries.iter().map(|entry| u64::from(entry.count)).sum();
    let beyond = u64::from(*count).saturating_sub(counted);
    let (object, count, write_seq) = match entries.last() {
        Some(entry) if beyond == 0 => (Some(entry.object), entry.count.saturating_sub(1), entry.write_seq),
        _ => (None, beyond.saturating_sub(1) as u32, 0),
    };
    Some(Release::Others(Box::new(Change::new(
        Condition::Seen { state: Box::new(record.state.clone()), over: false },
        Write::Entry { object, count, write_seq, may_add: false, lease: Lease::AsStored, name: None },
    ))))
}
