//! One acquire: its requests, their replies, and the checks that make a grant certain (R2 to R4).

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use super::cleanup::{Cleanup, Unanswered};
use super::deadline::Deadline;
use super::release;
use super::session::{OpenStore, ProcessSession, TaskGuard};
use super::state::{Acquiring, Hold, LockCore, NotTaken, StepTerms, forked};
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::options::LockOptions;
use crate::protocol::{Acquisition, Asked, Granted, Orphan, Reply, Verdict};
use crate::record::Record;
use crate::store::{Answer, StoreError, StoreErrorKind};
use crate::sys::runtime::until;
use crate::token::HoldId;

/// An acquire in progress, until it is granted or given up. Dropping it removes whatever it put into the store (R14).
pub struct Attempts {
    acquiring: Acquiring,
    protocol: Acquisition,
    auto_refresh: bool,
    fence: bool,
    progress: Progress,
    /// Earlier requests whose outcome is not known.
    unanswered: Unanswered,
    /// Whether the store may have a record of ours that is not the lock's hold.
    owns_something: bool,
    /// Closing the client waits until this is dropped.
    session: TaskGuard,
}

/// The progress of the last request.
enum Progress {
    /// No request is in flight.
    Ready,
    InFlight(InFlight),
    /// The reply has arrived, and is not yet processed.
    Answered(Outcome),
}

struct InFlight {
    asked: Asked,
    sent: Boottime,
    answer: Answer<Reply>,
}

/// Sends the first request for a plain hold. If the reply is an immediate, certain grant, the lock is held when this
/// returns (or the grant was given back because it is not wanted any more). In every other case, `go_on` continues with
/// the attempts.
#[inline(always)]
pub fn ask_once(
    core: &Arc<LockCore>,
    mut acquiring: Acquiring<&Arc<LockCore>>,
    session: TaskGuard<&Arc<ProcessSession>>,
    options: &LockOptions,
    sent: Boottime,
    go_on: impl FnOnce(Attempts) -> Answer<Option<HoldId>, Error>,
) -> Answer<Option<HoldId>, Error> {
    let open = &session.open;
    let (name, expire) = (open.name_hold(), core.expire_of(options));
    let (token, change) = Acquisition::first_of_plain(name, expire, Arc::clone(&session.identity));
    let answer = open.store.change(&core.key, change.until(core.not_after(sent)).sent(sent));
    if let Answer::Now(Ok(Reply::Applied { fence })) = answer {
        let (granted, proof) = Granted::first_of_plain(token, fence);
        let deadline = Deadline::of_lease(&*open.store, sent, expire);
        if is_sure(&granted, options.fence == Some(true), &deadline) {
            let auto_refresh = options.auto_refresh == Some(true);
            match core.state_for_grant(&acquiring) {
                Ok(mut state) => {
                    // The reply owns nothing: skipping its drop saves time.
                    std::mem::forget(answer);
                    state.hold = Some(Hold::new(&granted, proof, expire, deadline, sent, auto_refresh));
                    acquiring.held(core, &mut state);
                    drop(state);
                    if auto_refresh && let Err(error) = check_wanted(core) {
                        return Answer::Now(Err(error));
                    }
                    return Answer::Now(Ok(Some(name)));
                }
                Err(NotTaken::Unwanted) => {
                    std::mem::forget(answer);
                    let unwanted = Hold::new(&granted, proof, expire, deadline, sent, auto_refresh);
                    return Answer::Now(Err(give_back_unwanted(core, open, unwanted)));
                }
                Err(NotTaken::Parents) => {}
            }
        }
    }
    go_on(asked_once(core, acquiring, session, options, name, (sent, answer)))
}

/// Continues after a first request, whose answer is `answer`.
#[cold]
fn asked_once(
    core: &Arc<LockCore>,
    acquiring: Acquiring<&Arc<LockCore>>,
    session: TaskGuard<&Arc<ProcessSession>>,
    options: &LockOptions,
    name: HoldId,
    (sent, answer): (Boottime, Answer<Reply>),
) -> Attempts {
    let mut protocol = Acquisition::plain(name, core.expire_of(options), Arc::clone(&session.identity));
    // The first request of the state machine is the one that was sent.
    let (asked, _) = protocol.ask();
    let mut attempts = Attempts::with(protocol, acquiring.with(Arc::clone(core)), session.kept(), options);
    attempts.progress = Progress::InFlight(InFlight { asked, sent, answer });
    attempts
}

