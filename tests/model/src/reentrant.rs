//! Reentrant locks: R17. Objects that share one owner token, in processes that know nothing of each other.

use std::collections::{BTreeMap, BTreeSet};

use stateright::{Model, Property};

use crate::Time;

const EXPIRE: Time = 2;
const OP_TIMEOUT: Time = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The owner token alone proves a step out, whichever hold and step in it is of.
    WithoutHold,
    /// A step that is sent again counts again.
    WithoutOps,
    /// A step that was given up is undone before it is known whether it was made.
    UndoTooSoon,
    /// A step out counts whether or not the record knows the step in that it leaves.
    AnyWayOut,
}

pub struct Protocol {
    /// How many steps each object makes, and how often it sends each.
    pub steps: Vec<u8>,
    pub sends: u8,
    pub until: Time,
    pub mutant: Option<Mutant>,
}

/// A hold's random name: the object and the number of the step that made it.
type Hold = (u8, u8);
/// The random name of a step in and its way out; used again once both were answered.
type Series = (u8, u8);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    hold: Hold,
    count: i8,
    expires: Time,
    /// The last step of each series.
    ops: BTreeMap<Series, u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    Enter { hold: Option<Hold>, fresh: Hold },
    Leave { hold: Hold, enter: u8 },
    Undo { enter: u8 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Request {
    object: u8,
    series: Series,
    number: u8,
    sent: Time,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Said {
    Entered(Hold),
    Left,
    NotOurs,
    Undone,
    TooLate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Answer {
    object: u8,
    series: Series,
    number: u8,
    sent: Time,
    said: Said,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Resting,
    /// Sent so often.
    Entering(u8),
    Leaving(u8),
    /// Gave a step up, which is to be undone until that is answered.
    Undoing(u8),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Object {
    phase: Phase,
    /// That of the step under way, how many there were, and those that may be used again.
    series: u8,
    series_used: u8,
    settled: Vec<u8>,
    number: u8,
    steps: u8,
    /// The hold it is in, its steps in (series and number), and until when it is sure of that.
    hold: Option<Hold>,
    inside: Vec<(u8, u8)>,
    deadline: Time,
}

impl Object {
    fn depth(&self) -> i8 {
        self.inside.len() as i8
    }

    fn begin(&mut self, enters: bool) {
        self.steps += 1;
        self.number += 1;
        if enters {
            self.series = self.settled.pop().unwrap_or(self.series_used);
            self.series_used = self.series_used.max(self.series + 1);
            self.phase = Phase::Entering(1);
        } else if let Some(&(series, _)) = self.inside.last() {
            (self.series, self.phase) = (series, Phase::Leaving(1));
        }
    }

    fn has_lost(&mut self) {
        (self.hold, self.inside) = (None, Vec::new());
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    now: Time,
    record: Option<Record>,
    objects: Vec<Object>,
    requests: BTreeSet<Request>,
    answers: BTreeSet<Answer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Tick,
    Enter(usize),
    Leave(usize),
    Again(usize),
    GiveUp(usize),
    Apply(Request, Time),
    Deliver(Answer),
}

impl Protocol {
    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn apply(&self, state: &mut State, request: Request, now: Time) {
        let last = |record: &Record| record.ops.get(&request.series).copied().unwrap_or(0);
        let counts = |last: u8| last < request.number || self.is(Mutant::WithoutOps);
        let said = match request.what {
            What::Enter { .. } if now > request.sent + OP_TIMEOUT => Said::TooLate,
            What::Enter { hold, fresh } => match &mut state.record {
                Some(record) if record.expires >= now || hold == Some(record.hold) || fresh == record.hold => {
                    let last = last(record);
                    if last > request.number {
                        Said::TooLate
                    } else {
                        if counts(last) {
                            record.count += 1;
                            record.ops.insert(request.series, request.number);
                        }
                        record.expires = record.expires.max(now + EXPIRE);
                        Said::Entered(record.hold)
                    }
                }
                _ => {
                    let ops = [(request.series, request.number)].into();
                    state.record = Some(Record { hold: fresh, count: 1, expires: now + EXPIRE, ops });
                    Said::Entered(fresh)
                }
            },
            What::Leave { hold, enter } => match &mut state.record {
                Some(record) if record.hold == hold || self.is(Mutant::WithoutHold) => {
                    let last = last(record);
                    let known = last == enter || self.is(Mutant::AnyWayOut) || self.is(Mutant::WithoutHold);
                    if last < request.number && !known {
                        Said::NotOurs
                    } else {
                        if counts(last) {
                            record.count -= 1;
                            record.ops.insert(request.series, request.number);
                        }
                        Said::Left
                    }
                }
                _ => Said::NotOurs,
            },
            What::Undo { enter } => {
                if let Some(record) = &mut state.record {
                    let last = last(record);
                    record.count -= i8::from(last == enter);
                    record.ops.insert(request.series, last.max(request.number));
                }
                Said::Undone
            }
        };
        if state.record.as_ref().is_some_and(|record| record.count <= 0) {
            state.record = None;
        }
        let object = &state.objects[request.object as usize];
        if object.phase != Phase::Resting && (request.object, object.series) == request.series {
            let Request { object, series, number, sent, .. } = request;
            state.answers.insert(Answer { object, series, number, sent, said });
        }
    }

    fn send(state: &mut State, index: usize) {
        let now = state.now;
        let object = &state.objects[index];
        let series = (index as u8, object.series);
        let (number, what) = match object.phase {
            Phase::Entering(_) => {
                (object.number, What::Enter { hold: object.hold, fresh: (index as u8, object.number) })
            }
            Phase::Leaving(_) => match (object.hold, object.inside.last()) {
                (Some(hold), Some(&(_, enter))) => (object.number, What::Leave { hold, enter }),
                _ => return,
            },
            Phase::Undoing(_) => (object.number + 1, What::Undo { enter: object.number }),
            Phase::Resting => return,
        };
        state.requests.insert(Request { object: index as u8, series, number, sent: now, what });
    }

    fn deliver(state: &mut State, answer: Answer) {
        let index = answer.object as usize;
        let object = &mut state.objects[index];
        let awaited = object.number + u8::from(matches!(object.phase, Phase::Undoing(_)));
        if (answer.series.1, answer.number) != (object.series, awaited) {
            // Answers belong to one step, and are dropped for any other.
            return;
        }
        match (object.phase, answer.said) {
            (Phase::Entering(_), Said::Entered(hold)) => {
                if object.hold.is_some_and(|held| held != hold) || answer.sent + EXPIRE <= state.now {
                    // The former hold is gone, or the grant is late: this step is taken back.
                    if object.hold.is_some_and(|held| held != hold) {
                        object.has_lost();
                    }
                    object.phase = Phase::Undoing(0);
                    return;
                }
                (object.hold, object.phase) = (Some(hold), Phase::Resting);
                object.inside.push((object.series, object.number));
                object.deadline = object.deadline.max(answer.sent + EXPIRE);
            }
            (Phase::Leaving(_), Said::Left) => {
                object.inside.pop();
                object.settled.push(object.series);
                if object.inside.is_empty() {
                    object.hold = None;
                }
                object.phase = Phase::Resting;
            }
            (Phase::Leaving(_), Said::NotOurs) => {
                object.has_lost();
                object.phase = Phase::Resting;
            }
            (Phase::Undoing(_), Said::Undone) => {
                object.phase = Phase::Resting;
                // Its series is never used again: something may still come of it.
                object.number += 1;
            }
            _ => {}
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let object = Object {
            phase: Phase::Resting,
            series: 0,
            series_used: 0,
            settled: Vec::new(),
            number: 0,
            steps: 0,
            hold: None,
            inside: Vec::new(),
            deadline: 0,
        };
        vec![State {
            now: 0,
            record: None,
            objects: vec![object; self.steps.len()],
            requests: BTreeSet::new(),
            answers: BTreeSet::new(),
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.now < self.until {
            actions.push(Step::Tick);
        }
        for (index, object) in state.objects.iter().enumerate() {
            match object.phase {
                Phase::Resting => {
                    if object.steps < self.steps[index] {
                        actions.push(Step::Enter(index));
                        if object.depth() > 0 {
                            actions.push(Step::Leave(index));
                        }
                    }
                }
                Phase::Entering(sent) => {
                    if sent < self.sends {
                        actions.push(Step::Again(index));
                    }
                    actions.push(Step::GiveUp(index));
                }
                Phase::Undoing(_)
                    if !self.is(Mutant::UndoTooSoon)
                        && state.requests.iter().any(|request| {
                            // What is given up is awaited first: an answer, or the end of its connection.
                            request.object as usize == index && matches!(request.what, What::Enter { .. })
                        }) => {}
                Phase::Leaving(sent) | Phase::Undoing(sent) if sent < self.sends => actions.push(Step::Again(index)),
                Phase::Leaving(_) | Phase::Undoing(_) => {}
            }
        }
        for &request in &state.requests {
            actions.extend((request.sent..=state.now).map(|arrived| Step::Apply(request, arrived)));
        }
        actions.extend(state.answers.iter().map(|&answer| Step::Deliver(answer)));
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        match step {
            Step::Tick => state.now += 1,
            Step::Enter(index) | Step::Leave(index) => {
                state.objects[index].begin(matches!(step, Step::Enter(_)));
                Protocol::send(&mut state, index);
            }
            Step::Again(index) => {
                let phase = &mut state.objects[index].phase;
                *phase = match *phase {
                    Phase::Entering(sent) => Phase::Entering(sent + 1),
                    Phase::Leaving(sent) => Phase::Leaving(sent + 1),
                    Phase::Undoing(sent) => Phase::Undoing(sent + 1),
                    Phase::Resting => return None,
                };
                Protocol::send(&mut state, index);
            }
            Step::GiveUp(index) => {
                state.objects[index].phase = Phase::Undoing(0);
            }
            Step::Apply(request, arrived) => {
                state.requests.remove(&request);
                self.apply(&mut state, request, arrived);
            }
            Step::Deliver(answer) => {
                state.answers.remove(&answer);
                Protocol::deliver(&mut state, answer);
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("inside its deadline an object's steps are in the record", |_, state: &State| {
                state.objects.iter().all(|object| {
                    let sure = object.depth() > 0 && state.now < object.deadline && object.phase == Phase::Resting;
                    let record = state.record.as_ref();
                    !sure
                        || record
                            .is_some_and(|record| Some(record.hold) == object.hold && record.count >= object.depth())
                })
            }),
            // Never too low, or an unlock would take away what another is in. A late request of a hold
            // that has ended may make it too high until it is cleaned up, or the lease ends (R7).
            Property::always("the count is exact", |protocol: &Protocol, state: &State| {
                let Some(record) = &state.record else { return true };
                let quiet =
                    state.requests.is_empty() && state.objects.iter().all(|object| object.phase == Phase::Resting);
                let inside = state.objects.iter().filter(|object| object.hold == Some(record.hold));
                let depth = inside.map(Object::depth).sum::<i8>();
                let nobody_has_left = state.objects.iter().all(|object| object.number as i8 == object.depth());
                let exact = protocol.sends == 1 || nobody_has_left;
                !quiet || depth == 0 || record.count == depth || (!exact && record.count > depth)
            }),
            Property::sometimes("two objects are in one hold", |_, state: &State| {
                state.record.as_ref().is_some_and(|record| {
                    state.objects.iter().filter(|object| object.hold == Some(record.hold)).count() == 2
                })
            }),
        ]
    }
}

#[cfg(test)]
mod tests {
    use stateright::{Checker, HasDiscoveries};

    use super::*;

    fn protocol<const N: usize>(steps: [u8; N], sends: u8, until: Time, mutant: Option<Mutant>) -> Protocol {
        Protocol { steps: steps.into(), sends, until, mutant }
    }

    fn holds(name: &str, protocol: Protocol) {
        let checker = protocol.checker().threads(2).spawn_bfs().join();
        println!("{name}: {} states", checker.unique_state_count());
        assert!(checker.is_done());
        checker.assert_properties();
    }

    fn fails(property: &'static str, protocol: Protocol) {
        let mutant = protocol.mutant;
        let checker = protocol.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let found = checker.discoveries();
        let Some(path) = found.get(property) else {
            panic!("{mutant:?} does not break {property:?}, but {:?}", found.keys());
        };
        println!("{mutant:?} breaks {property:?} in {} steps", path.clone().into_actions().len());
    }

    const EXACT: &str = "the count is exact";
    const INSIDE: &str = "inside its deadline an object's steps are in the record";

    #[test]
    fn steps_sent_again() {
        holds("reentrant steps sent again", protocol([2, 2], 2, 0, None));
    }

    #[test]
    fn steps_and_expiry() {
        holds("reentrant steps and expiry", protocol([2, 1], 1, 3, None));
    }

    #[test]
    fn without_the_hold() {
        fails(INSIDE, protocol([2, 1], 1, 3, Some(Mutant::WithoutHold)));
    }

    #[test]
    fn without_the_steps_numbers() {
        fails(EXACT, protocol([2, 1], 2, 0, Some(Mutant::WithoutOps)));
    }

    #[test]
    fn with_undoing_too_soon() {
        fails(EXACT, protocol([2, 1], 1, 0, Some(Mutant::UndoTooSoon)));
    }

    /// A hold that ended, and that a late request brings back.
    #[test]
    fn ways_out_that_come_late() {
        holds("reentrant ways out that come late", protocol([4, 1], 2, 0, None));
    }

    #[test]
    fn with_any_way_out() {
        fails(INSIDE, protocol([4, 1], 2, 0, Some(Mutant::AnyWayOut)));
    }
}
