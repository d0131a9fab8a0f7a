//! A data file and its control file, open: finding or making the pair, and running transactions on it.

use std::cell::UnsafeCell;
use std::fs::{self, File, TryLockError};
use std::mem::ManuallyDrop;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::{Control, Guard, Surroundings, Unfit};
use super::database::{Database, Fault};
use super::directory::{Directory, Identity, Opening, failed, identity};
use super::fence;
use super::rules::Scope;
use super::wake::{Calls, Freed, Watches};
use crate::clock::{self, Boottime};
use crate::process;
use crate::store::StoreError;

const CONTROL: &str = "control-";
const DATA: &str = "data-";
const NEW: &str = ".new";
const DAMAGED: &str = ".damaged-";

/// How long an operation relies on the last look at the directory.
///
/// A look costs as much as an operation. Somebody who takes away the files of a running store ends its
/// holds anyway; a process that works without a break may grant in the old file for this long. When
/// it is this library that replaces the files, it says so in the control file, which every operation
/// reads with the mutex held: then nothing is granted in the old file at all.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// An open pair of files.
pub struct Environment {
    control: Arc<Control>,
    /// Used only by whoever holds the control file's mutex.
    database: ManuallyDrop<UnsafeCell<Database>>,
    last_look: UnsafeCell<Boottime>,
    watches: Arc<Watches>,
    /// The locks that say that the files are in use.
    claims: [File; 2],
    /// The control file's.
    name: String,
    path: PathBuf,
    identity: Identity,
    generation: u64,
    directory: Arc<Directory>,
}

/// Where the control file's name leads.
enum Leads {
    /// To the file that is open.
    Here,
    /// To another, as this process sees it: its root directory, its mounts or the directory's name may
    /// have changed. Others may see it otherwise, and notice for themselves.
    Elsewhere,
    /// The file has no name left, which is so for everybody.
    Nowhere,
}

// SAFETY: the cells are used with the control file's mutex held, which is also this process's.
unsafe impl Sync for Environment {}

/// Why a transaction was not run to its end.
pub enum Stop {
    /// Somebody else has the mutex.
    Busy,
    /// The files are not this process's store any more: open what is.
    Gone,
    /// Reserve more fences.
    FencesSpent,
    Failed(StoreError),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Stop {
        Stop::Failed(error)
    }
}

impl Environment {
    /// Opens the store's files in a directory, and makes them if they are not there.
    pub fn open(
        directory: Arc<Directory>,
        surroundings: &Surroundings,
        deadline: Instant,
    ) -> Result<Environment, StoreError> {
        let opening = directory.lock_opening(deadline)?;
        Opener { directory, surroundings, deadline, opening: &opening }.open()
    }

    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    pub fn watches(&self) -> &Arc<Watches> {
        &self.watches
    }

    /// Runs an operation in a transaction, if the mutex can be had at once.
    pub fn try_run<T>(&self, operation: impl Fn(&mut Scope) -> Result<T, Fault>) -> Result<(T, Calls), Stop> {
        match self.control.try_lock()? {
            Some(guard) => self.run(&guard, operation),
            None => Err(Stop::Busy),
        }
    }

    /// Runs an operation in a transaction; waits for the mutex.
    pub fn run_until<T>(
        &self,
        deadline: Instant,
        operation: impl Fn(&mut Scope) -> Result<T, Fault>,
    ) -> Result<(T, Calls), Stop> {
        self.run(&self.control.lock_until(deadline)?, operation)
    }

    #[inline]
    fn run<T>(
        &self,
        guard: &Guard<'_>,
        operation: impl Fn(&mut Scope) -> Result<T, Fault>,
    ) -> Result<(T, Calls), Stop> {
        loop {
            let now = Boottime::now();
            guard.held_since(now);
            // SAFETY: the mutex is held, which all users of the cell hold.
            let database = unsafe { &mut *self.database.get() };
            self.look(guard, now, database)?;
            let done = database.begin().and_then(|transaction| {
                let mut scope = Scope {
                    transaction,
                    now,
                    fences: guard.fences(),
                    home: self.control.home(),
                    changed: false,
                    freed: Freed::default(),
                };
                let value = operation(&mut scope)?;
                if scope.changed {
                    scope.transaction.commit()?;
                }
                Ok((value, scope.freed))
            });
            match done {
                Ok((value, freed)) => return Ok((value, self.watches.note(&freed, now))),
                Err(Fault::Full) => database.grow()?,
                Err(Fault::FencesSpent) => return Err(Stop::FencesSpent),
                Err(Fault::Failed(error)) => return Err(error.into()),
            }
        }
    }

