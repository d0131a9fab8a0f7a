//! Bytes that change by themselves, and words written by a malicious process: they lead to errors, but never to a
//! crash, a wrong result, or an endless loop.

use std::os::unix::fs::FileExt;

use super::*;
use crate::stores::embedded::table::checked::{Link, seal32, seal64};
use crate::stores::embedded::table::layout::{CELLS, CHUNKS_AT, SLOTS, Slot};

/// A file with some records, and its original bytes.
struct Victim {
    scene: Scene,
    table: Table,
    file: File,
    model: Model,
    absent: Vec<TestKey>,
    bytes: Vec<u8>,
}

fn offset_of_slot(shard: usize, slot: usize) -> usize {
    std::mem::offset_of!(Top, slots) + (shard * SLOTS + slot) * size_of::<Slot>()
}

impl Victim {
    fn new() -> Victim {
        let scene = Scene::new();
        let table = scene.open();
        let mut model = Model::new();
        for n in 0..4 {
            model.insert(TestKey::at(3, 17, &format!("chain {n}")), vec![n as u8; 60]);
        }
        model.insert(TestKey::at(3, 18, "long"), vec![9; 700]);
        model.insert(TestKey::at(4, 18, "elsewhere"), vec![8; 60]);
        for (key, payload) in &model {
            put(&table, key, payload, hasty()).unwrap();
            // Written twice, so that there are also free cells that were used before.
            put(&table, key, payload, hasty()).unwrap();
            fence(&table, key);
        }
        let absent = vec![TestKey::at(3, 17, "absent"), TestKey::at(3, 19, "absent"), TestKey::at(4, 18, "absent")];
        let bytes = fs::read(scene.file()).unwrap();
        let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
        Victim { scene, table, file, model, absent, bytes }
    }

    /// Restores the original bytes. (The mapping is shared, so it shows the written bytes at once.)
    fn restore(&self) {
        // No link leads to chunks that were added meanwhile.
        self.file.write_all_at(&self.bytes, 0).unwrap();
    }

    /// Checks that no result is wrong. Returns how many look-ups failed.
    fn ask(&self) -> usize {
        let mut failed = 0;
        for (key, payload) in &self.model {
            match get(&self.table, key, hasty()) {
                Ok(found) => assert_eq!(found.as_ref(), Some(payload), "{:?}", key.bytes.escape_ascii()),
                Err(_) => failed += 1,
            }
        }
        for key in &self.absent {
            match get(&self.table, key, hasty()) {
                Ok(found) => assert_eq!(found, None),
                Err(_) => failed += 1,
            }
        }
        failed
    }

    /// Calls every operation. Each of them must return, with whatever result.
    fn do_everything(&self, brief: Duration) {
        let _ = listed_in(&self.table, 3..5);
        for key in self.model.keys().chain(&self.absent) {
            let _ = put(&self.table, key, &[1; 300], Patience::new(brief));
            let _ = delete(&self.table, key, Patience::new(brief));
            let _ = self.table.with(key.as_ref(), &mut Patience::new(brief), |entry| {
                entry.wake();
                entry.next_fence()
            });
        }
    }

    /// Removes the damage piece by piece, and checks that everything can be used afterwards.
    fn mend(&self) {
        for _ in 0..200 {
            let Ok((_, damaged)) = listed_in(&self.table, 3..5) else { return };
            if damaged.is_empty() {
                break;
            }
            for damaged in damaged {
                let _ = self.table.remove_damaged(damaged, &mut hasty());
            }
        }
        let (_, damaged) = listed_in(&self.table, 3..5).unwrap();
        assert!(damaged.is_empty(), "{damaged:?}");
        for key in self.model.keys().chain(&self.absent) {
            put(&self.table, key, b"again", hasty()).unwrap();
            assert_eq!(get(&self.table, key, hasty()).unwrap().unwrap(), b"again");
        }
        for shard in 3..5 {
            // Damage to a free cell is not noticed before the cell is used. A repair finds all free cells.
            self.table.lock(shard, &mut hasty()).unwrap().leave_for_repair();
            let census = self.table.lock(shard, &mut hasty()).unwrap().census().unwrap();
            assert_eq!((census.damaged, census.leaked), (0, 0), "{census:?}");
        }
    }
}

