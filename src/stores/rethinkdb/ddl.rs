//! Queries that make databases and tables, and look at how they are set up.

use std::time::Duration;

use super::queries::answer;
use super::term::{Term, all, create_database, database, function, var, variable};

/// What is made: a database, or a table of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Named {
    Database(String),
    Table { database: String, table: String, primary_key: &'static str },
}

impl Named {
    /// Where the server lists what there is of this kind, with an id of its own for each.
    fn catalogue(&self) -> Term {
        let system = database("rethinkdb");
        match self {
            Named::Database(_) => system.table("db_config"),
            Named::Table { .. } => system.table("table_config"),
        }
    }

    /// Answers the ids of all that have this name.
    pub fn ids(&self) -> Term {
        let row = || variable(var::DOC);
        let same = match self {
            Named::Database(name) => row().field("name").equals(name.as_str()),
            Named::Table { database, table, .. } => {
                all([row().field("db").equals(database.as_str()), row().field("name").equals(table.as_str())])
            }
        };
        let ids = self.catalogue().filter(function(var::DOC, same)).map(function(var::DOC, row().field("id")));
        answer(ids.coerced_to_array())
    }

    /// Answers with `config_changes`, which name the id of what was made. A database has no replicas; a table has
    /// one where `replicas` is not given.
    pub fn create(&self, replicas: Option<u64>) -> Term {
        answer(match self {
            Named::Database(name) => create_database(name),
            Named::Table { database: db, table, primary_key } => {
                database(db).create_table(table, primary_key, replicas)
            }
        })
    }

    /// Deletes the one with this id, whatever else has its name.
    pub fn delete(&self, id: &str) -> Term {
        answer(self.catalogue().get(id).delete())
    }

    /// Waits until it can be written to.
    pub fn wait(&self, timeout: Duration) -> Option<Term> {
        match self {
            Named::Database(_) => None,
            Named::Table { database: db, table, .. } => {
                Some(answer(database(db).table(table).wait_for(timeout.as_secs_f64())))
            }
        }
    }
}

/// Answers a table's configuration: its write acknowledgements, and the replicas of its shards.
pub fn table_config(db: &str, table: &str) -> Term {
    answer(database(db).table(table).config())
}

/// Answers how many servers of the cluster may get replicas of a new table.
pub fn servers() -> Term {
    // A server gets replicas of tables that name no tag while it has this one (RethinkDB
    // src/clustering/administration/tables/generate_config.cc, src/clustering/administration/metadata.hpp).
    let usual = variable(var::DOC).field("tags").contains("default");
    answer(database("rethinkdb").table("server_config").filter(function(var::DOC, usual)).count())
}
