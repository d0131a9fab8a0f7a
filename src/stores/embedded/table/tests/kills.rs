//! Processes that work without pauses and are killed at random moments, a thousand times.

use std::ptr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use super::*;

const WORKERS: usize = 4;
const KEYS: usize = 24;

/// For each key of each worker, the version that it was about to write, and the version that it has written. In memory
/// that is shared with the children.
struct Journal(*const [[[AtomicU64; 2]; KEYS]; WORKERS]);

impl Journal {
    fn new() -> Journal {
        let length = size_of::<[[[AtomicU64; 2]; KEYS]; WORKERS]>();
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping with the size of the array, never removed.
        let address = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED);
        Journal(address.cast())
    }

    /// `[intended, done]`
    fn of(&self, worker: usize, key: usize) -> &[AtomicU64; 2] {
        // SAFETY: mapped, zeroed, and consists of atomics only.
        unsafe { &(*self.0)[worker][key] }
    }
}

/// The keys of all workers share a few chains, some of which are long.
fn key_of(worker: usize, n: usize) -> TestKey {
    TestKey::at(n % 4, n / 4 % 2, &format!("{worker}/{n}"))
}

/// The payload of a version, which contains its own identity. `None` if the version is a removal.
fn payload(worker: usize, n: usize, version: u64) -> Option<Vec<u8>> {
    let length = [10, 100, 195, 420, 2500][(version % 5) as usize];
    let mut payload = format!("{worker}/{n}/{version}/").into_bytes();
    payload.resize(length.max(payload.len()), b'.');
    (!version.is_multiple_of(7)).then_some(payload)
}

fn work(scene: &Scene, journal: &Journal, worker: usize, seed: u64) -> i32 {
    let table = scene.open();
    let mut dice = Dice(seed);
    let mut buffer = Buffer::new();
    loop {
        let n = dice.below(KEYS);
        let [intended, done] = journal.of(worker, n);
        let version = intended.load(SeqCst) + 1;
        intended.store(version, SeqCst);
        let key = key_of(worker, n);
        let written = table.with(key.as_ref(), &mut patient(), |entry| {
            entry.get(&mut buffer)?;
            entry.next_fence()?;
            match payload(worker, n, version) {
                Some(payload) => entry.put(&payload)?,
                None => drop(entry.delete()?),
            }
            entry.wake();
            Ok(())
        });
        if let Err(fault) = written {
            eprintln!("worker {worker}: {fault:?}");
            return 1;
        }
        done.store(version, SeqCst);
        if dice.below(50) == 0
            && let Err(fault) = listed_in(&table, 0..4)
        {
            eprintln!("worker {worker} lists: {fault:?}");
            return 1;
        }
    }
}

