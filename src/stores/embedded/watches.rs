//! Those of this process that wait until a key changes, and the thread that listens for them (R10).
//!
//! A watch announces itself in the table's word for its key. Where the thread that waits polls it, it sleeps on that word
//! itself, and the process that changes the key wakes it. For all other watches, a change in another process wakes the
//! futex word that the listening thread sleeps on, and one in this process wakes them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::table::{Sleeper, Table, listener_bit};
use crate::key::KeyHash;
use crate::sys::mutex::Mutex;
use crate::sys::runtime::LookedAfter;
use crate::sys::{process, runtime};

/// How often the thread looks by itself, while somebody waits: a process that freed a key may have been killed before
/// it woke anybody (R10), and the file may have been removed. It looks at a few words and at its descriptor, which costs
/// less than an attempt for each waiter.
const LOOK: Duration = Duration::from_secs(1);

/// The watches of one open table.
pub struct Watches {
    table: Arc<Table>,
    /// How many watches there are, to be read without the lock.
    count: AtomicUsize,
    generation: u64,
    /// The file was replaced, or the store is dropped: no more changes will be reported here.
    closed: AtomicBool,
    local: Mutex<Local>,
}

#[derive(Default)]
struct Local {
    by_key: HashMap<KeyHash, Vec<Arc<Watched>>>,
    /// Whether the thread runs.
    listens: bool,
    /// What it listens to while it sleeps. 0 when it is awake.
    listening: u32,
    /// Whether it wakes by itself for its next look.
    looks: bool,
}

struct Watched {
    /// What the key's word was when this was announced last.
    seen: AtomicU32,
    /// Whether its thread sleeps on the word, and is woken by who changes the key.
    by_thread: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

/// How a watch that is polled on this thread hears of a change.
fn sleeper_here() -> Sleeper {
    if runtime::sleeps_on_words() { Sleeper::Thread } else { Sleeper::Listener }
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
    pub fn new(table: Arc<Table>) -> Arc<Watches> {
        Arc::new(Watches {
            table,
            count: AtomicUsize::new(0),
            generation: process::generation(),
            closed: AtomicBool::new(false),
            local: Mutex::default(),
        })
    }

    /// Watches a key from now on.
    pub fn watch(self: &Arc<Watches>, hash: KeyHash) -> Watching {
        let sleeper = sleeper_here();
        let by_thread = sleeper == Sleeper::Thread;
        let watched = Arc::new(Watched {
            seen: AtomicU32::new(self.table.file.announce(&hash.0, sleeper)),
            by_thread: AtomicBool::new(by_thread),
            waker: Mutex::default(),
        });
        let mut local = self.local.lock();
        local.by_key.entry(hash).or_default().push(Arc::clone(&watched));
        self.count.fetch_add(1, Ordering::SeqCst);
        if !local.listens && !self.is_closed() {
            local.listens = self.start_thread();
        }
        let hears = match by_thread {
            // It is only looked after.
            true => local.looks,
            false => local.listening & listener_bit(&hash.0) != 0,
        };
        let asleep = local.listening != 0;
        drop(local);
        if asleep && !hears {
            self.table.file.wake_listeners(self.table.file.own_bit());
        }
        Watching { watches: Arc::clone(self), hash, watched }
    }

    /// Wakes those that wait for a key here, whose record this process has changed, and who do not sleep on its word.
    #[inline]
    pub fn tell(&self, hash: KeyHash) {
        if self.count.load(Ordering::SeqCst) != 0 {
            self.tell_all(&hash);
        }
    }

    #[cold]
    fn tell_all(&self, hash: &KeyHash) {
        let watched = self.local.lock().by_key.get(hash).cloned().unwrap_or_default();
        let told = |watched: &&Arc<Watched>| !watched.by_thread.load(Ordering::SeqCst);
        watched.iter().filter(told).for_each(|watched| watched.wake());
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Ends the thread, and makes every watch look, and look elsewhere.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let watched: Vec<_> = self.local.lock().by_key.values().flatten().cloned().collect();
        self.table.file.wake_listeners(self.table.file.own_bit());
        watched.iter().for_each(|watched| watched.wake());
    }

    /// Whether other processes are heard.
    pub fn listens(&self) -> bool {
        self.local.lock().listens
    }

    /// Without the thread, watches still see what this process frees, and what they find when they are
    /// looked at: their owner looks now and then anyway (R10).
    fn start_thread(self: &Arc<Watches>) -> bool {
        let watches = Arc::clone(self);
        let started = runtime::with_signals_blocked(|| {
            std::thread::Builder::new()
                .name("nblock-wake".to_string())
                .stack_size(256 << 10)
                .spawn(move || watches.listen())
        });
        if let Err(error) = &started {
            tracing::warn!(%error, "no thread could be started to listen for released locks: waiters check once a \
                 second instead");
        }
        started.is_ok()
    }

    fn listen(&self) {
        let file = &self.table.file;
        let mut last = 0;
        let mut timers: Option<LookedAfter> = None;
        loop {
            // Read before looking: what is seen after this ends the sleep at once.
            let seen = file.listener_count();
            let mut woken = Vec::new();
            let (bits, keys, looks) = {
                let mut local = self.local.lock();
                if self.is_closed() {
                    return;
                }
                let keys: Vec<KeyHash> = local.by_key.keys().copied().collect();
                for (hash, watched) in &local.by_key {
                    let moved = |watched: &&Arc<Watched>| file.has_moved(&hash.0, watched.seen.load(Ordering::SeqCst));
                    woken.extend(watched.iter().filter(moved).cloned());
                }
                let bits = keys.iter().fold(file.own_bit(), |bits, hash| bits | listener_bit(&hash.0));
                // What was waited for a moment ago will be again: it is listened to once more.
                local.listening = bits | last;
                local.looks = !keys.is_empty() || last != bits;
                (bits, keys, local.looks)
            };
            woken.iter().for_each(|watched| watched.wake());
            keys.iter().for_each(|hash| self.table.tidy_up(&hash.0));
            if !keys.is_empty() {
                self.table.retire_if_removed();
            }
            match (looks, &mut timers) {
                (true, Some(looked_after)) => looked_after.look(),
                (true, none) => *none = LookedAfter::begin(),
                (false, any) => *any = None,
            }
            file.listen(seen, bits | last, looks.then_some(LOOK));
            last = bits;
            self.local.lock().listening = 0;
        }
    }
}

/// One watch on one key.
pub struct Watching {
    watches: Arc<Watches>,
    hash: KeyHash,
    watched: Arc<Watched>,
}

impl Watching {
    /// Whether no more changes will be reported here.
    pub fn is_closed(&self) -> bool {
        self.watches.is_closed()
    }

