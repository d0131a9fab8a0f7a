//! The PostgreSQL store on real servers: what is no other store's matter.

use std::io::{BufRead, BufReader, Lines, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::lock::Lock;
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::protocol::{Acquisition, Change, Condition, Holder, Reply, Write};
use nblock::store::{StoreErrorKind, StoreOptions};
use nblock::sys::runtime::wait;
use nblock::token::HoldId;
use nblock::url::Url;

use crate::servers::Server;
use crate::support::{
    Directory, LONG, PATIENCE, answer, client, eventually, fresh_key, identity, is_root, key, lock, open,
};

/// A server that the tests of this program share, while one of them has it. Its data is not synced.
pub fn shared() -> Arc<Server> {
    static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let server = Arc::new(Server::start("postgresql", &["fsync=off", "max_connections=200"]));
        *shared = Arc::downgrade(&server);
        server
    })
}

/// What psql prints of a statement.
fn sql(server: &Server, statement: &str) -> String {
    sql_in(server, "postgres", statement)
}

fn sql_in(server: &Server, database: &str, statement: &str) -> String {
    let url = format!("postgres://postgres@127.0.0.1:{}/{database}", server.port);
    server.ask("psql", &["-qAtX", "-v", "ON_ERROR_STOP=1", "-d", &url, "-c", statement])
}

/// A database of one test's own on the shared server, and a URL of it.
fn fresh_database(server: &Server) -> (String, String) {
    let name = format!("d{}", &HoldId::random().to_string()[..12]);
    sql(server, &format!("CREATE DATABASE {name}"));
    let url = format!("postgres://postgres@127.0.0.1:{}/{name}", server.port);
    (name, url)
}

fn forever() -> LockOptions {
    LockOptions { timeout: Some(Timeout::Forever), ..LockOptions::default() }
}

/// The error of opening a client.
fn refused(url: &str) -> nblock::error::Error {
    let limits = Duration::from_secs(20);
    let options = ClientOptions { op_timeout: limits, connect_timeout: limits, ..ClientOptions::default() };
    match wait(Client::open(Some(url), options)) {
        Err(error) => error,
        Ok(client) => {
            let tried = lock(&client, &fresh_key());
            wait(tried.try_lock(LockOptions::default())).expect_err("nothing is granted there")
        }
    }
}

#[track_caller]
fn says(error: &nblock::error::Error, kind: ErrorKind, parts: &[&str]) {
    assert_eq!(error.kind(), kind, "{error}");
    for part in parts {
        assert!(error.message().contains(part), "{part}: {error}");
    }
}

#[test]
fn bad_accounts_and_databases_are_named() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    let at = |account: &str, database: &str| format!("postgres://{account}@127.0.0.1:{}/{database}", server.port);
    says(&refused(&at("postgres", "nowhere")), ErrorKind::Store, &["nowhere", "3D000"]);
    says(&refused(&at("nobody_here", &name)), ErrorKind::Denied, &["nobody_here", "28000"]);
    says(&refused(&format!("{url}?table=nowhere.locks")), ErrorKind::Store, &["nowhere", "CREATE SCHEMA"]);
    says(&refused(&format!("{url}?options=-c%20no_such_setting%3D1")), ErrorKind::Store, &["no_such_setting"]);
    says(&refused(&format!("{url}?sslmode=require")), ErrorKind::Store, &["no TLS", "sslmode=disable"]);
}

/// By SCRAM, over TLS, with each of libpq's ways to look at a certificate.
#[test]
fn passwords_and_certificates() {
    let files = Directory::new();
    std::fs::create_dir_all(files.path()).unwrap();
    let certificates = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("tests/rethinkdb/certificates");
    let copied = |name: &str| {
        let path = files.path().join(name);
        std::fs::copy(certificates.join(name), &path).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        path
    };
    let (certificate, secret, authority) = (copied("server.pem"), copied("server.key"), copied("authority.pem"));
    let hba = files.path().join("hba");
    std::fs::write(&hba, "local all all trust\nhostssl all all all scram-sha-256\nhostnossl all postgres all trust\n")
        .unwrap();
    if is_root() {
        let owner = std::process::Command::new("chown").arg("-R").arg("nobody").arg(files.path()).status();
        assert!(owner.unwrap().success());
    }
    let ssl = ["ssl=on".to_string(), format!("ssl_cert_file={}", certificate.display())];
    let options =
        [ssl.to_vec(), vec![format!("ssl_key_file={}", secret.display()), format!("hba_file={}", hba.display())]]
            .concat();
    let server = Server::start("postgresql", &options.iter().map(String::as_str).collect::<Vec<_>>());
    let socket = server.socket.clone().unwrap();
    let directory = socket.parent().unwrap().display().to_string();
    server.ask(
        "psql",
        &[
            "-h",
            &directory,
            "-p",
            "{port}",
            "-U",
            "postgres",
            "-c",
            "CREATE ROLE al LOGIN PASSWORD 's3cret'; GRANT ALL ON SCHEMA public TO al",
        ],
    );
    let url = |account: &str, host: &str, options: &str| {
        format!("postgres://{account}@{host}:{}/postgres?{options}", server.port)
    };
    let works = |url: &str| {
        let client = client(url);
        assert!(wait(lock(&client, &fresh_key()).try_lock(LockOptions::default())).unwrap(), "{url}");
    };
    let ca = format!("sslrootcert={}", authority.display());
    for options in
        ["", "sslmode=prefer", "sslmode=require", &format!("sslmode=require&{ca}"), &format!("sslmode=verify-ca&{ca}")]
    {
        works(&url("al:s3cret", "127.0.0.1", options));
    }
    works(&url("al:s3cret", "localhost", &format!("sslmode=verify-full&{ca}")));
    let wrong = refused(&url("al:wrong", "127.0.0.1", "sslmode=require"));
    says(&wrong, ErrorKind::Denied, &["\"al\"", "password authentication failed", "28P01"]);
    assert!(!wrong.message().contains("wrong"), "{wrong}");
    says(&refused(&url("al", "127.0.0.1", "sslmode=require&passfile=/nowhere")), ErrorKind::Denied, &["password"]);
    says(&refused(&url("al:s3cret", "127.0.0.1", "sslmode=disable")), ErrorKind::Denied, &["28000"]);
    // The other way is tried where this one is refused, as libpq does.
    works(&url("al:s3cret", "127.0.0.1", "sslmode=allow"));
    let strangers = certificates.join("stranger.pem").display().to_string();
    for mode in ["require", "verify-ca", "verify-full"] {
        let error = refused(&url("al:s3cret", "localhost", &format!("sslmode={mode}&sslrootcert={strangers}")));
        says(&error, ErrorKind::Store, &["not signed by", "sslrootcert="]);
    }
    // By the socket, where no TLS is.
    let escaped = directory.replace('/', "%2F");
    let by_socket = format!("postgres://postgres@{escaped}:{}/postgres", server.port);
    works(&format!("{by_socket}?sslmode=require"));
    let by_tls = url("al:s3cret", "localhost", &format!("sslmode=verify-full&{ca}&application_name=left"));
    leaves_nothing_behind(&server, "postgres", &by_socket, &by_tls);
}

