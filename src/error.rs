//! The library's errors.

use std::fmt;

/// Why a call failed.
///
/// The message names the value and says what to do; the kind is for programs.
///
/// ```
/// use nblock::{Client, ClientOptions, ErrorKind, wait};
///
/// let error = wait(Client::open(Some("nosuchstore:"), ClientOptions::default())).err().expect("there is no such store");
/// assert_eq!(error.kind(), ErrorKind::InvalidArgument);
/// println!("{error}"); // says what to write instead
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: Box<str>,
}

/// The kind of an error, for programs to decide on.
///
/// ```
/// use nblock::{Error, ErrorKind};
///
/// /// Whether the work may go on after an unlock.
/// fn may_commit(unlocked: Result<(), Error>) -> Result<bool, Error> {
///     match unlocked {
///         Ok(()) => Ok(true),
///         // Another process may have worked at the same time.
///         Err(error) if error.kind() == ErrorKind::Lost => Ok(false),
///         Err(error) => Err(error),
///     }
/// }
/// # assert_eq!(may_commit(Err(Error::new(ErrorKind::Lost, "lost"))), Ok(false));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The lock was not granted before the timeout.
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
    /// The store refused the request, or its data is damaged.
    Store,
    /// The hold or the call belongs to the process that this one was forked from.
    Forked,
    /// A defect of the library.
    Internal,
    /// The system provided no memory, thread, descriptor or space.
    Resources,
}

impl Error {
    /// The error in a child that a signal handler forked in the middle of a call.
    pub(crate) fn forked_during_call() -> Error {
        Error::new(
            ErrorKind::Forked,
            "a signal handler forked this process during the call: the call goes on in the parent process, and this \
             process must repeat it",
        )
    }

    /// An error with a message for people.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into().into_boxed_str() }
    }

    /// An error of the kind [`ErrorKind::InvalidArgument`].
    pub fn invalid_argument(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidArgument, message)
    }

    /// An error of the kind [`ErrorKind::InvalidOp`].
    pub fn invalid_op(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidOp, message)
    }

    /// The kind, for programs.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The message, for people. It contains no token and no password.
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
