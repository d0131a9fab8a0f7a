//! Asking for a hold (R2, R3, R17).

use std::sync::Arc;
use std::time::Duration;

use super::change::{Change, Condition, Lease, NewRecord, Proof, Reply, Write};
use super::orphan::Orphan;
use super::renew::Renewal;
use super::state::{Entry, Holder, State};
use crate::record::{Identity, Record};
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// One hold that is asked for, or one more step into a reentrant hold, from the first request to its grant.
///
/// [`ask`](Acquisition::ask) says what to ask of the store, [`read`](Acquisition::read) what to do with the
/// reply. A request that is not answered may simply be followed by the next one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Acquisition {
    /// The name of the hold, if this makes one.
    hold: HoldId,
    asker: Asker,
    expire: Duration,
    identity: Arc<Identity>,
    next: Next,
    /// How many requests were sent that can make a record, or give a hold its name. Each has a token, or a name,
    /// of its own: one that comes late must not bring back what another of them made (R3).
    attempts: u32,
    /// The number of the last write sent.
    write_seq: u64,
    /// The reentrant holds that requests went to which were not refused: one for each request.
    entered: Vec<HoldId>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Asker {
    Plain,
    Reentrant {
        owner: OwnerToken,
        object: ObjectId,
        /// How often the object is in already, and in which hold.
        depth: u32,
        held: Option<HoldId>,
    },
}

/// What the next request asks.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Next {
    /// For a record where there is none.
    Create,
    /// For the record that was seen, if its lease is over.
    TakeOver(Box<State>),
    /// For one more step into a hold of this owner; `None`: one without a name.
    Enter(Option<HoldId>),
    /// For a lease of known length on a record that is ours.
    Prove { granted: Granted, proof: Proof },
}

/// What was asked, to read the reply by.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Asked {
    /// What is ours if the change is applied.
    granted: Granted,
    /// What is ours already, if the change proves it.
    proves: Option<Proof>,
}

/// What a reply means.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Ours, with a lease that began no earlier than the request was sent.
    Granted(Granted),
    /// Send the next change, at once.
    Ask,
    /// This record is somebody else's. Asking again before its lease ends is of use only after a change.
    Held(Box<Record>),
    /// What was granted to this hold is gone: only another hold may ask again.
    Gone,
    /// The reentrant hold that the object was in is gone.
    Lost,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Granted {
    pub hold: HoldId,
    /// What the record carries; of a plain hold.
    pub token: Option<Token>,
    pub fence: Option<u64>,
    /// The number of the write that granted.
    pub write_seq: u64,
}

impl Granted {
    const FIRST_WRITE: u64 = 1;

    /// What is ours if the first request for a plain hold was applied, and what proves that.
    #[inline]
    pub fn first_of_plain(token: Token, fence: Option<u64>) -> (Granted, Proof) {
        let granted = Granted { hold: token.hold, token: Some(token), fence, write_seq: Granted::FIRST_WRITE };
        (granted, Proof::Token(token))
    }
}

impl Acquisition {
    /// Asks for a plain hold of this name, which no other hold has or had.
    pub fn plain(hold: HoldId, expire: Duration, identity: Arc<Identity>) -> Acquisition {
        Acquisition::new(hold, Asker::Plain, Next::Create, 0, expire, identity)
    }

    /// The first request of [`plain`](Acquisition::plain), and its token: for a sender that needs nothing else, because it
    /// has the reply at once.
    #[inline]
    pub fn first_of_plain(hold: HoldId, expire: Duration, identity: Arc<Identity>) -> (Token, Change) {
        let token = Token { hold, attempt: 1 };
        let holder = Holder::Plain { token, write_seq: Granted::FIRST_WRITE };
        (token, Change::new(Condition::Absent, Write::Put(NewRecord { holder, expire, identity })))
    }

    /// Asks for one more step of an object. `held`: the hold that it is in already and how often. `hold` is the
    /// name of the hold that this makes if the owner token has none; `write_seq` the number of the object's
    /// last write, which the caller keeps for it.
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

