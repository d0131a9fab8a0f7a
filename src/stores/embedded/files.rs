//! The open files of the store: the directory and the table in it, as long as they are the ones that other processes
//! use.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::directory::{Directory, PathStatus};
use super::fence::FenceFile;
use super::machine::Machine;
use super::table::{self, Fault, Table};
use super::watches::Watches;
use crate::clock;
use crate::store::StoreError;
use crate::sys::process;

pub struct Files {
    pub table: Arc<Table>,
    pub watches: Arc<Watches>,
    pub directory: Arc<Directory>,
    /// The tick of the kernel's clock at the last check.
    last_look: AtomicU64,
    generation: u64,
}

impl Files {
    /// Opens the table, or creates it. Its fences are at or above `fence_floor`.
    pub fn open(
        directory: Directory,
        machine: &Machine,
        fence_floor: u64,
        deadline: Instant,
    ) -> Result<Files, StoreError> {
        let directory = Arc::new(directory);
        let fences = Arc::new(FenceFile(Arc::clone(&directory)));
        let table = Arc::new(table::open(Arc::clone(&directory), machine, fences, fence_floor, deadline)?);
        Ok(Files {
            watches: Watches::new(Arc::clone(&table)),
            table,
            directory,
            last_look: AtomicU64::new(0),
            generation: process::generation(),
        })
    }

    /// Checks whether the files are still those of the store. To be called before an operation.
    ///
    /// A check costs more than an operation, so one counts until the kernel's next tick, 1 to 10 ms. For that long, a
    /// process may grant a lock in files that were removed, which ends all holds in them anyway. If this library
    /// replaces the file, it marks the old one, and every operation reads the mark with the mutex held: then nothing is
    /// granted in the old file.
    #[inline]
    pub fn look(&self) -> Result<(), Fault> {
        let tick = clock::tick();
        if self.last_look.load(Ordering::Relaxed) == tick { Ok(()) } else { self.look_now(tick) }
    }

    #[cold]
    fn look_now(&self, tick: u64) -> Result<(), Fault> {
        if !self.is_open() {
            return Err(Fault::Gone);
        }
        let file = &self.table.file;
        match self.directory.path_status(file.name(), file.identity(), || file.has_a_name()) {
            PathStatus::Current => {
                self.last_look.store(tick, Ordering::Relaxed);
                Ok(())
            }
            // The next operation checks again.
            PathStatus::Replaced => Err(Fault::Gone),
            PathStatus::Unlinked => {
                self.table.retire();
                Err(Fault::Gone)
            }
        }
    }

    /// Why an operation failed. `Gone` if the program has closed descriptors: the operation is to be repeated after the
    /// files were opened again.
    #[cold]
    pub fn why(&self, fault: Fault) -> Fault {
        match fault {
            Fault::Failed(_) if self.is_of_this_process() && !self.is_open() => Fault::Gone,
            fault => fault,
        }
    }

    /// Whether the descriptors are still ours: the program may have closed them.
    pub fn is_open(&self) -> bool {
        self.table.file.is_open() && self.directory.is_open()
    }

    pub fn is_of_this_process(&self) -> bool {
        self.generation == process::generation()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // A forked child leaves its parent's watches alone.
        if self.is_of_this_process() {
            self.watches.close();
        }
    }
}
