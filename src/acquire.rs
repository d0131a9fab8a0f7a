//! Asking for a grant, and waiting for it (R9 to R11).

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::backoff::Backoff;
use crate::claimant::{Claimant, Flight, Settled};
use crate::client::{Client, unanswered};
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::lock::{Acquiring, Refused, Shared, lost};
use crate::options::{IfHeld, LockOptions, Timeout};
use crate::queue::{KeyPlace, Place};
use crate::runtime::{self, sleep_until};
use crate::store::{Answer, Change, JUST_AFTER, StoreErrorKind};
use crate::token::HoldId;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    OneTry,
    Timeout,
}

/// Asks for a grant: the hold that was granted, or `None`.
pub(crate) fn acquire(shared: &Arc<Shared>, options: LockOptions, patience: Patience) -> Answer<Option<HoldId>, Error> {
    match begin(shared, options, patience) {
        Ok(answer) => answer,
        Err(error) => Answer::Now(Err(error)),
    }
}

fn begin(shared: &Arc<Shared>, call: LockOptions, patience: Patience) -> Result<Answer<Option<HoldId>, Error>, Error> {
    let options = shared.effective(call)?;
    let start = Boottime::now();
    let timeout = match patience {
        Patience::OneTry => Timeout::NoWait,
        Patience::Timeout => options.timeout.unwrap_or(Timeout::NoWait),
    };
    let wanted = Wanted { options, waits: timeout != Timeout::NoWait, start, timeout_at: timeout.from(start) };

    // The calls on one reentrant object take turns; those on a shared plain one do when asked to.
    let takes_turns = shared.owner.is_some() || options.if_held == Some(IfHeld::Wait);
    if !takes_turns || shared.sharing().line.is_empty() {
        match shared.begin_acquire() {
            Ok(acquiring) => return contend(acquiring, wanted, start),
            Err(Refused::Busy(_)) if takes_turns => {}
            Err(refused) => return Err(refused.into()),
        }
    }
    shared.client.check_open()?;
    if !wanted.waits && shared.owner.is_none() {
        return Ok(Answer::Now(Ok(None)));
    }
    runtime::handle()?;
    let turn = shared.sharing().line.join();
    Ok(Answer::later(in_turn(Arc::clone(shared), turn, wanted)))
}

/// What a caller asked for.
#[derive(Clone, Copy)]
struct Wanted {
    options: LockOptions,
    waits: bool,
    start: Boottime,
    timeout_at: Boottime,
}

/// Waits until this call may use the lock object, then asks for the lock.
async fn in_turn(shared: Arc<Shared>, turn: Place, wanted: Wanted) -> Result<Option<HoldId>, Error> {
    let limit = match wanted.waits {
        true => wanted.timeout_at,
        false => wanted.start + shared.client.options().op_timeout,
    };
    match bounded(&shared.client, limit, shared.turn(turn, Shared::begin_acquire)).await {
        Ended::Done(acquiring) => contend(acquiring?, wanted, Boottime::now())?.get().await,
        Ended::TimeUp => Ok(None),
        Ended::Closed => Err(closed()),
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Cancelled, "the client was closed while the call waited")
}

/// Asks the store; at once where it answers at once.
fn contend(acquiring: Acquiring, wanted: Wanted, now: Boottime) -> Result<Answer<Option<HoldId>, Error>, Error> {
    let open = Arc::clone(acquiring.shared().client.open_store()?);
    let queued = acquiring.shared().owner.is_none() && wanted.waits;
    let hash = acquiring.shared().key.hash();
    if wanted.options.auto_refresh == Some(true) {
        // A hold that nobody can renew is not what was asked for.
        open.keeper.start()?;
    }
    let mut claimant = Claimant::new(acquiring, Arc::clone(&open), &wanted.options)?;
    let mut place = None;
    if queued && (!open.queue.is_empty(hash) || open.queue.deferred_until(hash).is_some()) {
        place = Some(open.queue.join(hash));
    } else {
        let flight = claimant.send(now);
        match flight.answer {
            Answer::Now(result) => match claimant.settle(flight.sent, flight.n, result) {
                Settled::Granted(hold) => return Ok(Answer::Now(claimant.done(hold))),
                Settled::Held(_) if !wanted.waits => return Ok(Answer::Now(Ok(None))),
                Settled::Failed(error) if !error.may_pass() => return Ok(Answer::Now(Err(error.into()))),
                settled => claimant.settled = Some(settled),
            },
            answer => claimant.flight = Some(Flight { answer, ..flight }),
        }
        if queued {
            place = Some(open.queue.join(hash));
        }
    }
    runtime::handle()?;
    Ok(match wanted.waits {
        true => match &place {
            Some(in_line) => {
                let moving = in_line.ticket();
                Answer::later(moving.while_waiting(wait_for_grant(claimant, place, wanted.timeout_at)))
            }
            None => Answer::later(wait_for_grant(claimant, None, wanted.timeout_at)),
        },
        false => Answer::later(one_try(claimant, wanted.start)),
    })
}

