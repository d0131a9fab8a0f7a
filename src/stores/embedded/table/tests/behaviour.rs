//! What the table does while no process is killed.

use super::*;

#[test]
fn keeps_replaces_and_removes() {
    let scene = Scene::new();
    let table = scene.open();
    let mut model = Model::new();
    let mut dice = Dice(1);
    // Few slots, so that chains are long.
    let keys: Vec<_> = (0..40).map(|n| TestKey::at(n % 3, n % 2, &format!("key {n}"))).collect();
    for round in 0..4000 {
        let key = &keys[dice.below(keys.len())];
        assert_eq!(get(&table, key, hasty()).unwrap().as_ref(), model.get(key), "round {round}");
        if dice.below(3) == 0 {
            assert_eq!(delete(&table, key, hasty()).unwrap(), model.remove(key).is_some());
        } else {
            let length = [0, 1, 100, 192, 200, 440, 3000][dice.below(7)];
            let payload = dice.bytes(length);
            put(&table, key, &payload, hasty()).unwrap();
            model.insert(key.clone(), payload);
        }
    }
    assert_is(&table, &model);
    // Another opener sees the same.
    assert_is(&scene.open(), &model);
}

#[test]
fn all_lengths_of_keys_and_payloads() {
    let scene = Scene::new();
    let table = scene.open();
    let mut model = Model::new();
    let lengths = (1..20).chain(190..210).chain(430..460).chain([1 << 20]);
    for (n, length) in lengths.enumerate() {
        let payload = Dice(n as u64).bytes(if n % 2 == 0 { length } else { 7 });
        let key = TestKey::at(n % SHARDS, n, &"k".repeat(length));
        put(&table, &key, &payload, hasty()).unwrap();
        model.insert(key, payload);
    }
    assert_is(&table, &model);
    let key = TestKey::at(0, 0, "too long");
    let error = put(&table, &key, &vec![0; layout::MAX_PAYLOAD + 1], hasty()).unwrap_err().into_error();
    assert!(error.message.contains("must have at most 4194304"), "{error}");
    for key in model.keys() {
        assert!(delete(&table, key, hasty()).unwrap());
    }
    assert_is(&table, &Model::new());
}

#[test]
fn another_key_of_the_same_hash_is_an_error() {
    let scene = Scene::new();
    let table = scene.open();
    let key = TestKey::at(1, 2, "one");
    let twin = TestKey { bytes: b"two".to_vec(), hash: key.hash };
    put(&table, &key, b"x", hasty()).unwrap();
    let error = get(&table, &twin, hasty()).unwrap_err().into_error();
    assert!(error.message.contains("same SHA-1"), "{error}");
}

#[test]
fn grows_while_others_use_it() {
    let scene = Scene::new();
    let (one, other) = (scene.open(), scene.open());
    let mut model = Model::new();
    for n in 0..6000usize {
        let key = TestKey::at(n % SHARDS, n / SHARDS % 1024, &format!("{n:032}"));
        let (writes, reads) = if n % 2 == 0 { (&one, &other) } else { (&other, &one) };
        let payload = vec![n as u8; 150];
        put(writes, &key, &payload, hasty()).unwrap();
        assert_eq!(get(reads, &key, hasty()).unwrap().as_ref(), Some(&payload));
        model.insert(key, payload);
    }
    assert_is(&one, &model);
    let length = fs::metadata(scene.file()).unwrap().len();
    assert!(length < 6000 * 1024, "{length} bytes");
}

#[test]
fn a_hundred_thousand_records_take_a_kilobyte_each_at_most() {
    let scene = Scene::new();
    let table = scene.open();
    const RECORDS: usize = 100_000;
    let mut dice = Dice(3);
    for n in 0..RECORDS {
        let mut key = TestKey::at(0, 0, &format!("{n:032}"));
        key.hash[..8].copy_from_slice(&dice.next().to_le_bytes());
        put(&table, &key, &[1; 150], hasty()).unwrap();
    }
    assert_eq!(table.census(&mut patient()).unwrap().records, RECORDS);
    let length = fs::metadata(scene.file()).unwrap().len();
    assert!(length < (RECORDS * 1024) as u64, "{} bytes a record", length / RECORDS as u64);
}

#[test]
fn fences_grow_for_every_key_in_every_opener() {
    let scene = Scene::new();
    let tables = [scene.open(), scene.open()];
    let keys: Vec<_> = (0..3).map(|n| TestKey::at(n, 5, "key")).collect();
    let mut last = [0; 3];
    for n in 0..15_000 {
        let key = n % 3;
        let fence = fence(&tables[n % 2], &keys[key]);
        assert!(fence > last[key], "{fence} after {}", last[key]);
        last[key] = fence;
    }
    let ceiling = tables[0].fence_ceiling();
    assert!(last.iter().all(|&fence| fence < ceiling));
    // Also after the file was created again.
    drop(tables);
    fs::remove_file(scene.file()).unwrap();
    assert!(fence(&scene.open(), &keys[0]) >= ceiling);
}

