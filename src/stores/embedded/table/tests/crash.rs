//! A process is killed, or stopped, after each store to shared memory, in every operation.
//!
//! A forked child opens the table, runs one operation, and is sent a signal after its store number *k*. This is
//! repeated for *k* = 1, 2, ... until the operation ends before store *k*. Each time the table is checked: it is as
//! before the operation or as after it, no cell is lost, and it can still be used.

use super::*;
use crate::stores::embedded::table::word::hook;

/// The shard that all operations use: checking all 64 each time would take minutes.
const HERE: Range<usize> = 3..4;

fn here(table: &Table) -> Model {
    listed_in(table, HERE).unwrap().0
}

/// What is done to a new table: first to prepare it, and then by the child.
struct Operation {
    name: &'static str,
    prepare: fn(&Table),
    run: fn(&Table),
    /// The operation begins with a shard whose owner died.
    dead_owner: bool,
    /// The distance between tried stores after the first 200: most of them fill cells to which no link leads.
    stride: u64,
}

impl Operation {
    fn after(&self, point: u64) -> u64 {
        if point < 200 { point + 1 } else { point + self.stride }
    }
}

fn key(n: usize) -> TestKey {
    // All in one slot: operations differ in what they do to a chain.
    TestKey::at(3, 17, &format!("key {n}"))
}

fn fill(n: usize, length: usize) -> Vec<u8> {
    vec![b'a' + n as u8; length]
}

fn put_now(table: &Table, n: usize, length: usize) {
    put(table, &key(n), &fill(n, length), patient()).unwrap();
}

fn chain_of_three(table: &Table) {
    (0..3).for_each(|n| put_now(table, n, 100));
}

fn long_between(table: &Table) {
    put_now(table, 0, 100);
    put_now(table, 1, 900);
    put_now(table, 2, 100);
}

fn delete_now(table: &Table, n: usize) {
    assert!(delete(table, &key(n), patient()).unwrap());
}

/// Uses up all free cells of the shard, except the one that is kept free.
fn use_up(table: &Table) {
    let payload = vec![7; 192 - 16];
    for n in 0..layout::USABLE_CELLS as usize - 1 {
        put(table, &TestKey::at(3, n, &format!("other {n:09}")), &payload, patient()).unwrap();
    }
}

/// Gives the shard a chunk that it has not adopted yet, as if the process that needed it had died before.
fn unadopted(table: &Table) {
    put_now(table, 0, 100);
    use_up_rest(table);
    let known = table.file.chunks().unwrap();
    table.grow(3, 1, known, &mut patient()).unwrap();
}

fn use_up_rest(table: &Table) {
    let payload = vec![7; 100];
    let before = table.file.chunks().unwrap();
    for n in 0..layout::USABLE_CELLS as usize - 2 {
        put(table, &TestKey::at(3, n, &format!("other {n}")), &payload, patient()).unwrap();
    }
    assert_eq!(table.file.chunks().unwrap(), before, "the shard has used what it had, and no more");
}

fn with_waiter(table: &Table) {
    chain_of_three(table);
    table.file.announce(&key(1).hash, Sleeper::Thread);
    table.file.announce(&key(1).hash, Sleeper::Listener);
}

fn change_and_wake(table: &Table) {
    let done = table.with(key(1).as_ref(), &mut patient(), |entry| {
        entry.delete()?;
        entry.wake();
        Ok(())
    });
    done.unwrap();
}

fn a_whole_grant(table: &Table) {
    let mut buffer = Buffer::new();
    let done = table.with(key(1).as_ref(), &mut patient(), |entry| {
        entry.get(&mut buffer)?;
        let fence = entry.next_fence()?;
        assert!(fence > 0);
        entry.put(&fill(1, 120))?;
        entry.wake();
        Ok(())
    });
    done.unwrap();
}

fn a_fence(table: &Table) {
    assert!(fence(table, &key(0)) > 0);
}

fn announce(table: &Table) {
    table.file.announce(&key(1).hash, Sleeper::Thread);
}

const fn operation(name: &'static str, prepare: fn(&Table), run: fn(&Table)) -> Operation {
    Operation { name, prepare, run, dead_owner: false, stride: 1 }
}

const fn repair(name: &'static str, prepare: fn(&Table), run: fn(&Table)) -> Operation {
    Operation { name, prepare, run, dead_owner: true, stride: 1 }
}

