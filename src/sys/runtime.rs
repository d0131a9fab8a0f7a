//! The library's own tokio runtime, and its timers.
//!
//! One runtime for the process, started when it is first needed and started afresh after a fork (the
//! parent's is leaked in the child: its threads are not there). Its timers run on `CLOCK_BOOTTIME`,
//! which tokio's do not.
//!
//! Runtime and timers have no descriptor: all their waiting is on futexes. A program that closes the
//! library's descriptors (R26) stops neither timeouts nor renewals. Sockets have a thread of their own,
//! see `sockets.rs`.

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
    /// Of two threads that started one at once, the slower drops its own, perhaps inside somebody else's
    /// runtime, where waiting for threads to end is a panic.
    fn drop(&mut self) {
        self.timers.stop();
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
    process::check().map_err(|error| io::Error::other(error.message().to_string()))?;
    // Where the system gives no thread, tokio panics, or hangs when it gives one and not the next.
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
///
/// A handler of signals may fork while the thread waits. The child has none of the threads that would
/// end the wait: there the answer is an error.
pub fn block_on<F: Future>(future: F) -> Result<F::Output, Error> {
    runtime()?;
    let generation = process::generation();
    let parker = Arc::new(Parker::default());
    let _watched = Parked::begin(&parker);
    let offer = Offered::begin();
    let waker = Waker::from(Arc::clone(&parker));
    let mut context = Context::from_waker(&waker);
    let mut future = Abandoned { future: mem::ManuallyDrop::new(Box::pin(future)), generation };
    // Ends before the future is dropped.
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
        // In a forked child what the future needs may be locked by threads that are not there.
        if generation != process::generation() {
            return Err(Error::forked_during_call());
        }
    }
}

/// A future that a forked child does not drop: what it is about goes on in the parent.
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

/// The value of an answer. The calling thread waits until it is there; how long, says the call that gave the answer.
#[inline(always)]
pub fn wait<T>(answer: Answer<T, Error>) -> Result<T, Error> {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(answer) => block_on(answer)?,
    }
}

/// What a thread does while it waits, and what ends that.
#[derive(Default)]
struct Parker {
    /// One of those below. A thread sleeps on it.
    state: AtomicU32,
    driven: Mutex<Option<Arc<dyn Driven>>>,
}

const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;
/// It waits for what it drives.
const DRIVING: u32 = 2;
const WOKEN: u32 = 3;
/// In a forked child: nobody will wake it.
const FORKED: u32 = 4;

/// The longest sleep of a thread, which a child made by the bare `clone` call ends by itself.
const LONGEST_PARK: Duration = Duration::from_secs(10);

/// A connection that a thread runs while it waits for an answer on it, so that no other has to be woken for that.
pub trait Driven: Send + Sync {
    /// What its bytes come from.
    fn source(&self) -> &dyn Source;

    /// Takes in what has come. Does not wait. `false`: there is nothing more to be driven.
    fn take_in(&self) -> bool;

    /// How much is to come that somebody waits for. What comes to more than one may be counted as two.
    fn awaited(&self) -> usize;
}

/// What one thread at a time polls by itself.
pub trait Source: Send + Sync {
    /// Begins a turn; `false`: another thread has it, or it is gone.
    fn begin(&self) -> bool;

    /// Waits until something has come, or it was seen, or `limit`; perhaps for nothing. `false`: it is gone.
    fn wait(&self, limit: Boottime) -> bool;

    /// Ends the turn. `expects`: whether something is to come for others, who must see it at once.
    fn end(&self, expects: bool);

    /// Somebody waits who cannot have a turn, and must see what comes although the thread whose turn it is stands still.
    fn listen(&self);

    /// Whether somebody else waits than the thread whose turn it is.
    fn is_shared(&self) -> bool;

    /// Ends the wait of the thread whose turn it is, or its next one.
    fn wake(&self);
}

thread_local! {
    /// What this thread sleeps on.
    static PARKED: Cell<*const AtomicU32> = const { Cell::new(ptr::null()) };
}

impl Parker {
    /// Sleeps until it is woken, or until the word beside it has changed.
    fn park(&self, generation: u64, beside: Option<(*const AtomicU32, u32)>) {
        if self.begin(ASLEEP) {
            while self.state.load(Ordering::Acquire) == ASLEEP && generation == process::generation() {
                match beside {
                    None => futex_wait(&self.state, ASLEEP, Some(LONGEST_PARK)),
                    // Whatever has ended the sleep, the future finds out.
                    Some(beside) => {
                        futex_wait_beside(&self.state, ASLEEP, beside, LONGEST_PARK);
                        break;
                    }
                }
            }
        }
        self.state.swap(AWAKE, Ordering::AcqRel);
    }

