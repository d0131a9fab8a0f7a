//! What a good server never does.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::{Error, ErrorKind};
use nblock::key::Key;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::store::StoreOptions;
use nblock::stores;
use nblock::sys::runtime::{self, block_on, wait};
use nblock::url::Url;
use serde_json::{Value, json};

use crate::server::{Asked, Connection, Handshake, Scripted, Server, now, time};

pub fn options(connect_ms: u64) -> ClientOptions {
    ClientOptions {
        connect_timeout: Duration::from_millis(connect_ms),
        op_timeout: PATIENCE,
        ..ClientOptions::default()
    }
}

/// For what is answered in the end, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// For what is never answered: long enough to connect on a machine that is busy, and no longer.
fn brief() -> ClientOptions {
    ClientOptions { op_timeout: Duration::from_secs(10), ..options(60_000) }
}

/// Runs all cases at once: each waits for something.
fn each<T: Send>(cases: impl IntoIterator<Item = T>, run: impl Fn(T) + Send + Sync) {
    std::thread::scope(|scope| {
        for case in cases {
            scope.spawn(|| run(case));
        }
    });
}

fn open(server: &Server) -> Result<Client, Error> {
    wait(Client::open(Some(&server.url()), options(60_000)))
}

pub fn lock(client: &Client) -> Lock {
    client.lock(Key::new(b"k").unwrap(), LockOptions::default()).unwrap()
}

pub fn patient() -> LockOptions {
    LockOptions { timeout: Some(Timeout::After(Duration::from_secs(60))), ..LockOptions::default() }
}

/// A client that has not asked for a sign of life.
fn open_only(url: &str) -> Client {
    let options = options(60_000);
    let store_options = StoreOptions { op_timeout: options.op_timeout, connect_timeout: options.connect_timeout };
    Client::over(stores::open(&Url::parse(url).unwrap(), &store_options).unwrap(), options).unwrap()
}

/// A URL with two hosts.
fn both(first: &Server, second: &Server) -> String {
    first.url().replace("/db", &format!(",{}/db", second.address()))
}

/// A server whose connections are welcomed, and then do this.
fn welcoming(script: impl Fn(usize, Connection) -> Scripted + Send + Sync + 'static) -> Server {
    Server::start(move |number, mut connection| {
        let _ = connection.welcome().and_then(|()| script(number, connection));
    })
}

/// Grants and releases, as a good server does.
pub fn serve(mut connection: Connection) -> Scripted {
    loop {
        match connection.asked()? {
            (token, Asked::Acquire(_)) => connection.answer_done(token, "inserted")?,
            (token, Asked::Release(_)) => connection.answer_done(token, "deleted")?,
        }
    }
}

#[test]
fn bytes_that_come_one_by_one() {
    let server = Server::start(|_, mut connection| {
        connection.piece = 1;
        let _ = connection.welcome().and_then(|()| serve(connection));
    });
    let lock = lock(&open(&server).unwrap());
    for _ in 0..3 {
        assert!(wait(lock.try_lock(LockOptions::default())).unwrap());
        wait(lock.unlock()).unwrap();
    }
    assert_eq!(server.connections(), 1);
}

#[test]
fn no_rethinkdb() {
    let server = Server::start(|_, mut connection| {
        let _ = connection.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
    });
    let error = open(&server).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Store);
    assert!(error.message().contains("is not a RethinkDB server"), "{error}");
}

/// It has said who it is by then, or was about to: that the connection ends is trouble that passes. It is tried again,
/// and reported in the end.
#[test]
fn a_connection_that_is_cut_in_the_greeting() {
    let in_the_first_message = Server::start(|_, mut connection| {
        let _ = connection.greeting().and_then(|_| connection.send(b"{\"success\":true,"));
    });
    let after_the_challenge = Server::start(|_, mut connection| {
        let _ = connection.challenge(&Handshake::default());
    });
    each([in_the_first_message, after_the_challenge], |server| {
        let error = wait(Client::open(Some(&server.url()), options(5000))).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
        assert!(error.message().contains("the connection ended during the handshake"), "{error}");
        assert!(server.connections() > 1);
    });
}

#[test]
fn a_server_with_tls_only() {
    let server = Server::start(|_, mut connection| {
        // An alert: "protocol_version".
        let _ = connection.send(&[0x15, 3, 3, 0, 2, 2, 70]);
    });
    let error = open(&server).err().unwrap();
    assert!(error.message().contains("requires TLS"), "{error}");
}

