//! Acquiring a lock, and waiting for it (R9 to R11).

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use super::acquire::{Attempts, Outcome, ask_once};
use super::queue::{KeyTicket, Ticket};
use super::session::{OfItsProcess, Session};
use super::state::{Acquiring, LockCore, Refused, lost};
use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::options::{IfHeld, LockOptions, Timeout};
use crate::store::{Answer, JUST_AFTER, Notice, StoreErrorKind, Watch};
use crate::sys::runtime::{self, sleep_until};
use crate::token::HoldId;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum WaitMode {
    OneTry,
    Timeout,
}

/// What a caller asked for.
#[derive(Clone, Copy)]
struct AcquireRequest {
    options: LockOptions,
    waits: bool,
    start: Boottime,
    timeout_at: Boottime,
}

impl AcquireRequest {
    #[inline]
    fn new(options: LockOptions, mode: WaitMode, start: Boottime) -> AcquireRequest {
        let timeout = match mode {
            WaitMode::OneTry => Timeout::NoWait,
            WaitMode::Timeout => options.timeout.unwrap_or(Timeout::NoWait),
        };
        AcquireRequest { options, waits: timeout != Timeout::NoWait, start, timeout_at: timeout.from(start) }
    }
}

/// Tries to acquire the lock, and waits if the options say so. Returns the hold that was granted, or `None`.
#[inline(always)]
pub fn acquire(core: &Arc<LockCore>, call: LockOptions, mode: WaitMode) -> Answer<Option<HoldId>, Error> {
    if let Err(error) = call.check() {
        return Answer::Now(Err(error));
    }
    let request = AcquireRequest::new(core.effective(call), mode, Boottime::now());
    if !takes_turns(core, &request.options)
        && let Some(acquiring) = core.begin_acquire_if_free()
    {
        return contend(core, acquiring, &request, request.start);
    }
    acquire_any(core, &request)
}

/// Calls on one reentrant object always take turns; calls on a plain one do with `if_held = wait`.
#[inline]
fn takes_turns(core: &LockCore, options: &LockOptions) -> bool {
    core.is_reentrant() || options.if_held == Some(IfHeld::Wait)
}

/// As `acquire`, if the object may be in use.
#[cold]
fn acquire_any(core: &Arc<LockCore>, request: &AcquireRequest) -> Answer<Option<HoldId>, Error> {
    let takes_turns = takes_turns(core, &request.options);
    if !takes_turns || core.object_queue().queue.is_empty() {
        match core.begin_acquire() {
            Ok(acquiring) => return contend(core, acquiring, request, request.start),
            Err(Refused::Busy(_)) if takes_turns => {}
            Err(refused) => return Answer::Now(Err(refused.into())),
        }
    }
    of_its_process(take_turn(core, *request))
}

/// Makes an answer one that a forked child leaves to its parent.
fn of_its_process(answer: Result<Answer<Option<HoldId>, Error>, Error>) -> Answer<Option<HoldId>, Error> {
    match answer {
        Ok(Answer::Later(call)) => Answer::later(OfItsProcess::new(call)),
        Ok(answer) => answer,
        Err(error) => Answer::Now(Err(error)),
    }
}

/// Waits until the earlier calls on the object have ended.
fn take_turn(core: &Arc<LockCore>, request: AcquireRequest) -> Result<Answer<Option<HoldId>, Error>, Error> {
    core.session.check_open()?;
    if !request.waits && !core.is_reentrant() {
        return Ok(Answer::Now(Ok(None)));
    }
    runtime::handle()?;
    let ticket = core.object_queue().queue.join();
    Ok(Answer::later(in_turn(Arc::clone(core), ticket, request)))
}

/// Waits until this call may use the lock object, then asks for the lock.
async fn in_turn(core: Arc<LockCore>, ticket: Ticket, request: AcquireRequest) -> Result<Option<HoldId>, Error> {
    let limit = match request.waits {
        true => request.timeout_at,
        false => request.start + core.session.options().op_timeout,
    };
    match bounded(&core.session, limit, core.wait_turn(ticket, begin_kept)).await {
        WaitOutcome::Done(acquiring) => contend(&core, acquiring?.with(&core), &request, Boottime::now()).get().await,
        WaitOutcome::TimeUp => Ok(None),
        WaitOutcome::Closed => Err(closed()),
    }
}

/// Begins an acquire with a reference of its own to the lock.
fn begin_kept(core: &Arc<LockCore>) -> Result<Acquiring, Refused> {
    Ok(core.begin_acquire()?.with(Arc::clone(core)))
}

fn closed() -> Error {
    Error::new(ErrorKind::Cancelled, "the client was closed while the call waited")
}

