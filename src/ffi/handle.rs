//! Handles: they are checked ids, not addresses, and are never reused.
//!
//! The table has no lock. One word in each slot contains the generation of the handle that the slot serves, whether the
//! handle is live, and how many calls are using it. A handle that was freed, or that belongs to another kind of object
//! or to another copy of the library, is detected. The object is dropped when the last call on it ends. As no change is
//! ever half done, a forked child can use the table as it is.

use std::cell::UnsafeCell;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::ops::Deref;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use super::error::Failure;
use super::operation::Op;
use super::records::List;
use crate::client::Client;
use crate::lock::Lock;
use crate::sys::random::random;

/// A client: an open store plus default options. Made by nbl_client_new, freed by nbl_client_free.
pub struct nbl_client_t(());
/// A lock object: one program's object for one key. Made by nbl_lock_new, freed by nbl_lock_free.
pub struct nbl_lock_t(());
/// An operation in progress. Made by a function whose name ends in _start, freed by nbl_op_free.
pub struct nbl_op_t(());
/// Records as they were read. Made by nbl_list or nbl_find, freed by nbl_list_free.
pub struct nbl_list_t(());

/// The object of a handle.
pub(crate) enum Object {
    Client(Client),
    Lock(Lock),
    Op(Op),
    List(List),
}

/// A kind of object that has handles, and the C type of these handles.
pub(crate) trait HandleType: Sized {
    type Handle;
    const KIND: u64;
    const WHAT: &'static str;
    fn into_object(self) -> Object;
    fn of(object: &Object) -> Option<&Self>;
}

macro_rules! handle_type {
    ($type:ident, $handle:ident, $kind:literal, $what:literal) => {
        impl HandleType for $type {
            type Handle = $handle;
            const KIND: u64 = $kind;
            const WHAT: &'static str = $what;

            fn into_object(self) -> Object {
                Object::$type(self)
            }

            fn of(object: &Object) -> Option<&Self> {
                match object {
                    Object::$type(named) => Some(named),
                    _ => None,
                }
            }
        }
    };
}
handle_type!(Client, nbl_client_t, 1, "client");
handle_type!(Lock, nbl_lock_t, 2, "lock");
handle_type!(Op, nbl_op_t, 3, "operation");
handle_type!(List, nbl_list_t, 4, "list");

/// Creates a handle for an object.
pub(crate) fn register<T: HandleType>(named: T) -> Result<*mut T::Handle, Failure> {
    let index = TABLE.take_slot()?;
    let slot = TABLE.slot(index).expect("a slot that was taken is there");
    // SAFETY: no other thread has this slot: it came from the free list, or is new.
    unsafe { (*slot.object.get()).write(named.into_object()) };
    let generation = slot.state.load(Ordering::Relaxed) >> GENERATION_SHIFT;
    slot.state.store(generation << GENERATION_SHIFT | LIVE | 1, Ordering::Release);
    let id = generation << 40 | u64::from(index) << 16 | salt() << 4 | T::KIND << 1 | 1;
    Ok(ptr::without_provenance_mut(id as usize))
}

/// Finds a handle's object, and keeps it for the duration of a call.
#[inline]
pub(crate) fn get<T: HandleType>(handle: *const T::Handle) -> Result<Pinned<T>, Failure> {
    let Some(slot) = find::<T>(handle) else { return Err(unknown::<T>(handle)) };
    let generation = handle.addr() as u64 >> 40;
    let mut state = slot.state.load(Ordering::Relaxed);
    loop {
        if state & !PINS != generation << GENERATION_SHIFT | LIVE {
            return Err(bad::<T>(handle, "was freed, or never existed"));
        }
        match slot.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => return Ok(Pinned { slot, index: index(handle), kind: std::marker::PhantomData }),
            Err(now) => state = now,
        }
    }
}

/// Frees a handle. Calls that are using it continue, and the last one drops the object. `leave` is called on the object
/// first.
pub(crate) fn free<T: HandleType>(handle: *const T::Handle, leave: impl FnOnce(&T)) -> Result<(), Failure> {
    let pinned = get::<T>(handle)?;
    let generation = handle.addr() as u64 >> 40;
    let mut state = pinned.slot.state.load(Ordering::Relaxed);
    loop {
        if state >> GENERATION_SHIFT != generation || state & LIVE == 0 {
            return Err(bad::<T>(handle, "was freed by another thread"));
        }
        // This removes the handle's own pin; this call's pin stays until `pinned` is dropped.
        match pinned.slot.state.compare_exchange_weak(state, (state & !LIVE) - 1, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => break,
            Err(now) => state = now,
        }
    }
    leave(&pinned);
    Ok(())
}

