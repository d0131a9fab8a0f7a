//! The library's own tokio runtime, and its timers.
//!
//! There is one runtime per process. It is started when it is first needed, and again after a fork (the child leaks the
//! parent's, whose threads it does not have). The timers run on `CLOCK_BOOTTIME`, which tokio's do not.
//!
//! Runtime and timers have no descriptor: all their waiting is on futexes. A program that closes the library's
//! descriptors (R26) stops neither timeouts nor renewals. Sockets have their own thread, see `sockets.rs`.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;
use std::{io, mem, ptr, thread};

use super::mutex::Mutex;
use super::process::{self, PerProcess};
use crate::clock::{self, Boottime};
use crate::error::{Error, ErrorKind};
use crate::store::Answer;

static RUNTIME: PerProcess<Runtime> = PerProcess::new();

struct Runtime {
    /// `None` only while this is dropped.
    tokio: Option<tokio::runtime::Runtime>,
    timers: Arc<Timers>,
}

impl Drop for Runtime {
    /// If two threads start the runtime at the same time, one of them drops its own, perhaps inside a runtime of the
    /// program, where a blocking shutdown would panic.
    fn drop(&mut self) {
        self.timers.stop();
        if let Some(tokio) = self.tokio.take() {
            tokio.shutdown_background();
        }
    }
}

/// The runtime's handle. Starts the runtime if necessary. Fails if threads or descriptors cannot be created.
pub fn handle() -> Result<&'static tokio::runtime::Handle, Error> {
    Ok(runtime()?.tokio.as_ref().expect("it is taken only by drop").handle())
}

fn runtime() -> Result<&'static Runtime, Error> {
    RUNTIME.get_or_try_init(|_| start()).map_err(|error| {
        Error::new(ErrorKind::Resources, format!("the library's threads could not be started: {error}"))
    })
}

/// The number of worker threads.
const WORKERS: usize = 2;

/// The most threads for blocking calls. Each store uses only a few of them, so a store that hangs leaves enough for the
/// others.
const MAX_BLOCKING: usize = 64;

fn start() -> io::Result<Runtime> {
    process::check().map_err(|error| io::Error::other(error.message().to_string()))?;
    // Tried first: if no thread can be created, tokio panics, and if only some can, it hangs.
    with_signals_blocked(|| threads_can_be_had(WORKERS + 1))?;
    let timers = Arc::new(Timers::default());
    let thread = Arc::clone(&timers);
    with_signals_blocked(|| {
        thread::Builder::new().name("nblock-timer".to_string()).stack_size(256 << 10).spawn(move || thread.run())
    })?;
    let tokio = with_signals_blocked(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(MAX_BLOCKING)
            .thread_name("nblock")
            .build()
    });
    let tokio = tokio.inspect_err(|_| timers.stop())?;
    Ok(Runtime { tokio: Some(tokio), timers })
}

/// Starts `count` threads at the same time, which then end.
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

