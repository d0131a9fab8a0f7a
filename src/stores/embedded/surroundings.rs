//! The boot, the namespaces and the host that this process is in.

use std::os::unix::fs::MetadataExt;

use super::directory::failed;
use crate::store::StoreError;

/// What must be the same for all who share memory with each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surroundings {
    pub boot_id: String,
    /// Robust mutexes name their owner by its number in a PID namespace.
    pub pid_namespace: u64,
    /// `CLOCK_BOOTTIME` differs between time namespaces. 0 on kernels without them.
    pub time_namespace: u64,
    pub host: String,
}

impl Surroundings {
    pub fn of_this_process() -> Result<Surroundings, StoreError> {
        let read = |path: &str| {
            std::fs::read_to_string(path).map(|text| text.trim().to_string()).map_err(|error| {
                failed(format_args!("{path} could not be read, which the embedded store needs"), &error)
            })
        };
        let namespace = |path: &str| std::fs::metadata(path).map(|found| found.ino());
        Ok(Surroundings {
            boot_id: read("/proc/sys/kernel/random/boot_id")?,
            pid_namespace: namespace("/proc/self/ns/pid").map_err(|error| {
                failed("/proc/self/ns/pid could not be looked at, which the embedded store needs", &error)
            })?,
            time_namespace: namespace("/proc/self/ns/time").unwrap_or(0),
            host: read("/proc/sys/kernel/hostname")?,
        })
    }
}
