//! The mutex, when its owner is stopped or killed, or is another copy of the library.

use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use nblock::key::Key;
use nblock::store::{Answer, Filter, Store, StoreErrorKind, StoreOptions};
use nblock::stores::embedded::fuzzing::layout;
use nblock::sys::runtime::wait;
use nblock::url::Url;

use super::{grant, renew};
use crate::asks::{Acquired, Asks, Claim, Released, Renewed};
use crate::child::{Actor, say};
use crate::support::{Directory, PATIENCE, RawClient, answer, eventually, fresh_key, key, lock, open};

/// Writes one key without pauses, so that it often has the mutex of the key's shard.
pub fn writer(url: &str) {
    write(&open(url).unwrap());
}

fn write(store: &Arc<dyn Store>) {
    let key = fresh_key();
    say(key.as_str());
    loop {
        let holder = grant(store, &key);
        answer(store.release(&key, Claim::Token(holder.token(1)))).unwrap();
    }
}

/// Starts a writer. Returns it, and the key that it writes.
fn started(name: &str, arguments: &[&str]) -> (Actor, Key) {
    let mut writer = Actor::start(name, arguments);
    let written = key(&writer.says());
    (writer, written)
}

/// Stops the writer while it has the mutex. Returns the error that others then get.
fn stop_inside(writer: &Actor, written: &Key, store: &Arc<dyn Store>) -> nblock::store::StoreError {
    let start = Instant::now();
    loop {
        writer.stop();
        match answer(store.find(written)) {
            Err(error) if error.message.contains("process") => return error,
            _ => assert!(start.elapsed() < PATIENCE, "it was never stopped inside"),
        }
        writer.signal(libc::SIGCONT);
        std::thread::yield_now();
    }
}

/// A key of another shard, which has its own mutex.
fn key_elsewhere(than: &Key) -> Key {
    let shard = |key: &Key| layout::slot_of(&key.hash().0).0;
    std::iter::repeat_with(fresh_key).find(|key| shard(key) != shard(than)).unwrap()
}

#[test]
fn a_stopped_writer_makes_others_of_its_part_answer_store_busy() {
    let directory = Directory::new();
    let options = StoreOptions { op_timeout: Duration::from_millis(100), connect_timeout: PATIENCE };
    let store = nblock::stores::open(&Url::parse(&directory.url()).unwrap(), &options).unwrap();
    // On a loaded machine, such a short op_timeout may also expire while no process is stopped.
    let answered = |key: &Key| eventually("the store is free again", || answer(store.find(key)).is_ok());
    let (mut writer, written) = started("writer", &[&directory.url()]);
    let error = stop_inside(&writer, &written, &store);
    assert_eq!(error.kind, StoreErrorKind::Unreachable, "nothing was applied");
    assert!(error.message.contains("store busy") && error.message.contains(&writer.pid().to_string()), "{error}");
    // Keys of other shards can be used as before, also through a store that is opened now.
    let other = key_elsewhere(&written);
    let mut holder = grant(&store, &other);
    assert_eq!(renew(&directory.store().unwrap(), &other, &mut holder).unwrap(), Renewed::Renewed { applied: true });

    // The writer continues, and so do all others.
    writer.signal(libc::SIGCONT);
    answered(&written);
    // Stopped again with the mutex, and then killed: the mutex is handed on, and nothing is lost.
    stop_inside(&writer, &written, &store);
    writer.kill();
    answered(&written);
    assert_eq!(answer(store.release(&other, Claim::AnyOf(holder.hold))).unwrap(), Released::Released);
    answer(store.list_all(Filter::All)).unwrap();
}