    /// `false`: it was woken already.
    fn begin(&self, state: u32) -> bool {
        self.state.compare_exchange(AWAKE, state, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Drives until it is woken, or until `limit`: nobody can ring when the program has closed the descriptors (R26).
    /// Sleeps where another thread drives.
    ///
    /// The turn stays with this thread while it polls its future, unless somebody else waits: what the future waits for
    /// next mostly comes on the same connection.
    fn drive<'a>(&'a self, turn: &mut Option<Turn<'a>>, driven: Arc<dyn Driven>, limit: Boottime, generation: u64) {
        if !turn.as_ref().is_some_and(|turn| Arc::ptr_eq(&turn.driven, &driven)) {
            // One ends before the next begins.
            *turn = None;
            *turn = Turn::begin(self, Arc::clone(&driven), generation);
        }
        if turn.is_none() {
            return self.park(generation, None);
        }
        let mut goes_on = true;
        while goes_on && self.begin(DRIVING) {
            goes_on = driven.source().wait(limit);
            // Nobody has to ring while this is at work.
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
            // It was woken.
            true => drop(self.state.swap(AWAKE, Ordering::AcqRel)),
            false => self.park(generation, None),
        }
    }
}

/// A turn that a thread has. It ends also when something panics: a waker of the program's, or the future.
struct Turn<'a> {
    driven: Arc<dyn Driven>,
    parker: &'a Parker,
    generation: u64,
}

impl<'a> Turn<'a> {
    /// `None`: another thread has it.
    fn begin(parker: &'a Parker, driven: Arc<dyn Driven>, generation: u64) -> Option<Turn<'a>> {
        if !driven.source().begin() {
            return None;
        }
        *parker.driven.lock() = Some(Arc::clone(&driven));
        let turn = Turn { driven, parker, generation };
        // Counted when the turn has begun: a waiter that is not counted yet finds the turn, and marks it as shared.
        if turn.driven.awaited() > 1 {
            turn.driven.source().listen();
        }
        Some(turn)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // In a forked child it is the parent's.
        if self.generation == process::generation() {
            self.driven.source().end(self.driven.awaited() > 0);
            *self.parker.driven.lock() = None;
        }
    }
}

/// What a thread inside [`block_on`] may sleep on beside its parker.
#[derive(Clone, Copy)]
enum Offer {
    /// The thread is not inside, or the kernel cannot do it.
    None,
    Open,
    Taken(*const AtomicU32, u32),
}

thread_local! {
    static OFFER: Cell<Offer> = const { Cell::new(Offer::None) };
}

/// Whether the kernel lets a thread sleep on two words (`futex_waitv`, Linux 5.16), as far as that was tried.
static SLEEPS_ON_TWO: AtomicBool = AtomicBool::new(true);

/// What a thread inside [`block_on`] may drive while it waits.
#[derive(Default)]
enum Drive {
    /// The thread is not inside.
    #[default]
    None,
    Open,
    Taken(Arc<dyn Driven>),
}

thread_local! {
    /// Without a destructor: a program may wait at its end, when those of its thread have run.
    static DRIVE: Cell<mem::ManuallyDrop<Drive>> = const { Cell::new(mem::ManuallyDrop::new(Drive::None)) };
    /// The earliest moment that the future that is polled now waits for.
    static EARLIEST: Cell<Boottime> = const { Cell::new(Boottime::NEVER) };
}

/// Says what this thread may drive from now on, and answers what it might before.
fn may_drive(drive: Drive) -> Drive {
    mem::ManuallyDrop::into_inner(DRIVE.replace(mem::ManuallyDrop::new(drive)))
}

/// Has this thread drive something while the future that is polled now is pending, if it waits for that future alone.
/// The last one that is offered counts.
pub fn drive(driven: Arc<dyn Driven>) {
    match may_drive(Drive::None) {
        Drive::None => driven.source().listen(),
        Drive::Open | Drive::Taken(_) => drop(may_drive(Drive::Taken(driven))),
    }
}

/// While it lives, futures that are polled on this thread may name a word for it to sleep on, or what to drive.
struct Offered {
    before: (Offer, Drive, Boottime),
}

impl Offered {
    fn begin() -> Offered {
        Offered { before: (OFFER.replace(Offer::None), may_drive(Drive::None), EARLIEST.get()) }
    }

