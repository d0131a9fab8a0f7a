//! Locks on a PostgreSQL server, compared with the shortest statements with the same guarantees, on the same server and
//! in the same run. Uses the server in `NBLOCK_BENCH_POSTGRES_URL`, or starts one (tools/servers.sh).

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Client, NoTls};

use crate::{client, forever, give, hand_over, in_turns, lock, median, report, take};

const ROUNDS: usize = 300;

/// A table with only the columns that a lock needs.
const TABLE: &str = "CREATE TABLE IF NOT EXISTS bench_locks (key_hash bytea PRIMARY KEY, token bytea, \
    write_seq bigint, ends_at timestamptz, fence bigint) WITH (fillfactor = 50)";

/// Grants a lock: only if it is free, and only until $3 by the server's clock, with a lease and a fence. `lock_timeout`
/// limits the wait for a transaction that has locked the row, because the clock is not read during that wait.
const TAKE: &str = "UPDATE bench_locks SET token = $2, write_seq = 1, \
    ends_at = clock_timestamp() + 60000000 * interval '1 microsecond', fence = fence + 1 \
    WHERE key_hash = $1 AND token IS NULL AND clock_timestamp() <= $3::text::timestamptz \
    AND set_config('lock_timeout', '1000', true) IS NOT NULL RETURNING fence";

/// Releases the lock: only with its token, and without waiting for the disk.
const GIVE: &str = "UPDATE bench_locks SET token = NULL WHERE key_hash = $1 AND token = $2 \
    AND set_config('lock_timeout', '1000', true) || set_config('synchronous_commit', 'off', true) IS NOT NULL \
    RETURNING fence";

const NOTIFY: &str = "SELECT pg_notify($1, '') FROM (SELECT set_config('synchronous_commit', 'off', true)) AS done";

/// A server that was started for this measurement, and is stopped on drop.
struct Server(Option<Child>);

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut tool) = self.0.take() {
            drop(tool.stdin.take());
            let _ = tool.wait();
            let _ = std::fs::remove_dir_all(directory());
        }
    }
}

fn directory() -> String {
    format!("/tmp/nblock-bench-postgres-{}", std::process::id())
}

