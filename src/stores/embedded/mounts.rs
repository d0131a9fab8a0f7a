//! Whether the directory for temporary files is the machine's, or private to this service or container.
//!
//! A service with `PrivateTmp=` sees another directory at `/var/tmp` than other programs: it would use a store of its
//! own there, and exclude no other program.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::path::Path;

use crate::sys::process;

/// The inode numbers of the initial mount namespace, in kernels since 6.18 and before.
const FIRST_NAMESPACES: [u64; 3] = [0xEFFF_FFF8, 0xF000_0000, 0xF000_0001];

/// Why a directory is private to this service or container. `None` if nothing indicates that.
pub fn why_private(path: &Path) -> Option<String> {
    // Reading all mounts takes longer than opening the store, so this is checked first. The directory may not exist
    // yet.
    let there = path.ancestors().find_map(mount_id);
    if there.is_some() && there == mount_id(Path::new("/")) {
        return None;
    }
    let mounts = read_mounts().ok()?;
    let mount = mount_of(&mounts, path)?;
    mount.is_private(sees_the_machines_mounts()).then(|| {
        format!(
            "{} is a private mount of this service or container ({} from {} {})",
            mount.point, mount.kind, mount.device, mount.root
        )
    })
}

/// All mounts that this process sees. Its size is reported as 0: without an initial capacity, it would be read in small
/// pieces, beginning with 32 bytes.
fn read_mounts() -> io::Result<String> {
    let mut mounts = String::with_capacity(64 << 10);
    File::open("/proc/self/mountinfo")?.read_to_string(&mut mounts)?;
    Ok(mounts)
}

/// The number of the mount that a path is on. `None` if the path does not exist, or the kernel does not tell (before
/// 5.8).
fn mount_id(path: &Path) -> Option<u64> {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    // SAFETY: the path ends with a NUL, and the call fills in the buffer; zeros are a valid value of it.
    let found = unsafe {
        match libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_MNT_ID, found.as_mut_ptr()) {
            0 => found.assume_init(),
            _ => return None,
        }
    };
    (found.stx_mask & libc::STATX_MNT_ID != 0).then_some(found.stx_mnt_id)
}

/// Whether this process is in the mount namespace of the machine, or of the container's first process.
fn sees_the_machines_mounts() -> bool {
    let Ok(ours) = process::namespace("/proc/self/ns/mnt") else { return false };
    // Only root can read the first process's.
    process::namespace("/proc/1/ns/mnt").map_or_else(|_| FIRST_NAMESPACES.contains(&ours), |first| first == ours)
}

/// A line of mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount<'a> {
    device: &'a str,
    /// Which directory of the file system is mounted.
    root: &'a str,
    point: &'a str,
    /// Whether the mount was propagated from another mount namespace.
    came_from_elsewhere: bool,
    kind: &'a str,
    options: &'a str,
}

/// The mount that a path is on: the last of those with the longest mount point.
fn mount_of<'a>(mounts: &'a str, path: &Path) -> Option<Mount<'a>> {
    let found = mounts.lines().filter_map(parse).filter(|mount| path.starts_with(mount.point));
    // If there are several, the last one hides the others.
    found.max_by_key(|mount| Path::new(mount.point).components().count())
}

fn parse(line: &str) -> Option<Mount<'_>> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(2);
    let (device, root, point, _) = (before.next()?, before.next()?, before.next()?, before.next()?);
    let came_from_elsewhere = before.any(|field| field.starts_with("master:"));
    let mut after = after.split(' ');
    let (kind, _, options) = (after.next()?, after.next()?, after.next()?);
    Some(Mount { device, root, point, came_from_elsewhere, kind, options })
}

impl Mount<'_> {
    fn is_private(&self, machines: bool) -> bool {
        if self.point == "/" {
            return false;
        }
        if self.root.contains("/systemd-private-") {
            return true;
        }
        // In the machine's own namespace, all programs see the mount.
        if machines {
            return false;
        }
        let subvolume = self.options.split(',').find_map(|option| option.strip_prefix("subvol=")).unwrap_or("/");
        let Ok(directory) = Path::new(self.root).strip_prefix(subvolume) else { return !self.came_from_elsewhere };
        let whole = directory == Path::new("");
        // The machine's own directory, bind-mounted into a container or service at the same path.
        let of_that_name = Path::new(self.point).strip_prefix("/").is_ok_and(|point| point == directory);
        !self.came_from_elsewhere && !of_that_name && (!whole || self.kind == "tmpfs")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether /var/tmp/nblock-0 is private with these mounts in addition to the root's: in the machine's namespace,
    /// and in another.
    fn private(mounts: &str) -> [bool; 2] {
        let mounts = format!("27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n{mounts}\n");
        let mount = mount_of(&mounts, Path::new("/var/tmp/nblock-0")).unwrap();
        [mount.is_private(true), mount.is_private(false)]
    }

    #[test]
    fn a_mount_of_the_services_own_is_told_from_the_machines() {
        assert_eq!(private(""), [false, false], "no mount but the root");
        assert_eq!(private("41 27 8:3 / /var rw shared:5 - xfs /dev/sda3 rw"), [false, false], "a partition");
        assert_eq!(private("41 27 8:3 / /var/tmpx rw - tmpfs tmpfs rw"), [false, false], "another directory");
        let tmpfs = "41 27 0:44 / /var/tmp rw shared:5 - tmpfs tmpfs rw";
        assert_eq!(private(tmpfs), [false, true], "the machine's tmpfs, and a service's own");
        let tmpfs = "41 27 0:44 / /var/tmp rw shared:9 master:5 - tmpfs tmpfs rw";
        assert_eq!(private(tmpfs), [false, false], "the machine's tmpfs, as a service without PrivateTmp sees it");
        let subvolume = "41 27 0:30 /@/var /var rw - btrfs /dev/vda3 rw,space_cache,subvolid=258,subvol=/@/var";
        assert_eq!(private(subvolume), [false, false], "a subvolume");
        let bound = "41 27 0:30 /@/var/x /var/tmp rw - btrfs /dev/vda3 rw,subvolid=258,subvol=/@";
        assert_eq!(private(bound), [false, true], "a directory of a subvolume");
        let service =
            "90 27 254:0 /var/tmp/systemd-private-0a-cron.service-x/tmp /var/tmp rw shared:3 - ext4 /dev/vda rw";
        assert_eq!(private(service), [true, true], "PrivateTmp=");
        let both = format!("41 27 8:3 / /var/tmp rw - ext4 /dev/sda3 rw\n{service}");
        assert_eq!(private(&both), [true, true], "over a partition");
        let same = "41 27 8:1 /var/tmp /var/tmp rw - ext4 /dev/sda1 rw";
        assert_eq!(private(same), [false, false], "the machine's own directory, in a container");
        let kept = format!("{service}\n91 90 8:1 /var/tmp/nblock-0 /var/tmp/nblock-0 rw - ext4 /dev/sda1 rw");
        assert_eq!(private(&kept), [false, false], "BindPaths= beside PrivateTmp=");
        let container = "41 27 8:1 /srv/volumes/a /var/tmp rw - ext4 /dev/sda1 rw";
        assert_eq!(private(container), [false, true], "a container's volume");
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("27 1 254:0 / / rw - ext4"), None);
        assert_eq!(parse("27 1 254:0 / - ext4 /dev/vda rw"), None);
    }
}
