//! Acquiring a hold (R2, R3, R17).

use std::sync::Arc;
use std::time::Duration;

use super::change::{Change, Condition, Lease, NewRecord, Proof, Reply, Write};
use super::orphan::Orphan;
use super::renew::Renewal;
use super::state::{Entry, Holder, State};
use crate::record::{Identity, Record};
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// One acquire of a hold, or of a further step into a reentrant hold, from the first request to the grant.
///
/// [`ask`](Acquisition::ask) returns the next request, and [`read`](Acquisition::read) says what its reply means. If a
/// reply does not arrive, the next request may be sent without it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Acquisition {
    /// The name of the hold, if a request creates one.
    hold: HoldId,
    asker: Asker,
    expire: Duration,
    identity: Arc<Identity>,
    next: Next,
    /// The number of requests sent that can create a record, or give a hold its name. Each has its own token or name: a
    /// late one must not bring back what another one has created (R3).
    attempts: u32,
    /// The number of the last write sent.
    write_seq: u64,
    /// The reentrant holds that requests were sent for, one for each request. Refused requests are removed.
    entered: Vec<HoldId>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Asker {
    Plain,
    Reentrant {
        owner: OwnerToken,
        object: ObjectId,
        /// How many steps the object has already, and in which hold.
        depth: u32,
        held: Option<HoldId>,
    },
}

/// The kind of the next request.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Next {
    /// Create a record, if there is none.
    Create,
    /// Take over the record that was read, if its lease is over.
    TakeOver(Box<State>),
    /// Add a step to a hold of this owner; `None`: a hold without a name.
    Enter(Option<HoldId>),
    /// Renew a record that is ours, to get a lease of known length.
    Prove { granted: Granted, proof: Proof },
}

/// A request that was sent, for reading its reply.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Asked {
    /// What is granted if the change is applied.
    granted: Granted,
    /// The proof of what is ours already, if the request is to prove it.
    proves: Option<Proof>,
}

/// What a reply means.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Granted, with a lease that began when the request was sent, or later.
    Granted(Granted),
    /// Send the next request now.
    Ask,
    /// The record has another holder. Another request can succeed only after a change, or after its lease has ended.
    Held(Box<Record>),
    /// The record that was granted to this hold is gone: further requests need a new hold.
    Gone,
    /// The reentrant hold that the object had steps in is gone.
    Lost,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Granted {
    pub hold: HoldId,
    /// The token in the record. Plain holds only.
    pub token: Option<Token>,
    pub fence: Option<u64>,
    /// The number of the write that was granted.
    pub write_seq: u64,
}

impl Granted {
    const FIRST_WRITE: u64 = 1;

    /// What is granted if the first request for a plain hold was applied, and its proof.
    #[inline]
    pub fn first_of_plain(token: Token, fence: Option<u64>) -> (Granted, Proof) {
        let granted = Granted { hold: token.hold, token: Some(token), fence, write_seq: Granted::FIRST_WRITE };
        (granted, Proof::Token(token))
    }
}

impl Acquisition {
    /// Acquires a plain hold with this name, which must be unique.
    pub fn plain(hold: HoldId, expire: Duration, identity: Arc<Identity>) -> Acquisition {
        Acquisition::new(hold, Asker::Plain, Next::Create, 0, expire, identity)
    }

    /// The first request of [`plain`](Acquisition::plain), and its token, for callers that need no `Acquisition`
    /// because the reply is immediate.
    #[inline]
    pub fn first_of_plain(hold: HoldId, expire: Duration, identity: Arc<Identity>) -> (Token, Change) {
        let token = Token { hold, attempt: 1 };
        let holder = Holder::Plain { token, write_seq: Granted::FIRST_WRITE };
        (token, Change::new(Condition::Absent, Write::Put(NewRecord { holder, expire, identity })))
    }

    /// Acquires a further step for an object. `held`: the hold in which it has steps already, and how many. `hold`: the
    /// name of the hold that is created if the owner token has none. `write_seq`: the number of the object's last
    /// write, which the caller keeps for it.
    pub fn reentrant(
        (owner, object): (OwnerToken, ObjectId),
        held: Option<(HoldId, u32)>,
        hold: HoldId,
        write_seq: u64,
        expire: Duration,
        identity: Arc<Identity>,
    ) -> Acquisition {
        let (depth, held) = held.map_or((0, None), |(held, depth)| (depth, Some(held)));
        let next = held.map_or(Next::Create, |held| Next::Enter(Some(held)));
        let asker = Asker::Reentrant { owner, object, depth, held };
        Acquisition::new(hold, asker, next, write_seq, expire, identity)
    }

