//! Broken protocols: each changes one thing that the library's functions say, or that the store compares.

use std::time::Duration;

use nblock::protocol::{
    Acquisition, Change, Condition, Effect, Granted, Holder, Lease, NewRecord, Orphan, Proof, State, StoreTime, Write,
    apply, holds,
};
use nblock::record::{self, Record};
use nblock::token::{HoldId, Token};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mutant {
    /// R2: a repeated request does not know its own hold.
    DoesNotKnowItself,
    /// R3: all attempts of a hold have one token.
    OneTokenForAllAttempts,
    /// R3: all attempts of a reentrant hold have one name, and renewals prove the owner alone.
    OneNameForAllAttempts,
    /// R17: a renewal proves the owner and the hold, and not the object's entry.
    RenewsByOwnerAlone,
    /// R3: a write is applied over any other.
    AnyNumber,
    /// R3: an attempt takes something whenever it comes.
    NoNotAfter,
    /// R4: the lease is counted from the reply.
    DeadlineFromReply,
    /// R4: a grant counts although its answer came after its deadline.
    LateGrantCounts,
    /// R2: the client says when a lease is over, and the store does not look again.
    OverByEstimate,
    /// Seen compares all but the end of the lease.
    SeenWithoutTheLease,
    /// A number of the store's proves a hold.
    StoresCounterAlone,
    /// R6: an unlock deletes what is there.
    UnlockWithoutToken,
    /// R7: an unlock is judged by when its last request left.
    UnlockJudgedByRetry,
    /// A read that finds nothing says lost.
    AbsenceFromARead,
    /// R7: what was given up is removed once.
    CleansOnce,
    /// R17: a removal has a number that later steps are below.
    CleansAboveLaterSteps,
    /// R17: a step adds one, or takes one away, whatever the entries say.
    EntriesIgnored,
    /// R17: a step in adds one to the entry.
    EntryAddedTo,
    /// R17: the record goes with the last entry.
    ListDecides,
    /// R18: a fence that was drawn after the grant is used although the hold was not proven since.
    FenceWithoutProof,
}

impl Mutant {
    pub fn is_the_stores(self) -> bool {
        use Mutant::*;
        matches!(
            self,
            AnyNumber | NoNotAfter | SeenWithoutTheLease | EntriesIgnored | EntryAddedTo | ListDecides | OverByEstimate
        )
    }

    /// Whether a hold that is gone for good is so with this as well.
    pub fn keeps_names(self) -> bool {
        matches!(self, Mutant::RenewsByOwnerAlone | Mutant::OneNameForAllAttempts | Mutant::CleansOnce)
    }

    pub fn is_of_requests(self) -> bool {
        matches!(self, Mutant::OneTokenForAllAttempts | Mutant::OneNameForAllAttempts)
    }

    pub fn is_of_replies(self) -> bool {
        matches!(
            self,
            Mutant::DoesNotKnowItself
                | Mutant::OneTokenForAllAttempts
                | Mutant::OneNameForAllAttempts
                | Mutant::OverByEstimate
        )
    }

