//! What in a server's set-up endangers locks, or makes waiting slow.

use std::sync::Arc;
use std::time::Duration;

use super::listening;
use super::servers::Link;
use super::statements::Statement;
use crate::clock::Boottime;
use crate::sys::mutex::Mutex;

/// For how long what was found is taken as it stands.
const RECENT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Caveats {
    found: Mutex<Option<(Boottime, Vec<String>)>>,
}

/// What the server says of itself.
#[derive(Default)]
struct SetUp {
    standby: bool,
    read_only: bool,
    fsync: bool,
    synchronous_commit: String,
    synchronous_standbys: String,
    /// How many replicas are connected.
    replicas: i64,
}

const SET_UP: &str = "SELECT clock_timestamp(), pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', \
    current_setting('fsync') = 'on', current_setting('synchronous_commit'), \
    current_setting('synchronous_standby_names'), \
    (SELECT count(*) FROM pg_catalog.pg_stat_replication)";

impl Caveats {
    /// What was found within the last seconds, or is found now. `heard`: whether notifications arrive.
    pub async fn recent(&self, link: &Arc<Link>, host: &str, heard: Option<bool>) -> Vec<String> {
        if let Some((at, found)) = &*self.found.lock()
            && Boottime::now().since(*at) < RECENT
        {
            return found.clone();
        }
        let config = &link.engine.config;
        let found = match set_up(link).await {
            Some(set_up) => of(&set_up, host, config.notify, heard, config.soft),
            None => Vec::new(),
        };
        *self.found.lock() = Some((Boottime::now(), found.clone()));
        found
    }
}

async fn set_up(link: &Arc<Link>) -> Option<SetUp> {
    let answered = link.ask(Statement { sql: SET_UP.to_string(), values: Vec::new(), recurs: false }).await;
    let answered =
        answered.inspect_err(|failure| tracing::debug!("the server's settings could not be read: {failure:?}")).ok()?;
    let row = answered.rows.first()?;
    Some(SetUp {
        standby: row.try_get(1).ok()?,
        read_only: row.try_get(2).ok()?,
        fsync: row.try_get(3).ok()?,
        synchronous_commit: row.try_get(4).ok()?,
        synchronous_standbys: row.try_get(5).ok()?,
        replicas: row.try_get(6).ok()?,
    })
}

fn of(set_up: &SetUp, host: &str, notify: bool, heard: Option<bool>, soft: bool) -> Vec<String> {
    let mut caveats = Vec::new();
    if set_up.standby {
        caveats.push(format!("{host} is a standby: nothing can be locked there. Name the primary in the store URL"));
    } else if set_up.read_only {
        caveats.push(format!(
            "{host} takes no writes: nothing can be locked there. Unset default_transaction_read_only for this account"
        ));
    }
    if !set_up.fsync {
        caveats.push(format!("{host} has fsync = off: a crash of its machine may lose locks that are held"));
    }
    let synchronous = &*set_up.synchronous_commit;
    if synchronous == "off" && !soft {
        caveats.push(format!(
            "{host} has synchronous_commit = off: a crash may lose locks that are held, as with durability=soft. Set \
             it on for this account"
        ));
    }
    let waits_for_standbys = !set_up.synchronous_standbys.is_empty() && !matches!(synchronous, "off" | "local");
    if set_up.replicas > 0 && (!waits_for_standbys || soft) {
        caveats.push(format!(
            "{host} has {} replica(s), and grants do not wait for them: a failover may lose locks that are held. Set \
             synchronous_standby_names and synchronous_commit = on{}",
            set_up.replicas,
            if soft { ", and leave durability=soft out of the store URL" } else { "" }
        ));
    }
    if notify && heard == Some(false) {
        caveats.push(listening::pooled(host));
    }
    caveats
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> SetUp {
        SetUp { fsync: true, synchronous_commit: "on".into(), ..SetUp::default() }
    }

    #[test]
    fn what_is_warned_of() {
        let found = |set_up: SetUp, heard, soft| of(&set_up, "h", true, heard, soft);
        assert!(found(good(), Some(true), false).is_empty());
        assert!(found(good(), None, true).is_empty());
        let only = |found: Vec<String>, part: &str| {
            assert!(found.len() == 1 && found[0].contains(part), "{part}: {found:?}");
        };
        only(found(SetUp { standby: true, read_only: true, ..good() }, None, false), "standby");
        only(found(SetUp { read_only: true, ..good() }, None, false), "takes no writes");
        only(found(SetUp { fsync: false, ..good() }, None, false), "fsync");
        only(found(SetUp { synchronous_commit: "off".into(), ..good() }, None, false), "durability=soft");
        only(found(SetUp { replicas: 2, ..good() }, None, false), "2 replica(s)");
        let synchronous = || SetUp { replicas: 1, synchronous_standbys: "*".into(), ..good() };
        assert!(found(synchronous(), None, false).is_empty());
        only(found(synchronous(), None, true), "leave durability=soft out");
        only(found(SetUp { synchronous_commit: "local".into(), ..synchronous() }, None, false), "failover");
        only(found(good(), Some(false), false), "pool_mode");
        assert!(of(&good(), "h", false, Some(false), false).is_empty(), "notify=off says that it is meant");
    }
}
