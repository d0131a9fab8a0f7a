//! Reads what workers noted, and finds what must not have happened.

use std::collections::HashMap;
use std::fmt;

/// One line of the notes. Moments are nanoseconds of boot time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A lock call ended, after so long.
    Waited { timeout: u64, waited: u64 },
    /// From here to its deadline, or its release, a holder relies on the lock.
    Granted { hold: u64, fence: u64, from: u64, deadline: u64 },
    /// It read this, and wrote one more; the writing was done inside the deadline, or perhaps not.
    Incremented { hold: u64, read: u64, inside: bool },
    /// It does not rely on the lock any more, and is about to unlock.
    Released { hold: u64, at: u64 },
    /// Unlocking said that it was lost, when the deadline had not come.
    Lost { hold: u64, inside: bool },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Event::Waited { timeout, waited } => write!(f, "waited {timeout} {waited}"),
            Event::Granted { hold, fence, from, deadline } => write!(f, "granted {hold} {fence} {from} {deadline}"),
            Event::Incremented { hold, read, inside } => write!(f, "incremented {hold} {read} {}", u8::from(inside)),
            Event::Released { hold, at } => write!(f, "released {hold} {at}"),
            Event::Lost { hold, inside } => write!(f, "lost {hold} {}", u8::from(inside)),
        }
    }
}

/// The events, line by line. Who is killed while he writes may leave half a line.
pub fn read(text: &str) -> Vec<Event> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let what = words.next()?;
            let numbers: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
            Some(match (what, &numbers[..]) {
                ("waited", &[timeout, waited]) => Event::Waited { timeout, waited },
                ("granted", &[hold, fence, from, deadline]) => Event::Granted { hold, fence, from, deadline },
                ("incremented", &[hold, read, inside]) => Event::Incremented { hold, read, inside: inside == 1 },
                ("released", &[hold, at]) => Event::Released { hold, at },
                ("lost", &[hold, inside]) => Event::Lost { hold, inside: inside == 1 },
                _ => return None,
            })
        })
        .collect()
}

/// What was checked.
#[derive(Debug)]
pub struct Report {
    pub grants: usize,
    pub hand_overs: usize,
    pub increments: usize,
    /// Written, perhaps, after the deadline: what came after them could not be checked.
    pub outside: usize,
    /// Grants whose store gave a fence with them.
    pub fenced: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { grants, hand_overs, increments, outside, fenced } = self;
        write!(
            f,
            "{grants} grants ({fenced} fenced), {hand_overs} hand-overs, {increments} increments, {outside} outside"
        )
    }
}

struct Hold {
    hold: u64,
    fence: u64,
    from: u64,
    /// Until when it was relied on.
    to: u64,
    read: Option<u64>,
    inside: bool,
}

/// Longer than any machine takes to notice that a timeout has passed.
const SLACK: u64 = 20_000_000_000;

