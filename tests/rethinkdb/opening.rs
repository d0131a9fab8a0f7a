//! Opening a client: what is waited for, and what is made.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::options::{LockOptions, Timeout};
use nblock::sys::runtime::wait;
use serde_json::{Value, json};

use crate::scripted::{lock, options, patient, serve};
use crate::server::{Asked, Connection, Handshake, Scripted, Server};

const NO_PRIMARY: &str = "Cannot perform read: primary replica for shard [\"\", +inf) not available";

/// RethinkDB ql2.proto: Response.ErrorType.
const OP_FAILED: u64 = 4_100_000;
const PERMISSION_ERROR: u64 = 6_000_000;

fn welcoming(script: impl Fn(usize, Connection) -> Scripted + Send + Sync + 'static) -> Server {
    Server::start(move |number, mut connection| {
        let _ = connection.welcome().and_then(|()| script(number, connection));
    })
}

fn no_wait() -> LockOptions {
    LockOptions { timeout: Some(Timeout::NoWait), ..LockOptions::default() }
}

/// One that is being started hangs up, or is cut off in its first words; so does a proxy before it.
#[test]
fn a_server_that_is_being_started_is_waited_for() {
    let server = Server::start(|number, mut connection| {
        let _ = match number {
            0 => Ok(()),
            1 => connection.greeting().map(drop),
            2 => connection.challenge(&Handshake::default()).map(drop),
            3 => connection.welcome(),
            _ => connection.welcome().and_then(|()| serve(connection)),
        };
    });
    let lock = lock(&wait(Client::open(Some(&server.url()), options(60_000))).unwrap());
    assert!(wait(lock.lock(no_wait())).unwrap());
    assert_eq!(server.connections(), 5);
}

/// While a primary is elected, opening waits; and so a program that is started then, and does not wait for its
/// lock, does not get the error that there is no store.
#[test]
fn a_primary_is_waited_for() {
    let asked = AtomicUsize::new(0);
    let server = welcoming(move |_, mut connection| {
        loop {
            let (token, query) = connection.query()?;
            match asked.fetch_add(1, Ordering::SeqCst) {
                0..5 => connection.fail(token, OP_FAILED, NO_PRIMARY)?,
                5 => {
                    assert_eq!(query[0], 1);
                    connection.answer(token, &Value::Null)?;
                    return serve(connection);
                }
                _ => unreachable!("others are answered by `serve`"),
            }
        }
    });
    let lock = lock(&wait(Client::open(Some(&server.url()), options(60_000))).unwrap());
    assert!(wait(lock.lock(no_wait())).unwrap());
    assert_eq!(server.connections(), 1);
}

