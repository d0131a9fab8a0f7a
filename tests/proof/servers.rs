//! Real servers for tests, fetched and started by `tools/servers.sh`, which says how: nothing is
//! installed, and everything of a server lies in one directory below /tmp.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A server of this test's own, which ends with it, however it ends.
pub struct Server {
    /// For nblock: `redis://127.0.0.1:PORT`, `postgres://postgres@127.0.0.1:PORT/postgres`, `etcd://127.0.0.1:PORT`.
    pub url: String,
    pub port: u16,
    /// For SIGSTOP and the like.
    pub pid: i32,
    /// Its socket, where it has one.
    pub socket: Option<PathBuf>,
    kind: &'static str,
    behind: Option<u16>,
    directory: PathBuf,
    /// The tool, which stops the server when its standard input is closed, and so when this process ends.
    tool: Option<Child>,
}

impl Server {
    /// Starts a `redis`, `postgresql` or `etcd`, and returns when it answers. Options are the tool's: arguments of
    /// redis-server and etcd, NAME=VALUE of PostgreSQL.
    pub fn start(kind: &'static str, options: &[&str]) -> Server {
        Server::begin(kind, None, options)
    }

    /// Starts a `pgbouncer` or `sentinel` for the server on that port; options are lines of its configuration.
    pub fn before(port: u16, kind: &'static str, options: &[&str]) -> Server {
        Server::begin(kind, Some(port), options)
    }

    /// Starts a standby of this `postgresql`, which follows it by that name.
    pub fn standby(&self, name: &str, options: &[&str]) -> Server {
        let mut standby = Server::prepared("postgresql", None);
        let data = standby.directory.join("data");
        std::fs::create_dir_all(&standby.directory).unwrap();
        let source = format!("host=127.0.0.1 port={} user=postgres application_name={name}", self.port);
        let arguments =
            ["-D", data.to_str().unwrap(), "-d", &source, "-c", "fast", "--write-recovery-conf", "--no-sync"];
        self.ask("pg_basebackup", &arguments);
        // SAFETY: cannot fail and touches nothing.
        if unsafe { libc::geteuid() } == 0 {
            let owned = Command::new("chown").arg("-R").arg("nobody").arg(&standby.directory).status().unwrap();
            assert!(owned.success());
        }
        standby.restart(options);
        standby
    }

    fn begin(kind: &'static str, behind: Option<u16>, options: &[&str]) -> Server {
        let mut server = Server::prepared(kind, behind);
        server.restart(options);
        server
    }

    fn prepared(kind: &'static str, behind: Option<u16>) -> Server {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let directory = PathBuf::from(format!("/tmp/nblock-{kind}-{}-{number}", std::process::id()));
        Server { url: String::new(), port: 0, pid: 0, socket: None, kind, behind, directory, tool: None }
    }

    /// Starts it again after `stop` or `kill`, on the same port, with the data that it had.
    pub fn restart(&mut self, options: &[&str]) {
        assert!(self.tool.is_none(), "{} runs", self.kind);
        let mut command = tool();
        command.arg("run").arg(self.kind).arg(&self.directory);
        if let Some(port) = self.behind {
            command.arg("--to").arg(port.to_string());
        }
        command.arg("--").args(options);
        let mut tool = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("tools/servers.sh");
        // It ends its lines with the process id.
        let mut said = HashMap::new();
        for line in BufReader::new(tool.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let (name, value) = line.split_once('=').expect("NAME=VALUE of tools/servers.sh");
            let last = name == "pid";
            said.insert(name.to_owned(), value.to_owned());
            if last {
                break;
            }
        }
        let Some(pid) = said.get("pid") else {
            panic!("{} did not start: {:?}, see what tools/servers.sh printed", self.kind, tool.wait());
        };
        self.pid = pid.parse().unwrap();
        self.port = said["port"].parse().unwrap();
        self.url = said["url"].clone();
        self.socket = said.get("socket").map(PathBuf::from);
        self.tool = Some(tool);
    }

    /// Ends it in good order, without waiting for its clients. Its data stays for `restart`.
    pub fn stop(&mut self) {
        let Some(mut tool) = self.tool.take() else { return };
        drop(tool.stdin.take());
        assert!(tool.wait().unwrap().success(), "{} did not stop", self.kind);
    }

    /// Ends it by SIGKILL. Its data stays for `restart`.
    pub fn kill(&mut self) {
        let ended = tool().arg("stop").arg(&self.directory).arg("KILL").status().unwrap();
        assert!(ended.success(), "{} could not be killed", self.kind);
        self.stop();
    }

    /// What a program of the server's, such as redis-cli, prints; the `{port}` in its arguments is the server's.
    pub fn ask(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(root().join(".build/servers/bin").join(program));
        for argument in arguments {
            command.arg(argument.replace("{port}", &self.port.to_string()));
        }
        let output = command.env("ETCDCTL_API", "3").output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut tool) = self.tool.take() {
            drop(tool.stdin.take());
            let _ = tool.wait();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn tool() -> Command {
    Command::new(root().join("tools/servers.sh"))
}

// The data of a server outlives its end and its death, and it comes back on its port.
#[test]
fn servers_start_stop_and_come_back() {
    let mut redis = Server::start("redis", &["--appendonly", "yes", "--appendfsync", "always"]);
    redis.ask("redis-cli", &["-p", "{port}", "set", "key", "value"]);
    let port = redis.port;
    redis.kill();
    redis.restart(&["--appendonly", "yes"]);
    assert_eq!(redis.port, port);
    assert_eq!(redis.ask("redis-cli", &["-p", "{port}", "get", "key"]), "value");
    let sentinel = Server::before(redis.port, "sentinel", &["sentinel down-after-milliseconds nblock 500"]);
    let master = sentinel.ask("redis-cli", &["-p", "{port}", "sentinel", "get-master-addr-by-name", "nblock"]);
    assert_eq!(master, format!("127.0.0.1\n{port}"));

    let mut etcd = Server::start("etcd", &[]);
    etcd.ask("etcdctl", &["--endpoints", "127.0.0.1:{port}", "put", "key", "value"]);
    etcd.stop();
    etcd.restart(&[]);
    assert_eq!(etcd.ask("etcdctl", &["--endpoints", "127.0.0.1:{port}", "get", "--print-value-only", "key"]), "value");

    let select = ["-h", "127.0.0.1", "-p", "{port}", "-U", "postgres", "-Atc"];
    let mut postgres = Server::start("postgresql", &["max_connections=20"]);
    let sql = |server: &Server, text| server.ask("psql", &[&select[..], &[text]].concat());
    assert_eq!(sql(&postgres, "show max_connections"), "20");
    sql(&postgres, "create table kept as select 7 as value");
    postgres.kill();
    postgres.restart(&[]);
    let pooler = Server::before(postgres.port, "pgbouncer", &["max_client_conn = 50"]);
    assert_eq!(sql(&pooler, "select value from kept"), "7");
}
