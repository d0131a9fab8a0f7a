//! A data file and its control file, open: running transactions on them, while they are the store's.

use std::cell::UnsafeCell;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::{Control, Guard};
use super::database::{Database, Fault};
use super::directory::{Directory, Identity, Leads, failed, identity};
use super::reservation;
use super::rules::Scope;
use super::wake::{Calls, Freed, Watches};
use crate::clock::Boottime;
use crate::store::StoreError;
use crate::sys::descriptor::Own;
use crate::sys::process;

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
    claims: [Own<File>; 2],
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
        let identity = identity(&directory.look(&name, &claims[0])?);
        let [control_claim, data_claim] = claims.map(|claim| {
            Own::private(claim).map_err(|error| {
                failed(format_args!("{} could not be looked at", directory.shown(&name).display()), &error)
            })
        });
        Ok(Environment {
            watches: Watches::new(Arc::clone(&control)),
            control,
            database: ManuallyDrop::new(UnsafeCell::new(database)),
            last_look: UnsafeCell::new(Boottime::ZERO),
            identity,
            claims: [control_claim?, data_claim?],
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
        // A forked child need not disturb its parent by taking the mutex.
        self.of_this_process()?;
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
        self.of_this_process()?;
        self.run(&self.control.lock_until(deadline)?, operation)
    }

    #[inline]
    fn run<T>(
        &self,
        guard: &Guard<'_>,
        operation: impl Fn(&mut Scope) -> Result<T, Fault>,
    ) -> Result<(T, Calls), Stop> {
        loop {
            self.of_this_process()?;
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
            // In a child that a signal's handler forked meanwhile, this was done in a copy: see `section`.
            self.of_this_process()?;
            match done {
                Ok((value, freed)) => return Ok((value, self.watches.note(&freed, now))),
                // Found closed just now: opened anew, it can grow.
                Err(Fault::Full) if !database.is_open() => return Err(Stop::Gone),
                Err(Fault::Full) => database.grow()?,
                Err(Fault::FencesSpent) => return Err(Stop::FencesSpent),
                Err(Fault::Failed(error)) => return Err(error.into()),
            }
        }
    }

    pub fn is_of_this_process(&self) -> bool {
        self.generation == process::generation()
    }

    fn of_this_process(&self) -> Result<(), Stop> {
        if self.is_of_this_process() { Ok(()) } else { Err(StoreError::forked().into()) }
    }

    /// Notices that the files are not the store's any more.
    #[inline]
    fn look(&self, guard: &Guard<'_>, now: Boottime, database: &Database) -> Result<(), Stop> {
        // SAFETY: as in `run`.
        let last_look = unsafe { &mut *self.last_look.get() };
        if now.since(*last_look) >= LOOK_EVERY {
            if !(self.is_open() && database.is_open()) {
                return Err(Stop::Gone);
            }
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

    /// Whether the program has left the descriptors open.
    pub fn is_open(&self) -> bool {
        self.claims.iter().all(Own::is_ours) && self.directory.is_open()
    }

    /// Which file is the control file.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Reserves more fences, unless somebody else just has.
    pub fn reserve_fences(&self, deadline: Instant) -> Result<(), Stop> {
        let directory = &*self.directory;
        if !directory.is_open() {
            return Err(Stop::Gone);
        }
        let opening = directory.lock_opening(deadline)?;
        let guard = self.control.lock_until(deadline)?;
        self.of_this_process()?;
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
        for claim in self.claims.iter().filter_map(|claim| claim.get().ok()) {
            // Closing alone would leave it locked while a forked child has the descriptor.
            let _ = claim.unlock();
        }
        // SAFETY: dropped once, and nobody else has `self`.
        unsafe { ManuallyDrop::drop(&mut self.database) };
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::super::opener;
    use super::super::place::Place;
    use super::super::surroundings::Surroundings;
    use super::*;
    use crate::url::Url;

    /// A store of one test's own.
    fn opened(name: &str) -> (Environment, PathBuf) {
        let path = std::env::temp_dir().join(format!("nblock-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        (open(&path), path)
    }

    fn open(path: &Path) -> Environment {
        let place = Place::choose(&Url::parse(&format!("embedded:{}", path.display())).unwrap()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let directory = Arc::new(Directory::open(&place).unwrap());
        let open = opener::open(directory, &Surroundings::of_this_process().unwrap(), 0, deadline);
        open.unwrap_or_else(|error| panic!("{}", error.message))
    }

    struct Thread(std::sync::mpsc::Sender<()>);

    impl std::task::Wake for Thread {
        fn wake(self: Arc<Self>) {
            let _ = self.0.send(());
        }
    }

    /// A process that frees a key may be killed between its commit and its call: at any point a waiter is woken all the same,
    /// by a look once a second (R10).
    #[test]
    fn a_waiter_is_woken_although_the_releaser_was_killed_before_its_call() {
        let (waits, path) = opened("unrung");
        let releases = open(&path);
        let deadline = Instant::now() + Duration::from_secs(60);
        let hash = crate::key::KeyHash([7; 20]);
        let free = |scope: &mut Scope| {
            scope.freed.push(hash);
            Ok(())
        };
        type Kill<'a> = &'a dyn Fn();
        let without_a_call: Kill = &|| {
            let Ok(((), _never_made)) = releases.run_until(deadline, free) else { panic!("the mutex is to be had") };
        };
        let inside_the_mutex: Kill = &|| {
            // A thread that ends with the mutex is as one that was killed.
            std::thread::scope(|scope| {
                scope.spawn(|| std::mem::forget(releases.control.lock_until(deadline).unwrap_or_else(|_| panic!())));
            });
        };
        for kill in [without_a_call, inside_the_mutex] {
            let mut watch = waits.watches().watch(hash);
            let (sender, woken) = std::sync::mpsc::channel();
            let waker = std::task::Waker::from(Arc::new(Thread(sender)));
            assert!(watch.poll(&std::task::Context::from_waker(&waker)).is_pending());
            kill();
            // Its announcement is renewed, and so it looks, after 25 s in any case.
            woken.recv_timeout(Duration::from_secs(15)).expect("it is woken");
            assert!(watch.poll(&std::task::Context::from_waker(&waker)).is_ready());
        }
        drop((waits, releases));
        fs::remove_dir_all(&path).unwrap();
    }

    /// As the handler of a signal may do it: the child goes on with the change in a copy, and is told in the end.
    #[test]
    fn a_fork_in_the_middle_of_a_change_changes_nothing_for_others() {
        let (environment, path) = opened("section");
        let deadline = Instant::now() + Duration::from_secs(60);
        let child = Cell::new(-1);
        let done = environment.run_until(deadline, |scope| {
            // SAFETY: the child does what its parent does, and ends without anything of the parent's but that.
            child.set(unsafe { libc::fork() });
            let name: &[u8] = if child.get() == 0 { b"child" } else { b"parent" };
            scope.transaction.replace(name, 5)?.copy_from_slice(b"value");
            scope.changed = true;
            Ok(())
        });
        if child.get() == 0 {
            let forked = matches!(done, Err(Stop::Failed(error)) if error.kind == crate::store::StoreErrorKind::Forked);
            // Nor does it get into the store by its parent's doors after that.
            let again = environment.try_run(|_| Ok(()));
            let refused = matches!(again, Err(Stop::Busy | Stop::Failed(_)));
            // SAFETY: ends the child.
            unsafe { libc::_exit(if forked && refused { 0 } else { 1 }) };
        }
        assert!(done.is_ok());
        let mut status = 0;
        // SAFETY: writes one integer.
        assert_eq!(unsafe { libc::waitpid(child.get(), &mut status, 0) }, child.get());
        assert_eq!(status, 0, "1: it was not told; a signal: it could not go on");
        let found = environment.run_until(deadline, |scope| {
            Ok((scope.transaction.find(b"parent")?.is_some(), scope.transaction.find(b"child")?.is_some()))
        });
        let Ok(((parents, childs), _)) = found else { panic!("it was not found") };
        assert!(parents && !childs);
        drop(environment);
        fs::remove_dir_all(&path).unwrap();
    }
}