fn server() -> (String, Server) {
    if let Some(url) = std::env::var("NBLOCK_BENCH_POSTGRES_URL").ok().filter(|url| !url.is_empty()) {
        return (url, Server(None));
    }
    let tool = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/servers.sh");
    let mut tool = Command::new(tool)
        .args(["run", "postgresql", &directory(), "--", "max_connections=100"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("tools/servers.sh");
    let lines = BufReader::new(tool.stdout.take().expect("it was piped")).lines();
    let mut url = String::new();
    for line in lines.map(|line| line.expect("a line")) {
        match line.split_once('=') {
            Some(("url", given)) => url = given.to_string(),
            Some(("pid", _)) => break,
            _ => {}
        }
    }
    assert!(!url.is_empty(), "the server did not start");
    (url, Server(Some(tool)))
}

pub fn run() {
    let (url, _server) = server();
    for soft in [false, true] {
        let url = if soft { with(&url, "durability=soft") } else { url.clone() };
        cycles(&url, soft);
        many_clients(&url, soft);
    }
    handover(&with(&url, "durability=soft"));
}

fn with(url: &str, option: &str) -> String {
    format!("{url}{}{option}", if url.contains('?') { '&' } else { '?' })
}

/// The bare driver, with its own runtime thread.
struct Bare {
    client: Client,
    runtime: Arc<tokio::runtime::Runtime>,
    notified: Arc<Mutex<std::sync::mpsc::Receiver<()>>>,
    token: Vec<u8>,
    channel: String,
    key: Vec<u8>,
}

impl Bare {
    fn connect(url: &str, key: &str, soft: bool) -> Bare {
        let plain = url.split('?').next().expect("a URL");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = Arc::new(runtime.expect("a runtime"));
        let config: tokio_postgres::Config = plain.parse().expect("a URL");
        let (host, port) = (config.get_hosts()[0].clone(), config.get_ports()[0]);
        let tokio_postgres::config::Host::Tcp(host) = host else { panic!("a TCP host") };
        let (tell, notified) = std::sync::mpsc::channel();
        let client = runtime.block_on(async {
            let stream = tokio::net::TcpStream::connect((host, port)).await.expect("the server");
            stream.set_nodelay(true).expect("a socket");
            let (client, mut connection) = config.connect_raw(stream, NoTls).await.expect("it lets us in");
            tokio::spawn(async move {
                while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
                    if let AsyncMessage::Notification(_) = message {
                        let _ = tell.send(());
                    }
                }
            });
            client
        });
        let bare = Bare {
            client,
            runtime,
            notified: Arc::new(Mutex::new(notified)),
            token: b"0123456789abcdef0123456789abcdef.1".to_vec(),
            channel: format!("bench_{key}"),
            key: format!("{key:>20}").into_bytes(),
        };
        bare.ask(TABLE, &[]);
        if soft {
            bare.ask("SET synchronous_commit = off", &[]);
        }
        bare.ask(
            "INSERT INTO bench_locks VALUES ($1, NULL, 0, 'epoch', 0) ON CONFLICT DO NOTHING",
            &[(&bare.key, Type::BYTEA)],
        );
        bare
    }

    fn ask(&self, sql: &str, values: &[(&(dyn ToSql + Sync), Type)]) -> usize {
        self.runtime.block_on(self.client.query_typed(sql, values)).expect("an answer").len()
    }

    fn take(&self) -> bool {
        let never = "infinity".to_string();
        self.ask(TAKE, &[(&self.key, Type::BYTEA), (&self.token, Type::BYTEA), (&never, Type::TEXT)]) == 1
    }

    /// Releases the lock, and pipelines the notification behind it.
    fn give(&self) {
        let values: [(&(dyn ToSql + Sync), Type); 2] = [(&self.key, Type::BYTEA), (&self.token, Type::BYTEA)];
        let notify: [(&(dyn ToSql + Sync), Type); 1] = [(&self.channel, Type::TEXT)];
        self.runtime.block_on(async {
            let mut giving = Box::pin(self.client.query_typed(GIVE, &values));
            let mut telling = Box::pin(self.client.query_typed(NOTIFY, &notify));
            let mut told = false;
            let given = std::future::poll_fn(|context| {
                let given = giving.as_mut().poll(context);
                told = told || telling.as_mut().poll(context).is_ready();
                given
            });
            assert_eq!(given.await.expect("an answer").len(), 1);
        });
    }
}

fn name(soft: bool, what: &str) -> String {
    format!("postgres, {}: {what}", if soft { "soft" } else { "hard" })
}

fn cycles(url: &str, soft: bool) {
    let lock = lock(client(url), "jobs:cycles");
    let options = forever();
    take(lock, &options);
    give(lock);
    let bare = Bare::connect(url, "cycles", soft);
    let [ours, theirs] = in_turns(
        ROUNDS,
        [
            &mut || {
                let start = Instant::now();
                take(lock, &options);
                give(lock);
                start.elapsed()
            },
            &mut || {
                let start = Instant::now();
                assert!(bare.take());
                bare.give();
                start.elapsed()
            },
        ],
    );
    report(&name(soft, "acquire+release"), ours / 1e6, "the two shortest statements", theirs / 1e6, "ms", "<= 1.1");
}

/// Sixteen connections, each with its own key.
fn many_clients(url: &str, soft: bool) {
    const CLIENTS: usize = 16;
    let locks: Vec<usize> = (0..CLIENTS)
        .map(|number| {
            let url = with(url, &format!("application_name=bench{number}"));
            lock(client(&url), &format!("jobs:many{number}")) as usize
        })
        .collect();
    let bare: Vec<Bare> = (0..CLIENTS).map(|number| Bare::connect(url, &format!("many{number}"), soft)).collect();
    let rate = |work: &(dyn Fn(usize) + Sync)| {
        let (done, enough) = (AtomicU64::new(0), AtomicBool::new(false));
        let start = Instant::now();
        std::thread::scope(|scope| {
            for number in 0..CLIENTS {
                let (done, enough) = (&done, &enough);
                scope.spawn(move || {
                    while !enough.load(Ordering::Relaxed) {
                        work(number);
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(1500));
            enough.store(true, Ordering::Relaxed);
        });
        done.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64()
    };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        ours.push(rate(&|number| {
            take(locks[number] as _, &forever());
            give(locks[number] as _);
        }));
        theirs.push(rate(&|number| {
            assert!(bare[number].take());
            bare[number].give();
        }));
    }
    let (ours, theirs) = (median(ours), median(theirs));
    report(&name(soft, "16 clients, cycles a second"), ours, "those statements", theirs, "/s", ">= 0.9");
}

/// The time from one connection's release to another's grant.
fn handover(url: &str) {
    let other = with(url, "application_name=other");
    let locks = [lock(client(url), "jobs:handover") as usize, lock(client(&other), "jobs:handover") as usize];
    let (holder, waiter) = (Bare::connect(url, "handover", true), Bare::connect(url, "handover", true));
    waiter.ask(&format!("LISTEN {}", waiter.channel), &[]);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS / 3 {
        // During the pause, the waiter's LISTEN takes effect.
        ours.push(hand_over(locks, Duration::from_millis(30)));

        assert!(holder.take());
        while waiter.notified.lock().expect("one thread").try_recv().is_ok() {}
        std::thread::sleep(Duration::from_millis(5));
        let released = Instant::now();
        holder.give();
        waiter.notified.lock().expect("one thread").recv().expect("a notification");
        assert!(waiter.take());
        theirs.push(released.elapsed().as_nanos() as f64);
        waiter.give();
    }
    let (ours, theirs) = (median(ours) / 1e6, median(theirs) / 1e6);
    report("postgres: release to grant elsewhere", ours, "bare UPDATE and NOTIFY", theirs, "ms", "<= 1.5");
}
