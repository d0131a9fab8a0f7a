//! Randomness, from the kernel.

use std::cell::RefCell;

use super::process;
use crate::token::{HoldId, ObjectId};

impl HoldId {
    /// For a store that is this machine's own. It may come of bytes that were drawn earlier.
    pub fn random() -> HoldId {
        HoldId(random())
    }

    /// For a store that machines share. Drawn now: a machine that was cloned from a snapshot has the bytes that were
    /// drawn before it, and so has its twin, whose hold would look like its own (R3).
    pub fn drawn_now() -> HoldId {
        HoldId(drawn_now())
    }
}

impl ObjectId {
    pub fn random() -> ObjectId {
        ObjectId(u64::from_le_bytes(drawn_now()))
    }
}

/// Bytes of the kernel's randomness that a thread keeps, and the generation it drew them in.
struct Pool {
    generation: u64,
    used: usize,
    bytes: [u8; 512],
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { generation: 0, used: 0, bytes: [0; 512] }) };
}

fn draw(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the kernel gives randomness (getrandom, or /dev/urandom)");
}

fn drawn_now<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    draw(&mut bytes);
    bytes
}

/// Random bytes from the kernel, drawn in blocks. A forked child never reuses its parent's block.
pub fn random<const N: usize>() -> [u8; N] {
    const { assert!(N <= 64) };
    POOL.try_with(|pool| {
        let pool = &mut *pool.borrow_mut();
        if pool.generation != process::generation() || pool.used + N > pool.bytes.len() {
            draw(&mut pool.bytes);
            pool.generation = process::generation();
            pool.used = 0;
        }
        let taken = &mut pool.bytes[pool.used..pool.used + N];
        pool.used += N;
        let bytes = (&*taken).try_into().expect("N bytes were taken");
        taken.fill(0);
        bytes
    })
    .unwrap_or_else(|_| {
        // The thread is ending and its pool is gone.
        drawn_now()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_never_given_twice() {
        let drawn: std::collections::HashSet<[u8; 16]> = (0..10_000).map(|_| random()).collect();
        assert_eq!(drawn.len(), 10_000);
    }
}
