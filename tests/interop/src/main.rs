//! Reads back, with another driver, what nblock wrote to a RethinkDB server, and writes what nblock must read.
//!
//! `NBLOCK_TEST_RETHINKDB_URL` names the server: without user, password or TLS, which this driver cannot do
//! or which this test does not need. tests/interop/run.sh builds and runs it where a server is named.

use futures::TryStreamExt;
use nblock::client::Client;
use nblock::key::Key;
use nblock::options::{ClientOptions, LockOptions};
use nblock::sys::runtime::wait;
use nblock::url::Url;
use reql::cmd::connect::Options;
use reql::{Session, r};
use serde_json::{Value, json};

const TABLE: &str = "nobrainer_locks";

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let text = std::env::var("NBLOCK_TEST_RETHINKDB_URL").expect("NBLOCK_TEST_RETHINKDB_URL names a server");
    let url = Url::parse(&text).expect("a store URL");
    let database = url.path.trim_matches('/').to_string();
    let host = url.hosts.first().expect("a host");
    let options = Options::new().host(host.name.clone()).port(host.port.unwrap_or(28015));
    let session = r.connect(options).await.expect("the client connects");
    let client = wait(Client::open(Some(&text), ClientOptions::default())).expect("nblock connects");

    // What nblock wrote is NoBrainer's record.
    let key = Key::new(format!("interop:{}", std::process::id()).as_bytes()).expect("a key");
    let lock = client.lock(key.clone(), LockOptions::default()).expect("a lock");
    assert!(wait(lock.try_lock(LockOptions::default())).expect("an answer"));
    let row = row(&session, &database, &key).await;
    assert_eq!(row["key"], json!(key.as_str()));
    assert_eq!(row["key_hash"], json!(key.hash().base64()));
    assert_eq!(row["instance_token"], json!(lock.instance_token().expect("held")));
    assert_eq!(row["expires_at"]["$reql_type$"], json!("TIME"));
    wait(lock.unlock()).expect("unlocked");
    assert_eq!(self::row(&session, &database, &key).await, Value::Null);

    // A record that another wrote refuses nblock, and is left as it is.
    let mut theirs = row.clone();
    theirs["instance_token"] = json!("theirs");
    put(&session, &database, &theirs).await;
    assert!(!wait(lock.try_lock(LockOptions::default())).expect("an answer"));
    assert_eq!(self::row(&session, &database, &key).await, theirs);

    // One that ran out is taken over.
    theirs["expires_at"]["epoch_time"] = json!(1.0);
    put(&session, &database, &theirs).await;
    assert!(wait(lock.try_lock(LockOptions::default())).expect("an answer"));
    assert_ne!(self::row(&session, &database, &key).await["instance_token"], json!("theirs"));
    wait(lock.unlock()).expect("unlocked");
    assert_eq!(self::row(&session, &database, &key).await, Value::Null);
    println!("the crate reql saw what nblock says: a grant, a refusal, a take-over, two releases");
}

async fn row(session: &Session, database: &str, key: &Key) -> Value {
    let query = r.db(database.to_string()).table(TABLE).get(key.hash().base64());
    let mut found = query.run::<_, Value>(session);
    found.try_next().await.expect("the client reads").unwrap_or(Value::Null)
}

async fn put(session: &Session, database: &str, row: &Value) {
    let table = || r.db(database.to_string()).table(TABLE);
    let hash = row["key_hash"].as_str().expect("a hash").to_string();
    let mut deleted = table().get(hash).delete(()).run::<_, Value>(session);
    deleted.try_next().await.expect("the client deletes");
    let mut done = table().insert(row.clone()).run::<_, Value>(session);
    let done = done.try_next().await.expect("the client writes").expect("an answer");
    assert_eq!(done["errors"], json!(0), "{done}");
}