    fn new(
        hold: HoldId,
        asker: Asker,
        next: Next,
        write_seq: u64,
        expire: Duration,
        identity: Arc<Identity>,
    ) -> Acquisition {
        Acquisition { hold, asker, expire, identity, next, attempts: 0, write_seq, entered: Vec::new() }
    }

    /// Whether the object has a step already.
    pub fn is_nested(&self) -> bool {
        matches!(self.asker, Asker::Reentrant { held: Some(_), .. })
    }

    pub fn expire(&self) -> Duration {
        self.expire
    }

    /// The number of the last write sent.
    pub fn write_seq(&self) -> u64 {
        self.write_seq
    }

    /// The next request. Each has its own token and number (R3).
    pub fn ask(&mut self) -> (Asked, Change) {
        self.write_seq += 1;
        let (write_seq, expire) = (self.write_seq, self.expire);
        let asked = |hold, token| Asked { granted: Granted { hold, token, fence: None, write_seq }, proves: None };
        match self.next.clone() {
            Next::Create => {
                let (hold, token, put) = self.put();
                (asked(hold, token), Change::new(Condition::Absent, put))
            }
            Next::TakeOver(state) => {
                let (hold, token, put) = self.put();
                (asked(hold, token), Change::new(Condition::Seen { state, over: true }, put))
            }
            Next::Prove { granted, proof } => {
                let change = Renewal { proof: proof.clone(), expire, write_seq }.change();
                (Asked { granted: Granted { write_seq, ..granted }, proves: Some(proof) }, change)
            }
            Next::Enter(entered) => {
                // A hold without a name gets one from this request.
                let hold = entered.unwrap_or_else(|| self.new_name());
                self.entered.push(hold);
                let Asker::Reentrant { owner, object, depth, held } = &self.asker else {
                    unreachable!("only a reentrant lock enters a hold");
                };
                let condition = Condition::Mine(Proof::Owner { owner: owner.clone(), hold: entered });
                let entry = Write::Entry {
                    object: Some(*object),
                    count: depth + 1,
                    write_seq,
                    may_add: held.is_none(),
                    lease: Lease::NotSooner(expire),
                    name: Some(hold),
                };
                (asked(hold, None), Change::new(condition, entry))
            }
        }
    }

    /// The new record of the next attempt, with the name of its hold and its token.
    fn put(&mut self) -> (HoldId, Option<Token>, Write) {
        let write_seq = self.write_seq;
        let name = self.new_name();
        let (hold, token, holder) = match &self.asker {
            Asker::Plain => {
                let token = Token { hold: self.hold, attempt: self.attempts };
                (self.hold, Some(token), Holder::Plain { token, write_seq })
            }
            Asker::Reentrant { owner, object, .. } => {
                self.entered.push(name);
                let entries = vec![Entry { object: *object, count: 1, write_seq }];
                (name, None, Holder::Reentrant { owner: owner.clone(), hold: Some(name), count: 1, entries })
            }
        };
        (hold, token, Write::Put(NewRecord { holder, expire: self.expire, identity: Arc::clone(&self.identity) }))
    }

    /// Counts an attempt, and names the reentrant hold that it creates. Attempts must not share a name, just as they
    /// must not share a token: users that have joined the hold of one attempt would take the record of another attempt,
    /// in which they have no entry, for theirs (R3).
    fn new_name(&mut self) -> HoldId {
        let name = u128::from_be_bytes(self.hold.0).wrapping_add(u128::from(self.attempts));
        self.attempts += 1;
        HoldId(name.to_be_bytes())
    }

    /// Whether an attempt so far has created, or named, this reentrant hold.
    fn has_named(&self, hold: HoldId) -> bool {
        let number = u128::from_be_bytes(hold.0).wrapping_sub(u128::from_be_bytes(self.hold.0));
        number < u128::from(self.attempts)
    }

    /// What the reply to a request means. Not for replies to requests from before [`restart`](Acquisition::restart),
    /// which are for another hold.
    pub fn read(&mut self, asked: Asked, reply: Reply) -> Verdict {
        if !matches!(reply, Reply::Applied { .. }) && asked.proves.is_none() {
            // A refused request has changed nothing.
            let refused = self.entered.iter().position(|hold| *hold == asked.granted.hold);
            refused.map(|at| self.entered.remove(at));
        }
        match reply {
            Reply::Applied { fence } => {
                // A fence that was requested after the grant is not in the record.
                let fence = fence.or(asked.granted.fence);
                Verdict::Granted(Granted { fence, ..asked.granted })
            }
            // The next request has a later `not_after`.
            Reply::TooLate => Verdict::Ask,
            Reply::Found(record) => self.found(asked.proves, record),
        }
    }

