//! Single-stepping: which instructions change the file, and what is left if a thread dies after one of them.
//!
//! `crash.rs` counts stores, and so relies on all changes being made by counted stores. Here that is checked: a child
//! is run instruction by instruction, and the file is compared after each. A release build (`cargo test --release --lib
//! table::tests::steps`) tests the code that users run.

use std::os::unix::fs::FileExt;

use super::*;
use crate::stores::embedded::table::layout::{CHUNK_BYTES, CHUNKS_AT, SLOTS, Slot};
use crate::stores::embedded::table::word::hook;

/// The parts of a file that the operations here can change.
struct Watched {
    file: File,
    ranges: [(u64, usize); 3],
}

impl Watched {
    fn new(scene: &Scene) -> Watched {
        let slots = std::mem::offset_of!(Top, slots);
        let shard = slots + 3 * SLOTS * size_of::<Slot>();
        let ranges = [(0, slots), (shard as u64, SLOTS * size_of::<Slot>()), (CHUNKS_AT, 2 * CHUNK_BYTES as usize)];
        Watched { file: File::open(scene.file()).unwrap(), ranges }
    }

    fn read(&self, into: &mut Vec<u8>) {
        into.resize(self.ranges.iter().map(|range| range.1).sum(), 0);
        let mut rest = &mut into[..];
        for (at, length) in self.ranges {
            let (now, later) = rest.split_at_mut(length);
            self.file.read_exact_at(now, at).unwrap();
            rest = later;
        }
    }
}

fn key(n: usize) -> TestKey {
    TestKey::at(3, 17, &format!("key {n}"))
}

fn prepared() -> (Scene, Table) {
    let scene = Scene::new();
    let table = scene.open();
    for n in 0..3 {
        put(&table, &key(n), &[n as u8; 50], patient()).unwrap();
    }
    fence(&table, &key(0));
    table.file.announce(&key(1).hash, Sleeper::Thread);
    (scene, table)
}

const DEBUG_POINTS: usize = 8;

type Operation = (&'static str, fn(&Table));

const OPERATIONS: [Operation; 4] = [
    ("put", |table| put(table, &key(7), &[7; 50], hasty()).unwrap()),
    ("replace by a longer one", |table| put(table, &key(1), &[8; 400], hasty()).unwrap()),
    ("delete", |table| assert!(delete(table, &key(0), hasty()).unwrap())),
    ("a grant that wakes", |table| {
        let done = table.with(key(1).as_ref(), &mut hasty(), |entry| {
            entry.next_fence()?;
            entry.put(&[9; 50])?;
            entry.wake();
            Ok(())
        });
        done.unwrap();
    }),
];

/// A child that has stopped before the operation, to be run instruction by instruction.
fn traced(scene: &Scene, run: fn(&Table)) -> libc::pid_t {
    let child = in_child(|| {
        let table = scene.open();
        // Before the operation, so that what a process initialises only once is not counted.
        get(&table, &key(2), hasty()).unwrap();
        // SAFETY: the parent traces this child from here on.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
        }
        run(&table);
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) }
    });
    assert_eq!(wait_for(child), Ended::Stopped);
    child
}

/// Runs one instruction. Returns `false` if it ended the child.
fn step(child: libc::pid_t) -> bool {
    // SAFETY: a stopped child that this thread traces.
    assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, child, 0, 0) }, 0);
    match wait_for(child) {
        Ended::Stopped => true,
        ended => {
            assert_eq!(ended, Ended::Exited(0));
            false
        }
    }
}

/// The numbers of the instructions that change the file, and the number of all instructions.
fn changing(run: fn(&Table)) -> (Vec<u64>, u64) {
    let (scene, _table) = prepared();
    let watched = Watched::new(&scene);
    let (mut before, mut now) = (Vec::new(), Vec::new());
    let child = traced(&scene, run);
    watched.read(&mut before);
    let (mut changing, mut count) = (Vec::new(), 0);
    while step(child) {
        count += 1;
        watched.read(&mut now);
        if now != before {
            changing.push(count);
            std::mem::swap(&mut now, &mut before);
        }
    }
    (changing, count)
}

/// The number of stores that the hook counts in an operation.
fn counted(run: fn(&Table)) -> u64 {
    let (scene, _table) = prepared();
    let child = in_child(|| {
        let table = scene.open();
        get(&table, &key(2), hasty()).unwrap();
        hook::arm(1 << 20, libc::SIGKILL);
        run(&table);
        (hook::made(1 << 20)) as i32
    });
    match wait_for(child) {
        Ended::Exited(count) => count as u64,
        ended => panic!("{ended:?}"),
    }
}

#[test]
fn killed_at_every_instruction_that_changes_the_file() {
    for (name, run) in OPERATIONS {
        let (changing, instructions) = changing(run);
        let stores = counted(run);
        // A store of the present value changes nothing, so there may be fewer changes than stores.
        assert!(changing.len() as u64 <= stores, "{name}: {} changes, {stores} counted stores", changing.len());
        let (scene, table) = prepared();
        let before = listed_in(&table, 3..4).unwrap().0;
        run(&table);
        let after = listed_in(&table, 3..4).unwrap().0;
        drop((scene, table));
        let mut undone = 0;
        // Between two changes, the file is the same wherever the thread dies. So it is killed right before and right
        // after each change, and once in between, because the state of the thread and the kernel may differ there.
        let middle = changing.windows(2).map(|pair| pair[0].midpoint(pair[1]));
        let around = changing.iter().flat_map(|&at| [at - 1, at]);
        let mut points: Vec<_> = around.chain(middle).collect();
        points.sort_unstable();
        points.dedup();
        if cfg!(debug_assertions) {
            // A debug build has ten times as many instructions, and steps through them again for each point: try only
            // some.
            let thinned = points.len().div_ceil(DEBUG_POINTS);
            points = points.into_iter().step_by(thinned).collect();
        }
        for &point in &points {
            let (scene, table) = prepared();
            let child = traced(&scene, run);
            for _ in 0..point {
                assert!(step(child));
            }
            signal(child, libc::SIGKILL);
            assert_eq!(wait_for(child), Ended::Killed(libc::SIGKILL));
            let found = listed_in(&table, 3..4).unwrap().0;
            assert!(found == before || found == after, "{name}, killed after instruction {point}");
            assert_is_in(&table, 3..4, &found);
            put(&table, &key(8), &[1; 500], patient()).unwrap();
            assert!(delete(&table, &key(8), patient()).unwrap());
            assert_is_in(&table, 3..4, &found);
            undone += usize::from(found == before);
        }
        println!(
            "{name:<24} {instructions:>6} instructions, {:>3} change the file ({stores} counted); killed at {}, {undone} \
             of them before the change",
            changing.len(),
            points.len()
        );
        assert!(undone > 0 && (undone < points.len() || cfg!(debug_assertions)), "the change has its moment");
    }
}
