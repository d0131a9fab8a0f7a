//! What must be so for any bytes in the embedded store's files: rows of the data file, and the control file's
//! header. What is changed at random fails its checksum: so everything is tried once more with a sum that is right.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use nblock::key::{Key, KeyHash};
use nblock::protocol::{Holder, StoreTime};
use nblock::stores::embedded::foreign::{Control, Home, Row, Surroundings, Unfit};

const HOME: Home<'static> = Home { host: "here", boot_id: "now" };

/// Where the parts of a row stand, in its form 2: its sum over all that follows; the lengths of four texts; how
/// many entries there are; the end of the fixed part. Then the entries, the texts, the key.
mod row_form {
    pub const SUM: usize = 4;
    pub const TEXTS: std::ops::Range<usize> = 6..10;
    pub const ENTRIES: std::ops::Range<usize> = 68..72;
    pub const FIXED: usize = 72;
    pub const ENTRY: usize = 24;
}

pub fn row(bytes: &[u8]) {
    whole_or_refused(bytes);
    if bytes.len() > row_form::SUM {
        let mut sealed = bytes.to_vec();
        let sum = crc32fast::hash(&sealed[row_form::SUM..]);
        sealed[..row_form::SUM].copy_from_slice(&sum.to_ne_bytes());
        whole_or_refused(&sealed);
    }
}

fn whole_or_refused(bytes: &[u8]) {
    let now = StoreTime(1 << 50);
    let Some(row) = Row::read(bytes) else { return };
    assert_eq!(bytes[..row_form::SUM], crc32fast::hash(&bytes[row_form::SUM..]).to_ne_bytes());
    assert!(row.record(KeyHash([0; 20]), HOME, now).is_err(), "under another key it is no record");
    let state = row.state();
    let entries = u32::from_ne_bytes(bytes[row_form::ENTRIES].try_into().unwrap()) as usize;
    let texts: usize = bytes[row_form::TEXTS].iter().map(|length| usize::from(*length)).sum();
    let Ok(key) = Key::new(&bytes[row_form::FIXED + entries * row_form::ENTRY + texts..]) else { return };
    let record = row.record(key.hash(), HOME, now).expect("under its own key it is one");
    assert_eq!((&record.key, record.fence), (&key, Some(row.fence())));
    assert!(record.state == state);
    if let Holder::Reentrant { count, entries: listed, .. } = &state.holder {
        assert!(*count > 0 && listed.len() == entries);
    }
    let written = row.with_state(&state);
    assert!(Row::read(&written).is_some_and(|again| again.state() == state), "what is written can be read");
}

/// Where the header's parts stand, in its form 1; the sum is over all before it.
mod header_form {
    use std::ops::Range;

    pub const MAGIC: Range<usize> = 0..8;
    pub const FORMAT: Range<usize> = 8..12;
    pub const PID_NAMESPACE: Range<usize> = 336..344;
    pub const TIME_NAMESPACE: Range<usize> = 344..352;
    pub const DATA_INODE: Range<usize> = 352..360;
    pub const SUM: Range<usize> = 360..368;
}

fn surroundings() -> Surroundings {
    Surroundings { boot_id: "now".into(), pid_namespace: 11, time_namespace: 12, host: "here".into() }
}

/// A control file that nobody else has, and its header.
fn whole_file() -> (File, Vec<u8>) {
    // SAFETY: a name that ends with NUL; the descriptor is new, and owned by what is made of it.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"control".as_ptr(), libc::MFD_CLOEXEC)) };
    Control::create(&file, "control", &surroundings(), 77).unwrap();
    let mut header = vec![0; header_form::SUM.end];
    file.read_exact_at(&mut header, 0).unwrap();
    (file, header)
}

/// The bytes stand in a header's place, over one that is whole.
pub fn header(bytes: &[u8]) {
    thread_local! {
        static FILE: (File, Vec<u8>) = whole_file();
    }
    FILE.with(|(file, whole)| {
        let mut header = whole.clone();
        let length = bytes.len().min(header.len());
        header[..length].copy_from_slice(&bytes[..length]);
        opened_or_refused(file, &header, whole);
        let sum = u64::from(crc32fast::hash(&header[..header_form::SUM.start])) | 1 << 32;
        header[header_form::SUM].copy_from_slice(&sum.to_ne_bytes());
        opened_or_refused(file, &header, whole);
    });
}

fn opened_or_refused(file: &File, header: &[u8], whole: &[u8]) {
    let number = |range: std::ops::Range<usize>| u64::from_ne_bytes(header[range].try_into().unwrap());
    let ours = surroundings();
    let namespaces = (number(header_form::PID_NAMESPACE), number(header_form::TIME_NAMESPACE));
    file.write_all_at(header, 0).unwrap();
    match Control::open(file.try_clone().unwrap(), "control", &ours).unwrap() {
        Ok(control) => {
            let sum = u64::from(crc32fast::hash(&header[..header_form::SUM.start])) | 1 << 32;
            assert_eq!(number(header_form::SUM), sum);
            for same in [header_form::MAGIC, header_form::FORMAT] {
                assert_eq!(header[same.clone()], whole[same]);
            }
            assert_eq!(namespaces, (ours.pid_namespace, ours.time_namespace));
            assert_eq!(control.home().boot_id, ours.boot_id);
            assert_eq!(control.data_inode(), number(header_form::DATA_INODE));
        }
        Err(Unfit::Damaged(why)) => assert!(!why.is_empty() && header != whole),
        Err(Unfit::Elsewhere { pid_namespace, time_namespace }) => {
            assert_eq!((pid_namespace, time_namespace), namespaces);
            assert_ne!(namespaces, (ours.pid_namespace, ours.time_namespace));
        }
    }
}
