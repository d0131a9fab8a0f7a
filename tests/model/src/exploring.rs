//! How the tests explore.

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::mutant::Mutant;
use crate::protocol::{EXPIRE, Fences, Limits, OP_TIMEOUT, Protocol};

/// Asks once for one hold, and keeps it.
pub const KEEPS: Limits =
    Limits { owner: None, holds: 1, steps: 9, attempts: 1, follow_ups: 1, refreshes: 0, unlocks: 0 };
/// Asks once for one hold, and unlocks.
pub const PASSES: Limits = Limits { unlocks: 1, ..KEEPS };
pub const ASKS_AGAIN: Limits = Limits { attempts: 2, follow_ups: 2, ..PASSES };
pub const RENEWS: Limits = Limits { refreshes: 2, ..KEEPS };
pub const UNLOCKS_AGAIN: Limits = Limits { unlocks: 2, ..KEEPS };
pub const COMES_BACK: Limits = Limits { holds: 2, ..PASSES };

/// An object of the owner token 0 that makes so many steps in and out, and sends each so often.
pub const fn object(steps: u8, sends: u8) -> Limits {
    Limits { owner: Some(0), holds: steps, steps, attempts: sends, follow_ups: 1, refreshes: 0, unlocks: sends }
}

pub fn protocol(clients: &[Limits]) -> Protocol {
    Protocol {
        clients: clients.to_vec(),
        gives_up: true,
        reads_late_answers: true,
        doubled: 0,
        crashes: 0,
        ticks: 4,
        fences: Fences::InTheGrant,
        read_at_arrival: true,
        cleans_again: false,
        goes_back: false,
        clock_steps: false,
        foreign_steps: 0,
        breaks: 0,
        mutant: None,
    }
}

/// Explores all of it.
pub fn holds(name: &str, protocol: Protocol) {
    let bounds = bounds(&protocol);
    let start = Instant::now();
    let checker = protocol.checker().threads(2).spawn_bfs().join();
    println!("{name}: {} states in {:?}; {bounds}", checker.unique_state_count(), start.elapsed());
    assert!(checker.is_done());
    checker.assert_properties();
}

/// Explores until it has found what the mutant does wrong.
pub fn fails(mutant: Mutant, property: &'static str, protocol: Protocol) {
    let start = Instant::now();
    let checker = Protocol { mutant: Some(mutant), ..protocol }
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AllOf([property].into()))
        .spawn_bfs()
        .join();
    let found = checker.discoveries();
    let Some(path) = found.get(property) else {
        panic!("{mutant:?} does not break {property:?}, but {:?}", found.keys());
    };
    let steps = path.clone().into_actions().len();
    println!("{mutant:?} breaks {property:?} in {steps} steps, found in {:?}", start.elapsed());
}

/// What is explored.
fn bounds(protocol: &Protocol) -> String {
    let clients: Vec<String> = protocol
        .clients
        .iter()
        .map(|client| {
            let Limits { holds, steps, attempts, refreshes, unlocks, .. } = client;
            match client.owner {
                None => format!("{holds}/{attempts}/{refreshes}/{unlocks}"),
                Some(owner) => format!("owner {owner} {steps}/{attempts}/{refreshes}/{unlocks}"),
            }
        })
        .collect();
    format!(
        "holds (or steps)/attempts/renewals/unlocks of each client: {}; {} ticks, leases of {EXPIRE}, late after \
         {OP_TIMEOUT}; doubled {}, crashes {}, store goes back {}, clock steps {}, another library's steps {}, breaks {}",
        clients.join(", "),
        protocol.ticks,
        protocol.doubled,
        protocol.crashes,
        u8::from(protocol.goes_back),
        u8::from(protocol.clock_steps),
        protocol.foreign_steps,
        protocol.breaks,
    )
}
