//! What the embedded store costs above the database in it: acquire and release through the store, against
//! a put and a delete of as many bytes in two bare LMDB transactions.
//!
//! Both sides are measured by turns in one run, and their ratio is what counts. Nothing here fails on it.

use std::ffi::CString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lmdb_master_sys as lmdb;
use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::store::{Acquired, Answer, Attempt, Claim, Identity, Released, Store, StoreOptions};
use nblock::token::{HoldId, Token};

const ROUNDS: usize = 41;
const CYCLES: u32 = 5_000;

fn main() {
    let directory = std::env::var_os("NBLOCK_BENCH_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let directory = directory.join(format!("nblock-bench-{}", std::process::id()));
    let store = open(&directory);
    let bare = Bare::open(&directory.join("bare"));
    for held in [0, 10_000] {
        for number in 0..held {
            let key = Key::new(format!("bench:held:{number}").as_bytes()).unwrap();
            acquire(&*store, &key);
            bare.put(&key);
        }
        let key = Key::new(b"jobs:generate_sitemap").unwrap();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours.push(measure(|| {
                let token = acquire(&*store, &key);
                match store.release(&key, Claim::Token(token)) {
                    Answer::Now(Ok(Released::Released)) => {}
                    _ => panic!("not released"),
                }
            }));
            theirs.push(measure(|| {
                bare.put(&key);
                bare.delete(&key);
            }));
        }
        let (ours, theirs) = (median(ours), median(theirs));
        println!(
            "embedded, {held} locks held: acquire + release {ours:.0} ns, bare put + delete {theirs:.0} ns, ratio {:.2}",
            ours / theirs
        );
    }
    drop(store);
    std::fs::remove_dir_all(&directory).unwrap();
}

fn open(directory: &Path) -> Arc<dyn Store> {
    let url = nblock::url::Url::parse(&format!("embedded:{}", directory.display())).unwrap();
    let options = StoreOptions { op_timeout: Duration::from_secs(5), connect_timeout: Duration::from_secs(5) };
    nblock::stores::open(&url, &options).unwrap()
}

/// A hold of its own, without the price of randomness: that is the lock's, not the store's.
fn next_hold() -> HoldId {
    static LAST: AtomicU64 = AtomicU64::new(0);
    HoldId(u128::from(LAST.fetch_add(1, Ordering::Relaxed)).to_be_bytes())
}

fn acquire(store: &dyn Store, key: &Key) -> Token {
    thread_local! {
        static IDENTITY: Arc<Identity> = Arc::new(Identity {
            host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_string(),
            pid: std::process::id(),
            boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_string(),
            app: "bench".to_string(),
        });
    }
    let token = Token { hold: next_hold(), attempt: 1 };
    let attempt = Attempt {
        token,
        n: 1,
        expire: Duration::from_secs(60),
        not_after: Boottime::NEVER,
        identity: IDENTITY.with(Arc::clone),
    };
    match store.acquire(key, attempt) {
        Answer::Now(Ok(Acquired::Granted { .. })) => token,
        _ => panic!("not granted"),
    }
}

/// LMDB with the options of the store, and nothing else.
struct Bare {
    environment: *mut lmdb::MDB_env,
}

impl Bare {
    fn open(path: &Path) -> Bare {
        const SIZE: u64 = 64 << 20;
        File::create(path).unwrap();
        let name = CString::new(path.to_str().unwrap()).unwrap();
        let flags = lmdb::MDB_NOSUBDIR
            | lmdb::MDB_WRITEMAP
            | lmdb::MDB_NOSYNC
            | lmdb::MDB_NOLOCK
            | lmdb::MDB_NOTLS
            | lmdb::MDB_NOMEMINIT
            | lmdb::MDB_NORDAHEAD;
        let mut environment = ptr::null_mut();
        // SAFETY: a new environment, used by this thread alone.
        unsafe {
            assert_eq!(lmdb::mdb_env_create(&mut environment), 0);
            assert_eq!(lmdb::mdb_env_set_mapsize(environment, SIZE as usize), 0);
            assert_eq!(lmdb::mdb_env_open(environment, name.as_ptr(), flags, 0o600), 0);
            let bare = Bare { environment };
            bare.transaction(|transaction| {
                let mut table = 0;
                assert_eq!(lmdb::mdb_dbi_open(transaction, ptr::null(), 0, &mut table), 0);
            });
            bare
        }
    }

    fn transaction(&self, work: impl FnOnce(*mut lmdb::MDB_txn)) {
        let mut transaction = ptr::null_mut();
        // SAFETY: the environment is open, and one transaction runs at a time.
        unsafe {
            assert_eq!(lmdb::mdb_txn_begin(self.environment, ptr::null_mut(), 0, &mut transaction), 0);
            work(transaction);
            assert_eq!(lmdb::mdb_txn_commit(transaction), 0);
        }
    }

    fn put(&self, key: &Key) {
        // As long as the store's own row.
        let value = [0x5au8; 72 + "bench".len() + "jobs:generate_sitemap".len()];
        let hash = key.hash();
        let mut key = lmdb::MDB_val { mv_size: 20, mv_data: hash.0.as_ptr().cast_mut().cast() };
        let mut value = lmdb::MDB_val { mv_size: value.len(), mv_data: value.as_ptr().cast_mut().cast() };
        // SAFETY: key and value outlive the call; 1 is the table without a name.
        self.transaction(|transaction| unsafe {
            assert_eq!(lmdb::mdb_put(transaction, 1, &mut key, &mut value, 0), 0);
        });
    }

    fn delete(&self, key: &Key) {
        let hash = key.hash();
        let mut key = lmdb::MDB_val { mv_size: 20, mv_data: hash.0.as_ptr().cast_mut().cast() };
        // SAFETY: as above.
        self.transaction(|transaction| unsafe {
            assert_eq!(lmdb::mdb_del(transaction, 1, &mut key, ptr::null_mut()), 0);
        });
    }
}

/// Nanoseconds of one cycle.
fn measure(mut cycle: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..CYCLES {
        cycle();
    }
    start.elapsed().as_nanos() as f64 / f64::from(CYCLES)
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
