//! Renewing holds: when asked to (R8), and by itself (R12). Telling that one is overdue (R13).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::client::{Client, unanswered};
use crate::clock::Boottime;
use crate::error::Error;
use crate::lock::{Phase, Shared, State, forked, lost, not_locked};
use crate::mutex::Mutex;
use crate::options::LockOptions;
use crate::release::clean_up_after;
use crate::runtime::{self, until};
use crate::store::{Answer, Renewal, Renewed, Store, StoreError};
use crate::token::HoldId;

/// One renewal on its way.
struct Sent {
    shared: Arc<Shared>,
    id: HoldId,
    n: u64,
    at: Boottime,
    expire: Duration,
}

/// Sets a new expiry on the hold, the last one where none is named.
pub(crate) fn refresh(shared: &Arc<Shared>, expire: Option<Duration>) -> Answer<(), Error> {
    let prepared = prepare(shared, expire);
    let (sent, renewal) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return Answer::Now(Err(error)),
    };
    let open = match shared.client.open_store() {
        Ok(open) => open,
        Err(error) => return Answer::Now(Err(error)),
    };
    match open.store.refresh(vec![renewal]) {
        Answer::Now(answer) => Answer::Now(sent.explicit(first(answer))),
        Answer::Later(answer) => {
            let (at, op_timeout) = (sent.at, shared.client.options().op_timeout);
            // It goes on where the caller does not: a renewal that is applied late still counts.
            let mut renewal = shared.client.carry_on(async move { sent.explicit(first(answer.await)) });
            let open = Arc::clone(open);
            Answer::later(async move {
                let renewed = until(at + op_timeout, &mut renewal).await;
                renewed.unwrap_or_else(|| Err(unanswered(&*open.store, op_timeout)))
            })
        }
    }
}

/// The fence of the hold, asked for now where the grant brought none (R18).
pub(crate) fn fence(shared: &Arc<Shared>) -> Answer<u64, Error> {
    let known = shared.client.check_open().and_then(|()| shared.with_hold(|hold| Ok((hold.id, hold.fence))));
    let id = match known {
        Ok((_, Some(fence))) => return Answer::Now(Ok(fence)),
        Ok((id, None)) => id,
        Err(error) => return Answer::Now(Err(error)),
    };
    let shared = Arc::clone(shared);
    Answer::later(async move {
        let open = Arc::clone(shared.client.open_store()?);
        let op_timeout = shared.client.options().op_timeout;
        let limit = Boottime::now() + op_timeout;
        let fence = match until(limit, &mut std::pin::pin!(open.store.fence(&shared.key).get())).await {
            Some(fence) => fence?,
            None => return Err(unanswered(&*open.store, op_timeout)),
        };
        // Only a hold that outlasted the drawing of its number may have it.
        refresh(&shared, None).get().await?;
        let mut state = shared.live().state.lock();
        match state.hold.as_mut().filter(|hold| hold.id == id) {
            Some(hold) => Ok(*hold.fence.get_or_insert(fence)),
            None => Err(not_locked(&shared.key)),
        }
    })
}

fn first(answer: Result<Vec<Result<Renewed, StoreError>>, StoreError>) -> Result<Renewed, StoreError> {
    answer?.into_iter().next().unwrap_or_else(|| Err(StoreError::unknown("a refresh of one lock answered for none")))
}

fn prepare(shared: &Arc<Shared>, expire: Option<Duration>) -> Result<(Sent, Renewal), Error> {
    LockOptions { expire, ..LockOptions::default() }.check()?;
    shared.client.check_open()?;
    let open = shared.client.open_store()?;
    let live = shared.live();
    if !open.is_of(live.generation) {
        return Err(forked(&shared.key));
    }
    let mut state = live.state.lock();
    match state.phase {
        Phase::Lost(_) => {
            shared.rest(live, &mut state, Phase::Resting);
            return Err(lost(&shared.key));
        }
        Phase::Forked => {
            shared.rest(live, &mut state, Phase::Resting);
            return Err(forked(&shared.key));
        }
        Phase::Resting | Phase::Acquiring | Phase::Releasing => {}
    }
    let hold = state.hold.as_mut().ok_or_else(|| not_locked(&shared.key))?;
    let shorter = expire.is_some_and(|expire| expire < hold.expire);
    hold.ask_for(expire.unwrap_or(hold.expire));
    hold.n += 1;
    let at = Boottime::now();
    let deadline = at + hold.expire - open.store.margin(hold.expire);
    if (shorter || deadline < hold.deadline) && shared.owner.is_none() {
        // It may be applied without an answer: from here on only the shorter lease is certain, and what is
        // answered yet to longer ones that are under way does not count.
        (hold.deadline, hold.deadline_n) = (hold.deadline.min(deadline), hold.n);
    }
    // Nor may the next renewal wait for as long as the former lease allowed.
    hold.renew_at = hold.renew_at.min(at + hold.expire / 3);
    let sent = Sent { shared: Arc::clone(shared), id: hold.id, n: hold.n, at, expire: hold.expire };
    let renewal = Renewal { key: shared.key.clone(), proof: shared.proof(hold), n: hold.n, expire: hold.expire };
    state.update_signal();
    shared.look_after(&mut state);
    Ok((sent, renewal))
}

