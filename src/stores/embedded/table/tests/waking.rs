//! Sleeping until a key changes, and being woken although other processes die.

use std::task::Poll;

use super::*;
use crate::key::KeyHash;
use crate::stores::embedded::table::word::hook;
use crate::stores::embedded::watches::Watches;
use crate::sys::runtime;

fn change(table: &Table, key: &TestKey) {
    let done = table.with(key.as_ref(), &mut patient(), |entry| {
        entry.put(b"changed")?;
        entry.wake();
        Ok(())
    });
    done.unwrap();
}

/// Sleeps as a waiter does, until the key has changed. Returns how often it woke without a change.
fn wait_until_changed(table: &Table, key: &TestKey) -> usize {
    for wakes in 0.. {
        let seen = table.file.announce(&key.hash, Sleeper::Thread);
        if get(table, key, patient()).unwrap().is_some_and(|payload| payload == b"changed") {
            return wakes;
        }
        // Far longer than the test may take: only a wake-up ends the sleep.
        assert_ne!(table.file.sleep(&key.hash, seen, LONG * 10), Woken::TimedOut);
    }
    unreachable!()
}

#[test]
fn sleepers_are_woken_by_a_change_and_not_before() {
    let scene = Scene::new();
    let (here, there) = (scene.open(), scene.open());
    let key = TestKey::at(8, 8, "key");
    std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| wait_until_changed(&here, &key))).collect();
        while !there.file.is_awaited(&key.hash) {
            std::thread::yield_now();
        }
        change(&there, &key);
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
    // There is no waiter: the bits are cleared by one more change.
    change(&there, &key);
    assert!(!there.file.is_awaited(&key.hash));
    let seen = here.file.announce(&key.hash, Sleeper::Thread);
    assert!(!here.file.has_moved(&key.hash, seen));
    assert_eq!(here.file.sleep(&key.hash, seen, Duration::from_millis(1)), Woken::TimedOut);
    change(&there, &key);
    assert!(here.file.has_moved(&key.hash, seen));
    assert_eq!(here.file.sleep(&key.hash, seen, LONG), Woken::Called);
}

#[test]
fn a_listener_hears_of_keys_that_are_waited_for_without_a_thread() {
    let scene = Scene::new();
    let (here, there) = (scene.open(), scene.open());
    let key = TestKey::at(8, 9, "key");
    let seen = here.file.listener_count();
    // Without a listener for the key, a change does not wake the listeners' word.
    change(&there, &key);
    assert_eq!(here.file.listener_count(), seen);
    let seen = here.file.announce(&key.hash, Sleeper::Listener);
    std::thread::scope(|scope| {
        let listener =
            scope.spawn(|| here.file.listen(seen, listener_bit(&key.hash) | here.file.own_bit(), Some(LONG)));
        change(&there, &key);
        assert_eq!(listener.join().unwrap(), Woken::Called);
    });
    assert!(here.file.has_moved(&key.hash, seen));
}

/// A waiter sleeps, and the process that would wake it is killed after each of its stores. The next process that uses
/// the shard wakes the waiter.
#[test]
fn a_releaser_that_is_killed_leaves_nobody_asleep() {
    let (mut points, mut by_note) = (0, 0);
    loop {
        let scene = Scene::new();
        let table = scene.open();
        let key = TestKey::at(8, 10, "key");
        put(&table, &key, b"held", hasty()).unwrap();
        let ended = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| wait_until_changed(&table, &key));
            while !table.file.is_awaited(&key.hash) {
                std::thread::yield_now();
            }
            let child = in_child(|| {
                let table = scene.open();
                hook::arm(points + 1, libc::SIGKILL);
                change(&table, &key);
                hook::arm(u64::MAX, libc::SIGKILL);
                0
            });
            let ended = wait_for(child);
            by_note += u32::from(table.file.top().shards[8].0.note.load() != 0);
            // Another operation in the same shard.
            if get(&table, &key, patient()).unwrap().unwrap() == b"held" {
                // It was killed before its change.
                change(&table, &key);
            }
            waiter.join().unwrap();
            ended
        });
        assert_eq!(table.file.top().shards[8].0.note.load(), 0, "the wake-ups were sent");
        if !was_killed(ended) {
            break;
        }
        points += 1;
    }
    println!("killed at {points} points of a change with a sleeper; {by_note} left a note");
    assert!(by_note > 0);
}

/// A thread that waits in `block_on` sleeps on the word itself: the listeners are not woken for it.
#[test]
fn a_thread_that_waits_is_woken_without_the_listener() {
    let scene = Scene::new();
    let (here, there) = (Arc::new(scene.open()), scene.open());
    let key = TestKey::at(8, 12, "key");
    let watches = Watches::new(Arc::clone(&here));
    let can = runtime::block_on(std::future::poll_fn(|_| Poll::Ready(runtime::sleeps_on_words()))).unwrap();
    if !can {
        println!("\nSKIPPED futex-waitv: this kernel has no futex_waitv (Linux 5.16)");
        return;
    }
    // This announces a listener; its bit stays in the word until the key changes.
    drop(watches.watch(KeyHash(key.hash)));
    change(&there, &key);
    for _ in 0..50 {
        let announced = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let mut watching = None;
                runtime::block_on(std::future::poll_fn(|context| {
                    let watching = watching.get_or_insert_with(|| watches.watch(KeyHash(key.hash)));
                    announced.store(true, Ordering::SeqCst);
                    watching.poll(context)
                }))
                .unwrap();
            });
            while !announced.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let seen = there.file.listener_count();
            change(&there, &key);
            assert_eq!(there.file.listener_count(), seen, "nobody listens");
            waiter.join().unwrap();
        });
    }
    watches.close();
}

/// No other process uses the shard: the listening thread of the waiter's process finds the change by its regular check.
#[test]
fn a_waiter_is_woken_although_the_releaser_was_killed_before_its_call() {
    let scene = Scene::new();
    let key = TestKey::at(8, 11, "key");
    let (table, mut points) = (Arc::new(scene.open()), 0);
    let watches = Watches::new(Arc::clone(&table));
    loop {
        put(&table, &key, b"held", patient()).unwrap();
        let mut watching = watches.watch(KeyHash(key.hash));
        let (sender, woken) = std::sync::mpsc::channel();
        let waker = std::task::Waker::from(Arc::new(Tells(sender)));
        assert!(watching.poll(&std::task::Context::from_waker(&waker)).is_pending());
        let child = in_child(|| {
            let table = scene.open();
            // Its first use maps the chunks, and releases the mutex once more for that.
            get(&table, &key, patient()).unwrap();
            hook::arm(points + 1, libc::SIGKILL);
            change(&table, &key);
            hook::arm(u64::MAX, libc::SIGKILL);
            0
        });
        let ended = wait_for(child);
        woken.recv_timeout(LONG).unwrap_or_else(|_| panic!("killed at point {points}, it left the waiter asleep"));
        assert!(watching.poll(&std::task::Context::from_waker(&waker)).is_ready());
        if !was_killed(ended) {
            break;
        }
        points += 1;
    }
    println!("killed at {points} points of a change that a listener waits for");
    assert!(points > 5, "{points}");
    watches.close();
}

/// Reports that it was woken.
struct Tells(std::sync::mpsc::Sender<()>);

impl std::task::Wake for Tells {
    fn wake(self: Arc<Self>) {
        // The receiver may be gone.
        let _ = self.0.send(());
    }
}
