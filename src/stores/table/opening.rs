//! Finding the file, or making it; putting aside one that cannot be used.
//!
//! A new file is made whole under a name of its own and then *linked* to the real one, which fails if
//! somebody was faster: so openers need not take turns, and one that is stopped keeps nobody from opening.
//! Everybody who uses the file keeps a shared `flock` on it. Who can have it exclusively is alone: only then
//! may a file be put aside, and only then are mutexes whose owners are long gone given back.

use std::fs::{File, TryLockError};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backing::{self, Backing, failed};
use super::central::FenceSource;
use super::checked;
use super::fault::Fault;
use super::header::{self, Machine, Unfit};
use super::layout::{CHUNK_BYTES, CHUNKS_AT, IN_USE, NO_DAMAGE, RETIRED, Top};
use super::mapping::Mapping;
use super::mutex::{OWNER_DIED, Patience};
use super::recovery::Census;
use super::{Directory, Table};
use crate::clock;
use crate::store::{StoreError, StoreErrorKind};
use crate::sys::random;

const NAME: &str = "table-";
const NEW: &str = ".new-";
const DAMAGED: &str = ".damaged-";
/// What versions before this one kept in the directory.
const FORMER: [&str; 2] = ["control-", "data-"];

/// Chunks that a new file has space for: most programs need no more.
const FIRST_CHUNKS: u32 = 16;

/// How often something that has no timed wait is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// What came of an attempt to open.
enum Opened {
    Table(Box<Table>),
    /// The file went meanwhile, or has just been put aside.
    Again,
}

/// Opens the table in a directory, and makes it if it is not there.
pub fn open(
    directory: Arc<dyn Directory>,
    machine: &Machine,
    fences: Arc<dyn FenceSource>,
    deadline: Instant,
) -> Result<Table, StoreError> {
    let opener = Opener { name: format!("{NAME}{}", machine.boot_id), directory, machine, fences, deadline };
    loop {
        let found = match opener.directory.open(&opener.name)? {
            Some(file) => opener.join(file)?,
            None => {
                opener.make()?;
                Opened::Again
            }
        };
        if let Opened::Table(table) = found {
            return Ok(*table);
        }
        if Instant::now() >= deadline {
            return Err(StoreError::unreachable(format!(
                "store busy: {} was removed or replaced again and again while it was to be opened",
                opener.shown(&opener.name)
            )));
        }
    }
}

struct Opener<'m> {
    directory: Arc<dyn Directory>,
    machine: &'m Machine,
    fences: Arc<dyn FenceSource>,
    name: String,
    deadline: Instant,
}