#[test]
fn a_server_that_says_nothing() {
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = Mutex::new(held);
    let server = Server::start(move |_, _connection| {
        let _ = held.lock().unwrap().recv();
    });
    let error = wait(Client::open(Some(&server.url()), options(300))).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
    drop(hold);
}

#[test]
fn a_wrong_password_is_told_at_once() {
    let server = Server::start(|_, mut connection| {
        let _ = connection.challenge(&Handshake::default()).and_then(|_| connection.refuse(12, "Wrong password"));
    });
    let error = open(&server).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("Wrong password"), "{error}");
    assert!(!error.message().contains("secret"), "{error}");
    assert_eq!(server.connections(), 1, "it was not tried again");
}

#[test]
fn a_server_that_does_not_know_the_password() {
    let server = Server::start(|_, mut connection| {
        let _ = connection.shake_hands(&Handshake { honest: false, ..Handshake::default() });
        let _ = connection.query();
    });
    let error = open(&server).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("could not prove"), "{error}");
}

#[test]
fn a_server_that_would_keep_us_hashing() {
    let server = Server::start(|_, mut connection| {
        let _ = connection.challenge(&Handshake { iterations: 2_000_000_000, ..Handshake::default() });
    });
    let error = open(&server).err().unwrap();
    assert!(error.message().contains("rounds of hashing"), "{error}");
}

/// R2, R3: the first attempt was applied, and its answer lost with the connection. The second finds the hold,
/// and the token of the first one is the hold's.
#[test]
fn a_grant_whose_answer_was_lost() {
    let first = Arc::new(Mutex::new(None::<Value>));
    let released = Arc::new(Mutex::new(Vec::new()));
    let (rows, tokens) = (Arc::clone(&first), Arc::clone(&released));
    let server = welcoming(move |_, mut connection| {
        loop {
            match connection.asked()? {
                (token, Asked::Acquire(row)) => {
                    let known = rows.lock().unwrap().clone();
                    let Some(before) = known else {
                        *rows.lock().unwrap() = Some(row);
                        return Ok(());
                    };
                    connection.answer_kept(token, &before)?;
                }
                // RethinkDB ql2.proto: Term.TermType.MERGE. It makes sure of the lease.
                (token, Asked::Release(text)) if text.contains("[35,") => {
                    connection.answer_done(token, "replaced")?;
                }
                (token, Asked::Release(text)) => {
                    tokens.lock().unwrap().push(text);
                    connection.answer_done(token, "deleted")?;
                }
            }
        }
    });
    let lock = lock(&open(&server).unwrap());
    assert!(wait(lock.lock(patient())).unwrap());
    assert_eq!(server.connections(), 2);
    let token = first.lock().unwrap().clone().unwrap()["instance_token"].as_str().unwrap().to_string();
    assert_eq!(lock.instance_token().unwrap(), token);
    wait(lock.unlock()).unwrap();
    assert!(released.lock().unwrap()[0].contains(&token), "the token that is in the record is the one released");
}

/// R7: what matters is when the first request to release left.
#[test]
fn a_release_whose_answer_was_lost() {
    let server = welcoming(|number, mut connection| {
        loop {
            match connection.asked()? {
                (token, Asked::Acquire(_)) => connection.answer_done(token, "inserted")?,
                // Deleted, and not said so.
                (_, Asked::Release(_)) if number == 0 => return Ok(()),
                (token, Asked::Release(_)) => connection.answer_kept(token, &Value::Null)?,
            }
        }
    });
    let lock = lock(&open(&server).unwrap());
    assert!(wait(lock.lock(patient())).unwrap());
    wait(lock.unlock()).unwrap();
    assert_eq!(lock.state(), LockState::Idle);
    assert_eq!(server.connections(), 2);
}

/// R7: a missing reply is neither success nor failure, and the lock is idle.
#[test]
fn a_release_that_is_not_answered() {
    let server = welcoming(|_, mut connection| {
        loop {
            if let (token, Asked::Acquire(_)) = connection.asked()? {
                connection.answer_done(token, "inserted")?;
            }
        }
    });
    let client = wait(Client::open(Some(&server.url()), brief())).unwrap();
    let lock = lock(&client);
    assert!(wait(lock.lock(patient())).unwrap());
    let error = wait(lock.unlock()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error}");
    assert_eq!(lock.state(), LockState::Idle);
}