#[test]
fn a_table_of_another_shape_grants_nothing() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    let ours = nblock::stores::postgres::schema(None, "postgres").unwrap();
    let create = ours.split(';').next().unwrap();
    let without_key = create.replace("bytea PRIMARY KEY", "bytea");
    let zoneless = create.replace("ends_at timestamptz", "ends_at timestamp");
    let text = create.replace("token bytea", "token text");
    let less = create.replace("    fence bigint NOT NULL,\n", "");
    for (create, part) in [
        (without_key, "not unique"),
        (zoneless, "ends_at is timestamp without time zone"),
        (text, "token is text"),
        (less, "no column fence"),
    ] {
        sql_in(&server, &name, &format!("DROP TABLE IF EXISTS nblock_locks; {create}"));
        says(&refused(&url), ErrorKind::Store, &[part, "public\".\"nblock_locks", "table="]);
    }
    // Made so under a client that has looked at it: no grant, and an error in words.
    sql_in(&server, &name, "DROP TABLE nblock_locks");
    let store = open(&url).unwrap();
    let free = fresh_key();
    let mut holder = Acquisition::plain(HoldId::random(), LONG, identity());
    let (_, change) = holder.ask();
    assert!(matches!(answer(store.change(&free, change.clone())), Ok(Reply::Applied { .. })));
    assert!(matches!(
        answer(store.change(&free, Change::new(Condition::Mine(holder_proof(&change)), Write::Delete))),
        Ok(Reply::Applied { .. })
    ));
    sql_in(&server, &name, "ALTER TABLE nblock_locks ALTER ends_at TYPE timestamp");
    let mut other = Acquisition::plain(HoldId::random(), LONG, identity());
    let error = answer(store.change(&free, other.ask().1)).expect_err("no grant by a clock without a zone");
    assert!(error.kind == StoreErrorKind::Rejected && error.message.contains("ends_at"), "{error}");
}

fn holder_proof(change: &Change) -> nblock::protocol::Proof {
    match &change.write {
        Write::Put(new) => match new.holder {
            Holder::Plain { token, .. } => nblock::protocol::Proof::Token(token),
            _ => panic!("a plain hold"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn rows_that_are_no_lock_records_are_held() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    let client = client(&url);
    for (set, part) in [
        ("key = '\\x61'", Some("another key")),
        ("token = '\\xff00'", Some("not UTF-8")),
        ("ends_at = '-infinity'", Some("before 1970")),
        ("ends_at = '3000-01-01'", Some("2554")),
        ("token = 'a later version''s', ends_at = 'infinity'", None),
    ] {
        let key = fresh_key();
        let ours = lock(&client, &key);
        assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
        sql_in(&server, &name, &format!("UPDATE nblock_locks SET {set} WHERE key = '{}'", key.as_str()));
        let before = sql_in(&server, &name, "SELECT * FROM nblock_locks ORDER BY key_hash");
        let other = lock(&client, &key);
        match (wait(other.try_lock(LockOptions::default())), part) {
            (Err(error), Some(part)) => says(&error, ErrorKind::Store, &[part]),
            (Ok(granted), None) => assert!(!granted, "{set}"),
            (outcome, _) => panic!("{set}: {outcome:?}"),
        }
        let after = sql_in(&server, &name, "SELECT * FROM nblock_locks ORDER BY key_hash");
        assert_eq!(before, after, "{set}: nothing is lost");
    }
    // They hide nothing from a list but themselves.
    assert_eq!(wait(client.list(nblock::store::Filter::All)).unwrap().len(), 2);
}

#[test]
fn an_account_that_may_not_create_works_on_a_table_that_is_there() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    sql(&server, "DO $$ BEGIN CREATE ROLE plain LOGIN; EXCEPTION WHEN duplicate_object THEN END $$");
    let plain = url.replace("postgres@", "plain@");
    // PostgreSQL 15 gives nobody the right to make tables in public.
    let grant = "GRANT SELECT, INSERT, UPDATE ON \"public\".\"nblock_locks\" TO \"plain\"";
    says(&refused(&plain), ErrorKind::Denied, &["schema public", grant]);
    let schema = nblock::stores::postgres::schema(None, "plain").unwrap();
    let (create, grants) = schema.split_once(";\n").unwrap();
    sql_in(&server, &name, create);
    says(&refused(&plain), ErrorKind::Denied, &["nblock_locks", grant]);
    sql_in(&server, &name, "GRANT SELECT ON nblock_locks TO plain");
    says(&refused(&plain), ErrorKind::Denied, &["nblock_locks", grant]);
    sql_in(&server, &name, grants);
    let client = client(&plain);
    let ours = lock(&client, &fresh_key());
    assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
    wait(ours.unlock()).unwrap();
}

#[test]
fn a_server_that_takes_no_writes_says_so() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    drop(client(&url));
    sql(&server, &format!("ALTER DATABASE {name} SET default_transaction_read_only = on"));
    let options =
        ClientOptions { op_timeout: PATIENCE, connect_timeout: Duration::from_millis(500), ..ClientOptions::default() };
    let reads = wait(Client::open(Some(&url), options.clone())).unwrap();
    let error = wait(lock(&reads, &fresh_key()).try_lock(LockOptions::default())).unwrap_err();
    says(&error, ErrorKind::Unreachable, &["25006", "takes no writes"]);
    let pong = wait(reads.ping()).unwrap();
    assert!(pong.caveats.iter().any(|caveat| caveat.contains("takes no writes")), "{pong:?}");
    let error = wait(Client::open(Some(&format!("{url}?target_session_attrs=read-write")), options)).err().unwrap();
    says(&error, ErrorKind::Unreachable, &["takes no writes"]);
}

/// Many that find no table make it at once: it is one, and all of them use it.
#[test]
fn creation_survives_races() {
    let server = shared();
    for _ in 0..5 {
        let (name, url) = fresh_database(&server);
        let barrier = std::sync::Barrier::new(8);
        let contended = fresh_key();
        let granted: usize = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|number| {
                    // Each has a connection of its own.
                    let url = format!("{url}?application_name=racer{number}");
                    let (barrier, contended) = (&barrier, &contended);
                    scope.spawn(move || {
                        let store = open(&url).unwrap();
                        let mut holder = Acquisition::plain(HoldId::random(), LONG, identity());
                        barrier.wait();
                        let reply = answer(store.change(contended, holder.ask().1)).expect("it is answered");
                        usize::from(matches!(reply, Reply::Applied { .. }))
                    })
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).sum()
        });
        assert_eq!(granted, 1);
        assert_eq!(sql_in(&server, &name, "SELECT count(*) FROM nblock_locks WHERE token IS NOT NULL"), "1");
    }
}

