//! The meaning of a change.

use super::change::{Change, Condition, Lease, Proof, Write};
use super::state::{Entry, Holder, State, StoreTime};

/// What a change does to a record.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Effect {
    /// A new record in this state is written, with its fence and owner, in place of the present one.
    Put(State),
    /// The record is kept, with this state.
    Update(State),
    /// The record is deleted.
    Remove,
    /// The condition does not hold: nothing changes.
    Refused,
    /// The store's clock has passed `not_after`: nothing changes.
    TooLate,
}

/// The reference meaning of a change to a record, or to none.
///
/// `now` is the store's clock, read when the change is applied; `not_after` is the change's own, on that clock.
/// A store whose clock is not this machine's converts it.
#[inline]
pub fn apply(present: Option<&State>, now: StoreTime, not_after: Option<StoreTime>, change: &Change) -> Effect {
    if not_after.is_some_and(|not_after| now > not_after) {
        return Effect::TooLate;
    }
    if !holds(present, now, change) {
        return Effect::Refused;
    }
    match (&change.write, present) {
        (Write::Put(new), _) => Effect::Put(State { holder: new.holder.clone(), ends_at: now + new.expire }),
        (Write::Delete, _) => Effect::Remove,
        (_, None) => Effect::Refused,
        (Write::Extend { lease, write_seq }, Some(present)) => {
            let mut state = present.clone();
            state.ends_at = lease.end(present.ends_at, now);
            if let (Holder::Plain { write_seq: last, .. }, Some(write_seq)) = (&mut state.holder, write_seq) {
                *last = *write_seq;
            }
            Effect::Update(state)
        }
        (Write::Entry { object, count, write_seq, lease, name, .. }, Some(present)) => {
            let mut state = present.clone();
            state.ends_at = lease.end(present.ends_at, now);
            let Holder::Reentrant { hold, count: total, entries, .. } = &mut state.holder else {
                return Effect::Refused;
            };
            let counted: u64 = entries.iter().map(|entry| u64::from(entry.count)).sum();
            let before = match object {
                Some(object) => {
                    let at = entries.iter().position(|entry| entry.object == *object);
                    let before = at.map_or(0, |at| entries.remove(at).count);
                    if *count > 0 {
                        entries.push(Entry { object: *object, count: *count, write_seq: *write_seq });
                    }
                    u64::from(before)
                }
                None => u64::from(*total).saturating_sub(counted),
            };
            // The stored count decides, and not the entries: other libraries use the count too.
            let after = (u64::from(*total) + u64::from(*count)).saturating_sub(before);
            *total = u32::try_from(after).unwrap_or(u32::MAX);
            *hold = hold.or(*name);
            if after == 0 { Effect::Remove } else { Effect::Update(state) }
        }
    }
}

/// Whether the condition of a change holds.
#[inline]
pub fn holds(present: Option<&State>, now: StoreTime, change: &Change) -> bool {
    match (&change.condition, present) {
        (Condition::Absent, present) => present.is_none(),
        (Condition::Seen { .. } | Condition::Mine(_), None) => false,
        (Condition::Seen { state, over }, Some(present)) => present == &**state && (!over || present.is_over(now)),
        (Condition::Mine(proof), Some(present)) => {
            present.holder.is_proven_by(proof) && change.write.is_newer_than(&present.holder)
        }
    }
}

impl Holder {
    /// Whether this proves a hold on the record.
    pub fn is_proven_by(&self, proof: &Proof) -> bool {
        match (self, proof) {
            (Holder::Plain { token, .. }, Proof::Token(ours)) => token == ours,
            (Holder::Plain { token, .. }, Proof::Hold(ours)) => token.hold == *ours,
            (Holder::Reentrant { owner, hold, .. }, Proof::Owner { owner: ours, hold: our_hold }) => {
                owner == ours && hold == our_hold
            }
            (Holder::Reentrant { owner, hold, .. }, Proof::Object { owner: ours, hold: our_hold, object }) => {
                owner == ours && hold.as_ref() == Some(our_hold) && self.entry(*object).is_some()
            }
            _ => false,
        }
    }
}

impl Write {
    /// Whether the number of the write is above the last one that was stored.
    fn is_newer_than(&self, holder: &Holder) -> bool {
        match (self, holder) {
            (Write::Extend { write_seq: Some(ours), .. }, Holder::Plain { write_seq, .. }) => write_seq < ours,
            (Write::Entry { object: Some(object), write_seq, may_add, .. }, Holder::Reentrant { .. }) => {
                holder.entry(*object).map_or(*may_add, |entry| entry.write_seq < *write_seq)
            }
            _ => true,
        }
    }
}

impl Lease {
    fn end(self, stored: StoreTime, now: StoreTime) -> StoreTime {
        match self {
            Lease::FromNow(expire) => now + expire,
            Lease::NotSooner(expire) => stored.max(now + expire),
            Lease::AsStored => stored,
        }
    }
}
