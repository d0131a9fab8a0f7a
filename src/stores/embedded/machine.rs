//! The machine, its boot, and the namespaces of this process: they must be the same for all processes that share a
//! table.
//!
//! The boot id is not enough: a container may have one of its own (systemd-nspawn does that). A file that seems to be
//! left over from an earlier boot may then be in use, or have leases that have not ended.

use std::io;

use super::directory::failed;
use crate::clock::Boottime;
use crate::store::StoreError;
use crate::sys::process;

/// The machine, its boot and its namespaces, as this process sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub boot_id: String,
    /// Mutexes name their owner by its thread number in a PID namespace.
    pub pid_namespace: u64,
    /// `CLOCK_BOOTTIME` differs between time namespaces. 0 on kernels without them.
    pub time_namespace: u64,
    pub host: String,
}

impl Machine {
    pub fn of_this_process() -> Result<Machine, StoreError> {
        const PID_NAMESPACE: &str = "/proc/self/ns/pid";
        Ok(Machine {
            boot_id: process::boot_id().map_err(|error| without_proc(process::BOOT_ID, &error))?,
            pid_namespace: process::namespace(PID_NAMESPACE).map_err(|error| without_proc(PID_NAMESPACE, &error))?,
            time_namespace: process::namespace("/proc/self/ns/time").unwrap_or(0),
            host: process::host_name(),
        })
    }
}

fn without_proc(path: &str, error: &io::Error) -> StoreError {
    failed(
        format_args!("the embedded store needs /proc: mount it (after chroot, in the new root directory); {path}"),
        error,
    )
}

/// The inode number of the initial PID namespace (linux/proc_ns.h: PROC_PID_INIT_INO). It exists as long as the machine
/// runs, unlike a container's.
const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// A clock that shows an earlier time than this (2020) was never set.
const CLOCK_SET: u64 = 1_577_836_800;

/// How far two readings may differ: a leap second, and rounding.
const TOLERANCE: u64 = 2;

/// When the machine was started, in seconds since 1970, by the clock as it is set now; 0 if this is not known.
pub fn start() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "));
    line.and_then(|seconds| seconds.trim().parse().ok()).unwrap_or(0)
}

/// When and where a file was made, as its header says.
pub struct Made {
    /// What [`start`] returned when the file was made.
    pub started_at: u64,
    /// In nanoseconds of boot time.
    pub made_at: u64,
    pub pid_namespace: u64,
}

impl Made {
    /// Whether the file was made since the machine was started, and not in a container that may have ended.
    ///
    /// If the clock was set since, this is not known, and the result is `false`.
    pub fn is_of_this_run(&self, pid_namespace: u64) -> bool {
        [pid_namespace, FIRST_PID_NAMESPACE].contains(&self.pid_namespace)
            && is_one(self.started_at, self.made_at, start(), Boottime::now().as_nanos())
    }
}

fn is_one(started_at: u64, made_at: u64, start: u64, now: u64) -> bool {
    started_at >= CLOCK_SET && started_at.abs_diff(start) <= TOLERANCE && made_at <= now
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_run_is_told_from_others() {
        const START: u64 = CLOCK_SET + 1000;
        assert!(is_one(START, 5, START, 5) && is_one(START + 1, 5, START, 6));
        assert!(!is_one(START - 60, 5, START, 6), "an earlier boot");
        assert!(!is_one(START, 7, START, 6), "an earlier boot of a machine whose clock stands still while it is off");
        assert!(!is_one(0, 5, 0, 6), "a machine whose clock was not set");
        let made = |pid_namespace| Made { started_at: start(), made_at: Boottime::now().as_nanos(), pid_namespace };
        assert!(made(7).is_of_this_run(7) && made(FIRST_PID_NAMESPACE).is_of_this_run(7));
        assert!(!made(8).is_of_this_run(7), "a container that may have ended");
    }
}
