//! Opening: by several processes at once, of damaged files, and of files of other boots and namespaces.

use super::*;
use crate::store::StoreErrorKind;

fn names(scene: &Scene) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(&scene.path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !["fence", "open.lock"].contains(&&**name));
    names.sort();
    names
}

#[test]
fn of_many_that_open_at_once_all_use_one_file() {
    for _ in 0..20 {
        let scene = Scene::new();
        let children: Vec<_> = (0..6usize)
            .map(|n| {
                let scene = &scene;
                in_child(move || {
                    let table = scene.open();
                    put(&table, &TestKey::at(n, n, "key"), &[n as u8; 10], patient()).unwrap();
                    0
                })
            })
            .collect();
        children.into_iter().for_each(|child| assert_eq!(wait_for(child), Ended::Exited(0)));
        let model = (0..6).map(|n| (TestKey::at(n, n, "key"), vec![n as u8; 10])).collect();
        assert_is(&scene.open(), &model);
        assert_eq!(names(&scene).len(), 1);
    }
}

#[test]
fn a_damaged_header_is_set_aside_by_who_is_alone() {
    let scene = Scene::new();
    let table = scene.open();
    let whole = fs::read(scene.file()).unwrap();
    for at in 0..size_of::<[u64; layout::DESCRIPTION]>() {
        let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
        use std::os::unix::fs::FileExt;
        file.write_all_at(&[whole[at] ^ 0x55], at as u64).unwrap();
        let error = scene.try_open().err().unwrap_or_else(|| panic!("byte {at}"));
        assert_eq!(error.kind, StoreErrorKind::Rejected, "byte {at}: {error}");
        assert!(error.message.contains("other processes have it open"), "{error}");
        file.write_all_at(&whole[at..at + 1], at as u64).unwrap();
    }
    OpenOptions::new().write(true).open(scene.file()).unwrap().write_all(b"damage").unwrap();
    drop(table);
    put(&scene.open(), &TestKey::at(0, 0, "key"), b"x", hasty()).unwrap();
    let names = names(&scene);
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names[1].contains(".damaged-"), "{names:?}");
}

#[test]
fn other_boots_and_namespaces() {
    let scene = Scene::new();
    let table = scene.open();
    let machine = scene.machine();
    let key = TestKey::at(0, 0, "key");
    put(&table, &key, b"x", hasty()).unwrap();

    let elsewhere = Machine { pid_namespace: 4_026_531_000, ..machine.clone() };
    let refused = scene.open_on(&elsewhere).err().unwrap();
    assert!(refused.message.contains("PID namespace"), "{refused}");
    let other_clock = Machine { time_namespace: 4_026_531_001, ..machine.clone() };
    assert!(scene.open_on(&other_clock).err().unwrap().message.contains("time namespace"));

    // If no process uses it, it is taken over into the other namespace.
    drop(table);
    let moved = scene.open_on(&elsewhere).unwrap();
    assert_eq!(get(&moved, &key, hasty()).unwrap().unwrap(), b"x");
    drop(moved);
    assert_eq!(get(&scene.open(), &key, hasty()).unwrap().unwrap(), b"x");

    // The file of another boot that is in use, or may be: refused.
    let next = Machine { boot_id: "11111111-2222-3333-4444-555555555555".into(), ..machine };
    let refused = scene.open_on(&next).err().unwrap();
    assert!(refused.kind == StoreErrorKind::BadConfig && refused.message.contains("boot id"), "{refused}");
    assert_eq!(names(&scene).len(), 1);
}

#[test]
fn a_retired_file_is_left_by_all_and_made_anew() {
    let scene = Scene::new();
    let (one, other) = (scene.open(), scene.open());
    let key = TestKey::at(0, 0, "key");
    put(&one, &key, b"x", hasty()).unwrap();
    one.retire();
    assert!(matches!(get(&other, &key, hasty()), Err(Fault::Gone)));
    drop((one, other));
    assert_eq!(get(&scene.open(), &key, hasty()).unwrap(), None);
}

#[test]
fn files_of_former_versions_are_removed_only_when_nobody_has_them_open() {
    let scene = Scene::new();
    let former = scene.path.join(format!("control-{}", scene.machine().boot_id));
    let mut file = File::create(&former).unwrap();
    file.write_all(b"nblock\0C and so on").unwrap();
    file.lock_shared().unwrap();
    let refused = || {
        let error = scene.try_open().err().unwrap();
        assert!(error.message.contains("earlier version") && error.kind == StoreErrorKind::BadConfig, "{error}");
    };
    refused();
    // Unlocked explicitly: a child that another test forked meanwhile would keep the lock.
    file.unlock().unwrap();
    drop(file);
    scene.open();
    assert!(!former.exists());
    // A program with the former version that is started later, while the store of this version exists.
    let mut file = File::create(&former).unwrap();
    file.write_all(b"nblock\0C and so on").unwrap();
    file.lock_shared().unwrap();
    refused();
    // A file of another program must not be removed.
    file.unlock().unwrap();
    drop(file);
    fs::write(&former, "another program's").unwrap();
    fs::remove_file(scene.file()).unwrap();
    scene.open();
    assert!(former.exists());
}

#[test]
fn mutexes_of_a_machine_that_lost_all_its_processes_are_free() {
    let scene = Scene::new();
    let table = scene.open();
    let key = TestKey::at(0, 0, "key");
    put(&table, &key, b"x", hasty()).unwrap();
    // As if all processes had been killed, and the kernel had not marked the mutexes.
    table.file.top().shards[0].0.mutex.store(1);
    table.file.top().central.0.mutex.store(1);
    let busy = get(&table, &key, hasty()).unwrap_err().into_error();
    assert!(busy.message.contains("process 1 "), "{busy}");
    drop(table);
    let table = scene.open();
    assert_eq!(get(&table, &key, hasty()).unwrap().unwrap(), b"x");
    assert!(fence(&table, &key) > 0);
}