/// Somebody's own transaction may have a row locked, for as long as it likes.
#[test]
fn a_row_that_others_have_locked_holds_nobody_up_for_long() {
    let server = shared();
    let (_, url) = fresh_database(&server);
    let here = client(&url);
    let contended = fresh_key();
    let ours = lock(&here, &contended);
    assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
    wait(ours.unlock()).unwrap();
    let other = OpenTransaction::locking(&url, &contended).done();

    let began = Instant::now();
    let error = wait(ours.try_lock(LockOptions::default())).unwrap_err();
    says(&error, ErrorKind::Unreachable, &["55P03"]);
    assert!(began.elapsed() >= Duration::from_millis(900), "it waits a while: {:?}", began.elapsed());
    // Nor are other keys held up, although they share the connection, for longer than that.
    let free = lock(&here, &fresh_key());
    assert!(wait(free.try_lock(LockOptions::default())).unwrap());
    // A waiter goes on, and is granted when the row is let go.
    let waiting = lock(&here, &contended);
    let asked = waiting.lock(forever());
    drop(other);
    assert!(wait(asked).unwrap());
}

/// Another session with a transaction that stays open until it is dropped.
struct OpenTransaction {
    psql: Child,
    says: Lines<BufReader<ChildStdout>>,
}

impl OpenTransaction {
    /// One that runs this statement, or waits for it.
    fn of(url: &str, statement: &str) -> OpenTransaction {
        let psql = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(".build/servers/bin/psql");
        let mut psql = Command::new(psql);
        psql.args(["-qAtX", "-d", url]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut psql = psql.spawn().unwrap();
        let says = BufReader::new(psql.stdout.take().unwrap()).lines();
        let mut session = OpenTransaction { psql, says };
        session.ask(&format!("BEGIN; {statement}; SELECT 'done'"));
        session
    }

    /// One that locks a key's row.
    fn locking(url: &str, key: &nblock::key::Key) -> OpenTransaction {
        OpenTransaction::of(url, &format!("SELECT FROM nblock_locks WHERE key = '{}' FOR UPDATE", key.as_str()))
    }

    fn ask(&mut self, statements: &str) {
        self.psql.stdin.as_mut().unwrap().write_all(format!("{statements};\n").as_bytes()).unwrap();
    }

    /// Its statement was run.
    fn done(mut self) -> OpenTransaction {
        self.until("done");
        self
    }

    fn until(&mut self, word: &str) {
        assert!(self.says.by_ref().map(Result::unwrap).any(|line| line == word), "psql ended before {word}");
    }
}

impl Drop for OpenTransaction {
    /// Returns when the server has undone it.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.ask("ROLLBACK; SELECT 'undone'");
            self.until("undone");
        }
        let _ = self.psql.kill();
        let _ = self.psql.wait();
    }
}

/// So many sessions in a database wait for a lock of the server's.
fn waiting(server: &Server, database: &str, count: usize) {
    let waiting =
        format!("SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}' AND wait_event_type = 'Lock'");
    eventually("they wait for it", || sql(server, &waiting) == count.to_string());
}

/// Statements that wait for a lock on the whole table until their time is over are cancelled: nothing of them goes on
/// in the server, and their connection serves on.
fn leaves_nothing_behind(server: &Server, database: &str, direct: &str, url: &str) {
    let limits = Duration::from_secs(1);
    let options = StoreOptions { op_timeout: limits, connect_timeout: PATIENCE };
    let store = nblock::stores::open(&Url::parse(url).unwrap(), &options).unwrap();
    let attempt =
        |key: &nblock::key::Key| store.change(key, Acquisition::plain(HoldId::random(), LONG, identity()).ask().1);
    let keys: Vec<_> = (0..30).map(|_| fresh_key()).collect();
    assert!(matches!(answer(attempt(&keys[0])), Ok(Reply::Applied { .. })));
    let backends = || {
        let pids = "SELECT string_agg(pid::text, ' ' ORDER BY pid) FROM pg_stat_activity \
                    WHERE application_name = 'left' AND datname = ";
        server.ask("psql", &["-qAtX", "-d", direct, "-c", &format!("{pids} '{database}'")])
    };
    let rows = || server.ask("psql", &["-qAtX", "-d", direct, "-c", "SELECT * FROM nblock_locks"]);
    let before = (backends(), rows());
    let other = OpenTransaction::of(direct, "LOCK TABLE nblock_locks").done();
    let replies: Vec<_> = keys.iter().map(attempt).collect();
    for reply in replies {
        let error = answer(reply).expect_err("the table is locked");
        assert!(error.kind == StoreErrorKind::Unreachable && error.message.contains("57014"), "{url}: {error}");
    }
    drop(other);
    assert_eq!((backends(), rows()), before);
    assert!(matches!(answer(attempt(&keys[1])), Ok(Reply::Applied { .. })));
}

#[test]
fn statements_that_are_given_up_are_cancelled() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    leaves_nothing_behind(&server, &name, &url, &named(&url, "left"));
    let pooler = Server::before(server.port, "pgbouncer", &["pool_mode = transaction", "default_pool_size = 1"]);
    let (name, url) = fresh_database(&server);
    let pooled = format!("postgres://postgres@127.0.0.1:{}/{name}?application_name=left", pooler.port);
    leaves_nothing_behind(&server, &name, &url, &pooled);
}

