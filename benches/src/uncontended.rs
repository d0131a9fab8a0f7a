//! Acquire and release without contention, compared with `flock`, with two transactions of LMDB, and with SQLite.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr;

use lmdb_master_sys as lmdb;
use nblock::ffi::nbl_lock_t;

use crate::{client, each, forever, give, in_turns, lock, report, take};

pub fn run(url: &str, directory: &Path) {
    let client = client(url);
    let key = lock(client, "jobs:uncontended");
    let options = forever();
    let bare = Bare::open(&directory.join("bare"));
    let sqlite = sqlite(&directory.join("sqlite"));
    let mut insert = sqlite.prepare("INSERT INTO locks VALUES (?1, ?2)").expect("a statement");
    let mut delete = sqlite.prepare("DELETE FROM locks WHERE hash = ?1").expect("a statement");

    let [ours, theirs, database] = in_turns(
        41,
        [
            &mut || {
                each(5_000, || {
                    take(key, &options);
                    give(key);
                })
            },
            &mut || each(5_000, || bare.put_and_delete()),
            &mut || {
                each(200, || {
                    insert.execute((&HASH[..], &RECORD[..])).expect("inserted");
                    delete.execute((&HASH[..],)).expect("deleted");
                })
            },
        ],
    );
    report("embedded, C: acquire+release", ours / 1e3, "two bare LMDB transactions", theirs / 1e3, "us", "< 1");
    report("embedded, C: acquire+release", ours / 1e3, "SQLite, WAL, no sync", database / 1e3, "us", "< 1");

    let mut held = Vec::new();
    for wanted in [1, 1_000, 100_000] {
        while held.len() + 1 < wanted {
            let other = lock(client, &format!("jobs:held:{}", held.len()));
            take(other, &options);
            held.push(other);
        }
        against_flock(&format!("embedded, C: acquire+release, {wanted} held"), key, directory, "<= 0.5");
    }
    held.into_iter().for_each(give);
    let memory = lock(crate::client("memory:"), "jobs:uncontended");
    against_flock("memory, C: acquire+release", memory, directory, "-");
}

fn against_flock(what: &str, lock: *mut nbl_lock_t, directory: &Path, aim: &str) {
    let options = forever();
    let file = File::create(directory.join("flock")).expect("a file to lock");
    let [ours, theirs] = in_turns(
        41,
        [
            &mut || {
                each(5_000, || {
                    take(lock, &options);
                    give(lock);
                })
            },
            &mut || {
                each(5_000, || {
                    // SAFETY: an open descriptor.
                    unsafe {
                        libc::flock(file.as_raw_fd(), libc::LOCK_EX);
                        libc::flock(file.as_raw_fd(), libc::LOCK_UN);
                    }
                })
            },
        ],
    );
    report(what, ours / 1e3, "flock+unlock", theirs / 1e3, "us", aim);
}

const HASH: [u8; 20] = [7; 20];
/// A value of the same length as the record of a short key.
const RECORD: [u8; 100] = [1; 100];

/// Bare LMDB, without sync and without its own locks.
struct Bare {
    env: *mut lmdb::MDB_env,
}

impl Bare {
    fn open(path: &Path) -> Bare {
        let path = CString::new(path.to_str().expect("a path in UTF-8")).expect("without NUL");
        let mut env = ptr::null_mut();
        let flags = lmdb::MDB_NOSUBDIR
            | lmdb::MDB_WRITEMAP
            | lmdb::MDB_NOSYNC
            | lmdb::MDB_NOLOCK
            | lmdb::MDB_NOTLS
            | lmdb::MDB_NOMEMINIT
            | lmdb::MDB_NORDAHEAD;
        unsafe {
            assert_eq!(lmdb::mdb_env_create(&mut env), 0);
            assert_eq!(lmdb::mdb_env_set_mapsize(env, 1 << 20), 0);
            assert_eq!(lmdb::mdb_env_open(env, path.as_ptr(), flags, 0o600), 0);
        }
        Bare { env }
    }

    fn put_and_delete(&self) {
        unsafe {
            let mut key = value(&HASH);
            let mut data = value(&RECORD);
            self.transaction(|txn| lmdb::mdb_put(txn, 1, &mut key, &mut data, 0));
            self.transaction(|txn| lmdb::mdb_del(txn, 1, &mut key, ptr::null_mut()));
        }
    }

    unsafe fn transaction(&self, mut write: impl FnMut(*mut lmdb::MDB_txn) -> i32) {
        let mut txn = ptr::null_mut();
        unsafe {
            assert_eq!(lmdb::mdb_txn_begin(self.env, ptr::null_mut(), 0, &mut txn), 0);
            let mut dbi = 0;
            assert_eq!(lmdb::mdb_dbi_open(txn, ptr::null(), 0, &mut dbi), 0);
            assert_eq!((dbi, write(txn)), (1, 0));
            assert_eq!(lmdb::mdb_txn_commit(txn), 0);
        }
    }
}

fn value(bytes: &[u8]) -> lmdb::MDB_val {
    lmdb::MDB_val { mv_size: bytes.len(), mv_data: bytes.as_ptr().cast_mut().cast() }
}

fn sqlite(path: &Path) -> rusqlite::Connection {
    let connection = rusqlite::Connection::open(path).expect("a database");
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF; PRAGMA locking_mode = NORMAL;
             CREATE TABLE locks (hash BLOB PRIMARY KEY, record BLOB) WITHOUT ROWID;",
        )
        .expect("a table");
    connection
}
