//! LMDB, as far as the store uses it: one table, one transaction at a time.
//!
//! Opened with a write map, without syncs, and without LMDB's own locking, which has no time limit and
//! breaks when a second copy of the library in the process opens the file. All calls here are made by
//! the thread that has the control file's mutex; it takes the place of LMDB's.
//!
//! LMDB never overwrites a page that the last commit refers to, so a writer may die at any point.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::{ptr, slice};

use lmdb_master_sys as lmdb;

use super::directory::{DESCRIPTORS, failed};
use super::fence;
use super::space::{allocate, may_reach};
use crate::store::StoreError;
use crate::sys::descriptor::{Known, Own};
use crate::sys::process;

/// How large the data file is at first. It doubles.
const FIRST_SIZE: u64 = 1 << 20;
/// The largest step in which it grows.
const LARGEST_STEP: u64 = 1 << 30;
/// Below this a step is not worth trying when the disk is nearly full.
const SMALLEST_STEP: u64 = 64 << 10;
/// The largest data file: so much address space is asked for at most.
const LARGEST_SIZE: u64 = 64 << 30;

/// LMDB's number for the table without a name (mdb.c: MAIN_DBI).
const MAIN: lmdb::MDB_dbi = 1;

/// LMDB's page header and the part of its meta page that is read here (mdb.c: MDB_page, MDB_meta).
mod layout {
    pub const FLAGS: usize = 10;
    pub const LOWER: usize = 12;
    pub const UPPER: usize = 14;
    pub const META: usize = 16;
    pub const MAGIC: usize = META;
    pub const VERSION: usize = META + 4;
    /// Of the table of free pages; its first field is the page size.
    pub const FREE: usize = META + 24;
    pub const MAIN: usize = FREE + 48;
    pub const TABLE_FLAGS: usize = 4;
    pub const DEPTH: usize = 6;
    pub const ROOT: usize = 40;
    pub const LAST_PAGE: usize = MAIN + 48;
    pub const TRANSACTION: usize = LAST_PAGE + 8;
    pub const END: usize = TRANSACTION + 8;

    pub const IS_BRANCH: u16 = 0x01;
    pub const IS_LEAF: u16 = 0x02;
    pub const IS_META: u16 = 0x08;
    pub const MAGIC_NUMBER: u32 = 0xBEEF_C0DE;
    pub const DATA_VERSION: u32 = 1;
    pub const NO_PAGE: u64 = u64::MAX;
    /// What a table's flags say of its keys and values (mdb.c: VALID_FLAGS), and MDB_FIXEDMAP, which
    /// stands beside them in the first table's.
    pub const KIND_OF_TABLE: u16 = 0x7f;
    pub const INTEGER_KEY: u16 = 0x08;
    /// Where in the first meta page the fences' ceiling is noted. LMDB writes that page whole when it
    /// makes the file, and only its fields, up to END, after that (mdb.c: mdb_env_write_meta).
    pub const NOTE: u64 = 2048;
    pub const NOTE_LENGTH: usize = 64;
    /// Deeper trees LMDB cannot walk (mdb.c: CURSOR_STACK).
    pub const DEEPEST: u16 = 32;
}

/// Why an operation did not come to its end.
#[derive(Debug)]
pub enum Fault {
    /// The map is full, or somebody else has made the file larger: to be done again after [`Database::grow`].
    Full,
    /// The reserved fences are used up: to be done again after more were reserved.
    FencesSpent,
    Failed(StoreError),
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Fault {
        Fault::Failed(error)
    }
}

/// An open data file.
pub struct Database {
    environment: *mut lmdb::MDB_env,
    /// A transaction whose thread ended in the middle of it, which only a forced end can bring about.
    unfinished: *mut lmdb::MDB_txn,
    file: Own<File>,
    /// LMDB's own descriptor of it, which it makes longer and maps, and closes.
    lmdbs: Option<Known>,
    /// What messages call the file.
    name: String,
}

// SAFETY: LMDB's environment is bound to no thread; `&mut` keeps its users apart.
unsafe impl Send for Database {}

