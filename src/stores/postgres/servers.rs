//! The servers of a PostgreSQL URL: how one is reached, and how it is asked.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, OnceLock};

use tokio_postgres::{Client, NoTls};

use super::connection::{
    self, Answered, Cancelling, Common, Connection, Driver, Greeting, Notified, Request, ServerInfo, StatementTraffic,
    Told,
};
use super::row::Moment;
use super::socket;
use super::sqlstate::{self, Failure};
use super::statements::Statement;
use super::table;
use super::url::{Config, Encryption};
use crate::clock::Boottime;
use crate::error::Error;
use crate::store::{StoreError, StoreErrorKind};
use crate::stores::network::address::Address;
use crate::stores::network::dial::{self, Reached};
use crate::stores::network::link::{self, Tie};
use crate::stores::network::skew::Clocks;
use crate::stores::network::tls::Connector;
use crate::sys::runtime;
use crate::sys::sockets::SocketPoller;

pub type Link = link::Link<Servers>;

pub struct Servers {
    pub config: Config,
    pub clocks: Clocks,
    /// What gets the channels of notifications.
    pub notified: OnceLock<Notified>,
    /// How many channels are listened to.
    pub listened: Arc<AtomicUsize>,
}

/// A connection to a server that has let us in.
pub struct Entered {
    pub client: Client,
    pub driver: Driver,
    poller: SocketPoller,
    /// The addresses of the connection's ends, as far as it has them.
    ends: Option<(SocketAddr, SocketAddr)>,
    cancelling: Cancelling,
}

/// A server that has also said who it is.
pub struct Greeted {
    entered: Entered,
    greeting: Greeting,
    host: usize,
}

impl Servers {
    pub fn new(config: Config) -> Servers {
        Servers {
            clocks: Clocks::new("PostgreSQL", config.skew),
            notified: OnceLock::new(),
            listened: Arc::default(),
            config,
        }
    }

    /// Connects to a host, and proves who we are: by TLS or in the clear, as `sslmode` allows, and in its order.
    pub async fn enter(&self, address: &Address, limit: Boottime) -> Result<Entered, StoreError> {
        let Encryption { connector, ways } = self.config.encryption()?;
        let ways: &[bool] = if matches!(address, Address::Unix(_)) { &[false] } else { ways };
        let mut first: Option<StoreError> = None;
        for by_tls in ways {
            match self.enter_by(address, by_tls.then_some(connector.as_ref()).flatten(), limit).await {
                Ok(entered) => return Ok(entered),
                // Refused for the way, not for the account: the other way may do.
                Err(error) if may_be_the_way(&error) => first = Some(error_to_tell(first, error)),
                Err(error) => return Err(error_to_tell(first, error)),
            }
        }
        Err(first.unwrap_or_else(|| StoreError::bad_config("sslmode allows no way to connect")))
    }

    async fn enter_by(
        &self,
        address: &Address,
        tls: Option<&Connector>,
        limit: Boottime,
    ) -> Result<Entered, StoreError> {
        let socket = socket::open(address, tls, limit).await?;
        let (poller, ends) = (socket.poller(), socket.ends());
        let Config { user, database, .. } = &self.config;
        let connected = self.config.for_driver().connect_raw(socket, NoTls).await;
        let (client, driver) = connected.map_err(|error| sqlstate::of_connecting(&error, user, database))?;
        let cancelling = Cancelling::new(&client, address.clone(), tls.cloned());
        Ok(Entered { client, driver, poller, ends, cancelling })
    }

    /// Enters a host and asks who it is, what time it has, and whether the table, if it is there, is ours.
    async fn greet(&self, address: &Address, host: usize, limit: Boottime) -> Result<Greeted, StoreError> {
        let mut entered = self.enter(address, limit).await?;
        let Entered { client, driver, ends, .. } = &mut entered;
        let Config { table, user, .. } = &self.config;
        let name = table.to_string();
        let sent = Boottime::now();
        let asked = connection::drive(driver, client.query_typed(GREETING, &[(&name, TEXT)])).await;
        let received = Boottime::now();
        let rows = asked.and_then(|rows| rows).map_err(|error| {
            let error = sqlstate::of_statement(&error, 0).into_error();
            match error.kind {
                // Nothing was to be applied.
                StoreErrorKind::Unknown => StoreError::unreachable(error.message),
                StoreErrorKind::Denied => denied(error, table, user),
                _ => error,
            }
        })?;
        let nonsense = |_| StoreError::bad_config("the server sent an unexpected first reply");
        let row = rows.first().ok_or_else(|| nonsense(()))?;
        let get = |index| row.try_get::<_, Option<String>>(index).map_err(|_| nonsense(()));
        let is = |index| row.try_get::<_, Option<bool>>(index).map_err(|_| nonsense(()));
        let now: Moment = row.try_get(0).map_err(|_| nonsense(()))?;
        let read_only = get(3)?.as_deref() == Some("on");
        if read_only && self.config.must_be_writable() {
            return Err(StoreError::unreachable("takes no writes: it is a standby, or is set to read-only"));
        }
        if let Some(columns) = get(4)?
            && let Some(wrong) = table::what_is_wrong(table, &columns, is(5)? == Some(true))
        {
            return Err(StoreError::bad_config(wrong));
        }
        // What a pooler has to the server is another connection, and not one for each of ours.
        let theirs = [get(6)?, get(7)?].map(|end| end.and_then(|end| end.parse::<SocketAddr>().ok()));
        let is_direct = matches!((&*ends, theirs), (Some(ours), [Some(from), Some(to)]) if *ours == (from, to));
        let greeting = Greeting {
            now,
            sent,
            received,
            version: get(1)?.unwrap_or_default(),
            standby: is(2)? == Some(true),
            is_direct,
        };
        Ok(Greeted { entered, greeting, host })
    }
}