/// Sends the request to the store. Returns an immediate result if the store replies immediately.
#[inline(always)]
fn contend(
    core: &Arc<LockCore>,
    acquiring: Acquiring<&Arc<LockCore>>,
    request: &AcquireRequest,
    now: Boottime,
) -> Answer<Option<HoldId>, Error> {
    let options = &request.options;
    let session = match core.session.begin_task() {
        Ok(session) => session,
        Err(error) => return Answer::Now(Err(error)),
    };
    if options.auto_refresh == Some(true)
        && let Err(error) = session.open.schedule.start()
    {
        // Fails now: without the schedule, the hold could not be renewed.
        return Answer::Now(Err(error));
    }
    // Steps into reentrant holds do not queue for the key (R17).
    let is_plain = !core.is_reentrant();
    let joins_first = is_plain && request.waits && session.open.queue.anybody_is_before(core.key.hash());
    let go_on = |attempts| of_its_process(go_on(attempts, request, joins_first, now));
    match is_plain && !joins_first {
        true => ask_once(core, acquiring, session, options, now, go_on),
        false => go_on(Attempts::new(acquiring.with(Arc::clone(core)), session.kept(), options)),
    }
}

/// Continues after a first request that was not granted at once.
#[cold]
fn go_on(
    mut attempts: Attempts,
    request: &AcquireRequest,
    joins_first: bool,
    now: Boottime,
) -> Result<Answer<Option<HoldId>, Error>, Error> {
    let hash = attempts.core().key.hash();
    let queued = request.waits && !attempts.core().is_reentrant();
    let mut ticket = None;
    if joins_first {
        ticket = Some(attempts.open().queue.join(hash));
    } else {
        match attempts.try_now(now) {
            Some(Outcome::Granted(granted, sent)) => return Ok(Answer::Now(attempts.finish(granted, sent))),
            Some(Outcome::Held(_)) if !request.waits => return Ok(Answer::Now(Ok(None))),
            Some(Outcome::Failed(error)) if !error.may_pass() => return Ok(Answer::Now(Err(error.into()))),
            Some(outcome) => attempts.set_answered(outcome),
            None => {}
        }
        if queued {
            ticket = Some(attempts.open().queue.join(hash));
        }
    }
    runtime::handle()?;
    Ok(match request.waits {
        true => {
            let motion = ticket.as_ref().map(KeyTicket::motion);
            let waiting = Waiter::new(attempts, request.timeout_at).run(ticket);
            match motion {
                Some(motion) => Answer::later(motion.while_waiting(waiting)),
                None => Answer::later(waiting),
            }
        }
        false => Answer::later(one_try(attempts, request.start)),
    })
}

/// A single try, limited by `op_timeout`. The request is sent again only if its reply was lost, or if a grant could not
/// be made certain.
async fn one_try(mut attempts: Attempts, start: Boottime) -> Result<Option<HoldId>, Error> {
    let limit = start + attempts.core().session.options().op_timeout;
    loop {
        match attempts.attempt(limit).await {
            Outcome::Granted(granted, sent) => return attempts.finish(granted, sent),
            Outcome::Held(_) => return Ok(None),
            Outcome::Lost => return Err(lost(&attempts.core().key)),
            Outcome::Failed(error) if error.kind != StoreErrorKind::Unknown || limit.has_passed() => {
                return Err(error.into());
            }
            _ if limit.has_passed() => return Err(attempts.open().unanswered(limit.since(start))),
            _ => {}
        }
    }
}

/// How long the last request of a waiter may take beyond its timeout.
const LAST_TRY: Duration = Duration::from_millis(50);

/// Whether the timeout of a waiter has passed, and the time for its last request too.
fn too_late(timeout_at: Boottime) -> bool {
    (timeout_at + LAST_TRY).has_passed()
}

/// A call that waits for a grant: first in the queue of this process, then for the record.
struct Waiter {
    attempts: Attempts,
    timeout_at: Boottime,
    began: Boottime,
}

impl Waiter {
    fn new(attempts: Attempts, timeout_at: Boottime) -> Waiter {
        Waiter { attempts, timeout_at, began: Boottime::now() }
    }

    async fn run(mut self, ticket: Option<KeyTicket>) -> Result<Option<HoldId>, Error> {
        let mut ticket = ticket;
        if self.attempts.has_begun() {
            // The reply to the request that was sent before joining the queue comes first: if it is a grant, the
            // waiters in the queue wait for this hold.
            let limit = self.attempt_limit();
            match self.attempts.attempt(limit).await {
                Outcome::Granted(granted, sent) => return self.attempts.finish(granted, sent),
                Outcome::Failed(error) if !error.may_pass() => return Err(error.into()),
                Outcome::Lost => return Err(lost(&self.attempts.core().key)),
                _ => {}
            }
        }
        if let Some(ticket) = &mut ticket
            && let Some(ended) = self.wait_in_line(ticket).await
        {
            return ended;
        }
        self.watch(ticket.is_some()).await
    }

    /// When an attempt is given up.
    fn attempt_limit(&self) -> Boottime {
        let now = Boottime::now();
        (now + self.attempts.core().session.options().op_timeout).min(self.timeout_at.max(now + LAST_TRY))
    }