/// Runs `spawn` with all signals blocked, so that the threads it starts take none: signals belong to the program's
/// threads.
pub fn with_signals_blocked<T>(spawn: impl FnOnce() -> T) -> T {
    struct Before(libc::sigset_t);
    impl Drop for Before {
        // Also if `spawn` panics: this is a thread of the program.
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

/// Runs a future to its end on the calling thread, which waits. Starts the runtime if necessary.
///
/// A signal handler may fork while the thread waits. The child has none of the threads that would end the wait, so the
/// call returns an error there.
pub fn block_on<F: Future>(future: F) -> Result<F::Output, Error> {
    runtime()?;
    let generation = process::generation();
    let parker = Arc::new(Parker::default());
    let _watched = Parked::begin(&parker);
    let offer = Offered::begin();
    let waker = Waker::from(Arc::clone(&parker));
    let mut context = Context::from_waker(&waker);
    let mut future = Abandoned { future: mem::ManuallyDrop::new(Box::pin(future)), generation };
    // Declared last: the turn must end before the future is dropped.
    let mut turn = None;
    loop {
        offer.forget();
        let polled = future.future.as_mut().poll(&mut context);
        if generation != process::generation() {
            return Err(Error::forked_during_call());
        }
        if let Poll::Ready(output) = polled {
            return Ok(output);
        }
        match offer.driven() {
            Some(driven) => parker.drive(&mut turn, driven, offer.earliest(), generation),
            None => {
                turn = None;
                parker.park(generation, offer.word());
            }
        }
        // In a forked child, the future may need mutexes that are locked by threads which do not exist there.
        if generation != process::generation() {
            return Err(Error::forked_during_call());
        }
    }
}

/// A future that is not dropped in a forked child: its work continues in the parent.
struct Abandoned<F> {
    future: mem::ManuallyDrop<Pin<Box<F>>>,
    generation: u64,
}

impl<F> Drop for Abandoned<F> {
    fn drop(&mut self) {
        if self.generation == process::generation() {
            // SAFETY: dropped once, and not used after that.
            unsafe { mem::ManuallyDrop::drop(&mut self.future) };
        }
    }
}

/// The value of an answer. Waits for it on the calling thread; the call that returned the answer sets the limit.
#[inline(always)]
pub fn wait<T>(answer: Answer<T, Error>) -> Result<T, Error> {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(answer) => block_on(answer)?,
    }
}

/// The state of a waiting thread, and what it drives.
#[derive(Default)]
struct Parker {
    /// One of the values below. The thread sleeps on this word.
    state: AtomicU32,
    driven: Mutex<Option<Arc<dyn Driven>>>,
}

const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;
/// The thread waits inside the connection that it drives.
const DRIVING: u32 = 2;
const WOKEN: u32 = 3;
/// In a forked child: no thread will wake this one.
const FORKED: u32 = 4;

/// The longest sleep of a thread. A child made by a bare `clone` call runs no fork handler, and notices the fork when
/// this has passed.
const LONGEST_PARK: Duration = Duration::from_secs(10);

/// A connection that a thread drives while it waits for a reply on it, so that no other thread has to be woken first.
pub trait Driven: Send + Sync {
    /// Where its bytes come from.
    fn source(&self) -> &dyn Source;

    /// Processes what has arrived, without waiting. `false`: there is nothing more to drive.
    fn take_in(&self) -> bool;

    /// How many replies and notifications have a waiter. More than two may be counted as two.
    fn awaited(&self) -> usize;
}

/// A source of bytes that is polled by one thread at a time, in turns.
pub trait Source: Send + Sync {
    /// Begins a turn. `false`: another thread has the turn, or the source is gone.
    fn begin(&self) -> bool;

    /// Waits until something has arrived, `wake` was called, or `limit` has passed; may return earlier. `false`: the
    /// source is gone.
    fn wait(&self, limit: Boottime) -> bool;

    /// Ends the turn. `expects`: whether others still wait for data, which must then be noticed at once.
    fn end(&self, expects: bool);

    /// There is a waiter that cannot have the turn. It must get its data even if the thread whose turn it is is
    /// stopped.
    fn listen(&self);

    /// Whether there are waiters besides the thread whose turn it is.
    fn is_shared(&self) -> bool;

    /// Ends the current wait of the thread whose turn it is, or its next one.
    fn wake(&self);
}

thread_local! {
    /// The word that this thread sleeps on.
    static PARKED: Cell<*const AtomicU32> = const { Cell::new(ptr::null()) };
}

impl Parker {
    /// Sleeps until woken, or until the word `beside` has changed.
    fn park(&self, generation: u64, beside: Option<(*const AtomicU32, u32)>) {
        if self.begin(ASLEEP) {
            while self.state.load(Ordering::Acquire) == ASLEEP && generation == process::generation() {
                match beside {
                    None => futex_wait(&self.state, ASLEEP, Some(LONGEST_PARK)),
                    // The future finds out why the sleep ended.
                    Some(beside) => {
                        futex_wait_beside(&self.state, ASLEEP, beside, LONGEST_PARK);
                        break;
                    }
                }
            }
        }
        self.state.swap(AWAKE, Ordering::AcqRel);
    }

    /// `false`: the thread was already woken.
    fn begin(&self, state: u32) -> bool {
        self.state.compare_exchange(AWAKE, state, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Drives until woken, or until `limit`: if the program has closed the descriptors, nothing can wake the thread
    /// (R26). If another thread drives, sleeps instead.
    ///
    /// The thread keeps its turn while it polls its future, unless there are other waiters: the future's next reply
    /// usually comes on the same connection.
    fn drive<'a>(&'a self, turn: &mut Option<Turn<'a>>, driven: Arc<dyn Driven>, limit: Boottime, generation: u64) {
        if !turn.as_ref().is_some_and(|turn| Arc::ptr_eq(&turn.driven, &driven)) {
            // The former turn must end before the next begins.
            *turn = None;
            *turn = Turn::begin(self, Arc::clone(&driven), generation);
        }
        if turn.is_none() {
            return self.park(generation, None);
        }
        let mut goes_on = true;
        while goes_on && self.begin(DRIVING) {
            goes_on = driven.source().wait(limit);
            // While the thread is busy, waking it needs no system call.
            let _ = self.state.compare_exchange(DRIVING, AWAKE, Ordering::AcqRel, Ordering::Acquire);
            if generation != process::generation() {
                return;
            }
            goes_on &= driven.take_in();
            if limit.has_passed() {
                break;
            }
        }
        if !goes_on || driven.source().is_shared() {
            *turn = None;
        }
        match goes_on {
            // It was woken, or `limit` has passed.
            true => drop(self.state.swap(AWAKE, Ordering::AcqRel)),
            false => self.park(generation, None),
        }
    }
}

/// A thread's turn. It also ends if something panics: a waker of the program, or the future.
struct Turn<'a> {
    driven: Arc<dyn Driven>,
    parker: &'a Parker,
    generation: u64,
}

impl<'a> Turn<'a> {
    /// `None`: another thread has the turn.
    fn begin(parker: &'a Parker, driven: Arc<dyn Driven>, generation: u64) -> Option<Turn<'a>> {
        if !driven.source().begin() {
            return None;
        }
        *parker.driven.lock() = Some(Arc::clone(&driven));
        let turn = Turn { driven, parker, generation };
        // Counted after the turn has begun: a waiter that comes too late to be counted finds the turn, and marks it as
        // shared.
        if turn.driven.awaited() > 1 {
            turn.driven.source().listen();
        }
        Some(turn)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // In a forked child, the turn is the parent's.
        if self.generation == process::generation() {
            self.driven.source().end(self.driven.awaited() > 0);
            *self.parker.driven.lock() = None;
        }
    }
}

/// A word that a thread inside [`block_on`] may sleep on in addition to its parker.
#[derive(Clone, Copy)]
enum Offer {
    /// The thread is not in `block_on`, or the kernel does not support it.
    None,
    Open,
    Taken(*const AtomicU32, u32),
}

thread_local! {
    static OFFER: Cell<Offer> = const { Cell::new(Offer::None) };
}

/// Whether the kernel lets a thread sleep on two words (`futex_waitv`, Linux 5.16). True until a try has failed.
static SLEEPS_ON_TWO: AtomicBool = AtomicBool::new(true);

/// What a thread inside [`block_on`] may drive while it waits.
#[derive(Default)]
enum Drive {
    /// The thread is not in `block_on`.
    #[default]
    None,
    Open,
    Taken(Arc<dyn Driven>),
}

thread_local! {
    /// Has no destructor: a program may still wait at its end, when the destructors of thread-local data have run.
    static DRIVE: Cell<mem::ManuallyDrop<Drive>> = const { Cell::new(mem::ManuallyDrop::new(Drive::None)) };
    /// The earliest time that the future being polled waits for.
    static EARLIEST: Cell<Boottime> = const { Cell::new(Boottime::NEVER) };
}

/// Sets what this thread may drive, and returns the former value.
fn may_drive(drive: Drive) -> Drive {
    mem::ManuallyDrop::into_inner(DRIVE.replace(mem::ManuallyDrop::new(drive)))
}

/// Called while a future is polled: makes this thread drive `driven` when the future is pending, if the thread waits
/// for that future alone. If several are offered, the last one counts.
pub fn drive(driven: Arc<dyn Driven>) {
    match may_drive(Drive::None) {
        Drive::None => driven.source().listen(),
        Drive::Open | Drive::Taken(_) => drop(may_drive(Drive::Taken(driven))),
    }
}

/// While it lives, futures that are polled on this thread may name a word to sleep on, or something to drive.
struct Offered {
    before: (Offer, Drive, Boottime),
}

impl Offered {
    fn begin() -> Offered {
        Offered { before: (OFFER.replace(Offer::None), may_drive(Drive::None), EARLIEST.get()) }
    }

    /// Forgets what was named in an earlier poll.
    fn forget(&self) {
        OFFER.set(if SLEEPS_ON_TWO.load(Ordering::Relaxed) { Offer::Open } else { Offer::None });
        may_drive(Drive::Open);
        EARLIEST.set(Boottime::NEVER);
    }

    fn earliest(&self) -> Boottime {
        EARLIEST.get()
    }

    fn driven(&self) -> Option<Arc<dyn Driven>> {
        match may_drive(Drive::None) {
            Drive::Taken(driven) => Some(driven),
            Drive::None | Drive::Open => None,
        }
    }

    fn word(&self) -> Option<(*const AtomicU32, u32)> {
        match OFFER.get() {
            Offer::Taken(word, seen) => Some((word, seen)),
            Offer::None | Offer::Open => None,
        }
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        OFFER.set(self.before.0);
        may_drive(mem::take(&mut self.before.1));
        EARLIEST.set(self.before.2);
    }
}

/// Whether a future that is polled on this thread may name a word for the thread to sleep on. A change of the word then
/// wakes the thread directly.
pub fn sleeps_on_words() -> bool {
    !matches!(OFFER.get(), Offer::None)
}

/// Called while a future is polled: makes this thread sleep on a word of shared memory when the future is pending,
/// unless the word's value is no longer `seen`. The future is polled again when the word or its waker is woken.
///
/// # Safety
///
/// The word must stay mapped until this future is polled again, or until [`no_word`] is called.
pub unsafe fn sleep_on(word: *const AtomicU32, seen: u32) {
    if sleeps_on_words() {
        OFFER.set(Offer::Taken(word, seen));
    }
}

/// Forbids the future being polled to name a word. For a future that another thread may drop while this one sleeps.
pub fn refuse_words() {
    OFFER.set(Offer::None);
}

/// Polls something that this thread will most likely wait for next, inside [`block_on`]. Until then no other thread is
/// asked to drive its connection, unless there are other waiters. If the thread does not wait after all, the library's
/// own threads take over within a few milliseconds.
pub fn poll_ahead<T>(poll: impl FnOnce() -> T) -> T {
    let offer = Offered::begin();
    may_drive(Drive::Open);
    let polled = poll();
    if let Some(driven) = offer.driven()
        && driven.awaited() > 1
    {
        driven.source().listen();
    }
    polled
}

/// Undoes [`sleep_on`], if it was called for this word.
pub fn no_word(word: *const AtomicU32) {
    if matches!(OFFER.get(), Offer::Taken(taken, _) if taken == word) {
        OFFER.set(Offer::Open);
    }
}

/// While it lives, a child that this thread forks is woken from its sleep on the parker.
struct Parked {
    before: *const AtomicU32,
}

impl Parked {
    fn begin(parker: &Parker) -> Parked {
        static WATCHED: AtomicBool = AtomicBool::new(false);
        // If this fails for lack of memory, LONGEST_PARK still ends the sleep.
        process::at_fork(&WATCHED, wake_in_child);
        Parked { before: PARKED.replace(&raw const parker.state) }
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        PARKED.set(self.before);
    }
}

/// Called in a child that a signal handler forked while this thread slept: ends the sleep, which the kernel would
/// otherwise restart.
extern "C" fn wake_in_child() {
    let parked = PARKED.get();
    if !parked.is_null() {
        // SAFETY: this thread is inside `block_on`, which keeps the parker.
        unsafe { &*parked }.store(FORKED, Ordering::Release);
    }
}

impl Wake for Parker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        match self.state.swap(WOKEN, Ordering::AcqRel) {
            ASLEEP => futex_wake(&self.state),
            DRIVING => {
                if let Some(driven) = &*self.driven.lock() {
                    driven.source().wake();
                }
            }
            _ => {}
        }
    }
}

