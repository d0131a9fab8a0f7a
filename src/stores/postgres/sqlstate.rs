//! What the server's errors mean (PostgreSQL manual, Appendix A).

use tokio_postgres::error::{DbError, Severity};

use crate::store::{StoreError, StoreErrorKind};

/// Why a statement was not done.
#[derive(Clone, Debug)]
pub enum Failure {
    Store(StoreError),
    /// There is no such table, or no such schema.
    NoTable(Box<str>),
    /// Somebody else made the same at the same time.
    Race(Box<str>),
    /// Somebody was first, has the row locked, or cancelled the statement: nothing was applied.
    Busy(Box<str>),
    /// The moment after which the statement was to take nothing had passed when it was applied: nothing was.
    TooLate(Box<str>),
    /// The server takes no writes: it is a standby, or is set to read-only.
    ReadOnly {
        said: Box<str>,
        /// The number of the connection to it.
        connection: u64,
    },
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        Failure::Store(error)
    }
}

impl Failure {
    /// As the error of an operation that does nothing about it.
    pub fn into_error(self) -> StoreError {
        match self {
            Failure::Store(error) => error,
            Failure::NoTable(said) => StoreError::bad_config(said),
            Failure::Race(said) | Failure::Busy(said) | Failure::TooLate(said) => StoreError::unreachable(said),
            Failure::ReadOnly { said, .. } => StoreError::unreachable(format!(
                "{said}: the server takes no writes (a standby, or default_transaction_read_only): name the primary, or \
                 all servers, in the store URL"
            )),
        }
    }
}

/// What the error of a statement on the connection with this number means.
pub fn of_statement(error: &tokio_postgres::Error, connection: u64) -> Failure {
    match error.as_db_error() {
        Some(said) => of_server(said, connection),
        // What was sent may have been applied.
        None => StoreError::unknown(format!("the connection broke: {}", in_words(error))).into(),
    }
}

/// Whether a statement failed because it was prepared before: the server does not know it, or the table was changed.
pub fn is_of_preparing(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|said| matches!(said.code().code(), "26000" | "0A000"))
}

fn of_server(error: &DbError, connection: u64) -> Failure {
    let (code, said) = (error.code().code(), shown(error));
    let kind = match code {
        "42P01" | "3F000" => return Failure::NoTable(said.into()),
        // Two that create one table: the second finds the first's entry in an index of the catalogue.
        "23505" | "42P07" | "42710" => return Failure::Race(said.into()),
        "25006" => return Failure::ReadOnly { said: said.into(), connection },
        // The last: cancelled, by statement_timeout, by somebody, or by us, who meant the statement before it.
        "40001" | "40P01" | "55P03" | "57014" => return Failure::Busy(said.into()),
        // Of a statement that was prepared before: nothing was applied, and it is sent again as it is.
        "26000" | "0A000" => return Failure::Busy(said.into()),
        // A division by zero: the last check of `statements`.
        "22012" => return Failure::TooLate(said.into()),
        "57P03" => StoreErrorKind::Unreachable,
        // The server ends. Cut off in the wait for a synchronous standby, the write is there.
        "40003" | "57P01" | "57P02" | "57P05" => StoreErrorKind::Unknown,
        "42501" => StoreErrorKind::Denied,
        "3D000" => StoreErrorKind::BadConfig,
        // A column that is missing, or of another type.
        "42703" | "42804" | "42883" | "42P18" | "42P10" | "42846" => {
            let said = format!("the table is not nblock's: {said}. Name another with table=");
            return StoreError::rejected(said).into();
        }
        _ => match &code[..2] {
            "28" => StoreErrorKind::Denied,
            // Too many connections, a full disk, no memory: passing, mostly.
            "53" => StoreErrorKind::Unreachable,
            "08" | "58" | "XX" | "57" => StoreErrorKind::Unknown,
            _ => StoreErrorKind::Rejected,
        },
    };
    match error.parsed_severity() {
        // An error undoes its transaction. Beyond that, who knows.
        Some(Severity::Fatal | Severity::Panic)
            if matches!(kind, StoreErrorKind::Unreachable | StoreErrorKind::Rejected) =>
        {
            StoreError::unknown(said).into()
        }
        _ => StoreError::new(kind, said).into(),
    }
}

/// What an error of connecting means: nothing was applied.
pub fn of_connecting(error: &tokio_postgres::Error, user: &str, database: &str) -> StoreError {
    let Some(said) = error.as_db_error() else {
        let words = in_words(error);
        // The driver's own words for what it needs and was not given, or does not know.
        let kind = match words.contains("password missing") || words.contains("unsupported authentication") {
            true => StoreErrorKind::Denied,
            false => StoreErrorKind::Unreachable,
        };
        return StoreError::new(kind, format!("user {user:?}: {words}"));
    };
    let (code, words) = (said.code().code(), shown(said));
    match code {
        "3D000" => StoreError::bad_config(format!("{words}: create it, or name another in the store URL")),
        "42501" => StoreError::new(StoreErrorKind::Denied, words),
        _ if code.starts_with("28") => {
            StoreError::new(StoreErrorKind::Denied, format!("user {user:?} was denied access to {database:?}: {words}"))
        }
        // A parameter of the URL's options= that the server does not know.
        _ if code.starts_with("42") || code.starts_with("22") => StoreError::bad_config(words),
        _ => StoreError::unreachable(words),
    }
}

/// Its message, with the detail that belongs to it, and its number.
fn shown(error: &DbError) -> String {
    match error.detail() {
        // Of a row there may be a token in the detail.
        Some(detail) if !error.code().code().starts_with("2") => {
            format!("{} ({}; {detail})", error.message(), error.code().code())
        }
        _ => format!("{} ({})", error.message(), error.code().code()),
    }
}

fn in_words(error: &tokio_postgres::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