impl Database {
    /// Makes an empty file into a data file.
    pub fn create(file: File, name: &str) -> Result<(), StoreError> {
        may_reach(FIRST_SIZE).map_err(|error| failed(format_args!("no space for {name}"), &error))?;
        // LMDB takes an empty file for a new one, and then makes it as long as the map, with holes.
        let database = Database::map(file, name, FIRST_SIZE)?;
        database
            .file
            .get()
            .and_then(|file| allocate(file, 0, FIRST_SIZE))
            .map_err(|error| failed(format_args!("no space for {name}"), &error))?;
        // By the note a data file is known as ours.
        database.note_ceiling(0)
    }

    /// Whether an open file is a data file of ours, whole or damaged behind its note.
    pub fn is_one(file: &File) -> bool {
        Database::ceiling_noted(file).is_some() && Database::is_begun(file)
    }

    /// Whether LMDB has begun to make a data file of an open file.
    pub fn is_begun(file: &File) -> bool {
        let mut meta = [0; layout::END];
        file.read_exact_at(&mut meta, 0).is_ok() && u32_at(&meta, layout::MAGIC) == layout::MAGIC_NUMBER
    }

    /// Opens a data file that has been checked. The mutex must be held: nobody may make the file
    /// larger between a look at its size and LMDB's, which would make it shorter again.
    pub fn open(file: File, name: &str) -> Result<Database, StoreError> {
        let size = whole_pages(&file, name)?;
        let mut database = Database::map(file, name, size)?;
        let transaction = database.begin().map_err(|fault| match fault {
            Fault::Failed(error) => error,
            _ => StoreError::rejected(format!("{name} is damaged: it says that it is larger than it is")),
        })?;
        let mut main = 0;
        // SAFETY: the transaction runs, and is aborted afterwards; no name means the main table.
        let status = unsafe { lmdb::mdb_dbi_open(transaction.raw, ptr::null(), 0, &mut main) };
        drop(transaction);
        debug_assert_eq!(main, MAIN);
        database.succeeded(status, "opened")?;
        Ok(database)
    }

