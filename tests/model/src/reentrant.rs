//! Reentrant locks: R17. Objects that share an owner token, in processes that know nothing of each other.

use crate::Time;
use crate::exploring::*;
use crate::mutant::Mutant;
use crate::protocol::*;

fn objects(clients: &[Limits], ticks: Time) -> Protocol {
    Protocol { ticks, ..protocol(clients) }
}

/// Of the owner token 1.
const OTHER: Limits = Limits { owner: Some(1), ..object(1, 1) };

#[test]
fn steps_sent_again() {
    let objects = objects(&[object(2, 2), object(2, 2)], 0);
    holds("reentrant steps sent again", Protocol { gives_up: false, reads_late_answers: false, ..objects });
}

#[test]
fn steps_given_up() {
    let objects = objects(&[object(2, 2), object(1, 1)], 0);
    holds("reentrant steps given up", Protocol { reads_late_answers: false, ..objects });
}

#[test]
fn late_answers() {
    let objects = objects(&[object(2, 2), object(2, 1)], 0);
    holds("late answers to reentrant steps", Protocol { gives_up: false, ..objects });
}

#[test]
fn steps_and_expiry() {
    holds("reentrant steps and expiry", objects(&[object(2, 1), object(1, 1)], 3));
}

#[test]
fn nested_steps() {
    let objects = objects(&[object(4, 2), object(1, 2)], 0);
    holds("nested steps", Protocol { gives_up: false, reads_late_answers: false, ..objects });
}

#[test]
fn renewals_and_another_owner() {
    let renews = Limits { refreshes: 1, ..object(1, 1) };
    let objects = objects(&[renews, renews, OTHER], 3);
    holds("reentrant renewals and another owner", Protocol { gives_up: false, ..objects });
}

#[test]
fn another_library() {
    let objects = objects(&[object(2, 1), object(1, 1)], 2);
    holds("another library", Protocol { gives_up: false, foreign_steps: 2, ..objects });
}

#[test]
fn doubled_steps() {
    let renews = Limits { refreshes: 1, ..object(1, 1) };
    holds("doubled steps", Protocol { doubled: 1, ..objects(&[renews, object(1, 1)], 2) });
}

/// As of a plain lock: what was given up is removed until nothing can come of it.
fn cleaning() -> Protocol {
    let objects = objects(&[Limits { holds: 1, unlocks: 1, ..object(2, 2) }, object(1, 1)], 2);
    Protocol { reads_late_answers: false, read_at_arrival: false, cleans_again: true, ..objects }
}

#[test]
fn cleaning_up() {
    holds("reentrant clean-up", cleaning());
}

#[test]
fn breaking_what_is_over() {
    let renews = Limits { refreshes: 1, ..object(1, 1) };
    holds("breaking", Protocol { breaks: 1, ..objects(&[renews, OTHER], 3) });
}

#[test]
fn with_a_clean_up_that_is_not_repeated() {
    fails(Mutant::CleansOnce, CLEAN, cleaning());
}

#[test]
fn with_a_clean_up_above_later_steps() {
    fails(Mutant::CleansAboveLaterSteps, OWN, objects(&[object(2, 1), object(1, 1)], 1));
}

#[test]
fn with_writes_over_any_number() {
    fails(Mutant::AnyNumber, OWN, objects(&[object(4, 2), object(1, 1)], 0));
}

#[test]
fn without_the_entries() {
    fails(Mutant::EntriesIgnored, COUNTED, objects(&[object(2, 2), object(1, 1)], 0));
}

#[test]
fn with_entries_that_are_added_to() {
    fails(Mutant::EntryAddedTo, EXACT, objects(&[object(2, 2), object(1, 1)], 0));
}

#[test]
fn with_a_list_that_decides() {
    let protocol = Protocol { foreign_steps: 2, ..objects(&[object(2, 1), object(1, 1)], 0) };
    fails(Mutant::ListDecides, THEIRS, protocol);
}

#[test]
fn with_breaking_that_does_not_compare_the_lease() {
    let renews = Limits { refreshes: 1, ..object(1, 1) };
    fails(Mutant::SeenWithoutTheLease, OWN, Protocol { breaks: 1, ..objects(&[renews, OTHER], 3) });
}

/// A fault that the first form of these functions had: a doubled request makes the hold again without the object that
/// had joined it.
#[test]
fn with_renewals_that_prove_the_owner_alone() {
    let (enters, renews) = (object(1, 1), Limits { refreshes: 1, ..object(1, 1) });
    let protocol = Protocol { gives_up: false, doubled: 1, breaks: 1, ..objects(&[enters, renews], 3) };
    fails(Mutant::RenewsByOwnerAlone, OWN, protocol);
}

/// The same without a doubled request.
#[test]
fn with_one_name_for_all_attempts() {
    let (enters, renews) = (object(1, 2), Limits { refreshes: 1, ..object(1, 1) });
    fails(Mutant::OneNameForAllAttempts, OWN, Protocol { gives_up: false, breaks: 1, ..objects(&[enters, renews], 3) });
}