    /// What a broken store does.
    pub fn apply(
        self,
        present: Option<&State>,
        now: StoreTime,
        not_after: Option<StoreTime>,
        change: &Change,
    ) -> Effect {
        let effect = apply(present, now, not_after, change);
        match (self, &change.condition, &change.write, present) {
            (Mutant::NoNotAfter, ..) => apply(present, now, None, change),
            (Mutant::AnyNumber, Condition::Mine(_), Write::Extend { lease, write_seq: Some(write_seq) }, Some(_)) => {
                let write = Write::Extend { lease: *lease, write_seq: None };
                let mut effect = apply(present, now, not_after, &Change { write, ..change.clone() });
                if let Effect::Update(State { holder: Holder::Plain { write_seq: last, .. }, .. }) = &mut effect {
                    *last = *write_seq;
                }
                effect
            }
            (Mutant::AnyNumber, Condition::Mine(_), Write::Entry { .. }, Some(present)) => {
                let mut present = present.clone();
                if let Holder::Reentrant { entries, .. } = &mut present.holder {
                    entries.iter_mut().for_each(|entry| entry.write_seq = 0);
                }
                apply(Some(&present), now, not_after, change)
            }
            (Mutant::OverByEstimate, Condition::Seen { state, over: true }, ..) => {
                let condition = Condition::Seen { state: state.clone(), over: false };
                apply(present, now, not_after, &Change { condition, ..change.clone() })
            }
            (Mutant::SeenWithoutTheLease, Condition::Seen { state, over: false }, _, Some(present)) => {
                let state = State { ends_at: present.ends_at, ..(**state).clone() };
                let condition = Condition::Seen { state: Box::new(state), over: false };
                apply(Some(present), now, not_after, &Change { condition, ..change.clone() })
            }
            (Mutant::EntriesIgnored, Condition::Mine(proof), Write::Entry { lease, .. }, Some(present))
                if present.holder.is_proven_by(proof) && effect != Effect::TooLate =>
            {
                let mut state = present.clone();
                let Holder::Reentrant { count, .. } = &mut state.holder else { return effect };
                *count = if *lease == Lease::AsStored { count.saturating_sub(1) } else { *count + 1 };
                let gone = *count == 0;
                if let Lease::NotSooner(expire) = lease {
                    state.ends_at = state.ends_at.max(now + *expire);
                }
                if gone { Effect::Remove } else { Effect::Update(state) }
            }
            (
                Mutant::EntryAddedTo,
                Condition::Mine(_),
                Write::Entry { object: Some(object), lease, .. },
                Some(present),
            ) if *lease != Lease::AsStored && holds(Some(present), now, change) => {
                let before = present.holder.entry(*object).map_or(0, |entry| entry.count);
                let mut change = change.clone();
                if let Write::Entry { count, .. } = &mut change.write {
                    *count = before + 1;
                }
                apply(Some(present), now, not_after, &change)
            }
            (Mutant::ListDecides, ..) => match effect {
                Effect::Update(State { holder: Holder::Reentrant { entries, hold: Some(_), .. }, .. })
                    if entries.is_empty() =>
                {
                    Effect::Remove
                }
                effect => effect,
            },
            _ => effect,
        }
    }

    /// What a broken acquisition asks.
    pub fn asks(self, change: &mut Change) {
        let Write::Put(NewRecord { holder, .. }) = &mut change.write else { return };
        match (self, holder) {
            (Mutant::OneTokenForAllAttempts, Holder::Plain { token, .. }) => *token = first(*token),
            (Mutant::OneNameForAllAttempts, Holder::Reentrant { hold, .. }) => *hold = hold.map(base),
            _ => {}
        }
    }

    /// What a broken acquisition takes a record for.
    pub fn reads(self, record: &mut Record, acquisition: &Acquisition, since_sent: Duration) {
        match self {
            Mutant::DoesNotKnowItself => {
                // An acquisition knows its hold by the orphan that it would leave.
                let orphan = acquisition.clone().orphan();
                if let Orphan::Plain { hold } = orphan
                    && record.state.holder.is_proven_by(&Proof::Hold(hold))
                {
                    record.state.holder = Holder::Foreign { token: "unknown".into() };
                }
            }
            Mutant::OverByEstimate if record.lease.remaining() <= since_sent && !record.lease.expired() => {
                record.lease = record::Lease::RanOut(Duration::ZERO);
            }
            _ => {}
        }
    }

    /// What a broken acquisition takes for granted.
    pub fn is_granted(self, granted: &mut Granted) {
        match self {
            Mutant::OneTokenForAllAttempts => granted.token = granted.token.map(first),
            Mutant::OneNameForAllAttempts => granted.hold = base(granted.hold),
            _ => {}
        }
    }

    /// What a broken clean-up sends.
    pub fn removes(self, change: &mut Change) {
        if let (Mutant::CleansAboveLaterSteps, Write::Entry { write_seq, .. }) = (self, &mut change.write) {
            *write_seq = 1_000;
        }
        if self == Mutant::OneNameForAllAttempts
            && let Condition::Mine(Proof::Owner { hold: Some(hold), .. }) = &mut change.condition
        {
            *hold = base(*hold);
        }
    }
}

/// The token that all attempts of a hold share.
fn first(token: Token) -> Token {
    Token { attempt: 1, ..token }
}

/// The name that all attempts share: its last byte is the attempt's.
fn base(mut hold: HoldId) -> HoldId {
    hold.0[15] = 0;
    hold
}