/// A statement that waited for others until its attempt takes nothing any more changes nothing. Each wait is
/// shorter than `lock_timeout`.
#[test]
fn an_attempt_that_had_to_wait_takes_nothing_too_late() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    let store = open(&url).unwrap();
    let attempt = || Acquisition::plain(HoldId::random(), LONG, identity()).ask().1;
    let free = fresh_key();
    let granted = attempt();
    let released = Change::new(Condition::Mine(holder_proof(&granted)), Write::Delete);
    for change in [granted, released] {
        assert!(matches!(answer(store.change(&free, change)), Ok(Reply::Applied { .. })));
    }
    let rows = || sql_in(&server, &name, "SELECT * FROM nblock_locks");
    let before = rows();
    let is_too_late = |reply| {
        let reply = answer(reply);
        assert!(matches!(reply, Ok(Reply::TooLate)), "{reply:?}");
        assert_eq!(rows(), before);
    };

    // Behind two that lock the row, one after the other.
    let first = OpenTransaction::locking(&url, &free).done();
    let second = OpenTransaction::locking(&url, &free);
    waiting(&server, &name, 1);
    let not_after = Boottime::now() + Duration::from_millis(1_400);
    let reply = store.change(&free, attempt().until(not_after));
    waiting(&server, &name, 2);
    eventually("time passes", || (not_after - Duration::from_millis(600)).has_passed());
    drop(first);
    waiting(&server, &name, 1);
    eventually("it is too late", || not_after.has_passed());
    drop(second);
    is_too_late(reply);

    // Behind one that makes the row of the same key, and then does not.
    let absent = fresh_key();
    let hash: String = absent.hash().0.iter().map(|byte| format!("{byte:02x}")).collect();
    let makes = format!(
        "INSERT INTO nblock_locks (key_hash, key, ends_at, fence) VALUES ('\\x{hash}', '{}', 'epoch', 1)",
        absent.as_str()
    );
    let other = OpenTransaction::of(&url, &makes).done();
    let not_after = Boottime::now() + Duration::from_millis(700);
    let reply = store.change(&absent, attempt().until(not_after));
    std::thread::scope(|scope| {
        // What is answered first is that there is no such row.
        let asked = scope.spawn(|| is_too_late(reply));
        waiting(&server, &name, 1);
        eventually("it is too late", || not_after.has_passed());
        drop(other);
        asked.join().unwrap();
    });
}

/// Of many renewals, only that of a row which another session has locked is refused, and none waits for it.
#[test]
fn a_locked_row_ends_no_other_hold() {
    let server = shared();
    let (_, url) = fresh_database(&server);
    let store = open(&url).unwrap();
    let mut holders: Vec<_> =
        (0..20).map(|_| (fresh_key(), Acquisition::plain(HoldId::random(), LONG, identity()))).collect();
    let grants: Vec<_> = holders.iter_mut().map(|(key, holder)| (key.clone(), holder.ask().1)).collect();
    for reply in answer(store.change_many(grants.clone())).unwrap() {
        assert!(matches!(reply.unwrap(), Reply::Applied { .. }));
    }
    let renewals = |write_seq| {
        let renewal = |(key, change): &(nblock::key::Key, Change)| {
            let proof = holder_proof(change);
            (key.clone(), nblock::protocol::Renewal { proof, expire: LONG, write_seq }.change())
        };
        answer(store.change_many(grants.iter().map(renewal).collect())).unwrap()
    };
    let other = OpenTransaction::locking(&url, &grants[7].0).done();
    for (index, reply) in renewals(9).into_iter().enumerate() {
        match reply {
            Ok(Reply::Applied { .. }) => assert_ne!(index, 7),
            Err(error) => assert_eq!((index, error.kind), (7, StoreErrorKind::Unreachable), "{error}"),
            Ok(reply) => panic!("number {index}: {reply:?}"),
        }
    }
    drop(other);
    assert!(renewals(10).into_iter().all(|reply| matches!(reply, Ok(Reply::Applied { .. }))));
}

/// The wait of a grant for a synchronous standby that somebody cancels: the server reports success, but a failover
/// would forget the grant.
#[test]
fn a_cancelled_wait_for_a_standby_is_no_grant() {
    let server = Server::start("postgresql", &[]);
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", server.port);
    let options = ClientOptions { op_timeout: Duration::from_secs(3), ..ClientOptions::default() };
    let ours = lock(&wait(Client::open(Some(&url), options)).unwrap(), &fresh_key());
    assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
    wait(ours.unlock()).unwrap();
    sql(&server, "ALTER SYSTEM SET synchronous_standby_names = 'nowhere'");
    sql(&server, "SELECT pg_reload_conf()");
    eventually("it is read", || sql(&server, "SHOW synchronous_standby_names") == "nowhere");
    let asked = ours.try_lock(LockOptions::default());
    let thread = std::thread::spawn(move || wait(asked));
    let cancel = "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    eventually("it waits, and is cancelled", || sql(&server, cancel) != "0");
    let error = thread.join().unwrap().expect_err("it is not known whether a standby has it");
    assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error}");
    sql(&server, "ALTER SYSTEM RESET synchronous_standby_names");
    sql(&server, "SELECT pg_reload_conf()");
    assert!(wait(ours.lock(forever())).unwrap());
}

/// A row that an operator freed by setting its token to null is a free row, whatever else it still says.
#[test]
fn a_row_freed_by_hand_is_free() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    let here = client(&url);
    let reentrant = here.reentrant_lock(fresh_key(), None, LockOptions::default()).unwrap();
    assert!(wait(reentrant.try_lock(LockOptions::default())).unwrap());
    sql_in(&server, &name, "UPDATE nblock_locks SET token = NULL");
    let plain = lock(&here, reentrant.key());
    assert!(wait(plain.try_lock(LockOptions::default())).unwrap());
    wait(plain.refresh(None)).unwrap();
    wait(plain.unlock()).unwrap();
}

/// A waiter in another client gets a lock that is released.
fn hand_over(url: &str, other_url: &str) {
    let (here, there) = (client(url), client(other_url));
    let name = fresh_key();
    let (ours, theirs) = (lock(&here, &name), lock(&there, &name));
    assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| assert!(wait(theirs.lock(forever())).unwrap()));
        wait(ours.unlock()).unwrap();
        waiter.join().unwrap();
    });
}

