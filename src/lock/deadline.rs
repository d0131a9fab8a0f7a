//! Until when a hold is ours, by our own clock (R4).

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Boottime;
use crate::store::{ClockSteps, Store};

/// When a hold stops being ours, as far as is known: earlier than was thought once the store's clock is seen to have gone
/// ahead of ours.
#[derive(Clone)]
pub struct Deadline {
    end: Boottime,
    /// When the request was sent that the lease is from.
    sent: Boottime,
    steps: Option<Arc<ClockSteps>>,
}

impl Deadline {
    /// One that has passed.
    pub const PASSED: Deadline = Deadline { end: Boottime::ZERO, sent: Boottime::ZERO, steps: None };

    /// That of a lease that was asked for with a request.
    ///
    /// Counted from before the request left: a slow reply must shorten the lease, never stretch it.
    #[inline(always)]
    pub fn of_lease(store: &dyn Store, sent: Boottime, expire: Duration) -> Deadline {
        Deadline::new(store, sent, expire, store.margin(expire))
    }

    /// So long after a request was sent, less the margin.
    #[inline(always)]
    pub fn new(store: &dyn Store, sent: Boottime, left: Duration, margin: Duration) -> Deadline {
        Deadline { end: sent + left - margin, sent, steps: store.clock_steps().cloned() }
    }

    /// As it is known now.
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

    /// How long it is until then.
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
