//! What a server answers a query with, and what its errors mean.

use serde_json::Value;

use crate::key::Excerpt;
use crate::store::{StoreError, StoreErrorKind};

/// One answer, taken apart.
#[derive(Debug, PartialEq)]
pub enum ServerAnswer {
    /// One value.
    Atom(Value),
    /// Some of a stream, and whether there is more.
    Items { items: Vec<Value>, more: bool },
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    Store(StoreError),
    /// Nothing was applied: the table is not there.
    NoTable(Box<str>),
    /// Nothing was applied: the database is not there.
    NoDatabase(Box<str>),
    /// Nothing was applied: there are several tables of the name, or several databases, for a moment.
    Ambiguous(Box<str>),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        Failure::Store(error)
    }
}

impl Failure {
    /// Whether the server could not reach the table's primary, or that one not a majority of the others
    /// (RethinkDB src/clustering/query_routing/table_query_client.cc,
    /// src/clustering/table_contract/executor/exec_primary.cc).
    pub fn sees_no_primary(&self) -> bool {
        matches!(self, Failure::Store(error)
            if error.kind == StoreErrorKind::Unreachable && error.message.contains("primary replica"))
    }

    pub fn message(&self) -> &str {
        match self {
            Failure::Store(error) => &error.message,
            Failure::NoTable(message) | Failure::NoDatabase(message) | Failure::Ambiguous(message) => message,
        }
    }
}

/// RethinkDB ql2.proto: Response.ResponseType.
mod kind {
    pub const SUCCESS_ATOM: u64 = 1;
    pub const SUCCESS_SEQUENCE: u64 = 2;
    pub const SUCCESS_PARTIAL: u64 = 3;
    pub const WAIT_COMPLETE: u64 = 4;
    pub const SERVER_INFO: u64 = 5;
    pub const CLIENT_ERROR: u64 = 16;
    pub const COMPILE_ERROR: u64 = 17;
    pub const RUNTIME_ERROR: u64 = 18;
}

/// RethinkDB ql2.proto: Response.ErrorType.
mod error_kind {
    pub const INTERNAL: u64 = 1_000_000;
    pub const OP_FAILED: u64 = 4_100_000;
    pub const OP_INDETERMINATE: u64 = 4_200_000;
    pub const PERMISSION_ERROR: u64 = 6_000_000;
}

/// Whether this answer says that the server keeps more of its stream for us.
pub fn has_more(body: &[u8]) -> bool {
    matches!(read(body), Ok(ServerAnswer::Items { more: true, .. }))
}

/// Reads the body of an answer.
pub fn read(body: &[u8]) -> Result<ServerAnswer, Failure> {
    let Ok(Value::Object(mut answer)) = serde_json::from_slice(body) else {
        return Err(StoreError::unexpected_reply().into());
    };
    let kind = answer.get("t").and_then(Value::as_u64);
    let Some(Value::Array(mut items)) = answer.remove("r") else { return Err(StoreError::unexpected_reply().into()) };
    match kind {
        Some(kind::SUCCESS_ATOM | kind::SERVER_INFO) if items.len() == 1 => Ok(ServerAnswer::Atom(items.remove(0))),
        Some(kind::SUCCESS_SEQUENCE) => Ok(ServerAnswer::Items { items, more: false }),
        Some(kind::SUCCESS_PARTIAL) => Ok(ServerAnswer::Items { items, more: true }),
        Some(kind::WAIT_COMPLETE) => Ok(ServerAnswer::Atom(Value::Null)),
        Some(kind @ (kind::CLIENT_ERROR | kind::COMPILE_ERROR | kind::RUNTIME_ERROR)) => {
            let message = items.first().and_then(Value::as_str).unwrap_or("an error without a message");
            Err(failure(kind, answer.get("e").and_then(Value::as_u64), message))
        }
        _ => Err(StoreError::unexpected_reply().into()),
    }
}