const OPERATIONS: &[Operation] = &[
    operation("put, the first of a shard", |_| {}, |table| put_now(table, 0, 100)),
    operation("put, in a chain", chain_of_three, |table| put_now(table, 5, 100)),
    operation("put, of several cells", chain_of_three, |table| put_now(table, 5, 900)),
    operation("replace the first", chain_of_three, |table| put_now(table, 2, 101)),
    operation("replace the middle", chain_of_three, |table| put_now(table, 1, 101)),
    operation("replace the last", chain_of_three, |table| put_now(table, 0, 101)),
    operation("replace by several cells", chain_of_three, |table| put_now(table, 1, 900)),
    operation("replace several cells", long_between, |table| put_now(table, 1, 10)),
    operation("delete the first", chain_of_three, |table| delete_now(table, 2)),
    operation("delete the middle", chain_of_three, |table| delete_now(table, 1)),
    operation("delete the last", chain_of_three, |table| delete_now(table, 0)),
    operation("delete several cells", long_between, |table| delete_now(table, 1)),
    operation("growth", use_up, |table| put_now(table, 0, 100)),
    Operation {
        name: "growth, by two chunks",
        prepare: chain_of_three,
        run: |table| put_now(table, 5, 16_000),
        dead_owner: false,
        stride: 23,
    },
    operation("adoption", unadopted, |table| put_now(table, 1, 100)),
    operation("the first block of fences", |_| {}, a_fence),
    operation("the next fence", a_fence, a_fence),
    operation("change and wake", with_waiter, change_and_wake),
    operation("a whole grant", with_waiter, a_whole_grant),
    operation("wake everybody", with_waiter, |table| table.file.wake_everybody()),
    operation("announce", chain_of_three, announce),
    operation("list", chain_of_three, |table| drop(here(table))),
    repair("repair, then get", chain_of_three, |table| drop(get(table, &key(1), patient()).unwrap())),
    repair("repair, then put", long_between, |table| put_now(table, 5, 100)),
    repair("repair, with waiters", with_waiter, |table| drop(get(table, &key(1), patient()).unwrap())),
];

/// Runs an operation in a child that gets the signal after its store number `after`.
fn run_armed(scene: &Scene, run: fn(&Table), after: u64, signal: i32) -> libc::pid_t {
    in_child(|| {
        let table = scene.open();
        hook::arm(after, signal);
        run(&table);
        hook::arm(u64::MAX, signal);
        0
    })
}

/// Leaves the shard with an owner that died during a change.
fn die_inside(scene: &Scene) {
    let child = run_armed(scene, |table| put_now(table, 7, 300), 9, libc::SIGKILL);
    assert_eq!(wait_for(child), Ended::Killed(libc::SIGKILL));
}

fn prepared(operation: &Operation) -> (Scene, Table) {
    let scene = Scene::new();
    let table = scene.open();
    (operation.prepare)(&table);
    if operation.dead_owner {
        die_inside(&scene);
    }
    (scene, table)
}

/// The records before and after an operation that is not killed.
fn before_and_after(operation: &Operation) -> (Model, Model) {
    let (scene, table) = prepared(operation);
    let before = here(&table);
    let child = run_armed(&scene, operation.run, u64::MAX, libc::SIGKILL);
    assert_eq!(wait_for(child), Ended::Exited(0), "{}", operation.name);
    let after = here(&table);
    assert_is_in(&table, HERE, &after);
    (before, after)
}

/// Checks that the table is as before the operation or as after it, is undamaged, and can still be used.
fn look_and_go_on(table: &Table, before: &Model, after: &Model, what: &str) -> Model {
    let found = here(table);
    assert!(found == *before || found == *after, "{what}: neither as before nor as after");
    assert_is_in(table, HERE, &found);
    let mut model = found.clone();
    for n in 10..14 {
        put_now(table, n, 500);
        model.insert(key(n), fill(n, 500));
    }
    assert_is_in(table, HERE, &model);
    (10..14).for_each(|n| delete_now(table, n));
    assert_is_in(table, HERE, &found);
    found
}

