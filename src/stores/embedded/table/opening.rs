//! Opening the table's file, or creating it; setting aside a file that cannot be used.
//!
//! A new file is completed under a temporary name and then *linked* to the real one, which fails if another process was
//! faster. A process that creates a file takes a lock for this; one that opens an existing file does not. Every process
//! that uses the file keeps a shared `flock` on it. A process that gets it exclusively is alone: only then may a file
//! be set aside, and only then are mutexes of dead owners released.

use std::cell::Cell;
use std::fs::{File, TryLockError};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::directory::{self, Directory, Opening, boot_in, failed};
use super::super::former;
use super::super::machine::Machine;
use super::Table;
use super::backing::Backing;
use super::central::FenceSource;
use super::checked;
use super::fault::Fault;
use super::file::TableFile;
use super::header::{self, Foreign, Mismatch};
use super::layout::{CHUNK_BYTES, CHUNKS_AT, IN_USE, NO_DAMAGE, RETIRED, Top};
use super::mapping::Mapping;
use super::mutex::{OWNER_DIED, Patience};
use crate::clock;
use crate::store::{StoreError, StoreErrorKind};
use crate::sys::{random, space};

pub const NAME: &str = "table-";
const NEW: &str = ".new-";
const DAMAGED: &str = ".damaged-";

/// Chunks that a new file has space for: most programs need no more.
const FIRST_CHUNKS: u32 = 16;

/// The interval between attempts at something that has no timed wait.
const RETRY: Duration = Duration::from_millis(1);

/// How long a cleaner of temporary files may lock a file, to see whether it is in use.
const CLEANER: Duration = Duration::from_millis(200);

/// The result of an attempt to open.
enum Opened {
    Table(Box<Table>),
    /// The file was removed meanwhile, or has just been set aside.
    Again,
}

/// Opens the table in a directory. Creates it if it does not exist. Its fences are at or above `fence_floor`.
pub fn open(
    directory: Arc<Directory>,
    machine: &Machine,
    fences: Arc<dyn FenceSource>,
    fence_floor: u64,
    deadline: Instant,
) -> Result<Table, StoreError> {
    let name = format!("{NAME}{}", machine.boot_id);
    let opener = Opener { name, directory, machine, fences, fence_floor: Cell::new(fence_floor), deadline };
    loop {
        let found = match opener.directory.open_file(&opener.name)? {
            Some(file) => opener.join(file)?,
            None => {
                opener.make()?;
                Opened::Again
            }
        };
        if let Opened::Table(table) = found {
            let mut patience = Patience::new(deadline.saturating_duration_since(Instant::now()));
            match table.prepare_fences(opener.fence_floor.get(), &mut patience) {
                Ok(()) => return Ok(*table),
                Err(Fault::Gone) => {}
                Err(fault) => return Err(fault.into_error()),
            }
        }
        if Instant::now() >= deadline {
            return Err(StoreError::unreachable(format!(
                "store busy: {} was removed or replaced repeatedly while it was being opened",
                opener.shown(&opener.name)
            )));
        }
    }
}

struct Opener<'m> {
    directory: Arc<Directory>,
    machine: &'m Machine,
    fences: Arc<dyn FenceSource>,
    name: String,
    /// Every fence that was given out in the files that this replaces is below this.
    fence_floor: Cell<u64>,
    deadline: Instant,
}

