//! What is known of the servers' clocks, from the times in their answers (R4).

use std::sync::Arc;
use std::time::Duration;

use crate::clock::{self, Boottime};
use crate::store::ClockSteps;
use crate::sys::mutex::Mutex;

/// How far a clock may drift from ours between two looks at it, in parts of the time between.
const DRIFT: u64 = 5_000;

/// What times in whole milliseconds hide.
const ROUNDING: Duration = Duration::from_millis(2);

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
    pub fn measured(sent: Boottime, received: Boottime, server_ms: u64) -> Offset {
        let server = server_ms.min(i64::MAX as u64 / 4) as i64;
        Offset { low: server - millis_up(received), high: server - millis(sent) + 1, at: received }
    }

    /// The server's clock at a moment of ours: no later than it shows then.
    pub fn earliest(&self, at: Boottime) -> i64 {
        millis(at).saturating_add(self.low)
    }

    /// The server's clock at a moment of ours after which a change takes nothing, to be sent now.
    pub fn deadline(&self, not_after: Boottime) -> i64 {
        self.aged(Boottime::now()).earliest(not_after)
    }

    /// What can still be said at a later moment, our clock and the server's having drifted since.
    fn aged(self, at: Boottime) -> Offset {
        let slack = (at.since(self.at).as_millis() as u64).div_ceil(DRIFT) as i64;
        Offset { low: self.low - slack, high: self.high + slack, at: at.max(self.at) }
    }

    /// What both say together; `None` when they contradict each other: the clock was set.
    fn and(self, newer: Offset) -> Option<Offset> {
        let aged = self.aged(newer.at);
        let both = Offset { low: newer.low.max(aged.low), high: newer.high.min(aged.high), at: newer.at };
        (both.low <= both.high).then_some(both)
    }

    /// How far a clock went ahead between this and what was measured later: at least, and at most. `None` where it did not,
    /// or no further than the margin has room for drift (`expire / 100`).
    fn step_to(&self, newer: &Offset) -> Option<(Duration, Duration)> {
        let aged = self.aged(newer.at);
        let millis = |count: i64| Duration::from_millis(count.max(0) as u64);
        let least = millis(newer.low - aged.high);
        let drift = ROUNDING + newer.at.since(self.at) / 100;
        (least > drift).then(|| (least, millis(newer.high - aged.low)))
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
    /// Whose servers they are, for messages.
    engine: &'static str,
    allowed: Duration,
    known: Mutex<Known>,
    /// When they were seen to go ahead of ours.
    pub steps: Arc<ClockSteps>,
}

struct Known {
    servers: Vec<Server>,
    /// The most that two servers' clocks were seen to differ, since a clock was last seen to be set. What was
    /// seen of a server that is left grows old, and says less and less; its clock is not better for that.
    furthest: Duration,
    /// When the last request was sent whose answer was noted.
    last_sent: Boottime,
}

impl Known {
    fn new() -> Known {
        Known { servers: Vec::new(), furthest: Duration::ZERO, last_sent: Boottime::ZERO }
    }
}

struct Server {
    id: String,
    name: String,
    offset: Offset,
    /// When the request was sent that showed that the clock is another than before. Answers to earlier ones may still tell
    /// of the clock as it was.
    another_since: Boottime,
    warned: bool,
}

impl Clocks {
    /// `allowed`: how far two servers' clocks may be apart, the URL's `skew`.
    pub fn new(engine: &'static str, allowed: Duration) -> Clocks {
        Clocks { engine, allowed, known: Mutex::new(Known::new()), steps: Arc::default() }
    }