/// An answer to another query is not taken for ours.
#[test]
fn an_answer_with_a_wrong_token() {
    let server = welcoming(|_, mut connection| {
        loop {
            if let (token, Asked::Acquire(row)) = connection.asked()? {
                let mut other = row.clone();
                other["instance_token"] = json!("somebody else's");
                connection.answer_done(token + 1000, "inserted")?;
                connection.answer_kept(token, &other)?;
            }
        }
    });
    let lock = lock(&wait(Client::open(Some(&server.url()), brief())).unwrap());
    match wait(lock.try_lock(LockOptions::default())) {
        Ok(granted) => assert!(!granted, "what was granted was granted to another query"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error}"),
    }
    assert_eq!(lock.state(), LockState::Idle);
}

#[test]
fn an_answer_that_claims_to_be_huge() {
    let server = welcoming(|number, mut connection| {
        if number > 0 {
            return serve(connection);
        }
        let (token, _) = connection.asked()?;
        let mut header = token.to_le_bytes().to_vec();
        header.extend_from_slice(&u32::MAX.to_le_bytes());
        connection.send(&header)?;
        // A client that believes it waits for the rest.
        loop {
            connection.query()?;
        }
    });
    let lock = lock(&open(&server).unwrap());
    assert!(wait(lock.lock(patient())).unwrap());
    assert_eq!(server.connections(), 2);
}

#[test]
fn answers_that_make_no_sense_are_neither_yes_nor_no() {
    let cases =
        [json!(null), json!([]), json!({ "t": 1 }), json!({ "t": 1, "r": [[1, {}]] }), json!({ "t": 99, "r": [] })];
    each(cases, |nonsense| {
        let said = nonsense.clone();
        let server = welcoming(move |_, mut connection| {
            loop {
                match connection.asked()? {
                    (token, Asked::Acquire(_)) => connection.reply(token, &said)?,
                    (token, Asked::Release(_)) => connection.answer_kept(token, &Value::Null)?,
                }
            }
        });
        let lock = lock(&wait(Client::open(Some(&server.url()), brief())).unwrap());
        let error = wait(lock.try_lock(LockOptions::default())).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Indeterminate | ErrorKind::Store), "{nonsense}: {error}");
        assert_eq!(lock.state(), LockState::Idle);
    });
}

/// R7: errors keep their meaning.
#[test]
fn errors_of_the_server() {
    let cases = [
        (
            4_100_000,
            "Cannot perform write: primary replica for shard [\"\", +inf) not available",
            ErrorKind::Unreachable,
        ),
        (4_200_000, "Cannot perform write: lost contact with primary replica", ErrorKind::Indeterminate),
        (6_000_000, "User `u` does not have the required `write` permission", ErrorKind::Denied),
        (3_000_000, "Expected type NUMBER but found STRING.", ErrorKind::Store),
    ];
    each(cases, |(code, message, kind)| {
        let server = welcoming(move |_, mut connection| {
            loop {
                match connection.asked()? {
                    (token, Asked::Acquire(_)) => connection.fail(token, code, message)?,
                    (token, Asked::Release(_)) => connection.answer_kept(token, &Value::Null)?,
                }
            }
        });
        let lock = lock(&wait(Client::open(Some(&server.url()), brief())).unwrap());
        let error = wait(lock.try_lock(LockOptions::default())).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(lock.state(), LockState::Idle);
    });
}

/// A row that is no lock record is an error of that key, and never a grant.
#[test]
fn a_row_that_is_no_lock_record() {
    for (field, value) in [
        ("expires_at", Value::Null),
        ("expires_at", json!(5)),
        ("instance_token", json!(7)),
        ("instance_token", Value::Null),
        ("key", json!([])),
    ] {
        let (name, wrong) = (field.to_string(), value.clone());
        let server = welcoming(move |_, mut connection| {
            loop {
                match connection.asked()? {
                    (token, Asked::Acquire(mut row)) => {
                        row["instance_token"] = json!("theirs");
                        row["expires_at"] = time(now() - 5.0);
                        row[name.as_str()] = wrong.clone();
                        connection.answer_kept(token, &row)?;
                    }
                    (token, Asked::Release(_)) => connection.answer_kept(token, &Value::Null)?,
                }
            }
        });
        let lock = lock(&open(&server).unwrap());
        let error = wait(lock.lock(patient())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Store, "{field} = {value}: {error}");
        assert_eq!(lock.state(), LockState::Idle);
    }
}

