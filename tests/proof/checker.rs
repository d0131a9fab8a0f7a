//! Reads what workers noted, and finds what must not have happened.

use std::collections::HashMap;
use std::fmt;

/// Which hold of which worker: the worker's number, and the number of the lock call, counted in the order
/// in which the worker's calls were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HoldName {
    pub who: u64,
    pub turn: u64,
}

/// Threads of one process that do not share a line of waiters have numbers of their own: those from one
/// multiple of this up to the next are one process's.
pub const NUMBERS_OF_A_PROCESS: u64 = 8;

impl HoldName {
    pub fn process(self) -> u64 {
        self.who / NUMBERS_OF_A_PROCESS
    }
}

impl fmt::Display for HoldName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.who, self.turn)
    }
}

/// One line of the notes. Moments are nanoseconds of boot time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A lock call ended, with a grant in time or without one.
    Waited { hold: HoldName, asked: u64, timeout: u64, ended: u64 },
    /// From here to its deadline, or its release, a holder relies on the lock. Deadline 0: it knows none, and
    /// is ended before there is one.
    Granted { hold: HoldName, fence: u64, from: u64, deadline: u64 },
    /// It was renewed, and relies on the lock until then.
    Renewed { hold: HoldName, deadline: u64 },
    /// It has read this, and is about to write one more.
    Writing { hold: HoldName, read: u64, at: u64 },
    /// It has written.
    Wrote { hold: HoldName, at: u64 },
    /// It does not rely on the lock any more, and is about to unlock.
    Released { hold: HoldName, at: u64 },
    /// Unlocking has said that it was lost.
    Lost { hold: HoldName, at: u64 },
    /// The director's note: the worker is not there any more.
    Ended { hold: HoldName, at: u64 },
}

impl fmt::Display for Event {
    /// As workers write it, a newline first: what was killed while it wrote may have left half a line. The dot
    /// says that a line is whole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Event::Waited { hold, asked, timeout, ended } => writeln!(f, "\nwaited {hold} {asked} {timeout} {ended} ."),
            Event::Granted { hold, fence, from, deadline } => {
                writeln!(f, "\ngranted {hold} {fence} {from} {deadline} .")
            }
            Event::Renewed { hold, deadline } => writeln!(f, "\nrenewed {hold} {deadline} ."),
            Event::Writing { hold, read, at } => writeln!(f, "\nwriting {hold} {read} {at} ."),
            Event::Wrote { hold, at } => writeln!(f, "\nwrote {hold} {at} ."),
            Event::Released { hold, at } => writeln!(f, "\nreleased {hold} {at} ."),
            Event::Lost { hold, at } => writeln!(f, "\nlost {hold} {at} ."),
            Event::Ended { hold, at } => writeln!(f, "\nended {hold} {at} ."),
        }
    }
}

/// The event of one line; `None` where the line is empty or was cut off.
pub fn event(line: &str) -> Option<Event> {
    let mut words = line.strip_suffix(" .")?.split(' ');
    let what = words.next()?;
    let numbers: Vec<u64> = words.map(|word| word.parse().ok()).collect::<Option<_>>()?;
    let (&who, &turn) = (numbers.first()?, numbers.get(1)?);
    let hold = HoldName { who, turn };
    Some(match (what, &numbers[2..]) {
        ("waited", &[asked, timeout, ended]) => Event::Waited { hold, asked, timeout, ended },
        ("granted", &[fence, from, deadline]) => Event::Granted { hold, fence, from, deadline },
        ("renewed", &[deadline]) => Event::Renewed { hold, deadline },
        ("writing", &[read, at]) => Event::Writing { hold, read, at },
        ("wrote", &[at]) => Event::Wrote { hold, at },
        ("released", &[at]) => Event::Released { hold, at },
        ("lost", &[at]) => Event::Lost { hold, at },
        ("ended", &[at]) => Event::Ended { hold, at },
        _ => return None,
    })
}

/// What was checked.
#[derive(Debug, Default)]
pub struct Report {
    pub grants: usize,
    /// To another process than the one before.
    pub hand_overs: usize,
    pub increments: usize,
    /// Cut off by a kill: written or not.
    pub unfinished: usize,
    /// Written, perhaps, after the deadline: the numbers that were read meanwhile say nothing.
    pub late: usize,
    /// Grants whose store gave a fence.
    pub fenced: usize,
    /// By how much the longest wait exceeded its timeout, in nanoseconds.
    pub overstay: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { grants, hand_overs, increments, unfinished, late, fenced, overstay } = self;
        write!(
            f,
            "{grants} grants ({fenced} fenced), {hand_overs} hand-overs, {increments} increments, {unfinished} cut off, \
             {late} late; at most {} ms beyond a timeout",
            overstay / 1_000_000
        )
    }
}

