//! Tests of the table with processes that are killed, stopped, forked, and given damaged data.

mod behaviour;
mod crash;
mod damage;
mod fork;
mod kills;
mod opening;
mod steps;
mod waking;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::super::directory::{Directory, failed};
use super::super::machine::Machine;
use super::super::place::Place;
use super::layout::Top;
use super::*;
use crate::store::StoreError;
use crate::url::Url;

/// Longer than any operation takes on a busy machine.
pub const LONG: Duration = Duration::from_secs(30);

/// The directory of a test. It is removed on drop, in the process that made it.
pub struct Scene {
    pub path: PathBuf,
    maker: u32,
}

impl Scene {
    pub fn new() -> Scene {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let maker = std::process::id();
        let name = format!("nblock-table-{maker}-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Scene { path, maker }
    }

    pub fn machine(&self) -> Machine {
        Machine::of_this_process().unwrap()
    }

    pub fn try_open(&self) -> Result<Table, StoreError> {
        self.open_on(&self.machine())
    }

    pub fn open_on(&self, machine: &Machine) -> Result<Table, StoreError> {
        let place = Place::choose(&Url::parse(&format!("embedded:{}", self.path.display())).unwrap()).unwrap();
        let directory = Arc::new(Directory::open(&place)?);
        open(directory, machine, Arc::new(Fences(self.path.clone())), 0, Instant::now() + LONG)
    }

    pub fn open(&self) -> Table {
        self.try_open().unwrap()
    }

    pub fn file(&self) -> PathBuf {
        self.path.join(format!("table-{}", self.machine().boot_id))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if self.maker == std::process::id() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn said<T>(result: std::io::Result<T>) -> Result<T, StoreError> {
    result.map_err(|error| failed("a file of the test", &error))
}

/// Reserves small blocks of fences, so that tests reach the end of a block.
pub struct Fences(PathBuf);

pub const FENCE_BLOCK: u64 = 10_000;

impl FenceSource for Fences {
    fn reserve(&self, floor: u64, _: &mut Patience) -> Result<Range<u64>, StoreError> {
        let open = || OpenOptions::new().create(true).truncate(false).read(true).write(true).open(self.0.join("fence"));
        let mut file = said(open())?;
        said(file.lock())?;
        let mut text = String::new();
        said(file.read_to_string(&mut text))?;
        let start = text.parse().unwrap_or(1u64 << 40).max(floor);
        said(file.rewind().and_then(|()| file.write_all((start + FENCE_BLOCK).to_string().as_bytes())))?;
        Ok(start..start + FENCE_BLOCK)
    }
}

/// A key with a chosen slot: the table does not check that the hash belongs to the key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TestKey {
    pub bytes: Vec<u8>,
    pub hash: [u8; 20],
}

impl TestKey {
    /// A key of a shard and slot.
    pub fn at(shard: usize, slot: usize, name: &str) -> TestKey {
        let mut hash = [0; 20];
        hash[..4].copy_from_slice(&((slot * SHARDS + shard) as u32).to_le_bytes());
        let crc = crc32fast::hash(name.as_bytes());
        hash[4..8].copy_from_slice(&crc.to_le_bytes());
        hash[16..].copy_from_slice(&(!crc).to_le_bytes());
        TestKey { bytes: name.as_bytes().to_vec(), hash }
    }

    pub fn as_ref(&self) -> KeyRef<'_> {
        KeyRef { bytes: &self.bytes, hash: self.hash }
    }
}

/// The records that a table should have.
pub type Model = BTreeMap<TestKey, Vec<u8>>;

pub fn patient() -> Patience {
    Patience::new(LONG)
}

pub fn hasty() -> Patience {
    Patience::new(Duration::ZERO)
}

pub fn get(table: &Table, key: &TestKey, mut patience: Patience) -> Result<Option<Vec<u8>>, Fault> {
    let mut buffer = Buffer::new();
    table.with(key.as_ref(), &mut patience, |entry| Ok(entry.get(&mut buffer)?.map(<[u8]>::to_vec)))
}

pub fn put(table: &Table, key: &TestKey, payload: &[u8], mut patience: Patience) -> Result<(), Fault> {
    table.with(key.as_ref(), &mut patience, |entry| entry.put(payload))
}

pub fn delete(table: &Table, key: &TestKey, mut patience: Patience) -> Result<bool, Fault> {
    table.with(key.as_ref(), &mut patience, |entry| entry.delete())
}

pub fn fence(table: &Table, key: &TestKey) -> u64 {
    table.with(key.as_ref(), &mut patient(), |entry| entry.next_fence()).unwrap()
}

/// All records, and all damage, as a listing shows them.
pub fn listed(table: &Table) -> Result<(Model, Vec<Damaged>), Fault> {
    listed_in(table, 0..SHARDS)
}

/// The records of some shards.
pub fn listed_in(table: &Table, shards: Range<usize>) -> Result<(Model, Vec<Damaged>), Fault> {
    let (mut model, mut damaged, mut twice) = (Model::new(), Vec::new(), false);
    let (mut page, mut from) = (Page::default(), Some(Cursor(shards.start * layout::SLOTS)));
    while let Some(cursor) = from.filter(|cursor| cursor.0 < shards.end * layout::SLOTS) {
        from = table.list(cursor, &mut page, &mut patient())?;
        for listed in page.iter() {
            match listed {
                // A page may continue with other shards.
                Listed::Record { hash, .. } if !shards.contains(&layout::slot_of(&hash).0) => {}
                Listed::Damaged { what, .. } if !shards.contains(&what.shard) => {}
                Listed::Record { hash, key, payload } => {
                    twice |= model.insert(TestKey { bytes: key.to_vec(), hash }, payload.to_vec()).is_some();
                }
                Listed::Damaged { what, .. } => damaged.push(what),
            }
        }
    }
    // The records of a circular chain may be listed more than once, but then damage is listed too.
    assert!(!twice || !damaged.is_empty(), "a key is there twice");
    Ok((model, damaged))
}

/// Checks that the table has exactly these records, looked up by key and listed, and that no cell is lost.
#[track_caller]
pub fn assert_is(table: &Table, model: &Model) {
    assert_is_in(table, 0..SHARDS, model);
}

/// As `assert_is`, for some shards.
#[track_caller]
pub fn assert_is_in(table: &Table, shards: Range<usize>, model: &Model) {
    for (key, payload) in model {
        assert_eq!(get(table, key, patient()).unwrap().as_ref(), Some(payload), "{:?}", key.bytes.escape_ascii());
    }
    let (found, damaged) = listed_in(table, shards.clone()).unwrap();
    assert!(found == *model && damaged.is_empty(), "listed otherwise");
    let mut census = Census::default();
    for shard in shards {
        census += table.lock(shard, &mut patient()).unwrap().census().unwrap();
    }
    assert_eq!((census.records, census.damaged, census.leaked), (model.len(), 0, 0), "{census:?}");
}

/// Runs `work` in a forked child, which exits with its result.
///
/// Tests run in several threads. The child has only this one, and must not wait for the others.
pub fn in_child(work: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child runs `work` and ends; the C library releases its own locks in the child.
    match unsafe { libc::fork() } {
        0 => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
            // SAFETY: ends the child here: it drops and flushes nothing of its parent.
            unsafe { libc::_exit(code) }
        }
        child => {
            assert!(child > 0, "fork");
            child
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    Killed(i32),
    Stopped,
}

pub fn wait_for(child: libc::pid_t) -> Ended {
    let mut status = 0;
    // SAFETY: a child of this process; writes the status.
    let waited = unsafe { libc::waitpid(child, &mut status, libc::WUNTRACED) };
    assert_eq!(waited, child);
    if libc::WIFSTOPPED(status) {
        Ended::Stopped
    } else if libc::WIFSIGNALED(status) {
        Ended::Killed(libc::WTERMSIG(status))
    } else {
        Ended::Exited(libc::WEXITSTATUS(status))
    }
}

/// Whether a child was killed; otherwise it must have exited with 0.
#[track_caller]
pub fn was_killed(ended: Ended) -> bool {
    let killed = matches!(ended, Ended::Killed(_));
    assert!(killed || ended == Ended::Exited(0), "{ended:?}");
    killed
}

pub fn signal(child: libc::pid_t, signal: i32) {
    // SAFETY: a child of this process that was not waited for yet.
    unsafe { libc::kill(child, signal) };
}

/// Random numbers from a seed (SplitMix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}
