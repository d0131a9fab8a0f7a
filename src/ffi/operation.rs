//! Operations: requests that were started, and their outcomes.
//!
//! The future of an operation is polled by the thread that waits for it, like that of a call without `_start`: the
//! thread reads the connection itself, and no other thread has to be woken. While no thread waits, a task of the
//! runtime polls the future whenever it is woken. Both use one waker, which passes each wake-up on to the current
//! runner, so that none is lost when a thread begins or stops waiting.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
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

/// How often a thread that waits beside another one polls the work itself: this may be a forked child, or the other
/// thread may be stopped or in a signal handler.
const LOOK: Duration = Duration::from_secs(1);

/// One operation under way, or its outcome.
pub(crate) struct Op {
    inner: Arc<Inner>,
}

struct Inner {
    /// The generation of the process that started it.
    generation: u64,
    /// The future. Locked while it is polled. Cancelling takes it out and drops it at once.
    work: Mutex<Option<Work>>,
    runner: Mutex<Runner>,
    // A mutex of the standard library, because `done` needs one.
    state: std::sync::Mutex<State>,
    done: Condvar,
}

/// Which thread or task polls the work when it is woken.
enum Runner {
    /// A task, to be started when the work is woken.
    Task,
    /// A task that was started.
    StartedTask,
    /// A waiting thread, with its waker. `None`: it has not polled yet, and is about to.
    Thread(Option<Waker>),
}

type Work = Pin<Box<dyn Future<Output = Outcome> + Send>>;
pub(crate) type Outcome = Result<Output, Failure>;

/// The result of an operation that succeeded.
pub(crate) enum Output {
    Nothing,
    Granted(HoldId),
    Client(Client),
    List(List),
    Ping(Ping),
    Fence(u64),
}

/// Undoes a grant that was not reported to a caller.
pub(crate) type GiveBack = Box<dyn FnOnce(HoldId) + Send + Sync>;

struct State {
    outcome: Option<Outcome>,
    /// Whether the outcome was reported. If not, a grant is given back when the operation is dropped.
    told: bool,
    /// Gives the grant back.
    give_back: Option<GiveBack>,
    signal: Option<Signal>,
    /// How many threads wait besides the one that polls the work.
    beside: usize,
}

impl State {
    fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
        if let Some(signal) = &self.signal {
            signal.set(true);
        }
    }
}

impl Op {
    /// Starts an operation for an answer. `give_back` undoes a grant that was not reported. An invalid argument starts
    /// no operation: the error is returned at once.
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
        let (work, outcome) = match answer {
            Answer::Now(result) => (None, Some(result.map_err(Failure::from).and_then(convert))),
            Answer::Later(answer) => {
                // Checked now, because a task may have to be started later, where a failure could not be reported.
                runtime::handle()?;
                let work: Work = Box::pin(async move { answer.await.map_err(Failure::from).and_then(convert) });
                (Some(work), None)
            }
        };
        let under_way = work.is_some();
        let inner = Arc::new(Inner {
            generation: process::generation(),
            work: Mutex::new(work),
            runner: Mutex::new(Runner::Task),
            state: std::sync::Mutex::new(State { outcome, told: false, give_back, signal: None, beside: 0 }),
            done: Condvar::new(),
        });
        if under_way {
            // From now on the operation continues without its caller. The thread that started it will most likely wait
            // for it next.
            runtime::poll_ahead(|| inner.poll());
        }
        Ok(Op { inner })
    }

    fn inner(&self) -> Result<&Arc<Inner>, Failure> {
        if self.inner.is_the_parents() {
            return Err(Failure {
                status: NBL_ERR_FORKED,
                message: "the operation belongs to the process that this one was forked from".to_string(),
            });
        }
        Ok(&self.inner)
    }

    pub fn descriptor(&self) -> Result<i32, Failure> {
        let inner = self.inner()?;
        // With a descriptor, threads are not expected to wait in the library, so this poll leaves the connection to the
        // library's own threads.
        inner.poll();
        let mut state = inner.lock();
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

    /// The outcome's status and message. Marks the outcome as reported.
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

    /// Waits for the outcome, at most until `until`.
    pub fn wait(&self, until: Boottime) -> Result<nbl_status_t, Failure> {
        let inner = self.inner()?;
        if !inner.has_ended() && !until.has_passed() {
            match Attendance::begin(inner) {
                Some(attendance) => attendance.wait(until)?,
                None => self.wait_beside(until)?,
            }
        }
        self.finish()
    }

    /// Waits for the outcome, at most until `until`, while another thread polls the work.
    fn wait_beside(&self, until: Boottime) -> Result<(), Failure> {
        let inner = self.inner()?;
        while !until.has_passed() {
            let left = until.since(Boottime::now()).min(LOOK);
            let mut state = inner.lock();
            state.beside += 1;
            let waited = inner.done.wait_timeout_while(state, left, |state| state.outcome.is_none());
            let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            state.beside -= 1;
            drop(state);
            if !waited.timed_out() {
                break;
            }
            self.inner()?.poll();
        }
        Ok(())
    }

    pub fn cancel(&self) -> Result<(), Failure> {
        self.inner()?.cancel();
        Ok(())
    }

    /// Takes a result out. Succeeds once.
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
        match self.inner.is_the_parents() {
            false => self.inner.cancel(),
            // In a forked child, the operation belongs to the parent: it is leaked, so that nothing of it is dropped
            // here.
            true => std::mem::forget(Arc::clone(&self.inner)),
        }
    }
}

