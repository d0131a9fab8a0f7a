//! What must be so for any bytes in the embedded store's file: rows, and the header. What is changed at random fails the
//! header's checksum: so that is tried once more with a sum that is right.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use nblock::key::Key;
use nblock::protocol::{Holder, StoreTime};
use nblock::stores::embedded::fuzzing::checked::Sum;
use nblock::stores::embedded::fuzzing::header::{self, Foreign, Mismatch};
use nblock::stores::embedded::fuzzing::layout::{CHUNKS_AT, DESCRIPTION, FORMAT, MAGIC};
use nblock::stores::embedded::fuzzing::mapping::Mapping;
use nblock::stores::embedded::fuzzing::{Buffer, HostIdentity, Machine, Row};

const HOME: HostIdentity<'static> = HostIdentity { host: "here", boot_id: "now" };

/// Where a row says how many entries it has.
const ENTRIES: std::ops::Range<usize> = 64..68;

/// A table verifies what it keeps, so a row has no checksum of its own: any bytes must do.
pub fn row(bytes: &[u8]) {
    let Some(row) = Row::read(bytes) else { return };
    let key = Key::new(b"key").expect("a key");
    let record = row.record(key.clone(), HOME, StoreTime(1 << 50));
    assert_eq!((&record.key, record.fence), (&key, Some(row.fence())));
    let state = row.state();
    assert!(record.state == state);
    let entries = u32::from_ne_bytes(bytes[ENTRIES].try_into().unwrap()) as usize;
    if let Holder::Reentrant { count, entries: listed, .. } = &state.holder {
        assert!(*count > 0 && listed.len() == entries);
    }
    let mut written = Buffer::new();
    row.write_with_state(&state, &mut written);
    let again = Row::read(written.bytes()).expect("what is written can be read");
    assert!(again.state() == state && again.fence() == row.fence());
}

fn machine() -> Machine {
    Machine { boot_id: "now".into(), pid_namespace: 11, time_namespace: 12, host: "here".into() }
}

const BYTES: usize = size_of::<[u64; DESCRIPTION]>();

/// A table that nobody else has, mapped, and its header.
struct Whole {
    file: File,
    mapping: Mapping,
    header: [u8; BYTES],
}

const FENCE_FLOOR: u64 = 77;

impl Whole {
    fn new() -> Whole {
        // SAFETY: a name that ends with NUL; the descriptor is new, and owned by what is made of it.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"table".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(CHUNKS_AT).unwrap();
        let mapping = Mapping::new(&file).unwrap();
        header::write(mapping.top(), &machine(), 0, FENCE_FLOOR);
        let mut header = [0; BYTES];
        file.read_exact_at(&mut header, 0).unwrap();
        Whole { file, mapping, header }
    }

    /// With other bytes in the header's place, it is used or refused.
    fn with(&self, header: &[u8; BYTES]) {
        let words = words(header);
        let sealed = words[DESCRIPTION - 1] == sum(&words);
        self.file.write_all_at(header, 0).unwrap();
        match header::read(self.mapping.top(), &machine(), "table") {
            Ok(description) => {
                assert!(sealed && words[..3] == self::words(&self.header)[..3]);
                assert_eq!((description.boot_id.as_str(), words[3]), ("now", 12));
                assert_eq!(description.store_id, words[4]);
            }
            Err(Mismatch::Damaged(why)) => assert!(!why.is_empty() && header != &self.header),
            Err(Mismatch::OtherClock(namespace)) => assert!(sealed && namespace == words[3] && namespace != 12),
        }
        let foreign = Foreign::read(&self.file);
        assert_eq!(foreign.is_some(), words[0] == MAGIC);
        if let Some(foreign) = foreign {
            let whole = sealed && words[1] == FORMAT;
            assert_eq!((foreign.made.is_some(), foreign.fence_ceiling), (whole, if whole { FENCE_FLOOR } else { 0 }));
        }
    }
}

fn words(header: &[u8; BYTES]) -> [u64; DESCRIPTION] {
    let chunks = header.as_chunks::<8>().0;
    std::array::from_fn(|at| u64::from_ne_bytes(chunks[at]))
}

fn sum(words: &[u64; DESCRIPTION]) -> u64 {
    let mut sum = Sum::new(FORMAT);
    sum.add_all(&words[..DESCRIPTION - 1]);
    sum.finish()
}

/// The bytes stand in a header's place, over one that is whole.
pub fn header(bytes: &[u8]) {
    thread_local! {
        static WHOLE: Whole = Whole::new();
    }
    WHOLE.with(|whole| {
        let mut header = whole.header;
        let length = bytes.len().min(header.len());
        header[..length].copy_from_slice(&bytes[..length]);
        whole.with(&header);
        let sealed = sum(&words(&header)).to_ne_bytes();
        header[BYTES - 8..].copy_from_slice(&sealed);
        whole.with(&header);
    });
}