impl Opener<'_> {
    fn shown(&self, name: &str) -> String {
        self.directory.shown(name).display().to_string()
    }

    fn raise_floor(&self, ceiling: u64) {
        self.fence_floor.set(self.fence_floor.get().max(ceiling));
    }

    /// Opens an existing file.
    fn join(&self, file: File) -> Result<Opened, StoreError> {
        let shown = self.shown(&self.name);
        self.refuse_former_in_use()?;
        let asked = |error| failed(format_args!("{shown} could not be examined"), &error);
        // From here on, dropping it unlocks the file, even if a forked child has the descriptor too.
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
            Err(Mismatch::Damaged(what)) => return self.set_aside(alone, &what),
            Err(Mismatch::OtherClock(theirs)) => {
                return Err(self.elsewhere("time", theirs, self.machine.time_namespace));
            }
        };
        match top.state.0.life.load() {
            IN_USE => {}
            RETIRED if alone => {
                self.raise_floor(checked::open64(top.central.0.end.load()).unwrap_or(0));
                self.directory.remove(&self.name)?;
                return Ok(Opened::Again);
            }
            RETIRED => {
                // The processes that still have it open notice this, and close it.
                std::thread::sleep(RETRY);
                return Ok(Opened::Again);
            }
            _ => return self.set_aside(alone, &format!("{shown} is damaged after its header")),
        }
        if !self.in_namespace(top, alone)? {
            return self.set_aside(alone, &format!("{shown} is damaged after its header"));
        }
        let table = Table { file: TableFile::new(mapping, backing, description), fences: Arc::clone(&self.fences) };
        if alone {
            // No other process has the file open: the owner of a mutex, if there is one, has ended.
            table.free_mutexes();
            if let Err(what) = table.check(self.deadline)? {
                // Before the table is dropped, which unlocks the file.
                self.raise_floor(table.fence_ceiling());
                return self.set_aside(true, &what);
            }
            table.file.backing.share(self.deadline)?;
            // Between the exclusive and the shared lock, another process may have had the exclusive one.
            if !table.file.backing.is_at_its_name()? {
                return Ok(Opened::Again);
            }
        }
        Ok(Opened::Table(Box::new(table)))
    }

    /// Refuses a file whose mutexes name threads of another PID namespace, unless no other process uses it: then it is
    /// changed to this namespace. `false`: the number of the namespace is damaged.
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
            "{} is used from {kind} namespace {theirs}, and this process is in {ours}: run both in one namespace, or \
             give each container its own directory",
            self.shown(&self.name)
        ))
    }

    /// Sets a file aside that cannot be used, if no other process has it open.
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

    /// Creates the file, unless another process is faster.
    fn make(&self) -> Result<(), StoreError> {
        let opening = self.directory.lock_opening(self.deadline)?;
        if self.directory.open_file(&self.name)?.is_some() {
            return Ok(());
        }
        self.refuse_former_in_use()?;
        self.remove_leftovers(&opening)?;
        let new = format!("{}{NEW}{:016x}", self.name, u64::from_ne_bytes(random::random()));
        let file = self.directory.create_file(&new)?;
        let made = self.fill(&file, &new).and_then(|()| self.directory.link(&new, &self.name));
        let removed = self.directory.remove(&new);
        made.and(removed)
    }

    fn fill(&self, file: &File, name: &str) -> Result<(), StoreError> {
        let failed = |what: &str, error| failed(format_args!("{} {what}", self.shown(name)), &error);
        let length = CHUNKS_AT + u64::from(FIRST_CHUNKS) * CHUNK_BYTES;
        space::allocate(file, 0, length).map_err(|error| failed("could not be allocated", error))?;
        let mapping = Mapping::new(file).map_err(|error| failed("could not be mapped", error))?;
        header::write(mapping.top(), self.machine, FIRST_CHUNKS, self.fence_floor.get());
        Ok(())
    }

    /// Removes the files of other boots, half-made files of processes that have died, and files of former versions; but
    /// only files that are not in use, and that are ours by their name and their contents: the directory may have other
    /// files.
    fn remove_leftovers(&self, _opening: &Opening) -> Result<(), StoreError> {
        for name in self.directory.names()? {
            if let Some((boot_id, after)) = boot_in(&name, NAME) {
                let Ok(Some(file)) = self.directory.open_file(&name) else { continue };
                let foreign = Foreign::read(&file);
                // A half-made file is not being made any more: this process has the lock under which files are made.
                let half_made = is_half_made(after) && (foreign.is_some() || is_empty(&file));
                if !half_made {
                    let Some(foreign) = foreign.filter(|_| after.is_empty() && boot_id != self.machine.boot_id) else {
                        continue;
                    };
                    if self.goes_on(&file, &foreign)? {
                        return Err(self.of_another_boot(&name));
                    }
                    self.raise_floor(foreign.fence_ceiling);
                }
                self.directory.remove(&name)?;
            } else if former::has_name(&name) {
                let Ok(Some(file)) = self.directory.open_file(&name) else { continue };
                if former::is_one(&name, &file) {
                    if self.is_in_use(&file)? {
                        return Err(self.of_another_boot(&name));
                    }
                    self.directory.remove(&name)?;
                }
            }
        }
        Ok(())
    }

    /// Fails if programs with a former version of the library use the directory.
    fn refuse_former_in_use(&self) -> Result<(), StoreError> {
        let name = former::name_of(&self.machine.boot_id);
        match self.directory.open_file(&name)? {
            Some(file) if former::is_one(&name, &file) && self.is_in_use(&file)? => {
                Err(StoreError::bad_config(format!(
                    "{} is in use by programs with an earlier version of this library, which keeps locks in another \
                     format: end them, or give this program another directory",
                    self.shown(&name)
                )))
            }
            _ => Ok(()),
        }
    }

    fn of_another_boot(&self, name: &str) -> StoreError {
        StoreError::bad_config(format!(
            "{} is used under a boot id other than this process's ({}), by a container with its own boot id or by \
             another machine: give each its own directory",
            self.shown(name),
            self.machine.boot_id
        ))
    }

    /// Whether the boot of a file may be this one under another id: a process has the file open, or it was made since
    /// this machine was started.
    fn goes_on(&self, file: &File, foreign: &Foreign) -> Result<bool, StoreError> {
        let made = foreign.made.as_ref();
        Ok(self.is_in_use(file)? || made.is_some_and(|made| made.is_of_this_run(self.machine.pid_namespace)))
    }

    fn is_in_use(&self, file: &File) -> Result<bool, StoreError> {
        match directory::until(self.deadline.min(Instant::now() + CLEANER), || file.try_lock()) {
            Ok(()) => {
                let _ = file.unlock();
                Ok(false)
            }
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(failed("the lock on a file could not be checked", &error)),
        }
    }
}