impl Sent {
    /// What an explicit refresh answers its caller.
    fn explicit(&self, answer: Result<Renewed, StoreError>) -> Result<(), Error> {
        match answer {
            Ok(Renewed::Renewed { applied }) => match self.renewed(applied) {
                true => Ok(()),
                false => Err(self.unlocked_meanwhile()),
            },
            Ok(Renewed::Lost) => match self.lost() {
                true => Err(lost(&self.shared.key)),
                // Our own unlock, on another thread, was quicker: the record is gone because we gave it back.
                false => Err(self.unlocked_meanwhile()),
            },
            Err(error) => Err(error.into()),
        }
    }

    fn unlocked_meanwhile(&self) -> Error {
        Error::invalid_op(format!("lock instance {} was unlocked while it was refreshed", self.shared.key.quoted()))
    }

    /// The store says that it is lost, and the caller is told. `false`: the hold this belonged to has
    /// ended otherwise.
    fn lost(&self) -> bool {
        let (shared, live) = (&self.shared, self.shared.live());
        let mut state = live.state.lock();
        let hold = match (&state.hold, state.phase) {
            (Some(hold), _) if hold.id == self.id => shared.lose_hold(&mut state),
            // The keeper has heard of it first.
            (None, Phase::Lost(id)) if id == self.id => None,
            _ => return false,
        };
        if matches!(state.phase, Phase::Resting | Phase::Lost(_)) {
            shared.rest(live, &mut state, Phase::Resting);
        }
        drop(state);
        clean_up_after(hold);
        true
    }

    /// The store has renewed it. `false`: the hold this belonged to has ended.
    fn renewed(&self, applied: bool) -> bool {
        let shared = &self.shared;
        let Ok(open) = shared.client.open_store() else { return false };
        let mut state = shared.live().state.lock();
        let Some(hold) = state.hold.as_mut().filter(|hold| hold.id == self.id) else { return false };
        if applied && self.n >= hold.deadline_n {
            let deadline = self.at + self.expire - open.store.margin(self.expire);
            hold.deadline = if shared.owner.is_some() { hold.deadline.max(deadline) } else { deadline };
            hold.deadline_n = self.n;
            hold.overdue_told = false;
            hold.renew_at = self.at + self.expire / 3;
        }
        state.update_signal();
        shared.look_after(&mut state);
        true
    }

    /// What becomes of a hold that the keeper renewed.
    fn kept(&self, answer: Result<Renewed, StoreError>) {
        match answer {
            Ok(Renewed::Renewed { applied }) => {
                self.renewed(applied);
            }
            Ok(Renewed::Lost) => self.shared.mark_lost(self.id),
            // Neither yes nor no: it is asked again until the store answers.
            Err(error) => tracing::debug!("{} was not renewed yet: {error}", self.shared.key.quoted()),
        }
    }
}

/// Looks after the holds of an open store: renews those that asked for it, and tells when one is
/// overdue. One task for all of them.
pub(crate) struct Keeper {
    store: Arc<dyn Store>,
    agenda: Mutex<Agenda>,
    changed: Notify,
}

#[derive(Default)]
struct Agenda {
    entries: BTreeMap<(Boottime, u64), Arc<Shared>>,
    last_id: u64,
    started: bool,
    stopped: bool,
    /// Until when the task sleeps, if nobody wakes it.
    asleep_until: Option<Boottime>,
}

/// A moment, a number that tells entries of one moment apart, and the lock to attend to.
type Entry = ((Boottime, u64), Arc<Shared>);

/// How many holds one request renews.
const BATCH: usize = 256;

impl Keeper {
    pub fn new(store: Arc<dyn Store>) -> Keeper {
        Keeper { store, agenda: Mutex::default(), changed: Notify::new() }
    }

    /// Starts the task, if it does not run.
    pub fn start(self: &Arc<Self>) -> Result<(), Error> {
        if self.agenda.lock().started {
            return Ok(());
        }
        let handle = runtime::handle()?;
        let mut agenda = self.agenda.lock();
        if !agenda.started {
            agenda.started = true;
            handle.spawn(Arc::clone(self).run());
        }
        Ok(())
    }

    pub fn stop(&self) {
        self.agenda.lock().stopped = true;
        self.changed.notify_one();
    }

    /// Notes when the hold of `state` is next attended to. Its lock is held by the caller.
    pub fn look_after(&self, shared: &Arc<Shared>, state: &mut State) {
        let signals = state.signals();
        let Some(hold) = &mut state.hold else { return };
        let overdue_at = (!hold.overdue_told).then_some(hold.deadline).filter(|_| hold.auto_refresh || signals);
        // A closed client renews nothing, but what was renewed stays noted: it is found here and given back.
        let renew_at = hold.auto_refresh.then(|| match shared.client.is_closed() {
            true => Boottime::NEVER,
            false => hold.renew_at,
        });
        let next = overdue_at.into_iter().chain(renew_at).min();
        let mut agenda = self.agenda.lock();
        if let Some(noted) = hold.agenda.take() {
            agenda.entries.remove(&noted);
        }
        if let Some(next) = next {
            agenda.last_id += 1;
            let noted = (next, agenda.last_id);
            agenda.entries.insert(noted, Arc::clone(shared));
            hold.agenda = Some(noted);
            if agenda.asleep_until.is_some_and(|until| next < until) {
                agenda.asleep_until = None;
                self.changed.notify_one();
            }
        }
    }