/// A pin: the object is not dropped before this is.
pub(crate) struct Pinned<T: HandleType> {
    slot: &'static Slot,
    index: u32,
    kind: std::marker::PhantomData<T>,
}

impl<T: HandleType> Deref for Pinned<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: while a pin is held the object stays, and there is no mutable reference to it.
        let object = unsafe { (*self.slot.object.get()).assume_init_ref() };
        T::of(object).expect("a handle's kind is its object's")
    }
}

impl<T: HandleType> Drop for Pinned<T> {
    #[inline]
    fn drop(&mut self) {
        let before = self.slot.state.fetch_sub(1, Ordering::AcqRel);
        if before & (LIVE | PINS) == 1 {
            TABLE.empty(self.index, self.slot);
        }
    }
}

fn index<H>(handle: *const H) -> u32 {
    (handle.addr() as u64 >> 16) as u32 & INDEX_MASK
}

/// The slot of a handle, if this library may have created the handle.
#[inline]
fn find<T: HandleType>(handle: *const T::Handle) -> Option<&'static Slot> {
    let salt = u64::from(SALT.load(Ordering::Relaxed));
    let (given, ours) = (handle.addr() as u64 & 0xffff, (salt & 0xfff) << 4 | T::KIND << 1 | 1);
    // Without a salt, no handle was created yet.
    if given == ours && salt != 0 { TABLE.slot(index(handle)) } else { None }
}

/// The failure for a handle that `find` does not know.
#[cold]
fn unknown<T: HandleType>(handle: *const T::Handle) -> Failure {
    let id = handle.addr() as u64;
    if id == 0 {
        bad::<T>(handle, "is NULL")
    } else if id & 1 == 0 || id >> 4 & 0xfff != salt() {
        bad::<T>(handle, "was not created by this library")
    } else if id >> 1 & 7 != T::KIND {
        bad::<T>(handle, "is of another kind")
    } else {
        bad::<T>(handle, "was never returned by this library")
    }
}

#[cold]
fn bad<T: HandleType>(handle: *const T::Handle, why: &str) -> Failure {
    Failure::bad_handle(format!("{} handle {:#x} {why}", T::WHAT, handle.addr()))
}

/// Twelve random bits, which distinguish this copy of the library from another one in the same process, with a 1 above
/// them. 0 before they are drawn.
static SALT: AtomicU32 = AtomicU32::new(0);

/// The random bits of `SALT`. Draws them at first use.
fn salt() -> u64 {
    match SALT.load(Ordering::Relaxed) {
        0 => {
            let drawn = u32::from_le_bytes(random()) & 0xfff | 0x1000;
            let first = SALT.compare_exchange(0, drawn, Ordering::Relaxed, Ordering::Relaxed);
            u64::from(first.err().unwrap_or(drawn) & 0xfff)
        }
        drawn => u64::from(drawn & 0xfff),
    }
}

/// A slot's word: 24 bits of generation, one bit for a live handle, and the number of pins.
const GENERATION_SHIFT: u32 = 40;
const GENERATIONS: u64 = 1 << 24;
const LIVE: u64 = 1 << 39;
const PINS: u64 = LIVE - 1;
const INDEX_MASK: u32 = (1 << 24) - 1;

struct Slot {
    state: AtomicU64,
    /// The next free slot, plus one.
    next_free: AtomicU32,
    /// How many handles it has served. When it has served all generations, it is not used again.
    served: AtomicU32,
    object: UnsafeCell<MaybeUninit<Object>>,
}

// SAFETY: the object is written while no other thread has the slot, and only read while it is pinned. All kinds of
// objects are Send and Sync, which the next lines check.
unsafe impl Sync for Slot {}
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Object>();
};

/// Chunk `i` has 64 << i slots. All chunks have at least 2^24, one for each index.
const CHUNKS: usize = 19;
const FIRST_CHUNK: u32 = 64;

struct Table {
    chunks: [AtomicPtr<Slot>; CHUNKS],
    /// How many slots were ever used.
    used: AtomicU32,
    /// The first free slot, plus one. The upper half is a counter, so that every change gives a new value (no ABA
    /// problem).
    free: AtomicU64,
}

static TABLE: Table = Table {
    chunks: [const { AtomicPtr::new(ptr::null_mut()) }; CHUNKS],
    used: AtomicU32::new(0),
    free: AtomicU64::new(0),
};