    fn map(file: File, name: &str, size: u64) -> Result<Database, StoreError> {
        // The very file that was looked at, wherever its name leads by now.
        let path = CString::new(format!("{DESCRIPTORS}/{}", file.as_raw_fd())).expect("a number has no NUL");
        let flags = lmdb::MDB_NOSUBDIR
            | lmdb::MDB_WRITEMAP
            | lmdb::MDB_NOSYNC
            | lmdb::MDB_NOLOCK
            | lmdb::MDB_NOTLS
            | lmdb::MDB_NOMEMINIT
            | lmdb::MDB_NORDAHEAD;
        let mut environment = ptr::null_mut();
        // SAFETY: writes a pointer to a new environment, or fails.
        let status = unsafe { lmdb::mdb_env_create(&mut environment) };
        // From here on the environment is closed when this fails.
        let file = Own::private(file).map_err(|error| failed(format_args!("{name} could not be looked at"), &error))?;
        let mut database =
            Database { environment, unfinished: ptr::null_mut(), file, lmdbs: None, name: name.to_string() };
        database.succeeded(status, "opened")?;
        // LMDB opens a descriptor of its own.
        let _taken = process::standard_taken();
        // SAFETY: the environment was made and is not open yet; the path ends with a NUL.
        let status = unsafe {
            match lmdb::mdb_env_set_mapsize(environment, size as usize) {
                0 => lmdb::mdb_env_open(environment, path.as_ptr(), flags, 0o600),
                status => status,
            }
        };
        database.succeeded(status, "opened")?;
        let mut descriptor: lmdb::mdb_filehandle_t = -1;
        // SAFETY: the environment is open; the descriptor is LMDB's own as long as it is. LMDB opens it
        // without O_CLOEXEC, and every program that is started from here would have it open for writing.
        let status = unsafe {
            match lmdb::mdb_env_get_fd(environment, &mut descriptor) {
                0 if libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) != 0 => *libc::__errno_location(),
                status => status,
            }
        };
        database.succeeded(status, "opened")?;
        let known = Known::note(descriptor, true);
        database.lmdbs = Some(known.map_err(|error| failed(format_args!("{name} could not be looked at"), &error))?);
        Ok(database)
    }

    /// Whether the program has left the descriptors open. It may have files of its own under their numbers.
    pub fn is_open(&self) -> bool {
        self.file.is_ours() && self.lmdbs.as_ref().is_none_or(Known::is_ours)
    }

    /// Looks whether LMDB may be let near a file: garbage must not crash it. `Ok(Err)` says what is wrong.
    pub fn check(file: &File, name: &str) -> Result<Result<(), String>, StoreError> {
        let unreadable = |error: io::Error| failed(format_args!("{name} could not be read"), &error);
        let length = file.metadata().map_err(unreadable)?.len();
        // SAFETY: asks for a number.
        let page_size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
        let damaged = |what: &str| Ok(Err(format!("{name} is damaged: {what}")));
        if length < 4 * page_size || length > LARGEST_SIZE {
            return damaged("its length is not one that it can have");
        }
        let mut metas = [[0u8; layout::END]; 2];
        for (index, meta) in metas.iter_mut().enumerate() {
            file.read_exact_at(meta, index as u64 * page_size).map_err(unreadable)?;
            if u16_at(meta, layout::FLAGS) & layout::IS_META == 0
                || u32_at(meta, layout::MAGIC) != layout::MAGIC_NUMBER
                || u32_at(meta, layout::VERSION) != layout::DATA_VERSION
                || u64::from(u32_at(meta, layout::FREE)) != page_size
            {
                return damaged("a meta page is none of this machine's LMDB");
            }
        }
        // Transaction N writes meta page N % 2, and the two are of neighbouring transactions.
        let [even, odd] = metas.each_ref().map(|meta| u64_at(meta, layout::TRANSACTION));
        let of_neighbours = even % 2 == 0 && (odd % 2 == 1 || (even, odd) == (0, 0)) && even.abs_diff(odd) <= 1;
        if !of_neighbours {
            return damaged("its meta pages don't belong together");
        }
        let newest = &metas[usize::from(odd > even)];
        let last = u64_at(newest, layout::LAST_PAGE);
        if last < 1 || last >= length / page_size {
            return damaged("it says that it is larger than it is");
        }
        for (table, kind) in [(layout::FREE, layout::INTEGER_KEY), (layout::MAIN, 0)] {
            // A table of another kind LMDB walks in another way, off the end of its own memory.
            if metas.iter().any(|meta| u16_at(meta, table + layout::TABLE_FLAGS) & layout::KIND_OF_TABLE != kind) {
                return damaged("a meta page describes another kind of table");
            }
            let root = u64_at(newest, table + layout::ROOT);
            let depth = u16_at(newest, table + layout::DEPTH);
            if root == layout::NO_PAGE && depth == 0 {
                continue;
            }
            if !(2..=last).contains(&root) || !(1..=layout::DEEPEST).contains(&depth) {
                return damaged("a meta page points nowhere");
            }
            let mut page = [0u8; layout::META];
            file.read_exact_at(&mut page, root * page_size).map_err(unreadable)?;
            let (lower, upper) = (u16_at(&page, layout::LOWER), u16_at(&page, layout::UPPER));
            let kind = if depth == 1 { layout::IS_LEAF } else { layout::IS_BRANCH };
            if u64_at(&page, 0) != root
                || u16_at(&page, layout::FLAGS) & (layout::IS_LEAF | layout::IS_BRANCH) != kind
                || lower < layout::META as u16
                || upper < lower
                || u64::from(upper) > page_size
            {
                return damaged("a table's first page is none");
            }
        }
        Ok(Ok(()))
    }

    /// Begins the one transaction. Dropping it aborts it.
    pub fn begin(&mut self) -> Result<Transaction<'_>, Fault> {
        if self.is_lost() {
            return Err(StoreError::unreachable(format!("{} is not mapped any more", self.name)).into());
        }
        if !self.unfinished.is_null() {
            let unfinished = std::mem::replace(&mut self.unfinished, ptr::null_mut());
            // SAFETY: LMDB keeps the one write transaction's memory as long as the environment.
            unsafe { lmdb::mdb_txn_abort(unfinished) };
        }
        let mut raw = ptr::null_mut();
        // SAFETY: the environment is open and has no transaction.
        match unsafe { lmdb::mdb_txn_begin(self.environment, ptr::null_mut(), 0, &mut raw) } {
            0 => {}
            lmdb::MDB_MAP_RESIZED => return Err(Fault::Full),
            status => return Err(self.error(status, "begun").into()),
        }
        self.unfinished = raw;
        Ok(Transaction { database: self, raw, _thread: PhantomData })
    }

    /// Notes the fences' ceiling in the file, where it outlives the other files.
    pub fn note_ceiling(&self, ceiling: u64) -> Result<(), StoreError> {
        let mut note = fence::text(ceiling).into_bytes();
        note.resize(layout::NOTE_LENGTH, 0);
        may_reach(layout::NOTE + layout::NOTE_LENGTH as u64)
            .and_then(|()| self.file.get()?.write_all_at(&note, layout::NOTE))
            .map_err(|error| failed(format_args!("{} could not be written", self.name), &error))
    }

    /// The ceiling that is noted in a data file, or 0. Needs no mutex: half a note is none.
    pub fn noted_ceiling(file: &File) -> u64 {
        Database::ceiling_noted(file).unwrap_or(0)
    }

    fn ceiling_noted(file: &File) -> Option<u64> {
        let mut note = [0; layout::NOTE_LENGTH];
        file.read_exact_at(&mut note, layout::NOTE).ok()?;
        fence::ceiling_in(&note)
    }

    /// The ceiling that is noted in this one.
    pub fn own_ceiling(&self) -> u64 {
        self.file.get().map_or(0, Database::noted_ceiling)
    }

    /// Makes room: takes over what another process has added to the file, or adds to it.
    pub fn grow(&mut self) -> Result<(), StoreError> {
        let gone = |error: io::Error| failed(format_args!("{} could not be made larger", self.name), &error);
        let mapped = self.mapped()?;
        let mut size = whole_pages(self.file.get().map_err(gone)?, &self.name)?;
        if size <= mapped {
            size = self.lengthen(size)?;
        }
        if let Some(lmdbs) = &self.lmdbs {
            // LMDB sets the length of what has this number, whatever it is.
            lmdbs.check().map_err(gone)?;
        }
        // SAFETY: no transaction runs: it would have `self` borrowed.
        match unsafe { lmdb::mdb_env_set_mapsize(self.environment, size as usize) } {
            0 => Ok(()),
            status => {
                // The old map is gone and LMDB may not know it: closing would unmap what is there by now.
                self.environment = ptr::null_mut();
                Err(self.error(status, "mapped again"))
            }
        }
    }

    /// Whether a failure has left nothing to work with.
    pub fn is_lost(&self) -> bool {
        self.environment.is_null()
    }

    fn mapped(&self) -> Result<u64, StoreError> {
        let mut info = MaybeUninit::uninit();
        // SAFETY: the environment is open; the call fills in all of it.
        let info = unsafe {
            let status = lmdb::mdb_env_info(self.environment, info.as_mut_ptr());
            self.succeeded(status, "looked at")?;
            info.assume_init()
        };
        Ok(info.me_mapsize as u64)
    }

    /// Adds blocks to the file. Nobody writes to them before they are there, so a full disk is an
    /// error here, and never a SIGBUS there.
    fn lengthen(&self, size: u64) -> Result<u64, StoreError> {
        if size >= LARGEST_SIZE {
            return Err(StoreError::resources(format!(
                "store full: {} has reached {} GiB, which is the limit",
                self.name,
                LARGEST_SIZE >> 30
            )));
        }
        let mut step = size.min(LARGEST_STEP).min(LARGEST_SIZE - size);
        loop {
            let file = self.file.get();
            let Err(error) = file.and_then(|file| allocate(file, size, size + step)) else { return Ok(size + step) };
            // What was added of a step that did not fit goes back.
            let _ = self.file.get().and_then(|file| file.set_len(size));
            if step / 2 < SMALLEST_STEP {
                return Err(failed(
                    format_args!("store full: {} has {size} bytes and could not be made larger", self.name),
                    &error,
                ));
            }
            step = (step / 2).next_multiple_of(SMALLEST_STEP);
        }
    }

    fn succeeded(&self, status: i32, what: &str) -> Result<(), StoreError> {
        if status == 0 { Ok(()) } else { Err(self.error(status, what)) }
    }

    #[cold]
    fn error(&self, status: i32, what: &str) -> StoreError {
        if status > 0 {
            let error = io::Error::from_raw_os_error(status);
            return failed(format_args!("{} could not be {what}", self.name), &error);
        }
        // SAFETY: LMDB gives a constant text for every status.
        let text = unsafe { CStr::from_ptr(lmdb::mdb_strerror(status)) }.to_string_lossy();
        StoreError::rejected(format!("{} could not be {what}: {text}", self.name))
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // LMDB would close the program's descriptor. What it has mapped stays then.
        let open = self.lmdbs.as_ref().is_none_or(Known::is_ours);
        // What is listed goes first: the number may be another's as soon as it is closed.
        drop(self.lmdbs.take());
        if open && !self.environment.is_null() {
            // SAFETY: closed once; a transaction would have `self` borrowed.
            unsafe { lmdb::mdb_env_close(self.environment) };
        }
    }
}

