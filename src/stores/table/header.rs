//! What a file says of itself: what it is, and on which boot of which machine it means something.

use std::os::unix::fs::MetadataExt;

use super::backing::failed;
use super::checked::{self, Link, Sum};
use super::layout::{self, DESCRIPTION, FORMAT, MAGIC, Top};
use super::word::Word64;
use crate::store::StoreError;
use crate::sys::random;

/// The machine, its boot and its namespaces, as this process sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub boot_id: String,
    /// Mutexes name their owner by its number in a PID namespace.
    pub pid_namespace: u64,
    /// `CLOCK_BOOTTIME` differs between time namespaces. 0 on kernels without them.
    pub time_namespace: u64,
    pub host: String,
}

impl Machine {
    pub fn of_this_process() -> Result<Machine, StoreError> {
        let needed = |path: &str, error: &std::io::Error| {
            failed(&format!("{path} could not be read, which the embedded store needs"), error)
        };
        let read = |path: &str| {
            std::fs::read_to_string(path).map(|text| text.trim().to_string()).map_err(|error| needed(path, &error))
        };
        let namespace = |path: &str| std::fs::metadata(path).map(|found| found.ino());
        let pid = "/proc/self/ns/pid";
        Ok(Machine {
            boot_id: read("/proc/sys/kernel/random/boot_id")?,
            pid_namespace: namespace(pid).map_err(|error| needed(pid, &error))?,
            time_namespace: namespace("/proc/self/ns/time").unwrap_or(0),
            host: read("/proc/sys/kernel/hostname")?,
        })
    }
}

/// Words of the description: magic, format, sizes, time namespace, store id; boot id, host; checksum.
const FIXED: usize = 6;
const BOOT_ID: std::ops::Range<usize> = FIXED..FIXED + 8;
const HOST: std::ops::Range<usize> = BOOT_ID.end..BOOT_ID.end + 32;
const CHECK: usize = DESCRIPTION - 1;
const _: () = assert!(HOST.end <= CHECK);

/// A private copy of a file's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Drawn when the file was made.
    pub store_id: u64,
    pub host: String,
    pub boot_id: String,
}

/// Why a file that is there cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It is not what this version of the library writes.
    Damaged(String),
    /// Its leases are counted by the clock of another time namespace.
    OtherClock(u64),
}

/// All that the sizes of the format depend on, in one number.
const SIZES: u64 = layout::CHUNKS_AT << 32 | layout::CHUNK_BYTES << 8 | layout::CELLS as u64;

/// Writes an empty table. Nobody else has seen the file yet.
pub fn write(top: &Top, machine: &Machine, allocated: u32) {
    let mut words = [0u64; DESCRIPTION];
    words[..FIXED].copy_from_slice(&[
        MAGIC,
        FORMAT,
        SIZES,
        machine.time_namespace,
        u64::from_ne_bytes(random::random()),
        machine.host.len() as u64,
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
    top.central.0.next.store(none);
    top.central.0.end.store(none);
    for shard in &top.shards {
        shard.0.free.store(Link::NONE.seal());
        shard.0.adopted.store(checked::seal32(0));
        shard.0.next.store(none);
        shard.0.end.store(none);
    }
    for slot in top.slots.iter().flatten() {
        slot.first.store(Link::NONE.seal());
    }
    top.state.0.life.store(layout::IN_USE);
}

/// Reads the description, and says whether it is one, and for here.
pub fn read(top: &Top, machine: &Machine, name: &str) -> Result<Description, Unfit> {
    let words: [u64; DESCRIPTION] = std::array::from_fn(|at| Word64::load(&top.description.0[at]));
    let damaged = |what: String| Err(Unfit::Damaged(what));
    if words[0] != MAGIC || words[CHECK] != check(&words) {
        return damaged(format!("the header of {name} is damaged"));
    }
    if words[1] != FORMAT || words[2] != SIZES {
        return damaged(format!("{name} has format {} ({:x}), not {FORMAT} ({SIZES:x})", words[1], words[2]));
    }
    let (boot_id, host) = (text(&words[BOOT_ID]), text(&words[HOST]));
    if boot_id != machine.boot_id {
        return damaged(format!("{name} was made for another boot of this machine, or on another machine"));
    }
    if words[3] != machine.time_namespace {
        return Err(Unfit::OtherClock(words[3]));
    }
    Ok(Description { store_id: words[4], host, boot_id })
}

fn check(words: &[u64; DESCRIPTION]) -> u64 {
    let mut sum = Sum::new(FORMAT);
    words[..CHECK].iter().for_each(|&word| sum.add(word));
    sum.finish()
}

/// What does not fit is cut off.
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