/// Sleeps until the word is no longer `seen`, or `left` has passed; may return earlier.
fn futex_wait(word: &AtomicU32, seen: u32, left: Option<Duration>) {
    let left =
        left.map(|left| libc::timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
    let left = left.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: word and time outlive the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, seen, left) };
}

/// As `futex_wait`, with a second word, which is shared with other processes.
fn futex_wait_beside(word: &AtomicU32, seen: u32, beside: (*const AtomicU32, u32), left: Duration) {
    /// `struct futex_waitv` of linux/futex.h, with the flags for 32-bit words and for private ones.
    #[repr(C)]
    struct Wait {
        expected: u64,
        address: u64,
        flags: u32,
        reserved: u32,
    }
    const SIZE_U32: u32 = 2;
    const PRIVATE: u32 = 128;
    let own = Wait { expected: seen.into(), address: word.as_ptr() as u64, flags: SIZE_U32 | PRIVATE, reserved: 0 };
    let other = Wait { expected: beside.1.into(), address: beside.0 as u64, flags: SIZE_U32, reserved: 0 };
    let words = [own, other];
    let mut until = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut until) };
    until.tv_sec += left.as_secs() as i64;
    // SAFETY: words, array and time outlive the call; where an address is not mapped (in a forked child), it fails.
    let status = unsafe {
        libc::syscall(libc::SYS_futex_waitv, &raw const words, words.len(), 0, &raw const until, libc::CLOCK_MONOTONIC)
    };
    let ended = [Some(libc::EAGAIN), Some(libc::EINTR), Some(libc::ETIMEDOUT)];
    if status == -1 && !ended.contains(&io::Error::last_os_error().raw_os_error()) {
        // An older kernel, or a sandbox that forbids the call: it is not tried again.
        SLEEPS_ON_TWO.store(false, Ordering::Relaxed);
    }
}

