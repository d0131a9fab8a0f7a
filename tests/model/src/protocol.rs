//! The model: the store calls the library's `apply`, the clients its `Acquisition`, `Renewal`, `Release` and
//! `Orphan`. What is here is what those do not decide: the network, the clocks, and when a client does what.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::protocol::{
    Acquisition, Asked, Change, Condition, Effect, Granted, Holder, Judgement, Orphan, Proof, Release, Renewal,
    Renewed, Reply, State as Written, Step as StepOut, StoreTime, Verdict, Write, apply,
};
use nblock::record::{Identity, Lease, Record};
use nblock::token::{HoldId, ObjectId, OwnerToken};
use stateright::{Model, Property};

use crate::interned::{Known, Ref};
use crate::mutant::Mutant;
use crate::{Time, keep};

keep!(Acquisition, Asked, Change, Granted, Orphan, Release, Renewal, Written);

/// The length of every lease.
pub const EXPIRE: Time = 2;
/// How long after it was sent an attempt may still take something.
pub const OP_TIMEOUT: Time = 1;
/// When it begins: a clock can step back from there.
const START: Time = 1;

/// Where a grant's fence comes from (R18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fences {
    /// The grant's own transaction.
    InTheGrant,
    /// A counter that is asked after the grant; then the hold is proven.
    AfterTheGrant,
}

/// What one client may do.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Whose object it is, of a reentrant lock; `None`: a plain lock.
    pub owner: Option<u8>,
    /// How many holds, or steps into one, it asks for, and how many steps in and out it makes.
    pub holds: u8,
    pub steps: u8,
    /// How often it asks in each without an answer, asks at once because of an answer, renews each, and sends
    /// each unlock.
    pub attempts: u8,
    pub follow_ups: u8,
    pub refreshes: u8,
    pub unlocks: u8,
}

pub struct Protocol {
    pub clients: Vec<Limits>,
    /// Whether clients give up, and whether they still read the answer to a request after they sent the next.
    pub gives_up: bool,
    pub reads_late_answers: bool,
    /// How many requests may be applied twice.
    pub doubled: u8,
    pub crashes: u8,
    /// How many ticks of the clock there are.
    pub ticks: Time,
    pub fences: Fences,
    /// Whether the clock is read when a request arrives, which may be long before it is applied.
    pub read_at_arrival: bool,
    /// Whether what was given up is removed until nothing can come of it any more, or once.
    pub cleans_again: bool,
    /// Whether the store may go back to an earlier state.
    pub goes_back: bool,
    /// Whether its clock may step back.
    pub clock_steps: bool,
    /// How many steps in and out another library makes with the owner token 0.
    pub foreign_steps: u8,
    /// How many records may be broken that were seen when their lease was over.
    pub breaks: u8,
    pub mutant: Option<Mutant>,
}

/// The record, and what the model knows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    written: Ref<Written>,
    fence: u8,
    /// Which of all grants made it. The store does not know.
    serial: u8,
    /// Whether a renewal wrote it last. One that is under way when its hold ends adds a lease to it, from when
    /// it arrives: a renewal takes nothing from anybody, so nothing limits that.
    renewed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum What {
    Ask(Ref<Asked>),
    Renew(Ref<Renewal>),
    Release,
    /// `last`: nothing follows it.
    Remove {
        last: bool,
    },
    Draw,
    /// Breaks what was seen.
    Break,
}

