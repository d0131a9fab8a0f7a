//! What a `postgres://` URL says, with libpq's names for its options, and what libpq's environment fills in.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::environment;
use super::table::{self, TableName};
use crate::error::Error;
use crate::key::Excerpt;
use crate::store::{StoreError, StoreOptions};
use crate::stores::network::address::Address;
use crate::stores::network::options::{self, wrong};
use crate::stores::network::secret::Secret;
use crate::stores::network::tls::{Check, Connector, OptionNames, Tls};
use crate::url::Url;

/// The port of a PostgreSQL server, and its socket's number (PostgreSQL src/include/pg_config_manual.h).
const DEFAULT_PORT: u16 = 5432;

/// Where Debian's servers have their socket, and where PostgreSQL itself would.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// How far a standby's clock may be from the primary's, where a URL names several servers.
const SKEW_OF_SEVERAL: Duration = Duration::from_millis(250);

/// The longest wait for a row that somebody else has locked.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

/// Ours, and libpq's that mean something here.
const OPTIONS: &[&str] = &[
    "table",
    "durability",
    "notify",
    "poll",
    "skew",
    "host",
    "port",
    "dbname",
    "user",
    "password",
    "passfile",
    "connect_timeout",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "target_session_attrs",
    "application_name",
    "fallback_application_name",
    "options",
    "channel_binding",
];

/// libpq's that change nothing here, and what Rails, Django, SQLAlchemy and Prisma put into such URLs for themselves.
const SKIPPED: &[&str] = &[
    // libpq
    "client_encoding",
    "gssdelegation",
    "gssencmode",
    "gsslib",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "krbsrvname",
    "load_balance_hosts",
    "sslcompression",
    "sslsni",
    "tcp_user_timeout",
    // Rails
    "adapter",
    "advisory_locks",
    "checkout_timeout",
    "database_tasks",
    "encoding",
    "idle_timeout",
    "insert_returning",
    "keepalive",
    "max_age",
    "max_connections",
    "migrations_paths",
    "min_connections",
    "min_messages",
    "pool",
    "prepared_statements",
    "reaping_frequency",
    "replica",
    "schema_dump",
    "schema_search_path",
    "statement_limit",
    "timeout",
    "variables",
    // others
    "conn_max_age",
    "connection_limit",
    "max_overflow",
    "pgbouncer",
    "pool_size",
    "pool_timeout",
    "prepared_statement_cache_size",
    "schema",
    "socket_timeout",
    "statement_cache_size",
];

/// Everything that a store needs to know before it connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub hosts: Vec<Address>,
    pub user: String,
    pub password: Option<Secret>,
    pub database: String,
    pub table: TableName,
    pub ssl: Ssl,
    writable: bool,
    application_name: String,
    options: Option<String>,
    /// Whether grants and renewals need not wait for the disk.
    pub soft: bool,
    /// Whether others are notified of releases, and notify us.
    pub notify: bool,
    /// How often a waiter looks that nothing tells.
    pub poll: Option<Duration>,
    pub skew: Duration,
    pub op_timeout: Duration,
    pub connect_timeout: Duration,
}

/// libpq's `sslmode` and the files that belong to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ssl {
    mode: &'static str,
    root: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
}

/// How connections may be made.
pub struct Encryption {
    pub connector: Option<Connector>,
    /// With TLS or without, in this order.
    pub ways: &'static [bool],
}

const MODES: [&str; 6] = ["prefer", "disable", "allow", "require", "verify-ca", "verify-full"];

/// Where the store is, for people: never with an account.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<String> = self.hosts.iter().map(Address::to_string).collect();
        write!(f, "postgres://{}/{} (table {}.{})", hosts.join(","), self.database, self.table.schema, self.table.table)
    }
}