    fn found(&mut self, proves: Option<Proof>, record: Option<Box<Record>>) -> Verdict {
        let held = match &self.asker {
            Asker::Reentrant { held, .. } => *held,
            Asker::Plain => None,
        };
        if let Some(proof) = proves {
            // If the record still proves the hold, only the write number was too low: the next one is higher.
            return match record.is_some_and(|record| record.state.holder.is_proven_by(&proof)) {
                true => Verdict::Ask,
                false if held.is_some() => Verdict::Lost,
                false => Verdict::Gone,
            };
        }
        let Some(record) = record else {
            if held.is_some() {
                return Verdict::Lost;
            }
            self.next = Next::Create;
            return Verdict::Ask;
        };
        match self.next_for(&record) {
            Some(next) => {
                self.next = next;
                Verdict::Ask
            }
            None if held.is_some() => Verdict::Lost,
            None => {
                self.next = Next::Create;
                Verdict::Held(record)
            }
        }
    }

    /// The next request for a record that was found. `None` if another holder has it and its lease runs, or if the hold
    /// in which the object has steps is gone.
    fn next_for(&self, record: &Record) -> Option<Next> {
        match (&record.state.holder, &self.asker) {
            // An earlier attempt of the same hold was granted (R2).
            (Holder::Plain { token, .. }, Asker::Plain) if token.hold == self.hold => {
                let granted = Granted { hold: token.hold, token: Some(*token), fence: None, write_seq: 0 };
                Some(Next::Prove { granted, proof: Proof::Token(*token) })
            }
            (Holder::Reentrant { owner, hold, .. }, Asker::Reentrant { owner: ours, held, object, .. })
                if owner == ours =>
            {
                match (held, hold) {
                    (Some(held), Some(hold)) => {
                        // If its entry is missing, another program has removed the object's steps.
                        (held == hold && record.state.holder.entry(*object).is_some())
                            .then_some(Next::Enter(Some(*hold)))
                    }
                    (Some(_), None) => None,
                    (None, Some(hold)) if self.has_named(*hold) => Some(Next::Enter(Some(*hold))),
                    (None, _) if record.lease.expired() => Some(Next::TakeOver(Box::new(record.state.clone()))),
                    (None, hold) => Some(Next::Enter(*hold)),
                }
            }
            (_, Asker::Reentrant { held: Some(_), .. }) => None,
            _ => record.lease.expired().then(|| Next::TakeOver(Box::new(record.state.clone()))),
        }
    }

    /// Makes the next request renew a granted hold: its fence, which is in `granted`, was requested after the grant
    /// (R18), or its deadline has passed.
    pub fn prove(&mut self, granted: Granted) {
        let proof = self.proof(&granted);
        self.next = Next::Prove { granted, proof };
    }

    /// The proof of the granted hold.
    pub fn proof(&self, granted: &Granted) -> Proof {
        match (&self.asker, granted.token) {
            (Asker::Plain, Some(token)) => Proof::Token(token),
            (Asker::Plain, None) => Proof::Hold(granted.hold),
            (Asker::Reentrant { owner, object, .. }, _) => {
                Proof::Object { owner: owner.clone(), hold: granted.hold, object: *object }
            }
        }
    }

    /// What the requests sent so far may have left in the store, or may still leave, if the hold is not wanted any
    /// more. It has the object's next number, so that it removes the result of every earlier request; the caller
    /// continues from [`write_seq`](Acquisition::write_seq). A removed entry has no number: an earlier request that
    /// arrives after the removal is applied again, and removed by the next removal.
    pub fn orphan(&mut self) -> Orphan {
        match &self.asker {
            Asker::Plain => Orphan::Plain { hold: self.hold },
            Asker::Reentrant { owner, object, depth, .. } => {
                self.write_seq += 1;
                let mut holds = Vec::new();
                for hold in &self.entered {
                    if !holds.contains(hold) {
                        holds.push(*hold);
                    }
                }
                Orphan::Step { owner: owner.clone(), object: *object, count: *depth, write_seq: self.write_seq, holds }
            }
        }
    }

    /// Continues with a new hold of this name. [`orphan`](Acquisition::orphan) covers what the previous one has left.
    pub fn restart(&mut self, hold: HoldId) {
        self.hold = hold;
        self.attempts = 0;
        self.entered.clear();
        self.next = match &self.asker {
            Asker::Reentrant { held: Some(held), .. } => Next::Enter(Some(*held)),
            Asker::Plain => {
                self.write_seq = 0;
                Next::Create
            }
            Asker::Reentrant { .. } => Next::Create,
        };
    }

    /// The object's previous hold was lost: from now on, a new hold is acquired.
    pub fn forget_held(&mut self) {
        if let Asker::Reentrant { held, depth, .. } = &mut self.asker {
            (*held, *depth) = (None, 0);
            self.next = Next::Create;
        }
    }
}