/// While it lives, this thread is the one that polls the work.
struct Attendance<'a>(&'a Arc<Inner>);

impl Attendance<'_> {
    /// `None`: another thread polls it.
    fn begin(inner: &Arc<Inner>) -> Option<Attendance<'_>> {
        let mut runner = inner.runner.lock();
        match *runner {
            Runner::Thread(_) => None,
            Runner::Task | Runner::StartedTask => {
                *runner = Runner::Thread(None);
                Some(Attendance(inner))
            }
        }
    }

    /// Waits for the outcome, at most until `until`.
    fn wait(self, until: Boottime) -> Result<(), Failure> {
        let mut ended = pin!(poll_fn(|context| {
            self.0.woken_by(context.waker());
            // Cancelling may drop the work while this thread sleeps, and with it the mapping of such a word.
            runtime::refuse_words();
            if self.0.poll() { Poll::Ready(()) } else { Poll::Pending }
        }));
        runtime::block_on(runtime::until(until, &mut ended))?;
        Ok(())
    }
}

impl Drop for Attendance<'_> {
    fn drop(&mut self) {
        let inner = self.0;
        if inner.is_the_parents() {
            return;
        }
        *inner.runner.lock() = Runner::Task;
        if !inner.has_ended() {
            // The work may have been woken since this thread polled it last.
            Wake::wake_by_ref(inner);
        }
    }
}

/// The waker of the work.
impl Wake for Inner {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.is_the_parents() {
            return;
        }
        let mut runner = self.runner.lock();
        match &*runner {
            Runner::StartedTask => {}
            Runner::Thread(waker) => {
                let waker = waker.clone();
                drop(runner);
                waker.into_iter().for_each(Waker::wake);
            }
            Runner::Task => {
                *runner = Runner::StartedTask;
                drop(runner);
                let inner = Arc::clone(self);
                // This does not fail: the runtime has been running since the operation was started.
                if let Ok(handle) = runtime::handle() {
                    handle.spawn(async move { inner.poll_in_task() });
                }
            }
        }
    }
}

impl Inner {
    fn is_the_parents(&self) -> bool {
        self.generation != process::generation()
    }

    fn has_ended(&self) -> bool {
        self.lock().outcome.is_some()
    }

    /// Sets the waker of the thread that polls the work.
    fn woken_by(&self, waker: &Waker) {
        if let Runner::Thread(known) = &mut *self.runner.lock()
            && !known.as_ref().is_some_and(|known| known.will_wake(waker))
        {
            *known = Some(waker.clone());
        }
    }