/// Wakes the thread that sleeps on the word, if there is one.
fn futex_wake(word: &AtomicU32) {
    // SAFETY: the call looks up the threads that sleep at this address, and does not read it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1) };
}

/// Waits until `at`. Starts the runtime if necessary, and panics if that fails: a caller that may be the first to wait
/// must call [`handle`] before.
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
        if self.at == Boottime::NEVER {
            return Poll::Pending;
        }
        EARLIEST.set(EARLIEST.get().min(self.at));
        let runtime = match self.id {
            // In a forked child, the timer is the parent's; the caller checks for that.
            Some(_) => RUNTIME.current(),
            None => Some(runtime().expect("the runtime of a timer runs, or can be started")),
        };
        if let Some(runtime) = runtime {
            self.id = Some(runtime.timers.set(self.at, self.id, context.waker()));
        }
        Poll::Pending
    }
}

impl Sleep {
    fn forget(&mut self) {
        // In a forked child, the timer is the parent's.
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

/// The output of `future`, or `None` if `at` comes first. The future is not dropped: that is left to the caller.
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

/// The timers that are set, and the word that their thread sleeps on.
#[derive(Default)]
struct Timers {
    waiting: Mutex<Waiting>,
    /// Changed to wake the thread: for an earlier timer, a check of the clock, or its end.
    wakeups: AtomicU32,
    stopped: AtomicBool,
    /// How many other threads check for suspensions of the machine in place of the timer thread.
    looked_after: AtomicUsize,
}

#[derive(Default)]
struct Waiting {
    wakers: BTreeMap<(Boottime, u64), Waker>,
    last_id: u64,
    /// The time that the thread waits for. Its timer may have been removed since.
    set_to: Option<Boottime>,
}

/// The longest sleep of the timer thread while a timer is set. The sleep is measured by a clock that stands still while
/// the machine is suspended, so a timer that expired meanwhile is noticed up to this much late. (If another thread
/// wakes as often for another reason, it does this check, see [`LookedAfter`]: waking a thread costs more than the
/// check.)
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// While it lives, its owner checks about once a second whether the machine was suspended, and the timer thread does
/// not.
pub struct LookedAfter {
    timers: Arc<Timers>,
    suspended: Duration,
}

impl LookedAfter {
    /// `None` if no timers run.
    pub fn begin() -> Option<LookedAfter> {
        let timers = Arc::clone(&RUNTIME.current()?.timers);
        timers.looked_after.fetch_add(1, Ordering::SeqCst);
        Some(LookedAfter { timers, suspended: clock::suspended() })
    }

    /// Makes the timers check the clock if the machine was suspended since the last call.
    pub fn look(&mut self) {
        let suspended = clock::suspended();
        // The two clocks are not read at the same moment, which causes small differences.
        if suspended.abs_diff(self.suspended) > Duration::from_millis(1) {
            self.suspended = suspended;
            self.timers.wake();
        }
    }
}

impl Drop for LookedAfter {
    fn drop(&mut self) {
        self.timers.looked_after.fetch_sub(1, Ordering::SeqCst);
        self.timers.wake();
    }
}

impl Timers {
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
            waiting.set_to = Some(at);
            drop(waiting);
            self.wake();
        }
        id
    }

