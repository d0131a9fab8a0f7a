//! The table under the embedded store, bare, against `flock` and unlock on an open file.
//!
//! It needs nothing of the C interface: what is measured is what the store below it can cost at least.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nblock::store::StoreError;
use nblock::stores::table::{Directory, FenceSource, KeyRef, Machine, Patience, Table, open};

/// As long as the record of a lock with a short key.
const PAYLOAD: [u8; 150] = [1; 150];

pub fn run(directory: &Path) {
    let place = directory.join("table");
    fs::create_dir(&place).expect("a directory for the table");
    let file = File::create(directory.join("flock")).expect("a file to lock");
    two_processes(&place);
    let table = table(&place);
    let mut held = 0;
    for wanted in [1u64, 1_000, 100_000] {
        while held + 1 < wanted {
            held += 1;
            put(&table, &Key::new(held));
        }
        let (mut buffer, mut turn) = (Vec::new(), 0);
        let [ours, theirs] = crate::in_turns(
            41,
            [
                &mut || {
                    crate::each(5_000, || {
                        turn = (turn + 1) % 1000;
                        let key = Key::new(1 << 40 | turn);
                        let mut patience = Patience::new(Duration::from_secs(5));
                        let granted = table.with(key.as_ref(), &mut patience, |entry| {
                            assert!(entry.get(&mut buffer)?.is_none());
                            entry.next_fence()?;
                            entry.put(&PAYLOAD)
                        });
                        granted.expect("granted");
                        let released = table.with(key.as_ref(), &mut patience, |entry| {
                            assert!(entry.get(&mut buffer)?.is_some());
                            entry.delete()?;
                            entry.wake();
                            Ok(())
                        });
                        released.expect("released");
                    })
                },
                &mut || {
                    crate::each(5_000, || {
                        // SAFETY: an open descriptor.
                        unsafe {
                            libc::flock(file.as_raw_fd(), libc::LOCK_EX);
                            libc::flock(file.as_raw_fd(), libc::LOCK_UN);
                        }
                    })
                },
            ],
        );
        let what = format!("bare table, {wanted} held: grant+release");
        crate::report(&what, ours, "flock+unlock", theirs, "ns", "<= 0.25");
    }
    let [opening, mapping] = crate::in_turns(
        41,
        [&mut || crate::each(20, || drop(self::table(&place))), &mut || crate::each(20, || map_and_unmap(&place))],
    );
    crate::report("open the table", opening / 1e3, "open and map a file", mapping / 1e3, "us", "<= 3");
}

fn map_and_unmap(place: &Path) {
    let name = fs::read_dir(place).expect("listed").map(|entry| entry.expect("an entry").path());
    let path = name.into_iter().find(|path| path.display().to_string().contains("/table-")).expect("a table");
    let file = OpenOptions::new().read(true).write(true).open(path).expect("opened");
    let length = file.metadata().expect("looked at").len() as usize;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, removed at once.
    unsafe {
        let address = libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), 0);
        address.cast::<u8>().read_volatile();
        libc::munmap(address, length);
    }
}

