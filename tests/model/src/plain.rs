//! Plain locks: R1 to R8, and R18.

use crate::exploring::*;
use crate::mutant::Mutant;
use crate::protocol::*;

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

/// Without renewals: a create that a network applies a second time, after the lease has run out and the record has
/// gone, brings the hold back, and an overdue renewal takes it for its own. It is then one holder's, in two pieces.
/// The library sends no create twice.
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
    holds("three clients", Protocol { ticks: 3, ..protocol(&[PASSES, KEEPS, KEEPS]) });
}

#[test]
fn fences_after_the_grant() {
    holds("fences after the grant", Protocol { fences: Fences::AfterTheGrant, ..protocol(&[KEEPS, KEEPS]) });
}

/// Where the clock is read when a change is applied, a clean-up that was repeated leaves nothing.
fn cleaning(clients: &[Limits]) -> Protocol {
    Protocol { read_at_arrival: false, cleans_again: true, ticks: 3, ..protocol(clients) }
}

#[test]
fn cleaning_up() {
    holds("cleaning up", cleaning(&[ASKS_AGAIN, KEEPS]));
}

#[test]
fn with_a_clean_up_that_is_not_repeated() {
    fails(Mutant::CleansOnce, CLEAN, cleaning(&[ASKS_AGAIN, KEEPS]));
}

#[test]
fn with_requests_that_do_not_know_their_hold() {
    fails(Mutant::DoesNotKnowItself, NOT_ITSELF, protocol(&[ASKS_AGAIN, PASSES]));
}

#[test]
fn with_one_token_for_all_attempts() {
    let both = Limits { refreshes: 1, ..ASKS_AGAIN };
    fails(Mutant::OneTokenForAllAttempts, PIECE, Protocol { gives_up: false, ..protocol(&[both, PASSES]) });
}

#[test]
fn with_writes_over_any_number() {
    fails(Mutant::AnyNumber, OWN, protocol(&[RENEWS, KEEPS]));
}

#[test]
fn with_attempts_that_are_never_too_late() {
    fails(Mutant::NoNotAfter, BOUNDED, protocol(&[PASSES, PASSES]));
}

#[test]
fn with_the_deadline_from_the_reply() {
    fails(Mutant::DeadlineFromReply, OWN, protocol(&[KEEPS, KEEPS]));
}

#[test]
fn with_late_grants() {
    fails(Mutant::LateGrantCounts, FENCES, protocol(&[KEEPS, KEEPS]));
}

#[test]
fn with_take_overs_that_the_store_does_not_check() {
    fails(Mutant::OverByEstimate, OWN, Protocol { ticks: 5, ..protocol(&[KEEPS, KEEPS]) });
}

#[test]
fn with_unlocks_that_show_no_token() {
    fails(Mutant::UnlockWithoutToken, OWN, protocol(&[PASSES, PASSES]));
}

#[test]
fn with_unlocks_judged_by_the_retry() {
    fails(Mutant::UnlockJudgedByRetry, NOT_LOST, protocol(&[UNLOCKS_AGAIN, PASSES]));
}

#[test]
fn with_absence_taken_from_a_read() {
    fails(Mutant::AbsenceFromARead, NOT_LOST, protocol(&[KEEPS, KEEPS]));
}

#[test]
fn with_fences_that_are_not_proven() {
    let after = Protocol { fences: Fences::AfterTheGrant, ..protocol(&[KEEPS, KEEPS]) };
    fails(Mutant::FenceWithoutProof, OWN, after);
}

#[test]
fn one_holder_is_what_all_this_is_about() {
    fails(Mutant::DeadlineFromReply, ONE, protocol(&[KEEPS, KEEPS]));
}