struct Hold {
    name: HoldName,
    fence: u64,
    from: u64,
    deadline: u64,
    released: Option<u64>,
    write: Option<Write>,
}

struct Write {
    read: u64,
    before: u64,
    after: Option<u64>,
}

impl Hold {
    /// Until when it was relied on.
    fn to(&self) -> u64 {
        let seen = self.write.as_ref().map_or(self.from, |write| write.after.unwrap_or(write.before));
        match (self.deadline, self.released) {
            (0, released) => released.unwrap_or(seen),
            (deadline, released) => released.map_or(deadline, |at| at.min(deadline)).max(self.from),
        }
    }

    /// When it may have written after its deadline.
    fn late(&self, ended: &HashMap<u64, u64>) -> Option<(u64, u64)> {
        let write = self.write.as_ref().filter(|_| self.deadline > 0)?;
        let end = write.after.or(ended.get(&self.name.process()).copied()).unwrap_or(u64::MAX);
        (end > self.deadline).then_some((write.before.max(self.deadline), end))
    }
}

/// Longer than any machine takes to notice that a timeout has passed.
const SLACK: u64 = 60_000_000_000;

/// What is wrong with a history that left this number in the file; `None` while it goes on.
pub fn check(events: &[Event], counter: Option<u64>) -> Result<Report, String> {
    let mut holds: Vec<Hold> = Vec::new();
    let mut index: HashMap<HoldName, usize> = HashMap::new();
    let mut ended: HashMap<u64, u64> = HashMap::new();
    let mut report = Report::default();
    for event in events {
        match *event {
            Event::Granted { hold: name, fence, from, deadline } => {
                if index.insert(name, holds.len()).is_some() {
                    return Err(format!("hold {name} was granted twice"));
                }
                holds.push(Hold { name, fence, from, deadline, released: None, write: None });
            }
            Event::Ended { hold, at } => {
                ended.insert(hold.process(), at);
            }
            Event::Waited { hold, asked, timeout, ended } => {
                let overstay = (ended - asked).saturating_sub(timeout);
                report.overstay = report.overstay.max(overstay);
                if overstay > SLACK {
                    return Err(format!("{hold} waited for {} ns where the timeout was {timeout} ns", ended - asked));
                }
            }
            Event::Renewed { hold: name, .. }
            | Event::Writing { hold: name, .. }
            | Event::Wrote { hold: name, .. }
            | Event::Released { hold: name, .. }
            | Event::Lost { hold: name, .. } => {
                let at = index.get(&name).ok_or_else(|| format!("{event:?} of a hold that was not granted"))?;
                let hold = &mut holds[*at];
                match *event {
                    Event::Renewed { deadline, .. } => hold.deadline = hold.deadline.max(deadline),
                    Event::Writing { read, at, .. } => hold.write = Some(Write { read, before: at, after: None }),
                    Event::Released { at, .. } => hold.released = Some(at),
                    Event::Lost { at, .. } if at < hold.deadline => {
                        return Err(format!("hold {name} was lost at {at}, inside its deadline {}", hold.deadline));
                    }
                    Event::Wrote { at, .. } => match &mut hold.write {
                        Some(write) => write.after = Some(at),
                        None => return Err(format!("hold {name} wrote what it had not read")),
                    },
                    _ => {}
                }
            }
        }
    }
    holds.sort_by_key(|hold| hold.from);
    one_at_a_time(&holds, &mut report)?;
    nothing_is_gone(&holds, &ended, counter, &mut report)?;
    in_order(events, &holds)?;
    Ok(report)
}

/// No two rely on the lock at once, and fences grow.
fn one_at_a_time(holds: &[Hold], report: &mut Report) -> Result<(), String> {
    report.grants = holds.len();
    let mut fence = 0;
    for (number, hold) in holds.iter().enumerate() {
        if let Some(last) = number.checked_sub(1).map(|number| &holds[number]) {
            if hold.from < last.to() {
                let (name, from) = (hold.name, hold.from);
                return Err(format!(
                    "two holders: {name} from {from}, while {} was one until {}",
                    last.name,
                    last.to()
                ));
            }
            report.hand_overs += usize::from(last.name.process() != hold.name.process());
        }
        if hold.fence > 0 {
            if hold.fence <= fence {
                return Err(format!("fence {} of hold {} after {fence}", hold.fence, hold.name));
            }
            fence = hold.fence;
            report.fenced += 1;
        }
    }
    Ok(())
}