impl Table {
    #[inline]
    fn slot(&self, index: u32) -> Option<&'static Slot> {
        let (chunk, offset) = place(index);
        let first = self.chunks.get(chunk)?.load(Ordering::Acquire);
        if first.is_null() {
            return None;
        }
        // SAFETY: a chunk has FIRST_CHUNK << chunk slots, offset is below that, and it is never freed.
        Some(unsafe { &*first.add(offset) })
    }

    fn take_slot(&self) -> Result<u32, Failure> {
        let mut head = self.free.load(Ordering::Acquire);
        while head as u32 != 0 {
            let index = head as u32 - 1;
            let slot = self.slot(index).expect("a free slot is there");
            let next = (head >> 32).wrapping_add(1) << 32 | u64::from(slot.next_free.load(Ordering::Relaxed));
            match self.free.compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(index),
                Err(now) => head = now,
            }
        }
        let fresh = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| (used < INDEX_MASK).then_some(used + 1));
        let index = fresh.map_err(|_| Failure::resources("at most 16777215 handles can exist at once: free some"))?;
        self.make_chunk(place(index).0);
        Ok(index)
    }

    fn make_chunk(&self, chunk: usize) {
        if !self.chunks[chunk].load(Ordering::Acquire).is_null() {
            return;
        }
        let slots: Box<[Slot]> = (0..FIRST_CHUNK << chunk)
            .map(|_| Slot {
                // The first generation is random too, so that another copy's handles are not taken for ours.
                state: AtomicU64::new((u64::from(u32::from_le_bytes(random())) % GENERATIONS) << GENERATION_SHIFT),
                next_free: AtomicU32::new(0),
                served: AtomicU32::new(0),
                object: UnsafeCell::new(MaybeUninit::uninit()),
            })
            .collect();
        let mut slots = ManuallyDrop::new(slots);
        let first = slots.as_mut_ptr();
        if self.chunks[chunk].compare_exchange(ptr::null_mut(), first, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: another thread was first, and these slots were never shared.
            unsafe { ManuallyDrop::drop(&mut slots) };
        }
    }

    /// Drops the object of a slot, and frees the slot for a handle of the next generation.
    #[cold]
    fn empty(&self, index: u32, slot: &'static Slot) {
        // SAFETY: no pin is held, the handle is dead, and only the caller that released the last pin gets here.
        unsafe { (*slot.object.get()).assume_init_drop() };
        let generation = (slot.state.load(Ordering::Relaxed) >> GENERATION_SHIFT) + 1;
        slot.state.store((generation % GENERATIONS) << GENERATION_SHIFT, Ordering::Release);
        if u64::from(slot.served.fetch_add(1, Ordering::Relaxed)) + 1 == GENERATIONS {
            return;
        }
        let mut head = self.free.load(Ordering::Relaxed);
        loop {
            slot.next_free.store(head as u32, Ordering::Relaxed);
            let next = (head >> 32).wrapping_add(1) << 32 | u64::from(index + 1);
            match self.free.compare_exchange_weak(head, next, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

/// The chunk of an index, and the position in that chunk.
#[inline]
fn place(index: u32) -> (usize, usize) {
    let chunk = (index / FIRST_CHUNK + 1).ilog2();
    let before = FIRST_CHUNK * ((1 << chunk) - 1);
    (chunk as usize, (index - before) as usize)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::*;
    use crate::key::Key;
    use crate::protocol::{Holder, State, StoreTime};
    use crate::record::{Lease, Record};

    fn list() -> *mut nbl_list_t {
        register(List::default()).unwrap()
    }

    #[test]
    fn places_are_dense() {
        assert_eq!(place(0), (0, 0));
        assert_eq!(place(63), (0, 63));
        assert_eq!(place(64), (1, 0));
        assert_eq!(place(191), (1, 127));
        assert_eq!(place(192), (2, 0));
        assert!(place(INDEX_MASK).0 < CHUNKS);
    }

    #[test]
    fn wrong_handles_are_told_apart() {
        let handle = list();
        assert!(get::<List>(handle).is_ok());
        assert!(get::<Lock>(handle.cast()).err().unwrap().message.contains("another kind"));
        free::<List>(handle, |_| {}).unwrap();
        assert!(get::<List>(handle).err().unwrap().message.contains("was freed"));
        assert!(free::<List>(handle, |_| {}).is_err());
        let again = list();
        assert_ne!(handle, again);
        assert!(get::<List>(handle).is_err());
        free::<List>(again, |_| {}).unwrap();
        for wrong in [0usize, 8, 1, usize::MAX, &raw const wrong_one as usize] {
            assert!(get::<List>(ptr::without_provenance(wrong)).is_err());
        }
    }

    #[allow(non_upper_case_globals)]
    static wrong_one: u64 = 7;

    #[test]
    fn what_is_in_use_is_dropped_by_the_last_user() {
        let handle = list();
        let used = get::<List>(handle).unwrap();
        free::<List>(handle, |_| {}).unwrap();
        assert!(get::<List>(handle).is_err());
        assert_eq!(used.records.len(), 0);
    }

    #[test]
    fn threads_give_get_and_free() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    for round in 0..5_000 {
                        mine.push(list());
                        if round % 3 == 0 {
                            let handle = mine.swap_remove(round % mine.len());
                            drop(get::<List>(handle).unwrap());
                            free::<List>(handle, |_| {}).unwrap();
                            assert!(get::<List>(handle).is_err());
                        }
                    }
                    for handle in mine {
                        free::<List>(handle, |_| {}).unwrap();
                    }
                });
            }
        });
    }

    /// A list with data on the heap, so that a memory checker detects a use after it was freed.
    fn list_of_one() -> *mut nbl_list_t {
        let lease = Lease::Runs(Duration::from_secs(1));
        let holder = Holder::Foreign { token: "token".into() };
        let state = State { holder, ends_at: StoreTime(7) };
        let key = Key::new(b"key").unwrap();
        let record = Record { key, damaged: None, lease, expires_at_ms: 7, owner: None, fence: None, state };
        let mut list = List::default();
        list.records.push(record);
        register(list).unwrap()
    }

    /// All threads use, replace and free the same handles: each handle is freed once, and a thread that got one may use
    /// it until its call ends. Also run under sanitizers: docs/correctness.md.
    #[test]
    fn threads_free_what_others_use() {
        const THREADS: u64 = 4;
        const ROUNDS: u64 = 5_000;
        let shared: [AtomicUsize; 3] = std::array::from_fn(|_| AtomicUsize::new(list_of_one().addr()));
        let stale = AtomicUsize::new(0);
        let freed = AtomicUsize::new(0);
        let free_one = |handle: usize| {
            let done = free::<List>(ptr::without_provenance(handle), |list| assert_eq!(list.records.len(), 1));
            freed.fetch_add(usize::from(done.is_ok()), Ordering::Relaxed);
        };
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (shared, stale, free_one) = (&shared, &stale, &free_one);
                scope.spawn(move || {
                    let mut random = thread + 1;
                    for _ in 0..ROUNDS {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let place = &shared[(random >> 33) as usize % shared.len()];
                        let handle = place.load(Ordering::Relaxed);
                        match (random >> 50) % 8 {
                            // Two threads may try to free the same handle. Only one of them succeeds.
                            0 => free_one(handle),
                            1 | 2 => {
                                let before = place.swap(list_of_one().addr(), Ordering::Relaxed);
                                stale.store(before, Ordering::Relaxed);
                                free_one(before);
                            }
                            3 => free_one(stale.load(Ordering::Relaxed)),
                            _ => {
                                if let Ok(list) = get::<List>(ptr::without_provenance(handle)) {
                                    assert_eq!(list.records[0].key.as_str(), "key");
                                    assert!(matches!(&list.records[0].state.holder, Holder::Foreign { token } if &**token == "token"));
                                }
                            }
                        }
                    }
                });
            }
        });
        for place in &shared {
            let handle = ptr::without_provenance(place.load(Ordering::Relaxed));
            let _ = free::<List>(handle, |_| {});
            assert!(get::<List>(handle).is_err());
        }
        assert!(freed.load(Ordering::Relaxed) > ROUNDS as usize / 10, "next to nothing was freed");
    }

    /// The handle of a slot's last generation, and the time after it.
    #[test]
    fn generations_begin_anew_and_a_slot_that_served_them_all_retires() {
        let first = list_of_one();
        let (index, slot) = (index(first), TABLE.slot(index(first)).unwrap());
        let of_generation = |generation: u64| {
            let rest = first.addr() as u64 & ((1 << GENERATION_SHIFT) - 1);
            ptr::without_provenance_mut::<nbl_list_t>((generation << GENERATION_SHIFT | rest) as usize)
        };
        // The slot is used by this test alone while its handle is live. Makes it look as if it had served all
        // generations but one.
        slot.state.store((GENERATIONS - 1) << GENERATION_SHIFT | LIVE | 1, Ordering::Release);
        slot.served.store(GENERATIONS as u32 - 1, Ordering::Relaxed);
        let last = of_generation(GENERATIONS - 1);
        assert_eq!(get::<List>(last).unwrap().records.len(), 1);
        assert!(first == last || get::<List>(first).is_err(), "of an earlier generation");
        free::<List>(last, |_| {}).unwrap();
        assert_eq!(slot.state.load(Ordering::Acquire), 0, "generation 0 again, and nobody's");
        for generation in [0, 1, GENERATIONS - 1] {
            assert!(get::<List>(of_generation(generation)).is_err());
        }
        let later: Vec<_> = (0..500).map(|_| list()).collect();
        assert!(later.iter().all(|handle| super::index(*handle) != index), "it would repeat a handle");
        for handle in later {
            free::<List>(handle, |_| {}).unwrap();
        }
    }
}