/// A waiter does not notice that it is served by another host of the URL, apart from time.
#[test]
fn a_wait_goes_on_over_the_next_host() {
    // Answers once that somebody else holds it, hangs up, and is gone.
    let gone = Server::start(|number, mut connection| {
        let held = |connection: &mut Connection| -> Scripted {
            connection.welcome()?;
            let (token, Asked::Acquire(mut row)) = connection.asked()? else { return Ok(()) };
            row["instance_token"] = json!("somebody else's");
            connection.answer_kept(token, &row)
        };
        if number == 0 {
            let _ = held(&mut connection);
        }
    });
    let there = welcoming(|_, connection| serve(connection));
    let url = both(&gone, &there);
    let lock = lock(&wait(Client::open(Some(&url), options(60_000))).unwrap());
    assert!(wait(lock.lock(patient())).unwrap());
    wait(lock.unlock()).unwrap();
    assert!(there.connections() >= 1);
}

/// A server that is being started, or a proxy before one that is away, hangs up on every client that comes back. A
/// waiter that was let in before waits on.
#[test]
fn a_wait_outlasts_a_server_that_hangs_up_while_it_starts() {
    let server = Server::start(|number, mut connection| {
        let _ = match number {
            0 => connection.welcome().and_then(|()| {
                let (token, Asked::Acquire(mut row)) = connection.asked()? else { return Ok(()) };
                row["instance_token"] = json!("somebody else's");
                connection.answer_kept(token, &row)
            }),
            // Everything it was sent is read: this is the end of a stream, and no reset.
            1 => connection.greeting().map(drop),
            _ => connection.welcome().and_then(|()| serve(connection)),
        };
    });
    let lock = lock(&open(&server).unwrap());
    assert!(wait(lock.lock(patient())).unwrap());
    wait(lock.unlock()).unwrap();
    assert_eq!(server.connections(), 3);
}

/// A host that is cut off from the primary answers well, and can do nothing. A waiter goes to another, and
/// leaves nothing behind that it would wait for.
#[test]
fn a_host_that_sees_no_primary_is_left() {
    let (refused, was_refused) = std::sync::mpsc::channel();
    let (left, was_left) = std::sync::mpsc::channel();
    let (was_refused, was_left) = (Mutex::new(was_refused), Mutex::new(was_left));
    let cut_off = welcoming(move |_, mut connection| {
        connection.feeds.push_back(Value::Null);
        loop {
            match connection.asked() {
                Ok((token, Asked::Acquire(_))) => {
                    let said = "Cannot perform write: primary replica for shard [\"\", +inf) not available";
                    connection.fail(token, 4_100_000, said)?;
                    let _ = refused.send(());
                }
                Ok((token, Asked::Release(_))) => connection.answer_kept(token, &Value::Null)?,
                Err(hung_up) => {
                    let _ = left.send(());
                    return Err(hung_up);
                }
            }
        }
    });
    // The other greets nobody before that: which of the two answers first is no matter of luck. And it grants
    // nothing before the first was left.
    let there = Server::start(move |_, mut connection| {
        let _ = was_refused.lock().unwrap().recv();
        let _ = connection.welcome().and_then(|()| {
            let _ = was_left.lock().unwrap().recv();
            serve(connection)
        });
    });
    let url = both(&cut_off, &there);
    // The other says nothing for as long as it waits; that must not be the end of it.
    let options = ClientOptions { op_timeout: Duration::from_secs(50), ..options(60_000) };
    let lock = lock(&wait(Client::open(Some(&url), options)).unwrap());
    assert!(wait(lock.lock(patient())).unwrap());
    wait(lock.unlock()).unwrap();
}

/// A server that lets everybody in and hangs up at the first query. However many wait, it is asked less and less
/// often; and another host of the URL gets its turn.
#[test]
fn a_host_that_hangs_up_again_and_again() {
    const TIMES: usize = 9;
    let (told, tell) = std::sync::mpsc::channel();
    let told = Mutex::new(told);
    let server = welcoming(move |_, mut connection| {
        let _ = told.lock().unwrap().send(Instant::now());
        connection.query().map(drop)
    });
    let client = open_only(&server.url());
    let waiters: Vec<_> = (0..40u32)
        .map(|number| {
            let lock = client.lock(Key::new(format!("k{number}").as_bytes()).unwrap(), patient()).unwrap();
            // The pauses of waiters grow; these begin at all times.
            std::thread::sleep(Duration::from_millis(7));
            std::thread::spawn(move || wait(lock.lock(LockOptions::default())))
        })
        .collect();
    let moments: Vec<Instant> = (0..TIMES).map(|_| tell.recv().unwrap()).collect();
    // At least half of 25, 50, 100, 200, 400, 800, 1000 and 1000 ms.
    let took = moments[TIMES - 1] - moments[0];
    assert!(took >= Duration::from_millis(1787), "{TIMES} connections within {took:?}");
    drop(wait(client.close(Boottime::now())));
    for waiter in waiters {
        assert!(!matches!(waiter.join().unwrap(), Ok(true)));
    }
}