/// Every number that was written is read by the next holder. Only a hold that was cut off while it wrote leaves
/// two possibilities, and only one that wrote after its deadline may have written over others' numbers.
fn nothing_is_gone(
    holds: &[Hold],
    ended: &HashMap<u64, u64>,
    counter: Option<u64>,
    report: &mut Report,
) -> Result<(), String> {
    let late: Vec<(u64, u64)> = holds.iter().filter_map(|hold| hold.late(ended)).collect();
    report.late = late.len();
    // The number that is there, and whether there may be one more; since when.
    let (mut value, mut perhaps, mut since) = (0, false, 0);
    let agrees = |who: fmt::Arguments<'_>, read: u64, since: u64, until: u64, value: u64, perhaps: bool| {
        if read == value
            || (perhaps && read == value + 1)
            || late.iter().any(|(from, to)| *from <= until && since <= *to)
        {
            return Ok(());
        }
        Err(match read < value {
            true => format!("an increment is gone: {who} {read} after {value}"),
            false => format!("an increment that nobody noted: {who} {read} after {value}"),
        })
    };
    for hold in holds {
        let Some(Write { read, before, after }) = hold.write else { continue };
        agrees(format_args!("hold {} read", hold.name), read, since, before, value, perhaps)?;
        report.increments += usize::from(after.is_some());
        report.unfinished += usize::from(after.is_none());
        let sure = after.is_some() && hold.late(ended).is_none();
        (value, perhaps, since) = (if sure { read + 1 } else { read }, !sure, before);
    }
    match counter {
        Some(counter) => agrees(format_args!("the file says"), counter, since, u64::MAX, value, perhaps),
        None => Ok(()),
    }
}