    fn poll_in_task(self: &Arc<Self>) {
        {
            let mut runner = self.runner.lock();
            let Runner::StartedTask = *runner else { return };
            // Set before polling: if the work is woken meanwhile, another task is started.
            *runner = Runner::Task;
        }
        self.poll();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Polls the work. Returns whether it has ended.
    fn poll(self: &Arc<Self>) -> bool {
        if self.is_the_parents() {
            return false;
        }
        let waker = Waker::from(Arc::clone(self));
        let mut work = self.work.lock();
        let Some(under_way) = work.as_mut() else { return true };
        let polled = catch_unwind(AssertUnwindSafe(|| under_way.as_mut().poll(&mut Context::from_waker(&waker))));
        // A panic becomes the outcome, so that waiting threads get it as well.
        let outcome = match polled {
            Ok(Poll::Pending) => return false,
            Ok(Poll::Ready(outcome)) => outcome,
            Err(panic) => Err(Failure::panicked(&*panic)),
        };
        *work = None;
        self.lock().end(outcome);
        drop(work);
        self.tell_waiting();
        true
    }

    /// Wakes the threads that wait for the outcome.
    fn tell_waiting(&self) {
        // Only if there are waiters, because it is a system call.
        if self.lock().beside > 0 {
            self.done.notify_all();
        }
        let attendant = match &*self.runner.lock() {
            Runner::Thread(waker) => waker.clone(),
            Runner::Task | Runner::StartedTask => None,
        };
        attendant.into_iter().for_each(Waker::wake);
    }

    fn cancel(&self) {
        let mut work = self.work.lock();
        let under_way = work.take();
        let mut state = self.lock();
        let mut unneeded = None;
        let unseen = match &state.outcome {
            None => {
                let message = "the operation was cancelled".to_string();
                state.end(Err(Failure { status: NBL_CANCELLED, message }));
                // It keeps the lock's client alive. The pending request has this object as its waker, and the
                // connection's own thread, which may drop the waker last, must not close the client.
                unneeded = state.give_back.take();
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
        // Dropping the work makes the lock idle. This comes first, so that a caller that is notified of the
        // cancellation finds it idle.
        let was_under_way = under_way.is_some();
        drop((under_way, unneeded));
        drop(work);
        if was_under_way {
            self.tell_waiting();
        }
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
    use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
    use std::thread::{self, ThreadId};

    use tokio::sync::oneshot;

    use super::*;
    use crate::ffi::status::NBL_ERR_INTERNAL;
    use crate::sys::runtime::{Driven, Source};
    use crate::sys::testing::fork_at;

    fn start(work: impl Future<Output = Result<(), Error>> + Send + 'static) -> Op {
        Op::start(Answer::later(work), |()| Ok(Output::Nothing), None)
            .unwrap_or_else(|failure| panic!("{}", failure.message))
    }

    /// An operation that ends when a message is sent to it.
    fn told() -> (oneshot::Sender<()>, Op) {
        let (tell, told) = oneshot::channel();
        (tell, start(async move { told.await.map_err(|_| Error::new(ErrorKind::Lost, "nobody tells it")) }))
    }

    /// The status that a call has reported.
    fn status(reported: Result<nbl_status_t, Failure>) -> nbl_status_t {
        reported.unwrap_or_else(|failure| failure.status)
    }

    fn soon(milliseconds: u64) -> Boottime {
        Boottime::now() + Duration::from_millis(milliseconds)
    }

    /// Waits for the descriptor like an event loop.
    fn becomes_readable(descriptor: i32) -> bool {
        let mut polled = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which outlives the call.
        unsafe { libc::poll(&mut polled, 1, 60_000) == 1 }
    }

    /// Whether a waiting thread polls the work.
    fn is_attended(op: &Op) -> bool {
        matches!(*op.inner.runner.lock(), Runner::Thread(Some(_)))
    }

    fn until_attended(op: &Op) {
        while !is_attended(op) {
            thread::yield_now();
        }
    }

    #[test]
    fn a_panic_is_an_outcome() {
        // Polled in the thread that starts it, in a task, and in the thread that waits.
        let panics = || async { panic!("on purpose") };
        let at_once = start(panics());
        let (tell, told) = oneshot::channel::<()>();
        let in_task = start(async move {
            let _ = told.await;
            panics().await
        });
        let descriptor = in_task.descriptor().unwrap_or(-1);
        tell.send(()).unwrap();
        assert!(becomes_readable(descriptor));
        let mut polls = 0;
        let waited_for = start(poll_fn(move |_| {
            polls += 1;
            if polls > 1 { panic!("on purpose") } else { Poll::Pending }
        }));
        for op in [at_once, in_task, waited_for] {
            let failure = op.wait(Boottime::NEVER).expect_err("it panicked");
            assert_eq!(failure.status, NBL_ERR_INTERNAL);
            assert!(failure.message.contains("on purpose"), "{}", failure.message);
        }
    }

    #[test]
    fn it_goes_on_while_no_thread_waits() {
        let (tell, op) = told();
        assert_eq!(status(op.finish()), NBL_PENDING);
        tell.send(()).unwrap();
        while status(op.finish()) == NBL_PENDING {
            thread::yield_now();
        }
        assert_eq!(status(op.finish()), NBL_OK);
    }

    /// The work wakes its waker in the last poll by the thread.
    #[test]
    fn a_call_to_a_thread_that_stops_waiting_is_not_lost() {
        let limit = Arc::new(Mutex::new(Boottime::NEVER));
        let calls = Arc::new(AtomicUsize::new(0));
        let op = {
            let (limit, calls, mut polls) = (Arc::clone(&limit), Arc::clone(&calls), 0);
            start(poll_fn(move |context| {
                polls += 1;
                match polls {
                    // The polls by `start` and by `descriptor`.
                    1 | 2 => Poll::Pending,
                    3 => {
                        let limit = *limit.lock();
                        while !limit.has_passed() {
                            std::hint::spin_loop();
                        }
                        context.waker().wake_by_ref();
                        calls.fetch_add(1, Ordering::SeqCst);
                        Poll::Pending
                    }
                    _ => Poll::Ready(Ok(())),
                }
            }))
        };
        let descriptor = op.descriptor().unwrap_or(-1);
        while calls.load(Ordering::SeqCst) == 0 {
            let until = soon(20);
            *limit.lock() = until;
            op.wait(until).unwrap_or_else(|failure| panic!("{}", failure.message));
            assert!(until.has_passed());
        }
        assert!(becomes_readable(descriptor), "no task has polled it since");
        assert_eq!(status(op.finish()), NBL_OK);
    }

    /// The answer comes at any moment while a thread begins to wait, waits, or stops.
    #[test]
    fn an_answer_may_come_whenever_a_thread_begins_or_stops_to_wait() {
        for round in 0..2000 {
            let (tell, op) = told();
            let descriptor = op.descriptor().unwrap_or(-1);
            thread::scope(|scope| {
                scope.spawn(|| tell.send(()).unwrap());
                let until = Boottime::now() + Duration::from_micros(round % 200);
                let waited = status(op.wait(until));
                assert!(waited == NBL_OK || until.has_passed());
                assert!(becomes_readable(descriptor), "round {round}");
                assert_eq!(status(op.finish()), NBL_OK);
            });
        }
    }

    #[test]
    fn a_wait_ends_with_its_time() {
        let (tell, op) = told();
        let until = soon(20);
        assert_eq!(status(op.wait(until)), NBL_PENDING);
        assert!(until.has_passed());
        tell.send(()).unwrap();
        assert_eq!(status(op.wait(Boottime::NEVER)), NBL_OK);
    }

    #[test]
    fn threads_may_wait_beside_each_other() {
        // The first thread stops waiting before the outcome, or stays.
        for first_waits_for in [1, 60_000] {
            let (tell, op) = told();
            thread::scope(|scope| {
                let first = scope.spawn(|| status(op.wait(soon(first_waits_for))));
                if first_waits_for > 1 {
                    until_attended(&op);
                }
                let others = [(); 2].map(|()| scope.spawn(|| status(op.wait(Boottime::NEVER))));
                if first_waits_for == 1 {
                    assert_eq!(first.join().unwrap(), NBL_PENDING);
                    tell.send(()).unwrap();
                } else {
                    tell.send(()).unwrap();
                    assert_eq!(first.join().unwrap(), NBL_OK);
                }
                others.into_iter().for_each(|other| assert_eq!(other.join().unwrap(), NBL_OK));
            });
        }
    }

    /// The thread that polls may be in a signal handler.
    #[test]
    fn a_thread_that_stands_still_keeps_nothing_from_others() {
        let (tell, op) = told();
        let stands_still = Attendance::begin(&op.inner);
        tell.send(()).unwrap();
        assert_eq!(status(op.wait(Boottime::NEVER)), NBL_OK);
        drop(stands_still);
    }

    #[test]
    fn cancelling_ends_the_wait_of_a_thread_and_drops_the_work() {
        struct Noted(Arc<AtomicBool>);
        impl Drop for Noted {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        for _ in 0..100 {
            let dropped = Arc::new(AtomicBool::new(false));
            let noted = Noted(Arc::clone(&dropped));
            let op = start(async move {
                let _noted = noted;
                std::future::pending().await
            });
            thread::scope(|scope| {
                let waiting = [(); 2].map(|()| scope.spawn(|| status(op.wait(Boottime::NEVER))));
                until_attended(&op);
                op.cancel().unwrap_or_else(|failure| panic!("{}", failure.message));
                assert!(dropped.load(Ordering::SeqCst));
                waiting.into_iter().for_each(|waiting| assert_eq!(waiting.join().unwrap(), NBL_CANCELLED));
            });
        }
    }

    /// A freed operation leaves nothing in memory that keeps itself alive.
    #[test]
    fn a_dropped_operation_is_freed() {
        let (_tell, op) = told();
        assert_eq!(status(op.wait(soon(1))), NBL_PENDING);
        let inner = Arc::downgrade(&op.inner);
        drop(op);
        // A task may still have a reference for a moment.
        while inner.upgrade().is_some() {
            thread::yield_now();
        }
    }

    /// Otherwise, the thread that drops the last waker might close a client.
    #[test]
    fn the_waker_of_a_dropped_operation_keeps_no_lock() {
        let (kept, waker) = (Arc::new(()), Arc::new(Mutex::new(None)));
        let (lock, noted) = (Arc::downgrade(&kept), Arc::clone(&waker));
        let answer = Answer::<(), Error>::later(poll_fn(move |context| {
            *noted.lock() = Some(context.waker().clone());
            Poll::Pending
        }));
        let give_back: GiveBack = Box::new(move |_| drop(kept));
        drop(Op::start(answer, |()| Ok(Output::Nothing), Some(give_back)));
        assert!(lock.upgrade().is_none());
        waker.lock().take().unwrap().wake();
    }

    /// A connection on which a reply arrives as soon as a thread waits for it.
    struct Line {
        tell: Mutex<Option<oneshot::Sender<()>>>,
        awaited: usize,
        waited: Mutex<Vec<ThreadId>>,
        listens: AtomicUsize,
    }

    impl Driven for Line {
        fn source(&self) -> &dyn Source {
            self
        }

        fn take_in(&self) -> bool {
            self.tell.lock().take().is_some_and(|tell| tell.send(()).is_ok())
        }

        fn awaited(&self) -> usize {
            self.awaited
        }
    }

    impl Source for Line {
        fn begin(&self) -> bool {
            true
        }

        fn wait(&self, _limit: Boottime) -> bool {
            self.waited.lock().push(thread::current().id());
            true
        }

        fn end(&self, _expects: bool) {}

        fn listen(&self) {
            self.listens.fetch_add(1, Ordering::SeqCst);
        }

        fn is_shared(&self) -> bool {
            false
        }

        fn wake(&self) {}
    }

    /// An operation whose reply comes on a connection on which `awaited` replies are expected.
    fn on_line(awaited: usize) -> (Arc<Line>, Op) {
        let (tell, mut told) = oneshot::channel();
        let (waited, listens) = (Mutex::default(), AtomicUsize::new(0));
        let line = Arc::new(Line { tell: Mutex::new(Some(tell)), awaited, waited, listens });
        let driven = Arc::clone(&line);
        let op = start(poll_fn(move |context| {
            let told = Pin::new(&mut told).poll(context);
            if told.is_pending() {
                runtime::drive(Arc::clone(&driven) as Arc<dyn Driven>);
            }
            told.map(|_| Ok(()))
        }));
        (line, op)
    }

    /// No other thread has to read the reply first, and then wake this one.
    #[test]
    fn a_thread_that_waits_reads_the_connection() {
        let (line, op) = on_line(1);
        assert_eq!(status(op.wait(Boottime::NEVER)), NBL_OK);
        assert_eq!(*line.waited.lock(), [thread::current().id()]);
        assert_eq!(line.listens.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn the_library_reads_a_connection_for_an_event_loop_and_for_others() {
        let (line, op) = on_line(1);
        assert_eq!(line.listens.load(Ordering::SeqCst), 0);
        op.descriptor().unwrap_or_else(|failure| panic!("{}", failure.message));
        assert_eq!(line.listens.load(Ordering::SeqCst), 1);
        let (line, _op) = on_line(2);
        assert_eq!(line.listens.load(Ordering::SeqCst), 1);
    }

    /// Such a word may be unmapped while the thread sleeps, if the operation is cancelled.
    #[test]
    fn a_thread_sleeps_on_no_word_of_an_operations_work() {
        let could = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&could);
        let op = start(poll_fn(move |_| {
            noted.lock().push(runtime::sleeps_on_words());
            if noted.lock().len() == 1 { Poll::Pending } else { Poll::Ready(Ok(())) }
        }));
        assert_eq!(status(op.wait(Boottime::NEVER)), NBL_OK);
        assert_eq!(*could.lock(), [false, false]);
    }

    /// The work may need a mutex that another thread had locked at the fork.
    #[test]
    fn a_child_forked_while_its_thread_waits_touches_nothing_of_the_parents() {
        let forked = fork_at(libc::SIGUSR2);
        struct LeftAlone(&'static AtomicI32);
        impl Drop for LeftAlone {
            fn drop(&mut self) {
                if self.0.load(Ordering::SeqCst) == 0 {
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(3) };
                }
            }
        }
        let (tell, mut told) = oneshot::channel::<()>();
        let left_alone = LeftAlone(forked);
        let op = start(poll_fn(move |context| {
            let _ = &left_alone;
            if forked.load(Ordering::SeqCst) == 0 {
                // SAFETY: ends the child.
                unsafe { libc::_exit(1) };
            }
            Pin::new(&mut told).poll(context).map(|_| Ok(()))
        }));
        let waiting = AtomicU64::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: asks for a number.
                waiting.store(unsafe { libc::pthread_self() }, Ordering::SeqCst);
                let waited = status(op.wait(Boottime::NEVER));
                if forked.load(Ordering::SeqCst) == 0 {
                    drop(Op { inner: Arc::clone(&op.inner) });
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(if waited == NBL_ERR_FORKED { 0 } else { 2 }) };
                }
                assert_eq!(waited, NBL_OK);
            });
            until_attended(&op);
            // SAFETY: the thread has not ended.
            assert_eq!(unsafe { libc::pthread_kill(waiting.load(Ordering::SeqCst), libc::SIGUSR2) }, 0);
            let child = std::iter::repeat_with(|| forked.load(Ordering::SeqCst)).find(|child| *child != -1).unwrap();
            let mut status = 0;
            // SAFETY: writes one integer.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            tell.send(()).unwrap();
            assert_eq!(status, 0, "exit status 1: it polled; 2: it got no error; 3: it dropped; signal 14: it hung");
        });
    }
}
