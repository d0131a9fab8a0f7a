//! The memory that the command's arguments came in, which `ps` shows to everybody.

use std::ffi::{CStr, OsString, c_char, c_int};
use std::os::unix::ffi::OsStringExt as _;

/// What `main` was given.
#[derive(Clone, Copy)]
pub struct ArgumentsMemory {
    count: usize,
    arguments: *mut *mut c_char,
}

impl ArgumentsMemory {
    /// # Safety
    /// They are what the C library gave `main`: so many pointers to strings that live as long as the
    /// process and are writable, and nobody else uses them.
    pub unsafe fn new(count: c_int, arguments: *mut *mut c_char) -> ArgumentsMemory {
        ArgumentsMemory { count: count.max(0) as usize, arguments }
    }

    /// Copies of the arguments.
    pub fn copied(&self) -> Vec<OsString> {
        // SAFETY: the strings of `main`, of which there are so many.
        let text = |index| unsafe { CStr::from_ptr(*self.arguments.add(index)) };
        (0..self.count).map(|index| OsString::from_vec(text(index).to_bytes().to_vec())).collect()
    }

    /// Overwrites the passwords of store URLs in the arguments up to `--`, so that no process list shows
    /// them (R21). To be called before there are threads, once the arguments were copied.
    pub fn hide_passwords(self) {
        for index in 1..self.count {
            // SAFETY: `main`'s arguments: so many pointers to strings that live as long as the process,
            // are writable, and are read by nobody else now.
            let text = unsafe {
                let argument = *self.arguments.add(index);
                let length = CStr::from_ptr(argument).count_bytes();
                std::slice::from_raw_parts_mut(argument.cast::<u8>(), length)
            };
            if text == b"--" {
                return;
            }
            for password in [password(text), sentinels_password(text)].into_iter().flatten() {
                text[password].fill(b'*');
            }
        }
    }
}

/// Where the value of the option stands that is a password, too.
fn sentinels_password(text: &[u8]) -> Option<std::ops::Range<usize>> {
    const OPTION: &[u8] = b"sentinel_password=";
    let start = text.windows(OPTION.len()).position(|part| part == OPTION)? + OPTION.len();
    Some(start..text[start..].iter().position(|&byte| byte == b'&').map_or(text.len(), |at| start + at))
}

/// Where the password of a store URL stands in a text: taken apart as `nblock::url` does.
fn password(text: &[u8]) -> Option<std::ops::Range<usize>> {
    let start = text.windows(3).position(|part| part == b"://")? + 3;
    let end = text[start..].iter().position(|byte| matches!(byte, b'/' | b'?')).map_or(text.len(), |at| start + at);
    let at = start + text[start..end].iter().rposition(|&byte| byte == b'@')?;
    let colon = start + text[start..at].iter().position(|&byte| byte == b':')?;
    Some(colon + 1..at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_passwords() {
        let found = |text: &str| password(text.as_bytes()).map(|range| text[range].to_string());
        assert_eq!(found("--url=rethinkdb://u:p@ss:w@host:1/db").as_deref(), Some("p@ss:w"));
        assert_eq!(found("rethinkdb://u:hunter2@a?x=@").as_deref(), Some("hunter2"));
        assert_eq!(found("rethinkdb://u@host:28015/db"), None);
        assert_eq!(found("redis://:hunter2@h").as_deref(), Some("hunter2"));
        let text = b"redis+sentinel://h/name?sentinel_password=hunter2&skew=1";
        assert_eq!(&text[super::sentinels_password(text).unwrap()], b"hunter2");
        assert_eq!(found("rethinkdb://host:28015/a:b@c"), None);
        assert_eq!(found("embedded:/dir"), None);
    }
}