/// Waiters in one line are served in the order of asking: nobody relies on the lock while a waiter that had
/// asked before still waited, inside its timeout.
fn in_order(events: &[Event], holds: &[Hold]) -> Result<(), String> {
    let granted: HashMap<HoldName, u64> = holds.iter().map(|hold| (hold.name, hold.from)).collect();
    let mut waits: HashMap<u64, Vec<(u64, u64)>> = HashMap::new();
    for event in events {
        if let Event::Waited { hold, asked, timeout, ended } = *event {
            waits.entry(hold.who).or_default().push((hold.turn, ended.min(asked.saturating_add(timeout))));
        }
    }
    for (who, mut waits) in waits {
        waits.sort_unstable();
        // Who of those before waited longest.
        let mut longest = (0, 0);
        for (turn, until) in waits {
            let name = HoldName { who, turn };
            if let Some(&from) = granted.get(&name)
                && from < longest.1
            {
                return Err(format!("{name} was granted before {from}, while {who} {} waited before it", longest.0));
            }
            if until > longest.1 {
                longest = (turn, until);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u64) -> HoldName {
        HoldName { who: number * NUMBERS_OF_A_PROCESS, turn: 1 }
    }

    const EACH: usize = 5;

    fn history() -> Vec<Event> {
        let mut events = Vec::new();
        for number in 0..5 {
            let (hold, from) = (name(number), 100 * number + 10);
            events.extend([
                Event::Waited { hold, asked: from - 4, timeout: 5, ended: from },
                Event::Granted { hold, fence: number + 1, from, deadline: from + 80 },
                Event::Writing { hold, read: number, at: from + 10 },
                Event::Wrote { hold, at: from + 15 },
                Event::Released { hold, at: from + 20 },
            ]);
        }
        events
    }

    fn wrong(change: impl FnOnce(&mut Vec<Event>), counter: u64, expected: &str) {
        let mut events = history();
        change(&mut events);
        let found = check(&events, Some(counter)).expect_err(expected);
        assert!(found.contains(expected), "{found}");
    }

    fn right(change: impl FnOnce(&mut Vec<Event>), counter: u64) -> Report {
        let mut events = history();
        change(&mut events);
        check(&events, Some(counter)).unwrap()
    }

    #[test]
    fn nothing_is_wrong_with_a_good_history_and_its_text() {
        let report = right(|_| {}, 5);
        assert_eq!((report.grants, report.hand_overs, report.increments, report.fenced), (5, 4, 5, 5));
        let mut all = history();
        all.extend([
            Event::Renewed { hold: name(1), deadline: 9 },
            Event::Lost { hold: name(1), at: 9 },
            Event::Ended { hold: name(1), at: 9 },
        ]);
        let text: String = all.iter().map(Event::to_string).collect();
        assert_eq!(text.lines().filter_map(event).collect::<Vec<_>>(), all);
        assert_eq!(event("granted 8 1 3 4 5"), None);
        assert_eq!(event("granted 8 1 3 4 ."), None);
    }

    #[test]
    fn everything_wrong_is_found() {
        let second = |fence, from| Event::Granted { hold: name(1), fence, from, deadline: 180 };
        wrong(|events| events[EACH + 1] = second(2, 29), 5, "two holders");
        // Not released: it may rely on the lock until its deadline.
        let unreleased = |from| {
            move |events: &mut Vec<Event>| {
                events[EACH + 1] = second(2, from);
                events.remove(EACH - 1);
            }
        };
        wrong(unreleased(89), 5, "two holders");
        right(unreleased(90), 5);
        // Or until that to which it was renewed.
        let renewed = |events: &mut Vec<Event>| {
            unreleased(90)(events);
            events.push(Event::Renewed { hold: name(0), deadline: 91 });
        };
        wrong(renewed, 5, "two holders");
        wrong(|events| events[EACH + 1] = second(1, 110), 5, "fence");
        let again = Event::Writing { hold: name(2), read: 1, at: 220 };
        wrong(|events| events[2 * EACH + 2] = again, 5, "gone");
        wrong(|_| {}, 4, "gone");
        wrong(|_| {}, 6, "nobody noted");
        let jump = Event::Writing { hold: name(4), read: 6, at: 420 };
        wrong(|events| events[4 * EACH + 2] = jump, 7, "nobody noted");
        wrong(|events| events.push(Event::Lost { hold: name(1), at: 150 }), 5, "inside its deadline");
        right(|events| events.push(Event::Lost { hold: name(1), at: 195 }), 5);
        let patient = Event::Waited { hold: name(0), asked: 1, timeout: 5, ended: SLACK + 7 };
        wrong(|events| events[0] = patient, 5, "waited");
        wrong(|events| events.push(second(2, 110)), 5, "twice");
        wrong(|events| events.push(Event::Wrote { hold: name(9), at: 1 }), 5, "not granted");
    }

    /// Without a deadline of its own, a hold is relied on for as long as it was heard of.
    #[test]
    fn a_hold_without_a_deadline() {
        let without = |from| Event::Granted { hold: name(0), fence: 1, from, deadline: 0 };
        right(|events| events[1] = without(10), 5);
        let overlapped = |events: &mut Vec<Event>| {
            events[1] = without(10);
            events[4] = Event::Released { hold: name(0), at: 111 };
        };
        wrong(overlapped, 5, "two holders");
    }

    #[test]
    fn a_write_that_was_cut_off_may_have_been_done() {
        let cut_off = |number: usize| {
            move |events: &mut Vec<Event>| {
                events.drain(number * EACH + 3..number * EACH + 5);
                events.push(Event::Ended { hold: name(number as u64), at: 100 * number as u64 + 50 });
            }
        };
        assert_eq!(right(cut_off(4), 5).unfinished, 1);
        right(cut_off(4), 4);
        wrong(cut_off(4), 6, "nobody noted");
        right(cut_off(2), 5);
        let not_done = |events: &mut Vec<Event>| {
            for number in 3..5 {
                events[number * EACH + 2] =
                    Event::Writing { hold: name(number as u64), read: number as u64 - 1, at: 100 * number as u64 + 20 };
            }
            cut_off(2)(events);
        };
        right(not_done, 4);
        // It was gone before its deadline: it has not written over later numbers.
        wrong(not_done, 3, "gone");
    }

    #[test]
    fn a_late_write_may_have_undone_others_while_it_was_under_way() {
        // It was stopped before it wrote, and 300 was over when it went on.
        let late = |events: &mut Vec<Event>| {
            events[3] = Event::Wrote { hold: name(0), at: 305 };
            events[3 * EACH + 2] = Event::Writing { hold: name(3), read: 1, at: 320 };
            events[4 * EACH + 2] = Event::Writing { hold: name(4), read: 2, at: 420 };
        };
        assert_eq!(right(late, 3).late, 1);
        wrong(late, 2, "gone");
        let after = |events: &mut Vec<Event>| {
            events[3] = Event::Wrote { hold: name(0), at: 205 };
            events[4 * EACH + 2] = Event::Writing { hold: name(4), read: 1, at: 420 };
        };
        wrong(after, 2, "gone");
    }

    #[test]
    fn who_overtakes_in_a_line_is_found() {
        let call = |turn, from: u64, until| {
            let hold = HoldName { who: 80, turn };
            [
                Event::Waited { hold, asked: from, timeout: 1_000, ended: until },
                Event::Granted { hold, fence: 0, from: until, deadline: until + 5 },
            ]
        };
        let served = [call(1, 600, 700), call(2, 610, 710)].concat();
        right(|events| events.extend(&served), 5);
        let overtaken = [call(1, 600, 710), call(2, 610, 700)].concat();
        wrong(|events| events.extend(&overtaken), 5, "waited before it");
        // Its time was up.
        let gave_up = Event::Waited { hold: HoldName { who: 80, turn: 1 }, asked: 600, timeout: 90, ended: 710 };
        right(|events| events.extend([gave_up].iter().chain(&call(2, 610, 700))), 5);
    }
}