/// Sends the next request. `sent` is a time before it is sent.
fn send(protocol: &mut Acquisition, core: &LockCore, open: &OpenStore, sent: Boottime) -> InFlight {
    let (asked, change) = protocol.ask();
    let answer = open.store.change(&core.key, change.until(core.not_after(sent)).sent(sent));
    InFlight { asked, sent, answer }
}

/// Whether the grant of an auto-refreshed hold is still wanted. If not, it is given back. If the client was freed
/// meanwhile, the hold may have been abandoned already: then it stays until its lease ends, and counts as granted.
#[cold]
fn check_wanted(core: &Arc<LockCore>) -> Result<(), Error> {
    let stays = !core.session.is_closed() || (!release::release_in_background(core) && core.state().abandoned);
    if stays { Ok(()) } else { Err(not_wanted()) }
}

/// Gives back a plain hold that is not wanted any more.
#[cold]
fn give_back_unwanted(core: &Arc<LockCore>, open: &Arc<OpenStore>, hold: Hold) -> Error {
    release::give_back(core, open, hold);
    not_wanted()
}

/// Whether a grant has what was asked for: its fence, and a deadline that has not passed.
#[inline(always)]
fn is_sure(granted: &Granted, wants_fence: bool, deadline: &Deadline) -> bool {
    (granted.fence.is_some() || !wants_fence) && !deadline.has_passed()
}

fn not_wanted() -> Error {
    Error::new(ErrorKind::Cancelled, "the lock was freed, or its client closed, while the call waited")
}

/// The result of an attempt.
pub enum Outcome {
    Granted(Granted, Boottime),
    /// The lock has another holder.
    Held(Box<Record>),
    /// Nothing was granted, or the grant was given back: try again.
    Again,
    /// A reentrant hold of this object was taken over by another holder.
    Lost,
    Failed(StoreError),
}

impl Attempts {
    /// Nothing is sent yet.
    pub fn new(acquiring: Acquiring, session: TaskGuard, options: &LockOptions) -> Attempts {
        let core = acquiring.core();
        let (hold, identity) = (session.open.name_hold(), Arc::clone(&session.identity));
        let expire = core.expire_of(options);
        let protocol = match core.owner_token() {
            None => Acquisition::plain(hold, expire, identity),
            Some(owner) => {
                let mut state = core.state();
                let held = state.hold.as_ref().map(|hold| (hold.id, hold.steps.len() as u32));
                let asker = (owner.clone(), state.object_id());
                Acquisition::reentrant(asker, held, hold, state.write_seq, expire, identity)
            }
        };
        Attempts::with(protocol, acquiring, session, options)
    }

    fn with(protocol: Acquisition, acquiring: Acquiring, session: TaskGuard, options: &LockOptions) -> Attempts {
        Attempts {
            acquiring,
            protocol,
            auto_refresh: options.auto_refresh == Some(true),
            fence: options.fence == Some(true),
            progress: Progress::Ready,
            unanswered: Unanswered::default(),
            owns_something: false,
            session,
        }
    }

    pub fn core(&self) -> &Arc<LockCore> {
        self.acquiring.core()
    }

    pub fn open(&self) -> &Arc<OpenStore> {
        &self.session.open
    }

    /// Stores the outcome of `try_now`, for `attempt` to return.
    pub fn set_answered(&mut self, outcome: Outcome) {
        self.progress = Progress::Answered(outcome);
    }

    /// Whether a request is in flight, or a reply is to be processed.
    pub fn has_begun(&self) -> bool {
        !matches!(self.progress, Progress::Ready)
    }

    fn send(&mut self, sent: Boottime) -> InFlight {
        send(&mut self.protocol, self.acquiring.core(), &self.session.open, sent)
    }

    /// Sends requests while their replies are immediate. Returns the outcome, or `None` if a reply has to be waited
    /// for. `sent` is a time before the next request.
    pub fn try_now(&mut self, mut sent: Boottime) -> Option<Outcome> {
        // A take-over takes two requests. More are needed only if other processes change the record in between.
        for _ in 0..4 {
            let in_flight = match std::mem::replace(&mut self.progress, Progress::Ready) {
                Progress::Ready => self.send(sent),
                Progress::InFlight(in_flight) => in_flight,
                Progress::Answered(Outcome::Granted(granted, sent)) if self.is_sure(&granted, sent) => {
                    return Some(Outcome::Granted(granted, sent));
                }
                answered => {
                    self.progress = answered;
                    return None;
                }
            };
            match in_flight.answer {
                Answer::Now(result) => match self.read(in_flight.asked, in_flight.sent, result) {
                    None => sent = Boottime::now(),
                    Some(Outcome::Granted(granted, sent)) if !self.is_sure(&granted, sent) => {
                        self.progress = Progress::Answered(Outcome::Granted(granted, sent));
                        return None;
                    }
                    outcome => return outcome,
                },
                answer => {
                    self.progress = Progress::InFlight(InFlight { answer, ..in_flight });
                    return None;
                }
            }
        }
        self.progress = Progress::Answered(Outcome::Again);
        None
    }

