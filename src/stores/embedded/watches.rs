//! The waiters of this process, and the thread that listens for changes by other processes (R10).
//!
//! A watch announces itself in the table's word for its key. If the waiting thread itself polls the watch, it sleeps on
//! that word, and the process that changes the key wakes it. All other watches are woken by this process for its own
//! changes, and by the listening thread, which sleeps on a futex word, for changes by other processes.

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

/// How often the listening thread checks by itself, while there are watches: a process that freed a key may have been
/// killed before it woke the waiters (R10), and the file may have been removed. It reads a few words and checks its
/// descriptor, which costs less than an attempt for each waiter.
const LOOK: Duration = Duration::from_secs(1);

/// The watches of one open table.
pub struct Watches {
    table: Arc<Table>,
    /// The number of watches, to be read without the mutex.
    count: AtomicUsize,
    generation: u64,
    /// The file was replaced, or the store dropped: no more changes are reported.
    closed: AtomicBool,
    local: Mutex<Local>,
}

#[derive(Default)]
struct Local {
    by_key: HashMap<KeyHash, Vec<Arc<Watched>>>,
    /// Whether the thread runs.
    listens: bool,
    /// The bits that it listens to while it sleeps; 0 while it is awake.
    listening: u32,
    /// Whether it wakes by itself for the next check.
    looks: bool,
}

struct Watched {
    /// The value of the key's word when this was last announced.
    seen: AtomicU32,
    /// Whether the waiting thread sleeps on the word itself.
    by_thread: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

/// How a watch that is polled on this thread is woken.
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
            // The thread only has to run, with its regular checks.
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

    /// After a change by this process: wakes its watches of the key that do not sleep on the key's word.
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

    /// Ends the thread, and wakes every watch, so that its owner turns to the new files.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let watched: Vec<_> = self.local.lock().by_key.values().flatten().cloned().collect();
        self.table.file.wake_listeners(self.table.file.own_bit());
        watched.iter().for_each(|watched| watched.wake());
    }

    /// Whether changes by other processes are noticed.
    pub fn listens(&self) -> bool {
        self.local.lock().listens
    }

    /// If the thread cannot be started, watches are still woken for changes by this process, and their owners check at
    /// intervals (R10).
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
            // Read before the words are checked: a later change ends the sleep at once.
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
                // A key that was waited for a moment ago will probably be waited for again: it is listened to once
                // more.
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
        // The key may have changed before the waker was set.
        if self.has_moved() || self.is_closed() {
            return Poll::Ready(());
        }
        if self.is_by_thread() {
            let seen = self.watched.seen.load(Ordering::SeqCst);
            let Some((word, now)) = self.watches.table.file.to_sleep_on(&self.hash.0, seen) else {
                self.announce(sleeper_here());
                return Poll::Ready(());
            };
            // SAFETY: the word is mapped as long as the table is open, and `self` keeps it open. Dropping `self`
            // withdraws the word (`no_word`).
            unsafe { runtime::sleep_on(word, now) };
        }
        Poll::Pending
    }

    fn is_by_thread(&self) -> bool {
        self.watched.by_thread.load(Ordering::SeqCst)
    }

    /// Whether the key may have changed. If so, the watch is announced again, before its owner reads the record. It is
    /// also announced again if its thread cannot sleep on the word any more.
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
        // In a forked child, another thread of the parent may have had the mutex locked; it is never unlocked.
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
