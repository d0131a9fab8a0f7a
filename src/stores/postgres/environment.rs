//! What of a connection the environment may say: libpq's variables fill in what a URL leaves out.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::stores::network::address::Address;

/// A variable of the environment that is set and not empty. A program that runs with more rights than its caller
/// takes nothing from the environment (R25).
pub fn variable(name: &str) -> Option<String> {
    if is_privileged() {
        return None;
    }
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn is_privileged() -> bool {
    // SAFETY: reads a number that the kernel gave this program at its start.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// The account that this program runs under, as libpq takes it for the name of the role.
pub fn account() -> Option<String> {
    let mut space = vec![0 as libc::c_char; 4096];
    // SAFETY: plain integers and pointers, which the call fills in.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: the space is as long as is said; what the entry points to lies in it.
    let status = unsafe { libc::getpwuid_r(libc::geteuid(), &mut entry, space.as_mut_ptr(), space.len(), &mut found) };
    if status != 0 || found.is_null() {
        return None;
    }
    // SAFETY: a name that was found ends with a NUL, in the space that is still there.
    let name = unsafe { std::ffi::CStr::from_ptr(entry.pw_name) };
    name.to_str().ok().map(str::to_string)
}

/// The password for a connection in libpq's password file: lines of host, port, database, user and password, where a
/// star is any. A file that others may read does not count, as with libpq.
pub fn password_in(file: &Path, host: &Address, database: &str, user: &str) -> Option<String> {
    let mode = std::fs::metadata(file).ok().filter(std::fs::Metadata::is_file)?.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!("the password file {} is ignored, because others can read it: chmod 0600", file.display());
        return None;
    }
    let text = std::fs::read_to_string(file).ok()?;
    let (name, port) = match host {
        Address::Tcp { host, port } => (host.clone(), port.to_string()),
        // libpq calls all sockets so, but for directories that are named.
        Address::Unix(path) => {
            let port = path.extension().map(|port| port.to_string_lossy().into_owned()).unwrap_or_default();
            ("localhost".to_string(), port)
        }
    };
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = fields(line);
        let [given_host, given_port, given_database, given_user, password] = <[String; 5]>::try_from(fields).ok()?;
        let is = |given: &str, ours: &str| given == "*" || given == ours;
        (is(&given_host, &name) && is(&given_port, &port) && is(&given_database, database) && is(&given_user, user))
            .then_some(password)
    })
}

/// What stands between the colons of a line. A backslash takes the next character as it is.
fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        let count = fields.len();
        let last = &mut fields[count - 1];
        match character {
            '\\' => last.extend(characters.next()),
            // The password is the rest.
            ':' if count < 5 => fields.push(String::new()),
            other => last.push(other),
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_of_a_file() {
        let file = std::env::temp_dir().join(format!("nblock-pgpass-{}", std::process::id()));
        std::fs::write(&file, "# h:1:d:u:no\nh:1:d:v:other\nh:*:d:u:a\\:b:c\n*:*:*:*:any\n").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let host = |name: &str| Address::Tcp { host: name.into(), port: 1 };
        assert_eq!(password_in(&file, &host("h"), "d", "u").as_deref(), Some("a:b:c"));
        assert_eq!(password_in(&file, &host("i"), "d", "u").as_deref(), Some("any"));
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(password_in(&file, &host("h"), "d", "u"), None);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(password_in(&file, &host("h"), "d", "u"), None);
    }
}