    pub fn poll(&mut self, context: &Context<'_>) -> Poll<()> {
        if self.has_moved() {
            return Poll::Ready(());
        }
        *self.watched.waker.lock() = Some(context.waker().clone());
        // It may have moved before the waker was there.
        if self.has_moved() || self.is_closed() {
            return Poll::Ready(());
        }
        if self.is_by_thread() {
            let seen = self.watched.seen.load(Ordering::SeqCst);
            let Some((word, now)) = self.watches.table.file.to_sleep_on(&self.hash.0, seen) else {
                self.announce(sleeper_here());
                return Poll::Ready(());
            };
            // SAFETY: the word is mapped as long as the table is open, which this keeps; dropped, it takes the word back.
            unsafe { runtime::sleep_on(word, now) };
        }
        Poll::Pending
    }

    fn is_by_thread(&self) -> bool {
        self.watched.by_thread.load(Ordering::SeqCst)
    }

    /// Whether the key may have changed. If so, the watch is announced again: before its owner looks. So is one whose
    /// thread cannot sleep on the word any more.
    fn has_moved(&self) -> bool {
        let (file, sleeper) = (&self.watches.table.file, sleeper_here());
        let seen = self.watched.seen.load(Ordering::SeqCst);
        let moved = file.has_moved(&self.hash.0, seen);
        if moved || self.is_by_thread() && sleeper == Sleeper::Listener {
            self.announce(sleeper);
        }
        moved || file.has_moved(&self.hash.0, seen)
    }

    fn announce(&self, sleeper: Sleeper) {
        self.watched.by_thread.store(sleeper == Sleeper::Thread, Ordering::SeqCst);
        let seen = self.watches.table.file.announce(&self.hash.0, sleeper);
        self.watched.seen.store(seen, Ordering::SeqCst);
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // In a forked child the lock may be another thread's of the parent, for good.
        if self.watches.generation != process::generation() {
            return;
        }
        if let Some(word) = self.watches.table.file.word_address(&self.hash.0) {
            runtime::no_word(word);
        }
        let mut local = self.watches.local.lock();
        if let Some(watched) = local.by_key.get_mut(&self.hash) {
            watched.retain(|watched| !Arc::ptr_eq(watched, &self.watched));
            if watched.is_empty() {
                local.by_key.remove(&self.hash);
            }
        }
        self.watches.count.fetch_sub(1, Ordering::SeqCst);
    }
}