    /// Notices that the files are not the store's any more.
    #[inline]
    fn look(&self, guard: &Guard<'_>, now: Boottime, database: &Database) -> Result<(), Stop> {
        // SAFETY: as in `run`.
        let last_look = unsafe { &mut *self.last_look.get() };
        if now.since(*last_look) >= LOOK_EVERY {
            match self.name_leads() {
                Leads::Here => *last_look = now,
                // The next operation looks again.
                Leads::Elsewhere => return Err(Stop::Gone),
                Leads::Nowhere => guard.retire(),
            }
        }
        if guard.is_retired() || database.is_lost() {
            return Err(Stop::Gone);
        }
        Ok(())
    }

    /// Whether who opens the store now would find other files.
    #[cold]
    fn name_leads(&self) -> Leads {
        let found = fs::symlink_metadata(&self.path).map(|found| identity(&found));
        match found {
            Ok(found) if found == self.identity => Leads::Here,
            _ if self.claims[0].metadata().is_ok_and(|found| found.nlink() == 0) => Leads::Nowhere,
            Ok(_) => Leads::Elsewhere,
            // To who has changed its root directory or given up its rights, the path may lead nowhere.
            Err(_) if self.directory.is_displaced(&self.name, self.identity) => Leads::Elsewhere,
            Err(_) => Leads::Here,
        }
    }

    /// Reserves more fences, unless somebody else just has.
    pub fn reserve_fences(&self, deadline: Instant) -> Result<(), Stop> {
        let directory = &*self.directory;
        let opening = directory.lock_opening(deadline)?;
        let guard = self.control.lock_until(deadline)?;
        // SAFETY: the mutex is held.
        let database = unsafe { &mut *self.database.get() };
        self.look(&guard, Boottime::now(), database)?;
        reserve_fences(&guard, database, directory, &opening)?;
        Ok(())
    }

    /// Makes watches look elsewhere, and ends the thread that listens for them.
    pub fn close(&self) {
        self.watches.close();
    }
}

/// Raises the ceiling, if the next transaction has no fence under it.
fn reserve_fences(
    guard: &Guard<'_>,
    database: &mut Database,
    directory: &Directory,
    opening: &Opening,
) -> Result<(), StoreError> {
    let number = loop {
        let begun = database.begin().map(|transaction| transaction.number());
        match begun {
            Ok(number) => break number,
            Err(Fault::Failed(error)) => return Err(error),
            Err(_) => database.grow()?,
        }
    };
    let spent = match guard.fences() {
        Some((base, ceiling)) if base.saturating_add(number) < ceiling => return Ok(()),
        Some((base, ceiling)) => ceiling - base,
        None => 0,
    };
    // Who uses them up quickly gets more at once.
    let block = spent.clamp(fence::FIRST_BLOCK, fence::LARGEST_BLOCK);
    let reserved = fence::reserve(directory, opening, block)?;
    match guard.fences() {
        // Nobody else has reserved since: the numbers go on.
        Some((base, ceiling)) if ceiling == reserved.start => guard.set_fences(base, reserved.end),
        _ => guard.set_fences(reserved.start.saturating_sub(number), reserved.end),
    }
    Ok(())
}

impl Drop for Environment {
    fn drop(&mut self) {
        if self.generation != process::generation() {
            // A forked child leaves its parent's alone: its locks, its map, its announcements.
            return;
        }
        self.close();
        for claim in &self.claims {
            // Closing alone would leave it locked while a forked child has the descriptor.
            let _ = claim.unlock();
        }
        // SAFETY: dropped once, and nobody else has `self`.
        unsafe { ManuallyDrop::drop(&mut self.database) };
    }
}

/// The pair of files, while this process alone may open, make and replace it.
struct Opener<'a> {
    directory: Arc<Directory>,
    surroundings: &'a Surroundings,
    deadline: Instant,
    opening: &'a Opening,
}

/// The two files, by what is wrong with them.
enum Found {
    /// Nothing is wrong.
    Whole(Box<Environment>),
    /// The data is whole and nobody uses it: it needs another control file.
    NeedsControl,
    /// There is nothing, or nothing that can be kept.
    Nothing,
}