/// All bytes that matter here: the first lines of the top, two shards, some slots, and the chunks in use.
fn positions(victim: &Victim) -> Vec<usize> {
    let shards = std::mem::offset_of!(Top, shards);
    let chunks = victim.table.file.chunks().unwrap() as usize * layout::CHUNK_BYTES as usize;
    let slots = [(3, 17), (3, 18), (3, 19), (4, 18)].map(|(shard, slot)| offset_of_slot(shard, slot));
    let lines = (0..shards).chain(shards + 3 * 128..shards + 5 * 128);
    let slots = slots.into_iter().flat_map(|at| at..at + size_of::<Slot>());
    lines.chain(slots).chain(CHUNKS_AT as usize..CHUNKS_AT as usize + chunks).collect()
}

/// Whether this is a byte of a mutex. A damaged owner is only detected after a second, see `kills.rs`.
fn is_mutex(at: usize) -> bool {
    let shards = std::mem::offset_of!(Top, shards);
    let central = std::mem::offset_of!(Top, central);
    [central, shards + 3 * 128, shards + 4 * 128].iter().any(|&word| (word..word + 4).contains(&at))
}

#[test]
fn one_byte_that_changed_at_every_position() {
    let victim = Victim::new();
    let positions = positions(&victim);
    let mut noticed = 0;
    let mut dice = Dice(1);
    for &at in &positions {
        let change = 1 + dice.below(255) as u8;
        victim.file.write_all_at(&[victim.bytes[at] ^ change], at as u64).unwrap();
        noticed += usize::from(victim.ask() > 0);
        victim.file.write_all_at(&[victim.bytes[at]], at as u64).unwrap();
        // An operation may have repaired other bytes: restore them from time to time.
        if at % 64 == 0 {
            victim.restore();
        }
    }
    victim.restore();
    assert_eq!(victim.ask(), 0);
    println!("{} positions; look-ups failed at {noticed} of them, and none answered wrongly", positions.len());
    assert!(noticed > 500, "{noticed}");
}

#[test]
fn with_a_byte_changed_everything_can_be_done_and_mended() {
    let victim = Victim::new();
    let positions = positions(&victim);
    let mut dice = Dice(2);
    for &at in positions.iter().filter(|&&at| !is_mutex(at)).step_by(5) {
        let change = 1 + dice.below(255) as u8;
        victim.file.write_all_at(&[victim.bytes[at] ^ change], at as u64).unwrap();
        victim.do_everything(Duration::ZERO);
        let in_chunks = at >= CHUNKS_AT as usize;
        let in_slots = at >= offset_of_slot(0, 0) && !in_chunks;
        if in_chunks || in_slots {
            victim.mend();
        }
        victim.restore();
    }
    assert_eq!(victim.ask(), 0);
}

#[test]
fn circles_and_links_that_lead_elsewhere() {
    let victim = Victim::new();
    // The number of the cell of a key's record.
    let cell_of = |key: &TestKey| {
        let locked = victim.table.lock(layout::slot_of(&key.hash).0, &mut hasty()).unwrap();
        let mut walk = locked.walk(layout::slot_of(&key.hash).1);
        loop {
            match walk.step(&locked) {
                shard::Step::Record(at) if at.head.unwrap().hash == key.hash => return at.number,
                shard::Step::Record(_) => {}
                _ => panic!("not there"),
            }
        }
    };
    let chain: Vec<_> = victim.model.keys().filter(|key| key.bytes.starts_with(b"chain")).map(cell_of).collect();
    let long = cell_of(victim.model.keys().find(|key| key.bytes == b"long").unwrap());
    let foreign = cell_of(victim.model.keys().find(|key| key.bytes == b"elsewhere").unwrap());
    let next = |cell: u32| CHUNKS_AT + u64::from(cell) * 256;
    let slot = offset_of_slot(3, 17) as u64;
    let free = (std::mem::offset_of!(Top, shards) + 3 * 128 + std::mem::offset_of!(layout::Shard, free)) as u64;
    let adopted = free + 4;
    let largest = free + 8;
    let chunks = (std::mem::offset_of!(Top, state) + 8) as u64;
    let link = |cell: u32| Link(cell).seal();
    let lies: Vec<(u64, u32)> =
        [slot, next(chain[0]), next(chain[1]), next(chain[3]), next(long), free, next(long) + 8]
            .into_iter()
            .flat_map(|at| {
                [
                    chain[0],
                    chain[1],
                    chain[2],
                    long,
                    long + 1,
                    foreign,
                    0,
                    CELLS,
                    50 * CELLS + 1,
                    Link::NONE.0,
                    Link::NONE.0 - 1,
                ]
                .map(|cell| (at, link(cell)))
            })
            .chain([0, 1, 2, 17, 1 << 20].map(|number| (adopted, seal32(number))))
            .chain([0, 1, 17, 1 << 20].map(|number| (largest, seal32(number))))
            .chain([0, 1, 3, 15, 17, 1 << 20].map(|number| (chunks, seal32(number))))
            .collect();
    for (at, word) in lies {
        victim.file.write_all_at(&word.to_le_bytes(), at).unwrap();
        let started = Instant::now();
        let _ = listed_in(&victim.table, 3..5);
        for key in victim.model.keys().chain(&victim.absent) {
            let _ = get(&victim.table, key, hasty());
        }
        victim.do_everything(Duration::ZERO);
        if at != chunks {
            victim.mend();
        }
        assert!(started.elapsed() < LONG, "{at}: {word:x}");
        victim.restore();
    }
    // Even if the fences of a shard are damaged, it never gives out one that is not above its last one.
    let fences = (std::mem::offset_of!(Top, shards) + 3 * 128 + std::mem::offset_of!(layout::Shard, next)) as u64;
    let key = victim.model.keys().next().unwrap();
    let before = fence(&victim.table, key);
    victim.file.write_all_at(&[0; 8], fences).unwrap();
    assert!(fence(&victim.table, key) > before);
    victim.file.write_all_at(&seal64(u64::MAX >> 11).to_le_bytes(), fences).unwrap();
    assert!(fence(&victim.table, key) > before);
    assert_eq!(victim.ask(), 0);
}