/// The size of the file, without a last part of a page.
fn whole_pages(file: &File, name: &str) -> Result<u64, StoreError> {
    let length = file.metadata().map_err(|error| failed(format_args!("{name} could not be looked at"), &error))?.len();
    // SAFETY: asks for a number.
    let page_size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    Ok(length / page_size * page_size)
}

/// The transaction. Dropping it aborts it.
pub struct Transaction<'a> {
    database: &'a mut Database,
    raw: *mut lmdb::MDB_txn,
    _thread: PhantomData<*const ()>,
}

/// What was at a key before.
pub enum Place<'a> {
    /// Nothing; now there are so many bytes to be written.
    Made(&'a mut [u8]),
    /// This.
    Taken(&'a [u8]),
}

impl Transaction<'_> {
    /// The number of the transaction, larger than that of any commit before it.
    pub fn number(&self) -> u64 {
        // SAFETY: the transaction runs.
        unsafe { lmdb::mdb_txn_id(self.raw) as u64 }
    }

    pub fn find(&self, key: &[u8]) -> Result<Option<&[u8]>, Fault> {
        let (mut key, mut value) = (input(key), output());
        // SAFETY: the transaction runs; the value stays in the map, unchanged, until the next change.
        unsafe {
            match lmdb::mdb_get(self.raw, MAIN, &mut key, &mut value) {
                0 => Ok(Some(slice::from_raw_parts(value.mv_data.cast(), value.mv_size))),
                lmdb::MDB_NOTFOUND => Ok(None),
                status => Err(self.fault(status)),
            }
        }
    }

    /// Makes room for a value where there is none.
    pub fn insert(&mut self, key: &[u8], length: usize) -> Result<Place<'_>, Fault> {
        let (mut key, mut value) = (input(key), lmdb::MDB_val { mv_size: length, mv_data: ptr::null_mut() });
        // SAFETY: the transaction runs. LMDB answers with the room it reserved, or with what is there;
        // both stay where they are until the next change.
        unsafe {
            match lmdb::mdb_put(self.raw, MAIN, &mut key, &mut value, lmdb::MDB_NOOVERWRITE | lmdb::MDB_RESERVE) {
                0 => Ok(Place::Made(slice::from_raw_parts_mut(value.mv_data.cast(), value.mv_size))),
                lmdb::MDB_KEYEXIST => Ok(Place::Taken(slice::from_raw_parts(value.mv_data.cast(), value.mv_size))),
                status => Err(self.fault(status)),
            }
        }
    }

    /// Makes room for a value, whatever was there. What the room holds is not defined.
    pub fn replace(&mut self, key: &[u8], length: usize) -> Result<&mut [u8], Fault> {
        let (mut key, mut value) = (input(key), lmdb::MDB_val { mv_size: length, mv_data: ptr::null_mut() });
        // SAFETY: the transaction runs. LMDB answers with the room it reserved, which stays where it is until the
        // next change.
        unsafe {
            match lmdb::mdb_put(self.raw, MAIN, &mut key, &mut value, lmdb::MDB_RESERVE) {
                0 => Ok(slice::from_raw_parts_mut(value.mv_data.cast(), value.mv_size)),
                status => Err(self.fault(status)),
            }
        }
    }

    pub fn delete(&mut self, key: &[u8]) -> Result<(), Fault> {
        let mut key = input(key);
        // SAFETY: the transaction runs, and nothing that was found in it is borrowed.
        match unsafe { lmdb::mdb_del(self.raw, MAIN, &mut key, ptr::null_mut()) } {
            0 => Ok(()),
            status => Err(self.fault(status)),
        }
    }

    /// Goes through the keys from this one on, in order, while `visit` says so.
    pub fn walk(&self, from: &[u8], mut visit: impl FnMut(&[u8], &[u8]) -> Result<bool, Fault>) -> Result<(), Fault> {
        let cursor = Cursor::open(self)?;
        let (mut key, mut value) = (input(from), output());
        let mut operation = lmdb::MDB_SET_RANGE;
        loop {
            // SAFETY: transaction and cursor are open; what is found stays in the map until the next
            // change, and `visit` cannot change anything.
            let (key, value) = unsafe {
                match lmdb::mdb_cursor_get(cursor.0, &mut key, &mut value, operation) {
                    0 => (
                        slice::from_raw_parts(key.mv_data.cast(), key.mv_size),
                        slice::from_raw_parts(value.mv_data.cast(), value.mv_size),
                    ),
                    lmdb::MDB_NOTFOUND => return Ok(()),
                    status => return Err(self.fault(status)),
                }
            };
            if !visit(key, value)? {
                return Ok(());
            }
            operation = lmdb::MDB_NEXT;
        }
    }

    pub fn commit(mut self) -> Result<(), Fault> {
        let raw = std::mem::replace(&mut self.raw, ptr::null_mut());
        // SAFETY: the transaction runs, and is not used again, whatever the outcome.
        match unsafe { lmdb::mdb_txn_commit(raw) } {
            0 => Ok(()),
            status => Err(self.fault(status)),
        }
    }

    fn fault(&self, status: i32) -> Fault {
        match status {
            lmdb::MDB_MAP_FULL | lmdb::MDB_MAP_RESIZED => Fault::Full,
            status => self.database.error(status, "used").into(),
        }
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // SAFETY: it runs, and ends here; or it was committed, and LMDB ignores the null.
        unsafe { lmdb::mdb_txn_abort(self.raw) };
        self.database.unfinished = ptr::null_mut();
    }
}

struct Cursor(*mut lmdb::MDB_cursor);

impl Cursor {
    fn open(transaction: &Transaction<'_>) -> Result<Cursor, Fault> {
        let mut cursor = ptr::null_mut();
        // SAFETY: the transaction runs.
        match unsafe { lmdb::mdb_cursor_open(transaction.raw, MAIN, &mut cursor) } {
            0 => Ok(Cursor(cursor)),
            status => Err(transaction.fault(status)),
        }
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once, before its transaction ends.
        unsafe { lmdb::mdb_cursor_close(self.0) };
    }
}

fn input(bytes: &[u8]) -> lmdb::MDB_val {
    // LMDB does not write through it.
    lmdb::MDB_val { mv_size: bytes.len(), mv_data: bytes.as_ptr().cast_mut().cast() }
}

fn output() -> lmdb::MDB_val {
    lmdb::MDB_val { mv_size: 0, mv_data: ptr::null_mut() }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The name and version of what keeps the data.
pub fn version() -> &'static str {
    // SAFETY: gives a constant text and writes nothing.
    let text = unsafe { CStr::from_ptr(lmdb::mdb_version(ptr::null_mut(), ptr::null_mut(), ptr::null_mut())) };
    text.to_str().unwrap_or("LMDB")
}
