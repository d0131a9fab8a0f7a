//! Plain locks: R1 to R8, and R18.

use std::collections::BTreeSet;

use stateright::{Model, Property};

use crate::Time;

/// The length of every lease.
const EXPIRE: Time = 2;
/// How long after it was sent an attempt may still take something.
const OP_TIMEOUT: Time = 1;

/// What a broken protocol leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// R2: a repeated request does not know its own hold.
    NoLastArm,
    /// R3: all attempts of a hold have one token.
    OneTokenPerHold,
    /// R3: a renewal is applied whatever was applied before.
    RefreshWithoutN,
    /// R3: an attempt takes something whenever it comes.
    NoTakeNothingAfter,
    /// R4: the lease is counted from the reply.
    DeadlineFromReply,
    /// R4: a grant counts although its answer came after its deadline.
    LateGrantCounts,
    /// R6: whoever unlocks deletes.
    UnlockWithoutToken,
    /// R7: an unlock is judged by when its last request left.
    UnlockJudgedByRetry,
    /// R18: a fence that was drawn after the grant is used although the hold was not proven since.
    FenceWithoutProof,
}

/// Where a grant's fence comes from (R18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fences {
    /// The grant's own transaction.
    InTheGrant,
    /// A counter that is asked after the grant; then the hold is proven.
    AfterTheGrant,
}

/// What one client may do: how many holds it asks for, and how often in each it asks, renews and unlocks.
#[derive(Clone, Copy)]
pub struct Limits {
    pub holds: u8,
    pub attempts: u8,
    pub refreshes: u8,
    pub unlocks: u8,
}

pub struct Protocol {
    pub clients: Vec<Limits>,
    /// How many requests may be applied twice.
    pub doubled: u8,
    pub crashes: u8,
    pub until: Time,
    pub fences: Fences,
    pub mutant: Option<Mutant>,
}

/// A hold: whose, and which of his.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hold {
    client: u8,
    number: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token {
    hold: Hold,
    attempt: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    token: Token,
    n: u8,
    expires: Time,
    /// The number of the grant.
    grant: u8,
    /// Whether a renewal wrote it last. One that is under way when its hold ends adds a lease to it,
    /// from when it arrives: a renewal takes nothing from anybody, so nothing limits that.
    renewed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    Acquire {
        token: Token,
    },
    Refresh {
        token: Token,
    },
    Release {
        token: Token,
    },
    /// Deletes whatever the hold's attempts left.
    CleanUp,
    /// Draws a fence.
    Draw,
}

/// A request under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Request {
    hold: Hold,
    sent: Time,
    n: u8,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Said {
    Granted { token: Token, applied: bool, grant: u8 },
    Held { by_itself: bool },
    TooLate,
    Renewed { applied: bool, grant: u8 },
    Lost,
    Released,
    NotOurs,
    Fence(u8),
}

/// An answer under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Answer {
    hold: Hold,
    sent: Time,
    n: u8,
    said: Said,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Idle,
    Acquiring,
    /// Granted; its fence is asked for, or it is renewed to be sure of it.
    Proving {
        token: Token,
        grant: u8,
        fence: Option<u8>,
    },
    Held {
        token: Token,
        grant: u8,
        fence: u8,
        deadline: Time,
        deadline_n: u8,
    },
    Releasing {
        token: Token,
        first_sent: Time,
        deadline: Time,
    },
    Crashed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    phase: Phase,
    /// The hold it has or had, and how many of everything that has asked for.
    hold: u8,
    attempts: u8,
    refreshes: u8,
    releases: u8,
    n: u8,
    /// When the hold before this ended.
    ended: Time,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    now: Time,
    record: Option<Record>,
    grants: u8,
    /// The counter that fences are drawn from.
    counter: u8,
    clients: Vec<Client>,
    requests: BTreeSet<Request>,
    answers: BTreeSet<Answer>,
    doubled: u8,
    crashes: u8,
    /// The highest fence that anybody held the lock with.
    highest: u8,
    /// What went wrong, as soon as it did.
    wrong: Option<Wrong>,
    /// Whether two clients have held it in turn: else nothing was tried.
    handed_over: bool,
    last_holder: Option<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wrong {
    /// Told that it lost what was its own.
    LostInsideDeadline,
    /// Refused because of itself.
    RefusedByItself,
    /// A fence that is not above those before it.
    FenceFell,
    /// A renewal of a hold that had ended in between.
    InTwoPieces,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Tick,
    Attempt(u8),
    GiveUp(u8),
    Refresh(u8),
    Unlock(u8),
    Crash(u8),
    /// Applied, with the clock as it was when the request arrived.
    Apply(Request, Time),
    /// Applied, and applied again later.
    ApplyAndKeep(Request, Time),
    Deliver(Answer),
}