    /// Notes a time that a server answered with, in milliseconds since 1970; answers what is known of its clock now.
    pub fn observe(&self, id: &str, name: &str, sent: Boottime, received: Boottime, server_ms: u64) -> Offset {
        let measured = Offset::measured(sent, received, server_ms);
        let mut known = self.known.lock();
        let Known { servers, furthest, last_sent } = &mut *known;
        let index = match servers.iter().position(|known| known.id == id) {
            Some(index) => {
                let server = &mut servers[index];
                let before = server.offset;
                match before.aged(measured.at).and(measured) {
                    Some(both) => server.offset = both,
                    None if sent <= server.another_since => {
                        self.steps.reach(sent);
                        return before;
                    }
                    None => {
                        (server.offset, server.another_since) = (measured, sent);
                        *furthest = Duration::ZERO;
                        self.moved(name, &before, &measured, *last_sent, servers);
                        servers[index].offset = measured;
                    }
                }
                index
            }
            None => {
                servers.push(Server {
                    id: id.to_string(),
                    name: name.to_string(),
                    offset: measured,
                    another_since: Boottime::ZERO,
                    warned: false,
                });
                servers.len() - 1
            }
        };
        *last_sent = sent.max(*last_sent);
        let offset = servers[index].offset;
        let others = servers.iter().enumerate().filter(|(other, _)| *other != index);
        let distances = others.map(|(other, known)| (other, apart(&known.offset.aged(offset.at), &offset)));
        if let Some((other, distance)) = distances.max_by_key(|(_, distance)| *distance) {
            *furthest = (*furthest).max(distance);
            if distance > self.allowed && !servers[index].warned {
                servers[index].warned = true;
                tracing::warn!(
                    "the clocks of {} servers {name} and {} are {distance:?} apart, and skew= allows \
                     {:?}: leases are counted as shorter by that much; synchronise the servers' clocks",
                    self.engine,
                    servers[other].name,
                    self.allowed
                );
            }
        }
        offset
    }

    /// A server's clock is another than before. If it went ahead, that may have been our clock that stood still, while the
    /// host of this virtual machine had it paused, and leases end sooner than was counted.
    fn moved(&self, name: &str, before: &Offset, now: &Offset, last_sent: Boottime, servers: &mut [Server]) {
        let engine = self.engine;
        if let Some((least, most)) = before.step_to(now) {
            // Requests that were sent until then were answered before it.
            self.steps.note(last_sent, most);
            // Then the other servers' clocks are ahead by as much, which is not to be counted again.
            servers.iter_mut().for_each(|server| server.offset.high += most.as_millis() as i64);
            if least > self.allowed {
                tracing::warn!(
                    "the clock of {engine} server {name} went ahead of ours by {least:?} or more: either this machine was \
                     paused for that long, or the server's clock was set forward; held locks count as ending {most:?} sooner"
                );
            }
        } else if apart(before, now) > self.allowed {
            tracing::warn!(
                "the clock of {engine} server {name} was set back by {:?} or more: leases may end late",
                apart(before, now)
            );
        }
    }

    /// The most that the clocks of two servers are known to differ.
    pub fn measured(&self) -> Duration {
        self.known.lock().furthest
    }

    /// How much earlier than the servers a holder counts its lease as over (R4).
    pub fn margin(&self, expire: Duration) -> Duration {
        // A server's times are whole milliseconds, and so is what it adds to them.
        let margin = ROUNDING + expire / 100 + self.measured().max(self.allowed);
        margin.min(expire / 2)
    }

    /// How far a server's clock is before our wall clock, in milliseconds.
    pub fn ahead_of_ours(&self, id: &str) -> Option<i64> {
        let known = self.known.lock();
        let offset = known.servers.iter().find(|known| known.id == id)?.offset;
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
        let offset = Offset::measured(at(1000), at(1010), 50_000);
        assert_eq!((offset.low, offset.high), (50_000 - 1011, 50_000 - 1000 + 1));
        assert_eq!(offset.earliest(at(2000)), 50_989);
        // A quicker answer narrows it, a slower one does not widen it.
        let narrower = offset.and(Offset::measured(at(1100), at(1101), 50_095)).unwrap();
        assert_eq!((narrower.low, narrower.high), (48_993, 48_996));
        assert_eq!(narrower.and(Offset::measured(at(1200), at(1400), 50_250)).unwrap().high, 48_997);
        // A clock that was set contradicts what was known of it.
        assert_eq!(narrower.and(Offset::measured(at(1500), at(1501), 20_000)), None);
    }

    #[test]
    fn skew_between_servers_widens_the_margin() {
        let clocks = Clocks::new("RethinkDB", Duration::from_millis(250));
        let minute = Duration::from_secs(60);
        assert_eq!(clocks.margin(minute), Duration::from_millis(852));
        clocks.observe("a", "a", at(1000), at(1001), 10_000);
        clocks.observe("b", "b", at(1000), at(1001), 11_000);
        assert_eq!(clocks.measured(), Duration::from_millis(997));
        assert_eq!(clocks.margin(minute), Duration::from_millis(602 + 997));
        assert_eq!(clocks.margin(Duration::from_millis(100)), Duration::from_millis(50));
    }

