//! Why the command ends without having done what it was asked to, and with which exit status.

use std::{fmt, io};

use nblock::error::{Error, ErrorKind};

use crate::standard;

/// Exit statuses; those of sysexits.h but for the first and the last two.
pub mod status {
    /// Nothing was found.
    pub const NOTHING: u8 = 1;
    pub const USAGE: u8 = 64;
    pub const DATA: u8 = 65;
    /// The store could not be reached.
    pub const UNREACHABLE: u8 = 69;
    pub const INTERNAL: u8 = 70;
    pub const SYSTEM: u8 = 71;
    pub const INPUT_OUTPUT: u8 = 74;
    /// The lock was not granted in time ("temporary failure").
    pub const UNAVAILABLE: u8 = 75;
    /// The lock was lost and the command killed ("remote error in protocol").
    pub const LOST: u8 = 76;
    pub const DENIED: u8 = 77;
    /// The command was found, and cannot be run: as shells have it.
    pub const CANNOT_RUN: u8 = 126;
    /// There is no such command: as shells have it.
    pub const NO_SUCH_COMMAND: u8 = 127;
}

pub struct Failure {
    status: u8,
    message: String,
}

impl Failure {
    pub fn new(status: u8, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into() }
    }

    /// A system call that failed.
    pub fn system(what: &str, error: &io::Error) -> Failure {
        Failure::new(status::SYSTEM, format!("{what}: {error}"))
    }

    pub fn status(&self) -> u8 {
        self.status
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match error.kind() {
            ErrorKind::Unavailable => status::UNAVAILABLE,
            ErrorKind::Lost => status::LOST,
            ErrorKind::NotFound => status::NOTHING,
            ErrorKind::InvalidArgument => status::USAGE,
            ErrorKind::Unreachable | ErrorKind::Indeterminate => status::UNREACHABLE,
            ErrorKind::Denied => status::DENIED,
            ErrorKind::Store => status::DATA,
            ErrorKind::Resources => status::SYSTEM,
            ErrorKind::Cancelled | ErrorKind::InvalidOp | ErrorKind::Forked | ErrorKind::Internal => status::INTERNAL,
        };
        Failure::new(status, error.message())
    }
}

/// Tells people something, on standard error. One that nobody reads any more is no reason to end: a
/// command may be running.
pub fn say(what: fmt::Arguments<'_>) {
    use io::Write as _;
    let _ = io::stderr().write_all(format!("nblock: {what}\n").as_bytes());
}

/// Writes what a command has to say to standard output, all of it or an error.
pub fn write_out(text: &str) -> Result<(), Failure> {
    use io::Write as _;
    if text.is_empty() {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// The result of writing to standard output.
pub fn written(result: io::Result<()>) -> Result<(), Failure> {
    output_is_open()?;
    result.map_err(|error| Failure::new(status::INPUT_OUTPUT, format!("standard output could not be written: {error}")))
}

/// An error where standard output was closed before we were started.
pub fn output_is_open() -> Result<(), Failure> {
    match standard::output_was_closed() {
        true => Err(Failure::new(status::INPUT_OUTPUT, "standard output is closed")),
        false => Ok(()),
    }
}