fn caveats(url: &str) -> Vec<String> {
    wait(client(url).ping()).unwrap().caveats
}

/// Several connections of one process are several to the server: what tells them apart is their name.
fn named(url: &str, name: &str) -> String {
    let separator = if url.contains('?') { '&' } else { '?' };
    format!("{url}{separator}application_name={name}")
}

#[test]
fn waiters_are_told() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    crate::conformance::wakes_through(&named(&url, "a"), &named(&url, "b"));
    // While somebody waits, the server has its channel.
    let here = client(&url);
    let contended = fresh_key();
    let ours = lock(&here, &contended);
    assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
    let store = open(&named(&url, "c")).unwrap();
    let watch = store.watch(&contended);
    eventually("it is known that the connection hears", || store.safety_check(Duration::ZERO) > Duration::from_secs(1));
    drop(watch);
    // Nobody listens any more, and the trial's connection is gone too.
    eventually("nobody listens", || {
        let listens = sql_in(
            &server,
            &name,
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'c' AND query LIKE 'LISTEN%'",
        );
        listens == "0"
    });
    let quiet = open(&format!("{url}?notify=off")).unwrap();
    assert_eq!(quiet.safety_check(Duration::ZERO), Duration::from_millis(100));
    assert_eq!(quiet.safety_check(Duration::from_secs(60)), Duration::from_secs(1));
    let polls = open(&format!("{url}?notify=off&poll=30")).unwrap();
    assert_eq!(polls.safety_check(Duration::from_secs(60)), Duration::from_millis(30));
}

/// A release notifies when it was applied, and not before: one that failed, because somebody had the row locked for
/// too long, is sent again.
#[test]
fn a_release_that_was_sent_again_notifies() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    let (holder, waiter) = (open(&named(&url, "holder")).unwrap(), open(&named(&url, "waiter")).unwrap());
    let contended = fresh_key();
    let grant = Acquisition::plain(HoldId::random(), LONG, identity()).ask().1;
    assert!(matches!(answer(holder.change(&contended, grant.clone())), Ok(Reply::Applied { .. })));
    let mut watch = waiter.watch(&contended);
    let mut is_told = || watch.poll_change(&mut Context::from_waker(Waker::noop())).is_ready();
    eventually("it is listened to", &mut is_told);
    let other = OpenTransaction::locking(&url, &contended).done();
    let release = Change::new(Condition::Mine(holder_proof(&grant)), Write::Delete);
    let reply = holder.change(&contended, release);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| answer(reply));
        let began =
            format!("SELECT query_start FROM pg_stat_activity WHERE datname = '{name}' AND wait_event_type = 'Lock'");
        waiting(&server, &name, 1);
        let first = sql(&server, &began);
        eventually("it is sent again", || !matches!(sql(&server, &began), again if again.is_empty() || again == first));
        assert!(!is_told(), "nothing was applied");
        drop(other);
        assert!(matches!(asked.join().unwrap(), Ok(Reply::Applied { .. })));
    });
    eventually("the second request is notified of", is_told);
}

/// Whether notifications arrive is tried with a second connection, since one's own come through everywhere: once for
/// each connection that listens, and nothing of it stays.
#[test]
fn whether_notifications_arrive_is_tried_from_outside() {
    let server = shared();
    let (database, url) = fresh_database(&server);
    sql(&server, &format!("ALTER DATABASE {database} SET log_statement = 'all'"));
    let store = open(&named(&url, "trial")).unwrap();
    let hears = || store.safety_check(Duration::ZERO) > Duration::from_secs(1);
    assert!(!hears(), "nobody has waited yet");
    for _ in 0..2 {
        let watch = store.watch(&fresh_key());
        eventually("it is known that the connection hears", hears);
        drop(watch);
    }
    let ours = "FROM pg_stat_activity WHERE application_name = 'trial'";
    eventually("the second connection is given up", || sql(&server, &format!("SELECT count(*) {ours}")) == "1");
    let us = sql(&server, &format!("SELECT pid {ours}"));
    let log = std::fs::read_to_string(server.socket.as_ref().unwrap().parent().unwrap().join("log")).unwrap();
    let channel = "nblock_trial_";
    // The lines of the server's log that have both, each with the number of the process that it is of.
    let of = |word: &str| -> Vec<&str> {
        let lines = log.lines().filter(|line| line.contains(word) && line.contains(channel));
        lines.map(|line| line.split(&['[', ']']).nth(1).unwrap()).collect()
    };
    // The log is that of other tests' databases too.
    assert_eq!(of("parameters: ").iter().filter(|process| **process == us).count(), 1, "tried once");
    assert!(!of(" LISTEN ").contains(&us.as_str()), "one's own notifications say nothing");
    assert!(!of(" LISTEN ").is_empty(), "the second connection listens");
}

/// A pooler passes on what arrives at the server's connection that works for the store at that moment.
#[test]
fn a_pooler_is_recognised_while_a_connection_is_busy() {
    let server = shared();
    let pooled = Server::before(server.port, "pgbouncer", &["pool_mode = transaction", "default_pool_size = 2"]);
    for round in 0..5 {
        let client = client(&named(&pooled.url, &format!("busy{round}")));
        let done = std::sync::atomic::AtomicBool::new(false);
        let caveats = std::thread::scope(|scope| {
            for _ in 0..2 {
                let ours = lock(&client, &fresh_key());
                let done = &done;
                scope.spawn(move || {
                    while !done.load(std::sync::atomic::Ordering::SeqCst) {
                        assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
                        wait(ours.unlock()).unwrap();
                    }
                });
            }
            let pong = wait(client.ping());
            done.store(true, std::sync::atomic::Ordering::SeqCst);
            pong.unwrap().caveats
        });
        assert!(caveats.iter().any(|caveat| caveat.contains("pool_mode")), "{caveats:?}");
    }
}