#[test]
fn a_store_that_hangs_leaves_others_their_threads() {
    let (stuck, well) = (Directory::new(), Directory::new());
    let open_for = |directory: &Directory, op_timeout| {
        let options = StoreOptions { op_timeout, connect_timeout: PATIENCE };
        nblock::stores::open(&Url::parse(&directory.url()).unwrap(), &options).unwrap()
    };
    let (hangs, works) = (open_for(&stuck, Duration::from_millis(100)), open_for(&well, PATIENCE));
    let (writer, written) = started("writer", &[&stuck.url()]);
    stop_inside(&writer, &written, &hangs);
    // These requests wait on threads, and for a longer time.
    let patient = open_for(&stuck, PATIENCE * 10);
    let mut asked: Vec<_> = (0..200).map(|_| patient.find(&written)).collect();
    answer(works.list_all(Filter::All)).unwrap();
    for asked in &mut asked {
        let Answer::Later(asked) = asked else { panic!("answered while the writer has the mutex") };
        let answered = asked.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(answered.is_pending(), "the other store waited for them");
    }
    writer.signal(libc::SIGCONT);
    for asked in asked {
        answer(asked).unwrap();
    }
}

/// As [`writer`], in a program that has closed the library's descriptors.
pub fn careless(url: &str, _: &str) {
    let store = open(url).unwrap();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().map(Result::unwrap).collect::<Vec<_>>() {
        let to = std::fs::read_link(entry.path()).unwrap_or_default();
        if to.to_string_lossy().contains("table-") {
            let descriptor = entry.file_name().to_string_lossy().parse().unwrap();
            // SAFETY: unsound on purpose: this is what the test is about. The file stays mapped.
            unsafe { libc::close(descriptor) };
        }
    }
    write(&store);
}

#[test]
fn who_has_closed_its_descriptors_still_uses_the_files() {
    let directory = Directory::new();
    let url = Url::parse(&directory.url()).unwrap();
    let brief = StoreOptions { op_timeout: Duration::from_millis(100), connect_timeout: PATIENCE };
    let opened = || nblock::stores::open(&url, &brief).unwrap();
    let store = directory.store().unwrap();
    let (mut writer, written) = started("careless", &[&directory.url(), ""]);
    drop(store);
    let store = opened();
    stop_inside(&writer, &written, &store);
    drop(store);
    // A process that opens the table now is not alone, so it must not release mutexes that others hold.
    let store = opened();
    let error = answer(store.find(&written)).expect_err("the mutex was made again while somebody had it");
    assert!(error.message.contains("store busy"), "{error}");
    writer.kill();
    eventually("it is free", || answer(store.find(&written)).is_ok());
}

/// Two copies of the library in one process, as in a program that loads two bindings.
#[test]
fn a_second_copy_of_the_library_shares_the_store() {
    use std::ffi::{CString, c_char, c_void};
    type ClientNew = unsafe extern "C" fn(*const c_char, *const c_void, *mut *mut c_void, *mut c_void) -> i32;
    type LockNew =
        unsafe extern "C" fn(*mut c_void, *const c_char, usize, *const c_void, *mut *mut c_void, *mut c_void) -> i32;
    type LockIt = unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_void) -> i32;
    type Unlock = unsafe extern "C" fn(*mut c_void, *mut c_void) -> i32;

    let directory = Directory::new();
    let client = directory.client();
    let ours = lock(&client, &key("shared"));
    let exe = std::env::current_exe().unwrap();
    let library = exe.with_file_name("libnblock.so");
    assert!(library.exists(), "{} is built beside the tests", library.display());
    let name = CString::new(library.as_os_str().as_encoded_bytes()).unwrap();
    let url = CString::new(directory.url()).unwrap();
    let counter = std::sync::atomic::AtomicU64::new(0);
    const ROUNDS: u64 = 500;
    let increment = || {
        // Not atomic: if both held the lock at once, an increment would be lost.
        let value = counter.load(std::sync::atomic::Ordering::Relaxed);
        std::thread::yield_now();
        counter.store(value + 1, std::sync::atomic::Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let forever =
                nblock::options::LockOptions { timeout: Some(nblock::options::Timeout::Forever), ..Default::default() };
            for _ in 0..ROUNDS {
                assert!(wait(ours.lock(forever)).unwrap());
                increment();
                wait(ours.unlock()).unwrap();
            }
        });
        // SAFETY: the functions have the types that the header declares; texts end with NUL.
        unsafe {
            let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!library.is_null());
            let find = |name: &std::ffi::CStr| {
                let found = libc::dlsym(library, name.as_ptr());
                assert!(!found.is_null(), "{name:?}");
                found
            };
            let client_new: ClientNew = std::mem::transmute(find(c"nbl_client_new"));
            let lock_new: LockNew = std::mem::transmute(find(c"nbl_lock_new"));
            let lock_it: LockIt = std::mem::transmute(find(c"nbl_lock"));
            let unlock: Unlock = std::mem::transmute(find(c"nbl_unlock"));
            let ours = nblock::ffi::nbl_client_new as *const ();
            assert_ne!(client_new as *const (), ours, "it is another copy");
            let (mut client, mut lock) = (std::ptr::null_mut(), std::ptr::null_mut());
            let null = std::ptr::null_mut();
            assert_eq!(client_new(url.as_ptr(), null, &mut client, null), 0);
            assert_eq!(lock_new(client, c"shared".as_ptr(), usize::MAX, null, &mut lock, null), 0);
            for _ in 0..ROUNDS {
                while lock_it(lock, null, null) != 0 {}
                increment();
                assert_eq!(unlock(lock, null), 0);
            }
        }
    });
    assert_eq!(counter.into_inner(), 2 * ROUNDS);
}

