//! The servers of a URL: how one is reached, and how it is asked.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;

use super::commands::Command;
use super::connection::{self, Answered, Common, Connection, Request, Tell, answer_of};
use super::failure;
use super::greeting::{self, Introduction, ServerInfo};
use super::resp::Value;
use super::url::{Config, Sentinel};
use super::watches::Watches;
use crate::clock::Boottime;
use crate::error::Error;
use crate::store::StoreError;
use crate::stores::network::address::Address;
use crate::stores::network::dial::{self, Reached};
use crate::stores::network::link::{self, Tie};
use crate::stores::network::skew::Clocks;
use crate::stores::network::stream::Stream;
use crate::stores::network::tls::Connector;
use crate::sys::runtime;

pub type Link = link::Link<Servers>;

pub struct Servers {
    pub config: Config,
    pub clocks: Clocks,
    pub watches: Arc<Watches>,
    /// Whether the present server tells of changes, or the last one did.
    tells: AtomicBool,
}

/// A server that has let us in.
pub struct Greeted {
    stream: Stream,
    address: Address,
    introduction: Introduction,
}

impl Servers {
    pub fn new(config: Config) -> Servers {
        Servers {
            clocks: Clocks::new("Redis", config.skew),
            watches: Arc::default(),
            tells: AtomicBool::new(config.notify),
            config,
        }
    }

    pub fn tell_of_changes(&self) -> bool {
        self.tells.load(Ordering::Relaxed)
    }

    async fn enter(&self, address: &Address, tls: Option<&Connector>, limit: Boottime) -> Result<Greeted, StoreError> {
        match &self.config.sentinel {
            None => self.greet(address, tls, limit).await,
            Some(sentinel) => {
                let primary = self.primary(address, sentinel, tls, limit).await?;
                let greeted = self.greet(&primary, tls, limit).await;
                greeted
                    .map_err(|error| StoreError::new(error.kind, format!("its primary {primary}: {}", error.message)))
            }
        }
    }

    async fn primary(
        &self,
        address: &Address,
        sentinel: &Sentinel,
        tls: Option<&Connector>,
        limit: Boottime,
    ) -> Result<Address, StoreError> {
        let mut stream = dial::connect(address, tls, limit).await?;
        greeting::find_primary(&mut stream, sentinel, &self.config).await
    }

    async fn greet(&self, address: &Address, tls: Option<&Connector>, limit: Boottime) -> Result<Greeted, StoreError> {
        let mut stream = dial::connect(address, tls, limit).await?;
        let introduction = greeting::greet(&mut stream, &self.config).await?;
        Ok(Greeted { stream, address: address.clone(), introduction })
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
        reached.await
    }

    fn run(&self, greeted: Greeted, tie: Tie<Servers>) -> Result<Connection, Error> {
        let Greeted { stream, address, introduction } = greeted;
        self.tells.store(introduction.tells, Ordering::Relaxed);
        let info = ServerInfo::new(&address, introduction, &self.clocks);
        let common = Common { info, watches: Arc::clone(&self.watches) };
        let (connection, task) = connection::run(stream, common, self.config.op_timeout / 2);
        runtime::handle()?.spawn(task.run(|why, unsent| tie.ended(why, unsent)));
        Ok(connection)
    }
}

impl Link {
    /// Sends commands, or keeps them until there is a connection, for `op_timeout` at most. They are on their way when
    /// this returns, whether the future is awaited or not. Scripts that the server has forgotten are sent again with
    /// their text, if the future is awaited.
    pub fn ask(
        self: &Arc<Link>,
        commands: Arc<[Command]>,
    ) -> impl Future<Output = Result<Answered, StoreError>> + Send + use<> {
        let asked = self.send_commands(&commands, false);
        let link = Arc::clone(self);
        async move {
            let answered = asked.await?;
            let unknown = |reply: &Value| matches!(reply, Value::Error(said) if failure::is_unknown_script(said));
            if !answered.replies.iter().any(unknown) {
                return Ok(answered);
            }
            link.ask_whole(answered, commands, unknown).await
        }
    }

    /// Sends those scripts once more that a server did not know.
    async fn ask_whole(
        self: &Arc<Link>,
        mut answered: Answered,
        commands: Arc<[Command]>,
        unknown: impl Fn(&Value) -> bool,
    ) -> Result<Answered, StoreError> {
        let missing: Vec<usize> = (0..commands.len()).filter(|index| unknown(&answered.replies[*index])).collect();
        let again: Arc<[Command]> = missing.iter().map(|index| commands[*index].clone()).collect();
        // The others were applied, perhaps.
        let all = missing.len() == commands.len();
        let whole = self.send_commands(&again, true).await;
        let whole = whole.map_err(|error| if all { error } else { StoreError::unknown(error.message) })?;
        for (index, reply) in missing.into_iter().zip(whole.replies) {
            answered.replies[index] = reply;
        }
        Ok(Answered { replies: answered.replies, sent: answered.sent, ..whole })
    }

    fn send_commands(
        self: &Arc<Link>,
        commands: &Arc<[Command]>,
        whole_scripts: bool,
    ) -> impl Future<Output = Result<Answered, StoreError>> + Send + Unpin + use<> {
        let (tell, mut told) = oneshot::channel();
        let give_up_at = link::give_up_unsent_at(self.engine.config.op_timeout);
        let commands = Arc::clone(commands);
        self.send(Request { commands, whole_scripts, give_up_at, tell: Tell::Caller(tell) });
        let link = Arc::clone(self);
        poll_fn(move |context| {
            let told = Pin::new(&mut told).poll(context);
            if told.is_pending() {
                link.drive();
            }
            told.map(answer_of)
        })
    }

    /// The error that a server's words are. Where another server has to be asked, the connection ends.
    pub fn failed(&self, said: &str, of: &str, connection: &Connection) -> StoreError {
        if failure::is_elsewhere(said) {
            connection.leave("the server is not the primary, or loads its data");
        }
        failure::error(said, of, &self.engine.config)
    }

    /// Notes a time of the server's, in milliseconds since 1970; 0 means that there is none.
    pub fn observe(&self, answered: &Answered, now_ms: i64) {
        if now_ms > 0 {
            let Answered { connection, sent, received, .. } = answered;
            connection.info.observe(&self.engine.clocks, *sent, *received, now_ms as u64);
        }
    }
}