    /// What was named in an earlier poll does not count any more.
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

/// Whether a future that is polled on this thread may name a word that the thread then sleeps on, so that a change
/// of the word wakes the thread itself.
pub fn sleeps_on_words() -> bool {
    !matches!(OFFER.get(), Offer::None)
}

/// Has this thread sleep on a word of shared memory, unless its value is not `seen` any more, once the future that is
/// polled now is pending. The future is polled again when the word is woken, or when its waker is.
///
/// # Safety
///
/// The word stays mapped until this future is polled again, or until [`no_word`].
pub unsafe fn sleep_on(word: *const AtomicU32, seen: u32) {
    if sleeps_on_words() {
        OFFER.set(Offer::Taken(word, seen));
    }
}

/// Has the future that is polled now on this thread name no word to sleep on: for one that another thread may drop while
/// this one sleeps.
pub fn refuse_words() {
    OFFER.set(Offer::None);
}

/// Polls something that this thread will most likely wait for next, inside [`block_on`]: until then, no other thread is
/// called upon to drive what that will drive, unless somebody else waits for it, too. Where the thread does not wait,
/// the library's own threads take over within a few milliseconds.
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

/// Takes [`sleep_on`] back, where that was for this word.
pub fn no_word(word: *const AtomicU32) {
    if matches!(OFFER.get(), Offer::Taken(taken, _) if taken == word) {
        OFFER.set(Offer::Open);
    }
}

/// While it lives, this thread's sleep on a parker is ended in a child that the thread forks.
struct Parked {
    before: *const AtomicU32,
}

impl Parked {
    fn begin(parker: &Parker) -> Parked {
        static WATCHED: AtomicBool = AtomicBool::new(false);
        // Where there is no memory to register it, LONGEST_PARK is left.
        process::at_fork(&WATCHED, wake_in_child);
        Parked { before: PARKED.replace(&raw const parker.state) }
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        PARKED.set(self.before);
    }
}

/// In a child of a fork that a signal's handler made while its thread slept here: ends the sleep, which
/// the kernel would begin again.
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

/// Sleeps until the word is not `seen` any more, or so long has passed; perhaps not at all.
fn futex_wait(word: &AtomicU32, seen: u32, left: Option<Duration>) {
    let left =
        left.map(|left| libc::timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
    let left = left.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: word and time outlive the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, seen, left) };
}

/// As `futex_wait`, with a second word, which other processes see.
fn futex_wait_beside(word: &AtomicU32, seen: u32, beside: (*const AtomicU32, u32), left: Duration) {
    /// `struct futex_waitv` of linux/futex.h, with its flags for words of 32 bits, and private ones.
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
        // An older kernel, or a sandbox that does not know the call: nobody tries again.
        SLEEPS_ON_TWO.store(false, Ordering::Relaxed);
    }
}

/// Wakes the thread that sleeps on the word.
fn futex_wake(word: &AtomicU32) {
    // SAFETY: the call looks up the threads that sleep at this address, and does not read it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1) };
}

/// Waits until a moment. The runtime is started for it; where that fails, this panics: a caller that may be the first to
/// wait asks for the [`handle`] before.
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
            // In a forked child the timer is the parent's: the caller checks for that.
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

/// The moments that are waited for, and what their thread sleeps on.
#[derive(Default)]
struct Timers {
    waiting: Mutex<Waiting>,
    /// Changes when there is an earlier moment, or none any more.
    wakeups: AtomicU32,
    stopped: AtomicBool,
    /// How many threads notice for this one that the machine was suspended.
    looked_after: AtomicUsize,
}

#[derive(Default)]
struct Waiting {
    wakers: BTreeMap<(Boottime, u64), Waker>,
    last_id: u64,
    /// What the thread waits for. It may be a moment nobody waits for any more.
    set_to: Option<Boottime>,
}

/// How long the thread sleeps at most while something is waited for. Its sleep is measured by a clock that
/// stands still while the machine does: moments that have passed meanwhile are noticed so late. (A thread that wakes as
/// often for another reason does this one's noticing, see [`LookedAfter`]: to wake costs more than to look.)
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// While it lives, its owner looks about once a second whether the machine was suspended, and the timers' thread does not.
pub struct LookedAfter {
    timers: Arc<Timers>,
    suspended: Duration,
}

