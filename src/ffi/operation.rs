//! An operation: a request that was started, and its outcome.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use super::error::Failure;
use super::records::List;
use super::status::{
    NBL_CANCELLED, NBL_ERR_FORKED, NBL_ERR_INVALID_OP, NBL_NOT_FOUND, NBL_OK, NBL_PENDING, NBL_UNAVAILABLE,
    nbl_status_t,
};
use crate::client::{Client, Ping};
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::lock::signal_descriptor;
use crate::store::Answer;
use crate::sys::descriptor::Signal;
use crate::sys::mutex::Mutex;
use crate::sys::process;
use crate::sys::runtime;
use crate::token::HoldId;

/// How often a thread that waits looks whether this still is the process that it began in.
const LOOK: Duration = Duration::from_secs(1);

/// One operation under way, or its outcome.
pub(crate) struct Op {
    /// The process that started it.
    generation: u64,
    inner: Arc<Inner>,
}

struct Inner {
    /// What is under way. Cancelling takes it out and drops it, there and then.
    work: Mutex<Option<Work>>,
    // Not the library's Mutex: a thread waits on it.
    state: std::sync::Mutex<State>,
    done: Condvar,
}

type Work = Pin<Box<dyn Future<Output = Outcome> + Send>>;
pub(crate) type Outcome = Result<Output, Failure>;

/// The result of an operation that did what it was asked to.
pub(crate) enum Output {
    Nothing,
    Granted(HoldId),
    Client(Client),
    List(List),
    Ping(Ping),
    Fence(u64),
}

/// Undoes a grant that nobody took note of.
pub(crate) type GiveBack = Box<dyn FnOnce(HoldId) + Send + Sync>;

struct State {
    outcome: Option<Outcome>,
    /// Whether the outcome was returned: until then a grant is given back when the operation is dropped.
    told: bool,
    /// What gives the grant back.
    give_back: Option<GiveBack>,
    signal: Option<Signal>,
}

impl Op {
    /// An operation for an answer. `give_back` undoes a success that nobody took note of. A wrong argument
    /// is no operation: it is answered there and then.
    pub fn start<T: Send + 'static>(
        answer: Answer<T, Error>,
        convert: impl FnOnce(T) -> Outcome + Send + 'static,
        give_back: Option<GiveBack>,
    ) -> Result<Op, Failure> {
        if let Answer::Now(Err(error)) = &answer
            && error.kind() == ErrorKind::InvalidArgument
        {
            return Err(error.clone().into());
        }
        let inner = Arc::new(Inner {
            work: Mutex::new(None),
            state: std::sync::Mutex::new(State { outcome: None, told: false, give_back, signal: None }),
            done: Condvar::new(),
        });
        match answer {
            Answer::Now(result) => inner.complete(result.map_err(Failure::from).and_then(convert)),
            Answer::Later(answer) => {
                let runtime = runtime::handle()?;
                *inner.work.lock() =
                    Some(Box::pin(async move { answer.await.map_err(Failure::from).and_then(convert) }));
                let task = Arc::clone(&inner);
                runtime.spawn(poll_fn(move |context| task.poll(context)));
            }
        }
        Ok(Op { generation: process::generation(), inner })
    }

    fn inner(&self) -> Result<&Inner, Failure> {
        if self.generation != process::generation() {
            return Err(Failure {
                status: NBL_ERR_FORKED,
                message: "the operation belongs to the process that this one was forked from".to_string(),
            });
        }
        Ok(&self.inner)
    }

    pub fn descriptor(&self) -> Result<i32, Failure> {
        let mut state = self.inner()?.lock();
        let made = state.signal.take().and_then(|signal| signal.number().map(|number| (number, signal)));
        let (descriptor, signal) = match made {
            Some(made) => made,
            // There is none yet, or the program has closed it.
            None => {
                let signal = signal_descriptor()?;
                signal.set(state.outcome.is_some());
                (signal.number().unwrap_or(-1), signal)
            }
        };
        state.signal = Some(signal);
        Ok(descriptor)
    }

    /// The outcome's status and message, which are thereby returned.
    pub fn finish(&self) -> Result<nbl_status_t, Failure> {
        let mut state = self.inner()?.lock();
        match &state.outcome {
            None => Ok(NBL_PENDING),
            Some(Ok(_)) => {
                state.told = true;
                Ok(NBL_OK)
            }
            Some(Err(failure)) => Err(Failure { status: failure.status, message: failure.message.clone() }),
        }
    }

    /// Waits for the outcome, until then.
    pub fn wait(&self, until: Boottime) -> Result<nbl_status_t, Failure> {
        let inner = self.inner()?;
        loop {
            let left = until.since(Boottime::now());
            if left.is_zero() {
                return self.finish();
            }
            let pending = |state: &mut State| state.outcome.is_none();
            // A child that a signal's handler forks meanwhile finds out when it looks.
            let waited = inner.done.wait_timeout_while(inner.lock(), left.min(LOOK), pending);
            let (state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            drop(state);
            if !waited.timed_out() {
                return self.finish();
            }
            self.inner()?;
        }
    }

    pub fn cancel(&self) -> Result<(), Failure> {
        self.inner()?.cancel();
        Ok(())
    }

    /// Takes a result out, once.
    pub fn take<T>(&self, what: &str, take: impl FnOnce(&mut Output) -> Option<T>) -> Result<T, Failure> {
        let mut state = self.inner()?.lock();
        let taken = match &mut state.outcome {
            None => {
                let message = "the operation is still in progress".to_string();
                return Err(Failure { status: NBL_PENDING, message });
            }
            Some(Err(failure)) => {
                return Err(Failure { status: failure.status, message: failure.message.clone() });
            }
            Some(Ok(output)) => take(output),
        };
        state.told = true;
        taken.ok_or_else(|| invalid_op(&format!("the operation has no {what}, or it was taken already")))
    }
}