    /// Our own clock may drift from the servers', which agree with each other: what was seen of a server days ago
    /// must not be held against one that is seen now.
    #[test]
    fn a_server_left_long_ago_says_little() {
        let clocks = Clocks::new("RethinkDB", Duration::from_millis(250));
        clocks.observe("a", "a", at(1000), at(1001), 10_000);
        // Ten days, in which our clock went 50 parts in a million slower: 43 s.
        let days = 10 * 24 * 60 * 60 * 1000;
        let by_the_server = days + days / 20_000;
        clocks.observe("b", "b", at(1000 + days), at(1001 + days), 10_000 + by_the_server);
        assert_eq!(clocks.measured(), Duration::ZERO);
    }

    /// A machine that was paused by its host, whose clock stood still: the servers' clocks are ahead, all by as much.
    #[test]
    fn a_pause_of_this_machine_is_counted_once() {
        let clocks = Clocks::new("RethinkDB", Duration::from_millis(250));
        clocks.observe("a", "a", at(1000), at(1001), 10_000);
        clocks.observe("b", "b", at(1010), at(1011), 10_010);
        // 30 s, between 1015 and 1020 of ours.
        clocks.observe("a", "a", at(1020), at(1021), 40_020);
        let counted = clocks.steps.since(at(1010));
        assert!((30_000..30_005).contains(&counted.as_millis()), "{counted:?}");
        assert_eq!(
            clocks.steps.since(at(1014)),
            Duration::ZERO,
            "as far as is known, it was asked for after the pause"
        );
        // It was answered before, and the answer comes now.
        assert_eq!(clocks.observe("a", "a", at(1014), at(1022), 10_014).low, 38_998);
        assert_eq!(clocks.steps.since(at(1014)), counted);
        assert_eq!(clocks.steps.since(at(1020)), Duration::ZERO, "what was asked for since is as the server says");
        clocks.observe("b", "b", at(1030), at(1031), 40_030);
        clocks.observe("a", "a", at(1040), at(1041), 40_040);
        assert_eq!(clocks.steps.since(at(1014)), counted);
        assert_eq!(clocks.steps.since(at(1020)), Duration::ZERO);
        assert_eq!(clocks.measured(), Duration::ZERO);
    }

    #[test]
    fn only_what_goes_ahead_by_more_than_drift_is_a_step() {
        let after = |moved: i64| {
            let clocks = Clocks::new("Redis", Duration::ZERO);
            clocks.observe("a", "a", at(100_000), at(100_001), 1_000_000);
            clocks.observe("a", "a", at(200_000), at(200_001), (1_100_000 + moved) as u64);
            clocks.steps.since(at(100_000)).as_millis()
        };
        assert_eq!(after(-5_000), 0, "leases end late by that, and not early");
        // 100 s, of which the margin leaves a hundredth for drift.
        assert_eq!(after(1_000), 0);
        assert!((2_000..2_050).contains(&after(2_000)), "{}", after(2_000));
    }

    /// What was seen while it was fresh stays, until the clock is seen to be another.
    #[test]
    fn a_skew_is_remembered_until_a_clock_is_set() {
        let clocks = Clocks::new("RethinkDB", Duration::from_millis(250));
        clocks.observe("a", "a", at(1000), at(1001), 10_000);
        clocks.observe("b", "b", at(1000), at(1001), 11_000);
        let hour = 60 * 60 * 1000;
        for later in (1..=5).map(|hours| hours * hour) {
            clocks.observe("b", "b", at(1000 + later), at(1001 + later), 11_000 + later);
        }
        assert_eq!(clocks.measured(), Duration::from_millis(997));
        // b is set to what a has: nothing is left of the difference.
        let later = 6 * hour;
        clocks.observe("b", "b", at(1000 + later), at(1001 + later), 10_000 + later);
        clocks.observe("a", "a", at(1000 + later), at(1001 + later), 10_000 + later);
        assert_eq!(clocks.measured(), Duration::ZERO);
    }
}