/// Where it cannot be tried, because the account has no second connection, waiters look at intervals, nobody warns of
/// a pooler, and the next wait tries again.
#[test]
fn a_trial_that_cannot_be_made_is_made_later() {
    let server = shared();
    let (database, url) = fresh_database(&server);
    let role = format!("one_{database}");
    sql(&server, &format!("CREATE ROLE {role} LOGIN SUPERUSER"));
    let url = url.replace("postgres@", &format!("{role}@"));
    // Superusers are never too many: it is limited by being none.
    let client = client(&url);
    sql(&server, &format!("ALTER ROLE {role} NOSUPERUSER CONNECTION LIMIT 1"));
    let contended = fresh_key();
    let (held, waits) = (lock(&client, &contended), lock(&client, &contended));
    assert!(wait(held.try_lock(LockOptions::default())).unwrap());
    let within = |ms| LockOptions { timeout: Some(Timeout::After(Duration::from_millis(ms))), ..forever() };
    assert!(!wait(waits.lock(within(300))).unwrap());
    let caveats = wait(client.ping()).unwrap().caveats;
    assert!(!caveats.iter().any(|caveat| caveat.contains("pool_mode")), "{caveats:?}");
    let store = open(&url).unwrap();
    assert!(store.safety_check(Duration::ZERO) < Duration::from_secs(1), "it is not known");
    sql(&server, &format!("ALTER ROLE {role} CONNECTION LIMIT -1"));
    let watch = store.watch(&contended);
    eventually("it is tried again", || store.safety_check(Duration::ZERO) > Duration::from_secs(1));
    drop(watch);
    wait(held.unlock()).unwrap();
}

/// Statements that recur are prepared where the server's session is the connection's alone, and not behind a pooler.
/// One that the server does not know any more is sent as it is.
#[test]
fn recurring_statements_are_prepared() {
    let server = shared();
    let pooled = Server::before(server.port, "pgbouncer", &["pool_mode = transaction", "default_pool_size = 2"]);
    for is_direct in [true, false] {
        let (database, _) = fresh_database(&server);
        sql(&server, &format!("ALTER DATABASE {database} SET log_statement = 'all'"));
        let port = if is_direct { server.port } else { pooled.port };
        // What the log is searched for.
        let table = format!("locks_of_{database}");
        let client = client(&format!("postgres://postgres@127.0.0.1:{port}/{database}?table={table}"));
        let ours = lock(&client, &fresh_key());
        let cycle = || {
            assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
            wait(ours.unlock()).unwrap();
        };
        (0..5).for_each(|_| cycle());
        let log = || std::fs::read_to_string(server.socket.as_ref().unwrap().parent().unwrap().join("log")).unwrap();
        let executed = |name: &str| {
            let update = format!("UPDATE \"public\".\"{table}\"");
            log().lines().filter(|line| line.contains(&format!("execute {name}")) && line.contains(&update)).count()
        };
        eventually("it is logged", || executed("") >= 10);
        assert_eq!(executed("s") > 0, is_direct, "{}", executed("s"));
        if is_direct {
            let forget = format!(
                "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN EXECUTE 'DEALLOCATE ALL'; RETURN NULL; END $$; \
                 CREATE TRIGGER forget AFTER UPDATE ON {table} EXECUTE FUNCTION forget()"
            );
            sql_in(&server, &database, &forget);
            (0..3).for_each(|_| cycle());
            let before = executed("s");
            cycle();
            eventually("it is logged", || executed("") >= 18);
            assert_eq!(executed("s"), before, "prepared again");
        }
    }
}

#[test]
fn through_a_pooler() {
    let server = shared();
    let session = Server::before(server.port, "pgbouncer", &["pool_mode = session", "default_pool_size = 20"]);
    let pooled = Server::before(server.port, "pgbouncer", &["pool_mode = transaction", "default_pool_size = 2"]);

    // A ping finds out, although nobody has waited yet.
    let pools = |url: &str| caveats(url).iter().any(|caveat| caveat.contains("pool_mode"));
    assert!(pools(&named(&pooled.url, "pings")));
    assert!(!pools(&named(&session.url, "pings")) && !pools(&named(&server.url, "pings")));
    assert!(!pools(&named(&format!("{}?notify=off", pooled.url), "pings")));

    crate::conformance::wakes_through(&named(&session.url, "a"), &named(&session.url, "b"));
    let store = open(&named(&session.url, "c")).unwrap();
    let watch = store.watch(&fresh_key());
    eventually("a session is notified", || store.safety_check(Duration::ZERO) > Duration::from_secs(1));
    drop(watch);

    // Nobody is notified: that is noticed, and waiters look at intervals.
    hand_over(&named(&pooled.url, "a"), &named(&pooled.url, "b"));
    let (database, _) = fresh_database(&server);
    sql(&server, &format!("ALTER DATABASE {database} SET log_statement = 'all'"));
    let url = format!("postgres://postgres@127.0.0.1:{}/{database}", pooled.port);
    let deaf = client(&url);
    // Each waits without a grant, until its safety check and after it.
    for _ in 0..3 {
        let name = fresh_key();
        let (held, waits) = (lock(&deaf, &name), lock(&deaf, &name));
        assert!(wait(held.try_lock(LockOptions::default())).unwrap());
        let timeout = LockOptions { timeout: Some(Timeout::After(Duration::from_millis(2500))), ..forever() };
        assert!(!wait(waits.lock(timeout)).unwrap());
    }
    // What is listened to there stays with the pooler's connections: after the first, nothing is.
    let log = std::fs::read_to_string(server.socket.as_ref().unwrap().parent().unwrap().join("log")).unwrap();
    // The log is that of other tests' databases too.
    let processes =
        sql(&server, &format!("SELECT string_agg(pid::text, ' ') FROM pg_stat_activity WHERE datname = '{database}'"));
    let is_of_the_pooler =
        |line: &str| line.split(&['[', ']']).nth(1).is_some_and(|process| processes.split(' ').any(|of| of == process));
    let keys = |line: &&str| line.contains(": LISTEN \"nblock_") && !line.contains("_trial_") && is_of_the_pooler(line);
    assert_eq!(log.lines().filter(keys).count(), 1, "keys that were listened to");
    let pong = wait(deaf.ping()).unwrap();
    assert!(pong.caveats.iter().any(|caveat| caveat.contains("pool_mode")), "{pong:?}");
    // Two clients whose transactions share two connections exclude each other.
    exclusive(&[&named(&pooled.url, "e"), &named(&pooled.url, "f"), &server.url], 40);
}