#[test]
fn killed_at_random_by_the_thousand() {
    let kills = std::env::var("NBLOCK_PROOF_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(1000);
    let seed = std::env::var("NBLOCK_PROOF_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("{kills} kills, seed {seed}");
    let scene = Scene::new();
    let journal = Journal::new();
    let mut table = scene.open();
    let mut dice = Dice(seed);
    let start = |worker: usize, seed: u64| in_child(|| work(&scene, &journal, worker, seed));
    let mut workers: Vec<_> = (0..WORKERS).map(|worker| start(worker, dice.next())).collect();
    let (mut with_mutex, mut repaired, mut written) = (0, 0, 0);
    for kill in 0..kills {
        let worker = dice.below(WORKERS);
        std::thread::sleep(Duration::from_micros(dice.below(1500) as u64));
        if dice.below(10) == 0 {
            // First stop it while it has a mutex, so that others wait for that mutex.
            loop {
                signal(workers[worker], libc::SIGSTOP);
                assert_eq!(wait_for(workers[worker]), Ended::Stopped, "kill {kill}");
                if has_a_mutex(&table, workers[worker]) {
                    break;
                }
                signal(workers[worker], libc::SIGCONT);
                std::thread::sleep(Duration::from_micros(dice.below(1500) as u64));
            }
            with_mutex += 1;
        }
        signal(workers[worker], libc::SIGKILL);
        assert_eq!(wait_for(workers[worker]), Ended::Killed(libc::SIGKILL), "kill {kill}");
        repaired += (0..4).filter(|&shard| died_in(&table, shard)).count();
        for n in 0..KEYS {
            let [intended, done] = journal.of(worker, n);
            let (intended, done) = (intended.load(SeqCst), done.load(SeqCst));
            let found = get(&table, &key_of(worker, n), patient()).unwrap();
            let may_be = |version| found == if version == 0 { None } else { payload(worker, n, version) };
            assert!(may_be(done) || may_be(intended), "kill {kill}: key {n} of worker {worker}, version {done}");
            // The next worker continues with the version that is stored.
            let reached = if may_be(intended) { intended } else { done };
            journal.of(worker, n).iter().for_each(|version| version.store(reached, SeqCst));
            written += 1;
        }
        workers[worker] = start(worker, dice.next());
        if kill % 100 == 99 {
            // Now only this process has the table open: it opens it again, alone.
            for &worker in &workers {
                signal(worker, libc::SIGKILL);
                wait_for(worker);
            }
            drop(table);
            table = scene.open();
            let (found, damaged) = listed_in(&table, 0..4).unwrap();
            assert!(damaged.is_empty());
            assert_is_in(&table, 0..4, &found);
            for worker in 0..WORKERS {
                for n in 0..KEYS {
                    let [intended, done] = journal.of(worker, n);
                    let found = found.get(&key_of(worker, n)).cloned();
                    let reached = if found == payload(worker, n, intended.load(SeqCst)) { intended } else { done };
                    let reached = reached.load(SeqCst);
                    assert_eq!(found, if reached == 0 { None } else { payload(worker, n, reached) });
                    intended.store(reached, SeqCst);
                    done.store(reached, SeqCst);
                }
            }
            workers = (0..WORKERS).map(|worker| start(worker, dice.next())).collect();
        }
    }
    for worker in workers {
        signal(worker, libc::SIGKILL);
        wait_for(worker);
    }
    println!(
        "{kills} kills, {with_mutex} of them with a mutex, after {repaired} of them it was not repaired yet; {written} keys \
         looked at"
    );
}

/// Whether this stopped process has the mutex of one of the shards that are used here.
fn has_a_mutex(table: &Table, process: i32) -> bool {
    (0..4).any(|shard| table.file.top().shards[shard].0.mutex.load_in_order() & mutex::OWNER == process as u32)
}

/// Whether a shard is marked as having a dead owner. (Other processes may have repaired it by now.)
fn died_in(table: &Table, shard: usize) -> bool {
    table.file.top().shards[shard].0.mutex.load_in_order() & mutex::OWNER_DIED != 0
}

#[test]
fn a_mutex_whose_owner_is_killed_goes_to_who_sleeps_for_it() {
    let scene = Scene::new();
    let table = scene.open();
    let key = TestKey::at(5, 5, "key");
    let mut took = Vec::new();
    for _ in 0..200 {
        let (mut reads, mut writes) = ([0; 1], [0; 2]);
        // SAFETY: writes two descriptors.
        assert_eq!(unsafe { libc::pipe(writes.as_mut_ptr()) }, 0);
        let child = in_child(|| {
            let table = scene.open();
            let done = table.with(key.as_ref(), &mut patient(), |_| {
                // SAFETY: writes one byte to a pipe, then sleeps with the mutex until it is killed.
                unsafe {
                    libc::write(writes[1], b"x".as_ptr().cast(), 1);
                    libc::pause();
                }
                Ok(())
            });
            i32::from(done.is_err())
        });
        // SAFETY: waits for the byte.
        assert_eq!(unsafe { libc::read(writes[0], reads.as_mut_ptr().cast(), 1) }, 1);
        let killed = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                put(&table, &key, b"mine", patient()).unwrap();
                Instant::now()
            });
            // Wait until the waiter sleeps: then the highest bit of the word is set.
            let word = &table.file.top().shards[5].0.mutex;
            while word.load_in_order() >> 31 == 0 {
                std::thread::yield_now();
            }
            let killed = Instant::now();
            signal(child, libc::SIGKILL);
            waiter.join().unwrap().duration_since(killed)
        });
        took.push(killed);
        wait_for(child);
        // SAFETY: two descriptors of this test.
        unsafe { (libc::close(writes[0]), libc::close(writes[1])) };
    }
    took.sort();
    println!("from the kill to the next owner: median {:?}, longest {:?}", took[100], took[199]);
}

#[test]
fn a_zombie_and_a_thread_that_ended_give_their_mutexes_back() {
    let scene = Scene::new();
    let table = scene.open();
    let key = TestKey::at(6, 6, "key");
    // Killed, but not waited for yet: a zombie.
    let child = in_child(|| {
        let table = scene.open();
        word::hook::arm(3, libc::SIGKILL);
        let _ = put(&table, &key, b"x", patient());
        0
    });
    put(&table, &key, b"y", patient()).unwrap();
    assert_eq!(wait_for(child), Ended::Killed(libc::SIGKILL));
    // A damaged word: no thread has this number. That is noticed after a second.
    let word = &table.file.top().shards[6].0.mutex;
    word.store(0x3fff_fff0);
    put(&table, &key, b"z", patient()).unwrap();
    // The number of this thread, which has not taken the mutex.
    word.store(unsafe { libc::syscall(libc::SYS_gettid) } as u32);
    put(&table, &key, b"w", hasty()).unwrap();
    assert_is_in(&table, 6..7, &Model::from([(key, b"w".to_vec())]));
}
