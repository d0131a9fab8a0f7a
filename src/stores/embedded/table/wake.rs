//! Words to sleep on until a key changes.
//!
//! Each slot has one: a count, two bits for sleepers, and the opener that they belong to. A waiter sets its bit, then
//! reads the record, then sleeps while the word is as it was after the bit was set. A thread that changes the record
//! reads the word with the mutex held; if a bit is set, it raises the count, clears the rest, and wakes the sleepers
//! after it has released the mutex. Since both read with the mutex held, either the waiter sees the change, or the
//! changing thread sees the bit.
//!
//! The wake-ups are sent after the mutex is released, and the thread may die in between. So it leaves a *note* of the
//! slot in the shard, and removes it after the wake-ups are sent. A thread that finds a note sends the wake-ups too.
//! (If two threads die at that point in one shard, only one note is left: a waiter also looks by itself once a second.)
//!
//! A waiting thread sleeps on the word itself ([`Sleeper::Thread`]). A waiter without a thread sets the other bit
//! ([`Sleeper::Listener`]), and its process has a thread that sleeps on one word for all slots, the *listeners' word*.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::file::TableFile;
use super::futex::{self, Woken};
use super::layout::{SLOTS, Shard, Slot, slot_of};
use super::word::Word32;

const THREAD: u32 = 1;
const LISTENER: u32 = 2;
const SLEEPERS: u32 = THREAD | LISTENER;

/// The opener that the sleepers belong to: a number from 1 on, or 0 if they belong to several.
const OPENER_SHIFT: u32 = 2;
const OPENERS: u32 = (1 << 12) - 1;
const OPENER: u32 = OPENERS << OPENER_SHIFT;

const ONE: u32 = 1 << 14;

/// A note for all slots.
const EVERYBODY: u32 = SLOTS as u32 + 1;

/// The number of bits of the listeners' word that stand for slots. With the others, openers wake their own listener.
const SLOT_BITS: u32 = 24;
const OWN_BITS: u32 = u32::BITS - SLOT_BITS;

/// A thread that sleeps until a key changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleeper {
    /// A thread, with `TableFile::to_sleep_on`.
    Thread,
    /// The thread that waits on the futex word for a whole process, with `TableFile::listen`.
    Listener,
}

fn is_awaited(word: u32) -> bool {
    word & SLEEPERS != 0
}

/// The bit of the listeners' word that stands for a key.
pub fn listener_bit(hash: &[u8; 20]) -> u32 {
    let (shard, slot) = slot_of(hash);
    bit_of(shard, slot)
}

fn bit_of(shard: usize, slot: usize) -> u32 {
    1 << ((shard * SLOTS + slot) as u32 % SLOT_BITS)
}

/// The waiters to wake after the mutex of a shard is released.
#[derive(Default)]
#[must_use]
pub struct Wakeups {
    /// The slot of this operation's key, as its note, and whether listeners wait for it. 0: no waiter is to be woken.
    own: u32,
    listeners: bool,
    /// What was found in the shard's note.
    note: u32,
    /// The slots whose words a repair has raised.
    raised: Option<Box<[u64; SLOTS / 64]>>,
}

/// Raises the count, so that a thread that has not seen the change does not fall asleep. Returns the former word.
fn raise(word: &Word32) -> u32 {
    // In this order: if the process is killed in between, the bits are still there for the repair.
    word.fetch_add(ONE);
    word.fetch_and(!(SLEEPERS | OPENER))
}

impl Wakeups {
    /// Notes the wake-ups that a dead process has not sent. With the mutex held.
    #[inline]
    pub fn read_note(&mut self, shard: &Shard) {
        self.note = shard.note.load();
    }

    /// Notes that the sleepers of a slot are to be woken. Returns whether one of them belongs to another opener. With
    /// the mutex held.
    #[inline]
    pub fn add(&mut self, shard: &Shard, slot: usize, word: &Word32, opener: u32) -> bool {
        if !is_awaited(word.load_in_order()) {
            return false;
        }
        self.own = slot as u32 + 1;
        shard.note.store(self.own);
        let was = raise(word);
        self.listeners = was & LISTENER != 0;
        is_awaited(was) && was & OPENER != tag(opener)
    }

    /// Notes that all sleepers of the shard are to be woken: a dead owner of the mutex may not have woken them for its
    /// change.
    pub fn add_all(&mut self, shard: &Shard, slots: &[Slot; SLOTS]) {
        shard.note.store(EVERYBODY);
        let mut raised = Box::new([0; SLOTS / 64]);
        for (slot, word) in slots.iter().map(|slot| &slot.wake).enumerate() {
            if is_awaited(word.load_in_order()) {
                raise(word);
                raised[slot / 64] |= 1 << (slot % 64);
            }
        }
        self.raised = Some(raised);
    }

    /// Sends the wake-ups, after the mutex is released.
    #[inline]
    pub fn send(&self, file: &TableFile, shard: usize) {
        if self.own | self.note != 0 || self.raised.is_some() {
            self.send_now(file, shard);
        }
    }

