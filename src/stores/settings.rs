//! Settings from outside the program: environment variables, and the machine's configuration file.
//!
//! Both choose the store, and locks in the wrong store exclude no other program. So a setting that cannot be read is
//! never skipped: it is an error that names the variable or the line, but does not show the value, which may be a
//! password.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use crate::error::{Error, ErrorKind};
use crate::sys::process;

/// The file in which a machine's administrator chooses the store for all programs.
pub const MACHINE_FILE: &str = "/etc/nblock.conf";

/// The largest file that is read.
const MACHINE_FILE_MAX: u64 = 64 << 10;

/// An environment variable. `None` if it is unset, empty, or ignored (see [`process::is_privileged`]).
pub fn variable(name: &str) -> Result<Option<String>, Error> {
    if process::is_privileged() { Ok(None) } else { checked(name, std::env::var_os(name)) }
}

/// Which of these variables are set and ignored.
pub fn ignored<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let is_set = |name: &&&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if process::is_privileged() { names.iter().filter(is_set).copied().collect() } else { Vec::new() }
}

fn checked(name: &str, value: Option<OsString>) -> Result<Option<String>, Error> {
    let Some(value) = value.filter(|value| !value.is_empty()) else { return Ok(None) };
    let Ok(value) = value.into_string() else {
        return Err(Error::invalid_argument(format!(
            "{name} is not UTF-8: convert it (in a URL, a byte that is not ASCII may be written as % and its two \
             hexadecimal digits in UTF-8)"
        )));
    };
    check_text(&value).map_err(|what| Error::invalid_argument(format!("{name} {what}")))?;
    Ok(Some(value))
}

/// Refuses control characters: they are there by mistake, and the value would silently name something else. Returns
/// what is wrong.
fn check_text(value: &str) -> Result<(), &'static str> {
    let without_end = value.trim_end_matches(['\n', '\r']);
    if without_end.len() < value.len() && !without_end.chars().any(char::is_control) {
        return Err("ends with a line break: remove it (printf '%s' writes a value without one)");
    }
    if value.chars().any(char::is_control) {
        return Err("has a control character in it: remove it");
    }
    Ok(())
}

/// The settings in [`MACHINE_FILE`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Machine {
    pub url: Option<String>,
    pub directory: Option<String>,
}

impl Machine {
    /// Reads the file. If it does not exist, nothing is set.
    pub fn read() -> Result<Machine, Error> {
        // O_NONBLOCK: if the file is a pipe, opening it must not wait.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(MACHINE_FILE);
        let read = |error: io::Error| match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => {
                Error::new(ErrorKind::Resources, format!("{MACHINE_FILE} could not be read: {error}"))
            }
            _ => Error::new(
                ErrorKind::Denied,
                format!("{MACHINE_FILE} could not be read ({error}): it must be readable by all users (chmod a+r)"),
            ),
        };
        let file = match opened {
            Ok(file) => file,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Machine::default());
            }
            Err(error) => return Err(read(error)),
        };
        let found = file.metadata().map_err(read)?;
        if !found.is_file() {
            return Err(Error::new(ErrorKind::Denied, format!("{MACHINE_FILE} must be a regular file")));
        }
        if found.uid() != 0 {
            return Err(Error::new(
                ErrorKind::Denied,
                format!("{MACHINE_FILE} must belong to root (belongs to user {}): chown root", found.uid()),
            ));
        }
        if found.mode() & 0o022 != 0 {
            return Err(Error::new(
                ErrorKind::Denied,
                format!(
                    "{MACHINE_FILE} must be writable by root only (mode {:04o}): chmod go-w",
                    found.mode() & 0o7777
                ),
            ));
        }
        let mut bytes = Vec::new();
        file.take(MACHINE_FILE_MAX + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > MACHINE_FILE_MAX {
            return Err(Error::invalid_argument(format!("{MACHINE_FILE} must have at most {MACHINE_FILE_MAX} bytes")));
        }
        Machine::parse(&bytes)
    }

    /// Lines of `name = value`; empty lines and those that begin with `#` are ignored.
    fn parse(bytes: &[u8]) -> Result<Machine, Error> {
        let mut machine = Machine::default();
        for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
            let wrong = |what: &str| Error::invalid_argument(format!("{MACHINE_FILE}, line {}: {what}", index + 1));
            let line = std::str::from_utf8(line).map_err(|_| wrong("is not UTF-8"))?.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, value) = line.split_once('=').ok_or_else(|| wrong("must be url = ... or directory = ..."))?;
            let value = value.trim();
            let setting = match name.trim() {
                "url" => &mut machine.url,
                "directory" => &mut machine.directory,
                // The line is not shown: it may be a URL with a password, without `url =` before it.
                _ => return Err(wrong("has an unknown name: write url = ... or directory = ...")),
            };
            if value.is_empty() {
                return Err(wrong("has no value: write one, or remove the line"));
            }
            check_text(value).map_err(wrong)?;
            if setting.replace(value.to_string()).is_some() {
                return Err(wrong("sets what an earlier line has set: remove one of them"));
            }
        }
        Ok(machine)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn variables_are_taken_or_refused_by_name_without_their_value() {
        let value = |bytes: &[u8]| checked("NBLOCK_URL", Some(OsString::from_vec(bytes.to_vec())));
        assert_eq!(checked("NBLOCK_URL", None), Ok(None));
        assert_eq!(value(b""), Ok(None));
        assert_eq!(value(b"memory:"), Ok(Some("memory:".to_string())));
        for (bytes, part) in [
            (&b"rethinkdb://u:hunter2@h/d\n"[..], "line break"),
            (b"rethinkdb://u:hunter2@h/d\r\n", "line break"),
            (b"rethinkdb://u:hunter2\t@h/d", "control character"),
            (b"rethinkdb://u:hunter2\n@h/d\n", "control character"),
            (b"rethinkdb://u:hunter2\xfc@h/d", "UTF-8"),
        ] {
            let error = value(bytes).unwrap_err();
            assert!(error.message().starts_with("NBLOCK_URL ") && error.message().contains(part), "{error}");
            assert!(!error.message().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn the_machines_file_is_taken_or_refused_by_line_without_its_values() {
        let whole = b"# the store of this machine\n\n url = embedded:/run/nblock?group=jobs \ndirectory=/run/x\r\n";
        let machine = Machine::parse(whole).unwrap();
        assert_eq!(machine.url.as_deref(), Some("embedded:/run/nblock?group=jobs"));
        assert_eq!(machine.directory.as_deref(), Some("/run/x"));
        assert_eq!(Machine::parse(b""), Ok(Machine::default()));
        for (text, part) in [
            (&b"\nhunter2"[..], "line 2"),
            (b"rethinkdb://u:hunter2@h/d?tls=1", "unknown name"),
            (b"urls = hunter2", "unknown name"),
            (b"url =", "no value"),
            (b"url = hunter2\nurl = hunter2", "line 2"),
            (b"url = hunter2\tx", "control character"),
            (b"url = hunter2\xff", "UTF-8"),
        ] {
            let error = Machine::parse(text).unwrap_err();
            assert!(error.message().starts_with(MACHINE_FILE) && error.message().contains(part), "{error}");
            assert!(!error.message().contains("hunter2"), "{error}");
        }
    }
}
