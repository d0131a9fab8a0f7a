//! What is asked of a store, and what it answers.

use std::sync::Arc;
use std::time::Duration;

use super::state::{Holder, State};
use crate::clock::Boottime;
use crate::record::{Identity, Record};
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// One conditional write to the record of one key. It is applied at one moment, or not at all.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Change {
    pub condition: Condition,
    pub write: Write,
    /// The moment, on this machine's clock, after which the change takes nothing (R3). The store compares it
    /// on its own clock, and errs to the early side. Only writes that grant have one.
    pub not_after: Option<Boottime>,
    /// When it is sent, on this machine's clock, where its sender has just read it. A store whose clock that is, and
    /// that applies the change on the sender's thread, takes this moment for the one at which the change arrived.
    pub sent: Option<Boottime>,
}

/// What must be true of the record when the change is applied.
///
/// A fourth condition, room among several holders, comes with shared holds.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Condition {
    /// There is no record.
    Absent,
    /// The record is in the very state that was read, the end of its lease included; and, for a take-over,
    /// its lease is over by the store's clock at the moment of the change.
    Seen { state: Box<State>, over: bool },
    /// The record proves this hold, and what the write numbers carries a lower number.
    Mine(Proof),
}

/// What proves a hold.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Proof {
    /// This very token.
    Token(Token),
    /// Any token of the hold: for cleaning up after its attempts.
    Hold(HoldId),
    /// The owner token, and the hold by its name; `None`: a hold that has no name yet.
    Owner { owner: OwnerToken, hold: Option<HoldId> },
    /// The owner token, the hold by its name, and the object by its entry. A user of a hold proves it by this:
    /// the record may be there although its own entry has gone, and goes itself when the other users have left.
    Object { owner: OwnerToken, hold: HoldId, object: ObjectId },
}

/// What is written where the condition is true. Fields that a store does not know are kept, except by
/// [`Write::Put`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Write {
    /// A new record, whose lease begins now. It replaces what is there.
    Put(NewRecord),
    /// Sets how often one object is in a reentrant hold; it never adds to a count. The record goes with the
    /// last count.
    Entry {
        /// `None`: what another library counts, beyond the entries.
        object: Option<ObjectId>,
        count: u32,
        /// Written into the entry. Under [`Condition::Mine`] it must be above the entry's own.
        write_seq: u64,
        /// Whether an object without an entry gets one. Otherwise the condition is false without an entry.
        may_add: bool,
        lease: Lease,
        /// The name that a hold without one gets.
        name: Option<HoldId>,
    },
    /// A new lease.
    Extend {
        lease: Lease,
        /// Written into the record. Under [`Condition::Mine`] it must be above the record's own. A reentrant
        /// hold is renewed by several objects, without a number.
        write_seq: Option<u64>,
    },
    /// No record.
    Delete,
}

/// A record to be made. The store adds the key, the end of the lease, the time and, where it can, the fence.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct NewRecord {
    pub holder: Holder,
    pub expire: Duration,
    pub identity: Arc<Identity>,
}

/// What happens to the lease's end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Lease {
    /// So long from the store's now.
    FromNow(Duration),
    /// So long from the store's now, or as stored where that is later.
    NotSooner(Duration),
    AsStored,
}

/// The result of a change. A reply to a change, unlike a read, is the store's word: only such a reply says
/// that a hold is lost, not ours, cleaned up, or proven.
#[derive(Clone, Debug)]
pub enum Reply {
    /// The condition was true, and the write is done. `fence`: the record's, where it is there and has one.
    Applied { fence: Option<u64> },
    /// The condition was false: this record is there, or none.
    Found(Option<Box<Record>>),
    /// The store's clock had passed `not_after`.
    TooLate,
}

impl Change {
    /// A change that may be applied at any time: it matches only what exists.
    #[inline]
    pub fn new(condition: Condition, write: Write) -> Change {
        Change { condition, write, not_after: None, sent: None }
    }

    /// A change that takes nothing after that moment.
    #[inline]
    pub fn until(self, not_after: Boottime) -> Change {
        Change { not_after: Some(not_after), ..self }
    }

    /// The change, sent at that moment.
    #[inline]
    pub fn sent(self, sent: Boottime) -> Change {
        Change { sent: Some(sent), ..self }
    }

    /// The change, which arrives later than it was sent.
    pub fn delayed(self) -> Change {
        Change { sent: None, ..self }
    }

    /// Whether its effect is the same at any time: a store need not read its clock for it.
    #[inline]
    pub fn is_timeless(&self) -> bool {
        matches!((&self.condition, &self.write, self.not_after), (Condition::Mine(_), Write::Delete, None))
    }

    /// The token of the plain hold that is given back, if this is that.
    #[inline]
    pub fn as_plain_release(&self) -> Option<Token> {
        match *self {
            Change {
                condition: Condition::Mine(Proof::Token(token)), write: Write::Delete, not_after: None, ..
            } => Some(token),
            _ => None,
        }
    }

    /// The renewal of a plain hold, if this is one.
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

/// The renewal of a plain hold: the most frequent change, of which stores send many in one request.
#[derive(Clone, Copy, Debug)]
pub struct PlainRenewal {
    pub token: Token,
    pub write_seq: u64,
    pub expire: Duration,
}