/// What is wrong with a history of which `killed` processes noted perhaps not everything they did.
pub fn check(events: &[Event], counter: u64, killed: u64) -> Result<Report, String> {
    let mut holds: Vec<Hold> = Vec::new();
    let mut index: HashMap<u64, usize> = HashMap::new();
    for event in events {
        match *event {
            Event::Granted { hold, fence, from, deadline } => {
                if index.insert(hold, holds.len()).is_some() {
                    return Err(format!("hold {hold} was granted twice"));
                }
                holds.push(Hold { hold, fence, from, to: deadline, read: None, inside: true });
            }
            Event::Incremented { hold, read, inside } => {
                let hold = &mut holds[index[&hold]];
                (hold.read, hold.inside) = (Some(read), inside);
            }
            Event::Released { hold, at } => {
                let hold = &mut holds[index[&hold]];
                hold.to = hold.to.min(at);
            }
            Event::Lost { hold, inside: true } => return Err(format!("hold {hold} was lost inside its deadline")),
            Event::Lost { .. } => {}
            Event::Waited { timeout, waited } if waited > timeout + SLACK => {
                return Err(format!("somebody waited {waited} ns where the timeout was {timeout} ns"));
            }
            Event::Waited { .. } => {}
        }
    }
    holds.sort_by_key(|hold| hold.from);
    let mut report = Report {
        grants: holds.len(),
        hand_overs: 0,
        increments: holds.iter().filter(|hold| hold.read.is_some()).count(),
        outside: holds.iter().filter(|hold| !hold.inside).count(),
        fenced: holds.iter().filter(|hold| hold.fence > 0).count(),
    };
    let (mut until, mut last): (u64, Option<&Hold>) = (0, None);
    let (mut value, mut trusted, mut missing) = (0, true, 0);
    for hold in &holds {
        if hold.from < until {
            let before = last.map_or(0, |last| last.hold);
            return Err(format!("two holders: {} from {}, while {before} was one until {until}", hold.hold, hold.from));
        }
        if let Some(last) = last {
            report.hand_overs += usize::from(last.hold >> 16 != hold.hold >> 16);
            if hold.fence > 0 && hold.fence <= last.fence {
                return Err(format!("fence {} of hold {} after {}", hold.fence, hold.hold, last.fence));
            }
        }
        until = hold.to.max(hold.from);
        last = Some(hold);
        if let Some(read) = hold.read {
            // The killed may have written without noting it.
            if trusted && hold.inside {
                if read < value {
                    return Err(format!("an increment is gone: hold {} read {read} after {value}", hold.hold));
                }
                missing += read - value;
            }
            // Who wrote after his deadline may have written over somebody's number, at any time.
            trusted = hold.inside;
            value = read + 1;
        }
    }
    if missing > killed && report.outside == 0 {
        return Err(format!("{missing} increments that nobody noted, and {killed} processes were killed"));
    }
    if report.outside == 0 && counter < value {
        return Err(format!("an increment is gone: the file says {counter} after {value}"));
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> Vec<Event> {
        let mut events = Vec::new();
        for number in 0..5 {
            let (hold, from) = (number << 16, 100 * number + 10);
            events.extend([
                Event::Waited { timeout: 5, waited: 4 },
                Event::Granted { hold, fence: number + 1, from, deadline: from + 80 },
                Event::Incremented { hold, read: number, inside: true },
                Event::Released { hold, at: from + 20 },
            ]);
        }
        events
    }

    fn wrong(change: impl FnOnce(&mut Vec<Event>), counter: u64, expected: &str) {
        let mut events = history();
        change(&mut events);
        let found = check(&events, counter, 0).expect_err(expected);
        assert!(found.contains(expected), "{found}");
    }

    #[test]
    fn nothing_is_wrong_with_a_good_history_and_its_text() {
        let report = check(&history(), 5, 0).unwrap();
        assert_eq!((report.grants, report.hand_overs, report.increments, report.fenced), (5, 4, 5, 5));
        let text: String = history().iter().map(|event| format!("{event}\n")).collect();
        assert_eq!(read(&text), history());
        assert_eq!(read("granted 1 2 3\nreleased 5 9 \nincrem"), [Event::Released { hold: 5, at: 9 }]);
    }

    #[test]
    fn everything_wrong_is_found() {
        let second = Event::Granted { hold: 1 << 16, fence: 2, from: 29, deadline: 180 };
        wrong(|events| events[5] = second, 5, "two holders");
        // Not released: it may rely on the lock until its deadline.
        wrong(
            |events| {
                events.remove(3);
                events[4] = Event::Granted { hold: 1 << 16, fence: 2, from: 89, deadline: 180 };
            },
            5,
            "two holders",
        );
        let same = Event::Granted { hold: 1 << 16, fence: 1, from: 110, deadline: 180 };
        wrong(|events| events[5] = same, 5, "fence");
        let again = Event::Incremented { hold: 2 << 16, read: 1, inside: true };
        wrong(|events| events[10] = again, 5, "gone");
        wrong(|_| {}, 4, "gone");
        let jump = Event::Incremented { hold: 4 << 16, read: 6, inside: true };
        wrong(|events| events[18] = jump, 7, "nobody noted");
        wrong(|events| events.push(Event::Lost { hold: 1 << 16, inside: true }), 5, "lost inside");
        wrong(|events| events[0] = Event::Waited { timeout: 5, waited: SLACK + 6 }, 5, "waited");
        wrong(|events| events.push(second), 5, "twice");
    }
}