/// Takes one lock from all of these at once, and sees that nobody else is inside.
fn exclusive(urls: &[&str], times: u64) -> u64 {
    let name = fresh_key();
    let inside = std::sync::atomic::AtomicU64::new(0);
    let last_fence = std::sync::atomic::AtomicU64::new(0);
    let granted = std::sync::atomic::AtomicU64::new(0);
    use std::sync::atomic::Ordering::SeqCst;
    std::thread::scope(|scope| {
        for url in urls {
            let (name, inside, last_fence, granted) = (&name, &inside, &last_fence, &granted);
            scope.spawn(move || {
                let client = client(url);
                let lock: Lock = lock(&client, name);
                for _ in 0..times {
                    assert!(wait(lock.lock(LockOptions { fence: Some(true), ..forever() })).unwrap());
                    assert_eq!(inside.fetch_add(1, SeqCst), 0, "two are inside");
                    let fence = wait(lock.fence()).unwrap();
                    assert!(last_fence.swap(fence, SeqCst) < fence, "fences grow");
                    granted.fetch_add(1, SeqCst);
                    inside.fetch_sub(1, SeqCst);
                    wait(lock.unlock()).unwrap();
                }
            });
        }
    });
    granted.load(SeqCst)
}

#[test]
fn eight_connections_exclude_each_other() {
    let server = shared();
    let urls: Vec<String> = (0..8).map(|number| named(&server.url, &format!("x{number}"))).collect();
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    assert_eq!(exclusive(&urls, 40), 320);
}

/// A server that is killed under load forgets no hold, and fences go on.
#[test]
fn killed_and_restarted_under_load() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
    let mut server = Server::start("postgresql", &[]);
    let url = server.url.clone();
    let held = fresh_key();
    let here = client(&url);
    let ours = lock(&here, &held);
    let long = LockOptions { expire: Some(LONG), fence: Some(true), ..LockOptions::default() };
    assert!(wait(ours.try_lock(long)).unwrap());
    let name = fresh_key();
    let (inside, last_fence, granted) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let (enough, expire) = (AtomicBool::new(false), Duration::from_secs(2));
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (url, name, inside, last_fence) = (named(&url, &format!("w{number}")), &name, &inside, &last_fence);
            let (granted, enough) = (&granted, &enough);
            scope.spawn(move || {
                let client = client(&url);
                let lock = lock(&client, name);
                let options = LockOptions { expire: Some(expire), fence: Some(true), ..forever() };
                while !enough.load(SeqCst) {
                    match wait(lock.lock(options)) {
                        Ok(granted) => assert!(granted),
                        Err(error) => {
                            let passing = [ErrorKind::Unreachable, ErrorKind::Indeterminate];
                            assert!(passing.contains(&error.kind()), "{error}");
                            continue;
                        }
                    }
                    assert_eq!(inside.fetch_add(1, SeqCst), 0, "two are inside");
                    if let Ok(fence) = wait(lock.fence()) {
                        assert!(last_fence.swap(fence, SeqCst) < fence, "fences grow");
                    }
                    granted.fetch_add(1, SeqCst);
                    inside.fetch_sub(1, SeqCst);
                    // Unanswered, it runs out.
                    let _ = wait(lock.unlock());
                }
            });
        }
        for _ in 0..3 {
            let before = granted.load(SeqCst);
            eventually("the load runs", || granted.load(SeqCst) > before + 30);
            server.kill();
            server.restart(&[]);
        }
        let before = granted.load(SeqCst);
        eventually("the load goes on", || granted.load(SeqCst) > before + 30);
        enough.store(true, SeqCst);
    });
    let record = wait(here.find(&held)).unwrap().expect("what was granted is there");
    assert!(matches!(record.state.holder, Holder::Plain { .. }));
    wait(ours.refresh(None)).unwrap();
    wait(ours.unlock()).unwrap();
}

#[test]
fn a_free_row_stays_and_keeps_its_fence() {
    let server = shared();
    let (name, url) = fresh_database(&server);
    let here = client(&url);
    let ours = lock(&here, &key("free"));
    assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
    let fence: u64 = wait(ours.fence()).unwrap();
    wait(ours.unlock()).unwrap();
    let row = sql_in(&server, &name, "SELECT fence, token IS NULL, convert_from(key, 'UTF8') FROM nblock_locks");
    assert_eq!(row, format!("{fence}|t|free"), "a free row stays, and keeps the fence");
    // Deleted by somebody who tidies up, fences still grow.
    sql_in(&server, &name, "DELETE FROM nblock_locks WHERE token IS NULL");
    assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
    assert!(wait(ours.fence()).unwrap() > fence);
}

/// The role: forks, and tries what both may do then.
pub fn forker(url: &str) {
    let client = client(url);
    let (kept, other) = (lock(&client, &fresh_key()), lock(&client, &fresh_key()));
    let renewed = LockOptions { expire: Some(Duration::from_secs(3)), auto_refresh: Some(true), ..forever() };
    assert!(wait(kept.lock(renewed)).unwrap());
    // A waiter of the parent listens at the fork, and its future is dropped in the child.
    let contended = lock(&client, &kept.key().clone());
    let waiting = contended.lock(forever());
    // SAFETY: the child ends by _exit, and uses what a forked child may: the library starts afresh in it.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: a child that hangs is killed.
        unsafe { libc::alarm(30) };
        let well = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            drop(waiting);
            assert_eq!(wait(kept.unlock()).unwrap_err().kind(), ErrorKind::Forked);
            assert!(!wait(kept.try_lock(LockOptions::default())).unwrap(), "it is the parent's");
            for _ in 0..10 {
                assert!(wait(other.try_lock(LockOptions::default())).unwrap());
                wait(other.unlock()).unwrap();
            }
        }));
        // SAFETY: ends the child without what is the parent's.
        unsafe { libc::_exit(i32::from(well.is_err())) };
    }
    let mut status = 0;
    // SAFETY: waits for the child that was made above.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "exit status 1: it found something wrong; signal 14: it hung");
    // The parent's connection has noticed nothing.
    wait(kept.refresh(None)).unwrap();
    wait(kept.unlock()).unwrap();
    assert!(wait(waiting).unwrap());
    wait(contended.unlock()).unwrap();
    crate::child::say("well");
}

#[test]
fn a_forked_child_leaves_the_parents_connection_alone() {
    let server = shared();
    let mut forker = crate::child::Actor::start("forker", &[&server.url]);
    assert_eq!(forker.says(), "well");
    forker.ends();
}

/// A primary and its standby, and the URL that names both.
fn pair(name: &str) -> (Server, Server, String) {
    let primary = Server::start("postgresql", &["max_wal_senders=4"]);
    let standby = primary.standby(name, &[]);
    let url = format!("postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres", primary.port, standby.port);
    eventually("the standby follows", || sql(&primary, "SELECT state FROM pg_stat_replication") == "streaming");
    (primary, standby, url)
}