const TEXT: tokio_postgres::types::Type = tokio_postgres::types::Type::TEXT;

const GREETING: &str = "SELECT clock_timestamp(), current_setting('server_version'), pg_is_in_recovery(), \
    current_setting('transaction_read_only'), \
    (SELECT string_agg(attname || ' ' || format_type(atttypid, NULL), ',') FROM pg_catalog.pg_attribute \
     WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped), \
    EXISTS (SELECT FROM pg_catalog.pg_index JOIN pg_catalog.pg_attribute ON attrelid = indrelid AND attnum = indkey[0] \
     WHERE indrelid = to_regclass($1) AND indisunique AND indisvalid AND indimmediate AND indnkeyatts = 1 \
     AND indpred IS NULL AND attname = 'key_hash'), \
    CASE family(inet_client_addr()) WHEN 4 THEN host(inet_client_addr()) ELSE '[' || host(inet_client_addr()) || ']' END \
    || ':' || inet_client_port(), \
    CASE family(inet_server_addr()) WHEN 4 THEN host(inet_server_addr()) ELSE '[' || host(inet_server_addr()) || ']' END \
    || ':' || inet_server_port()";

/// A permission that is missing, with what gives it.
pub fn denied(error: StoreError, table: &table::TableName, user: &str) -> StoreError {
    let grants = table::grants(table, user);
    StoreError::new(error.kind, format!("the table {table}: {}. To grant it: {grants}", error.message))
}

/// Of the errors of two ways: the word on the account, or else the later one.
fn error_to_tell(first: Option<StoreError>, then: StoreError) -> StoreError {
    first.filter(|first| first.kind == StoreErrorKind::Denied).unwrap_or(then)
}

/// Whether another way of connecting, with TLS or without, may succeed where this one did not.
fn may_be_the_way(error: &StoreError) -> bool {
    match error.kind {
        StoreErrorKind::BadConfig => true,
        // No line of pg_hba.conf for this way. A wrong password has another number.
        StoreErrorKind::Denied => error.message.contains("(28000"),
        StoreErrorKind::Unreachable => error.message.contains("TLS"),
        _ => false,
    }
}

impl link::Engine for Servers {
    type Connection = Connection;
    type Greeted = Greeted;

    fn hosts(&self) -> &[Address] {
        &self.config.hosts
    }

    async fn reach(&self, first: usize) -> Result<Reached<Greeted>, StoreError> {
        let Config { hosts, connect_timeout, .. } = &self.config;
        let index = |address: &Address| hosts.iter().position(|host| host == address).unwrap_or(0);
        dial::first_of(hosts, first, *connect_timeout, |address, limit| {
            Box::pin(self.greet(address, index(address), limit))
        })
        .await
    }

    fn run(&self, greeted: Greeted, tie: Tie<Servers>) -> Result<Connection, Error> {
        let Greeted { entered: Entered { client, driver, poller, cancelling, .. }, greeting, host } = greeted;
        let address = self.config.hosts[host].to_string();
        let info = Arc::new(ServerInfo::new(&greeting, address, host, &self.clocks, tie.number()));
        let told = Told { notified: self.notified.get().cloned(), listened: Arc::clone(&self.listened) };
        let traffic = StatementTraffic::new(client, driver, info.is_direct);
        let common = Common::new(info, told, self.config.silence(), cancelling);
        let (connection, task) = Connection::new(traffic, poller, common);
        runtime::handle()?.spawn(task.run(|why, unsent| tie.ended(why, unsent)));
        Ok(connection)
    }
}

impl Link {
    /// Sends a statement, or keeps it until there is a connection, for `op_timeout` at most. It is on its way when
    /// this returns.
    pub fn ask(
        self: &Arc<Link>,
        statement: Statement,
    ) -> impl Future<Output = Result<Answered, Failure>> + Send + use<> {
        let (tell, pending) = connection::answer();
        self.send(Request { statement, give_up_at: link::give_up_unsent_at(self.engine.config.op_timeout), tell });
        let link = Arc::clone(self);
        async move { pending.get(link.engine.config.silence(), || link.drive()).await }
    }

    /// Notes the time in the first column of an answer; answers it.
    pub fn timed(&self, answered: &Answered) -> Result<Option<Moment>, Failure> {
        let Some(row) = answered.rows.first() else { return Ok(None) };
        let now: Moment =
            row.try_get(0).map_err(|_| StoreError::unknown("the server's reply does not contain its time"))?;
        answered.info.observe(&self.engine.clocks, answered.sent, answered.received, now);
        Ok(Some(now))
    }
}
