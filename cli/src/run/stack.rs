//! Memory for the stack of a process that is made with `clone`.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::mem::MaybeUninit;

/// Aligned as every ABI asks for. A stack grows downwards, on all processors that both Linux and Rust run on.
#[repr(align(16))]
struct Aligned(#[allow(dead_code)] [u8; 16]);

pub struct Stack(Box<[MaybeUninit<UnsafeCell<Aligned>>]>);

impl Stack {
    pub fn new(bytes: usize) -> Stack {
        Stack(Box::new_uninit_slice(bytes.div_ceil(size_of::<Aligned>())))
    }

    /// Where it begins.
    pub fn top(&self) -> *mut c_void {
        self.0.as_ptr_range().end.cast_mut().cast()
    }
}
