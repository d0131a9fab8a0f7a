//! The deadline of a hold: until then it is certainly ours, by our own clock (R4).

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Boottime;
use crate::store::{ClockSteps, Store};

/// When a hold stops being certain. It moves to an earlier time when the store's clock is found to be ahead of ours.
#[derive(Clone)]
pub struct Deadline {
    end: Boottime,
    /// When the request that began the lease was sent.
    sent: Boottime,
    steps: Option<Arc<ClockSteps>>,
}

impl Deadline {
    /// A deadline that has passed.
    pub const PASSED: Deadline = Deadline { end: Boottime::ZERO, sent: Boottime::ZERO, steps: None };

    /// The deadline of a lease, from the time its request was sent.
    ///
    /// It is counted from a time before the request was sent: a slow reply must shorten the lease and never extend it.
    #[inline(always)]
    pub fn of_lease(store: &dyn Store, sent: Boottime, expire: Duration) -> Deadline {
        Deadline::new(store, sent, expire, store.margin(expire))
    }

    /// `length` after a request was sent, minus the margin.
    #[inline(always)]
    pub fn new(store: &dyn Store, sent: Boottime, left: Duration, margin: Duration) -> Deadline {
        Deadline { end: sent + left - margin, sent, steps: store.clock_steps().cloned() }
    }

    /// The deadline as it is known now.
    #[inline]
    pub fn moment(&self) -> Boottime {
        match &self.steps {
            None => self.end,
            Some(steps) => self.end - steps.since(self.sent),
        }
    }

    #[inline]
    pub fn has_passed(&self) -> bool {
        self.moment().has_passed()
    }

    /// The time until the deadline.
    pub fn left(&self) -> Duration {
        self.moment().since(Boottime::now())
    }

    pub fn is_before(&self, other: &Deadline) -> bool {
        self.moment() < other.moment()
    }

    pub fn later_of(self, other: Deadline) -> Deadline {
        if self.is_before(&other) { other } else { self }
    }
}
