//! The bare table of the embedded store, compared with `flock` and unlock on an open file.
//!
//! The C interface is not used: this is the lower bound for the cost of the store.

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nblock::store::StoreError;
use nblock::stores::embedded::fuzzing::{
    Buffer, Directory, FenceSource, KeyRef, Machine, Patience, Place, Table, open,
};
use nblock::url::Url;

/// A payload of the same length as the record of a lock with a short key.
const PAYLOAD: [u8; 150] = [1; 150];

pub fn run(directory: &Path) {
    let place = directory.join("table");
    let file = File::create(directory.join("flock")).expect("a file to lock");
    two_processes(&place);
    let table = table(&place);
    let mut held = 0;
    for wanted in [1u64, 1_000, 100_000] {
        while held + 1 < wanted {
            held += 1;
            put(&table, &Key::new(held));
        }
        let (mut buffer, mut turn) = (Buffer::new(), 0);
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
    let file = file_in(&place);
    let [opening, mapping] = crate::in_turns(
        41,
        [&mut || crate::each(20, || drop(self::table(&place))), &mut || crate::each(20, || map_and_unmap(&file))],
    );
    crate::report("open the table", opening / 1e3, "open and map a file", mapping / 1e3, "us", "<= 3");
}

/// The path of the table in a directory.
fn file_in(place: &Path) -> PathBuf {
    let paths = fs::read_dir(place).expect("listed").map(|entry| entry.expect("an entry").path());
    paths.into_iter().find(|path| path.display().to_string().contains("/table-")).expect("a table")
}

fn map_and_unmap(file: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(file).expect("opened");
    let length = file.metadata().expect("examined").len() as usize;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, removed at once.
    unsafe {
        let address = libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), 0);
        address.cast::<u8>().read_volatile();
        libc::munmap(address, length);
    }
}

/// Two processes, each on its own shard, compared with one.
fn two_processes(place: &Path) {
    crate::processes::measure("bare table", |key| {
        let (table, key) = (table(place), Key::new(key));
        move || {
            put(&table, &key);
            let mut patience = Patience::new(Duration::from_secs(5));
            table.with(key.as_ref(), &mut patience, |entry| entry.delete()).expect("deleted");
        }
    });
}

fn table(place: &Path) -> Table {
    let url = Url::parse(&format!("embedded:{}", place.display())).expect("a URL");
    let place = Place::choose(&url).expect("a place");
    let directory = Arc::new(Directory::open(&place).expect("a directory"));
    let machine = Machine::of_this_process().expect("a machine");
    let deadline = Instant::now() + Duration::from_secs(5);
    open(directory, &machine, Arc::new(Fences::default()), 0, deadline).expect("a table")
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
    fn reserve(&self, floor: u64, _: &mut Patience) -> Result<Range<u64>, StoreError> {
        let start = floor.max(1 << 40) + (u64::from(self.0.fetch_add(1, Ordering::SeqCst)) << 22);
        Ok(start..start + (1 << 22))
    }
}