    #[cold]
    fn send_now(&self, file: &TableFile, shard: usize) {
        let Some(top) = file.top_if_mapped() else { return };
        let (slots, note) = (&top.slots[shard], &top.shards[shard].0.note);
        let mut bits = 0;
        let mut wake = |slot: usize, listeners: bool| {
            futex::wake(&slots[slot].wake, i32::MAX, futex::ANY);
            if listeners {
                bits |= bit_of(shard, slot);
            }
        };
        if let Some(slot) = self.own.checked_sub(1) {
            wake(slot as usize, self.listeners);
        }
        if let Some(raised) = &self.raised {
            (0..SLOTS).filter(|slot| raised[slot / 64] & 1 << (slot % 64) != 0).for_each(|slot| wake(slot, true));
        }
        match self.note {
            0 => {}
            note @ 1..EVERYBODY => wake(note as usize - 1, true),
            // For all slots, or damaged. No thread sleeps on a word that was never used.
            _ => (0..SLOTS).filter(|&slot| slots[slot].wake.load_in_order() != 0).for_each(|slot| wake(slot, true)),
        }
        if bits != 0 {
            file.wake_listeners(bits);
        }
        // A note that another thread has written meanwhile stays.
        let done = |written: u32| {
            if written != 0 {
                let _ = note.exchange(written, 0);
            }
        };
        done(self.note);
        done(self.own);
        done(if self.raised.is_some() { EVERYBODY } else { 0 });
    }
}

/// The number of an opener, as it is in a word.
fn tag(opener: u32) -> u32 {
    (opener % OPENERS + 1) << OPENER_SHIFT
}

/// In a forked child, which does not have the mapping, these functions neither sleep nor wake: a thread that reads the
/// record then gets an error.
impl TableFile {
    fn word_of(&self, hash: &[u8; 20]) -> Option<&Word32> {
        let (shard, slot) = slot_of(hash);
        self.top_if_mapped().map(|top| &top.slots[shard][slot].wake)
    }

    /// Announces a waiter for a key. To be called before the record is read. The result is for
    /// [`TableFile::to_sleep_on`] and [`TableFile::has_moved`], and is valid until the next change of the key.
    pub fn announce(&self, hash: &[u8; 20], sleeper: Sleeper) -> u32 {
        let bit = match sleeper {
            Sleeper::Thread => THREAD,
            Sleeper::Listener => LISTENER,
        };
        let Some(word) = self.word_of(hash) else { return 0 };
        let mut seen = word.load_in_order();
        loop {
            let opener = match seen & OPENER {
                _ if !is_awaited(seen) => tag(self.opener),
                same if same == tag(self.opener) => same,
                _ => 0,
            };
            let announced = seen & !OPENER | opener | bit;
            match word.exchange(seen, announced) {
                Ok(()) => return announced,
                Err(now) => seen = now,
            }
        }
    }

    /// Whether the key may have changed since [`TableFile::announce`] returned `seen`.
    pub fn has_moved(&self, hash: &[u8; 20], seen: u32) -> bool {
        self.word_of(hash).is_none_or(|word| word.load_in_order() / ONE != seen / ONE)
    }

    /// The word that a thread may sleep on, and its present value. `None` if the key may have changed since
    /// [`TableFile::announce`] returned `seen` for a [`Sleeper::Thread`].
    pub fn to_sleep_on(&self, hash: &[u8; 20], seen: u32) -> Option<(*const AtomicU32, u32)> {
        let word = self.word_of(hash)?;
        // Other waiters may have added their bits.
        let now = word.load_in_order();
        (now / ONE == seen / ONE && now & THREAD != 0).then(|| (word.address(), now))
    }

    /// The address of the word of a key.
    pub fn word_address(&self, hash: &[u8; 20]) -> Option<*const AtomicU32> {
        self.word_of(hash).map(Word32::address)
    }

    /// Sleeps until the key may have changed since [`TableFile::announce`] returned `seen`. May return early. (A thread
    /// of the library sleeps on its own word as well.)
    #[cfg(test)]
    pub fn sleep(&self, hash: &[u8; 20], seen: u32, left: Duration) -> Woken {
        self.word_of(hash).map_or(Woken::Called, |word| futex::sleep(word, seen, left, futex::ANY))
    }

    /// Whether a waiter was announced for the key, or for another key of its slot.
    #[cfg(test)]
    pub fn is_awaited(&self, hash: &[u8; 20]) -> bool {
        self.word_of(hash).is_some_and(|word| is_awaited(word.load_in_order()))
    }

    /// A count of the wake-ups on the listeners' word, for [`TableFile::listen`].
    pub fn listener_count(&self) -> u32 {
        self.top_if_mapped().map_or(0, |top| top.listeners.0.load_in_order())
    }

    /// Sleeps until one of these bits of the listeners' word is woken, unless one was woken since
    /// [`TableFile::listener_count`] returned `seen`. `left`: at most this long.
    pub fn listen(&self, seen: u32, bits: u32, left: Option<Duration>) -> Woken {
        let left = left.unwrap_or(Duration::MAX);
        self.top_if_mapped().map_or(Woken::Called, |top| futex::sleep(&top.listeners.0, seen, left, bits))
    }

    /// The bit that wakes this opener's listener (and some others').
    pub fn own_bit(&self) -> u32 {
        1 << (SLOT_BITS + self.opener % OWN_BITS)
    }

    /// Wakes the listeners for one of these bits.
    pub fn wake_listeners(&self, bits: u32) {
        if let Some(top) = self.top_if_mapped() {
            top.listeners.0.fetch_add(1);
            futex::wake(&top.listeners.0, i32::MAX, bits);
        }
    }

    /// Wakes all sleepers of the file.
    pub fn wake_everybody(&self) {
        let Some(top) = self.top_if_mapped() else { return };
        for word in top.slots.iter().flatten().map(|slot| &slot.wake) {
            if is_awaited(word.load_in_order()) {
                raise(word);
                futex::wake(word, i32::MAX, futex::ANY);
            }
        }
        self.wake_listeners(futex::ANY);
    }
}