#[test]
fn a_listing_holds_nobody_up_and_lists_once_what_stays() {
    let scene = Scene::new();
    let table = scene.open();
    let stays: Vec<_> = (0..500).map(|n| TestKey::at(n % SHARDS, n * 7 % 1024, &format!("stays {n}"))).collect();
    for key in &stays {
        put(&table, key, b"here", hasty()).unwrap();
    }
    std::thread::scope(|scope| {
        let listing = scope.spawn(|| (0..20).map(|_| listed(&table).unwrap().0).collect::<Vec<_>>());
        let mut n = 0;
        while !listing.is_finished() {
            n += 1;
            let key = TestKey::at(n % SHARDS, n % 1024, &format!("comes and goes {n}"));
            put(&table, &key, b"for a while", patient()).unwrap();
            delete(&table, &key, patient()).unwrap();
        }
        for listed in listing.join().unwrap() {
            assert!(stays.iter().all(|key| listed.contains_key(key)));
        }
    });
}

#[test]
fn many_threads_on_one_key_lose_no_change() {
    const THREADS: u64 = 4;
    const TURNS: u64 = 5000;
    let scene = Scene::new();
    let tables = [scene.open(), scene.open()];
    let key = TestKey::at(9, 9, "counter");
    put(&tables[0], &key, &0u64.to_le_bytes(), hasty()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (table, key) = (&tables[thread as usize % 2], &key);
            scope.spawn(move || {
                let mut buffer = Buffer::new();
                for _ in 0..TURNS {
                    let done = table.with(key.as_ref(), &mut patient(), |entry| {
                        let now = u64::from_le_bytes(entry.get(&mut buffer)?.unwrap().try_into().unwrap());
                        entry.put(&(now + 1).to_le_bytes())
                    });
                    done.unwrap();
                }
            });
        }
    });
    assert_eq!(get(&tables[0], &key, hasty()).unwrap().unwrap(), (THREADS * TURNS).to_le_bytes());
}

#[test]
fn a_full_disk_is_an_error_that_changes_nothing() {
    let scene = Scene::new();
    let child = in_child(|| {
        let table = scene.open();
        // To the code that allocates space, this looks like a full disk.
        let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
        // SAFETY: a limit of this child only.
        unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) };
        let mut model = Model::new();
        let error = (0..)
            .find_map(|n| {
                let key = TestKey::at(n % SHARDS, n / SHARDS % 1024, &format!("key {n}"));
                // Most take one cell, some several.
                let payload = vec![5; if n % 5 == 0 { 700 } else { 150 }];
                match put(&table, &key, &payload, hasty()) {
                    Ok(()) => model.insert(key, payload).and(None),
                    Err(fault) => Some(fault.into_error()),
                }
            })
            .unwrap();
        assert_eq!(error.kind, crate::store::StoreErrorKind::Resources, "{error}");
        assert_is(&table, &model);
        // Every record can still be replaced, repeatedly, by one that is no larger.
        for round in 0..3 {
            for (key, payload) in &mut model {
                *payload = vec![round; payload.len()];
                put(&table, key, payload, hasty()).unwrap();
            }
        }
        assert_is(&table, &model);
        0
    });
    assert_eq!(wait_for(child), Ended::Exited(0));
}

#[test]
fn a_closed_descriptor_is_noticed_before_a_foreign_file_is_made_larger() {
    use std::os::fd::AsRawFd;
    let scene = Scene::new();
    let child = in_child(|| {
        let table = scene.open();
        let path = scene.file();
        let ours = fs::read_dir("/proc/self/fd").unwrap().map(Result::unwrap).find_map(|entry| {
            let leads = fs::read_link(entry.path()).ok()? == path;
            leads.then(|| entry.file_name().to_string_lossy().parse::<i32>().unwrap())
        });
        let foreign = File::create(scene.path.join("foreign")).unwrap();
        // SAFETY: unsound on purpose: this is what the test is about.
        unsafe { libc::dup2(foreign.as_raw_fd(), ours.unwrap()) };
        for n in 0..3000 {
            let key = TestKey::at(n % SHARDS, n / SHARDS, &format!("key {n}"));
            put(&table, &key, &[5; 150], hasty()).unwrap();
        }
        assert_eq!(foreign.metadata().unwrap().len(), 0);
        drop(table);
        0
    });
    assert_eq!(wait_for(child), Ended::Exited(0));
}
