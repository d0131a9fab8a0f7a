//! Forks: a child cannot use its parent's table, whenever it was forked.

use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicUsize};

use super::*;
use crate::stores::embedded::table::word::hook;

#[test]
fn a_child_is_told_and_opens_its_own() {
    let scene = Scene::new();
    let table = scene.open();
    let key = TestKey::at(1, 1, "key");
    put(&table, &key, b"parent's", hasty()).unwrap();
    let child = in_child(|| {
        assert!(matches!(get(&table, &key, hasty()), Err(Fault::Forked)));
        assert!(matches!(listed(&table), Err(Fault::Forked)));
        // Functions that do not return errors neither change the parent's table nor wait for it.
        let seen = table.file.announce(&key.hash, Sleeper::Thread);
        assert!(table.file.has_moved(&key.hash, seen) && !table.file.is_awaited(&key.hash));
        assert_eq!(
            (table.file.sleep(&key.hash, seen, LONG), table.file.listen(table.file.listener_count(), 1, Some(LONG))),
            (Woken::Called, Woken::Called)
        );
        table.file.wake_listeners(table.file.own_bit());
        table.retire();
        assert_eq!(table.fence_ceiling(), 0);
        drop(table);
        let own = scene.open();
        assert_eq!(get(&own, &key, hasty()).unwrap().unwrap(), b"parent's");
        put(&own, &key, b"child's", hasty()).unwrap();
        0
    });
    assert_eq!(wait_for(child), Ended::Exited(0));
}

static FORKED: AtomicI32 = AtomicI32::new(0);

extern "C" fn fork_here(_: i32) {
    // SAFETY: the child continues like its parent until it ends.
    FORKED.store(unsafe { libc::fork() }, Ordering::SeqCst);
}

/// Runs in a child, because it changes the handler of a signal.
#[test]
fn a_fork_in_a_signal_handler_at_every_store() {
    let mut points = 0;
    loop {
        let scene = Scene::new();
        let table = scene.open();
        let key = TestKey::at(2, 2, "key");
        put(&table, &key, &[1; 100], hasty()).unwrap();
        drop(table);
        let child = in_child(|| {
            let table = scene.open();
            // SAFETY: the handler makes one system call.
            unsafe { libc::signal(libc::SIGUSR1, fork_here as *const () as usize) };
            hook::arm(points + 1, libc::SIGUSR1);
            let done = put(&table, &key, &[2; 300], patient());
            hook::arm(u64::MAX, libc::SIGUSR1);
            match FORKED.load(Ordering::SeqCst) {
                // In the forked copy: the operation must have failed, and must have changed nothing.
                0 if !table.file.is_of_this_process() => {
                    assert!(done.is_err(), "{done:?}");
                    assert!(matches!(get(&table, &key, patient()), Err(Fault::Forked)));
                    std::mem::forget(table);
                    7
                }
                0 => 1,
                copy => {
                    done.unwrap();
                    assert_eq!(wait_for(copy), Ended::Exited(7));
                    0
                }
            }
        });
        let ended = wait_for(child);
        assert_is_in(&scene.open(), 2..3, &Model::from([(key, vec![2; 300])]));
        match ended {
            Ended::Exited(0) => points += 1,
            ended => {
                assert_eq!(ended, Ended::Exited(1), "after store {}", points + 1);
                break;
            }
        }
    }
    println!("forked in a signal handler at {points} points");
    assert!(points > 50);
}

static TABLE: AtomicPtr<Table> = AtomicPtr::new(std::ptr::null_mut());
static REFUSED: AtomicUsize = AtomicUsize::new(0);
static ANSWERED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn use_it_here(_: i32) {
    // SAFETY: set before the signal can arrive, and never dropped.
    let table = unsafe { &*TABLE.load(Ordering::SeqCst) };
    match get(table, &TestKey::at(2, 2, "key"), patient()) {
        Ok(_) => drop(ANSWERED.fetch_add(1, Ordering::SeqCst)),
        Err(fault) => {
            assert!(fault.into_error().message.contains("signal handler"));
            REFUSED.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[test]
fn a_signal_handler_that_interrupts_an_operation_is_refused_at_once() {
    let scene = Scene::new();
    let child = in_child(|| {
        let key = TestKey::at(2, 2, "key");
        TABLE.store(Box::into_raw(Box::new(scene.open())), Ordering::SeqCst);
        // SAFETY: never dropped.
        let table = unsafe { &*TABLE.load(Ordering::SeqCst) };
        put(table, &key, &[1; 100], hasty()).unwrap();
        // SAFETY: the signal only arrives at stores to the table, where no operation is allocating memory.
        unsafe { libc::signal(libc::SIGUSR1, use_it_here as *const () as usize) };
        for after in 1..40 {
            hook::arm(after, libc::SIGUSR1);
            put(table, &key, &[2; 100], patient()).unwrap();
        }
        assert!(REFUSED.load(Ordering::SeqCst) > 20);
        // Outside of the mutex, the handler may use the table.
        hook::arm(1, libc::SIGUSR1);
        table.file.announce(&key.hash, Sleeper::Thread);
        hook::arm(u64::MAX, libc::SIGUSR1);
        assert_eq!(ANSWERED.load(Ordering::SeqCst), 1);
        assert_is_in(table, 2..3, &Model::from([(key, vec![2; 100])]));
        0
    });
    assert_eq!(wait_for(child), Ended::Exited(0));
}