impl Protocol {
    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// What the store does, in one step, with the clock that it read when the request arrived.
    fn apply(&self, state: &mut State, request: Request, now: Time) {
        let ours = |record: &Record, token: Token| match self.is(Mutant::OneTokenPerHold) {
            true => record.token.hold == token.hold,
            false => record.token == token,
        };
        let said = match request.what {
            What::Acquire { .. } if now > request.sent + OP_TIMEOUT && !self.is(Mutant::NoTakeNothingAfter) => {
                Said::TooLate
            }
            What::Acquire { token } => match &mut state.record {
                Some(record) if record.token.hold == request.hold && !self.is(Mutant::NoLastArm) => {
                    let applied = record.n < request.n;
                    if applied {
                        (record.n, record.expires, record.renewed) = (request.n, now + EXPIRE, false);
                    }
                    Said::Granted { token: record.token, applied, grant: record.grant }
                }
                Some(record) if record.expires >= now => Said::Held { by_itself: record.token.hold == request.hold },
                _ => {
                    state.grants += 1;
                    let grant = state.grants;
                    state.record = Some(Record { token, n: request.n, expires: now + EXPIRE, grant, renewed: false });
                    Said::Granted { token, applied: true, grant }
                }
            },
            What::Refresh { token } => match &mut state.record {
                Some(record) if ours(record, token) => {
                    let applied = record.n < request.n || self.is(Mutant::RefreshWithoutN);
                    if applied {
                        (record.n, record.expires, record.renewed) = (request.n, now + EXPIRE, true);
                    }
                    Said::Renewed { applied, grant: record.grant }
                }
                _ => Said::Lost,
            },
            What::Release { token } => match &state.record {
                Some(record) if ours(record, token) || self.is(Mutant::UnlockWithoutToken) => {
                    state.record = None;
                    Said::Released
                }
                _ => Said::NotOurs,
            },
            What::CleanUp => {
                if state.record.is_some_and(|record| record.token.hold == request.hold) {
                    state.record = None;
                }
                return;
            }
            What::Draw => {
                state.counter += 1;
                Said::Fence(state.counter)
            }
        };
        let client = &state.clients[request.hold.client as usize];
        // What nobody waits for any more need not be delivered.
        if client.hold == request.hold.number && !matches!(client.phase, Phase::Idle | Phase::Crashed) {
            state.answers.insert(Answer { hold: request.hold, sent: request.sent, n: request.n, said });
        }
    }

    fn send(state: &mut State, client: u8, what: What) {
        let now = state.now;
        let sender = &mut state.clients[client as usize];
        sender.n += 1;
        let hold = Hold { client, number: sender.hold };
        state.requests.insert(Request { hold, sent: now, n: sender.n, what });
    }

    fn end(state: &mut State, client: u8) {
        let ended = state.now;
        let client_state = &mut state.clients[client as usize];
        (client_state.phase, client_state.ended) = (Phase::Idle, ended);
        state.answers.retain(|answer| answer.hold.client != client);
    }

    fn hold(&self, state: &mut State, client: u8, phase: Phase) {
        let Phase::Held { fence, deadline, .. } = phase else { unreachable!("a hold is held") };
        if deadline <= state.now && !self.is(Mutant::LateGrantCounts) {
            // A late grant is none: it is given back.
            Protocol::send(state, client, What::CleanUp);
            Protocol::end(state, client);
            return;
        }
        if fence <= state.highest {
            state.wrong = Some(Wrong::FenceFell);
        }
        state.highest = state.highest.max(fence);
        state.handed_over |= state.last_holder.is_some_and(|last| last != client);
        state.last_holder = Some(client);
        state.clients[client as usize].phase = phase;
    }