impl Config {
    /// `variable` reads the environment.
    pub fn from_url(
        url: &Url,
        given: &StoreOptions,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Config, Error> {
        let skipped = |name: &str| SKIPPED.contains(&name);
        for (name, _) in url.options.iter().filter(|(name, _)| skipped(name)) {
            tracing::info!("the store URL's option {name} is for another program, and is ignored");
        }
        if let Some((name, _)) = url.options.iter().find(|(name, _)| !OPTIONS.contains(&&**name) && !skipped(name)) {
            let (name, scheme) = (Excerpt(name), &url.scheme);
            return Err(wrong(format!("has the unknown option {name:?}: {scheme}: takes {}", OPTIONS.join(", "))));
        }
        let option = |name: &str, variable_name: &str| {
            let given = url.option(name).filter(|value| !value.is_empty()).map(str::to_string);
            given.or_else(|| variable(variable_name))
        };
        let hosts = hosts(url, &variable)?;
        let user = url.user.clone().or_else(|| option("user", "PGUSER")).or_else(environment::account);
        let user = user.ok_or_else(|| wrong("has no user: write postgres://user@host/database"))?;
        let path = url.path.trim_matches('/').to_string();
        let database = Some(path).filter(|path| !path.is_empty()).or_else(|| option("dbname", "PGDATABASE"));
        let database = database.unwrap_or_else(|| user.clone());
        let password = url.password.clone().or_else(|| option("password", "PGPASSWORD"));
        let password = password.or_else(|| {
            let file = option("passfile", "PGPASSFILE").map(PathBuf::from);
            let file = file.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".pgpass")))?;
            environment::password_in(&file, &hosts[0], &database, &user)
        });
        let attrs = option("target_session_attrs", "PGTARGETSESSIONATTRS").unwrap_or_else(|| "any".to_string());
        let writable = match attrs.as_str() {
            // A lock is written: of several servers only one that takes writes is of use.
            "any" => hosts.len() > 1,
            "read-write" | "primary" => true,
            "read-only" | "standby" | "prefer-standby" => {
                return Err(wrong(format!(
                    "has target_session_attrs={attrs}: must be any, read-write or primary, because locks are written"
                )));
            }
            other => {
                return Err(wrong(format!(
                    "has target_session_attrs={:?}: must be any, read-write or primary",
                    Excerpt(other)
                )));
            }
        };
        if let Some(binding) = option("channel_binding", "PGCHANNELBINDING").filter(|binding| binding == "require") {
            return Err(wrong(format!(
                "has channel_binding={binding}, which is not supported: write sslmode=verify-full instead"
            )));
        }
        let connect_timeout = match option("connect_timeout", "PGCONNECT_TIMEOUT") {
            None => given.connect_timeout,
            Some(seconds) => match seconds.parse::<u32>() {
                Ok(0) => given.connect_timeout,
                Ok(seconds @ 1..=3600) => Duration::from_secs(seconds.into()),
                _ => {
                    return Err(wrong(format!(
                        "has connect_timeout={:?}: must be 0 to 3600 seconds",
                        Excerpt(&seconds)
                    )));
                }
            },
        };
        let several = hosts.len() > 1;
        Ok(Config {
            user,
            password: password.map(Secret),
            database,
            table: TableName::parse(url.option("table").unwrap_or(table::DEFAULT))?,
            ssl: ssl(&option, &variable)?,
            writable,
            application_name: option("application_name", "PGAPPNAME")
                .or_else(|| url.option("fallback_application_name").map(str::to_string))
                .unwrap_or_else(|| "nblock".to_string()),
            options: option("options", "PGOPTIONS"),
            soft: options::one_of(url, "durability", &["hard", "soft"])? == "soft",
            notify: options::switch(url, "notify")?.unwrap_or(true),
            poll: options::milliseconds(url, "poll")?.map(|poll| poll.max(Duration::from_millis(1))),
            skew: options::milliseconds(url, "skew")?.unwrap_or(if several { SKEW_OF_SEVERAL } else { Duration::ZERO }),
            op_timeout: given.op_timeout,
            connect_timeout,
            hosts,
        })
    }

    pub fn for_driver(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.user(&self.user).dbname(&self.database).application_name(&self.application_name);
        // TLS is ours, beneath the driver.
        config.ssl_mode(tokio_postgres::config::SslMode::Disable);
        if let Some(password) = &self.password {
            config.password(&password.0);
        }
        if let Some(options) = &self.options {
            config.options(options);
        }
        config
    }

    /// Reads the certificates. Does not touch the network.
    pub fn encryption(&self) -> Result<Encryption, StoreError> {
        let Ssl { mode, root, identity } = &self.ssl;
        let ways: &[bool] = match *mode {
            "disable" => &[false],
            "allow" => &[false, true],
            "prefer" => &[true, false],
            _ => &[true],
        };
        let check = match *mode {
            "verify-full" => Check::Name,
            "verify-ca" => Check::Authority,
            // As libpq does: an authority that is named is asked for.
            "require" if root.is_some() => Check::Authority,
            _ => Check::Nothing,
        };
        let names = OptionNames { tls: "sslmode=require", ca: "sslrootcert=", cert: "sslcert=", key: "sslkey=" };
        let connector = match ways.contains(&true) {
            true => Some(Connector::new(&Tls { ca: root.clone(), identity: identity.clone(), names, check })?),
            false => None,
        };
        Ok(Encryption { connector, ways })
    }

    /// Whether only a server that takes writes will do.
    pub fn must_be_writable(&self) -> bool {
        self.writable
    }

    /// How long a statement waits for a row that somebody else has locked.
    pub fn lock_timeout(&self) -> Duration {
        LOCK_TIMEOUT.min(self.op_timeout / 4).max(Duration::from_millis(1))
    }

    /// How long a statement may go unanswered before it is cancelled.
    pub fn silence(&self) -> Duration {
        self.op_timeout.max(2 * LOCK_TIMEOUT)
    }
}

