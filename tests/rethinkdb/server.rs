//! A server that follows a script: it speaks the protocol, and breaks it where a test says so.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::{digest, hmac, pbkdf2};
use serde_json::{Value, json};
use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned};

pub struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

/// How a server has TLS.
pub struct Secured {
    /// Each connection has the next of these; the last is that of all that follow.
    pub configs: Vec<Arc<ServerConfig>>,
    /// What is sent goes out in pieces of at most so many bytes, wherever they split a record of TLS.
    pub piece: usize,
}

impl Server {
    /// Runs `script` on each connection, on a thread of its own; it gets the number of the connection, from 0.
    pub fn start(script: impl Fn(usize, Connection) + Send + Sync + 'static) -> Server {
        Server::listen("127.0.0.1:0".parse().unwrap(), None, script)
    }

    /// As `start`, at any address; with TLS, where it is given.
    pub fn listen(
        address: SocketAddr,
        tls: Option<Secured>,
        script: impl Fn(usize, Connection) + Send + Sync + 'static,
    ) -> Server {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let (count, script) = (Arc::clone(&connections), Arc::new(script));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (number, script) = (count.fetch_add(1, Ordering::SeqCst), Arc::clone(&script));
                let socket = stream.unwrap();
                socket.set_nodelay(true).unwrap();
                let stream: Box<dyn Stream> = match &tls {
                    None => Box::new(socket),
                    Some(tls) => {
                        let config = &tls.configs[number.min(tls.configs.len() - 1)];
                        let tls_connection = ServerConnection::new(Arc::clone(config)).unwrap();
                        Box::new(StreamOwned::new(tls_connection, Pieces { socket, most: tls.piece }))
                    }
                };
                let mut connection = Connection::over(stream);
                connection.id = address.to_string();
                std::thread::spawn(move || script(number, connection));
            }
        });
        Server { address, connections }
    }

    pub fn url(&self) -> String {
        self.url_as(&self.address.ip().to_string(), "")
    }

    /// The URL with another name of the host in it, and options.
    pub fn url_as(&self, host: &str, options: &str) -> String {
        format!("rethinkdb://admin:secret@{host}:{}/db{options}", self.address.port())
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

pub trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// A socket under TLS.
struct Pieces {
    socket: TcpStream,
    most: usize,
}

impl Read for Pieces {
    fn read(&mut self, space: &mut [u8]) -> std::io::Result<usize> {
        self.socket.read(space)
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.socket.write(&bytes[..bytes.len().min(self.most)])
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for Pieces {
    /// What was sent last, an alert perhaps, must arrive: closing a socket with unread bytes resets the connection.
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        let _ = std::io::copy(&mut self.socket, &mut std::io::sink());
    }
}

/// What a script may change of the handshake.
pub struct Handshake {
    pub iterations: u32,
    pub password: &'static str,
    pub honest: bool,
}

impl Default for Handshake {
    fn default() -> Handshake {
        Handshake { iterations: 4096, password: "secret", honest: true }
    }
}

pub struct Connection {
    stream: Box<dyn Stream>,
    /// What is sent is sent in pieces of at most so many bytes.
    pub piece: usize,
    /// How many seconds the server's clock is ahead of this machine's.
    pub ahead: f64,
    /// The server's identity.
    id: String,
    /// What feeds tell, one row each time they are asked; nothing comes of them when there is no more.
    pub feeds: VecDeque<Value>,
    /// How many feeds were asked for.
    pub feeds_begun: usize,
    /// How the table of locks is set up.
    pub table_config: Value,
    /// How many servers the cluster has.
    pub servers: u64,
    /// Receives a message when the client asks for that: its last question about how the cluster is set up.
    pub on_survey: Option<Sender<()>>,
}

/// The other side has hung up. A script ends then.
#[derive(Debug)]
pub struct HungUp;

impl From<std::io::Error> for HungUp {
    fn from(_: std::io::Error) -> HungUp {
        HungUp
    }
}

pub type Scripted<T = ()> = Result<T, HungUp>;

impl Connection {
    pub fn over(stream: Box<dyn Stream>) -> Connection {
        Connection {
            stream,
            piece: usize::MAX,
            ahead: 0.0,
            id: "x".to_string(),
            feeds: VecDeque::new(),
            feeds_begun: 0,
            table_config: json!({ "write_acks": "majority", "shards": [{ "replicas": ["x"] }] }),
            servers: 1,
            on_survey: None,
        }
    }

    pub fn send(&mut self, bytes: &[u8]) -> Scripted {
        for piece in bytes.chunks(self.piece) {
            self.stream.write_all(piece)?;
        }
        Ok(())
    }

    fn message(&mut self) -> Scripted<Value> {
        let mut bytes = Vec::new();
        loop {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            if byte[0] == 0 {
                return Ok(serde_json::from_slice(&bytes).unwrap());
            }
            bytes.push(byte[0]);
        }
    }

    fn say(&mut self, message: &Value) -> Scripted {
        self.send(format!("{message}\0").as_bytes())
    }

    /// Reads what a client says first, and says nothing.
    pub fn greeting(&mut self) -> Scripted<Value> {
        let mut version = [0; 4];
        self.stream.read_exact(&mut version)?;
        assert_eq!(u32::from_le_bytes(version), 0x34c2_bdc3);
        self.message()
    }

    /// The handshake up to the proof of the client, which is not looked at.
    pub fn challenge(&mut self, handshake: &Handshake) -> Scripted<String> {
        let first = self.greeting()?["authentication"].as_str().unwrap().to_string();
        let bare = first.strip_prefix("n,,").unwrap();
        let nonce = bare.split_once(",r=").unwrap().1;
        self.say(&json!({ "success": true, "min_protocol_version": 0, "max_protocol_version": 0, "server_version": "2.4.4" }))?;
        let challenge = format!("r={nonce}srv,s={},i={}", STANDARD.encode("salt"), handshake.iterations);
        self.say(&json!({ "success": true, "authentication": challenge }))?;
        self.message()?;
        Ok(format!("{bare},{challenge},c=biws,r={nonce}srv"))
    }

    pub fn refuse(&mut self, code: u64, error: &str) -> Scripted {
        self.say(&json!({ "success": false, "error_code": code, "error": error }))
    }

    pub fn shake_hands(&mut self, handshake: &Handshake) -> Scripted {
        let auth_message = self.challenge(handshake)?;
        let mut salted = [0; digest::SHA256_OUTPUT_LEN];
        let iterations = handshake.iterations.try_into().unwrap();
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, b"salt", handshake.password.as_bytes(), &mut salted);
        let key = |bytes: &[u8]| hmac::Key::new(hmac::HMAC_SHA256, bytes);
        let server_key = hmac::sign(&key(&salted), b"Server Key");
        let mut signature = hmac::sign(&key(server_key.as_ref()), auth_message.as_bytes()).as_ref().to_vec();
        signature[0] ^= u8::from(!handshake.honest);
        self.say(&json!({ "success": true, "authentication": format!("v={}", STANDARD.encode(signature)) }))
    }

    /// Everything up to the first query of the store's.
    pub fn welcome(&mut self) -> Scripted {
        self.shake_hands(&Handshake::default())?;
        self.introduce()
    }

    /// Says who it is, and what time it has.
    pub fn introduce(&mut self) -> Scripted {
        let (token, _) = self.query()?;
        self.reply(token, &json!({ "t": 5, "r": [{ "name": "scripted", "id": self.id }] }))?;
        let (token, _) = self.query()?;
        self.reply(token, &json!({ "t": 1, "r": [now() + self.ahead] }))
    }

    pub fn query(&mut self) -> Scripted<(u64, Value)> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header)?;
        let token = u64::from_le_bytes(header[..8].try_into().unwrap());
        let mut body = vec![0; u32::from_le_bytes(header[8..].try_into().unwrap()) as usize];
        self.stream.read_exact(&mut body)?;
        Ok((token, serde_json::from_slice(&body).unwrap()))
    }

    /// The next query on the table of locks that can be answered with a row or a count. Everything else is
    /// answered meanwhile as by a server on which nothing ever happens.
    pub fn asked(&mut self) -> Scripted<(u64, Asked)> {
        loop {
            let (token, query) = self.query()?;
            let text = query.to_string();
            if let Some(row) = row_in(&query) {
                return Ok((token, Asked::Acquire(row)));
            }
            if text.contains("[174,") {
                // RethinkDB ql2.proto: Term.TermType.CONFIG.
                self.answer(token, &self.table_config.clone())?;
            } else if text.contains("server_config") {
                if let Some(surveyed) = &self.on_survey {
                    let _ = surveyed.send(());
                }
                self.answer(token, &json!(self.servers))?;
            } else if query[0] == 2 || text.contains("[152,") {
                // RethinkDB ql2.proto: Query.QueryType.CONTINUE, Term.TermType.CHANGES.
                self.feeds_begun += usize::from(query[0] == 1);
                if let Some(row) = self.feeds.pop_front() {
                    self.reply(token, &json!({ "t": 3, "r": [{ "new_val": row }], "n": [] }))?;
                }
            } else if text.contains("instance_token") {
                return Ok((token, Asked::Release(text)));
            } else if query[0] == 1 {
                self.answer(token, &Value::Null)?;
            } else if query[0] == 3 {
                self.reply(token, &json!({ "t": 2, "r": [] }))?;
            }
        }
    }

    pub fn reply(&mut self, token: u64, body: &Value) -> Scripted {
        let body = body.to_string();
        let mut frame = token.to_le_bytes().to_vec();
        frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
        frame.extend_from_slice(body.as_bytes());
        self.send(&frame)
    }

    /// One value, with the server's now beside it.
    pub fn answer(&mut self, token: u64, result: &Value) -> Scripted {
        self.reply(token, &json!({ "t": 1, "r": [[now() + self.ahead, result]] }))
    }

    /// One row was written so: `inserted`, `replaced` or `deleted`.
    pub fn answer_done(&mut self, token: u64, done: &str) -> Scripted {
        self.answer(token, &json!({ "errors": 0, (done): 1 }))
    }

    /// The row stays as it is: the query's own error, which contains it. Null where no row exists.
    pub fn answer_kept(&mut self, token: u64, row: &Value) -> Scripted {
        self.answer(token, &json!({ "errors": 1, "first_error": format!("nblock keeps {row}") }))
    }

    pub fn fail(&mut self, token: u64, error: u64, message: &str) -> Scripted {
        self.reply(token, &json!({ "t": 18, "e": error, "r": [message], "b": [] }))
    }
}

pub enum Asked {
    /// The row that it wants to write.
    Acquire(Value),
    /// The query's text, with the token in it: to release, or to renew.
    Release(String),
}

pub fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64()
}

pub fn time(at: f64) -> Value {
    json!({ "$reql_type$": "TIME", "epoch_time": (at * 1000.0).floor() / 1000.0, "timezone": "+00:00" })
}

/// The row that an acquire would write, with a lease of a minute.
fn row_in(query: &Value) -> Option<Value> {
    match query {
        Value::Object(fields) if fields.contains_key("key_hash") && fields.contains_key("instance_token") => {
            let mut row = query.clone();
            row["expires_at"] = time(now() + 60.0);
            row["owner"] = json!({ "host": "h", "pid": 1, "boot_id": "b", "app": "a", "acquired_at": time(now()) });
            Some(row)
        }
        Value::Object(fields) => fields.values().find_map(row_in),
        Value::Array(items) => items.iter().find_map(row_in),
        _ => None,
    }
}