impl LookedAfter {
    /// `None` where no timers run.
    pub fn begin() -> Option<LookedAfter> {
        let timers = Arc::clone(&RUNTIME.current()?.timers);
        timers.looked_after.fetch_add(1, Ordering::SeqCst);
        Some(LookedAfter { timers, suspended: clock::suspended() })
    }

    /// Has the timers look at the clock if the machine was suspended since this was called last.
    pub fn look(&mut self) {
        let suspended = clock::suspended();
        // The two clocks are not read at one moment.
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
            // Read before looking: an earlier moment that is set after this ends the sleep at once.
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

    /// Wakes those whose moment has come. Answers the next one.
    fn fire(&self) -> Option<Boottime> {
        let (due, next) = {
            let mut waiting = self.waiting.lock();
            let later = waiting.wakers.split_off(&(Boottime::now() + Duration::from_nanos(1), 0));
            let due = mem::replace(&mut waiting.wakers, later);
            waiting.set_to = waiting.wakers.first_key_value().map(|((at, _), _)| *at);
            (due, waiting.set_to)
        };
        for waker in due.into_values() {
            // It may be the program's own, and its panic must not end everybody's timers.
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

    /// The thread of the timers sleeps on while somebody else notices suspensions, and is called after one.
    #[test]
    fn timers_are_looked_after() {
        let runtime = runtime().unwrap();
        let (timers, seen) = (&runtime.timers, || runtime.timers.wakeups.load(Ordering::SeqCst));
        let mut looked_after = LookedAfter::begin().unwrap();
        assert_ne!(timers.looked_after.load(Ordering::SeqCst), 0);
        // As if it had been suspended since.
        looked_after.suspended = Duration::MAX;
        let before = seen();
        looked_after.look();
        assert_ne!(seen(), before);
        assert_eq!(looked_after.suspended.as_secs(), clock::suspended().as_secs());
        let before = seen();
        drop(looked_after);
        assert_ne!(seen(), before, "it goes back to its own looks at once");
    }

    /// A word beside the parker ends the sleep, and so does the waker.
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
            // As another process does it. It may not sleep yet: then it finds the word changed.
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

    /// As a static object of C++ does, whose destructor runs when those of its thread's data have run.
    #[test]
    fn a_thread_may_wait_at_its_end() {
        struct Waits(std::sync::mpsc::Sender<bool>);
        impl Drop for Waits {
            fn drop(&mut self) {
                let waited = std::panic::catch_unwind(|| block_on(async {}).is_ok() && poll_ahead(|| true));
                let _ = self.0.send(waited.is_ok_and(|waited| waited));
            }
        }
        // Destroyed in the opposite order: the first one last.
        thread_local!(static WAITS: Cell<Option<Waits>> = const { Cell::new(None) });
        let (tell, told) = std::sync::mpsc::channel();
        let waits = move || {
            WAITS.set(Some(Waits(tell)));
            block_on(async {}).unwrap();
        };
        thread::spawn(waits).join().unwrap();
        assert_eq!(told.recv(), Ok(true));
    }

    /// A connection on which something comes whenever it is waited for. It notes what is done with it.
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

    /// A future that waits on each of these in turn; on `None`, for its waker alone.
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

    /// Each end and each beginning costs a system call.
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

    /// The thread may stand still in the future's code.
    #[test]
    fn a_turn_that_others_share_ends_before_the_future_is_polled() {
        // Somebody else waits when it begins.
        let one = Arc::new(Noted { awaited: AtomicUsize::new(2), ..Noted::default() });
        block_on(waits_on(&[Some(&one), Some(&one)])).unwrap();
        let turn = ["poll", "begin", "count", "listen", "wait", "count", "end, more is to come"];
        assert_eq!(*one.done.lock(), turn.repeat(2));
        // Somebody else comes later.
        let one = Arc::new(Noted { shared: AtomicBool::new(true), ..Noted::default() });
        block_on(waits_on(&[Some(&one), Some(&one)])).unwrap();
        let turn = ["poll", "begin", "count", "wait", "count", "end"];
        assert_eq!(*one.done.lock(), turn.repeat(2));
    }

    /// Others would wait for that thread for good.
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

    /// What the future would lock may have been locked by another thread at the fork.
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
