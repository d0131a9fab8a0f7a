//! Waking waiters, across processes and within this one (R10).
//!
//! The control file has a *bucket* for every so many keys. A bucket's sequence grows whenever a key of
//! it is freed; that, and nothing else, tells a waiter to look. Waiting processes announce themselves in
//! the bucket, for a minute at a time, so that who frees a key makes a system call only if somebody
//! else waits, and so that the announcements of killed processes end by themselves.
//!
//! All processes sleep on one word, the *bell*, each on the bits of the buckets that it watches
//! (`FUTEX_WAIT_BITSET`; unlike `futex_waitv` it is in every kernel). A bell that rings for another
//! bucket of the same bit wakes in vain, and costs nothing but that.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use std::{io, mem, ptr};

use super::control::{BUCKETS, Control};
use super::mutex::moment;
use crate::clock::Boottime;
use crate::key::KeyHash;
use crate::sys::mutex::Mutex;
use crate::sys::{process, runtime};

/// How long an announcement counts, and how often it is made anew while somebody waits.
const ANNOUNCED: Duration = Duration::from_secs(60);
const RENEWED: Duration = Duration::from_secs(25);

/// How often the thread that listens looks by itself, while somebody waits: a process that freed a key may have been
/// killed before it rang the bell (R10). It looks at a few words, which costs less than an attempt for each waiter.
const LOOK: Duration = Duration::from_secs(1);

/// For how long the bell's bit of a bucket stays listened to after its last watch, so that waiting
/// again for the same key needs no system call.
const LINGER: Duration = Duration::from_millis(1000);

/// Bits of the bell that stand for buckets. The others are for processes to wake themselves.
const BUCKET_BITS: u32 = 24;
const OWN_BITS: u32 = 32 - BUCKET_BITS;

const ANNOUNCEMENTS: usize = 6;

/// What the control file keeps for the keys of one bucket: a cache line.
#[repr(C, align(64))]
pub struct Bucket {
    /// Grows when a key of the bucket is freed.
    sequence: AtomicU32,
    _unused: u32,
    /// Until when somebody waits who found no room below.
    more: AtomicU64,
    /// Who waits, and until when: see [`announcement`].
    announced: [AtomicU64; ANNOUNCEMENTS],
}

const OPENER_BITS: u32 = 22;
const MOMENT_BITS: u32 = u64::BITS - OPENER_BITS;
const MOMENT: u64 = (1 << MOMENT_BITS) - 1;

/// The number of an opener, from a count of them. Never 0.
pub fn opener(count: u32) -> u32 {
    count % ((1 << OPENER_BITS) - 1) + 1
}

/// An opener's number above a moment in units of 2^20 ns (about a millisecond).
fn announcement(opener: u32, until: Boottime) -> u64 {
    (u64::from(opener) << MOMENT_BITS) | ((until.as_nanos() >> 20) & MOMENT)
}

fn announcer(announcement: u64) -> u32 {
    (announcement >> MOMENT_BITS) as u32
}

fn counts(announcement: u64, now: Boottime) -> bool {
    announcement & MOMENT >= now.as_nanos() >> 20
}

impl Bucket {
    fn sequence(&self) -> u32 {
        self.sequence.load(Ordering::SeqCst)
    }

    /// Whether anybody has announced to wait: no need to know the time when not.
    fn anybody(&self) -> bool {
        self.more.load(Ordering::SeqCst) != 0
            || self.announced.iter().any(|announced| announced.load(Ordering::SeqCst) != 0)
    }

    /// Whether somebody else than this opener waits, as far as announced.
    fn awaited_by_others(&self, opener: u32, now: Boottime) -> bool {
        counts(self.more.load(Ordering::SeqCst), now)
            || self.announced.iter().any(|announced| {
                let announced = announced.load(Ordering::SeqCst);
                announced != 0 && announcer(announced) != opener && counts(announced, now)
            })
    }