/// A request that was sent, or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sent {
    client: u8,
    /// The operation that it belongs to; of a renewal, the hold.
    operation: u8,
    at: Time,
    number: u8,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Request {
    sent: Sent,
    /// `None`: draws a fence.
    change: Option<Ref<Change>>,
    /// What is applied a second time answers nobody.
    echo: bool,
    /// The mutant's proof: the fence that the hold had.
    fence: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Said {
    Applied {
        fence: u8,
        serial: u8,
        era: u8,
    },
    /// With the store's now.
    Found(Option<Ref<Written>>, Time),
    TooLate,
    Fence(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Answer {
    sent: Sent,
    said: Said,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Idle,
    Acquiring(Ref<Acquisition>),
    /// Granted; its fence is asked for.
    Drawing(Ref<Acquisition>, Ref<Granted>),
    Releasing {
        release: Ref<Release>,
        first_sent: Time,
        held: Held,
    },
    Crashed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Held {
    granted: Ref<Granted>,
    operation: u8,
    serial: u8,
    /// How often the object is in.
    depth: u8,
    deadline: Time,
    deadline_number: u8,
    /// How often the store had gone back when it last said that this is ours.
    era: u8,
}

/// What is removed until nothing can come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Cleaning {
    orphan: Ref<Orphan>,
    /// After this moment no request of it takes anything.
    not_after: Time,
    last_sent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    phase: Phase,
    held: Option<Held>,
    /// How many holds it asked for, and how many operations it began.
    holds: u8,
    operation: u8,
    /// Of the present operation, or hold.
    attempts: u8,
    follow_ups: u8,
    refreshes: u8,
    unlocks: u8,
    /// The number of its last write: of an object, or of the present plain hold.
    write_seq: u8,
    /// When it last had a use for the record.
    ended: Time,
    cleaning: Option<Cleaning>,
    /// The name of a hold whose clean-up is over, and that nothing of may be left.
    cleaned: Option<Ref<Orphan>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    now: Time,
    /// When the store's clock stepped back, by one.
    stepped_back: Option<Time>,
    row: Option<Row>,
    grants: u8,
    /// The counter that fences are drawn from: in the grant, or after it.
    counter: u8,
    clients: Vec<Client>,
    requests: Vec<Request>,
    answers: Vec<Answer>,
    doubled: u8,
    crashes: u8,
    breaks: u8,
    /// What the store can go back to, and how often it did.
    past: Option<(Option<Row>, u8)>,
    era: u8,
    /// The highest fence that anybody held the lock with.
    highest: u8,
    /// How often another library is in, until when it is sure of that, and how many steps it made.
    theirs: u8,
    their_serial: u8,
    their_deadline: Time,
    their_steps: u8,
    wrong: Option<Wrong>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wrong {
    /// The loss of what was a client's own was reported.
    LostInsideDeadline,
    /// Refused because of itself.
    RefusedByItself,
    /// A fence that is not above those before it.
    FenceFell,
    /// A renewal of a hold that had ended in between.
    InTwoPieces,
    /// A request that proves a hold changed another's record.
    ChangedAnothers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Tick,
    Acquire(u8),
    AskAgain(u8),
    GiveUp(u8),
    Refresh(u8),
    Unlock(u8),
    UnlockAgain(u8),
    CleanAgain(u8),
    Crash(u8),
    /// Applied, with the clock as it was read.
    Apply(Request, Time),
    /// Applied, and applied again later.
    ApplyAndKeep(Request, Time),
    Deliver(Answer),
    Remember,
    GoBack,
    StepClockBack,
    /// The record is read at a replica that is behind.
    ReadPast(u8),
    TheirStepIn,
    TheirStepOut,
    Break,
}

fn identity() -> Arc<Identity> {
    static IDENTITY: LazyLock<Arc<Identity>> = LazyLock::new(|| {
        Arc::new(Identity { host: String::new(), pid: 0, boot_id: String::new(), app: String::new() })
    });
    Arc::clone(&IDENTITY)
}

fn owner(number: u8) -> OwnerToken {
    static OWNERS: LazyLock<[OwnerToken; 2]> = LazyLock::new(|| ["0", "1"].map(|name| OwnerToken(name.into())));
    OWNERS[number as usize].clone()
}

/// The name of a client's hold. The last byte is for the attempts.
fn name(client: u8, number: u8) -> HoldId {
    HoldId((u128::from(client) << 16 | u128::from(number) << 8).to_be_bytes())
}

/// The client and the number of a hold.
fn named(hold: HoldId) -> (u8, u8) {
    (hold.0[13], hold.0[14])
}

fn time(time: Time) -> Boottime {
    Boottime::from_nanos(time.into())
}

fn expire() -> Duration {
    Duration::from_nanos(EXPIRE.into())
}

/// A record as a store shows it.
fn record(written: &Written, now: Time) -> Box<Record> {
    static KEY: LazyLock<Key> = LazyLock::new(|| Key::new(b"k").expect("a key"));
    let now = StoreTime(now.into());
    Box::new(Record {
        key: KEY.clone(),
        damaged: None,
        lease: match written.is_over(now) {
            true => Lease::RanOut(now.since(written.ends_at)),
            false => Lease::Runs(written.ends_at.since(now)),
        },
        expires_at_ms: 0,
        owner: None,
        fence: None,
        state: written.clone(),
    })
}

/// The result of a change.
#[derive(Clone, Copy)]
enum Became {
    Put(Ref<Written>),
    Update(Ref<Written>),
    Removed,
    Refused,
    TooLate,
}

impl Became {
    fn new(effect: Effect) -> Became {
        match effect {
            Effect::Put(state) => Became::Put(Ref::to(state)),
            Effect::Update(state) => Became::Update(Ref::to(state)),
            Effect::Remove => Became::Removed,
            Effect::Refused => Became::Refused,
            Effect::TooLate => Became::TooLate,
        }
    }
}

/// What an answer means to an acquisition.
#[derive(Clone, Copy)]
enum Means {
    Granted(Ref<Granted>),
    Ask,
    Held,
    Gone,
    Lost,
}

/// What a client sends next, and what it is then.
type Next = (Ref<Acquisition>, Ref<Asked>, Ref<Change>);

type Asking = (Option<Mutant>, Ref<Acquisition>, Time);
type Deciding = (Option<Mutant>, Option<Ref<Written>>, Ref<Change>, Time);
type Reading = (Option<Mutant>, Ref<Acquisition>, Ref<Asked>, Said, Time);

thread_local! {
    static DECIDED: Known<Deciding, Became> = Known::new();
    static ASKED: Known<Asking, Next> = Known::new();
    static READ: Known<Reading, (Ref<Acquisition>, Means)> = Known::new();
}

impl Protocol {
    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// What the store's clock says now.
    fn reading(state: &State) -> Time {
        state.now - Time::from(state.stepped_back.is_some())
    }

    /// What the store does to the record, as the library says it.
    fn decide(&self, present: Option<Ref<Written>>, change: Ref<Change>, now: Time) -> Became {
        let mutant = self.mutant.filter(|mutant| mutant.is_the_stores());
        DECIDED.with(|known| {
            known.of((mutant, present, change, now), |&(mutant, present, change, now)| {
                let not_after = change.not_after.map(|moment| StoreTime(moment.as_nanos()));
                let (present, now) = (present.as_deref(), StoreTime(now.into()));
                Became::new(match mutant {
                    Some(mutant) => mutant.apply(present, now, not_after, &change),
                    None => apply(present, now, not_after, &change),
                })
            })
        })
    }

    fn said(said: Said) -> Reply {
        match said {
            Said::Applied { fence, .. } => Reply::Applied { fence: (fence > 0).then_some(fence.into()) },
            Said::Found(written, now) => Reply::Found(written.map(|written| record(&written, now))),
            Said::TooLate => Reply::TooLate,
            Said::Fence(_) => unreachable!("a fence answers no change"),
        }
    }

    /// The next request of an acquisition.
    fn ask(&self, acquisition: Ref<Acquisition>, not_after: Time) -> Next {
        let mutant = self.mutant.filter(|mutant| mutant.is_of_requests());
        ASKED.with(|known| {
            known.of((mutant, acquisition, not_after), |&(mutant, acquisition, not_after)| {
                let mut acquisition = (*acquisition).clone();
                let (asked, change) = acquisition.ask();
                let mut change = change.until(time(not_after));
                if let Some(mutant) = mutant {
                    mutant.asks(&mut change);
                }
                (Ref::to(acquisition), Ref::to(asked), Ref::to(change))
            })
        })
    }

    fn read(&self, acquisition: Ref<Acquisition>, answer: Answer, now: Time) -> (Ref<Acquisition>, Means) {
        let What::Ask(asked) = answer.sent.what else { unreachable!("it answers an acquisition") };
        let mutant = self.mutant.filter(|mutant| mutant.is_of_replies());
        // What a client may not do: to judge a lease by its own clock, counted from when it asked.
        let estimate = match (mutant, answer.said) {
            (Some(Mutant::OverByEstimate), Said::Found(..)) => now - answer.sent.at,
            _ => 0,
        };
        let key = (mutant, acquisition, asked, answer.said, estimate);
        READ.with(|known| {
            known.of(key, |&(mutant, acquisition, asked, said, estimate)| {
                let mut acquisition = (*acquisition).clone();
                let mut reply = Protocol::said(said);
                if let (Some(mutant), Reply::Found(Some(record))) = (mutant, &mut reply) {
                    mutant.reads(record, &acquisition, Duration::from_nanos(estimate.into()));
                }
                let means = match acquisition.read((*asked).clone(), reply) {
                    Verdict::Granted(mut granted) => {
                        if let Some(mutant) = mutant {
                            mutant.is_granted(&mut granted);
                        }
                        Means::Granted(Ref::to(granted))
                    }
                    Verdict::Ask => Means::Ask,
                    Verdict::Held(_) => Means::Held,
                    Verdict::Gone => Means::Gone,
                    Verdict::Lost => Means::Lost,
                };
                (Ref::to(acquisition), means)
            })
        })
    }

    fn send(&self, state: &mut State, client: usize, operation: u8, what: What, change: Option<Ref<Change>>) {
        let sender = &state.clients[client];
        let held = match sender.phase {
            Phase::Releasing { held, .. } => Some(held),
            _ => sender.held,
        };
        let fence = match self.is(Mutant::StoresCounterAlone) {
            true => held.map_or(0, |held| held.granted.fence.unwrap_or(0) as u8),
            false => 0,
        };
        let sent = Sent { client: client as u8, operation, at: state.now, number: sender.write_seq, what };
        insert(&mut state.requests, Request { sent, change, echo: false, fence });
    }

    /// Sends the next request of an acquisition.
    fn send_asked(&self, state: &mut State, index: usize, acquisition: Ref<Acquisition>) {
        let not_after = Protocol::reading(state) + OP_TIMEOUT;
        let (acquisition, asked, change) = self.ask(acquisition, not_after);
        let client = &mut state.clients[index];
        client.write_seq = acquisition.write_seq() as u8;
        client.phase = Phase::Acquiring(acquisition);
        let operation = client.operation;
        if !self.reads_late_answers {
            state
                .answers
                .retain(|answer| answer.sent.client as usize != index || !matches!(answer.sent.what, What::Ask(_)));
        }
        self.send(state, index, operation, What::Ask(asked), Some(change));
    }

    /// Begins to ask for a hold, or for one more step into it.
    fn acquire(&self, state: &mut State, index: usize) {
        let client = &mut state.clients[index];
        client.holds += 1;
        client.operation += 1;
        (client.attempts, client.follow_ups) = (1, 0);
        let hold = name(index as u8, client.holds);
        let acquisition = match self.clients[index].owner {
            None => {
                client.write_seq = 0;
                Acquisition::plain(hold, expire(), identity())
            }
            Some(number) => {
                let held = client.held.map(|held| (held.granted.hold, u32::from(held.depth)));
                let who = (owner(number), ObjectId(index as u64));
                Acquisition::reentrant(who, held, hold, client.write_seq.into(), expire(), identity())
            }
        };
        self.send_asked(state, index, Ref::to(acquisition));
    }

    /// What is left of an operation that is given up is removed.
    fn give_up(&self, state: &mut State, index: usize, acquisition: Ref<Acquisition>) {
        let mut acquisition = (*acquisition).clone();
        let orphan = acquisition.orphan();
        state.clients[index].write_seq = acquisition.write_seq() as u8;
        let again = self.cleans_again && !self.is(Mutant::CleansOnce);
        self.send_removals(state, index, &orphan, !again);
        if again {
            let cleaning = Cleaning { orphan: Ref::to(orphan), not_after: state.now + OP_TIMEOUT, last_sent: false };
            state.clients[index].cleaning = Some(cleaning);
        } else if self.cleans_again {
            let cleaning = Cleaning { orphan: Ref::to(orphan), not_after: 0, last_sent: true };
            state.clients[index].cleaning = Some(cleaning);
        }
        self.end(state, index);
        self.note_cleaned(state, index);
    }

    fn send_removals(&self, state: &mut State, index: usize, orphan: &Orphan, last: bool) {
        let operation = state.clients[index].operation;
        for mut change in orphan.removals() {
            if let Some(mutant) = self.mutant {
                mutant.removes(&mut change);
            }
            self.send(state, index, operation, What::Remove { last }, Some(Ref::to(change)));
        }
    }

    /// A clean-up is over when its last removals were applied.
    fn note_cleaned(&self, state: &mut State, index: usize) {
        let under_way = state.requests.iter().any(|request| {
            request.sent.client as usize == index && matches!(request.sent.what, What::Remove { last: true })
        });
        let client = &mut state.clients[index];
        if let Some(cleaning) = client.cleaning.filter(|cleaning| cleaning.last_sent && !under_way) {
            (client.cleaning, client.cleaned) = (None, Some(cleaning.orphan));
        }
    }

    /// The operation is over.
    fn end(&self, state: &mut State, index: usize) {
        let now = state.now;
        let client = &mut state.clients[index];
        client.phase = Phase::Idle;
        // Only of plain holds is it asked when what they left has gone.
        client.ended = if self.clients[index].owner.is_none() { now } else { 0 };
        (client.attempts, client.follow_ups, client.unlocks) = (0, 0, 0);
        if client.held.is_none() {
            client.refreshes = 0;
        }
        Protocol::drop_answers(state, index);
    }

    /// What nobody waits for any more need not be delivered.
    fn drop_answers(state: &mut State, index: usize) {
        let client = state.clients[index];
        state.answers.retain(|answer| answer.sent.client as usize != index || client.awaits(&answer.sent));
    }

    fn lose(&self, state: &mut State, index: usize) {
        let client = &mut state.clients[index];
        if let Some(held) = client.held.take() {
            self.note_lost(state, held);
        }
    }

    fn note_lost(&self, state: &mut State, held: Held) {
        if state.now < held.deadline && held.era == state.era {
            state.wrong = Some(Wrong::LostInsideDeadline);
        }
    }

    /// What the store does, in one step, with its clock as it was read.
    fn apply(&self, state: &mut State, request: Request, now: Time) {
        let sent = request.sent;
        let Some(change) = request.change else {
            state.counter += 1;
            let said = Said::Fence(state.counter);
            self.answer(state, request, said);
            return;
        };
        let present = state.row.map(|row| row.written);
        let counter_alone = self.is(Mutant::StoresCounterAlone)
            && matches!(sent.what, What::Renew(_) | What::Release)
            && state.row.is_some_and(|row| row.fence == request.fence);
        let became = match (&change.write, present) {
            (Write::Extend { .. }, Some(present)) if counter_alone => {
                let ends_at = StoreTime((now + EXPIRE).into());
                Became::Update(Ref::to(Written { ends_at, ..(*present).clone() }))
            }
            (Write::Delete, Some(_))
                if counter_alone || self.is(Mutant::UnlockWithoutToken) && sent.what == What::Release =>
            {
                Became::Removed
            }
            _ => self.decide(present, change, now),
        };
        let proves_ours = matches!(change.condition, Condition::Mine(_));
        let anothers = |row: Row| match (&row.written.holder, self.clients[sent.client as usize].owner) {
            (Holder::Plain { token, .. }, None) => named(token.hold).0 != sent.client,
            (Holder::Reentrant { owner: theirs, .. }, Some(ours)) => *theirs != owner(ours),
            _ => true,
        };
        if proves_ours && matches!(became, Became::Update(_) | Became::Removed) && state.row.is_some_and(anothers) {
            state.wrong = Some(Wrong::ChangedAnothers);
        }
        let said = match became {
            Became::Put(written) => {
                state.grants += 1;
                if self.fences == Fences::InTheGrant {
                    state.counter += 1;
                }
                let fence = if self.fences == Fences::InTheGrant { state.counter } else { 0 };
                let serial = state.grants;
                state.row = Some(Row { written, fence, serial, renewed: false });
                Said::Applied { fence, serial, era: state.era }
            }
            Became::Update(written) => {
                let row = state.row.as_mut().expect("there is a record to update");
                let renewed = row.renewed || matches!(sent.what, What::Renew(_));
                (row.written, row.renewed) = (written, renewed);
                Said::Applied { fence: row.fence, serial: row.serial, era: state.era }
            }
            Became::Removed => {
                let serial = state.row.map_or(0, |row| row.serial);
                state.row = None;
                Said::Applied { fence: 0, serial, era: state.era }
            }
            Became::Refused => Said::Found(present, now),
            Became::TooLate => Said::TooLate,
        };
        if let What::Remove { last: true } = sent.what {
            self.note_cleaned(state, sent.client as usize);
        }
        self.answer(state, request, said);
    }

    fn answer(&self, state: &mut State, request: Request, said: Said) {
        let sent = request.sent;
        let client = &state.clients[sent.client as usize];
        let superseded = matches!(sent.what, What::Ask(_)) && sent.number != client.write_seq;
        if request.echo || !client.awaits(&sent) || superseded && !self.reads_late_answers {
            return;
        }
        let answer = Answer { sent, said };
        // A plain lock that may not ask again learns nothing from what is held: it may as well not hear of it.
        if let (Phase::Acquiring(acquisition), What::Ask(_), Said::Found(..)) = (client.phase, sent.what, said)
            && self.clients[sent.client as usize].owner.is_none()
            && client.attempts == self.clients[sent.client as usize].attempts
            && !self.is(Mutant::DoesNotKnowItself)
            && !self.is(Mutant::OverByEstimate)
            && matches!(self.read(acquisition, answer, state.now).1, Means::Held)
        {
            return;
        }
        insert(&mut state.answers, answer);
    }

    fn hold(
        &self,
        state: &mut State,
        index: usize,
        acquisition: Ref<Acquisition>,
        answer: Answer,
        granted: Ref<Granted>,
    ) {
        let Said::Applied { serial, era, .. } = answer.said else { unreachable!("a grant is applied") };
        let deadline = self.counted_from(state, answer.sent) + EXPIRE;
        if deadline <= state.now && !self.is(Mutant::LateGrantCounts) {
            // A late grant does not count as a grant (R4).
            self.give_up(state, index, acquisition);
            return;
        }
        let fence = granted.fence.unwrap_or(0) as u8;
        let reentrant = self.clients[index].owner.is_some();
        if (fence < state.highest || fence == state.highest && !reentrant) && state.era == 0 {
            state.wrong = Some(Wrong::FenceFell);
        }
        state.highest = state.highest.max(fence);
        let client = &mut state.clients[index];
        let before = client.held.take();
        let held = Held {
            granted,
            operation: before.map_or(client.operation, |before| before.operation),
            serial,
            depth: before.map_or(0, |before| before.depth) + 1,
            deadline: before.map_or(0, |before| before.deadline).max(deadline),
            deadline_number: granted.write_seq as u8,
            era,
        };
        if before.is_some_and(|before| before.serial != serial) {
            state.wrong = Some(Wrong::InTwoPieces);
        }
        client.held = Some(held);
        client.refreshes = if before.is_some() { client.refreshes } else { 0 };
        self.end(state, index);
    }

    fn counted_from(&self, state: &State, sent: Sent) -> Time {
        if self.is(Mutant::DeadlineFromReply) { state.now } else { sent.at }
    }

    fn deliver(&self, state: &mut State, answer: Answer) {
        let index = answer.sent.client as usize;
        let client = state.clients[index];
        match (client.phase, answer.sent.what) {
            (_, What::Renew(renewal)) => self.renewed(state, index, answer, &renewal),
            (Phase::Acquiring(acquisition), What::Ask(_)) => {
                let (acquisition, means) = self.read(acquisition, answer, state.now);
                state.clients[index].phase = Phase::Acquiring(acquisition);
                match means {
                    Means::Granted(granted) if granted.fence.is_none() => {
                        state.clients[index].phase = Phase::Drawing(acquisition, granted);
                        self.send(state, index, client.operation, What::Draw, None);
                    }
                    Means::Granted(granted) => self.hold(state, index, acquisition, answer, granted),
                    Means::Ask => {
                        if client.follow_ups < self.clients[index].follow_ups {
                            state.clients[index].follow_ups += 1;
                            self.send_asked(state, index, acquisition);
                        }
                    }
                    Means::Held => {
                        if let Said::Found(Some(found), _) = answer.said
                            && let Holder::Plain { token, .. } = found.holder
                            && named(token.hold) == (index as u8, client.holds)
                        {
                            state.wrong = Some(Wrong::RefusedByItself);
                        }
                    }
                    Means::Gone => self.give_up(state, index, acquisition),
                    Means::Lost => {
                        self.lose(state, index);
                        self.give_up(state, index, acquisition);
                    }
                }
            }
            (Phase::Drawing(acquisition, granted), What::Draw) => {
                let Said::Fence(fence) = answer.said else { unreachable!("a fence was asked for") };
                let granted = Granted { fence: Some(fence.into()), ..(*granted).clone() };
                if self.is(Mutant::FenceWithoutProof) {
                    // Held since the grant, by its own reckoning, as if drawing had taken no time.
                    let said = Said::Applied { fence, serial: 0, era: state.era };
                    let answer = Answer { said, sent: Sent { at: state.now, ..answer.sent } };
                    self.hold(state, index, acquisition, answer, Ref::to(granted));
                    return;
                }
                let mut acquisition = (*acquisition).clone();
                acquisition.prove(granted);
                self.send_asked(state, index, Ref::to(acquisition));
            }
            (Phase::Releasing { release, first_sent, held }, What::Release) => {
                let reply = Protocol::said(answer.said);
                let doubtful = client.unlocks > 1;
                let judged_by = if self.is(Mutant::UnlockJudgedByRetry) { answer.sent.at } else { first_sent };
                let judged =
                    release.judge(&reply, || time(judged_by), time(held.deadline), doubtful, || time(state.now));
                let inside = first_sent < held.deadline && held.era == state.era;
                if judged == Judgement::Lost && inside {
                    state.wrong = Some(Wrong::LostInsideDeadline);
                }
                match judged {
                    Judgement::Lost => state.clients[index].held = None,
                    Judgement::Released => {
                        // Of the last step nothing is held since it was sent.
                        let still = state.clients[index].held;
                        state.clients[index].held = still.map(|held| Held { depth: held.depth - 1, ..held });
                    }
                }
                self.end(state, index);
            }
            _ => {}
        }
    }

    fn renewed(&self, state: &mut State, index: usize, answer: Answer, renewal: &Renewal) {
        let deadline = self.counted_from(state, answer.sent) + EXPIRE;
        let Some(held) = &mut state.clients[index].held else { return };
        match renewal.read(&Protocol::said(answer.said)) {
            Renewed::Ours { applied } => {
                let Said::Applied { serial, era, .. } = answer.said else { return };
                if applied && answer.sent.number >= held.deadline_number {
                    (held.deadline, held.deadline_number, held.era) = (deadline, answer.sent.number, era);
                }
                if serial != held.serial {
                    state.wrong = Some(Wrong::InTwoPieces);
                }
            }
            Renewed::Lost => {
                // What asks for one more step finds that out by itself.
                if state.clients[index].phase == Phase::Idle {
                    self.lose(state, index);
                    self.end(state, index);
                }
            }
        }
    }

    fn proof(&self, index: usize, held: &Held) -> Proof {
        match (self.clients[index].owner, held.granted.token) {
            (None, Some(token)) => Proof::Token(token),
            (Some(number), None) => match self.mutant {
                Some(Mutant::RenewsByOwnerAlone | Mutant::OneNameForAllAttempts) => {
                    Proof::Owner { owner: owner(number), hold: Some(held.granted.hold) }
                }
                _ => Proof::Object { owner: owner(number), hold: held.granted.hold, object: ObjectId(index as u64) },
            },
            other => unreachable!("plain holds have tokens, and only they: {other:?}"),
        }
    }

    fn refresh(&self, state: &mut State, index: usize) {
        let client = &mut state.clients[index];
        let Some(held) = client.held else { return };
        client.refreshes += 1;
        client.write_seq += 1;
        let renewal = Renewal { proof: self.proof(index, &held), expire: expire(), write_seq: client.write_seq.into() };
        let change = Ref::to(renewal.change());
        self.send(state, index, held.operation, What::Renew(Ref::to(renewal)), Some(change));
    }

    fn unlock(&self, state: &mut State, index: usize) {
        let now = state.now;
        let client = &mut state.clients[index];
        let Some(held) = client.held else { return };
        client.operation += 1;
        client.unlocks = 1;
        client.write_seq += 1;
        let release = match (self.clients[index].owner, held.granted.token) {
            (Some(number), _) => Release::Step(StepOut {
                owner: owner(number),
                object: ObjectId(index as u64),
                hold: held.granted.hold,
                count: u32::from(held.depth) - 1,
                write_seq: client.write_seq.into(),
            }),
            (None, Some(token)) => Release::Plain { token },
            (None, None) => unreachable!("a plain hold has a token"),
        };
        let change = Ref::to(release.change());
        let release = Ref::to(release);
        client.phase = Phase::Releasing { release, first_sent: now, held };
        if held.depth == 1 {
            client.held = None;
        }
        let operation = client.operation;
        Protocol::drop_answers(state, index);
        self.send(state, index, operation, What::Release, Some(change));
    }

    /// Another library steps in or out: in one request, which it does not send again.
    fn their_step(&self, state: &mut State, enters: bool) {
        state.their_steps += 1;
        let now = Protocol::reading(state);
        let ends_at = StoreTime((now + EXPIRE).into());
        let lost = state.theirs > 0 && state.row.is_none_or(|row| row.serial != state.their_serial);
        if lost {
            state.theirs = 0;
        }
        let ours = state.row.and_then(|row| match &row.written.holder {
            Holder::Reentrant { owner: here, hold, count, entries } if *here == owner(0) => {
                Some((row, *hold, *count, entries.clone()))
            }
            _ => None,
        });
        let written = |hold, count, entries, ends_at| {
            Ref::to(Written { holder: Holder::Reentrant { owner: owner(0), hold, count, entries }, ends_at })
        };
        match (ours, enters) {
            (Some((row, hold, count, entries)), true) => {
                let ends_at = ends_at.max(row.written.ends_at);
                state.row = Some(Row { written: written(hold, count + 1, entries, ends_at), ..row });
                (state.theirs, state.their_serial) = (state.theirs + 1, row.serial);
                state.their_deadline = state.now + EXPIRE;
            }
            (None, true) if state.row.is_none_or(|row| row.written.is_over(StoreTime(now.into()))) => {
                state.grants += 1;
                state.counter += u8::from(self.fences == Fences::InTheGrant);
                let written = written(None, 1, Vec::new(), ends_at);
                state.row = Some(Row { written, fence: state.counter, serial: state.grants, renewed: false });
                (state.theirs, state.their_serial) = (1, state.grants);
                state.their_deadline = state.now + EXPIRE;
            }
            (Some((row, hold, count, entries)), false) if state.theirs > 0 => {
                let written = written(hold, count - 1, entries, row.written.ends_at);
                state.row = (count > 1).then_some(Row { written, ..row });
                state.theirs -= 1;
            }
            _ => {}
        }
    }

    /// Forgets requests that nobody waits for and that prove a hold which is gone for good: they change nothing.
    fn forget(&self, state: &mut State) {
        if self.goes_back || self.mutant.is_some_and(|mutant| !mutant.keeps_names()) {
            return;
        }
        let mut made: Vec<HoldId> = Vec::new();
        let present = state.row.map(|row| row.written);
        let name_of = |holder: &Holder| match holder {
            Holder::Plain { token, .. } => Some(token.hold),
            Holder::Reentrant { hold, .. } => *hold,
            Holder::Foreign { .. } => None,
        };
        made.extend(present.and_then(|present| name_of(&present.holder)));
        for change in state.requests.iter().filter_map(|request| request.change) {
            match &change.write {
                Write::Put(new) => made.extend(name_of(&new.holder)),
                Write::Entry { name, .. } => made.extend(*name),
                Write::Extend { .. } | Write::Delete => {}
            }
        }
        let clients = &state.clients;
        state.requests.retain(|request| {
            let hold = match request.change.as_deref().map(|change| &change.condition) {
                Some(Condition::Mine(Proof::Token(token))) => token.hold,
                Some(
                    Condition::Mine(Proof::Hold(hold) | Proof::Object { hold, .. })
                    | Condition::Mine(Proof::Owner { hold: Some(hold), .. }),
                ) => *hold,
                _ => return true,
            };
            clients[request.sent.client as usize].awaits(&request.sent)
                || matches!(request.sent.what, What::Remove { .. }) && self.cleans_again
                || made.contains(&hold)
        });
    }

    /// What the store's clock may have said at some moment since the request was sent.
    fn readings(&self, state: &State, request: &Request, apply: &mut impl FnMut(Time)) {
        if !self.read_at_arrival {
            apply(Protocol::reading(state));
            return;
        }
        // Arriving changes nothing but the reading, so it is chosen with the application.
        let reads_clock = request.change.is_some_and(|change| {
            change.not_after.is_some()
                || !matches!(
                    change.write,
                    Write::Delete | Write::Entry { lease: nblock::protocol::Lease::AsStored, .. }
                )
                || matches!(change.condition, Condition::Seen { over: true, .. })
        });
        if !reads_clock {
            apply(Protocol::reading(state));
            return;
        }
        for at in request.sent.at..=state.now {
            match state.stepped_back {
                Some(stepped) if stepped < at => apply(at - 1),
                Some(stepped) if stepped == at => {
                    apply(at);
                    apply(at - 1);
                }
                _ => apply(at),
            }
        }
    }
}

impl Client {
    fn awaits(&self, sent: &Sent) -> bool {
        match sent.what {
            What::Ask(_) => matches!(self.phase, Phase::Acquiring(_)) && self.operation == sent.operation,
            What::Draw => matches!(self.phase, Phase::Drawing(..)) && self.operation == sent.operation,
            What::Release => matches!(self.phase, Phase::Releasing { .. }) && self.operation == sent.operation,
            What::Renew(_) => self.held.is_some_and(|held| held.operation == sent.operation),
            What::Remove { .. } | What::Break => false,
        }
    }
}

fn insert<T: Ord>(sorted: &mut Vec<T>, value: T) {
    if let Err(at) = sorted.binary_search(&value) {
        sorted.insert(at, value);
    }
}

fn remove<T: Ord>(sorted: &mut Vec<T>, value: &T) {
    if let Ok(at) = sorted.binary_search(value) {
        sorted.remove(at);
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let client = Client {
            phase: Phase::Idle,
            held: None,
            holds: 0,
            operation: 0,
            attempts: 0,
            follow_ups: 0,
            refreshes: 0,
            unlocks: 0,
            write_seq: 0,
            ended: 0,
            cleaning: None,
            cleaned: None,
        };
        vec![State {
            now: START,
            stepped_back: None,
            row: None,
            grants: 0,
            counter: 0,
            clients: vec![client; self.clients.len()],
            requests: Vec::new(),
            answers: Vec::new(),
            doubled: 0,
            crashes: 0,
            breaks: 0,
            past: None,
            era: 0,
            highest: 0,
            theirs: 0,
            their_serial: 0,
            their_deadline: 0,
            their_steps: 0,
            wrong: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.wrong.is_some() {
            return;
        }
        if state.now < START + self.ticks {
            actions.push(Step::Tick);
        }
        for (number, (client, may)) in state.clients.iter().zip(&self.clients).enumerate() {
            let index = number as u8;
            match client.phase {
                Phase::Idle => {
                    let steps_left = client.operation < may.steps;
                    let may_enter = client.held.is_none() || may.owner.is_some();
                    if steps_left && may_enter && client.holds < may.holds {
                        actions.push(Step::Acquire(index));
                    }
                    if client.held.is_some() {
                        if client.refreshes < may.refreshes {
                            actions.push(Step::Refresh(index));
                        }
                        if steps_left && may.unlocks > 0 {
                            actions.push(Step::Unlock(index));
                        }
                        if state.crashes < self.crashes {
                            actions.push(Step::Crash(index));
                        }
                        if self.is(Mutant::AbsenceFromARead) && state.past.is_some() {
                            actions.push(Step::ReadPast(index));
                        }
                    }
                }
                Phase::Acquiring(_) => {
                    if client.attempts < may.attempts {
                        actions.push(Step::AskAgain(index));
                    }
                    if client.cleaning.is_none() && self.gives_up {
                        actions.push(Step::GiveUp(index));
                    }
                }
                Phase::Drawing(..) if client.cleaning.is_none() && self.gives_up => actions.push(Step::GiveUp(index)),
                // Sent once more when no answer comes.
                Phase::Releasing { .. } if client.unlocks < may.unlocks => actions.push(Step::UnlockAgain(index)),
                Phase::Drawing(..) | Phase::Releasing { .. } | Phase::Crashed => {}
            }
            if client.cleaning.is_some_and(|cleaning| !cleaning.last_sent && cleaning.not_after < state.now) {
                actions.push(Step::CleanAgain(index));
            }
        }
        for &request in &state.requests {
            self.readings(state, &request, &mut |reading| {
                actions.push(Step::Apply(request, reading));
                if state.doubled < self.doubled && request.sent.what != What::Break {
                    actions.push(Step::ApplyAndKeep(request, reading));
                }
            });
        }
        actions.extend(state.answers.iter().map(|&answer| Step::Deliver(answer)));
        if self.goes_back || self.is(Mutant::AbsenceFromARead) {
            if state.past.is_none() {
                actions.push(Step::Remember);
            } else if self.goes_back && state.era == 0 {
                actions.push(Step::GoBack);
            }
        }
        if self.clock_steps && state.stepped_back.is_none() {
            actions.push(Step::StepClockBack);
        }
        if state.their_steps < self.foreign_steps {
            actions.push(Step::TheirStepIn);
            if state.theirs > 0 {
                actions.push(Step::TheirStepOut);
            }
        }
        let now = StoreTime(Protocol::reading(state).into());
        if state.breaks < self.breaks && state.row.is_some_and(|row| row.written.is_over(now)) {
            actions.push(Step::Break);
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        match step {
            Step::Tick => state.now += 1,
            Step::Acquire(index) => self.acquire(&mut state, index as usize),
            Step::AskAgain(index) => {
                let client = &mut state.clients[index as usize];
                client.attempts += 1;
                let Phase::Acquiring(acquisition) = client.phase else { return None };
                self.send_asked(&mut state, index as usize, acquisition);
            }
            Step::GiveUp(index) => match state.clients[index as usize].phase {
                Phase::Acquiring(acquisition) | Phase::Drawing(acquisition, _) => {
                    self.give_up(&mut state, index as usize, acquisition);
                }
                _ => return None,
            },
            Step::Refresh(index) => self.refresh(&mut state, index as usize),
            Step::Unlock(index) => self.unlock(&mut state, index as usize),
            Step::UnlockAgain(index) => {
                let client = &mut state.clients[index as usize];
                client.unlocks += 1;
                let operation = client.operation;
                let Phase::Releasing { release, .. } = client.phase else { return None };
                let change = Ref::to(release.change());
                self.send(&mut state, index as usize, operation, What::Release, Some(change));
            }
            Step::CleanAgain(index) => {
                let cleaning = state.clients[index as usize].cleaning.as_mut()?;
                cleaning.last_sent = true;
                let orphan = cleaning.orphan;
                self.send_removals(&mut state, index as usize, &orphan, true);
                self.note_cleaned(&mut state, index as usize);
            }
            Step::Crash(index) => {
                state.crashes += 1;
                let client = &mut state.clients[index as usize];
                client.held = None;
                self.end(&mut state, index as usize);
                state.clients[index as usize].phase = Phase::Crashed;
            }
            Step::Apply(request, reading) => {
                remove(&mut state.requests, &request);
                self.apply(&mut state, request, reading);
            }
            Step::ApplyAndKeep(request, reading) => {
                state.doubled += 1;
                remove(&mut state.requests, &request);
                self.apply(&mut state, request, reading);
                insert(&mut state.requests, Request { echo: true, ..request });
            }
            Step::Deliver(answer) => {
                remove(&mut state.answers, &answer);
                self.deliver(&mut state, answer);
            }
            Step::Remember => state.past = Some((state.row, state.counter)),
            Step::GoBack => {
                let (row, counter) = state.past?;
                (state.row, state.counter) = (row, counter);
                state.era += 1;
            }
            Step::StepClockBack => state.stepped_back = Some(state.now),
            Step::ReadPast(index) => {
                let (past, _) = state.past?;
                let held = state.clients[index as usize].held?;
                let proof = self.proof(index as usize, &held);
                if !past.is_some_and(|row| row.written.holder.is_proven_by(&proof)) {
                    self.lose(&mut state, index as usize);
                }
            }
            Step::TheirStepIn => self.their_step(&mut state, true),
            Step::TheirStepOut => self.their_step(&mut state, false),
            Step::Break => {
                state.breaks += 1;
                let seen = Condition::Seen { state: Box::new((*state.row?.written).clone()), over: false };
                let change = Ref::to(Change::new(seen, Write::Delete));
                self.send(&mut state, 0, 0, What::Break, Some(change));
            }
        }
        self.forget(&mut state);
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE, |protocol: &Protocol, state: &State| {
                let mut holders = protocol.inside(state).map(|(index, held)| match protocol.clients[index].owner {
                    None => (index, name(index as u8, 0)),
                    Some(owner) => (usize::from(owner) + 100, held.granted.hold),
                });
                let first = holders.next();
                holders.all(|holder| Some(holder) == first)
            }),
            Property::always(OWN, |protocol: &Protocol, state: &State| {
                protocol.inside(state).all(|(index, held)| {
                    state.row.is_some_and(|row| match (&row.written.holder, held.granted.token) {
                        (Holder::Plain { token, .. }, Some(ours)) => *token == ours,
                        (holder @ Holder::Reentrant { hold, owner: here, .. }, None) => {
                            let entry = holder.entry(ObjectId(index as u64));
                            *hold == Some(held.granted.hold)
                                && protocol.clients[index].owner.is_some_and(|ours| *here == owner(ours))
                                && entry.is_some_and(|entry| {
                                    entry.count >= u32::from(held.depth_inside(&state.clients[index]))
                                })
                        }
                        _ => false,
                    })
                })
            }),
            Property::always(COUNTED, |_, state: &State| {
                let Some(row) = state.row else { return true };
                let Holder::Reentrant { count, entries, .. } = &row.written.holder else { return true };
                let theirs = if row.serial == state.their_serial { u32::from(state.theirs) } else { 0 };
                state.era > 0 || *count == entries.iter().map(|entry| entry.count).sum::<u32>() + theirs
            }),
            Property::always(EXACT, |_, state: &State| {
                let Some(row) = state.row else { return true };
                state.clients.iter().enumerate().all(|(index, client)| {
                    let Some(held) = client.held else { return true };
                    let settled = client.phase == Phase::Idle
                        && state.now < held.deadline
                        && held.era == state.era
                        && !state.requests.iter().any(|request| {
                            // A step that was given up is in the record until it is removed.
                            request.sent.client as usize == index && !matches!(request.sent.what, What::Renew(_))
                        })
                        && client.cleaning.is_none();
                    let entry = row.written.holder.entry(ObjectId(index as u64));
                    !settled
                        || held.granted.token.is_some()
                        || entry.map(|entry| entry.count) == Some(held.depth.into())
                })
            }),
            Property::always(THEIRS, |_, state: &State| {
                state.theirs == 0
                    || state.now >= state.their_deadline
                    || state.era > 0
                    || state.row.is_some_and(|row| row.serial == state.their_serial)
            }),
            Property::always(BOUNDED, |_, state: &State| {
                let Some(row) = state.row else { return true };
                let Holder::Plain { token, .. } = row.written.holder else { return true };
                let (index, number) = named(token.hold);
                let client = &state.clients[index as usize];
                let over = client.holds > number
                    || client.held.is_none() && matches!(client.phase, Phase::Idle | Phase::Crashed);
                let ends_at = row.written.ends_at.0 as Time;
                !over || row.renewed || state.stepped_back.is_some() || ends_at <= client.ended + OP_TIMEOUT + EXPIRE
            }),
            Property::always(CLEAN, |protocol: &Protocol, state: &State| {
                let Some(row) = state.row else { return true };
                state.clients.iter().enumerate().all(|(index, client)| match client.cleaned.as_deref() {
                    None => true,
                    Some(Orphan::Plain { hold }) => {
                        !matches!(row.written.holder, Holder::Plain { token, .. } if token.hold == *hold)
                    }
                    Some(Orphan::Step { holds, write_seq, count, .. }) => {
                        let of_owner = matches!(&row.written.holder, Holder::Reentrant { hold: Some(hold), .. } if holds.contains(hold));
                        let entry = row.written.holder.entry(ObjectId(index as u64));
                        protocol.clients[index].owner.is_none()
                            || !of_owner
                            || entry.is_none_or(|entry| entry.write_seq >= *write_seq || entry.count <= *count)
                    }
                })
            }),
            Property::always(NOT_ITSELF, |_, state: &State| state.wrong != Some(Wrong::RefusedByItself)),
            Property::always(NOT_LOST, |_, state: &State| state.wrong != Some(Wrong::LostInsideDeadline)),
            Property::always(FENCES, |_, state: &State| state.wrong != Some(Wrong::FenceFell)),
            Property::always(PIECE, |_, state: &State| state.wrong != Some(Wrong::InTwoPieces)),
            Property::always(OURS, |_, state: &State| state.wrong != Some(Wrong::ChangedAnothers)),
            Property::sometimes(PASSES_ON, |_, state: &State| {
                state.clients.iter().any(|client| client.held.is_some_and(|held| held.serial > 1))
            }),
        ]
    }
}

pub const ONE: &str = "at most one holder inside its deadline";
pub const OWN: &str = "inside its deadline the record is the holder's";
pub const COUNTED: &str = "the count is that of all users";
pub const EXACT: &str = "an object is counted as often as it is in";
pub const THEIRS: &str = "what another library counts is not lost";
pub const BOUNDED: &str = "what a hold left is gone one lease after its last attempt can take anything";
pub const CLEAN: &str = "nothing is left of what was cleaned up";
pub const NOT_ITSELF: &str = "no hold is refused because of itself";
pub const NOT_LOST: &str = "nothing is lost inside the deadline";
pub const FENCES: &str = "fences grow";
pub const PIECE: &str = "a hold is one piece";
pub const OURS: &str = "a record is changed as ours by its own holder alone";
/// Else nothing was tried.
pub const PASSES_ON: &str = "it is granted again";

impl Protocol {
    /// The clients that are inside their deadlines, by what a store that may have gone back last said to them.
    fn inside<'a>(&self, state: &'a State) -> impl Iterator<Item = (usize, Held)> + 'a {
        state.clients.iter().enumerate().filter_map(|(index, client)| {
            let held = client.held?;
            (state.now < held.deadline && held.era == state.era).then_some((index, held))
        })
    }
}

impl Held {
    /// How often the object is in at least, whatever becomes of what it has under way.
    fn depth_inside(&self, client: &Client) -> u8 {
        self.depth - u8::from(matches!(client.phase, Phase::Releasing { .. }))
    }
}
