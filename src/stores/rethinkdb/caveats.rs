//! What in a cluster's set-up endangers locks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::ddl;
use super::row::whole;
use super::servers::Link;
use super::tables::reconfigure;
use super::url::Config;
use crate::clock::Boottime;
use crate::sys::mutex::Mutex;
use crate::sys::runtime;

/// For how long what was found is taken as it stands. A server looks for longer than it answers a ping.
const RECENT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Caveats {
    found: Mutex<Option<(Boottime, Vec<String>)>>,
    warned: AtomicBool,
}

impl Caveats {
    /// What was found within the last seconds, or is found now.
    pub async fn recent(&self, link: &Arc<Link>) -> Vec<String> {
        if let Some((at, found)) = &*self.found.lock()
            && Boottime::now().since(*at) < RECENT
        {
            return found.clone();
        }
        let found = look(link).await;
        *self.found.lock() = Some((Boottime::now(), found.clone()));
        found
    }

    /// Looks in the background, once for a store, and warns of what it finds.
    pub fn warn_once(self: &Arc<Caveats>, link: &Arc<Link>) {
        if self.warned.swap(true, Ordering::Relaxed) {
            return;
        }
        let (caveats, link, Ok(handle)) = (Arc::clone(self), Arc::clone(link), runtime::handle()) else { return };
        handle.spawn(async move {
            for caveat in caveats.recent(&link).await {
                tracing::warn!("{caveat}");
            }
        });
    }
}

async fn look(link: &Arc<Link>) -> Vec<String> {
    let Config { database, table, hosts, .. } = &link.engine.config;
    let table_config = match link.ask_term(&ddl::table_config(database, table)).await {
        Ok(table_config) => table_config.result,
        Err(failure) => {
            tracing::debug!("the settings of the table of locks could not be read: {}", failure.message());
            return Vec::new();
        }
    };
    let mut servers = 1;
    if replicas(&table_config) == Some(1) {
        let counted = link.ask_term(&ddl::servers()).await;
        // An account that may not count them may have been given several.
        servers = counted.ok().and_then(|servers| whole(&servers.result)).unwrap_or(hosts.len() as u64);
    }
    of_table(&table_config, servers, database, table)
}

/// How many replicas there are of the shard that has the fewest.
fn replicas(table_config: &Value) -> Option<usize> {
    let shards = table_config["shards"].as_array()?;
    shards.iter().filter_map(|shard| shard["replicas"].as_array()).map(Vec::len).min()
}

fn of_table(config: &Value, servers: u64, database: &str, table: &str) -> Vec<String> {
    let mut caveats = Vec::new();
    if config["write_acks"].as_str().is_some_and(|acks| acks != "majority") {
        caveats.push(format!(
            "the table \"{database}.{table}\" acknowledges writes before a majority of its replicas has them: the loss \
             of a server may lose locks that are held. Set it with \
             r.db({database:?}).table({table:?}).config().update({{write_acks: \"majority\"}})"
        ));
    }
    if replicas(config) == Some(1) && servers > 1 {
        caveats.push(format!(
            "the table \"{database}.{table}\" has one replica on a cluster of {servers} servers: while the server that \
             has it is away nothing can be locked, and if it is lost, so are the locks that are held. Set it with {}",
            reconfigure(database, table)
        ));
    }
    caveats
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_warned_of() {
        let found = |config: Value, servers| of_table(&config, servers, "app", "locks");
        let config = |replicas: &[&str], acks| json!({ "write_acks": acks, "shards": [{ "replicas": replicas }] });
        assert!(found(config(&["a"], "majority"), 1).is_empty());
        assert!(found(config(&["a", "b", "c"], "majority"), 3).is_empty());
        let one = found(config(&["a"], "majority"), 3);
        assert!(one.len() == 1 && one[0].contains("app.locks") && one[0].contains("replicas: 3"), "{one:?}");
        let acks = found(config(&["a", "b", "c"], "single"), 3);
        assert!(acks.len() == 1 && acks[0].contains("app.locks") && acks[0].contains("majority"), "{acks:?}");
        assert_eq!(found(config(&["a"], "single"), 2).len(), 2);
        assert!(found(json!({}), 3).is_empty());
    }
}