    fn announce(&self, opener: u32, now: Boottime) {
        let ours = announcement(opener, now + ANNOUNCED);
        let replace = |place: &AtomicU64, seen: u64| {
            place.compare_exchange(seen, ours, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        for place in &self.announced {
            let seen = place.load(Ordering::SeqCst);
            // Only this opener changes its own announcement, unless it had run out.
            if announcer(seen) == opener && replace(place, seen) {
                return;
            }
        }
        for place in &self.announced {
            let seen = place.load(Ordering::SeqCst);
            if (seen == 0 || !counts(seen, now)) && replace(place, seen) {
                return;
            }
        }
        self.more.fetch_max(ours & MOMENT, Ordering::SeqCst);
    }

    fn withdraw(&self, opener: u32) {
        for place in &self.announced {
            let seen = place.load(Ordering::SeqCst);
            if announcer(seen) == opener {
                let _ = place.compare_exchange(seen, 0, Ordering::SeqCst, Ordering::SeqCst);
            }
        }
    }
}

fn bucket_of(hash: KeyHash) -> usize {
    hash.bits() as usize % BUCKETS
}

fn bell_bit(bucket: usize) -> u32 {
    1 << (bucket as u32 % BUCKET_BITS)
}

/// Wakes whoever sleeps on one of the bell's bits.
fn ring(control: &Control, bits: u32) {
    let bell = control.bell();
    bell.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the word is mapped, and the call only looks up who waits for it.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            bell.as_ptr(),
            libc::FUTEX_WAKE_BITSET,
            i32::MAX,
            ptr::null::<libc::timespec>(),
            ptr::null::<u32>(),
            bits,
        );
    }
}

/// Tells every waiter of every process to look.
pub fn tell_everybody(control: &Control) {
    for bucket in control.buckets() {
        if bucket.anybody() {
            bucket.sequence.fetch_add(1, Ordering::SeqCst);
        }
    }
    ring(control, u32::MAX);
}

/// The keys that a transaction freed, whose waiters are to be told.
#[derive(Default)]
pub struct Freed {
    first: Option<KeyHash>,
    more: Vec<KeyHash>,
}

impl Freed {
    pub fn push(&mut self, hash: KeyHash) {
        match self.first {
            None => self.first = Some(hash),
            Some(_) => self.more.push(hash),
        }
    }

    fn buckets(&self) -> impl Iterator<Item = usize> {
        self.first.iter().chain(&self.more).map(|&hash| bucket_of(hash))
    }
}

/// Who is to be woken, once nothing is locked any more: whoever is woken may come at once.
#[must_use]
pub struct Calls(Option<Box<CallsToMake>>);

struct CallsToMake {
    watches: Arc<Watches>,
    bits: u32,
    local: Vec<usize>,
}

impl Calls {
    pub fn make(self) {
        let Some(calls) = self.0 else { return };
        let watches = calls.watches;
        if calls.bits != 0 {
            ring(&watches.control, calls.bits);
        }
        for index in calls.local {
            let woken = match watches.local.lock().buckets.get_mut(&index) {
                Some(watched) => watched.tell(watches.control.bucket(index).sequence()),
                None => Vec::new(),
            };
            woken.iter().for_each(|watched| watched.wake());
        }
    }
}

/// The watches of one opener of the store, and the thread that sleeps for them.
pub struct Watches {
    control: Arc<Control>,
    opener: u32,
    /// How many watches there are, to be read without the lock.
    count: AtomicUsize,
    generation: u64,
    /// The files were replaced, or the store is dropped: nothing will be told here any more.
    closed: AtomicBool,
    local: Mutex<Local>,
}

#[derive(Default)]
struct Local {
    buckets: HashMap<usize, WatchedBucket>,
    thread: Thread,
    /// Since the thread fell asleep: what it listens to. 0 when it is awake.
    listening: u32,
    /// Until when a bucket's bit is listened to although nobody watches it.
    lingering: [Option<Boottime>; BUCKET_BITS as usize],
}

#[derive(Default, PartialEq, Eq)]
enum Thread {
    #[default]
    None,
    Runs,
}

struct WatchedBucket {
    /// The sequence of which all these watches have been told.
    told: u32,
    watches: Vec<Arc<Watched>>,
    announced: Boottime,
}

#[derive(Default)]
struct Watched {
    waker: Mutex<Option<Waker>>,
}

