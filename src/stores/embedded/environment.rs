//! A data file and its control file, open: running transactions on them, while they are the store's.

use std::cell::UnsafeCell;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::{Control, Guard};
use super::database::{Database, Fault};
use super::directory::{Directory, Identity, Leads, identity};
use super::reservation;
use super::rules::Scope;
use super::wake::{Calls, Freed, Watches};
use crate::clock::Boottime;
use crate::process;
use crate::store::StoreError;

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
    identity: Identity,
    generation: u64,
    directory: Arc<Directory>,
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
    /// `claims`: the control file and the data file, locked as being in use.
    pub fn new(
        directory: Arc<Directory>,
        control: Arc<Control>,
        name: String,
        claims: [File; 2],
        database: Database,
    ) -> Result<Environment, StoreError> {
        Ok(Environment {
            watches: Watches::new(Arc::clone(&control)),
            control,
            database: ManuallyDrop::new(UnsafeCell::new(database)),
            last_look: UnsafeCell::new(Boottime::ZERO),
            identity: identity(&directory.look(&name, &claims[0])?),
            claims,
            name,
            generation: process::generation(),
            directory,
        })
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
            match self.directory.leads(&self.name, &self.claims[0], self.identity) {
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

    /// Reserves more fences, unless somebody else just has.
    pub fn reserve_fences(&self, deadline: Instant) -> Result<(), Stop> {
        let directory = &*self.directory;
        let opening = directory.lock_opening(deadline)?;
        let guard = self.control.lock_until(deadline)?;
        // SAFETY: the mutex is held.
        let database = unsafe { &mut *self.database.get() };
        self.look(&guard, Boottime::now(), database)?;
        reservation::reserve(&guard, database, directory, &opening, 0)?;
        Ok(())
    }

    /// Below this lies every fence that was given out here.
    pub fn fence_ceiling(&self) -> u64 {
        self.control.fence_ceiling()
    }

    /// Makes watches look elsewhere, and ends the thread that listens for them.
    pub fn close(&self) {
        self.watches.close();
    }
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
