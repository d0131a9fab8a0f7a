//! The description of a file: its format, and the boot and machine for which it is valid.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::super::machine::{self, Machine, Made};
use super::checked::{self, Link, Sum};
use super::layout::{self, DESCRIPTION, FORMAT, MAGIC, Top};
use super::word::Word64;
use crate::clock::Boottime;
use crate::sys::random;

/// Words of the description: magic, format, sizes, time namespace, store id, when the machine was started, when the file
/// was made, PID namespace in which it was made; boot id, host; checksum.
const FIXED: usize = 8;
const BOOT_ID: std::ops::Range<usize> = FIXED..FIXED + 5;
const HOST: std::ops::Range<usize> = BOOT_ID.end..BOOT_ID.end + 32;
const CHECK: usize = DESCRIPTION - 1;
const _: () = assert!(HOST.end <= CHECK);

/// A private copy of a file's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// A random number, chosen when the file was made.
    pub store_id: u64,
    pub host: String,
    pub boot_id: String,
}

/// Why an existing file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// It is not what this version of the library writes.
    Damaged(String),
    /// Its leases are measured on the clock of another time namespace.
    OtherClock(u64),
}

/// The sizes that the format depends on, in one number.
const SIZES: u64 = layout::CHUNKS_AT << 32 | layout::CHUNK_BYTES << 8 | layout::CELLS as u64;

/// Writes an empty table, whose fences are at or above `fence_floor`. No other process has opened the file yet.
pub fn write(top: &Top, machine: &Machine, allocated: u32, fence_floor: u64) {
    let mut words = [0u64; DESCRIPTION];
    words[..FIXED].copy_from_slice(&[
        MAGIC,
        FORMAT,
        SIZES,
        machine.time_namespace,
        u64::from_ne_bytes(random::random()),
        machine::start(),
        Boottime::now().as_nanos(),
        machine.pid_namespace,
    ]);
    put_text(&mut words[BOOT_ID], &machine.boot_id);
    put_text(&mut words[HOST], &machine.host);
    words[CHECK] = check(&words);
    for (word, value) in top.description.0.iter().zip(words) {
        word.fill(value);
    }
    let none = checked::seal64(0);
    top.state.0.pid_namespace.store(checked::seal64(machine.pid_namespace));
    top.state.0.chunks.store(checked::seal32(0));
    top.state.0.damage.store(layout::NO_DAMAGE);
    top.central.0.allocated.store(checked::seal32(allocated));
    top.central.0.next.store(checked::seal64(fence_floor));
    top.central.0.end.store(checked::seal64(fence_floor));
    for shard in &top.shards {
        shard.0.free.store(Link::NONE.seal());
        shard.0.adopted.store(checked::seal32(0));
        shard.0.largest.store(checked::seal32(0));
        shard.0.next.store(none);
        shard.0.end.store(none);
    }
    for slot in top.slots.iter().flatten() {
        slot.first.store(Link::NONE.seal());
    }
    top.state.0.life.store(layout::IN_USE);
}

/// Reads the description, and checks that the file can be used here.
pub fn read(top: &Top, machine: &Machine, name: &str) -> Result<Description, Mismatch> {
    let words: [u64; DESCRIPTION] = std::array::from_fn(|at| Word64::load(&top.description.0[at]));
    let damaged = |what: String| Err(Mismatch::Damaged(what));
    if words[0] != MAGIC {
        return damaged(format!("the header of {name} is damaged"));
    }
    // Checked before the checksum, which another format may compute differently.
    if words[1] != FORMAT || words[2] != SIZES {
        return damaged(format!(
            "{name} was made by another version of nblock (format {} {:x}; this version uses {FORMAT} {SIZES:x})",
            words[1], words[2]
        ));
    }
    if words[CHECK] != check(&words) {
        return damaged(format!("the header of {name} is damaged"));
    }
    let (boot_id, host) = (text(&words[BOOT_ID]), text(&words[HOST]));
    if boot_id != machine.boot_id {
        return damaged(format!("{name} was made for another boot of this machine, or on another machine"));
    }
    if words[3] != machine.time_namespace {
        return Err(Mismatch::OtherClock(words[3]));
    }
    Ok(Description { store_id: words[4], host, boot_id })
}

/// The first bytes of a table, which may be damaged after them.
pub struct Foreign {
    pub made: Option<Made>,
    /// Every fence that was given out in it is below this, as far as it can be read.
    pub fence_ceiling: u64,
}

impl Foreign {
    /// Reads a file that must not be mapped, because it is of another boot or half made.
    pub fn read(file: &File) -> Option<Foreign> {
        let mut bytes = [0; size_of::<[u64; DESCRIPTION]>()];
        file.read_exact_at(&mut bytes, 0).ok()?;
        let mut words = [0; DESCRIPTION];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        if words[0] != MAGIC {
            return None;
        }
        let whole = words[CHECK] == check(&words) && words[1] == FORMAT;
        let made = whole.then_some(Made { started_at: words[5], made_at: words[6], pid_namespace: words[7] });
        let mut ceiling = [0; 8];
        let ceiling = file.read_exact_at(&mut ceiling, layout::FENCE_CEILING_AT).map(|()| u64::from_ne_bytes(ceiling));
        let fence_ceiling = ceiling.ok().filter(|_| whole).and_then(checked::open64).unwrap_or(0);
        Some(Foreign { made, fence_ceiling })
    }
}

fn check(words: &[u64; DESCRIPTION]) -> u64 {
    let mut sum = Sum::new(FORMAT);
    sum.add_all(&words[..CHECK]);
    sum.finish()
}

/// A text that is too long is cut.
fn put_text(words: &mut [u64], text: &str) {
    for (word, bytes) in words.iter_mut().zip(text.as_bytes().chunks(8)) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(padded);
    }
}

fn text(words: &[u64]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