    /// The outcome of a reply. `None`: the next request is to be sent at once.
    fn read(&mut self, asked: Asked, sent: Boottime, result: Result<Reply, StoreError>) -> Option<Outcome> {
        let reply = match result {
            Ok(reply) => reply,
            Err(error) => {
                if error.kind == StoreErrorKind::Unknown {
                    self.unanswered.doubt(self.core().not_after(sent));
                }
                return Some(Outcome::Failed(error));
            }
        };
        match self.protocol.read(asked, reply) {
            Verdict::Ask => None,
            Verdict::Granted(granted) => {
                self.owns_something = true;
                Some(Outcome::Granted(granted, sent))
            }
            Verdict::Held(record) => Some(Outcome::Held(record)),
            Verdict::Gone => {
                if !self.unanswered.is_empty() {
                    self.start_cleanup();
                }
                self.restart();
                Some(Outcome::Again)
            }
            Verdict::Lost => Some(Outcome::Lost),
        }
    }

    fn deadline(&self, sent: Boottime) -> Deadline {
        Deadline::of_lease(&*self.open().store, sent, self.protocol.expire())
    }

    fn is_sure(&self, granted: &Granted, sent: Boottime) -> bool {
        is_sure(granted, self.fence, &self.deadline(sent))
    }

    /// Sends requests until there is an outcome, or until `limit`. Makes a grant certain before it is returned.
    pub async fn attempt(&mut self, limit: Boottime) -> Outcome {
        let outcome = loop {
            let in_flight = match std::mem::replace(&mut self.progress, Progress::Ready) {
                Progress::Answered(outcome) => break outcome,
                Progress::InFlight(in_flight) => in_flight,
                Progress::Ready => self.send(Boottime::now()),
            };
            let (asked, sent) = (in_flight.asked.clone(), in_flight.sent);
            let Some(result) = self.answered(in_flight, limit).await else {
                break Outcome::Failed(self.not_answered(sent));
            };
            match self.read(asked, sent, result) {
                Some(outcome) => break outcome,
                None if limit.has_passed() => break Outcome::Again,
                None => {}
            }
        };
        match outcome {
            Outcome::Granted(granted, sent) if self.is_sure(&granted, sent) => Outcome::Granted(granted, sent),
            Outcome::Granted(granted, sent) => self.make_sure(granted, sent, limit).await,
            Outcome::Lost => {
                // The previous hold of this object is gone.
                let lost = self.core().lose_hold(&mut self.core().state());
                let Some(cleanups) = lost else {
                    // A refresh has already reported that loss: what was granted now belongs to a new hold.
                    self.give_back(limit).await;
                    self.protocol.forget_held();
                    self.restart();
                    return Outcome::Again;
                };
                self.core().start_cleanups(cleanups);
                Outcome::Lost
            }
            outcome => outcome,
        }
    }

    /// Waits for a reply. `self` keeps the request meanwhile: if this future is dropped, the clean-up finds it there.
    async fn answered(&mut self, in_flight: InFlight, limit: Boottime) -> Option<Result<Reply, StoreError>> {
        let sent = in_flight.sent;
        let mut pending = match in_flight {
            InFlight { answer: Answer::Now(result), .. } => return Some(result),
            pending => {
                self.progress = Progress::InFlight(pending);
                &mut self.progress
            }
        };
        let answer = poll_fn(|context| match &mut pending {
            Progress::InFlight(InFlight { answer: Answer::Later(answer), .. }) => answer.as_mut().poll(context),
            _ => Poll::Pending,
        });
        let result = until(limit, &mut pin!(answer)).await;
        let in_flight = std::mem::replace(&mut self.progress, Progress::Ready);
        if result.is_none() {
            self.give_up(in_flight, sent);
        }
        result
    }

