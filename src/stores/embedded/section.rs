//! A fork in the middle of a change.
//!
//! The handler of a signal may interrupt a thread that is changing the store, and fork. The child goes on where its
//! parent was, with a change half done that its parent completes: two would write the same pages at once. So before
//! such a fork the shared mappings are copied, and in the child the copies take their place: what it does there
//! changes nothing for anybody, and its call ends with an error once the change is done.
//!
//! Everything here makes only calls that a signal handler may.

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::sync::Once;
use std::{io, ptr};

use crate::sys::descriptor;

/// This thread is inside a change, or about to be, until this is dropped.
pub struct Section(PhantomData<*const ()>);

thread_local! {
    static INSIDE: Cell<u32> = const { Cell::new(0) };
    static COPIES: UnsafeCell<Copies> = const { UnsafeCell::new(Copies { made: [Copied::NOTHING; MOST], count: 0, failed: 0 }) };
}

/// How many mappings there may be: two for each store that is open.
const MOST: usize = 64;

struct Copies {
    made: [Copied; MOST],
    count: usize,
    /// The number of the system's error, or 0.
    failed: i32,
}

#[derive(Clone, Copy)]
struct Copied {
    mapping: usize,
    length: usize,
    copy: *mut libc::c_void,
}

impl Copied {
    const NOTHING: Copied = Copied { mapping: 0, length: 0, copy: ptr::null_mut() };
}

impl Section {
    #[inline]
    pub fn enter() -> Section {
        INSIDE.set(INSIDE.get() + 1);
        Section(PhantomData)
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        INSIDE.set(INSIDE.get() - 1);
    }
}

/// To be called before anything is mapped.
pub fn watch_forks() -> io::Result<()> {
    static WATCHED: Once = Once::new();
    let mut status = 0;
    WATCHED.call_once(|| {
        // SAFETY: the handlers make only calls that are allowed in them.
        status = unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    });
    if status == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(status)) }
}

fn copies() -> *mut Copies {
    COPIES.with(UnsafeCell::get)
}

extern "C" fn before() {
    if INSIDE.get() == 0 {
        return;
    }
    // SAFETY: this thread's own, and used only between here and the end of the fork.
    let copies = unsafe { &mut *copies() };
    (copies.count, copies.failed) = (0, 0);
    let read = for_each_mapping(|mapping, length| {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let copy = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if copy == libc::MAP_FAILED || copies.count == MOST {
            copies.failed = libc::ENOMEM;
            return;
        }
        // SAFETY: the store's mapping, whose blocks are there, and a copy as long as it. Other threads change only what
        // the child does not look at: this one has the mutex, or will not get it in the child.
        unsafe { copy_what_is_used(ptr::with_exposed_provenance(mapping), copy.cast(), length) };
        copies.made[copies.count] = Copied { mapping, length, copy };
        copies.count += 1;
    });
    if !read || copies.count == 0 {
        copies.failed = libc::ENOENT;
    }
}

/// Copies the pages that are not all zeros, as those of a new mapping are: most of a young data file is. A handler
/// that forks often must leave its thread time for something else.
///
/// # Safety
///
/// Both ranges are there, whole pages, and `to` is all zeros.
unsafe fn copy_what_is_used(from: *const u8, to: *mut u8, length: usize) {
    const PAGE: usize = 4096;
    for offset in (0..length).step_by(PAGE) {
        // SAFETY: as the caller says; every page size is a multiple of this one.
        unsafe {
            let page = from.add(offset);
            if *page != 0 || libc::memcmp(page.cast(), page.add(1).cast(), PAGE - 1) != 0 {
                ptr::copy_nonoverlapping(page, to.add(offset), PAGE);
            }
        }
    }
}

extern "C" fn in_parent() {
    if INSIDE.get() == 0 {
        return;
    }
    // SAFETY: as in `before`, which made these mappings.
    unsafe {
        let copies = &mut *copies();
        for copied in &copies.made[..copies.count] {
            libc::munmap(copied.copy, copied.length);
        }
        copies.count = 0;
    }
}

extern "C" fn in_child() {
    if INSIDE.get() == 0 {
        return;
    }
    // SAFETY: as above; each copy takes the place of the mapping that it was made of.
    unsafe {
        let copies = &mut *copies();
        for copied in &copies.made[..copies.count] {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let to = ptr::with_exposed_provenance_mut::<libc::c_void>(copied.mapping);
            if libc::mremap(copied.copy, copied.length, copied.length, flags, to) == libc::MAP_FAILED {
                copies.failed = libc::ENOMEM;
            }
        }
        if copies.failed != 0 {
            const SAID: &[u8] =
                b"nblock: a signal handler forked in the middle of a change to the embedded store, and \
                the memory could not be copied: this child ends\n";
            libc::write(libc::STDERR_FILENO, SAID.as_ptr().cast(), SAID.len());
            libc::_exit(70);
        }
        copies.count = 0;
    }
}

/// Calls `found` with the address and length of each shared mapping of the library's files in this process, those of
/// another copy of the library left out. `false`: they could not be read.
fn for_each_mapping(mut found: impl FnMut(usize, usize)) -> bool {
    // SAFETY: the path ends with a NUL; the descriptor is nobody else's.
    let maps = unsafe { libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if maps < 0 {
        return false;
    }
    let mut buffer = [0u8; 4096];
    let mut filled = 0;
    let whole = loop {
        // SAFETY: reads into what is left of the buffer.
        let read = unsafe { libc::read(maps, buffer[filled..].as_mut_ptr().cast(), buffer.len() - filled) };
        match read {
            0 => break true,
            1.. => filled += read as usize,
            _ => break false,
        }
        let mut begin = 0;
        while let Some(end) = buffer[begin..filled].iter().position(|&byte| byte == b'\n') {
            if let Some((mapping, length)) = mapping_in(&buffer[begin..begin + end]) {
                found(mapping, length);
            }
            begin += end + 1;
        }
        buffer.copy_within(begin..filled, 0);
        filled -= begin;
        if filled == buffer.len() {
            // A line without an end: the rest of a long path, of which nothing is wanted.
            filled = 0;
        }
    };
    // SAFETY: opened above.
    unsafe { libc::close(maps) };
    whole
}

/// Address and length of the mapping in a line of /proc/self/maps, if it is shared and of one of the library's files.
///
/// The device is not compared: some file systems show another one here than `fstat` does.
fn mapping_in(line: &[u8]) -> Option<(usize, usize)> {
    let mut fields = line.split(|&byte| byte == b' ').filter(|field| !field.is_empty());
    let (range, mode, _offset, _device, inode) =
        (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let dash = range.iter().position(|&byte| byte == b'-')?;
    let (from, to) = (number(&range[..dash], 16)?, number(&range[dash + 1..], 16)?);
    let ours = mode.get(3) == Some(&b's') && descriptor::lists_inode(number(inode, 10)?);
    ours.then_some((from as usize, (to - from) as usize))
}

fn number(digits: &[u8], radix: u32) -> Option<u64> {
    digits.iter().try_fold(0u64, |number, &digit| {
        number.checked_mul(radix.into())?.checked_add(char::from(digit).to_digit(radix)?.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mappings_are_read() {
        assert_eq!(mapping_in(b"7f00-7f10 rw-p 00000000 fd:01 12 /x"), None, "it is private");
        assert_eq!(mapping_in(b"7f00-7f10 rw-s 00000000 fd:01 0"), None, "it has no file");
        assert_eq!(mapping_in(b"garbage"), None);
        assert_eq!(number(b"7f00", 16), Some(0x7f00));
    }
}