/// Calls all operations that write, without pauses, until it is killed.
pub fn storm(url: &str, seed: &str) {
    let store = open(url).unwrap();
    let mut random = crate::support::Random::new(seed.parse().unwrap());
    let shared: Vec<Key> = (0..16).map(|number| key(&format!("storm:{number:0>200}"))).collect();
    say("storming");
    loop {
        let key = &shared[random.below(shared.len())];
        let mut client = RawClient::new();
        let expire = Duration::from_millis(1 + random.below(20) as u64);
        match answer(store.acquire(key, client.attempt(expire))).unwrap() {
            Acquired::Granted { .. } if random.below(4) > 0 => {
                renew(&store, key, &mut client).unwrap();
                answer(store.release(key, Claim::Token(client.token(1)))).unwrap();
            }
            _ => {}
        }
        if random.below(64) == 0 {
            answer(store.list_all(Filter::All)).unwrap();
            answer(store.fence(key)).unwrap();
        }
    }
}

#[test]
fn killed_writers_leave_the_store_whole() {
    const KILLS: u64 = 60;
    let directory = Directory::new();
    let url = directory.url();
    let store = directory.store().unwrap();
    let kept = fresh_key();
    let mut holder = grant(&store, &kept);
    let start = |seed: u64| {
        let mut actor = Actor::start("storm", &[&url, &seed.to_string()]);
        assert_eq!(actor.says(), "storming");
        actor
    };
    let mut writers: Vec<_> = (0..3).map(start).collect();
    let mut random = crate::support::Random::new(7);
    let mut fence = 0;
    for kill in 0..KILLS {
        for _ in 0..20 {
            assert_eq!(renew(&store, &kept, &mut holder).unwrap(), Renewed::Renewed { applied: true });
            let next = answer(store.fence(&kept)).unwrap();
            assert!(next > fence, "a fence came twice: {next} after {fence}");
            fence = next;
        }
        let victim = random.below(writers.len());
        writers[victim].kill();
        writers[victim] = start(100 + kill);
    }
    drop(writers);
    answer(store.list_all(Filter::All)).unwrap();
    assert_eq!(renew(&store, &kept, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    drop(store);
    let store = directory.store().unwrap();
    assert_eq!(renew(&store, &kept, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    assert!(answer(store.fence(&kept)).unwrap() > fence);
    assert_eq!(directory.set_aside(), 0);
}
