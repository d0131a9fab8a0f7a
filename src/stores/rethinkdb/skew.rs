//! What is known of the servers' clocks, from the times in their answers (R4).

use std::time::Duration;

use super::row::seconds_to_ms;
use crate::clock::{self, Boottime};
use crate::mutex::Mutex;

/// How far a clock may drift from ours between two looks at it, in parts of the time between.
const DRIFT: u64 = 5_000;

/// The bounds of a server's clock minus our boot time, in milliseconds.
///
/// A server reads its clock between our sending and our receiving: that bounds the difference from
/// both sides. Its times are whole milliseconds, so the upper bound lies one further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    pub low: i64,
    pub high: i64,
    at: Boottime,
}

impl Offset {
    pub fn measured(sent: Boottime, received: Boottime, server_seconds: f64) -> Offset {
        let server = seconds_to_ms(server_seconds) as i64;
        Offset { low: server - millis_up(received), high: server - millis(sent) + 1, at: received }
    }

    /// The server's clock at a moment of ours: no later than it shows then.
    pub fn earliest(&self, at: Boottime) -> i64 {
        millis(at).saturating_add(self.low)
    }

    /// What both say together; the newer one alone when they contradict each other: the clock was set.
    fn and(self, newer: Offset) -> Offset {
        let slack = (newer.at.since(self.at).as_millis() as u64).div_ceil(DRIFT) as i64;
        let both =
            Offset { low: newer.low.max(self.low - slack), high: newer.high.min(self.high + slack), at: newer.at };
        if both.low <= both.high { both } else { newer }
    }

    fn middle(&self) -> i64 {
        self.low + (self.high - self.low) / 2
    }
}

fn millis(at: Boottime) -> i64 {
    (at.as_nanos() / 1_000_000).min(i64::MAX as u64 / 4) as i64
}

fn millis_up(at: Boottime) -> i64 {
    millis(at) + 1
}

/// The clocks of all servers that this store has talked to.
pub struct Clocks {
    allowed: Duration,
    known: Mutex<Vec<Known>>,
}

struct Known {
    server: String,
    offset: Offset,
    warned: bool,
}

impl Clocks {
    pub fn new(allowed: Duration) -> Clocks {
        Clocks { allowed, known: Mutex::default() }
    }

    /// Notes a time that a server answered with; answers what is known of its clock now.
    pub fn observe(&self, server: &str, sent: Boottime, received: Boottime, seconds: f64) -> Offset {
        let measured = Offset::measured(sent, received, seconds);
        let mut known = self.known.lock();
        let index = match known.iter().position(|known| known.server == server) {
            Some(index) => {
                let before = known[index].offset;
                known[index].offset = before.and(measured);
                let moved = apart(&before, &measured);
                if moved > self.allowed {
                    tracing::warn!(
                        "the clock of RethinkDB server {server} was set by {moved:?} or more: leases may have ended early or late"
                    );
                }
                index
            }
            None => {
                known.push(Known { server: server.to_string(), offset: measured, warned: false });
                known.len() - 1
            }
        };
        let offset = known[index].offset;
        if known.len() > 1 {
            let (furthest, distance) = known
                .iter()
                .filter(|other| other.server != server)
                .map(|other| (other.server.clone(), apart(&other.offset, &offset)))
                .max_by_key(|(_, distance)| *distance)
                .unwrap_or_default();
            if distance > self.allowed && !known[index].warned {
                known[index].warned = true;
                tracing::warn!(
                    "the clocks of RethinkDB servers {server} and {furthest} are {distance:?} apart, and skew= allows \
                     {:?}: leases are counted shorter by that much; set the servers' clocks",
                    self.allowed
                );
            }
        }
        offset
    }

    /// The most that the clocks of two servers are known to differ.
    pub fn measured(&self) -> Duration {
        let known = self.known.lock();
        let pairs = known.iter().enumerate().flat_map(|(i, one)| known[..i].iter().map(move |other| (one, other)));
        pairs.map(|(one, other)| apart(&one.offset, &other.offset)).max().unwrap_or_default()
    }

    /// How much earlier than the servers a holder counts its lease as over (R4).
    pub fn margin(&self, expire: Duration) -> Duration {
        // A server's times are whole milliseconds, and so is what it adds to them.
        let margin = Duration::from_millis(2) + expire / 100 + self.measured().max(self.allowed);
        margin.min(expire / 2)
    }

    /// How far a server's clock is before our wall clock, in milliseconds.
    pub fn ahead_of_ours(&self, server: &str) -> Option<i64> {
        let known = self.known.lock();
        let offset = known.iter().find(|known| known.server == server)?.offset;
        Some(millis(Boottime::now()) + offset.middle() - clock::wall_millis() as i64)
    }
}

/// How far apart two clocks are at least.
fn apart(one: &Offset, other: &Offset) -> Duration {
    let distance = (one.low - other.high).max(other.low - one.high).max(0);
    Duration::from_millis(distance as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Boottime {
        Boottime::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn an_offset_is_bounded_by_sending_and_receiving() {
        let offset = Offset::measured(at(1000), at(1010), 50.0);
        assert_eq!((offset.low, offset.high), (50_000 - 1011, 50_000 - 1000 + 1));
        assert_eq!(offset.earliest(at(2000)), 50_989);
        // A quicker answer narrows it, a slower one does not widen it.
        let narrower = offset.and(Offset::measured(at(1100), at(1101), 50.095));
        assert_eq!((narrower.low, narrower.high), (48_993, 48_996));
        assert_eq!(narrower.and(Offset::measured(at(1200), at(1400), 50.25)).high, 48_997);
        // A clock that was set is believed.
        let set = narrower.and(Offset::measured(at(1500), at(1501), 20.0));
        assert_eq!(set.high, 18_501);
    }

    #[test]
    fn skew_between_servers_widens_the_margin() {
        let clocks = Clocks::new(Duration::from_millis(250));
        let minute = Duration::from_secs(60);
        assert_eq!(clocks.margin(minute), Duration::from_millis(852));
        clocks.observe("a", at(1000), at(1001), 10.0);
        clocks.observe("b", at(1000), at(1001), 11.0);
        assert_eq!(clocks.measured(), Duration::from_millis(997));
        assert_eq!(clocks.margin(minute), Duration::from_millis(602 + 997));
        assert_eq!(clocks.margin(Duration::from_millis(100)), Duration::from_millis(50));
    }
}
