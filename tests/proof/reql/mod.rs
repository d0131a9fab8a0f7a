//! A server in this program's memory that speaks RethinkDB's protocol, and knows as much of its language as
//! the store uses. What a real one does rarely it does often, by seed: it applies a query some time after it
//! arrived, with the clock of its arrival, after later ones, and even when its connection is gone.

mod evaluation;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use crate::scripted::{self, Handshake};
use crate::support::Random;
use evaluation::{Changed, Evaluation, Fault, Tables, feed_of, is_stream};

/// One query of so many is applied late.
const LATE: usize = 50;
/// By so many milliseconds at most.
const LATE_BY: usize = 150;

/// RethinkDB ql2.proto: Query.QueryType.
mod query {
    pub const START: u64 = 1;
    pub const CONTINUE: u64 = 2;
    pub const STOP: u64 = 3;
    pub const SERVER_INFO: u64 = 5;
}

/// RethinkDB ql2.proto: Response.ResponseType, and Response.ErrorType of what is not there.
mod response {
    pub const SUCCESS_ATOM: u64 = 1;
    pub const SUCCESS_SEQUENCE: u64 = 2;
    pub const SUCCESS_PARTIAL: u64 = 3;
    pub const SERVER_INFO: u64 = 5;
    pub const RUNTIME_ERROR: u64 = 18;
    pub const NON_EXISTENCE: u64 = 3_000_000;
}

/// Lives as long as the program.
pub struct Server {
    port: u16,
}

impl Server {
    pub fn start(seed: u64) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state: Arc<Mutex<State>> = Arc::default();
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let (reader, state) = (stream.unwrap(), Arc::clone(&state));
                let _ = reader.set_nodelay(true);
                let stream = Arc::new(Mutex::new(reader.try_clone().unwrap()));
                let session = Session { number, stream, state };
                let random = Random::new(seed + number as u64);
                std::thread::spawn(move || session.serve(scripted::Connection::over(Box::new(reader)), random));
            }
        });
        Server { port }
    }

    pub fn url(&self) -> String {
        format!("rethinkdb://admin:{}@127.0.0.1:{}/db", Handshake::default().password, self.port)
    }
}

#[derive(Default)]
struct State {
    tables: Tables,
    feeds: Vec<Feed>,
}

struct Feed {
    session: Session,
    token: u64,
    table: String,
    key: String,
    /// What was not yet asked for.
    news: Vec<Value>,
    asked: bool,
}

impl Feed {
    fn tell(&mut self) {
        if self.asked && !self.news.is_empty() {
            self.asked = false;
            self.session.reply(self.token, response::SUCCESS_PARTIAL, json!(std::mem::take(&mut self.news)));
        }
    }
}

impl State {
    /// Answers a query, and tells those who watch what it changed.
    fn answer(&mut self, session: &Session, token: u64, term: &Value, now: f64) {
        let mut evaluation = Evaluation::new(&mut self.tables, now);
        let answer = evaluation.value(term);
        for Changed { table, key, row } in evaluation.changed {
            for feed in self.feeds.iter_mut().filter(|feed| feed.table == table && feed.key == key) {
                feed.news.push(json!({ "new_val": row }));
                feed.tell();
            }
        }
        match answer {
            Ok(values) if is_stream(term) => session.reply(token, response::SUCCESS_SEQUENCE, values),
            Ok(value) => session.reply(token, response::SUCCESS_ATOM, json!([value])),
            Err(Fault::Missing(why)) => session.fail(token, response::NON_EXISTENCE, &why),
            Err(Fault::Wrong(why)) => panic!("{why}, in {term}"),
        }
    }
}

/// One connection.
#[derive(Clone)]
struct Session {
    number: usize,
    stream: Arc<Mutex<TcpStream>>,
    state: Arc<Mutex<State>>,
}

impl Session {
    fn serve(&self, mut connection: scripted::Connection, mut random: Random) {
        if connection.shake_hands(&Handshake::default()).is_err() {
            return;
        }
        while let Ok((token, query)) = connection.query() {
            self.take(token, query, &mut random);
        }
        self.state.lock().unwrap().feeds.retain(|feed| feed.session.number != self.number);
    }

    fn take(&self, token: u64, mut query: Value, random: &mut Random) {
        let now = scripted::now();
        let mut state = self.state.lock().unwrap();
        let term = query.get_mut(1).map_or(Value::Null, Value::take);
        let mut feeds = state.feeds.iter_mut();
        match query[0].as_u64() {
            Some(query::START) => match feed_of(&term) {
                Some((table, key)) => {
                    let row = state.tables.get(&table).and_then(|rows| rows.get(&key)).unwrap_or(&Value::Null);
                    let news = vec![json!({ "new_val": row })];
                    let mut feed = Feed { session: self.clone(), token, table, key, news, asked: true };
                    feed.tell();
                    state.feeds.push(feed);
                }
                None if random.below(LATE) == 0 => {
                    let (session, length) = (self.clone(), Duration::from_millis(random.below(LATE_BY) as u64));
                    std::thread::spawn(move || {
                        std::thread::sleep(length);
                        session.state.lock().unwrap().answer(&session, token, &term, now);
                    });
                }
                None => state.answer(self, token, &term, now),
            },
            Some(query::CONTINUE) => match feeds.find(|feed| (feed.session.number, feed.token) == (self.number, token))
            {
                Some(feed) => {
                    feed.asked = true;
                    feed.tell();
                }
                None => self.fail(token, 0, "there is no such stream"),
            },
            Some(query::STOP) => {
                state.feeds.retain(|feed| (feed.session.number, feed.token) != (self.number, token));
                self.reply(token, response::SUCCESS_SEQUENCE, json!([]));
            }
            Some(query::SERVER_INFO) => {
                self.reply(token, response::SERVER_INFO, json!([{ "name": "memory", "id": "x" }]))
            }
            other => panic!("a query of type {other:?}"),
        }
    }

    fn reply(&self, token: u64, kind: u64, items: Value) {
        self.send(token, &json!({ "t": kind, "r": items, "n": [] }));
    }

    fn fail(&self, token: u64, error: u64, message: &str) {
        self.send(token, &json!({ "t": response::RUNTIME_ERROR, "e": error, "r": [message], "b": [] }));
    }

    /// A client that has hung up gets nothing.
    fn send(&self, token: u64, body: &Value) {
        let body = body.to_string();
        let mut frame = token.to_le_bytes().to_vec();
        frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
        frame.extend_from_slice(body.as_bytes());
        let _ = self.stream.lock().unwrap().write_all(&frame);
    }
}