    /// Whether this asks for one more step of an object that is in already.
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

    /// The next request. Each has a token and a number of its own (R3).
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

    /// A new record, as the next attempt makes it, with the name of its hold and its token.
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

    /// Counts one more attempt, and names the reentrant hold that it makes. One name for all attempts would do as
    /// little as one token: the users that joined what one of them made would take the record of another, which
    /// is without them, for theirs (R3).
    fn new_name(&mut self) -> HoldId {
        let name = u128::from_be_bytes(self.hold.0).wrapping_add(u128::from(self.attempts));
        self.attempts += 1;
        HoldId(name.to_be_bytes())
    }

    /// Whether one of the attempts so far made, or named, this reentrant hold.
    fn has_named(&self, hold: HoldId) -> bool {
        let number = u128::from_be_bytes(hold.0).wrapping_sub(u128::from_be_bytes(self.hold.0));
        number < u128::from(self.attempts)
    }

    /// What the reply to a request means. Replies to requests from before [`restart`](Acquisition::restart) are
    /// of another hold, and are not for this.
    pub fn read(&mut self, asked: Asked, reply: Reply) -> Verdict {
        if !matches!(reply, Reply::Applied { .. }) && asked.proves.is_none() {
            // A request that was refused leaves nothing.
            let refused = self.entered.iter().position(|hold| *hold == asked.granted.hold);
            refused.map(|at| self.entered.remove(at));
        }
        match reply {
            Reply::Applied { fence } => {
                // A fence that was drawn after the grant is not in the record.
                let fence = fence.or(asked.granted.fence);
                Verdict::Granted(Granted { fence, ..asked.granted })
            }
            // The next request names a later moment.
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
            // Ours as long as the record proves it: then only the number was too low, and the next is higher.
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

    /// What to ask of a record that was found; `None` where it is somebody else's and its lease runs, or where
    /// the hold that the object is in has gone.
    fn next_for(&self, record: &Record) -> Option<Next> {
        match (&record.state.holder, &self.asker) {
            // An earlier attempt of this very hold: ours already (R2).
            (Holder::Plain { token, .. }, Asker::Plain) if token.hold == self.hold => {
                let granted = Granted { hold: token.hold, token: Some(*token), fence: None, write_seq: 0 };
                Some(Next::Prove { granted, proof: Proof::Token(*token) })
            }
            (Holder::Reentrant { owner, hold, .. }, Asker::Reentrant { owner: ours, held, object, .. })
                if owner == ours =>
            {
                match (held, hold) {
                    (Some(held), Some(hold)) => {
                        // Without its entry, somebody has taken the object's steps.
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

    /// The lease of a hold that was granted is to be read again: its fence was drawn after the grant (R18) and is
    /// in `granted`, or its deadline has passed.
    pub fn prove(&mut self, granted: Granted) {
        let proof = self.proof(&granted);
        self.next = Next::Prove { granted, proof };
    }

    /// What proves the hold that was granted.
    pub fn proof(&self, granted: &Granted) -> Proof {
        match (&self.asker, granted.token) {
            (Asker::Plain, Some(token)) => Proof::Token(token),
            (Asker::Plain, None) => Proof::Hold(granted.hold),
            (Asker::Reentrant { owner, object, .. }, _) => {
                Proof::Object { owner: owner.clone(), hold: granted.hold, object: *object }
            }
        }
    }

    /// What the requests sent so far may have left in the store, or may still leave, when the hold is not
    /// wanted any more. It has the object's next number, so that it removes what any of the earlier requests
    /// makes, and the caller goes on from [`write_seq`](Acquisition::write_seq). An entry that has gone has no
    /// number: an earlier request that comes after the removal is applied again, and removed by the next.
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

    /// Goes on as another hold, of this name; what the former one left is the orphan's.
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

    /// The object's former hold was lost: what is asked for from now on is a hold of its own.
    pub fn forget_held(&mut self) {
        if let Asker::Reentrant { held, depth, .. } = &mut self.asker {
            (*held, *depth) = (None, 0);
            self.next = Next::Create;
        }
    }
}
