//! The library's own tokio runtime, and its timers.
//!
//! One runtime for the process, started when it is first needed and started afresh after a fork (the
//! parent's is leaked in the child: its threads are not there). Its timers run on `CLOCK_BOOTTIME`,
//! which tokio's do not.

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Condvar};
use std::task::{Context, Poll, Wake, Waker};
use std::{io, mem, ptr, thread};

use tokio::io::unix::AsyncFd;

use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::mutex::Mutex;
use crate::process::PerProcess;
use crate::store::Answer;

static RUNTIME: PerProcess<Runtime> = PerProcess::new();

struct Runtime {
    /// `None` only while this is dropped.
    tokio: Option<tokio::runtime::Runtime>,
    timers: Arc<Timers>,
}

impl Drop for Runtime {
    /// Of two threads that started one at once, the slower drops its own, perhaps inside somebody else's
    /// runtime, where waiting for threads to end is a panic.
    fn drop(&mut self) {
        if let Some(tokio) = self.tokio.take() {
            tokio.shutdown_background();
        }
    }
}

/// The runtime's handle; starts it if need be. Fails when the system gives no threads or descriptors.
pub fn handle() -> Result<&'static tokio::runtime::Handle, Error> {
    Ok(runtime()?.tokio.as_ref().expect("it is taken only by drop").handle())
}

fn runtime() -> Result<&'static Runtime, Error> {
    RUNTIME.get_or_try_init(|_| start()).map_err(|error| {
        Error::new(ErrorKind::Resources, format!("the library's threads could not be started: {error}"))
    })
}

/// How many threads run what the library has under way.
const WORKERS: usize = 2;

/// How many threads may wait for what cannot be waited for otherwise. Each store takes a few of them at most, so
/// that one that hangs leaves the others room.
const MAX_BLOCKING: usize = 64;

fn start() -> io::Result<Runtime> {
    let timers = Arc::new(Timers::new()?);
    // Where the system gives no thread, tokio panics, or hangs when it gives one and not the next.
    with_signals_blocked(|| threads_can_be_had(WORKERS))?;
    let tokio = with_signals_blocked(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(MAX_BLOCKING)
            .thread_name("nblock")
            .enable_io()
            .build()
    })?;
    let descriptor = {
        let _inside = tokio.enter();
        // SAFETY: the descriptor is the AsyncFd's own, open until it is dropped.
        unsafe { AsyncFd::register(timers.descriptor.try_clone()?) }.map_err(io::Error::from)?
    };
    tokio.spawn(Arc::clone(&timers).run(descriptor));
    Ok(Runtime { tokio: Some(tokio), timers })
}

/// Starts so many threads at once, which end again.
fn threads_can_be_had(count: usize) -> io::Result<()> {
    let all_started = Mutex::new(());
    thread::scope(|scope| {
        let started = all_started.lock();
        let thread = || thread::Builder::new().spawn_scoped(scope, || drop(all_started.lock())).map(drop);
        let outcome = (0..count).try_for_each(|_| thread());
        drop(started);
        outcome
    })
}

/// Runs `spawn` so that the threads it starts take no signals: they belong to the program's threads.
pub fn with_signals_blocked<T>(spawn: impl FnOnce() -> T) -> T {
    struct Before(libc::sigset_t);
    impl Drop for Before {
        // Also when `spawn` panics: the thread is the program's.
        fn drop(&mut self) {
            // SAFETY: the set was filled in by the system; the mask is this thread's own.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, ptr::null_mut()) };
        }
    }
    // SAFETY: both sets are initialised before they are read; the mask is this thread's own.
    let _before = unsafe {
        let mut all: libc::sigset_t = mem::zeroed();
        let mut before: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        Before(before)
    };
    spawn()
}

/// Runs a future to its end on the calling thread, which waits. The runtime is started for it.
pub fn block_on<F: Future>(future: F) -> Result<F::Output, Error> {
    runtime()?;
    let parker = Arc::new(Parker::default());
    let waker = Waker::from(Arc::clone(&parker));
    let mut context = Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Ok(output);
        }
        parker.park();
    }
}

/// The answer itself; the calling thread waits where it is not there yet.
pub fn wait<T>(answer: Answer<T, Error>) -> Result<T, Error> {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(answer) => block_on(answer)?,
    }
}

#[derive(Default)]
struct Parker {
    woken: std::sync::Mutex<bool>,
    condition: Condvar,
}

impl Parker {
    fn park(&self) {
        let mut woken = self.woken.lock().expect("nothing panics while it holds this");
        while !*woken {
            woken = self.condition.wait(woken).expect("nothing panics while it holds this");
        }
        *woken = false;
    }
}

impl Wake for Parker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        *self.woken.lock().expect("nothing panics while it holds this") = true;
        self.condition.notify_one();
    }
}

/// Waits until a moment. The runtime is started for it; where that fails, this panics: who may be the first to wait
/// asks for the [`handle`] before.
pub fn sleep_until(at: Boottime) -> Sleep {
    Sleep { at, id: None }
}

pub struct Sleep {
    at: Boottime,
    id: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.at.has_passed() {
            self.forget();
            return Poll::Ready(());
        }
        if self.at != Boottime::NEVER {
            self.id = Some(timers().set(self.at, self.id, context.waker()));
        }
        Poll::Pending
    }
}