impl Opener<'_> {
    fn open(&self) -> Result<Environment, StoreError> {
        self.remove_leftovers()?;
        match self.find()? {
            Found::Whole(environment) => return Ok(*environment),
            Found::NeedsControl => self.make_control()?,
            Found::Nothing => {
                self.make_data()?;
                self.make_control()?;
            }
        }
        match self.find()? {
            Found::Whole(environment) => Ok(*environment),
            _ => Err(StoreError::unreachable(format!(
                "the files just made in {} are gone again: somebody removes them",
                self.directory.place.path.display()
            ))),
        }
    }

    fn control_name(&self) -> String {
        format!("{CONTROL}{}", self.surroundings.boot_id)
    }

    fn data_name(&self) -> String {
        format!("{DATA}{}", self.surroundings.boot_id)
    }

    fn shown(&self, name: &str) -> String {
        self.directory.shown(name).display().to_string()
    }

    /// Removes what was being made when its maker died, and what other boots left.
    fn remove_leftovers(&self) -> Result<(), StoreError> {
        for name in self.directory.names()? {
            let Some(rest) = name.strip_prefix(CONTROL).or_else(|| name.strip_prefix(DATA)) else { continue };
            let of_this_boot = rest.starts_with(&self.surroundings.boot_id);
            if of_this_boot && !rest.ends_with(NEW) {
                continue;
            }
            // Another machine may share the directory, and its files with it: they are in use then.
            if let Ok(Some(file)) = self.directory.open_file(&name)
                && file.try_lock().is_ok()
            {
                self.directory.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Opens the pair, if it is there and whole; puts aside what cannot be used.
    fn find(&self) -> Result<Found, StoreError> {
        let (control_name, data_name) = (self.control_name(), self.data_name());
        let control = self.directory.open_file(&control_name)?;
        let data = self.directory.open_file(&data_name)?;
        let (Some(control), Some(data)) = (&control, &data) else {
            if let Some(control) = &control {
                self.retire(control)?;
            }
            return match &data {
                // Whoever had it open had another mutex in front of it.
                Some(data) if self.is_unused(data)? => self.keep_data(data),
                _ => self.replace(&[&control_name, &data_name]),
            };
        };
        let data_inode = self.directory.look(&data_name, data)?.ino();
        match self.open_control(control)? {
            Ok(opened) if opened.data_inode() != data_inode => {
                self.retire_opened(&opened)?;
                self.replace(&[&control_name, &data_name])
            }
            Ok(opened) => self.join(opened, control, data),
            Err(Unfit::Elsewhere { pid_namespace, time_namespace }) => {
                // Nobody who could own the mutex is left, and the leases mean the same if time does.
                if time_namespace == self.surroundings.time_namespace && self.both_unused(control, data)? {
                    return self.keep_data(data);
                }
                Err(self.elsewhere(pid_namespace, time_namespace))
            }
            Err(Unfit::Damaged(what)) => {
                self.need_to_be_alone(control, data, &what)?;
                self.put_aside(&control_name, &what)?;
                self.keep_data(data)
            }
        }
    }

    fn open_control(&self, file: &File) -> Result<Result<Control, Unfit>, StoreError> {
        let name = self.shown(&self.control_name());
        let file = file.try_clone().map_err(|error| failed(format_args!("{name} could not be opened"), &error))?;
        Control::open(file, &name, self.surroundings)
    }

    /// Joins those who use the pair.
    fn join(&self, control: Control, control_file: &File, data_file: &File) -> Result<Found, StoreError> {
        let (control_name, data_name) = (self.control_name(), self.data_name());
        self.claim(control_file, &control_name)?;
        self.claim(data_file, &data_name)?;
        let control = Arc::new(control);
        let guard = control.lock_until(self.deadline)?;
        if guard.is_retired() {
            // Somebody died while he replaced the pair, or noticed that others had removed it.
            drop(guard);
            self.replace(&[&control_name, &data_name])
        } else if let Err(what) = Database::check(data_file, &self.shown(&data_name))? {
            drop(guard);
            let _ = (control_file.unlock(), data_file.unlock());
            self.need_to_be_alone(control_file, data_file, &what)?;
            self.put_aside(&data_name, &what)?;
            self.replace(&[&control_name])
        } else {
            let duplicate = |file: &File, name: &str| {
                file.try_clone()
                    .map_err(|error| failed(format_args!("{} could not be opened", self.shown(name)), &error))
            };
            let claims = [duplicate(control_file, &control_name)?, duplicate(data_file, &data_name)?];
            let mut database = Database::open(duplicate(data_file, &data_name)?, &self.shown(&data_name))?;
            reserve_fences(&guard, &mut database, &self.directory, self.opening)?;
            drop(guard);
            let found = self.directory.look(&control_name, control_file)?;
            Ok(Found::Whole(Box::new(Environment {
                watches: Watches::new(Arc::clone(&control)),
                control,
                database: ManuallyDrop::new(UnsafeCell::new(database)),
                last_look: UnsafeCell::new(Boottime::ZERO),
                claims,
                path: self.directory.shown(&control_name),
                name: control_name,
                identity: identity(&found),
                generation: process::generation(),
                directory: Arc::clone(&self.directory),
            })))
        }
    }

    /// Says that the file is in use.
    fn claim(&self, file: &File, name: &str) -> Result<(), StoreError> {
        match file.try_lock_shared() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => {
                Err(StoreError::unreachable(format!("store busy: somebody has locked {}", self.shown(name))))
            }
            Err(TryLockError::Error(error)) => {
                Err(failed(format_args!("{} could not be locked", self.shown(name)), &error))
            }
        }
    }

    /// Whether nobody has the file open as a store. Whoever wants to is kept waiting by `opening`.
    fn is_unused(&self, file: &File) -> Result<bool, StoreError> {
        match file.try_lock() {
            Ok(()) => {
                let _ = file.unlock();
                Ok(true)
            }
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(failed("a lock could not be asked for", &error)),
        }
    }

    fn both_unused(&self, control: &File, data: &File) -> Result<bool, StoreError> {
        Ok(self.is_unused(control)? && self.is_unused(data)?)
    }

    fn need_to_be_alone(&self, control: &File, data: &File, what: &str) -> Result<(), StoreError> {
        if self.both_unused(control, data)? {
            return Ok(());
        }
        Err(StoreError::rejected(format!(
            "{what}, and other processes have it open: end them, and it is set aside when it is opened next"
        )))
    }

    /// Keeps a data file that nobody uses, if it is whole; the control file is made anew.
    fn keep_data(&self, data: &File) -> Result<Found, StoreError> {
        let name = self.data_name();
        match Database::check(data, &self.shown(&name))? {
            Ok(()) => Ok(Found::NeedsControl),
            Err(what) => {
                self.put_aside(&name, &what)?;
                self.replace(&[&self.control_name()])
            }
        }
    }

    /// Removes what is to be made anew. Those who have it open still find it retired, or without a name.
    fn replace(&self, names: &[&str]) -> Result<Found, StoreError> {
        for name in names {
            self.directory.remove(name)?;
        }
        Ok(Found::Nothing)
    }

    fn put_aside(&self, name: &str, what: &str) -> Result<(), StoreError> {
        let aside = format!("{name}{DAMAGED}{}", clock::wall_millis());
        self.directory.rename(name, &aside)?;
        tracing::warn!("{what}; it was set aside as {}, and the locks in it are lost", self.shown(&aside));
        Ok(())
    }

    /// Tells those who use a control file that nothing may be granted under it any more.
    fn retire(&self, control: &File) -> Result<(), StoreError> {
        match self.open_control(control)? {
            Ok(control) => self.retire_opened(&control),
            // Nobody here could have been granted anything under it.
            Err(_) => Ok(()),
        }
    }

    fn retire_opened(&self, control: &Control) -> Result<(), StoreError> {
        control.lock_until(self.deadline)?.retire();
        Ok(())
    }

    fn elsewhere(&self, pid_namespace: u64, time_namespace: u64) -> StoreError {
        let ours = self.surroundings;
        let (kind, theirs, ours) = if pid_namespace != ours.pid_namespace {
            ("PID", pid_namespace, ours.pid_namespace)
        } else {
            ("time", time_namespace, ours.time_namespace)
        };
        StoreError::bad_config(format!(
            "{} is used from {kind} namespace {theirs}, and this process is in {ours}: containers cannot share a \
             store, give each its own directory",
            self.directory.place.path.display()
        ))
    }

    fn make_data(&self) -> Result<(), StoreError> {
        let name = self.data_name();
        let new = format!("{name}{NEW}");
        self.directory.remove(&new)?;
        let made = self.directory.create_file(&new).and_then(|file| Database::create(file, &self.shown(&new)));
        self.made(&new, &name, made.map(drop))
    }

    fn make_control(&self) -> Result<(), StoreError> {
        let name = self.control_name();
        let new = format!("{name}{NEW}");
        let data_name = self.data_name();
        let Some(data) = self.directory.open_file(&data_name)? else { return Ok(()) };
        let inode = self.directory.look(&data_name, &data)?.ino();
        self.directory.remove(&new)?;
        let made = self
            .directory
            .create_file(&new)
            .and_then(|file| Control::create(&file, &self.shown(&new), self.surroundings, inode));
        self.made(&new, &name, made)
    }

    /// Gives a file its name, now that it is whole; or takes it away.
    fn made(&self, new: &str, name: &str, made: Result<(), StoreError>) -> Result<(), StoreError> {
        match made.and_then(|()| self.directory.rename(new, name)) {
            Ok(()) => Ok(()),
            Err(error) => {
                let _ = self.directory.remove(new);
                Err(error)
            }
        }
    }
}