    /// A request that was not answered in time.
    fn give_up(&mut self, progress: Progress, sent: Boottime) {
        if let Progress::InFlight(InFlight { answer: Answer::Later(answer), .. }) = progress {
            self.unanswered.await_answer(self.core().not_after(sent), answer);
        }
    }

    fn not_answered(&self, sent: Boottime) -> StoreError {
        let waited = Boottime::now().since(sent);
        StoreError::unknown(self.open().unanswered(waited).message())
    }

    /// For a grant without its fence, or past its deadline: requests a fence, and renews the lease, so that its
    /// deadline is known (R18). A grant that cannot be made certain is given back: a late grant does not count (R4).
    async fn make_sure(&mut self, mut granted: Granted, sent: Boottime, limit: Boottime) -> Outcome {
        let late = self.deadline(sent).has_passed();
        let outcome = match late {
            true => Outcome::Again,
            false => match self.draw_fence(&mut granted, limit).await {
                Ok(()) => self.prove(granted, limit).await,
                Err(error) => Outcome::Failed(error),
            },
        };
        if let Outcome::Granted(..) = outcome {
            return outcome;
        }
        self.give_back(limit).await;
        outcome
    }

    async fn draw_fence(&mut self, granted: &mut Granted, limit: Boottime) -> Result<(), StoreError> {
        if !self.fence || granted.fence.is_some() {
            return Ok(());
        }
        let sent = Boottime::now();
        let open = Arc::clone(self.open());
        match until(limit, &mut pin!(open.store.fence(&self.core().key).get())).await {
            Some(fence) => granted.fence = Some(fence?),
            None => return Err(self.not_answered(sent)),
        }
        Ok(())
    }

    async fn prove(&mut self, granted: Granted, limit: Boottime) -> Outcome {
        let fence = granted.fence;
        self.protocol.prove(granted);
        while !limit.has_passed() {
            let in_flight = self.send(Boottime::now());
            let (asked, sent) = (in_flight.asked.clone(), in_flight.sent);
            let Some(result) = self.answered(in_flight, limit).await else {
                return Outcome::Failed(self.not_answered(sent));
            };
            match result.map(|reply| self.protocol.read(asked, reply)) {
                Ok(Verdict::Granted(proven)) if !self.deadline(sent).has_passed() => {
                    return Outcome::Granted(Granted { fence, ..proven }, sent);
                }
                Ok(Verdict::Ask) => {}
                Ok(_) => return Outcome::Again,
                Err(error) => return Outcome::Failed(error),
            }
        }
        Outcome::Again
    }

    /// Releases what was granted; what cannot be released by `limit` is cleaned up in the background. Later requests
    /// are for a new hold, or a new step.
    async fn give_back(&mut self, limit: Boottime) {
        let orphan = self.protocol.orphan();
        let (open, key) = (Arc::clone(self.open()), self.core().key.clone());
        let mut cleanup = UnlessRemoved { attempts: self, orphan: Some(orphan) };
        let removed = match &cleanup.orphan {
            Some(orphan) => until(limit, &mut pin!(Cleanup::remove(&open, &key, orphan))).await,
            None => None,
        };
        if matches!(removed, Some(Ok(()))) && cleanup.attempts.unanswered.is_empty() {
            cleanup.orphan = None;
        }
        drop(cleanup);
        self.restart();
    }

    /// Requests that may still be granted are cleaned up in the background. Later requests are for a new hold.
    pub fn give_up_unanswered(&mut self) {
        if !self.unanswered.is_empty() {
            self.start_cleanup();
            self.restart();
        }
    }

    /// Removes, in the background, what the requests so far have put into the store, or may still put there.
    fn start_cleanup(&mut self) {
        let orphan = self.protocol.orphan();
        self.clean_up(orphan);
    }

    fn clean_up(&mut self, orphan: Orphan) {
        let unanswered = std::mem::take(&mut self.unanswered);
        let cleanup = Cleanup::new(self.open(), orphan, unanswered, self.protocol.expire());
        cleanup.start(&self.core().session, self.open(), &self.core().key);
    }

    /// Continues with a new hold.
    fn restart(&mut self) {
        self.owns_something = false;
        self.protocol.restart(self.open().name_hold());
    }

