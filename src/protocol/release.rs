//! Releasing a hold, or one step of it (R6, R7, R17).

use super::change::{Change, Condition, Lease, Proof, Reply, Write};
use super::state::Holder;
use crate::clock::Boottime;
use crate::record::Record;
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// One unlock. Its change may be sent again until the store replies.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Release {
    /// A plain hold.
    Plain { token: Token },
    /// One step of a reentrant hold.
    Step(Step),
    /// A step of another user of the owner token, for the record that was read.
    Others(Box<Change>),
}

/// The unlock of one step of a reentrant hold.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Step {
    pub owner: OwnerToken,
    pub object: ObjectId,
    pub hold: HoldId,
    /// How many steps the object has afterwards.
    pub count: u32,
    pub write_seq: u64,
}

/// The result of an unlock.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Judgement {
    /// The hold was ours, and is released.
    Released,
    /// The hold was not ours any more.
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

    /// What a reply means. It depends on when the *first* request was sent (R7).
    ///
    /// `sent`: when that was; a later time errs on the side of a loss. `doubtful`: whether an earlier request may have
    /// been applied although its reply did not arrive. If the hold is gone, an earlier request may have removed it, or
    /// the lease may have ended while the request was on its way: both count as released. Otherwise the hold was lost:
    /// it was broken, or the first request was sent after the deadline. For a step after which the object still has
    /// others, the record itself shows whether an earlier request was applied.
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

    /// Whether the record shows that this step, or a later one, was applied.
    fn is_done(&self, holder: &Holder) -> bool {
        let Release::Step(step) = self else { return false };
        let proof = Proof::Object { owner: step.owner.clone(), hold: step.hold, object: step.object };
        holder.is_proven_by(&proof) && holder.entry(step.object).is_some_and(|entry| entry.write_seq >= step.write_seq)
    }
}

/// The unlock of an object that has no step itself, but whose owner token has the record that was read: it removes a
/// step of another user. `None`: the record does not belong to the owner token.
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
