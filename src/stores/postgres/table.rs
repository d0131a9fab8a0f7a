//! The table of locks: its name, how it is made, and what an account needs on it.

use std::fmt;

use crate::error::Error;
use crate::key::Excerpt;
use crate::stores::network::options::wrong;

/// A table's name with its schema. Without one, two accounts with two search paths would have two tables, which
/// exclude nobody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    pub schema: String,
    pub table: String,
}

impl TableName {
    /// `table` or `schema.table`.
    pub fn parse(text: &str) -> Result<TableName, Error> {
        let (schema, table) = text.split_once('.').unwrap_or(("public", text));
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || b == b'$';
        for name in [schema, table] {
            if name.is_empty() || name.len() > 63 || !name.bytes().all(allowed) {
                return Err(wrong(format!(
                    "has table={:?}: must be table or schema.table, each of letters, digits, _, - and $, at most 63",
                    Excerpt(text)
                )));
            }
        }
        Ok(TableName { schema: schema.to_string(), table: table.to_string() })
    }
}

/// As it stands in SQL: names of these characters need nothing but quotes.
impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\".\"{}\"", self.schema, self.table)
    }
}

/// What each column must be, as the server calls the types.
pub const TYPES: [(&str, &str); 14] = [
    ("key_hash", "bytea"),
    ("key", "bytea"),
    ("token", "bytea"),
    ("write_seq", "bigint"),
    ("ends_at", "timestamp with time zone"),
    ("fence", "bigint"),
    ("lock_count", "bigint"),
    ("hold", "text"),
    ("entries", "jsonb"),
    ("owner_host", "text"),
    ("owner_pid", "bigint"),
    ("owner_boot_id", "text"),
    ("owner_app", "text"),
    ("acquired_at", "timestamp with time zone"),
];

/// Makes the table where it is missing.
///
/// A row is changed by every grant and release: there is room in its page for the next versions, and what is dead is
/// cleared away sooner than in other tables.
pub fn create(table: &TableName) -> String {
    format!(
        "CREATE TABLE IF NOT EXISTS {table} (
    key_hash bytea PRIMARY KEY,
    key bytea NOT NULL,
    token bytea,
    write_seq bigint NOT NULL DEFAULT 0,
    ends_at timestamptz NOT NULL,
    fence bigint NOT NULL,
    lock_count bigint,
    hold text,
    entries jsonb,
    owner_host text,
    owner_pid bigint,
    owner_boot_id text,
    owner_app text,
    acquired_at timestamptz
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 200, \
         autovacuum_vacuum_cost_delay = 0)"
    )
}

/// What an account needs that may not make the table.
pub fn grants(table: &TableName, user: &str) -> String {
    let TableName { schema, .. } = table;
    let user = user.replace('"', "\"\"");
    format!("GRANT USAGE ON SCHEMA \"{schema}\" TO \"{user}\"; GRANT SELECT, INSERT, UPDATE ON {table} TO \"{user}\"")
}

/// The statements that make a table and let an account use it: for people who make it themselves. `table` is as in
/// a store URL's `table=`.
pub fn schema(table: Option<&str>, user: &str) -> Result<String, Error> {
    let table = TableName::parse(table.unwrap_or(DEFAULT))?;
    Ok(format!("{};\n{};\n", create(&table), grants(&table, user).replace("; ", ";\n")))
}

pub const DEFAULT: &str = "nblock_locks";

/// What is wrong with a table, by its columns as `name type` with commas between, and whether its rows are unique by
/// `key_hash`. `None`: nothing.
pub fn what_is_wrong(table: &TableName, columns: &str, unique: bool) -> Option<String> {
    let present: Vec<(&str, &str)> = columns.split(',').filter_map(|column| column.split_once(' ')).collect();
    let problem = TYPES.iter().find_map(|(name, wanted)| match present.iter().find(|(found, _)| found == name) {
        None => Some(format!("it has no column {name}")),
        Some((_, found)) if found != wanted => Some(format!("its column {name} is {found} (must be {wanted})")),
        Some(_) => None,
    });
    let problem = problem.or_else(|| (!unique).then(|| "its key_hash is not unique".to_string()))?;
    Some(format!("the table {table} is not nblock's: {problem}. Name another with table="))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_a_schema_and_plain_characters() {
        assert_eq!(TableName::parse("t").unwrap().to_string(), "\"public\".\"t\"");
        assert_eq!(TableName::parse("app.my-locks").unwrap().to_string(), "\"app\".\"my-locks\"");
        for wrong in ["", ".", "a.", ".a", "a.b.c", "a\"b", "a b", "é", &"x".repeat(64)] {
            assert!(TableName::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_table_of_another_shape_is_named() {
        let table = TableName::parse("t").unwrap();
        let columns = |change: &dyn Fn(&str, &str) -> Option<String>| -> String {
            TYPES.iter().filter_map(|(name, kind)| change(name, kind)).collect::<Vec<_>>().join(",")
        };
        let right = columns(&|name, kind| Some(format!("{name} {kind}")));
        assert_eq!(what_is_wrong(&table, &right, true), None);
        assert!(what_is_wrong(&table, &right, false).unwrap().contains("unique"));
        let without = columns(&|name, kind| (name != "fence").then(|| format!("{name} {kind}")));
        assert!(what_is_wrong(&table, &without, true).unwrap().contains("no column fence"));
        let zone =
            columns(&|name, kind| Some(format!("{name} {}", kind.replace("with time zone", "without time zone"))));
        assert!(what_is_wrong(&table, &zone, true).unwrap().contains("ends_at is timestamp without"));
    }

    #[test]
    fn the_schema_is_whole() {
        let text = schema(Some("app.locks"), "we\"b").unwrap();
        for part in ["CREATE TABLE IF NOT EXISTS \"app\".\"locks\"", "GRANT SELECT, INSERT, UPDATE", "TO \"we\"\"b\";"]
        {
            assert!(text.contains(part), "{text}");
        }
        for (name, _) in TYPES {
            assert!(text.contains(name), "{name}");
        }
    }
}