    /// Makes the grant the lock's hold.
    pub fn finish(&mut self, granted: Granted, sent: Boottime) -> Result<Option<HoldId>, Error> {
        let expire = self.protocol.expire();
        let (proof, deadline) = (self.protocol.proof(&granted), self.deadline(sent));
        let mut hold = Hold::new(&granted, proof, expire, deadline, sent, self.auto_refresh);
        if self.core().is_reentrant() {
            hold.steps.push(StepTerms { expire, auto_refresh: self.auto_refresh });
        }
        let unanswered = std::mem::take(&mut self.unanswered);
        // A late request for a nested step changes nothing: it adds no entry, and its number is lower than that of
        // the grant.
        if !unanswered.is_empty() && !self.protocol.is_nested() {
            // Removed after the hold has ended: before that, the clean-up could remove the hold itself.
            let orphan = self.protocol.orphan();
            hold.cleanups.push(Cleanup::new(self.open(), orphan, unanswered, expire));
        }
        self.note_write_seq();
        let Some((mut hold, why)) = self.acquiring.granted(hold) else {
            self.owns_something = false;
            if self.auto_refresh {
                check_wanted(self.core())?;
            }
            return Ok(Some(granted.hold));
        };
        if matches!(why, NotTaken::Unwanted) && !self.core().is_reentrant() {
            self.owns_something = false;
            return Err(give_back_unwanted(self.core(), self.open(), hold));
        }
        // `self` needs its unanswered requests again.
        self.unanswered = hold.cleanups.pop().map(|cleanup| cleanup.unanswered).unwrap_or_default();
        Err(match why {
            NotTaken::Parents => self.leave_to_parent(hold),
            // When `self` is dropped, it takes back its own step only.
            NotTaken::Unwanted => not_wanted(),
        })
    }

    /// A grant that is processed in a child process, because a signal handler forked during the call. The call belongs
    /// to the parent.
    fn leave_to_parent(&mut self, hold: Hold) -> Error {
        if !self.open().is_of_this_process() {
            // The request was sent to the parent's store: the parent continues with it.
            self.owns_something = false;
            std::mem::forget(std::mem::take(&mut self.unanswered));
        } else if !self.core().is_reentrant() {
            // The request was sent after the fork: the grant belongs to this process, and no call reports it.
            self.owns_something = false;
            release::give_back(self.core(), self.open(), hold);
        }
        // The step is taken back when `self` is dropped.
        forked(&self.core().key)
    }

    /// The object continues to count from the last number used here.
    fn note_write_seq(&self) {
        if self.core().is_reentrant() {
            let mut state = self.core().state();
            state.write_seq = state.write_seq.max(self.protocol.write_seq());
        }
    }
}

impl Drop for Attempts {
    fn drop(&mut self) {
        // Before the lock becomes idle: the request in flight is given up, and must leave nothing behind.
        if let Progress::InFlight(InFlight { sent, .. }) = self.progress {
            let in_flight = std::mem::replace(&mut self.progress, Progress::Ready);
            self.give_up(in_flight, sent);
        }
        if self.owns_something || !self.unanswered.is_empty() {
            self.start_cleanup();
        }
        self.note_write_seq();
    }
}

/// On drop, cleans up the orphan in the background, if it is still here.
struct UnlessRemoved<'a> {
    attempts: &'a mut Attempts,
    orphan: Option<Orphan>,
}

impl Drop for UnlessRemoved<'_> {
    fn drop(&mut self) {
        self.attempts.owns_something = false;
        if let Some(orphan) = self.orphan.take() {
            self.attempts.clean_up(orphan);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Client;
    use crate::key::Key;
    use crate::options::ClientOptions;
    use crate::sys::runtime::wait;

    /// A client is closed, or freed, between a grant and the look whether it is wanted: "cancelled" leaves nothing.
    #[test]
    fn what_is_not_wanted_leaves_nothing() {
        let ways: [fn(&Client); 2] = [|client| wait(client.close(Boottime::NEVER)).unwrap(), Client::abandon];
        for (name, leave) in [("memory:closed", ways[0]), ("memory:freed", ways[1])] {
            let open = || wait(Client::open(Some(name), ClientOptions::default())).unwrap();
            let (client, other, key) = (open(), open(), Key::new(b"k").unwrap());
            let lock = client.lock(key.clone(), LockOptions::default()).unwrap();
            assert!(wait(lock.try_lock(LockOptions { auto_refresh: Some(true), ..Default::default() })).unwrap());
            leave(&client);
            let wanted = check_wanted(&lock.0);
            let left = wait(other.find(&key)).unwrap();
            assert_eq!(wanted.is_ok(), left.is_some(), "{name}: {wanted:?}");
        }
    }
}