fn promote(standby: &Server) {
    assert_eq!(sql(standby, "SELECT pg_promote()"), "t");
}

/// A primary that waits for its standby is killed under load, and the standby promoted: what was granted is held.
#[test]
fn a_synchronous_standby_loses_nothing() {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    let (mut primary, standby, url) = pair("keeps");
    sql(&primary, "ALTER SYSTEM SET synchronous_standby_names = 'keeps'");
    sql(&primary, "SELECT pg_reload_conf()");
    eventually("it is waited for", || sql(&primary, "SELECT sync_state FROM pg_stat_replication") == "sync");
    assert_eq!(caveats(&url), [""; 0]);
    let granted = Mutex::new(Vec::new());
    let killed = AtomicBool::new(false);
    let long = LockOptions { expire: Some(LONG), fence: Some(true), ..LockOptions::default() };
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (url, granted, killed) = (named(&url, &format!("w{number}")), &granted, &killed);
            scope.spawn(move || {
                let client = client(&url);
                while !killed.load(SeqCst) {
                    let ours = lock(&client, &fresh_key());
                    if wait(ours.try_lock(long)).is_ok_and(|granted| granted) {
                        granted.lock().unwrap().push((wait(ours.fence()).unwrap(), ours));
                    }
                }
            });
        }
        eventually("the load runs", || granted.lock().unwrap().len() > 200);
        primary.kill();
        promote(&standby);
        let before = granted.lock().unwrap().len();
        eventually("the load goes on", || granted.lock().unwrap().len() > before + 50);
        killed.store(true, SeqCst);
    });
    let other = client(&named(&url, "other"));
    let granted = granted.into_inner().unwrap();
    println!("{} grants around a promotion", granted.len());
    for (_, ours) in &granted {
        assert!(!wait(lock(&other, ours.key()).try_lock(LockOptions::default())).unwrap(), "a hold was forgotten");
    }
    for (fence, ours) in granted.into_iter().take(50) {
        wait(ours.unlock()).unwrap();
        assert!(wait(ours.try_lock(long)).unwrap());
        assert!(wait(ours.fence()).unwrap() > fence, "fences grow over a promotion");
    }
}

/// What an asynchronous standby has not received when it is promoted is forgotten, and nothing else: every pair of
/// holds that overlap has the promotion between its grants.
#[test]
fn an_asynchronous_standby_forgets_what_it_had_not_received() {
    let (mut primary, standby, url) = pair("lags");
    assert!(caveats(&url).iter().any(|caveat| caveat.contains("1 replica(s)")), "{:?}", caveats(&url));
    let here = client(&url);
    let long = LockOptions { expire: Some(LONG), fence: Some(true), ..LockOptions::default() };
    let hold = |client: &Client, number: usize| {
        let ours = lock(client, &key(&format!("held {number}")));
        wait(ours.try_lock(long)).unwrap().then(|| (Boottime::now(), wait(ours.fence()).unwrap(), ours))
    };
    let received: Vec<_> = (0..20).map(|number| hold(&here, number).expect("it is free")).collect();
    let position = sql(&primary, "SELECT pg_current_wal_lsn()");
    eventually("the standby has it", || {
        sql(&standby, &format!("SELECT pg_last_wal_replay_lsn() >= '{position}'::pg_lsn")) == "t"
    });
    // It is cut off, and gets nothing any more.
    sql(&standby, "ALTER SYSTEM SET primary_conninfo = ''");
    sql(&standby, "SELECT pg_reload_conf()");
    eventually("it is cut off", || sql(&standby, "SELECT count(*) FROM pg_stat_wal_receiver") == "0");
    let not_received: Vec<_> = (20..40).map(|number| hold(&here, number).expect("it is free")).collect();
    primary.kill();
    promote(&standby);
    let promoted = Boottime::now();

    let there = client(&named(&url, "there"));
    let mut overlapping = 0;
    for (number, (at, fence, _)) in received.iter().chain(&not_received).enumerate() {
        if let Some((again, higher, ours)) = hold(&there, number) {
            assert!(*at < promoted && promoted < again, "two holds overlap on one side of the promotion");
            assert!(higher > *fence, "what the resource checks grows nevertheless");
            assert!(number >= 20, "a hold was forgotten that the standby had");
            overlapping += 1;
            wait(ours.unlock()).unwrap();
        }
    }
    assert_eq!(overlapping, not_received.len());
    println!("{overlapping} pairs of holds overlap, all with the promotion between them");
    for (_, _, ours) in received {
        wait(ours.unlock()).unwrap();
    }
    for (_, _, ours) in not_received {
        assert_eq!(wait(ours.refresh(None)).unwrap_err().kind(), ErrorKind::Lost, "its holder learns of the loss");
    }
}

/// Thousands of holds are renewed in a few statements, of which each also answers what was lost.
#[test]
fn thousands_are_renewed_at_once() {
    let server = shared();
    let (_, url) = fresh_database(&server);
    let store = open(&url).unwrap();
    let count = 6_000;
    let mut holders: Vec<_> =
        (0..count).map(|_| (fresh_key(), Acquisition::plain(HoldId::random(), LONG, identity()))).collect();
    let grants: Vec<_> = holders.iter_mut().map(|(key, holder)| (key.clone(), holder.ask().1)).collect();
    let applied = |changes: Vec<(nblock::key::Key, Change)>| {
        let replies = answer(store.change_many(changes)).unwrap();
        replies.into_iter().map(|reply| matches!(reply.unwrap(), Reply::Applied { .. })).collect::<Vec<bool>>()
    };
    assert!(applied(grants.clone()).into_iter().all(|applied| applied));
    let proofs: Vec<_> = grants.iter().map(|(key, change)| (key.clone(), holder_proof(change))).collect();
    let third = proofs.iter().step_by(3);
    let released = third.map(|(key, proof)| (key.clone(), Change::new(Condition::Mine(proof.clone()), Write::Delete)));
    assert!(applied(released.collect()).into_iter().all(|applied| applied));
    let renewals = proofs
        .into_iter()
        .map(|(key, proof)| (key, nblock::protocol::Renewal { proof, expire: LONG, write_seq: 9 }.change()));
    for (index, renewed) in applied(renewals.collect()).into_iter().enumerate() {
        assert_eq!(renewed, index % 3 != 0, "number {index}");
    }
}