/// Whether this, after the boot id, is the end of the name of a half-made file.
fn is_half_made(after: &str) -> bool {
    after.strip_prefix(NEW).is_some_and(|number| {
        number.len() == 16 && number.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Whether nothing was written to the file: its maker may have died before that.
fn is_empty(file: &File) -> bool {
    let mut beginning = [0; 64];
    file.metadata().is_ok_and(|found| found.len() == 0)
        || file.read_exact_at(&mut beginning, 0).is_ok() && beginning == [0; 64]
}

impl Table {
    /// Releases the mutexes of dead owners. Their next owners repair what they guard.
    fn free_mutexes(&self) {
        let top = self.file.top();
        let shards = top.shards.iter().map(|shard| &shard.0.mutex);
        for word in shards.chain([&top.central.0.mutex]).filter(|word| word.load_in_order() != 0) {
            word.store(OWNER_DIED);
        }
    }

    /// Checks whether the file is as long as it says, and, if damage was found before, everything in it. Returns why
    /// the file cannot be used. Damaged records are not a reason: they are listed, and can be broken, and the other
    /// records can be used.
    fn check(&self, deadline: Instant) -> Result<Result<(), String>, StoreError> {
        let damage = &self.file.top().state.0.damage;
        let mut patience = Patience::new(deadline.saturating_duration_since(Instant::now()));
        let looked = self.file.chunks().and_then(|_| match damage.load() {
            NO_DAMAGE => Ok(()),
            _ => self.census(&mut patience).map(|census| {
                if census.damaged == 0 {
                    damage.store(NO_DAMAGE);
                }
            }),
        });
        match looked {
            Ok(()) => Ok(Ok(())),
            Err(Fault::Failed(error)) if error.kind == StoreErrorKind::Rejected => Ok(Err(error.message.into())),
            Err(fault) => Err(fault.into_error()),
        }
    }
}
