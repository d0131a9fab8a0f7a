//! What can go wrong, in the words of the library.

use std::fmt;

/// Why a call did not do what it was asked to.
///
/// The message names the value and says what to do; the kind is for programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: Box<str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The lock was not granted in time.
    Unavailable,
    /// The hold ended without our unlock.
    Lost,
    /// No such record.
    NotFound,
    /// The operation was cancelled.
    Cancelled,
    /// The call does not fit the state: already locked, not locked, client closed.
    InvalidOp,
    /// An argument is wrong; nothing was done.
    InvalidArgument,
    /// The store could not be reached; nothing was applied.
    Unreachable,
    /// The request may or may not have been applied.
    Indeterminate,
    /// The store refused the credentials or the permission.
    Denied,
    /// The store refused the request, or what it holds is damaged.
    Store,
    /// The hold, or the operation, belongs to the process this one was forked from.
    Forked,
    /// A defect of the library.
    Internal,
    /// The system gave no memory, thread, descriptor or space.
    Resources,
}

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into().into_boxed_str() }
    }

    pub fn invalid_argument(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidArgument, message)
    }

    pub fn invalid_op(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidOp, message)
    }

    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
