//! A mutex for processes: one futex word, as the kernel defines it (linux/futex.h).
//!
//! The word has the owner's thread number and two flags: a thread sleeps on it; its owner has died. When a thread dies,
//! the kernel sets the second flag in the word that the thread has named (`thread.rs`), and wakes one sleeper. The next
//! thread that takes the mutex repairs what it guards; if that one dies meanwhile, the kernel sets the flag again.

use std::time::{Duration, Instant};

use super::futex;
use super::thread::{self, Pending, Thread};
use super::word::Word32;

/// A thread sleeps on the word (FUTEX_WAITERS).
const WAITERS: u32 = 0x8000_0000;
/// The last owner died, or left what it guards in need of repair (FUTEX_OWNER_DIED).
pub const OWNER_DIED: u32 = 0x4000_0000;
/// The owner's thread (FUTEX_TID_MASK).
pub const OWNER: u32 = 0x3fff_ffff;

/// How often to look again before sleeping: about as long as a few operations take. After that, the owner is probably
/// not running.
const PAUSES: u32 = 100;
/// How often a sleeper looks without being woken: another sleeper may have been woken and then killed.
const SLICE: Duration = Duration::from_millis(100);
/// After this time with the same owner, the sleeper checks whether that thread exists. The kernel reports deaths at
/// once; the check is for damaged words, and for threads for which the kernel has no list.
const DOUBT: Duration = Duration::from_secs(1);

/// How long an operation may wait in all. The clock is read only if it has to wait.
#[derive(Debug)]
pub struct Patience {
    limit: Duration,
    until: Option<Instant>,
}

impl Patience {
    /// Does not sleep.
    pub fn none() -> Patience {
        Patience { limit: Duration::ZERO, until: None }
    }

    pub fn new(limit: Duration) -> Patience {
        Patience { limit, until: None }
    }

    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// The time that is left, counted from the first call of this.
    pub fn left(&mut self) -> Duration {
        if self.limit.is_zero() {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let until = *self.until.get_or_insert_with(|| now + self.limit.min(Duration::from_secs(1 << 32)));
        until.saturating_duration_since(now)
    }
}

/// Why the mutex was not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// Another thread has it.
    Busy { owner: u32 },
    /// This thread has a mutex already: it is in a signal handler that interrupted an operation.
    Inside,
    /// The kernel keeps no robust list for this thread.
    NoRobustList,
}

/// A mutex that this thread holds. A thread holds one at a time.
pub struct Held<'a> {
    word: &'a Word32,
    /// Whether its last owner died, so that what it guards has to be repaired.
    pub needs_repair: bool,
    /// The word is released before this is dropped, which withdraws the word from the kernel.
    pending: Pending<'a>,
}

/// Takes the mutex in this generation, and waits if necessary.
#[inline]
pub fn take<'a>(word: &'a Word32, generation: u64, patience: &mut Patience) -> Result<Held<'a>, Unavailable> {
    let thread = Thread::current(generation).ok_or(Unavailable::NoRobustList)?;
    if thread.is_inside() {
        return Err(Unavailable::Inside);
    }
    let pending = thread.about_to_take(word);
    let needs_repair = match word.exchange(0, thread.number()) {
        Ok(()) => false,
        Err(_) => take_slowly(word, thread, patience)?,
    };
    Ok(Held { word, needs_repair, pending })
}

/// Takes the word if it has no owner. `flag` is set with it.
fn try_take(word: &Word32, seen: u32, thread: Thread, flag: u32) -> Option<bool> {
    // This thread does not hold the mutex: the owner was an earlier thread with its number, which is dead.
    let mine = seen & OWNER == thread.number();
    if seen & OWNER != 0 && !mine {
        return None;
    }
    let taken = word.exchange(seen, thread.number() | seen & WAITERS | flag);
    taken.ok().map(|()| mine || seen & OWNER_DIED != 0)
}

#[cold]
fn take_slowly(word: &Word32, thread: Thread, patience: &mut Patience) -> Result<bool, Unavailable> {
    for _ in 0..PAUSES {
        let seen = word.load_in_order();
        if let Some(needs_repair) = try_take(word, seen, thread, 0) {
            return Ok(needs_repair);
        }
        std::hint::spin_loop();
    }
    let mut suspect = (0, Instant::now());
    loop {
        let seen = word.load_in_order();
        // The flag is set because other threads may sleep too: the release has cleared it.
        if let Some(needs_repair) = try_take(word, seen, thread, WAITERS) {
            return Ok(needs_repair);
        }
        let owner = seen & OWNER;
        let left = patience.left();
        if left.is_zero() {
            return Err(Unavailable::Busy { owner });
        }
        if owner != suspect.0 {
            suspect = (owner, Instant::now());
        } else if suspect.1.elapsed() >= DOUBT {
            if !thread::is_alive(owner) && word.exchange(seen, thread.number() | WAITERS).is_ok() {
                return Ok(true);
            }
            suspect.1 = Instant::now();
        }
        if seen & WAITERS != 0 || word.exchange(seen, seen | WAITERS).is_ok() {
            futex::sleep(word, seen | WAITERS, left.min(SLICE), futex::ANY);
        }
    }
}

impl Held<'_> {
    /// Releases the mutex as if this thread had died: the next owner repairs what it guards.
    pub fn abandon(&mut self) {
        self.needs_repair = true;
    }
}

impl Drop for Held<'_> {
    #[inline]
    fn drop(&mut self) {
        let after = if self.needs_repair || std::thread::panicking() { OWNER_DIED } else { 0 };
        let thread = self.pending.thread;
        if after == 0 && self.word.exchange(thread.number(), 0).is_ok() {
            return;
        }
        give_back(self.word, thread, after);
    }
}

#[cold]
fn give_back(word: &Word32, thread: Thread, after: u32) {
    loop {
        let seen = word.load_in_order();
        if seen & OWNER != thread.number() {
            // Another process has overwritten the word, and it is not ours to change any more.
            return;
        }
        if word.exchange(seen, after).is_ok() {
            if seen & WAITERS != 0 {
                // If this thread dies before the call, the kernel wakes a sleeper (`handle_futex_death`).
                futex::wake(word, 1, futex::ANY);
            }
            return;
        }
    }
}
