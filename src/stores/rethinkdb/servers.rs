//! The servers of a RethinkDB URL: how one is reached, and how it is asked.

use std::future::Future;
use std::sync::Arc;

use serde_json::Value;
use tokio::sync::{Semaphore, oneshot};

use super::connection::{Answered, Body, Connection, Query, ReqlProtocol, Tell, answer_of};
use super::handshake;
use super::reply::{self, Failure, ServerAnswer};
use super::row::seconds_to_ms;
use super::server_info::{self, Introduction, ServerInfo};
use super::term;
use super::url::Config;
use crate::clock::Boottime;
use crate::error::Error;
use crate::store::{StoreError, StoreErrorKind};
use crate::stores::network::address::Address;
use crate::stores::network::dial::{self, Reached};
use crate::stores::network::link::{self, Tie};
use crate::stores::network::pipeline::Pipeline;
use crate::stores::network::skew::Clocks;
use crate::stores::network::stream::Stream;
use crate::stores::network::tls::Connector;
use crate::sys::runtime::{self, until};

/// How many change feeds there may be. A server reads no more from a connection while 1024 of its queries are
/// unanswered, and a feed is one (RethinkDB src/client_protocol/server.cc: `connection_loop`).
const MOST_FEEDS: usize = 768;

pub type Link = link::Link<Servers>;

pub struct Servers {
    pub config: Config,
    pub clocks: Clocks,
    /// Space for feeds. A waiter without one looks at its lock now and then (R10).
    pub feeds: Arc<Semaphore>,
}

/// A server that has let us in, and said who it is.
pub struct Greeted {
    stream: Stream,
    host: Address,
    version: String,
    introduction: Introduction,
}

impl Servers {
    pub fn new(config: Config) -> Servers {
        Servers { clocks: Clocks::new("RethinkDB", config.skew), feeds: Arc::new(Semaphore::new(MOST_FEEDS)), config }
    }

    /// Connects to a host, and proves who we are: the stream, and the server's version.
    async fn enter(
        &self,
        address: &Address,
        tls: Option<&Connector>,
        limit: Boottime,
    ) -> Result<(Stream, String), StoreError> {
        let mut stream = dial::connect(address, tls, limit).await?;
        let Config { user, password, .. } = &self.config;
        let shaken = handshake::shake_hands(&mut stream, user, password, tls.is_some()).await;
        let version = shaken.map_err(|error| match error.kind {
            StoreErrorKind::Denied if error.message.contains("refused the connection") => {
                let with = if password.0.is_empty() { "without a password" } else { "with the password given" };
                let said = &error.message;
                StoreError::new(error.kind, format!("user {user:?} was denied access {with}: {said}"))
            }
            _ => error,
        })?;
        Ok((stream, version))
    }
}

impl link::Engine for Servers {
    type Connection = Connection;
    type Greeted = Greeted;

    fn hosts(&self) -> &[Address] {
        &self.config.hosts
    }

    async fn reach(&self, first: usize) -> Result<Reached<Greeted>, StoreError> {
        let Config { hosts, tls, connect_timeout, .. } = &self.config;
        let connector = tls.as_ref().map(Connector::new).transpose()?;
        let reached = dial::first_of(hosts, first, *connect_timeout, |address, limit| {
            Box::pin(self.enter(address, connector.as_ref(), limit))
        });
        let Reached { value: (mut stream, version), host, limit } = reached.await?;
        // Of the one that let us in first: who it is, and its clock.
        let mut asking = Box::pin(server_info::ask(&mut stream));
        let asked = until(limit, &mut asking).await;
        drop(asking);
        let asked = asked.unwrap_or_else(|| Err(dial::no_answer(*connect_timeout)));
        let address = &hosts[host];
        let introduction =
            asked.map_err(|error| StoreError::new(error.kind, format!("{address}: {}", error.message)))?;
        let value = Greeted { stream, host: address.clone(), version, introduction };
        Ok(Reached { value, host, limit })
    }

    fn run(&self, greeted: Greeted, tie: Tie<Servers>) -> Result<Connection, Error> {
        let Greeted { stream, host, version, introduction } = greeted;
        let info = ServerInfo::new(host.to_string(), version, introduction, &self.clocks, tie.number());
        let poller = stream.poller();
        let pipeline = Pipeline::new(Box::new(stream), self.config.op_timeout / 2, ReqlProtocol::default());
        let (connection, task) = Connection::new(pipeline, poller, info);
        runtime::handle()?.spawn(task.run(|why, unsent| tie.ended(why, unsent)));
        Ok(connection)
    }
}

/// A result, and the server's time that belongs to it.
pub struct TimedReply {
    pub result: Value,
    pub now_ms: u64,
}

impl Link {
    /// Sends a query, or keeps it until there is a connection, for `op_timeout` at most. It is on its
    /// way when this returns, whether the future is awaited or not.
    pub fn ask(
        self: &Arc<Link>,
        body: Body,
    ) -> impl Future<Output = Result<Answered, StoreError>> + Send + Unpin + use<> {
        let (tell, told) = oneshot::channel();
        self.send_query(body, Tell::Caller(tell));
        let link = Arc::clone(self);
        answer_of(told, move || link.drive())
    }

    /// As [`Link::ask`], where the answer goes elsewhere.
    pub fn send_query(&self, body: Body, tell: Tell) {
        self.send(Query { body, give_up_at: link::give_up_unsent_at(self.engine.config.op_timeout), tell });
    }

    /// The server's answer to a term, `[now, result]`: the result, and when it was so.
    pub async fn ask_term(self: &Arc<Link>, term: &term::Term) -> Result<TimedReply, Failure> {
        let body = term.start();
        self.timed(self.ask(Arc::new(move |_| body.clone())).await?)
    }

    /// Takes `[now, result]` apart, and notes what it tells of the server's clock.
    pub fn timed(&self, answered: Answered) -> Result<TimedReply, Failure> {
        let info = &answered.connection;
        let reply = reply::read(&answered.body).inspect_err(|failure| {
            if failure.sees_no_primary() {
                self.switch_host(info.connection, "sees no primary of the table");
            }
        })?;
        let ServerAnswer::Atom(Value::Array(parts)) = reply else { return Err(StoreError::unexpected_reply().into()) };
        let Ok([now, result]) = <[Value; 2]>::try_from(parts) else {
            return Err(StoreError::unexpected_reply().into());
        };
        let now_ms = seconds_to_ms(now.as_f64().ok_or_else(StoreError::unexpected_reply)?);
        info.observe(&self.engine.clocks, answered.sent, answered.received, now_ms);
        Ok(TimedReply { result, now_ms })
    }
}
