//! Finding the pair of files, or making it; putting aside what cannot be used.

use std::cell::Cell;
use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Instant;

use super::control::{Control, Unfit};
use super::database::Database;
use super::directory::{self, Directory, Opening, failed};
use super::environment::Environment;
use super::leftovers::{self, Kind, NEW};
use super::reservation;
use super::surroundings::Surroundings;
use crate::clock;
use crate::store::StoreError;

const CONTROL: &str = "control-";
const DATA: &str = "data-";
const DAMAGED: &str = ".damaged-";

const KINDS: [Kind; 2] = [
    Kind { prefix: CONTROL, is_one: Control::is_one, is_begun: Control::is_one, made: Control::made },
    Kind { prefix: DATA, is_one: Database::is_one, is_begun: Database::is_begun, made: |_| None },
];

/// Opens the store's files in a directory, and makes them if they are not there. Fences will be above
/// `fence_floor`.
pub fn open(
    directory: Arc<Directory>,
    surroundings: &Surroundings,
    fence_floor: u64,
    deadline: Instant,
) -> Result<Environment, StoreError> {
    let opening = directory.lock_opening(deadline)?;
    Opener { directory, surroundings, deadline, opening: &opening, fence_floor: Cell::new(fence_floor) }.open()
}

/// The pair of files, while this process alone may open, make and replace it.
struct Opener<'a> {
    directory: Arc<Directory>,
    surroundings: &'a Surroundings,
    deadline: Instant,
    opening: &'a Opening,
    /// Below this lies every fence that was given out under files that are replaced here.
    fence_floor: Cell<u64>,
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
        let (boot_id, pid_namespace) = (&self.surroundings.boot_id, self.surroundings.pid_namespace);
        let left = leftovers::find(&self.directory, self.opening, boot_id, pid_namespace, &KINDS, self.deadline)?;
        for (name, file) in left {
            self.raise_floor(Database::noted_ceiling(&file));
            self.directory.remove(&name)?;
        }
        Ok(())
    }

    /// Takes away a file of ours, or sets aside what has its name.
    fn discard(&self, name: &str) -> Result<(), StoreError> {
        match self.directory.open_file(name)? {
            None => Ok(()),
            Some(file) if is_ours(name, &file) => self.directory.remove(name),
            Some(_) => self.put_aside(name, &format!("{} is no file of nblock's", self.shown(name))),
        }
    }

    fn raise_floor(&self, ceiling: u64) {
        self.fence_floor.set(self.fence_floor.get().max(ceiling));
    }

    /// Opens the pair, if it is there and whole; puts aside what cannot be used.
    fn find(&self) -> Result<Found, StoreError> {
        let (control_name, data_name) = (self.control_name(), self.data_name());
        let control = self.directory.open_file(&control_name)?;
        let data = self.directory.open_file(&data_name)?;
        let (Some(control), Some(data)) = (&control, &data) else {
            if let Some(file) = &control
                && let Ok(control) = self.open_control(file)?
            {
                self.retire(&control, file)?;
            }
            return match &data {
                // Whoever had it open had another mutex in front of it.
                Some(data) if self.is_unused(data)? => self.keep_data(data),
                _ => self.replace_both(data.as_ref()),
            };
        };
        let data_inode = self.directory.look(&data_name, data)?.ino();
        match self.open_control(control)? {
            Ok(opened) if opened.data_inode() != data_inode => {
                self.retire(&opened, control)?;
                self.replace_both(Some(data))
            }
            Ok(opened) => self.join(opened, control, data),
            Err(Unfit::Elsewhere { pid_namespace, time_namespace }) => {
                // Nobody who could own the mutex is left, and the leases mean the same if time does.
                if time_namespace == self.surroundings.time_namespace && self.both_unused(control, data)? {
                    return self.keep_data(data);
                }
                Err(self.elsewhere(pid_namespace, time_namespace))
            }
            Err(Unfit::OtherLibrary { theirs, ours }) => {
                // As above: nobody is left who could own the mutex, and it is made anew.
                if self.both_unused(control, data)? {
                    return self.keep_data(data);
                }
                Err(StoreError::bad_config(format!(
                    "{} is used by programs with another C library ({theirs}; this one has {ours}), whose mutexes are \
                     others: use one build of nblock, or give each its own directory",
                    self.directory.place.path.display()
                )))
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
        if self.both_unused(control_file, data_file)? {
            control.mend()?;
        }
        self.claim(control_file, &control_name)?;
        self.claim(data_file, &data_name)?;
        let control = Arc::new(control);
        let guard = control.lock_until(self.deadline)?;
        if guard.is_retired() {
            // Somebody died while he replaced the pair, or noticed that others had removed it.
            drop(guard);
            self.raise_floor(control.fence_ceiling());
            self.replace_both(Some(data_file))
        } else if let Err(what) = Database::check(data_file, &self.shown(&data_name))? {
            drop(guard);
            let _ = (control_file.unlock(), data_file.unlock());
            self.need_to_be_alone(control_file, data_file, &what)?;
            self.raise_floor(control.fence_ceiling());
            self.put_aside_data(data_file, &what)
        } else {
            let duplicate = |file: &File, name: &str| {
                file.try_clone()
                    .map_err(|error| failed(format_args!("{} could not be opened", self.shown(name)), &error))
            };
            let claims = [duplicate(control_file, &control_name)?, duplicate(data_file, &data_name)?];
            let mut database = Database::open(duplicate(data_file, &data_name)?, &self.shown(&data_name))?;
            reservation::reserve(&guard, &mut database, &self.directory, self.opening, self.fence_floor.get())?;
            drop(guard);
            let directory = Arc::clone(&self.directory);
            Ok(Found::Whole(Box::new(Environment::new(directory, control, control_name, claims, database)?)))
        }
    }

    /// Says that the file is in use.
    fn claim(&self, file: &File, name: &str) -> Result<(), StoreError> {
        // A tmp cleaner may have it for a moment, to see whether it is in use.
        match directory::until(self.deadline, || file.try_lock_shared()) {
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
            Err(what) => self.put_aside_data(data, &what),
        }
    }

    /// Removes what is to be made anew. Those who have it open still find it retired, or without a name.
    fn replace_both(&self, data: Option<&File>) -> Result<Found, StoreError> {
        if let Some(data) = data {
            self.raise_floor(Database::noted_ceiling(data));
        }
        self.discard(&self.control_name())?;
        self.discard(&self.data_name())?;
        Ok(Found::Nothing)
    }

    /// Puts a data file aside, and removes the control file, which goes with it.
    fn put_aside_data(&self, data: &File, what: &str) -> Result<Found, StoreError> {
        self.raise_floor(Database::noted_ceiling(data));
        self.put_aside(&self.data_name(), what)?;
        self.discard(&self.control_name())?;
        Ok(Found::Nothing)
    }

    fn put_aside(&self, name: &str, what: &str) -> Result<(), StoreError> {
        let aside = format!("{name}{DAMAGED}{}", clock::wall_millis());
        self.directory.rename(name, &aside)?;
        tracing::error!("{what}; it was set aside as {}, and the locks in it are lost", self.shown(&aside));
        Ok(())
    }

    /// Tells those who use a control file, if there are any, that nothing may be granted under it any more.
    fn retire(&self, control: &Control, file: &File) -> Result<(), StoreError> {
        self.raise_floor(control.fence_ceiling());
        // Of a copied file, nobody may be left who has its mutex.
        if !self.is_unused(file)? {
            control.lock_until(self.deadline)?.retire();
        }
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
        let made = self.directory.create_file(&new).and_then(|file| Database::create(file, &self.shown(&new)));
        self.made(&new, &name, made.map(drop))
    }

    fn make_control(&self) -> Result<(), StoreError> {
        let name = self.control_name();
        let new = format!("{name}{NEW}");
        let data_name = self.data_name();
        let Some(data) = self.directory.open_file(&data_name)? else { return Ok(()) };
        let inode = self.directory.look(&data_name, &data)?.ino();
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

/// Whether what is in a file is ours, as its name says.
fn is_ours(name: &str, file: &File) -> bool {
    if name.starts_with(CONTROL) { Control::is_one(file) } else { Database::is_one(file) }
}