impl Watched {
    fn wake(&self) {
        let waker = self.waker.lock().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Watches {
    pub fn new(control: Arc<Control>) -> Arc<Watches> {
        Arc::new(Watches {
            opener: control.number_opener(),
            control,
            count: AtomicUsize::new(0),
            generation: process::generation(),
            closed: AtomicBool::new(false),
            local: Mutex::default(),
        })
    }

    /// Whether somebody in another process waits for the key.
    pub fn awaited_elsewhere(&self, hash: KeyHash) -> bool {
        let bucket = self.control.bucket(bucket_of(hash));
        bucket.anybody() && bucket.awaited_by_others(self.opener, Boottime::now())
    }

    /// Notes what a commit freed. The mutex is held, so whoever announced himself and then looked has
    /// either seen the commit or is seen here.
    #[inline]
    pub fn note(self: &Arc<Watches>, freed: &Freed, now: Boottime) -> Calls {
        let mut awaited = false;
        for index in freed.buckets() {
            let bucket = self.control.bucket(index);
            bucket.sequence.fetch_add(1, Ordering::SeqCst);
            awaited |= bucket.anybody();
        }
        Calls(awaited.then(|| self.calls(freed, now)))
    }

    #[cold]
    fn calls(self: &Arc<Watches>, freed: &Freed, now: Boottime) -> Box<CallsToMake> {
        let awaited = |index: &usize| self.control.bucket(*index).awaited_by_others(self.opener, now);
        let bits = freed.buckets().filter(awaited).fold(0, |bits, index| bits | bell_bit(index));
        let watched = self.count.load(Ordering::SeqCst) != 0;
        let local = if watched { freed.buckets().collect() } else { Vec::new() };
        Box::new(CallsToMake { watches: Arc::clone(self), bits, local })
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Ends the thread, and makes every watch look, and look elsewhere.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let watched: Vec<_> = {
            let local = self.local.lock();
            for &index in local.buckets.keys() {
                self.control.bucket(index).withdraw(self.opener);
            }
            local.buckets.values().flat_map(|bucket| bucket.watches.iter().cloned()).collect()
        };
        ring(&self.control, self.own_bit());
        watched.iter().for_each(|watched| watched.wake());
    }

    fn own_bit(&self) -> u32 {
        1 << (BUCKET_BITS + self.opener % OWN_BITS)
    }

    /// Watches the bucket of a key from now on.
    pub fn watch(self: &Arc<Watches>, hash: KeyHash) -> Registration {
        let index = bucket_of(hash);
        let bucket = self.control.bucket(index);
        let watched = Arc::new(Watched::default());
        let mut local = self.local.lock();
        // Announced before the sequence is read: what is freed after that is told.
        let now = Boottime::now();
        bucket.announce(self.opener, now);
        let seen = bucket.sequence();
        let entry = local.buckets.entry(index).or_insert_with(|| WatchedBucket {
            told: seen,
            watches: Vec::new(),
            announced: now,
        });
        entry.announced = now;
        entry.watches.push(Arc::clone(&watched));
        self.count.fetch_add(1, Ordering::SeqCst);
        if local.thread == Thread::None && !self.is_closed() {
            local.thread = self.start_thread();
        }
        let deaf = local.listening & bell_bit(index) == 0 && local.listening != 0;
        drop(local);
        if deaf {
            ring(&self.control, self.own_bit());
        }
        Registration { watches: Arc::clone(self), index, seen, watched }
    }

    /// Whether other processes are heard.
    pub fn listens(&self) -> bool {
        self.local.lock().thread != Thread::None
    }

    /// Without the thread, watches still see what this process frees, and what they find when they are
    /// looked at: their owner looks now and then anyway (R10).
    fn start_thread(self: &Arc<Watches>) -> Thread {
        let watches = Arc::clone(self);
        let started = runtime::with_signals_blocked(|| {
            std::thread::Builder::new()
                .name("nblock-wake".to_string())
                .stack_size(256 << 10)
                .spawn(move || watches.listen())
        });
        match started {
            Ok(_) => Thread::Runs,
            Err(error) => {
                tracing::warn!(%error, "no thread to listen for freed locks: waiters look once a second instead");
                Thread::None
            }
        }
    }

    fn listen(&self) {
        loop {
            // Read before looking: what is rung after this ends the sleep at once.
            let rung = self.control.bell().load(Ordering::SeqCst);
            let mut woken = Vec::new();
            let (bits, until) = {
                let local = &mut *self.local.lock();
                if self.is_closed() {
                    return;
                }
                let now = Boottime::now();
                let mut until = None;
                let mut bits = self.own_bit();
                if !local.buckets.is_empty() {
                    until = Some(now + LOOK);
                }
                for (&index, watched) in &mut local.buckets {
                    let bucket = self.control.bucket(index);
                    if now.since(watched.announced) >= RENEWED {
                        bucket.announce(self.opener, now);
                        watched.announced = now;
                    }
                    woken.append(&mut watched.tell(bucket.sequence()));
                    bits |= bell_bit(index);
                    until = earlier(until, watched.announced + RENEWED);
                }
                for (bit, lingering) in local.lingering.iter_mut().enumerate() {
                    match *lingering {
                        Some(end) if end > now => {
                            bits |= 1 << bit;
                            until = earlier(until, end);
                        }
                        _ => *lingering = None,
                    }
                }
                local.listening = bits;
                (bits, until.map(|until| until.since(now)))
            };
            woken.iter().for_each(|watched| watched.wake());
            // A process that was killed inside the mutex is noticed by the next that takes it, which notifies all waiters. That
            // may fail for others' reasons, of which their own calls tell.
            if until.is_some() {
                drop(self.control.try_lock());
            }
            self.sleep(rung, bits, until);
            self.local.lock().listening = 0;
        }
    }

    /// Sleeps until one of the bits is rung, unless the bell was rung since, but not for longer than `left`.
    fn sleep(&self, rung: u32, bits: u32, left: Option<Duration>) {
        let until = left.map(|left| moment(libc::CLOCK_MONOTONIC, left));
        let until = until.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: the word is mapped while `self` has the control file; the time outlives the call.
        let status = unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.control.bell().as_ptr(),
                libc::FUTEX_WAIT_BITSET,
                rung,
                until,
                ptr::null::<u32>(),
                bits,
            )
        };
        if status != 0 {
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::ETIMEDOUT)) {
                // No kernel says so; should one, the thread must not spin.
                tracing::warn!(%error, "the embedded store cannot wait for other processes");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

fn earlier(one: Option<Boottime>, other: Boottime) -> Option<Boottime> {
    Some(one.map_or(other, |one| one.min(other)))
}

impl WatchedBucket {
    /// Those to wake, if there is news for them.
    fn tell(&mut self, sequence: u32) -> Vec<Arc<Watched>> {
        if mem::replace(&mut self.told, sequence) == sequence { Vec::new() } else { self.watches.clone() }
    }
}

/// One watch on one bucket.
pub struct Registration {
    watches: Arc<Watches>,
    index: usize,
    /// The sequence that the owner knows of.
    seen: u32,
    watched: Arc<Watched>,
}

impl Registration {
    pub fn is_closed(&self) -> bool {
        self.watches.is_closed()
    }

    pub fn poll(&mut self, context: &Context<'_>) -> Poll<()> {
        {
            let waker = &mut *self.watched.waker.lock();
            match waker {
                Some(known) => known.clone_from(context.waker()),
                None => *waker = Some(context.waker().clone()),
            }
        }
        // Read after the waker was left: who rings later finds it.
        let sequence = self.watches.control.bucket(self.index).sequence();
        if mem::replace(&mut self.seen, sequence) == sequence { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.watches.generation != process::generation() {
            // The parent's: what it announced goes on counting, and its mutex may have been held.
            return;
        }
        let local = &mut *self.watches.local.lock();
        self.watches.count.fetch_sub(1, Ordering::SeqCst);
        let Some(bucket) = local.buckets.get_mut(&self.index) else { return };
        bucket.watches.retain(|watched| !Arc::ptr_eq(watched, &self.watched));
        if bucket.watches.is_empty() {
            local.buckets.remove(&self.index);
            self.watches.control.bucket(self.index).withdraw(self.watches.opener);
            local.lingering[self.index % BUCKET_BITS as usize] = Some(Boottime::now() + LINGER);
        }
    }
}