    fn forget(&self, at: Boottime, id: u64) {
        self.waiting.lock().wakers.remove(&(at, id));
    }

    fn wake(&self) {
        self.wakeups.fetch_add(1, Ordering::SeqCst);
        futex_wake(&self.wakeups);
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn run(&self) {
        while !self.stopped.load(Ordering::SeqCst) {
            // Read before looking: an earlier timer that is set after this ends the sleep at once.
            let seen = self.wakeups.load(Ordering::SeqCst);
            let next = self.fire();
            let longest = match self.looked_after.load(Ordering::SeqCst) {
                0 => LONGEST_SLEEP,
                _ => Duration::MAX,
            };
            let left = next.map(|next| next.since(Boottime::now()).min(longest));
            if left != Some(Duration::ZERO) {
                futex_wait(&self.wakeups, seen, left);
            }
        }
    }

    /// Wakes the tasks whose timers have expired. Returns the time of the next timer.
    fn fire(&self) -> Option<Boottime> {
        let (due, next) = {
            let mut waiting = self.waiting.lock();
            let later = waiting.wakers.split_off(&(Boottime::now() + Duration::from_nanos(1), 0));
            let due = mem::replace(&mut waiting.wakers, later);
            waiting.set_to = waiting.wakers.first_key_value().map(|((at, _), _)| *at);
            (due, waiting.set_to)
        };
        for waker in due.into_values() {
            // The waker may be the program's own, and its panic must not stop all timers.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| waker.wake()));
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::fork_at;
    use std::sync::atomic::{AtomicI32, AtomicU64};
    use std::time::Duration;

    /// This happens to one of two threads that start the runtime at the same time.
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
        // The scheduler decides which of two tasks that are due together runs first.
        let mut ended = order.lock().clone();
        ended.sort_unstable();
        assert_eq!(ended, [0, 10, 20, 30]);
    }

    /// The timer thread sleeps on while another thread checks for suspensions, and is woken after one.
    #[test]
    fn timers_are_looked_after() {
        let runtime = runtime().unwrap();
        let (timers, seen) = (&runtime.timers, || runtime.timers.wakeups.load(Ordering::SeqCst));
        let mut looked_after = LookedAfter::begin().unwrap();
        assert_ne!(timers.looked_after.load(Ordering::SeqCst), 0);
        // As if the machine had been suspended meanwhile.
        looked_after.suspended = Duration::MAX;
        let before = seen();
        looked_after.look();
        assert_ne!(seen(), before);
        assert_eq!(looked_after.suspended.as_secs(), clock::suspended().as_secs());
        let before = seen();
        drop(looked_after);
        assert_ne!(seen(), before, "it goes back to its own looks at once");
    }

    /// A change of the word ends the sleep, and so does the waker.
    #[test]
    fn a_thread_sleeps_on_a_word_that_its_future_names() {
        static WORD: AtomicU32 = AtomicU32::new(0);
        assert!(!sleeps_on_words(), "it is in no future");
        let named = block_on(std::future::poll_fn(|_| Poll::Ready(sleeps_on_words()))).unwrap();
        if !named {
            println!("\nSKIPPED futex-waitv: this kernel has no futex_waitv (Linux 5.16)");
            return;
        }
        let changed = |seen: u32, waker: &Mutex<Option<Waker>>| {
            block_on(std::future::poll_fn(|context| {
                *waker.lock() = Some(context.waker().clone());
                if WORD.load(Ordering::SeqCst) != seen {
                    return Poll::Ready(());
                }
                // SAFETY: a static word.
                unsafe { sleep_on(&WORD, seen) };
                Poll::Pending
            }))
            .unwrap();
        };
        let waker = Mutex::new(None);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| changed(0, &waker));
            while waker.lock().is_none() {
                thread::yield_now();
            }
            WORD.store(1, Ordering::SeqCst);
            // As another process does it. If the thread does not sleep yet, it finds the word changed.
            // SAFETY: the call looks up the threads that sleep at this address.
            unsafe { libc::syscall(libc::SYS_futex, WORD.as_ptr(), libc::FUTEX_WAKE, 1) };
            waiting.join().unwrap();
            let waiting = scope.spawn(|| changed(1, &waker));
            let woken = std::iter::repeat_with(|| waker.lock().take()).find_map(|waker| waker).unwrap();
            WORD.store(2, Ordering::SeqCst);
            woken.wake();
            waiting.join().unwrap();
        });
    }

    /// Like a static C++ object, whose destructor runs after those of the thread-local data.
    #[test]
    fn a_thread_may_wait_at_its_end() {
        struct Waits(std::sync::mpsc::Sender<bool>);
        impl Drop for Waits {
            fn drop(&mut self) {
                let waited = std::panic::catch_unwind(|| block_on(async {}).is_ok() && poll_ahead(|| true));
                let _ = self.0.send(waited.is_ok_and(|waited| waited));
            }
        }
        // Destroyed in reverse order: the first one last.
        thread_local!(static WAITS: Cell<Option<Waits>> = const { Cell::new(None) });
        let (tell, told) = std::sync::mpsc::channel();
        let waits = move || {
            WAITS.set(Some(Waits(tell)));
            block_on(async {}).unwrap();
        };
        thread::spawn(waits).join().unwrap();
        assert_eq!(told.recv(), Ok(true));
    }

    /// A connection on which something arrives at every wait. It records the calls.
    #[derive(Default)]
    struct Noted {
        name: &'static str,
        done: Arc<Mutex<Vec<String>>>,
        waker: Mutex<Option<Waker>>,
        awaited: AtomicUsize,
        shared: AtomicBool,
        panics: bool,
    }

    impl Noted {
        fn note(&self, what: &str) {
            self.done.lock().push(format!("{}{what}", self.name));
        }
    }

    impl Driven for Noted {
        fn source(&self) -> &dyn Source {
            self
        }

        fn take_in(&self) -> bool {
            assert!(!self.panics, "a waker of the program's");
            self.waker.lock().take().into_iter().for_each(Waker::wake);
            true
        }

        fn awaited(&self) -> usize {
            self.note("count");
            self.awaited.load(Ordering::SeqCst)
        }
    }

    impl Source for Noted {
        fn begin(&self) -> bool {
            self.note("begin");
            true
        }

        fn wait(&self, _limit: Boottime) -> bool {
            self.note("wait");
            true
        }

        fn end(&self, expects: bool) {
            self.note(if expects { "end, more is to come" } else { "end" });
        }

        fn listen(&self) {
            self.note("listen");
            self.shared.store(true, Ordering::SeqCst);
        }

        fn is_shared(&self) -> bool {
            self.shared.swap(false, Ordering::SeqCst)
        }

        fn wake(&self) {}
    }

    /// A future that waits on each of these in turn. `None`: it waits for its waker alone.
    fn waits_on(these: &[Option<&Arc<Noted>>]) -> impl Future<Output = ()> + use<> {
        let mut these = these.iter().map(|noted| noted.cloned()).collect::<Vec<_>>().into_iter();
        std::future::poll_fn(move |context| {
            match these.next() {
                None => return Poll::Ready(()),
                Some(None) => context.waker().wake_by_ref(),
                Some(Some(noted)) => {
                    noted.note("poll");
                    *noted.waker.lock() = Some(context.waker().clone());
                    drive(noted);
                }
            }
            Poll::Pending
        })
    }

    /// Each end and each beginning of a turn costs a system call.
    #[test]
    fn a_turn_goes_on_while_the_future_waits_on_the_same_connection() {
        let one = Arc::new(Noted::default());
        block_on(waits_on(&[Some(&one), Some(&one), Some(&one)])).unwrap();
        let done = ["poll", "begin", "count", "wait", "poll", "wait", "poll", "wait", "count", "end"];
        assert_eq!(*one.done.lock(), done);
    }

    #[test]
    fn a_turn_ends_when_the_future_waits_for_something_else() {
        let one = Arc::new(Noted { name: "1 ", ..Noted::default() });
        let other = Arc::new(Noted { name: "2 ", done: Arc::clone(&one.done), ..Noted::default() });
        block_on(waits_on(&[Some(&one), Some(&other), None, Some(&one)])).unwrap();
        let first = ["1 poll", "1 begin", "1 count", "1 wait", "2 poll", "1 count", "1 end"];
        let second = ["2 begin", "2 count", "2 wait", "2 count", "2 end"];
        let third = ["1 poll", "1 begin", "1 count", "1 wait", "1 count", "1 end"];
        assert_eq!(*one.done.lock(), [&first[..], &second[..], &third[..]].concat());
    }

    /// The thread may be stopped while it runs the future's code.
    #[test]
    fn a_turn_that_others_share_ends_before_the_future_is_polled() {
        // There is another waiter when the turn begins.
        let one = Arc::new(Noted { awaited: AtomicUsize::new(2), ..Noted::default() });
        block_on(waits_on(&[Some(&one), Some(&one)])).unwrap();
        let turn = ["poll", "begin", "count", "listen", "wait", "count", "end, more is to come"];
        assert_eq!(*one.done.lock(), turn.repeat(2));
        // Another waiter comes later.
        let one = Arc::new(Noted { shared: AtomicBool::new(true), ..Noted::default() });
        block_on(waits_on(&[Some(&one), Some(&one)])).unwrap();
        let turn = ["poll", "begin", "count", "wait", "count", "end"];
        assert_eq!(*one.done.lock(), turn.repeat(2));
    }

    /// Otherwise, other threads would wait forever for that thread.
    #[test]
    fn a_turn_ends_when_taking_something_in_panics() {
        let panics = Arc::new(Noted { panics: true, ..Noted::default() });
        let waiting = std::panic::AssertUnwindSafe(waits_on(&[Some(&panics)]));
        assert!(std::panic::catch_unwind(|| block_on(waiting)).is_err());
        assert_eq!(panics.done.lock().last().unwrap(), "end");
    }

    #[test]
    fn a_turn_ends_when_the_future_panics() {
        let one = Arc::new(Noted::default());
        let mut waiting = Box::pin(waits_on(&[Some(&one)]));
        let panicking = std::panic::AssertUnwindSafe(std::future::poll_fn(|context| {
            assert!(waiting.as_mut().poll(context).is_pending(), "it was polled twice");
            Poll::<()>::Pending
        }));
        assert!(std::panic::catch_unwind(|| block_on(panicking)).is_err());
        assert_eq!(*one.done.lock(), ["poll", "begin", "count", "wait", "count", "end"]);
    }

    /// The future may need a mutex that another thread had locked at the fork.
    #[test]
    fn a_child_forked_while_its_thread_waits_polls_nothing_of_the_parents() {
        let forked = fork_at(libc::SIGURG);
        let (thread, task, ends) = (AtomicU64::new(0), AtomicI32::new(0), AtomicBool::new(false));
        let waker = Mutex::new(None::<Waker>);
        thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: both ask for a number.
                unsafe {
                    thread.store(libc::pthread_self(), Ordering::SeqCst);
                    task.store(libc::gettid(), Ordering::SeqCst);
                }
                let waited = block_on(std::future::poll_fn(|context| {
                    if forked.load(Ordering::SeqCst) == 0 {
                        // SAFETY: ends the child.
                        unsafe { libc::_exit(1) };
                    }
                    *waker.lock() = Some(context.waker().clone());
                    if ends.load(Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
                }));
                if forked.load(Ordering::SeqCst) == 0 {
                    let told = waited.is_err_and(|error| error.kind() == ErrorKind::Forked);
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(if told { 0 } else { 2 }) };
                }
                waited.unwrap();
            });
            let sleeps = || {
                let path = format!("/proc/self/task/{}/syscall", task.load(Ordering::SeqCst));
                let futex = format!("{} ", libc::SYS_futex);
                waker.lock().is_some() && std::fs::read_to_string(path).is_ok_and(|said| said.starts_with(&futex))
            };
            while !sleeps() {
                thread::yield_now();
            }
            // SAFETY: the thread has not ended.
            assert_eq!(unsafe { libc::pthread_kill(thread.load(Ordering::SeqCst), libc::SIGURG) }, 0);
            let child = std::iter::repeat_with(|| forked.load(Ordering::SeqCst)).find(|child| *child != -1).unwrap();
            let mut status = 0;
            // SAFETY: writes one integer.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            ends.store(true, Ordering::SeqCst);
            waker.lock().take().unwrap().wake();
            assert_eq!(status, 0, "exit status 1: it polled; 2: it got no error; signal 14: it hung");
        });
    }

    #[test]
    fn a_future_that_never_ends_is_given_up() {
        let at = Boottime::now() + Duration::from_millis(5);
        let given_up = block_on(until(at, &mut std::future::pending::<()>())).unwrap();
        assert_eq!(given_up, None);
        assert!(Boottime::now() >= at);
    }
}