#[test]
fn words_at_random() {
    let seed = std::env::var("NBLOCK_PROOF_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let rounds = std::env::var("NBLOCK_PROOF_LIES").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1500);
    let victim = Victim::new();
    let positions = positions(&victim);
    let mut dice = Dice(seed);
    println!("{rounds} rounds, seed {seed}");
    for _ in 0..rounds {
        for _ in 0..1 + dice.below(6) {
            let at = positions[dice.below(positions.len())] & !3;
            if is_mutex(at) {
                continue;
            }
            // Half of the words look valid: a sealed link, or another word of the file.
            let word = match dice.below(4) {
                0 => dice.next() as u32,
                1 => Link(dice.below(16 * CELLS as usize) as u32).seal(),
                2 => u32::from_le_bytes(
                    victim.bytes[positions[dice.below(positions.len())] & !3..][..4].try_into().unwrap(),
                ),
                _ => 0,
            };
            victim.file.write_all_at(&word.to_le_bytes(), at as u64).unwrap();
        }
        victim.do_everything(Duration::ZERO);
        let _ = victim.table.census(&mut hasty());
        if let Ok((_, damaged)) = listed_in(&victim.table, 3..5) {
            for damaged in damaged {
                let _ = victim.table.remove_damaged(damaged, &mut hasty());
            }
        }
        victim.restore();
    }
    assert_eq!(victim.ask(), 0);
}

#[test]
fn a_damaged_record_stays_until_it_is_broken_also_for_who_is_alone() {
    let victim = Victim::new();
    let body = positions(&victim).into_iter().find(|&at| victim.bytes[at..].starts_with(&[9; 40])).unwrap();
    victim.file.write_all_at(&[0], body as u64).unwrap();
    assert!(victim.ask() > 0);
    let Victim { scene, table, file, mut model, .. } = victim;
    drop((table, file));
    let broken = TestKey::at(3, 18, "long");
    model.remove(&broken);
    for _ in 0..2 {
        let table = scene.open();
        assert!(matches!(get(&table, &broken, hasty()), Err(Fault::Damaged(_))));
        let (found, damaged) = listed_in(&table, 3..5).unwrap();
        assert!(found == model && damaged.len() == 1, "{damaged:?}");
    }
    let table = scene.open();
    let (_, damaged) = listed_in(&table, 3..5).unwrap();
    assert!(table.remove_damaged(damaged[0], &mut hasty()).unwrap());
    assert_is_in(&table, 3..5, &model);
    drop(table);
    assert_is_in(&scene.open(), 3..5, &model);
}

#[test]
fn a_table_that_says_it_has_more_than_there_is_is_set_aside_by_who_is_alone() {
    let Victim { scene, table, file, absent, .. } = Victim::new();
    drop(table);
    let chunks = std::mem::offset_of!(Top, state) + std::mem::offset_of!(layout::State, chunks);
    file.write_all_at(&seal32(1 << 16).to_le_bytes(), chunks as u64).unwrap();
    drop(file);
    assert_eq!(get(&scene.open(), &absent[0], hasty()).unwrap(), None);
    let aside = fs::read_dir(&scene.path)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains(".damaged-"));
    assert_eq!(aside.count(), 1);
}