#[test]
fn a_host_that_hangs_up_is_not_the_only_one() {
    let useless = welcoming(|_, mut connection| connection.query().map(drop));
    let good = welcoming(|_, connection| serve(connection));
    let url = both(&useless, &good);
    let lock = lock(&open_only(&url));
    assert!(wait(lock.lock(patient())).unwrap());
    wait(lock.unlock()).unwrap();
    // Once, and beside the other where that one is slow to answer: not for as long as luck wants it.
    assert!(useless.connections() <= 10, "{}", useless.connections());
}

/// R4: what is renewed through a server whose clock is ahead counts that much less of its lease, since others
/// may take over by that clock.
#[test]
fn a_renewal_through_a_server_whose_clock_is_ahead() {
    let (gone, is_gone) = std::sync::mpsc::channel();
    let (gone, is_gone) = (Mutex::new(gone), Mutex::new(is_gone));
    let first = welcoming(move |_, mut connection| {
        if let (token, Asked::Acquire(_)) = connection.asked()? {
            connection.answer_done(token, "inserted")?;
        }
        let _ = gone.lock().unwrap().send(());
        Ok(())
    });
    // The other greets nobody before that.
    let ahead = Server::start(move |_, mut connection| {
        let _ = is_gone.lock().unwrap().recv();
        connection.ahead = 5.0;
        let _ = connection.welcome().and_then(|()| {
            loop {
                let (token, Asked::Release(text)) = connection.asked()? else { return Ok(()) };
                assert!(text.contains("expires_at"), "{text}");
                connection.answer_done(token, "replaced")?;
            }
        });
    });
    let url = both(&first, &ahead);
    let lock = lock(&open_only(&url));
    assert!(wait(lock.lock(patient())).unwrap());
    // Sent to the first before its end was seen, it has no answer.
    while let Err(error) = wait(lock.refresh(None)) {
        assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error}");
    }
    let left = lock.remaining().unwrap();
    // Of a minute: not the five seconds, nor what is taken off in any case (2 ms, and a hundredth).
    assert!(left < Duration::from_millis(60_000 - 4_990 - 602), "{left:?}");
}

/// The lock of a key for a minute.
fn lock_of(client: &Client, key: &str) -> Lock {
    client.lock(Key::new(key.as_bytes()).unwrap(), LockOptions::default()).unwrap()
}

/// Grants what is asked for and renews it. With the first grant of the key `later`, its clock goes ahead.
///
/// What the client asks in the background may be sent after that request and be answered before it: then the request
/// counts as sent before the step, too. So this returns when all of that was asked.
fn going_ahead(by: f64, on_renewal: impl Fn() + Send + Sync + 'static) -> (Server, Client) {
    let (on_survey, surveyed) = std::sync::mpsc::channel();
    let on_survey = Mutex::new(on_survey);
    let server = welcoming(move |_, mut connection| {
        connection.on_survey = Some(on_survey.lock().unwrap().clone());
        loop {
            match connection.asked()? {
                (token, Asked::Acquire(row)) => {
                    if row["key"] == "later" {
                        connection.ahead = by;
                    }
                    connection.answer_done(token, "inserted")?;
                }
                (token, Asked::Release(text)) if text.contains("expires_at") => {
                    connection.answer_done(token, "replaced")?;
                    on_renewal();
                }
                (token, Asked::Release(_)) => connection.answer_done(token, "deleted")?,
            }
        }
    });
    let client = open(&server).unwrap();
    surveyed.recv_timeout(Duration::from_secs(15)).expect("a question after the cluster's servers");
    (server, client)
}

