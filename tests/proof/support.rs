//! Where the tests take place: stores of their own, keys of their own, and waiting for what must come.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::lock::Lock;
use nblock::options::{ClientOptions, LockOptions};
use nblock::record::Identity;
use nblock::store::{Answer, Store, StoreError, StoreOptions};
use nblock::sys::runtime;
use nblock::token::{HoldId, Token};
use nblock::url::Url;

use crate::asks::Attempt;

/// Long enough that only a defect makes anybody wait so long, on a machine however loaded.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A lease that does not run out while a test runs.
pub const LONG: Duration = Duration::from_secs(3600);

/// The environment variable that names a RethinkDB store to test on.
pub const RETHINKDB: &str = "NBLOCK_TEST_RETHINKDB_URL";

/// What a store answered; the thread waits for it.
pub fn answer<T>(answer: Answer<T>) -> Result<T, StoreError> {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(answer) => runtime::block_on(answer).expect("the runtime starts"),
    }
}

/// Looks again and again until it is so. Fails after [`PATIENCE`].
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < PATIENCE, "it did not come to be: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn key(text: &str) -> Key {
    Key::new(text.as_bytes()).expect("a key of the tests is a key")
}

/// A key that nobody else uses, in this run or another.
pub fn fresh_key() -> Key {
    key(&format!("proof:{}", HoldId::random()))
}

pub fn identity() -> Arc<Identity> {
    Arc::new(Identity { host: "here".into(), pid: std::process::id(), boot_id: "now".into(), app: "proof".into() })
}

/// Asks for one hold, attempt by attempt, as the lock does.
pub struct RawClient {
    pub hold: HoldId,
    pub attempts: u32,
    pub n: u64,
}

impl RawClient {
    pub fn new() -> RawClient {
        RawClient { hold: HoldId::random(), attempts: 0, n: 0 }
    }

    pub fn attempt(&mut self, expire: Duration) -> Attempt {
        self.attempts += 1;
        self.n += 1;
        Attempt {
            token: Token { hold: self.hold, attempt: self.attempts },
            n: self.n,
            expire,
            not_after: Boottime::now() + LONG,
            identity: identity(),
        }
    }

    /// The token of an attempt.
    pub fn token(&self, attempt: u32) -> Token {
        Token { hold: self.hold, attempt }
    }
}

/// A directory of one test's own, removed at the end.
pub struct Directory(PathBuf);

impl Directory {
    /// A name that is not there yet: the store makes its directory itself.
    pub fn new() -> Directory {
        Directory::below(&std::env::temp_dir())
    }

    /// Where syncing costs nothing, for tests that open stores by the hundred.
    pub fn quick() -> Directory {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() { Directory::below(memory) } else { Directory::new() }
    }

    fn below(parent: &Path) -> Directory {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("nblock-proof-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Directory(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn url(&self) -> String {
        format!("embedded:{}", self.0.display())
    }

    pub fn store(&self) -> Result<Arc<dyn Store>, nblock::error::Error> {
        open(&self.url())
    }

    pub fn client(&self) -> Client {
        client(&self.url())
    }

    /// The store's file whose name begins so.
    pub fn file(&self, prefix: &str) -> PathBuf {
        let mut found = self.files().into_iter().filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(prefix) && !name.contains(".new") && !is_set_aside(path)
        });
        found.next().unwrap_or_else(|| panic!("no file {prefix}* in {}", self.0.display()))
    }

    pub fn files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.0).expect("the directory is there");
        entries.map(|entry| entry.expect("an entry").path()).collect()
    }

    /// How many of the store's files were set aside.
    pub fn set_aside(&self) -> usize {
        self.files().iter().filter(|path| is_set_aside(path)).count()
    }

    pub fn forget_set_aside(&self) {
        for path in self.files().into_iter().filter(|path| is_set_aside(path)) {
            std::fs::remove_file(path).expect("it was there");
        }
    }
}

fn is_set_aside(path: &Path) -> bool {
    path.to_string_lossy().contains(".damaged-")
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn store_options() -> StoreOptions {
    StoreOptions { op_timeout: Duration::from_secs(30), connect_timeout: Duration::from_secs(30) }
}

/// A store, below all that waits and retries.
pub fn open(url: &str) -> Result<Arc<dyn Store>, nblock::error::Error> {
    nblock::stores::open(&Url::parse(url)?, &store_options())
}

pub fn client(url: &str) -> Client {
    // A machine that is busy with other tests must not turn an answer into none.
    let options = ClientOptions { op_timeout: PATIENCE, connect_timeout: PATIENCE, ..ClientOptions::default() };
    runtime::wait(Client::open(Some(url), options)).unwrap_or_else(|error| panic!("{url}: {error}"))
}

pub fn lock(client: &Client, key: &Key) -> Lock {
    client.lock(key.clone(), LockOptions::default()).expect("a lock is made")
}

/// Whether this process may do what only root may.
pub fn is_root() -> bool {
    // SAFETY: cannot fail and touches nothing.
    unsafe { libc::geteuid() == 0 }
}

/// Says on standard output that something was not tried, and why.
pub fn skipped(name: &str, reason: &str) {
    println!("\nSKIPPED {name}: {reason}");
}

/// Numbers that come again with the same seed (SplitMix64: Steele, Lea and Flood, OOPSLA 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