/// After the connect timeout it is opened anyway: a call's own timeout decides how long it waits.
#[test]
fn a_server_without_a_primary_is_opened_in_the_end() {
    let (opened, is_open) = std::sync::mpsc::channel();
    let is_open = Mutex::new(is_open);
    let server = welcoming(move |_, mut connection| {
        while is_open.lock().unwrap().try_recv().is_err() {
            let (token, _) = connection.query()?;
            connection.fail(token, OP_FAILED, NO_PRIMARY)?;
        }
        // And of two tries to lock, the first meets no primary yet.
        let (token, _) = connection.asked()?;
        connection.fail(token, OP_FAILED, NO_PRIMARY)?;
        serve(connection)
    });
    let started = Boottime::now();
    let client = wait(Client::open(Some(&server.url()), options(2000))).unwrap();
    assert!(Boottime::now().since(started) >= Duration::from_millis(2000));
    let error = wait(client.ping()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
    opened.send(()).unwrap();
    assert!(wait(lock(&client).lock(patient())).unwrap());
}

/// A server without the table of locks: what was made there, and with how many replicas.
#[derive(Default)]
struct Fresh {
    made: Mutex<Vec<Value>>,
}

impl Fresh {
    /// Answers all that is asked until the table is there and used; then grants.
    fn serve(&self, mut connection: Connection, servers: Option<u64>) -> Scripted {
        loop {
            let (token, query) = connection.query()?;
            let text = query.to_string();
            let there = !self.made.lock().unwrap().is_empty();
            if text.contains("server_config") {
                match servers {
                    Some(servers) => connection.answer(token, &json!(servers))?,
                    None => connection.fail(token, PERMISSION_ERROR, "User `admin` may not.")?,
                }
            } else if text.contains("table_config") {
                connection.answer(token, &if there { json!(["one"]) } else { json!([]) })?;
            } else if let Some(options) = find(&query, TABLE_CREATE) {
                self.made.lock().unwrap().push(options[2].clone());
                connection.answer(token, &json!({ "config_changes": [{ "new_val": { "id": "one" } }] }))?;
            } else if find(&query, WAIT).is_some() {
                connection.answer(token, &json!({ "ready": 1 }))?;
            } else if find(&query, CONFIG).is_some() {
                connection.answer(token, &json!({ "write_acks": "majority" }))?;
            } else if !there {
                connection.fail(token, OP_FAILED, "Table `db.nobrainer_locks` does not exist.")?;
            } else {
                connection.answer(token, &Value::Null)?;
                return serve(connection);
            }
        }
    }
}

/// RethinkDB ql2.proto: Term.TermType.
const TABLE_CREATE: u64 = 60;
const CONFIG: u64 = 174;
const WAIT: u64 = 177;

/// The term of this kind within a query.
fn find(term: &Value, kind: u64) -> Option<&Value> {
    let items = term.as_array()?;
    if items.first().and_then(Value::as_u64) == Some(kind) && items.get(1).is_some_and(Value::is_array) {
        return Some(term);
    }
    items.iter().find_map(|item| find(item, kind))
}

/// The table that is missing is made when the client is opened, and not within a lock's own timeout; with as many
/// replicas as there are servers, three at most.
#[test]
fn the_table_is_made_when_the_client_is_opened() {
    std::thread::scope(|scope| {
        for (servers, replicas) in [(Some(1), json!(1)), (Some(2), json!(2)), (Some(5), json!(3)), (None, Value::Null)]
        {
            scope.spawn(move || {
                let fresh = Arc::new(Fresh::default());
                let made = Arc::clone(&fresh);
                let server = welcoming(move |_, connection| fresh.serve(connection, servers));
                let client = wait(Client::open(Some(&server.url()), options(60_000))).unwrap();
                let made = made.made.lock().unwrap().clone();
                assert_eq!(made.len(), 1, "{made:?}");
                assert_eq!(made[0]["replicas"], replicas, "of {servers:?} servers");
                assert_eq!(made[0]["primary_key"], "key_hash");
                assert!(wait(lock(&client).lock(no_wait())).unwrap());
            });
        }
    });
}

/// A server that has fewer servers than it said when they were counted.
#[test]
fn a_server_that_went_away_while_the_table_was_made() {
    let fresh = Arc::new(Fresh::default());
    let counted = AtomicUsize::new(0);
    let server = welcoming(move |_, mut connection| {
        while counted.load(Ordering::SeqCst) == 0 {
            let (token, query) = connection.query()?;
            let text = query.to_string();
            if text.contains("server_config") {
                connection.answer(token, &json!(3))?;
            } else if text.contains("table_config") {
                connection.answer(token, &json!([]))?;
            } else if find(&query, TABLE_CREATE).is_some() {
                let said = "Can't put 3 replicas on servers with the tag `default` because there are only 2 servers with \
                            the tag `default`.";
                connection.fail(token, OP_FAILED, said)?;
                counted.store(1, Ordering::SeqCst);
            } else {
                connection.fail(token, OP_FAILED, "Table `db.nobrainer_locks` does not exist.")?;
            }
        }
        fresh.serve(connection, Some(2))
    });
    let client = wait(Client::open(Some(&server.url()), options(60_000))).unwrap();
    assert!(wait(lock(&client).lock(no_wait())).unwrap());
}

/// An account that may not read, write or make the table gets an error that says which, and what to type.
#[test]
fn an_account_without_rights_is_told_which_table() {
    let refused = |answer: fn(&Value) -> Option<(u64, &'static str)>| {
        welcoming(move |_, mut connection| {
            loop {
                let (token, query) = connection.query()?;
                match answer(&query) {
                    Some((code, message)) => connection.fail(token, code, message)?,
                    None => connection.answer(token, &json!([]))?,
                }
            }
        })
    };
    let denied = "User `admin` does not have the required `read` permission.";
    let reading = refused(|_| Some((PERMISSION_ERROR, "User `admin` does not have the required `read` permission.")));
    let error = wait(Client::open(Some(&reading.url()), options(60_000))).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    for part in ["db.nobrainer_locks", denied.trim_end_matches('.'), ".grant(\"admin\", {read: true, write: true})"] {
        assert!(error.message().contains(part), "{part:?} is missing: {error}");
    }

    let making = refused(|query| {
        let text = query.to_string();
        if text.contains("server_config") || find(query, TABLE_CREATE).is_some() {
            return Some((PERMISSION_ERROR, "User `admin` does not have the required `config` permission."));
        }
        (!text.contains("table_config")).then_some((OP_FAILED, "Table `db.nobrainer_locks` does not exist."))
    });
    let error = wait(Client::open(Some(&making.url()), options(60_000))).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    for part in ["db.nobrainer_locks", "may not create it", "tableCreate(\"nobrainer_locks\""] {
        assert!(error.message().contains(part), "{part:?} is missing: {error}");
    }
}

/// What in the cluster's set-up endangers locks is seen by a ping.
#[test]
fn a_ping_warns_of_a_table_with_one_replica() {
    let pinged = |replicas: Value, servers| {
        let server = welcoming(move |_, mut connection| {
            connection.table_config = json!({ "write_acks": "majority", "shards": [{ "replicas": replicas }] });
            connection.servers = servers;
            match connection.asked()? {
                (_, Asked::Acquire(_) | Asked::Release(_)) => panic!("nobody locks here"),
            }
        });
        let client = wait(Client::open(Some(&server.url()), options(60_000))).unwrap();
        wait(client.ping()).unwrap().caveats
    };
    assert_eq!(pinged(json!(["a"]), 1), Vec::<String>::new());
    assert_eq!(pinged(json!(["a", "b", "c"]), 3), Vec::<String>::new());
    let caveats = pinged(json!(["a"]), 3);
    assert_eq!(caveats.len(), 1, "{caveats:?}");
    for part in ["db.nobrainer_locks", "one replica", "3 servers", "reconfigure({shards: 1, replicas: 3})"] {
        assert!(caveats[0].contains(part), "{part:?} is missing: {caveats:?}");
    }
}

/// RFC 7677: an impostor that asks for few rounds of hashing could guess the password easily.
#[test]
fn few_rounds_of_hashing_without_tls() {
    let asking_for = |iterations, password| {
        Server::start(move |_, mut connection| {
            let handshake = Handshake { iterations, password, honest: true };
            let _ = connection
                .shake_hands(&handshake)
                .and_then(|()| connection.introduce())
                .and_then(|()| serve(connection));
        })
    };
    let server = asking_for(4095, "secret");
    let error = wait(Client::open(Some(&server.url()), options(60_000))).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(error.message().contains("fewer than 4096 rounds") && error.message().contains("TLS"), "{error}");
    // There is nothing to guess where there is no password.
    let server = asking_for(1, "");
    let url = server.url().replace("admin:secret@", "");
    assert!(wait(lock(&wait(Client::open(Some(&url), options(60_000))).unwrap()).lock(no_wait())).unwrap());
}