/// The servers of the URL; where it names none, those of its options, of the environment, or this machine's.
fn hosts(url: &Url, variable: &impl Fn(&str) -> Option<String>) -> Result<Vec<Address>, Error> {
    let list = |text: String| text.split(',').map(str::to_string).collect::<Vec<String>>();
    let ports = url.option("port").map(str::to_string).or_else(|| variable("PGPORT")).map(list).unwrap_or_default();
    let names: Vec<(String, Option<u16>)> = match url.hosts.is_empty() {
        false => url.hosts.iter().map(|host| (host.name.clone(), host.port)).collect(),
        true => {
            let given = url.option("host").map(str::to_string).or_else(|| variable("PGHOST")).map(list);
            given.unwrap_or_else(|| vec![String::new()]).into_iter().map(|name| (name, None)).collect()
        }
    };
    if ports.len() > 1 && ports.len() != names.len() {
        return Err(wrong(format!(
            "has {} ports for {} hosts: must be one, or one for each",
            ports.len(),
            names.len()
        )));
    }
    let address = |(index, (name, port)): (usize, (String, Option<u16>))| {
        let given = ports.get(index).or(ports.first()).filter(|port| !port.is_empty());
        let given = given
            .map(|port| match port.parse::<u16>() {
                Ok(number) if number > 0 => Ok(number),
                _ => Err(wrong(format!("has the port {:?}: must be 1 to 65535", Excerpt(port)))),
            })
            .transpose()?;
        let port = port.or(given).unwrap_or(DEFAULT_PORT);
        let socket = |directory: &str| PathBuf::from(directory).join(format!(".s.PGSQL.{port}"));
        Ok(match name.as_str() {
            // libpq's default: the machine's own server, by its socket.
            "" => {
                let found = SOCKET_DIRECTORIES.iter().map(|directory| socket(directory)).find(|path| path.exists());
                found.map_or_else(|| Address::Tcp { host: "localhost".to_string(), port }, Address::Unix)
            }
            directory if directory.starts_with('/') => Address::Unix(socket(directory)),
            host => Address::Tcp { host: host.to_string(), port },
        })
    };
    names.into_iter().enumerate().map(address).collect()
}