/// A single try, bounded by `op_timeout`: sent again only when an answer was lost.
async fn one_try(mut claimant: Claimant, start: Boottime) -> Result<Option<HoldId>, Error> {
    let limit = start + claimant.shared().client.options().op_timeout;
    loop {
        match claimant.attempt(limit).await {
            Settled::Granted(hold) => return claimant.done(hold),
            Settled::Held(_) => return Ok(None),
            Settled::Lost => return Err(lost(&claimant.shared().key)),
            Settled::Failed(error) if error.kind != StoreErrorKind::Unknown || limit.has_passed() => {
                return Err(error.into());
            }
            _ if limit.has_passed() => {
                return Err(unanswered(&*claimant.open.store, limit.since(start)));
            }
            _ => {}
        }
    }
}

/// How long the last request of a waiter may take beyond its timeout, where the store answers.
const LAST_TRY: Duration = Duration::from_millis(50);

/// Waits for a grant (R9, R10, R11).
async fn wait_for_grant(
    mut claimant: Claimant,
    place: Option<KeyPlace>,
    timeout_at: Boottime,
) -> Result<Option<HoldId>, Error> {
    let shared = Arc::clone(claimant.shared());
    let open = Arc::clone(&claimant.open);
    let op_timeout = shared.client.options().op_timeout;
    let began = Boottime::now();

    if claimant.flight.is_some() || claimant.settled.is_some() {
        // What was asked before joining the line is answered first: if it was granted, whoever stands
        // before us waits for us.
        let limit = (began + op_timeout).min(timeout_at.max(began + LAST_TRY));
        match claimant.attempt(limit).await {
            Settled::Granted(hold) => return claimant.done(hold),
            Settled::Failed(error) if !error.may_pass() => return Err(error.into()),
            Settled::Lost => return Err(lost(&shared.key)),
            _ => {}
        }
    }
    let mut place = place;
    if let Some(place) = &mut place {
        if !place.is_front() {
            // Nor may anything of it be granted while we stand in line: nobody would know.
            claimant.give_up_unanswered();
        }
        match bounded(&shared.client, timeout_at, place.front()).await {
            // Its thread was stopped, or busy in the handler of a signal: nobody waits for this any more.
            Ended::Done(()) if (timeout_at + LAST_TRY).has_passed() => return Ok(None),
            Ended::Done(()) => {}
            Ended::TimeUp => return Ok(None),
            Ended::Closed => return Err(closed()),
        }
    }
    // Watching begins before the look at the record that the wait relies on: no change is missed.
    let mut watch = open.store.watch(&shared.key);
    let mut deferred = false;
    if place.is_some()
        && let Some(deferred_until) = open.queue.deferred_until(shared.key.hash())
    {
        let change = poll_fn(|context| watch.poll_change(context));
        deferred = matches!(bounded(&shared.client, deferred_until.min(timeout_at), change).await, Ended::TimeUp);
    }

    let mut backoff = Backoff::default();
    let mut trouble: Option<Error> = None;
    loop {
        let now = Boottime::now();
        let limit = (now + op_timeout).min(timeout_at.max(now + LAST_TRY));
        let look_in = match claimant.attempt(limit).await {
            Settled::Granted(hold) => {
                if deferred {
                    open.queue.deferred_in_vain(shared.key.hash());
                }
                return claimant.done(hold);
            }
            Settled::Held(expires_in) => {
                deferred = false;
                trouble = None;
                backoff = Backoff::default();
                expires_in + JUST_AFTER
            }
            Settled::Again => Duration::ZERO,
            Settled::Failed(error) if error.may_pass() => {
                trouble = Some(error.into());
                backoff.failed()
            }
            Settled::Failed(error) => return Err(error.into()),
            Settled::Lost => return Err(lost(&shared.key)),
            Settled::Unproven(_) | Settled::Late(_) => unreachable!("an attempt resolves these"),
        };
        let safety_check = open.store.safety_check(Boottime::now().since(began));
        let mut look_at = Boottime::now() + look_in.min(safety_check);
        loop {
            let change = poll_fn(|context| watch.poll_change(context));
            match bounded(&shared.client, look_at.min(timeout_at), change).await {
                Ended::Done(_) if (timeout_at + LAST_TRY).has_passed() => return trouble.map_or(Ok(None), Err),
                Ended::Done(Change::Look) => break,
                // Somebody else was quicker: no use trying before that lease ends.
                Ended::Done(Change::Held { expires_in }) => {
                    look_at = Boottime::now() + (expires_in + JUST_AFTER).min(safety_check);
                }
                Ended::TimeUp if timeout_at.has_passed() => return trouble.map_or(Ok(None), Err),
                Ended::TimeUp => break,
                Ended::Closed => return Err(closed()),
            }
        }
    }
}

enum Ended<T> {
    Done(T),
    TimeUp,
    Closed,
}

/// Waits for `future` until `limit`, or until the client is closed.
async fn bounded<F: Future>(client: &Client, limit: Boottime, future: F) -> Ended<F::Output> {
    let mut future = pin!(future);
    let mut closing = pin!(client.closing());
    let mut time = sleep_until(limit);
    poll_fn(|context| {
        if let Poll::Ready(output) = future.as_mut().poll(context) {
            return Poll::Ready(Ended::Done(output));
        }
        if closing.as_mut().poll(context).is_ready() {
            return Poll::Ready(Ended::Closed);
        }
        Pin::new(&mut time).poll(context).map(|()| Ended::TimeUp)
    })
    .await
}