impl Opener<'_> {
    fn shown(&self, name: &str) -> String {
        self.directory.shown(name)
    }

    /// Uses a file that is there.
    fn join(&self, file: File) -> Result<Opened, StoreError> {
        let shown = self.shown(&self.name);
        let asked = |error| failed(&format!("{shown} could not be looked at"), &error);
        // From here on it is unlocked when it is closed, whatever forked children have of it.
        let backing = Backing::new(Arc::clone(&self.directory), self.name.clone(), file).map_err(asked)?;
        let alone = backing.lock(self.deadline)?;
        if !backing.is_at_its_name()? {
            return Ok(Opened::Again);
        }
        let Some(mapping) = backing.map_top()? else {
            return self.set_aside(alone, &format!("{shown} is too short"));
        };
        let top = mapping.top();
        let description = match header::read(top, self.machine, &shown) {
            Ok(description) => description,
            Err(Unfit::Damaged(what)) => return self.set_aside(alone, &what),
            Err(Unfit::OtherClock(theirs)) => {
                return Err(self.elsewhere("time", theirs, self.machine.time_namespace));
            }
        };
        match top.state.0.life.load() {
            IN_USE => {}
            RETIRED if alone => {
                self.directory.remove(&self.name)?;
                return Ok(Opened::Again);
            }
            RETIRED => {
                // Those who still have it open notice, and go.
                std::thread::sleep(RETRY);
                return Ok(Opened::Again);
            }
            _ => return self.set_aside(alone, &format!("{shown} is damaged behind its header")),
        }
        if !self.in_namespace(top, alone)? {
            return self.set_aside(alone, &format!("{shown} is damaged behind its header"));
        }
        let table = Table::new(mapping, backing, description, Arc::clone(&self.fences));
        if alone {
            // No other process has the file open: a thread whose number is in a mutex has ended.
            table.free_mutexes();
            if table.top().state.0.damage.load() != NO_DAMAGE {
                if let Err(what) = table.check(self.deadline)? {
                    // Before the table is dropped, with which others may come in.
                    return self.set_aside(true, &what);
                }
                table.top().state.0.damage.store(NO_DAMAGE);
            }
            table.backing.share(self.deadline)?;
            // Between being alone and sharing, another may have been alone.
            if !table.backing.is_at_its_name()? {
                return Ok(Opened::Again);
            }
        }
        Ok(Opened::Table(Box::new(table)))
    }

    /// Refuses a file whose mutexes name threads of another PID namespace. Alone, it is taken over into this one.
    /// `false`: it is damaged.
    fn in_namespace(&self, top: &Top, alone: bool) -> Result<bool, StoreError> {
        let word = &top.state.0.pid_namespace;
        let ours = self.machine.pid_namespace;
        match checked::open64(word.load()) {
            Some(theirs) if theirs == ours => {}
            _ if alone => word.store(checked::seal64(ours)),
            Some(theirs) => return Err(self.elsewhere("PID", theirs, ours)),
            None => return Ok(false),
        }
        Ok(true)
    }

    fn elsewhere(&self, kind: &str, theirs: u64, ours: u64) -> StoreError {
        StoreError::bad_config(format!(
            "{} is used from {kind} namespace {theirs}, and this process is in {ours}: containers cannot share a \
             store, give each its own directory",
            self.shown(&self.name)
        ))
    }

    /// Puts a file aside that cannot be used, if nobody uses it.
    fn set_aside(&self, alone: bool, what: &str) -> Result<Opened, StoreError> {
        if !alone {
            return Err(StoreError::rejected(format!(
                "{what}, and other processes have it open: end them, and it is set aside when it is opened next"
            )));
        }
        let aside = format!("{}{DAMAGED}{}", self.name, clock::wall_millis());
        self.directory.rename(&self.name, &aside)?;
        tracing::error!("{what}; it was set aside as {}, and the locks in it are lost", self.shown(&aside));
        Ok(Opened::Again)
    }

    /// Makes a file, unless somebody else is faster.
    fn make(&self) -> Result<(), StoreError> {
        self.remove_leftovers()?;
        let new = format!("{}{NEW}{:016x}", self.name, u64::from_ne_bytes(random::random()));
        let file = self.directory.create(&new)?;
        // It is in the making, and no leftover.
        let _ = file.try_lock();
        let made = self.fill(&file, &new).and_then(|()| self.directory.link(&new, &self.name));
        let _ = file.unlock();
        if made.is_err() && self.directory.open(&new)?.is_none() {
            // Somebody looked for leftovers before it was locked.
            return Ok(());
        }
        let removed = self.directory.remove(&new);
        made.and(removed)
    }

    fn fill(&self, file: &File, name: &str) -> Result<(), StoreError> {
        let failed = |what: &str, error| failed(&format!("{} {what}", self.shown(name)), &error);
        let length = CHUNKS_AT + u64::from(FIRST_CHUNKS) * CHUNK_BYTES;
        backing::allocate(file, 0, length).map_err(|error| failed("could not be given space", error))?;
        let mapping = Mapping::new(file).map_err(|error| failed("could not be mapped", error))?;
        header::write(mapping.top(), self.machine, FIRST_CHUNKS);
        Ok(())
    }

    /// Removes what other boots left, what was being made when its maker died, and the files of former versions;
    /// but nothing that is in use.
    fn remove_leftovers(&self) -> Result<(), StoreError> {
        for name in self.directory.names()? {
            let former = FORMER.iter().any(|former| name.starts_with(former));
            let half_made = name.starts_with(&self.name) && name.contains(NEW);
            let of_another_boot = name.starts_with(NAME) && !name.starts_with(&self.name);
            if !former && !half_made && !of_another_boot {
                continue;
            }
            // A file that cannot be opened, or is not ours, is left alone.
            let Ok(Some(file)) = self.directory.open(&name) else { continue };
            match file.try_lock() {
                Ok(()) => self.directory.remove(&name)?,
                Err(TryLockError::WouldBlock) if former && name.ends_with(&self.machine.boot_id) => {
                    return Err(StoreError::bad_config(format!(
                        "{} is in use by programs with a former version of this library, which keeps locks in \
                         another format: end them, or give this program another directory",
                        self.shown(&name)
                    )));
                }
                Err(_) => {}
            }
        }
        Ok(())
    }
}

impl Table {
    /// Gives back what nobody is left to give back. Its next owner repairs what it guards.
    fn free_mutexes(&self) {
        let shards = self.top().shards.iter().map(|shard| &shard.0.mutex);
        for word in shards.chain([&self.top().central.0.mutex]).filter(|word| word.load_in_order() != 0) {
            word.store(OWNER_DIED);
        }
    }

    /// Looks at everything. Answers what is damaged.
    fn check(&self, deadline: Instant) -> Result<Result<(), String>, StoreError> {
        let mut patience = Patience::new(deadline.saturating_duration_since(Instant::now()));
        match self.census(&mut patience) {
            Ok(Census { damaged: 0, .. }) => Ok(Ok(())),
            Ok(census) => Ok(Err(format!("{} records in {} are damaged", census.damaged, self.name()))),
            Err(Fault::Failed(error)) if error.kind == StoreErrorKind::Rejected => Ok(Err(error.message.into())),
            Err(fault) => Err(fault.into_error()),
        }
    }
}