/// What this process has had of the processors.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Two processes, each on a shard of its own, against one: by the time that each had a processor, so that what else
/// runs on the machine counts for neither.
fn two_processes(place: &Path) {
    const SPAN: Duration = Duration::from_millis(300);
    // SAFETY: a new mapping that children share, never removed; zeroed atomics are valid.
    let rates = unsafe {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        &*libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0).cast::<[[AtomicU64; 8]; 2]>()
    };
    let cycles = |workers: usize, same: bool| {
        let children: Vec<_> = (0..workers)
            .map(|worker| {
                // SAFETY: this process has no other threads yet.
                match unsafe { libc::fork() } {
                    0 => {
                        let table = table(place);
                        let key = Key::new(if same { 0 } else { worker as u64 });
                        let (begun, before) = (Instant::now(), processor_time());
                        let mut done = 0u64;
                        while begun.elapsed() < SPAN {
                            for _ in 0..100 {
                                put(&table, &key);
                                let mut patience = Patience::new(Duration::from_secs(5));
                                table.with(key.as_ref(), &mut patience, |entry| entry.delete()).expect("deleted");
                            }
                            done += 100;
                        }
                        let rate = done as f64 / (processor_time() - before).as_secs_f64();
                        rates[worker][0].store(rate as u64, Ordering::SeqCst);
                        // SAFETY: ends the child.
                        unsafe { libc::_exit(0) }
                    }
                    child => child,
                }
            })
            .collect();
        for child in children {
            // SAFETY: a child of this process.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        }
        (0..workers).map(|worker| rates[worker][0].load(Ordering::SeqCst)).sum::<u64>() as f64 / 1e6
    };
    let mut rounds: Vec<[f64; 3]> = (0..7).map(|_| [cycles(1, false), cycles(2, false), cycles(2, true)]).collect();
    let [one, two, same] = std::array::from_fn(|at| {
        rounds.sort_by(|a, b| a[at].total_cmp(&b[at]));
        rounds[rounds.len() / 2][at]
    });
    crate::report("bare table: two processes, two shards", two, "one process", one, "M/s", ">= 1.7");
    crate::report("bare table: two processes, one key", same, "one process", one, "M/s", "-");
}

fn table(place: &Path) -> Table {
    let (plain, machine) = (Arc::new(Plain(place.to_path_buf())), Machine::of_this_process().expect("a machine"));
    open(plain, &machine, Arc::new(Fences::default()), Instant::now() + Duration::from_secs(5)).expect("a table")
}

fn put(table: &Table, key: &Key) {
    let mut patience = Patience::new(Duration::from_secs(5));
    table.with(key.as_ref(), &mut patience, |entry| entry.put(&PAYLOAD)).expect("put");
}

struct Key {
    bytes: [u8; 32],
    hash: [u8; 20],
}

impl Key {
    fn new(number: u64) -> Key {
        let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut hash = [7; 20];
        hash[..8].copy_from_slice(&(mixed ^ mixed >> 29).to_le_bytes());
        let mut bytes = [b'k'; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        Key { bytes, hash }
    }

    fn as_ref(&self) -> KeyRef<'_> {
        KeyRef { bytes: &self.bytes, hash: self.hash }
    }
}

#[derive(Default)]
struct Fences(AtomicU32);

impl FenceSource for Fences {
    fn reserve(&self, floor: u64, _: &mut Patience) -> std::result::Result<Range<u64>, StoreError> {
        let start = floor.max(1 << 40) + (u64::from(self.0.fetch_add(1, Ordering::SeqCst)) << 22);
        Ok(start..start + (1 << 22))
    }
}

struct Plain(PathBuf);

fn said<T>(result: Result<T>) -> std::result::Result<T, StoreError> {
    result.map_err(|error| StoreError::unreachable(error.to_string()))
}

fn unless<T: Default>(kind: ErrorKind, result: Result<T>) -> std::result::Result<T, StoreError> {
    said(result.or_else(|error: Error| if error.kind() == kind { Ok(T::default()) } else { Err(error) }))
}

impl Directory for Plain {
    fn open(&self, name: &str) -> std::result::Result<Option<File>, StoreError> {
        unless(ErrorKind::NotFound, OpenOptions::new().read(true).write(true).open(self.0.join(name)).map(Some))
    }

    fn create(&self, name: &str) -> std::result::Result<File, StoreError> {
        said(OpenOptions::new().read(true).write(true).create_new(true).open(self.0.join(name)))
    }

    fn link(&self, name: &str, other: &str) -> std::result::Result<(), StoreError> {
        unless(ErrorKind::AlreadyExists, fs::hard_link(self.0.join(name), self.0.join(other)))
    }

    fn rename(&self, from: &str, to: &str) -> std::result::Result<(), StoreError> {
        said(fs::rename(self.0.join(from), self.0.join(to)))
    }

    fn remove(&self, name: &str) -> std::result::Result<(), StoreError> {
        unless(ErrorKind::NotFound, fs::remove_file(self.0.join(name)))
    }

    fn names(&self) -> std::result::Result<Vec<String>, StoreError> {
        let names = said(fs::read_dir(&self.0))?;
        Ok(names.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
    }

    fn shown(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}
