//! Requests to a store, and its replies.

use std::sync::Arc;
use std::time::Duration;

use super::state::{Holder, State};
use crate::clock::Boottime;
use crate::record::{Identity, Record};
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// One conditional write to the record of one key. It is applied atomically, or not at all.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Change {
    pub condition: Condition,
    pub write: Write,
    /// The time, on this machine's clock, after which the change must not be applied (R3). The store compares it with
    /// its own clock, and errs on the early side. Only writes that grant have one.
    pub not_after: Option<Boottime>,
    /// When it is sent, on this machine's clock, if the sender has just read it. A store that uses the same clock, and
    /// applies the change on the sender's thread, takes this as the time of the change.
    pub sent: Option<Boottime>,
}

/// What must hold for the record when the change is applied.
///
/// Shared holds will add a fourth condition: that the record has room for another holder.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Condition {
    /// There is no record.
    Absent,
    /// The record is in exactly the state that was read, including the end of its lease; for a take-over (`over`), its
    /// lease is also over, by the store's clock at the time of the change.
    Seen { state: Box<State>, over: bool },
    /// The record proves this hold, and the number of the write, if it has one, is above the stored one.
    Mine(Proof),
}

/// What proves a hold.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Proof {
    /// This very token.
    Token(Token),
    /// Any token of the hold, for cleaning up after its attempts.
    Hold(HoldId),
    /// The owner token, and the name of the hold; `None`: a hold that has no name yet.
    Owner { owner: OwnerToken, hold: Option<HoldId> },
    /// The owner token, the name of the hold, and an entry of the object. This proves that the object is a user of the
    /// hold. Without its entry, the record may still exist, because of other users, and disappear when they leave.
    Object { owner: OwnerToken, hold: HoldId, object: ObjectId },
}

/// What is written if the condition holds. Fields of a record that the library does not know are kept, except by
/// [`Write::Put`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Write {
    /// A new record, whose lease begins now. It replaces what is there.
    Put(NewRecord),
    /// Sets the number of steps that one object has in a reentrant hold. If no steps are left, the record is deleted.
    Entry {
        /// `None`: the part of the count that belongs to other libraries, beyond the entries.
        object: Option<ObjectId>,
        count: u32,
        /// Stored in the entry. With [`Condition::Mine`], it must be above the stored one.
        write_seq: u64,
        /// Whether an object without an entry gets one. If not, the condition does not hold without an entry.
        may_add: bool,
        lease: Lease,
        /// The name for a hold that has none.
        name: Option<HoldId>,
    },
    /// A new lease.
    Extend {
        lease: Lease,
        /// Stored in the record. With [`Condition::Mine`], it must be above the stored one. Reentrant holds are renewed
        /// by several objects, without a number.
        write_seq: Option<u64>,
    },
    /// Delete the record.
    Delete,
}

/// A record to be created. The store adds the key, the end of the lease, the time and, if it can, the fence.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct NewRecord {
    pub holder: Holder,
    pub expire: Duration,
    pub identity: Arc<Identity>,
}

/// The new end of a lease.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Lease {
    /// This long after the store's present time.
    FromNow(Duration),
    /// This long after the store's present time, or the stored end, whichever is later.
    NotSooner(Duration),
    AsStored,
}

/// The result of a change. Only a reply to a change, and not a read, can prove a hold, or show that it is lost,
/// another's, or cleaned up.
#[derive(Clone, Debug)]
pub enum Reply {
    /// The condition did hold, and the write is done. `fence`: that of the record, if it exists and has one.
    Applied { fence: Option<u64> },
    /// The condition did not hold: this is the present record, or there is none.
    Found(Option<Box<Record>>),
    /// The store's clock had passed `not_after`.
    TooLate,
}

impl Change {
    /// A change that may be applied at any time.
    #[inline]
    pub fn new(condition: Condition, write: Write) -> Change {
        Change { condition, write, not_after: None, sent: None }
    }

    /// The change, not to be applied after that time.
    #[inline]
    pub fn until(self, not_after: Boottime) -> Change {
        Change { not_after: Some(not_after), ..self }
    }

    /// The change, sent at that time.
    #[inline]
    pub fn sent(self, sent: Boottime) -> Change {
        Change { sent: Some(sent), ..self }
    }

    /// The change, to be applied later than it was sent.
    pub fn delayed(self) -> Change {
        Change { sent: None, ..self }
    }

    /// Whether its effect does not depend on the time, so that a store need not read its clock.
    #[inline]
    pub fn is_timeless(&self) -> bool {
        matches!((&self.condition, &self.write, self.not_after), (Condition::Mine(_), Write::Delete, None))
    }

    /// The token, if this is the release of a plain hold.
    #[inline]
    pub fn as_plain_release(&self) -> Option<Token> {
        match *self {
            Change {
                condition: Condition::Mine(Proof::Token(token)), write: Write::Delete, not_after: None, ..
            } => Some(token),
            _ => None,
        }
    }

    /// The renewal, if this is one of a plain hold.
    pub fn as_plain_renewal(&self) -> Option<PlainRenewal> {
        match *self {
            Change {
                condition: Condition::Mine(Proof::Token(token)),
                write: Write::Extend { lease: Lease::FromNow(expire), write_seq: Some(write_seq) },
                not_after: None,
                ..
            } => Some(PlainRenewal { token, write_seq, expire }),
            _ => None,
        }
    }
}

/// The renewal of a plain hold. It is the most frequent change, and stores send many of them in one request.
#[derive(Clone, Copy, Debug)]
pub struct PlainRenewal {
    pub token: Token,
    pub write_seq: u64,
    pub expire: Duration,
}