    fn deliver(&self, state: &mut State, answer: Answer) {
        let (now, index) = (state.now, answer.hold.client);
        let counted_from = if self.is(Mutant::DeadlineFromReply) { now } else { answer.sent };
        let deadline = counted_from + EXPIRE;
        let phase = state.clients[index as usize].phase;
        match (phase, answer.said) {
            (Phase::Acquiring, Said::Granted { token, applied, grant }) => match (self.fences, applied) {
                (Fences::InTheGrant, true) => {
                    self.hold(state, index, Phase::Held { token, grant, fence: grant, deadline, deadline_n: answer.n });
                }
                (Fences::InTheGrant, false) => {
                    state.clients[index as usize].phase = Phase::Proving { token, grant, fence: Some(grant) };
                    Protocol::send(state, index, What::Refresh { token });
                }
                (Fences::AfterTheGrant, _) => {
                    state.clients[index as usize].phase = Phase::Proving { token, grant, fence: None };
                    Protocol::send(state, index, What::Draw);
                }
            },
            (Phase::Acquiring, Said::Held { by_itself: true }) => state.wrong = Some(Wrong::RefusedByItself),
            (Phase::Proving { token, grant, fence: None }, Said::Fence(fence)) => {
                if self.is(Mutant::FenceWithoutProof) {
                    // Held since the grant, by its own reckoning, as if drawing had taken no time.
                    let deadline = now + EXPIRE;
                    self.hold(state, index, Phase::Held { token, grant, fence, deadline, deadline_n: answer.n });
                    return;
                }
                state.clients[index as usize].phase = Phase::Proving { token, grant, fence: Some(fence) };
                Protocol::send(state, index, What::Refresh { token });
            }
            (Phase::Proving { token, fence: Some(fence), .. }, Said::Renewed { applied: true, grant }) => {
                self.hold(state, index, Phase::Held { token, grant, fence, deadline, deadline_n: answer.n });
            }
            (Phase::Proving { .. }, Said::Lost) => Protocol::end(state, index),
            (Phase::Held { token, grant, fence, deadline_n, .. }, Said::Renewed { applied, grant: found }) => {
                if found != grant {
                    state.wrong = Some(Wrong::InTwoPieces);
                }
                if applied && answer.n >= deadline_n {
                    state.clients[index as usize].phase =
                        Phase::Held { token, grant, fence, deadline, deadline_n: answer.n };
                }
            }
            (Phase::Held { deadline, .. }, Said::Lost) => {
                if now < deadline {
                    state.wrong = Some(Wrong::LostInsideDeadline);
                }
                Protocol::end(state, index);
            }
            (Phase::Releasing { .. }, Said::Released) => Protocol::end(state, index),
            (Phase::Releasing { first_sent, deadline, .. }, Said::NotOurs) => {
                let judged_by = if self.is(Mutant::UnlockJudgedByRetry) { answer.sent } else { first_sent };
                if judged_by >= deadline && first_sent < deadline {
                    state.wrong = Some(Wrong::LostInsideDeadline);
                }
                Protocol::end(state, index);
            }
            _ => {}
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let client = Client { phase: Phase::Idle, hold: 0, attempts: 0, refreshes: 0, releases: 0, n: 0, ended: 0 };
        vec![State {
            now: 0,
            record: None,
            grants: 0,
            counter: 0,
            clients: vec![client; self.clients.len()],
            requests: BTreeSet::new(),
            answers: BTreeSet::new(),
            doubled: 0,
            crashes: 0,
            highest: 0,
            wrong: None,
            handed_over: false,
            last_holder: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.wrong.is_some() {
            return;
        }
        if state.now < self.until {
            actions.push(Step::Tick);
        }
        for (index, (client, may)) in state.clients.iter().zip(&self.clients).enumerate() {
            let index = index as u8;
            match client.phase {
                Phase::Idle if client.hold < may.holds => actions.push(Step::Attempt(index)),
                Phase::Acquiring => {
                    if client.attempts < may.attempts {
                        actions.push(Step::Attempt(index));
                    }
                    actions.push(Step::GiveUp(index));
                }
                Phase::Proving { .. } => actions.push(Step::GiveUp(index)),
                Phase::Held { .. } => {
                    if client.refreshes < may.refreshes {
                        actions.push(Step::Refresh(index));
                    }
                    if client.releases < may.unlocks {
                        actions.push(Step::Unlock(index));
                    }
                    if state.crashes < self.crashes {
                        actions.push(Step::Crash(index));
                    }
                }
                // Sent once more when no answer comes.
                Phase::Releasing { .. } if client.releases < may.unlocks => actions.push(Step::Unlock(index)),
                Phase::Idle | Phase::Releasing { .. } | Phase::Crashed => {}
            }
        }
        for &request in &state.requests {
            for arrived in request.sent..=state.now {
                actions.push(Step::Apply(request, arrived));
                if state.doubled < self.doubled {
                    actions.push(Step::ApplyAndKeep(request, arrived));
                }
            }
        }
        actions.extend(state.answers.iter().map(|&answer| Step::Deliver(answer)));
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        match step {
            Step::Tick => state.now += 1,
            Step::Attempt(index) => {
                let client = &mut state.clients[index as usize];
                if client.phase == Phase::Idle {
                    let (hold, ended) = (client.hold + 1, client.ended);
                    *client =
                        Client { phase: Phase::Acquiring, hold, attempts: 0, refreshes: 0, releases: 0, n: 0, ended };
                }
                client.attempts += 1;
                let hold = Hold { client: index, number: client.hold };
                let token = Token { hold, attempt: client.attempts };
                Protocol::send(&mut state, index, What::Acquire { token });
            }
            Step::GiveUp(index) => {
                Protocol::send(&mut state, index, What::CleanUp);
                Protocol::end(&mut state, index);
            }
            Step::Refresh(index) => {
                let client = &mut state.clients[index as usize];
                client.refreshes += 1;
                let Phase::Held { token, .. } = client.phase else { return None };
                Protocol::send(&mut state, index, What::Refresh { token });
            }
            Step::Unlock(index) => {
                let now = state.now;
                let client = &mut state.clients[index as usize];
                client.releases += 1;
                let token = match client.phase {
                    Phase::Held { token, deadline, .. } => {
                        client.phase = Phase::Releasing { token, first_sent: now, deadline };
                        token
                    }
                    Phase::Releasing { token, .. } => token,
                    _ => return None,
                };
                Protocol::send(&mut state, index, What::Release { token });
            }
            Step::Crash(index) => {
                state.crashes += 1;
                Protocol::end(&mut state, index);
                state.clients[index as usize].phase = Phase::Crashed;
            }
            Step::Apply(request, arrived) => {
                state.requests.remove(&request);
                self.apply(&mut state, request, arrived);
            }
            Step::ApplyAndKeep(request, arrived) => {
                state.doubled += 1;
                self.apply(&mut state, request, arrived);
            }
            Step::Deliver(answer) => {
                state.answers.remove(&answer);
                self.deliver(&mut state, answer);
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn inside(state: &State) -> impl Iterator<Item = Token> + '_ {
            state.clients.iter().filter_map(|client| match client.phase {
                Phase::Held { token, deadline, .. } if state.now < deadline => Some(token),
                _ => None,
            })
        }
        vec![
            Property::always("at most one holder inside its deadline", |_, state: &State| inside(state).count() <= 1),
            Property::always("inside its deadline the record is the holder's", |protocol: &Protocol, state: &State| {
                inside(state).all(|token| {
                    state.record.is_some_and(|record| match protocol.is(Mutant::OneTokenPerHold) {
                        true => record.token.hold == token.hold,
                        false => record.token == token,
                    })
                })
            }),
            Property::always(
                "what a hold left is gone one lease after its last attempt can take anything",
                |_, state: &State| {
                    let Some(record) = state.record else { return true };
                    let client = &state.clients[record.token.hold.client as usize];
                    let over =
                        client.hold > record.token.hold.number || matches!(client.phase, Phase::Idle | Phase::Crashed);
                    !over || record.renewed || record.expires <= client.ended + OP_TIMEOUT + EXPIRE
                },
            ),
            Property::always("nobody is refused by himself", |_, state: &State| {
                state.wrong != Some(Wrong::RefusedByItself)
            }),
            Property::always("nothing is lost inside the deadline", |_, state: &State| {
                state.wrong != Some(Wrong::LostInsideDeadline)
            }),
            Property::always("fences grow", |_, state: &State| state.wrong != Some(Wrong::FenceFell)),
            Property::always("a hold is one piece", |_, state: &State| state.wrong != Some(Wrong::InTwoPieces)),
            Property::sometimes("it goes from one to another", |_, state: &State| state.handed_over),
            Property::sometimes("it is taken over from who has it", |_, state: &State| {
                state.record.is_some_and(|record| {
                    state.clients.iter().enumerate().any(|(index, client)| {
                        matches!(client.phase, Phase::Held { .. }) && record.token.hold.client != index as u8
                    })
                })
            }),
        ]
    }
}

#[cfg(test)]
mod tests {
    use stateright::{Checker, HasDiscoveries};

    use super::*;

    /// Asks once for one hold, and keeps it.
    const KEEPS: Limits = Limits { holds: 1, attempts: 1, refreshes: 0, unlocks: 0 };
    /// Asks once for one hold, and unlocks.
    const PASSES: Limits = Limits { unlocks: 1, ..KEEPS };
    const ASKS_AGAIN: Limits = Limits { attempts: 2, ..PASSES };
    const RENEWS: Limits = Limits { refreshes: 2, ..KEEPS };
    const UNLOCKS_AGAIN: Limits = Limits { unlocks: 2, ..KEEPS };
    const COMES_BACK: Limits = Limits { holds: 2, ..PASSES };

    fn protocol(clients: &[Limits]) -> Protocol {
        Protocol {
            clients: clients.to_vec(),
            doubled: 0,
            crashes: 0,
            until: 4,
            fences: Fences::InTheGrant,
            mutant: None,
        }
    }

    /// Explores all of it.
    fn holds(name: &str, protocol: Protocol) {
        let checker = protocol.checker().threads(2).spawn_bfs().join();
        println!("{name}: {} states", checker.unique_state_count());
        assert!(checker.is_done());
        checker.assert_properties();
    }

    /// Explores until it has found what the mutant does wrong.
    fn fails(mutant: Mutant, property: &'static str, protocol: Protocol) {
        let checker = Protocol { mutant: Some(mutant), ..protocol }
            .checker()
            .threads(2)
            .finish_when(HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        let found = checker.discoveries();
        let Some(path) = found.get(property) else {
            panic!("{mutant:?} does not break {property:?}, but {:?}", found.keys());
        };
        println!("{mutant:?} breaks {property:?} in {} steps", path.clone().into_actions().len());
    }

    const ONE: &str = "at most one holder inside its deadline";
    const OWN: &str = "inside its deadline the record is the holder's";

    #[test]
    fn asking_again() {
        holds("asking again", protocol(&[ASKS_AGAIN, PASSES]));
    }

    #[test]
    fn renewing() {
        holds("renewing", protocol(&[RENEWS, KEEPS]));
    }

    #[test]
    fn unlocking_again() {
        holds("unlocking again", protocol(&[UNLOCKS_AGAIN, PASSES]));
    }

    #[test]
    fn coming_back() {
        holds("coming back", protocol(&[COMES_BACK, PASSES]));
    }

    #[test]
    fn doubled_requests() {
        holds("doubled requests", Protocol { doubled: 1, ..protocol(&[PASSES, PASSES]) });
    }

    #[test]
    fn crashing() {
        holds("crashing", Protocol { crashes: 1, ..protocol(&[PASSES, PASSES]) });
    }

    #[test]
    fn three_clients() {
        holds("three clients", Protocol { until: 3, ..protocol(&[PASSES, KEEPS, KEEPS]) });
    }

    #[test]
    fn fences_after_the_grant() {
        holds("fences after the grant", Protocol { fences: Fences::AfterTheGrant, ..protocol(&[KEEPS, KEEPS]) });
    }

    #[test]
    fn without_the_last_arm() {
        fails(Mutant::NoLastArm, "nobody is refused by himself", protocol(&[ASKS_AGAIN, PASSES]));
    }

    #[test]
    fn with_one_token_for_all_attempts() {
        let both = Limits { refreshes: 1, ..ASKS_AGAIN };
        fails(Mutant::OneTokenPerHold, "a hold is one piece", Protocol { until: 4, ..protocol(&[both, PASSES]) });
    }

    #[test]
    fn with_renewals_that_are_not_numbered() {
        fails(Mutant::RefreshWithoutN, OWN, protocol(&[RENEWS, KEEPS]));
    }

    #[test]
    fn with_attempts_that_are_never_too_late() {
        let left = "what a hold left is gone one lease after its last attempt can take anything";
        fails(Mutant::NoTakeNothingAfter, left, protocol(&[PASSES, PASSES]));
    }

    #[test]
    fn with_the_deadline_from_the_reply() {
        fails(Mutant::DeadlineFromReply, OWN, protocol(&[KEEPS, KEEPS]));
    }

    #[test]
    fn with_late_grants() {
        fails(Mutant::LateGrantCounts, "fences grow", protocol(&[KEEPS, KEEPS]));
    }

    #[test]
    fn with_unlocks_that_show_no_token() {
        fails(Mutant::UnlockWithoutToken, OWN, protocol(&[PASSES, PASSES]));
    }

    #[test]
    fn with_unlocks_judged_by_the_retry() {
        fails(Mutant::UnlockJudgedByRetry, "nothing is lost inside the deadline", protocol(&[UNLOCKS_AGAIN, PASSES]));
    }

    #[test]
    fn with_fences_that_are_not_proven() {
        let after = Protocol { fences: Fences::AfterTheGrant, ..protocol(&[KEEPS, KEEPS]) };
        fails(Mutant::FenceWithoutProof, OWN, after);
    }

    #[test]
    fn one_holder_is_what_all_this_is_about() {
        let checker = Protocol { mutant: Some(Mutant::DeadlineFromReply), ..protocol(&[KEEPS, KEEPS]) };
        let checker = checker.checker().threads(2).finish_when(HasDiscoveries::AllOf([ONE].into())).spawn_bfs().join();
        assert!(checker.discovery(ONE).is_some(), "two holders at once are found");
    }
}