/// What an error of the whole query means.
fn failure(kind: u64, error: Option<u64>, message: &str) -> Failure {
    let said = format!("the server says: {:?}", Excerpt(message));
    let error_kind = match (kind, error) {
        // The words are the ones that NoBrainer goes by too (query_runner/table_on_demand.rb).
        (kind::RUNTIME_ERROR, Some(error_kind::OP_FAILED)) => {
            if message.ends_with("does not exist.") {
                if message.starts_with("Table `") {
                    return Failure::NoTable(message.into());
                }
                if message.starts_with("Database `") {
                    return Failure::NoDatabase(message.into());
                }
            }
            if message.contains("` is ambiguous; there are multiple") {
                return Failure::Ambiguous(message.into());
            }
            // No primary replica: nothing was applied.
            StoreErrorKind::Unreachable
        }
        (kind::RUNTIME_ERROR, Some(error_kind::OP_INDETERMINATE | error_kind::INTERNAL)) => StoreErrorKind::Unknown,
        (_, Some(error_kind::PERMISSION_ERROR)) => StoreErrorKind::Denied,
        // The query is wrong, or does not fit the data, or is beyond the server's limits.
        _ => StoreErrorKind::Rejected,
    };
    Failure::Store(StoreError::new(error_kind, said))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::rethinkdb::testing::Random;
    use serde_json::json;

    fn kind_of(answer: Value) -> Result<StoreErrorKind, Failure> {
        match read(answer.to_string().as_bytes()) {
            Err(Failure::Store(error)) => Ok(error.kind),
            Err(other) => Err(other),
            Ok(reply) => panic!("{reply:?}"),
        }
    }

    #[test]
    fn answers() {
        assert_eq!(read(br#"{"t":1,"r":[[1,2]]}"#), Ok(ServerAnswer::Atom(json!([1, 2]))));
        assert_eq!(read(br#"{"t":3,"r":[1],"n":[2]}"#), Ok(ServerAnswer::Items { items: vec![json!(1)], more: true }));
        assert_eq!(read(br#"{"t":2,"r":[]}"#), Ok(ServerAnswer::Items { items: vec![], more: false }));
        assert!(has_more(br#"{"t":3,"r":[],"n":[]}"#));
        assert!(!has_more(br#"{"t":1,"r":[3]}"#));
    }

    #[test]
    fn errors_keep_their_meaning() {
        let error = |code: u64, message: &str| json!({ "t": 18, "e": code, "r": [message], "b": [] });
        assert_eq!(kind_of(error(4_100_000, "Cannot perform write: ...")), Ok(StoreErrorKind::Unreachable));
        assert_eq!(kind_of(error(4_200_000, "Cannot perform write: ...")), Ok(StoreErrorKind::Unknown));
        assert_eq!(kind_of(error(6_000_000, "User `x` ...")), Ok(StoreErrorKind::Denied));
        assert_eq!(kind_of(error(3_000_000, "Expected type ...")), Ok(StoreErrorKind::Rejected));
        assert_eq!(kind_of(error(2_000_000, "Array over size limit")), Ok(StoreErrorKind::Rejected));
        let table = kind_of(error(4_100_000, "Table `a.b` does not exist.")).unwrap_err();
        assert!(matches!(table, Failure::NoTable(_)));
        let database = kind_of(error(4_100_000, "Database `a` does not exist.")).unwrap_err();
        assert!(matches!(database, Failure::NoDatabase(_)));
        let twice = kind_of(error(4_100_000, "Table `a.b` is ambiguous; there are multiple tables with that name."));
        assert!(matches!(twice, Err(Failure::Ambiguous(_))));
        assert_eq!(kind_of(json!({ "t": 16, "r": ["Client is buggy"] })), Ok(StoreErrorKind::Rejected));
    }

    #[test]
    fn no_primary_is_told_from_what_else_failed() {
        let failed = |message: &str| {
            let answer = json!({ "t": 18, "e": 4_100_000, "r": [message], "b": [] }).to_string();
            read(answer.as_bytes()).unwrap_err().sees_no_primary()
        };
        assert!(failed("Cannot perform write: primary replica for shard [\"\", +inf) not available"));
        assert!(failed(
            "Cannot perform write: The primary replica isn't connected to a quorum of replicas. \
             The write was not performed."
        ));
        assert!(!failed("Table `a.b` already exists."));
        assert!(!failed("Table `a.b` does not exist."));
    }

    #[test]
    fn nonsense_is_neither_yes_nor_no() {
        let mut random = Random::seeded();
        let whole = br#"{"t":1,"r":[{"changes":[{"new_val":null}]}],"n":[]}"#;
        for _ in 0..2000 {
            let mut body = whole.to_vec();
            body.truncate(random.below(body.len()));
            if !body.is_empty() {
                let at = random.below(body.len());
                body[at] = random.next() as u8;
            }
            match read(&body) {
                Ok(_) => {}
                Err(Failure::Store(error)) => assert_ne!(error.kind, StoreErrorKind::Unreachable),
                Err(other) => panic!("{other:?}"),
            }
        }
        for body in [&b"null"[..], b"[]", b"{}", b"{\"t\":1}", b"{\"t\":1,\"r\":[]}", b"{\"t\":99,\"r\":[1]}"] {
            assert!(matches!(read(body), Err(Failure::Store(error)) if error.kind == StoreErrorKind::Unknown));
        }
    }
}