fn invalid_op(message: &str) -> Failure {
    Failure { status: NBL_ERR_INVALID_OP, message: message.to_string() }
}

impl Drop for Op {
    fn drop(&mut self) {
        // In a forked child the parent's thread goes on with it, and nothing of it is touched here.
        if self.generation == process::generation() {
            self.inner.cancel();
        }
    }
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut work = self.work.lock();
        let Some(under_way) = work.as_mut() else { return Poll::Ready(()) };
        // A panic is reported to the waiting thread as well.
        let outcome = match catch_unwind(AssertUnwindSafe(|| under_way.as_mut().poll(context))) {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(outcome)) => outcome,
            Err(panic) => Err(Failure::panicked(&*panic)),
        };
        *work = None;
        self.complete(outcome);
        Poll::Ready(())
    }

    fn complete(&self, outcome: Outcome) {
        let mut state = self.lock();
        state.outcome = Some(outcome);
        if let Some(signal) = &state.signal {
            signal.set(true);
        }
        drop(state);
        self.done.notify_all();
    }

    fn cancel(&self) {
        let mut work = self.work.lock();
        let under_way = work.take();
        let mut state = self.lock();
        let unseen = match &state.outcome {
            None => {
                state.outcome =
                    Some(Err(Failure { status: NBL_CANCELLED, message: "the operation was cancelled".to_string() }));
                if let Some(signal) = &state.signal {
                    signal.set(true);
                }
                None
            }
            Some(Ok(Output::Granted(hold))) if !state.told => {
                let hold = *hold;
                state.outcome = Some(Err(Failure {
                    status: NBL_CANCELLED,
                    message: "the operation was cancelled, and what it got was given back".to_string(),
                }));
                state.give_back.take().map(|give_back| (give_back, hold))
            }
            Some(_) => None,
        };
        drop(state);
        // What is dropped here lets the lock rest: a caller that is notified of the cancellation finds it idle.
        drop(under_way);
        drop(work);
        self.done.notify_all();
        if let Some((give_back, hold)) = unseen {
            give_back(hold);
        }
    }
}

pub(crate) fn unavailable(key: &crate::key::Key) -> Failure {
    Failure { status: NBL_UNAVAILABLE, message: format!("lock on {} unavailable", key.quoted()) }
}

pub(crate) fn not_found(message: String) -> Failure {
    Failure { status: NBL_NOT_FOUND, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::status::NBL_ERR_INTERNAL;

    #[test]
    fn a_panic_is_an_outcome() {
        let answer = Answer::later(async { panic!("on purpose") });
        let op =
            Op::start(answer, |()| Ok(Output::Nothing), None).unwrap_or_else(|failure| panic!("{}", failure.message));
        let mut state = op.inner.lock();
        while state.outcome.is_none() {
            state = op.inner.done.wait(state).unwrap();
        }
        drop(state);
        let failure = op.finish().expect_err("it panicked");
        assert_eq!(failure.status, NBL_ERR_INTERNAL);
        assert!(failure.message.contains("on purpose"), "{}", failure.message);
    }
}
