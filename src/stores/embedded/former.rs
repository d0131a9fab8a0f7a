//! Files of the previous format: two for each boot, `control-BOOT` and `data-BOOT`, the second an LMDB database.
//!
//! They are recognised by their names and by their contents, so that no other file is removed.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::directory::boot_in;
use super::fence;

const CONTROL: &str = "control-";
const DATA: &str = "data-";

/// The first bytes of a control file.
const CONTROL_MAGIC: [u8; 8] = *b"nblock\0C";

/// Offsets in a data file: LMDB's magic number (mdb.c: MDB_MAGIC), and the fence ceiling.
const LMDB_MAGIC: [u8; 4] = 0xBEEF_C0DE_u32.to_ne_bytes();
const LMDB_MAGIC_AT: u64 = 16;
const NOTE_AT: u64 = 2048;
const NOTE_LENGTH: usize = 64;

/// The file that programs with the previous format keep locked while they run.
pub fn name_of(boot_id: &str) -> String {
    format!("{CONTROL}{boot_id}")
}

/// Whether this is the name of such a file.
pub fn has_name(name: &str) -> bool {
    let parts = boot_in(name, CONTROL).or_else(|| boot_in(name, DATA));
    parts.is_some_and(|(_, after)| after.is_empty() || after == ".new")
}

/// Whether the contents of an open file are what its name says.
pub fn is_one(name: &str, file: &File) -> bool {
    if name.starts_with(CONTROL) {
        return has(file, 0, CONTROL_MAGIC);
    }
    let mut note = [0; NOTE_LENGTH];
    has(file, LMDB_MAGIC_AT, LMDB_MAGIC)
        && file.read_exact_at(&mut note, NOTE_AT).is_ok()
        && fence::ceiling_in(&note).is_some()
}

fn has<const LENGTH: usize>(file: &File, at: u64, expected: [u8; LENGTH]) -> bool {
    let mut found = [0; LENGTH];
    file.read_exact_at(&mut found, at).is_ok() && found == expected
}