    /// Waits until this is the first waiter of this process. `Some`: the call has ended meanwhile.
    async fn wait_in_line(&mut self, ticket: &mut KeyTicket) -> Option<Result<Option<HoldId>, Error>> {
        if !ticket.is_front() {
            // No request may be granted while this call is in the queue, where the grant would not be noticed.
            self.attempts.give_up_unanswered();
        }
        match bounded(&self.attempts.core().session, self.timeout_at, ticket.front()).await {
            // Its thread was stopped, or busy in a signal handler, until after its timeout.
            WaitOutcome::Done(()) if too_late(self.timeout_at) => Some(Ok(None)),
            WaitOutcome::Done(()) => None,
            WaitOutcome::TimeUp => Some(Ok(None)),
            WaitOutcome::Closed => Some(Err(closed())),
        }
    }

    /// Sends requests, and waits for a change of the record between two attempts.
    async fn watch(mut self, in_line: bool) -> Result<Option<HoldId>, Error> {
        let core = Arc::clone(self.attempts.core());
        let open = Arc::clone(self.attempts.open());
        // The watch begins before the record is read: no change in between is missed.
        let mut watch = open.store.watch(&core.key);
        let mut yielded = false;
        if in_line && let Some(until) = open.queue.deferred_until(core.key.hash()) {
            let change = poll_fn(|context| watch.poll_change(context));
            let ended = bounded(&core.session, until.min(self.timeout_at), change).await;
            yielded = matches!(ended, WaitOutcome::TimeUp);
        }
        let mut backoff = Backoff::default();
        let mut trouble: Option<Error> = None;
        loop {
            let limit = self.attempt_limit();
            let look_in = match self.attempts.attempt(limit).await {
                Outcome::Granted(granted, sent) => {
                    if yielded {
                        open.queue.yield_was_wasted(core.key.hash());
                    }
                    return self.attempts.finish(granted, sent);
                }
                Outcome::Held(record) => {
                    yielded = false;
                    trouble = None;
                    backoff = Backoff::default();
                    record.lease.remaining().saturating_add(JUST_AFTER)
                }
                Outcome::Again => Duration::ZERO,
                Outcome::Failed(error) if error.may_pass() => {
                    trouble = Some(error.into());
                    backoff.failed()
                }
                Outcome::Failed(error) => return Err(error.into()),
                Outcome::Lost => return Err(lost(&core.key)),
            };
            let look = self.look_at(look_in);
            match sleep(&core, &mut *watch, look, self.timeout_at).await {
                WaitOutcome::Done(()) => {}
                WaitOutcome::TimeUp => return trouble.map_or(Ok(None), Err),
                WaitOutcome::Closed => return Err(closed()),
            }
        }
    }

    /// When to look again, `look_in` from now or at the safety check.
    fn look_at(&self, look_in: Duration) -> LookAt {
        let now = Boottime::now();
        let safety_check = self.attempts.open().store.safety_check(now.since(self.began));
        LookAt { at: now + look_in.min(safety_check), safety_check }
    }
}

/// The next look at a record.
struct LookAt {
    at: Boottime,
    /// The longest time to the next look.
    safety_check: Duration,
}

/// Sleeps until it is time to look again, or after a change.
async fn sleep(core: &LockCore, watch: &mut dyn Watch, look: LookAt, timeout_at: Boottime) -> WaitOutcome<()> {
    let mut look_at = look.at;
    loop {
        let change = poll_fn(|context| watch.poll_change(context));
        match bounded(&core.session, look_at.min(timeout_at), change).await {
            WaitOutcome::Closed => return WaitOutcome::Closed,
            // Checked first, since there may be changes all the time.
            _ if timeout_at.has_passed() => return WaitOutcome::TimeUp,
            WaitOutcome::Done(Notice::Look) | WaitOutcome::TimeUp => return WaitOutcome::Done(()),
            // The new holder may have the same owner token: then this step is granted.
            WaitOutcome::Done(Notice::Held { .. }) if core.is_reentrant() => return WaitOutcome::Done(()),
            // Another waiter was granted the lock: a try before its lease ends is pointless.
            WaitOutcome::Done(Notice::Held { expires_in }) => {
                look_at = Boottime::now() + expires_in.saturating_add(JUST_AFTER).min(look.safety_check);
            }
        }
    }
}

enum WaitOutcome<T> {
    Done(T),
    TimeUp,
    Closed,
}

/// Waits for `future` until `limit`, or until the client is closed.
async fn bounded<F: Future>(session: &Session, limit: Boottime, future: F) -> WaitOutcome<F::Output> {
    let mut future = pin!(future);
    let mut closing = pin!(session.closing());
    let mut time = sleep_until(limit);
    poll_fn(|context| {
        // Checked first, since there may be changes all the time.
        if closing.as_mut().poll(context).is_ready() {
            return Poll::Ready(WaitOutcome::Closed);
        }
        if let Poll::Ready(output) = future.as_mut().poll(context) {
            return Poll::Ready(WaitOutcome::Done(output));
        }
        Pin::new(&mut time).poll(context).map(|()| WaitOutcome::TimeUp)
    })
    .await
}
