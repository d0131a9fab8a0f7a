//! Stores that go back to an earlier state, in a failover or from a backup, and whose clocks step back.
//!
//! What a lock promises then:
//! - A clock that only steps back takes nothing away: leases last longer, and every promise holds.
//! - A store that goes back forgets holds, and brings back others: two clients may be inside their deadlines,
//!   and fences may fall. Of the holds that the store has confirmed *since then*, by a grant or a renewal, one
//!   at most is inside its deadline, the record is its holder's, and it is not lost before.
//! - Nothing is ever changed as a client's own that is another's.

use crate::exploring::*;
use crate::mutant::Mutant;
use crate::protocol::*;

fn restored(clients: &[Limits]) -> Protocol {
    Protocol { goes_back: true, ticks: 3, ..protocol(clients) }
}

#[test]
fn going_back() {
    let renews = Limits { refreshes: 1, ..PASSES };
    holds("a store that goes back", restored(&[renews, KEEPS]));
}

#[test]
fn clock_stepping_back() {
    let renews = Limits { refreshes: 1, ..PASSES };
    holds("a clock that steps back", Protocol { clock_steps: true, ticks: 3, ..protocol(&[renews, KEEPS]) });
}

#[test]
fn with_the_stores_counter_alone() {
    let renews = Limits { refreshes: 1, ..PASSES };
    fails(Mutant::StoresCounterAlone, OURS, restored(&[renews, KEEPS]));
}