    pub fn forget(&self, noted: (Boottime, u64)) {
        let forgotten = self.agenda.lock().entries.remove(&noted);
        // Outside the agenda's lock: this may be the last that knows of the lock.
        drop(forgotten);
    }

    /// The locks of a client whose holds are renewed.
    pub fn renewed_for(&self, client: &Client) -> Vec<Arc<Shared>> {
        let mut locks: Vec<Arc<Shared>> =
            self.agenda.lock().entries.values().filter(|lock| lock.client.is(client)).cloned().collect();
        locks.retain(|lock| lock.live().state.lock().hold.as_ref().is_some_and(|hold| hold.auto_refresh));
        locks
    }

    async fn run(self: Arc<Self>) {
        loop {
            let changed = self.changed.notified();
            let (due, next) = self.due();
            if due.is_empty() {
                let Some(next) = next else { return };
                until(next, &mut std::pin::pin!(changed)).await;
                continue;
            }
            self.attend(due);
            tokio::task::yield_now().await;
        }
    }

    /// What is due, or else when something will be; `None` when the store is not used any more. It stays
    /// in the agenda until it is attended to: a client that closes meanwhile finds it there.
    fn due(&self) -> (Vec<Entry>, Option<Boottime>) {
        let mut agenda = self.agenda.lock();
        if agenda.stopped {
            return (Vec::new(), None);
        }
        let due: Vec<Entry> = agenda
            .entries
            .range(..=(Boottime::now(), u64::MAX))
            .take(BATCH)
            .map(|(at, lock)| (*at, Arc::clone(lock)))
            .collect();
        let next = agenda.entries.first_key_value().map_or(Boottime::NEVER, |((at, _), _)| *at);
        agenda.asleep_until = due.is_empty().then_some(next);
        (due, Some(next))
    }

    fn attend(&self, due: Vec<Entry>) {
        let mut sent = Vec::new();
        let mut batch = Vec::new();
        for (noted, shared) in due {
            let mut state = shared.live().state.lock();
            let Some(hold) = state.hold.as_mut().filter(|hold| hold.agenda == Some(noted)) else { continue };
            let now = Boottime::now();
            if hold.deadline <= now && !hold.overdue_told {
                hold.overdue_told = true;
                tracing::warn!("{} is overdue: others may take it over", shared.key.quoted());
            }
            if hold.auto_refresh && hold.renew_at <= now && !shared.client.is_closed() {
                hold.n += 1;
                hold.renew_at = now + again_in(hold.expire, hold.deadline.since(now));
                sent.push(Sent { shared: Arc::clone(&shared), id: hold.id, n: hold.n, at: now, expire: hold.expire });
                batch.push(Renewal {
                    key: shared.key.clone(),
                    proof: shared.proof(hold),
                    n: hold.n,
                    expire: hold.expire,
                });
            }
            state.update_signal();
            self.look_after(&shared, &mut state);
        }
        if batch.is_empty() {
            return;
        }
        match self.store.refresh(batch) {
            Answer::Now(answer) => tell(&sent, answer),
            Answer::Later(answer) => {
                // Each request by itself: one that hangs delays no other.
                tokio::spawn(async move { tell(&sent, answer.await) });
            }
        }
    }
}

/// When an unanswered renewal is sent again: in time for what is `left` of the lease, which may be a shorter one
/// than is asked for.
fn again_in(expire: Duration, left: Duration) -> Duration {
    const LEAST: Duration = Duration::from_millis(1);
    let pace = (expire / 10).clamp(LEAST, Duration::from_secs(1));
    if left.is_zero() { pace } else { pace.min(left / 2).max(LEAST) }
}

fn tell(sent: &[Sent], answer: Result<Vec<Result<Renewed, StoreError>>, StoreError>) {
    match answer {
        Ok(answers) => {
            for (sent, answer) in sent.iter().zip(answers) {
                sent.kept(answer);
            }
        }
        Err(error) => {
            for sent in sent {
                sent.kept(Err(error.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a longer lease was asked for, and nobody answered, the shorter one still runs out.
    #[test]
    fn an_unanswered_renewal_is_sent_again_while_there_is_time() {
        let (minute, moment) = (Duration::from_secs(60), Duration::from_millis(200));
        assert_eq!(again_in(minute, minute), Duration::from_secs(1));
        assert_eq!(again_in(minute, moment), moment / 2);
        assert_eq!(again_in(minute, Duration::from_micros(10)), Duration::from_millis(1));
        assert_eq!(again_in(minute, Duration::ZERO), Duration::from_secs(1), "overdue: no sooner than ever");
        assert_eq!(again_in(moment, minute), moment / 10);
    }
}