impl Sleep {
    fn forget(&mut self) {
        // In a forked child there is nothing to forget: the timer is the parent's.
        if let (Some(id), Some(runtime)) = (self.id.take(), RUNTIME.current()) {
            runtime.timers.forget(self.at, id);
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget();
    }
}

fn timers() -> &'static Timers {
    &runtime().expect("the runtime of a timer runs, or can be started").timers
}

/// What `future` gives, or `None` when `at` came first. Dropping the future is the caller's decision.
pub async fn until<F: Future + Unpin>(at: Boottime, future: &mut F) -> Option<F::Output> {
    let mut sleep = sleep_until(at);
    std::future::poll_fn(|context| {
        if let Poll::Ready(output) = Pin::new(&mut *future).poll(context) {
            return Poll::Ready(Some(output));
        }
        Pin::new(&mut sleep).poll(context).map(|()| None)
    })
    .await
}

struct Timers {
    descriptor: OwnedFd,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    wakers: BTreeMap<(Boottime, u64), Waker>,
    last_id: u64,
    /// What the descriptor is set to. It may be set to a moment nobody waits for any more.
    set_to: Option<Boottime>,
}

impl Timers {
    fn new() -> io::Result<Timers> {
        // SAFETY: makes a descriptor, which nobody else has.
        let descriptor = unsafe { libc::timerfd_create(libc::CLOCK_BOOTTIME, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        Ok(Timers { descriptor, waiting: Mutex::default() })
    }

    fn set(&self, at: Boottime, id: Option<u64>, waker: &Waker) -> u64 {
        let mut waiting = self.waiting.lock();
        let id = id.unwrap_or_else(|| {
            waiting.last_id += 1;
            waiting.last_id
        });
        match waiting.wakers.get_mut(&(at, id)) {
            Some(known) => known.clone_from(waker),
            None => {
                waiting.wakers.insert((at, id), waker.clone());
            }
        }
        if waiting.set_to.is_none_or(|set_to| at < set_to) {
            self.arm(at);
            waiting.set_to = Some(at);
        }
        id
    }

    fn forget(&self, at: Boottime, id: u64) {
        self.waiting.lock().wakers.remove(&(at, id));
    }

    fn arm(&self, at: Boottime) {
        let nanos = at.as_nanos().max(1);
        // SAFETY: itimerspec is plain integers; the descriptor is a timer of ours.
        let status = unsafe {
            let mut timer: libc::itimerspec = mem::zeroed();
            timer.it_value.tv_sec = (nanos / 1_000_000_000).min(i64::MAX as u64) as i64;
            timer.it_value.tv_nsec = (nanos % 1_000_000_000) as i64;
            libc::timerfd_settime(self.descriptor.as_raw_fd(), libc::TFD_TIMER_ABSTIME, &timer, ptr::null_mut())
        };
        debug_assert_eq!(status, 0, "{}", io::Error::last_os_error());
    }

    async fn run(self: Arc<Self>, descriptor: AsyncFd<OwnedFd>) {
        loop {
            let Ok(mut ready) = descriptor.readable().await else { return };
            let mut fired = [0u8; 8];
            // SAFETY: reads at most eight bytes into an array of eight.
            unsafe { libc::read(descriptor.as_raw_fd(), fired.as_mut_ptr().cast(), fired.len()) };
            ready.clear_ready();
            self.fire();
        }
    }

    fn fire(&self) {
        let due = {
            let mut waiting = self.waiting.lock();
            let later = waiting.wakers.split_off(&(Boottime::now() + std::time::Duration::from_nanos(1), 0));
            let due = mem::replace(&mut waiting.wakers, later);
            waiting.set_to = waiting.wakers.first_key_value().map(|((at, _), _)| *at);
            if let Some(at) = waiting.set_to {
                self.arm(at);
            }
            due
        };
        for waker in due.into_values() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// As the slower of two threads does that start the runtime at once.
    #[test]
    fn a_runtime_may_be_dropped_inside_another() {
        let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
        other.block_on(async { drop(start().unwrap()) });
    }

    #[test]
    fn sleeps_end_and_not_early() {
        let start = Boottime::now();
        let order = Arc::new(Mutex::new(Vec::new()));
        let sleeps: Vec<_> = [30u64, 10, 20, 0]
            .into_iter()
            .map(|ms| {
                let order = Arc::clone(&order);
                handle().unwrap().spawn(async move {
                    let at = start + Duration::from_millis(ms);
                    sleep_until(at).await;
                    assert!(Boottime::now() >= at);
                    order.lock().push(ms);
                })
            })
            .collect();
        for sleep in sleeps {
            block_on(sleep).unwrap().unwrap();
        }
        // Which of two that are due together runs first is the scheduler's affair.
        let mut ended = order.lock().clone();
        ended.sort_unstable();
        assert_eq!(ended, [0, 10, 20, 30]);
    }

    #[test]
    fn a_future_that_never_ends_is_given_up() {
        let at = Boottime::now() + Duration::from_millis(5);
        let given_up = block_on(until(at, &mut std::future::pending::<()>())).unwrap();
        assert_eq!(given_up, None);
        assert!(Boottime::now() >= at);
    }
}
