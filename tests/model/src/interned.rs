//! Values of the library, each kept once: a state of the model names them in a few bytes.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::Mutex;

/// A value that is kept for good. The same value is always the same reference.
pub struct Ref<T: 'static>(&'static Kept<T>);

struct Kept<T> {
    hash: u64,
    value: T,
}

/// By what a value is found again. The hash is the same in every run.
pub type Found<T> = HashMap<T, Ref<T>, BuildHasherDefault<DefaultHasher>>;

/// What can be kept: see the macro below.
pub trait Keep: Eq + Hash + Clone + Send + Sync + 'static {
    fn in_this_thread<R>(look: impl FnOnce(&mut Found<Self>) -> R) -> R;
    fn in_all_threads() -> &'static Mutex<Found<Self>>;
}

impl<T: Keep> Ref<T> {
    pub fn to(value: T) -> Ref<T> {
        T::in_this_thread(|found| {
            if let Some(kept) = found.get(&value) {
                return *kept;
            }
            let mut all = T::in_all_threads().lock().expect("no thread panics here");
            let kept = *all.entry(value.clone()).or_insert_with(|| {
                let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(&value);
                Ref(Box::leak(Box::new(Kept { hash, value: value.clone() })))
            });
            found.insert(value, kept);
            kept
        })
    }
}

#[macro_export]
macro_rules! keep {
    ($($value:ty),* $(,)?) => {$(
        impl $crate::interned::Keep for $value {
            fn in_this_thread<R>(look: impl FnOnce(&mut $crate::interned::Found<$value>) -> R) -> R {
                thread_local! {
                    static FOUND: std::cell::RefCell<$crate::interned::Found<$value>> = Default::default();
                }
                FOUND.with_borrow_mut(look)
            }

            fn in_all_threads() -> &'static std::sync::Mutex<$crate::interned::Found<$value>> {
                static ALL: std::sync::LazyLock<std::sync::Mutex<$crate::interned::Found<$value>>> =
                    std::sync::LazyLock::new(Default::default);
                &ALL
            }
        }
    )*};
}

impl<T> Deref for Ref<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T> Clone for Ref<T> {
    fn clone(&self) -> Ref<T> {
        *self
    }
}

impl<T> Copy for Ref<T> {}

impl<T> PartialEq for Ref<T> {
    fn eq(&self, other: &Ref<T>) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl<T> Eq for Ref<T> {}

impl<T> PartialOrd for Ref<T> {
    fn partial_cmp(&self, other: &Ref<T>) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Any order, the same in every run.
impl<T> Ord for Ref<T> {
    fn cmp(&self, other: &Ref<T>) -> Ordering {
        let place = |of: &Ref<T>| (of.0.hash, std::ptr::from_ref(of.0).addr());
        place(self).cmp(&place(other))
    }
}

impl<T> Hash for Ref<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.hash);
    }
}

impl<T: fmt::Debug> fmt::Debug for Ref<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.value.fmt(f)
    }
}

/// Results of a pure function, by its arguments, in this thread.
pub struct Known<A, R>(RefCell<HashMap<A, R, BuildHasherDefault<Mixed>>>);

impl<A: Eq + Hash, R: Copy> Known<A, R> {
    pub fn new() -> Known<A, R> {
        Known(RefCell::default())
    }

    pub fn of(&self, arguments: A, function: impl FnOnce(&A) -> R) -> R {
        if let Some(result) = self.0.borrow().get(&arguments) {
            return *result;
        }
        let result = function(&arguments);
        self.0.borrow_mut().insert(arguments, result);
        result
    }
}

impl<A: Eq + Hash, R: Copy> Default for Known<A, R> {
    fn default() -> Known<A, R> {
        Known::new()
    }
}

/// A quick hash of what is made of hashes and small numbers.
#[derive(Default)]
pub struct Mixed(u64);

impl Hasher for Mixed {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(number.into());
    }

    fn write_isize(&mut self, number: isize) {
        self.write_u64(number as u64);
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