static WARNINGS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// R4: a machine that was paused by its host does not know it, and sees the server's clock go ahead. What it holds ends
/// sooner by that, also if it was the server's clock that was set. What is renewed is renewed at once.
#[test]
fn what_is_held_ends_sooner_when_the_servers_clock_goes_ahead() {
    nblock::log::set_sink(tracing::Level::WARN, |_, line| WARNINGS.lock().unwrap().push(line.to_string()));
    let (tell, told) = std::sync::mpsc::channel();
    let tell = Mutex::new(tell);
    let (_server, client) = going_ahead(30.0, move || {
        let _ = tell.lock().unwrap().send(());
    });
    let (plain, renewed, later) = (lock_of(&client, "plain"), lock_of(&client, "renewed"), lock_of(&client, "later"));
    let refreshed = LockOptions { auto_refresh: Some(true), ..LockOptions::default() };
    assert!(wait(plain.try_lock(LockOptions::default())).unwrap());
    assert!(wait(renewed.try_lock(refreshed)).unwrap());
    assert!(plain.remaining().unwrap() > Duration::from_secs(50));
    assert!(wait(later.try_lock(LockOptions::default())).unwrap());
    // Less the 30 s, and what was taken off before.
    let left = plain.remaining().unwrap();
    assert!(left < Duration::from_secs(30), "{left:?}");
    assert!(left > Duration::from_secs(20), "{left:?}");
    let left = later.remaining().unwrap();
    assert!(left > Duration::from_secs(50), "the server has counted it by the same clock: {left:?}");
    // It would be due after 20 s.
    told.recv_timeout(Duration::from_secs(15)).expect("a renewal");
    while renewed.remaining().unwrap() < Duration::from_secs(50) {
        std::thread::yield_now();
    }
    let warnings = WARNINGS.lock().unwrap();
    // Another test's server goes ahead by another time.
    let said = warnings.iter().find(|line| line.contains("scripted went ahead of ours by 29.")).expect("a warning");
    for part in ["either this machine was paused", "or the server's clock was set forward", "30."] {
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
}

/// R13: it is reported at once.
#[test]
fn what_is_overdue_by_a_clock_that_went_ahead_is_told() {
    let (_server, client) = going_ahead(90.0, || ());
    let (plain, later) = (lock_of(&client, "plain"), lock_of(&client, "later"));
    assert!(wait(plain.try_lock(LockOptions::default())).unwrap());
    let mut polled = libc::pollfd { fd: plain.lost_fd().unwrap(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd.
    assert_eq!(unsafe { libc::poll(&mut polled, 1, 0) }, 0);
    assert!(wait(later.try_lock(LockOptions::default())).unwrap());
    assert_eq!(plain.state(), LockState::Overdue);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::poll(&mut polled, 1, 15_000) }, 1);
    assert_eq!(later.state(), LockState::Held);
}

/// A server reads no more from a connection while 1024 of its queries are unanswered, and a change feed is one
/// (RethinkDB src/client_protocol/server.cc: `connection_loop`). A client that waits for many keys must not bring all
/// else that the process does to a halt.
#[test]
fn many_waits_leave_room_on_the_connection() {
    const KEYS: usize = 1100;
    let (told, tell) = std::sync::mpsc::channel();
    let told = Mutex::new(told);
    let server = welcoming(move |_, mut connection| {
        let mut asked = 0;
        loop {
            match connection.asked()? {
                (token, Asked::Acquire(mut row)) => {
                    row["instance_token"] = json!("somebody else's");
                    connection.answer_kept(token, &row)?;
                    asked += 1;
                    // All waiters have looked once more, as they do after they have begun to watch (R10).
                    if asked == 2 * KEYS {
                        let _ = told.lock().unwrap().send(connection.feeds_begun);
                    }
                }
                (token, Asked::Release(_)) => connection.answer_kept(token, &Value::Null)?,
            }
        }
    });
    let client = wait(Client::open(Some(&server.url()), options(60_000))).unwrap();
    let waits: Vec<_> = (0..KEYS)
        .map(|number| {
            let lock = client.lock(Key::new(format!("k{number}").as_bytes()).unwrap(), patient()).unwrap();
            runtime::handle().unwrap().spawn(async move { lock.lock(LockOptions::default()).get().await })
        })
        .collect();
    let feeds = tell.recv().unwrap();
    assert!((500..=1000).contains(&feeds), "{feeds} feeds");
    assert!(wait(client.find(&Key::new(b"k").unwrap())).unwrap().is_none());
    drop(wait(client.close(Boottime::now())));
    for wait in waits {
        assert!(!matches!(block_on(wait).unwrap(), Ok(Ok(true))));
    }
}