#[test]
fn killed_after_every_store() {
    for operation in OPERATIONS {
        let (before, after) = before_and_after(operation);
        let (mut point, mut points, mut undone) = (1, 0, 0);
        loop {
            let (scene, table) = prepared(operation);
            let before_fence = fence(&table, &TestKey::at(40, 0, "unconcerned"));
            let child = run_armed(&scene, operation.run, point, libc::SIGKILL);
            let what = format!("{}, killed after store {point}", operation.name);
            match wait_for(child) {
                Ended::Killed(libc::SIGKILL) => points += 1,
                ended => {
                    assert_eq!(ended, Ended::Exited(0), "{what}");
                    break;
                }
            }
            if operation.dead_owner {
                // Killed again during the repair, so that a repair is repaired.
                let again = run_armed(&scene, operation.run, point, libc::SIGKILL);
                let ended = wait_for(again);
                assert!(matches!(ended, Ended::Killed(libc::SIGKILL) | Ended::Exited(0)), "{what}: {ended:?}");
            }
            let found = look_and_go_on(&table, &before, &after, &what);
            undone += u64::from(found == before);
            assert!(fence(&table, &TestKey::at(40, 0, "unconcerned")) > before_fence);
            assert!(fence(&table, &key(0)) > 0);
            point = operation.after(point);
        }
        assert!(points > 0, "{}", operation.name);
        if before != after {
            // With a stride, the stores after the change may have been skipped.
            let done = operation.stride > 1 || undone < points;
            assert!(undone > 0 && done, "{}: the change has its moment", operation.name);
        }
        println!("{:<44} {points:>5} points, {undone:>5} of them before the change", operation.name);
    }
}

#[test]
fn a_fence_is_given_out_once_whenever_its_writer_is_killed() {
    // The child writes each fence that it gets to a file.
    let take: fn(&Table) = |table| {
        let path = std::path::Path::new(&table.file.shown()).with_file_name("given");
        for _ in 0..3 {
            let fence = fence(table, &key(0));
            let mut given = OpenOptions::new().create(true).append(true).open(&path).unwrap();
            writeln!(given, "{fence}").unwrap();
        }
    };
    let scene = Scene::new();
    let table = scene.open();
    let mut last = 0;
    for after in 1..400 {
        let child = run_armed(&scene, take, after % 40 + 1, libc::SIGKILL);
        wait_for(child);
        let given = fs::read_to_string(scene.path.join("given")).unwrap_or_default();
        let _ = fs::remove_file(scene.path.join("given"));
        for fence in given.lines().map(|line| line.parse::<u64>().unwrap()).chain([fence(&table, &key(0))]) {
            assert!(fence > last, "{fence} after {last}");
            last = fence;
        }
    }
}

#[test]
fn stopped_after_every_store() {
    for operation in OPERATIONS.iter().filter(|operation| !operation.dead_owner) {
        let (_, after) = before_and_after(operation);
        let (mut point, mut points, mut busy) = (1, 0, 0);
        loop {
            let (scene, table) = prepared(operation);
            let child = run_armed(&scene, operation.run, point, libc::SIGSTOP);
            match wait_for(child) {
                Ended::Stopped => points += 1,
                ended => {
                    assert_eq!(ended, Ended::Exited(0));
                    break;
                }
            }
            // Other shards can still be used.
            let elsewhere = TestKey::at(20, 0, "elsewhere");
            get(&table, &elsewhere, hasty()).unwrap();
            // This one can still be used too, or its error names the stopped process.
            match get(&table, &key(1), Patience::new(Duration::from_millis(2))) {
                Ok(_) => {}
                Err(fault) => {
                    busy += 1;
                    let error = fault.into_error();
                    assert_eq!(error.kind, crate::store::StoreErrorKind::Unreachable);
                    let process = format!("process {child} ");
                    assert!(error.message.contains("store busy") && error.message.contains(&process), "{error}");
                }
            }
            signal(child, libc::SIGCONT);
            assert_eq!(wait_for(child), Ended::Exited(0));
            assert_is_in(&table, HERE, &after);
            point = operation.after(point);
        }
        println!("{:<44} {points:>5} points, {busy:>5} of them with the mutex", operation.name);
    }
}

#[test]
fn a_file_half_made_is_not_found() {
    let points = (1..40).chain((1..).map(|n| n * 7919).take_while(|&n| n < 66_500));
    let mut killed = 0;
    for after in points {
        let scene = Scene::new();
        let child = in_child(|| {
            hook::arm(after, libc::SIGKILL);
            scene.open();
            hook::arm(u64::MAX, libc::SIGKILL);
            0
        });
        killed += u32::from(wait_for(child) == Ended::Killed(libc::SIGKILL));
        let table = scene.open();
        put_now(&table, 0, 100);
        assert_is_in(&table, HERE, &Model::from([(key(0), fill(0, 100))]));
        // The half-made file is removed by the next process that creates one.
        fs::remove_file(scene.file()).unwrap();
        drop(table);
        scene.open();
        let mut names =
            fs::read_dir(&scene.path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(names.all(|name| !name.contains(".new-")), "what was half made is removed");
    }
    assert!(killed > 40, "{killed}");
}