fn ssl(
    option: &impl Fn(&str, &str) -> Option<String>,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Ssl, Error> {
    let given = option("sslmode", "PGSSLMODE");
    let mode = match &given {
        None => MODES[0],
        Some(given) => MODES.into_iter().find(|mode| mode == given).ok_or_else(|| {
            wrong(format!(
                "has sslmode={:?}: must be disable, allow, prefer, require, verify-ca or verify-full",
                Excerpt(given)
            ))
        })?,
    };
    let path = |name, variable_name| option(name, variable_name).map(PathBuf::from);
    let identity = match (path("sslcert", "PGSSLCERT"), path("sslkey", "PGSSLKEY")) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        _ => return Err(wrong("has only one of sslcert= and sslkey=: a client certificate needs both")),
    };
    let root = option("sslrootcert", "PGSSLROOTCERT");
    if root.as_deref() == Some("system") {
        // As libpq does: the system's authorities sign for anybody, so the name must be right.
        return match mode {
            "prefer" if given.is_none() => Ok(Ssl { mode: "verify-full", root: None, identity }),
            "verify-full" => Ok(Ssl { mode, root: None, identity }),
            _ => Err(wrong(format!("has sslrootcert=system and sslmode={mode}: must be sslmode=verify-full"))),
        };
    }
    let usual = || {
        let file = PathBuf::from(variable("HOME")?).join(".postgresql/root.crt");
        file.exists().then_some(file)
    };
    Ok(Ssl { mode, root: root.map(PathBuf::from).or_else(usual), identity })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn config_in(text: &str, environment: &[(&str, &str)]) -> Result<Config, Error> {
        let environment: HashMap<&str, &str> = environment.iter().copied().collect();
        let options = StoreOptions { op_timeout: Duration::from_secs(5), connect_timeout: Duration::from_secs(5) };
        let variable = |name: &str| environment.get(name).map(|value| value.to_string());
        Config::from_url(&Url::parse(text)?, &options, variable)
    }

    fn config(text: &str) -> Result<Config, Error> {
        config_in(text, &[])
    }

    fn hosts(config: &Config) -> Vec<String> {
        config.hosts.iter().map(Address::to_string).collect()
    }

    #[test]
    fn what_a_url_says() {
        let url = "postgresql://al:p%40ss@a,b:6000/app?table=s.t&durability=soft&notify=off&poll=50&skew=1s\
                   &sslmode=disable&application_name=jobs&connect_timeout=3&options=-c%20geqo%3Doff";
        let config = config(url).unwrap();
        assert_eq!(hosts(&config), ["a:5432", "b:6000"]);
        assert_eq!((config.user.as_str(), config.password.as_ref().unwrap().0.as_str()), ("al", "p@ss"));
        assert_eq!((config.database.as_str(), config.table.to_string().as_str()), ("app", "\"s\".\"t\""));
        assert!(config.soft && !config.notify && config.must_be_writable());
        assert_eq!((config.poll, config.skew), (Some(Duration::from_millis(50)), Duration::from_secs(1)));
        assert_eq!(config.connect_timeout, Duration::from_secs(3));
        assert_eq!((config.application_name.as_str(), config.options.as_deref()), ("jobs", Some("-c geqo=off")));
        assert!(!format!("{config:?} {config}").contains("p@ss"));
    }

    #[test]
    fn defaults_are_libpqs() {
        let config = config("postgres://u@h").unwrap();
        assert_eq!((hosts(&config), config.database.as_str()), (vec!["h:5432".to_string()], "u"));
        assert_eq!((config.ssl.mode, config.skew, config.notify), ("prefer", Duration::ZERO, true));
        assert!(!config.soft && !config.must_be_writable());
        assert_eq!(config.table.to_string(), "\"public\".\"nblock_locks\"");
        let several = super::tests::config("postgres://u@h,i/d").unwrap();
        assert_eq!(several.skew, Duration::from_millis(250));
    }

    #[test]
    fn sockets() {
        for url in ["postgres://u@%2Frun%2Fpg:7/d", "postgres:///d?host=/run/pg&port=7&user=u"] {
            assert_eq!(hosts(&config(url).unwrap()), ["/run/pg/.s.PGSQL.7"], "{url}");
        }
    }

    #[test]
    fn the_environment_fills_in_what_the_url_leaves_out() {
        let environment = [
            ("PGHOST", "x,y"),
            ("PGPORT", "1,2"),
            ("PGUSER", "pu"),
            ("PGPASSWORD", "pp"),
            ("PGDATABASE", "pd"),
            ("PGSSLMODE", "disable"),
            ("PGAPPNAME", "pa"),
        ];
        let all = config_in("postgres://", &environment).unwrap();
        assert_eq!(hosts(&all), ["x:1", "y:2"]);
        assert_eq!((all.user.as_str(), all.database.as_str(), all.ssl.mode), ("pu", "pd", "disable"));
        assert_eq!((all.password.unwrap().0.as_str(), all.application_name.as_str()), ("pp", "pa"));
        let none = config_in("postgres://u:p@h:3/d?sslmode=require", &environment[2..]).unwrap();
        assert_eq!(hosts(&none), ["h:3"]);
        assert_eq!((none.user.as_str(), none.database.as_str(), none.ssl.mode), ("u", "d", "require"));
        assert_eq!(none.password.unwrap().0, "p");
    }

    #[test]
    fn refuses_in_words() {
        for (url, part) in [
            ("postgres://u@h/d?durability=firm", "hard or soft"),
            ("postgres://u@h/d?sslmode=on", "verify-full"),
            ("postgres://u@h/d?sslcert=/x", "needs both"),
            ("postgres://u@h/d?sslrootcert=system&sslmode=require", "verify-full"),
            ("postgres://u@h/d?target_session_attrs=standby", "locks are written"),
            ("postgres://u@h/d?target_session_attrs=x", "read-write"),
            ("postgres://u@h/d?channel_binding=require", "channel_binding"),
            ("postgres://u@h/d?connect_timeout=x", "seconds"),
            ("postgres://u@h/d?table=a.b.c", "schema.table"),
            ("postgres://u@h/d?port=0", "65535"),
            ("postgres://u@h,i,j/d?port=1,2", "one for each"),
            ("postgres://u@h/d?tabel=x", "\"tabel\""),
            ("postgres://u@h/d?notify=maybe", "1 or 0"),
        ] {
            let error = config(url).unwrap_err();
            assert!(error.message().contains(part), "{url}: {error}");
        }
    }

    #[test]
    fn options_of_frameworks_are_skipped() {
        let rails = "postgres://u@h/d?pool=5&prepared_statements=false&encoding=unicode&gssencmode=disable";
        assert_eq!(config(rails).unwrap(), config("postgres://u@h/d").unwrap());
        let error = config(&format!("{rails}&tabel=x")).unwrap_err();
        assert!(error.message().contains("\"tabel\""), "{error}");
    }

    #[test]
    fn a_short_op_timeout_leaves_time_for_a_grant() {
        let mut config = config("postgres://u@h/d").unwrap();
        assert_eq!(config.lock_timeout(), Duration::from_secs(1));
        config.op_timeout = Duration::from_millis(200);
        assert_eq!(config.lock_timeout(), Duration::from_millis(50));
    }
}
